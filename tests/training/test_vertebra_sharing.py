"""Tolerance and exclusion as stages, on points of a plane: a copier is found out, too much of either leaves holes."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lookalike.data import datasets
from lookalike.data.image_set import ImageSet
from lookalike.metrics.classifiers import Training
from lookalike.metrics.extractors import random_conv
from lookalike.metrics.neighbours import nearest
from lookalike.models import acgan
from lookalike.privacy.randomness import stream
from lookalike.training import vertebra_sharing
from lookalike.training.cells import load_samples
from lookalike.training.vertebra_sharing import (
    Bench,
    attack_rows,
    class_labels,
    exclusion,
    judge_sets,
    load_sets,
    make,
    measured_against,
    tolerance_curve,
)
from lookalike.training.vertebrae import load_networks, train_vertebrae

SIDE = 16
SCALE = 150 * 2 / 255  # 150 grey levels per unit of latent distance, in [-1, 1]
COUNTS = {"train": 150, "val": 90, "test": 60}
COMMON = {"data": "toy", "image_size": SIDE, "seed": 0, "feature_size": SIDE}
SHARES = (0, 0.6)
AXES = torch.tensor(np.linalg.qr(np.random.default_rng(0).standard_normal((SIDE * SIDE, 2)))[0].T, dtype=torch.float32)


def drawn(points, labels):
    """Images (N, 1, S, S) of points (N, 2) of a plane of pixels; the label makes them brighter."""
    return (SCALE * points @ AXES + 0.1 * (labels[:, None] - 1)).reshape(-1, 1, SIDE, SIDE)


def toy_set(name, split="train", image_size=None):
    """Normal points of a plane, three classes, ten exams of each class's images."""
    n, labels = COUNTS[split], torch.arange(COUNTS[split]) % 3
    images = drawn(places(n, split), labels)
    exams = np.array([f"{split}-{i % 10}" for i in range(n)])
    return ImageSet(
        datasets.to_uint8(images), labels.numpy(), exams, ("a", "b", "c"), name, split, licence="none",
        restricted=False, origin="phantom", subject_kind="exam",
    )  # fmt: skip


def places(n, split):
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(list(COUNTS).index(split)))


class Plane(nn.Module):
    """A generator of the toy's own distribution that has seen no image: its latents are the places in the plane."""

    num_classes, latent_dim = 3, 2

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, z, labels):
        return drawn(self.scale * z, labels)

    def noise(self, n, generator=None):
        return torch.randn(n, self.latent_dim, generator=generator)


class Copier(Plane):
    """The same, but every other image is a copy of the training image of that class whose place is nearest."""

    latent_dim = 3  # the third says whether to copy

    def forward(self, z, labels):
        known = places(COUNTS["train"], "train")
        apart = torch.cdist(z[:, :2], known)
        apart[labels[:, None] != torch.arange(len(known)) % 3] = torch.inf
        return drawn(torch.where(z[:, 2:] > 0, known[apart.argmin(1)], z[:, :2]), labels)


class OneImage(Plane):
    """Every latent gives the first training image, brighter or darker by its class."""

    def forward(self, z, labels):
        return drawn(0 * z + places(COUNTS["train"], "train")[0], labels)


TOYS = {"plane": Plane, "copier": Copier, "one image": OneImage}


@pytest.fixture(scope="module")
def small():
    """A toy, a network without weights, a short training: what is tested is what the stages do with them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load", toy_set)
        patch.setattr(vertebra_sharing, "efficientnet_lite0", lambda image_size, device: random_conv(0, dim=32))
        patch.setattr(vertebra_sharing, "HEAD", Training(epochs=60))
        patch.setattr(vertebra_sharing, "load_networks", lambda folder: (TOYS[folder](), None))
        yield


@pytest.fixture(scope="module")
def copied(small, tmp_path_factory):
    settings = COMMON | {"shares": SHARES, "released": 150, "pool": 600}
    return tolerance_curve(tmp_path_factory.mktemp("copied"), trained="copier", **settings)


@pytest.fixture(scope="module")
def holed(small, tmp_path_factory):
    settings = COMMON | {"shares": SHARES, "released": 150, "pool": 1200}
    return tolerance_curve(tmp_path_factory.mktemp("holed"), trained="plane", **settings)


@pytest.fixture(scope="module")
def excluded(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("excluded")
    return folder, exclusion(folder, trained="plane", released=150, projection_steps=150, directions=4, **COMMON)


def row_of(found, nearest_to, share):
    return next(row for row in found["rows"] if (row["nearest_to"], row["share"]) == (nearest_to, share))


def attack_of(row, name="nearest"):
    return next(attack for attack in row["attacks"] if attack["attack"] == name)


def test_the_curve_is_plain_json_with_releases_of_one_size(copied):
    json.dumps(copied, allow_nan=False)
    assert [(row["nearest_to"], row["share"]) for row in copied["rows"]] == [
        (to, share) for to in ("train", "all", "half") for share in SHARES
    ]
    assert {row["images"] for row in copied["rows"]} == {150}
    others = {row["nearest_to"]: attack_of(row)["others"] for row in copied["rows"]}
    assert others == {"train": 150, "all": 150, "half": 72}, "ten subjects of twenty"
    assert copied["pool"] == 600


def test_copies_are_found_and_tolerance_drops_them(copied):
    plain, strict = (row_of(copied, "train", share) for share in SHARES)
    assert plain["nearest"]["within_limit"] > 60 > strict["nearest"]["within_limit"]
    assert attack_of(plain)["reads"] == "members near"
    assert attack_of(strict)["high"] < attack_of(plain)["low"]
    assert strict["tolerance"] > plain["tolerance"] == 0
    assert strict["tolerance"] == pytest.approx(strict["nearest"]["min"])


def test_the_limit_is_what_one_held_out_image_in_twenty_falls_below(copied):
    real = copied["real"]
    assert real["nearest"]["within_limit"] == 8  # of 150; the quantile lies between the eighth and the ninth
    assert real["nearest"]["min"] < real["limit"] < real["nearest"]["median"]


def test_a_generator_that_knows_no_member_is_made_to_leak_by_tolerance(holed):
    attack = attack_of(row_of(holed, "train", 0.6))
    assert attack_of(row_of(holed, "train", 0))["reads"] == "nothing"
    assert attack["reads"] == "members far"
    assert attack["two_sided"] == pytest.approx(0.5 - attack["auc"])
    assert attack["members_at"] > attack["others_at"]


def test_dropping_near_any_real_image_hides_members_among_the_images_used_alone(holed):
    one, every, half = (attack_of(row_of(holed, to, 0.6)) for to in ("train", "all", "half"))
    assert every["reads"] == "nothing"
    assert every["two_sided"] < one["two_sided"]
    assert half["reads"] == "members far"  # against images that the owner did not use


def test_attacks_are_read_both_ways(small):
    train, held_out = load_sets("toy", SIDE)
    rows = {to: attack_rows(train, held_out, of.images) for to, of in {"near": train, "far": held_out}.items()}
    near, far = (attack_of({"attacks": of}) for of in rows.values())
    assert (near["reads"], far["reads"]) == ("members near", "members far")
    assert (near["auc"], far["auc"]) == (1, 0)
    assert (near["tpr"], near["tpr_turned"]) == (1, 0)
    assert (far["tpr"], far["tpr_turned"]) == (0, 1)
    assert near["members_at"] == far["others_at"] == 0
    assert near["two_sided"] == far["two_sided"] == 0.5


def test_members_and_the_pool_s_measure_are_what_they_say(small):
    train, held_out = load_sets("toy", SIDE)
    sets = measured_against(train, held_out, seed=0)
    assert [len(images) for images, _ in sets.values()] == [150, 300, 228]
    used, unused = sets["half"]
    assert not set(unused.subjects) & set(held_out.subjects[(nearest(held_out.images, used)[0] == 0)])
    assert {subject.split("-")[0] for subject in held_out.subjects} == {"val", "test"}


def test_made_images_have_the_asked_labels_in_the_training_set_s_proportions(small):
    labels = class_labels(torch.tensor([0, 0, 1, 2]), 9)
    assert labels.tolist() == [0, 0, 0, 0, 0, 1, 1, 2, 2]
    generator = acgan.Generator(SIDE, channels=1, width=4)
    latents = generator.noise(9, stream(0, "x"))
    made = make(generator, latents, labels)
    np.testing.assert_array_equal(made, datasets.to_uint8(generator(latents, labels)))


def test_utility_is_that_of_the_labels(small):
    train, held_out = load_sets("toy", SIDE)
    bench = Bench(train, held_out, random_conv(0, dim=32), seed=0)
    views = bench.backbone.views(train.images)
    right, wrong = bench.utility(views, train.labels), bench.utility(views, (train.labels + 1) % 3)
    assert right["value"] > 0.95
    assert wrong["value"] < 0.5
    assert right["n"] == 20  # exams, not images


def test_exclusion_is_plain_json_and_leaves_its_releases(excluded):
    folder, found = excluded
    json.dumps(found, allow_nan=False)
    assert [row["variant"] for row in found["rows"]] == ["none", "calibrated", "redraws 0.1", "redraws 0.5"]
    for row in found["rows"]:
        images, labels = load_samples(folder / row["variant"].replace(" ", "_"))
        assert images.shape == (150, 1, SIDE, SIDE)
        assert np.bincount(labels).tolist() == [50, 50, 50]
        distances = nearest(images, toy_set("toy").images)[0] / SIDE
        assert row["nearest"]["min"] == pytest.approx(distances.min())
        assert row["nearest"]["median"] == pytest.approx(np.median(distances))


def test_projection_finds_the_places_and_the_radius_is_the_limit_in_latents(excluded):
    folder, found = excluded
    stored = load_file(folder / "projection.safetensors")
    torch.testing.assert_close(stored["latents"], places(150, "train"), atol=0.02, rtol=0)
    assert found["projection"]["error"] < 0.005
    expected = found["calibration"]["limit"] * SIDE / 150
    assert found["calibration"]["reached"] == found["calibration"]["images"] == 150
    assert found["rows"][1]["radius"]["median"] == pytest.approx(expected, rel=0.2)  # grey levels are whole
    assert found["calibration"]["beyond"] == 0


def test_exclusion_redraws_what_it_says_and_keeps_its_distance(excluded):
    rows = {row["variant"]: row for row in excluded[1]["rows"]}
    assert rows["none"]["redrawn"] == 0 == rows["none"]["radius"]["largest"]
    assert rows["redraws 0.1"]["redrawn"] == pytest.approx(0.1, abs=0.07)
    assert rows["redraws 0.5"]["redrawn"] == pytest.approx(0.5, abs=0.12)
    assert rows["none"]["nearest"]["within_limit"] > 3
    assert rows["calibrated"]["nearest"]["within_limit"] <= 1  # at the edge, by rounding
    within = rows["redraws 0.5"]["radius"]["largest"] * 150 / SIDE
    assert rows["redraws 0.5"]["nearest"]["min"] == pytest.approx(within, rel=0.1)


def test_exclusion_that_bites_leaves_a_hole_as_well(excluded):
    rows = {row["variant"]: attack_of(row) for row in excluded[1]["rows"]}
    assert rows["none"]["reads"] == "nothing"
    assert rows["redraws 0.5"]["reads"] == "members far"


def test_a_trained_generator_goes_through_both_stages(small, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vertebra_sharing, "load_networks", load_networks)
        trained = tmp_path / "trained"
        trained.mkdir()
        settings = {"data": COMMON["data"], "image_size": SIDE, "width": 4, "epochs": 1, "seed": 0, "samples": 12}
        train_vertebrae(trained, **settings)
        settings = COMMON | {"trained": str(trained), "released": 30}
        curve = tolerance_curve(tmp_path, shares=[0.5], pool=90, **settings)
        found = exclusion(tmp_path, projection_steps=2, directions=1, redrawn=[0.5], **settings)
    assert [row["images"] for row in curve["rows"]] == [30, 30, 30]
    assert [row["images"] for row in found["rows"]] == [30, 30, 30]


def test_a_radius_that_leaves_nothing_is_said_in_its_row(small, tmp_path):
    settings = {"released": 30, "projection_steps": 2, "directions": 1, "redrawn": []} | COMMON
    found = exclusion(tmp_path, trained="one image", **settings)
    none, calibrated = found["rows"]
    calibration = found["calibration"]
    assert 0 < calibration["beyond"] == calibration["reached"] < 50
    assert calibration["chance"] == pytest.approx(calibration["reached"] / 150)
    radii = load_file(tmp_path / "projection.safetensors")["radii"].numpy()
    closed = np.unique(toy_set("toy").labels[radii > 0])  # classes of which no latent is left
    assert calibrated["redrawn"] == pytest.approx(len(closed) / 3)
    assert "next to nothing" in calibrated["note"]
    assert (calibrated["images"], calibrated["attacks"], calibrated["utility"]) == (0, [], None)
    assert (none["images"], none["note"]) == (30, "")


def test_sets_are_judged_side_by_side_at_one_size(small, tmp_path):
    """Copies of the members are found, images drawn anew are not; each keeps its own labels."""
    train, _ = load_sets("toy", SIDE)
    fresh = toy_set("toy", "train")
    anew = drawn(torch.randn(200, 2, generator=torch.Generator().manual_seed(9)), torch.arange(200) % 3)
    sets = {"copies": (fresh.images, fresh.labels), "fresh": (datasets.to_uint8(anew), np.arange(200) % 3)}
    for name, (images, labels) in sets.items():
        (tmp_path / name).mkdir()
        parts = {"images": torch.tensor(images), "labels": torch.tensor(labels)}
        save_file(parts, tmp_path / name / "samples.safetensors")
    found = judge_sets(tmp_path, sets={name: str(tmp_path / name) for name in sets}, **COMMON)
    copies, other = found["rows"]
    assert [row["images"] for row in found["rows"]] == [150, 150]
    assert next(a for a in copies["attacks"] if a["attack"] == "nearest")["low"] > 0.8
    assert next(a for a in other["attacks"] if a["attack"] == "nearest")["reads"] == "nothing"
    assert min(row["utility"]["value"] for row in found["rows"]) > 0.6
    assert len(train) == 150
