"""The mean ROC curve against counted pairs, a slow twin, and scikit-learn's recipe written out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import auc, roc_curve

from lookalike.metrics.roc import class_curves, macro_curve
from lookalike.metrics.scores import auroc


def classified(n, seed=0, decimals=12, skill=1.8):
    """Labels (n,) of three classes and probabilities (n, 3); few decimals make ties."""
    rng = np.random.default_rng(seed)
    labels = np.r_[0, 1, 2, rng.choice(3, n - 3, p=[0.25, 0.55, 0.2])]
    logits = rng.normal(size=(n, 3)) + skill * np.eye(3)[labels]
    return labels, (np.exp(logits) / np.exp(logits).sum(1, keepdims=True)).round(decimals)


def counted_area(labels, scores, k):
    up, down = scores[labels == k, k], scores[labels != k, k]
    return ((up[:, None] > down) + 0.5 * (up[:, None] == down)).mean()


@given(st.integers(4, 60), st.integers(0, 10_000), st.sampled_from([1, 2, 12]))
def test_the_area_of_the_mean_is_the_mean_of_the_areas(n, seed, decimals):
    """With ties and without: both ends of a jump are kept."""
    labels, scores = classified(n, seed, decimals)
    found = macro_curve(labels, scores)
    assert found["auc"] == pytest.approx(np.mean([counted_area(labels, scores, k) for k in range(3)]), abs=1e-12)
    assert found["auc"] == pytest.approx(auroc(labels, scores), abs=1e-12)
    assert auc(found["fpr"], found["tpr"]) == pytest.approx(found["auc"], abs=1e-12)


def test_the_curve_is_the_mean_at_every_rate():
    """The slow twin: of each class the highest true positive rate at no more than so many false positives."""
    labels, scores = classified(80)
    found = macro_curve(labels, scores)
    for rate in (0.0, 0.013, 0.1, 0.5, 0.99, 1.0):
        highest = [tpr[fpr <= rate].max() for fpr, tpr in class_curves(labels, scores)]
        at = found["tpr"][found["fpr"] <= rate].max()
        assert at == pytest.approx(np.mean(highest))
    assert (found["fpr"][0], found["tpr"][0], found["fpr"][-1], found["tpr"][-1]) == (0, 0, 1, 1)
    assert (np.diff(found["fpr"]) >= 0).all()
    assert (np.diff(found["tpr"]) >= -1e-12).all()


def test_the_published_area_is_the_recipe_s_and_larger():
    for n, seed in ((60, 0), (400, 1)):
        labels, scores = classified(n, seed)
        curves = [roc_curve(labels == k, scores[:, k]) for k in range(3)]
        rates = np.unique(np.concatenate([fpr for fpr, *_ in curves]))
        recipe = auc(rates, np.mean([np.interp(rates, fpr, tpr) for fpr, tpr, _ in curves], 0))
        found = macro_curve(labels, scores)
        assert found["auc_as_published"] == pytest.approx(recipe, abs=1e-12)
        assert found["auc"] < found["auc_as_published"] < found["auc"] + 1 / np.sqrt(n) / 5


def test_a_jump_by_hand():
    """Of one class the second of two positives is passed after half of the negatives: three quarters."""
    labels = np.array([0, 0, 1, 1, 1, 1])
    first = np.array([0.9, 0.5, 0.8, 0.7, 0.2, 0.1])
    fpr, tpr = class_curves(labels, np.stack([first, 1 - first], 1))[0]
    assert np.trapezoid(tpr, fpr) == 0.75
    found = macro_curve(labels, np.stack([first, 1 - first], 1))
    assert found["auc"] == 0.75
    assert found["auc_as_published"] == 0.875  # from (0, 1/2) straight to (1/2, 1)


def test_perfect_and_blind_scores():
    labels, _ = classified(30)
    assert macro_curve(labels, np.eye(3)[labels])["auc"] == 1
    assert macro_curve(labels, np.full((30, 3), 1 / 3))["auc"] == 0.5


def test_what_has_no_curve_is_refused():
    labels, scores = classified(30)
    with pytest.raises(ValueError, match="Every class needs an image"):
        macro_curve(np.minimum(labels, 1), scores)
    with pytest.raises(ValueError, match="one training"):
        macro_curve(labels, np.stack([scores, scores], 1))
    with pytest.raises(ValueError, match="diverged"):
        macro_curve(labels, np.full((30, 3), np.nan))
