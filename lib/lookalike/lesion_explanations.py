"""Why a lesion classifier says melanoma, and what a StyleGAN2's latent space can change: XRAI, TCAV, SeFa, neighbours.

Paper: Carrasco Limeros et al. 2022 (arXiv 2208.11702), Sec. 3.3 and 4.3, Fig. 4 and 5. Chapter: stylegan2_dermatology.
Methods: Kapishnikov et al. 2019, XRAI; Kim et al. 2018, TCAV; Shen and Zhou 2021, SeFa. The paper shows heat maps and
moved images. Here each gets a number on images whose frame, hairs and lesion are known, and a control.
"""

import base64
import html
import io
import itertools
import json

import numpy as np
import torch
from PIL import Image

from lookalike.metrics import as_images
from lookalike.metrics.intervals import paired_over_seeds
from lookalike.privacy.randomness import stream

KEEP = 0.15  # the paper's share of an image that counts as salient
XRAI_SIDE = 224  # pixels: the side for which XRAI's constants were chosen
MARGIN = 0.25  # an edge case: right, and the true class's probability below 1 - MARGIN
FARTHEST = 3.0  # SeFa moves w by up to this, both ways
_NUMBER = itertools.count(1)


# --- SeFa: directions of a generator's latent space ----------------------------------------------------------


def sefa(generator, layers=None, normalise="columns"):
    """Directions of w that change a StyleGAN2's styles most: eigenvalues (w_dim,), directions (w_dim, w_dim), float64.

    Eigenvectors of the sum of a a^T over all style weights a, vectors (w_dim,), one per channel of each layer: row i of
    directions, of length 1, belongs to eigenvalue i, and eigenvalues fall. Its largest entry is positive, since an
    eigenvector has no sign of its own. No image and no label is used.

    layers: which of `generator.style_layers()`, None for all. normalise: "columns" brings every a to length 1 first
    (genforce's code; they are the columns of its matrix), "none" leaves them as they are. differs: genforce calls a
    solver that does not sort, so the paper's second, fourth and sixth direction have no number that is the same
    everywhere; here they are directions[1], [3] and [5].
    """
    found = list(generator.style_layers())
    chosen = range(len(found)) if layers is None else list(layers)
    if not chosen or not set(chosen) <= set(range(len(found))):
        raise ValueError(f"layers are some of 0 to {len(found) - 1}, not {layers}.")
    if normalise not in ("columns", "none"):
        raise ValueError(f'normalise is "columns" or "none", not {normalise!r}.')
    styles = torch.cat([found[i].weight.detach().cpu().double() for i in chosen])
    if normalise == "columns":
        styles = styles / styles.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    values, vectors = torch.linalg.eigh(styles.T @ styles)
    values, directions = values.flip(0), vectors.T.flip(0)
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    return values.clamp_min(0).numpy(), (directions * largest.sign()).numpy()


@torch.no_grad()
def move(generator, w, direction, distances, noise="fixed"):
    """Images (N, T, C, S, S) in [-1, 1] of w (N, w_dim) moved along a direction (w_dim,) by each of T distances.

    All layers get the moved w. The direction is brought to length 1: distances are lengths in w. The noise maps are
    the same for every image, so that what changes is the direction's work.
    """
    w, direction = torch.as_tensor(w), torch.as_tensor(direction).to(torch.as_tensor(w).dtype)
    if w.ndim != 2 or direction.shape != w.shape[1:]:
        raise ValueError(
            f"A direction of {w.shape[-1]} numbers is needed for w {tuple(w.shape)}, not {direction.shape}."
        )
    if not direction.any():
        raise ValueError("A direction has a length; this one is 0 everywhere.")
    step = direction / direction.norm()
    moved = [generator.synthesise(w + float(distance) * step, noise=noise) for distance in distances]
    return torch.stack(moved, 1).clamp(-1, 1)


# --- XRAI: which regions count -------------------------------------------------------------------------------


def xrai(network_function, images, targets, keep=KEEP, steps=25):
    """XRAI's heat (N, H, W), float32, and its salient part, bool (N, H, W), of images for the classes `targets` (N,).

    network_function: images (B, C, H, W) to outputs (B, K) that can be differentiated; the paper explains the
    probability of the class predicted. The computation is PAIR's package `saliency`, its fast variant: integrated
    gradients against an all dark and an all bright image, `steps` each, averaged over segments. Heat is a mean per
    pixel; it can be negative, evidence against the target. Salient are the hottest segments until they fill at least
    `keep` of the image: segments come whole, so it may be more.

    differs: the package's constants are meant for 224 px. Its segments are dilated by 5 px and below 50 px ignored:
    at 32 px that would blur everything, so both follow the image's size here.
    """
    images, targets = as_images(images), np.asarray(targets)
    _check_xrai(images, targets, keep, steps)
    maps = np.stack([_xrai_map(network_function, image, int(t), steps) for image, t in zip(images, targets)])
    return maps.astype(np.float32), salient(maps, keep)


def salient(maps, keep=KEEP):
    """The hottest `keep` of each map (N, H, W), bool; places as hot as the last one of them count, too."""
    maps = np.asarray(maps)
    edges = np.sort(maps.reshape(len(maps), -1), 1)[:, -max(1, round(keep * maps[0].size))]
    return maps >= edges[:, None, None]


def heat_share(maps, regions):
    """Each map's share of positive heat that lies in its region: (N,), from 0 to 1; NaN where no heat is positive.

    maps (N, H, W); regions, bool (N, H, W) or (H, W). Even heat gives the region's area: read it beside that.
    """
    heat = np.asarray(maps, np.float64).clip(min=0)
    regions = np.broadcast_to(regions, heat.shape)
    total = heat.sum((1, 2))
    return np.divide((heat * regions).sum((1, 2)), total, out=np.full(len(heat), np.nan), where=total > 0)


def disc(image_size, radius):
    """Pixels within `radius` of the middle: bool (S, S), or (N, S, S) for N radii. The image's half side is 1."""
    line = (np.arange(image_size) + 0.5) / image_size * 2 - 1
    return np.hypot(line, line[:, None]) <= np.asarray(radius, float)[..., None, None]


def frame_ring(image_size, inner=1.0):
    """Where a dermatoscope's round frame is dark: bool (S, S), outside the disc of radius `inner`."""
    return ~disc(image_size, inner)


def _check_xrai(images, targets, keep, steps):
    if targets.shape != (len(images),):
        raise ValueError(f"{len(images)} images and targets of shape {targets.shape}: give one class per image.")
    if not 0 < keep <= 1 or steps < 2:
        raise ValueError(f"keep is a share above 0 up to 1 and steps 2 or more, not {keep} and {steps}.")
    if (images.flatten(1).amax(1) == images.flatten(1).amin(1)).any():
        raise ValueError("An image of one colour has no segments: leave it out.")


def _xrai_map(network_function, image, target, steps):
    from saliency.core import XRAI, XRAIParameters  # with its segmentation a second to import
    from saliency.core.xrai import _get_segments_felzenszwalb  # the public call has no word for the dilation

    pixels = image.permute(1, 2, 0).numpy()
    scale = pixels.shape[0] / XRAI_SIDE
    segments = _get_segments_felzenszwalb(pixels, dilation_rad=max(1, round(5 * scale)))
    settings = XRAIParameters(steps=steps, algorithm="fast")
    settings.experimental_params["min_pixel_diff"] = max(1, round(50 * scale**2))
    gradients = _gradients_of(network_function, target)
    return XRAI().GetMask(pixels, gradients, segments=segments, batch_size=steps, extra_parameters=settings)


def _gradients_of(network_function, target):
    """The package's way to ask: pictures (B, H, W, C) in, gradients of the target's output of that shape out."""
    from saliency.core import INPUT_OUTPUT_GRADIENTS

    def call(pictures, call_model_args=None, expected_keys=None):
        x = torch.tensor(pictures, dtype=torch.float32).permute(0, 3, 1, 2).requires_grad_()
        (found,) = torch.autograd.grad(network_function(x)[:, target].sum(), x)
        return {INPUT_OUTPUT_GRADIENTS: found.permute(0, 2, 3, 1).numpy()}

    return call


# --- TCAV: which concepts count ------------------------------------------------------------------------------


@torch.no_grad()
def activations(network, layer, images, batch_size=256):
    """What a layer gives for images (N, C, H, W), flattened: (N, F), float64 numpy."""
    kept, images = [], as_images(images)
    hook = layer.register_forward_hook(lambda _, __, out: kept.append(out.detach().flatten(1).cpu().double()))
    try:
        network.eval()
        for batch in images.split(batch_size):
            network(batch)
    finally:
        hook.remove()
    if sum(map(len, kept)) != len(images):
        raise ValueError("The layer did not run once for each image; take one of network.modules().")
    return torch.cat(kept).numpy()


def sensitivities(network, layer, images, target, steps=5):
    """How the target's logit grows with the layer's activations: (N, F), float64 numpy.

    The mean gradient on the straight way from the activations of a mid-grey image, captum's LayerIntegratedGradients
    without the product with the activations, `steps` = 5: what the authors' code gives to TCAV. Kim et al. take the
    gradient at the image itself.
    """
    from captum.attr import LayerIntegratedGradients  # seconds to import

    network.eval()
    method = LayerIntegratedGradients(network, layer, multiply_by_inputs=False)
    found = method.attribute(as_images(images).requires_grad_(), target=int(target), n_steps=steps)
    return found.detach().flatten(1).cpu().double().numpy()


def concept_vector(concept, others):
    """The direction that tells a concept's activations (N, F) from others' (M, F), and how well it does.

    A unit vector (F,), the normal of a logistic regression's plane, that points to the concept, and the share of right
    answers on the third of the rows that was held out, 0 to 1: near a half the concept is not there to be found.
    """
    from sklearn.linear_model import LogisticRegression  # seconds to import

    if min(len(concept), len(others)) < 3:
        raise ValueError(f"A concept takes 3 images or more of either kind, not {len(concept)} and {len(others)}.")
    x, y = np.concatenate([concept, others]), np.repeat([1, 0], [len(concept), len(others)])
    held_out = np.concatenate([np.arange(len(part)) % 3 == 2 for part in (concept, others)])
    plane = LogisticRegression(C=1.0, max_iter=1000).fit(x[~held_out], y[~held_out])
    normal = plane.coef_[0]
    return normal / np.linalg.norm(normal), float(plane.score(x[held_out], y[held_out]))


def tcav(sensitivity, concept, random_sets):
    """TCAV of one concept: do a class's inputs grow more towards it than towards random sets of images?

    sensitivity (N, F) of the inputs (`sensitivities`); concept (M, F) and random_sets, an even number of arrays (M, F),
    activations of the same layer. The first half of the random sets are the other side of each vector; in the second
    half each plays the concept once, against the same other side: pairs of random sets, as Kim et al. ask for.

    Returns lists over the pairs: "scores", TCAV's own, the share of inputs whose derivative along the vector is above 0
    (0 to 1, 1/2 says nothing); "random_scores"; "derivatives", the mean derivative along the unit vector over the
    length of the mean sensitivity (above 0: speaks for the class); "random_derivatives"; "accuracies", of the vectors
    on held-out rows, and "random_accuracies"; and the paired differences concept - random with their tests over the
    random sets (`paired_over_seeds`: "p" Student's as in the paper, "p_flips" exact): "score_test", "derivative_test",
    "accuracy_test". What is random is the sets, neither the concept's images nor the network's training: a vector that
    cannot tell its own concept (accuracy no better than random) can still pass the other two tests, for it is the same
    handful of images each time.
    """
    if len(random_sets) % 2 or len(random_sets) < 4:
        raise ValueError(f"Random sets come in two halves of 2 or more each, not {len(random_sets)} in all.")
    half = len(random_sets) // 2
    pairs = zip(random_sets[half:], random_sets[:half])
    own = [_scored(sensitivity, *concept_vector(concept, other)) for other in random_sets[:half]]
    chance = [_scored(sensitivity, *concept_vector(random, other)) for random, other in pairs]
    found = {}
    for name, plural, values, random in zip(_PARTS, _PLURALS, zip(*own), zip(*chance)):
        found |= {plural: list(values), f"random_{plural}": list(random)}
        found[f"{name}_test"] = paired_over_seeds(values, random)
    return found


_PARTS, _PLURALS = ("score", "derivative", "accuracy"), ("scores", "derivatives", "accuracies")


def _scored(sensitivity, vector, accuracy):
    along = sensitivity @ vector
    length = np.linalg.norm(sensitivity.mean(0))
    if not length > 0:
        raise ValueError("The class does not depend on this layer at all: every sensitivity is 0.")
    return float((along > 0).mean()), float(along.mean() / length), accuracy


# --- edge cases and their neighbours -------------------------------------------------------------------------


def edge_cases(probabilities, labels, margin=MARGIN):
    """Rows that the classifier has right but is unsure of, in their order, int (M,).

    probabilities: (N, K), or (N,) of class 1. Right: the true class has the largest (in two classes, above a half);
    unsure: it lies more than `margin` below 1. (In the authors' code as a comment: label - p > 0.25.)
    """
    probabilities, labels = np.asarray(probabilities, float), np.asarray(labels)
    if probabilities.ndim == 1:
        probabilities = np.column_stack([1 - probabilities, probabilities])
    if labels.shape != probabilities.shape[:1] or not ((labels >= 0) & (labels < probabilities.shape[1])).all():
        raise ValueError("Each row of probabilities needs its label, a number of one of their columns.")
    own = probabilities[np.arange(len(labels)), labels]
    return np.flatnonzero((probabilities.argmax(1) == labels) & (1 - own > margin))


def neighbours_in_z(z, count=1, radius=0.1, clip=True, generator=None):
    """Neighbours (N, count, latent_dim) of latents z (N, latent_dim): uniform numbers within +-radius are added.

    clip=True cuts every entry to [-1, 1], as published: about a third of a standard normal's entries lie outside, so
    the neighbours gather around the clipped z. Their cosine to z is 0.949 in the mean, without the cut 0.998 (512
    entries, radius 0.1).
    """
    z = _latents(z)
    offset = 2 * torch.rand(len(z), count, z.shape[1], generator=generator) - 1
    found = z[:, None] + radius * offset
    return found.clamp(-1, 1) if clip else found


def neighbours_in_w(w, angle, count=1, centre=None, generator=None):
    """Neighbours (N, count, w_dim) of w (N, w_dim) in random directions, each exactly `angle` degrees away.

    Angles are seen from `centre` (w_dim,), such as the mean w, or from 0; the distance from there stays. Nothing is
    cut.
    """
    w = _latents(w)
    if not 0 < angle < 180:
        raise ValueError(f"An angle is above 0 and below 180 degrees, not {angle}.")
    seen = w if centre is None else w - torch.as_tensor(centre)
    length = seen.norm(dim=1)[:, None, None]
    if (length == 0).any():
        raise ValueError("A latent at the centre has no direction to turn from.")
    along = seen[:, None] / length
    drawn = torch.randn(len(w), count, w.shape[1], generator=generator).to(w.dtype)
    across = drawn - (drawn * along).sum(2, keepdim=True) * along
    across = across / across.norm(dim=2, keepdim=True)
    turn = torch.deg2rad(torch.tensor(float(angle), dtype=w.dtype))
    return w[:, None] - seen[:, None] + length * (turn.cos() * along + turn.sin() * across)


def _latents(z):
    z = torch.as_tensor(z)
    if z.ndim != 2 or z.shape[1] < 2:
        raise ValueError(f"Latents have the shape (N, 2 or more), not {tuple(z.shape)}.")
    return z


# --- sliders -------------------------------------------------------------------------------------------------


@torch.no_grad()
def slider_frames(generator, seed=0, steps=9, columns=4, directions=3, farthest=FARTHEST):
    """What the chapter's sliders show: two dicts by name, pictures uint8 (steps, C, S, columns * S), and their values.

    "truncation": psi from 0, the mean image, to 1; "class": w between the first and the last class of the same z (left
    out of an unconditional generator); "direction 1" and on: along SeFa's first directions, by -farthest to farthest.
    Each picture shows `columns` samples side by side, whose classes take turns. Noise maps are fixed.
    """
    if steps < 2 or columns < 1:
        raise ValueError(f"A slider has 2 steps or more of 1 picture or more, not {steps} of {columns}.")
    z = generator.noise(columns, stream(seed, "sliders"))
    classes = generator.num_classes
    labels = torch.arange(columns) % classes if classes else None
    w, psi = generator.map(z, labels), np.linspace(0, 1, steps)
    w_by_name = {"truncation": [generator.map(z, labels, truncation=float(share)) for share in psi]}
    values = {"truncation": [f"psi = {share:.2f}" for share in psi]}
    if classes > 1:
        first, last = (generator.map(z, torch.full((columns,), label)) for label in (0, classes - 1))
        w_by_name["class"] = [first + float(share) * (last - first) for share in psi]
        values["class"] = [f"{share:.0%} of class {classes - 1}" for share in psi]
    distances = np.linspace(-farthest, farthest, steps)
    for i, direction in enumerate(sefa(generator)[1][:directions]):
        step = torch.as_tensor(direction).to(w.dtype)
        w_by_name[f"direction {i + 1}"] = [w + float(distance) * step for distance in distances]
        values[f"direction {i + 1}"] = [f"{distance:+.2f}" for distance in distances]
    return {name: _pictures(generator, moved) for name, moved in w_by_name.items()}, values


def _pictures(generator, moved):
    images = torch.stack([generator.synthesise(w, noise="fixed").clamp(-1, 1) for w in moved])
    side_by_side = images.permute(0, 2, 3, 1, 4).flatten(3)  # (steps, C, S, columns * S)
    return ((side_by_side + 1) * 127.5).round().byte().cpu().numpy()


def slider_html(frames, labels=None, enlarged=3):
    """A piece of HTML with one slider per name: nothing to load, several on one page do not meet.

    frames: dict of name -> uint8 (steps, C, H, W), C 1 or 3, at least two steps; labels: dict of name -> one text per
    step, shown and read aloud (the step's number without). Each set of frames is one PNG in the page, which the slider
    shifts; without script the middle frame shows. Names and texts are escaped.
    """
    if not frames:
        raise ValueError("A page with sliders needs frames of one name or more.")
    labels = labels or {}
    if unknown := set(labels) - set(frames):
        raise ValueError(f"There are labels for {sorted(unknown)}, but no frames.")
    number = next(_NUMBER)
    parts = [_slider(f"lookalike-slider-{number}-{i}", name, frames[name], labels.get(name), enlarged)
             for i, name in enumerate(frames)]  # fmt: skip
    return f'<div style="display:flex;flex-wrap:wrap;gap:1.2em">{"".join(parts)}</div>'


_SLIDER = """<div id="{id}" data-values="{values}">
<label for="{id}-range">{name}</label>: <output for="{id}-range">{value}</output><br>
<div role="img" aria-label="{name}" style="width:{width}px;max-width:100%;aspect-ratio:{ratio};\
background:url(data:image/png;base64,{sprite}) {place:.4f}% 0/{stretch}% 100%;image-rendering:pixelated"></div>
<input id="{id}-range" type="range" min="0" max="{last}" value="{middle}" step="1" aria-valuetext="{value}" \
style="width:{width}px;max-width:100%">
<script>(function () {{
  var box = document.getElementById("{id}"), range = box.querySelector("input");
  var values = JSON.parse(box.dataset.values);
  range.addEventListener("input", function () {{
    box.querySelector("[role=img]").style.backgroundPosition = 100 * range.value / range.max + "% 0";
    box.querySelector("output").textContent = values[range.value];
    range.setAttribute("aria-valuetext", values[range.value]);
  }});
}})();</script>
</div>"""


def _slider(identity, name, frames, values, enlarged):
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or len(frames) < 2 or frames.shape[1] not in (1, 3):
        raise ValueError(f"{name!r} needs uint8 frames (2 or more, 1 or 3, H, W), not {frames.dtype} {frames.shape}.")
    values = [str(value) for value in (range(1, len(frames) + 1) if values is None else values)]
    if len(values) != len(frames):
        raise ValueError(f"{name!r} has {len(frames)} frames and {len(values)} labels: give one for each.")
    last, middle = len(frames) - 1, len(frames) // 2
    height, width = frames.shape[2:]
    return _SLIDER.format(
        id=identity, name=html.escape(str(name)), values=html.escape(json.dumps(values)), last=last, middle=middle,
        value=html.escape(values[middle]), width=enlarged * width, ratio=f"{width}/{height}", sprite=_sprite(frames),
        place=100 * middle / last, stretch=100 * len(frames),
    )  # fmt: skip


def _sprite(frames):
    """All frames side by side as a PNG in base64."""
    side_by_side = np.concatenate(list(frames.transpose(0, 2, 3, 1)), 1)
    stream_ = io.BytesIO()
    Image.fromarray(side_by_side.squeeze(2) if side_by_side.shape[2] == 1 else side_by_side).save(stream_, "PNG")
    return base64.b64encode(stream_.getvalue()).decode()
