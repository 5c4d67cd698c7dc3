"""ROC curves of several classes and their mean.

Paper: Sun et al. 2021, pGAN, Sec. 6.3 and Fig. 3C ("averaging the class specific ROC curves using equal weights").
Chapter: pgan. A curve jumps where a score is passed, and the mean keeps both ends of every jump, so that its area is
the mean of the class areas. The usual recipe keeps the upper end alone and draws a slope towards it: its area is
larger. What that adds is given beside it.
"""

import numpy as np

from lookalike.metrics.scores import checked
from lookalike.privacy.reidentification import roc_points


def class_curves(labels, probabilities):
    """One ROC curve per class against the rest: false and true positive rates, both from (0, 0) to (1, 1).

    labels (N,), 0 to K - 1; probabilities (N, K).
    """
    labels, scores = checked(labels, probabilities)
    if scores.shape[1] > 1:
        raise ValueError(f"A curve is of one training: give probabilities (N, K), not {np.shape(probabilities)}.")
    counts = np.bincount(labels, minlength=scores.shape[2])
    if not 0 < counts.min() <= counts.max() < len(labels):
        raise ValueError(f"Every class needs an image and a rest; the classes have {', '.join(map(str, counts))}.")
    return [roc_points(scores[labels == k, 0, k], scores[labels != k, 0, k]) for k in range(scores.shape[2])]


def macro_curve(labels, probabilities):
    """The mean of the class curves at every false positive rate: {"fpr", "tpr", "auc", "auc_as_published"}.

    fpr, tpr (P,): both ends of each jump. auc, 0 to 1, is the area below, which equals the mean of the class AUCs, ties
    or not. auc_as_published is the area of scikit-learn's recipe: curves without the points on a straight line, the
    upper end of each jump at the union of their rates, straight lines between. Arguments as `class_curves`.
    """
    curves = class_curves(labels, probabilities)
    rates = np.unique(np.concatenate([fpr for fpr, _ in curves]))
    upper = np.mean([np.interp(rates, *curve) for curve in curves], 0)  # of equal rates np.interp takes the last
    lower = np.mean([np.interp(-rates, -fpr[::-1], tpr[::-1]) for fpr, tpr in curves], 0)
    fpr, tpr = np.repeat(rates, 2), np.stack([lower, upper], 1).ravel()
    published = _published_area(np.asarray(labels), np.asarray(probabilities))
    return {"fpr": fpr, "tpr": tpr, "auc": _area(fpr, tpr), "auc_as_published": published}


def _published_area(labels, probabilities):
    from sklearn.metrics import roc_curve  # seconds to import

    curves = [roc_curve(labels == k, probabilities[:, k])[:2] for k in range(probabilities.shape[1])]
    rates = np.unique(np.concatenate([fpr for fpr, _ in curves]))
    return _area(rates, np.mean([np.interp(rates, *curve) for curve in curves], 0))


def _area(x, y):
    return float(np.trapezoid(y, x))
