"""What a set of made images is worth: distances to real ones, pairs of pixels, use for a classifier.

Paper: Arroyo Galende et al. 2026, "No Free Lunch ...", Sec. 4, Table 1 and Fig. 10d. Chapter: no_free_lunch. Every
measure stands twice where the published form misleads: as published and as it should be (sheet D11, D12, D14, D15).
`measure_cell` and `measure_anchor` are stages of a run; an anchor is a set that no model made, measured in the same
way, for a number means what real and worthless images score on it.
"""

import math

import numpy as np
import torch

from lookalike.data import datasets
from lookalike.metrics import as_images, distances, perceptual, pixels, utility
from lookalike.metrics.classifiers import SmallNetwork, Training, fit, predict
from lookalike.metrics.features import efficientnet_lite0, features, inception, logits
from lookalike.training.cells import first_of, load_samples

# by what `pixels.anchor_sets` makes of held-out real images; None: the few that the models saw, themselves
_MADE_OF_HELD_OUT = {
    "held-out real images": "real",
    "training images": None,
    "blurred real images": "blurred",
    "one image repeated": "repeated",
    "dataset mean": "mean",
    "blank": "black",
}
ANCHORS = tuple(_MADE_OF_HELD_OUT)  # in the order of the tables: from what should score best to what is worth nothing
PERCEPTUAL_SIDE = 64  # ST-LPIPS was trained on patches of this side


def measure_cell(folder, *, trained, data, real_per_class, **settings):
    """Fidelity and utility of a trained cell's samples; `trained` is its folder. See `measure` for the settings."""
    references = _references(datasets.load(data, "train"), datasets.load(data, "test"), real_per_class)
    return measure(*load_samples(trained), *references, **settings)


def measure_anchor(folder, *, anchor, images_per_class, data, real_per_class, **settings):
    """The same measures on one of ANCHORS; see `anchor_images`, and `measure` for the settings."""
    train = datasets.load(data, "train")
    made = anchor_images(anchor, train, images_per_class, real_per_class)
    return measure(*made, *_references(train, datasets.load(data, "test"), real_per_class), **settings)


def anchor_images(anchor, train, images_per_class, real_per_class):
    """Images uint8 and labels, `real_per_class` of every class, sorted by class, that no model made.

    "held-out real images": those of each class that follow its first `real_per_class`, which are the reference.
    Of these are made "blurred real images" (5 x 5 means), "one image repeated" (the first, under every label: total
    collapse), "dataset mean" and "blank" (black). "training images": the first `images_per_class` of each class, which
    the models saw, again and again until there are enough.
    """
    if anchor not in ANCHORS:
        raise ValueError(f"anchor must be one of {', '.join(ANCHORS)}, not {anchor!r}.")
    classes = range(len(train.classes))
    labels = np.repeat(classes, real_per_class)
    if anchor == "training images":
        rows = [np.resize(first_of(train, c, images_per_class), real_per_class) for c in classes]
        return train.images[np.concatenate(rows)], labels
    rows = [first_of(train, c, 2 * real_per_class)[real_per_class:] for c in classes]
    held_out = train.images[np.concatenate(rows)]
    return datasets.to_uint8(pixels.anchor_sets(held_out)[_MADE_OF_HELD_OUT[anchor]]), labels


def measure(
    images, labels, real, test, whole_test, *, seed, feature_size, pixel_size, pairs, classifier_epochs,
    classifier_width, published_utility, inception_weights="", alexnet_weights="", lpips_weights="", cache=None,
):  # fmt: skip
    """Made images uint8 (N, C, S, S) with labels (N,) against three ImageSets, as a flat dict of plain numbers.

    `real` is the paper's reference, the first images of each class of train: it holds the training images (D11).
    `test` holds the first of each class of the test split, `whole_test` all of it. A number that is not finite is None.

    Fidelity in EfficientNet-Lite0 features at `feature_size` px ("features" names them; nothing here is an FID):
    frechet, frechet_test and kernel (x 1000), lower is better; precision, recall, coverage (0..1) and density, higher
    is better; is_lite0, the class score of its ImageNet logits (1..1000, 10 splits), higher is better.
    Pairs: psnr (dB) and ssim at `pixel_size` px (paper: 299) with random real images, as published; psnr_class,
    ssim_class (same class) and psnr_nearest, ssim_nearest (nearest real image, won by whoever copies) at the images'
    own size; higher is better. lpips_st and lpips_st_class: ST-LPIPS (alex) of at most `pairs` of those random and
    same-class pairs, spread evenly, enlarged to at most 64 px; lower is nearer.
    With `inception_weights`: fid and is (Inception Score) of images enlarged to 299 px, as published. With
    `alexnet_weights` and `lpips_weights` (see `perceptual.lpips`): lpips, of the same pairs at `pixel_size`.
    Utility, see `_utility_measures`; accuracy_published, with `published_utility`, is the paper's form of it, a second
    training. "test_images" counts those of `test`. What is compared with `real` reads the private training images;
    frechet_test, is_lite0, is and the utility read them only through the made ones.
    """
    labels = np.asarray(labels)
    if labels.shape != (len(images),) or not np.isin(labels, np.arange(len(real.classes))).all():
        raise ValueError(f"Made images need one label each, from 0 to {len(real.classes) - 1}; see `load_samples`.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    extractor = efficientnet_lite0(feature_size, device)
    found = _feature_measures(images, real, test, extractor, cache)
    if inception_weights:
        found |= _inception_measures(images, real, inception(inception_weights, device=device), cache)
    found |= _pixel_measures(images, labels, real, pixel_size, seed)
    random, same_class = _some_pairs(images, labels, real, pairs, seed)
    side, distance = min(pixel_size, PERCEPTUAL_SIDE), perceptual.stlpips("alex", device)
    found |= {"lpips_st": _apart(distance, random, side), "lpips_st_class": _apart(distance, same_class, side)}
    if alexnet_weights or lpips_weights:
        found["lpips"] = _apart(_lpips(alexnet_weights, lpips_weights, device), random, pixel_size)
    network = SmallNetwork(classifier_width, Training(classifier_epochs, device=device))
    found |= _utility_measures(images, labels, test, whole_test, network, seed)
    if published_utility:
        found["accuracy_published"] = _published_accuracy(images, labels, test, network, seed)
    found = {name: float(value) if math.isfinite(value) else None for name, value in found.items()}
    return found | {"features": extractor.name, "test_images": len(test)}


def _references(train, whole_test, real_per_class):
    """The paper's three real sets; a test split with fewer of a class gives what its rarest class has, balanced."""
    per_class = min(real_per_class, np.bincount(whole_test.labels, minlength=len(whole_test.classes)).min())
    return train.first_per_class(real_per_class), whole_test.first_per_class(per_class), whole_test


def _feature_measures(images, real, test, extractor, cache):
    made, reference, held_out = (features(x, extractor, cache) for x in (images, real, test))
    return {
        "frechet": distances.frechet_distance(reference, made),
        "frechet_test": distances.frechet_distance(held_out, made),
        "kernel": 1000 * distances.kernel_distance(reference, made).value,
        **distances.precision_recall_density_coverage(reference, made),
        "is_lite0": distances.class_score(logits(made, extractor)).value,
    }


def _inception_measures(images, real, network, cache):
    made, reference = (features(_enlarged(x), network, cache) for x in (images, real))
    score = distances.class_score(logits(made, network))
    return {"fid": distances.frechet_distance(reference, made), "is": score.value}


def _enlarged(images):
    """uint8 images at the side at which the authors' Inception sees them, enlarged in their way."""
    parts = as_images(images).split(100)
    return np.concatenate([datasets.to_uint8(pixels.resized(part, pixels.PUBLISHED_SIDE)) for part in parts])


def _pixel_measures(images, labels, real, pixel_size, seed):
    found = {}
    for pairing, end, side in (
        ("as_published", "", pixel_size),
        ("same_class", "_class", None),
        ("nearest_real", "_nearest", None),
    ):
        table = pixels.paired_table(real, images, pairing, real.labels, labels, side, seed)
        found |= {name.split("_")[0] + end: value for name, value in table.items()}
    return found


def _some_pairs(images, labels, real, pairs, seed):
    """At most `pairs` random and as many same-class pairs of `_pixel_measures`: (real, made) each, in [-1, 1].

    Taken at even steps: made images lie sorted by class, and every class gets its share.
    """
    if pairs < 1:
        raise ValueError(f"pairs must be at least 1, not {pairs}.")
    real_images, made, chosen = as_images(real), as_images(images), []
    for pairing in ("as_published", "same_class"):
        i, j = pixels.pair(real, images, pairing, real.labels, labels, seed)
        count = min(pairs, len(i))
        steps = torch.arange(count) * len(i) // count
        chosen.append((real_images[i[steps]], made[j[steps]]))
    return chosen


def _apart(distance, pair, side):
    """Mean perceptual distance of a (real, made) pair of sets, both at a square of `side`."""
    return distance.between(*(pixels.resized(part, side) for part in pair)).mean()


def _lpips(alexnet_weights, lpips_weights, device):
    if not (alexnet_weights and lpips_weights):
        raise ValueError("LPIPS needs two files: give both alexnet_weights and lpips_weights, or neither.")
    return perceptual.lpips(alexnet_weights, lpips_weights, "alex", device)


def _utility_measures(images, labels, test, whole_test, network, seed):
    """Shares of test images that a classifier gets right after training on the made ones; 0..1, higher is better.

    accuracy on `test` with its 95 % Clopper-Pearson interval accuracy_low, accuracy_high, and balanced, the mean over
    classes; whole, whole_low, whole_high, whole_balanced: the same classifier on `whole_test`; majority: what always
    answering the made set's most frequent class gets on `test`, 1 / K where test is balanced. No statistics of the test
    set are used (sheet D15).
    """
    classes = len(test.classes)
    trained, _ = fit(network, network.views(images), labels, classes, seed)
    found = {"majority": utility.majority(labels, test.labels, classes)["accuracy"]}
    for part, name, balanced in ((test, "accuracy", "balanced"), (whole_test, "whole", "whole_balanced")):
        score = utility.score(predict(trained, part), part.labels, classes)
        found |= {name: score["accuracy"], f"{name}_low": score["low"], f"{name}_high": score["high"]}
        found[balanced] = score["balanced_accuracy"]
    return found


def _published_accuracy(images, labels, test, network, seed):
    """The paper's accuracy: the made images get the test set's mean and deviation first; NaN where they have none."""
    if images.min() == images.max():
        return math.nan
    return utility.utility(
        images, labels, test.images, test.labels, len(test.classes), network.training.epochs, seed,
        "test_statistics", network.width, device=network.training.device,
    )["accuracy"]  # fmt: skip
