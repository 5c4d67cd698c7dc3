"""Conditional VAE for small grey images.

Paper: Arroyo Galende et al. 2026, "No Free Lunch ...", Sec. 3.1; layers from the authors' `src/models/vae.py`.
Chapter: no_free_lunch. GroupNorm throughout, so every gradient belongs to one image (DP-SGD).
Inside, pixels live in [0, 1], as in the paper: the decoder ends in a sigmoid and the loss is a cross entropy.
"""

import torch
import torch.nn.functional as F
from torch import nn

LOGVAR_LIMIT = 4.0  # the authors clamp log variance to [-4, 4]
LATENT_DROPOUT = 0.1  # dropout on z, training only; in the code, not in the paper (sheet D17)


class ConditionalVAE(nn.Module):
    """Images (N, C, S, S) in [-1, 1] and labels (N,) to reconstructions of that shape.

    S must be a multiple of 4. `width` is the channel count of the first convolution (paper: 32, a multiple of 8).
    """

    def __init__(self, image_size=28, channels=1, num_classes=10, latent_dim=128, width=32):
        super().__init__()
        self.num_classes, self.latent_dim = num_classes, latent_dim
        side, hidden = image_size // 4, 8 * width
        self.encoder = nn.Sequential(
            *_conv(nn.Conv2d(channels + num_classes, width, 4, 2, 1)),
            *_conv(nn.Conv2d(width, 2 * width, 4, 2, 1)),
            *_conv(nn.Conv2d(2 * width, 4 * width, 3, 1, 1)),
            nn.Flatten(),
            nn.Linear(4 * width * side * side, 2 * latent_dim),
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim + num_classes, hidden),
            nn.GELU(),
            nn.Linear(hidden, 4 * width * side * side),
            nn.GELU(),
            nn.Unflatten(1, (4 * width, side, side)),
            *_conv(nn.Conv2d(4 * width, 8 * width, 3, 1, 1)),
            *_conv(nn.ConvTranspose2d(8 * width, 4 * width, 4, 2, 1)),
            *_conv(nn.ConvTranspose2d(4 * width, 2 * width, 4, 2, 1)),
            nn.Conv2d(2 * width, channels, 3, 1, 1),
        )

    def encode(self, images, labels):
        """Returns mu and logvar, both (N, Z)."""
        planes = label_planes(labels, self.num_classes, images.shape[-1])
        mu, logvar = self.encoder(torch.cat([to_unit(images), planes], 1)).chunk(2, 1)
        return mu, logvar.clamp(-LOGVAR_LIMIT, LOGVAR_LIMIT)

    def decode(self, z, labels):
        """Latents (N, Z) and labels (N,) to logits of the pixels (N, C, S, S)."""
        return self.decoder(torch.cat([z, one_hot(labels, self.num_classes)], 1))

    def forward(self, images, labels):
        """Returns pixel logits (N, C, S, S), mu (N, Z) and logvar (N, Z)."""
        mu, logvar = self.encode(images, labels)
        z = mu + torch.randn_like(mu) * (0.5 * logvar).exp()
        z = F.dropout(z, LATENT_DROPOUT, self.training)
        return self.decode(z, labels), mu, logvar

    @torch.no_grad()
    def reconstruct(self, images, labels):
        """Decodes the posterior mean (Fig. 6; differs: the authors' code samples z there), (N, C, S, S) in [-1, 1]."""
        mu, _ = self.encode(images, labels)
        return from_unit(self.decode(mu, labels).sigmoid())

    @torch.no_grad()
    def sample(self, labels, generator=None):
        """One image per label, (N, C, S, S) in [-1, 1]."""
        z = torch.randn(len(labels), self.latent_dim, generator=generator).to(labels.device)
        return from_unit(self.decode(z, labels).sigmoid())


def vae_loss(model, images, labels, beta=1.0):
    """Negative ELBO per image (N,), summed over pixels; beta weighs the KL term."""
    logits, mu, logvar = model(images, labels)
    target = to_unit(images)
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    reconstruction = entropy.flatten(1).sum(1)
    kl = -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum(1)
    return reconstruction + beta * kl


def label_planes(labels, num_classes, size):
    """One constant plane per class, (N, K, S, S): the label as an image."""
    return one_hot(labels, num_classes)[:, :, None, None].expand(-1, -1, size, size)


def one_hot(labels, num_classes):
    """Labels (N,) to float (N, K); unlike F.one_hot it looks at no value, so vmap can pass through it."""
    return (labels[:, None] == torch.arange(num_classes, device=labels.device)).float()


def to_unit(images):
    """[-1, 1] to [0, 1]."""
    return (images + 1) / 2


def from_unit(images):
    """[0, 1] to [-1, 1]."""
    return images * 2 - 1


def _conv(layer):
    return layer, nn.GroupNorm(8, layer.out_channels), nn.GELU()
