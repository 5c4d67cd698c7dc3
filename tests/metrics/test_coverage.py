"""How often each interval covers the truth, over sets drawn anew: 100 draws, and 500 within 0.95 +- 0.03 (slow).

A share of 0.95 counted over 500 draws has a standard error of 0.01, over 100 draws of 0.022: bands are three of them.
"""

import numpy as np
import pytest
from scipy.stats import norm

from lookalike.metrics.intervals import (
    bootstrap,
    clopper_pearson,
    over_seeds,
    paired_over_images,
    paired_over_seeds,
)
from lookalike.metrics.scores import auprc, auroc, kept
from lookalike.privacy.attack import attack_result

# draws, resamples of each bootstrap, band
RESAMPLED = [pytest.param(100, 400, 0.07, id="quick"), pytest.param(500, 2000, 0.03, id="full", marks=pytest.mark.slow)]
DRAWS = [pytest.param(100, 0.07, id="quick"), pytest.param(500, 0.03, id="full", marks=pytest.mark.slow)]


def mean(values, *, weights=None):
    return values.mean() if weights is None else weights @ values / weights.sum(1)


def coverage(interval, truth, draws):
    """Share of `draws` sets whose `interval(rng)`, (low, high) or a dict of them, holds the truth."""
    found = [interval(np.random.default_rng(seed)) for seed in range(draws)]
    ends = [(f["low"], f["high"]) if isinstance(f, dict) else f for f in found]
    assert not any(None in pair for pair in ends)
    covered = float(np.mean([low <= truth <= high for low, high in ends]))
    print(f"covered {covered:.3f} of {draws}", end=" ")
    return covered


def binormal(rng, n, shift, prevalence=0.5):
    """Labels and scores of n images: positives N(shift, 1), negatives N(0, 1)."""
    labels = (rng.random(n) < prevalence).astype(int)
    return labels, rng.normal(shift * labels, 1)


def area(shift, spread=1.0):
    return norm.cdf(shift / (spread * np.sqrt(2)))


def precision_recall_area(shift, prevalence):
    threshold = np.linspace(-9, 9 + shift, 200_001)
    recall, alarms = norm.sf(threshold - shift), norm.sf(threshold)
    precision = prevalence * recall / (prevalence * recall + (1 - prevalence) * alarms)
    return -np.trapezoid(precision, recall)


def clustered(rng, subjects=40, images=6, shift=1.0, own=0.5):
    """Labels, scores and subjects; a subject has one label and a shift of its own. Scores have variance 1."""
    whose = np.repeat(np.arange(subjects), images)
    labels = (rng.random(subjects) < 0.5).astype(int)[whose]
    scores = shift * labels + rng.normal(0, np.sqrt(1 - own), len(whose)) + rng.normal(0, np.sqrt(own), subjects)[whose]
    return labels, scores, whose


@pytest.mark.parametrize(("draws", "band"), DRAWS)
@pytest.mark.parametrize("seeds", [3, 10])
def test_seeds_are_covered(seeds, draws, band):
    covered = coverage(lambda rng: over_seeds(rng.normal(0.8, 0.1, seeds), level=0.95), 0.8, draws)
    assert covered == pytest.approx(0.95, abs=band)
    covered = coverage(lambda rng: over_seeds(rng.normal(0.8, 0.1, seeds)), 0.8, draws)
    assert covered == pytest.approx(0.9, abs=2 * band)


@pytest.mark.parametrize(("draws", "band"), DRAWS)
def test_paired_seeds_are_covered(draws, band):
    def interval(rng):
        shared = rng.normal(0, 1, 5)
        return paired_over_seeds(shared + rng.normal(0.3, 0.2, 5), shared)

    assert coverage(interval, 0.3, draws) == pytest.approx(0.95, abs=band)


@pytest.mark.parametrize(("draws", "band"), DRAWS)
@pytest.mark.parametrize(("share", "n"), [(0.05, 40), (0.5, 100), (0.97, 200)])
def test_shares_are_covered_at_least(share, n, draws, band):
    covered = coverage(lambda rng: clopper_pearson(rng.binomial(n, share), n), share, draws)
    assert covered >= 0.95 - band * 0.7  # never below 0.95 but for the count of draws


@pytest.mark.parametrize(("draws", "resamples", "band"), RESAMPLED)
@pytest.mark.parametrize(("method", "n", "shape"), [("bca", 60, 1), ("bca", 200, 1), ("percentile", 100, 25)])
def test_a_mean_is_covered_by_bca_also_where_it_is_skewed(method, n, shape, draws, resamples, band):
    """Gamma draws: shape 1 is exponential (percentile: 0.92 at 200), 25 nearly normal."""
    covered = coverage(
        lambda rng: bootstrap(mean, rng.gamma(shape, size=n), method=method, resamples=resamples), shape, draws
    )
    assert covered == pytest.approx(0.95, abs=band)


@pytest.mark.parametrize(("draws", "resamples", "band"), RESAMPLED)
@pytest.mark.parametrize(
    ("method", "n", "shift"), [("bca", 60, 1.0), ("bca", 200, 0.0), ("bca", 200, 1.5), ("percentile", 200, 1.0)]
)
def test_auroc_is_covered(method, n, shift, draws, resamples, band):
    covered = coverage(
        lambda rng: bootstrap(auroc, *binormal(rng, n, shift), method=method, resamples=resamples), area(shift), draws
    )
    assert covered == pytest.approx(0.95, abs=band)


@pytest.mark.parametrize(("draws", "resamples", "band"), RESAMPLED)
@pytest.mark.parametrize(
    ("method", "n", "prevalence"), [("bca", 100, 0.5), ("bca", 200, 0.2), ("percentile", 200, 0.5)]
)
def test_auprc_is_covered(method, n, prevalence, draws, resamples, band):
    truth = precision_recall_area(1.0, prevalence)
    covered = coverage(
        lambda rng: bootstrap(auprc, *binormal(rng, n, 1.0, prevalence), method=method, resamples=resamples),
        truth,
        draws,
    )
    assert covered == pytest.approx(0.95, abs=band)


@pytest.mark.parametrize(("draws", "resamples", "band"), RESAMPLED)
@pytest.mark.parametrize("statistic", [auroc, auprc])
def test_subjects_are_covered_where_images_alone_are_not(statistic, draws, resamples, band):
    truth = area(1.0) if statistic is auroc else precision_recall_area(1.0, 0.5)

    def interval(rng, known):
        labels, scores, subjects = clustered(rng)
        return bootstrap(statistic, labels, scores, subjects=subjects if known else None, resamples=resamples)

    assert coverage(lambda rng: interval(rng, True), truth, draws) == pytest.approx(0.95, abs=band)
    assert coverage(lambda rng: interval(rng, False), truth, draws) < 0.8


@pytest.mark.parametrize(("draws", "resamples", "band"), RESAMPLED)
@pytest.mark.parametrize("by_subject", [False, True])
def test_the_difference_of_two_classifiers_is_covered(by_subject, draws, resamples, band):
    """Two scores of the same images, AUROC 0.76 and 0.66, that share part of their noise."""

    def interval(rng):
        labels, shared, subjects = clustered(rng, 60 if by_subject else 150, 3 if by_subject else 1, 0.0)
        first, second = (shift * labels + shared + rng.normal(0, 0.5, len(labels)) for shift in (1.1, 0.7))
        return paired_over_images(
            auroc, labels, first, second, subjects=subjects if by_subject else None, resamples=resamples
        )

    truth = area(1.1, np.sqrt(1.25)) - area(0.7, np.sqrt(1.25))
    assert coverage(interval, truth, draws) == pytest.approx(0.95, abs=band)


@pytest.mark.parametrize(("draws", "resamples", "band"), RESAMPLED)
def test_classifiers_that_do_not_differ_are_told_apart_as_often_as_the_level_says(draws, resamples, band):
    def p(rng):
        labels = (rng.random(120) < 0.4).astype(int)
        return paired_over_images(auroc, labels, *(rng.normal(labels, 1) for _ in range(2)), resamples=resamples)["p"]

    found = np.array([p(np.random.default_rng(seed)) for seed in range(draws)])
    assert np.mean(found < 0.05) == pytest.approx(0.05, abs=band)
    assert np.mean(found < 0.5) == pytest.approx(0.5, abs=2.5 * band)


@pytest.mark.parametrize(("draws", "resamples", "band"), RESAMPLED)
def test_the_share_of_utility_kept_is_covered(draws, resamples, band):
    def interval(rng):
        labels, shared, _ = clustered(rng, 200, 1, 0.0)
        both = [shift * labels + shared + rng.normal(0, 0.5, 200) for shift in (0.8, 1.6)]
        return bootstrap(
            lambda labels, *scores, weights=None: share(labels, scores, weights),
            labels,
            *map(two_columns, both),
            resamples=resamples,
        )

    def share(labels, scores, weights):
        return kept(labels, *scores, metric="auroc", positive=1, weights=weights)

    def two_columns(scores):
        return np.stack([-scores, scores], 1)

    truth = (area(0.8, np.sqrt(1.25)) - 0.5) / (area(1.6, np.sqrt(1.25)) - 0.5)
    assert coverage(interval, truth, draws) == pytest.approx(0.95, abs=band)


@pytest.mark.parametrize(("draws", "band"), DRAWS)
def test_an_attack_over_subjects_is_covered(draws, band):
    def interval(rng):
        whose = np.repeat(np.arange(30), 5)
        members, others = (rng.normal(shift, 0.7, 30)[whose] + rng.normal(0, 0.7, 150) for shift in (0.6, 0.0))
        found = attack_result("x", members, others, whose, whose)
        return found.low, found.high

    assert coverage(interval, area(0.6, np.sqrt(0.98)), draws) == pytest.approx(0.95, abs=band)
