"""The attacks as published: who is a candidate, what the table says of a set that copies and of one that does not."""

import itertools

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lookalike.data import datasets
from lookalike.privacy.reidentification import ORIGINS, distance_attacks
from lookalike.training import vertebra_attacks as attacks

DATA, ELSEWHERE, SIDE = "phantom_spines", "phantom_spines_elsewhere", 8


@pytest.fixture(scope="module")
def sets():
    return attacks.load_origins(DATA, ELSEWHERE, SIDE)


@pytest.fixture(scope="module")
def released(sets, tmp_path_factory):
    """A hundred training units with a little noise: a copier."""
    folder = tmp_path_factory.mktemp("released")
    train = sets["train"]
    noise = np.random.default_rng(0).normal(0, 2, (120, *train.images.shape[1:]))
    images = (train.images[::8] + noise).clip(0, 255).astype(np.uint8)
    save_file(
        {"images": torch.tensor(images), "labels": torch.tensor(train.labels[::8])}, folder / "samples.safetensors"
    )
    return folder


@pytest.fixture(scope="module")
def result(released, tmp_path_factory):
    folder = tmp_path_factory.mktemp("attacked")
    return folder, attacks.attack_as_published(
        folder, data=DATA, elsewhere=ELSEWHERE, synthetic=str(released), image_size=SIDE
    )


def test_candidates_come_in_thirds_and_none_makes_the_embedding(sets):
    candidates, others = attacks.choose(sets)
    assert {origin: len(part) for origin, part in candidates.items()} == {"train": 334, "val": 333, "test": 333}
    for origin in ORIGINS:
        keys = [{image.tobytes() for image in part[origin].images} for part in (candidates, others)]
        assert not keys[0] & keys[1]
    few = {origin: part.subset(np.arange(40 + 10 * i)) for i, (origin, part) in enumerate(sets.items())}
    assert [len(part) for part in attacks.choose(few)[0].values()] == [40, 40, 40]
    assert [len(part) for part in attacks.choose(few)[1].values()] == [0, 10, 20]


def test_with_fewer_units_the_cut_offs_are_the_same_shares():
    assert attacks.cut_offs(1000) == {"50": 50, "333": 333}
    assert attacks.cut_offs(240) == {"50": 12, "333": 80}
    assert attacks.cut_offs(10) == {"50": 1, "333": 3}


def test_held_out_units_are_of_the_same_source_and_nobody_is_on_two_sides(sets):
    people = [set(sets[origin].subjects) for origin in ORIGINS]
    assert not any(first & second for first, second in itertools.combinations(people, 2))
    assert len(sets["val"]) == len(datasets.load(DATA, "val", SIDE)) + len(datasets.load(DATA, "test", SIDE))


def test_a_copier_is_found_in_both_spaces_and_the_table_says_so(result):
    _, found = result
    area = {(row["space"], row["attack"], row["of"], row["against"]): row for row in found["areas"]}
    assert area["l2", "nearest", "train", "val"]["low"] > 0.5
    assert area["l2", "pairwise", "train", "val"]["low"] > 0.5
    top = next(r for r in found["table"] if (r["space"], r["attack"], r["cut_off"]) == ("l2", "nearest", "50"))
    assert top["train"] > 0.9
    assert top["p_value"] < 0.001
    assert top["train"] + top["val"] + top["test"] == pytest.approx(1)


def test_scores_are_those_of_the_attacks_in_pixels(result, sets, released):
    folder, found = result
    scores, origins, whose = attacks.load_scores(folder)
    candidates, _ = attacks.choose(sets)
    images = attacks.load_made(released, SIDE, sets["train"]).images
    expected = distance_attacks(np.concatenate([candidates[o].images for o in ORIGINS]), images)
    np.testing.assert_array_equal(scores["l2/nearest"], expected.nearest)
    assert [int((origins == o).sum()) for o in ORIGINS] == list(found["candidates"].values())
    assert len(whose) == len(origins)
    assert set(scores) == {f"{space}/{attack}" for space in attacks.SPACES for attack in attacks.ATTACKS}
