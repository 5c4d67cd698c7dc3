"""Table 1 of the dermatology paper, each number with its reference set, its count of images and a control.

Paper: Carrasco Limeros et al. 2022 (arXiv 2208.11702), Sec. 3.3, Table 1. Chapter: stylegan2_dermatology. The paper
measures each GAN against the images that it was trained on: benign ones, malignant ones, or both. Such numbers do not
compare, for set and size differ. So every GAN stands here twice: as published ("own"), and like for like ("matched"):
the same real images, as many made ones, class by class and for both classes together, with held-out real images in the
same role. The GANs of one class each, joined, make a set of two classes beside a conditional GAN's.
"""

import copy
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from lookalike.data import datasets
from lookalike.metrics.colour import circular_distance, hue_weights, level_histograms, line_distance, shares_of
from lookalike.metrics.compared import half_rows, shrunk_interval
from lookalike.metrics.distances import frechet_distance, kernel_distance, precision_recall_density_coverage
from lookalike.metrics.extractors import efficientnet_lite0
from lookalike.metrics.features import features
from lookalike.metrics.intervals import bootstrap
from lookalike.metrics.paths import path_length, trimmed_mean
from lookalike.metrics.perceptual import stlpips
from lookalike.privacy.exclusion import class_counts
from lookalike.privacy.randomness import stream
from lookalike.training.lesions import load_networks
from lookalike.training.mass_attacks import load_made, together

NEIGHBOURS = 3  # of precision and recall, as published
LEAST = 12  # images of a class: a half of them still has more than three neighbours
CONTROL = "held-out real"
EPSILON = 1e-4  # of the path length
RESAMPLES = 400  # of the mean path length


def measure_gans(
    folder, *, data, image_size, trained, feature_size, path_pairs, seed, pairs=None, holdout_splits=("val",),
    halves=10, cache=None,
):  # fmt: skip
    """A stage: the measures of Table 1 for GANs {name: folder of `train_lesions`}, published and like for like.

    pairs: {name: [two names of `trained`]}, sets joined from GANs of one class each. holdout_splits: the control, real
    images that no GAN saw. Features are EfficientNet-Lite0's at `feature_size` px, so no number is a FID or a KID.

    "rows", by "arm" (a GAN, a pair, or `CONTROL`), "made" (a class or "all") and "reference" (real images of the train
    split: a class or "all"):
    own: the arm's classes against those images, the paper's row. Where "matched" is False, all images of both sides
    count, classes in the training set's proportions. Where it is True, real images are the same for all arms and as
    many made ones stand against them: class against class, and both together ("all" against "all"; a GAN of one class
    then lacks the other).
    real_images, made_images: how many. And the measures, each {"value", "low", "high"}: frechet_distance (lower is
    better), kernel_percent (the unbiased kernel distance times 100, about 0 for equal sets, lower), precision, recall
    (k = 3), density, coverage (higher), hue (degrees), saturation, brightness (0 to 1; see `colour_distances`, lower).
    Intervals, 95 %, of matched rows come from `halves` random halves (0: none) as in `metrics.compared`, real images
    halved by subject; rows that are not matched have one for the kernel distance alone, from its jackknife.

    "paths": path length in W by "arm" and "made", {"value", "low", "high", "pairs"}, lower is smoother: ends of a path,
    epsilon 1e-4, double precision, mean of the middle 98 % of `path_pairs` squared ST-LPIPS lengths with its percentile
    bootstrap. Published: 50,000 pairs, LPIPS. "all" mixes the classes' paths in the training set's proportions. Images
    smaller than the network reads are doubled until they fit, to "path_side" px.

    Also "features", "path_distance" (the networks' names), "classes", "k", and "matched_counts" by class and "all".
    """
    train, control, arms = load_arms(data, image_size, trained, holdout_splits)
    joined = arms | {name: _joined(name, parts, arms) for name, parts in (pairs or {}).items()} | {CONTROL: control}
    extractor = efficientnet_lite0(feature_size, device())
    views = {name: view(images, extractor, cache) for name, images in {"": train, **joined}.items()}
    bench = Bench(views.pop(""), views, train.classes, seed, halves)
    paths = _paths(arms, trained, pairs or {}, train, path_pairs, seed)
    return {
        "rows": [row for name in views for row in bench.rows(name)], **paths, "features": extractor.name,
        "classes": list(train.classes), "k": NEIGHBOURS, "matched_counts": bench.counts(),
    }  # fmt: skip


# --- the sets -----------------------------------------------------------------------------------------------


def load_arms(data, image_size, trained, holdout_splits):
    """The train split, the held-out splits together, and the made images {name: ImageSet} of `train_lesions`."""
    if not trained or CONTROL in trained:
        raise ValueError(f'Give at least one trained GAN, none of them called "{CONTROL}".')
    train = datasets.load(data, "train", image_size)
    outside = together([datasets.load(data, split, image_size) for split in holdout_splits])
    return train, outside, {name: load_made(str(where), image_size, train) for name, where in trained.items()}


def classes_of(images):
    """The class numbers that an ImageSet has images of, in order."""
    return np.unique(images.labels).tolist()


def owners(images):
    """Subjects (N,), or None where nobody knows them."""
    return None if images.subject_kind == "image" else images.subjects


def device():
    """Where networks run: the GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def enlarged(images, smallest):
    """Images (N, C, S, S) doubled, bilinear, until a side has `smallest` pixels; larger ones stay as they are."""
    while images.shape[-1] < smallest:
        images = F.interpolate(images, scale_factor=2, mode="bilinear", align_corners=False)
    return images


def _joined(name, parts, arms):
    if name in arms or len(parts) < 2 or not set(parts) <= set(arms):
        raise ValueError(f"{name!r} joins trained GANs under a new name; {parts} of {', '.join(arms)} do not.")
    owned = [label for part in parts for label in classes_of(arms[part])]
    if len(set(owned)) < len(owned):
        raise ValueError(f"{name!r} joins GANs that make the same class: join GANs of one class each.")
    return replace(together([arms[part] for part in parts]), name=name, split="all")


# --- distances ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """What is measured of N images: features (N, D), chroma by hue (N, bins), levels (2, N, 256), labels, subjects."""

    features: np.ndarray
    hues: np.ndarray
    levels: np.ndarray
    labels: np.ndarray
    subjects: np.ndarray | None = None

    def take(self, rows):
        subjects = None if self.subjects is None else self.subjects[rows]
        return View(self.features[rows], self.hues[rows], self.levels[:, rows], self.labels[rows], subjects)


def view(images, extractor, cache=None):
    """The `View` of an ImageSet; features of restricted images are never cached."""
    found = features(images.images, extractor, None if images.restricted else cache)
    return View(found, hue_weights(images.images), level_histograms(images.images), images.labels, owners(images))


def set_distances(real, made):
    """{measure: float} of two `View`s, the measures of `measure_gans`."""
    first, second = (side.levels.sum(1) for side in (real, made))
    return {
        "frechet_distance": frechet_distance(real.features, made.features),
        "kernel_percent": 100 * kernel_distance(real.features, made.features).value,
        **precision_recall_density_coverage(real.features, made.features, NEIGHBOURS),
        "hue": circular_distance(shares_of(real.hues), shares_of(made.hues)),
        "saturation": line_distance(first[0], second[0]),
        "brightness": line_distance(first[1], second[1]),
    }


def with_intervals(real, made, seed=0, halves=10):
    """{measure: {"value", "low", "high"}} of two `View`s; halves 0 gives no intervals."""
    if halves == 1 or halves < 0:
        raise ValueError(f"Intervals need two halves or more, or 0 for none, not {halves}.")
    rng, parts = np.random.default_rng(seed), []
    for _ in range(halves):
        rows = half_rows(len(real.labels), real.subjects, rng), half_rows(len(made.labels), made.subjects, rng)
        parts.append(set_distances(real.take(rows[0]), made.take(rows[1])))
    return {
        name: {"value": value} | _ends(name, value, [part[name] for part in parts])
        for name, value in set_distances(real, made).items()
    }


def _ends(name, value, parts):
    if not parts:
        return {"low": None, "high": None}
    low, high = shrunk_interval(name, value, parts)
    return {"low": max(low, 0.0) if name in ("hue", "saturation", "brightness") else low, "high": high}


@dataclass(frozen=True)
class Bench:
    """The real images and all arms as `View`s, and which rows of them are compared."""

    train: View
    arms: dict[str, View]
    classes: tuple[str, ...]
    seed: int
    halves: int

    def rows(self, name):
        """Rows of one arm: published, then class by class, then both classes together."""
        arm = self.arms[name]
        made = np.unique(arm.labels).tolist()
        own = self.classes[made[0]] if len(made) == 1 else "all"
        found = [{"arm": name, "made": own, "reference": own, "own": True, "matched": False} | self._published(arm)]
        for k in made:
            of_class = (self._drawn(side, [k], self.matched[k]) for side in (self.train, arm))
            found.append(self._row(name, self.classes[k], self.classes[k], own, *of_class))
        real = self._drawn(self.train, range(len(self.classes)), self.matched_all)
        return [*found, self._row(name, own, "all", own, real, self._drawn(arm, made, self.matched_all))]

    @property
    def matched(self):
        """{class: images that every arm which makes it, the control and the train split all have}."""
        counts = {}
        for k in range(len(self.classes)):
            having = [int((side.labels == k).sum()) for side in (self.train, *self.arms.values())]
            counts[k] = min(count for count in having if count)
            if counts[k] < LEAST:
                raise ValueError(f"There are {counts[k]} images of {self.classes[k]}, fewer than {LEAST}: make more.")
        return counts

    @property
    def matched_all(self):
        """Images of all classes in the training set's proportions that each arm has; one of a single class fills it."""
        shares = np.bincount(self.train.labels, minlength=len(self.classes)) / len(self.train.labels)
        most = min(int(count / shares[k] + 1e-9) for k, count in self.matched.items())
        single = [len(arm.labels) for arm in self.arms.values() if len(np.unique(arm.labels)) == 1]
        return min([most, *single])

    def counts(self):
        """`matched` and `matched_all` by name."""
        return {self.classes[k]: count for k, count in self.matched.items()} | {"all": self.matched_all}

    def _row(self, name, made, reference, own, real, other):
        kept = {"arm": name, "made": made, "reference": reference, "own": reference == own, "matched": True}
        found = with_intervals(real, other, self.seed, self.halves)
        return kept | {"real_images": len(real.labels), "made_images": len(other.labels)} | found

    def _published(self, arm):
        """All images of both sides; a set of several classes in the training set's proportions."""
        made = np.unique(arm.labels).tolist()
        real = self.train.take(np.isin(self.train.labels, made))
        shares = {k: (real.labels == k).mean() for k in made}
        count = min(int((arm.labels == k).sum() / share + 1e-9) for k, share in shares.items())
        other = self._drawn(arm, made, count)
        found = with_intervals(real, other, halves=0)
        error = 1.96 * 100 * kernel_distance(real.features, other.features).standard_error
        middle = found["kernel_percent"]["value"]
        found["kernel_percent"] |= {"low": middle - error, "high": middle + error}
        return {"real_images": len(real.labels), "made_images": len(other.labels)} | found

    def _drawn(self, side, wanted, count):
        """`count` images of the wanted classes at random, in the training set's proportions of these classes."""
        proportions = self.train.labels[np.isin(self.train.labels, list(wanted))]
        rng, rows = np.random.default_rng(self.seed), []
        for k, part in class_counts(proportions, count).items():
            rows.append(rng.permutation(np.flatnonzero(side.labels == k))[:part])
        return side.take(np.sort(np.concatenate(rows)))


# --- path length --------------------------------------------------------------------------------------------


def path_lengths(generator, distance, label, pairs, seed, batch_size=16):
    """Lengths (pairs,) of steps in W for one class (None: an unconditional generator), in double precision.

    generator: float32, in evaluation mode; distance: a `PerceptualDistance`, which is left as it was.
    """
    mapping, where = generator, next(generator.parameters()).device
    synthesis, apart = copy.deepcopy(generator).double(), copy.deepcopy(distance).double()

    def draw(labels, source):
        z = mapping.noise(len(labels), source).to(where)
        return mapping.map(z, None if label is None else labels.to(where)).double()

    def synthesise(latents, _):
        return enlarged(synthesis.synthesise(latents, noise="fixed"), distance.smallest)

    labels = torch.full((pairs,), label or 0)
    return path_length(
        synthesise, draw, apart, labels, stream(seed, "paths"), epsilon=EPSILON, batch_size=batch_size
    ).lengths


def _paths(arms, trained, pairs, train, path_pairs, seed):
    """{"paths", "path_distance", "path_side"} of `measure_gans`."""
    distance, lengths, side = stlpips("vgg", device()), {}, None
    for name, images in arms.items():
        generator = load_networks(trained[name])[0].to(device()).eval()
        side = enlarged(torch.zeros(1, 1, generator.image_size, generator.image_size), distance.smallest).shape[-1]
        lengths[name] = {
            k: path_lengths(generator, distance, k if generator.num_classes else None, path_pairs, seed)
            for k in classes_of(images)
        }
    for name, parts in pairs.items():
        lengths[name] = {k: of for part in parts for k, of in lengths[part].items()}
    rows = [row for name, of in lengths.items() for row in _path_rows(name, of, train, path_pairs)]
    return {"paths": rows, "path_distance": distance.name, "path_side": side}


def _path_rows(name, lengths, train, count):
    """Rows of one arm's lengths {class: (pairs,)}: each class, and where there are several, all of them."""
    parts = {train.classes[k]: of for k, of in lengths.items()}
    if len(lengths) > 1:
        counts = class_counts(train.labels[np.isin(train.labels, list(lengths))], count)
        parts["all"] = np.concatenate([lengths[k][:n] for k, n in counts.items()])
    mean = partial(bootstrap, trimmed_mean, method="percentile", resamples=RESAMPLES)
    rows = []
    for made, of in parts.items():
        found = mean(of)
        rows.append({"arm": name, "made": made, "pairs": len(of)} | {k: found[k] for k in ("value", "low", "high")})
    return rows
