"""Fréchet, KID, precision and the rest from given features: ours against torch-fidelity, torchmetrics and prdc.

    python benchmarks/set_distances.py [--quick] [--rounds 3] > set_distances.json

1,000 real and 1,000 synthetic images with 2,048 rectified float32 features each; one thread; features stand in memory.

- cpu, wall: seconds, medians over rounds that interleave the methods. KID is 100 subsets of 1,000 (everyone's default).
- error: against torch-fidelity (prdc for density and coverage) on the same features in float64, relative; KID with the
  same draws, from sets half again as large as a subset so that draws matter.
- suite: every set distance of ours one after the other, and a class score from 1,000 x 1,000 logits.

A second case, 3,000 x 3,000 with 1,024 features, has more images than dimensions; there is no goal on it.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
import warnings
from contextlib import redirect_stdout
from functools import partial

import numpy as np
import prdc
import torch
import torch_fidelity
import torchmetrics
from threadpoolctl import threadpool_limits
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from lookalike.metrics import distances

GOALS = {"ratio": 1 / 8, "error": 1e-6, "suite": 2.0}
K = 5


def features(seed, n, dim, shift=0.0):
    """Rectified and correlated, with a spectrum that falls, as a network's are."""
    mix = np.random.default_rng(99).normal(size=(dim, dim)) * np.geomspace(1, 0.01, dim) / np.sqrt(dim)
    rows = np.random.default_rng(seed).normal(size=(n, dim)) @ mix + shift
    return np.maximum(rows, 0).astype(np.float32)


# ---- the methods: (real, synthetic) to a number or a dict of numbers ------------------------------------------------


class Given(torch.nn.Module):
    """In Inception's place: what torchmetrics is handed are features already."""

    num_features = 0

    def forward(self, images):
        return images.flatten(1)


def given(dim):
    network = Given()
    network.num_features = dim
    return network


def fidelity_frechet(real, synthetic):
    one, other = (fid_features_to_statistics(torch.from_numpy(rows)) for rows in (real, synthetic))
    return fid_statistics_to_metric(one, other, verbose=False)["frechet_inception_distance"]


def torchmetrics_frechet(real, synthetic):
    metric = FrechetInceptionDistance(feature=given(real.shape[1]))
    metric.update(torch.from_numpy(real), real=True)
    metric.update(torch.from_numpy(synthetic), real=False)
    return metric.compute().item()


def fidelity_kid(real, synthetic, size=1000):
    settings = {"kid_subsets": 100, "kid_subset_size": size, "verbose": False}
    return kid_features_to_metric(torch.from_numpy(real), torch.from_numpy(synthetic), **settings)[
        "kernel_inception_distance_mean"
    ]


def torchmetrics_kid(real, synthetic, size=1000):
    metric = KernelInceptionDistance(feature=given(real.shape[1]), subsets=100, subset_size=size)
    metric.update(torch.from_numpy(real), real=True)
    metric.update(torch.from_numpy(synthetic), real=False)
    return metric.compute()[0].item()


def fidelity_precision(real, synthetic):
    settings = {"prc_neighborhood": K, "prc_batch_size": 10_000, "save_cpu_ram": False, "verbose": False}
    return prc_features_to_metric(torch.from_numpy(synthetic), torch.from_numpy(real), **settings)


def prdc_four(real, synthetic):
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        return prdc.compute_prdc(real, synthetic, K)


def ours_kid(real, synthetic, size=1000):
    return distances.kernel_distance_subsets(real, synthetic, size=size).mean


def suite(real, synthetic):
    """The whole of what a page prints, after features."""
    distances.frechet_distance(real, synthetic)
    distances.kernel_distance(real, synthetic)
    distances.kernel_distance_subsets(real, synthetic, size=min(1000, len(real)))
    distances.precision_recall_density_coverage(real, synthetic, K)
    distances.class_score(synthetic[:, :1000])


def methods(size):
    return {
        "frechet": {
            "ours": distances.frechet_distance,
            "torch-fidelity": fidelity_frechet,
            "torchmetrics": torchmetrics_frechet,
        },
        "kid": {
            "ours": partial(ours_kid, size=size),
            "ours, all pairs": lambda *sets: distances.kernel_distance(*sets).value,
            "torch-fidelity": partial(fidelity_kid, size=size),
            "torchmetrics": partial(torchmetrics_kid, size=size),
        },
        "precision to coverage": {
            "ours": partial(distances.precision_recall_density_coverage, k=K),
            "torch-fidelity, P and R": fidelity_precision,
            "prdc": prdc_four,
        },
        "frechet at infinity": {"ours": lambda *sets: distances.frechet_infinity(*sets).value},
        "suite": {"ours": suite},
    }


# ---- error and seconds ----------------------------------------------------------------------------------------------


def errors(n, dim):
    """Relative errors against torch-fidelity and prdc, all on float64 features."""
    real, synthetic = (features(seed, n, dim, 0.01 * seed).astype(np.float64) for seed in (1, 2))
    four, pair, prdc_pair = (f(real, synthetic) for f in (METRICS_OURS, fidelity_precision, prdc_four))
    size = 2 * n // 3
    off = {
        "frechet": relative(distances.frechet_distance(real, synthetic), fidelity_frechet(real, synthetic)),
        "kid": relative(ours_kid(real, synthetic, size), fidelity_kid(real, synthetic, size)),
    }
    off |= {name: relative(four[name], pair[name]) for name in ("precision", "recall")}
    return off | {name: relative(four[name], prdc_pair[name]) for name in ("density", "coverage")}


METRICS_OURS = partial(distances.precision_recall_density_coverage, k=K)


def relative(value, expected):
    return float(abs(value - expected) / abs(expected))


def measure(n, dim, chosen, rounds):
    """{metric: {method: cpu, wall and value}} of interleaved rounds; the first warms up on small sets."""
    sets = [features(seed, n, dim, 0.01 * seed) for seed in (1, 2)]
    small = [rows[:64, :1100] for rows in sets]
    every = [(metric, name) for metric in chosen for name in chosen[metric]]
    taken = {pair: [] for pair in every}
    for pair in every:
        if pair[0] != "kid":
            chosen[pair[0]][pair[1]](*small)
    for i in range(rounds):
        for metric, name in every[i % len(every) :] + every[: i % len(every)]:
            taken[metric, name].append(seconds(lambda m=metric, n=name: chosen[m][n](*sets)))
    found = {metric: {} for metric in chosen}
    for (metric, name), runs in taken.items():
        cpu, wall = (round(statistics.median(run[j] for run in runs), 3) for j in (0, 1))
        found[metric][name] = {"cpu": cpu, "wall": wall, "value": runs[0][2]}
    return found


def seconds(call):
    cpu, wall = time.process_time(), time.perf_counter()
    value = call()
    return time.process_time() - cpu, time.perf_counter() - wall, value


# ---- the run --------------------------------------------------------------------------------------------------------


def goals(found, off):
    lines = [goal(f"error of {name}", value, GOALS["error"]) for name, value in off.items()]
    for metric in ("frechet", "kid"):
        rivals = [run["cpu"] for name, run in found[metric].items() if not name.startswith("ours")]
        ratio = found[metric]["ours"]["cpu"] / min(rivals)
        lines.append(goal(f"{metric}, cpu of the faster peer", round(ratio, 4), GOALS["ratio"]))
    return [*lines, goal("suite, cpu seconds", found["suite"]["ours"]["cpu"], GOALS["suite"])]


def goal(name, value, limit):
    return {"goal": name, "value": value, "limit": limit, "met": value <= limit}


def table(title, found):
    print(f"\n{title:48} {'cpu s':>8} {'wall s':>8}", file=sys.stderr)
    for metric, runs in found.items():
        for name, run in runs.items():
            print(f"{metric + ': ' + name:48} {run['cpu']:8.3f} {run['wall']:8.3f}", file=sys.stderr, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, for a look: the ratios are others")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")  # torchmetrics talks about its memory
    torch.set_num_threads(1)
    n, dim = (200, 512) if options.quick else (1000, 2048)
    found = {"machine's threads": os.cpu_count(), "threads": 1, "rounds": options.rounds}
    found |= {"load before": os.getloadavg()[0], "cases": {}}
    with threadpool_limits(1):
        off, chosen = errors(n, dim), methods(min(1000, n))
        main_case = measure(n, dim, chosen, options.rounds)
        table(f"{n} x {n}, {dim} features", main_case)
        found["cases"][f"{n} x {n} x {dim}"] = main_case
        more, less = 3 * n, dim // 2
        second = {metric: chosen[metric] for metric in ("frechet", "precision to coverage")}
        found["cases"][f"{more} x {more} x {less}"] = measure(more, less, second, 1)
        table(f"{more} x {more}, {less} features", found["cases"][f"{more} x {more} x {less}"])
    found |= {"error": off, "goals": goals(main_case, off)}
    versions = {"torch-fidelity": torch_fidelity.__version__, "torchmetrics": torchmetrics.__version__}
    versions |= {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()}
    print(json.dumps(found | {"load after": os.getloadavg()[0], "versions": versions}, indent=1))


if __name__ == "__main__":
    main()
