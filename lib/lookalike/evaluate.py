"""Three sets of images in, evidence out: measures, attacks, their controls, and a verdict against stated thresholds.

`real` are the images that the generator was trained on, `synthetic` those that are to be released, `holdout` real ones
of the same source that the generator never saw. No measure stands alone: beside it stand the same measure with held-out
real images in the place of the synthetic ones (the control: what no honest generator can beat) and with the average
image (the baseline: what is worth nothing). No attack is believed before it stayed quiet where nothing can leak and
found copies that were planted among the very images at hand. Evidence, not legal advice.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from lookalike import calibration
from lookalike.data import datasets, duplicates, folders
from lookalike.data.plants import KINDS, plant
from lookalike.data.splits import image_digests, subject_split
from lookalike.metrics import utility
from lookalike.metrics.classifiers import FrozenBackbone, Training
from lookalike.metrics.compared import measures_with_intervals, set_measures
from lookalike.metrics.extractors import efficientnet_lite0
from lookalike.metrics.features import features
from lookalike.metrics.intervals import clopper_pearson
from lookalike.metrics.neighbours import nearest
from lookalike.metrics.pixels import anchor_sets
from lookalike.privacy import membership, suite
from lookalike.provenance import provenance
from lookalike.verdict import NOT_APPLICABLE, EvidenceError, judge, limits

MOST = 5000  # images of a set that distances between sets are taken of; the searches for copies see all of them
CANDIDATES = 1000  # members, and at most as many non-members, that are attacked
PLANTS = 45  # copies hidden among released images, five of each kind, to see which attacks notice
AMONG = 2000  # released images among which they are hidden
FEWEST = 20  # images in a set
FEWEST_APART = 10  # images in each part of the held-out ones, and subjects of a set where they are known
FAR, FULL = 6, 0.9999
WORST = 12  # pairs that the card lists
HELD_OUT = "held-out real images in the place of the synthetic ones"

THREATS = (
    "The attacker has the released images and real images of the same kind; neither the generator nor its training. "
    "The question is whether a given image was among those that the generator was trained on."
)
NOT_TESTED = (
    "attacks with the generator's or the discriminator's weights, or with queries to the generator",
    "attacks with models trained for the purpose (LiRA, RMIA)",
    "attributes of a person that the images give away without repeating an image of that person",
    "several releases of the same data, and what else is published about the same people",
    "file names, headers and other data that travel with the images",
    "a formal guarantee: these numbers bound no epsilon",
)


@dataclass(frozen=True)
class Evidence:
    """`document`: plain JSON (see `evaluate`). `pairs`: released and training image (C, H, W), worst first."""

    document: dict
    pairs: tuple = ()


def evaluate(
    real, synthetic, holdout=None, *, extractor=None, files=None, thresholds=None, notes=(), cache=None, seed=0
):
    """`Evidence` on releasing `synthetic`, from ImageSets of one shape.

    Without `holdout` no attack is possible and no control is at hand. Labels with equal class names in all sets let a
    classifier say what use is left. thresholds: {name: limit} in the place of `verdict.THRESHOLDS`. notes: sentences
    on what was done to the sets before. The document has "verdict", "criteria", "measures", "attacks", "copies",
    "sets", "thresholds", "not_tested" and what made them.
    """
    stated = limits(thresholds)
    _check_shapes(real, synthetic, holdout)
    notes, missing = list(notes), []
    extractor = (extractor or default_extractor(real.images.shape[-1])).for_channels(real.images.shape[1])
    holdout = _without_overlap(real, holdout, notes)
    sets = {"real": real, "synthetic": synthetic} | ({"holdout": holdout} if holdout is not None else {})
    views = {name: suite.View(s.images, features(s.images, extractor, cache)) for name, s in sets.items()}
    copies, pairs = _copies(sets, files or {})
    measures = _distances(sets, views, extractor, cache, seed) | _nearness(views)
    attacks = _attacks(sets, views, extractor, cache, seed, missing)
    use = _use(sets, extractor, cache, missing)
    findings = {"copies": _copies_finding(copies), **_attack_findings(attacks), **_kept(measures), **use["finding"]}
    document = {
        **judge(findings, thresholds),
        "released": "images only",
        "threat_model": THREATS,
        "sets": {name: _described(s) for name, s in sets.items()},
        "features": extractor.name,
        "copies": copies,
        "measures": measures | use["measures"],
        "attacks": attacks,
        "thresholds": {name: limit for name, (limit, *_) in stated.items()},
        "not_tested": [*missing, *NOT_TESTED],
        "power": calibration.quote(),
        "notes": notes,
        "plants": PLANTS,
        "seed": seed,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "provenance": provenance(),
    }
    return Evidence(document, pairs)


# --- the sets -----------------------------------------------------------------------------------------------


def read(real, synthetic, holdout=None, subjects=None, image_size=None, restricted=False):
    """(real, synthetic, holdout or None, files by set, notes) from folders, npz files, or NAME:SPLIT of known sets.

    Folders are read as `folders.read_sets` says; beside a known set they are brought to its size.
    """
    given = {"real": real, "synthetic": synthetic} | ({"holdout": holdout} if holdout else {})
    known = {name: _known(source, image_size) for name, source in given.items() if _is_known(source)}
    if not known:
        sets = folders.read_sets(real, synthetic, holdout, subjects, image_size, restricted)
        return sets.real, sets.synthetic, sets.holdout, sets.files, list(sets.notes)
    if subjects:
        raise EvidenceError("Known sets name their own subjects: leave out --subjects, or give folders alone.")
    size, notes = next(iter(known.values())).images.shape[-1], []
    found = {
        name: known.get(name) or folders.read_folder(source, size, None, restricted, notes=notes)
        for name, source in given.items()
    }
    return found["real"], found["synthetic"], found.get("holdout"), {}, notes


def _is_known(source):
    return not Path(source).exists() and str(source).partition(":")[0] in datasets.names()


def _known(source, image_size):
    name, _, split = str(source).partition(":")
    return datasets.load(name, split or "train", image_size)


def default_extractor(image_size):
    """EfficientNet-Lite0 with ImageNet's weights, reading at 64 px what is no larger, and at 128 px the rest."""
    return efficientnet_lite0(64 if image_size <= 64 else 128)


def _check_shapes(real, synthetic, holdout):
    shapes = {"real": real.images.shape[1:], "synthetic": synthetic.images.shape[1:]}
    shapes |= {"holdout": holdout.images.shape[1:]} if holdout is not None else {}
    if len(set(shapes.values())) > 1:
        stated = ", ".join(f"{name} {' x '.join(map(str, shape))}" for name, shape in shapes.items())
        raise EvidenceError(
            f"The sets have images of different shapes ({stated}): give all the same channels and size."
        )
    for name, images in (("real", real), ("synthetic", synthetic), ("holdout", holdout)):
        if images is not None and len(images) < FEWEST:
            raise EvidenceError(f"The {name} set has {len(images)} images; fewer than {FEWEST} say nothing.")
        if images is not None and len(np.unique(images.subjects)) < FEWEST_APART:
            raise EvidenceError(
                f"The {name} set shows {len(np.unique(images.subjects))} subjects; with fewer than {FEWEST_APART} "
                f"there is no telling one from the next."
            )


def _without_overlap(real, holdout, notes):
    """The held-out images whose pixels and subjects are not among the real ones; what is left out is noted."""
    if holdout is None:
        return None
    same = np.isin(image_digests(holdout.images), image_digests(real.images))
    if "image" not in (real.subject_kind, holdout.subject_kind):
        same |= np.isin(holdout.subjects, real.subjects)
    if same.any():
        notes.append(f"{int(same.sum())} held-out images repeat a training image or show its subject: left out.")
    if (~same).sum() < FEWEST:
        raise EvidenceError(f"All but {int((~same).sum())} held-out images are training images too: give others.")
    return holdout.subset(~same) if same.any() else holdout


def _described(images):
    known = images.subject_kind != "image"
    return {
        "name": images.name,
        "images": len(images),
        "shape": list(images.images.shape[1:]),
        "subjects": len(np.unique(images.subjects)) if known else None,
        "classes": list(images.classes),
        "origin": images.origin,
        "licence": images.licence,
        "restricted": images.restricted,
        "sha256": images.content_hash,
    }


def _subjects(images, rows=slice(None)):
    """Whose images the rows are, None where nobody knows."""
    return None if images.subject_kind == "image" else images.subjects[rows]


def _sample(count, most, rng):
    return np.sort(rng.permutation(count)[:most])


# --- attacks ------------------------------------------------------------------------------------------------


def _attacks(sets, views, extractor, cache, seed, missing):
    """{name: row of the attack, with its two controls and whether it is believed}."""
    parts = _held_out_parts(sets.get("holdout"), seed)
    if parts is None:
        missing.append(
            f"membership attacks: they need {4 * FEWEST_APART} held-out real images or more, better hundreds"
        )
        return {}
    rng = np.random.default_rng(seed)
    members = _sample(len(sets["real"]), CANDIDATES, rng)
    others, posing, left = parts
    others = others[_sample(len(others), CANDIDATES, rng)]
    whose = _subjects(sets["real"], members), _subjects(sets["holdout"], others)
    inside, held_out = views["real"].rows(members), views["holdout"]
    outside, reference = held_out.rows(others), held_out.rows(np.concatenate([posing, left]))
    found = suite.attack(inside, outside, views["synthetic"], reference, *whose, seed=seed)
    # held-out images posing as released ones: whatever is found now is no leak
    quiet = suite.attack(inside, outside, held_out.rows(posing), held_out.rows(left), *whose, seed=seed, level=0.995)
    planted = _where_copies_are(inside, outside, views["synthetic"], reference, whose, extractor, cache, seed)
    return {name: _attack_row(result, quiet[name], planted[name]) for name, result in found.items()}


def _held_out_parts(holdout, seed):
    """Rows of the non-members, of those that pose as released, and of the attacker's own; None if there are too few."""
    if holdout is None:
        return None
    parts = subject_split(holdout.subjects, (0.5, 0.25, 0.25), seed)
    return (
        parts
        if min(len(np.unique(holdout.subjects[part])) for part in parts) >= 2 and min(map(len, parts)) >= FEWEST_APART
        else None
    )


def _where_copies_are(members, others, released, reference, whose, extractor, cache, seed):
    """The attacks on a few members alone, altered copies of whom are hidden among the released images."""
    rng = np.random.default_rng(seed + 1)
    chosen = _sample(len(members), PLANTS, rng)
    copies = planted_copies(members.pixels[chosen], seed)
    hidden = suite.View(copies, features(copies, extractor, cache))
    among = released.rows(_sample(len(released), AMONG, rng))
    subjects = None if whose[0] is None else whose[0][chosen], whose[1]
    return suite.attack(members.rows(chosen), others, suite.join(among, hidden), reference, *subjects, seed=seed)


def planted_copies(images, seed):
    """One altered copy of each image (N, C, H, W), every kind of `plants.KINDS` in turn."""
    copies = np.empty_like(images)
    for i, kind in enumerate(KINDS):
        copies[i :: len(KINDS)] = plant(images, kind, seed)[i :: len(KINDS)]
    return copies


def _attack_row(found, quiet, planted):
    """Believed if the interval holds 0.5 where nothing leaks (99.5 %: one attack in 200 is wrongly set aside) and lies
    above it where copies are.
    """
    return found.row() | {
        "control": {
            "no leak": {"auc": quiet.auc, "interval": [quiet.low, quiet.high]},
            "planted copies": {"auc": planted.auc, "interval": [planted.low, planted.high]},
        },
        "believed": bool(quiet.low <= 0.5 <= quiet.high and planted.low > 0.5),
    }


def _attack_findings(attacks):
    """The strongest believed attack, by area and at one false alarm in a hundred."""
    believed = {name: row for name, row in attacks.items() if row["believed"]}
    if not believed:
        return {}
    strongest = max(believed, key=lambda name: believed[name]["auc"])
    found = {"attack_auc": (believed[strongest]["auc"], believed[strongest]["interval"], strongest)}
    sharpest = max(believed, key=lambda name: believed[name]["tpr_at_1pct_fpr"])
    if believed[sharpest]["non_members"] >= 100:
        row = believed[sharpest]
        found["attack_tpr_at_1pct_fpr"] = (row["tpr_at_1pct_fpr"], row["tpr_interval"], sharpest)
    return found


# --- measures -----------------------------------------------------------------------------------------------


def _distances(sets, views, extractor, cache, seed):
    """Distances between sets in features, at one number of images for the synthetic and the held-out ones."""
    rng, holdout = np.random.default_rng(seed), views.get("holdout")
    n = min(MOST, *(len(view) for name, view in views.items() if name != "real"))
    real = _sample(len(views["real"]), MOST, rng)

    def against(name):
        rows = _sample(len(views[name]), n, rng)
        whose = _subjects(sets["real"], real), _subjects(sets[name], rows)
        return measures_with_intervals(views["real"].features[real], views[name].features[rows], *whose, seed=seed)

    found, control = against("synthetic"), against("holdout") if holdout is not None else None
    average = anchor_sets(sets["real"].images[real])["mean"][:1].numpy()
    worthless = set_measures(views["real"].features[real], np.repeat(features(average, extractor, cache), n, 0))
    for name, row in found.items():
        row["control"] = control and {"what": HELD_OUT} | {key: control[name][key] for key in ("value", "interval")}
        row["baseline"] = {"what": "the average training image, repeated", "value": worthless[name]}
        row["images"] = n
    found["frechet_distance"]["name"] = extractor.frechet_name
    return found


def _nearness(views):
    """Two measures of how near released images lie to the training images; without held-out ones they say nothing."""
    if "holdout" not in views:
        return {}
    real, synthetic, holdout = (views[name].features for name in ("real", "synthetic", "holdout"))
    found = membership.authenticity(synthetic, real, holdout)
    near, far = nearest(synthetic, real)[0], nearest(holdout, real)[0]
    closer = int((near < np.median(far)).sum())
    return {
        "authenticity": {
            "value": found.share, "interval": [found.low, found.high], "direction": "higher",
            "control": {"what": HELD_OUT, "value": found.control, "interval": [found.control_low, found.control_high]},
        },
        "closer_than_held_out": {
            "value": closer / len(near), "interval": list(clopper_pearson(closer, len(near))), "direction": "lower",
            "control": {"what": HELD_OUT, "value": float((far < np.median(far)).mean()), "interval": None},
        },
    }  # fmt: skip


def _kept(measures):
    """Coverage as a share of what held-out images cover, with the spread of both."""
    row = measures["coverage"]
    if not row["control"] or not row["control"]["value"]:
        return {}
    value = row["value"] / row["control"]["value"]
    halves = [
        (part["interval"][1] - part["interval"][0]) / 2 / part["value"]
        for part in (row, row["control"])
        if part["value"]
    ]
    half = value * float(np.hypot(*halves)) if len(halves) == 2 else row["interval"][1] / row["control"]["value"]
    return {"coverage_kept": (value, [max(value - half, 0.0), value + half], "")}


# --- copies -------------------------------------------------------------------------------------------------


def _copies(sets, files):
    """Released images that repeat a training image, and pairs of images, the flagged and then the most alike first."""
    real, synthetic, holdout = (sets.get(name) for name in ("real", "synthetic", "holdout"))
    whose = _subjects(real), None if holdout is None else _subjects(holdout)
    found = duplicates.flag_copies(synthetic.images, real.images, holdout and holdout.images, *whose)
    fine = found.matches["fine"]
    alike = np.argsort(-fine.likeness, kind="stable")
    worst = np.concatenate([found.flagged, alike[~np.isin(alike, found.flagged)]])[:WORST]
    partner = dict(zip(found.flagged.tolist(), found.real.tolist()))
    partners = [partner.get(int(i), int(fine.indices[i])) for i in worst]
    rows = [
        {
            "synthetic": _called(files, "synthetic", i),
            "real": _called(files, "real", j),
            "similarity": float(fine.similarity[i]),
            "flagged": int(i) in partner,
        }
        for i, j in zip(worst, partners)
    ]
    document = {
        "as_alike_as_copies": _as_alike_as_copies(fine, real, holdout, whose),
        "planted": {"found": _planted_found(real, holdout, whose), "of": PLANTS},
        "flagged": len(found.flagged),
        "exact": len(found.exact),
        "expected_false_flags": found.expected_false,
        "chance_seldom_passes": found.false_high,
        "control": {"flagged": found.control_flagged, "expected": found.control_expected},
        "against_held_out": {"flagged": found.reverse_flagged, "expected": found.reverse_expected},
        "note": " ".join(found.notes),
        "worst": rows,
    }
    return document, tuple((synthetic.images[i], real.images[j]) for i, j in zip(worst, partners))


def _as_alike_as_copies(fine, real, holdout, whose):
    """Released images as alike to a training image as its JPEG copy is; 0 where honest images lie within six standard
    deviations of that, on Fisher's scale: there it proves nothing.
    """
    alike = duplicates.copy_similarity(real.images)
    judged, owner = (holdout, whose[1]) if holdout is not None else (real, whose[0])
    honest = duplicates.near_duplicates(judged.images, real.images, owner, whose[0], view="fine").similarity
    honest = np.arctanh(honest.clip(-FULL, FULL))
    far = honest.mean() + FAR * honest.std() < np.arctanh(min(alike, FULL))
    return int((fine.similarity >= alike).sum()) if far else 0


def _planted_found(real, holdout, whose):
    """How many of altered copies of real images the same search flags."""
    rows = np.linspace(0, len(real) - 1, PLANTS).astype(int)
    copies = planted_copies(real.images[rows], seed=0)
    return len(duplicates.flag_copies(copies, real.images, holdout and holdout.images, *whose, reverse=False).flagged)


def _called(files, name, row):
    """A file's name, or the row where there are no files."""
    return str(files[name][row]) if name in files else int(row)


def _copies_finding(copies):
    """Copies beyond false flags: at least those that chance would not bring (95 %), and those that nothing honest is
    near to. Where the search misses most planted copies, only what it does find counts.
    """
    flagged, certain = copies["flagged"], max(copies["exact"], copies["as_alike_as_copies"])
    beyond = max(flagged - copies["expected_false_flags"], float(certain))
    surely = float(max(flagged - copies["chance_seldom_passes"], certain))
    if 2 * copies["planted"]["found"] < copies["planted"]["of"] and not surely:
        return None, None, "the search missed more than half of the planted copies, so its silence proves nothing"
    note = (
        f"{flagged} flagged, {copies['expected_false_flags']:.2g} expected by chance; {certain} as alike as a copy, "
        f"which no held-out image is"
    )
    return beyond, [min(surely, beyond), beyond], note


# --- use ----------------------------------------------------------------------------------------------------


def _use(sets, extractor, cache, missing):
    """Measures of a classifier trained on each set and tested on held-out images, and what of its use is kept."""
    why_not = _no_classifier(sets)
    if why_not:
        missing.append(f"use: {why_not}")
        applies = len(sets["real"].classes) > 1
        return {"measures": {}, "finding": {} if applies else {"utility_kept": NOT_APPLICABLE}}
    head = FrozenBackbone(extractor, flips=False, cache=cache, training=Training(epochs=100))
    rows = {
        row["train on"]: row for row in utility.utility_table(sets["synthetic"], sets["real"], sets["holdout"], head)
    }
    measures = {metric: _use_row(metric, rows) for metric in ("auroc", "balanced_accuracy")}
    share = rows["synthetic"]["auroc"]["kept"]
    if share["low"] is None or not np.isfinite(share["value"]):
        note = "trained on real images the classifier is hardly above chance, so there is no use to keep"
        return {"measures": measures, "finding": {"utility_kept": (None, None, note)}}
    return {
        "measures": measures,
        "finding": {"utility_kept": (share["value"], [share["low"], share["high"]], head.name)},
    }


def _use_row(metric, rows):
    synthetic, real, majority = (rows[name][metric] for name in ("synthetic", "real", "majority"))
    return {
        "value": synthetic["value"],
        "interval": [synthetic["low"], synthetic["high"]],
        "direction": "higher",
        "control": {
            "what": "trained on the real images",
            "value": real["value"],
            "interval": [real["low"], real["high"]],
        },
        "baseline": {"what": "always the most frequent class", "value": majority["value"]},
    }


def _no_classifier(sets):
    """Why no classifier can be trained on the synthetic images and tested on held-out ones; "" if one can."""
    if "holdout" not in sets:
        return "a classifier needs held-out real images to be tested on, which were not given"
    if len(sets["real"].classes) < 2:
        return "the images have no classes (one sub-folder each), so no classifier can be trained"
    if len({s.classes for s in sets.values()}) > 1:
        return "the sets name different classes, so no classifier can be trained on one and tested on another"
    if any(len(np.unique(s.labels)) < len(s.classes) for s in sets.values()):
        return "a class is missing in one of the sets"
    return ""
