"""Images that are there twice, although no byte tells: altered copies, within a set or between two sets.

Medical images are all alike: as they are, two patients' mammograms correlate with 0.9 and more, as a copy with noise
does. So images are compared by their detail: fine structure at evened-out contrast, in which honest pairs hardly
correlate and copies still do. And no number is believed by itself: the threshold is what held-out real images, innocent
by construction, reach (`flag_copies`), or what altered copies of the set itself reach (`audit_set`).

What is most like an image, and what such a search misses, is in `lookalike.data.alignment`.
"""

from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.stats import betabinom

from lookalike.data.alignment import (
    VIEWS,
    Matches,
    align,
    best_match,
    candidates,
    checked_pair,
    near_duplicates,
)
from lookalike.data.image_set import ImageSet
from lookalike.data.plants import plant
from lookalike.data.splits import exact_duplicates, image_digests

MILD = ("jpeg", "shift")  # planted copies that a pair of near-duplicates must be as alike as


@dataclass(frozen=True)
class CopyFlags:
    """Synthetic images that look like copies of real ones.

    flagged: (F,), rows of the synthetic set, most alike first; real: (F,), the real row that each looks like.
    exact: (E,), those of `flagged` that equal a real image in every pixel. expected_false: how many would be flagged if
    the generator knew no more of the real images than a held-out patient does, on average; false_high: a number that
    chance alone exceeds in 5 % of such cases at most. thresholds: by view, the likeness that had to be passed; matches:
    by view, what each synthetic image looks most like. calibration: (K,) likeness of the honest images by view.
    control_flagged, control_expected: honest images flagged when one half of their subjects sets the threshold for the
    other, and how many should be. reverse_flagged, reverse_expected: synthetic images flagged as copies of *held-out*
    ones, which the generator never saw; many of them mean a leak between the parts, or a generator that is good at
    the usual. None without a holdout. notes: sentences on what was done.
    """

    flagged: np.ndarray
    real: np.ndarray
    exact: np.ndarray
    expected_false: float
    false_high: int
    thresholds: dict[str, float]
    matches: dict[str, Matches]
    calibration: dict[str, np.ndarray]
    control_flagged: int
    control_expected: float
    reverse_flagged: int | None
    reverse_expected: float | None
    notes: tuple[str, ...]


def flag_copies(
    synthetic, real, holdout=None, real_subjects=None, holdout_subjects=None, rate=0.001, reverse=True
) -> CopyFlags:
    """Which synthetic images are more like one real image than honest images are; all uint8 (N, C, H, W).

    The honest ones are held-out real images (of other subjects, none equal to a real one). An image is flagged if its
    likeness (`Matches.likeness`) passes that of all but a share of `rate` / 2 of them, in one of two views; with fewer
    than 2 / `rate` held-out subjects: of all of them. So n honest images, if they come from where the held-out ones do,
    give n / (K + 1) false flags per view on average and K honest subjects, whatever the distribution. Without a holdout
    the real images themselves are the honest ones, each against those of other subjects; near-duplicates among them
    then raise the threshold. An image that is flagged is like a real one for whatever reason; one that is not may still
    be a copy that was turned, or strongly altered. reverse: also flag against the holdout (doubles the time).
    """
    synthetic, real = checked_pair(synthetic, real)
    real, real_subjects, real_rows, notes = _once(real, real_subjects)
    equal = _equal_rows(synthetic, real)
    matches = _views(synthetic, real, None, real_subjects)
    if holdout is None:
        honest, owners = _views(real, real, real_subjects, real_subjects), real_subjects
        notes.append("No held-out images: the threshold is what real images of different subjects have in common.")
    else:
        holdout, owners = _innocent(holdout, holdout_subjects, real, real_subjects, notes)
        honest = _views(holdout, real, owners, real_subjects)
    calibration = {view: _of_subjects(honest[view].likeness, owners) for view in VIEWS}
    thresholds = {view: _threshold(calibration[view], rate) for view in VIEWS}
    hits = _hits(matches, thresholds) | (equal >= 0)
    best = _most_alike(matches, thresholds)
    rows = np.flatnonzero(hits)
    rows = rows[np.lexsort((-best[1][rows], equal[rows] < 0))]
    expected, high = _false_flags(len(synthetic), len(calibration["fine"]), rate)
    reverse_flagged, reverse_expected = None, None
    if holdout is not None and reverse:
        reverse_flagged, reverse_expected = _reversed(synthetic, real, holdout, real_subjects, owners, rate)
    control = _control(calibration, rate)
    return CopyFlags(
        rows, real_rows[np.where(equal >= 0, equal, best[0])[rows]], rows[equal[rows] >= 0], expected, high,
        thresholds, matches, calibration, *control, reverse_flagged, reverse_expected, tuple(notes),
    )  # fmt: skip


@dataclass(frozen=True)
class SetAudit:
    """What is there twice within one set.

    exact: groups of rows equal in every pixel. near: (P, 2) pairs of rows as alike as an image and a mild copy of it,
    the exact ones among them. groups: rows connected by such pairs, two or more each: neighbouring slices of a volume
    can form a chain. double_labels, double_subjects: the groups whose rows have different labels, different subjects
    (None if nobody knows the subjects). threshold: the similarity, in the fine view, that makes a pair. similarity:
    (N,), of each image to the one most like it.
    """

    exact: list[np.ndarray]
    near: np.ndarray
    groups: list[np.ndarray]
    double_labels: list[np.ndarray]
    double_subjects: list[np.ndarray] | None
    threshold: float
    similarity: np.ndarray

    def sentences(self) -> list[str]:
        """What was found, in words."""
        repeats, in_groups = (sum(map(len, found)) for found in (self.exact, self.groups))
        said = [
            f"{repeats - len(self.exact):,} of {len(self.similarity):,} images repeat another exactly.",
            f"{in_groups:,} images are in {len(self.groups):,} groups of near-duplicates (similarity of detail at "
            f"least {self.threshold:.3f}, which 95 % of planted copies reach).",
            f"{len(self.double_labels):,} of these groups carry more than one label.",
        ]
        if self.double_subjects is not None:
            said.append(f"{len(self.double_subjects):,} of these groups belong to more than one subject.")
        return said


def audit_set(image_set: ImageSet, threshold: float | None = None) -> SetAudit:
    """Exact and near duplicates within a set, and groups of them with different labels or subjects.

    threshold: similarity in the fine view from which a pair counts; by default what 95 % of mild copies reach that
    were planted from the set itself (`copy_similarity`). Second views of a lesion are mostly less alike than
    that: a clean audit does not say that subjects are apart.
    """
    threshold = copy_similarity(image_set) if threshold is None else threshold
    near, similarity = _near_pairs(image_set.images, threshold)
    groups = _groups(near, len(image_set))
    known = image_set.subject_kind != "image"
    return SetAudit(
        exact_duplicates(image_set.images), near, groups, _mixed(groups, image_set.labels),
        _mixed(groups, image_set.subjects) if known else None, threshold, similarity,
    )  # fmt: skip


def unique_rows(image_set: ImageSet) -> np.ndarray:
    """Rows of the first of each group of images equal in every pixel; of a group with several labels none is kept, for
    nobody knows which is right. Near-duplicates stay: see `audit_set`.
    """
    groups = exact_duplicates(image_set.images)
    contradictory = [len(np.unique(image_set.labels[rows])) > 1 for rows in groups]
    dropped = [rows if bad else rows[1:] for rows, bad in zip(groups, contradictory)]
    return np.setdiff1d(np.arange(len(image_set)), np.concatenate([*dropped, np.empty(0, int)]))


def without_duplicates(image_set: ImageSet) -> ImageSet:
    """The set with its `unique_rows` alone."""
    return image_set.subset(unique_rows(image_set))


def duplicate_groups(images, threshold=None) -> np.ndarray:
    """One name (N,) per image, equal for near-duplicates and what they connect: usable as `subjects` of a split."""
    images = getattr(images, "images", images)
    threshold = copy_similarity(images) if threshold is None else threshold
    names = np.arange(len(images))
    for group in _groups(_near_pairs(images, threshold)[0], len(images)):
        names[group] = group.min()
    return np.char.add("group-", names.astype(str))


def copy_similarity(images, count=200) -> float:
    """Similarity in the fine view that 95 % of copies of each of `MILD` reach, planted from `count` of the images.

    Both are needed: images that were JPEG files before hardly change by another JPEG, and ones that are compared at a
    quarter of their size lose detail when moved by a fraction of what is then a pixel.
    """
    images = getattr(images, "images", images)
    chosen = images[np.unique(np.linspace(0, len(images) - 1, min(count, len(images))).astype(int))]
    found = [near_duplicates(plant(chosen, kind), chosen, view="fine").similarity for kind in MILD]
    return float(np.quantile(found, 0.05, axis=1).min())


@dataclass(frozen=True)
class Overlap:
    """What two sets share, as rows (first, second).

    subjects: names on both sides, None if nobody knows the subjects of one of them. subject_rows: how many images these
    have on each side. exact: (E, 2), equal in every pixel. near: (P, 2), for each image of `second` the most alike one
    of `first`, where they are as alike as an image and a mild copy of it (`threshold`, fine view); the exact ones are
    among them.
    """

    subjects: tuple[str, ...] | None
    subject_rows: tuple[int, int]
    exact: np.ndarray
    near: np.ndarray
    threshold: float

    def sentences(self) -> list[str]:
        """What was found, in words."""
        whose = (
            "Subjects are unknown, so nothing can be said about shared ones."
            if self.subjects is None
            else f"{len(self.subjects):,} subjects are on both sides, with {self.subject_rows[0]:,} and "
            f"{self.subject_rows[1]:,} images."
        )
        return [
            whose,
            f"{len(np.unique(self.exact[:, 1])):,} images of the second set equal one of the first in every pixel, "
            f"{len(self.near):,} are near-duplicates (similarity of detail at least {self.threshold:.3f}, "
            "which 95 % of planted copies reach).",
        ]


def subject_overlap(first: ImageSet, second: ImageSet, threshold: float | None = None) -> Overlap:
    """Subjects and images that are in both sets, for any two parts of a split; see `audit_set` for the threshold."""
    threshold = copy_similarity(first) if threshold is None else threshold
    known = "image" not in (first.subject_kind, second.subject_kind)
    shared = np.intersect1d(first.subjects, second.subjects)
    rows = tuple(int(np.isin(each.subjects, shared).sum()) for each in (first, second)) if known else (0, 0)
    equal = _equal_rows(second.images, first.images)
    exact = np.stack([equal, np.arange(len(second))], 1)[equal >= 0]
    found = near_duplicates(second.images, first.images, view="fine")
    close = np.where(equal >= 0, equal, np.where(found.similarity >= threshold, found.indices, -1))
    near = np.stack([close, np.arange(len(second))], 1)[close >= 0]
    return Overlap(tuple(shared.tolist()) if known else None, rows, exact, near, threshold)


# --- calibration --------------------------------------------------------------------------------------------


def _once(real, subjects):
    """The real images without exact repeats, whose subjects they are (or names unlike any holdout's), their rows."""
    digests = image_digests(real)
    rows = np.sort(np.unique(digests, return_index=True)[1])
    unknown = subjects is None
    subjects = np.char.add("real ", rows.astype(str)) if unknown else np.asarray(subjects)[rows].astype(str)
    if len(rows) == len(real):
        return real, subjects, rows, []
    return real[rows], subjects, rows, [f"{len(real) - len(rows):,} real images that repeat another were left out."]


def _equal_rows(queries, reference):
    """(N,) the first reference row equal to each query in every pixel; -1 if none, or if the image is flat."""
    first = {}
    for row, digest in enumerate(image_digests(reference)):
        first.setdefault(digest, row)
    flat = [image.min() == image.max() for image in queries]
    return np.array([-1 if f else first.get(d, -1) for f, d in zip(flat, image_digests(queries))], int)


def _innocent(holdout, subjects, real, real_subjects, notes):
    """Held-out images of nobody in the real set, and their subjects."""
    _, holdout = checked_pair(real, holdout)
    named = subjects is not None
    subjects = np.char.add("held out ", np.arange(len(holdout)).astype(str)) if not named else np.asarray(subjects)
    repeats = _equal_rows(holdout, real) >= 0
    shared = np.isin(subjects.astype(str), real_subjects) if named else np.zeros(len(holdout), bool)
    for bad, why in ((repeats, "equal a real image"), (shared & ~repeats, "show a subject of the real set")):
        if bad.any():
            notes.append(f"{int(bad.sum()):,} held-out images {why} and were left out: the split leaks.")
    keep = ~(repeats | shared)
    if keep.sum() < 2:
        raise ValueError("To set a threshold takes at least two held-out images that are not in the real set.")
    return holdout[keep], subjects[keep].astype(str)


def _views(queries, reference, query_subjects, reference_subjects):
    """Matches by view, from the same candidates."""
    rows = candidates(queries, reference, query_subjects, reference_subjects)
    return {view: best_match(align(queries, reference, rows, view), reference_subjects) for view in VIEWS}


def _of_subjects(values, subjects):
    """The largest value of each subject: images of one subject are not independent."""
    codes = np.unique(subjects, return_inverse=True)[1]
    largest = np.full(codes.max() + 1, -np.inf)
    np.maximum.at(largest, codes, values)
    return largest


def _allowed(count, rate):
    """How many of `count` honest subjects and the new image itself may reach the threshold of one view."""
    return max(1, int(rate / len(VIEWS) * (count + 1)))


def _threshold(honest, rate):
    return float(np.sort(honest)[::-1][_allowed(len(honest), rate) - 1])


def _false_flags(n, count, rate):
    """Mean, and what is passed in 5 % of cases at most: ranks among exchangeable values, no distribution assumed."""
    rank = _allowed(count, rate)
    high = betabinom.ppf(1 - 0.05 / len(VIEWS), n, rank, count + 1 - rank) * len(VIEWS)
    return min(n, len(VIEWS) * n * rank / (count + 1)), int(min(n, high))


def _hits(matches, thresholds):
    return np.any([matches[view].likeness > thresholds[view] for view in VIEWS], axis=0)


def _most_alike(matches, thresholds):
    """(N,) reference rows and margins over the threshold, from the view in which the margin is larger."""
    margins = np.stack([matches[view].likeness - thresholds[view] for view in VIEWS])
    rows = np.stack([matches[view].indices for view in VIEWS])
    best = margins.argmax(0)
    everyone = np.arange(len(best))
    return rows[best, everyone], margins[best, everyone]


def _control(calibration, rate):
    """Honest subjects flagged by a threshold from the other half, both ways, and how many should be."""
    together = np.stack([calibration[view] for view in VIEWS])
    order = np.random.default_rng(0).permutation(together.shape[1])
    halves = order[::2], order[1::2]
    flagged, expected = 0, 0.0
    for ours, theirs in (halves, halves[::-1]):
        limits = np.array([_threshold(values, rate) for values in together[:, ours]])
        flagged += int((together[:, theirs] > limits[:, None]).any(0).sum())
        expected += _false_flags(len(theirs), len(ours), rate)[0]
    return flagged, expected


def _reversed(synthetic, real, holdout, real_subjects, holdout_subjects, rate):
    """Synthetic images flagged as copies of held-out ones, the real images being the honest ones."""
    honest = _views(real, holdout, real_subjects, holdout_subjects)
    values = {view: _of_subjects(honest[view].likeness, real_subjects) for view in VIEWS}
    thresholds = {view: _threshold(values[view], rate) for view in VIEWS}
    found = _views(synthetic, holdout, None, holdout_subjects)
    return int(_hits(found, thresholds).sum()), _false_flags(len(synthetic), len(values["fine"]), rate)[0]


# --- pairs within a set -------------------------------------------------------------------------------------


def _near_pairs(images, threshold):
    """Pairs (P, 2) of rows i < j at or above the threshold, exact repeats too, and each image's best similarity."""
    if len(images) < 2:
        return np.empty((0, 2), int), np.zeros(len(images))
    images, _ = checked_pair(images, images)
    pairs = align(images, images, candidates(images, images), "fine")
    rows, columns = (pairs.similarity >= threshold).nonzero()
    found = [np.stack([rows, pairs.rows[rows, columns]], 1)]
    equal = [np.stack([group[:-1], group[1:]], 1) for group in exact_duplicates(images)]
    ordered = np.sort(np.concatenate(found + equal), axis=1)
    return np.unique(ordered, axis=0), best_match(pairs, None).similarity


def _groups(pairs, count):
    graph = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), (count, count))
    _, names = connected_components(graph, directed=False)
    order = np.argsort(names, kind="stable")
    parts = np.split(order, np.cumsum(np.bincount(names))[:-1])
    return sorted((part for part in parts if len(part) > 1), key=lambda part: part[0])


def _mixed(groups, values):
    return [group for group in groups if len(np.unique(values[group])) > 1]
