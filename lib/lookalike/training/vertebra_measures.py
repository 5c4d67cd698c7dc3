"""What made vertebrae are good for, and how much of the real variety they show: region classifiers, deciles, coverage.

Paper: Sun et al. 2023 (arXiv 2106.13199), Sec. 2.2 and 6.3, Fig. 3. Chapter: pgan. Nothing is read without a twin. One
training serves the published choice of the epoch, on the second site, and one that never sees it. Where made images
are counted, real images of other patients stand beside them in the same role: patients differ so much that the ideal
numbers of independent images are no measure.
"""

from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import betabinom
from torch import nn

from lookalike.data import datasets
from lookalike.metrics import as_images
from lookalike.metrics.classifiers import Training, fit, probabilities
from lookalike.metrics.diversity import fit_umap
from lookalike.metrics.intervals import bootstrap, clopper_pearson, paired_over_images
from lookalike.metrics.neighbours import scan
from lookalike.metrics.scores import auroc, confusion, measure
from lookalike.metrics.subsets import patient_parts
from lookalike.training.mass_attacks import load_made, together
from lookalike.training.mass_measures import blurred

PUBLISHED = Training(epochs=20, batch_size=32, optimizer=partial(torch.optim.SGD, lr=1e-4, momentum=0.9))
BALANCED = partial(measure, metric="balanced_accuracy")
SELECTIONS = ("val", "elsewhere", "last")  # ours, the authors' (on their test set), none
DECILES = 10
DENSITY_K = 10  # a place is as dense as its k-th nearest real image is near
COVERAGE_KS = (1, 5)  # the nearest alone; Naeem et al. 2020
HALVINGS = 5
SPACES = {"pixels": lambda images: images, "smooth": blurred}
TRUSTED = 1000  # images whose neighbourhoods on the map are checked: all pairs of them are held


# --- region classifiers -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RegionNetwork:
    """The paper's classifier (Sec. 6.3): torchvision's ResNet-18 from a random start, its first layer C slices wide.

    11,196,867 parameters for 9 slices and 3 regions.
    """

    training: Training = PUBLISHED

    @property
    def name(self):
        return "ResNet-18, from scratch"

    def views(self, images, training=True):
        return as_images(images)[:, None]

    def build(self, shape, num_classes):
        from torchvision.models import resnet18  # seconds to import

        network = resnet18(num_classes=num_classes)
        network.conv1 = nn.Conv2d(shape[0], 64, 7, stride=2, padding=3, bias=False)
        return network


def classify_regions(
    folder, *, data, elsewhere, train_on, image_size, epochs, seed, lr=1e-4, batch_size=32, momentum=0.9
):
    """A stage: the region classifier, trained once and read at three epochs.

    train_on: "real", the train split of `data`; or made images, a set by name or the folder of a stage that left
    samples.safetensors. Tested after every epoch on the val split of `data`, its test split ("home") and the test split
    of `elsewhere`. No augmentation; SGD, cross entropy (paper: 20 epochs, Sec. 6.3).

    Writes probabilities.npz: see `load_probabilities`. Returns "trained_on", "images", "per_class" (of the training
    set), "parameters", "loss" and "balanced_accuracy" ({"val", "home", "elsewhere"}) after each epoch, and "chosen":
    {"val": best balanced accuracy on val, "elsewhere": best on the second site, as published, "last"}, each with its
    epoch, from 1, and the balanced accuracies there. The "elsewhere" of "elsewhere" has seen its answers: it is too
    high.
    """
    real = datasets.load(data, "train", image_size)
    trained = real if train_on == "real" else load_made(train_on, image_size, real)
    tested = {"val": datasets.load(data, "val", image_size), "home": datasets.load(data, "test", image_size)}
    tested["elsewhere"] = datasets.load(elsewhere, "test", image_size)
    _check_alike(trained, *tested.values())
    optimizer = partial(torch.optim.SGD, lr=lr, momentum=momentum)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    classifier = RegionNetwork(Training(epochs, batch_size, optimizer, device=device))
    network, loss, seen = _fit_watched(classifier, trained, tested, seed)
    balanced = {name: [BALANCED(tested[name].labels, p) for p in seen[name]] for name in tested}
    chosen = {name: epochs - 1 if name == "last" else int(np.argmax(balanced[name])) for name in SELECTIONS}
    _save_probabilities(folder, tested, seen, chosen)
    return {
        "trained_on": trained.name, "images": len(trained),
        "per_class": np.bincount(trained.labels, minlength=len(trained.classes)).tolist(),
        "parameters": sum(p.numel() for p in network.parameters()), "loss": loss, "balanced_accuracy": balanced,
        "chosen": {
            name: {"epoch": at + 1} | {of: values[at] for of, values in balanced.items()} for name, at in chosen.items()
        },
    }  # fmt: skip


def load_probabilities(folder):
    """{"home" or "elsewhere": {"labels" (N,), "subjects" (N,), and (N, K) at the epoch of "val", "elsewhere", "last"}}
    of a stage `classify_regions`.
    """
    with np.load(Path(folder) / "probabilities.npz", allow_pickle=False) as arrays:
        parts = ("labels", "subjects", *SELECTIONS)
        return {name: {part: arrays[f"{name}_{part}"] for part in parts} for name in ("home", "elsewhere")}


def _check_alike(first, *others):
    for other in others:
        if other.classes != first.classes:
            raise ValueError(f"{first.name} and {other.name} have other classes: give sets with the same regions.")
        if other.images.shape[1] != first.images.shape[1]:
            slices = f"{first.images.shape[1]} and {other.images.shape[1]}"
            raise ValueError(f"{first.name} and {other.name} have {slices} slices: give sets with as many.")
        if absent := set(range(len(other.classes))) - set(other.labels.tolist()):
            names = ", ".join(other.classes[k] for k in sorted(absent))
            raise ValueError(f"{other.name} ({other.split}) has no image of {names}: it cannot score three regions.")


def _fit_watched(classifier, trained, tested, seed):
    """The network, its losses, and {set: probabilities (N, K) after each epoch}."""
    views = {name: classifier.views(images, training=False) for name, images in tested.items()}
    seen = {name: [] for name in tested}

    def watch(network):
        for name in tested:
            seen[name].append(probabilities(network, views[name]))
        return BALANCED(tested["val"].labels, seen["val"][-1])

    of_training = classifier.views(trained.images)
    network, history = fit(classifier, of_training, trained.labels, len(trained.classes), seed, watch)
    return network, history["loss"], seen


def _save_probabilities(folder, tested, seen, chosen):
    arrays = {}
    for name in ("home", "elsewhere"):
        arrays |= {f"{name}_labels": tested[name].labels, f"{name}_subjects": tested[name].subjects}
        arrays |= {f"{name}_{selection}": seen[name][at] for selection, at in chosen.items()}
    np.savez_compressed(Path(folder) / "probabilities.npz", **arrays)


# --- their scores -------------------------------------------------------------------------------------------


def region_scores(labels, probabilities, subjects=None, classes=None, resamples=2000):
    """Fig. 3's numbers of class probabilities (N, K): one-vs-rest AUC by class and "macro", accuracy, confusions.

    "auc": {class: scores, "macro": scores} and "balanced_accuracy": scores, each {"value", "over_images",
    "over_subjects"}: 0 to 1, higher is better, and its 95 % BCa intervals (`bootstrap`) where images are random, as
    published, and where subjects are, None if nobody knows them. "confusion", K rows by true class: shares of all
    images, as published; "recall": shares of the true class's images, the diagonal's mean is the balanced accuracy.
    """
    probabilities = np.asarray(probabilities)
    classes = [str(k) for k in range(probabilities.shape[1])] if classes is None else list(classes)
    settings = {"subjects": subjects, "resamples": resamples}
    auc = {
        name: _both(auroc, (labels == k).astype(int), probabilities[:, k], **settings) for k, name in enumerate(classes)
    }
    counts = np.asarray(confusion(labels, probabilities))
    return {
        "auc": auc | {"macro": _both(auroc, labels, probabilities, **settings)},
        "balanced_accuracy": _both(BALANCED, labels, probabilities, **settings),
        "confusion": (counts / counts.sum()).tolist(),
        "recall": (counts / counts.sum(1, keepdims=True)).tolist(),
    }


def region_gap(labels, real, synthetic, subjects=None, resamples=2000):
    """What training on made images costs: {"auc", "balanced_accuracy"} of F_real less F_synth, above 0 if real is
    better, each {"value", "over_images", "over_subjects"}, paired, with interval and p (`paired_over_images`).

    real, synthetic (N, K): probabilities of both classifiers for the same images. The two trainings are fixed.
    """

    def paired(statistic, **settings):
        return paired_over_images(statistic, labels, real, synthetic, resamples=resamples, **settings)

    return {
        name: _by_unit(partial(paired, statistic), subjects)
        for name, statistic in (("auc", auroc), ("balanced_accuracy", BALANCED))
    }


def _both(statistic, *samples, subjects, resamples):
    return _by_unit(lambda **whose: bootstrap(statistic, *samples, resamples=resamples, **whose), subjects)


def _by_unit(interval, subjects):
    """{"value", "over_images", "over_subjects"} from a function that gives an interval for `subjects`."""
    over_images = interval()
    several = subjects is not None and len(np.unique(subjects)) > 1
    over_subjects = interval(subjects=subjects) if several else None
    return {"value": over_images["value"], "over_images": over_images, "over_subjects": over_subjects}


# --- diversity ----------------------------------------------------------------------------------------------


def map_diversity(folder, *, data, synthetic, image_size, fit_rows, shown, seed, holdout_splits=("val",)):
    """A stage: Fig. 3A's map, and in numbers whether the made images leave out the fringe of the real ones.

    The map is fitted on the train split alone (`fit_rows` images at most; 20 neighbours, min_dist 0, as in the authors'
    code) and shows at most `shown` unseen and made images, drawn at random. "unseen": `holdout_splits` of `data`
    together. synthetic: as `train_on` of `classify_regions`.

    Writes points.safetensors: see `load_points`. Returns "sizes"; "deciles", rows of `decile_rows` by "space" and
    "set"; "coverage", rows of `coverage_rows` by "space" and "k" (`_coverage`); and "trustworthiness" of the map by
    set, 0.5 to 1, 1 keeps every neighbourhood. Spaces: "map"; "pixels"; "smooth", pixels after a Gaussian of 1 px. A
    map distorts: believe it where pixels agree. Images without grain lie near all others in pixels, real ones with
    grain do not: believe pixels where smooth agrees. The set "control" of the deciles is train images, each by its
    distance to those of other patients.
    """
    real = datasets.load(data, "train", image_size)
    unseen = together([datasets.load(data, split, image_size) for split in holdout_splits])
    made = load_made(synthetic, image_size, real)
    rng = np.random.default_rng(seed)
    most = {"train": (real, fit_rows), "unseen": (unseen, shown), "synthetic": (made, shown)}
    on_map = {name: _drawn(images, count, rng) for name, (images, count) in most.items()}
    points = _map_points(on_map, seed)
    _save_points(folder, on_map, points)
    far = {name: _reach(points[name], points["train"], DENSITY_K) for name in ("unseen", "synthetic")}
    deciles, coverage = _rows_by_set("map", far), []
    known = {"subjects": _owners(unseen), "classes": unseen.classes}
    for space, view in SPACES.items():
        x, own, other = (view(images.images) for images in (real, unseen, made))
        to_real, to_made = _all_distances(own, x), _all_distances(own, other)
        far = {"unseen": _kth(to_real, DENSITY_K), "synthetic": _reach(other, x, DENSITY_K)}
        deciles += _rows_by_set(space, far | {"control": _reach_of_others(x, real.subjects)})
        for k, covered in _coverage(to_real, to_made, real.subjects, seed).items():
            rows = coverage_rows(covered, far["unseen"], unseen.labels, **known)
            coverage += [{"space": space, "k": k} | row for row in rows]
    return {
        "sizes": {"train": len(real), "fitted": len(on_map["train"]), "unseen": len(unseen), "synthetic": len(made)},
        "deciles": deciles,
        "coverage": coverage,
        "trustworthiness": {name: _trustworthiness(on_map[name].images, points[name]) for name in points},
    }


def load_points(folder):
    """{"train", "unseen", "synthetic": (points (N, 2), labels (N,))} of a stage `map_diversity`."""
    found = load_file(Path(folder) / "points.safetensors")
    names = ("train", "unseen", "synthetic")
    return {name: (found[name].numpy(), found[f"{name}_labels"].numpy()) for name in names}


def decile_rows(unseen, other, level=0.95):
    """Where `other` lies in the tenths of `unseen` (U,), from the densest: both are distances to the same real images.

    Rows by "decile", 1 to 10, the fringe: "upto", the distance at which it ends (None: open); "unseen" and "share" in
    it; "low", "high", Clopper-Pearson's interval of the share, the tenths taken as given; "alike_low", "alike_high",
    within which the share of as many independent images of the very same distribution falls with a chance of `level`:
    the tenths are estimates too. Images of one patient are not independent: their shares go further.
    """
    if len(unseen) < DECILES:
        raise ValueError(f"Tenths need {DECILES} unseen images or more, not {len(unseen)}.")
    ends = np.array([round(len(unseen) * i / DECILES) for i in range(1, DECILES)])
    edges = np.sort(unseen)[ends - 1]
    gaps = np.diff(np.r_[0, ends, len(unseen) + 1])  # the mass between two order statistics is a beta's
    inside = [np.bincount(np.searchsorted(edges, of), minlength=DECILES) for of in (unseen, other)]
    rows, tails = [], [(1 - level) / 2, (1 + level) / 2]
    for i, (own, count, gap) in enumerate(zip(*inside, gaps)):
        low, high = clopper_pearson(int(count), len(other), level)
        alike = betabinom.ppf(tails, len(other), gap, len(unseen) + 1 - gap) / len(other)
        rows.append(
            {"decile": i + 1, "upto": float(edges[i]) if i < DECILES - 1 else None,
             "unseen": float(own / len(unseen)), "share": float(count / len(other)), "low": low, "high": high,
             "alike_low": float(alike[0]), "alike_high": float(alike[1])}
        )  # fmt: skip
    return rows


def coverage_rows(covered, far, labels, subjects=None, classes=None, resamples=2000):
    """Rows of the share of unseen images that are covered: "all", the "fringe", the "core", and each class.

    covered: {"synthetic", "control": (U,)}, how often, 0 to 1, each unseen image is (`_coverage`). far (U,): distances
    to the train images; the fringe is the farthest tenth. A class's images may be covered by any class's.

    A row: "region", "units", "subjects" and, for each set and their "gap" (synthetic less control; below 0: variety is
    lost), {"value", "over_images", "over_subjects"}, higher is better, with BCa intervals (`bootstrap`). Random are the
    unseen images, or their patients; the train images and the generator stay as they are.
    """
    fringe = far > np.sort(far)[round(len(far) * (1 - 1 / DECILES)) - 1]
    names = range(int(labels.max()) + 1) if classes is None else classes
    regions = {"all": np.ones(len(far), bool), "fringe": fringe, "core": ~fringe}
    regions |= {str(name): labels == k for k, name in enumerate(names)}
    values = covered | {"gap": covered["synthetic"] - covered["control"]}
    rows = []
    for name, inside in regions.items():
        if inside.sum() < 2:
            raise ValueError(f"{inside.sum()} unseen images are of {name}: coverage needs two or more of each.")
        owners = None if subjects is None else subjects[inside]
        counted = {"units": int(inside.sum()), "subjects": None if owners is None else len(np.unique(owners))}
        shares = {of: _both(_mean, v[inside], subjects=owners, resamples=resamples) for of, v in values.items()}
        rows.append({"region": name} | counted | shares)
    return rows


def _coverage(to_real, to_made, subjects, seed):
    """{k: {"synthetic", "control": (U,)}}: in how many halvings of the real images each unseen image is covered.

    From the distances of unseen images to all real (U, N) and all made ones (U, M). The real images are halved by
    patient, five times; each half once is the reference and once the control, so that neither has the luckier patients.
    Covered is what has an image of the set nearer than its own k-th nearest reference image (Naeem et al. 2020, with
    unseen images in the place of real ones); made images are as many as the control's. For k = 1 the control is at 0.5
    by symmetry (below, where two patients share an image), for k = 5 at 0.97 or, as a patient's images go together,
    below. A generator that mixes patients can pass it: a half has few. Raises if a half has fewer than k images.
    """
    rng = np.random.default_rng(seed)
    found = {k: {name: np.zeros(len(to_real)) for name in ("synthetic", "control")} for k in COVERAGE_KS}
    for halving in range(HALVINGS):
        halves = patient_parts(subjects, 2, seed + halving)
        for reference, control in (halves, halves[::-1]):
            count = min(len(control), to_made.shape[1])
            near = {
                "synthetic": to_made[:, rng.permutation(to_made.shape[1])[:count]].min(1),
                "control": to_real[:, rng.permutation(control)[:count]].min(1),
            }
            for k, name in product(COVERAGE_KS, near):
                found[k][name] += (near[name] < _kth(to_real[:, reference], k)) / (2 * HALVINGS)
    return found


def _rows_by_set(space, far):
    """The rows of `decile_rows` for every set of distances but the unseen ones, with "space" and "set"."""
    others = {name: of for name, of in far.items() if name != "unseen"}
    return [
        {"space": space, "set": name} | row for name, of in others.items() for row in decile_rows(far["unseen"], of)
    ]


def _owners(images):
    return None if images.subject_kind == "image" else images.subjects


def _mean(values, *, weights):
    return weights @ values / weights.sum(1)


def _all_distances(queries, reference):
    """Distances (N, M) of all pairs of uint8 images, exact."""
    found = scan(queries, reference, k=len(reference))
    distances = np.empty_like(found.distances)
    np.put_along_axis(distances, found.indices, found.distances, 1)
    return distances


def _kth(distances, k):
    """The k-th smallest (N,) of each row of distances (N, M)."""
    if k > distances.shape[1]:
        raise ValueError(f"There are {distances.shape[1]} real images to measure to, fewer than {k}: give more.")
    return np.partition(distances, k - 1, axis=1)[:, k - 1]


def _reach(queries, reference, k):
    """Distance (N,) of each query to its k-th nearest reference row; both (N, ...)."""
    return scan(queries, reference, k=k).distances[:, -1]


def _reach_of_others(images, subjects, k=DENSITY_K):
    """Distance (N,) of each image to its k-th nearest of another subject."""
    if len(np.unique(subjects)) == len(subjects):
        return scan(images, images, k=k, exclude_self=True).distances[:, -1]
    far = np.empty(len(images))
    for subject in np.unique(subjects):
        own = subjects == subject
        far[own] = _reach(images[own], images[~own], k)
    return far


def _drawn(images, most, rng):
    """At most so many images of a set, in its own order."""
    return images.subset(np.sort(rng.permutation(len(images))[:most]))


def _map_points(sets, seed):
    """{set: points (N, 2)} on a map that was fitted on "train" alone."""
    fitted = fit_umap(sets["train"].images, seed=seed)
    return {name: fitted.points if name == "train" else fitted.transform(s.images) for name, s in sets.items()}


def _save_points(folder, sets, points):
    found = {name: torch.tensor(of) for name, of in points.items()}
    found |= {f"{name}_labels": torch.tensor(s.labels) for name, s in sets.items()}
    save_file(found, Path(folder) / "points.safetensors")


def _trustworthiness(images, points, k=DENSITY_K):
    from sklearn.manifold import trustworthiness  # seconds to import

    if len(images) <= 2 * k:
        raise ValueError(f"Neighbourhoods of {k} need more than {2 * k} images on the map, not {len(images)}.")
    rows = images[:TRUSTED].reshape(min(len(images), TRUSTED), -1).astype(np.float32)
    return float(trustworthiness(rows, points[:TRUSTED], n_neighbors=k))
