"""One image file, or the arrays of an npz, from a folder that is not trusted; and the packed copy kept of it.

A file's header tells its size before a pixel is decoded, and a claim that is too large is refused there; whatever is
wrong with a file becomes one sentence that names it. Each file is decoded once, into one packed uint8 file in the cache
that is then mapped, not loaded, so 100,000 images need little memory.
"""

import hashlib
import os
import struct
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lookalike.data.datasets import _resized
from lookalike.data.manifest import DataError, cache_dir
from lookalike.data.reading import MAX_PIXELS

_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "GIF", "WEBP")
PACKING = 2  # goes up when the same files would be read differently
_ORIENTATION = 0x0112  # the EXIF tag, which is applied in all formats alike
_TURNED = (5, 6, 7, 8)  # its values that swap width and height
_CHANNELS = (1, 3, 4)  # of images whose last axis is theirs


def read_header(root, path):
    """[height, width, in colour, brightest 16 bit pixel or 0, has several frames, transparency] of one file."""
    with _opened(root, path) as image:
        height, width = _upright_size(image)
        deep = image.mode.startswith(("I", "F"))
        brightest = _brightest(image, path) if deep else 0
        colour = not deep and image.mode not in ("1", "L", "LA", "La") and not _grey_palette(image)
        return [height, width, colour, brightest, getattr(image, "is_animated", False), _seen_through(image)]


def _upright_size(image):
    """(height, width) once turned, without decoding more than a TIFF that is turned."""
    # Pillow decodes a whole PNG to look for EXIF behind its pixels, so such a file is left to `decode`, which refuses.
    exif = Image.Image.getexif(image) if image.format == "PNG" else image.getexif()
    turned = exif.get(_ORIENTATION) in _TURNED
    if turned and image.format == "TIFF":  # Pillow turns it itself, the size sooner than the pixels
        return ImageOps.exif_transpose(image).size[::-1]
    return image.size if turned else image.size[::-1]


def _brightest(image, path):
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F" or low < 0 or high > 65535:
        raise DataError(f"{path} holds values from {low:g} to {high:g}: save it with 8 or 16 bits without a sign.")
    return max(int(high), 256)  # one that would fit into 8 bits still gets at least 9


def _seen_through(image):
    return image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info


def _grey_palette(image):
    if image.mode != "P":
        return False
    palette = np.array(image.getpalette("RGB")).reshape(-1, 3)
    return bool((palette == palette[:, :1]).all())


def decode(root, path, channels, bits, size):
    """One file as uint8 (C, H, W); refused if H and W are not the `size` that its header gave."""
    pixels = _decoded(root, path, channels, bits)
    if pixels.shape[1:] != tuple(size):
        found, said = (" x ".join(map(str, shape)) for shape in (pixels.shape[1:], size))
        raise DataError(f"{path} in {root} decodes to {found} px, but its header says {said}: save it again.")
    return pixels


def _decoded(root, path, channels, bits):
    with _opened(root, path) as image:
        image = ImageOps.exif_transpose(image)  # decodes too: only then is the size of a turned TIFF that of its pixels
        if image.mode.startswith("I"):
            grey = np.asarray(image).astype(np.float64) * (255 / (2**bits - 1))
            grey = grey.round().clip(0, 255).astype(np.uint8)
            return np.broadcast_to(grey, (channels, *grey.shape))
        if _seen_through(image):
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
        if channels == 1:  # not convert("L") of colours, whose weights round
            return np.asarray(image.convert("RGB"))[None, :, :, 0] if image.mode != "L" else np.asarray(image)[None]
        return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


class _opened:
    """A Pillow image whose claimed size is acceptable; whatever is wrong with it becomes one sentence."""

    def __init__(self, root, path):
        self.root, self.path = root, path

    def __enter__(self):
        try:
            # A stream and not a path: Pillow maps plain TIFFs that it has a path of, and those that are turned wrongly.
            self.stream = open(self.root / self.path, "rb")
        except OSError as error:
            self._explain(error)
        try:
            self.image = Image.open(self.stream, formats=_FORMATS)
            width, height = self.image.size
            if width * height > MAX_PIXELS:
                raise Image.DecompressionBombError
            return self.image
        except Exception as error:
            self.stream.close()
            self._explain(error)

    def __exit__(self, kind, error, traceback):
        self.image.close()
        self.stream.close()
        if error is not None:
            self._explain(error)

    def _explain(self, error):
        if isinstance(error, DataError):
            raise error
        if isinstance(error, Image.DecompressionBombError):
            raise DataError(
                f"{self.path} claims more pixels than the limit of {MAX_PIXELS:,}: it was not decoded."
            ) from None
        if isinstance(error, UnidentifiedImageError):
            raise DataError(f"{self.path} in {self.root} is not an image, whatever its name says: remove it.") from None
        if isinstance(
            error, (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error)
        ):
            reason = str(error).rstrip(".")
            raise DataError(f"{self.path} in {self.root} is damaged ({reason}): repair it or remove it.") from None
        raise error


# --- the arrays of an npz -----------------------------------------------------------------------------------


def npz_images(path, images):
    if images is None:
        raise DataError(f"{path.name} has no array 'images'.")
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or not images.size:
        raise DataError(
            f"{path.name}: images must be uint8, (N, H, W), (N, H, W, 1, 3 or 4) or (N, C, H, W) and not empty, "
            f"but they are {images.dtype} {images.shape}."
        )
    if images.ndim == 3:
        return images[:, None]
    first, middle, last = images.shape[1:]
    both = first in _CHANNELS and last in _CHANNELS
    neither = first not in _CHANNELS and last not in _CHANNELS
    if both or (neither and first in (middle, last)):  # the other reading has squares, as most images are
        raise DataError(
            f"{path.name}: in images of shape {images.shape} the channels cannot be told from the pixels: "
            "store grey images as (N, H, W)."
        )
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)) if last in _CHANNELS else images


def npz_column(path, arrays, key, count):
    column = arrays[key]
    if column.size != count or column.dtype.kind not in "uiUb":
        raise DataError(
            f"{path.name}: {key} must be {count:,} integers or strings, but they are {column.dtype} {column.shape}."
        )
    return column.ravel().astype(int).astype(str) if column.dtype.kind == "b" else column.ravel().astype(str)


# --- the cache ----------------------------------------------------------------------------------------------


def pack(stream, images, shape):
    """Written in order, not through a map: on a full disk that is an error and not the end of the process."""
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    for image in images:
        image = image if image.shape[1:] == shape[2:] else _resized(image[None], shape[2])[0]
        if image.shape != shape[1:] or image.dtype != np.uint8:  # or every image after it would be moved
            raise DataError(f"An image of {image.dtype} {image.shape} does not fit into a pack of {shape}.")
        stream.write(np.ascontiguousarray(image))
    stream.flush()


def cache_folder():
    """Readable by this user alone: what lies in it are somebody's images."""
    folder = cache_dir() / "folders"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def place(root):
    return hashlib.sha256(str(root).encode()).hexdigest()[:12]


def clear(root, suffix, keep=""):
    """Removes what was kept of an earlier state of the folder."""
    for old in cache_folder().glob(f"{place(root)}-*{suffix}"):
        if not keep or f"-{keep}-" not in old.name:
            old.unlink(missing_ok=True)


def write_whole(path, content):
    """`content`, bytes or a function of a stream, whole or not at all."""
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as stream:
            stream.write(content) if isinstance(content, bytes) else content(stream)
        os.replace(stream.name, path)
    except BaseException:
        Path(stream.name).unlink(missing_ok=True)
        raise
