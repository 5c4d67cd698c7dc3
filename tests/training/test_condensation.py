"""Condensed sets and their judge: closed forms, slow twins, planted effects, and the whole road on digits of 8 px."""

import json
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file, save_file
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from torch import nn

from lookalike.data import datasets
from lookalike.metrics.intervals import over_seeds, paired_over_seeds
from lookalike.models import acgan
from lookalike.models.convnets import ConvNet
from lookalike.training import condensation, matching
from lookalike.training.cells import load_samples
from lookalike.training.checkpoint import Checkpoint
from lookalike.training.condensation import (
    condensation_ratio,
    conditional_dcgan,
    cover_radius,
    dim,
    distribution_matching,
    draw_set,
    evaluate_sets,
    greedy_centres,
    k_centre,
    latent_stand_in,
    load_generator,
    load_scores,
    random_coreset,
    set_differences,
    train_from_scratch,
)

SIDE, CLASSES = 8, ("0", "1", "2")
COUNTS = {"train": (60, 40, 5), "test": (30, 30, 30)}
SET = {"data": "digits", "image_size": SIDE, "seed": 0}
CONVNET = {"width": 16, "depth": 2}
JUDGE = {"data": "digits", "image_size": SIDE, "networks": ["convnet3"], "batch_size": 8, "lr": 0.05, "strategy": ""}
JUDGE |= CONVNET
MATCH = {"real_batch": 20, "strategy": "crop_scale"} | CONVNET
REAL_LOAD = datasets.load


@pytest.fixture(autouse=True)
def few_digits(monkeypatch):
    """Digits 0, 1 and 2, of which the train split has 60, 40 and 5."""

    def load(name, split="train", image_size=None):
        whole = REAL_LOAD(name, split, image_size)
        rows = [np.flatnonzero(whole.labels == k)[:n] for k, n in enumerate(COUNTS[split])]
        return datasets.dataclasses.replace(whole.subset(np.concatenate(rows)), classes=CLASSES)

    monkeypatch.setattr(datasets, "load", load)


@pytest.fixture
def folder(tmp_path):
    def make(name):
        (tmp_path / name).mkdir()
        return tmp_path / name

    return make


def saved(folder, images, labels):
    save_file({"images": images, "labels": labels.astype(np.int64)}, folder / "samples.safetensors")
    return str(folder)


def distance_of_means(folder):
    """DM's loss of a saved set in the same ten networks and against all real images, so that sets can be compared."""
    train, (images, labels) = datasets.load("digits", "train", SIDE), load_samples(folder)
    real = [datasets.as_tensor(train.images[train.labels == k]) for k in range(3)]
    made = [datasets.as_tensor(images[labels == k]) for k in range(3)]
    torch.manual_seed(7)
    networks = [ConvNet(1, 1, SIDE, **CONVNET) for _ in range(10)]
    with torch.no_grad():
        return float(sum(matching.embedding_loss(network.embed, real, made, "") for network in networks))


def source_rows(folder):
    return load_file(folder / "samples.safetensors")["source_rows"]


def test_ratio_counts_the_classes():
    """5,121 images of 4 classes: 3.91 and 7.81 percent; Table 1 prints 0.98 and 1.95."""
    found = [condensation_ratio(ipc, 4, 5121) for ipc in (50, 100)]
    assert [round(f["ratio"], 2) for f in found] == [3.91, 7.81]
    assert [round(f["as_printed"], 3) for f in found] == [0.976, 1.953]
    with pytest.raises(ValueError, match="1 or more"):
        condensation_ratio(50, 0, 10)


def test_coreset_takes_real_images_once_and_names_short_classes(folder):
    train, at = datasets.load("digits", "train", SIDE), folder("coreset")
    found = random_coreset(at, **SET, ipc=10)
    images, labels = load_samples(at)
    rows = source_rows(at)
    assert len(set(rows)) == len(rows) == found["images"] == 25
    assert found["per_class"] == [10, 10, 5]
    assert found["short"] == ["2"]
    assert found["ratio"] == pytest.approx(100 * 25 / 105)
    np.testing.assert_array_equal(images, train.images[rows])
    np.testing.assert_array_equal(labels, train.labels[rows])
    random_coreset(other := folder("other"), **SET | {"seed": 1}, ipc=10)
    assert set(source_rows(other)) != set(rows)
    with pytest.raises(ValueError, match="ipc = 1 or more"):
        random_coreset(at, **SET, ipc=0)


def test_greedy_centres_equal_a_slow_twin_and_cover_within_twice_the_best():
    points = np.random.default_rng(0).normal(size=(12, 2))
    chosen, radius = greedy_centres(points, 3, np.random.default_rng(5))
    slow = [chosen[0]]
    while len(slow) < 3:
        slow.append(max(range(12), key=lambda i: min(np.linalg.norm(points[i] - points[j]) for j in slow)))
    assert chosen.tolist() == slow
    assert radius == pytest.approx(cover_radius(points, points[chosen]))
    best = min(cover_radius(points, points[[a, b, c]]) for a in range(12) for b in range(a) for c in range(b))
    assert best <= radius <= 2 * best


def test_greedy_centres_never_take_a_row_twice():
    chosen, radius = greedy_centres(np.zeros((4, 2)), 4, np.random.default_rng(0))
    assert sorted(chosen) == [0, 1, 2, 3]
    assert radius == 0


def test_k_centre_covers_better_than_chance(folder):
    found = k_centre(at := folder("centres"), **SET, ipc=10)
    assert all(a <= b for a, b in zip(found["radius"], found["random_radius"]))
    assert found["radius"][0] < found["random_radius"][0]
    assert found["radius"][2] == 0  # all five images are in
    train, rows = datasets.load("digits", "train", SIDE), source_rows(at)
    np.testing.assert_array_equal(load_samples(at)[0], train.images[rows])


def test_k_centre_reads_the_features_of_an_extractor(folder, monkeypatch):
    seen = []

    def fake_features(images, network, cache):
        seen.append(network.name)
        return images.reshape(len(images), -1).astype(np.float32)

    monkeypatch.setattr(condensation, "features", fake_features)
    network = type("Fake", (), {"name": "fake features"})
    monkeypatch.setattr(condensation.extractors, "fake", lambda size, device: network, raising=False)
    found = k_centre(folder("centres"), **SET, ipc=3, extractor="fake")
    assert found["space"] == "fake features"
    assert seen == ["fake features"]


# --- augmentation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(matching.KINDS))
def test_siamese_augmentation_changes_all_images_alike_and_passes_gradients(kind):
    one = torch.rand(1, 3, 8, 8) * 2 - 1
    images = one.repeat(4, 1, 1, 1).requires_grad_()
    generator = torch.Generator().manual_seed(4)
    changed = [matching.apply_augmentation(images, matching.draw_augmentation(1, kind, generator)) for _ in range(6)]
    for found in changed:
        torch.testing.assert_close(found[1:], found[:1].expand(3, -1, -1, -1))
    assert any(not torch.allclose(found, images) for found in changed)
    sum(found.sum() for found in changed).backward()
    assert images.grad.abs().sum() > 0
    own = matching.apply_augmentation(images.detach(), matching.draw_augmentation(4, kind, generator))
    assert not torch.allclose(own[0], own[1]) or not torch.allclose(own[1], own[2])


def test_augmentations_in_the_middle_leave_an_image_alone_and_crop_moves_whole_pixels():
    images, middle = torch.rand(1, 1, 8, 8), torch.full((1, 4), 0.5)
    for kind in ("color", "crop", "rotate"):
        torch.testing.assert_close(matching.apply_augmentation(images, (kind, middle)), images)
    moved = matching.apply_augmentation(images, ("crop", torch.tensor([[0.999, 0.5, 0, 0]])))
    torch.testing.assert_close(moved[..., :-1], images[..., 1:])
    assert (moved[..., -1] == -1).all()
    hole = matching.apply_augmentation(images, ("cutout", middle)) == -1
    assert hole.sum() == 16
    flipped = matching.apply_augmentation(images, ("flip", torch.zeros(1, 4)))
    torch.testing.assert_close(flipped, images.flip(3))


def test_unknown_augmentation_is_refused():
    with pytest.raises(ValueError, match="not 'mirror'"):
        matching.draw_augmentation(1, "flip_mirror")


# --- DM -----------------------------------------------------------------------------------------------------


def test_embedding_loss_equals_the_formula_and_is_zero_for_equal_batches():
    torch.manual_seed(0)
    embed, parts = nn.Sequential(nn.Flatten(), nn.Linear(16, 5)), [torch.randn(n, 1, 4, 4) for n in (3, 2, 4, 6)]
    found = matching.embedding_loss(embed, parts[:2], parts[2:], "").item()
    expected = sum(
        (embed(real).mean(0) - embed(fake).mean(0)).square().sum().item() for real, fake in zip(parts[:2], parts[2:])
    )
    assert found == pytest.approx(expected)
    assert matching.embedding_loss(embed, parts[:2], parts[:2], matching.SIAMESE).item() < 1e-10


def test_dm_lowers_its_loss_and_leaves_its_noise_behind(folder):
    """Noise teaches nothing; the images that DM makes of it beat it by far in front of real digits."""
    settings = SET | {"ipc": 2, "init": "noise", "lr": 20.0} | MATCH
    found = distribution_matching(at := folder("dm"), **settings, steps=60)
    assert np.mean(found["loss"][-10:]) < 0.5 * found["loss"][0]
    assert (source_rows(at) == -1).all()
    assert found["moved"] > 5
    start = distribution_matching(noise := folder("noise"), **settings, steps=0)
    assert start["moved"] == 0
    assert start["loss"] == []
    sets = {"dm": str(at), "noise": str(noise)}
    judged = evaluate_sets(folder("judged"), **JUDGE, sets=sets, seeds=[0, 1], epochs=15, real_epochs=1, resamples=50)
    dm, noise = (row["accuracy"]["value"] for row in judged["rows"][:2])
    assert dm > noise + 0.2


def test_dm_from_real_images_starts_as_patients_and_fills_short_classes_with_noise(folder):
    train = datasets.load("digits", "train", SIDE)
    found = distribution_matching(at := folder("dm"), **SET, **MATCH, ipc=7, steps=0)
    rows, (images, labels) = source_rows(at), load_samples(at)
    assert labels.tolist() == [0] * 7 + [1] * 7 + [2] * 7
    assert (rows == -1).tolist() == [False] * 19 + [True] * 2
    np.testing.assert_array_equal(images[rows >= 0], train.images[rows[rows >= 0]])
    np.testing.assert_array_equal(train.labels[rows[rows >= 0]], labels[rows >= 0])
    assert found["moved"] == 0
    with pytest.raises(ValueError, match="init is"):
        distribution_matching(at, **SET, **MATCH, ipc=2, steps=0, init="zeros")


def test_dm_goes_on_to_the_same_bits(tmp_path):
    train = datasets.load("digits", "train", SIDE)
    real, real_labels = datasets.as_tensor(train), torch.as_tensor(train.labels)

    def matched(checkpoint, steps):
        torch.manual_seed(0)
        learnt = matching.Pixels(torch.zeros(3, 1, SIDE, SIDE))
        optimizer = torch.optim.SGD(learnt.parameters(), 1.0, momentum=0.5)
        labels = torch.arange(3)
        losses = matching.match_embeddings(
            learnt, labels, real, real_labels, optimizer, steps=steps, real_batch=4, width=4, checkpoint=checkpoint
        )
        return learnt().detach(), losses

    whole = matched(None, 6)
    matched(Checkpoint(tmp_path), 3)
    resumed = matched(Checkpoint(tmp_path), 6)
    assert torch.equal(whole[0], resumed[0])
    assert whole[1] == resumed[1]


def test_thinned_curve_keeps_the_mean():
    assert matching.thinned([1.0, 3.0, 5.0, 7.0], 2) == [2.0, 6.0]
    assert matching.thinned([1.0, 2.0]) == [1.0, 2.0]


# --- generators ---------------------------------------------------------------------------------------------


def test_dim_generator_reads_one_hot_before_its_noise():
    """DiM's 100 numbers: the first K are the label. The generator takes them apart and puts them together again."""
    net = condensation._build_generator({"family": "dim", "image_size": 8, "channels": 1, "num_classes": 3, "width": 4})
    z = net.noise(2)
    whole = torch.cat([F.one_hot(torch.tensor([2, 0]), 3).float(), z], 1)
    assert whole.shape == (2, condensation.NOISE_DIM)
    torch.testing.assert_close(net(z, torch.tensor([2, 0])), net.main(whole[:, :, None, None]))


def test_dim_learns_classes_and_draws_the_same_set_again(folder):
    """After a short training the made images teach the class better than chance; both evaluations run."""
    at = folder("dim")
    found = dim(
        at, **SET, ipc=4, width=16, critic_width=16, epochs=12, match_epochs=2, batch_size=16, lr=2e-3, match_lr=1e-4,
        match_batches=2, networks=["convnet3"], network_width=8, depth=2,
    )  # fmt: skip
    images, labels = load_samples(at)
    assert images.shape == (12, 1, SIDE, SIDE)
    assert np.bincount(labels).tolist() == found["per_class"] == [4, 4, 4]
    assert len(found["critic"]) == len(found["generator"]) == 14
    assert len(found["match"]) == 2
    assert found["networks"] == ["convnet3"] * 2
    draw_set(again := folder("again"), data="digits", trained=str(at), ipc=4, seed=0)
    np.testing.assert_array_equal(load_samples(again)[0], images)
    sets = {"fixed": str(at), "fresh": {"resample": str(at)}}
    judged = evaluate_sets(folder("judged"), **JUDGE, sets=sets, seeds=[0, 1], epochs=20, real_epochs=1, resamples=50)
    fixed, fresh = judged["rows"][:2]
    assert (fixed["resampled"], fresh["resampled"]) == (False, True)
    assert fixed["images"] == fresh["images"] == 12
    assert fresh["auc"]["value"] > 0.6
    scores = load_scores(at.parent / "judged")["scores"]["convnet3"]
    assert not np.allclose(scores["fixed"], scores["fresh"])


def test_dim_goes_on_to_the_same_bits(tmp_path):
    train = datasets.load("digits", "train", SIDE)
    data = datasets.as_tensor(train), torch.as_tensor(train.labels)

    def trained(checkpoint, epochs, match_epochs):
        torch.manual_seed(0)
        nets = acgan.Generator(8, 1, 3, 10, 4), acgan.Discriminator(8, 1, 3, 4)
        history = matching.train_dim(
            *nets, *data, epochs=epochs, match_epochs=match_epochs, batch_size=64, match_batches=1,
            networks=["convnet3"], width=4, checkpoint=checkpoint,
        )  # fmt: skip
        return nets[0].state_dict(), history

    whole, history = trained(None, 1, 2)
    trained(Checkpoint(tmp_path), 1, 1)
    resumed, again = trained(Checkpoint(tmp_path), 1, 2)
    assert history == again
    for name, value in whole.items():
        assert torch.equal(value, resumed[name])


def test_match_lowers_the_distance_of_logits():
    """A generator that is trained by the match alone ends nearer to the real logits than it was."""
    torch.manual_seed(0)
    network, real = ConvNet(1, 3, 8, width=8), torch.rand(8, 1, 8, 8)
    matched, fake = matching.Matched(network, 0.01, 0, 1.0, ""), nn.Parameter(torch.zeros(8, 1, 8, 8))
    optimizer = torch.optim.Adam([fake], 0.05)
    losses = []
    for _ in range(30):
        loss = matched.loss(real, fake, None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_dcgan_and_the_latents_behind_it(folder):
    found = conditional_dcgan(at := folder("dcgan"), **SET, ipc=3, width=8, epochs=2, batch_size=16)
    images, labels = load_samples(at)
    assert images.shape == (9, 1, SIDE, SIDE)
    assert labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert len(found["loss"]) == 2
    before = load_generator(at).state_dict()
    settings = SET | MATCH | {"ipc": 2, "trained": str(at), "lr": 0.1}
    latent_stand_in(start := folder("start"), **settings, steps=0)
    learnt = latent_stand_in(other := folder("latents"), **settings, steps=60)
    assert len(learnt["loss"]) == 60
    assert load_samples(other)[0].shape == (6, 1, SIDE, SIDE)
    assert distance_of_means(other) < distance_of_means(start)
    after = load_generator(at).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(ValueError, match="has 1 channels, 8 px and 3 classes"):
        latent_stand_in(other, **settings | {"image_size": 16}, steps=1)


def test_repeated_rows_show_classes_alike():
    rows = condensation._repeated(np.array([0, 0, 0, 1, 2, 2]), 3)
    assert np.bincount(rows).tolist() == [1, 1, 1, 3, 2, 1]


# --- the judge ----------------------------------------------------------------------------------------------


def test_coreset_of_real_digits_teaches_them_and_every_number_is_that_of_its_scores(folder):
    at = folder("judged")
    random_coreset(coreset := folder("coreset"), **SET, ipc=5)
    random_coreset(second := folder("second"), **SET | {"seed": 1}, ipc=5)
    sets = {"coreset": [str(coreset), str(second)]}
    found = evaluate_sets(at, **JUDGE, sets=sets, seeds=[0, 1], epochs=15, real_epochs=5, resamples=50)
    coreset, real = found["rows"]
    assert (coreset["set"], real["set"]) == ("coreset", "real")
    assert coreset["accuracy"]["value"] > 0.8
    assert real["auc"]["value"] > 0.95
    assert coreset["steps"] == 15 * 2
    assert real["steps"] == 5 * 14
    assert found["majority"]["accuracy"]["value"] == pytest.approx(1 / 3)
    assert found["majority"]["auc"]["value"] == 0.5
    json.dumps(found, allow_nan=False)
    # every number again, from the stored probabilities
    stored = load_scores(at)
    scores, labels = stored["scores"]["convnet3"]["coreset"], stored["labels"]
    by_hand = {
        "auc": [roc_auc_score(labels, scores[:, s], multi_class="ovr") for s in (0, 1)],
        "accuracy": [(scores[:, s].argmax(1) == labels).mean() for s in (0, 1)],
        "balanced_accuracy": [balanced_accuracy_score(labels, scores[:, s].argmax(1)) for s in (0, 1)],
    }
    for metric, values in by_hand.items():
        assert coreset[metric]["value"] == pytest.approx(np.mean(values))
        assert coreset[metric]["over_seeds"] == pytest.approx(over_seeds(values, 0.95))
    rows = set_differences(at, "real", "convnet3", resamples=50)
    assert [row["metric"] for row in rows] == ["auc", "accuracy", "balanced_accuracy"]
    whole = stored["scores"]["convnet3"]["real"]
    gaps = [[(s[:, i].argmax(1) == labels).mean() for i in (0, 1)] for s in (scores, whole)]
    assert rows[1]["value"] == pytest.approx(np.mean(gaps[0]) - np.mean(gaps[1]))
    assert rows[1]["over_seeds"] == pytest.approx(paired_over_seeds(*gaps))
    with pytest.raises(ValueError, match="no set 'dm'"):
        set_differences(at, "dm", "convnet3")


def test_wrong_labels_are_worse_than_chance(folder):
    """A planted effect: a set whose labels are turned by one class teaches the wrong answers."""
    train = datasets.load("digits", "train", SIDE)
    rows = np.concatenate([np.flatnonzero(train.labels == k)[:5] for k in range(3)])
    turned = saved(folder("turned"), train.images[rows], (train.labels[rows] + 1) % 3)
    groups = (np.arange(90) // 3).tolist()
    found = evaluate_sets(
        folder("judged"), **JUDGE, sets={"turned": turned}, seeds=[0], epochs=15, real_epochs=1, groups=groups,
        resamples=50,
    )  # fmt: skip
    assert found["rows"][0]["accuracy"]["value"] < 0.2
    assert found["rows"][0]["accuracy"]["n"] == 30
    assert found["test"] == {"images": 90, "units": 30, "kind": "group"}


def test_soft_labels_come_from_the_teacher(folder):
    """The same set with turned labels teaches the right answers once a teacher labels it anew."""
    train = datasets.load("digits", "train", SIDE)
    rows = np.concatenate([np.flatnonzero(train.labels == k)[:5] for k in range(3)])
    turned = saved(folder("turned"), train.images[rows], (train.labels[rows] + 1) % 3)
    asked = JUDGE | {"sets": {"turned": turned}, "seeds": [0], "epochs": 15, "real_epochs": 5, "resamples": 50}
    found = evaluate_sets(folder("judged"), **asked, soft_labels=True)
    assert found["rows"][0]["accuracy"]["value"] > 0.5
    assert found["teacher"]["accuracy"]["value"] == pytest.approx(found["rows"][1]["accuracy"]["value"])


def test_training_follows_its_seed_alone():
    images, labels = torch.randn(9, 1, 8, 8), torch.arange(9) % 3
    build = partial(ConvNet, 1, 3, 8, width=4)
    asked = []

    def draw(epoch):
        asked.append(epoch)
        return images, labels

    state = torch.get_rng_state()
    first, losses = train_from_scratch(build, draw, 3, 4, batch_size=4, strategy="crop")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(11)
    second, _ = train_from_scratch(build, draw, 3, 4, batch_size=4, strategy="crop")
    assert asked == [0, 1, 2, 3] * 2
    assert len(losses) == 4
    for one, other in zip(first.parameters(), second.parameters()):
        assert torch.equal(one, other)


def test_training_equals_sgd_written_out():
    """Full batches, so that the order is of no matter: momentum, weight decay, and a tenth of the rate from half on."""
    images, labels = torch.rand(6, 1, 4, 4), torch.tensor([0, 1, 1, 0, 1, 0])
    start = nn.Sequential(nn.Flatten(), nn.Linear(16, 2, bias=False))
    weight = start[1].weight.detach().clone()
    network, losses = train_from_scratch(
        lambda: start, lambda epoch: (images, labels), 0, 4, batch_size=6, lr=0.2, strategy=""
    )
    speed, seen = torch.zeros_like(weight), []
    for lr in (0.2, 0.2, 0.02, 0.02):
        weight.requires_grad_()
        loss = F.cross_entropy(images.flatten(1) @ weight.T, labels)
        (slope,) = torch.autograd.grad(loss, weight)
        weight = weight.detach()
        speed = 0.9 * speed + slope + 5e-4 * weight
        weight = weight - lr * speed
        seen.append(loss.item())
    torch.testing.assert_close(network[1].weight.detach().cpu(), weight)
    assert losses == pytest.approx(seen, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"sets": {"real": "x"}}, "name of another row"),
        ({"sets": {"a": ["x", "y"]}, "seeds": [0]}, "2 sets for 1 seeds"),
        ({"sets": {"a": {"fresh": "x"}}}, "resample"),
        ({"groups": [0, 1]}, "90 test images and 2 groups"),
        ({"networks": ["alexnet"]}, "A network is one of"),
        ({"epochs": 0}, "one epoch or more"),
    ],
)
def test_what_cannot_be_judged_is_refused(change, sentence, tmp_path):
    settings = JUDGE | {"sets": {}, "seeds": [0], "epochs": 1} | change
    with pytest.raises(ValueError, match=sentence):
        evaluate_sets(tmp_path, **settings)
