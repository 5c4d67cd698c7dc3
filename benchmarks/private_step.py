"""What a private gradient costs against a plain one: ratios of CPU seconds, interleaved in one run.

    python benchmarks/private_step.py [--rounds 3] > private_step.json

For each of the chapter no_free_lunch's networks at paper size: the medians over rounds of (method / plain step), for
book-keeping, Opacus' hooks and whole-model vmap. Optimiser and noise are left out: they are the same for all.
"""

import argparse
import json
import statistics
import time
import warnings

import torch

from lookalike.models.ddpm import ConditionalDDPM, ddpm_loss, draw_diffusion
from lookalike.models.gan import Discriminator, discriminator_loss
from lookalike.models.vae import ConditionalVAE, vae_loss
from lookalike.privacy.clipping import clipped_sum

METHODS = ("bookkeeping", "hooks", "vmap")


def cases(batch):
    """Name, network, loss and batch of each case; the DDPM is a quarter as wide as the paper's."""
    images, labels = torch.rand(batch, 1, 28, 28) * 2 - 1, torch.arange(batch) % 10
    ddpm = ConditionalDDPM(width=32)
    yield "vae 4.3 M", ConditionalVAE(), vae_loss, (images, labels)
    yield "discriminator 1.6 M", Discriminator(), discriminator_loss, (images, -images, labels, labels.flip(0))
    yield "ddpm 0.4 M", ddpm, ddpm_loss, (images, labels, *draw_diffusion(ddpm, images))


def plain(model, loss, batch):
    loss(model, *batch).mean().backward()
    model.zero_grad(set_to_none=True)


def seconds(function, *args):
    """CPU seconds of one call."""
    start = time.process_time()
    function(*args)
    return time.process_time() - start


def measure(model, loss, batch, rounds):
    """Median ratio to the plain step, per method, over interleaved rounds after a warm-up."""
    steps = {"plain": lambda: plain(model, loss, batch)} | {
        name: lambda name=name: clipped_sum(model, loss, batch, 1.0, name) for name in METHODS
    }
    times = [{name: seconds(step) for name, step in steps.items()} for _ in range(rounds + 1)][1:]
    return {name: round(statistics.median(t[name] / t["plain"] for t in times), 2) for name in METHODS}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=50)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")  # Opacus talks about hooks at every step
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ratios = {name: measure(*case, options.rounds) for name, *case in cases(options.batch)}
    print(
        json.dumps({"batch": options.batch, "torch": torch.__version__, "cost against a plain step": ratios}, indent=1)
    )


if __name__ == "__main__":
    main()
