"""The page "Sharp edges", trap by trap: a naive form falls in, our engine does not.

Naive forms are written out here in a few lines. What they give away is shown by exact arithmetic where it is certain,
else by `bounds.lower_bound`, which must pass the accountant's number for the naive form and stay below it for ours.
"""

import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from opacus.grad_sample.conv import compute_conv_grad_sample
from scipy.special import logsumexp, ndtri
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lookalike.models.gan import Generator
from lookalike.models.vae import ConditionalVAE
from lookalike.privacy import audit, dpsgd, randomness
from lookalike.privacy.accounting import Training, account, gaussian_epsilon, group_bound
from lookalike.privacy.bounds import lower_bound
from lookalike.privacy.clipping import clipped_sum
from lookalike.privacy.dpsgd import Privacy, PrivateTraining
from lookalike.training import adversarial, cells
from lookalike.training.checkpoint import Checkpoint
from lookalike.training.likelihood import train_vae

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "book" / "guide" / "sharp_edges.md"
WHOLE = Privacy(noise_multiplier=2.0, sample_rate=1.0, expected_batch_size=8, delta=1e-3)
DELTA = 1e-5
ROUNDING = 1e-4  # relative, of float32 sums


def squared(model, x):
    return model(x).square().sum(1)


def linear(d=20):
    torch.manual_seed(0)
    return nn.Linear(d, d)


def weights(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def training(model, x, privacy=WHOLE, seed=0, **more):
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    return PrivateTraining(model, sgd, privacy, x, generator=torch.Generator().manual_seed(seed), **more)


def update(x, privacy=WHOLE, seed=0, **more):
    """What one private step on all records subtracts from the weights, times the public divisor."""
    model = linear(x.shape[1])
    private, before = training(model, x, privacy, seed, **more), weights(model)
    for rows in private.batches(1):
        private.step(squared, x[rows])
    return (before - weights(model)) * privacy.expected_batch_size


def clipped(model, x, norm=1.0, owners=None):
    """The sum of clipped gradients as one vector, without noise."""
    sums = clipped_sum(model, squared, (x,), norm, owners=owners)[0]
    return torch.cat([sums[p].flatten() for p in model.parameters()])


@pytest.fixture
def same_noise(monkeypatch):
    """Every record is in every batch, and drawing takes nothing from the stream: neighbours get equal noise."""
    monkeypatch.setattr(randomness.Seeded, "chosen", lambda self, n, rate: torch.ones(n, dtype=torch.bool))


# ---- division -------------------------------------------------------------------------------------------------------


def test_a_divisor_counted_from_the_batch_shows_in_the_size_of_the_noise():
    """31 records against 30, one step: the noise alone says which."""
    privacy, d = Privacy(5.0, 1.0, 31, DELTA), 10_000
    images = torch.randn(31, d, generator=torch.Generator().manual_seed(0)) / d**0.5
    noise = torch.Generator().manual_seed(1)

    def divided_by_its_length(rows):
        return lambda: (rows.sum(0) + 5.0 * torch.empty(d).normal_(generator=noise)) / len(rows)

    def ours(rows):
        return audit.our_step(rows, privacy, noise)[0]

    found = {}
    for step in (divided_by_its_length, ours):
        scores = [audit.one_step_scores(step(images[:n]), lambda g: -g.norm(), 100) for n in (31, 30)]
        found[step.__name__] = lower_bound(*scores, DELTA).epsilon
    accounted = account(Training(5.0, 1.0, 1), DELTA).epsilon
    assert found["divided_by_its_length"] > accounted >= found["ours"]


# ---- sensitivity ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [2, 5])
def test_clipped_image_by_image_a_patient_weighs_as_many_norms_as_images(images):
    """Two images are also one record that stands in two rows of the table."""
    model, x = linear(), torch.randn(1, 20).expand(3 + images, 20)
    owners = torch.tensor([0, 1, 2] + [3] * images)
    by_image = clipped(model, x) - clipped(model, x[:3])
    by_patient = clipped(model, x, owners=owners) - clipped(model, x[:3], owners=owners[:3])
    assert by_image.norm().item() == pytest.approx(images, rel=ROUNDING)
    assert by_patient.norm().item() == pytest.approx(1, rel=ROUNDING)


def test_noise_that_is_not_multiplied_by_the_clip_norm_is_too_small_for_it(same_noise):
    """Noise over sensitivity is what the accountant counts; ours does not depend on the norm, naive noise does."""
    x = torch.randn(8, 20) * 50
    for norm in (0.1, 10.0):
        noisy, sums = update(x, replace(WHOLE, max_grad_norm=norm)), clipped(linear(), x, norm)
        ours = (noisy - sums).std() / norm
        naive = (2.0 * torch.empty(len(sums)).normal_(generator=torch.Generator().manual_seed(0))).std() / norm
        assert ours.item() == pytest.approx(2.0, rel=0.2)  # 420 numbers: standard error 3.5 %
        assert naive.item() == pytest.approx(2.0 / norm, rel=0.2)


def test_replacing_a_record_moves_the_sum_twice_as_far_as_removing_it():
    model = nn.Linear(20, 1, bias=False)
    sums = lambda x: clipped_sum(model, lambda m, x: m(x)[:, 0], (x,), 1.0)[0][model.weight]  # noqa: E731
    x = torch.randn(4, 20) * 50
    replaced = torch.cat([x[:3], -x[3:]])
    assert (sums(x) - sums(x[:3])).norm().item() == pytest.approx(1, rel=ROUNDING)
    assert (sums(x) - sums(replaced)).norm().item() == pytest.approx(2, rel=ROUNDING)


# ---- accounting and sampling ----------------------------------------------------------------------------------------


def test_a_shuffled_epoch_says_more_than_poisson_batches_of_the_same_size():
    """All gradients but one point the other way (Chua et al. 2024); the auditor knows what they add up to.

    Shuffled, the batch of the one stands out whether its gradient is in (by 2) or blank (by 1). In Poisson batches a
    record that is absent leaves no gap.
    """
    rng, sigma, batches, trials = np.random.default_rng(0), 0.7, 100, 20_000

    def scores(shift, where):
        return logsumexp((rng.normal(0, sigma, (trials, batches)) + shift * where) / sigma**2, axis=1)

    one, poisson = np.arange(batches) == 0, rng.random((trials, batches)) < 1 / batches
    shuffled = lower_bound(scores(2, one), scores(1, one), DELTA).epsilon
    drawn = lower_bound(scores(1, poisson), scores(0, poisson), DELTA).epsilon
    accounted = account(Training(sigma, 1 / batches, batches), DELTA).epsilon
    assert shuffled > accounted >= drawn


def test_a_rate_that_is_not_the_samplers_is_contradicted_or_refused():
    """Half of the records a batch, one in a thousand in the accountant."""
    rng, trials, sigma = np.random.default_rng(0), 200_000, 0.5
    sampled = rng.random(trials) < 0.5
    lower = lower_bound(sampled + rng.normal(0, sigma, trials), rng.normal(0, sigma, trials), DELTA).epsilon
    told, true = (account(Training(sigma, rate, 1), DELTA).epsilon for rate in (0.001, 0.5))
    assert told < lower <= true
    with pytest.raises(ValueError, match="contradicts sample_rate"):
        training(linear(), torch.zeros(100, 20), Privacy(sigma, 0.001, 50, DELTA))
    with pytest.raises(ValueError, match="Give the data set, not a loader"):
        training(linear(), DataLoader(TensorDataset(torch.zeros(8, 20)), batch_size=4, shuffle=True, drop_last=True))


# ---- public and private metadata ------------------------------------------------------------------------------------


def test_settings_counted_from_the_data_tell_neighbours_apart():
    """The size of the set in delta, rate and divisor; ours has one public size for victim and ablated."""
    naive = [Privacy(1.0, 4 / n, 4, 1 / (n + 1)) for n in (31, 30)]
    assert naive[0] != naive[1]
    public = cells.specify_privacy(1.0, num_images=40, batch_size=20)
    reports = [training(linear(), torch.zeros(n, 20), public).report() for n in (31, 30)]
    assert reports[0] == reports[1]
    assert asdict(public).items() <= reports[0].items()


def test_statistics_of_the_data_let_one_record_move_every_gradient():
    """Images brought to mean 0 and deviation 1 by the set's own numbers, against public ones."""
    model, x = linear(), torch.randn(30, 20)
    x[-1] = 100
    own = [clipped(model, (rows - rows.mean(0)) / rows.std(0)) for rows in (x, x[:-1])]
    public = [clipped(model, (rows - 0.5) / 0.25) for rows in (x, x[:-1])]
    assert (own[0] - own[1]).norm() > 2
    assert (public[0] - public[1]).norm() <= 1 + ROUNDING


# ---- neighbouring relation ------------------------------------------------------------------------------------------


def test_a_group_bound_is_void_where_sampling_whole_subjects_is_not():
    image = account(Training(1.0, 0.2, 50), DELTA)
    assert group_bound(image.epsilon, image.delta, 2).epsilon > 2 * image.epsilon * (1 - 1e-9)
    assert group_bound(image.epsilon, image.delta, 5).epsilon == np.inf
    subjects = np.arange(40) // 5
    by_subject = Privacy(1.0, 0.2, 1.6, DELTA, records="subjects")
    private = training(linear(), torch.zeros(40, 20), by_subject, subjects=subjects)
    for rows in private.batches(50):
        whole = np.bincount(subjects[rows.numpy()], minlength=8)
        assert set(whole) <= {0, 5}
        private.step(squared, torch.zeros(40, 20)[rows])
    assert image.epsilon <= private.epsilon() < 1.3 * image.epsilon  # Rényi against PLD: the same mechanism


# ---- empty batches --------------------------------------------------------------------------------------------------


def test_skipped_empty_batches_tell_that_nobody_was_there():
    """One record or none: the naive loop moves the weights in one case and never in the other."""
    private_steps = {}
    for n in (1, 0):
        stream = torch.Generator().manual_seed(0)
        naive = sum(bool((torch.rand(n, generator=stream) < 0.5).any()) for _ in range(40))
        assert (naive > 0) == (n > 0)
        model, x = linear(), torch.zeros(n, 20)
        private = training(model, x, Privacy(1.0, 0.5, 0.5, DELTA))
        for rows in private.batches(40):
            before = weights(model)
            private.step(squared, x[rows])
            assert not torch.equal(before, weights(model))
        private_steps[n] = private.steps
    assert private_steps == {1: 40, 0: 40}


def test_a_loop_that_goes_on_without_a_step_is_stopped():
    x = torch.zeros(8, 20)
    private = training(linear(), x, replace(WHOLE, sample_rate=0.1, expected_batch_size=0.8))

    def skipping():
        for rows in private.batches(40):
            if len(rows) == 0:
                continue
            private.step(squared, x[rows])

    with pytest.raises(RuntimeError, match="also for an empty one"):
        skipping()


# ---- accumulation ---------------------------------------------------------------------------------------------------


def test_clipping_an_accumulated_gradient_lets_one_record_turn_it_round():
    """A part of the batch clipped as a whole: one record moves it by twice the norm, and every part may be that one."""
    model = nn.Linear(20, 1, bias=False)
    x = torch.randn(1, 20).expand(5, 20) * torch.tensor([1.0, 1, 1, 1, -100])[:, None]

    def clipped_as_a_whole(rows):
        model.zero_grad()
        model(rows).sum().backward()
        return model.weight.grad * min(1, 1 / model.weight.grad.norm())

    ours = lambda rows: clipped_sum(model, lambda m, x: m(x)[:, 0], (rows,), 1.0)[0][model.weight]  # noqa: E731
    assert (clipped_as_a_whole(x) - clipped_as_a_whole(x[:4])).norm().item() == pytest.approx(2, rel=ROUNDING)
    assert (ours(x) - ours(x[:4])).norm().item() == pytest.approx(1, rel=ROUNDING)


def test_physical_batches_are_one_draw_with_one_noise(same_noise):
    """Noise in each of three parts would add up to 1.7 times the deviation that is asked for."""
    x = torch.randn(8, 20)
    whole, parts = update(x), update(x, max_images=3)
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=ROUNDING)
    assert (parts - clipped(linear(), x)).std().item() == pytest.approx(2.0, rel=0.2)


def test_what_was_left_in_grad_does_not_enter_the_step(same_noise):
    x, model = torch.randn(8, 20), linear()
    clean, private, before = update(x), training(model, x), weights(model)
    (1e6 * squared(model, x).sum()).backward()
    for rows in private.batches(1):
        private.step(squared, x[rows])
    assert torch.equal((before - weights(model)) * 8, clean)
    assert all(p.grad is None for p in model.parameters())


def test_a_draw_serves_one_step_only():
    x = torch.zeros(8, 20)
    private = training(linear(), x)
    for rows in private.batches(1):
        private.step(squared, x[rows])
        with pytest.raises(RuntimeError, match="not what is accounted for"):
            private.step(squared, x[rows])


# ---- records that mix -----------------------------------------------------------------------------------------------


class OwnBatchNorm(nn.Module):
    """Batch normalisation that no list of layer types knows."""

    def forward(self, x):
        return (x - x.mean(0)) / (x.std(0) + 1e-3)


def test_with_batch_statistics_one_record_moves_the_sum_past_the_norm():
    model, x = nn.Sequential(OwnBatchNorm(), linear()), torch.randn(30, 20)
    x[-1] = 100
    assert (clipped(model, x) - clipped(model, x[:-1])).norm() > 2
    private = training(model, x, replace(WHOLE, expected_batch_size=30))
    with pytest.raises(RuntimeError, match="mixes records"):
        next(private.step(squared, x[rows]) for rows in private.batches(1))


def test_a_loss_that_looks_at_its_batch_is_refused():
    x = torch.randn(8, 20)
    private = training(linear(), x)
    with pytest.raises(RuntimeError, match="mixes records"):
        next(private.step(lambda m, x: squared(m, x) / squared(m, x).mean(), x[rows]) for rows in private.batches(1))


def test_running_statistics_hold_the_batch_without_noise():
    """After one forward pass the buffer is a tenth of the batch's mean, to the bit; the engine refuses the layer."""
    x = torch.randn(8, 20)
    model = nn.Sequential(nn.BatchNorm1d(20), linear())
    model(x)
    torch.testing.assert_close(model[0].running_mean, x.mean(0) / 10)
    with pytest.raises(ValueError, match="batch normalisation, which mixes records"):
        training(model, x)


# ---- auxiliary outputs ----------------------------------------------------------------------------------------------


def test_the_losses_of_a_private_step_are_not_private():
    """So much noise that epsilon is near 0, and the losses that the step returns give the record away."""
    privacy = replace(WHOLE, noise_multiplier=1000.0)
    scores = {}
    for n in (8, 7):
        x = torch.ones(n, 20)
        private = [training(linear(), x, privacy, seed) for seed in range(100)]
        scores[n] = [float(p.step(squared, x[rows]).sum()) for p in private for rows in p.batches(1)]
    assert lower_bound(scores[8], scores[7], DELTA).epsilon > 1 > 100 * gaussian_epsilon(1 / 1000, DELTA)


def test_the_report_names_what_is_private_in_it(tiny_images):
    privacy = Privacy(1.0, 0.5, 4, 1e-2)
    model = ConditionalVAE(num_classes=4, width=8, latent_dim=8)
    report = train_vae(model, *tiny_images, epochs=1, batch_size=4, privacy=privacy)
    assert report["private_outputs"] == ["loss"]


class Brightness(nn.Module):
    """A discriminator that takes bright images for real ones."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        nn.init.constant_(self.layer.weight, 8.0)
        nn.init.zeros_(self.layer.bias)

    def forward(self, images, labels):
        return self.layer(images.mean((1, 2, 3))[:, None])[:, 0]


@pytest.fixture
def generator_after(monkeypatch, same_noise):
    """The generator's weights when the private steps leave the discriminator where it was.

    Whatever then differs between neighbours reached the generator past the noise. Its own draws come from a stream that
    the private batches do not move, so that sets of another size can be compared.
    """
    step, generator_step, asked = PrivateTraining.step, adversarial.generator_step, []

    def held(self, loss, *batch):
        before = {name: w.clone() for name, w in self.model.state_dict().items()}
        losses = step(self, loss, *batch)
        self.model.load_state_dict(before)
        return losses

    def own_stream(net, discriminator, optimizer, labels, generator):
        asked.append(len(labels))
        generator_step(net, discriminator, optimizer, labels, torch.Generator().manual_seed(len(asked)))

    def own_labels(net, n, generator, like):
        return torch.arange(n) % net.num_classes

    monkeypatch.setattr(PrivateTraining, "step", held)
    monkeypatch.setattr(adversarial, "generator_step", own_stream)
    monkeypatch.setattr(adversarial, "_draw_labels", own_labels)

    def after(images, labels, epochs, as_published):
        asked.clear()
        torch.manual_seed(0)
        net, privacy = Generator(image_size=8, num_classes=4, width=8, latent_dim=4), Privacy(1.0, 1.0, 8, 1e-2)
        adversarial.train_gan(
            net, Brightness(), images, labels, epochs=epochs, lr=1e-3, batch_size=8, privacy=privacy,
            generator_every=2, as_published=as_published, generator=torch.Generator().manual_seed(5),
        )  # fmt: skip
        return weights(net)

    return after


BRIGHT, ZEROS = torch.ones(8, 1, 8, 8), torch.zeros(8, dtype=torch.long)
# the authors' schedule trains the generator in its first six steps whatever the loss says
LEAKS = {
    "labels": ((BRIGHT, ZEROS), (BRIGHT, ZEROS + 1), 6),
    "batch size": ((BRIGHT, ZEROS), (BRIGHT[:7], ZEROS[:7]), 6),
    "schedule": ((BRIGHT, ZEROS), (torch.cat([BRIGHT[:7], -BRIGHT[7:]]), ZEROS), 12),
}


@pytest.mark.parametrize("leak", LEAKS)
def test_nothing_reaches_the_generator_past_the_discriminator(leak, generator_after):
    """With the discriminator held fixed, neighbours end with the same generator to the bit; as published they do not.

    Each pair of data sets differs in what makes one leak visible and leaves the other two silent.
    """
    one, other, epochs = LEAKS[leak]
    assert torch.equal(generator_after(*one, epochs, False), generator_after(*other, epochs, False))
    assert torch.equal(generator_after(*one, epochs, True), generator_after(*one, epochs, True))
    assert not torch.equal(generator_after(*one, epochs, True), generator_after(*other, epochs, True))


# ---- randomness -----------------------------------------------------------------------------------------------------


def test_whoever_has_the_seed_subtracts_the_noise(same_noise):
    """A step on images of one's own gives the noise of that seed. In release mode the same seed is of no use."""
    x, own = torch.randn(8, 20), torch.zeros(8, 20)
    error = {}
    for mode in ("study", "release"):
        privacy = replace(WHOLE, noise_multiplier=10.0, mode=mode)
        noise = update(own, privacy, seed=7) - clipped(linear(), own)
        error[mode] = (update(x, privacy, seed=7) - noise - clipped(linear(), x)).square().mean().sqrt().item()
    assert error["study"] < 1e-5
    assert error["release"] == pytest.approx(10 * 2**0.5, rel=0.2)  # two noises that have nothing in common


def test_a_study_checkpoint_holds_the_noise_to_come(same_noise, tmp_path):
    stream, x = torch.Generator().manual_seed(3), torch.randn(8, 20)
    Checkpoint(tmp_path).save({}, {}, {"noise": stream}, {})
    stolen = torch.Generator()
    Checkpoint(tmp_path).load({}, {}, {"noise": stolen})
    known = torch.cat([randomness.Seeded(stolen).normal(p.shape).flatten() for p in linear().parameters()])
    torch.testing.assert_close(update(x, seed=3) - 2.0 * known, clipped(linear(), x), atol=1e-5, rtol=ROUNDING)


# ---- floating point -------------------------------------------------------------------------------------------------


def impossible(mode, dtype=torch.float32, bits=24):
    """Shares of noisy numbers that a sum of 1 cannot have given, where the sum is 0 and where it is 1.

    Noise of deviation 1 is added to 0 or to 1. A number below 1/2 that is no multiple of 2^-bits has digits which
    1 + noise has lost.
    """
    d, found = 250_000, []
    for total in (0.0, 1.0):
        model = nn.Linear(d, 1, bias=False, dtype=dtype)
        privacy = Privacy(1 / 512, 1.0, 1, 0.5, max_grad_norm=512.0, mode=mode)  # of 250,000 ones the norm is 500
        x = torch.full((1, d), total, dtype=dtype)
        private = PrivateTraining(model, audit.Observer(model.parameters()), privacy, x, generator=torch.Generator())
        for rows in private.batches(1):
            private.step(lambda m, x: m(x)[:, 0], x[rows])
        seen = private.optimizer.seen.double()
        off = seen * 2.0**bits != (seen * 2.0**bits).round()
        found.append(((seen.abs() < 0.5) & off).double().mean().item())
    return found


def test_float32_noise_leaves_a_grid_that_names_the_sum():
    """Study mode: a quarter of all coordinates says with certainty that the sum was 0."""
    where_zero, where_one = impossible("study")
    assert where_zero > 0.2
    assert where_one == 0


def test_noise_of_float64_rounded_to_float32_leaves_no_such_grid():
    """Release mode: both sums give numbers with all digits."""
    where_zero, where_one = impossible("release")
    assert min(where_zero, where_one) > 0.1


def test_weights_of_float64_get_no_more_digits_than_float32_has():
    """Their sum would keep the grid of the composed noise; rounded to float32 it tells neither sum from the other."""
    sixteen, whole = impossible("release", torch.float64), impossible("release", torch.float64, bits=53)
    assert min(sixteen) > 0.1
    assert max(whole) == 0
    noise = randomness.Secret().normal((250_000,))
    off = noise * 2.0**53 != (noise * 2.0**53).round()
    assert (off & (noise.abs() < 0.5)).double().mean() > 0.1  # unrounded, a sum of 1 could not have given these


def test_released_noise_is_four_normals_of_float64(monkeypatch):
    drawn, box_muller = [], randomness._box_muller
    monkeypatch.setattr(randomness, "_box_muller", lambda n: drawn.append(box_muller(n)) or drawn[-1])
    noise = randomness.Secret().normal((300, 100))
    assert noise.dtype == torch.float64
    assert len(drawn) == 4
    np.testing.assert_allclose(noise.flatten().numpy(), sum(drawn) / 2)
    assert np.abs(np.corrcoef(drawn) - np.eye(4)).max() < 0.03  # standard error 0.006


# ---- search ---------------------------------------------------------------------------------------------------------


def test_three_trainings_cost_more_than_one_and_less_than_three():
    one = Training(1.0, 0.1, 200)
    single, together = (account([one] * n, DELTA).epsilon for n in (1, 3))
    assert single < together < 3 * single


def test_the_best_of_many_runs_is_not_as_private_as_one_of_them():
    """A thousand runs, and the one that scores best on the private data is released; drawn exactly, by inversion."""
    runs, sigma, uniform = 1000, 5.0, np.random.default_rng(0).random((2, 1_000_000))
    found = {}
    for n in (1, runs):
        with_record, without = sigma * ndtri(uniform ** (1 / n))
        found[n] = lower_bound(1 + with_record, without, DELTA).epsilon
    one, all_runs = (account([Training(sigma, 1.0, 1)] * n, DELTA).epsilon for n in (1, runs))
    assert found[1] <= one < found[runs] <= all_runs


# ---- wrong gradients ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # of Opacus' hooks on a first layer
def test_stock_hooks_are_wrong_on_channels_last_and_ours_are_not():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten())
    x = torch.randn(5, 3, 6, 6).contiguous(memory_format=torch.channels_last)
    slope = 2 * model[0](x)  # of the squared outputs
    right = torch.autograd.grad(squared(model, x).sum(), model[0].weight)[0]
    stock = compute_conv_grad_sample(model[0], [x], slope.contiguous())[model[0].weight].sum(0)
    assert (stock - right).norm() > 0.1 * right.norm()
    for method in ("bookkeeping", "hooks", "vmap"):
        ours = clipped_sum(model, squared, (x,), float("inf"), method)[0][model[0].weight]
        torch.testing.assert_close(ours, right, atol=1e-4, rtol=ROUNDING)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # of Opacus' hooks on a first layer
@pytest.mark.parametrize("method", ["bookkeeping", "hooks"])
def test_a_wrong_gradient_stops_the_first_step(method, monkeypatch):
    """As a hook that misreads its input would: sums of the right shape and a wrong value."""

    def wrong(*args):
        sums, losses, norms = clipped_sum(*args)
        return {p: g.flip(0) for p, g in sums.items()}, losses, norms

    monkeypatch.setattr(dpsgd, "clipped_sum", wrong)
    x = torch.randn(8, 20)
    private = training(linear(), x, method=method)
    with pytest.raises(RuntimeError, match="Per-record gradients of weight are wrong"):
        next(private.step(squared, x[rows]) for rows in private.batches(1))


# ---- the page -------------------------------------------------------------------------------------------------------


def test_the_page_names_tests_that_exist_and_all_of_these():
    named = set(re.findall(r"`(test_\w+)`", PAGE.read_text()))
    here = set(re.findall(r"^def (test_\w+)", Path(__file__).read_text(), re.M))
    everywhere = {name for file in (ROOT / "tests").rglob("test_*.py") for name in _tests_of(file)}
    assert named <= everywhere
    assert {name for name in here if "the_page" not in name} <= named


def test_the_page_quotes_the_refusals_as_they_are():
    cells = re.findall(r'^\| (".+?") \|', PAGE.read_text(), re.M)
    quotes = [quote for cell in cells for quote in re.findall(r'"(.+?)"', cell)]
    folder = ROOT / "lib" / "lookalike"
    files = ("privacy/dpsgd.py", "privacy/clipping.py", "training/likelihood.py", "training/adversarial.py")
    source = "".join((folder / name).read_text() for name in files)
    assert len(quotes) > 10
    assert [quote for quote in quotes if quote not in source] == []


def _tests_of(file):
    return re.findall(r"^def (test_\w+)", file.read_text(), re.M)
