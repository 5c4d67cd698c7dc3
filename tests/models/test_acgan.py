"""The AC-GAN of the paper, to the layer; its losses against formulas written out, and what a morph is."""

import pytest
import torch
from torch import nn

from lookalike.models import acgan
from lookalike.privacy.clipping import clipped_sum
from lookalike.privacy.membership import logan_white_box

SMALL = {"image_size": 16, "channels": 3, "num_classes": 3, "width": 4}


@pytest.fixture
def networks():
    torch.manual_seed(0)
    return acgan.Generator(**SMALL, latent_dim=8), acgan.Discriminator(**SMALL)


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(1)
    real, fake = (torch.rand(6, 3, 16, 16, generator=g) * 2 - 1 for _ in range(2))
    return real, fake, torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([2, 2, 0, 1, 1, 0])


def count(net):
    return sum(weight.numel() for weight in net.parameters())


@pytest.mark.parametrize(
    ("width", "generator", "discriminator"), [(64, 3_605_504, 3_287_172), (128, 12_716_032, 13_127_940)]
)
def test_parameter_counts_are_the_published_ones(width, generator, discriminator):
    with torch.device("meta"):
        assert count(acgan.Generator(width=width)) == generator
        assert count(acgan.Discriminator(width=width)) == discriminator


def test_layers_and_shapes_are_the_published_ones():
    with torch.device("meta"):
        made, judge = acgan.Generator(), acgan.Discriminator()
    shapes = [(m.in_channels, m.out_channels) for m in made.main if isinstance(m, nn.ConvTranspose2d)]
    assert shapes == [(103, 512), (512, 256), (256, 128), (128, 64), (64, 9)]
    convolutions = [m for m in judge.trunk if isinstance(m, nn.Conv2d)]
    assert [(m.in_channels, m.out_channels) for m in convolutions] == [
        (9, 64), (64, 128), (128, 256), (256, 512), (512, 64),
    ]  # fmt: skip
    assert [m.bias is not None for m in convolutions] == [False, True, True, True, False]
    assert not any(isinstance(m, (nn.BatchNorm2d, nn.GroupNorm)) for net in (made, judge) for m in net.modules())
    assert isinstance(judge.trunk[-1], nn.Flatten)
    assert isinstance(judge.trunk[-2], nn.Conv2d), "no activation follows the last convolution"
    source, classes = judge(made(torch.zeros(2, 100, device="meta"), torch.zeros(2, device="meta").long()))
    assert source.shape == (2,)
    assert classes.shape == (2, 3)


def test_the_label_stands_before_the_noise(networks):
    made, _ = networks
    z = torch.randn(2, 8)
    first = made.main[0]
    seen = []
    first.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    made(z, torch.tensor([2, 0]))
    torch.testing.assert_close(seen[0][:, :3, 0, 0], torch.eye(3)[[2, 0]])
    torch.testing.assert_close(seen[0][:, 3:, 0, 0], z)


@pytest.mark.parametrize("condition", acgan.CONDITIONS)
def test_samples_have_shape_and_range_and_repeat(condition):
    torch.manual_seed(0)
    made = acgan.Generator(**SMALL, latent_dim=8, condition=condition)
    labels = torch.tensor([0, 2, 1])
    images = made.sample(labels, torch.Generator().manual_seed(3))
    assert images.shape == (3, 3, 16, 16)
    assert images.abs().max() <= 1
    torch.testing.assert_close(images, made.sample(labels, torch.Generator().manual_seed(3)))
    z = made.noise(3, torch.Generator().manual_seed(3))
    torch.testing.assert_close(images, made(z, acgan.as_soft(labels, 3)).detach())


def test_the_loss_is_the_sum_of_four_cross_entropies(networks, batch):
    _, judge = networks
    real, fake, labels, wanted = batch
    (on_real, real_classes), (on_fake, fake_classes) = judge(real), judge(fake)
    bce, nll = nn.BCELoss(reduction="none"), nn.NLLLoss(reduction="none")
    ones = torch.ones(6)
    expected = bce(on_real.sigmoid(), ones) + bce(on_fake.sigmoid(), 0 * ones)
    expected = expected + 0.5 * (nll(real_classes.log_softmax(1), labels) + nll(fake_classes.log_softmax(1), wanted))
    torch.testing.assert_close(acgan.discriminator_loss(judge, *batch, alpha=0.5), expected)
    made = bce(on_fake.sigmoid(), ones) + 0.5 * nll(fake_classes.log_softmax(1), wanted)
    torch.testing.assert_close(acgan.generator_loss(judge, fake, wanted, alpha=0.5), made)


def test_the_authors_form_is_minus_the_probability(batch):
    logits, labels = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), batch[2]
    expected = nn.NLLLoss(reduction="none")(logits.softmax(1), labels)
    torch.testing.assert_close(acgan.auxiliary_loss(logits, labels, "prob"), expected)
    soft = acgan.as_soft(labels, 3)
    torch.testing.assert_close(acgan.auxiliary_loss(logits, soft, "prob"), expected)


def test_soft_labels_lie_between_hard_ones():
    logits = torch.randn(1, 3, generator=torch.Generator().manual_seed(0))
    first, last = (acgan.auxiliary_loss(logits, torch.tensor([k])) for k in (0, 2))
    torch.testing.assert_close(
        acgan.auxiliary_loss(logits, torch.tensor([[0.25, 0, 0.75]])), 0.25 * first + 0.75 * last
    )


def test_a_morph_follows_the_papers_formula(networks):
    """c_1->3 at step t is (n - t, 0, t) / n."""
    steps = acgan.morph_labels(0, 2, 4)
    expected = torch.tensor([[4.0 - t, 0, t] for t in range(5)]) / 4
    torch.testing.assert_close(steps, expected)
    made, _ = networks
    z = made.noise(2, torch.Generator().manual_seed(0))
    strip = acgan.morph(made, z, 0, 2, 4)
    assert strip.shape == (2, 5, 3, 16, 16)
    torch.testing.assert_close(strip[:, 0], made(z, torch.tensor([0, 0])).detach())
    torch.testing.assert_close(strip[:, -1], made(z, torch.tensor([2, 2])).detach())
    with pytest.raises(ValueError, match="n = 1 or more"):
        acgan.morph_labels(0, 1, 0)


def test_clipped_gradients_equal_a_loop_over_single_pairs(networks, batch):
    _, judge = networks
    judge = judge.double()
    batch = [part.double() if part.is_floating_point() else part for part in batch]
    found, _, norms = clipped_sum(judge, acgan.discriminator_loss, batch, 0.3)
    expected = {p: torch.zeros_like(p) for p in judge.parameters()}
    for i in range(6):
        loss = acgan.discriminator_loss(judge, *(part[i : i + 1] for part in batch)).sum()
        gradients = torch.autograd.grad(loss, list(judge.parameters()))
        norm = sum(g.square().sum() for g in gradients).sqrt()
        assert norms[i] == pytest.approx(float(norm), rel=1e-9)
        for p, g in zip(judge.parameters(), gradients):
            expected[p] += g * min(1.0, 0.3 / float(norm))
    for p, value in expected.items():
        torch.testing.assert_close(found[p], value, rtol=1e-7, atol=1e-10)


def test_logan_reads_the_source_head(networks, batch):
    _, judge = networks
    scores = logan_white_box(batch[0], acgan.SourceHead(judge), batch[2])
    torch.testing.assert_close(torch.as_tensor(scores).float(), judge(batch[0])[0].detach())


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="power of two from 8 on"):
        acgan.Generator(image_size=48)
    with pytest.raises(ValueError, match="one_hot, embedding"):
        acgan.Generator(condition="film")
    with pytest.raises(ValueError, match="log, prob"):
        acgan.auxiliary_loss(torch.zeros(1, 3), torch.tensor([0]), "nll")
