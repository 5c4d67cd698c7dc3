"""Attacks on our own private training that bound its epsilon from below, beside the bound from above.

    lookalike audit --self-test                         stock Opacus contradicts its accountant, our engine does not
    lookalike audit no_free_lunch --run small --stage train/vae/sigma0.4/seed0/full

White box, one step (`one_step_scores`): the same step on a data set and its neighbour, many times (Nasr et al. 2023).
White box, composed (`canary_scores`): canaries are records whose gradient is one direction that no image uses; each is
in by a coin, and what the noisy sums show of it over all steps is its score (Steinke et al. 2023). In reach are
mistakes in how records are drawn and in the size of what one adds against the noise. A layer's own clipping formula
and a divisor that depends on the data are not: those have tests and the one-step audit.
Black box (`closeness`): how near released samples come to members and to non-members.
A lower bound above the accounted epsilon is a contradiction: the training does not give what it claims.
"""

import warnings
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import nn

from lookalike.metrics import as_images, to_unit
from lookalike.metrics.distances import nearest
from lookalike.privacy.accounting import Training, account
from lookalike.privacy.bounds import LowerBound, contradicts, lower_bound, one_run_bound
from lookalike.privacy.dpsgd import Privacy, PrivateTraining
from lookalike.privacy.randomness import stream

DELTA = 1e-5  # one run pays 2 x canaries x delta of its confidence
RECORDS = 31  # of the self-test: stock Opacus divides by 31 with the last one and by 30 without
OVERSHOOT = 10.0  # a canary's gradient before clipping, in clip norms


@dataclass(frozen=True)
class Bracket:
    """Accounted epsilon (upper) and audited epsilon (lower) of one training, at one delta, in one row.

    what: the training; unit: whose presence is protected; mode: "study" or "release". `contradiction` is true where
    the lower bound passes the upper one. if_gaussian: what the same scores would bound if the training's trade-off
    curve were a Gaussian one; tighter, an assumption, and no part of the verdict. None where that makes no sense.
    verdict: whether the bound's assumption was met, so that a contradiction would be one (with the error rate that its
    confidence leaves).
    """

    what: str
    unit: str
    mode: str
    steps: int
    accounted: float
    accountant: str
    note: str
    audit: str
    lower: LowerBound
    if_gaussian: float | None = None
    verdict: bool = True

    @property
    def contradiction(self):
        """None where no verdict can be given."""
        return contradicts(self.accounted, self.lower) if self.verdict else None

    def row(self):
        """Plain values for JSON and tables."""
        bound = asdict(self.lower)
        return {k: v for k, v in vars(self).items() if k != "lower"} | {
            "delta": bound.pop("delta"),
            "lower": bound.pop("epsilon"),
            "contradiction": self.contradiction,
            **bound,
        }


def bracket(what, privacy, steps, audit, lower, if_gaussian=None, verdict=True):
    """The row of a training by `privacy` of `steps` steps; accounted at the delta of the lower bound."""
    spent = account(Training(privacy.noise_multiplier, privacy.sample_rate, steps), lower.delta)
    upper = spent.epsilon, spent.accountant, spent.note
    return Bracket(what, privacy.records, privacy.mode, steps, *upper, audit, lower, if_gaussian, verdict)


# ---- white box, one step --------------------------------------------------------------------------------------------


def one_step_scores(step, statistic, trials):
    """Scores (k, trials) of independent steps: `step()` gives a noisy gradient (d,), `statistic` k numbers of it."""
    return np.array([statistic(step()) for _ in range(trials)]).T


def our_step(images, privacy, generator=None):
    """One step of our engine on a linear model of `images` (N, d), the same each time.

    Gives two functions: the noisy gradient (d,) of a fresh step, and the accounted epsilon of one.
    """
    model = _linear(images)
    private = PrivateTraining(model, Observer(model.parameters()), privacy, images, generator=generator)

    def step():
        for rows in private.batches(1):
            private.step(_inner_product, images[rows])
        return private.optimizer.seen

    return step, lambda: account(_one_step(privacy), privacy.delta).epsilon


def stock_step(images, privacy, generator=None, *, batch_size):
    """The same for Opacus as it comes: `make_private` on a loader, its own division, and its own accountant.

    The batch holds every record, as its sampler draws it when `batch_size` is at least N.
    """
    from opacus import PrivacyEngine
    from torch.utils.data import DataLoader, TensorDataset

    model = _linear(images)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Opacus speaks of secure randomness at every call, and torch of its hooks
        engine = PrivacyEngine()
        wrapped, optimizer, loader = engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
            data_loader=DataLoader(TensorDataset(images), batch_size=batch_size),
            noise_multiplier=privacy.noise_multiplier,
            max_grad_norm=privacy.max_grad_norm,
            noise_generator=generator,
        )
    if loader.sample_rate != 1:
        raise ValueError(f"batch_size {batch_size} is below the {len(images)} records; take one that holds them all.")

    def step():
        optimizer.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _inner_product(wrapped, images).mean().backward()
        optimizer.step()
        return model.weight.grad.flatten().clone()

    return step, lambda: _stock_epsilon(engine, privacy)


def self_test(records=RECORDS, dimension=10_000, noise_multiplier=5.0, batch_size=64, trials=100, seed=0):
    """{"stock": {"accounted", "lower"}, "ours": ...}: one step on `records` against one record less, both engines.

    Two statistics, each at half of the error: the noisy gradient's norm, and its projection on the last record. Stock
    Opacus divides by the size of the data set, so the noise itself is larger on the smaller one; our normaliser is the
    same for both.
    """
    privacy = Privacy(noise_multiplier, 1.0, records, DELTA)
    images = torch.randn(records, dimension, generator=stream(seed, "images")) / dimension**0.5
    last = images[-1] / images[-1].norm()
    statistic = lambda gradient: (-float(gradient.norm()), float(gradient @ last))  # noqa: E731
    engines = {"stock": partial(stock_step, batch_size=batch_size), "ours": our_step}
    found = {}
    for name, engine in engines.items():
        scores = []
        for n in (records, records - 1):
            step, accounted = engine(images[:n], privacy, generator=stream(seed, f"{name} {n}"))
            scores.append(one_step_scores(step, statistic, trials))
        lower = max(lower_bound(*pair, DELTA, confidence=0.975).epsilon for pair in zip(*scores))
        found[name] = {"accounted": round(accounted(), 4), "lower": round(lower, 4)}
    return found


class Observer(torch.optim.Optimizer):
    """Leaves the weights alone and keeps the gradient it was given, flat, as `seen`."""

    def __init__(self, weights):
        super().__init__(weights, {})

    def step(self):
        self.seen = torch.cat([p.grad.flatten() for group in self.param_groups for p in group["params"]])


def _linear(images):
    model = nn.Linear(images.shape[1], 1, bias=False)
    nn.init.zeros_(model.weight)
    return model


def _inner_product(model, images):
    """A record's gradient is its image."""
    return model(images)[:, 0]


def _one_step(privacy):
    return Training(privacy.noise_multiplier, privacy.sample_rate, 1)


def _stock_epsilon(engine, privacy):
    """What Opacus' own accountant says of one of the steps taken."""
    one, (noise_multiplier, sample_rate, _) = type(engine.accountant)(), engine.accountant.history[0]
    one.history = [(noise_multiplier, sample_rate, 1)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the best order is the largest one: a looser bound is still a bound
        return float(one.get_epsilon(delta=privacy.delta))


# ---- white box, composed, many canaries in one run ------------------------------------------------------------------


class Probe(nn.Module):
    """A model and, beside it, one weight per canary, which nothing but that canary's loss depends on."""

    def __init__(self, model, canaries):
        super().__init__()
        self.model = model
        self.directions = nn.Linear(canaries, 1, bias=False)
        nn.init.zeros_(self.directions.weight)

    def forward(self, *args, codes=None):
        """The model's own output; of codes (N, canaries) the canaries' (N,)."""
        return self.model(*args) if codes is None else self.directions(codes)[:, 0]

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)  # losses may ask a model for its settings


def probe_loss(loss, max_grad_norm):
    """`loss` for records without a code; a canary's has a gradient far above the clip norm, in its one weight."""

    def probed(probe, codes, *batch):
        own = loss(probe, *batch) * (codes.sum(1) == 0)
        return own + OVERSHOOT * max_grad_norm * probe(codes=codes)

    return probed


def canary_scores(model, step_loss, privacy, data, steps, canaries, subjects=None, lr=1e-4, images_each=1, seed=0):
    """Trains `model` for `steps` private steps with canaries; their scores (canaries,) and who was in (canaries,).

    `step_loss(model, *rows)` gives (loss, batch) for the rows of the tensors `data`, as a training loop makes them at
    every step. A score is the log likelihood ratio, in against out, of what the noisy sums showed of the canary,
    the optimal one for a Gaussian under Poisson sampling. The model is trained in place, by Adam.
    """
    rng = np.random.default_rng(seed)
    included = rng.random(canaries) < 0.5
    codes = torch.eye(canaries)[np.repeat(np.flatnonzero(included), images_each)]
    rows = [torch.cat([t, t.new_zeros(len(codes), *t.shape[1:])]) for t in data]
    codes = torch.cat([torch.zeros(len(data[0]), canaries), codes]).to(data[0].device)
    by_subject = privacy.records == "subjects"
    own = [f"record {subject}" for subject in (subjects if by_subject else range(len(data[0])))]
    owners = [*own, *(f"canary {c}" for c in np.repeat(np.flatnonzero(included), images_each))]
    # another normaliser is another scale of the same mechanism; how many canaries are in is not public
    records = len(set(own)) + canaries / 2 * (1 if by_subject else images_each)
    scaled = replace(privacy, expected_batch_size=privacy.sample_rate * records, delta=DELTA)
    probe = Probe(model, canaries).to(data[0].device).train()
    adam = torch.optim.Adam(probe.parameters(), lr)
    private = PrivateTraining(
        probe, adam, scaled, codes, owners if by_subject else None, stream(seed, "canaries' batches and noise")
    )
    scores, weight = torch.zeros(canaries, dtype=torch.float64), probe.directions.weight

    def observe(*_):
        scores.add_(_evidence(weight.grad[0], scaled))

    adam.register_step_pre_hook(observe)
    for drawn in private.batches(steps):
        loss, batch = step_loss(probe, *(t[drawn] for t in rows))
        private.step(probe_loss(loss, privacy.max_grad_norm), codes[drawn], *batch)
    return scores.numpy(), included


def audit_training(what, model, step_loss, privacy, data, steps, canaries=500, confidence=0.95, **settings):
    """The `Bracket` of `steps` private steps on `data` with so many canaries; see `canary_scores`.

    The bound is that of one run (Steinke et al. 2023), which holds whatever the training does.
    """
    scores, included = canary_scores(model, step_loss, privacy, data, steps, canaries, **settings)
    lower = one_run_bound(scores, included, DELTA, confidence)
    gaussian = one_run_bound(scores, included, DELTA, confidence, method="one_run_gaussian").epsilon
    return bracket(what, privacy, steps, f"white box, {canaries} canaries in one run", lower, gaussian)


def _evidence(noisy_mean, privacy):
    """Log likelihood ratio of each canary's coordinate: sampled with the rate and clipped to C, against not there."""
    x = (noisy_mean * (privacy.expected_batch_size / privacy.max_grad_norm)).double().cpu()
    rate = torch.tensor(privacy.sample_rate, dtype=torch.float64)
    return torch.logaddexp(torch.log1p(-rate), rate.log() + (2 * x - 1) / (2 * privacy.noise_multiplier**2))


# ---- black box ------------------------------------------------------------------------------------------------------


def closeness(candidates, samples):
    """Score (N,) of each candidate image: minus the pixel distance to the nearest of the released samples."""
    return -nearest(_pixels(candidates), _pixels(samples))[0]


def audit_samples(candidates, included, samples, confidence=0.95):
    """`LowerBound` from released images alone: `included` (N,) says which candidates a coin put into training."""
    return one_run_bound(closeness(candidates, samples), included, DELTA, confidence)


def _pixels(images):
    return to_unit(as_images(images)).flatten(1).numpy()
