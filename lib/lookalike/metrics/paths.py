"""Perceptual path length: how far a generator's image moves for a small step between two latents.

Papers: Karras et al. 2019 (CVPR, StyleGAN, Sec. 4.1) and 2020 (CVPR, StyleGAN2, Sec. 3). Chapter:
stylegan2_dermatology, whose PPL is `ppl2_wend` of NVlabs' metrics: steps in W at one end of the path, no crop. The
one decision worth knowing: nothing here knows a generator or a network, so the same function serves W and Z, and
LPIPS, ST-LPIPS or plain pixels; whoever prints the number names the space and the distance, because lengths in
different ones do not compare.
"""

from dataclasses import dataclass, field

import numpy as np
import torch


@dataclass(frozen=True)
class PathLength:
    """`value`: the mean of the lengths inside their 1st to 99th percentile. `lengths` (N,): of every pair."""

    value: float
    lengths: np.ndarray = field(repr=False)


@torch.no_grad()
def path_length(
    synthesise, draw, distance, labels, generator=None, spherical=False, whole_path=False, epsilon=1e-4, batch_size=16
):
    """`PathLength` over len(labels) pairs of latents; lower is smoother, at least 0, no upper bound.

    synthesise(latents, labels) -> images in [-1, 1], made from these two alone: fix per-image noise, put the network
    in eval mode, and shrink images above 256 px as the paper does. draw(labels, generator) -> latents (N, ...), new
    ones on each call; for W it ends with the mapping network. Both ends of a pair share their label, `labels` (N,);
    draw them as the training set has them (for an unconditional generator anything of that length).
    distance(images, images) -> (N,), a *squared* distance such as `PerceptualDistance`.

    A pair's length is distance(G(path(t)), G(path(t + epsilon))) / epsilon^2, with t = 0, or uniform in [0, 1] with
    `whole_path`. The path is straight (for W), or with `spherical` (for normal Z) turns the direction at an even
    speed and the latent's length evenly from one end's to the other's. # differs: StyleGAN sets all lengths to one,
    which is the same for a network that normalises its input, as StyleGAN's does.

    The published setting (ppl2_wend) is W, t = 0, epsilon 1e-4, 50,000 pairs. `generator` and `batch_size` together
    decide which latents are drawn. Rounding in float32 moves a single length at epsilon 1e-4 by some per cent and the
    mean by less than one; a network and a distance in double have none of it.
    """
    labels = torch.as_tensor(labels)
    if len(labels) == 0 or not epsilon > 0:
        raise ValueError("Path length needs at least one label (one per pair) and an epsilon above 0.")
    _check_fixed(synthesise, draw(labels[:batch_size], generator), labels[:batch_size])
    path = _turn if spherical else torch.lerp
    lengths = []
    for part in labels.split(batch_size):
        a, b = draw(part, generator), draw(part, generator)
        t = torch.rand(len(part), generator=generator) if whole_path else torch.zeros(len(part))
        t = t.to(a).view(-1, *[1] * (a.ndim - 1))
        ends = torch.cat([path(a, b, t), path(a, b, t + epsilon)])
        images = synthesise(ends, torch.cat([part, part]))
        lengths.append(torch.as_tensor(distance(*images.chunk(2))).double().cpu() / epsilon**2)
    lengths = torch.cat(lengths).numpy()
    return PathLength(trimmed_mean(lengths), lengths)


def trimmed_mean(lengths):
    """Mean of the values between their 1st and 99th percentile, both ends kept, as in the paper's code."""
    lengths = np.asarray(lengths, np.float64)
    if not np.isfinite(lengths).all():
        raise ValueError("Some path lengths are not finite: look at the images of the generator at these latents.")
    low = np.percentile(lengths, 1, method="lower")
    high = np.percentile(lengths, 99, method="higher")
    return float(lengths[(lengths >= low) & (lengths <= high)].mean())


def _check_fixed(synthesise, latents, labels):
    """Fresh noise in an image would pass for path length, blown up by 1 / epsilon^2."""
    twice = [synthesise(latents, labels) for _ in range(2)]
    if (twice[0] - twice[1]).abs().max() > 1e-6:
        raise ValueError("synthesise gives other images for the same latents: fix its noise and call eval() first.")


def _turn(a, b, t):
    """From a towards b at t in [0, 1]: the direction along the great circle, the length in proportion."""
    dims = tuple(range(1, a.ndim))
    a_length, b_length = (torch.linalg.vector_norm(x, dim=dims, keepdim=True) for x in (a, b))
    a, b = a / a_length, b / b_length
    cosine = (a * b).sum(dims, keepdim=True)
    across = b - cosine * a
    across = across / torch.linalg.vector_norm(across, dim=dims, keepdim=True)
    angle = t * torch.acos(cosine)
    return torch.lerp(a_length, b_length, t) * (a * torch.cos(angle) + across * torch.sin(angle))
