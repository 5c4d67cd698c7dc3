"""StyleGAN2 against its published counts, its own equations written out slowly, and statistics that must hold."""

import math

import pytest
import torch
import torch.nn.functional as F

from lookalike.models import stylegan2 as sg

SMALL = {"image_size": 16, "base": 128, "max_channels": 8}
PUBLISHED = {"base": 4096, "max_channels": 128}  # the sheet's "small"


def count(net):
    return sum(weight.numel() for weight in net.parameters())


def generator(num_classes=2, **changed):
    torch.manual_seed(0)
    return sg.Generator(**SMALL | {"num_classes": num_classes, "latent_dim": 12, "w_dim": 10} | changed)


def discriminator(num_classes=2, **changed):
    torch.manual_seed(1)
    return sg.Discriminator(**SMALL | {"num_classes": num_classes} | changed)


@pytest.mark.parametrize(("side", "made", "judge"), [(32, 1_251_347, 1_346_305), (64, 1_395_288, 1_465_025)])
def test_parameter_counts_are_the_published_ones(side, made, judge):
    with torch.device("meta"):
        own = {"num_classes": 0, **PUBLISHED}
        assert count(sg.Generator(side, latent_dim=128, w_dim=128, **own)) == made
        assert count(sg.Discriminator(side, **own)) == judge


def test_the_papers_networks_have_23_and_24_million_weights():
    with torch.device("meta"):
        made, judge = sg.Generator(256, num_classes=0), sg.Discriminator(256, num_classes=0)
        assert round(count(made) / 1e6, 2) == 23.19
        assert round(count(judge) / 1e6, 2) == 24.00
    assert made.num_ws == 14
    assert sg.layer_widths(256, 16384, 512) == {4: 512, 8: 512, 16: 512, 32: 512, 64: 256, 128: 128, 256: 64}
    assert len(made.noise_shapes) == 13
    # a label adds its embedding and a wider first layer; the judge a mapping of eight layers and 512 outputs
    with torch.device("meta"):
        assert count(sg.Generator(256)) - count(made) == (2 * 512 + 512) + 512 * 512
        assert count(sg.Discriminator(256)) - count(judge) == 511 * 513 + (2 * 512 + 512) + 8 * (512 * 512 + 512)


@pytest.mark.parametrize("side", [4, 24, 0, -8])
def test_sides_that_cannot_be_doubled_to_are_refused(side):
    with pytest.raises(ValueError, match="power of two from 8"):
        sg.Generator(side)


# --- filters ------------------------------------------------------------------------------------------------

LINE = torch.tensor([1.0, 3.0, 3.0, 1.0])
KERNEL = torch.outer(LINE, LINE) / 64


def zero_stuffed(image):
    """Each pixel followed by zeros, as a loop."""
    n, c, h, w = image.shape
    wide = torch.zeros(n, c, 2 * h, 2 * w)
    for i in range(h):
        for j in range(w):
            wide[:, :, 2 * i, 2 * j] = image[:, :, i, j]
    return wide


def each_channel(image, kernel, **how):
    return F.conv2d(image.flatten(0, 1)[:, None], kernel[None, None], **how).unflatten(0, image.shape[:2])[:, :, 0]


def test_doubling_equals_the_zero_stuffed_convolution_up_to_the_border():
    image = torch.randn(2, 3, 5, 5)
    slow = each_channel(F.pad(zero_stuffed(image), (2, 1, 2, 1)), 4 * KERNEL)
    assert torch.allclose(sg.double(image), slow, atol=1e-6)
    plain = F.interpolate(image, scale_factor=2, mode="bilinear", align_corners=False)
    assert torch.allclose(sg.double(image)[:, :, 2:-2, 2:-2], plain[:, :, 2:-2, 2:-2], atol=1e-6)
    assert (sg.double(image) - plain)[:, :, 0].abs().max() > 0.1


def test_halving_is_filtering_and_then_every_second_pixel():
    image = torch.randn(2, 3, 8, 8)
    slow = each_channel(image, KERNEL, padding=1)[:, :, ::2, ::2]
    assert torch.allclose(sg.halve(image), slow, atol=1e-6)
    assert torch.allclose(sg.blur(image, 2), each_channel(image, KERNEL, padding=2), atol=1e-6)


def test_the_way_up_is_a_convolution_of_the_zero_stuffed_image_then_the_filter():
    """The kernel is turned by half, as a convolution's is, not a correlation's."""
    conv = sg.StyledConv(3, 4, 5, 16, up=True)
    x, w = torch.randn(2, 3, 8, 8), torch.randn(2, 5)
    styles = conv.style(w)
    turned = conv.weight.flip(2, 3)
    wide = F.conv2d(F.pad(zero_stuffed(x * styles[:, :, None, None]), (2, 1, 2, 1)), turned)  # 17 px
    slow = each_channel(wide, 4 * KERNEL, padding=1) * sg.demodulation(conv.weight, styles)[:, :, None, None]
    slow = F.leaky_relu(slow + conv.bias[:, None, None], 0.2) * math.sqrt(2)
    assert torch.allclose(conv(x, w, "random"), slow, atol=1e-5)


# --- synthesis ----------------------------------------------------------------------------------------------


def test_scaling_activations_equals_modulating_the_weights_of_each_image():
    conv = sg.StyledConv(6, 5, 4, 8)
    x, w = torch.randn(3, 6, 8, 8), torch.randn(3, 4)
    with torch.no_grad():
        conv.bias.normal_(), conv.strength.fill_(0.3)
    styles, noise = conv.style(w), torch.randn(3, 1, 8, 8)
    for i in range(3):
        kernel = conv.weight * styles[i][None, :, None, None]
        kernel = kernel / kernel.square().sum((1, 2, 3), keepdim=True).add(1e-8).sqrt()
        slow = F.conv2d(x[i : i + 1], kernel, padding=1) + 0.3 * noise[i] + conv.bias[:, None, None]
        slow = torch.where(slow > 0, slow, 0.2 * slow) * 2**0.5
        assert torch.allclose(conv(x, w, noise)[i], slow[0], atol=1e-5)


def test_demodulation_gives_unit_variance_whatever_the_style():
    torch.manual_seed(0)
    weight, styles = torch.randn(16, 64, 3, 3) * 5, torch.rand(1, 64) * 30 + 0.1
    x = torch.randn(8, 64, 32, 32)
    made = F.conv2d(x * styles[:, :, None, None], weight) * sg.demodulation(weight, styles)[:, :, None, None]
    assert made.var((0, 2, 3)).mean().item() == pytest.approx(1, abs=0.02)


def test_a_fresh_generator_keeps_activations_at_unit_scale():
    torch.manual_seed(0)
    made = sg.Generator(32, num_classes=0, latent_dim=64, w_dim=64, base=2048, max_channels=64)
    w = made.map(made.noise(256))
    assert w.square().mean().item() == pytest.approx(1, abs=0.3)
    seen = []
    hooks = [conv.register_forward_hook(lambda m, i, out: seen.append(out)) for b in made.blocks for conv in b.convs]
    made.synthesise(w[:32])
    for hook in hooks:
        hook.remove()
    scales = [out.square().mean().item() for out in seen]
    assert all(0.1 < scale < 2 for scale in scales), "filters take some of it, no layer adds to it"


def test_a_block_shares_its_last_latent_with_the_next_one():
    """num_ws latents, of which the to-RGB of a block reads the one that the next block's first layer reads."""
    made = generator(0)
    assert made.num_ws == 6
    ws = torch.randn(1, 6, 10)
    reads = []
    for name, module in made.named_modules():
        if name.endswith("style"):
            module.register_forward_hook(
                lambda m, inputs, out, name=name: reads.append(
                    (name, int((ws == inputs[0][:, None]).all(2).nonzero()[0, 1]))
                )
            )
    made.synthesise(ws, "fixed")
    assert reads == [
        ("blocks.0.convs.0.style", 0), ("blocks.0.to_rgb.style", 1),
        ("blocks.1.convs.0.style", 1), ("blocks.1.convs.1.style", 2), ("blocks.1.to_rgb.style", 3),
        ("blocks.2.convs.0.style", 3), ("blocks.2.convs.1.style", 4), ("blocks.2.to_rgb.style", 5),
    ]  # fmt: skip


def test_latents_are_brought_to_length_one_per_number():
    made = generator(0)
    z = made.noise(3)
    assert torch.allclose(made.map(z), made.map(7 * z), atol=1e-5)


def test_truncation_moves_to_the_mean_that_training_tracked():
    made = generator(0).train()
    for _ in range(3):
        made.map(made.noise(50))
    tracked = made.w_mean.clone()
    assert tracked.abs().sum() > 0
    made.eval()
    z = made.noise(4)
    assert torch.equal(made.w_mean, tracked)
    assert torch.allclose(made.map(z, truncation=0.0), tracked.expand(4, -1), atol=1e-6)
    half = (made.map(z) + tracked) / 2
    assert torch.allclose(made.map(z, truncation=0.5), half, atol=1e-6)


def test_samples_follow_their_seed_and_leave_the_mean_alone():
    made = generator().train()
    with torch.no_grad():
        for block in made.blocks:
            for conv in block.convs:
                conv.strength.fill_(0.5)
    before = made.w_mean.clone()
    first, again = (made.sample(torch.tensor([0, 1, 1]), torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(made.w_mean, before)
    assert made.training
    assert first.shape == (3, 3, 16, 16)
    assert first.abs().max() <= 1


def test_noise_is_random_fixed_or_given():
    made = generator(0)
    with torch.no_grad():
        for block in made.blocks:
            for conv in block.convs:
                conv.strength.fill_(1.0)
    w = torch.randn(2, 10)
    assert not torch.equal(made.synthesise(w), made.synthesise(w))
    assert torch.equal(made.synthesise(w, "fixed"), made.synthesise(w, "fixed"))
    maps = [conv.fixed[None, None] for block in made.blocks for conv in block.convs]
    assert torch.allclose(made.synthesise(w, maps), made.synthesise(w, "fixed"), atol=1e-6)
    with pytest.raises(ValueError, match="5 noise maps, not 2"):
        made.synthesise(w, maps[:2])
    with pytest.raises(ValueError, match='"random", "fixed"'):
        made.synthesise(w, "none")
    with pytest.raises(ValueError, match=r"\(N, 10\)"):
        made.synthesise(torch.randn(2, 9))


def test_labels_change_the_image_and_are_asked_for():
    made = generator()
    z = made.noise(2)
    a, b = (made(z, torch.tensor([k, k]), noise="fixed") for k in (0, 1))
    assert (a - b).abs().max() > 0.01
    with pytest.raises(ValueError, match="know 2 classes: give labels"):
        made(z)


# --- the judge ----------------------------------------------------------------------------------------------


def test_projection_is_the_inner_product_with_the_labels_own_vector():
    judge = discriminator().eval()
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 1, 0])
    kept = {}
    judge.out.register_forward_hook(lambda m, i, out: kept.update(values=out))
    logits = judge(images, labels)
    vectors = torch.stack([judge.label_mapping(None, torch.tensor([k]))[0] for k in (0, 1)])
    slow = torch.stack([kept["values"][i] @ vectors[labels[i]] / math.sqrt(8) for i in range(4)])
    assert torch.allclose(logits, slow, atol=1e-5)
    assert len(judge.label_mapping.layers) == 8


def test_minibatch_deviation_is_that_of_every_quarter_th_image():
    judge = discriminator(0)
    x = torch.randn(8, 8, 4, 4)
    found = judge._deviation(x)
    for i in range(2):  # groups {0, 2, 4, 6} and {1, 3, 5, 7}
        members = x[[i, i + 2, i + 4, i + 6]].double()
        slow = (members.var(0, unbiased=False) + 1e-8).sqrt().mean()
        assert found[i::2].double().allclose(slow.expand(4, 1, 4, 4), atol=1e-5)
    with pytest.raises(ValueError, match="batch of 6 is no multiple of the 4"):
        judge(torch.randn(6, 3, 16, 16))


def test_in_evaluation_each_image_is_judged_alone():
    judge = discriminator(0)
    images = torch.randn(5, 3, 16, 16)
    judge.eval()
    alone = torch.cat([judge(image[None]) for image in images])
    assert torch.allclose(judge(images), alone, atol=1e-5)
    judge.train()
    assert not torch.allclose(judge(images[:4]), alone[:4], atol=1e-4)


def test_a_residual_block_adds_two_branches_of_half_the_variance():
    torch.manual_seed(0)
    block = sg._ResidualBlock(4, 6, None)
    x = torch.randn(2, 4, 8, 8)
    scaled = [conv.weight / math.sqrt(conv.weight[0].numel()) for conv in (block.first, block.second, block.skip)]
    with torch.no_grad():
        block.first.bias.normal_(), block.second.bias.normal_()
    y = F.leaky_relu(F.conv2d(x, scaled[0], block.first.bias, padding=1), 0.2) * 2**0.5
    y = F.conv2d(each_channel(y, KERNEL, padding=2), scaled[1], block.second.bias, stride=2)
    y = F.leaky_relu(y, 0.2) * 2**0.5
    skip = F.conv2d(each_channel(x, KERNEL, padding=1)[:, :, ::2, ::2], scaled[2])
    assert torch.allclose(block(x), (y + skip) * 0.5**0.5, atol=1e-5)


def test_half_precision_stays_near_full_precision_and_is_clamped():
    full, half = generator(0), generator(0, half=torch.bfloat16)
    half.load_state_dict(full.state_dict())
    w = torch.randn(4, 10)
    a, b = full.synthesise(w, "fixed"), half.synthesise(w, "fixed")
    assert b.dtype == torch.float32
    assert 0 < (a - b).abs().max() < 0.15 * a.abs().max()
    judge, judge_half = discriminator(0), discriminator(0, half=torch.bfloat16)
    judge_half.load_state_dict(judge.state_dict())
    on = judge(a), judge_half(a)
    assert on[1].dtype == torch.float32
    assert (on[0] - on[1]).abs().max() < 0.1
    with torch.no_grad():
        judge_half.from_rgb.weight.mul_(1e6)
    assert judge_half(a).abs().max() < 1e7, "activations are cut at 256"


def test_only_the_four_highest_resolutions_are_halved():
    with torch.device("meta"):
        made = sg.Generator(256, half=torch.bfloat16)
    assert [block.half is not None for block in made.blocks] == [False] * 3 + [True] * 4


def test_style_layers_are_those_of_the_styled_convolutions():
    made = generator(0)
    assert [layer.weight.shape for layer in made.style_layers()] == [(8, 10)] * 5
