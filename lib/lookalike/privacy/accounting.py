"""Noise to epsilon and back: Poisson-subsampled Gaussian steps, add-or-remove-one neighbours, upper bounds only.

Three accountants: Rényi (Mironov et al. 2019) and PRV (Gopi et al. 2021) by Opacus, PLD with connect-the-dots
(Doroshenko et al. 2022) by dp-accounting; full batches have a closed form (Balle & Wang 2018). "best" takes the
smallest of closed form, PLD and Rényi. PRV stays out of it: Opacus follows only the removal of a record, while PLD
and Rényi cover adding one too.

The one decision worth knowing: memory is bounded by the grid, not by epsilon. A pilot on few points measures how wide
the composed privacy loss is, and the PLD grid is then as fine as GRID_POINTS allow. Connect-the-dots only ever rounds
up, so a coarse grid is looser and still a bound; at the settings of no_free_lunch (sigma 0.1 to 0.4, 20,000 steps,
epsilon up to half a million) it costs 0.1 % and beats Rényi's bound.

A record is whatever is clipped and sampled as one. Where whole subjects are sampled and each subject's gradient is
clipped once, a subject is a record: the numbers here are then subject level, with no group bound and none of its loss.
"""

import math
import operator
import warnings
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from scipy.optimize import brentq
from scipy.special import erfcx, ndtr, ndtri

# Opacus' own orders and, for tiny sigma, orders close to 1, where the best bound lies.
ORDERS = [1 + x / 100 for x in range(1, 10)] + [1 + x / 10 for x in range(1, 100)] + list(range(12, 64))

GRID_POINTS = 2**19  # composed PLD: 0.2 to 0.7 s, below 200 MB
MIXTURE_POINTS = 10_000  # one mixture step: its losses are inverted by bisection, about 0.1 ms a point
FINEST_INTERVAL = 1e-4  # dp-accounting's default
COARSEST_INTERVAL = 500.0  # connect-the-dots takes exp(interval), which overflows at 709
PLD_STEPS = 200_000  # the pilot grows with the steps: 1.6 GB at a million
FFT_ROUNDING = 1e-11  # of the composed losses, from above: five times the most seen against the closed form
ROUNDING_MARGIN = 100  # how far delta must lie above all rounding
PRV_POINTS = 2**23
LARGEST_PRV_LOSS = 700.0  # PRV takes exp(loss)
SMALLEST_LOG_SIGMA, LARGEST_LOG_SIGMA = math.log(1e-4), math.log(1e7)


class DoesNotFit(ValueError):
    """An accountant has no valid number here within memory or floating point; the message says why."""


@dataclass(frozen=True)
class Training:
    """One DP-SGD training: `steps` Gaussian steps, each record in each batch with probability `sample_rate`.

    `noise_multiplier` is the noise's standard deviation over the clipping norm; 0 means no privacy at all.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int

    def __post_init__(self):
        if not 0 <= self.noise_multiplier < math.inf:
            raise ValueError(f"noise_multiplier must be 0 or a positive number, not {self.noise_multiplier}.")
        if not 0 < self.sample_rate <= 1:
            raise ValueError(f"sample_rate must lie in (0, 1], not {self.sample_rate}.")
        if not hasattr(self.steps, "__index__") or operator.index(self.steps) < 0:
            raise ValueError(f"steps must be a whole number, 0 or more, not {self.steps!r}.")


@dataclass(frozen=True)
class Accounted:
    """The (epsilon, delta) that holds for one `unit`; `accountant` gave it, `note` says why it is what it is."""

    epsilon: float
    delta: float
    accountant: str
    unit: str = "record"
    note: str = ""


def rdp_epsilon(noise_multiplier, sample_rate, steps, delta):
    """Rényi upper bound on epsilon at `delta`; infinite without noise, 0 before the first step.

    Quick; above PLD by 1 to 25 % in common settings, twofold for sigma near 0.01.
    """
    return account(Training(noise_multiplier, sample_rate, steps), delta, "rdp").epsilon


def prv_epsilon(noise_multiplier, sample_rate, steps, delta):
    """Opacus' PRV bound on epsilon at `delta`, within about 0.1 %; raises DoesNotFit where epsilon nears 700.

    It follows the removal of a record; `pld_epsilon` follows adding one too.
    """
    return account(Training(noise_multiplier, sample_rate, steps), delta, "prv").epsilon


def pld_epsilon(noise_multiplier, sample_rate, steps, delta):
    """PLD upper bound on epsilon at `delta`, the tightest here; raises DoesNotFit for tiny delta or sigma.

    Its grid coarsens as epsilon grows and remains a bound.
    """
    return account(Training(noise_multiplier, sample_rate, steps), delta, "pld").epsilon


ACCOUNTANTS = {"rdp": rdp_epsilon, "prv": prv_epsilon, "pld": pld_epsilon}


def account(trainings, delta, accountant="best"):
    """Epsilon at `delta` of one Training or of several on the same data, composed inside the accountant.

    `accountant` is "rdp", "prv", "pld" or "best": the smallest of PLD, Rényi and the closed form that fit.

        account([victim, ablated, full], delta=1e-5).epsilon
    """
    if accountant not in (*_BOUNDS, "best"):
        raise ValueError(f"accountant must be one of {', '.join(_BOUNDS)} or best, not {accountant!r}.")
    trainings = _checked(trainings, delta)
    if (end := _end(trainings, delta)) is not None:
        return end
    if accountant == "best":
        return _best(trainings, delta)
    epsilon, note = _BOUNDS[accountant](trainings, delta)
    return Accounted(epsilon, delta, accountant, note=note)


def _checked(trainings, delta):
    if not 0 < delta < 1:
        raise ValueError(f"delta must lie between 0 and 1, not {delta}; take it below 1 / number of records.")
    trainings = [trainings] if isinstance(trainings, Training) else list(trainings)
    if not trainings or not all(isinstance(training, Training) for training in trainings):
        raise ValueError("trainings must be a Training or a list of at least one of them.")
    return [training for training in trainings if training.steps]


def _end(trainings, delta, unit="record"):
    """The answers that need no accountant; `trainings` holds those with at least one step."""
    if not trainings:
        return Accounted(0.0, delta, "none", unit, "No step was taken.")
    if any(training.noise_multiplier == 0 for training in trainings):
        return Accounted(math.inf, delta, "none", unit, "A training without noise has no finite epsilon.")
    return None


def _best(trainings, delta):
    whole = _gaussian(trainings, delta)
    if all(training.sample_rate == 1 for training in trainings):
        return whole
    renyi = Accounted(_rdp(trainings, delta)[0], delta, "rdp")
    try:
        loss, note = _pld(trainings, delta)
    except DoesNotFit as reason:
        return _smallest(
            f"PLD skipped. {reason} This is the best of what is left, looser by an unknown part.", renyi, whole
        )
    return _smallest("", Accounted(loss, delta, "pld", note=note), renyi, whole)


def _smallest(why, *bounds):
    least = min(bounds, key=lambda bound: bound.epsilon)
    return replace(least, note=f"{why} {least.note}".strip())


def _gaussian(trainings, delta, group=1):
    """The closed form for whole batches; sampling only ever lowers epsilon, so it bounds every training."""
    exact = all(training.sample_rate == 1 for training in trainings)
    note = "Closed form for whole batches" + (": exact." if exact else ", an upper bound where batches are sampled.")
    return Accounted(gaussian_epsilon(group * _mu(trainings), delta), delta, "gaussian", _unit(group), note)


def _mu(trainings):
    """Full batches compose to one Gaussian mechanism with this mean over noise."""
    return math.sqrt(sum(training.steps / training.noise_multiplier**2 for training in trainings))


def _steps_by_kind(trainings):
    """(sigma, rate) -> steps, so that a training split in two is accounted like the whole."""
    steps = defaultdict(int)
    for training in trainings:
        steps[float(training.noise_multiplier), float(training.sample_rate)] += int(training.steps)
    return steps


# Rényi


@lru_cache(maxsize=4096)
def _step_divergence(noise_multiplier, sample_rate):
    from opacus.accountants.analysis import rdp

    divergence = rdp.compute_rdp(q=sample_rate, noise_multiplier=noise_multiplier, steps=1, orders=ORDERS)
    return np.maximum(divergence, 0.0)  # rounding takes the smallest below 0


def _rdp(trainings, delta):
    from opacus.accountants.analysis import rdp

    divergence = sum(steps * _step_divergence(*kind) for kind, steps in _steps_by_kind(trainings).items())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Optimal order is the")  # a looser bound is still a bound
        epsilon, _ = rdp.get_privacy_spent(orders=ORDERS, rdp=divergence, delta=delta)
    return max(0.0, float(epsilon)), ""


# PRV


def _prv(trainings, delta):
    from opacus.accountants.prv import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(*kind, steps) for kind, steps in _steps_by_kind(trainings).items()]
    with warnings.catch_warnings(), np.errstate(all="ignore"):  # log(0) at rate 1 and in the far tail
        warnings.simplefilter("ignore")
        error = _prv_error(accountant.history, delta)
        try:
            epsilon = accountant.get_epsilon(delta, eps_error=error)
        except (RuntimeError, ValueError) as reason:
            raise DoesNotFit(f"Opacus' PRV accountant gave up: {reason}") from reason
    if not math.isfinite(epsilon):
        raise DoesNotFit("Opacus' PRV accountant gave no finite number.")
    return max(0.0, float(epsilon)), f"Error bound of {error:.2g} included; removal of a record only."


def _prv_error(history, delta):
    """The additive error that Opacus adds to its estimate: 1/2000 of the range of losses, which fixes the grid."""
    from opacus.accountants.analysis.prv import PoissonSubsampledGaussianPRV, compute_safe_domain_size

    variables = [PoissonSubsampledGaussianPRV(rate, sigma) for sigma, rate, _ in history]
    steps = [count for *_, count in history]
    largest = compute_safe_domain_size(variables, steps, eps_error=0.01, delta_error=delta / 1000)
    if not largest < LARGEST_PRV_LOSS:
        raise DoesNotFit(f"PRV takes exp(loss) of losses up to {largest:.3g}, which overflows.")
    points = 4000 * math.sqrt(sum(steps) * math.log(12_000 / delta) / 2)  # Opacus' mesh size at this error
    if points > PRV_POINTS:
        raise DoesNotFit(f"PRV would need a grid of {points:.2g} points.")
    return largest / 2000


# PLD


def _pld(trainings, delta, group=1):
    """Epsilon when `group` records enter or leave together, each sampled on its own (Ganesh 2024)."""
    kinds = _pld_kinds(trainings, group)
    if sum(kinds.values()) > PLD_STEPS:
        raise DoesNotFit(f"The pilot for PLD's grid is made for {PLD_STEPS:,} steps at most.")
    rounding = _rounding(kinds, group)
    if delta < ROUNDING_MARGIN * rounding:
        raise DoesNotFit(f"A delta of {delta:.2g} is too close to its rounding, which may reach {rounding:.2g}.")
    try:
        interval = _interval(kinds, group)
        epsilon = _composed(kinds, group, interval).get_epsilon_for_delta(delta - rounding)
    except (OverflowError, ValueError) as reason:
        raise DoesNotFit(f"PLD has no number here: {reason}") from reason
    coarse = (
        f"PLD on a grid of {interval:.2g} instead of {FINEST_INTERVAL:g}, so that it fits: a little looser, a bound."
    )
    return float(epsilon), coarse if interval > 10 * FINEST_INTERVAL else ""


def _rounding(kinds, group):
    """What floating point may take off delta: exp(loss) in every step, and the mixture's cut-offs, right to 1e-6.

    A cut-off that is off by x lowers a step's delta by x^2 / 2 times the loss's slope times the noise's density.
    """
    total = FFT_ROUNDING
    for (sigma, rate), steps in kinds.items():
        total += steps * 2.2e-16 * (1 + _range(sigma, rate, group))
        if group > 1 and rate < 1:
            total += steps * 1e-12 / 2 * group / sigma**2 * 0.4 / sigma
    return total


def _pld_kinds(trainings, group):
    """(sigma, rate) -> steps; all full batches are one Gaussian together, cut into steps whose losses are short."""
    kinds = _steps_by_kind(training for training in trainings if training.sample_rate < 1)
    if full := [training for training in trainings if training.sample_rate == 1]:
        mu = group * _mu(full)
        steps = min(math.ceil((mu / 10) ** 2), 20_000)
        kinds[math.sqrt(steps) / mu, 1.0] = steps
    return kinds


def _step_loss(noise_multiplier, sample_rate, group, interval):
    """One step's privacy loss distribution. An integer interval silently gives wrong losses, hence the float."""
    from dp_accounting.pld import privacy_loss_distribution as pld

    grid = {"value_discretization_interval": float(interval)}
    if group == 1 or sample_rate == 1:
        return pld.from_gaussian_mechanism(noise_multiplier, sampling_prob=sample_rate, **grid)
    from scipy.stats import binom

    sampled = np.arange(group + 1)
    return pld.from_mixture_gaussian_mechanism(
        noise_multiplier, sampled.astype(float), binom.pmf(sampled, group, sample_rate), **grid
    )


def _composed(kinds, group, interval):
    parts = [_step_loss(*kind, group, interval).self_compose(steps) for kind, steps in kinds.items()]
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.compose(part)
    return whole


def _interval(kinds, group):
    """The finest grid on which the composed losses take GRID_POINTS points or fewer."""
    widths = [_width(*kind, steps, group) for kind, steps in kinds.items()]
    mixtures = [_range(*kind, group) / MIXTURE_POINTS for kind in kinds if group > 1 and kind[1] < 1]
    return _within_float(max(FINEST_INTERVAL, sum(widths) / GRID_POINTS, *mixtures))


def _within_float(interval):
    if interval > COARSEST_INTERVAL:
        raise OverflowError(f"a grid that fits into memory has steps of {interval:.2g}, and exp of that overflows.")
    return interval


def _range(noise_multiplier, sample_rate, group):
    """Upper end of one step's privacy loss: all `group` records sampled, noise 10 standard deviations out."""
    shift = 1 if sample_rate == 1 else group
    return 10 * shift / noise_multiplier + shift**2 / (2 * noise_multiplier**2)


def _width(noise_multiplier, sample_rate, steps, group):
    """Width of the composed losses, from above, by a pilot on a coarse grid: rounding up only spreads them."""
    interval = _within_float(_range(noise_multiplier, sample_rate, group) / 500)
    step = _step_loss(noise_multiplier, sample_rate, group, interval)
    whole = step.self_compose(steps)
    sizes = [pmf.size for loss in (step, whole) for pmf in (loss._pmf_remove, loss._pmf_add)]
    return interval * max(sizes)


_BOUNDS = {"rdp": _rdp, "prv": _prv, "pld": _pld}


# From epsilon to noise


@lru_cache(maxsize=1024)
def noise_multiplier_for(epsilon, sample_rate, steps, delta, accountant="rdp"):
    """Smallest noise multiplier whose accounted epsilon is at most `epsilon`, from above within 1e-4 of itself.

    Results are cached: with "pld" or "prv" an answer takes seconds.
    """
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon must be a positive number, not {epsilon}.")
    if steps == 0:
        raise ValueError("With no steps there is nothing to add noise to; steps must be 1 or more.")

    def excess(log_sigma):
        return _excess(Training(math.exp(log_sigma), sample_rate, steps), delta, accountant, epsilon)

    low, high = _bracket(excess, _first_guess(epsilon, sample_rate, steps, delta, accountant))
    log_sigma = brentq(excess, low, high, xtol=1e-5) + 2e-5
    while excess(log_sigma) > 0:
        log_sigma += 1e-5
    return math.exp(log_sigma)


def _excess(training, delta, accountant, epsilon):
    """log(accounted / wanted epsilon), kept finite; too little noise for the accountant to fit is too little noise."""
    try:
        accounted = account(training, delta, accountant).epsilon
    except DoesNotFit:
        accounted = math.inf
    return math.log(min(max(accounted / epsilon, 1e-20), 1e20))


def _first_guess(epsilon, sample_rate, steps, delta, accountant):
    """The slow accountants start where the quick one ends."""
    if accountant == "rdp":
        return 0.0
    try:
        return math.log(noise_multiplier_for(epsilon, sample_rate, steps, delta))
    except ValueError:  # Rényi cannot certify so small an epsilon
        return 0.0


def _bracket(excess, start):
    """log sigma with too little noise and with enough; steps double."""
    step = 0.1
    low = high = start
    while excess(high) > 0:
        low, high, step = high, high + step, 2 * step
        if high > LARGEST_LOG_SIGMA:
            raise ValueError(
                f"No noise takes this accountant so low: up to sigma {math.exp(low):.2g} what is left is its own "
                "conversion. Take accountant='pld', or a larger epsilon or delta."
            )
    while low == high or excess(low) <= 0:
        low, high, step = low - step, low, 2 * step
        if low < SMALLEST_LOG_SIGMA:
            raise ValueError(f"An epsilon so large needs noise below sigma {math.exp(high):.2g}: it protects nobody.")
    return low, high


# Groups: a patient with k images


def group_bound(epsilon, delta, k):
    """What (epsilon, delta) for one record says about k: (k epsilon, delta (e^(k epsilon) - 1) / (e^epsilon - 1)).

    Void, with epsilon infinite, once that delta reaches 1: it usually does.
    """
    _check_group(k)
    if not (epsilon >= 0 and 0 <= delta <= 1):
        raise ValueError(f"epsilon must be 0 or more and delta in [0, 1], not {epsilon} and {delta}.")
    group_delta = delta and math.exp(min(0.0, math.log(delta) + _log_growth(epsilon, k)))
    if group_delta >= 1 or math.isinf(epsilon):
        note = f"Void: at epsilon {epsilon:.4g} and delta {delta:.3g} per record, the delta of {k} records reaches 1."
        return Accounted(math.inf, 1.0, "generic", _unit(k), note)
    return Accounted(k * epsilon, group_delta, "generic", _unit(k), "Generic group bound; the truth may be far below.")


def _check_group(k):
    if not hasattr(k, "__index__") or k < 1:
        raise ValueError(f"k, the records of one group, must be a whole number of 1 or more, not {k!r}.")


def _unit(k):
    return "record" if k == 1 else f"group of {k} records"


def _log_growth(epsilon, k):
    """log((e^(k epsilon) - 1) / (e^epsilon - 1)), k at epsilon 0."""
    if epsilon == 0 or math.isinf(epsilon):
        return math.log(k) if epsilon == 0 else math.inf
    return (k - 1) * epsilon + math.log(math.expm1(-k * epsilon) / math.expm1(-epsilon))


def group_epsilon(trainings, delta, k, accountant="best"):
    """Epsilon at `delta` for k records that enter or leave together, as the k images of one patient do.

    `accountant`: "mixture", each of the k sampled on its own (mixture-of-Gaussians PLD, Ganesh 2024,
    arXiv 2401.10294), tight; "generic", the bound for any mechanism at its best record-level delta, loose but for
    any size; "best", the smaller. Sampling whole patients and clipping each once needs none of this: see the header.
    """
    _check_group(k)
    if accountant not in ("best", "mixture", "generic"):
        raise ValueError(f"accountant must be best, mixture or generic for groups, not {accountant!r}.")
    if k == 1:
        return account(trainings, delta, {"mixture": "pld", "generic": "rdp"}.get(accountant, "best"))
    trainings = _checked(trainings, delta)
    if (end := _end(trainings, delta, _unit(k))) is not None:
        return end
    if accountant == "best":
        return _best_group(trainings, delta, k)
    return (_generic if accountant == "generic" else _mixture)(trainings, delta, k)


def _best_group(trainings, delta, k):
    whole = _gaussian(trainings, delta, k)
    if all(training.sample_rate == 1 for training in trainings):
        return whole
    generic = _generic(trainings, delta, k)
    try:
        mixture = _mixture(trainings, delta, k)
    except DoesNotFit as reason:
        return _smallest(f"Mixture skipped. {reason}", generic, whole)
    return _smallest("", mixture, generic, whole)


def _mixture(trainings, delta, k):
    epsilon, note = _pld(trainings, delta, group=k)
    return Accounted(epsilon, delta, "mixture", _unit(k), note)


def _generic(trainings, delta, k):
    """Smallest k epsilon(d) over record-level deltas d whose group delta is within `delta`.

    Only Rényi answers for the tiny d that this needs (1e-30 and less).
    """

    def bound(log_delta):
        record_delta = math.exp(log_delta)
        return group_bound(_rdp(trainings, record_delta)[0], record_delta, k)

    last = math.log(delta)
    for log_delta in np.linspace(last, math.log(1e-300), 300)[1:]:
        if bound(log_delta).delta <= delta:
            low = _last_that_fits(lambda value: bound(value).delta <= delta, log_delta, last)
            note = f"Generic group bound at a record-level delta of {math.exp(low):.2g}, by Rényi."
            return Accounted(bound(low).epsilon, delta, "generic", _unit(k), note)
        last = log_delta
    note = f"The generic group bound is void: no record-level delta above 1e-300 keeps {k} records within {delta}."
    return Accounted(math.inf, delta, "generic", _unit(k), note)


def _last_that_fits(fits, good, bad):
    for _ in range(40):
        middle = (good + bad) / 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


# Closed form


def gaussian_delta(mu, epsilon):
    """Exact delta of mu-Gaussian DP at `epsilon` >= 0: Phi(-epsilon/mu + mu/2) - e^epsilon Phi(-epsilon/mu - mu/2).

    Balle & Wang 2018, Theorem 8; Dong et al. 2019, Corollary 2.13. e^epsilon and the normal tail are multiplied
    before either over- or underflows.
    """
    if not (0 <= mu < math.inf and epsilon >= 0):
        raise ValueError(f"mu must be finite, mu and epsilon 0 or more, not {mu} and {epsilon}.")
    if mu == 0 or math.isinf(epsilon):
        return 0.0
    near = epsilon / mu - mu / 2
    density = 0.5 * math.exp(-(near**2) / 2) if abs(near) < 40 else 0.0
    far = erfcx((near + mu) / math.sqrt(2))
    if near > 0:
        return float(density * (erfcx(near / math.sqrt(2)) - far))
    return float(ndtr(-near) - density * far)


def gaussian_epsilon(mu, delta):
    """Smallest epsilon with `gaussian_delta(mu, epsilon)` at most `delta`, from above within 1e-12 of itself."""
    if not 0 < delta < 1:
        raise ValueError(f"delta must lie between 0 and 1, not {delta}.")
    if gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    low, high = 0.0, mu * (mu / 2 - float(ndtri(delta)))  # dropping the second term of delta leaves this epsilon
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if gaussian_delta(mu, middle) <= delta else (middle, high)
    return high
