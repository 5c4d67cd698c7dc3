"""Training of many small shadow models, one by one or all together, and the signals that their losses give.

For LiRA (Carlini et al. 2022, Sec. V) and RMIA (Zarifzadeh et al. 2024, Sec. 3); who trains on what, and the scores,
are in `lookalike.privacy.shadows`. Together is one vmapped step of all models, as in PyTorch's tutorial on model
ensembling. Each model's first weights and batches come from streams of its own, named by its number, so both ways of
training start from the same weights and see the same batches.
"""

from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

from lookalike.metrics import as_images
from lookalike.privacy.randomness import stream

AT_ONCE = 512  # images whose signals are taken in one go


def train_shadows(make_model, loss, images, labels, included, steps, batch_size, lr, seed=0, together=None):
    """Trains one model per row of `included` (S, N) on its own images; returns the models and their losses (S, steps).

    `make_model()` makes one, on the device of its choice; `loss(model, images, labels)` gives one number per image, as
    `vae_loss` does. Adam, epochs laid end to end, each model with weights and batches drawn from a stream of its own.
    together: all in one vmapped step, which pays where starting kernels takes the time. None: on a GPU only; on a CPU
    it took 0.3 of the time at 8 pixels and batches of 10, 1.3 to 1.5 times it at 28 pixels and batches of 32. Noise in
    a loss then comes from one stream, different for each model, so the two ways agree only where a loss draws nothing.
    Models come back in evaluation mode. Layers that update buffers as they train (BatchNorm) cannot go together.
    """
    included = np.asarray(included, bool)
    if included.ndim != 2 or included.shape[1] != len(images):
        raise ValueError(f"included must be (models, {len(images)}), not {included.shape}.")
    if not included.any(1).all():
        raise ValueError("Some model has no image to train on.")
    models = [_made(make_model, seed, s) for s in range(len(included))]
    device = next(models[0].parameters()).device
    data = as_images(images).to(device), torch.as_tensor(np.asarray(labels)).to(device)
    batches = torch.stack(
        [_batches(row, steps, batch_size, stream(seed, f"batches/{s}")) for s, row in enumerate(included)]
    )
    together = device.type == "cuda" if together is None else together
    losses = (_train_together if together else _train_one_by_one)(models, loss, data, batches.to(device), lr, seed)
    return [model.eval() for model in models], losses.cpu().numpy()


def signals(models, loss, images, labels, repeats=1, seed=0):
    """Minus the loss of each image under each model, (S, N), the mean of `repeats` draws of the loss's own noise.

    The draws are the same for every model, so that what differs between models is not their luck.
    """
    return np.stack([_signals(model, loss, images, labels, repeats, seed) for model in models])


def _train_one_by_one(models, loss, data, batches, lr, seed):
    losses = torch.empty(batches.shape[:2])
    for s, model in enumerate(models):
        with _drawing(seed, f"noise/{s}"):
            optimizer = torch.optim.Adam(model.train().parameters(), lr)
            for step, rows in enumerate(batches[s]):
                value = loss(model, *(part[rows] for part in data)).mean()
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                losses[s, step] = value.detach()
    return losses


def _train_together(models, loss, data, batches, lr, seed):
    """One step of all is one vmapped step; Adam works on each number alone, so that stacking changes nothing."""
    wrapped = [_MeanLoss(model.train(), loss) for model in models]
    weights, buffers = stack_module_state(wrapped)
    every = vmap(lambda w, b, *batch: functional_call(wrapped[0], (w, b), batch), randomness="different")
    optimizer, losses = torch.optim.Adam(weights.values(), lr), []
    with _drawing(seed, "noise"):
        for rows in batches.unbind(1):
            values = every(weights, buffers, *(part[rows] for part in data))
            optimizer.zero_grad()
            values.sum().backward()
            optimizer.step()
            losses.append(values.detach())
    with torch.no_grad():
        for s, model in enumerate(wrapped):
            for name, value in [*model.named_parameters(), *model.named_buffers()]:
                value.copy_((weights | buffers)[name][s])
    return torch.stack(losses, 1)


class _MeanLoss(nn.Module):
    """A loss as a module that holds its model, so that functional_call reaches all that the loss asks of the model."""

    def __init__(self, model, loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, images, labels):
        return self.loss(self.model, images, labels).mean()


@torch.no_grad()
def _signals(model, loss, images, labels, repeats, seed):
    device, training = next(model.parameters()).device, model.training
    images, labels = as_images(images), torch.as_tensor(np.asarray(labels))
    size, found = max(1, AT_ONCE // repeats), []
    model.eval()
    with _drawing(seed, "signals"):
        for x, y in zip(images.split(size), labels.split(size)):
            tiled = (part.to(device).repeat_interleave(repeats, 0) for part in (x, y))
            found.append(-loss(model, *tiled).double().view(len(x), repeats).mean(1).cpu())
    model.train(training)
    return torch.cat(found).numpy()


def _batches(row, steps, batch_size, generator):
    """Image numbers (steps, batch_size) of one model: its epochs, each in an order of its own, laid end to end."""
    rows = torch.from_numpy(np.flatnonzero(row))
    epochs = -(-steps * batch_size // len(rows))
    order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(epochs)])
    return rows[order[: steps * batch_size]].view(steps, batch_size)


def _made(make_model, seed, s):
    with _drawing(seed, f"weights/{s}"):
        return make_model()


@contextmanager
def _drawing(seed, purpose):
    """torch's global generators start from a stream of their own, and are put back afterwards."""
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(stream(seed, purpose).initial_seed())
        yield
