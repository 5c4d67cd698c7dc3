"""What a lesion classifier looks at, and what becomes of it when a generator's frames are taken away.

Paper: Carrasco Limeros et al. 2022 (arXiv 2208.11702), Sec. 4.3, Fig. 4 and 5. Chapter: stylegan2_dermatology. The
methods are those of `lookalike.lesion_explanations`. Where the paper judges by eye, frames are planted here: phantoms
carry them by a known chance in each class, and each finding has its twin on images without.
"""

import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from lookalike.data import datasets, phantoms
from lookalike.lesion_explanations import (
    MARGIN,
    activations,
    disc,
    edge_cases,
    frame_ring,
    heat_share,
    sefa,
    sensitivities,
    tcav,
    xrai,
)
from lookalike.metrics import as_images, to_unit
from lookalike.metrics.classifiers import SmallNetwork, Training, fit, probabilities
from lookalike.metrics.intervals import bootstrap, clopper_pearson, holm, over_seeds
from lookalike.metrics.scores import auroc, measure
from lookalike.privacy.randomness import stream
from lookalike.training.lesion_confounds import frame_score
from lookalike.training.lesions import load_networks

CONCEPTS = ("frame", "hairs", "darkness")
HAIRY, DARK = 4, 0.75  # factors of the phantoms from which an image shows the concept
POOL = 16  # images drawn for each image of a rare concept: one phantom in seven is hairy
INNER = 0.7  # the disc that no frame reaches; the image's half side is 1
WAYS = ("sefa", "means", "hyperplane", "random")
ACCURACY = partial(measure, metric="accuracy")
BALANCED = partial(measure, metric="balanced_accuracy")
_TRAIN, _TEST, _POOL, _JUDGE = 7000, 8000, 9000, 10000  # added to a seed: other patients for each purpose
_BATCH = 64


# --- what the classifier looks at ----------------------------------------------------------------------------


def concepts(folder, *, image_size, counts, share, seed, epochs=12, width=16, layer="trunk.11", steps=5):
    """A stage: TCAV of frame, hairs and darkness, for a classifier that saw frames on melanomas and one that saw none.

    Both learn the same lesions; in the first, melanomas carry a frame with the chance `share`. counts: {"train":
    images, "concept": images per concept and per random set, "pairs": of random sets, "inputs": melanomas without
    frames whose sensitivity counts}. layer: a name of the network's `named_modules`, the last convolution. The random
    sets and the other concepts have no frames; hairs and darkness are free of the class, frames are planted in both.

    Returns "rows", one per network ("frames", "no frames") and concept: TCAV's "score" and the "derivative" as means
    over the random sets (see `tcav`), "random_score", "random_derivative", "accuracy", "random_accuracy"; "above", how
    far the derivative lies above the random ones', with its 95 % interval over the random sets; p of the differences,
    "score_p" (Student's, the paper's test; None where all differ alike), "derivative_p", "accuracy_p" (exact flips) and
    "p_holm", derivative_p corrected over all rows; "effect", the truth that TCAV is to find: the mean logit difference
    of the concept's images and the random ones, class by class, above 0 if they look more like melanoma; and
    "comes_out": the derivative is above the random ones' with p_holm < 0.05, and so is the accuracy (p < 0.05). The p
    values treat the random sets as random, not the training: several seeds are needed for that. "accuracy" by network
    on unframed phantoms of other patients.
    """
    _check_share(share)
    sets = _concept_sets(counts, image_size, seed)
    test = phantoms.dermoscopy(2 * counts["inputs"], seed + _TEST, image_size=image_size).image_set
    rows, accuracy = [], {}
    for name, chance in (("frames", share), ("no frames", 0.0)):
        network = _lesion_network(counts["train"], chance, image_size, seed, epochs, width)
        accuracy[name] = float((_logits(network, test.images).argmax(1) == test.labels).mean())
        rows += _concept_rows(name, network, _module(network, layer), test.images[test.labels == 1], sets, steps)
    corrected = holm([row["derivative_p"] for row in rows])
    for row, p in zip(rows, corrected):
        above = row["derivative"] > row["random_derivative"] and p < 0.05
        found = row["accuracy"] > row["random_accuracy"] and row["accuracy_p"] < 0.05
        row |= {"p_holm": float(p), "comes_out": bool(above and found)}
    return {"rows": rows, "accuracy": accuracy}


def heat(folder, *, image_size, counts, share, seed, epochs=12, width=16, steps=25):
    """A stage: where XRAI finds the evidence for melanoma, with and without planted frames.

    Networks as in `concepts`; counts: {"train": images, "shown": melanomas}. Each network sees the same melanomas with
    and without a frame. Returns "rows" by "network" and "images" ("framed", "plain"): "ring" and "lesion", the mean
    share of positive heat outside the unit disc and within the lesion's radius (`over_seeds` over the images, 95 %),
    "ring_area", "lesion_area", what even heat would give, and "empty", images without positive heat, left out. A lesion
    is taken as a disc in the middle, of its known radius: its outline and shift are not followed.
    Writes heat.safetensors: see `load_heat`.
    """
    _check_share(share)
    shown = {
        kind: phantoms.dermoscopy(2 * counts["shown"], seed + _TEST, image_size=image_size, frame_probability=chance)
        for kind, chance in (("framed", (1.0, 1.0)), ("plain", (0.0, 0.0)))
    }
    regions = {"ring": frame_ring(image_size), "lesion": disc(image_size, shown["plain"].factors["radius"][1::2])}
    rows, arrays = [], {}
    for network_name, chance in (("frames", share), ("no frames", 0.0)):
        network = _lesion_network(counts["train"], chance, image_size, seed, epochs, width)
        for kind, made in shown.items():
            images = made.image_set.images[1::2]  # the melanomas
            maps, masks = xrai(_softmax(network), images, np.ones(len(images), int), steps=steps)
            rows.append({"network": network_name, "images": kind} | _heat_row(maps, regions))
            name = f"{network_name.replace(' ', '_')}_{kind}"
            arrays |= {kind: images, f"{name}_maps": maps, f"{name}_masks": masks}
    save_file(arrays, Path(folder) / "heat.safetensors")
    return {"rows": rows}


def load_heat(folder):
    """What `heat` kept, numpy: "framed" and "plain", uint8 (N, 3, S, S), and by network and images, such as
    "no_frames_framed", "..._maps", float32 (N, S, S), and "..._masks", bool.
    """
    return load_file(Path(folder) / "heat.safetensors")


def edges(folder, *, data, image_size, shown, seed, margin=MARGIN, epochs=12, width=16, steps=25):
    """A stage: the edge cases of a classifier trained on `data`, and where it looks in them (Fig. 4).

    Trained on the train split, read on the test split. Returns "images" of the test split; "edge", "wrong": shares with
    their 95 % intervals over subjects where the set knows them; "edge_by_class", shares by class name; and by kind,
    "edge" and "sure" (the surest right ones), at most `shown` each, "middle": the mean share of XRAI's positive heat
    for the true class within half the image's half side, with its interval over images, None where no image is of that
    kind; and "middle_area", what even heat gives. Writes edges.safetensors: see `load_edges`; no image is in it.
    """
    train, test = datasets.load(data, "train", image_size), datasets.load(data, "test", image_size)
    classifier = SmallNetwork(width, Training(epochs=epochs))
    network, _ = fit(classifier, classifier.views(train.images), train.labels, len(train.classes), seed)
    found = probabilities(network, classifier.views(test.images))
    edge, wrong = edge_cases(found, test.labels, margin), found.argmax(1) != test.labels
    own, is_edge = found[np.arange(len(test)), test.labels], np.isin(np.arange(len(test)), edge)
    surest = np.argsort(-own, kind="stable")
    rows = {"edge": edge[:shown], "sure": surest[~(wrong | is_edge)[surest]][:shown]}
    maps = {k: xrai(_softmax(network), test.images[r], test.labels[r], steps=steps) for k, r in rows.items() if len(r)}
    _save_edges(folder, rows, maps, own)
    middle = disc(image_size, 0.5)
    return {
        "images": len(test), "edge": _share_of(is_edge, test), "wrong": _share_of(wrong, test),
        "edge_by_class": {c: float(is_edge[test.labels == k].mean()) for k, c in enumerate(test.classes)},
        "middle": {k: _mean_of(heat_share(maps[k][0], middle)) if k in maps else None for k in rows},
        "middle_area": float(middle.mean()),
    }  # fmt: skip


def load_edges(folder):
    """What `edges` kept, numpy, by kind "edge" and "sure": "..._rows" of the test split, "..._probability" of the true
    class, "..._maps", float32 (N, S, S), and "..._masks", bool.
    """
    return load_file(Path(folder) / "edges.safetensors")


def _check_share(share):
    if not 0 < share <= 1:
        raise ValueError(f"share is the chance of a frame on a melanoma, above 0 up to 1, not {share}.")


def _lesion_network(images, share, image_size, seed, epochs, width, benign=0.0):
    """A small classifier taught phantoms of which melanomas carry a frame with the chance `share`."""
    frames = (benign, share)
    lesions = phantoms.dermoscopy(images, seed + _TRAIN, image_size=image_size, frame_probability=frames).image_set
    return _fitted(lesions.images, lesions.labels, seed, epochs, width)


def _fitted(images, labels, seed, epochs, width):
    classifier = SmallNetwork(width, Training(epochs=epochs))
    return fit(classifier, classifier.views(images), labels, 2, seed)[0].eval()


def _module(network, name):
    found = dict(network.named_modules())
    if name not in found:
        raise ValueError(f"The network has no layer {name!r}; it has {', '.join(n for n in found if n)}.")
    return found[name]


def _softmax(network):
    return lambda images: network(images).softmax(1)


@torch.no_grad()
def _logits(network, images):
    return torch.cat([network(batch) for batch in as_images(images).split(256)]).numpy()


def _concept_sets(counts, image_size, seed):
    """{concept: (images, labels)} and "random", all random sets one after the other."""
    size, pairs = counts["concept"], counts["pairs"]
    draw = partial(phantoms.dermoscopy, image_size=image_size)
    framed = draw(size, seed + _POOL, frame_probability=(1.0, 1.0)).image_set
    pool = draw(POOL * size, seed + _POOL + 1)
    rows = {"hairs": pool.factors["hairs"] >= HAIRY, "darkness": pool.factors["darkness"] >= DARK}
    sets = {"frame": (framed.images, framed.labels)}
    for name, there in rows.items():
        rows_there = np.flatnonzero(there)[:size]
        if len(rows_there) < size:
            raise ValueError(f"Only {len(rows_there)} phantoms show {name}, not {size}; take more than a few images.")
        sets[name] = pool.image_set.images[rows_there], pool.image_set.labels[rows_there]
    random = draw(2 * pairs * size, seed + _POOL + 2).image_set
    return sets | {"random": (random.images, random.labels)}


def _concept_rows(network_name, network, layer, inputs, sets, steps):
    sensitivity = sensitivities(network, layer, inputs, target=1, steps=steps)
    images, labels = sets["random"]
    random = activations(network, layer, images)
    size = len(sets["frame"][0])
    random_sets = np.split(random, len(random) // size)
    margins = _by_class(network, images, labels)
    rows = []
    for concept in CONCEPTS:
        images, labels = sets[concept]
        found = tcav(sensitivity, activations(network, layer, images), random_sets)
        effect = [a - b for a, b in zip(_by_class(network, images, labels), margins)]
        rows.append({"network": network_name, "concept": concept} | _short(found) | {"effect": float(np.mean(effect))})
    return rows


def _by_class(network, images, labels):
    """The mean of melanoma's logit less benign's, of the benign images and of the melanomas."""
    logits = _logits(network, images)
    margin = logits[:, 1] - logits[:, 0]
    return [margin[labels == label].mean() for label in (0, 1)]


def _short(found):
    means = {
        name: float(np.mean(found[plural]))
        for name, plural in (
            ("score", "scores"), ("random_score", "random_scores"), ("derivative", "derivatives"),
            ("random_derivative", "random_derivatives"), ("accuracy", "accuracies"),
            ("random_accuracy", "random_accuracies"),
        )
    }  # fmt: skip
    above = found["derivative_test"]
    tests = {"score_p": found["score_test"]["p"], "derivative_p": above["p_flips"]}
    tests |= {"accuracy_p": found["accuracy_test"]["p_flips"]}
    return means | tests | {"above": {key: above[key] for key in ("value", "low", "high")}}


def _heat_row(maps, regions):
    row = {"empty": int((maps.max((1, 2)) <= 0).sum())}
    for name, region in regions.items():
        row |= {name: _mean_of(heat_share(maps, region)), f"{name}_area": float(np.mean(region))}
    return row


def _mean_of(values):
    """`over_seeds` of the values that are defined, None where none is."""
    values = values[np.isfinite(values)]
    return over_seeds(values, level=0.95) if len(values) else None


def _share_of(there, image_set):
    return bootstrap(lambda rows: rows.mean(), there.astype(float), subjects=image_set.subjects, resamples=500)


def _save_edges(folder, rows, maps, own):
    arrays = {}
    for kind, which in ((kind, rows[kind]) for kind in maps):
        arrays |= {f"{kind}_rows": which, f"{kind}_probability": own[which]}
        arrays |= dict(zip((f"{kind}_maps", f"{kind}_masks"), maps[kind]))
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, Path(folder) / "edges.safetensors")


# --- frames taken away ---------------------------------------------------------------------------------------


def frame_removal(
    folder, *, trained, image_size, images, steps, seed, share=(0.0, 0.9), farthest=4.0, directions=10,
    train_images=800, test_images=400, epochs=12, width=16,
):  # fmt: skip
    """A stage: a generator's frames taken away along directions of w, and the paper's experiment with what is left.

    trained: the folder of a stage `train_lesions` whose generator learnt phantoms framed with the chances `share`
    (benign, melanoma). `images` samples are drawn, their classes in turn; framed is what `frame_score` puts over the
    "threshold" that tells real phantoms with a frame from those without. A direction leads *to* the frame; a framed
    sample moves the other way in `steps` even steps until its score is "clean", not above that of 95 % of the phantoms
    without a frame (half a frame would pass the threshold), at most `farthest` standard deviations of w along that
    direction (differs: SeFa moves by up to 3 in w's own units, which mean another thing for
    each direction and each width).

    Ways: "sefa", of the first `directions` eigenvectors and both signs the one that lowers the score most; "means",
    mean w of framed samples less that of others, "hyperplane", the normal of a logistic regression, both within the
    classes, so that the class is not what is learnt; "random", the control: searched as "sefa", among as many random
    directions. Every second framed sample finds the direction and the others judge it.

    Returns "threshold", "clean", "detector_auc" (phantoms, 1 is best); "framed", counts by class; "ways", rows by way:
    "direction" (SeFa's number from 1), "removed" (share of judged samples that became clean, with its exact 95 %
    interval), "score_before", "score_after", "distance" (mean, standard deviations), "inner_change" (mean absolute
    difference within the inner disc, 0 to 1, lower is better), "class_kept" (likewise a share, of those whose predicted
    class stays, by a classifier of real phantoms framed alike in both classes) and "probability_change" (mean, of
    melanoma); "left_out", ways that need samples of both kinds and had none; "chosen", which removed most, the random
    one aside.
    "experiment", None for a generator of one class: rows by "trained_on" ("real", "framed": all samples; "deframed":
    the framed ones moved the chosen way; "majority": no training) and "tested_on", real phantoms of other patients with
    frames "as trained", "none" or "reversed": "accuracy", "balanced_accuracy", "auc", with 95 % intervals over
    patients. Writes removal.safetensors: see `load_removal`.
    """
    generator, _ = load_networks(trained)
    detector = _detector(image_size, seed)
    z = generator.noise(images, stream(seed, "frames"))
    labels = torch.arange(images) % max(generator.num_classes, 1)
    w = _map(generator, z, labels)
    made = _made(generator, w)
    framed = frame_score(made) > detector["threshold"]
    if framed.sum() < 4:
        raise ValueError(f"{framed.sum()} of {images} samples have a frame; train on framed lesions, or draw more.")
    found = _directions(generator, w, labels.numpy(), framed, seed, directions, farthest)
    judge = _lesion_network(train_images, 0.5, image_size, seed + _JUDGE, epochs, width, benign=0.5)
    path = np.linspace(0, farthest, steps + 1)
    judged = np.flatnonzero(framed)[1::2]
    results = {way: _taken_off(generator, w[judged], *found[way][:2], path, detector["clean"]) for way in found}
    rows = [_way_row(way, found[way][2], made[judged], results[way], judge) for way in found]
    chosen = max((row for row in rows if row["way"] != "random"), key=lambda row: row["removed"]["value"])["way"]
    moved = _taken_off(generator, w[framed], *found[chosen][:2], path, detector["clean"])["images"]
    deframed = made.copy()
    deframed[framed] = moved
    _save_removal(folder, made[framed], moved, {way: direction for way, (direction, *_) in found.items()})
    several = generator.num_classes > 1
    sets = {"framed": (made, labels.numpy()), "deframed": (deframed, labels.numpy())}
    return detector | {
        "framed": {str(k): int(framed[labels.numpy() == k].sum()) for k in np.unique(labels)},
        "ways": rows, "left_out": [way for way in WAYS if way not in found], "chosen": chosen,
        "experiment": _experiment(sets, share, train_images, test_images, image_size, seed, epochs, width)
        if several else None,
    }  # fmt: skip


def load_removal(folder):
    """What `frame_removal` kept, numpy: "before" and "after", uint8 (N, C, S, S), all framed samples as made and moved
    the chosen way; "direction_<way>" (w_dim,), of length 1, towards the frame.
    """
    return load_file(Path(folder) / "removal.safetensors")


def frame_threshold(scores, framed):
    """The score in the middle of the gap that tells framed images from others best (largest balanced accuracy)."""
    scores, framed = np.asarray(scores, float), np.asarray(framed, bool)
    if framed.all() or not framed.any():
        raise ValueError("A threshold takes images with a frame and images without.")
    values = np.unique(scores)
    if len(values) < 2:
        raise ValueError("All images have the same score: there is no threshold.")
    middles = (values[1:] + values[:-1]) / 2
    balanced = [((scores[framed] > at).mean() + (scores[~framed] <= at).mean()) / 2 for at in middles]
    return float(middles[int(np.argmax(balanced))])


def _detector(image_size, seed):
    real = phantoms.dermoscopy(200, seed + _POOL, image_size=image_size, frame_probability=(0.5, 0.5))
    scores, framed = frame_score(real.image_set.images), real.factors["frame"] > 0
    clean = float(np.quantile(scores[~framed], 0.95))
    return {
        "threshold": frame_threshold(scores, framed),
        "clean": clean,
        "detector_auc": float(auroc(framed.astype(int), scores)),
    }


@torch.no_grad()
def _map(generator, z, labels):
    known = generator.num_classes > 0
    parts = zip(z.split(_BATCH), labels.split(_BATCH))
    return torch.cat([generator.map(part, of if known else None) for part, of in parts])


@torch.no_grad()
def _made(generator, w):
    """Images uint8 (N, C, S, S): rounded, as released ones are; the noise maps are the same for all."""
    made = [generator.synthesise(part, noise="fixed").clamp(-1, 1) for part in w.split(_BATCH)]
    return datasets.to_uint8(torch.cat(made).cpu())


def _directions(generator, w, labels, framed, seed, count, farthest):
    """{way: (direction towards the frame (w_dim,), its standard deviation, SeFa's number or None)}."""
    half = np.ones(len(w), bool)
    half[np.flatnonzero(framed)[1::2]] = False  # they judge
    within = w.numpy().astype(float)
    for label in np.unique(labels):
        within[labels == label] -= within[labels == label].mean(0)
    seeking = w[np.flatnonzero(framed)[::2][:_BATCH]]
    search = partial(_most_lowering, generator, seeking, w.numpy(), farthest)
    drawn = torch.randn(count, w.shape[1], generator=stream(seed, "directions")).numpy()
    best, number = search(sefa(generator)[1][:count])
    found = {"sefa": (best, number + 1)}
    if (~framed).sum() >= 2:
        found["means"] = within[half & framed].mean(0) - within[~framed].mean(0), None
        found["hyperplane"] = _hyperplane(within[half], framed[half]), None
    found["random"] = search(drawn)[0], None
    units = {way: direction / np.linalg.norm(direction) for way, (direction, _) in found.items()}
    return {way: (unit, float((within @ unit).std()), found[way][1]) for way, unit in units.items()}


def _most_lowering(generator, seeking, w, farthest, candidates):
    """The candidate, with its sign, against which a walk lowers the frame score most, and its row."""
    scored = []
    for row, candidate in enumerate(candidates):
        unit = candidate / np.linalg.norm(candidate)
        for sign in (1, -1):
            step = torch.as_tensor(sign * farthest * (w @ unit).std() * unit).to(seeking.dtype)
            scored.append((frame_score(_made(generator, seeking - step)).mean(), row, sign))
    _, row, sign = min(scored)
    return sign * candidates[row], row


def _hyperplane(w, framed):
    from sklearn.linear_model import LogisticRegression  # seconds to import

    scale = w.std(0).clip(1e-12)
    return LogisticRegression(max_iter=1000).fit(w / scale, framed).coef_[0] / scale


def _taken_off(generator, w, direction, deviation, path, clean):
    """Each sample at its first step of the path, in standard deviations, with a score not above `clean`; one that keeps
    its frame goes all the way.
    """
    step = torch.as_tensor(direction * deviation).to(w.dtype)
    images, distance = _made(generator, w), np.zeros(len(w))
    open_ = np.flatnonzero(frame_score(images) > clean)
    for reach in path[1:]:
        if not len(open_):
            break
        images[open_] = _made(generator, w[open_] - float(reach) * step)
        distance[open_] = reach
        open_ = open_[frame_score(images[open_]) > clean]
    return {"images": images, "distance": distance, "removed": ~np.isin(np.arange(len(w)), open_)}


def _way_row(way, number, before, result, judge):
    after, removed = result["images"], result["removed"]
    low, high = clopper_pearson(int(removed.sum()), len(removed))
    change = (to_unit(as_images(after)) - to_unit(as_images(before))).abs().mean(1).numpy()
    seen = [probabilities(judge, as_images(pictures)[:, None]) for pictures in (before, after)]
    kept = int((seen[0].argmax(1) == seen[1].argmax(1)).sum())
    return {
        "way": way, "direction": number, "removed": {"value": float(removed.mean()), "low": low, "high": high},
        "judged": len(removed), "score_before": float(frame_score(before).mean()),
        "score_after": float(frame_score(after).mean()), "distance": float(result["distance"].mean()),
        "inner_change": float(change[:, disc(change.shape[-1], INNER)].mean()),
        "class_kept": dict(zip(("value", "low", "high"), (kept / len(removed), *clopper_pearson(kept, len(removed))))),
        "probability_change": float((seen[1] - seen[0])[:, 1].mean()),
    }  # fmt: skip


def _experiment(synthetic, share, train_images, test_images, image_size, seed, epochs, width):
    draw = partial(phantoms.dermoscopy, image_size=image_size)
    real = draw(train_images, seed + _TRAIN, frame_probability=tuple(share)).image_set
    frames = {"as trained": tuple(share), "none": (0.0, 0.0), "reversed": tuple(share)[::-1]}
    tests = {
        name: draw(test_images, seed + _TEST, frame_probability=chances).image_set for name, chances in frames.items()
    }
    networks = {
        name: _fitted(images, labels, seed, epochs, width)
        for name, (images, labels) in ({"real": (real.images, real.labels)} | synthetic).items()
    }
    rows = []
    for tested_on, test in tests.items():
        found = {name: probabilities(network, as_images(test.images)[:, None]) for name, network in networks.items()}
        found["majority"] = np.tile([1.0, 0.0] if (test.labels == 0).mean() >= 0.5 else [0.0, 1.0], (len(test), 1))
        for trained_on, seen in found.items():
            rows.append({"trained_on": trained_on, "tested_on": tested_on} | _scores(test, seen))
    return rows


def _scores(test, seen):
    settings = {"subjects": test.subjects, "resamples": 1000}
    found = {
        "accuracy": bootstrap(ACCURACY, test.labels, seen, **settings),
        "balanced_accuracy": bootstrap(BALANCED, test.labels, seen, **settings),
        "auc": bootstrap(auroc, test.labels, seen[:, 1], **settings),
    }
    return {name: {k: _plain(v) for k, v in score.items()} for name, score in found.items()}


def _plain(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _save_removal(folder, before, after, directions):
    arrays = {"before": before, "after": after} | {f"direction_{way}": d for way, d in directions.items()}
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    save_file(arrays, Path(folder) / "removal.safetensors")
