"""Intervals for numbers that come from several seeds."""

import numpy as np
from scipy import stats


def over_seeds(values, level=0.9):
    """Mean of `values` (one per seed) with its Student-t interval: {"value", "low", "high", "n"}.

    With a single seed there is no interval: low and high are None. `level` 0.9 is the paper's (no_free_lunch, Fig. 10).
    """
    values = np.asarray(values, dtype=float)
    mean, n = float(values.mean()), len(values)
    if n < 2:
        return {"value": mean, "low": None, "high": None, "n": n}
    half = float(stats.t.ppf((1 + level) / 2, n - 1) * stats.sem(values))
    return {"value": mean, "low": mean - half, "high": mean + half, "n": n}
