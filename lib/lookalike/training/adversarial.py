"""Training the conditional GAN; under DP-SGD only the discriminator, which alone sees private images, is private.

Paper: Arroyo Galende et al. 2026, "No Free Lunch ...", Sec. 3.1, and the authors' `src/core/trainer.py`,
`src/models/scheduler.py`. Chapter: no_free_lunch. Two things leak in the published private training and are mended by
default (`as_published=False`): the generator's labels and batch size come from the private batch, and an un-noised loss
decides when it trains.
"""

import math
from contextlib import contextmanager

import torch

from lookalike.models.gan import discriminator_loss, generator_loss, gradient_penalty
from lookalike.training.likelihood import batches, due, keep, mean_loss, report, resume, start_private

BETAS = (0.5, 0.999)
FIRST_STEPS, LONGEST_WAIT, BAND = 6, 50, 0.6  # the authors' scheduler


def train_gan(
    generator_net, discriminator, images, labels, *, epochs, lr=1e-4, batch_size=64, penalty=1.0,
    privacy=None, subjects=None, generator_every=10, as_published=False, generator=None, checkpoint=None,
):  # fmt: skip
    """Adam on images (N, C, S, S) in [-1, 1] and labels (N,); `privacy` makes the discriminator's steps DP-SGD.

    Without privacy: gradient penalty and the authors' schedule. With it: no penalty (it has no per-record gradient),
    labels for made images drawn uniformly, one generator step per `generator_every` discriminator steps (ten is near
    what the authors' rule did; many discriminator steps help a private GAN, Bie et al. 2023). `as_published` takes the
    private labels and the authors' loss-driven schedule instead: no epsilon covers that generator, so it is None.
    Returns {"loss": mean discriminator loss per epoch, "generator_steps", "steps", "epsilon"}; see `likelihood.train`.
    """
    generator = generator or torch.Generator().manual_seed(0)
    modules = {"generator": generator_net, "discriminator": discriminator}
    adam = {name: torch.optim.Adam(net.parameters(), lr, BETAS, fused=True) for name, net in modules.items()}
    private = start_private(discriminator, adam["discriminator"], privacy, images, subjects, generator, batch_size)
    leaky = as_published or not privacy  # made labels and batch sizes come from the real batch
    public = generator if leaky else _branch(generator)
    streams = {"batches": generator} | ({} if leaky else {"public": public})
    if not generator_every >= 1:
        raise ValueError(f"generator_every must be 1 or more discriminator steps, not {generator_every}.")
    schedule = Schedule(0.0 if privacy else math.log(2), every=None if leaky else generator_every)
    state = resume(checkpoint, modules, adam, streams, private)
    state.setdefault("generator_steps", 0)
    schedule.__dict__.update(state.pop("schedule", {}))
    generator_net.train(), discriminator.train()

    def made_labels(real_labels, n, stream=generator):
        return real_labels if leaky else _draw_labels(generator_net, n, stream, labels)

    for epoch in range(state["epoch"], epochs):
        losses = []
        for rows in batches(len(images), batch_size, private, generator):
            real_labels, fake_labels = labels[rows], made_labels(labels[rows], len(rows))
            with torch.no_grad():
                fake = generator_net(generator_net.noise(len(rows), generator), fake_labels)
            batch = (images[rows], fake, real_labels, fake_labels)
            if private:
                losses.append(private.step(discriminator_loss, *batch))
            else:
                losses.append(_discriminator_step(discriminator, adam["discriminator"], batch, penalty, generator))
            if schedule.says_go(losses[-1]):
                size = len(rows) if leaky else round(privacy.expected_batch_size)
                wanted = made_labels(real_labels, size, public)
                with _dropout_from(None if leaky else public, images.device):
                    generator_step(generator_net, discriminator, adam["generator"], wanted, public)
                state["generator_steps"] += 1
        state["loss"].append(mean_loss(losses))
        state["epoch"] = epoch + 1
        if due(epoch + 1, epochs):
            keep(checkpoint, modules, adam, streams, private, state | {"schedule": schedule.__dict__})
    found = report(state, private)
    if not (privacy and as_published):
        return found
    return found | {"epsilon": None, "privacy": None, "private_outputs": ["loss", "generator_steps"]}


class Schedule:
    """When the generator trains after a discriminator step.

    every: after each `every`-th one. None: the authors' rule on a moving average (0.9) of the discriminator's loss:
    in the first 6 steps, after 50 steps without, or while the average is within 0.6 of `target` (ln 2 without privacy,
    0 with).
    """

    def __init__(self, target, every=None):
        self.target, self.every, self.steps, self.waited, self.average = target, every, 0, 0, None

    def says_go(self, losses):
        """Counts the step; `losses` (N,) are read only by the authors' rule."""
        self.steps += 1
        self.waited += 1
        go = self._authors_rule(losses) if self.every is None else self.waited >= self.every
        if go:
            self.waited = 0
        return go

    def _authors_rule(self, losses):
        if len(losses):
            loss = float(losses.mean())
            self.average = loss if self.average is None else 0.9 * self.average + 0.1 * loss
        close = self.average is not None and abs(self.average - self.target) < BAND
        return self.steps <= FIRST_STEPS or self.waited >= LONGEST_WAIT or close


def _discriminator_step(discriminator, optimizer, batch, penalty, generator):
    real, fake, labels, _ = batch
    losses = discriminator_loss(discriminator, *batch)
    total = losses.mean()
    if penalty:
        total = total + penalty * gradient_penalty(discriminator, real, fake, labels, generator)
    optimizer.zero_grad(set_to_none=True)
    total.backward()
    optimizer.step()
    return losses.detach()


def generator_step(generator_net, discriminator, optimizer, labels, generator):
    if not len(labels):
        return  # a published private batch can be empty
    optimizer.zero_grad(set_to_none=True)
    fake = generator_net(generator_net.noise(len(labels), generator), labels)
    weights = [p.requires_grad_(False) for p in discriminator.parameters()]
    generator_loss(discriminator, fake, labels).mean().backward()
    for p in weights:
        p.requires_grad_(True)
    optimizer.step()


def _branch(generator):
    """A generator of its own, from one number of another: private batches do not move it."""
    return torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))


@contextmanager
def _dropout_from(generator, device):
    """Within, torch's global stream starts from a number of `generator`; None: it goes on as it is.

    The discriminator's dropout draws from the global stream, which private batches have moved.
    """
    if generator is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        yield


def _draw_labels(generator_net, n, generator, like):
    """Uniform labels: the classes are public, who is in the batch is not."""
    return torch.randint(generator_net.num_classes, (n,), generator=generator).to(like.device)
