"""Measures of made images: every column from its own definition, anchors that order them, references as published."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lookalike.data import datasets
from lookalike.metrics import as_images, distances, perceptual, pixels, utility
from lookalike.metrics.features import efficientnet_lite0, features, random_conv
from lookalike.training import cells, measuring

MEASURE = {
    "seed": 0, "feature_size": 32, "pixel_size": 40, "pairs": 20, "classifier_epochs": 6, "classifier_width": 16,
    "published_utility": True,
}  # fmt: skip
DATA = {"data": "digits", "real_per_class": 12}


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits", "train")


@pytest.fixture(scope="module")
def whole_test():
    return datasets.load("digits", "test")


@pytest.fixture(scope="module")
def references(digits, whole_test):
    return measuring._references(digits, whole_test, DATA["real_per_class"])


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return MEASURE | {"published_utility": False, "cache": str(tmp_path_factory.mktemp("features"))}


@pytest.fixture(scope="module")
def anchors(digits, references, settings):
    made = {name: measuring.anchor_images(name, digits, 3, 12) for name in measuring.ANCHORS}
    return {name: measuring.measure(*images, *references, **settings) for name, images in made.items()}


@pytest.fixture(scope="module")
def held_out(digits):
    return measuring.anchor_images("held-out real images", digits, 3, 12)


def test_anchors_order_the_measures_that_work(anchors):
    for metric in ("frechet", "frechet_test", "kernel"):
        real, *worthless = (anchors[name][metric] for name in np.array(measuring.ANCHORS)[[0, 2, 3, 4, 5]])
        assert real < 0.5 * min(worthless)
    held_out, few, *worthless = (anchors[name] for name in measuring.ANCHORS)
    assert few["precision"] == 1.0  # they are in the reference
    assert few["psnr_nearest"] is None  # and so are their nearest real images: no error, infinite decibels
    assert few["ssim_nearest"] == pytest.approx(1)
    assert held_out["recall"] > few["recall"] > max(row["recall"] for row in worthless[1:]) == 0
    assert held_out["coverage"] > few["coverage"] > max(row["coverage"] for row in worthless[1:])
    for row in worthless[1:]:  # all images equal, so nothing can be learned from them
        assert held_out["accuracy"] > row["accuracy"] + 0.1
        assert row["is_lite0"] == pytest.approx(1)
        assert row["accuracy"] == row["majority"] == pytest.approx(0.1)


def test_published_pairs_prefer_blank_images_and_perceptual_ones_do_not(anchors):
    real, blank = anchors["held-out real images"], anchors["blank"]
    assert blank["ssim"] > real["ssim"]
    assert blank["psnr"] is None  # its range is 0
    assert real["lpips_st_class"] < real["lpips_st"]


def test_every_anchor_gives_the_same_plain_row(anchors):
    first = anchors["held-out real images"]
    for row in anchors.values():
        assert list(row) == list(first)
        assert all(value is None or type(value) in (float, int, str) for value in row.values())
        assert all(np.isfinite(value) for value in row.values() if isinstance(value, float))
        for low, value, high in (("accuracy_low", "accuracy", "accuracy_high"), ("whole_low", "whole", "whole_high")):
            assert 0 <= row[low] <= row[value] <= row[high] <= 1
    assert first["features"].startswith("efficientnet_lite0-imagenet@32")
    assert first["test_images"] == 120


def test_held_out_real_images_are_others(digits, held_out):
    images, labels = held_out
    assert labels.tolist() == np.repeat(range(10), 12).tolist()
    found = {image.tobytes(): label for image, label in zip(digits.images, digits.labels)}
    assert [found[image.tobytes()] for image in images] == labels.tolist()
    reference = {image.tobytes() for image in digits.first_per_class(12).images}
    assert not reference & {image.tobytes() for image in images}


def test_other_anchors_are_what_they_say(digits, held_out):
    made = {name: measuring.anchor_images(name, digits, 5, 12) for name in measuring.ANCHORS}
    for images, labels in made.values():
        assert images.shape == (120, 1, 28, 28)
        assert images.dtype == np.uint8
        assert labels.tolist() == held_out[1].tolist()
    few, labels = made["training images"]
    for label in range(10):
        distinct = np.unique(few[labels == label], axis=0)
        assert np.array_equal(distinct, np.unique(digits.images[digits.labels == label][:5], axis=0))
    assert (made["one image repeated"][0] == held_out[0][0]).all()
    expected = held_out[0].astype(float).mean(0)
    assert np.abs(made["dataset mean"][0] - expected).max() <= 0.51
    window = held_out[0][7, 0, 10:15, 12:17].astype(float).mean()
    assert abs(made["blurred real images"][0][7, 0, 12, 14] - window) <= 0.51
    assert (made["blank"][0] == 0).all()


def test_anchors_need_a_name_and_enough_images(digits):
    with pytest.raises(ValueError, match="anchor must be one of held-out real images, training images, blurred"):
        measuring.anchor_images("noise", digits, 3, 12)
    assert len(measuring.anchor_images("blurred real images", digits, 3, 200)[0]) == 2000
    with pytest.raises(ValueError, match="has 400 images of class 0, not 402"):
        measuring.anchor_images("blank", digits, 3, 201)


def test_references_are_the_first_of_train_and_test(digits, whole_test):
    real, test, whole = measuring._references(digits, whole_test, 200)
    assert np.array_equal(real.images, digits.first_per_class(200).images)
    assert len(test) == len(whole) == 1000  # the packaged digits have 100 test images a class
    real, test, whole = measuring._references(digits, whole_test, 7)
    assert [len(part) for part in (real, test, whole)] == [70, 70, 1000]
    assert test.split == whole.split == "test"
    assert np.bincount(test.labels).tolist() == [7] * 10


@pytest.fixture(scope="module")
def unbalanced(references):
    """A whole test split in which one class is half of all."""
    real, test, whole = references
    rows = np.concatenate([np.flatnonzero(whole.labels == c)[: 90 if c == 4 else 10] for c in range(10)])
    return real, test, whole.subset(rows)


@pytest.fixture(scope="module")
def row(held_out, unbalanced):
    return measuring.measure(*held_out, *unbalanced, **MEASURE)


def test_fidelity_columns_are_the_distances_of_lite0_features(row, held_out, references):
    extractor = efficientnet_lite0(32)
    made, real, test = (features(x, extractor) for x in (held_out[0], *references[:2]))
    assert row["frechet"] == pytest.approx(distances.frechet_distance(real, made))
    assert row["frechet_test"] == pytest.approx(distances.frechet_distance(test, made))
    assert row["frechet"] != pytest.approx(row["frechet_test"], rel=0.01)
    assert row["kernel"] == pytest.approx(1000 * distances.kernel_distance(real, made).value)
    shares = distances.precision_recall_density_coverage(real, made)
    assert {name: row[name] for name in shares} == pytest.approx(shares)
    probabilities = torch.as_tensor(extractor.head(torch.as_tensor(made))).double().softmax(1)
    order = np.random.default_rng(0).permutation(120)
    scores = []
    for part in np.split(probabilities.detach().numpy()[order], 10):
        scores.append(np.exp(np.mean([(p * np.log(p / part.mean(0))).sum() for p in part])))
    assert row["is_lite0"] == pytest.approx(np.mean(scores))


def test_pixel_columns_are_those_of_their_pairs(row, held_out, references):
    (images, labels), real = held_out, references[0]
    x, y = as_images(real), as_images(images)
    i, j = pixels.pair(x, y, "as_published", synthetic_labels=labels)
    assert (real.labels[i] != labels[j]).mean() > 0.8
    up = [torch.nn.functional.interpolate(z, (40, 40), mode="bilinear") for z in (x[i], y[j])]
    assert row["psnr"] == pytest.approx(pixels.psnr(*up, data_range=float(up[1].max()) + 1))
    assert row["ssim"] == pytest.approx(pixels.ssim(*up), abs=1e-6)
    errors = (x[None] - y[:, None]).square().flatten(2).mean(2).numpy()  # (made, real), of a range of 2
    assert row["psnr_nearest"] == pytest.approx(10 * np.log10(4 / errors.min(1).mean()), abs=1e-4)
    same = np.stack([line[real.labels == label] for line, label in zip(errors, labels)])
    low, high = (10 * np.log10(4 / bound.mean()) for bound in (same.max(1), same.min(1)))
    assert low < row["psnr_class"] < high
    assert row["ssim"] < row["ssim_nearest"]


def test_perceptual_pairs_are_some_of_the_same_from_every_class(row, held_out, references):
    (images, labels), real = held_out, references[0]
    random, same_class = measuring._some_pairs(images, labels, real, 20, seed=0)
    of_real = {image.tobytes(): label for image, label in zip(as_images(real).numpy(), real.labels)}
    of_made = {image.tobytes(): label for image, label in zip(as_images(images).numpy(), labels)}
    classes = [[of_real[x.numpy().tobytes()], of_made[y.numpy().tobytes()]] for x, y in zip(*same_class)]
    assert classes == [[c, c] for c in np.repeat(range(10), 2)]
    i, j = pixels.pair(real, images, "as_published", synthetic_labels=labels, seed=0)
    pairs = {(as_images(real)[a].numpy().tobytes(), as_images(images)[b].numpy().tobytes()) for a, b in zip(i, j)}
    assert all((x.numpy().tobytes(), y.numpy().tobytes()) in pairs for x, y in zip(*random))
    assert sorted(of_made[y.numpy().tobytes()] for y in random[1]) == np.repeat(range(10), 2).tolist()
    distance = perceptual.stlpips("alex")
    up = [torch.nn.functional.interpolate(z, (40, 40), mode="bilinear") for z in random]
    assert row["lpips_st"] == pytest.approx(float(distance(*up).mean()), rel=1e-5)
    assert len(measuring._some_pairs(images, labels, real, 999, seed=0)[0][0]) == 120  # no more than there are
    with pytest.raises(ValueError, match="pairs must be at least 1, not 0"):
        measuring._some_pairs(images, labels, real, 0, seed=0)


def test_perceptual_side_is_at_most_64(monkeypatch):
    seen = []

    class Distance:
        def between(self, real, synthetic):
            seen.append((tuple(real.shape), tuple(synthetic.shape)))
            return np.array([1.0, 3.0])

    pair = (torch.zeros(2, 1, 28, 28), torch.zeros(2, 1, 28, 28))
    assert measuring._apart(Distance(), pair, 64) == 2
    assert seen == [((2, 1, 64, 64), (2, 1, 64, 64))]


def test_one_classifier_is_tested_twice_and_the_published_one_apart(row, held_out, unbalanced):
    """Against two separate trainings of `utility.utility`, from the same seed."""
    _, test, whole = unbalanced
    settings = {"num_classes": 10, "epochs": 6, "width": 16}
    first = utility.utility(*held_out, test.images, test.labels, **settings)
    second = utility.utility(*held_out, whole.images, whole.labels, **settings)
    published = utility.utility(*held_out, test.images, test.labels, standardise="test_statistics", **settings)
    names = ("accuracy", "low", "high", "balanced_accuracy")
    found = [row[name] for name in ("accuracy", "accuracy_low", "accuracy_high", "balanced")]
    assert found == [first[name] for name in names]
    assert [row[name] for name in ("whole", "whole_low", "whole_high", "whole_balanced")] == [second[n] for n in names]
    assert row["accuracy_published"] == published["accuracy"]
    blank = np.zeros_like(held_out[0])  # a deviation of 0 cannot be scaled
    assert np.isnan(measuring._published_accuracy(blank, held_out[1], test, measuring.SmallNetwork(16), 0))
    assert row["balanced"] == pytest.approx(row["accuracy"])  # as many test images of each class
    assert row["whole"] != pytest.approx(row["whole_balanced"], abs=0.005)


def test_the_published_training_is_left_out_unless_wanted(held_out, references, row, monkeypatch):
    monkeypatch.setattr(utility, "utility", lambda *a, **k: pytest.fail("a second training"))
    found = measuring.measure(*held_out, *references, **MEASURE | {"published_utility": False, "pairs": 1})
    assert set(row) - set(found) == {"accuracy_published"}


def test_majority_is_that_of_the_made_labels(held_out, references):
    images, _ = held_out
    network = measuring.SmallNetwork(8, measuring.Training(epochs=0))
    _, test, whole = references
    fewer = test.subset(np.flatnonzero(test.labels < 5))
    for label, expected in ((3, 0.2), (7, 0.0)):
        found = measuring._utility_measures(images, np.full(120, label), fewer, whole, network, 0)
        assert found["majority"] == pytest.approx(expected)


def test_own_weights_add_the_papers_names(held_out, references, monkeypatch):
    """A network of random weights stands in for Inception, and one for LPIPS."""
    images, labels = (part[::3] for part in held_out)
    real = references[0]
    network = replace(random_conv(0), head=lambda rows: 9 * rows[:, :12])
    monkeypatch.setattr(measuring, "inception", lambda path, device: {"i.pth": network}[path])
    stand_in = perceptual.stlpips("alex")
    monkeypatch.setattr(perceptual, "lpips", lambda *files: {("a.pth", "h.pth", "alex", "cpu"): stand_in}[files])
    paths = {"inception_weights": "i.pth", "alexnet_weights": "a.pth", "lpips_weights": "h.pth"}
    settings = MEASURE | {"classifier_epochs": 0, "pairs": 4, "published_utility": False}
    found = measuring.measure(images, labels, *references, **settings, **paths)
    up = [torch.nn.functional.interpolate(as_images(z), (299, 299), mode="bilinear") for z in (real, images)]
    rows = [features(datasets.to_uint8(z), network) for z in up]
    assert found["fid"] == pytest.approx(distances.frechet_distance(*rows))
    assert found["is"] == pytest.approx(distances.class_score(9 * rows[1][:, :12]).value)
    assert found["lpips"] == pytest.approx(found["lpips_st"])  # the same network, pairs and (below 64) side
    for name in ("alexnet_weights", "lpips_weights"):
        with pytest.raises(ValueError, match="give both alexnet_weights and lpips_weights, or neither"):
            measuring.measure(images, labels, *references, **settings, **{name: paths[name]})


def test_labels_must_fit_the_images(held_out, references):
    images, labels = held_out
    for wrong in (labels[:-1], labels + 1):
        with pytest.raises(ValueError, match="one label each, from 0 to 9"):
            measuring.measure(images, wrong, *references, **MEASURE)


def test_a_cell_is_measured_as_its_samples_are(tmp_path, references):
    settings = {
        "data": "digits", "family": "vae", "sigma": 0.0, "seed": 0, "role": "full", "width": 8, "epochs": 1,
        "images_per_class": 2, "query_class": 3, "samples_per_class": 3, "batch_size": 10,
    }  # fmt: skip
    cells.train_cell(tmp_path, **settings)
    few = MEASURE | {"classifier_epochs": 1, "pairs": 5}
    found = measuring.measure_cell(None, trained=str(tmp_path), **DATA, **few)
    assert found == measuring.measure(*cells.load_samples(tmp_path), *references, **few)


def test_an_anchor_is_measured_as_its_images_are(anchors, settings):
    found = measuring.measure_anchor(None, anchor="training images", images_per_class=3, **DATA, **settings)
    assert found == anchors["training images"]
