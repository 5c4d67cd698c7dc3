"""Estimators of the log density ratio of two models' samples at a query, and how far their settings move them.

Paper: Arroyo Galende et al. 2026, "No Free Lunch ...", Sec. 3.2, which says that only k nearest neighbours were stable
and shows no comparison; settings from the authors' `estimator.py` (sheet, section 7; claim C7). Chapter: no_free_lunch.
All give ln p(query; victim) / p(query; ablated) in nats, so their numbers compare; `density` has the neighbours. None
of them bounds an epsilon.
"""

from functools import partial
from numbers import Real

import numpy as np
from scipy.special import logsumexp

from lookalike.privacy.density import as_point, as_points, density_ratio_epsilon, verdict_against_null


def knn_log_ratio(query, victim, ablated, k=20):
    """From the distances to the k-th nearest samples: the `corrected` of `density_ratio_epsilon`."""
    return density_ratio_epsilon(*_checked(query, victim, ablated), k=k).corrected


def kde_log_ratio(query, victim, ablated, bandwidth="scott"):
    """From Gaussian kernel densities; `bandwidth` in the units of the points (authors: 1.5, 1 by default) or "scott".

    "scott" scales the kernel with the covariance of each set and n^(-1 / (d + 4)) (scipy's rule; scikit-learn's of the
    same name leaves the covariance out). A fixed one means nothing without the size of the plane. Far from all
    samples the ratio is that of the two nearest ones' kernels, and large for no other reason.
    """
    query, *sets = _checked(query, victim, ablated)
    if bandwidth == "scott":
        densities = [_scott(query, points) for points in sets]
    elif isinstance(bandwidth, Real) and bandwidth > 0:
        densities = [_fixed(query, points, bandwidth) for points in sets]
    else:
        raise ValueError(f"A bandwidth is a positive number or 'scott', not {bandwidth!r}.")
    return float(densities[0] - densities[1])


def logistic_log_ratio(query, victim, ablated, C=1.0, degree=1):
    """From a logistic regression that tells the sets apart (scikit-learn); less ln(n_victim / n_ablated).

    `C` is the inverse weight of the penalty, on standardised points. degree 1 is the authors' and sees straight
    boundaries alone: a victim that is denser all around the query has log ratio 0 for it. degree 2 holds the log ratio
    of any two Gaussians.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import PolynomialFeatures, StandardScaler

    query, points, labels, sizes = _two_classes(query, victim, ablated)
    steps = StandardScaler(), PolynomialFeatures(degree, include_bias=False), LogisticRegression(C=C, max_iter=1000)
    model = make_pipeline(*steps).fit(points, labels)
    return float(model.decision_function(query[None])[0] - sizes)


def mlp_log_ratio(query, victim, ablated, seed=0, epochs=100):
    """From a network 128-64 that tells the sets apart (scikit-learn); less ln(n_victim / n_ablated).

    Adam 1e-3 on standardised points, at most `epochs`, and ten after the training loss last fell, as the authors do;
    differs: no dropout, which scikit-learn lacks. `seed` draws the weights and the batches.
    """
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    query, points, labels, sizes = _two_classes(query, victim, ablated)
    mean, scale = points.mean(0), points.std(0)
    model = MLPClassifier((128, 64), learning_rate_init=1e-3, max_iter=epochs, n_iter_no_change=10, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the authors stop there as well
        model.fit((points - mean) / scale, labels)
    signal = (query - mean) / scale
    for weights, bias in zip(model.coefs_[:-1], model.intercepts_[:-1]):
        signal = np.maximum(signal @ weights + bias, 0)
    # the logit itself: from a probability it would end at 37
    return float((signal @ model.coefs_[-1] + model.intercepts_[-1])[0] - sizes)


def ratio_table(
    query, victim, ablated, reducer=None, ks=(5, 10, 20, 40), bandwidths=(0.5, 1.0, 1.5, "scott"), Cs=(0.1, 1, 10),
    mlp_seeds=(0, 1, 2), repeats=20, seed=0,
):  # fmt: skip
    """One plain dict per estimator and setting: "estimator", "setting", "log_ratio", "null_spread", "null".

    One query, images or points. log_ratio: in nats, positive where the victim is denser. null: the same of `repeats`
    random pairs of halves of the ablated samples, the same pairs for every row; null_spread: their standard deviation.
    It lacks the spread over trainings. Between halves, neighbours spread as between whole sets (it hangs on k alone);
    the others, which spread as n^-1/2, up to 1.4 times as much. An empty tuple of settings leaves an estimator out.
    """
    if repeats < 2:
        raise ValueError(f"A spread needs at least two repeats, not {repeats}.")
    point = as_point(query, reducer)
    sets = [as_points(samples, reducer) for samples in (victim, ablated)]
    rng, half = np.random.default_rng(seed), len(sets[1]) // 2
    orders = [rng.permutation(sets[1]) for _ in range(repeats)]
    rows = []
    for name, setting, estimate in _settings(ks, bandwidths, Cs, mlp_seeds):
        null = [estimate(point, order[:half], order[half : 2 * half]) for order in orders]
        found = {"log_ratio": estimate(point, *sets), "null_spread": float(np.std(null, ddof=1)), "null": null}
        rows.append({"estimator": name, "setting": setting, **found})
    return rows


def stability(rows):
    """Per estimator of a `ratio_table`, how far its settings move the log ratio: a list of dicts.

    low, high: over the settings; range: high - low, in nats, lower is steadier. null_spread: the mean over settings;
    relative: range / null_spread. p: share of the null's halves whose range over the settings is as large, by
    (r + 1) / (n + 1); a small one says that the setting matters at this query beyond chance. Steady is not right: a
    logistic regression of degree 1 hardly heeds its C, and has log ratio 0 where a victim crowds around the query.
    """
    found = []
    for name in dict.fromkeys(row["estimator"] for row in rows):
        own = [row for row in rows if row["estimator"] == name]
        if len(own) < 2:
            raise ValueError(f"Stability compares at least two settings; {name} has one.")
        values, nulls = [row["log_ratio"] for row in own], np.array([row["null"] for row in own])
        spread, reach = float(np.mean([row["null_spread"] for row in own])), float(np.ptp(values))
        p = verdict_against_null(reach, np.ptp(nulls, axis=0))["signed"]
        ends = {"settings": len(own), "low": min(values), "high": max(values), "range": reach}
        found.append({"estimator": name, **ends, "null_spread": spread, "relative": reach / spread, "p": p})
    return found


def _settings(ks, bandwidths, Cs, mlp_seeds):
    """Name, setting and estimate(query, victim, ablated) of each row of the table."""
    yield from (("knn", k, partial(knn_log_ratio, k=k)) for k in ks)
    yield from (("kde", width, partial(kde_log_ratio, bandwidth=width)) for width in bandwidths)
    yield from (("logistic", C, partial(logistic_log_ratio, C=C)) for C in Cs)
    yield from (("logistic, degree 2", C, partial(logistic_log_ratio, C=C, degree=2)) for C in Cs)
    yield from (("mlp", seed, partial(mlp_log_ratio, seed=seed)) for seed in mlp_seeds)


def _scott(query, points):
    from scipy.stats import gaussian_kde

    return gaussian_kde(points.T).logpdf(query)[0]


def _fixed(query, points, bandwidth):
    squares = np.square((points - query) / bandwidth).sum(1)
    return logsumexp(-squares / 2) - np.log(len(points))  # the kernel's own constant is the same for both sets


def _two_classes(query, victim, ablated):
    """Query (d,), points of both, labels (1: victim), and the log of the ratio of their numbers."""
    query, victim, ablated = _checked(query, victim, ablated)
    labels = np.repeat([1, 0], [len(victim), len(ablated)])
    return query, np.concatenate([victim, ablated]), labels, np.log(len(victim) / len(ablated))


def _checked(query, victim, ablated):
    query, victim, ablated = (np.asarray(points, float) for points in (query, victim, ablated))
    if query.ndim != 1 or any(points.ndim != 2 or points.shape[1:] != query.shape for points in (victim, ablated)):
        shapes = f"{query.shape}, {victim.shape} and {ablated.shape}"
        raise ValueError(f"A ratio needs a query (d,) and points (N, d) of both models, not {shapes}.")
    return query, victim, ablated
