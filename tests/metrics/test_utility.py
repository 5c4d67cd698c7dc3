"""Utility: the paper's call, scores against scikit-learn, cached flips against the usual loop, and the table."""

from functools import partial

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from lookalike.data.image_set import ImageSet
from lookalike.metrics.classifiers import (
    FrozenBackbone,
    SmallNetwork,
    TimmClassifier,
    TimmNetwork,
    Training,
    fit,
    flip_states,
    probabilities,
)
from lookalike.metrics.features import random_conv
from lookalike.metrics.scores import METRICS, auprc, auroc, chance_line, confusion, kept, measure
from lookalike.metrics.utility import (
    Classifier,
    accuracy,
    evaluate,
    majority,
    predict,
    predictions,
    score,
    train_classifier,
    utility,
    utility_table,
)


def squares(n, seed, classes=2, side=12):
    """Noisy images whose bright corner is their class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    images = 0.3 * torch.randn(n, 1, side, side, generator=generator) - 0.6
    for image, label in zip(images, labels):
        row, column = 6 * (int(label) // 2), 6 * (int(label) % 2)
        image[:, row : row + 5, column : column + 5] += 1.2
    return images.clamp(-1, 1), labels


@pytest.mark.parametrize(("classes", "count"), [(10, 1_556_746), (4, 1_553_668), (11, 1_557_259)])
def test_classifier_has_the_paper_s_size(classes, count):
    model = Classifier(num_classes=classes)
    assert sum(p.numel() for p in model.parameters()) == count
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, classes)


def test_training_lowers_the_loss_and_learns():
    images, labels = squares(40, 0)
    model = Classifier(num_classes=2, width=8)
    losses = train_classifier(model, images, labels, epochs=12, lr=3e-3, batch_size=16)
    assert len(losses) == 12
    assert losses[-1] < losses[0] / 2
    assert accuracy(model, *squares(40, 1)) > 0.9


def test_training_visits_every_image_once_an_epoch_in_the_generator_s_order():
    seen = []

    class Recorder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, images):
            seen.append(images.flatten().tolist())
            return self.weight * images.flatten(1).repeat(1, 2)

    images = torch.arange(10.0).reshape(10, 1, 1, 1)
    train_classifier(Recorder(), images, torch.zeros(10), 2, 1e-3, 4, torch.Generator().manual_seed(0))
    assert [len(batch) for batch in seen] == [4, 4, 2] * 2
    for epoch in (seen[:3], seen[3:]):
        assert sorted(pixel for batch in epoch for pixel in batch) == list(range(10))
    assert seen[:3] != seen[3:]


def test_utility_learns_what_can_be_learnt_and_nothing_from_shuffled_labels():
    train, labels = squares(64, 0, classes=4)
    test, test_labels = squares(200, 1, classes=4)
    settings = dict(num_classes=4, epochs=15, width=8, lr=3e-3, batch_size=16)
    good = utility(train, labels, test, test_labels, **settings)
    assert good["accuracy"] > 0.9
    assert good["low"] < good["accuracy"] <= good["high"]
    assert (good["n"], good["chance"]) == (200, 0.25)
    shuffled = labels[torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    assert utility(train, shuffled, test, test_labels, **settings)["accuracy"] < 0.6


def test_utility_follows_its_seed_and_leaves_the_random_stream_alone():
    train, labels = squares(8, 0)
    test, test_labels = squares(60, 1)
    settings = dict(num_classes=2, epochs=1, width=4, batch_size=4)
    torch.manual_seed(3)
    first = utility(train, labels, test, test_labels, **settings)
    after = torch.rand(2)
    torch.manual_seed(3)
    torch.testing.assert_close(torch.rand(2), after)
    assert utility(train, labels, test, test_labels, **settings) == first
    others = [utility(train, labels, test, test_labels, seed=seed, **settings) for seed in (1, 2, 3, 4)]
    assert any(other != first for other in others)


def test_equal_pixels_cannot_be_scaled_to_test_statistics():
    flat, labels = np.zeros((4, 1, 28, 28), np.uint8), [0, 1, 0, 1]
    with pytest.raises(ValueError, match="no deviation to scale"):
        utility(flat, labels, flat, labels, 2, epochs=1, width=8, standardise="test_statistics")


def test_test_statistics_move_the_training_images_onto_the_test_set(monkeypatch):
    from lookalike.metrics import utility as module

    handed_over = []
    monkeypatch.setattr(module, "train_classifier", lambda model, images, *rest: handed_over.append(images))
    train, labels = squares(20, 0)
    test, test_labels = squares(20, 1)
    test = test / 3 + 0.5
    for standardise in ("none", "test_statistics"):
        utility(train, labels, test, test_labels, 2, epochs=1, width=4, standardise=standardise)
    plain, moved = handed_over
    torch.testing.assert_close(plain, train)
    assert float(moved.mean()) == pytest.approx(float(test.mean()), abs=1e-5)
    assert float(moved.std()) == pytest.approx(float(test.std()), abs=1e-5)


def test_uint8_pixels_train_like_floats():
    train, labels = squares(8, 0)
    pixels = (train + 1).mul(127.5).round().to(torch.uint8).numpy()
    floats = torch.as_tensor(pixels).float() / 127.5 - 1
    settings = dict(num_classes=2, epochs=2, width=4, batch_size=4)
    assert utility(pixels, labels.numpy(), pixels, labels.numpy(), **settings) == utility(
        floats, labels, floats, labels, **settings
    )


def test_majority_answers_the_most_frequent_training_class():
    found = majority([1, 1, 0, 2], [0, 1, 1, 1, 2, 2, 2, 2], 3)
    assert found["accuracy"] == 3 / 8
    assert found["balanced_accuracy"] == pytest.approx(found["chance"]) == pytest.approx(1 / 3)


def test_balanced_accuracy_weighs_classes_equally():
    found = score([0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 1, 1], 2)
    assert found["accuracy"] == pytest.approx(5 / 6)
    assert found["balanced_accuracy"] == pytest.approx(0.75)


def test_prediction_does_not_depend_on_the_batch():
    images, _ = squares(9, 0)
    model = Classifier(num_classes=3, width=4)
    np.testing.assert_array_equal(predict(model, images, batch_size=2), predict(model, images))


def test_labels_that_do_not_fit_are_refused():
    images, labels = squares(6, 0)
    with pytest.raises(ValueError, match="one label per image"):
        utility(images, labels[:5], images, labels, 2)
    with pytest.raises(ValueError, match="there are 2 classes"):
        utility(images, labels, images, labels + 1, 2)
    with pytest.raises(ValueError, match="standardise is"):
        utility(images, labels, images, labels, 2, standardise="train")


# Scores


@st.composite
def ranked(draw, classes=2):
    """Labels with every class in them, scores (n,) or (n, K) on a coarse grid, and how often each row counts."""
    n = draw(st.integers(classes + 1, 25))
    labels = draw(arrays(int, n, elements=st.integers(0, classes - 1)))
    labels[:classes] = np.arange(classes)
    shape = n if classes == 2 else (n, classes)
    scores = draw(arrays(float, shape, elements=st.integers(0, 6).map(lambda x: x / 6 + 0.1)))
    return labels, scores, draw(arrays(int, n, elements=st.integers(0, 3)))


@settings(max_examples=40)
@given(ranked())
def test_ranks_are_scikit_learns_with_ties_and_with_repeated_rows(drawn):
    labels, scores, counts = drawn
    assert auroc(labels, scores) == pytest.approx(sk.roc_auc_score(labels, scores), abs=1e-12)
    assert auprc(labels, scores) == pytest.approx(sk.average_precision_score(labels, scores), abs=1e-12)
    repeated = np.repeat(labels, counts), np.repeat(scores, counts)
    both = np.stack([counts, np.ones_like(counts)])
    for ours, theirs in ((auroc, sk.roc_auc_score), (auprc, sk.average_precision_score)):
        weighted = ours(labels, scores, weights=both)
        assert weighted[1] == pytest.approx(ours(labels, scores))
        if len(set(repeated[0])) == 2:
            assert weighted[0] == pytest.approx(theirs(*repeated), abs=1e-12)
        elif 1 not in repeated[0] or ours is auroc:
            assert np.isnan(weighted[0])


@settings(max_examples=40)
@given(ranked(classes=3))
def test_the_macro_mean_is_scikit_learns(drawn):
    labels, scores, _ = drawn
    shares = scores / scores.sum(1, keepdims=True)
    assert auroc(labels, shares) == pytest.approx(sk.roc_auc_score(labels, shares, multi_class="ovr"), abs=1e-12)
    assert auprc(labels, shares) == pytest.approx(sk.average_precision_score(labels, shares), abs=1e-12)
    for positive in range(3):
        found = measure(labels, shares, metric="auprc", positive=positive)
        assert found == pytest.approx(sk.average_precision_score(labels == positive, shares[:, positive]))


@settings(max_examples=40)
@given(ranked(classes=3))
def test_hits_and_confusion_are_scikit_learns(drawn):
    labels, scores, counts = drawn
    predicted, weights = scores.argmax(1), np.stack([counts + 1])
    for metric, theirs in (("accuracy", sk.accuracy_score), ("balanced_accuracy", sk.balanced_accuracy_score)):
        assert measure(labels, scores, metric=metric) == pytest.approx(theirs(labels, predicted))
        weighted = measure(labels, scores, metric=metric, weights=weights)
        assert weighted[0] == pytest.approx(theirs(labels, predicted, sample_weight=counts + 1))
    np.testing.assert_array_equal(confusion(labels, scores), sk.confusion_matrix(labels, predicted))


@settings(max_examples=40)
@given(ranked(classes=3))
def test_one_answer_for_all_gives_the_chance_line_and_keeps_nothing(drawn):
    labels, _, counts = drawn
    same = np.zeros((len(labels), 3))
    same[:, np.bincount(labels).argmax()] = 1
    perfect = np.eye(3)[labels]
    weights = np.stack([counts + 1])
    for metric in METRICS:
        for positive in (None, 2):
            which = dict(metric=metric, positive=positive)
            assert measure(labels, same, **which) == pytest.approx(chance_line(labels, 3, **which))
            assert kept(labels, same, perfect, **which) == pytest.approx(0, abs=1e-12)
            assert kept(labels, perfect, perfect, weights=weights, **which)[0] == 1
            assert np.isnan(kept(labels, perfect, same, **which))  # no utility to keep


def test_ranks_of_what_cannot_be_ranked_are_refused():
    with pytest.raises(ValueError, match="labels are 0 and 1"):
        auroc([0, 1, 2], [0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match="one score, a number, per label"):
        auprc([0, 1], [0.1, np.nan])
    for label in (2, -1, 0.5):
        with pytest.raises(ValueError, match="Labels are 0 to 1, one of the 2 classes with a score"):
            measure([0, 1, label], np.eye(3)[:, :2], metric="accuracy")
    with pytest.raises(ValueError, match="A metric is one of auroc"):
        measure([0, 1], np.eye(2), metric="f1")


def test_an_evaluation_names_its_positive_class_its_chance_and_what_is_random():
    rng = np.random.default_rng(0)
    subjects = np.repeat(np.arange(40), 3)
    labels = (np.arange(40) % 4 == 0).astype(int)[subjects]
    logits = rng.normal(1.5 * labels + rng.normal(0, 1, 40)[subjects], 0.3)
    seen = 1 / (1 + np.exp(-np.stack([logits, logits + rng.normal(0, 0.2, 120)], 1)))
    scores = np.stack([1 - seen, seen], 2)  # (N, S, K), two trainings
    found = evaluate(labels, scores, ("benign", "malignant"), subjects=subjects)
    alone = evaluate(labels, scores, ("benign", "malignant"))
    assert (found["auroc"]["n"], alone["auroc"]["n"]) == (40, 120)
    for metric in METRICS:
        assert found[metric]["value"] == alone[metric]["value"]
        assert found[metric]["value"] == pytest.approx(np.mean([measure(labels, s, metric=metric, positive=1)
                                                                for s in (scores[:, 0], scores[:, 1])]))  # fmt: skip
        wide, narrow = (one[metric]["high"] - one[metric]["low"] for one in (found, alone))
        assert wide > 1.2 * narrow  # images of a subject go together
        assert found[metric]["over_seeds"]["n"] == 2
    assert (found["auprc"]["positive"], found["auprc"]["chance"]) == ("malignant", 0.25)
    assert evaluate(labels, scores, ("benign", "malignant"), positive=0)["auprc"]["chance"] == 0.75
    assert (found["auroc"]["chance"], found["accuracy"]["chance"], found["balanced_accuracy"]["chance"]) == (
        0.5, 0.75, 0.5,
    )  # fmt: skip
    assert np.sum(found["confusion"]) == 120
    assert "positive" not in found["accuracy"]


def test_the_share_kept_has_an_interval_that_pairs_the_images():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200)
    hard = rng.normal(size=200)  # what is hard for one is hard for the other
    two = [1 / (1 + np.exp(-(shift * labels + hard + rng.normal(0, 0.3, 200)))) for shift in (1.0, 2.0)]
    weak, strong = (np.stack([1 - p, p], 1) for p in two)
    share = evaluate(labels, weak, reference=strong)["auroc"]["kept"]
    expected = (auroc(labels, weak[:, 1]) - 0.5) / (auroc(labels, strong[:, 1]) - 0.5)
    assert share["value"] == pytest.approx(expected)
    assert 0.3 < share["low"] < share["value"] < share["high"] < 1
    nothing = evaluate(labels, strong, reference=np.full((200, 2), 0.5))["auroc"]["kept"]
    assert np.isnan(nothing["value"])
    assert nothing["low"] is None


def test_a_test_set_without_a_class_is_refused():
    with pytest.raises(ValueError, match="no image of c;"):
        evaluate([0, 1, 0], np.eye(3), ("a", "b", "c"))
    with pytest.raises(ValueError, match="training has diverged"):
        evaluate([0, 1], np.full((2, 2), np.nan))


# Classifiers


def usual_loop(backbone, images, labels, epochs, batch_size, seed, classes):
    """What the cache stands for: every epoch flips the images and runs the frozen backbone on them again."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Linear(backbone.dim, classes)
        optimizer = torch.optim.Adam(head.parameters(), lr=1e-3)
        for _ in range(epochs):
            order, flips = torch.randperm(len(images)), torch.randint(4, (len(images),))
            for index, its_flips in zip(order.split(batch_size), flips.split(batch_size)):
                batch = images[index].clone()
                for row, flip in zip(batch, its_flips):
                    row.copy_(row.flip([axis for axis, bit in ((2, 1), (1, 2)) if int(flip) & bit]))
                loss = nn.functional.cross_entropy(head(backbone(batch).clone()), labels[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return head


def test_cached_flips_train_exactly_as_flipping_and_extracting_in_every_epoch():
    images, labels = squares(22, 0)
    backbone = random_conv(0, image_size=12, dim=16)
    classifier = FrozenBackbone(backbone, training=Training(epochs=6, batch_size=8))
    head, _ = fit(classifier, classifier.views(images), labels, 2, seed=4)
    slow = usual_loop(backbone, images, labels, 6, 8, 4, 2)
    torch.testing.assert_close(head.weight, slow.weight, atol=1e-5, rtol=0)
    torch.testing.assert_close(head.bias, slow.bias, atol=1e-5, rtol=0)
    unflipped = FrozenBackbone(backbone, flips=False, training=classifier.training)
    other, _ = fit(unflipped, unflipped.views(images), labels, 2, seed=4)
    assert (other.weight - head.weight).abs().max() > 1e-3  # these features do depend on the flip


def test_flips_are_the_four_and_each_is_drawn_a_quarter_of_the_time():
    images = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 1, 3, 4)
    states = flip_states(images)
    for state, axes in zip(states, ((), (3,), (2,), (2, 3))):
        np.testing.assert_array_equal(state, np.flip(images, axes))
    seen = []

    class Recorder(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))

        def forward(self, rows):
            seen.append(rows.flatten())
            return rows * self.weight

    views = torch.arange(400.0).reshape(100, 4, 1)  # 100 images, 4 views

    class Recorded(FrozenBackbone):
        def build(self, shape, num_classes):
            return Recorder()

    fit(Recorded(None, training=Training(epochs=40)), views, torch.zeros(100), 2)
    drawn = torch.cat(seen).reshape(40, 100)
    for epoch in drawn:
        assert sorted((epoch // 4).tolist()) == list(range(100))
    shares = torch.bincount((drawn % 4).long().flatten()) / 4000
    torch.testing.assert_close(shares, torch.full((4,), 0.25), atol=0.025, rtol=0)


def test_a_network_by_name_learns_and_takes_weights_for_all_but_its_head(tmp_path):
    images, labels = squares(24, 0, side=32)
    scratch = TimmNetwork("test_resnet", training=Training(epochs=2, batch_size=12))
    network, history = fit(scratch, scratch.views(images), labels, 2)
    assert len(history["loss"]) == 2
    assert probabilities(network, scratch.views(images)).sum(1) == pytest.approx(1)
    assert scratch.name == "test_resnet, from scratch"

    source = TimmClassifier("test_resnet", 3, 10).network
    torch.save(source.state_dict(), path := tmp_path / "weights.pth")
    loaded = TimmClassifier("test_resnet", 1, 2, image_size=48, weights=path)
    own = loaded.network.state_dict()
    same = {name for name, value in source.state_dict().items() if torch.equal(value, own.get(name, torch.empty(0)))}
    assert set(own) - same == {"fc.weight", "fc.bias"}
    assert loaded(images).shape == (24, 2)
    with pytest.raises(ValueError, match="1 or 3 channels; these images have 9"):
        TimmClassifier("test_resnet", 9, 2, weights=path)
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="does not fit the network"):
        TimmClassifier("test_resnet", 3, 2, weights=path)
    assert TimmClassifier("test_resnet", 9, 2)(torch.zeros(2, 9, 32, 32)).shape == (2, 2)


def test_weights_from_a_gpu_are_read_onto_the_cpu(tmp_path, monkeypatch):
    torch.save(TimmClassifier("test_resnet", 3, 10).network.state_dict(), path := tmp_path / "weights.pth")
    places, load = [], torch.load
    monkeypatch.setattr(
        torch, "load", lambda *args, **settings: places.append(settings.get("map_location")) or load(*args, **settings)
    )
    TimmClassifier("test_resnet", 1, 2, weights=path)
    assert places == ["cpu"]


def test_training_follows_its_seed_and_leaves_the_random_stream_alone():
    images, labels = squares(12, 0)
    classifier = FrozenBackbone(random_conv(0, 12, 8), hidden=5, training=Training(epochs=2))
    views = classifier.views(images)
    torch.manual_seed(3)
    first, second, other = (fit(classifier, views, labels, 2, seed)[0][0].weight for seed in (0, 0, 1))
    after = torch.rand(2)
    torch.manual_seed(3)
    torch.testing.assert_close(torch.rand(2), after)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_validation_keeps_the_first_best_epoch_and_without_it_the_last_counts():
    images, labels = squares(12, 0)
    classifier = SmallNetwork(width=4, training=Training(epochs=5, batch_size=4))
    views, values, kept_weights = classifier.views(images), iter([0.1, 0.7, 0.3, 0.7, 0.2]), []

    def validate(network):
        kept_weights.append(network.head.weight.detach().clone())
        network.eval()  # a measure may leave the network so; training must not go on like that
        return next(values)

    network, history = fit(classifier, views, labels, 2, validate=validate)
    assert (history["epoch"], history["val"]) == (1, [0.1, 0.7, 0.3, 0.7, 0.2])
    assert torch.equal(network.head.weight, kept_weights[1])
    last, history = fit(classifier, views, labels, 2)
    assert history["epoch"] == 4
    assert torch.equal(last.head.weight, kept_weights[4])
    with pytest.raises(ValueError, match="every class there"):
        fit(classifier, views, labels, 2, validate=lambda network: float("nan"))


# The table


QUICK = FrozenBackbone(
    random_conv(0, image_size=12, dim=64), training=Training(60, 16, partial(torch.optim.Adam, lr=0.03))
)


def noisy(n, seed, flipped, classes=2):
    """`squares` whose labels are wrong for a share of the images, as a poor generator's would be."""
    images, labels = squares(n, seed, classes)
    wrong = torch.rand(n, generator=torch.Generator().manual_seed(seed)) < flipped
    return images, torch.where(wrong, (labels + 1) % classes, labels)


def test_the_table_ranks_a_good_set_above_a_poor_one_and_both_above_nothing():
    plain = FrozenBackbone(QUICK.extractor, flips=False, training=QUICK.training)  # the corner is the class
    sets = {"good": noisy(60, 1, 0.0), "poor": noisy(60, 2, 0.4)}
    rows = utility_table(sets, noisy(80, 3, 0.0), noisy(100, 4, 0.1), plain, subset=6, resamples=400)
    table = {row["train on"]: row for row in rows}
    assert list(table) == ["good", "poor", "real", "6 real", "majority"]
    assert [row["images"] for row in rows] == [60, 60, 80, 6, 80]
    assert [row["seeds"] for row in rows] == [3, 3, 3, 3, 1]
    value = {name: row["accuracy"]["value"] for name, row in table.items()}
    assert value["majority"] == table["good"]["accuracy"]["chance"]
    assert value["real"] > 0.8 > value["majority"]
    assert value["good"] > value["poor"]
    share = {name: table[name]["auroc"]["kept"] for name in ("good", "poor", "6 real")}
    assert share["good"]["low"] > 0.8
    assert share["good"]["value"] > share["poor"]["value"]
    assert "kept" not in table["real"]["auroc"]
    assert "kept" not in table["majority"]["auroc"]
    assert table["real"]["auroc"]["over_seeds"]["low"] is not None


def test_the_test_labels_never_reach_the_training():
    """Nor do they choose the epoch: with the labels turned, the same probabilities come out."""
    train, val = noisy(20, 0, 0.0), noisy(20, 1, 0.0)
    images, labels = noisy(20, 2, 0.0)
    settings = dict(classifier=QUICK, seeds=(0,), val=val, select="auprc", subset=5)
    first = predictions(train, train, (images, labels), **settings)
    turned = predictions(train, train, (images, 1 - labels), **settings)
    assert list(first) == ["synthetic", "real", "5 real"]
    for name in first:
        np.testing.assert_array_equal(first[name], turned[name])
        assert first[name].shape == (20, 1, 2)
    chosen = predictions(train, train, (images, labels), **settings | {"val": noisy(20, 1, 1.0)})
    assert any((chosen[name] != first[name]).any() for name in first)  # the validation set does choose


def test_a_table_that_would_deceive_is_refused():
    train, test = noisy(12, 0, 0.0), noisy(12, 1, 0.0)
    quick = partial(utility_table, train, train, test, QUICK, (0,))
    with pytest.raises(ValueError, match="12 validation images are test images too"):
        quick(val=test, select="auroc")
    with pytest.raises(ValueError, match="give both `val`"):
        quick(select="auroc")
    with pytest.raises(ValueError, match="`select` is one of auroc"):
        quick(val=train, select="loss")
    with pytest.raises(ValueError, match="from 1 to 12 real training images, not 13"):
        quick(subset=13)
    with pytest.raises(ValueError, match="'real' is the name of another row"):
        utility_table({"real": train}, train, test, QUICK)
    with pytest.raises(ValueError, match="A set is an ImageSet"):
        utility_table(train, train, list(test), QUICK)
    with pytest.raises(ValueError, match="there are 2 classes"):
        utility_table((train[0], train[1] + 1), train, test, QUICK)


def test_image_sets_bring_their_subjects_and_the_names_of_their_classes():
    from lookalike.data import phantoms

    train, test = (phantoms.mammography(n, seed, image_size=16).image_set for n, seed in ((24, 0), (60, 1)))
    rows = utility_table(train, train, test, QUICK, seeds=(0,), resamples=200)
    found = rows[0]["auprc"]
    assert found["n"] == len(np.unique(test.subjects)) < len(test)
    assert found["positive"] == test.classes[1]


def named(n, seed, classes=("dark", "bright"), subjects=None, kind="patient"):
    """An ImageSet whose class "bright" is the bright one, wherever it stands among the classes."""
    rng = np.random.default_rng(seed)
    bright = np.arange(n) % 2
    images = (rng.integers(0, 60, (n, 1, 12, 12)) + 150 * bright[:, None, None, None]).astype(np.uint8)
    labels = np.array([classes.index(("dark", "bright")[b]) if "bright" in classes else b for b in bright], np.int64)
    subjects = np.array([f"{seed}-{i}" for i in range(n)]) if subjects is None else subjects
    return ImageSet(images, labels, subjects, classes, "x", "all", "none", False, "real", subject_kind=kind)


def test_classes_of_other_names_or_in_another_order_are_refused():
    train, test, synthetic = named(12, 0), named(12, 1), named(12, 2)
    turned, other = named(12, 3, ("bright", "dark")), named(12, 4, ("a", "b"))
    for sets in ((synthetic, train, turned), (synthetic, turned, test), (turned, train, test), (other, train, test)):
        with pytest.raises(ValueError, match=r"of another .*: give all the same, in one order"):
            utility_table(*sets, QUICK, (0,))
    with pytest.raises(ValueError, match="The classes of one set are dark, bright, of another bright, dark"):
        predictions({"good": synthetic, "turned": turned}, train, test, QUICK, (0,))
    with pytest.raises(ValueError, match="of another bright, dark"):
        predictions(synthetic, train, test, QUICK, (0,), val=turned, select="auroc")
    unnamed = synthetic.images, synthetic.labels
    assert list(predictions({"good": synthetic, "unnamed": unnamed}, train, test, QUICK, (0,))) == [
        "good", "unnamed", "real",
    ]  # fmt: skip


def test_images_and_known_subjects_on_both_sides_are_refused():
    train, test, val = named(12, 0), named(12, 1), named(12, 2)
    with pytest.raises(ValueError, match="12 training images are test images too; the classifier would be tested on"):
        predictions(val, (test.images, test.labels), test, QUICK, (0,))
    with pytest.raises(ValueError, match="12 subjects have images in both the training and the test set"):
        predictions(val, named(12, 5, subjects=test.subjects), test, QUICK, (0,))
    chosen = partial(predictions, named(12, 4), train, test, QUICK, (0,), select="auroc")
    with pytest.raises(ValueError, match="12 subjects have images in both the validation and the test set; the test"):
        chosen(val=named(12, 2, subjects=test.subjects))
    assert "real" in chosen(val=named(12, 2, subjects=test.subjects, kind="image"))  # numbers of images, not people
    assert "real" in predictions(test, train, test, QUICK, (0,))  # a copier is for other measures to find
