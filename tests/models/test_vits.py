"""Vision transformers with LoRA: what trains, what a file must hold, and that LoRA starts as nothing."""

import pytest
import torch
import torch.nn.functional as F

from lookalike.models import vits
from lookalike.training.checkpoint import load_weights, save_weights

DIMS = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}


def small(num_classes=3, image_size=8):
    torch.manual_seed(0)
    return vits.small_vit(num_classes, image_size, **DIMS)


def test_a_small_vit_reads_grey_and_colour_and_resizes():
    vit = small().eval()
    grey = torch.rand(2, 1, 8, 8) * 2 - 1
    torch.testing.assert_close(vit(grey), vit(grey.expand(-1, 3, -1, -1)))
    assert vit(torch.zeros(2, 3, 8, 8)).shape == (2, 3)
    big = torch.rand(2, 1, 16, 16) * 2 - 1
    shrunk = F.interpolate(big, (8, 8), mode="bilinear", align_corners=False, antialias=True)
    torch.testing.assert_close(vit(big), vit(shrunk))
    with pytest.raises(ValueError, match="channels"):
        vit(torch.zeros(2, 9, 8, 8))
    with pytest.raises(ValueError, match="patch_size"):
        vits.small_vit(3, 10, **DIMS)


def test_lora_starts_as_nothing_and_then_it_and_the_head_alone_train():
    vit = small().eval()
    images, labels = torch.rand(6, 1, 8, 8) * 2 - 1, torch.arange(6) % 3
    before = vit(images).detach()
    vits.add_lora(vit, rank=2).eval()
    torch.testing.assert_close(vit(images), before)
    names = vits.trainable(vit)
    assert len(names) == 2 * 2 + 2
    assert all("lora_" in name or "head." in name for name in names)
    trained = sum(p.numel() for p in vit.parameters() if p.requires_grad)
    assert trained == 2 * 2 * (16 + 48) + 16 * 3 + 3  # depth x rank x (in + out of qkv), head
    start = {name: value.clone() for name, value in vit.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in vit.parameters() if p.requires_grad], 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(vit(images), labels).backward()
        optimizer.step()
    moved = {name for name, value in vit.state_dict().items() if not torch.equal(value, start[name])}
    assert moved == set(names)
    assert (vit(images) - before).abs().max() > 1e-3


def test_the_effect_of_lora_is_its_product_times_alpha_over_rank():
    vit = vits.add_lora(small(), rank=2, alpha=6, dropout=0.0).eval()
    layer = vit.network.blocks[0].attn.qkv
    low, high = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.nn.init.normal_(high)
    x = torch.randn(5, 16)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + 3 * x @ (high @ low).T, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="rank"):
        vits.add_lora(small(), rank=0)


def test_lora_vit_takes_a_small_base_from_a_file_whatever_its_classes(tmp_path):
    base = small(num_classes=5)
    save_weights(tmp_path / "base.safetensors", base)
    torch.manual_seed(1)
    vit = vits.lora_vit("small", 3, 8, rank=2, weights=tmp_path / "base.safetensors", small=DIMS)
    assert torch.equal(vit.network.blocks[1].mlp.fc1.weight, base.network.blocks[1].mlp.fc1.weight)
    assert vit(torch.zeros(1, 1, 8, 8)).shape == (1, 3)
    with pytest.raises(ValueError, match="trained network"):
        vits.lora_vit("small", 3, 8, small=DIMS)
    with pytest.raises(ValueError, match="does not fit"):
        vits.lora_vit("small", 3, 8, weights=tmp_path / "base.safetensors", small=DIMS | {"embed_dim": 32})


def test_a_named_vit_takes_its_weights_from_a_file_and_another_size(tmp_path):
    import timm

    name = "test_vit"
    torch.manual_seed(0)
    stored = timm.create_model(name, num_classes=7)
    path = tmp_path / "weights.safetensors"
    save_weights(path, stored)
    vit = vits.lora_vit(name, 3, 32, rank=2, weights=path).eval()
    own = vit.network.state_dict()
    key = "blocks.0.attn.proj.weight"
    assert torch.equal(own[key], stored.state_dict()[key])
    assert own["pos_embed"].shape != stored.pos_embed.shape  # resampled
    assert vit(torch.zeros(2, 1, 32, 32)).shape == (2, 3)
    assert set(vits.trainable(vit)) >= {"network.head.weight", "network.head.bias"}
    torch.save({k: v for k, v in stored.state_dict().items() if k != key}, tmp_path / "short.pth")
    with pytest.raises(ValueError, match="does not fit the network"):
        vits.pretrained_vit(name, 3, 32, tmp_path / "short.pth")


def test_a_vit_with_lora_goes_to_disk_and_back(tmp_path):
    vit = vits.add_lora(small(), rank=2).eval()
    with torch.no_grad():
        for name, weight in vit.named_parameters():
            weight.add_(0.1 * ("lora_" in name))
    save_weights(tmp_path / "w.safetensors", vit)
    torch.manual_seed(9)
    again = load_weights(tmp_path / "w.safetensors", vits.add_lora(vits.small_vit(3, 8, **DIMS), rank=2)).eval()
    images = torch.rand(3, 1, 8, 8)
    assert torch.equal(vit(images), again(images))
