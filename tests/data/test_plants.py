"""Planted copies are what their names say, keep shape and type, and repeat with a seed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from lookalike.data import phantoms
from lookalike.data.plants import BLUR_SD, CROP, GAIN, KINDS, NOISE_SD, OFFSET, SHIFT, WEIGHT, plant


def random_images(n, channels=1, height=20, width=24, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, channels, height, width), dtype=np.uint8)


@given(st.sampled_from(KINDS), st.sampled_from([1, 3, 9]), st.integers(2, 5), st.integers(8, 30), st.integers(8, 30))
def test_shape_type_and_seed(kind, channels, n, height, width):
    images = random_images(n, channels, height, width)
    before = images.copy()
    made = plant(images, kind, seed=3)
    assert made.shape == images.shape
    assert made.dtype == np.uint8
    assert np.array_equal(made, plant(images, kind, seed=3))
    assert np.array_equal(images, before)
    assert not np.shares_memory(made, images)


@pytest.mark.parametrize("kind", ["noise", "shift", "crop", "interpolate"])
def test_another_seed_gives_another_copy(kind):
    images = random_images(12)
    assert not np.array_equal(plant(images, kind, 0), plant(images, kind, 1))


def test_noise_has_the_stated_deviation():
    images = np.full((4, 1, 64, 64), 128, np.uint8)
    made = plant(images, "noise").astype(float)
    assert made.std() == pytest.approx(255 * NOISE_SD, rel=0.03)  # 16,384 pixels: 0.6 % standard error
    assert made.mean() == pytest.approx(128, abs=0.5)


def test_shift_moves_by_two_pixels_along_each_axis():
    images = random_images(20)
    inner = np.s_[:, SHIFT:-SHIFT, SHIFT:-SHIFT]
    seen = set()
    for image, made in zip(images, plant(images, "shift")):
        moves = [
            (y, x)
            for y in (-SHIFT, SHIFT)
            for x in (-SHIFT, SHIFT)
            if np.array_equal(made[inner], np.roll(image, (y, x), (1, 2))[inner])
        ]
        assert len(moves) == 1
        seen.add(moves[0])
    assert len(seen) == 4


def test_flip_brightness_and_blur_against_their_formulas():
    images = random_images(3, 3)
    assert np.array_equal(plant(images, "flip"), images[..., ::-1])
    assert np.array_equal(plant(images, "brightness"), np.rint(GAIN * images.astype(np.float32) + OFFSET))
    blurred = np.rint(gaussian_filter(images.astype(np.float32), (0, 0, BLUR_SD, BLUR_SD), mode="nearest"))
    assert np.abs(plant(images, "blur") - blurred).max() <= 1


def test_crop_shows_nine_tenths_of_a_ramp():
    ramp = np.tile(np.arange(0, 200, 2, dtype=np.uint8), (1, 1, 100, 1))
    spread = np.ptp(plant(ramp, "crop")[0, 0, 50].astype(int))
    assert spread == pytest.approx(CROP * np.ptp(ramp), abs=3)


def test_jpeg_of_three_channels_is_one_colour_picture():
    grey = phantoms.grey28(4).image_set.images
    colour = plant(np.repeat(grey, 3, 1), "jpeg")
    assert np.abs(colour.astype(int) - plant(grey, "jpeg")).max() <= 2
    assert 0 < np.abs(plant(grey, "jpeg").astype(int) - grey).mean() < 8


def test_interpolate_mixes_with_another_image():
    images = np.arange(0, 200, 50, dtype=np.uint8)[:, None, None, None] * np.ones((1, 1, 8, 8), np.uint8)
    made = plant(images, "interpolate")[:, 0, 0, 0].astype(float)
    others = (made - WEIGHT * images[:, 0, 0, 0]) / (1 - WEIGHT)
    for i, other in enumerate(others):
        nearest = np.abs(images[:, 0, 0, 0] - other).argmin()
        assert nearest != i
        assert other == pytest.approx(images[nearest, 0, 0, 0], abs=2)


@pytest.mark.parametrize(
    ("images", "kind", "sentence"),
    [
        (np.zeros((2, 1, 8, 8)), "copy", "planted from uint8 images"),
        (random_images(2), "rotate", "one of copy, noise, shift"),
        (random_images(1), "interpolate", "at least two images, not 1"),
    ],
)
def test_what_cannot_be_planted_is_refused(images, kind, sentence):
    with pytest.raises(ValueError, match=sentence):
        plant(images, kind)
