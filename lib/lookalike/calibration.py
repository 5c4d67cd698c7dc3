"""What each attack and measure can see: its power against leaks that were planted, at 5 % false alarms.

Every detector gives one number per trial, larger where it sees more of a leak: an attack its AUC, a measure its value
turned so that a generator that memorises has more of it. A trial draws members, held-out images, the attacker's own
reference images and, in the place of an ideal generator's output, as many fresh images of the same source; a leak
replaces a share of the latter by altered copies of members. The threshold of a detector is passed by 5 % of the trials
without a leak, and "none" are other trials without one: how often it is passed there shows how well 5 % is met.
"""

from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np

from lookalike import paths
from lookalike.data import duplicates
from lookalike.data.plants import KINDS, plant
from lookalike.files import ResultsError, read_json, write_json
from lookalike.metrics.compared import set_measures
from lookalike.metrics.features import features
from lookalike.metrics.intervals import clopper_pearson
from lookalike.metrics.neighbours import nearest
from lookalike.privacy import membership, suite
from lookalike.provenance import provenance

FALSE_ALARMS = 0.05
SHARES = (0.10, 0.02)  # of the released images that are copies
MEMBERS, RELEASED, SIDE = 200, 400, 32
POOL, ELSEWHERE = 1200, 2000  # phantoms made; every other subject of the latter is at the second site
NO_LEAK = "none"
SECOND_SITE = "second site"
TRAINED = "trained models"


@dataclass(frozen=True)
class Trial:
    """One draw: what the generator saw, what it made, and real images that it did not see.

    copied: rows of the members that have a planted copy among the made images; None where none was planted.
    """

    members: suite.View
    synthetic: suite.View
    holdout: suite.View
    reference: suite.View
    seed: int
    copied: np.ndarray | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Pool:
    """Images of one source by subject, an altered copy of each for every kind of leak, and images of a second site."""

    images: suite.View
    subjects: np.ndarray = field(repr=False)
    copies: dict = field(repr=False)
    elsewhere: suite.View | None = None


def make_pool(image_set, extractor, cache=None, elsewhere=None, leaks=KINDS, seed=0):
    """`Pool` of an ImageSet, and of another one from a second site; features are taken once for all trials."""

    def view(pixels):
        return suite.View(pixels, features(pixels, extractor, cache))

    copies = {kind: view(plant(image_set.images, kind, seed)) for kind in leaks}
    other = None if elsewhere is None else view(elsewhere.images)
    return Pool(view(image_set.images), image_set.subjects, copies, other)


def detect(trial):
    """{detector: number} of one trial; larger means that it sees more of a leak."""
    attacks = suite.attack(trial.members, trial.holdout, trial.synthetic, trial.reference, seed=trial.seed)
    return {name: found.auc for name, found in attacks.items()} | _measured(trial)


def _measured(trial):
    members, synthetic, holdout = (v.features for v in (trial.members, trial.synthetic, trial.holdout))
    seen, unseen = set_measures(members, synthetic), set_measures(holdout, synthetic)
    real = membership.authenticity(synthetic, members, holdout)
    closer = (nearest(synthetic, members)[0] < np.median(nearest(holdout, members)[0])).mean()
    copies = duplicates.flag_copies(trial.synthetic.pixels, trial.members.pixels, trial.holdout.pixels, reverse=False)
    return {
        "frechet_distance": -seen["frechet_distance"],
        "frechet_gap": unseen["frechet_distance"] - seen["frechet_distance"],
        "kernel_distance": -seen["kernel_distance"],
        "kernel_gap": unseen["kernel_distance"] - seen["kernel_distance"],
        **{name: seen[name] for name in ("precision", "recall", "density", "coverage")},
        "vendi_ratio": -seen["vendi_ratio"],
        "authenticity": -real.share,
        "closer_than_held_out": float(closer),
        "copies_flagged": float(len(copies.flagged)),
    }


def calibrate(pool, *, members, synthetic, shares, repeats, seed=0, leaks=KINDS, detect=detect):
    """{world: {detector: {"power", "interval"}}}: share of `repeats` trials that pass the detector's threshold.

    members: images in each of members, held-out and reference images; synthetic: images released; shares: parts of
    them that are copies; detect: a `Trial` to {detector: number}. Worlds: "copy, 10 %" and so on for each leak and
    share; "none"; and, if the pool has a second site, "second site": there the held-out images come from it, nothing
    leaks, and each detection is false.
    """
    found = trials(
        pool, members=members, synthetic=synthetic, shares=shares, repeats=repeats, seed=seed, leaks=leaks,
        detect=detect,
    )  # fmt: skip
    return powers(found.pop("threshold"), found)


def trials(pool, *, members, synthetic, shares, repeats, detect, seed=0, leaks=KINDS, quiet=None):
    """{world: what `detect` gives of each of `repeats` trials}; "threshold": `quiet` trials without a leak (None: as
    many), see `powers`. Few of them make a threshold that holds 5 % only over many calibrations, not in this one.
    """
    quiet = repeats if quiet is None else quiet
    if quiet < repeats:
        raise ValueError(f"The threshold takes as many trials as a leak or more: quiet is {quiet}, repeats {repeats}.")
    copies = {f"{leak}, {share:.0%}": (leak, share) for share in shares for leak in leaks}
    worlds = {"threshold": None, NO_LEAK: None, **copies} | ({SECOND_SITE: None} if pool.elsewhere is not None else {})
    rng, found = np.random.default_rng(seed), {world: [] for world in worlds}
    for _ in range(repeats):
        for world, planted in worlds.items():
            found[world].append(detect(_trial(pool, planted, world == SECOND_SITE, members, synthetic, rng)))
    for _ in range(quiet - repeats):
        found["threshold"].append(detect(_trial(pool, None, False, members, synthetic, rng)))
    return found


def _trial(pool, planted, elsewhere, members, synthetic, rng):
    """Subjects are dealt to the four sets, so that no set knows another's."""
    seen, unseen, beside, made = deal(pool.subjects, [members, members, members, synthetic], rng)
    released, holdout, copied = pool.images.rows(made), pool.images.rows(unseen), None
    if planted is not None:
        leak, share = planted
        count = round(share * len(made))
        chosen = rng.choice(seen, count, replace=count > len(seen))
        released = suite.join(released.rows(np.arange(count, len(made))), pool.copies[leak].rows(chosen))
        copied = np.flatnonzero(np.isin(seen, chosen))
    reference = pool.images.rows(beside)
    if elsewhere:  # as on a card: the attacker's own images come from where the held-out ones do
        rows = rng.permutation(len(pool.elsewhere))
        holdout, reference = (pool.elsewhere.rows(part) for part in (rows[:members], rows[members : 2 * members]))
    return Trial(pool.images.rows(seen), released, holdout, reference, int(rng.integers(2**31)), copied)


def deal(subjects, counts, rng):
    """Random rows for each count, all rows of a subject in one part; parts are longer by what that takes."""
    names, rows = np.unique(subjects, return_inverse=True)
    place = rng.permutation(len(names))[rows]
    order = np.argsort(place, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(place[order])) + 1, len(order))  # where a subject's rows end
    wanted = np.cumsum(counts)
    if wanted[-1] > len(order):
        raise ValueError(f"A trial needs {wanted[-1]} images and the pool has {len(order)}.")
    cuts = ends[np.searchsorted(ends, wanted)]
    return np.split(order[: cuts[-1]], cuts[:-1])


def powers(quiet, found):
    """Shares of trials, per leak and detector, that pass the number which 5 % of the `quiet` trials pass."""
    limits = {
        name: float(np.quantile([t[name] for t in quiet], 1 - FALSE_ALARMS, method="higher")) for name in quiet[0]
    }
    return {
        leak: {name: _share([trial[name] for trial in trials], limit) for name, limit in limits.items()}
        for leak, trials in found.items()
    }


def _share(values, limit):
    passed = int((np.array(values) > limit).sum())
    return {"power": passed / len(values), "interval": list(clopper_pearson(passed, len(values)))}


# --- the whole, as the command runs it ----------------------------------------------------------------------


def run(data, repeats, models, seed=0, keep=False):
    """{name: document}: of `data` with `repeats` trials per leak, and of as many trained `models`; 0 leaves one out."""
    begun, found = _begun(keep), {}
    if repeats:
        found[data] = begun | _with_pool(data, repeats, seed)
    if models:
        from lookalike import calibration_models

        found[TRAINED] = begun | calibration_models.run(models, seed)
    if keep:
        write_json(_path(), dict(sorted((kept() | found).items())))
    return found


def _with_pool(data, repeats, seed):
    from lookalike.metrics.extractors import efficientnet_lite0

    images, elsewhere = _images(data, seed)
    extractor = efficientnet_lite0(64).for_channels(images.images.shape[1])
    pool = make_pool(images, extractor, elsewhere=elsewhere, seed=seed)
    sizes = {"members": MEMBERS, "synthetic": RELEASED, "repeats": repeats, "seed": seed}
    worlds = calibrate(pool, shares=SHARES, **sizes)
    return {"data": data, "origin": images.origin, "side": SIDE, "features": extractor.name, **sizes, "worlds": worlds}


def rows(worlds):
    """One row per detector: its power against each leak."""
    return [
        {"detector": name} | {world: f"{powers[name]['power']:.2f}" for world, powers in worlds.items()}
        for name in next(iter(worlds.values()))
    ]


def kept():
    """The kept calibrations by data set; empty if there are none."""
    return read_json(_path()) if _path().is_file() else {}


def quote():
    """What a card says of the attacks' power elsewhere, from the first kept calibration; None if there is none."""
    for document in (kept()[name] for name in kept() if name != TRAINED):
        worlds = {world: found for world, found in document["worlds"].items() if world.endswith(f"{SHARES[0]:.0%}")}
        what = (
            f"mean share of trials on {document['data']} ({document['side']} px) in which the attack noticed that "
            f"{SHARES[0]:.0%} of {document['synthetic']} released images were copies of {document['members']} training "
            f"images, whole or altered in {len(worlds) - 1} ways, at 5 % false alarms."
        )
        names = document["worlds"][NO_LEAK]
        return {"what": what, "attacks": {n: float(np.mean([w[n]["power"] for w in worlds.values()])) for n in names}}
    return None


def _images(data, seed):
    """The pool's images and, for phantoms, those of a second scanner."""
    from lookalike.data import datasets, phantoms

    if data == "phantom_mammography":
        first = phantoms.mammography(POOL, seed, image_size=SIDE)
        second = phantoms.mammography(ELSEWHERE, seed + 1, sites=2, image_size=SIDE)
        return first.image_set, second.image_set.subset(second.factors["site"] == 1)
    return datasets.load(data, "train", SIDE), None


def _begun(keep):
    state = provenance()
    if keep and state["dirty"] is not False:
        raise ResultsError("A calibration is kept only of committed code: commit and calibrate again.")
    return {"made": datetime.now(UTC).isoformat(timespec="seconds"), "provenance": state}


def _path():
    return paths.results_dir() / "calibration.json"
