"""VGG16 and AlexNet up to their last convolution, plain or shift-tolerant: the trunks of perceptual distances.

Papers: Simonyan and Zisserman 2015 and Krizhevsky 2014 in torchvision's form; the shift-tolerant structure is that of
Ghildyal and Liu 2022 (ECCV; github.com/abhijay9/ShiftTolerant-LPIPS, BSD-2-Clause), the blur that of Zhang 2019 (ICML).
Written here after the papers and that source; weights are loaded in `lookalike.metrics.extractors`.
"""

import torch
import torch.nn.functional as F
from torch import nn

TRUNK_WIDTHS = {"vgg": (64, 128, 256, 512, 512), "alex": (64, 192, 384, 256, 256)}
SMALLEST = {("vgg", True): 18, ("vgg", False): 16, ("alex", True): 21, ("alex", False): 31}


class Trunk(nn.Module):
    """Images (N, 3, H, W) in [-1, 1] to five feature maps of VGG16 ("vgg") or AlexNet ("alex"), each after a ReLU.

    `shift_tolerant`: blurred before each subsampling, in the way of shift-tolerant LPIPS; else torchvision's. Both
    sides of an image have at least `smallest` pixels.
    """

    def __init__(self, net, shift_tolerant):
        super().__init__()
        self.net, self.smallest = net, SMALLEST[net, shift_tolerant]
        self.parts = nn.ModuleList({"vgg": _vgg16_parts, "alex": _alexnet_parts}[net](shift_tolerant))
        # the mean and deviation of ImageNet's pixels, for pixels in [-1, 1]; digits as in LPIPS's own layer
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        self.register_buffer("shift", shift[:, None, None], persistent=False)
        self.register_buffer("scale", scale[:, None, None], persistent=False)

    def forward(self, images):
        if min(images.shape[-2:]) < self.smallest:
            raise ValueError(
                f"The trunk {self.net} needs images of at least {self.smallest} px on each side, not "
                f"{images.shape[-2]} x {images.shape[-1]}: enlarge them first, and say so beside the number."
            )
        maps = [(images - self.shift) / self.scale]
        for part in self.parts:
            maps.append(part(maps[-1]))
        return maps[1:]


class _Blur(nn.Module):
    """Every second position of a map smoothed by [1, 2, 1] both ways; edges are mirrored by two positions."""

    def __init__(self, channels):
        super().__init__()
        line = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("kernel", torch.outer(line, line).repeat(channels, 1, 1, 1), persistent=False)

    def forward(self, maps):
        return F.conv2d(F.pad(maps, (2, 2, 2, 2), mode="reflect"), self.kernel, stride=2, groups=maps.shape[1])


def _vgg16_parts(shift_tolerant):
    parts, before = [], 3
    for width, convolutions in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        layers = _halving(2, before, shift_tolerant) if parts else []
        for _ in range(convolutions):
            layers += [nn.Conv2d(before, width, 3, 1, 1), nn.ReLU()]
            before = width
        parts.append(nn.Sequential(*layers))
    return parts


def _alexnet_parts(shift_tolerant):
    first = [nn.Conv2d(3, 64, 11, 1, 2), _Blur(64)] if shift_tolerant else [nn.Conv2d(3, 64, 11, 4, 2)]
    return [
        nn.Sequential(*first, nn.ReLU()),
        nn.Sequential(*_halving(3, 64, shift_tolerant), nn.Conv2d(64, 192, 5, 1, 2), nn.ReLU()),
        nn.Sequential(*_halving(3, 192, shift_tolerant), nn.Conv2d(192, 384, 3, 1, 1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(384, 256, 3, 1, 1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(256, 256, 3, 1, 1), nn.ReLU()),
    ]


def _halving(window, channels, shift_tolerant):
    return [nn.MaxPool2d(window, 1), _Blur(channels)] if shift_tolerant else [nn.MaxPool2d(window, 2)]
