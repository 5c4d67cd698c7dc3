"""pGAN's two attacks: which candidates lie so near the released images that they were trained on?

Paper: Sun, Plawinski et al. 2023 (PLOS ONE, 10.1371/journal.pone.0280316), Sec. 2.3 and 6.5, Table S1, Fig. S1 to S4.
Chapter: pgan. The pairwise attack looks at each candidate's nearest synthetic image, the distribution attack counts
the synthetic images around it. Both come from one pass over the distances. Rows are anything (N, D): pixels, or an
embedding made elsewhere; the attacker is given the released images and the candidates, nothing of the generator.

What a small number does not say: tests of this kind are known to overlook leaks that model-based attacks find (Yao
et al. 2025, "The DCR Delusion", arXiv 2505.01524). `toy_pairwise` and `toy_distribution` are the paper's made-up panels
of a generator that leaks, with their faults as switches.
"""

from dataclasses import dataclass, field

import numpy as np
from scipy.stats import hypergeom

from lookalike.metrics.intervals import clopper_pearson
from lookalike.metrics.neighbours import scan

ORIGINS = ("train", "val", "test")  # the candidates': members, held-out of the same study, another study
SIZES = {"train": 334, "val": 333, "test": 333}
FIRST_CUT_OFF = 5  # where the paper's curves begin
TOY_SHARE = 0.02  # neighbours in the distribution toy: the 2nd percentile of the distances


@dataclass(frozen=True)
class DistanceAttacks:
    """Scores (N,) of both attacks on the same candidates; larger means more likely a member.

    pairwise: -minimum / median over the synthetic images (the authors' code), in [-1, 0]; nearest: -minimum (the
    paper's words). distribution: how many synthetic images lie within `radius`. minima, medians, radius are distances
    in the rows' own units.
    """

    pairwise: np.ndarray = field(repr=False)
    nearest: np.ndarray = field(repr=False)
    distribution: np.ndarray = field(repr=False)
    minima: np.ndarray = field(repr=False)
    medians: np.ndarray = field(repr=False)
    radius: float


@dataclass(frozen=True)
class CutOff:
    """How many of the k highest scores come from each origin; counts are fractions where scores tie at the edge."""

    k: int
    counts: dict[str, float]
    sizes: dict[str, int]

    @property
    def shares(self):
        """Share of each origin among the k, the paper's Table S1; they sum to 1."""
        return {origin: count / self.k for origin, count in self.counts.items()}


@dataclass(frozen=True)
class CutOffAttack:
    """A cut-off read as an attack: the k highest scores are called members.

    tpr, fpr: called share of the members and of the non-members; ratio: tpr / fpr; share: members among the called,
    beside `chance`, what blind calls give. Each in [0, 1] (ratio from 0 up) and with its 95 % interval (low, high),
    Clopper-Pearson; the ratio's follows from both rates' at 97.5 %, which is careful. p_value: chance of at least as
    many members among the called if scores say nothing (hypergeometric, one-sided): sharper than the ratio's interval.
    All take candidates as independent: with several images of one subject the truth is wider.
    """

    tpr: float
    tpr_interval: tuple[float, float]
    fpr: float
    fpr_interval: tuple[float, float]
    ratio: float
    ratio_interval: tuple[float, float]
    share: float
    share_interval: tuple[float, float]
    chance: float
    p_value: float


def distance_attacks(candidates, synthetic, share=0.01):
    """Both attacks on candidates (N, D) against synthetic rows (M, D), in one pass.

    `share` sets the radius of the distribution attack: that share of all N x M distances lies within it. The paper:
    0.01 in pixels, 0.001 in its embedding (Sec. 6.5). The radius depends on all candidates together.
    """
    found = scan(candidates, synthetic, median=True, share=share)
    minima, medians = np.asarray(found.distances, np.float64)[:, 0], np.asarray(found.medians, np.float64)
    counts = np.asarray(found.share_counts, np.float64)
    return DistanceAttacks(_relative(minima, medians), -minima, counts, minima, medians, float(found.share_radius))


def pairwise_scores(candidates, synthetic, statistic="min_over_median"):
    """Scores (N,) of the pairwise attack: -minimum / median of the distances ("min_over_median") or -minimum ("min").

    The paper's text says minimum; its code divides by the candidate's median distance, so that images that are far
    from everything are not let off.
    """
    if statistic not in ("min_over_median", "min"):
        raise ValueError(f'statistic must be "min_over_median" or "min", not {statistic!r}.')
    found = scan(candidates, synthetic, median=statistic == "min_over_median")
    minima = np.asarray(found.distances, np.float64)[:, 0]
    return -minima if statistic == "min" else _relative(minima, np.asarray(found.medians, np.float64))


def distribution_scores(candidates, synthetic, share=0.01):
    """Scores (N,) of the distribution attack: synthetic images within the radius that holds `share` of all pairs."""
    return np.asarray(scan(candidates, synthetic, share=share).share_counts, np.float64)


def cut_off(scores, origins, k):
    """`CutOff` of the k highest scores (N,), whose `origins` (N,) are "train", "val" or "test"; k is exact.

    Candidates that tie at the edge share the places left, each with the same fraction: the expected counts of a random
    choice. Taking the first would favour whoever is stored first, in the paper the training images.
    """
    scores, origins = _checked(scores, origins)
    if not 1 <= k <= len(scores):
        raise ValueError(f"The cut-off k must lie between 1 and the {len(scores)} candidates, not at {k}.")
    edge = -np.partition(-scores, k - 1)[k - 1]
    above, tied = scores > edge, scores == edge
    weights = above + tied * (k - above.sum()) / tied.sum()
    counts = {origin: float(weights[origins == origin].sum()) for origin in ORIGINS}
    return CutOff(int(k), counts, {origin: int((origins == origin).sum()) for origin in ORIGINS})


def cut_off_attack(cut, others=("val",)):
    """`CutOffAttack` of a `CutOff`: "train" are the members, `others` the non-members.

    Only "val" is of the members' own study; against "test" the scanner tells them apart too. With counts taken from a
    printed table it tests a printed sentence: "at best two thirds of the top 50".
    """
    called, n = cut.counts["train"], cut.sizes["train"]
    false, m = sum(cut.counts[o] for o in others), sum(cut.sizes[o] for o in others)
    if not (n and m):
        raise ValueError(f"A cut-off is an attack only with candidates of train and of {', '.join(others)}.")
    tpr, fpr, both = called / n, false / m, called + false
    (tpr_low, tpr_high), (fpr_low, fpr_high) = (clopper_pearson(x, of, 0.975) for x, of in ((called, n), (false, m)))
    return CutOffAttack(
        tpr=tpr,
        tpr_interval=clopper_pearson(called, n),
        fpr=fpr,
        fpr_interval=clopper_pearson(false, m),
        ratio=_ratio(tpr, fpr),
        ratio_interval=(_ratio(tpr_low, fpr_high), _ratio(tpr_high, fpr_low)),
        share=called / both if both else np.nan,
        share_interval=clopper_pearson(called, both),
        chance=n / (n + m),
        p_value=float(hypergeom.sf(np.floor(called + 1e-9) - 1, n + m, n, np.ceil(both - 1e-9))),
    )


def cut_off_curve(scores, origins, other="val", cut_offs=None):
    """train / (train + other) among the k highest scores (Fig. S4): arrays "k", "share", "low", "high", and "chance".

    NaN where neither is among them. The interval is Clopper-Pearson's, for one k looked at alone: points of one curve
    share candidates, and as k nears all of them the share must come to `chance`, so read it at small k.
    """
    scores, origins = _checked(scores, origins)
    cut_offs = np.arange(FIRST_CUT_OFF, len(scores) + 1) if cut_offs is None else np.asarray(cut_offs)
    cuts = [cut_off(scores, origins, k) for k in cut_offs]
    called, both = (np.array([[c.counts["train"], c.counts["train"] + c.counts[other]] for c in cuts])).T
    low, high = np.array([clopper_pearson(x, n) for x, n in zip(called, both)]).T
    share = np.divide(called, both, out=np.full(len(both), np.nan), where=both > 0)
    train, rest = (origins == "train").sum(), (origins == other).sum()
    return {"k": cut_offs, "share": share, "low": low, "high": high, "chance": train / (train + rest)}


def roc_points(members, non_members):
    """The ROC curve (Fig. S3) as false and true positive rates, both from (0, 0) to (1, 1), a point per score.

    The paper's scores are stretched to [0, 1] first, which changes no point.
    """
    members, non_members = np.sort(members), np.sort(non_members)
    thresholds = np.unique(np.concatenate([members, non_members]))[::-1]
    rates = [(len(s) - np.searchsorted(s, thresholds)) / len(s) for s in (non_members, members)]
    return tuple(np.concatenate([[0.0], rate]) for rate in rates)


def possible_cut_offs(rows, cut_offs, decimals=2):
    """Those of `cut_offs` at which every printed row of shares can have come from whole counts (the GRIM test).

    So Table S1's column "50" can be dated: its rows are possible at 55 of the numbers around 50 and not at 50.
    """
    half = 0.5 * 10.0**-decimals + 1e-9

    def possible(row, k):
        least, most = (
            sum(np.ceil(k * (s - half)) for s in row),
            sum(np.floor(k * (s + half)) for s in row),
        )
        whole = all(np.ceil(k * (s - half)) <= np.floor(k * (s + half)) for s in row)
        return whole and least <= k <= most

    return [k for k in cut_offs if all(possible(row, k) for row in rows)]


def printed_cut_off(shares, k):
    """The `CutOff` behind a printed row of shares (train, val, test) of the paper's 334, 333 and 333 candidates."""
    counts = np.round(np.asarray(shares) * k)
    if counts.sum() != k:
        raise ValueError(f"Shares {tuple(shares)} give {counts.sum():.0f} candidates, not {k}; see possible_cut_offs.")
    return CutOff(k, dict(zip(ORIGINS, counts.tolist())), dict(SIZES))


@dataclass(frozen=True)
class Toy:
    """A made-up panel: scores (N,), origins (N,), and the distances (N,) to the nearest synthetic point."""

    scores: np.ndarray = field(repr=False)
    origins: np.ndarray = field(repr=False)
    distances: np.ndarray = field(repr=False)


def toy_pairwise(seed, candidates="all", raw=False):
    """The paper's made-up distances of a generator that leaks nine in ten of its training images (Fig. S1, row 1).

    `candidates` "all": 500 of each origin, as in the notebook, of which the top 333 are nearly all train; "sampled":
    334, 333 and 333, which comes near the printed Table S1 (0.89 / 0.04 / 0.07). `raw` gives the gamma distances of
    Fig. S2, whose reference is `toy_reference`. The paper's draws have no seed.
    """
    if candidates not in ("all", "sampled"):
        raise ValueError(f'candidates must be "all" or "sampled", not {candidates!r}.')
    rng = np.random.default_rng(seed)
    copied, other, val, test = (450, 50, 500, 500) if candidates == "all" else (300, 34, 333, 333)
    if raw:
        drawn = [
            (rng.gamma(5, 0.75, copied) + 7) * 2,
            (rng.gamma(4, 1, other) + 13) * 2.1,
            (rng.gamma(4, 1, val) + 13) * 2.1,
            (rng.gamma(4, 1, test) + 13) * 2.3,
        ]
    else:
        drawn = [
            rng.beta(9, 4, copied) * 0.4 + 0.25,
            rng.beta(12, 7, other) * 0.5 + 0.4,
            rng.beta(12, 7, val) * 0.5 + 0.47,
            rng.beta(9, 3, test) * 0.52 + 0.4,
        ]
    distances = np.concatenate(drawn)
    return Toy(-distances, np.repeat(ORIGINS, [copied + other, val, test]), distances)


def toy_reference(seed, n=500):
    """Distances (n,) between test images and synthetic ones in the toy of Fig. S2: what no leak looks like."""
    return (np.random.default_rng([seed, 1]).gamma(4, 1, n) + 12.9) * 2.34


def toy_distribution(seed, permuted="features", kept="largest"):
    """The paper's made-up points around 10,000 synthetic ones in 64 dimensions; the defaults are as published.

    `permuted` "features": the published code shuffles the 64 coordinates, and then no training candidate lies near any
    synthetic point; "samples" is what was meant. `kept` "largest": of 1000 candidates of each origin, the 334, 333 and
    333 with the most neighbours are kept, which needs the answer; "any" keeps as many at random.
    """
    if permuted not in ("features", "samples") or kept not in ("largest", "any"):
        raise ValueError('permuted must be "features" or "samples", kept "largest" or "any".')
    rng = np.random.default_rng(seed)
    synthetic = _toy_synthetic(rng)
    points = np.concatenate(_toy_candidates(rng, synthetic, permuted))
    origins = np.repeat(ORIGINS, len(points) // 3)
    found = scan(points, synthetic, share=TOY_SHARE)
    counts = np.asarray(found.share_counts, np.float64)
    order = np.argsort(-counts, kind="stable") if kept == "largest" else np.arange(len(points))
    rows = np.concatenate([order[origins[order] == origin][:n] for origin, n in SIZES.items()])
    return Toy(counts[rows], origins[rows], found.distances[rows, 0])


def _toy_synthetic(rng):
    base = rng.standard_normal((2000, 64))

    def near(stretch, noise):
        return base * (1 - stretch / 2 + stretch * rng.random(base.shape)) + noise * rng.standard_normal(base.shape)

    return np.concatenate([base, near(0, 0.1), near(0.05, 0.15), rng.standard_normal(base.shape), near(0.1, 0.2)])


def _toy_candidates(rng, synthetic, permuted, n=1000):
    """Points of train, val and test, (n, 64) each; further from the synthetic ones in this order."""

    def drawn():
        rows = synthetic[:, rng.permutation(64)] if permuted == "features" else rng.permutation(synthetic)
        return rows[:n], rng.standard_normal((n, 64))

    rows, noise = drawn()
    train = rows * (0.975 + 0.05 * rng.random(rows.shape)) + np.abs(0.15 * noise)
    (rows_val, noise_val), (rows_test, noise_test) = drawn(), drawn()
    return train, rows_val + np.square(0.45 * (1 + noise_val)), rows_test + np.square(0.5 * (1 + noise_test))


def _relative(minima, medians):
    if not (medians > 0).all():
        raise ValueError("Some candidate lies at distance 0 from half of the synthetic images; are they all one image?")
    return -minima / medians


def _ratio(a, b):
    if b == 0:
        return np.inf if a > 0 else np.nan
    return float(a / b)


def _checked(scores, origins):
    scores, origins = np.asarray(scores, np.float64).ravel(), np.asarray(origins).ravel()
    if len(scores) != len(origins):
        raise ValueError(f"There are {len(scores)} scores and {len(origins)} origins; each score needs its origin.")
    if strange := sorted(set(origins.tolist()) - set(ORIGINS)):
        raise ValueError(f"Origins must be {', '.join(ORIGINS)}; {strange[0]!r} is none of them.")
    if np.isnan(scores).any():
        raise ValueError(f"{int(np.isnan(scores).sum())} scores are not a number.")
    return scores, origins
