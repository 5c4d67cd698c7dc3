"""Intervals over seeds."""

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from lookalike.metrics.intervals import clopper_pearson, over_seeds, weakest


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


def test_clopper_pearson_covers():
    for p in (0.02, 0.5, 0.9):
        intervals = [clopper_pearson(k, 20) for k in range(21)]
        covered = sum(binom.pmf(k, 20, p) for k, (low, high) in enumerate(intervals) if low <= p <= high)
        assert covered >= 0.95
