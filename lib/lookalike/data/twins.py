"""Slices that look alike: groups of near-twins, and a split that keeps every group on one side.

Paper: Kanagavelu et al. 2024, "MedSynth", Sec. 4.1. Chapter: medsynth. The Alzheimer images are slices of volumes
without any name of a patient, and the published split cuts between them. Nobody can mend that exactly; slices that
correlate almost perfectly can be kept together. Two images count as twins by the correlation of their reduced pixels
alone: no alignment, for slices of one volume lie in one frame. `data.duplicates` asks another question, whether one
image is an altered copy of the other. Twins connect, so a group may hold two images that are not alike: look at
`group_sizes` before choosing a threshold.
"""

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from lookalike.data import datasets
from lookalike.metrics import as_array, as_images
from lookalike.metrics.intervals import clopper_pearson

LONGEST = 52  # a slice of 176 x 208 is compared at a quarter of its size, 44 x 52
ROUNDING = 2e-6  # of a correlation in float32: an exact copy may have 0.999999
ROWS = 512  # of the queries at one time: 13 MB of correlations for 6,400 images
THRESHOLDS = (0.9, 0.95, 0.99, 0.995, 0.999)


def reduced(images):
    """Rows (N, D) float32 of images (N, C, H, W), the longest side 52 px at most: mean 0, length 1, so that the product
    of two rows is the correlation of their pixels. A flat image has none and becomes zeros.
    """
    images = as_array(images)
    rows = torch.cat([_small(as_images(images[start : start + ROWS])) for start in range(0, len(images), ROWS)])
    rows = rows - rows.mean(1, keepdim=True)
    lengths = rows.norm(dim=1, keepdim=True)
    return torch.where(lengths > 1e-4, rows / lengths.clamp(min=1e-4), 0.0).numpy()


def nearest_correlation(images, reference=None):
    """Correlation (N,) of each image with the one of `reference` (M, C, H, W) most like it, and that one's row (N,).

    From -1 to 1, 1: equal up to brightness and contrast. Without a reference: with the most alike other image.
    """
    rows = reduced(images)
    others = rows if reference is None else reduced(reference)
    if rows.shape[1] != others.shape[1]:
        raise ValueError("Images and reference differ in size or channels: load both at one image_size.")
    if len(others) < (2 if reference is None else 1):
        raise ValueError("There is no other image to compare with.")
    best, where = np.empty(len(rows), np.float32), np.empty(len(rows), int)
    for start in range(0, len(rows), ROWS):
        found = rows[start : start + ROWS] @ others.T
        if reference is None:
            found[np.arange(len(found)), start + np.arange(len(found))] = -np.inf
        where[start : start + ROWS], best[start : start + ROWS] = found.argmax(1), found.max(1)
    return best, where


def twin_groups(images, threshold, subjects=None):
    """The group (N,) of each image (N, C, H, W), from 0 in stored order: whatever chains of twins connect.

    Twins: two images with a correlation of at least `threshold`, above 0 and at most 1. subjects (N,): names of persons
    where they are known; images of one person are twins too. 6,400 slices at 44 x 52 take a few seconds.
    """
    _check_threshold(threshold)
    rows = reduced(images)
    names = np.arange(len(rows)) if subjects is None else _first_of_each(np.asarray(subjects))
    if len(names) != len(rows):
        raise ValueError(f"There are {len(rows)} images and {len(names)} subjects: give one subject per image.")
    return _connected(rows, names, threshold)


def group_sizes(images, thresholds=THRESHOLDS):
    """What a threshold does: rows of "threshold", "groups" (lone images are groups too), "largest" (images in it),
    "alone" (images without a twin). At a low threshold chains join slices of different people into one group.
    """
    rows, found = reduced(images), []
    for threshold in thresholds:
        _check_threshold(threshold)
        sizes = np.bincount(_connected(rows, np.arange(len(rows)), threshold))
        found.append(
            {
                "threshold": threshold,
                "groups": len(sizes),
                "largest": int(sizes.max()),
                "alone": int((sizes == 1).sum()),
            }
        )
    return found


def group_split(images, labels, fractions, threshold, seed=0):
    """Sorted row numbers per part: no two twins (`twin_groups`) are in different parts; see `split_groups`."""
    return split_groups(twin_groups(images, threshold), labels, fractions, seed)


def split_groups(groups, labels, fractions, seed=0):
    """Sorted row numbers per part of `fractions` (adding up to 1) of the images; a group stays whole.

    Each class is shared out like the whole as far as groups allow: the largest group first, each to the part that then
    misses the wanted counts by least, every class counted in its own size. `seed` orders groups of one size.
    """
    fractions, groups, labels = np.asarray(fractions, float), np.asarray(groups), np.asarray(labels)
    if fractions.ndim != 1 or (fractions < 0).any() or abs(fractions.sum() - 1) > 1e-9:
        raise ValueError(f"The fractions of a split must be non-negative and add up to 1, not {fractions.tolist()}.")
    if len(groups) != len(labels):
        raise ValueError(f"There are {len(groups)} images and {len(labels)} labels: give one label per image.")
    counts = _counts(groups, labels)
    part = _deal(counts, fractions, np.random.default_rng(seed))[np.unique(groups, return_inverse=True)[1]]
    parts = [np.flatnonzero(part == k) for k in range(len(fractions))]
    if any(fraction > 0 and not len(rows) for fraction, rows in zip(fractions, parts)):
        raise ValueError(f"{len(counts)} groups of twins cannot fill {len(fractions)} parts: raise the threshold.")
    return parts


def twin_report(train, test, thresholds=THRESHOLDS):
    """How much of an image set `test` is already in `train` (`ImageSet`s), by correlation with the nearest image.

    "rows" by "threshold": "share" of the test images with a training neighbour at or above it, "low", "high"
    (Clopper-Pearson, 95 %: as if images were independent), "count", and "within", the share of training images with
    such a neighbour among the other training images, which a split by image would also show for the test images.
    "median": of the test images' nearest correlations; "median_within"; "same_label": share of the test images whose
    nearest training image has their label, a classifier that only looks up; "train_images", "test_images".
    """
    near, where = nearest_correlation(test, train)
    within, _ = nearest_correlation(train)
    rows = []
    for threshold in thresholds:
        count = int((near >= threshold - ROUNDING).sum())
        low, high = clopper_pearson(count, len(near))
        share, inside = count / len(near), float((within >= threshold - ROUNDING).mean())
        rows.append(
            {"threshold": threshold, "count": count, "share": share, "low": low, "high": high, "within": inside}
        )
    return {
        "rows": rows, "median": float(np.median(near)), "median_within": float(np.median(within)),
        "same_label": float((test.labels == train.labels[where]).mean()),
        "train_images": len(train), "test_images": len(test),
    }  # fmt: skip


def official_and_grouped(name, image_size, threshold=0.99, seed=0):
    """{"official": {"train", "test"}, "grouped": {"train", "test"}}, `ImageSet`s: the published split, and one of the
    same size whose parts share no group of twins.

    Subjects that are known stay whole too. In the grouped sets the `subjects` are the groups, for intervals over them.
    """
    official = {split: datasets.load(name, split, image_size) for split in ("train", "test")}
    whole = joined(list(official.values()))
    known = whole.subjects if whole.subject_kind != "image" else None
    groups = twin_groups(whole, threshold, known)
    share = len(official["train"]) / len(whole)
    named = np.char.add("twins-", groups.astype(str))
    whole = dataclasses.replace(whole, subjects=named, subject_kind="group of twins")
    parts = split_groups(groups, whole.labels, (share, 1 - share), seed)
    grouped = {split: dataclasses.replace(whole.subset(rows), split=split) for split, rows in zip(official, parts)}
    return {"official": official, "grouped": grouped}


# --- steps --------------------------------------------------------------------------------------------------


def _small(images):
    """Rows (n, D) of the pixels, by means of areas where the image is too large."""
    shrink = max(images.shape[2:]) / LONGEST
    if shrink > 1:
        images = F.interpolate(images, [max(1, round(length / shrink)) for length in images.shape[2:]], mode="area")
    return images.flatten(1)


def _check_threshold(threshold):
    if not 0 < threshold <= 1:
        raise ValueError(f"A threshold of twins is a correlation above 0 and at most 1, not {threshold}.")


def _first_of_each(values):
    """The row (N,) of the first image of each one's subject."""
    _, first, owners = np.unique(values, return_index=True, return_inverse=True)
    return first[owners]


def _connected(rows, names, threshold):
    """Components of `names` joined by all pairs at the threshold, a few rows at a time so that pairs never pile up."""
    for start in range(0, len(rows), ROWS):
        alike = rows[start : start + ROWS] @ rows[start:].T >= threshold - ROUNDING  # each pair once
        i, j = alike.nonzero()
        names = _joined_names(names, start + i, start + j)
    return np.unique(names, return_inverse=True)[1]


def _joined_names(names, i, j):
    """Names (N,), the first row of each group, after i and j (P,) are joined."""
    everyone = np.arange(len(names))
    ends = np.concatenate([i, everyone]), np.concatenate([j, names])
    found = connected_components(coo_array((np.ones(len(ends[0]), bool), ends), (len(names),) * 2), directed=False)[1]
    return _first_of_each(found)


def _counts(groups, labels):
    """Images (G, K) of each class in each group."""
    owners, classes = (np.unique(values, return_inverse=True)[1] for values in (groups, labels))
    counts = np.zeros((owners.max() + 1, classes.max() + 1), int)
    np.add.at(counts, (owners, classes), 1)
    return counts


def _deal(counts, fractions, rng):
    """The part (G,) of each group; parts without a share get nothing."""
    wanted = fractions[:, None] * counts.sum(0)
    scale, have = counts.sum(0), np.zeros_like(wanted)
    order = rng.permutation(len(counts))
    order = order[np.argsort(-counts.sum(1)[order], kind="stable")]
    part, barred = np.empty(len(counts), int), np.where(fractions > 0, 0.0, np.inf)
    for group in order:
        lack = (wanted - have) / scale
        # what the squared distance to the wanted counts grows by; the parts that are not chosen stay as they are
        growth = np.square(lack - counts[group] / scale).sum(1) - np.square(lack).sum(1)
        part[group] = (growth + barred).argmin()
        have[part[group]] += counts[group]
    return part


def joined(sets):
    """Both splits as one `ImageSet`, in the order given."""
    arrays = {name: np.concatenate([getattr(s, name) for s in sets]) for name in ("images", "labels", "subjects")}
    return dataclasses.replace(sets[0], **arrays, split="+".join(s.split for s in sets))
