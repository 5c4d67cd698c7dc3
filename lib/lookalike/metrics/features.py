"""Images to features, once per set: every feature metric reads the same array.

Chapter: no_free_lunch (and all that follow). The one decision worth knowing: every batch that the network sees has
the same size (the last one is filled up), and equal images of a set are computed once. On one machine an image
therefore has the same features to the last bit wherever and in whichever set it stands, and a copy lies at distance
zero. The networks stand in `lookalike.metrics.extractors`.
"""

import hashlib
import os
import warnings
from pathlib import Path

import numpy as np
import torch

from lookalike.metrics import as_array, as_images
from lookalike.metrics.extractors import Extractor, efficientnet_lite0, inception, random_conv

__all__ = ["Extractor", "efficientnet_lite0", "features", "inception", "logits", "random_conv"]


def features(images, extractor, cache=None, batch_size=16):
    """Features (N, D), float32, of `images` (N, C, H, W) under `extractor`.

    Images are uint8 or floats in [-1, 1] of any size, also a memory-mapped array: only a batch at a time becomes
    floats. C is 1 or 3; any other number is a stack of slices whose features stand side by side, C x dim
    (`Extractor.for_channels`, which also names them). `cache` is a folder: features are kept there under a hash of
    the pixels, the extractor's name, sizes and kind of device, and the batch size. The weights are not in it: give an
    Extractor made by hand a name that no other network has. Batches of 16 stay in a CPU's cache and run twice as
    fast as 64; a GPU wants more. Another batch size may change the last digits (below 1e-5 of the largest feature).
    """
    pixels = as_array(images)
    if pixels.ndim != 4 or 0 in pixels.shape:
        raise ValueError(f"Features need images of the shape (N, C, H, W), at least one; these have {pixels.shape}.")
    extractor = extractor.for_channels(pixels.shape[1])
    digests = [hashlib.sha256(np.ascontiguousarray(image)).digest() for image in pixels]
    if cache is None:
        return _extract(pixels, digests, extractor, batch_size)
    path = Path(cache) / f"{_content_hash(pixels, digests, extractor, batch_size)}.npy"
    rows = _read(path, (len(pixels), extractor.dim))
    if rows is None:
        rows = _extract(pixels, digests, extractor, batch_size)
        _write(path, rows)
    return rows


@torch.inference_mode()
def logits(rows, extractor):
    """Class logits (N, K) of features (N, D), for the class score; no second pass over the images."""
    if extractor.head is None:
        raise ValueError(f"{extractor.name} has no classes, so there are no logits.")
    return extractor.head(torch.as_tensor(rows)).cpu().numpy()


def _extract(pixels, digests, extractor, batch_size):
    rank = {}
    order = np.array([rank.setdefault(digest, len(rank)) for digest in digests])  # equal images share a row
    first = np.unique(order, return_index=True)[1]
    size = max(1, batch_size // extractor.slices)
    rows = np.empty((len(first), extractor.dim), np.float32)
    for start in range(0, len(first), size):
        batch = first[start : start + size]
        full = np.pad(batch, (0, size - len(batch)), mode="edge")
        rows[start : start + size] = extractor(as_images(pixels[full]))[: len(batch)]
    if not np.isfinite(rows).all():
        raise ValueError(f"{extractor.name} gives features that are not finite for these images.")
    return rows if len(first) == len(order) else rows[order]


def _content_hash(pixels, digests, extractor, batch_size):
    device = next(extractor.network.parameters()).device.type
    made_by = (extractor.name, extractor.image_size, extractor.dim, extractor.slices, batch_size, device)
    digest = hashlib.sha256(f"{made_by} {pixels.dtype} {pixels.shape}".encode())
    digest.update(b"".join(digests))
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
