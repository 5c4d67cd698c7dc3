"""ADA's transforms: identities, planted moves, the wavelet, the second derivative; and the rule that moves p."""

import math

import numpy as np
import pytest
import torch

from lookalike.models import augment as ada


@pytest.fixture
def smooth():
    """Images whose resampling loses nothing worth naming."""
    line = torch.linspace(-1, 1, 32)
    x, y = line[None, :], line[:, None]
    return torch.stack([torch.exp(-((x - 0.2) ** 2 + (y + 0.1) ** 2) / 0.1), 0.5 * torch.sin(3 * x) + 0 * y, x * y])[
        None
    ]


def test_the_filter_is_an_orthogonal_wavelet():
    h = np.array(ada.SYM6)
    assert h.sum() == pytest.approx(math.sqrt(2), abs=1e-12)
    products = [h[2 * k :] @ h[: len(h) - 2 * k] for k in range(6)]
    assert products == pytest.approx([1, 0, 0, 0, 0, 0], abs=1e-11)
    alternating = h * (-1.0) ** np.arange(12)
    moments = [(alternating * np.arange(12.0) ** k).sum() for k in range(6)]
    assert moments == pytest.approx([0] * 6, abs=1e-5), "six vanishing moments"


def test_without_a_move_the_image_comes_back_exactly():
    images = torch.randn(3, 3, 16, 16)
    assert torch.allclose(ada.move(images, torch.eye(3).repeat(3, 1, 1)), images, atol=2e-5)
    assert ada.augment(images, 0.0, "bgc") is images
    assert ada.augment(images, 0.7, "none") is images


def test_planted_moves_do_what_they_say(smooth):
    def moved(matrix):
        return ada.move(smooth, matrix)

    inner = (slice(None), slice(None), slice(4, -4), slice(4, -4))
    mirrored = moved(ada._scale(-torch.ones(1), torch.ones(1)))
    assert torch.allclose(mirrored[inner], smooth.flip(3)[inner], atol=0.1)
    turned = moved(ada._rotation(torch.tensor([math.pi / 2])))
    assert torch.allclose(turned[inner], smooth.rot90(1, (2, 3))[inner], atol=0.1)
    assert not torch.allclose(turned[inner], smooth.rot90(-1, (2, 3))[inner], atol=0.3), "one way, not the other"
    right = moved(ada._translation(-torch.tensor([[3.0, 0.0]])))
    assert torch.allclose(right[..., 3:], smooth[..., :-3], atol=1e-4)
    assert torch.allclose(right[..., :3], smooth[..., 1:4].flip(3), atol=1e-4), "the edge is mirrored"
    larger = moved(ada._even_scale(torch.ones(1)))
    assert larger[0, 2, 15, 24] == pytest.approx(float(smooth[0, 2, 15, 20] + smooth[0, 2, 15, 19]) / 2, abs=0.05)


def test_moves_are_the_identity_at_0_and_take_place_as_often_as_said():
    torch.manual_seed(0)
    assert torch.equal(ada.draw_moves(5, 0.0, 32), torch.eye(3).repeat(5, 1, 1))
    moves = ada.draw_moves(4000, 0.25, 32)
    still = (moves - torch.eye(3)).abs().amax((1, 2)) < 1e-6
    # eight transforms; a flip is the identity half the time, a quarter turn a quarter, rotation has 1/4 in all
    shift = 1 - 1 / 9**2  # whole pixels up to 4 either way, 0 both ways about once in 81
    expected = (1 - 0.25 / 2) * (1 - 0.25 * 0.75) * (1 - 0.25 * shift) * 0.75 * 0.75 * 0.75 * 0.75
    assert still.float().mean().item() == pytest.approx(expected, abs=0.03)


def test_scales_and_rotations_have_their_stated_spread():
    torch.manual_seed(0)
    log2 = ada.draw_moves(6000, 1.0, 32)[:, :2, :2].det().abs().log2() / -2
    assert log2.std().item() == pytest.approx(0.2, abs=0.01)
    assert log2.mean().item() == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("p", [0.5, 1.7])
def test_augmented_images_are_finite_and_stay_near_their_range(p):
    torch.manual_seed(0)
    made = ada.augment(torch.rand(8, 3, 16, 16) * 2 - 1, p, "bg")
    assert made.shape == (8, 3, 16, 16)
    assert made.abs().max() < 2


def test_sampling_has_a_second_derivative():
    torch.manual_seed(0)
    images = torch.rand(2, 2, 5, 5, dtype=torch.double, requires_grad=True)
    grid = torch.rand(2, 4, 4, 2, dtype=torch.double) * 2.4 - 1.2
    assert torch.autograd.gradcheck(lambda x: ada.sample(x, grid), images)
    assert torch.autograd.gradgradcheck(lambda x: ada.sample(x, grid).square(), images)


def test_colour_matrices_keep_grey_grey_and_planted_changes_are_found():
    torch.manual_seed(0)
    grey = torch.rand(50, 1, 4, 4).repeat(1, 3, 1, 1)
    made = ada.recolour(grey, ada.draw_colours(50, 1.0))
    assert (made - made.mean(1, keepdim=True)).abs().max() < 1e-4
    colour = torch.rand(2, 3, 4, 4)
    third = ada.recolour(colour, ada._hue_rotation(torch.full((2,), 2 * math.pi / 3)))
    assert torch.allclose(third, colour[:, [2, 0, 1]], atol=1e-5), "a third of the circle goes r, g, b to g, b, r"
    assert torch.equal(ada.draw_colours(3, 0.0), torch.eye(4).repeat(3, 1, 1))


def test_the_luma_flip_turns_grey_around_and_leaves_hue():
    torch.manual_seed(3)
    along = torch.ones(3, 3) / 3
    flip = torch.eye(4)
    flip[:3, :3] -= 2 * along
    image = torch.rand(1, 3, 2, 2)
    made = ada.recolour(image, flip[None])
    assert torch.allclose(made.mean(1), -image.mean(1), atol=1e-6)
    assert torch.allclose(made - made.mean(1, keepdim=True), image - image.mean(1, keepdim=True), atol=1e-6)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="pipeline must be one of none, bg, bgc"):
        ada.augment(torch.zeros(1, 3, 8, 8), 0.5, "blit")
    with pytest.raises(ValueError, match="images of 3 channels, not 1"):
        ada.augment(torch.zeros(1, 1, 8, 8), 0.5, "bgc")


# --- strength -----------------------------------------------------------------------------------------------


def test_p_moves_by_batch_times_interval_over_half_a_million_images():
    strength = ada.Strength()
    for _ in range(4):
        strength.seen(torch.ones(32))
    assert strength.adapt() == 1
    assert strength.p == pytest.approx(32 * 4 / 500_000)
    for _ in range(4):
        strength.seen(torch.cat([torch.ones(19), -torch.ones(13)]))  # a mean sign of .19
    strength.adapt()
    assert strength.p == 0
    strength.seen(-torch.ones(8))
    strength.adapt()
    assert strength.p == 0, "never below 0"


def test_p_has_no_ceiling_and_stays_where_the_target_is_met():
    strength = ada.Strength(kimg=0.001)
    for _ in range(3):
        strength.seen(torch.ones(1))
        strength.adapt()
    assert strength.p == pytest.approx(3)
    strength.seen(torch.tensor([1.0, 1, 1, 1, -1]))
    strength.adapt()
    assert strength.p == pytest.approx(3)


def test_strength_goes_on_from_its_state():
    strength = ada.Strength()
    strength.seen(torch.ones(5))
    other = ada.Strength()
    other.restore(strength.state())
    assert other.adapt() == strength.adapt()
    assert other.p == strength.p
    with pytest.raises(ValueError, match="No logits"):
        other.adapt()


def test_a_fixed_p_stays_and_still_tells_the_sign():
    strength = ada.Strength(fixed=0.3)
    strength.seen(torch.ones(64))
    assert strength.adapt() == 1
    assert strength.p == 0.3


def test_the_matrices_are_padding_zero_stuffing_and_convolution():
    image, margin = torch.randn(1, 1, 9, 9), 5
    padded = torch.nn.functional.pad(image, (margin,) * 4, mode="reflect")[0, 0]
    stuffed = torch.zeros(38, 38)
    stuffed[::2, ::2] = padded
    h = np.array(ada.SYM6)
    slow = np.apply_along_axis(lambda line: np.convolve(line, h)[5 : 5 + 38], 0, stuffed.numpy())
    slow = np.apply_along_axis(lambda line: np.convolve(line, h)[5 : 5 + 38], 1, slow)
    up = ada._up(9, margin)
    assert torch.allclose(up @ image[0, 0] @ up.T, torch.tensor(slow).float(), atol=1e-5)
    line = torch.randn(28)
    correlated = [float(line[2 * i : 2 * i + 12].double() @ torch.tensor(h)) for i in range(9)]
    assert torch.allclose(ada._down(9) @ line, torch.tensor(correlated), atol=1e-5)
