"""MedSynth's networks and losses: shapes, the mask, how far attention sees, and Eq. 2 to 4 against slow twins."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lookalike.models import attention_gan as ag

SMALL = {"image_size": 8, "channels": 1, "num_classes": 3}


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)
    return torch.rand(4, 1, 8, 8, generator=g) * 2 - 1, torch.tensor([0, 1, 2, 1])


class Slope(nn.Module):
    """F(x) = <w, x>: a critic whose gradient is w everywhere."""

    def __init__(self, length):
        super().__init__()
        w = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(1))
        self.w = nn.Parameter(length * w / w.norm())

    def forward(self, images, labels=None):
        return (images * self.w).sum((1, 2, 3)), torch.zeros(len(images), 3)


@pytest.mark.parametrize("attention", ag.ATTENTION)
def test_the_generator_gives_image_mask_and_composition(batch, attention):
    torch.manual_seed(0)
    net = ag.Generator(**SMALL, conv_dim=4, blocks=2, attention=attention)
    x, labels = batch
    s, a, g = net(x, labels)
    assert s.shape == g.shape == x.shape
    assert a.shape == (4, 1, 8, 8)
    assert a.min() >= 0
    assert a.max() <= 1
    assert g.abs().max() <= 1
    torch.testing.assert_close(s, a * x + (1 - a) * g)
    s.square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())


def test_a_mask_of_one_gives_the_input_to_the_bit(batch):
    net, (x, labels) = ag.Generator(**SMALL, conv_dim=4, blocks=1), batch
    g = net(x, labels)[2]
    assert torch.equal(net.compose(x, torch.ones(4, 1, 8, 8), g), x)
    assert torch.equal(net.compose(x, torch.zeros(4, 1, 8, 8), g), g)
    with torch.no_grad():
        net.mask.bias.fill_(100.0)  # the network itself can say so: a sigmoid reaches 1 in float32
    assert torch.equal(net(x, labels)[0], x)


def test_labels_change_the_image_and_a_seed_repeats_it(batch):
    torch.manual_seed(0)
    net = ag.Generator(**SMALL, conv_dim=4, blocks=1).eval()
    first, again = (net.sample(torch.tensor([0, 1]), torch.Generator().manual_seed(3)) for _ in range(2))
    other = net.sample(torch.tensor([1, 1]), torch.Generator().manual_seed(3))
    assert torch.equal(first, again)
    assert not torch.allclose(first[0], other[0])
    assert torch.equal(first[1], other[1])
    assert net.noise(500, torch.Generator().manual_seed(0)).abs().max() <= 1


def test_every_convolution_has_spectral_norm_one(batch):
    torch.manual_seed(0)
    net = ag.Generator(**SMALL, conv_dim=4, blocks=1)
    for _ in range(30):  # each pass is one step of the power iteration
        net(*batch)
    net.eval()
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    assert len(convolutions) == 3 + 2 + 4 + 2 + 2  # encoder, trunk, hourglass, decoder, heads
    for layer in convolutions:
        weight = layer.weight.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else layer.weight
        assert torch.linalg.matrix_norm(weight.flatten(1), 2).item() == pytest.approx(1, abs=0.02)


def test_the_papers_generator_has_the_size_that_its_description_gives():
    """Plain blocks at conv_dim 64: 8.4 million weights, counted by hand from the layers."""
    shape = {"image_size": 64, "channels": 1, "num_classes": 4}
    net = ag.Generator(**shape, attention="none")
    ends = 5 * 64 * 49 + 64 + 64 * 49 + 1 + 64 * 49 + 1
    encoder, decoder = 64 * 128 * 16 + 128 + 128 * 256 * 16 + 256, 256 * 128 * 16 + 128 + 128 * 64 * 16 + 64
    blocks = 6 * 2 * (256 * 256 * 9 + 256)
    assert sum(p.numel() for p in net.parameters()) == ends + encoder + decoder + blocks


def reach(attention):
    """How many pixels away from a place its change still changes a block's features."""
    torch.manual_seed(0)
    block = ag.AttentionBlock(8, attention).eval()
    if attention == "self":
        nn.init.ones_(block.weigh.scale)
    x = torch.randn(1, 8, 16, 16)
    changed = x.clone()
    changed[:, :, 0, 0] += 5
    with torch.no_grad():
        moved = (block(changed) - block(x)).abs().sum(1)[0]
    return max(max(place) for place in (moved > 0).nonzero().tolist())


def test_attention_sees_further_than_the_plain_block():
    assert reach("none") == 2  # two 3x3 convolutions
    assert reach("residual") > 6  # its mask pools twice
    assert reach("channel") == reach("self") == 15  # all of the image


def test_the_critic_has_nine_convolutions_that_end_at_four_pixels():
    for size in (8, 16, 32, 64, 224):
        strides = ag.critic_strides(size)
        side = size
        for stride in strides:
            side = -(-side // stride)
        assert (len(strides), strides[0], side) == (9, 1, 4)
    torch.manual_seed(0)
    critic = ag.Critic(**SMALL, width=4)
    convolutions = [m for m in critic.modules() if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == [4, 4, 8, 8, 16, 16, 32, 32, 32]
    assert sum(isinstance(m, nn.Linear) for m in critic.modules()) == 2
    source, classes = critic(torch.randn(5, 1, 8, 8), torch.zeros(5))
    assert source.shape == (5,)
    assert classes.shape == (5, 3)
    assert source.std() > 1e-3  # nine layers keep the signal


def test_wrong_sizes_and_names_are_refused():
    for wrong in ({"image_size": 10}, {"attention": "cbam"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ag.Generator(**SMALL | wrong)
    for size in (4, 2048):
        with pytest.raises(ValueError, match="between"):
            ag.Critic(image_size=size)


@pytest.mark.parametrize(("length", "correct", "printed"), [(1.0, 0.0, 0.0), (2.0, 1.0, 9.0), (0.5, 0.25, 0.5625)])
def test_the_penalty_is_zero_for_a_slope_of_one_and_printed_squares_the_square(batch, length, correct, printed):
    critic = Slope(length)
    for as_printed, value in ((False, correct), (True, printed)):
        penalty = ag.gradient_penalty(critic, batch[0], as_printed)
        assert penalty.shape == (4,)
        torch.testing.assert_close(penalty, torch.full((4,), value), atol=1e-5, rtol=1e-4)


def test_the_penalty_teaches_the_critic_its_slope(batch):
    critic = Slope(3.0)
    optimizer = torch.optim.SGD(critic.parameters(), 0.3)
    for _ in range(20):
        optimizer.zero_grad()
        ag.gradient_penalty(critic, batch[0]).mean().backward()
        optimizer.step()
    assert critic.w.norm().item() == pytest.approx(1, abs=1e-3)


def test_the_printed_mixture_leaves_the_segment(batch):
    x, g = batch[0], torch.Generator().manual_seed(2)
    s = torch.rand(4, 1, 8, 8, generator=g) * 2 - 1
    eps = ag.draw_eps(x, g)
    assert eps.shape == (4, 1, 1, 1)
    lengths = lambda z: (z - x).flatten(1).norm(dim=1) + (z - s).flatten(1).norm(dim=1)  # noqa: E731
    straight = (x - s).flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths(ag.mixed_images(x, s, eps)), straight)
    printed = ag.draw_eps(x, g, as_printed=True)
    assert printed.shape == x.shape
    assert (lengths(ag.mixed_images(x, s, eps, True)) > 1.05 * straight).all(), "the sign alone"
    assert (lengths(ag.mixed_images(x, s, printed)) > 1.05 * straight).all(), "the eps per pixel alone"
    torch.testing.assert_close(ag.mixed_images(x, x, eps), x)
    assert not torch.allclose(ag.mixed_images(x, x, eps, True), x)


def test_the_two_losses_pull_in_opposite_directions_and_the_printed_one_does_not(batch):
    torch.manual_seed(0)
    critic, (x, labels), wanted = ag.Critic(**SMALL, width=4), batch, torch.tensor([2, 2, 0, 1])
    s = torch.zeros_like(x)
    loss = ag.critic_loss(critic, x, s, labels, wanted, 0.5)
    for i in range(4):
        (fx, kx), (fs, ks) = (critic(part[i : i + 1]) for part in (x, s))
        told = F.cross_entropy(kx, labels[i : i + 1]) + F.cross_entropy(ks, wanted[i : i + 1])
        torch.testing.assert_close(loss[i], (fs - fx)[0] + 0.5 * told)
    right, wrong = (ag.generator_loss(critic, s, wanted, 0.0, printed) for printed in (False, True))
    torch.testing.assert_close(right, -critic(s)[0])
    torch.testing.assert_close(wrong, -right)


def test_total_variation_is_the_sum_of_the_masks_steps():
    a = torch.rand(2, 1, 3, 4)
    for one, value in zip(a, ag.total_variation(a)):
        m = one[0].tolist()
        across = sum(abs(m[i][j] - m[i][j + 1]) for i in range(3) for j in range(3))
        down = sum(abs(m[i][j] - m[i + 1][j]) for i in range(2) for j in range(4))
        assert value.item() == pytest.approx(across + down, rel=1e-5)
    assert ag.total_variation(torch.full((1, 1, 3, 3), 0.7)).item() == 0


def test_logit_matching_is_zero_for_equal_batches_and_moves_the_made_side_alone(batch):
    torch.manual_seed(0)
    classifier, x = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), batch[0]
    fake = (x + 0.1).requires_grad_()
    real = x.clone().requires_grad_()
    for form in ("mse", "log_softmax"):
        assert ag.logit_matching(classifier, x, x, form).abs().max() == 0
        loss = ag.logit_matching(classifier, fake, real, form)
        loss.sum().backward()
        assert real.grad is None
        assert fake.grad.abs().sum() > 0
    a, b = classifier(x), classifier(fake)
    torch.testing.assert_close(
        ag.logit_matching(classifier, fake, x), ((a - b) ** 2).mean(1).detach(), check_stride=False
    )
    shifted = nn.Sequential(classifier, _Shift())
    assert ag.logit_matching(shifted, fake, x).max() > 1
    torch.testing.assert_close(
        ag.logit_matching(shifted, fake, x, "log_softmax"), ag.logit_matching(classifier, fake, x, "log_softmax"),
        atol=1e-4, rtol=1e-3,
    )  # fmt: skip
    with pytest.raises(ValueError, match="form"):
        ag.logit_matching(classifier, x, x, "cosine")


class _Shift(nn.Module):
    """Adds a number of its image's own to all logits, which log-softmax does not see."""

    def forward(self, logits):
        return logits + 100 * logits.sum(1, keepdim=True)


def test_noise_in_cells_is_even_within_a_cell_and_white_without():
    net = ag.Generator(**SMALL, conv_dim=4, blocks=1, noise_cells=2)
    z = net.noise(300, torch.Generator().manual_seed(0))
    cells = z.unfold(2, 4, 4).unfold(3, 4, 4).flatten(4)  # (N, C, 2, 2, 16)
    assert (cells == cells[..., :1]).all()
    assert cells[..., 0].std().item() == pytest.approx(0.48, abs=0.02)
    white = ag.Generator(**SMALL, conv_dim=4, blocks=1).noise(2, torch.Generator().manual_seed(0))
    assert len(white.unique()) > 100
    with pytest.raises(ValueError, match="divide the image's 8 px"):
        ag.Generator(**SMALL, noise_cells=3)
