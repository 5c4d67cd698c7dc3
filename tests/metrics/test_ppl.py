import math

import numpy as np
import pytest
import torch

from lookalike.metrics.paths import path_length, trimmed_mean
from lookalike.metrics.perceptual import stlpips
from lookalike.models.gan import Generator


def squared_euclidean(real, synthetic):
    return (real - synthetic).square().flatten(1).sum(1)


def normal(dim):
    """Draws latents in float64, and keeps what it drew."""

    def draw(labels, generator):
        draw.drawn.append(torch.randn(len(labels), dim, generator=generator, dtype=torch.float64))
        return draw.drawn[-1]

    draw.drawn = []
    return draw


def linear(matrix):
    return lambda latents, labels: (latents @ matrix.T).view(-1, 1, 4, 4)


@pytest.fixture
def matrix():
    return torch.randn(16, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("whole_path", [False, True])
def test_a_linear_generator_moves_by_its_matrix_times_the_step(matrix, whole_path):
    """|A (w1 - w0)|^2, wherever on the path."""
    draw, generator = normal(5), torch.Generator().manual_seed(1)
    labels = torch.zeros(30, dtype=torch.long)
    found = path_length(linear(matrix), draw, squared_euclidean, labels, generator, whole_path=whole_path, batch_size=7)
    a, b = torch.cat(draw.drawn[1::2]), torch.cat(draw.drawn[2::2])  # the first draw only checks that noise is fixed
    expected = (b - a) @ matrix.T
    np.testing.assert_allclose(found.lengths, expected.square().sum(1), rtol=1e-6)
    assert found.value == trimmed_mean(found.lengths)


def test_the_mean_over_normal_latents_is_twice_the_squared_norm_of_the_matrix(matrix):
    labels = torch.zeros(20_000, dtype=torch.long)
    generator = torch.Generator().manual_seed(2)
    found = path_length(linear(matrix), normal(5), squared_euclidean, labels, generator, batch_size=5000)
    error = found.lengths.std() / math.sqrt(len(labels))
    assert abs(found.lengths.mean() - 2 * matrix.square().sum().item()) < 4 * error
    assert 0.9 * found.lengths.mean() < found.value < found.lengths.mean()  # the long tail is cut


@pytest.mark.parametrize("whole_path", [False, True])
def test_on_the_sphere_a_step_is_the_angle_between_the_ends(whole_path):
    """Latents of length one through an identity: a chord of the angle's share epsilon."""
    angles = []

    def draw(labels, generator):
        latents = torch.randn(len(labels), 16, generator=generator, dtype=torch.float64)
        angles.append(latents / latents.norm(dim=1, keepdim=True))
        return angles[-1]

    labels, identity = torch.zeros(40, dtype=torch.long), linear(torch.eye(16, dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    found = path_length(identity, draw, squared_euclidean, labels, generator, True, whole_path, batch_size=40)
    angle = torch.acos((angles[1] * angles[2]).sum(1))
    np.testing.assert_allclose(found.lengths, (2 * torch.sin(angle * 1e-4 / 2) / 1e-4).square(), rtol=1e-5)


def test_on_the_sphere_normal_latents_keep_a_normal_length():
    seen = []

    def synthesise(latents, labels):
        seen.append(latents)
        return latents.view(-1, 1, 16, 16)

    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(300, dtype=torch.long)
    path_length(synthesise, normal(256), squared_euclidean, labels, generator, spherical=True, whole_path=True)
    lengths = torch.cat(seen).norm(dim=1) / 16
    assert 0.8 < lengths.min() < lengths.max() < 1.2  # a straight path would pass through 0.7


def test_torch_fidelity_finds_the_same():
    from torch_fidelity import GenerativeModelModuleWrapper, calculate_metrics, register_sample_similarity
    from torch_fidelity.sample_similarity_base import SampleSimilarityBase

    class Squared(SampleSimilarityBase):
        def __init__(self, name, sample_similarity_resize=None, sample_similarity_dtype=None, **rest):
            super().__init__(name)

        def forward(self, a, b):
            return squared_euclidean(a, b)

    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 16)).double().eval()
    model = GenerativeModelModuleWrapper(_Double(network), 8, "normal", 0)
    register_sample_similarity("squared", Squared)
    theirs = calculate_metrics(
        input1=model, input1_model_num_samples=200, ppl=True, ppl_sample_similarity="squared", ppl_reduction="none",
        ppl_z_interp_mode="lerp", ppl_epsilon=1e-2, batch_size=200, rng_seed=7, cuda=False, verbose=False,
        ppl_discard_percentile_lower=None, ppl_discard_percentile_higher=None,  # its trimming needs an older numpy
    )  # fmt: skip
    stream = np.random.RandomState(7)
    latents = [torch.from_numpy(stream.randn(200, 8)).float() for _ in range(2)]
    draws = iter([latents[0], *latents])
    ours = path_length(
        lambda z, labels: network(z.double()).view(-1, 1, 4, 4), lambda labels, generator: next(draws),
        squared_euclidean, torch.zeros(200), epsilon=1e-2, batch_size=200,
    )  # fmt: skip
    np.testing.assert_allclose(ours.lengths, theirs["perceptual_path_length_raw"], rtol=2e-5)  # float32 steps
    assert ours.lengths.mean() == pytest.approx(theirs["perceptual_path_length_mean"], rel=1e-5)


class _Double(torch.nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, z):
        return self.network(z.double()).view(-1, 1, 4, 4)


def test_both_ends_have_the_label_of_their_pair(matrix):
    calls = []

    def synthesise(latents, labels):
        calls.append(labels)
        return linear(matrix)(latents, labels)

    labels = torch.tensor([3, 1, 2, 0, 1])
    path_length(synthesise, normal(5), squared_euclidean, labels, batch_size=3)
    assert [part.tolist() for part in calls[2:]] == [[3, 1, 2, 3, 1, 2], [0, 1, 0, 1]]


def test_seed_repeats_and_a_rougher_generator_is_longer():
    torch.manual_seed(0)
    network = Generator(image_size=28, num_classes=4, latent_dim=8, width=8).eval()
    distance, labels = stlpips("alex"), torch.arange(12) % 4

    def length(scale, seed):
        def draw(part, generator):
            return network.noise(len(part), generator)

        generator = torch.Generator().manual_seed(seed)
        return path_length(lambda z, part: network(scale * z, part), draw, distance, labels, generator, epsilon=1e-2)

    once = length(1, 0)
    np.testing.assert_array_equal(once.lengths, length(1, 0).lengths)
    assert once.value != length(1, 1).value
    assert once.value < length(3, 0).value
    assert length(0, 0).value == 0


def test_float32_rounds_the_mean_by_less_than_a_per_cent_and_a_length_by_less_than_ten():
    labels, found = torch.zeros(16, dtype=torch.long), {}
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Linear(16, 24 * 24), torch.nn.Tanh())
        torch.nn.init.normal_(network[0].weight, std=0.1, generator=torch.Generator().manual_seed(1))
        network.to(dtype)
        found[dtype] = path_length(
            lambda z, y: network(z).view(-1, 1, 24, 24),  # noqa: B023
            lambda y, generator: torch.randn(len(y), 16, generator=generator).to(dtype),  # noqa: B023
            stlpips("alex").to(dtype), labels, torch.Generator().manual_seed(0),
        ).lengths  # fmt: skip
    single, double = found.values()
    assert single.mean() == pytest.approx(double.mean(), rel=0.01)
    np.testing.assert_allclose(single, double, rtol=0.1)


def test_trimming_is_the_papers():
    lengths = np.arange(200.0)
    lengths[199] = 1e9
    inside = np.extract(
        (lengths >= 1) & (lengths <= 198), lengths
    )  # numpy's lower and higher neighbour of 1.99, 197.01
    assert trimmed_mean(np.random.default_rng(0).permutation(lengths)) == inside.mean()
    assert trimmed_mean([2.0, 4.0]) == 3.0


def test_what_cannot_be_measured_gets_one_sentence(matrix):
    labels = torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match="other images for the same latents: fix its noise"):
        path_length(lambda z, y: torch.randn(len(z), 1, 4, 4), normal(5), squared_euclidean, labels)
    with pytest.raises(ValueError, match="at least one label"):
        path_length(linear(matrix), normal(5), squared_euclidean, labels[:0])
    with pytest.raises(ValueError, match="epsilon above 0"):
        path_length(linear(matrix), normal(5), squared_euclidean, labels, epsilon=0)
    with pytest.raises(ValueError, match="not finite"):
        path_length(linear(matrix), normal(5), lambda a, b: torch.full((len(a),), torch.nan), labels)
