"""Federated rounds: sums by hand, closed forms, and leaks and noise that were planted."""

import copy
import dataclasses
import functools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from scipy.stats import norm
from torch import nn

from lookalike.data import datasets, phantoms
from lookalike.metrics.distances import frechet_distance
from lookalike.privacy import attack
from lookalike.privacy.attack import attack_result
from lookalike.training import federated
from lookalike.training.federated import (
    EXCHANGED,
    ClientPrivacy,
    attack_shared_discriminator,
    average,
    client_epsilon,
    client_weights,
    clipped,
    distances_with_intervals,
    judge_federated,
    load_clients,
    load_discriminators,
    load_made_by,
    pulled_back,
    run_rounds,
    split_clients,
    take_state,
    train_federated,
    update_norm,
)

SIDE = 8


# --- a training small enough to follow ----------------------------------------------------------------------


class FakeGenerator(nn.Module):
    """One mean image per class, and grain."""

    def __init__(self):
        super().__init__()
        self.means = nn.Parameter(0.1 * torch.randn(2, 3, SIDE, SIDE))
        self.register_buffer("w_mean", torch.zeros(4))

    @torch.no_grad()
    def sample(self, labels, generator=None, truncation=1.0):
        noise = torch.randn(len(labels), 3, SIDE, SIDE, generator=generator)
        return (self.means[labels] + 0.1 * noise).clamp(-1, 1)


class FakeDiscriminator(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3 * SIDE * SIDE, 2)

    def forward(self, images, labels):
        return self.linear(images.flatten(1)).gather(1, labels[:, None])[:, 0]


class FakeTraining:
    """The attributes of `lesions.LesionTraining`; Adam, an average of weights, and running numbers that count."""

    def __init__(self, generator, discriminator, images, labels, random, batch_size=4):
        self.generator, self.discriminator, self.ema = generator, discriminator, copy.deepcopy(generator)
        self.images, self.labels, self.random, self.batch_size = images, labels, random, batch_size
        self.images_seen = 0
        self.reset_state()

    def reset_state(self):
        self.optimizers = {
            name: torch.optim.Adam(getattr(self, name).parameters(), lr=0.02) for name in ("generator", "discriminator")
        }
        self.augment_p, self.path_mean = 0.0, torch.tensor(0.0)

    def save(self, checkpoint):
        state = {"p": self.augment_p, "path_mean": self.path_mean, "images_seen": self.images_seen}
        checkpoint.save(self._modules(), self.optimizers, {"random": self.random}, state)

    def restore(self, checkpoint):
        state = checkpoint.load(self._modules(), self.optimizers, {"random": self.random})
        self.augment_p, self.path_mean, self.images_seen = state["p"], state["path_mean"], state["images_seen"]

    def _modules(self):
        return {part: getattr(self, part) for part in EXCHANGED}

    def run(self, iterations):
        for _ in range(iterations):
            rows = torch.randint(len(self.images), (self.batch_size,), generator=self.random)
            real, labels = self.images[rows], self.labels[rows]
            self._step("generator", (self.generator.means[labels] - real).square().mean())
            fake = self.generator.means[labels].detach()
            loss = F.softplus(-self.discriminator(real, labels)) + F.softplus(self.discriminator(fake, labels))
            self._step("discriminator", loss.mean())
            with torch.no_grad():
                self.ema.means.lerp_(self.generator.means, 0.1)
                self.generator.w_mean.add_(0.1)
                self.ema.w_mean.copy_(self.generator.w_mean)
            self.augment_p += 0.01
            self.path_mean = self.path_mean + 0.5
            self.images_seen += self.batch_size

    def _step(self, name, loss):
        self.optimizers[name].zero_grad()
        loss.backward()
        self.optimizers[name].step()


def fake_clients(sizes=(6, 20, 34)):
    """Clients with equal weights and images that differ in brightness."""
    torch.manual_seed(0)
    networks, clients = (FakeGenerator(), FakeDiscriminator()), []
    for i, size in enumerate(sizes):
        random = torch.Generator().manual_seed(i)
        images = 0.2 * torch.randn(size, 3, SIDE, SIDE, generator=random) + 0.3 * i - 0.3
        labels = torch.arange(size) % 2
        clients.append(FakeTraining(*copy.deepcopy(networks), images, labels, random))
    return clients


class Adder:
    """A client whose training adds one number to every weight: its rounds can be followed by hand."""

    def __init__(self, step, size):
        self.generator, self.discriminator, self.ema = (nn.Linear(2, 1) for _ in range(3))
        for part in EXCHANGED:
            for weight in getattr(self, part).parameters():
                nn.init.zeros_(weight)
        self.step, self.images, self.images_seen = step, torch.zeros(size), 0
        self.optimizers, self.augment_p, self.path_mean = {}, 0.0, torch.tensor(0.0)

    @torch.no_grad()
    def run(self, iterations):
        for part in EXCHANGED:
            for weight in getattr(self, part).parameters():
                weight += self.step * iterations
        self.images_seen += iterations


# --- clients ------------------------------------------------------------------------------------------------


def test_clients_share_no_subject_and_get_about_their_shares():
    subjects = np.array([f"patient {i // 4}" for i in range(600)])
    parts = split_clients(subjects, np.arange(600) % 2, (1, 5, 9), seed=3)
    assert sorted(np.concatenate(parts)) == list(range(600))
    whose = [set(subjects[rows]) for rows in parts]
    assert not whose[0] & whose[1] | whose[0] & whose[2] | whose[1] & whose[2]
    np.testing.assert_allclose([len(rows) / 600 for rows in parts], np.array([1, 5, 9]) / 15, atol=0.01)
    assert not np.array_equal(parts[0], split_clients(subjects, np.arange(600) % 2, seed=4)[0])


def test_a_client_without_subjects_or_without_a_class_is_refused():
    subjects, labels = np.array(list("aabbccdd")), np.array([0, 0, 0, 0, 1, 1, 1, 1])
    with pytest.raises(ValueError, match="gets no subject: 4 subjects are too few"):
        split_clients(subjects, labels, (1, 99))
    with pytest.raises(ValueError, match="has no image of class"):
        split_clients(subjects, labels, (1, 3))
    with pytest.raises(ValueError, match="positive numbers"):
        split_clients(subjects, labels, (1, 0))


def test_weights_by_images_and_equal():
    assert client_weights([1865, 10016, 18003]) == pytest.approx([0.0624, 0.3352, 0.6024], abs=1e-4)
    assert client_weights([1, 5, 9], "equal") == pytest.approx([1 / 3] * 3)
    with pytest.raises(ValueError, match="weighting must be one of samples, equal"):
        client_weights([1, 2], "loss")
    with pytest.raises(ValueError, match="an image or more"):
        client_weights([0, 2])


# --- averages -----------------------------------------------------------------------------------------------


def states(count, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [
        {"g.weight": torch.randn(3, 2, generator=random), "g.steps": torch.tensor(i),
         "d.b": torch.randn(4, generator=random)}
        for i in range(count)
    ]  # fmt: skip


def test_the_average_of_one_client_is_itself_to_the_bit():
    (only,) = states(1)
    found = average([only], [0.3])
    assert all(torch.equal(found[name], value) for name, value in only.items())
    found["g.weight"].zero_()
    assert only["g.weight"].abs().sum() > 0


def test_the_average_is_the_sum_by_hand_and_whole_numbers_are_the_heaviest_s():
    given, weights = states(3), [1, 5, 2]
    found = average(given, weights)
    for name in ("g.weight", "d.b"):
        flat = [state[name].flatten().tolist() for state in given]
        by_hand = [sum(w * value for w, value in zip(weights, values)) / 8 for values in zip(*flat)]
        np.testing.assert_allclose(found[name].flatten(), by_hand, rtol=1e-6)
        assert found[name].dtype == torch.float32
    assert found["g.steps"] == 1
    assert found["g.steps"].dtype == torch.int64


def test_states_that_do_not_go_together_are_refused():
    given = states(2)
    with pytest.raises(ValueError, match="differ in names or shapes"):
        average([given[0], given[1] | {"extra": torch.zeros(1)}], [1, 1])
    for weights in ([1], [1, 0], [1, math.inf]):
        with pytest.raises(ValueError, match="one positive weight per state"):
            average(given, weights)


# --- rounds -------------------------------------------------------------------------------------------------


def value_of(client, part="generator"):
    (value,) = {number for weight in getattr(client, part).parameters() for number in weight.flatten().tolist()}
    return value


def test_rounds_of_adders_move_by_the_weighted_mean():
    clients = [Adder(1.0, 1), Adder(4.0, 3)]
    found = run_rounds(clients, rounds=3, iterations=2)
    mean = 2 * (1 * 1.0 + 3 * 4.0) / 4
    for client in clients:
        assert [value_of(client, part) for part in EXCHANGED] == [3 * mean] * 3
    assert [row["round"] for row in found["rounds"]] == [1, 2, 3]
    first = found["rounds"][0]
    assert [row["update_norm"] for row in first["clients"]] == pytest.approx([2 * 3, 8 * 3])  # nine weights: root 9
    assert first["update_norm"] == pytest.approx(mean * 3)
    assert first["noise_norm"] is None
    assert found["privacy"] is None
    assert [float(state["ema.bias"]) for state in found["sent"]] == [2 * mean + 2, 2 * mean + 8]
    equal = [Adder(1.0, 1), Adder(4.0, 3)]
    run_rounds(equal, 3, 2, "equal")
    assert value_of(equal[0]) == 3 * 5


def test_what_stays_at_home_is_not_averaged():
    clients = [Adder(1.0, 2), Adder(3.0, 2)]
    found = run_rounds(clients, 2, 1, exchanged=("generator", "ema"))
    assert [value_of(client, "discriminator") for client in clients] == [2, 6]
    assert [value_of(client) for client in clients] == [4, 4]
    assert not any(name.startswith("discriminator") for name in found["shared"])
    alone = [Adder(1.0, 2), Adder(3.0, 2)]
    rows = run_rounds(alone, 2, 1, exchanged=())["rounds"]
    assert [value_of(client) for client in alone] == [2, 6]
    assert rows[0]["update_norm"] is rows[0]["clients"][0]["update_norm"] is None


def test_one_client_s_rounds_are_plain_training():
    (alone,), (federated_one,) = fake_clients((20,)), fake_clients((20,))
    alone.run(12)
    run_rounds([federated_one], rounds=3, iterations=4)
    for name, value in take_state(alone).items():
        assert torch.equal(take_state(federated_one)[name], value)


def test_server_momentum_adds_what_is_left_of_earlier_steps():
    clients, velocity = [Adder(1.0, 1), Adder(3.0, 1)], {}
    run_rounds(clients, 3, 1, momentum=0.5, velocity=velocity)
    by_hand, v = 0.0, 0.0
    for _ in range(3):
        v = 0.5 * v + 2.0
        by_hand += v
    assert value_of(clients[0]) == pytest.approx(by_hand)
    assert float(velocity["ema.bias"]) == pytest.approx(v)


def test_the_proximal_pull_is_the_gradient_of_half_mu_times_the_squared_distance():
    """The slow twin writes the term into the loss."""
    client, twin = (FakeTraining(*pair, torch.zeros(4, 3, SIDE, SIDE), torch.arange(4) % 2, None) for pair in pairs())
    for of in (client, twin):
        of.optimizers = {name: torch.optim.SGD(getattr(of, name).parameters(), 0.1) for name in of.optimizers}
    anchor = twin.generator.means.detach().clone()
    with pulled_back(client, 0.7):
        for _ in range(5):
            client._step("generator", client.generator.means.sum())
            loss = twin.generator.means.sum() + 0.35 * (twin.generator.means - anchor).square().sum()
            twin._step("generator", loss)
    torch.testing.assert_close(client.generator.means, twin.generator.means)
    free = client.generator.means.detach().clone()
    client._step("generator", client.generator.means.sum())
    torch.testing.assert_close(client.generator.means, free - 0.1)  # no pull outside the block


def pairs():
    torch.manual_seed(0)
    networks = FakeGenerator(), FakeDiscriminator()
    return [copy.deepcopy(networks) for _ in range(2)]


def test_a_strong_pull_keeps_clients_nearer_to_what_they_share():
    norms = [run_rounds(fake_clients(), 2, 8, proximal=mu)["rounds"][-1]["clients"][2]["update_norm"] for mu in (0, 10)]
    assert norms[1] < 0.7 * norms[0]


def test_running_numbers_go_on_or_start_again_and_so_does_adam():
    def ends(reset_state):
        clients = fake_clients()
        rows = run_rounds(clients, 3, 5, reset_state=reset_state)["rounds"]
        told = [(row["clients"][0]["augment_p"], row["clients"][0]["path_mean"]) for row in rows]
        steps = {int(state["step"]) for state in clients[0].optimizers["generator"].state.values()}
        return told, steps, [row["clients"][0]["images_seen"] for row in rows]

    told, steps, seen = ends(False)
    assert told == [(pytest.approx(0.05 * i), 2.5 * i) for i in (1, 2, 3)]
    assert (steps, seen) == ({15}, [20, 40, 60])
    told, steps, seen = ends("running")
    assert told == [(pytest.approx(0.05), 2.5)] * 3
    assert (steps, seen) == ({15}, [20, 40, 60])
    told, steps, seen = ends(True)
    assert told == [(pytest.approx(0.05), 2.5)] * 3
    assert (steps, seen) == ({5}, [20, 40, 60])


def test_settings_that_make_no_sense_are_refused():
    clients, privacy = [Adder(1.0, 1)], ClientPrivacy(1.0, 1.0, 0.1)
    for sentence, settings in {
        "may name generator": {"exchanged": ("optimizers",)},
        "reset_state must be": {"reset_state": "ada"},
        "momentum lies in": {"momentum": 1.0},
        "need weighting='equal'": {"privacy": privacy},
        "no update to clip": {"privacy": privacy, "weighting": "equal", "exchanged": ()},
    }.items():
        with pytest.raises(ValueError, match=sentence):
            run_rounds(clients, 1, 1, **settings)
    with pytest.raises(ValueError, match="0 rounds"):
        run_rounds(clients, 0, 1)
    for wrong in ((0, 1, 0.1), (1, -1, 0.1), (1, 1, 1.0)):
        with pytest.raises(ValueError, match="must"):
            ClientPrivacy(*wrong)


# --- privacy ------------------------------------------------------------------------------------------------


def test_a_long_update_is_cut_in_its_direction_and_a_short_one_is_left():
    before, after = states(2)
    cut = clipped(before, after, 0.5)
    assert update_norm(before, cut) == pytest.approx(0.5, rel=1e-5)
    ratio = (cut["g.weight"] - before["g.weight"]) / (after["g.weight"] - before["g.weight"])
    np.testing.assert_allclose(ratio, 0.5 / update_norm(before, after), rtol=1e-4)
    assert cut["g.steps"] == before["g.steps"]
    whole = clipped(before, after, 1e3)
    assert torch.equal(whole["d.b"], after["d.b"])
    assert whole["g.steps"] == before["g.steps"]
    with pytest.raises(ValueError, match="not finite"):
        clipped(before, after | {"d.b": torch.full((4,), math.nan)}, 1.0)


def test_private_rounds_without_noise_average_clipped_updates():
    clients = [Adder(0.1, 1), Adder(5.0, 1), Adder(-7.0, 1)]
    found = run_rounds(clients, 1, 1, "equal", privacy=ClientPrivacy(1.5, 0.0, 0.1))
    assert value_of(clients[0]) == pytest.approx((0.1 + 0.5 - 0.5) / 3)  # nine weights: 0.5 each is a length of 1.5
    assert [row["update_norm"] for row in found["rounds"][0]["clients"]] == pytest.approx([0.3, 15, 21])
    assert found["privacy"]["epsilon"] is None
    assert found["rounds"][0]["noise_norm"] == 0


def test_noise_has_the_deviation_that_is_accounted():
    clients = fake_clients()
    quiet = run_rounds(fake_clients(), 1, 2, "equal", privacy=ClientPrivacy(0.3, 0.0, 0.1))["shared"]
    found = run_rounds(clients, 1, 2, "equal", privacy=ClientPrivacy(0.3, 4.0, 0.1))
    gaps = torch.cat([(found["shared"][name] - value).flatten() for name, value in quiet.items()])
    assert len(gaps) > 1000
    assert float(gaps.std()) == pytest.approx(4.0 * 0.3 / 3, rel=0.06)
    assert abs(float(gaps.mean())) < 0.04
    assert found["rounds"][0]["noise_norm"] == pytest.approx(float(gaps.norm()), rel=0.06)
    assert found["rounds"][0]["noise_norm"] > 5 * found["rounds"][0]["update_norm"]


def test_epsilon_is_that_of_the_gaussian_mechanism():
    """Balle and Wang's delta of `rounds` full steps, solved the other way round."""
    found = client_epsilon(ClientPrivacy(1.0, 5.0, 1e-3), rounds=9)
    for epsilon, mu in ((found["epsilon"], 3 / 5), (found["epsilon_replaced"], 2 * 3 / 5)):
        delta = norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)
        assert delta == pytest.approx(1e-3, rel=1e-3)
    json.dumps(found, allow_nan=False)


# --- the training stage -------------------------------------------------------------------------------------


@functools.cache
def small_load(split, image_size):
    counts, seeds = {"train": 240, "val": 40, "test": 80}, {"train": 0, "val": 1, "test": 2}
    return phantoms.dermoscopy(counts[split], seed=seeds[split], split=split, image_size=image_size).image_set


def cached_load(name, split="train", image_size=SIDE):
    return small_load(split, image_size)


def fake_training(build, images, settings, seed, random):
    torch.manual_seed(seed)
    networks = FakeGenerator(), FakeDiscriminator()
    return FakeTraining(*networks, datasets.as_tensor(images), torch.as_tensor(images.labels), random)


@pytest.fixture
def faked(monkeypatch):
    monkeypatch.setattr(datasets, "load", cached_load)
    monkeypatch.setattr(federated, "new_training", fake_training)
    monkeypatch.setattr(federated, "build_networks", lambda build: (FakeGenerator(), FakeDiscriminator()))


STAGE = {"data": "phantom_dermoscopy", "image_size": SIDE, "rounds": 3, "iterations": 4, "seed": 1, "samples": 60}


def test_federated_networks_are_one_and_the_server_s_view_is_kept(tmp_path, faked):
    found = train_federated(tmp_path, **STAGE)
    json.dumps(found, allow_nan=False)
    assert sum(client["images"] for client in found["clients"]) == 240
    assert [sum(client["per_class"]) for client in found["clients"]] == [c["images"] for c in found["clients"]]
    assert [client["subjects"] for client in found["clients"]] == [4, 20, 36]
    assert found["exchanged"] == 2 * (2 * 3 * 64 + 4) + 2 * (3 * 64 + 1)
    assert (len(found["rounds"]), found["iterations"], found["privacy"]) == (3, 12, None)
    images, labels = load_made_by(tmp_path)["all"]
    assert images.shape == (60, 3, SIDE, SIDE)
    assert images.dtype == np.uint8
    assert set(labels.tolist()) == {0, 1}
    judges = load_discriminators(tmp_path)
    assert set(judges) == {("shared", None), ("sent", 0), ("sent", 1), ("sent", 2)}
    sizes = [client["images"] for client in found["clients"]]
    by_hand = sum(n * judges["sent", i].linear.weight for i, n in enumerate(sizes)) / sum(sizes)
    torch.testing.assert_close(judges["shared", None].linear.weight, by_hand)
    rows = load_clients(tmp_path)
    subjects = cached_load("").subjects
    assert [len(set(subjects[part])) for part in rows] == [4, 20, 36]


def test_local_clients_have_images_of_their_own_and_as_many_iterations(tmp_path, faked):
    found = train_federated(tmp_path, arm="local", **STAGE)
    assert set(load_made_by(tmp_path)) == {"client 0", "client 1", "client 2"}
    assert set(load_discriminators(tmp_path)) == {("own", 0), ("own", 1), ("own", 2)}
    assert [row["images_seen"] for row in found["rounds"][-1]["clients"]] == [48, 48, 48]
    assert found["exchanged"] == 0


def test_the_central_network_trains_as_long_as_one_client_on_everything(tmp_path, faked):
    found = train_federated(tmp_path, arm="central", **STAGE)
    assert set(load_made_by(tmp_path)) == {"all"}
    assert set(load_discriminators(tmp_path)) == {("shared", None)}
    assert [row["images_seen"] for row in found["rounds"][-1]["clients"]] == [48]
    assert len(found["clients"]) == 3
    plain = fake_training(None, cached_load(""), {}, 1, federated.stream(1, "client 0"))
    plain.run(12)
    torch.testing.assert_close(load_file(tmp_path / "weights.safetensors")["means"], plain.ema.means.detach())


def test_a_discriminator_at_home_is_never_sent(tmp_path, faked):
    train_federated(tmp_path, keep_local=["discriminator"], **STAGE)
    assert set(load_discriminators(tmp_path)) == {("own", 0), ("own", 1), ("own", 2)}
    assert set(load_made_by(tmp_path)) == {"all"}


def interrupt_after(number, monkeypatch, train):
    keep = federated._Keeper.keep

    def killed(self, row, sent, shared):
        keep(self, row, sent, shared)
        if row["round"] == number:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(federated._Keeper, "keep", killed)
        with pytest.raises(KeyboardInterrupt):
            train()


def test_an_interrupted_training_goes_on_to_the_same_bits(tmp_path, faked, monkeypatch):
    settings = STAGE | {"momentum": 0.4, "weighting": "equal", "clip": 0.5, "noise_multiplier": 0.2, "delta": 0.1}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir(), broken.mkdir()
    expected = train_federated(whole, **settings)
    interrupt_after(2, monkeypatch, lambda: train_federated(broken, **settings))
    assert train_federated(broken, **settings) == expected
    for name in ("weights", "discriminator", "samples", "sent_1"):
        a, b = (load_file(folder / f"{name}.safetensors") for folder in (whole, broken))
        assert all(torch.equal(a[key], b[key]) for key in a)


REAL = STAGE | {"rounds": 2, "iterations": 4, "samples": 8, "base": 64, "max_channels": 8, "w_dim": 8, "batch_size": 4}


def test_real_networks_are_trained_averaged_and_resumed(tmp_path, monkeypatch):
    """StyleGAN2 of 8 px: where running numbers start again, the augmentation never gets going."""
    monkeypatch.setattr(datasets, "load", cached_load)
    whole, broken, reset = (tmp_path / name for name in ("whole", "broken", "reset"))
    whole.mkdir(), broken.mkdir(), reset.mkdir()
    expected = train_federated(whole, **REAL)
    assert not {row["path_mean"] for row in expected["rounds"][1]["clients"]} & {0.0}
    judges = load_discriminators(whole)
    sizes = [client["images"] for client in expected["clients"]]
    by_hand = sum(n * judges["sent", i].out.weight for i, n in enumerate(sizes)) / sum(sizes)
    torch.testing.assert_close(judges["shared", None].out.weight, by_hand)
    interrupt_after(1, monkeypatch, lambda: train_federated(broken, **REAL))
    assert train_federated(broken, **REAL) == expected
    for name in ("weights", "discriminator", "samples"):
        a, b = (load_file(folder / f"{name}.safetensors") for folder in (whole, broken))
        assert all(torch.equal(a[key], b[key]) for key in a)
    rows = train_federated(reset, reset_state="running", **REAL)["rounds"]
    most = 4 * 4 / 500_000 * 1  # one adaptation of four iterations a round
    assert all(client["augment_p"] <= most for row in rows for client in row["clients"])
    assert rows[0] == expected["rounds"][0]


def test_arms_refuse_what_is_not_theirs(tmp_path, faked):
    for sentence, settings in {
        "arm must be one of": {"arm": "split"},
        "Only the discriminator": {"keep_local": ["ema"]},
        "all three or none": {"noise_multiplier": 1.0},
        "belong to 'federated'": {"arm": "local", "reset_state": True},
        "need weighting='equal'": {"clip": 1.0, "noise_multiplier": 1.0, "delta": 0.1},
    }.items():
        with pytest.raises(ValueError, match=sentence):
            train_federated(tmp_path, **STAGE | settings)


# --- how good -----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Named:
    name: str = "means of blocks"


def block_means(images, extractor, cache=None):
    return images.reshape(len(images), 3, 2, SIDE // 2, 2, SIDE // 2).mean((3, 5)).reshape(len(images), 12)


def release(folder, **sets):
    folder.mkdir()
    rows = split_clients(cached_load("").subjects, cached_load("").labels, seed=1)
    save_file({f"client_{i}": torch.as_tensor(part) for i, part in enumerate(rows)}, folder / "clients.safetensors")
    for name, images in sets.items():
        made = {"images": torch.as_tensor(images), "labels": torch.zeros(len(images), dtype=torch.int64)}
        save_file(made, folder / f"{name}.safetensors")
    return folder


def judge(tmp_path, trained, **settings):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load", cached_load)
        patch.setattr(federated, "features", block_means)
        patch.setattr(federated, "efficientnet_lite0", lambda size, device: Named())
        known = {"data": "", "image_size": SIDE, "feature_size": 64, "halves": 5}
        return judge_federated(tmp_path, trained=trained, **known | settings)


def test_a_good_arm_is_near_and_a_bad_one_far(tmp_path):
    good = phantoms.dermoscopy(120, seed=7, image_size=SIDE).image_set.images
    noise = np.random.default_rng(0).integers(0, 256, good.shape).astype(np.uint8)
    trained = {
        "federated": release(tmp_path / "a", samples=good),
        "local": release(tmp_path / "b", samples_0=noise, samples_1=good, samples_2=noise),
    }
    found = judge(tmp_path, trained)
    json.dumps(found, allow_nan=False)
    by = {(row["arm"], row["made_by"], row["reference"]): row for row in found["rows"]}
    assert len(by) == len(found["rows"]) == 5 * 4 + 4  # the held-out images against themselves are left out
    for reference in ("client 2", "pooled"):
        for measure in ("frechet_distance", "kernel_distance"):
            near, far = (
                by[key][measure] for key in (("federated", "all", reference), ("local", "client 0", reference))
            )
            assert near["high"] < far["low"]
            assert by["real", "held out", reference][measure]["value"] < far["low"]
            assert near["low"] <= near["value"] <= near["high"]
    assert by["federated", "all", "pooled"]["images"] == 80
    assert by["federated", "all", "client 0"]["images"] == 16
    assert {by[key]["images"] for key in by if key[2] == "client 1"} == {80}


def test_a_distance_is_that_of_the_features_it_says():
    rng = np.random.default_rng(0)
    real, other = rng.normal(size=(60, 4)), rng.normal(0.5, 1, (50, 4))
    found = distances_with_intervals(real, np.arange(60) // 3, other, None, halves=5)
    assert found["frechet_distance"]["value"] == pytest.approx(frechet_distance(real, other))
    assert found["kernel_distance"]["low"] < found["kernel_distance"]["value"] < found["kernel_distance"]["high"]


def test_arms_with_other_clients_are_not_compared(tmp_path):
    made = cached_load("", "test").images
    trained = {name: release(tmp_path / name, samples=made) for name in ("a", "b")}
    save_file({"client_0": torch.arange(240)}, trained["b"] / "clients.safetensors")
    with pytest.raises(ValueError, match="divide the images differently"):
        judge(tmp_path, trained)
    with pytest.raises(ValueError, match="no arm to judge"):
        judge(tmp_path, {})


# --- what leaks ---------------------------------------------------------------------------------------------


class Memory(nn.Module):
    """A discriminator that has learnt images by heart: logits are larger the nearer an image is to one of them."""

    def __init__(self, count):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("images", torch.zeros(count, 3 * SIDE * SIDE))

    def forward(self, images, labels):
        return -self.scale * torch.cdist(images.flatten(1), self.images).min(1).values


@pytest.fixture(scope="module")
def overfitted(tmp_path_factory):
    """Client 1 sends a discriminator that knows its images; the others' and the shared one know other phantoms."""
    folder = tmp_path_factory.mktemp("overfitted")
    release(folder / "run")
    train = datasets.as_tensor(cached_load("")).flatten(1)
    other = datasets.as_tensor(phantoms.dermoscopy(80, seed=9, image_size=SIDE).image_set).flatten(1)
    rows = load_clients(folder / "run")
    (folder / "run" / "networks.json").write_text("{}")
    for name, known in {"discriminator": other, "sent_0": other, "sent_1": train[rows[1]], "sent_2": other}.items():
        save_file({"images": known.contiguous(), "scale": torch.tensor(1.0)}, folder / "run" / f"{name}.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load", cached_load)
        patch.setattr(federated, "build_networks", lambda build: (None, Memory(80)))
        patch.setattr(attack, "RESAMPLES", 50)  # of an interval that no row has
        found = attack_shared_discriminator(folder, data="", image_size=SIDE, trained=folder / "run")
    return {(row["client"], row["view"], row["non_members"]): row for row in found["rows"]}, rows


def test_an_overfitted_discriminator_is_found_where_it_was_planted(overfitted):
    by, _ = overfitted
    json.dumps(list(by.values()), allow_nan=False)
    for view in ("sent", "sent less shared"):
        for against in ("held out", "other clients"):
            assert by[1, view, against]["auc"] > 0.95
            assert by[1, view, against]["finds_leak"]
    for client in (0, 1, 2):
        assert by[client, "shared", "held out"]["low"] < 0.5 < by[client, "shared", "held out"]["high"]
    for client in (0, 2):
        assert by[client, "sent less shared", "held out"]["auc"] == 0.5


def test_the_attack_s_intervals_are_over_subjects(overfitted):
    by, rows = overfitted
    train, held_out = cached_load(""), [cached_load("", split) for split in ("val", "test")]
    memory = datasets.as_tensor(phantoms.dermoscopy(80, seed=9, image_size=SIDE).image_set).flatten(1)

    def scores(images):
        return -torch.cdist(datasets.as_tensor(images).flatten(1), memory).min(1).values.double().numpy()

    outside = np.concatenate([scores(part) for part in held_out])
    theirs = np.concatenate([part.subjects for part in held_out])
    expected = attack_result("", scores(train)[rows[2]], outside, train.subjects[rows[2]], theirs)
    row = by[2, "shared", "held out"]
    assert (row["auc"], row["low"], row["high"]) == pytest.approx((expected.auc, expected.low, expected.high), abs=1e-4)
    assert (row["members"], row["others"]) == (len(rows[2]), 120)


def test_a_central_discriminator_is_attacked_as_shared_alone(tmp_path, faked, monkeypatch):
    monkeypatch.setattr(attack, "RESAMPLES", 50)
    train_federated(tmp_path, arm="central", **STAGE)
    found = attack_shared_discriminator(tmp_path, data="", image_size=SIDE, trained=tmp_path)
    assert {row["view"] for row in found["rows"]} == {"shared"}
    assert len(found["rows"]) == 3 * 2
