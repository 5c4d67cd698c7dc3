import numpy as np
import pytest
import torch

from lookalike.metrics.utility import (
    Classifier,
    accuracy,
    majority,
    predict,
    score,
    train_classifier,
    utility,
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
