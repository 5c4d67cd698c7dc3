"""Which reference image is most like a query, when one of them may be an altered copy of the other.

Images are compared by their detail: fine structure at evened-out contrast, in which honest pairs hardly correlate and
copies still do. Two stages, in chunks. Candidates: thumbnails that correlate best, as they are, moved and mirrored,
over all pairs. Each candidate is then aligned: best correlation over shifts, mirrorings and one step of zoom, over what
overlaps. The result is exact over the candidates; a copy that no thumbnail brings near is missed, and so is one that
was turned.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

FLIPS = ("none", "horizontal", "vertical")
ZOOMS = (1.0, 0.9)  # 0.9: the query shows a part of the reference, 0.9 of each side
MAX_SHIFT = 3  # along each axis, in pixels of at most WORK to a side: up to 6 in an image of 128
WORK, WORK_MANY = 64, 32  # longer side at which images of one or three, and of more, channels are compared
# smoothing and ground taken away (standard deviations in pixels), floor of the contrast
VIEWS = {"fine": (0.0, 2.0, 0.2), "coarse": (1.0, 4.0, 0.5)}
THUMBNAILS = ((16, (0,)), (8, (-2, 0, 2)))  # side, and the steps by which queries are moved, in pixels as above
CANDIDATES = 5  # per thumbnail and mirroring
_STEPS = 24  # int8 steps per standard deviation of a band
_CHUNK = 16  # queries aligned at one time
_AT_ONCE = 256  # images prepared at one time
_PAIRS = 2**22  # pairs of thumbnails compared at one time


@dataclass(frozen=True)
class Matches:
    """For each of N queries the reference row most like it.

    similarity: (N,), correlation of detail after alignment, from -1 to 1; 1 for an exact copy, 0 for an image without
    any detail. indices: (N,), reference rows, -1 where none was allowed. runner_up: (N,), the similarity of the best
    row of another subject than that one; -1 if there is none among the candidates. shifts: (N, 2), pixels down and
    right by which the query lies off the reference. flips, zooms: (N,), of `FLIPS` and `ZOOMS`, how the reference was
    mirrored and the query made smaller to match.
    """

    similarity: np.ndarray
    indices: np.ndarray
    runner_up: np.ndarray
    shifts: np.ndarray
    flips: np.ndarray
    zooms: np.ndarray

    def __len__(self):
        return len(self.indices)

    @property
    def likeness(self):
        """(N,) how alike, and how much more than the runner-up: 2 atanh(similarity) - atanh(runner-up).

        A copy stands out from what else looks like it; an honest image of a crowded kind (a digit 1) does not.
        """
        best, second = (np.arctanh(np.clip(values, 0, 0.9999)) for values in (self.similarity, self.runner_up))
        return 2 * best - second


def near_duplicates(
    queries, reference, query_subjects=None, reference_subjects=None, view="coarse", features=None
) -> Matches:
    """The reference image most like each query; uint8 (N, C, H, W) and (M, C, H, W), arrays or memmaps.

    Rows of the query's own subject are left out if both sides' subjects are given; so is row i for query i if
    `reference` is `queries` itself. view: "coarse" withstands noise and blur, "fine" tells apart what differs only in
    texture, and hears a copy through a mixture. features: rows (N, D), (M, D) of any extractor, as a further space in
    which candidates are looked for.
    """
    queries, reference = checked_pair(queries, reference)
    rows = candidates(queries, reference, query_subjects, reference_subjects, features)
    return best_match(align(queries, reference, rows, view), reference_subjects)


@dataclass(frozen=True)
class _Pairs:
    """All candidates (N, K): reference rows (-1: none), similarity and how they were aligned."""

    rows: np.ndarray
    similarity: np.ndarray
    shifts: np.ndarray
    flips: np.ndarray
    zooms: np.ndarray


def checked_pair(queries, reference):
    same = queries is reference
    queries, reference = (getattr(images, "images", images) for images in (queries, reference))
    for images in (queries, reference):
        if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 4:
            raise ValueError("Copies are looked for in uint8 images (N, C, H, W).")
        if not len(images):
            raise ValueError("A search for copies needs at least one query and one reference image.")
    if queries.shape[1:] != reference.shape[1:]:
        raise ValueError(f"Both sets need images of one shape, not {queries.shape[1:]} and {reference.shape[1:]}.")
    return queries, queries if same else reference


def _barred(same, count, query_subjects, reference_subjects):
    """(N,), (M,) integers: equal ones must not be compared; None if every pair may."""
    if query_subjects is None or reference_subjects is None:
        return (torch.arange(count), torch.arange(count)) if same else None
    both = np.concatenate([np.asarray(query_subjects).astype(str), np.asarray(reference_subjects).astype(str)])
    codes = torch.from_numpy(np.unique(both, return_inverse=True)[1])
    return codes[: len(query_subjects)], codes[len(query_subjects) :]


def candidates(queries, reference, query_subjects=None, reference_subjects=None, features=None):
    """(N, F, K) reference rows for each mirroring, -1 where there are fewer."""
    barred = _barred(queries is reference, len(queries), query_subjects, reference_subjects)
    found = []
    for side, steps in THUMBNAILS:
        large = _thumbnails(reference, side)
        moved = torch.stack(
            [_thumbnails(queries, side, (y, x)) for y in steps for x in steps], 1
        )  # (N, moves, C, s, s)
        found.append(torch.stack([_top(_flipped(moved, flip), large, barred) for flip in FLIPS], 1))
    if features is not None:
        rows, others = (_standardised(torch.tensor(np.asarray(part, np.float32))) for part in features)
        found.append(_top(rows[:, None], others, barred)[:, None].expand(-1, len(FLIPS), -1))
    return torch.cat(found, 2)


def _top(moved, large, barred):
    """(N, K): the rows of `large` (M, ...) that correlate best with any of the moves of each query (N, moves, ...)."""
    large, parts, many = large.flatten(1), [], min(CANDIDATES, len(large))
    size = max(1, _PAIRS // len(large))
    for start in range(0, len(moved), size):
        products = (part := moved[start : start + size]).flatten(0, 1).flatten(1) @ large.T
        values = products.view(*part.shape[:2], -1).amax(1)
        if barred is not None:
            values[barred[0][start : start + size, None] == barred[1]] = -torch.inf
        best = values.topk(many)
        parts.append(torch.where(best.values.isinf(), -1, best.indices))
    return torch.cat(parts)


def align(queries, reference, rows, view):
    stored = _details(reference, view)
    parts = []
    for zoom in ZOOMS:
        support = _support(stored.shape[-2:], zoom)
        masks = _unfolded(support)[0].T, _unfolded(torch.ones_like(support))[0].flip(0).T  # (h w, S) each
        energies = torch.cat([_energies(part, masks[0]) for part in stored.split(_AT_ONCE)])
        found = []
        for start in range(0, len(queries), _AT_ONCE):
            details = _details(queries[start : start + _AT_ONCE], view, zoom).split(_CHUNK)
            near = rows[start : start + _AT_ONCE].split(_CHUNK)
            found += [_correlate(*both, stored, energies, masks[1]) for both in zip(details, near)]
        parts.append([torch.cat(each) for each in zip(*found)])
    similarity, steps = (torch.cat(each, 1).numpy() for each in zip(*parts))
    shifts = np.stack(np.divmod(steps, 2 * MAX_SHIFT + 1), axis=-1) - MAX_SHIFT
    width = rows.shape[2]
    flips = np.tile(np.repeat(np.arange(len(FLIPS)), width), len(ZOOMS))
    zooms = np.repeat(np.arange(len(ZOOMS)), len(FLIPS) * width)
    places = np.tile(rows.flatten(1).numpy(), (1, len(ZOOMS)))
    return _Pairs(places, similarity, shifts * (queries.shape[2] / stored.shape[-2]), flips, zooms)


def _correlate(part, rows, stored, energies, inside):
    """Best cosine over shifts (B, F K) of queries (B, C, h, w) with candidates (B, F, K), and the number of the shift.

    The references are mirrored, not the queries: these are moved by every shift once, and all the rest is one product.
    """
    moved = _unfolded(part)  # (B, S, P)
    places, shifts = rows.clamp(min=0), (2 * MAX_SHIFT + 1,) * 2
    others = torch.cat([_flipped(stored[places[:, i]], flip) for i, flip in enumerate(FLIPS)], 1)  # (B, F K, C, h, w)
    products = moved @ others.flatten(2).float().mT  # (B, S, F K)
    tables = [_flipped(energies[places[:, i]].unflatten(2, shifts), flip) for i, flip in enumerate(FLIPS)]
    energy = torch.cat(tables, 1).flatten(2).mT * _energies(part, inside)[:, :, None]
    cosines = products / energy.sqrt().clamp(min=_STEPS**2)
    best = cosines.max(1)
    return torch.where(rows.flatten(1) < 0, -2.0, best.values), best.indices


def _unfolded(part):
    """(B, S, P): the images (B, C, h, w) moved by every shift, zeros where they have moved away."""
    side, m = part.shape[-2:], MAX_SHIFT
    windows = F.pad(part.float(), (m, m, m, m)).unfold(2, side[0], 1).unfold(3, side[1], 1)
    return windows.permute(0, 2, 3, 1, 4, 5).reshape(len(part), (2 * m + 1) ** 2, -1)


def _inner(shape, zoom):
    """Height and width of a query zoomed out, and its margins above and at the left; in the middle to the pixel."""
    margins = [round(side * (1 - zoom) / 2) for side in shape]
    return [side - 2 * margin for side, margin in zip(shape, margins)], margins


def _support(shape, zoom):
    """(1, 1, h, w): one where a query of that zoom has pixels."""
    inner, (top, left) = _inner(shape, zoom)
    return F.pad(torch.ones(1, 1, *inner), (left, left, top, top))


def _energies(part, masks):
    """(B, S): sum of squares of each image over what overlaps at each shift."""
    return part.float().square().sum(1).flatten(1) @ masks


def _details(images, view, zoom=1.0):
    """int8 (N, C, h, w): what the view shows of each image, zoomed out onto zeros of its full size."""
    return torch.cat([_detail(images[i : i + _AT_ONCE], view, zoom) for i in range(0, len(images), _AT_ONCE)])


def _detail(images, view, zoom):
    values = _planes(images)
    shape = _work_shape(images.shape[1:])
    inner, (top, left) = _inner(shape, zoom)
    if tuple(inner) != values.shape[2:]:
        values = F.interpolate(values, inner, mode="bilinear", antialias=True, align_corners=False)
    band = _band(values, *VIEWS[view])
    return F.pad((band * _STEPS).round().clamp(-127, 127).to(torch.int8), (left, left, top, top))


def _planes(images):
    """Floats (N, C, H, W); three channels are one colour picture and become their mean."""
    values = torch.tensor(np.ascontiguousarray(images)).float()
    return values.mean(1, keepdim=True) if values.shape[1] == 3 else values


def _work_shape(shape):
    channels, *sides = shape
    factor = min(1.0, (WORK if channels in (1, 3) else WORK_MANY) / max(sides))
    return tuple(max(1, round(side * factor)) for side in sides)


def _band(images, smooth, ground, floor):
    """Structure between two scales, divided by its local contrast, so that a bright edge does not drown the rest."""
    band = _blurred(images, smooth) - _blurred(images, ground)
    overall = band.square().mean((1, 2, 3), keepdim=True).sqrt()
    return band / (_blurred(band.square(), 4.0).sqrt() + floor * overall + 0.1)  # 0.1 grey levels: nothing to see


def _blurred(images, sd):
    """Gaussian, edges repeated; as two products, which for images this small beat convolutions of one channel."""
    if not sd:
        return images
    rows, columns = (_blur_matrix(side, sd) for side in images.shape[2:])
    return rows @ images @ columns.T


@functools.lru_cache(maxsize=64)
def _blur_matrix(side, sd):
    """(side, side): what each pixel of a line takes of the others; past the ends it takes of the last ones."""
    reach = int(3 * sd + 0.5)
    steps = torch.arange(-reach, reach + 1)
    taps = torch.exp(-steps.float().square() / (2 * sd * sd))
    places = (torch.arange(side)[:, None] + steps).clamp(0, side - 1)
    return torch.zeros(side, side).scatter_add_(1, places, (taps / taps.sum()).expand(side, -1))


def _thumbnails(images, side, step=(0, 0)):
    """Floats (N, C, s, s): small, each with mean 0 and length 1, so that a product is a correlation."""
    parts = [_thumbnail(images[i : i + _AT_ONCE], side, step) for i in range(0, len(images), _AT_ONCE)]
    return torch.cat(parts)


def _thumbnail(images, side, step):
    values = _planes(images)
    if any(step):
        factor = max(1, values.shape[2] // _work_shape(images.shape[1:])[0])
        y, x = (abs(s) * factor for s in step)
        padded = F.pad(values, (x, x, y, y), mode="replicate")
        top, left = y + step[0] * factor, x + step[1] * factor
        values = padded[..., top : top + values.shape[2], left : left + values.shape[3]]
    small = F.adaptive_avg_pool2d(values, tuple(min(side, full) for full in values.shape[2:]))
    return _standardised(small.flatten(1)).view(small.shape)


def _standardised(rows):
    return F.normalize(rows - rows.mean(1, keepdim=True), eps=1e-3)


def _flipped(images, flip):
    return images if flip == "none" else images.flip(-1 if flip == "horizontal" else -2)


def best_match(pairs, reference_subjects):
    everyone = np.arange(len(pairs.rows))
    top = pairs.similarity.argmax(1)
    rows = np.where(pairs.similarity[everyone, top] < -1, -1, pairs.rows[everyone, top])
    owners = np.arange(pairs.rows.max() + 1) if reference_subjects is None else np.asarray(reference_subjects)
    others = (owners[pairs.rows] != owners[rows][:, None]) & (pairs.rows >= 0)
    runner_up = np.where(others, pairs.similarity, -1.0).max(1)
    similarity = np.where(rows < 0, 0.0, pairs.similarity[everyone, top]).clip(-1, 1)
    return Matches(
        similarity, rows, runner_up, pairs.shifts[everyone, top],
        np.array(FLIPS)[pairs.flips[top]], np.array(ZOOMS)[pairs.zooms[top]],
    )  # fmt: skip
