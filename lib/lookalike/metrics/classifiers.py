"""Classifiers that measure utility, and their one training loop.

Papers: Arroyo Galende et al. 2026, "No Free Lunch ...", Sec. 4 (the small network and the loop, from the authors'
`src/utility/metrics.py`); Sun et al. 2021, pGAN, Sec. 6.3 (a network by name, from scratch); Osuala et al. 2024,
MCGAN with DP (a head on a frozen backbone, flips). Chapters: no_free_lunch, pgan, mcgan_dp.

Training reads *views*, (N, V, ...): V versions of each image, one of which is drawn anew in every epoch. A frozen
backbone sees an image and its three flips once, (N, 4, D), and a head then trains on exactly what the usual loop, which
flips and extracts in every epoch, would give it. Images as they are have V = 1.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lookalike.metrics import as_array, as_images, to_unit
from lookalike.metrics.extractors import load_weights
from lookalike.metrics.features import Extractor, features
from lookalike.models.gan import trunk


class Classifier(nn.Module):
    """Images (N, C, S, S) in [-1, 1] to logits (N, K): the discriminator's trunk, pooled, and one layer.

    `width` is the channel count of the first convolution (paper: 64).
    """

    def __init__(self, channels=1, num_classes=10, width=64):
        super().__init__()
        self.trunk = trunk(channels, width)
        self.head = nn.Linear(8 * width, num_classes)

    def forward(self, images):
        unit = (images + 1) / 2  # not clamped: standardised images leave [0, 1], as in the paper
        return self.head(self.trunk(unit).mean((2, 3)))


class TimmClassifier(nn.Module):
    """A timm network by name, from images (N, C, H, W) in [-1, 1] to logits (N, K).

    Without `weights` it starts at random and reads C channels. `weights` is a file (.safetensors or .pth) of such a
    network trained on colour photographs: grey images then get three equal channels, pixels are normalised as the
    name's own weights ask for, and only the last layer starts at random. `image_size`: resized to that, bilinear.
    """

    def __init__(self, name, channels, num_classes, image_size=None, weights=None):
        super().__init__()
        import timm  # seconds to import

        if weights is not None and channels not in (1, 3):
            raise ValueError(f"Weights of {name} read 1 or 3 channels; these images have {channels}.")
        self.image_size, self.pretrained = image_size, weights is not None
        self.network = timm.create_model(name, in_chans=3 if self.pretrained else channels, num_classes=num_classes)
        for key in ("mean", "std"):
            value = torch.tensor(self.network.pretrained_cfg[key]).reshape(1, -1, 1, 1)
            self.register_buffer(key, value, persistent=False)
        if self.pretrained:
            _load_all_but_head(self.network, weights)

    def forward(self, images):
        if self.image_size and images.shape[-2:] != (self.image_size, self.image_size):
            size = (self.image_size, self.image_size)
            images = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
        if self.pretrained:
            images = (to_unit(images).expand(-1, 3, -1, -1) - self.mean) / self.std
        return self.network(images)


ADAM = partial(torch.optim.Adam, lr=1e-3, fused=True)


@dataclass(frozen=True)
class Training:
    """How a classifier is trained; the last epoch's weights count unless a validation set chooses.

    `optimizer` makes one from parameters: `partial(torch.optim.SGD, lr=1e-4, momentum=0.9)` (pGAN),
    `partial(torch.optim.AdamW, lr=1e-5, weight_decay=1e-8)` with label_smoothing 0.1 (mcgan_dp).
    """

    epochs: int = 100
    batch_size: int = 64
    optimizer: Callable = ADAM
    label_smoothing: float = 0.0
    device: str = "cpu"


# What stands behind `classifier=`: each says what it reads (`views`, (N, V, ...)) and what it trains (`build`)


@dataclass(frozen=True)
class SmallNetwork:
    """The small network of No Free Lunch, from scratch."""

    width: int = 64
    training: Training = Training()

    @property
    def name(self):
        return f"small network, width {self.width}"

    def views(self, images, training=True):
        return as_images(images)[:, None]

    def build(self, shape, num_classes):
        return Classifier(shape[0], num_classes, self.width)


@dataclass(frozen=True)
class TimmNetwork:
    """`TimmClassifier`, all of it trained: from scratch, or from a weights file."""

    network: str
    weights: str | Path | None = None
    image_size: int | None = None
    training: Training = Training()

    @property
    def name(self):
        return f"{self.network}, {'from scratch' if self.weights is None else Path(self.weights).name}"

    def views(self, images, training=True):
        return as_images(images)[:, None]

    def build(self, shape, num_classes):
        return TimmClassifier(self.network, shape[0], num_classes, self.image_size, self.weights)


@dataclass(frozen=True)
class FrozenBackbone:
    """A head trained on features that are extracted once: linear, or with one hidden layer of `hidden` units.

    flips: each epoch sees each image as it is, mirrored left to right, top to bottom or both, a quarter of the time
    each: what horizontal and vertical flips with a chance of one half give. `cache`: see `features`.
    """

    extractor: Extractor
    hidden: int | None = None
    flips: bool = True
    cache: str | Path | None = None
    training: Training = Training(epochs=300)

    @property
    def name(self):
        head = "linear head" if self.hidden is None else f"head with {self.hidden} hidden units"
        return f"{head} on {self.extractor.name}{', flips' if self.flips else ''}"

    def views(self, images, training=True):
        seen = flip_states(images) if self.flips and training else [as_array(images)]
        rows = [torch.as_tensor(features(state, self.extractor, self.cache)) for state in seen]
        return torch.stack(rows, 1)

    def build(self, shape, num_classes):
        if self.hidden is None:
            return nn.Linear(shape[0], num_classes)
        return nn.Sequential(nn.Linear(shape[0], self.hidden), nn.ReLU(), nn.Linear(self.hidden, num_classes))


def flip_states(images):
    """The images (N, C, H, W) four times: as they are, mirrored left to right, top to bottom, and both."""
    pixels = as_array(images)
    flipped = [pixels[..., ::-1], pixels[..., ::-1, :], pixels[..., ::-1, ::-1]]
    return [pixels] + [np.ascontiguousarray(state) for state in flipped]


def fit(classifier, views, labels, num_classes, seed=0, validate=None):
    """Train what `classifier` builds on its `views` (N, V, ...); returns the network and its history.

    history: "loss", the mean of each epoch, "val", what `validate(network)` gave after each (larger is better), and
    "epoch", from 0, whose weights were kept: the first best, or the last without `validate`. Weights, order and flips
    follow `seed`; the caller's random stream stays as it was.
    """
    training, history, best = classifier.training, {"val": []}, {}

    def keep_the_best(network):
        value = validate(network)
        if np.isnan(value):
            raise ValueError("The validation metric is not defined on the validation set; it needs every class there.")
        if value > max(history["val"], default=-np.inf):
            best.update(epoch=len(history["val"]), weights=copy.deepcopy(network.state_dict()))
        history["val"].append(value)

    with torch.random.fork_rng(devices=[] if torch.device(training.device).type == "cpu" else [training.device]):
        torch.manual_seed(seed)
        network = classifier.build(views.shape[2:], num_classes).to(training.device)
        optimizer = training.optimizer(network.parameters())
        history["loss"] = _train(
            network, views, labels, optimizer, training.epochs, training.batch_size,
            label_smoothing=training.label_smoothing, after_epoch=keep_the_best if validate else None,
        )  # fmt: skip
    if best:
        network.load_state_dict(best["weights"])
    return network, history | {"epoch": best.get("epoch", training.epochs - 1)}


@torch.no_grad()
def probabilities(network, views, batch_size=256):
    """Class probabilities (N, K), float64, of the first of each image's views (N, V, ...): nothing is flipped."""
    device = next(network.parameters()).device
    network.eval()
    rows = [network(batch[:, 0].to(device)).cpu().double().softmax(1) for batch in views.split(batch_size)]
    return torch.cat(rows).numpy()


def train_classifier(model, images, labels, epochs=100, lr=1e-3, batch_size=64, generator=None):
    """Train in place: cross entropy, Adam, reshuffled every epoch. Returns the mean loss of each epoch."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    return _train(model, torch.as_tensor(images)[:, None], labels, optimizer, epochs, batch_size, generator)


@torch.no_grad()
def predict(model, images, batch_size=256):
    """Predicted labels (N,), on the CPU."""
    device = next(model.parameters()).device
    model.eval()
    return torch.cat([model(batch.to(device)).argmax(1).cpu() for batch in as_images(images).split(batch_size)])


def _train(model, views, labels, optimizer, epochs, batch_size, generator=None, label_smoothing=0.0, after_epoch=None):
    device = next(model.parameters()).device
    views, labels = torch.as_tensor(views).to(device), torch.as_tensor(labels).long().to(device)
    count, versions = views.shape[:2]
    rows, losses = views.flatten(0, 1), []
    for _ in range(epochs):
        model.train()
        order = torch.randperm(count, generator=generator)
        places = order * versions
        if versions > 1:  # with one version nothing is drawn: kept runs follow the same random stream
            places += torch.randint(versions, (count,), generator=generator)
        total = 0.0
        for index, place in zip(order.to(device).split(batch_size), places.to(device).split(batch_size)):
            loss = F.cross_entropy(model(rows.index_select(0, place)), labels[index], label_smoothing=label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(index)
        losses.append(total / count)
        if after_epoch:
            after_epoch(model)
    return losses


def _load_all_but_head(network, path):
    """Weights from a file; the last layer's do not count, and every other must be there and fit."""
    found = load_weights(path)
    own = network.state_dict()
    head = {name for name in own if name.startswith(_head_name(network))}
    wrong = [name for name in own if name not in head and (name not in found or found[name].shape != own[name].shape)]
    if wrong:
        raise ValueError(
            f"{path} does not fit the network: {wrong[0]} and {len(wrong) - 1} others differ or are absent."
        )
    network.load_state_dict({name: found[name] for name in own if name not in head}, strict=False)


def _head_name(network):
    return next(name for name, module in network.named_modules() if module is network.get_classifier()) + "."
