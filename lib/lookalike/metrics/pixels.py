"""Pixel metrics of pairs of images, and what they give when no generator is involved.

Paper: Arroyo Galende et al. 2026, "No Free Lunch ...", Table 1. Chapter: no_free_lunch. The paper compares
each synthetic image with a random real one, of any class; `anchors` shows that real images compared like that
do no better.
"""

import numpy as np
import torch
import torch.nn.functional as F

from lookalike.metrics import as_images, to_unit
from lookalike.metrics.neighbours import nearest

PUBLISHED_SIDE = 299  # the authors upsample before every metric, because Inception wants it
PAIRINGS = ("as_published", "random", "same_class", "nearest_real")
STANDARD_SETS = {
    "real": "other real images",
    "repeated": "one real image repeated",
    "mean": "dataset mean",
    "blurred": "5x5-blurred other real images",
    "black": "all black",
    "noisy": "other real images with noise",
}
REACH = 5  # the Gaussian window of SSIM is 11 x 11 with standard deviation 1.5


def psnr(real, synthetic, data_range=2.0):
    """Peak signal-to-noise ratio of pairs (N, C, H, W), in dB, error pooled over all; higher is better.

    `data_range` is in units of [-1, 1]: 2 is the full range. Infinite for equal images, minus infinite for a
    range of 0.
    """
    real, synthetic = _pairs(real, synthetic)
    return _decibels(data_range, (real - synthetic).square().mean(dtype=torch.float64))


def ssim(real, synthetic):
    """Mean structural similarity of pairs (N, C, H, W): up to 1, higher is better.

    On [0, 1] pixels, 11 x 11 Gaussian window, reflected borders, as torchmetrics computes it.
    """
    real, synthetic = (to_unit(images).flatten(0, 1) for images in _pairs(real, synthetic))
    filters = _gaussian_filter(real.shape[-2]), _gaussian_filter(real.shape[-1])
    total = sum(_ssim(x, y, filters).sum(dtype=torch.float64) for x, y in zip(real.split(4), synthetic.split(4)))
    return float(total / len(real))


def paired_table(real, synthetic, pairing, real_labels=None, synthetic_labels=None, resize=None, seed=0):
    """PSNR (dB) and SSIM of pairs of real and synthetic images, the pairing in their names; higher is better.

    pairing: "as_published": shuffled real against class-sorted synthetic images, so classes mismatch, both at
    299 px, PSNR's range up to the largest synthetic pixel; "random"; "same_class"; "nearest_real", which a
    generator that copies wins. The last three compare at the images' own size and over the full range.
    `resize` sets another side and joins the names.
    """
    real, synthetic = as_images(real), as_images(synthetic)
    chosen = pair(real, synthetic, pairing, real_labels, synthetic_labels, seed)
    side = PUBLISHED_SIDE if resize is None and pairing == "as_published" else resize
    error, similarity, peak = 0.0, 0.0, 0.0
    for i, j in zip(*(indices.split(64) for indices in chosen)):
        x, y = resized(real[i], side), resized(synthetic[j], side)
        share = len(i) / len(chosen[0])
        error += share * (x - y).square().mean(dtype=torch.float64)
        similarity += share * ssim(x, y)
        peak = max(peak, _peak(synthetic[j], y))
    name = pairing if resize is None else f"{pairing}_{resize}px"
    data_range = peak if pairing == "as_published" else 2.0
    return {f"psnr_{name}": _decibels(data_range, error), f"ssim_{name}": similarity}


def pair(real, synthetic, pairing, real_labels=None, synthetic_labels=None, seed=0):
    """Indices into `real` and `synthetic`, both (P,), of what `pairing` compares; see `paired_table`."""
    generator = torch.Generator().manual_seed(seed)
    everyone = torch.arange(len(synthetic))
    if pairing == "nearest_real":
        return torch.as_tensor(nearest(as_images(synthetic), as_images(real))[1]), everyone
    if pairing == "same_class":
        labels = _labels(real_labels, pairing), _labels(synthetic_labels, pairing)
        return _same_class(*labels, generator), everyone
    if pairing not in PAIRINGS:
        raise ValueError(f"A pairing is one of {', '.join(PAIRINGS)}, not {pairing!r}.")
    if pairing == "as_published":
        everyone = _labels(synthetic_labels, pairing).argsort(stable=True)
    count = min(len(real), len(synthetic))
    return torch.randperm(len(real), generator=generator)[:count], everyone[:count]


def anchors(real, other_real, pairing, real_labels=None, other_labels=None, resize=None, seed=0):
    """`paired_table` of `real` against each of `anchor_sets(other_real)`: the scale to read numbers on."""
    settings = (pairing, real_labels, other_labels, resize, seed)
    return {name: paired_table(real, made, *settings) for name, made in anchor_sets(other_real, seed).items()}


def anchor_sets(images, seed=0):
    """Sets that no generator made, each of the shape of `images`: any metric can be read against them.

    "real": the images themselves; "blurred": 5 x 5 means; "noisy": plus N(0, 0.2) in [0, 1]; "repeated": the
    first image again and again (total collapse); "mean": their average; "black".
    """
    images = as_images(images)
    noise = 0.4 * torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return {
        "real": images,
        "blurred": F.avg_pool2d(F.pad(images, (2, 2, 2, 2), mode="replicate"), 5, stride=1),
        "noisy": (images + noise).clamp(-1, 1),
        "repeated": images[:1].expand_as(images),
        "mean": images.mean(0, keepdim=True).expand_as(images),
        "black": -torch.ones_like(images),
    }


def standard_values(real, seed=0, pairs=150):
    """PSNR and SSIM of random pairs of `real` (N, C, H, W) with sets that no generator made: a list of dicts.

    One row per set of STANDARD_SETS, its title under "set": psnr_as_published (dB, at 299 px, range up to the set's
    largest pixel; None where that range is 0, as for black), psnr_full_range (dB, at 299 px), ssim_as_published (at
    299 px) and ssim_own_size. Higher is better, by name: a set that is worth nothing may come out above the first row,
    which is what the best generator would get. `seed` draws `pairs` images and as many others; the mean is of all
    but the first half, the repeated image is the first of the others. Seven seconds on one core for 150 pairs.
    """
    real = as_images(real)
    if not 1 <= pairs <= len(real) // 2:
        raise ValueError(f"Pairs of different images: `pairs` must be 1 to {len(real) // 2}, half of the images.")
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(seed))
    reference, others = real[order[:pairs]], real[order[pairs:]]
    sets = anchor_sets(others[:pairs], seed) | {"mean": others.mean(0, keepdim=True).expand_as(reference)}
    return [{"set": title, **_standard_row(reference, sets[name])} for name, title in STANDARD_SETS.items()]


def _standard_row(real, made):
    x, y = resized(real, PUBLISHED_SIDE), resized(made, PUBLISHED_SIDE)
    peak = _peak(made, y)
    return {
        "psnr_as_published": psnr(x, y, peak) if peak > 0 else None,
        "psnr_full_range": psnr(x, y),
        "ssim_as_published": ssim(x, y),
        "ssim_own_size": ssim(real, made),
    }


def _pairs(real, synthetic):
    real, synthetic = as_images(real), as_images(synthetic)
    if real.shape != synthetic.shape:
        raise ValueError(f"Pairs have one shape; these are {tuple(real.shape)} and {tuple(synthetic.shape)}.")
    return real, synthetic


def _labels(labels, pairing):
    if labels is None:
        raise ValueError(f'The pairing "{pairing}" needs labels.')
    return torch.as_tensor(labels).flatten()


def _same_class(real_labels, synthetic_labels, generator):
    """For each synthetic image a random real one of its class."""
    chosen = torch.empty(len(synthetic_labels), dtype=torch.long)
    for label in synthetic_labels.unique():
        candidates, wanted = (real_labels == label).nonzero().flatten(), synthetic_labels == label
        if len(candidates) == 0:
            raise ValueError(f"No real image has the class {int(label)}, so its synthetic images have no pair.")
        draws = torch.randint(len(candidates), (int(wanted.sum()),), generator=generator)
        chosen[wanted] = candidates[draws]
    return chosen


def resized(images, side):
    """Images (N, C, H, W) at a square of `side` pixels as the authors enlarge them, bilinear; None leaves them."""
    if side is None:
        return images
    return F.interpolate(images, (side, side), mode="bilinear", align_corners=False)


def _peak(images, enlarged):
    """The published range, up to the brightest pixel of what was enlarged, for pixels in [-1, 1].

    Enlarging rounds: black would come out a ten-millionth brighter, and its PSNR would be a number.
    """
    return float(torch.minimum(enlarged.max(), images.max()) + 1)


def _decibels(data_range, mean_squared_error):
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(10 * np.log10(np.float64(data_range) ** 2 / np.float64(mean_squared_error)))


def _gaussian_filter(side):
    """Matrix (S, S) that smooths a column of pixels, borders reflected."""
    if side <= REACH:
        raise ValueError(f"SSIM needs images of at least {REACH + 1} pixels a side; these have {side}.")
    window = torch.exp(-torch.arange(-REACH, REACH + 1, dtype=torch.float64).square() / (2 * 1.5**2))
    columns = F.pad(torch.eye(side, dtype=torch.float64), (REACH, REACH), mode="reflect").unfold(1, 2 * REACH + 1, 1)
    return (columns @ (window / window.sum())).T.float().contiguous()


def _smooth_rows(matrix, maps, step=64):
    """matrix @ maps, in bands: the matrix is zero farther than REACH from its diagonal."""
    bands = [(i, max(0, i - REACH), i + step + REACH) for i in range(0, len(matrix), step)]
    return torch.cat([matrix[i : i + step, low:high] @ maps[..., low:high, :] for i, low, high in bands], -2)


def _ssim(x, y, filters):
    """SSIM (N,) of grey pairs (N, H, W) in [0, 1]."""
    down, across = filters
    maps = torch.stack([x, y, x * x + y * y, x * y])
    mean_x, mean_y, squares, product = _smooth_rows(across, _smooth_rows(down, maps).mT).mT
    c1, c2 = 0.01**2, 0.03**2
    means, mean_squares = mean_x * mean_y, mean_x.square() + mean_y.square()
    luminance = (2 * means + c1) / (mean_squares + c1)
    structure = (2 * (product - means) + c2) / ((squares - mean_squares).clamp(min=0) + c2)
    return (luminance * structure).mean((1, 2))
