"""Attacks on a released set of masses: planted copies show, an honest set does not, and another source is no leak."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.spatial.distance import cdist

from lookalike.data import datasets, phantoms
from lookalike.data.plants import plant
from lookalike.metrics.extractors import random_conv
from lookalike.training import mass_attacks
from lookalike.training.mass_attacks import (
    attack_release,
    check_sets,
    cut_offs,
    load_made,
    pixel_attacks,
    pixel_scores,
    together,
)

SIDE = 24
ELSEWHERE = "phantom_mammography_elsewhere"
COUNTS = {"train": 80, "val": 44, "test": 44}
SETTINGS = {"data": "phantom_mammography", "image_size": SIDE, "feature_size": SIDE, "seed": 0}


def masses(seed, n=100, split="train"):
    return phantoms.mammography(n, seed, split=split, image_size=SIDE).image_set


def small_load(name, split="train", image_size=None):
    """The phantoms of `datasets.load`, fewer of them."""
    if name == ELSEWHERE:
        return darker(masses(3, 60, "test"))
    return masses(list(COUNTS).index(split), COUNTS[split], split)


def darker(images):
    return dataclasses.replace(images, images=images.images // 2, name=ELSEWHERE)


def save_samples(folder, images):
    samples = {"images": torch.tensor(images.images), "labels": torch.tensor(images.labels)}
    save_file(samples, folder / "samples.safetensors")
    return str(folder)


@pytest.fixture(scope="module")
def small():
    """Fewer phantoms and a network without weights: what is tested is what the stage does with them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load", small_load)
        patch.setattr(mass_attacks, "efficientnet_lite0", lambda image_size: random_conv(0))
        yield


@pytest.fixture(scope="module")
def honest(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("honest")
    release = save_samples(folder, masses(9, 80))
    return folder, attack_release(folder, synthetic=release, other=ELSEWHERE, **SETTINGS)


@pytest.fixture(scope="module")
def copied(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("copied")
    made, real = masses(9, 80), small_load("", "train")
    made.images[:40] = plant(real.images, "jpeg")[:40]
    return attack_release(folder, synthetic=save_samples(folder, made), **SETTINGS)


def test_the_result_is_plain_json_and_the_card_says_the_same(honest):
    folder, found = honest
    json.dumps(found, allow_nan=False)
    document = json.loads((folder / "card.json").read_text())
    assert found["files"] == ["card.json", "card.md", "card.html"]
    assert [found[part] for part in ("verdict", "privacy", "use")] == [
        document[part] for part in ("verdict", "privacy", "use")
    ]
    for row in found["attacks"]:
        kept = document["attacks"][row["attack"]]
        assert (row["auc"], row["believed"]) == (kept["auc"], kept["believed"])
        assert row["low"] <= row["auc"] <= row["high"]


def test_no_image_stands_in_the_card(honest):
    assert "data:image" not in (honest[0] / "card.html").read_text()


def test_an_honest_release_does_not_fail_and_shows_no_member(honest):
    found = honest[1]
    assert found["privacy"] != "fail"
    ours = [row for row in found["pixel_attacks"] if not row["false"]]
    assert {row["non_members"] for row in ours} == {"val", "test"}
    assert all(row["low"] < 0.5 < row["high"] for row in ours)


def test_copies_fail_and_stand_out_in_pixels(copied):
    assert copied["verdict"] == copied["privacy"] == "fail"
    assert copied["copies"]["as_alike_as_copies"] > 30
    assert all(row["low"] > 0.5 for row in copied["pixel_attacks"])
    assert copied["false_leak"] is None
    shares = [row["train"] for row in copied["cut_offs"] if row["attack"] == "min"]
    assert shares[0] == 1.0 > shares[1] > 0.5  # of blind calls a third would be members


def test_another_source_looks_like_a_leak_and_is_not_believed(honest):
    leak = honest[1]["false_leak"]
    assert leak["other"] == ELSEWHERE
    assert "false leak" in leak["what"]
    assert leak["told_apart"]["interval"][0] > 0.5
    assert not leak["told_apart"]["alike"]
    assert not any(row["believed"] for row in leak["attacks"])
    assert any(not row["low"] <= 0.5 <= row["high"] for row in leak["attacks"])
    assert [row["false"] for row in honest[1]["pixel_attacks"]] == [False] * 4 + [True] * 2


def test_features_of_a_restricted_set_stay_out_of_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(mass_attacks.controls, "attacks_with_controls", lambda *views_and_settings: ({}, None))
    real, made, other = masses(0, 60), masses(9, 60), masses(3, 60)
    extractor = random_conv(0)
    hidden = [dataclasses.replace(s, restricted=True) for s in (real, made, other)]
    mass_attacks.false_leak(*hidden, extractor, tmp_path)
    assert not list(tmp_path.iterdir())
    mass_attacks.false_leak(real, made, hidden[2], extractor, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2  # the real and the made images, not the others
    mass_attacks.false_leak(real, made, other, extractor, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_too_few_of_another_source_are_refused():
    with pytest.raises(ValueError, match="too few for attacks"):
        mass_attacks.false_leak(masses(0, 60), masses(9, 60), masses(3, 20), random_conv(0))


# --- pixels -------------------------------------------------------------------------------------------------


def test_pixel_scores_are_those_of_all_distances():
    real, made, other = masses(0, 12), masses(9, 15), masses(1, 10)
    found = pixel_scores(real, made, {"val": other})
    for name, images in (("train", real), ("val", other)):
        far = cdist(*(s.images.reshape(len(s), -1).astype(float) for s in (images, made)))
        nearest, scale = far.min(1), found[name]["min"][0] / -far[0].min()  # units are the module's own
        np.testing.assert_allclose(found[name]["min"], -nearest * scale, rtol=1e-5)
        np.testing.assert_allclose(found[name]["min_over_median"], -nearest / np.median(far, 1), rtol=1e-5)


def test_an_area_is_the_share_of_pairs_that_a_member_wins():
    real, made, other = masses(0, 12), masses(9, 15), masses(1, 10)
    scores = pixel_scores(real, made, {"val": other})
    for row in pixel_attacks(real, {"val": other}, scores):
        members, others = (scores[name][row["attack"]] for name in ("train", "val"))
        wins = [(m > o) + (m == o) / 2 for m in members for o in others]
        assert row["auc"] == pytest.approx(np.mean(wins))
        assert (row["members"], row["others"]) == (12, 10)


def test_cut_offs_count_equal_numbers_of_each_origin():
    """Members score above all others: they fill the cut-off up to a third of the candidates."""
    high, low = np.arange(10.0, 40.0), np.arange(10.0)
    scores = {"train": high, "val": low, "test": low - 0.5}
    rows = cut_offs({origin: {"min": s, "min_over_median": s} for origin, s in scores.items()})
    assert [(row["k"], row["candidates"]) for row in rows[:2]] == [(2, 30), (10, 30)]
    assert all((row["train"], row["val"], row["test"]) == (1, 0, 0) for row in rows)


# --- the sets -----------------------------------------------------------------------------------------------


def test_samples_of_a_stage_come_at_the_wanted_size(tmp_path):
    real, made = masses(0, 20), masses(9, 20)
    found = load_made(save_samples(tmp_path, made), 2 * SIDE, real)
    assert found.images.shape == (20, 1, 2 * SIDE, 2 * SIDE)
    assert (found.origin, found.subject_kind, found.restricted) == ("synthetic", "image", False)
    assert found.labels.tolist() == made.labels.tolist()
    same = load_made(str(tmp_path), SIDE, dataclasses.replace(real, restricted=True))
    assert (same.images == made.images).all()
    assert same.restricted  # what was made of restricted images is


def test_splits_together_are_their_rows_in_order():
    parts = [masses(1, 4, "val"), dataclasses.replace(masses(2, 6, "test"), restricted=True)]
    whole = together(parts)
    assert (whole.split, len(whole), whole.restricted) == ("val+test", 10, True)
    assert (whole.images[4:] == parts[1].images).all()
    assert whole.subjects.tolist() == [*parts[0].subjects, *parts[1].subjects]


def test_what_the_data_hold_is_counted():
    """Two patients' images, one image repeated with the other label, one patient and two images in both sets."""
    first, second = masses(0, 4), masses(1, 4, "val")
    first.images[1], first.labels[1] = first.images[0], 1 - first.labels[0]
    first.images[3] = first.images[2]
    second.images[0], second.subjects[0] = first.images[0], first.subjects[0]
    rows = check_sets([first, second])
    assert rows[0] == {
        "set": "phantom_mammography", "split": "train", "images": 4, "malignant": 1, "benign": 3, "patients": 2,
        "with_both_labels": 1, "repeats": 2, "contradictory": 1, "shared_patients": 1, "shared_images": 1,
    }  # fmt: skip
    assert (rows[1]["patients"], rows[1]["repeats"], rows[1]["shared_images"]) == (3, 0, 1)


def test_of_made_images_nobody_knows_the_patients():
    made = dataclasses.replace(masses(9, 4), subject_kind="image")
    row = check_sets([made])[0]
    assert row["patients"] is row["with_both_labels"] is None
    assert row["shared_patients"] == 0
