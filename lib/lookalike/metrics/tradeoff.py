"""One score from fidelity, use and privacy: every metric between two measured anchors, every weight in sight.

Paper: Arroyo Galende et al. 2026, "No Free Lunch ...", Sec. 5 and 6: its metrics differ in domain, scale and ordering,
and a single one is left to future work. Chapter: no_free_lunch.

A metric runs from 0, what worthless images score, to 1, what real ones do: both anchors are measured, never chosen.
Metrics of one dimension are looks at the same thing and are averaged: one that hits its floor does not veto the rest.
(Of two attacks that must both fail, give the worse one.) The dimensions are multiplied: no fidelity pays for a leak, so
0 in one that counts is 0 in all. There is no right weighting; `weight_grid` and `winners` show who wins under each.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from lookalike.metrics.intervals import over_seeds

DIMENSIONS = ("fidelity", "use", "privacy")
EQUAL = dict.fromkeys(DIMENSIONS, 1.0)
ROUNDING = 1e-9  # scores this near each other are level


@dataclass(frozen=True)
class Scale:
    """Two measured anchors of a metric, in its own unit; the better one may be the lower one.

    For example a Fréchet distance: worst of blank images, best of held-out real ones; an accuracy: worst chance, best
    a classifier trained on as many real images; a privacy attack: worst on copies, best on images nobody trained on.
    """

    worst: float
    best: float

    def __post_init__(self):
        if not np.isfinite([self.worst, self.best]).all():
            raise ValueError(f"Anchors are finite numbers, not {self.worst} and {self.best}: measure both.")
        if self.worst == self.best:
            raise ValueError(f"Both anchors are {self.worst}: a metric that cannot tell them apart has no scale.")


@dataclass(frozen=True)
class Harmonised:
    """`score` in [0, 1], higher is better, with what it came from: the dimensions' scores and the weights, sum 1."""

    score: float
    dimensions: dict
    weights: dict


def desirability(value, scale):
    """`value` (a number or an array, in the metric's unit) between the anchors of `scale`: 0 at worst, 1 at best.

    Linear between them, 0 and 1 beyond; higher is better whatever the metric's own direction. An infinite value is at
    its end, one that is not a number is refused.
    """
    value = np.asarray(value, dtype=float)  # None becomes NaN
    if np.isnan(value).any():
        raise ValueError("A value that is not a number has no desirability: leave the metric out for all models.")
    return np.clip((value - scale.worst) / (scale.best - scale.worst), 0.0, 1.0)[()]


def dimension_scores(values, scales):
    """{dimension: mean desirability of its metrics}, each in [0, 1], higher is better.

    values: {metric: value}, which may hold more than is scored. scales: {dimension: {metric: Scale}} for all three
    DIMENSIONS, one metric or more in each.
    """
    if set(scales) != set(DIMENSIONS) or not all(scales.values()):
        raise ValueError(f"Scales are needed for one metric or more of each of {', '.join(DIMENSIONS)}.")
    missing = [metric for of_dimension in scales.values() for metric in of_dimension if metric not in values]
    if missing:
        raise ValueError(f"There is a scale but no value for {', '.join(missing)}.")
    found = {
        name: [desirability(values[metric], scale) for metric, scale in scales[name].items()] for name in DIMENSIONS
    }
    return {name: float(np.mean(parts)) for name, parts in found.items()}


def harmonised(values, scales, weights=EQUAL):
    """The weighted geometric mean of the three dimensions, with its parts: a `Harmonised`.

    values and scales as in `dimension_scores`; weights {dimension: 0 or more}, scaled to the sum 1. The score is 0
    where a dimension with a positive weight is 0. It cannot rise when a metric gets worse.
    """
    dimensions, weights = dimension_scores(values, scales), _shares(weights)
    score = weighted_scores([_row(dimensions)], [_row(weights)])[0, 0]
    return Harmonised(float(score), dimensions, weights)


def weighted_scores(table, weights):
    """Weighted geometric means (M, n) of n models' dimensions `table` (n, 3) in [0, 1] under `weights` (M, 3)."""
    table, weights = np.asarray(table, float), np.asarray(weights, float)
    if table.ndim != 2 or weights.ndim != 2 or table.shape[1] != weights.shape[1]:
        raise ValueError(f"Models (n, 3) and weights (M, 3) are needed, not {table.shape} and {weights.shape}.")
    if not ((table >= 0) & (table <= 1)).all():
        raise ValueError("Dimensions lie in [0, 1]: take them from dimension_scores.")
    if not (np.isfinite(weights) & (weights >= 0)).all() or not (weights.sum(1) > 0).all():
        raise ValueError("Weights are 0 or more, and at least one of each row is positive.")
    weights = weights / weights.sum(1, keepdims=True)
    return np.prod(table ** weights[:, None], axis=-1)  # 0 to the power 0 is 1: what has no weight has no say


def weight_grid(step):
    """All weights (M, 3) of DIMENSIONS in multiples of `step`, each row with the sum 1; M = (n + 1)(n + 2) / 2 for
    step 1 / n.
    """
    n = round(1 / step) if step > 0 else 0
    if n < 1 or abs(n * step - 1) > ROUNDING:
        raise ValueError(f"A step is one over a whole number, as 0.1, not {step}.")
    return np.array([(i, j, n - i - j) for i in range(n + 1) for j in range(n + 1 - i)]) / n


def winners(table, weights):
    """Index (M,) of the best of n models under each of `weights` (M, 3); -1 where no model wins.

    table (n, 3): the models' dimensions in [0, 1]. Nobody wins a tie, and nobody wins with a score of 0.
    """
    return _alone_on_top(weighted_scores(table, weights))


def pareto_front(points):
    """Mask (n,) of the points (n, D), higher is better in all, that no other beats: as good everywhere, better once.

    Equal points stay or fall together.
    """
    points = _points(points)
    as_good = (points[:, None] >= points).all(-1)
    better = (points[:, None] > points).any(-1)
    return ~(as_good & better).any(0)


def hypervolume(points, reference=0.0):
    """Volume between `reference` (a number or (D,)) and the points (n, D), higher is better in all; exact.

    In [0, 1] dimensions it is at most 1. A point that is not above the reference everywhere adds nothing. Meant for
    two or three dimensions and some dozens of points.
    """
    return _volume(np.maximum(_points(points) - reference, 0))


def scored(rows, scales, weights=EQUAL, level=0.9):
    """Per (family, sigma) the harmonised score with its Student-t interval over seeds, as a list of dicts.

    rows: dicts with family, sigma, seed and the metrics of `scales`. Each seed is scored by itself, for a model is
    released by itself, and the scores are averaged: {"family", "sigma", the three dimensions' means, "value", "low",
    "high", "n"}. The interval is cut at 0 and 1. There is none (None) for one seed, nor where all seeds score the same,
    which a "note" says: no width is no certainty.
    """
    found = []
    for (family, sigma), of_seed in _by_model(rows).items():
        parts = [harmonised(row, scales, weights) for row in of_seed.values()]
        means = {name: float(np.mean([part.dimensions[name] for part in parts])) for name in DIMENSIONS}
        interval = _within_unit(over_seeds([part.score for part in parts], level))
        found.append({"family": family, "sigma": sigma} | means | interval)
    return found


def win_share(rows, scales, weights=EQUAL, resamples=2000, seed=0):
    """Share of bootstrap resamples of the seeds in which each (family, sigma) has the highest mean score.

    rows as in `scored`; every model needs the same seeds, two or more, which are drawn for all models together. The key
    None holds the resamples that nobody wins; the shares sum to 1. It says how far the ranking hangs on a seed, not
    how probable it is that a model is best: of three seeds there are only ten different resamples.
    """
    models = _by_model(rows)
    seeds = sorted(next(iter(models.values()))) if models else []
    if len(seeds) < 2 or any(sorted(of_seed) != seeds for of_seed in models.values()):
        raise ValueError("Every model needs rows of the same seeds, two or more.")
    scores = np.array([[harmonised(of_seed[s], scales, weights).score for s in seeds] for of_seed in models.values()])
    counts = np.random.default_rng(seed).multinomial(len(seeds), np.full(len(seeds), 1 / len(seeds)), resamples)
    best = _alone_on_top(counts @ scores.T / len(seeds))
    return {model: float((best == i).mean()) for i, model in enumerate(models)} | {None: float((best == -1).mean())}


def hidden_score(accuracy_percent, epsilon, floor=0.1):
    """Accuracy in per cent over max(|epsilon|, floor): the score that the authors' code logs and the paper leaves out.

    epsilon is the empirical one, a signed log ratio (`privacy.density`). Sheet section 8. For comparison alone:

    - it has no upper end of its own: it grows as 1 / |epsilon| until `floor`, which no measurement gives, stops it, so
      the floor may decide who wins;
    - |epsilon| makes a model whose samples crowd around the query and one whose samples avoid it alike;
    - where |epsilon| is below the floor, as for pure noise, it is accuracy / floor: ten times chance.
    """
    if not 0 <= accuracy_percent <= 100:
        raise ValueError(f"accuracy_percent lies in 0 to 100, not at {accuracy_percent}.")
    if np.isnan(epsilon):
        raise ValueError("An epsilon that is not a number has no score.")
    return accuracy_percent / max(abs(epsilon), floor)


def _shares(weights):
    """Weights by dimension, scaled to the sum 1."""
    if set(weights) != set(DIMENSIONS):
        raise ValueError(f"A weight is needed for each of {', '.join(DIMENSIONS)} and for nothing else.")
    total = sum(weights.values())
    if not (min(weights.values()) >= 0 and 0 < total < np.inf):
        raise ValueError("Weights are 0 or more, and at least one is positive.")
    return {name: weights[name] / total for name in DIMENSIONS}


def _row(by_dimension):
    return [by_dimension[name] for name in DIMENSIONS]


def _alone_on_top(scores):
    """Index (M,) of the highest of each row (M, n), -1 for a tie or 0."""
    best = scores.max(1, keepdims=True)
    alone = (scores >= best - ROUNDING).sum(1) == 1
    return np.where(alone & (best[:, 0] > 0), scores.argmax(1), -1)


def _points(points):
    points = np.asarray(points, float)
    if points.ndim != 2 or not np.isfinite(points).all():
        raise ValueError("Points are finite numbers (n, D), one row per model.")
    return points


def _volume(points):
    """Of the union of the boxes from 0 to each point: slabs of the last axis, each as wide as what reaches it."""
    if points.shape[1] == 0:
        return float(len(points) > 0)
    ends = np.unique(np.append(points[:, -1], 0.0))
    return float(sum((high - low) * _volume(points[points[:, -1] >= high, :-1]) for low, high in pairwise(ends)))


def _by_model(rows):
    """{(family, sigma): {seed: row}} in the order of first sight."""
    models = {}
    for row in rows:
        of_seed = models.setdefault((row["family"], row["sigma"]), {})
        if row["seed"] in of_seed:
            raise ValueError(f"{row['family']}, sigma {row['sigma']}, seed {row['seed']} stands in two rows: keep one.")
        of_seed[row["seed"]] = row
    return models


def _within_unit(interval):
    low, high = interval["low"], interval["high"]
    if low is None:
        return interval
    if high - low <= ROUNDING:
        return interval | {"low": None, "high": None, "note": "no interval: all seeds score the same"}
    return interval | {"low": max(low, 0.0), "high": min(high, 1.0)}
