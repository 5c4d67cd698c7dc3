"""Cells of the grid: the paper's three roles, one public size, samples as they would be released."""

import shutil

import numpy as np
import pytest
import torch

from lookalike.data import datasets
from lookalike.training import cells
from lookalike.training.checkpoint import CheckpointError

SETTINGS = {
    "data": "digits", "seed": 0, "width": 8, "epochs": 1, "images_per_class": 2, "query_class": 3,
    "samples_per_class": 2, "batch_size": 10, "timesteps": 10, "sampler": "dpm++", "sampling_steps": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits", "train")


def test_roles_are_the_papers(digits):
    full, ablated, victim = (cells.select_role(digits, role, 10, 3) for role in cells.ROLES)
    assert (len(full), len(ablated), len(victim)) == (100, 90, 91)
    assert full.labels.tolist() == np.repeat(range(10), 10).tolist()
    assert 3 not in ablated.labels
    assert np.array_equal(victim.images[:-1], ablated.images)
    assert victim.labels[-1] == 3
    assert np.array_equal(victim.images[-1], digits.images[digits.labels == 3][0])  # the FIRST of its class


def test_wrong_names_are_refused_with_the_right_ones(digits):
    with pytest.raises(ValueError, match="full, ablated, victim"):
        cells.select_role(digits, "suspect", 2, 0)
    with pytest.raises(ValueError, match="query_class must be 0 to 9, not 12"):
        cells.select_role(digits, "victim", 2, 12)
    with pytest.raises(ValueError, match="has 400 images of class 3, not 500"):
        cells.first_of(digits, 3, 500)
    with pytest.raises(ValueError, match="vae, gan, ddpm"):
        cells.build("flow", 10, 8)


@pytest.mark.parametrize(("size", "rate", "expected"), [(100, 0.5, 50), (40, 1.0, 40), (110, 0.5, 55)])
def test_privacy_is_the_papers_for_its_three_data_sets(size, rate, expected):
    privacy = cells.specify_privacy(0.3, size, 64)
    assert (privacy.sample_rate, privacy.expected_batch_size, privacy.max_grad_norm) == (rate, expected, 1.0)
    assert privacy.delta < 1 / size
    assert cells.specify_privacy(0.0, size, 64) is None


@pytest.mark.parametrize("family", cells.FAMILIES)
def test_a_private_cell_writes_samples_and_clean_weights(family, tmp_path):
    report = cells.train_cell(tmp_path, family=family, sigma=0.5, role="victim", **SETTINGS)
    images, labels = cells.load_samples(tmp_path)
    assert images.shape == (20, 1, 28, 28)
    assert images.dtype == np.uint8
    assert labels.tolist() == np.repeat(range(10), 2).tolist()
    assert report["images"] == 19
    assert report["epsilon"] == pytest.approx(cells.specify_privacy(0.5, 20, 10).epsilon(report["steps"]))
    ddpm = {name: SETTINGS[name] for name in ("timesteps", "sampler", "sampling_steps")} if family == "ddpm" else {}
    again = cells.draw_samples(cells.restore(tmp_path, family, 10, 8, **ddpm), 10, 2, seed=0)
    assert (again["images"].int() - torch.as_tensor(images).int()).abs().max() <= 1  # stored weights, stored samples


def test_victim_and_ablated_start_from_the_same_weights(tmp_path):
    weights = {}
    for role in ("victim", "ablated"):
        cells.train_cell(tmp_path / role, family="vae", sigma=0.0, role=role, **SETTINGS | {"epochs": 0})
        model = cells.restore(tmp_path / role, "vae", 10, 8)
        weights[role] = torch.cat([p.flatten() for p in model.parameters()])
    assert torch.equal(*weights.values())


def test_the_normaliser_tells_no_role_from_another(digits, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(
        cells,
        "train_vae",
        lambda *a, privacy, **k: seen.append(privacy) or {"steps": 0, "epsilon": 0.0, "private_outputs": []},
    )
    for role in cells.ROLES:
        cells.train_cell(tmp_path, family="vae", sigma=0.5, role=role, **SETTINGS)
    assert seen[0] == seen[1] == seen[2]


def test_every_purpose_has_its_own_random_numbers():
    draw = lambda generator: torch.randn(4, generator=generator)  # noqa: E731
    first = draw(cells.stream(0, "training"))
    assert torch.equal(first, draw(cells.stream(0, "training")))
    for other in (cells.stream(0, "samples"), cells.stream(1, "training"), torch.Generator().manual_seed(0)):
        assert not torch.equal(first, draw(other))


@pytest.mark.parametrize("family", cells.FAMILIES)
def test_a_private_cell_is_audited_from_its_checkpoint(family, tmp_path):
    settings = SETTINGS | {"family": family, "sigma": 0.5, "role": "full", "sampler": "dpm++"}
    cells.train_cell(tmp_path, **settings)
    white, black = cells.audit_cell(tmp_path, steps=4, canaries=60, **settings)
    assert white["what"] == f"{family}, sigma 0.5, full, digits"
    assert 0 < white["lower"] < white["accounted"]
    assert white["steps"] == 4
    assert black["steps"] == 2  # one epoch of 20 images in batches of 10: the whole training
    assert black["counts"]["canaries"] == 40
    assert "no coin chose" in black["assumption"]
    again = cells.audit_cell(tmp_path, steps=4, canaries=60, **settings)[0]
    assert again == white
    shutil.rmtree(tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match="train it first"):
        cells.audit_cell(tmp_path, steps=4, canaries=60, **settings)


def test_a_cell_without_noise_has_nothing_to_audit(tmp_path):
    with pytest.raises(ValueError, match="without noise"):
        cells.audit_cell(tmp_path, steps=1, canaries=20, **SETTINGS | {"family": "vae", "sigma": 0.0, "role": "full"})
