"""Heads on cached features of breast masses, with and without DP-SGD: the classifiers of MCGAN + DP, Table 1.

Paper: Osuala et al. 2024 (arXiv 2407.12669), Sec. 2 and 3; settings from the authors' code. Chapter: mcgan_dp.
A frozen backbone sees each image and its three flips once; a head then trains on these views. That is the published
loop but for one thing: the stochastic depth that stays active in its frozen backbone has no cached form (differs).
Label 0 is malignant and 1 benign, and benign is the positive class of AUROC and AUPRC, as in the paper.
`view_masses` and `head_trial` are stages of a run; the one way to a private head is `privacy.dpsgd.PrivateTraining`.
"""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from lookalike.data import datasets
from lookalike.metrics import extractors
from lookalike.metrics.classifiers import flip_states
from lookalike.metrics.features import features
from lookalike.metrics.scores import auprc, auroc
from lookalike.privacy.dpsgd import Privacy
from lookalike.privacy.randomness import stream
from lookalike.training.cells import load_samples
from lookalike.training.checkpoint import load_weights
from lookalike.training.likelihood import batches, mean_loss, start_private

HEADS = ("two-layer", "one-layer")
EXTRACTORS = ("efficientnet_lite0", "lite0_penultimate", "swin_t", "grey")
CLASSES = 2  # malignant, benign
EARLIEST = 0.75  # of epsilon: the authors' code chooses among epochs that spent more than this share


# ---- images to views ------------------------------------------------------------------------------------------------


def view_masses(folder, *, source, extractor, image_size, split=None, flips=True, weights="", backbone=""):
    """Writes views.safetensors: features (N, V, D) float32, labels and subjects (N,), from a data set or made images.

    source: the name of a data set with its `split`, or the folder of a stage that wrote samples.safetensors. V is 4
    with `flips` (as is, left to right, top to bottom, both), else 1. extractor: one of EXTRACTORS; `weights`: the file
    of swin_t; backbone: the folder of a `pretraining.pretrain_masses`, whose weights the network then has. Subjects are
    numbers from 0, one per patient, or per image where nobody knows the patient. Views of a restricted set, above all
    "grey", are as restricted as its images; they lie in the run's folder alone, which no page and no kept run copies.
    """
    images, labels, subjects = load_masses(source, split)
    network = mass_extractor(extractor, image_size, weights)
    network = with_backbone(network, backbone) if backbone else network
    seen = [torch.as_tensor(features(s, network)) for s in (flip_states(images) if flips else [images])]
    tensors = {"features": torch.stack(seen, 1), "labels": torch.as_tensor(labels), "subjects": subjects}
    save_file(tensors, Path(folder) / "views.safetensors")
    return {
        "images": len(labels), "subjects": len(subjects.unique()), "dim": network.dim, "extractor": network.name,
    }  # fmt: skip


def load_views(folders):
    """Features (N, V, D), labels and subjects (N,) of one or several `view_masses` folders, one after another.

    No subject is in two folders: their numbers go on counting.
    """
    parts = [load_file(Path(folder) / "views.safetensors") for folder in folders]
    if len({part["features"].shape[1:] for part in parts}) != 1:
        raise ValueError("These views differ in features or flips: make all of them with the same settings.")
    count = 0
    for part in parts:
        part["subjects"] = part["subjects"] + count
        count = int(part["subjects"].max()) + 1
    return tuple(torch.cat([part[name] for part in parts]) for name in ("features", "labels", "subjects"))


def mass_extractor(name, image_size, weights=""):
    """An `Extractor` by one of the names EXTRACTORS, whose full name stands beside every number."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "efficientnet_lite0":
        return extractors.efficientnet_lite0(image_size, device)
    if name == "lite0_penultimate":
        return _lite0_penultimate(image_size, device)
    if name == "swin_t":
        if not weights:
            raise ValueError("swin_t needs torchvision's file swin_t-704ceda3.pth: name it in `weights`.")
        return extractors.swin_t(weights, image_size, device)
    if name == "grey":
        return extractors.Extractor(f"8x8 means and 16 grey levels@{image_size}", 80, image_size, _GreyLevels())
    raise ValueError(f"extractor must be one of {', '.join(EXTRACTORS)}, not {name!r}.")


def with_backbone(extractor, folder):
    """`extractor` with the backbone.safetensors of a folder; its name says so, to the file."""
    path = Path(folder) / "backbone.safetensors"
    load_weights(path, extractor.network)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    return replace(extractor, name=f"{extractor.name}, all layers trained on made images ({digest})", head=None)


def load_masses(source, split=None):
    """Images uint8 (N, C, S, S), labels and subject numbers (N,) of a data set, or of a stage's samples."""
    if source in datasets.names():
        found = datasets.load(source, split)
        subjects = torch.as_tensor(np.unique(found.subjects, return_inverse=True)[1])
        return found.images, found.labels, subjects
    if split is not None:
        raise ValueError(f"{source} is no data set, so it has no split {split!r}; the folder of a stage is one set.")
    images, labels = load_samples(source)
    return images, labels, torch.arange(len(labels))


def _lite0_penultimate(image_size, device):
    """EfficientNet-Lite0's last block, pooled (320): before the convolution that widens it to 1280."""
    whole = extractors.efficientnet_lite0(image_size, device)
    network = nn.Sequential(whole.network.conv_stem, whole.network.bn1, whole.network.blocks, _Pooled())
    name = whole.name.replace("imagenet@", "imagenet-last-block@")
    return extractors.Extractor(name, 320, image_size, network)


class _Pooled(nn.Module):
    def forward(self, maps):
        return maps.mean((2, 3))


class _GreyLevels(nn.Module):
    """64 means over a grid of 8x8 and the shares of 16 grey levels: what needs no training at all."""

    def __init__(self):
        super().__init__()
        self.edges = nn.Parameter(torch.linspace(-1, 1, 17)[1:-1], requires_grad=False)

    def forward(self, images):
        grey = images[:, :1].contiguous()
        levels = torch.bucketize(grey.flatten(1), self.edges, right=True)
        shares = torch.zeros(len(grey), 16).scatter_add_(1, levels, torch.full(levels.shape, 1 / levels.shape[1]))
        return torch.cat([F.adaptive_avg_pool2d(grey, 8).flatten(1), shares], 1)


# ---- the head and its training --------------------------------------------------------------------------------------


def build_head(head, dim):
    """From features (N, dim) to logits (N, 2): "two-layer" (296,066 weights at dim 768) or "one-layer" (1,538)."""
    if head not in HEADS:
        raise ValueError(f"head must be one of {', '.join(HEADS)}, not {head!r}.")
    if head == "one-layer":
        return nn.Sequential(nn.Linear(dim, CLASSES))
    hidden = dim // 2
    return nn.Sequential(nn.Linear(dim, hidden), nn.LeakyReLU(0.2), nn.Linear(hidden, CLASSES))


def head_loss(network, rows, targets):
    """Cross entropy of features (N, D) against probabilities (N, 2), one number per image (N,)."""
    return -(F.log_softmax(network(rows), 1) * targets).sum(1)


def smoothed(labels, label_smoothing):
    """Labels (N,) as target probabilities (N, 2): 1 - s for the label, and s shared by both classes."""
    return F.one_hot(labels.long(), CLASSES) * (1 - label_smoothing) + label_smoothing / CLASSES


def train_head(
    views, labels, *, head, seed, epochs=300, batch_size=128, lr=1e-5, weight_decay=1e-8, label_smoothing=0.1,
    privacy=None, subjects=None, start=None, freeze_body=False, validation=None, tests=None,
):  # fmt: skip
    """A head trained with AdamW on views (N, V, D), each time on one of an image's V views, drawn evenly.

    Without `privacy` batches are shuffled; with it they are Poisson samples, an epoch is 1 / sample_rate of them, and
    `subjects` (N,) says whose each image is where records are subjects. `start`: the state_dict to go on from.
    `freeze_body`: only the last layer of a two-layer head trains. validation: (features (N, D), labels (N,)).

    Returns {"last", "best": state_dicts, "epoch": of the best, from 1 (see `best_epoch`; without validation the last),
    "history": per epoch "loss", and where asked for "val_auprc", "val_loss" and "probabilities" (P(benign) (epochs, N)
    for each of `tests`, name -> features (N, D)), "trainable", "privacy": what was spent, None without}. The loss
    reads the training images without noise, and so is not covered by epsilon.
    """
    network = _started(head, views.shape[2], seed, start, freeze_body)
    trainable = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr, weight_decay=weight_decay, fused=True)
    order, flips = stream(seed, "head"), stream(seed, "flips")
    private = start_private(network, optimizer, privacy, views, subjects, order, batch_size)
    first = first_selectable(privacy, epochs) if private else 1
    rows, targets, versions = views.flatten(0, 1), smoothed(labels, label_smoothing), views.shape[1]
    checked = validation and (*validation, smoothed(validation[1], label_smoothing))
    history = {"loss": [], "val_auprc": [], "val_loss": [], "probabilities": {name: [] for name in tests or {}}}
    best, best_at = None, epochs
    for epoch in range(1, epochs + 1):
        losses = []
        for drawn in batches(len(views), batch_size, private, order):
            seen = drawn * versions + torch.randint(versions, drawn.shape, generator=flips)
            batch = rows.index_select(0, seen), targets.index_select(0, drawn)
            losses.append(private.step(head_loss, *batch) if private else _plain_step(network, optimizer, batch))
        history["loss"].append(mean_loss(losses))
        _look(network, history, checked, tests)
        if validation and epoch == best_epoch(history["val_auprc"], history["val_loss"], first):
            best, best_at = _copied(network), epoch
    last = _copied(network)
    return {
        "last": last, "best": best or _copied(network), "epoch": best_at, "history": history,
        "trainable": sum(p.numel() for p in trainable), "privacy": private.report() if private else None,
    }  # fmt: skip


def best_epoch(val_auprc, val_loss, first=1):
    """The epoch, from 1, of the highest validation AUPRC, ties by the lowest loss, from `first` on; None before it.

    The authors' rule (their code; the text says "lowest"). It reads the validation set as often as there are epochs
    and without noise: epsilon does not cover it, and a release would take the last epoch.
    """
    rows = range(first - 1, len(val_auprc))
    return max(rows, key=lambda e: (val_auprc[e], -val_loss[e])) + 1 if rows else None


def first_selectable(privacy, epochs):
    """The first epoch, from 1, that spent more than 0.75 of the epsilon of all of them (authors' code).

    Their upper end, 1.05, is out of reach: the noise is chosen so that the last epoch spends epsilon.
    """
    steps = round(1 / privacy.sample_rate)
    enough = EARLIEST * privacy.epsilon(epochs * steps)
    low, high = 0, epochs  # epsilon grows with the steps
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if privacy.epsilon(middle * steps) > enough else (middle, high)
    return high


@torch.no_grad()
def benign(network, rows):
    """P(benign) (N,) of features (N, D), 0 to 1."""
    return network(rows).softmax(1)[:, 1].contiguous()


def _started(head, dim, seed, start, freeze_body):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_head(head, dim)
    if start is not None:
        if {name: t.shape for name, t in start.items()} != {n: t.shape for n, t in network.state_dict().items()}:
            raise ValueError(f"The head to start from is no {head} head on {dim} features; take one that is.")
        network.load_state_dict(start)
    if freeze_body:
        if head == "one-layer":
            raise ValueError("A one-layer head has no body to freeze: leave out freeze_body.")
        network[0].requires_grad_(False)
    return network


def _plain_step(network, optimizer, batch):
    losses = head_loss(network, *batch)
    optimizer.zero_grad(set_to_none=True)
    losses.mean().backward()
    optimizer.step()
    return losses.detach()


@torch.no_grad()
def _look(network, history, validation, tests):
    """Adds what an epoch's head gives on the validation and the test features."""
    if validation:
        rows, labels, targets = validation
        history["val_auprc"].append(auprc(labels.numpy(), benign(network, rows).double().numpy()))
        history["val_loss"].append(float(head_loss(network, rows, targets).mean()))
    for name, rows in (tests or {}).items():
        history["probabilities"][name].append(benign(network, rows))


def _copied(network):
    return {name: t.detach().clone() for name, t in network.state_dict().items()}


# ---- one cell of Table 1 --------------------------------------------------------------------------------------------


def head_trial(
    folder, *, train, val, tests, head, seed, epsilon=None, noise_multiplier=None, delta=1e-4, records="images",
    accountant="rdp", start="", epochs=300, batch_size=128, lr=1e-5, freeze_body=False,
):  # fmt: skip
    """Trains one head and tests it: a row of Table 1 for one seed.

    train: `view_masses` folders, one after another (Real+Syn is two of them); val: one; tests: name -> one. epsilon:
    the noise follows from it; or noise_multiplier: epsilon follows (the control with equal noise); neither: no privacy.
    start: the folder of another trial, whose best head goes on. `best` is chosen on validation images, which epsilon
    does not cover (see `best_epoch`); `last` is covered.

    Writes weights.safetensors ("best." and "last." before the names) and probabilities.safetensors (P(benign) under
    "<test>/best" and "<test>/last"). Returns epsilon (accounted), noise_multiplier and sample_rate (None without
    privacy), steps, trainable, and best and last, each with epoch (from 1) and per test auroc, auprc (positive: benign)
    and auprc_malignant; higher is better.
    """
    views, labels, subjects = load_views(train)
    batch_size = min(batch_size, len(views))
    privacy = specify_privacy(
        len(subjects.unique()) if records == "subjects" else len(views), len(views), epochs=epochs,
        batch_size=batch_size, epsilon=epsilon, noise_multiplier=noise_multiplier, delta=delta, records=records,
        accountant=accountant,
    )  # fmt: skip
    seen, known, _ = load_views([val])
    found = train_head(
        views, labels, head=head, seed=seed, epochs=epochs, batch_size=batch_size, lr=lr, privacy=privacy,
        subjects=subjects if privacy and records == "subjects" else None, freeze_body=freeze_body,
        start=load_head(start) if start else None, validation=(seen[:, 0], known),
    )  # fmt: skip
    epoch_of = {"best": found["epoch"], "last": epochs}
    weights = {f"{which}.{name}": t for which in epoch_of for name, t in found[which].items()}
    save_file(weights, Path(folder) / "weights.safetensors")
    measured, probabilities = {which: {"epoch": epoch} for which, epoch in epoch_of.items()}, {}
    for name, path in tests.items():
        seen, known, _ = load_views([path])
        for which in epoch_of:
            scores = _scores(found[which], head, seen[:, 0])
            probabilities[f"{name}/{which}"] = scores
            measured[which][name] = measure_benign(known.numpy(), scores.double().numpy())
    save_file(probabilities, Path(folder) / "probabilities.safetensors")
    steps = epochs * -(-len(views) // batch_size)
    return {
        "epsilon": found["privacy"]["epsilon"] if privacy else None,
        "noise_multiplier": privacy.noise_multiplier if privacy else None,
        "sample_rate": privacy.sample_rate if privacy else None,
        "steps": found["privacy"]["steps"] if privacy else steps, "trainable": found["trainable"], **measured,
    }  # fmt: skip


def specify_privacy(count, images, *, epochs, batch_size, epsilon, noise_multiplier, delta, records, accountant):
    """The `Privacy` of Table 1 for `count` records that hold so many `images`; None without epsilon and noise.

    A record is drawn with probability 1 / ceil(images / batch_size), also where it is a patient: then batches hold as
    many images as before, and fewer records.
    """
    if epsilon is not None and noise_multiplier is not None:
        raise ValueError("Give epsilon or noise_multiplier, not both: each follows from the other.")
    if epsilon is None and noise_multiplier is None:
        return None
    per_epoch = -(-images // batch_size)
    public = {"sample_rate": 1 / per_epoch, "delta": delta, "records": records, "accountant": accountant}
    public["expected_batch_size"] = count / per_epoch
    if noise_multiplier is not None:
        return Privacy(noise_multiplier, **public)
    return Privacy.for_epsilon(epsilon, steps=epochs * per_epoch, **public)


def load_head(folder, which="best"):
    """The state_dict of the "best" or the "last" head of a `head_trial` folder."""
    found = load_file(Path(folder) / "weights.safetensors")
    return {name.removeprefix(f"{which}."): t for name, t in found.items() if name.startswith(f"{which}.")}


def measure_benign(labels, scores):
    """AUROC and AUPRC with benign positive (the paper's), and AUPRC with malignant positive; 0 to 1, higher is better.

    labels (N,) 0 malignant, 1 benign; scores (N,) P(benign). Chance: 0.5, and the share of the positive class.
    """
    return {
        "auroc": auroc(labels, scores), "auprc": auprc(labels, scores),
        "auprc_malignant": auprc(1 - labels, 1 - scores),
    }  # fmt: skip


def _scores(weights, head, rows):
    network = build_head(head, rows.shape[1])
    network.load_state_dict(weights)
    return benign(network, rows)
