"""Is the synthetic image the patient? How much of the image that goes into MedSynth's generator comes out again.

Paper: Kanagavelu et al. 2024, "MedSynth", Eq. 1 (s = a x + (1 - a) g). Chapter: medsynth. The paper promises to share
without disclosing raw data, and yet x is a real image: a mask a of one is the best answer to every loss of the paper.
Here a trained generator gets images, and each synthetic image is compared with the one that it was made from (its
*source*) and with all others of the same set. Images that the generator was not trained on are asked too: a generator
that has learnt to pass its input on does so with anybody's.

Distances are root mean squares over pixels, of grey levels in [-1, 1]: 0 is the same image, 2 black against white.
All images are compared as they would be released, in 256 grey levels.
"""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from lookalike.data import datasets
from lookalike.metrics.intervals import bootstrap, clopper_pearson
from lookalike.metrics.neighbours import scan
from lookalike.metrics.pixels import ssim
from lookalike.training import medsynth

SHOWN = 8  # examples kept of each row
BATCH = 64
OUTPUTS = ("synthetic", "image", "mask")  # s, g and a


@dataclasses.dataclass(frozen=True)
class Passed:
    """What a generator made of some sources: uint8 (n, C, S, S) arrays, mask (n, 1, S, S) float in [0, 1]."""

    given: np.ndarray
    synthetic: np.ndarray
    image: np.ndarray
    mask: np.ndarray


def pass_through(folder, *, trained, data, image_size, images, seed, split_in="train", split_out="test", other=None):
    """A stage: what one generator (`trained`, a folder of phase I or II) makes of several kinds of input.

    "rows": real images of `split_in`, that it was trained with; real ones of `split_out`, that it never saw; noise with
    a label, each paired with a real image of `split_in` and of that label, which the generator did not get; and images
    of another site, {"data", "split"} as in `medsynth.train_phase_one` (None: the training's own, if it had one), with
    labels drawn at random. At most `images` of each, drawn at random. Each row is a `compare` of sources and outputs,
    with "input" ("real", "noise", "other"), "data", "split" and "given": whether the source went into the generator.
    Also "trained_with": the input of its training. Writes examples.safetensors: see `load_examples`.
    """
    generator, settings = medsynth.load_networks(trained)[0].to(_device()), medsynth.load_settings(trained)
    rng, draws = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    rows, examples = [], {}
    for kind, name, split in _inputs_asked(data, split_in, split_out, other or settings["other"]):
        pool = datasets.load(name, split, image_size)
        chosen = np.sort(rng.permutation(trained_rows(settings, name, split, len(pool)))[:images])
        made = pass_on(generator, kind, pool.subset(chosen), draws)
        row = compare(pool, chosen, made, seed)
        rows.append({"input": kind, "split": split, "data": name, "given": kind != "noise"} | row)
        examples |= _examples(f"{kind}/{split}", pool, chosen, made)
    save_file(examples, Path(folder) / "examples.safetensors")
    return {"trained_with": settings["source"], "rows": rows}


def trained_rows(settings, data, split, count):
    """The rows of a split of `count` images that networks with these settings (`medsynth.load_settings`) were trained
    on; all of them where it was another split or set.
    """
    own = (settings["data"], settings["split"]) == (data, split) and settings["rows"] is not None
    return np.asarray(settings["rows"]) if own else np.arange(count)


def load_examples(folder):
    """{"real/train" and so on: {"source", "given", "synthetic", "image", "mask"}} of `pass_through`: uint8 (8, C, S, S)
    or fewer, the mask float (8, 1, S, S) in [0, 1]. Of a set that may not be shown they may not be shown either.
    """
    found = {}
    for key, values in load_file(Path(folder) / "examples.safetensors").items():
        name, part = key.rsplit("/", 1)
        found.setdefault(name, {})[part] = values.numpy()
    return found


def compare(pool, chosen, made, seed=0):
    """Synthetic images against their sources, the rows `chosen` (n,) of `pool` (an `ImageSet`), beside all of `pool`.

    Means over images, each {"value", "low", "high", "n"}, 95 %, over subjects where they are known: "mask" (0 to 1; 1
    returns the input), "similarity" (SSIM, up to 1) and "distance" of s to its source, "image_similarity" and
    "image_distance" of g to it, "nearest": distance of s to its nearest real image, "real_nearest": distance of the
    source to its nearest other real image.
    Shares, in the same form: "own": of synthetic images that have no real image nearer than their source; "shuffled":
    the same when sources change places within their class, the control; "closer": of those nearer to their source
    than that is to any other real image. "chance": most that "own" can be expected to be where s knows the label alone.
    Also "images", "pool" (sizes) and "subjects".
    """
    sources = pool.subset(chosen)
    if len(chosen) < 2 or len(pool) < 2:
        raise ValueError(f"A comparison needs two images or more, not {len(chosen)} of {len(pool)}.")
    partner = _change_places(sources.labels, np.random.default_rng(seed))
    swapped = np.flatnonzero(partner >= 0)
    to_source, to_nearest = _apart(made.synthetic, sources.images), _squared(made.synthetic, pool.images, 1)
    to_other = _squared(sources.images, pool.images, 2)  # its first is the source itself, or an exact copy
    to_partner = _apart(made.synthetic[swapped], sources.images[partner[swapped]])
    whose = sources.subjects if pool.subject_kind != "image" else None
    means = {
        "mask": made.mask.reshape(len(chosen), -1).mean(1),
        "similarity": _similarities(sources.images, made.synthetic),
        "distance": _levels(to_source, pool),
        "image_similarity": _similarities(sources.images, made.image),
        "image_distance": _levels(_apart(made.image, sources.images), pool),
        "nearest": _levels(to_nearest, pool),
        "real_nearest": _levels(to_other, pool),
    }
    shares = {
        "own": (to_source <= to_nearest, whose),
        "shuffled": (to_partner <= to_nearest[swapped], None if whose is None else whose[swapped]),
        "closer": (to_source < to_other, whose),
    }
    return {
        **{name: _mean(values, whose, seed) for name, values in means.items()},
        **{name: _share(*values) for name, values in shares.items()},
        "chance": float((1 / np.bincount(pool.labels)[sources.labels]).mean()),
        "images": len(chosen), "pool": len(pool), "subjects": len(np.unique(sources.subjects)),
    }  # fmt: skip


def releases_inputs(row):
    """Whether what is released gives away what went in, and a sentence that says so, of a row of `pass_through`.

    True where the whole interval of "own" lies above the chance of a generator that knows the label alone, and above
    the shuffled pairs: wrong in 2.5 % of such generators at most. How much is given away the sentence says, in shares.
    False is no proof of safety: with few images a rare copy is missed.
    """
    own, blind = row["own"], max(row["chance"], row["shuffled"]["value"])
    found = own["low"] > blind
    said = (
        f"{own['value']:.1%} [{own['low']:.1%}, {own['high']:.1%}] of {row['images']:,} synthetic images have their "
        f"own source as the nearest of {row['pool']:,} real images (blind: {blind:.2%}), and "
        f"{row['closer']['value']:.1%} are nearer to it than it is to any other real image"
    )
    meaning = (
        "what went in can be told from what came out" if found else "no input is recognised more often than blindly"
    )
    return bool(found), f"{said}: {meaning}."


# --- steps --------------------------------------------------------------------------------------------------


def _inputs_asked(data, split_in, split_out, other):
    asked = [("real", data, split_in), ("real", data, split_out), ("noise", data, split_in)]
    return asked + ([("other", other["data"], other.get("split", "train"))] if other else [])


def _device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@torch.no_grad()
def pass_on(generator, kind, sources, draws):
    """`Passed` of sources, an `ImageSet`, for kind "real" or "other"; with noise in their place for "noise". `draws`: a
    generator on the CPU.
    """
    x, labels = datasets.as_tensor(sources), torch.as_tensor(sources.labels)
    if kind == "noise":
        x = medsynth.inputs("noise", labels, noise=generator.noise, generator=draws).cpu()
    if kind == "other":  # the other site's labels may mean something else, and training does not read them
        labels = torch.randint(generator.num_classes, (len(x),), generator=draws)
    batches = zip(x.split(BATCH), labels.split(BATCH))
    parts = [generator(some.to(_device()), wanted.to(_device())) for some, wanted in batches]
    s, a, g = (torch.cat(part).cpu() for part in zip(*parts))
    if not all(torch.isfinite(part).all() for part in (s, a, g)):
        raise ValueError("The generator's images are not finite: its training diverged; lower its learning rate.")
    return Passed(datasets.to_uint8(x), datasets.to_uint8(s), datasets.to_uint8(g), a.numpy())


def _examples(name, pool, chosen, made):
    parts = {"source": pool.images[chosen]} | vars(made)
    return {f"{name}/{part}": torch.tensor(values[:SHOWN]) for part, values in parts.items()}


def _change_places(labels, rng):
    """For each image (n,) the row of another one of its class, each taken once; -1 where its class has no other."""
    partner = np.full(len(labels), -1)
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        if len(rows) > 1:
            partner[rows] = np.roll(rows, 1)
    if (partner < 0).all():
        raise ValueError("No class has two of the chosen images, so that pairs cannot be shuffled: choose more images.")
    return partner


def _apart(first, second):
    """Squared distances (n,) of pairs of uint8 images, whole numbers."""
    gap = first.astype(np.int64) - second
    return np.square(gap).reshape(len(gap), -1).sum(1)


def _squared(images, pool, k):
    """Squared distance (n,) to the k-th nearest of `pool`, whole numbers."""
    return np.rint(np.square(scan(images, pool, k=k).distances[:, k - 1])).astype(np.int64)


def _levels(squared, pool):
    """Root mean squares over pixels, of grey levels in [-1, 1]."""
    return np.sqrt(squared / pool.images[0].size) / 127.5


def _similarities(first, second):
    return np.array([ssim(first[i : i + 1], second[i : i + 1]) for i in range(len(first))])


def _mean(values, subjects, seed):
    """Mean with its bootstrap interval; low and high None where it has none."""
    enough = subjects is not None and len(np.unique(subjects)) > 1
    found = bootstrap(_weighted_mean, values, subjects=subjects if enough else None, seed=seed)
    return {name: found[name] for name in ("value", "low", "high", "n")}


def _weighted_mean(values, *, weights):
    return weights @ values / weights.sum(1)


def _share(hits, subjects):
    """Share with Clopper-Pearson's interval; as if images of one subject went together, where subjects are known."""
    units = len(hits) if subjects is None else len(np.unique(subjects))
    value = float(hits.mean())
    low, high = clopper_pearson(round(value * units), units)
    return {"value": value, "low": min(low, value), "high": max(high, value), "n": units}
