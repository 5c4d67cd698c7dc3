"""What else tells melanoma: the archive, the lesion's area, and the black frame of a dermatoscope.

Paper: Carrasco Limeros et al. 2022 (arXiv 2208.11702), Sec. 3.1 (the archives), 4.3 and 5 (frames, area). Chapter:
stylegan2_dermatology. All added malignant images come from other archives than all benign ones, the authors find frames
on malignant images alone, and they suspect the area. None of it can be told apart in their data. Here the archive is
arithmetic, the area is measured without a segmentation, and the frame is planted on images that are known with and
without it.
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from lookalike.data import datasets, phantoms
from lookalike.metrics import as_images, to_unit
from lookalike.metrics.intervals import bootstrap, paired_over_images
from lookalike.metrics.scores import auroc
from lookalike.training.lesion_classifiers import (
    HIDDEN,
    METRICS,
    lesion_classifier,
    load_scores,
    score_images,
    summarise,
    train_watched,
)
from lookalike.training.mass_attacks import load_made

LUMA = (0.299, 0.587, 0.114)  # Rec. 601
DISC = 0.9  # of half a side: a frame begins outside, so it is no part of a lesion's area
RING, CORNERS = (0.7, 0.9), 1.1  # in halves of a side: skin inside a frame, and where a round frame is surely black
FEWEST = 10  # images of a class for a correlation within it
SPLITS = ("train", "val", "test")
TESTED_ON = ("same", "reversed", "none")
BENIGN = ("rest", "none")


# --- the archive --------------------------------------------------------------------------------------------


def archive_arithmetic(benign=32542, external=4522, malignant=5106):
    """What a classifier scores that knows only the archive: "external" is malignant, everything else benign.

    benign: images of the home archive; malignant: all, of which `external` come from other archives, which hold no
    benign one (paper, Sec. 3.1). Shares from 0 to 1, exact: "accuracy"; "auc", where images of one archive are level;
    "sensitivity", at a specificity of 1; "balanced_accuracy"; "majority", the accuracy of always answering the larger
    class; "images".
    """
    if not (0 <= external <= malignant and malignant > 0 and benign > 0):
        raise ValueError("There are benign and malignant images, and the external ones are some of the malignant ones.")
    images, found = benign + malignant, external / malignant
    return {
        "accuracy": (benign + external) / images, "auc": (1 + found) / 2, "balanced_accuracy": (1 + found) / 2,
        "sensitivity": found, "majority": max(benign, malignant) / images, "images": images,
    }  # fmt: skip


# --- what a picture shows -----------------------------------------------------------------------------------


def dark_area(images):
    """Share (N,) of an image's disc that is darker than Otsu's threshold on luma: a lesion's area, 0 to 1.

    images (N, C, S, S), uint8 or in [-1, 1]. The disc has nine tenths of the image's width, which leaves a frame out.
    No segmentation: dark hair counts, pale parts of a lesion do not. An image of one grey level has area 0.
    """
    levels = luma(images)
    levels = levels[:, _radius(*levels.shape[1:]) < DISC]
    return (levels <= otsu(levels)[:, None]).mean(1)


def frame_score(images):
    """How far a black frame covers the corners (N,), 0 to 1, larger means more frame.

    The light that each corner lacks against the ring of skin inside it, a share, averaged over the four corners. A
    frame on all corners gives nearly 1, one on two corners 0.5, a vignette 0.1; a dark lesion in the ring hides a
    frame in part. images (N, C, S, S), uint8 or in [-1, 1], from 16 px.
    """
    levels = luma(images).astype(float)
    height, width = levels.shape[1:]
    radius = _radius(height, width)
    ring = np.median(levels[:, (radius >= RING[0]) & (radius < RING[1])], 1)
    outside = radius > CORNERS
    halves = [(rows, columns) for rows in _halves(height) for columns in _halves(width)]
    corners = [np.median(levels[:, rows, columns][:, outside[rows, columns]], 1) for rows, columns in halves]
    return np.mean([np.clip(1 - corner / np.maximum(ring, 1), 0, 1) for corner in corners], 0)


def luma(images):
    """Grey levels uint8 (N, H, W) of images (N, C, H, W), C 1 or 3, as Rec. 601 weighs colours."""
    unit = to_unit(as_images(images)).numpy()
    if unit.shape[1] not in (1, 3):
        raise ValueError(f"Luma needs grey or colour images; these have {unit.shape[1]} channels.")
    grey = unit[:, 0] if unit.shape[1] == 1 else np.tensordot(unit, LUMA, axes=(1, 0))
    return (255 * grey).round().astype(np.uint8)


def otsu(levels):
    """Otsu's threshold (N,) of rows of grey levels uint8 (N, P): the last dark level of the split into dark and bright
    with the largest variance between both (Otsu 1979). -1 for a row of one level, which has no split.
    """
    rows = np.arange(len(levels))[:, None] * 256 + levels
    counts = np.bincount(rows.ravel(), minlength=256 * len(levels)).reshape(-1, 256) / levels.shape[1]
    share, mass = np.cumsum(counts, 1), np.cumsum(counts * np.arange(256), 1)
    spread = share * (1 - share)
    between = (mass[:, -1:] * share - mass) ** 2 / np.where(spread > 1e-12, spread, np.inf)
    return np.where(between.max(1) > 0, between.argmax(1), -1)


def _radius(height, width):
    """Distance (H, W) of the pixel centres from the middle, in halves of a side."""
    y, x = ((np.arange(side) + 0.5) / side * 2 - 1 for side in (height, width))
    if min(height, width) < 16:
        raise ValueError(f"These measures need images of 16 px or more, not {height} x {width}.")
    return np.hypot(y[:, None], x)


def _halves(side):
    return slice(0, side // 2), slice(side // 2, side)


# --- area against the classifier ----------------------------------------------------------------------------


def area_confound(
    folder, *, data, image_size, scores, synthetic=None, arms=None, selection="val", cache=None, resamples=2000
):
    """A stage: how well the lesion's area alone tells melanoma, and how closely the classifiers' logits follow it.

    scores: the folder of a `classify_arms` on the same `data` and `image_size`. synthetic: {name: set by name, or
    folder with samples.safetensors}, scored by the same networks. arms: some of its arms only. selection: whose epochs
    the real images' logits are of; made images are scored at those of "val".

    Returns "auc": {set: AUC of `dark_area` for melanoma, 0.5 says nothing}, None where a set lacks a class; "area":
    {set: {class: "images", "mean", "median"}}; and "correlations", rows of Spearman's rho of area and logit, -1 to 1:
    "set", "arm", "part" ("all", or within one class of ten images or more: what is left when the class is known),
    "value", "low", "high", "n". Intervals are BCa over the subjects of real images and over made images; value is None
    where all areas or logits are equal. The set "real" is the test split. Writes areas.safetensors: areas (N,) by set
    and, by set and arm, logits (N,), the mean over seeds, and labels, see `load_areas`.
    """
    real = datasets.load(data, "test", image_size)
    found = load_scores(scores)
    if not np.array_equal(found["labels"], real.labels):
        raise ValueError(f"{scores} scored other images than the test split of {data}: give the same data.")
    chosen = list(found["arms"]) if arms is None else list(arms)
    if absent := [name for name in chosen if name not in found["arms"]]:
        raise ValueError(f"There is no arm {absent[0]!r}; the arms are {', '.join(found['arms'])}.")
    sets = {"real": real} | {name: load_made(of, image_size, real) for name, of in (synthetic or {}).items()}
    logits = {"real": {name: found["arms"][name][selection] for name in chosen}}
    logits |= {name: score_images(scores, sets[name], chosen, cache) for name in sets if name != "real"}
    areas = {name: dark_area(images.images) for name, images in sets.items()}
    means = {name: {arm: of.mean(1) for arm, of in by_arm.items()} for name, by_arm in logits.items()}
    _save_areas(folder, sets, areas, means)
    correlations = [
        {"set": name, "arm": arm} | row
        for name, images in sets.items()
        for arm, of in means[name].items()
        for row in correlation_rows(areas[name], of, images.labels, images.subjects, images.classes, resamples)
    ]
    auc = {
        name: _area_auc(s.labels, areas[name], s.subjects, resamples) if len(set(s.labels.tolist())) == 2 else None
        for name, s in sets.items()
    }
    area = {name: _by_class(areas[name], images) for name, images in sets.items()}
    return {"auc": auc, "area": area, "correlations": correlations}


def load_areas(folder):
    """{set: {"labels" (N,), "area" (N,), "logits": {arm: (N,)}}} of a stage `area_confound`."""
    from safetensors import safe_open

    found = {}
    with safe_open(Path(folder) / "areas.safetensors", "np") as opened:
        names = opened.metadata()
        for key in opened.keys():  # noqa: SIM118 - it is no dict
            of, kind, *arm = key.split("/")
            row = found.setdefault(names[of], {"logits": {}})
            (row["logits"] if arm else row)[names[arm[0]] if arm else kind] = opened.get_tensor(key)
    return found


def correlation_rows(area, logits, labels, subjects=None, classes=("benign", "melanoma"), resamples=2000):
    """Spearman's rho of area (N,) and logits (N,), over all images and within each class: rows, see `area_confound`."""
    parts = {"all": np.ones(len(labels), bool)} | {name: labels == k for k, name in enumerate(classes)}
    rows = []
    for name, inside in parts.items():
        if inside.sum() < FEWEST:
            continue
        whose = None if subjects is None else subjects[inside]
        interval = bootstrap(spearman, area[inside], logits[inside], subjects=whose, resamples=resamples)
        value = None if np.isnan(interval["value"]) else interval["value"]
        rows.append({"part": name} | interval | {"value": value})
    return rows


def spearman(first, second, *, weights=None):
    """Spearman's rank correlation of two arrays (N,), -1 to 1, ties at their mean rank; NaN where one is constant.

    weights (R, N), how often each row counts, gives (R,) at once (`bootstrap`).
    """
    counts = np.ones((1, len(first))) if weights is None else np.asarray(weights, float)
    total = counts.sum(1, keepdims=True)
    ranks = [_ranks(np.asarray(values), counts) for values in (first, second)]
    x, y = (rank - (counts * rank).sum(1, keepdims=True) / total for rank in ranks)
    norm = np.sqrt((counts * x * x).sum(1) * (counts * y * y).sum(1))
    tiny = 1e-12 * total[:, 0] ** 3
    found = np.where(norm > tiny, (counts * x * y).sum(1) / np.where(norm > tiny, norm, 1), np.nan)
    return float(found[0]) if weights is None else found


def _ranks(values, counts):
    """Mean rank (R, N), up to a constant, of each row where rows count `counts` (R, N) times."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    new = np.r_[True, ordered[1:] != ordered[:-1]]
    of_group = np.add.reduceat(counts[:, order], np.flatnonzero(new), 1)
    ranks = np.cumsum(of_group, 1) - of_group / 2
    place = np.empty(len(values), int)
    place[order] = np.cumsum(new) - 1
    return ranks[:, place]


def _area_auc(labels, area, subjects, resamples):
    return bootstrap(auroc, labels, area, subjects=subjects, resamples=resamples)


def _by_class(area, images):
    parts = {name: area[images.labels == k] for k, name in enumerate(images.classes)}
    return {
        name: {"images": len(of), "mean": float(of.mean()) if len(of) else None,
               "median": float(np.median(of)) if len(of) else None}
        for name, of in parts.items()
    }  # fmt: skip


def _save_areas(folder, sets, areas, means):
    arrays, names = {}, {}
    for i, (name, images) in enumerate(sets.items()):
        names[f"set{i}"] = name
        arrays |= {f"set{i}/labels": images.labels, f"set{i}/area": areas[name]}
        for j, (arm, of) in enumerate(means[name].items()):
            names[f"arm{j}"] = arm
            arrays[f"set{i}/logits/arm{j}"] = np.ascontiguousarray(of)
    save_file(arrays, Path(folder) / "areas.safetensors", metadata=names)


# --- planted frames -----------------------------------------------------------------------------------------


def frame_rule(share, benign_share=0.0):
    """Accuracy, 0 to 1, of the best answer from the frame alone, on as many benign as malignant images.

    share, benign_share: of the malignant and of the benign training images that have a frame. {"same", "reversed",
    "none"}: test images framed as in training, with both shares exchanged, and without frames.
    """
    if not (0 <= share <= 1 and 0 <= benign_share <= 1):
        raise ValueError(f"Shares lie in [0, 1], not {share} and {benign_share}.")
    edge = abs(share - benign_share) / 2
    return {"same": 0.5 + edge, "reversed": 0.5 - edge, "none": 0.5}


def planted_frames(
    folder, *, image_size, counts, shares, seed, feature_size=64, extractor="efficientnet_lite2", epochs=20,
    seeds=(0, 1, 2), benign="rest", flips=False, cache=None, hidden=HIDDEN,
    resamples=2000,
):  # fmt: skip
    """A stage: how much of a classifier's accuracy is the frame, on phantoms of which all is known.

    Each phantom is rendered with and without a frame; of the malignant ones a `share` of `shares` gets the framed
    picture, of the benign ones 1 - share (benign "rest": 0.5 says nothing) or none (benign "none": 0 says nothing). The
    head (`lesion_classifier`) trains on such images and such validation images choose the epoch. It is then tested on
    the same lesions three times: framed by the "same" shares, by "reversed" ones, and with "none". counts: images of
    "train", "val" and "test", half of each class.

    Returns "classifier", "counts"; "rows" by "share", "benign_share" and "tested_on": "framed" (test images with a
    frame by class), "rule" (`frame_rule`), and the scores of `summarise`; and "drops", rows by "share" and "to"
    ("reversed", "none") with, for each metric, the score on the same frames less the one there, paired over patients:
    {"value", "low", "high", "n", "p"}, above 0 where the frame helped. Writes logits (N, S) to scores.safetensors.
    """
    if benign not in BENIGN:
        raise ValueError(f"benign is one of {', '.join(BENIGN)}, not {benign!r}.")
    classifier = lesion_classifier(extractor, feature_size, epochs, flips=flips, cache=cache, hidden=hidden)
    parts = {
        split: _both_ways(classifier, counts[split], len(SPLITS) * seed + i, split, image_size)
        for i, split in enumerate(SPLITS)
    }
    test = parts["test"]["set"]
    settings = {"subjects": test.subjects, "resamples": resamples}
    rows, drops, saved = [], [], {"labels": test.labels}
    for place, share in enumerate(shares):
        pair = (1 - share if benign == "rest" else 0.0, share)
        rule = frame_rule(share, pair[0])
        logits = _logits_by_frames(classifier, parts, pair, seeds)
        for name, of in logits.items():
            framed = np.bincount(test.labels[_framed(parts["test"], _probability(pair, name))], minlength=2).tolist()
            where = {"share": share, "benign_share": pair[0], "tested_on": name, "framed": framed, "rule": rule[name]}
            rows.append(where | summarise(test.labels, of, **settings))
            saved[f"{place}/{name}"] = np.ascontiguousarray(of)
        for name in TESTED_ON[1:]:
            drop = partial(paired_over_images, labels=test.labels, first=logits["same"], second=logits[name])
            drops.append({"share": share, "to": name} | {m: drop(of, **settings) for m, of in METRICS.items()})
    save_file(saved, Path(folder) / "scores.safetensors")
    return {"classifier": classifier.name, "counts": dict(counts), "rows": rows, "drops": drops}


def _both_ways(classifier, n, seed, split, image_size):
    """The same phantoms without and with a frame: the set, views of both (2, N, V, ...), and a draw (N,) per image."""
    made = [
        phantoms.dermoscopy(n, seed, split=split, image_size=image_size, frame_probability=(p, p)).image_set
        for p in (0.0, 1.0)
    ]
    views = torch.stack([classifier.views(images.images, split == "train") for images in made])
    return {"set": made[0], "views": views, "draw": np.random.default_rng([seed, 0]).random(n)}


def _framed(part, probability):
    return part["draw"] < np.asarray(probability)[part["set"].labels]


def _with_frames(part, probability):
    """Views (N, V, ...) and labels (N,), a frame on each image with the `probability` of its class."""
    chosen = _framed(part, probability).astype(int)
    return part["views"][chosen, torch.arange(len(chosen))], part["set"].labels


def _probability(pair, tested_on):
    return {"same": pair, "reversed": pair[::-1], "none": (0.0, 0.0)}[tested_on]


def _logits_by_frames(classifier, parts, pair, seeds):
    """{"same", "reversed", "none": logits (N, S) of the test images}, at the epochs that the validation images choose.

    Trained and chosen with frames by `pair`, the probabilities of the classes.
    """
    train, val = (_with_frames(parts[split], pair) for split in ("train", "val"))
    tested = {"val": val} | {name: _with_frames(parts["test"], _probability(pair, name)) for name in TESTED_ON}
    found = {name: [] for name in TESTED_ON}
    for seed in seeds:
        _, _, seen = train_watched(classifier, *train, seed, tested, "val")
        balanced = [METRICS["balanced_accuracy"](val[1], logits) for logits in seen["val"]]
        for name in TESTED_ON:
            found[name].append(seen[name][int(np.argmax(balanced))])
    return {name: np.stack(of, 1) for name, of in found.items()}
