"""DP-SGD's step: the noise that was asked for, a public normaliser, no skipped batch, refusals."""

import pytest
import torch
from torch import nn

from lookalike.privacy.clipping import clipped_sum
from lookalike.privacy.dpsgd import Privacy, PrivateStep, check_delta, check_gradients, poisson_batch

PRIVACY = Privacy(noise_multiplier=2.0, sample_rate=0.5, expected_batch_size=40, delta=1e-3, max_grad_norm=0.3)


def squared(model, x):
    return model(x).square().sum(1)


def update(model, x, privacy=PRIVACY, seed=0, lr=1.0):
    """What one private step with plain SGD of learning rate 1 subtracts, as one vector."""
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    step = PrivateStep(model, torch.optim.SGD(model.parameters(), lr=lr), privacy, torch.Generator().manual_seed(seed))
    step(squared, x)
    return before - nn.utils.parameters_to_vector(model.parameters()).detach(), step


def wide():
    torch.manual_seed(0)
    return nn.Linear(200, 200)


def test_noise_has_the_stated_deviation_and_an_empty_batch_is_noise_alone():
    moved, step = update(wide(), torch.zeros(0, 200))
    assert moved.std().item() == pytest.approx(2.0 * 0.3 / 40, rel=0.02)
    assert abs(moved.mean().item()) < 4 * moved.std().item() / 200
    assert step.steps == 1


def test_the_step_is_clipped_sum_plus_noise_over_the_public_number():
    x = torch.randn(7, 200)
    noise, _ = update(wide(), torch.zeros(0, 200), seed=3)
    gradients, _, _ = clipped_sum(wide(), squared, (x,), 0.3)
    expected = torch.cat([g.flatten() for g in gradients.values()]) / 40
    moved, _ = update(wide(), x, seed=3)
    torch.testing.assert_close(moved - noise, expected, atol=1e-6, rtol=1e-4)


def test_one_record_more_changes_the_sum_by_at_most_the_norm():
    """Neighbouring data sets under the same noise: with a normaliser counted from the data this would be false."""
    x = torch.randn(8, 200) * 5
    with_it, without = update(wide(), x)[0], update(wide(), x[:-1])[0]
    assert (with_it - without).norm().item() <= 0.3 / 40 * (1 + 1e-4)


def test_poisson_batches_have_the_rate_and_forget_each_other():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([torch.zeros(50).index_fill(0, poisson_batch(50, 0.3, generator), 1) for _ in range(4000)])
    assert drawn.mean().item() == pytest.approx(0.3, abs=0.005)
    correlation = torch.corrcoef(drawn.T) - torch.eye(50)
    assert correlation.abs().max() < 0.08  # 4000 draws: standard error 0.016
    assert poisson_batch(20, 1.0, generator).tolist() == list(range(20))


def test_epsilon_counts_steps():
    _, step = update(wide(), torch.randn(4, 200))
    one = step.epsilon()
    step.steps = 100
    assert 0 < one < step.epsilon()


def test_what_would_break_the_guarantee_is_refused():
    mixing = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match="batch normalisation"):
        PrivateStep(mixing, torch.optim.SGD(mixing.parameters(), lr=1.0), PRIVACY)
    with pytest.raises(ValueError, match="not below 1 / 100"):
        check_delta(0.01, 100)
    check_delta(0.0099, 100)
    for wrong in (
        {"noise_multiplier": 0.0},
        {"sample_rate": 0.0},
        {"sample_rate": 1.1},
        {"delta": 1.0},
        {"max_grad_norm": 0.0},
    ):
        with pytest.raises(ValueError, match="must"):
            Privacy(**({"noise_multiplier": 1.0, "sample_rate": 0.5, "expected_batch_size": 4, "delta": 0.1} | wrong))


def test_the_self_test_sees_a_wrong_gradient():
    model, x = wide(), torch.randn(4, 200)
    right, _, norms = clipped_sum(model, squared, (x,), float("inf"))
    check_gradients(model, squared, (x,), right, norms)
    with pytest.raises(RuntimeError, match="Per-record gradients of weight are wrong"):
        check_gradients(model, squared, (x,), right | {model.weight: 1.01 * right[model.weight]}, norms)
    with pytest.raises(RuntimeError, match="mixes records"):
        check_gradients(model, squared, (x,), right, norms * 1.01)


class Centred(nn.Linear):
    """Takes the batch's mean off each record: the sum of gradients is right, whose they are is not."""

    def forward(self, x):
        return super().forward(x - x.mean(0))


def interleaved(model, x):
    """Rows of one record side by side instead of a batch apart: norms land on the wrong records."""
    return squared(model, torch.stack([x, -2 * x], 1).flatten(0, 1)).unflatten(0, (-1, 2)).sum(1)


@pytest.mark.parametrize(("model", "loss"), [(Centred(8, 8), squared), (nn.Linear(8, 8), interleaved)])
def test_records_that_are_mixed_are_refused_at_the_first_step(model, loss):
    step = PrivateStep(model, torch.optim.SGD(model.parameters(), lr=1.0), PRIVACY)
    with pytest.raises(RuntimeError, match="mixes records"):
        step(loss, torch.randn(5, 8) * torch.arange(1, 6)[:, None])


def test_a_record_without_a_finite_gradient_stops_the_step():
    model, x = wide(), torch.randn(4, 200)
    x[2, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        update(model, x)
