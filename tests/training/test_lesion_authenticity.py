"""Projections and authenticity of lesions: a generator that spans its training images, copies planted, a null."""

import html.parser
import json
import shutil
import subprocess

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.spatial.distance import cdist, cosine
from scipy.stats import pointbiserialr
from torch import nn

from lookalike.data import datasets, phantoms
from lookalike.data.image_set import as_tensor
from lookalike.metrics.extractors import random_conv
from lookalike.metrics.features import features
from lookalike.metrics.scores import auroc
from lookalike.models.stylegan2 import Generator
from lookalike.training import lesion_authenticity
from lookalike.training.lesion_authenticity import (
    GRAIN,
    LAYER,
    authenticity_of,
    balanced_rows,
    cosine_row,
    fit_head,
    interactive_3d,
    load_embedding,
    load_neighbours,
    load_projections,
    project_lesions,
    project_sides,
)

SIDE, MEMBERS = 16, 12
EXTRACTOR = random_conv(0, image_size=SIDE, dim=16)
SEEDS = {"train": 0, "val": 1, "test": 2}
PROJECTION = {
    "data": "", "image_size": SIDE, "members": MEMBERS, "held_out": MEMBERS, "steps": 60, "seed": 0, "head_epochs": 3,
    "feature_size": SIDE, "perceptual": "pixels",
}  # fmt: skip


def lesions(seed, n, split="train"):
    return phantoms.dermoscopy(n, seed, split=split, image_size=SIDE).image_set


def small_load(name, split="train", image_size=None):
    return lesions(SEEDS[split], 100 if split == "train" else 60, split)


def save_arm(folder, name, images, labels):
    (folder / name).mkdir()
    samples = {"images": torch.tensor(images), "labels": torch.tensor(labels)}
    save_file(samples, folder / name / "samples.safetensors")
    return str(folder / name)


class Span(nn.Module):
    """A generator that reaches every mixture of the images it was given, and no other image."""

    num_classes, image_size, noise_shapes = 2, SIDE, ((1, SIDE, SIDE),)

    def __init__(self, images):
        super().__init__()
        known = as_tensor(images)
        self.latent_dim, self.mean = len(known), nn.Parameter(known.mean(0))
        self.directions = nn.Parameter(known - known.mean(0))

    def map(self, z, labels=None):
        return 0.1 * z + 0.01 * labels[:, None]

    def synthesise(self, w, noise="random"):
        made = self.mean + torch.einsum("nk,kchw->nchw", w, self.directions)
        return made if noise == "fixed" else made + 0.001 * noise[0]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(datasets, "load", small_load)
    monkeypatch.setattr(lesion_authenticity, "efficientnet_lite0", lambda size, device: EXTRACTOR)


@pytest.fixture
def projected(small, monkeypatch, tmp_path):
    """`project_lesions` of a Span of given images."""
    trained = save_arm(tmp_path, "trained", lesions(9, 4).images, np.array([0, 1, 0, 1]))

    def run(images, **settings):
        monkeypatch.setattr(lesion_authenticity, "load_networks", lambda folder: (Span(images), None))
        return project_lesions(tmp_path, trained=trained, **PROJECTION | settings)

    return tmp_path, run


def area(found, made, score):
    (row,) = [row for row in found["attack"] if (row["made"], row["score"]) == (made, score)]
    return row


# --- projection ---------------------------------------------------------------------------------------------


def test_a_generator_that_spans_its_members_is_found(projected):
    folder, run = projected
    train = small_load("")
    rows = balanced_rows(train, MEMBERS, [0, 1], 0)
    found = run(train.images[rows])
    json.dumps(found, allow_nan=False)
    for made in ("all", "benign", "melanoma"):
        assert area(found, made, "error")["auc"] == area(found, made, "pixels")["auc"] == 1
    assert area(found, "all", "error")["low"] > 0.5
    near, far = (row["pixels"] for row in found["distances"] if row["made"] == "all")
    assert near < 0.3 * far
    kept = load_projections(folder)
    assert (kept["members"]["rows"] == rows).all()
    assert kept["members"]["latents"].shape == (MEMBERS, MEMBERS)
    assert not any(array.ndim == 4 for side in kept.values() for array in side.values())
    expected = np.median(kept["held_out"]["error"])
    assert found["distances"][1] == {
        "side": "held_out", "made": "all", "images": MEMBERS, "error": expected, "pixels": far,
        "pixels_as_saved": np.median(kept["held_out"]["pixels_as_saved"]),
    }  # fmt: skip


def test_a_generator_of_other_images_tells_nothing(projected):
    _, run = projected
    found = run(lesions(9, 24).images, members=24, held_out=24, optimise_noise=False)
    row = area(found, "all", "error")
    assert row["low"] < 0.5 < row["high"]
    assert (row["members"], row["held_out"]) == (24, 24)


def test_the_two_nearest_are_two_on_both_sides_and_a_quarter_lies_below_the_quartile(projected):
    """The paper's rule flags held-out images, which nothing can have memorised, just as it flags members."""
    folder, run = projected
    found = run(lesions(9, 24).images)
    kept = load_projections(folder)
    for row in found["cosine"]:
        numbers = kept[row["side"]][f"cosine_{row['space']}"]
        assert (row["flagged"], row["below_q1"]) == (2, 0.25)
        assert row["two_smallest"] == sorted(numbers)[:2]
        assert row["q1"] <= row["median"] <= row["q3"]
        assert (row["mean"], row["median"]) == pytest.approx((numbers.mean(), np.median(numbers)))
    assert [(row["side"], row["space"]) for row in found["cosine"]] == [
        ("members", "layer"), ("members", "features"), ("held_out", "layer"), ("held_out", "features"),
    ]  # fmt: skip
    assert 0 <= found["head"]["auc"] <= 1


def test_stylegan_is_projected_with_its_noise_and_the_perceptual_distance():
    """More steps come nearer, at 16 px, which the perceptual network reads only when enlarged."""
    torch.manual_seed(0)
    generator = Generator(SIDE, latent_dim=8, w_dim=8, base=64, max_channels=8).eval().requires_grad_(False)
    originals = {side: lesions(seed, 2) for side, seed in (("members", 0), ("held_out", 1))}
    errors = {}
    for steps in (1, 8):
        found = project_sides(generator, originals, steps, 0, 2, "stlpips_vgg", True)
        errors[steps] = np.concatenate([found[side].errors for side in ("members", "held_out")])
        assert found["members"].latents.shape == (2, 8)
        assert found["members"].images.shape == (2, 3, SIDE, SIDE)
    assert errors[8].mean() < errors[1].mean()
    with pytest.raises(ValueError, match="must be one of stlpips_vgg, stlpips_alex, pixels"):
        project_sides(generator, originals, 1, 0, 4, "lpips", True)


def test_an_unconditional_generator_starts_at_one_mean():
    torch.manual_seed(0)
    settings = {"latent_dim": 8, "w_dim": 8, "base": 64, "max_channels": 8, "num_classes": 0}
    generator = Generator(SIDE, **settings).eval().requires_grad_(False)
    found = project_sides(generator, {s: lesions(0, 2) for s in ("members", "held_out")}, 2, 0, 2, "pixels", False)
    assert (found["members"].errors == found["held_out"].errors).all()  # the same images, the same budget


def test_classes_are_drawn_in_equal_parts():
    images = lesions(0, 60).subset(np.r_[0:40:2, 1:20:2])  # 20 benign, 10 melanoma
    rows = balanced_rows(images, 13, [0, 1], seed=0)
    assert np.bincount(images.labels[rows]).tolist() == [6, 6]
    assert len(set(rows)) == 12
    assert (balanced_rows(images, 4, [1], 0) >= 20).all()
    with pytest.raises(ValueError, match="10 images of melanoma; 12 of each class"):
        balanced_rows(images, 24, [0, 1], seed=0)


def test_the_head_is_the_paper_s_two_linear_layers():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 80)
    rows = rng.normal(size=(80, 6)).astype(np.float32)
    rows[:, 2] += 3 * labels
    head = fit_head(rows, labels, epochs=15, seed=0)
    assert sum(p.numel() for p in head.parameters()) == 6 * LAYER + LAYER + LAYER + 1
    weight = head[1].weight @ head[0].weight
    bias = head[1].weight @ head[0].bias + head[1].bias
    torch.testing.assert_close(head(torch.tensor(rows)), torch.tensor(rows) @ weight.T + bias, rtol=1e-4, atol=1e-5)
    assert auroc(labels, head(torch.tensor(rows))[:, 0].numpy()) > 0.95
    again = fit_head(rows, labels, epochs=15, seed=0)
    torch.testing.assert_close(again[0].weight, head[0].weight, rtol=0, atol=0)


def test_in_a_layer_before_one_logit_the_cosine_is_the_decision():
    """Rows along one direction, as a layer is that feeds one logit, plus a little: 0 where decisions agree, 2 where
    they do not. scipy's cosine and point-biserial correlation are the twins.
    """
    rng = np.random.default_rng(0)
    signs = rng.choice([-1, 1], (2, 40))
    own, other = (s[:, None] * rng.uniform(1, 3, (40, 1)) + 0.05 * rng.normal(size=(40, 20)) for s in signs)
    same = signs[0] == signs[1]
    distances = np.array([cosine(a, b) for a, b in zip(own, other)])
    row = cosine_row("members", "layer", {"cosine_layer": distances, "same_decision": same, "nearest_layer": 0.5})
    assert row["explained"] == pytest.approx(pointbiserialr(same, distances).statistic ** 2)
    assert row["explained"] > 0.99
    assert (row["mean_same"], row["mean_other"]) == pytest.approx((0, 2), abs=0.01)
    agreeing = cosine_row("members", "layer", {"cosine_layer": distances, "same_decision": same | ~same,
                                               "nearest_layer": 0.5})  # fmt: skip
    assert (agreeing["correlation"], agreeing["explained"], agreeing["mean_other"]) == (None, None, None)


def test_own_nearest_is_that_of_all_pairs():
    rng = np.random.default_rng(1)
    own = rng.normal(size=(30, 3))
    other = own + 0.3 * rng.normal(size=own.shape)
    expected = (cdist(own, other, "cosine").argmin(1) == np.arange(30)).mean()
    assert 0.1 < expected < 1
    assert lesion_authenticity._own_nearest(own, other) == pytest.approx(expected)


# --- authenticity -------------------------------------------------------------------------------------------

SETTINGS = {"data": "", "image_size": SIDE, "feature_size": SIDE, "shown": 30, "perplexity": 5.0}


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    """One GAN draws from the very distribution; one gives its training images again; one makes melanoma alone."""
    folder, train, fresh = tmp_path_factory.mktemp("audited"), small_load(""), lesions(7, 80)
    rng = np.random.default_rng(0)
    grain = rng.integers(-1, 2, train.images.shape)
    copies = np.clip(train.images.astype(int) + grain, 0, 255).astype(np.uint8)
    dark = fresh.labels == 1
    trained = {
        "fresh": save_arm(folder, "fresh", fresh.images, fresh.labels),
        "copier": save_arm(folder, "copier", copies, train.labels),
        "mal": save_arm(folder, "mal", fresh.images[dark], fresh.labels[dark]),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load", small_load)
        patch.setattr(lesion_authenticity, "efficientnet_lite0", lambda size, device: EXTRACTOR)
        return folder, train, fresh, authenticity_of(folder, trained=trained, **SETTINGS)


def test_authenticity_finds_copies_and_is_that_of_all_pairs(audited):
    _, train, fresh, found = audited
    json.dumps(found, allow_nan=False)
    by = {(row["arm"], row["made"]): row for row in found["rows"]}
    assert {arm: [made for a, made in by if a == arm] for arm in ("fresh", "copier", "mal")} == {
        "fresh": ["benign", "melanoma", "all"], "copier": ["benign", "melanoma", "all"], "mal": ["melanoma"],
    }  # fmt: skip
    assert by["copier", "all"]["high"] < by["copier", "all"]["control_low"]
    assert by["copier", "all"]["share"] < 0.05
    fresh_row = by["fresh", "all"]
    assert max(fresh_row["low"], fresh_row["control_low"]) < min(fresh_row["high"], fresh_row["control_high"])
    real, made = (features(s.images[s.labels == 1], EXTRACTOR).astype(float) for s in (train, fresh))
    among = cdist(real, real) + np.where(np.eye(len(real)), np.inf, 0)
    between = cdist(made, real)
    expected = (between.min(1) > among.min(1)[between.argmin(1)]).mean()
    assert by["mal", "melanoma"]["share"] == by["fresh", "melanoma"]["share"] == pytest.approx(expected)


def test_planted_copies_lower_the_share_by_their_part(audited):
    *_, found = audited
    for row in found["rows"]:
        assert row["copies"] == round(0.1 * row["images"])
        if row["arm"] != "copier":
            assert row["planted"] == pytest.approx(0.9 * row["share"], abs=0.05)
            assert row["planted"] < row["share"]


def test_neighbours_are_rows_of_the_train_split(audited):
    folder, train, fresh, found = audited
    kept = load_neighbours(folder)
    assert kept["fresh"]["distance"].shape == (80,)
    real, made = (features(s.images, EXTRACTOR).astype(float) for s in (train, fresh))
    np.testing.assert_allclose(kept["fresh"]["distance"], cdist(made, real).min(1), rtol=1e-5)
    assert (kept["copier"]["real"] == np.arange(len(train))).mean() > 0.95
    assert (train.labels[kept["mal"]["real"]] == 1).all()
    near = {row["arm"]: row for row in found["near"]}
    assert near["copier"]["nearer"] > 0.9
    assert near["fresh"]["nearer"] < 0.1
    assert near["fresh"]["closest"][0]["distance"] == near["fresh"]["made"]["min"] == kept["fresh"]["distance"].min()
    assert len(near["fresh"]["closest"]) == 5


def test_the_embedding_holds_every_set(audited):
    folder, train, _, found = audited
    kept = load_embedding(folder)
    assert set(kept) == {"train", "held_out", "fresh", "copier", "mal"}
    for of in kept.values():
        assert (of["plane"].shape, of["space"].shape) == ((30, 2), (30, 3))
        assert len(of["labels"]) == len(of["rows"]) == 30
    assert (train.labels[kept["train"]["rows"]] == kept["train"]["labels"]).all()
    np.testing.assert_allclose(kept["train"]["space"].mean(0), 0, atol=1e-4)  # fitted on training images alone
    variance = kept["train"]["space"].var(0)
    assert variance[0] >= variance[1] >= variance[2]
    assert all(0.7 < value <= 1 for value in found["trustworthiness"].values())


def test_settings_that_cannot_be_are_refused(small, tmp_path):
    trained = {"a": save_arm(tmp_path, "a", lesions(7, 40).images, lesions(7, 40).labels)}
    with pytest.raises(ValueError, match="a share of the images between 0 and 1"):
        authenticity_of(tmp_path, trained=trained, copies=0, **SETTINGS)
    with pytest.raises(ValueError, match='"pca" or "umap"'):
        authenticity_of(tmp_path, trained=trained, space="tsne", **SETTINGS)
    with pytest.raises(ValueError, match="call the GAN something else"):
        authenticity_of(tmp_path, trained={"train": trained["a"]}, **SETTINGS)


def test_grain_is_small():
    images = np.zeros((2, 3, 4, 4), np.uint8) + 100
    noisy = lesion_authenticity._with_grain(images, np.random.default_rng(0)).astype(int)
    assert np.abs(noisy - 100).max() == GRAIN


# --- the figure ---------------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.script = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, text):
        if self.tags and self.tags[-1][0] == "script":
            self.script += text


POINTS = np.array([[0.0, 0, 0], [2, 0, 0], [0, 1, 0], [0, 0, 1]])


def test_the_figure_is_alone_and_small_and_its_ids_differ():
    first, second = (interactive_3d(POINTS, ["a", "a", "<b>", "c & d"], label='of "x"') for _ in range(2))
    pages = Page(first), Page(second)
    ids = [attributes["id"] for page in pages for tag, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) == 2
    assert not {"src", "href"} & {name for page in pages for _, attributes in page.tags for name in attributes}
    assert "http" not in first
    assert len(first) < 6000
    canvas = dict(pages[0].tags)["canvas"]
    assert canvas["aria-label"].startswith('of "x". Drag')
    assert canvas["tabindex"] == "0"
    assert "&lt;b&gt;" in first
    assert [tag for tag, _ in pages[0].tags].count("button") == 3


def test_bad_points_are_refused():
    with pytest.raises(ValueError, match=r"points \(N, 3\)"):
        interactive_3d(POINTS[:, :2], ["a"] * 4)
    with pytest.raises(ValueError, match="at most 8 groups"):
        interactive_3d(np.zeros((9, 3)), range(9))
    with pytest.raises(ValueError, match="one text for each of the 4 points"):
        interactive_3d(POINTS, ["a"] * 4, hover=["x"])


STAGE = """
const drawn = [], on = {}, clicks = [];
const pen = {clearRect() { drawn.length = 0; }, beginPath() {},
             fill() { drawn[drawn.length - 1].push(this.fillStyle); }, arc(x, y) { drawn.push([x, y]); }};
const canvas = {width: 460, height: 460, getContext: () => pen, addEventListener: (name, f) => { on[name] = f; },
                setPointerCapture() {}, getBoundingClientRect: () => ({left: 0, top: 0, width: 230, height: 230})};
const note = {textContent: ""};
const buttons = [0, 1].map(i => ({dataset: {group: String(i)}, style: {}, setAttribute() {},
                                  addEventListener: (_, f) => clicks.push(f)}));
const root = {querySelector: s => s === "canvas" ? canvas : note, querySelectorAll: () => buttons};
globalThis.document = {getElementById: () => root};
const copy = () => drawn.map(part => [...part]);
const told = {};
%s
told.first = copy();
const [x, y] = drawn[0];
on.pointermove({clientX: x / 2, clientY: y / 2});
told.hover = note.textContent;
on.keydown({key: "ArrowLeft", preventDefault() {}});
told.turned = copy();
on.keydown({key: "ArrowRight", preventDefault() {}});
told.back = copy();
on.pointerdown({clientX: 0, clientY: 0, pointerId: 1});
on.pointermove({clientX: 12, clientY: 0});
on.pointerup({});
told.dragged = copy();
clicks[1]();
told.hidden = copy();
console.log(JSON.stringify(told));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="the figure's script runs in node")
def test_the_script_draws_turns_hides_and_names():
    """The twin: a rotation about the vertical, then about the horizontal axis, in perspective."""
    hover = ["p0", "</script>", "p2", "p3"]
    page = Page(interactive_3d(POINTS, ["a", "a", "a", "b"], hover=hover))
    ran = subprocess.run(["node", "-e", STAGE % page.script], capture_output=True, text=True, check=True)
    told = json.loads(ran.stdout)

    def expected(turn, tilt=0.4):
        centred = POINTS - [1, 0.5, 0.5]
        about = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
        over = np.array([[1, 0, 0], [0, np.cos(tilt), -np.sin(tilt)], [0, np.sin(tilt), np.cos(tilt)]])
        across, depth, up = over @ about @ centred.T
        scale = 0.55 * 230 * 4 / (4 + depth)
        order = np.argsort(-depth, kind="stable")  # the farthest is drawn first
        return np.stack([230 + scale * across, 230 - scale * up], 1)[order], order

    places, order = expected(0.6)
    np.testing.assert_allclose([part[:2] for part in told["first"]], places, atol=0.2)
    colours = [lesion_authenticity.COLOURS[int(i == 3)] for i in order]
    assert [part[2] for part in told["first"]] == colours
    assert told["hover"] == hover[order[0]]
    np.testing.assert_allclose([part[:2] for part in told["turned"]], expected(0.5)[0], atol=0.2)
    np.testing.assert_allclose([part[:2] for part in told["back"]], places, atol=0.2)
    np.testing.assert_allclose([part[:2] for part in told["dragged"]], expected(0.7)[0], atol=0.2)
    assert len(told["hidden"]) == 3
