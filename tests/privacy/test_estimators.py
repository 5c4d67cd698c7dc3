import json
import warnings
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import logit
from scipy.stats import multivariate_normal

from lookalike.privacy.density import (
    density_difference,
    density_ratio_curve,
    fit_reducer,
    null_distribution,
    null_over_models,
    query_ratios,
    verdict_against_null,
)
from lookalike.privacy.estimators import (
    kde_log_ratio,
    knn_log_ratio,
    logistic_log_ratio,
    mlp_log_ratio,
    ratio_table,
    stability,
)

QUERY = np.array([0.3, -0.2])


def gaussian(seed, n=2000, shift=0.0, scale=1.0):
    return shift + scale * np.random.default_rng(seed).normal(size=(n, 2))


def pictures(seed, n=60, side=6):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(n, 1, side, side, generator=generator) - 1


def true_ratio(scale, shift):
    victim = multivariate_normal.logpdf(QUERY, np.full(2, shift), scale**2 * np.eye(2))
    return victim - multivariate_normal.logpdf(QUERY, np.zeros(2), np.eye(2))


def mean_of(estimate, scale, shift, draws=3, **settings):
    """Of a few draws of 2,000 victim and 2,500 ablated points."""
    pairs = [(gaussian(2 * i, 2000, shift, scale), gaussian(2 * i + 1, 2500)) for i in range(draws)]
    return np.mean([estimate(QUERY, *pair, **settings) for pair in pairs])


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.5), (0.8, 0.0)])
@pytest.mark.parametrize(
    ("estimate", "settings", "tolerance"),
    [
        (knn_log_ratio, {"k": 40}, 0.26),  # two standard errors: 2 sqrt(2 / k / draws)
        (kde_log_ratio, {"bandwidth": 0.3}, 0.1),
        (kde_log_ratio, {}, 0.1),
        (logistic_log_ratio, {"degree": 2}, 0.1),
        (mlp_log_ratio, {"epochs": 15}, 0.15),
    ],
)
def test_estimators_meet_gaussians_of_known_density(scale, shift, estimate, settings, tolerance):
    assert mean_of(estimate, scale, shift, **settings) == pytest.approx(true_ratio(scale, shift), abs=tolerance)


def test_a_straight_boundary_is_blind_to_a_crowd_around_the_query():
    assert mean_of(logistic_log_ratio, 1.0, 0.5) == pytest.approx(true_ratio(1.0, 0.5), abs=0.1)
    assert true_ratio(0.8, 0.0) > 0.4
    assert mean_of(logistic_log_ratio, 0.8, 0.0) == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize("estimate", [kde_log_ratio, logistic_log_ratio, mlp_log_ratio])
def test_unequal_sizes_of_one_distribution_give_no_ratio(estimate):
    assert np.log(4) > 1  # what the sizes alone would give
    assert estimate(QUERY, gaussian(0, 2000), gaussian(1, 500)) == pytest.approx(0, abs=0.35)


def test_kernel_ratio_equals_scikit_learn_and_scott_by_hand():
    from sklearn.neighbors import KernelDensity

    victim, ablated = gaussian(0, 80, 0.2, 0.5), gaussian(1, 120)
    log_p = [KernelDensity(bandwidth=0.7).fit(points).score(QUERY[None]) for points in (victim, ablated)]
    assert kde_log_ratio(QUERY, victim, ablated, 0.7) == pytest.approx(log_p[0] - log_p[1])

    def scott(points):
        kernel = np.cov(points.T) * len(points) ** (-2 / 6)
        return np.log(np.mean([multivariate_normal.pdf(QUERY, point, kernel) for point in points]))

    assert kde_log_ratio(QUERY, victim, ablated) == pytest.approx(scott(victim) - scott(ablated))
    far = QUERY + 1000  # where every density is 0 in floating point
    assert np.isfinite(kde_log_ratio(far, victim, ablated, 0.5))


def test_network_ratio_is_the_logit_of_scikit_learn():
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    victim, ablated = gaussian(0, 100, 0.4, 0.5), gaussian(1, 60)
    network = MLPClassifier((128, 64), max_iter=100, n_iter_no_change=10, random_state=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that 100 epochs were not enough
        model = make_pipeline(StandardScaler(), network)
        model.fit(np.concatenate([victim, ablated]), [1] * 100 + [0] * 60)
    expected = logit(model.predict_proba(QUERY[None])[0, 1]) - np.log(100 / 60)
    assert mlp_log_ratio(QUERY, victim, ablated, seed=3) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("estimate", [knn_log_ratio, kde_log_ratio, logistic_log_ratio])
def test_swapping_the_models_turns_the_sign(estimate):
    victim, ablated = gaussian(0, 100, 0.3, 0.6), gaussian(1, 150)
    there, back = estimate(QUERY, victim, ablated), estimate(QUERY, ablated, victim)
    assert abs(there) > 0.1
    assert back == pytest.approx(-there, abs=1e-3)


def test_table_has_a_row_per_setting_with_the_spread_of_halves():
    victim, ablated = gaussian(0, 60, 0.0, 0.6), gaussian(1, 90)
    rows = ratio_table(QUERY, victim, ablated, ks=(5, 20), mlp_seeds=(), repeats=4, seed=7)
    assert [row["estimator"] for row in rows] == ["knn"] * 2 + ["kde"] * 4 + ["logistic"] * 3 + [
        "logistic, degree 2"
    ] * 3
    assert [row["setting"] for row in rows] == [5, 20, 0.5, 1.0, 1.5, "scott"] + [0.1, 1, 10] * 2
    rng = np.random.default_rng(7)
    halves = [np.split(rng.permutation(ablated), 2) for _ in range(4)]
    for row, estimate in ((rows[1], knn_log_ratio), (rows[5], kde_log_ratio)):
        assert row["log_ratio"] == estimate(QUERY, victim, ablated)
        null = [estimate(QUERY, *pair) for pair in halves]
        assert row["null"] == null
        assert row["null_spread"] == pytest.approx(np.sqrt(np.sum(np.square(null - np.mean(null))) / 3))
    assert json.loads(json.dumps(rows)) == rows
    mlp = ratio_table(QUERY, victim, ablated, ks=(), bandwidths=(), Cs=(), mlp_seeds=(1,), repeats=2)
    assert mlp[0]["log_ratio"] == mlp_log_ratio(QUERY, victim, ablated, seed=1)


def test_table_takes_images_through_a_reducer():
    images = pictures(0, 80)
    reducer = fit_reducer(images, n_neighbors=8, noisy_copies=())
    few = {"ks": (5,), "bandwidths": ("scott",), "Cs": (), "mlp_seeds": (), "repeats": 2}
    points = reducer.transform(images)
    by_hand = ratio_table(points[0], points[:40], points[40:], **few)
    found = ratio_table(images[0], images[:40], images[40:], reducer, **few)
    assert [row["log_ratio"] for row in found] == pytest.approx([row["log_ratio"] for row in by_hand], rel=1e-4)


def test_stability_is_the_range_over_settings_against_that_of_halves():
    def row(log_ratio, null):
        return {"estimator": "knn", "log_ratio": log_ratio, "null_spread": float(np.std(null, ddof=1)), "null": null}

    found = stability([row(1.0, [0.0, 1.0, 2.0]), row(1.5, [0.4, 1.5, 4.0])])
    spread = (1.0 + np.std([0.4, 1.5, 4.0], ddof=1)) / 2
    assert found == [
        {
            "estimator": "knn", "settings": 2, "low": 1.0, "high": 1.5, "range": 0.5,
            "null_spread": pytest.approx(spread), "relative": pytest.approx(0.5 / spread),
            "p": 0.75,  # the halves range over 0.4, 0.5 and 2
        }
    ]  # fmt: skip


def test_blind_estimator_is_the_steadiest():
    """So to be steady is no proof: the plain logistic regression sees nothing here."""
    rows = ratio_table(QUERY, gaussian(0, 400, 0, 0.5), gaussian(1, 400), mlp_seeds=(), repeats=10)
    by_name = {row["estimator"]: row for row in stability(rows)}
    assert min(by_name.values(), key=lambda row: row["range"])["estimator"] == "logistic"
    assert abs(by_name["logistic"]["high"]) < 0.2 < true_ratio(0.5, 0.0) / 2
    assert by_name["knn"]["low"] > 0.2


def test_many_queries_equal_one_at_a_time():
    queries, victim, ablated = gaussian(5, 7), gaussian(0, 90, 0.2, 0.7), gaussian(1, 70)
    curves = [density_ratio_curve(query, victim, ablated, ks=(20, 5)) for query in queries]
    published = [[ratio.as_published for ratio in curve] for curve in curves]
    corrected = [[ratio.corrected for ratio in curve] for curve in curves]
    np.testing.assert_allclose(query_ratios(queries, victim, ablated, ks=(20, 5)), published, rtol=1e-12, atol=1e-14)
    found = query_ratios(queries, victim, ablated, ks=(20, 5), corrected=True)
    np.testing.assert_allclose(found, corrected, rtol=1e-12, atol=1e-14)


def test_many_queries_go_through_a_reducer_and_find_copies():
    images, reducer = pictures(0, 80), fit_reducer(pictures(0, 80), n_neighbors=8, noisy_copies=())
    found = query_ratios(images[:3], images[:40], images[40:], reducer, ks=(5,))
    one = density_ratio_curve(images[1], images[:40], images[40:], reducer, ks=(5,))[0].as_published
    assert found[1, 0] == pytest.approx(one, rel=1e-4)
    query = gaussian(3, 1)
    assert query_ratios(query, np.repeat(query, 9, 0), gaussian(0, 9), ks=(5,)) == np.inf


def test_null_of_models_for_many_queries_equals_that_for_one():
    queries, sets = gaussian(9, 4), [gaussian(i, 50) for i in range(4)]
    found = null_over_models(queries, sets, k=5)
    assert found.shape == (12, 4)
    for column, query in zip(found.T, queries):
        np.testing.assert_allclose(column, null_distribution(query, sets, k=5), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(np.sort(found, 0), np.sort(-found, 0))
    np.testing.assert_allclose(null_over_models(queries, sets, k=5, corrected=True), 2 * found)


distinct = st.lists(st.integers(1, 10**6), min_size=2, max_size=12, unique=True)


@given(distinct, st.integers(0, 2**32 - 1))
def test_verdict_is_uniform_where_all_values_are_alike(values, seed):
    """Each of n + 1 exchangeable values may be the one seen: p takes each multiple of 1 / (n + 1) once."""
    values = np.array(values, float) * np.random.default_rng(seed).choice([-1, 1], len(values))
    found = [verdict_against_null(values[i], np.delete(values, i)) for i in range(len(values))]
    expected = np.arange(1, len(values) + 1) / len(values)
    for name in ("two_sided", "signed"):
        np.testing.assert_allclose(np.sort([verdict[name] for verdict in found]), expected)


@given(st.lists(st.integers(-50, 50), min_size=2, max_size=8), st.floats(0, 1))
def test_pairs_that_include_the_two_models_never_alarm_too_often(levels, level):
    """Ties included: whichever two models are the victim and the ablated one."""
    pairs = np.array([a - b for a, b in permutations(levels, 2)], float)
    p = verdict_against_null(pairs, np.repeat(pairs[:, None], len(pairs), 1))
    for name in ("two_sided", "signed"):
        assert np.mean(np.array(p[name]) <= level) <= level


def test_pairs_of_other_models_alarm_too_often_as_stated():
    rng = np.random.default_rng(0)
    for models, two_sided, signed in ((5, 0.16, 0.08), (10, 0.07, 0.06)):
        draws = rng.normal(size=(models + 2, 4000))
        null = np.stack([a - b for a, b in permutations(draws[2:], 2)])
        p = verdict_against_null(draws[0] - draws[1], null)
        assert np.mean(np.array(p["two_sided"]) <= 0.05) == pytest.approx(two_sided, abs=0.017)
        assert np.mean(np.array(p["signed"]) <= 0.05) == pytest.approx(signed, abs=0.015)


def test_verdict_counts_the_null_by_hand_and_gives_plain_numbers():
    null = np.array([-3.0, -1.0, 1.0, 3.0])
    assert verdict_against_null(2.0, null) == {"two_sided": 0.6, "signed": 0.4, "n": 4}
    assert verdict_against_null(-3.0, null) == {"two_sided": 0.6, "signed": 1.0, "n": 4}
    several = verdict_against_null([2.0, np.inf], np.stack([null, null], 1))
    assert several == {"two_sided": [0.6, 0.2], "signed": [0.4, 0.2], "n": 4}


def test_difference_of_histograms_counts_shares():
    victim, ablated, query = gaussian(0, 40, 0.5), gaussian(1, 60), np.array([5.0, -6.0])
    found, x_edges, y_edges = density_difference(victim, ablated, query, bins=4)
    assert (x_edges[-1], y_edges[0]) == (5, -6)
    assert x_edges[0] == min(victim[:, 0].min(), ablated[:, 0].min())

    def share(points, i, j):
        x, y = points.T
        return np.mean(
            (x >= x_edges[i])
            & ((x < x_edges[i + 1]) | (i == 3))
            & (y >= y_edges[j])
            & ((y < y_edges[j + 1]) | (j == 3))
        )

    by_hand = [[share(victim, i, j) - share(ablated, i, j) for j in range(4)] for i in range(4)]
    np.testing.assert_allclose(found, by_hand, atol=1e-12)
    assert found.max() > 0.1


@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 30), st.integers(1, 25))
def test_difference_sums_to_zero_and_turns_with_the_models(seed, n, m, bins):
    victim, ablated = gaussian(seed, n), gaussian(seed + 1, m, 0.5)
    found, *edges = density_difference(victim, ablated, QUERY, bins)
    assert found.shape == (bins, bins)
    assert found.sum() == pytest.approx(0, abs=1e-12)
    assert np.abs(found).sum() <= 2 + 1e-12
    np.testing.assert_array_equal(density_difference(ablated, victim, QUERY, bins)[0], -found)
    for edge, value in zip(edges, QUERY):
        assert edge[0] <= value <= edge[-1]


def test_bad_input_gets_a_sentence():
    points = gaussian(0, 30)
    with pytest.raises(ValueError, match="positive number or 'scott', not -1"):
        kde_log_ratio(QUERY, points, points, bandwidth=-1)
    with pytest.raises(ValueError, match=r"needs a query \(d,\) and points"):
        logistic_log_ratio(np.zeros(3), points, points)
    with pytest.raises(ValueError, match="at least two repeats"):
        ratio_table(QUERY, points, points, repeats=1)
    with pytest.raises(ValueError, match="One query at a time"):
        ratio_table(points, points, points)
    with pytest.raises(ValueError, match="two settings; kde has one"):
        stability([{"estimator": "kde"}])
    with pytest.raises(ValueError, match="at least one k"):
        query_ratios(points, points, points, ks=(0, 5))
    with pytest.raises(ValueError, match="from 1 to 30"):
        query_ratios(points, points, points, ks=(31,))
    with pytest.raises(ValueError, match="at least two models"):
        null_over_models(points, [points])
    with pytest.raises(ValueError, match="a column per ratio"):
        verdict_against_null([0.1, 0.2], np.zeros(5))
    with pytest.raises(ValueError, match="Take a larger k"):
        verdict_against_null(np.nan, np.zeros(5))
    with pytest.raises(ValueError, match="difference in the plane"):
        density_difference(np.zeros((5, 3)), points, QUERY)
