"""MCGAN: layers to the count, samples, losses, and what batch norm may and may not see."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lookalike.models.mcgan import (
    Discriminator,
    Generator,
    cross_entropy,
    discriminator_loss,
    draw_targets,
    generator_loss,
)
from lookalike.privacy.clipping import clipped_sum

PRIVATE = ("group", "instance", "none")
LABELS = torch.tensor([0, 1, 0, 1])


def count(net):
    return sum(p.numel() for p in net.parameters())


def images(seed, n=4):
    return torch.rand(n, 1, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("norm", ["batch", "group", "instance", "none"])
def test_paper_sized_networks_have_the_published_parameter_counts(norm):
    affine = norm in ("batch", "group")
    with torch.device("meta"):  # shapes without numbers
        assert count(Generator(norm=norm)) == (14_428_112 if affine else 14_424_144)
        assert count(Discriminator(norm=norm)) == (25_948_516 if affine else 25_944_676)


def test_layers_are_the_papers():
    widths = [1024, 512, 256, 128, 64]
    with torch.device("meta"):
        generator, discriminator = Generator(), Discriminator(norm="group")
    ups = [layer for layer in generator.main if isinstance(layer, nn.ConvTranspose2d)]
    assert [layer.in_channels for layer in ups] == [200, *widths]
    downs = [layer for layer in discriminator.main if isinstance(layer, nn.Conv2d)]
    assert [layer.in_channels for layer in downs] == [2, *widths[::-1]]
    assert [layer.kernel_size for layer in ups] == [(4, 4)] * 6
    assert [layer.kernel_size for layer in downs] == [(6, 6)] * 6
    norms = [layer.num_groups for layer in discriminator.main if isinstance(layer, nn.GroupNorm)]
    assert norms == [32] * 4


def test_only_transposed_convolutions_can_lay_a_checkerboard():
    """Of a constant map the inside must come out constant; the overlap of 4 px kernels at stride 2 is uneven."""
    for upsampling, flat in (("transposed", False), ("resize", True)):
        torch.manual_seed(0)
        generator = Generator(16, width=4, norm="none", upsampling=upsampling)
        last = [layer for layer in generator.main if not isinstance(layer, nn.Tanh)][-1 if not flat else -2 :]
        made = nn.Sequential(*last)(torch.ones(1, 4, 8, 8))[0, 0, 2:-2, 2:-2]
        assert (made.std() < 1e-6) == flat
        assert generator.sample(LABELS).shape == (4, 1, 16, 16)
    with pytest.raises(ValueError, match="upsampling must be transposed or resize"):
        Generator(16, upsampling="bicubic")


@pytest.mark.parametrize("image_size", [32, 64, 128])
def test_every_size_is_made_and_judged(image_size):
    made = Generator(image_size, width=4, norm="group").sample(LABELS)
    assert made.shape == (4, 1, image_size, image_size)
    assert Discriminator(image_size, width=4, norm="group")(made, LABELS).shape == (4,)


def test_initial_weights_follow_dcgan():
    torch.manual_seed(0)
    for net in (Generator(64, width=16), Discriminator(64, width=16)):
        for layer in net.modules():
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)) and layer.weight.numel() > 10_000:
                assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
            if isinstance(layer, nn.BatchNorm2d):
                assert layer.weight.mean().item() == pytest.approx(1, abs=0.02)
                assert layer.bias.abs().max() == 0
        assert net.embed_nn[0].weight.std().item() == pytest.approx(1, rel=0.3)


@pytest.mark.parametrize("norm", ["batch", *PRIVATE])
def test_samples_are_images_alone_and_repeat_with_a_seed(norm):
    torch.manual_seed(0)
    generator = Generator(32, width=8, norm=norm)
    draw = lambda labels, seed: generator.sample(labels, torch.Generator().manual_seed(seed))  # noqa: E731
    made = draw(LABELS, 1)
    assert made.dtype == torch.float32
    assert made.abs().max() <= 1
    torch.testing.assert_close(draw(LABELS, 1), made)
    scale = made.abs().max()  # untrained weights of 0.02 make faint images
    assert (draw(LABELS, 2) - made).abs().max() > 0.1 * scale
    changed = draw(torch.tensor([1, 1, 0, 1]), 1)
    torch.testing.assert_close(changed[1:], made[1:], rtol=1e-4, atol=1e-6 * scale.item())
    assert (changed[0] - made[0]).abs().max() > 0.1 * scale  # the label reaches the image
    assert generator.training


def test_cross_entropy_is_torchs_where_torch_accepts_the_target():
    logits = torch.linspace(-300, 300, 61, dtype=torch.float64)
    for target in (0.0, 0.3, 1.0):
        near = logits[logits.abs() <= 30]  # beyond, torch's 1 - p has lost its digits
        expected = F.binary_cross_entropy(near.sigmoid(), torch.full_like(near, target), reduction="none")
        torch.testing.assert_close(cross_entropy(near, target), expected, rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(cross_entropy(logits, 0.0), F.softplus(logits).clamp_max(100))
    ours, theirs = (torch.tensor([-2.0, 0.5], requires_grad=True) for _ in range(2))
    cross_entropy(ours, torch.tensor([0.7, 0.9])).sum().backward()
    F.binary_cross_entropy(theirs.sigmoid(), torch.tensor([0.7, 0.9]), reduction="sum").backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_targets_above_one_are_bounded_and_need_our_own_formula():
    with pytest.raises(RuntimeError):
        F.binary_cross_entropy(torch.tensor([0.9]), torch.tensor([1.2]))
    logits = torch.tensor([2.0, 1e6])
    p = math.exp(-math.log1p(math.exp(-2)))
    expected = [-(1.2 * math.log(p) - 0.2 * math.log(1 - p)), -0.2 * 100]
    assert cross_entropy(logits, 1.2).tolist() == pytest.approx(expected, rel=1e-5)


def test_targets_are_drawn_from_the_papers_interval():
    targets = draw_targets(4000, torch.Generator().manual_seed(0))
    assert targets.min() >= 0.7
    assert targets.max() <= 1.2
    assert targets.mean().item() == pytest.approx(0.95, abs=0.01)  # 4 standard errors


def test_an_undecided_discriminator_costs_ln_two_an_image():
    blind = lambda x, y: torch.zeros(len(x))  # noqa: E731
    real, ln2 = images(0), math.log(2)
    loss = discriminator_loss(blind, real, real, LABELS, LABELS, torch.tensor([0.7, 1.0, 1.1, 1.2]))
    torch.testing.assert_close(loss, torch.full((4,), 2 * ln2))
    torch.testing.assert_close(generator_loss(blind, real, LABELS), torch.full((4,), ln2))


@pytest.mark.parametrize("norm", ["batch", *PRIVATE])
def test_loss_is_of_two_separate_passes(norm):
    """Under batch norm one joint pass would be another loss; elsewhere it is the same one, cheaper."""
    torch.manual_seed(0)
    net, real, fake, targets = Discriminator(32, width=4, norm=norm), images(0), -images(1), draw_targets(4)
    expected = cross_entropy(net(real, LABELS), targets) + cross_entropy(net(fake, 1 - LABELS), 0.0)
    found = discriminator_loss(net, real, fake, LABELS, 1 - LABELS, targets)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    passes = []
    net.register_forward_hook(lambda *_: passes.append(1))
    discriminator_loss(net, real, fake, LABELS, LABELS)
    assert len(passes) == (2 if norm == "batch" else 1)


@pytest.mark.parametrize("norm", PRIVATE)
def test_a_private_loss_knows_no_other_image(norm):
    torch.manual_seed(0)
    net, real = Discriminator(32, width=4, norm=norm), images(0)
    others = images(1)
    others[2] = real[2]
    losses = [discriminator_loss(net, batch, -batch, LABELS, LABELS) for batch in (real, others)]
    torch.testing.assert_close(losses[0][2], losses[1][2], rtol=1e-4, atol=1e-5)
    assert (losses[0][0] - losses[1][0]).abs() > 1e-6


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_both_losses_fall_on_one_batch(norm):
    torch.manual_seed(0)
    generator, net, real = Generator(32, width=8, norm=norm), Discriminator(32, width=8, norm=norm), images(0)
    z = generator.noise(4, torch.Generator().manual_seed(0))
    learnt = {
        "discriminator": (net, lambda: discriminator_loss(net, real, generator(z, LABELS).detach(), LABELS, LABELS)),
        "generator": (generator, lambda: generator_loss(net, generator(z, LABELS), LABELS)),
    }
    for trained, loss in learnt.values():
        optimizer = torch.optim.Adam(trained.parameters(), lr=2e-3, betas=(0.5, 0.999))
        before = loss().mean().item()
        for _ in range(30):
            optimizer.zero_grad()
            loss().mean().backward()
            optimizer.step()
        assert loss().mean().item() < 0.7 * before


@pytest.mark.parametrize("method", ["bookkeeping", "hooks", "vmap"])
@pytest.mark.parametrize("norm", PRIVATE)
def test_dp_sgd_clips_each_pair_of_images(norm, method):
    """Against a loop over pairs; max_grad_norm lies between the records' norms."""
    torch.manual_seed(0)
    net = Discriminator(32, width=4, norm=norm)
    batch = (images(0), -images(1), LABELS, 1 - LABELS, draw_targets(4))
    weights = list(net.parameters())
    one = [torch.autograd.grad(discriminator_loss(net, *(t[i : i + 1] for t in batch)), weights) for i in range(4)]
    norms = torch.stack([torch.cat([g.flatten() for g in gradient]).norm() for gradient in one])
    limit = norms.median().item()
    expected = [sum(g * (limit / norm).clamp(max=1) for g, norm in zip(gs, norms)) for gs in zip(*one)]
    found, _, found_norms = clipped_sum(net, discriminator_loss, batch, limit, method)
    torch.testing.assert_close(found_norms.float(), norms, rtol=1e-4, atol=1e-6)
    whole = torch.cat([g.flatten() for g in expected]).norm()
    for p, gradient in zip(weights, expected):
        assert (found[p] - gradient).norm() <= 1e-5 * whole


def test_wrong_settings_are_refused_with_a_sentence():
    with pytest.raises(ValueError, match="power of two"):
        Generator(image_size=100)
    with pytest.raises(ValueError, match="power of two"):
        Discriminator(image_size=4)
    with pytest.raises(ValueError, match="norm must be one of"):
        Discriminator(32, width=4, norm="layer")
