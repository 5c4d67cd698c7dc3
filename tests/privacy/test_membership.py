"""Planted leaks are found, innocent generators are not accused, and each number has a slow twin or a closed form."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.distance import cdist
from scipy.stats import hypergeom, multivariate_normal
from sklearn.decomposition import PCA

from lookalike.data import phantoms
from lookalike.metrics import as_images
from lookalike.models import gan, mcgan
from lookalike.privacy.attack import attack_result
from lookalike.privacy.density import density_ratio_epsilon
from lookalike.privacy.membership import (
    Search,
    authenticity,
    calibrated,
    density_ratio,
    domias,
    gan_leaks_full_black_box,
    gan_leaks_partial_black_box,
    gan_leaks_white_box,
    logan_accuracy,
    logan_black_box,
    logan_white_box,
)

scores = st.integers(1, 20).flatmap(lambda n: arrays(float, n, elements=st.integers(-4, 4).map(float)))


def pictures(n, seed, side=8):
    return phantoms.grey28(n, seed=seed, image_size=side).image_set.images


def copies(images, n, noise, seed=0):
    """Released by a generator that copies its training images and adds `noise` grey levels."""
    rng = np.random.default_rng(seed)
    chosen = images[rng.integers(0, len(images), n)]
    return (chosen + rng.normal(0, noise, chosen.shape)).clip(0, 255).round().astype(np.uint8)


def gaussian(seed, n=100, dim=3):
    return np.random.default_rng(seed).normal(size=(n, dim))


def judged(score, members, non_members):
    both = score(np.concatenate([members, non_members]))
    return attack_result("x", both[: len(members)], both[len(members) :])


BY_SAMPLES = {
    "full black box": lambda c, s, r: gan_leaks_full_black_box(c, s),
    "domias kde": lambda c, s, r: domias(c, s, r),
    "domias knn": lambda c, s, r: domias(c, s, r, density="knn"),
    "density ratio": lambda c, s, r: density_ratio(c, s, r, k=2),
    "calibrated": lambda c, s, r: calibrated(gan_leaks_full_black_box(c, s), gan_leaks_full_black_box(c, r)),
}


# by released samples


@pytest.mark.parametrize("name", BY_SAMPLES)
def test_a_noisy_copier_is_found_and_the_same_attack_is_blind_on_its_held_out_twin(name):
    members, non_members, others = (pictures(60, seed, 16) for seed in (1, 2, 3))
    released, reference = copies(members, 200, 8), pictures(200, 4, 16)
    assert judged(lambda c: BY_SAMPLES[name](c, released, reference), members, non_members).finds_leak
    blind = judged(lambda c: BY_SAMPLES[name](c, released, reference), others, non_members)
    assert blind.low < 0.5 < blind.high


@pytest.mark.parametrize("name", BY_SAMPLES)
def test_the_interval_holds_one_half_where_nothing_leaks(name):
    def found(seed):
        members, non_members, released, reference = (gaussian(4 * seed + i) for i in range(4))
        return judged(lambda c: BY_SAMPLES[name](c, released, reference), members, non_members)

    results = [found(seed) for seed in range(100)]
    assert np.mean([r.low < 0.5 < r.high for r in results]) == pytest.approx(0.95, abs=0.06)
    assert np.mean([r.auc for r in results]) == pytest.approx(0.5, abs=0.013)  # 3 standard errors of 0.04 / sqrt(100)


def test_full_black_box_measures_unit_pixels_exactly_for_every_kind_of_image():
    candidates, released = pictures(20, 1), np.concatenate([pictures(30, 2), pictures(3, 1)])
    expected = -cdist(candidates.reshape(20, -1) / 255, released.reshape(33, -1) / 255).min(1)
    found = gan_leaks_full_black_box(candidates, released)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert found.dtype == np.float64
    assert (found[:3] == 0).all()
    np.testing.assert_allclose(gan_leaks_full_black_box(as_images(candidates), released), expected, atol=1e-6)
    rows = candidates.reshape(20, -1) / 255, released.reshape(33, -1) / 255
    np.testing.assert_allclose(gan_leaks_full_black_box(*rows), expected, atol=1e-9)


def test_images_beside_rows_are_refused_for_their_units_differ():
    images = pictures(12, 1)
    rows = images.reshape(12, -1) / 255
    for sets in ((images, rows), (rows, images), (as_images(images), rows)):
        with pytest.raises(ValueError, match="give all as images or all as rows"):
            gan_leaks_full_black_box(*sets)
    with pytest.raises(ValueError, match="give all as images or all as rows"):
        authenticity(images, images, rows)


def test_calibration_finds_among_easy_and_hard_images_what_distances_alone_miss():
    rng = np.random.default_rng(0)
    contrast = np.where(np.arange(200) % 2, 0.9, 0.1)[:, None]  # every other image is plain and near to everything

    def drawn():
        return contrast * rng.normal(size=(200, 16))

    members, non_members, unseen = drawn(), drawn(), drawn()
    released = members + 0.8 * drawn()
    plain = judged(lambda c: gan_leaks_full_black_box(c, released), members, non_members)
    both = judged(lambda c: BY_SAMPLES["calibrated"](c, released, unseen), members, non_members)
    assert both.finds_leak
    assert both.low > plain.high


def test_calibration_needs_both_scores_of_one_image():
    with pytest.raises(ValueError, match="same images, not"):
        calibrated(np.zeros(3), np.zeros(2))


@pytest.mark.parametrize("density", ["kde", "knn"])
def test_domias_is_the_ratio_written_out_on_components_that_no_candidate_shaped(density):
    candidates, released, reference = (pictures(n, seed) for n, seed in ((12, 1), (50, 2), (70, 3)))
    found = domias(candidates, released, reference, density, dim=4, k=3)
    units = [part.reshape(len(part), -1) / 255 for part in (candidates, released, reference)]
    pca = PCA(4, svd_solver="full").fit(np.concatenate(units[1:]))
    c, s, r = (pca.transform(part) for part in units)
    log_density = kernel_density if density == "kde" else neighbour_density
    np.testing.assert_allclose(found, log_density(c, s) - log_density(c, r), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(domias(candidates[:5], released, reference, density, 4, 3), found[:5], atol=1e-9)


def kernel_density(points, samples):
    n, dim = samples.shape
    covariance = np.cov(samples.T) * n ** (-2 / (dim + 4))
    return np.array([np.log(np.mean([multivariate_normal.pdf(p, s, covariance) for s in samples])) for p in points])


def neighbour_density(points, samples):
    """Up to the ball's volume and k, which are the same for both sets."""
    return -np.log(len(samples)) - points.shape[1] * np.log(np.sort(cdist(points, samples), axis=1)[:, 2])


def test_domias_by_neighbours_meets_gaussians_of_known_density():
    released, reference = 0.5 * gaussian(0, 20_000, 2), gaussian(1, 20_000, 2)
    points = np.array([[0.0, 0.0], [0.6, 0.0], [0.5, -0.8]])
    expected = [
        multivariate_normal.logpdf(p, np.zeros(2), 0.25) - multivariate_normal.logpdf(p, np.zeros(2)) for p in points
    ]
    found = domias(points, released, reference, "knn", dim=2, k=400)
    np.testing.assert_allclose(found, expected, atol=0.2)  # three standard errors: sqrt(2 / 400) each


def test_domias_far_from_everything_stays_a_number():
    found = domias(1e3 * np.ones((1, 2)), gaussian(0, 50, 2), gaussian(1, 50, 2))
    assert np.isfinite(found).all()


def test_domias_says_what_it_cannot_do():
    c, s = gaussian(0, 5, 6), gaussian(1, 30, 6)
    with pytest.raises(ValueError, match="no kernel density; take a smaller dim"):
        domias(c, s[:1].repeat(30, 0), s)
    with pytest.raises(ValueError, match="no kernel density; take a smaller dim"):
        domias(c, s[:4], s)
    with pytest.raises(ValueError, match='must be "kde" or "knn"'):
        domias(c, s, s, density="flow")
    with pytest.raises(ValueError, match="are equal; there is no density"):
        domias(c, np.zeros((4, 6)), np.zeros((4, 6)))
    with pytest.raises(ValueError, match="of one shape"):
        domias(c, s[:, :5], s)


@pytest.mark.parametrize("k", [1, 7])
def test_density_ratios_are_no_free_lunch_s_for_each_candidate(k):
    candidates, first, second = gaussian(0, 9), gaussian(1, 40), gaussian(2, 60)
    expected = [density_ratio_epsilon(c, first, second, k=k) for c in candidates]
    np.testing.assert_allclose(
        density_ratio(candidates, first, second, k), [e.as_published for e in expected], rtol=1e-6
    )
    found = density_ratio(candidates, first, second, k, corrected=True)
    np.testing.assert_allclose(found, [e.corrected for e in expected], rtol=1e-6, atol=1e-9)


def test_density_ratios_at_copies():
    first, second = gaussian(0, 20), gaussian(1, 20)
    candidates = np.concatenate([first[:1], second[:1]])
    np.testing.assert_array_equal(density_ratio(candidates, first, second, 1), [np.inf, -np.inf])
    with pytest.raises(ValueError, match="k times in both sets"):
        density_ratio(first[:1], first, first, 1)
    with pytest.raises(ValueError, match="must not pass the sample counts, 20 and 20"):
        density_ratio(candidates, first, second, 21)


# LOGAN


@given(scores, scores)
def test_logan_accuracy_is_the_mean_over_random_orders_of_ties(members, non_members):
    together = np.concatenate([members, non_members])
    rng, n = np.random.default_rng(0), len(members)
    orders = (np.lexsort((rng.random(len(together)), -together)) for _ in range(200))
    expected = np.mean([(order[:n] < n).mean() for order in orders])
    found = logan_accuracy(members, non_members)
    assert found.accuracy == pytest.approx(expected, abs=0.17)  # over 4 standard errors of 0.5 / sqrt(200)
    assert found.baseline == n / len(together)


def test_logan_accuracy_has_its_ends_and_its_baseline():
    perfect = logan_accuracy(np.arange(10) + 100.0, np.arange(90.0))
    assert (perfect.accuracy, perfect.baseline) == (1, 0.1)
    assert logan_accuracy(np.zeros(10), np.ones(90)).accuracy == 0
    assert logan_accuracy(np.ones(10), np.ones(90)).accuracy == pytest.approx(0.1)


def test_logan_accuracy_of_random_scores_is_the_baseline_with_its_spread():
    found = [logan_accuracy(*np.split(np.random.default_rng(seed).random(100), [10])) for seed in range(2000)]
    accuracy = np.array([f.accuracy for f in found])
    assert accuracy.mean() == pytest.approx(0.1, abs=4 * found[0].spread / np.sqrt(2000))
    assert found[0].spread == pytest.approx(hypergeom(100, 10, 10).std() / 10)
    assert accuracy.std() == pytest.approx(found[0].spread, rel=0.1)


def test_logan_accuracy_refuses_what_is_no_score():
    for members in ([], [np.nan]):
        with pytest.raises(ValueError, match="needs scores of members and of non-members"):
            logan_accuracy(members, [1.0])


def train_discriminator(real, fake, steps=150):
    torch.manual_seed(0)
    discriminator = gan.Discriminator(1, 10, width=16)
    optimiser = torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.5, 0.999))
    labels = torch.arange(len(real)) % 10
    for _ in range(steps):
        rows = torch.randint(len(fake), (len(real),))
        loss = gan.discriminator_loss(discriminator, real, fake[rows], labels, rows % 10).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return discriminator


def test_logan_white_box_finds_the_training_set_of_an_overfitted_discriminator():
    members, non_members, fake, others = (as_images(pictures(20, 1)), *(as_images(pictures(100, s)) for s in (2, 3, 4)))
    discriminator = train_discriminator(members, fake)

    def scored(images):
        return logan_white_box(images, discriminator, torch.arange(len(images)) % 10, batch_size=7)

    assert attack_result("x", scored(members), scored(non_members)).finds_leak
    assert logan_accuracy(scored(members), scored(non_members)).accuracy > 0.5  # random: 1 in 6
    blind = attack_result("x", scored(others), scored(non_members))
    assert blind.low < 0.5 < blind.high
    assert discriminator.training


def test_logan_white_box_scores_each_image_alone_in_spite_of_batch_norm():
    discriminator = mcgan.Discriminator(image_size=16, width=8)
    images, labels = as_images(pictures(6, 1, side=16)), torch.arange(6) % 2
    whole = logan_white_box(images, discriminator, labels)
    alone = [logan_white_box(images[i : i + 1], discriminator, labels[i : i + 1])[0] for i in range(6)]
    np.testing.assert_allclose(whole, alone, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def logan_settings():
    return {"width": 16, "batch_size": 10, "lr": 1e-3, "latent_dim": 8}


@pytest.mark.parametrize(("auxiliary", "steps"), [(False, 300), (True, 150)])
def test_logan_black_box_finds_a_copier_and_accuses_nobody_else(auxiliary, steps, logan_settings):
    members, non_members, others = pictures(10, 1), pictures(60, 2), pictures(60, 5)
    reference = pictures(100, 3) if auxiliary else None
    candidates = np.concatenate([members, non_members, others])
    state = torch.get_rng_state()
    found = logan_black_box(candidates, copies(members, 100, 4), reference, steps=steps, **logan_settings)
    assert torch.equal(state, torch.get_rng_state())
    inside, outside, other = np.split(found, [10, 70])
    assert attack_result("x", inside, outside).finds_leak
    blind = attack_result("x", other, outside)
    assert blind.low < 0.5 < blind.high


def test_logan_black_box_repeats_and_takes_labels_for_all_or_none(logan_settings):
    images, labels = pictures(12, 1), np.arange(12) % 10
    runs = [
        logan_black_box(images, images, labels=labels, synthetic_labels=labels, steps=2, seed=seed, **logan_settings)
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert (runs[0] != runs[2]).all()
    with pytest.raises(ValueError, match="sides a multiple of 4"):
        logan_black_box(pictures(4, 1, side=10), pictures(4, 2, side=10), steps=2, **logan_settings)
    with pytest.raises(ValueError, match="for every set of images or for none"):
        logan_black_box(images, images, labels=labels, steps=2, **logan_settings)


# by queries and by weights

DIM = 6


def memoriser(images, sharpness=4.0):
    """A generator with one place in latent space for each of its training images, mixing them in between."""
    keys = torch.randn(len(images), DIM, generator=torch.Generator().manual_seed(0))

    def synthesise(latents, labels):
        weights = (-sharpness * torch.cdist(latents, keys).square()).softmax(1)
        return torch.einsum("nk,kchw->nchw", weights, images)

    return synthesise


def linear(seed=99, scale=0.08):
    """An invertible generator: 6 latents to 64 pixels; and some of its images, with latents as long as usual."""
    generator = torch.Generator().manual_seed(seed)
    matrix = scale * torch.randn(DIM, 64, generator=generator)
    latents = torch.nn.functional.normalize(torch.randn(9, DIM, generator=generator)) * DIM**0.5

    def synthesise(z, labels):
        return (z @ matrix).view(-1, 1, 8, 8)

    return synthesise, synthesise(latents, None)


BY_SEARCH = {
    "partial": lambda c, g, **s: gan_leaks_partial_black_box(c, g, (DIM,), steps=25, population=8, search=Search(**s)),
    "white": lambda c, g, **s: gan_leaks_white_box(c, g, (DIM,), steps=60, search=Search(**s)),
}


@pytest.mark.parametrize("name", BY_SEARCH)
def test_a_memorising_generator_is_found_through_its_latents_and_an_innocent_one_is_not(name):
    members, non_members, others = (as_images(pictures(40, seed)) for seed in (1, 2, 3))

    def found(generator):
        return judged(lambda c: BY_SEARCH[name](c, generator, pool=50, restarts=2), members, non_members)

    innocent = found(memoriser(others))
    assert found(memoriser(members)).finds_leak
    assert innocent.low < 0.5 < innocent.high


def test_the_searches_reach_zero_on_an_invertible_generator_and_the_pool_does_not():
    generator, images = linear()
    pool = gan_leaks_white_box(images, generator, (DIM,), steps=1, lr=0.0)
    white = gan_leaks_white_box(images, generator, (DIM,), steps=600)
    partial = gan_leaks_partial_black_box(images, generator, (DIM,), steps=150)
    assert (white > -1e-6).all()
    assert (partial > -1e-5).all()
    assert pool.max() < -1e-4


def test_the_search_heeds_the_latents_length():
    generator, images = linear()
    far = 0.1 * images  # its latents are too short by a factor of ten
    free = gan_leaks_white_box(far, generator, (DIM,), steps=400, search=Search(latent_weight=0.0))
    held = gan_leaks_white_box(far, generator, (DIM,), steps=400, search=Search(latent_weight=1.0))
    assert (free > -1e-6).all()
    assert (held < free - 1e-3).all()


def test_the_score_is_the_distance_alone_without_the_penalty():
    def constant(latents, labels):
        return torch.zeros(len(latents), 1, 8, 8) + 0 * latents.sum()

    images = as_images(pictures(3, 1))
    found = gan_leaks_white_box(images, constant, (DIM,), steps=2, search=Search(latent_weight=1.0))
    np.testing.assert_allclose(found, -images.square().mean((1, 2, 3)), rtol=1e-5)


@pytest.mark.parametrize("name", BY_SEARCH)
@pytest.mark.parametrize("labelled", [False, True])
def test_a_candidate_s_score_does_not_depend_on_who_else_is_asked_about(name, labelled):
    images = as_images(pictures(5, 1))
    shades = as_images(pictures(3, 9))
    base = memoriser(as_images(pictures(12, 2)), sharpness=0.5)

    def generator(latents, labels):
        return base(latents, None) if labels is None else (base(latents, None) + shades[labels]) / 2

    attack = {
        "partial": lambda c, y: gan_leaks_partial_black_box(
            c, generator, (DIM,), y, 10, 6, Search(pool=20, batch_size=50)
        ),
        "white": lambda c, y: gan_leaks_white_box(c, generator, (DIM,), y, 30, search=Search(pool=20, batch_size=50)),
    }[name]
    labels = np.array([2, 0, 1, 1, 0]) if labelled else None
    alone = [attack(images[i : i + 1], None if labels is None else labels[i : i + 1])[0] for i in range(5)]
    np.testing.assert_allclose(attack(images, labels), alone, rtol=1e-3, atol=1e-5)


def test_a_perceptual_distance_is_weighed_in():
    generator, images = linear()
    one = Search(pool=20, perceptual=lambda made, targets: torch.ones(len(made)))
    none = Search(pool=20)
    found = [gan_leaks_white_box(images, generator, (DIM,), steps=5, search=search) for search in (none, one)]
    np.testing.assert_allclose(found[0] - found[1], 0.2, atol=1e-6)


def test_searches_say_what_is_wrong():
    generator, images = linear()
    with pytest.raises(ValueError, match="between 1 and pool"):
        Search(pool=2, restarts=3)
    with pytest.raises(ValueError, match="population must be 2 or more"):
        gan_leaks_partial_black_box(images, generator, (DIM,), population=1)
    with pytest.raises(ValueError, match="give one label per image"):
        gan_leaks_white_box(images, generator, (DIM,), labels=[0])


# authenticity


def slow_authentic(images, train):
    flags = []
    for image in images:
        distances = [np.linalg.norm(image - other) for other in train]
        i = int(np.argmin(distances))
        flags.append(distances[i] > min(np.linalg.norm(train[i] - train[j]) for j in range(len(train)) if j != i))
    return flags


def test_authenticity_is_the_text_s_definition_written_out():
    synthetic, train, holdout = gaussian(0, 30), gaussian(1, 40), gaussian(2, 35)
    found = authenticity(synthetic, train, holdout)
    np.testing.assert_array_equal(found.authentic, slow_authentic(synthetic, train))
    np.testing.assert_array_equal(found.control_authentic, slow_authentic(holdout, train))
    assert found.share == np.mean(found.authentic)
    assert found.low < found.share < found.high
    assert found.control_low < found.control < found.control_high


def test_copies_are_not_authentic_noise_is_and_an_innocent_generator_is_like_its_control():
    train, holdout, innocent = pictures(80, 1), pictures(100, 2), pictures(100, 3)
    copied, fresh = authenticity(copies(train, 100, 3), train, holdout), authenticity(innocent, train, holdout)
    assert copied.high < copied.control_low
    assert fresh.low < fresh.control < fresh.high
    assert 0.2 < fresh.control < 0.8  # a share far from 1 is no sign of copies
    noise = np.random.default_rng(0).integers(0, 256, train.shape, np.uint8)
    assert authenticity(noise, train, holdout).share == 1


def test_a_training_image_that_stands_twice_has_no_authentic_copy():
    train = np.concatenate([gaussian(0, 10), gaussian(0, 10)[:1]])
    assert not authenticity(train[:1], train, gaussian(1, 5)).authentic[0]
