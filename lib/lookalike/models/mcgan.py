"""MCGAN: the malignancy-conditional DCGAN for mammography patches of 128 px (32 and 64 px as well).

Paper: Osuala et al. 2024, "Enhancing the Utility of Privacy-Preserving Cancer Classification using Synthetic Data"
(arXiv 2407.12669), Sec. 2; layers from the authors' `networks/generation/dcgan` (RichardObi/mammo_dp). Chapter:
mcgan_dp. `main` and `embed_nn` carry the authors' names and indices, so that their checkpoint loads.
Batch normalisation is the published GAN's and mixes images: a private discriminator takes norm="group" or "instance".
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

EMBEDDING_DIM = 50
REAL_TARGETS = (0.7, 1.2)  # the authors' smoothing of the real target: uniform, per image
LOG_FLOOR = -100.0  # nn.BCELoss clamps its logarithms there
NORMS = {
    "batch": lambda channels: [nn.BatchNorm2d(channels)],
    "group": lambda channels: [nn.GroupNorm(math.gcd(32, channels), channels)],
    "instance": lambda channels: [nn.InstanceNorm2d(channels)],
    "none": lambda channels: [],
}


class Generator(nn.Module):
    """Noise (N, Z) and labels (N,) to images (N, C, S, S) in [-1, 1]; S is a power of two from 8 on.

    `width` is the channel count before the last layer; it doubles towards the noise (64 to 1024 at 128 px).
    `norm` is "batch" (the published checkpoint), "group" (32 groups, or the largest power of two in the channels:
    what Opacus' ModuleValidator makes of batch norm), "instance" (no weights; the authors' later code) or "none".
    `upsampling` is "transposed" (the paper's) or "resize": nearest neighbour, then a convolution of 3 px, which cannot
    lay a checkerboard of its own (Odena et al. 2016); fewer weights.
    """

    def __init__(
        self, image_size=128, channels=1, num_classes=2, latent_dim=100, width=64, norm="batch", upsampling="transposed"
    ):  # fmt: skip
        super().__init__()
        self.num_classes, self.latent_dim = num_classes, latent_dim
        layers, before = [], 2 * latent_dim  # the noise and as many numbers from the label
        for after in _widths(image_size, width)[::-1]:
            first = nn.ConvTranspose2d(before, after, 4, bias=False)  # 1 px to 4 px, then doubling
            layers += [*(_doubling(upsampling, before, after) if layers else [first]), *_norm(norm, after), nn.ReLU()]
            before = after
        self.main = nn.Sequential(*layers, *_doubling(upsampling, before, channels), nn.Tanh())
        self.embed_nn = _embedding(num_classes, latent_dim)
        self.apply(_init)

    def forward(self, z, labels):
        """Images (N, C, S, S) in [-1, 1]."""
        return self.main(torch.cat([z, self.embed_nn(labels)], 1)[:, :, None, None])

    def noise(self, n, generator=None):
        """Standard normal latents (n, Z), drawn on the CPU so that a seed means the same on every device."""
        return torch.randn(n, self.latent_dim, generator=generator).to(next(self.parameters()).device)

    @torch.no_grad()
    def sample(self, labels, generator=None):
        """One image per label, (N, C, S, S) in [-1, 1]; batch norm takes its running statistics, so each is alone."""
        training = self.training
        images = self.eval()(self.noise(len(labels), generator), labels)
        self.train(training)
        return images


class Discriminator(nn.Module):
    """Images (N, C, S, S) in [-1, 1] and labels (N,) to logits (N,): larger means more likely real.

    `width` is the channel count after the first convolution (it doubles up to 1024 at 128 px); the first has no norm.
    """

    def __init__(self, image_size=128, channels=1, num_classes=2, width=64, norm="batch"):
        super().__init__()
        self.image_size, self.num_classes = image_size, num_classes
        layers, before = [], channels + 1  # the label is one more channel
        for stage, after in enumerate(_widths(image_size, width)):
            convolution = nn.Conv2d(before, after, 6, 2, 2, bias=False)
            layers += [convolution, *(_norm(norm, after) if stage else []), nn.LeakyReLU(0.1)]
            before = after
        self.main = nn.Sequential(*layers, nn.Conv2d(before, 1, 6, 1, 1, bias=False))
        self.embed_nn = _embedding(num_classes, image_size**2)
        self.apply(_init)

    def forward(self, images, labels):
        # differs: the authors feed real images in [0, 1] and made ones in [-1, 1]; here both are in [-1, 1]
        plane = self.embed_nn(labels).view(-1, 1, self.image_size, self.image_size)
        return self.main(torch.cat([images, plane], 1)).flatten()


def discriminator_loss(discriminator, real, fake, real_labels, fake_labels, real_targets=1.0):
    """Cross entropy of a real and of a made image, added, per pair (N,).

    `real_targets` is 1 or one number per image (N,), see `draw_targets`. Real and made images pass together (2N rows),
    except under batch norm: its statistics are of real images alone and made images alone, as in the authors' code.
    """
    if _has_batch_norm(discriminator):
        on_real, on_fake = discriminator(real, real_labels), discriminator(fake, fake_labels)
    else:
        logits = discriminator(torch.cat([real, fake]), torch.cat([real_labels, fake_labels]))
        on_real, on_fake = logits.chunk(2)
    return cross_entropy(on_real, real_targets) + cross_entropy(on_fake, 0.0)


def generator_loss(discriminator, fake, fake_labels):
    """Non-saturating loss per image (N,); the authors pass the images that the discriminator has just learnt from."""
    return cross_entropy(discriminator(fake, fake_labels), 1.0)


def draw_targets(n, generator=None):
    """The authors' smoothed targets for real images, U(0.7, 1.2), (n,)."""
    low, high = REAL_TARGETS
    return low + (high - low) * torch.rand(n, generator=generator)


def cross_entropy(logits, targets):
    """-(t log p + (1 - t) log(1 - p)) per image (N,) with p = sigmoid(logit) and logarithms of at least -100.

    Targets may exceed 1, which torch's own refuses; such a loss falls as long as the logit grows, down to the clamp.
    """
    # differs: from the logit; the authors' p rounds to 1 at a logit of 17, where their log(1 - p) jumps to -100.
    log_p, log_not_p = (F.logsigmoid(x).clamp_min(LOG_FLOOR) for x in (logits, -logits))
    return -(targets * log_p + (1 - targets) * log_not_p)


def _widths(image_size, width):
    """Channels from the image inwards, one item per halving down to 4 px."""
    halvings = int(math.log2(image_size / 4)) if image_size >= 8 else 0
    if image_size != 4 * 2**halvings or not halvings:
        raise ValueError(f"image_size must be a power of two from 8 on (paper: 128), not {image_size}.")
    return [width * 2**i for i in range(halvings)]


def _doubling(upsampling, before, after):
    if upsampling == "transposed":
        return [nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False)]
    if upsampling == "resize":
        return [nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(before, after, 3, padding=1, bias=False)]
    raise ValueError(f"upsampling must be transposed or resize, not {upsampling!r}.")


def _norm(norm, channels):
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, not {norm!r}.")
    return NORMS[norm](channels)


def _embedding(num_classes, size):
    # differs: LeakyReLU is not in place as the authors' is; Opacus refuses views that change in place.
    return nn.Sequential(nn.Embedding(num_classes, EMBEDDING_DIM), nn.Linear(EMBEDDING_DIM, size), nn.LeakyReLU(0.1))


def _init(layer):
    """DCGAN's; embedding, linear and group norm layers keep the framework's, as in the authors' code."""
    if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(layer.weight, 0.0, 0.02)
    elif isinstance(layer, nn.BatchNorm2d):
        nn.init.normal_(layer.weight, 1.0, 0.02)
        nn.init.zeros_(layer.bias)


def _has_batch_norm(network):
    """False for a plain function: private training calls one, and refuses batch norm."""
    return isinstance(network, nn.Module) and any(isinstance(layer, nn.BatchNorm2d) for layer in network.modules())
