"""How varied a set of images is: the Vendi score, and maps of images in the plane (UMAP, t-SNE).

Papers: Friedman and Dieng 2023, "The Vendi Score"; McInnes et al. 2018, UMAP (umap-learn); chapter: pgan, whose map is
fitted on real images alone and then shows where synthetic ones fall. UMAP spends its time on finding neighbours among
tens of thousands of pixels; we hand it exact ones from `neighbours.scan`, and answer its questions for neighbours of
new images the same way. So it never sees the pixels, only a random projection to 64 numbers, which it uses for
nothing but placing parts of the graph that hang together with no other.
"""

import warnings
from dataclasses import dataclass, field

import numpy as np

from lookalike.metrics import as_array
from lookalike.metrics.neighbours import scan

STAND_IN = 64
AT_ONCE = 2**24  # pixels turned into floats at one time


def vendi_score(features):
    """Vendi score of features (N, D): the effective number of different images, 1 to N, higher is more diverse.

    exp of the entropy of the eigenvalues of K / N, K the cosine similarities (eq. 2 and 3 with a linear kernel on rows
    of unit length). N equal rows give 1, N orthogonal ones N. It cannot pass min(N, D), stays low where all features
    are positive, and says nothing about realism: noise scores high. Compare only at equal N and in one extractor.
    """
    rows = np.asarray(as_array(features), np.float64)
    if rows.ndim != 2 or len(rows) == 0:
        raise ValueError(f"The Vendi score needs features (N, D) of at least one image, not {rows.shape}.")
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if not (np.isfinite(lengths) & (lengths > 0)).all():
        raise ValueError("The Vendi score needs finite features, none of them all zero: such a row has no direction.")
    rows = rows / lengths
    product = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows  # the same eigenvalues but for zeros
    shares = np.linalg.eigvalsh(product) / len(rows)
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


@dataclass
class Map:
    """A UMAP fitted on `rows`; `points` (N, P), float32, are where they fell; P is n_components."""

    points: np.ndarray = field(repr=False)
    rows: np.ndarray = field(repr=False)
    model: object = field(repr=False)
    index: object = field(repr=False)
    seed: int

    def transform(self, images):
        """Where new images (M, ...) fall on the map, (M, P) float32; the map itself stays as it is.

        In the numbers of the fitted ones (uint8 or floats). Repeatable, but the images of one call are settled
        together: the same image can fall a little elsewhere in other company.
        """
        rows = _flat(images)
        if rows.shape[1] != self.rows.shape[1] or (rows.dtype == np.uint8) != (self.rows.dtype == np.uint8):
            raise ValueError(
                f"The map is of {self.rows.shape[1]} numbers ({self.rows.dtype}) an image; "
                f"these have {rows.shape[1]} ({rows.dtype})."
            )
        self.index.found = scan(rows, self.rows, k=self.model.n_neighbors)
        return self.model.transform(_stand_in(rows, self.seed))


class _ExactIndex:
    """Stands where UMAP keeps its search index, and answers with what was found in the rows themselves."""

    _angular_trees = False
    found = None

    def query(self, stand_in, k, epsilon):
        return self.found.indices.astype(np.int32), self.found.distances.astype(np.float32)


def fit_umap(real, n_neighbors=20, min_dist=0.0, seed=0, n_components=2):
    """UMAP to the plane, or to more axes, fitted on real images (N, ...) or rows (N, D) alone: a `Map` for any others.

    pGAN's settings; `n_components` 2 gives its figure's plane, 64 the space of its attacks. Euclidean distances between
    the rows in their own units; the other settings are umap-learn's. The same seed gives the same map on the same
    machine. Distances and areas on a map mean little: read it for neighbourhoods, and see how far they hold with
    scikit-learn's `trustworthiness`.
    """
    from umap import UMAP  # takes seconds, and up to minutes where numba compiles for the first time

    rows = _flat(real)
    if len(rows) <= n_neighbors:
        raise ValueError(f"A map with {n_neighbors} neighbours needs more images than that, not {len(rows)}.")
    if not 1 <= n_components < len(rows) - 1:
        raise ValueError(f"A map of {len(rows)} images has 1 to {len(rows) - 2} components, not {n_components}.")
    found, index = scan(rows, rows, k=n_neighbors), _ExactIndex()
    neighbours = found.indices.astype(np.int32), found.distances.astype(np.float32), index
    settings = {"min_dist": min_dist, "random_state": seed, "n_jobs": 1, "precomputed_knn": neighbours}
    model = UMAP(n_neighbors, n_components, **settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"precomputed_knn\[2\]")  # that the index is not umap's own
        model.fit(_stand_in(rows, seed))
    return Map(model.embedding_, rows, model, index, seed)


def tsne(*sets, perplexity=30.0, seed=0):
    """t-SNE (scikit-learn) of several sets of images or rows together: one array (N, 2), float32, per set.

    t-SNE has no map for new images: everything is fitted at once, so every point depends on every set given, and
    the synthetic images shape the picture of the real ones. Only what came from one call may be compared.
    """
    from sklearn.manifold import TSNE

    parts = [_flat(images).astype(np.float32) for images in sets]
    together = np.concatenate(parts)
    if len(together) <= perplexity:
        raise ValueError(f"A perplexity of {perplexity:g} needs more images than that, not {len(together)}.")
    points = TSNE(perplexity=perplexity, random_state=seed).fit_transform(together)
    return np.split(points, np.cumsum([len(part) for part in parts])[:-1])


def _flat(images):
    """Rows (N, D), uint8 or float32."""
    array = as_array(images)
    if array.ndim < 2 or len(array) == 0:
        raise ValueError(f"A map needs images (N, ...) or rows (N, D), not {array.shape}.")
    rows = array.reshape(len(array), -1)
    return rows if rows.dtype == np.uint8 else rows.astype(np.float32)


def _stand_in(rows, seed):
    """Random projection (N, 64): about the rows' distances, and two rows are equal only if they are."""
    directions = np.random.default_rng(seed).standard_normal((rows.shape[1], STAND_IN), np.float32) / STAND_IN**0.5
    step = max(1, AT_ONCE // rows.shape[1])
    return np.concatenate([rows[i : i + step].astype(np.float32) @ directions for i in range(0, len(rows), step)])
