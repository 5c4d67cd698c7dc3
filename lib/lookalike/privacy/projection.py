"""Latent projection: how near a generator can come to a given image, for members and held-out images alike.

Papers: Karras et al. 2020, "Analyzing and Improving the Image Quality of StyleGAN", appendix on projection, for the
schedule; Carrasco Limeros et al. 2022, "GAN-based generative modelling for dermatological applications", for the
cosine statistic. Chapter: stylegan2_dermatology. A generator is a plain function `synthesise(latents, labels)`; those
of ours have adapters here. The one decision worth knowing: each image is projected as if it were alone (Adam works per
number, the noise of a step is the same for all), so batches only save time, and every image gets the same budget.

Attacker: has the generator's weights. Chance: an AUC of 0.5. Misleads: an image is reached because it is plain or of a
frequent kind, not only because it was learnt, so an error says nothing without those of held-out images beside it.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from lookalike.metrics import as_array, as_images
from lookalike.models.vae import from_unit

NOISE_WEIGHT = 1e5  # of the noise maps' autocorrelation
SMALLEST_MAP = 8  # px to which noise maps are pooled


@dataclass(frozen=True)
class Start:
    """Where projections begin: mean latents (K, *shape), one per class or one for all, and how far latents lie from
    them, spread (K,), the root of the mean squared distance.
    """

    means: torch.Tensor
    spread: torch.Tensor

    def of(self, labels, n):
        """Means (n, *shape) and spreads (n,) for labels (n,); without labels there must be one mean for all."""
        if len(self.means) == 1:
            return self.means.expand(n, *self.means.shape[1:]), self.spread.expand(n)
        if labels is None:
            raise ValueError(f"This start has {len(self.means)} classes; give each image its label.")
        return self.means[labels], self.spread[labels]


@dataclass(frozen=True)
class Projector:
    """One budget for every image. Defaults are the paper's: 1000 Adam steps at 0.1, up over the first 5 %, down to 0
    over the last 25 %; noise on the latents, `latent_noise` of their spread, gone after 75 %.

    perceptual: function of two batches of images in [-1, 1] that gives distances (N,) with gradients; None is the mean
    squared difference of [0, 1] pixels. noise_shapes: of the generator's noise maps (1, H, W), which are then
    optimised too and given to `synthesise` as a third argument, a list of (N, 1, H, W).
    """

    steps: int = 1000
    lr: float = 0.1
    latent_noise: float = 0.05
    perceptual: Callable | None = None
    noise_shapes: tuple[tuple[int, int, int], ...] = ()
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self):
        if self.steps < 1 or self.batch_size < 1:
            raise ValueError(f"steps and batch_size must be 1 or more, not {self.steps} and {self.batch_size}.")


@dataclass(frozen=True)
class Projection:
    """errors (N,): the loss at the end, without any regularisation, 0 where the image is reached; images (N, C, H, W)
    in [-1, 1], rendered with the optimised noise maps; latents (N, *shape).
    """

    errors: np.ndarray
    images: torch.Tensor = field(repr=False)
    latents: torch.Tensor = field(repr=False)

    @property
    def scores(self):
        """Minus the errors (N,): larger where the generator comes nearer, for `attack_result`."""
        return -self.errors


@dataclass(frozen=True)
class CosineDistances:
    """Cosine distances (N,) of images to their projections in a feature space, 0 to 2; their mean and quartiles."""

    distances: np.ndarray = field(repr=False)
    mean: float
    q1: float
    median: float
    q3: float


def gan_access(generator):
    """`synthesise` and the latents' shape of one of our GANs (gan.py, mcgan.py); it runs in evaluation mode."""

    def synthesise(latents, labels):
        device = next(generator.parameters()).device
        with evaluating(generator):
            return generator(latents.to(device), labels.to(device))

    return synthesise, (generator.latent_dim,)


def vae_access(model):
    """`synthesise` and the latents' shape of a VAE's decoder; it runs in evaluation mode."""

    def synthesise(latents, labels):
        device = next(model.parameters()).device
        with evaluating(model):
            return from_unit(model.decode(latents.to(device), labels.to(device)).sigmoid())

    return synthesise, (model.latent_dim,)


def normal_start(latent_shape):
    """`Start` for standard normal latents: zero, and the root of their number."""
    means = torch.zeros(1, *latent_shape)
    return Start(means, torch.tensor([means.numel() ** 0.5]))


def mean_latents(mapping, latent_dim, num_classes=1, samples=10_000, seed=0):
    """`Start` from the means of `mapping(z, labels)` over standard normal z (samples, Z), for each class alone.

    StyleGAN2's w: a projection starts at the mean of the image's own class.
    """
    z = torch.randn(samples, latent_dim, generator=torch.Generator().manual_seed(seed))
    means, spread = [], []
    with torch.no_grad():
        for label in range(num_classes):
            mapped = mapping(z, torch.full((samples,), label)).cpu()
            means.append(mapped.mean(0))
            spread.append((mapped - means[-1]).flatten(1).square().sum(1).mean().sqrt())
    return Start(torch.stack(means), torch.stack(spread))


def project(images, synthesise, start, labels=None, projector=Projector()):
    """`Projection` of images (N, C, H, W): the generator's nearest image to each, found by gradients.

    `start` is `normal_start(latent_shape)` or `mean_latents(...)`. For an attack call `project_groups`.
    """
    images = as_images(images)
    labels = as_labels(labels, len(images))
    parts = [
        _project(images[rows], synthesise, *start.of(pick(labels, rows), len(rows)), pick(labels, rows), projector)
        for rows in torch.arange(len(images)).split(projector.batch_size)
    ]
    errors, made, latents = (torch.cat(part) for part in zip(*parts))
    return Projection(errors.double().numpy(), made, latents)


def project_groups(
    members, non_members, synthesise, start, member_labels=None, non_member_labels=None, projector=Projector()
):
    """The `Projection` of members and that of held-out real images, one budget for both; compare their `scores`.

    in_, out = project_groups(train.images, holdout.images, *access)
    attack_result("projection", in_.scores, out.scores)
    """
    return (
        project(members, synthesise, start, member_labels, projector),
        project(non_members, synthesise, start, non_member_labels, projector),
    )


def cosine_distances(originals, projections):
    """`CosineDistances` of features (N, D) of images and of their projections, row by row: the dermatology paper's
    "authenticity".

    Not a membership attack and no verdict: a quarter always lies below the first quartile, held-out images must be
    measured beside, and where the features feed one logit the distance mostly says whether both are one class.
    """
    originals, projections = (np.asarray(rows, np.float64) for rows in (originals, projections))
    if originals.shape != projections.shape or originals.ndim != 2:
        raise ValueError(f"Give features (N, D) of one shape; these are {originals.shape} and {projections.shape}.")
    lengths = np.linalg.norm(originals, axis=1) * np.linalg.norm(projections, axis=1)
    if not (lengths > 0).all():
        raise ValueError("A row of features is zero, so its cosine distance is not defined.")
    distances = 1 - (originals * projections).sum(1) / lengths
    quartiles = (float(q) for q in np.quantile(distances, (0.25, 0.5, 0.75)))
    return CosineDistances(distances, float(distances.mean()), *quartiles)


def ramp(t):
    """The learning rate's factor at t in [0, 1]: linear up over the first 5 %, a cosine down over the last 25 %."""
    down = 0.5 - 0.5 * np.cos(np.pi * min(1.0, (1 - t) / 0.25))
    return down * min(1.0, t / 0.05)


def as_labels(labels, n):
    """Labels as int64 (n,), or None."""
    if labels is None:
        return None
    labels = torch.as_tensor(as_array(labels)).long()
    if labels.shape != (n,):
        raise ValueError(f"There are {n} images and labels of shape {tuple(labels.shape)}; give one label per image.")
    return labels


def pick(labels, rows):
    """labels[rows], or None without labels."""
    return None if labels is None else labels[rows]


@contextmanager
def evaluating(network):
    """Evaluation mode for a while: no dropout, running statistics, so that each image is alone."""
    training = network.training
    network.eval()
    try:
        yield network
    finally:
        network.train(training)


def _project(targets, synthesise, means, spread, labels, projector):
    """Errors (N,), images and latents of one batch."""
    generator = torch.Generator().manual_seed(projector.seed)
    latents = means.clone().requires_grad_()
    maps = [torch.randn(1, *shape, generator=generator) for shape in projector.noise_shapes]
    maps = [noise.repeat(len(targets), 1, 1, 1).requires_grad_() for noise in maps]
    variables = [latents, *maps]
    optimiser = torch.optim.Adam(variables, lr=projector.lr)
    spread = spread.view(-1, *(1,) * (latents.ndim - 1))
    for step in range(projector.steps):
        t = step / projector.steps
        optimiser.param_groups[0]["lr"] = projector.lr * ramp(t)
        strength = projector.latent_noise * max(0.0, 1 - t / 0.75) ** 2
        noise = torch.randn(1, *latents.shape[1:], generator=generator)  # one draw for all: a batch changes nothing
        made = _made(synthesise, latents + strength * spread * noise, labels, maps)
        loss = _loss(made, targets, projector.perceptual).sum().cpu() + NOISE_WEIGHT * autocorrelation(maps).sum()
        for variable, gradient in zip(variables, torch.autograd.grad(loss, variables)):
            variable.grad = gradient
        optimiser.step()
        _normalise(maps)
    with torch.no_grad():
        made = _made(synthesise, latents, labels, maps)
        return _loss(made, targets, projector.perceptual).cpu(), made.cpu(), latents.detach()


def _made(synthesise, latents, labels, maps):
    return synthesise(latents, labels, maps) if maps else synthesise(latents, labels)


def _loss(made, targets, perceptual):
    targets = targets.to(made.device)
    if perceptual is not None:
        return perceptual(made, targets)
    return (made - targets).square().flatten(1).mean(1) / 4  # of [0, 1] pixels, unclamped: gradients pass everywhere


def autocorrelation(maps):
    """Sum (N,) of squared mean products of each noise map (N, 1, H, W) with itself one pixel on, down to 8 px.

    Near 0 for white noise: keeps the image out of the noise maps. Zero for no maps.
    """
    total = torch.zeros(())
    for noise in maps:
        while True:
            for axis in (2, 3):
                total = total + (noise * noise.roll(1, axis)).flatten(1).mean(1).square()
            if noise.shape[-1] <= SMALLEST_MAP:
                break
            noise = F.avg_pool2d(noise, 2)
    return total


@torch.no_grad()
def _normalise(maps):
    for noise in maps:
        noise -= noise.mean((1, 2, 3), keepdim=True)
        noise *= noise.square().mean((1, 2, 3), keepdim=True).rsqrt()
