"""The figure's table of the mass generator: four distances between parts of real, synthetic and foreign images.

Paper: Osuala et al. 2024 (arXiv 2407.12669), Fig. 2. Chapter: mcgan_dp. The functions are stages of a run. Beside the
paper's four rows stand three made of real images alone, which show what each distance answers to. `frd_causes` asks why
FRD puts the released synthetic images far from the released real ones where the paper has them near: by what happens
when one property, the power of the finest texture, is taken away or given.
"""

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter

from lookalike.data import datasets
from lookalike.data.image_set import to_uint8
from lookalike.metrics import as_images, distances, radiomics, subsets
from lookalike.metrics.extractors import efficientnet_lite0, inception, timm_model
from lookalike.metrics.features import features
from lookalike.training.cells import load_samples

BLUR = 1.0  # pixels, the standard deviation of an anchor's Gaussian
GRAIN = 5.0  # grey levels of 255, that of the noise which an anchor adds: hardly seen
RADIMAGENET_SIDE = 299
FINE = 1 / 8  # cycles per pixel: above is texture, below the mass and its surroundings
BANDS = (0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)  # cycles per pixel; nothing lies beyond the square root of 1/2
FAMILIES = ("firstorder", "glcm", "glrlm", "gldm", "glszm", "ngtdm")  # shape2D tells only the images' size


def figure_measures(
    folder, *, real, synthetic, other, image_size, feature_size, seed, cache, parts=3, inception="", radimagenet="",
    radimagenet_sha256="",
):  # fmt: skip
    """The table of Fig. 2 on `parts` disjoint parts of each set: {"rows": {row: {metric: ...}}, "sizes", "features"}.

    As few synthetic images as real ones are taken (differs, see `parts_of`).

    `real`: a data set's train split, R1.. by patient; `synthetic`: another set's train split, or the folder of a stage
    with samples.safetensors, S1..; `other`: the test split of a third, B1.. by patient, "" leaves its row out. Every
    image is first brought to a square of `image_size` px (bilinear, antialiased, rounded to 8 bits; one that has
    this size is left alone), so that 64 px samples meet 128 px patches at one size. Rows: Real-Real and Syn-Syn (all
    pairs), Syn-Real (Ri, Si), Real-Other (Ri, Bi), and anchors, R2.. against what was made of R1, so that no patient is
    on both sides: Real-Blurred (Gaussian of 1 px), Real-Grainy (noise of 5 grey levels), Real-Noise (pixels of real
    images in random places). Each metric gives {"values", "mean", "std"}, std with ddof 0 as published.

    Metrics, lower is better: frechet and kernel (x 1000) in EfficientNet-Lite0 features at `feature_size` px; frd_v0;
    frd_v1 (a logarithm; the first of a pair counts as real); fid with `inception`, a path to FID's weights;
    frechet_radimagenet with `radimagenet` and `radimagenet_sha256`, weights of an Inception v3 in timm's names. A
    Fréchet distance falls with the number of images: "sizes" gives that of every part. "features" names the networks.
    """
    images, rows = parts_of(real, synthetic, other, image_size, parts, seed)
    networks = _networks(feature_size, inception, radimagenet, radimagenet_sha256)
    images |= made_of_real(images["real"][rows["real"][0]], seed)
    hidden = bool(other) and datasets.load(other, "test").restricted  # its features never lie in the cache
    stored = {name: None if name == "other" and hidden else cache for name in images}
    numbers = {name: {k: features(x, net, stored[k]) for k, x in images.items()} for name, net in networks.items()}
    numbers["v0"] = {k: radiomics.radiomic_features(x) for k, x in images.items()}
    numbers["v1"] = {k: radiomics.radiomic_features_v1(x) for k, x in images.items()}
    pairs = pairs_of(rows) | anchor_pairs(rows)
    table = {row: {} for row in pairs}
    for metric, of, distance in _measures(networks):
        for row, found in over_pairs(distance, numbers[of], pairs).items():
            table[row][metric] = found
    sizes = {name: [len(part) for part in found] for name, found in rows.items()}
    return {"rows": table, "sizes": sizes, "features": {name: network.name for name, network in networks.items()}}


def frd_causes(folder, *, real, synthetic, other, image_size, seed, parts=3):
    """FRD v0 in the figure's rows on changed images, and what it is made of; as few synthetic images as real ones.

    Sets, `image_size` and rows as in `figure_measures`. "variants": {variant: {row: {"values", "mean", "std"}}} for
    "as released"; "all blurred": every image by a Gaussian of 1 px; "synthetic filtered": synthetic images get the
    real set's power spectrum above 1/8 cycles per pixel by one linear filter; "real filtered": the reverse, real images
    get the synthetic set's, and every row with real images is measured anew. "families": {family: {row: ...}}, the
    distance as released in the features of one family alone. "gap": {row: share}, how much of the distance is between
    the means, 0..1. "bands": {set: variances}, grey levels^2 in each band of BANDS, which sum to the mean variance
    inside an image.
    """
    images, rows = parts_of(real, synthetic, other, image_size, parts, seed)
    wanted, spectra = pairs_of(rows), {name: power_spectrum(x) for name, x in images.items()}
    smooth = with_spectrum(images["synthetic"], spectra["synthetic"], spectra["real"])
    textured = with_spectrum(images["real"], spectra["real"], spectra["synthetic"])
    numbers = {name: radiomics.radiomic_features(x) for name, x in images.items()}
    variants = {
        "as released": numbers,
        "all blurred": {name: radiomics.radiomic_features(blurred(x)) for name, x in images.items()},
        "synthetic filtered": numbers | {"synthetic": radiomics.radiomic_features(smooth)},
        "real filtered": numbers | {"real": radiomics.radiomic_features(textured)},
    }
    family = np.array([name.split("_")[0] for name in radiomics.FEATURE_NAMES])
    alone = {kind: {name: x[:, family == kind] for name, x in numbers.items()} for kind in FAMILIES}
    return {
        "variants": {name: over_pairs(radiomics.frd_v0, of, wanted) for name, of in variants.items()},
        "families": {kind: over_pairs(radiomics.frd_v0, of, wanted) for kind, of in alone.items()},
        "gap": {row: found["mean"] for row, found in over_pairs(gap_share, numbers, wanted).items()},
        "bands": {name: band_variances(spectrum) for name, spectrum in spectra.items()},
    }


def parts_of(real, synthetic, other, image_size, parts, seed):
    """Images uint8 (N, C, S, S) and row indices of the parts, by "real", "synthetic" and, where named, "other".

    Of the synthetic images as many are drawn as there are real ones, if there are more: a Fréchet distance between two
    samples of one distribution falls with their size, and the paper's 3,240 against 360 make Syn-Syn small by itself.
    """
    if parts < 2:
        raise ValueError(f"Real-Real needs two parts at least, not {parts}.")
    if synthetic == real:
        raise ValueError(f"synthetic must be another set than real, not {real!r} twice: Real-Real is a row anyway.")
    sets = {"real": datasets.load(real, "train")}
    images = {"real": sets["real"].images}
    if synthetic in datasets.names():
        images["synthetic"] = datasets.load(synthetic, "train").images
    elif Path(synthetic, "samples.safetensors").is_file():
        images["synthetic"] = load_samples(synthetic)[0]
    else:
        raise ValueError(f"{synthetic} is neither a data set's name nor a folder with samples.safetensors.")
    if other:
        sets["other"] = datasets.load(other, "test")
        images["other"] = sets["other"].images
    some = np.random.default_rng(seed).permutation(len(images["synthetic"]))[: len(images["real"])]
    images["synthetic"] = images["synthetic"][np.sort(some)]
    subjects = {name: found.subjects for name, found in sets.items()}
    subjects["synthetic"] = np.arange(len(images["synthetic"])).astype(str)
    rows = {name: subsets.patient_parts(subjects[name], parts, seed) for name in images}
    return {name: brought_to(x, image_size) for name, x in images.items()}, rows


def brought_to(images, image_size):
    """uint8 images (N, C, H, W) at a square of `image_size`: bilinear, antialiased, rounded; untouched at that size."""
    if images.shape[2:] == (image_size, image_size):
        return images
    size = (image_size, image_size)
    parts = as_images(images).split(256)
    return np.concatenate([to_uint8(F.interpolate(x, size, mode="bilinear", antialias=True)) for x in parts])


def made_of_real(images, seed):
    """The anchors' images, uint8 as the real ones (N, C, H, W): "blurred", "grainy" and "noise"."""
    rng = np.random.default_rng(seed)
    grainy = _rounded(images + GRAIN * rng.standard_normal(images.shape, np.float32))
    return {"blurred": blurred(images), "grainy": grainy, "noise": rng.choice(images.ravel(), images.shape)}


def blurred(images):
    """uint8 images (N, C, H, W) after a Gaussian of BLUR pixels."""
    return _rounded(gaussian_filter(images.astype(np.float32), (0, 0, BLUR, BLUR)))


def power_spectrum(images):
    """Mean over images and channels of |DFT|^2 / (H W)^2, (H, W); sums to the mean variance inside an image.

    The zero frequency counts nothing: every image's own mean is taken out. Grey levels^2.
    """
    total = np.zeros(images.shape[2:])
    for some in _few(images):
        centred = some - some.mean((2, 3), keepdims=True)
        total += np.square(np.abs(np.fft.fft2(centred))).sum((0, 1))
    return total / (images.shape[0] * images.shape[1] * total.size**2)


def frequencies(size):
    """Cycles per pixel of each term of a DFT of (H, W) pixels."""
    return np.hypot(np.fft.fftfreq(size[0])[:, None], np.fft.fftfreq(size[1]))


def band_variances(spectrum):
    """Sums of a spectrum (H, W) over each of BANDS."""
    where = frequencies(spectrum.shape)
    return [float(spectrum[(where > low) & (where <= high)].sum()) for low, high in pairwise(BANDS)]


def with_spectrum(images, own, wanted):
    """uint8 images whose set has the spectrum `own` (H, W), filtered so that it has `wanted` above FINE.

    One real, symmetric filter for all images: nothing moves, and a texture that is not there is not made up.
    """
    fine = (frequencies(own.shape) > FINE) & (own > 0)
    gain = np.where(fine, np.sqrt(wanted / np.where(fine, own, 1)), 1)
    return np.concatenate([_rounded(np.fft.ifft2(np.fft.fft2(some) * gain).real) for some in _few(images)])


def gap_share(first, second):
    """Share of `radiomics.frd_v0` of features (N, D) that lies between the means, 0..1; the rest is covariance."""
    both = np.concatenate([first, second])
    width = np.ptp(both, axis=0)
    gap = (first.mean(0) - second.mean(0)) / np.where(width > 0, width, 1)
    return radiomics.RANGE_V0**2 * np.square(gap).sum() / radiomics.frd_v0(first, second)


def pairs_of(rows):
    """Row of the figure -> pairs of (set, row indices), from the parts of each set."""
    parts = len(rows["real"])
    found = {
        "Syn-Real": [("real", "synthetic", i, j) for i, j in subsets.pairs_between(parts)],
        "Real-Real": [("real", "real", i, j) for i, j in subsets.pairs_within(parts)],
        "Syn-Syn": [("synthetic", "synthetic", i, j) for i, j in subsets.pairs_within(parts)],
    }
    if "other" in rows:
        found["Real-Other"] = [("real", "other", i, j) for i, j in subsets.pairs_between(parts)]
    return {row: [((a, rows[a][i]), (b, rows[b][j])) for a, b, i, j in of_row] for row, of_row in found.items()}


def anchor_pairs(rows):
    """The same for the anchors: every other part of the real images with what was made of the first."""
    others, whole = rows["real"][1:], slice(None)
    made = ("blurred", "grainy", "noise")
    return {f"Real-{name.title()}": [(("real", part), (name, whole)) for part in others] for name in made}


def over_pairs(distance, numbers, pairs):
    """Row -> {"values", "mean", "std"} of `distance` between rows of `numbers`, features (N, D) by set."""
    return {
        row: subsets.mean_and_std([distance(numbers[a][i], numbers[b][j]) for (a, i), (b, j) in of_row])
        for row, of_row in pairs.items()
    }


def _few(images):
    """Parts that fit the memory as complex numbers."""
    return np.array_split(images, -(-len(images) // 128))


def _rounded(images):
    return np.rint(images).clip(0, 255).astype(np.uint8)


def _networks(feature_size, inception_path, radimagenet, radimagenet_sha256):
    """Extractors by metric."""
    if bool(radimagenet) != bool(radimagenet_sha256):
        raise ValueError("RadImageNet features need two settings: give both radimagenet and radimagenet_sha256.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = {"frechet": efficientnet_lite0(feature_size, device)}
    if inception_path:
        found["fid"] = inception(inception_path, device=device)
    if radimagenet:
        wanted = ("inception_v3", radimagenet, radimagenet_sha256, RADIMAGENET_SIDE)
        found["frechet_radimagenet"] = timm_model(*wanted, device=device)
    return found


def _measures(networks):
    """(metric, features that it reads, distance)."""
    frechet = [(name, name, distances.frechet_distance) for name in networks]
    radiomic = [("frd_v0", "v0", radiomics.frd_v0), ("frd_v1", "v1", radiomics.frd_v1)]
    return [*frechet, ("kernel", "frechet", _kernel), *radiomic]


def _kernel(x, y):
    return 1000 * distances.kernel_distance(x, y).value
