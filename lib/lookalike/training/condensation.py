"""Small sets that stand for a large one, and what classifiers learn from each, on equal networks.

Paper: Kanagavelu et al. 2024, MedSynth, Table 1 and Fig. 2. Chapter: medsynth. The paper scores its own sets with a ViT
and its baselines with ResNet-18, has no row of real images drawn at random, and calls IPC / N the condensation ratio
although a set holds K x IPC images. Here every set meets the same networks, seeds and steps, the last epoch counts, and
intervals say over what. Each set is a stage that leaves samples.safetensors: images uint8 (M, C, S, S), labels, and
source_rows, the row of the training split that an image is or started from, -1 for none.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file, save_file

from lookalike.data import datasets
from lookalike.metrics import extractors
from lookalike.metrics.classifiers import probabilities
from lookalike.metrics.features import features
from lookalike.metrics.intervals import bootstrap, holm, over_seeds, paired_over_images, paired_over_seeds
from lookalike.metrics.scores import measure
from lookalike.models import acgan, mcgan
from lookalike.models.convnets import build_network
from lookalike.privacy.randomness import stream
from lookalike.training import matching
from lookalike.training.cells import draw_samples
from lookalike.training.checkpoint import Checkpoint, load_weights, save_weights
from lookalike.training.mass_attacks import load_made
from lookalike.training.masses import train_mcgan

NOISE_DIM = 100  # DiM: the one-hot label takes the first K of them
ROWS = ("real", "majority")  # beside the sets, in every table
METRICS = {
    "auc": partial(measure, metric="auroc"),
    "accuracy": partial(measure, metric="accuracy"),
    "balanced_accuracy": partial(measure, metric="balanced_accuracy"),
}
LEVEL = 0.95
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4  # DM's and DiM's for evaluation


def condensation_ratio(ipc, classes, n):
    """What a set of `ipc` images for each of `classes` is of n images, in percent: {"ratio", "as_printed"}.

    "ratio" is classes x ipc / n. Table 1 of the paper prints ipc / n, smaller by the number of classes.
    """
    if min(ipc, classes, n) < 1:
        raise ValueError(f"A ratio needs ipc, classes and n of 1 or more, not {ipc}, {classes} and {n}.")
    return {"ratio": 100 * classes * ipc / n, "as_printed": 100 * ipc / n}


# --- real images --------------------------------------------------------------------------------------------


def random_coreset(folder, *, data, image_size, ipc, seed):
    """A stage: `ipc` images of each class, drawn at random from the train split without replacement.

    A class with fewer gives all it has, and "short" names it. Returns what `_saved` says of every set: "images",
    "per_class", "short", "ratio", "as_printed" (percent, see `condensation_ratio`).
    """
    train = _train(data, image_size, ipc)
    rows = _random_rows(train.labels, len(train.classes), ipc, seed)
    return _saved(folder, train, ipc, train.images[rows], train.labels[rows], rows)


def k_centre(folder, *, data, image_size, ipc, seed, extractor=None, cache=None):
    """A stage: `ipc` images of each class whose discs cover it, by the greedy rule (Sener and Savarese 2018).

    The first image is drawn at random, each next one is the farthest from all before: the largest distance left is at
    most twice the least possible. Distances are Euclidean, of pixels in [-1, 1], or of the features of `extractor`, one
    of `lookalike.metrics.extractors` by name ("efficientnet_lite0").

    Returns `random_coreset`'s keys with "space" and, per class, "radius": the largest distance of an image to the
    nearest chosen one (lower covers better); "random_radius" is that of the coreset with the same seed.
    """
    train = _train(data, image_size, ipc)
    space, points = _points(train, image_size, extractor, cache)
    rng = np.random.default_rng(seed)
    found, radii = [], {"radius": [], "random_radius": []}
    drawn = _random_rows(train.labels, len(train.classes), ipc, seed)
    for k in range(len(train.classes)):
        own = np.flatnonzero(train.labels == k)
        chosen, radius = greedy_centres(points[own], min(ipc, len(own)), rng)
        found.append(own[chosen])
        radii["radius"].append(radius)
        radii["random_radius"].append(cover_radius(points[own], points[drawn[train.labels[drawn] == k]]))
    rows = np.concatenate(found)
    saved = _saved(folder, train, ipc, train.images[rows], train.labels[rows], rows)
    return saved | {"space": space} | radii


def greedy_centres(points, count, rng):
    """Farthest-first: `count` rows of points (N, D), the first by chance, and the largest distance that is left."""
    chosen = [int(rng.integers(len(points)))]
    nearest = _distances(points, points[chosen[0]])
    for _ in range(count - 1):
        nearest[chosen[-1]] = -1  # a twin of a chosen image is at 0, the chosen one itself must not come again
        chosen.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, _distances(points, points[chosen[-1]]))
    return np.array(chosen), float(np.maximum(nearest, 0).max())


def cover_radius(points, centres):
    """The largest distance of any of points (N, D) to its nearest of centres (M, D); lower covers better."""
    nearest = np.full(len(points), np.inf)
    for centre in centres:
        nearest = np.minimum(nearest, _distances(points, centre))
    return float(nearest.max())


def _distances(points, centre):
    return np.linalg.norm(points - centre, axis=1)


def _points(train, image_size, extractor, cache):
    if extractor is None:
        return "pixels", datasets.as_tensor(train).flatten(1).numpy()
    network = getattr(extractors, extractor)(image_size, _device())
    return network.name, features(train.images, network, None if train.restricted else cache)


def _random_rows(labels, classes, ipc, seed):
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.permutation(np.flatnonzero(labels == k))[:ipc] for k in range(classes)])


# --- learnt images ------------------------------------------------------------------------------------------


def distribution_matching(
    folder, *, data, image_size, ipc, seed, init="real", steps=20_000, lr=1.0, momentum=0.5, real_batch=256, width=128,
    depth=3, strategy=matching.SIAMESE,
):  # fmt: skip
    """A stage: DM. The pixels of `ipc` images per class follow the mean embeddings of real ones, see `embedding_loss`.

    SGD on pixels; each step has a new, untrained ConvNet. init: "real", images of the train split (DM's: a condensed
    image begins as a patient; what a class lacks begins as noise), or "noise", standard normal.

    Returns `random_coreset`'s keys with "loss", its curve in up to 100 points (lower is better, but each step has a
    network of its own), and "moved", the mean change of a pixel from its start in grey levels, 0 to 255.
    """
    torch.manual_seed(seed)
    train = _train(data, image_size, ipc)
    labels = torch.arange(len(train.classes)).repeat_interleave(ipc)
    start, source = _start(train, ipc, seed, init)
    device = _device()
    learnt = matching.Pixels(start).to(device)
    optimizer = torch.optim.SGD(learnt.parameters(), lr, momentum=momentum)
    losses = _match(folder, learnt, labels, train, optimizer, seed, steps, real_batch, width, depth, strategy)
    images = datasets.to_uint8(_finite(learnt()))
    moved = np.abs(images.astype(float) - datasets.to_uint8(start)).mean()
    saved = _saved(folder, train, ipc, images, labels.numpy(), source)
    return saved | {"loss": matching.thinned(losses), "moved": float(moved)}


def latent_stand_in(
    folder, *, data, image_size, ipc, seed, trained, steps=2000, lr=0.01, real_batch=256, width=128, depth=3,
    strategy=matching.SIAMESE,
):  # fmt: skip
    """A stage: our own, in place of IT-GAN: K x `ipc` latents of a frozen generator follow DM's loss.

    IT-GAN starts from an inversion of every training image by a BigGAN and publishes no training; this starts from
    random latents of the generator in the folder `trained` (`dim` or `conditional_dcgan`), with Adam (differs).
    Returns `random_coreset`'s keys with "loss" as `distribution_matching`.
    """
    torch.manual_seed(seed)
    train, device = _train(data, image_size, ipc), _device()
    net = load_generator(trained).to(device)
    _check_fits(trained, load_settings(trained), train)
    labels = torch.arange(len(train.classes)).repeat_interleave(ipc)
    z = net.noise(len(labels), stream(seed, "latents"))
    learnt = matching.Latents(net, z, labels.to(device)).to(device)
    optimizer = torch.optim.Adam([learnt.z], lr)
    losses = _match(folder, learnt, labels, train, optimizer, seed, steps, real_batch, width, depth, strategy)
    images = datasets.to_uint8(_finite(learnt()))
    return _saved(folder, train, ipc, images, labels.numpy()) | {"loss": matching.thinned(losses)}


def _start(train, ipc, seed, init):
    """Images (K * ipc, C, S, S), class after class, that learning starts from, and the rows they are, -1 for noise."""
    if init not in ("real", "noise"):
        raise ValueError(f'init is "real" or "noise", not {init!r}.')
    count = len(train.classes) * ipc
    start = torch.randn(count, *train.images.shape[1:], generator=stream(seed, "start"))
    source = np.full(count, -1)
    if init == "real":
        rows = _random_rows(train.labels, len(train.classes), ipc, seed)
        of_class = [rows[train.labels[rows] == k] for k in range(len(train.classes))]
        places = np.concatenate([k * ipc + np.arange(len(own)) for k, own in enumerate(of_class)])
        source[places] = rows
        start[places] = datasets.as_tensor(train.images[rows])
    return start, source


def _match(folder, learnt, labels, train, optimizer, seed, steps, real_batch, width, depth, strategy):
    device = _device()
    real, real_labels = datasets.as_tensor(train).to(device), torch.as_tensor(train.labels).to(device)
    return matching.match_embeddings(
        learnt, labels.to(device), real, real_labels, optimizer, steps=steps, real_batch=real_batch, width=width,
        depth=depth, strategy=strategy, generator=stream(seed, "matching"),
        checkpoint=Checkpoint(Path(folder) / "checkpoint"),
    )  # fmt: skip


# --- generators ---------------------------------------------------------------------------------------------


def dim(
    folder, *, data, image_size, ipc, seed, width=64, critic_width=64, epochs=150, match_epochs=100, batch_size=64,
    lr=1e-4, match_lr=5e-6, match_weight=0.01, match_batches=16, n_critic=1, penalty=10.0,
    networks=("convnet3", "resnet10", "resnet18"), network_width=128, depth=3, strategy="",
):  # fmt: skip
    """A stage: DiM, a conditional GAN whose images make networks answer as real ones do; see `matching.train_dim`.

    The generator reads 100 numbers, the first K of them the one-hot label; trunk and heads are the AC-GAN's of
    `lookalike.models.acgan` (differs: DiM's critic has 8 convolutions of 196 channels), `image_size` a power of two.

    Writes the generator (`load_generator`, `draw_set`) and a fixed set of `ipc` images per class, drawn once. Returns
    `random_coreset`'s keys with the losses per epoch of `train_dim`. DiM itself draws anew in every epoch of its
    evaluation, so that its IPC is the length of an epoch: in `evaluate_sets` that is {"resample": folder}.
    """
    torch.manual_seed(seed)
    train, device = _train(data, image_size, ipc), _device()
    settings = _generator_settings("dim", train, ipc, width)
    net = _build_generator(settings).to(device)
    shape = {"channels": settings["channels"], "num_classes": settings["num_classes"]}
    critic = acgan.Discriminator(settings["image_size"], **shape, width=critic_width).to(device)
    history = matching.train_dim(
        net, critic, datasets.as_tensor(train).to(device), torch.as_tensor(train.labels).to(device), epochs=epochs,
        match_epochs=match_epochs, batch_size=batch_size, lr=lr, match_lr=match_lr, match_weight=match_weight,
        match_batches=match_batches, n_critic=n_critic, penalty=penalty, networks=networks, width=network_width,
        depth=depth, strategy=strategy, generator=stream(seed, "training"),
        checkpoint=Checkpoint(Path(folder) / "checkpoint"),
    )  # fmt: skip
    return _released(folder, net, settings, train, seed) | history


def conditional_dcgan(
    folder, *, data, image_size, ipc, seed, width=64, epochs=100, batch_size=64, lr=2e-4, balanced=True
):
    """A stage: a DCGAN with batch norm that is told the class: as numbers in the generator, as a map in the
    discriminator (`lookalike.models.mcgan`, plain targets, no augmentation); `image_size` is a power of two.

    balanced: an epoch shows every class as often as the most frequent one has images, else as the set has them. The
    paper gives its DCGAN row no size: take `ipc`, or as many as the original set has. Writes and returns what `dim`
    does, with "loss" per epoch.
    """
    torch.manual_seed(seed)
    train, device = _train(data, image_size, ipc), _device()
    settings = _generator_settings("dcgan", train, ipc, width)
    net = _build_generator(settings).to(device)
    shape = {"channels": settings["channels"], "num_classes": settings["num_classes"], "width": width}
    critic = mcgan.Discriminator(settings["image_size"], **shape).to(device)
    rows = _repeated(train.labels, len(train.classes)) if balanced else np.arange(len(train))
    report, net = train_mcgan(
        net, critic, datasets.as_tensor(train.images[rows]).to(device), torch.as_tensor(train.labels[rows]).to(device),
        epochs=epochs, lr=lr, batch_size=min(batch_size, len(rows)), smoothing=False, augmented=False,
        generator=stream(seed, "training"), checkpoint=Checkpoint(Path(folder) / "checkpoint"),
    )  # fmt: skip
    return _released(folder, net, settings, train, seed) | {"loss": report["loss"]}


def draw_set(folder, *, data, trained, ipc, seed):
    """A stage: another fixed set, of the generator that `dim` or `conditional_dcgan` left in the folder `trained`.

    Other counts and draws need no other training. Returns `random_coreset`'s keys.
    """
    settings = load_settings(trained)
    train = _train(data, settings["image_size"], ipc)
    _check_fits(trained, settings, train)
    net = load_generator(trained).to(_device())
    return _released(folder, net, settings | {"ipc": ipc}, train, seed)


def load_generator(folder):
    """The generator of a stage `dim`, `conditional_dcgan` or `draw_set`, on the CPU: `sample(labels, generator)`."""
    return load_weights(Path(folder) / "weights.safetensors", _build_generator(load_settings(folder))).eval()


def load_settings(folder):
    """Of such a stage: "family" ("dim" or "dcgan"), "image_size", "channels", "num_classes", "width", "ipc"."""
    return json.loads((Path(folder) / "generator.json").read_text())


def _generator_settings(family, train, ipc, width):
    channels, side = train.images.shape[1:3]
    classes = len(train.classes)
    if family == "dim" and classes >= NOISE_DIM:
        raise ValueError(f"DiM's {NOISE_DIM} numbers hold the label of fewer classes than {classes}.")
    shape = {"image_size": side, "channels": channels, "num_classes": classes}
    return {"family": family, **shape, "width": width, "ipc": ipc}


def _build_generator(settings):
    shape = {key: settings[key] for key in ("image_size", "channels", "num_classes", "width")}
    if settings["family"] == "dcgan":
        return mcgan.Generator(**shape, latent_dim=NOISE_DIM)
    return acgan.Generator(**shape, latent_dim=NOISE_DIM - shape["num_classes"])


def _released(folder, net, settings, train, seed):
    """The generator and its fixed set, saved; what `_saved` says of the set."""
    device = next(net.parameters()).device
    samples = draw_samples(net, settings["num_classes"], settings["ipc"], seed, device)
    save_weights(Path(folder) / "weights.safetensors", net)
    (Path(folder) / "generator.json").write_text(json.dumps(settings))
    return _saved(folder, train, settings["ipc"], samples["images"].numpy(), samples["labels"].numpy())


def _repeated(labels, classes):
    """Rows in which every class that is there comes as often as the most frequent one has images."""
    own = [np.flatnonzero(labels == k) for k in range(classes)]
    most = max(map(len, own))
    return np.concatenate([np.resize(rows, most) for rows in own if len(rows)])


def _check_fits(trained, settings, train):
    made = settings["channels"], settings["image_size"], settings["num_classes"]
    asked = train.images.shape[1], train.images.shape[2], len(train.classes)
    if made != asked:
        raise ValueError(
            f"The generator in {trained} has {made[0]} channels, {made[1]} px and {made[2]} classes; the images of "
            f"{train.name} have {asked[0]}, {asked[1]} and {asked[2]}."
        )


def _saved(folder, train, ipc, images, labels, source_rows=None):
    """Saves a set; "images", "per_class", "short" (classes with fewer than ipc), "ratio" and "as_printed" in percent.

    "ratio" counts the images that are there.
    """
    source_rows = np.full(len(labels), -1) if source_rows is None else source_rows
    arrays = {"images": np.ascontiguousarray(images), "labels": labels.astype(np.int64)}
    save_file(arrays | {"source_rows": source_rows.astype(np.int64)}, Path(folder) / "samples.safetensors")
    per_class = np.bincount(labels, minlength=len(train.classes)).tolist()
    printed = condensation_ratio(ipc, len(train.classes), len(train))["as_printed"]
    return {
        "images": len(labels), "per_class": per_class, "ratio": 100 * len(labels) / len(train), "as_printed": printed,
        "short": [name for name, count in zip(train.classes, per_class) if count < ipc],
    }  # fmt: skip


def _train(data, image_size, ipc):
    if ipc < 1:
        raise ValueError(f"A set has ipc = 1 or more images per class, not {ipc}.")
    return datasets.load(data, "train", image_size)


def _finite(images):
    if not torch.isfinite(images).all():
        raise ValueError("The learnt images are not finite: the matching diverged; lower lr.")
    return images


def _device():
    return "cuda" if torch.cuda.is_available() else "cpu"


# --- what networks learn from them --------------------------------------------------------------------------


def evaluate_sets(
    folder, *, data, image_size, sets, networks=("convnet3", "resnet18", "densenet"), seeds=(0, 1, 2, 3, 4), epochs=300,
    real_epochs=None, batch_size=32, lr=0.01, strategy=matching.SIAMESE, soft_labels=False, teacher="convnet3",
    temperature=1.0, width=128, depth=3, vit=None, test_split="test", groups=None, resamples=1000,
):  # fmt: skip
    """A stage: every network from scratch on every set and seed, tested on all of `test_split`; the last epoch counts.

    sets: {name: the folder of a stage with samples.safetensors, or a set by name; a list of them, one per seed, so that
    "over_seeds" counts the drawing too; or {"resample": folder of a generator}, which draws its ipc images per class
    anew in every epoch}. Beside them stand "real", the whole train split for `real_epochs` (None: `epochs`), and
    "majority". networks: names of `lookalike.models.convnets.NETWORKS`, width and depth of convnet3, vit of vit_lora,
    whose base brings into every row what it has learnt before: give one that has not seen this train split.

    SGD (momentum 0.9, weight decay 5e-4), lr a tenth from half the epochs on, augmentation `strategy`, batches of about
    `batch_size`; as many epochs on a small set are fewer steps, so "steps" are told. With `soft_labels` the sets learn
    the probabilities that a `teacher`, trained on the real set with the first seed, gives (logits / `temperature`): it
    brings what it knows of all real images into every set; "real" keeps its hard labels. groups: whose image each test
    image is (N,), instead of the set's subjects, for the intervals.

    Writes scores.safetensors (`load_scores`, `set_differences`). Returns "classes", "seeds", "test" ({"images",
    "units", "kind"}), "parameters" {network: count that is trained}, "teacher" (its METRICS or None), "majority"
    (METRICS), and "rows": "set", "network", "images", "per_class", "resampled", "ratio" (percent of the train split),
    "steps", "loss" (last epoch's mean, per seed) and METRICS: "auc" (macro, one against the rest), "accuracy" and
    "balanced_accuracy". Each metric: "value", 0 to 1, higher is better, the mean over seeds; "low", "high", "n", 95 %
    BCa over subjects (or groups) with the trainings fixed; "over_seeds", Student's over the trainings with the test
    images fixed.
    """
    train, test = (datasets.load(data, split, image_size) for split in ("train", test_split))
    units, kind = _check_evaluation(sets, seeds, train, test, groups)
    build = partial(
        build_network, channels=train.images.shape[1], num_classes=len(train.classes),
        image_size=train.images.shape[2], width=width, depth=depth, vit=vit,
    )  # fmt: skip
    settings = {"batch_size": batch_size, "lr": lr, "strategy": strategy}
    views = datasets.as_tensor(test)[:, None]
    summary = partial(_summary, test.labels, subjects=units, resamples=resamples)
    real = _fixed(train, train)
    real_epochs = epochs if real_epochs is None else real_epochs
    told, taught = None, None
    if soft_labels:
        trained, _ = train_from_scratch(partial(build, teacher), real.draw(0, 0), seeds[0], real_epochs, **settings)
        told, taught = partial(_soft, trained, temperature), summary(probabilities(trained, views)[:, None])
    drawn = {name: _source(given, train, image_size, seeds, told) for name, given in sets.items()} | {"real": real}
    rows, scores = [], {}
    for network in networks:
        for name, source in drawn.items():
            passes = real_epochs if name == "real" else epochs
            found = [
                train_from_scratch(partial(build, network), source.draw(i, seed), seed, passes, **settings)
                for i, seed in enumerate(seeds)
            ]
            scores[network, name] = np.stack([probabilities(trained, views) for trained, _ in found], 1)
            row = _set_row(source.per_class, train, batch_size, passes) | {"loss": [loss[-1] for _, loss in found]}
            row |= {"set": name, "network": network, "resampled": isinstance(sets.get(name), dict)}
            rows.append(row | summary(scores[network, name]))
    _save_scores(folder, units, test, networks, drawn, scores)
    return {
        "classes": list(train.classes), "seeds": list(seeds), "rows": rows, "teacher": taught,
        "test": {"images": len(test), "units": len(np.unique(units)), "kind": kind},
        "parameters": {network: _trained_weights(build(network)) for network in networks},
        "majority": summary(_majority(train, test)),
    }  # fmt: skip


def train_from_scratch(build, draw, seed, epochs, *, batch_size=32, lr=0.01, strategy=matching.SIAMESE):
    """`build()` trained on what `draw(epoch)` gives: images (N, C, S, S) in [-1, 1] and labels (N,) or shares (N, K).

    The learning rate falls to a tenth from half the epochs on. Returns the network, in eval mode, and the mean loss of
    each epoch. Equal seeds start from equal weights whatever the set is; the caller's random stream stays as it was.
    """
    device = _device()
    if epochs < 1:
        raise ValueError(f"A training has one epoch or more, not {epochs}.")
    with torch.random.fork_rng(devices=[device] if device == "cuda" else []):
        torch.manual_seed(seed)
        network = build().to(device)
        weights = [p for p in network.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(weights, lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
        generator, losses = stream(seed, "order"), []
        for epoch in range(epochs):
            if epoch == (epochs + 1) // 2:
                optimizer.param_groups[0]["lr"] = lr / 10
            losses.append(_one_epoch(network, optimizer, *draw(epoch), batch_size, strategy, generator))
    return network.eval(), losses


def _one_epoch(network, optimizer, images, labels, batch_size, strategy, generator):
    network.train()
    total, device = 0.0, next(network.parameters()).device
    order = torch.randperm(len(images), generator=generator)
    for rows in order.tensor_split(_batches(len(images), batch_size)):  # even batches: batch norm refuses a single one
        batch = images[rows].to(device)
        batch = matching.apply_augmentation(batch, matching.draw_augmentation(len(rows), strategy, generator))
        loss = F.cross_entropy(network(batch), labels[rows].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(rows)
    if not np.isfinite(total):
        raise ValueError("The training diverged: its loss is not a number; lower lr.")
    return total / len(images)


def _batches(n, batch_size):
    return -(-n // batch_size)


@dataclass(frozen=True)
class _Source:
    """Images per class, and `draw(index of the seed, seed)`, which gives a function epoch -> (images, labels)."""

    per_class: list
    draw: Callable


def _source(given, train, image_size, seeds, told):
    if isinstance(given, dict):
        return _resampled(given["resample"], train, told)
    if isinstance(given, list | tuple):
        each = [_source(one, train, image_size, seeds, told) for one in given]
        return _Source(each[0].per_class, lambda index, seed: each[index].draw(index, seed))
    return _fixed(load_made(given, image_size, train), train, told)


def _fixed(images, train, told=None):
    if images.classes != train.classes:
        raise ValueError(f"{images.name} has the classes {', '.join(images.classes)}, not {', '.join(train.classes)}.")
    pixels, labels = datasets.as_tensor(images), torch.as_tensor(images.labels)
    pair = pixels, labels if told is None else told(pixels)
    counts = np.bincount(images.labels, minlength=len(train.classes)).tolist()
    return _Source(counts, lambda index, seed: lambda epoch: pair)


def _resampled(folder, train, told):
    net, settings = load_generator(folder).to(_device()), load_settings(folder)
    _check_fits(folder, settings, train)
    labels = torch.arange(settings["num_classes"]).repeat_interleave(settings["ipc"])

    def draw(seed, epoch):
        images = net.sample(labels.to(_device()), stream(seed, f"epoch {epoch}")).cpu()
        return images, labels if told is None else told(images)

    return _Source([settings["ipc"]] * settings["num_classes"], lambda index, seed: partial(draw, seed))


def _soft(network, temperature, images):
    """The teacher's shares (N, K) of images."""
    likely = torch.as_tensor(probabilities(network, images[:, None])).log().clamp_min(-100)
    return (likely / temperature).softmax(1).float()


def _set_row(per_class, train, batch_size, epochs):
    images = sum(per_class)
    return {
        "images": images, "per_class": per_class, "ratio": 100 * images / len(train),
        "steps": epochs * _batches(images, batch_size),
    }  # fmt: skip


def _summary(labels, scores, subjects, resamples):
    """METRICS of class probabilities (N, T, K) of T trainings, with both intervals."""
    found = {}
    for name, statistic in METRICS.items():
        interval = bootstrap(statistic, labels, scores, subjects=subjects, resamples=resamples)
        per_seed = [statistic(labels, scores[:, s]) for s in range(scores.shape[1])]
        found[name] = interval | {"over_seeds": over_seeds(per_seed, LEVEL)}
    return found


def _majority(train, test):
    scores = np.zeros((len(test), 1, len(train.classes)))
    scores[:, :, np.bincount(train.labels).argmax()] = 1
    return scores


def _trained_weights(network):
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def _check_evaluation(sets, seeds, train, test, groups):
    """The units (N,) of the test images that intervals draw, and their kind."""
    if train.classes != test.classes:
        raise ValueError(f"The classes of {train.split} and {test.split} differ: {train.classes}, {test.classes}.")
    if absent := [name for k, name in enumerate(test.classes) if not (test.labels == k).any()]:
        raise ValueError(f"The test set has no image of {', '.join(absent)}; these scores need every class in it.")
    for name, given in sets.items():
        if name in ROWS:
            raise ValueError(f"{name!r} is the name of another row; give the set its own.")
        if isinstance(given, list | tuple) and len(given) != len(seeds):
            raise ValueError(f"{name} has {len(given)} sets for {len(seeds)} seeds; give one per seed.")
        if isinstance(given, dict) and set(given) != {"resample"}:
            raise ValueError(f'{name} is a folder, a list of folders, or {{"resample": folder}}, not {given}.')
    if groups is None:
        return test.subjects, test.subject_kind
    if len(groups) != len(test):
        raise ValueError(f"There are {len(test)} test images and {len(groups)} groups; each image needs its group.")
    return np.asarray(groups), "group"


# --- what a stage left --------------------------------------------------------------------------------------


def _save_scores(folder, units, test, networks, names, scores):
    arrays = {"labels": test.labels, "units": np.unique(units, return_inverse=True)[1].reshape(-1)}
    names, networks = list(names), list(networks)
    for (network, name), found in scores.items():
        arrays[f"{networks.index(network)}/{names.index(name)}"] = np.ascontiguousarray(found)
    save_file(arrays, Path(folder) / "scores.safetensors")
    (Path(folder) / "scores.json").write_text(json.dumps({"networks": networks, "sets": names}))


def load_scores(folder):
    """Of a stage `evaluate_sets`: {"labels" (N,), "units" (N,) as numbers, "scores": {network: {set: (N, T, K)}}}."""
    found = load_file(Path(folder) / "scores.safetensors")
    names = json.loads((Path(folder) / "scores.json").read_text())
    scores = {
        network: {name: found[f"{i}/{j}"] for j, name in enumerate(names["sets"])}
        for i, network in enumerate(names["networks"])
    }
    return {"labels": found["labels"], "units": found["units"], "scores": scores}


def set_differences(folder, reference, network, resamples=1000):
    """Rows of every other set less `reference` on one network, for each of METRICS: which set teaches more?

    "set", "reference", "network", "metric"; "value" (above 0: better than the reference), "low", "high", "n", "p":
    paired over subjects with the trainings fixed, "p_holm" corrected over the sets; "over_seeds":
    `intervals.paired_over_seeds`, None with one seed. To call one *method* better both must say so.
    """
    found = load_scores(folder)
    if network not in found["scores"]:
        raise ValueError(f"There is no network {network!r}; the networks are {', '.join(found['scores'])}.")
    scores = found["scores"][network]
    if reference not in scores:
        raise ValueError(f"There is no set {reference!r}; the sets are {', '.join(scores)}.")
    rows = []
    for metric, statistic in METRICS.items():
        named = {"reference": reference, "network": network, "metric": metric}
        pair = partial(_difference, statistic, found["labels"], found["units"], resamples, scores[reference])
        of_metric = [{"set": name} | named | pair(own) for name, own in scores.items() if name != reference]
        corrected = iter(holm([row["p"] for row in of_metric if row["p"] is not None]).tolist())
        rows += [row | {"p_holm": None if row["p"] is None else next(corrected)} for row in of_metric]
    return rows


def _difference(statistic, labels, units, resamples, reference, own):
    found = paired_over_images(statistic, labels, own, reference, subjects=units, resamples=resamples)
    per_seed = [[statistic(labels, scores[:, s]) for s in range(scores.shape[1])] for scores in (own, reference)]
    return found | {"over_seeds": paired_over_seeds(*per_seed) if len(per_seed[0]) > 1 else None}
