"""Heads on cached features: sizes and noise of the paper, a private step as a slow loop, patients, choice of epoch."""

import dataclasses
import hashlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy.stats import chisquare
from sklearn.metrics import average_precision_score

from lookalike.data import datasets, phantoms
from lookalike.metrics import extractors
from lookalike.privacy.dpsgd import Privacy, PrivateTraining
from lookalike.training import heads

TABLE = {"count": None, "images": None, "epochs": 300, "batch_size": 128, "delta": 1e-4, "noise_multiplier": None}


def some_views(n=60, versions=4, dim=12, seed=0):
    """Features whose first number tells the label, with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (n,), generator=generator)
    views = torch.randn(n, versions, dim, generator=generator)
    views[:, :, 0] += 3 * (2 * labels[:, None] - 1)
    return views, labels


def weights_of(state):
    return torch.cat([t.flatten() for t in state.values()])


@pytest.mark.parametrize(("head", "weights"), [("two-layer", 296_066), ("one-layer", 1_538)])
def test_a_head_on_768_features_has_the_papers_weights(head, weights):
    found = heads.train_head(torch.zeros(4, 1, 768), torch.arange(4) % 2, head=head, seed=0, epochs=0)
    assert found["trainable"] == weights == sum(t.numel() for t in found["last"].values())


@pytest.mark.parametrize(
    ("images", "epsilon", "sigma"),
    [(1104, e, s) for e, s in zip((1, 6, 12, 20, 60), (20.31, 4.336, 2.540, 1.784, 0.961))]
    + [(4104, e, s) for e, s in zip((1, 6, 12, 20, 60), (10.63, 2.344, 1.447, 1.082, 0.683))],
)
def test_the_noise_is_that_of_the_published_loop(images, epsilon, sigma):
    """Opacus' numbers for the authors' settings. Its search stops up to 0.01 below epsilon, ours at epsilon."""
    settings = TABLE | {"count": images, "images": images, "records": "images", "accountant": "rdp"}
    privacy = heads.specify_privacy(**settings, epsilon=epsilon)
    assert privacy.noise_multiplier <= sigma * (1 + 6e-4)  # printed to four digits, or three
    printed = dataclasses.replace(privacy, noise_multiplier=sigma).epsilon(300 * round(1 / privacy.sample_rate))
    assert epsilon - 0.011 <= printed * (1 + 1.5e-3)
    assert printed * (1 - 1.5e-3) <= epsilon
    assert privacy.sample_rate == {1104: 1 / 9, 4104: 1 / 33}[images]
    assert privacy.expected_batch_size == pytest.approx(images * privacy.sample_rate)


@pytest.mark.parametrize(("epsilon", "sigma"), [(1, 18.75), (6, 4.043)])
def test_prv_asks_for_less_noise(epsilon, sigma):
    """Opacus adds an error of 0.01 to its PRV epsilon and stops up to 0.01 below what is asked."""
    settings = TABLE | {"count": 1104, "images": 1104, "records": "images", "accountant": "prv"}
    privacy = heads.specify_privacy(**settings | {"noise_multiplier": sigma}, epsilon=None)
    assert epsilon - 0.02 - 1e-3 * epsilon <= privacy.epsilon(2700) <= epsilon


def test_patients_are_drawn_at_the_rate_of_images():
    settings = TABLE | {"count": 578, "images": 1104, "records": "subjects", "accountant": "rdp"}
    privacy = heads.specify_privacy(**settings, epsilon=6)
    assert (privacy.sample_rate, privacy.records) == (1 / 9, "subjects")
    assert privacy.expected_batch_size == pytest.approx(578 / 9)
    assert privacy.noise_multiplier == pytest.approx(4.336, rel=1e-3)


def test_epsilon_and_noise_together_are_refused():
    settings = {**TABLE, "noise_multiplier": 1.0, "count": 9, "images": 9, "records": "images"}
    with pytest.raises(ValueError, match="not both"):
        heads.specify_privacy(**settings, accountant="rdp", epsilon=1)


@pytest.mark.parametrize("head", heads.HEADS)
@pytest.mark.parametrize("records", ["images", "subjects"])
def test_a_private_epoch_is_the_slow_loop_of_autograd(head, records):
    """Every record's gradient by itself, clipped, summed, noised from the same stream; AdamW by its formula."""
    views, labels = some_views(14, 1, 10)
    subjects = np.array([0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 7, 8, 9]) if records == "subjects" else None
    whose = np.arange(14) if subjects is None else subjects
    privacy = Privacy(1.5, 0.5, 6, 1e-3, max_grad_norm=0.4, records=records)
    network = heads._started(head, 10, 5, None, False)
    lr, decay, state = 1e-2, 1e-2, {}
    stream = heads.stream(5, "head")
    rates = [torch.rand(len(set(whose)), dtype=torch.float64, generator=stream) < 0.5 for _ in range(2)]
    for step, chosen in enumerate(rates, 1):
        total = {p: torch.zeros_like(p) for p in network.parameters()}
        for record in chosen.nonzero().flatten().tolist():
            rows = np.flatnonzero(whose == record)
            loss = F.cross_entropy(network(views[rows, 0]), labels[rows], label_smoothing=0.1, reduction="sum")
            gradients = torch.autograd.grad(loss, list(total))
            norm = torch.stack([g.norm() for g in gradients]).norm()
            for p, g in zip(total, gradients):
                total[p] += g * min(1.0, 0.4 / norm.item())
        for p, summed in total.items():
            g = (summed + 1.5 * 0.4 * torch.empty(p.shape).normal_(generator=stream)) / 6
            m, v = state.get(p, (0, 0))
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            state[p] = m, v
            with torch.no_grad():
                p.mul_(1 - lr * decay)
                p.sub_(lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8))
    found = heads.train_head(
        views, labels, head=head, seed=5, epochs=1, batch_size=7, lr=lr, weight_decay=decay, privacy=privacy,
        subjects=subjects,
    )  # fmt: skip
    expected = weights_of(network.state_dict())
    torch.testing.assert_close(weights_of(found["last"]), expected, atol=2e-5, rtol=1e-4)
    assert found["privacy"]["steps"] == 2


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 14), st.floats(0.1, 3), st.integers(0, 99))
def test_a_patient_weighs_at_most_the_norm_however_many_images(copies, norm, seed):
    """Two data sets that differ in one patient, the same noise: an SGD step of lr 1 differs by at most C / L."""
    views, labels = some_views(8 + copies, 1, 6, seed)
    subjects = np.r_[np.arange(8), np.full(copies, 8)]
    privacy = Privacy(1.0, 1.0, 8, 1e-3, norm, records="subjects")
    moved = []
    for n in (8 + copies, 8):
        network = heads._started("two-layer", 6, 0, None, False)
        before = weights_of(network.state_dict()).clone()
        sgd = torch.optim.SGD(network.parameters(), lr=1.0)
        generator = torch.Generator().manual_seed(seed)
        private = PrivateTraining(network, sgd, privacy, views[:n], subjects[:n], generator)
        private.random.chosen = lambda count, rate: torch.ones(count, dtype=torch.bool)
        for rows in private.batches(1):
            private.step(heads.head_loss, 100 * views[rows, 0], heads.smoothed(labels[rows], 0.1))
        moved.append(before - weights_of(network.state_dict()))
    assert (moved[0] - moved[1]).norm() <= norm / 8 * (1 + 1e-3)


def test_smoothed_targets_give_torchs_label_smoothing():
    network, (views, labels) = heads.build_head("two-layer", 12), some_views()
    ours = heads.head_loss(network, views[:, 0], heads.smoothed(labels, 0.1))
    theirs = F.cross_entropy(network(views[:, 0]), labels, label_smoothing=0.1, reduction="none")
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("private", [False, True])
def test_each_view_is_drawn_as_often_as_the_others(private, monkeypatch):
    """The views say their own number: 40 images, 50 epochs; the chance of a false alarm is one in 10,000."""
    views = torch.arange(4.0).repeat(40, 1)[..., None].expand(-1, -1, 3).contiguous()
    privacy = Privacy(1.0, 0.5, 20, 1e-3) if private else None
    seen, loss = [], heads.head_loss

    def watch(network, rows, targets):
        if network.training and torch.is_grad_enabled():
            seen.append(rows[:, 0])
        return loss(network, rows, targets)

    monkeypatch.setattr(heads, "head_loss", watch)
    arguments = {"head": "one-layer", "seed": 3, "epochs": 50, "batch_size": 20, "privacy": privacy}
    heads.train_head(views, torch.arange(40) % 2, **arguments)
    counts = torch.bincount(torch.cat(seen).long(), minlength=4).numpy()
    assert counts.sum() >= 1500
    assert chisquare(counts).pvalue > 1e-4


def test_the_last_small_batch_is_kept_without_privacy(monkeypatch):
    sizes, step = [], heads._plain_step
    count = lambda network, optimizer, batch: (sizes.append(len(batch[0])), step(network, optimizer, batch))[1]  # noqa: E731
    monkeypatch.setattr(heads, "_plain_step", count)
    views, labels = some_views(50)
    heads.train_head(views, labels, head="one-layer", seed=0, epochs=1, batch_size=20)
    assert sizes == [20, 20, 10]


def test_a_head_to_start_from_is_kept_and_goes_on():
    views, labels = some_views()
    first = heads.train_head(views, labels, head="two-layer", seed=1, epochs=2, lr=1e-2)["last"]
    arguments = {"head": "two-layer", "seed": 2, "start": first}
    kept = heads.train_head(views, labels, epochs=0, **arguments)["last"]
    assert all(torch.equal(kept[name], first[name]) for name in first)
    frozen = heads.train_head(views, labels, epochs=1, lr=1e-2, freeze_body=True, **arguments)
    assert torch.equal(frozen["last"]["0.weight"], first["0.weight"])
    assert not torch.equal(frozen["last"]["2.weight"], first["2.weight"])
    assert frozen["trainable"] == 6 * 2 + 2


def test_a_head_of_another_shape_is_refused():
    start = heads.build_head("one-layer", 5).state_dict()
    with pytest.raises(ValueError, match="no one-layer head on 12 features"):
        heads.train_head(*some_views(), head="one-layer", seed=0, epochs=1, start=start)


@pytest.mark.parametrize(
    ("auprc", "loss", "first", "expected"),
    [
        ([0.5, 0.8, 0.7], [1, 1, 1], 1, 2),
        ([0.8, 0.8, 0.8], [0.6, 0.4, 0.5], 1, 2),  # ties: the lower loss
        ([0.8, 0.8], [0.4, 0.4], 1, 1),  # and then the first
        ([0.9, 0.5, 0.7, 0.6], [1, 1, 1, 1], 2, 3),  # the best of all came too early
        ([0.9], [1], 2, None),
    ],
)
def test_the_best_epoch_of_a_written_history(auprc, loss, first, expected):
    assert heads.best_epoch(auprc, loss, first) == expected


@pytest.mark.parametrize("epsilon", [1, 6, 60])
def test_epochs_are_chosen_among_those_that_spent_enough(epsilon):
    """Against a walk over all epochs, with both ends of the authors' window."""
    table = TABLE | {"count": 1104, "images": 1104, "epochs": 60, "records": "images", "accountant": "rdp"}
    privacy = heads.specify_privacy(**table, epsilon=epsilon)
    inside = [e for e in range(1, 61) if 0.75 * epsilon < privacy.epsilon(9 * e) < 1.05 * epsilon]
    assert inside == list(range(heads.first_selectable(privacy, 60), 61))


def test_the_history_is_what_the_heads_of_each_epoch_give():
    views, labels = some_views()
    told, known = some_views(30, 1, seed=9)
    settings = {"head": "two-layer", "seed": 0, "lr": 1e-2, "validation": (told[:, 0], known)}
    found = heads.train_head(views, labels, epochs=6, tests={"again": told[:, 0]}, **settings)
    history = found["history"]
    for p, value in zip(history["probabilities"]["again"], history["val_auprc"], strict=True):
        assert average_precision_score(known, p) == pytest.approx(value)
    at_best = heads.train_head(views, labels, epochs=found["epoch"], **settings)["last"]
    assert all(torch.equal(at_best[name], found["best"][name]) for name in at_best)


def small_phantoms(name, split):
    return phantoms.mammography(60, seed=("train", "val", "test").index(split), image_size=32).image_set


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Views of small phantom masses by grey levels, without weights; "made" is a set that a stage wrote."""
    root, settings = tmp_path_factory.mktemp("views"), {"extractor": "grey", "image_size": 32}
    for name in ("train", "val", "test", "samples", "made"):
        (root / name).mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load", small_phantoms)
        for split in ("train", "val", "test"):
            heads.view_masses(root / split, source="phantom_mammography", split=split, **settings)
    few = small_phantoms("made", "train").first_per_class(10)
    made = {"images": torch.as_tensor(few.images), "labels": torch.as_tensor(few.labels)}
    save_file(made, root / "samples" / "samples.safetensors")
    heads.view_masses(root / "made", source=str(root / "samples"), **settings)
    return root


def trial(folders, folder, train=("train",), **settings):
    folder.mkdir(exist_ok=True)
    where = {"train": [str(folders / name) for name in train], "val": str(folders / "val")}
    common = {"tests": {"test": str(folders / "test")}, "head": "two-layer", "seed": 42, "epochs": 4, "lr": 1e-3}
    return heads.head_trial(folder, **where, **common | settings)


def test_views_hold_the_four_flips_and_the_patients(folders):
    whole = small_phantoms("train", "train")
    views, labels, subjects = heads.load_views([folders / "train"])
    assert views.shape == (len(whole), 4, 80)
    assert (labels.numpy() == whole.labels).all()
    assert len(subjects.unique()) == len(np.unique(whole.subjects))
    means = views[:, :, :64].unflatten(2, (8, 8))
    torch.testing.assert_close(means[:, 1], means[:, 0].flip(2))
    torch.testing.assert_close(means[:, 2], means[:, 0].flip(1))
    torch.testing.assert_close(means[:, 3], means[:, 0].flip(1, 2))
    torch.testing.assert_close(views[:, 0, 64:].sum(1), torch.ones(len(views)))


def test_grey_levels_are_numpys_histogram():
    few = small_phantoms("test", "test").images[:5]
    side = few.shape[-1]
    found = heads.mass_extractor("grey", side)(datasets.as_tensor(few))
    for image, row in zip(few, found.numpy()):
        np.testing.assert_allclose(row[64:], np.histogram(image, 16, (0, 256))[0] / image.size, atol=1e-5)


def test_subjects_of_two_sets_stay_apart(folders):
    _, labels, subjects = heads.load_views([folders / "train", folders / "made"])
    alone = [heads.load_views([folders / name])[2] for name in ("train", "made")]
    assert len(subjects.unique()) == sum(len(s.unique()) for s in alone)
    assert len(labels) == len(alone[0]) + 20


def test_a_trial_writes_what_it_says(folders, tmp_path):
    found = trial(folders, tmp_path / "a", train=("train", "made"), epsilon=6.0, delta=1e-5, batch_size=16)
    views, _, _ = heads.load_views([folders / "train", folders / "made"])
    assert found["epsilon"] == pytest.approx(6, rel=1e-3)
    assert found["epsilon"] <= 6
    assert found["steps"] == 4 * -(-len(views) // 16)
    assert found["last"]["epoch"] == 4
    labels = heads.load_views([folders / "test"])[1].numpy()
    kept = load_file(tmp_path / "a" / "probabilities.safetensors")
    assert set(kept) == {"test/best", "test/last"}
    for which in ("best", "last"):
        scores = kept[f"test/{which}"].double().numpy()
        assert average_precision_score(labels, scores) == pytest.approx(found[which]["test"]["auprc"])
        expected = average_precision_score(1 - labels, 1 - scores)
        assert expected == pytest.approx(found[which]["test"]["auprc_malignant"])


def test_a_trial_goes_on_from_another_ones_best_head(folders, tmp_path):
    first = trial(folders, tmp_path / "synpre", train=("made",))
    start = str(tmp_path / "synpre")
    went_on = trial(folders, tmp_path / "realft", start=start, noise_multiplier=1e-6, delta=1e-5, lr=0.0)
    own, best = heads.load_head(tmp_path / "realft", "last"), heads.load_head(start, "best")
    assert all(torch.equal(own[name], best[name]) for name in best)
    assert went_on["last"]["test"] == first["best"]["test"]
    assert first["epsilon"] is None
    assert first["noise_multiplier"] is None


def test_swin_gives_768_features_of_pixels_as_they_are(tmp_path):
    from torchvision.models import swin_t

    torch.manual_seed(0)
    network = swin_t().eval()
    torch.save(network.state_dict(), tmp_path / "made.pth")
    digits = hashlib.sha256((tmp_path / "made.pth").read_bytes()).hexdigest()[:8]
    path = (tmp_path / "made.pth").rename(tmp_path / f"swin_t-{digits}.pth")
    extractor = extractors.swin_t(path, image_size=64)
    images = torch.rand(2, 1, 64, 64) * 2 - 1
    found = extractor(images)
    assert (found.shape, extractor.dim) == ((2, 768), 768)
    assert digits in extractor.name
    with torch.no_grad():
        torch.testing.assert_close(extractor.head(found), network(images.expand(-1, 3, -1, -1)), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="not the expected weights file"):
        extractors.swin_t(path.rename(tmp_path / "swin_t-00000000.pth"), image_size=64)
