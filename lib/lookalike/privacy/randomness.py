"""Where the noise and the batches of a private training come from: a seed, or the operating system.

A seeded run can be repeated to the bit, and so can its noise, by anyone who has the seed: it is for study. What is
given away must be made in release mode: random bytes of the operating system, never stored, not even in a checkpoint.
Which floats a noisy sum can be tells the sum (Mironov 2012). Against that, release noise is drawn in float64, as a sum
of four normals (Holohan and Braghin 2021, arXiv 2107.10138), and the noisy sum is rounded to float32: a practical
defence, whose rounding does most of it, and not a proof about floating point.
"""

import hashlib
import os

import numpy as np
import torch

MODES = {
    "study": "none beyond this study: the noise is seeded, and whoever has the seed can subtract it",
    "release": "noise and batches from the operating system's randomness, which is not stored",
}
COMPOSED = 4


def stream(seed, purpose):
    """A CPU generator of its own for each purpose: equal seeds would draw the noise from the weights' numbers."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def source(mode, generator=None):
    """The randomness of a mode; `generator` (None: torch's global one) serves study mode alone."""
    return Seeded(generator) if mode == "study" else Secret()


class Seeded:
    """Draws from a torch.Generator."""

    def __init__(self, generator=None):
        self.generator = generator

    def normal(self, shape):
        """Standard normal numbers, float32, where the generator lives."""
        return torch.empty(shape, device=self._device()).normal_(generator=self.generator)

    def chosen(self, n, rate):
        """Whether each of n records enters, each on its own: bool (n,)."""
        uniform = torch.rand(n, dtype=torch.float64, generator=self.generator, device=self._device())
        return (uniform < rate).cpu()  # in float32 a rate of one in a million would be drawn a hundredth too often

    def _device(self):
        return self.generator.device if self.generator else "cpu"


class Secret:
    """Draws from os.urandom; slower than a seeded generator, and not to be repeated."""

    def normal(self, shape):
        """Standard normal numbers, float64: (a + b + c + d) / 2 of four that are independent."""
        total = sum(_box_muller(int(np.prod(shape))) for _ in range(COMPOSED)) / COMPOSED**0.5
        return torch.from_numpy(total).view(shape)

    def chosen(self, n, rate):
        """Whether each of n records enters, each on its own: bool (n,)."""
        return torch.from_numpy(_uniform(n) <= rate)


def _uniform(n):
    """Uniform numbers in (0, 1], multiples of 2^-53."""
    return ((np.frombuffer(os.urandom(8 * n), np.uint64) >> np.uint64(11)) + 1.0) * 2.0**-53


def _box_muller(n):
    pairs = -(-n // 2)
    radius, angle = np.sqrt(-2 * np.log(_uniform(pairs))), 2 * np.pi * _uniform(pairs)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:n]
