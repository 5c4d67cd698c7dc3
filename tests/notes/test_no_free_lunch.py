"""Minimal cases of the notes to the authors of "No Free Lunch ...", and what must hold of the page that shows them.

Each case stands alone: a few made numbers, or real digits, on which what a note says can be seen, and what mends it.
Lines are short because the page shows them.
"""

import importlib
import inspect
import io
import math
import re

import numpy as np
import pandas as pd
import pytest
import torch
from opacus import GradSampleModule
from scipy.spatial.distance import cdist
from scipy.stats import ks_2samp, wasserstein_distance
from torch import nn

from lookalike import paths, runner
from lookalike.data import datasets
from lookalike.metrics import pixels
from lookalike.metrics.tradeoff import hidden_score
from lookalike.privacy.accounting import pld_epsilon, rdp_epsilon
from lookalike.training.adversarial import Schedule

PAGE = paths.book_dir() / "notes" / "no_free_lunch.md"
REPORTED = paths.book_dir() / "reported" / "no_free_lunch.csv"
EVEN = (np.arange(200) + 0.5) / 200  # 200 numbers spread evenly from 0 to 1
ROWS = [f"D{i}" for i in range(1, 22)] + [f"A{i}" for i in range(1, 8)]
MODULES = (
    "metrics.distances",
    "metrics.intervals",
    "metrics.pixels",
    "metrics.reducers",
    "models.ddpm",
    "models.vae",
    "privacy.density",
    "training.adversarial",
    "training.cells",
    "training.checkpoint",
    "training.controls",
    "training.likelihood",
    "training.measuring",
)


def reported(key):
    """A number of the paper."""
    return pd.read_csv(REPORTED, index_col="key").value[key]


def table_1(family, metric):
    """A row of Table 1: five columns, the first without noise."""
    sigmas = ("0.0", "0.1", "0.2", "0.3", "0.4")
    return np.array([reported(f"table1/mnist/{family}/sigma{s}/{metric}") for s in sigmas])


# ---- the formal guarantee -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon_at", [rdp_epsilon, pld_epsilon])
def test_epsilon_at_the_published_noise(epsilon_at):
    """MNIST: two batches an epoch are a rate of 1/2; 100 images."""
    training = {"sample_rate": 0.5, "steps": 20_000, "delta": 0.01}
    assert epsilon_at(0.1, **training) > 400_000
    assert epsilon_at(0.4, **training) > 20_000
    assert 6 < epsilon_at(32, **training) < 8


def test_a_delta_of_one_half_allows_to_publish_an_image():
    """A fair coin decides whether the query is published."""
    with_query = {"the query": 0.5, "nothing": 0.5}
    without = {"the query": 0.0, "nothing": 1.0}
    excess = [with_query[seen] - without[seen] for seen in with_query]
    delta = sum(max(0.0, x) for x in excess)  # at epsilon 0
    assert delta == 0.5

    training = {"noise_multiplier": 10, "sample_rate": 0.5, "steps": 20_000}
    at_half = rdp_epsilon(delta=0.5, **training)
    at_one_over_n = rdp_epsilon(delta=0.01, **training)
    assert at_half < 0.7 * at_one_over_n


def test_the_private_batch_reaches_the_generator():
    """The classes that it is asked for over a hundred Poisson batches."""
    coins = torch.Generator().manual_seed(0)

    def asked_for(labels):
        drawn = torch.rand(100, len(labels), generator=coins) < 0.5
        return set(labels.expand(100, -1)[drawn].tolist())

    ablated = torch.arange(1, 4).repeat_interleave(10)
    victim = torch.cat([ablated, torch.tensor([0])])  # the query: class 0
    assert asked_for(ablated) == {1, 2, 3}
    assert asked_for(victim) == {0, 1, 2, 3}  # no noise hides the difference

    mended = torch.randint(4, (100, 15), generator=coins)  # all public
    assert set(mended.flatten().tolist()) == {0, 1, 2, 3}


def test_one_image_moves_the_schedule_of_the_generator():
    """Losses of 50 images before any noise; one image is hard."""
    without = torch.full((50,), 0.59)
    with_query = torch.cat([without[:49], torch.tensor([2.0])])

    def generator_steps(losses):
        schedule = Schedule(target=0.0)  # the rule of the private trainings
        return sum(schedule.says_go(losses) for _ in range(130))

    assert generator_steps(without) == 130
    assert generator_steps(with_query) == 8


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_a_pickled_model_holds_training_images():
    """An image is its weight gradient over its bias gradient."""
    images = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    model = GradSampleModule(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)))
    model(images).logsumexp(1).sum().backward()

    torch.save(model, pickled := io.BytesIO())
    pickled.seek(0)
    opened = torch.load(pickled, weights_only=False)
    weight, bias = (p.grad_sample for p in opened.parameters())
    found = weight[:, 0] / bias[:, :1]
    torch.testing.assert_close(found.reshape(images.shape), images)

    torch.save(model.state_dict(), mended := io.BytesIO())
    mended.seek(0)
    assert set(torch.load(mended)) == {"_module.1.weight", "_module.1.bias"}
    assert len(mended.getvalue()) < len(pickled.getvalue()) / 4


# ---- the comparison with sigma 0 ------------------------------------------------------------------------------------


def test_without_noise_the_generator_follows_another_schedule():
    """An undecided discriminator, whose loss is ln 2, for 150 of its steps."""
    undecided = torch.full((50,), math.log(2))

    def generator_steps(target):
        schedule = Schedule(target)
        return sum(schedule.says_go(undecided) for _ in range(150))

    assert generator_steps(target=math.log(2)) == 150  # sigma 0
    assert generator_steps(target=0.0) == 8  # sigma above 0


# ---- the empirical epsilon ------------------------------------------------------------------------------------------


def empirical_epsilon(query, ablated, victim, k=20):
    """ln of the distances to the k-th neighbour, as in the code."""
    far = np.sort(np.linalg.norm(ablated - query, axis=1))
    near = np.sort(np.linalg.norm(victim - query, axis=1))
    return np.log(far[k - 1] / near[k - 1])


def test_the_ratio_of_distances_is_half_of_equation_2():
    """Samples spread evenly over two discs around the query."""
    i = np.arange(1000)[:, None]
    ablated = np.sqrt(i + 0.5) * np.hstack([np.cos(2.4 * i), np.sin(2.4 * i)])
    victim = ablated / 2  # half the radius: four times as dense
    query, equation_2 = np.zeros(2), np.log(4)

    as_published = empirical_epsilon(query, ablated, victim)
    assert as_published == pytest.approx(equation_2 / 2)
    mended = 2 * as_published  # times the number of dimensions
    assert mended == pytest.approx(equation_2)


def test_two_models_without_the_query_differ_too():
    """Normals fitted to halves of ten points; neither saw the query."""
    rng = np.random.default_rng(0)
    same_model, trained_anew = [], []
    for _ in range(300):
        ten = rng.normal(size=(10, 2))
        fits = [(half.mean(0), half.std(0)) for half in (ten[:5], ten[5:])]
        first, again = (rng.normal(*fits[0], size=(1000, 2)) for _ in range(2))
        other = rng.normal(*fits[1], size=(1000, 2))
        same_model.append(empirical_epsilon(np.zeros(2), first, again))
        trained_anew.append(empirical_epsilon(np.zeros(2), first, other))
    assert np.quantile(np.abs(same_model), 0.95) > 0.25
    assert np.quantile(np.abs(trained_anew), 0.95) > 0.5


# ---- Figure 11 ------------------------------------------------------------------------------------------------------


def gap(first, second):
    """Differences of two ECDFs on the range that both sets reach."""
    start, stop = max(first.min(), second.min()), min(first.max(), second.max())
    grid = np.linspace(start, stop, 1000)
    ecdfs = [(values[:, None] <= grid).mean(0) for values in (first, second)]
    return np.abs(ecdfs[0] - ecdfs[1])


def area(first, second):
    return gap(first, second).mean()


def test_the_area_does_not_see_how_near_the_nearest_lie():
    """Unseen images lie at 5 to 6; a fifth of the made ones lies nearer."""
    unseen, others = 5 + EVEN, 5 + EVEN[40:]
    nearer = np.concatenate([np.full(40, 4.9), others])
    copies = np.concatenate([np.zeros(40), others])
    assert area(unseen, nearer) == area(unseen, copies)

    mended = [wasserstein_distance(unseen, made) for made in (nearer, copies)]
    assert mended[1] > 10 * mended[0]


def test_the_ks_distance_hardly_suffers_from_the_cut():
    """Three hundred pairs of sets of 200 distances."""
    rng = np.random.default_rng(0)
    for shape, scale in rng.uniform(0.5, 5, (300, 2)):
        unseen, made = rng.gamma(shape, 1, 200), rng.gamma(2, scale, 200)
        whole = ks_2samp(unseen, made).statistic
        assert gap(unseen, made).max() == pytest.approx(whole, abs=0.02)


def test_one_far_image_in_both_sets_makes_the_area_vanish():
    unseen, made = 5 + EVEN, 4.5 + EVEN
    assert area(unseen, made) > 0.4
    assert area(np.append(unseen, 100), np.append(made, 100)) < 0.02


def test_copies_and_garbage_score_alike():
    """Nearer to the training images than unseen ones, and farther by as much."""
    unseen, copies, garbage = 5 + EVEN, 4.4 + EVEN, 5.6 + EVEN
    assert area(unseen, copies) == pytest.approx(area(unseen, garbage))
    distances = [ks_2samp(unseen, made).statistic for made in (copies, garbage)]
    assert distances[0] == pytest.approx(distances[1])

    mended = [np.median(unseen) - np.median(made) for made in (copies, garbage)]
    assert mended == pytest.approx([0.6, -0.6])


def test_images_never_trained_on_hide_copies():
    """Noisy copies of ten points, held against ten and a hundred."""
    rng = np.random.default_rng(0)
    hundred, unseen = np.split(rng.uniform(size=(500, 2)), [100])
    trained_on = hundred[:10]
    copies = np.tile(trained_on, (40, 1)) + rng.normal(0, 0.05, (400, 2))

    def ks(reference):
        nearest = [cdist(x, reference).min(1) for x in (unseen, copies)]
        return ks_2samp(*nearest).statistic

    assert ks(trained_on) > 0.6
    assert ks(hundred) < 0.25


def test_cutting_sorted_samples_drops_a_class():
    """OrganAMNIST: of a hundred samples of each class 1000 are kept."""
    labels = np.repeat(np.arange(11), 100)
    assert set(labels) - set(labels[:1000]) == {10}

    mended = [np.flatnonzero(labels == c)[:90] for c in range(11)]
    assert [len(rows) for rows in mended] == [90] * 11


# ---- Table 1 and utility --------------------------------------------------------------------------------------------


def test_random_pairs_of_real_digits_meet_the_rows_of_the_gan():
    """Sixty random pairs at 299 px as published, but both of a pair are real."""
    digits = datasets.as_tensor(datasets.load("digits", "train").images)
    order = np.random.default_rng(0).permutation(len(digits))
    real, other = pixels.resized(digits[order[:120]], 299).split(60)
    psnr, ssim = pixels.psnr(real, other), pixels.ssim(real, other)
    assert table_1("gan", "psnr") == pytest.approx(psnr, abs=0.4)
    assert table_1("gan", "ssim") == pytest.approx(ssim, abs=0.04)

    black = pixels.ssim(real, torch.full_like(real, -1.0))
    assert black > ssim
    for family in ("vae", "gan", "ddpm"):
        assert black > table_1(family, "ssim").max()


def test_a_range_taken_from_the_made_images_rewards_brightness():
    """Images too dark and too bright by the same amount, pixels in [-1, 1]."""
    real = torch.zeros(1, 1, 28, 28)
    dark, bright = real - 0.5, real + 0.5
    mended = [pixels.psnr(real, made, 2.0) for made in (dark, bright)]
    assert mended[0] == mended[1]

    ranges = [made.max().item() + 1 for made in (dark, bright)]
    assert ranges == [0.5, 1.5]
    low, high = map(pixels.psnr, (real, real), (dark, bright), ranges)
    assert high - low == pytest.approx(9.54, abs=0.01)  # dB


def test_the_diffusion_model_is_less_faithful_than_the_vae():
    """Table 1: lower is better for FID and LPIPS, higher for SSIM."""
    assert (table_1("ddpm", "fid") > table_1("vae", "fid")).all()
    assert (table_1("ddpm", "lpips") > table_1("vae", "lpips")).all()
    assert (table_1("ddpm", "ssim") < table_1("vae", "ssim")).all()

    lost = [np.ptp(table_1(family, "fid")) for family in ("vae", "ddpm")]
    assert lost[0] > lost[1]


def test_ten_real_images_per_class_beat_what_is_reported():
    """The nearest of a hundred real digits names the class."""
    few = datasets.load("digits", "train").first_per_class(10)
    test = datasets.load("digits", "test")
    asked, known = (x.images.reshape(len(x), -1) / 255 for x in (test, few))
    nearest = cdist(asked, known).argmin(1)
    accuracy = (few.labels[nearest] == test.labels).mean()
    assert accuracy > 0.65
    assert reported("fig10d/mnist/vae/sigma0.0/accuracy") == 0.6
    assert reported("fig10d/mnist/gan/sigma0.4/accuracy") == 0.5


def test_test_statistics_repair_what_the_generator_did_wrong():
    """Made images with a tenth of the contrast, and far too bright."""
    real = torch.rand(50, 1, 28, 28, generator=torch.Generator().manual_seed(0))

    def as_published(made):
        return (made - made.mean()) / made.std() * real.std() + real.mean()

    washed_out = 0.8 + 0.1 * real
    torch.testing.assert_close(as_published(washed_out), real)

    one_bright_pixel = torch.zeros_like(real)
    one_bright_pixel[..., 14, 14] = 1
    assert as_published(one_bright_pixel).max() > 2  # pixels are in 0 to 1


# ---- the code -------------------------------------------------------------------------------------------------------


def test_one_score_of_accuracy_over_epsilon():
    """accuracy in per cent / max(|epsilon|, 0.1)"""
    noise, good = hidden_score(10, epsilon=0.02), hidden_score(90, epsilon=1.0)
    assert noise == 100 > good  # images of noise: chance, and no leak
    assert hidden_score(50, epsilon=2.0) == hidden_score(50, epsilon=-2.0)

    first, second = (60, 0.3), (30, 0.05)
    assert hidden_score(*first) < hidden_score(*second)
    assert hidden_score(*first, floor=0.2) > hidden_score(*second, floor=0.2)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_in_place_activations_fail_under_opacus():
    def trained(inplace):
        activation = nn.LeakyReLU(0.2, inplace=inplace)
        net = nn.Sequential(nn.Conv2d(1, 4, 3), activation, nn.Conv2d(4, 1, 3))
        GradSampleModule(net)(torch.ones(2, 1, 8, 8)).sum().backward()
        return net

    with pytest.raises(RuntimeError, match="modified inplace"):
        trained(inplace=True)
    assert trained(inplace=False)[0].weight.grad_sample.shape[0] == 2


# ---- the page -------------------------------------------------------------------------------------------------------

ON_THE_PAGE = re.findall(r"^:pyobject: (\w+)$", PAGE.read_text("utf-8"), re.MULTILINE)
CASES = [name for name in globals() if name.startswith("test_")]


def ledger():
    """(row, its cells) of the page's tables, in order."""
    lines = re.findall(r"^\| ([AD]\d+) \| (.*) \|$", PAGE.read_text("utf-8"), re.MULTILINE)
    return [(row, cells.split(" | ")) for row, cells in lines]


def test_the_page_shows_every_case_once():
    assert sorted(name for name in ON_THE_PAGE if name.startswith("test_")) == sorted(CASES)


@pytest.mark.parametrize("name", ON_THE_PAGE)
def test_a_case_fits_the_page(name):
    """Wider lines get a scroll bar."""
    assert max(len(line) for line in inspect.getsource(globals()[name]).splitlines()) <= 81


def test_the_ledger_has_every_row_once_and_every_cell():
    assert [row for row, _ in ledger()] == ROWS
    assert all(len(cells) == 4 and all(cells) for _, cells in ledger())


def test_what_the_ledger_names_is_there():
    """Parameters of the chapter and names of the library."""
    known = set(runner.chapter_parameters("no_free_lunch"))
    for module in MODULES:
        known |= set(vars(importlib.import_module(f"lookalike.{module}")))
    named = {name for _, cells in ledger() for name in re.findall(r"`(.+?)`", cells[3])}
    assert named <= known
