import json

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist, pdist
from scipy.stats import multivariate_normal, norm, spearmanr
from sklearn.preprocessing import MinMaxScaler
from torch import nn

from lookalike.metrics import diversity, plane_networks, reducers
from lookalike.metrics.plane_networks import Autoencoder, Flow, LinearMap
from lookalike.metrics.reducers import (
    compare_cell,
    compare_reducers,
    fit_autoencoder,
    fit_flow,
    fit_isomap,
    fit_pca,
    fit_random,
    fit_umap,
    spearman,
    tsne_refit,
)
from lookalike.privacy.density import density_ratio_epsilon, fit_reducer


def spots(seed, n=80, side=8):
    """One soft spot per image: two factors, its place, make all pixels."""
    rng = np.random.default_rng(seed)
    places, grid = rng.uniform(1, side - 2, (n, 2)), np.arange(side)
    gaps = (grid[:, None] - places[:, 0, None, None]) ** 2 + (grid[None] - places[:, 1, None, None]) ** 2
    return torch.from_numpy((2 * np.exp(-gaps / 4) - 1).astype(np.float32))[:, None]


def unit(images):
    return ((images + 1) / 2).flatten(1).numpy()


TINY = {
    "isomap": lambda images: fit_isomap(images, n_neighbors=8),
    "pca": fit_pca,
    "random": fit_random,
    "autoencoder": lambda images: fit_autoencoder(images, epochs=2, width=8),
    "flow": lambda images: fit_flow(images, epochs=2, dim=5, couplings=2, hidden=8),
}


@pytest.mark.parametrize("name", TINY)
def test_maps_take_new_images_repeat_and_leave_the_random_stream_alone(name):
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    fitted, again = TINY[name](spots(0)), TINY[name](spots(0))
    assert torch.equal(torch.random.get_rng_state(), before)
    points = fitted.transform(spots(1, 20))
    assert points.shape == (20, 2)
    assert points.dtype == np.float64
    np.testing.assert_array_equal(again.transform(spots(1, 20)), points)
    np.testing.assert_allclose(fitted.transform(spots(1, 20)[:7]), points[:7], atol=1e-5)  # each image alone
    assert np.ptp(points, axis=0).min() > 0
    with pytest.raises(ValueError, match=r"of images \(1, 8, 8\); these are \(1, 6, 6\)"):
        fitted.transform(spots(1, 20, side=6))


def test_isomap_is_the_privacy_reducer_without_noisy_copies():
    expected = fit_reducer(spots(0), n_neighbors=8, noisy_copies=())
    fitted = fit_isomap(spots(0), n_neighbors=8)
    np.testing.assert_array_equal(fitted.transform(spots(1)), expected.transform(spots(1)))
    found = density_ratio_epsilon(spots(2, 1), spots(0), spots(1), reducer=fitted, k=5)
    assert found.dim == 2


def test_pca_has_the_singular_vectors_of_the_pixels():
    rows, new = unit(spots(0)).astype(float), unit(spots(1, 9)).astype(float)
    vectors = np.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][:2]
    found = fit_pca(spots(0)).transform(spots(1, 9))
    np.testing.assert_allclose(np.abs(found), np.abs((new - rows.mean(0)) @ vectors.T), atol=1e-5)


def test_random_projection_looks_at_no_training_image():
    new = spots(2, 5)
    assert np.array_equal(fit_random(spots(0)).transform(new), fit_random(spots(1)).transform(new))
    assert not np.array_equal(fit_random(spots(0), seed=1).transform(new), fit_random(spots(0)).transform(new))


def test_umap_and_tsne_have_the_authors_settings(monkeypatch):
    calls = []

    class Plane:
        def transform(self, rows):
            return rows[:, :2]

    def record(*rows, **settings):
        calls.append((rows, settings))
        return Plane() if len(rows) == 1 else [part[:, :2] for part in rows]

    monkeypatch.setattr(diversity, "fit_umap", record)
    monkeypatch.setattr(diversity, "tsne", record)
    points = fit_umap(spots(0)).transform(spots(1, 4))
    np.testing.assert_allclose(points, unit(spots(1, 4))[:, :2])
    train, test = tsne_refit(spots(0), spots(1, 4))
    assert (train.shape, test.shape) == ((80, 2), (4, 2))
    assert [settings for _, settings in calls] == [
        {"n_neighbors": 15, "min_dist": 0.1, "seed": 42},
        {"perplexity": 30.0, "seed": 0},
    ]
    np.testing.assert_allclose(calls[0][0][0], unit(spots(0)))


# The networks


@pytest.fixture
def flow():
    """One with couplings that do something."""
    torch.manual_seed(0)
    made = Flow(None, torch.tensor([2.0, 1.0, 0.5, 0.1, 0.3]), couplings=4, hidden=8).double()
    for net in made.nets:
        nn.init.normal_(net[-1].weight, std=0.5)
    return made


def test_flow_inverts_and_its_determinant_is_that_of_the_derivative(flow):
    x = torch.randn(6, 5, dtype=torch.float64)
    z, log_det = flow(x)
    torch.testing.assert_close(flow.inverse(z), x)
    for i in range(6):
        derivative = torch.autograd.functional.jacobian(lambda one: flow(one[None])[0][0], x[i])
        torch.testing.assert_close(log_det[i], torch.linalg.slogdet(derivative).logabsdet)
    assert (z - x * flow.log_scale.exp()).abs().max() > 0.1


def test_flow_starts_as_whitened_principal_components():
    spread = np.array([2.0, 1.0, 0.5, 0.1])
    flow, x = Flow(None, torch.tensor(spread).float(), couplings=3, hidden=8), torch.randn(50, 4)
    x = x * torch.tensor(spread).float()
    expected = multivariate_normal.logpdf(x.numpy(), np.zeros(4), np.diag(spread**2))
    np.testing.assert_allclose(flow.log_density(x).detach().numpy(), expected, rtol=1e-4)
    missed = x[:, 2:].square().sum(1).mean().item() / (spread**2).sum()
    assert flow.missed(x).item() == pytest.approx(missed, rel=1e-5)


def test_flow_learns_a_bent_surface_that_components_cannot_follow():
    rng = np.random.default_rng(0)
    a, b = rng.uniform(-1.5, 1.5, (2, 400))
    rows = np.stack([a, b, a**2 - 0.75, 0.02 * rng.normal(size=400)], 1)
    components = torch.from_numpy(LinearMap.principal(rows, 4).transform(rows).astype(np.float32))
    torch.manual_seed(0)
    flow = Flow(None, components.std(0), couplings=4, hidden=32)
    before, density = flow.missed(components).item(), flow.log_density(components).mean().item()
    plane_networks.train(flow, components, 60)
    assert before > 0.15  # what two principal components leave out
    assert flow.missed(components).item() < 0.3 * before
    assert flow.log_density(components).mean().item() > density + 0.5


def test_autoencoder_learns_and_keeps_its_best_weights():
    images = spots(0, 120)
    model = fit_autoencoder(images, epochs=25, width=8).model
    rows = torch.from_numpy(unit(images))
    assert min(model.history) < 0.8 * model.history[0]
    assert isinstance(model, Autoencoder)
    assert not model.training
    z = model.transform(rows.numpy())
    made = model.decoder(torch.from_numpy(z))[..., :8, :8].sigmoid()
    by_hand = (made.detach().flatten(1) - rows).square().mean() + 0.01 * (z**2).sum(1).mean()
    assert model.loss(rows).item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_autoencoder_takes_sides_that_are_no_multiple_of_eight():
    assert fit_autoencoder(spots(0, 12, side=10), epochs=1, width=8).transform(spots(1, 3, side=10)).shape == (3, 2)


def test_training_stops_after_the_patience_with_the_best_weights():
    class Overfitting(nn.Module):
        """The more it trains, the worse it gets on what it did not see."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def loss(self, rows):
            return -self.weight if self.training else (self.weight - 0.0025).abs()

    model = Overfitting()
    history = plane_networks.train(model, torch.zeros(10, 1), 100)
    best = int(np.argmin(history))
    assert 1 <= best <= 2  # each epoch is one step of 0.001
    assert len(history) == best + 1 + plane_networks.PATIENCE
    assert abs(model.weight.item() - 0.0025) == pytest.approx(min(history))
    assert len(plane_networks.train(Overfitting(), torch.zeros(10, 1), 4)) == 4


# The comparison


def slow_scores(train, test, plane_train, plane_test, k):
    """What the paper and the authors' code say, from all pairs."""
    found = []
    for a, b in ((train, test), (plane_train, plane_test)):
        scale = MinMaxScaler().fit(a)
        a, b = scale.transform(a), scale.transform(b)
        inverse = 1 / np.sort(cdist(b, a), axis=1)[:, k - 1]
        found.append((inverse, 1 - pdist(b, "cosine"), pdist(b)))
    return [spearmanr(x, y).statistic for x, y in zip(*found)]


@pytest.mark.parametrize(("name", "fit"), [("pca", fit_pca), ("random", fit_random)])
def test_scores_are_those_of_all_pairs(name, fit):
    train, test = spots(0, 150), spots(1, 30)
    row = compare_reducers(train, test, (name,))[0]
    fitted = fit(train)
    ranks, cosines, gaps = slow_scores(unit(train), unit(test), fitted.transform(train), fitted.transform(test), k=12)
    assert row["reducer"] == name
    assert row["distance_ranks"] == pytest.approx(max(ranks, 0), abs=1e-9)
    assert row["as_code"] == pytest.approx(0.7 * max(ranks, 0) + 0.3 * cosines, abs=1e-3)  # float32 breaks near ties
    assert row["pairwise"] == pytest.approx(gaps, abs=1e-3)
    assert 0 <= row["low"] <= row["distance_ranks"] <= row["high"] <= 1
    assert row["refit"] is False


def test_the_pixels_themselves_score_one_and_a_reversed_order_zero(monkeypatch):
    train, test = spots(0, 150), spots(1, 30)
    monkeypatch.setattr(reducers, "_place", lambda name, *others: (unit(train), unit(test)))
    row = compare_reducers(train, test, ("pca",))[0]
    assert [row[key] for key in ("distance_ranks", "as_code", "pairwise")] == pytest.approx([1, 1, 1])
    up = np.arange(30.0)
    turned = reducers._scores((up, up, up), (-up, up, -up), seed=0)
    assert (turned["distance_ranks"], turned["pairwise"]) == (0, -1)
    assert turned["high"] is None  # every resample agrees: no width is no certainty
    assert turned["as_code"] == pytest.approx(0.3)
    with np.errstate(invalid="ignore"):
        collapsed = reducers._scores((up, up, up), (0 * up, 0 * up, 0 * up), seed=0)
    assert collapsed == dict.fromkeys(("distance_ranks", "low", "high", "as_code", "pairwise"))


def test_isomap_keeps_a_two_factor_set_better_than_a_map_that_learned_nothing():
    isomap, random = compare_reducers(spots(0, 300), spots(1, 60), ("isomap", "random"))
    assert isomap["pairwise"] > 0.8 > random["pairwise"] + 0.1
    assert isomap["distance_ranks"] > random["distance_ranks"]


def test_every_reducer_has_a_row_and_tsne_says_that_it_refits():
    rows = compare_reducers(spots(0, 60), spots(1, 12), epochs=1, width=8)
    assert [row["reducer"] for row in rows] == list(reducers.REDUCERS)
    assert [row["reducer"] for row in rows if row["refit"]] == ["tsne"]
    assert all(0 <= row["distance_ranks"] <= 1 and row["seconds"] > 0 for row in rows)


def test_stage_gives_plain_rows_of_both_splits():
    found = compare_cell(
        None, data="digits", per_class_train=6, per_class_test=3, seed=1, epochs=1, names=["pca", "random"]
    )
    assert json.loads(json.dumps(found)) == found
    assert [row["reducer"] for row in found["rows"]] == ["pca", "random"]


def test_spearman_equals_scipy_with_ties():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, (2, 40))
    assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert np.isnan(spearman(a, np.ones(40)))
    assert spearman(norm.cdf(a - 2.0), np.exp(a)) == pytest.approx(1)


def test_bad_input_gets_a_sentence():
    images = spots(0, 40)
    with pytest.raises(ValueError, match="Reducers are isomap, umap, autoencoder, flow, tsne, pca, random, not mds"):
        compare_reducers(images, images, ("pca", "mds"))
    with pytest.raises(ValueError, match="at least three test images, not 2"):
        compare_reducers(images, images[:2])
    with pytest.raises(ValueError, match="at least one epoch"):
        fit_autoencoder(images, epochs=0, width=8)
    with pytest.raises(ValueError, match="square images"):
        fit_autoencoder(images[..., :6], width=8)
    with pytest.raises(ValueError, match="dim is 2"):
        fit_flow(images, dim=2)
    with pytest.raises(ValueError, match="dim is 16; from 10 images"):
        fit_flow(images[:10])
