"""Measures of GANs on lesions: published and like for like, with worthless, perfect and single-class GANs planted."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lookalike.data import datasets, phantoms
from lookalike.metrics.distances import frechet_distance, kernel_distance, precision_recall_density_coverage
from lookalike.metrics.extractors import random_conv
from lookalike.metrics.features import features
from lookalike.metrics.paths import trimmed_mean
from lookalike.metrics.perceptual import stlpips
from lookalike.models.stylegan2 import Generator
from lookalike.training import lesion_measures
from lookalike.training.lesion_measures import (
    CONTROL,
    Bench,
    enlarged,
    load_arms,
    measure_gans,
    path_lengths,
    set_distances,
    view,
    with_intervals,
)

SIDE, PAIRS = 16, 6
EXTRACTOR = random_conv(0, image_size=SIDE, dim=16)
SEEDS = {"train": 0, "val": 1, "test": 2}
MEASURES = (
    "frechet_distance", "kernel_percent", "precision", "recall", "density", "coverage", "hue", "saturation",
    "brightness",
)  # fmt: skip


def lesions(seed, n, split="train"):
    return phantoms.dermoscopy(n, seed, split=split, image_size=SIDE).image_set


def imbalanced(name, split="train", image_size=None):
    """Three benign lesions for each melanoma in train, and a third of them held out."""
    whole = lesions(SEEDS[split], 240 if split == "train" else 120, split)
    return whole.subset(np.flatnonzero((whole.labels == 0) | (np.arange(len(whole)) % 6 == 1)))


def networks(folder):
    """Tiny generators, conditional or not by the folder's name; their weights are random, which serves path length."""
    torch.manual_seed(0)
    classes = 0 if str(folder).endswith(("ben", "mal")) else 2
    small = {"latent_dim": 8, "w_dim": 8, "base": 64, "max_channels": 8, "num_classes": classes}
    return Generator(image_size=SIDE, **small).eval(), nn.Identity()


def save_arm(folder, name, images):
    where = folder / name
    where.mkdir()
    samples = {"images": torch.tensor(images.images), "labels": torch.tensor(images.labels)}
    save_file(samples, where / "samples.safetensors")
    return str(where)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A GAN that draws from the very distribution, one whose colours have turned to blue, and one of each class."""
    folder = tmp_path_factory.mktemp("arms")
    good, other = lesions(7, 160), lesions(8, 160)
    blue = dataclasses.replace(good, images=good.images[:, ::-1].copy())
    trained = {
        "good": save_arm(folder, "good", good),
        "blue": save_arm(folder, "blue", blue),
        "ben": save_arm(folder, "ben", other.subset(other.labels == 0)),
        "mal": save_arm(folder, "mal", other.subset(other.labels == 1)),
    }
    settings = {
        "data": "", "image_size": SIDE, "trained": trained, "pairs": {"per_class": ["ben", "mal"]}, "seed": 0,
        "feature_size": SIDE, "path_pairs": PAIRS, "halves": 4,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load", imbalanced)
        patch.setattr(lesion_measures, "load_networks", networks)
        patch.setattr(lesion_measures, "efficientnet_lite0", lambda size, device: EXTRACTOR)
        return measure_gans(folder, **settings), settings


def rows(found, **wanted):
    return [row for row in found["rows"] if wanted.items() <= row.items()]


def value(found, measure, **wanted):
    (row,) = rows(found, **wanted)
    return row[measure]["value"]


# --- distances ----------------------------------------------------------------------------------------------


def test_the_result_is_plain_and_each_arm_has_its_rows(measured):
    found, _ = measured
    json.dumps(found, allow_nan=False)
    expected = {"good": 4, "blue": 4, "ben": 3, "mal": 3, "per_class": 4, CONTROL: 4}
    assert {name: len(rows(found, arm=name)) for name in expected} == expected
    assert all(set(MEASURES) <= set(row) for row in found["rows"])
    assert all(sum((row["own"], not row["matched"])) == 2 for row in rows(found, matched=False))
    assert (found["classes"], found["k"], found["features"]) == (["benign", "melanoma"], 3, EXTRACTOR.name)


def test_published_rows_take_each_arm_s_own_reference_at_full_size(measured):
    found, _ = measured
    sizes = {row["arm"]: (row["reference"], row["real_images"], row["made_images"])
             for row in rows(found, matched=False)}  # fmt: skip
    assert sizes["ben"] == ("benign", 120, 80)
    assert sizes["mal"] == ("melanoma", 40, 80)
    assert sizes["good"] == ("all", 160, 106)  # 80 benign ones are three quarters
    assert sizes[CONTROL] == ("all", 160, 80)


def test_matched_rows_have_the_same_real_images_and_as_many_made_ones(measured):
    found, _ = measured
    assert found["matched_counts"] == {"benign": 60, "melanoma": 20, "all": 80}
    for reference, count in found["matched_counts"].items():
        sizes = {(row["real_images"], row["made_images"]) for row in rows(found, matched=True, reference=reference)}
        assert sizes == {(count, count)}
    joined, alone = (rows(found, arm=name, made="melanoma", matched=True)[0] for name in ("per_class", "mal"))
    assert [joined[name] for name in MEASURES] == [alone[name] for name in MEASURES]


def test_the_numbers_are_those_of_the_metrics(measured):
    found, settings = measured
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load", imbalanced)
        train, _, arms = load_arms("", SIDE, settings["trained"], ("val",))
    real = features(train.images[train.labels == 1], EXTRACTOR)
    made = features(arms["mal"].images, EXTRACTOR)
    (row,) = rows(found, arm="mal", matched=False)
    assert row["frechet_distance"]["value"] == pytest.approx(frechet_distance(real, made))
    kernel = kernel_distance(real, made)
    assert row["kernel_percent"]["value"] == pytest.approx(100 * kernel.value)
    half = (row["kernel_percent"]["high"] - row["kernel_percent"]["low"]) / 2
    assert half == pytest.approx(196 * kernel.standard_error)
    balls = precision_recall_density_coverage(real, made, 3)
    assert {name: row[name]["value"] for name in balls} == pytest.approx(balls)


def test_blue_lesions_are_found_and_the_control_is_not(measured):
    """Red and blue exchanged: red to brown turns by some 200 degrees, and the short way round is below 180."""
    found, _ = measured
    where = {"made": "all", "reference": "all", "matched": True}
    assert value(found, "hue", arm="blue", **where) > 120
    assert max(value(found, "hue", arm=name, **where) for name in ("good", CONTROL)) < 5
    (control,), (blue,) = (rows(found, arm=name, **where) for name in (CONTROL, "blue"))
    for name in ("frechet_distance", "kernel_percent", "hue"):
        assert blue[name]["low"] > control[name]["high"]
    assert blue["precision"]["value"] < 0.5 < control["precision"]["value"]


def test_another_reference_set_makes_another_number():
    """Every melanoma is dark: mirrored benign lesions are near their own class and far from both together, which is
    what the paper's table mixes.
    """
    dark = lesions(0, 120)
    dark.images[dark.labels == 1] //= 10
    mirrored = dataclasses.replace(dark, images=dark.images[..., ::-1].copy())
    real, made = (view(images, EXTRACTOR) for images in (dark, mirrored))
    benign = made.take(np.flatnonzero(made.labels == 0))
    bench = Bench(real, {"ben": benign, "joined": made}, ("benign", "melanoma"), 0, 0)
    ben, joined = ({row["reference"]: row for row in bench.rows(name) if row["matched"]} for name in bench.arms)
    for name in ("frechet_distance", "kernel_percent"):
        assert 2 * ben["benign"][name]["value"] < ben["all"][name]["value"]
        assert 2 * joined["all"][name]["value"] < ben["all"][name]["value"]
    assert ben["all"]["recall"]["value"] < 0.7 < joined["all"]["recall"]["value"]
    assert not ben["all"]["own"]
    assert joined["all"]["own"]


def test_intervals_hold_the_value_and_keep_to_its_range(measured):
    for row in rows(measured[0], matched=True):
        for name in MEASURES:
            part = row[name]
            assert part["low"] <= part["value"] <= part["high"]
            assert name == "kernel_percent" or part["low"] >= 0
    with pytest.raises(ValueError, match="two halves or more"):
        with_intervals(None, None, halves=1)


def test_a_set_against_itself_has_the_best_values():
    of = view(lesions(0, 24), EXTRACTOR)
    found = set_distances(of, of)
    assert found["frechet_distance"] == pytest.approx(0, abs=1e-6)
    assert [found[name] for name in ("precision", "recall", "coverage", "hue", "saturation")] == [1, 1, 1, 0, 0]


def test_sets_that_cannot_be_compared_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load", imbalanced)
    few = view(lesions(7, 20), EXTRACTOR)
    with pytest.raises(ValueError, match="10 images of benign, fewer than 12"):
        Bench(few, {"few": few}, ("benign", "melanoma"), 0, 2).counts()
    with pytest.raises(ValueError, match="at least one trained GAN"):
        load_arms("", SIDE, {}, ("val",))
    images = lesions(0, 24)
    arms = {"a": images, "b": images}
    with pytest.raises(ValueError, match="make the same class"):
        lesion_measures._joined("both", ["a", "b"], arms)
    with pytest.raises(ValueError, match="joins trained GANs under a new name"):
        lesion_measures._joined("a", ["a", "b"], arms)


# --- path length --------------------------------------------------------------------------------------------


def test_paths_have_a_row_by_class_and_the_joined_gan_has_those_of_its_parts(measured):
    found, _ = measured
    by = {(row["arm"], row["made"]): row for row in found["paths"]}
    both = ("benign", "melanoma", "all")
    assert set(by) == {(arm, made) for arm in ("good", "blue", "per_class") for made in both} | {
        ("ben", "benign"), ("mal", "melanoma"),
    }  # fmt: skip
    for arm, made in (("ben", "benign"), ("mal", "melanoma")):
        assert by["per_class", made] | {"arm": arm} == by[arm, made]
    assert all(row["pairs"] == PAIRS and row["low"] <= row["value"] <= row["high"] for row in found["paths"])
    assert by["good", "all"]["value"] != by["good", "benign"]["value"]
    assert (found["path_distance"], found["path_side"]) == ("ST-LPIPS (vgg)", 32)


@pytest.mark.parametrize("label", [None, 1])
def test_path_lengths_are_second_differences_of_the_distance(label):
    """The slow twin: at the end of a straight path the squared distance grows as length times epsilon squared."""
    generator, distance = networks("ben" if label is None else "cond")[0], stlpips("vgg")
    found = path_lengths(generator, distance, label, 3, seed=0, batch_size=3)
    z = torch.Generator().manual_seed(lesion_measures.stream(0, "paths").initial_seed())
    labels = None if label is None else torch.full((3,), label)
    with torch.no_grad():
        generator.noise(3, z)  # the first draw looks whether the noise is fixed
        a, b = (generator.map(generator.noise(3, z), labels).double() for _ in range(2))
        exact, apart = networks("ben" if label is None else "cond")[0].double(), stlpips("vgg").double()
        ends = [exact.synthesise(w, "fixed") for w in (a, a + 1e-4 * (b - a))]
        expected = apart(*(enlarged(images, distance.smallest) for images in ends)) / 1e-8
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert trimmed_mean(found) > 0
    assert next(distance.parameters()).dtype == next(generator.parameters()).dtype == torch.float32


def test_images_are_doubled_until_they_fit():
    images = torch.rand(1, 3, 8, 8)
    assert enlarged(images, 18).shape == (1, 3, 32, 32)
    assert enlarged(images, 8) is images
