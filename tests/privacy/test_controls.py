"""Attacks with their controls: what makes one believed, and what an innocent set can show at which size."""

import numpy as np
import pytest

from lookalike.privacy.attack import attack_result
from lookalike.privacy.controls import findings, planted_copies


def row(auc, interval, calls=(0.01, [0.0, 0.03]), believed=True, non_members=200):
    joint = {"auc": interval, "tpr_at_1pct_fpr": calls[1]}
    return {
        "auc": auc,
        "tpr_at_1pct_fpr": calls[0],
        "joint": joint,
        "believed": believed,
        "non_members": non_members,
    }


QUIET = {"gan_leaks_pixels": row(0.5, [0.45, 0.55]), "domias_features": row(0.49, [0.44, 0.54])}


def test_the_strongest_end_of_any_attack_counts():
    loud = QUIET | {"aligned_pixels": row(0.52, [0.4, 0.64]), "far_features": row(0.53, [0.5, 0.56])}
    value, interval, name = findings(loud)["attack_auc"]
    assert (value, interval, name) == (0.53, [0.5, 0.64], "far_features")


def test_an_area_far_below_one_half_is_no_silence():
    value, (low, high), _ = findings(QUIET | {"x_pixels": row(0.2, [0.15, 0.25])})["attack_auc"]
    assert (value, low, high) == pytest.approx((0.8, 0.75, 0.85))


def test_silence_needs_an_attack_of_each_kind():
    alone = {"gan_leaks_pixels": QUIET["gan_leaks_pixels"], "domias_features": row(0.5, [0.4, 0.6], believed=False)}
    for attacks, note in ((alone, "not one attack on pixels and one on features"), ({}, "not tested")):
        value, interval, said = findings(attacks)["attack_auc"]
        assert (value, interval) == (None, None)
        assert note in said


def test_one_in_a_hundred_needs_a_hundred():
    few = {name: found | {"non_members": 99} for name, found in QUIET.items()}
    assert findings(few)["attack_tpr_at_1pct_fpr"][:2] == (None, None)
    assert findings(QUIET)["attack_tpr_at_1pct_fpr"][0] == 0.01


def test_every_image_gets_a_copy_of_the_next_kind():
    images = np.random.default_rng(0).integers(0, 256, (20, 1, 12, 12), dtype=np.uint8)
    copies = planted_copies(images)
    assert (copies[[0, 9, 18]] == images[[0, 9, 18]]).all()  # "copy" comes first
    assert all((copies[i] != images[i]).any() for i in range(1, 9))


@pytest.mark.slow
@pytest.mark.parametrize(("held_out", "least", "most"), [(300, 0, 0.15), (1000, 0.45, 0.95), (2000, 0.95, 1)])
def test_how_often_an_innocent_set_passes_at_one_in_a_hundred(held_out, least, most):
    """Nine attacks whose scores go together by one half; half of the held-out images are attacked."""

    def passes(rng):
        sides = [rng.normal(size=n) for n in (1000, held_out // 2)]
        drawn = ([(side + rng.normal(size=len(side))) / 2**0.5 for side in sides] for _ in range(9))
        points = [attack_result("x", *scores, level=1 - 0.05 / 9).operating[0] for scores in drawn]
        return max(point.high for point in points) <= 0.05

    assert least <= np.mean([passes(np.random.default_rng(seed)) for seed in range(60)]) <= most
