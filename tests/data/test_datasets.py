"""Image sets: the embedded digits, sets built by hand in each file format, and the tensors made from them."""

import hashlib
import zipfile
from io import BytesIO

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lookalike.data import DataError, ImageSet, as_tensor, datasets, load, names, to_uint8


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOOKALIKE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LOOKALIKE_MIRROR", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def place(tmp_path, cache, monkeypatch):
    """Puts files into a mirror and writes a manifest in which they are the entry `name`."""

    def put(name, files):
        manifest = {
            "title": name, "kind": "data", "sources": ["https://example.org"], "licence": "CC BY 4.0",
            "restricted": False, "login": False, "citation": "Nobody", "chapters": ["pgan"], "by_hand": "ask",
            "files": [
                {"path": f"set/{path}", "how": "by hand", "sha256": hashlib.sha256(content).hexdigest()}
                for path, content in files.items()
            ],
        }  # fmt: skip
        (tmp_path / "book").mkdir(exist_ok=True)
        (tmp_path / "pyproject.toml").touch()
        (tmp_path / "data_manifest.yaml").write_text(yaml.safe_dump({name: manifest}))
        (tmp_path / "mirror/set").mkdir(parents=True, exist_ok=True)
        for path, content in files.items():
            (tmp_path / "mirror/set" / path).write_bytes(content)
        monkeypatch.setenv("LOOKALIKE_ROOT", str(tmp_path))
        monkeypatch.setenv("LOOKALIKE_MIRROR", str(tmp_path / "mirror"))

    return put


def _set(n=6, classes=("a", "b", "c"), **keys):
    images = np.arange(n * 4, dtype=np.uint8).reshape(n, 1, 2, 2)
    labels = np.arange(n) % len(classes)
    given = {"name": "toy", "split": "train", "licence": "CC0", "restricted": False, "origin": "phantom"}
    return ImageSet(images, labels, labels.astype(str), classes, **(given | keys))


def _png(value, size=(4, 4), mode="L"):
    out = BytesIO()
    Image.new(mode, size, value).save(out, "PNG")
    return out.getvalue()


def _zip(members):
    out = BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


def _npz(**arrays):
    out = BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


# --- ImageSet -----------------------------------------------------------------------------------------------


def test_first_per_class_takes_stored_order_class_after_class():
    chosen = _set(9).first_per_class(2)
    assert chosen.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert chosen.images[:, 0, 0, 0].tolist() == [0, 12, 4, 16, 8, 20]
    assert _set(9).first_per_class(1, classes=[2, 0]).labels.tolist() == [2, 0]
    with pytest.raises(ValueError, match="has 3 images of class 'a', not 4"):
        _set(9).first_per_class(4)


def test_content_hash_sees_every_pixel_and_label_and_nothing_else():
    base = _set()
    pixel, label = base.images.copy(), base.labels.copy()
    pixel[3, 0, 1, 1] += 1
    label[3] = 1
    others = [_set(5), ImageSet(pixel, *_rest(base)), ImageSet(base.images, label, *_rest(base)[1:])]
    others.append(ImageSet(base.images.reshape(6, 1, 1, 4), *_rest(base)))
    assert base.content_hash == _set(name="other", split="test").content_hash
    assert len({base.content_hash, *(other.content_hash for other in others)}) == 5


def _rest(s):
    return s.labels, s.subjects, s.classes, s.name, s.split, s.licence, s.restricted, s.origin


def test_describe_says_what_a_page_must_say():
    sentence = _set(restricted=True, stand_in_for="the real thing").describe()
    for part in (
        "toy (train)", "6 phantom images of 1 x 2 x 2", "a 2, b 2, c 2", "no patient ids",
        "licence: CC0", "not to be shown", "a stand-in for the real thing",
    ):  # fmt: skip
        assert part in sentence
    assert "3 patients" in _set(subject_kind="patient").describe()


def test_a_set_that_contradicts_itself_is_refused():
    good = _set()
    with pytest.raises(ValueError, match="images must be uint8"):
        ImageSet(good.images.astype(float), *_rest(good))
    with pytest.raises(ValueError, match="labels run outside"):
        ImageSet(good.images, good.labels + 1, *_rest(good)[1:])
    with pytest.raises(ValueError, match="origin is 'fake'"):
        _set(origin="fake")


def test_every_grey_value_survives_the_way_to_a_tensor_and_back():
    images = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    tensor = as_tensor(images)
    assert (tensor.dtype, tensor.min(), tensor.max()) == (torch.float32, -1, 1)
    assert (to_uint8(tensor) == images).all()
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


@given(st.floats(-1, 1, width=32))
def test_to_uint8_rounds_to_the_nearest_grey(value):
    grey = int(to_uint8(torch.tensor(value)))
    assert abs(grey - (value + 1) * 127.5) <= 0.5 + 1e-4


# --- loading ------------------------------------------------------------------------------------------------


def test_digits_are_the_embedded_ones_in_fixed_splits(cache):
    train, test = load("digits"), load("digits", "test")
    assert np.bincount(train.labels).tolist() == [400] * 10
    assert np.bincount(test.labels).tolist() == [100] * 10
    assert train.images.shape[1:] == (1, 28, 28)
    assert train.images.max() == 255
    assert (train.origin, train.stand_in_for) == ("embedded", "mnist")
    assert not {i.tobytes() for i in train.images} & {i.tobytes() for i in test.images}
    assert load("digits").content_hash == train.content_hash  # now from the packed copy


def test_wrong_names_and_splits_are_answered_with_the_right_ones(cache):
    with pytest.raises(DataError, match=r"no data set 'mnits'; the names are digits, mnist"):
        load("mnits")
    with pytest.raises(DataError, match=r"digits has no split 'val'; it has train, test"):
        load("digits", "val")


def test_all_names_of_the_chapters_are_there():
    expected = (
        "digits mnist octmnist organamnist pneumoniamnist breastmnist retinamnist bloodmnist dermamnist "
        "pneumoniamnist_parts mednist28 mednist cbis_ddsm bcdr mcgan_synthetic alzheimer ham10000 "
        "vertebra_units phantom_grey28 phantom_mammography phantom_mammography_elsewhere phantom_vertebrae "
        "phantom_dermoscopy phantom_brain"
    )
    assert set(expected.split()) == set(names())


def test_medmnist_files_are_read_in_grey_and_colour(place):
    grey = np.arange(2 * 9, dtype=np.uint8).reshape(2, 3, 3)
    place("octmnist", {"octmnist.npz": _npz(train_images=grey, train_labels=np.array([[3], [0]], np.uint8))})
    loaded = load("octmnist")
    assert (loaded.images == grey[:, None]).all()
    assert loaded.labels.tolist() == [3, 0]
    colour = np.random.default_rng(0).integers(0, 256, (2, 3, 3, 3), np.uint8)
    place("bloodmnist", {"b.npz": _npz(test_images=colour, test_labels=np.array([[7], [0]], np.uint8))})
    assert (load("bloodmnist", "test").images == colour.transpose(0, 3, 1, 2)).all()


def test_mammography_takes_label_and_patient_from_the_name(place):
    name = "cbis-ddsm/train/is_benign_{}/patientcbis-ddsm__P_{}_image1_mass{}_is_benign_{}.png"
    members = {
        name.format("true", "00007", 1, 1): _png(10),
        name.format("true", "00007", 2, 1): _png(20),
        name.format("false", "00009", 3, 0): _png(30),
        name.format("false", "00009", 4, 0).replace("/train/", "/test/"): _png(40),
    }
    place("cbis_ddsm", {"masses.zip": _zip(members)})
    loaded = load("cbis_ddsm")
    assert loaded.classes == ("malignant", "benign")
    assert list(zip(loaded.images[:, 0, 0, 0], loaded.labels, loaded.subjects)) == [
        (30, 0, "P_00009"), (10, 1, "P_00007"), (20, 1, "P_00007"),
    ]  # fmt: skip
    assert load("cbis_ddsm", "test").images[0, 0, 0, 0] == 40


def test_a_changed_source_is_not_read_from_the_packed_copy(place, cache):
    name = "cbis-ddsm/train/is_benign_true/patientcbis-ddsm__P_1_image1_mass1_is_benign_1.png"
    place("cbis_ddsm", {"masses.zip": _zip({name: _png(10)})})
    assert load("cbis_ddsm").images[0, 0, 0, 0] == 10
    assert len(list((cache / ".packed").iterdir())) == 1
    place("cbis_ddsm", {"masses.zip": _zip({name: _png(99)})})
    assert load("cbis_ddsm").images[0, 0, 0, 0] == 99


def test_resizing_pads_to_a_square_first(place):
    members = {
        "train/MildDemented/a.png": _png(255, size=(8, 16)),
        "train/NonDemented/b.png": _png(0, size=(8, 16)),
    }
    place("alzheimer", {"a.zip": _zip(members)})
    assert load("alzheimer").images.shape == (2, 1, 16, 8)
    small = load("alzheimer", image_size=8)
    assert small.images.shape == (2, 1, 8, 8)
    assert small.images[0, 0, 4, 4] == 255
    assert small.images[0, 0, 4, 0] < 20


def test_mednist_puts_equal_images_into_one_part(place):
    rng = np.random.default_rng(0)
    members = {}
    for kind in datasets._MEDNIST:
        for i in range(20):
            out = BytesIO()
            Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(out, "PNG")
            members[f"{kind}/{i:03}.png"] = members[f"{kind}/{i:03}_twin.png"] = out.getvalue()
    place("mednist", {"m.zip": _zip(members)})
    parts = [load("mednist", split) for split in ("train", "val", "test")]
    pixels = [{image.tobytes() for image in part.images} for part in parts]
    assert [len(part) for part in parts] == [168, 24, 48]
    assert sum(map(len, pixels)) == len(set().union(*pixels)) == 120


def test_phantoms_load_with_disjoint_subjects_and_at_a_size():
    train, val = load("phantom_grey28", image_size=12), load("phantom_grey28", "val", image_size=12)
    assert train.images.shape == (2000, 1, 12, 12)
    assert (train.split, train.origin) == ("train", "phantom")
    assert not set(train.subjects) & set(val.subjects)
