"""The reading test: a fair and whole page, its arithmetic in both languages, and the paper's survey."""

import base64
import io
import json
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from lookalike.reading_test import _hide, score, survey, write

NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="the page's arithmetic runs in node, which is not installed")


@pytest.fixture
def sides():
    """Real images are dark, synthetic ones bright; the first pixel numbers them."""
    real, synthetic = np.full((30, 3, 8, 8), 40, np.uint8), np.full((25, 3, 8, 8), 200, np.uint8)
    real[:, 0, 0, 0], synthetic[:, 0, 0, 0] = np.arange(30), np.arange(25)
    return real, synthetic


@pytest.fixture
def page(tmp_path, sides):
    """write(...) and the text of what it wrote."""

    def made(**settings):
        settings = {"seed": 0, "title": "Lesions <b> & co", "per_side": 10} | settings
        real, synthetic = settings.pop("sides", sides)
        return write(tmp_path / "test.html", real, synthetic, **settings), (tmp_path / "test.html").read_text("utf-8")

    return made


def script(html, name):
    return re.search(f'<script id="{name}"[^>]*>(.*?)</script>', html, re.DOTALL)[1]


def data_of(html):
    return json.loads(script(html, "data"))


def pixels(url):
    kind, content = url.split(",", 1)
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))


def in_node(html, expression, timeout=60):
    """The value of a JavaScript expression after the page's arithmetic."""
    code = f"{script(html, 'arithmetic')}\nprocess.stdout.write(JSON.stringify({expression}))"
    done = subprocess.run([NODE, "-"], input=code, capture_output=True, text=True, timeout=timeout, check=True)
    return json.loads(done.stdout)


# --- the page -----------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.tags = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def test_the_page_asks_for_no_other_file(page):
    _, html = page()
    for tag, attributes in Tags(html).tags:
        assert tag not in ("link", "iframe", "object", "base", "form")
        assert not {"src", "href", "action", "srcset"} & attributes.keys(), tag
    assert "default-src 'none'" in html
    assert not re.findall(r"https?:|fetch\(|XMLHttp|WebSocket|@import|url\(", html)


def test_every_image_is_a_drawn_one_once_and_unchanged(page, sides):
    said, html = page()
    shown = [pixels(url) for url in data_of(html)["images"]]
    assert said["images"] == len(shown) == 20
    kinds = Counter((int(image[7, 7, 0]), int(image[0, 0, 0])) for image in shown)
    assert set(kinds.values()) == {1}
    assert Counter(kind for kind, _ in kinds) == {40: 10, 200: 10}
    for image in shown:
        number, real = int(image[0, 0, 0]), image[7, 7, 0] == 40
        np.testing.assert_array_equal(image.transpose(2, 0, 1), sides[0 if real else 1][number])


def test_grey_images_are_shown_too(page, sides):
    _, html = page(sides=[side[:, :1] for side in sides])
    assert pixels(data_of(html)["images"][0]).shape == (8, 8)


def test_the_order_is_shuffled_and_repeats_with_the_seed(page):
    orders = {}
    for seed in (0, 0, 1):
        said, html = page(seed=seed)
        bright = tuple(pixels(url)[7, 7, 0] == 200 for url in data_of(html)["images"])
        orders.setdefault(seed, []).append((said["id"], bright, html))
    (first, again), (other,) = orders[0], orders[1]
    assert first == again
    assert first[0] != other[0]
    assert first[1] != other[1]
    assert first[1] != tuple(sorted(first[1]))


@needs_node
def test_the_hidden_truth_is_that_of_the_images(page):
    _, html = page()
    data = data_of(html)
    bright = [int(pixels(url)[7, 7, 0] == 200) for url in data["images"]]
    assert in_node(html, f"reveal({json.dumps(data['hidden'])}, {data['key']})") == bright
    assert data["hidden"] != "".join(map(str, bright))


@needs_node
@pytest.mark.parametrize("key", [1, 12345, 2**31, 2**32 - 1])
def test_python_hides_what_javascript_reveals(page, key):
    truths = np.random.default_rng(key).integers(0, 2, 200).tolist()
    assert in_node(page()[1], f"reveal({json.dumps(_hide(truths, key))}, {key})") == truths


def test_the_hidden_text_says_nothing_by_itself():
    """As many turned bits as not, over many keys."""
    rng = np.random.default_rng(0)
    keys = rng.integers(1, 2**32, 400)
    texts = np.array([list(_hide([0] * 50 + [1] * 50, int(key))) for key in keys]).astype(int)
    for half in (texts[:, :50], texts[:, 50:]):
        assert half.mean() == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(half.size))


def test_a_title_is_text_not_markup(page):
    _, html = page(title="</script><b>x</b>")
    assert data_of(html)["title"] == "</script><b>x</b>"
    assert "b" not in [tag for tag, _ in Tags(html).tags]


def test_every_control_has_a_name_and_every_id_exists(page):
    _, html = page()
    tags = Tags(html).tags
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'element\("([\w-]+)"\)', script(html, "page")))
    assert used
    assert used <= set(ids)
    assert {a[k] for _, a in tags for k in ("for", "aria-labelledby") if k in a} <= set(ids)
    assert all(a.get("type") == "button" for tag, a in tags if tag == "button")
    assert [a["lang"] for tag, a in tags if tag == "html"] == ["en"]
    assert re.findall(r"<button[^>]*>\s*</button>", html) == []


@needs_node
def test_keys_buttons_undo_and_result(page):
    """The page's own script against a document of stubs: answers by key and button, one undone, the result read."""
    _, html = page()
    stub = """
    const made = {}, listeners = {};
    const document = {
      getElementById: id => made[id] ??= {classList: {toggle() {}}, focus() {}, select() {}, textContent: ""},
      addEventListener: (name, call) => { listeners[name] = call; }};
    const window = {addEventListener() {}};
    """
    act = """
    const press = (key, more = {}) => listeners.keydown({key, preventDefault() {}, ...more});
    const truths = reveal(data.hidden, data.key), steps = [];
    press("Backspace");                                  // nothing to undo yet
    press("ArrowLeft", {ctrlKey: true}); press("ArrowRight", {repeat: true}); press("x");
    steps.push(answers.length);
    press("ArrowRight"); press("ArrowLeft"); steps.push([...answers]);
    press("Backspace"); made.undo.onclick(); steps.push([...answers]);
    for (const t of truths) t ? press("ArrowRight") : made.real.onclick();
    press("ArrowLeft"); steps.push(answers.length, made.finish.hidden, made.real.disabled);
    press("Backspace"); steps.push(made.finish.hidden, made.real.disabled);
    press(truths.at(-1) ? "ArrowLeft" : "ArrowRight");   // the last one wrong
    made.finish.onclick(); press("Backspace");
    process.stdout.write(JSON.stringify({steps, result: JSON.parse(made.copyable.value),
      sentence: made.sentence.textContent, shown: made.result.hidden === false && made.test.hidden}));
    """
    data = f"document.getElementById('data').textContent = {json.dumps(script(html, 'data'))};"
    code = "\n".join([stub, data, script(html, "arithmetic"), script(html, "page").replace('"use strict";', ""), act])
    done = subprocess.run([NODE, "-"], input=code, capture_output=True, text=True, timeout=60, check=True)
    found = json.loads(done.stdout)
    assert found["steps"] == [0, [1, 0], [], 20, False, True, True, False]
    assert found["shown"]
    assert found["sentence"].startswith("19 of 20 right: 95.0 % (95 % interval 75.1 to 99.9 %), better than chance")
    result = found["result"]
    assert result["right"] == 19
    expected = score(result["answers"], result["truths"])
    assert {key: result[key] for key in expected} == pytest.approx(expected, abs=1e-9)


# --- what may be read, and how much of it --------------------------------------------------------------------


def test_both_sides_hold_the_same_classes(page, sides):
    """Class 1 is rare among the real images and common among the synthetic ones."""
    labels = np.arange(30) < 8, np.arange(25) >= 8
    _, html = page(labels=[of.astype(int) for of in labels], per_side=15)
    seen = Counter()
    for url in data_of(html)["images"]:
        image = pixels(url)
        side = int(image[7, 7, 0] == 200)
        seen[side, bool(labels[side][image[0, 0, 0]])] += 1
    assert seen == {(0, False): 8, (0, True): 7, (1, False): 8, (1, True): 7}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"restricted": True}, "restricted"),
        ({"per_side": 26}, "25 synthetic images, fewer than the 26"),
        ({"per_side": 0}, "at least one"),
        ({"labels": [[0] * 30, [0] * 24]}, "one label per image"),
        ({"labels": [[0] * 28 + [1] * 2, [0, 1] * 12 + [0]]}, "Class 1 has 2 images"),
    ],
)
def test_a_test_that_cannot_be_fair_is_refused(page, tmp_path, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        page(**settings)
    assert not (tmp_path / "test.html").exists()


def test_images_that_differ_in_shape_or_kind_are_refused(page, sides):
    real, synthetic = sides
    for wrong, sentence in [
        ((real, synthetic[..., :7]), "one shape"),
        ((real.astype(float), synthetic), "real images must be uint8"),
        ((real, synthetic[:, [0, 1]]), "synthetic images must be uint8"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            page(sides=wrong)


# --- the arithmetic -----------------------------------------------------------------------------------------


@needs_node
def test_the_pages_intervals_and_p_values_are_scipys(page):
    cases = [(k, n) for n in (1, 7, 200, 1000) for k in sorted({0, 1, n // 3, n // 2, n // 2 + 1, n - 1, n})]
    calls = ", ".join(f"[...clopperPearson({k}, {n}), pValue({k}, {n})]" for k, n in cases)
    for (k, n), (low, high, p) in zip(cases, in_node(page()[1], f"[{calls}]")):
        exact = stats.binomtest(k, n)
        interval = exact.proportion_ci(method="exact")
        assert (low, high) == pytest.approx((interval.low, interval.high), abs=1e-9)
        assert p == pytest.approx(exact.pvalue, rel=1e-9)


@needs_node
def test_the_page_scores_as_python_does(page):
    rng = np.random.default_rng(0)
    html = page()[1]
    for chance in (0.5, 0.8, 1.0, 0.0):
        truths = rng.permutation(np.repeat([0, 1], 100))
        answers = np.where(rng.random(200) < chance, truths, 1 - truths)
        found = in_node(html, f"score({answers.tolist()}, {truths.tolist()})")
        assert found == pytest.approx(score(answers, truths), abs=1e-9)


@needs_node
def test_the_sentence_says_which_side_of_chance(page):
    """60 of 100 has an interval above one half, 55 has not."""
    html = page()[1]
    truths = [0, 1] * 50
    for right, words in [(65, "better than chance"), (55, "no different from chance"), (30, "worse than chance")]:
        answers = [t if i < right else 1 - t for i, t in enumerate(truths)]
        assert words in in_node(html, f"describe(score({answers}, {truths}))")
    assert "You lean to synthetic" in in_node(html, f"describe(score({[1] * 100}, {truths}))")


def test_counts_by_truth_and_the_tendency():
    found = score([0, 0, 0, 1, 0, 1], [0, 0, 1, 1, 1, 0])
    assert found["right"] == 3
    assert found["said_real"] == pytest.approx(4 / 6)
    names = ("real_as_real", "real_as_synthetic", "synthetic_as_real", "synthetic_as_synthetic")
    assert [found[name] for name in names] == [2, 1, 2, 1]
    assert sum(found[name] for name in names) == found["n"] == 6


def test_a_reader_with_a_tendency_is_at_chance():
    """Always "real": half right with equal sides, which is why they are equal."""
    found = score(np.zeros(200, int), np.repeat([0, 1], 100))
    assert (found["accuracy"], found["p"], found["said_real"]) == (0.5, 1.0, 1.0)


def test_a_reader_who_sees_is_found_and_one_who_guesses_is_not():
    rng = np.random.default_rng(0)
    truths = np.repeat([0, 1], 100)
    p = {chance: [score(np.where(rng.random(200) < chance, truths, 1 - truths), truths)["p"] for _ in range(300)]
         for chance in (0.5, 0.65)}  # fmt: skip
    assert np.mean(np.less(p[0.5], 0.05)) < 0.08
    assert np.mean(np.less(p[0.65], 0.05)) > 0.95


@pytest.mark.parametrize("pair", [([0, 1], [0]), ([], []), ([0, 2], [0, 1]), ([[0]], [[0]])])
def test_answers_that_do_not_fit_are_refused(pair):
    with pytest.raises(ValueError, match=r"Every image needs|0 \(real\) or 1"):
        score(*pair)


# --- the paper's survey -------------------------------------------------------------------------------------


def test_54_percent_of_800_answers_is_above_chance():
    found = survey()
    assert (found["answers"], found["right"]) == (800, 432)
    assert found["p"] == pytest.approx(0.026, abs=5e-4)
    assert (found["low"], found["high"]) == pytest.approx((0.505, 0.575), abs=5e-4)


def test_the_rounding_of_54_percent_leaves_p_between_012_and_052():
    assert survey()["p_range"] == pytest.approx([stats.binomtest(k, 800).pvalue for k in (436, 428)])
    assert survey(printed=0)["p_range"] == [survey()["p"]] * 2


def test_one_reader_of_200_images_needs_115_right():
    needed = survey()["one_reader"]
    assert stats.binomtest(needed, 200).pvalue < 0.05 < stats.binomtest(needed - 1, 200).pvalue
    assert needed == 115


def test_readers_who_err_alike_undo_the_significance():
    """Errors that share a part: at the likeness given, 5 % of blind surveys reach 432 or its mirror, not 2.6 %."""
    likeness = survey()["likeness"]
    assert likeness == pytest.approx(0.111, abs=5e-4)
    rng = np.random.default_rng(0)
    image, own = rng.random((2000, 200, 1)) < 0.5, rng.random((2000, 200, 4)) < 0.5
    shared = rng.random((2000, 200, 4)) < np.sqrt(likeness)
    right = np.where(shared, image, own).sum((1, 2))
    beyond = np.mean(np.abs(right - 400) >= 32)
    assert beyond == pytest.approx(0.05, abs=0.015)
    assert survey(accuracy=0.5)["likeness"] == 0
    assert survey(readers=1)["likeness"] is None


def test_unanimous_images_are_as_few_as_independent_readers_of_one_class_give():
    found = survey()["unanimous"]
    rng = np.random.default_rng(0)
    right = (rng.random((2000, 200, 4)) < 0.54).sum(2)
    seen = [(right == 4).sum(1).mean(), (right == 0).sum(1).mean()]
    assert found["expected"] == pytest.approx(seen, rel=0.03)
    assert found["expected_of_half"] == pytest.approx([8.5, 4.5], abs=0.05)
    as_few = np.mean((right % 4 == 0).sum(1) <= 12)
    assert found["p_as_few"] == pytest.approx(as_few, abs=0.002)
    assert found["p_as_few"] < 0.01
