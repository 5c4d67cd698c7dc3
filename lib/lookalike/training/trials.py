"""Trials: a small training and its measures in one stage, for questions that need hundreds of trainings.

Paper: Arroyo Galende et al. 2026, "No Free Lunch ..."; chapter: no_free_lunch_controls. The measures are the few that
tell a collapsed, a blurred and a useful generator apart; the whole list stands on the paper's own page.
"""

import numpy as np
import torch

from lookalike.data import datasets
from lookalike.metrics import as_images, distances, to_unit, utility
from lookalike.metrics.extractors import efficientnet_lite0
from lookalike.metrics.features import features
from lookalike.privacy import audit
from lookalike.privacy.accounting import Training, account
from lookalike.privacy.attack import auc
from lookalike.privacy.randomness import stream
from lookalike.training import cells
from lookalike.training.controls import Recipe, train_controlled
from lookalike.training.measuring import anchor_images

MEASURES = ("accuracy", "frechet", "recall", "coverage", "spread", "attack_auc")


def published_trial(
    folder, *, data, images_per_class, real_per_class, feature_size, classifier_epochs, classifier_width, cache,
    draw=0, **training,
):  # fmt: skip
    """`cells.train_cell` on the full role with the settings `training`, and the `summary` of its samples."""
    few = {"data": data, "images_per_class": images_per_class, "draw": draw}
    report = cells.train_cell(folder, role="full", **few, **training)
    made = cells.load_samples(folder)
    found = summary(*made, real_per_class, feature_size, classifier_epochs, classifier_width, cache, **few)
    return found | {name: report[name] for name in ("epsilon", "delta", "steps", "images")}


def control_trial(
    folder, *, recipe, data, family, width, epochs, seed, images_per_class, samples_per_class, batch_size, lr,
    timesteps, sampler, sampling_steps, real_per_class, feature_size, classifier_epochs, classifier_width, cache,
):  # fmt: skip
    """A training by `recipe` (the fields of a `controls.Recipe`) and the `summary` of its samples; not private.

    Beside it generator_steps and weights, how many numbers of the network that sees the images could be noised.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    few = datasets.load(data, "train").first_per_class(images_per_class)
    classes = len(few.classes)
    ddpm = {"timesteps": timesteps, "sampler": sampler, "sampling_steps": sampling_steps} if family == "ddpm" else {}
    nets = {k: net.to(device) for k, net in cells.build(family, classes, width, few.images.shape[1], **ddpm).items()}
    history = train_controlled(
        family, nets, datasets.as_tensor(few).to(device), torch.as_tensor(few.labels).to(device), Recipe(**recipe),
        epochs=epochs, lr=lr, batch_size=batch_size, generator=stream(seed, "training"),
    )  # fmt: skip
    made = cells.draw_samples(nets["model"], classes, samples_per_class, seed, device)
    found = summary(
        made["images"].numpy(), made["labels"].numpy(), real_per_class, feature_size, classifier_epochs,
        classifier_width, cache, data=data, images_per_class=images_per_class,
    )  # fmt: skip
    watched = nets.get("discriminator", nets["model"])
    weights = sum(weight.numel() for weight in watched.parameters())
    return found | {"generator_steps": history["generator_steps"], "weights": weights}


def anchor_trial(
    folder, *, anchor, data, images_per_class, samples_per_class, real_per_class, feature_size, classifier_epochs,
    classifier_width, cache, draw=0,
):  # fmt: skip
    """The `summary` of a set that no model made: `samples_per_class` images a class, or every training image if more.

    anchor: one of `measuring.ANCHORS`; "training images" are those that the trainings with the same `images_per_class`
    and `draw` see, and what a classifier makes of them is what the generators must beat.
    """
    train = datasets.load(data, "train")
    few = {"data": data, "images_per_class": images_per_class, "draw": draw}
    if anchor == "training images":
        seen = cells.select_role(train, "full", images_per_class, 0, draw)
        images, labels = seen.images, seen.labels
        samples_per_class = max(samples_per_class, images_per_class)
    else:  # held-out images follow the reference and whom the attack asks for
        count = max(samples_per_class, real_per_class, 2 * images_per_class)
        images, labels = anchor_images(anchor, train, images_per_class, count)
    rows = [np.resize(np.flatnonzero(labels == c), samples_per_class) for c in range(len(train.classes))]
    made = (part[np.concatenate(rows)] for part in (images, labels))
    return summary(*made, real_per_class, feature_size, classifier_epochs, classifier_width, cache, **few)


def coin_trial(folder, *, data, images_per_class, seed, **training):
    """Epsilon from above and from below where coins decided who was in: one training, one row.

    The attacker sees the released samples alone and scores each of the 2 x images_per_class candidates of each class by
    minus its distance to the nearest of them. The coins are fair and tossed before, as the theorem behind the bound
    (Steinke et al. 2023) asks. Returns accounted (None without noise) and lower (95 % confidence, of this row alone) at
    one `delta`, members, candidates and auc (of the same scores, 0.5: chance).
    """
    settings = {"data": data, "images_per_class": images_per_class, "seed": seed}
    report = cells.train_cell(folder, role="coin", **settings, **training)
    candidates, included = cells.coins(datasets.load(data, "train"), images_per_class, seed)
    scores = audit.closeness(candidates.images, cells.load_samples(folder)[0])
    lower, spent = audit.one_run_bound(scores, included, audit.DELTA), report["privacy"]
    if spent is not None:
        spent = Training(spent["noise_multiplier"], spent["sample_rate"], report["steps"])
    return {
        "accounted": None if spent is None else account(spent, audit.DELTA).epsilon, "delta": audit.DELTA,
        "lower": lower.epsilon,
        "members": int(included.sum()), "candidates": len(included), "auc": auc(scores[included], scores[~included]),
    }  # fmt: skip


def summary(
    images, labels, real_per_class, feature_size, classifier_epochs, classifier_width, cache=None, *,
    data, images_per_class, draw=0,
):  # fmt: skip
    """MEASURES of made images uint8 (N, C, S, S), sorted by class, against the data set's own splits.

    accuracy on `real_per_class` test images a class (higher is better), with its interval; frechet to as many training
    images, in EfficientNet-Lite0 features (not FID, lower is better); recall and coverage of the test images in the
    same features (0 to 1, higher is better); spread: see `spread`, relative to that of real images (1 is theirs, 0 is
    collapse). attack_auc: does the nearest made image tell the training images from as many others of the split? 0.5
    is chance, 1 is a copier, below 0.5 made images lie nearer to the others.
    """
    train, test = datasets.load(data, "train"), datasets.load(data, "test").first_per_class(real_per_class)
    real, extractor = train.first_per_class(real_per_class), efficientnet_lite0(image_size=feature_size)
    made, reference, held_out = (features(x, extractor, cache) for x in (images, real.images, test.images))
    near = distances.precision_recall_density_coverage(held_out, made)
    members, others = (cells.select_role(train, "full", images_per_class, 0, d).images for d in (draw, draw + 1))
    score = utility.utility(
        images, labels, test.images, test.labels, len(test.classes), epochs=classifier_epochs, width=classifier_width
    )
    return {
        "accuracy": score["accuracy"], "accuracy_low": score["low"], "accuracy_high": score["high"],
        "frechet": distances.frechet_distance(reference, made), "recall": near["recall"], "coverage": near["coverage"],
        "spread": spread(images, labels) / spread(real.images, real.labels),
        "attack_auc": auc(audit.closeness(members, images), audit.closeness(others, images)),
    }  # fmt: skip


def spread(images, labels):
    """Mean pixel distance between two images of one class, over classes; 0 where each class is one image repeated."""
    pixels, labels = to_unit(as_images(images)).flatten(1), torch.as_tensor(labels)
    return float(torch.stack([torch.pdist(pixels[labels == c]).mean() for c in labels.unique()]).mean())
