"""Training StyleGAN2-ADA: non-saturating loss, lazy R1 and path length, style mixing, EMA, adaptive augmentation.

Papers: Karras et al. 2020 (CVPR) and 2020 (NeurIPS) for the loop and its `auto` settings; Carrasco Limeros et al. 2022,
Sec. 3.1, which trains one GAN per class and conditional ones, with and without changes of colour. Chapter:
stylegan2_dermatology. Regularisers act every few iterations with their gradients scaled up, and Adam's settings follow.
"""

import contextlib
import copy
import dataclasses
import json
import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from lookalike.data import datasets
from lookalike.files import write_json
from lookalike.models.augment import PIPELINES, Strength, augment
from lookalike.models.stylegan2 import Discriminator, Generator
from lookalike.privacy.randomness import stream
from lookalike.training.cells import load_samples
from lookalike.training.checkpoint import Checkpoint, load_weights, save_weights

PATH_DECAY, PATH_SHRINK = 0.01, 2  # of the running mean path length; batch / 2 images measure it
SAMPLING_BATCH = 100
CHECKPOINTS = 20


@dataclasses.dataclass(frozen=True)
class LesionSettings:
    """How StyleGAN2-ADA is trained; `auto` gives the paper's for a resolution.

    r1_gamma weighs the gradient penalty (None: 0.0002 S^2 / batch_size), ema_kimg is the half-life of the averaged
    generator in thousands of images (None: batch_size * 10 / 32), at most ema_rampup of the images seen. augment:
    "none", "bg", "bgc"; ada_target, ada_kimg and ada_interval move its strength, unless fixed_p holds it."""

    batch_size: int = 32
    lr: float = 0.0025
    r1_gamma: float | None = None
    ema_kimg: float | None = None
    ema_rampup: float = 0.05
    augment: str = "bg"
    ada_target: float = 0.6
    ada_kimg: float = 500
    ada_interval: int = 4
    fixed_p: float | None = None
    path_weight: float = 2.0
    path_interval: int = 4
    r1_interval: int = 16
    style_mixing: float = 0.9

    def __post_init__(self):
        if self.augment not in PIPELINES:
            raise ValueError(f"augment must be one of {', '.join(PIPELINES)}, not {self.augment!r}.")
        if self.batch_size < 2 or self.batch_size % PATH_SHRINK:
            raise ValueError(f"batch_size must be even and 2 or more, not {self.batch_size}.")


def auto(image_size, gpus=1):
    """The `auto` settings of Karras et al. 2020 (NeurIPS) for a resolution and a number of GPUs (sheet 3.2)."""
    batch = max(min(gpus * min(4096 // image_size, 32), 64), gpus)
    lr = 0.002 if image_size >= 1024 else 0.0025
    gamma = 0.0002 * image_size**2 / batch
    return LesionSettings(batch_size=batch, lr=lr, r1_gamma=gamma, ema_kimg=batch * 10 / 32)


class LesionTraining:
    """A training that can be run on, stopped and, by a federation, exchanged.

    images (N, C, S, S) in [-1, 1] and labels (N,); an unconditional generator reads no labels. `random`: a generator on
    the CPU for batches, labels and latents; noise maps and augmentation draw from torch's global stream. `accelerator`:
    of Accelerate, where several processes train one network: each runs its share of the batch on images that it draws
    itself (its `random` must differ), gradients, path lengths and signs are shared.
    Attributes: generator, discriminator, ema (the averaged generator), optimizers, augment_p, path_mean, images_seen.
    """

    def __init__(
        self, generator, discriminator, images, labels, settings, generator_ema=None, random=None, accelerator=None
    ):  # fmt: skip
        processes = accelerator.num_processes if accelerator else 1
        if settings.batch_size % processes:
            raise ValueError(f"{processes} processes cannot share a batch of {settings.batch_size} evenly.")
        if len(images) < settings.batch_size:
            raise ValueError(f"{len(images)} images are fewer than a batch of {settings.batch_size}.")
        self.generator, self.discriminator, self.settings = generator.train(), discriminator.train(), settings
        self.ema = generator_ema if generator_ema is not None else _copy(generator)
        self.images, self.labels = images, labels
        self.random = random or torch.Generator().manual_seed(0)
        self.accelerator, self.images_seen, self.iterations = accelerator, 0, 0
        self.losses = {"generator": [], "discriminator": [], "sign": [], "p": []}
        self._order = torch.zeros(0, dtype=torch.long)
        self.reset_state()

    def reset_state(self):
        """Fresh Adam, augmentation at 0 and path length at 0; weights and images_seen stay."""
        s = self.settings
        self.optimizers = {
            name: lazy_adam(net.parameters(), s.lr, interval)
            for name, net, interval in (
                ("generator", self.generator, s.path_interval),
                ("discriminator", self.discriminator, s.r1_interval),
            )
        }
        self.strength = Strength(s.ada_target, s.ada_kimg, s.fixed_p)
        self.path_mean = torch.zeros((), device=self.images.device)

    @property
    def augment_p(self):
        """The probability of each transform now."""
        return self.strength.p

    def run(self, iterations):
        """So many further iterations: both networks' losses, and every few times their regularisers."""
        for _ in range(iterations):
            self._generator_step()
            if self.iterations % self.settings.path_interval == 0:
                self._path_step()
            self._discriminator_step()
            if self.iterations % self.settings.r1_interval == 0:
                self._r1_step()
            self.images_seen += self.settings.batch_size
            self._average()
            self.iterations += 1
            if self.settings.augment != "none" and self.iterations % self.settings.ada_interval == 0:
                self.losses["sign"].append(self.strength.adapt())
                self.losses["p"].append(self.strength.p)

    # --- the four steps ---

    def _generator_step(self):
        with _frozen(self.discriminator):
            made, wanted = self._make(self._share)
            loss = F.softplus(-self._judge(made, wanted)).mean()
            self._step("generator", loss)
        self.losses["generator"].append(float(loss.detach()))

    def _path_step(self):
        z, wanted = self._latents(max(1, self._share // PATH_SHRINK))
        lengths = path_lengths(self.generator, self._mixed(z, wanted))
        self.path_mean = self.path_mean.lerp(self._shared(lengths.detach().mean()), PATH_DECAY)
        loss = (lengths - self.path_mean).square().mean()
        self._step("generator", loss * self.settings.path_weight * self.settings.path_interval)

    def _discriminator_step(self):
        with torch.no_grad():
            made, wanted = self._make(self._share)
        on_made = self._judge(made, wanted)
        images, labels = self._real(self._share)
        on_real = self._judge(images, labels)
        self.strength.seen(self.accelerator.gather(on_real.detach()) if self.accelerator else on_real)
        loss = F.softplus(on_made).mean() + F.softplus(-on_real).mean()
        self._step("discriminator", loss)
        self.losses["discriminator"].append(float(loss.detach()))

    def _r1_step(self):
        images, labels = self._real(self._share)
        penalty = r1_penalty(lambda x: self._judge(x, labels), images).mean()
        self._step("discriminator", penalty * (self._gamma / 2 * self.settings.r1_interval))

    # --- their parts ---

    @property
    def _share(self):
        """Images of a batch that this process sees."""
        return self.settings.batch_size // (self.accelerator.num_processes if self.accelerator else 1)

    @property
    def _gamma(self):
        gamma, side = self.settings.r1_gamma, self.images.shape[-1]
        return 0.0002 * side**2 / self.settings.batch_size if gamma is None else gamma

    def _latents(self, n):
        """z, and labels as often as the data have them; None for an unconditional generator."""
        z = self.generator.noise(n, self.random)
        if not self.generator.num_classes:
            return z, None
        rows = torch.randint(len(self.labels), (n,), generator=self.random)
        return z, self.labels[rows.to(self.labels.device)]

    def _mixed(self, z, wanted):
        """w (n, num_ws, W): with a probability, the layers from some cut on take another latent's."""
        ws = self.generator.map(z, wanted)[:, None].repeat(1, self.generator.num_ws, 1)
        if float(torch.rand((), generator=self.random)) < self.settings.style_mixing:
            cut = int(torch.randint(1, self.generator.num_ws, (), generator=self.random))
            other = self.generator.mapping(self.generator.noise(len(z), self.random), wanted)
            ws = torch.cat([ws[:, :cut], other[:, None].expand(-1, self.generator.num_ws - cut, -1)], 1)
        return ws

    def _make(self, n):
        z, wanted = self._latents(n)
        return self.generator.synthesise(self._mixed(z, wanted)), wanted

    def _judge(self, images, labels):
        seen = augment(images, self.strength.p, self.settings.augment)
        return self.discriminator(seen, labels if self.discriminator.num_classes else None)

    def _real(self, n):
        """Real images and labels, each once before any comes again."""
        if len(self._order) < n:
            self._order = torch.randperm(len(self.images), generator=self.random)
        rows, self._order = self._order[:n].to(self.images.device), self._order[n:]
        return self.images[rows], self.labels[rows]

    def _step(self, name, loss):
        optimizer = self.optimizers[name]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for weight in (w for group in optimizer.param_groups for w in group["params"] if w.grad is not None):
            weight.grad = self._shared(weight.grad)
            torch.nan_to_num(weight.grad, nan=0.0, posinf=1e5, neginf=-1e5, out=weight.grad)
        optimizer.step()

    def _shared(self, value):
        """A tensor's mean over the processes."""
        return self.accelerator.reduce(value, "mean") if self.accelerator else value

    @torch.no_grad()
    def _average(self):
        s = self.settings
        half_life = (s.batch_size * 10 / 32 if s.ema_kimg is None else s.ema_kimg) * 1000
        half_life = min(half_life, s.ema_rampup * self.images_seen) if s.ema_rampup else half_life
        beta = 0.5 ** (s.batch_size / max(half_life, 1e-8))
        weights, own = list(self.ema.parameters()), list(self.generator.parameters())
        torch._foreach_lerp_(weights, own, 1 - beta)
        for mine, theirs in zip(self.ema.buffers(), self.generator.buffers()):
            mine.copy_(theirs)

    # --- to disk and back ---

    def save(self, checkpoint):
        """Everything that going on needs; the losses so far too."""
        state = {
            "images_seen": self.images_seen, "iterations": self.iterations, "losses": self.losses,
            "strength": self.strength.state(), "path_mean": self.path_mean, "order": self._order,
        }  # fmt: skip
        checkpoint.save(self._modules(), self.optimizers, {"random": self.random}, state)

    def restore(self, checkpoint):
        """Goes on from a checkpoint, if there is one."""
        state = checkpoint.load(self._modules(), self.optimizers, {"random": self.random})
        if state:
            self.images_seen, self.iterations, self.losses = (state[k] for k in ("images_seen", "iterations", "losses"))
            self.strength.restore(state["strength"])
            self.path_mean, self._order = state["path_mean"].to(self.images.device), state["order"]

    def _modules(self):
        return {"generator": self.generator, "discriminator": self.discriminator, "ema": self.ema}


def lazy_adam(weights, lr, interval):
    """Adam (0, 0.99) for losses whose regulariser comes once in `interval` steps: lr and betas to the power of
    interval / (interval + 1) (Karras et al. 2020, CVPR, appendix B).
    """
    ratio = interval / (interval + 1)
    return torch.optim.Adam(weights, lr * ratio, (0.0, 0.99**ratio), eps=1e-8, fused=True)


def r1_penalty(judge, images):
    """Squared length of each logit's gradient in its image, (N,): in the plain image, though `judge` augments it."""
    images = images.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(judge(images).sum(), images, create_graph=True)
    return gradient.square().sum((1, 2, 3))


def path_lengths(generator, ws):
    """How far images move per step in w, (N,): the root of the mean over layers of |J^T y|^2, y standard normal over
    the root of the number of pixels (Karras et al. 2020, CVPR, Sec. 3.2).
    """
    images = generator.synthesise(ws)
    directions = torch.randn_like(images) / math.sqrt(images.shape[2] * images.shape[3])
    (gradient,) = torch.autograd.grad((images * directions).sum(), ws, create_graph=True)
    return gradient.square().sum(2).mean(1).sqrt()


# --- stages -------------------------------------------------------------------------------------------------


def train_lesions(
    folder, *, data, image_size, kimg, seed, samples, only=None, split="train", rows=None, augment="bg",
    batch_size=None, base=16384, max_channels=512, w_dim=512, mapping_layers=2, truncation=1.0, half=False,
    settings=None,
):  # fmt: skip
    """A stage: StyleGAN2-ADA on a split of `data`, or on its `rows`, for `kimg` thousand images, and `samples` images.

    only: the class that alone is trained on, by an unconditional generator (ben-GAN and mal-GAN); None: a conditional
    one. batch_size None, and everything else of the loop: `auto` for the resolution, changed by `settings`. half: the
    four highest resolutions in bfloat16. Samples have the classes' shares in the data. Writes networks.json,
    weights.safetensors (the averaged generator), discriminator.safetensors and samples.safetensors to `folder`.
    """
    accelerator = _processes()
    device = accelerator.device if accelerator else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rank = accelerator.process_index if accelerator else 0
    images = chosen_images(data, split, image_size, only, rows)
    how = settings_for(image_size, batch_size, augment, settings)
    shape = {"image_size": images.images.shape[-1], "channels": images.images.shape[1]}
    shape |= {"num_classes": 0 if only is not None else len(images.classes), "base": base, "max_channels": max_channels}
    own = {"w_dim": w_dim, "latent_dim": w_dim, "mapping_layers": mapping_layers}
    precision = {"half": torch.bfloat16 if half else None}
    torch.manual_seed(seed)
    nets = Generator(**shape, **own, **precision).to(device), Discriminator(**shape, **precision).to(device)
    labels = torch.as_tensor(images.labels).to(device)
    if rank:
        torch.manual_seed(seed + rank)
    training = LesionTraining(
        *nets, datasets.as_tensor(images).to(device), labels, how,
        random=stream(seed, f"training {rank}" if rank else "training"), accelerator=accelerator,
    )  # fmt: skip
    iterations = math.ceil(kimg * 1000 / how.batch_size)
    train_on(training, iterations, Checkpoint(folder / "checkpoint"))
    if not rank:
        write_json(folder / "networks.json", {"shape": shape, "generator": own})
        save_weights(folder / "weights.safetensors", training.ema)
        save_weights(folder / "discriminator.safetensors", training.discriminator)
        save_file(draw_lesions(training.ema, labels, samples, seed, truncation), folder / "samples.safetensors")
    return {
        "images": len(images), "iterations": iterations, "images_seen": training.images_seen, "p": training.augment_p,
        "path_mean": float(training.path_mean), "settings": dataclasses.asdict(how),
        "weights": [sum(w.numel() for w in net.parameters()) for net in nets],
        "history": {name: _thinned(values) for name, values in training.losses.items()},
    }  # fmt: skip


def train_on(training, iterations, checkpoint=None):
    """Runs up to `iterations` in all, and saves some twenty times on the way; a killed training goes on.

    Of several processes the first one saves. Going on, the others draw anew, or all would draw what it draws.
    """
    rank = training.accelerator.process_index if training.accelerator else 0
    if checkpoint:
        training.restore(checkpoint)
        if rank:
            torch.manual_seed(torch.initial_seed() + training.iterations)
            training.random = stream(rank, f"from {training.iterations}")
    part = max(1, math.ceil(iterations / CHECKPOINTS))
    while training.iterations < iterations:
        training.run(min(part, iterations - training.iterations))
        if checkpoint and not rank:
            training.save(checkpoint)


def chosen_images(data, split, image_size, only=None, rows=None):
    """A split of a set, its `rows` alone, and of these those of class `only`."""
    images = datasets.load(data, split, image_size)
    images = images if rows is None else images.subset(rows)
    if only is None:
        return images
    kept = (images.labels == only).nonzero()[0]
    if not len(kept):
        raise ValueError(f"{data} has no image of class {only} to train on.")
    return images.subset(kept)


def load_networks(folder):
    """The averaged generator and the discriminator that a training left in `folder`, on the CPU, in evaluation mode."""
    found = json.loads((Path(folder) / "networks.json").read_text("utf-8"))
    nets = Generator(**found["shape"], **found["generator"]), Discriminator(**found["shape"])
    for net, name in zip(nets, ("weights", "discriminator")):
        load_weights(Path(folder) / f"{name}.safetensors", net)
    return tuple(net.eval() for net in nets)


def draw_lesions(generator_net, labels, samples, seed, truncation=1.0):
    """Images uint8 (samples, C, S, S) with labels drawn from `labels` (N,), the shares of the data, from a seed."""
    random = stream(seed, "samples")
    wanted = labels.cpu()[torch.randint(len(labels), (samples,), generator=random)]
    parts = [generator_net.sample(part, random, truncation).cpu() for part in wanted.split(SAMPLING_BATCH)]
    images = torch.cat(parts).contiguous()
    if not torch.isfinite(images).all():
        raise ValueError("The generator's images are not finite: its training diverged; lower lr or raise r1_gamma.")
    return {"images": torch.as_tensor(datasets.to_uint8(images)), "labels": wanted}


def draw_balanced(folder, *, trained, per_class, seed, truncation=1.0):
    """A stage: `per_class` images of each class from the GANs in the folders `trained`, in samples.safetensors.

    One folder of a conditional GAN, or one per class, whose only label its own samples tell.
    """
    parts = []
    for i, place in enumerate(trained):
        made = load_networks(place)[0]
        own = load_samples(place)[1]
        classes = range(made.num_classes) if made.num_classes else [int(own[0])]
        parts += [draw_lesions(made, torch.tensor([k]), per_class, seed + i, truncation) for k in classes]
    save_file({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, folder / "samples.safetensors")
    return {"images": sum(len(part["labels"]) for part in parts)}


def settings_for(image_size, batch_size, augment, changed):
    how = dataclasses.replace(auto(image_size), augment=augment)
    if batch_size is not None:
        how = dataclasses.replace(how, batch_size=batch_size, r1_gamma=None, ema_kimg=None)
    return dataclasses.replace(how, **(changed or {}))


def _processes():
    """Accelerate's view of the processes, if there are several; None for one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    from accelerate import Accelerator  # seconds to import

    return Accelerator()


def _copy(net):
    return copy.deepcopy(net).eval().requires_grad_(False)


@contextlib.contextmanager
def _frozen(net):
    """Weights that gather no gradient for a while."""
    net.requires_grad_(False)
    try:
        yield
    finally:
        net.requires_grad_(True)


def _thinned(values, points=200):
    """At most so many means of neighbouring values."""
    if not values:
        return []
    size = math.ceil(len(values) / points)
    return [sum(part) / len(part) for part in (values[i : i + size] for i in range(0, len(values), size))]
