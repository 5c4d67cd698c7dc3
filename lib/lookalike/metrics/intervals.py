"""Intervals for numbers that come from several seeds."""

import numpy as np
from scipy import stats


def over_seeds(values, level=0.9):
    """Mean of `values` (one per seed) with its Student-t interval: {"value", "low", "high", "n"}.

    With a single seed there is no interval: low and high are None. A value that is not defined makes the mean NaN.
    `level` 0.9 is the paper's (no_free_lunch, Fig. 10).
    """
    values = np.asarray(values, dtype=float)
    mean, n = float(values.mean()), len(values)
    if np.isnan(mean):
        return {"value": mean, "low": None, "high": None, "n": n, "note": "not defined for these images"}
    if n < 2:
        return {"value": mean, "low": None, "high": None, "n": n}
    half = float(stats.t.ppf((1 + level) / 2, n - 1) * stats.sem(values))
    return {"value": mean, "low": mean - half, "high": mean + half, "n": n}


def weakest(*margins, level=0.9):
    """The interval of a claim that needs every one of `margins` (arrays, one value per seed) to be positive.

    Value, low and high are the smallest over the margins: above 0 only if each margin is (intersection-union test).
    Taking the smallest margin per seed first would be biased against the claim.
    """
    found = [over_seeds(margin, level) for margin in margins]
    smallest = {key: None if None in (v := [f[key] for f in found]) else min(v) for key in ("value", "low", "high")}
    return smallest | {"n": min(f["n"] for f in found)}


def clopper_pearson(successes, n, level=0.95):
    """Exact interval (low, high) of a share: covers the truth with a probability of at least `level`."""
    tail = (1 - level) / 2
    low = stats.beta.ppf(tail, successes, n - successes + 1) if successes > 0 else 0.0
    high = stats.beta.ppf(1 - tail, successes + 1, n - successes) if successes < n else 1.0
    return float(low), float(high)
