"""Matched controls: the published trainings at their ends, every factor by itself, shares that add up."""

import copy
import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch

from lookalike.models.gan import discriminator_loss, gradient_penalty
from lookalike.models.vae import vae_loss
from lookalike.privacy.clipping import clipped_sum
from lookalike.privacy.randomness import stream
from lookalike.training import cells, controls
from lookalike.training.adversarial import train_gan
from lookalike.training.controls import Recipe, factor_shares, gan_factorial, published, train_controlled
from lookalike.training.likelihood import train_ddpm, train_vae

FACTORS = ("schedule", "penalty", "clipping", "noise")
WIDTHS = {"vae": 8, "gan": 8, "ddpm": 8}


@pytest.fixture
def data():
    torch.manual_seed(0)
    return torch.rand(12, 1, 28, 28) * 2 - 1, torch.arange(12) % 3


def nets_of(family):
    torch.manual_seed(1)
    return cells.build(family, 3, WIDTHS[family], **({"timesteps": 10} if family == "ddpm" else {}))


def weights(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def trained(family, recipe, data, epochs=2, lr=1e-3):
    nets = nets_of(family)
    torch.manual_seed(2)
    history = train_controlled(
        family, nets, *data, recipe, epochs=epochs, lr=lr, batch_size=6, generator=stream(0, "t")
    )
    return nets, history


@pytest.mark.parametrize("family", cells.FAMILIES)
def test_the_recipe_at_sigma_zero_is_the_published_training(family, data):
    """Against the loops that the paper's own chapter runs: same losses, same weights, same generator steps."""
    ours, history = trained(family, published(family, 0), data, lr=1e-5)
    nets = nets_of(family)
    torch.manual_seed(2)
    settings = {"epochs": 2, "lr": 1e-5, "batch_size": 6, "generator": stream(0, "t")}
    loop = {"vae": train_vae, "ddpm": train_ddpm, "gan": train_gan}[family]
    theirs = loop(*nets.values(), *data, **settings)
    assert history["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    assert history["generator_steps"] == theirs.get("generator_steps", 0)
    for name, net in nets.items():
        # a sum over records, then divided, rounds otherwise than a mean, and Adam's first steps ask for the sign alone
        assert (weights(ours[name]) - weights(net)).abs().mean() < 1e-6  # four steps of 1e-5


def loop_of_clipped(model, loss, batch, extra):
    """Slow twin: record after record, clip to norm 1, add up."""
    total = torch.zeros_like(weights(model))
    for i in range(len(batch[0])):
        one = [part[i : i + 1] for part in batch]
        gradients = torch.autograd.grad(loss(model, *one).sum() + extra(model, one), list(model.parameters()))
        flat = torch.cat([g.flatten() for g in gradients])
        total += flat * min(1.0, 1 / float(flat.norm()))
    return total


@pytest.mark.parametrize("penalty", [False, True])
def test_records_are_clipped_one_by_one_also_under_a_penalty(penalty, data):
    nets = nets_of("gan")
    discriminator = nets["discriminator"].eval()  # no dropout: both sides must see the same network
    fake = torch.zeros_like(data[0])
    batch = data[0], fake, data[1], data[1]
    gradients, losses = controls._clipped_records(discriminator, discriminator_loss, batch, penalty, stream(0, "p"))
    drawn = stream(0, "p")
    extra = lambda model, one: gradient_penalty(model, *one[:3], drawn) if penalty else 0.0  # noqa: E731
    twin = loop_of_clipped(discriminator, discriminator_loss, batch, extra)
    torch.testing.assert_close(torch.cat([gradients[p].flatten() for p in discriminator.parameters()]), twin)
    assert len(losses) == 12


def test_noise_alone_moves_weights_by_its_size(data):
    """One step of SGD on a loss without a gradient: what is left is the noise, sigma / batch size times the rate."""
    model = torch.nn.Linear(40, 50, bias=False)
    before = weights(model).clone()
    recipe = Recipe(noise=0.4, optimizer="sgd", walk=0.4)
    optimizer = controls._optimizer(model, recipe, 0.01, 6, "vae")
    silent = lambda net, images: (net(images) * 0).sum(1)  # noqa: E731
    controls._step(model, optimizer, recipe, 6, stream(0, "n"), silent, (torch.zeros(6, 40),))
    moved = weights(model) - before
    assert float(moved.std()) == pytest.approx(0.01, rel=0.05)  # the docstring: as far as a step of Adam at that rate


def test_adam_and_sgd_walk_equally_far_under_pure_noise():
    model = torch.nn.Linear(40, 50, bias=False)
    far = {}
    for name in ("adam", "sgd"):
        net, recipe = copy.deepcopy(model), Recipe(noise=0.4, optimizer=name, walk=0.4)
        optimizer = controls._optimizer(net, recipe, 0.01, 6, "vae")
        silent = lambda net, images: (net(images) * 0).sum(1)  # noqa: E731
        for _ in range(200):
            controls._step(net, optimizer, recipe, 6, stream(_, "n"), silent, (torch.zeros(6, 40),))
        far[name] = float((weights(net) - weights(model)).std())
    assert far["adam"] == pytest.approx(far["sgd"], rel=0.3)


def test_decay_scales_the_optimisers_own_rate(data, monkeypatch):
    rates, step = [], controls._step
    monkeypatch.setattr(
        controls, "_step", lambda m, o, *rest: rates.append(o.param_groups[0]["lr"]) or step(m, o, *rest)
    )
    trained("ddpm", Recipe("batch", decay=True, optimizer="sgd", walk=0.5), data, epochs=2, lr=1e-3)
    assert rates == pytest.approx([0.012, 0.012, 0.006, 0.006])  # lr x batch size / walk, then half of it


def test_the_private_recipe_steps_on_the_mean_that_dp_sgd_takes(data):
    """Without the noise: the summed clipped gradient over the expected batch size, as the private engine divides it."""
    nets = nets_of("vae")
    model, loss = nets["model"].eval(), lambda net, x, y: vae_loss(net, x, y)
    recipe = replace(published("vae", 0.4), noise=0.0)
    taken = {}
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    optimizer.register_step_pre_hook(lambda *_: taken.update({p: p.grad.clone() for p in model.parameters()}))
    torch.manual_seed(3)
    expected, _, _ = clipped_sum(model, loss, data, 1.0)
    torch.manual_seed(3)
    controls._step(model, optimizer, recipe, 6, stream(0, "n"), loss, data)
    for p, total in expected.items():
        torch.testing.assert_close(taken[p], total / 6)


def test_poisson_batches_vary_and_may_be_empty():
    sizes = [len(rows) for _ in range(50) for rows in controls._batches(4, 2, True, stream(_, "b"))]
    assert 0 in sizes
    assert np.mean(sizes) == pytest.approx(2, abs=0.4)
    shuffled = controls._batches(5, 2, False, stream(0, "b"))
    assert sorted(torch.cat(shuffled).tolist()) == list(range(5))


def test_an_empty_batch_is_a_step_of_noise_alone():
    model = torch.nn.Linear(3, 2)
    before = weights(model).clone()
    recipe = Recipe("record", 1.0, poisson=True)
    optimizer = controls._optimizer(model, recipe, 0.1, 2, "vae")
    losses = controls._step(model, optimizer, recipe, 2, stream(0, "n"), None, (torch.zeros(0, 3),))
    assert len(losses) == 0
    assert (weights(model) != before).all()


@pytest.mark.parametrize("family", cells.FAMILIES)
def test_every_family_trains_by_the_private_recipe(family, data):
    _, history = trained(family, published(family, 0.4), data)
    assert len(history["loss"]) == 2


def test_the_factorial_leads_from_one_published_training_to_the_other():
    recipes = gan_factorial(0.4)
    assert len(recipes) == 16
    assert recipes[frozenset()] == published("gan", 0)
    assert recipes[frozenset(FACTORS)] == published("gan", 0.4)
    assert len(set(recipes.values())) == 16


def every_subset():
    return [frozenset(taken) for n in range(5) for taken in combinations(FACTORS, n)]


def test_shares_of_an_additive_world_are_its_effects_and_always_add_up():
    effects = dict(zip(FACTORS, (0.1, -0.2, 0.3, 0.05)))
    shares = factor_shares({taken: sum(effects[f] for f in taken) for taken in every_subset()}, FACTORS)
    assert shares == pytest.approx(effects)
    rng = np.random.default_rng(0)
    values = {taken: rng.normal(size=3) for taken in every_subset()}
    shares = factor_shares(values, FACTORS)
    np.testing.assert_allclose(sum(shares.values()), values[frozenset(FACTORS)] - values[frozenset()])


def test_an_interaction_is_shared_evenly_and_an_idle_factor_gets_nothing():
    both = {taken: float({"noise", "schedule"} <= taken) for taken in every_subset()}
    shares = factor_shares(both, FACTORS)
    assert shares == pytest.approx({"schedule": 0.5, "penalty": 0.0, "clipping": 0.0, "noise": 0.5})


def test_shares_by_the_definition_over_all_orders():
    """Slow twin: the mean over every order of adding the factors."""
    from itertools import permutations

    rng = np.random.default_rng(1)
    values = {taken: float(rng.normal()) for taken in every_subset()}
    gains = {factor: [] for factor in FACTORS}
    for order in permutations(FACTORS):
        for i, factor in enumerate(order):
            before = frozenset(order[:i])
            gains[factor].append(values[before | {factor}] - values[before])
    assert factor_shares(values, FACTORS) == pytest.approx({factor: np.mean(gain) for factor, gain in gains.items()})


def test_wrong_recipes_and_missing_cells_are_refused():
    for wrong in ({"clip": "rows"}, {"optimizer": "lion"}, {"schedule": "ln3"}, {"schedule": 0}, {"noise": math.nan}):
        with pytest.raises(ValueError, match=r"is|must"):
            Recipe(**wrong)
    with pytest.raises(ValueError, match=r"1 of the 2 combinations of noise have no value"):
        factor_shares({frozenset(): 1.0}, ["noise"])
