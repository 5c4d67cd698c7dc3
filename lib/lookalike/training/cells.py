"""One cell of a grid: a data set, a family, a noise level, a seed and a role; trained, sampled, audited.

Paper: Arroyo Galende et al. 2026, "No Free Lunch ...", Sec. 4.2.1. Chapter: no_free_lunch. The functions are stages of
a run: they take a folder and plain settings, resume after a kill, and give back plain numbers.
"""

import inspect
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from lookalike.data import datasets
from lookalike.models.ddpm import ConditionalDDPM, ddpm_loss, draw_diffusion
from lookalike.models.gan import Discriminator, Generator, discriminator_loss
from lookalike.models.vae import ConditionalVAE, vae_loss
from lookalike.privacy import audit
from lookalike.privacy.dpsgd import Privacy
from lookalike.privacy.randomness import stream
from lookalike.training.adversarial import train_gan
from lookalike.training.checkpoint import Checkpoint, load_weights, save_weights
from lookalike.training.likelihood import train_ddpm, train_vae

FAMILIES = ("vae", "gan", "ddpm")
ROLES = ("full", "ablated", "victim")
SAMPLING_BATCH = 250


def select_role(image_set, role, images_per_class, query_class, draw=0, seed=0):
    """The paper's three training sets: the FIRST images of each class; no query class; that plus one query image, last.

    `draw` d takes the d-th images_per_class images of each class instead of the first: other data of the same kind.
    "coin" is for audits: of twice as many images, each is in by a coin of its own (see `coins`).
    """
    if not 0 <= query_class < len(image_set.classes):
        raise ValueError(f"query_class must be 0 to {len(image_set.classes) - 1}, not {query_class}.")
    if role not in (*ROLES, "coin"):
        raise ValueError(f"role must be one of {', '.join(ROLES)} or coin, not {role!r}.")
    if role == "coin":
        candidates, included = coins(image_set, images_per_class, seed)
        return candidates.subset(included)
    classes = range(len(image_set.classes))
    rows = {c: first_of(image_set, c, (draw + 1) * images_per_class)[-images_per_class:] for c in classes}
    if role == "full":
        return image_set.subset(np.concatenate(list(rows.values())))
    query = rows.pop(query_class)[:1]
    others = np.concatenate(list(rows.values()))
    return image_set.subset(others if role == "ablated" else np.append(others, query))


def coins(image_set, images_per_class, seed):
    """The first 2 x images_per_class images of each class as candidates, and a fair coin for each: bool (N,)."""
    candidates = image_set.first_per_class(2 * images_per_class)
    fair = torch.rand(len(candidates), generator=stream(seed, "coins")) < 0.5
    return candidates, fair.numpy()


def first_of(image_set, label, k):
    """Indices of the first k images of one class, in stored order."""
    found = np.flatnonzero(image_set.labels == label)
    if len(found) < k:
        raise ValueError(f"{image_set.name} has {len(found)} images of class {image_set.classes[label]}, not {k}.")
    return found[:k]


def build(family, num_classes, width, channels=1, **ddpm):
    """The networks of a family by name: {"model": ...}, for the GAN {"model": generator, "discriminator": ...}."""
    if family == "vae":
        return {"model": ConditionalVAE(channels=channels, num_classes=num_classes, width=width)}
    if family == "gan":
        generator = Generator(channels=channels, num_classes=num_classes, width=width)
        return {"model": generator, "discriminator": Discriminator(channels, num_classes, width)}
    if family == "ddpm":
        return {"model": ConditionalDDPM(channels=channels, num_classes=num_classes, width=width, **ddpm)}
    raise ValueError(f"family must be one of {', '.join(FAMILIES)}, not {family!r}.")


def specify_privacy(sigma, num_images, batch_size, max_grad_norm=1.0, most=None):
    """The paper's DP-SGD for a training set whose PUBLIC size is `num_images`; None for sigma 0.

    q = 1 / ceil(N / batch_size); delta = 1 / (N + 1), just below 1 / N (differs: the authors' VAE took 1 / batches,
    0.5). Where coins decide who is in, `most` is how many there can be, and delta follows that.
    """
    if sigma == 0:
        return None
    rate = 1 / -(-num_images // batch_size)
    return Privacy(sigma, rate, rate * num_images, 1 / ((most or num_images) + 1), max_grad_norm)


def train_cell(
    folder, *, data, family, sigma, seed, role, width, epochs, images_per_class, query_class, samples_per_class,
    batch_size=64, lr=1e-4, timesteps=400, sampler="ancestral", sampling_steps=20, generator_every=10,
    gan_as_published=False, draw=0,
):  # fmt: skip
    """Trains one model on one role's images and draws `samples_per_class` images of every class from it.

    Writes weights.safetensors and samples.safetensors (uint8) to `folder`; returns the training's report (see
    `likelihood.train`) with the number of training images. Seeded per cell: all roles start from the same weights.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    whole = datasets.load(data, "train")
    images = select_role(whole, role, images_per_class, query_class, draw, seed)
    num_classes, channels = len(whole.classes), images.images.shape[1]
    public_size = images_per_class * num_classes
    batch_size = min(batch_size, public_size)
    ddpm = {"timesteps": timesteps, "sampler": sampler, "sampling_steps": sampling_steps} if family == "ddpm" else {}
    nets = {name: net.to(device) for name, net in build(family, num_classes, width, channels, **ddpm).items()}
    settings = {
        "epochs": epochs, "lr": lr, "batch_size": batch_size, "checkpoint": Checkpoint(folder / "checkpoint"),
        "generator": stream(seed, "training"),
        # One public size for all roles: had each role its own, the normaliser would tell victim from ablated.
        "privacy": specify_privacy(sigma, public_size, batch_size, most=2 * public_size if role == "coin" else None),
    }  # fmt: skip
    x, y = datasets.as_tensor(images).to(device), torch.as_tensor(images.labels).to(device)
    if family == "gan":
        gan = {"generator_every": generator_every, "as_published": gan_as_published}
        report = train_gan(*nets.values(), x, y, **settings, **gan)
    else:
        report = {"vae": train_vae, "ddpm": train_ddpm}[family](nets["model"], x, y, **settings)
    save_weights(folder / "weights.safetensors", nets["model"])
    samples = draw_samples(nets["model"], num_classes, samples_per_class, seed, device)
    save_file(samples, folder / "samples.safetensors")
    return report | {
        "images": len(images),
        "delta": settings["privacy"].delta if settings["privacy"] else None,
        "private_outputs": [*report["private_outputs"], *(["images"] if settings["privacy"] else [])],
    }


def draw_samples(model, num_classes, per_class, seed, device="cpu"):
    """Images uint8 (N, C, S, S) and labels (N,), sorted by class, from a seed of their own; rounded as released images
    are.
    """
    model.eval()
    labels = torch.arange(num_classes).repeat_interleave(per_class)
    generator = stream(seed, "samples")
    images = torch.cat([model.sample(part.to(device), generator).cpu() for part in labels.split(SAMPLING_BATCH)])
    if not torch.isfinite(images).all():
        raise ValueError("The model's samples are not finite: its training diverged; lower lr.")
    return {"images": torch.as_tensor(datasets.to_uint8(images)), "labels": labels}


def load_samples(folder):
    """A trained cell's samples: images uint8 (N, C, S, S) and labels (N,), both numpy."""
    samples = load_file(Path(folder) / "samples.safetensors")
    return samples["images"].numpy(), samples["labels"].numpy()


def audit_cell(trained, *, steps, canaries, audit_seed=0, **settings):
    """Brackets of a cell that `train_cell` trained with `settings` in the folder `trained`, as plain rows.

    White box: the cell's model goes on from its checkpoint for `steps` steps of the same private training, with
    canaries beside its images. Black box: do its released samples lie nearer to the images it saw than to the next
    ones of the same classes? There the accounted epsilon is that of the whole training.
    """
    known = {name: p.default for name, p in inspect.signature(train_cell).parameters.items()} | settings
    whole = datasets.load(known["data"], "train")
    per_class, classes = known["images_per_class"], len(whole.classes)
    privacy = specify_privacy(known["sigma"], per_class * classes, known["batch_size"])
    if privacy is None:
        raise ValueError("This cell was trained without noise: its epsilon is infinite, and there is nothing to audit.")
    images = select_role(whole, known["role"], per_class, known["query_class"], known["draw"], known["seed"])
    data = datasets.as_tensor(images), torch.as_tensor(images.labels)
    torch.manual_seed(stream(audit_seed, "audited losses").initial_seed())
    model, step_loss = _resumed(Path(trained) / "checkpoint", known, classes, images.images.shape[1])
    what = f"{known['family']}, sigma {known['sigma']}, {known['role']}, {known['data']}"
    white = audit.audit_training(
        what, model, step_loss, privacy, data, steps, canaries, lr=known["lr"], seed=audit_seed
    )  # fmt: skip
    rows = [white.row()]
    if known["role"] == "full":
        total = known["epochs"] * round(1 / privacy.sample_rate)
        rows.append(_audit_released(what, trained, whole, per_class, privacy, total))
    return rows


def bracket_cell(folder, *, trained, **settings):
    """`audit_cell` as a stage of a run: {"rows": [...]}."""
    return {"rows": audit_cell(trained, **settings)}


def _resumed(checkpoint, known, classes, channels):
    """What is private of a cell as its checkpoint left it, and its loss as the training loop makes it per step."""
    family, checkpoint = known["family"], Checkpoint(checkpoint)
    ddpm = {"timesteps": known["timesteps"]} if family == "ddpm" else {}
    nets = build(family, classes, known["width"], channels, **ddpm)
    if family != "gan":
        model = checkpoint.load_module("model", nets["model"])
        drawn = (lambda images: draw_diffusion(model, images)) if family == "ddpm" else (lambda images: ())
        loss = {"vae": vae_loss, "ddpm": ddpm_loss}[family]
        return model, lambda _, images, labels: (loss, (images, labels, *drawn(images)))
    made = checkpoint.load_module("generator", nets["model"]).requires_grad_(False)

    def step_loss(_, images, labels):
        wanted = torch.randint(classes, (len(labels),))
        return discriminator_loss, (images, made(made.noise(len(labels)), wanted), labels, wanted)

    return checkpoint.load_module("discriminator", nets["discriminator"]), step_loss


def _audit_released(what, trained, whole, per_class, privacy, steps):
    """The black-box row: members are the images of the full role, non-members as many that follow them."""
    rows = [first_of(whole, label, 2 * per_class) for label in range(len(whole.classes))]
    included = np.arange(2 * per_class) < per_class
    candidates = whole.images[np.concatenate(rows)]
    lower = audit.audit_samples(candidates, np.tile(included, len(rows)), load_samples(trained)[0])
    lower = replace(lower, assumption=f"{lower.assumption} Here no coin chose: members come first in the file.")
    name = f"black box, {len(candidates)} images near released samples"
    return audit.bracket(what, privacy, steps, name, lower, verdict=False).row()


def restore(trained, family, num_classes, width, channels=1, **ddpm):
    """The trained generator of a cell, on the CPU, ready to sample; `ddpm` as in `build`: no weights file holds it."""
    model = build(family, num_classes, width, channels, **ddpm)["model"]
    load_weights(Path(trained) / "weights.safetensors", model)
    return model.eval()


def grid(families, widths, epochs, batch_sizes, sigmas, seeds):
    """Every cell's settings by name, "vae/sigma0.1/seed0/full"; widths, epochs, batch_sizes: one number per family."""
    return {
        f"{family}/sigma{sigma}/seed{seed}/{role}": {
            "family": family, "sigma": sigma, "seed": seed, "role": role, "width": width, "epochs": passes,
            "batch_size": batch_size,
        }
        for family, width, passes, batch_size in zip(families, widths, epochs, batch_sizes, strict=True)
        for sigma in sigmas
        for seed in seeds
        for role in ROLES
    }  # fmt: skip
