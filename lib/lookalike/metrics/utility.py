"""Utility: train a classifier on one set of images, test it on another.

Paper: Arroyo Galende et al. 2026, "No Free Lunch ...", Sec. 4; network and loop from the authors'
`src/utility/metrics.py`. Chapter: no_free_lunch. An accuracy means little alone: the same call with the few
real images as training set, and `majority`, give the rows to read it against.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lookalike.metrics import as_images
from lookalike.metrics.intervals import clopper_pearson
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


def train_classifier(model, images, labels, epochs=100, lr=1e-3, batch_size=64, generator=None):
    """Train in place: cross entropy, Adam, reshuffled every epoch. Returns the mean loss of each epoch."""
    device = next(model.parameters()).device
    images, labels = torch.as_tensor(images).to(device), torch.as_tensor(labels).long().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    losses = []
    model.train()
    for _ in range(epochs):
        total = 0.0
        for index in torch.randperm(len(images), generator=generator).to(device).split(batch_size):
            loss = F.cross_entropy(model(images[index]), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(index)
        losses.append(total / len(images))
    return losses


@torch.no_grad()
def predict(model, images, batch_size=256):
    """Predicted labels (N,), on the CPU."""
    device = next(model.parameters()).device
    model.eval()
    return torch.cat([model(batch.to(device)).argmax(1).cpu() for batch in as_images(images).split(batch_size)])


def accuracy(model, images, labels):
    """Share of images (N, C, S, S) in [-1, 1] that get their label: 0 to 1, higher is better."""
    return float((predict(model, images) == torch.as_tensor(labels)).float().mean())


def utility(
    train_images,
    train_labels,
    test_images,
    test_labels,
    num_classes,
    epochs=100,
    seed=0,
    standardise="none",
    width=64,
    lr=1e-3,
    batch_size=64,
    device="cpu",
):
    """Test accuracy after training on `train_images`, as a dict (see `score`); higher is better.

    standardise="test_statistics" shifts and scales the training images to the test set's mean and standard
    deviation, as the paper does: it looks at the test set, and only training images change.
    """
    train, test = as_images(train_images), as_images(test_images)
    if standardise not in ("none", "test_statistics"):
        raise ValueError(f'standardise is "none" or "test_statistics", not "{standardise}".')
    if standardise == "test_statistics":
        train = (train - train.mean()) / train.std() * test.std() + test.mean()
    _check_labels(train_labels, len(train), num_classes, "training")
    _check_labels(test_labels, len(test), num_classes, "test")
    # initial weights and dropout follow `seed`; the caller's random stream stays as it was
    with torch.random.fork_rng(devices=[] if torch.device(device).type == "cpu" else [device]):
        torch.manual_seed(seed)
        model = Classifier(train.shape[1], num_classes, width).to(device)
        train_classifier(model, train, train_labels, epochs, lr, batch_size)
    return score(predict(model, test), test_labels, num_classes)


def majority(train_labels, test_labels, num_classes):
    """The same numbers for a classifier that always answers the training set's most frequent class."""
    counts = np.bincount(np.asarray(train_labels).ravel(), minlength=num_classes)
    return score(np.full(len(test_labels), counts.argmax()), test_labels, num_classes)


def score(predicted, labels, num_classes):
    """accuracy with its 95 % interval low, high; balanced_accuracy (mean over classes present); chance; n.

    chance is what guessing evenly among `num_classes` gives, 1 / K. All are shares from 0 to 1.
    """
    predicted, labels = np.asarray(predicted).ravel(), np.asarray(labels).ravel()
    right = predicted == labels
    low, high = clopper_pearson(int(right.sum()), len(right))
    recalls = [right[labels == label].mean() for label in np.unique(labels)]
    return {
        "accuracy": float(right.mean()),
        "low": low,
        "high": high,
        "balanced_accuracy": float(np.mean(recalls)),
        "chance": 1 / num_classes,
        "n": len(right),
    }


def _check_labels(labels, count, num_classes, what):
    labels = np.asarray(labels)
    if labels.size != count or count == 0:
        raise ValueError(f"The {what} set has {count} images and {labels.size} labels; it needs one label per image.")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"The {what} labels reach from {labels.min()} to {labels.max()}; there are {num_classes} classes."
        )
