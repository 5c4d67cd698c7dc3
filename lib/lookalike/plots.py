"""Figures that more than one chapter draws; each takes axes or returns the figure it made."""

import io

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.collections import PolyCollection
from matplotlib.patches import Polygon
from PIL import Image

COLOURS = dict(zip(("vae", "gan", "ddpm", "real"), sns.color_palette("colorblind", 4)))
NAMES = {"vae": "VAE", "gan": "GAN", "ddpm": "DDPM"}


def shade(family, share):
    """The family's colour, mixed with white by `share` from 0 (itself) to 1 (white)."""
    return tuple((1 - share) * part + share for part in COLOURS[family])


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


def animate(frames, milliseconds=120, enlarged=4):
    """uint8 pictures (T, H, W) as an animated PNG, there and back without end: bytes, of which a printer shows one."""
    there_and_back = np.concatenate([frames, frames[-2:0:-1]])
    first, *rest = (Image.fromarray(f).resize((enlarged * f.shape[1], enlarged * f.shape[0])) for f in there_and_back)
    stream = io.BytesIO()
    first.save(stream, "PNG", save_all=True, append_images=rest, duration=milliseconds, loop=0)
    return stream.getvalue()


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


def plot_heatmaps(images, maps, titles=None, columns=8):
    """Images uint8 (N, C, H, W) above their heat maps (N, H, W) from 0 to 1, in pairs of rows of at most `columns`;
    `titles` one per image or none. Returns the figure.

    On a map the line is the image's edge between dark and bright pixels, at 0.5 of [0, 1]: mixing image and heat into
    one colour would show heat where the image is bright.
    """
    if len(images) != len(maps) or (titles is not None and len(titles) != len(images)):
        raise ValueError(
            f"{len(images)} images, {len(maps)} maps and {len(titles or images)} titles: give one of each."
        )
    columns = min(columns, len(images))
    bands = -(-len(images) // columns)
    shape = {"figsize": (0.85 * columns + 0.7, 1.95 * bands), "squeeze": False, "layout": "constrained"}
    figure, axes = plt.subplots(2 * bands, columns, **shape)
    for axis in axes.ravel():
        axis.set_axis_off()
    for i, (image, heat) in enumerate(zip(images, maps)):
        above, below = axes[2 * (i // columns) :, i % columns][:2]
        above.imshow(image.transpose(1, 2, 0).squeeze(), cmap="gray", vmin=0, vmax=255)
        shown = below.imshow(heat, cmap="YlOrRd", vmin=0, vmax=1)
        grey = image.mean(0)
        if grey.min() < 127.5 < grey.max():
            below.contour(grey, levels=[127.5], colors="black", linewidths=0.7)
        if titles is not None:
            above.set_title(titles[i], fontsize=8)
    bar = figure.colorbar(shown, ax=axes, shrink=0.8, aspect=25, pad=0.01)
    bar.set_label("heat / its maximum", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    return figure


def plot_density_difference(axis, difference, x_edges, y_edges, query):
    """Where one model's samples are denser (red) than another's (blue), with the query (2,) as a star.

    `difference` (X, Y): the first index is that of x, as `numpy.histogram2d` has it. Limits are symmetric, so white is
    no difference. Returns the mesh, for a colour bar.
    """
    limit = np.abs(difference).max() or 1.0  # two equal histograms are white, too
    mesh = axis.pcolormesh(x_edges, y_edges, np.asarray(difference).T, cmap="RdBu_r", vmin=-limit, vmax=limit)
    _mark_query(axis, query)
    return mesh


def plot_map(axis, points, labels, query=None, names=None):
    """Points (N, 2) of a map, coloured by label (N,), with a legend beside it and the query (2,) as a star.

    names: of the classes, indexed by label; the labels themselves without. A label has one colour in every map, also
    where others are absent.
    """
    points, labels = np.asarray(points), np.asarray(labels)
    several = max(labels.max() + 1, len(names or ()))
    palette = [*sns.color_palette("tab10"), "black"] if several <= 11 else sns.color_palette("husl", several)
    for label in np.unique(labels):
        x, y = points[labels == label].T
        name = str(label) if names is None else names[label]
        axis.scatter(x, y, s=7, color=palette[label], alpha=0.6, linewidths=0, label=name)
    if query is not None:
        _mark_query(axis, query)
    legend = axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, frameon=False, handletextpad=0.2)
    for handle in legend.legend_handles:
        handle.set(alpha=1, sizes=[90 if handle.get_label() == "query" else 24])
    axis.set(xticks=[], yticks=[], xlabel="first coordinate", ylabel="second coordinate")


def plot_forest(axis, rows, label="effect"):
    """Effects with their intervals, one line per row from the top: dicts of name, value, low, high. A filled dot where
    the interval excludes zero, an open one where it does not.
    """
    for place, row in enumerate(rows):
        if not row["low"] <= row["value"] <= row["high"]:
            raise ValueError(f"{row['name']}: the value {row['value']} is not within {row['low']} to {row['high']}.")
        clear = row["low"] > 0 or row["high"] < 0
        axis.hlines(place, row["low"], row["high"], color="C0", lw=1.5)
        axis.plot(row["value"], place, "o", color="C0", mfc="C0" if clear else "white", ms=5)
    axis.axvline(0, color="0.5", ls="--", lw=1, zorder=0)
    axis.set(yticks=range(len(rows)), yticklabels=[row["name"] for row in rows], ylim=(len(rows) - 0.4, -0.6))
    axis.set_xlabel(label)
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)


def plot_ternary(axis, points, winners, names, colours, corners):
    """Which model wins where in a triangle of weights: points (M, 3), a regular grid of weights that sum to 1; winners
    (M,), an index into `names` and `colours`, or -1 for none (grey).

    A corner is all weight on one of the three dimensions `corners`: bottom left, bottom right, top.
    """
    points, winners = np.asarray(points, float), np.asarray(winners)
    if not np.allclose(points.sum(1), 1) or (points < -1e-9).any():
        raise ValueError("Weights are not negative and sum to 1 in each row; divide each row by its sum.")
    triangle = np.array([[0, 0], [1, 0], [0.5, np.sqrt(3) / 2]])
    step = np.diff(np.unique(points[:, 0].round(9))).min()
    turns = np.radians(30 + 60 * np.arange(6))
    hexagon = step / np.sqrt(3) * np.column_stack([np.cos(turns), np.sin(turns)])
    outline = Polygon(triangle, fill=False, ec="0.2", lw=1, zorder=3)
    axis.add_patch(outline)
    for winner in [*range(len(names)), -1]:
        cells = (points @ triangle)[winners == winner][:, None] + hexagon
        name, colour = ("none", "0.85") if winner == -1 else (names[winner], colours[winner])
        drawn = axis.add_collection(
            PolyCollection(cells, fc=colour, ec=colour, lw=0.3, label=name if len(cells) else None)
        )
        drawn.set_clip_path(outline)
    for place, text, (across, up) in zip(triangle, corners, ((0, -1), (0, -1), (0, 1))):
        shift = {"xytext": (across, 5 * up), "textcoords": "offset points"}
        axis.annotate(text, place, **shift, ha="center", va="top" if up < 0 else "bottom", fontsize=9)
    axis.set(xlim=(-0.12, 1.12), ylim=(-0.1, 0.97), aspect="equal")
    axis.set_axis_off()
    axis.legend(loc="upper right", fontsize=8, frameon=False)


def _mark_query(axis, query):
    axis.scatter(*query, marker="*", s=170, color="gold", ec="black", label="query", zorder=3)
