"""What classifiers look at and what frame removal does, on phantoms and on a generator whose frame is one number."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from lookalike.data import phantoms
from lookalike.lesion_explanations import disc, frame_ring, heat_share
from lookalike.training import lesion_explaining
from lookalike.training.lesion_confounds import frame_score
from lookalike.training.lesion_explaining import (
    concepts,
    edges,
    frame_removal,
    frame_threshold,
    heat,
    load_edges,
    load_heat,
    load_removal,
)

SMALL = {"image_size": 32, "share": 1.0, "seed": 0, "epochs": 6, "width": 8}
REMOVAL = {
    "image_size": 32, "images": 120, "steps": 6, "seed": 0, "share": [0.1, 0.9], "directions": 4, "train_images": 120,
    "test_images": 80, "epochs": 8, "width": 8,
}  # fmt: skip
FRAME, RADIUS = 0, 1  # what the entries of w mean in the generator below


class Lesions(nn.Module):
    """Discs on skin: w's first number is how dark the frame is, its second how large the lesion is."""

    image_size, latent_dim, w_dim, num_ws = 32, 6, 6, 1

    def __init__(self, num_classes=2, framed=1.0):
        super().__init__()
        self.num_classes, self.framed = num_classes, framed
        styles = torch.zeros(12, 6)
        styles[:6, 2], styles[6:10, FRAME], styles[10:, RADIUS] = 1, 1, 1  # SeFa: nothing, frame, radius
        self.styles = nn.Linear(6, 12)
        self.styles.weight.data = styles

    def style_layers(self):
        return [self.styles]

    def noise(self, n, generator=None):
        return torch.randn(n, 6, generator=generator)

    def map(self, z, labels=None, truncation=1.0):
        w = z.clone()
        w[:, FRAME] = self.framed * w[:, FRAME]
        if self.num_classes:
            w[:, FRAME] += self.framed * (2.0 * labels - 1)
            w[:, RADIUS] = 0.4 * w[:, RADIUS] + 2.0 * labels - 1
        return w

    def synthesise(self, w, noise="random"):
        line = (torch.arange(32) + 0.5) / 16 - 1
        r = torch.hypot(line, line[:, None])
        lesion = ((0.45 + 0.12 * w[:, RADIUS].tanh())[:, None, None] - r).mul(12).sigmoid()
        frame = w[:, FRAME, None, None].mul(3).sigmoid() * (r > 0.98)
        skin, brown = torch.tensor([[0.8, 0.65, 0.6], [0.4, 0.25, 0.2]])[:, :, None, None]
        return 2 * (skin + lesion[:, None] * (brown - skin)) * (1 - frame[:, None]) - 1


def removed(folder, generator, patch, **changed):
    patch.setattr(lesion_explaining, "load_networks", lambda _: (generator, None))
    return frame_removal(folder, trained="anywhere", **REMOVAL | changed)


# --- concepts ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found_concepts(tmp_path_factory):
    counts = {"train": 200, "concept": 12, "pairs": 9, "inputs": 24}
    return concepts(tmp_path_factory.mktemp("concepts"), counts=counts, **SMALL)


def row_of(rows, **wanted):
    (found,) = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    return found


def test_the_frame_comes_out_where_it_was_planted_and_only_there(found_concepts):
    rows = found_concepts["rows"]
    assert [(row["network"], row["concept"]) for row in rows] == [
        (network, concept) for network in ("frames", "no frames") for concept in ("frame", "hairs", "darkness")
    ]
    planted = row_of(rows, network="frames", concept="frame")
    assert planted["comes_out"]
    assert planted["score"] > 0.95
    assert planted["accuracy"] > 0.95
    assert planted["effect"] > 2
    assert not row_of(rows, network="no frames", concept="frame")["comes_out"]
    assert not row_of(rows, network="frames", concept="hairs")["comes_out"]


def test_corrected_p_values_are_holms_and_the_result_is_json(found_concepts):
    json.dumps(found_concepts, allow_nan=False)
    rows = found_concepts["rows"]
    p = [row["derivative_p"] for row in rows]
    assert min(p) == 2 / 2**9  # all nine differences have one sign
    assert min(row["p_holm"] for row in rows) == pytest.approx(len(rows) * min(p))
    assert all(row["p_holm"] >= row["derivative_p"] for row in rows)


def test_the_planted_network_fails_on_plain_lesions_more_often(found_concepts):
    assert found_concepts["accuracy"]["frames"] < 0.75


def test_concepts_refuse_a_share_and_a_layer_that_are_not_there(tmp_path):
    counts = {"train": 8, "concept": 4, "pairs": 2, "inputs": 4}
    with pytest.raises(ValueError, match="share is the chance"):
        concepts(tmp_path, counts=counts, **SMALL | {"share": 0.0})
    with pytest.raises(ValueError, match=r"no layer 'trunk\.99'"):
        concepts(tmp_path, counts=counts, layer="trunk.99", **SMALL | {"epochs": 1})


# --- heat ----------------------------------------------------------------------------------------------------


def test_heat_moves_to_the_ring_of_the_network_that_learnt_frames(tmp_path):
    found = heat(tmp_path, counts={"train": 160, "shown": 2}, steps=6, **SMALL | {"epochs": 8})
    json.dumps(found, allow_nan=False)
    learnt, plain = (row_of(found["rows"], network=name, images="framed") for name in ("frames", "no frames"))
    assert learnt["ring"]["value"] > 1.5 * learnt["ring_area"]
    assert learnt["ring"]["value"] > plain["ring"]["value"] + 0.1
    assert learnt["ring_area"] == pytest.approx(frame_ring(32).mean())
    kept = load_heat(tmp_path)
    assert kept["framed"].shape == (2, 3, 32, 32)
    assert (frame_score(kept["framed"]) > frame_score(kept["plain"]) + 0.3).all()
    again = heat_share(kept["frames_framed_maps"], frame_ring(32))
    assert np.nanmean(again) == pytest.approx(learnt["ring"]["value"], abs=1e-6)
    assert kept["frames_framed_masks"].mean() >= 0.15


# --- edges ---------------------------------------------------------------------------------------------------


def load_few(name, split, image_size):
    n, seed = {"train": (160, 0), "test": (80, 1)}[split]
    return phantoms.dermoscopy(n, seed, split=split, image_size=image_size).image_set


def test_edges_are_counted_and_shown_apart_from_the_sure(tmp_path, monkeypatch):
    monkeypatch.setattr(lesion_explaining.datasets, "load", load_few)
    settings = {"image_size": 16, "shown": 2, "seed": 0, "margin": 0.35, "epochs": 6, "width": 8, "steps": 4}
    found = edges(tmp_path, data="few", **settings)
    json.dumps(found, allow_nan=False)
    assert found["images"] == 80
    assert found["edge"]["n"] == 20  # patients
    assert found["edge"]["value"] == pytest.approx(np.mean(list(found["edge_by_class"].values())))
    kept = load_edges(tmp_path)
    assert kept["edge_probability"].max() < 0.65 <= kept["sure_probability"].min()
    assert not set(kept["edge_rows"]) & set(kept["sure_rows"])
    assert kept["sure_maps"].shape == kept["sure_masks"].shape == (2, 16, 16)
    middle = np.nanmean(heat_share(kept["edge_maps"], disc(16, 0.5)))
    assert found["middle"]["edge"]["value"] == pytest.approx(middle, abs=1e-6)


def test_a_margin_that_leaves_no_case_leaves_it_out(tmp_path, monkeypatch):
    monkeypatch.setattr(lesion_explaining.datasets, "load", load_few)
    found = edges(tmp_path, data="few", image_size=16, shown=2, seed=0, margin=0.9, epochs=1, width=8, steps=2)
    assert found["edge"]["value"] == 0
    assert found["middle"]["edge"] is None
    assert not [name for name in load_edges(tmp_path) if name.startswith("edge")]


# --- frames taken away ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def removal(tmp_path_factory):
    folder = tmp_path_factory.mktemp("removal")
    with pytest.MonkeyPatch.context() as patch:
        return folder, removed(folder, Lesions(), patch)


def test_every_way_finds_the_planted_direction_and_the_random_one_finds_less(removal):
    folder, found = removal
    json.dumps(found, allow_nan=False)
    rows = {row["way"]: row for row in found["ways"]}
    assert list(rows) == ["sefa", "means", "hyperplane", "random"]
    assert rows["sefa"]["direction"] == 2
    kept = load_removal(folder)
    for way in ("sefa", "means", "hyperplane"):
        assert kept[f"direction_{way}"][FRAME] > 0.9
        assert rows[way]["removed"]["value"] > 0.9
        assert rows[way]["score_after"] < found["clean"] < found["threshold"] < rows[way]["score_before"]
    assert abs(kept["direction_random"][FRAME]) < 0.9
    assert rows["random"]["distance"] > rows["sefa"]["distance"]
    assert found["chosen"] in ("sefa", "means", "hyperplane")
    assert found["detector_auc"] > 0.99


def test_the_direction_of_the_frame_alone_leaves_the_lesion_as_it_was(removal):
    rows = {row["way"]: row for row in removal[1]["ways"]}
    assert rows["sefa"]["inner_change"] == 0
    assert rows["sefa"]["inner_change"] < rows["random"]["inner_change"]


def test_kept_images_are_framed_before_and_mostly_not_after(removal):
    folder, found = removal
    kept = load_removal(folder)
    assert len(kept["before"]) == sum(found["framed"].values())
    assert found["framed"]["1"] > found["framed"]["0"]
    assert (frame_score(kept["before"]) > found["threshold"]).all()
    assert (frame_score(kept["after"]) <= found["clean"]).mean() > 0.9


def test_the_experiment_shows_what_the_frames_were_worth(removal):
    rows = removal[1]["experiment"]
    assert len(rows) == 12
    auc = {(row["trained_on"], row["tested_on"]): row["auc"]["value"] for row in rows}
    assert auc["real", "as trained"] > auc["real", "reversed"] + 0.3  # real ones have the confound, too
    assert auc["framed", "as trained"] > auc["framed", "reversed"] + 0.3
    assert auc["deframed", "reversed"] > auc["framed", "reversed"] + 0.1
    assert row_of(rows, trained_on="majority", tested_on="none")["accuracy"]["value"] == 0.5
    assert row_of(rows, trained_on="majority", tested_on="none")["auc"]["value"] == 0.5
    assert row_of(rows, trained_on="real", tested_on="none")["accuracy"]["n"] == 20  # patients


def test_one_class_has_no_experiment_and_too_few_frames_are_refused(tmp_path, monkeypatch):
    found = removed(tmp_path, Lesions(num_classes=0), monkeypatch, images=40, epochs=1, train_images=40)
    assert found["experiment"] is None
    assert set(found["framed"]) == {"0"}
    with pytest.raises(ValueError, match="samples have a frame"):
        removed(tmp_path, Lesions(framed=0.0), monkeypatch, images=20)


def test_a_threshold_lies_in_the_middle_of_the_best_gap():
    assert frame_threshold([0.1, 0.2, 0.7, 0.9], [0, 0, 1, 1]) == pytest.approx(0.45)
    assert frame_threshold([0.1, 0.8, 0.7, 0.9, 0.95], [0, 0, 1, 1, 1]) in (pytest.approx(0.4), pytest.approx(0.85))
    with pytest.raises(ValueError, match="images without"):
        frame_threshold([0.1, 0.2], [1, 1])
    with pytest.raises(ValueError, match="same score"):
        frame_threshold([0.1, 0.1], [0, 1])
