"""Attacks with what makes them believable: held-out images like the members, silence without a leak, planted copies.

An attack says "member" for whatever sets training images apart from held-out ones: a leak, but as well another scanner
or another year. So a classifier first tries to tell the two apart without any released image; if it can, no attack is
believed. Then held-out images pose as the released ones: an attack that still finds members is set aside. Then altered
copies of a few members are hidden among the released images: an attack that misses them proves nothing by its silence.
"""

import numpy as np

from lookalike.data.plants import KINDS, plant
from lookalike.data.splits import subject_split
from lookalike.metrics.features import features
from lookalike.privacy import suite
from lookalike.privacy.attack import attack_result

CANDIDATES = 1000  # members, and at most as many non-members, that are attacked
PLANTS = 45  # copies hidden among released images, five of each kind
AMONG = 2000  # released images among which they are hidden
FEWEST = 10  # images in each part of the held-out ones
CAREFUL = 0.995  # of the intervals that set an attack aside: one in two hundred does so wrongly
FOUND = 0.6  # of the area where copies are planted: what the whole interval must pass


def held_out_parts(holdout, seed):
    """Rows of the non-members, of those that pose as released, and of the attacker's own; None if there are too few."""
    parts = subject_split(holdout.subjects, (0.5, 0.25, 0.25), seed)
    few = min(map(len, parts)) < FEWEST or min(len(np.unique(holdout.subjects[part])) for part in parts) < 2
    return None if few else parts


def attacks_with_controls(real, holdout, released, parts, subjects, extractor, cache=None, seed=0):
    """{name: row} of every attack of the suite on views; {"auc", "interval"} of telling members from held-out images.

    parts: of `held_out_parts`. subjects: (of real, of holdout), each (N,) or None. A row has the attack's numbers at 95
    %, "joint": its interval of area and of the share found at 1 % false alarms that hold for all attacks together,
    "control" and "believed".
    """
    rng = np.random.default_rng(seed)
    members, others = (np.sort(rng.permutation(rows)[:CANDIDATES]) for rows in (np.arange(len(real)), parts[0]))
    inside, outside = real.rows(members), holdout.rows(others)
    whose = tuple(None if owner is None else owner[rows] for owner, rows in zip(subjects, (members, others)))
    posing, left = (holdout.rows(part) for part in parts[1:])
    reference = suite.join(posing, left)
    found = suite.attack(inside, outside, released, reference, *whose, seed=seed)
    quiet = suite.attack(inside, outside, posing, left, *whose, seed=seed, level=CAREFUL)
    planted = _where_copies_are(inside, outside, released, reference, whose, extractor, cache, seed)
    alike = _told_apart(inside.features, outside.features, whose, seed)
    same = alike.low <= 0.5 <= alike.high
    rows = {name: _row(found[name], quiet[name], planted[name], same, whose, len(found)) for name in found}
    return rows, {"auc": alike.auc, "interval": [alike.low, alike.high], "alike": bool(same)}


def planted_copies(images, seed=0):
    """One altered copy of each image (N, C, H, W), every kind of `plants.KINDS` in turn."""
    copies = np.empty(images.shape, images.dtype)
    for i, kind in enumerate(KINDS):
        copies[i :: len(KINDS)] = plant(images, kind, seed)[i :: len(KINDS)]
    return copies


def _where_copies_are(members, others, released, reference, whose, extractor, cache, seed):
    """The attacks on a few members alone, altered copies of whom are hidden among the released images."""
    rng = np.random.default_rng(seed + 1)
    chosen = np.sort(rng.permutation(len(members))[:PLANTS])
    copies = planted_copies(members.pixels[chosen], seed)
    hidden = suite.View(copies, features(copies, extractor, cache))
    among = released.rows(np.sort(rng.permutation(len(released))[:AMONG]))
    subjects = None if whose[0] is None else whose[0][chosen], whose[1]
    return suite.attack(members.rows(chosen), others, suite.join(among, hidden), reference, *subjects, seed=seed)


def _told_apart(members, others, whose, seed):
    """How well a classifier that saw other subjects tells members from held-out images; 0.5 is not at all."""
    halves = [_in_half(part, owner, seed) for part, owner in zip((members, others), whose)]
    scores = np.empty(len(members)), np.empty(len(others))
    for half in (True, False):
        training = [part[of == half] for part, of in zip((members, others), halves)]
        for score, part, of in zip(scores, (members, others), halves):
            score[of != half] = suite.discriminate(part[of != half], *training, seed)
    return attack_result("training against held-out images", *scores, *whose, level=CAREFUL)


def _in_half(part, owner, seed):
    """Which rows are in the first half, whole subjects."""
    owner = np.arange(len(part)) if owner is None else owner
    return np.isin(np.arange(len(part)), subject_split(owner, (0.5, 0.5), seed)[0])


def _row(found, quiet, planted, same, whose, attacks):
    joint = attack_result(found.name, found.members, found.non_members, *whose, level=1 - 0.05 / attacks)
    one = joint.operating[0]
    return found.row() | {
        "joint": {"auc": [joint.low, joint.high], "tpr_at_1pct_fpr": [one.low, one.high]},
        "control": {
            "no leak": {"auc": quiet.auc, "interval": [quiet.low, quiet.high]},
            "planted copies": {"auc": planted.auc, "interval": [planted.low, planted.high]},
        },
        "believed": bool(same and quiet.low <= 0.5 <= quiet.high and planted.low > FOUND),
    }


def findings(attacks):
    """{criterion: (value, (low, high), note)} over the attacks that are believed, by area and at 1 % false alarms.

    Fails if one attack's joint interval lies beyond the limit, passes if all of them lie within. An area below 0.5
    counts as much as one above: members and others then differ in some other way. At least one attack on pixels and one
    on features must be believed.
    """
    believed = {name: row for name, row in attacks.items() if row["believed"]}
    if not all(any(kind in name for name in believed) for kind in ("pixels", "features")):
        note = "not one attack on pixels and one on features can be believed" if attacks else "not tested"
        return {name: (None, None, note) for name in ("attack_auc", "attack_tpr_at_1pct_fpr")}
    areas = {name: _either_side(row["auc"], row["joint"]["auc"]) for name, row in believed.items()}
    found = {"attack_auc": _strongest(areas)}
    if next(iter(believed.values()))["non_members"] < 100:
        note = "1 % of the non-members is less than one: more held-out images are needed"
        return found | {"attack_tpr_at_1pct_fpr": (None, None, note)}
    calls = {name: (row["tpr_at_1pct_fpr"], row["joint"]["tpr_at_1pct_fpr"]) for name, row in believed.items()}
    return found | {"attack_tpr_at_1pct_fpr": _strongest(calls)}


def _either_side(area, interval):
    low, high = interval
    return max(area, 1 - area), [max(low, 1 - high), max(high, 1 - low)]


def _strongest(found):
    name = max(found, key=lambda name: found[name][0])
    interval = [max(interval[end] for _, interval in found.values()) for end in (0, 1)]
    return found[name][0], interval, name
