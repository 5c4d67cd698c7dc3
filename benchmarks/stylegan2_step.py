"""A step of StyleGAN2 beside the grouped-convolution form and beside the plainest correct form, as ratios of one run.

    python benchmarks/stylegan2_step.py [--sides 32 64] [--rounds 8]

A step is what an iteration costs on average: generator, discriminator, a quarter of the path length and a sixteenth of
R1; CPU seconds of the process, the least of interleaved rounds. All three forms share weights and must agree in their
images before anything is timed. *grouped*: weights are modulated for each image, a batch becomes groups of one
convolution, and the filter is a one-channel convolution over all feature maps: the way that is widely copied; with our
filter and layout its convolutions alone cost less than the name says. *plain*: activations are scaled as here, but in
the default layout, each equation on its own, and what is filtered in vain before a stride is filtered all the same.
"""

import argparse
import json
import time
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from lookalike.models import stylegan2 as sg
from lookalike.training.lesions import path_lengths, r1_penalty

BATCH = 8


def grouped_forward(conv, x, w, noise):
    """StyledConv.forward with one modulated kernel per image."""
    n, c, h, _ = x.shape
    styles = conv.style(w)
    kernel = conv.weight[None] * styles[:, None, :, None, None]
    kernel = kernel * (kernel.square().sum((2, 3, 4), keepdim=True) + 1e-8).rsqrt()
    x = x.reshape(1, n * c, h, h)
    if conv.up:
        kernel = kernel.transpose(1, 2).reshape(n * c, -1, 3, 3)
        x = F.conv_transpose2d(x, kernel, stride=2, groups=n)
        x = sg.blur(x.view(n, -1, 2 * h + 1, 2 * h + 1), 1, gain=4.0)
    else:
        x = F.conv2d(x, kernel.reshape(-1, c, 3, 3), padding=1, groups=n).view(n, -1, h, h)
    return activated(x + conv._noise(noise, x) * conv.strength + conv.bias[:, None, None])


def plain_forward(conv, x, w, noise):
    """StyledConv.forward as the equations have it: scale, convolve, filter, scale, add, bend, gain."""
    styles = conv.style(w)
    x = x * styles[:, :, None, None]
    if conv.up:
        x = sg.blur(F.conv_transpose2d(x, conv.weight.transpose(0, 1), stride=2), 1, gain=4.0)
    else:
        x = F.conv2d(x, conv.weight, padding=1)
    x = x * sg.demodulation(conv.weight, styles)[:, :, None, None]
    return activated(x + conv._noise(noise, x) * conv.strength + conv.bias[:, None, None])


def plain_conv(conv, x):
    """Conv.forward likewise."""
    weight, kernel = conv.weight * conv.scale, conv.weight.shape[-1]
    if conv.down:
        x = sg.halve(x) if kernel == 1 else sg.blur(x, 2)
    stride, padding = (2, 0) if conv.down and kernel > 1 else (1, 0 if conv.down else kernel // 2)
    x = F.conv2d(x, weight, conv.bias, stride=stride, padding=padding)
    return activated(x, conv.gain / sg.GAIN) if conv.activation else x * conv.gain


def activated(x, gain=1.0):
    return F.leaky_relu(x, sg.SLOPE) * (sg.GAIN * gain)


def copied_filter(x, padding, gain, stride):
    """The filter as a one-channel convolution over N * C images, with a copy for the padding."""
    n, c = x.shape[:2]
    line = torch.tensor([1.0, 3.0, 3.0, 1.0])
    kernel = (torch.outer(line, line) * (gain / 64))[None, None]
    x = F.conv2d(F.pad(x.reshape(n * c, 1, *x.shape[2:]), (padding,) * 4), kernel)[:, :, ::stride, ::stride]
    return x.reshape(n, c, *x.shape[2:])


def plain_filter(x, padding, gain, stride):
    """The low-pass filter with explicit padding, every position, then the stride."""
    line = torch.tensor([1.0, 3.0, 3.0, 1.0])
    kernel = (torch.outer(line, line) * (gain / 64)).expand(x.shape[1], 1, 4, 4)
    return F.conv2d(F.pad(x, (padding,) * 4), kernel, groups=x.shape[1])[:, :, ::stride, ::stride]


def plain_double(image):
    """Zero-stuffing and the filter, as the equation has it."""
    n, c, h, w = image.shape
    wide = F.pad(image.reshape(n, c, h, 1, w, 1), (0, 1, 0, 0, 0, 1)).reshape(n, c, 2 * h, 2 * w)
    line = torch.tensor([1.0, 3.0, 3.0, 1.0])
    kernel = (torch.outer(line, line) / 16).expand(c, 1, 4, 4)
    return F.conv2d(F.pad(wide, (2, 1, 2, 1)), kernel, groups=c)


FORMS = {
    "ours": {},
    "plain": {"styled": plain_forward, "conv": plain_conv, "filter": plain_filter, "double": plain_double},
    "grouped": {"styled": grouped_forward, "conv": plain_conv, "filter": copied_filter, "double": plain_double},
    "grouped convolutions alone": {"styled": grouped_forward},
}


@contextmanager
def form(name):
    """Within, networks compute in that form."""
    kept = sg.StyledConv.forward, sg.Conv.forward, sg._filter, sg.double, torch.channels_last
    parts = FORMS[name]
    sg.StyledConv.forward, sg.Conv.forward = parts.get("styled", kept[0]), parts.get("conv", kept[1])
    sg._filter, sg.double = parts.get("filter", kept[2]), parts.get("double", kept[3])
    if "filter" in parts:
        torch.channels_last = torch.contiguous_format
    try:
        yield
    finally:
        sg.StyledConv.forward, sg.Conv.forward, sg._filter, sg.double, torch.channels_last = kept


def networks(side):
    torch.manual_seed(0)
    widths = {"base": 4096, "max_channels": 128}
    return sg.Generator(side, num_classes=0, latent_dim=128, w_dim=128, **widths), sg.Discriminator(
        side, num_classes=0, **widths
    )


def phases(made, judge, images):
    """The four parts of an iteration, and how often each comes."""

    def generator():
        F.softplus(-judge(made(made.noise(BATCH)))).mean().backward()

    def discriminator():
        with torch.no_grad():
            fake = made(made.noise(BATCH))
        (F.softplus(judge(fake)).mean() + F.softplus(-judge(images)).mean()).backward()

    def path():
        ws = made.map(made.noise(BATCH // 2))[:, None].repeat(1, made.num_ws, 1)
        (path_lengths(made, ws) - 1).square().mean().backward()

    def r1():
        r1_penalty(judge, images).mean().backward()

    return {generator: 1, discriminator: 1, path: 1 / 4, r1: 1 / 16}


def cpu_seconds(call):
    started = time.process_time()
    call()
    return time.process_time() - started


def measure(side, rounds):
    made, judge = networks(side)
    images = torch.rand(BATCH, 3, side, side) * 2 - 1
    w = made.map(made.noise(4)).detach()
    shown = {}
    for name in FORMS:
        with form(name), torch.no_grad():
            shown[name] = made.synthesise(w, "fixed"), judge(images)
    for name, (image, logits) in shown.items():
        assert (image - shown["ours"][0]).abs().max() < 1e-3 * shown["ours"][0].abs().max(), name
        assert torch.allclose(logits, shown["ours"][1], atol=1e-3), name
    least = {name: {} for name in shown}
    for i in range(rounds + 1):  # the first warms up; the order turns round, or the last would always run hottest
        for name in list(least)[:: 1 if i % 2 else -1]:
            with form(name):
                for call in phases(made, judge, images):
                    least[name].setdefault(call.__name__, []).append(cpu_seconds(call))
    often = {call.__name__: share for call, share in phases(made, judge, images).items()}
    step = {name: sum(min(times[1:]) * often[part] for part, times in of.items()) for name, of in least.items()}
    return {
        "side": side, "seconds": {name: round(value, 3) for name, value in step.items()},
        **{f"ours to {name}": round(step["ours"] / value, 3) for name, value in step.items() if name != "ours"},
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sides", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps([measure(side, args.rounds) for side in args.sides], indent=1))


if __name__ == "__main__":
    main()
