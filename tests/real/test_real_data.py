"""The real data of the mirror: verified, complete, and split so that no subject is in two parts."""

import os
from pathlib import Path

import numpy as np
import pytest

from lookalike.data import exact_duplicates, load, manifest, twins
from lookalike.data.duplicates import without_duplicates
from lookalike.training import mass_attacks

MIRROR = os.environ.get("LOOKALIKE_MIRROR")
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        not (MIRROR and Path(MIRROR).is_dir()), reason="LOOKALIKE_MIRROR names no folder with the real data"
    ),
]

CONFOUNDED = [[24, 138, 92], [4, 21, 14], [6, 42, 28]]  # T11-T12, L1-L3 and L4-L5 in train, val and test
COUNTS = {  # images per class, in the order of the classes
    ("mnist", "train"): [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
    ("mnist", "test"): [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009],
    ("cbis_ddsm", "train"): [525, 579],
    ("cbis_ddsm", "val"): [102, 90],
    ("cbis_ddsm", "test"): [157, 245],
    ("bcdr", "test"): [486, 620],
    ("mcgan_synthetic", "train"): [1500, 1500],
    ("alzheimer", "train"): [717, 52, 2560, 1792],
    ("alzheimer", "test"): [179, 12, 640, 448],
    ("pneumoniamnist_parts", "train"): [1214, 3494],
    ("pneumoniamnist_parts", "val"): [135, 389],
    ("pneumoniamnist_parts", "test"): [234, 390],
}
SIZES = {("ham10000", "train"): 5984, ("ham10000", "test"): 1512}
SUBJECTS = {
    ("cbis_ddsm", "train"): 578,
    ("cbis_ddsm", "val"): 102,
    ("cbis_ddsm", "test"): 212,
    ("bcdr", "test"): 394,
}
MIRRORED = [
    "mnist", "cbis_ddsm", "bcdr", "mcgan_synthetic", "alzheimer", "ham10000", "vertebra_units", "mednist",
    "pneumoniamnist_parts",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """One cache for the module, so that each set is decoded once and the user's own cache stays as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOOKALIKE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def test_the_alzheimer_slices_are_200_volumes_of_32_that_the_published_split_cuts():
    need("alzheimer")
    parts = {split: load("alzheimer_volumes", split) for split in ("train", "val", "test")}
    volumes = {split: np.unique(part.subjects, return_counts=True) for split, part in parts.items()}
    assert [len(names) for names, _ in volumes.values()] == [130, 29, 41]
    assert all((counts == 32).all() for _, counts in volumes.values())
    assert not set(volumes["train"][0]) & set(volumes["test"][0])
    assert [np.bincount(part.labels, minlength=4).tolist() for part in parts.values()] == [
        [576, 32, 2080, 1472], [128, 0, 480, 320], [192, 32, 640, 448],
    ]  # fmt: skip
    assert all(len(set(part.labels[part.subjects == name])) == 1 for part in parts.values() for name in part.subjects)
    published = [load("alzheimer", split, 64) for split in ("train", "test")]
    groups = twins.twin_groups(np.concatenate([part.images for part in published]), 0.985)
    tested = np.bincount(groups[len(published[0]) :], minlength=200)
    assert sorted(set(tested)) == [6, 7]  # of every volume's 32


def need(*names):
    """Skips a test whose sets are not all in the mirror: nothing is downloaded here."""
    for name in names:
        place = manifest.status(name)
        if place != "in mirror":
            pytest.skip(f"{name} is not in the mirror ({place})")


@pytest.mark.parametrize("name", MIRRORED)
def test_every_mirrored_file_matches_the_manifest(name):
    need(name)
    checks = manifest.verify(name)
    assert all(check.ok for check in checks), [check.sentence for check in checks]


@pytest.mark.parametrize(("name", "split"), COUNTS)
def test_class_counts_are_the_published_ones(name, split):
    need(name)
    assert np.bincount(load(name, split).labels).tolist() == COUNTS[name, split]


@pytest.mark.parametrize(("name", "split"), SIZES)
def test_sizes_are_the_published_ones(name, split):
    need(name)
    assert len(load(name, split)) == SIZES[name, split]


@pytest.mark.parametrize(("name", "split"), SUBJECTS)
def test_patients_are_as_many_as_published(name, split):
    need(name)
    assert len(np.unique(load(name, split).subjects)) == SUBJECTS[name, split]


@pytest.mark.parametrize("name", ["cbis_ddsm", "ham10000", "vertebra_units"])
def test_no_subject_and_no_image_is_in_two_parts(name):
    need(name)
    splits = ("train", "test") if name == "ham10000" else ("train", "val", "test")
    parts = [load(name, split) for split in splits]
    subjects = [set(part.subjects) for part in parts]
    pixels = [{image.tobytes() for image in part.images} for part in parts]
    assert sum(map(len, subjects)) == len(set().union(*subjects))
    assert sum(map(len, pixels)) == len(set().union(*pixels))


def test_melanoma_of_ham10000_is_split_by_lesion():
    """171 of the 1,512 test images are melanoma, as published; train and val are the 5,984 lesions of `train`."""
    need("ham10000")
    parts = [load("ham10000_melanoma", split) for split in ("train", "val", "test")]
    assert [np.bincount(part.labels).tolist() for part in parts] == [[4394, 393], [1099, 98], [1341, 171]]
    lesions = [set(part.subjects) for part in parts]
    assert [len(of) for of in lesions] == [4787, 1197, 1223]
    assert len(set().union(*lesions)) == 4787 + 1197 + 1223
    whole = load("ham10000")
    assert lesions[0] | lesions[1] == set(whole.subjects)
    melanomas = set(whole.subjects[whole.labels == whole.classes.index("mel")])
    assert {lesion for part in parts[:2] for lesion in part.subjects[part.labels == 1]} == melanomas


def test_mnist_is_the_official_one_in_order():
    need("mnist")
    train = load("mnist")
    assert train.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert not (set(load("digits", "test").labels) ^ set(train.labels))


def test_the_embedded_digits_are_mnist_digits():
    need("mnist")
    mnist = {image.tobytes() for image in load("mnist").images} | {i.tobytes() for i in load("mnist", "test").images}
    assert all(image.tobytes() in mnist for image in load("digits").images)


def test_bcdr_has_its_eight_known_duplicates_and_is_restricted():
    need("bcdr")
    test = load("bcdr", "test")
    assert len(test) - len({image.tobytes() for image in test.images}) == 8
    assert sum(len(rows) - 1 for rows in exact_duplicates(test.images)) == 8
    assert test.restricted
    assert "not to be shown or passed on" in test.describe()


def test_bcdr_without_its_duplicates_lacks_the_pair_with_both_labels():
    need("bcdr")
    test = load("bcdr", "test")
    kept = without_duplicates(test)
    assert np.bincount(kept.labels).tolist() == [482, 615]
    assert not exact_duplicates(kept.images)
    pairs = exact_duplicates(test.images)
    assert [len(rows) for rows in pairs] == [2] * 8
    assert all(len(set(test.subjects[rows])) == 1 for rows in pairs)
    assert sum(len(set(test.labels[rows])) == 2 for rows in pairs) == 1


def test_masses_hold_what_the_sheet_says():
    """Images, patients, patients with both labels, repeats and contradictory pairs; nothing is shared."""
    need("cbis_ddsm", "bcdr", "mcgan_synthetic")
    sets = [load("cbis_ddsm", split) for split in ("train", "val", "test")]
    rows = mass_attacks.check_sets([*sets, load("bcdr", "test"), load("mcgan_synthetic")])
    counts = ("images", "patients", "with_both_labels", "repeats", "contradictory", "shared_patients", "shared_images")
    assert [[row[name] for name in counts] for row in rows] == [
        [1104, 578, 13, 0, 0, 0, 0],
        [192, 102, 0, 0, 0, 0, 0],
        [402, 212, 5, 0, 0, 0, 0],
        [1106, 394, 35, 8, 1, 0, 0],
        [3000, None, None, 0, 0, 0, 0],
    ]


def test_pixels_of_the_released_masses_tell_bcdr_but_no_member():
    """pGAN's attack; the areas are those of an earlier measurement by other code."""
    need("cbis_ddsm", "bcdr", "mcgan_synthetic")
    real, made = load("cbis_ddsm"), load("mcgan_synthetic")
    outside = {"val": load("cbis_ddsm", "val"), "test": load("cbis_ddsm", "test"), "other": load("bcdr", "test")}
    rows = mass_attacks.pixel_attacks(real, outside, mass_attacks.pixel_scores(real, made, outside))
    found = [row["auc"] for row in rows]
    assert found == pytest.approx([0.523, 0.529, 0.513, 0.483, 0.879, 0.709], abs=6e-4)
    assert [row["low"] <= 0.5 <= row["high"] for row in rows] == [True] * 4 + [False] * 2
    assert [row["false"] for row in rows] == [False] * 4 + [True] * 2


def test_pneumonia_has_eight_images_in_train_and_val():
    need("pneumoniamnist_parts")
    train, val = load("pneumoniamnist_parts"), load("pneumoniamnist_parts", "val")
    assert len({i.tobytes() for i in train.images} & {i.tobytes() for i in val.images}) == 8


def test_mednist_parts_share_no_image():
    need("mednist")
    parts = [load("mednist28", split) for split in ("train", "val", "test")]
    full = [load("mednist", split) for split in ("train", "val", "test")]
    assert sum(map(len, parts)) == 6000
    pixels = [{image.tobytes() for image in part.images} for part in full]
    assert sum(map(len, pixels)) == len(set().union(*pixels))
    assert parts[0].images.shape[1:] == (1, 28, 28)
    assert (parts[0].stand_in_for, parts[0].subject_kind) == ("organamnist", "image")


def test_vertebrae_come_as_whole_exams_of_five_levels():
    need("vertebra_units")
    parts = [load("vertebra_units", split) for split in ("train", "val", "test")]
    assert [len(part) for part in parts] == [170, 25, 55], "four exams repeat another one: 250 of 270 units"
    for part in parts:
        assert not exact_duplicates(part.images)
        exams, counts = np.unique(part.subjects, return_counts=True)
        assert (counts == 5).all()
        assert np.bincount(part.labels).tolist() == [2 * len(exams), len(exams), 2 * len(exams)]


def test_vertebrae_elsewhere_are_the_lumbar_ones_of_another_scanner():
    need("vertebra_units")
    here, there = load("vertebra_units"), load("vertebra_units_elsewhere", "test")
    assert np.bincount(there.labels).tolist() == [34, 17, 34]
    assert len(np.unique(there.subjects)) == 17
    assert there.classes == here.classes
    assert not set(here.subjects) & set(there.subjects)
    assert there.images.mean() < 0.5 * here.images.mean()  # T2 on one scanner, T1 on the other


def test_confounded_vertebrae_name_their_classes_by_the_scanner():
    need("vertebra_units")
    parts = [load("vertebra_units_confounded", split) for split in ("train", "val", "test")]
    assert [np.bincount(part.labels).tolist() for part in parts] == CONFOUNDED
    subjects = [set(part.subjects) for part in parts]
    assert sum(map(len, subjects)) == len(set().union(*subjects)) == 67
    for part, split in zip(parts, ("train", "val", "test")):
        source = np.array([subject[:3] for subject in part.subjects])
        assert set(source[part.labels == 0]) == {"VB2"}
        assert set(part.subjects[source == "VB3"]) == set(load("vertebra_units", split).subjects)
