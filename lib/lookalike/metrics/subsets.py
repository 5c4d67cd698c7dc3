"""Disjoint parts of image sets, and which of them a figure compares.

Paper: Osuala et al. 2024, Fig. 2: three subsets per set "randomly sampled per patient", every number a mean over three
pairs. Chapter: mcgan_dp. A patient in two parts would make real images look alike for a reason that synthetic ones
cannot have.
"""

import hashlib
from itertools import combinations

import numpy as np


def patient_parts(subjects, parts=3, seed=0):
    """Sorted row indices per part, disjoint by subject and as equal in images as greed makes them.

    Subjects with most images are placed first, each where fewest images are, in the order of a hash of seed and name
    among equals; neither the order of the rows nor the platform matters. With one subject per image the sizes differ
    by one at most, else by no more than the largest subject has.
    """
    names, rows, counts = np.unique(np.asarray(subjects).astype(str), return_inverse=True, return_counts=True)
    if not 1 <= parts <= len(names):
        raise ValueError(f"{len(names)} subjects cannot make {parts} parts: take 1 to {len(names)}.")
    hashes = [hashlib.sha256(f"{seed}:{name}".encode()).digest() for name in names]
    part, sizes = np.empty(len(names), int), np.zeros(parts, int)
    for i in sorted(range(len(names)), key=lambda i: (-counts[i], hashes[i])):
        part[i] = sizes.argmin()
        sizes[part[i]] += counts[i]
    return [np.flatnonzero(part[rows] == k) for k in range(parts)]


def pairs_within(parts):
    """Pairs (i, j), i < j, of one set's parts: the paper's Real-Real and Syn-Syn."""
    return list(combinations(range(parts), 2))


def pairs_between(parts):
    """Pairs (i, i), part i of one set with part i of another: the paper's Syn-Real and Real-BCDR."""
    return [(i, i) for i in range(parts)]


def mean_and_std(values):
    """A row of the figure as {"values", "mean", "std"}; the deviation divides by N, as the paper's does."""
    return {"values": [float(v) for v in values], "mean": float(np.mean(values)), "std": float(np.std(values))}
