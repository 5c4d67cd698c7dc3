import numpy as np
import prdc
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lookalike.metrics import distances
from lookalike.metrics.distances import (
    class_score,
    frechet_distance,
    frechet_infinity,
    kernel_distance,
    kernel_distance_subsets,
    precision_recall_density_coverage,
)

few = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 10_000)


def draw(seed, n=12, dim=5, shift=0.0, scale=1.0):
    return shift + scale * np.random.default_rng(seed).normal(size=(n, dim))


def frechet_by_square_root(real, synthetic):
    a, b = np.cov(real, rowvar=False), np.cov(synthetic, rowvar=False)
    gap = real.mean(0) - synthetic.mean(0)
    return gap @ gap + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)


@pytest.mark.parametrize(("n", "m"), [(40, 60), (7, 60), (60, 7), (13, 12)])
def test_frechet_equals_the_square_root_of_the_covariances(n, m):
    real, synthetic = draw(0, n, 12), draw(1, m, 12, shift=0.3, scale=1.5)
    # where N < D scipy's root of a singular product is itself only good to about 1e-4
    tolerance = 1e-9 if min(n, m) > 13 else 1e-3
    assert frechet_distance(real, synthetic) == pytest.approx(frechet_by_square_root(real, synthetic), rel=tolerance)


def test_frechet_of_few_images_equals_it_in_the_subspace_that_they_span():
    real, synthetic = draw(0, 6, 40), draw(1, 6, 40, shift=0.2)
    basis, _ = np.linalg.qr(np.concatenate([real, synthetic]).T)  # 12 of 40 dimensions
    noise = 1e-7  # a ridge that makes both covariances full rank for the twin
    a, b = (np.cov(rows @ basis, rowvar=False) + noise * np.eye(12) for rows in (real, synthetic))
    gap = real.mean(0) - synthetic.mean(0)
    expected = gap @ gap + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
    assert frechet_distance(real, synthetic) == pytest.approx(expected, rel=1e-3)


def test_frechet_of_gaussians_with_known_distance():
    """Diagonal covariances: |gap|^2 + sum (s - t)^2, exact because the moments of `white` are."""
    rows = draw(0, 50, 4)
    white = np.linalg.qr(rows - rows.mean(0))[0] * 7  # mean 0, covariance the identity
    s, t, gap = np.array([1.0, 2, 3, 4]), np.array([2.0, 2, 1, 0.5]), np.array([1.0, 0, -2, 0])
    assert frechet_distance(white * s, white * t + gap) == pytest.approx(np.sum((s - t) ** 2) + 5, rel=1e-12)


@few
@given(seeds, st.integers(2, 12), st.integers(2, 12))
def test_frechet_is_a_distance(seed, n, m):
    real, synthetic = draw(seed, n), draw(seed + 1, m, shift=1)
    value = frechet_distance(real, synthetic)
    assert value >= 0
    assert frechet_distance(synthetic, real) == pytest.approx(value, abs=1e-9)
    assert frechet_distance(real[::-1], synthetic) == pytest.approx(value, abs=1e-9)
    assert frechet_distance(real, real) < 1e-6


def test_frechet_of_a_set_with_itself_is_zero_at_working_size():
    rows = np.abs(draw(0, 100, 300)).astype(np.float32)
    assert frechet_distance(rows, rows[::-1]) < 1e-6


def features(seed, n, dim, rank=None, shift=0.0):
    """Rectified and correlated, as a network's are; of `rank` dimensions, unrectified."""
    mix = np.random.default_rng(99).normal(size=(rank or dim, dim)) / np.sqrt(dim)
    rows = draw(seed, n, rank or dim) @ mix + shift
    return np.maximum(rows, 0) if rank is None else rows


@pytest.mark.parametrize(("n", "m", "dim"), [(300, 200, 40), (300, 30, 40), (25, 30, 60)])
def test_frechet_equals_torch_fidelity_and_torchmetrics(n, m, dim):
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torchmetrics.image.fid import _compute_fid

    sets = [torch.tensor(features(seed, rows, dim, shift=0.1 * seed)) for seed, rows in ((0, n), (1, m))]
    statistics = [fid_features_to_statistics(rows) for rows in sets]
    found = frechet_distance(*(rows.numpy() for rows in sets))
    expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    tensors = [torch.tensor(one[key]) for one in statistics for key in ("mu", "sigma")]
    # where N < D their eigenvalues of a singular product are rounding, of which the root is taken
    tolerance = 1e-9 if min(n, m) > dim else 1e-6
    assert found == pytest.approx(expected, rel=tolerance)
    assert found == pytest.approx(_compute_fid(*tensors).item(), rel=tolerance)


@pytest.mark.parametrize(("n", "dim", "rank"), [(200, 50, 20), (40, 100, 10), (30, 100, 29)])
def test_frechet_of_covariances_without_full_rank(n, dim, rank):
    """Both sets lie in one subspace: there it is the full-rank distance, and 0 to itself."""
    real, synthetic = features(0, n, dim, rank), features(1, n, dim, rank, shift=0.1)
    shift = np.full(dim, 0.1)
    basis, _ = np.linalg.qr(np.concatenate([real, synthetic - shift])[: rank + 5].T)
    low = [(rows - part) @ basis[:, :rank] for rows, part in ((real, 0), (synthetic, shift))]
    gap = np.square(real.mean(0) - synthetic.mean(0)).sum()
    gap_low = np.square(low[0].mean(0) - low[1].mean(0)).sum()
    expected = frechet_by_square_root(*low) - gap_low + gap
    assert frechet_distance(real, synthetic) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(1000 * real, 1000 * real[::-1]) < 1e-6


@pytest.mark.parametrize("smallest", [1e-1, 1e-3, 1e-5, 1e-7, 0.0])
@pytest.mark.parametrize("turned", [False, True])
def test_frechet_by_the_covariance_equals_it_by_the_rows(monkeypatch, smallest, turned):
    """Directions as flat as they come; turned: flat ones of one set are the wide ones of the other."""
    scale = np.geomspace(1, max(smallest, 1e-7), 30) * (np.arange(30) < 25 if smallest == 0 else 1)
    mix = np.linalg.qr(draw(9, 30, 30))[0]
    real, synthetic = draw(0, 200, 30) * scale @ mix, draw(1, 90, 30) * scale[:: -1 if turned else 1] @ mix
    found, itself = frechet_distance(real, synthetic), frechet_distance(1000 * real, 1000 * real[::-1])
    monkeypatch.setattr(distances, "FLAT", np.inf)
    assert found == pytest.approx(frechet_distance(real, synthetic), rel=1e-7)
    assert itself < 1e-6


def test_frechet_takes_float32_and_computes_in_float64():
    real, synthetic = (features(seed, 100, 300).astype(np.float32) for seed in (0, 1))
    expected = frechet_distance(real.astype(np.float64), synthetic.astype(np.float64))
    assert frechet_distance(real, synthetic) == expected
    assert frechet_distance(torch.tensor(real), torch.tensor(synthetic)) == expected


def gaussians(seed, n, m, dim=16):
    scale = np.geomspace(1, 0.05, dim)
    truth = np.square(0.1 * scale).sum() + 0.05**2 * dim
    return draw(seed, n, dim) * scale, draw(seed + 1, m, dim) * 1.1 * scale + 0.05, truth


def test_frechet_infinity_removes_the_bias_of_both_sets_or_of_one():
    """Twelve draws of Gaussians with a known distance."""
    plain, both, one, truth = [], [], [], 0.0
    for seed in range(0, 24, 2):
        real, synthetic, truth = gaussians(seed, 200, 300)
        plain.append(frechet_distance(real, synthetic))
        both.append(frechet_infinity(real, synthetic).value)
        one.append(frechet_infinity(real, synthetic, both=False).value)
    error = 3 * np.std(both, ddof=1) / np.sqrt(len(both))
    assert abs(np.mean(both) - truth) < error < 0.5 * truth
    assert truth + error < np.mean(one) < np.mean(plain) - error


def test_frechet_infinity_is_the_intercept_of_the_line():
    real, synthetic, _ = gaussians(0, 60, 90)
    found = frechet_infinity(real, synthetic, both=False, points=4, smallest=0.4, seed=3)
    rng, inverse, values = np.random.default_rng(3), [], []
    for share in (0.4, 0.6, 0.8, 1.0):
        inverse.append(1 / share)
        values.append(frechet_distance(real, synthetic[rng.permutation(90)[: round(90 * share)]]))
    (slope, intercept), covariance = np.polyfit(inverse, values, 1, cov=True)
    assert found.value == pytest.approx(intercept)
    assert found.standard_error == pytest.approx(np.sqrt(covariance[1, 1]))
    assert slope > 0
    assert frechet_infinity(real, synthetic) == frechet_infinity(real, synthetic)
    assert frechet_infinity(real, synthetic) != frechet_infinity(real, synthetic, seed=1)


@pytest.mark.parametrize("settings", [{"points": 2}, {"smallest": 1.0}, {"smallest": 0.1}])
def test_frechet_infinity_refuses_what_makes_no_line(settings):
    with pytest.raises(ValueError, match="The line needs three points"):
        frechet_infinity(draw(0), draw(1), **settings)


def kernel_distance_by_loops(real, synthetic):
    def k(a, b):
        return (a @ b / len(a) + 1) ** 3

    def within(rows):
        return np.mean([k(a, b) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j])

    return within(real) + within(synthetic) - 2 * np.mean([k(a, b) for a in real for b in synthetic])


@pytest.fixture(params=[1, 30, 2**23])
def chunks(request, monkeypatch):
    """One row at a time, some, and everything at once."""
    monkeypatch.setattr(distances, "PAIRS", request.param)


def test_kernel_distance_and_its_error_equal_loops(chunks):
    x, y = draw(0, 7), draw(1, 9, shift=0.5)
    found = kernel_distance(x, y)
    assert found.value == pytest.approx(kernel_distance_by_loops(x, y), rel=1e-10)
    variance = 0.0
    for which, rows in enumerate((x, y)):
        without = [
            kernel_distance_by_loops(*((np.delete(rows, i, 0), y) if which == 0 else (x, np.delete(rows, i, 0))))
            for i in range(len(rows))
        ]
        variance += (len(rows) - 1) * np.var(without)
    assert found.standard_error == pytest.approx(np.sqrt(variance), rel=1e-8)


def test_kernel_distance_is_unbiased_and_its_error_is_the_spread():
    same = [kernel_distance(draw(2 * i, 40), draw(2 * i + 1, 40)).value for i in range(200)]
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(200)
    apart = [kernel_distance(draw(2 * i, 40), draw(2 * i + 1, 40, shift=0.7)) for i in range(200)]
    spread = np.std([found.value for found in apart])
    assert 0.8 < np.mean([found.standard_error for found in apart]) / spread < 1.25


@few
@given(seeds)
def test_kernel_distance_is_symmetric_and_blind_to_order(seed):
    x, y = draw(seed, 6), draw(seed + 1, 8, shift=0.5)
    for other in (kernel_distance(y, x), kernel_distance(x[::-1], y[::-1])):
        assert other.value == pytest.approx(kernel_distance(x, y).value, abs=1e-12)
        assert other.standard_error == pytest.approx(kernel_distance(x, y).standard_error, abs=1e-12)


@pytest.mark.parametrize(("n", "m", "size"), [(60, 50, 50), (90, 70, 20), (500, 400, 30)])
def test_subsets_equal_torch_fidelity_draw_by_draw(n, m, size, chunks):
    """The last case takes them one by one: one matrix would be larger than all of theirs."""
    from torch_fidelity.metric_kid import kid_features_to_metric

    real, synthetic = features(0, n, 40), features(1, m, 40, shift=0.1)
    found = kernel_distance_subsets(real, synthetic, subsets=20, size=size, seed=7)
    settings = {"kid_subsets": 20, "kid_subset_size": size, "rng_seed": 7, "verbose": False}
    expected = kid_features_to_metric(torch.tensor(real), torch.tensor(synthetic), **settings)
    assert found.mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-9)
    assert found.spread == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-9, abs=1e-15)


def test_subsets_of_everything_equal_all_pairs_and_torchmetrics():
    from torchmetrics.image.kid import poly_mmd

    real, synthetic = features(0, 50, 40), features(1, 50, 40, shift=0.1)
    found = kernel_distance_subsets(real, synthetic, subsets=3, size=50)
    assert found.mean == pytest.approx(kernel_distance(real, synthetic).value, rel=1e-9)
    assert found.mean == pytest.approx(poly_mmd(torch.tensor(real), torch.tensor(synthetic)).item(), rel=1e-9)
    assert found.spread < 1e-12  # no evidence of anything: every subset is the whole set


def test_features_are_left_as_they_were(chunks):
    real, synthetic = draw(0, 30), draw(1, 30)
    before = real.copy(), synthetic.copy()
    kernel_distance_subsets(real, synthetic, size=10), precision_recall_density_coverage(real, synthetic)
    kernel_distance(real, synthetic), frechet_distance(real, synthetic), frechet_infinity(real, synthetic)
    np.testing.assert_array_equal((real, synthetic), before)


@pytest.mark.parametrize("settings", [{}, {"size": 2}, {"size": 13}, {"size": 5, "subsets": 0}])
def test_subsets_larger_than_the_sets_are_refused(settings):
    with pytest.raises(ValueError, match="`size` must be from 3 to 12, the smaller set"):
        kernel_distance_subsets(draw(0), draw(1, 20), **settings)


def test_class_score_equals_loops():
    logits = draw(0, 30, 4, scale=3)
    p = [np.exp(row) / np.exp(row).sum() for row in logits]
    mean = sum(p) / len(p)
    divergences = [sum(a * np.log(a / b) for a, b in zip(row, mean)) for row in p]
    assert class_score(logits, splits=1).value == pytest.approx(np.exp(np.mean(divergences)), rel=1e-12)


def test_class_score_reaches_from_one_to_the_number_of_classes():
    sure = 1000.0 * np.eye(4)[np.repeat(np.arange(4), 25)]  # sorted by class, as samples come
    found = class_score(sure, splits=5)
    assert 3.5 < found.value <= 4
    assert class_score(sure, splits=1).value == pytest.approx(4)
    assert class_score(np.zeros((20, 4))).value == pytest.approx(1)
    assert class_score(sure, splits=1).spread == 0 < found.spread


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_class_score_of_logits_that_are_not_finite_is_refused(value):
    logits = np.zeros((20, 3))
    logits[4, 1] = value
    with pytest.raises(ValueError, match="logits are not finite"):
        class_score(logits, splits=2)


def manifold_by_loops(real, synthetic, k):
    radius = [np.sort([np.linalg.norm(a - b) for b in real])[k] for a in real]
    other = [np.sort([np.linalg.norm(a - b) for b in synthetic])[k] for a in synthetic]
    between = np.array([[np.linalg.norm(a - b) for b in synthetic] for a in real])
    inside = between < np.array(radius)[:, None]
    return {
        "precision": np.mean([inside[:, j].any() for j in range(len(synthetic))]),
        "recall": np.mean([(row < other).any() for row in between]),
        "density": inside.sum() / k / len(synthetic),
        "coverage": np.mean([min(row) < r for row, r in zip(between, radius)]),
    }


@few
@given(seeds, st.integers(1, 4), st.sampled_from([1, 30, 2**23]))
def test_precision_recall_density_coverage_equal_loops(seed, k, pairs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distances, "PAIRS", pairs)
        check_manifolds(seed, k)


def check_manifolds(seed, k):
    real, synthetic = draw(seed, 14), draw(seed + 1, 11, shift=0.8)
    found = precision_recall_density_coverage(real, synthetic, k)
    assert found == pytest.approx(manifold_by_loops(real, synthetic, k))
    swapped = precision_recall_density_coverage(synthetic, real, k)
    assert (swapped["precision"], swapped["recall"]) == (found["recall"], found["precision"])


@pytest.mark.parametrize(("n", "m", "k"), [(80, 60, 3), (50, 90, 5)])
@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_precision_and_the_rest_equal_torch_fidelity_and_prdc(n, m, k, kind):
    from torch_fidelity.metric_prc import prc_features_to_metric

    real, synthetic = features(0, n, 30).astype(kind), features(1, m, 30, shift=0.05).astype(kind)
    found = precision_recall_density_coverage(real, synthetic, k)
    settings = {"prc_neighborhood": k, "prc_batch_size": 1000, "save_cpu_ram": True, "verbose": False}
    theirs = prc_features_to_metric(torch.tensor(synthetic), torch.tensor(real), **settings)
    assert 0 < found["recall"] < 1 > found["precision"] > 0
    for name in ("precision", "recall"):
        assert found[name] == pytest.approx(theirs[name], rel=1e-6)
    assert found == pytest.approx(prdc.compute_prdc(real, synthetic, k), rel=1e-6)


@pytest.mark.parametrize(("levels", "dim"), [(3, 3), (2, 64), (256, 784)])
def test_whole_numbers_tie_as_in_prdc_and_loops(levels, dim):
    rng = np.random.default_rng(0)
    real, synthetic = rng.integers(0, levels, (60, dim)).astype(float), rng.integers(0, levels, (50, dim)).astype(float)
    synthetic[:20] = real[:20]
    found = precision_recall_density_coverage(real, synthetic, 5)
    squares = [np.square(a[:, None] - b).sum(-1) for a, b in ((real, real), (synthetic, synthetic), (real, synthetic))]
    own, other = (np.sort(square, axis=1)[:, 5] for square in squares[:2])
    inside = squares[2] < own[:, None]
    assert found == pytest.approx({
        "precision": inside.any(0).mean(), "recall": (squares[2] < other).any(1).mean(),
        "density": inside.sum() / 250, "coverage": inside.any(1).mean(),
    })  # fmt: skip
    assert found == pytest.approx(prdc.compute_prdc(real, synthetic, 5))


@pytest.mark.parametrize(("dim", "shift"), [(64, 0), (784, 3), (2048, 0.5)])
def test_a_copy_at_the_edge_of_a_ball_is_outside(dim, shift):
    """All synthetic images are copies, so each image's farthest copy lies exactly at its edge."""
    rows = draw(0, 150, dim, shift=shift)
    for m in (57, 100, 133):
        found = precision_recall_density_coverage(rows[:m], rows[m - 1 :: -1], 5)
        assert found == {"precision": 1, "recall": 1, "density": 1, "coverage": 1}  # itself and four neighbours


def test_coverage_of_equal_distributions_is_what_the_paper_says():
    """Naeem et al. 2020, Lemma 2: 1 - (N-1)...(N-k) / ((2N-1)...(2N-k)); expected density is 1."""
    n, k = 60, 3
    found = [precision_recall_density_coverage(draw(2 * i, n, 8), draw(2 * i + 1, n, 8), k) for i in range(60)]
    expected = 1 - np.prod([(n - i) / (2 * n - i) for i in range(1, k + 1)])
    for name, value in (("coverage", expected), ("density", 1.0)):
        values = [one[name] for one in found]
        error = np.std(values, ddof=1) / np.sqrt(60)
        assert abs(np.mean(values) - value) < 4 * error < 0.1


def test_equal_images_tie_whatever_rounding_does():
    rows = np.repeat(draw(0, 10, 300, shift=7), 7, axis=0)
    found = precision_recall_density_coverage(rows, rows[::-1], k=5)
    assert set(found.values()) == {0}  # the fifth neighbour is a copy: every ball is empty


def test_precision_and_recall_see_copies_collapse_and_garbage():
    real = draw(0, 60)
    copies = precision_recall_density_coverage(real, real[::-1])
    assert copies["precision"] == copies["recall"] == copies["coverage"] == 1
    collapsed = precision_recall_density_coverage(real, np.repeat(real[:1], 60, 0))
    assert collapsed["precision"] == 1
    assert collapsed["recall"] == 0
    assert collapsed["coverage"] < 0.3
    assert set(precision_recall_density_coverage(real, real + 100).values()) == {0}


@pytest.mark.parametrize("metric", [frechet_distance, kernel_distance, precision_recall_density_coverage])
def test_features_out_of_form_are_refused(metric):
    with pytest.raises(ValueError, match="with N at least"):
        metric(draw(0)[:1], draw(1))
    with pytest.raises(ValueError, match="use one extractor"):
        metric(draw(0), draw(1, dim=6))
    with pytest.raises(ValueError, match="not finite"):
        metric(draw(0) * np.nan, draw(1))
