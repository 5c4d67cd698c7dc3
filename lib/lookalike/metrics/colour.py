"""How far the colours of two sets lie apart: hue around its circle, saturation and brightness along their line.

Paper: Carrasco Limeros et al. 2022 (arXiv 2208.11702), Sec. 4.1, which saw "an unnatural red or violet hue" leak from
colour augmentation into its made images and gave no number. Chapter: stylegan2_dermatology. Hue is a circle, so the
work of moving one histogram onto the other is measured around it: red at 359 degrees lies beside red at 1. Pixels of
little colour have little to say on hue, so each counts with its chroma.
"""

import numpy as np

from lookalike.data.image_set import to_uint8
from lookalike.metrics import as_array, as_images

LEVELS = 256
AT_ONCE = 2**22  # pixels whose colours are held at one time


def hue_weights(images, bins=36):
    """Chroma (N, bins) that each image (N, 3, H, W) has in each bin of hue; bin 0 begins at red, 0 degrees.

    Images are uint8 or floats in [-1, 1]. Chroma is saturation times value, 0 to 1 per pixel; a grey pixel has none.
    Rows of sets may be summed, so that a part of a set costs no second look at its pixels.
    """
    if bins < 2:
        raise ValueError(f"A histogram of hues needs two bins or more, not {bins}.")
    parts = []
    for pixels in _in_parts(_pixels(images)):
        hue, chroma = _hue_and_chroma(pixels)
        cells = np.minimum((hue * (bins / 360)).astype(int), bins - 1) + bins * np.arange(len(pixels))[:, None, None]
        sums = np.bincount(cells.ravel(), chroma.ravel(), minlength=bins * len(pixels))
        parts.append(sums.reshape(len(pixels), bins))
    return np.concatenate(parts)


def hue_histogram(images, bins=36):
    """Shares (bins,) of the set's chroma by hue, which sum to 1; see `hue_weights`. A set without any colour raises."""
    return shares_of(hue_weights(images, bins))


def shares_of(weights):
    """One histogram (bins,), which sums to 1, of the weights (N, bins) of images."""
    total = np.asarray(weights, float).sum(0)
    if not total.sum() > 0:
        raise ValueError("These images are grey in every pixel: they have no hue to compare.")
    return total / total.sum()


def hue_distance(real, synthetic, bins=36):
    """Degrees that the chroma of one set must be turned, on average, to lie as the other's: 0 to 180, lower is better.

    The earth mover's distance of two `hue_histogram`s around the circle (`circular_distance`). It sees no finer than a
    bin, 10 degrees for 36.
    """
    return circular_distance(hue_histogram(real, bins), hue_histogram(synthetic, bins))


def circular_distance(first, second):
    """Earth mover's distance, in degrees, of two histograms (bins,) around a full circle; 0 to 180, 0 where equal.

    Moving mass along a line costs the sum of |cumulated differences|; on a circle any constant may flow all the way
    around besides, and the median of the cumulated differences is the one that costs least (Werman, Peleg and Melter
    1986; Rabin, Delon and Gousseau 2009).
    """
    first, second = np.asarray(first, float), np.asarray(second, float)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"Histograms need one shape (bins,), not {first.shape} and {second.shape}.")
    flow = np.cumsum(first - second)
    return float(np.abs(flow - np.median(flow)).sum() * 360 / len(flow))


def colour_distances(real, synthetic, bins=36):
    """{"hue", "saturation", "brightness"} of two sets of images (N, 3, H, W); lower is better, 0 where they agree.

    hue: `hue_distance`, in degrees. saturation and brightness (the value of HSV), 0 to 1: the Wasserstein distance
    between all pixels of one set and all of the other, each read in 256 levels: exact for brightness, and right to
    1/255 for saturation.
    """
    first, second = (level_histograms(images).sum(1) for images in (real, synthetic))
    lines = [line_distance(*pair) for pair in zip(first, second)]
    return {"hue": hue_distance(real, synthetic, bins)} | dict(zip(("saturation", "brightness"), lines))


def level_histograms(images):
    """Counts (2, N, 256) of the pixels of each image (N, 3, H, W) by saturation and by brightness, in levels of 1/255.

    Black pixels have saturation 0.
    """
    parts = [_levels(pixels) for pixels in _in_parts(_pixels(images))]
    return np.concatenate(parts, axis=1)


def line_distance(first, second):
    """Wasserstein distance of two histograms (256,) of levels from 0 to 1, whatever their sums; 0 to 1."""
    first, second = (np.asarray(counts, float) / np.sum(counts) for counts in (first, second))
    return float(np.abs(np.cumsum(first - second)).sum() / (LEVELS - 1))


def _pixels(images):
    """uint8 (N, 3, H, W)."""
    array = as_array(images)
    if array.ndim != 4 or array.shape[1] != 3 or 0 in array.shape:
        raise ValueError(f"Colours need images of the shape (N, 3, H, W), at least one; these have {array.shape}.")
    return array if array.dtype == np.uint8 else to_uint8(as_images(array))


def _in_parts(pixels):
    step = max(1, AT_ONCE // (pixels.shape[2] * pixels.shape[3]))
    return [pixels[start : start + step] for start in range(0, len(pixels), step)]


def _hue_and_chroma(pixels):
    """Hue in [0, 360) and chroma in [0, 1], both (N, H, W), of uint8 pixels, as in the HSV model."""
    red, green, blue = np.moveaxis(pixels.astype(np.float32), 1, 0)
    top = np.maximum(np.maximum(red, green), blue)
    chroma = top - np.minimum(np.minimum(red, green), blue)
    safe = np.where(chroma > 0, chroma, 1)
    sixth = np.select(
        [top == red, top == green],
        [(green - blue) / safe % 6, (blue - red) / safe + 2],
        (red - green) / safe + 4,
    )
    return 60 * sixth % 360, chroma / 255


def _levels(pixels):
    top, bottom = pixels.max(1).astype(int), pixels.min(1).astype(int)
    saturation = np.rint(255 * (top - bottom) / np.maximum(top, 1)).astype(int)
    first = LEVELS * np.arange(len(pixels))[:, None, None]
    counted = [np.bincount((first + part).ravel(), minlength=LEVELS * len(pixels)) for part in (saturation, top)]
    return np.stack(counted).reshape(2, len(pixels), LEVELS)
