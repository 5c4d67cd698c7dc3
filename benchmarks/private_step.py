"""What privacy costs a training step: ours against every mode of Opacus and against the plain step, in one run.

    python benchmarks/private_step.py [--rounds 5] [--cases mnist mcgan] [--no-memory] > private_step.json

Four networks at the size of their papers. Per method:

- gradient: CPU seconds from the batch to the clipped sum of per-record gradients, over those of the plain step (forward
  and backward). Rounds interleave the methods; the figure is the median over rounds. Noise and optimiser are left out.
  CPU seconds are user and system; user alone is beside it, for a machine with cheaper pages or another allocator.
- whole step: the same with noise and Adam (fused), over the plain step with Adam (fused); ours is `PrivateTraining`.
- error: distance of the clipped sum from a loop over single records, over the loop's norm; half the records clipped.
- extra MB: peak memory (VmHWM) of a fresh process that takes two steps, less that of the plain step.

A record of a discriminator is one image, real or made, so that every mode of Opacus can run; what the chapters do (a
record is a real and a made image) is the rows "pairs", against the plain step on the same pairs. Opacus gets its
wrapper once, outside the clock, its own optimizer's clipping, and the mend for channels_last inputs.
"""

import argparse
import copy
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import warnings
from dataclasses import dataclass
from functools import partial

import numpy as np
import opacus
import torch
import torch.nn.functional as F
from opacus.grad_sample import (
    GradSampleModule,
    GradSampleModuleExpandedWeights,
    GradSampleModuleFastGradientClipping,
    register_grad_sampler,
)
from opacus.grad_sample.conv import compute_conv_grad_sample
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from torch import nn

from lookalike.models import gan, mcgan
from lookalike.models.ddpm import ConditionalDDPM, ddpm_loss, draw_diffusion
from lookalike.models.vae import ConditionalVAE, vae_loss
from lookalike.privacy.clipping import clipped_sum
from lookalike.privacy.dpsgd import Privacy, PrivateTraining

CHECKED = 8  # records in the comparison with the loop
RIGHT, OURS_RIGHT = 1e-3, 1e-5  # errors above which a method does not count, and ours misses its goal
LIMITS = {"discriminator": (1.7, 0.5, 0.25), "u-net": (1.9, 0.85, None)}  # of plain, of the best Opacus, of its memory


@dataclass
class Case:
    model: nn.Module
    loss: callable
    batch: tuple
    kind: str = ""
    pairs: bool = False  # a record is a real and a made image: no mode of Opacus but its hooks knows that


# ---- the networks ---------------------------------------------------------------------------------------------------


class MeanVAE(ConditionalVAE):
    """Decodes the mean: draws nothing, so that a loop can repeat it."""

    def forward(self, images, labels):
        mu, logvar = self.encode(images, labels)
        return self.decode(mu, labels), mu, logvar


def judged(model, images, labels, targets):
    """A discriminator's loss on single images (N,): real or made is what `targets` says."""
    return F.binary_cross_entropy_with_logits(model(images, labels), targets, reduction="none")


def uniform(n, size):
    return torch.rand(n, 1, size, size) * 2 - 1


def mnist(n=100):
    batch = uniform(n, 28), torch.arange(n) % 10, (torch.arange(n) % 2).float()
    return Case(gan.Discriminator(), judged, batch, "discriminator")


def mnist_pairs(n=100):
    labels = torch.arange(n) % 10
    batch = uniform(n, 28), uniform(n, 28), labels, labels.flip(0)
    return Case(gan.Discriminator(), gan.discriminator_loss, batch, pairs=True)


def mammography(n=16):
    batch = uniform(n, 128), torch.arange(n) % 2, (torch.arange(n) // 2 % 2).float()
    return Case(mcgan.Discriminator(norm="group"), judged, batch, "discriminator")


def mammography_pairs(n=16):
    labels = torch.arange(n) % 2
    batch = uniform(n, 128), uniform(n, 128), labels, labels.flip(0), mcgan.draw_targets(n)
    return Case(mcgan.Discriminator(norm="group"), mcgan.discriminator_loss, batch, pairs=True)


def ddpm(n=16):
    model, images = ConditionalDDPM(width=64), uniform(n, 28)  # half the paper's width: 1.65 M weights
    return Case(model, ddpm_loss, (images, torch.arange(n) % 10, *draw_diffusion(model, images)), "u-net")


def vae(n=50):
    return Case(MeanVAE(), vae_loss, (uniform(n, 28), torch.arange(n) % 10))


CASES = {
    "mnist": mnist,
    "mnist pairs": mnist_pairs,
    "mcgan": mammography,
    "mcgan pairs": mammography_pairs,
    "ddpm": ddpm,
    "vae": vae,
}


# ---- the methods: each makes a function that takes a step -----------------------------------------------------------


def adam(model):
    return torch.optim.Adam(model.parameters(), 1e-6, (0.5, 0.999), fused=True)


def plain(case, max_grad_norm, whole):
    optimizer = adam(case.model)

    def step():
        case.loss(case.model, *case.batch).mean().backward()
        if whole:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def ours(method, case, max_grad_norm, whole):
    names = {p: name for name, p in case.model.named_parameters()}
    n = len(case.batch[0])
    privacy = Privacy(1.0, 1.0, n, delta=1e-5, max_grad_norm=max_grad_norm)
    private = PrivateTraining(case.model, adam(case.model), privacy, case.batch[0], method=method)
    private.steps = 2**20  # far from the early steps that test themselves; the warm-up round still does

    def gradient():
        gradients, _, _ = clipped_sum(case.model, case.loss, case.batch, max_grad_norm, method)
        return {names[p]: gradient for p, gradient in gradients.items()}

    def step():
        for _ in private.batches(1):  # at a rate of 1 the sample is everything
            private.step(case.loss, *case.batch)

    return step if whole else gradient


WRAPPERS = {
    "hooks": GradSampleModule,
    "functorch": partial(GradSampleModule, force_functorch=True),
    "ew": GradSampleModuleExpandedWeights,
}


def opacus_samples(mode, case, max_grad_norm, whole):
    """Per-record gradients by one of Opacus' three ways, clipped and summed by its optimizer."""
    wrapped = WRAPPERS[mode](case.model, loss_reduction="sum")
    optimizer = opacus_optimizer(DPOptimizer, case, max_grad_norm)

    def step():
        case.loss(wrapped, *case.batch).sum().backward()
        if whole:
            optimizer.step()
        else:
            optimizer.clip_and_accumulate()
        summed = {name: p.summed_grad for name, p in case.model.named_parameters()}
        optimizer.zero_grad(set_to_none=True)
        return summed

    return step


def opacus_ghost(case, max_grad_norm, whole):
    """Norms in a first backward pass, the weighted losses' gradient in a second."""
    wrapped = GradSampleModuleFastGradientClipping(case.model, max_grad_norm=max_grad_norm, loss_reduction="sum")
    optimizer = opacus_optimizer(DPOptimizerFastGradientClipping, case, max_grad_norm)

    def step():
        losses = case.loss(wrapped, *case.batch)
        DPTensorFastGradientClipping(wrapped, optimizer, losses, "sum").backward()
        if whole:
            optimizer.step()
        summed = {name: p.grad for name, p in case.model.named_parameters()}
        optimizer.zero_grad(set_to_none=True)
        return summed

    return step


def opacus_optimizer(kind, case, max_grad_norm):
    return kind(
        adam(case.model), noise_multiplier=1.0, max_grad_norm=max_grad_norm, expected_batch_size=None,
        loss_reduction="sum",
    )  # fmt: skip


METHODS = {
    "plain": plain,
    "bookkeeping": partial(ours, "bookkeeping"),
    "vmap": partial(ours, "vmap"),
    "opacus hooks": partial(opacus_samples, "hooks"),
    "opacus ghost": opacus_ghost,
    "opacus functorch": partial(opacus_samples, "functorch"),
    "opacus ew": partial(opacus_samples, "ew"),
}
WHOLE = ("bookkeeping", "opacus hooks", "opacus ghost")  # methods whose whole step is timed as well
IN_PAIRS = ("bookkeeping", "vmap")


def mend():
    """Opacus 1.6 reads convolution inputs as if contiguous and is silently wrong on channels_last."""

    @register_grad_sampler([nn.Conv2d])
    def contiguous(layer, activations, backprops):
        return compute_conv_grad_sample(layer, [activations[0].contiguous()], backprops.contiguous())


def build(name, case, max_grad_norm=1.0, whole=False):
    """A step on a network of its own: Opacus leaves its hooks in what it wraps."""
    own = Case(copy.deepcopy(case.model), case.loss, case.batch)
    return METHODS[name](own, max_grad_norm, whole)


# ---- error ----------------------------------------------------------------------------------------------------------


def errors(case, names):
    """Per method the error against a loop over single records, or the sentence with which it refuses the network."""
    quiet = Case(copy.deepcopy(case.model), case.loss, tuple(t[:CHECKED] for t in case.batch))
    for layer in quiet.model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0  # a loop would draw other masks
    expected, limit = loop(quiet)
    scale = sum(g.square().sum() for g in expected.values()).sqrt()
    found = {}
    for name in names:
        try:
            summed = build(name, quiet, limit)()
            found[name] = float(sum((summed[k] - g).square().sum() for k, g in expected.items()).sqrt() / scale)
        except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError) as error:
            found[name] = f"refuses: {str(error).splitlines()[0][:120]}"
    return found


def loop(case):
    """Clipped sum by name, in float64, and the max_grad_norm used: the records' median norm."""
    weights = dict(case.model.named_parameters())

    def gradient(i):
        losses = case.loss(case.model, *(t[i : i + 1] for t in case.batch))
        return dict(zip(weights, torch.autograd.grad(losses.sum(), weights.values())))

    records = range(len(case.batch[0]))
    norms = torch.stack([sum(g.double().square().sum() for g in gradient(i).values()).sqrt() for i in records])
    limit = norms.median().item()
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in weights.items()}
    for i in records:
        for name, g in gradient(i).items():
            total[name] += g * float(min(1.0, limit / norms[i]))
    return total, limit


# ---- seconds --------------------------------------------------------------------------------------------------------


def ratios(case, names, rounds, whole):
    """Medians over rounds of CPU seconds, and of their user part, over the plain step's; and the plain step's CPU."""
    steps = {name: build(name, case, whole=whole) for name in names if name != "plain"}
    basis = build("plain", case, whole=whole)
    of_cpu, of_user, base = {name: [] for name in steps}, {name: [] for name in steps}, []
    for i in range(rounds + 1):
        order = list(steps)[i % len(steps) :] + list(steps)[: i % len(steps)]
        before = seconds(basis)
        taken = {name: seconds(steps[name]) for name in order}
        cpu, user = (before + seconds(basis)) / 2
        if i:  # the first round warms up
            base.append(float(cpu))
            for name in steps:
                of_cpu[name].append(taken[name][0] / cpu)
                of_user[name].append(taken[name][1] / user)
    middle = lambda found: {name: round(float(statistics.median(of)), 3) for name, of in found.items()}  # noqa: E731
    return middle(of_cpu), middle(of_user), round(statistics.median(base), 3)


def seconds(step):
    """CPU and user seconds of a step; the difference is the system's, mostly pages for tensors too large to reuse."""
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF)
    step()
    after = resource.getrusage(resource.RUSAGE_SELF)
    user = after.ru_utime - before.ru_utime
    return np.array([user + after.ru_stime - before.ru_stime, user])


# ---- memory ---------------------------------------------------------------------------------------------------------


def extra_megabytes(case_name, names):
    """Peak memory above the plain step's, each in a process of its own."""
    peaks = {}
    for name in ["plain", *names]:
        command = [sys.executable, __file__, "--peak", case_name, name]
        peaks[name] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {name: round(peaks[name] - peaks["plain"], 1) for name in names}


def peak_megabytes(case_name, name):
    """Two steps in this process, then its high-water mark (getrusage would inherit that of the parent)."""
    step = build(name, CASES[case_name]())
    step(), step()
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))


# ---- the run --------------------------------------------------------------------------------------------------------


def measure(case_name, options):
    torch.manual_seed(0)
    case = CASES[case_name]()
    names = [name for name in options.methods if name != "plain" and (not case.pairs or name in IN_PAIRS)]
    found = {
        "weights": sum(p.numel() for p in case.model.parameters()),
        "batch": len(case.batch[0]),
        "error": errors(case, names),
    }
    names = [name for name in names if isinstance(found["error"][name], float)]
    measured = ratios(case, names, options.rounds, whole=False)
    found["gradient"], found["gradient, user seconds"], found["plain seconds"] = measured
    if not case.pairs:
        whole = [name for name in names if name in WHOLE]
        found["whole step"], _, found["plain seconds with adam"] = ratios(case, whole, options.rounds, whole=True)
        if options.memory:
            found["extra MB"] = extra_megabytes(case_name, names)
    return found | {"goals": goals(case, found)}


def goals(case, found):
    """What we promised of book-keeping here; Opacus is its fastest mode that is right."""
    error, gradient, memory = found["error"], found["gradient"], found.get("extra MB", {})
    ours = gradient.get("bookkeeping")
    if ours is None:
        return []
    lines = [goal("error against the loop", error["bookkeeping"], OURS_RIGHT)]
    if case.kind:
        of_plain, of_opacus, of_memory = LIMITS[case.kind]
        lines.append(goal("times the plain step", ours, of_plain))
        rivals = [gradient[name] for name in gradient if name.startswith("opacus") and error[name] <= RIGHT]
        if rivals:
            lines.append(goal("of the fastest Opacus", round(ours / min(rivals), 3), of_opacus))
        if of_memory and {"bookkeeping", "opacus hooks"} <= set(memory):
            share = round(memory["bookkeeping"] / memory["opacus hooks"], 3)
            lines.append(goal("of the extra memory of Opacus' hooks", share, of_memory))
    return lines


def goal(name, value, limit):
    return {"goal": name, "value": value, "limit": limit, "met": value <= limit}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--peak", nargs=2, metavar=("CASE", "METHOD"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")  # Opacus talks about hooks at every step
    torch.set_num_threads(1)
    mend()
    if options.peak:
        print(peak_megabytes(*options.peak))
        return
    found = {"rounds": options.rounds, "load before": os.getloadavg()[0], "cases": {}}
    for name in options.cases:
        print(name, file=sys.stderr, flush=True)
        found["cases"][name] = measure(name, options)
    versions = {"torch": torch.__version__, "opacus": opacus.__version__, "python": platform.python_version()}
    print(json.dumps(found | {"load after": os.getloadavg()[0], "versions": versions}, indent=1))


if __name__ == "__main__":
    main()
