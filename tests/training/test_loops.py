"""The training loops: they learn, resume to the same bits, spend what they say and read nothing that they must not."""

import math
from dataclasses import replace

import pytest
import torch

from lookalike.models.ddpm import ConditionalDDPM
from lookalike.models.gan import Discriminator, Generator
from lookalike.models.vae import ConditionalVAE
from lookalike.privacy import randomness
from lookalike.privacy.dpsgd import Privacy, PrivateTraining
from lookalike.training import adversarial
from lookalike.training.adversarial import Schedule, train_gan
from lookalike.training.checkpoint import Checkpoint
from lookalike.training.likelihood import batches, train_ddpm, train_vae

PRIVACY = Privacy(noise_multiplier=1.0, sample_rate=0.5, expected_batch_size=4, delta=0.05)


def nets(family):
    torch.manual_seed(0)
    if family == "gan":
        return Generator(num_classes=4, width=8), Discriminator(num_classes=4, width=8)
    if family == "vae":
        return (ConditionalVAE(num_classes=4, width=8, latent_dim=8),)
    return (ConditionalDDPM(num_classes=4, width=8, timesteps=20),)


TRAIN = {"vae": train_vae, "gan": train_gan, "ddpm": train_ddpm}


def train(family, data, epochs, privacy=None, checkpoint=None, **more):
    models = nets(family)
    settings = {"epochs": epochs, "lr": 1e-3, "batch_size": 4, "generator": torch.Generator().manual_seed(5)}
    report = TRAIN[family](*models, *data, privacy=privacy, checkpoint=checkpoint, **settings, **more)
    return torch.cat([w.detach().flatten() for net in models for w in net.parameters()]), report


@pytest.mark.parametrize("family", ["vae", "ddpm"])
def test_the_loss_falls(family, tiny_images):
    _, report = train(family, tiny_images, 12)
    assert report["loss"][-1] < report["loss"][0]
    assert (report["steps"], report["epsilon"]) == (0, None)


class Killed(RuntimeError):
    pass


class Dying(Checkpoint):
    """Saves as usual and dies after the third time."""

    saves = 0

    def save(self, *args, **more):
        super().save(*args, **more)
        self.saves += 1
        if self.saves == 3:
            raise Killed


@pytest.mark.parametrize("privacy", [None, PRIVACY], ids=["plain", "private"])
@pytest.mark.parametrize("family", TRAIN)
def test_a_killed_training_ends_with_the_same_bits(family, privacy, tiny_images, tmp_path):
    whole, report = train(family, tiny_images, 6, privacy, Checkpoint(tmp_path / "whole"))
    with pytest.raises(Killed):
        train(family, tiny_images, 6, privacy, Dying(tmp_path / "cut"))
    torch.manual_seed(99)  # another process starts with another random state
    again, resumed = train(family, tiny_images, 6, privacy, Checkpoint(tmp_path / "cut"))
    assert torch.equal(whole, again)
    assert resumed == report


@pytest.mark.parametrize("family", TRAIN)
def test_a_private_run_spends_every_step(family, tiny_images):
    _, report = train(family, tiny_images, 3, PRIVACY)
    assert report["steps"] == 3 * 2  # ceil(8 / 4) an epoch
    assert report["epsilon"] == pytest.approx(PRIVACY.epsilon(6))
    assert report["privacy"]["mode"] == "study"
    assert report["private_outputs"] == ["loss"]
    assert train(family, tiny_images, 1)[1]["private_outputs"] == []


def test_a_loop_whose_batch_size_contradicts_the_rate_is_refused(tiny_images):
    rare = Privacy(noise_multiplier=1.0, sample_rate=0.1, expected_batch_size=0.8, delta=0.05)
    for family in TRAIN:
        with pytest.raises(ValueError, match=r"batch size of 4 contradicts sample_rate 0\.1 of 8"):
            train(family, tiny_images, 1, rare)


@pytest.mark.parametrize("family", TRAIN)
def test_subjects_are_drawn_whole(family, tiny_images, monkeypatch):
    """Two images a subject: what is drawn comes in pairs, and epsilon speaks of four records."""
    subjects, drawn = ["a", "b", "a", "b", "c", "c", "d", "d"], []
    draw = PrivateTraining._draw
    monkeypatch.setattr(PrivateTraining, "_draw", lambda self: drawn.append(draw(self)) or drawn[-1])
    private = replace(PRIVACY, records="subjects", expected_batch_size=2)
    _, report = train(family, tiny_images, 4, private, subjects=subjects)
    pairs = {0: 2, 1: 3, 4: 5, 6: 7}
    assert all({pairs[i] for i in rows.tolist() if i in pairs} == set(rows.tolist()) - set(pairs) for rows in drawn)
    assert report["privacy"]["records"] == "subjects"
    assert report["epsilon"] == private.epsilon(8)
    with pytest.raises(ValueError, match=r"not below 1 / 4 records"):
        train(family, tiny_images, 1, replace(private, delta=0.25), subjects=subjects)


@pytest.mark.parametrize("family", TRAIN)
def test_release_mode_reads_no_seed_and_stores_no_stream_that_batches_move(family, tiny_images, tmp_path):
    """Twice the same seed, two different models. Of the streams only the public one is stored."""
    runs = [train(family, tiny_images, 2, PRIVACY.released(), Checkpoint(tmp_path / name))[0] for name in "ab"]
    assert not torch.equal(*runs)
    stored = Checkpoint(tmp_path / "a")._read()[0]
    assert {name for name in stored if name.startswith("generators/")} <= {"generators/public"}
    assert not any(name.startswith("random/") for name in stored)
    _, report = train(family, tiny_images, 4, PRIVACY.released(), Checkpoint(tmp_path / "a"))
    assert report["steps"] == 8  # resumed, and what was spent is not forgotten


def test_a_checkpoint_is_not_resumed_under_another_privacy(tiny_images, tmp_path):
    """Else the steps at little noise would be accounted with the noise of today."""
    quiet = replace(PRIVACY, noise_multiplier=0.1)
    for begun, resumed in ((quiet, PRIVACY), (None, PRIVACY), (PRIVACY, None)):
        folder = tmp_path / f"{begun is None}{resumed is None}"
        train("vae", tiny_images, 2, begun, Checkpoint(folder))
        with pytest.raises(ValueError, match="another privacy"):
            train("vae", tiny_images, 3, resumed, Checkpoint(folder))


def test_the_number_of_private_steps_does_not_tell_the_size_of_the_set(tiny_images):
    images, labels = tiny_images
    whole, less = (train("vae", (images[:n], labels[:n]), 3, PRIVACY)[1]["steps"] for n in (8, 7))
    assert whole == less == 6


def test_the_private_gans_public_stream_is_not_moved_by_private_batches(tiny_images, monkeypatch):
    """The discriminator held as it was, the generator's weights are equal to the bit with and without a record."""
    step = PrivateTraining.step

    def undone(self, loss, *batch):
        before = {name: weight.clone() for name, weight in self.model.state_dict().items()}
        losses = step(self, loss, *batch)
        self.model.load_state_dict(before)
        return losses

    monkeypatch.setattr(PrivateTraining, "step", undone)
    images, labels = tiny_images
    for private in (PRIVACY, PRIVACY.released()):
        found = [nets_after(images[:n], labels[:n], private) for n in (8, 7)]
        assert torch.equal(*found)
    published = [nets_after(images[:n], labels[:n], PRIVACY, as_published=True) for n in (8, 7)]
    assert not torch.equal(*published)


def nets_after(images, labels, privacy, **more):
    """The GAN generator's weights after a few private epochs."""
    generator, discriminator = nets("gan")
    torch.manual_seed(3)
    settings = {"epochs": 6, "lr": 1e-3, "batch_size": 4, "generator_every": 2, "privacy": privacy}
    train_gan(generator, discriminator, images, labels, generator=torch.Generator().manual_seed(5), **settings, **more)
    return torch.cat([w.detach().flatten() for w in generator.parameters()])


def test_delta_must_fit_the_number_of_images(tiny_images):
    loose = Privacy(noise_multiplier=1.0, sample_rate=0.5, expected_batch_size=4, delta=0.125)
    for family in TRAIN:
        with pytest.raises(ValueError, match="not below 1 / 8"):
            train(family, tiny_images, 1, loose)


def test_without_privacy_every_image_is_seen_once_an_epoch():
    rows = batches(10, 4, None, torch.Generator().manual_seed(0))
    assert [len(r) for r in rows] == [4, 4, 2]
    assert sorted(torch.cat(rows).tolist()) == list(range(10))


def test_no_image_ever_sampled_still_trains(tiny_images, monkeypatch):
    """Poisson batches may be empty; each is a step of noise, in every loop."""
    monkeypatch.setattr(randomness.Seeded, "chosen", lambda self, n, rate: torch.zeros(n, dtype=torch.bool))
    for family in TRAIN:
        before = torch.cat([w.detach().flatten() for net in nets(family) for w in net.parameters()])
        after, report = train(family, tiny_images, 2, PRIVACY)
        assert report["loss"] == [None, None]
        assert report["steps"] == 4
        assert (after - before).abs().max() > 1e-4


def test_the_private_gans_generator_never_sees_private_labels_or_sizes(tiny_images, monkeypatch):
    """Replace every private label: what the generator is asked for stays the same; the published way it changes."""
    images, labels = tiny_images

    def asked(labels, **more):
        seen = []
        step = adversarial.generator_step
        monkeypatch.setattr(adversarial, "generator_step", lambda *a: (seen.append(a[3].tolist()), step(*a)))
        train("gan", (images, labels), 20, PRIVACY, **more)
        monkeypatch.setattr(adversarial, "generator_step", step)
        return seen

    mended = asked(labels)
    assert len(mended) == 4  # 40 steps, one in ten
    assert {len(batch) for batch in mended} == {4}
    assert mended == asked(torch.zeros_like(labels))
    assert asked(labels, as_published=True) != asked(torch.zeros_like(labels), as_published=True)


def test_no_epsilon_is_claimed_for_the_published_private_gan(tiny_images):
    _, report = train("gan", tiny_images, 2, PRIVACY, as_published=True)
    assert report["epsilon"] is None
    assert report["steps"] == 4


def test_a_schedule_of_no_steps_is_refused(tiny_images):
    """It once meant the authors' rule, which reads the private loss."""
    with pytest.raises(ValueError, match="generator_every must be 1 or more"):
        train("gan", tiny_images, 1, PRIVACY, generator_every=0)


def test_the_private_gans_schedule_does_not_read_the_loss():
    fixed = Schedule(target=0.0, every=10)
    assert [fixed.says_go(torch.tensor([math.nan])) for _ in range(20)] == ([False] * 9 + [True]) * 2


def test_the_authors_schedule():
    undecided, winning = torch.tensor([0.69]), torch.tensor([0.1])
    private = Schedule(target=0.0)
    calls = [private.says_go(undecided) for _ in range(60)]
    assert calls[:6] == [True] * 6  # the first six
    assert calls[6:].index(True) == 49  # then only after fifty without
    plain = Schedule(target=math.log(2))
    assert all(plain.says_go(undecided) for _ in range(60))
    assert all(Schedule(target=0.0).says_go(winning) for _ in range(60))


def test_agenerator_step_leaves_the_discriminator_alone(tiny_images):
    generator, discriminator = nets("gan")
    before = [p.detach().clone() for p in discriminator.parameters()]
    optimizer = torch.optim.Adam(generator.parameters(), lr=1e-2)
    adversarial.generator_step(generator, discriminator, optimizer, tiny_images[1], torch.Generator())
    assert all(torch.equal(a, b) for a, b in zip(before, discriminator.parameters()))
    assert all(p.requires_grad and p.grad is None for p in discriminator.parameters())
