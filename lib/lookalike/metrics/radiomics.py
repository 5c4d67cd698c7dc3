"""Radiomic features and the two Fréchet radiomic distances made of them, in numpy alone.

Papers: Osuala et al. 2024, "Enhancing the utility of privacy-preserving cancer classification using synthetic data"
(FRD v0; chapter: mcgan_dp) and Konz, Osuala et al. 2026, "Fréchet Radiomic Distance" (v1). The distances are those of
frd-score 1.0.1 (github.com/RichardObi/frd-score, Apache-2.0), written anew, on features as pyradiomics computes them
(`lookalike.metrics.textures`): here is what is done to an image before, and what is made of its features after.

The two distances are different numbers. The region is the whole image but its first pixel, because pyradiomics refuses
a mask without background; v1 shrinks the image first, and that pixel comes back.
"""

import numpy as np
from scipy.ndimage import spline_filter1d

from lookalike.data.image_set import to_uint8
from lookalike.metrics import as_array, as_images
from lookalike.metrics.distances import frechet_distance
from lookalike.metrics.textures import (
    first_order,
    glcm,
    gldm,
    glrlm,
    glszm,
    ngtdm,
    rectangle_shape,
)

RANGE_V0 = 7.45670747756958  # v0 scales each feature to [0, this]
PIXELS_AT_ONCE = 2**14
SMALLEST = 4  # pixels a side
ZERO = 1e-9  # grey levels; the mean of a high-pass band is zero at even sides, but for rounding
LUMINANCE = np.array([0.2125, 0.7154, 0.0721])  # ITK's grey of a colour image
LOW_PASS = np.array([-0.015655728135791993, -0.07273261951252645, 0.3848648468648578, 0.8525720202116004,
    0.3378976624574818, -0.07273261951252645])  # coif1  # fmt: skip
HIGH_PASS = LOW_PASS[::-1] * [-1, 1, -1, 1, -1, 1]
FILTERED = ("original", "wavelet-LH", "wavelet-HL", "wavelet-HH", "wavelet-LL")

_SIZED = """GrayLevelNonUniformity GrayLevelNonUniformityNormalized GrayLevelVariance HighGrayLevel{0}Emphasis
    {1}Emphasis {1}HighGrayLevelEmphasis {1}LowGrayLevelEmphasis LowGrayLevel{0}Emphasis {2}Entropy {3}NonUniformity
    {3}NonUniformityNormalized {0}Percentage {2}Variance {4}Emphasis {4}HighGrayLevelEmphasis
    {4}LowGrayLevelEmphasis"""
_NAMES = {
    "shape2D": """Elongation MajorAxisLength MaximumDiameter MeshSurface MinorAxisLength Perimeter
        PerimeterSurfaceRatio PixelSurface Sphericity""",
    "firstorder": """10Percentile 90Percentile Energy Entropy InterquartileRange Kurtosis Maximum
        MeanAbsoluteDeviation Mean Median Minimum Range RobustMeanAbsoluteDeviation RootMeanSquared Skewness
        TotalEnergy Uniformity Variance""",
    "glcm": """Autocorrelation ClusterProminence ClusterShade ClusterTendency Contrast Correlation DifferenceAverage
        DifferenceEntropy DifferenceVariance Id Idm Idmn Idn Imc1 Imc2 InverseVariance JointAverage JointEnergy
        JointEntropy MCC MaximumProbability SumAverage SumEntropy SumSquares""",
    "glrlm": _SIZED.format("Run", "LongRun", "Run", "RunLength", "ShortRun"),
    "gldm": """DependenceEntropy DependenceNonUniformity DependenceNonUniformityNormalized DependenceVariance
        GrayLevelNonUniformity GrayLevelVariance HighGrayLevelEmphasis LargeDependenceEmphasis
        LargeDependenceHighGrayLevelEmphasis LargeDependenceLowGrayLevelEmphasis LowGrayLevelEmphasis
        SmallDependenceEmphasis SmallDependenceHighGrayLevelEmphasis SmallDependenceLowGrayLevelEmphasis""",
    "glszm": _SIZED.format("Zone", "LargeArea", "Zone", "SizeZone", "SmallArea"),
    "ngtdm": "Busyness Coarseness Complexity Contrast Strength",
}
FEATURE_NAMES = tuple(f"{kind}_{name}" for kind, names in _NAMES.items() for name in sorted(names.split()))

_LEFT_OUT = ("glcm_MCC", "glcm_SumAverage")  # of v1, beside shape2D and gldm
_FILTERED_NAMES = [n for n in FEATURE_NAMES if n not in _LEFT_OUT and n.split("_")[0] not in ("shape2D", "gldm")]
_PREPARATION = ("Image-original_Mean", "Image-original_Minimum", "Image-original_Maximum", "Mask-original_VoxelNum",
    "Mask-original_VolumeNum", "Image-interpolated_Mean", "Image-interpolated_Minimum", "Image-interpolated_Maximum",
    "Mask-interpolated_VoxelNum", "Mask-interpolated_VolumeNum", "Mask-interpolated_Mean",
    "Mask-interpolated_Minimum", "Mask-interpolated_Maximum")  # fmt: skip
FEATURE_NAMES_V1 = (
    *(f"diagnostics_{name}" for name in _PREPARATION),
    *(name if kind == "original" else f"{kind}_{name}" for kind in FILTERED for name in _FILTERED_NAMES),
)


def radiomic_features(images):
    """The 102 features (N, 102), float64, of pyradiomics' defaults, as FRD v0 uses them; `FEATURE_NAMES` names them.

    Images (N, C, H, W): uint8, or floats in [-1, 1], which are rounded to 8 bits as a PNG would; colour becomes
    luminance in grey levels 0 to 255. Grey levels are binned by 25. A constant image gets pyradiomics' conventions
    (0, 1 or 1e6, never NaN). The nine shape features tell only the images' size.
    """
    return _in_parts(_features_v0, _grey(images), len(FEATURE_NAMES))


def radiomic_features_v1(images):
    """The 398 numbers (N, 398), float64, from which frd-score makes v1; `FEATURE_NAMES_V1` names them.

    Images as in `radiomic_features`. Each is scaled to mean 0 and standard deviation 100, halved by cubic splines,
    and 77 features are taken of it and of its four coif1 wavelet bands, grey levels binned by 5; ahead of them stand
    13 numbers on the preparation, which frd-score counts as features. It announces Laplacian-of-Gaussian features
    too, but pyradiomics skips that filter on flat images. A constant image has no scale: its row is NaN.
    """
    return _in_parts(_features_v1, _grey(images), len(FEATURE_NAMES_V1))


def frd_v0(real, synthetic, pooled=True):
    """Fréchet radiomic distance as in Osuala et al. 2024: >= 0, lower is better; unbounded.

    Both sets are images, or rows of `radiomic_features` (N, 102) computed before. Each feature is scaled to
    [0, 7.4567] by the smallest and largest value over both sets (what frd-score does, its joint mode), or with
    pooled=False over each set by itself (its independent mode, which hides shifts of the mean): two different
    numbers. NaN becomes the middle of the range. Biased upwards at small N as every Fréchet distance; neither v1 nor
    any FID compares with it.
    """
    real, synthetic = _rows(real, radiomic_features), _rows(synthetic, radiomic_features)
    both = np.concatenate([real, synthetic])
    scaled = [_to_range(rows, both if pooled else rows) for rows in (real, synthetic)]
    return frechet_distance(*scaled)


def frd_v1(real, synthetic):
    """Fréchet radiomic distance as in Konz et al. 2026: the logarithm of a squared distance, lower is better.

    Both sets are images, or rows of `radiomic_features_v1` (N, 398). Real first: features become z-scores by the real
    set's means and deviations, so it is not symmetric. From minus infinity (equal sets come out far below zero, by
    rounding) upwards. As in frd-score: images with NaN are left out, then features that do not vary among the real
    ones. One difference: where sides are even, three means of wavelet bands are zero but for rounding; frd-score makes
    z-scores of that noise (up to 0.5 % of its number on our phantoms), and here they count as constant. Its paper's
    formula, log of the distance itself, is half of this.
    """
    real, synthetic = _rows(real, radiomic_features_v1), _rows(synthetic, radiomic_features_v1)
    # float32 as frd-score: a feature is constant, and left out, where it is so in float32
    real, synthetic = (rows[~np.isnan(rows).any(1)].astype(np.float32) for rows in (real, synthetic))
    if len(real) < 2 or len(synthetic) < 2:
        raise ValueError("FRD v1 needs at least two real and two synthetic images that are not constant.")
    mean, deviation = real.mean(0), real.std(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        scores = [(rows - mean) / deviation for rows in (real, synthetic)]
        kept = np.all([np.isfinite(rows).all(0) for rows in scores], axis=0)
        return float(np.log(frechet_distance(*(rows[:, kept] for rows in scores))))


def _rows(images, extract):
    """Features: of images, or the rows themselves."""
    array = as_array(images)
    return np.asarray(array, np.float64) if array.ndim == 2 else extract(images)


def _to_range(rows, base):
    """Each column to [0, RANGE_V0] by the extremes of `base`; the middle where it is NaN or does not vary."""
    low, high = np.fmin.reduce(base), np.fmax.reduce(base)  # NaN only where all are
    with np.errstate(invalid="ignore"):
        share = np.where(high > low, (rows - low) / np.where(high > low, high - low, 1), 0.5)
    return RANGE_V0 * np.where(np.isnan(share), 0.5, share)


def _grey(images):
    """Grey levels 0 to 255, float32 (N, H, W)."""
    array = as_array(images)
    if array.dtype != np.uint8:
        array = to_uint8(as_images(images))
    if array.ndim != 4 or array.shape[1] not in (1, 3) or min(array.shape[2:]) < SMALLEST:
        raise ValueError(
            f"Radiomic features need images (N, C, H, W), C 1 or 3, at least {SMALLEST} px a side; not {array.shape}."
        )
    return (array[:, 0] if array.shape[1] == 1 else np.moveaxis(array, 1, -1) @ LUMINANCE).astype(np.float32)


def _in_parts(extract, grey, width):
    """`extract` on a few images at a time, whose pixels fit the cache."""
    step = max(1, PIXELS_AT_ONCE // grey[0].size) if len(grey) else 1
    parts = [extract(grey[start : start + step]) for start in range(0, len(grey), step)]
    return np.concatenate([np.empty((0, width)), *parts])


def _bins(values, inside, width):
    """Grey levels from 1, int (N, H, W); 0 outside. Bins start at multiples of `width`."""
    levels = np.floor(values.astype(np.float64) / width).astype(np.int64)
    levels += 1 - levels[:, inside].min(1)[:, None, None]
    return levels * inside


def _features_v0(grey):
    inside = np.ones(grey.shape[1:], bool)
    inside[0, 0] = False
    levels = _bins(grey, inside, 25)
    found = rectangle_shape(*inside.shape) | first_order(grey[:, inside], levels[:, inside])
    found |= glcm(levels, correlation=True) | glrlm(levels) | gldm(levels) | glszm(levels) | ngtdm(levels)
    return np.stack([np.broadcast_to(found[name], len(grey)) for name in FEATURE_NAMES], 1)


def _features_v1(grey):
    scaled = _standardised(grey)
    usable = np.isfinite(scaled).all((1, 2))
    rows = np.full((len(grey), len(FEATURE_NAMES_V1)), np.nan)
    for i in np.flatnonzero(usable):
        rows[i] = _features_of_one(grey[i], _halved(scaled[i]))
    return rows


def _features_of_one(grey, small):
    """The numbers (398,) of one image: as it is, and scaled and halved."""
    h, w = (side // 2 for side in grey.shape)
    cut = small[:h, :w]  # beyond, at an odd side, stands a line of zeros outside the mask
    prepared = [grey, small, cut]
    mean, low, high = zip(*((np.mean(x, dtype=np.float64), x.min(), x.max()) for x in prepared))
    numbers = [mean[0], low[0], high[0], grey.size - 1, 1, mean[1], low[1], high[1], cut.size, 1]
    bands = np.stack([small, *_wavelets(small)])[:, :h, :w]
    inside = np.ones((h, w), bool)
    levels = _bins(bands, inside, 5)
    found = first_order(bands[:, inside], levels[:, inside], shift=300, pixel_area=4)
    mean_is_noise = np.abs(found["firstorder_Mean"]) < ZERO
    found["firstorder_Mean"] = np.where(mean_is_noise, 0, found["firstorder_Mean"])
    found |= glcm(levels) | glrlm(levels) | glszm(levels) | ngtdm(levels)
    features = np.stack([found[name] for name in _FILTERED_NAMES], 1)
    return np.concatenate([numbers, [mean[2], low[2], high[2]], features.ravel()])


# ---- what v1 does to an image first; SimpleITK 2.5 does it in float64, whatever goes in -----------------------------


def _standardised(grey):
    """Mean 0, standard deviation 100 (N - 1 in the divisor), (N, H, W); not finite if an image is constant."""
    values = grey.astype(np.float64)
    varies = np.ptp(values, (1, 2), keepdims=True) > 0
    deviation = np.where(varies, values.std((1, 2), ddof=1, keepdims=True), 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return 100 * (values - values.mean((1, 2), keepdims=True)) / deviation


def _halved(image):
    """Cubic spline through the pixels (H, W), read between every second pair; an odd side ends in zeros."""
    for axis in (0, 1):
        spline = np.moveaxis(spline_filter1d(image, 3, axis, mode="mirror"), axis, 0)
        n = len(spline)
        padded = np.pad(spline, ((1, 2), (0, 0)), mode="reflect")
        first, second, third, fourth = (padded[k : k + n : 2] for k in range(4))
        half = ((first + fourth) + 23 * (second + third)) / 48
        half[n // 2 :] = 0
        image = np.moveaxis(half, 0, axis)
    return image


def _wavelets(image):
    """Bands LH, HL, HH, LL (h, w) of the undecimated coif1 transform; first letter: along the rows; L: low pass."""
    h, w = image.shape
    even = np.pad(image, ((0, h % 2), (0, w % 2)), mode="wrap")
    across = [_filtered(even, taps, 1) for taps in (LOW_PASS, HIGH_PASS)]
    (low_low, low_high), (high_low, high_high) = ([_filtered(x, t, 0) for t in (LOW_PASS, HIGH_PASS)] for x in across)
    return [band[:h, :w] for band in (low_high, high_low, high_high, low_low)]


def _filtered(image, taps, axis):
    """Periodic convolution, the fourth tap at the pixel itself."""
    return sum(tap * np.roll(image, k - 3, axis) for k, tap in enumerate(taps))
