"""Matched controls: one training in which every difference between the published plain and private one is a factor.

Paper: Arroyo Galende et al. 2026, "No Free Lunch ...", Sec. 4.2; chapter: no_free_lunch_controls. Without noise the
published training is not the private one at sigma 0 but another algorithm (sheet D16): shuffled batches, the norm of
the batch gradient clipped or nothing, for the GAN a gradient penalty and another schedule of its generator, for the
DDPM a learning rate that decays. Comparing the two says nothing about noise. Here each difference is a switch of its
own.

None of these trainings is private, whatever its noise: clipped records and noise are ingredients here, not a promise,
and no epsilon is computed. The GAN's made labels are those of the real batch, as published, in all of them.
"""

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.func import functional_call, grad, vmap

from lookalike.models.ddpm import ddpm_loss, draw_diffusion
from lookalike.models.gan import discriminator_loss, gradient_penalty
from lookalike.models.vae import from_unit, to_unit, vae_loss
from lookalike.privacy.clipping import clip_factors, clipped_sum
from lookalike.training.adversarial import BETAS, Schedule, generator_step
from lookalike.training.likelihood import WARM_UP

CLIPPED = ("none", "batch", "record")
TARGETS = {"ln2": math.log(2), "zero": 0.0}  # what the authors' schedule holds the discriminator's loss against
NORM = 1.0  # the paper's clipping norm, of records and of batches


@dataclass(frozen=True)
class Recipe:
    """One training's factors.

    clip: "none", "batch" (the norm of the mean gradient) or "record" (each record's, as in DP-SGD), to 1. noise: the
    standard deviation of what is added to the summed gradient, which is then divided by the batch size. poisson: each
    image enters each batch by itself, else batches are shuffled. penalty and schedule ("ln2", "zero": the target of the
    authors' rule) are the GAN's. decay: the learning rate falls to 0.
    optimizer: "adam" or "sgd"; SGD's rate is such that noise of the size `walk` moves a weight as far as Adam's step.
    """

    clip: str = "none"
    noise: float = 0.0
    poisson: bool = False
    penalty: bool = False
    schedule: str = "ln2"
    decay: bool = False
    optimizer: str = "adam"
    walk: float = 1.0

    def __post_init__(self):
        if self.clip not in CLIPPED or self.optimizer not in ("adam", "sgd"):
            raise ValueError(f"clip is one of {', '.join(CLIPPED)} and optimizer adam or sgd.")
        if self.schedule not in TARGETS:
            raise ValueError("schedule is ln2 or zero.")
        if not (0 <= self.noise < math.inf and 0 < self.walk < math.inf):
            raise ValueError(f"noise must be 0 or more and walk positive, not {self.noise} and {self.walk}.")


def published(family, sigma):
    """The recipe that the paper's training follows at `sigma`: one at 0, another above it."""
    if sigma > 0:
        return Recipe("record", sigma, poisson=True, schedule="zero")
    plain = {"vae": Recipe("batch"), "gan": Recipe(penalty=True), "ddpm": Recipe("batch", decay=True)}
    return plain[family]


def gan_factorial(sigma):
    """The sixteen recipes between the GAN's two: name -> recipe, a name listing what was taken from the private side.

    Factors: "schedule" (target zero), "penalty" (dropped), "clipping" (of records, with the Poisson batches that
    belong to it), "noise" (`sigma`). The empty name is the training at sigma 0, all four the private one.
    """
    recipes = {frozenset(): published("gan", 0)}
    for factor, change in (
        ("schedule", {"schedule": "zero"}), ("penalty", {"penalty": False}),
        ("clipping", {"clip": "record", "poisson": True}), ("noise", {"noise": sigma}),
    ):  # fmt: skip
        recipes |= {taken | {factor}: replace(recipe, **change) for taken, recipe in recipes.items()}
    return recipes


def train_controlled(family, nets, images, labels, recipe, *, epochs, lr=1e-4, batch_size=64, generator=None):
    """Trains `nets` (as `cells.build` gives them) on images (N, C, S, S) in [-1, 1] and labels (N,); not private.

    An epoch is ceil(N / batch_size) steps. `lr` is Adam's; SGD's is lr x batch size / walk. The GAN's generator always
    has Adam. Returns {"loss": mean per epoch, "generator_steps"}.
    """
    generator = generator or torch.Generator().manual_seed(0)
    watched = nets["discriminator"] if family == "gan" else nets["model"]
    size = len(images) / -(-len(images) // batch_size)
    optimizer = _optimizer(watched, recipe, lr, size, family)
    rate = optimizer.param_groups[0]["lr"]
    step = partial(_step, watched, optimizer, recipe, size, generator)
    adversary = _Adversary(nets, recipe, lr, generator) if family == "gan" else None
    history = {"loss": [], "generator_steps": 0}
    for net in nets.values():
        net.train()
    for epoch in range(epochs):
        if recipe.decay:
            optimizer.param_groups[0]["lr"] = rate * (1 - epoch / epochs)
        seen = []
        for rows in _batches(len(images), batch_size, recipe.poisson, generator):
            x, y = images[rows], labels[rows]
            loss, batch = adversary.meet(x, y) if adversary else _likelihood(family, watched, x, y, epoch, generator)
            losses = step(loss, batch)
            seen.append(losses)
            if adversary and adversary.answer(losses, y):
                history["generator_steps"] += 1
        seen = torch.cat(seen)
        history["loss"].append(float(seen.mean()) if len(seen) else None)
    return history


def factor_shares(values, factors):
    """What each factor adds on the way from no factor to all of them, averaged over the orders of adding (Shapley).

    values: frozenset of factors -> number or array (S,) over seeds, for every subset. Returns factor -> share of
    that shape; the shares add up to the whole difference exactly.
    """
    factors, n = list(factors), len(factors)
    if missing := 2**n - len({taken for taken in values if taken <= set(factors)}):
        raise ValueError(f"{missing} of the {2**n} combinations of {', '.join(factors)} have no value; run them all.")
    shares = {}
    for factor in factors:
        without = [taken for taken in values if taken <= set(factors) - {factor}]
        weight = lambda taken: math.factorial(len(taken)) * math.factorial(n - len(taken) - 1) / math.factorial(n)  # noqa: E731
        shares[factor] = sum(weight(taken) * (values[taken | {factor}] - values[taken]) for taken in without)
    return shares


# ---- one step -------------------------------------------------------------------------------------------------------


def _step(model, optimizer, recipe, size, generator, loss, batch):
    """One optimizer step on a batch, possibly an empty Poisson one; returns its losses (N,)."""
    optimizer.zero_grad(set_to_none=True)
    weights = [p for p in model.parameters() if p.requires_grad]
    losses = torch.zeros(0)
    if len(batch[0]):
        if recipe.clip == "record":
            gradients, losses = _clipped_records(model, loss, batch, recipe.penalty, generator)
        else:
            gradients, losses = _whole_batch(model, loss, batch, recipe, generator)
        for p in weights:
            p.grad = torch.empty_like(p).copy_(gradients[p])  # laid out as the weight: fused Adam reads others wrongly
            p.grad /= size if recipe.poisson else len(batch[0])
        if recipe.clip == "batch":
            torch.nn.utils.clip_grad_norm_(weights, NORM)
    for p in weights:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        if recipe.noise:
            p.grad += recipe.noise * NORM / size * torch.randn(p.shape, generator=generator).to(p.device)
    optimizer.step()
    return losses


def _whole_batch(model, loss, batch, recipe, generator):
    """Summed gradient by parameter, and the losses."""
    losses = loss(model, *batch)
    total = losses.sum()
    if recipe.penalty:
        total = total + len(losses) * gradient_penalty(model, *batch[:3], generator)
    weights = [p for p in model.parameters() if p.requires_grad]
    return dict(zip(weights, torch.autograd.grad(total, weights))), losses.detach()


def _clipped_records(model, loss, batch, penalty, generator):
    """Sum of clipped gradients by parameter, and the losses."""
    if not penalty:
        gradients, losses, _ = clipped_sum(model, loss, batch, NORM)
        return gradients, losses
    gradients, losses = _penalised_records(model, loss, batch, generator)
    norms = sum(g.flatten(1).square().sum(1) for g in gradients.values()).sqrt()
    factors = clip_factors(norms, NORM)
    return {p: torch.tensordot(factors, g, 1) for p, g in gradients.items()}, losses


def _penalised_records(model, loss, batch, generator):
    """Each record's gradient of its loss and its own gradient penalty, by parameter (N, ...), and the losses (N,).

    The penalty is a gradient itself, which book-keeping cannot follow: a gradient of a gradient, mapped over records.
    """
    weights = dict(model.named_parameters())
    share = torch.rand(len(batch[0]), 1, 1, 1, generator=generator).to(batch[0].device)

    def of_record(weights, share, *record):
        call = lambda *args: functional_call(model, weights, args)  # noqa: E731
        real, fake, label = (part[None] for part in record[:3])
        value = loss(call, *(part[None] for part in record)).sum()
        slope = grad(lambda unit: call(from_unit(unit), label).sigmoid().sum())(
            to_unit(share * real + (1 - share) * fake)
        )
        return value + (slope.norm() - 1).square(), value

    mapped = vmap(grad(of_record, has_aux=True), (None, *[0] * (1 + len(batch))), randomness="different")
    gradients, losses = mapped({name: p.detach() for name, p in weights.items()}, share, *batch)
    return {weights[name]: g for name, g in gradients.items()}, losses


def _likelihood(family, model, images, labels, epoch, generator):
    """Loss and batch of one step of the VAE or the DDPM."""
    if family == "vae":
        return partial(vae_loss, beta=min(1.0, epoch / WARM_UP)), (images, labels)
    return ddpm_loss, (images, labels, *draw_diffusion(model, images, generator))


class _Adversary:
    """The generator's side: makes images for the discriminator's step, and trains when the schedule says so."""

    def __init__(self, nets, recipe, lr, generator):
        self.net, self.discriminator, self.random = nets["model"], nets["discriminator"], generator
        self.adam = torch.optim.Adam(self.net.parameters(), lr, BETAS, fused=True)
        self.schedule = Schedule(TARGETS[recipe.schedule])

    @torch.no_grad()
    def meet(self, images, labels):
        return discriminator_loss, (images, self.net(self.net.noise(len(images), self.random), labels), labels, labels)

    def answer(self, losses, labels):
        go = self.schedule.says_go(losses)
        if go:
            generator_step(self.net, self.discriminator, self.adam, labels, self.random)
        return go


def _batches(n, batch_size, poisson, generator):
    """Row indices of an epoch's ceil(n / batch_size) steps."""
    steps = -(-n // batch_size)
    if not poisson:
        return torch.randperm(n, generator=generator).split(batch_size)
    return [(torch.rand(n, generator=generator) < 1 / steps).nonzero().flatten() for _ in range(steps)]


def _optimizer(model, recipe, lr, size, family):
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), lr * size / (recipe.walk * NORM))
    return torch.optim.Adam(model.parameters(), lr, BETAS if family == "gan" else (0.9, 0.999), fused=True)
