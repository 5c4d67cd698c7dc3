"""Does a GAN of lesions repeat its training images? Projections with held-out ones beside them, and authenticity.

Paper: Carrasco Limeros et al. 2022 (arXiv 2208.11702), Sec. 3.3 and 4.2, Fig. 2 and 3. Chapter: stylegan2_dermatology.
The paper projects training images alone and calls the two that come out nearest "too close". The two nearest of any
set are two, so nothing follows from them. Here held-out images of the same classes are projected with the same budget,
and the question is whether training images come nearer. The paper's cosine distance is taken in a layer that feeds one
logit; it stands beside plain features and beside what the predicted class alone says. Authenticity, which the paper's
text turns round, is that of Alaa et al. 2022, with held-out images and planted copies as controls.
"""

import html
import itertools
import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from lookalike.data import datasets
from lookalike.metrics.diversity import fit_umap, tsne
from lookalike.metrics.extractors import efficientnet_lite0
from lookalike.metrics.features import features
from lookalike.metrics.intervals import clopper_pearson
from lookalike.metrics.neighbours import scan
from lookalike.metrics.perceptual import stlpips
from lookalike.metrics.plane_networks import LinearMap
from lookalike.metrics.scores import auroc
from lookalike.privacy.attack import attack_result
from lookalike.privacy.membership import authenticity
from lookalike.privacy.projection import Projector, cosine_distances, mean_latents, project_groups
from lookalike.privacy.randomness import stream
from lookalike.training.lesion_measures import classes_of, device, enlarged, load_arms, owners
from lookalike.training.lesions import chosen_images, load_networks
from lookalike.training.mass_attacks import load_made, together

SIDES = ("members", "held_out")
PERCEPTUAL = ("stlpips_vgg", "stlpips_alex", "pixels")
SCORES = ("error", "pixels", "cosine_layer", "cosine_features")
LAYER = 500  # units of the classifier's new layer, before the one of the logit
GRAIN = 2  # grey levels by which a planted copy differs from its original, at most
QUARTILES = {"min": 0.0, "q1": 0.25, "median": 0.5, "q3": 0.75}
NEIGHBOURHOOD = 10
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999", "#000000")
_numbers = itertools.count(1)


# --- projection ---------------------------------------------------------------------------------------------


def project_lesions(
    folder, *, data, image_size, trained, members, held_out, steps, seed, batch_size=32, perceptual="stlpips_vgg",
    optimise_noise=True, holdout_splits=("val", "test"), rows=None, feature_size=64, head_epochs=20, cache=None,
):  # fmt: skip
    """A stage: training and held-out images projected into W of one GAN, a folder of `train_lesions`.

    members, held_out: how many of each, classes in equal parts (the GAN's own classes). rows: of the train split, if
    the GAN was trained on these alone. Each starts at its class's mean w; `optimise_noise`: the noise maps are sought
    too. perceptual: the loss, "stlpips_vgg" (paper: LPIPS of VGG16), "stlpips_alex", which is faster, or "pixels" (mean
    square of [0, 1] pixels).

    "attack", by "made" ("all" or a class) and "score": does the generator come nearer to members? auc (0.5 is blind),
    low, high (95 %, over subjects), tpr at 1 % false alarms. Scores are minus: "error", the loss; "pixels", RMS of
    [0, 1]; "cosine_layer", "cosine_features". "distances", by "side" and "made": median error, median pixels, and
    "pixels_as_saved", of the image rendered with the generator's own noise, as the paper's code saves it.
    "cosine", by "side" and "space": mean, q1, median, q3 (0 to 2); "below_q1", a quarter by definition; "two_smallest"
    and "flagged", which is 2 on both sides; "own_nearest", the share of images whose own projection is the nearest of
    all of its side; "same_decision", the share of pairs with one predicted class, with the mean distances of these and
    of the others, and "correlation" of distance with agreement (1 or 0), "explained" its square.
    "head": the classifier (Sec. 3.2: D -> 500 -> 1 without activation, Adam 5e-4, batches of 32) on Lite0 features,
    trained on the train split as the paper's was: it knows members. "auc" on the held-out splits.
    Spaces: "layer", its 500 numbers, and "features".

    Writes projections.safetensors (`load_projections`): latents and numbers, and rows for originals, no pixels.
    """
    train, outside = _both_sides(data, image_size, holdout_splits, rows)
    labels = classes_of(load_made(str(trained), image_size, train))
    if len(train.classes) != 2:
        raise ValueError(f"The classifier tells two classes; {data} has {len(train.classes)}.")
    chosen = {
        "members": balanced_rows(train, members, labels, seed),
        "held_out": balanced_rows(outside, held_out, labels, seed),
    }
    originals = {side: whole.subset(chosen[side]) for side, whole in zip(SIDES, (train, outside))}
    generator = load_networks(trained)[0].to(device()).eval().requires_grad_(False)
    found = project_sides(generator, originals, steps, seed, batch_size, perceptual, optimise_noise)
    extract = partial(
        features, extractor=efficientnet_lite0(feature_size, device()), cache=None if train.restricted else cache
    )
    head = fit_head(extract(train.images), train.labels, head_epochs, seed)
    sides = {side: _side(generator, head, extract, originals[side], found[side]) for side in SIDES}
    _save_projections(folder, chosen, originals, found, sides)
    groups = {"all": labels} | ({train.classes[k]: [k] for k in labels} if len(labels) > 1 else {})
    parts = [(side, made, of) for made, of in groups.items() for side in SIDES]
    return {
        "attack": [row for made, of in groups.items() for row in _attacks(made, of, originals, sides)],
        "distances": [_middle(side, made, of, originals[side], sides[side]) for side, made, of in parts],
        "cosine": [cosine_row(side, space, sides[side]) for side in SIDES for space in ("layer", "features")],
        "head": {"auc": float(auroc(outside.labels, _logits(head, extract(outside.images)))), "epochs": head_epochs},
        "loss": perceptual, "steps": steps, "noise": optimise_noise, "start": "mean w of the image's own class",
    }  # fmt: skip


def load_projections(folder):
    """{"members" or "held_out": {"rows", "labels", "latents" (N, W), "error", "pixels", "pixels_as_saved",
    "cosine_layer", "cosine_features", "logit", "logit_projection"}} of a stage `project_lesions`, arrays by image.

    rows are those of the train split (or of its `rows`) and of the held-out splits one after the other.
    """
    found = load_file(Path(folder) / "projections.safetensors")
    return {
        side: {key.split("/")[1]: array.numpy() for key, array in found.items() if key.startswith(f"{side}/")}
        for side in SIDES
    }


def balanced_rows(images, n, classes, seed):
    """n rows of an ImageSet at random, in order, as many of each of `classes` (n is rounded down to a multiple)."""
    each, rng, rows = n // len(classes), np.random.default_rng(seed), []
    for k in classes:
        of_class = np.flatnonzero(images.labels == k)
        if not 2 <= each <= len(of_class):
            raise ValueError(
                f"{images.name} ({images.split}) has {len(of_class)} images of {images.classes[k]}; {each} of each "
                "class are asked for, and at least 2 are needed."
            )
        rows.append(rng.permutation(of_class)[:each])
    return np.sort(np.concatenate(rows))


def project_sides(generator, originals, steps, seed, batch_size, perceptual, optimise_noise):
    """{"members", "held_out": `Projection`} of ImageSets under these names, one budget for both."""
    if perceptual not in PERCEPTUAL:
        raise ValueError(f"perceptual must be one of {', '.join(PERCEPTUAL)}, not {perceptual!r}.")
    where, conditional = next(generator.parameters()).device, generator.num_classes > 0

    def synthesise(latents, labels, maps=None):
        noise = "fixed" if maps is None else [noise.to(where) for noise in maps]
        return generator.synthesise(latents.to(where), noise=noise)

    def mapping(z, labels):
        return generator.map(z.to(where), labels.to(where) if conditional else None)

    start = mean_latents(mapping, generator.latent_dim, max(1, generator.num_classes), seed=seed)
    projector = Projector(
        steps=steps, seed=seed, batch_size=batch_size, noise_shapes=generator.noise_shapes if optimise_noise else (),
        perceptual=None if perceptual == "pixels" else _perceptual(perceptual.removeprefix("stlpips_"), where),
    )  # fmt: skip
    images, labels = zip(*((originals[side].images, originals[side].labels) for side in SIDES))
    return dict(zip(SIDES, project_groups(*images, synthesise, start, *labels, projector)))


def fit_head(rows, labels, epochs, seed, lr=5e-4, batch_size=32):
    """The paper's head on features (N, D): 500 units, then one logit, above 0 for class 1; no activation between."""
    rows, labels = torch.as_tensor(rows), torch.as_tensor(labels).float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Sequential(nn.Linear(rows.shape[1], LAYER), nn.Linear(LAYER, 1))
    optimizer, order = torch.optim.Adam(head.parameters(), lr), stream(seed, "head")
    for _ in range(epochs):
        for part in torch.randperm(len(rows), generator=order).split(batch_size):
            loss = F.binary_cross_entropy_with_logits(head(rows[part])[:, 0], labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return head.eval().requires_grad_(False)


def cosine_row(side, space, numbers):
    """One row of "cosine" in `project_lesions`, from a side's arrays by image."""
    distances, same = numbers[f"cosine_{space}"], numbers["same_decision"]
    q1, median, q3 = (float(q) for q in np.quantile(distances, (0.25, 0.5, 0.75)))
    smallest = np.sort(distances)[:2]
    correlation = _correlation(distances, same)
    return {
        "side": side, "space": space, "images": len(distances), "mean": float(distances.mean()), "q1": q1,
        "median": median, "q3": q3, "below_q1": float((distances < q1).mean()),
        "two_smallest": smallest.tolist(), "flagged": len(smallest), "own_nearest": numbers[f"nearest_{space}"],
        "same_decision": float(same.mean()), "mean_same": _mean(distances[same]), "mean_other": _mean(distances[~same]),
        "correlation": correlation, "explained": None if correlation is None else correlation**2,
    }  # fmt: skip


def _both_sides(data, image_size, holdout_splits, rows=None):
    train = chosen_images(data, "train", image_size, None, rows)
    return train, together([datasets.load(data, split, image_size) for split in holdout_splits])


def _perceptual(net, where):
    distance = stlpips(net, where)
    return lambda made, targets: distance(*(enlarged(images, distance.smallest) for images in (made, targets)))


def _side(generator, head, extract, originals, projection):
    """What is said of each image of one side: arrays (N,), and "nearest_..." shares."""
    made = datasets.to_uint8(projection.images)
    own, other = extract(originals.images), extract(made)
    spaces = {"layer": [_layer(head, rows) for rows in (own, other)], "features": [own, other]}
    logits = [_logits(head, rows) for rows in (own, other)]
    with torch.no_grad():
        parts = projection.latents.to(next(generator.parameters()).device).split(64)
        saved = torch.cat([generator.synthesise(part, noise="fixed").cpu() for part in parts])
    found = {"error": projection.errors, "pixels": _rms(originals.images, made)}
    found |= {"pixels_as_saved": _rms(originals.images, datasets.to_uint8(saved))}
    found |= {"logit": logits[0], "logit_projection": logits[1], "same_decision": (logits[0] > 0) == (logits[1] > 0)}
    for space, rows in spaces.items():
        found[f"cosine_{space}"] = cosine_distances(*rows).distances
        found[f"nearest_{space}"] = _own_nearest(*rows)
    return found


def _layer(head, rows):
    """The 500 numbers (N, 500) that feed the logit: the paper's embedding."""
    return head[0](torch.as_tensor(rows)).numpy()


def _logits(head, rows):
    return head(torch.as_tensor(rows))[:, 0].numpy()


def _rms(first, second):
    """Root of the mean squared difference (N,) of uint8 images, in [0, 1] pixels."""
    return np.sqrt(np.square((first.astype(float) - second) / 255).mean((1, 2, 3)))


def _own_nearest(originals, projections):
    """Share of rows whose own projection has the smallest cosine distance to them among all projections."""
    units = [rows / np.linalg.norm(rows.astype(float), axis=1, keepdims=True) for rows in (originals, projections)]
    return float(((units[0] @ units[1].T).argmax(1) == np.arange(len(originals))).mean())


def _attacks(made, classes, originals, sides):
    kept = [np.isin(originals[side].labels, classes) for side in SIDES]
    subjects = [None if (whose := owners(originals[side])) is None else whose[k] for side, k in zip(SIDES, kept)]
    rows = []
    for score in SCORES:
        values = [-sides[side][score][k] for side, k in zip(SIDES, kept)]
        found = attack_result(score, *values, *subjects)
        rows.append(
            {"made": made, "score": score, "auc": found.auc, "low": found.low, "high": found.high,
             "tpr_at_1pct_fpr": found.operating[0].tpr, "members": len(values[0]), "held_out": len(values[1])}
        )  # fmt: skip
    return rows


def _middle(side, made, classes, originals, numbers):
    kept = np.isin(originals.labels, classes)
    medians = {name: float(np.median(numbers[name][kept])) for name in ("error", "pixels", "pixels_as_saved")}
    return {"side": side, "made": made, "images": int(kept.sum())} | medians


def _correlation(distances, same):
    """Pearson's, or None where one of both is constant."""
    if same.all() or not same.any() or np.ptp(distances) == 0:
        return None
    return float(np.corrcoef(distances, same)[0, 1])


def _mean(values):
    return float(values.mean()) if len(values) else None


def _save_projections(folder, chosen, originals, found, sides):
    arrays = {}
    for side in SIDES:
        by_image = {name: of for name, of in sides[side].items() if isinstance(of, np.ndarray)}
        by_image |= {"rows": chosen[side], "labels": originals[side].labels, "latents": found[side].latents.numpy()}
        arrays |= {f"{side}/{name}": torch.as_tensor(of) for name, of in by_image.items()}
    save_file(arrays, Path(folder) / "projections.safetensors")


# --- authenticity -------------------------------------------------------------------------------------------


def authenticity_of(
    folder, *, data, image_size, trained, feature_size, seed=0, holdout_splits=("val",), copies=0.1, shown=400,
    space="pca", closest=5, perplexity=30.0, cache=None,
):  # fmt: skip
    """A stage: how much of each GAN's set {name: folder of `train_lesions`} is new, and maps of it with real images.

    All in EfficientNet-Lite0 features ("features"), against the train split's images of the classes that the GAN makes.
    "rows", by "arm" and "made" (a class, and "all" for several): share, low, high: authentic images, farther from their
    nearest training image than that one from its nearest other (Alaa et al.; higher is less copying, but noise reaches
    1); control, control_low, control_high: held-out real images, what an innocent GAN has; planted, planted_low,
    planted_high: the arm's share after a part `copies` of it became copies of training images, changed by at most 2
    grey levels: it must be lower, by about copies times share. Intervals: 95 %, Clopper-Pearson.
    "near": per arm the distances to the nearest training image of made and of held-out images, min, q1, median, q3;
    "nearer": the share of made images nearer than all but 1 % of the held-out ones (0.01 where nothing is copied); and
    "closest", the pairs to look at: made (row), real (row of the train split), distance, to_other (of that real image).

    Maps of at most `shown` images per set: t-SNE in the plane, all sets together, and three axes, "pca" or "umap",
    fitted on training images alone. "trustworthiness" of both, 0 to 1: how far neighbours there are neighbours in
    features. Writes embedding.safetensors (`load_embedding`) and neighbours.safetensors (`load_neighbours`).
    """
    if not 0 < copies < 1:
        raise ValueError(f"copies is a share of the images between 0 and 1, not {copies}.")
    if taken := {"train", "held_out"} & set(trained):
        raise ValueError(f"{', '.join(taken)} is a set of real images here: call the GAN something else.")
    train, outside, arms = load_arms(data, image_size, trained, holdout_splits)
    extractor = efficientnet_lite0(feature_size, device())
    extract = partial(features, extractor=extractor, cache=None if train.restricted else cache)
    of = {name: extract(s.images) for name, s in {"train": train, "held_out": outside, **arms}.items()}
    rows, near, found = [], [], {}
    for name, made in arms.items():
        rows += _authenticity_rows(name, made, train, outside, of, extract, copies, seed)
        found[name] = _neighbours(made, train, outside, of[name], of["train"], of["held_out"])
        near.append({"arm": name} | _near(*found[name], closest))
    save_file(
        {f"{name}/{key}": torch.tensor(near_of[key]) for name, (near_of, _) in found.items() for key in near_of},
        Path(folder) / "neighbours.safetensors",
    )
    sets = {"train": train, "held_out": outside, **arms}
    trust = _save_embedding(folder, sets, of, shown, space, perplexity, seed)
    return {"rows": rows, "near": near, "trustworthiness": trust, "space": space, "features": extractor.name}


def load_neighbours(folder):
    """{arm: {"distance" (N,), "real" (N,), "to_other" (N,)}} of every made image: see `authenticity_of`."""
    return _by_name(load_file(Path(folder) / "neighbours.safetensors"))


def load_embedding(folder):
    """{"train", "held_out" or arm: {"plane" (N, 2), "space" (N, 3), "labels" (N,), "rows" (N,)}}: where images fell."""
    return _by_name(load_file(Path(folder) / "embedding.safetensors"))


def _by_name(arrays):
    found = {}
    for key, array in sorted(arrays.items()):
        name, part = key.rsplit("/", 1)
        found.setdefault(name, {})[part] = array.numpy()
    return found


def _authenticity_rows(name, made, train, outside, of, extract, copies, seed):
    """Rows of one arm, by class and, for several classes, together."""
    labels, rows = classes_of(made), []
    groups = {train.classes[k]: [k] for k in labels} | ({"all": labels} if len(labels) > 1 else {})
    rng = np.random.default_rng(seed)
    for group, classes in groups.items():
        own, real, held = (np.flatnonzero(np.isin(s.labels, classes)) for s in (made, train, outside))
        count = max(1, round(copies * len(own)))
        copied = extract(_with_grain(train.images[rng.choice(real, count)], rng))
        both = np.concatenate([of[name][own], copied])
        found = authenticity(both, of["train"][real], of["held_out"][held])
        plain, planted = found.authentic[: len(own)], found.authentic[: len(own)].copy()
        planted[rng.permutation(len(own))[:count]] = found.authentic[len(own) :]
        row = {"arm": name, "made": group, "images": len(own), "copies": count}
        row |= _share("share", "", plain) | _share("planted", "planted_", planted)
        ends = {"control_low": found.control_low, "control_high": found.control_high}
        rows.append(row | {"control": found.control} | ends)
    return rows


def _share(name, prefix, flags):
    low, high = clopper_pearson(int(flags.sum()), len(flags))
    return {name: float(flags.mean()), f"{prefix}low": low, f"{prefix}high": high}


def _with_grain(images, rng):
    noisy = images.astype(int) + rng.integers(-GRAIN, GRAIN + 1, images.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8)


def _neighbours(made, train, outside, rows, train_rows, outside_rows):
    """{"distance", "real", "to_other"} of made images, and the distances of held-out ones of the same classes."""
    classes = classes_of(made)
    real = np.flatnonzero(np.isin(train.labels, classes))
    reference = train_rows[real]
    found = scan(rows, reference)
    others = scan(reference, reference, exclude_self=True).distances[:, 0]
    nearest = found.indices[:, 0]
    held = scan(outside_rows[np.isin(outside.labels, classes)], reference).distances[:, 0]
    return {"distance": found.distances[:, 0], "real": real[nearest], "to_other": others[nearest]}, held


def _near(of_made, of_held_out, closest):
    distances, first = of_made["distance"], np.argsort(of_made["distance"], kind="stable")[:closest]
    spread = {
        side: {name: float(np.quantile(values, q)) for name, q in QUARTILES.items()}
        for side, values in (("made", distances), ("held_out", of_held_out))
    }
    pairs = [
        {"made": int(i), "real": int(of_made["real"][i])}
        | {key: float(of_made[key][i]) for key in ("distance", "to_other")}
        for i in first
    ]
    return spread | {"nearer": float((distances < np.quantile(of_held_out, 0.01)).mean()), "closest": pairs}


def _save_embedding(folder, sets, of, shown, space, perplexity, seed):
    if space not in ("pca", "umap"):
        raise ValueError(f'space is "pca" or "umap", not {space!r}.')
    rng = np.random.default_rng(seed)
    chosen = {name: np.sort(rng.permutation(len(s))[:shown]) for name, s in sets.items()}
    rows = {name: of[name][chosen[name]] for name in sets}
    plane = dict(zip(rows, tsne(*rows.values(), perplexity=perplexity, seed=seed)))
    if space == "pca":
        fitted = LinearMap.principal(rows["train"], 3)
    else:
        fitted = fit_umap(rows["train"], seed=seed, n_components=3)
    solid = {name: np.asarray(fitted.transform(part), np.float32) for name, part in rows.items()}
    arrays = {}
    for name in sets:
        parts = {"plane": plane[name], "space": solid[name], "labels": sets[name].labels[chosen[name]]}
        arrays |= {f"{name}/{part}": torch.tensor(array) for part, array in (parts | {"rows": chosen[name]}).items()}
    save_file(arrays, Path(folder) / "embedding.safetensors")
    return {"plane": _trust(rows, plane), "space": _trust(rows, solid)}


def _trust(rows, points):
    from sklearn.manifold import trustworthiness  # seconds to import

    before, after = (np.concatenate(list(parts.values())) for parts in (rows, points))
    if len(before) <= 2 * NEIGHBOURHOOD:
        raise ValueError(f"Maps with neighbourhoods of {NEIGHBOURHOOD} need more images, not {len(before)}.")
    return float(trustworthiness(before, after, n_neighbors=NEIGHBOURHOOD))


# --- the figure ---------------------------------------------------------------------------------------------


def interactive_3d(points, groups, hover=None, label="Points in three dimensions", size=460):
    """Points (N, 3) with group names (N,) as HTML to turn about: by dragging, or by the arrow keys; + and - zoom.

    hover: a text (N,) for each point, shown when the pointer is near it. A group's button hides and shows it. `label`
    says what is seen to those who cannot see it. One canvas and one script, nothing is loaded; a page may hold several.
    At most eight groups. Coordinates are centred, and rounded to a thousandth of the largest.
    """
    points, groups = np.asarray(points, float), [str(group) for group in groups]
    names = list(dict.fromkeys(groups))
    if points.ndim != 2 or points.shape[1] != 3 or len(points) != len(groups) or not len(points):
        raise ValueError(f"Give points (N, 3) and N group names, not {points.shape} and {len(groups)}.")
    if not np.isfinite(points).all() or len(names) > len(COLOURS):
        raise ValueError(f"Points must be finite, in at most {len(COLOURS)} groups; these have {len(names)}.")
    if hover is not None and len(hover) != len(points):
        raise ValueError(f"Give one text for each of the {len(points)} points, not {len(hover)}.")
    centred = points - (points.max(0) + points.min(0)) / 2
    whole = np.rint(1000 * centred / (np.abs(centred).max() or 1)).astype(int)
    data = {
        "p": whole.ravel().tolist(), "g": [names.index(group) for group in groups], "c": COLOURS[: len(names)],
        "t": None if hover is None else [str(text) for text in hover],
    }  # fmt: skip
    name = f"lookalike-3d-{next(_numbers)}"
    buttons = "".join(
        f'<button type="button" data-group="{i}" aria-pressed="true" style="margin:2px;border:1px solid #888;'
        f'border-radius:4px;background:none;color:inherit"><span style="color:{COLOURS[i]}">&#9679;</span> '
        f"{html.escape(group)}</button>"
        for i, group in enumerate(names)
    )
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    hint = f"{html.escape(label, quote=True)}. Drag or press the arrow keys to turn, + and - to zoom."
    return (
        f'<div id="{name}"><canvas width="{size}" height="{size}" tabindex="0" role="img" aria-label="{hint}" '
        f'style="max-width:100%;touch-action:none;cursor:grab"></canvas><div class="hover" style="min-height:1.4em" '
        f'aria-live="polite"></div><div>{buttons}</div></div>\n<script>({SCRIPT})("{name}",{text})</script>'
    )


SCRIPT = """(id, data) => {
  const root = document.getElementById(id), canvas = root.querySelector("canvas"), pen = canvas.getContext("2d");
  const shown = data.c.map(() => true), half = canvas.width / 2, seen = [];
  let turn = 0.6, tilt = 0.4, zoom = 1, held = null;
  const draw = () => {
    const [ct, st, ci, si] = [Math.cos(turn), Math.sin(turn), Math.cos(tilt), Math.sin(tilt)];
    seen.length = 0;
    data.g.forEach((group, i) => {
      if (!shown[group]) return;
      const [x, y, z] = data.p.slice(3 * i, 3 * i + 3).map(v => v / 1000);
      const across = ct * x - st * y, back = st * x + ct * y;
      const depth = ci * back - si * z, up = si * back + ci * z;
      const scale = 0.55 * half * zoom * 4 / (4 + depth);
      seen.push({i, group, depth, x: half + scale * across, y: half - scale * up});
    });
    seen.sort((a, b) => b.depth - a.depth);
    pen.clearRect(0, 0, canvas.width, canvas.height);
    for (const s of seen) {
      pen.globalAlpha = Math.max(0.25, Math.min(1, 0.7 - 0.3 * s.depth));
      pen.fillStyle = data.c[s.group];
      pen.beginPath();
      pen.arc(s.x, s.y, 3, 0, 2 * Math.PI);
      pen.fill();
    }
  };
  const turned = (dx, dy) => {
    turn += dx;
    tilt = Math.max(-1.5, Math.min(1.5, tilt + dy));
    draw();
  };
  const near = event => {
    const box = canvas.getBoundingClientRect(), by = canvas.width / box.width;
    const x = (event.clientX - box.left) * by, y = (event.clientY - box.top) * by;
    let best = null, least = 64;
    for (const s of seen) {
      const far = (s.x - x) ** 2 + (s.y - y) ** 2;
      if (far <= least) [best, least] = [s, far];
    }
    root.querySelector(".hover").textContent = best ? data.t[best.i] : "";
  };
  canvas.addEventListener("pointerdown", event => {
    held = [event.clientX, event.clientY];
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointerup", () => { held = null; });
  canvas.addEventListener("pointercancel", () => { held = null; });
  canvas.addEventListener("pointermove", event => {
    if (held) {
      turned((event.clientX - held[0]) / 120, (event.clientY - held[1]) / 120);
      held = [event.clientX, event.clientY];
    } else if (data.t) near(event);
  });
  const keys = {ArrowLeft: [-0.1, 0], ArrowRight: [0.1, 0], ArrowUp: [0, -0.1], ArrowDown: [0, 0.1]};
  canvas.addEventListener("keydown", event => {
    if (keys[event.key]) turned(...keys[event.key]);
    else if (event.key === "+" || event.key === "-") {
      zoom *= event.key === "+" ? 1.1 : 1 / 1.1;
      draw();
    } else return;
    event.preventDefault();
  });
  root.querySelectorAll("button").forEach(button => button.addEventListener("click", () => {
    const group = Number(button.dataset.group);
    shown[group] = !shown[group];
    button.setAttribute("aria-pressed", shown[group]);
    button.style.opacity = shown[group] ? 1 : 0.4;
    draw();
  }));
  draw();
}"""
