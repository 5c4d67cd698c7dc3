"""Attacks on a released set of masses and its card, the false leak of another source, and what the data hold.

Paper: Osuala et al. 2024 (arXiv 2407.12669), Sec. 4, which asks for attacks on its synthetic images and has none.
Chapter: mcgan_dp. Non-members are held-out images of the members' own source. Images of another source, here BCDR, are
told from the training images without any released one: an attack against them measures two scanners, not a leak. It
is run all the same, to show what that mistake would report.
"""

import dataclasses
from pathlib import Path

import numpy as np

from lookalike import card
from lookalike.data import datasets
from lookalike.data.image_set import ImageSet
from lookalike.data.splits import exact_duplicates, image_digests
from lookalike.evaluate import evaluate
from lookalike.metrics.extractors import efficientnet_lite0
from lookalike.metrics.features import features
from lookalike.privacy import controls, suite
from lookalike.privacy.attack import attack_result
from lookalike.privacy.reidentification import ORIGINS, cut_off, distance_attacks
from lookalike.training.cells import load_samples

CUT_OFFS = (0.05, 1 / 3)  # shares of the candidates; the paper on pGAN counts origins among so many
ATTACKS = {"min": "nearest", "min_over_median": "pairwise"}  # pGAN's text and its code, on pixels
FALSE_LEAK = (
    "A false leak: the non-members are of another source than the training images, so whatever tells the sources "
    "apart passes for membership."
)


def attack_release(
    folder, *, data, synthetic, image_size, feature_size, holdout_splits=("val", "test"), other="", cache=None, seed=0
):
    """A stage: the evidence on releasing `synthetic`, made from the train split of `data`, in few numbers.

    synthetic: a set by name, or the folder of a stage that left samples.safetensors; brought to `image_size`, as all
    sets are (`datasets.load`). Held out: `holdout_splits` of `data` together. other: a set of another source by name
    (its test split); "" leaves it out. cache: a folder for features; those of restricted sets never go there.
    Writes card.json, card.md and card.html to `folder`, no image in them. Returns "verdict", "privacy", "use",
    "criteria", "attacks", "told_apart", "copies", "measures" of the evidence document, "pixel_attacks" and "cut_offs"
    (see those functions), and "false_leak" (None without `other`).
    """
    extractor = efficientnet_lite0(feature_size)
    real = datasets.load(data, "train", image_size)
    released = load_made(synthetic, image_size, real)
    outside = {split: datasets.load(data, split, image_size) for split in holdout_splits}
    holdout = together(list(outside.values()))
    evidence = evaluate(real, released, holdout, extractor=extractor, cache=cache, seed=seed)
    files = card.write(evidence, folder)
    found = in_short(evidence.document) | {"files": [path.name for path in files], "false_leak": None}
    if other:
        outside["other"] = elsewhere = datasets.load(other, "test", image_size)
        found["false_leak"] = false_leak(real, released, elsewhere, extractor, cache, seed)
    scores = pixel_scores(real, released, outside)
    return found | {
        "pixel_attacks": pixel_attacks(real, outside, scores),
        "cut_offs": cut_offs(scores, seed) if set(ORIGINS) <= set(scores) else [],
    }


# --- the sets -----------------------------------------------------------------------------------------------


def load_made(source, image_size, like):
    """A made ImageSet from a set's name or a stage's folder; classes, licence and restriction as of `like`, the real
    images it was made from.
    """
    if str(source) in datasets.names():
        return datasets.load(str(source), "train", image_size)
    images, labels = load_samples(Path(source))
    subjects = np.array([f"made-{i}" for i in range(len(images))])
    return dataclasses.replace(
        like, images=datasets._resized(images, image_size), labels=np.asarray(labels, np.int64), subjects=subjects,
        name=Path(source).name, split="all", origin="synthetic", stand_in_for="", subject_kind="image",
    )  # fmt: skip


def together(sets):
    """Several splits of one set as one ImageSet, in the order given."""
    joined = {name: np.concatenate([getattr(s, name) for s in sets]) for name in ("images", "labels", "subjects")}
    restricted = any(s.restricted for s in sets)
    return dataclasses.replace(sets[0], **joined, split="+".join(s.split for s in sets), restricted=restricted)


# --- the evidence in few numbers ----------------------------------------------------------------------------


def in_short(document):
    """Of an evidence document (`evaluate`) what a page shows: plain JSON without file names and provenance."""
    copied = ("flagged", "expected_false_flags", "exact", "exact_held_out", "as_alike_as_copies", "planted")
    judged = ("value", "interval", "limit", "passes", "verdict", "note")
    return {
        **{name: document[name] for name in ("verdict", "privacy", "use", "features", "not_tested", "notes")},
        "sets": {role: {k: s[k] for k in ("name", "images", "subjects")} for role, s in document["sets"].items()},
        "criteria": [
            {"criterion": name} | {key: row[key] for key in judged} for name, row in document["criteria"].items()
        ],
        "attacks": attack_rows(document["attacks"]),
        "told_apart": document["training_against_held_out"],
        "copies": {name: document["copies"][name] for name in copied},
        "measures": {
            name: {
                "value": row["value"],
                "interval": row["interval"],
                "control": row["control"] and row["control"]["value"],
            }
            for name, row in document["measures"].items()
        },
    }


def attack_rows(attacks):
    """One flat row per attack: its area and 95 % interval, the areas of its controls, and whether it is believed."""
    return [
        {
            "attack": name, "auc": row["auc"], "low": row["interval"][0], "high": row["interval"][1],
            "tpr_at_1pct_fpr": row["tpr_at_1pct_fpr"], "no_leak": row["control"]["no leak"]["auc"],
            "planted": row["control"]["planted copies"]["auc"], "believed": row["believed"],
        }
        for name, row in attacks.items()
    ]  # fmt: skip


def false_leak(real, released, other, extractor, cache=None, seed=0):
    """The attacks of the evidence with images of another source in the place of the held-out ones.

    {"other", "what", "attacks", "told_apart"}: rows as of `attack_rows`, and how well a classifier that sees no
    released image tells the sources apart (0.5 is not at all). Raises if `other` has too few images to be split.
    """
    parts = controls.held_out_parts(other, seed)
    if parts is None:
        raise ValueError(
            f"{other.name} has {len(other)} images, too few for attacks with their controls: leave it out."
        )
    views = [
        suite.View(s.images, features(s.images, extractor, None if s.restricted else cache))
        for s in (real, other, released)
    ]
    whose = tuple(None if s.subject_kind == "image" else s.subjects for s in (real, other))
    planting = None if real.restricted else cache  # copies of members are planted
    rows, apart = controls.attacks_with_controls(*views, parts, whose, extractor, planting, seed)
    return {"other": other.name, "what": FALSE_LEAK, "attacks": attack_rows(rows), "told_apart": apart}


# --- pixels alone -------------------------------------------------------------------------------------------


def pixel_scores(real, released, outside):
    """{"train" or a name of `outside`: {attack of `ATTACKS`: scores (N,)}} of every image against all released ones.

    Larger means more likely a member. Scores of an image do not depend on who else is asked about.
    """
    sets = {"train": real} | outside
    found = {name: distance_attacks(s.images, released.images) for name, s in sets.items()}
    return {name: {attack: getattr(of, kind) for attack, kind in ATTACKS.items()} for name, of in found.items()}


def pixel_attacks(real, outside, scores):
    """Rows of each pixel attack on `real` against each set of `outside`, all images of it: area with its 95 % interval
    over patients; "false" marks another source.
    """
    whose = {name: None if s.subject_kind == "image" else s.subjects for name, s in outside.items()}
    members = None if real.subject_kind == "image" else real.subjects
    rows = []
    for name, others in outside.items():
        for attack in ATTACKS:
            found = attack_result(attack, scores["train"][attack], scores[name][attack], members, whose[name])
            rows.append(
                {"non_members": name, "set": others.name, "attack": attack, "auc": found.auc, "low": found.low,
                 "high": found.high, "members": len(real), "others": len(others), "false": others.name != real.name}
            )  # fmt: skip
    return rows


def cut_offs(scores, seed=0):
    """Shares of train, val and test among the highest pixel scores, of as many candidates of each (pGAN, Table S1).

    Where nothing leaks each share is near a third.
    """
    rng = np.random.default_rng(seed)
    size = min(len(scores[origin]["min"]) for origin in ORIGINS)
    chosen = {origin: rng.permutation(len(scores[origin]["min"]))[:size] for origin in ORIGINS}
    origins = np.repeat(ORIGINS, size)
    rows = []
    for attack in ATTACKS:
        asked = np.concatenate([scores[origin][attack][chosen[origin]] for origin in ORIGINS])
        for share in CUT_OFFS:
            cut = cut_off(asked, origins, max(1, round(share * len(asked))))
            rows.append({"attack": attack, "k": cut.k, "candidates": len(asked), **cut.shares})
    return rows


# --- what the data hold -------------------------------------------------------------------------------------


def check_sets(sets: list[ImageSet]):
    """One row per set: images by class, patients, patients with images of both classes, images that repeat another
    exactly, groups of such images with different labels, and patients and images that another of the sets has too.
    """
    digests = [set(image_digests(s.images)) for s in sets]
    patients = [set() if s.subject_kind == "image" else set(s.subjects.tolist()) for s in sets]
    rows = []
    for i, s in enumerate(sets):
        groups = exact_duplicates(s.images)
        elsewhere = [set().union(*(part for j, part in enumerate(parts) if j != i)) for parts in (patients, digests)]
        rows.append(
            {"set": s.name, "split": s.split, "images": len(s)}
            | {name: int((s.labels == k).sum()) for k, name in enumerate(s.classes)}
            | {
                "patients": len(patients[i]) or None,
                "with_both_labels": len(_of_both_labels(s)) if patients[i] else None,
                "repeats": sum(len(rows) - 1 for rows in groups),
                "contradictory": sum(len(np.unique(s.labels[rows])) > 1 for rows in groups),
                "shared_patients": len(patients[i] & elsewhere[0]),
                "shared_images": len(digests[i] & elsewhere[1]),
            }
        )
    return rows


def _of_both_labels(images):
    """Patients with images of more than one class: the label is the lesion's."""
    owners, codes = np.unique(images.subjects, return_inverse=True)
    classes = np.zeros((len(owners), len(images.classes)), bool)
    classes[codes, images.labels] = True
    return owners[classes.sum(1) > 1]
