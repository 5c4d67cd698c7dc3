"""Pass-through: a generator that copies, one that ignores its input, mixtures, and numbers against slow twins."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from torch import nn
from torchmetrics.functional.image import structural_similarity_index_measure

from lookalike.data import ImageSet, datasets
from lookalike.metrics.intervals import clopper_pearson
from lookalike.training import medsynth, pass_through
from lookalike.training.pass_through import Passed, compare, load_examples, releases_inputs, trained_rows

SIDE, CLASSES = 8, ("a", "b", "c")
SETTINGS = {"source": "real", "data": "toy", "split": "train", "rows": None, "other": None, "image_size": SIDE}


def image_set(n, seed=0, split="train", per_subject=1, name="toy"):
    images = np.random.default_rng(seed).integers(0, 256, (n, 1, SIDE, SIDE)).astype(np.uint8)
    subjects = np.array([f"{split}{seed}-{i // per_subject}" for i in range(n)])
    kind = "image" if per_subject == 1 else "patient"
    labels = np.arange(n) // per_subject % len(CLASSES)
    return ImageSet(images, labels, subjects, CLASSES, name, split, "CC0", False, "phantom", subject_kind=kind)


def load(name, split="train", image_size=None):
    assert image_size == SIDE
    sizes = {"train": (90, 0), "test": (45, 1)} if name == "toy" else {"train": (30, 2)}
    return image_set(*sizes[split], split, name=name)


class Blend(nn.Module):
    """s = a x + (1 - a) g: a the same everywhere, g one picture for each label."""

    num_classes = len(CLASSES)

    def __init__(self, mask):
        super().__init__()
        self.mask = mask
        pictures = torch.rand(len(CLASSES), 1, SIDE, SIDE, generator=torch.Generator().manual_seed(9))
        self.pictures = nn.Parameter(2 * pictures - 1)

    @staticmethod
    def noise(n, generator=None):
        return (torch.randn(n, 1, SIDE, SIDE, generator=generator) / 2).clamp(-1, 1)

    def forward(self, x, labels):
        a, g = torch.full_like(x[:, :1], self.mask), self.pictures[labels]
        return a * x + (1 - a) * g, a, g


def made_of(pool, chosen, mask):
    sources = pool.subset(chosen)
    return pass_through.pass_on(Blend(mask), "real", sources, None)


@pytest.fixture
def stage(monkeypatch, tmp_path):
    """Runs the stage on a generator; every set is a toy of noise."""

    def run(mask=1.0, settings=SETTINGS, **changed):
        monkeypatch.setattr(datasets, "load", load)
        monkeypatch.setattr(medsynth, "load_networks", lambda folder: (Blend(mask), None))
        monkeypatch.setattr(medsynth, "load_settings", lambda folder: settings)
        asked = {"trained": "somewhere", "data": "toy", "image_size": SIDE, "images": 40, "seed": 0}
        return pass_through.pass_through(tmp_path, **asked | changed)

    return run


# --- one comparison -----------------------------------------------------------------------------------------


def test_a_mask_of_one_returns_every_patient():
    pool = image_set(60)
    row = compare(pool, np.arange(0, 60, 2), made_of(pool, np.arange(0, 60, 2), 1.0))
    assert (row["mask"]["value"], row["distance"]["value"], row["own"]["value"]) == (1, 0, 1)
    assert row["similarity"]["value"] == pytest.approx(1, abs=1e-6)
    assert (row["nearest"]["value"], row["closer"]["value"], row["shuffled"]["value"]) == (0, 1, 0)
    assert row["image_distance"]["value"] > 0.5  # g alone is another picture
    assert releases_inputs(row)[0]


def test_a_generator_that_reads_only_the_label_is_not_called():
    pool, chosen = image_set(60), np.arange(60)
    row = compare(pool, chosen, made_of(pool, chosen, 0.0))
    assert row["distance"]["value"] == pytest.approx(row["image_distance"]["value"])
    assert row["own"]["value"] == pytest.approx(row["shuffled"]["value"])
    assert 0 < row["own"]["value"] <= row["chance"] == pytest.approx(1 / 20)  # less where g is nearest to another class
    assert not releases_inputs(row)[0]


def test_numbers_are_those_of_a_slow_search():
    pool, chosen = image_set(40), np.sort(np.random.default_rng(3).permutation(40)[:25])
    made = made_of(pool, chosen, 0.3)
    row = compare(pool, chosen, made)
    pixels, s = (part.reshape(len(part), -1) / 127.5 - 1 for part in (pool.images, made.synthetic))
    every = cdist(s, pixels) / np.sqrt(SIDE * SIDE)
    own = every[np.arange(25), chosen]
    real = cdist(pixels[chosen], pixels) / np.sqrt(SIDE * SIDE)
    real[np.arange(25), chosen] = np.inf
    assert row["distance"]["value"] == pytest.approx(own.mean())
    assert row["nearest"]["value"] == pytest.approx(every.min(1).mean())
    assert row["real_nearest"]["value"] == pytest.approx(real.min(1).mean())
    assert row["own"]["value"] == (every.argmin(1) == chosen).mean()
    assert 0 < row["own"]["value"] < 1
    assert row["closer"]["value"] == (own < real.min(1)).mean()
    assert (row["own"]["low"], row["own"]["high"]) == clopper_pearson(int((every.argmin(1) == chosen).sum()), 25)
    assert row["mask"]["value"] == pytest.approx(0.3)


def test_similarity_is_that_of_torchmetrics():
    first, second = image_set(5).images, image_set(5, seed=4).images
    ours = pass_through._similarities(first, second)
    pairs = [torch.tensor(part, dtype=torch.float32) / 255 for part in (first, second)]
    for i in range(5):
        theirs = structural_similarity_index_measure(pairs[0][i : i + 1], pairs[1][i : i + 1], data_range=1.0)
        assert ours[i] == pytest.approx(float(theirs), abs=1e-4)


def test_a_source_that_is_there_twice_is_still_ones_own():
    pool = image_set(30)
    pool = dataclasses.replace(pool, images=np.concatenate([pool.images[:15]] * 2))
    chosen = np.arange(15, 30)
    row = compare(pool, chosen, made_of(pool, chosen, 1.0))
    assert row["own"]["value"] == 1
    assert (row["real_nearest"]["value"], row["closer"]["value"]) == (0, 0)  # nothing is nearer than an exact copy


def test_images_of_one_person_count_as_one():
    pool = image_set(60, per_subject=6)
    row = compare(pool, np.arange(60), made_of(pool, np.arange(60), 1.0))
    assert row["own"]["n"] == row["subjects"] == 10
    assert row["own"]["low"] == clopper_pearson(10, 10)[0] < clopper_pearson(60, 60)[0]


def test_the_verdict_rarely_calls_a_generator_that_ignores_its_input():
    """Its output is another real image of the label: 2.5 % of 200 draws are expected, ten called at most."""
    pool, called = image_set(60), 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        chosen = rng.permutation(60)[:40]
        alike = [rng.choice(np.flatnonzero(pool.labels == label)) for label in pool.labels[chosen]]
        hits = np.array(alike) == chosen
        own = pass_through._share(hits, None)
        row = {"own": own, "chance": 1 / 20, "shuffled": own | {"value": 0.0}, "closer": own, "images": 40, "pool": 60}
        called += releases_inputs(row)[0]
    assert called <= 10


def test_the_verdict_finds_a_tenth_of_planted_copies():
    pool, chosen = image_set(90), np.arange(90)
    blind, copied = made_of(pool, chosen, 0.0), made_of(pool, chosen, 1.0)
    tenth = np.arange(90) % 6 == 0
    mixed = Passed(
        *(np.where(tenth[:, None, None, None], b, a) for a, b in zip(vars(blind).values(), vars(copied).values()))
    )
    found, sentence = releases_inputs(compare(pool, chosen, mixed))
    assert found
    assert "of 90 synthetic images" in sentence
    assert not releases_inputs(compare(pool, chosen, blind))[0]


def test_shuffled_partners_are_others_of_the_class():
    labels = np.array([0, 0, 0, 1, 1, 2])
    partner = pass_through._change_places(labels, np.random.default_rng(0))
    assert partner[5] == -1
    assert (labels[partner[:5]] == labels[:5]).all()
    assert (partner[:5] != np.arange(5)).all()
    assert sorted(partner[:5]) == [0, 1, 2, 3, 4]


# --- the stage ----------------------------------------------------------------------------------------------


def test_a_copying_generator_passes_on_anybodys_image_and_noise(stage):
    found = stage(mask=1.0, other={"data": "site"})
    rows = {(row["input"], row["split"], row["data"]): row for row in found["rows"]}
    assert list(rows) == [
        ("real", "train", "toy"),
        ("real", "test", "toy"),
        ("noise", "train", "toy"),
        ("other", "train", "site"),
    ]
    verdicts = {key: releases_inputs(row)[0] for key, row in rows.items()}
    assert list(verdicts.values()) == [True, True, False, True]
    assert [row["given"] for row in rows.values()] == [True, True, False, True]
    assert [row["pool"] for row in rows.values()] == [90, 45, 90, 30]
    assert rows["other", "train", "site"]["images"] == 30  # no more are there
    assert rows["noise", "train", "toy"]["mask"]["value"] == 1
    assert found["trained_with"] == "real"
    json.dumps(found, allow_nan=False)


def test_without_its_mask_nothing_is_passed_on(stage):
    assert [releases_inputs(row)[0] for row in stage(mask=0.0)["rows"]] == [False] * 3


def test_examples_are_the_outputs_of_their_sources(stage, tmp_path):
    stage(mask=0.5)
    found = load_examples(tmp_path)
    assert set(found) == {"real/train", "real/test", "noise/train"}
    shown = found["real/test"]
    assert shown["source"].shape == (8, 1, SIDE, SIDE)
    np.testing.assert_array_equal(shown["source"], shown["given"])
    assert (found["noise/train"]["source"] != found["noise/train"]["given"]).any()
    mean = (shown["given"].astype(float) + shown["image"]) / 2
    np.testing.assert_allclose(shown["synthetic"], mean, atol=1)
    np.testing.assert_allclose(shown["mask"], 0.5)


def test_the_same_seed_gives_the_same_rows_and_another_other_ones(stage):
    first, again, other = (stage(mask=0.4, seed=seed)["rows"] for seed in (0, 0, 1))
    assert first == again
    assert first[0]["distance"] != other[0]["distance"]


def test_only_images_of_the_training_are_asked_about(stage):
    settings = SETTINGS | {"rows": [3, 4, 5, 9]}
    rows = stage(mask=1.0, settings=settings)["rows"]
    assert [row["images"] for row in rows] == [4, 40, 4]
    assert trained_rows(settings, "toy", "train", 90).tolist() == [3, 4, 5, 9]
    assert len(trained_rows(settings, "toy", "test", 45)) == 45
    assert len(trained_rows(SETTINGS, "toy", "train", 90)) == 90


def test_the_trainings_other_site_is_asked_by_itself(stage):
    rows = stage(mask=1.0, settings=SETTINGS | {"other": {"data": "site", "split": "train", "rows": None}})["rows"]
    assert [row["input"] for row in rows] == ["real", "real", "noise", "other"]


def test_with_the_real_networks(monkeypatch, tmp_path):
    """An untrained generator of the paper's kind, through the files that training leaves."""
    monkeypatch.setattr(datasets, "load", load)
    trained = tmp_path / "trained"
    trained.mkdir()
    medsynth.train_phase_one(
        trained, data="toy", image_size=SIDE, source="real", epochs=1, seed=0, conv_dim=4, blocks=1, critic_width=4,
        batch_size=45, n_critic=1,
    )  # fmt: skip
    rows = pass_through.pass_through(tmp_path, trained=trained, data="toy", image_size=SIDE, images=20, seed=0)["rows"]
    assert [row["images"] for row in rows] == [20, 20, 20]
    assert 0.2 < rows[0]["mask"]["value"] < 0.8
    json.dumps(rows, allow_nan=False)


# --- refusals -----------------------------------------------------------------------------------------------


def test_bad_input_is_refused_in_a_sentence(stage):
    with pytest.raises(ValueError, match="two images or more"):
        stage(images=1)
    with pytest.raises(ValueError, match="choose more images"):
        pass_through._change_places(np.arange(3), np.random.default_rng(0))
    with pytest.raises(ValueError, match="diverged"):
        stage(mask=float("nan"))
