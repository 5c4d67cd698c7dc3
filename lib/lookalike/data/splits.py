"""Splits that keep every subject on one side, and a search for images that are there twice."""

import hashlib

import numpy as np


def subject_split(subjects, fractions, seed=0) -> list[np.ndarray]:
    """Sorted row indices per part; `fractions` (adding up to 1) share out the subjects, not the rows.

    No subject is in two parts. A subject's place depends on its name and the seed alone, through a hash, so
    the order of the rows, the platform and the numpy version do not matter.
    """
    subjects, fractions = np.asarray(subjects).astype(str), np.asarray(fractions, float)
    if fractions.ndim != 1 or (fractions < 0).any() or abs(fractions.sum() - 1) > 1e-9:
        raise ValueError(f"The fractions of a split must be non-negative and add up to 1, not {fractions.tolist()}.")
    unique, rows = np.unique(subjects, return_inverse=True)
    order = sorted(range(len(unique)), key=lambda i: hashlib.sha256(f"{seed}:{unique[i]}".encode()).digest())
    ends = np.rint(np.cumsum(fractions) * len(unique)).astype(int)
    part = np.empty(len(unique), int)
    part[order] = np.searchsorted(ends, np.arange(len(unique)), side="right")
    return [np.flatnonzero(part[rows] == k) for k in range(len(fractions))]


def exact_duplicates(images) -> list[np.ndarray]:
    """Groups of row indices whose images are equal in every pixel; each group has two or more, in stored
    order.
    """
    groups = {}
    for i, key in enumerate(image_digests(images)):
        groups.setdefault(key, []).append(i)
    return [np.array(rows) for rows in groups.values() if len(rows) > 1]


def image_digests(images) -> list[str]:
    """A hash of each image's pixels (128 bits as hex)."""
    return [hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()[:32] for image in images]
