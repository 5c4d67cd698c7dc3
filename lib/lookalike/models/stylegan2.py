"""StyleGAN2 in plain PyTorch: mapping, modulated synthesis with skip RGB, residual discriminator with class projection.

Papers: Karras et al. 2020, "Analyzing and Improving the Image Quality of StyleGAN" (CVPR), and "Training Generative
Adversarial Networks with Limited Data" (NeurIPS), whose widths and settings these are; Carrasco Limeros et al. 2022,
"GAN-based generative modelling for dermatological applications", which trains them on dermoscopy. Chapter:
stylegan2_dermatology. Written after the papers alone.

Images scale with their style before a shared convolution and with the demodulation after it: equal to modulating the
weights (Karras et al. 2020, Sec. 2.2), and one convolution for the batch instead of one per image.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

SLOPE, GAIN = 0.2, math.sqrt(2)
TRACKING = 0.995  # of the mean latent, for truncation
MAPPING_LR = 0.01
LABEL_LAYERS = 8  # of the discriminator's label mapping, whatever the generator's depth
HALF_RESOLUTIONS = 4  # the highest ones run in half precision, where asked
HALF_CLAMP = 256.0


class Generator(nn.Module):
    """Latents z (N, Z) and labels (N,) to images (N, C, S, S), about [-1, 1]; S is a power of two from 8 on.

    Layers of side r have min(base / r, max_channels) channels. num_classes 0: unconditional, no labels. `half`: a
    dtype for the four highest resolutions, whose activations are then clamped to +-256 (None: float32 throughout).
    Attributes: num_ws, how many latents w an image has, and noise_shapes, (1, H, W) of each styled layer.
    """

    def __init__(
        self, image_size=64, channels=3, num_classes=2, latent_dim=512, w_dim=512, base=16384, max_channels=512,
        mapping_layers=2, half=None,
    ):  # fmt: skip
        super().__init__()
        widths = layer_widths(image_size, base, max_channels)
        self.image_size, self.num_classes, self.latent_dim, self.w_dim = image_size, num_classes, latent_dim, w_dim
        self.mapping = Mapping(latent_dim, num_classes, w_dim, mapping_layers)
        self.register_buffer("w_mean", torch.zeros(w_dim))
        self.constant = nn.Parameter(torch.randn(widths[4], 4, 4))
        sides = list(widths)
        before = [widths[4], *widths.values()]
        self.blocks = nn.ModuleList(
            _SynthesisBlock(before[i], widths[side], channels, w_dim, side, _half(half, side, image_size))
            for i, side in enumerate(sides)
        )
        self.num_ws = 2 * len(sides)
        self.noise_shapes = tuple((1, side, side) for side in sides for _ in range(1 if side == 4 else 2))

    def forward(self, z, labels=None, truncation=1.0, noise="random"):
        """Images (N, C, S, S), not clamped."""
        return self.synthesise(self.map(z, labels, truncation), noise)

    def map(self, z, labels=None, truncation=1.0):
        """w (N, W) of z (N, Z); truncation below 1 moves it towards the mean of all w (1: as it is, 0: the mean).

        In training mode the running mean takes note of it.
        """
        w = self.mapping(z, labels)
        if self.training:
            self.w_mean.copy_(w.detach().mean(0).lerp(self.w_mean, TRACKING))
        return w if truncation == 1 else self.w_mean.lerp(w, truncation)

    def synthesise(self, w, noise="random"):
        """Images (N, C, S, S) of w (N, W), or (N, num_ws, W), one per layer (style mixing).

        noise: "random", fresh for every image; "fixed", the same maps always; or maps (N or 1, 1, H, W) of one's own,
        in the order of noise_shapes.
        """
        if w.ndim == 2:
            w = w[:, None].expand(-1, self.num_ws, -1)
        if w.shape[1:] != (self.num_ws, self.w_dim):
            raise ValueError(
                f"Latents w are (N, {self.w_dim}) or (N, {self.num_ws}, {self.w_dim}), not {tuple(w.shape)}."
            )
        x = self.constant.expand(len(w), -1, -1, -1).contiguous(memory_format=torch.channels_last)
        image, layer = None, 0
        for block in self.blocks:
            layers = len(block.convs)
            x, image = block(x, image, w[:, layer : layer + layers + 1], self._maps(noise, layer, layers))
            layer += layers
        return image

    def noise(self, n, generator=None):
        """Standard normal latents (n, Z), drawn on the CPU so that a seed means the same on every device."""
        return torch.randn(n, self.latent_dim, generator=generator).to(self.constant)

    @torch.no_grad()
    def sample(self, labels, generator=None, truncation=1.0):
        """One image per label, (N, C, S, S) in [-1, 1]; without classes labels only count. Seeded by `generator`."""
        z = self.noise(len(labels), generator)
        maps = [torch.randn(len(z), *shape, generator=generator).to(z) for shape in self.noise_shapes]
        wanted = labels.to(z.device) if self.num_classes else None
        training, self.training = self.training, False  # w_mean is not to move
        try:
            return self(z, wanted, truncation, maps).clamp(-1, 1)
        finally:
            self.training = training

    def style_layers(self):
        """The affine layers, weights (channels, W), of the styled 3x3 convolutions in order: what SeFa factorises."""
        return [conv.style for block in self.blocks for conv in block.convs]

    def _maps(self, noise, first, count):
        if isinstance(noise, str):
            if noise not in ("random", "fixed"):
                raise ValueError(f'noise is "random", "fixed" or a list of maps, not {noise!r}.')
            return [noise] * count
        if len(noise) != len(self.noise_shapes):
            raise ValueError(f"There are {len(self.noise_shapes)} noise maps, not {len(noise)}.")
        return noise[first : first + count]


class Discriminator(nn.Module):
    """Images (N, C, S, S) in [-1, 1] to logits (N,), larger means more likely real; labels by projection.

    In training mode groups of `group` images share a channel with how much they differ, so N must be a multiple. In
    evaluation mode each image is alone and that channel 0: a score does not depend on who else is asked about.
    """

    def __init__(
        self, image_size=64, channels=3, num_classes=2, base=16384, max_channels=512, group=4, half=None
    ):  # fmt: skip
        super().__init__()
        widths = layer_widths(image_size, base, max_channels)
        sides = list(widths)[::-1]
        self.image_size, self.num_classes, self.group = image_size, num_classes, group
        self.from_rgb = Conv(channels, widths[image_size], 1)
        self.blocks = nn.ModuleList(
            _ResidualBlock(widths[side], widths[side // 2], _half(half, side, image_size)) for side in sides[:-1]
        )
        last = widths[4]
        self.last = Conv(last + 1, last, 3)
        self.dense = Linear(last * 16, last, activation=True)
        self.out = Linear(last, last if num_classes else 1)
        self.label_mapping = Mapping(0, num_classes, last, LABEL_LAYERS) if num_classes else None

    def forward(self, images, labels=None):
        """Logits (N,)."""
        x = self.from_rgb(images.contiguous(memory_format=torch.channels_last))
        for block in self.blocks:
            x = block(x)
        x = _cast(x, None)
        x = torch.cat([x, self._deviation(x)], 1)
        x = self.out(self.dense(self.last(x).flatten(1)))
        if self.label_mapping is None:
            return x[:, 0]
        return (x * self.label_mapping(None, labels)).sum(1) / math.sqrt(x.shape[1])

    def _deviation(self, x):
        """How much the images of a group differ, one number each, as a channel (N, 1, 4, 4)."""
        if not self.training:
            return x.new_zeros(len(x), 1, *x.shape[2:])
        group = min(self.group, len(x))
        if len(x) % group:
            raise ValueError(
                f"A batch of {len(x)} is no multiple of the {group} images that minibatch deviation compares."
            )
        of = x.reshape(group, -1, *x.shape[1:])
        spread = (of.var(0, unbiased=False) + 1e-8).sqrt().mean((1, 2, 3))
        return spread.repeat(group).view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])


class Mapping(nn.Module):
    """z (N, Z), brought to root mean square 1, and labels (N,) to w (N, W); z_dim 0: labels alone."""

    def __init__(self, z_dim, num_classes, w_dim, layers):
        super().__init__()
        self.num_classes = num_classes
        self.embed = Linear(num_classes, w_dim) if num_classes else None
        before = z_dim + (w_dim if num_classes else 0)
        sizes = [before] + [w_dim] * layers
        self.layers = nn.Sequential(*(Linear(a, b, lr=MAPPING_LR, activation=True) for a, b in pairwise(sizes)))

    def forward(self, z, labels=None):
        parts = [] if z is None else [_normalise(z)]
        if self.embed is not None:
            if labels is None:
                raise ValueError(f"These networks know {self.num_classes} classes: give labels (N,).")
            parts.append(_normalise(self.embed(F.one_hot(labels, self.num_classes).to(self.embed.weight.dtype))))
        return self.layers(torch.cat(parts, 1))


class Linear(nn.Module):
    """A layer whose weights are standard normal and scaled where they act (equalised learning rate)."""

    def __init__(self, before, after, bias=0.0, lr=1.0, activation=False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(after, before) / lr)
        self.bias = nn.Parameter(torch.full((after,), float(bias)))
        self.scale, self.lr, self.activation = lr / math.sqrt(before), lr, activation

    def forward(self, x):
        gain = GAIN if self.activation else 1.0
        x = F.linear(x, self.weight * (self.scale * gain), self.bias * (self.lr * gain))
        return _bend(x) if self.activation else x


class Conv(nn.Module):
    """A k x k convolution of equalised learning rate with activation; `down` filters and halves first."""

    def __init__(self, before, after, kernel, down=False, bias=True, activation=True, gain=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(after, before, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(after)) if bias else None
        self.scale = 1 / math.sqrt(before * kernel**2)
        self.down, self.activation, self.gain = down, activation, gain * (GAIN if activation else 1.0)

    def forward(self, x):
        kernel = self.weight.shape[-1]
        weight = (self.weight * (self.scale * self.gain)).to(x.dtype)
        bias = None if self.bias is None else (self.bias * self.gain).to(x.dtype)
        if not self.down:
            x = F.conv2d(x, weight, bias, padding=kernel // 2)
        elif kernel == 1:
            x = F.conv2d(halve(x), weight, bias)
        else:
            x = F.conv2d(blur(x, 2), weight, bias, stride=2)
        return _bend(x) if self.activation else x


class StyledConv(nn.Module):
    """3x3 convolution modulated by w and demodulated, noise, activation; `up` doubles the side."""

    def __init__(self, before, after, w_dim, side, up=False):
        super().__init__()
        self.style = Linear(w_dim, before, bias=1.0)
        self.weight = nn.Parameter(torch.randn(after, before, 3, 3))
        self.bias = nn.Parameter(torch.zeros(after))
        self.strength = nn.Parameter(torch.zeros(()))
        self.register_buffer("fixed", torch.randn(side, side))
        self.up, self.side = up, side

    def forward(self, x, w, noise):
        styles = self.style(w)
        scales = demodulation(self.weight, styles) * GAIN
        x = x * styles[:, :, None, None].to(x.dtype)
        if self.up:
            x = F.conv_transpose2d(x, self.weight.transpose(0, 1).to(x.dtype), stride=2)
            x = blur(x, 1, gain=4.0)
        else:
            x = F.conv2d(x, self.weight.to(x.dtype), padding=1)
        x = torch.addcmul((self.bias * GAIN)[:, None, None].to(x.dtype), x, scales[:, :, None, None].to(x.dtype))
        return _bend(x.add_((self._noise(noise, x) * (self.strength * GAIN)).to(x.dtype)))

    def _noise(self, noise, x):
        if isinstance(noise, torch.Tensor):
            return noise
        if noise == "fixed":
            return self.fixed
        return torch.randn(len(x), 1, self.side, self.side, device=x.device, dtype=self.fixed.dtype)


class ToRGB(nn.Module):
    """1x1 convolution to the image's channels, modulated but not demodulated."""

    def __init__(self, before, channels, w_dim):
        super().__init__()
        self.style = Linear(w_dim, before, bias=1.0)
        self.weight = nn.Parameter(torch.randn(channels, before, 1, 1))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.scale = 1 / math.sqrt(before)

    def forward(self, x, w):
        styles = self.style(w) * self.scale
        x = x * styles[:, :, None, None].to(x.dtype)
        return _cast(F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype)), None)


class _SynthesisBlock(nn.Module):
    def __init__(self, before, after, channels, w_dim, side, half):
        super().__init__()
        first = [] if side == 4 else [StyledConv(before, after, w_dim, side, up=True)]
        self.convs = nn.ModuleList([*first, StyledConv(after, after, w_dim, side)])
        self.to_rgb, self.half = ToRGB(after, channels, w_dim), half

    def forward(self, x, image, w, noise):
        """The next features and the image so far; the last of the block's w is the next block's first."""
        x = _cast(x, self.half)
        for i, conv in enumerate(self.convs):
            x = _clamp(conv(x, w[:, i], noise[i]), self.half)
        rgb = self.to_rgb(x, w[:, len(self.convs)])
        return x, rgb if image is None else rgb + double(image)


class _ResidualBlock(nn.Module):
    def __init__(self, before, after, half):
        super().__init__()
        self.first = Conv(before, before, 3)
        self.second = Conv(before, after, 3, down=True, gain=math.sqrt(0.5))
        self.skip = Conv(before, after, 1, down=True, bias=False, activation=False, gain=math.sqrt(0.5))
        self.half = half

    def forward(self, x):
        x = _cast(x, self.half)
        return _clamp(self.skip(x) + self.second(_clamp(self.first(x), self.half)), self.half)


# --- filters ------------------------------------------------------------------------------------------------


def blur(x, padding, gain=1.0):
    """x (N, C, H, W) with `padding` zeros around it, low-passed by [1, 3, 3, 1] both ways, times `gain`: sides grow by
    2 padding - 3.
    """
    return _filter(x, padding, gain, 1)


def halve(x):
    """x low-passed and halved in side: blur(x, 1) at every second position."""
    return _filter(x, 1, 1.0, 2)


def _filter(x, padding, gain, stride):
    line = torch.tensor([1.0, 3.0, 3.0, 1.0], device=x.device, dtype=x.dtype)
    kernel = (torch.outer(line, line) * (gain / 64)).expand(x.shape[1], 1, 4, 4)
    return F.conv2d(x, kernel.contiguous(), padding=padding, stride=stride, groups=x.shape[1])


def double(image):
    """image (N, C, S, S) doubled in side by the same filter with zeros around it: bilinear inside, darker at the edge.

    Plain bilinear interpolation repeats the edge instead, and the difference grows with every doubling.
    """
    wide = F.interpolate(F.pad(image, (1, 1, 1, 1)), scale_factor=2, mode="bilinear", align_corners=False)
    return wide[:, :, 2:-2, 2:-2]


def demodulation(weight, styles):
    """Scales (N, O) that bring each output channel of a modulated convolution back to unit variance."""
    return (styles.square() @ weight.square().sum((2, 3)).T + 1e-8).rsqrt()


# --- parts --------------------------------------------------------------------------------------------------


def layer_widths(image_size, base, max_channels):
    """{side: channels} from 4 px to the image's side."""
    doublings = int(math.log2(image_size)) if image_size >= 8 else 0
    if image_size != 2**doublings or not doublings:
        raise ValueError(f"image_size must be a power of two from 8 on (paper: 256), not {image_size}.")
    return {2**i: min(base // 2**i, max_channels) for i in range(2, doublings + 1)}


def _bend(x):
    """Leaky ReLU, in place; its gain of the root of 2 is in what comes before, for scaling passes through it."""
    return F.leaky_relu(x, SLOPE, inplace=True)


def _normalise(x):
    return x * (x.square().mean(1, keepdim=True) + 1e-8).rsqrt()


def _half(dtype, side, image_size):
    return dtype if dtype is not None and side > image_size // 2**HALF_RESOLUTIONS else None


def _cast(x, half):
    """x in the layer's precision; doubles stay doubles where nothing is halved."""
    if half is not None:
        return x.to(half)
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _clamp(x, half):
    return x if half is None else x.clamp(-HALF_CLAMP, HALF_CLAMP)
