"""Density ratio of two models' samples at one image, and distances of samples to the training set.

Paper: Arroyo Galende et al. 2026, "No Free Lunch ...", Sec. 3.2, Figs. 8 to 11; authors' `estimator.py`,
`analysis.py`, `reducer_manager.py`. Chapter: no_free_lunch. The paper calls the first number an empirical
epsilon. It is not one: a density ratio at one point, of two models, in a reduced space, bounds the epsilon of
a mechanism neither from above nor from below. Read it against `null_distribution`: what two models give that
treat the query alike.
"""

from dataclasses import dataclass, field
from itertools import permutations

import numpy as np
from scipy.integrate import trapezoid
from scipy.stats import f as f_distribution
from scipy.stats import ks_2samp, wasserstein_distance

from lookalike.metrics import as_array, as_images, to_unit
from lookalike.metrics.neighbours import nearest, scan


@dataclass(frozen=True)
class Reducer:
    """A fitted Isomap: `transform` takes images (N, C, H, W) to points (N, dim)."""

    isomap: object = field(repr=False)
    dim: int
    noisy_copies: tuple[float, ...]

    def transform(self, images):
        """Points (N, dim), float64."""
        return np.asarray(self.isomap.transform(_pixels(images)), np.float64)


@dataclass(frozen=True)
class DensityRatio:
    """Log density ratio at a query; positive where the victim, which saw it, is denser than the ablated one.

    as_published: ln(r_k(query; ablated) / r_k(query; victim)), in which the paper leaves out the factor
    `dim`. corrected: times `dim` (plus ln(n_ablated / n_victim)), a log density ratio; low, high: its 95 %
    interval from finite samples alone, not from training another model. Infinite where k victim samples equal
    the query. It bounds no epsilon.
    """

    as_published: float
    corrected: float
    low: float
    high: float
    k: int
    dim: int
    distance_victim: float
    distance_ablated: float


@dataclass(frozen=True)
class NearestDistances:
    """Sorted distances of `holdout` and `synthetic` to the nearest training image (Euclidean, [0, 1] pixels).

    as published: ks_overlap and area_overlap, from 1000 points of the range that both share, 0 to 1. Without
    that cut: ks with its p_value, and wasserstein, in units of distance. These are blind to direction;
    `closer` is not: the median distance of holdout minus that of synthetic, positive where synthetic images
    lie nearer to the training images.
    """

    holdout: np.ndarray = field(repr=False)
    synthetic: np.ndarray = field(repr=False)
    ks_overlap: float
    area_overlap: float
    ks: float
    p_value: float
    wasserstein: float
    closer: float


def fit_reducer(images, n_components=2, n_neighbors=15, noisy_copies=(0.01, 0.05, 0.25, 0.5), seed=0):
    """Isomap on the [0, 1] pixels of images (N, C, H, W) and of a noisy copy for each standard deviation.

    The noisy copies are in the authors' code, not in their paper; `noisy_copies=()` leaves them out.
    """
    from sklearn.manifold import Isomap  # seconds to import

    pixels, rng = _pixels(images), np.random.default_rng(seed)
    noisy = [(pixels + rng.normal(0, std, pixels.shape)).clip(0, 1) for std in noisy_copies]
    isomap = Isomap(n_components=n_components, n_neighbors=n_neighbors).fit(np.concatenate([pixels, *noisy]))
    return Reducer(isomap, n_components, tuple(noisy_copies))


def density_ratio_epsilon(query, victim, ablated, reducer=None, k=20):
    """The paper's empirical epsilon at `query`, from samples of a model that saw it and of one that did not.

    Images, or points (N, d) as they are. Without a reducer the space is that of pixels, where images fill far
    fewer dimensions than `dim` and only `as_published` has a meaning. The number bounds no epsilon, in
    neither direction.
    """
    return density_ratio_curve(query, victim, ablated, reducer, (k,))[0]


def density_ratio_curve(query, victim, ablated, reducer=None, ks=(5, 10, 20, 40)):
    """A DensityRatio for each k: the paper says that k does not matter."""
    point = as_point(query, reducer)
    distances = [_distances(point, as_points(samples, reducer)) for samples in (victim, ablated)]
    return [_density_ratio(*distances, k, len(point)) for k in ks]


def null_distribution(query, sets, reducer=None, k=20):
    """as_published ratios of every ordered pair of `sets`: samples of models that all lack (or saw) it.

    The spread that training anew gives without any difference in privacy; symmetric around 0.
    """
    if len(sets) < 2:
        raise ValueError("A null distribution needs the samples of at least two models.")
    point = as_point(query, reducer)
    distances = [_distances(point, as_points(samples, reducer)) for samples in sets]
    return np.array([_density_ratio(a, b, k, len(point)).as_published for a, b in permutations(distances, 2)])


def null_curves(query, samples, reducer=None, ks=(5, 10, 20, 40), repeats=200, seed=0):
    """as_published ratios (repeats, len(ks)) of random halves of one model's samples: the spread of sampling alone.

    A row uses the same halves for every k. It depends on k and hardly on how many samples there are, so halves stand
    for whole sets; it lacks the spread over trainings.
    """
    point, rng = as_point(query, reducer), np.random.default_rng(seed)
    distances = _distances(point, as_points(samples, reducer))
    half = len(distances) // 2
    rows = []
    for order in (rng.permutation(distances) for _ in range(repeats)):
        a, b = order[:half], order[half : 2 * half]
        rows.append([_density_ratio(a, b, k, len(point)).as_published for k in ks])
    return np.array(rows)


def query_ratios(queries, victim, ablated, reducer=None, ks=(5, 10, 20, 40), corrected=False):
    """Ratios (Q, len(ks)) at each of several queries (Q, ...), as `density_ratio_curve` gives them one by one.

    as_published, or with `corrected` the log density ratio; positive where the victim is denser. One victim and one
    ablated model stand behind all Q numbers, so queries are not independent of each other.
    """
    ks = np.asarray(ks)
    if len(ks) == 0 or ks.min() < 1:
        raise ValueError(f"ks needs at least one k, each 1 or more, not {ks.tolist()}.")
    queries, victim, ablated = (as_points(images, reducer) for images in (queries, victim, ablated))
    near, far = (scan(queries, points, k=ks.max()).distances[:, ks - 1] for points in (victim, ablated))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.log(far) - np.log(near)
    return queries.shape[1] * ratios + np.log(len(ablated) / len(victim)) if corrected else ratios


def null_over_models(queries, sample_sets, reducer=None, k=20, corrected=False):
    """`query_ratios` (P, Q) of every ordered pair of `sample_sets`: models that treat the queries alike.

    Pairs in the order of itertools.permutations; each query's column is symmetric around 0. M models give M (M - 1)
    pairs, which share models: see `verdict_against_null`.
    """
    if len(sample_sets) < 2:
        raise ValueError("A null distribution needs the samples of at least two models.")
    queries, sets = as_points(queries, reducer), [as_points(samples, reducer) for samples in sample_sets]
    pairs = permutations(sets, 2)
    return np.stack([query_ratios(queries, a, b, ks=(k,), corrected=corrected)[:, 0] for a, b in pairs])


def verdict_against_null(ratio, null):
    """How often chance does as much: p values of a ratio, or of Q ratios, against a null (P,) or (P, Q).

    two_sided: from the null values at least as far from 0; signed: from those at least as large, small where the
    victim is denser. Both are (r + 1) / (P + 1), floats for one ratio and lists for Q; n is P. Exact where the P values
    and the ratio are exchangeable, as from disjoint pairs of models. All ordered pairs of M models share models, and
    two_sided is then 0.05 or less too often: without any leak in 16 % of cases for M = 5, in 7 % for 10 (signed: 8 %
    and 6 %; normal log distances). With the victim and the ablated model among the sets of the null it never is too
    often; two_sided then needs nine models to reach 0.05, signed seven.
    """
    ratio, null = np.asarray(ratio, float), np.asarray(null, float)
    if null.ndim == 0 or len(null) == 0 or null.shape[1:] != ratio.shape:
        raise ValueError(f"A null has one row per pair and a column per ratio; {null.shape} is none for {ratio.shape}.")
    if np.isnan(null).any() or np.isnan(ratio).any():
        raise ValueError("A ratio is not defined: k samples of both models equal the query. Take a larger k.")
    n = len(null)
    two_sided, signed = ((1 + beyond.sum(0)) / (1 + n) for beyond in (abs(null) >= abs(ratio), null >= ratio))
    return {"two_sided": two_sided.tolist(), "signed": signed.tolist(), "n": n}


def density_difference(victim_points, ablated_points, query_point, bins=25):
    """Share of the victim's samples less that of the ablated model's in each cell of the plane (Figs. 8 and 9).

    Points (N, 2), (M, 2) and (2,). Returns the difference (bins, bins), first axis x, from -1 to 1 and summing to 0,
    and the edges (bins + 1,) of x and of y, which reach over both sets and the query.
    """
    sets = [np.asarray(points, float) for points in (victim_points, ablated_points)]
    query = np.asarray(query_point, float).reshape(-1)
    if any(points.ndim != 2 or points.shape[1] != 2 or len(points) == 0 for points in sets) or len(query) != 2:
        raise ValueError("A difference in the plane needs points (N, 2) of both models and a query (2,).")
    together = np.concatenate([*sets, query[None]])
    limits = np.stack([together.min(0), together.max(0)], 1)
    shares, x_edges, y_edges = [], None, None
    for points in sets:
        counts, x_edges, y_edges = np.histogram2d(*points.T, bins=bins, range=limits)
        shares.append(counts / len(points))
    return shares[0] - shares[1], x_edges, y_edges


def ecdf_distances(train, holdout, synthetic):
    """How near unseen real and synthetic images lie to the images `train`; see `NearestDistances`.

    The paper's `train` holds 100 images a class although its models saw 10; give those 10 for the question
    that it asks.
    """
    train = _pixels(train)
    near, far = (np.sort(nearest(_pixels(images), train)[0]) for images in (synthetic, holdout))
    ks, area = _overlap(far, near)
    whole = ks_2samp(far, near)
    return NearestDistances(
        holdout=far,
        synthetic=near,
        ks_overlap=ks,
        area_overlap=area,
        ks=float(whole.statistic),
        p_value=float(whole.pvalue),
        wasserstein=float(wasserstein_distance(far, near)),
        closer=float(np.median(far) - np.median(near)),
    )


def _density_ratio(victim, ablated, k, dim):
    """From the query's distances to both sample sets; k-th neighbour densities are k / (n V r^dim)."""
    if not 1 <= k <= min(len(victim), len(ablated)):
        raise ValueError(f"k is {k}; it must not pass the sample counts, {len(victim)} and {len(ablated)}.")
    r_victim, r_ablated = (float(np.partition(distances, k - 1)[k - 1]) for distances in (victim, ablated))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = float(np.log(r_ablated) - np.log(r_victim))
    corrected = dim * ratio + float(np.log(len(ablated) / len(victim)))
    # n V r_k^dim p is nearly Gamma(k) on each side: the log ratio is off by the log of an F(2k, 2k) variable
    margin = float(np.log(f_distribution.ppf(0.975, 2 * k, 2 * k)))
    low, high = corrected - margin, corrected + margin
    return DensityRatio(ratio, corrected, low, high, k, dim, r_victim, r_ablated)


def _overlap(holdout, synthetic):
    """KS statistic and area between distribution functions on their shared range only, as the authors do."""
    start, stop = max(holdout[0], synthetic[0]), min(holdout[-1], synthetic[-1])
    grid = np.linspace(start, stop, 1000)
    gap = np.abs(_ecdf(holdout, grid) - _ecdf(synthetic, grid))
    area = np.clip(trapezoid(gap, grid) / (stop - start), 0, 1) if stop > start else 1.0
    return float(gap.max()), float(area)


def _ecdf(ordered, at):
    return np.searchsorted(ordered, at, side="right") / len(ordered)


def _distances(point, points):
    if points.shape[1] != len(point):
        raise ValueError(f"The query has {len(point)} coordinates and the samples have {points.shape[1]}.")
    return np.linalg.norm(points - point, axis=1)


def as_point(query, reducer=None):
    """One query as a point (d,), from an image (C, H, W) or (1, C, H, W) or a point (d,) or (1, d)."""
    query = as_array(query)
    points = as_points(query[None] if query.ndim in (1, 3) else query, reducer)
    if len(points) != 1:
        raise ValueError(f"One query at a time; there are {len(points)}.")
    return points[0]


def as_points(images, reducer=None):
    """Rows (N, d), float64: points as they are, images by the reducer or, without one, as [0, 1] pixels."""
    images = as_array(images)
    if images.ndim == 2:
        return images.astype(np.float64)
    return reducer.transform(images) if reducer is not None else _pixels(images).astype(np.float64)


def _pixels(images):
    return to_unit(as_images(images)).flatten(1).numpy()
