"""Conditional GAN for small grey images.

Paper: Arroyo Galende et al. 2026, "No Free Lunch ...", Sec. 3.1; layers from the authors' `src/models/gan.py`.
Chapter: no_free_lunch. GroupNorm throughout; no activation works in place, because per-image gradients need its input.
The discriminator's trunk without the label planes is also the paper's utility classifier.
"""

import torch
import torch.nn.functional as F
from torch import nn

from lookalike.models.vae import from_unit, label_planes, one_hot, to_unit


class Generator(nn.Module):
    """Noise (N, Z) and labels (N,) to images (N, C, S, S) in [-1, 1]; S a multiple of 4, `width` a multiple of 4."""

    def __init__(self, image_size=28, channels=1, num_classes=10, latent_dim=100, width=64):
        super().__init__()
        self.num_classes, self.latent_dim = num_classes, latent_dim
        side, groups = image_size // 4, _groups(width)
        self.net = nn.Sequential(
            nn.Linear(latent_dim + num_classes, 2 * width * side * side),
            nn.Unflatten(1, (2 * width, side, side)),
            nn.GroupNorm(groups, 2 * width),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * width, 2 * width, 3, 1, 1),
            nn.GroupNorm(groups, 2 * width),
            nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * width, width, 3, 1, 1),
            nn.GroupNorm(groups, width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, channels, 3, 1, 1),
            nn.Sigmoid(),
        )

    def forward(self, z, labels):
        """Images (N, C, S, S) in [-1, 1]."""
        return from_unit(self.net(torch.cat([z, one_hot(labels, self.num_classes)], 1)))

    def noise(self, n, generator=None):
        """Standard normal latents (n, Z), drawn on the CPU so that a seed means the same on every device."""
        return torch.randn(n, self.latent_dim, generator=generator).to(next(self.parameters()).device)

    @torch.no_grad()
    def sample(self, labels, generator=None):
        """One image per label, (N, C, S, S) in [-1, 1]."""
        return self(self.noise(len(labels), generator), labels)


class Discriminator(nn.Module):
    """Images (N, C, S, S) in [-1, 1] and labels (N,) to logits (N,): larger means more likely real."""

    def __init__(self, channels=1, num_classes=10, width=64):
        super().__init__()
        self.num_classes = num_classes
        self.trunk = trunk(channels + num_classes, width)
        self.head = nn.Conv2d(8 * width, 1, 3, 1, 1)

    def forward(self, images, labels):
        planes = label_planes(labels, self.num_classes, images.shape[-1])
        return self.head(self.trunk(torch.cat([to_unit(images), planes], 1))).mean((1, 2, 3))


def trunk(channels, width):
    """The discriminator's four convolutions, (N, channels, S, S) to (N, 8 width, S/8, S/8); dropout after each."""
    groups = _groups(width)
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, 2, 1), nn.LeakyReLU(0.2), nn.Dropout(0.25),
        *_block(width, 2 * width, 2, groups), *_block(2 * width, 4 * width, 2, groups), *_block(4 * width, 8 * width,
        1, groups),
    )  # fmt: skip


def discriminator_loss(discriminator, real, fake, labels, fake_labels):
    """Cross entropy per pair of a real and a made image (N,), halved (authors' trainer: (BCE real + BCE fake) / 2)."""
    logits = discriminator(torch.cat([real, fake]), torch.cat([labels, fake_labels]))
    on_real, on_fake = logits.chunk(2)
    return (F.softplus(-on_real) + F.softplus(on_fake)) / 2


def generator_loss(discriminator, fake, fake_labels):
    """Non-saturating loss per image (N,)."""
    return F.softplus(-discriminator(fake, fake_labels))


def gradient_penalty(discriminator, real, fake, labels, generator=None):
    """Penalty (|grad D| - 1)^2 averaged over interpolates, on the sigmoid's output as the authors have it; a scalar.

    Double backward: it has no per-image form here, so private training cannot use it.
    """
    share = torch.rand(len(real), 1, 1, 1, generator=generator).to(real.device)
    mixed = to_unit(share * real + (1 - share) * fake).requires_grad_()
    out = discriminator(from_unit(mixed), labels).sigmoid()
    (slope,) = torch.autograd.grad(out.sum(), mixed, create_graph=True)
    return (slope.flatten(1).norm(dim=1) - 1).square().mean()


def _block(before, after, stride, groups):
    return (
        nn.Conv2d(before, after, 3, stride, 1), nn.GroupNorm(groups, after), nn.LeakyReLU(0.2), nn.Dropout(0.25),
    )  # fmt: skip


def _groups(width):
    return min(32, width // 2)  # 32 at the paper's width of 64; narrower networks keep two channels a group
