"""The audit's bounds: below the truth as often as they promise, and close to it."""

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, linprog
from scipy.special import log_ndtr
from scipy.stats import binom, norm

from lookalike.privacy import bounds
from lookalike.privacy.bounds import (
    LowerBound,
    contradicts,
    epsilon_from_errors,
    lower_bound,
    mu_from_errors,
    one_run_bound,
    one_run_epsilon,
    one_run_mu,
    strongest_refuted,
)

DELTA = 1e-5
SIMULATIONS = 500
LEAST_COVERED = SIMULATIONS * 0.95 - 3 * math.sqrt(SIMULATIONS * 0.95 * 0.05)


def true_epsilon(mu, delta=DELTA):
    """Balle and Wang 2018, written out again: the audit must not be checked with its own accountant."""
    excess = lambda e: norm.cdf(mu / 2 - e / mu) - np.exp(e + log_ndtr(-mu / 2 - e / mu)) - delta  # noqa: E731
    return brentq(excess, 0, 1000, xtol=1e-12)


def gaussian_scores(mu, n, seed):
    rng = np.random.default_rng(seed)
    return rng.normal(mu, 1, n), rng.normal(0, 1, n)


def gaussian_canaries(mu, n, seed):
    """One Gaussian mechanism whose canaries do not touch each other: mu-GDP for every one of them."""
    rng = np.random.default_rng(seed)
    included = rng.random(n) < 0.5
    return rng.normal(0, 1, n) + mu * included, included


# Tightness


@pytest.mark.parametrize("mu", [0.5, 1, 2])
def test_gaussian_bound_is_close_to_the_truth(mu):
    """FIELD.md asks for 20 %; a million trials of each kind give 5 %."""
    found = lower_bound(*gaussian_scores(mu, 10**6, 1), DELTA, method="gaussian").epsilon
    assert 0.95 * true_epsilon(mu) < found <= true_epsilon(mu)


@pytest.mark.parametrize(("mu", "reached"), [(0.5, 0.66), (1, 0.66), (2, 0.55)])
def test_clopper_pearson_bound_comes_near_what_counting_can_show(mu, reached):
    """At delta 1e-5 the threshold that shows epsilon has too few errors to count, even for who knows the best one."""
    found = lower_bound(*gaussian_scores(mu, 10**6, 1), DELTA).epsilon
    assert reached * true_epsilon(mu) < found <= true_epsilon(mu)
    assert found > 0.85 * oracle(mu, 10**6)


def oracle(mu, trials):
    """The same bound at the best of all thresholds, with error counts equal to their expectation, and no pilot."""
    thresholds = np.linspace(2, 6, 81)
    rates = [(norm.sf(t), norm.cdf(t - mu)) for t in thresholds]
    return max(epsilon_from_errors(fpr * trials, trials, fnr * trials, trials, DELTA) for fpr, fnr in rates)


def test_clopper_pearson_bound_is_within_a_fifth_at_a_larger_delta():
    found = lower_bound(*gaussian_scores(1, 10**6, 1), 1e-3).epsilon
    assert 0.8 * true_epsilon(1, 1e-3) < found <= true_epsilon(1, 1e-3)


@pytest.mark.parametrize(("fpr", "fnr"), [(0.01, 0.6), (0.3, 0.02)])
def test_many_trials_give_the_closed_form(fpr, fnr):
    n = 10**12
    epsilon = epsilon_from_errors(fpr * n, n, fnr * n, n, DELTA)
    assert epsilon == pytest.approx(max(math.log((1 - DELTA - fpr) / fnr), math.log((1 - DELTA - fnr) / fpr)), rel=1e-4)
    assert mu_from_errors(fpr * n, n, fnr * n, n) == pytest.approx(norm.isf(fpr) - norm.ppf(fnr), rel=1e-4)


def test_perfect_separation_gives_the_closed_form_of_no_errors():
    found = lower_bound(np.linspace(10, 11, 200), np.linspace(0, 1, 200), DELTA)
    counted = found.counts["trials_in"]
    rate = 1 - 0.025 ** (1 / counted)
    assert found.counts == {"false_positives": 0, "trials_out": counted, "false_negatives": 0, "trials_in": counted}
    assert counted == 160
    assert found.epsilon == pytest.approx(math.log((1 - DELTA - rate) / rate))


def test_the_better_direction_counts():
    """One direction has no misses to divide by, the other no false positives: exchanging the errors changes nothing."""
    assert epsilon_from_errors(0, 100, 60, 100, 0) == epsilon_from_errors(60, 100, 0, 100, 0) > 1


# Coverage


@pytest.mark.parametrize("method", ["clopper_pearson", "gaussian", "best"])
@pytest.mark.parametrize(("mu", "trials"), [(1, 300), (2, 40)])
def test_bound_lies_below_the_truth_as_often_as_promised(method, mu, trials):
    delta = 0.01  # here counting loses little to delta, so that a wrong level would show
    found = [
        lower_bound(*gaussian_scores(mu, trials, seed), delta, method=method).epsilon for seed in range(SIMULATIONS)
    ]
    assert np.sum(np.array(found) <= true_epsilon(mu, delta)) >= LEAST_COVERED
    assert np.mean(found) > 0.1


def test_counting_keeps_its_level_where_it_is_tight():
    """Randomised response: the bound has the truth as its limit, so a threshold picked on counted trials would show."""
    truth = math.log(3)
    found = []
    for seed in range(SIMULATIONS):
        rng = np.random.default_rng(seed)
        scores = (rng.random((2, 400)) < np.array([[0.75], [0.25]])) + 0.0
        found.append(lower_bound(scores[0], scores[1], 0).epsilon)
    assert np.sum(np.array(found) <= truth) >= LEAST_COVERED


def test_laplace_scores_keep_the_level_at_every_threshold():
    """Laplace noise shows its whole epsilon at a half line of thresholds: many to choose from, all tight."""
    found = []
    for seed in range(SIMULATIONS):
        rng = np.random.default_rng(seed)
        found.append(lower_bound(rng.laplace(1, 1, 1000), rng.laplace(0, 1, 1000), 0).epsilon)
    assert np.sum(np.array(found) <= 1) >= LEAST_COVERED
    assert np.mean(found) > 0.5


@cache
def cached_one_run_epsilon(*args):
    return one_run_epsilon(*args)


@cache
def cached_one_run_mu(*args):
    return one_run_mu(*args)


@pytest.fixture
def remembered(monkeypatch):
    """Hundreds of simulations hit the same few counts; work each out once."""
    monkeypatch.setattr(bounds, "one_run_epsilon", cached_one_run_epsilon)
    monkeypatch.setattr(bounds, "one_run_mu", cached_one_run_mu)


def test_one_run_is_exact_on_randomised_response(remembered):
    """Every canary's coin is told truly with probability 3/4: the miss is used up, not more and not much less."""
    found = []
    for seed in range(2000):
        rng = np.random.default_rng(seed)
        included = rng.random(200) < 0.5
        answers = np.where(rng.random(200) < 0.75, included, ~included)
        correct = int((answers == included).sum())
        found.append(cached_one_run_epsilon(correct, 200, 200, 0.0))
    covered = np.mean(np.array(found) <= math.log(3))
    expected = binom.cdf(binom.isf(0.05, 200, 0.75), 200, 0.75)  # just over 0.95: counts are whole numbers
    assert expected >= 0.95
    assert covered == pytest.approx(expected, abs=3 * math.sqrt(0.05 * 0.95 / 2000))


@pytest.mark.parametrize("method", ["one_run", "one_run_gaussian"])
@pytest.mark.parametrize("guesses", [None, 40])
def test_one_run_lies_below_the_truth_as_often_as_promised(method, guesses, remembered):
    delta, mu = 1e-4, 1
    found = [
        one_run_bound(*gaussian_canaries(mu, 100, seed), delta, guesses=guesses, method=method).epsilon
        for seed in range(SIMULATIONS)
    ]
    assert np.sum(np.array(found) <= true_epsilon(mu, delta)) >= LEAST_COVERED
    assert np.mean(found) > 0.2


def test_one_run_with_several_guess_counts_pays_for_them():
    scores, included = gaussian_canaries(2, 300, 0)
    split = [one_run_bound(scores, included, DELTA, 1 - 0.05 / 3, guesses=k).epsilon for k in (300, 90, 30)]
    assert one_run_bound(scores, included, DELTA).epsilon == pytest.approx(max(split))
    assert max(split) < max(one_run_bound(scores, included, DELTA, guesses=k).epsilon for k in (300, 90, 30))


def test_one_run_gaussian_is_the_tighter_one():
    for mu in (0.5, 1, 2):
        scores, included = gaussian_canaries(mu, 1000, 3)
        plain, gaussian = (
            one_run_bound(scores, included, DELTA, guesses=100, method=method).epsilon
            for method in ("one_run", "one_run_gaussian")
        )
        assert 0 < plain < gaussian <= true_epsilon(mu)
        assert gaussian > 0.25 * true_epsilon(mu)


def test_gaussian_bound_of_a_subsampled_step_lies_below_and_close():
    """Nasr et al.: with the family of the true mechanism, counts lead close to its noise; the plain Gaussian cannot."""
    mu, rate, n = 2.0, 0.3, 10**5

    def tradeoff(mu, fpr):
        return 1 - (1 - rate) * fpr - rate * norm.cdf(norm.ppf(fpr) + mu)

    covered = []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        sampled = rng.random(n) < rate
        false_positives = int((rng.normal(0, 1, n) > 1).sum())
        false_negatives = int((rng.normal(0, 1, n) + mu * sampled <= 1).sum())
        covered.append(strongest_refuted(tradeoff, false_positives, n, false_negatives, n, 0, 20))
    assert np.mean(np.array(covered) <= mu) >= 0.95 - 3 * math.sqrt(0.05 * 0.95 / 100)
    assert np.mean(covered) > 0.95 * mu


def test_family_of_gaussian_curves_gives_the_gaussian_mu():
    def tradeoff(mu, fpr):
        return norm.cdf(-norm.ppf(fpr) - mu)

    assert strongest_refuted(tradeoff, 30, 1000, 400, 1000, 0, 20) == pytest.approx(mu_from_errors(30, 1000, 400, 1000))
    assert strongest_refuted(tradeoff, 500, 1000, 500, 1000, 0, 20) == 0
    assert strongest_refuted(tradeoff, 30, 1000, 400, 1000, 0, 0.5) == 0.5


# No leak


def test_equal_laws_give_zero_nearly_always():
    rng = np.random.default_rng(0)
    runs = rng.normal(size=(200, 2, 100))
    for method in ("clopper_pearson", "gaussian", "best"):
        assert np.mean([lower_bound(a, b, DELTA, method=method).epsilon > 0 for a, b in runs]) < 0.1
    coins = rng.random((200, 100)) < 0.5
    assert np.mean([one_run_bound(run[0], coin, DELTA).epsilon > 0 for run, coin in zip(runs, coins)]) < 0.1


def test_constant_scores_give_zero():
    for method in ("clopper_pearson", "gaussian", "best"):
        assert lower_bound(np.ones(500), np.ones(500), DELTA, method=method).epsilon == 0
    sorted_coins = np.arange(100) < 50
    for method in ("one_run", "one_run_gaussian"):
        assert one_run_bound(np.ones(100), sorted_coins, DELTA, method=method).epsilon == 0


def test_scores_of_the_wrong_sign_show_nothing():
    scores_in, scores_out = gaussian_scores(3, 500, 0)
    assert lower_bound(scores_in, scores_out, DELTA).epsilon > 1
    assert lower_bound(-scores_in, -scores_out, DELTA).epsilon == 0


def test_sorted_scores_are_no_trap():
    """A pilot of the first trials would see perfect separation here, and put the threshold where nothing is."""
    scores_in, scores_out = (np.sort(scores) for scores in gaussian_scores(2, 5000, 0))
    assert lower_bound(scores_in[::-1], scores_out, DELTA, method="gaussian").epsilon > 0.85 * true_epsilon(2)


@pytest.mark.parametrize("method", ["clopper_pearson", "gaussian"])
def test_trials_that_are_counted_do_not_choose_the_rank(method):
    """Counted trials that part perfectly take all errors of one kind away, and leave the rank, the other kind."""
    scores_in, scores_out = gaussian_scores(1, 1000, 0)
    before = lower_bound(scores_in, scores_out, DELTA, method=method).counts
    _, counted = bounds._split(np.arange(1000), seed=1)
    scores_out[counted] -= 10
    after = lower_bound(scores_in, scores_out, DELTA, method=method).counts
    kinds = ("false_positives", "false_negatives")
    assert min(before[kind] for kind in kinds) > 0
    assert any(after[one] == before[one] and after[other] == 0 for one, other in (kinds, kinds[::-1]))


def test_a_leak_among_the_lowest_scores_is_found():
    """A tenth of the trials without the record give it away; no trial with the record does."""
    scores_in, scores_out = gaussian_scores(0, 1000, 0)
    scores_out[:100] -= 20
    found = lower_bound(scores_in, scores_out, DELTA)
    assert found.counts["false_negatives"] == 0
    assert found.epsilon > 2.5


def test_rate_of_errors_only_is_one():
    """A rounding step above 1 would make the Gaussian gain NaN, and NaN wins every argmax."""
    trials = np.arange(1, 10**5)
    assert bounds._wilson(trials, trials).max() == 1


# One run: independent values


def brute_force_p_value(m, r, v, epsilon, delta):
    """Steinke et al. 2023, appendix: sums of binomial terms in plain Python."""
    q = math.exp(epsilon) / (1 + math.exp(epsilon))
    term = [math.comb(r, k) * q**k * (1 - q) ** (r - k) for k in range(r + 1)]
    alpha = max((math.fsum(term[v - i : v]) / i for i in range(1, v + 1)), default=0)
    return math.fsum(term[v:]) + 2 * m * delta * alpha


@pytest.mark.parametrize(
    ("m", "r", "v", "delta"), [(100, 100, 80, 0), (100, 60, 50, 1e-4), (500, 90, 90, 1e-5), (50, 20, 16, 0.001)]
)
def test_one_run_epsilon_is_where_the_p_value_reaches_the_miss(m, r, v, delta):
    epsilon = brentq(lambda e: brute_force_p_value(m, r, v, e, delta) - 0.05, 0, 15, xtol=1e-12)
    assert one_run_epsilon(v, r, m, delta) == pytest.approx(epsilon, abs=1e-8)


def test_one_run_epsilon_of_no_error_has_a_closed_form():
    """q^r = 0.05 at delta 0."""
    q = 0.05 ** (1 / 50)
    assert one_run_epsilon(50, 50, 70, 0) == pytest.approx(math.log(q / (1 - q)))


@pytest.mark.parametrize(("m", "r", "v"), [(20, 20, 17), (30, 15, 13), (12, 12, 12)])
def test_one_run_mu_agrees_with_a_linear_program(m, r, v):
    """At the bound, the most that mu-GDP allows for P[at least v right] is the miss, 5 %.

    The program knows nothing of the recursion: its unknowns are the chances of i right guesses, its constraints the
    trade-off between right and wrong guesses at every i, a concave curve replaced by many tangents.
    """
    mu, right = one_run_mu(v, r, m), np.arange(r + 1)
    touch = norm.cdf(np.linspace(-5, 2, 120))  # where the tangents touch
    slope = norm.pdf(norm.ppf(touch) + mu) / norm.pdf(norm.ppf(touch))
    limits = np.tile(norm.cdf(norm.ppf(touch) + mu) - slope * touch, r)
    rows = np.concatenate(
        [right * (right >= i) / m - slope[:, None] * (r - right) * (right >= i - 1) / m for i in range(1, r + 1)]
    )
    answer = linprog(-(right >= v).astype(float), rows, limits, np.ones((1, r + 1)), [1], bounds=(0, 1))
    assert -answer.fun == pytest.approx(0.05, rel=5e-3)


def test_one_run_epsilon_moves_the_right_way():
    by_correct = [one_run_epsilon(v, 100, 200, DELTA) for v in range(101)]
    assert by_correct == sorted(by_correct)
    assert by_correct[50] == 0 < by_correct[70]
    by_delta = [one_run_epsilon(90, 100, 200, delta) for delta in (0, 1e-5, 1e-3, 1e-2)]
    assert by_delta[0] > by_delta[1] > by_delta[2] > by_delta[3]
    assert one_run_epsilon(90, 100, 200, DELTA, 0.9) > one_run_epsilon(90, 100, 200, DELTA, 0.99)
    assert one_run_mu(90, 100, 200, 0.9) > one_run_mu(90, 100, 200, 0.99) > one_run_mu(80, 100, 200, 0.99) > 0


def test_guesses_are_counted_from_both_ends():
    scores = np.arange(20.0)
    included = scores >= 9  # one more is in than out: the guess "out" at 9 is wrong if all are guessed
    assert one_run_bound(scores, included, 0, guesses=20).counts == {"canaries": 20, "guesses": 20, "correct": 19}
    assert one_run_bound(scores, included, 0, guesses=(11, 9)).counts["correct"] == 20
    assert one_run_bound(scores, included, 0, guesses=(3, 0)).counts == {"canaries": 20, "guesses": 3, "correct": 3}


# Properties


counts = st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@given(counts, counts, st.sampled_from([0.0, 1e-5, 0.3]), st.floats(0.51, 0.999))
def test_bound_falls_with_errors_delta_and_confidence(out, inside, delta, confidence):
    epsilon, mu = epsilon_from_errors(*out, *inside, delta, confidence), mu_from_errors(*out, *inside, confidence)
    assert 0 <= epsilon < math.inf
    assert 0 <= mu < math.inf
    more = (min(out[0] + 1, out[1]), out[1], *inside)
    assert epsilon_from_errors(*more, delta, confidence) <= epsilon
    assert mu_from_errors(*more, confidence) <= mu
    assert epsilon_from_errors(*out, *inside, delta + 0.1, confidence) <= epsilon
    assert epsilon_from_errors(*out, *inside, delta, (1 + confidence) / 2) <= epsilon


scores = st.lists(st.integers(-20, 20), min_size=10, max_size=60).map(lambda values: np.array(values, dtype=float))


@given(scores, scores, st.sampled_from(["clopper_pearson", "gaussian", "best"]))
def test_only_the_order_of_the_scores_matters(scores_in, scores_out, method):
    found = lower_bound(scores_in + 5, scores_out, DELTA, method=method)
    moved = lower_bound(np.exp((scores_in + 5) / 3) - 7, np.exp(scores_out / 3) - 7, DELTA, method=method)
    assert 0 <= found.epsilon < math.inf
    assert replace(moved, threshold=0) == replace(found, threshold=0)
    assert moved.threshold == pytest.approx(np.exp(found.threshold / 3) - 7)


@settings(max_examples=50)
@given(scores, st.integers(0, 2**32 - 1), st.sampled_from(["one_run", "one_run_gaussian"]))
def test_one_run_only_the_order_of_the_scores_matters(canary_scores, seed, method):
    included = np.random.default_rng(seed).random(len(canary_scores)) < 0.5
    included[:2] = True, False
    found = one_run_bound(canary_scores, included, DELTA, method=method)
    assert 0 <= found.epsilon < math.inf
    assert one_run_bound(canary_scores**3, included, DELTA, method=method) == found


@given(st.integers(1, 80).flatmap(lambda r: st.tuples(st.integers(0, r), st.just(r), st.integers(r, 160))))
@settings(max_examples=50)
def test_one_run_is_never_negative_and_never_nan(guessed):
    assert 0 <= one_run_epsilon(*guessed, DELTA) < math.inf
    assert 0 <= one_run_mu(*guessed) < math.inf


# What the result says


def test_result_says_what_it_rests_on():
    scores_in, scores_out = gaussian_scores(2, 1000, 0)
    plain = lower_bound(scores_in, scores_out, DELTA, 0.9)
    assert (plain.delta, plain.confidence, plain.method) == (DELTA, 0.9, "clopper_pearson")
    assert "Gaussian" not in plain.assumption
    best = lower_bound(scores_in, scores_out, DELTA, 0.9, "best")
    assert (best.confidence, best.method) == (0.9, "best: gaussian")
    assert "Gaussian" in best.assumption
    assert best.epsilon == lower_bound(scores_in, scores_out, DELTA, 0.95, "gaussian").epsilon
    assert "coin" in one_run_bound(*gaussian_canaries(2, 100, 0), DELTA).assumption


def test_counts_belong_to_the_threshold():
    """With distinct scores, the errors of the trials that were counted and of the pilot add up to all errors."""
    scores_in, scores_out = gaussian_scores(1, 1000, 0)
    found = lower_bound(scores_in, scores_out, DELTA, method="gaussian")
    pilot = 1000 - found.counts["trials_in"]
    false_positives, false_negatives = (scores_out > found.threshold).sum(), (scores_in < found.threshold).sum()
    assert 0 <= false_positives - found.counts["false_positives"] <= pilot
    assert 0 <= false_negatives - found.counts["false_negatives"] <= pilot


def test_contradiction_needs_a_bound_above_the_accountant():
    found = LowerBound(2.0, DELTA, 0.95, "clopper_pearson", "", {})
    assert contradicts(1.9, found)
    assert not contradicts(2.0, found)
    assert not contradicts(math.inf, found)
    with pytest.raises(ValueError, match="NaN"):
        contradicts(math.nan, found)


# Refusals


GOOD = np.arange(20.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lower_bound(GOOD[:9], GOOD, 0), "scores_in holds 9 scores"),
        (lambda: lower_bound(GOOD, GOOD[:9], 0), "scores_out holds 9 scores"),
        (lambda: lower_bound(GOOD, np.full(20, np.nan), 0), "scores_out holds NaN"),
        (lambda: lower_bound(GOOD, GOOD, 1.0), "delta must lie"),
        (lambda: lower_bound(GOOD, GOOD, -1e-9), "delta must lie"),
        (lambda: lower_bound(GOOD, GOOD, math.nan), "delta must lie"),
        (lambda: lower_bound(GOOD, GOOD, 0, 0.5), "confidence must lie"),
        (lambda: lower_bound(GOOD, GOOD, 0, 1.0), "confidence must lie"),
        (lambda: lower_bound(GOOD, GOOD, 0, method="bayes"), "method is"),
        (lambda: lower_bound(GOOD, GOOD, 0, method="gaussian"), "no finite epsilon at delta 0"),
        (lambda: lower_bound(GOOD, GOOD, 0, method="best"), "no finite epsilon at delta 0"),
        (lambda: epsilon_from_errors(5, 4, 0, 4, 0), "5 errors in 4 trials"),
        (lambda: epsilon_from_errors(0, 0, 0, 4, 0), "0 errors in 0 trials"),
        (lambda: mu_from_errors(0, 4, -1, 4), "-1 errors in 4 trials"),
        (lambda: one_run_epsilon(5, 4, 10, 0), "5 correct of 4 guesses"),
        (lambda: one_run_epsilon(4, 11, 10, 0), "4 correct of 11 guesses on 10"),
        (lambda: one_run_mu(0, 0, 10), "0 correct of 0 guesses"),
        (lambda: one_run_bound(GOOD, GOOD > 5, 1.0), "delta must lie"),
        (lambda: one_run_bound(GOOD, GOOD > 5, 0, method="bayes"), "method is"),
        (lambda: one_run_bound(GOOD, GOOD > 5, 0, method="one_run_gaussian"), "no finite epsilon at delta 0"),
        (lambda: one_run_bound(GOOD, GOOD[:19] > 5, 0), "20 scores and 19 entries"),
        (lambda: one_run_bound(GOOD, GOOD > -1, 0), "All canaries are on one side"),
        (lambda: one_run_bound(GOOD * np.nan, GOOD > 5, 0), "scores holds NaN"),
        (lambda: one_run_bound(GOOD, GOOD > 5, 0, guesses=21), "guesses is 21"),
        (lambda: one_run_bound(GOOD, GOOD > 5, 0, guesses=0), "guesses is 0"),
        (lambda: one_run_bound(GOOD, GOOD > 5, 0, guesses=(-1, 5)), "guesses is"),
    ],
)
def test_refuses_with_a_sentence(call, message):
    with pytest.raises(ValueError, match=message) as refusal:
        call()
    assert str(refusal.value).endswith((".", ")"))
