"""LOGAN on MedSynth: the rule, and toys where the answer is known: nothing, a planted leak, and real against made."""

import itertools
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.metrics import roc_auc_score
from torch import nn

from lookalike.data import ImageSet, datasets
from lookalike.privacy import attack, membership
from lookalike.training import medsynth, medsynth_attacks, vertebra_trials
from lookalike.training.medsynth_attacks import PAIRS, attack_shadows, judge, logan_both_ways, logan_rule, rule_interval

SIDE, CLASSES = 8, ("a", "b")
SETTINGS = {"source": "real", "data": "toy", "split": "train", "rows": None, "other": None}
TRAIN, TEST = 200, 120


def image_set(n, seed, split="train", per_subject=1):
    images = np.random.default_rng(seed).integers(0, 128, (n, 1, SIDE, SIDE)).astype(np.uint8)
    subjects = np.array([f"{split}-{i // per_subject}" for i in range(n)])
    kind = "image" if per_subject == 1 else "patient"
    return ImageSet(
        images, np.arange(n) % 2, subjects, CLASSES, "toy", split, "CC0", False, "phantom", subject_kind=kind
    )


def load(name, split="train", image_size=None):
    return image_set(TRAIN, 0) if split == "train" else image_set(TEST, 1, split)


class Critic(nn.Module):
    """A real image is darker than a made one; images it `knows` get `bonus` more."""

    def __init__(self, known=None, bonus=0.0, training=None):
        super().__init__()
        self.dummy = nn.Parameter(torch.zeros(1))
        self.known, self.bonus, self.number = known, bonus, training

    def forward(self, images, labels=None):
        scores = -torch.sign(images.amax((1, 2, 3)) - 0.1) + 0.1 * images[:, 0, 0, 0]  # noise within a kind
        if self.known is not None:
            scores = scores + self.bonus * (torch.cdist(images.flatten(1), self.known) < 1e-3).any(1)
        if self.number is not None:  # two trainings never score an image alike
            scores = scores + 0.01 * torch.cos(100 * (1 + self.number) * images.sum((1, 2, 3)))
        return scores, torch.zeros(len(images), 2)


def release(folder, images, sources=None):
    folder.mkdir(exist_ok=True)
    rows = torch.full((len(images),), -1) if sources is None else torch.tensor(sources)
    labels = torch.arange(len(images)) % 2
    save_file(
        {"images": torch.tensor(images), "labels": labels, "source_rows": rows.long()}, folder / "samples.safetensors"
    )
    return folder


def bright(n, seed=5):
    return np.random.default_rng(seed).integers(128, 256, (n, 1, SIDE, SIDE)).astype(np.uint8)


@pytest.fixture
def stage(monkeypatch, tmp_path):
    """The stage's rows by (attack, members, non_members), of toys of noise; the made images are brighter."""

    def run(critic=None, made=None, sources=None, settings=SETTINGS, **changed):
        monkeypatch.setattr(datasets, "load", load)
        monkeypatch.setattr(medsynth, "load_networks", lambda folder: (None, critic or Critic()))
        monkeypatch.setattr(medsynth, "load_settings", lambda folder: settings)
        released = release(tmp_path / "made", bright(80) if made is None else made, sources)
        asked = {"trained": "t", "released": released, "data": "toy", "image_size": SIDE, "seed": 0, "share": 0.2}
        found = logan_both_ways(tmp_path, **{"local_steps": 2, "local_width": 4} | asked | changed)
        return {(row["attack"], row["members"], row["non_members"]): row for row in found["rows"]}

    return run


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(medsynth_attacks, "RESAMPLES", 150)
    monkeypatch.setattr(attack, "RESAMPLES", 50)


# --- the rule -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [1000, 5, 2, 1])
def test_random_scores_get_the_baseline_whatever_their_ties(values):
    rng = np.random.default_rng(values)
    members = np.arange(60) < 20
    found = [logan_rule(rng.integers(0, values, 60), members) for _ in range(2000)]
    error = 3 * found[0].spread / np.sqrt(2000)
    assert found[0].baseline == pytest.approx(1 / 3)
    assert np.mean([f.accuracy for f in found]) == pytest.approx(1 / 3, abs=max(error, 1e-9))


def test_perfect_scores_get_one_and_reversed_ones_the_least_there_is():
    members = np.arange(30) < 10
    assert logan_rule(members.astype(float), members).accuracy == 1
    assert logan_rule(-members.astype(float), members).accuracy == 0
    many = np.arange(30) < 20  # of 20 seats ten must go to members
    assert logan_rule(-many.astype(float), many).accuracy == pytest.approx(0.5)


def test_ties_count_as_the_mean_over_all_orders():
    scores, members = np.array([2.0, 1, 1, 1, 0]), np.array([True, True, False, False, True])
    hits = []
    for order in itertools.permutations(range(5)):
        ranked = sorted(order, key=lambda i: -scores[i])  # stable: the order breaks the ties
        hits.append(members[ranked[:3]].mean())
    assert logan_rule(scores, members).accuracy == pytest.approx(np.mean(hits))


def test_breaking_ties_by_the_labels_name_would_find_members_in_constant_scores():
    """LOGAN's own code sorts pairs of score and label: "train" comes after "test", so first from the top."""
    members = np.arange(40) < 10
    names = np.where(members, "train", "test")
    by_name = sorted(zip(np.zeros(40), names, members), reverse=True)[:10]
    assert np.mean([member for *_, member in by_name]) == 1
    assert logan_rule(np.zeros(40), members).accuracy == pytest.approx(0.25)


def test_the_intervals_cover_and_the_side_is_rarely_wrong():
    rng, sides, covered = np.random.default_rng(0), [], 0
    truth = np.mean(
        [logan_rule(rng.normal(np.r_[np.ones(40), np.zeros(40)]), np.arange(80) < 40).accuracy for _ in range(500)]
    )
    for _ in range(70):
        low, high = rule_interval(rng.normal(1, 1, 40), rng.normal(0, 1, 40))
        covered += low <= truth <= high
        low, high = rule_interval(rng.normal(size=40), rng.normal(size=40))
        sides.append(not low <= 0.5 <= high)
    assert covered >= 60
    assert sum(sides) <= 9


def test_one_persons_images_widen_the_interval():
    rng = np.random.default_rng(0)
    owners = np.repeat(np.arange(10), 8)
    members, others = (rng.normal(shift, 1, 10)[owners] for shift in (0.5, 0.0))
    low, high = rule_interval(members, others)
    wide = rule_interval(members, others, owners, owners + 100)
    assert wide[1] - wide[0] > 1.5 * (high - low)


# --- what is said of scores ---------------------------------------------------------------------------------


def test_numbers_are_scikit_learns_and_both_directions_are_told():
    rng = np.random.default_rng(0)
    members, others = rng.normal(-1, 1, 150), rng.normal(0, 1, 150)
    row = judge(members, others)
    expected = roc_auc_score(np.repeat([1, 0], 150), np.r_[members, others])
    assert row["auc"] == pytest.approx(expected)
    assert row["auc_either_way"] == pytest.approx(1 - expected)
    assert (row["side"], row["resolved"]) == ("below", True)  # "safe" by the paper's reading
    assert row["accuracy_high"] < row["baseline"] == 0.5
    turned = judge(-members, -others)
    assert turned["side"] == "above"
    assert row["tpr_1_turned"] == turned["tpr_1"] > row["tpr_1"]
    json.dumps(row, allow_nan=False)


def test_scores_that_say_nothing_are_at_the_baseline():
    rng = np.random.default_rng(4)
    row = judge(rng.normal(size=150), rng.normal(size=150))
    assert row["side"] == "at"
    assert row["low"] < 0.5 < row["high"]


# --- the stage ----------------------------------------------------------------------------------------------


def test_synthetic_non_members_show_real_against_made_where_nobody_is_a_member(stage):
    """The critic knows no image; the published attack is right every time, with anybody's images."""
    rows = stage()
    for members in ("train", "held_out"):
        row = rows["white_box", members, "synthetic"]
        assert (row["accuracy"], row["auc"], row["side"]) == (1, 1, "above")
    for pair in (("train", "held_out"), ("held_out", "also_held_out")):
        assert rows["white_box", *pair]["low"] < 0.5 < rows["white_box", *pair]["high"]


def test_the_black_box_is_below_random_with_synthetic_non_members_by_design(stage):
    """A local GAN that took released images for real ranks their like first: "safe", whoever was a member."""
    rows = stage(local_steps=60, local_width=8)
    for members in ("train", "held_out"):
        row = rows["black_box", members, "synthetic"]
        assert (row["side"], row["auc_either_way"]) == ("below", pytest.approx(1, abs=0.05))


def test_a_critic_that_knows_its_images_is_found_by_held_out_ones(stage):
    known = datasets.as_tensor(load("toy")).flatten(1)
    rows = stage(Critic(known, bonus=0.2))
    row = rows["white_box", "train", "held_out"]
    assert row["low"] > 0.5
    assert row["side"] == "above"
    assert rows["white_box", "held_out", "also_held_out"]["low"] < 0.5


def test_released_copies_are_found_by_the_nearest_image(stage):
    sources = np.arange(0, 160, 2)
    rows = stage(made=load("toy").images[sources], sources=sources, share=1.0)
    assert rows["nearest", "inputs", "held_out"]["auc"] == 1
    assert rows["nearest", "train", "held_out"]["auc"] == pytest.approx(0.7, abs=0.05)  # 80 of 200, the rest by chance
    assert not any("synthetic" in key for key in rows if key[0] == "nearest")


def test_every_pair_is_there_and_its_sides_are_of_the_same_size(stage):
    rows = stage(sources=np.arange(80))
    assert {key[1:] for key in rows if key[0] == "white_box"} == set(PAIRS)
    assert {(row["n"], row["m"]) for row in rows.values()} == {(40, 40)}
    assert all(row["baseline"] == 0.5 for row in rows.values())
    assert ("white_box", "inputs", "held_out") not in stage()  # made from noise
    json.dumps(list(rows.values()), allow_nan=False)


def test_members_are_images_of_the_training(stage, monkeypatch):
    """Networks trained on half of the split: the members come from that half."""
    seen = []
    real = membership.logan_white_box
    monkeypatch.setattr(membership, "logan_white_box", lambda *asked: seen.append(asked[0]) or real(*asked))
    rows = list(range(0, TRAIN, 2))
    stage(settings=SETTINGS | {"rows": rows}, share=0.5)
    allowed = {image.tobytes() for image in load("toy").images[rows]}
    assert {image.tobytes() for image in seen[0][:50]} <= allowed


def test_bad_input_is_refused_in_a_sentence(stage, tmp_path):
    with pytest.raises(ValueError, match="a boolean per score"):
        logan_rule(np.zeros(3), np.array([0, 1, 1]))
    with pytest.raises(ValueError, match="two are needed"):
        stage(share=0.001)
    with pytest.raises(ValueError, match="four or more"):
        stage(made=bright(3))
    with pytest.raises(ValueError, match="does not have"):
        stage(sources=np.full(80, TRAIN))
    save_file({"images": torch.tensor(bright(8)), "labels": torch.zeros(8)}, tmp_path / "samples.safetensors")
    with pytest.raises(ValueError, match="no folder of make_set"):
        medsynth_attacks._released(tmp_path)


# --- shadow models ------------------------------------------------------------------------------------------


@pytest.fixture
def shadows(monkeypatch, tmp_path):
    """Six shadows on halves of the images: critics that know theirs by `bonus`, released copies of `copied` of them."""

    def run(bonus, copied):
        monkeypatch.setattr(datasets, "load", load)
        images, networks = load("toy"), {}
        included = vertebra_trials.inclusion("toy", 6, SIDE, 7)
        for number, inside in enumerate(included):
            rows = np.flatnonzero(inside)
            made = bright(20, seed=number)
            made[:copied] = images.images[rows[:copied]]
            folder = release(tmp_path / f"shadow{number}", made)
            networks[str(folder)] = Critic(datasets.as_tensor(images.images[rows]).flatten(1), bonus, number)
        monkeypatch.setattr(medsynth, "load_networks", lambda folder: (None, networks[str(folder)]))
        folders = list(networks)
        settings = {"shadows": folders, "released": folders, "data": "toy", "image_size": SIDE, "inclusion_seed": 7}
        found = attack_shadows(tmp_path, **settings)
        return found, {(row["signal"], row["attack"]): row for row in found["rows"]}

    return run


def test_shadows_find_a_leak_that_no_single_critic_shows(shadows):
    found, rows = shadows(bonus=0.05, copied=0)  # noise of the scores is four times that
    assert rows["critic", "lira"]["auc"] > 0.95 > rows["critic", "signal alone"]["auc"]
    disjoint = {(row["signal"], row["attack"]): row for row in found["disjoint"]}
    assert disjoint["critic", "lira"]["low"] < 0.5 < disjoint["critic", "lira"]["high"]
    assert (found["targets"], found["subjects"]) == (6, TRAIN)
    json.dumps(found, allow_nan=False)


def test_copies_are_found_from_released_images_alone(shadows):
    _, rows = shadows(bonus=0.0, copied=20)
    assert rows["nearest", "signal alone"]["low"] > 0.5
    assert rows["nearest", "signal alone"]["auc"] == pytest.approx(0.6, abs=0.05)  # 20 of 100 are known for sure


def test_each_shadow_needs_its_released_set(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets, "load", load)
    with pytest.raises(ValueError, match="one for each"):
        attack_shadows(tmp_path, shadows=["a"] * 6, released=["a"], data="toy", image_size=SIDE, inclusion_seed=0)
