"""The harmonised score: anchors, properties that hold for all models, slow twins of front and volume."""

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lookalike.metrics.intervals import over_seeds
from lookalike.metrics.tradeoff import (
    DIMENSIONS,
    Scale,
    desirability,
    harmonised,
    hidden_score,
    hypervolume,
    pareto_front,
    scored,
    weight_grid,
    weighted_scores,
    win_share,
    winners,
)

SCALES = {
    "fidelity": {"frechet": Scale(worst=90, best=5), "recall": Scale(worst=0, best=0.8)},
    "use": {"accuracy": Scale(worst=0.1, best=0.9)},
    "privacy": {"tpr": Scale(worst=1, best=0.01)},
}
FLAT = {name: scale for of_dimension in SCALES.values() for name, scale in of_dimension.items()}
numbers = st.floats(-100, 100)
unit = st.floats(0, 1)
weight_rows = st.tuples(unit, unit, unit).filter(lambda row: sum(row) > 0.01)
anchors = st.tuples(numbers, numbers).filter(lambda pair: abs(pair[0] - pair[1]) > 0.1)
some_values = st.fixed_dictionaries({"frechet": numbers, "recall": unit, "accuracy": unit, "tpr": unit})
models_seed = st.integers(0, 1000)
by_dimension = weight_rows.map(lambda row: dict(zip(DIMENSIONS, row)))


def models(n=6, seed=0):
    """Dimensions (n, 3) in [0, 1], without ties."""
    return np.random.default_rng(seed).uniform(0.05, 1, (n, 3))


def row(family, sigma, seed, frechet=30.0, recall=0.5, accuracy=0.5, tpr=0.2):
    return dict(family=family, sigma=sigma, seed=seed, frechet=frechet, recall=recall, accuracy=accuracy, tpr=tpr)


# One metric


@pytest.mark.parametrize("scale", [Scale(90, 5), Scale(0.1, 0.9)])
def test_anchors_are_0_and_1_and_beyond_them_nothing_changes(scale):
    middle, over = (scale.worst + scale.best) / 2, scale.best - scale.worst
    values = [scale.worst - over, scale.worst, middle, scale.best, scale.best + over, over * np.inf, -over * np.inf]
    np.testing.assert_allclose(desirability(values, scale), [0, 0, 0.5, 1, 1, 1, 0])
    assert float(desirability(middle, scale)) == pytest.approx(0.5)


@given(numbers, numbers, anchors)
def test_nearer_to_the_better_anchor_is_never_less_desirable(a, b, ends):
    scale = Scale(*ends)
    worse, better = sorted((a, b), reverse=scale.best < scale.worst)
    assert desirability(worse, scale) <= desirability(better, scale)


@given(numbers, anchors, numbers, st.floats(0.01, 100), st.sampled_from([1, -1]))
def test_another_unit_of_metric_and_anchors_changes_nothing(value, ends, shift, factor, sign):
    def moved(x):
        return sign * factor * x + shift

    assert desirability(moved(value), Scale(*map(moved, ends))) == pytest.approx(
        desirability(value, Scale(*ends)), abs=1e-8
    )


@pytest.mark.parametrize("ends", [(1.0, 1.0), (np.nan, 1.0), (0.0, np.inf)])
def test_anchors_that_span_nothing_are_refused(ends):
    with pytest.raises(ValueError, match="nchors"):
        Scale(*ends)


@pytest.mark.parametrize("value", [np.nan, None, [0.5, np.nan]])
def test_a_value_that_is_not_a_number_is_refused(value):
    with pytest.raises(ValueError, match="not a number"):
        desirability(value, Scale(0, 1))


# The score


def test_the_score_by_hand():
    values = {"frechet": 47.5, "recall": 0.2, "accuracy": 0.3, "tpr": 0.01, "psnr": 9.0}
    found = harmonised(values, SCALES, {"fidelity": 2, "use": 1, "privacy": 1})
    assert found.dimensions == pytest.approx({"fidelity": (0.5 + 0.25) / 2, "use": 0.25, "privacy": 1})
    assert found.weights == {"fidelity": 0.5, "use": 0.25, "privacy": 0.25}
    assert found.score == pytest.approx(0.375**0.5 * 0.25**0.25)


def test_real_images_score_1_and_worthless_ones_0():
    best = harmonised({name: scale.best for name, scale in FLAT.items()}, SCALES)
    worst = harmonised({name: scale.worst for name, scale in FLAT.items()}, SCALES)
    assert (best.score, worst.score) == (1, 0)


@given(some_values, by_dimension, st.floats(0.1, 50))
def test_weights_count_relative_to_each_other_and_are_shown_so(values, weights, factor):
    found = harmonised(values, SCALES, weights)
    assert sum(found.weights.values()) == pytest.approx(1)
    larger = harmonised(values, SCALES, {name: factor * weight for name, weight in weights.items()})
    assert larger.score == pytest.approx(found.score, abs=1e-9)
    assert larger.weights == pytest.approx(found.weights)


@given(some_values, by_dimension, st.sampled_from(sorted(FLAT)), st.floats(0, 100))
def test_no_metric_can_raise_the_score_by_getting_worse(values, weights, metric, by):
    scale = FLAT[metric]
    worse = values | {metric: values[metric] + np.sign(scale.worst - scale.best) * by}
    assert harmonised(worse, SCALES, weights).score <= harmonised(values, SCALES, weights).score + 1e-12


@given(models_seed, weight_rows, st.integers(0, 2), unit)
def test_no_dimension_can_raise_the_score_by_getting_worse(seed, weights, dimension, share):
    table = models(seed=seed)
    worse = table.copy()
    worse[:, dimension] *= share
    assert (weighted_scores(worse, [weights]) <= weighted_scores(table, [weights]) + 1e-12).all()


@given(weight_rows)
def test_a_dimension_at_0_is_a_veto_if_it_has_a_weight(weights):
    table = 1 - np.eye(3)
    vetoed = np.array(weights) > 0
    np.testing.assert_array_equal(weighted_scores(table, [weights])[0] == 0, vetoed)


@given(models_seed, weight_rows)
def test_the_score_lies_between_the_worst_and_the_best_dimension(seed, weights):
    table = models(seed=seed)
    found = weighted_scores(table, [weights])[0]
    assert (found >= table.min(1) - 1e-12).all()
    assert (found <= table.max(1) + 1e-12).all()


def test_what_cannot_be_scored_is_refused():
    values = {name: scale.best for name, scale in FLAT.items()}
    with pytest.raises(ValueError, match="each of fidelity, use, privacy"):
        harmonised(values, {name: SCALES[name] for name in ("fidelity", "use")})
    with pytest.raises(ValueError, match="no value for tpr"):
        harmonised({name: value for name, value in values.items() if name != "tpr"}, SCALES)
    with pytest.raises(ValueError, match="weight is needed for each"):
        harmonised(values, SCALES, {"fidelity": 1})
    for wrong in (0, -1, np.nan, np.inf):
        with pytest.raises(ValueError, match="at least one is positive"):
            harmonised(values, SCALES, {"fidelity": wrong, "use": 0, "privacy": 0})
        with pytest.raises(ValueError, match="at least one of each row"):
            winners(models(), [[wrong, 0, 0]])
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        winners([[0.5, 0.5, 1.2]], [[1, 1, 1]])


# Over all weights


@pytest.mark.parametrize("step", [1, 0.5, 0.1, 1 / 3, 1 / 7])
def test_the_grid_holds_every_weight_once(step):
    grid, n = weight_grid(step), round(1 / step)
    every = {row for row in product(range(n + 1), repeat=3) if sum(row) == n}
    assert {tuple(row) for row in np.rint(grid * n).astype(int)} == every
    assert len(grid) == len(every) == (n + 1) * (n + 2) // 2
    np.testing.assert_allclose(grid.sum(1), 1)


@pytest.mark.parametrize("step", [0, -0.5, 0.3, 2])
def test_a_step_that_does_not_divide_1_is_refused(step):
    with pytest.raises(ValueError, match="one over a whole number"):
        weight_grid(step)


@given(models_seed)
def test_a_corner_is_won_by_the_best_of_its_dimension(seed):
    table = models(seed=seed)
    np.testing.assert_array_equal(winners(table, np.eye(3)), table.argmax(0))


@given(models_seed)
def test_winners_are_those_of_a_loop(seed):
    table, grid = models(seed=seed), weight_grid(0.25)
    slow = [max(range(len(table)), key=lambda i: sum(w * np.log(x) for w, x in zip(ws, table[i]))) for ws in grid]
    np.testing.assert_array_equal(winners(table, grid), slow)


def test_nobody_wins_a_tie_or_with_nothing():
    equal_weights = [[1, 1, 1]]
    assert winners([[0.5, 0.5, 0.5], [0.25, 1, 0.5]], equal_weights) == -1
    assert winners([[0, 1, 1], [1, 0, 1]], equal_weights) == -1
    assert winners([[0, 1, 1], [1, 0.1, 1]], equal_weights) == 1
    assert winners([[0.5, 0.5, 0.5]], equal_weights) == 0


@given(models_seed, st.permutations(range(6)))
def test_the_order_of_the_models_does_not_matter(seed, order):
    table, grid, order = models(seed=seed), weight_grid(0.2), np.array(order)
    np.testing.assert_array_equal(order[winners(table[order], grid)], winners(table, grid))
    np.testing.assert_array_equal(pareto_front(table[order]), pareto_front(table)[order])
    assert hypervolume(table[order]) == pytest.approx(hypervolume(table))


@given(models_seed)
def test_whoever_wins_under_some_weight_is_on_the_front(seed):
    table = models(seed=seed)
    interior = [weights for weights in weight_grid(0.1) if weights.min() > 0]
    assert pareto_front(table)[winners(table, interior)].all()


# Front and volume


def beaten(points, i):
    return any(
        all(a >= b for a, b in zip(other, points[i])) and any(a > b for a, b in zip(other, points[i]))
        for other in points
    )


@given(st.lists(st.tuples(*[st.integers(0, 3)] * 3), min_size=1, max_size=8))
def test_the_front_is_that_of_a_loop(points):  # few values: many ties and equal points
    assert pareto_front(points).tolist() == [not beaten(points, i) for i in range(len(points))]


def by_inclusion_and_exclusion(points):
    """The volume of the union of boxes from 0, from all their intersections."""
    sets = (some for size in range(1, len(points) + 1) for some in combinations(points, size))
    return sum((-1) ** (len(some) + 1) * np.prod(np.min(some, axis=0)) for some in sets)


@pytest.mark.parametrize("dim", [2, 3])
@given(seed=models_seed, n=st.integers(1, 6))
def test_the_volume_is_that_of_all_intersections(dim, seed, n):
    points = np.random.default_rng(seed).integers(0, 5, (n, dim)) / 4
    assert hypervolume(points) == pytest.approx(by_inclusion_and_exclusion(points))


@pytest.mark.parametrize("dim", [2, 3])
def test_the_volume_meets_a_count_of_random_points(dim):
    rng = np.random.default_rng(0)
    points, drawn = rng.uniform(size=(20, dim)), rng.uniform(size=(40_000, dim))
    covered = (drawn[:, None] <= points).all(-1).any(1).mean()
    assert hypervolume(points) == pytest.approx(covered, abs=4 * 0.5 / np.sqrt(len(drawn)))


def test_the_volume_by_hand():
    stairs = [[1, 3], [2, 2], [3, 1]]
    assert hypervolume(stairs) == 6
    assert hypervolume(stairs, reference=1) == 1
    assert hypervolume(stairs, reference=[0, 2]) == 1
    assert hypervolume([[2, 3, 4], [1, 1, 1]]) == 24
    assert hypervolume([[-1, 5], [5, 0]]) == 0


@given(models_seed)
def test_only_the_front_has_volume(seed):
    table = models(8, seed)
    assert hypervolume(table[pareto_front(table)]) == pytest.approx(hypervolume(table))


@pytest.mark.parametrize("points", [[1.0, 2.0], [[1.0, np.nan]]])
def test_points_that_are_none_are_refused(points):
    for function in (pareto_front, hypervolume):
        with pytest.raises(ValueError, match="finite numbers"):
            function(points)


# Over seeds


def test_every_seed_is_scored_alone_and_the_interval_is_student_s():
    rows = [row("vae", 0.1, s, accuracy=a) for s, a in enumerate([0.3, 0.5, 0.7])] + [row("gan", 0.1, 0)]
    first, second = scored(rows, SCALES)
    alone = [harmonised(one, SCALES).score for one in rows]
    assert {key: first[key] for key in ("value", "low", "high", "n")} == over_seeds(alone[:3], 0.9)
    assert first["use"] == pytest.approx(0.5)
    assert (second["family"], second["value"], second["low"], second["n"]) == ("gan", alone[3], None, 1)


def test_an_interval_stays_within_0_and_1_and_no_width_is_none():
    wide = scored([row("vae", 0, s, accuracy=a) for s, a in enumerate([0.1, 0.1, 0.9])], SCALES)[0]
    assert (wide["low"], wide["high"]) == (0, 1)
    same = scored([row("vae", 0, s) for s in range(3)], SCALES)[0]
    assert (same["low"], same["high"]) == (None, None)
    assert "all seeds score the same" in same["note"]


def test_a_seed_counts_once():
    with pytest.raises(ValueError, match="two rows"):
        scored([row("vae", 0, 1), row("vae", 0, 1)], SCALES)


def test_win_shares_meet_every_resample():
    accuracies = {"vae": [0.9, 0.2, 0.3], "gan": [0.5, 0.5, 0.4], "ddpm": [0.1, 0.1, 0.1]}
    rows = [row(name, 0.1, s, accuracy=a) for name, values in accuracies.items() for s, a in enumerate(values)]
    scores = {name: [harmonised(r, SCALES).score for r in rows if r["family"] == name] for name in accuracies}
    draws = list(product(range(3), repeat=3))
    best = [max(scores, key=lambda name: sum(scores[name][s] for s in draw)) for draw in draws]
    found = win_share(rows, SCALES, resamples=4000)
    for name in accuracies:
        assert found[name, 0.1] == pytest.approx(best.count(name) / len(draws), abs=4 * 0.5 / np.sqrt(4000))
    assert found["ddpm", 0.1] == found[None] == 0
    assert sum(found.values()) == pytest.approx(1)
    backwards = win_share(rows[::-1], SCALES, resamples=4000)
    assert backwards == pytest.approx(found)


def test_nobody_wins_where_all_are_worthless():
    rows = [row(name, 0, s, accuracy=0.1) for name in ("vae", "gan") for s in range(2)]
    assert win_share(rows, SCALES)[None] == 1


def test_win_shares_need_the_same_seeds():
    for rows in ([], [row("vae", 0, 0), row("gan", 0, 0)], [row("vae", 0, s) for s in (0, 1)] + [row("gan", 0, 0)]):
        with pytest.raises(ValueError, match="the same seeds, two or more"):
            win_share(rows, SCALES)


# The score in the authors' code


def test_the_hidden_score_is_accuracy_over_the_leak():
    assert hidden_score(50, 2) == 25
    assert hidden_score(50, 0.1) == hidden_score(50, 0) == 500
    with pytest.raises(ValueError, match="0 to 100"):
        hidden_score(120, 1)
    with pytest.raises(ValueError, match="not a number"):
        hidden_score(50, np.nan)


def test_the_hidden_score_has_no_end_but_its_floor_and_the_floor_decides():
    exact, small_leak = (60, 0.3), (30, 0.05)
    assert hidden_score(*small_leak) > hidden_score(*exact)
    assert hidden_score(*small_leak, floor=0.2) < hidden_score(*exact, floor=0.2)
    assert hidden_score(30, 1e-6, floor=1e-6) == pytest.approx(3e7)


def test_the_hidden_score_takes_copies_and_samples_that_avoid_the_query_for_the_same():
    assert hidden_score(50, 2.0) == hidden_score(50, -2.0)


def test_the_hidden_score_prefers_noise_to_a_good_model_with_a_small_leak():
    noise, good = hidden_score(10, 0.02), hidden_score(90, 1.0)
    assert noise == 10 * 10
    assert noise > good
    worthless = row("noise", 1, 0, frechet=90, recall=0, accuracy=0.1, tpr=0.01)
    useful = row("good", 1, 0, frechet=20, recall=0.6, accuracy=0.8, tpr=0.1)
    assert harmonised(worthless, SCALES).score == 0 < harmonised(useful, SCALES).score
