"""What the condition and a shared latent do: morphs between regions, and spines whose units belong together.

Paper: Sun, Plawinski et al. 2023 (PLOS ONE, 10.1371/journal.pone.0280316), Sec. 2.1, 5 and 6.4. Chapter: pgan. The
paper judges morphs by eye and leaves soft conditions and whole spines to the future. Here a plain classifier of real
units judges: logistic regression on pooled pixels, weak enough to be fitted to a hundred units. All are stages.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from lookalike.data import datasets
from lookalike.metrics.intervals import over_seeds
from lookalike.metrics.neighbours import nearest
from lookalike.metrics.scores import measure
from lookalike.models.acgan import morph
from lookalike.privacy.attack import auc
from lookalike.privacy.randomness import stream
from lookalike.training.mass_attacks import load_made
from lookalike.training.vertebra_sharing import load_sets, rms
from lookalike.training.vertebrae import load_networks, sample_spines

POOLED = 8  # px a side of what the judge and the coherence of spines look at


def judge_conditions(folder, *, trained, data, image_size, steps, latents, seed):
    """A stage: do made units show the region asked for, and what do conditions in between give?

    trained: {name: folder of `train_vertebrae`}. Returns "real": the judge's balanced accuracy on held-out real units,
    and "rows" by name: "balanced_accuracy" of the judge on the released set with its interval over classes' shares
    ("low", "high", 95 %, normal), "chance"; "along": mean probability of the far region at each of `steps` + 1 states
    of morphs between neighbouring regions, over `latents` latents; "off": their mean distance from the straight line, 0
    to 1, lower is smoother; "nearer": RMS grey levels by which middle states lie nearer to a training unit than the
    ends do (above 0: at least as near), with its 95 % interval over latents.
    """
    real, held_out = load_sets(data, image_size)
    judge = _fit_judge(real)
    rows = {}
    for name, where in trained.items():
        made = load_made(where, image_size, real)
        found, generator = balanced(judge, made), load_networks(where)[0]
        z = generator.noise(latents, stream(seed, "morphs"))
        strips = [
            datasets.to_uint8(morph(generator, z, k, k + 1, steps).flatten(0, 1)) for k in range(len(real.classes) - 1)
        ]
        along = np.stack([_towards(judge, strip, k + 1, steps) for k, strip in enumerate(strips)])
        apart = np.stack([_near(strip, real, steps) for strip in strips])
        middle, ends = apart[:, :, 1:-1].mean((0, 2)), apart[:, :, [0, -1]].mean((0, 2))
        rows[name] = found | {
            "along": along.mean((0, 1)).tolist(),
            "off": float(np.abs(along.mean(1) - np.linspace(0, 1, steps + 1)).mean()),
            "nearer": over_seeds(ends - middle, level=0.95),
        }
    return {"real": balanced(judge, held_out), "rows": rows}


def balanced(judge, images):
    """{"balanced_accuracy", "low", "high", "chance"} of a fitted judge on an ImageSet."""
    told = judge.predict_proba(pooled(images.images))
    value = measure(images.labels, told, metric="balanced_accuracy")
    right = told.argmax(1) == images.labels
    classes = np.unique(images.labels)
    parts = [right[images.labels == k] for k in classes]
    half = 1.96 * np.sqrt(sum(part.var() / len(part) for part in parts)) / len(classes)
    return {"balanced_accuracy": value, "low": value - half, "high": value + half, "chance": 1 / len(images.classes)}


def spine_coherence(folder, *, trained, data, image_size, units, spines, shares, seed):
    """A stage: do the units of a made spine hang together as those of a real one do?

    A unit is compared by its pooled pixels less the mean of its place in the spine. Coherence is the chance, 0.5 to 1,
    that two units of one spine lie nearer than units of two spines; 95 % intervals over spines. trained: {name:
    folder}; units: in a spine, from head down, the first of each subject (its first visit); shares: correlations of a
    made spine's latents (`spine_latents`). Returns "real" (held-out subjects), "rows": name, "shared", "coherence",
    "low", "high", and "matching" by name: the correlation that comes nearest to the real coherence, between those
    tried (None where none does). Writes samples.safetensors: one spine of each name at its matching correlation.
    """
    real, held_out = load_sets(data, image_size)
    place, first = _spines(real, units)
    own = coherence(*_centred(*_spines(held_out, units)[:1], place))
    labels, rows, matching, drawn = torch.as_tensor(first), [], {}, {}
    for name, where in trained.items():
        generator, curve = load_networks(where)[0], []
        for shared in shares:
            made = sample_spines(generator, labels, spines, shared, stream(seed, f"spines/{name}"))
            curve.append(coherence(*_centred(made, made)))
            rows.append({"name": name, "shared": shared, **curve[-1]})
        matching[name] = _matching(shares, [c["coherence"] for c in curve], own["coherence"])
        chosen = max(shares) if matching[name] is None else matching[name]
        drawn[name] = torch.as_tensor(sample_spines(generator, labels, 2, chosen, stream(seed, "shown")))
    save_file(drawn, Path(folder) / "samples.safetensors")
    return {"real": own, "rows": rows, "matching": matching}


def coherence(rows, whose):
    """Coherence of units (N, D) by spine (N,): {"coherence", "low", "high", "n"}, see `spine_coherence`."""
    apart = np.linalg.norm(rows[:, None] - rows[None], axis=2)
    same, own = whose[:, None] == whose[None], ~np.eye(len(rows), dtype=bool)
    values = []
    for spine in np.unique(whose):
        mine = whose == spine
        values.append(auc(-apart[mine][(same & own)[mine]], -apart[mine][~same[mine]]))
    found = over_seeds(values, level=0.95)
    return {"coherence": found["value"], "low": found["low"], "high": found["high"], "n": found["n"]}


def pooled(images):
    """Images uint8 (N, C, S, S) as rows of mean grey levels in squares, POOLED a side, in [0, 1]."""
    step = images.shape[-1] // POOLED
    if step * POOLED != images.shape[-1]:
        raise ValueError(f"image_size must be a multiple of {POOLED}, not {images.shape[-1]}.")
    parts = images.reshape(*images.shape[:2], POOLED, step, POOLED, step).mean((3, 5)) / 255
    return parts.reshape(len(images), -1)


def _fit_judge(real):
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    judge = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, class_weight="balanced", max_iter=500))
    return judge.fit(pooled(real.images), real.labels)


def _towards(judge, strip, label, steps):
    """Probability (N, steps + 1) of the far region along each morph."""
    return judge.predict_proba(pooled(strip))[:, label].reshape(-1, steps + 1)


def _near(strip, real, steps):
    """Distance (N, steps + 1) of each state to the nearest training unit, RMS grey levels."""
    return np.array([rms(d, strip) for d in nearest(strip, real.images)[0]]).reshape(-1, steps + 1)


def _spines(images, units):
    """Units uint8 (spines, units, C, S, S), the first of each subject, and the first subject's labels."""
    order = [np.flatnonzero(images.subjects == subject)[:units] for subject in dict.fromkeys(images.subjects.tolist())]
    whole = [rows for rows in order if len(rows) == units]
    if len(whole) < 2:
        raise ValueError(f"Fewer than two subjects of {images.name} have {units} units: lower units.")
    labels = images.labels[np.stack(whole)]
    alike = (labels == labels[0]).all(1)  # a spine with a unit missing has its regions elsewhere
    return images.images[np.stack(whole)[alike]], labels[0]


def _centred(spines, places):
    """Rows (N, D) of units less the mean unit at their place in `places`, and whose they are (N,)."""
    rows = pooled(spines.reshape(-1, *spines.shape[2:])).reshape(*spines.shape[:2], -1)
    means = pooled(places.reshape(-1, *places.shape[2:])).reshape(*places.shape[:2], -1).mean(0)
    return (rows - means).reshape(-1, rows.shape[2]), np.repeat(np.arange(len(spines)), spines.shape[1])


def _matching(shares, values, wanted):
    """The share at which rising values meet `wanted`, linear between; None outside."""
    if not min(values) <= wanted <= max(values):
        return None
    return float(np.interp(wanted, np.maximum.accumulate(values), shares))
