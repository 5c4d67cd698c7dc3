import functools
import importlib
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lookalike.data import as_tensor, manifest, phantoms
from lookalike.metrics import perceptual
from lookalike.metrics.extractors import load_weights
from lookalike.metrics.perceptual import lpips, stlpips
from lookalike.metrics.trunks import Trunk

NETS = ("alex", "vgg")


@pytest.fixture(scope="module")
def distances():
    return {net: stlpips(net) for net in NETS}


@pytest.fixture(scope="module")
def package():
    """stlpips-pytorch itself, with what it imports but does not use here put aside."""
    load = functools.partial(torch.load, weights_only=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchsummary", types.SimpleNamespace(summary=None))
        patch.setitem(sys.modules, "IPython", types.SimpleNamespace(embed=None))
        patch.setattr(torch, "load", load)
        module = importlib.import_module("stlpips_pytorch.stlpips")
        yield {net: module.LPIPS(net=net, variant="shift_tolerant", verbose=False) for net in NETS}


def _pairs(n, channels, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(2, n, channels, height, width, generator=generator) - 1


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize(("height", "width"), [(64, 64), (31, 50)])
def test_stlpips_is_what_its_package_computes(distances, package, net, height, width):
    real, synthetic = _pairs(3, 3, height, width)
    synthetic[1] = (real[1] + 0.01 * synthetic[1]).clamp(-1, 1)
    with torch.no_grad():
        expected = package[net](real, synthetic).flatten()
        found = distances[net](real, synthetic)
    assert expected.min() < 0.1 * expected.max()  # a near pair and far ones
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("net", NETS)
def test_stlpips_gradients_are_those_of_its_package(distances, package, net):
    real, synthetic = _pairs(2, 3, 32, 32)
    found, expected = synthetic.clone().requires_grad_(), synthetic.clone().requires_grad_()
    distances[net](real, found).sum().backward()
    package[net](real, expected).sum().backward()
    assert found.grad.abs().max() > 1e-5
    torch.testing.assert_close(found.grad, expected.grad, atol=1e-6, rtol=1e-4)
    assert all(weight.grad is None for weight in distances[net].parameters())


@pytest.mark.parametrize("net", NETS)
def test_lpips_is_what_torchmetrics_computes_from_the_same_weights(net, monkeypatch):
    """Our own copies of the trunk's weights are missing, so random ones take their place; the heads are LPIPS's."""
    import torchmetrics
    from torchmetrics.functional.image.lpips import _LPIPS

    torch.manual_seed(0)
    convolutions = list(Trunk(net, shift_tolerant=False).state_dict().values())
    trunk = {f"features.{i}": weight for i, weight in enumerate(convolutions)}
    folder = f"{torchmetrics.__path__[0]}/functional/image/lpips_models"
    heads = load_weights(f"{folder}/{net}.pth")
    ours = perceptual._distance("LPIPS v0.1", net, trunk, heads, shift_tolerant=False)
    with monkeypatch.context() as patch:  # the peer's classifier is thrown away: do not spend seconds on filling it
        patch.setattr(torch.nn.Linear, "reset_parameters", lambda self: None)
        patch.setattr(torch.nn.init, "normal_", lambda weight, *rest: weight)
        peer = _LPIPS(pretrained=True, pnet_rand=True, net=net).eval()
    with torch.no_grad():
        for mine, theirs in zip(convolutions, peer.net.parameters(), strict=True):
            theirs.copy_(mine)
        real, synthetic = _pairs(2, 3, 64, 48)
        expected = peer(real, synthetic).flatten()
    assert ours.name == f"LPIPS v0.1 ({net})"
    torch.testing.assert_close(ours(real, synthetic), expected, atol=1e-6, rtol=1e-5)
    assert expected.min() > 1e-3


@pytest.mark.parametrize("net", NETS)
def test_lpips_takes_only_its_own_files(net, tmp_path):
    import torchmetrics

    heads = f"{torchmetrics.__path__[0]}/functional/image/lpips_models/{net}.pth"
    trunk = tmp_path / "trunk.pth"
    with pytest.raises(FileNotFoundError, match=r"'lookalike data fetch \w+' brings weights/"):
        lpips(trunk, heads, net)
    trunk.write_bytes(b"another network")
    with pytest.raises(ValueError, match="not the expected weights file"):
        lpips(trunk, heads, net)
    # the heads that torchmetrics ships are LPIPS's own, so their line of the manifest is right
    assert perceptual._lpips_file(heads, *perceptual.LPIPS_FILES[net][1]) == heads


def test_the_manifest_knows_every_file():
    known = {(name, file.path) for name, entry in manifest.load_manifest().entries.items() for file in entry.files}
    assert {file for files in perceptual.LPIPS_FILES.values() for file in files} <= known


@pytest.mark.parametrize("net", NETS)
@settings(max_examples=6)
@given(height=st.integers(21, 40), width=st.integers(21, 40), channels=st.sampled_from([1, 3]), seed=st.integers(0, 9))
def test_a_distance_is_zero_to_itself_positive_and_the_same_both_ways(distances, net, height, width, channels, seed):
    a, b = _pairs(2, channels, height, width, seed)
    there, back = distances[net](a, b), distances[net](b, a)
    assert there.shape == (2,)
    assert (there > 1e-4).all()
    torch.testing.assert_close(there, back, atol=1e-6, rtol=1e-5)
    assert (distances[net](a, a.clone()) == 0).all()


def test_more_noise_is_farther(distances):
    images = as_tensor(phantoms.dermoscopy(4, seed=0).image_set.images)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    for distance in distances.values():
        near, middle, far = (distance(images, (images + s * noise).clamp(-1, 1)) for s in (0.02, 0.1, 0.5))
        assert (near < middle).all()
        assert (middle < far).all()


def test_grey_is_three_equal_channels_and_a_stack_is_the_mean_of_its_slices(distances):
    real, synthetic = _pairs(3, 9, 24, 28)
    distance = distances["alex"]
    grey = [distance(real[:, i : i + 1], synthetic[:, i : i + 1]) for i in range(9)]
    colour = distance(real[:, :1].repeat(1, 3, 1, 1), synthetic[:, :1].repeat(1, 3, 1, 1))
    torch.testing.assert_close(grey[0], colour, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(distance(real, synthetic), torch.stack(grey).mean(0), atol=1e-6, rtol=1e-5)


def test_between_reads_any_form_in_batches(distances):
    first, second = (phantoms.grey28(9, seed=seed).image_set for seed in (0, 1))
    found = distances["alex"].between(first, second, batch_size=4)
    expected = distances["alex"](as_tensor(first.images), as_tensor(second.images))
    assert found.shape == (9,)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_array_equal(distances["alex"].between(first.images, first), 0)


@pytest.mark.parametrize("net", NETS)
def test_gradients_are_finite_where_images_are_blank_or_equal(distances, net):
    blank = -torch.ones(1, 1, 28, 28)
    target, _ = _pairs(1, 1, 28, 28)
    for real in (blank, target):
        image = blank.clone().requires_grad_()
        distances[net](real, image).sum().backward()
        assert image.grad.isfinite().all()


def test_an_image_is_found_again_by_following_the_gradient(distances):
    target = as_tensor(phantoms.grey28(1, seed=3).image_set.images)
    image = torch.zeros_like(target).requires_grad_()
    optimiser = torch.optim.Adam([image], lr=0.05)
    course = []
    for _ in range(40):
        loss = distances["alex"](target, image).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        course.append(loss.item())
    assert course[-1] < 0.3 * course[0]


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("shift_tolerant", [True, False])
def test_the_smallest_side_is_the_smallest_that_works(net, shift_tolerant):
    trunk = Trunk(net, shift_tolerant)
    image, smaller = (torch.zeros(1, 3, trunk.smallest - i, trunk.smallest + 9) for i in (0, 1))
    assert trunk(image)[-1].shape[1] == {"vgg": 512, "alex": 256}[net]
    with pytest.raises(RuntimeError):
        torch.nn.Sequential(*trunk.parts)(smaller)
    with pytest.raises(ValueError, match=f"at least {trunk.smallest} px"):
        trunk(smaller)


def test_bad_pairs_get_one_sentence(distances):
    distance, images = distances["alex"], torch.zeros(2, 1, 28, 28)
    with pytest.raises(ValueError, match="trunk alex needs images of at least 21 px on each side, not 40 x 20"):
        distance(torch.zeros(1, 1, 40, 20), torch.zeros(1, 1, 40, 20))
    with pytest.raises(ValueError, match="two batches of one shape"):
        distance(images, images[:1])
    with pytest.raises(ValueError, match="for uint8 call `between`"):
        distance(images.byte(), images.byte())
    with pytest.raises(ValueError, match="two sets of one shape"):
        distance.between(images[:0], images[:0])
    with pytest.raises(ValueError, match="reach from"):
        distance.between(images + 7, images)
    with pytest.raises(ValueError, match='nets "vgg" and "alex"'):
        stlpips("squeeze")
    with pytest.raises(ValueError, match='nets "vgg" and "alex"'):
        lpips("a", "b", "squeeze")
