"""Exact nearest neighbours and what else one pass over all pairs gives: medians, counts within radii.

For the attacks by distance and the ratios of memorised images. The usual |a|^2 + |b|^2 - 2ab cancels exactly where
copies lie: faiss errs by per cents there, where a privacy attack looks. Two ways out. Pixels in uint8 are whole
numbers and so are their products: an int8 product with int32 sums is exact, and faster than one of floats. Float
rows are multiplied too, and then every pair that rounding may have misplaced is measured from its differences.
"""

import mmap
import platform
import time
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import pairwise

import numpy as np
import torch

from lookalike.metrics import as_array

PAIRS = 2**27  # squared distances held at one time: 1 GiB
BLOCK = 2**18  # of these, looked at in one go
BYTES = 2**26  # of reference rows held at one time; four times as much of queries
DOUBTFUL = 0.01  # share of pairs to measure one by one from which on float64 products come cheaper
WRONG = 1e-7  # relative error of a squared distance from which on it is measured from the differences


@dataclass(frozen=True)
class Neighbours:
    """Euclidean distances of N queries to M reference rows, in the rows' own units.

    distances, indices: (N, k), nearest first; of rows equally near the first counts. medians: (N,), over all M.
    counts: (N, R), reference rows within each radius, its edge included. share_radius: the radius within which that
    share of all N M pairs lies; share_counts: (N,), reference rows within it. What nobody asked for is None.
    Edges are exact for whole numbers, also as floats. For other floats a pair at the edge of a radius is measured from
    its differences; pairs that tie at the share's own radius may be parted by rounding.
    """

    distances: np.ndarray = field(repr=False)
    indices: np.ndarray = field(repr=False)
    medians: np.ndarray | None = field(default=None, repr=False)
    counts: np.ndarray | None = field(default=None, repr=False)
    share_radius: float | None = None
    share_counts: np.ndarray | None = field(default=None, repr=False)


def nearest(queries, reference):
    """Distance (N,) of each query to its nearest reference row, and that row's index (N,); rows as in `scan`."""
    found = scan(queries, reference)
    return found.distances[:, 0], found.indices[:, 0]


def scan(queries, reference, k=1, median=False, radii=(), share=None, exclude_self=False):
    """The k nearest reference rows of each query, and medians and counts from the same pass: a `Neighbours`.

    Rows are arrays, tensors or memmaps (N, ...) that flatten to (N, D), read in chunks; both uint8 (grey levels) or
    both other numbers. Exact for uint8, else right to 1e-7. Beside the rows it takes at most about 2 GiB, whatever N
    and M, and 24 bytes for each pair of the share. share: 0.01 asks for the nearest hundredth of all pairs.
    exclude_self: both sets are the same one, and row i is no neighbour of query i.
    """
    queries, reference = _rows(queries), _rows(reference)
    _check(queries, reference, k, share, exclude_self)
    others = len(reference) - exclude_self
    every_pair_counts = median or len(radii) > 0 or share is not None
    pixels = queries.dtype == np.uint8
    settled = {"k": k + exclude_self, "every": every_pair_counts, "radii": radii}
    squares = _pixel_squares if pixels else partial(_float_squares, **settled)
    smallest = None if share is None else _Smallest(len(queries), round(share * len(queries) * others))
    parts = []
    for start, rows in _chunks(queries, min(PAIRS // len(reference), 4 * BYTES // _bytes(queries))):
        squared = squares(rows, reference)
        if exclude_self:
            squared[np.arange(len(rows)), start + np.arange(len(rows))] = np.inf
        for first, block in _blocks(squared):
            distances = np.sqrt(block, out=block)
            parts.append(_summary(distances, k, others, median, radii))
            if smallest is not None:
                smallest.add(start + first, distances)
    found, indices, medians, counts = (None if part[0] is None else np.concatenate(part) for part in zip(*parts))
    radius, share_counts = (None, None) if smallest is None else smallest.result()
    return Neighbours(found, indices, medians, counts, radius, share_counts)


def _summary(distances, k, others, median, radii):
    """Of a block (n, M): the k nearest, their indices, medians and counts; what is at infinity comes last."""
    farthest = torch.from_numpy(distances).topk(k, largest=False).values[:, -1:].numpy()
    rows, columns = _where(distances <= farthest)
    values = distances[rows, columns]
    order = np.lexsort((columns, values, rows))
    chosen = order[np.searchsorted(rows, np.arange(len(distances)))[:, None] + np.arange(k)]
    middle = None
    if median:
        halves = [(others - 1) // 2, others // 2]
        middle = np.partition(distances, halves, axis=1)[:, halves].mean(1)
    counts = np.stack([(distances <= radius).sum(1) for radius in radii], 1) if len(radii) else None
    return values[chosen], columns[chosen], middle, counts


class _Smallest:
    """The `count` smallest of all distances with their rows; values at the limit itself are only tallied."""

    def __init__(self, rows, count):
        self.count, self.limit, self.tied = max(1, count), np.inf, np.zeros(rows, int)
        self.values, self.rows, self.held = [], [], 0

    def add(self, start, distances):
        rows, columns = _where(distances < self.limit)
        self.values.append(distances[rows, columns])
        self.rows.append((start + rows).astype(np.int32))
        self.held += len(rows)
        self.tied[start : start + len(distances)] += (distances == self.limit).sum(1)
        if self.held > 2 * self.count + BLOCK:
            self.prune()

    def prune(self):
        values, rows = np.concatenate(self.values), np.concatenate(self.rows)
        if len(values) >= self.count:
            self.limit = np.partition(values, self.count - 1)[self.count - 1]
            self.tied = np.bincount(rows[values == self.limit], minlength=len(self.tied))
            values, rows = values[values < self.limit], rows[values < self.limit]
        self.values, self.rows, self.held = [values], [rows], len(values)

    def result(self):
        self.prune()
        return float(self.limit), np.bincount(self.rows[0], minlength=len(self.tied)) + self.tied


def _pixel_squares(queries, reference):
    """Squared distances (n, M) of uint8 rows, float64 and exact: whole numbers far below 2^53."""
    a = _signed(queries)
    squared = torch.empty(len(a), len(reference), dtype=torch.float64)
    a2 = _lengths(a)[:, None]
    for start, rows in _chunks(reference, BYTES // _bytes(reference)):
        b = _signed(rows)
        squared[:, start : start + len(b)].copy_(_products(a, b)).mul_(-2).add_(a2).add_(_lengths(b))
    return squared.numpy()


def _signed(rows):
    """uint8 less 128 as int8: distances stay."""
    return torch.from_numpy(np.bitwise_xor(rows, 128).view(np.int8))


def _lengths(rows, at_once=32):
    """Squared lengths (n,) of int8 rows: a product's diagonal, as no other way is both exact and fast."""
    return torch.cat([_products(part, part).diagonal() for part in rows.split(at_once)]).double()


def _products(a, b):
    """a b^T of int8 rows, whole and exact: in slabs of columns whose sums fit their type."""
    width = 2**16 if _int8_serves() else 2**10  # times 2^14 is below 2^31, or is 2^24
    if a.shape[1] <= width:
        return _product(a, b)
    return sum(_product(x, y).double() for x, y in zip(a.split(width, dim=1), b.split(width, dim=1)))


def _product(a, b):
    if a.shape[1] > 1 and _int8_serves():  # of a single column torch's int8 product is uninitialised memory
        return torch._int_mm(a, b.T)
    return a.float() @ b.float().T


@lru_cache
def _int8_serves():
    """Whether the int8 product is right on this processor, and the faster way: x86 with VNNI.

    Without VNNI 16-bit sums saturate, or a plain loop takes three times as long as floats. Both ways are exact, so the
    clock decides the time alone.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False  # exact elsewhere, but a plain loop
    rows = torch.randint(-128, 128, (256, 4096), generator=torch.Generator().manual_seed(0))
    rows[::2] = torch.where(rows[::2] < 100, -128, 127)
    rows[:3] = torch.tensor([[-128], [127], [-1]])
    whole, floats = rows.to(torch.int8), rows.float()
    if not torch.equal(torch._int_mm(whole, whole.T).double(), rows.double() @ rows.double().T):
        return False
    return _seconds(lambda: torch._int_mm(whole, whole.T)) < _seconds(lambda: floats @ floats.T)


def _seconds(call):
    """The shortest of three runs."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)


def _float_squares(queries, reference, k, every, radii):
    """Squared distances (n, M) in float64; if not `every`, only those of the k nearest are right to WRONG."""
    narrow = np.result_type(queries.dtype, reference.dtype, np.float32) == np.float32
    if narrow and not every:
        squared = _float_squares_in(np.float32, queries, reference, k, every, radii)
        if squared is not None:
            return squared
    return _float_squares_in(np.float64, queries, reference, k, every, radii)


def _float_squares_in(kind, queries, reference, k, every, radii):
    """The same by products of one type; None where so many are unsure in float32 that float64 comes cheaper."""
    centre = centre_of(reference[:: -(-len(reference) // 256)].reshape(-1, _dim(reference))).astype(kind)
    a, a2 = _centred(queries, centre)
    squared, b2 = np.empty((len(a), len(reference))), []
    for start, rows in _chunks(reference, BYTES // _bytes(reference)):
        b, lengths = _centred(rows, centre)
        block = squared[:, start : start + len(b)]
        np.multiply(a @ b.T, -2, out=block)
        block += a2[:, None]
        block += lengths
        b2.append(lengths)
    b2 = np.concatenate(b2)
    # more than a blocked product's sums can lose; the last term is for squares below the smallest number
    bound, least = 8 * a.shape[1] ** 0.5 * np.finfo(kind).eps, a.shape[1] * np.finfo(kind).tiny
    for first, block in _blocks(squared):
        rounding = bound * (a2[first : first + len(block), None] + b2) + least
        unsure = _unsure(block, rounding, k, every, radii)
        if kind == np.float32 and unsure.sum() > 2 * k * len(block) + DOUBTFUL * block.size:
            return None
        _measure(block, unsure, queries[first:], reference)
    return squared


def centre_of(rows):
    """Mean (D,) of rows, float64; whole where the rows are, so that their squared distances stay exact."""
    centre = rows.mean(0, dtype=np.float64)
    return np.rint(centre) if (rows == np.rint(rows)).all() else centre


def _unsure(squared, rounding, k, every, radii):
    """Which pairs (n, M) may be among the k nearest or at the edge of a radius, and all that lost their digits."""
    farthest = torch.from_numpy(squared + rounding).topk(k, largest=False).values[:, -1:].numpy()
    unsure = squared - rounding <= farthest
    if every:
        unsure |= squared < rounding / WRONG
    for radius in radii:
        unsure |= abs(squared - np.square(np.float64(radius))) <= rounding
    return unsure


def _measure(squared, unsure, queries, reference):
    """Squared distances from the differences, in place."""
    rows, columns = _where(unsure)
    at_once = max(1, BYTES // (8 * queries.shape[1]))
    for start in range(0, len(rows), at_once):
        i, j = rows[start : start + at_once], columns[start : start + at_once]
        differences = queries[i].astype(np.float64) - reference[j].reshape(len(j), -1)
        squared[i, j] = np.einsum("nd,nd->n", differences, differences)


def _centred(rows, centre):
    """Rows less the centre and their squared lengths (n,), float64."""
    with np.errstate(over="ignore", invalid="ignore"):  # refused in the next line
        centred = rows.astype(centre.dtype) - centre
        lengths = np.square(centred).sum(1).astype(np.float64)
    if not np.isfinite(lengths).all():
        raise ValueError("Some rows hold values that are not finite, or too large to square.")
    return centred, lengths


def _where(mask):
    """Rows and columns (P,) where a mask is true: nonzero, faster."""
    return np.divmod(mask.ravel().nonzero()[0], mask.shape[1])


def _rows(rows):
    rows = getattr(rows, "images", rows)
    return rows if isinstance(rows, np.memmap) else as_array(rows)


def _dim(rows):
    return int(np.prod(rows.shape[1:]))


def _bytes(rows):
    """What a row takes here: int8 from pixels, float64 from anything else."""
    return _dim(rows) * (1 if rows.dtype == np.uint8 else 8)


def _chunks(rows, at_once):
    """(start, rows (n, D)) in nearly equal chunks; what was read of a file is given back."""
    count = -(-len(rows) // max(1, at_once))
    edges = [len(rows) * i // count for i in range(count + 1)]
    for start, stop in pairwise(edges):
        yield start, np.asarray(rows[start:stop]).reshape(stop - start, -1)
        if isinstance(rows, np.memmap) and rows.mode in ("r", "r+") and hasattr(mmap, "MADV_DONTNEED"):
            rows._mmap.madvise(mmap.MADV_DONTNEED)  # else the whole file counts as this process's memory


def _blocks(squared):
    """(start, block) of a few rows each, as views."""
    at_once = max(1, BLOCK // squared.shape[1])
    for start in range(0, len(squared), at_once):
        yield start, squared[start : start + at_once]


def _check(queries, reference, k, share, exclude_self):
    if queries.ndim < 2 or reference.ndim < 2 or 0 in (queries.size, reference.size):
        shapes = f"{queries.shape} and {reference.shape}"
        raise ValueError(f"Nearest neighbours need at least one query and one reference row, (N, ...); got {shapes}.")
    if _dim(queries) != _dim(reference):
        sizes = f"{_dim(queries)} and {_dim(reference)}"
        raise ValueError(f"Queries and reference rows have {sizes} values each: give both the same size.")
    if (queries.dtype == np.uint8) != (reference.dtype == np.uint8):
        raise ValueError("One set is uint8 pixels and the other is not: give both in the same numbers.")
    if exclude_self and len(queries) != len(reference):
        raise ValueError(f"exclude_self is for a set and itself, not for {len(queries)} and {len(reference)} rows.")
    others = len(reference) - exclude_self
    if not 1 <= k <= others:
        raise ValueError(f"k is {k}; there are {others} reference rows, so it must be from 1 to {others}.")
    if share is not None and not 0 < share <= 1:
        raise ValueError(f"A share of all pairs lies in (0, 1], not at {share}.")
