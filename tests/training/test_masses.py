"""MCGAN's training: a slow twin, the steps it counts, what its private form may not see, and augmentation by itself."""

import copy

import pytest
import torch

from lookalike.models.mcgan import Discriminator, Generator, cross_entropy
from lookalike.privacy.accounting import rdp_epsilon
from lookalike.privacy.dpsgd import Privacy, PrivateTraining
from lookalike.training import masses
from lookalike.training.cells import load_samples
from lookalike.training.checkpoint import Checkpoint
from lookalike.training.masses import augment, train_masses, train_mcgan

PRIVACY = Privacy(noise_multiplier=1.0, sample_rate=0.5, expected_batch_size=5, delta=0.05)
IMAGES = torch.rand(10, 1, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
LABELS = torch.arange(10) % 2


def nets(norm="group"):
    torch.manual_seed(0)
    return Generator(16, width=4, norm=norm), Discriminator(16, width=4, norm=norm)


def train(models, images=IMAGES, labels=LABELS, **more):
    settings = {"epochs": 3, "lr": 1e-3, "batch_size": 4, "generator": torch.Generator().manual_seed(5)} | more
    report, sampler = train_mcgan(*models, images, labels, **settings)
    return report, sampler, torch.cat([w.detach().flatten() for net in models for w in net.parameters()])


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_step_is_the_papers_written_out(norm, monkeypatch):
    """D on real and made images with one summed backward, then G through the new D on the SAME made images."""
    generator_net, discriminator = nets(norm)
    twins = copy.deepcopy(generator_net), copy.deepcopy(discriminator)
    z, wanted = torch.randn(8, 100), torch.arange(8) % 2
    monkeypatch.setattr(masses, "_batches", lambda *a: [torch.arange(8)])
    monkeypatch.setattr(masses, "_make", lambda net, n, generator: (net(z, wanted), wanted))
    train((generator_net, discriminator), epochs=1, smoothing=False, augmented=False)
    adam = [torch.optim.Adam(net.parameters(), 1e-3, (0.5, 0.999)) for net in twins]
    fake = twins[0](z, wanted)
    (
        cross_entropy(twins[1](IMAGES[:8], LABELS[:8]), 1.0).mean()
        + cross_entropy(twins[1](fake.detach(), wanted), 0.0).mean()
    ).backward()
    adam[1].step()
    cross_entropy(twins[1](fake, wanted), 1.0).mean().backward()
    adam[0].step()
    for ours, theirs in zip((generator_net, discriminator), twins):
        for a, b in zip(ours.parameters(), theirs.parameters()):
            assert torch.allclose(a, b, atol=2e-5)


def test_the_last_batch_is_dropped_and_steps_are_counted():
    report, _, _ = train(nets(), d_per_g=2)
    assert (report["discriminator_steps"], report["generator_steps"]) == (6, 3)  # 10 // 4 = 2 an epoch
    assert (report["steps"], report["epsilon"], report["private_outputs"]) == (0, None, [])
    with pytest.raises(ValueError, match="d_per_g must be 1 or more"):
        train(nets(), d_per_g=0)


def test_the_averaged_generator_is_the_exponential_mean_of_its_steps(monkeypatch):
    seen, step = [], masses._generator_step

    def watched(discriminator, optimizer, fake, labels):
        step(discriminator, optimizer, fake, labels)
        seen.append(optimizer.param_groups[0]["params"][0].detach().clone())

    monkeypatch.setattr(masses, "_generator_step", watched)
    _, sampler, _ = train(nets(), ema_decay=0.7)
    mean = seen[0]
    for weight in seen[1:]:
        mean = 0.7 * mean + 0.3 * weight
    assert torch.allclose(next(sampler.parameters()), mean, atol=1e-6)
    models = nets()
    _, sampler, _ = train(models, ema_decay=0.0)
    assert all(torch.equal(a, b) for a, b in zip(sampler.parameters(), models[0].parameters()))


class Killed(RuntimeError):
    pass


class Dying(Checkpoint):
    saves = 0

    def save(self, *args, **more):
        super().save(*args, **more)
        self.saves += 1
        if self.saves == 2:
            raise Killed


@pytest.mark.parametrize("privacy", [None, PRIVACY], ids=["plain", "private"])
def test_a_killed_training_ends_with_the_same_bits(privacy, tmp_path):
    settings = {"privacy": privacy, "ema_decay": 0.5, "d_per_g": 2, "epochs": 5}
    report, sampler, whole = train(nets(), checkpoint=Checkpoint(tmp_path / "whole"), **settings)
    with pytest.raises(Killed):
        train(nets(), checkpoint=Dying(tmp_path / "cut"), **settings)
    torch.manual_seed(99)
    resumed, again, weights = train(nets(), checkpoint=Checkpoint(tmp_path / "cut"), **settings)
    assert torch.equal(whole, weights)
    assert report == resumed
    assert all(torch.equal(a, b) for a, b in zip(sampler.parameters(), again.parameters()))


def test_a_private_run_spends_every_step():
    report, _, _ = train(nets(), privacy=PRIVACY)
    assert report["steps"] == report["discriminator_steps"] == 6
    assert report["epsilon"] == pytest.approx(rdp_epsilon(1.0, 0.5, 6, 0.05))
    assert report["private_outputs"] == ["loss"]


def test_the_private_generator_is_moved_by_no_private_batch(monkeypatch):
    """The discriminator held as it was, the generator ends with the same bits with and without a record."""
    step = PrivateTraining.step

    def undone(self, loss, *batch):
        before = {name: weight.clone() for name, weight in self.model.state_dict().items()}
        losses = step(self, loss, *batch)
        self.model.load_state_dict(before)
        return losses

    monkeypatch.setattr(PrivateTraining, "step", undone)
    ends = []
    for n in (10, 9):
        models = nets()
        before = models[0].state_dict()["main.0.weight"].clone()
        train(models, IMAGES[:n], LABELS[:n], privacy=PRIVACY)
        ends.append(torch.cat([w.flatten() for w in models[0].state_dict().values()]))
        assert not torch.equal(before, models[0].state_dict()["main.0.weight"])  # it does train
    assert torch.equal(*ends)


def test_an_empty_private_batch_is_a_step_of_noise():
    rare = Privacy(noise_multiplier=1.0, sample_rate=0.05, expected_batch_size=0.5, delta=0.05)
    report, _, _ = train(nets(), privacy=rare, batch_size=1, epochs=1)
    assert report["steps"] == 20


def test_batch_norm_has_no_private_training():
    with pytest.raises(ValueError, match=r"build it with norm='group'"):
        train((nets("batch")[0], nets("group")[1]), privacy=PRIVACY)
    with pytest.raises(ValueError, match=r"batch normalisation, which mixes records"):
        train((nets("group")[0], nets("batch")[1]), privacy=PRIVACY)


def test_augmentation_flips_a_quarter_each_and_keeps_its_crop_inside(monkeypatch):
    place = torch.linspace(-1, 1, 33).expand(400, 1, 33, 33)
    image = (place + 2 * place.mT) / 3  # rising to the right, twice as fast down
    out = augment(image, torch.Generator().manual_seed(0))
    assert out.shape == image.shape
    assert out.abs().max() <= 1
    right, down = (out[:, 0, 16, 20] > out[:, 0, 16, 12]), (out[:, 0, 20, 16] > out[:, 0, 12, 16])
    for both in (right & down, right & ~down, ~right & down, ~right & ~down):
        assert 70 <= both.sum() <= 130  # 100 of 400, standard deviation 8.7
    rise = (out[:, 0, 16, 24] - out[:, 0, 16, 8]).abs() / (image[0, 0, 16, 24] - image[0, 0, 16, 8])
    low, high = (masses.CROP_AREA[0] * masses.CROP_RATIO[0]) ** 0.5, 1.0
    assert low - 1e-3 <= rise.min()
    assert rise.max() <= high + 1e-3
    assert rise.std() > 0.01
    monkeypatch.setattr(masses, "CROP_AREA", (1.0, 1.0))
    monkeypatch.setattr(masses, "CROP_RATIO", (1.0, 1.0))
    flipped = augment(image[:8], torch.Generator().manual_seed(0))
    states = [image[0], image[0].flip(-1), image[0].flip(-2), image[0].flip(-1, -2)]
    assert all(any(torch.allclose(one, state, atol=1e-5) for state in states) for one in flipped)


@pytest.mark.parametrize("records", ["images", "subjects"])
def test_a_stage_releases_a_balanced_set_and_spends_its_epsilon(records, tmp_path):
    found = train_masses(
        tmp_path, data="phantom_mammography", image_size=8, width=4, epochs=2, seed=0, samples=10, norm="group",
        batch_size=100, epsilon=8.0, records=records, upsampling="resize",
    )  # fmt: skip
    assert found["privacy"]["records"] == records
    assert 7.9 < found["epsilon"] <= 8.0
    assert found["privacy"]["expected_batch_size"] == (100 if records == "images" else 50)  # two images a patient
    images, labels = load_samples(tmp_path)
    assert images.shape == (10, 1, 8, 8)
    assert labels.tolist() == [0] * 5 + [1] * 5
