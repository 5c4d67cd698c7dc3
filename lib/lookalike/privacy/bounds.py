"""Statistics of a privacy audit: from scores to a lower bound on epsilon that holds with stated confidence.

Larger scores mean "the record was in". Papers: Jagielski et al. 2020 and Nasr et al. 2021 (counted errors); Nasr et al.
2023, "Tight Auditing of Differentially Private Machine Learning" (trade-off curves); Steinke, Nasr, Jagielski 2023,
"Privacy Auditing with One (1) Training Run"; Mahloujifar, Melis, Chaudhuri 2025, "Auditing f-Differential Privacy in
One Run". Chapter: no_free_lunch.

The threshold is an order statistic, not a number: a pilot share of the trials picks a rank, the score of that rank
among the remaining trials is the threshold. The error rate above an order statistic of n scores has the same law
whatever the scores are, so the bound is exact, uses no further split and ignores monotone changes of the scores.
"""

from dataclasses import dataclass, replace

import numpy as np
from scipy.special import expit, ndtr, ndtri
from scipy.stats import binom

from lookalike.metrics.intervals import clopper_pearson

MIN_TRIALS = 10
PILOT_SHARE = 0.2  # 0.1 to 0.5 tried on Gaussian scores: less picks poor ranks, more leaves too few trials to count
PILOT_Z = 3.0  # cautious on purpose: the best of many pilot ranks looks better than it is
GUESS_SHARES = (1.0, 0.3, 0.1)  # one run: tried when the number of guesses is not given, each at a third of the miss

ASSUMPTIONS = {
    "clopper_pearson": "The trials are independent of one another.",
    "gaussian": "The trials are independent, and the mechanism's trade-off curve is a Gaussian one "
    "(exact for the Gaussian mechanism, a limit for many subsampled steps).",
    "one_run": "Each canary was in or out by its own fair coin.",
    "one_run_gaussian": "Each canary was in or out by its own fair coin, and the mechanism's trade-off curve is a "
    "Gaussian one (exact for the Gaussian mechanism, a limit for many subsampled steps).",
}


@dataclass(frozen=True)
class LowerBound:
    """`epsilon` >= 0, below the true epsilon at `delta` with a probability of at least `confidence`.

    assumption: what must hold for that, in one sentence. counts: trials_in, trials_out, false_positives,
    false_negatives of the trials that were counted, or canaries, guesses, correct for one run. threshold: the score
    that parts "in" from "out"; equal scores go to the group that it was taken from. None for one run.
    """

    epsilon: float
    delta: float
    confidence: float
    method: str
    assumption: str
    counts: dict
    threshold: float | None = None


def contradicts(upper, lower):
    """True if the audit's `lower` bound passes the accountant's `upper` epsilon at the same delta."""
    if np.isnan(upper):
        raise ValueError("The accounted epsilon is NaN, so nothing can contradict it; repair the accounting first.")
    return bool(lower.epsilon > upper)


# Many runs: counted errors


def epsilon_from_errors(false_positives, trials_out, false_negatives, trials_in, delta, confidence=0.95):
    """Lower bound on epsilon from counted errors at a threshold fixed in advance; 0 if they show nothing.

    Exact (Clopper-Pearson) upper bounds on both error rates, half of 1 - confidence each.
    """
    _check_levels(delta, confidence)
    fpr, fnr = _rates(false_positives, trials_out, false_negatives, trials_in, confidence)
    return float(_epsilon_from_rates(fpr, fnr, delta))


def mu_from_errors(false_positives, trials_out, false_negatives, trials_in, confidence=0.95):
    """The same for the mu of a Gaussian trade-off curve (mu-GDP); 0 if the errors show nothing."""
    _check_levels(0, confidence)
    fpr, fnr = _rates(false_positives, trials_out, false_negatives, trials_in, confidence)
    return max(0.0, float(_mu_from_rates(fpr, fnr)))


def strongest_refuted(tradeoff, false_positives, trials_out, false_negatives, trials_in, low, high, confidence=0.95):
    """Largest parameter in [low, high] whose trade-off curve the counted errors refute: a lower bound on the true one.

    `tradeoff(parameter, fpr)` is the smallest miss rate that the claimed mechanism allows at the false positive rate
    `fpr`; it must not grow with either argument (Nasr et al. 2023). Gives `low` when nothing is refuted.

    Example, one Gaussian step: `strongest_refuted(lambda mu, fpr: norm.cdf(-norm.ppf(fpr) - mu), ..., 0, 20)`.
    """
    _check_levels(0, confidence)
    fpr, fnr = _rates(false_positives, trials_out, false_negatives, trials_in, confidence)
    return _largest(lambda parameter: fnr < tradeoff(parameter, fpr), low, high)


def lower_bound(scores_in, scores_out, delta, confidence=0.95, method="clopper_pearson"):
    """`LowerBound` from one score per trial with the record (`scores_in`) and without it (`scores_out`).

    method: "clopper_pearson" assumes nothing of the mechanism; "gaussian" turns the same counts into mu-GDP and that
    into epsilon, far tighter at small delta; "best" is the larger of the two, each at half of 1 - confidence.
    The sign of the scores is fixed: an attack that is right when flipped gives 0. Ties count against the auditor.
    """
    _check_levels(delta, confidence)
    if method not in ("clopper_pearson", "gaussian", "best"):
        raise ValueError(f'method is "clopper_pearson", "gaussian" or "best", not "{method}".')
    if delta == 0 and method != "clopper_pearson":
        raise ValueError('A Gaussian trade-off curve has no finite epsilon at delta 0; use method="clopper_pearson".')
    scores_in, scores_out = _check_scores(scores_in, "scores_in"), _check_scores(scores_out, "scores_out")
    if method != "best":
        return _bound_by(method, scores_in, scores_out, delta, confidence)
    both = [_bound_by(m, scores_in, scores_out, delta, (1 + confidence) / 2) for m in ("clopper_pearson", "gaussian")]
    winner = max(both, key=lambda bound: bound.epsilon)
    return replace(winner, confidence=confidence, method=f"best: {winner.method}")


def _bound_by(method, scores_in, scores_out, delta, confidence):
    gain = _mu_from_rates if method == "gaussian" else lambda fpr, fnr: _epsilon_from_rates(fpr, fnr, delta)
    (pilot_in, rest_in), (pilot_out, rest_out) = _split(scores_in, seed=0), _split(scores_out, seed=1)
    value, share = _best_rank(pilot_out, pilot_in, gain)
    mirrored_value, mirrored_share = _best_rank(-pilot_in, -pilot_out, gain)
    if value >= mirrored_value:
        threshold, false_positives, false_negatives = _errors_at_rank(rest_out, rest_in, share)
    else:
        threshold, false_negatives, false_positives = _errors_at_rank(-rest_in, -rest_out, mirrored_share)
        threshold = -threshold
    errors = (false_positives, len(rest_out), false_negatives, len(rest_in))
    if method == "gaussian":
        epsilon = _epsilon_of_mu(mu_from_errors(*errors, confidence), delta)
    else:
        epsilon = epsilon_from_errors(*errors, delta, confidence)
    counts = dict(zip(("false_positives", "trials_out", "false_negatives", "trials_in"), errors))
    return LowerBound(epsilon, delta, confidence, method, ASSUMPTIONS[method], counts, threshold)


def _split(scores, seed):
    """Pilot and rest at random: callers may hand over sorted scores."""
    order = np.random.default_rng(seed).permutation(len(scores))
    pilot = int(PILOT_SHARE * len(scores))
    return scores[order[:pilot]], scores[order[pilot:]]


def _best_rank(low, high, gain):
    """Where to put the threshold: (gain, share of `low` above it), as far as the pilot can tell."""
    above = np.unique(np.geomspace(1, len(low), 40).astype(int)) - 1
    thresholds = np.sort(low)[::-1][above]
    below = np.searchsorted(np.sort(high), thresholds, side="right")
    gains = gain(_wilson(above, len(low)), _wilson(below, len(high)))
    best = int(np.argmax(gains))
    return gains[best], above[best] / len(low)


def _errors_at_rank(low, high, share):
    """Threshold with `share` of `low` above it; how many of `low` lie above, and of `high` not above.

    With ties fewer of `low` lie above; the rank still counts, since its law is the one that is known.
    """
    rank = int(share * len(low))
    threshold = float(np.sort(low)[::-1][rank])
    return threshold, rank, int((high <= threshold).sum())


def _rates(false_positives, trials_out, false_negatives, trials_in, confidence):
    for errors, trials in ((false_positives, trials_out), (false_negatives, trials_in)):
        if not 0 <= errors <= trials or trials < 1:
            raise ValueError(f"There are {errors} errors in {trials} trials; give 0 to as many errors as trials.")
    return (
        clopper_pearson(false_positives, trials_out, confidence)[1],
        clopper_pearson(false_negatives, trials_in, confidence)[1],
    )


def _epsilon_from_rates(fpr, fnr, delta):
    """(epsilon, delta)-DP forces 1 - delta - fpr <= exp(epsilon) fnr, and the same with the errors exchanged."""
    with np.errstate(divide="ignore"):
        one, other = (np.log(np.maximum(1 - delta - a, 0) / b) for a, b in ((fpr, fnr), (fnr, fpr)))
    return np.maximum(np.maximum(one, other), 0.0)


def _mu_from_rates(fpr, fnr):
    """mu-GDP forces fnr >= Phi(Phi^-1(1 - fpr) - mu)."""
    return -ndtri(fpr) - ndtri(fnr)


def _epsilon_of_mu(mu, delta):
    from lookalike.privacy.accounting import gaussian_epsilon

    return max(0.0, float(gaussian_epsilon(mu, delta))) if mu > 0 else 0.0


def _wilson(errors, trials):
    """Approximate upper bound on a rate, for many counts at once: it chooses the threshold and never enters a bound."""
    share, z2 = errors / trials, PILOT_Z**2 / trials
    upper = (share + z2 / 2 + np.sqrt(share * (1 - share) * z2 + z2**2 / 4)) / (1 + z2)
    return np.minimum(upper, 1.0)  # rounding can pass 1


# One run, many canaries


def one_run_epsilon(correct, guesses, canaries, delta, confidence=0.95):
    """Lower bound on epsilon from `correct` of `guesses` right about which of `canaries` were in, one training run.

    Steinke et al. 2023, the theorem for approximate DP. The number of guesses must be fixed before looking at who
    was in. Pays for delta with 2 * canaries * delta, so keep delta well below 1 / canaries.
    """
    _check_levels(delta, confidence)
    _check_guesses(correct, guesses, canaries)
    miss = 1 - confidence
    return _largest(lambda epsilon: _one_run_p_value(correct, guesses, canaries, epsilon, delta) <= miss, 0.0, 50.0)


def one_run_mu(correct, guesses, canaries, confidence=0.95):
    """The same for the mu of a Gaussian trade-off curve (mu-GDP); Mahloujifar et al. 2025."""
    _check_levels(0, confidence)
    _check_guesses(correct, guesses, canaries)
    return _largest(lambda mu: _refutes_mu(mu, correct, guesses, canaries, 1 - confidence), 0.0, 40.0)


def one_run_bound(scores, included, delta, confidence=0.95, guesses=None, method="one_run"):
    """`LowerBound` from one score per canary (N,) and who was in the training set (N,), True or False.

    Guesses "in" for the highest scores, "out" for the lowest, and abstains between. guesses: their number, half of
    them "in", or a pair (in, out), fixed before looking at `included`. With None three numbers are tried, all
    canaries, 30 % and 10 %, each at a third of 1 - confidence. method: "one_run" (Steinke et al.) or
    "one_run_gaussian" (Mahloujifar et al.). Among tied scores the wrong guesses come first.
    """
    _check_levels(delta, confidence)
    if method not in ("one_run", "one_run_gaussian"):
        raise ValueError(f'method is "one_run" or "one_run_gaussian", not "{method}".')
    if delta == 0 and method == "one_run_gaussian":
        raise ValueError('A Gaussian trade-off curve has no finite epsilon at delta 0; use method="one_run".')
    scores, included = _check_canaries(scores, included)
    plans = _guess_plans(guesses, len(scores))
    level = 1 - (1 - confidence) / len(plans)
    bounds = [_one_run_by(method, scores, included, delta, level, plan) for plan in plans]
    return replace(max(bounds, key=lambda bound: bound.epsilon), confidence=confidence)


def _one_run_by(method, scores, included, delta, confidence, plan):
    correct, guesses, canaries = _correct_guesses(scores, included, *plan), sum(plan), len(scores)
    if method == "one_run_gaussian":
        epsilon = _epsilon_of_mu(one_run_mu(correct, guesses, canaries, confidence), delta)
    else:
        epsilon = one_run_epsilon(correct, guesses, canaries, delta, confidence)
    counts = {"canaries": canaries, "guesses": guesses, "correct": correct}
    return LowerBound(epsilon, delta, confidence, method, ASSUMPTIONS[method], counts)


def _guess_plans(guesses, canaries):
    """List of pairs (guesses "in", guesses "out")."""
    if isinstance(guesses, (tuple, list)):
        plans = [tuple(int(number) for number in guesses)]
    else:
        numbers = [int(share * canaries) for share in GUESS_SHARES] if guesses is None else [int(guesses)]
        plans = [(number // 2, number - number // 2) for number in numbers]
    if any(len(plan) != 2 or min(plan) < 0 or not 0 < sum(plan) <= canaries for plan in plans):
        raise ValueError(f"guesses is {guesses}; give 1 to {canaries}, the number of canaries, or a pair (in, out).")
    return plans


def _correct_guesses(scores, included, guess_in, guess_out):
    """Ties go against the auditor: no better than any order of the tied that does not look at `included`."""
    order = np.lexsort((~included, scores))
    return int(included[order[len(order) - guess_in :]].sum() + (~included[order[:guess_out]]).sum())


def _one_run_p_value(correct, guesses, canaries, epsilon, delta):
    """Upper bound on the chance of at least `correct` right guesses under (epsilon, delta)-DP."""
    truth = expit(epsilon)  # randomised response tells the truth with this chance, and nothing does better
    p_value = binom.sf(correct - 1, guesses, truth)
    if delta == 0 or correct == 0:
        return float(p_value)
    just_below = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, truth))
    return float(p_value + 2 * canaries * delta * np.max(just_below / np.arange(1, correct + 1)))


def _refutes_mu(mu, correct, guesses, canaries, miss):
    """Whether mu-GDP keeps the chance of at least `correct` right guesses below `miss`.

    right and wrong are the expected right and wrong guesses per canary over all outcomes with at least i right. Flip
    one canary's coin: mu-GDP gives wrong(i) >= Phi(Phi^-1(right(i + 1)) - mu). Going down from i = correct with the
    smallest values allowed, both must sum to guesses / canaries at i = 0; a larger sum is impossible.
    """
    right, wrong = miss * correct / canaries, miss * (guesses - correct) / canaries
    for i in range(correct - 1, -1, -1):
        needed = max(wrong, float(ndtr(ndtri(right) - mu)))
        right, wrong = right + i / (guesses - i) * (needed - wrong), needed
        if right + wrong > guesses / canaries:
            return True
    return False


# Shared


def _largest(refuted, low, high):
    """Largest value in [low, high] that is refuted, by bisection, rounded down; `low` if it is not refuted itself."""
    if not refuted(low):
        return float(low)
    if refuted(high):
        return float(high)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return float(low)


def _check_levels(delta, confidence):
    if not 0 <= delta < 1:
        raise ValueError(f"delta must lie in [0, 1), not {delta}.")
    if not 0.5 < confidence < 1:
        raise ValueError(f"confidence must lie between 0.5 and 1, not {confidence}.")


def _check_scores(scores, name):
    scores = np.asarray(scores, dtype=float).ravel()
    if len(scores) < MIN_TRIALS:
        raise ValueError(f"{name} holds {len(scores)} scores; a bound needs at least {MIN_TRIALS} of each kind.")
    if np.isnan(scores).any():
        raise ValueError(f"{name} holds NaN; a trial that failed must be run again, not dropped.")
    return scores


def _check_canaries(scores, included):
    scores, included = _check_scores(scores, "scores"), np.asarray(included).astype(bool).ravel()
    if len(included) != len(scores):
        raise ValueError(f"There are {len(scores)} scores and {len(included)} entries in included; give one of each.")
    if included.all() or not included.any():
        raise ValueError("All canaries are on one side; include each by its own fair coin.")
    return scores, included


def _check_guesses(correct, guesses, canaries):
    if not 0 <= correct <= guesses <= canaries or guesses < 1:
        raise ValueError(f"{correct} correct of {guesses} guesses on {canaries} canaries cannot be; check the order.")
