"""The three generators of no_free_lunch: layers to the count, samples, losses that fall."""

import pytest
import torch

from lookalike.models.ddpm import ConditionalDDPM, ddpm_loss, draw_diffusion, schedule
from lookalike.models.gan import (
    Discriminator,
    Generator,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
)
from lookalike.models.vae import ConditionalVAE, label_planes, vae_loss


def count(net):
    return sum(p.numel() for p in net.parameters())


# classes: VAE, encoder, decoder, generator, discriminator, DDPM; counted in the authors' networks (MNIST, OCTMNIST,
# OrganAMNIST)
PUBLISHED = {
    10: (4_318_369, 1_718_688, 2_599_681, 918_785, 1_561_985, 6_585_601),
    4: (4_313_761, 1_715_616, 2_598_145, 881_153, 1_558_529, 6_583_297),
    11: (4_319_137, 1_719_200, 2_599_937, 925_057, 1_562_561, 6_585_985),
}


@pytest.mark.parametrize("num_classes", PUBLISHED)
def test_paper_sized_networks_have_the_published_parameter_counts(num_classes):
    vae = ConditionalVAE(num_classes=num_classes)
    nets = (
        vae, vae.encoder, vae.decoder, Generator(num_classes=num_classes), Discriminator(num_classes=num_classes),
        ConditionalDDPM(num_classes=num_classes),
    )  # fmt: skip
    assert tuple(count(net) for net in nets) == PUBLISHED[num_classes]


SMALL = {
    "vae": lambda: ConditionalVAE(num_classes=4, width=8, latent_dim=8),
    "gan": lambda: Generator(num_classes=4, width=8),
    "ddpm": lambda: ConditionalDDPM(num_classes=4, width=8, timesteps=6),
    "ddpm fast": lambda: ConditionalDDPM(num_classes=4, width=8, timesteps=40, sampler="dpm++", sampling_steps=4),
}


@pytest.mark.parametrize("family", SMALL)
def test_samples_are_images_and_repeat_with_a_seed(family):
    torch.manual_seed(0)
    model = SMALL[family]().eval()
    labels = torch.tensor([0, 1, 2, 3, 0])
    draw = lambda seed: model.sample(labels, torch.Generator().manual_seed(seed))  # noqa: E731
    images = draw(1)
    assert images.shape == (5, 1, 28, 28)
    assert images.min() >= -1
    assert images.max() <= 1
    torch.testing.assert_close(draw(1), images)
    assert (draw(2) - images).abs().max() > 1e-3


def _losses(family, images, labels):
    if family == "gan":
        discriminator = Discriminator(num_classes=4, width=8)
        return discriminator, lambda: discriminator_loss(discriminator, images, -images, labels, labels)
    model = SMALL[family]()
    if family == "vae":
        return model, lambda: vae_loss(model, images, labels)
    draw = draw_diffusion(model, images, torch.Generator().manual_seed(0))
    return model, lambda: ddpm_loss(model, images, labels, *draw)


@pytest.mark.parametrize("family", ["vae", "gan", "ddpm"])
def test_the_loss_falls_on_one_batch(family, tiny_images):
    torch.manual_seed(0)
    net, losses = _losses(family, *tiny_images)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    before = losses().mean().item()
    for _ in range(30):
        optimizer.zero_grad()
        losses().mean().backward()
        optimizer.step()
    assert losses().mean().item() < 0.7 * before


@pytest.mark.parametrize("family", ["vae", "gan", "ddpm"])
def test_every_loss_is_one_number_per_image_that_knows_no_other_image(family, tiny_images):
    images, labels = tiny_images
    others = images.flip(0).clone()
    others[3] = images[3]
    found = []
    for batch in (images, others):
        torch.manual_seed(0)
        net, losses = _losses(family, batch, labels)
        net.eval()
        torch.manual_seed(1)
        found.append(losses())
    assert found[0].shape == (8,)
    torch.testing.assert_close(found[0][3], found[1][3], rtol=1e-4, atol=1e-5)
    assert (found[0][0] - found[1][0]).abs() > 1e-4


def test_vae_loss_is_the_negative_elbo_written_out(tiny_images):
    images, labels = tiny_images
    model = ConditionalVAE(num_classes=4, width=8, latent_dim=8).eval()
    torch.manual_seed(3)
    loss = vae_loss(model, images, labels, beta=0.3)
    torch.manual_seed(3)
    logits, mu, logvar = model(images, labels)
    pixel, target = logits.sigmoid().double(), ((images + 1) / 2).double()
    entropy = -(target * pixel.log() + (1 - target) * (1 - pixel).log()).sum((1, 2, 3))
    normal = torch.distributions.Normal(mu.double(), (0.5 * logvar.double()).exp())
    kl = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(loss.double(), entropy + 0.3 * kl, rtol=1e-4, atol=1e-3)


def test_an_undecided_discriminator_costs_ln_two(tiny_images):
    images, labels = tiny_images
    blind = lambda x, y: torch.zeros(len(x))  # noqa: E731
    ln2 = torch.full((8,), 0.6931472)
    torch.testing.assert_close(discriminator_loss(blind, images, images, labels, labels), ln2)
    torch.testing.assert_close(generator_loss(blind, images, labels), ln2)


def test_gradient_penalty_of_a_discriminator_with_known_slope(tiny_images):
    images, labels = tiny_images

    def linear(x, y):  # sigmoid(0) = 0.5 with slope 1/4: d out / d unit pixel = (1/4) * w * 2
        weights = torch.zeros(1, 28, 28)
        weights[0, 0, 0] = 6.0
        return ((x - x.detach()) * weights).sum((1, 2, 3))

    assert gradient_penalty(linear, images, images, labels).item() == pytest.approx((6.0 * 2 / 4 - 1) ** 2)


def test_label_planes_are_one_hot_images():
    planes = label_planes(torch.tensor([2, 0]), 3, 4)
    assert planes.shape == (2, 3, 4, 4)
    assert planes.mean((2, 3)).tolist() == [[0, 0, 1], [1, 0, 0]]


def test_schedule_keeps_the_papers_ends():
    betas, signal = schedule(400)
    assert len(betas) == 401
    assert betas[0].item() == pytest.approx(1e-4)
    assert betas[-1].item() == pytest.approx(0.02)
    assert signal[-1].item() == pytest.approx(float(torch.prod(1 - torch.linspace(1e-4, 0.02, 401).double())), rel=1e-4)


class KnownNoise(ConditionalDDPM):
    """Predicts exactly the noise that leads to a constant image: both samplers must arrive at that image."""

    def forward(self, x_t, labels, t, keep):
        signal = self.signal[t][:, None, None, None]
        target = labels.float()[:, None, None, None] / 4
        return (x_t - signal.sqrt() * target) / (1 - signal).sqrt()


@pytest.mark.parametrize("sampler", ["ancestral", "dpm++"])
def test_both_samplers_arrive_where_a_perfect_network_points(sampler):
    model = KnownNoise(num_classes=4, width=8, timesteps=400, sampler=sampler)
    labels = torch.tensor([0, 1, 2, 3])
    images = (model.sample(labels, torch.Generator().manual_seed(0)) + 1) / 2
    expected = (labels / 4)[:, None, None, None].expand(-1, 1, 28, 28)
    torch.testing.assert_close(images, expected, atol=0.06, rtol=0)  # beta_0 leaves noise of sd 0.01


def test_guidance_extrapolates_from_hidden_to_shown_label():
    model = ConditionalDDPM(num_classes=4, width=8, timesteps=10, guidance=2.0).eval()
    x, labels = torch.randn(3, 1, 28, 28), torch.tensor([0, 1, 2])
    t = torch.full((3,), 5)
    shown, hidden = model(x, labels, t, torch.ones(3)), model(x, labels, t, torch.zeros(3))
    torch.testing.assert_close(model.guided_noise(x, labels, 5), 3 * shown - 2 * hidden, rtol=1e-4, atol=1e-5)


def test_wrong_settings_are_refused_with_a_sentence():
    with pytest.raises(ValueError, match="image_size must be 28"):
        ConditionalDDPM(image_size=32)
    with pytest.raises(ValueError, match="sampler must be one of"):
        ConditionalDDPM(num_classes=4, width=8, sampler="fast").sample(torch.tensor([0]))


class Mixture(ConditionalDDPM):
    """The exact noise predictor for pixels that are 0.2 or 0.8, each with probability 1/2 and deviation 0.05."""

    def forward(self, x_t, labels, t, keep):
        signal = self.signal[t][:, None, None, None]
        centres = torch.tensor([0.2, 0.8])[:, None, None, None, None]
        variance = signal * 0.05**2 + 1 - signal
        share = (-(x_t - signal.sqrt() * centres).square() / (2 * variance)).softmax(0)
        mean = (share * (centres + signal.sqrt() * 0.05**2 * (x_t - signal.sqrt() * centres) / variance)).sum(0)
        return (x_t - signal.sqrt() * mean) / (1 - signal).sqrt()


def test_the_fast_sampler_agrees_with_the_papers_on_a_known_law():
    """20 network calls instead of 400: both meet the mixture's mean, spread and balance, and each other, within 6 %."""
    drawn = {}
    for sampler in ("ancestral", "dpm++"):
        model = Mixture(num_classes=4, width=8, timesteps=400, sampler=sampler, sampling_steps=20)
        images = model.sample(torch.zeros(40, dtype=torch.long), torch.Generator().manual_seed(0))
        drawn[sampler] = ((images + 1) / 2).flatten()
    for pixels in drawn.values():
        # The paper's 400 steps leave 13 % of the signal at the start, where pure noise is put in: a bias to the dark.
        assert pixels.mean().item() == pytest.approx(0.5, abs=0.04)
        assert pixels.std().item() == pytest.approx((0.3**2 + 0.05**2) ** 0.5, rel=0.03)
        assert pixels[pixels < 0.5].std().item() == pytest.approx(0.05, rel=0.3)
    low, high = (p.sort().values for p in drawn.values())
    assert (low - high).abs().mean().item() < 0.06 * 0.6  # Wasserstein-1, against the distance of the modes
