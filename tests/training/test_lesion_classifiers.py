"""Table 2's classifier: its size and loss, arms of known make-up, scores against slow twins, and a planted signal."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.metrics import accuracy_score, balanced_accuracy_score, roc_auc_score, roc_curve
from torch import nn

from lookalike.data import datasets, phantoms
from lookalike.metrics import extractors
from lookalike.metrics.classifiers import Training, flip_states
from lookalike.training import lesion_classifiers
from lookalike.training.lesion_classifiers import (
    METRICS,
    AgainstZero,
    FlipsAndTurns,
    LesionHead,
    LesionNetwork,
    arm_differences,
    classify_arms,
    draw_arm,
    lesion_classifier,
    linear_pair,
    load_classifiers,
    load_scores,
    of_logits,
    score_images,
    sensitivity,
    summarise,
)

SIDE = 16
COUNTS = {"train": 80, "val": 40, "test": 60}
ARMS = {
    "real": {"real": True, "synthetic": ""},
    "synth": {"synthetic": "FOLDER"},
    "inverted": {"synthetic": "INVERTED", "per_class": 15},
    "aug, w/o color": {"real": True, "synthetic": ["FOLDER", "INVERTED"], "add": "malignant"},
    "repeats": {"real": True, "add": "repeats"},
}


class Means(nn.Module):
    """Colours on a 4 x 4 grid: features that need no training."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images):
        return self.scale * F.adaptive_avg_pool2d(images, 4).flatten(1)


def means(image_size, device="cpu"):
    return extractors.Extractor(f"means@{image_size}", 48, image_size, Means().requires_grad_(False))


def lesions(seed, n, split="train"):
    """Frames tell the classes in part: the best AUC that they alone can give is 0.85."""
    return phantoms.dermoscopy(n, seed, split=split, image_size=SIDE, frame_probability=(0.1, 0.8)).image_set


def small_load(name, split="train", image_size=None):
    """Phantoms; of the training split three benign lesions for each melanoma."""
    found = lesions(list(COUNTS).index(split), COUNTS[split], split)
    keep = (found.labels == 0) | (np.arange(len(found)) % 6 == 1)
    return found.subset(keep) if split == "train" else found


def save_samples(folder, images, labels):
    folder.mkdir()
    save_file({"images": torch.tensor(images), "labels": torch.tensor(labels)}, folder / "samples.safetensors")
    return str(folder)


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """Folder, result and arms; "inverted" images carry the other class's label."""
    root = tmp_path_factory.mktemp("arms")
    other = lesions(7, 60)
    folders = {
        "FOLDER": save_samples(root / "made", other.images, other.labels),
        "INVERTED": save_samples(root / "turned", other.images, 1 - other.labels),
    }
    arms = json.loads(json.dumps(ARMS))
    for arm in arms.values():
        source = arm.get("synthetic", "")
        arm["synthetic"] = [folders[s] for s in source] if isinstance(source, list) else folders.get(source, "")
    folder = root / "stage"
    folder.mkdir()
    settings = {"image_size": SIDE, "feature_size": SIDE, "epochs": 25, "seeds": [0, 1], "hidden": 30}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load", small_load)
        patch.setattr(extractors, "efficientnet_lite2", means)
        yield folder, classify_arms(folder, data="phantoms", arms=arms, resamples=300, **settings), arms


# --- the classifier -----------------------------------------------------------------------------------------


def test_the_head_is_the_published_one():
    head = LesionHead(means(SIDE))
    network = head.build((1408,), 2)
    assert sum(p.numel() for p in network.parameters()) == 1408 * 500 + 500 + 500 + 1
    assert (head.training.epochs, head.training.batch_size) == (20, 32)
    assert head.training.optimizer(network.parameters()).defaults["lr"] == 5e-4
    assert head.views(lesions(0, 4)).shape == (4, 4, 48)
    x = torch.randn(2, 1408)
    torch.testing.assert_close(network(x)[1] + network(-x)[1], 2 * network(0 * x)[1])  # linear: no activation between


def test_whole_efficientnet_b2_has_the_paper_s_parameters():
    network = LesionNetwork("efficientnet_b2").build((3, 64, 64), 2)
    published = 9_109_994 - 1408 * 1000 - 1000  # B2 without its ImageNet layer
    assert sum(p.numel() for p in network.parameters()) == published + 1408 * 500 + 500 + 501


def test_two_classes_against_zero_are_binary_cross_entropy():
    logit, labels = torch.randn(20, 1), torch.arange(20) % 2
    found = F.cross_entropy(AgainstZero()(logit), labels)
    torch.testing.assert_close(found, F.binary_cross_entropy_with_logits(logit[:, 0], labels.float()))


def test_the_paper_s_flips_and_turns():
    images = torch.rand(64, 3, SIDE, SIDE) * 2 - 1
    augment = FlipsAndTurns(degrees=0)
    one = augment.train()(images[:1].expand(64, -1, -1, -1))
    states = torch.stack([torch.tensor(s) for s in flip_states(images[:1].numpy())])[:, 0]
    near = (one[:, None] - states[None]).abs().flatten(2).amax(2)
    assert near.min(1).values.max() < 1e-5
    assert set(near.argmin(1).tolist()) == {0, 1, 2, 3}
    assert augment.eval()(images) is images
    side = torch.linspace(-1, 1, SIDE + 1)[:-1] + 1 / SIDE
    ramp = (0.5 * side).expand(64, 1, SIDE, SIDE)
    turned = FlipsAndTurns(30).train()(ramp)[:, 0, 5:11, 5:11]  # bilinear pixels turn a plane without an error
    across, down = turned.diff(dim=2) * SIDE / 2, turned.diff(dim=1) * SIDE / 2
    assert across.std((1, 2)).max() < 1e-5
    slope = torch.stack([across.mean((1, 2)), down.mean((1, 2))])
    torch.testing.assert_close(slope.norm(dim=0), torch.full((64,), 0.5))
    degrees = torch.rad2deg(torch.atan2(slope[1].abs(), slope[0].abs()))
    assert 20 < degrees.max() <= 30.001
    bars = torch.ones(64, 3, SIDE, SIDE)
    corner = FlipsAndTurns(30).train()(bars)[:, 0, 0, 0]
    assert corner.min() == -1  # black comes in from outside
    assert corner.max() > 0


def test_a_whole_network_learns_from_a_file_of_weights(tmp_path):
    import timm

    torch.manual_seed(0)
    path = tmp_path / "tiny.safetensors"
    pretrained = timm.create_model("test_efficientnet", num_classes=10)
    save_file({k: v.contiguous() for k, v in pretrained.state_dict().items()}, path)
    classifier = lesion_classifier(feature_size=SIDE, epochs=3, weights=str(path), network="test_efficientnet")
    assert isinstance(classifier, LesionNetwork)
    network = classifier.build((3, SIDE, SIDE), 2)
    torch.testing.assert_close(network[1].network.conv_stem.weight, pretrained.conv_stem.weight)
    images = lesions(0, 16)
    assert classifier.views(images).shape == (16, 1, 3, SIDE, SIDE)
    assert network(classifier.views(images)[:, 0]).shape == (16, 2)


def test_unknown_extractors_are_named():
    with pytest.raises(ValueError, match="efficientnet_lite0, efficientnet_lite1"):
        lesion_classifier("vgg")


# --- scores -------------------------------------------------------------------------------------------------


def scored(n=80, seeds=3, seed=0):
    rng = np.random.default_rng(seed)
    labels = (np.arange(n) % 4 == 0).astype(int)
    return labels, np.round(rng.normal(size=(n, seeds)) + 1.2 * labels[:, None] - 0.5, 1), np.arange(n) // 4


def slow_sensitivity(labels, logits, specificity):
    """By trying every threshold."""
    best = 0.0
    for threshold in np.unique(logits):
        called = logits >= threshold
        if (~called[labels == 0]).mean() >= specificity - 1e-12:
            best = max(best, called[labels == 1].mean())
    return best


@pytest.mark.parametrize("specificity", [0.5, 0.8, 0.95, 1.0])
def test_sensitivity_is_that_of_every_threshold_tried(specificity):
    labels, logits, _ = scored()
    expected = np.mean([slow_sensitivity(labels, column, specificity) for column in logits.T])
    assert sensitivity(labels, logits, specificity=specificity) == pytest.approx(expected)
    fpr, tpr, _ = roc_curve(labels, logits[:, 0], drop_intermediate=False)
    assert sensitivity(labels, logits[:, 0], specificity=specificity) == tpr[fpr <= 1 - specificity + 1e-12].max()


def test_weights_repeat_rows():
    labels, logits, _ = scored()
    weights = np.random.default_rng(1).integers(0, 3, (6, len(labels)))
    for statistic in METRICS.values():
        found = statistic(labels, logits, weights=weights.astype(float))
        repeated = [statistic(np.repeat(labels, row), np.repeat(logits, row, 0)) for row in weights]
        np.testing.assert_allclose(found, repeated)


def test_ties_and_absent_classes():
    labels = np.array([0, 0, 1, 1])
    assert sensitivity(labels, np.zeros(4)) == 0
    assert np.isnan(sensitivity(np.zeros(4, int), np.arange(4.0)))
    assert np.isnan(sensitivity(np.ones(4, int), np.arange(4.0)))


def test_scores_are_those_of_scikit_learn():
    labels, logits, subjects = scored()
    found = summarise(labels, logits, subjects, resamples=300)
    expected = {
        "accuracy": [accuracy_score(labels, x > 0) for x in logits.T],
        "balanced_accuracy": [balanced_accuracy_score(labels, x > 0) for x in logits.T],
        "auc": [roc_auc_score(labels, x) for x in logits.T],
    }
    for name, values in expected.items():
        assert found[name]["value"] == pytest.approx(np.mean(values))
        assert found[name]["over_seeds"]["value"] == pytest.approx(np.mean(values))
        assert found[name]["low"] < found[name]["value"] < found[name]["high"]
    assert (found["auc"]["n"], found["auc"]["over_seeds"]["n"]) == (20, 3)
    assert of_logits(labels, logits, metric="auroc") == found["auc"]["value"]


# --- arms ---------------------------------------------------------------------------------------------------

LABELS = np.array([0] * 10 + [1] * 3 + [0] * 6 + [1] * 6 + [1] * 4)
SOURCE = np.array([""] * 13 + ["both"] * 12 + ["malignant"] * 4)


@pytest.mark.parametrize(
    ("arm", "real", "per_class"),
    [
        ({"real": True}, 13, [10, 3]),
        ({"synthetic": "both"}, 0, [6, 6]),
        ({"synthetic": "both", "per_class": 4}, 0, [4, 4]),
        ({"synthetic": ["both", "malignant"]}, 0, [6, 6]),
        ({"real": True, "synthetic": "both", "add": "malignant"}, 13, [10, 9]),
        ({"real": True, "synthetic": ["both", "malignant"], "add": "malignant"}, 13, [10, 10]),
        ({"real": True, "synthetic": "both", "add": "all"}, 13, [16, 9]),
        ({"real": True, "add": "repeats"}, 20, [10, 10]),
    ],
)
def test_an_arm_draws_what_it_says(arm, real, per_class):
    rows = draw_arm(LABELS, SOURCE, rng=np.random.default_rng(0), **arm)
    assert np.bincount(LABELS[rows], minlength=2).tolist() == per_class
    assert (SOURCE[rows] == "").sum() == real
    made = rows[SOURCE[rows] != ""]
    assert len(set(made.tolist())) == len(made)  # no synthetic image twice


def test_repeats_repeat_evenly():
    rows = draw_arm(LABELS, SOURCE, real=True, add="repeats", rng=np.random.default_rng(0))
    counts = np.bincount(rows, minlength=13)
    assert counts[:10].tolist() == [1] * 10
    assert sorted(counts[10:13].tolist()) == [3, 3, 4]


@pytest.mark.parametrize(
    ("arm", "sentence"),
    [
        ({"synthetic": "both", "add": "malignant"}, "Only an arm with real"),
        ({"real": True, "synthetic": "both", "add": "repeats"}, "no synthetic images"),
        ({"real": True, "add": "some"}, "adds one of"),
        ({"synthetic": "malignant"}, "both classes"),
        ({}, "both classes"),
    ],
)
def test_arms_that_make_no_sense_are_refused(arm, sentence):
    with pytest.raises(ValueError, match=sentence):
        draw_arm(LABELS, SOURCE, rng=np.random.default_rng(0), **arm)


def test_misspelt_settings_of_an_arm_and_of_the_stage_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load", small_load)
    monkeypatch.setattr(extractors, "efficientnet_lite2", means)
    settings = {"data": "phantoms", "image_size": SIDE, "epochs": 1}
    with pytest.raises(ValueError, match="not reel"):
        classify_arms(tmp_path, arms={"real": {"reel": True}}, **settings)
    with pytest.raises(ValueError, match="column of its own"):
        classify_arms(tmp_path, arms={"real": {"real": True}}, selection="test", **settings)


# --- the stage ----------------------------------------------------------------------------------------------


def test_the_stage_is_json_and_counts_its_images(stage):
    found = stage[1]
    json.dumps(found, allow_nan=False)
    assert found["images"] == {"train": [40, 14], "val": [20, 20], "test": [30, 30]}
    counted = {name: (row["per_class"], row["synthetic"]) for name, row in found["arms"].items()}
    assert counted == {
        "real": ([40, 14], 0), "synth": ([30, 30], 60), "inverted": ([15, 15], 30), "aug, w/o color": ([40, 40], 26),
        "repeats": ([40, 40], 0),
    }  # fmt: skip
    assert found["majority"]["accuracy"]["value"] == found["majority"]["auc"]["value"] == 0.5
    assert found["majority"]["sensitivity"]["value"] == 0
    assert (found["subjects"], found["subject_kind"]) == (15, "made-up patient")


def test_a_stage_s_numbers_are_those_of_its_scores(stage):
    folder, found, _ = stage
    kept, test = load_scores(folder), small_load("", "test")
    assert (kept["labels"] == test.labels).all()
    assert len(np.unique(kept["subjects"])) == len(np.unique(test.subjects))
    assert list(kept["arms"]) == list(ARMS)
    for name, row in found["arms"].items():
        for chooser in ("val", "test"):
            logits = kept["arms"][name][chooser]
            assert logits.shape == (60, 2)
            expected = np.mean([roc_auc_score(test.labels, x) for x in logits.T])
            assert row[chooser]["auc"]["value"] == pytest.approx(expected)
            curves = row["balanced_accuracy"]
            assert [1 + np.argmax(curve) for curve in curves[chooser]] == row["epochs"][chooser]
            at = [curve[epoch - 1] for curve, epoch in zip(curves["test"], row["epochs"][chooser])]
            assert row[chooser]["balanced_accuracy"]["value"] == pytest.approx(np.mean(at))
        gap = row["test"]["auc"]["value"] - row["val"]["auc"]["value"]
        assert row["flatters"]["auc"]["value"] == pytest.approx(gap)


def test_choosing_on_the_test_images_never_lowers_what_it_chooses_by(stage):
    gaps = [row["flatters"]["balanced_accuracy"]["value"] for row in stage[1]["arms"].values()]
    assert min(gaps) >= 0
    assert max(gaps) > 0


def test_wrong_labels_are_found(stage):
    """Made images of the right class teach it; the same images with exchanged labels teach the contrary."""
    folder, found, _ = stage
    auc = {name: row["val"]["auc"] for name, row in found["arms"].items()}
    assert auc["real"]["low"] > 0.5
    assert auc["synth"]["low"] > 0.5
    assert auc["inverted"]["high"] < auc["synth"]["low"]
    rows = {(row["arm"], row["metric"]): row for row in arm_differences(folder, resamples=300)}
    assert len(rows) == 4 * 4
    worse = rows["inverted", "auc"]
    assert worse["high"] < 0
    assert worse["p"] < 0.05
    for metric in METRICS:
        of = sorted((row for row in rows.values() if row["metric"] == metric), key=lambda row: row["p"])
        steps = [(len(of) - i) * row["p"] for i, row in enumerate(of)]
        assert [row["p_holm"] for row in of] == pytest.approx(np.minimum(np.maximum.accumulate(steps), 1))
    assert worse["value"] == pytest.approx(auc["inverted"]["value"] - auc["real"]["value"])
    assert worse["over_seeds"]["n"] == 2
    json.dumps(list(rows.values()), allow_nan=False)


def test_saved_networks_give_the_scores_again(stage):
    folder, _, _ = stage
    kept = load_scores(folder)["arms"]
    again = score_images(folder, small_load("", "test"))
    for name, logits in again.items():
        np.testing.assert_allclose(logits, kept[name]["val"], atol=1e-6)
    some = score_images(folder, small_load("", "test").images, ["synth"])
    assert list(some) == ["synth"]
    np.testing.assert_allclose(some["synth"], again["synth"])
    networks, classifier = load_classifiers(folder, ["real"])
    assert len(networks["real"]) == 2
    assert classifier.hidden == 30


def test_arms_that_are_not_there_are_named(stage):
    with pytest.raises(ValueError, match="no arm 'reel'"):
        arm_differences(stage[0], "reel")
    with pytest.raises(ValueError, match="no arm 'reel'"):
        score_images(stage[0], small_load("", "test"), ["reel"])


def test_features_of_restricted_images_are_kept_nowhere(tmp_path):
    import dataclasses

    head = LesionHead(means(SIDE), cache=tmp_path / "cache", training=Training())
    images = lesions(0, 4)
    lesion_classifiers._views(head, dataclasses.replace(images, restricted=True))
    assert not (tmp_path / "cache").exists()
    lesion_classifiers._views(head, images)
    assert len(list((tmp_path / "cache").iterdir())) == 4
    assert isinstance(linear_pair(3)[2], AgainstZero)
