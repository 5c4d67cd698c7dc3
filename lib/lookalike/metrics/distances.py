"""Distances between two sets of features (N, D), and exact nearest neighbours.

Chapter: no_free_lunch, Table 1 and what the paper leaves out. Everything is float64: float32 errs by whole
points of Fréchet distance. Which features went in decides what a number means; see
`lookalike.metrics.features`.
"""

from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from scipy.special import log_softmax, logsumexp

PAIRS_AT_ONCE = 2048  # differences of whole images held at one time


@dataclass(frozen=True)
class KernelDistance:
    """`value`, and the `standard_error` from leaving out each image once."""

    value: float
    standard_error: float


@dataclass(frozen=True)
class ClassScore:
    """`value`, the mean over splits, and `spread`, their standard deviation."""

    value: float
    spread: float


def frechet_distance(real, synthetic):
    """Squared Fréchet distance between Gaussians fitted to two feature sets: >= 0, lower is better.

    Biased upwards at small N, more so where N < D: compare only at equal N. With centred features X and Y the
    trace of sqrt(cov_x cov_y) is the sum of the singular values of X Y^T (scaled), so no D x D root is taken
    and N < D is exact.
    """
    real, synthetic = _checked(real, synthetic)
    gap = np.square(real.mean(0) - synthetic.mean(0)).sum()
    x, y = _covariance_root(real), _covariance_root(synthetic)
    shared = scipy.linalg.svdvals(x @ y.T, check_finite=False).sum()
    distance = gap + np.square(x).sum() + np.square(y).sum() - 2 * shared
    return max(float(distance), 0.0)  # below zero only by rounding


def kernel_distance(real, synthetic):
    """Unbiased squared MMD with the kernel (x.y / D + 1)^3, KID on Inception features; lower is better.

    All images at once instead of random subsets. Around 0 for equal distributions, so it can be slightly
    negative. The standard error is a delete-one jackknife over both sets.
    """
    x, y = _checked(real, synthetic, at_least=3)
    n, m = len(x), len(y)
    within_x, within_y = _kernel_sums_within(x), _kernel_sums_within(y)
    x_to_y, y_to_x = _kernel_sums(x, y)
    a, b, c = within_x.sum(), within_y.sum(), x_to_y.sum()
    value = a / (n * (n - 1)) + b / (m * (m - 1)) - 2 * c / (n * m)
    without_x = (a - 2 * within_x) / ((n - 1) * (n - 2)) - 2 * (c - x_to_y) / ((n - 1) * m)
    without_y = (b - 2 * within_y) / ((m - 1) * (m - 2)) - 2 * (c - y_to_x) / (n * (m - 1))
    variance = (n - 1) * without_x.var() + (m - 1) * without_y.var()
    return KernelDistance(float(value), float(np.sqrt(variance)))


def class_score(logits, splits=10, seed=0):
    """exp of the mean divergence of each image's class distribution from the set's, from logits (N, K).

    From 1 to K, higher is better. The Inception Score only where the logits are Inception's; it never sees a
    real image. Images are shuffled before they are split: samples usually lie sorted by class.
    """
    logits = np.asarray(logits, np.float64)
    if logits.ndim != 2 or len(logits) < splits:
        raise ValueError(f"The class score needs logits (N, K) with at least {splits} images; got {logits.shape}.")
    log_p = log_softmax(np.random.default_rng(seed).permutation(logits), axis=1)
    scores = [_class_score(part) for part in np.array_split(log_p, splits)]
    return ClassScore(float(np.mean(scores)), float(np.std(scores, ddof=1)) if splits > 1 else 0.0)


def precision_recall_density_coverage(real, synthetic, k=5):
    """Four shares from balls that reach to each image's k-th neighbour in its own set (Naeem et al. 2020).

    precision: synthetic images in some real ball; recall: real images in some synthetic ball; coverage: real
    balls that hold a synthetic image; all in [0, 1]. density: real balls around a synthetic image, divided by
    k; may pass 1. Higher is better.
    """
    real, synthetic = _checked(real, synthetic, at_least=k + 1)
    between = _squared_distances(real, synthetic)
    in_real_ball = between < _squared_radius(real, k)[:, None]
    in_synthetic_ball = between < _squared_radius(synthetic, k)
    return {
        "precision": float(in_real_ball.any(0).mean()),
        "recall": float(in_synthetic_ball.any(1).mean()),
        "density": float(in_real_ball.sum() / (k * len(synthetic))),
        "coverage": float(in_real_ball.any(1).mean()),
    }


def nearest(queries, reference, chunk=1024):
    """Distance (N,) of each query (N, D) to its nearest reference row (M, D), and that row's index (N,).

    A float32 product leaves out what is surely farther; the rest is measured from the differences themselves,
    because |a|^2 + |b|^2 - 2ab cancels exactly where copies lie. Of rows equally near, the first counts.
    """
    queries, reference = (torch.as_tensor(rows).float().flatten(1) for rows in (queries, reference))
    if len(reference) == 0 or len(queries) == 0:
        raise ValueError("Nearest neighbours need at least one query and one reference image.")
    found = [_nearest(part, reference) for part in queries.split(chunk)]
    return tuple(torch.cat(parts).numpy() for parts in zip(*found))


def _nearest(queries, reference):
    rows, columns = _candidates(queries, reference)
    pieces = zip(rows.split(PAIRS_AT_ONCE), columns.split(PAIRS_AT_ONCE))
    norms = [torch.linalg.vector_norm(queries[i] - reference[j], dim=1, dtype=torch.float64) for i, j in pieces]
    exact = torch.cat(norms)
    distances = torch.full((len(queries),), torch.inf, dtype=torch.float64)
    distances.scatter_reduce_(0, rows, exact, "amin")
    hit = exact == distances[rows]
    indices = torch.full((len(queries),), len(reference)).scatter_reduce(0, rows[hit], columns[hit], "amin")
    return distances, indices


def _candidates(queries, reference):
    """Index pairs (row, column) among which each query's nearest row is, whatever float32 rounded."""
    centre = reference.mean(0)
    a, b = queries - centre, reference - centre
    a2, b2 = a.square().sum(1, keepdim=True), b.square().sum(1)
    squared = a2 + b2 - 2 * a @ b.T
    rounding = 8 * a.shape[1] ** 0.5 * torch.finfo(torch.float32).eps * (a2 + b2.max())
    return (squared <= squared.amin(1, keepdim=True) + 2 * rounding).nonzero(as_tuple=True)


def _checked(real, synthetic, at_least=2):
    """Both feature sets as float64, or a sentence."""
    real, synthetic = np.asarray(real, np.float64), np.asarray(synthetic, np.float64)
    for name, rows in (("real", real), ("synthetic", synthetic)):
        if rows.ndim != 2 or len(rows) < at_least:
            raise ValueError(f"The {name} features must be (N, D) with N at least {at_least}, not {rows.shape}.")
        if not np.isfinite(rows).all():
            raise ValueError(f"The {name} features hold values that are not finite.")
    if real.shape[1] != synthetic.shape[1]:
        raise ValueError(f"Features of {real.shape[1]} and {synthetic.shape[1]} columns: use one extractor.")
    return real, synthetic


def _covariance_root(rows):
    """A matrix R (min(N, D), D) with R^T R the covariance of the rows (N - 1 in the divisor)."""
    centred = (rows - rows.mean(0)) / np.sqrt(len(rows) - 1)
    return centred if len(rows) <= rows.shape[1] else np.linalg.qr(centred, mode="r")


def _kernel(products, dim):
    base = products / dim + 1
    return base * base * base


def _kernel_sums(x, y, chunk=2048):
    """Row sums (N,) and column sums (M,) of the kernel matrix, which is never held whole."""
    rows, columns = [], np.zeros(len(y))
    for start in range(0, len(x), chunk):
        block = _kernel(x[start : start + chunk] @ y.T, x.shape[1])
        rows.append(block.sum(1))
        columns += block.sum(0)
    return np.concatenate(rows), columns


def _kernel_sums_within(x):
    return _kernel_sums(x, x)[0] - _kernel(np.square(x).sum(1), x.shape[1])


def _class_score(log_p):
    log_mean = logsumexp(log_p, axis=0) - np.log(len(log_p))
    return np.exp((np.exp(log_p) * (log_p - log_mean)).sum(1).mean())


def _squared_distances(x, y):
    """Squared distances (N, M); what is zero but for rounding becomes zero, so that equal images tie."""
    centre = x.mean(0)
    x, y = x - centre, y - centre
    scale = np.square(x).sum(1)[:, None] + np.square(y).sum(1)
    squared = scale - 2 * x @ y.T
    squared[squared < 1e-13 * scale] = 0
    return squared


def _squared_radius(rows, k):
    return np.partition(_squared_distances(rows, rows), k, axis=1)[:, k]  # column 0 is the image itself
