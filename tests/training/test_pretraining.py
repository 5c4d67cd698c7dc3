"""SynPre: every layer learns, what was learned is found again, and the fine-tuning starts where it ended."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lookalike.metrics.extractors import random_conv
from lookalike.training import heads, pretraining
from lookalike.training.heads import head_trial, view_masses
from lookalike.training.pretraining import pretrain, pretrain_masses

NETWORK = {"extractor": "efficientnet_lite0", "image_size": 16}


def masses(n=40):
    """Bright images of class 1, dark ones of class 0, with noise."""
    rng, labels = np.random.default_rng(0), np.arange(n) % 2
    images = rng.normal(100 + 60 * labels[:, None, None, None], 20, (n, 1, 16, 16))
    return images.clip(0, 255).astype(np.uint8), labels


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A small network in the place of the large one, and a set of made masses."""
    monkeypatch.setattr(heads, "mass_extractor", lambda *a: random_conv(0, 16, 16))
    monkeypatch.setattr(pretraining, "mass_extractor", lambda *a: random_conv(0, 16, 16))
    images, labels = masses()
    made = {"images": torch.tensor(images), "labels": torch.tensor(labels)}
    for name in ("made", "backbone", "views", "plain", "trial"):
        (tmp_path / name).mkdir()
    save_file(made, tmp_path / "made" / "samples.safetensors")
    return tmp_path


def test_every_layer_learns_and_the_callers_random_stream_stays():
    network, (images, labels) = random_conv(0, 16, 16), masses()
    before = {name: weight.clone() for name, weight in network.network.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    head, losses = pretrain(network, images, labels, epochs=12, seed=0, lr=1e-2, batch_size=8)
    assert torch.equal(torch.rand(1), expected)
    assert losses[-1] < 0.4 < losses[0]
    assert all(not torch.equal(before[name], weight) for name, weight in network.network.state_dict().items())
    assert not any(p.requires_grad for p in network.network.parameters())
    assert sum(p.numel() for p in head.parameters()) == 16 * 2 + 2


def test_the_stage_leaves_a_backbone_and_a_head_that_go_on_from_there(small):
    found = pretrain_masses(
        small / "backbone", source=str(small / "made"), epochs=3, seed=1, lr=1e-2, batch_size=8, **NETWORK
    )
    assert len(found["loss"]) == 3
    view = {"source": str(small / "made"), **NETWORK}
    plain = view_masses(small / "plain", **view)
    trained = view_masses(small / "views", backbone=str(small / "backbone"), **view)
    assert trained["extractor"].startswith(f"{plain['extractor']}, all layers trained on made images (")
    ours, before = (load_file(small / name / "views.safetensors")["features"] for name in ("views", "plain"))
    assert not torch.allclose(ours, before, atol=1e-3)
    views = str(small / "views")
    settings = {
        "train": [views],
        "val": views,
        "tests": {"made": views},
        "head": "one-layer",
        "seed": 0,
        "batch_size": 8,
    }
    kept = head_trial(small / "trial", epochs=0, start=str(small / "backbone"), **settings)
    weights = load_file(small / "backbone" / "weights.safetensors")
    logits = ours[:, 0] @ weights["best.0.weight"].T + weights["best.0.bias"]
    probabilities = load_file(small / "trial" / "probabilities.safetensors")["made/last"]
    assert torch.allclose(probabilities, logits.softmax(1)[:, 1], atol=1e-6)
    assert kept["steps"] == 0
    assert kept["best"]["made"] == kept["last"]["made"]


def test_swin_needs_its_file():
    with pytest.raises(ValueError, match=r"name it in `weights`"):
        heads.mass_extractor("swin_t", 224)
