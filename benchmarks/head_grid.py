"""What a private head costs on cached features: ours, stock Opacus, and Opacus' plain loop on images, in one run.

    python benchmarks/head_grid.py [--dim 320] [--epochs 30] [--image-steps 2] > head_grid.json

The row is Real with epsilon 6 (Table 1 of Osuala et al. 2024): 1,104 images, Poisson batches of 123 on average, a
two-layer head, AdamW. Per way CPU seconds per step, the fastest of interleaved rounds, and their ratio to ours:

- ours: `train_head` with everything in it: flips, the engine's self-tests (8 in 30 epochs, 11 in 300), and validation
  after each epoch.
- plain: the same without privacy.
- opacus hooks, opacus ghost: Opacus' make_private in that mode on the same features, validation left out.
- opacus on images: the published loop, a few steps: a batch is flipped, goes through the frozen backbone
  (EfficientNet-Lite0 at 128 px, cut to `dim` features), then through the head by Opacus' hooks.

"grid" is what the 54 trainings of the table take (3 seeds; 280,800 steps), from the times of ours and plain. Features
are random numbers: no step reads their values. CPU seconds on a busy machine are longer than on a free one: see "load".
"""

import argparse
import json
import os
import platform
import sys
import time
import warnings

import opacus
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from lookalike.training.heads import build_head, mass_extractor, specify_privacy, train_head

IMAGES, VALIDATION, BATCH = 1104, 192, 128
STEPS_PER_EPOCH, SYNTHETIC_PER_EPOCH, BOTH_PER_EPOCH, EPOCHS, SEEDS, EPSILONS = 9, 24, 33, 300, 3, 5
GOAL_MINUTES = 5.0  # the grid, on two cores
BACKBONES = {320: "lite0_penultimate", 1280: "efficientnet_lite0"}


def specification():
    return specify_privacy(
        IMAGES, IMAGES, epochs=EPOCHS, batch_size=BATCH, epsilon=6, noise_multiplier=None, delta=1e-4,
        records="images", accountant="rdp",
    )  # fmt: skip


def ours(dim, privacy):
    """A function that trains so many epochs and returns how many steps they were."""
    views, labels = torch.randn(IMAGES, 4, dim), torch.arange(IMAGES) % 2
    validation = torch.randn(VALIDATION, dim), torch.arange(VALIDATION) % 2

    def train(epochs):
        train_head(views, labels, head="two-layer", seed=0, epochs=epochs, privacy=privacy, validation=validation)
        return epochs * STEPS_PER_EPOCH

    return train


def opacus_loop(dim, mode, see=None):
    """Opacus as its tutorial has it; `see(images)` gives features where the data are images."""
    head = build_head("two-layer", dim)
    optimizer = torch.optim.AdamW(head.parameters(), 1e-5, weight_decay=1e-8, fused=True)
    rows = torch.randn(IMAGES, 4, dim) if see is None else torch.rand(IMAGES, 1, 128, 128) * 2 - 1
    loader = DataLoader(TensorDataset(rows, torch.arange(IMAGES) % 2), BATCH, shuffle=True)
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    privacy, engine = specification(), opacus.PrivacyEngine(accountant="rdp")
    made = engine.make_private(
        module=head, optimizer=optimizer, data_loader=loader, noise_multiplier=privacy.noise_multiplier,
        max_grad_norm=1.0, criterion=criterion, grad_sample_mode=mode,
    )  # fmt: skip
    head, optimizer, criterion, loader = made if mode == "ghost" else (made[0], made[1], criterion, made[2])

    def train(epochs, most=sys.maxsize):
        steps = 0
        for _ in range(epochs):
            for batch, labels in loader:
                features = pick(batch) if see is None else see(flipped(batch))
                optimizer.zero_grad()
                criterion(head(features), labels).backward()
                optimizer.step()
                steps += 1
                if steps == most:
                    return steps
        return steps

    return train


def pick(views):
    """One of the views (N, V, D) of each image."""
    return views[torch.arange(len(views)), torch.randint(views.shape[1], (len(views),))]


def flipped(images):
    """Each image mirrored left to right and top to bottom with a chance of one half each."""
    for axis in (2, 3):
        images = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(axis), images)
    return images


def per_step(train, *arguments):
    start = time.process_time()
    steps = train(*arguments)
    return (time.process_time() - start) / steps


def measure(options):
    torch.manual_seed(0)
    ways = {
        "ours": ours(options.dim, specification()), "plain": ours(options.dim, None),
        "opacus hooks": opacus_loop(options.dim, "hooks"), "opacus ghost": opacus_loop(options.dim, "ghost"),
    }  # fmt: skip
    times = {name: [] for name in ways}
    for i in range(options.rounds + 1):
        for name, train in ways.items():
            taken = per_step(train, options.epochs)
            times[name] += [taken] if i else []  # the first round warms up
    times = {name: min(found) for name, found in times.items()}
    if options.image_steps and options.dim in BACKBONES:
        see = mass_extractor(BACKBONES[options.dim], 128)
        train = opacus_loop(options.dim, "hooks", lambda images: see(images).clone())
        times["opacus on images"] = per_step(train, 1, options.image_steps)
    return times


def grid(times):
    """CPU seconds of the table's 54 trainings, and minutes on two cores. Real+Syn's batches are as large as Real's."""
    plain = STEPS_PER_EPOCH + 2 * SYNTHETIC_PER_EPOCH
    private = EPSILONS * (2 * STEPS_PER_EPOCH + BOTH_PER_EPOCH)
    seconds = SEEDS * EPOCHS * (plain * times["plain"] + private * times["ours"])
    minutes = seconds / 120
    return {
        "steps": SEEDS * EPOCHS * (plain + private), "cpu seconds": round(seconds),
        "minutes on two cores": round(minutes, 2), "limit": GOAL_MINUTES, "met": minutes <= GOAL_MINUTES,
    }  # fmt: skip


def speed():
    """GFLOP per CPU second of a matrix product, beside which times of two machines can be read."""
    a = torch.randn(512, 512)
    start = time.process_time()
    for _ in range(30):
        a = F.normalize(a @ a)  # or the numbers grow without end
    return round(30 * 2 * 512**3 / (time.process_time() - start) / 1e9)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=320)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--image-steps", type=int, default=2, help="0 leaves the loop on images out")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")  # Opacus talks about hooks at every step
    torch.set_num_threads(1)
    before, times = os.getloadavg()[0], measure(options)
    ratios = {name: round(taken / times["ours"], 2) for name, taken in times.items()}
    versions = {"torch": torch.__version__, "opacus": opacus.__version__, "python": platform.python_version()}
    found = {
        "dim": options.dim, "ms per step": {name: round(1e3 * taken, 2) for name, taken in times.items()},
        "of ours": ratios, "grid": grid(times), "gflop per cpu second": speed(),
        "load": [before, os.getloadavg()[0]], "versions": versions,
    }  # fmt: skip
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
