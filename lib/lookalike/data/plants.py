"""Planted copies: altered images whose originals are known, for every search that claims to find copies.

A detector, an attack or a privacy card is believed only after it has found these and left honest images alone. The
alterations are what a generator that memorised, or a careless data release, would do to an image. Each is mild enough
that a reader would call the result the same picture; "interpolate" is the one that many would not.
"""

import io

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

KINDS = ("copy", "noise", "shift", "flip", "crop", "blur", "jpeg", "brightness", "interpolate")

NOISE_SD = 0.05  # standard deviation of "noise" in units of [0, 1], so 12.75 grey levels
SHIFT = 2  # pixels along each axis, of random sign
CROP = 0.9  # share of each side that "crop" keeps, at a random place, before it is resized back
BLUR_SD = 1.0  # standard deviation of the Gaussian, in pixels
JPEG_QUALITY = 50  # of Pillow's 1 to 95; 75 is its default
GAIN, OFFSET = 0.8, 25  # "brightness": grey level v becomes 0.8 v + 25, which stays within 0..255
WEIGHT = 0.7  # of the image in "interpolate"; another one has the rest


def plant(images, kind, seed=0):
    """One altered copy per image, uint8 (N, C, H, W) as the images are, in their order.

    kind: one of `KINDS`; the constants of this module say how strong each is. The same seed gives the same copies.
    "interpolate" mixes each image with a random other one of the set, so it needs two.
    """
    images = np.asarray(getattr(images, "images", images))
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(f"Copies are planted from uint8 images (N, C, H, W), not {images.dtype} {images.shape}.")
    if kind not in KINDS:
        raise ValueError(f"A planted copy is one of {', '.join(KINDS)}, not {kind!r}.")
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    return _ALTER[kind](images, rng)


def _noise(images, rng):
    return _rounded(images + 255 * NOISE_SD * rng.standard_normal(images.shape, dtype=np.float32))


def _shift(images, rng):
    """The edge is repeated where the picture has moved away."""
    height, width = images.shape[2:]
    padded = np.pad(images, ((0, 0), (0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT)), mode="edge")
    corners = rng.choice([0, 2 * SHIFT], (len(images), 2))
    return _stacked(padded[i, :, y : y + height, x : x + width] for i, (y, x) in enumerate(corners)).reshape(
        images.shape
    )


def _crop(images, rng):
    height, width = images.shape[2:]
    corners = rng.uniform(0, 1 - CROP, (len(images), 2)) * (width, height)
    boxes = [(x, y, x + CROP * width, y + CROP * height) for x, y in corners]
    return _per_plane(images, lambda plane, i: plane.resize(plane.size, Image.Resampling.BICUBIC, box=boxes[i]))


def _blur(images, rng):
    blurred = (gaussian_filter(image.astype(np.float32), (0, BLUR_SD, BLUR_SD), mode="nearest") for image in images)
    return _stacked(_rounded(image) for image in blurred).reshape(images.shape)


def _jpeg(images, rng):
    """Three channels are one colour picture; any other number, that many grey ones."""
    if images.shape[1] == 3:
        colour = (_through_jpeg(Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))) for image in images)
        return np.ascontiguousarray(_stacked(colour).reshape(-1, *images.shape[2:], 3).transpose(0, 3, 1, 2))
    return _per_plane(images, lambda plane, i: _through_jpeg(plane))


def _interpolate(images, rng):
    if len(images) < 2:
        raise ValueError(f"To interpolate takes at least two images, not {len(images)}.")
    others = (np.arange(len(images)) + rng.integers(1, len(images), len(images))) % len(images)
    return _rounded(WEIGHT * images + (1 - WEIGHT) * images[others])


def _rounded(values):
    return values.round().clip(0, 255).astype(np.uint8)


def _stacked(made):
    made = list(made)
    return np.stack(made) if made else np.empty(0, np.uint8)


def _per_plane(images, alter):
    """`alter(plane, i)` of each channel of image i, a Pillow image of 8 bit grey."""
    planes = ((i, Image.fromarray(np.ascontiguousarray(plane))) for i, image in enumerate(images) for plane in image)
    return _stacked(np.asarray(alter(plane, i)) for i, plane in planes).reshape(images.shape)


def _through_jpeg(picture):
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=JPEG_QUALITY)
    return np.asarray(Image.open(stream))


_ALTER = {
    "copy": lambda images, rng: images.copy(),
    "noise": _noise,
    "shift": _shift,
    "flip": lambda images, rng: images[..., ::-1].copy(),
    "crop": _crop,
    "blur": _blur,
    "jpeg": _jpeg,
    "brightness": lambda images, rng: _rounded(GAIN * images.astype(np.float32) + OFFSET),
    "interpolate": _interpolate,
}
