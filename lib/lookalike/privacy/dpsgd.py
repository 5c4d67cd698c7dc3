"""DP-SGD (Abadi et al. 2016): clip each record's gradient, sum, add noise, divide by a public number.

    privacy = Privacy(noise_multiplier=1.0, sample_rate=0.5, expected_batch_size=50, delta=1e-3)
    step = PrivateStep(model, optimizer, privacy, generator)
    rows = poisson_batch(len(images), privacy.sample_rate, generator)
    step(loss, images[rows], labels[rows])          # loss(model, *batch) gives one number per record
    step.epsilon()

What is divided by and how batches are drawn are public constants given by the caller. Stock Opacus divides by
int(len(dataset) * rate), which tells two neighbouring data sets apart (opacus issues 571, 819; arXiv 2605.15648).
"""

from dataclasses import dataclass

import torch
from torch import nn

from lookalike.privacy.accounting import rdp_epsilon
from lookalike.privacy.clipping import best_method, clipped_sum

CROSS_EXAMPLE = (nn.modules.batchnorm._BatchNorm,)
SELF_TEST_TOLERANCE = 1e-3  # relative; float32 rounding stays below 1e-4 here


@dataclass(frozen=True)
class Privacy:
    """A privacy specification: every number in it is public.

    noise_multiplier: sigma; the noise on the summed gradient has standard deviation sigma x max_grad_norm.
    sample_rate: the probability with which each record enters a batch. delta: below 1 / number of records.
    expected_batch_size: what the noisy sum is divided by; a constant of the protocol, never counted from the data.
    """

    noise_multiplier: float
    sample_rate: float
    expected_batch_size: float
    delta: float
    max_grad_norm: float = 1.0

    def __post_init__(self):
        if self.noise_multiplier <= 0:
            raise ValueError("noise_multiplier must be positive; for training without privacy leave out `privacy`.")
        if not 0 < self.sample_rate <= 1:
            raise ValueError(f"sample_rate must lie in (0, 1], not {self.sample_rate}.")
        if self.expected_batch_size <= 0 or self.max_grad_norm <= 0:
            raise ValueError("expected_batch_size and max_grad_norm must be positive.")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta must lie between 0 and 1, not {self.delta}; take it below 1 / number of records.")

    def epsilon(self, steps):
        """Accounted epsilon after so many steps: image level, Rényi accountant, an upper bound."""
        return rdp_epsilon(self.noise_multiplier, self.sample_rate, steps, self.delta)


class PrivateStep:
    """One call is one step of DP-SGD on `model` through `optimizer`; counts its steps.

    `method` says how records' gradients are clipped (`clipping.best_method` if None); the first batch checks it against
    autograd. `generator` draws the noise: seeded for a study. Batch normalisation is refused: it mixes records.
    """

    def __init__(self, model, optimizer, privacy, generator=None, method=None):
        for name, layer in model.named_modules():
            if isinstance(layer, CROSS_EXAMPLE):
                raise ValueError(f"The layer {name} is batch normalisation, which mixes records; use nn.GroupNorm.")
        self.model, self.optimizer, self.privacy = model, optimizer, privacy
        self.generator, self.method = generator, method or best_method(model)
        self.steps, self.tested = 0, False

    def __call__(self, loss, *batch):
        """Steps once on the batch (possibly empty: then noise alone); returns the losses (N,), which are private."""
        losses, gradients = torch.zeros(0), {}
        if len(batch[0]):
            self._self_test(loss, batch)
            gradients, losses, _ = clipped_sum(self.model, loss, batch, self.privacy.max_grad_norm, self.method)
        for p in self._weights():
            p.grad = self._privatise(gradients.get(p, torch.zeros_like(p)))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        return losses

    def epsilon(self):
        """Accounted epsilon of the steps so far, at the specification's delta."""
        return self.privacy.epsilon(self.steps)

    def _privatise(self, summed):
        device = self.generator.device if self.generator else summed.device
        noise = torch.empty(summed.shape, device=device).normal_(generator=self.generator).to(summed.device)
        scale = self.privacy.noise_multiplier * self.privacy.max_grad_norm
        return noise.mul_(scale).add_(summed).div_(self.privacy.expected_batch_size)

    def _self_test(self, loss, batch):
        """Once, on the first batch: records must not mix, and gradients per record must be autograd's."""
        if self.tested:
            return
        self._check_alone(loss, batch)
        if self.method != "vmap":  # vmap takes each record alone; and it draws dropout masks in another order
            with torch.random.fork_rng(devices=_cuda(self.model)):
                ours, _, norms = clipped_sum(self.model, loss, batch, float("inf"), self.method)
            with torch.random.fork_rng(devices=_cuda(self.model)):
                check_gradients(self.model, loss, batch, ours, norms)
        self.tested = True

    @torch.no_grad()
    def _check_alone(self, loss, batch):
        """The first record's loss must not change when the others do; the same shapes draw the same random numbers."""
        copies = tuple(t[:1].expand_as(t) for t in batch)
        found = []
        for rows in (batch, copies):
            with torch.random.fork_rng(devices=_cuda(self.model)):
                found.append(loss(self.model, *rows)[0])
        if not (found[0] - found[1]).abs() <= SELF_TEST_TOLERANCE * found[0].abs() + 1e-6:
            raise RuntimeError("This model mixes records: a record's loss depends on the others in its batch.")

    def _weights(self):
        return [p for p in self.model.parameters() if p.requires_grad]


def check_gradients(model, loss, batch, ours, norms):
    """Raises unless the unclipped sum `ours` (parameter -> tensor) and the `norms` (N,) of records equal autograd's.

    The norms of the first and the last record are recomputed from their losses alone: a model that gives a row to the
    wrong record has the right sum and wrong norms, and clipping by those would bound nothing.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    losses = loss(model, *batch)
    gradient = lambda value: torch.autograd.grad(value, trained.values(), retain_graph=True)  # noqa: E731
    summed = dict(zip(trained, gradient(losses.sum())))
    whole = torch.stack([g.norm() for g in summed.values()]).norm()
    for name, p in trained.items():
        # A bias before a normalisation has gradient 0 but for rounding, which scales with the whole gradient.
        allowed = SELF_TEST_TOLERANCE * summed[name].norm() + 1e-5 * whole
        if not (summed[name] - ours[p]).norm() <= allowed:
            raise RuntimeError(f"Per-record gradients of {name} are wrong for this model; use method='vmap'.")
    for i in {0, len(losses) - 1}:
        norm = torch.stack([g.norm() for g in gradient(losses[i])]).norm()
        if not (norm - norms[i]).abs() <= SELF_TEST_TOLERANCE * norm + 1e-5 * whole:
            raise RuntimeError("This model mixes records: a record's gradient alone is another than in its batch.")


def poisson_batch(n, sample_rate, generator=None):
    """Indices of the records that enter: each of n independently with probability `sample_rate`; may be empty."""
    return (torch.rand(n, generator=generator) < sample_rate).nonzero().flatten()


def check_delta(delta, n):
    """Raises unless delta < 1 / n: above it, publishing one record in full would count as private."""
    if delta >= 1 / n:
        raise ValueError(f"delta {delta} is not below 1 / {n} records; choose a smaller one.")


def _cuda(model):
    device = next(model.parameters()).device
    return [device] if device.type == "cuda" else []
