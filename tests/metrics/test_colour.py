"""Distances between colours: a linear programme as the slow twin, colours turned on purpose, real against real."""

import colorsys

import numpy as np
import pytest
import torch
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from scipy.optimize import linprog
from scipy.stats import wasserstein_distance

from lookalike.data import phantoms
from lookalike.metrics.colour import (
    circular_distance,
    colour_distances,
    hue_distance,
    hue_histogram,
    hue_weights,
    level_histograms,
    line_distance,
)


def lesions(seed, n=40, image_size=16):
    return phantoms.dermoscopy(n, seed, image_size=image_size).image_set.images


def coloured(n=6, side=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 3, side, side), np.uint8)


def changed(images, hue=0.0, saturation=1.0, brightness=1.0):
    """Images with their hue turned by so many degrees and saturation and value multiplied."""
    hsv = rgb_to_hsv(images.transpose(0, 2, 3, 1) / 255)
    hsv[..., 0] = (hsv[..., 0] + hue / 360) % 1
    hsv[..., 1:] *= (saturation, brightness)
    return np.rint(255 * hsv_to_rgb(hsv)).astype(np.uint8).transpose(0, 3, 1, 2)


def transport(first, second):
    """The slow twin: the cheapest way of all to move one histogram onto the other around the circle."""
    bins = len(first)
    steps = np.abs(np.subtract.outer(np.arange(bins), np.arange(bins)))
    cost = np.minimum(steps, bins - steps) * 360 / bins
    rows, columns = np.kron(np.eye(bins), np.ones(bins)), np.kron(np.ones(bins), np.eye(bins))
    found = linprog(cost.ravel(), A_eq=np.concatenate([rows, columns]), b_eq=np.concatenate([first, second]))
    assert found.success
    return found.fun


@pytest.mark.parametrize("bins", [5, 8, 12])
def test_the_circular_distance_is_the_cheapest_transport(bins):
    rng = np.random.default_rng(bins)
    for _ in range(4):
        first, second = rng.dirichlet(np.full(bins, 0.5), 2)
        assert circular_distance(first, second) == pytest.approx(transport(first, second), abs=1e-7)


@pytest.mark.parametrize(("step", "degrees"), [(0, 0), (1, 10), (35, 10), (18, 180), (20, 160)])
def test_a_single_hue_moves_the_short_way_round(step, degrees):
    first, second = np.eye(36)[0], np.eye(36)[step]
    assert circular_distance(first, second) == pytest.approx(degrees)
    assert circular_distance(second, first) == pytest.approx(degrees)


def test_hues_and_chroma_are_those_of_the_standard_library():
    images, bins = coloured(), 12
    images[0, :, 0] = images[0, :1, 0]  # a grey line, which counts for nothing
    expected = np.zeros((len(images), bins))
    for row, image in zip(expected, images):
        for pixel in image.reshape(3, -1).T / 255:
            hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
            row[int(hue * bins)] += saturation * value
    np.testing.assert_allclose(hue_weights(images, bins), expected, rtol=1e-5)
    np.testing.assert_allclose(hue_histogram(images, bins), expected.sum(0) / expected.sum(), rtol=1e-5)


def test_the_six_pure_colours_have_their_hues():
    colours = {"red": 0, "yellow": 60, "green": 120, "cyan": 180, "blue": 240, "magenta": 300}
    pure = [(255, 0, 0), (255, 255, 0), (0, 255, 0), (0, 255, 255), (0, 0, 255), (255, 0, 255)]
    for degrees, pixel in zip(colours.values(), pure):
        image = np.array(pixel, np.uint8).reshape(1, 3, 1, 1)
        assert hue_histogram(image).argmax() == degrees // 10


@pytest.mark.parametrize("turn", [40, -40, 120])
def test_a_planted_turn_of_the_hue_is_found(turn):
    """Phantom lesions are red to brown, within 60 degrees, so that all of the chroma moves as it was turned."""
    real = lesions(0)
    assert hue_distance(real, changed(real, hue=turn)) == pytest.approx(abs(turn), abs=1)
    assert hue_distance(real, changed(real, hue=turn), bins=360) == pytest.approx(abs(turn), abs=1)


def test_real_lesions_lie_near_real_lesions():
    control = colour_distances(lesions(0), lesions(1))
    assert control["hue"] < 3
    assert max(control["saturation"], control["brightness"]) < 0.06
    assert colour_distances(lesions(0), lesions(0)) == {"hue": 0, "saturation": 0, "brightness": 0}


def test_a_turned_quarter_counts_as_a_quarter():
    """All of one hue: what lies between the histograms is a quarter of the chroma, 40 degrees away."""
    real = np.zeros((8, 3, 4, 4), np.uint8)
    real[:, 0] = 200
    made = real.copy()
    made[:2] = changed(real[:2], hue=45)
    assert hue_distance(real, made) == pytest.approx(10, abs=0.01)


def test_saturation_and_brightness_are_scipy_s():
    real, made = coloured(seed=1), changed(coloured(seed=2), saturation=0.6, brightness=0.7)
    found = colour_distances(real, made)
    first, second = (rgb_to_hsv(x.transpose(0, 2, 3, 1) / 255).reshape(-1, 3).T for x in (real, made))
    assert found["brightness"] == pytest.approx(wasserstein_distance(first[2], second[2]), abs=1e-9)
    assert found["saturation"] == pytest.approx(wasserstein_distance(first[1], second[1]), abs=1 / 255)
    assert found["saturation"] > 0.1
    assert found["brightness"] > 0.1
    parts = level_histograms(real)
    assert line_distance(parts[1].sum(0), parts[1].sum(0)) == 0
    assert (parts.sum(2) == 64).all()


def test_floats_tensors_and_parts_give_the_same(monkeypatch):
    images = coloured()
    floats = torch.tensor(images).float() / 127.5 - 1
    np.testing.assert_array_equal(hue_weights(floats), hue_weights(images))
    whole = hue_weights(images), level_histograms(images)
    monkeypatch.setattr("lookalike.metrics.colour.AT_ONCE", 100)
    np.testing.assert_array_equal(hue_weights(images), whole[0])
    np.testing.assert_array_equal(level_histograms(images), whole[1])


def test_what_has_no_colour_is_refused():
    with pytest.raises(ValueError, match="grey in every pixel"):
        hue_histogram(np.full((2, 3, 4, 4), 90, np.uint8))
    with pytest.raises(ValueError, match=r"shape \(N, 3, H, W\)"):
        hue_histogram(np.zeros((2, 1, 4, 4), np.uint8))
    with pytest.raises(ValueError, match="two bins or more"):
        hue_histogram(coloured(), bins=1)
    with pytest.raises(ValueError, match="one shape"):
        circular_distance(np.ones(3) / 3, np.ones(4) / 4)
