"""DP-SGD: the noise that was asked for, a public normaliser, no skipped batch, whole subjects, refusals."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import SwinTransformer

from lookalike.data import phantoms
from lookalike.privacy import randomness
from lookalike.privacy.clipping import clipped_sum
from lookalike.privacy.dpsgd import Privacy, PrivateTraining, check_batch_size, check_delta, check_gradients

PRIVACY = Privacy(noise_multiplier=2.0, sample_rate=1.0, expected_batch_size=7, delta=1e-3, max_grad_norm=0.3)


def squared(model, x):
    return model(x).square().sum(1)


def training(model, x, privacy=PRIVACY, seed=0, lr=1.0, **more):
    sgd = torch.optim.SGD(model.parameters(), lr=lr)
    return PrivateTraining(model, sgd, privacy, x, generator=torch.Generator().manual_seed(seed), **more)


def update(model, x, privacy=PRIVACY, seed=0, subjects=None, **more):
    """What one private step with plain SGD of learning rate 1 subtracts, as one vector; at rate 1 all rows are in."""
    more["subjects"] = subjects if privacy.records == "subjects" else None
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    private = training(model, x, privacy, seed, **more)
    for rows in private.batches(1):
        private.step(squared, x[rows])
    return before - nn.utils.parameters_to_vector(model.parameters()).detach(), private


def noise_alone(model, n=7, privacy=PRIVACY, seed=0):
    """The update of an empty batch under the same draw."""
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    private = training(model, torch.zeros(n, 200), privacy, seed)
    torch.rand(n, dtype=torch.float64, generator=private.random.generator)  # what drawing the batch takes
    private._drawn = torch.arange(0)
    private.step(squared, torch.zeros(0, 200))
    return before - nn.utils.parameters_to_vector(model.parameters()).detach(), private


def wide():
    torch.manual_seed(0)
    return nn.Linear(200, 200)


def test_an_empty_batch_is_a_step_of_noise_alone():
    moved, private = noise_alone(wide())
    assert moved.std().item() == pytest.approx(2.0 * 0.3 / 7, rel=0.02)
    assert abs(moved.mean().item()) < 4 * moved.std().item() / 200
    assert private.steps == 1


@settings(max_examples=15, deadline=None)
@given(
    sigma=st.floats(0.05, 30), norm=st.floats(0.01, 50), batch=st.floats(3.1, 11),
    records=st.sampled_from(["images", "subjects"]), mode=st.sampled_from(["study", "release"]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_the_noise_has_the_stated_deviation_whatever_the_settings(sigma, norm, batch, records, mode, seed):
    """40,200 numbers: the standard error of their deviation is 0.35 %."""
    privacy = Privacy(sigma, 0.5, batch, 1e-3, norm, records, mode)
    x, model = torch.zeros(12, 200), wide()
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    zero = lambda m, x: 0 * m(x).sum(1)  # noqa: E731
    private = training(model, x, privacy, seed, subjects=np.arange(12) if records == "subjects" else None)
    for rows in private.batches(1):
        private.step(zero, x[rows])
    moved = before - nn.utils.parameters_to_vector(model.parameters()).detach()
    assert moved.std().item() == pytest.approx(sigma * norm / batch, rel=0.02)


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 60), st.floats(0.5, 20), st.integers(0, 99))
def test_neighbours_get_equal_noise(n, sigma, seed):
    """Everything but the one record's clipped gradient is the same number: a normaliser counted from data is not."""
    privacy = Privacy(sigma, 1.0, n, 1e-3 / n, 0.3)
    x = torch.randn(n, 200, generator=torch.Generator().manual_seed(seed)) * 5
    noise = []
    for rows in (x, x[:-1]):
        moved = update(wide(), rows, privacy, seed)[0]
        gradients, _, _ = clipped_sum(wide(), squared, (rows,), 0.3)
        stream = torch.Generator().manual_seed(seed)
        torch.rand(len(rows), dtype=torch.float64, generator=stream)  # what drawing the batch takes from the stream
        expected = [torch.empty(p.shape).normal_(generator=stream) * sigma * 0.3 / n for p in gradients]
        noise.append(
            (
                moved - torch.cat([g.flatten() for g in gradients.values()]) / n,
                torch.cat([e.flatten() for e in expected]),
            )
        )
    for found, expected in noise:
        torch.testing.assert_close(found, expected, atol=2e-6 * max(1, sigma), rtol=1e-3)


def test_the_step_is_clipped_sum_plus_noise_over_the_public_number():
    x = torch.randn(7, 200)
    noise, _ = noise_alone(wide(), seed=3)
    gradients, _, _ = clipped_sum(wide(), squared, (x,), 0.3)
    expected = torch.cat([g.flatten() for g in gradients.values()]) / 7
    moved, _ = update(wide(), x, seed=3)
    torch.testing.assert_close(moved - noise, expected, atol=1e-6, rtol=1e-4)


def test_one_record_more_changes_the_sum_by_at_most_the_norm(monkeypatch):
    """Neighbouring data sets under the same noise: with a normaliser counted from the data this would be false."""
    monkeypatch.setattr(randomness.Seeded, "chosen", lambda self, n, rate: torch.ones(n, dtype=torch.bool))
    x = torch.randn(8, 200) * 5
    with_it, without = update(wide(), x)[0], update(wide(), x[:-1])[0]
    assert (with_it - without).norm().item() <= 0.3 / 7 * (1 + 1e-4)


def test_one_subject_more_changes_the_sum_by_at_most_the_norm(monkeypatch):
    """However many images the subject has; at image level the same five images move it further."""
    monkeypatch.setattr(randomness.Seeded, "chosen", lambda self, n, rate: torch.ones(n, dtype=torch.bool))
    x = torch.randn(1, 200).expand(9, 200) * 5
    subjects = np.array(["a", "b", "b", "c", "d", "d", "d", "d", "d"])
    moved = {}
    for records in ("images", "subjects"):
        privacy = replace(PRIVACY, records=records, expected_batch_size=5)
        with_it = update(wide(), x, privacy, subjects=subjects)[0]
        without = update(wide(), x[:4], privacy, subjects=subjects[:4])[0]
        moved[records] = (with_it - without).norm().item() / (0.3 / 5)
    assert moved["subjects"] <= 1 + 1e-4
    assert moved["images"] == pytest.approx(5, rel=1e-3)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=3, max_size=8), st.integers(4, 9), st.booleans())
def test_a_split_batch_is_the_same_step(sizes, most, by_subject):
    torch.manual_seed(0)
    x = torch.randn(sum(sizes), 200)
    subjects = np.repeat(np.arange(len(sizes)), sizes)[torch.randperm(sum(sizes)).numpy()]
    records = len(sizes) if by_subject else len(x)
    privacy = replace(PRIVACY, records="subjects" if by_subject else "images", expected_batch_size=records)
    whole = update(wide(), x, privacy, subjects=subjects)[0]
    parts = update(wide(), x, privacy, subjects=subjects, max_images=most)[0]
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-4)


def test_poisson_batches_have_the_rate_and_forget_each_other():
    for mode in randomness.MODES:
        private = training(
            wide(), torch.zeros(50, 200), replace(PRIVACY, sample_rate=0.3, expected_batch_size=15, mode=mode)
        )
        drawn = torch.stack([torch.zeros(50).index_fill(0, private._draw(), 1) for _ in range(4000)])
        assert drawn.mean().item() == pytest.approx(0.3, abs=0.005)
        correlation = torch.corrcoef(drawn.T) - torch.eye(50)
        assert correlation.abs().max() < 0.08  # 4000 draws: standard error 0.016
    assert training(wide(), torch.zeros(20, 200), replace(PRIVACY, expected_batch_size=20))._draw().tolist() == list(
        range(20)
    )


def test_released_noise_is_normal_and_never_the_same():
    secret = randomness.source("release")
    numbers = secret.normal((200, 1000)).flatten().numpy()
    assert kstest(numbers, "norm").pvalue > 1e-4
    assert not np.array_equal(numbers, secret.normal((200, 1000)).flatten().numpy())
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.01
    assert secret.normal((3,)).shape == (3,)


def test_a_report_says_what_holds():
    x = torch.randn(7, 200)
    study, release = (update(wide(), x, replace(PRIVACY, mode=mode))[1].report() for mode in ("study", "release"))
    assert study["mode"] == "study"
    assert "seed can subtract it" in study["guarantee"]
    assert "operating system" in release["guarantee"]
    assert study["steps"] == 1
    assert study["epsilon"] == release["epsilon"] == pytest.approx(PRIVACY.epsilon(1))
    assert study["clipping"] == "bookkeeping"


def test_a_target_epsilon_finds_its_noise():
    privacy = Privacy.for_epsilon(3.0, 0.1, 500, 1e-3, expected_batch_size=10)
    assert 2.99 < privacy.epsilon(500) <= 3.0
    tighter = Privacy.for_epsilon(3.0, 0.1, 500, 1e-3, "pld", expected_batch_size=10)
    assert tighter.noise_multiplier < privacy.noise_multiplier
    assert 2.99 < tighter.epsilon(500) <= 3.0


def test_a_batch_that_is_not_stepped_on_stops_the_loop():
    """The usual `if len(rows) == 0: continue` would tell when nobody was drawn."""
    private = training(wide(), torch.zeros(7, 200))
    with pytest.raises(RuntimeError, match="no step taken on it"):
        list(private.batches(3))


def test_batches_of_ones_own_are_refused():
    x = torch.zeros(7, 200)
    private = training(wide(), x)
    with pytest.raises(RuntimeError, match="Take the rows of a step from batches"):
        private.step(squared, x)
    for rows in private.batches(1):
        with pytest.raises(RuntimeError, match="7 images were drawn"):
            private.step(squared, x[rows][:5])
        break


def test_epsilon_counts_steps():
    _, private = update(wide(), torch.randn(7, 200))
    one = private.epsilon()
    private.steps = 100
    assert 0 < one < private.epsilon()


def test_numbers_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="not below 1 / 100"):
        check_delta(0.01, 100)
    check_delta(0.0099, 100)
    with pytest.raises(ValueError, match=r"contradicts sample_rate 0.1 of 100 records, about 10 a batch"):
        check_batch_size(64, 0.1, 100)
    check_batch_size(19, 0.1, 100)
    for wrong in (
        {"noise_multiplier": 0.0},
        {"noise_multiplier": float("nan")},
        {"sample_rate": 0.0},
        {"sample_rate": 1.1},
        {"delta": 1.0},
        {"max_grad_norm": 0.0},
        {"records": "patients"},
        {"mode": "secure"},
    ):
        with pytest.raises(ValueError, match="must"):
            Privacy(**({"noise_multiplier": 1.0, "sample_rate": 0.5, "expected_batch_size": 4, "delta": 0.1} | wrong))


def linear():
    torch.manual_seed(0)
    return nn.Linear(4, 4)


class Remembers(nn.Module):
    """Keeps a mean of its own, as no known layer does."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += x.detach().mean()
        return x


REFUSED_MODELS = {
    "batch normalisation": nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)),
    "works in place": nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)),
    "keeps running statistics": nn.Sequential(
        nn.InstanceNorm2d(1, track_running_stats=True), nn.Flatten(), nn.Linear(16, 4)
    ),
    "The buffer 0.seen takes in the batch": nn.Sequential(Remembers(), nn.Flatten(), nn.Linear(16, 4)),
}


@pytest.mark.parametrize("sentence", REFUSED_MODELS)
def test_models_that_break_the_guarantee_are_refused(sentence):
    model = REFUSED_MODELS[sentence]
    x = torch.randn(7, 1, 4, 4) if isinstance(model[1], nn.Flatten) else torch.randn(7, 4)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=sentence):
        update(model, x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_frozen_public_statistics_are_not_refused():
    model = nn.Sequential(nn.BatchNorm1d(4).requires_grad_(False), nn.Linear(4, 4))
    model[0].eval()
    _, private = update(model, torch.randn(7, 4))
    assert private.steps == 1
    model.train()
    for rows in private.batches(1):
        with pytest.raises(ValueError, match="batch normalisation"):
            private.step(squared, torch.randn(7, 4)[rows])
        break


def gradient_penalty(model, x):
    x = x.clone().requires_grad_()
    slope = torch.autograd.grad(model(x).sum(), x, create_graph=True)[0]
    return squared(model, x) + slope.square().sum(1)


REFUSED_LOSSES = {
    "gradients of its own": gradient_penalty,
    "not one number per image": lambda model, x: squared(model, x).mean(),
}


@pytest.mark.parametrize("method", ["bookkeeping", "vmap"])
@pytest.mark.parametrize("sentence", REFUSED_LOSSES)
def test_losses_that_break_the_guarantee_are_refused(sentence, method):
    model, x = linear(), torch.randn(7, 4)
    private = training(model, x, method=method)
    for rows in private.batches(1):
        with pytest.raises(ValueError, match=sentence):
            private.step(REFUSED_LOSSES[sentence], x[rows])
        break


@pytest.mark.parametrize(("how", "sentence"), [
    ({"shuffle": True}, "a loader that shuffles"), ({"drop_last": True}, "a loader with drop_last"),
    ({}, "not a loader"),
])  # fmt: skip
def test_loaders_are_refused(how, sentence):
    with pytest.raises(ValueError, match=sentence):
        training(linear(), DataLoader(TensorDataset(torch.zeros(8, 4)), batch_size=4, **how))


def test_other_mistakes_are_refused():
    model, x = linear(), torch.zeros(8, 4)
    with pytest.raises(ValueError, match="must have a length"):
        training(model, iter(x))
    with pytest.raises(ValueError, match="not below 1 / 8"):
        training(model, x, replace(PRIVACY, delta=0.2))
    with pytest.raises(ValueError, match="contradicts sample_rate"):
        training(model, x, replace(PRIVACY, expected_batch_size=64))
    by_subject = replace(PRIVACY, records="subjects", expected_batch_size=2)
    with pytest.raises(ValueError, match="give `subjects`"):
        training(model, x, by_subject)
    with pytest.raises(ValueError, match="3 subjects for 8 images"):
        training(model, x, by_subject, subjects=["a", "b", "b"])
    with pytest.raises(ValueError, match="more than max_images 3"):
        update(linear(), torch.randn(8, 4), by_subject, subjects=list("aaaaabbb"), max_images=3)
    stranger = torch.optim.SGD([*model.parameters(), nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ValueError, match="not the model's"):
        PrivateTraining(model, stranger, PRIVACY, x)


def test_an_image_set_brings_its_subjects():
    views = phantoms.mammography(8, image_size=32).image_set  # two views a patient
    private = training(wide(), views, replace(PRIVACY, records="subjects", expected_batch_size=4))
    assert private.n == 8
    assert private.count == len(set(views.subjects)) == 4


def test_window_attention_and_channels_last_come_out_right():
    """The two silent traps of TOOLCHAIN section 6: both take the step that a loop over single images gives."""
    swin = SwinTransformer([4, 4], 8, [2], [2], [7, 7], num_classes=2, stochastic_depth_prob=0.0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(2))
    net(torch.zeros(1, 3, 28, 28))
    images = torch.randn(7, 3, 28, 28).contiguous(memory_format=torch.channels_last)
    privacy = replace(PRIVACY, noise_multiplier=1e-9)
    for model, method in ((swin, "vmap"), (net, "bookkeeping")):
        weights, total = list(model.parameters()), 0
        for image in images:
            gradient = torch.autograd.grad(squared(model, image[None]).sum(), weights)
            gradient = torch.cat([g.flatten() for g in gradient])
            total = total + gradient * min(1.0, 0.3 / gradient.norm().item())
        moved, private = update(model, images, privacy)
        assert private.method == method
        assert (moved - total / 7).norm() < 1e-3 * (total / 7).norm()


def test_a_channels_last_model_takes_the_step_of_a_contiguous_one():
    """Fused Adam reads a gradient that is not laid out as its weight in the wrong order."""
    images, steps = torch.randn(7, 3, 8, 8), []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2)).to(memory_format=layout)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2, fused=True)
        private = PrivateTraining(model, optimizer, PRIVACY, images, generator=torch.Generator().manual_seed(1))
        for rows in private.batches(2):
            private.step(squared, images[rows])
        steps.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(*steps, atol=1e-5)


def test_tied_weights_are_refused_by_the_self_test_and_right_under_vmap():
    """Two layers share one weight: the norm of their sum is not the sum of their norms."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with pytest.raises(RuntimeError, match="use method='vmap'"):
        update(model, torch.randn(7, 4))
    assert update(model, torch.randn(7, 4), method="vmap")[1].steps == 1


def test_an_empty_first_batch_does_not_use_up_the_self_test(monkeypatch):
    drawn = iter([0, 7])
    monkeypatch.setattr(randomness.Seeded, "chosen", lambda self, n, rate: torch.arange(n) < next(drawn))
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    private = training(model, x := torch.randn(7, 4))
    for rows in private.batches(2):
        if len(rows):
            with pytest.raises(RuntimeError, match="use method='vmap'"):
                private.step(squared, x[rows])
            break
        private.step(squared, x[rows])
    assert private.steps == 1


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
    x = torch.randn(5, 8) * torch.arange(1, 6)[:, None]
    private = training(model, x, replace(PRIVACY, expected_batch_size=5))
    for rows in private.batches(1):
        with pytest.raises(RuntimeError, match="mixes records"):
            private.step(loss, x[rows])
        break


def test_a_rare_record_is_drawn_no_more_often_than_accounted():
    """Uniform float32 numbers lie on a grid of 2^-24: below one in a million a 'u < rate' is true too often."""
    rate = 2**-26
    drawn = sum(randomness.Seeded(torch.Generator().manual_seed(s)).chosen(2**24, rate).sum() for s in range(8))
    assert drawn <= 12  # mean 2; on the coarse grid it would be 8


def test_weights_of_few_digits_are_refused():
    with pytest.raises(ValueError, match="Weights below float32"):
        training(linear().bfloat16(), torch.zeros(7, 4))


def test_subjects_are_not_ignored():
    with pytest.raises(ValueError, match="records are images"):
        training(linear(), torch.zeros(7, 4), subjects=list("aabbccd"))


def test_the_self_test_respects_max_images():
    seen = []
    model = linear()
    model.register_forward_hook(lambda layer, args, output: seen.append(len(args[0])))
    private = training(model, x := torch.randn(8, 4), replace(PRIVACY, expected_batch_size=8), max_images=2)
    for rows in private.batches(3):
        private.step(squared, x[rows])
    assert max(seen) == 2


def late(wrong):
    """A loss that is right at first and `wrong` from its fourth step on."""
    steps = []

    def loss(model, x):
        return wrong(model, x) if len(steps) > 3 else squared(model, x)

    return loss, steps


def test_a_penalty_that_is_switched_on_later_is_refused():
    private = training(linear(), x := torch.randn(7, 4))
    loss, steps = late(gradient_penalty)
    for rows in private.batches(5):
        if len(steps) > 3:
            with pytest.raises(ValueError, match="gradients of its own"):
                private.step(loss, x[rows])
            break
        private.step(loss, x[rows])
        steps.append(1)


MIXTURES = {
    "by the size of the batch": lambda model, x: squared(model, x) / len(x),
    "of all records": lambda model, x: squared(model, x - x.mean(0)),
    "of those before": lambda model, x: squared(model, x.cumsum(0)),
    "of pairs": lambda model, x: squared(model, x + x.roll(1, 0)),
}


@pytest.mark.parametrize("mixture", MIXTURES)
def test_mixtures_of_records_in_the_loss_are_refused(mixture):
    private = training(linear(), (x := torch.randn(7, 4)))
    for rows in private.batches(1):
        with pytest.raises(RuntimeError, match="mixes records"):
            private.step(MIXTURES[mixture], x[rows])
        break


def steps_until_refused(model, losses, sizes, monkeypatch):
    """Steps taken before the engine says that records mix; batches of the given sizes."""
    x, drawn = torch.randn(7, 4), iter(sizes)
    monkeypatch.setattr(randomness.Seeded, "chosen", lambda self, n, rate: torch.arange(n) < next(drawn))
    private = training(model, x)

    def run():
        for rows, loss in zip(private.batches(len(sizes)), losses):
            private.step(loss, x[rows])

    with pytest.raises(RuntimeError, match="mixes records"):
        run()
    return private.steps


def test_a_mixture_that_hides_at_first_is_found_soon(monkeypatch):
    """In a batch of one record; behind weights that are zero; in a term that is switched on later."""
    mixed = MIXTURES["of all records"]
    assert steps_until_refused(linear(), [mixed] * 3, [1, 7, 7], monkeypatch) == 1
    zero = linear()
    nn.init.zeros_(zero.weight), nn.init.zeros_(zero.bias)
    assert steps_until_refused(zero, [mixed] * 3, [7, 7, 7], monkeypatch) == 1
    warm_up = [lambda model, x, t=t: squared(model, x - t * x.mean(0)) for t in (0, 0, 1, 1, 1)]
    assert steps_until_refused(linear(), warm_up, [7] * 5, monkeypatch) == 3


def test_a_frozen_weights_old_gradient_is_not_applied():
    model, x = nn.Sequential(linear(), nn.Linear(4, 4)), torch.randn(7, 4)
    private = training(model, x)
    squared(model, x).sum().backward()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    for rows in private.batches(1):
        private.step(squared, x[rows])
    assert torch.equal(model[0].weight, before)


def test_a_weight_that_joins_the_optimizer_later_is_refused():
    model, x = linear(), torch.randn(7, 4)
    private = training(model, x)
    private.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    for rows in private.batches(1):
        with pytest.raises(ValueError, match="not the model's"):
            private.step(squared, x[rows])
        break


def test_draws_cannot_be_thrown_away():
    """By next, by break, or by swallowing what a step raised."""
    x = torch.randn(7, 4)
    private = training(linear(), x)
    next(iter(private.batches(1)))
    with pytest.raises(RuntimeError, match="no step taken on it"):
        next(iter(private.batches(1)))
    private = training(linear(), x)
    draws = private.batches(2)
    rows = next(draws)
    with pytest.raises(ValueError, match="not finite"):
        private.step(lambda m, x: squared(m, x) / 0, x[rows])
    with pytest.raises(RuntimeError, match="no step taken on it"):
        next(draws)


def test_a_record_without_a_finite_gradient_stops_the_step_and_loses_nothing():
    model, x = wide(), torch.randn(7, 200)
    before = model.weight.detach().clone()
    x[2, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        update(model, x, method="vmap")
    assert torch.equal(model.weight, before)
