"""Intervals and paired tests, each with what it takes as random: the seeds, the images, or the subjects.

Chapters: no_free_lunch (over seeds), pgan (BCa, 2,000 resamples), and every table of utility. Papers: Efron 1987,
"Better Bootstrap Confidence Intervals" (BCa); Clopper and Pearson 1934; Holm 1979.

A resample is a row of counts, how often each unit was drawn; leaving one out is another such row. A statistic that
takes counts as weights gets thousands of resamples in one call, and subjects need no code of their own: their count
becomes the weight of all their images. How often the intervals cover is measured in tests/metrics/test_coverage.py.
"""

import inspect
from itertools import product

import numpy as np
from scipy import stats
from scipy.special import ndtr, ndtri

WEIGHTS_AT_ONCE = 2**20  # eight MB: what stays in a cache is summed fastest
MOST_UNDEFINED = 0.1  # with one or two positives more resamples than this hold none of them
EXACT_FLIPS = 16  # seeds up to which all 2^n signs are tried


# Over seeds


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
    One margin that is not defined makes the value NaN, without low and high.
    Taking the smallest margin per seed first would be biased against the claim.
    """
    found = [over_seeds(margin, level) for margin in margins]
    smallest = {
        key: None if None in (v := [f[key] for f in found]) else float(np.min(v)) for key in ("value", "low", "high")
    }
    return smallest | {"n": min(f["n"] for f in found)}


def paired_over_seeds(first, second, level=0.95):
    """Mean of `first` - `second`, value i of both from seed i: `over_seeds` with p and p_flips (two-sided).

    Random are the seeds: what another training would give on the same test images. p is Student's, and below
    1 - level exactly when the interval leaves out 0; p_flips turns the sign of every difference both ways and assumes
    only that the difference is symmetric about 0. p_flips cannot be below 2 / 2^n: 0.25 with three seeds, 0.03 with
    six. It is exact up to 16 seeds, then over 65,536 random flips.
    """
    first, second = np.asarray(first, float), np.asarray(second, float)
    if first.shape != second.shape or first.ndim != 1 or len(first) < 2:
        raise ValueError(f"Pairs need the values of the same two seeds or more, not {first.shape} and {second.shape}.")
    gap = first - second
    found = over_seeds(gap, level)
    if np.isnan(found["value"]):
        return found | {"p": None, "p_flips": None}
    if np.ptp(gap) <= 1e-12 * np.abs(gap).max():
        none = {"low": None, "high": None, "note": "no interval: all seeds give the same difference"}
        return found | none | {"p": 1.0 if found["value"] == 0 else None, "p_flips": _flips(gap)}
    return found | {"p": float(stats.ttest_1samp(gap, 0).pvalue), "p_flips": _flips(gap)}


def _flips(gap):
    """Share of sign flips whose mean is at least as far from 0 as the one seen."""
    if len(gap) <= EXACT_FLIPS:
        signs = np.array(list(product([1, -1], repeat=len(gap))))
    else:
        signs = np.random.default_rng(0).choice([1, -1], (2**EXACT_FLIPS, len(gap)))
        signs[0] = 1  # the one seen is one of them: p is never 0
    sums = np.abs(signs @ gap)
    return float((sums >= sums[0] * (1 - 1e-12)).mean())


# Shares


def clopper_pearson(successes, n, level=0.95):
    """Exact interval (low, high) of a share: covers the truth with a probability of at least `level`."""
    if not 0 <= successes <= n:
        raise ValueError(f"A share of {n} has from 0 to {n} successes, not {successes}.")
    tail = (1 - level) / 2
    low = stats.beta.ppf(tail, successes, n - successes + 1) if successes > 0 else 0.0
    high = stats.beta.ppf(1 - tail, successes + 1, n - successes) if successes < n else 1.0
    return float(low), float(high)


# Over images or subjects


def bootstrap(statistic, *samples, method="bca", level=0.95, resamples=2000, subjects=None, seed=0):
    """`statistic(*samples)` with its bootstrap interval: {"value", "low", "high", "n"}, and a "note" where one is due.

    samples: arrays (N, ...) whose rows belong together and are drawn together (labels and scores of the same images).
    subjects (N,): whose image each row is. Subjects are then drawn with all their rows, n counts them, and they are
    what is random; without them every row counts as independent. Networks and generators stay as they are.
    method: "bca", corrected for bias and skew, or "percentile".

    `statistic` gives a number, NaN where it is not defined. If it takes `weights` by keyword only, it is called with
    counts (R, N) and gives (R,), as `lookalike.metrics.scores.auroc`; else it is called on copied rows, 8 times slower.

    There is no interval (low and high None, the note says why) where the value is not defined; where one resample in
    ten is not, as with one or two positives; or where all resamples agree, as an AUROC of 1: no width is no certainty.

    Of 500 to 1,000 sets drawn anew, 95 % BCa intervals covered the truth in 0.94 to 0.96 for an AUROC up to 0.9 from
    60 images, and in 0.94 for an AUPRC from 100 (0.92 at 60; 0.93 for an AUROC of 0.96 at 60). Percentile intervals:
    AUROC 0.92 and AUPRC 0.90 at 60, 0.94 and 0.93 at 200. 40 subjects of six images that go together: 0.95 (AUROC)
    and 0.93 (AUPRC) over subjects, 0.72 and 0.65 over images.
    """
    return _bootstrap(statistic, samples, method, level, resamples, subjects, seed)[0]


def paired_over_images(
    statistic, labels, first, second, method="bca", level=0.95, resamples=2000, subjects=None, seed=0
):
    """`statistic(labels, first)` - `statistic(labels, second)` with interval and two-sided p; the rest as `bootstrap`.

    first, second (N, ...): scores of two fixed classifiers for the same N images. Random are the images, or the
    subjects, not the training: to say that one *method* is better than another, `paired_over_seeds` must agree.
    p inverts the interval: it is below 1 - level exactly when 0 lies outside (to within the resamples), and never
    below 1 / resamples. p is None where there is no interval, and 1 if no resample shows any difference.
    """

    def gap(labels, first, second):
        return statistic(labels, first) - statistic(labels, second)

    def weighted_gap(labels, first, second, *, weights):
        return statistic(labels, first, weights=weights) - statistic(labels, second, weights=weights)

    difference = weighted_gap if _takes_weights(statistic) else gap
    samples = (labels, first, second)
    found, draws, shape = _bootstrap(difference, samples, method, level, resamples, subjects, seed)
    if shape is None:
        never_differ = draws is not None and not draws.any()
        return found | {"p": 1.0 if never_differ else None}
    return found | {"p": _p_value(draws, *shape)}


def holm(p_values):
    """p values of a family of claims, corrected so that one false claim or more has the chance that p names (Holm).

    The order is kept; a claim holds at 0.05 if its corrected p is below it. No independence is needed.
    """
    p_values = np.asarray(p_values, float)
    if not ((p_values >= 0) & (p_values <= 1)).all():
        raise ValueError("p values lie in [0, 1]; leave out claims that have none.")
    order = np.argsort(p_values)
    steps = p_values[order] * np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return corrected


def _bootstrap(statistic, samples, method, level, resamples, subjects, seed):
    """The result, the resampled values, and BCa's bias and acceleration (None where there is no interval)."""
    if method not in ("bca", "percentile"):
        raise ValueError(f'method is "bca" or "percentile", not "{method}".')
    samples = [np.asarray(sample) for sample in samples]
    owner, units = _units(samples, subjects)
    value = float(_apply(statistic, samples, owner, np.ones((1, units)))[0])
    found = {"value": value, "low": None, "high": None, "n": units}
    if np.isnan(value):
        return found | {"note": "not defined for these images"}, None, None
    drawn = _drawn_counts(units, resamples, len(owner), seed)
    draws = np.concatenate([_apply(statistic, samples, owner, counts) for counts in drawn])
    undefined = np.isnan(draws).mean()
    draws = draws[~np.isnan(draws)]
    note = {"note": f"{undefined:.1%} of the resamples have no value and are left out"} if undefined else {}
    if undefined > MOST_UNDEFINED:
        return found | {"note": f"no interval: {undefined:.0%} of the resamples have no value"}, None, None
    if np.ptp(draws) <= 1e-12 * np.abs(draws).max():
        return found | {"note": "no interval: all resamples give the same value"}, draws, None
    shape = (0.0, 0.0)
    if method == "bca":
        left_out = (_apply(statistic, samples, owner, counts) for counts in _left_out_counts(units, len(owner)))
        shape = _bias(draws, value), _acceleration(np.concatenate(list(left_out)))
    if not np.isfinite(shape).all():
        return found | {"note": "no interval: BCa has none here; percentile has"}, None, None
    tails = _bca_share(np.array([(1 - level) / 2, (1 + level) / 2]), *shape)
    low, high = np.quantile(draws, tails)
    return found | {"low": float(low), "high": float(high)} | note, draws, shape


def _units(samples, subjects):
    """Whose unit each row is (N,), and the number of units."""
    n = len(samples[0])
    if any(len(sample) != n for sample in samples):
        raise ValueError(f"Samples need the same rows; these have {', '.join(str(len(s)) for s in samples)}.")
    owner = np.arange(n)
    if subjects is not None:
        subjects = np.asarray(subjects)
        if subjects.shape != (n,):
            raise ValueError(f"There are {n} rows and {subjects.size} subjects; each row needs its subject.")
        owner = np.unique(subjects, return_inverse=True)[1]
    units = int(owner.max()) + 1 if n else 0
    if units < 2:
        raise ValueError(f"A bootstrap needs two {'rows' if subjects is None else 'subjects'} or more, not {units}.")
    return owner, units


def _takes_weights(statistic):
    try:
        parameter = inspect.signature(statistic).parameters.get("weights")
    except ValueError:  # some built-in functions have no signature
        return False
    return parameter is not None and parameter.kind is parameter.KEYWORD_ONLY  # np.average's weights are others


def _apply(statistic, samples, owner, counts):
    """The statistic (R,) of resamples given as counts (R, units)."""
    weights = counts[:, owner]
    if _takes_weights(statistic):
        return np.asarray(statistic(*samples, weights=weights), float)
    rows = np.arange(len(owner))
    resampled = (np.repeat(rows, row.astype(int)) for row in weights)
    return np.array([statistic(*(sample[index] for sample in samples)) for index in resampled], float)


def _drawn_counts(units, resamples, rows, seed):
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, step := max(1, WEIGHTS_AT_ONCE // rows)):
        size = min(step, resamples - start)
        cells = rng.integers(0, units, (size, units)) + units * np.arange(size)[:, None]
        yield np.bincount(cells.ravel(), minlength=size * units).reshape(size, units).astype(float)


def _left_out_counts(units, rows):
    for start in range(0, units, step := max(1, WEIGHTS_AT_ONCE // rows)):
        yield 1.0 - np.eye(min(step, units - start), units, start)


def _bias(draws, value):
    """z_0 of Efron: the normal quantile of the value among its resamples, ties half (to within rounding)."""
    near = 1e-9 * np.ptp(draws)
    return float(ndtri(((draws < value - near).mean() + (draws <= value + near).mean()) / 2))


def _acceleration(left_out):
    gap = left_out.mean() - left_out
    total = np.square(gap).sum()
    return float((gap**3).sum() / (6 * total**1.5)) if total > 0 else 0.0


def _bca_share(tail, bias, acceleration):
    """The share of resamples below BCa's limit for a normal `tail`; with 0, 0 the tail itself (percentile)."""
    z = bias + ndtri(tail)
    stretch = 1 - acceleration * z
    with np.errstate(divide="ignore"):
        return ndtr(np.where(stretch > 0, bias + z / np.maximum(stretch, 0), np.copysign(np.inf, z)))


def _p_value(draws, bias, acceleration):
    """Two-sided p: the level at which the interval's end meets 0, by `_bca_share` solved for its tail."""
    share = ((draws < 0).mean() + (draws <= 0).mean()) / 2
    edge = 0.5 / len(draws)
    z = ndtri(np.clip(share, edge, 1 - edge)) - bias
    if 1 + acceleration * z <= 0:  # no tail reaches so far
        return 2 * edge
    tail = ndtr(z / (1 + acceleration * z) - bias)
    return float(max(2 * min(tail, 1 - tail), 2 * edge))
