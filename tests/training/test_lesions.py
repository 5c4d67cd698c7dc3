"""The loop of StyleGAN2-ADA: its settings against the published table, regularisers by hand, resuming to the bit."""

import dataclasses
import math
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch

from lookalike.models.stylegan2 import Discriminator, Generator
from lookalike.training import lesions
from lookalike.training.cells import load_samples
from lookalike.training.checkpoint import Checkpoint

TINY = {"base": 64, "max_channels": 8}


def training(num_classes=2, n=40, **changed):
    torch.manual_seed(0)
    how = dataclasses.replace(lesions.LesionSettings(batch_size=8), **changed)
    nets = Generator(8, 3, num_classes, 8, 8, **TINY), Discriminator(8, 3, num_classes, **TINY)
    images = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return lesions.LesionTraining(*nets, images, torch.arange(n) % 2, how)


@pytest.mark.parametrize(
    ("side", "gpus", "batch", "gamma", "ema"),
    [
        (256, 1, 16, 0.8192, 5), (256, 2, 32, 0.4096, 10), (256, 4, 64, 0.2048, 20), (256, 8, 64, 0.2048, 20),
        (128, 1, 32, 0.1024, 10), (64, 1, 32, 0.0256, 10), (32, 1, 32, 0.0064, 10),
    ],
)  # fmt: skip
def test_auto_gives_the_published_settings(side, gpus, batch, gamma, ema):
    how = lesions.auto(side, gpus)
    assert (how.batch_size, how.r1_gamma, how.ema_kimg) == (batch, pytest.approx(gamma), pytest.approx(ema))
    assert how.lr == 0.0025


def test_lazy_regularisation_scales_adam():
    weight = torch.nn.Parameter(torch.zeros(1))
    for interval in (4, 16):
        (group,) = lesions.lazy_adam([weight], 0.0025, interval).param_groups
        ratio = interval / (interval + 1)
        assert group["lr"] == pytest.approx(0.0025 * ratio)
        assert group["betas"] == (0.0, pytest.approx(0.99**ratio))
        assert group["eps"] == 1e-8


def test_r1_is_the_squared_gradient_in_the_plain_image():
    """Of a judge <a, x> + x^2 by hand; with a mirroring in between, the plain image is what counts."""
    a = torch.randn(3, 8, 8)
    images = torch.randn(2, 3, 8, 8)
    found = lesions.r1_penalty(lambda x: (a * x.flip(3)).sum((1, 2, 3)) + x.square().sum((1, 2, 3)), images)
    by_hand = (a.flip(2) + 2 * images).square().sum((1, 2, 3))
    assert torch.allclose(found, by_hand, rtol=1e-5)


def test_r1_reaches_the_weights_of_the_judge():
    """Against finite differences of the penalty in one weight."""
    torch.manual_seed(0)
    judge = Discriminator(8, 3, 0, **TINY).double()
    images = torch.randn(4, 3, 8, 8, dtype=torch.double)
    weight = judge.blocks[0].first.weight
    lesions.r1_penalty(judge, images).sum().backward()
    slope, step = weight.grad[0, 0, 1, 1].item(), 1e-7
    around = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[0, 0, 1, 1] += sign * step
        around.append(lesions.r1_penalty(judge, images).sum().item())
        with torch.no_grad():
            weight[0, 0, 1, 1] -= sign * step
    assert slope == pytest.approx((around[0] - around[1]) / (2 * step), rel=1e-4)


def test_path_length_is_that_of_the_jacobian():
    """Over many directions the squared length has the mean tr(J J^T) / pixels, J by its columns."""
    torch.manual_seed(0)
    made = Generator(8, 1, 0, 4, 4, base=32, max_channels=4)
    ws = torch.randn(1, made.num_ws, 4)
    jacobian = torch.autograd.functional.jacobian(lambda w: made.synthesise(w, "fixed").flatten(), ws)
    expected = jacobian.square().sum() / made.num_ws / 64
    rows = ws.repeat(3000, 1, 1).requires_grad_()
    original = made.synthesise
    made.synthesise = lambda w: original(w, "fixed")
    found = lesions.path_lengths(made, rows).square().mean()
    assert found.item() == pytest.approx(expected.item(), rel=0.06)


def test_each_step_moves_only_its_own_network():
    of = training()
    before = [[w.clone() for w in net.parameters()] for net in (of.generator, of.discriminator)]

    def moved():
        nets = of.generator, of.discriminator
        return [any(not torch.equal(a, b) for a, b in zip(was, net.parameters())) for was, net in zip(before, nets)]

    of._generator_step()
    assert moved() == [True, False]
    of._path_step()
    assert moved() == [True, False]
    before[0] = [w.clone() for w in of.generator.parameters()]
    of._discriminator_step()
    of._r1_step()
    assert moved() == [False, True]


def test_regularisers_come_every_fourth_and_sixteenth_time_and_p_every_fourth():
    of = training(augment="bg")
    calls = {"path": 0, "r1": 0}
    of._path_step = lambda: calls.update(path=calls["path"] + 1)
    of._r1_step = lambda: calls.update(r1=calls["r1"] + 1)
    of.run(17)
    assert calls == {"path": 5, "r1": 2}
    assert len(of.losses["sign"]) == 4
    assert of.images_seen == 17 * 8
    assert of.augment_p in {k * 32 / 500_000 for k in range(5)}


def test_the_average_follows_its_half_life():
    of = training(ema_kimg=0.016, ema_rampup=None)
    for w in of.ema.parameters():
        w.data.zero_()
    of.images_seen = 8
    of._average()
    for mean, own in zip(of.ema.parameters(), of.generator.parameters()):
        assert torch.allclose(mean, own * (1 - 0.5**0.5), atol=1e-6)
    ramping = training(ema_kimg=1000)
    ramping.images_seen = 8
    ramping._average()  # 5 % of 8 images: a half-life far below a batch, so the average is the generator
    for mean, own in zip(ramping.ema.parameters(), ramping.generator.parameters()):
        assert torch.allclose(mean, own, atol=1e-5)


def test_styles_are_mixed_nine_times_in_ten_from_a_cut_on():
    of = training()
    z, wanted = of._latents(2)
    of.generator.eval()
    mixed, cuts = 0, set()
    for _ in range(300):
        ws = of._mixed(z, wanted)
        changed = (ws != ws[:, :1]).any(2)[0]
        mixed += bool(changed.any())
        if changed.any():
            cut = int(changed.nonzero()[0])
            assert changed[cut:].all()
            cuts.add(cut)
    assert mixed / 300 == pytest.approx(0.9, abs=0.06)
    assert cuts == set(range(1, of.generator.num_ws))


def test_every_image_is_seen_before_any_comes_again():
    of = training(n=24)
    of.images = torch.arange(24.0).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    seen = torch.cat([of._real(8)[0][:, 0, 0, 0] for _ in range(3)])
    assert sorted(seen.tolist()) == list(range(24))


def test_gradients_that_are_not_numbers_are_cleaned():
    of = training()
    weight = next(iter(of.generator.parameters()))
    before = weight.detach().clone()
    of._step("generator", (weight * float("nan")).sum())
    assert torch.equal(weight, before)
    assert torch.isfinite(weight).all()


def test_a_killed_training_goes_on_to_the_same_bits(tmp_path):
    def ended(folder, stops):
        for iterations in stops:
            of = training(augment="bgc", ada_kimg=0.05, ada_target=-2)
            torch.manual_seed(5)
            lesions.train_on(of, iterations, Checkpoint(folder))
        return of

    whole, parts = ended(tmp_path / "a", [9]), ended(tmp_path / "b", [4, 9])
    assert whole.augment_p == parts.augment_p > 0
    assert whole.losses == parts.losses
    assert torch.equal(whole.path_mean, parts.path_mean)
    for name in ("generator", "discriminator", "ema"):
        states = getattr(whole, name).state_dict(), getattr(parts, name).state_dict()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_reset_forgets_all_but_the_weights():
    of = training(augment="bg", ada_kimg=0.05)
    of.run(5)
    weights = [w.clone() for w in of.generator.parameters()]
    assert of.path_mean > 0
    of.reset_state()
    assert of.augment_p == 0
    assert of.path_mean == 0
    assert not of.optimizers["generator"].state
    assert of.images_seen == 40
    assert all(torch.equal(a, b) for a, b in zip(weights, of.generator.parameters()))


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="augment must be one of"):
        lesions.LesionSettings(augment="all")
    with pytest.raises(ValueError, match="even and 2 or more"):
        lesions.LesionSettings(batch_size=7)
    with pytest.raises(ValueError, match="fewer than a batch"):
        training(n=4)


def test_a_training_learns_where_a_class_is_bright(tmp_path):
    """Class 0 is dark, class 1 bright: after a few hundred images the made ones are too."""
    torch.manual_seed(0)
    how = lesions.LesionSettings(batch_size=8, lr=0.02, augment="none", ema_kimg=0.02, path_weight=0.1)
    nets = Generator(8, 1, 2, 8, 8, **TINY), Discriminator(8, 1, 2, **TINY)
    labels = torch.arange(64) % 2
    images = (labels * 1.2 - 0.6).view(-1, 1, 1, 1) + 0.05 * torch.randn(64, 1, 8, 8)
    of = lesions.LesionTraining(*nets, images, labels, how)
    of.run(80)
    dark, bright = (of.ema.sample(torch.full((32,), k), torch.Generator().manual_seed(0)).mean() for k in (0, 1))
    assert bright - dark > 0.6


@pytest.mark.parametrize("only", [None, 1])
def test_the_stage_leaves_networks_and_samples(tmp_path, only):
    found = lesions.train_lesions(
        tmp_path, data="phantom_dermoscopy", image_size=16, kimg=0.032, seed=0, samples=12, only=only, batch_size=8,
        base=64, max_channels=4, w_dim=8, settings={"lr": 0.001},
    )  # fmt: skip
    assert found["iterations"] == 4
    assert found["images"] == (800 if only is None else 400)
    assert found["settings"]["lr"] == 0.001
    assert found["settings"]["r1_gamma"] is None
    images, labels = load_samples(tmp_path)
    assert images.shape == (12, 3, 16, 16)
    assert images.dtype == np.uint8
    assert set(labels.tolist()) == ({0, 1} if only is None else {1})
    made, judge = lesions.load_networks(tmp_path)
    again = lesions.draw_lesions(made, torch.as_tensor([0, 1] if only is None else [1]), 12, 0)
    if only is not None:
        assert np.array_equal(again["images"].numpy(), images)
    assert judge(torch.zeros(2, 3, 16, 16), None if only is not None else torch.tensor([0, 1])).shape == (2,)
    assert all(math.isfinite(x) for x in found["history"]["generator"])


def test_a_class_without_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no image of class 5"):
        lesions.chosen_images("phantom_dermoscopy", "val", 16, only=5)


def test_balanced_sets_come_from_one_gan_or_from_one_per_class(tmp_path):
    small = {"data": "phantom_dermoscopy", "image_size": 16, "kimg": 0.008, "seed": 0, "samples": 4, "batch_size": 8}
    small |= {"base": 32, "max_channels": 2, "w_dim": 4}
    for name, only in (("both", None), ("benign", 0), ("melanoma", 1)):
        (tmp_path / name).mkdir()
        lesions.train_lesions(tmp_path / name, only=only, **small)
    for name, trained in (("a", ["both"]), ("b", ["benign", "melanoma"])):
        (tmp_path / name).mkdir()
        lesions.draw_balanced(tmp_path / name, trained=[tmp_path / t for t in trained], per_class=3, seed=1)
        images, labels = load_samples(tmp_path / name)
        assert sorted(labels.tolist()) == [0, 0, 0, 1, 1, 1]
        assert len({image.tobytes() for image in images}) == 6


PROCESS = """
import sys, hashlib
from pathlib import Path
import torch
from lookalike.training import lesions

folder = Path(sys.argv[1])
seen = []
original = lesions.LesionTraining._real
def noted(self, n):
    images, labels = original(self, n)
    seen.append((len(images), hashlib.sha256(images.numpy().tobytes()).hexdigest()[:8]))
    return images, labels
lesions.LesionTraining._real = noted
kept = {}
run_on = lesions.train_on
def watched(training, *rest):
    run_on(training, *rest)
    weights = [w.detach().flatten() for w in training.generator.parameters()]
    kept.update(weights=torch.cat(weights), p=training.augment_p)
lesions.train_on = watched
lesions.train_lesions(
    folder, data="phantom_dermoscopy", image_size=16, kimg=0.04, seed=0, samples=4, batch_size=8, base=32,
    max_channels=2, w_dim=4, settings={"ada_kimg": 0.05},
)
digest = hashlib.sha256(kept["weights"].numpy().tobytes()).hexdigest()[:16]
print("RESULT", digest, kept["p"], seen[0][0], seen[0][1])
"""


def test_two_processes_train_one_network_on_their_own_images(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-c", PROCESS, str(tmp_path)]
    started = [
        subprocess.Popen(
            command, env=shared | {"RANK": str(i), "LOCAL_RANK": str(i)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]  # fmt: skip
    outcomes = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0, 0], outcomes
    first, second = (
        next(line for line in out.splitlines() if line.startswith("RESULT")).split() for out, _ in outcomes
    )  # fmt: skip
    assert first[1:3] == second[1:3], "weights and p are the same everywhere"
    assert first[3] == second[3] == "4", "each sees its share of a batch of 8"
    assert first[4] != second[4], "of other images"
    assert load_samples(tmp_path)[0].shape == (4, 3, 16, 16)


def test_a_batch_that_processes_cannot_share_is_refused():
    class Three:
        num_processes = 3

    torch.manual_seed(0)
    nets = Generator(8, 3, 2, 8, 8, **TINY), Discriminator(8, 3, 2, **TINY)
    with pytest.raises(ValueError, match="3 processes cannot share a batch of 8"):
        lesions.LesionTraining(
            *nets, torch.zeros(9, 3, 8, 8), torch.zeros(9).long(), lesions.LesionSettings(8), accelerator=Three()
        )
