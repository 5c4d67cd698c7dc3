"""The maps of `reducers` that are not in scikit-learn: a linear one, an autoencoder and a flow, and their training.

Paper: Arroyo Galende et al. 2026, "No Free Lunch ...", Sec. 4.1; layers from the authors' code (sheet, section 7).
Chapter: no_free_lunch. Each has `transform`: rows (N, D) in [0, 1] to points (N, 2).
"""

import copy
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

PATIENCE = 15  # epochs without a better held-out loss (authors' code)
BATCH = 64
RECONSTRUCTION = 10.0  # weight of the share of variance that a flow's first two latents miss


@dataclass(frozen=True)
class LinearMap:
    """A linear map: rows (N, D) less `mean`, times `directions` (D, d)."""

    mean: np.ndarray
    directions: np.ndarray

    @classmethod
    def random(cls, rows, dim, seed):
        directions = np.random.default_rng(seed).standard_normal((rows.shape[1], dim))
        return cls(np.zeros(len(directions)), directions)

    @classmethod
    def principal(cls, rows, dim):
        from sklearn.decomposition import PCA

        found = PCA(dim, svd_solver="covariance_eigh").fit(rows.astype(np.float64))
        return cls(found.mean_, found.components_.T)

    def transform(self, rows):
        return (rows - self.mean) @ self.directions


class Autoencoder(nn.Module):
    """Images of `shape` (C, S, S) in [0, 1], as rows (N, C S S), to the plane and back."""

    def __init__(self, shape, width=32):
        super().__init__()
        if shape[1] != shape[2]:
            raise ValueError(f"The autoencoder takes square images, not {shape}.")
        (channels, size, _), self.shape = shape, shape
        side, deep = -(-size // 8), 4 * width
        self.encoder = nn.Sequential(
            *_block(nn.Conv2d(channels, width, 3, 2, 1)),
            *_block(nn.Conv2d(width, 2 * width, 3, 2, 1)),
            *_block(nn.Conv2d(2 * width, deep, 3, 2, 1)),
            nn.Flatten(),
            *(nn.Linear(deep * side * side, 16 * width), nn.GELU()),
            *(nn.Linear(16 * width, 8 * width), nn.GELU(), nn.Linear(8 * width, 2)),
        )
        self.decoder = nn.Sequential(
            *(nn.Linear(2, 8 * width), nn.GELU(), nn.Linear(8 * width, 16 * width), nn.GELU()),
            *(nn.Linear(16 * width, deep * side * side), nn.GELU(), nn.Unflatten(1, (deep, side, side))),
            *_block(nn.ConvTranspose2d(deep, 2 * width, 4, 2, 1)),
            *_block(nn.ConvTranspose2d(2 * width, width, 4, 2, 1)),
            nn.ConvTranspose2d(width, channels, 4, 2, 1),
        )

    def encode(self, rows):
        return self.encoder(rows.reshape(-1, *self.shape))

    def loss(self, rows):
        z = self.encode(rows)
        size = self.shape[1]
        made = self.decoder(z)[..., :size, :size].sigmoid()  # the side was rounded up to a multiple of 8
        return F.mse_loss(made.flatten(1), rows) + 0.01 * z.square().sum(1).mean()

    @torch.no_grad()
    def transform(self, rows):
        return np.concatenate([self.encode(part).numpy() for part in torch.from_numpy(rows).split(1000)])


class Flow(nn.Module):
    """Affine couplings (Dinh et al. 2017, Real NVP) between principal components (N, d) and latents (N, d)."""

    def __init__(self, pca, spread, couplings=8, hidden=256):
        super().__init__()
        self.pca, dim = pca, len(spread)
        self.variance = float(spread.square().sum())
        self.log_scale = nn.Parameter(-spread.clamp(min=1e-6).log())
        self.nets = nn.ModuleList(_coupling(dim, hidden) for _ in range(couplings))
        # halves by each binary digit of the index, both ways: with 2 log2(d) couplings any two components meet in one
        bits = (dim - 1).bit_length()
        halves = [torch.arange(dim) >> (i // 2 % bits) & 1 for i in range(couplings)]
        self.register_buffer("kept", torch.stack([half ^ i % 2 for i, half in enumerate(halves)]).bool())

    def forward(self, x):
        """Latents (N, d) and the log determinant (N,) of their derivative by x."""
        z, log_det = x * self.log_scale.exp(), self.log_scale.sum().expand(len(x))
        for i, net in enumerate(self.nets):
            scale, shift = self._change(net, z, i)
            z, log_det = z * scale.exp() + shift, log_det + scale.sum(1)
        return z, log_det

    def inverse(self, z):
        """Components (N, d) of latents (N, d)."""
        for i, net in reversed(list(enumerate(self.nets))):
            scale, shift = self._change(net, z, i)
            z = (z - shift) * (-scale).exp()
        return z * (-self.log_scale).exp()

    def log_density(self, x):
        """Nats (N,) under a standard normal of the latents."""
        z, log_det = self(x)
        return log_det - 0.5 * (z.square() + math.log(2 * math.pi)).sum(1)

    def missed(self, x):
        """Share of the components' variance that the first two latents do not bring back, 0 or more."""
        plane = F.pad(self(x)[0][:, :2], (0, x.shape[1] - 2))
        return (x - self.inverse(plane)).square().sum(1).mean() / self.variance

    def loss(self, x):
        return -self.log_density(x).mean() / x.shape[1] + RECONSTRUCTION * self.missed(x)

    @torch.no_grad()
    def transform(self, rows):
        return self(torch.from_numpy(self.pca.transform(rows).astype(np.float32)))[0][:, :2].numpy()

    def _change(self, net, z, i):
        """Log scale, within 2, and shift (N, d); nothing for the half that they are read from."""
        scale, shift = net(z * self.kept[i]).chunk(2, 1)
        return 2 * (scale / 2).tanh() * ~self.kept[i], shift * ~self.kept[i]


def train(module, rows, epochs):
    """Trains `module.loss` as `reducers.fit_autoencoder` says, in place; returns the held-out loss after each epoch."""
    if epochs < 1 or len(rows) < 2:
        raise ValueError(f"A network needs at least one epoch and two images, not {epochs} and {len(rows)}.")
    order, history, waited = torch.randperm(len(rows)), [], 0
    held, seen = order[: max(1, len(rows) // 10)], order[max(1, len(rows) // 10) :]
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=1e-4)
    for _ in range(epochs):
        module.train()
        for batch in seen[torch.randperm(len(seen))].split(BATCH):
            optimizer.zero_grad()
            module.loss(rows[batch]).backward()
            optimizer.step()
        module.eval()
        with torch.no_grad():
            history.append(float(module.loss(rows[held])))
        if not math.isfinite(history[-1]):
            raise ValueError("The training diverged: its held-out loss is not finite.")
        waited = 0 if history[-1] == min(history) else waited + 1
        if waited == 0:
            best = copy.deepcopy(module.state_dict())
        elif waited == PATIENCE:
            break
    module.load_state_dict(best)
    return history


def _coupling(dim, hidden):
    last = nn.Linear(hidden, 2 * dim)
    nn.init.zeros_(last.weight)  # the flow starts as whitened PCA
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), last)


def _block(layer):
    return layer, nn.GroupNorm(8, layer.out_channels), nn.GELU(), nn.Dropout(0.25)
