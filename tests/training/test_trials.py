"""Trials: what the measures give where the answer is known, and that a trial returns them."""

import numpy as np
import pytest

from lookalike.data import datasets
from lookalike.privacy import audit
from lookalike.training import cells, trials

MEASURE = {"real_per_class": 20, "feature_size": 32, "classifier_epochs": 4, "classifier_width": 8, "cache": None}
TRAIN = {
    "seed": 0, "width": 8, "epochs": 1, "samples_per_class": 4, "batch_size": 20, "lr": 1e-3, "timesteps": 10,
    "sampler": "dpm++", "sampling_steps": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def anchors():
    names = ("training images", "held-out real images", "one image repeated")
    settings = {"data": "digits", "images_per_class": 5, "samples_per_class": 15}
    return {name: trials.anchor_trial(None, anchor=name, **settings, **MEASURE) for name in names}


def test_released_training_images_are_recognised_and_others_are_not(anchors):
    assert anchors["training images"]["attack_auc"] == 1
    assert 0.3 < anchors["held-out real images"]["attack_auc"] < 0.7


def test_real_images_spread_as_real_ones_do_and_a_collapse_does_not(anchors):
    assert anchors["held-out real images"]["spread"] == pytest.approx(1, abs=0.15)
    assert anchors["one image repeated"]["spread"] == 0
    assert anchors["one image repeated"]["coverage"] < anchors["held-out real images"]["coverage"]
    assert anchors["held-out real images"]["frechet"] < anchors["one image repeated"]["frechet"]


def test_spread_is_the_mean_distance_within_classes():
    images = np.zeros((4, 1, 2, 2), np.uint8)
    images[1] = 255  # class 0: distance 2 of [0, 1] pixels
    assert trials.spread(images, [0, 0, 1, 1]) == pytest.approx((2 + 0) / 2)


def test_a_control_trial_gives_every_measure(tmp_path):
    found = trials.control_trial(
        tmp_path, recipe={"penalty": True}, data="digits", family="gan", images_per_class=2, **TRAIN, **MEASURE
    )
    assert set(trials.MEASURES) <= set(found)
    discriminator = cells.build("gan", 10, 8)["discriminator"]
    assert found["weights"] == sum(p.numel() for p in discriminator.parameters())


def test_other_draws_are_other_images_of_the_same_classes():
    digits = datasets.load("digits", "train")
    first, second = (cells.select_role(digits, "full", 10, 0, draw) for draw in (0, 1))
    assert first.labels.tolist() == second.labels.tolist()
    seen = {image.tobytes() for image in first.images}
    assert not any(image.tobytes() in seen for image in second.images)
    victim = cells.select_role(digits, "victim", 10, 0, 1)
    assert (victim.images[-1] == second.images[0]).all()


def test_coins_are_fair_fixed_by_the_seed_and_decide_who_is_in():
    digits = datasets.load("digits", "train")
    candidates, included = cells.coins(digits, 50, seed=3)
    assert len(candidates) == len(included) == 1000
    assert 0.4 < included.mean() < 0.6
    assert (cells.coins(digits, 50, seed=3)[1] == included).all()
    assert (cells.coins(digits, 50, seed=4)[1] != included).any()
    assert len(cells.select_role(digits, "coin", 50, 0, seed=3)) == included.sum()


def test_both_bounds_of_a_coin_trial_stand_at_one_delta_below_one_over_everyone_who_could_be_in(tmp_path):
    found = trials.coin_trial(
        tmp_path, data="digits", family="vae", sigma=1.0, images_per_class=2, query_class=0, **TRAIN
    )
    assert found["candidates"] == 40
    assert found["delta"] < 1 / 40
    assert found["accounted"] > found["lower"] >= 0


def test_the_attack_of_a_coin_trial_finds_released_members():
    """Planted: releasing the members themselves must give a bound, releasing the others none."""
    digits = datasets.load("digits", "train")
    candidates, included = cells.coins(digits, 10, seed=0)
    for released, caught in ((included, True), (~included, False)):
        scores = audit.closeness(candidates.images, candidates.images[released])
        assert (audit.one_run_bound(scores, included, audit.DELTA).epsilon > 1) == caught
