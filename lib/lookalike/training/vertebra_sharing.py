"""What a release of vertebral units gives away and keeps, as its tolerance and its latent exclusion are turned up.

Paper: Sun, Plawinski et al. 2023 (PLOS ONE, 10.1371/journal.pone.0280316), Sec. 4 and 5, which ask for both; its
attacks (Sec. 6.5), with held-out images of the training images' own source as non-members. Chapter: pgan. The one
decision worth knowing: an attack is read both ways. Dropping what lies nearest to the training images leaves holes
around them, and an attacker who turns the scores round finds the members in the holes: an AUC below 0.5 is as much a
leak as one above.
"""

from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from lookalike.data import datasets
from lookalike.data.image_set import ImageSet
from lookalike.data.splits import subject_split
from lookalike.metrics.classifiers import FrozenBackbone, Training, fit, probabilities
from lookalike.metrics.extractors import Extractor, efficientnet_lite0
from lookalike.metrics.intervals import bootstrap
from lookalike.metrics.neighbours import nearest
from lookalike.metrics.scores import measure
from lookalike.privacy.attack import attack_result
from lookalike.privacy.exclusion import (
    NothingLeft,
    calibrated_radius,
    class_counts,
    distance_limit,
    nearest_centre,
    radius_that_redraws,
    sample_excluding,
    tolerant_subset,
)
from lookalike.privacy.projection import Projector, gan_access, normal_start, project
from lookalike.privacy.randomness import stream
from lookalike.privacy.reidentification import distance_attacks
from lookalike.training.cells import load_samples
from lookalike.training.mass_attacks import together
from lookalike.training.vertebrae import SAMPLING_BATCH, load_networks

ATTACKS = ("pairwise", "nearest", "distribution")
HEAD = Training(epochs=100)
NOTHING = {"images": 0, "nearest": None, "attacks": [], "utility": None}
RANDOM_LATENTS = 10_000  # from which the radius that redraws a share is read


# --- stages -------------------------------------------------------------------------------------------------


def tolerance_curve(
    folder, *, trained, data, image_size, shares, released, seed, feature_size, pool, rate=0.05,
    cache=None,
):  # fmt: skip
    """A stage: of a pool of made images those nearest to real ones are dropped, and `released` of the rest attacked.

    trained: the folder of `train_vertebrae`. pool: how many images are made, their classes in the training set's
    proportions; shares: of them, dropped in each class (0 up to 1). "rows", one per "nearest_to" and share, are those
    of `Bench.judge` with "tolerance", the smallest distance (RMS grey levels) between a released image and those it was
    measured against. "nearest_to" is what that is:

    "train": the training images. It leaves a hole around members alone: look for attacks that read "members far".
    "all": training and held-out images alike. Members and these non-members then lie in holes of one kind.
    "half": training images and the held-out images of half of the subjects; the other half's are the non-members. It
    shows whether "all" hides members from everyone, or only among the images that the owner happened to use.

    Also returns "pool" and, as "real", `Bench.real`.
    """
    train, held_out = load_sets(data, image_size)
    generator, labels = load_generator(trained), class_labels(train.labels, pool)
    made = make(generator, generator.noise(pool, stream(seed, "pool")), labels)
    rows, releases, others = [], {}, {}
    for nearest_to, (images, outside) in measured_against(train, held_out, seed).items():
        distances = nearest(made, images)[0]
        for share in shares:
            chosen = tolerant_subset(distances, labels.numpy(), share, released, seed)
            name = f"{nearest_to} {share:g}"
            releases[name], others[name] = chosen, outside
            rows.append({"nearest_to": nearest_to, "share": share, "tolerance": rms(distances[chosen].min(), made)})
    bench = Bench(train, held_out, efficientnet_lite0(feature_size, _device()), seed, rate, cache)
    judged = bench.judge(made, labels.numpy(), releases, others)
    return {"rows": [row | judged[name] for row, name in zip(rows, releases)], "pool": pool, "real": bench.real()}


def exclusion(
    folder, *, trained, data, image_size, released, projection_steps, seed, feature_size, rate=0.05, directions=8,
    redrawn=(0.1, 0.5), cache=None,
):  # fmt: skip
    """A stage: releases whose latents avoid those of the training images, attacked beside one that avoids nothing.

    The training images are projected, and each gets a radius (`calibrated_radius`). "rows", one per "variant", are
    those of `Bench.judge` with "radius", the median and largest over training images, and "redrawn", the share of
    latents that fell within. Variants: "none"; "calibrated"; and, for what exclusion costs and buys where it does
    bite, "redraws 0.1" and so on for each share of `redrawn`, one radius around all training images of a class. All
    variants have the same labels and the same first draws. A variant that leaves next to nothing to draw has a "note",
    no images, no attacks, and None for the rest.

    Returns also "projection" (`reach`), "calibration" (`calibration_row`) and "real" (`Bench.real`). Writes
    projection.safetensors (latents, errors, radii) and <variant>/samples.safetensors, a space as an underscore.
    """
    train, held_out = load_sets(data, image_size)
    generator, labels = load_generator(trained), class_labels(train.labels, released)
    synthesise, shape = gan_access(generator)
    known = torch.as_tensor(train.labels)
    projector = Projector(steps=projection_steps, seed=seed)
    found = project(train.images, synthesise, normal_start(shape), known, projector)
    calibrated = calibrated_radius(
        train.images, held_out.images, found.latents, known, synthesise, rate, directions=directions, seed=seed
    )
    _save(folder, "projection", latents=found.latents, errors=found.errors, radii=calibrated.radii)
    random = generator.noise(RANDOM_LATENTS, stream(seed, "radius")).cpu(), class_labels(known, RANDOM_LATENTS)
    radii = {"none": 0.0, "calibrated": calibrated.radii}
    radii |= {f"redraws {share:g}": radius_that_redraws(share, *random, found.latents, known) for share in redrawn}
    rows, made, releases = [], [], {}
    for variant, radius in radii.items():
        rows.append(
            {"variant": variant, "radius": {"median": float(np.median(radius)), "largest": float(np.max(radius))}}
        )
        try:
            latents, share = sample_excluding(
                generator.noise, labels, found.latents, known, radius, stream(seed, "released")
            )
        except NothingLeft as error:
            rows[-1] |= NOTHING | {"redrawn": error.redrawn, "note": str(error)}
            continue
        rows[-1] |= {"redrawn": share, "note": ""}
        releases[variant] = len(made) * released + np.arange(released)
        made.append(make(generator, latents, labels))
        _save(Path(folder, variant.replace(" ", "_")), "samples", images=made[-1], labels=labels)
    bench = Bench(train, held_out, efficientnet_lite0(feature_size, _device()), seed, rate, cache)
    judged = bench.judge(
        np.concatenate(made), labels.repeat(len(made)).numpy(), releases, dict.fromkeys(releases, held_out)
    )
    return {
        "rows": [row | judged.get(row["variant"], {}) for row in rows],
        "projection": reach(found, nearest_centre(*random, found.latents, known)[0]),
        "calibration": calibration_row(calibrated, train.images),
        "real": bench.real(),
    }


def judge_sets(folder, *, sets, data, image_size, seed, feature_size, rate=0.05, cache=None):
    """A stage: released sets side by side, {name: folder of a stage that left samples.safetensors}.

    All are attacked with as many images as the smallest has. Returns "rows": "name" and the keys of `Bench.judge`; and
    "real", `Bench.real`.
    """
    train, held_out = load_sets(data, image_size)
    bench = Bench(train, held_out, efficientnet_lite0(feature_size, _device()), seed, rate, cache)
    made = {name: load_samples(where) for name, where in sets.items()}
    count = min(len(labels) for _, labels in made.values())
    releases = {name: i * count + np.arange(count) for i, name in enumerate(made)}
    images, labels = (np.concatenate([part[i][:count] for part in made.values()]) for i in range(2))
    judged = bench.judge(images, labels, releases, dict.fromkeys(releases, held_out))
    return {"rows": [{"name": name} | row for name, row in judged.items()], "real": bench.real()}


# --- images -------------------------------------------------------------------------------------------------


def load_sets(data, image_size):
    """The training images, the members, and the held-out ones of the same source, its val and test splits."""
    held_out = [datasets.load(data, split, image_size) for split in ("val", "test")]
    return datasets.load(data, "train", image_size), together(held_out)


def load_generator(trained):
    """The trained generator of a `train_vertebrae` folder, on the GPU if there is one."""
    return load_networks(trained)[0].to(_device())


def class_labels(labels, n):
    """n labels (n,) in the proportions of labels (N,), sorted."""
    counts = class_counts(np.asarray(labels), n)
    return torch.tensor(list(counts)).repeat_interleave(torch.tensor(list(counts.values())))


@torch.no_grad()
def make(generator, latents, labels):
    """Images uint8 (N, C, S, S) of latents (N, Z) and labels (N,), rounded as released images are."""
    synthesise, _ = gan_access(generator)
    parts = zip(latents.split(SAMPLING_BATCH), labels.split(SAMPLING_BATCH))
    return np.concatenate([datasets.to_uint8(synthesise(z, y)) for z, y in parts])


def measured_against(train, held_out, seed):
    """What a pool is measured against and who are then the non-members: {"train", "all", "half": (images, ImageSet)}.

    See `tolerance_curve`.
    """
    used, unused = subject_split(held_out.subjects, (0.5, 0.5), seed)
    return {
        "train": (train.images, held_out),
        "all": (np.concatenate([train.images, held_out.images]), held_out),
        "half": (np.concatenate([train.images, held_out.images[used]]), held_out.subset(unused)),
    }


# --- judging ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """What every release of a stage is judged against: members, held-out images, and features for the utility.

    rate: of the held-out images that lie nearer to a training image than the limit, see `distance_limit`. cache: a
    folder for features.
    """

    train: ImageSet
    held_out: ImageSet
    extractor: Extractor
    seed: int
    rate: float = 0.05
    cache: str | None = None

    @cached_property
    def limit(self):
        return distance_limit(self.train.images, self.held_out.images, self.rate)

    @cached_property
    def backbone(self):
        return FrozenBackbone(self.extractor, flips=False, cache=self.cache, training=HEAD)

    @cached_property
    def tested(self):
        """Features (M, 1, D) of the held-out images."""
        return self.backbone.views(self.held_out.images, training=False)

    def judge(self, made, labels, releases, others):
        """One row by name per release, rows of `made` uint8 (N, C, S, S) with labels (N,); others: its non-members.

        Keys: "images"; "nearest" (`nearness`); "attacks" (`attack_rows`); "utility" (`utility`).
        """
        used = np.unique(np.concatenate(list(releases.values())))
        views = self.backbone.views(made[used])
        return {
            name: {
                "images": len(chosen),
                "nearest": self.nearness(made[chosen]),
                "attacks": attack_rows(self.train, others[name], made[chosen]),
                "utility": self.utility(views[np.searchsorted(used, chosen)], labels[chosen]),
            }
            for name, chosen in releases.items()
        }

    def real(self):
        """What real images give, to read a release beside: "limit" (RMS grey levels), "nearest", `nearness` of the
        held-out images, and "utility" of the training images.
        """
        return {
            "limit": rms(self.limit, self.train.images),
            "nearest": self.nearness(self.held_out.images),
            "utility": self.utility(self.backbone.views(self.train.images), self.train.labels),
        }

    def nearness(self, images):
        """Distances of images uint8 (N, C, S, S) to the nearest training image: "min" and "median", RMS grey levels (0
        to 255), and "within_limit", how many lie nearer than the limit.
        """
        distances = nearest(images, self.train.images)[0]
        middle = {"min": rms(distances.min(), images), "median": rms(np.median(distances), images)}
        return middle | {"within_limit": int((distances < self.limit).sum())}

    def utility(self, views, labels):
        """Macro AUROC (0.5 chance, 1 best) on the held-out images of a linear head trained on features (N, 1, D).

        {"value", "low", "high", "n"}: BCa over the held-out subjects, the head fixed. Held-out images that had a say in
        what was dropped ("all", "half") test all the same.
        """
        head, _ = fit(self.backbone, views, labels, len(self.held_out.classes), self.seed)
        statistic, scores = partial(measure, metric="auroc"), probabilities(head, self.tested)
        return bootstrap(statistic, self.held_out.labels, scores, subjects=_subjects(self.held_out))


def attack_rows(train, others, released):
    """pGAN's attacks in pixels on `train` against non-members `others`, each read both ways: a list of plain rows.

    auc, low, high: as in `attack_result`, over subjects. two_sided: |auc - 0.5|, 0 to 0.5: what an attacker gets who
    knows which way to read the score (it is above 0 by chance too, so look at the interval). reads: "members near", the
    interval above 0.5, the leak that the paper looks for; "members far", below it, the hole that a tolerance leaves; or
    "nothing". tpr, tpr_interval: at 1 % false alarms; tpr_turned: the same with the scores turned round. members_at,
    others_at: median distance to the nearest released image, RMS grey levels, of members and of non-members.
    """
    scores = distance_attacks(np.concatenate([train.images, others.images]), released)
    subjects, n = (_subjects(train), _subjects(others)), len(train)
    apart = {
        side: rms(np.median(minima), released)
        for side, minima in zip(("members_at", "others_at"), np.split(scores.minima, [n]))
    }
    rows = []
    for attack in ATTACKS:
        sides = np.split(getattr(scores, attack), [n])
        found = attack_result(attack, *sides, *subjects).row()
        turned = attack_result(attack, *(-side for side in sides), *subjects).row()
        low, high = found["interval"]
        rows.append({
            "attack": attack, "auc": found["auc"], "low": low, "high": high, "two_sided": abs(found["auc"] - 0.5),
            "reads": "members near" if low > 0.5 else "members far" if high < 0.5 else "nothing",
            "tpr": found["tpr_at_1pct_fpr"], "tpr_interval": found["tpr_interval"],
            "tpr_turned": turned["tpr_at_1pct_fpr"], "members": n, "others": len(others), **apart,
        })  # fmt: skip
    return rows


def reach(projection, apart):
    """What a projection found, medians: "error", RMS of pixels in [0, 1]; "norm" of the latents. And how far random
    latents lie from the nearest of their class, "random_to_nearest": "min", "median".
    """
    norms = projection.latents.norm(dim=1)
    distances = {"min": float(apart.min()), "median": float(apart.median())}
    error = float(np.median(np.sqrt(projection.errors)))
    return {"error": error, "norm": float(norms.median()), "random_to_nearest": distances}


def calibration_row(calibrated, images):
    """An `Exclusion` as plain values: limit (RMS grey levels), images, reached, beyond, chance, and the curve,
    distances and shares.
    """
    return {
        "limit": rms(calibrated.limit, images), "images": len(calibrated.radii), "reached": calibrated.reached,
        "beyond": calibrated.beyond, "chance": calibrated.chance,
        "distances": calibrated.distances.tolist(), "shares": calibrated.shares.tolist(),
    }  # fmt: skip


def rms(distance, images):
    """A Euclidean distance between images (N, C, H, W) per pixel, as root of the mean square."""
    return float(distance / np.prod(images.shape[1:]) ** 0.5)


def _subjects(images):
    return None if images.subject_kind == "image" else images.subjects


def _device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def _save(folder, name, **arrays):
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file({key: torch.as_tensor(value) for key, value in arrays.items()}, Path(folder) / f"{name}.safetensors")
