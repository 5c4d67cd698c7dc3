"""Where a classifier looks: Grad-CAM heat maps, and how alike they are on made and on real images.

Papers: Selvaraju et al. 2017, Grad-CAM (Sec. 3; the computation is captum's); Arroyo Galende et al. 2026, "No Free
Lunch ...", Sec. 4.2.3, Fig. 12. Chapter: no_free_lunch. The paper shows maps and describes them. Here they also get
numbers, and every number has its control: maps of other real images, of other classes, of the average map.

On 28 px images the last convolution has 4 x 4 cells of 7 px each: its maps cannot tell a stroke from its surroundings.
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file, save_file
from torch import nn

from lookalike.data import datasets
from lookalike.metrics import as_images, to_unit
from lookalike.metrics.classifiers import SmallNetwork, Training, fit, predict
from lookalike.metrics.utility import score
from lookalike.training import cells


def last_convolution(network):
    """The last nn.Conv2d of a network, in the order in which its modules were added: the paper's target layer.

    Of the utility classifier that is the convolution to 8 `width` channels, before its GroupNorm and activation. What
    it gives can be negative, so heat there also means: a channel that speaks against the target is low.
    """
    found = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    if not found:
        raise ValueError(f"{type(network).__name__} has no nn.Conv2d; name the layer to look at yourself.")
    return found[-1]


def grad_cam(network, layer, images, targets, relu=True, batch_size=256):
    """Grad-CAM heat maps (N, H, W), float32, of images (N, C, H, W) for the classes `targets` (N,).

    A map is the sum of the layer's channels, each weighted by the mean gradient of the target's logit, negative values
    cut off (eqs. 1 and 2), upsampled bilinear to the image's size and divided by its own largest value: from 0 to 1,
    1 where the evidence for the target is strongest. Maps are relative: one of 1s may stand for a weak logit. A map
    without any positive evidence stays all 0. relu=False keeps negative values, evidence against the target; maps are
    then divided by their largest magnitude and reach from -1 to 1.

    The network is left in evaluation mode; its gradients are not touched.
    """
    from captum.attr import LayerGradCam  # seconds to import

    images, targets = as_images(images), torch.as_tensor(targets).long()
    device = next(network.parameters()).device
    network.eval()
    _check(network, layer, images[:1].to(device), len(images), targets)
    method, maps = LayerGradCam(network, layer), []
    for batch, wanted in zip(images.split(batch_size), targets.split(batch_size)):
        batch = batch.to(device).requires_grad_()  # so that frozen networks have gradients too
        coarse = method.attribute(batch, wanted.to(device), relu_attributions=relu).detach()
        maps.append(F.interpolate(coarse, images.shape[-2:], mode="bilinear", align_corners=False)[:, 0].cpu())
    return _by_own_maximum(torch.cat(maps)).numpy()


def cam_similarity(first, second):
    """Cosine similarity of the mean maps of two sets of one class, (N, H, W) and (M, H, W).

    1: the heat lies in the same places; 0, for maps without negative values: nowhere in common. NaN where a mean map
    is all 0. A high value alone says little, since all images of a set are framed alike: read it between what two sets
    of real images give and what two classes give. (In the authors' code as a metric that nothing calls.)
    """
    first, second = (np.asarray(maps, np.float64) for maps in (first, second))
    if first.ndim != 3 or first.shape[1:] != second.shape[1:] or not len(first) or not len(second):
        raise ValueError(f"Two sets of maps (N, H, W) of one size are needed, not {first.shape} and {second.shape}.")
    a, b = first.mean(0).ravel(), second.mean(0).ravel()
    length = np.linalg.norm(a) * np.linalg.norm(b)
    return float(np.clip(a @ b / length, -1, 1)) if length else math.nan


def on_ink(images, maps):
    """Heat on bright pixels relative to their area: mean share of a map's heat on pixels over 0.5 of [0, 1], divided
    by the mean share of such pixels.

    From 0, no heat there, over 1, no preference (even heat gives exactly 1), to 1 / area, all heat there. Colour
    channels are averaged; maps that are all 0 are left out; NaN where no map or no ink is left. Images with their ink
    in the middle give more than 1 to any map with its heat there: `on_ink` of the average map says how much.
    """
    ink = (to_unit(as_images(images)).mean(1) > 0.5).numpy()
    maps = np.asarray(maps, np.float64)
    if maps.shape != ink.shape:
        raise ValueError(f"Each image needs its map: images give {ink.shape}, the maps are {maps.shape}.")
    if (maps < 0).any():
        raise ValueError("Heat is not negative; make the maps with relu=True.")
    heat = maps.sum((1, 2))
    there = heat > 0
    if not ink[there].any():
        return math.nan
    return float(((maps * ink).sum((1, 2))[there] / heat[there]).mean() / ink[there].mean())


def explain_cell(folder, *, trained, data, classes, images_per_class, classifier_epochs, classifier_width, seed):
    """Heat maps of the utility classifier that a trained cell's samples teach (Fig. 12); `trained` is its folder.

    The classifier is that of `metrics.utility.utility`. Maps, each for its image's own class, are of the first
    `images_per_class` samples and real test images of each of the first `classes` classes; `load_maps(folder)` reads
    them. Returns accuracy (0 to 1, higher is better, on the whole test split, all classes) and, per class as lists:

    - similarity: `cam_similarity` of synthetic and real maps
    - similarity_real: of two sets of real images, what the best generator would give
    - similarity_other: of synthetic maps and those of the other classes' real images, the mean

    and over all classes, for synthetic and for real images: on_ink_*, see `on_ink`; by_place_*, the same with the
    average map in place of each image's own; empty_*, the share of maps that are all 0. None stands for what is not
    defined. classifier_epochs=0 is the control of the claim itself: maps of a network that has learnt nothing.
    """
    test = datasets.load(data, "test")
    samples, labels = cells.load_samples(trained)
    if not 1 <= classes <= len(test.classes):
        raise ValueError(f"classes is 1 to {len(test.classes)} for {data}, not {classes}.")
    made = samples[_first(labels, classes, images_per_class, "samples")]
    rows = _first(test.labels, classes, 2 * images_per_class, "test images").reshape(classes, 2, -1)
    real, more = (test.images[rows[:, half].ravel()] for half in (0, 1))

    classifier = SmallNetwork(classifier_width, Training(epochs=classifier_epochs))
    network, _ = fit(classifier, classifier.views(samples), labels, len(test.classes), seed)
    targets = np.repeat(np.arange(classes), images_per_class)
    maps = [grad_cam(network, last_convolution(network), images, targets) for images in (made, real, more)]
    arrays = {"synthetic": made, "synthetic_maps": maps[0], "real": real, "real_maps": maps[1], "labels": targets}
    save_file(arrays, Path(folder) / "maps.safetensors")
    tested = score(predict(network, test.images), test.labels, len(test.classes))
    found = {"accuracy": tested["accuracy"]} | _similarities(*maps, classes)
    return found | _ink("synthetic", made, maps[0]) | _ink("real", real, maps[1])


def load_maps(folder):
    """What `explain_cell` kept, numpy, class after class: synthetic and real, uint8 (N, C, H, W); synthetic_maps and
    real_maps, float32 (N, H, W) from 0 to 1; labels (N,), the same for both.
    """
    return load_file(Path(folder) / "maps.safetensors")


def _check(network, layer, image, count, targets):
    if not any(module is layer for module in network.modules()):
        raise ValueError("The layer is not a part of the network; take one of network.modules().")
    if targets.shape != (count,) or not count:
        raise ValueError(f"{count} images and targets of shape {tuple(targets.shape)}: give one class per image.")
    with torch.no_grad():
        num_classes = network(image).shape[1]
    if targets.min() < 0 or targets.max() >= num_classes:
        raise ValueError(f"Targets reach from {targets.min()} to {targets.max()}; there are {num_classes} classes.")


def _by_own_maximum(maps):
    """differs: the package that the authors use also takes each map's minimum to 0, which hides heat that is even."""
    largest = maps.abs().amax((1, 2), keepdim=True)
    return torch.where(largest > 0, maps / largest.clamp_min(torch.finfo(maps.dtype).tiny), 0.0)


def _first(labels, classes, count, what):
    """Rows of the first `count` of each of the first classes, class after class."""
    rows = [np.flatnonzero(labels == label)[:count] for label in range(classes)]
    if (fewest := min(map(len, rows))) < count:
        raise ValueError(f"A class has {fewest} {what} and {count} are needed; take a smaller images_per_class.")
    return np.concatenate(rows)


def _similarities(synthetic, real, more, classes):
    """The three similarities per class, from maps sorted by class."""
    synthetic, real, more = (np.split(maps, classes) for maps in (synthetic, real, more))
    across = [[cam_similarity(a, b) for b in real] for a in synthetic]
    others = [[value for j, value in enumerate(row) if j != i] for i, row in enumerate(across)]
    return {
        "similarity": [_plain(row[i]) for i, row in enumerate(across)],
        "similarity_real": [_plain(cam_similarity(a, b)) for a, b in zip(real, more)],
        "similarity_other": [_plain(float(np.mean(row))) if row else None for row in others],
    }


def _ink(name, images, maps):
    average = np.broadcast_to(maps.mean(0), maps.shape)
    return {
        f"on_ink_{name}": _plain(on_ink(images, maps)),
        f"by_place_{name}": _plain(on_ink(images, average)),
        f"empty_{name}": float((maps.max((1, 2)) == 0).mean()),
    }


def _plain(value):
    return value if math.isfinite(value) else None
