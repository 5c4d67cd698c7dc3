"""Metrics: images to features, features to statistics, statistics to numbers, each step on its own."""

import numpy as np
import torch

from lookalike.data import as_tensor


def as_array(images):
    """Images as an array in the numbers that they come in, from a tensor, an array or an ImageSet."""
    images = getattr(images, "images", images)
    return images.detach().cpu().numpy() if isinstance(images, torch.Tensor) else np.asarray(images)


def as_images(images):
    """Float32 tensor (N, C, H, W) in [-1, 1] on the CPU, from such floats or from uint8 pixels."""
    array = as_array(images)
    if array.ndim != 4:
        raise ValueError(f"Images have the shape (N, C, H, W); these have {array.shape}.")
    if array.dtype == np.uint8:
        return as_tensor(array)
    if not (np.abs(array) <= 1.001).all():  # also false where a pixel is not a number
        low, high = array.min(), array.max()
        raise ValueError(f"Images are in [-1, 1] or uint8 pixels; these floats reach from {low} to {high}.")
    return torch.from_numpy(np.array(array, np.float32, order="C"))  # torch takes no negative strides


def to_unit(images):
    """Images in [-1, 1] to [0, 1], clamped: the range in which the papers compare pixels."""
    return ((images + 1) / 2).clamp(0, 1)
