"""Explanations: planted directions, evidence in a known square, concepts that a network must or must not use."""

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lookalike.lesion_explanations import (
    activations,
    concept_vector,
    disc,
    edge_cases,
    frame_ring,
    heat_share,
    move,
    neighbours_in_w,
    neighbours_in_z,
    salient,
    sefa,
    sensitivities,
    slider_frames,
    slider_html,
    tcav,
    xrai,
)
from lookalike.models.stylegan2 import Generator


class Styles:
    """As much of a generator as SeFa asks for."""

    def __init__(self, *weights):
        self.layers = [nn.Linear(w.shape[1], w.shape[0]) for w in weights]
        for layer, w in zip(self.layers, weights):
            layer.weight.data = torch.as_tensor(w, dtype=torch.float32)

    def style_layers(self):
        return self.layers


def styles(seed=0, shapes=((20, 6), (15, 6))):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape) for shape in shapes]


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(0)
    return Generator(image_size=16, num_classes=2, latent_dim=16, w_dim=8, base=128, max_channels=16).eval()


# --- SeFa ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalise", ["columns", "none"])
def test_directions_are_those_of_numpys_svd(normalise):
    weights = [w.astype(np.float32) for w in styles()]
    stacked = np.concatenate(weights).astype(float)
    if normalise == "columns":
        stacked /= np.linalg.norm(stacked, axis=1, keepdims=True)
    _, singular, rows = np.linalg.svd(stacked, full_matrices=False)
    values, directions = sefa(Styles(*weights), normalise=normalise)
    assert values == pytest.approx(singular**2, rel=1e-6)
    assert np.abs((directions * rows).sum(1)) == pytest.approx(np.ones(6), abs=1e-6)
    assert (np.diff(values) <= 0).all()


def test_a_planted_direction_comes_first_and_its_largest_entry_is_positive():
    planted = np.array([0.1, -0.9, 0.2, 0.1, 0.0, 0.3])
    planted /= np.linalg.norm(planted)
    weights = [0.05 * w + 3 * np.outer(np.ones(len(w)), planted) for w in styles(1)]
    _, directions = sefa(Styles(*weights), normalise="none")
    assert directions[0] == pytest.approx(-planted, abs=0.05)
    assert (directions[np.arange(6), np.abs(directions).argmax(1)] > 0).all()


def test_columns_to_length_one_take_a_loud_channel_its_voice():
    quiet = np.tile(np.eye(6)[0], (10, 1))
    loud = 100 * np.eye(6)[[1]]
    assert sefa(Styles(quiet, loud), normalise="none")[1][0] == pytest.approx(np.eye(6)[1])
    assert sefa(Styles(quiet, loud))[1][0] == pytest.approx(np.eye(6)[0])


def test_layers_can_be_chosen():
    weights = styles(2)
    assert sefa(Styles(*weights), layers=[1])[1] == pytest.approx(sefa(Styles(weights[1]))[1])
    with pytest.raises(ValueError, match="some of 0 to 1"):
        sefa(Styles(*weights), layers=[2])
    with pytest.raises(ValueError, match="normalise"):
        sefa(Styles(*weights), normalise="rows")


def test_a_move_is_the_generator_at_the_moved_w(generator):
    w = generator.map(generator.noise(2, torch.Generator().manual_seed(0)), torch.tensor([0, 1])).detach()
    direction = 5 * torch.eye(8)[3]
    images = move(generator, w, direction, [-2, 0, 1])
    assert images.shape == (2, 3, 3, 16, 16)
    with torch.no_grad():
        expected = generator.synthesise(w + torch.eye(8)[3], noise="fixed").clamp(-1, 1)
        assert torch.equal(images[:, 1], generator.synthesise(w, noise="fixed").clamp(-1, 1))
    assert images[:, 2] == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match="direction of 8 numbers"):
        move(generator, w, torch.ones(7), [1])
    with pytest.raises(ValueError, match="0 everywhere"):
        move(generator, w, torch.zeros(8), [1])


# --- XRAI ----------------------------------------------------------------------------------------------------

SQUARE = np.zeros((32, 32), bool)
SQUARE[8:18, 12:22] = True


def squares(n=2, seed=0):
    """A bright square at a known place and a bright disc elsewhere, on a dull ground, uint8 (n, 3, 32, 32)."""
    images = np.random.default_rng(seed).integers(60, 80, (n, 3, 32, 32))
    images[:, :, SQUARE] = 200
    images[:, :, 22:30, 2:10] = 200
    return images.astype(np.uint8)


def by_square(images):
    """Class 1's output is the square's brightness alone."""
    inside = images[:, :, torch.from_numpy(SQUARE)].mean((1, 2))
    return torch.stack([-inside, inside], 1)


def test_heat_lies_on_the_square_that_alone_counts():
    maps, masks = xrai(by_square, squares(), [1, 1], keep=SQUARE.mean(), steps=10)
    assert maps.dtype == np.float32
    assert masks.dtype == bool
    assert (heat_share(maps, SQUARE) > 0.6).all()  # segments are dilated by a pixel
    assert SQUARE.mean() < 0.1
    for mask in masks:
        assert (mask & SQUARE).sum() / SQUARE.sum() > 0.8
    decoy = np.zeros((32, 32), bool)
    decoy[22:30, 2:10] = True
    assert (heat_share(maps, decoy) < 0.05).all()


def test_a_salient_part_is_the_hottest_share_with_its_ties():
    maps = np.arange(100.0).reshape(1, 10, 10)
    assert salient(maps, 0.15).sum() == 15
    assert salient(maps, 0.15)[0].ravel()[85:].all()
    assert salient(np.ones((1, 10, 10)), 0.15).all()


def test_heat_shares_are_arithmetic():
    maps = np.array([[[3.0, 1], [-5, 0]], [[-1, -1], [0, 0]]])
    region = np.array([[True, False], [True, False]])
    assert heat_share(maps, region) == pytest.approx([0.75, np.nan], nan_ok=True)


def test_regions_have_the_area_of_a_disc():
    assert disc(200, 0.5).mean() == pytest.approx(np.pi / 16, abs=1e-3)
    assert disc(200, [0.5, 1]).mean((1, 2)) == pytest.approx([np.pi / 16, np.pi / 4], abs=1e-3)
    assert frame_ring(200).mean() == pytest.approx(1 - np.pi / 4, abs=1e-3)


def test_xrai_refuses_what_it_cannot_explain():
    with pytest.raises(ValueError, match="one class per image"):
        xrai(by_square, squares(), [1])
    with pytest.raises(ValueError, match="keep is a share"):
        xrai(by_square, squares(), [1, 1], keep=0)
    with pytest.raises(ValueError, match="one colour"):
        xrai(by_square, np.zeros((1, 3, 32, 32), np.uint8), [1])


# --- TCAV ----------------------------------------------------------------------------------------------------


class Weighed(nn.Module):
    """Class 1's logit grows with the first of four features of an image, falls with the second, bends with both."""

    def __init__(self):
        super().__init__()
        self.features = nn.Flatten()

    def forward(self, images):
        x = self.features(images)
        logit = 2 * x[:, 0] - x[:, 1] + 0.1 * x[:, 0] * x[:, 1]
        return torch.stack([-logit, logit], 1)


def features(n, seed, **shifted):
    """Images (n, 1, 2, 2) of small noise, with some of the four features shifted."""
    images = 0.15 * torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))
    for place, shift in shifted.items():
        images[:, int(place[1:])] += shift
    return images.clamp(-1, 1).view(n, 1, 2, 2)


def random_sets(network, pairs=12, size=20):
    return [activations(network, network.features, features(size, 100 + i)) for i in range(2 * pairs)]


def score_concept(network, **shifted):
    sensitivity = sensitivities(network, network.features, features(40, 1), target=1)
    return tcav(sensitivity, activations(network, network.features, features(20, 2, **shifted)), random_sets(network))


def test_activations_are_the_layers_output():
    network, images = Weighed(), features(300, 0)
    assert activations(network, network.features, images) == pytest.approx(images.flatten(1).numpy(), abs=1e-7)
    with pytest.raises(ValueError, match="did not run once"):
        activations(network, nn.Flatten(), images)


def test_sensitivities_are_the_gradient_on_the_way_from_grey():
    network, images = Weighed(), features(5, 0)
    x = images.flatten(1).double().numpy()
    expected = np.zeros_like(x)
    expected[:, 0], expected[:, 1] = (
        2 + 0.05 * x[:, 1],
        -1 + 0.05 * x[:, 0],
    )  # the mean over the way is half of the bend
    assert sensitivities(network, network.features, images, target=1) == pytest.approx(expected, abs=1e-5)


def test_a_concept_vector_points_to_what_was_shifted():
    shifted, others = (features(60, seed).flatten(1).numpy() for seed in (0, 1))
    shifted[:, 2] += 0.6
    vector, accuracy = concept_vector(shifted, others)
    assert vector[2] > 0.95
    assert np.linalg.norm(vector) == pytest.approx(1)
    assert accuracy > 0.9
    with pytest.raises(ValueError, match="3 images or more"):
        concept_vector(np.zeros((2, 4)), np.zeros((9, 4)))


def test_concepts_that_count_come_out_with_their_sign_and_others_do_not():
    network = Weighed()
    for_it, against, beside = (score_concept(network, **{name: 0.6}) for name in ("f0", "f1", "f2"))
    assert np.mean(for_it["scores"]) > 0.99
    assert for_it["derivative_test"]["low"] > 0.3
    assert for_it["accuracy_test"]["low"] > 0.2
    assert np.mean(against["scores"]) < 0.01
    assert against["derivative_test"]["high"] < -0.1
    assert abs(np.mean(beside["derivatives"])) < 0.15
    assert beside["accuracy_test"]["low"] > 0.2  # the network could see it and does not use it


def test_a_concept_that_is_not_there_has_no_accuracy():
    found = score_concept(Weighed())
    assert abs(found["accuracy_test"]["value"]) < 0.2
    assert np.mean(found["random_accuracies"]) == pytest.approx(0.5, abs=0.15)


def test_scores_are_captums(tmp_path):
    from captum.attr import LayerIntegratedGradients
    from captum.concept import TCAV, Classifier, Concept

    network, inputs = Weighed(), features(40, 1)
    vector = np.array([1.0, 2, 0, 0]) / 5**0.5  # along it the two features cancel, and the bend decides

    class Ours(Classifier):
        def __init__(self):
            pass

        def train_and_eval(self, dataloader, test_split_ratio=0.33, **kwargs):
            return {"accs": torch.tensor(0.0)}

        def weights(self):
            return torch.as_tensor(np.stack([vector, -vector])).float()

        def classes(self):
            return [0, 1]

    both = [Concept(i, name, features(20, 2 + i).split(10)) for i, name in enumerate(("concept", "random"))]
    method = LayerIntegratedGradients(network, None, multiply_by_inputs=False)
    theirs = TCAV(network, ["features"], layer_attr_method=method, classifier=Ours(), save_path=str(tmp_path))
    scores = theirs.interpret(inputs, [both], target=1, n_steps=5)["0-1"]["features"]["sign_count"]
    sensitivity = sensitivities(network, network.features, inputs, target=1, steps=5)
    assert float((sensitivity @ vector > 0).mean()) == pytest.approx(float(scores[0]), abs=1e-6)
    assert 0.1 < float(scores[0]) < 0.9


def test_tcav_refuses_too_few_sets_and_a_layer_without_effect():
    sets = [np.eye(4)] * 3
    with pytest.raises(ValueError, match="two halves"):
        tcav(np.ones((3, 4)), np.ones((4, 4)), sets)
    with pytest.raises(ValueError, match="every sensitivity is 0"):
        tcav(np.zeros((3, 4)), np.eye(4) + 1, [np.eye(4)] * 4)


# --- edge cases ----------------------------------------------------------------------------------------------


def test_edge_cases_are_right_and_unsure():
    labels = np.array([1, 1, 1, 0, 0, 0])
    of_one = np.array([0.9, 0.6, 0.4, 0.1, 0.3, 0.6])
    assert edge_cases(of_one, labels).tolist() == [1, 4]
    assert edge_cases(np.column_stack([1 - of_one, of_one]), labels).tolist() == [1, 4]
    assert edge_cases(of_one, labels, margin=0.05).tolist() == [0, 1, 3, 4]
    with pytest.raises(ValueError, match="needs its label"):
        edge_cases(of_one, labels + 1)


def cosine(a, b):
    return nn.functional.cosine_similarity(a, b, dim=-1).mean().item()


def test_the_published_clip_moves_the_neighbours_away():
    z = torch.randn(400, 512, generator=torch.Generator().manual_seed(0))
    random = torch.Generator().manual_seed(1)
    clipped, free = (neighbours_in_z(z, 3, clip=clip, generator=random) for clip in (True, False))
    assert clipped.shape == (400, 3, 512)
    assert cosine(clipped, z[:, None]) == pytest.approx(0.949, abs=1e-3)
    assert cosine(free, z[:, None]) == pytest.approx(0.998, abs=5e-4)
    assert (free - z[:, None]).abs().max() <= 0.1 + 1e-6
    assert cosine(clipped, z.clamp(-1, 1)[:, None]) > 0.99


def test_neighbours_in_w_lie_at_the_angle_and_as_far_from_the_centre():
    w = torch.randn(20, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    centre = torch.ones(16, dtype=torch.float64)
    for middle in (None, centre):
        found = neighbours_in_w(w, 12, 5, middle, torch.Generator().manual_seed(1))
        seen, turned = (x if middle is None else x - middle for x in (w[:, None], found))
        angle = torch.rad2deg(torch.acos(nn.functional.cosine_similarity(seen, turned, dim=2)))
        assert angle.numpy() == pytest.approx(np.full((20, 5), 12), abs=1e-6)
        assert turned.norm(dim=2).numpy() == pytest.approx(seen.norm(dim=2).expand(20, 5).numpy())
    assert not torch.equal(found[:, 0], found[:, 1])
    with pytest.raises(ValueError, match="below 180"):
        neighbours_in_w(w, 180)
    with pytest.raises(ValueError, match="no direction"):
        neighbours_in_w(torch.zeros(1, 4), 5)


# --- sliders -------------------------------------------------------------------------------------------------


def test_slider_frames_start_end_and_cross_where_they_should(generator):
    frames, values = slider_frames(generator, seed=3, steps=5, columns=2, directions=2)
    assert list(frames) == list(values) == ["truncation", "class", "direction 1", "direction 2"]
    assert all(of.shape == (5, 3, 16, 32) and of.dtype == np.uint8 for of in frames.values())
    assert all(len(of) == 5 for of in values.values())
    untouched = frames["truncation"][-1]
    assert np.array_equal(frames["direction 1"][2], untouched)
    assert np.array_equal(frames["direction 2"][2], untouched)
    assert np.array_equal(frames["class"][0][..., :16], untouched[..., :16])  # the first sample is of class 0
    assert np.array_equal(frames["class"][-1][..., 16:], untouched[..., 16:])  # the second of class 1
    assert not np.array_equal(frames["direction 1"][0], frames["direction 1"][4])
    again, _ = slider_frames(generator, seed=3, steps=5, columns=2, directions=2)
    assert all(np.array_equal(again[name], frames[name]) for name in frames)
    with pytest.raises(ValueError, match="2 steps"):
        slider_frames(generator, steps=1)


class Elements(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in ("input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def of(self, tag):
        return [attrs for name, attrs in self.found if name == tag]


def gradual(steps=3, channels=3):
    frames = np.zeros((steps, channels, 4, 6), np.uint8)
    frames[:] = (40 * np.arange(steps))[:, None, None, None]
    return frames


def test_a_slider_page_stands_alone_and_is_labelled():
    page = slider_html({"frame": gradual(), "skin": gradual(5, 1)}, {"frame": ["none", "half", "all"]})
    elements = Elements(page)
    assert not elements.open
    assert not re.search(r"https?://|src=|@import", page)
    ranges = elements.of("input")
    assert [attrs["max"] for attrs in ranges] == ["2", "4"]
    assert [attrs["for"] for attrs in elements.of("label")] == [attrs["id"] for attrs in ranges]
    assert [attrs["aria-valuetext"] for attrs in ranges] == ["half", "3"]
    boxes = [attrs for attrs in elements.of("div") if "data-values" in attrs]
    assert json.loads(boxes[0]["data-values"]) == ["none", "half", "all"]


@pytest.mark.parametrize("channels", [1, 3])
def test_the_sprite_holds_every_frame_in_order(channels):
    page = slider_html({"frame": gradual(3, channels)})
    sprite = Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,([^)]*)\)", page)[1])))
    pixels = np.asarray(sprite).reshape(4, 18, channels)
    assert [pixels[0, 6 * i, 0] for i in range(3)] == [0, 40, 80]


@pytest.mark.skipif(shutil.which("node") is None, reason="node runs the page's script")
def test_a_moved_slider_shows_its_frame_and_its_text():
    page = slider_html({"frame": gradual()}, {"frame": ["none", "half", "</script>"]})
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)[1]
    values = next(attrs["data-values"] for attrs in Elements(page).of("div") if "data-values" in attrs)
    browser = f"""
    const shown = {{style: {{}}}}, told = {{}}, range = {{max: "2", value: "1"}};
    range.addEventListener = (event, act) => {{ range.act = act; }};
    range.setAttribute = (name, value) => {{ range[name] = value; }};
    const parts = {{input: range, "[role=img]": shown, output: told}};
    const box = {{dataset: {{values: {json.dumps(values)}}}, querySelector: part => parts[part]}};
    globalThis.document = {{getElementById: () => box}};
    {script}
    range.value = "2"; range.act();
    console.log(JSON.stringify([shown.style.backgroundPosition, told.textContent, range["aria-valuetext"]]));
    """
    found = subprocess.run(["node", "-e", browser], capture_output=True, text=True, check=True, timeout=60).stdout
    assert json.loads(found) == ["100% 0", "</script>", "</script>"]


def test_two_pages_share_no_id_and_names_are_escaped():
    name = '</script><b id="x">"&'
    pages = [slider_html({name: gradual()}, {name: ["</div>", "'\"", "<i>"]}) for _ in range(2)]
    ids = [[attrs["id"] for _, attrs in Elements(page).found if "id" in attrs] for page in pages]
    assert not set(ids[0]) & set(ids[1])
    assert not Elements(pages[0]).of("b")
    assert not Elements(pages[0]).of("i")
    assert name in [attrs.get("aria-label") for attrs in Elements(pages[0]).of("div")]


def test_sliders_refuse_what_cannot_slide():
    with pytest.raises(ValueError, match="one name or more"):
        slider_html({})
    with pytest.raises(ValueError, match="uint8 frames"):
        slider_html({"a": gradual(1)})
    with pytest.raises(ValueError, match="3 frames and 2 labels"):
        slider_html({"a": gradual()}, {"a": ["1", "2"]})
    with pytest.raises(ValueError, match="no frames"):
        slider_html({"a": gradual()}, {"b": ["1"]})
