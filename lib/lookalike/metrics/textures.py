"""Grey-level matrices of images and the features read from them, first order and shape too, in numpy alone.

The features are those of pyradiomics 3.0.1 (van Griethuysen et al. 2017, "Computational Radiomics System to Decode the
Radiographic Phenotype", BSD-3) in two dimensions, all directions at distance 1, written anew: pyradiomics does not
install by pip on Python 3.11. Every texture matrix is a list of its entries that are not zero, (matrix, grey level,
size, count), for many images at once.

`levels` are grey levels from 1, int (N, H, W), 0 outside the region; each family gives {feature's name: values (N,)}.
"""

from functools import lru_cache

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

EPS = np.spacing(1)  # pyradiomics adds it inside every logarithm
STEPS = ((0, 1), (1, 0), (1, 1), (1, -1))  # the four directions, in rows and columns


def rectangle_shape(h, w):
    """Closed forms for an h x w rectangle without its first pixel, outlined through the edges' midpoints."""
    rows, columns = (axis.ravel()[1:].astype(np.float64) for axis in np.mgrid[:h, :w])
    minor, major = np.sqrt(np.linalg.eigvalsh(np.cov([rows, columns], ddof=0)))
    surface, perimeter = h * w - 1.5, 2 * (h + w) - 6 + 6 * np.sqrt(0.5)
    found = {
        "Elongation": minor / major,
        "MajorAxisLength": 4 * major,
        "MinorAxisLength": 4 * minor,
        "MaximumDiameter": np.sqrt(max(h**2 + (w - 1) ** 2, (h - 1) ** 2 + w**2)),
        "MeshSurface": surface,
        "Perimeter": perimeter,
        "PerimeterSurfaceRatio": perimeter / surface,
        "PixelSurface": h * w - 1,
        "Sphericity": 2 * np.sqrt(np.pi * surface) / perimeter,
    }
    return _named("shape2D", found)


def first_order(pixels, levels, shift=0, pixel_area=1):
    """Of the pixels (N, P) themselves; only Entropy and Uniformity read the levels."""
    x = pixels.astype(np.float64)
    p10, p25, median, p75, p90 = np.percentile(x, [10, 25, 50, 75, 90], axis=1)
    mean = x.mean(1)
    deviations = x - mean[:, None]
    squares = deviations * deviations
    variance = squares.mean(1)
    scale = np.where(variance == 0, 1, variance)
    energy = np.square(x + shift).sum(1)
    middle = (x >= p10[:, None]) & (x <= p90[:, None])
    count = middle.sum(1)
    robust_mean = (x * middle).sum(1) / count
    p = _histogram(np.arange(len(x))[:, None] + 0 * levels, levels, len(x)) / x.shape[1]
    found = {
        "10Percentile": p10,
        "90Percentile": p90,
        "Energy": energy,
        "Entropy": _entropy(p),
        "InterquartileRange": p75 - p25,
        "Kurtosis": np.square(squares).mean(1) / scale**2,
        "Maximum": x.max(1),
        "MeanAbsoluteDeviation": np.abs(deviations).mean(1),
        "Mean": mean,
        "Median": median,
        "Minimum": x.min(1),
        "Range": x.max(1) - x.min(1),
        "RobustMeanAbsoluteDeviation": (np.abs(x - robust_mean[:, None]) * middle).sum(1) / count,
        "RootMeanSquared": np.sqrt(energy / x.shape[1]),
        "Skewness": (squares * deviations).mean(1) / scale**1.5,
        "TotalEnergy": energy * pixel_area,
        "Uniformity": np.square(p).sum(1),
        "Variance": variance,
    }
    return _named("firstorder", found)


def glcm(levels, correlation=False):
    """Pairs of neighbours: one symmetric matrix per image and direction, features averaged over directions.

    `correlation` adds MCC, the only feature that needs the matrix whole. An entry stands for itself and its mirror.
    """
    n, top = len(levels), levels.max((1, 2))
    pairs = [_pairs_along(levels, step) for step in STEPS]
    image, a, b = (np.concatenate(part) for part in zip(*pairs))
    direction = np.repeat(np.arange(4), [len(part[0]) for part in pairs])
    matrix, low, high, count = _entries(4 * image + direction, np.minimum(a, b), np.maximum(a, b))
    total = np.bincount(matrix, count, 4 * n)
    p = count / total[matrix] / np.where(low < high, 2, 1)
    both = p * np.where(low < high, 2, 1)

    def mean(values):
        return np.bincount(matrix, both * values, 4 * n)

    off = low < high
    px = _histogram(np.append(matrix, matrix[off]), np.append(low, high[off]), 4 * n, np.append(p, p[off]))
    sums, gaps = (_histogram(matrix, k, 4 * n, both) for k in (low + high, high - low))
    apart, ng = np.arange(gaps.shape[1]), np.repeat(top, 4)[:, None]
    mu = mean((low + high) / 2)
    x, y = low - mu[matrix], high - mu[matrix]
    variance, covariance = mean((x * x + y * y) / 2), mean(x * y)
    hx, hxy = _entropy(px), -mean(np.log2(p + EPS))
    hxy1 = -mean(np.log2(px[matrix, low] * px[matrix, high] + EPS))
    gap_mean = gaps @ apart
    flat = (px > 0).sum(1) < 2
    found = {
        "Autocorrelation": mean(low * high),
        "ClusterProminence": mean((x + y) ** 4),
        "ClusterShade": mean((x + y) ** 3),
        "ClusterTendency": mean((x + y) ** 2),
        "Contrast": gaps @ apart**2,
        "Correlation": np.where(variance == 0, 1, covariance / (variance + EPS)),
        "DifferenceAverage": gap_mean,
        "DifferenceEntropy": _entropy(gaps),
        "DifferenceVariance": (gaps * (apart - gap_mean[:, None]) ** 2).sum(1),
        "Id": gaps @ (1 / (1 + apart)),
        "Idm": gaps @ (1 / (1 + apart**2)),
        "Idmn": (gaps / (1 + (apart / ng) ** 2)).sum(1),
        "Idn": (gaps / (1 + apart / ng)).sum(1),
        "Imc1": np.where(flat, 0, (hxy - hxy1) / np.where(flat, 1, hx)),
        "Imc2": np.where(flat, 0, np.sqrt(np.maximum(1 - np.exp(-2 * (2 * hx - hxy)), 0))),
        "InverseVariance": gaps[:, 1:] @ (1 / apart[1:] ** 2),
        "JointAverage": mu,
        "JointEnergy": mean(p),
        "JointEntropy": hxy,
        "MaximumProbability": _largest(matrix, p, 4 * n),
        "SumAverage": 2 * mu,
        "SumEntropy": _entropy(sums),
        "SumSquares": variance,
    }
    if correlation:
        found["MCC"] = _maximal_correlation(matrix, low, high, p, px)
    return _named("glcm", {name: values.reshape(n, 4).mean(1) for name, values in found.items()})


def _maximal_correlation(matrix, low, high, p, px):
    """Second largest singular value of P / sqrt(px py) per matrix; 1 where there is one level."""
    whole = np.zeros((len(px), px.shape[1], px.shape[1]))
    root = np.sqrt(px)
    whole[matrix, low, high] = whole[matrix, high, low] = p / (root[matrix, low] * root[matrix, high])
    second = np.sort(np.abs(np.linalg.eigvalsh(whole)), axis=1)[:, -2]
    return np.where((px > 0).sum(1) < 2, 1, second)


def glrlm(levels):
    """Runs of equal levels: one matrix per image and direction, features averaged over directions."""
    n, h, w = levels.shape
    flat = np.concatenate([levels.reshape(n, -1), np.zeros((n, 1), int)], 1)  # the last slot: between two lines
    parts = []
    for k, step in enumerate(STEPS):
        order = _lines(h, w, step)
        line = flat[:, order].ravel()
        starts = np.append(0, np.flatnonzero(line[1:] != line[:-1]) + 1)
        lengths = np.diff(np.append(starts, line.size))
        kept = line[starts] > 0
        parts.append((4 * (starts[kept] // len(order)) + k, line[starts[kept]], lengths[kept]))
    found = _sized(*(np.concatenate(part) for part in zip(*parts)), 4 * n)
    words = ("Run", "LongRun", "Run", "RunLength", "ShortRun")
    return _named("glrlm", {k.format(*words): v.reshape(n, 4).mean(1) for k, v in found.items()})


@lru_cache(maxsize=32)
def _lines(h, w, step):
    """Flat indices of the lines of an h x w image along `step`, the slot h w ahead of each."""
    index = np.arange(h * w).reshape(h, w)
    if step == (0, 1):
        lines = list(index)
    elif step == (1, 0):
        lines = list(index.T)
    else:
        index = index if step == (1, 1) else index[:, ::-1]
        lines = [index.diagonal(k) for k in range(1 - h, w)]
    return np.concatenate([np.append(h * w, line) for line in lines])


def gldm(levels):
    """Pixels by how many of their 8 neighbours have their level, themselves counted."""
    n = len(levels)
    same = np.zeros(levels.shape, int)
    for step in STEPS:
        first, second = _shifted(step)
        equal = levels[first] == levels[second]
        same[first] += equal
        same[second] += equal
    inside = levels > 0
    found = _sized(np.nonzero(inside)[0], levels[inside], same[inside] + 1, n)
    words = ("", "LargeDependence", "Dependence", "Dependence", "SmallDependence")
    return _named("gldm", {k.format(*words): v for k, v in found.items()})


def glszm(levels):
    """Zones: connected pixels of one level, diagonals included."""
    number = np.arange(levels.size).reshape(levels.shape)
    edges = []
    for step in STEPS:
        first, second = _shifted(step)
        equal = levels[first] == levels[second]
        edges.append((number[first][equal], number[second][equal]))
    a, b = (np.concatenate(part) for part in zip(*edges))
    graph = coo_array((np.ones(len(a), bool), (a, b)), shape=(levels.size, levels.size))
    count, zone = connected_components(graph, directed=False)
    sizes = np.bincount(zone, minlength=count)
    member = np.empty(count, int)
    member[zone] = number.ravel()  # any pixel of a zone
    kept = levels.ravel()[member] > 0
    member, sizes = member[kept], sizes[kept]
    found = _sized(member // levels[0].size, levels.ravel()[member], sizes, len(levels))
    words = ("Zone", "LargeArea", "Zone", "SizeZone", "SmallArea")
    return _named("glszm", {k.format(*words): v for k, v in found.items()})


def _sized(matrix, level, size, n):
    """Features that GLRLM, GLDM and GLSZM share, per matrix (n,), of events with a grey level and a size."""
    total = np.bincount(matrix, minlength=n)
    by_level, by_size = _histogram(matrix, level, n), _histogram(matrix, size, n)
    i, j = np.arange(by_level.shape[1]), np.arange(by_size.shape[1])
    pg, ps = by_level / total[:, None], by_size / total[:, None]
    entries, level, size, count = _entries(matrix, level, size)
    p, i2, j2 = count / total[entries], np.square(level, dtype=np.float64), np.square(size, dtype=np.float64)

    def mean(values):
        return np.bincount(entries, p * values, n)

    return {
        "GrayLevelNonUniformity": total * np.square(pg).sum(1),
        "GrayLevelNonUniformityNormalized": np.square(pg).sum(1),
        "GrayLevelVariance": _variance(pg, i),
        "HighGrayLevel{0}Emphasis": mean(i2),
        "{1}Emphasis": mean(j2),
        "{1}HighGrayLevelEmphasis": mean(i2 * j2),
        "{1}LowGrayLevelEmphasis": mean(j2 / i2),
        "LowGrayLevel{0}Emphasis": mean(1 / i2),
        "{2}Entropy": -mean(np.log2(p + EPS)),
        "{3}NonUniformity": total * np.square(ps).sum(1),
        "{3}NonUniformityNormalized": np.square(ps).sum(1),
        "{0}Percentage": total / (by_size @ j),
        "{2}Variance": _variance(ps, j),
        "{4}Emphasis": mean(1 / j2),
        "{4}HighGrayLevelEmphasis": mean(i2 / j2),
        "{4}LowGrayLevelEmphasis": mean(1 / (i2 * j2)),
    }


def ngtdm(levels):
    """How far pixels lie from the mean of their up to 8 neighbours, by grey level."""
    inside = levels > 0
    around, neighbours = (_box(maps) - maps for maps in (levels, inside.astype(int)))
    image, level = np.nonzero(inside)[0], levels[inside]
    s = _histogram(image, level, len(levels), np.abs(level - around[inside] / neighbours[inside]))
    p = _histogram(image, level, len(levels))
    pixels = p.sum(1)
    p /= pixels[:, None]
    rows = [_ngtdm_of_one(np.flatnonzero(q), q[q > 0], t[q > 0], m) for q, t, m in zip(p, s, pixels)]
    return _named("ngtdm", {name: np.array([row[name] for row in rows]) for name in rows[0]})


def _ngtdm_of_one(i, p, s, pixels):
    """p: shares of the levels i (L,); s: sums of differences."""
    gaps, weighted, total = i[:, None] - i, i * p, (p * s).sum()
    spread = np.abs(weighted[:, None] - weighted).sum()
    pairs = p[:, None] + p
    products = (p * s)[:, None] + p * s
    contrast = (p @ np.square(gaps) @ p) * s.sum() / pixels
    return {
        "Busyness": total / spread if spread else 0.0,
        "Coarseness": 1 / total if total else 1e6,
        "Complexity": (np.abs(gaps) * products / pairs).sum() / pixels,
        "Contrast": contrast / (len(i) * (len(i) - 1)) if len(i) > 1 else 0.0,
        "Strength": (pairs * np.square(gaps)).sum() / s.sum() if s.sum() else 0.0,
    }


# ---- counting -------------------------------------------------------------------------------------------------------


def _named(kind, found):
    return {f"{kind}_{name}": values for name, values in found.items()}


def _shifted(step):
    """Two index tuples of (N, H, W): a pixel and its neighbour at `step`."""
    down, right = step
    columns = (slice(None, -1), slice(1, None)) if right else (slice(None), slice(None))
    rows = (slice(None, -1), slice(1, None)) if down else (slice(None), slice(None))
    order = 1 if right >= 0 else -1
    return tuple((slice(None), r, c) for r, c in zip(rows, columns[::order]))


def _pairs_along(levels, step):
    """Image and both grey levels of every pair of neighbours inside, each (P,)."""
    first, second = _shifted(step)
    a, b = levels[first], levels[second]
    valid = (a > 0) & (b > 0)
    return np.nonzero(valid)[0], a[valid], b[valid]


def _entries(matrix, level, size):
    """What occurs among the events, and how often: matrix, level, size and count, each (E,)."""
    levels, sizes = level.max() + 1, size.max() + 1
    keys = np.sort((matrix * levels + level) * sizes + size)
    starts = np.append(0, np.flatnonzero(keys[1:] != keys[:-1]) + 1)
    found = keys[starts]
    return found // sizes // levels, found // sizes % levels, found % sizes, np.diff(np.append(starts, len(keys)))


def _histogram(row, value, n, weights=None):
    """Sums of the weights, or counts, at (row, value): float (n, largest value + 1)."""
    width = value.max() + 1
    counts = np.bincount((row * width + value).ravel(), weights, n * width)
    return counts.reshape(n, width).astype(np.float64)


def _box(maps):
    """Sums over 3 x 3 pixels, zeros beyond the border."""
    padded = np.pad(maps, ((0, 0), (1, 1), (1, 1)))
    rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    return rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]


def _largest(row, values, n):
    largest = np.zeros(n)
    np.maximum.at(largest, row, values)
    return largest


def _entropy(p):
    return -(p * np.log2(p + EPS)).sum(1)


def _variance(p, values):
    return (p * np.square(values - (p @ values)[:, None])).sum(1)
