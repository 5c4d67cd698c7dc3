import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from scipy.special import polygamma

from lookalike.privacy.density import (
    density_ratio_curve,
    density_ratio_epsilon,
    ecdf_distances,
    fit_reducer,
    null_curves,
    null_distribution,
)


def gaussian(seed, n=1000, dim=2, shift=0.0, scale=1.0):
    return shift + scale * np.random.default_rng(seed).normal(size=(n, dim))


def pictures(seed, n=60, side=6):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(n, 1, side, side, generator=generator) - 1


def log_density(point, scale, shift=0.0):
    """Of a 2-d normal."""
    return -np.sum((point - shift) ** 2) / (2 * scale**2) - 2 * np.log(scale) - np.log(2 * np.pi)


@pytest.mark.parametrize("query", [np.zeros(2), np.array([0.7, -0.5])])
def test_corrected_ratio_meets_gaussians_of_known_density(query):
    victim, ablated = gaussian(0, 40_000, scale=0.6), gaussian(1, 40_000, shift=0.3)
    found = density_ratio_epsilon(query, victim, ablated, k=400)
    expected = log_density(query, 0.6) - log_density(query, 1, 0.3)
    assert found.low < expected < found.high
    assert found.corrected == pytest.approx(expected, abs=0.15)  # two standard errors: 2 sqrt(2 / k)
    assert found.as_published == pytest.approx(found.corrected / 2)


def test_corrected_ratio_allows_for_unequal_sample_sizes():
    found = density_ratio_epsilon(np.zeros(2), gaussian(0, 40_000), gaussian(1, 10_000), k=400)
    assert found.corrected == pytest.approx(0, abs=0.2)
    assert found.as_published > 0.5  # the paper's number takes the larger sample for a leak


def test_ratio_is_written_out_signed_and_antisymmetric():
    query = np.array([0.2, 0.1])
    victim, ablated = gaussian(0, 50, scale=0.5), gaussian(1, 50)
    near, far = (np.sort(cdist(query[None], rows)[0])[19] for rows in (victim, ablated))
    found = density_ratio_epsilon(query, victim, ablated, k=20)
    assert found.as_published == pytest.approx(np.log(far / near))
    assert found.as_published > 0
    assert (found.distance_victim, found.distance_ablated) == pytest.approx((near, far))
    back = density_ratio_epsilon(query, ablated, victim, k=20)
    assert (back.as_published, back.low) == pytest.approx((-found.as_published, -found.high))


def test_interval_covers_zero_for_equal_models_and_not_more():
    found = [density_ratio_epsilon(np.zeros(2), gaussian(2 * i), gaussian(2 * i + 1)) for i in range(400)]
    covered = np.mean([ratio.low <= 0 <= ratio.high for ratio in found])
    assert covered == pytest.approx(0.95, abs=0.035)  # three standard errors of a share of 400
    spread = np.std([ratio.corrected for ratio in found])
    assert spread == pytest.approx(np.sqrt(2 * polygamma(1, 20)), rel=0.12)


def test_planted_copies_of_the_query_give_a_large_ratio():
    query = pictures(9, 1)[0]
    ablated = pictures(0)
    copier = pictures(1)
    copier[:25] = (query + 0.05 * pictures(2, 25)).clamp(-1, 1)
    leak = density_ratio_epsilon(query, copier, ablated)
    assert leak.as_published > 1.5
    assert leak.dim == 36
    assert leak.as_published > np.quantile(null_distribution(query, [ablated, pictures(3), pictures(4)]), 0.99)
    copier[:25] = query
    assert density_ratio_epsilon(query, copier, ablated).as_published == float("inf")


def test_curve_gives_each_k():
    query, victim, ablated = np.zeros(2), gaussian(0, 100), gaussian(1, 100)
    curve = density_ratio_curve(query, victim, ablated, ks=(5, 40))
    assert [ratio.k for ratio in curve] == [5, 40]
    assert curve[1] == density_ratio_epsilon(query, victim, ablated, k=40)


def test_null_of_models_holds_every_ordered_pair():
    sets = [gaussian(i, 100) for i in range(3)]
    found = null_distribution(np.zeros(2), sets, k=5)
    assert len(found) == 6
    np.testing.assert_allclose(np.sort(found), np.sort(-found))
    assert found[0] == density_ratio_epsilon(np.zeros(2), sets[0], sets[1], k=5).as_published


def test_null_curves_have_the_spread_of_fresh_samples():
    fresh = [density_ratio_epsilon(np.zeros(2), gaussian(2 * i), gaussian(2 * i + 1)).as_published for i in range(200)]
    halves = null_curves(np.zeros(2), gaussian(999), ks=(20,), repeats=400)[:, 0]
    assert abs(np.mean(halves)) < 0.05
    assert np.std(halves) == pytest.approx(np.std(fresh), rel=0.3)
    np.testing.assert_array_equal(halves, null_curves(np.zeros(2), gaussian(999), ks=(20,), repeats=400)[:, 0])


def test_reducer_takes_images_to_the_plane_and_keeps_near_ones_near():
    images = pictures(0, 80)
    reducer = fit_reducer(images, n_neighbors=8, noisy_copies=())
    points = reducer.transform(images)
    assert points.shape == (80, 2)
    nudged = reducer.transform((images + 0.002 * pictures(1, 80)).clamp(-1, 1))
    assert np.linalg.norm(nudged - points, axis=1).max() < 0.1 * np.ptp(points)
    found = density_ratio_epsilon(images[0], images[:40], images[40:], reducer, k=5)
    assert found.dim == 2
    by_hand = density_ratio_epsilon(points[0], points[:40], points[40:], k=5)
    assert found.corrected == pytest.approx(by_hand.corrected, rel=1e-5)


def test_noisy_copies_join_the_fit_and_follow_the_seed(monkeypatch):
    fitted = []

    class Recorder:
        def __init__(self, **settings):
            self.settings = settings

        def fit(self, points):
            fitted.append(points)
            return self

    monkeypatch.setattr("sklearn.manifold.Isomap", Recorder)
    for seed in (1, 1, 2):
        fit_reducer(pictures(0, 30), noisy_copies=(0.01, 0.5), seed=seed)
    clean, slight, strong = fitted[0][:30], fitted[0][30:60], fitted[0][60:]
    assert fitted[0].shape == (90, 36)
    assert (slight - clean).std() == pytest.approx(0.01, rel=0.1)
    assert (strong.min(), strong.max()) == (0, 1)
    np.testing.assert_array_equal(fitted[0], fitted[1])
    assert np.abs(fitted[0] - fitted[2]).max() > 0.1


def test_ratios_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="must not pass the sample counts"):
        density_ratio_epsilon(np.zeros(2), gaussian(0, 30), gaussian(1, 10))
    with pytest.raises(ValueError, match="coordinates"):
        density_ratio_epsilon(np.zeros(3), gaussian(0, 30), gaussian(1, 30))
    with pytest.raises(ValueError, match="One query at a time"):
        density_ratio_epsilon(pictures(0, 2), pictures(0), pictures(1))
    with pytest.raises(ValueError, match="at least two models"):
        null_distribution(np.zeros(2), [gaussian(0)])


def ecdf_by_counting(values, at):
    return np.array([sum(value <= x for value in values) / len(values) for x in at])


def test_distances_to_training_equal_all_pairs_and_the_published_summary():
    train, holdout, synthetic = pictures(0, 20), pictures(1, 30), pictures(2, 25) * 0.8
    found = ecdf_distances(train, holdout, synthetic)
    flat = [((images + 1) / 2).flatten(1).double().numpy() for images in (train, holdout, synthetic)]
    h, s = (np.sort(cdist(rows, flat[0]).min(1)) for rows in flat[1:])
    np.testing.assert_allclose(found.holdout, h, rtol=1e-5)
    np.testing.assert_allclose(found.synthetic, s, rtol=1e-5)
    grid = np.linspace(max(h[0], s[0]), min(h[-1], s[-1]), 1000)
    gap = abs(ecdf_by_counting(h, grid) - ecdf_by_counting(s, grid))
    assert found.ks_overlap == pytest.approx(gap.max(), abs=1e-9)
    area = np.sum((gap[1:] + gap[:-1]) / 2) / 999
    assert found.area_overlap == pytest.approx(area, abs=5e-3)
    both = np.concatenate([h, s])
    assert found.ks == pytest.approx(abs(ecdf_by_counting(h, both) - ecdf_by_counting(s, both)).max())
    at = np.sort(both)
    steps = abs(ecdf_by_counting(h, at) - ecdf_by_counting(s, at))[:-1]
    assert found.wasserstein == pytest.approx(np.sum(steps * np.diff(at)), rel=1e-5)


def test_same_distribution_is_quiet_and_direction_tells_copies_from_garbage():
    train, holdout = pictures(0, 100), pictures(1, 100)
    alike = ecdf_distances(train, holdout, pictures(2, 100))
    assert alike.p_value > 0.01
    copies = ecdf_distances(train, holdout, (train + 0.1 * pictures(3, 100)).clamp(-1, 1))
    garbage = ecdf_distances(train, holdout, pictures(4, 100).sign())
    assert copies.ks == garbage.ks == copies.ks_overlap == 1  # blind to which of the two it is
    assert copies.area_overlap == garbage.area_overlap == 1  # the ranges do not meet
    assert copies.closer > 0.5
    assert garbage.closer < -0.5


def test_shared_range_ends_with_its_last_step():
    def dots(*values):
        return 2 * torch.tensor(values).reshape(-1, 1, 1, 1) - 1

    found = ecdf_distances(dots(0.0), dots(0.0, 0.5, 0.5, 0.5), dots(0.25, 0.25, 1.0, 1.0))
    # between 0.25 and 0.5 the functions are 1/4 and 1/2; at 0.5 holdout's jumps to 1
    assert found.ks_overlap == 0.5
    assert found.area_overlap == pytest.approx(0.25, abs=1e-3)


def test_exact_copies_have_distance_zero():
    train = pictures(0, 30)
    assert ecdf_distances(train, pictures(1, 30), train.flip(0)).synthetic.max() == 0


def test_shared_range_hides_what_lies_outside_it():
    """Half the synthetic images are copies, so half the mass lies below the overlap."""
    train, holdout = pictures(0, 60), pictures(1, 60)
    half = torch.cat([train[:30], pictures(2, 30)])
    found = ecdf_distances(train, holdout, half)
    assert found.ks == pytest.approx(0.5, abs=0.15)
    assert found.wasserstein > 0.4 * np.median(found.holdout)
    assert found.area_overlap < found.ks
