"""Latent exclusion and a tolerance to turn: two ways of releasing fewer images that lie near the training images.

Paper: Sun, Plawinski et al. 2023 (PLOS ONE, 10.1371/journal.pone.0280316), Sec. 4 (the tolerance "cannot be modulated")
and 5 (a latent space sampled "to avoid sampling around these points"); it asks for both and has neither. Chapter: pgan.
A generator is a plain function `synthesise(latents, labels)`, as in projection.py. The one decision worth knowing: what
is too near is not chosen but read off held-out real images, which are near a training image by chance alone.

Neither way is differential privacy, and neither has an epsilon. Dropping what lies near the training images bends the
release in a way that depends on them: around each of them a hole is left, and a hole can be seen too.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

from lookalike.data import to_uint8
from lookalike.metrics import as_array
from lookalike.metrics.neighbours import nearest
from lookalike.privacy.projection import as_labels, pick

RADII = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0, 14.0)
BATCH = 256


class NothingLeft(ValueError):
    """An exclusion that forbids too much; `redrawn` is the share of first draws that it refused."""

    def __init__(self, message, redrawn):
        super().__init__(message)
        self.redrawn = redrawn


@dataclass(frozen=True)
class Exclusion:
    """How near in the latent space is too near, for N training images.

    limit: image distance (Euclidean, grey levels 0 to 255 over all pixels) that the stated share of held-out images
    falls below. radii (N,): latent distance from each image's projection up to which half of the images made there lie
    within the limit; 0 where the projection itself does not; the largest distance tried where half still do (`beyond`
    counts these: their true radius is larger). distances (R,): the latent distances tried; shares (R,): of all images
    made at each, the share within the limit of its training image, 0 to 1; chance: the same of images made at random
    latents. Where chance is not near 0 the limit says little: a smooth image is near to everything.
    """

    limit: float
    radii: np.ndarray = field(repr=False)
    distances: np.ndarray = field(repr=False)
    shares: np.ndarray = field(repr=False)
    beyond: int
    chance: float

    @property
    def reached(self):
        """Training images with a radius above 0: those that the generator comes near to at all."""
        return int((self.radii > 0).sum())


# --- exclusion ----------------------------------------------------------------------------------------------


def distance_limit(images, held_out, rate=0.05):
    """The distance to the nearest of training `images` that a share `rate` of held-out real images falls below.

    Both uint8 (N, C, H, W); Euclidean, in grey levels. What no training made, an image nearer than this is suspicious.
    Held-out images of the same subjects would make it too small.
    """
    if not 0 < rate < 1:
        raise ValueError(f"rate is a share of the held-out images, between 0 and 1, not {rate}.")
    return float(np.quantile(nearest(held_out, images)[0], rate))


@torch.no_grad()
def calibrated_radius(
    images, held_out, latents, labels, synthesise, rate=0.05, distances=RADII, directions=8, seed=0
):  # fmt: skip
    """`Exclusion` of training images uint8 (N, C, H, W) with projected `latents` (N, Z) and labels (N,) or None.

    At each of `distances` from each latent, `directions` images are made, in random directions (the same ones at all
    distances). Their median distance to the training image crosses the limit (`distance_limit`) at the radius, linear
    between the distances tried. N x (R + 1) x directions images are made.

    What it does not promise: there is no epsilon. Another latent far away may give the same image, and the projection
    may have missed one. A latent of Z = 100 normal numbers is about 14 from any other and 10 from the origin, so that a
    radius well below 10 excludes nearly nothing: read the share that `sample_excluding` redraws beside it.
    """
    images, labels, latents = as_array(images), as_labels(labels, len(images)), torch.as_tensor(latents)
    distances = np.asarray(distances, float)
    if distances[0] != 0 or not (np.diff(distances) > 0).all():
        raise ValueError(f"The latent distances start at 0 and rise; these are {distances.tolist()}.")
    if latents.ndim != 2 or len(latents) != len(images):
        raise ValueError(f"Give one latent (Z,) per image; these are {tuple(latents.shape)} for {len(images)} images.")
    limit = distance_limit(images, held_out, rate)
    draws = torch.randn(len(latents), directions, latents.shape[1], generator=torch.Generator().manual_seed(seed))
    rays = draws / draws.norm(dim=2, keepdim=True)
    found = [_apart(images, latents[:, None] + r * (rays if r else rays[:, :1]), labels, synthesise) for r in distances]
    medians = np.stack([np.median(of, 1) for of in found], 1)
    return Exclusion(
        limit,
        radii=np.array([_crossing(distances, of, limit) for of in medians]),
        distances=distances,
        shares=np.array([(of <= limit).mean() for of in found]),
        beyond=int((medians <= limit).all(1).sum()),
        chance=float((_apart(images, draws, labels, synthesise) <= limit).mean()),
    )


def _apart(images, latents, labels, synthesise):
    """Distances (N, L) of each of images (N, C, H, W) to those made of its latents (N, L, Z)."""
    owners = torch.arange(len(images)).repeat_interleave(latents.shape[1])
    found = []
    for z, rows in zip(latents.flatten(0, 1).split(BATCH), owners.split(BATCH)):
        difference = images[rows.numpy()].astype(np.float32) - to_uint8(synthesise(z, pick(labels, rows)))
        found.append(np.linalg.norm(difference.reshape(len(rows), -1), axis=1))
    return np.concatenate(found).reshape(latents.shape[:2])


def _crossing(radii, medians, limit):
    """The radius at which medians (R,) first pass the limit: 0 if at once, the largest if never."""
    above = np.flatnonzero(medians > limit)
    if not len(above):
        return radii[-1]
    k = above[0]
    return np.interp(limit, medians[k - 1 : k + 1], radii[k - 1 : k + 1]) if k else 0.0


def nearest_centre(latents, labels, centres, centre_labels):
    """Distance (N,) of latents (N, Z) to the nearest of centres (M, Z) of the same label, infinite without one; and
    its index (N,), -1 without one.
    """
    distances, indices = torch.full((len(latents),), torch.inf), torch.full((len(latents),), -1)
    for label in labels.unique():
        rows, others = (labels == label).nonzero()[:, 0], (centre_labels == label).nonzero()[:, 0]
        if len(others):
            apart = torch.cdist(latents[rows], centres[others], compute_mode="donot_use_mm_for_euclid_dist")
            distances[rows], found = apart.min(1)
            indices[rows] = others[found]
    return distances, indices


def radius_that_redraws(share, latents, labels, centres, centre_labels):
    """The one radius around all centres within which that share of latents (N, Z) lies; they stand for all others."""
    if not 0 < share < 1:
        raise ValueError(f"The share to be redrawn lies between 0 and 1, not at {share}.")
    return float(nearest_centre(latents, labels, centres, centre_labels)[0].quantile(share))


def sample_excluding(noise, labels, centres, centre_labels, radius, generator=None, most=100):
    """Latents (N, Z), none within `radius` of a centre of its label, and the share of first draws that were.

    noise(n, generator): latents (n, Z). labels (N,). centres (M, Z), of labels (M,), with one radius or one each (M,);
    a radius of 0 excludes nothing. What is too near is drawn again, up to `most` times, so the latents follow `noise`
    restricted to what is allowed; `NothingLeft` where that is too little. With one generator state, no first draw
    depends on the radius.
    """
    labels, centres, centre_labels = (torch.as_tensor(x).cpu() for x in (labels, centres, centre_labels))
    radius = torch.as_tensor(radius, dtype=centres.dtype).expand(len(centres))
    latents = noise(len(labels), generator).cpu()
    near = first = _inside(latents, labels, centres, centre_labels, radius)
    for _ in range(most):
        rows = near.nonzero()[:, 0]
        if not len(rows):
            break
        latents[rows] = noise(len(rows), generator).cpu()
        near = torch.zeros_like(near)
        near[rows] = _inside(latents[rows], labels[rows], centres, centre_labels, radius)
    share = float(first.double().mean())
    if near.any():
        raise NothingLeft(
            f"After {most} more draws {int(near.sum())} of {len(labels)} latents still lie within the radius of a "
            "training image's: the radius leaves next to nothing, take a smaller one.",
            share,
        )
    return latents, share


def _inside(latents, labels, centres, centre_labels, radius):
    """Whether each latent (N, Z) is within the radius of a centre of its label; edges belong to the outside."""
    inside = torch.zeros(len(latents), dtype=torch.bool)
    for label in labels.unique():
        rows, others = labels == label, centre_labels == label
        apart = torch.cdist(latents[rows], centres[others], compute_mode="donot_use_mm_for_euclid_dist")
        inside[rows] = (apart < radius[others]).any(1)
    return inside


# --- tolerance ----------------------------------------------------------------------------------------------


def drop_nearest(distances, share):
    """Indices, sorted, of a pool without the `share` (0 up to 1) that has the smallest distances (N,).

    The number dropped is rounded down; of equal distances the first stored go.
    """
    if not 0 <= share < 1:
        raise ValueError(f"The share of the pool to be dropped is from 0 to below 1, not {share}.")
    order = np.argsort(distances, kind="stable")
    return np.sort(order[int(share * len(order) + 1e-9) :])


def tolerant_subset(distances, labels, share, n, seed=0):
    """Rows (n,) of a pool of made images: of each class the `share` nearest to real images dropped, the rest at random.

    distances (N,): of each pool image to the nearest training image; labels (N,). Classes keep the pool's proportions,
    so each is thinned alone; n is the same for every share, since attacks depend on it. One seed goes through the pool
    in one order, so releases of two shares differ only as far as they must.

    A strong tolerance is no safety: it leaves a hole around each training image, and an attacker who turns the scores
    round finds the members by being *far* from everything released (an AUC below 0.5).
    """
    distances, labels = np.asarray(distances, float), np.asarray(labels)
    if distances.shape != labels.shape or distances.ndim != 1:
        raise ValueError(f"Give a distance and a label per image; these are {distances.shape} and {labels.shape}.")
    order, chosen = np.random.default_rng(seed).permutation(len(labels)), []
    for label, wanted in class_counts(labels, n).items():
        rows = np.flatnonzero(labels == label)
        left = rows[drop_nearest(distances[rows], share)]
        if len(left) < wanted:
            raise ValueError(
                f"Without the nearest {share:.0%} the pool has {len(left)} images of class {label}, and {wanted} are "
                "to be released: make a larger pool or release fewer."
            )
        chosen.append(order[np.isin(order, left)][:wanted])
    return np.concatenate(chosen)


def class_counts(labels, n):
    """How many of n images each class gets, in the proportions of labels (N,): {class: count}, sums to n.

    Largest remainders; of equal ones the smaller class number.
    """
    classes, counts = np.unique(labels, return_counts=True)
    exact = n * counts / counts.sum()
    whole = np.floor(exact).astype(int)
    more = np.argsort(whole - exact, kind="stable")[: n - whole.sum()]
    whole[more] += 1
    return {int(k): int(count) for k, count in zip(classes, whole)}
