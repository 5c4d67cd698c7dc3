"""Maps of images to the plane, and how well each keeps the order of distances.

Paper: Arroyo Galende et al. 2026, "No Free Lunch ...", Sec. 4.1, Fig. 4, which gives no numbers; the authors'
`reducer_comparison.py`, which nothing calls (sheet, section 7 and D13). Chapter: no_free_lunch. A plane cannot keep the
distances of 784 pixels, so maps are read beside two controls: PCA, and a random projection, which has learned nothing.
What the authors call a flow fits the likelihood of an encoder that cannot be inverted, which rises without end as the
encoder collapses, and their map is then the encoder alone; `fit_flow` is one that has a likelihood.
"""

import math
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from lookalike.data import datasets
from lookalike.metrics import as_images, diversity, to_unit
from lookalike.metrics.intervals import bootstrap
from lookalike.metrics.neighbours import scan
from lookalike.metrics.plane_networks import Autoencoder, Flow, LinearMap
from lookalike.metrics.plane_networks import train as train_network

REDUCERS = ("isomap", "umap", "autoencoder", "flow", "tsne", "pca", "random")
PAIRED = 500  # images of which all pairs are compared, at most (authors' code)


@dataclass(frozen=True)
class ImageMap:
    """A fitted map: `transform` takes images (N, C, H, W) to points (N, 2); it also serves as a reducer in
    `privacy.density`. `shape` is (C, H, W).
    """

    model: object = field(repr=False)
    shape: tuple[int, ...]

    def transform(self, images):
        """Points (N, 2), float64; the map itself stays as it is."""
        images = as_images(images)
        if tuple(images.shape[1:]) != self.shape:
            raise ValueError(f"The map is of images {self.shape}; these are {tuple(images.shape[1:])}.")
        return np.asarray(self.model.transform(_pixels(images)), np.float64)


def fit_isomap(train, n_neighbors=15):
    """Isomap (scikit-learn) of [0, 1] pixels, the paper's choice; `density.fit_reducer` without noisy copies."""
    from sklearn.manifold import Isomap  # seconds to import

    return _fitted(Isomap(n_components=2, n_neighbors=n_neighbors).fit, train)


def fit_umap(train, n_neighbors=15, min_dist=0.1, seed=42):
    """UMAP of [0, 1] pixels with the authors' settings. Images of one call are settled together."""
    return _fitted(partial(diversity.fit_umap, n_neighbors=n_neighbors, min_dist=min_dist, seed=seed), train)


def fit_pca(train):
    """The two principal components of the pixels: the best linear map by squared error. A control."""
    return _fitted(partial(LinearMap.principal, dim=2), train)


def fit_random(train, seed=0):
    """A Gaussian random projection of the pixels: a map that has learned nothing. A control."""
    return _fitted(partial(LinearMap.random, dim=2, seed=seed), train)


def fit_autoencoder(train, epochs=200, width=32, seed=0):
    """The latent plane of a convolutional autoencoder; `width` channels first (authors: 32, a multiple of 8).

    Squared error, mean over [0, 1] pixels, plus 0.01 |z|^2; AdamW (1e-3, weight decay 1e-4); every tenth image is held
    out, and the weights with its lowest loss are kept, at most `epochs` and at most 15 after the best. Kernels,
    strides and the decoder are not in the fact sheet: here 3, 2 and a mirror image.
    """
    images = as_images(train)
    with _seeded(seed):
        model = Autoencoder(tuple(images.shape[1:]), width)
        model.history = train_network(model, torch.from_numpy(_pixels(images)), epochs)
    return ImageMap(model, model.shape)


def fit_flow(train, epochs=200, dim=16, couplings=8, hidden=256, seed=0):
    """The first two latents of an invertible flow on `dim` principal components of the pixels.

    differs: the authors train the "likelihood" of an encoder that cannot be inverted; here f is a bijection and the
    likelihood of the components exact. Likelihood alone treats all latents alike, so which two make the map would be
    chance: the loss adds how much of the components' variance f^-1 misses with the other latents at 0 (Brehmer and
    Cranmer 2020, "Flows for simultaneous manifold learning and density estimation"). It starts as whitened PCA.
    Couplings and hidden units are the authors', training as in `fit_autoencoder`.
    """
    images = as_images(train)
    rows = _pixels(images)
    if not 2 < dim <= min(rows.shape[1], len(rows) - 1):
        raise ValueError(f"dim is {dim}; from {len(rows)} images of {rows.shape[1]} pixels it is at least 3 and fewer.")
    pca = LinearMap.principal(rows, dim)
    components = torch.from_numpy(pca.transform(rows).astype(np.float32))
    with _seeded(seed):
        model = Flow(pca, components.std(0), couplings, hidden)
        model.history = train_network(model, components, epochs)
    return ImageMap(model, tuple(images.shape[1:]))


def tsne_refit(train, test, perplexity=30.0, seed=0):
    """Points of `train` and of `test`, (N, 2) and (M, 2), by a t-SNE of both together.

    No map: it has no place for an image that was not in the fit, and here test images move the training images. So its
    figures are not comparable with those of maps, which see the test images first when they are placed.
    """
    return tuple(diversity.tsne(_pixels(train), _pixels(test), perplexity=perplexity, seed=seed))


# Fig. 4


def compare_reducers(train, test, names=REDUCERS, seed=0, epochs=200, width=32):
    """One plain dict per reducer: how the order of distances in pixels survives in the plane.

    train (N, C, H, W) fits the maps, test (M, C, H, W) is placed on them. Coordinates of either space are scaled to
    [0, 1] over `train`. r_k: distance of a test image to its k-th nearest training image, k = floor(sqrt(N)), 5 to 100.
    All but `seconds`: higher is better.

    distance_ranks: Spearman of 1/r_k in pixels and in the plane, below 0 set to 0; low, high: its 95 % BCa interval
    over test images, the map fixed. as_code: 0.7 of that and 0.3 of the Spearman of pairwise cosine similarities, -0.3
    to 1. pairwise: Spearman of pairwise distances, -1 to 1, what "rank correlation of distances" could also mean; both
    over at most 500 test images. None where all distances are equal. refit: whether test images were in the fit.
    seconds: to fit and place. `epochs` and `width` are those of the two networks (flow: 8 `width` hidden units).
    """
    if unknown := [name for name in names if name not in REDUCERS]:
        raise ValueError(f"Reducers are {', '.join(REDUCERS)}, not {', '.join(map(str, unknown))}.")
    train, test = as_images(train), as_images(test)
    if len(test) < 3:
        raise ValueError(f"Ranks need at least three test images, not {len(test)}.")
    some = np.random.default_rng(seed).permutation(len(test))[:PAIRED]
    pixels = _distances(_pixels(train), _pixels(test), some)
    rows = []
    for name in names:
        started = time.perf_counter()
        points = _place(name, train, test, seed, epochs, width)
        seconds = time.perf_counter() - started
        scores = _scores(pixels, _distances(*points, some), seed)
        rows.append({"reducer": name, "refit": name == "tsne", **scores, "seconds": seconds})
    return rows


def compare_cell(folder, *, data, per_class_train, per_class_test, seed, epochs, names=REDUCERS, width=32):
    """`compare_reducers` on the first images of each class of both splits of a named set, as a stage: {"rows": [...]}.

    Paper: Fig. 4 gives no sizes; 200 and 100 per class are the reducer's and the samples' (sheet A5).
    """
    train = datasets.load(data, "train").first_per_class(per_class_train)
    test = datasets.load(data, "test").first_per_class(per_class_test)
    return {"rows": compare_reducers(train.images, test.images, names, seed, epochs, width)}


def _place(name, train, test, seed, epochs, width):
    """Points (N, 2) of train and (M, 2) of test."""
    if name == "tsne":
        return tsne_refit(train, test, seed=seed)
    fit = {
        "isomap": fit_isomap,
        "umap": partial(fit_umap, seed=seed),
        "autoencoder": partial(fit_autoencoder, epochs=epochs, width=width, seed=seed),
        "flow": partial(fit_flow, epochs=epochs, hidden=8 * width, seed=seed),
        "pca": fit_pca,
        "random": partial(fit_random, seed=seed),
    }[name]
    fitted = fit(train)
    return fitted.transform(train), fitted.transform(test)


def _distances(train, test, some):
    """Of one space: r_k (M,) of the test rows, and cosines and distances (P,) of the pairs of `some` of them."""
    from sklearn.metrics.pairwise import cosine_similarity, euclidean_distances
    from sklearn.preprocessing import MinMaxScaler

    scale = MinMaxScaler().fit(train.astype(np.float64))
    train, test = scale.transform(train), scale.transform(test)
    k = max(5, min(100, math.isqrt(len(train))))
    radii = scan(test, train, k).distances[:, -1]
    upper = np.triu_indices(len(some), 1)
    return radii, cosine_similarity(test[some])[upper], euclidean_distances(test[some])[upper]


def _scores(pixels, plane, seed):
    radii, cosines, gaps = (spearman(a, b) for a, b in zip(pixels, plane))  # 1/r has the ranks of r, turned round
    interval = bootstrap(spearman, pixels[0], plane[0], resamples=1000, seed=seed)
    clipped = max(radii, 0.0) if math.isfinite(radii) else radii
    ends = {end: None if interval[end] is None else max(interval[end], 0.0) for end in ("low", "high")}
    found = {"distance_ranks": clipped, **ends, "as_code": 0.7 * clipped + 0.3 * cosines, "pairwise": gaps}
    return {name: x if x is not None and math.isfinite(x) else None for name, x in found.items()}


def spearman(a, b):
    """Rank correlation of values (N,) and (N,), -1 to 1; NaN where either is constant."""
    from scipy.stats import rankdata

    a, b = rankdata(a), rankdata(b)
    a, b = a - a.mean(), b - b.mean()
    size = math.sqrt((a @ a) * (b @ b))
    return float(a @ b) / size if size else math.nan


def _fitted(fit, train):
    images = as_images(train)
    return ImageMap(fit(_pixels(images)), tuple(images.shape[1:]))


def _pixels(images):
    return to_unit(as_images(images)).flatten(1).numpy()


@contextmanager
def _seeded(seed):
    """Initial weights, batches and dropout from `seed`; the global stream goes on as if nothing happened."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
