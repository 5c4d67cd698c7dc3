"""The one form of every attack: scores of members and of non-members in, an `AttackResult` out.

A score is larger where the image looks more like one that the generator was trained on. Non-members are *held-out real*
images of the members' source; against anything else (synthetic images, another hospital) an attack measures how the two
differ, not what leaks. Read an attack only beside what it finds where a leak was planted and where none can be:
`lookalike.privacy.calibration`. Low false-alarm rates as Carlini et al. 2022, "Membership Inference Attacks From First
Principles", asks for.
"""

from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit, logit
from scipy.stats import norm, rankdata

from lookalike.metrics.intervals import clopper_pearson

RATES = (0.01, 0.001)  # false-alarm rates at which a true-positive rate is stated
RESAMPLES = 400


@dataclass(frozen=True)
class Operating:
    """What an attacker gets who raises a false alarm on at most `fpr` of the non-members.

    tpr: share of members called, in [0, 1]; low, high: its interval from a bootstrap of both sides, over subjects where
    they are known, the threshold drawn anew each time; never narrower than Clopper-Pearson's for the members alone.
    resolved: there are 1 / fpr non-members or more; with fewer, the threshold is their highest score, and the true
    false-alarm rate may lie above `fpr`.
    """

    fpr: float
    tpr: float
    low: float
    high: float
    resolved: bool


@dataclass(frozen=True)
class AttackResult:
    """One attack on one generator.

    auc: chance that a member scores above a non-member, ties half; 0.5 is blind, and below 0.5 is a sign that members
    and non-members differ in some other way, not safety. low, high: its 95 % interval, over subjects where they are
    known. operating: an `Operating` for each of `RATES`. members, non_members: the scores (N,), (M,). worst: rows of
    the members, highest score first. note: what the attacker is given, in a sentence.
    """

    name: str
    auc: float
    low: float
    high: float
    operating: tuple[Operating, ...]
    members: np.ndarray = field(repr=False)
    non_members: np.ndarray = field(repr=False)
    worst: np.ndarray = field(repr=False)
    note: str = ""

    @property
    def finds_leak(self) -> bool:
        """Whether the whole interval of the AUC lies above 0.5: a false alarm in 2.5 % of leak-free sets."""
        return self.low > 0.5

    def row(self) -> dict:
        """Plain values for JSON: auc, interval, tpr_at_1pct_fpr with its interval, tpr_at_0.1pct_fpr, counts, note."""
        one, tenth = self.operating
        return {
            "auc": self.auc,
            "interval": [self.low, self.high],
            "tpr_at_1pct_fpr": one.tpr,
            "tpr_interval": [one.low, one.high],
            "tpr_at_0.1pct_fpr": tenth.tpr if tenth.resolved else None,
            "members": len(self.members),
            "non_members": len(self.non_members),
            "note": self.note,
        }


def attack_result(name, members, non_members, member_subjects=None, non_member_subjects=None, note="", level=0.95):
    """`AttackResult` of the scores (N,) of members and (M,) of non-members; larger means more likely a member.

    `member_subjects`, `non_member_subjects`: whose image each is. Images of one subject are not independent, so the
    interval of the AUC is then over subjects, which may be on both sides (Obuchowski 1997). `level`: of all intervals.
    """
    members, non_members = _scores(members, "members"), _scores(non_members, "non-members")
    parts_in, parts_out = _placements(members, non_members)
    auc = float(parts_in.mean())
    spread = _variance(parts_in, parts_out, member_subjects, non_member_subjects)
    counts = _count(members, member_subjects), _count(non_members, non_member_subjects)
    low, high = _auc_interval(auc, spread, *counts, level)
    operating = _operating(members, non_members, member_subjects, non_member_subjects, level)
    worst = np.argsort(-members, kind="stable")
    return AttackResult(name, auc, low, high, operating, members, non_members, worst, note)


def auc(members, non_members):
    """Chance that a member scores above a non-member, ties half, from 0 to 1; the curve's area, no interval."""
    return float(_placements(_scores(members, "members"), _scores(non_members, "non-members"))[0].mean())


def _scores(values, what):
    values = np.asarray(values, np.float64).ravel()
    if len(values) < 2:
        raise ValueError(f"An attack needs the scores of at least two {what}, not {len(values)}.")
    if np.isnan(values).any():
        raise ValueError(f"{int(np.isnan(values).sum())} scores of the {what} are not a number.")
    return values


def _placements(members, non_members):
    """For each member the share of non-members that it passes, for each non-member that of members passing it."""
    n, m = len(members), len(non_members)
    together = rankdata(np.concatenate([members, non_members]))
    parts_in = (together[:n] - rankdata(members)) / m
    parts_out = 1 - (together[n:] - rankdata(non_members)) / n
    return parts_in, parts_out


def _variance(parts_in, parts_out, member_subjects, non_member_subjects):
    """Variance of the area: what subjects add to it is summed, over both sides, for a subject may be on both."""
    owners_in = _owners(parts_in, member_subjects, "member")
    owners_out = _owners(parts_out, non_member_subjects, "non-member")
    shares = [(parts - parts.mean()) / len(parts) for parts in (parts_in, parts_out)]
    sums = np.bincount(np.unique(owners_in + owners_out, return_inverse=True)[1], np.concatenate(shares))
    few = min(len(set(owners_in)), len(set(owners_out)))
    if few < 2:
        raise ValueError("An interval over subjects needs at least two of them among members and among non-members.")
    return sums @ sums * few / (few - 1)


def _owners(parts, subjects, side):
    """Whose each score is: the subject's name, or a name of its own where subjects are not given."""
    if subjects is None:
        return [f"{side} {i}" for i in range(len(parts))]
    if len(subjects) != len(parts):
        raise ValueError(f"There are {len(parts)} scores and {len(subjects)} subjects; each score needs its subject.")
    return [f"subject {subject}" for subject in subjects]


def _count(scores, subjects):
    return len(scores) if subjects is None else len(np.unique(subjects))


def _auc_interval(area, variance, n, m, level):
    """DeLong's variance on the logit scale; where the scores hardly overlap it vanishes, and Newcombe's takes over."""
    z = norm.ppf((1 + level) / 2)
    low, high = _newcombe(area, n, m, z)
    if min(area, 1 - area) * max(n, m) > 1:  # 1: both cover 94 to 98 % there; Newcombe's is wide where they overlap
        half = z * np.sqrt(variance) / (area * (1 - area))
        low, high = expit(logit(area) - half), expit(logit(area) + half)
    return float(low), float(high)


def _newcombe(area, n, m, z):
    """Areas whose Hanley-McNeil variance puts `area` within z deviations (Newcombe 2006, method 5): never empty."""

    def distance(true):
        pairs = (n + m) / 2 - 1
        variance = true * (1 - true) * (1 + pairs * (1 - true) / (2 - true) + pairs * true / (1 + true)) / (n * m)
        return abs(true - area) - z * np.sqrt(variance)

    edge = 1e-9
    inside = min(max(area, edge), 1 - edge)
    ends = (0.0 if area <= edge else edge), (1.0 if area >= 1 - edge else 1 - edge)
    return tuple(brentq(distance, inside, end) if distance(end) > 0 > distance(inside) else end for end in ends)


def _operating(members, non_members, member_subjects, non_member_subjects, level):
    rng, tail = np.random.default_rng(0), (1 - level) / 2
    sides = _drawer(members, member_subjects), _drawer(non_members, non_member_subjects)
    draws = np.array([[_called(*parts, rate) for rate in RATES] for parts in _resampled(sides, rng)])
    points = []
    for rate, drawn in zip(RATES, draws.T):
        tpr = _called(members, non_members, rate)
        low, high = np.quantile(drawn, [tail, 1 - tail])
        exact = clopper_pearson(round(tpr * len(members)), len(members), level)
        ends = float(min(low, exact[0])), float(max(high, exact[1]))
        points.append(Operating(rate, tpr, *ends, len(non_members) * rate >= 1))
    return tuple(points)


def _called(members, non_members, rate):
    """Share of members above the score that at most `rate` of the non-members pass."""
    allowed = int(np.floor(rate * len(non_members)))
    threshold = np.partition(non_members, len(non_members) - 1 - allowed)[len(non_members) - 1 - allowed]
    return float((members > threshold).mean())


def _resampled(sides, rng):
    return [[draw(rng) for draw in sides] for _ in range(RESAMPLES)]


def _drawer(scores, subjects):
    """A function from a generator to scores drawn with replacement, whole subjects where they are given."""
    if subjects is None:
        return lambda rng: scores[rng.integers(0, len(scores), len(scores))]
    order = np.argsort(np.unique(subjects, return_inverse=True)[1], kind="stable")
    counts = np.unique(subjects, return_counts=True)[1]
    groups = np.split(scores[order], np.cumsum(counts)[:-1])
    return lambda rng: np.concatenate([groups[i] for i in rng.integers(0, len(groups), len(groups))])
