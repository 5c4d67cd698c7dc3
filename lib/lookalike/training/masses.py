"""Training MCGAN, plain as published or with a private discriminator, and drawing the set that is to be released.

Paper: Osuala et al. 2024 (arXiv 2407.12669), Sec. 2, and the authors' `gan_config.py`, `base_gan_model.py`. Chapter:
mcgan_dp. The published generator learns from the very images that its discriminator has just been shown. Under DP-SGD
it may not, for there are as many of them as of private images in the batch: it makes its own, of a public number. Made
labels are uniform in both; the classes are public, who is in the batch is not.
"""

import math

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lookalike.data import datasets
from lookalike.models.mcgan import Discriminator, Generator, discriminator_loss, draw_targets, generator_loss
from lookalike.privacy.dpsgd import Privacy
from lookalike.privacy.randomness import stream
from lookalike.training.cells import draw_samples
from lookalike.training.checkpoint import Checkpoint, save_weights
from lookalike.training.likelihood import due, keep, mean_loss, report, resume, start_private

BETAS = (0.5, 0.999)
CROP_AREA = (0.9, 1.0)  # differs: the paper's 0.9 to 1.1 leaves the image; its code has 0.95 to 1.0
CROP_RATIO = (0.95, 1.1)  # width over height


def train_mcgan(
    generator_net, discriminator, images, labels, *, epochs, lr=1e-4, batch_size=16, d_per_g=1, smoothing=True,
    augmented=True, ema_decay=0.0, privacy=None, subjects=None, generator=None, checkpoint=None,
):  # fmt: skip
    """Adam on images (N, C, S, S) in [-1, 1] and labels (N,); `privacy` makes the discriminator's steps DP-SGD.

    An epoch is floor(N / batch_size) steps (a last, smaller batch is dropped, as published), under `privacy`
    1 / sample_rate. The generator takes one step per `d_per_g` of the discriminator's (the paper: 1; its code: 2).
    `smoothing`: targets of real images are U(0.7, 1.2). `augmented`: flips and crops, see `augment`. `ema_decay`: the
    network to sample from is the exponential mean of the generator over its steps; 0 is the generator itself.
    Returns the report of `likelihood.train` with "generator_steps", and the network to sample from.
    """
    generator = generator or torch.Generator().manual_seed(0)
    if not d_per_g >= 1:
        raise ValueError(f"d_per_g must be 1 or more discriminator steps per generator step, not {d_per_g}.")
    if privacy and any(isinstance(layer, torch.nn.BatchNorm2d) for layer in generator_net.modules()):
        raise ValueError(
            "A private training needs a generator without batch norm, whose statistics follow the private "
            "batch's size: build it with norm='group'."
        )
    averaged = AveragedModel(generator_net, multi_avg_fn=get_ema_multi_avg_fn(ema_decay), use_buffers=True)
    modules = {"generator": generator_net, "discriminator": discriminator, "averaged": averaged}
    adam = {name: torch.optim.Adam(modules[name].parameters(), lr, BETAS, fused=True) for name in list(modules)[:2]}
    private = start_private(discriminator, adam["discriminator"], privacy, images, subjects, generator, batch_size)
    public = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))
    streams = {"batches": generator, "public": public}
    state = {"discriminator_steps": 0, "generator_steps": 0} | resume(checkpoint, modules, adam, streams, private)
    generator_net.train(), discriminator.train()
    for epoch in range(state["epoch"], epochs):
        losses = []
        for rows in _batches(len(images), batch_size, private, generator):
            batch, fake = _meet(generator_net, images[rows], labels[rows], augmented, smoothing, generator)
            if private:
                losses.append(private.step(discriminator_loss, *batch))
                fake = None
            else:
                losses.append(_plain_step(discriminator, adam["discriminator"], batch))
            state["discriminator_steps"] += 1
            if state["discriminator_steps"] % d_per_g == 0:
                fake = fake or _make(generator_net, round(privacy.expected_batch_size), public)
                _generator_step(discriminator, adam["generator"], *fake)
                averaged.update_parameters(generator_net)
                state["generator_steps"] += 1
        state["loss"].append(mean_loss(losses))
        state["epoch"] = epoch + 1
        if due(epoch + 1, epochs):
            keep(checkpoint, modules, adam, streams, private, state)
    return report(state, private), averaged.module


def augment(images, generator=None):
    """Each of images (N, C, S, S) flipped either way with a chance of one half, cropped and resized to S.

    The crop has 0.9 to 1 of the area and a width of 0.95 to 1.1 of its height (in logarithm uniform), as
    torchvision's RandomResizedCrop, but sides that leave the image are cut to it instead of drawn again.
    """
    n, uniform = len(images), lambda low, high: low + (high - low) * torch.rand(len(images), generator=generator)
    area, ratio = uniform(*CROP_AREA), uniform(*map(math.log, CROP_RATIO)).exp()
    sides = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], 1).clamp(max=1.0)
    centre = (1 - sides) * torch.stack([uniform(-1, 1), uniform(-1, 1)], 1)
    flips = 1 - 2 * torch.randint(2, (n, 2), generator=generator)
    theta = torch.cat([torch.diag_embed(sides * flips), centre[:, :, None]], 2).to(images.device)
    grid = F.affine_grid(theta, images.shape, align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def train_masses(
    folder, *, data, image_size, width, epochs, seed, samples, norm="batch", upsampling="transposed", lr=1e-4,
    batch_size=16, d_per_g=1, smoothing=True, augmented=True, ema_decay=0.0, epsilon=None, delta=1e-4, records="images",
):  # fmt: skip
    """A stage: MCGAN on the train split of `data`, and a set of `samples` images, half of them of each class.

    epsilon None: no privacy. Else the noise is such that all epochs spend it, for an image or, with records "subjects",
    for a patient with all images; the batch is then expected to hold `batch_size` images, or the patients' share of it.
    Writes weights.safetensors and samples.safetensors (uint8 images (N, C, S, S), labels) to `folder`.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    images = datasets.load(data, "train", image_size)
    shape = {"channels": images.images.shape[1], "num_classes": len(images.classes), "width": width, "norm": norm}
    nets = Generator(image_size, **shape, upsampling=upsampling), Discriminator(image_size, **shape)
    privacy = None if epsilon is None else specify(epsilon, images, epochs, batch_size, delta, records)
    found, sampler = train_mcgan(
        *(net.to(device) for net in nets), datasets.as_tensor(images).to(device),
        torch.as_tensor(images.labels).to(device), epochs=epochs, lr=lr, batch_size=batch_size, d_per_g=d_per_g,
        smoothing=smoothing, augmented=augmented, ema_decay=ema_decay, privacy=privacy,
        subjects=images.subjects if records == "subjects" else None, generator=stream(seed, "training"),
        checkpoint=Checkpoint(folder / "checkpoint"),
    )  # fmt: skip
    save_weights(folder / "weights.safetensors", sampler)
    made = draw_samples(sampler, shape["num_classes"], samples // shape["num_classes"], seed, device)
    save_file(made, folder / "samples.safetensors")
    return found | {"images": len(images), "weights": [sum(p.numel() for p in net.parameters()) for net in nets]}


def specify(epsilon, images, epochs, batch_size, delta, records="images"):
    """The `Privacy` that spends `epsilon` in so many epochs on an ImageSet whose size and patients are public."""
    rate = 1 / round(len(images) / batch_size)
    count = len(images) if records == "images" else len(set(images.subjects))
    settings = {"expected_batch_size": rate * count, "records": records}
    return Privacy.for_epsilon(epsilon, rate, epochs * round(1 / rate), delta, **settings)


def _batches(n, batch_size, private, generator):
    if private:
        return private.batches(round(1 / private.privacy.sample_rate))
    return torch.randperm(n, generator=generator)[: n // batch_size * batch_size].split(batch_size)


def _meet(generator_net, real, labels, augmented, smoothing, generator):
    """What the discriminator's loss takes of a batch, and the made images (with their graph) and labels."""
    fake, made_labels = _make(generator_net, len(real), generator)
    targets = draw_targets(len(real), generator) if smoothing else torch.ones(len(real))
    real = augment(real, generator) if augmented and len(real) else real
    return (real, fake.detach(), labels, made_labels, targets.to(real.device)), (fake, made_labels)


def _make(generator_net, n, generator):
    z = generator_net.noise(n, generator)
    labels = torch.randint(generator_net.num_classes, (n,), generator=generator).to(z.device)
    return generator_net(z, labels), labels


def _plain_step(discriminator, optimizer, batch):
    losses = discriminator_loss(discriminator, *batch)
    optimizer.zero_grad(set_to_none=True)
    losses.mean().backward()
    optimizer.step()
    return losses.detach()


def _generator_step(discriminator, optimizer, fake, labels):
    """The discriminator's weights gather no gradient."""
    weights = [p.requires_grad_(False) for p in discriminator.parameters()]
    losses = generator_loss(discriminator, fake, labels)
    for p in weights:
        p.requires_grad_(True)
    optimizer.zero_grad(set_to_none=True)
    losses.mean().backward()
    optimizer.step()
