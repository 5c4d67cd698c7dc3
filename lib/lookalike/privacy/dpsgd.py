"""DP-SGD (Abadi et al. 2016): clip each record's gradient, sum, add noise, divide by a public number.

    privacy = Privacy(noise_multiplier=1.0, sample_rate=0.5, expected_batch_size=50, delta=1e-3)
    private = PrivateTraining(model, optimizer, privacy, images, generator=generator)
    for rows in private.batches(steps):
        private.step(loss, images[rows], labels[rows])      # loss(model, *batch) gives one number per image
    private.report()

What is divided by and how batches are drawn are public constants given by the caller. Stock Opacus divides by
int(len(dataset) * rate), which tells two neighbouring data sets apart (opacus issues 571, 819; arXiv 2605.15648).
A record is an image or a subject: then subjects are drawn, each one's gradients are summed and the sum is clipped
once, so that epsilon covers a subject with all of their images. Every refusal here has its test and its paragraph on
the page "Sharp edges".
"""

import math
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler

from lookalike.privacy import randomness
from lookalike.privacy.accounting import Training, account, noise_multiplier_for
from lookalike.privacy.clipping import PENALTY, best_method, clipped_sum

RECORDS = ("images", "subjects")
SELF_TEST_TOLERANCE = 1e-3  # relative; float32 rounding stays below 1e-4 here
TESTED = 16  # images of a batch that the self-test looks at: what mixes records mixes these
CONTRADICTION = 2.0  # a batch size this many times off rate x records is a mistake, not a rounding


@dataclass(frozen=True)
class Privacy:
    """A privacy specification: every number in it is public.

    noise_multiplier: sigma; the noise on the summed gradient has standard deviation sigma x max_grad_norm.
    sample_rate: the probability with which each record enters a batch. delta: below 1 / number of records.
    expected_batch_size: what the noisy sum is divided by; a constant of the protocol, never counted from the data.
    records: "images" or "subjects", whose presence is protected. mode: "study" (seeded: repeatable, and whoever has the
    seed can subtract the noise) or "release" (randomness of the operating system, never stored). accountant: "rdp"
    (quick), "pld", "prv" or "best" (tighter, slower).
    """

    noise_multiplier: float
    sample_rate: float
    expected_batch_size: float
    delta: float
    max_grad_norm: float = 1.0
    records: str = "images"
    mode: str = "study"
    accountant: str = "rdp"

    def __post_init__(self):
        if not 0 < self.noise_multiplier < math.inf:
            raise ValueError("noise_multiplier must be positive; for training without privacy leave out `privacy`.")
        if not 0 < self.sample_rate <= 1:
            raise ValueError(f"sample_rate must lie in (0, 1], not {self.sample_rate}.")
        if not all(0 < number < math.inf for number in (self.expected_batch_size, self.max_grad_norm)):
            raise ValueError("expected_batch_size and max_grad_norm must be positive and finite.")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta must lie between 0 and 1, not {self.delta}; take it below 1 / number of records.")
        if self.records not in RECORDS or self.mode not in randomness.MODES:
            raise ValueError("records must be images or subjects, and mode study or release.")

    @classmethod
    def for_epsilon(cls, epsilon, sample_rate, steps, delta, accountant="rdp", **settings):
        """The specification with the least noise that spends at most `epsilon` in `steps` steps."""
        sigma = noise_multiplier_for(epsilon, sample_rate, steps, delta, accountant)
        return cls(sigma, sample_rate, delta=delta, accountant=accountant, **settings)

    def epsilon(self, steps):
        """Accounted epsilon after so many steps, for `records`: an upper bound."""
        training = Training(self.noise_multiplier, self.sample_rate, steps)
        return account(training, self.delta, self.accountant).epsilon

    def released(self):
        """The same specification with the operating system's randomness."""
        return replace(self, mode="release")


class PrivateTraining:
    """Draws batches and steps on them, as DP-SGD on `model` through `optimizer`.

    `data` is what the records are in (images, a torch Dataset, an ImageSet): its length counts. `subjects` (N,) says
    whose each image is; needed where records are subjects. `generator` draws batches and noise in study mode; release
    mode does not touch it. `method` says how gradients are clipped (`clipping.best_method` if None); the first batch
    checks it against autograd, where it can. `max_images` splits a large batch: more time, less memory, the same sum.
    """

    def __init__(
        self, model, optimizer, privacy, data, subjects=None, generator=None, method=None, max_images=None
    ):  # fmt: skip
        self.model, self.optimizer, self.privacy = model, optimizer, privacy
        self.method, self.max_images = method or best_method(model), max_images
        if privacy.records == "images" and subjects is not None:
            raise ValueError(
                "`subjects` was given, but records are images: ask for records='subjects', or leave it out."
            )
        self.subjects = _subject_numbers(data, subjects) if privacy.records == "subjects" else None
        self.n = _length(data)
        self.random = randomness.source(privacy.mode, generator)
        self.steps, self._drawn = 0, None
        self._gradients_checked = self._alone_checked = False
        self._refuse_changes()
        check_delta(privacy.delta, self.count)
        check_batch_size(privacy.expected_batch_size, privacy.sample_rate, self.count)

    @property
    def count(self):
        """How many records there are."""
        return self.n if self.subjects is None else len(self.subjects.unique())

    def batches(self, steps):
        """Row indices of so many Poisson samples: each record enters with the sampling rate; a sample may be empty.

        A step must follow each of them.
        """
        self._refuse_open_draw()
        for rows in [self._draw() for _ in range(steps)]:
            self._drawn = rows
            yield rows
            self._refuse_open_draw()

    def step(self, loss, *batch):
        """Steps once on the images drawn (possibly none); returns their losses (N,), which are private.

        `loss(model, *batch)` gives one number per image; every tensor of the batch has the images first.
        """
        rows = self._check_draw(batch)
        self._refuse_changes()
        gradients, losses = {}, torch.zeros(0)
        if len(rows):
            owners = self._owners(rows, batch[0].device)
            self._self_test(loss, batch, owners)
            gradients, losses = self._clipped(loss, batch, owners)
        self.optimizer.zero_grad(set_to_none=True)  # a frozen weight may hold a gradient of other code
        for p in _trained(self.model):
            noisy = self._privatise(gradients[p] if p in gradients else torch.zeros_like(p))
            p.grad = _laid_out_as(p, noisy)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        self._drawn = None
        return losses

    def epsilon(self):
        """Accounted epsilon of the steps so far, at the specification's delta."""
        return self.privacy.epsilon(self.steps)

    def report(self):
        """The specification, the steps taken and what they spent, as plain values; nothing in it is private."""
        return asdict(self.privacy) | {
            "clipping": self.method,
            "steps": self.steps,
            "epsilon": self.epsilon(),
            "guarantee": randomness.MODES[self.privacy.mode],
        }

    def _draw(self):
        chosen = self.random.chosen(self.count, self.privacy.sample_rate)
        return (chosen if self.subjects is None else chosen[self.subjects]).nonzero().flatten()

    def _refuse_open_draw(self):
        if self._drawn is not None:
            raise RuntimeError(
                f"A batch of {len(self._drawn)} images was drawn and no step taken on it: call step once for every "
                "batch, also for an empty one, which is a step of noise alone."
            )

    def _refuse_changes(self):
        """What a caller may have changed since the last step."""
        refuse_layers(self.model, self.method)
        _check_optimizer(self.model, self.optimizer)

    def _check_draw(self, batch):
        if self._drawn is None:
            raise RuntimeError("Take the rows of a step from batches(): other batches are not what is accounted for.")
        if any(len(t) != len(self._drawn) for t in batch):
            raise RuntimeError(
                f"{len(self._drawn)} images were drawn; every tensor of the batch must have as many rows."
            )
        return self._drawn

    def _owners(self, rows, device):
        """Whose each image is, numbered within the batch; None where each image is a record."""
        if self.subjects is None:
            return None
        return torch.unique(self.subjects[rows], return_inverse=True)[1].to(device)

    def _clipped(self, loss, batch, owners):
        """The clipped sum and the losses (N,), over parts of at most `max_images` images; no record is split."""
        gradients, losses = {}, torch.zeros(len(batch[0]), device=batch[0].device)
        for images in _parts(len(batch[0]), owners, self.max_images, batch[0].device):
            some, whose = tuple(t[images] for t in batch), _numbered(owners, images)
            found, values, _ = clipped_sum(self.model, loss, some, self.privacy.max_grad_norm, self.method, whose)
            gradients = {p: gradients[p] + g if gradients else g for p, g in found.items()}
            losses[images] = values.to(losses.dtype)
        return gradients, losses

    def _privatise(self, summed):
        noise = self.random.normal(summed.shape).to(summed.device)
        scale = self.privacy.noise_multiplier * self.privacy.max_grad_norm
        noisy = noise.mul_(scale).add_(summed).div_(self.privacy.expected_batch_size)
        return noisy.float().to(summed.dtype)  # rounded also for weights of float64: see `randomness`

    def _self_test(self, loss, batch, owners):
        """Gradients must be autograd's, once; the loss must be a record's own, now and then.

        At steps 1, 2, 4, 8 ...: weights that begin at zero hide a mixture, and a loss may change. One record alone
        cannot show one: then the next batch is looked at too.
        """
        if self._alone_checked and self._gradients_checked and self.steps & (self.steps + 1):
            return
        some = _first_records(len(batch[0]), owners, min(TESTED, self.max_images or TESTED))
        batch, owners = tuple(t[some] for t in batch), _numbered(owners, some)
        draws = check_loss(self.model, loss, batch)
        if len(batch[0]) > 1:
            check_alone(self.model, loss, batch, self.method, draws, torch.Generator().manual_seed(self.steps))
            self._alone_checked = True
        comparable = not (draws and self.method == "vmap")  # vmap draws dropout masks in another order
        if comparable and not self._gradients_checked:
            ours, norms = _unclipped(self.model, loss, batch, self.method, owners)
            with torch.random.fork_rng(devices=_cuda(self.model)):
                check_gradients(self.model, loss, batch, ours, norms, owners)
        self._gradients_checked = True


# ---- refusals -------------------------------------------------------------------------------------------------------


def check_delta(delta, n):
    """Raises unless delta < 1 / n: above it, publishing one record in full would count as private."""
    if n and delta >= 1 / n:
        raise ValueError(f"delta {delta} is not below 1 / {n} records; choose a smaller one.")


def check_batch_size(batch_size, sample_rate, n):
    """Raises if the batch size that is meant is far from rate x records: then one of the three is a mistake."""
    if n and not 1 / CONTRADICTION <= batch_size / (sample_rate * n) <= CONTRADICTION:
        raise ValueError(
            f"A batch size of {batch_size:g} contradicts sample_rate {sample_rate:g} of {n} records, about "
            f"{sample_rate * n:.3g} a batch; the accountant counts with the rate: correct one of them."
        )


def refuse_layers(model, method):
    """Raises for what breaks clipping: layers that mix records or work in place, and weights of few digits."""
    if any(p.requires_grad and torch.finfo(p.dtype).bits < 32 for p in model.parameters()):
        raise ValueError("Weights below float32 round the clipped sum by more than a record may weigh; use float32.")
    for name, layer in model.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and (layer.training or not layer.track_running_stats):
            raise ValueError(
                f"The layer {name} is batch normalisation, which mixes records; use nn.GroupNorm, or freeze it with "
                "eval() if its statistics come from public data."
            )
        if layer.training and getattr(layer, "track_running_stats", False):
            raise ValueError(
                f"The layer {name} keeps running statistics of the batch without noise; freeze it with eval()."
            )
        if getattr(layer, "inplace", False) and method != "vmap":
            raise ValueError(
                f"The layer {name} works in place, on what the clipping reads; build it with inplace=False."
            )


def check_loss(model, loss, batch):
    """Raises unless the loss gives one number per image, takes no gradient itself and leaves every buffer alone.

    Says whether the loss draws random numbers.
    """
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    losses, took_gradient = _watched(model, loss, batch)
    if took_gradient:
        raise ValueError(PENALTY)
    if losses.shape != (len(batch[0]),):
        raise ValueError(f"The loss gives {tuple(losses.shape)}, not one number per image ({len(batch[0])},).")
    if not torch.isfinite(losses).all():
        raise ValueError("The loss of an image is not finite: lower lr or check the images.")
    changed = [name for name, buffer in model.named_buffers() if not torch.equal(before[name], buffer)]
    for name in changed:
        model.get_buffer(name).copy_(before[name])
    if changed:
        raise ValueError(f"The buffer {changed[0]} takes in the batch without noise; freeze its layer with eval().")
    with torch.no_grad(), torch.random.fork_rng(devices=_cuda(model)):
        torch.rand(1), torch.rand(1, device=batch[0].device)  # the same call from another place of the streams
        return not torch.allclose(losses, loss(model, *batch), rtol=1e-4, atol=1e-6)


def _watched(model, loss, batch):
    """The losses, and whether a gradient ran through the model before anyone asked for the losses' own."""
    fired = []

    def watch(layer, args, output):
        if isinstance(output, torch.Tensor) and output.requires_grad:
            output.register_hook(fired.append)

    handles = [layer.register_forward_hook(watch) for layer in model.modules()]
    try:
        with torch.random.fork_rng(devices=_cuda(model)):
            losses = loss(model, *batch)
    finally:
        for handle in handles:
            handle.remove()
    return losses, bool(fired)


def check_alone(model, loss, batch, method, draws, generator):
    """Raises if an image's loss, or the norm of its gradient, changes when others in its batch do.

    A random half of the batch stays and the other rows become copies of one of it; then the other way round. Equal
    shapes draw equal random numbers. A loss that `draws` none is also asked for each half by itself: it must not divide
    by the batch either.
    """
    n, device = len(batch[0]), batch[0].device
    stays = (torch.randperm(n, generator=generator) < n // 2).to(device)
    whole = _losses_and_norms(model, loss, batch, method)
    for kept in (stays, ~stays):
        filled = torch.where(kept, torch.arange(n, device=device), kept.nonzero()[0])
        part = _losses_and_norms(model, loss, tuple(t[filled] for t in batch), method)
        found = [p[kept] for p in part]
        others = [] if draws else _losses_and_norms(model, loss, tuple(t[kept] for t in batch), method)
        for before, after in [*zip(whole, found), *zip(whole, others)]:
            allowed = SELF_TEST_TOLERANCE * before.abs() + 1e-5 * before.abs().max() + 1e-9
            if not ((before[kept] - after).abs() <= allowed[kept]).all():
                raise RuntimeError("This model mixes records: a record's loss depends on the others in its batch.")


def _losses_and_norms(model, loss, batch, method):
    with torch.random.fork_rng(devices=_cuda(model)):
        if method == "vmap":  # under it gradients cannot mix; a model that means to mix is still told so
            with torch.no_grad():
                return (loss(model, *batch).double(),)
        _, losses, norms = clipped_sum(model, loss, batch, math.inf, method)
    return losses.double(), norms


def _unclipped(model, loss, batch, method, owners):
    """The sum of gradients (parameter -> tensor) and the records' norms (R,)."""
    with torch.random.fork_rng(devices=_cuda(model)):
        gradients, _, norms = clipped_sum(model, loss, batch, math.inf, method, owners)
    return gradients, norms


def check_gradients(model, loss, batch, ours, norms, owners=None):
    """Raises unless the unclipped sum `ours` (parameter -> tensor) and the `norms` (R,) of records equal autograd's.

    The norms of the first and the last record are recomputed from their losses alone: a model that gives a row to the
    wrong record has the right sum and wrong norms, and clipping by those would bound nothing.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    losses = loss(model, *batch)
    owners = torch.arange(len(losses), device=losses.device) if owners is None else owners
    gradient = lambda value: torch.autograd.grad(value, trained.values(), retain_graph=True)  # noqa: E731
    summed = dict(zip(trained, gradient(losses.sum())))
    whole = torch.stack([g.norm() for g in summed.values()]).norm()
    for name, p in trained.items():
        # A bias before a normalisation has gradient 0 but for rounding, which scales with the whole gradient.
        allowed = SELF_TEST_TOLERANCE * summed[name].norm() + 1e-5 * whole
        if not (summed[name] - ours[p]).norm() <= allowed:
            raise RuntimeError(f"Per-record gradients of {name} are wrong for this model; use method='vmap'.")
    for i in {0, len(norms) - 1}:
        norm = torch.stack([g.norm() for g in gradient(losses[owners == i].sum())]).norm()
        if not (norm - norms[i]).abs() <= SELF_TEST_TOLERANCE * norm + 1e-5 * whole:
            raise RuntimeError("This model mixes records: a record's gradient alone is another than in its batch.")


def _length(data):
    """How many images there are; a loader is refused, since the engine draws the batches itself."""
    if isinstance(data, DataLoader):
        raise ValueError(
            f"Give the data set, not a loader{_how_it_draws(data)}: epsilon is accounted for batches that batches() "
            "draws, each record on its own with the sampling rate."
        )
    if not hasattr(data, "__len__"):
        raise ValueError("The data set must have a length: the chance of each record to be drawn rests on it.")
    return len(data)


def _how_it_draws(loader):
    if loader.drop_last:
        return " with drop_last"
    return " that shuffles" if isinstance(loader.sampler, RandomSampler) else ""


def _subject_numbers(data, subjects):
    """Subjects (N,) of any kind as numbers from 0."""
    subjects = getattr(data, "subjects", None) if subjects is None else subjects
    if subjects is None:
        raise ValueError("Records are subjects: give `subjects`, which says whose each image is.")
    numbers = torch.as_tensor(np.unique(np.asarray(subjects), return_inverse=True)[1])
    if len(numbers) != _length(data):
        raise ValueError(f"There are {len(numbers)} subjects for {_length(data)} images; give one per image.")
    return numbers


def _check_optimizer(model, optimizer):
    known = {id(p) for p in model.parameters()}
    if any(id(p) not in known for group in optimizer.param_groups for p in group["params"]):
        raise ValueError("The optimizer holds a weight that is not the model's: its gradient would carry no noise.")


def _parts(n, owners, most, device):
    """Indices of at most `most` images that together hold each once, a record never split."""
    if most is None or n <= most:
        return [slice(None)]
    if owners is None:
        return torch.arange(n, device=device).split(most)
    parts = [[]]
    for record in range(int(owners.max()) + 1):
        images = (owners == record).nonzero().flatten()
        if len(images) > most:
            raise ValueError(f"A subject has {len(images)} images in a batch, more than max_images {most}; raise it.")
        if sum(map(len, parts[-1])) + len(images) > most:
            parts.append([])
        parts[-1].append(images)
    return [torch.cat(part) for part in parts]


def _first_records(n, owners, most):
    """Indices of about `most` images, whole records, at least one."""
    if owners is None:
        return slice(0, most)
    fitting = (torch.bincount(owners).cumsum(0) <= most).sum()
    return (owners < max(1, int(fitting))).nonzero().flatten()


def _numbered(owners, images):
    """The owners of some images, numbered from 0 without a gap."""
    return None if owners is None else torch.unique(owners[images], return_inverse=True)[1]


def _laid_out_as(p, noisy):
    """The gradient in the strides of its weight: fused Adam reads others wrongly."""
    return noisy if noisy.stride() == p.stride() else torch.empty_like(p).copy_(noisy)


def _trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def _cuda(model):
    device = next(model.parameters()).device
    return [device] if device.type == "cuda" else []
