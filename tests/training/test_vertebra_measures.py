"""Region classifiers and diversity of vertebrae: numbers against slow twins, and a generator that has collapsed."""

import dataclasses
import json

import numpy as np
import pytest
import scipy.stats
import torch
from safetensors.torch import save_file
from scipy.spatial.distance import cdist
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, roc_auc_score

from lookalike.data import datasets, phantoms
from lookalike.metrics.classifiers import Training, fit
from lookalike.metrics.subsets import patient_parts
from lookalike.training import vertebra_measures
from lookalike.training.vertebra_measures import (
    RegionNetwork,
    classify_regions,
    coverage_rows,
    decile_rows,
    load_points,
    load_probabilities,
    map_diversity,
    region_gap,
    region_scores,
)

SIDE = 16
COUNTS = {"train": 60, "val": 24, "test": 30}
ELSEWHERE = "phantom_vertebrae_elsewhere"
TRAINING = {"data": "phantom_vertebrae", "elsewhere": ELSEWHERE, "image_size": SIDE, "epochs": 2, "lr": 0.01, "seed": 0}
MAP = {"data": "phantom_vertebrae", "image_size": SIDE, "fit_rows": 100, "shown": 50, "seed": 0}


def units(seed, n, split="train"):
    return phantoms.vertebrae(n, seed, split=split, image_size=SIDE).image_set


def small_load(name, split="train", image_size=None):
    """The phantoms of `datasets.load`, fewer of them."""
    if name == ELSEWHERE:
        found = units(3, 36, "test")
        return dataclasses.replace(found, images=found.images // 2, name=ELSEWHERE)
    return units(list(COUNTS).index(split), COUNTS[split], split)


def many_load(name, split="train", image_size=None):
    return units(list(COUNTS).index(split), {"train": 240, "val": 120}[split], split)


def save_samples(folder, images):
    samples = {"images": torch.tensor(images.images), "labels": torch.tensor(images.labels)}
    save_file(samples, folder / "samples.safetensors")
    return str(folder)


def classified(n=120, seed=0, skill=1.0):
    """Labels (n,), probabilities (n, 3) and 20 subjects whose images go together."""
    rng = np.random.default_rng(seed)
    labels, subjects = rng.integers(0, 3, n), np.arange(n) // 6
    logits = rng.normal(size=(n, 3)) + rng.normal(size=(20, 3))[subjects] + skill * np.eye(3)[labels]
    return labels, np.exp(logits) / np.exp(logits).sum(1, keepdims=True), subjects


# --- the classifier -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load", small_load)
        return folder, classify_regions(folder, train_on="real", **TRAINING)


def test_the_network_has_the_paper_s_parameters():
    network = RegionNetwork().build((9, 64, 64), 3)
    assert sum(p.numel() for p in network.parameters()) == 11_196_867
    assert network.conv1.weight.shape == (64, 9, 7, 7)
    training = RegionNetwork().training
    optimizer = training.optimizer(network.parameters())
    assert (training.epochs, training.batch_size) == (20, 32)
    assert [optimizer.defaults[key] for key in ("lr", "momentum", "weight_decay")] == [1e-4, 0.9, 0]


def test_the_loss_falls_on_one_batch():
    images = units(0, 24)
    classifier = RegionNetwork(Training(12, 24, lambda weights: torch.optim.SGD(weights, lr=0.01, momentum=0.9)))
    loss = fit(classifier, classifier.views(images), images.labels, 3)[1]["loss"]
    assert loss[-1] < 0.2 * loss[0]


def test_a_stage_s_numbers_are_those_of_its_probabilities(trained):
    folder, found = trained
    json.dumps(found, allow_nan=False)
    assert (found["images"], sum(found["per_class"]), len(found["loss"])) == (60, 60, 2)
    assert found["parameters"] == 11_196_867
    kept = load_probabilities(folder)
    for name, images in (("home", small_load("", "test")), ("elsewhere", small_load(ELSEWHERE, "test"))):
        assert (kept[name]["labels"] == images.labels).all()
        assert (kept[name]["subjects"] == images.subjects).all()
        for selection, row in found["chosen"].items():
            scores = kept[name][selection]
            assert scores.shape == (len(images), 3)
            np.testing.assert_allclose(scores.sum(1), 1)
            expected = balanced_accuracy_score(images.labels, scores.argmax(1))
            assert row[name] == found["balanced_accuracy"][name][row["epoch"] - 1] == pytest.approx(expected)


def test_each_selection_takes_its_own_best_epoch(trained):
    found = trained[1]
    assert found["chosen"]["last"]["epoch"] == 2
    for name in ("val", "elsewhere"):
        values = found["balanced_accuracy"][name]
        assert found["chosen"][name][name] == max(values)
        assert found["chosen"][name]["epoch"] == 1 + values.index(max(values))


def test_a_training_repeats_and_watching_it_changes_nothing(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load", small_load)
    again = classify_regions(tmp_path, train_on="real", **TRAINING)
    assert again == trained[1]
    images = small_load("", "train")
    classifier = RegionNetwork(Training(2, 32, lambda w: torch.optim.SGD(w, lr=0.01, momentum=0.9)))
    unwatched = fit(classifier, classifier.views(images), images.labels, 3, seed=0)[1]
    assert unwatched["loss"] == trained[1]["loss"]


def test_made_images_train_in_the_place_of_real_ones(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load", small_load)
    found = classify_regions(tmp_path, train_on=save_samples(tmp_path, units(9, 40)), **TRAINING)
    assert found["images"] == 40
    assert found["trained_on"] == tmp_path.name
    assert found["loss"] != trained[1]["loss"]


def test_sets_that_do_not_go_together_are_refused(tmp_path, monkeypatch):
    def load(name, split="train", image_size=None):
        found = small_load(name, split)
        return changes[sentence](found) if name == ELSEWHERE else found

    monkeypatch.setattr(datasets, "load", load)
    changes = {
        "other classes": lambda s: dataclasses.replace(s, classes=("L1", "L2", "L3")),
        "9 and 3 slices": lambda s: dataclasses.replace(s, images=s.images[:, :3]),
        "no image of lumbar": lambda s: s.subset(s.labels < 2),
    }
    for sentence in changes:
        with pytest.raises(ValueError, match=sentence):
            classify_regions(tmp_path, train_on="real", **TRAINING)


# --- scores -------------------------------------------------------------------------------------------------


def test_region_scores_are_scikit_learns():
    labels, scores, subjects = classified()
    found = region_scores(labels, scores, subjects, ["C", "T", "L"], resamples=200)
    for k, name in enumerate("CTL"):
        assert found["auc"][name]["value"] == pytest.approx(roc_auc_score(labels == k, scores[:, k]))
    assert found["auc"]["macro"]["value"] == pytest.approx(roc_auc_score(labels, scores, multi_class="ovr"))
    assert found["balanced_accuracy"]["value"] == pytest.approx(balanced_accuracy_score(labels, scores.argmax(1)))
    np.testing.assert_allclose(found["confusion"], confusion_matrix(labels, scores.argmax(1), normalize="all"))
    np.testing.assert_allclose(found["recall"], confusion_matrix(labels, scores.argmax(1), normalize="true"))
    assert found["auc"]["macro"]["over_images"]["n"] == 120
    assert found["auc"]["macro"]["over_subjects"]["n"] == 20
    json.dumps(found, allow_nan=False)


def test_the_macro_interval_is_scipy_s_bca():
    """The same generator draws the same resamples, so that only rounding is between them."""
    labels, scores, _ = classified(60)

    def macro(labels, *columns):
        return roc_auc_score(labels, np.stack(columns, 1), multi_class="ovr")

    theirs = scipy.stats.bootstrap(
        (labels, *scores.T), macro, paired=True, vectorized=False, n_resamples=200, method="BCa", rng=0
    ).confidence_interval
    ours = region_scores(labels, scores, resamples=200)["auc"]["macro"]["over_images"]
    assert (ours["low"], ours["high"]) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


def test_without_subjects_nothing_is_said_of_them():
    labels, scores, _ = classified()
    for subjects in (None, np.zeros(120)):
        assert region_scores(labels, scores, subjects, resamples=50)["balanced_accuracy"]["over_subjects"] is None


def test_images_that_go_together_widen_the_interval():
    labels, scores, subjects = classified(skill=0.5)
    found = region_scores(labels, scores, subjects, resamples=500)["auc"]["macro"]
    widths = [found[unit]["high"] - found[unit]["low"] for unit in ("over_images", "over_subjects")]
    assert widths[1] > widths[0]


def test_the_gap_is_the_difference_and_tells_a_better_classifier():
    labels, scores, subjects = classified(skill=2.5)
    worse = classified(skill=0.2)[1]
    found = region_gap(labels, scores, worse, subjects, resamples=300)
    expected = [roc_auc_score(labels, s, multi_class="ovr") for s in (scores, worse)]
    assert found["auc"]["value"] == pytest.approx(expected[0] - expected[1])
    assert all(found["auc"][unit]["low"] > 0 for unit in ("over_images", "over_subjects"))
    none = region_gap(labels, scores, scores, subjects, resamples=50)["balanced_accuracy"]["over_subjects"]
    assert (none["value"], none["p"]) == (0, 1)


# --- diversity ----------------------------------------------------------------------------------------------


def test_deciles_of_the_same_distribution_are_alike_as_often_as_they_say():
    """1,000 rows of 10: the share within the interval is 0.95 or a little more, for counts are whole."""
    rng, inside = np.random.default_rng(0), []
    for _ in range(100):
        rows = decile_rows(rng.exponential(size=60), rng.exponential(size=200))
        inside += [row["alike_low"] <= row["share"] <= row["alike_high"] for row in rows]
    assert 0.94 <= np.mean(inside) <= 0.98


def test_deciles_hold_a_tenth_of_the_unseen_and_all_of_the_others():
    rng = np.random.default_rng(1)
    unseen, other = rng.normal(size=83), rng.normal(size=37)
    rows = decile_rows(unseen, other)
    assert [row["decile"] for row in rows] == list(range(1, 11))
    assert sum(row["unseen"] for row in rows) == pytest.approx(1)
    assert all(row["unseen"] * 83 in (8, 9) for row in rows)
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    edges = [-np.inf] + [row["upto"] for row in rows[:-1]] + [np.inf]
    assert rows[-1]["upto"] is None
    for row, low, high in zip(rows, edges, edges[1:]):
        assert row["share"] == pytest.approx(((low < other) & (other <= high)).mean())
        assert row["low"] <= row["share"] <= row["high"]
    with pytest.raises(ValueError, match="10 unseen images or more, not 9"):
        decile_rows(unseen[:9], other)


def test_coverage_rows_are_means_of_their_regions():
    far, labels = np.arange(40.0), np.arange(40) % 2
    covered = {"synthetic": (far < 30).astype(float), "control": np.where(far < 38, 0.5, 0.0)}
    rows = coverage_rows(covered, far, labels, np.arange(40) // 4, ("upper", "lower"), resamples=200)
    by_region = {row["region"]: row for row in rows}
    assert {name: row["units"] for name, row in by_region.items()} == {
        "all": 40, "fringe": 4, "core": 36, "upper": 20, "lower": 20,
    }  # fmt: skip
    assert by_region["fringe"]["synthetic"]["value"] == 0
    assert by_region["fringe"]["control"]["value"] == 0.25
    assert by_region["fringe"]["gap"]["value"] == -0.25
    assert by_region["core"]["synthetic"]["value"] == pytest.approx(30 / 36)
    assert by_region["upper"]["gap"]["value"] == pytest.approx(15 / 20 - 0.5 * 19 / 20)
    assert by_region["all"]["gap"]["over_subjects"]["n"] == by_region["all"]["subjects"] == 10
    assert by_region["all"]["gap"]["over_images"]["n"] == 40
    with pytest.raises(ValueError, match="0 unseen images are of middle"):
        coverage_rows(covered, far, labels, classes=("upper", "lower", "middle"))


def coverage(unseen, real, subjects, made, seed):
    to_real, to_made = (vertebra_measures._all_distances(unseen, x) for x in (real, made))
    return vertebra_measures._coverage(to_real, to_made, subjects, seed)


def test_coverage_is_that_of_every_pair_and_halves_share_no_patient():
    """The slow twin: all distances, five halvings, both ways round; a made set larger than a half is drawn from."""
    real, unseen = units(0, 60), units(1, 20)
    x, own = (s.images.reshape(len(s), -1) for s in (real, unseen))
    made = units(9, 24).images.reshape(24, -1)
    far, near = cdist(own.astype(float), x), cdist(own.astype(float), made).min(1)
    found = coverage(own, x, real.subjects, made, seed=4)
    expected = {1: np.zeros(20), 5: np.zeros(20)}
    for halving in range(5):
        halves = patient_parts(real.subjects, 2, 4 + halving)
        assert not set(real.subjects[halves[0]]) & set(real.subjects[halves[1]])
        for half in halves:
            for k, sums in expected.items():
                sums += (near < np.sort(far[:, half], 1)[:, k - 1]) / 10
    for k in (1, 5):
        np.testing.assert_allclose(found[k]["synthetic"], expected[k])
    whole = coverage(own, x, real.subjects, np.concatenate([made, made]), seed=4)
    np.testing.assert_allclose(whole[1]["control"], 0.5)  # one half is nearer, then it is the reference


def test_a_copy_of_the_real_images_meets_the_control_and_far_images_cover_nothing():
    real, unseen = units(0, 60).images.reshape(60, -1), units(1, 20).images.reshape(20, -1)
    alone = np.arange(60).astype(str)
    found = coverage(unseen, real, alone, real, seed=0)
    assert found[1]["synthetic"].mean() == pytest.approx(found[1]["control"].mean(), abs=0.2)
    assert coverage(unseen, real, alone, 255 - real, seed=0)[5]["synthetic"].max() == 0
    with pytest.raises(ValueError, match="4 real images to measure to, fewer than 5"):
        coverage(unseen, real[:8], alone[:8], real, seed=0)


def test_the_distance_to_other_patients_leaves_out_one_s_own():
    images = units(0, 30)
    rows = images.images.reshape(30, -1)
    far = cdist(rows.astype(float), rows)
    own = np.sort(np.where(images.subjects[:, None] == images.subjects, np.inf, far), 1)
    np.testing.assert_allclose(vertebra_measures._reach_of_others(rows, images.subjects, 4), own[:, 3])
    np.fill_diagonal(far, np.inf)
    alone = vertebra_measures._reach_of_others(rows, np.arange(30), 4)
    np.testing.assert_allclose(alone, np.sort(far, 1)[:, 3])


@pytest.fixture(scope="module")
def collapsed(tmp_path_factory):
    """A generator that makes six units again and again, with a grain of noise."""
    folder = tmp_path_factory.mktemp("collapsed")
    rng, made = np.random.default_rng(0), units(9, 6)
    made = made.subset(np.arange(120) % 6)
    noise = rng.integers(-2, 3, made.images.shape)
    made = dataclasses.replace(made, images=np.clip(made.images + noise, 0, 255).astype(np.uint8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load", many_load)
        return folder, map_diversity(folder, synthetic=save_samples(folder, made), **MAP)


@pytest.fixture(scope="module")
def perfect(tmp_path_factory):
    """One that draws from the very distribution: other exams of the same world."""
    folder = tmp_path_factory.mktemp("perfect")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load", many_load)
        return folder, map_diversity(folder, synthetic=save_samples(folder, units(9, 120)), **MAP)


def covered(found, region, k, space="pixels"):
    wanted = {"space": space, "k": k, "region": region}
    row = next(row for row in found["coverage"] if wanted.items() <= row.items())
    return row["synthetic"]["value"], row["control"]["value"], row["gap"]


def shares(found, of, space="pixels"):
    return [row for row in found["deciles"] if (row["space"], row["set"]) == (space, of)]


@pytest.mark.parametrize("space", ["pixels", "smooth"])
def test_a_collapsed_generator_covers_no_fringe_and_real_images_do(collapsed, space):
    made, real, gap = covered(collapsed[1], "fringe", 5, space)
    assert made < 0.4 < 0.7 < real
    assert gap["value"] == pytest.approx(made - real)
    assert covered(collapsed[1], "all", 1, space)[2]["over_subjects"]["high"] < 0
    tenths = [row["share"] for row in shares(collapsed[1], "synthetic", space)]
    assert np.count_nonzero(tenths) <= 7  # six units have six distances, but for the grain


def test_a_perfect_generator_is_as_good_as_real_images(perfect):
    for k in (1, 5):
        for region in ("all", "fringe", "core"):
            gap = covered(perfect[1], region, k)[2]
            assert abs(gap["value"]) < 0.2  # of 12 units on the fringe
    for of in ("synthetic", "control"):
        rows = shares(perfect[1], of)
        assert np.mean([row["alike_low"] <= row["share"] <= row["alike_high"] for row in rows]) >= 0.7
    assert covered(perfect[1], "all", 1)[1] == pytest.approx(0.5)


def test_the_result_is_plain_and_its_sizes_add_up(perfect):
    folder, found = perfect
    json.dumps(found, allow_nan=False)
    assert found["sizes"] == {"train": 240, "fitted": 100, "unseen": 120, "synthetic": 120}
    assert [(row["space"], row["set"]) for row in found["deciles"][::10]] == [
        ("map", "synthetic"), ("pixels", "synthetic"), ("pixels", "control"), ("smooth", "synthetic"),
        ("smooth", "control"),
    ]  # fmt: skip
    assert len(found["coverage"]) == 2 * 2 * 6
    assert all(0.6 < value <= 1 for value in found["trustworthiness"].values())
    points = load_points(folder)
    assert {name: of.shape for name, (of, _) in points.items()} == {
        "train": (100, 2), "unseen": (50, 2), "synthetic": (50, 2),
    }  # fmt: skip
    assert all(len(of) == len(labels) for of, labels in points.values())


def test_a_map_repeats(perfect, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load", many_load)
    again = map_diversity(tmp_path, synthetic=save_samples(tmp_path, units(9, 120)), **MAP)
    assert again == perfect[1]


def test_too_few_points_for_a_neighbourhood_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load", many_load)
    with pytest.raises(ValueError, match="more than 20 images on the map, not 15"):
        map_diversity(tmp_path, synthetic=save_samples(tmp_path, units(9, 40)), **MAP | {"shown": 15})
