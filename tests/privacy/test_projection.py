"""Projection: reaches what can be reached, treats members and others alike, follows the paper's schedule."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.distance import cosine

from lookalike.data import phantoms
from lookalike.metrics import as_images
from lookalike.models import gan, mcgan, vae
from lookalike.privacy.attack import attack_result
from lookalike.privacy.membership import Search, gan_leaks_white_box
from lookalike.privacy.projection import (
    Projector,
    Start,
    autocorrelation,
    cosine_distances,
    gan_access,
    mean_latents,
    normal_start,
    project,
    project_groups,
    ramp,
    vae_access,
)

QUICK = Projector(steps=150)


def pictures(n, seed, side=8):
    return as_images(phantoms.grey28(n, seed=seed, image_size=side).image_set.images)


def linear(basis):
    """A generator of mixtures of `basis` (d, C, H, W)."""
    return lambda z, labels: torch.einsum("nd,dchw->nchw", z, basis)


def axes(dim=5, seed=0):
    return 0.1 * torch.randn(dim, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_projection_inverts_an_invertible_generator():
    generator, latents = linear(axes()), torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    images = generator(latents, None)
    found = project(images, generator, normal_start((5,)), projector=Projector(steps=400))
    torch.testing.assert_close(found.latents, latents, atol=5e-3, rtol=0)
    torch.testing.assert_close(found.images, images, atol=2e-3, rtol=0)
    assert (found.errors < 1e-6).all()
    np.testing.assert_array_equal(found.scores, -found.errors)


def test_the_error_is_the_mean_squared_difference_of_unit_pixels():
    images = pictures(5, 1)
    found = project(images, linear(axes()), normal_start((5,)), projector=QUICK)
    expected = ((found.images - images) / 2).square().mean((1, 2, 3))
    np.testing.assert_allclose(found.errors, expected, rtol=1e-5)
    matrix = axes().flatten(1).T.double()
    least = torch.linalg.lstsq(matrix, images.flatten(1).T.double()).solution
    best = (matrix @ least - images.flatten(1).T).square().mean(0) / 4
    assert (found.errors >= (1 - 1e-5) * best.numpy()).all()
    np.testing.assert_allclose(found.errors, best, rtol=0.05)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_each_image_is_projected_as_if_alone(batch_size):
    images, labels = pictures(4, 1), torch.tensor([1, 0, 1, 0])
    start = mean_latents(lambda z, y: z * (1 + y[:, None]) + y[:, None], 5, num_classes=2, samples=200)
    shade = torch.tensor([0.0, 0.2])

    def generator(w, y):
        return linear(axes())(w, y).tanh() + shade[y][:, None, None, None]

    whole = project(images, generator, start, labels, QUICK)
    parts = project(images, generator, start, labels, Projector(steps=150, batch_size=batch_size))
    np.testing.assert_allclose(whole.errors, parts.errors, rtol=1e-4)
    one = project(images[2:3], generator, start, labels[2:3], QUICK)
    np.testing.assert_allclose(whole.errors[2], one.errors[0], rtol=1e-4)


def test_members_of_a_memorising_generator_are_reached_and_held_out_images_are_not():
    members, non_members, others = pictures(20, 1), pictures(60, 2), pictures(60, 3)
    leaky = project_groups(members, non_members, linear(members), normal_start((20,)), projector=QUICK)
    innocent = project_groups(others, non_members, linear(members), normal_start((20,)), projector=QUICK)
    assert attack_result("projection", leaky[0].scores, leaky[1].scores).finds_leak
    blind = attack_result("projection", innocent[0].scores, innocent[1].scores)
    assert blind.low < 0.5 < blind.high


def test_the_learning_rate_rises_holds_and_falls_as_in_the_paper():
    found = [ramp(t) for t in (0, 0.025, 0.05, 0.5, 0.75, 0.875, 1)]
    np.testing.assert_allclose(found, [0, 0.5, 1, 1, 1, 0.5, 0], atol=1e-12)


@given(st.floats(0, 1))
def test_the_learning_rate_s_factor_stays_in_bounds(t):
    assert 0 <= ramp(t) <= 1


def test_latents_are_disturbed_by_a_share_of_their_spread_that_ends_after_three_quarters():
    seen = []

    def generator(latents, labels):
        seen.append(latents.detach().clone())
        return torch.zeros(len(latents), 1, 8, 8) + 0 * latents.sum()

    start = Start(torch.zeros(1, 1000), torch.tensor([10.0]))
    project(pictures(2, 1), generator, start, projector=Projector(steps=40))
    spreads = torch.stack([latents[0].std() for latents in seen])
    expected = torch.tensor([0.5 * max(0, 1 - step / 30) ** 2 for step in range(40)] + [0.0])
    torch.testing.assert_close(spreads, expected, rtol=0.1, atol=1e-6)
    assert all((latents[0] == latents[1]).all() for latents in seen)


def test_mean_latents_are_those_of_each_class_with_the_root_of_the_mean_squared_distance():
    scale = torch.tensor([1.0, 3.0])
    start = mean_latents(lambda z, y: 5 * y[:, None] + scale[y][:, None] * z, 4, num_classes=2, samples=20_000)
    torch.testing.assert_close(start.means, torch.tensor([[0.0], [5.0]]).expand(2, 4), atol=0.1, rtol=0)
    torch.testing.assert_close(start.spread, 2 * scale, rtol=0.02, atol=0)
    means, spread = start.of(torch.tensor([1, 0, 1]), 3)
    assert torch.equal(means, start.means[[1, 0, 1]])
    assert torch.equal(spread, start.spread[[1, 0, 1]])
    with pytest.raises(ValueError, match="2 classes; give each image its label"):
        start.of(None, 3)
    simple = normal_start((2, 8))
    assert simple.means.shape == (1, 2, 8)
    assert simple.spread.item() == 4


def noisy(maps_seen):
    def generator(latents, labels, maps):
        maps_seen.append([noise.detach().clone() for noise in maps])
        return linear(axes())(latents, labels) + 0.1 * maps[1]

    return generator


def test_noise_maps_are_optimised_kept_normal_and_rendered():
    seen, images = [], pictures(3, 1)
    projector = Projector(steps=60, noise_shapes=((1, 4, 4), (1, 8, 8)))
    found = project(images, noisy(seen), normal_start((5,)), projector=projector)
    last = seen[-1]
    assert [noise.shape for noise in last] == [(3, 1, 4, 4), (3, 1, 8, 8)]
    for noise in last:
        torch.testing.assert_close(noise.mean((1, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
        torch.testing.assert_close(noise.square().mean((1, 2, 3)), torch.ones(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.images, linear(axes())(found.latents, None) + 0.1 * last[1])
    alone = project(images[1:2], noisy([]), normal_start((5,)), projector=projector)
    np.testing.assert_allclose(found.errors[1], alone.errors[0], rtol=1e-3)


def test_autocorrelation_is_written_out_and_small_for_white_noise_only():
    noise = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    coarse = noise.numpy().reshape(2, 1, 8, 2, 8, 2).mean((3, 5))
    expected = np.zeros(2)
    for level in (noise.numpy(), coarse):
        for axis in (2, 3):
            expected += (level * np.roll(level, 1, axis)).mean((1, 2, 3)) ** 2
    np.testing.assert_allclose(autocorrelation([noise]), expected)
    assert (autocorrelation([noise]) < 0.05).all()
    assert (autocorrelation([torch.ones(2, 1, 16, 16)]) == 4).all()
    assert autocorrelation([]) == 0


def test_a_perceptual_distance_takes_the_place_of_pixels():
    def brightness(made, targets):
        return (made.mean((1, 2, 3)) - targets.mean((1, 2, 3))).square()

    images = pictures(3, 1)
    plain = linear(torch.ones(1, 1, 8, 8))
    found = project(images, plain, normal_start((1,)), projector=Projector(steps=200, perceptual=brightness))
    assert (found.errors < 1e-6).all()
    assert (found.images - images).abs().mean() > 0.1


# access to our generators


def test_gan_access_is_the_generator_and_leaves_it_as_it_was():
    torch.manual_seed(0)
    generator = mcgan.Generator(image_size=8, num_classes=2, latent_dim=6, width=8)
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    synthesise, shape = gan_access(generator)
    labels = torch.tensor([0, 1, 1])
    z = generator.noise(3, torch.Generator().manual_seed(5))
    torch.testing.assert_close(synthesise(z, labels), generator.sample(labels, torch.Generator().manual_seed(5)))
    assert shape == (6,)
    gan_leaks_white_box(pictures(3, 1), synthesise, shape, labels, steps=3, search=Search(pool=10))
    assert generator.training
    assert all(torch.equal(value, before[name]) for name, value in generator.state_dict().items())
    assert all(parameter.grad is None for parameter in generator.parameters())


def test_vae_access_is_the_decoder_without_its_dropout():
    torch.manual_seed(0)
    model = vae.ConditionalVAE(image_size=8, num_classes=2, latent_dim=6, width=8)
    synthesise, shape = vae_access(model)
    labels = torch.tensor([0, 1])
    z = torch.randn(2, 6, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(synthesise(z, labels), model.sample(labels, torch.Generator().manual_seed(5)))
    assert shape == (6,)


def test_a_small_gan_s_own_images_are_nearer_than_real_ones():
    torch.manual_seed(0)
    generator = gan.Generator(image_size=8, num_classes=2, latent_dim=4, width=8)
    labels = torch.arange(6) % 2
    own = generator.sample(labels, torch.Generator().manual_seed(1))
    synthesise, shape = gan_access(generator)
    made, real = project_groups(own, pictures(6, 1), synthesise, normal_start(shape), labels, labels, QUICK)
    assert made.errors.max() < 0.1 * real.errors.min()


# the paper's own statistic


@given(arrays(float, (2, 7, 4), elements=st.floats(0.1, 10)))
def test_cosine_distances_are_scipy_s_with_their_quartiles(features):
    found = cosine_distances(*features)
    expected = [cosine(a, b) for a, b in zip(*features)]
    np.testing.assert_allclose(found.distances, expected, atol=1e-12)
    quartiles = [found.q1, found.median, found.q3]
    np.testing.assert_allclose(quartiles, np.percentile(expected, [25, 50, 75]), atol=1e-12)
    assert found.mean == pytest.approx(np.mean(expected), abs=1e-12)
    assert quartiles == sorted(quartiles)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="of one shape"):
        cosine_distances(np.ones((3, 2)), np.ones((2, 2)))
    with pytest.raises(ValueError, match="row of features is zero"):
        cosine_distances(np.zeros((1, 2)), np.ones((1, 2)))
    with pytest.raises(ValueError, match="must be 1 or more"):
        Projector(steps=0)
    with pytest.raises(ValueError, match="one label per image"):
        project(pictures(3, 1), linear(axes()), normal_start((5,)), labels=[0, 1])
