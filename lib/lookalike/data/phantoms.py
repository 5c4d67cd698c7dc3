"""Made images with known factors, in the shape of each paper's data, for runs that have no data at hand.

Nothing here is a measurement; everything is known: class, subject, site, and each factor that shaped an
image. So a leak, a duplicate or a shift can be planted and must be found. Image i of seed s is a function of
(s, i) alone, whatever n is: every subject and every image draws from a generator of its own, and each image
is rendered by itself.
"""

import dataclasses
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.ndimage import gaussian_filter

from lookalike.data.image_set import ImageSet

ELSEWHERE = 1000  # added to a seed: patients of another hospital


@dataclass(frozen=True)
class Phantoms:
    """Made images and the factors behind them, one value per image and factor."""

    image_set: ImageSet
    factors: dict[str, np.ndarray]


def grey28(n, seed=0, sites=1, split="all", image_size=28) -> Phantoms:
    """Ten shapes as soft grey blobs on a mottled ground, (n, 1, 28, 28); one image per subject."""

    def render(i):
        rng = _rng(seed, "grey", i)
        factors = {
            "angle": rng.uniform(-0.45, 0.45),
            "scale": rng.uniform(0.8, 1.15),
            "contrast": rng.uniform(0.5, 0.95),
            "shift_x": rng.uniform(-0.2, 0.2),
            "shift_y": rng.uniform(-0.2, 0.2),
        }
        u, v = _placed(image_size, factors["shift_x"], factors["shift_y"], factors["angle"], factors["scale"])
        shape = _inside(_SHAPES[_SHAPE_NAMES[i % 10]](u, v), 0.15)
        image = 0.08 + 0.03 * _cloud(rng, image_size, 2.5) + factors["contrast"] * shape
        return image + 0.02 * rng.standard_normal(image.shape), factors

    return _gather(
        "phantom_grey28",
        render,
        n,
        seed,
        sites,
        split,
        classes=_SHAPE_NAMES,
        images_per_subject=1,
        label_of=lambda i: i % 10,
        stand_in_for="mnist, octmnist, organamnist",
    )


def mammography(n, seed=0, sites=1, split="all", image_size=128) -> Phantoms:
    """Patches with a mass, (n, 1, 128, 128); images 2p and 2p+1 are the CC and MLO view of patient p.

    Malignant masses (label 0, as in the real set) are irregular, spiculated, ill-defined and often larger and
    denser, benign ones round or oval with a clear margin; the two overlap. Both views share the mass and how
    dense the breast is, not the tissue's texture.
    """

    def render(i):
        patient, malignant = i // 2, (i // 2) % 2 == 0
        shared, own = _rng(seed, "mammo", patient), _rng(seed, "view", i)
        factors = {
            "malignant": float(malignant),
            "view": i % 2,
            "density": shared.uniform(0, 1),
            "radius": shared.uniform(0.28, 0.62) if malignant else shared.uniform(0.20, 0.54),
            "contrast": shared.uniform(0.12, 0.30) if malignant else shared.uniform(0.08, 0.26),
            "angle": shared.uniform(0, np.pi),
            "irregularity": shared.uniform(0.06, 0.16) if malignant else shared.uniform(0.0, 0.07),
            "spiculation": shared.uniform(0.2, 1.0) if malignant else max(0.0, shared.uniform(-0.5, 0.3)),
            "margin": shared.uniform(0.25, 0.5) if malignant else shared.uniform(0.10, 0.35),
        }
        contour = shared.uniform(0, 2 * np.pi, 9), shared.uniform(0.3, 1, 9), shared.uniform(0, 1, 24)
        brightness = 0.26 + 0.38 * factors["density"] + 0.05 * shared.standard_normal()
        image = brightness + _breast_tissue(own, image_size, factors["density"])
        image = image + _mass(own, image_size, factors, contour, view=i % 2)
        if own.random() < 0.08:
            image = image * _skin_line(own, image_size)
        return image + 0.008 * own.standard_normal(image.shape), factors

    return _gather(
        "phantom_mammography",
        render,
        n,
        seed,
        sites,
        split,
        classes=("malignant", "benign"),
        images_per_subject=2,
        label_of=lambda i: (i // 2) % 2,
        stand_in_for="cbis_ddsm",
    )


def mammography_elsewhere(n, seed=0, split="all", image_size=128) -> Phantoms:
    """The same patches from a second site alone, other patients: what an external test set is to `mammography`."""
    both = mammography(2 * n, seed + ELSEWHERE, sites=2, split=split, image_size=image_size)
    there = np.flatnonzero(both.factors["site"] == 1)[:n]
    image_set = dataclasses.replace(
        both.image_set.subset(there), name="phantom_mammography_elsewhere", stand_in_for="bcdr"
    )
    return Phantoms(image_set, {name: values[there] for name, values in both.factors.items()})


def vertebrae(n, seed=0, sites=1, split="all", image_size=64) -> Phantoms:
    """Vertebral bodies as 9 sagittal slices 4 mm apart, (n, 9, 64, 64) at 1 mm; six units per exam, two per
    region.
    """

    def render(i):
        exam, region = _rng(seed, "exam", i // 6), i % 3
        own = _rng(seed, "unit", i)
        tissue = _spine_tissue(exam)
        factors = {**tissue, **_unit_shape(own, _REGION_MM[region], size=exam.uniform(0.92, 1.1))}
        texture = [_cloud(own, image_size, 1.6) for _ in range(2)]
        image = _spine_volume(image_size, factors, texture) * exam.uniform(0.85, 1.1)
        return image + 0.014 * own.standard_normal(image.shape), factors

    return _gather(
        "phantom_vertebrae",
        render,
        n,
        seed,
        sites,
        split,
        classes=("cervical", "thoracic", "lumbar"),
        images_per_subject=6,
        label_of=lambda i: i % 3,
        stand_in_for="the private MR volumes of pgan",
        subject_kind="made-up exam",
    )


def spines(n, seed=0, sites=1, split="all", image_size=64, visits=3) -> Phantoms:
    """Whole spines at several visits, (n, 9, 64, 64) at 1 mm, with pGAN's class prior of .25, .55 and .20.

    Image i is unit i % 20 (from the head down 5 cervical, 11 thoracic, 4 lumbar) of visit i // 20 % visits of patient
    i // (20 * visits). A patient's units share tissue, size, tilt and gain. A unit keeps its shape and texture from
    visit to visit, so its images are near-twins: what changes is the gain, the place (by up to half a mm either way),
    the noise and, slowly, bone and disc.
    """
    return _spines("phantom_spines", n, seed, split, image_size, visits, "F2305, the private MR volumes of pgan", sites)


def spines_elsewhere(n, seed=0, split="all", image_size=64) -> Phantoms:
    """One visit each of other patients, all on the second scanner: what A2209 is to `spines`."""
    stand_in_for = "A2209, the private MR volumes of pgan"
    return _spines(
        "phantom_spines_elsewhere", n, seed + ELSEWHERE, split, image_size, 1, stand_in_for, sites=1, first_site=1
    )


def _spines(name, n, seed, split, image_size, visits, stand_in_for, sites, first_site=0):
    def render(i):
        unit, visit, patient = i % 20, i // 20 % visits, i // (20 * visits)
        person = _spine_patient(_rng(seed, "spine", patient))
        shape, own = _rng(seed, "spine unit", 20 * patient + unit), _rng(seed, "spine image", i)
        factors = {
            **_spine_visit(_rng(seed, "spine visit", visits * patient + visit), person, visit),
            **_unit_shape(shape, _level_mm(unit), person["size"], person["tilt"]),
            "size": person["size"],
            "habitual_tilt": person["tilt"],
            "shift_x_mm": own.uniform(-0.5, 0.5),
            "shift_y_mm": own.uniform(-0.5, 0.5),
            "unit": unit,
            "visit": visit,
            "patient": patient,
        }
        shift = np.array([factors["shift_x_mm"], factors["shift_y_mm"]]) / 32
        whole_pixels = tuple((shift[::-1] * image_size / 2).round().astype(int))
        texture = [np.roll(_cloud(shape, image_size, 1.6), whole_pixels, (0, 1)) for _ in range(2)]
        image = _spine_volume(image_size, factors, texture, shift) * factors["gain"]
        return image + 0.014 * own.standard_normal(image.shape), factors

    return _gather(
        name,
        render,
        n,
        seed,
        sites,
        split,
        classes=("cervical", "thoracic", "lumbar"),
        images_per_subject=20 * visits,
        label_of=lambda i: _REGION_OF_UNIT[i % 20],
        stand_in_for=stand_in_for,
        first_site=first_site,
    )


def dermoscopy(n, seed=0, sites=1, split="all", image_size=64, frame_probability=(0.0, 0.0)) -> Phantoms:
    """Colour lesions, (n, 3, 64, 64): benign 0, melanoma 1; four lesions per patient.

    `frame_probability` plants the round black frame of a dermatoscope with that probability in each of the
    two classes.
    """

    def render(i):
        malignant, patient, own = i % 2 == 1, _rng(seed, "skin", i // 4), _rng(seed, "lesion", i)
        factors = {
            "malignant": float(malignant),
            "redness": patient.uniform(0, 1),
            "skin": patient.uniform(0.72, 0.95),
            "radius": own.uniform(0.4, 0.68) if malignant else own.uniform(0.28, 0.52),
            "asymmetry": own.uniform(0.1, 0.3) if malignant else own.uniform(0.0, 0.13),
            "variegation": own.uniform(0.4, 1.0) if malignant else own.uniform(0.0, 0.45),
            "darkness": own.uniform(0.4, 0.85),
            "hairs": own.poisson(2.0),
            "frame": float(own.random() < frame_probability[int(malignant)]),
        }
        image = _lesion(own, image_size, factors)
        image = image * (1 - 0.75 * _hairs(own, image_size, factors["hairs"]))
        x, y = _grid(image_size)
        r = np.hypot(x, y)
        image = image * (1 - 0.12 * r**2)
        if factors["frame"]:
            image = image * _inside(r - own.uniform(0.95, 1.05), 0.08)
        return image + 0.012 * own.standard_normal(image.shape), factors

    return _gather(
        "phantom_dermoscopy",
        render,
        n,
        seed,
        sites,
        split,
        classes=("benign", "melanoma"),
        images_per_subject=4,
        label_of=lambda i: i % 2,
        stand_in_for="isic2019, isic2020",
    )


def dermoscopy_framed(n, seed=0, sites=1, split="all", image_size=64) -> Phantoms:
    """The lesions of `dermoscopy`, of which nine melanomas in ten and no benign lesion have a black frame."""
    found = dermoscopy(n, seed, sites, split, image_size, frame_probability=(0.0, 0.9))
    return dataclasses.replace(found, image_set=dataclasses.replace(found.image_set, name="phantom_dermoscopy_framed"))


def brain(n, seed=0, sites=1, split="all", image_size=64, slices_per_subject=8) -> Phantoms:
    """Axial brain slices, (n, 1, 64, 64), four grades of atrophy; a subject's neighbouring slices are near-
    twins.

    With the grade the ventricles and the furrows widen. Images k*8 .. k*8+7 are one subject from below
    upwards.
    """

    def render(i):
        subject, z = i // slices_per_subject, (i % slices_per_subject) / max(slices_per_subject - 1, 1)
        shared, own = _rng(seed, "head", subject), _rng(seed, "slice", i)
        grade = subject % 4
        factors = {
            "grade": float(grade),
            "z": z,
            "width": shared.uniform(0.60, 0.68),
            "length": shared.uniform(0.78, 0.86),
            "ventricles": 0.10 + 0.05 * grade + shared.normal(0, 0.015),
            "furrows": 0.16 + 0.07 * grade + shared.normal(0, 0.02),
            "gain": shared.uniform(0.85, 1.0),
        }
        folds = [_maze(shared, image_size, 7) for _ in range(2)]
        texture = [_cloud(shared, image_size, 2.0) for _ in range(2)]
        image = _brain_slice(image_size, factors, _between(folds, 0.3 * z), _between(texture, 0.3 * z))
        image = gaussian_filter(image, image_size / 250) * factors["gain"]
        return image + 0.012 * own.standard_normal(image.shape), factors

    return _gather(
        "phantom_brain",
        render,
        n,
        seed,
        sites,
        split,
        classes=("none", "very mild", "mild", "moderate"),
        images_per_subject=slices_per_subject,
        label_of=lambda i: (i // slices_per_subject) % 4,
        stand_in_for="alzheimer",
    )


# --- what all kinds share -----------------------------------------------------------------------------------


def _gather(
    name,
    render,
    n,
    seed,
    sites,
    split,
    *,
    classes,
    images_per_subject,
    label_of,
    stand_in_for,
    subject_kind="made-up patient",
    first_site=0,
):
    """Renders images 0..n-1, passes each through its subject's scanner and collects images and factors."""
    images, rows = [], []
    for i in range(n):
        image, factors = render(i)
        subject = i // images_per_subject
        # Sites change from one round of the classes to the next, so that site and class are independent.
        site = first_site + subject // len(classes) % sites
        image = image if image.ndim == 3 else image[None]
        images.append(_through_scanner(image, site, _rng(seed, "site", i)))
        rows.append({**factors, "site": site})
    subjects = np.array([f"{name}-{seed}-{i // images_per_subject}" for i in range(n)])
    labels = np.array([label_of(i) for i in range(n)], np.int64)
    image_set = ImageSet(
        np.stack(images),
        labels,
        subjects,
        classes,
        name,
        split,
        licence="Apache-2.0",
        restricted=False,
        origin="phantom",
        stand_in_for=stand_in_for,
        subject_kind=subject_kind,
    )
    return Phantoms(image_set, {key: np.array([row[key] for row in rows]) for key in rows[0]})


def _through_scanner(image, site, rng):
    """uint8 image of a site: site 1 is darker, softer and noisier than site 0."""
    if site:
        sigma = image.shape[-1] / 90
        image = 0.04 + 0.82 * gaussian_filter(image, (0, sigma, sigma)) + 0.02 * rng.standard_normal(image.shape)
    return (255 * image.clip(0, 1)).round().astype(np.uint8)


_KINDS = (
    "grey", "mammo", "view", "exam", "unit", "skin", "lesion", "head", "slice", "site",
    "spine", "spine unit", "spine visit", "spine image",
)  # fmt: skip


def _rng(seed, kind, i):
    """A generator for one subject or image, independent of all others."""
    return np.random.default_rng([seed, _KINDS.index(kind), i])


@lru_cache
def _grid(size):
    """x (to the right) and y (downwards) of the pixel centres in [-1, 1], each (size, size)."""
    line = (np.arange(size) + 0.5) / size * 2 - 1
    return np.broadcast_to(line, (size, size)), np.broadcast_to(line[:, None], (size, size))


def _placed(size, dx, dy, angle, scale):
    """The grid seen from a shape that is shifted, turned and scaled."""
    x, y = _grid(size)
    x, y = (x - dx) / scale, (y - dy) / scale
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def _inside(distance, softness):
    """1 inside (distance < 0), 0 outside, a smooth step of width `softness` between."""
    t = np.clip(0.5 - distance / softness, 0, 1)
    return t * t * (3 - 2 * t)


@lru_cache
def _spectrum(size, power, stretch, angle_step):
    fx, fy = np.fft.rfftfreq(size) * size, np.fft.fftfreq(size)[:, None] * size
    angle = angle_step * np.pi / 12
    along, across = fx * np.cos(angle) + fy * np.sin(angle), fy * np.cos(angle) - fx * np.sin(angle)
    frequency = np.hypot(along * stretch, across)
    frequency[0, 0] = np.inf
    return np.maximum(frequency, 1) ** (-power / 2) * np.isfinite(frequency)


def _cloud(rng, size, power, stretch=1.0, angle_step=0):
    """Noise (size, size) whose power falls as frequency**-power, mean 0, deviation 1; `stretch` draws it out
    along one of 12 directions.
    """
    noise = np.fft.rfft2(rng.standard_normal((size, size))) * _spectrum(size, power, stretch, angle_step)
    noise = np.fft.irfft2(noise, s=(size, size))
    return (noise - noise.mean()) / noise.std()


@lru_cache
def _ring(size, cycles):
    frequency = np.hypot(np.fft.rfftfreq(size) * size, np.fft.fftfreq(size)[:, None] * size)
    return np.exp(-np.square((frequency - cycles) / (0.3 * cycles)))


def _maze(rng, size, cycles):
    """Noise (size, size) with about `cycles` waves across, deviation 1: its zero lines run like folds or
    strands.
    """
    noise = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((size, size))) * _ring(size, cycles), s=(size, size))
    return noise / noise.std()


def _between(pair, t):
    """Moves from one texture to the other with t, keeping its deviation."""
    return np.cos(t) * pair[0] + np.sin(t) * pair[1]


def _box(u, v, a, b):
    """Signed distance to a rectangle of half sides a and b."""
    du, dv = np.abs(u) - a, np.abs(v) - b
    return np.hypot(np.maximum(du, 0), np.maximum(dv, 0)) + np.minimum(np.maximum(du, dv), 0)


_SHAPES = {
    "disc": lambda u, v: np.hypot(u, v) - 0.55,
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.5) - 0.14,
    "bar": lambda u, v: _box(u, v, 0.75, 0.17),
    "cross": lambda u, v: np.minimum(_box(u, v, 0.68, 0.15), _box(u, v, 0.15, 0.68)),
    "square": lambda u, v: _box(u, v, 0.48, 0.48),
    "frame": lambda u, v: np.abs(_box(u, v, 0.5, 0.5)) - 0.12,
    "triangle": lambda u, v: np.maximum(v - 0.45, 0.87 * np.abs(u) - 0.5 * v - 0.35),
    "crescent": lambda u, v: np.maximum(np.hypot(u, v) - 0.62, 0.48 - np.hypot(u - 0.3, v)),
    "two discs": lambda u, v: np.hypot(np.abs(u) - 0.42, v) - 0.3,
    "stripes": lambda u, v: _box(u, np.abs(np.abs(v) - 0.25) - 0.25, 0.62, 0.09),
}
_SHAPE_NAMES = tuple(_SHAPES)


# --- mammography --------------------------------------------------------------------------------------------


def _breast_tissue(rng, size, density):
    """Cloudy fat and gland with fine strands that follow one main direction."""
    direction = int(rng.integers(12))
    clouds = 0.05 * _cloud(rng, size, 3.4) + 0.03 * _cloud(rng, size, 2.8, 0.4, direction)
    strands = np.exp(-np.square(_cloud(rng, size, 3.6, 0.3, direction) / 0.08))
    threads = np.exp(-np.square(_maze(rng, size, 6) / 0.12)) * _inside(-_cloud(rng, size, 3.4), 1.5)
    return clouds + (0.03 + 0.04 * density) * gaussian_filter(strands + threads, size / 160)


def _mass(rng, size, factors, contour, view):
    """The mass as an addition of brightness; the other view is turned and a little flattened."""
    phases, weights, spokes = contour
    angle = factors["angle"] + 0.9 * view + rng.uniform(-0.15, 0.15)
    u, v = _placed(size, rng.uniform(-0.15, 0.15), rng.uniform(-0.15, 0.15), angle, 1.0)
    v = v * (1.25 - 0.2 * view)
    r, theta = np.hypot(u, v), np.arctan2(v, u)
    wobble = sum(w * np.cos((k + 2) * theta + p) / (1 + 0.25 * k) for k, (w, p) in enumerate(zip(weights, phases)))
    edge = factors["radius"] * (1 + factors["irregularity"] * wobble)
    body = _inside(r - edge, factors["margin"]) * (1 + 0.12 * _cloud(rng, size, 2.8))
    # Between two ridges the height falls to nothing, so each ridge becomes a ray of its own length.
    turns = np.linspace(-np.pi, np.pi, 2 * len(spokes) + 1)
    ridge = np.interp(
        theta + 0.15 * np.sin(3 * r + angle),
        turns,
        np.append(np.stack([spokes, 0 * spokes], 1).ravel(), spokes[0]),
    )
    rays = ridge**3 * _inside(r - edge * (1 + 1.6 * ridge), 0.3) * _inside(0.6 * edge - r, 0.3)
    return factors["contrast"] * (body + 0.7 * factors["spiculation"] * rays)


def _skin_line(rng, size):
    """Air beyond the skin in one corner."""
    u, _ = _placed(size, 0, 0, rng.uniform(0, 2 * np.pi), 1.0)
    x, y = _grid(size)
    return 0.05 + 0.95 * _inside(u + 0.12 * (x**2 + y**2) - rng.uniform(0.6, 0.9), 0.25)


# --- vertebrae ----------------------------------------------------------------------------------------------

# depth, height, disc and width of a body in mm, and the tilt of the spine, for cervical, thoracic and lumbar.
_REGION_MM = ((16, 13, 5, 24, 0.18), (27, 21, 5.5, 32, -0.12), (33, 27, 9, 46, 0.08))
_REGION_OF_UNIT = (0,) * 5 + (1,) * 11 + (2,) * 4  # of a whole spine, from the head down


def _level_mm(unit):
    """The row of `_REGION_MM` for one of the 20 units: down a region all lengths grow, from 0.9 to 1.1 of the row."""
    region = _REGION_OF_UNIT[unit]
    down = (unit - _REGION_OF_UNIT.index(region)) / (_REGION_OF_UNIT.count(region) - 1)
    return np.array(_REGION_MM[region]) * ([0.9 + 0.2 * down] * 4 + [1])


def _spine_tissue(rng):
    return {
        "bone": rng.uniform(0.18, 0.42),
        "disc": rng.uniform(0.15, 0.8),
        "fluid": rng.uniform(0.75, 1.0),
        "fat": rng.uniform(0.6, 0.9),
        "muscle": rng.uniform(0.12, 0.25),
    }


def _unit_shape(rng, usual, size, tilt=0.0):
    """One unit's own shape: the `usual` one (a row of `_REGION_MM`) at a patient's size and habitual tilt."""
    depth, height, gap, width = np.array(usual[:4]) * size
    return {
        "depth_mm": depth * rng.uniform(0.95, 1.05),
        "height_mm": height * rng.uniform(0.93, 1.07),
        "disc_mm": gap * rng.uniform(0.75, 1.2),
        "width_mm": width,
        "tilt": usual[4] + tilt + rng.uniform(-0.08, 0.08),
        "canal_mm": rng.uniform(12, 15),
        "wedge": rng.uniform(-0.05, 0.12),
    }


def _spine_volume(size, factors, texture, shift=(0, 0)):
    """Nine sagittal slices 4 mm apart, (9, size, size), from a pair of textures; `shift` (x, y) in halves of a side."""
    lateral = (np.arange(9) - 4) * 4.0
    plane = _spine_plane(size, factors, shift)
    cuts = {x: _spine_cut(factors, plane, x) for x in np.unique(np.abs(lateral))}  # a spine is symmetric
    slices = [_spine_slice(factors, plane, cuts[abs(x)], _between(texture, x / 30)) for x in lateral]
    return gaussian_filter(np.stack(slices), (0, 0.6, 0.6))


def _spine_plane(size, f, shift):
    """What all slices share, front to the left, head up: places in mm and the masks of what spans the width."""
    u, v = _placed(size, *shift, f["tilt"], 1.0)
    u, v = u * 32, v * 32
    u = u + 0.006 * v**2 * np.sign(f["tilt"])  # the curve of the spine
    pitch = f["height_mm"] + f["disc_mm"]
    step = (v + pitch / 2) // pitch
    w = v - step * pitch  # from the middle of the nearest body
    height = f["height_mm"] / 2 * (1 + f["wedge"] * u / f["depth_mm"])
    back, half = f["depth_mm"] / 2 + 1.5, f["canal_mm"] / 2
    pedicle = _inside(_box(u - back - 4, w + 0.12 * f["height_mm"], 9, f["height_mm"] * 0.24), 2.0)
    joint = _inside(_box(u - back - 13, w - 0.1 * f["height_mm"], 4.5, f["height_mm"] * 0.55), 2.5)
    return {
        "u": u,
        "w": w,
        "height": height,
        "waist": 0.06 * f["depth_mm"] * (1 - (w / height) ** 2).clip(0),
        "disc_v": np.abs(w) - pitch / 2,
        "disc_height": np.maximum(pitch / 2 - height, 0.4) * 0.9,
        "from_canal": u - back - half,
        "front_fat": (f["fat"] - f["muscle"]) * 0.55 * _inside(u + f["depth_mm"] * 0.75, 14),
        "rear": _inside(-u, 3),
        "behind": _inside(back - u, 3),
        "spinous": _inside(_box(u - back - f["canal_mm"] - 10, w + 3, 9, f["height_mm"] * 0.28), 2.5),
        "canal": _inside(np.abs(u - back - half) - half, 2.0),
        "arch": (pedicle, joint),
    }


def _spine_cut(f, plane, lateral):
    """The masks `lateral` mm from the middle, on either side; None for what does not reach that far."""
    half = f["canal_mm"] / 2
    cut = dict.fromkeys(("spinous", "canal", "cord", "arch", "disc", "body", "marrow"))
    central = _inside(lateral - half - 1, 5)
    if central:
        cut["spinous"] = central * plane["spinous"]
        cut["canal"] = plane["canal"] * central
        if f["width_mm"] < 40:  # below, the cord has ended
            cut["cord"] = _inside(np.hypot(plane["from_canal"], lateral * 0.9) - half * 0.52, 2.5) * cut["canal"]
    side = (1 - central) * _inside(lateral - 0.55 * f["width_mm"], 6)
    if side:
        pedicle, joint = plane["arch"]
        cut["arch"] = np.maximum(pedicle * side, joint * side)
    within = np.sqrt(max(0.0, 1 - (lateral / (0.62 * f["width_mm"])) ** 2))  # bodies round off to the sides
    if within:
        depth = f["depth_mm"] * within / 2
        body = _box(plane["u"], plane["w"], np.maximum(depth - plane["waist"], 0.1), plane["height"])
        discs = _box(plane["u"], plane["disc_v"], np.maximum(depth * 0.95, 0.1), plane["disc_height"])
        cut["disc"], cut["body"] = _inside(discs, 1.5), _inside(body, 1.5)
        cut["marrow"] = 1 - 0.6 * _inside(np.minimum(np.abs(body), np.abs(discs)) - 0.5, 1.6)  # dark cortex
    return cut


def _spine_slice(f, plane, cut, texture):
    """One sagittal slice (size, size), its tissues laid over each other."""
    image = f["muscle"] + 0.03 * texture + plane["front_fat"]
    image = image + plane["rear"] * (0.55 * f["fat"] + 0.08 * texture - image)
    image = image + plane["behind"] * (0.7 * f["fat"] + 0.06 * texture - image)
    for part, brightness in (
        ("spinous", f["bone"]),
        ("canal", f["fluid"]),
        ("cord", 0.45 * f["fluid"]),
        ("arch", f["bone"] * 0.95),
    ):
        if cut[part] is not None:
            image = image + cut[part] * (brightness - image)
    if cut["body"] is not None:
        image = image + cut["disc"] * (f["disc"] + 0.02 * texture - image)
        image = image + cut["body"] * (f["bone"] + 0.035 * texture - image)
        image = image * cut["marrow"]
    return image


def _spine_patient(rng):
    """Tissue, size, habitual tilt, gain and changes per visit of one patient."""
    return {
        "tissue": _spine_tissue(rng),
        "size": rng.uniform(0.92, 1.1),
        "tilt": rng.uniform(-0.04, 0.04),
        "gain": rng.uniform(0.85, 1.1),
        "bone_change": rng.uniform(-0.01, 0.01),
        "disc_change": rng.uniform(-0.03, 0),
    }


def _spine_visit(rng, person, visit):
    """Tissue and gain of one patient at one visit: discs darken slowly, bone drifts."""
    tissue = person["tissue"]
    return {
        **tissue,
        "bone": tissue["bone"] * (1 + person["bone_change"]) ** visit,
        "disc": tissue["disc"] * (1 + person["disc_change"]) ** visit,
        "gain": person["gain"] * rng.uniform(0.98, 1.02),
    }


# --- dermoscopy ---------------------------------------------------------------------------------------------


def _lesion(rng, size, factors):
    """Skin and lesion as RGB (3, size, size) in [0, 1]."""
    pale, pink = np.array([0.93, 0.80, 0.76]), np.array([0.98, 0.62, 0.58])
    skin = factors["skin"] * (pale + factors["redness"] * (pink - pale))
    mottle = 0.02 * _cloud(rng, size, 2.5) + 0.012 * _cloud(rng, size, 1.2)
    u, v = _placed(size, rng.uniform(-0.15, 0.15), rng.uniform(-0.15, 0.15), rng.uniform(0, np.pi), 1.0)
    r, theta = np.hypot(u, v * rng.uniform(1.0, 1.3)), np.arctan2(v, u)
    waves = sum(rng.uniform(0.3, 1) * np.cos(k * theta + rng.uniform(0, 2 * np.pi)) / k**0.5 for k in range(1, 7))
    edge = factors["radius"] * (1 + factors["asymmetry"] * waves) + 0.07 * _cloud(rng, size, 3.6)
    mask = _inside(r - edge, rng.uniform(0.12, 0.4))
    network = 1 - 0.25 * np.exp(-np.square(_maze(rng, size, 13) / 0.5)) + 0.06 * _cloud(rng, size, 1.5)
    brown, black = np.array([0.55, 0.30, 0.20]), np.array([0.20, 0.11, 0.10])
    blue, pale_scar = np.array([0.42, 0.42, 0.52]), np.array([0.85, 0.70, 0.70])
    depth = np.clip(
        factors["darkness"] * (0.75 + 0.25 * _cloud(rng, size, 3.6)) * (1.15 - 0.5 * r / edge.clip(0.1)), 0, 1
    )
    colour = _mix(brown, black, depth)
    for tint, share in ((blue, 0.9), (pale_scar, 0.75), (black, 0.9)):
        patch = _inside(0.9 - _cloud(rng, size, 3.8), 0.9) * factors["variegation"] * share
        colour = colour + patch * (tint[:, None, None] - colour)
    image = skin[:, None, None] + mottle * np.array([0.7, 1.0, 1.0])[:, None, None]
    return image + 0.92 * mask * (colour * network + 0.4 * mottle - image)


def _mix(a, b, t):
    return a[:, None, None] + t * (b - a)[:, None, None]


def _hairs(rng, size, count):
    """Dark, slightly curved hairs as an opacity (size, size)."""
    opacity = np.zeros((size, size))
    for _ in range(count):
        u, v = _placed(size, 0, rng.uniform(-0.9, 0.9), rng.uniform(0, np.pi), 1.0)
        bend, length, start = rng.uniform(-0.4, 0.4), rng.uniform(0.5, 1.6), rng.uniform(-1.2, 0.4)
        along = _inside(np.abs(u - start - length / 2) - length / 2, 0.1)
        opacity = np.maximum(opacity, along * np.exp(-np.square((v - bend * u**2) / 0.018)))
    return opacity


# --- brain --------------------------------------------------------------------------------------------------


def _brain_slice(size, factors, folds, texture):
    """White matter, a folded cortex with dark furrows, ventricles and the midline, on black."""
    x, y = _grid(size)
    f, a = factors, np.abs(x)
    shrink = 1 - 0.06 * f["z"]
    rho = np.hypot(x / (f["width"] * shrink), y / (f["length"] * shrink))
    rho = rho * (1 + 0.05 * x**2 - 0.04 * y) + 0.008 * texture
    rim = _inside(0.70 - rho, 0.30)  # how much an area belongs to the cortex
    furrow = folds - 0.8 * (rho - 0.9)
    image = 0.88 + 0.02 * texture
    image = image - 0.30 * rim * np.exp(-np.square(furrow / 0.8)) - 0.12 * _inside(0.93 - rho, 0.1)
    image = image * (1 - 0.9 * rim * np.exp(-np.square(furrow / f["furrows"])))
    image = image - 0.16 * _inside(np.hypot((a - 0.20) / 0.12, (y - 0.04 - 0.4 * (a - 0.2)) / 0.19) - 1, 0.6)
    fissure = np.exp(-np.square((x + 0.008 * texture) / (0.010 + 0.04 * f["furrows"]))) * _inside(
        0.36 - np.abs(y), 0.12
    )
    image = image * (1 - 0.8 * fissure)
    for ventricle in _ventricles(x, y, a, f["ventricles"] * (0.85 + 0.3 * f["z"])):
        image = image * (1 - 0.88 * _inside(ventricle + 0.06 * texture, 0.4))
    return image * _inside(rho - 1, 0.05)


def _ventricles(x, y, a, size):
    """Distances to the front horns, the back horns and the third ventricle, each on its own scale."""
    front = (
        np.hypot((a - 0.05 - 0.55 * (-y - 0.10).clip(0)) / (0.42 * size + 0.02), (y + 0.20) / (0.07 + 0.75 * size)) - 1
    )
    back = (
        np.hypot((a - 0.07 - 0.45 * (y - 0.20).clip(0)) / (0.45 * size + 0.01), (y - 0.34) / (0.04 + 0.75 * size)) - 1
    )
    third = np.hypot(x / (0.012 + 0.10 * size), (y - 0.08) / 0.15) - 1
    return front, back, third
