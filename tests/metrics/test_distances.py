import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from lookalike.metrics import distances
from lookalike.metrics.distances import (
    class_score,
    frechet_distance,
    kernel_distance,
    nearest,
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


def kernel_distance_by_loops(real, synthetic):
    def k(a, b):
        return (a @ b / len(a) + 1) ** 3

    def within(rows):
        return np.mean([k(a, b) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j])

    return within(real) + within(synthetic) - 2 * np.mean([k(a, b) for a in real for b in synthetic])


@pytest.mark.parametrize("chunk", [3, 2048])
def test_kernel_distance_and_its_error_equal_loops(monkeypatch, chunk):
    original = distances._kernel_sums
    monkeypatch.setattr(distances, "_kernel_sums", lambda x, y: original(x, y, chunk))
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
@given(seeds, st.integers(1, 4))
def test_precision_recall_density_coverage_equal_loops(seed, k):
    real, synthetic = draw(seed, 14), draw(seed + 1, 11, shift=0.8)
    found = precision_recall_density_coverage(real, synthetic, k)
    assert found == pytest.approx(manifold_by_loops(real, synthetic, k))
    swapped = precision_recall_density_coverage(synthetic, real, k)
    assert (swapped["precision"], swapped["recall"]) == (found["recall"], found["precision"])


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


@few
@given(seeds, st.integers(1, 9), st.integers(1, 9))
def test_nearest_equals_all_pairs(seed, n, m):
    queries, reference = draw(seed, n).astype(np.float32), draw(seed + 1, m).astype(np.float32)
    found, index = nearest(queries, reference, chunk=4)
    every = cdist(queries.astype(np.float64), reference.astype(np.float64))
    np.testing.assert_allclose(found, every.min(1), rtol=1e-6)
    np.testing.assert_array_equal(index, every.argmin(1))


def test_nearest_is_exact_on_near_copies_far_from_the_origin():
    reference = draw(0, 300, 500, shift=40).astype(np.float32)
    step = np.float32(1e-3) * draw(1, 300, 500).astype(np.float32)
    found, index = nearest(reference + step, reference)
    exact = np.linalg.norm(((reference + step) - reference).astype(np.float64), axis=1)
    np.testing.assert_allclose(found, exact, rtol=1e-6)
    np.testing.assert_array_equal(index, np.arange(300))


def test_nearest_tells_copies_apart_that_a_float32_product_cannot():
    row, step = draw(0, 1, 500, shift=40), 1e-3 * draw(1, 200, 500)
    reference = np.concatenate([row + step, -row]).astype(np.float32)
    found, index = nearest(row.astype(np.float32), reference)
    exact = cdist(row.astype(np.float32).astype(np.float64), reference.astype(np.float64))[0]
    assert index[0] == exact.argmin()
    assert found[0] == pytest.approx(exact.min(), rel=1e-6)


def test_nearest_names_the_first_of_equal_rows(monkeypatch):
    monkeypatch.setattr(distances, "PAIRS_AT_ONCE", 5)
    rows = np.ones((40, 6), np.float32)
    found, index = nearest(rows[:9] + 1, rows)
    np.testing.assert_allclose(found, 6**0.5)
    assert (index == 0).all()


@pytest.mark.parametrize("metric", [frechet_distance, kernel_distance, precision_recall_density_coverage])
def test_features_out_of_form_are_refused(metric):
    with pytest.raises(ValueError, match="with N at least"):
        metric(draw(0)[:1], draw(1))
    with pytest.raises(ValueError, match="use one extractor"):
        metric(draw(0), draw(1, dim=6))
    with pytest.raises(ValueError, match="not finite"):
        metric(draw(0) * np.nan, draw(1))
