"""Minimal cases of the notes to the authors of StyleGAN2 for dermatology, and what its numbers say of its claims.

Each case stands alone: the paper's own numbers, or a few made ones, on which what a note says can be seen, and what
mends it. Lines are short because the page may show them. No code of the authors is in them.
"""

import io

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy import stats
from scipy.spatial.distance import cdist
from sklearn.model_selection import train_test_split
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lookalike import paths
from lookalike.data import datasets
from lookalike.metrics.distances import frechet_distance
from lookalike.metrics.extractors import random_conv
from lookalike.metrics.scores import auroc
from lookalike.privacy.membership import authenticity
from lookalike.reading_test import survey

REPORTED = paths.book_dir() / "reported" / "stylegan2_dermatology.csv"
BENIGN, OF_2020, ADDED = 32_542, 584, 4_522  # all benign ones and 584 malignant are ISIC 2020's
MALIGNANT, ALL = OF_2020 + ADDED, BENIGN + OF_2020 + ADDED
VALIDATION = round(0.2 * ALL)
CLIENTS = ((1_865, 314), (10_016, 1_407), (18_003, 1_970))  # training images, malignant
SYNTH = ("synth_gan", "synth_cgan", "synth_cgan_no_color")
AUG = ("aug_gan", "aug_cgan", "aug_cgan_no_color")


@pytest.fixture(scope="module")
def table():
    """The paper's numbers by key."""
    printed = pd.read_csv(REPORTED, dtype=str, keep_default_na=False).set_index("key")
    return printed.assign(number=pd.to_numeric(printed.value))


@pytest.fixture(scope="module")
def table1(table):
    """A number of Table 1."""
    return lambda scenario, metric: float(table.number[f"table1/{scenario}/{metric}"])


@pytest.fixture(scope="module")
def table2(table):
    """A number of Table 2, in %."""
    return lambda scenario, metric: float(table.number[f"table2/{scenario}/{metric}"])


# ---- the data ---------------------------------------------------------------------------------------------


def test_the_counts_add_up(table):
    number = table.number
    assert number["text/data/images"] == ALL == 33_126 + ADDED
    assert number["text/data/malignant"] == MALIGNANT
    assert number["text/data/benign"] == BENIGN
    fewer = BENIGN / MALIGNANT
    assert fewer == pytest.approx(6.4, abs=0.05)  # "around 6 times less"


def test_two_percent_is_the_share_of_isic_2020_alone():
    of_2020, of_all = OF_2020 / (BENIGN + OF_2020), MALIGNANT / ALL
    assert of_2020 == pytest.approx(0.018, abs=5e-4)
    assert of_all == pytest.approx(0.136, abs=5e-4)  # what was trained on


def test_22k_synthetic_melanomas_balance_the_training_part():
    labels = np.repeat([0, 1], [BENIGN, MALIGNANT])
    train, validation = train_test_split(labels, test_size=0.2, stratify=labels, random_state=42)
    assert (len(train), len(validation)) == (30_118, 7_530) == (ALL - VALIDATION, VALIDATION)
    assert train.sum() == 4_085
    assert (train == 0).sum() - train.sum() == pytest.approx(22_000, abs=100)


def test_the_archive_alone_beats_every_accuracy_of_table_2(table2):
    """Call malignant what is not of ISIC 2020; no pixel is looked at."""
    malignant = np.repeat([0, 1, 1], [BENIGN, OF_2020, ADDED])
    elsewhere = np.repeat([0, 0, 1], [BENIGN, OF_2020, ADDED])
    accuracy = 100 * (malignant == elsewhere).mean()
    area = 100 * auroc(malignant, np.stack([1 - elsewhere, elsewhere], 1))
    assert accuracy == pytest.approx(98.45, abs=0.005)
    assert area == pytest.approx(94.3, abs=0.05)
    scenarios = ("real", *SYNTH, *AUG)
    assert max(table2(s, "acc") for s in scenarios) == 97.9 < accuracy
    below = [s for s in scenarios if table2(s, "auc") < area]
    assert below == ["synth_gan", "synth_cgan_no_color"]  # the others' AUC needs more


def test_a_planted_frame_gives_the_archives_numbers(table2):
    """A frame on the added images alone: a threshold on one corner pixel, on a tenth of the counts."""
    counts = np.divide([BENIGN, OF_2020, ADDED], 10).astype(int)
    malignant, framed = np.repeat([0, 1, 1], counts), np.repeat([0, 0, 1], counts)
    corner = np.random.default_rng(0).uniform(0.3, 0.9, len(framed)) * (1 - framed)
    assert (malignant == (corner < 0.2)).mean() == pytest.approx(0.9845, abs=2e-4)


def test_split_by_image_nearly_every_patient_is_on_both_sides():
    """2,056 patients with 16 images each; a validation image alone on its side is one in 30 billion."""
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(2_056), 16)
    validation = rng.random(len(patients)) < 0.2
    seen = np.isin(patients[validation], patients[~validation])
    assert seen.mean() == 1
    assert 0.2**15 < 1e-10


def test_the_clients_shares_of_melanoma_differ():
    """Text: "roughly the same as in the whole dataset"."""
    shares = [100 * malignant / n for n, malignant in CLIENTS]
    np.testing.assert_allclose(shares, (16.8, 14.0, 10.9), atol=0.05)
    counts = [[malignant, n - malignant] for n, malignant in CLIENTS]
    assert stats.chi2_contingency(counts).pvalue < 1e-20


def test_2k_12k_20k_are_neither_training_sets_nor_totals(table):
    printed = [table.number[f"text/data/client{i}/images"] for i in (1, 2, 3)]
    train, totals = [n for n, _ in CLIENTS], [2_575, 12_268, 22_805]
    assert sum(totals) == ALL
    assert np.round(train, -3).tolist() == [2_000, 10_000, 18_000]
    assert np.round(totals, -3).tolist() == [3_000, 12_000, 23_000]
    assert printed == [2_000, 12_000, 20_000]


def test_imagenet_normalised_images_leave_a_generators_range():
    """Text: "in all experiments"; StyleGAN2 works in [-1, 1]."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    black, white = (0 - mean) / std, (1 - mean) / std
    assert (black < -1.8).all()
    assert (white > 2.2).all()


def jpeg(images, quality=75):
    """uint8 images (N, 3, H, W) through a JPEG; 75 is Pillow's default."""
    out = []
    for image in images.transpose(0, 2, 3, 1):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        out.append(np.asarray(Image.open(file)))
    return np.stack(out).transpose(0, 3, 1, 2)


def test_a_second_jpeg_moves_the_features_a_little():
    """The real images are saved at 75 once more before training, so FID compares with changed ones."""
    images = datasets.load("phantom_dermoscopy", "val", 32).images
    first = jpeg(images, 95)
    second = jpeg(first)
    extractor = random_conv(0, dim=64)

    def features(pixels):
        return extractor(torch.from_numpy(pixels / 127.5 - 1).float())

    moved = frechet_distance(features(first), features(second))
    halves = frechet_distance(features(first[::2]), features(first[1::2]))
    assert np.abs(first.astype(int) - second).mean() > 1  # grey levels
    assert frechet_distance(features(first), features(first)) < 1e-3 * moved
    assert 0 < moved < halves


def test_a_sixth_of_the_real_images_raises_the_distance():
    """The same generator against its own distribution: mal-GAN's FID has 4k reals, ben-GAN's 26k."""
    rng = np.random.default_rng(0)
    many, few, made = (rng.normal(size=(n, 32)) for n in (1_200, 200, 2_000))
    assert frechet_distance(few, made) > 2 * frechet_distance(many, made)


# ---- the survey -------------------------------------------------------------------------------------------


def test_54_percent_of_800_answers_is_not_chance(table):
    """If the answers are independent; by its rounding p is between .012 and .052."""
    right = table.number["text/survey/accuracy"] / 100
    readers, images = (int(table.number[f"text/survey/{name}"]) for name in ("readers", "images"))
    found = survey(readers, images, right)
    assert (found["answers"], found["right"]) == (800, 432)
    assert found["p"] == pytest.approx(0.026, abs=5e-4)
    assert (found["low"], found["high"]) == pytest.approx((0.505, 0.575), abs=5e-4)
    assert found["p_range"] == pytest.approx([0.012, 0.052], abs=5e-4)


def test_readers_that_err_alike_a_little_would_undo_it():
    """A correlation of .11 between two readers on an image; the paper gives no answers by image."""
    assert survey()["likeness"] == pytest.approx(0.11, abs=0.005)


def test_five_and_seven_alike_are_few_for_all_images_and_usual_for_one_class(table):
    """By "true positives" and "false negatives" they are of one class, about 100 images."""
    right, wrong = table.number["text/survey/all_right"], table.number["text/survey/all_wrong"]
    alike = survey(all_right=int(right), all_wrong=int(wrong))["unanimous"]
    assert sum(alike["expected"]) == pytest.approx(26, abs=0.1)  # 12 were seen
    assert alike["p_as_few"] < 0.003
    assert sum(alike["expected_of_half"]) == pytest.approx(13, abs=0.05)


# ---- the classifier ---------------------------------------------------------------------------------------


def test_always_benign_is_right_in_86_percent(table):
    """Frames removed: 87 %, if that test set has the classes of the whole."""
    removed, benign = table.number["text/frames_removed/accuracy"], 100 * BENIGN / ALL
    assert benign == pytest.approx(86.4, abs=0.05)
    assert 0 < removed - benign < 1
    found = (removed - benign) / (100 - benign)
    assert found == pytest.approx(0.04, abs=0.003)  # of the melanomas, were no benign one wrong


def test_added_images_give_a_tenth_of_a_point_at_most(table2):
    """Text: "a few pp in both scenarios"; a tenth of a point is 8 of 7,530 images."""
    gains = [table2(s, "acc") - table2("real", "acc") for s in AUG]
    losses = [table2("real", "acc") - table2(s, "acc") for s in SYNTH]
    np.testing.assert_allclose(gains, (0, 0, 0.1), atol=1e-9)
    np.testing.assert_allclose(losses, (3.7, 3.1, 5.2), atol=1e-9)
    one_error = 100 * np.sqrt(0.978 * 0.022 / VALIDATION)
    assert max(gains) < one_error  # 0.17 points


def test_the_gan_with_the_best_fid_makes_the_worst_training_set(table1, table2):
    fid = {s: table1(s, "fid") for s in ("cgan", "cgan_no_color")}
    use = {s: table2(f"synth_{s}", "acc") for s in fid}
    assert fid["cgan_no_color"] < fid["cgan"]
    assert use["cgan_no_color"] == min(table2(s, "acc") for s in SYNTH)
    assert use["cgan"] - use["cgan_no_color"] == pytest.approx(2.1)


def test_the_other_two_classifiers_are_slightly_worse(table, table2):
    """Text, without numbers; they stand in the names of checkpoints."""
    gaps = [table2("real", "auc") - table.number[f"text/{name}/auc"] for name in ("googlenet", "resnet50")]
    np.testing.assert_allclose(gaps, (0.15, 0.44), atol=1e-9)


def test_the_best_epoch_on_the_test_images_is_too_good():
    """The "test" set chooses the epoch: 20 equally good ones on 7,530 images, errors independent."""
    rng = np.random.default_rng(0)
    epochs = rng.binomial(VALIDATION, 0.978, (2_000, 20)) / VALIDATION
    flattered = 100 * (epochs.max(1) - epochs.mean(1)).mean()
    assert flattered == pytest.approx(0.31, abs=0.02)  # three times the best gain of Table 2


def epochs_run(accuracies, patience, stop_after=3):
    """Learning rates up to the early stop, with a scheduler of that patience."""
    optimiser = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=5e-4)
    scheduler = ReduceLROnPlateau(optimiser, mode="max", factor=0.2, patience=patience)
    best, waited, rates = -1.0, 0, []
    for accuracy in accuracies:
        best, waited = (accuracy, 0) if accuracy > best else (best, waited + 1)
        if waited >= stop_after:
            break
        optimiser.step()
        scheduler.step(accuracy)
        rates.append(optimiser.param_groups[0]["lr"])
    return rates


def test_with_both_patiences_at_three_the_rate_never_falls():
    """Accuracies in steps of one image, 20 epochs."""
    rng = np.random.default_rng(0)
    runs = 0.95 + rng.integers(0, 100, (50, 20)) / VALIDATION
    assert {rate for run in runs for rate in epochs_run(run, 3)} == {5e-4}
    assert min(min(epochs_run(run, 1)) for run in runs) < 5e-4  # a shorter one acts


# ---- authenticity -----------------------------------------------------------------------------------------


def test_a_first_quartile_cannot_exceed_the_median(table):
    """.013 and .00283; any distances at all."""
    mean, median, q1 = (table.number[f"text/projection/{name}"] for name in ("mean", "median", "q1"))
    assert q1 > median
    rng = np.random.default_rng(0)
    for draw in (rng.exponential, rng.normal, rng.standard_cauchy):
        low, middle = np.quantile(draw(size=(500, 31)), [0.25, 0.5], axis=1)
        assert (low <= middle).all()
    assert mean / 2 == pytest.approx(0.072, abs=5e-4)  # at most that share lies at 2 (Markov)


def test_a_quarter_lies_below_the_first_quartile_copied_or_not():
    """ "Only two projections too close in terms of Q1" of 12,000: 3,000 are below any Q1."""
    rng = np.random.default_rng(0)
    honest = rng.exponential(size=12_000)
    copied = np.where(np.arange(12_000) < 1_000, 1e-6, honest)
    for distances in (honest, copied):
        assert (distances < np.quantile(distances, 0.25)).sum() == 3_000


def test_the_two_smallest_are_two_of_none_and_two_of_a_thousand():
    """argsort()[:2] of an older revision, beside a fixed limit."""
    rng = np.random.default_rng(0)
    honest = rng.exponential(size=12_000)
    copied = np.where(np.arange(12_000) < 1_000, 1e-6 * honest, honest)
    suspects = [set(np.argsort(distances)[:2]) for distances in (honest, copied)]
    assert suspects[1] <= set(range(1_000))
    assert [len(of) for of in suspects] == [2, 2]
    assert (honest < 1e-5).sum() < 10
    assert (copied < 1e-5).sum() >= 1_000


def test_by_the_printed_definition_copies_are_the_most_authentic():
    """Sec. 3.3: the fraction "closer to the training set than other training data points"."""
    rng = np.random.default_rng(0)
    train, held_out = rng.normal(size=(2, 100, 8))
    copies = train + 1e-3 * rng.normal(size=train.shape)
    between = cdist(train, train) + np.diag(np.full(100, np.inf))

    def as_printed(generated):
        distances = cdist(generated, train)
        return (distances.min(1) < between.min(1)[distances.argmin(1)]).mean()

    assert as_printed(copies) == 1 > as_printed(held_out)
    found = authenticity(copies, train, held_out)
    assert found.share == 0 < found.control  # Alaa et al. 2022: farther, not closer


def test_before_one_logit_the_cosine_distance_is_mostly_the_decision():
    """500 values that have learned one direction: 0 within a class, 2 between."""
    rng = np.random.default_rng(0)
    direction = rng.normal(size=500)

    def embedding(decisions):
        return np.outer(decisions, direction) + 0.05 * rng.normal(size=(len(decisions), 500))

    decisions = np.where(np.arange(1_000) < 500, 3.0, -3.0)
    turned = np.where(np.arange(1_000) % 14 == 0, -decisions, decisions)  # 7 % change their class
    real, projected = embedding(decisions), embedding(turned)
    lengths = np.linalg.norm(real, axis=1) * np.linalg.norm(projected, axis=1)
    distances = 1 - (real * projected).sum(1) / lengths
    assert np.median(distances) < 0.003
    assert distances.max() > 1.99
    assert distances.mean() == pytest.approx(0.1444, abs=0.002)  # two kinds are enough for all three


# ---- latents ----------------------------------------------------------------------------------------------


def test_clipping_moves_neighbours_18_degrees_away():
    """U(-0.1, 0.1) on each of 512 values of z, then clipped to [-1, 1]."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(2_000, 512))
    moved = z + rng.uniform(-0.1, 0.1, z.shape)

    def cosine(a, b):
        return ((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).mean()

    assert cosine(z, moved) == pytest.approx(0.998, abs=5e-4)
    assert cosine(z, moved.clip(-1, 1)) == pytest.approx(0.949, abs=1e-3)
    assert np.degrees(np.arccos(0.949)) == pytest.approx(18.4, abs=0.1)
    inside, density = 2 * stats.norm.cdf(1) - 1, stats.norm.pdf(1)
    square = inside - 2 * density + 2 * stats.norm.sf(1)  # E clip(z)^2
    assert inside / np.sqrt(square) == pytest.approx(cosine(z, z.clip(-1, 1)), abs=1e-3)


def test_eig_does_not_sort_so_the_second_vector_is_any():
    """SeFa's "second, fourth and sixth eigenvector" exist only after sorting."""
    values, vectors = np.linalg.eig(np.diag([1.0, 3.0, 2.0]))
    assert values.tolist() == [1, 3, 2]
    assert np.abs(vectors[:, 1]).tolist() == [0, 1, 0]  # the largest stands second
    assert np.linalg.eigh(np.diag([1.0, 3.0, 2.0])).eigenvalues[::-1].tolist() == [3, 2, 1]


def test_columns_of_length_one_give_other_directions():
    """Weights (w_dim, channels); one strong channel leads only while it keeps its length."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(16, 64))
    weights[:, 0] *= 20

    def first(a):
        return np.linalg.eigh(a @ a.T).eigenvectors[:, -1]

    strong = weights[:, 0] / np.linalg.norm(weights[:, 0])
    assert abs(first(weights) @ strong) > 0.99
    assert abs(first(weights / np.linalg.norm(weights, axis=0)) @ strong) < 0.9


def test_a_printed_array_of_55k_seeds_is_abbreviated():
    """A command line made by printing a numpy array."""
    assert "..." not in str(np.arange(1_000))
    assert "..." in str(np.arange(1_001))


def test_the_default_gamma_is_080_on_one_gpu_and_020_on_four():
    """auto: 0.0002 resolution^2 / batch; no command was published."""
    gammas = [0.0002 * 256**2 / batch for batch in (16, 32, 64)]
    np.testing.assert_allclose(gammas, (0.8192, 0.4096, 0.2048))


# ---- federated --------------------------------------------------------------------------------------------


def test_where_ada_starts_anew_each_round_it_never_acts():
    """p rises by at most batch * 4 / 500,000 every fourth of 100 iterations."""

    def largest(batch, iterations=100, every=4, images_to_one=500_000):
        return iterations // every * batch * every / images_to_one

    assert largest(16) == 1_600 / 500_000 == 0.0032
    assert largest(32) == 0.0064  # the loader's batch
    assert largest(16, iterations=31_250) == pytest.approx(1, abs=1e-4)  # in one piece


def test_a_round_is_an_epoch_for_one_client_and_a_tenth_for_another():
    """100 iterations of 16 images everywhere."""
    seen = [1_600 / n for n, _ in CLIENTS]
    np.testing.assert_allclose(seen, (0.86, 0.16, 0.09), atol=0.005)


def test_the_smallest_client_has_a_sixteenth_or_a_third_of_the_average():
    """Which of the two was used is not known."""
    shares = np.divide([n for n, _ in CLIENTS], sum(n for n, _ in CLIENTS))
    np.testing.assert_allclose(shares, (0.062, 0.335, 0.602), atol=5e-4)


# ---- the claims, by the paper's own numbers ---------------------------------------------------------------


def effects(table, table1, table2):
    """{claim: effect, positive where it holds}, of those that the printed numbers can judge."""
    single, conditional = ("ben_gan", "mal_gan"), ("cgan", "cgan_no_color")
    real = {metric: table2("real", metric) for metric in ("acc", "auc")}
    fids, auc = [table1(s, "fid") for s in single], [table2(s, "auc") for s in SYNTH]
    better = [table1("ben_gan", m) - max(table1(s, m) for s in conditional) for m in ("precision", "recall")]
    gap = table1("cgan", "fid") - table1("cgan_no_color", "fid")
    lost = table2("synth_cgan", "acc") - table2("synth_cgan_no_color", "acc")
    return {
        "c1_conditional": min(fids) - table1("cgan", "fid"),
        "c2_no_color_fid": gap,
        "c2_no_color_kid": table1("cgan", "kid") - table1("cgan_no_color", "kid"),
        "c4_path_length": min(table1(s, "ppl") for s in conditional) - max(table1(s, "ppl") for s in single),
        "c4_benign_precision": min(better),
        "c5_experts": 60 - table.number["text/survey/accuracy"],
        "c7_aug_helps": np.mean([table2(s, "acc") for s in AUG]) - real["acc"],
        "c8_aug_harmless": min(table2(s, "auc") for s in AUG) - real["auc"] + 1,
        "c9_real_better": real["auc"] - max(auc),
        "c9_most_kept": (min(auc) - 50) / (real["auc"] - 50) - 0.8,
        "c10_fid_against_use": min(gap, lost),
        "c16_frames_removed": table.number["text/frames_removed/accuracy"] - 100 * BENIGN / ALL,
    }


def test_which_claims_the_papers_own_numbers_bear_out(table, table1, table2):
    found = effects(table, table1, table2)
    assert {f"claim/{name}" for name in found} <= set(table.index[table.claim != ""])
    assert all(effect > 0 for effect in found.values())
    assert found["c7_aug_helps"] == pytest.approx(1 / 30)  # a thirtieth of a point
    assert found["c9_most_kept"] == pytest.approx(0.075, abs=1e-3)
    assert found["c16_frames_removed"] == pytest.approx(0.56, abs=0.01)


def test_the_tables_are_complete(table):
    metrics = ("kid", "fid", "precision", "recall", "ppl")
    first = {f"table1/{s}/{m}" for s in ("ben_gan", "mal_gan", "cgan", "cgan_no_color") for m in metrics}
    second = {f"table2/{s}/{m}" for s in ("real", *SYNTH, *AUG) for m in ("acc", "auc")}
    assert {key for key in table.index if key.startswith("table")} == first | second
    assert (len(first), len(second)) == (20, 14)


def test_what_was_trained_at_256_px_needs_the_papers_data(table):
    trained = table[table.index.str.match("table|claim/")]
    assert all({"full", "data:melanoma_external_256"} <= set(needs.split()) for needs in trained.needs)
    fids = table[table.index.str.endswith(("/fid", "/kid"))]
    assert all("weights:inception" in needs for needs in fids.needs)
