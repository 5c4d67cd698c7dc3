"""Figures that more than one chapter draws; each takes axes or returns the figure it made."""

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns

COLOURS = dict(zip(("vae", "gan", "ddpm", "real"), sns.color_palette("colorblind", 4)))
NAMES = {"vae": "VAE", "gan": "GAN", "ddpm": "DDPM"}


def plot_grid(rows, titles=None, size=0.55):
    """One row of images per item of `rows`: a dict of name -> uint8 images (N, C, H, W). Returns the figure."""
    columns = max(len(images) for images in rows.values())
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(size * columns + 1.4, size * len(rows) + 0.3), squeeze=False
    )
    for line, (name, images) in zip(axes, rows.items()):
        for axis, image in zip(line, images):
            axis.imshow(image.transpose(1, 2, 0).squeeze(), cmap="gray", vmin=0, vmax=255)
        for axis in line:
            axis.set_axis_off()
        line[0].text(-0.25, 0.5, name, transform=line[0].transAxes, ha="right", va="center", fontsize=9)
    for axis, title in zip(axes[0], titles or []):
        axis.set_title(title, fontsize=9)
    figure.subplots_adjust(0, 0, 1, 1, wspace=0.04, hspace=0.04)
    return figure


def plot_against_noise(axis, table, column, label, families):
    """One line per family of `table` (columns family, sigma, `column`) over sigma: the mean over seeds, with the seeds
    as dots.
    """
    for family in families:
        part = table[table.family == family]
        mean = part.groupby("sigma")[column].mean()
        axis.plot(mean.index, mean, color=COLOURS[family], marker="o", ms=4, label=NAMES[family])
        if part.seed.nunique() > 1:
            axis.plot(part.sigma, part[column], ".", color=COLOURS[family], ms=3, alpha=0.6)
    axis.set(xlabel="noise multiplier $\\sigma$", ylabel=label)


def plot_ecdf(axis, values, **style):
    """The share of values at or below x, as steps."""
    values = np.sort(values)
    axis.step(values, np.arange(1, len(values) + 1) / len(values), where="post", **style)


def mark_level(axis, level, name):
    """A dashed line across the axes with its name above its right end: a value to read the others against."""
    axis.axhline(level, color="0.5", ls="--", lw=1)
    place = {"xy": (1, level), "xycoords": axis.get_yaxis_transform(), "xytext": (-4, 3), "textcoords": "offset points"}
    axis.annotate(name, **place, ha="right", fontsize=8, color="0.4")
