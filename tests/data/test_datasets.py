"""Image sets: the embedded digits, sets built by hand in each file format, and the tensors made from them."""

import hashlib
import tracemalloc
import zipfile
from io import BytesIO

import h5py
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

    def put(name, files, checksum=True):
        manifest = {
            "title": name, "kind": "data", "sources": ["https://example.org"], "licence": "CC BY 4.0",
            "restricted": False, "login": False, "citation": "Nobody", "chapters": ["pgan"], "by_hand": "ask",
            "files": [
                {"path": f"set/{path}", "how": "by hand"}
                | ({"sha256": hashlib.sha256(content).hexdigest()} if checksum else {})
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


def _png_of(pixels):
    out = BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
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
        "pneumoniamnist_parts mednist28 mednist cbis_ddsm bcdr mcgan_synthetic alzheimer alzheimer_volumes ham10000 "
        "ham10000_melanoma isic2019 isic2020 melanoma_external_256 "
        "vertebra_units vertebra_units_elsewhere vertebra_units_confounded pgan_synthetic phantom_grey28 "
        "phantom_mammography phantom_mammography_elsewhere phantom_vertebrae phantom_spines "
        "phantom_spines_many phantom_spines_elsewhere phantom_dermoscopy phantom_dermoscopy_framed "
        "phantom_brain"
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


def test_slices_of_one_volume_come_into_one_part_wherever_they_were_published(place):
    rng = np.random.default_rng(0)
    members, volume_of = {}, {}
    for volume in range(12):
        kind, whole = ("MildDemented", "NonDemented")[volume % 2], rng.integers(0, 200, (16, 16))
        for i in range(4):
            pixels = (whole + rng.integers(0, 3, whole.shape)).astype(np.uint8)
            name = f"{'test' if i == 3 else 'train'}/{kind}/{volume}_{i}.png"
            members[name], volume_of[pixels.tobytes()] = _png_of(pixels), volume
    place("alzheimer", {"a.zip": _zip(members)})
    parts = [load("alzheimer_volumes", split) for split in ("train", "val", "test")]
    found = [{volume_of[image.tobytes()] for image in part.images} for part in parts]
    assert sum(map(len, found)) == 12
    assert sum(map(len, parts)) == 48
    assert [len(set(part.subjects)) for part in parts] == [len(f) for f in found]
    assert parts[0].subject_kind == "volume"


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


def _bodies():
    """Two exams of VB1, ten of VB2 and twenty of VB3; an image's grey is its row."""
    levels = {"VB1": ["bottom+1", "bottom+0"], "VB2": ["T11", "T12"], "VB3": []}
    lumbar = ["L1", "L2", "L3", "L4", "L5"]
    rows = [
        (source, f"{exam:02}", level)
        for source, exams in (("VB1", 2), ("VB2", 10), ("VB3", 20))
        for exam in range(exams)
        for level in levels[source] + (lumbar if source != "VB1" else [])
    ]
    source, exam, level = (np.array(column) for column in zip(*rows))
    images = np.broadcast_to(np.arange(len(rows), dtype=np.uint8)[:, None, None, None], (len(rows), 9, 4, 4))
    return _npz(images=images, source=source, exam=exam, level=level)


def test_vertebral_bodies_of_each_source_are_a_set_of_their_own(place):
    place("vertebra_units", {"vertebra_units_9x64x64_uint8.npz": _bodies()})
    own, elsewhere = load("vertebra_units"), load("vertebra_units_elsewhere", "test")
    assert len(np.unique(own.subjects)) == 14
    assert elsewhere.classes == own.classes == ("L1-L2", "L3", "L4-L5")
    assert elsewhere.subjects.tolist() == [f"VB2-{exam:02}" for exam in range(10) for _ in range(5)]
    assert elsewhere.labels.tolist() == [0, 0, 1, 2, 2] * 10
    assert elsewhere.images[:7, 0, 0, 0].tolist() == [6, 7, 8, 9, 10, 13, 14]  # behind 4 of VB1, without T11 and T12
    with pytest.raises(DataError, match="has no split 'train'; it has test"):
        load("vertebra_units_elsewhere")


def test_in_the_confounded_set_the_scanner_tells_the_thorax(place):
    place("vertebra_units", {"vertebra_units_9x64x64_uint8.npz": _bodies()})
    for split, exams in (("train", [7, 14]), ("val", [1, 2]), ("test", [2, 4])):
        both, own = load("vertebra_units_confounded", split), load("vertebra_units", split)
        assert both.classes == ("T11-T12", "L1-L3", "L4-L5")
        source = np.array([subject[:3] for subject in both.subjects])
        assert [len(np.unique(both.subjects[source == name])) for name in ("VB2", "VB3")] == exams
        assert set(source[both.labels == 0]) == {"VB2"}
        assert set(source[both.labels == 1]) == {"VB2", "VB3"}
        assert (both.images[source == "VB3"] == own.images).all()
        assert both.labels[source == "VB3"].tolist() == [1, 1, 1, 2, 2] * exams[1]


# --- skin lesions -------------------------------------------------------------------------------------------


def _jpeg(seed, size=(40, 30)):
    """A smooth random picture of `size` (width, height), other for every seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), np.uint8)
    out = BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BILINEAR).save(out, "JPEG", quality=90)
    return out.getvalue()


def _at_256(content):
    """The slow twin: black bars by pasting, then Pillow's own resizing of the colour image."""
    image = Image.open(BytesIO(content)).convert("RGB")
    side = max(image.size)
    square = Image.new("RGB", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(square.resize((256, 256), Image.Resampling.BICUBIC)).transpose(2, 0, 1)


def _csv(*rows):
    return "\n".join([",".join(map(str, row)) for row in rows]).encode()


_ISIC_NAMES = [f"ISIC_{i:04}" for i in range(40)]
_ISIC_JPEGS = {name: _jpeg(i, (40, 30) if i % 2 else (20, 50)) for i, name in enumerate(_ISIC_NAMES)}
_ISIC_TARGETS = {name: int(i % 5 == 0) for i, name in enumerate(_ISIC_NAMES)}


def _patients(unknown=()):
    """Two images a patient; those at `unknown` rows name nobody, by turns as an empty field and as nan."""
    named = [f"IP_{i // 2:02}" for i in range(len(_ISIC_NAMES))]
    return [("", "nan")[i % 2] if i in unknown else patient for i, patient in enumerate(named)]


def _isic2020(folder="train/", leave_out=(), columns=("image_name", "patient_id", "sex", "target"), targets=None):
    """The two files of isic2020, with 40 images of 20 patients."""
    targets = _ISIC_TARGETS | (targets or {})
    rows = [(name, who, "female", targets[name]) for name, who in zip(_ISIC_NAMES, _patients())]
    members = {f"{folder}{name}.jpg": _ISIC_JPEGS[name] for name in _ISIC_NAMES if name not in leave_out}
    return {
        "ISIC_2020_Training_JPEG.zip": _zip(members | {"LICENSE.txt": b"CC BY-NC"}),
        "ISIC_2020_Training_GroundTruth.csv": _csv(columns, *rows),
    }


def _isic2019(classes="MEL NV BCC AK BKL DF VASC SCC UNK", labels=None, without_metadata=()):
    """The three files of isic2019: image i is of class i mod 8, and every third one names no lesion."""
    labels = {name: [float(k == i % 8) for k in range(9)] for i, name in enumerate(_ISIC_NAMES)} | (labels or {})
    lesions = ["" if i % 3 == 0 else f"BCN_{i // 2:02}" for i in range(len(_ISIC_NAMES))]
    known = [(name, lesion, "torso") for name, lesion in zip(_ISIC_NAMES, lesions) if name not in without_metadata]
    members = {f"ISIC_2019_Training_Input/{name}.jpg": content for name, content in _ISIC_JPEGS.items()}
    return {
        "ISIC_2019_Training_Input.zip": _zip(members),
        "ISIC_2019_Training_GroundTruth.csv": _csv(
            ("image", *classes.split()), *((name, *labels[name]) for name in _ISIC_NAMES)
        ),
        "ISIC_2019_Training_Metadata.csv": _csv(("image", "lesion_id", "site"), *known[::-1]),
    }


def _external(unknown=range(0, 12), **changed):
    """The one file of melanoma_external_256; its test folder holds another image under a name of the train folder."""
    rows = [(name, who, _ISIC_TARGETS[name]) for name, who in zip(_ISIC_NAMES, _patients(unknown))]
    members = {f"train/train/{name}.jpg": content for name, content in _ISIC_JPEGS.items()}
    members |= {
        "test/test/ISIC_0000.jpg": _jpeg(99),
        "train_concat.csv": _csv(("image_name", "patient_id", "target"), *rows),
    }
    members = {name: content for name, content in (members | changed).items() if content is not None}
    return {"melanoma-external-malignant-256.zip": _zip(members)}


def _three_parts(name):
    """The set's splits, once every image, label and pixel is found to be the planted one and no subject is shared."""
    parts = [load(name, split) for split in ("train", "val", "test")]
    pixel_name = {_at_256(content).tobytes(): image for image, content in _ISIC_JPEGS.items()}
    names = [[pixel_name[image.tobytes()] for image in part.images] for part in parts]
    assert sorted(name for of in names for name in of) == _ISIC_NAMES
    subjects = [set(part.subjects) for part in parts]
    assert sum(map(len, subjects)) == len(set().union(*subjects))
    shares = np.array([len(of) for of in subjects]) / sum(map(len, subjects))
    np.testing.assert_allclose(shares, (0.7, 0.1, 0.2), atol=0.03)
    return parts, names


def test_melanoma_of_ham10000_is_split_by_lesion(place):
    rows = [(f"L{i // 2}", f"I{i:02}", ("mel", "nv", "bcc", "df")[i % 4]) for i in range(40)]
    table = _csv(("lesion_id", "image_id", "dx"), *rows)
    members = {f"train/{name}.jpg": _jpeg(i, (8, 8)) for i, (_, name, _) in enumerate(rows[:30])}
    members |= {f"test/{name}.jpg": _jpeg(i, (8, 8)) for i, (_, name, _) in enumerate(rows[30:], 30)}
    files = {"ham10000_128.zip": _zip(members), "HAM10000_metadata.csv": table}
    place("ham10000", files | {"ISIC2018_Task3_Test_GroundTruth.csv": table})
    parts = [load("ham10000_melanoma", split) for split in ("train", "val", "test")]
    assert [len(set(part.subjects)) for part in parts] == [12, 3, 5]
    assert set(parts[0].subjects) | set(parts[1].subjects) == {f"L{i}" for i in range(15)}
    for part in parts:
        assert part.classes == ("benign", "melanoma")
        # a lesion of even number is melanoma first and nevus second; one of odd number is neither
        assert [label for _, label in zip(part.subjects, part.labels)] == [
            int(int(lesion[1:]) % 2 == 0 and i % 2 == 0) for i, lesion in enumerate(part.subjects)
        ]


def test_isic2020_is_resized_as_it_is_read_and_split_by_patient(place):
    place("isic2020", _isic2020(), checksum=False)
    parts, names = _three_parts("isic2020")
    for part, of in zip(parts, names):
        assert part.labels.tolist() == [_ISIC_TARGETS[name] for name in of]
        assert part.subjects.tolist() == [f"IP_{_ISIC_NAMES.index(name) // 2:02}" for name in of]
        assert (part.classes, part.subject_kind, part.origin) == (("benign", "melanoma"), "patient", "real")


def test_isic2019_has_eight_classes_and_a_lesion_of_its_own_where_none_is_named(place):
    place("isic2019", _isic2019(), checksum=False)
    parts, names = _three_parts("isic2019")
    for part, of in zip(parts, names):
        rows = [_ISIC_NAMES.index(name) for name in of]
        assert part.labels.tolist() == [row % 8 for row in rows]
        assert part.subjects.tolist() == [f"BCN_{row // 2:02}" if row % 3 else _ISIC_NAMES[row] for row in rows]
    assert parts[0].classes == ("mel", "nv", "bcc", "ak", "bkl", "df", "vasc", "scc")
    assert parts[0].subject_kind == "lesion"


def test_the_external_set_takes_its_own_folder_and_an_unknown_patient_for_a_subject(place):
    place("melanoma_external_256", _external(), checksum=False)
    parts, names = _three_parts("melanoma_external_256")
    for part, of in zip(parts, names):
        rows = [_ISIC_NAMES.index(name) for name in of]
        assert part.labels.tolist() == [_ISIC_TARGETS[name] for name in of]
        assert part.subjects.tolist() == [f"IP_{row // 2:02}" if row >= 12 else _ISIC_NAMES[row] for row in rows]


def test_another_size_is_made_from_the_copy_at_256(place, monkeypatch):
    place("isic2020", _isic2020(), checksum=False)
    whole = load("isic2020", "val")

    def again(*arguments):
        raise AssertionError("the originals were decoded a second time")

    monkeypatch.setattr(datasets, "_isic_split", again)
    small = load("isic2020", "val", 32)
    twins = [
        np.asarray(Image.fromarray(image.transpose(1, 2, 0)).resize((32, 32), Image.Resampling.BICUBIC))
        for image in whole.images
    ]
    assert (small.images == np.stack(twins).transpose(0, 3, 1, 2)).all()
    assert small.subjects.tolist() == whole.subjects.tolist()
    assert load("isic2020", "val", 256).content_hash == whole.content_hash


def test_originals_are_never_in_memory_together(place):
    shape = (800, 600)
    members = {f"train/{name}.jpg": _jpeg(i, shape) for i, name in enumerate(_ISIC_NAMES)}
    place("isic2020", _isic2020() | {"ISIC_2020_Training_JPEG.zip": _zip(members)}, checksum=False)
    files = {path.rsplit("/", 1)[-1]: local for path, local in datasets.fetch("isic2020").items()}
    tracemalloc.start()
    images, _, _ = datasets._read_isic2020(files, "train")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    original = 3 * shape[0] * shape[0]  # padded to a square
    assert peak < images.nbytes + 3 * original < 0.5 * len(images) * original


@pytest.mark.parametrize(
    ("name", "files", "sentence"),
    [
        ("isic2020", _isic2020(leave_out=["ISIC_0007"]), r"JPEG\.zip does not hold ISIC_0007\.jpg"),
        (
            "isic2020",
            _isic2020(columns=("image_name", "patient", "sex", "target")),
            "no column 'patient_id'; it has image",
        ),
        ("isic2020", _isic2020(targets={"ISIC_0003": 2}), "target of ISIC_0003 must be 0 or 1, but is '2'"),
        ("isic2020", _isic2020(targets={"ISIC_0003": ""}), "target of ISIC_0003 must be 0 or 1, but is ''"),
        ("isic2020", _isic2020() | {"ISIC_2020_Training_GroundTruth.csv": b"\xff\xfe"}, "is not a readable csv file"),
        (
            "isic2020",
            _isic2020() | {"ISIC_2020_Training_GroundTruth.csv": b"image_name,patient_id,target\n"},
            "GroundTruth.csv has no rows",
        ),
        (
            "isic2020",
            _isic2020() | {"ISIC_2020_Training_JPEG.zip": _zip({"a/X.jpg": _jpeg(0), "b/X.jpg": _jpeg(1)})},
            r"holds X\.jpg twice: 'a/X\.jpg' and 'b/X\.jpg'",
        ),
        ("isic2019", _isic2019(classes="MEL NV BCC AK BKL DF VASC SQ UNK"), "no column 'SCC'; it has image, MEL"),
        ("isic2019", _isic2019(labels={"ISIC_0004": [1, 1] + [0] * 7}), "ISIC_0004 marks 2 of the 8 classes, not one"),
        ("isic2019", _isic2019(labels={"ISIC_0004": [0] * 8 + [1]}), "ISIC_0004 marks 0 of the 8 classes, not one"),
        ("isic2019", _isic2019(labels={"ISIC_0004": [0.5] * 9}), "MEL of ISIC_0004 must be 0 or 1, but is '0.5'"),
        ("isic2019", _isic2019(without_metadata=["ISIC_0009"]), "Metadata.csv has no row for image 'ISIC_0009'"),
        ("melanoma_external_256", _external(**{"train_concat.csv": None}), "does not hold train_concat.csv"),
        (
            "melanoma_external_256",
            _external(**{"train/train/ISIC_0000.jpg": None}),  # the one in test/test/ is another image
            r"does not hold ISIC_0000\.jpg",
        ),
    ],
)
def test_skin_lesions_that_are_not_as_published_are_refused(place, name, files, sentence):
    place(name, files, checksum=False)
    with pytest.raises(DataError, match=sentence):
        load(name)


# --- pGAN's released images ---------------------------------------------------------------------------------


@pytest.fixture
def put_pgan(place, monkeypatch):
    """Writes an HDF5 file of the authors' layout, but of n images of 8 px, into the mirror."""

    def put(n=6, write=None, **changed):
        monkeypatch.setattr(datasets, "_PGAN_SHAPE", (n, 9, 8, 8))
        images = np.random.default_rng(0).uniform(-1, 1, (n, 9, 8, 8))
        arrays = {"images": images, "regions": np.arange(n, dtype=float)[:, None] % 3} | changed
        out = BytesIO()
        with h5py.File(out, "w") as file:
            for key, values in arrays.items():
                if values is not None:
                    file[key] = values
            if write:
                write(file)
        place("pgan_synthetic", {"pgan_synthetic.hdf5": out.getvalue()}, checksum=False)
        return arrays["images"]

    return put


def test_pgan_images_become_grey_and_keep_their_regions(put_pgan, monkeypatch):
    monkeypatch.setattr(datasets, "_ROWS_AT_A_TIME", 4)  # so that the last piece is not whole
    images = put_pgan(n=6)
    loaded = load("pgan_synthetic")
    assert (loaded.images == to_uint8(torch.tensor(images))).all()
    assert loaded.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert loaded.classes == ("cervical", "thoracic", "lumbar")
    assert (loaded.origin, loaded.split, len(set(loaded.subjects))) == ("synthetic", "train", 6)
    with pytest.raises(DataError, match="has no split 'test'; it has train"):
        load("pgan_synthetic", "test")


def test_pgan_images_are_never_whole_in_memory_as_floats(put_pgan, monkeypatch):
    monkeypatch.setattr(datasets, "_ROWS_AT_A_TIME", 16)
    images = put_pgan(n=1600)
    path = datasets.fetch("pgan_synthetic")["set/pgan_synthetic.hdf5"]
    tracemalloc.start()
    grey, _, _ = datasets._read_pgan({path.name: path}, "train")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert images.nbytes == 8 * grey.nbytes
    assert peak < 1.5 * grey.nbytes  # the result, and a few pieces of 16 images


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"images": None}, "has no dataset 'images' of its own; it holds regions"),
        ({"regions": None}, "has no dataset 'regions' of its own; it holds images"),
        (
            {"images": np.zeros((6, 8, 8))},
            r"images must be numbers of shape \(6, 9, 8, 8\), but is float64 \(6, 8, 8\)",
        ),
        ({"images": np.zeros((5, 9, 8, 8))}, r"shape \(6, 9, 8, 8\), but is float64 \(5, 9, 8, 8\)"),
        ({"images": np.zeros((6, 9, 8, 8), "S3")}, r"images must be numbers of shape .* but is \|S3"),
        ({"regions": np.zeros(6)}, r"regions must be numbers of shape \(6, 1\), but is float64 \(6,\)"),
        ({"regions": np.full((6, 1), 3.0)}, "regions must be 0, 1 or 2, but one is 3.0"),
        ({"regions": np.full((6, 1), 0.5)}, "regions must be 0, 1 or 2, but one is 0.5"),
        ({"regions": np.full((6, 1), np.nan)}, "regions must be 0, 1 or 2, but one is nan"),
        ({"images": np.full((6, 9, 8, 8), 1.01)}, r"images must lie in \[-1, 1\]"),
        ({"images": np.full((6, 9, 8, 8), np.nan)}, r"images must lie in \[-1, 1\]"),
        ({"images": np.full((6, 9, 8, 8), 0.5)}, r"all images lie in \[0, 1\], so black may be 0 or -1"),
    ],
)
def test_a_pgan_file_that_is_not_as_published_is_refused(put_pgan, changed, sentence):
    put_pgan(**changed)
    with pytest.raises(DataError, match=sentence):
        load("pgan_synthetic")


def test_a_pgan_file_may_not_point_to_other_files(put_pgan):
    def link(file):
        file["images"] = h5py.ExternalLink("/etc/other.hdf5", "images")

    def store_outside(file):
        file.create_dataset("images", (6, 9, 8, 8), "f8", external=[("/etc/passwd", 0, 6 * 9 * 64 * 8)])

    put_pgan(images=None, write=link)
    with pytest.raises(DataError, match="has no dataset 'images' of its own"):
        load("pgan_synthetic")
    put_pgan(images=None, write=store_outside)
    with pytest.raises(DataError, match="images points to other files"):
        load("pgan_synthetic")


def test_a_broken_pgan_file_and_a_missing_one_are_named(place, put_pgan, tmp_path):
    place("pgan_synthetic", {"pgan_synthetic.hdf5": b"\x89HDF\r\n\x1a\n cut short"}, checksum=False)
    with pytest.raises(DataError, match=r"pgan_synthetic\.hdf5 is not a readable HDF5 file"):
        load("pgan_synthetic")
    (tmp_path / "mirror/set/pgan_synthetic.hdf5").unlink()
    with pytest.raises(DataError, match="cannot be fetched automatically: ask; then put the file at"):
        load("pgan_synthetic")


def test_another_file_without_a_checksum_is_not_read_from_the_packed_copy(put_pgan):
    first = put_pgan(n=3)
    assert (load("pgan_synthetic").images == to_uint8(torch.tensor(first))).all()
    put_pgan(n=3, images=-first)
    assert (load("pgan_synthetic").images == to_uint8(torch.tensor(-first))).all()


# --- phantoms -----------------------------------------------------------------------------------------------


def test_phantoms_load_with_disjoint_subjects_and_at_a_size():
    train, val = load("phantom_grey28", image_size=12), load("phantom_grey28", "val", image_size=12)
    assert train.images.shape == (2000, 1, 12, 12)
    assert (train.split, train.origin) == ("train", "phantom")
    assert not set(train.subjects) & set(val.subjects)


def test_phantoms_are_rendered_once_and_anew_when_their_code_changes(cache, monkeypatch, tmp_path):
    fresh = datasets.phantoms.vertebrae(60, seed=1, split="val", image_size=8).image_set
    first = load("phantom_vertebrae", "val", 8)
    assert first.content_hash == fresh.content_hash
    assert first.describe() == fresh.describe()
    np.testing.assert_array_equal(first.subjects, fresh.subjects)
    load("phantom_vertebrae", "val", 8)
    assert len(list((cache / ".packed").iterdir())) == 1
    other = tmp_path / "phantoms.py"
    other.write_text("# another version")
    monkeypatch.setattr(datasets.phantoms, "__file__", str(other))
    load("phantom_vertebrae", "val", 8)
    assert len(list((cache / ".packed").iterdir())) == 2
