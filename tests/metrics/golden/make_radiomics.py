"""Makes radiomics.json: features by pyradiomics 3.0.1 and FRD by frd-score 1.0.1, of phantoms that a seed gives.

    python3.11 -m venv golden && . golden/bin/activate
    pip install "setuptools<70" wheel cython versioneer "numpy<2" SimpleITK PyWavelets pykwalify six scipy
    pip install opencv-python-headless scikit-learn matplotlib pooch pyyaml pillow
    pip install --no-build-isolation pyradiomics==3.0.1
    pip install --no-deps frd-score==1.0.1
    PYTHONPATH=lib python tests/metrics/golden/make_radiomics.py

Needs a C compiler. Not run by the tests. frd-score 1.0.1 gives pyradiomics an all-ones mask for v0, which 3.0.1
refuses; so v0 gets mask files whose first pixel is 0, as frd-score itself does for v1. "v1 without noise" is frd-score
with features below 1e-9 set to zero: means of high-pass bands, which are zero but for rounding.
"""

import hashlib
import json
import logging
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from frd_score import frd
from radiomics import setVerbosity

from lookalike.data import phantoms

# name: (phantom, settings); the tests make the same images from these
IMAGES = {
    "mammography": ("mammography", {"n": 3, "seed": 5, "image_size": 64}),
    "grey28": ("grey28", {"n": 2, "seed": 3}),
    "odd side": ("grey28", {"n": 2, "seed": 4, "image_size": 27}),
    "colour": ("dermoscopy", {"n": 1, "seed": 6, "image_size": 32}),
    "not square": ("stripes", {"shape": [1, 1, 12, 21], "levels": [0, 30, 60, 200]}),
    "two levels": ("stripes", {"shape": [1, 1, 16, 16], "levels": [10, 240]}),
    "constant": ("stripes", {"shape": [1, 1, 16, 16], "levels": [100]}),
}
# v1 fails on a constant image; of the symmetric one, pixels lie on edges of bins and rounding decides
ONLY_V0 = {"constant": ("v0",), "two levels": ("v0",)}
SETS = {
    "real": ("mammography", {"n": 24, "seed": 11, "image_size": 32}),
    "synthetic": ("mammography", {"n": 20, "seed": 12, "image_size": 32}),
    "other": ("grey28", {"n": 24, "seed": 13, "image_size": 32}),
}
PAIRS = [("real", "synthetic"), ("real", "other"), ("other", "synthetic")]
PACKAGES = ["pyradiomics", "frd-score", "numpy", "SimpleITK", "PyWavelets", "scipy"]
HERE = Path(__file__).parent


def make(kind, settings):
    if kind == "stripes":
        n, channels, h, w = settings["shape"]
        row, column = np.mgrid[:h, :w]
        levels = np.array(settings["levels"], np.uint8)
        return np.tile(levels[(row * row + 2 * column) // 5 % len(levels)], (n, channels, 1, 1))
    return getattr(phantoms, kind)(**settings).image_set.images


def write(images, folder):
    """PNG files of the images and of their masks."""
    paths = []
    for i, image in enumerate(images):
        pixels = image[0] if len(image) == 1 else np.moveaxis(image, 0, -1)
        mask = np.full(image.shape[1:], 255, np.uint8)
        mask[0, 0] = 0
        paths.append((str(folder / f"{i:03}.png"), str(folder / f"mask{i:03}.png")))
        sitk.WriteImage(sitk.GetImageFromArray(pixels, isVector=len(image) == 3), paths[-1][0])
        sitk.WriteImage(sitk.GetImageFromArray(mask), paths[-1][1])
    return paths


def features(paths, versions):
    """Per version the names of the features, and their values of each image."""
    names, found = {}, {}
    for name in versions:
        extractor = frd.get_feature_extractor(name)
        rows = []
        for image, mask in paths:
            pair = (image, mask if name == "v0" else None)
            rows.append(frd.process_image_mask_pair(pair, feature_extractor=extractor, frd_version=name)[1])
        names[name] = list(rows[0])
        found[name] = [[float(f"{value:.13g}") for value in row.values()] for row in rows]
    return names, found


def without_noise(*settings, **named):
    rows, *rest = COMPUTE(*settings, **named)
    rows[np.abs(rows) < 1e-9] = 0
    return rows, *rest


COMPUTE = frd.compute_features


def digest(images):
    return hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()[:16]


def distances(real, synthetic):
    images, masks = zip(*(zip(*real), zip(*synthetic)))
    images, masks = [list(i) for i in images], [list(m) for m in masks]
    found = {
        "v0": frd.compute_frd(images, "v0", paths_masks=masks, num_workers=1),
        "v0 independent": frd.compute_frd(images, "v0", paths_masks=masks, norm_ref="independent", num_workers=1),
        "v1": frd.compute_frd(images, "v1", num_workers=1),
    }
    frd.compute_features = without_noise
    found["v1 without noise"] = frd.compute_frd(images, "v1", num_workers=1)
    frd.compute_features = COMPUTE
    return found


def main():
    setVerbosity(60)
    logging.disable(logging.WARNING)
    found = {"versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}}
    with tempfile.TemporaryDirectory() as folder:
        written = {}
        for name, (kind, settings) in (IMAGES | SETS).items():
            place = Path(folder) / name
            place.mkdir()
            written[name] = write(make(kind, settings), place)
        found["images"] = {}
        for name, (kind, settings) in IMAGES.items():
            names, values = features(written[name], ONLY_V0.get(name, ("v0", "v1")))
            found["names"] = found.get("names", {}) | names
            entry = {"phantom": kind, "settings": settings, "sha256": digest(make(kind, settings))}
            found["images"][name] = entry | values
        found["sets"] = {
            name: {"phantom": kind, "settings": settings, "sha256": digest(make(kind, settings))}
            for name, (kind, settings) in SETS.items()
        }
        found["distances"] = [
            {"real": a, "synthetic": b} | {k: float(v) for k, v in distances(written[a], written[b]).items()}
            for a, b in PAIRS
        ]
    (HERE / "radiomics.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    sys.exit(main())
