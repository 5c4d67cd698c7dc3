"""Scores of class probabilities against labels: ranks, hits, the chance line, and the share of utility kept.

Chapters: pgan (macro AUROC), mcgan_dp (AUROC, AUPRC), and every table of `lookalike.metrics.utility`. All take weights
(R, N), how often each image counts in each of R resamples, and give R numbers at once: the scores are sorted once, and
2,000 resamples of 1,000 images take a tenth of a second (`lookalike.metrics.intervals.bootstrap`).
"""

import numpy as np

METRICS = ("auroc", "auprc", "accuracy", "balanced_accuracy")


def auroc(labels, scores, *, weights=None):
    """Area under the ROC curve, 0 to 1, 0.5 is chance: a positive ranks above a negative, ties half.

    labels (N,) of 0 and 1 with scores (N,); or labels of K classes with scores (N, K), the macro mean of each class
    against the rest (pGAN, Sec. 6.3). weights (R, N), how often each row counts, gives (R,) at once (`bootstrap`).
    NaN where a class or its rest is absent.
    """
    return _ranked(_area, labels, scores, weights)


def auprc(labels, scores, *, weights=None):
    """Area under the precision-recall curve (average precision, no interpolation), 0 to 1; chance is the prevalence.

    It depends on which class is the positive one, label 1, and on its share; arguments as `auroc`.
    """
    return _ranked(_average_precision, labels, scores, weights)


def measure(labels, scores, *, metric, positive=None, weights=None):
    """One of METRICS for labels (N,) and class probabilities (N, K), or (N, S, K) for the mean over S trainings.

    positive: the class that AUROC and AUPRC rank against the rest, None for the macro mean. Weights as `auroc`.
    """
    if metric not in METRICS:
        raise ValueError(f"A metric is one of {', '.join(METRICS)}, not {metric!r}.")
    labels, scores = checked(labels, scores)
    counts = np.ones((1, len(labels))) if weights is None else weights
    found = np.mean([_measure_one(labels, scores[:, s], metric, positive, counts) for s in range(scores.shape[1])], 0)
    return float(found[0]) if weights is None else found


def chance_line(labels, num_classes, *, metric, positive=None, weights=None):
    """What knowing nothing gives on these test labels: the floor of `kept`.

    AUROC 0.5; AUPRC the positive class's share (macro: 1 / K); accuracy the share of the most frequent class;
    balanced accuracy 1 / K. (`score` of No Free Lunch has 1 / K for accuracy.) Weights as `auroc`.
    """
    counts = np.ones((1, len(labels))) if weights is None else weights
    shares = np.stack([_share(np.asarray(labels) == k, counts) for k in range(num_classes)])
    if metric == "accuracy":
        found = shares.max(0)
    elif metric == "auprc" and positive is not None:
        found = shares[positive]
    else:
        found = np.full(len(counts), 0.5 if metric == "auroc" else 1 / num_classes)
    return float(found[0]) if weights is None else found


def confusion(labels, scores):
    """Images by true class (rows) and most probable class (columns), K lists of K, the mean over trainings."""
    labels, scores = checked(labels, scores)
    trainings, classes = scores.shape[1:]
    cells = labels[:, None] * classes + scores.argmax(2)
    return (np.bincount(cells.ravel(), minlength=classes**2).reshape(classes, classes) / trainings).tolist()


def kept(labels, scores, reference, *, metric, positive=None, weights=None):
    """Share of the real utility kept: (value - chance) / (reference's value - chance). 1 as good as real, 0 chance.

    Below 0 it is worse than chance, above 1 better than real; NaN where the reference is not above chance, for then
    there is no utility to keep. Arguments as `measure`; value, reference and chance are of the same test images.
    """
    settings = {"metric": metric, "positive": positive, "weights": weights}
    chance = chance_line(labels, np.shape(scores)[-1], **settings)
    above, possible = (np.asarray(measure(labels, x, **settings)) - chance for x in (scores, reference))
    share = np.where(possible > 1e-12, above / np.where(possible > 1e-12, possible, 1), np.nan)
    return float(share) if weights is None else share


def checked(labels, scores):
    """Labels (N,), from 0 to K - 1, and scores (N, S, K) as arrays, from scores of that shape or (N, K)."""
    labels, scores = np.asarray(labels), np.asarray(scores, float)
    scores = scores[:, None] if scores.ndim == 2 else scores
    if scores.ndim != 3 or labels.shape != scores.shape[:1]:
        raise ValueError(f"Scores are (N, K) or (N, S, K) with N labels; these are {scores.shape} and {labels.shape}.")
    if not np.isin(labels, np.arange(scores.shape[2])).all():
        raise ValueError(f"Labels are 0 to {scores.shape[2] - 1}, one of the {scores.shape[2]} classes with a score.")
    if np.isnan(scores).any():
        raise ValueError("Some class probabilities are not a number: the training has diverged.")
    return labels, scores


def _measure_one(labels, scores, metric, positive, counts):
    if metric in ("auroc", "auprc"):
        curve = _area if metric == "auroc" else _average_precision
        return _against_the_rest(
            curve, labels, scores, range(scores.shape[1]) if positive is None else [positive], counts
        )
    right = scores.argmax(1) == labels
    if metric == "accuracy":
        return _share(right, counts)
    return np.mean([_share(right[labels == k], counts[:, labels == k]) for k in range(scores.shape[1])], 0)


def _ranked(curve, labels, scores, weights):
    labels, scores = np.asarray(labels), np.asarray(scores, float)
    if labels.ndim != 1 or len(labels) != len(scores) or np.isnan(scores).any():
        raise ValueError(
            f"A ranking needs one score, a number, per label; these are {labels.shape} and {scores.shape}."
        )
    if scores.ndim == 1 and not np.isin(labels, (0, 1)).all():
        raise ValueError("One score per image ranks two classes: labels are 0 and 1, and 1 is the positive class.")
    counts = np.ones((1, len(labels))) if weights is None else np.asarray(weights, float)
    if scores.ndim == 1:
        found = curve(labels == 1, scores, counts)
    else:
        found = _against_the_rest(curve, labels, scores, range(scores.shape[1]), counts)
    return float(found[0]) if weights is None else found


def _against_the_rest(curve, labels, scores, classes, counts):
    return np.mean([curve(labels == k, scores[:, k], counts) for k in classes], 0)


def _area(positive, scores, counts):
    """AUROC (R,): of each positive, the negatives below it and half of those level with it."""
    ups, downs = _by_score(positive, scores, counts)
    below = np.cumsum(downs, 1) - downs / 2
    pairs = ups.sum(1) * downs.sum(1)
    return np.where(pairs > 0, (ups * below).sum(1) / np.where(pairs > 0, pairs, 1), np.nan)


def _average_precision(positive, scores, counts):
    """Average precision (R,): at each score from the top, the precision, weighted by the recall that it adds."""
    ups, downs = _by_score(positive, -scores, counts)
    called = np.cumsum(ups + downs, 1)
    precision = np.cumsum(ups, 1) / np.maximum(called, 1e-300)  # where nothing is called yet, no recall is added either
    total = ups.sum(1)
    return np.where(total > 0, (ups * precision).sum(1) / np.where(total > 0, total, 1), np.nan)


def _by_score(positive, scores, counts):
    """Counts (R, G) of positives and of negatives at each of the G different scores, from the lowest."""
    order = np.argsort(scores, kind="stable")
    ordered = scores[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    counts, positive = counts[:, order], positive[order]
    both = [counts * positive, counts * ~positive]
    return both if len(starts) == len(scores) else [np.add.reduceat(part, starts, 1) for part in both]


def _share(hits, counts):
    total = counts.sum(1)
    return np.where(total > 0, counts @ hits / np.where(total > 0, total, 1), np.nan)
