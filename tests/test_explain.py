"""Heat maps: Grad-CAM written out, evidence that was planted, and what the numbers on maps mean."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.numpy import save_file
from torch import nn

from lookalike.data import datasets
from lookalike.explain import cam_similarity, explain_cell, grad_cam, last_convolution, load_maps, on_ink
from lookalike.metrics.classifiers import Classifier
from lookalike.metrics.utility import utility


def noise(n=5, side=28, seed=0):
    return 2 * torch.rand(n, 1, side, side, generator=torch.Generator().manual_seed(seed)) - 1


def small_classifier(num_classes=3):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Classifier(num_classes=num_classes, width=8)


def bilinear(coarse, size):
    """Upsampling to `size`, pixel by pixel, with the centres of cells and pixels aligned."""
    side = len(coarse)
    fine = np.zeros((size, size))
    for place in np.ndindex(size, size):
        row, column = (min(max((p + 0.5) * side / size - 0.5, 0), side - 1) for p in place)
        top, left = int(row), int(column)
        down, right = min(top + 1, side - 1), min(left + 1, side - 1)
        upper = (1 - column + left) * coarse[top, left] + (column - left) * coarse[top, right]
        lower = (1 - column + left) * coarse[down, left] + (column - left) * coarse[down, right]
        fine[place] = (1 - row + top) * upper + (row - top) * lower
    return fine


def written_out(network, layer, image, target, relu):
    """Grad-CAM of one image (1, C, S, S) by hooks."""
    seen = {}
    hooks = [
        layer.register_forward_hook(lambda _, __, out: seen.update(activations=out.detach()[0])),
        layer.register_full_backward_hook(lambda _, __, grads: seen.update(gradients=grads[0][0])),
    ]
    network.eval()
    network(image)[0, target].backward()
    for hook in hooks:
        hook.remove()
    network.zero_grad()
    coarse = torch.einsum("c,chw->hw", seen["gradients"].mean((1, 2)), seen["activations"]).numpy()
    fine = bilinear(coarse.clip(min=0) if relu else coarse, image.shape[-1])
    return fine / np.abs(fine).max()


@pytest.mark.parametrize("relu", [True, False])
def test_maps_are_grad_cam_written_out(relu):
    network, images, targets = small_classifier(), noise(), [0, 1, 2, 0, 1]
    layer = last_convolution(network)
    found = grad_cam(network, layer, images, targets, relu=relu)
    assert found.dtype == np.float32
    assert (found.min() < 0) != relu
    for image, target, found_map in zip(images, targets, found):
        expected = written_out(network, layer, image[None], target, relu)
        assert found_map == pytest.approx(expected, abs=1e-5)


class Bars(nn.Module):
    """Class 0 is a bright vertical bar, class 1 a horizontal one; the activation overwrites its input."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(1, 2, 5, padding=2, bias=False)
        bar = torch.full((5, 5), -0.5)  # the end of the other bar cancels
        bar[:, 2] = 1
        self.convolution.weight.data = torch.stack([bar, bar.T])[:, None]
        self.activation = nn.ReLU(inplace=True)

    def forward(self, images):
        return self.activation(self.convolution((images + 1) / 2)).mean((2, 3))


def bars(n=1):
    """A vertical bar top left and a horizontal bar bottom right."""
    images = -torch.ones(n, 1, 28, 28)
    images[:, :, 3:10, 6] = 1
    images[:, :, 21, 18:25] = 1
    return images


@pytest.mark.parametrize(("target", "corner"), [(0, (slice(14), slice(14))), (1, (slice(14, 28), slice(14, 28)))])
def test_heat_lies_on_the_planted_evidence(target, corner):
    network = Bars()
    (found,) = grad_cam(network, network.convolution, bars(), [target])
    assert found[corner].sum() > 0.99 * found.sum()
    assert found.max() == 1
    assert on_ink(bars(), found[None]) > 5


def test_a_map_without_evidence_stays_all_zero():
    network = Bars()
    found = grad_cam(network, network.convolution, -torch.ones(2, 1, 28, 28), [0, 1])
    assert not found.any()
    against = nn.Sequential(network, nn.Linear(2, 2, bias=False))
    against[1].weight.data = -torch.eye(2)  # the bars now speak against their classes
    assert not grad_cam(against, network.activation, bars(2), [0, 1]).any()
    signed = grad_cam(against, network.activation, bars(2), [0, 1], relu=False)
    assert signed.min() == -1
    assert signed.max() == 0


def test_pooled_layers_have_class_activation_maps():
    """Where mean pooling and one layer follow, Grad-CAM is CAM (Selvaraju et al., Sec. 3.1), whatever the bias."""
    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    images = noise(4)
    with torch.no_grad():
        expected = F.relu(torch.einsum("nchw,nc->nhw", network[0](images), network[3].weight[[2, 1, 0, 2]]))
    expected /= expected.amax((1, 2), keepdim=True)
    torch.testing.assert_close(torch.tensor(grad_cam(network, network[0], images, [2, 1, 0, 2])), expected)


def test_maps_depend_on_their_own_image_alone_and_leave_the_network_as_it_is():
    network = small_classifier().requires_grad_(False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    layer, images = last_convolution(network), noise(5)
    together = grad_cam(network, layer, images, [0, 1, 2, 0, 1])
    assert grad_cam(network, layer, images, [0, 1, 2, 0, 1], batch_size=2) == pytest.approx(together, abs=1e-5)
    assert grad_cam(network, layer, images[3:4], [0])[0] == pytest.approx(together[3], abs=1e-5)
    assert grad_cam(network, layer, images[3:4], [1])[0] != pytest.approx(together[3], abs=1e-2)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    trained = small_classifier()
    grad_cam(trained, last_convolution(trained), images, [0] * 5)
    assert all(parameter.grad is None for parameter in trained.parameters())


def test_the_last_convolution_is_the_paper_s():
    layer = last_convolution(Classifier())
    assert (layer.in_channels, layer.out_channels) == (256, 512)
    assert layer(torch.zeros(1, 256, 4, 4)).shape == (1, 512, 4, 4)
    with pytest.raises(ValueError, match=r"Linear has no nn\.Conv2d"):
        last_convolution(nn.Linear(2, 2))


def test_wrong_layers_and_targets_are_refused():
    network = small_classifier()
    layer = last_convolution(network)
    with pytest.raises(ValueError, match="not a part of the network"):
        grad_cam(network, nn.Conv2d(1, 1, 1), noise(2), [0, 0])
    with pytest.raises(ValueError, match=r"2 images and targets of shape \(1,\)"):
        grad_cam(network, layer, noise(2), [0])
    for wrong in (-1, 3):
        with pytest.raises(ValueError, match=f"Targets reach from .*{wrong}.*; there are 3 classes"):
            grad_cam(network, layer, noise(2), [0, wrong])


# Numbers on maps

heat = arrays(np.float64, (3, 4, 4), elements=st.floats(0, 1, width=16))


@given(heat, heat, st.floats(0.1, 10))
def test_similarity_is_symmetric_blind_to_scale_and_in_range(first, second, scale):
    found = cam_similarity(first, second)
    if not first.any() or not second.any():
        assert math.isnan(found)
        return
    assert 0 <= found <= 1
    assert cam_similarity(second, scale * first) == pytest.approx(found, abs=1e-9)
    assert cam_similarity(first, first[::-1]) == pytest.approx(1)


def test_similarity_is_the_cosine_of_mean_maps():
    first, second = np.zeros((2, 2, 2)), np.zeros((1, 2, 2))
    first[0, 0, 0] = first[1, 0, 1] = second[0, 0, 0] = 1
    assert cam_similarity(first, second) == pytest.approx(math.sqrt(0.5))  # 45 degrees
    assert cam_similarity(first[1:], second) == 0
    with pytest.raises(ValueError, match="Two sets of maps"):
        cam_similarity(first, second[:, :1])
    with pytest.raises(ValueError, match="Two sets of maps"):
        cam_similarity(first[:0], second)


def blots(seed, n=400):
    """Images with ink at random places, and heat at others."""
    rng = np.random.default_rng(seed)
    return (rng.random((n, 1, 8, 8)) < 0.2).astype(np.uint8) * 255, rng.random((n, 8, 8))


def test_even_heat_has_no_preference_and_heat_on_ink_alone_has_all():
    images, _ = blots(0)
    area = (images > 127).mean()
    assert on_ink(images, np.ones((400, 8, 8))) == pytest.approx(1)
    assert on_ink(images, (images[:, 0] > 127)) == pytest.approx(1 / area)
    assert on_ink(images, images[:, 0] <= 127) == 0


def test_heat_that_does_not_know_the_image_gives_one():
    images, maps = blots(1)
    assert on_ink(images, maps) == pytest.approx(1, abs=0.05)  # standard error 0.015: 26,000 pixels, a fifth ink


def test_on_ink_written_out_leaves_empty_maps_out():
    images, maps = blots(2, n=6)
    maps[2] = 0
    shares, areas = [], []
    for image, each in zip(images, maps):
        if each.sum():
            shares.append(sum(each[place] for place in np.ndindex(8, 8) if image[0][place] > 127) / each.sum())
            areas.append((image > 127).mean())
    assert on_ink(images, maps) == pytest.approx(np.mean(shares) / np.mean(areas))
    assert math.isnan(on_ink(images, 0 * maps))
    assert math.isnan(on_ink(0 * images, maps))


def test_on_ink_refuses_what_is_not_heat():
    images, maps = blots(3, n=2)
    with pytest.raises(ValueError, match="Each image needs its map"):
        on_ink(images, maps[:1])
    with pytest.raises(ValueError, match="relu=True"):
        on_ink(images, maps - 0.5)


# The stage

SETTINGS = {"data": "digits", "classes": 3, "images_per_class": 20, "classifier_width": 8, "seed": 0}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A cell whose generator is perfect: its samples are real images."""
    folder = tmp_path_factory.mktemp("trained")
    real = datasets.load("digits", "train").first_per_class(30)
    save_file({"images": real.images, "labels": real.labels}, folder / "samples.safetensors")
    return folder


@pytest.fixture(scope="module")
def explained(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("explained")
    return explain_cell(folder, trained=trained, classifier_epochs=12, **SETTINGS), load_maps(folder)


def test_the_stage_trains_the_utility_classifier(explained):
    train, test = datasets.load("digits", "train").first_per_class(30), datasets.load("digits", "test")
    score = utility(train.images, train.labels, test.images, test.labels, 10, epochs=12, seed=0, width=8)
    assert explained[0]["accuracy"] == score["accuracy"]


def test_the_stage_keeps_images_and_maps_class_after_class(explained):
    found, kept = explained
    test, train = datasets.load("digits", "test"), datasets.load("digits", "train")
    assert kept["labels"].tolist() == np.repeat([0, 1, 2], 20).tolist()
    for name, source in (("synthetic", train), ("real", test)):
        assert np.array_equal(kept[name], source.first_per_class(20).images[:60])
        assert kept[name].dtype == np.uint8
        assert kept[f"{name}_maps"].shape == (60, 28, 28)
        largest = kept[f"{name}_maps"].max((1, 2))
        assert ((largest == 0) | (largest == 1)).all()
        assert found[f"empty_{name}"] == (largest == 0).mean()
        assert found[f"on_ink_{name}"] == on_ink(kept[name], kept[f"{name}_maps"])


def test_a_perfect_generator_is_as_alike_as_real_images_are(explained):
    found, kept = explained
    halves = kept["synthetic_maps"][20:40], kept["real_maps"][20:40]
    assert found["similarity"][1] == cam_similarity(*halves)
    others = [cam_similarity(halves[0], kept["real_maps"][rows]) for rows in (slice(20), slice(40, 60))]
    assert found["similarity_other"][1] == pytest.approx(np.mean(others))
    alike, ceiling, floor = (np.array(found[f"similarity{kind}"]) for kind in ("", "_real", "_other"))
    assert alike == pytest.approx(ceiling, abs=0.1)
    assert alike.mean() > floor.mean() + 0.05


def test_a_classifier_that_learnt_nothing_is_a_control(trained, tmp_path):
    found = explain_cell(tmp_path, trained=trained, classifier_epochs=0, **SETTINGS | {"classes": 1})
    assert found["accuracy"] == pytest.approx(0.1, abs=0.1)
    assert found["similarity_other"] == [None]
    assert len(found["similarity"]) == 1


def test_the_stage_refuses_what_is_not_there(trained, tmp_path):
    with pytest.raises(ValueError, match="classes is 1 to 10 for digits, not 11"):
        explain_cell(tmp_path, trained=trained, classifier_epochs=0, **SETTINGS | {"classes": 11})
    with pytest.raises(ValueError, match="A class has 30 samples and 31 are needed"):
        explain_cell(tmp_path, trained=trained, classifier_epochs=0, **SETTINGS | {"images_per_class": 31})
