"""Networks that judge condensed sets: shapes, the ConvNet against its layers written out, and what is refused."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lookalike.models.convnets import ConvNet, build_network


def test_convnet_equals_its_layers_written_out():
    torch.manual_seed(0)
    network = ConvNet(2, 3, 8, width=4, depth=2)
    x = images = torch.randn(5, 2, 8, 8)
    for convolution, norm in ((network.trunk[0], network.trunk[1]), (network.trunk[4], network.trunk[5])):
        x = F.conv2d(x, convolution.weight, convolution.bias, padding=1)
        x = F.instance_norm(x, weight=norm.weight, bias=norm.bias)
        x = x.relu()
        x = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
    torch.testing.assert_close(network.embed(images), x.flatten(1))
    assert network.dim == x[0].numel() == 16
    torch.testing.assert_close(network(images), network.head(x.flatten(1)))


def test_convnet_has_the_fields_size():
    convolutions = (3 * 9 + 1) * 128 + 2 * (128 * 9 + 1) * 128
    norms, head = 3 * 2 * 128, (128 * 4 * 4 + 1) * 10
    found = sum(p.numel() for p in ConvNet(3, 10, 32).parameters())
    assert found == convolutions + norms + head == 320_010


def test_each_image_stands_alone_in_the_convnet():
    torch.manual_seed(0)
    network, images = ConvNet(1, 3, 9, width=4), torch.randn(6, 1, 9, 9)
    torch.testing.assert_close(network(images)[2:4], network(images[2:4]))


@pytest.mark.parametrize("name", ["convnet3", "resnet10", "resnet18", "densenet"])
def test_networks_give_logits_and_learn_one_batch(name):
    torch.manual_seed(0)
    network = build_network(name, 2, 3, 16, width=8)
    images, labels = torch.randn(6, 2, 16, 16), torch.arange(6) % 3
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9)
    losses = []
    for _ in range(6):
        loss = F.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert network(images).shape == (6, 3)
    assert losses[-1] < losses[0]


def test_vit_passes_its_settings_on(monkeypatch):
    seen = {}

    def lora_vit(name, num_classes, image_size, rank=8, weights=None, small=None):
        seen.update(name=name, num_classes=num_classes, image_size=image_size, rank=rank)
        return nn.Identity()

    monkeypatch.setitem(sys.modules, "lookalike.models.vits", types.SimpleNamespace(lora_vit=lora_vit))
    build_network("vit_lora", 3, 7, 32, vit={"name": "small", "rank": 2})
    assert seen == {"name": "small", "num_classes": 7, "image_size": 32, "rank": 2}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (("alexnet", 1, 2, 32), "A network is one of"),
        (("convnet3", 1, 2, 7), "8 px or more, not 7"),
        (("densenet", 1, 2, 8), "16 px or more, not 8"),
        (("vit_lora", 1, 2, 32), "needs `vit`"),
    ],
)
def test_what_does_not_fit_is_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        build_network(*settings)
