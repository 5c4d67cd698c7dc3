"""Adaptive augmentation of the discriminator (ADA): random transforms of real and made images, and their strength.

Paper: Karras et al. 2020, "Training Generative Adversarial Networks with Limited Data" (NeurIPS), Sec. 2 and appendix
B. Chapter: stylegan2_dermatology. "bg" moves pixels (flips, quarter turns, shifts, scales, rotations), "bgc" changes
colours as well; each transform takes place with probability p. Written after the paper alone.

Moves are composed to one matrix per image and sampled once, at twice the side between two low-pass filters of an
orthogonal wavelet (symlet 6): where nothing moves the image comes back exactly.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F

PIPELINES = ("none", "bg", "bgc")
SHIFT, SCALE_STD, FRACTION_STD = 0.125, 0.2, 0.125  # of the side; of log2; of the side
BRIGHTNESS_STD, CONTRAST_STD, SATURATION_STD = 0.2, 0.5, 1.0  # in [-1, 1] grey levels; of log2; of log2
SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633, 0.4910559419267466,
    0.787641141030194, 0.3379294217276218, -0.07263752278646252, -0.021060292512300564, 0.04472490177066578,
    0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip
TAPS = len(SYM6)


def augment(images, p, pipeline="bg"):
    """images (N, C, S, S) in [-1, 1], each transform taking place with probability p for each image on its own.

    Draws from torch's global stream. Gradients pass, twice if need be. pipeline: "none", "bg", or "bgc" (C = 3).
    """
    if pipeline not in PIPELINES:
        raise ValueError(f"pipeline must be one of {', '.join(PIPELINES)}, not {pipeline!r}.")
    if pipeline == "none" or p <= 0:
        return images
    images = move(images, draw_moves(len(images), p, images.shape[-1], images.device))
    return recolour(images, draw_colours(len(images), p, images.device)) if pipeline == "bgc" else images


class Strength:
    """p, and the rule that moves it: up while the discriminator is too sure of real images, down otherwise (Sec. 2).

    `seen(logits)` takes note of logits of augmented real images; `adapt` moves p by batch * interval / (kimg * 1000)
    towards a mean sign of `target`. p starts at 0 and has no upper bound. `fixed`: p stays there (the paper's Sec. 3).
    """

    def __init__(self, target=0.6, kimg=500, fixed=None):
        self.target, self.kimg, self.fixed, self.p = target, kimg, fixed, fixed or 0.0
        self._signs, self._count = 0.0, 0

    def seen(self, logits):
        """Takes note of logits (N,) of real images."""
        self._signs += float(logits.detach().sign().sum())
        self._count += len(logits)

    def adapt(self):
        """Moves p by what was seen since the last time; gives the mean sign, -1 to 1."""
        if not self._count:
            raise ValueError("No logits of real images were seen since the last step of p.")
        mean = self._signs / self._count
        step = self._count / (self.kimg * 1000)
        if self.fixed is None:
            self.p = max(0.0, self.p + math.copysign(step, mean - self.target) * (mean != self.target))
        self._signs, self._count = 0.0, 0
        return mean

    def state(self):
        """What a checkpoint needs, as JSON."""
        return {"p": self.p, "signs": self._signs, "count": self._count}

    def restore(self, state):
        """Goes on from a `state`."""
        self.p, self._signs, self._count = state["p"], state["signs"], state["count"]


# --- moves --------------------------------------------------------------------------------------------------


def draw_moves(n, p, side, device=None):
    """Matrices (n, 3, 3) that take a position in the moved image, in pixels from the centre, to one in the original."""
    whole = p if p < 1 else 1.0
    turn = 1 - math.sqrt(1 - whole)  # twice, so that some rotation takes place with probability p
    total = torch.eye(3, device=device).expand(n, 3, 3)
    for inverse in (
        _scale(1 - 2 * _kept(torch.randint(2, (n,)), p, 0), torch.ones(n)),
        _rotation(_kept(torch.randint(4, (n,)), p, 0) * (math.pi / 2)),
        _translation(-(_kept((torch.rand(n, 2) * 2 - 1) * SHIFT, p, 0.0) * side).round()),
        _even_scale(_kept(torch.randn(n) * SCALE_STD, p, 0.0)),
        _rotation(_kept((torch.rand(n) * 2 - 1) * math.pi, turn, 0.0)),
        _uneven_scale(_kept(torch.randn(n) * SCALE_STD, p, 0.0)),
        _rotation(_kept((torch.rand(n) * 2 - 1) * math.pi, turn, 0.0)),
        _translation(-_kept(torch.randn(n, 2) * FRACTION_STD, p, 0.0) * side),
    ):
        total = total @ inverse.to(total)
    return total


def move(images, matrices):
    """images (N, C, S, S) moved by matrices (N, 3, 3) of `draw_moves`; edges are mirrored, by one image at most."""
    n, side = len(images), images.shape[-1]
    margin = _margin(matrices, side)
    up = _up(side, margin).to(images)
    wide = up @ images @ up.T
    # output positions at twice the side, as many as the filter on the way down reads
    reach = TAPS // 2 - 1
    line = (torch.arange(2 * side + 2 * reach, device=images.device) - reach - 0.5) / 2 - (side - 1) / 2
    across, down = line.expand(len(line), -1), line[:, None].expand(-1, len(line))
    places = torch.stack([across, down, torch.ones_like(across)], -1).reshape(1, -1, 3) @ matrices.mT[:, :, :2]
    grid = places.view(n, len(line), len(line), 2) * (2 / (side + 2 * margin))
    down = _down(side).to(images)
    return down @ sample(wide, grid.to(wide)) @ down.T


def _margin(matrices, side):
    """Mirrored pixels that the outermost positions ask for; no image is mirrored by more than itself."""
    half = (side - 1) / 2 + TAPS / 4
    corners = torch.tensor([[x, y, 1.0] for x in (-half, half) for y in (-half, half)]).to(matrices)
    asked = (corners @ matrices.mT)[..., :2].abs().amax() - (side - 1) / 2
    return int(min(max(0.0, math.ceil(float(asked)) + TAPS // 2), side - 1))


def _kept(values, p, else_):
    """Values (n, ...), each kept with probability p and `else_` otherwise."""
    rolled = torch.rand(len(values)) < p
    return torch.where(rolled.view(-1, *(1,) * (values.ndim - 1)), values, torch.as_tensor(else_, dtype=values.dtype))


def _matrices(n, rows):
    return torch.stack([torch.as_tensor(x).float().expand(n) for row in rows for x in row], -1).view(n, 3, 3)


def _scale(x, y):
    """Inverse of scaling by x and y (n,)."""
    return _matrices(len(x), ((1 / x, 0, 0), (0, 1 / y, 0), (0, 0, 1)))


def _even_scale(log2):
    return _scale(2**log2, 2**log2)


def _uneven_scale(log2):
    return _scale(2**log2, 2**-log2)


def _rotation(angle):
    c, s = angle.cos(), angle.sin()
    return _matrices(len(angle), ((c, -s, 0), (s, c, 0), (0, 0, 1)))


def _translation(by):
    return _matrices(len(by), ((1, 0, by[:, 0]), (0, 1, by[:, 1]), (0, 0, 1)))


# --- sampling -----------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _up(side, margin):
    """(2 (side + 2 margin), side): mirrors a line by `margin` and filters it to twice the length.

    Pixel i becomes the neighbourhood of position 2 i + 1/2. As one matrix, for images are small: some five times faster
    on a CPU than padding and a convolution with three groups.
    """
    line = torch.arange(-margin, side + margin).abs()
    mirrored = F.one_hot(torch.minimum(line, 2 * (side - 1) - line), side).double()
    stuffed = torch.zeros(2 * len(mirrored) + TAPS - 2, side, dtype=torch.double)
    for tap, weight in enumerate(SYM6):
        stuffed[tap : tap + 2 * len(mirrored) : 2] += weight * mirrored
    before = TAPS // 2 - 1
    return stuffed[before : before + 2 * len(mirrored)].float()


@lru_cache(maxsize=64)
def _down(side):
    """(side, 2 side + TAPS - 2): filters a line and keeps every second position."""
    rows = torch.zeros(side, 2 * side + TAPS - 2)
    for i in range(side):
        rows[i, 2 * i : 2 * i + TAPS] = torch.tensor(SYM6)
    return rows


def sample(images, grid):
    """Bilinear samples (N, C, H', W') of images at grid (N, H', W', 2), 0 outside; differentiable twice in the images.

    torch's own has no second derivative. In the images it is linear, so the gradient's gradient is sampling again.
    """
    return _Sample.apply(images, grid)


class _Sample(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images, grid):
        ctx.save_for_backward(grid)
        ctx.shape = images.shape
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    @staticmethod
    def backward(ctx, gradient):
        return _Spread.apply(gradient, ctx.saved_tensors[0], ctx.shape), None


class _Spread(torch.autograd.Function):
    """The adjoint of sampling: every sample is spread over the pixels it came from."""

    @staticmethod
    def forward(ctx, gradient, grid, shape):
        ctx.save_for_backward(grid)
        like = gradient.new_zeros(()).expand(shape)
        return torch.ops.aten.grid_sampler_2d_backward(gradient, like, grid, 0, 0, False, (True, False))[0]

    @staticmethod
    def backward(ctx, gradient):
        return _Sample.apply(gradient, ctx.saved_tensors[0]), None, None


# --- colours ------------------------------------------------------------------------------------------------


def draw_colours(n, p, device=None):
    """Matrices (n, 4, 4) on colours (r, g, b, 1)."""
    grey = torch.tensor([1.0, 1.0, 1.0, 0.0]) / math.sqrt(3)
    along = torch.outer(grey, grey)
    one = torch.eye(4).expand(n, 4, 4)
    brightness = one.clone()
    brightness[:, :3, 3] = _kept(torch.randn(n) * BRIGHTNESS_STD, p, 0.0)[:, None]
    contrast = one * _only_colours(2 ** _kept(torch.randn(n) * CONTRAST_STD, p, 0.0))
    luma = one - 2 * along * _kept(torch.randint(2, (n,)), p, 0)[:, None, None]
    hue = _hue_rotation(_kept((torch.rand(n) * 2 - 1) * math.pi, p, 0.0))
    saturation = along + (one - along) * _only_colours(2 ** _kept(torch.randn(n) * SATURATION_STD, p, 0.0))
    return (saturation @ hue @ luma @ contrast @ brightness).to(device)


def recolour(images, matrices):
    """Colours of images (N, 3, S, S) by matrices (N, 4, 4); values may leave [-1, 1]."""
    if images.shape[1] != 3:
        raise ValueError(f'Colours are changed in images of 3 channels, not {images.shape[1]}: take pipeline "bg".')
    return torch.baddbmm(matrices[:, :3, 3:], matrices[:, :3, :3], images.flatten(2)).view_as(images)


def _only_colours(factor):
    """(n, 4, 1) that multiplies the rows r, g and b, and leaves the last."""
    return torch.stack([factor, factor, factor, torch.ones_like(factor)], -1)[..., None]


def _hue_rotation(angle):
    """Rotation of colours about the grey axis."""
    c, s = angle.cos()[:, None, None], angle.sin()[:, None, None]
    third = torch.full((3, 3), 1 / 3)
    cross = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
    found = torch.eye(4).repeat(len(angle), 1, 1)
    found[:, :3, :3] = c * torch.eye(3) + (1 - c) * third + s * cross
    return found
