"""Training the AC-GAN of vertebral units, plain as published, with a private discriminator, or for whole spines.

Paper: Sun, Plawinski et al. 2023 (PLOS ONE, 10.1371/journal.pone.0280316), Sec. 6.2, and the authors'
`Train/train_region.py`. Chapter: pgan. The discriminator is also taught the labels of made images, which are drawn from
the training set's own class shares. Those shares are private: under DP-SGD they have to come from elsewhere.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from lookalike.data import datasets
from lookalike.files import write_json
from lookalike.models.acgan import Discriminator, Generator, as_soft, discriminator_loss, generator_loss
from lookalike.privacy.dpsgd import Privacy
from lookalike.privacy.randomness import stream
from lookalike.training.checkpoint import Checkpoint, load_weights, save_weights
from lookalike.training.likelihood import batches, due, keep, mean_loss, report, resume, start_private

BETAS = (0.5, 0.999)
SAMPLING_BATCH = 250
MIXED = 0.5  # share of made units whose condition lies between two classes, where conditions are soft


def train_acgan(
    generator_net, discriminator, images, labels, *, epochs, lr=1e-4, batch_size=32, alpha=1.0, aux="log", soft=False,
    d_per_g=1, shares=None, pair_discriminator=None, shared=0.0, privacy=None, subjects=None, generator=None,
    checkpoint=None,
):  # fmt: skip
    """Adam on images (N, C, S, S) in [-1, 1] and labels (N,); `privacy` makes the discriminator's steps DP-SGD.

    An epoch is ceil(N / batch_size) steps, under `privacy` 1 / sample_rate; the generator takes one step per `d_per_g`.
    shares (K,): class shares of made images; None takes the data's own (Sec. 6.2), which privacy refuses. soft: half of
    the made images are conditioned between two classes, and told as such. `pair_discriminator`, with `subjects`, judges
    two units of one subject stacked as 2C channels; the two made ones share latents as in `spine_latents(shared)`.
    Returns the report of `likelihood.train` with "generator_loss" per epoch and "generator_steps".
    """
    generator = generator or torch.Generator().manual_seed(0)
    if privacy and (shares is None or pair_discriminator):
        raise ValueError("A private training needs public class `shares`, and has no pairs of a subject's units.")
    if not d_per_g >= 1:
        raise ValueError(f"d_per_g must be 1 or more discriminator steps per generator step, not {d_per_g}.")
    if pair_discriminator and subjects is None:
        raise ValueError("Pairs are units of one subject: give `subjects`.")
    modules = {"generator": generator_net, "discriminator": discriminator}
    modules |= {"pair_discriminator": pair_discriminator} if pair_discriminator else {}
    adam = {name: torch.optim.Adam(net.parameters(), lr, BETAS, fused=True) for name, net in modules.items()}
    records = subjects if privacy and privacy.records == "subjects" else None
    private = start_private(discriminator, adam["discriminator"], privacy, images, records, generator, batch_size)
    public = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))
    streams = {"batches": generator, "public": public}
    state = {"generator_loss": [], "steps_taken": 0, "generator_steps": 0} | resume(
        checkpoint, modules, adam, streams, private
    )
    shares = class_shares(labels, generator_net.num_classes) if shares is None else torch.as_tensor(shares)
    partners = _Partners(subjects) if pair_discriminator else None
    for net in modules.values():
        net.train()
    for epoch in range(state["epoch"], epochs):
        losses, told = [], []
        for rows in batches(len(images), batch_size, private, generator):
            wanted = draw_conditions(len(rows), shares, soft, generator).to(images.device)
            with torch.no_grad():
                fake = generator_net(generator_net.noise(len(rows), generator), wanted)
            batch = (images[rows], fake, as_soft(labels[rows], len(shares)), as_soft(wanted, len(shares)))
            if private:
                losses.append(private.step(_loss(alpha, aux), *batch))
            else:
                losses.append(_step(adam["discriminator"], _loss(alpha, aux)(discriminator, *batch)))
            if pair_discriminator:
                pairs = images[rows], images[partners.of(rows, generator)]
                _pair_step(pair_discriminator, adam["pair_discriminator"], generator_net, pairs, shares, shared, public)
            state["steps_taken"] += 1
            if state["steps_taken"] % d_per_g == 0:
                size = round(privacy.expected_batch_size) if private else len(rows)
                wanted = draw_conditions(size, shares, soft, public).to(images.device)
                told.append(_generator_step(modules, adam["generator"], wanted, shared, public, alpha, aux))
                state["generator_steps"] += 1
        state["loss"].append(mean_loss(losses))
        state["generator_loss"].append(mean_loss(told) if told else None)
        state["epoch"] = epoch + 1
        if due(epoch + 1, epochs):
            keep(checkpoint, modules, adam, streams, private, state)
    return report(state, private)


# --- conditions and latents ---------------------------------------------------------------------------------


def class_shares(labels, num_classes):
    """The empirical share of each class, (K,)."""
    counts = torch.bincount(labels.cpu(), minlength=num_classes).double()
    return counts / counts.sum()


def draw_conditions(n, shares, soft=False, generator=None):
    """Labels (n,) by `shares`; soft: conditions (n, K), half of them between two classes, at an even chance how far."""
    labels = (
        torch.multinomial(shares.double(), n, replacement=True, generator=generator) if n else torch.zeros(0).long()
    )
    if not soft:
        return labels
    others = torch.randint(1, len(shares), (n,), generator=generator)
    others = (labels + others) % len(shares)
    mixed = torch.rand(n, generator=generator) < MIXED
    t = (torch.rand(n, generator=generator) * mixed)[:, None]
    return (1 - t) * F.one_hot(labels, len(shares)) + t * F.one_hot(others, len(shares))


def spine_latents(generator_net, spines, units, shared, generator=None):
    """Latents (spines, units, Z), each standard normal; those of a spine correlate by `shared`, 0 to 1."""
    if not 0 <= shared <= 1:
        raise ValueError(f"shared must lie in [0, 1], the correlation of a spine's latents, not {shared}.")
    whose = generator_net.noise(spines, generator)[:, None]
    own = generator_net.noise(spines * units, generator).unflatten(0, (spines, units))
    return math.sqrt(shared) * whose + math.sqrt(1 - shared) * own


@torch.no_grad()
def sample_spines(generator_net, labels, spines, shared, generator=None):
    """Units uint8 (spines, units, C, S, S) of made spines; `labels` (units,) from head down."""
    latents = spine_latents(generator_net, spines, len(labels), shared, generator).flatten(0, 1)
    made = generator_net(latents, labels.repeat(spines).to(latents.device))
    return datasets.to_uint8(made).reshape(spines, len(labels), *made.shape[1:])


# --- stages -------------------------------------------------------------------------------------------------


def train_vertebrae(
    folder, *, data, image_size, width, epochs, seed, samples, split="train", rows=None, lr=1e-4, batch_size=32,
    alpha=1.0, aux="log", condition="one_hot", soft=False, d_per_g=1, shares=None, shared=None, latent_dim=100,
    epsilon=None, delta=None, records="images",
):  # fmt: skip
    """A stage: the AC-GAN on a split of `data`, or on its `rows`, and `samples` images with classes by `shares`.

    `shares` None: the training set's own, as published. `shared`: a number trains for whole spines, with pairs.
    epsilon None: no privacy; else the noise is such that all epochs spend it, for an image or for a subject's all
    images, at `delta` (None: just below 1 / records). Writes networks.json, weights.safetensors (the generator),
    discriminator.safetensors and samples.safetensors to `folder`.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    images = datasets.load(data, split, image_size)
    images = images if rows is None else images.subset(rows)
    shape = {"image_size": images.images.shape[-1], "channels": images.images.shape[1], "width": width}
    shape |= {"num_classes": len(images.classes)}
    only = {"latent_dim": latent_dim, "condition": condition}
    write_json(folder / "networks.json", {"shape": shape, "generator": only})
    nets = Generator(**shape, **only).to(device), Discriminator(**shape).to(device)
    pairs = None if shared is None else Discriminator(**shape | {"channels": 2 * shape["channels"]}).to(device)
    privacy = None if epsilon is None else _specify(epsilon, images, epochs, batch_size, delta, records)
    found = train_acgan(
        *nets, datasets.as_tensor(images).to(device), torch.as_tensor(images.labels).to(device), epochs=epochs, lr=lr,
        batch_size=batch_size, alpha=alpha, aux=aux, soft=soft, d_per_g=d_per_g, shares=shares,
        pair_discriminator=pairs, shared=shared or 0.0, privacy=privacy,
        subjects=images.subjects if pairs or records == "subjects" else None,
        generator=stream(seed, "training"), checkpoint=Checkpoint(folder / "checkpoint"),
    )  # fmt: skip
    save_weights(folder / "weights.safetensors", nets[0])
    save_weights(folder / "discriminator.safetensors", nets[1])
    labels = torch.as_tensor(images.labels)
    wanted = class_shares(labels, len(images.classes)) if shares is None else torch.as_tensor(shares)
    save_file(draw_units(nets[0], wanted, samples, seed), folder / "samples.safetensors")
    return found | {"images": len(images), "weights": [sum(p.numel() for p in net.parameters()) for net in nets]}


def load_networks(folder):
    """The generator and the discriminator that `train_vertebrae` left in `folder`, on the CPU, in evaluation mode."""
    found = json.loads((Path(folder) / "networks.json").read_text("utf-8"))
    nets = Generator(**found["shape"], **found["generator"]), Discriminator(**found["shape"])
    for net, name in zip(nets, ("weights", "discriminator")):
        load_weights(Path(folder) / f"{name}.safetensors", net)
    return tuple(net.eval() for net in nets)


def draw_units(generator_net, shares, samples, seed):
    """Images uint8 (samples, C, S, S) and labels drawn by `shares` (Sec. 6.2), from a seed of their own."""
    generator_net.eval()
    random = stream(seed, "samples")
    device = next(generator_net.parameters()).device
    labels = draw_conditions(samples, shares, generator=random)
    parts = [generator_net.sample(part.to(device), random).cpu() for part in labels.split(SAMPLING_BATCH)]
    images = torch.cat(parts)
    if not torch.isfinite(images).all():
        raise ValueError("The generator's images are not finite: its training diverged; lower lr.")
    return {"images": torch.as_tensor(datasets.to_uint8(images)), "labels": labels}


# --- steps --------------------------------------------------------------------------------------------------


def _loss(alpha, aux):
    def loss(discriminator, real, fake, real_labels, fake_labels):
        return discriminator_loss(discriminator, real, fake, real_labels, fake_labels, alpha, aux)

    return loss


def _step(optimizer, losses):
    optimizer.zero_grad(set_to_none=True)
    losses.mean().backward()
    optimizer.step()
    return losses.detach()


def _generator_step(modules, optimizer, wanted, shared, public, alpha, aux):
    """Judges gather no gradient; a pair's second unit has a condition of its own."""
    judges = [net for name, net in modules.items() if name != "generator"]
    weights = [p.requires_grad_(False) for net in judges for p in net.parameters()]
    made, net = modules["generator"], modules["discriminator"]
    if len(judges) == 1:
        losses = generator_loss(net, made(made.noise(len(wanted), public), wanted), wanted, alpha, aux)
    else:
        z = spine_latents(made, len(wanted), 2, shared, public)
        other = wanted[torch.randperm(len(wanted), generator=public)]
        first, second = made(z[:, 0], wanted), made(z[:, 1], other)
        losses = generator_loss(net, first, wanted, alpha, aux)
        losses = losses + F.softplus(-judges[1](torch.cat([first, second], 1))[0])
    _step(optimizer, losses)
    for p in weights:
        p.requires_grad_(True)
    return losses.detach()


def _pair_step(judge, optimizer, generator_net, real, shares, shared, public):
    """The pair discriminator on two units of each subject and on two made ones that share latents."""
    n = len(real[0])
    conditions = [draw_conditions(n, shares, generator=public).to(real[0].device) for _ in range(2)]
    z = spine_latents(generator_net, n, 2, shared, public)
    with torch.no_grad():
        fake = torch.cat([generator_net(z[:, i], conditions[i]) for i in range(2)], 1)
    source = judge(torch.cat([torch.cat(real, 1), fake]))[0]
    _step(optimizer, F.softplus(-source[:n]) + F.softplus(source[n:]))


class _Partners:
    """For each unit another one of its subject, drawn anew; a subject's only unit is its own partner."""

    def __init__(self, subjects):
        _, owner = np.unique(np.asarray(subjects), return_inverse=True)
        order = np.argsort(owner, kind="stable")
        counts = np.bincount(owner)
        starts = np.cumsum(counts) - counts
        self.order, self.size = torch.as_tensor(order), torch.as_tensor(counts[owner])
        self.start = torch.as_tensor(starts[owner])
        place = np.empty(len(order), int)
        place[order] = np.arange(len(order)) - starts[owner[order]]
        self.place = torch.as_tensor(place)

    def of(self, rows, generator):
        """Rows (n,) of partners."""
        size = self.size[rows]
        step = 1 + (torch.rand(len(rows), generator=generator) * (size - 1).clamp(min=1)).long()
        return self.order[self.start[rows] + (self.place[rows] + step * (size > 1)) % size]


def _specify(epsilon, images, epochs, batch_size, delta, records):
    """The `Privacy` that spends `epsilon` in so many epochs on an ImageSet whose size and subjects are public."""
    rate = 1 / math.ceil(len(images) / batch_size)
    count = len(images) if records == "images" else len(set(images.subjects))
    delta = 1 / (count + 1) if delta is None else delta
    settings = {"expected_batch_size": rate * count, "records": records}
    return Privacy.for_epsilon(epsilon, rate, epochs * round(1 / rate), delta, **settings)
