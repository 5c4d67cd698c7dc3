"""AC-GAN for vertebral units: 9 sagittal slices as the channels of one image of 64 px (32 and 16 px as well).

Paper: Sun, Plawinski et al. 2023 (PLOS ONE, 10.1371/journal.pone.0280316), Sec. 6.2, after Odena et al. 2017; layers
from the authors' `Train/fixed_architecture.py` (tcoroller/pGAN). Chapter: pgan. No layer normalises, as in the released
weights, so every gradient belongs to one image (DP-SGD).
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

EMBEDDING_DIM = 16
CONDITIONS = ("one_hot", "embedding")
AUXILIARY = ("log", "prob")


class Generator(nn.Module):
    """Noise (N, Z) and labels to images (N, C, S, S) in [-1, 1]; S is a power of two from 8 on.

    Labels are numbers (N,) or soft, (N, K) with rows that sum to 1. `width` is the channel count before the last layer;
    it doubles towards the noise (64 to 512 at 64 px; the paper's text has 64, its released weights 128). `condition`:
    "one_hot" puts the label's K numbers before the noise (the paper), "embedding" a learnt mean of K vectors.
    """

    def __init__(
        self, image_size=64, channels=9, num_classes=3, latent_dim=100, width=64, condition="one_hot"
    ):  # fmt: skip
        super().__init__()
        if condition not in CONDITIONS:
            raise ValueError(f"condition must be one of {', '.join(CONDITIONS)}, not {condition!r}.")
        self.num_classes, self.latent_dim = num_classes, latent_dim
        embedded = condition == "embedding"
        self.condition = nn.Linear(num_classes, EMBEDDING_DIM, bias=False) if embedded else nn.Identity()
        before, layers = latent_dim + (EMBEDDING_DIM if embedded else num_classes), []
        for after in _widths(image_size, width)[::-1]:
            grow = (2, 1) if layers else (1, 0)  # stride, padding: 1 px to 4 px, then doubling
            layers += [nn.ConvTranspose2d(before, after, 4, *grow, bias=False), nn.ReLU()]
            before = after
        self.main = nn.Sequential(*layers, nn.ConvTranspose2d(before, channels, 4, 2, 1, bias=False), nn.Tanh())
        self.apply(_init)

    def forward(self, z, labels):
        """Images (N, C, S, S) in [-1, 1]."""
        condition = self.condition(as_soft(labels, self.num_classes))
        return self.main(torch.cat([condition, z], 1)[:, :, None, None])

    def noise(self, n, generator=None):
        """Standard normal latents (n, Z), drawn on the CPU so that a seed means the same on every device."""
        return torch.randn(n, self.latent_dim, generator=generator).to(next(self.parameters()).device)

    @torch.no_grad()
    def sample(self, labels, generator=None):
        """One image per label, (N, C, S, S) in [-1, 1]."""
        return self(self.noise(len(labels), generator), labels)


class Discriminator(nn.Module):
    """Images (N, C, S, S) in [-1, 1] to source logits (N,), larger means more likely real, and class logits (N, K).

    `width` is the channel count after the first convolution, and how many numbers the trunk hands to its two heads.
    Sigmoid and softmax of the paper are in the losses.
    """

    def __init__(self, image_size=64, channels=9, num_classes=3, width=64):
        super().__init__()
        layers, before = [], channels
        for after in _widths(image_size, width):
            layers += [nn.Conv2d(before, after, 4, 2, 1, bias=bool(layers)), nn.LeakyReLU(0.2)]
            before = after
        self.trunk = nn.Sequential(*layers, nn.Conv2d(before, width, 4, bias=False), nn.Flatten())
        self.source, self.classes = nn.Linear(width, 1), nn.Linear(width, num_classes)
        self.apply(_init)

    def forward(self, images, labels=None):
        """`labels` are not read: both heads see the image alone."""
        features = self.trunk(images)
        return self.source(features).flatten(), self.classes(features)


class SourceHead(nn.Module):
    """A discriminator's source logits (N,) alone: what LOGAN reads."""

    def __init__(self, discriminator):
        super().__init__()
        self.discriminator = discriminator

    def forward(self, images, labels=None):
        return self.discriminator(images)[0]


def discriminator_loss(discriminator, real, fake, real_labels, fake_labels, alpha=1.0, aux="log"):
    """Cross entropy of source and of class, of a real and of a made image, added, per pair (N,): L_D + alpha L_C.

    Sec. 6.2. The discriminator learns the labels of made images too. `aux`: see `auxiliary_loss`.
    """
    source, classes = discriminator(torch.cat([real, fake]))
    (on_real, on_fake), (real_classes, fake_classes) = source.chunk(2), classes.chunk(2)
    told = auxiliary_loss(real_classes, real_labels, aux) + auxiliary_loss(fake_classes, fake_labels, aux)
    return F.softplus(-on_real) + F.softplus(on_fake) + alpha * told


def generator_loss(discriminator, fake, fake_labels, alpha=1.0, aux="log"):
    """Non-saturating loss and the class's, per image (N,)."""
    source, classes = discriminator(fake)
    return F.softplus(-source) + alpha * auxiliary_loss(classes, fake_labels, aux)


def auxiliary_loss(logits, labels, aux="log"):
    """The class part per image (N,), labels (N,) or soft (N, K).

    "log": minus log probability, as the paper prints it. "prob": minus the probability itself, which is what the
    authors' code computes (NLLLoss on softmax): where a class is surely wrong its gradient vanishes.
    """
    if aux not in AUXILIARY:
        raise ValueError(f"aux must be one of {', '.join(AUXILIARY)}, not {aux!r}.")
    likely = F.log_softmax(logits, 1) if aux == "log" else F.softmax(logits, 1)
    return -(as_soft(labels, logits.shape[1]) * likely).sum(1)


def morph_labels(first, second, n, num_classes=3):
    """Conditions (n + 1, K) from class `first` to class `second` in n even steps (Sec. 6.4)."""
    if n < 1:
        raise ValueError(f"A morph takes n = 1 or more steps, not {n}; n = 1 has no state in between.")
    ends = F.one_hot(torch.tensor([first, second]), num_classes).float()
    t = torch.linspace(0, 1, n + 1)[:, None]
    return (1 - t) * ends[0] + t * ends[1]


@torch.no_grad()
def morph(generator, z, first, second, n):
    """Images (N, n + 1, C, S, S) of latents z (N, Z), each kept while its condition goes from `first` to `second`."""
    steps = morph_labels(first, second, n, generator.num_classes).to(z.device)
    made = generator(z.repeat_interleave(n + 1, 0), steps.repeat(len(z), 1))
    return made.unflatten(0, (len(z), n + 1))


def as_soft(labels, num_classes):
    """Labels as rows of K numbers: (N,) become one-hot, (N, K) stay."""
    return labels if labels.ndim == 2 else F.one_hot(labels, num_classes).float()


def _widths(image_size, width):
    """Channels from the image inwards, one item per halving down to 4 px."""
    halvings = int(math.log2(image_size / 4)) if image_size >= 8 else 0
    if image_size != 4 * 2**halvings or not halvings:
        raise ValueError(f"image_size must be a power of two from 8 on (paper: 64), not {image_size}.")
    return [width * 2**i for i in range(halvings)]


def _init(layer):
    """DCGAN's weights for convolutions; biases and linear layers keep the framework's, as in the authors' code."""
    if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(layer.weight, 0.0, 0.02)
