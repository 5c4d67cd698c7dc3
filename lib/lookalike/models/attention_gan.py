"""MedSynth's GAN: a generator that mixes its input with an image of its own by an attention mask, and a WGAN critic.

Paper: Kanagavelu et al. 2024, MedSynth, Sec. 3.1, Eq. 1 to 3. Chapter: medsynth. No code was published. Widths and the
two heads follow ADESyn (MICCAI 2021), the class head follows DiM; neither has a licence, so this is written from their
description alone. Spectral norm sits on every convolution of the generator, as the paper says; nothing normalises
activations in either network, so every image is treated alone and the critic's gradient penalty is its image's own.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

ATTENTION = ("residual", "channel", "self", "none")
CRITIC_WIDTHS = (1, 1, 2, 2, 4, 4, 8, 8, 8)  # of nine 3x3 convolutions, in units of `width`
SMALLEST = 4  # px at which the critic stops to halve


class Generator(nn.Module):
    """Images x (N, C, S, S) in [-1, 1] and labels (N,) to s = a x + (1 - a) g (Eq. 1); S is a multiple of 4.

    conv_dim: channels of the first layer, four times as many in the `blocks` attention blocks at a quarter of the size
    (paper: six). attention: "residual" (our reading of the paper's residual attention blocks), "channel", "self" or
    "none", see `AttentionBlock`. What x is, `training.medsynth.inputs` says: the network does not ask. noise_cells: of
    `noise`, 0 or a divisor of S.
    """

    def __init__(
        self, image_size=64, channels=1, num_classes=4, conv_dim=64, blocks=6, attention="residual", noise_cells=0
    ):  # fmt: skip
        super().__init__()
        if image_size < 8 or image_size % 4:
            raise ValueError(f"image_size must be a multiple of 4 from 8 on, not {image_size}.")
        if noise_cells < 0 or (noise_cells and image_size % noise_cells):
            raise ValueError(f"noise_cells must be 0 or divide the image's {image_size} px, not {noise_cells}.")
        self.image_size, self.channels, self.num_classes = image_size, channels, num_classes
        self.noise_cells = noise_cells
        relu, d = nn.ReLU(), conv_dim
        self.encoder = nn.Sequential(
            conv(channels + num_classes, d, 7), relu, conv(d, 2 * d, 4, 2), relu, conv(2 * d, 4 * d, 4, 2), relu
        )
        self.transition = nn.Sequential(*(AttentionBlock(4 * d, attention) for _ in range(blocks)))
        self.decoder = nn.Sequential(_grow(4 * d, 2 * d), relu, _grow(2 * d, d), relu)
        self.image, self.mask = conv(d, channels, 7), conv(d, 1, 7)

    def forward(self, x, labels):
        """s (N, C, S, S), the mask a (N, 1, S, S) in [0, 1], and the image g (N, C, S, S) in [-1, 1].

        a = 1 gives x itself.
        """
        condition = F.one_hot(labels, self.num_classes).to(x.dtype)[:, :, None, None].expand(-1, -1, *x.shape[2:])
        features = self.decoder(self.transition(self.encoder(torch.cat([x, condition], 1))))
        a, g = self.mask(features).sigmoid(), self.image(features).tanh()
        return self.compose(x, a, g), a, g

    @staticmethod
    def compose(x, a, g):
        """s = a x + (1 - a) g (Eq. 1)."""
        return a * x + (1 - a) * g

    def noise(self, n, generator=None):
        """Inputs (n, C, S, S) for a generator that reads no image: normal, halved, clamped to [-1, 1] so that s stays
        an image; drawn on the CPU.

        Of every pixel with noise_cells 0; convolutions average that away and every image of a class comes out alike.
        Else of noise_cells x noise_cells squares.
        """
        cells = self.noise_cells or self.image_size
        z = (torch.randn(n, self.channels, cells, cells, generator=generator) / 2).clamp(-1, 1)
        z = z.repeat_interleave(self.image_size // cells, 2).repeat_interleave(self.image_size // cells, 3)
        return z.to(next(self.parameters()).device)

    @torch.no_grad()
    def sample(self, labels, generator=None):
        """One image per label from a noise input, (N, C, S, S) in [-1, 1]."""
        return self(self.noise(len(labels), generator), labels)[0]


class AttentionBlock(nn.Module):
    """Features (N, D, H, W) to features of that shape, around a trunk T of two 3x3 convolutions.

    "residual": x + (1 + M(x)) T(x), M a soft mask in (0, 1) that has seen a quarter of the resolution (Residual
    Attention Network). "channel": x + c(T(x)) T(x), one weight per channel from the global mean (RCAN). "self": every
    place reads every other of x + T(x) (SAGAN). "none": x + T(x), the plain block, for the ablation.
    """

    def __init__(self, channels, attention="residual"):
        super().__init__()
        if attention not in ATTENTION:
            raise ValueError(f"attention must be one of {', '.join(ATTENTION)}, not {attention!r}.")
        self.attention = attention
        self.trunk = nn.Sequential(conv(channels, channels, 3), nn.ReLU(), conv(channels, channels, 3))
        weighers = {"residual": Hourglass, "channel": ChannelWeights, "self": SelfAttention}
        self.weigh = None if attention == "none" else weighers[attention](channels)

    def forward(self, x):
        y = self.trunk(x)
        if self.attention == "residual":
            return x + (1 + self.weigh(x)) * y
        if self.attention == "channel":
            return x + self.weigh(y) * y
        return x + y if self.weigh is None else self.weigh(x + y)


class Hourglass(nn.Module):
    """A soft mask (N, D, H, W) in (0, 1) from features at a half and a quarter of the resolution."""

    def __init__(self, channels):
        super().__init__()
        inner = max(1, channels // 4)
        self.reduce, self.expand = conv(channels, inner, 1), conv(inner, channels, 1)
        self.near, self.far = conv(inner, inner, 3), conv(inner, inner, 3)

    def forward(self, x):
        features, size = self.reduce(x).relu(), x.shape[2:]
        half = self.near(_pooled(features, 2)).relu()
        quarter = self.far(_pooled(half, 2)).relu()
        half = half + _resized(quarter, half.shape[2:])
        return self.expand(_resized(half, size)).sigmoid()


class ChannelWeights(nn.Module):
    """One weight in (0, 1) per channel, (N, D, 1, 1), from the mean over all places."""

    def __init__(self, channels):
        super().__init__()
        inner = max(1, channels // 4)
        self.layers = nn.Sequential(conv(channels, inner, 1), nn.ReLU(), conv(inner, channels, 1), nn.Sigmoid())

    def forward(self, y):
        return self.layers(y.mean((2, 3), keepdim=True))


class SelfAttention(nn.Module):
    """y plus `scale` times what each place reads of all places; `scale` starts at 0, as in SAGAN."""

    def __init__(self, channels):
        super().__init__()
        inner = max(1, channels // 8)
        self.query, self.key, self.value = conv(channels, inner, 1), conv(channels, inner, 1), conv(channels, inner, 1)
        self.out = conv(inner, channels, 1)
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, y):
        query, key, value = (layer(y).flatten(2).transpose(1, 2) for layer in (self.query, self.key, self.value))
        read = (query @ key.transpose(1, 2)).softmax(2) @ value  # (N, HW, inner)
        return y + self.scale * self.out(read.transpose(1, 2).unflatten(2, y.shape[2:]))


class Critic(nn.Module):
    """Images (N, C, S, S) in [-1, 1] to a score (N,), larger means more likely real, and class logits (N, K).

    Nine 3x3 convolutions of `width` to 8 `width` channels, which halve until 4 px, LeakyReLU 0.2, no normalisation,
    the mean over places and two linear heads side by side (Sec. 3.1: "9 convolutions, 2 fully connected layers").
    """

    def __init__(self, image_size=64, channels=1, num_classes=4, width=64):
        super().__init__()
        self.image_size, self.channels, self.num_classes = image_size, channels, num_classes
        layers, before = [], channels
        for times, stride in zip(CRITIC_WIDTHS, critic_strides(image_size)):
            layers += [nn.Conv2d(before, times * width, 3, stride, 1), nn.LeakyReLU(0.2)]
            nn.init.kaiming_normal_(layers[-2].weight, 0.2)  # the default loses a factor 2 a layer, 500 over nine
            nn.init.zeros_(layers[-2].bias)
            before = times * width
        self.trunk = nn.Sequential(*layers)
        self.source, self.classes = nn.Linear(before, 1), nn.Linear(before, num_classes)

    def forward(self, images, labels=None):
        """`labels` are not read: both heads see the image alone."""
        features = self.trunk(images).mean((2, 3))
        return self.source(features).flatten(), self.classes(features)


def critic_strides(image_size):
    """The strides of the nine convolutions: the first keeps the size, the halvings to 4 px are spread over the rest."""
    halvings, side = 0, image_size
    while side > SMALLEST:
        halvings, side = halvings + 1, -(-side // 2)
    rest = len(CRITIC_WIDTHS) - 1
    if not 1 <= halvings <= rest:
        raise ValueError(f"image_size must lie between {SMALLEST + 1} and {SMALLEST * 2**rest}, not {image_size}.")
    return [1] + [2 if i * halvings % rest < halvings else 1 for i in range(rest)]


# --- losses -------------------------------------------------------------------------------------------------


def critic_loss(critic, real, fake, labels, fake_labels, class_weight=1.0):
    """F(s) - F(x) and the cross entropy of both images' classes, per pair (N,): Eq. 2 without its penalty."""
    source, classes = critic(torch.cat([real, fake]))
    (on_real, on_fake), (real_classes, fake_classes) = source.chunk(2), classes.chunk(2)
    told = _class_loss(real_classes, labels) + _class_loss(fake_classes, fake_labels)
    return on_fake - on_real + class_weight * told


def generator_loss(critic, fake, labels, class_weight=1.0, as_printed=False):
    """-F(s) and the cross entropy of the class asked for, per image (N,).

    as_printed: +F(s), which is what Eq. 5 asks of the generator when Eq. 2, a critic's loss, is put into it.
    """
    source, classes = critic(fake)
    return (source if as_printed else -source) + class_weight * _class_loss(classes, labels)


def mixed_images(real, fake, eps, as_printed=False):
    """z = eps x + (1 - eps) s, on the segment from s to x; as_printed (Eq. 3): eps x + (eps - 1) s, which is not."""
    return eps * real + (eps - 1 if as_printed else 1 - eps) * fake


def draw_eps(images, generator=None, as_printed=False):
    """Uniform in [0, 1], one per image, (N, 1, 1, 1); as_printed: one per pixel, "of the same size as x"."""
    shape = images.shape if as_printed else (len(images), 1, 1, 1)
    return torch.rand(shape, generator=generator).to(images.device)


def gradient_penalty(critic, z, as_printed=False):
    """(|grad F(z)| - 1)^2 per image (N,); as_printed (Eq. 2): (|grad F(z)|^2 - 1)^2. 0 for a slope of one."""
    z = z.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(z)[0].sum(), z, create_graph=True)
    squared = gradient.square().sum((1, 2, 3))
    return (squared - 1).square() if as_printed else ((squared + 1e-12).sqrt() - 1).square()


def total_variation(a):
    """Sum over the mask's neighbouring pixels of their absolute difference, per image (N,)."""
    across, down = a[..., 1:] - a[..., :-1], a[..., 1:, :] - a[..., :-1, :]
    return across.abs().sum((1, 2, 3)) + down.abs().sum((1, 2, 3))


def logit_matching(classifier, fake, real, form="mse"):
    """Mean squared difference of a frozen classifier's logits on made and real images of equal labels, per image (N,).

    Eq. 4; nothing flows back into the real side. form "log_softmax" compares log probabilities, as DiM does. 0 for
    equal batches: then, and only then if the classifier tells images apart, the images are copies.
    """
    forms = {"mse": lambda logits: logits, "log_softmax": lambda logits: logits.log_softmax(1)}
    if form not in forms:
        raise ValueError(f"form must be one of {', '.join(forms)}, not {form!r}.")
    with torch.no_grad():
        target = forms[form](classifier(real))
    return (forms[form](classifier(fake)) - target).square().mean(1)


# --- parts --------------------------------------------------------------------------------------------------


def conv(before, after, kernel, stride=1):
    """A convolution under spectral norm that keeps the size, or divides it by the stride."""
    return spectral_norm(nn.Conv2d(before, after, kernel, stride, (kernel - stride + 1) // 2))


def _grow(before, after):
    return spectral_norm(nn.ConvTranspose2d(before, after, 4, 2, 1))


def _class_loss(logits, labels):
    return F.cross_entropy(logits, labels, reduction="none")


def _pooled(x, by):
    return F.adaptive_max_pool2d(x, [max(1, side // by) for side in x.shape[2:]])


def _resized(x, size):
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)
