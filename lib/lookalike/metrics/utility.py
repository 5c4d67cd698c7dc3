"""Utility: train a classifier on one set of images, test it on real ones.

Papers: Arroyo Galende et al. 2026, "No Free Lunch ...", Sec. 4 (`utility`, from the authors' `src/utility/metrics.py`);
Sun et al. 2021, pGAN (macro one-vs-rest AUROC, BCa); Osuala et al. 2024, MCGAN with DP (AUROC, AUPRC). Chapters:
no_free_lunch, pgan, mcgan_dp.

A score means little alone: `utility_table` puts it beside what the real images give, what as few real images give, and
what knowing nothing gives. The test set never chooses an epoch or a setting: the last epoch counts, or a validation
set chooses. Training and validation sets that share an image, or a known subject, with the test set are refused.
"""

from functools import partial

import numpy as np
import torch

from lookalike.metrics import as_images
from lookalike.metrics.classifiers import Classifier, SmallNetwork, fit, predict, probabilities, train_classifier
from lookalike.metrics.intervals import bootstrap, clopper_pearson, over_seeds
from lookalike.metrics.scores import METRICS, chance_line, checked, confusion, kept, measure

SMALL = SmallNetwork()


# The table


def utility_table(
    synthetic, real_train, real_test, classifier=SMALL, seeds=(0, 1, 2), subset=None, val=None, select=None,
    positive=None, level=0.95, resamples=2000,
):  # fmt: skip
    """One row per training set, each tested on `real_test`: a list of plain dicts. Arguments as `predictions`.

    Rows: each synthetic set; "real"; "N real" with `subset`; "majority", which always answers real_train's most
    frequent class. Keys: "train on", "images", "classifier", "seeds", and those of `evaluate`, for which "real" is the
    reference. Subjects, where real_test has them, are what the intervals take as random.
    """
    scores = predictions(synthetic, real_train, real_test, classifier, seeds, subset, val, select, positive)
    _, train_labels, _ = _parts(real_train)
    _, labels, subjects = _parts(real_test)
    classes = _class_names(real_train, real_test, *_named(synthetic).values())
    scores["majority"] = np.zeros((len(labels), 1, len(classes)))
    scores["majority"][:, :, np.bincount(train_labels).argmax()] = 1
    sizes = {name: len(_parts(data)[1]) for name, data in _named(synthetic).items()} | {f"{subset} real": subset}
    rows = []
    for name, found in scores.items():
        row = {"train on": name, "images": sizes.get(name, len(train_labels)), "seeds": found.shape[1]}
        reference = None if name in ("real", "majority") else scores["real"]
        row["classifier"] = "majority" if name == "majority" else classifier.name
        rows.append(row | evaluate(labels, found, classes, positive, subjects, reference, level, resamples))
    return rows


def predictions(
    synthetic, real_train, real_test, classifier=SMALL, seeds=(0, 1, 2), subset=None, val=None, select=None,
    positive=None,
):  # fmt: skip
    """Class probabilities (N, S, K) of the test images by training set, one training per seed; for paired tests.

    Sets are ImageSets, or (images, labels) or (images, labels, subjects); `synthetic` is one set, or several by name.
    Keys: the names of the synthetic sets ("synthetic" for one), "real" for all of `real_train`, and "N real" for
    `subset` of its images, drawn anew by each seed whatever their subject (None leaves the row out).
    classifier: one of `lookalike.metrics.classifiers`. With `val`, a set of real images, the epoch with the best
    `select` (one of METRICS) on it is kept; without, the last. `positive` as in `evaluate`.
    """
    test_images, test_labels, _ = _parts(real_test)
    known = [] if val is None else [val]
    num_classes = len(_class_names(real_train, real_test, *_named(synthetic).values(), *known))
    _check_labels(test_labels, len(test_images), num_classes, "test")
    _check_apart(real_train, real_test, "training", "the classifier would be tested on what it was trained on")
    validate = _validation(val, select, real_test, classifier, num_classes, positive)
    test = classifier.views(test_images, training=False)

    def prepared(data, what):
        images, labels, _ = _parts(data)
        _check_labels(labels, len(images), num_classes, what)
        return classifier.views(images), labels

    def after(pick):
        networks = [fit(classifier, *pick(seed), num_classes, seed, validate)[0] for seed in seeds]
        return np.stack([probabilities(network, test) for network in networks], 1)

    found = {}
    for name, data in _named(synthetic).items():
        pair = prepared(data, name)
        found[name] = after(lambda seed, pair=pair: pair)
    views, labels = prepared(real_train, "real training")
    found["real"] = after(lambda seed: (views, labels))
    if subset is not None:
        if not 0 < subset <= len(labels):
            raise ValueError(f"The subset has from 1 to {len(labels)} real training images, not {subset}.")
        found[f"{subset} real"] = after(lambda seed: _some(views, labels, subset, seed))
    return found


def evaluate(labels, scores, classes=None, positive=None, subjects=None, reference=None, level=0.95, resamples=2000):
    """Every one of METRICS for class probabilities `scores` (N, K), or (N, S, K) of S trainings, and "confusion".

    Each metric is a dict: "value", from 0 to 1, higher is better, the mean over the trainings; "low", "high", its BCa
    interval over test images, over subjects (N,) where given, with the trainings fixed; "over_seeds", its t interval
    over trainings with the test images fixed; "n", what was resampled; "chance", see `chance_line`; "positive", the
    class that a ranking is about, "macro" for the mean over classes. An ordering of two methods needs both intervals.
    With the scores of a `reference`, "kept" is the share of its utility that is kept, with its interval: `kept`.

    classes: K names. positive: an index; for two classes the second unless given, for more None, the macro mean.
    "confusion" (K, K): images by true class (rows) and most probable class (columns), the mean over trainings.
    """
    labels, scores = checked(labels, scores)
    classes = [str(k) for k in range(scores.shape[2])] if classes is None else list(classes)
    positive = _positive(positive, len(classes))
    absent = [name for k, name in enumerate(classes) if not (labels == k).any()]
    if absent:
        raise ValueError(f"The test set has no image of {', '.join(absent)}; these scores need every class in it.")
    settings = {"level": level, "resamples": resamples, "subjects": subjects}
    result = {}
    for metric in METRICS:
        statistic = partial(measure, metric=metric, positive=positive)
        found = bootstrap(statistic, labels, scores, **settings)
        per_seed = [statistic(labels, scores[:, s]) for s in range(scores.shape[1])]
        found["over_seeds"] = over_seeds(per_seed, level)
        found["chance"] = chance_line(labels, len(classes), metric=metric, positive=positive)
        if metric in ("auroc", "auprc"):
            found["positive"] = "macro" if positive is None else classes[positive]
        if reference is not None:
            share = partial(kept, metric=metric, positive=positive)
            found["kept"] = bootstrap(share, labels, scores, checked(labels, reference)[1], **settings)
        result[metric] = found
    return result | {"confusion": confusion(labels, scores)}


# No Free Lunch


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
        if not train.std() > 0:
            raise ValueError("All training pixels are equal: they have no deviation to scale to the test set's.")
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


def _parts(data):
    """images, labels (N,) and subjects (N,) or None, of an ImageSet or a tuple."""
    if hasattr(data, "images"):
        return data.images, np.asarray(data.labels), data.subjects
    if not isinstance(data, tuple) or len(data) not in (2, 3):
        raise ValueError("A set is an ImageSet, or a tuple (images, labels) or (images, labels, subjects).")
    images, labels, *subjects = data
    return images, np.asarray(labels).ravel(), subjects[0] if subjects else None


def _named(synthetic):
    named = synthetic if isinstance(synthetic, dict) else {"synthetic": synthetic}
    if taken := [name for name in named if name == "majority" or name.split()[-1:] == ["real"]]:
        raise ValueError(f"{taken[0]!r} is the name of another row; give the synthetic set its own.")
    return named


def _class_names(real_train, real_test, *others):
    """Names of the classes, the same in all sets that have them, or the numbers up to the largest real label."""
    named = [tuple(data.classes) for data in (real_train, real_test, *others) if hasattr(data, "classes")]
    if differ := [names for names in named if names != named[0]]:
        first, second = (", ".join(map(str, names)) for names in (named[0], differ[0]))
        raise ValueError(f"The classes of one set are {first}, of another {second}: give all the same, in one order.")
    if named:
        return list(named[0])
    return [str(k) for k in range(max(int(_parts(data)[1].max()) for data in (real_train, real_test)) + 1)]


def _check_apart(data, test, what, why):
    """No image is in both sets, and no subject where both sets know whose images they are."""
    images, tested = (as_images(_parts(part)[0]) for part in (data, test))
    pixels = {image.numpy().tobytes() for image in tested}
    if shared := sum(image.numpy().tobytes() in pixels for image in images):
        raise ValueError(f"{shared} {what} images are test images too; {why}.")
    if "image" in [getattr(part, "subject_kind", "image") for part in (data, test)]:
        return
    if shared := len(np.intersect1d(data.subjects, test.subjects)):
        raise ValueError(f"{shared} subjects have images in both the {what} and the test set; {why}.")


def _positive(positive, num_classes):
    return 1 if positive is None and num_classes == 2 else positive


def _some(views, labels, count, seed):
    rows = np.random.default_rng(seed).permutation(len(labels))[:count]
    return views[rows], labels[rows]


def _validation(val, select, real_test, classifier, num_classes, positive):
    """A function from a network to its `select` on the validation set, or None without one."""
    if (val is None) != (select is None):
        raise ValueError(
            "To choose an epoch give both `val`, a set, and `select`, a metric; to keep the last, neither."
        )
    if val is None:
        return None
    if select not in METRICS:
        raise ValueError(f"`select` is one of {', '.join(METRICS)}, not {select!r}.")
    images, labels, _ = _parts(val)
    _check_labels(labels, len(images), num_classes, "validation")
    _check_apart(val, real_test, "validation", "the test set must not choose the epoch")
    views, positive = classifier.views(images, training=False), _positive(positive, num_classes)
    return lambda network: measure(labels, probabilities(network, views), metric=select, positive=positive)
