"""Training MedSynth: a GAN whose generator mixes its input by a mask, then fine-tuning it to match a ViT's logits.

Paper: Kanagavelu et al. 2024, MedSynth, Sec. 3 and 4.2. Chapter: medsynth. No code was published; learning rates, class
heads and logit matching follow DiM, the mask's regularisers ADESyn, both from their description. The paper does not say
what the generator reads when it makes images. Here that is a setting, `source`: "real" (Eq. 1 as written; a = 1 then
gives the patient's image itself), "noise", or "other", images of the site that receives the model.
"""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from lookalike.data import datasets
from lookalike.files import write_json
from lookalike.metrics.classifiers import probabilities
from lookalike.metrics.scores import measure
from lookalike.models.attention_gan import (
    Critic,
    Generator,
    critic_loss,
    draw_eps,
    generator_loss,
    gradient_penalty,
    logit_matching,
    mixed_images,
    total_variation,
)
from lookalike.models.convnets import build_network
from lookalike.models.vits import RANK, add_lora, based_vit, named_vit, pretrained_vit, small_vit
from lookalike.privacy.randomness import stream
from lookalike.training.checkpoint import Checkpoint, load_weights, save_weights
from lookalike.training.likelihood import batches, due, keep, mean_loss, report, resume, start_private
from lookalike.training.masses import specify

SOURCES = ("noise", "real", "other")
BETAS = (0.0, 0.9)  # DiM's Adam; the paper's "momentum 0.9" is the flag of DiM's SGD
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4  # of the ViT's SGD, for which the paper's rate of 0.01 is a usual one
SAMPLING_BATCH = 100
HISTORY = ("generator_loss", "mask", "change", "gap", "match")


@dataclasses.dataclass(frozen=True)
class Objective:
    """What the two networks minimise (Eq. 2 to 5).

    penalty_weight: lambda_GP. as_printed: Eq. 2 and 3 to the letter (a mixture off the segment, an eps per pixel, the
    squared slope squared, and the critic's loss for the generator), to show what they do. Mask terms, 0 as the paper
    prints: mask_penalty x mean(a), total_variation x the sum of the mask's steps, reconstruction x mean(|s - x| (1 -
    a)); ADESyn has 0.1, 1e-5 and 10. match_weight x L_n + L_g is phase II; Eq. 5 writes L_n + lambda L_g, so lambda is
    1 / match_weight (to Adam the common factor is nothing), and DiM's is 0.01 with match_form "log_softmax".
    """

    penalty_weight: float = 10.0
    class_weight: float = 1.0
    as_printed: bool = False
    mask_penalty: float = 0.0
    total_variation: float = 0.0
    reconstruction: float = 0.0
    match_weight: float = 0.0
    match_form: str = "mse"

    def __post_init__(self):
        negative = [f.name for f in dataclasses.fields(self) if f.type is float and not getattr(self, f.name) >= 0]
        if negative:
            raise ValueError(f"{negative[0]} must be 0 or more, not {getattr(self, negative[0])}.")

    def mask_terms(self, x, s, a):
        """The mask's regularisers, per image (N,)."""
        kept = ((s - x).abs() * (1 - a)).mean((1, 2, 3))
        variation = total_variation(a)
        return self.mask_penalty * a.mean((1, 2, 3)) + self.total_variation * variation + self.reconstruction * kept


# --- what the generator reads, and which images a batch has ---------------------------------------------------------


def inputs(source, labels, real=None, other=None, noise=None, generator=None):
    """What the generator reads for labels (N,): x (N, C, S, S) in [-1, 1], on their device.

    "real": `real` (N, C, S, S), whose labels these are. "other": rows of `other` (M, C, S, S), drawn whatever their
    labels, with replacement. "noise": what `noise` (of an `attention_gan.Generator`) draws. `generator`: on the CPU.
    """
    if source not in SOURCES:
        raise ValueError(f"source must be one of {', '.join(SOURCES)}, not {source!r}.")
    if source == "noise":
        return noise(len(labels), generator).to(labels.device)
    if source == "real":
        if real is None or len(real) != len(labels):
            raise ValueError("source 'real' needs `real`, one image per label.")
        return real
    if other is None or not len(other):
        raise ValueError("source 'other' needs `other`, the images of the other site.")
    rows = torch.randint(len(other), (len(labels),), generator=generator)
    return other[rows.to(other.device)].to(labels.device)


def balanced_rows(labels, n, generator=None):
    """Rows (n,) of labels (N,): first a class, each that occurs alike, then one of its rows, with replacement.

    So a class of 52 images counts as much as one of 2,560, and each of its images is seen fifty times as often.
    """
    labels = labels.cpu()
    order = labels.argsort(stable=True)
    counts = torch.unique_consecutive(labels[order], return_counts=True)[1]
    if not len(counts):
        raise ValueError("There are no images to draw from.")
    classes = torch.randint(len(counts), (n,), generator=generator)
    within = (torch.rand(n, dtype=torch.float64, generator=generator) * counts[classes]).long()
    return order[(counts.cumsum(0) - counts)[classes] + within]


# --- the loop -------------------------------------------------------------------------------------------------------


def train_gan(
    generator_net, critic, images, labels, *, source, epochs, other=None, lr=1e-4, batch_size=32, n_critic=5,
    objective=None, classifier=None, balanced=True, privacy=None, subjects=None, critic_bound=2.0, generator=None,
    checkpoint=None,
):  # fmt: skip
    """Adam on images (N, C, S, S) in [-1, 1] and labels (N,), both phases; `classifier`, frozen, makes it phase II.

    An epoch is ceil(N / batch_size) steps of the critic, under `privacy` 1 / sample_rate; the generator takes one per
    `n_critic`. `balanced`: batches with classes alike, see `balanced_rows`; else each image once an epoch.

    `privacy` makes the critic's steps DP-SGD, and the generator learns through the critic alone. It then reads noise
    and uniform labels only: with a real image at its input no epsilon covers what it makes. There is no gradient
    penalty, whose second derivative has no clipped form: instead every weight of the critic is scaled after a step to a
    spectral norm of at most `critic_bound`, which costs no privacy. Batches are Poisson samples, not balanced ones.

    Returns the report of `likelihood.train` with, per epoch, "generator_loss", "mask" (mean a, 1 where x is kept),
    "change" (mean |s - x|, 0 to 2), "gap" (mean F(x) - F(s); None under privacy), "match" (L_n, None in phase I); a
    mean that is not finite is None. Means are over the generator's steps. Beside them "steps_taken", "generator_steps".
    """
    generator = generator or torch.Generator().manual_seed(0)
    objective = objective or Objective()
    _check(generator_net, source, objective, classifier, n_critic, privacy)
    if not privacy:  # a third faster on a CPU; per-sample gradients need the plain order
        generator_net.to(memory_format=torch.channels_last), critic.to(memory_format=torch.channels_last)
    modules = {"generator": generator_net, "critic": critic}
    adam = {name: torch.optim.Adam(net.parameters(), lr, BETAS, fused=True) for name, net in modules.items()}
    private = start_private(critic, adam["critic"], privacy, images, subjects, generator, batch_size)
    public = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))
    streams = {"batches": generator, "public": public}
    fresh = {name: [] for name in HISTORY} | {"steps_taken": 0, "generator_steps": 0}
    state = fresh | resume(checkpoint, modules, adam, streams, private)
    generator_net.train(), critic.train()
    for epoch in range(state["epoch"], epochs):
        losses, told = [], []
        for rows in _batches(labels, batch_size, balanced, private, generator):
            real, wanted = images[rows], labels[rows]
            asked = _uniform_labels(len(rows), generator_net, wanted, generator) if private else wanted
            x = inputs(source, asked, real, other, generator_net.noise, generator)
            with torch.no_grad():
                fake = generator_net(x, asked)[0]
            batch = (real, fake, wanted, asked)
            losses.append(
                private.step(_private_loss(objective), *batch)
                if private
                else _critic_step(critic, adam["critic"], objective, batch, generator)
            )
            if private:
                bound_weights(critic, critic_bound)
            state["steps_taken"] += 1
            if state["steps_taken"] % n_critic == 0:
                if private:
                    asked = _uniform_labels(round(privacy.expected_batch_size), generator_net, labels, public)
                    x, real = inputs(source, asked, noise=generator_net.noise, generator=public), None
                told.append(_generator_step(modules, adam["generator"], objective, classifier, x, asked, real))
                state["generator_steps"] += 1
        state["loss"].append(_finite(mean_loss(losses)))
        for name in HISTORY:
            state[name].append(_mean(told, name))
        state["epoch"] = epoch + 1
        if due(epoch + 1, epochs):
            keep(checkpoint, modules, adam, streams, private, state)
    return report(state, private)


@torch.no_grad()
def bound_weights(critic, bound):
    """Scales every weight matrix of the critic, in place, to a spectral norm of at most `bound`.

    A convolution's is that of its kernel as a matrix (out, in x 9). It reads the weights alone: post-processing.
    """
    if not bound > 0:
        raise ValueError(f"critic_bound must be positive, not {bound}.")
    for weight in (p for p in critic.parameters() if p.ndim > 1):
        flat = weight.flatten(1)
        flat = flat if flat.shape[0] <= flat.shape[1] else flat.T
        largest = torch.linalg.eigvalsh(flat @ flat.T)[-1].clamp_min(0).sqrt()
        weight.mul_((bound / largest.clamp_min(1e-12)).clamp(max=1.0))


def _check(generator_net, source, objective, classifier, n_critic, privacy):
    if source not in SOURCES:
        raise ValueError(f"source must be one of {', '.join(SOURCES)}, not {source!r}.")
    if not n_critic >= 1:
        raise ValueError(f"n_critic must be 1 or more steps of the critic per generator step, not {n_critic}.")
    if source == "noise" and objective.reconstruction:
        raise ValueError("reconstruction draws the image to its input; with source 'noise' that is noise: leave it 0.")
    if bool(objective.match_weight) and classifier is None:
        raise ValueError("match_weight needs a `classifier`, whose logits are matched.")
    if privacy and source != "noise":
        raise ValueError(
            f"A private training reads noise, not source {source!r}: epsilon is the critic's, and covers nothing of an "
            "image that the generator passes on."
        )
    if privacy and (classifier is not None or objective.as_printed):
        raise ValueError("A private training has no classifier that reads real images and no penalty as printed.")


def _batches(labels, batch_size, balanced, private, generator):
    if private or not balanced:
        return batches(len(labels), batch_size, private, generator)
    return (balanced_rows(labels, batch_size, generator) for _ in range(math.ceil(len(labels) / batch_size)))


def _uniform_labels(n, generator_net, like, generator):
    return torch.randint(generator_net.num_classes, (n,), generator=generator).to(like.device)


def _private_loss(objective):
    def loss(critic, real, fake, labels, fake_labels):
        return critic_loss(critic, real, fake, labels, fake_labels, objective.class_weight)

    return loss


def _critic_step(critic, optimizer, objective, batch, generator):
    """Eq. 2 and 3 on a batch; returns the losses with their penalty, per pair."""
    real, fake = batch[:2]
    printed = objective.as_printed
    z = mixed_images(real, fake, draw_eps(real, generator, printed), printed)
    losses = critic_loss(critic, *batch, objective.class_weight)
    losses = losses + objective.penalty_weight * gradient_penalty(critic, z, printed)
    _step(optimizer, losses)
    return losses.detach()


def _generator_step(modules, optimizer, objective, classifier, x, labels, real):
    """One step on inputs x; per image: its loss, what the mask keeps and the change, and where `real` is, the rest."""
    critic = modules["critic"]
    weights = [p.requires_grad_(False) for p in critic.parameters()]
    s, a, _ = modules["generator"](x, labels)
    adversarial = generator_loss(critic, s, labels, objective.class_weight, objective.as_printed)
    losses, match = adversarial + objective.mask_terms(x, s, a), None
    if classifier is not None:
        match = logit_matching(classifier, s, real, objective.match_form)
        losses = losses + objective.match_weight * match
    _step(optimizer, losses)
    for p in weights:
        p.requires_grad_(True)
    found = {"generator_loss": losses, "mask": a.mean((1, 2, 3)), "change": (s - x).abs().mean((1, 2, 3))}
    found["match"] = match
    with torch.no_grad():
        found["gap"] = None if real is None else critic(real)[0] - critic(s)[0]
    return {name: value.detach() for name, value in found.items() if value is not None}


def _step(optimizer, losses):
    optimizer.zero_grad(set_to_none=True)
    losses.mean().backward()
    optimizer.step()


def _mean(told, name):
    """The mean over an epoch's steps of the generator; None where there was none, or none that measured it."""
    values = [one[name] for one in told if name in one]
    return _finite(mean_loss(values)) if values else None


def _finite(value):
    """JSON has no NaN: a training that diverged has no mean."""
    return value if value is not None and math.isfinite(value) else None


# --- the classifier of phase II -------------------------------------------------------------------------------------


def fit_vit(vit, images, labels, optimizer, *, epochs, batch_size=32, generator=None, checkpoint=None):
    """Cross entropy on batches with classes alike; returns the mean loss of each epoch. Resumes to the same weights."""
    generator = generator or torch.Generator().manual_seed(0)
    state = resume(checkpoint, {"vit": vit}, {"optimizer": optimizer}, {"batches": generator}, None)
    vit.train()
    for epoch in range(state["epoch"], epochs):
        losses = []
        for rows in _batches(labels, batch_size, True, None, generator):
            told = F.cross_entropy(vit(images[rows]), labels[rows], reduction="none")
            _step(optimizer, told)
            losses.append(told.detach())
        state["loss"].append(_finite(mean_loss(losses)))
        state["epoch"] = epoch + 1
        if due(epoch + 1, epochs):
            keep(checkpoint, {"vit": vit}, {"optimizer": optimizer}, {"batches": generator}, None, state)
    return state["loss"]


def train_vit(
    folder, *, data, image_size, epochs, seed, name="vit_base_patch16_224", weights=None, small=None, base=None,
    base_epochs=0, base_lr=1e-3, lr=0.01, batch_size=32, rank=RANK, split="train", rows=None, test_split="test",
):  # fmt: skip
    """A stage: a ViT with LoRA on a split of `data`, or on its `rows` (Sec. 3.2), to be frozen in phase II.

    weights: a file for timm's `name`, which then reads images of `image_size`. Without it, `small` (settings of
    `models.vits.small_vit`) is trained from scratch on the same images for `base_epochs` by Adam, then given LoRA; with
    `base`, a folder of such a stage on other data, its small ViT is taken instead, and its head starts at random. LoRA
    and head: SGD. rank 0: no LoRA, the same SGD trains all weights. epochs 0: the base alone.

    Writes networks.json, base.safetensors (small alone, before LoRA), weights.safetensors, and scores.safetensors to
    `folder`. Gives losses per epoch, the counts of trained and of all weights, and "test", see `_tested`.
    """
    if sum(given is not None for given in (weights, small, base)) != 1:
        raise ValueError(
            "Give `weights`, a file, or `small`, settings of a small ViT to train, or `base`, the folder of one."
        )
    if small is not None and base_epochs < 1:
        raise ValueError("A small ViT has to be trained before LoRA: base_epochs must be 1 or more.")
    device = _device()
    torch.manual_seed(seed)
    images = _load(data, split, image_size, rows)
    x, y, classes = datasets.as_tensor(images).to(device), torch.as_tensor(images.labels).to(device), images.classes
    how, base_loss = {"batch_size": batch_size}, []
    if weights is not None:
        vit = pretrained_vit(name, len(classes), image_size, weights).to(device)
    elif base is not None:
        small = json.loads((Path(base) / "networks.json").read_text("utf-8"))["small"]
        vit = based_vit(Path(base) / "base.safetensors", len(classes), image_size, small).to(device)
    else:
        vit = small_vit(len(classes), image_size, **small).to(device)
        adam = torch.optim.Adam(vit.parameters(), base_lr, fused=True)
        base_loss = fit_vit(
            vit, x, y, adam, epochs=base_epochs, generator=stream(seed, "base"),
            checkpoint=Checkpoint(folder / "checkpoint_base"), **how,
        )  # fmt: skip
    if small is not None:
        save_weights(folder / "base.safetensors", vit)
    if rank:
        vit = add_lora(vit, rank).to(device)
    trained = [p for p in vit.parameters() if p.requires_grad]
    sgd = torch.optim.SGD(trained, lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    loss = fit_vit(
        vit, x, y, sgd, epochs=epochs, generator=stream(seed, "training"), checkpoint=Checkpoint(folder / "checkpoint"),
        **how,
    )  # fmt: skip
    write_json(folder / "networks.json", {
        "name": name, "small": small, "num_classes": len(classes), "image_size": image_size, "rank": rank,
    })  # fmt: skip
    save_weights(folder / "weights.safetensors", vit)
    origin = name if weights is not None else f"small ViT trained {'on other data' if base else 'from scratch'}"
    return {
        "network": origin + (f", then LoRA of rank {rank}" if rank else ", then all weights"),
        "images": len(images), "loss": loss, "base_loss": base_loss,
        "trained": sum(p.numel() for p in trained), "weights": sum(p.numel() for p in vit.parameters()),
        "test": _tested(folder, vit, data, test_split, image_size),
    }  # fmt: skip


def train_convnet(
    folder, *, data, image_size, epochs, seed, network="convnet3", width=128, depth=3, lr=0.01, batch_size=32,
    split="train", rows=None, test_split="test",
):  # fmt: skip
    """A stage: one of `models.convnets.NETWORKS` from scratch in the ViT's place, by the same SGD and batches.

    Writes and gives what `train_vit` does, but for the base.
    """
    device = _device()
    torch.manual_seed(seed)
    images = _load(data, split, image_size, rows)
    shape = {"channels": images.images.shape[1], "num_classes": len(images.classes), "image_size": image_size}
    own = {"network": network, "width": width, "depth": depth}
    net = build_network(network, **shape, width=width, depth=depth).to(device)
    sgd = torch.optim.SGD(net.parameters(), lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    loss = fit_vit(
        net, datasets.as_tensor(images).to(device), torch.as_tensor(images.labels).to(device), sgd, epochs=epochs,
        batch_size=batch_size, generator=stream(seed, "training"), checkpoint=Checkpoint(folder / "checkpoint"),
    )  # fmt: skip
    write_json(folder / "networks.json", own | shape)
    save_weights(folder / "weights.safetensors", net)
    count = sum(p.numel() for p in net.parameters())
    return {
        "network": network, "images": len(images), "loss": loss, "trained": count, "weights": count,
        "test": _tested(folder, net, data, test_split, image_size),
    }  # fmt: skip


def load_classifier(folder):
    """The network that `train_vit` or `train_convnet` left in `folder`: frozen, on the CPU, in evaluation mode."""
    found = json.loads((Path(folder) / "networks.json").read_text("utf-8"))
    if "network" in found:
        net = build_network(found.pop("network"), **found)
    else:
        size, classes = found["image_size"], found["num_classes"]
        small = found["small"]
        net = named_vit(found["name"], classes, size) if small is None else small_vit(classes, size, **small)
        net = add_lora(net, found["rank"]) if found["rank"] else net
    load_weights(Path(folder) / "weights.safetensors", net)
    return net.eval().requires_grad_(False)


def _tested(folder, network, data, split, image_size):
    """{"auc" (macro, one against the rest), "accuracy", "balanced_accuracy", 0 to 1, higher is better, "images"} on a
    split; None without one. "labels", "units" (whose image, as numbers) and "scores" (N, K) go to scores.safetensors.
    """
    if split is None:
        return None
    test = datasets.load(data, split, image_size)
    scores = probabilities(network, datasets.as_tensor(test)[:, None])
    units = np.unique(test.subjects, return_inverse=True)[1].reshape(-1)
    kept = {"labels": test.labels, "units": units, "scores": scores}
    save_file({name: torch.as_tensor(values) for name, values in kept.items()}, folder / "scores.safetensors")
    found = {name: measure(test.labels, scores, metric=name) for name in ("accuracy", "balanced_accuracy")}
    return {"auc": measure(test.labels, scores, metric="auroc"), **found, "images": len(test)}


# --- stages of the GAN ----------------------------------------------------------------------------------------------


def train_phase_one(
    folder, *, data, image_size, source, epochs, seed, other=None, split="train", rows=None, conv_dim=64, blocks=6,
    attention="residual", noise_cells=0, critic_width=64, lr=1e-4, batch_size=32, n_critic=5, penalty_weight=10.0,
    class_weight=1.0, as_printed=False, mask_penalty=0.0, total_variation=0.0, reconstruction=0.0, balanced=True,
    epsilon=None, delta=None, records="images", critic_bound=2.0,
):  # fmt: skip
    """A stage: the GAN of phase I (Sec. 3.1) on a split of `data`, or on its `rows`.

    other: for source "other", whose images the generator reads, {"data", "split", "rows"} (the last two may be left
    out). epsilon None: no privacy; else the critic's noise is such that all epochs spend it, for an image or, with
    records "subjects", for a subject, at `delta` (None: just below 1 / records). Writes networks.json,
    weights.safetensors (the generator) and critic.safetensors to `folder`; returns what `train_gan` does with "images"
    and the two networks' "weights".
    """
    torch.manual_seed(seed)
    images = _load(data, split, image_size, rows)
    objective = Objective(
        penalty_weight, class_weight, as_printed, mask_penalty, total_variation, reconstruction
    )  # fmt: skip
    shape = {"image_size": image_size, "channels": images.images.shape[1], "num_classes": len(images.classes)}
    own = {"conv_dim": conv_dim, "blocks": blocks, "attention": attention, "noise_cells": noise_cells}
    privacy = None
    if epsilon is not None:
        count = len(images) if records == "images" else len(set(images.subjects))
        privacy = specify(epsilon, images, epochs, batch_size, 1 / (count + 1) if delta is None else delta, records)
    settings = {
        "phase": 1, "data": data, "image_size": image_size, "source": source, "split": split, "rows": _plain(rows),
        "other": other, "epsilon": epsilon, "balanced": balanced, "objective": dataclasses.asdict(objective),
    }  # fmt: skip
    how = {"lr": lr, "batch_size": batch_size, "n_critic": n_critic, "critic_bound": critic_bound, "privacy": privacy}
    how["subjects"] = images.subjects if privacy and records == "subjects" else None
    nets = Generator(**shape, **own), Critic(**shape, width=critic_width)
    found = _train_and_save(folder, nets, images, settings, objective, epochs, seed, how)
    write_json(
        folder / "networks.json",
        {"shape": shape, "generator": own, "critic": {"width": critic_width}, "settings": settings},
    )
    return found


def train_phase_two(
    folder, *, phase_one, classifier, match_weight, epochs, seed, match_form="mse", lr=5e-6, batch_size=64, n_critic=1
):
    """A stage: the GAN in the folder `phase_one` goes on, to match the logits of the `classifier` in a folder of
    `train_vit` or `train_convnet` (Eq. 4-5).

    Data, source and mask terms are phase I's, Adam is fresh, and the critic keeps training at the same rate. See
    `Objective` for `match_weight`, whose inverse is the paper's lambda; 0 is phase I for longer, for comparison. A
    private phase I is refused: matching reads the real images without noise. Writes what `train_phase_one` writes.
    """
    document = json.loads((Path(phase_one) / "networks.json").read_text("utf-8"))
    settings = document["settings"]
    if settings["epsilon"] is not None:
        raise ValueError(
            "Phase II reads the real images without noise (Eq. 4): the epsilon of this phase I would no longer hold."
        )
    torch.manual_seed(seed)
    frozen = load_classifier(classifier).to(_device())
    images = _load(settings["data"], settings["split"], settings["image_size"], settings["rows"])
    objective = Objective(**settings["objective"] | {"match_weight": match_weight, "match_form": match_form})
    settings |= {"phase": 2, "objective": dataclasses.asdict(objective)}
    how = {"lr": lr, "batch_size": batch_size, "n_critic": n_critic, "classifier": frozen}
    found = _train_and_save(folder, load_networks(phase_one), images, settings, objective, epochs, seed, how)
    write_json(folder / "networks.json", document)
    return found | {"lambda": 1 / match_weight if match_weight else None}


def _train_and_save(folder, nets, images, settings, objective, epochs, seed, how):
    device, source = _device(), settings["source"]
    other = _other_images(settings["other"], settings["image_size"])[0] if source == "other" else None
    found = train_gan(
        *(net.to(device) for net in nets), datasets.as_tensor(images).to(device),
        torch.as_tensor(images.labels).to(device), source=source, epochs=epochs,
        other=None if other is None else other.to(device), objective=objective, balanced=settings["balanced"],
        generator=stream(seed, f"phase {settings['phase']}"), checkpoint=Checkpoint(folder / "checkpoint"), **how,
    )  # fmt: skip
    for net, name in zip(nets, ("weights", "critic")):
        save_weights(folder / f"{name}.safetensors", net)
    return found | {"images": len(images), "weights": [sum(p.numel() for p in net.parameters()) for net in nets]}


def load_networks(folder):
    """The generator and the critic that either phase left in `folder`, on the CPU, in evaluation mode."""
    found = json.loads((Path(folder) / "networks.json").read_text("utf-8"))
    nets = Generator(**found["shape"], **found["generator"]), Critic(**found["shape"], **found["critic"])
    for net, name in zip(nets, ("weights", "critic")):
        load_weights(Path(folder) / f"{name}.safetensors", net)
    return tuple(net.eval() for net in nets)


def load_settings(folder):
    """How the networks in `folder` were trained: "phase", "data", "split", "rows" (None: all), "image_size", "source",
    "other", "epsilon" (None: no privacy), "balanced" and "objective".
    """
    return json.loads((Path(folder) / "networks.json").read_text("utf-8"))["settings"]


def make_set(folder, *, trained, data, image_size, ipc, seed, source=None, split="train", rows=None, other=None):
    """A stage: `ipc` images of each class from the generator in the folder `trained`: a fixed set, drawn once.

    source and other: None takes the training's own; "real" reads images of `data`'s split, or of its `rows` (None: the
    rows that it was trained on, where data and split are the training's, else all), each once before any comes again.
    Writes samples.safetensors: images uint8 (K ipc, C, S, S) sorted by class, labels, source_rows, the row in the split
    of the input image (-1 where it was none of them), and with source "other" other_rows, the row in that set. Gives
    "images", "source", "mask" (mean a, 0 to 1), "change" (mean |s - x|, 0 to 2) and "repeated", how many images are
    made from an input that made another one before.
    """
    known = load_settings(trained)
    source, other = source or known["source"], other or known["other"]
    made = load_networks(trained)[0].to(_device())
    if image_size != made.image_size:
        raise ValueError(f"The generator in {trained} makes images of {made.image_size} px, not {image_size}.")
    labels = torch.arange(made.num_classes).repeat_interleave(ipc)
    random = stream(seed, "samples")
    none = torch.full((len(labels),), -1)
    source_rows, other_rows = none, none
    if source == "real":
        pool, source_rows = _real_inputs(known, data, split, image_size, rows, made.num_classes, ipc, random)
        x = pool[source_rows]
    elif source == "other":
        pool, places = _other_images(other, image_size)
        picked = _each_once(len(pool), len(labels), random)
        x, other_rows = pool[picked], places[picked]
    else:
        x = inputs(source, labels, noise=made.noise, generator=random).cpu()
    images, kept, change = _made(made, x, labels)
    tensors = {"images": torch.as_tensor(datasets.to_uint8(images)), "labels": labels, "source_rows": source_rows}
    if source == "other":
        tensors["other_rows"] = other_rows
    save_file(tensors, folder / "samples.safetensors")
    read = torch.maximum(source_rows, other_rows)
    repeated = 0 if source == "noise" else sum(
        len(part) - len(part.unique()) for part in (read.split(ipc) if source == "real" else [read])
    )  # fmt: skip
    return {"images": len(labels), "source": source, "mask": kept, "change": change, "repeated": repeated}


@torch.no_grad()
def _made(generator_net, x, labels):
    """Images (N, C, S, S) on the CPU, the mean mask and the mean change."""
    device = next(generator_net.parameters()).device
    images, masks = [], []
    for some, wanted in zip(x.split(SAMPLING_BATCH), labels.split(SAMPLING_BATCH)):
        s, a, _ = generator_net(some.to(device), wanted.to(device))
        images.append(s.cpu()), masks.append(a.cpu())
    images = torch.cat(images)
    if not torch.isfinite(images).all():
        raise ValueError("The generator's images are not finite: its training diverged; lower lr.")
    return images, float(torch.cat(masks).mean()), float((images - x).abs().mean())


def _real_inputs(known, data, split, image_size, rows, num_classes, ipc, random):
    """The split's images as a tensor, and of each class the rows of `ipc` inputs."""
    whole = datasets.load(data, split, image_size)
    if rows is None and (data, split) == (known["data"], known["split"]):
        rows = known["rows"]
    rows = np.arange(len(whole)) if rows is None else np.asarray(rows)
    parts = []
    for label in range(num_classes):
        own = torch.as_tensor(rows[whole.labels[rows] == label])
        if not len(own):
            raise ValueError(f"{data} has no image of class {label} in these rows of {split} to make one from.")
        parts.append(own[_each_once(len(own), ipc, random)])
    return datasets.as_tensor(whole), torch.cat(parts)


def _each_once(n, wanted, random):
    """Indices (wanted,) below n in random order; all come once before any comes again."""
    times = -(-wanted // n)
    return torch.cat([torch.randperm(n, generator=random) for _ in range(times)])[:wanted]


def _other_images(other, image_size):
    """The other site's images (M, C, S, S) in [-1, 1] and their rows in that split (M,)."""
    if not other or "data" not in other:
        raise ValueError("source 'other' needs `other`: {'data': a set's name, and if need be 'split' and 'rows'}.")
    images = datasets.load(other["data"], other.get("split", "train"), image_size)
    rows = other.get("rows")
    rows = torch.arange(len(images)) if rows is None else torch.as_tensor(rows)
    return datasets.as_tensor(images)[rows], rows


def _load(data, split, image_size, rows):
    images = datasets.load(data, split, image_size)
    return images if rows is None else images.subset(rows)


def _plain(rows):
    return None if rows is None else [int(row) for row in rows]


def _device():
    return "cuda" if torch.cuda.is_available() else "cpu"
