"""What condensation matches: mean embeddings of random networks (DM), and logits of trained ones (DiM).

Papers: Zhao and Bilen 2023, "Dataset Condensation with Distribution Matching" (DM); Zhao and Bilen 2021, "Dataset
Condensation with Differentiable Siamese Augmentation"; Wang et al. 2023, "DiM: Distilling Dataset into Generative
Model"; baselines of Kanagavelu et al. 2024, MedSynth, Table 1. Chapter: medsynth. Classes are drawn equally often
throughout: the rarest class of the Alzheimer images has 52 of 5,121.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from lookalike.models.attention_gan import (
    critic_loss,
    draw_eps,
    generator_loss,
    gradient_penalty,
    logit_matching,
    mixed_images,
)
from lookalike.models.convnets import ConvNet, build_network
from lookalike.training.likelihood import due
from lookalike.training.medsynth import balanced_rows

SIAMESE = "color_crop_cutout_flip_scale_rotate"  # DM's strategy
CROP, CUTOUT, SCALE, DEGREES = 0.125, 0.5, 1.2, 15.0  # shares of the side; largest factor; largest angle
BRIGHTNESS, SATURATION, CONTRAST = 1.0, 2.0, 0.5
BLACK = -1.0
WGAN_BETAS = (0.0, 0.9)
POINTS = 100  # of a loss curve


# --- augmentation -------------------------------------------------------------------------------------------


def draw_augmentation(n, strategy=SIAMESE, generator=None):
    """One kind of change out of `strategy`, and its strengths for n images: (kind, uniform numbers (n, 4) in [0, 1)).

    n = 1 is siamese: `apply_augmentation` changes every image alike, so that two batches can be compared. strategy:
    names of KINDS joined by "_"; "" changes nothing.
    """
    kinds = [kind for kind in strategy.split("_") if kind]
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ValueError(f"An augmentation is made of {', '.join(KINDS)}, not {unknown[0]!r}.")
    if not kinds:
        return "", torch.zeros(n, 4)
    kind = kinds[int(torch.randint(len(kinds), (), generator=generator))]
    return kind, torch.rand(n, 4, generator=generator)


def apply_augmentation(images, drawn):
    """images (N, C, S, S) in [-1, 1] under a draw of `draw_augmentation`; differentiable. What comes in is black."""
    kind, strengths = drawn
    if not kind:
        return images
    return KINDS[kind](images, strengths.to(images.device).expand(len(images), 4))


def _colour(images, u):
    u = u[:, :, None, None, None] - 0.5
    images = images + BRIGHTNESS * u[:, 0]
    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * (0.5 + u[:, 1]) * SATURATION
    middle = images.mean((1, 2, 3), keepdim=True)
    return middle + (images - middle) * (1 + 2 * CONTRAST * u[:, 2])


def _cutout(images, u):
    side = images.shape[-1]
    hole = round(side * CUTOUT)
    start = (u[:, :2] * (side + 1)).floor() - hole // 2
    line = torch.arange(side, device=images.device)
    rows, columns = ((line >= s[:, None]) & (line < s[:, None] + hole) for s in start.T)
    return torch.where((rows[:, :, None] & columns[:, None])[:, None], BLACK, images)


def _crop(images, u):
    side = images.shape[-1]
    most = int(side * CROP + 0.5)
    moved = (u[:, :2] * (2 * most + 1)).floor() - most
    return _moved(images, _identity(u), 2 * moved / side)


def _flip(images, u):
    return torch.where((u[:, 0] < 0.5)[:, None, None, None], images.flip(3), images)


def _scale(images, u):
    factors = 1 / SCALE + u[:, :2] * (SCALE - 1 / SCALE)
    return _moved(images, torch.diag_embed(factors))


def _rotate(images, u):
    angle = torch.deg2rad((2 * u[:, 0] - 1) * DEGREES)
    c, s = angle.cos(), angle.sin()
    return _moved(images, torch.stack([c, -s, s, c], 1).view(-1, 2, 2))


def _identity(u):
    return torch.eye(2, device=u.device).expand(len(u), 2, 2)


def _moved(images, turns, shifts=None):
    shifts = torch.zeros_like(turns[:, 0]) if shifts is None else shifts
    grid = F.affine_grid(torch.cat([turns, shifts[:, :, None]], 2), list(images.shape), align_corners=False)
    return F.grid_sample(images - BLACK, grid, align_corners=False) + BLACK


KINDS = {"color": _colour, "crop": _crop, "cutout": _cutout, "flip": _flip, "scale": _scale, "rotate": _rotate}


# --- DM -----------------------------------------------------------------------------------------------------


def embedding_loss(embed, real, synthetic, strategy=SIAMESE, generator=None):
    """Squared distance of the mean embeddings of real and synthetic images, summed over classes; a scalar from 0 on.

    real, synthetic: lists of K batches (N_k, C, S, S), one per class. embed: images to (N, D). Both batches of a class
    pass the same augmentation. Gradients go to the synthetic images alone (DM, eq. 6).
    """
    drawn = [draw_augmentation(1, strategy, generator) for _ in real]
    with torch.no_grad():
        wanted = _class_means(embed, real, drawn)
    return (wanted - _class_means(embed, synthetic, drawn)).square().sum()


def _class_means(embed, batches, drawn):
    rows = embed(torch.cat([apply_augmentation(*pair) for pair in zip(batches, drawn)]))
    return torch.stack([part.mean(0) for part in rows.split([len(batch) for batch in batches])])


class Pixels(nn.Module):
    """Images (N, C, S, S) that are learnt themselves; calling it gives them."""

    def __init__(self, images):
        super().__init__()
        self.images = nn.Parameter(images.clone())

    def forward(self):
        return self.images


class Latents(nn.Module):
    """Latents (N, Z) that are learnt behind a frozen conditional generator; calling it gives the images."""

    def __init__(self, generator_net, z, labels):
        super().__init__()
        self.generator = generator_net.eval().requires_grad_(False)
        self.z = nn.Parameter(z.clone())
        self.register_buffer("labels", labels)

    def forward(self):
        return self.generator(self.z, self.labels)


def match_embeddings(
    learnt, labels, images, image_labels, optimizer, *, steps, real_batch=256, width=128, depth=3, strategy=SIAMESE,
    generator=None, checkpoint=None,
):  # fmt: skip
    """DM: `learnt()` (Pixels or Latents) is trained in place on `embedding_loss`, each step in a new random ConvNet.

    labels (M,): classes of the learnt images, in order, each class at least once. images (N, C, S, S) in [-1, 1] with
    image_labels (N,): the real ones, of which a step sees `real_batch` of each class, or all where it has fewer.
    Returns the loss of each step; with a `checkpoint` a killed training goes on to the same bits.
    """
    generator = generator or torch.Generator().manual_seed(0)
    classes = labels.unique().tolist()
    of_class = {k: (image_labels == k).nonzero().flatten() for k in classes}
    mine = {k: (labels == k).nonzero().flatten() for k in classes}
    if empty := [k for k in classes if not len(of_class[k])]:
        raise ValueError(f"There is no real image of class {empty[0]} to match.")
    parts = {"learnt": learnt}, {"optimizer": optimizer}, {"draws": generator}
    state = (checkpoint.load(*parts) if checkpoint else None) or {"step": 0, "loss": []}
    for step in range(state["step"], steps):
        network = ConvNet(images.shape[1], 1, images.shape[-1], width, depth).to(images.device)
        made = learnt()
        real = [images[_some(of_class[k], real_batch, generator)] for k in classes]
        loss = embedding_loss(network.embed, real, [made[mine[k]] for k in classes], strategy, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        state["loss"].append(loss.item())
        state["step"] = step + 1
        if checkpoint and due(step + 1, steps):
            checkpoint.save(*parts, state)
    return state["loss"]


def thinned(losses, points=POINTS):
    """A curve of at most `points` numbers: means of equal stretches of `losses`."""
    parts = torch.tensor(losses, dtype=torch.float64).tensor_split(min(points, len(losses))) if losses else []
    return [float(part.mean()) for part in parts]


def _some(rows, most, generator):
    return rows[torch.randperm(len(rows), generator=generator)[:most]]


# --- DiM ----------------------------------------------------------------------------------------------------


def train_dim(
    generator_net, critic, images, labels, *, epochs=150, match_epochs=100, batch_size=64, lr=1e-4, match_lr=5e-6,
    match_weight=0.01, match_batches=16, n_critic=1, penalty=10.0, networks=("convnet3", "resnet10", "resnet18"),
    network_lr=0.01, width=128, depth=3, strategy="", generator=None, checkpoint=None,
):  # fmt: skip
    """DiM: a conditional WGAN-GP with class heads for `epochs`, then `match_epochs` with `logit_matching` beside it.

    images (N, C, S, S) in [-1, 1], labels (N,). An epoch is ceil(N / batch_size) generator steps, each after `n_critic`
    of the critic's. Each matching epoch draws one of `networks` at random, untrained, and trains it for `match_batches`
    real batches before every generator step; the real and the made batch then have the same classes row by row. Adam,
    betas (0, 0.9); `match_lr` counts in the second phase. strategy: augmentation of both batches (DiM: optional).
    Returns {"critic", "generator", "match": mean loss of each epoch (match: weighted, of each matching epoch),
    "networks": those that were drawn}.
    """
    generator = generator or torch.Generator().manual_seed(0)
    modules = {"generator": generator_net, "critic": critic}
    adam = {name: torch.optim.Adam(net.parameters(), lr, WGAN_BETAS) for name, net in modules.items()}
    parts = modules, adam, {"draws": generator}
    fresh = {"epoch": 0, "critic": [], "generator": [], "match": [], "networks": []}
    state = (checkpoint.load(*parts) if checkpoint else None) or fresh
    shape = {"channels": images.shape[1], "num_classes": generator_net.num_classes, "image_size": images.shape[-1]}
    total, steps = epochs + match_epochs, math.ceil(len(images) / batch_size)

    def batch():
        rows = balanced_rows(labels, batch_size, generator)
        return images[rows], labels[rows]

    for epoch in range(state["epoch"], total):
        matched = None
        if epoch >= epochs:
            name = networks[int(torch.randint(len(networks), (), generator=generator))]
            network = build_network(name, **shape, width=width, depth=depth).to(images.device)
            matched = Matched(network, network_lr, match_batches, match_weight, strategy)
            state["networks"].append(name)
        for one in adam.values():
            one.param_groups[0]["lr"] = lr if matched is None else match_lr
        losses = [_dim_step(modules, adam, batch, n_critic, penalty, matched, generator) for _ in range(steps)]
        for key, values in zip(("critic", "generator", "match"), zip(*losses)):
            if values[0] is not None:
                state[key].append(sum(values) / steps)
        state["epoch"] = epoch + 1
        if checkpoint and due(epoch + 1, total):
            checkpoint.save(*parts, state)
    return {key: value for key, value in state.items() if key != "epoch"}


class Matched:
    """A network that is trained a little before each match, and the weighted difference of log-softmax logits in it."""

    def __init__(self, network, lr, batches, weight, strategy):
        self.network, self.batches, self.weight, self.strategy = network, batches, weight, strategy
        trained = [p for p in network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr, momentum=0.9, weight_decay=5e-4)

    def train(self, batch):
        """`batches` steps on real batches, each drawn by `batch()`."""
        self.network.train()
        for _ in range(self.batches):
            images, labels = batch()
            self.optimizer.zero_grad()
            F.cross_entropy(self.network(images), labels).backward()
            self.optimizer.step()
        self.network.eval()  # batch norm: neither batch's own statistics, so that only the images differ

    def loss(self, real, fake, generator):
        """The weighted loss of a real and a made batch, under one augmentation."""
        drawn = draw_augmentation(1, self.strategy, generator)
        real, fake = apply_augmentation(real, drawn), apply_augmentation(fake, drawn)
        return self.weight * logit_matching(self.network, fake, real, "log_softmax").mean()


def _dim_step(modules, adam, batch, n_critic, penalty, matched, generator):
    """Steps of the critic and one of the generator: losses of critic, generator (without match) and match or None."""
    net, critic = modules["generator"], modules["critic"]
    for _ in range(n_critic):
        real, labels = batch()
        with torch.no_grad():
            fake = net(net.noise(len(labels), generator), labels)
        slope = gradient_penalty(critic, mixed_images(real, fake, draw_eps(real, generator)))
        of_critic = (critic_loss(critic, real, fake, labels, labels) + penalty * slope).mean()
        adam["critic"].zero_grad()
        of_critic.backward()
        adam["critic"].step()
    if matched:
        matched.train(batch)
    real, labels = batch()
    critic.requires_grad_(False)
    fake = net(net.noise(len(labels), generator), labels)
    loss = generator_loss(critic, fake, labels).mean()
    match = matched.loss(real, fake, generator) if matched else None
    adam["generator"].zero_grad()
    (loss if match is None else loss + match).backward()
    adam["generator"].step()
    critic.requires_grad_(True)
    return of_critic.item(), loss.item(), None if match is None else match.item()
