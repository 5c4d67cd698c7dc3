import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from lookalike.data import as_tensor, phantoms
from lookalike.metrics.radiomics import (
    FEATURE_NAMES,
    FEATURE_NAMES_V1,
    frd_v0,
    frd_v1,
    radiomic_features,
    radiomic_features_v1,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "radiomics.json").read_text())
NAMES = {"v0": FEATURE_NAMES, "v1": FEATURE_NAMES_V1}
EXTRACT = {"v0": radiomic_features, "v1": radiomic_features_v1}
few = settings(max_examples=15, deadline=None)
small_images = st.tuples(st.integers(4, 9), st.integers(4, 9), st.integers(1, 256), st.integers(0, 10_000))


def made(entry):
    """The images that golden values were made of, from the same call."""
    kind, wanted = entry["phantom"], entry["settings"]
    if kind == "stripes":
        n, channels, h, w = wanted["shape"]
        row, column = np.mgrid[:h, :w]
        levels = np.array(wanted["levels"], np.uint8)
        images = np.tile(levels[(row * row + 2 * column) // 5 % len(levels)], (n, channels, 1, 1))
    else:
        images = getattr(phantoms, kind)(**wanted).image_set.images
    assert hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()[:16] == entry["sha256"]
    return images


def draw(drawn, n=1):
    """Images (n, 1, h, w) of so many grey levels."""
    h, w, levels, seed = drawn
    return np.random.default_rng(seed).integers(256 - levels, 256, (n, 1, h, w)).astype(np.uint8)


def value(images, name):
    return radiomic_features(images)[0, FEATURE_NAMES.index(name)]


@pytest.mark.parametrize(
    ("name", "version"), [(n, v) for n, entry in GOLDEN["images"].items() for v in NAMES if v in entry]
)
def test_features_equal_those_of_pyradiomics(name, version):
    entry = GOLDEN["images"][name]
    order = [GOLDEN["names"][version].index(feature) for feature in NAMES[version]]
    expected = np.array(entry[version])[:, order]
    # the absolute part is for means of high-pass bands, zero but for rounding
    np.testing.assert_allclose(EXTRACT[version](made(entry)), expected, rtol=1e-6, atol=1e-9)


def test_every_feature_of_pyradiomics_is_there():
    assert len(FEATURE_NAMES) == 102
    assert len(FEATURE_NAMES_V1) == 398
    assert all(sorted(NAMES[version]) == sorted(GOLDEN["names"][version]) for version in NAMES)


@pytest.mark.parametrize("pair", GOLDEN["distances"], ids=lambda pair: f"{pair['real']} {pair['synthetic']}")
def test_distances_equal_those_of_frd_score(pair):
    real, synthetic = (made(GOLDEN["sets"][pair[which]]) for which in ("real", "synthetic"))
    rows = radiomic_features(real), radiomic_features(synthetic)
    assert frd_v0(*rows) == pytest.approx(pair["v0"], rel=1e-6)
    assert frd_v0(*rows, pooled=False) == pytest.approx(pair["v0 independent"], rel=1e-6)
    found = frd_v1(real, synthetic)
    assert found == pytest.approx(pair["v1 without noise"], rel=1e-6)
    assert found == pytest.approx(pair["v1"], rel=0.01)  # z-scores of rounding noise among its features


@few
@given(small_images)
def test_every_image_has_finite_features(drawn):
    assert np.isfinite(radiomic_features(draw(drawn, 2))).all()


@few
@given(small_images)
def test_a_transposed_image_has_the_same_features(drawn):
    images = draw(drawn, 2)
    found, transposed = radiomic_features(images), radiomic_features(images.transpose(0, 1, 3, 2))
    np.testing.assert_allclose(transposed, found, rtol=1e-7, atol=1e-7)


@few
@given(small_images)
def test_an_image_has_the_same_features_in_any_company(drawn):
    images = draw(drawn, 3)
    images[1] = 7  # a constant one among them
    alone = np.concatenate([radiomic_features(images[i : i + 1]) for i in range(3)])
    np.testing.assert_allclose(radiomic_features(images), alone, rtol=1e-9, atol=1e-9)


@few
@given(small_images)
def test_zones_and_runs_are_counted_as_one_by_one(drawn):
    images = draw(drawn)
    levels = images[0, 0] // 25 + 1
    levels[0, 0] = 0
    pixels = levels.size - 1
    zones = sum(ndimage.label(levels == level, np.ones((3, 3)))[1] for level in np.unique(levels[levels > 0]))
    assert value(images, "glszm_ZonePercentage") == pytest.approx(zones / pixels)
    lines = {
        "rows": list(levels),
        "columns": list(levels.T),
        "down": [levels.diagonal(k) for k in range(-levels.shape[0], levels.shape[1])],
        "up": [levels[:, ::-1].diagonal(k) for k in range(-levels.shape[0], levels.shape[1])],
    }
    runs = []
    for along in lines.values():
        joined = [level for line in along for level in (*line, 0)]
        runs.append(sum(b > 0 and a != b for a, b in zip([0, *joined], joined)))
    assert value(images, "glrlm_RunPercentage") == pytest.approx(np.mean(runs) / pixels)


def test_textures_of_a_checkerboard():
    """Every row and column alternates, every diagonal is of one level: known without a program."""
    board = np.indices((8, 8)).sum(0) % 2 * 100 + 50
    images = board.astype(np.uint8)[None, None]
    assert value(images, "glcm_Contrast") == pytest.approx(np.mean([16, 16, 0, 0]))  # levels 1 and 5
    assert value(images, "glszm_ZonePercentage") == pytest.approx(2 / 63)  # diagonals join
    assert value(images, "firstorder_Uniformity") == pytest.approx((31**2 + 32**2) / 63**2)


def test_a_brighter_image_has_the_same_texture():
    images = phantoms.grey28(2, seed=0).image_set.images // 2
    texture = [i for i, name in enumerate(FEATURE_NAMES) if name.split("_")[0] not in ("firstorder", "shape2D")]
    brighter = radiomic_features(images + np.uint8(50))  # two bins
    np.testing.assert_allclose(brighter[:, texture], radiomic_features(images)[:, texture], rtol=1e-12)


def test_pixels_and_floats_agree():
    images = phantoms.grey28(3, seed=1).image_set.images
    assert np.array_equal(radiomic_features(as_tensor(images)), radiomic_features(images))


def test_constant_images_have_no_features_of_v1():
    images = phantoms.grey28(3, seed=1).image_set.images.copy()
    images[1] = 90
    assert np.isnan(radiomic_features_v1(images)).all(1).tolist() == [False, True, False]


def test_v0_of_a_set_with_itself_is_zero_and_it_is_symmetric():
    a, b = (radiomic_features(phantoms.grey28(12, seed=seed).image_set.images) for seed in (0, 1))
    assert frd_v0(a, a) == pytest.approx(0, abs=1e-9)
    assert frd_v0(a, b) == pytest.approx(frd_v0(b, a), rel=1e-9)


def test_both_distances_grow_with_the_blur():
    """And two draws of one distribution are nearer than any of it."""
    images = phantoms.grey28(25, seed=0).image_set.images
    other = phantoms.grey28(25, seed=1).image_set.images
    blurred = [ndimage.gaussian_filter(other, (0, 0, s, s)) for s in (0.0, 0.7, 1.5)]
    for distance, extract in ((frd_v0, radiomic_features), (frd_v1, radiomic_features_v1)):
        real = extract(images)
        found = [distance(real, extract(made)) for made in blurred]
        assert found == sorted(found)


def test_v0_puts_nan_in_the_middle_as_a_feature_that_never_varies():
    rng = np.random.default_rng(0)
    real, synthetic = rng.normal(size=(9, 4)), rng.normal(size=(9, 4))
    constant = frd_v0(np.c_[real, np.ones(9)], np.c_[synthetic, np.ones(9)])
    missing = frd_v0(np.c_[real, np.full(9, np.nan)], np.c_[synthetic, np.full(9, np.nan)])
    assert constant == missing == pytest.approx(frd_v0(real, synthetic))


def test_v1_leaves_out_images_with_nan_and_features_that_do_not_vary():
    rng = np.random.default_rng(0)
    real, synthetic = rng.normal(size=(30, 4)), rng.normal(size=(30, 4))
    gap = np.full((1, 5), np.nan)
    found = frd_v1(np.r_[np.c_[real, np.ones(30)], gap], np.r_[np.c_[synthetic, rng.normal(size=30)], gap])
    assert found == pytest.approx(frd_v1(real, synthetic))


def test_bad_input_gets_a_sentence():
    with pytest.raises(ValueError, match="at least 4 px a side"):
        radiomic_features(np.zeros((2, 1, 3, 8), np.uint8))
    with pytest.raises(ValueError, match="C 1 or 3"):
        radiomic_features(np.zeros((2, 2, 8, 8), np.uint8))
    with pytest.raises(ValueError, match="two real and two synthetic images that are not constant"):
        frd_v1(np.zeros((3, 1, 8, 8), np.uint8), np.zeros((3, 1, 8, 8), np.uint8))
