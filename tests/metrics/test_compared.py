"""All distances between two sets, with intervals from random halves."""

import numpy as np
import pytest

from lookalike.metrics.compared import DIRECTIONS, measures_with_intervals, set_measures


def rows(seed, n=60, d=6, shift=0.0):
    return np.random.default_rng(seed).normal(shift, 1, (n, d))


def test_the_same_set_is_the_best_that_there_is():
    x = rows(0)
    same, other = set_measures(x, x), set_measures(x, rows(1, shift=2))
    assert same["frechet_distance"] == pytest.approx(0, abs=1e-6)
    assert same["vendi_ratio"] == pytest.approx(1)
    for name in ("precision", "recall", "coverage"):
        assert same[name] == 1
        assert other[name] < 0.5
    assert set(same) == set(DIRECTIONS)


def test_intervals_hold_their_value_and_repeat():
    first, second = (measures_with_intervals(rows(0), rows(1), seed=3, halves=5) for _ in range(2))
    assert first == second
    for name, found in first.items():
        low, high = found["interval"]
        assert low <= found["value"] <= high, name


def test_images_of_one_subject_make_the_interval_wider():
    centres = np.random.default_rng(0).normal(size=(12, 4))
    x, y = (np.repeat(centres[i::2], 20, 0) + 0.1 * rows(i, 120, 4) for i in (0, 1))
    subjects = np.repeat(np.arange(6), 20)

    def width(*whose):
        low, high = measures_with_intervals(x, y, *whose, seed=0)["frechet_distance"]["interval"]
        return high - low

    assert width(subjects, subjects) > 2 * width()


def coverage(n, shift, simulations, seed=0):
    """How often the interval holds what the measure gives on average at this n."""
    rng = np.random.default_rng(seed)

    def draw():
        return rng.normal(size=(n, 16)), rng.normal(shift, 1 - 0.3 * shift, (n, 16))

    found = [measures_with_intervals(*draw(), seed=i) for i in range(simulations)]
    truth = {name: np.mean([f[name]["value"] for f in found]) for name in DIRECTIONS}
    return {
        name: np.mean([f[name]["interval"][0] <= truth[name] <= f[name]["interval"][1] for f in found])
        for name in DIRECTIONS
    }


def test_intervals_cover():
    assert min(coverage(60, 0.5, 40).values()) >= 0.85


@pytest.mark.slow
@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_intervals_cover_at_least_what_they_say(shift):
    found = coverage(200, shift, 500)
    print(shift, found)
    assert min(found.values()) >= 0.92
    if shift:
        assert max(found.values()) < 1
