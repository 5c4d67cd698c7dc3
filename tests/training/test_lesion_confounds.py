"""Archive, area and frame: closed forms, slow twins, known factors of phantoms, and frames that must be found."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from scipy.stats import binom, spearmanr
from skimage.filters import threshold_otsu
from sklearn.metrics import accuracy_score, balanced_accuracy_score, roc_auc_score
from torch import nn

from lookalike.data import as_tensor, datasets, phantoms
from lookalike.metrics import extractors
from lookalike.metrics.intervals import bootstrap
from lookalike.metrics.scores import auroc
from lookalike.training.lesion_classifiers import classify_arms, load_scores
from lookalike.training.lesion_confounds import (
    archive_arithmetic,
    area_confound,
    correlation_rows,
    dark_area,
    frame_rule,
    frame_score,
    load_areas,
    luma,
    otsu,
    planted_frames,
    spearman,
)

SIDE = 16


class Means(nn.Module):
    """Colours on a 4 x 4 grid: features that need no training."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images):
        return self.scale * F.adaptive_avg_pool2d(images, 4).flatten(1)


def means(image_size, device="cpu"):
    return extractors.Extractor(f"means@{image_size}", 48, image_size, Means().requires_grad_(False))


def lesions(seed, n, split="train", frames=(0.0, 0.0), side=SIDE):
    return phantoms.dermoscopy(n, seed, split=split, image_size=side, frame_probability=frames)


def small_load(name, split="train", image_size=None):
    return lesions(("train", "val", "test").index(split), 60, split).image_set


# --- the archive --------------------------------------------------------------------------------------------


def test_the_archive_alone_beats_every_accuracy_of_table_2():
    found = archive_arithmetic()
    assert round(found["accuracy"], 4) == 0.9845
    assert found["accuracy"] > 0.979  # the best accuracy printed
    assert round(found["auc"], 3) == 0.943
    assert round(found["majority"], 3) == 0.864
    assert found["images"] == 37648
    labels = np.repeat([0, 1, 1], [32542, 584, 4522])
    archive = np.repeat([0, 0, 1], [32542, 584, 4522])
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, archive))
    assert found["auc"] == pytest.approx(roc_auc_score(labels, archive))
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, archive))
    assert found["sensitivity"] == pytest.approx(archive[labels == 1].mean())
    with pytest.raises(ValueError, match="some of the malignant"):
        archive_arithmetic(10, 5, 4)


# --- area ---------------------------------------------------------------------------------------------------


def test_luma_of_pure_colours():
    images = 255 * np.eye(3, dtype=np.uint8)[:, :, None, None] * np.ones((1, 1, 2, 2), np.uint8)
    assert luma(images)[:, 0, 0].tolist() == [round(255 * w) for w in (0.299, 0.587, 0.114)]
    grey = np.arange(4, dtype=np.uint8).reshape(1, 1, 2, 2)
    assert (luma(grey) == grey[:, 0]).all()
    with pytest.raises(ValueError, match="9 channels"):
        luma(np.zeros((1, 9, 4, 4), np.uint8))


def test_otsu_is_scikit_image_s():
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.normal(80, 12, (20, 150)), rng.normal(170, 15, (20, 250))], 1).clip(0, 255)
    rows = rows.astype(np.uint8)
    assert otsu(rows).tolist() == [threshold_otsu(row) for row in rows]
    assert otsu(np.full((1, 9), 7, np.uint8)).tolist() == [-1]


@pytest.mark.parametrize("frames", [(0.0, 0.0), (0.0, 1.0)])
def test_dark_area_follows_the_known_radius(frames):
    made = lesions(0, 120, side=32, frames=frames)
    found = dark_area(made.image_set.images)
    assert spearmanr(found, made.factors["radius"])[0] > 0.8
    np.testing.assert_allclose(dark_area(as_tensor(made.image_set)), found)


def test_dark_area_of_a_disc_is_its_area():
    line = (np.arange(64) + 0.5) / 32 - 1
    radius = np.hypot(line[:, None], line)
    images = np.where(radius < 0.45, 60, 200).astype(np.uint8)[None, None]
    assert dark_area(images)[0] == pytest.approx(0.25, abs=0.01)
    framed = np.where(radius < 0.95, images, 0).astype(np.uint8)
    assert dark_area(framed)[0] == dark_area(images)[0]  # a frame is no lesion
    assert dark_area(np.full((1, 1, 16, 16), 9, np.uint8))[0] == 0
    with pytest.raises(ValueError, match="16 px"):
        dark_area(np.zeros((1, 1, 8, 8), np.uint8))


def test_spearman_is_scipy_s_with_repeated_rows():
    rng = np.random.default_rng(0)
    first = rng.integers(0, 9, 40)  # many ties
    second = np.round(first + 4 * rng.normal(size=40), 1)
    weights = rng.integers(0, 4, (7, 40))
    expected = [spearmanr(np.repeat(first, row), np.repeat(second, row))[0] for row in weights]
    np.testing.assert_allclose(spearman(first, second, weights=weights), expected)
    assert spearman(first, second) == pytest.approx(spearmanr(first, second)[0])
    assert spearman(first, -first) == pytest.approx(-1)
    assert np.isnan(spearman(first, np.zeros(40)))


def test_a_correlation_that_is_only_the_class_s_is_gone_within_classes():
    """Within a class the truth is 0: of 120 intervals of 95 % about 6 miss it, and hardly ever more than 14."""
    labels, missed = np.arange(120) % 2, 0
    for seed in range(60):
        area, logits = np.random.default_rng(seed).normal(size=(2, 120)) + 3 * labels
        rows = {row["part"]: row for row in correlation_rows(area, logits, labels, resamples=400)}
        assert rows["all"]["low"] > 0.4
        missed += sum(not rows[name]["low"] < 0 < rows[name]["high"] for name in ("benign", "melanoma"))
    assert missed <= binom.ppf(0.999, 120, 0.05)


def test_constant_logits_have_no_correlation_and_small_classes_no_row():
    rows = correlation_rows(np.arange(15.0), np.zeros(15), np.repeat([0, 1], [12, 3]), resamples=50)
    assert [(row["part"], row["value"]) for row in rows] == [("all", None), ("benign", None)]
    json.dumps(rows, allow_nan=False)


@pytest.fixture(scope="module")
def classified(tmp_path_factory):
    """The folders of a `classify_arms` and of made benign images."""
    root = tmp_path_factory.mktemp("areas")
    made = lesions(9, 60).image_set.first_per_class(30, [0])
    (root / "made").mkdir()
    tensors = {"images": torch.tensor(made.images), "labels": torch.tensor(made.labels)}
    save_file(tensors, root / "made" / "samples.safetensors")
    (root / "stage").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load", small_load)
        patch.setattr(extractors, "efficientnet_lite2", means)
        settings = {"image_size": SIDE, "feature_size": SIDE, "epochs": 15, "seeds": [0, 1], "hidden": 20}
        arms = {"real": {"real": True}, "w/o repeats": {"real": True}}
        classify_arms(root / "stage", data="phantoms", arms=arms, resamples=50, **settings)
        yield root


def test_area_confound_s_numbers_are_those_of_its_scores(classified, tmp_path):
    made = {"ben/GAN": str(classified / "made")}
    settings = {"data": "phantoms", "image_size": SIDE, "scores": str(classified / "stage"), "resamples": 100}
    found = area_confound(tmp_path, synthetic=made, **settings)
    json.dumps(found, allow_nan=False)
    real = small_load("", "test")
    area = dark_area(real.images)
    assert found["auc"]["real"] == bootstrap(auroc, real.labels, area, subjects=real.subjects, resamples=100)
    assert found["auc"]["real"]["low"] > 0.5  # melanomas are larger by construction
    assert found["auc"]["ben/GAN"] is None
    assert found["area"]["ben/GAN"]["melanoma"] == {"images": 0, "mean": None, "median": None}
    assert found["area"]["real"]["melanoma"]["mean"] == pytest.approx(area[real.labels == 1].mean())
    logits = load_scores(classified / "stage")["arms"]["w/o repeats"]["val"].mean(1)
    rows = {(row["set"], row["arm"], row["part"]): row for row in found["correlations"]}
    assert rows["real", "w/o repeats", "all"]["value"] == pytest.approx(spearmanr(area, logits)[0])
    benign = real.labels == 0
    assert rows["real", "w/o repeats", "benign"]["value"] == pytest.approx(spearmanr(area[benign], logits[benign])[0])
    assert {part for of, _, part in rows if of == "ben/GAN"} == {"all", "benign"}
    kept = load_areas(tmp_path)
    np.testing.assert_array_equal(kept["real"]["area"], area)
    np.testing.assert_allclose(kept["real"]["logits"]["w/o repeats"], logits)
    assert kept["ben/GAN"]["labels"].tolist() == [0] * 30


def test_scores_of_other_images_are_refused(classified, tmp_path, monkeypatch):
    settings = {"data": "phantoms", "image_size": SIDE, "scores": str(classified / "stage")}
    with pytest.raises(ValueError, match="no arm 'reel'"):
        area_confound(tmp_path, arms=["reel"], **settings)
    monkeypatch.setattr(datasets, "load", lambda *_: lesions(2, 30).image_set)
    with pytest.raises(ValueError, match="other images"):
        area_confound(tmp_path, **settings)


# --- frames -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [16, 32])
def test_planted_frames_are_found(side):
    made = lesions(1, 120, frames=(0.3, 0.7), side=side)
    found = frame_score(made.image_set.images)
    assert auroc(made.factors["frame"].astype(int), found) > 0.99
    assert found[made.factors["frame"] == 1].min() > 0.8
    assert found[made.factors["frame"] == 0].max() < 0.3
    np.testing.assert_allclose(frame_score(as_tensor(made.image_set)), found)


def test_two_dark_corners_are_half_a_frame():
    images = np.full((3, 1, 32, 32), 200, np.uint8)
    line = (np.arange(32) + 0.5) / 16 - 1
    outside = np.hypot(line[:, None], line) > 1
    images[1, 0][outside & (line < 0)] = 0
    images[2, 0][outside] = 0
    np.testing.assert_allclose(frame_score(images), [0, 0.5, 1])
    assert frame_score(np.zeros((1, 1, 32, 32), np.uint8)).tolist() == [1]  # no light at all


def test_the_frame_rule_s_accuracy_is_that_of_the_best_rule_tried():
    for share, other in ((0.8, 0.2), (1.0, 0.0), (0.3, 0.0), (0.5, 0.5), (0.2, 0.9)):
        rules = [
            (share + 1 - other) / 2,
            (other + 1 - share) / 2,
            0.5,
        ]  # framed is malignant; benign; the frame ignored
        found = frame_rule(share, other)
        assert found["same"] == pytest.approx(max(rules))
        assert found["reversed"] == pytest.approx(1 - max(rules))
        assert found["none"] == 0.5
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        frame_rule(1.2)


FRAMES = {
    "image_size": SIDE, "counts": {"train": 80, "val": 40, "test": 60}, "seed": 0, "feature_size": SIDE, "hidden": 30,
    "seeds": [0, 1], "epochs": 25, "resamples": 100,
}  # fmt: skip


@pytest.fixture(scope="module")
def framed(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extractors, "efficientnet_lite2", means)
        folder = tmp_path_factory.mktemp("frames")
        return folder, planted_frames(folder, shares=[0.5, 0.9], **FRAMES)


def test_a_frame_that_tells_the_class_is_used_and_misleads(framed):
    found = framed[1]
    json.dumps(found, allow_nan=False)
    rows = {(row["share"], row["tested_on"]): row for row in found["rows"]}
    assert len(rows) == 6
    assert rows[0.9, "same"]["benign_share"] == pytest.approx(0.1)
    assert [rows[0.9, name]["rule"] for name in ("same", "reversed", "none")] == pytest.approx([0.9, 0.1, 0.5])
    assert rows[0.9, "same"]["auc"]["low"] > 0.7
    assert rows[0.9, "reversed"]["auc"]["high"] < 0.5
    assert rows[0.5, "same"]["auc"] == rows[0.5, "reversed"]["auc"]  # the very same images
    assert rows[0.9, "none"]["framed"] == [0, 0]
    assert rows[0.9, "same"]["framed"][1] > 20 > 10 > rows[0.9, "reversed"]["framed"][1]  # of 30, 27 and 3 on average
    drops = {(row["share"], row["to"]): row for row in found["drops"]}
    assert drops[0.9, "reversed"]["auc"]["low"] > 0
    gap = rows[0.9, "same"]["auc"]["value"] - rows[0.9, "none"]["auc"]["value"]
    assert drops[0.9, "none"]["auc"]["value"] == pytest.approx(gap)
    assert drops[0.5, "reversed"]["auc"]["p"] == 1


def test_the_framed_images_are_the_phantoms_own():
    """Both renderings of one seed are the same lesions: only pixels under the frame and the grain differ."""
    plain, dark = (lesions(4, 12, frames=(p, p)) for p in (0.0, 1.0))
    for name in ("radius", "darkness", "hairs", "skin"):
        np.testing.assert_array_equal(plain.factors[name], dark.factors[name])
    line = (np.arange(SIDE) + 0.5) / (SIDE / 2) - 1
    inside = np.hypot(line[:, None], line) < 0.85
    gap = plain.image_set.images[..., inside].astype(int) - dark.image_set.images[..., inside]
    assert np.abs(gap).mean() < 5  # grain has a deviation of 3 grey levels in each


def test_with_no_frame_on_benign_images_the_share_is_the_rule(tmp_path, monkeypatch):
    monkeypatch.setattr(extractors, "efficientnet_lite2", means)
    found = planted_frames(tmp_path, shares=[0.6], benign="none", **FRAMES | {"epochs": 1, "seeds": [0]})
    same, turned, none = found["rows"]
    assert (same["benign_share"], same["rule"], turned["rule"], none["rule"]) == (0, 0.8, 0.2, 0.5)
    assert same["framed"][0] == turned["framed"][1] == 0
    assert 10 < same["framed"][1] < 26  # of 30, 0.6 on average
    with pytest.raises(ValueError, match="rest, none"):
        planted_frames(tmp_path, shares=[0.6], benign="some", **FRAMES)
