"""pGAN's two attacks, its cut-offs as attacks, and its made-up panels against the published figures."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from scipy.stats import fisher_exact
from sklearn.metrics import roc_curve

from lookalike.data import phantoms
from lookalike.privacy.attack import attack_result, auc
from lookalike.privacy.reidentification import (
    ORIGINS,
    SIZES,
    cut_off,
    cut_off_attack,
    cut_off_curve,
    distance_attacks,
    distribution_scores,
    pairwise_scores,
    possible_cut_offs,
    printed_cut_off,
    roc_points,
    toy_distribution,
    toy_pairwise,
    toy_reference,
)

TABLE_S1_AT_50 = {
    "pairwise, toy": (1.00, 0.00, 0.00),
    "pairwise, pixels": (0.58, 0.36, 0.05),
    "pairwise, embedding": (0.51, 0.27, 0.22),
    "distribution, toy": (0.93, 0.05, 0.02),
    "distribution, pixels": (0.64, 0.33, 0.04),
    "distribution, embedding": (0.62, 0.24, 0.15),
}


@pytest.mark.parametrize("share", [0.01, 0.1])
def test_both_attacks_are_those_of_the_whole_distance_matrix(share):
    rng = np.random.default_rng(0)
    candidates, synthetic = rng.normal(size=(60, 12)), rng.normal(size=(300, 12))
    every = cdist(candidates, synthetic)
    found = distance_attacks(candidates, synthetic, share)
    pairs = round(share * every.size)
    np.testing.assert_allclose(found.nearest, -every.min(1), rtol=1e-5)
    np.testing.assert_allclose(found.pairwise, -every.min(1) / np.median(every, 1), rtol=1e-5)
    edge = np.sort(every.ravel())[pairs - 2 : pairs + 2]
    assert edge[0] * (1 - 1e-5) <= found.radius <= edge[-1] * (1 + 1e-5)
    assert found.distribution.sum() == pytest.approx(pairs, abs=1)
    assert np.abs(found.distribution - (every <= found.radius).sum(1)).sum() <= 1
    np.testing.assert_allclose(pairwise_scores(candidates, synthetic), found.pairwise)
    np.testing.assert_allclose(pairwise_scores(candidates, synthetic, "min"), found.nearest)
    np.testing.assert_array_equal(distribution_scores(candidates, synthetic, share), found.distribution)


def test_a_copier_is_found_and_an_honest_generator_is_not():
    real = [phantoms.grey28(n=150, seed=seed).image_set.images for seed in (1, 2, 3)]
    members, non_members, fresh = real
    noise = np.random.default_rng(0).normal(0, 3, members.shape)
    copier = np.clip(members.astype(float) + noise, 0, 255).round().astype(np.uint8)
    candidates = np.concatenate([members, non_members])
    for synthetic, leaks in ((copier, True), (fresh, False)):
        found = distance_attacks(candidates, synthetic, 0.01)
        pairwise = attack_result("pairwise", found.pairwise[:150], found.pairwise[150:])
        assert pairwise.finds_leak is leaks
        assert leaks or pairwise.low <= 0.5 <= pairwise.high
        distribution = attack_result("distribution", found.distribution[:150], found.distribution[150:])
        assert leaks or distribution.low <= 0.5 <= distribution.high
    assert pairwise_scores(members[:50], members).max() == 0


@given(
    st.lists(st.tuples(st.integers(0, 6), st.sampled_from(ORIGINS)), min_size=2, max_size=40),
    st.integers(1, 40),
    st.randoms(use_true_random=False),
)
def test_a_cut_off_does_not_depend_on_the_order_of_storage(candidates, k, random):
    k = min(k, len(candidates))
    shuffled = random.sample(candidates, len(candidates))
    cuts = [cut_off(*(list(column) for column in zip(*rows)), k) for rows in (candidates, shuffled)]
    assert sum(cuts[0].counts.values()) == pytest.approx(k)
    assert cuts[0].counts == pytest.approx(cuts[1].counts)
    assert all(0 <= cuts[0].counts[o] <= cuts[0].sizes[o] + 1e-9 for o in ORIGINS)


def test_ties_count_as_a_random_choice_does():
    scores, origins = np.array([5, 3, 3, 3, 3, 1.0]), np.array(["val", "train", "train", "train", "test", "train"])
    expected = {"train": 2 * 3 / 4, "val": 1.0, "test": 2 / 4}
    assert cut_off(scores, origins, 3).counts == pytest.approx(expected)
    rng = np.random.default_rng(0)
    drawn = [origins[np.lexsort([rng.random(6), -scores])][:3] for _ in range(4000)]
    assert np.mean([(d == "train").sum() for d in drawn]) == pytest.approx(expected["train"], abs=0.05)


def test_cut_off_is_exact_and_the_curve_holds_it():
    rng = np.random.default_rng(1)
    scores, origins = rng.normal(size=90), np.repeat(ORIGINS, 30)
    curve = cut_off_curve(scores, origins)
    np.testing.assert_array_equal(curve["k"], np.arange(5, 91))
    for k in (5, 50, 90):
        chosen = origins[np.argsort(-scores)[:k]]
        counts = cut_off(scores, origins, k).counts
        assert counts == {o: (chosen == o).sum() for o in ORIGINS}
        i = k - 5
        assert curve["share"][i] == counts["train"] / (counts["train"] + counts["val"])
        assert curve["low"][i] < curve["share"][i] < curve["high"][i]
    assert curve["share"][-1] == curve["chance"] == 0.5


def test_a_curve_without_either_origin_is_not_a_number():
    curve = cut_off_curve([3, 2, 1.0], ["test", "train", "val"], cut_offs=[1, 2])
    np.testing.assert_array_equal(curve["share"], [np.nan, 1.0])


def test_the_p_value_is_fishers_and_honest_where_nothing_leaks():
    rng = np.random.default_rng(2)
    origins = np.repeat(ORIGINS, list(SIZES.values()))
    attacks = []
    for _ in range(300):
        cut = cut_off(rng.normal(size=1000), origins, 50)
        attacks.append(cut_off_attack(cut))
        table = [[cut.counts[o], SIZES[o] - cut.counts[o]] for o in ("train", "val")]
        assert attacks[-1].p_value == pytest.approx(fisher_exact(table, alternative="greater").pvalue)
    assert np.mean([a.p_value <= 0.05 for a in attacks]) <= 0.08
    assert np.mean([a.ratio_interval[0] <= 1 <= a.ratio_interval[1] for a in attacks]) >= 0.95


def test_the_papers_top_50_are_55_and_more_often_train_than_chance_allows():
    assert possible_cut_offs(TABLE_S1_AT_50.values(), range(40, 70)) == [55]  # list index 50 of a range from 5
    best = cut_off_attack(printed_cut_off(TABLE_S1_AT_50["distribution, pixels"], 55))
    assert best.share == pytest.approx(2 / 3, abs=0.01)  # "at best two thirds"
    assert (best.tpr, best.fpr) == pytest.approx((0.105, 0.054), abs=0.001)
    assert best.ratio_interval[0] < 1 < best.ratio_interval[1]
    assert best.p_value < 0.05
    everyone = cut_off_attack(printed_cut_off(TABLE_S1_AT_50["distribution, pixels"], 55), ("val", "test"))
    assert everyone.fpr == pytest.approx(0.030, abs=0.001)
    with pytest.raises(ValueError, match=r"give 49 candidates, not 50"):
        printed_cut_off(TABLE_S1_AT_50["pairwise, pixels"], 50)


def test_roc_points_are_scikit_learns():
    rng = np.random.default_rng(3)
    members, non_members = rng.integers(0, 9, 40), rng.integers(0, 7, 50)
    expected = roc_curve(np.repeat([1, 0], [40, 50]), np.concatenate([members, non_members]), drop_intermediate=False)
    fpr, tpr = roc_points(members, non_members)
    np.testing.assert_allclose([fpr, tpr], expected[:2])
    assert np.trapezoid(tpr, fpr) == pytest.approx(auc(members, non_members))


def mean_shares(panels, k):
    return np.mean([list(cut_off(p.scores, p.origins, k).shares.values()) for p in panels], 0)


def test_the_pairwise_toy_gives_the_printed_top_50_and_the_measured_top_333():
    published, sampled = ([toy_pairwise(seed, which) for seed in range(20)] for which in ("all", "sampled"))
    np.testing.assert_allclose(mean_shares(published, 50), (1, 0, 0), atol=0.002)
    np.testing.assert_allclose(mean_shares(published, 333), (0.999, 0, 0.001), atol=0.004)
    np.testing.assert_allclose(mean_shares(sampled, 333), (0.92, 0.03, 0.05), atol=0.01)
    assert [len(p.scores) for p in (published[0], sampled[0])] == [1500, 1000]


def test_the_raw_pairwise_toy_parts_from_its_reference():
    toy, reference = toy_pairwise(0, raw=True), toy_reference(0)
    train, test = (np.median(toy.distances[toy.origins == o]) for o in ("train", "test"))
    assert train < 0.65 * np.median(reference)
    assert test == pytest.approx(np.median(reference), rel=0.05)


@pytest.mark.parametrize(
    ("permuted", "kept", "top_50", "top_333", "nearest"),
    [
        ("features", "largest", (0.94, 0.06, 0), (0.92, 0.07, 0.01), None),
        ("features", "any", None, (0.76, 0.17, 0.07), (8.2, 9.1, 9.6)),
        ("samples", "largest", (0.94, 0.06, 0), (0.92, 0.07, 0.01), None),
        ("samples", "any", None, (0.76, 0.17, 0.07), (1.2, 5.0, 6.1)),
    ],
)
def test_the_distribution_toy_gives_the_measured_shares(permuted, kept, top_50, top_333, nearest):
    panels = [toy_distribution(seed, permuted, kept) for seed in range(2)]
    np.testing.assert_allclose(mean_shares(panels, 333), top_333, atol=0.05)
    if top_50:
        np.testing.assert_allclose(mean_shares(panels, 50), top_50, atol=0.08)
    if nearest:
        found = [[np.median(p.distances[p.origins == o]) for o in ORIGINS] for p in panels]
        np.testing.assert_allclose(np.mean(found, 0), nearest, atol=0.2)


def test_bad_input_gets_a_sentence():
    with pytest.raises(ValueError, match="must lie between 1 and the 2 candidates"):
        cut_off([1.0, 2.0], ["train", "val"], 3)
    with pytest.raises(ValueError, match="'site B' is none of them"):
        cut_off([1.0, 2.0], ["train", "site B"], 1)
    with pytest.raises(ValueError, match="each score needs its origin"):
        cut_off([1.0, 2.0], ["train"], 1)
    with pytest.raises(ValueError, match="1 scores are not a number"):
        cut_off([1.0, np.nan], ["train", "val"], 1)
    with pytest.raises(ValueError, match="only with candidates of train and of val"):
        cut_off_attack(cut_off([1.0, 2.0], ["train", "test"], 1))
    with pytest.raises(ValueError, match="are they all one image"):
        pairwise_scores(np.ones((2, 3)), np.ones((4, 3)))
    with pytest.raises(ValueError, match='"min_over_median" or "min"'):
        pairwise_scores(np.ones((2, 3)), np.ones((4, 3)), "mean")
    with pytest.raises(ValueError, match="kept"):
        toy_distribution(0, kept="some")
    with pytest.raises(ValueError, match="candidates must be"):
        toy_pairwise(0, "some")
