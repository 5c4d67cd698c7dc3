"""Intervals and paired tests against scipy, closed forms and slow twins; how often they cover: test_coverage.py."""

from itertools import permutations, product

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest, norm

from lookalike.metrics.intervals import (
    bootstrap,
    clopper_pearson,
    holm,
    over_seeds,
    paired_over_images,
    paired_over_seeds,
    weakest,
)
from lookalike.metrics.scores import auroc


def pairwise_area(labels, scores):
    up, down = scores[labels == 1], scores[labels == 0]
    return ((up[:, None] > down) + 0.5 * (up[:, None] == down)).mean()


def ranked(n, seed=0, shift=1.0):
    """Labels (n,) and scores (n,) that rank the positives higher, on a grid so that some are level."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    return labels, rng.normal(shift * labels, 1).round(1)


def test_three_seeds_meet_the_table_of_student():
    found = over_seeds([1.0, 2.0, 3.0])
    half = 2.919986 / np.sqrt(3)  # t at 0.95 with two degrees of freedom
    assert found == {"value": 2.0, "low": pytest.approx(2 - half), "high": pytest.approx(2 + half), "n": 3}


def test_the_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = [f["low"] <= 0 <= f["high"] for f in (over_seeds(rng.normal(size=4)) for _ in range(2000))]
    assert np.mean(covered) == pytest.approx(0.9, abs=0.02)


def test_one_seed_has_no_interval():
    assert over_seeds([0.3]) == {"value": 0.3, "low": None, "high": None, "n": 1}


def test_a_claim_is_as_strong_as_its_weakest_margin():
    strong, weak = np.array([5.0, 6.0, 7.0]), np.array([-1.0, 0.5, 2.0])
    both, alone = weakest(strong, weak), over_seeds(weak)
    assert both == {key: alone[key] for key in ("value", "low", "high", "n")}
    assert weakest([1.0], [2.0]) == {"value": 1.0, "low": None, "high": None, "n": 1}


def test_a_claim_with_a_margin_that_is_not_defined_is_not_defined_in_any_order():
    margins = [np.array([1.0, 2.0]), np.array([np.nan, 1.0]), np.array([3.0, 4.0])]
    for order in permutations(margins):
        found = weakest(*order)
        assert np.isnan(found["value"])
        assert (found["low"], found["high"], found["n"]) == (None, None, 2)


def test_two_margins_of_chance_seldom_make_or_break_a_claim():
    rng = np.random.default_rng(0)
    found = [weakest(rng.normal(size=3), rng.normal(size=3)) for _ in range(1000)]
    assert np.mean([f["low"] > 0 for f in found]) < 0.05
    assert np.mean([f["high"] < 0 for f in found]) < 0.12


def test_what_is_not_defined_says_so():
    assert over_seeds([1.0, np.nan])["note"] == "not defined for these images"


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (10, 10), (3, 10), (61, 100)])
def test_clopper_pearson_equals_scipy(successes, n):
    exact = binomtest(successes, n).proportion_ci(0.95, method="exact")
    assert clopper_pearson(successes, n) == pytest.approx((exact.low, exact.high), abs=1e-10)


@pytest.mark.parametrize(("successes", "n"), [(3, 2), (-1, 5)])
def test_a_share_beyond_its_ends_is_refused(successes, n):
    with pytest.raises(ValueError, match=f"from 0 to {n} successes, not {successes}"):
        clopper_pearson(successes, n)


def test_clopper_pearson_covers():
    for p in (0.02, 0.5, 0.9):
        intervals = [clopper_pearson(k, 20) for k in range(21)]
        covered = sum(binom.pmf(k, 20, p) for k, (low, high) in enumerate(intervals) if low <= p <= high)
        assert covered >= 0.95


@pytest.mark.parametrize("method", ["bca", "percentile"])
def test_the_bootstrap_is_scipy_s_on_the_same_resamples(method):
    labels, scores = ranked(50)
    theirs = scipy.stats.bootstrap(
        (labels, scores), pairwise_area, paired=True, vectorized=False, n_resamples=500, method=method, rng=3
    ).confidence_interval
    ours = bootstrap(auroc, labels, scores, method=method, resamples=500, seed=3)
    assert (ours["low"], ours["high"]) == pytest.approx((theirs.low, theirs.high), abs=1e-9)
    copied = bootstrap(pairwise_area, labels, scores, method=method, resamples=500, seed=3)
    assert copied == pytest.approx(ours)


def test_a_skewed_mean_meets_scipy_s_bca():
    values = np.random.default_rng(0).exponential(size=40)
    theirs = scipy.stats.bootstrap((values,), np.mean, n_resamples=20_000, rng=1).confidence_interval
    ours = bootstrap(np.mean, values, resamples=20_000, seed=2)
    assert (ours["low"], ours["high"]) == pytest.approx((theirs.low, theirs.high), abs=0.02)


def test_subjects_are_drawn_whole_and_left_out_whole():
    rng = np.random.default_rng(0)
    of_subject = [rng.normal(rng.normal(), 0.3, rng.integers(1, 6)) for _ in range(25)]
    values, subjects = np.concatenate(of_subject), np.repeat(np.arange(25), [len(v) for v in of_subject])
    shuffled = rng.permutation(len(values))

    def mean_of_subjects(index):  # the slow twin: one row per subject, scipy's own resamples
        return np.concatenate([of_subject[i] for i in index]).mean()

    theirs = scipy.stats.bootstrap(
        (np.arange(25),), mean_of_subjects, vectorized=False, n_resamples=400, rng=5
    ).confidence_interval
    ours = bootstrap(np.mean, values[shuffled], subjects=subjects[shuffled], resamples=400, seed=5)
    assert (ours["low"], ours["high"]) == pytest.approx((theirs.low, theirs.high), abs=1e-9)
    assert ours["n"] == 25


def test_a_subject_each_is_no_subject_and_resamples_in_parts_are_the_same(monkeypatch):
    labels, scores = ranked(60)
    plain = bootstrap(auroc, labels, scores, resamples=300)
    assert bootstrap(auroc, labels, scores, resamples=300, subjects=np.arange(60)) == plain
    monkeypatch.setattr("lookalike.metrics.intervals.WEIGHTS_AT_ONCE", 60 * 7)
    assert bootstrap(auroc, labels, scores, resamples=300) == pytest.approx(plain)


def test_what_has_no_interval_says_why():
    labels, scores = ranked(40)
    no_width = bootstrap(auroc, labels, labels, resamples=200)  # an AUROC of 1 is no certainty
    assert (no_width["value"], no_width["low"]) == (1, None)
    assert "same value" in no_width["note"]
    one_positive = bootstrap(auroc, np.arange(40) == 5, scores, resamples=2000)
    assert one_positive["high"] is None
    share = float(one_positive["note"].split(": ")[1].split("%")[0]) / 100
    assert share == pytest.approx((1 - 1 / 40) ** 40, abs=0.04)
    assert bootstrap(auroc, np.zeros(40), scores)["note"] == "not defined for these images"
    few = bootstrap(auroc, np.arange(40) < 4, scores, resamples=2000)
    assert "left out" in few["note"]
    assert few["low"] < few["value"] < few["high"]


def test_a_bootstrap_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="the same rows"):
        bootstrap(auroc, [0, 1], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="each row needs its subject"):
        bootstrap(np.mean, [1.0, 2.0], subjects=["a"])
    with pytest.raises(ValueError, match="two subjects or more, not 1"):
        bootstrap(np.mean, [1.0, 2.0], subjects=["a", "a"])
    with pytest.raises(ValueError, match='"bca" or "percentile"'):
        bootstrap(np.mean, [1.0, 2.0], method="basic")


def delong(labels, first, second):
    """Difference of two AUROCs and its standard error (DeLong 1988), pair by pair."""
    parts = []
    for scores in (first, second):
        up, down = scores[labels == 1], scores[labels == 0]
        above = (up[:, None] > down) + 0.5 * (up[:, None] == down)
        parts.append((above.mean(1), above.mean(0)))
    gap_up, gap_down = (parts[0][side] - parts[1][side] for side in (0, 1))
    return gap_up.mean(), np.sqrt(gap_up.var(ddof=1) / len(gap_up) + gap_down.var(ddof=1) / len(gap_down))


def test_the_paired_bootstrap_meets_delong():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 300)
    shared = rng.normal(size=300)
    first, second = (shift * labels + shared + rng.normal(0, 0.7, 300) for shift in (1.1, 0.8))
    gap, error = delong(labels, first, second)
    found = paired_over_images(auroc, labels, first, second, resamples=10_000)
    assert found["value"] == pytest.approx(gap)
    assert (found["low"], found["high"]) == pytest.approx((gap - 1.96 * error, gap + 1.96 * error), abs=0.25 * error)
    assert norm.isf(found["p"] / 2) == pytest.approx(gap / error, abs=0.25)
    alone = [bootstrap(auroc, labels, scores) for scores in (first, second)]
    apart = np.hypot(*(one["high"] - one["low"] for one in alone))
    assert found["high"] - found["low"] < 0.8 * apart  # pairs take the shared part out


@given(st.integers(0, 10_000), st.floats(0.8, 0.99))
def test_p_is_below_a_level_where_the_interval_leaves_out_zero(seed, level):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, 40)
    labels[:2] = 0, 1
    first, second = rng.normal(labels, 1), rng.normal(size=40)
    settings = dict(resamples=300, seed=seed)
    found = paired_over_images(auroc, labels, first, second, level=level, **settings)
    if abs(found["p"] - (1 - level)) > 0.03:  # the ends lie between two resamples
        assert (found["p"] < 1 - level) == (not found["low"] <= 0 <= found["high"])
    turned = paired_over_images(auroc, labels, second, first, level=level, **settings)
    assert turned["p"] == pytest.approx(found["p"], abs=1e-6)
    assert (turned["low"], turned["high"]) == pytest.approx((-found["high"], -found["low"]), abs=1e-9)


def test_a_classifier_does_not_differ_from_itself():
    labels, scores = ranked(40)
    found = paired_over_images(auroc, labels, scores, scores)
    assert (found["value"], found["low"], found["p"]) == (0, None, 1)


def test_paired_seeds_are_student_s_test_and_every_flip():
    rng = np.random.default_rng(0)
    first, second = rng.normal(0.5, 1, 7), rng.normal(0, 1, 7)
    found = paired_over_seeds(first, second)
    theirs = scipy.stats.ttest_rel(first, second)
    ends = theirs.confidence_interval(0.95)
    assert found["p"] == pytest.approx(theirs.pvalue)
    assert (found["low"], found["high"]) == pytest.approx((ends.low, ends.high))
    gap = first - second
    flipped = [abs(np.dot(signs, gap)) >= abs(gap.sum()) - 1e-12 for signs in product([1, -1], repeat=7)]
    assert found["p_flips"] == np.mean(flipped)


def test_few_seeds_cannot_be_significant_by_flips_alone():
    assert paired_over_seeds([1.0, 2.0, 3.0], [0.0, 0.9, 2.2])["p_flips"] == 0.25
    many = paired_over_seeds(np.arange(20) + 5.0, np.zeros(20))
    assert 0 < many["p_flips"] < 1e-3


def test_seeds_that_all_agree_give_no_interval():
    found = paired_over_seeds([0.5, 0.75], [0.25, 0.5])
    assert (found["value"], found["low"], found["p"]) == (0.25, None, None)
    assert paired_over_seeds([0.5, 0.75], [0.5, 0.75])["p"] == 1
    with pytest.raises(ValueError, match="two seeds or more"):
        paired_over_seeds([1.0], [2.0])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_bonferroni_on_every_intersection(p_values):
    """Closed testing: a claim falls if Bonferroni refutes every family of claims that it belongs to."""
    n = len(p_values)
    families = [[i for i in range(n) if mask >> i & 1] for mask in range(1, 2**n)]
    closed = [max(min(1, len(f) * min(p_values[j] for j in f)) for f in families if i in f) for i in range(n)]
    np.testing.assert_allclose(holm(p_values), closed, atol=1e-12)


def test_holm_by_hand():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03]), [0.03, 0.06, 0.06])
    with pytest.raises(ValueError, match="lie in"):
        holm([0.1, np.nan])
