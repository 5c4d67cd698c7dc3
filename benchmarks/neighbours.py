"""Nearest neighbours, medians and counts within radii: ours against scikit-learn and faiss, in one run.

    python benchmarks/neighbours.py [--quick] [--rounds 3] [--threads 2] [--no-large] > neighbours.json

Three cases: pixels (pGAN's size: 1,000 candidates, 10,000 synthetic images of 36,864 pixels), features (1,000 x 10,000
x 1,280, float32), and large (100,000 synthetic images, read from a file of 3.7 GB in the temporary folder).
Every method runs in a process of its own, rounds interleaved, with a small call first to warm up:

- cpu, wall: seconds, the medians over rounds. Peers get float32 rows, converted outside the clock; ours the pixels.
- extra MB: peak memory (VmHWM) above what the process held before the call with the rows loaded as they lie on disk,
  so the peers' float32 copies count.
- error: the largest relative error of the distances to planted near-copies, against whole-number or float64
  differences. Half the queries have one: one value off by one, noise of one grey level, noise of five.

`scan` is minimum, median, counts within three radii and the nearest hundredth of all pairs from one pass; `nearest` the
minimum alone. Busy machines slow the threads of each method alike, so read the ratios.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

KINDS = ("one value", "noise 1", "noise 5")
GOALS = {"scikit-learn": 0.35, "faiss": 1.0, "error": 1e-6, "extra MB": 1024, "large: peak MB": 4096}
AT_ONCE = 1000  # rows made at one time


# ---- the rows -------------------------------------------------------------------------------------------------------


def write(folder, n, m, dim, kind):
    """queries.npy and reference.npy; every second query lies near a reference row, places known from its index."""
    rng = np.random.default_rng(0)
    queries = draw(rng, n, dim, kind)
    np.save(folder / "queries.npy", queries)
    reference = np.lib.format.open_memmap(folder / "reference.npy", "w+", kind, (m, dim))
    for start in range(0, m, AT_ONCE):
        reference[start : start + AT_ONCE] = draw(rng, min(AT_ONCE, m - start), dim, kind)
    for i, place in planted(n, m):
        reference[place] = near_copy(rng, queries[i], KINDS[i // 2 % 3])
    reference.flush()


def draw(rng, n, dim, kind):
    if kind == "uint8":
        return rng.integers(0, 256, (n, dim), dtype=np.uint8)
    return np.maximum(rng.normal(0.5, 1, (n, dim)), 0).astype(kind)  # rectified, as a network's features are


def near_copy(rng, row, how):
    step = 1 if row.dtype == np.uint8 else 1 / 255
    change = np.zeros(len(row))
    if how == "one value":
        change[rng.integers(len(row))] = step
    else:
        change = np.rint(rng.normal(0, float(how.split()[1]), len(row))) * step
    moved = row + change
    if row.dtype == np.uint8:
        moved = np.where((moved < 0) | (moved > 255), row - change, moved)
    return moved.astype(row.dtype)


def planted(n, m):
    """(query, reference row) of each near-copy."""
    return [(i, (7919 * i) % m) for i in range(0, n, 2)]


def exact(queries, reference):
    """Distances of the planted pairs from their differences."""
    pairs = planted(len(queries), len(reference))
    return np.array([np.linalg.norm(queries[i].astype(np.float64) - reference[j]) for i, j in pairs])


# ---- the methods: rows to distances (N,) of the nearest; each makes a function that is timed ------------------------


def ours_nearest(queries, reference):
    from lookalike.metrics.neighbours import nearest

    return lambda: nearest(queries, reference)[0]


def ours_scan(queries, reference):
    from lookalike.metrics.neighbours import scan

    typical = np.linalg.norm(queries[1].astype(np.float64) - reference[1])
    settings = {"median": True, "radii": typical * np.array([0.1, 0.95, 1.0]), "share": 0.01}
    return lambda: scan(queries, reference, **settings).distances[:, 0]


def scikit_learn(queries, reference):
    from sklearn.neighbors import NearestNeighbors

    queries, reference = floats(queries), floats(reference)
    return lambda: NearestNeighbors(n_neighbors=1, algorithm="brute").fit(reference).kneighbors(queries)[0][:, 0]


def scikit_learn_argmin(queries, reference):
    from sklearn.metrics import pairwise_distances_argmin_min

    queries, reference = floats(queries), floats(reference)
    return lambda: pairwise_distances_argmin_min(queries, reference)[1]


def faiss_index(queries, reference):
    import faiss

    queries, reference = floats(queries), floats(reference)

    def search():
        index = faiss.IndexFlatL2(reference.shape[1])
        index.add(reference)
        return np.sqrt(np.maximum(index.search(queries, 1)[0][:, 0], 0))

    return search


def faiss_knn(queries, reference):
    import faiss

    queries, reference = floats(queries), floats(reference)
    return lambda: np.sqrt(np.maximum(faiss.knn(queries, reference, 1)[0][:, 0], 0))


def floats(rows):
    return np.ascontiguousarray(rows, np.float32)


METHODS = {
    "ours: nearest": ours_nearest,
    "ours: scan": ours_scan,
    "scikit-learn: NearestNeighbors": scikit_learn,
    "scikit-learn: argmin_min": scikit_learn_argmin,
    "faiss: IndexFlatL2": faiss_index,
    "faiss: knn": faiss_knn,
}


# ---- one call, in a process of its own ------------------------------------------------------------------------------


def call(folder, method, threads, mapped):
    """Seconds, memory and errors of one call, as JSON on standard output."""
    import torch

    torch.set_num_threads(threads)
    prepare = METHODS[method]
    small = np.load(folder / "queries.npy", mmap_mode="r")[:64]
    prepare(np.array(small), np.array(small[:32]))()  # imports, threads, kernels
    queries = np.load(folder / "queries.npy")
    reference = np.load(folder / "reference.npy", mmap_mode="r" if mapped else None)
    held = status("VmRSS")
    timed = prepare(queries, reference)
    before, wall = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    distances = timed()
    wall, after = time.perf_counter() - wall, resource.getrusage(resource.RUSAGE_SELF)
    peak = status("VmHWM")
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    chosen, truth = distances[::2].astype(np.float64), exact(queries, reference)
    errors = np.abs(chosen - truth) / truth
    found = {"cpu": cpu, "wall": wall, "extra MB": peak - held, "peak MB": peak}
    by_kind = {how: float(errors[i :: len(KINDS)].max()) for i, how in enumerate(KINDS)}
    print(json.dumps(found | {"error": float(errors.max()), "errors": by_kind}))


def status(name):
    """MB from the kernel's account of this process."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


# ---- the run --------------------------------------------------------------------------------------------------------


def measure(methods, size, kind, options, mapped=False, rounds=None):
    """Per method the medians over rounds; memory and errors are the worst of them."""
    runs = {name: [] for name in methods}
    with tempfile.TemporaryDirectory(prefix="neighbours-") as folder:
        write(Path(folder), *size, kind)
        for i in range(rounds or options.rounds):
            for name in [*methods[i % len(methods) :], *methods[: i % len(methods)]]:
                runs[name].append(child(folder, name, options.threads, mapped))
                print(f"  round {i + 1}: {name}: {runs[name][-1]['wall']:.2f} s", file=sys.stderr, flush=True)
    return {name: summary(found) for name, found in runs.items()}


def child(folder, name, threads, mapped):
    command = [sys.executable, __file__, "--call", folder, name, str(threads), str(int(mapped))]
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    environment = os.environ | {variable: str(threads) for variable in names}
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


def summary(runs):
    found = {key: round(statistics.median(run[key] for run in runs), 3) for key in ("cpu", "wall")}
    found |= {key: round(max(run[key] for run in runs), 1) for key in ("extra MB", "peak MB")}
    errors = {how: max(run["errors"][how] for run in runs) for how in KINDS}
    return found | {"error": max(errors.values()), "errors": errors}


def ratios(name, found):
    """CPU and wall seconds of one of ours over those of each peer's faster way."""
    of = {}
    for peer in ("scikit-learn", "faiss"):
        rivals = [run for rival, run in found.items() if rival.startswith(peer)]
        for clock in ("cpu", "wall"):
            of[f"{clock} of the faster {peer}"] = round(found[name][clock] / min(run[clock] for run in rivals), 3)
    return of


def goals(case, found):
    """Seconds are those of the pass that gives everything; on features we promised only what copies need."""
    worst = max(run["error"] for name, run in found.items() if name.startswith("ours"))
    lines = [goal(f"{case}: error", worst, GOALS["error"])]
    lines.append(goal(f"{case}: extra MB", found["ours: scan"]["extra MB"], GOALS["extra MB"]))
    if case == "pixels":
        for name, ratio in ratios("ours: scan", found).items():
            lines.append(goal(f"{case}: {name}", ratio, GOALS[name.split()[-1]]))
    return lines


def goal(name, value, limit):
    return {"goal": name, "value": value, "limit": limit, "met": value <= limit}


def table(case, found):
    print(f"\n{case:32} {'cpu s':>8} {'wall s':>8} {'extra MB':>9} {'error':>9}", file=sys.stderr)
    for name, run in found.items():
        row = f"{run['cpu']:8.2f} {run['wall']:8.2f} {run['extra MB']:9.0f} {run['error']:9.1e}"
        print(f"{name:32} {row}", file=sys.stderr, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, for a look: the ratios are others")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-large", dest="large", action="store_false")
    parser.add_argument("--call", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.call:
        folder, method, threads, mapped = options.call
        return call(Path(folder), method, int(threads), mapped == "1")
    n, m, dim, many = (100, 1000, 4096, 4000) if options.quick else (1000, 10_000, 36_864, 100_000)
    print(f"{os.cpu_count()} threads in this machine, {options.threads} used", file=sys.stderr)
    found = {"machine's threads": os.cpu_count(), "threads": options.threads, "rounds": options.rounds}
    found |= {"load before": os.getloadavg()[0], "sizes": {}, "cases": {}, "ratios": {}, "goals": []}
    for case, size, kind in (("pixels", (n, m, dim), "uint8"), ("features", (n, m, 1280), "float32")):
        found["sizes"][case] = size
        found["cases"][case] = measure(list(METHODS), size, kind, options)
        table(f"{case} {size}", found["cases"][case])
        ours = [name for name in METHODS if name.startswith("ours")]
        found["ratios"][case] = {name: ratios(name, found["cases"][case]) for name in ours}
        found["goals"] += goals(case, found["cases"][case])
    if options.large:
        found["sizes"]["large"] = (n, many, dim)
        large = measure(["ours: scan"], (n, many, dim), "uint8", options, mapped=True, rounds=1)
        table(f"large {(n, many, dim)}", large)
        found["cases"]["large"] = large
        found["goals"].append(goal("large: error", large["ours: scan"]["error"], GOALS["error"]))
        found["goals"].append(goal("large: peak MB", large["ours: scan"]["peak MB"], GOALS["large: peak MB"]))
    print(json.dumps(found | {"load after": os.getloadavg()[0], "versions": versions()}, indent=1))


def versions():
    import faiss
    import sklearn
    import torch

    known = {"torch": torch.__version__, "scikit-learn": sklearn.__version__, "faiss": faiss.__version__}
    return known | {"numpy": np.__version__, "python": platform.python_version()}


if __name__ == "__main__":
    main()
