import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lookalike.data import load
from lookalike.metrics import as_images, to_unit
from lookalike.metrics.pixels import (
    STANDARD_SETS,
    anchor_sets,
    anchors,
    pair,
    paired_table,
    psnr,
    resized,
    ssim,
    standard_values,
)

few = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 10_000)


def draw(seed, n=6, channels=1, side=14):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(n, channels, side, side, generator=generator) - 1


def ssim_by_loops(x, y):
    """One grey pair in [0, 1], window by window."""
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    window /= window.sum()
    x, y = np.pad(x, 5, mode="reflect"), np.pad(y, 5, mode="reflect")
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            m, n = (window * a).sum(), (window * b).sum()
            s, t, c = (
                (window * (a - m) ** 2).sum(),
                (window * (b - n) ** 2).sum(),
                (window * (a - m) * (b - n)).sum(),
            )
            values.append((2 * m * n + 1e-4) * (2 * c + 9e-4) / ((m * m + n * n + 1e-4) * (s + t + 9e-4)))
    return np.mean(values)


def test_ssim_equals_loops():
    real, synthetic = draw(0, 2), draw(1, 2)
    expected = [ssim_by_loops(*(to_unit(x[0]).double().numpy() for x in pair)) for pair in zip(real, synthetic)]
    assert ssim(real, synthetic) == pytest.approx(np.mean(expected), abs=1e-5)


def test_one_grey_channel_gives_what_torchmetrics_gives_for_three_at_299():
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    real, synthetic, labels = draw(0, 5), draw(1, 5), torch.tensor([2, 0, 1, 1, 0])
    i, j = pair(real, synthetic, "as_published", synthetic_labels=labels)
    up = torch.nn.Upsample(size=(299, 299), mode="bilinear", align_corners=False)
    x, y = (up(to_unit(images).repeat(1, 3, 1, 1)).clamp(0, 1) for images in (real[i], synthetic[j]))
    found = paired_table(real, synthetic, "as_published", synthetic_labels=labels)
    expected = structural_similarity_index_measure(y, x, data_range=1.0)
    assert found["ssim_as_published"] == pytest.approx(float(expected), abs=1e-5)
    expected = peak_signal_noise_ratio(x, y, data_range=float(y.max()))
    assert found["psnr_as_published"] == pytest.approx(float(expected), abs=1e-4)


@few
@given(seeds, st.sampled_from([1, 3]))
def test_pixel_metrics_are_symmetric_bounded_and_blind_to_order(seed, channels):
    real, synthetic = draw(seed, channels=channels), draw(seed + 1, channels=channels)
    for metric in (psnr, ssim):
        value = metric(real, synthetic)
        assert metric(synthetic, real) == pytest.approx(value, abs=1e-5)
        assert metric(real.flip(0), synthetic.flip(0)) == pytest.approx(value, abs=1e-5)
        assert value < metric(real, real)
    assert ssim(real, real) == pytest.approx(1, abs=1e-6)
    assert psnr(real, real) == float("inf")


def test_psnr_of_a_known_difference():
    flat = torch.zeros(3, 1, 8, 8)
    assert psnr(flat, flat + 0.2) == pytest.approx(20)  # an error of a tenth of the range
    assert psnr(flat, flat + 0.2, data_range=1.0) == pytest.approx(20 - 20 * np.log10(2))


def test_published_range_is_the_largest_synthetic_pixel():
    real, dim = draw(0), (draw(1) - 1) / 2  # at most half as bright
    labels = torch.arange(6)
    published = paired_table(real, dim, "as_published", synthetic_labels=labels, resize=14)["psnr_as_published_14px"]
    i, j = pair(real, dim, "as_published", synthetic_labels=labels)
    assert published == pytest.approx(psnr(real[i], dim[j], data_range=float(dim.max()) + 1), abs=1e-6)
    assert published < psnr(real[i], dim[j])
    black = torch.full_like(real, -1)
    for side in (14, 40):  # at 40 px black rounds to a little more than -1
        table = paired_table(real, black, "as_published", synthetic_labels=labels, resize=side)
        assert table[f"psnr_as_published_{side}px"] == -float("inf")


def test_names_tell_pairing_and_any_other_side():
    real, synthetic, labels = draw(0), draw(1), torch.arange(6)
    for pairing in ("as_published", "random", "same_class", "nearest_real"):
        found = paired_table(real, synthetic, pairing, labels, labels, resize=20)
        assert list(found) == [f"psnr_{pairing}_20px", f"ssim_{pairing}_20px"]
    assert list(paired_table(real, synthetic, "random")) == ["psnr_random", "ssim_random"]


def test_published_pairs_mix_classes_and_follow_the_class_order():
    labels = torch.arange(40) % 4
    images = draw(0, 40, side=8)
    i, j = pair(images, images, "as_published", synthetic_labels=labels)
    assert labels[j].tolist() == sorted(labels.tolist())
    assert sorted(i.tolist()) == sorted(j.tolist()) == list(range(40))
    assert (labels[i] == labels[j]).float().mean() < 0.6


def test_same_class_and_nearest_pairs():
    real, labels = draw(0, 8), torch.arange(8) % 2
    synthetic = real.flip(0) + 0
    i, j = pair(real, synthetic, "same_class", labels, labels.flip(0))
    assert (labels[i] == labels.flip(0)[j]).all()
    i, j = pair(real, synthetic, "nearest_real")
    assert i.tolist() == list(range(8))[::-1]
    assert paired_table(real, synthetic, "nearest_real")["psnr_nearest_real"] == float("inf")


@pytest.mark.parametrize("pairing", ["as_published", "random", "same_class"])
def test_pairs_follow_the_seed(pairing):
    images, labels = draw(0, 30, side=8), torch.arange(30) % 3
    first, again, other = (pair(images, images, pairing, labels, labels, seed=seed)[0] for seed in (1, 1, 2))
    assert first.tolist() == again.tolist() != other.tolist()


def test_sets_of_different_size_are_paired_as_far_as_they_go():
    for n, m in ((5, 9), (9, 5)):
        i, j = pair(draw(0, n), draw(1, m), "as_published", synthetic_labels=torch.zeros(m))
        assert len(i) == len(j) == 5
        assert np.isfinite(list(paired_table(draw(0, n), draw(1, m), "random").values())).all()


def test_unclear_pairings_are_refused():
    images = draw(0)
    with pytest.raises(ValueError, match="A pairing is"):
        pair(images, images, "sorted")
    with pytest.raises(ValueError, match="needs labels"):
        pair(images, images, "same_class")
    with pytest.raises(ValueError, match="No real image has the class 7"):
        pair(images, images, "same_class", torch.arange(6), torch.full((6,), 7))
    with pytest.raises(ValueError, match="Pairs have one shape"):
        ssim(images, images[:2])
    with pytest.raises(ValueError, match="at least 6 pixels"):
        ssim(images[..., :5], images[..., :5])


def test_anchor_sets_are_what_they_say():
    images = draw(0, 50)
    sets = anchor_sets(images)
    assert all(made.shape == images.shape and made.abs().max() <= 1 for made in sets.values())
    assert sets["black"].unique().tolist() == [-1]
    torch.testing.assert_close(sets["repeated"][7], images[0])
    torch.testing.assert_close(sets["mean"][7], images.mean(0))
    torch.testing.assert_close(sets["blurred"][3, 0, 5, 6], images[3, 0, 3:8, 4:9].mean())
    grey = torch.zeros(50, 1, 14, 14)
    assert to_unit(anchor_sets(grey)["noisy"]).std() == pytest.approx(0.2, rel=0.05)


SHEET = {  # 150 random pairs of MNIST digits, measured with torchmetrics on three channels at 299 px
    "other real images": (9.57, 9.57, 0.666, 0.365),
    "dataset mean": (7.25, 12.51, 0.470, 0.333),
    "5x5-blurred other real images": (11.14, 11.20, 0.568, 0.345),
    "all black": (None, 10.03, 0.751, 0.422),
    "other real images with noise": (9.73, 9.73, 0.153, 0.043),
}


@pytest.fixture(scope="module")
def digits():
    return load("digits", "train")


@pytest.fixture(scope="module")
def standard(digits):
    return {row["set"]: row for row in standard_values(digits)}


def room(values):
    """Two means of 150 pairs may differ by three standard errors of such a difference."""
    return 3 * np.sqrt(2 / 150) * np.std(values)


def test_standard_values_are_those_measured_with_torchmetrics(digits, standard):
    order = np.random.default_rng(0).permutation(len(digits))[:300]
    real, made = (as_images(digits.images[part]) for part in (order[:150], order[150:]))
    sets = anchor_sets(made)
    for name, title in STANDARD_SETS.items():
        if name == "repeated":  # which image it is moves it more than the pairs do
            continue
        published, full, at_299, own = SHEET[title]
        x, y = resized(real, 299), resized(sets[name], 299)
        errors = (x - y).square().mean((1, 2, 3)).numpy()
        decibels = 10 / np.log(10) * room(errors) / errors.mean()
        assert decibels < 0.6
        assert standard[title]["psnr_full_range"] == pytest.approx(full, abs=decibels)
        assert standard[title]["psnr_as_published"] == (published and pytest.approx(published, abs=decibels))
        for key, expected, both in (("ssim_as_published", at_299, (x, y)), ("ssim_own_size", own, (real, sets[name]))):
            alike = [ssim(a[None], b[None]) for a, b in zip(*both)]
            assert standard[title][key] == pytest.approx(expected, abs=room(alike))


def test_black_beats_real_images_on_digits_as_the_published_pairs_go(standard):
    similarity = {title: row["ssim_as_published"] for title, row in standard.items()}
    decibels = {title: row["psnr_as_published"] for title, row in standard.items()}
    real, repeated, mean, blurred, black, noisy = STANDARD_SETS.values()
    assert similarity[noisy] < similarity[mean] < similarity[blurred] < similarity[real] < similarity[black]
    assert similarity[real] < similarity[repeated]
    assert decibels[mean] < decibels[real] < decibels[blurred]


def test_anchors_are_the_table_of_each_set():
    real, other = draw(0), draw(1)
    found = anchors(real, other, "random", seed=2)
    assert set(found) == set(anchor_sets(other))
    for name, made in anchor_sets(other, seed=2).items():
        assert found[name] == paired_table(real, made, "random", seed=2)


def test_standard_values_are_the_published_table_of_the_same_pairs():
    images = draw(0, 12, side=8)
    rows = {row["set"]: row for row in standard_values(images, seed=3, pairs=5)}
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    x, y = images[order[:5]], images[order[5:10]]
    found = rows["other real images"]
    assert found["ssim_own_size"] == pytest.approx(ssim(x, y), abs=1e-6)
    up = [torch.nn.functional.interpolate(z, (299, 299), mode="bilinear", align_corners=False) for z in (x, y)]
    assert found["psnr_as_published"] == pytest.approx(psnr(*up, data_range=float(up[1].max()) + 1), abs=1e-6)
    mean = images[order[5:]].mean(0, keepdim=True).expand_as(x)  # of all that is not compared with it
    assert rows["dataset mean"]["ssim_own_size"] == pytest.approx(ssim(x, mean), abs=1e-6)
    repeated = images[order[5:6]].expand_as(x)
    assert rows["one real image repeated"]["ssim_own_size"] == pytest.approx(ssim(x, repeated), abs=1e-6)
    assert set(STANDARD_SETS) == set(anchor_sets(images))
    for pairs in (0, 7):
        with pytest.raises(ValueError, match="must be 1 to 6"):
            standard_values(images, pairs=pairs)
