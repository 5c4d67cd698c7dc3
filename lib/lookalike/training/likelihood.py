"""Training by a loss per image: the VAE and the DDPM, with and without DP-SGD.

Paper: Arroyo Galende et al. 2026, "No Free Lunch ...", Sec. 3.1, and the authors' `src/core/trainer.py`. Chapter:
no_free_lunch. Without privacy the published algorithm differs in more than the noise: shuffled batches, the norm of
the *batch* gradient clipped to 1, for the DDPM a learning rate that falls to 0. It is kept so, and the chapter says it.
"""

from dataclasses import asdict
from functools import partial

import torch

from lookalike.models.ddpm import ddpm_loss, draw_diffusion
from lookalike.models.vae import vae_loss
from lookalike.privacy.dpsgd import PrivateTraining, check_batch_size

WARM_UP = 10  # epochs until beta reaches 1; in the code, not in the paper (sheet D17)
CHECKPOINTS = 20  # per training: often enough to lose little, seldom enough to cost nothing


def train_vae(model, images, labels, **settings):
    """Trains a ConditionalVAE; see `train` for settings and result. beta rises from 0 to 1 over ten epochs."""
    return train(model, images, labels, _vae_step_loss, **settings)


def train_ddpm(model, images, labels, **settings):
    """Trains a ConditionalDDPM; see `train`. Without privacy the learning rate falls to 0 over the epochs."""
    return train(model, images, labels, _ddpm_step_loss, decay=True, **settings)


def train(
    model, images, labels, step_loss, *, epochs, lr=1e-4, batch_size=64, decay=False,
    privacy=None, subjects=None, generator=None, checkpoint=None,
):  # fmt: skip
    """Adam on images (N, C, S, S) in [-1, 1] and labels (N,); `privacy` makes it DP-SGD on every weight.

    An epoch is ceil(N / batch_size) steps, under `privacy` 1 / sample_rate: N is private there. `generator` (CPU) draws
    batches, `generator` and torch's global one the rest. `subjects` (N,) says whose each image is, for a privacy whose
    records are subjects. `checkpoint` resumes to the same final weights after a kill (in release mode to others: its
    randomness is not stored). Returns {"loss": mean per epoch, "steps", "epsilon", "privacy": what
    `PrivateTraining.report` says or None, "private_outputs"}: the entries named in private_outputs read the data
    without noise; epsilon does not cover their publication.
    """
    generator = generator or torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    private = start_private(model, optimizer, privacy, images, subjects, generator, batch_size)
    state = resume(checkpoint, {"model": model}, {"adam": optimizer}, {"batches": generator}, private)
    model.train()
    for epoch in range(state["epoch"], epochs):
        if decay and not private:
            optimizer.param_groups[0]["lr"] = lr * (1 - epoch / epochs)
        losses = []
        for rows in batches(len(images), batch_size, private, generator):
            loss, drawn = step_loss(model, images[rows], epoch, generator)
            batch = (images[rows], labels[rows], *drawn)
            losses.append(private.step(loss, *batch) if private else _plain_step(model, optimizer, loss, batch))
        state["loss"].append(mean_loss(losses))
        state["epoch"] = epoch + 1
        if due(epoch + 1, epochs):
            keep(checkpoint, {"model": model}, {"adam": optimizer}, {"batches": generator}, private, state)
    return report(state, private)


def start_private(model, optimizer, privacy, images, subjects, generator, batch_size):
    """The private training of a loop with batches of about `batch_size`; None without `privacy`."""
    if privacy is None:
        return None
    private = PrivateTraining(model, optimizer, privacy, images, subjects, generator)
    check_batch_size(batch_size, privacy.sample_rate, len(images))
    return private


def batches(n, batch_size, private, generator):
    """Row indices for one epoch: shuffled, or 1 / sample_rate draws of the private training."""
    if private:
        return private.batches(round(1 / private.privacy.sample_rate))
    return torch.randperm(n, generator=generator).split(batch_size)


def mean_loss(losses):
    """Mean over the records of an epoch; None where every Poisson batch was empty."""
    losses = torch.cat([one.cpu() for one in losses])
    return float(losses.mean()) if len(losses) else None


def due(epoch, epochs):
    """Whether a checkpoint is written after this epoch."""
    return epoch == epochs or epoch % max(1, epochs // CHECKPOINTS) == 0


def resume(checkpoint, modules, optimizers, generators, private):
    """The state to start from: what the checkpoint holds, else epoch 0; the privacy spent is part of it."""
    state = checkpoint.load(modules, optimizers, _stored(generators, private)) if checkpoint else None
    if state is None:
        return {"epoch": 0, "loss": [], "private_steps": 0}
    if state.pop("privacy", None) != _specification(private):
        raise ValueError(f"{checkpoint.folder} was trained under another privacy: delete it, or go on with the same.")
    if private:
        private.steps = state["private_steps"]
    return state


def keep(checkpoint, modules, optimizers, generators, private, state):
    """Saves the state, if there is somewhere to save it.

    In release mode no random state: the streams move with the batches, and how far would tell their sizes.
    """
    state["private_steps"] = private.steps if private else 0
    if checkpoint:
        stored = _stored(generators, private)
        document = state | {"privacy": _specification(private)}
        checkpoint.save(modules, optimizers, stored, document, global_random=stored == generators)


def _stored(generators, private):
    """Those whose state may lie on disk."""
    hidden = private and private.privacy.mode == "release"
    return {name: one for name, one in generators.items() if name == "public" or not hidden}


def _specification(private):
    return asdict(private.privacy) if private else None


def report(state, private):
    """What every loop returns: the loss per epoch, private steps and their accounted epsilon (None without privacy).

    Beside them what the private training says of itself, and which entries are private outputs.
    """
    history = {k: v for k, v in state.items() if k not in ("epoch", "private_steps")}
    spent = private.report() if private else None
    return history | {
        "steps": private.steps if private else 0,
        "epsilon": spent["epsilon"] if private else None,
        "privacy": spent,
        "private_outputs": ["loss"] if private else [],
    }


def _plain_step(model, optimizer, loss, batch):
    losses = loss(model, *batch)
    optimizer.zero_grad(set_to_none=True)
    losses.mean().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return losses.detach()


def _vae_step_loss(model, images, epoch, generator):
    return partial(vae_loss, beta=min(1.0, epoch / WARM_UP)), ()


def _ddpm_step_loss(model, images, epoch, generator):
    return ddpm_loss, draw_diffusion(model, images, generator)
