"""LiRA and RMIA against slow twins and closed forms, and small shadows trained together and one by one."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm, spearmanr
from torch import nn

from lookalike.data import phantoms
from lookalike.models.ddpm import ConditionalDDPM, ddpm_loss, draw_diffusion
from lookalike.models.vae import ConditionalVAE, vae_loss
from lookalike.privacy.attack import attack_result, auc
from lookalike.privacy.shadows import (
    block_size,
    draw_inclusion,
    leave_one_out,
    lira,
    pool,
    rmia,
    sample_signals,
    shadow_attack,
    shadow_scores,
    signals,
    train_shadows,
)

CANDIDATES, POPULATION = 40, 60


def drawn(seed=0, models=12, n=7):
    """A target's signals, shadows' signals and inclusion; members' signals are higher, spreads differ by image."""
    rng = np.random.default_rng(seed)
    included = draw_inclusion(models, n, seed=seed)
    spread = rng.uniform(0.5, 2, n)
    return rng.normal(0, spread, n), rng.normal(included * 1.5, spread), included


# --- the attacks on given signals


@pytest.mark.parametrize("online", [True, False])
@pytest.mark.parametrize("fixed_variance", [True, False])
def test_lira_is_the_ratio_of_the_two_fitted_normals(online, fixed_variance):
    target, shadows, included = drawn()

    def fit(i, inside):
        chosen = [shadows[included[:, j] == inside, j] for j in range(len(target))]
        own = [np.var(c, ddof=1) for c in chosen]
        return norm(np.mean(chosen[i]), np.sqrt(np.mean(own) if fixed_variance else own[i]))

    expected = []
    for i, signal in enumerate(target):
        out = fit(i, False)
        ratio = np.log(fit(i, True).pdf(signal) / out.pdf(signal))
        expected.append(ratio if online else norm.isf(out.sf(signal)))
    np.testing.assert_allclose(lira(target, shadows, included, online, fixed_variance), expected)


@pytest.mark.parametrize("freedom", [4, np.inf])
def test_shrunk_variances_are_nearer_the_truth_than_each_ones_own(freedom):
    rng = np.random.default_rng(0)
    truth = freedom / rng.chisquare(freedom, 400) if freedom < np.inf else np.ones(400)
    included = draw_inclusion(12, 400)
    shadows = rng.normal(0, np.sqrt(truth), (12, 400))
    mean = np.where(included, 0, shadows).sum(0) / 6
    taken, error = {}, {}
    for way in (True, False, "auto"):  # offline, at a target one above the mean, a score is one over the deviation
        taken[way] = 1 / lira(mean + 1, shadows, included, online=False, fixed_variance=way) ** 2
        error[way] = np.square(np.log(taken[way] / truth)).mean()
    assert error["auto"] < 0.7 * error[False]
    assert error["auto"] < (0.7 if freedom < np.inf else 1.5) * error[True] + 0.01
    assert spearmanr(taken["auto"], taken[False]).statistic > 0.9999 or freedom == np.inf


def test_lira_on_many_shadows_is_the_optimal_test():
    rng = np.random.default_rng(1)
    n, gap, deviation = 2000, 1.2, np.linspace(0.5, 2, 2000)
    included = draw_inclusion(400, n)
    shadows = rng.normal(included * gap * deviation, deviation)
    member = rng.random(n) < 0.5
    target = rng.normal(member * gap * deviation, deviation)
    scores = lira(target, shadows, included, fixed_variance=False)
    exact = norm.logpdf(target, gap * deviation, deviation) - norm.logpdf(target, 0, deviation)
    assert np.corrcoef(scores, exact)[0, 1] > 0.98
    assert np.median(np.abs(scores - exact)) < 0.1
    found = attack_result("lira", scores[member], scores[~member])
    assert found.low <= norm.cdf(gap / np.sqrt(2)) <= found.high


def test_lira_finds_what_the_mean_of_its_images_gives_away():
    """A model that is the mean of its 20 images plus noise: signal <model, image>, area known in closed form."""
    rng = np.random.default_rng(2)
    images, models, noise = rng.standard_normal((40, 50)), 96, 0.35
    images *= np.sqrt(50) / np.linalg.norm(images, axis=1, keepdims=True)
    included = draw_inclusion(models, 40)
    fitted = included @ images / 20 + noise * rng.standard_normal((models, 50))
    found = pool(leave_one_out(lira, fitted @ images.T, included), included)
    others = 40 / 4 / 20**2  # variance, per coordinate, of which other images are in
    expected = norm.cdf(np.sqrt(50) / 20 / np.sqrt(noise**2 + others) / np.sqrt(2))
    assert auc(found.members, found.non_members) == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize(("online", "a"), [(True, 1.0), (False, 1.0), (False, 0.3)])
@pytest.mark.parametrize("gamma", [1.0, 1.2])
def test_rmia_is_the_double_loop(online, a, gamma):
    target, shadows, included = drawn(3, n=12)
    rng = np.random.default_rng(4)
    z, z_shadows = rng.normal(0, 1, 9), rng.normal(0, 1, (12, 9))
    target, shadows, z, z_shadows = (part - 8 for part in (target, shadows, z, z_shadows))  # all below 0

    def ratio(p, p_out, p_in):
        if p_in is not None:
            return p / ((np.mean(p_in) + np.mean(p_out)) / 2)
        return p / (((1 + a) * np.mean(p_out) + (1 - a)) / 2)

    def of(signals_target, signals_shadows, chosen, j, inside):
        p, own = np.exp(signals_target[j] / 3), np.exp(signals_shadows[:, j] / 3)
        return ratio(p, own[~chosen[:, j]], own[chosen[:, j]] if inside else None)

    nowhere = np.zeros((12, 9), bool)
    expected = []
    for j in range(len(target)):
        x = of(target, shadows, included, j, online)
        if online:  # population images are in no shadow: their mean is that of all
            pairs = [x / (np.exp(z[k] / 3) / np.exp(z_shadows[:, k] / 3).mean()) for k in range(9)]
        else:
            pairs = [x / of(z, z_shadows, nowhere, k, False) for k in range(9)]
        expected.append(np.mean([pair >= gamma for pair in pairs]))
    found = rmia(target, shadows, included, z, z_shadows, online, gamma, a, temperature=3.0)
    np.testing.assert_allclose(found, expected)
    assert len(set(found)) > 2


def test_rmia_survives_likelihoods_that_no_float_holds():
    target, shadows, included = drawn(5)
    z, z_shadows, _ = drawn(6, n=5)
    near = rmia(target, shadows, included, z, z_shadows)
    np.testing.assert_array_equal(near, rmia(target - 5000, shadows - 5000, included, z - 5000, z_shadows - 5000))


@pytest.mark.parametrize("models", [6, 16])
def test_nothing_is_found_where_nothing_leaks(models):
    areas, inside = {"lira": [], "lira_offline": [], "rmia": [], "rmia_offline": []}, []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        included = draw_inclusion(models, 60, seed=seed)
        level = rng.normal(0, 3, 90)  # images differ, models do not know which they saw
        drawn = rng.normal(level, 1, (models, 90))
        found = shadow_scores(drawn[:, :60], included, drawn[:, 60:])
        for name, values in areas.items():
            result = attack_result(name, *found.pooled(name))
            values.append(result.auc)
            inside.append(result.low <= 0.5 <= result.high)
    for values in areas.values():
        assert np.mean(values) == pytest.approx(0.5, abs=4 * np.std(values) / np.sqrt(40))
    assert np.mean(inside) > 0.85


def test_leaving_out_the_target_alone_is_not_blind_where_counts_are_balanced():
    found = {1: [], 2: []}
    for seed in range(60):
        included = draw_inclusion(6, 60, seed=seed)
        drawn = np.random.default_rng(seed).normal(size=(6, 60))
        for block, values in found.items():
            pooled = pool(leave_one_out(lira, drawn, included, block=block), included)
            values.append(auc(pooled.members, pooled.non_members))
    assert np.mean(found[1]) < 0.49
    assert np.mean(found[2]) == pytest.approx(0.5, abs=0.015)


# --- which image is in which model


@given(st.integers(3, 5), st.sampled_from([0.5, 0.25, 0.75, 1 / 3]), st.integers(4, 30), st.integers(0, 5))
def test_each_block_holds_each_subject_alike(blocks, share, subjects, seed):
    size = block_size(share)
    owners = np.random.default_rng(seed).permutation(np.repeat(np.arange(subjects), 3))
    included = draw_inclusion(blocks * size, len(owners), share, seed, owners)
    per_block = included.reshape(blocks, size, -1).sum(1)
    assert (per_block == round(share * size)).all()
    for owner in range(subjects):
        of = included[:, owners == owner]
        assert (of == of[:, :1]).all()
    assert np.ptp(included.sum(1)) <= 3 * size
    np.testing.assert_array_equal(included, draw_inclusion(blocks * size, len(owners), share, seed, owners))


def test_a_pool_keeps_each_pair_on_its_side():
    included = np.array([[True, False], [False, True]])
    found = pool(np.array([[1.0, 2], [3, 4]]), included, ["a", "b"])
    assert [list(part) for part in found] == [[1, 4], [2, 3], ["a", "b"], ["b", "a"]]


# --- training and signals


class Plain(nn.Module):
    """A linear autoencoder of 4 x 4 images; with `noise` its loss draws."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 16))
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, images):
        return self.net(images) * self.scale


def plain_loss(model, images, labels):
    return (model(images) - images.flatten(1)).square().sum(1)


def noisy_loss(model, images, labels):
    return plain_loss(model, images + 0.1 * torch.randn_like(images), labels)


def small_images(n=20, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 1, 4, 4)).astype(np.uint8), np.arange(n) % 3


def steady_vae_loss(model, images, labels):
    mu, _ = model.encode(images, labels)
    return (model.decode(mu, labels).sigmoid() - (images + 1) / 2).square().flatten(1).sum(1) + mu.square().sum(1)


@pytest.mark.parametrize(
    ("make", "loss", "size"),
    [(Plain, plain_loss, 4), (partial(ConditionalVAE, 8, 1, 3, 4, 8), steady_vae_loss, 8)],
)
def test_together_and_one_by_one_train_the_same_models(make, loss, size):
    images = np.random.default_rng(0).integers(0, 256, (20, 1, size, size)).astype(np.uint8)
    labels, included = np.arange(20) % 3, draw_inclusion(6, 20)
    settings = {"steps": 12, "batch_size": 6, "lr": 1e-3, "seed": 3}
    alone, together = (
        train_shadows(make, loss, images, labels, included, **settings, together=way) for way in (False, True)
    )
    np.testing.assert_allclose(alone[1], together[1], rtol=1e-5)
    found = [signals(models, loss, images, labels) for models, _ in (alone, together)]
    np.testing.assert_allclose(*found, rtol=1e-5)
    assert alone[1][:, -4:].mean() < alone[1][:, :4].mean()
    assert not any(model.training for model in alone[0] + together[0])


@pytest.mark.parametrize("together", [False, True])
def test_a_model_sees_its_own_images_only(together):
    images, labels = small_images()
    included = draw_inclusion(6, 20)
    other = images.copy()
    other[~included[0]] = 0
    first, second = (
        train_shadows(Plain, plain_loss, data, labels, included, 5, 4, 0.01, together=together)
        for data in (images, other)
    )
    np.testing.assert_array_equal(first[1][0], second[1][0])
    assert (first[1][1:] != second[1][1:]).any(1).all()


@pytest.mark.parametrize("together", [False, True])
def test_noise_differs_between_models_and_repeats_with_the_seed(together):
    images, labels = small_images()
    included = np.ones((3, 20), bool)

    def same_weights():
        torch.manual_seed(0)
        return Plain()

    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    train = partial(train_shadows, same_weights, noisy_loss, images, labels, included, 2, 20, 0.01, together=together)
    losses = [train(seed=seed)[1] for seed in (1, 1, 2)]
    assert torch.equal(before, torch.random.get_rng_state())
    np.testing.assert_array_equal(losses[0], losses[1])
    assert len(np.unique(losses[0][:, 0])) == 3
    assert (losses[0] != losses[2]).all()


def test_signals_are_means_over_the_same_draws_for_every_model():
    images, labels = small_images()
    models = [Plain(), Plain().train()]
    models[1].load_state_dict(models[0].state_dict())
    found = signals(models, noisy_loss, images, labels, repeats=4)
    np.testing.assert_array_equal(found[0], found[1])
    assert models[1].training
    exact = signals(models[:1], plain_loss, images, labels, repeats=3)[0]
    direct = -plain_loss(models[0], torch.from_numpy(images / 127.5 - 1).float(), None).detach().numpy()
    np.testing.assert_allclose(exact, direct, rtol=1e-4)
    spread = [
        np.std([signals(models[:1], noisy_loss, images, labels, r, s)[0] for s in range(12)], 0).mean() for r in (1, 16)
    ]
    assert 2.5 < spread[0] / spread[1] < 6  # 4 by theory


def test_a_diffusion_model_trains_together():
    images = phantoms.grey28(n=12).image_set

    def loss(model, batch, labels):
        return ddpm_loss(model, batch, labels, *draw_diffusion(model, batch))

    included = draw_inclusion(6, 12)
    make = partial(ConditionalDDPM, width=8, timesteps=20)
    models, losses = train_shadows(make, loss, images.images, images.labels, included, 2, 4, 1e-3, together=True)
    assert losses.shape == (6, 2)
    assert np.isfinite(signals(models, loss, images.images, images.labels, repeats=2)).all()


def test_released_images_of_copiers_give_their_members_away():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (30, 1, 6, 6)).astype(np.uint8)
    included = draw_inclusion(12, 30)
    noise = rng.normal(0, 40, (12, 15, 1, 6, 6))
    released = [np.clip(images[row] + noise[s], 0, 255).astype(np.uint8) for s, row in enumerate(included)]
    found = pool(leave_one_out(lira, sample_signals(released, images), included), included)
    assert attack_result("lira", *found).low > 0.9


@pytest.mark.parametrize("offset", [0.0, 0.1])  # 0.1: the mean of equal numbers is rounded
def test_perfect_copiers_are_found_although_their_members_signals_never_vary(offset):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (50, 1, 6, 6)).astype(np.uint8)
    included = draw_inclusion(12, 30)
    found = sample_signals([images[:30][row] for row in included], images)
    assert (found[:, :30][included] == 0).all()
    found += offset
    scored = shadow_scores(found[:, :30], included, found[:, 30:])
    assert scored.notes == ()
    for name in ("lira", "lira_offline"):
        assert np.isfinite(scored.scores[name]).all()
        assert attack_result(name, *scored.pooled(name)).auc > 0.99
    with pytest.raises(ValueError, match="its variance is 0"):
        lira(found[0, :30], found[2:, :30], included[2:], fixed_variance=False)


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_attacks_without_any_spread_are_left_out_with_a_note(value):
    included, rng = draw_inclusion(6, 20), np.random.default_rng(0)
    found = shadow_scores(np.full((6, 20), value), included, rng.normal(size=(6, 9)))
    assert set(found.scores) == {"loss", "rmia", "rmia_offline"}
    assert [note.split()[0] for note in found.notes] == ["lira", "lira_offline"]
    with pytest.raises(ValueError, match=r"no scores of 'lira'. lira was left out: no image's signal differs"):
        found.pooled("lira")
    found = shadow_scores(rng.normal(size=(6, 20)), included, np.full((6, 9), value))
    assert set(found.scores) == {"loss", "lira", "lira_offline"}
    assert len(found.notes) == 2


def test_the_floor_leaves_signals_that_vary_as_they_are(monkeypatch):
    target, shadows, included = drawn()
    before = lira(target, shadows, included)
    monkeypatch.setattr("lookalike.privacy.shadows.FLOOR", 0.0)
    np.testing.assert_array_equal(lira(target, shadows, included), before)


# --- the whole: overfitted VAEs


@pytest.fixture(scope="module")
def overfitted():
    """Signals of 16 tiny VAEs, each trained on 20 of 40 images, on those images and on 60 that none has seen."""
    data = phantoms.grey28(n=CANDIDATES + POPULATION, seed=5, image_size=8).image_set
    images, labels = data.images, data.labels
    included = draw_inclusion(16, CANDIDATES)
    own, ten = slice(CANDIDATES), partial(ConditionalVAE, 8, 1, 10, 8, 8)
    models, _ = train_shadows(ten, vae_loss, images[own], labels[own], included, 80, 10, 5e-3, together=True)
    found = signals(models, vae_loss, images, labels, repeats=8)
    return found[:, own], included, found[:, CANDIDATES:]


def test_overfitted_vaes_are_found_and_better_than_by_their_loss(overfitted):
    found = shadow_scores(*overfitted)
    results = {name: attack_result(name, *found.pooled(name)) for name in found.scores}
    for result in results.values():
        assert result.finds_leak
        assert result.auc >= results["loss"].auc
    assert results["lira"].auc > results["loss"].auc + 0.05
    assert results["rmia"].auc > results["loss"].auc + 0.05


def test_images_that_no_model_saw_are_not_found(overfitted):
    # Drawn anew: the real columns tell of like images of the same class, which a model that saw one fits better too.
    _, _, population = overfitted
    found = shadow_scores(population[:, :40], draw_inclusion(16, 40, seed=1), population[:, 40:])
    for name in found.scores:
        result = attack_result(name, *found.pooled(name))
        assert result.low <= 0.5 <= result.high


def test_shadow_attack_runs_it_all_with_whole_subjects():
    images, labels = small_images(24)
    subjects = np.repeat(np.arange(12), 2)
    found = shadow_attack(
        Plain, plain_loss, images, labels, *small_images(10, seed=1), steps=4, batch_size=4, lr=0.01, models=12,
        share=0.25, repeats=1, subjects=subjects,
    )  # fmt: skip
    assert (found.included[:, ::2] == found.included[:, 1::2]).all()
    assert found.included.mean() == 0.25
    np.testing.assert_array_equal(found.scores["loss"], found.signals)
    assert all(np.isfinite(scores).all() for scores in found.scores.values())


# --- sentences


def test_bad_input_gets_a_sentence():
    target, shadows, included = drawn()
    z, z_shadows = target[:3], shadows[:, :3]
    with pytest.raises(ValueError, match=r"with included \(S, N\); got \(6,\)"):
        lira(target[:6], shadows, included)
    with pytest.raises(ValueError, match="not finite"):
        lira(np.where(target > 0, np.nan, target), shadows, included)
    with pytest.raises(ValueError, match="Image 0 has 0 shadows with it and needs 2"):
        lira(target, shadows, included & (np.arange(7) > 0))
    with pytest.raises(ValueError, match="its variance is 0"):
        lira(target, np.zeros_like(shadows), included)
    with pytest.raises(ValueError, match='True, False or "auto"'):
        lira(target, shadows, included, fixed_variance="own")
    with pytest.raises(ValueError, match="give a=1 for densities"):
        rmia(target, shadows, included, z, z_shadows, online=False, a=0.3)
    with pytest.raises(ValueError, match=r"a in \[0, 1\]"):
        rmia(target, shadows, included, z, z_shadows, a=2.0)
    with pytest.raises(ValueError, match="blocks of 2, at least three; not 5"):
        draw_inclusion(5, 10)
    with pytest.raises(ValueError, match="simple fraction"):
        draw_inclusion(8, 10, share=0.013)
    with pytest.raises(ValueError, match="give one per image"):
        draw_inclusion(8, 10, subjects=[1, 2])
    with pytest.raises(ValueError, match="1 subjects cannot be shared out"):
        draw_inclusion(8, 3, subjects=[1, 1, 1])
    with pytest.raises(ValueError, match=r"included must be \(models, 20\)"):
        train_shadows(Plain, plain_loss, *small_images(), np.ones((2, 3)), 1, 1, 0.1)
    with pytest.raises(ValueError, match="no image to train on"):
        train_shadows(Plain, plain_loss, *small_images(), np.zeros((2, 20)), 1, 1, 0.1)
