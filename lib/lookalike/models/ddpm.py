"""Conditional DDPM for small grey images.

Paper: Arroyo Galende et al. 2026, "No Free Lunch ...", Sec. 3.1; layers from the authors' `src/models/diffusion.py`,
which follows TeaPearce/Conditional_Diffusion_MNIST with GroupNorm in place of BatchNorm. Chapter: no_free_lunch.
The noise schedule and the fast sampler come from diffusers; the paper's ancestral sampler is written out here.
As in the paper the diffusion runs on pixels in [0, 1].
"""

import warnings

import torch
from torch import nn

from lookalike.models.vae import from_unit, one_hot, to_unit

BETA_START, BETA_END = 1e-4, 0.02


class ConditionalDDPM(nn.Module):
    """Noise prediction for images (N, C, 28, 28); `sample` gives images in [-1, 1].

    `width` is the paper's n_feat (128; a multiple of 8), `timesteps` its T. `guidance` is w in (1 + w) e_c - w e_u.
    `sampler` is "ancestral" (the paper: all T steps) or "dpm++" (DPM-Solver++ 2M, `sampling_steps` steps).
    """

    def __init__(
        self, image_size=28, channels=1, num_classes=10, width=128, timesteps=400, guidance=2.0,
        label_dropout=0.1, sampler="ancestral", sampling_steps=20,
    ):  # fmt: skip
        super().__init__()
        if image_size != 28:
            raise ValueError(f"This U-Net pools 28 px to 7 and then to 1; image_size must be 28, not {image_size}.")
        self.shape, self.num_classes, self.timesteps = (
            (channels, image_size, image_size),
            num_classes,
            timesteps,
        )
        self.guidance, self.label_dropout = guidance, label_dropout
        self.sampler, self.sampling_steps = sampler, sampling_steps
        w = width
        self.first = ResidualBlock(channels, w)
        self.down1 = nn.Sequential(_double(w, w), nn.MaxPool2d(2))
        self.down2 = nn.Sequential(_double(w, 2 * w), nn.MaxPool2d(2))
        self.vector = nn.Sequential(nn.AvgPool2d(7), nn.GELU())
        self.time1, self.time2 = Embedding(1, 2 * w), Embedding(1, w)
        self.label1, self.label2 = Embedding(num_classes, 2 * w), Embedding(num_classes, w)
        self.up0 = nn.Sequential(nn.ConvTranspose2d(2 * w, 2 * w, 7, 7), nn.GroupNorm(8, 2 * w), nn.ReLU())
        self.up1 = nn.Sequential(nn.ConvTranspose2d(4 * w, w, 2, 2), _double(w, w), _double(w, w))
        self.up2 = nn.Sequential(nn.ConvTranspose2d(2 * w, w, 2, 2), _double(w, w), _double(w, w))
        self.out = nn.Sequential(
            nn.Conv2d(2 * w, w, 3, 1, 1), nn.GroupNorm(8, w), nn.ReLU(), nn.Conv2d(w, channels, 3, 1, 1)
        )
        betas, signal = schedule(timesteps)
        self.register_buffer("betas", betas, persistent=False)
        self.register_buffer("signal", signal, persistent=False)

    def forward(self, x_t, labels, t, keep):
        """Predicted noise (N, C, S, S) at steps t (N,); keep (N,) is 1 where the label is shown, 0 where it is
        hidden.
        """
        # The authors' mask multiplies a shown label by -1; harmless, kept so that weights mean the same.
        shown = -one_hot(labels, self.num_classes) * keep[:, None]
        time = (t.to(x_t.dtype) / self.timesteps)[:, None]
        first = self.first(x_t)
        down1 = self.down1(first)
        down2 = self.down2(down1)
        u = self.up0(self.vector(down2))
        u = self.up1(torch.cat([self.label1(shown) * u + self.time1(time), down2], 1))
        u = self.up2(torch.cat([self.label2(shown) * u + self.time2(time), down1], 1))
        return self.out(torch.cat([u, first], 1))

    @torch.no_grad()
    def sample(self, labels, generator=None):
        """One image per label, (N, C, S, S) in [-1, 1]."""
        noise = lambda: torch.randn(len(labels), *self.shape, generator=generator).to(labels.device)  # noqa: E731
        sampler = {"ancestral": self._ancestral, "dpm++": self._dpm_solver}
        if self.sampler not in sampler:
            raise ValueError(f"sampler must be one of {', '.join(sampler)}, not {self.sampler!r}.")
        return from_unit(sampler[self.sampler](labels, noise).clamp(0, 1))

    def guided_noise(self, x_t, labels, t):
        """Classifier-free guidance: (1 + w) e(x, c) - w e(x), with both halves in one forward pass."""
        twice, keep = (
            torch.cat([labels, labels]),
            torch.arange(2, device=labels.device).repeat_interleave(len(labels)),
        )
        steps = torch.full_like(twice, t)
        hidden, shown = self(torch.cat([x_t, x_t]), twice, steps, keep).chunk(2)
        return (1 + self.guidance) * shown - self.guidance * hidden

    def _ancestral(self, labels, noise):
        x = noise()
        for t in range(self.timesteps, 0, -1):
            alpha, signal = 1 - self.betas[t], self.signal[t]
            x = (x - self.guided_noise(x, labels, t) * (1 - alpha) / (1 - signal).sqrt()) / alpha.sqrt()
            if t > 1:
                x = x + self.betas[t].sqrt() * noise()
        return x

    def _dpm_solver(self, labels, noise):
        from diffusers import DPMSolverMultistepScheduler

        betas = self.betas[1:].cpu().clone()
        betas[0] = 1 - self.signal[1].cpu()  # the paper's product starts at t = 0, the solver's at t = 1
        with warnings.catch_warnings():  # diffusers 0.42 hands a tensor to numpy 2 the old way
            warnings.simplefilter("ignore", DeprecationWarning)
            solver = DPMSolverMultistepScheduler(self.timesteps, trained_betas=betas.numpy())
            solver.set_timesteps(self.sampling_steps)
        x = noise()
        for step in solver.timesteps:  # the solver counts from 0, the paper from 1
            x = solver.step(self.guided_noise(x, labels, int(step) + 1), step, x).prev_sample
        return x


def ddpm_loss(model, images, labels, t, signal, noise, keep):
    """Squared error of the predicted noise per image (N,), averaged over pixels.

    t, signal, noise, keep come from `draw_diffusion`: drawn outside, so that the loss is a plain function of each
    image.
    """
    x_t = signal.sqrt() * to_unit(images) + (1 - signal).sqrt() * noise
    return (model(x_t, labels, t, keep) - noise).square().flatten(1).mean(1)


def draw_diffusion(model, images, generator=None):
    """What one training step draws: t ~ U{1..T} (N,), alpha bar at t (N, 1, 1, 1), noise (N, C, S, S), keep (N,) in
    {0, 1}.
    """
    t = torch.randint(1, model.timesteps + 1, (len(images),), generator=generator).to(images.device)
    noise = torch.randn(images.shape, generator=generator).to(images.device)
    keep = (torch.rand(len(images), generator=generator) >= model.label_dropout).float().to(images.device)
    return t, model.signal[t][:, None, None, None], noise, keep


def schedule(timesteps):
    """The paper's linear schedule: beta_t and the remaining signal (alpha bar), both (T + 1,) for t = 0..T."""
    betas = torch.linspace(BETA_START, BETA_END, timesteps + 1)
    return betas, (1 - betas).cumprod(0)


class ResidualBlock(nn.Module):
    """The first block: (first + second) / 1.414, where first and second are its two convolutions' outputs."""

    def __init__(self, before, after):
        super().__init__()
        self.one, self.two = _single(before, after), _single(after, after)

    def forward(self, x):
        one = self.one(x)
        return (one + self.two(one)) / 1.414


class Embedding(nn.Module):
    """A vector (N, d) to one weight per channel, (N, e, 1, 1)."""

    def __init__(self, before, after):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(before, after), nn.GELU(), nn.Linear(after, after))

    def forward(self, x):
        return self.net(x)[:, :, None, None]


def _single(before, after):
    return nn.Sequential(nn.Conv2d(before, after, 3, 1, 1), nn.GroupNorm(8, after), nn.GELU())


def _double(before, after):
    return nn.Sequential(_single(before, after), _single(after, after))
