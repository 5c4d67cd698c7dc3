"""Trials of the attacks on vertebral units: planted leaks are found, another site is a false one, no control tells."""

import dataclasses
import json
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from scipy.spatial.distance import cdist

from lookalike import calibration
from lookalike.calibration import NO_LEAK, SECOND_SITE
from lookalike.data import datasets, phantoms
from lookalike.data.plants import plant
from lookalike.files import write_json
from lookalike.models.acgan import Discriminator, Generator
from lookalike.privacy import suite
from lookalike.training import vertebra_trials
from lookalike.training.checkpoint import save_weights
from lookalike.training.vertebra_trials import (
    ATTACKS,
    DETECTORS,
    NEEDS,
    attack_shadows,
    crossed,
    inclusion,
    inclusion_rows,
    look,
    planted_leaks,
    site_artefact,
    thin,
)

SIDE, ELSEWHERE = 16, "elsewhere"
COUNTS = {"train": 96, "val": 48, "test": 48}  # six units per exam
MODELS = 8
SHADOWS = {"data": "phantom_vertebrae", "image_size": SIDE, "inclusion_seed": 3, "search_steps": 3, "candidates": 24}
PLANTED = {
    "data": "phantom_vertebrae", "elsewhere": ELSEWHERE, "image_size": SIDE, "members": 24, "released": 48,
    "shares": (0.5,), "leaks": ("copy",), "repeats": 5, "embedding_rows": 40, "seed": 0,
}  # fmt: skip


@cache
def small_load(name, split="train", image_size=None):
    """The phantoms of `datasets.load`, fewer of them; the other site is darker and grainy."""
    number = list(COUNTS).index(split)
    found = phantoms.vertebrae(COUNTS[split], number, split=split, image_size=SIDE).image_set
    return (
        dataclasses.replace(found, images=plant(found.images // 2, "noise"), name=name) if name == ELSEWHERE else found
    )


class Projected:
    """Stands in for a UMAP, which compiles for half a minute."""

    def __init__(self, rows, seed, n_components):
        rng, size = np.random.default_rng(seed), np.prod(rows.shape[1:])
        self.axes = rng.standard_normal((size, n_components)).astype(np.float32)

    def transform(self, images):
        return images.reshape(len(images), -1).astype(np.float32) @ self.axes


@pytest.fixture(autouse=True, scope="module")
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load", small_load)
        patch.setattr(vertebra_trials, "fit_umap", Projected)
        yield


# --- planted leaks ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted(small):
    return planted_leaks(None, **PLANTED)


def test_copies_are_found_and_their_absence_is_not(planted):
    json.dumps(planted, allow_nan=False)
    copies, none = (planted["worlds"][world] for world in ("copy, 50%", NO_LEAK))
    assert set(copies) == set(none) == set(DETECTORS)
    for name in ("pairwise_pixels", "nearest_embedding", "aligned_similarity", "copies_flagged"):
        assert copies[name]["power"] >= 0.8
        assert copies[name]["found"] > 0.9
        assert copies[name]["found_interval"][0] > 0.8
        assert none[name]["found"] is None
    assert np.mean([row["power"] for row in none.values()]) <= 0.4  # five trials set each threshold
    assert 0.35 < np.mean([row["auc"] for row in none.values() if row["auc"] is not None]) < 0.65


def test_another_site_is_a_leak_that_is_none(planted):
    elsewhere, here = (planted["worlds"][world]["logan_embedding"]["auc"] for world in (SECOND_SITE, NO_LEAK))
    assert abs(elsewhere - 0.5) > 0.3 > abs(here - 0.5)
    assert planted["worlds"][SECOND_SITE]["nearest_pixels"]["found"] is None


def test_the_same_seed_gives_the_same_trials(planted):
    assert planted_leaks(None, **PLANTED) == planted


def test_a_thinned_pool_keeps_every_subject_and_few_images_of_each(planted):
    thinned = planted_leaks(None, **PLANTED | {"members": 12, "released": 24, "per_subject": 3, "quiet": 6})
    assert thinned["subjects"] == planted["subjects"] == 24
    assert (thinned["images"], planted["images"]) == (72, 144)
    assert (thinned["quiet"], planted["quiet"]) == (6, 5)


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=40), st.integers(1, 12), st.integers(0, 3))
def test_thinning_takes_so_many_of_each_subject_or_all(subjects, most, seed):
    subjects = np.array(subjects)
    rows = thin(subjects, most, seed)
    assert (np.diff(rows) > 0).all()
    for subject in set(subjects):
        assert (subjects[rows] == subject).sum() == min(most, (subjects == subject).sum())
    assert (thin(subjects, most, seed) == rows).all()


def test_thinning_draws_others_with_another_seed_and_refuses_none_of_a_subject():
    subjects = np.repeat(["a", "b"], 30)
    assert (thin(subjects, 5, 0) != thin(subjects, 5, 1)).any()
    with pytest.raises(ValueError, match="per_subject must be 1 image of a subject or more, not 0"):
        thin(subjects, 0, 0)


def test_a_trial_counts_the_members_that_were_copied():
    """Every second member is released as it is: distance 0, which no held-out image reaches."""
    images = small_load("phantom_vertebrae")
    features = Projected(images.images, 0, 8).transform(images.images)
    view = suite.View(images.images, features)
    members, holdout, rest = view.rows(np.arange(24)), view.rows(np.arange(24, 48)), view.rows(np.arange(48, 96))
    copied = np.arange(0, 24, 2)
    made = suite.join(members.rows(copied), rest.rows(np.arange(24)))
    seen, count = look(calibration.Trial(members, made, holdout, rest.rows(np.arange(24, 48)), 0, copied))
    assert count == seen["nearest_pixels"].found == seen["copies_flagged"].found == 12
    assert seen["nearest_pixels"].auc >= 0.5 + 12 / 48  # copies win all their pairs; chance has the others
    far = cdist(*(v.pixels.reshape(len(v), -1).astype(float) for v in (suite.join(members, holdout), made))).min(1)
    wins = [(m < o) + (m == o) / 2 for m in far[:24] for o in far[24:]]
    assert seen["nearest_pixels"].auc == pytest.approx(np.mean(wins))


def test_what_cannot_be_tried_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match="has 48 images; embedding_rows asks for 49"):
        planted_leaks(None, **PLANTED | {"embedding_rows": 49})
    with pytest.raises(ValueError, match="takes 50 images of elsewhere, which has 48"):
        planted_leaks(None, **PLANTED | {"members": 25})


# --- shadow models ------------------------------------------------------------------------------------------


def learn_by_heart(discriminator, images, inside, steps=60):
    """The source logit tells the images of its half from all others."""
    optimizer, wanted = torch.optim.Adam(discriminator.parameters(), 5e-3), torch.as_tensor(inside).float()
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(discriminator(images)[0], wanted).backward()
        optimizer.step()


def save_shadow(folder, model, leak):
    """Released images and a discriminator that know a half of the subjects, or nobody; no trained generator."""
    folder.mkdir()
    shape = {"image_size": SIDE, "channels": 9, "num_classes": 3, "width": 4}
    torch.manual_seed(model)
    write_json(folder / "networks.json", {"shape": shape, "generator": {"latent_dim": 8, "condition": "one_hot"}})
    save_weights(folder / "weights.safetensors", Generator(**shape, latent_dim=8))
    rows = inclusion_rows("phantom_vertebrae", MODELS, SIDE, 3, model)
    train, discriminator = small_load("phantom_vertebrae"), Discriminator(**shape)
    if leak:
        learn_by_heart(discriminator, datasets.as_tensor(train), np.isin(np.arange(len(train)), rows))
    save_weights(folder / "discriminator.safetensors", discriminator)
    others = phantoms.vertebrae(len(rows), 50 + model, image_size=SIDE).image_set
    made = plant(train.images[rows], "noise", model) if leak else others.images
    save_file({"images": torch.tensor(made), "labels": torch.zeros(len(made)).long()}, folder / "samples.safetensors")
    return str(folder)


@pytest.fixture(scope="module")
def folders(small, tmp_path_factory):
    root = tmp_path_factory.mktemp("shadows")
    return {
        leak: [save_shadow(root / f"{leak}{model}", model, leak) for model in range(MODELS)] for leak in (True, False)
    }


@pytest.fixture(scope="module")
def leaking(folders):
    return attack_shadows(None, shadows=folders[True], **SHADOWS)


def test_what_copies_its_training_images_is_found(leaking):
    json.dumps(leaking, allow_nan=False)
    rows = {row["attack"]: row for row in leaking["rows"]}
    assert list(rows) == [name for name in NEEDS if name in rows]
    given = ("nearest", "pairwise", "lira_nearest", "rmia_nearest", "logan_white_box", "lira_source", "rmia_source")
    for name in given:
        assert rows[name]["low"] > 0.8  # 1 with 16 subjects on a side begins at 0.87
        assert rows[name]["tpr_1_low"] <= rows[name]["tpr_1"] <= rows[name]["tpr_1_high"]
    assert rows["nearest"]["tpr_1"] > 0.9
    assert rows["nearest"]["members"] == rows["nearest"]["non_members"] == MODELS * 48
    for name in ("gan_leaks_white_box", "latent_projection"):  # the generators never saw an image
        assert rows[name]["low"] <= 0.5 <= rows[name]["high"]
    assert rows["gan_leaks_white_box"]["members"] + rows["gan_leaks_white_box"]["non_members"] == MODELS * 24


def test_halves_on_which_nobody_was_trained_are_quiet(leaking):
    assert [row["attack"] for row in leaking["disjoint"]] == [row["attack"] for row in leaking["rows"]]
    assert all(abs(row["auc"] - 0.5) < 0.1 for row in leaking["disjoint"])  # three deviations


def test_generators_that_copy_nobody_are_quiet(folders):
    found = attack_shadows(None, shadows=folders[False], **SHADOWS)
    assert all(abs(row["auc"] - 0.5) < 0.1 for row in found["rows"])


def test_the_same_seed_gives_the_same_attacks(folders, leaking):
    assert attack_shadows(None, shadows=folders[True], **SHADOWS) == leaking


def test_shadows_come_in_pairs_that_share_the_subjects_out():
    found = inclusion("phantom_vertebrae", MODELS, SIDE, 3)
    assert found.shape == (MODELS, COUNTS["train"])
    assert (found[::2] ^ found[1::2]).all()
    assert inclusion_rows("phantom_vertebrae", MODELS, SIDE, 3, 5) == np.flatnonzero(found[5]).tolist()
    subjects = small_load("phantom_vertebrae").subjects
    assert not any(set(subjects[inside]) & set(subjects[~inside]) for inside in found)


def test_the_control_cuts_across_what_was_trained_on():
    found, subjects = inclusion("phantom_vertebrae", MODELS, SIDE, 3), small_load("phantom_vertebrae").subjects
    control = crossed(found, subjects, seed=1)
    assert (control[::2] ^ control[1::2]).all()
    assert ((control & found).sum(1) == found.sum(1) / 2).all()
    assert ((control & ~found).sum(1) == (~found).sum(1) / 2).all()
    assert not any(set(subjects[inside]) & set(subjects[~inside]) for inside in control)


def test_a_shadow_in_the_wrong_place_is_refused(folders, tmp_path):
    wrong = folders[True][::-1]
    write_json(tmp_path / "stage.json", {"settings": {"rows": [0, 1]}})
    with pytest.raises(ValueError, match="was not trained on the images of shadow 0"):
        attack_shadows(None, shadows=[str(tmp_path), *wrong[1:]], **SHADOWS)
    with pytest.raises(ValueError, match="candidates must lie between 2 and the 96 images"):
        attack_shadows(None, shadows=wrong, **SHADOWS | {"candidates": 97})


# --- the second site ----------------------------------------------------------------------------------------


def artefact(folder, images):
    made = {"images": torch.tensor(images), "labels": torch.zeros(len(images)).long()}
    save_file(made, folder / "samples.safetensors")
    settings = {"data": "phantom_vertebrae", "elsewhere": ELSEWHERE, "image_size": SIDE, "seed": 0}
    found = site_artefact(folder, synthetic=str(folder), **settings)
    return {(r["released"], r["attack"], r["members"], r["non_members"]): r for r in found["rows"]}, found


def test_the_scanner_tells_test_from_train_where_nothing_can_leak(tmp_path):
    fresh = phantoms.vertebrae(60, 9, image_size=SIDE).image_set.images
    rows, found = artefact(tmp_path, fresh)
    json.dumps(found, allow_nan=False)
    assert found["released_images"] == 48
    for attack in ATTACKS[1:]:
        assert rows["real", attack, "train", "test"]["low"] > 0.5
        assert rows["real", attack, "val", "test"]["low"] > 0.5
    assert all(rows["real", attack, "train", "val"]["low"] < 0.5 for attack in ATTACKS)
    assert [row["can_leak"] for row in found["rows"][:3]] == [True, True, False]
    assert not any(row["can_leak"] for row in found["rows"] if row["released"] == "real")


def test_copies_tell_train_from_val_and_posing_images_do_not(tmp_path):
    rows, _ = artefact(tmp_path, plant(small_load("phantom_vertebrae").images, "noise")[:96])
    for attack in ATTACKS[:2]:
        copied, posing = (rows[released, attack, "train", "val"] for released in ("synthetic", "real"))
        assert copied["auc"] > posing["auc"] + 0.1
        assert copied["low"] > 0.5 > posing["low"]


def test_too_few_subjects_cannot_pose_as_released(tmp_path, monkeypatch):
    few = lambda *a: small_load("phantom_vertebrae").subset(np.arange(18))  # noqa: E731
    monkeypatch.setattr(datasets, "load", few)
    with pytest.raises(ValueError, match="four or more, not 3"):
        artefact(tmp_path, small_load("phantom_vertebrae").images)
