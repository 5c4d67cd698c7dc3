"""What a map of images costs: `fit_umap` against the default call of umap-learn, in one run.

    python benchmarks/embeddings.py [--n 1000] [--full] [--new 500] > embeddings.json

Phantoms of vertebrae, 9 x 64 x 64 = 36,864 numbers an image as in pGAN; --full takes its 5,000 images. One thread.
Wall and CPU seconds of fitting on the real images and of placing new ones; the goal is on CPU seconds of the fit, since
other programs stretch the wall's. Both sides compile before the clock starts. Trustworthiness (scikit-learn, 5
neighbours, in pixels) says how far neighbours on the map are neighbours among the images: 0 to 1, higher is better.
"""

import os

os.environ.update({name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")})

import argparse
import json
import platform
import sys
import time
import warnings
from functools import partial

import numba
import numpy as np
import torch
import umap
from sklearn.manifold import trustworthiness

from lookalike.data import phantoms
from lookalike.metrics.diversity import fit_umap
from lookalike.metrics.neighbours import scan

NEIGHBOURS, MIN_DIST = 20, 0.0
RATIO, LOST = 0.2, 0.005  # of the default call's CPU seconds; trustworthiness that may be lost


def default(rows, **settings):
    return umap.UMAP(NEIGHBOURS, min_dist=MIN_DIST, random_state=0, **settings).fit(rows.astype(np.float32))


def ours(rows):
    return fit_umap(rows, NEIGHBOURS, MIN_DIST)


METHODS = {"default": default, "ours": ours}


def place(fitted, rows):
    return fitted.transform(rows if hasattr(fitted, "points") else rows.astype(np.float32))


def compile_both():
    """All that numba compiles: ours, umap-learn below 4,096 images, and above with its approximate neighbours."""
    rows = np.random.default_rng(0).integers(0, 256, (240, 64)).astype(np.uint8)
    approximate = partial(default, force_approximation_algorithm=True)
    for fit in (*METHODS.values(), approximate):
        place(fit(rows[:200]), rows[200:])


def clock(work, *inputs):
    wall, cpu = time.perf_counter(), time.process_time()
    result = work(*inputs)
    return result, {"wall": round(time.perf_counter() - wall, 2), "cpu": round(time.process_time() - cpu, 2)}


def measure(name, rows, new):
    print(name, file=sys.stderr, flush=True)
    fitted, fit_seconds = clock(METHODS[name], rows)
    points, transform_seconds = clock(place, fitted, new)
    on_map = fitted.points if name == "ours" else fitted.embedding_
    neighbours = trustworthiness(rows.astype(np.float32), on_map, n_neighbors=5)
    return {
        "fit": fit_seconds,
        "transform": transform_seconds,
        "trustworthiness": round(float(neighbours), 4),
        "new images beside their nearest real one": round(beside(rows, new, on_map, points), 4),
    }


def beside(rows, new, on_map, points):
    """Share of new images whose 20 nearest real ones on the map hold their nearest real one in pixels."""
    nearest = scan(new, rows).indices
    near = scan(points.astype(np.float32), np.ascontiguousarray(on_map), k=NEIGHBOURS).indices
    return float((near == nearest).any(1).mean())


def goal(name, value, limit, met):
    return {"goal": name, "value": round(value, 4), "limit": limit, "met": met}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=1000, help="real images")
    parser.add_argument("--new", type=int, default=500, help="images that are placed afterwards")
    parser.add_argument("--full", action="store_true", help="5,000 real images")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="n_jobs value")
    torch.set_num_threads(1)
    n = 5000 if options.full else options.n
    rows = phantoms.vertebrae(n, seed=0).image_set.images.reshape(n, -1)
    new = phantoms.vertebrae(options.new, seed=1).image_set.images.reshape(options.new, -1)
    compile_both()
    found = {"real": n, "new": options.new, "numbers an image": rows.shape[1], "load before": os.getloadavg()[0]}
    found |= {name: measure(name, rows, new) for name in METHODS}
    ratio = found["ours"]["fit"]["cpu"] / found["default"]["fit"]["cpu"]
    lost = found["default"]["trustworthiness"] - found["ours"]["trustworthiness"]
    found["goals"] = [
        goal("of the default fit's CPU seconds", ratio, RATIO, ratio <= RATIO),
        goal("trustworthiness lost", lost, LOST, lost <= LOST),
    ]
    found["of the default transform's CPU seconds"] = round(
        found["ours"]["transform"]["cpu"] / found["default"]["transform"]["cpu"], 3
    )
    versions = {"umap-learn": umap.__version__, "numba": numba.__version__, "python": platform.python_version()}
    print(json.dumps(found | {"load after": os.getloadavg()[0], "versions": versions}, indent=1))


if __name__ == "__main__":
    main()
