"""The figure's table on phantoms: pairs, sizes, anchors; and the causes of FRD, each against its definition."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from lookalike.data import datasets, phantoms
from lookalike.metrics import distances, radiomics
from lookalike.metrics.features import efficientnet_lite0, features
from lookalike.training import mass_measures as measures

REAL, SIDE = "phantom_mammography", 32
METRICS = ["frechet", "kernel", "frd_v0", "frd_v1"]


@pytest.fixture(scope="module", autouse=True)
def few_phantoms():
    """Sixty images a split instead of 400: the same patients, read by the name that a stage is given."""
    whole = datasets.load

    def load(name, split="train", image_size=None):
        return whole(name, "val", SIDE).subset(range(60) if split == "train" else range(60, 100))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measures.datasets, "load", load)
        yield


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Other patients at twice the size, with a checkerboard of 8 grey levels: what a generator may leave behind."""
    folder = tmp_path_factory.mktemp("samples")
    images = np.kron(
        phantoms.mammography(40, seed=5, image_size=SIDE).image_set.images, np.ones((1, 1, 2, 2), np.uint8)
    )
    board = 8 * (-1) ** np.indices((SIDE, SIDE)).sum(0).repeat(2, 0).repeat(2, 1)
    images = (images.astype(int) + board).clip(0, 255).astype(np.uint8)
    save_file({"images": images, "labels": np.zeros(len(images), np.int64)}, folder / "samples.safetensors")
    return str(folder)


@pytest.fixture(scope="module")
def settings(samples):
    return {"real": REAL, "synthetic": samples, "other": REAL, "image_size": SIDE, "seed": 0}


@pytest.fixture(scope="module")
def figure(settings):
    return measures.figure_measures(None, feature_size=SIDE, cache=None, **settings)


@pytest.fixture(scope="module")
def causes(settings):
    return measures.frd_causes(None, **settings)


@pytest.fixture(scope="module")
def parts(settings):
    return measures.parts_of(parts=3, **settings)


def test_the_table_has_the_papers_rows_and_the_anchors(figure):
    rows = ["Syn-Real", "Real-Real", "Syn-Syn", "Real-Other", "Real-Blurred", "Real-Grainy", "Real-Noise"]
    assert list(figure["rows"]) == rows
    for row, table in figure["rows"].items():
        assert list(table) == METRICS
        for found in table.values():
            assert len(found["values"]) == (2 if row in rows[4:] else 3)
            assert found["std"] == pytest.approx(np.std(found["values"]))
    assert figure["sizes"] == {"real": [20, 20, 20], "synthetic": [14, 13, 13], "other": [14, 14, 12]}
    assert figure["features"] == {"frechet": f"efficientnet_lite0-imagenet@{SIDE} bilinear"}
    assert json.loads(json.dumps(figure)) == figure


def test_every_number_is_the_distance_of_its_own_pair(figure, parts):
    images, rows = parts
    first, second = images["real"][rows["real"][0]], images["synthetic"][rows["synthetic"][0]]
    own, row = [features(x, efficientnet_lite0(SIDE)) for x in (first, second)], figure["rows"]["Syn-Real"]
    assert row["frechet"]["values"][0] == pytest.approx(distances.frechet_distance(*own), rel=1e-4)
    assert row["kernel"]["values"][0] == pytest.approx(1000 * distances.kernel_distance(*own).value, rel=1e-3)
    assert row["frd_v0"]["values"][0] == pytest.approx(radiomics.frd_v0(first, second))
    assert row["frd_v1"]["values"][0] == pytest.approx(radiomics.frd_v1(first, second))
    last = images["real"][rows["real"][1]], images["real"][rows["real"][2]]
    assert figure["rows"]["Real-Real"]["frd_v0"]["values"][2] == pytest.approx(radiomics.frd_v0(*last))


def test_what_has_no_picture_is_farthest(figure):
    for metric in METRICS:
        means = {row: table[metric]["mean"] for row, table in figure["rows"].items()}
        if metric != "frd_v1":  # to it a blurred image is farther from a real one than noise is
            assert max(means, key=means.get) == "Real-Noise"
        if metric.startswith("frd"):  # 20 images are too few for distances in 1,280 dimensions
            assert means["Real-Real"] < min(means["Real-Blurred"], means["Real-Grainy"])


def test_images_of_another_size_are_brought_to_one(parts):
    images, _ = parts
    assert {x.shape[2:] for x in images.values()} == {(SIDE, SIDE)}
    small = np.arange(16, dtype=np.uint8).reshape(1, 1, 4, 4)
    assert measures.brought_to(small, 4) is small
    assert measures.brought_to(np.full((1, 1, 8, 8), 77, np.uint8), 4).tolist() == [[[[77] * 4] * 4]]


def test_settings_that_cannot_be_are_refused(settings):
    for wrong, sentence in (
        ({"synthetic": REAL}, "another set than real"),
        ({"synthetic": "nowhere"}, "neither a data set's name nor a folder"),
        ({"parts": 1}, "two parts at least"),
    ):
        with pytest.raises(ValueError, match=sentence):
            measures.parts_of(**({"parts": 3} | settings | wrong))
    with pytest.raises(ValueError, match="give both radimagenet"):
        measures.figure_measures(None, feature_size=SIDE, cache=None, radimagenet="weights.pth", **settings)


def test_without_another_site_its_row_is_left_out(settings):
    _, rows = measures.parts_of(parts=2, **(settings | {"other": ""}))
    assert list(measures.pairs_of(rows)) == ["Syn-Real", "Real-Real", "Syn-Syn"]


def test_taking_the_planted_texture_away_brings_the_sets_together(causes):
    mean = {name: {row: found["mean"] for row, found in table.items()} for name, table in causes["variants"].items()}
    assert mean["synthetic filtered"]["Syn-Real"] < 0.5 * mean["as released"]["Syn-Real"]
    assert mean["all blurred"]["Syn-Real"] < 0.5 * mean["as released"]["Syn-Real"]
    assert mean["real filtered"]["Syn-Real"] < mean["as released"]["Syn-Real"]
    assert mean["real filtered"]["Real-Other"] > 1.2 * mean["as released"]["Real-Other"]
    for name in ("synthetic filtered", "real filtered"):  # what was not touched is measured as it was
        untouched = "Real-Other" if name.startswith("synthetic") else "Syn-Syn"
        assert mean[name][untouched] == mean["as released"][untouched]
    assert causes["families"]["firstorder"]["Syn-Real"]["mean"] < causes["families"]["glrlm"]["Syn-Real"]["mean"]
    assert json.loads(json.dumps(causes)) == causes


def test_released_rows_are_the_figures(causes, figure):
    assert causes["variants"]["as released"]["Syn-Real"] == figure["rows"]["Syn-Real"]["frd_v0"]


def test_a_spectrum_sums_to_the_variance_inside_images():
    images = np.random.default_rng(0).integers(0, 256, (5, 1, 16, 16)).astype(np.uint8)
    spectrum = measures.power_spectrum(images)
    assert spectrum.sum() == pytest.approx(images.var((2, 3)).mean())
    assert sum(measures.band_variances(spectrum)) == pytest.approx(spectrum.sum())


def test_the_power_of_a_checkerboard_lies_in_the_corner():
    board = (128 + 8 * (-1) ** np.indices((16, 16)).sum(0)).astype(np.uint8)[None, None]
    assert measures.band_variances(measures.power_spectrum(board)) == pytest.approx([0, 0, 0, 0, 64])


def test_a_filtered_set_has_the_wanted_spectrum_where_it_is_fine():
    rng = np.random.default_rng(0)
    rough, smooth = (rng.normal(128, width, (40, 1, 16, 16)).astype(np.uint8) for width in (20, 10))
    own, wanted = measures.power_spectrum(rough), measures.power_spectrum(smooth)
    found = measures.power_spectrum(measures.with_spectrum(rough, own, wanted))
    fine = measures.frequencies(own.shape) > measures.FINE
    np.testing.assert_allclose(found[fine], wanted[fine], rtol=0.05, atol=0.01)  # rounding to 8 bits adds 1/12
    np.testing.assert_allclose(found[~fine], own[~fine], rtol=0.05, atol=0.01)


def test_the_gap_is_everything_between_shifted_sets_and_little_between_equal_ones():
    rows = np.random.default_rng(0).standard_normal((200, 102))
    assert measures.gap_share(rows, rows + 1) == pytest.approx(1)
    assert measures.gap_share(rows, np.concatenate([rows.mean(0) - 2 * (rows - rows.mean(0))])) == pytest.approx(0)
