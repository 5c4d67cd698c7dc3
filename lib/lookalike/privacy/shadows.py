"""Membership attacks by shadow models: LiRA and RMIA, for generators.

Papers: Carlini et al. 2022, "Membership Inference Attacks From First Principles" (LiRA, Sec. V), and Zarifzadeh et al.
2024, "Low-Cost High-Power Membership Inference Attacks" (RMIA, Sec. 3). The attacker is given one number per model and
image, its *signal* (minus the loss, minus the distance to the nearest released image, a discriminator's logit: larger
where the model knows the image), and trains models like the target on subsets of his own choice, which tell what the
signal is with the image and without. Strong where such shadows can be trained; a result says nothing about an attacker
who knows more, and nothing beyond the recipe and the number of images that the shadows were trained with.

Shadows are drawn in complementary blocks (pairs for one half), and a target is left out with its whole block: each
image is then in the same number of the remaining shadows whether it was the target's or not, so that the counts
themselves give nothing away.
"""

from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.special import digamma, logsumexp, polygamma
from scipy.stats import norm

from lookalike.metrics.neighbours import nearest
from lookalike.privacy.shadow_training import signals, train_shadows

LEAST_EXCESS = 1e-6  # log variances that spread by less than this beyond chance count as one
FLOOR = 1e-6  # least variance of an image's signals, as a share of that of all images together


class _NoVariance(ValueError):
    """Some image, or all of them, has the same signal in all shadows."""


class Pooled(NamedTuple):
    """Scores of all targets together, in the order that `attack_result(name, *pooled)` takes."""

    members: np.ndarray
    non_members: np.ndarray
    member_subjects: np.ndarray
    non_member_subjects: np.ndarray


@dataclass(frozen=True)
class ShadowScores:
    """Every model as the target once: included (S, N), signals (S, N), and the scores (S, N) of each attack.

    `loss` among the attacks is the signal itself, which needs no shadows: what the others must beat. notes: which
    attacks were left out, and why.
    """

    included: np.ndarray = field(repr=False)
    signals: np.ndarray = field(repr=False)
    scores: dict[str, np.ndarray] = field(repr=False)
    subjects: np.ndarray | None = field(default=None, repr=False)
    notes: tuple[str, ...] = ()

    def pooled(self, attack):
        """`Pooled` scores of one attack; see `pool` for what such a pool can say."""
        if attack not in self.scores:
            raise ValueError(" ".join([f"There are no scores of {attack!r}.", *self.notes]))
        return pool(self.scores[attack], self.included, self.subjects)


def lira(target, shadows, included, online=True, fixed_variance="auto"):
    """LiRA's scores (N,) from the target's signals (N,), the shadows' (S, N) and which image was in which (S, N).

    online: log of the ratio of two normal densities, with and without the image (0 where they agree); offline: how many
    deviations the signal lies above the shadows without it, for an attacker whose shadows never saw the image.
    fixed_variance: False gives each image its own variance, True all the same, pooled within images: the paper's two,
    for many shadows and for few. "auto" lets the signals say how far between: each image's own variance shrunk to the
    common one, as for few microarrays (Smyth 2004, and for LiRA Brännvall 2026, arXiv 2603.11799), and none below
    `FLOOR` of that of all images: a model that copies gives a member the same signal every time. The authors' code
    differs: medians for means, and one deviation of the raw signals of all images for True.
    """
    if fixed_variance not in (True, False, "auto"):
        raise ValueError(f'fixed_variance must be True, False or "auto", not {fixed_variance!r}.')
    target, shadows, included = _checked(target, shadows, included)
    _check_counts(included, at_least=2, inside=online)
    sides = [_moments(shadows, ~included)] + [_moments(shadows, included)] * online
    floor = FLOOR * sum(squares.sum() for _, squares, _ in sides) / sum(freedom.sum() for *_, freedom in sides)
    mean_out, deviation_out = _normal(*sides[0], fixed_variance, floor)
    if not online:
        return (target - mean_out) / deviation_out
    mean_in, deviation_in = _normal(*sides[1], fixed_variance, floor)
    return norm.logpdf(target, mean_in, deviation_in) - norm.logpdf(target, mean_out, deviation_out)


def rmia(
    target, shadows, included, population_target, population_shadows, online=True, gamma=1.0, a=1.0, temperature=1.0
):
    """RMIA's scores (N,) in [0, 1]: the share of population images that x beats by a likelihood ratio of gamma or more.

    Signals are logarithms of likelihoods, divided by `temperature` first. Population images, (M,) and (S, M), are in no
    model; with M of them no false-alarm rate under 1 / M can be told apart, and scores tie at 1. Each likelihood is
    taken relative to its mean over the shadows: online over those with and those without x alike, offline over those
    without, as ((1 + a) p_out + (1 - a)) / 2. The offset a (the authors' code: 0.3) is meant for probabilities, at most
    1, and refused for more; likelihoods of whole images are far below 1, and a = 1 takes them as they are.
    """
    target, shadows, included = _checked(target, shadows, included)
    z, z_shadows, nowhere = _checked(population_target, population_shadows, np.zeros_like(population_shadows, bool))
    _check_counts(included, at_least=1, inside=online)
    if not (0 <= a <= 1 and gamma > 0 and temperature > 0):
        raise ValueError(f"RMIA needs a in [0, 1], gamma and temperature above 0, not {a}, {gamma}, {temperature}.")
    if not online and a < 1 and max(part.max() for part in (target, shadows, z, z_shadows)) > 0:
        raise ValueError("The offset a is for logarithms of probabilities, none above 0; give a=1 for densities.")
    ratio_x = _log_ratio(target / temperature, shadows / temperature, included, online, a)
    ratio_z = _log_ratio(z / temperature, z_shadows / temperature, nowhere, False, 1.0 if online else a)
    return np.searchsorted(np.sort(ratio_z), ratio_x - np.log(gamma), side="right") / len(ratio_z)


def draw_inclusion(models, n, share=0.5, seed=0, subjects=None):
    """Which of n images each model trains on, bool (models, n): `share` of the subjects, whole ones (None: images).

    Models come in blocks (pairs at one half): in each, every subject is in the same number of models, and every model
    has the same number of subjects but for rounding.
    """
    size = block_size(share)
    if models % size or models < 3 * size:  # two blocks beside the target's: a variance on either side
        raise ValueError(f"With share {share} models come in blocks of {size}, at least three; not {models}.")
    subjects = np.arange(n) if subjects is None else np.unique(np.asarray(subjects), return_inverse=True)[1]
    if len(subjects) != n:
        raise ValueError(f"There are {len(subjects)} subjects for {n} images; give one per image.")
    rng, count = np.random.default_rng(seed), subjects.max() + 1
    if count < size:
        raise ValueError(f"{count} subjects cannot be shared out among {size} models of a block.")
    turns = np.array([rng.permutation(count) % size for _ in range(models // size)])
    place = (np.arange(size)[:, None] - turns[:, None]) % size  # (blocks, size, subjects)
    return (place < round(share * size)).reshape(models, count)[:, subjects]


def block_size(share):
    """Models in a block of `draw_inclusion`: 2 for one half, 4 for a quarter or three."""
    part = Fraction(share).limit_denominator(16)
    if not 0 < part < 1 or abs(part - Fraction(share)) > 0.001:
        raise ValueError(f"share must be a simple fraction between 0 and 1, such as 0.5 or 0.25, not {share}.")
    return part.denominator


def sample_signals(synthetic_sets, images):
    """Signals (S, N) of models that are known by their released images only: minus the nearest one's distance."""
    return np.stack([-nearest(images, synthetic)[0] for synthetic in synthetic_sets])


def leave_one_out(attack, signals, included, population=None, block=2):
    """Scores (S, N): each model is the target once, with all models outside its block of `block` as shadows.

    `attack` is `lira` or, with the signals (S, M) of a population, `rmia`; set their options with functools.partial.
    A block of 1 is for subsets drawn some other way. Where each image is in the same number of models it makes online
    LiRA look weak: an image then has one shadow fewer on the target's own side (AUC 0.46 with six models, no leak).
    """
    models, rows = np.arange(len(signals)), []
    for target in models:
        others = models // block != target // block
        extra = () if population is None else (population[target], population[others])
        rows.append(attack(signals[target], signals[others], included[others], *extra))
    return np.stack(rows)


def shadow_scores(signals, included, population, block=2):
    """`ShadowScores` of the raw signal ("loss"), LiRA and RMIA, online and offline, from signals alone.

    RMIA's temperature is the signals' own spread over the models, so that one deviation is a factor of e. Its gamma is
    1 online and 2 offline: members beat all of the population offline, and at 1 so do too many others. An attack that
    needs a spread where the signals have none is left out, with a note.
    """
    spread = float(np.sqrt(np.var(population, axis=0, ddof=1).mean())) if np.ptp(population, axis=0).any() else 0.0
    run = partial(leave_one_out, signals=signals, included=included, block=block)
    scores, notes = {"loss": np.asarray(signals, np.float64)}, []
    for kind, online in (("", True), ("_offline", False)):
        try:
            scores["lira" + kind] = run(partial(lira, online=online))
        except _NoVariance:
            notes.append(f"lira{kind} was left out: no image's signal differs between the shadows that it reads.")
        if not spread:
            notes.append(f"rmia{kind} was left out: no population image's signal differs between models.")
            continue
        ratio = partial(rmia, online=online, gamma=1.0 if online else 2.0, temperature=spread)
        scores["rmia" + kind] = run(ratio, population=population)
    return ShadowScores(included, scores["loss"], scores, notes=tuple(notes))


def shadow_attack(
    make_model, loss, images, labels, population_images, population_labels, steps, batch_size, lr,
    models=16, share=0.5, repeats=8, seed=0, subjects=None, together=None,
):  # fmt: skip
    """Draws, trains and attacks: `ShadowScores` of `models` models trained as `train_shadows` says on `images`.

    Population images are of the same source, in no model, and of other subjects. Example:
    `attack_result("LiRA", *shadow_attack(...).pooled("lira"))`.
    """
    included = draw_inclusion(models, len(images), share, seed, subjects)
    trained, _ = train_shadows(make_model, loss, images, labels, included, steps, batch_size, lr, seed, together)
    found = signals(trained, loss, images, labels, repeats, seed)
    population = signals(trained, loss, population_images, population_labels, repeats, seed + 1)
    scored = shadow_scores(found, included, population, block_size(share))
    return replace(scored, subjects=subjects)


def pool(scores, included, subjects=None):
    """`Pooled` scores (S, N) of all targets: those of (model, image) pairs with the image in, and those without.

    Pairs of one image share its subject, so the interval is over images or, where given, subjects. What a pool says is
    an average: its false-alarm rate is not that of any one image, some of which take most of the false alarms, and
    shadows drawn from the few images that are also attacked make the attack look stronger than a stranger's would be
    (Jälkö et al. 2026, arXiv 2605.25819). Models share shadows too. So read the area first, a true-positive rate at
    0.1 % last, and neither as a bound on what one person risks.
    """
    subjects = np.arange(scores.shape[1]) if subjects is None else np.asarray(subjects)
    whose = np.broadcast_to(subjects, scores.shape)
    return Pooled(scores[included], scores[~included], whose[included], whose[~included])


def _moments(values, chosen):
    """Mean, sum of squares about it and degrees of freedom, (N,) each, of the chosen shadows' signals."""
    count = chosen.sum(0)
    mean = np.where(chosen, values, 0).sum(0) / count
    spread = np.where(chosen, values, -np.inf).max(0) > np.where(chosen, values, np.inf).min(0)  # no rounding here
    return mean, np.where(chosen & spread, np.square(values - mean), 0).sum(0), count - 1


def _normal(mean, squares, freedom, fixed_variance, floor):
    """Mean (N,) and deviation, (N,) or one for all, of the chosen shadows' signals."""
    variance = squares.sum() / freedom.sum() if fixed_variance is True else squares / freedom
    variance = np.maximum(variance, floor) if fixed_variance == "auto" else variance
    if not np.all(variance > 0):
        raise _NoVariance("An image has the same signal in all shadows: its variance is 0, and LiRA needs some.")
    return mean, np.sqrt(_shrunk(variance, freedom) if fixed_variance == "auto" else variance)


def _shrunk(variance, freedom):
    """Variances (N,) drawn towards one value, the more the less they differ beyond chance (Smyth 2004, Sec. 6.2)."""
    logs = np.log(variance) - digamma(freedom / 2) + np.log(freedom / 2)
    excess = logs.var(ddof=1) - polygamma(1, freedom / 2).mean() if len(logs) > 1 else 0.0
    if excess <= LEAST_EXCESS:
        return (freedom * variance).sum() / freedom.sum()
    prior = 2 * brentq(lambda x: polygamma(1, x) - excess, 1e-6, 2 / LEAST_EXCESS)
    centre = np.exp(logs.mean() + digamma(prior / 2) - np.log(prior / 2))
    return (prior * centre + freedom * variance) / (prior + freedom)


def _log_ratio(target, shadows, included, online, a):
    """Logarithm (N,) of the target's likelihood over its mean over the shadows."""
    without = _log_mean(shadows, ~included)
    if online:
        return target - np.logaddexp(_log_mean(shadows, included), without) + np.log(2)
    offset = np.log((1 - a) / 2) if a < 1 else -np.inf
    return target - np.logaddexp(np.log((1 + a) / 2) + without, offset)


def _log_mean(values, chosen):
    return logsumexp(values, axis=0, b=chosen) - np.log(chosen.sum(0))


def _checked(target, shadows, included):
    target, shadows = np.asarray(target, np.float64), np.asarray(shadows, np.float64)
    included = np.asarray(included, bool)
    if target.ndim != 1 or shadows.ndim != 2 or shadows.shape != included.shape or shadows.shape[1] != len(target):
        raise ValueError(
            f"Signals must be (N,) of the target and (S, N) of the shadows, with included (S, N); got {target.shape}, "
            f"{shadows.shape} and {included.shape}."
        )
    if not (np.isfinite(target).all() and np.isfinite(shadows).all()):
        raise ValueError("Some signals are not finite.")
    return target, shadows, included


def _check_counts(included, at_least, inside):
    for counts, word in [((~included).sum(0), "without")] + [(included.sum(0), "with")] * inside:
        if counts.min() < at_least:
            raise ValueError(
                f"Image {int(counts.argmin())} has {counts.min()} shadows {word} it and needs {at_least}; train more "
                "shadows."
            )
