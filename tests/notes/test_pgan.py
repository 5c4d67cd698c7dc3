"""Minimal cases of the notes to the authors of pGAN, and what its printed numbers themselves say of its claims.

Each case stands alone: the paper's own numbers, or a few made ones, on which what a note says can be seen, and what
mends it. Lines are short because the page may show them. No code of the authors is in them. The attacks themselves, and
the toys' shares, are tested in tests/privacy/test_reidentification.py.
"""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from scipy.spatial.distance import cdist
from sklearn.metrics import balanced_accuracy_score, roc_curve
from torch import nn
from torchvision.models import resnet18

from lookalike import paths
from lookalike.metrics.intervals import holm
from lookalike.metrics.scores import auroc
from lookalike.models.acgan import morph_labels
from lookalike.privacy.attack import auc
from lookalike.privacy.reidentification import (
    ORIGINS,
    SIZES,
    cut_off,
    cut_off_attack,
    distribution_scores,
    pairwise_scores,
    possible_cut_offs,
    printed_cut_off,
    toy_pairwise,
)

REPORTED = paths.book_dir() / "reported" / "pgan.csv"
ATTACKS, SPACES = ("pairwise", "distribution"), ("toy", "l2", "embedding")
REAL_ROWS = list(itertools.product(ATTACKS, SPACES[1:]))
REGIONS = ("cervical", "thoracic", "lumbar")
TEST_UNITS = (367, 888, 370)  # of A2209's 1625, per region


@pytest.fixture(scope="module")
def table():
    """The paper's numbers by key, value_text as printed."""
    printed = pd.read_csv(REPORTED, dtype=str, keep_default_na=False).set_index("key")
    return printed.assign(number=pd.to_numeric(printed.value))


@pytest.fixture(scope="module")
def shares(table):
    """A row of Table S1: train, val, test."""
    return lambda attack, space, k: [table.number[f"s1/{attack}/{space}/{k}/{o}"] for o in ORIGINS]


@pytest.fixture(scope="module")
def fig3(table):
    """A number of Fig. 3."""
    return lambda kind, name: float(table.number[f"fig3/{kind}/{name}"])


# ---- Table S1 ---------------------------------------------------------------------------------------------


def test_list_index_50_of_a_range_from_5_is_a_cut_off_of_55():
    cut_offs = range(5, 999)
    assert (cut_offs[50], cut_offs[333]) == (55, 338)


def test_the_pixel_rows_alone_date_the_column_50(shares):
    """Column 333 cannot be dated: at that size two decimals fit any number."""
    around_50, around_333 = range(40, 70), range(325, 345)
    for attack in ATTACKS:
        row = shares(attack, "l2", 50)
        assert possible_cut_offs([row], around_50) == [55]
    rows = [shares(*row, 333) for row in itertools.product(ATTACKS, SPACES)]
    assert possible_cut_offs(rows, around_333) == list(around_333)


def test_against_validation_alone_the_embedding_row_is_the_strongest(shares):
    """Text: "at best two thirds" are train; the pixels' row has 35 train, 18 val."""
    cuts = [printed_cut_off(shares(*row, 50), 55) for row in REAL_ROWS]
    found = dict(zip(REAL_ROWS, map(cut_off_attack, cuts)))
    best = found["distribution", "embedding"]
    assert best == max(found.values(), key=lambda a: a.share)
    assert best.share == pytest.approx(34 / 47)  # 0.72
    corrected = holm([a.p_value for a in found.values()])  # order of REAL_ROWS
    np.testing.assert_allclose(corrected, [0.059, 0.059, 0.033, 0.0045], atol=5e-4)


def test_at_the_top_third_no_row_differs_from_chance(shares):
    cuts = [printed_cut_off(shares(*row, 333), 333) for row in REAL_ROWS]
    found = [cut_off_attack(cut) for cut in cuts]
    assert all(0.52 < a.share < 0.54 for a in found)
    assert holm([a.p_value for a in found]).min() > 0.18
    assert all(a.ratio_interval[1] > 1.45 for a in found)  # nor is half as many again excluded


def test_a_sure_leak_of_a_twentieth_reads_as_nearly_indistinguishable(shares):
    """17 of 334 training units known for sure, the rest told by nothing; test units are never called."""
    scores = np.repeat([2.0, 1.0, 0.0], [17, 317 + 333, 333])
    origins = np.repeat(ORIGINS, list(SIZES.values()))
    third = shares("pairwise", "l2", 333)
    among = round(333 * (third[0] + third[1]))  # 303 are train or val
    top = cut_off_attack(cut_off(scores, origins, among))
    assert top.share < third[0] / (third[0] + third[1])  # 0.516, printed 0.527
    assert top.p_value > 0.2

    few = cut_off_attack(cut_off(scores, origins, 35 + 18))
    assert few.share == pytest.approx(35 / 53, abs=0.01)  # the pixels' row at "50"


def test_chance_is_a_half_beside_validation_and_a_third_in_the_table():
    """Scores that say nothing; Fig. S4 leaves one origin out, Table S1 none."""
    rng = np.random.default_rng(0)
    origins = np.repeat(ORIGINS, list(SIZES.values()))
    cuts = [cut_off(rng.normal(size=1000), origins, 333) for _ in range(100)]
    of_all = np.mean([list(cut.shares.values()) for cut in cuts], 0)
    np.testing.assert_allclose(of_all, 1 / 3, atol=0.01)
    beside_val = np.mean([cut_off_attack(cut).share for cut in cuts])
    assert beside_val == pytest.approx(0.5, abs=0.01)
    blind = 7832 / (7832 + 2205)  # on all of F2305
    assert blind == pytest.approx(0.78, abs=0.001)


def test_the_caption_names_the_other_attacks_order():
    """Read as printed, largest first for the pairwise attack, the toy hides its leak."""
    toy = toy_pairwise(0, "sampled")
    nearest = cut_off(-toy.distances, toy.origins, 50)
    largest = cut_off(toy.distances, toy.origins, 50)
    assert (nearest.shares["train"], largest.shares["train"]) == (1, 0)


# ---- the statistic ----------------------------------------------------------------------------------------


def test_over_the_median_a_rare_unit_looks_like_a_member():
    """The text has the minimum, the code the minimum over the median."""
    synthetic = np.array([[0.0], [0.5], [1.0], [1.5], [9.0]])
    copied, rare = [0.9], [10.0]  # 0.1 and 1 from the nearest
    fringe = np.array([copied, rare])
    raw, relative = (pairwise_scores(fringe, synthetic, s) for s in ("min", "min_over_median"))
    assert raw[0] > raw[1]
    assert relative[0] < relative[1]
    assert (np.abs(relative) <= 1).all()  # Fig. 4A's axis; pixels lie about 14 apart


def test_the_size_of_clusters_is_the_thresholds_choice():
    """1 % of all pairs are neighbours, so 100 of 10,000 on average, copied or not."""
    rng = np.random.default_rng(0)
    units = rng.normal(size=(200, 64))
    copies = units[rng.integers(0, 100, 1000)] + 0.1 * rng.normal(size=(1000, 64))
    for synthetic in (copies, rng.normal(size=(1000, 64))):
        counts = distribution_scores(units, synthetic, 0.01)
        assert counts.mean() == pytest.approx(10)
    assert 0.01 * 10_000 == 100  # the largest of Fig. 4B has about 2,100


def test_a_small_set_can_still_crowd_around_a_few():
    """1.28 synthetic per training unit, all of them copies of ten."""
    rng = np.random.default_rng(0)
    units = rng.normal(size=(200, 64))  # 100 train, 100 val
    copied = np.arange(128) % 10
    synthetic = units[copied] + 0.1 * rng.normal(size=(128, 64))
    counts = distribution_scores(units, synthetic, 0.005)
    assert counts[:10].min() >= 12
    assert counts[10:].max() <= 1


def test_the_embeddings_test_units_are_partly_candidates():
    """Of A2209's 1625 the last 333 are candidates; the fit takes [333:1333]."""
    units = np.arange(1625)
    shared = np.intersect1d(units[-333:], units[333:1333])
    assert len(shared) == 41


def test_around_1_2_synthetic_per_real_unit_fits_no_count():
    """10,000 synthetic; 7832 units for the GAN, 10,037 with validation."""
    ratios = np.divide(10_000, (7832, 7832 + 2205))
    np.testing.assert_allclose(ratios, (1.28, 1.00), atol=0.005)


# ---- the toys ---------------------------------------------------------------------------------------------


def test_no_draw_of_the_pairwise_toy_gives_the_printed_share(shares):
    """Table S1: 0.89 train; the notebook prints 1.00."""
    toys = [toy_pairwise(seed, "sampled") for seed in range(50)]
    train = [cut_off(t.scores, t.origins, 333).shares["train"] for t in toys]
    assert shares("pairwise", "toy", 333)[0] == 0.89
    assert min(train) > 0.895


def test_shuffled_features_make_a_stranger_of_a_copy():
    """The density toy shuffles 64 coordinates; the points were meant."""
    rng = np.random.default_rng(0)
    synthetic = rng.normal(size=(2000, 64))

    def nearest(points):
        return np.median(cdist(points, synthetic).min(1))

    features, points = rng.permutation(64), rng.permutation(2000)
    stranger = nearest(rng.normal(size=(200, 64)))
    assert nearest(synthetic[:200, features]) == pytest.approx(stranger, rel=0.03)
    assert nearest(synthetic[points][:200]) == pytest.approx(0, abs=1e-6)


def test_the_length_of_a_point_alone_sorts_the_shuffled_toy():
    """Train adds |.15 n|, validation (.45 + .45 n)^2: longer, so in thinner places."""
    rng = np.random.default_rng(0)
    rows, n = rng.normal(size=(2, 1000, 64))
    train, val = rows + np.abs(0.15 * n), rows + np.square(0.45 * (1 + n))
    short = [-np.linalg.norm(points, axis=1) for points in (train, val)]
    assert auc(*short) > 0.8


def test_keeping_each_origins_largest_parts_what_overlaps():
    """1000 of each are drawn, the third with the most neighbours stays."""
    rng = np.random.default_rng(0)
    train, val = rng.normal(1, 1, 1000), rng.normal(0, 1, 1000)

    def largest(counts):
        return np.sort(counts)[-333:]

    assert auc(train, val) == pytest.approx(0.76, abs=0.02)
    assert auc(largest(train), largest(val)) > 0.88
    assert auc(train[:333], val[:333]) == pytest.approx(0.76, abs=0.04)  # what an attacker has


# ---- the GAN ----------------------------------------------------------------------------------------------


def test_where_the_class_is_surely_wrong_its_probability_has_no_gradient():
    """NLLLoss expects log probabilities; the code gives it the softmax."""

    def pull(likely):
        logits = torch.tensor([[12.0, 0.0, 0.0]], requires_grad=True)
        F.nll_loss(likely(logits, 1), torch.tensor([1])).backward()
        return logits.grad.abs().max()

    assert pull(F.softmax) < 1e-5
    assert pull(F.log_softmax) == pytest.approx(1, abs=1e-4)  # the text


def test_as_a_probability_the_class_counts_at_most_one():
    """Beside a source loss without bound, alpha 1 or not."""
    logits, right = torch.tensor([[30.0, 0.0, 0.0]]), torch.tensor([1])
    assert F.nll_loss(logits.softmax(1), right) == pytest.approx(0, abs=1e-6)  # best -1
    assert F.cross_entropy(logits, right) == pytest.approx(30)


def test_a_morph_in_one_step_has_no_middle():
    """Fig. 2B: "a single step n = 1", and a state of 50 % and 50 %."""

    assert morph_labels(0, 1, n=1).tolist() == [[1, 0, 0], [0, 1, 0]]
    assert morph_labels(0, 1, n=2)[1].tolist() == [0.5, 0.5, 0]


def test_the_released_set_is_in_double_precision():
    """10,000 units of 9 x 64 x 64 in 2.95 GB."""
    values = 10_000 * 9 * 64 * 64
    assert values * 8 / 1e9 == pytest.approx(2.95, abs=0.005)
    assert values / 1e9 < 0.37  # as bytes


def test_weights_are_those_of_the_printed_layers(table):
    """`width`: 64 in the text, 128 in the notebooks."""

    def generator(w):
        pairs = [(103, 8 * w), (8 * w, 4 * w), (4 * w, 2 * w), (2 * w, w), (w, 9)]
        return sum(16 * a * b for a, b in pairs)

    def discriminator(w):
        pairs = [(9, w), (w, 2 * w), (2 * w, 4 * w), (4 * w, 8 * w), (8 * w, w)]
        biases = 2 * w + 4 * w + 8 * w
        return sum(16 * a * b for a, b in pairs) + biases + (1 + 3) * (w + 1)

    for w in (64, 128):
        assert table.number[f"arch/generator_{w}"] == generator(w)
        assert table.number[f"arch/discriminator_{w}"] == discriminator(w)
    network = resnet18(num_classes=3)
    network.conv1 = nn.Conv2d(9, 64, 7, 2, 3, bias=False)
    weights = sum(p.numel() for p in network.parameters())
    assert table.number["arch/resnet18"] == weights


# ---- Fig. 3 -----------------------------------------------------------------------------------------------


def test_the_second_sites_classes_are_rounded_to_sum_to_one():
    """Caption: (0.23, 0.55, 0.22); the notebook: .2258, .5465, .2277."""
    prior = np.divide(TEST_UNITS, sum(TEST_UNITS))
    np.testing.assert_allclose(prior, (0.2258, 0.5465, 0.2277), atol=5e-5)
    assert prior.round(2).tolist() == [0.23, 0.55, 0.23]


def printed_row(table, kind, region):
    """Whole counts that a row of a confusion matrix can stand for."""
    cells = [table.value[f"fig3/{kind}/confusion_{region[0]}{other[0]}"] for other in REGIONS]
    near = [(float(c), 0.5 * 10.0 ** -len(c.split(".")[1]) + 1e-9) for c in cells]
    units = TEST_UNITS[REGIONS.index(region)]
    ranges = [range(math.ceil(1625 * (c - d)), math.floor(1625 * (c + d)) + 1) for c, d in near]
    return [row for row in itertools.product(*ranges) if sum(row) == units]


def confusions(table, fig3, kind):
    """Matrices of counts that fit Fig. 3B and the balanced accuracy of the notebook, both as printed."""
    rows = [printed_row(table, kind, region) for region in REGIONS]
    matrices = np.array(list(itertools.product(*rows)))
    balanced = (np.diagonal(matrices, axis1=1, axis2=2) / TEST_UNITS).mean(1)
    return matrices[np.abs(balanced - fig3(kind, "balanced_accuracy")) <= 5e-5]


def test_the_confusion_of_the_real_classifier_is_one_matrix(table, fig3):
    """Shares of all 1625 units and 0.8932 leave one choice of counts."""
    (counts,) = confusions(table, fig3, "real")
    assert counts.tolist() == [[341, 24, 2], [30, 844, 14], [3, 71, 296]]
    assert np.trace(counts) / 1625 == pytest.approx(0.911, abs=5e-4)


def test_synthetic_training_costs_the_lumbar_units_most(table, fig3):
    """Two matrices fit the synthetic classifier; 0.80 to 0.74 in both."""
    (real,) = confusions(table, fig3, "real")
    found = confusions(table, fig3, "synth")
    assert len(found) == 2
    for synth in found:
        lost = np.diag(real - synth) / TEST_UNITS
        assert lost[2] == pytest.approx(0.058, abs=0.002)
        assert lost[1] < 0.03


def test_swapped_arguments_give_mean_precision(table, fig3):
    """balanced_accuracy_score(true, predicted), not the other way round."""
    (counts,) = confusions(table, fig3, "real")
    true, predicted = np.repeat(np.indices((3, 3)).reshape(2, 9), counts.ravel(), axis=1)
    assert balanced_accuracy_score(true, predicted) == pytest.approx(0.8932, abs=5e-5)
    assert balanced_accuracy_score(predicted, true) == pytest.approx(0.920, abs=5e-4)


def test_the_macro_curves_area_is_the_mean_of_the_classes():
    """Interpolated at all false positive rates: half a step more, at most."""
    rng = np.random.default_rng(0)
    true = np.repeat([0, 1, 2], TEST_UNITS)
    scores = rng.normal(size=(1625, 3)) + 2 * np.eye(3)[true]
    curves = [roc_curve(true == k, scores[:, k])[:2] for k in range(3)]
    grid = np.unique(np.concatenate([fpr for fpr, _ in curves]))
    macro = np.mean([np.interp(grid, *curve) for curve in curves], 0)
    more = np.trapezoid(macro, grid) - auroc(true, scores)
    assert 0 <= more <= 0.5 / (1625 - max(TEST_UNITS))


def test_the_macro_areas_printed_understate_the_gap(fig3):
    """0.97 and 0.96; the class areas leave each macro a part of its rounding."""

    def bounds(kind):
        classes = np.mean([fig3(kind, f"auc_{region}") for region in REGIONS])
        macro = fig3(kind, "auc_macro")
        return max(classes, macro) - 0.005, min(classes, macro) + 0.005

    (real_low, real_high), (synth_low, synth_high) = bounds("real"), bounds("synth")
    assert real_low - synth_high == pytest.approx(0.0133, abs=1e-4)
    assert real_high - synth_low == pytest.approx(0.02)


def test_the_best_epoch_on_the_test_set_is_too_good():
    """20 epochs that are equally good, F_real's recalls on A2209."""
    rng = np.random.default_rng(0)
    recalls = [rng.binomial(n, p, (2000, 20)) / n for n, p in zip(TEST_UNITS, (0.93, 0.95, 0.80))]
    epochs = np.mean(recalls, 0)
    flattered = (epochs.max(1) - epochs.mean(1)).mean()
    assert flattered == pytest.approx(0.016, abs=0.002)  # less if epochs go together


# ---- the claims, by the paper's own numbers ---------------------------------------------------------------


def effects(shares, fig3):
    """{claim: effect, positive where it holds}, of those that the printed numbers can judge."""
    real, synth = fig3("real", "auc_macro"), fig3("synth", "auc_macro")
    of_both = [r[0] / (r[0] + r[1]) for r in (shares(*row, 333) for row in REAL_ROWS)]
    return {
        "c5_real_better": real - synth,
        "c6_use": (synth - 0.5) / (real - 0.5) - 0.8,
        "c10_333": 0.1 - max(abs(share - 0.5) for share in of_both),
    }


def test_which_claims_the_papers_own_numbers_bear_out(shares, fig3):
    found = effects(shares, fig3)
    assert all(effect > 0 for effect in found.values())
    assert found["c6_use"] == pytest.approx(0.179, abs=1e-3)
    assert found["c10_333"] == pytest.approx(0.062, abs=1e-3)


def test_in_balanced_accuracy_nine_tenths_are_kept(fig3):
    kept = (fig3("synth", "balanced_accuracy") - 1 / 3) / (fig3("real", "balanced_accuracy") - 1 / 3)
    assert kept == pytest.approx(0.887, abs=1e-3)  # by macro AUC 0.979


def test_the_table_is_complete(table, shares):
    rows = list(itertools.product(ATTACKS, SPACES, (50, 333)))
    wanted = {"/".join(["s1", a, s, str(k), o]) for a, s, k in rows for o in ORIGINS}
    assert {key for key in table.index if key.startswith("s1/")} == wanted
    assert len(wanted) == 36
    assert all(sum(shares(*row)) == pytest.approx(1, abs=0.0151) for row in rows)


def test_toy_rows_need_nothing_and_the_private_ones_the_data(table):
    s1 = table[table.index.str.startswith("s1/")]
    toy = s1.index.str.contains("/toy/")
    assert set(s1.needs[toy]) == {""}
    assert set(s1.needs[~toy]) == {"full data:pgan_f2305 data:pgan_a2209"}
