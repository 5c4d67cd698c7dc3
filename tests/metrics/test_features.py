import tracemalloc
from dataclasses import replace

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lookalike.data import ImageSet
from lookalike.metrics import as_images
from lookalike.metrics.extractors import Extractor, efficientnet_lite0, random_conv
from lookalike.metrics.features import _content_hash, features, logits


@pytest.fixture(scope="module")
def lite0():
    return efficientnet_lite0(image_size=32)


class Counting(nn.Module):
    """Mean and variance of each image, and a count of the different images that came by."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1), requires_grad=False)
        self.seen = 0

    def forward(self, images):
        self.seen += len(images.unique(dim=0))
        return self.scale * torch.stack([images.mean((1, 2, 3)), images.var((1, 2, 3))], 1)


@pytest.fixture
def counting():
    return Extractor("counting@8 bilinear", 2, 8, Counting())


def test_batches_order_channels_and_number_type_do_not_matter(lite0, tiny_images):
    images, labels = tiny_images
    whole = features(images, lite0)
    close = dict(atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(features(images, lite0, batch_size=3), whole, **close)
    np.testing.assert_allclose(features(images.repeat(1, 3, 1, 1), lite0), whole, **close)
    pixels = (images + 1).mul(127.5).round().to(torch.uint8)
    subjects = np.arange(8).astype(str)
    as_set = ImageSet(pixels.numpy(), labels.numpy(), subjects, tuple("abcd"), "tiny", "train", "", False, "phantom")
    expected = features(pixels.float() / 127.5 - 1, lite0)
    for form in (pixels, pixels.numpy(), as_set):
        np.testing.assert_array_equal(features(form, lite0), expected)


def test_a_copy_has_the_same_features_to_the_last_bit_in_any_set_and_place(lite0):
    images = 2 * torch.rand(21, 1, 28, 28, generator=torch.Generator().manual_seed(0)) - 1
    whole = features(images, lite0)
    np.testing.assert_array_equal(features(images.flip(0), lite0)[::-1], whole)
    np.testing.assert_array_equal(features(images[5:8], lite0), whole[5:8])


def test_copies_within_a_set_are_computed_once(counting, tiny_images):
    images, _ = tiny_images
    order = torch.tensor([2, 0, 1, 2, 2, 0])
    rows = features(images[order], counting)
    assert counting.network.seen == 3
    np.testing.assert_array_equal(rows, features(images[:3], counting)[order])


@settings(max_examples=25)
@given(
    pixels=st.tuples(*[st.integers(1, 9)] * 4).flatmap(lambda shape: arrays.arrays(np.uint8, shape)),
    batch_size=st.integers(1, 7),
    seed=st.integers(0, 99),
)
def test_any_shape_any_batch_any_order(pixels, batch_size, seed):
    extractor = random_conv(0, image_size=8, dim=8)
    rows = features(pixels, extractor, batch_size=batch_size)
    channels = pixels.shape[1]
    assert rows.shape == (len(pixels), 8 * (1 if channels in (1, 3) else channels))
    order = np.random.default_rng(seed).permutation(len(pixels))
    np.testing.assert_allclose(features(pixels[order], extractor), rows[order], atol=1e-5, rtol=1e-5)


def test_slices_stand_side_by_side_in_their_order(lite0):
    volumes = 2 * torch.rand(3, 9, 16, 20, generator=torch.Generator().manual_seed(1)) - 1
    rows = features(volumes, lite0)
    assert rows.shape == (3, 9 * 1280)
    slices = [features(volumes[:, i : i + 1], lite0) for i in range(9)]
    np.testing.assert_allclose(rows, np.concatenate(slices, 1), atol=1e-4, rtol=1e-4)
    stacked = lite0.for_channels(9)
    assert stacked.name == "efficientnet_lite0-imagenet@32 bilinear, 9 slices side by side"
    np.testing.assert_array_equal(features(volumes, stacked), rows)
    with pytest.raises(ValueError, match="has no classes"):
        logits(rows, stacked)
    with pytest.raises(ValueError, match="reads stacks of 9 slices; these images have 1"):
        features(volumes[:, :1], stacked)
    with pytest.raises(ValueError, match=r"take extractor.for_channels\(9\)"):
        lite0(volumes)


def test_a_memory_mapped_set_is_never_in_memory_as_a_whole(tmp_path):
    shape = (6000, 1, 64, 64)  # 24 MB, as floats 98 MB
    pixels = np.lib.format.open_memmap(tmp_path / "images.npy", mode="w+", dtype=np.uint8, shape=shape)
    pixels[:] = np.random.default_rng(0).integers(0, 256, (6000, 1, 1, 1))
    pixels.flush()
    tracemalloc.start()
    rows = features(np.load(tmp_path / "images.npy", mmap_mode="r"), random_conv(0, image_size=8, dim=8))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows.shape == (6000, 8)
    assert len(np.unique(rows, axis=0)) == 256  # so many grey levels, each computed once
    assert peak < 8e6


def test_shrinking_averages_instead_of_picking_pixels(counting):
    stripes = torch.tensor([-1.0, 1, 1, -1]).repeat(8).expand(1, 1, 32, 32)
    (brightness, contrast) = features(stripes, counting)[0]
    assert abs(brightness) < 0.05  # without antialiasing every second pixel pair is 1
    assert contrast < 0.05


def test_cache_spares_the_network_and_depends_on_pixels_shape_and_name(tmp_path, tiny_images, counting):
    images, _ = tiny_images
    first = features(images, counting, tmp_path)
    np.testing.assert_array_equal(features(images, counting, tmp_path), first)
    assert counting.network.seen == 8
    features(-images, counting, tmp_path)
    features(images, Extractor("another name", 2, 8, counting.network), tmp_path)
    features(images.flip(0), counting, tmp_path)
    features(images.view(4, 2, 28, 28), counting, tmp_path)
    assert counting.network.seen == 40
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".npy"] * 5  # nothing unfinished is left


def test_cached_features_of_another_size_or_batch_are_not_taken(tmp_path, tiny_images, counting):
    images, _ = tiny_images
    for extractor, batch_size in ((counting, 16), (replace(counting, image_size=6), 16), (counting, 3)):
        kept = features(images, extractor, tmp_path, batch_size)
        np.testing.assert_array_equal(kept, features(images, extractor, batch_size=batch_size))
    assert len(list(tmp_path.iterdir())) == 3


def test_the_cache_s_key_holds_what_shapes_the_features(counting):
    elsewhere = replace(counting, network=Counting().to("meta"))
    kinds = [counting, replace(counting, dim=4), replace(counting, slices=2), elsewhere]
    assert len({_content_hash(np.zeros(1), [b""], kind, 16) for kind in kinds}) == 4


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "other shape", "not finite"])
def test_damaged_cache_file_is_computed_again(tmp_path, tiny_images, counting, damage):
    images, _ = tiny_images
    expected = features(images, counting, tmp_path)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    if damage == "other shape":
        np.save(path, expected[:-1])
    elif damage == "not finite":
        np.save(path, expected * np.float32(np.nan))
    else:
        path.write_bytes({"truncated": content[:-7], "empty": b"", "text": b"no array"}[damage])
    with pytest.warns(UserWarning, match="damaged and are computed again"):
        np.testing.assert_array_equal(features(images, counting, tmp_path), expected)
    assert path.read_bytes() == content


def test_features_that_are_not_finite_are_refused_and_not_kept(tmp_path, tiny_images, counting):
    counting.network.scale.fill_(torch.inf)
    with pytest.raises(ValueError, match="counting@8 bilinear gives features that are not finite"):
        features(tiny_images[0], counting, tmp_path)
    assert not list(tmp_path.iterdir())


def test_no_classes_no_logits():
    with pytest.raises(ValueError, match="has no classes"):
        logits(np.zeros((2, 256), np.float32), random_conv(0))


@pytest.mark.parametrize(
    ("images", "sentence"),
    [
        (torch.zeros(2, 8, 8), "shape"),
        (255 * torch.ones(2, 1, 8, 8), "reach from"),
        (torch.full((1, 1, 8, 8), torch.nan), "reach from"),
    ],
)
def test_images_out_of_form_are_refused(images, sentence):
    with pytest.raises(ValueError, match=sentence):
        as_images(images)
    with pytest.raises(ValueError, match=sentence):
        features(images, random_conv(0))


@pytest.mark.parametrize("shape", [(0, 1, 8, 8), (2, 0, 8, 8), (2, 1, 0, 8)])
def test_an_empty_set_is_refused(shape):
    with pytest.raises(ValueError, match="at least one; these have"):
        features(np.zeros(shape, np.uint8), random_conv(0))
