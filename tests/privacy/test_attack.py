"""The one form of every attack: area, operating points, intervals."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from lookalike.privacy.attack import attack_result, auc

scores = st.integers(2, 30).flatmap(lambda n: arrays(float, n, elements=st.integers(-5, 5).map(float)))


@given(scores, scores)
def test_the_area_is_scikit_learns_and_mirrors(members, non_members):
    labels = np.repeat([1, 0], [len(members), len(non_members)])
    expected = roc_auc_score(labels, np.concatenate([members, non_members]))
    found = attack_result("x", members, non_members)
    assert found.auc == pytest.approx(expected, abs=1e-12)
    assert auc(non_members, members) == pytest.approx(1 - expected, abs=1e-12)
    assert 0 <= found.low <= found.auc + 1e-9
    assert found.auc - 1e-9 <= found.high <= 1


@given(scores, scores)
def test_no_operating_point_passes_its_false_alarms(members, non_members):
    for point in attack_result("x", members, non_members).operating:
        called = np.sort(members)[::-1][: round(point.tpr * len(members))]
        if len(called):
            assert (non_members >= called[-1]).mean() <= point.fpr
        assert point.low <= point.tpr <= point.high


def covers(draw, area, repeats=500):
    found = [draw(np.random.default_rng(seed)) for seed in range(repeats)]
    return np.mean([f.low <= area <= f.high for f in found])


@pytest.mark.parametrize(("n", "shift"), [(40, 0.0), (100, 1.0), (30, 2.5), (300, 3.5)])
def test_the_interval_covers_the_true_area(n, shift):
    def draw(rng):
        return attack_result("x", rng.normal(shift, 1, n), rng.normal(0, 1, n))

    assert covers(draw, norm.cdf(shift / np.sqrt(2))) == pytest.approx(0.95, abs=0.03)


def test_the_interval_over_subjects_covers_where_the_plain_one_does_not():
    def draw(rng, known):
        subjects = np.repeat(np.arange(40), 8)
        drawn = [np.repeat(rng.normal(0, 1, 40), 8) + rng.normal(0, 0.3, 320) for _ in range(2)]
        return attack_result("x", *drawn, *([subjects, subjects] if known else []))

    assert covers(lambda rng: draw(rng, True), 0.5) == pytest.approx(0.95, abs=0.03)
    assert covers(lambda rng: draw(rng, False), 0.5) < 0.75


def test_the_interval_covers_where_every_subject_is_on_both_sides():
    """As in a pool of shadow models: an image that scores high does so as member and as non-member."""

    def draw(rng, known):
        easy = rng.normal(0, 2, 60)
        drawn = [np.repeat(easy, 6) + rng.normal(0, 1, 360) for _ in range(2)]
        subjects = np.repeat(np.arange(60), 6)
        return attack_result("x", *drawn, *([subjects, subjects] if known else []))

    assert covers(lambda rng: draw(rng, True), 0.5) == pytest.approx(0.95, abs=0.03)
    assert covers(lambda rng: draw(rng, False), 0.5) > 0.98  # blind to the pairing, so far too wide


def test_scores_that_part_have_an_interval_too():
    found = attack_result("x", np.arange(10) + 100.0, np.arange(10.0))
    assert found.auc == found.high == 1
    assert 0.6 < found.low < 0.95
    assert found.finds_leak
    np.testing.assert_array_equal(found.worst[:3], [9, 8, 7])


def test_a_rate_that_the_non_members_cannot_show_is_named():
    few, many = (attack_result("x", np.arange(50.0), np.arange(n) / n) for n in (50, 100))
    assert [point.resolved for point in few.operating] == [False, False]
    assert [point.resolved for point in many.operating] == [True, False]
    assert many.row()["tpr_at_0.1pct_fpr"] is None


def test_scores_that_say_nothing_are_refused():
    with pytest.raises(ValueError, match="at least two members"):
        attack_result("x", [1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="1 scores of the non-members are not a number"):
        attack_result("x", [1.0, 2.0], [1.0, np.nan])
    with pytest.raises(ValueError, match="each score needs its subject"):
        attack_result("x", [1.0, 2.0], [1.0, 2.0], ["a"], ["b", "c"])
    with pytest.raises(ValueError, match="at least two of them"):
        attack_result("x", [1.0, 2.0], [1.0, 2.0], ["a", "a"], ["b", "c"])
