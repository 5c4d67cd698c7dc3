"""Distances between two sets of features (N, D): Fréchet, kernel, precision and recall, class score.

Chapter: no_free_lunch, Table 1 and what the paper leaves out. Everything is float64: float32 errs by whole
points of Fréchet distance. Which features went in decides what a number means; see
`lookalike.metrics.features`. Nothing N x M is kept, so that 100,000 images fit.
"""

from dataclasses import dataclass

import numpy as np
import scipy.linalg
from scipy.special import log_softmax, logsumexp
from scipy.stats import linregress

from lookalike.metrics.neighbours import centre_of, nearest  # noqa: F401  the old place of nearest

FLAT = 1e-10  # share of the largest variance below which the covariance has lost a direction's digits
ROUNDING = 1e-13  # of a squared distance, as a share of the two rows' squared lengths about the centre
PAIRS = 2**23  # of images, whose distances or kernels are held at one time: 64 MiB a matrix


@dataclass(frozen=True)
class KernelDistance:
    """`value`, and the `standard_error` from leaving out each image once."""

    value: float
    standard_error: float


@dataclass(frozen=True)
class SubsetDistance:
    """`mean` over random subsets and their `spread`, a standard deviation and no standard error: subsets overlap."""

    mean: float
    spread: float


@dataclass(frozen=True)
class Extrapolated:
    """`value` at infinitely many images, and the `standard_error` of the straight line that led there."""

    value: float
    standard_error: float


@dataclass(frozen=True)
class ClassScore:
    """`value`, the mean over splits, and `spread`, their standard deviation."""

    value: float
    spread: float


def frechet_distance(real, synthetic):
    """Squared Fréchet distance between Gaussians fitted to two feature sets: >= 0, lower is better.

    Biased upwards at small N, more so where N < D: compare only at equal N, or see `frechet_infinity`. With
    centred features X and Y the trace of sqrt(cov_x cov_y) is the sum of the singular values of X Y^T (scaled),
    so no D x D root is taken and N < D is exact. Eigenvalues of that matrix squared cost as much and lose half
    the digits.
    """
    return _frechet(*map(_moments, _checked(real, synthetic)))


def frechet_infinity(real, synthetic, both=True, points=15, smallest=0.25, seed=0):
    """The Fréchet distance at infinitely many images, by a straight line in 1 / N (Chong and Forsyth 2020).

    Lower is better. Distances of random subsets, from the share `smallest` to everything, are fitted against the
    inverse share. both=True draws from both sets and removes the bias of both; both=False, as published, keeps the
    real images whole, so their part of the bias stays. The line is one only where the smallest subset is well
    above D images: on Gaussians in 64 dimensions, 500 images come within a tenth of the truth and 50 do not. The
    standard error is the fit's alone: another draw of images moves the value by one to three times as much.
    """
    real, synthetic = _checked(real, synthetic)
    if points < 3 or not 0 < smallest < 1 or smallest * min(len(real), len(synthetic)) < 2:
        raise ValueError("The line needs three points, from a share of at least two images of each set to everything.")
    rng, whole = np.random.default_rng(seed), _moments(real)
    shares, values = np.linspace(smallest, 1, points), []
    for share in shares:
        some_real = _moments(_share_of(real, share, rng)) if both else whole
        values.append(_frechet(some_real, _moments(_share_of(synthetic, share, rng))))
    line = linregress(1 / shares, values)
    return Extrapolated(float(line.intercept), float(line.intercept_stderr))


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


def kernel_distance_subsets(real, synthetic, subsets=100, size=1000, seed=2020):
    """Mean and spread of the unbiased kernel distance over random subsets of `size` images; lower is better.

    torch-fidelity's and torchmetrics' KID, with torch-fidelity's draws for the same seed (`real` is its first input).
    Prefer `kernel_distance`, which uses all pairs and has a standard error. Unless the sets are far larger than what
    the subsets use, all come from one kernel matrix K: with subsets as rows of ones and zeros W, their sums are the
    row sums of W K * W.
    """
    x, y = _checked(real, synthetic)
    if not 3 <= size <= min(len(x), len(y)) or subsets < 1:
        raise ValueError(f"Subsets of {size} images: `size` must be from 3 to {min(len(x), len(y))}, the smaller set.")
    rng = np.random.RandomState(seed)
    draws = [[rng.choice(len(rows), size, replace=False) for rows in (x, y)] for _ in range(subsets)]
    if len(x) * len(y) > subsets * size**2:
        values = np.array([kernel_distance(x[i], y[j]).value for i, j in draws])
    else:
        in_x, in_y = np.zeros((subsets, len(x))), np.zeros((subsets, len(y)))
        for s, (i, j) in enumerate(draws):
            in_x[s, i], in_y[s, j] = 1, 1
        within = _subset_sums(x, x, in_x, in_x) - in_x @ _self_kernel(x)
        within += _subset_sums(y, y, in_y, in_y) - in_y @ _self_kernel(y)
        values = within / (size * (size - 1)) - 2 * _subset_sums(x, y, in_x, in_y) / size**2
    return SubsetDistance(float(values.mean()), float(values.std()))


def class_score(logits, splits=10, seed=0):
    """exp of the mean divergence of each image's class distribution from the set's, from logits (N, K).

    From 1 to K, higher is better. The Inception Score only where the logits are Inception's; it never sees a
    real image. Images are shuffled before they are split: samples usually lie sorted by class.
    """
    logits = np.asarray(logits, np.float64)
    if logits.ndim != 2 or len(logits) < splits:
        raise ValueError(f"The class score needs logits (N, K) with at least {splits} images; got {logits.shape}.")
    if not np.isfinite(logits).all():
        raise ValueError("Some logits are not finite, so the class score is not defined: look at the network.")
    log_p = log_softmax(np.random.default_rng(seed).permutation(logits), axis=1)
    scores = [_class_score(part) for part in np.array_split(log_p, splits)]
    return ClassScore(float(np.mean(scores)), float(np.std(scores, ddof=1)) if splits > 1 else 0.0)


def precision_recall_density_coverage(real, synthetic, k=5):
    """Four shares from balls that reach to each image's k-th neighbour in its own set (Naeem et al. 2020).

    precision: synthetic images in some real ball; recall: real images in some synthetic ball (both Kynkäänniemi et
    al. 2019); coverage: real balls that hold a synthetic image; all in [0, 1]. density: real balls around a synthetic
    image, divided by k; may pass 1. Higher is better. Balls are open, as in the authors' prdc: equal images at the
    edge are outside (torch-fidelity counts them), and so is what lies within rounding of it, 1e-13 of the pair's
    squared lengths about the real mean. Equal distributions give less than 1, coverage about 1 - 2^-k at equal N:
    compare only at equal N and k.
    """
    real, synthetic = _checked(real, synthetic, at_least=k + 1)
    centre = centre_of(real)
    real, synthetic = real - centre, synthetic - centre
    real_radius, synthetic_radius = _squared_radius(real, k), _squared_radius(synthetic, k)
    precise, recalled, covered, count = np.zeros(len(synthetic), bool), 0, 0, 0
    for start, between, rounding in _squared_distances(real, synthetic):
        between += rounding
        in_real_ball = between < real_radius[start : start + len(between), None]
        precise |= in_real_ball.any(0)
        count += in_real_ball.sum()
        covered += in_real_ball.any(1).sum()
        recalled += (between < synthetic_radius).any(1).sum()
    return {
        "precision": float(precise.mean()),
        "recall": float(recalled / len(real)),
        "density": float(count / (k * len(synthetic))),
        "coverage": float(covered / len(real)),
    }


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
    if len(rows) <= rows.shape[1]:
        return centred
    root, failed = scipy.linalg.lapack.dpotrf(centred.T @ centred)
    pivots = np.square(root.diagonal())
    if failed or pivots.min() < FLAT * pivots.max():
        return np.linalg.qr(centred, mode="r")  # from the rows themselves: twice the work, all digits
    return root


def _moments(rows):
    return rows.mean(0), _covariance_root(rows)


def _frechet(real, synthetic):
    """From means and covariance roots."""
    (real_mean, x), (synthetic_mean, y) = real, synthetic
    shared = scipy.linalg.svd(x @ y.T, compute_uv=False, check_finite=False, lapack_driver="gesvd").sum()
    gap = np.square(real_mean - synthetic_mean).sum()
    distance = gap + np.square(x).sum() + np.square(y).sum() - 2 * shared
    return max(float(distance), 0.0)  # below zero only by rounding


def _share_of(rows, share, rng):
    return rows[rng.permutation(len(rows))[: round(share * len(rows))]]


def _chunks(x, y):
    """Slices of rows of x that make at most PAIRS pairs with all of y."""
    at_once = max(1, PAIRS // len(y))
    return [slice(start, start + at_once) for start in range(0, len(x), at_once)]


def _kernel(products, dim):
    products /= dim
    products += 1
    return products * products * products


def _self_kernel(x):
    return _kernel(np.square(x).sum(1), x.shape[1])


def _kernel_sums(x, y):
    """Row sums (N,) and column sums (M,) of the kernel matrix, which is never held whole."""
    rows, columns = [], np.zeros(len(y))
    for part in _chunks(x, y):
        block = _kernel(x[part] @ y.T, x.shape[1])
        rows.append(block.sum(1))
        columns += block.sum(0)
    return np.concatenate(rows), columns


def _kernel_sums_within(x):
    return _kernel_sums(x, x)[0] - _self_kernel(x)


def _subset_sums(x, y, in_x, in_y):
    """Sums (S,) of the kernel over the pairs of each subset."""
    blocks = ((in_x[:, part] @ _kernel(x[part] @ y.T, x.shape[1]) * in_y).sum(1) for part in _chunks(x, y))
    return sum(blocks)


def _class_score(log_p):
    log_mean = logsumexp(log_p, axis=0) - np.log(len(log_p))
    return np.exp((np.exp(log_p) * (log_p - log_mean)).sum(1).mean())


def _squared_distances(x, y):
    """Yields (start, squared distances (n, M), their rounding); zero where only that is left: equal images tie."""
    x2, y2 = (np.square(rows).sum(1) for rows in (x, y))
    for part in _chunks(x, y):
        scale = x2[part, None] + y2
        squared = x[part] @ y.T
        squared *= -2
        squared += scale
        scale *= ROUNDING
        squared[squared < scale] = 0
        yield part.start, squared, scale


def _squared_radius(rows, k):
    blocks = (np.partition(block, k, axis=1)[:, k] for _, block, _ in _squared_distances(rows, rows))
    return np.concatenate(list(blocks))  # column 0 is the image itself
