"""The calibration of attacks that need a model: small GANs that have overfitted, small VAEs with shadows.

The same model serves both sides. With its training images as members an attack should find the leak; with images that
it never saw posing as members nothing can leak, for it is then a generator on disjoint data.
"""

import numpy as np
import torch

from lookalike.calibration import Trial, deal, detect, powers
from lookalike.data import phantoms
from lookalike.data.image_set import as_tensor, to_uint8
from lookalike.metrics.extractors import efficientnet_lite0
from lookalike.metrics.features import features
from lookalike.models.gan import Discriminator, Generator
from lookalike.models.vae import ConditionalVAE, vae_loss
from lookalike.privacy import membership, projection, shadows, suite
from lookalike.privacy.attack import auc
from lookalike.training.adversarial import train_gan

OVERFITTED = "overfitted GAN"
DISJOINT = "disjoint data"
SHADOWED = "overfitted VAE"
SIDE = 16


def run(models, seed=0):
    """Both calibrations at a size that takes half an hour; {"data", "side", "what", "gans", "vaes"}."""
    images = phantoms.grey28(400, seed, image_size=SIDE).image_set
    population = phantoms.grey28(200, seed + 1, image_size=SIDE).image_set
    gans = {"models": models, "members": 40, "samples": 200, "epochs": 300, "width": 16}
    vaes = {"models": 2 * models + 6, "steps": 300, "width": 8, "batch_size": 20}
    chosen = images.subset(np.arange(80))
    extractor = efficientnet_lite0(64)
    what = {
        "gans": f"{models} GANs of width {gans['width']}, {gans['epochs']} epochs each on {gans['members']} images of "
        f"its own; {gans['samples']} images released, two trials per model. Features: {extractor.name}.",
        "vaes": f"{vaes['models']} VAEs of width {vaes['width']}, {vaes['steps']} steps each on one half of "
        f"{len(chosen)} images; every model is the target once.",
    }
    return {
        "data": images.name,
        "side": SIDE,
        "seed": seed,
        "what": what,
        "gans": calibrate_gans(images, extractor, **gans, seed=seed),
        "vaes": calibrate_shadows(chosen, population, **vaes, seed=seed),
    }


def calibrate_gans(image_set, extractor, *, models, members, samples, epochs, width, lr=1e-3, search_steps=100, seed=0):
    """{leak: {detector: {"power", "interval"}}} for `OVERFITTED` and `DISJOINT`, over `models` small GANs.

    Each GAN learns `members` images of ImageSet `image_set` for `epochs` epochs of one batch and makes `samples`
    images. Three more sets of as many images it never sees: they are the non-members, two against each model, and one
    poses as members: for one half of the models to set the threshold, for the other to check it. The attacks that need
    weights are only tried here.
    """
    rng, found = np.random.default_rng(seed), {"threshold": [], DISJOINT: [], OVERFITTED: []}
    for model in range(models):
        parts = deal(image_set.subjects, [members] * 5, rng)
        seen, *unseen, beside = parts
        generator, discriminator = _overfit(image_set.subset(seen), epochs, width, lr, seed + model)
        made = _drawn(generator, image_set.labels[seen], samples, seed + model)
        views = [_view(image_set.images[rows], extractor) for rows in (seen, *unseen, beside)]
        released = _view(made, extractor)
        known = [
            _with_weights(image_set.subset(rows), generator, discriminator, search_steps) for rows in (seen, *unseen)
        ]

        def trial(a, b, views=views, released=released, known=known, number=model):
            drawn = Trial(views[a], released, views[b], views[4], seed + number)
            return detect(drawn) | {name: auc(known[a][name], known[b][name]) for name in known[a]}

        found[OVERFITTED] += [trial(0, 1), trial(0, 2)]
        found["threshold" if model % 2 else DISJOINT] += [trial(1, 2), trial(2, 3)]
    return powers(found.pop("threshold"), found)


def calibrate_shadows(image_set, population, *, models, steps, width, batch_size, lr=1e-3, seed=0):
    """The same for LiRA and RMIA on small VAEs, each the target once; "loss" is the attack without shadows.

    Where nothing leaks the scores are judged by subsets on which no model was trained.
    """

    def make_model():
        return ConditionalVAE(
            image_set.images.shape[-1], image_set.images.shape[1], len(image_set.classes), width=width
        )

    n = len(image_set)
    scored = shadows.shadow_attack(
        make_model, vae_loss, as_tensor(image_set), torch.as_tensor(image_set.labels), as_tensor(population),
        torch.as_tensor(population.labels), steps, batch_size, lr, models, seed=seed, subjects=image_set.subjects,
    )  # fmt: skip
    found = {SHADOWED: scored.included}
    for other, name in enumerate(("threshold", DISJOINT)):
        found[name] = shadows.draw_inclusion(models, n, seed=seed + 1 + other, subjects=image_set.subjects)
    areas = {
        name: [
            {attack: auc(rows[s][inside[s]], rows[s][~inside[s]]) for attack, rows in scored.scores.items()}
            for s in range(models)
        ]
        for name, inside in found.items()
    }
    return powers(areas.pop("threshold"), areas)


def _overfit(images, epochs, width, lr, seed):
    torch.manual_seed(seed)
    side, channels = images.images.shape[-1], images.images.shape[1]
    generator = Generator(side, channels, len(images.classes), width=width)
    discriminator = Discriminator(channels, len(images.classes), width)
    x, y = as_tensor(images), torch.as_tensor(images.labels)
    train_gan(
        generator, discriminator, x, y, epochs=epochs, lr=lr, batch_size=len(images), penalty=0.0, generator_every=1,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    return generator.eval(), discriminator.eval()


def _drawn(generator, labels, samples, seed):
    wanted = torch.as_tensor(np.resize(labels, samples))
    return to_uint8(generator.sample(wanted, torch.Generator().manual_seed(seed)))


def _view(images, extractor):
    return suite.View(images, features(images, extractor))


def _with_weights(images, generator, discriminator, steps):
    """Scores of the attacks that have the generator to query, or its weights, or the discriminator's."""
    x, y = as_tensor(images), torch.as_tensor(images.labels)
    synthesise, shape = projection.gan_access(generator)
    searched = x, synthesise, shape, y
    start = projection.normal_start(shape)
    projected = projection.project(x, synthesise, start, y, projection.Projector(steps=steps))
    return {
        "logan_white_box": membership.logan_white_box(x, discriminator, y),
        "gan_leaks_partial_black_box": membership.gan_leaks_partial_black_box(
            *searched, steps=steps // 3, population=8
        ),
        "gan_leaks_white_box": membership.gan_leaks_white_box(*searched, steps=steps),
        "latent_projection": projected.scores,
    }
