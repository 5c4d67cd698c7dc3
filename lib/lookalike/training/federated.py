"""Hospitals that train one StyleGAN2 without pooling their images: FedAvg, what it costs, and what still leaks.

Paper: Carrasco Limeros et al. 2022 (arXiv 2208.11702), Sec. 4.5 and 5, and `aidotse/decentralizedAI_dermatology`: three
clients, all in every round, which exchange generator, discriminator and averaged generator, buffers included, and keep
their optimisers. Chapter: stylegan2_dermatology. Sec. 5 asks for other aggregation, privacy and defences: here are
FedAvg (McMahan et al. 2017), FedAvgM (Hsu et al. 2019), FedProx (Li et al. 2020), a discriminator that stays at home,
and clipped noisy updates (McMahan et al. 2018).

The one decision worth knowing: all arms are the same rounds. "local" exchanges nothing, and "central" is one client
that has everyone's images, so that the arms differ in what is shared and in nothing else.
"""

import json
import math
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from lookalike.data import datasets
from lookalike.data.splits import subject_split
from lookalike.files import write_json
from lookalike.metrics.compared import half_rows, shrunk_interval
from lookalike.metrics.distances import frechet_distance, kernel_distance
from lookalike.metrics.extractors import efficientnet_lite0
from lookalike.metrics.features import features
from lookalike.models.stylegan2 import Discriminator, Generator
from lookalike.privacy.accounting import Training, account
from lookalike.privacy.attack import attack_result
from lookalike.privacy.membership import logan_white_box
from lookalike.privacy.randomness import MODES, source, stream
from lookalike.training.checkpoint import Checkpoint, load_weights, save_weights
from lookalike.training.lesions import LesionTraining, draw_lesions, settings_for
from lookalike.training.mass_attacks import together

EXCHANGED = ("generator", "discriminator", "ema")  # the authors' order
ARMS = ("federated", "local", "central")
WEIGHTINGS = ("samples", "equal")
RESETS = (False, True, "running")
HELD_OUT = "held out"
MEASURES = {
    "frechet_distance": frechet_distance,
    "kernel_distance": lambda real, other: kernel_distance(real, other).value,
}


# --- clients ------------------------------------------------------------------------------------------------


def split_clients(subjects, labels, shares=(1, 5, 9), seed=0):
    """Sorted row indices of each client's images, by subject: no subject is at two clients.

    `shares` are proportions of the subjects, so the images follow them about. Raises if a client gets no subject, or
    lacks a class: its discriminator could not judge it. Paper: about 1 : 5 : 9 in training images (1,865, 10,016 and
    18,003).
    """
    shares = np.asarray(shares, float)
    if shares.ndim != 1 or not len(shares) or not (shares > 0).all():
        raise ValueError(f"shares must be positive numbers, one for each client, not {shares.tolist()}.")
    parts = subject_split(subjects, shares / shares.sum(), seed)
    for i, rows in enumerate(parts):
        if not len(rows):
            raise ValueError(f"Client {i} gets no subject: {len(set(subjects))} subjects are too few for these shares.")
        if absent := set(np.unique(labels).tolist()) - set(np.asarray(labels)[rows].tolist()):
            raise ValueError(f"Client {i} has no image of class {min(absent)}: give it a larger share or another seed.")
    return parts


def client_weights(sizes, weighting="samples"):
    """Weights of an average over clients that sum to 1: by their numbers of images, or equal.

    Which of the two the paper took is unknown.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting must be one of {', '.join(WEIGHTINGS)}, not {weighting!r}.")
    if not len(sizes) or min(sizes) < 1:
        raise ValueError(f"Every client needs an image or more; these have {list(sizes)}.")
    counts = sizes if weighting == "samples" else [1] * len(sizes)
    return [count / sum(counts) for count in counts]


# --- what is exchanged --------------------------------------------------------------------------------------


def take_state(training, exchanged=EXCHANGED):
    """Copies on the CPU of all tensors of the exchanged networks, buffers too: "generator.<name>" and so on."""
    return {
        f"{part}.{name}": value.detach().cpu().clone()
        for part in exchanged
        for name, value in getattr(training, part).state_dict().items()
    }


def give_state(training, state, exchanged=EXCHANGED):
    """Puts such a state into the client's networks, in place: its optimisers stay attached to their weights."""
    for part in exchanged:
        getattr(training, part).load_state_dict(part_of(state, part))


def part_of(state, part):
    """The state dict of one network of a state."""
    return {name.removeprefix(f"{part}."): value for name, value in state.items() if name.startswith(f"{part}.")}


def average(states, weights):
    """FedAvg: the weighted mean of state dicts, tensor by tensor, in float64; `weights` need not sum to 1.

    Whole-number buffers have no mean: they are the heaviest client's (the first of equals). Of one client it is the
    identity, to the bit.
    """
    weights = np.asarray(weights, float)
    if not states or weights.shape != (len(states),) or not (weights > 0).all() or not np.isfinite(weights).all():
        raise ValueError(f"An average needs one positive weight per state: {len(states)} states, {weights.tolist()}.")
    shapes = [{name: value.shape for name, value in state.items()} for state in states]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError("The states differ in names or shapes: all clients must build the same networks.")
    shares, heaviest = (weights / weights.sum()).tolist(), states[int(np.argmax(weights))]
    return {
        name: _mean([state[name] for state in states], shares) if value.is_floating_point() else value.clone()
        for name, value in heaviest.items()
    }


def _mean(tensors, shares):
    return sum(share * tensor.double() for share, tensor in zip(shares, tensors)).to(tensors[0].dtype)


def _floating(state):
    return {name: value for name, value in state.items() if value.is_floating_point()}


def update_norm(before, after):
    """Euclidean length of the whole update, all tensors of the state as one vector."""
    moves = (after[name].double() - value.double() for name, value in _floating(before).items())
    return math.sqrt(sum(float(move.square().sum()) for move in moves))


# --- privacy of a client ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClientPrivacy:
    """Clipped updates and noise on their sum: differential privacy of a whole client (McMahan et al. 2018).

    clip: largest length C of a client's update, over all exchanged tensors as one vector. The server, which is trusted
    and sees every update, adds noise of standard deviation noise_multiplier x C to each number of their sum and divides
    by the number of clients, which is public. delta: of the guarantee. mode: see `privacy.randomness.MODES`.
    """

    clip: float
    noise_multiplier: float
    delta: float
    mode: str = "study"

    def __post_init__(self):
        if not 0 < self.clip < math.inf:
            raise ValueError(f"clip must be a positive number, the largest length of an update, not {self.clip}.")
        if not 0 <= self.noise_multiplier < math.inf:
            raise ValueError(f"noise_multiplier must be 0 or a positive number, not {self.noise_multiplier}.")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta must lie between 0 and 1, not {self.delta}.")
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, not {self.mode!r}.")


def client_epsilon(privacy, rounds):
    """What `rounds` spend: {"epsilon", "epsilon_replaced", "delta", "accountant", "noise_multiplier", "clip", "note"}.

    Every client is in every round, so nothing is gained by sampling. epsilon: neighbours differ in one client, whose
    updates are zero in the other world (the number of clients is public and stays); epsilon_replaced: that client has
    other images instead, which moves a sum by up to 2 C. None is infinity. It covers what the server gives out, the
    shared networks and their images, not what it receives nor what each client reports about its own training.
    """

    def spent(noise_multiplier):
        return account(Training(noise_multiplier, 1.0, rounds), privacy.delta)

    found, replaced = spent(privacy.noise_multiplier), spent(privacy.noise_multiplier / 2)
    return {
        "epsilon": _finite(found.epsilon), "epsilon_replaced": _finite(replaced.epsilon), "delta": privacy.delta,
        "accountant": found.accountant, "noise_multiplier": privacy.noise_multiplier, "clip": privacy.clip,
        "note": f"One client among all, in {rounds} rounds; {MODES[privacy.mode]}.",
    }  # fmt: skip


def clipped(before, after, clip):
    """The state `after`, pulled back towards `before` until its update is no longer than `clip`.

    Whole-number buffers stay as before: they are in no sum.
    """
    norm = update_norm(before, after)
    if not math.isfinite(norm):
        raise ValueError("A client's update is not finite and cannot be clipped: its training diverged; lower lr.")
    if norm <= clip:
        return {name: after[name] if value.is_floating_point() else value for name, value in before.items()}
    return {name: _between(value, after[name], clip / norm) for name, value in before.items()}


def _between(before, after, share):
    if not before.is_floating_point():
        return before
    return (before.double() + share * (after.double() - before.double())).to(before.dtype)


def _noisy(mean, deviation, randomness):
    """Noise on every number of a mean; drawn tensor by tensor."""
    return {
        name: (value.double() + deviation * randomness.normal(value.shape).double()).to(value.dtype)
        if value.is_floating_point()
        else value
        for name, value in mean.items()
    }


def _finite(number):
    return float(number) if math.isfinite(number) else None


# --- rounds -------------------------------------------------------------------------------------------------


def run_rounds(
    clients, rounds, iterations, weighting="samples", exchanged=EXCHANGED, reset_state=False, privacy=None,
    after_round=None, *, momentum=0.0, proximal=0.0, random=None, done=0, velocity=None,
):  # fmt: skip
    """Federated rounds: all clients train `iterations` from the shared state, then the server averages what they send.

    clients: `lesions.LesionTraining` objects; all start from the first one's exchanged networks and end with the shared
    ones. exchanged: of `EXCHANGED`; what is left out stays at home, () is local training. Optimisers and running
    numbers (augment_p, path_mean) stay with their client. reset_state: "running" sets the running numbers to zero
    before every round, as the published loop does if it is like its model; True also takes a fresh Adam. momentum: the
    server's (FedAvgM), 0 is FedAvg. proximal: FedProx's mu, a pull towards the shared weights in every optimiser step.
    privacy: a `ClientPrivacy`; it wants weighting "equal", for the numbers of images are private.

    after_round(row, sent, shared) is called with the states. To go on after `done` rounds, give `velocity` (the
    server's momentum, a dict changed in place) and `random` (noise) as they were.

    Returns "rounds", rows with "round", "clients" ({"augment_p", "path_mean", "images_seen", "update_norm"} at the
    round's end; norms are taken before clipping), "update_norm" of the mean before any noise (norms are None where
    nothing is exchanged) and "noise_norm", the expected length of the noise in it, None without privacy; "sent", the
    clients' last states, and "shared"; and "privacy" (`client_epsilon`).
    """
    _check_rounds(clients, rounds, iterations, exchanged, reset_state, privacy, weighting, momentum, proximal)
    weights = client_weights([len(client.images) for client in clients], weighting)
    random = random or stream(0, "federated noise")
    velocity = {} if velocity is None else velocity
    shared, sent, rows = take_state(clients[0], exchanged), [], []
    for client in clients:
        give_state(client, shared, exchanged)
    for number in range(done + 1, rounds + 1):
        local = [local_round(c, shared, iterations, exchanged, reset_state, privacy, proximal) for c in clients]
        sent = [state for state, _ in local]
        before, mean = shared, average(sent, weights)
        deviation = privacy.noise_multiplier * privacy.clip / len(clients) if privacy else 0.0
        noisy = _noisy(mean, deviation, source(privacy.mode, random)) if privacy else mean
        shared = with_momentum(before, noisy, velocity, momentum) if momentum else noisy
        for client in clients:
            give_state(client, shared, exchanged)
        size = sum(value.numel() for value in _floating(mean).values())
        rows.append(
            {"round": number, "clients": [row for _, row in local],
             "update_norm": update_norm(before, mean) if exchanged else None,
             "noise_norm": deviation * math.sqrt(size) if privacy else None}
        )  # fmt: skip
        if after_round:
            after_round(rows[-1], sent, shared)
    spent = client_epsilon(privacy, rounds) if privacy else None
    return {"rounds": rows, "sent": sent, "shared": shared, "privacy": spent}


def local_round(client, shared, iterations, exchanged=EXCHANGED, reset_state=False, privacy=None, proximal=0.0):
    """One client's part of a round from the state that it has received: what it sends, and its row of `run_rounds`."""
    if reset_state:
        _reset(client, reset_state)
    with pulled_back(client, proximal, exchanged):
        client.run(iterations)
    after = take_state(client, exchanged)
    row = {
        "augment_p": float(client.augment_p), "path_mean": float(client.path_mean),
        "images_seen": int(client.images_seen), "update_norm": update_norm(shared, after) if exchanged else None,
    }  # fmt: skip
    return clipped(shared, after, privacy.clip) if privacy else after, row


def _reset(client, how):
    optimizers = client.optimizers
    client.reset_state()
    if how == "running":
        client.optimizers = optimizers


def with_momentum(before, mean, velocity, momentum):
    """FedAvgM with a server rate of 1: velocity = momentum x velocity + (mean - before), shared = before + velocity."""
    found = dict(mean)
    for name, value in _floating(mean).items():
        step = value.double() - before[name].double()
        velocity[name] = momentum * velocity[name] + step if name in velocity else step
        found[name] = (before[name].double() + velocity[name]).to(value.dtype)
    return found


@contextmanager
def pulled_back(client, mu, exchanged=EXCHANGED):
    """FedProx: mu / 2 times the squared distance to the weights as they are now, added to every loss in the block.

    Its gradient mu (w - w_shared) joins the weights' own just before an optimiser steps, so Adam scales both.
    """
    parts = [part for part in ("generator", "discriminator") if mu and part in exchanged]
    hooks = []
    for part in parts:
        anchors = [(weight, weight.detach().clone()) for weight in getattr(client, part).parameters()]
        hook = partial(_pull, anchors=anchors, mu=mu)
        hooks.append(client.optimizers[part].register_step_pre_hook(hook))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _pull(optimizer, args, kwargs, *, anchors, mu):
    for weight, anchor in anchors:
        if weight.grad is not None:
            weight.grad.add_(weight - anchor, alpha=mu)


def _check_rounds(clients, rounds, iterations, exchanged, reset_state, privacy, weighting, momentum, proximal):
    if not clients or rounds < 1 or iterations < 1:
        raise ValueError(f"Rounds need clients: {len(clients)} clients, {rounds} rounds, {iterations} iterations.")
    if unknown := set(exchanged) - set(EXCHANGED):
        raise ValueError(f"exchanged may name {', '.join(EXCHANGED)}, not {', '.join(sorted(unknown))}.")
    if reset_state not in RESETS:
        raise ValueError(f"reset_state must be False, True or 'running', not {reset_state!r}.")
    if not 0 <= momentum < 1 or not 0 <= proximal < math.inf:
        raise ValueError(f"momentum lies in [0, 1) and proximal is 0 or more, not {momentum} and {proximal}.")
    if privacy and weighting != "equal":
        raise ValueError("Private rounds need weighting='equal': the numbers of images would leak through the weights.")
    if privacy and not exchanged:
        raise ValueError("Nothing is exchanged, so there is no update to clip: leave privacy out.")


# --- training ----------------------------------------------------------------------------------------------


def train_federated(
    folder, *, data, image_size, rounds, iterations, seed, samples, shares=(1, 5, 9), arm="federated",
    weighting="samples", reset_state=False, momentum=0.0, proximal=0.0, keep_local=(), clip=None, noise_multiplier=None,
    delta=None, augment="bg", batch_size=None, base=16384, max_channels=512, w_dim=512, mapping_layers=2, settings=None,
):  # fmt: skip
    """A stage: StyleGAN2 on the train split of `data`, divided over clients by `split_clients`.

    arm: "federated", `run_rounds`; "local", every client alone, as many iterations as it has in the rounds; "central",
    one network on all images, with as many iterations as *one* client had: as many batches as each client sees, fewer
    than all clients see together. All networks start from the same weights. Network and loop: as of
    `lesions.train_lesions`; no client may have fewer images than a batch. keep_local: ("discriminator",) leaves it at
    home. clip, noise_multiplier and delta make the updates private (`ClientPrivacy`); the class shares of the pooled
    set, by which samples are drawn, then count as public. Paper: 100 iterations a round; its weighting is unknown.

    Writes networks.json, clients.safetensors (`load_clients`) and, where networks are shared, weights.safetensors (the
    averaged generator), discriminator.safetensors and samples.safetensors. A client's own have its number:
    weights_0.safetensors, discriminator_0.safetensors, samples_0.safetensors. sent_0.safetensors: the discriminator as
    the client sent it in the last round, which is what the server saw. All samples' classes are drawn by the shares of
    the pooled training set, so that arms differ in images and not in the mix. Goes on after the last finished round.

    Returns "arm", "clients" ({"images", "subjects", "per_class"}), "rounds" and "privacy" (`run_rounds`),
    "iterations" of each network, and "exchanged", how many numbers a client sends in a round.
    """
    _check_arm(arm, keep_local, (clip, noise_multiplier, delta), momentum, proximal, reset_state)
    torch.manual_seed(seed)
    images = datasets.load(data, "train", image_size)
    rows = split_clients(images.subjects, images.labels, shares, seed)
    save_file({f"client_{i}": torch.as_tensor(part) for i, part in enumerate(rows)}, folder / "clients.safetensors")
    shape = {"image_size": images.images.shape[-1], "channels": images.images.shape[1]}
    shape |= {"num_classes": len(images.classes), "base": base, "max_channels": max_channels}
    build = {"shape": shape, "generator": {"w_dim": w_dim, "latent_dim": w_dim, "mapping_layers": mapping_layers}}
    write_json(folder / "networks.json", build)
    how = settings_for(image_size, batch_size, augment, settings)
    held = rows if arm != "central" else [np.sort(np.concatenate(rows))]
    clients = [
        new_training(build, images.subset(of), how, seed, stream(seed, f"client {i}")) for i, of in enumerate(held)
    ]
    exchanged = tuple(part for part in EXCHANGED if part not in keep_local) if arm == "federated" else ()
    privacy = None if clip is None else ClientPrivacy(clip, noise_multiplier, delta)
    keeper = _Keeper(folder, clients, stream(seed, "federated noise"))
    found = run_rounds(
        clients, rounds, iterations, weighting, exchanged, reset_state, privacy, keeper.keep, momentum=momentum,
        proximal=proximal, random=keeper.noise, done=len(keeper.rows), velocity=keeper.velocity,
    )  # fmt: skip
    _save_networks(folder, clients, exchanged, torch.as_tensor(images.labels), samples, seed)
    return {
        "arm": arm, "clients": [_described(images.subset(part)) for part in rows], "rounds": keeper.rows,
        "privacy": found["privacy"], "iterations": rounds * iterations,
        "exchanged": sum(value.numel() for value in found["shared"].values()),
    }  # fmt: skip


def load_clients(folder):
    """Row indices of each client's images in the train split, as `train_federated` divided it."""
    found = load_file(Path(folder) / "clients.safetensors")
    return [found[f"client_{i}"].numpy() for i in range(len(found))]


def load_made_by(folder):
    """{"all" or "client 0", ...: (images uint8 (M, C, S, S), labels (M,))} of a stage `train_federated`."""
    found = {}
    for path in sorted(Path(folder).glob("samples*.safetensors")):
        tensors = load_file(path)
        found[_whose(path.stem, "samples")] = tensors["images"].numpy(), tensors["labels"].numpy()
    if not found:
        raise ValueError(f"{folder} holds no samples: it is not the folder of train_federated.")
    return found


def load_discriminators(folder):
    """{("shared", None), ("sent", i) or ("own", i): discriminator} that `train_federated` left, on the CPU, evaluating.

    shared: everyone has it; sent: client i's, as the server got it; own: client i's, which never left.
    """
    folder = Path(folder)
    build = json.loads((folder / "networks.json").read_text("utf-8"))
    found = {}
    for path in sorted(folder.glob("discriminator*.safetensors")) + sorted(folder.glob("sent_*.safetensors")):
        kind, _, number = path.stem.partition("_")
        view = "sent" if kind == "sent" else "own" if number else "shared"
        network = load_weights(path, build_networks(build)[1])
        found[view, int(number) if number else None] = network.eval()
    return found


def build_networks(build):
    """A generator and a discriminator by the document networks.json."""
    return Generator(**build["shape"], **build["generator"]), Discriminator(**build["shape"])


def new_training(build, images, settings, seed, random):
    """A client's `LesionTraining` on an ImageSet; equal seeds give all clients the same weights."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        networks = [network.to(device) for network in build_networks(build)]
    pixels, labels = datasets.as_tensor(images).to(device), torch.as_tensor(images.labels).to(device)
    return LesionTraining(*networks, pixels, labels, settings, random=random)


class _Keeper:
    """Keeps all clients and the server after every round, and finds what an interrupted training has left.

    A round counts as kept when the server's state, written last, names it.
    """

    def __init__(self, folder, clients, noise):
        self.folder, self.clients, self.noise = folder, clients, noise
        self.server = Checkpoint(folder / "checkpoint" / "server")
        found = self.server.load({}, {}, {"noise": noise}) or {"rows": [], "velocity": {}}
        self.rows, self.velocity = found["rows"], found["velocity"]
        if self.rows:
            for client, path in zip(clients, self._paths()):
                client.restore(Checkpoint(path))

    def keep(self, row, sent, shared):
        for i, state in enumerate(sent):
            if judge := part_of(state, "discriminator"):
                save_file(judge, self.folder / f"sent_{i}.safetensors")
        self.rows.append(row)
        for client, path in zip(self.clients, self._paths()):
            shutil.rmtree(path, ignore_errors=True)  # of an attempt that was killed before the server's state
            client.save(Checkpoint(path))
        self.server.save({}, {}, {"noise": self.noise}, {"rows": self.rows, "velocity": self.velocity})
        for old in set((self.folder / "checkpoint").glob("round_*")) - {self._paths()[0].parent}:
            shutil.rmtree(old)

    def _paths(self):
        """Each client's checkpoint of the last round."""
        return [self.folder / "checkpoint" / f"round_{len(self.rows)}" / str(i) for i in range(len(self.clients))]


def _save_networks(folder, clients, exchanged, labels, samples, seed):
    """What everyone has goes without a number, what one client has with its number."""
    one = len(clients) == 1
    for i, client in enumerate(clients):
        if not (one or "ema" in exchanged) or i == 0:
            end = "" if one or "ema" in exchanged else f"_{i}"
            save_weights(folder / f"weights{end}.safetensors", client.ema)
            save_file(draw_lesions(client.ema, labels, samples, seed), folder / f"samples{end}.safetensors")
        if not (one or "discriminator" in exchanged) or i == 0:
            end = "" if one or "discriminator" in exchanged else f"_{i}"
            save_weights(folder / f"discriminator{end}.safetensors", client.discriminator)


def _described(images):
    return {
        "images": len(images), "subjects": len(np.unique(images.subjects)),
        "per_class": np.bincount(images.labels, minlength=len(images.classes)).tolist(),
    }  # fmt: skip


def _whose(stem, kind):
    number = stem.removeprefix(kind).removeprefix("_")
    return f"client {number}" if number else "all"


def _check_arm(arm, keep_local, private, momentum, proximal, reset_state):
    if arm not in ARMS:
        raise ValueError(f"arm must be one of {', '.join(ARMS)}, not {arm!r}.")
    if set(keep_local) - {"discriminator"}:
        raise ValueError(f"Only the discriminator can stay at home, not {', '.join(keep_local)}.")
    if any(part is None for part in private) and any(part is not None for part in private):
        raise ValueError("Private updates need clip, noise_multiplier and delta: give all three or none.")
    if arm != "federated" and (keep_local or private[0] is not None or momentum or proximal or reset_state):
        raise ValueError(f"keep_local, clip, momentum, proximal and reset_state belong to 'federated', not to {arm!r}.")


# --- how good -----------------------------------------------------------------------------------------------


def judge_federated(
    folder, *, data, image_size, trained, feature_size, seed=0, holdout_splits=("test",), most=1000, halves=20,
    cache=None,
):  # fmt: skip
    """A stage: how far each arm's images are from each client's training images, from all, and from held-out ones.

    trained: {arm: folder of `train_federated`}, all with the same clients. "rows": "arm" and "made_by" ("all" or a
    client), "reference" ("client 0", ..., "pooled", "held out"), "images", and "frechet_distance" and "kernel_distance"
    in EfficientNet-Lite0 features at `feature_size` px ("features"), each {"value", "low", "high"}; lower is better.
    The arm "real", held-out images in the place of made ones, is what a perfect generator would have.

    Every set is cut to the same number of images in all rows of one reference, `most` or the smallest set: compare
    arms within a reference, never distances to different ones. Intervals, 95 %, are from random halves of both sets,
    the real ones by subject (`metrics.compared`): networks are fixed, another training would differ by more.
    """
    train = datasets.load(data, "train", image_size)
    held_out = together([datasets.load(data, split, image_size) for split in holdout_splits])
    real = {f"client {i}": train.subset(rows) for i, rows in enumerate(_same_clients(trained))}
    real |= {"pooled": train, HELD_OUT: held_out}
    made = {(arm, who): images for arm, of in trained.items() for who, (images, _) in load_made_by(of).items()}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    extractor, cache = efficientnet_lite0(feature_size, device), None if train.restricted else cache
    seen = {name: features(images.images, extractor, cache) for name, images in real.items()}
    judged = {key: (features(images, extractor, cache), None) for key, images in made.items()}
    judged["real", HELD_OUT] = seen[HELD_OUT], _owners(held_out)
    rows = []
    for name, images in real.items():
        sets = {key: of for key, of in judged.items() if (name, key[1]) != (HELD_OUT, HELD_OUT)}
        reference = seen[name], _owners(images)
        count = min(most, len(images), *(len(of) for of, _ in sets.values()))
        for (arm, who), other in sets.items():
            found = distances_with_intervals(*_cut(reference, count, seed), *_cut(other, count, seed + 1), seed, halves)
            rows.append({"arm": arm, "made_by": who, "reference": name, "images": count} | found)
    return {"rows": rows, "features": extractor.name}


def distances_with_intervals(real, real_subjects, other, other_subjects, seed=0, halves=20):
    """{"frechet_distance", "kernel_distance"}: {"value", "low", "high"} of features (N, D), as in `metrics.compared`,
    whose other measures take long.
    """
    rng, parts = np.random.default_rng(seed), []
    for _ in range(halves):
        rows = half_rows(len(real), real_subjects, rng), half_rows(len(other), other_subjects, rng)
        parts.append([distance(real[rows[0]], other[rows[1]]) for distance in MEASURES.values()])
    found = {}
    for (name, distance), drawn in zip(MEASURES.items(), zip(*parts)):
        value = distance(real, other)
        low, high = shrunk_interval(name, value, drawn)
        found[name] = {"value": float(value), "low": low, "high": high}
    return found


def _cut(of, count, seed):
    """`count` random rows of features and, where known, of their subjects."""
    rows, subjects = of
    chosen = np.sort(np.random.default_rng(seed).permutation(len(rows))[:count])
    return rows[chosen], None if subjects is None else subjects[chosen]


def _same_clients(trained):
    """The clients' rows, which all arms must share."""
    if not trained:
        raise ValueError("There is no arm to judge: give trained as {arm: folder of train_federated}.")
    first, *others = [load_clients(folder) for folder in trained.values()]
    for other in others:
        if len(other) != len(first) or not all(np.array_equal(a, b) for a, b in zip(first, other)):
            raise ValueError("The arms divide the images differently: train all with the same data, shares and seed.")
    return first


def _owners(images):
    return None if images.subject_kind == "image" else images.subjects


# --- what leaks ---------------------------------------------------------------------------------------------


def attack_shared_discriminator(folder, *, data, image_size, trained, holdout_splits=("val", "test")):
    """A stage: does a discriminator that leaves a hospital tell its training images? Federation alone is not privacy.

    trained: a folder of `train_federated`, of any arm. LOGAN's white box (`logan_white_box`): logits are larger for
    members where the discriminator has overfitted. "rows", for each client, whose training images are the members:

    "view": "shared", what every client has after the last round; "sent", the discriminator that the server got from
    this client; "sent less shared", the difference of their logits, which takes away what makes an image look real to
    everyone; "own", a discriminator that never left. "non_members": "held out", images of `holdout_splits`, which is
    membership; or "other clients", their training images: whose hospital is this image from? Against these the shared
    view is blind if it has overfitted to all alike. "auc" with its 95 % interval "low", "high", over subjects where
    they are known, "tpr_at_1pct_fpr", "members", "others", and "finds_leak" (`AttackResult`).

    Clients may differ in their class shares, and logits differ by class: a small "other clients" area can be that.
    """
    train = datasets.load(data, "train", image_size)
    held_out = together([datasets.load(data, split, image_size) for split in holdout_splits])
    clients, judges = load_clients(trained), load_discriminators(trained)
    scores = {key: (_logits(train, judge), _logits(held_out, judge)) for key, judge in judges.items()}
    whose, theirs = _owners(train), _owners(held_out)
    rows = []
    for i, members in enumerate(clients):
        others = np.setdiff1d(np.concatenate(clients), members)
        for view, (inside, outside) in _views(scores, i).items():
            sides = {HELD_OUT: (outside, theirs)}
            sides |= {"other clients": _rows_of(inside, whose, others)} if len(others) else {}
            for against, side in sides.items():
                found = _attacked(view, *_rows_of(inside, whose, members), *side)
                rows.append({"client": i, "view": view, "non_members": against} | found)
    return {"rows": rows}


def _logits(images, judge):
    return logan_white_box(images.images, judge, images.labels)


def _views(scores, client):
    """Scores of the training and of the held-out images, by what an attacker on this client's images has."""
    named = {"shared": ("shared", None), "sent": ("sent", client), "own": ("own", client)}
    found = {view: scores[key] for view, key in named.items() if key in scores}
    if {"shared", "sent"} <= set(found):
        found["sent less shared"] = tuple(a - b for a, b in zip(found["sent"], found["shared"]))
    return found


def _rows_of(scores, subjects, rows):
    return scores[rows], None if subjects is None else subjects[rows]


def _attacked(view, members, whose, others, theirs):
    found = attack_result(view, members, others, whose, theirs)
    return {
        "auc": found.auc, "low": found.low, "high": found.high, "tpr_at_1pct_fpr": found.operating[0].tpr,
        "members": len(members), "others": len(others), "finds_leak": found.finds_leak,
    }  # fmt: skip
