"""Judging conditions and spines: known answers on made units."""

import numpy as np
import pytest

from lookalike.training import vertebra_conditions as conditions
from lookalike.training.vertebrae import train_vertebrae

STAGE = {"data": "phantom_vertebrae", "image_size": 16, "width": 4, "epochs": 1, "seed": 0, "samples": 30}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train_vertebrae(folder, **STAGE, latent_dim=8)
    return str(folder)


def test_units_of_one_kind_hang_together_and_independent_ones_do_not():
    rng = np.random.default_rng(0)
    whose = np.repeat(np.arange(30), 4)
    alike = rng.standard_normal((30, 5))[whose] + 0.1 * rng.standard_normal((120, 5))
    assert conditions.coherence(alike, whose)["coherence"] > 0.95
    apart = conditions.coherence(rng.standard_normal((120, 5)), whose)
    assert apart["low"] < 0.5 < apart["high"]
    assert apart["n"] == 30


def test_the_matching_correlation_lies_between_those_tried():
    assert conditions._matching([0.0, 0.5, 1.0], [0.5, 0.7, 0.9], 0.8) == pytest.approx(0.75)
    assert conditions._matching([0.0, 1.0], [0.5, 0.6], 0.8) is None


def test_pooling_keeps_the_mean():
    images = np.random.default_rng(0).integers(0, 256, (3, 2, 16, 16), np.uint8)
    np.testing.assert_allclose(conditions.pooled(images).mean(1), images.mean((1, 2, 3)) / 255)
    with pytest.raises(ValueError, match="multiple of 8"):
        conditions.pooled(images[..., :12, :12])


def test_the_judge_knows_real_units_and_finds_noise_worthless(trained):
    found = conditions.judge_conditions(
        None, trained={"short": trained}, data="phantom_vertebrae", image_size=16, steps=4, latents=6, seed=0
    )
    assert found["real"]["low"] > 0.6
    row = found["rows"]["short"]
    assert abs(row["balanced_accuracy"] - row["chance"]) < 0.3
    assert len(row["along"]) == 5
    assert 0 <= row["off"] <= 1
    assert row["nearer"]["low"] <= row["nearer"]["value"] <= row["nearer"]["high"]


def test_real_spines_are_coherent_and_shared_latents_make_made_ones_so(trained, tmp_path):
    found = conditions.spine_coherence(
        tmp_path, trained={"short": trained}, data="phantom_vertebrae", image_size=16, units=6, spines=12,
        shares=[0.0, 1.0], seed=0,
    )  # fmt: skip
    assert found["real"]["low"] > 0.6
    apart, shared = found["rows"]
    assert apart["low"] < 0.5 < apart["high"]
    assert shared["coherence"] > apart["high"]
    assert (tmp_path / "samples.safetensors").is_file()
    with pytest.raises(ValueError, match="lower units"):
        conditions.spine_coherence(
            tmp_path, trained={}, data="phantom_vertebrae", image_size=16, units=60, spines=2, shares=[0.0], seed=0
        )
