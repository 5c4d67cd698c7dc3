"""Training the AC-GAN: it learns, resumes to the same weights, is private when asked, and makes spines that agree."""

import numpy as np
import pytest
import torch

from lookalike.data import datasets
from lookalike.models.acgan import Discriminator, Generator
from lookalike.privacy.dpsgd import Privacy
from lookalike.training import vertebrae
from lookalike.training.cells import load_samples
from lookalike.training.checkpoint import Checkpoint

SMALL = {"image_size": 8, "channels": 2, "num_classes": 3, "width": 8}
PRIVACY = Privacy(1.0, 0.5, 6, 0.05)
STAGE = {"data": "phantom_vertebrae", "image_size": 16, "width": 4, "epochs": 1, "seed": 0, "samples": 30}


@pytest.fixture
def units():
    """Twelve images whose brightness is their class, four of each of three subjects."""
    labels = torch.arange(12) % 3
    g = torch.Generator().manual_seed(0)
    images = (labels[:, None, None, None] - 1) * 0.8 + 0.1 * torch.randn(12, 2, 8, 8, generator=g)
    return images.clamp(-1, 1), labels, np.repeat(["a", "b", "c"], 4)


def networks(latent_dim=8, **generator):
    torch.manual_seed(0)
    return Generator(**SMALL, latent_dim=latent_dim, **generator), Discriminator(**SMALL)


def train(units, nets=None, **settings):
    nets = nets or networks()
    settings = {"epochs": 2, "batch_size": 6, "generator": torch.Generator().manual_seed(1)} | settings
    return nets, vertebrae.train_acgan(*nets, units[0], units[1], **settings)


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))


def test_the_generator_learns_what_was_asked_for(units):
    (made, _), report = train(units, epochs=400, lr=2e-3, batch_size=12)
    brightness = [made.sample(torch.full((20,), k), torch.Generator().manual_seed(2)).mean().item() for k in range(3)]
    assert brightness[0] + 0.1 < brightness[1] < brightness[2] - 0.1
    assert len(report["loss"]) == len(report["generator_loss"]) == 400
    assert report["generator_steps"] == report["steps_taken"] == 400
    assert report["epsilon"] is None


def test_two_discriminator_steps_per_generator_step(units):
    assert train(units, d_per_g=2)[1]["generator_steps"] == 2
    with pytest.raises(ValueError, match="d_per_g"):
        train(units, d_per_g=0)


@pytest.mark.parametrize("privacy", [None, PRIVACY])
def test_a_killed_training_goes_on_to_the_same_weights(units, tmp_path, privacy):
    settings = {"privacy": privacy, "shares": [0.2, 0.3, 0.5]}
    whole, _ = train(units, epochs=3, **settings)
    checkpoint = Checkpoint(tmp_path)
    train(units, epochs=2, checkpoint=checkpoint, **settings)
    resumed, report = train(units, epochs=3, checkpoint=checkpoint, **settings)
    assert all(same(a, b) for a, b in zip(whole, resumed))
    assert len(report["loss"]) == 3


def test_a_private_training_spends_what_is_accounted_and_has_public_shares(units):
    _, report = train(units, privacy=PRIVACY, shares=[1 / 3] * 3)
    assert report["steps"] == 4
    assert report["epsilon"] == pytest.approx(PRIVACY.epsilon(4))
    assert report["private_outputs"] == ["loss"]
    with pytest.raises(ValueError, match="public class `shares`"):
        train(units, privacy=PRIVACY)


def test_private_batches_do_not_move_the_generators_stream(units):
    """What the generator draws is the same whoever is in the data."""
    fewer = units[0][:-1], units[1][:-1]
    drawn = []
    for images, labels in (units[:2], fewer):
        made, judge = networks()
        seen = []
        noise = made.noise
        made.noise = lambda n, g, noise=noise, seen=seen: (z := noise(n, g), seen.append((g, z)))[0]
        stream = torch.Generator().manual_seed(1)
        vertebrae.train_acgan(
            made, judge, images, labels, epochs=2, batch_size=6, privacy=PRIVACY, shares=[1 / 3] * 3, generator=stream
        )
        drawn.append([z for g, z in seen if g is not stream])
    assert len(drawn[0]) == 4
    assert all(torch.equal(a, b) for a, b in zip(*drawn))


def test_conditions_follow_the_shares_and_soft_ones_sum_to_one():
    shares = torch.tensor([0.25, 0.55, 0.2])
    g = torch.Generator().manual_seed(0)
    labels = vertebrae.draw_conditions(20_000, shares, generator=g)
    np.testing.assert_allclose(vertebrae.class_shares(labels, 3), shares, atol=0.015)
    soft = vertebrae.draw_conditions(20_000, shares, True, g)
    torch.testing.assert_close(soft.sum(1), torch.ones(20_000))
    assert ((soft > 0).sum(1) == 2).float().mean() == pytest.approx(vertebrae.MIXED, abs=0.02)
    assert len(vertebrae.draw_conditions(0, shares, generator=g)) == 0


def test_latents_of_a_spine_are_normal_and_correlate_as_asked():
    made, _ = networks(latent_dim=50)
    z = vertebrae.spine_latents(made, 2000, 2, 0.7, torch.Generator().manual_seed(0))
    assert z.std().item() == pytest.approx(1, abs=0.01)
    assert (z[:, 0] * z[:, 1]).mean().item() == pytest.approx(0.7, abs=0.02)
    one = vertebrae.spine_latents(made, 3, 4, 1.0)
    torch.testing.assert_close(one[:, 0], one[:, 3])
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        vertebrae.spine_latents(made, 1, 1, 1.5)


def test_partners_are_other_units_of_the_subject():
    subjects = np.array(["b", "a", "b", "c", "a", "b"])
    partners = vertebrae._Partners(subjects)
    g = torch.Generator().manual_seed(0)
    rows = torch.arange(6).repeat(200)
    found = partners.of(rows, g)
    assert (subjects[found] == subjects[rows]).all()
    assert (found[rows != 3] != rows[rows != 3]).all()
    assert (found[rows == 3] == 3).all(), "an only unit is its own partner"
    assert set(found[rows == 0].tolist()) == {2, 5}


def test_pairs_teach_the_generator_that_a_spine_is_of_one_kind():
    """Subjects differ in brightness, classes in nothing: with pairs, units of one made spine share it."""
    g = torch.Generator().manual_seed(0)
    subjects = np.repeat([f"s{i}" for i in range(8)], 3)
    level = torch.linspace(-0.8, 0.8, 8).repeat_interleave(3)[:, None, None, None]
    images = (level + 0.05 * torch.randn(24, 2, 8, 8, generator=g)).clamp(-1, 1)
    units = images, torch.arange(24) % 3
    torch.manual_seed(5)
    judge = Discriminator(**SMALL | {"channels": 4})
    (made, _), _ = train(
        units, epochs=300, lr=2e-3, batch_size=24, subjects=subjects, pair_discriminator=judge, shared=1.0
    )
    labels = torch.arange(3)
    shared, apart = (
        vertebrae.sample_spines(made, labels, 40, rho, torch.Generator().manual_seed(1)).astype(float) for rho in (1, 0)
    )
    spread = [np.ptp(part.mean((2, 3, 4)), axis=1).mean() for part in (shared, apart)]
    assert spread[0] < 0.6 * spread[1]
    with pytest.raises(ValueError, match="give `subjects`"):
        train(units, pair_discriminator=judge)


def test_the_stage_leaves_networks_that_make_its_samples(tmp_path):
    report = vertebrae.train_vertebrae(tmp_path, **STAGE, latent_dim=8)
    images, labels = load_samples(tmp_path)
    assert images.shape == (30, 9, 16, 16)
    assert report["images"] == 240
    made, judge = vertebrae.load_networks(tmp_path)
    assert report["weights"] == [sum(p.numel() for p in net.parameters()) for net in (made, judge)]
    whole = datasets.load("phantom_vertebrae", "train", 16)
    shares = vertebrae.class_shares(torch.as_tensor(whole.labels), 3)
    again = vertebrae.draw_units(made, shares, 30, 0)
    np.testing.assert_array_equal(again["images"].numpy(), images)
    np.testing.assert_array_equal(again["labels"].numpy(), labels)


def test_the_stage_takes_rows_soft_conditions_pairs_and_privacy(tmp_path):
    some = STAGE | {"rows": list(range(60)), "latent_dim": 8}
    soft = vertebrae.train_vertebrae(tmp_path / "soft", **some, condition="embedding", soft=True)
    assert soft["images"] == 60
    vertebrae.train_vertebrae(tmp_path / "spines", **some, shared=0.5)
    for records in ("images", "subjects"):
        private = vertebrae.train_vertebrae(
            tmp_path / records, **some, epsilon=30.0, shares=[0.25, 0.55, 0.2], records=records
        )
        assert 0 < private["epsilon"] <= 30.001
        assert private["privacy"]["records"] == records
