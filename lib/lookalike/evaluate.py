"""Three sets of images in, evidence out: measures, attacks, their controls, and a verdict against stated thresholds.

`real` are the images that the generator was trained on, `synthetic` those that are to be released, `holdout` real ones
of the same source that the generator never saw. No measure stands alone: beside it stand the same measure with held-out
real images in the place of the synthetic ones (the control: what an ideal generator would give) and with the average
image (the baseline: what is worth nothing). No attack is believed before it stayed quiet where nothing can leak and
found copies that were planted among the very images at hand. Evidence, not legal advice.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from lookalike import calibration, copies
from lookalike.data import datasets, folders
from lookalike.data.splits import image_digests
from lookalike.metrics import utility
from lookalike.metrics.classifiers import FrozenBackbone, Training
from lookalike.metrics.compared import measures_with_intervals, set_measures
from lookalike.metrics.extractors import efficientnet_lite0
from lookalike.metrics.features import features
from lookalike.metrics.intervals import clopper_pearson
from lookalike.metrics.neighbours import nearest
from lookalike.privacy import controls, membership, suite
from lookalike.provenance import provenance
from lookalike.verdict import NOT_APPLICABLE, EvidenceError, judge, limits

MOST = 5000  # images of a set that distances between sets are taken of; the searches for copies see all of them
FEWEST = 20  # images in a set
FEWEST_APART = 10  # subjects in a set
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
    _check(real, synthetic, holdout)
    notes, missing = list(notes), []
    extractor = (extractor or default_extractor(real.images.shape[-1])).for_channels(real.images.shape[1])
    holdout = _without_overlap(real, holdout, notes)
    sets = {"real": real, "synthetic": synthetic} | ({"holdout": holdout} if holdout is not None else {})
    cache = None if any(s.restricted for s in sets.values()) else cache
    views = {name: suite.View(s.images, features(s.images, extractor, cache)) for name, s in sets.items()}
    copied, pairs = _copies(sets, files or {})
    measures = _distances(sets, views, extractor, cache, seed) | _nearness(views)
    attacks, difference = _attacks(sets, views, extractor, cache, seed, missing)
    use = _use(sets, extractor, cache, missing)
    findings = copies.findings(copied, len(synthetic)) | controls.findings(attacks) | _kept(measures) | use["finding"]
    document = {
        **judge(findings, thresholds),
        "released": "images only",
        "threat_model": THREATS,
        "sets": {name: _described(s) for name, s in sets.items()},
        "features": extractor.name,
        "copies": copied,
        "measures": measures | use["measures"],
        "attacks": attacks,
        "training_against_held_out": difference,
        "thresholds": {name: limit for name, (limit, *_) in stated.items()},
        "not_tested": [*missing, *NOT_TESTED],
        "power": calibration.quote(),
        "notes": [*notes, *_unknown_subjects(sets)],
        "plants": min(controls.PLANTS, len(real)),
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


def _check(real, synthetic, holdout):
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


def _unknown_subjects(sets):
    unknown = [name for name, images in sets.items() if name != "synthetic" and images.subject_kind == "image"]
    if not unknown:
        return []
    return [
        f"Nobody said whose the {' and '.join(unknown)} images are, so each counts as a subject of its own: if people "
        f"have several, every interval is too narrow."
    ]


def _copies(sets, files):
    real, synthetic, holdout = (sets.get(name) for name in ("real", "synthetic", "holdout"))
    whose = _subjects(real), None if holdout is None else _subjects(holdout)

    def names(name, row):
        return str(files[name][row]) if name in files and not sets[name].restricted else int(row)

    return copies.search(synthetic.images, real.images, holdout and holdout.images, whose, names)


def _attacks(sets, views, extractor, cache, seed, missing):
    """The attacks with their controls; none, and why, where the images do not allow any."""
    parts = controls.held_out_parts(sets["holdout"], seed) if "holdout" in sets else None
    if parts is None:
        missing.append(f"membership attacks: they need {4 * controls.FEWEST} held-out real images, better hundreds")
        return {}, None
    if len(np.unique(image_digests(sets["synthetic"].images))) < FEWEST:
        missing.append(f"membership attacks: fewer than {FEWEST} of the released images differ from one another")
        return {}, None
    whose = _subjects(sets["real"]), _subjects(sets["holdout"])
    return controls.attacks_with_controls(
        views["real"], views["holdout"], views["synthetic"], parts, whose, extractor, cache, seed
    )


def _sample(count, most, rng):
    return np.sort(rng.permutation(count)[:most])


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
    average = sets["real"].images.mean(0, dtype=np.float64).round().astype(np.uint8)[None]
    worthless = set_measures(views["real"].features[real], np.repeat(features(average, extractor), n, 0))
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
