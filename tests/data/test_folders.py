"""Folders from anywhere become sets that can be compared, and what was done to them is said."""

import os
import signal
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from lookalike.data import folders, packing
from lookalike.data.folders import read_folder, read_sets
from lookalike.data.image_set import as_tensor
from lookalike.data.manifest import DataError, cache_dir
from lookalike.metrics import as_images


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOOKALIKE_CACHE", str(tmp_path / "cache"))


def pixels(*shape, seed=0, top=256, dtype=np.uint8):
    return np.random.default_rng(seed).integers(0, top, shape, dtype=dtype)


def save(path, array, **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **settings)
    return array


def folder_of(folder, n=3, shape=(16, 16), seed=0, suffix="png"):
    return [save(folder / f"{i}.{suffix}", pixels(*shape, seed=seed + i)) for i in range(n)]


def test_grey_images_come_as_they_are_in_the_order_of_their_names(tmp_path):
    arrays = folder_of(tmp_path / "real")
    found = read_folder(tmp_path / "real")
    assert np.array_equal(found.images, np.stack(arrays)[:, None])
    assert (found.name, found.classes, found.origin) == ("real", ("all",), "real")
    assert found.subject_kind == "image"
    assert len(set(found.subjects)) == 3


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "tiff", "gif", "webp", "PNG"])
def test_lossless_formats_keep_every_pixel(tmp_path, suffix):
    grey = pixels(16, 18)
    save(tmp_path / "a" / f"x.{suffix}", grey, **({"lossless": True} if suffix == "webp" else {}))
    assert np.array_equal(read_folder(tmp_path / "a").images, grey[None, None])


def test_jpeg_and_a_jpeg_with_another_name(tmp_path):
    smooth = np.tile(np.arange(0, 160, 10, dtype=np.uint8), (16, 1))
    save(tmp_path / "a" / "1.jpg", smooth, quality=95)
    os.rename(tmp_path / "a" / "1.jpg", tmp_path / "a" / "1.png")
    assert np.abs(read_folder(tmp_path / "a").images[0, 0].astype(int) - smooth).max() <= 4


def test_palette_bilevel_and_alpha(tmp_path):
    colour = np.zeros((8, 8, 3), np.uint8)
    colour[:4], colour[4:] = (255, 0, 0), (0, 0, 255)
    Image.fromarray(colour).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "1.png")
    half = np.dstack([np.full((8, 8, 3), 200, np.uint8), np.repeat([[0], [255]], 4, 0) * np.ones((1, 8), int)])
    Image.fromarray(half.astype(np.uint8)).save(tmp_path / "2.png")
    Image.fromarray(np.eye(8, dtype=bool)).save(tmp_path / "3.png")
    notes = []
    found = read_folder(tmp_path, notes=notes).images
    assert np.array_equal(found[0].transpose(1, 2, 0), colour)
    assert (found[1][:, :4] == 0).all()
    assert (found[1][:, 4:] == 200).all()
    assert np.array_equal(found[2, 1], 255 * np.eye(8))
    assert any("1 images with transparency were laid on black" in note for note in notes)


def test_sixteen_bits_are_scaled_by_what_all_sets_need(tmp_path):
    deep = save(tmp_path / "real" / "1.png", pixels(16, 16, top=4096, dtype=np.uint16))
    deep[0, 0] = 4095
    save(tmp_path / "real" / "1.png", deep)
    eight = folder_of(tmp_path / "synthetic", 1)[0]
    found = read_sets(tmp_path / "real", tmp_path / "synthetic")
    assert np.array_equal(found.real.images[0, 0], np.rint(deep * (255 / 4095)))
    assert np.array_equal(found.synthetic.images[0, 0], eight)
    assert any("needs more than 12 bits, so 0..4095 became 0..255" in note for note in found.notes)


def test_sixteen_bits_of_one_set_scale_the_other(tmp_path):
    for name, top in (("real", 4095), ("synthetic", 65535)):
        save(tmp_path / name / "1.tif", np.full((16, 16), top, np.uint16))
    found = read_sets(tmp_path / "real", tmp_path / "synthetic")
    assert found.real.images.max() == round(255 * 4095 / 65535)
    assert found.synthetic.images.min() == 255


def test_floats_and_negative_values_are_refused(tmp_path):
    save(tmp_path / "1.tif", np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8))
    with pytest.raises(DataError, match=r"1.tif holds values from -1 to 1: save it with 8 or 16 bits"):
        read_folder(tmp_path)


def test_sub_folders_are_classes_and_agree_over_sets(tmp_path):
    for name, classes in (("real", ["10", "9", "2"]), ("synthetic", ["9", "2"])):
        for label in classes:
            folder_of(tmp_path / name / label, 2, seed=int(label))
    found = read_sets(tmp_path / "real", tmp_path / "synthetic")
    assert found.real.classes == found.synthetic.classes == ("2", "9", "10")
    assert found.real.labels[[f.startswith("10/") for f in found.files["real"]]].tolist() == [2, 2]
    assert found.synthetic.labels.tolist() == [0, 0, 1, 1]
    assert any("synthetic: no images of class 10." in note for note in found.notes)


def test_classes_of_one_set_alone_are_not_used(tmp_path):
    folder_of(tmp_path / "real" / "a"), folder_of(tmp_path / "synthetic")
    found = read_sets(tmp_path / "real", tmp_path / "synthetic")
    assert found.real.classes == ("all",)
    assert any("synthetic: no classes" in note for note in found.notes)


def test_images_beside_folders_of_images_are_refused(tmp_path):
    folder_of(tmp_path), folder_of(tmp_path / "a")
    with pytest.raises(DataError, match="holds 3 images beside 1 folders of images"):
        read_folder(tmp_path)


def test_sizes_that_differ_go_to_the_smallest_and_it_is_said(tmp_path):
    folder_of(tmp_path / "real", shape=(40, 30)), folder_of(tmp_path / "synthetic", shape=(20, 20))
    found = read_sets(tmp_path / "real", tmp_path / "synthetic")
    assert found.real.images.shape == found.synthetic.images.shape == (3, 1, 20, 20)
    assert (found.real.images[..., :2] == 0).all()  # padded to a square: 5 of 40 columns at each side
    said = " ".join(found.notes)
    assert "real: images of 40 x 30 were padded to squares and resized to 20 x 20." in said
    assert "synthetic: all images are 20 x 20 already." in said
    assert "20 px was chosen, that of the smallest image, 0.png" in said


def test_a_stated_size_is_kept_and_enlarging_is_said(tmp_path):
    folder_of(tmp_path / "real", shape=(40, 40)), folder_of(tmp_path / "synthetic", shape=(20, 20))
    found = read_sets(tmp_path / "real", tmp_path / "synthetic", image_size=32)
    assert found.real.images.shape[2:] == (32, 32)
    assert any(note.startswith("synthetic") and "3 of them were enlarged" in note for note in found.notes)


def test_a_tiny_outlier_does_not_decide_the_size(tmp_path):
    folder_of(tmp_path, shape=(40, 40)), save(tmp_path / "dot.png", pixels(4, 4))
    with pytest.raises(DataError, match=r"dot.png in .* is only 4 px"):
        read_folder(tmp_path)


def test_no_size_above_256_is_chosen(tmp_path):
    save(tmp_path / "1.png", pixels(300, 300)), save(tmp_path / "2.png", pixels(310, 300))
    assert read_folder(tmp_path).images.shape[2:] == (256, 256)


def test_grey_sets_get_three_channels_beside_colours_without_a_copy(tmp_path):
    folder_of(tmp_path / "real"), save(tmp_path / "synthetic" / "1.png", pixels(16, 16, 3))
    found = read_sets(tmp_path / "real", tmp_path / "synthetic")
    assert found.real.images.shape == (3, 3, 16, 16)
    assert found.real.images.strides[1] == 0
    assert any("real: grey images were given three equal channels" in note for note in found.notes)


def test_colours_that_are_all_grey_become_one_channel(tmp_path):
    grey = folder_of(tmp_path / "real", 1)[0]
    save(tmp_path / "synthetic" / "1.png", np.dstack([grey] * 3))
    found = read_sets(tmp_path / "real", tmp_path / "synthetic")
    assert np.array_equal(found.synthetic.images, found.real.images)
    assert any("stored in colours, but every pixel is grey" in note for note in found.notes)


def test_what_is_not_read_is_counted_and_said(tmp_path):
    folder_of(tmp_path / "in" / "a")
    (tmp_path / "in" / "a" / ".hidden.png").write_bytes(b"")
    (tmp_path / "in" / "notes.txt").write_text("x")
    (tmp_path / "in" / "a" / "deeper").mkdir()
    secret = tmp_path / "secret.png"
    save(secret, pixels(16, 16))
    (tmp_path / "in" / "a" / "link.png").symlink_to(secret)
    (tmp_path / "in" / "elsewhere").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "in" / "a" / "pipe.png")
    notes = []
    assert len(read_folder(tmp_path / "in", notes=notes)) == 3
    said = " ".join(notes)
    assert "1 not read, because hidden (a/.hidden.png)" in said
    assert "2 not read, because no image (a/pipe.png, notes.txt)" in said
    assert "2 not read, because a link to nothing or out of the folder (a/link.png, elsewhere)" in said
    assert "1 not read, because a folder in the folder of a class (a/deeper)" in said


def test_an_empty_folder_says_what_it_holds(tmp_path):
    (tmp_path / "scan.dcm").write_bytes(b"x")
    with pytest.raises(DataError, match=r"holds no images .* it holds 1 x .dcm"):
        read_folder(tmp_path)
    with pytest.raises(DataError, match="There is no folder"):
        read_folder(tmp_path / "nowhere")


def test_a_damaged_file_is_named(tmp_path):
    folder_of(tmp_path, shape=(60, 60))
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"1.png in .* is damaged \(.*\): repair it or remove it"):
        read_folder(tmp_path)
    (tmp_path / "1.png").write_bytes(b"no image at all")
    with pytest.raises(DataError, match=r"1.png in .* is not an image, whatever its name says"):
        read_folder(tmp_path)
    assert not list((cache_dir() / "folders").glob(".*"))  # nothing half written is left


def test_a_decompression_bomb_is_refused_by_its_header(tmp_path):
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    content = b"".join(struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks)
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    with pytest.raises(DataError, match=r"bomb.png claims more pixels than the limit"):
        read_folder(tmp_path)


STORED = {  # what the EXIF tag says was done to the upright image before it was stored
    1: lambda upright: upright, 2: np.fliplr, 3: lambda upright: np.rot90(upright, 2), 4: np.flipud,
    5: lambda upright: np.swapaxes(upright, 0, 1), 6: np.rot90,
    7: lambda upright: np.rot90(np.swapaxes(upright, 0, 1), 2), 8: lambda upright: np.rot90(upright, -1),
}  # fmt: skip
SAVED = {
    "jpg": {"quality": 100, "subsampling": 0}, "png": {}, "webp": {"lossless": True}, "tif": {},
    "tiff": {"compression": "tiff_lzw"},
}  # fmt: skip


def save_turned(path, upright, orientation, **settings):
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(path, np.ascontiguousarray(STORED[orientation](upright)), exif=exif, **settings)


@pytest.mark.parametrize("suffix", list(SAVED))
@pytest.mark.parametrize("orientation", list(STORED))
@pytest.mark.parametrize("shape", [(16, 24), (16, 24, 3)])
def test_turned_images_are_upright_in_every_format(tmp_path, suffix, orientation, shape):
    upright = np.zeros(shape, np.uint8)
    upright[:8, :8], upright[8:, 8:16] = 250, 120
    if len(shape) == 3:
        upright[..., 2] //= 2
    plain = np.ascontiguousarray(upright[::-1])
    save_turned(tmp_path / f"a.{suffix}", upright, orientation, **SAVED[suffix])
    save(tmp_path / "b.png", plain)  # what lies behind a turned image in the pack stays where it belongs
    found = read_folder(tmp_path).images
    wanted = [each[None] if each.ndim == 2 else each.transpose(2, 0, 1) for each in (upright, plain)]
    assert np.abs(found[0].astype(int) - wanted[0]).max() <= (4 if suffix == "jpg" else 0)
    assert np.array_equal(found[1], wanted[1])


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_turned_images_of_sixteen_bits_are_upright(tmp_path, suffix):
    upright = pixels(16, 24, top=65536, dtype=np.uint16)
    upright[0, 0] = 65535
    save_turned(tmp_path / f"a.{suffix}", upright, 6)
    assert np.array_equal(read_folder(tmp_path).images[0, 0], np.rint(upright / 257))


def test_a_tag_behind_the_pixels_is_refused_and_not_packed_askew(tmp_path):
    save_turned(tmp_path / "a.png", pixels(16, 24), 6)
    content = (tmp_path / "a.png").read_bytes()
    start = content.index(b"eXIf") - 4
    end = start + 12 + struct.unpack(">I", content[start : start + 4])[0]
    moved = content[:start] + content[end:-12] + content[start:end] + content[-12:]
    (tmp_path / "a.png").write_bytes(moved)
    with pytest.raises(DataError, match=r"a.png in .* decodes to 16 x 24 px, but its header says 24 x 16: save it"):
        read_folder(tmp_path)


@pytest.mark.parametrize("block", [b"II*\0", b"junk"])
def test_an_exif_block_that_is_cut_short_gets_a_sentence(tmp_path, block):
    save(tmp_path / "a.webp", pixels(16, 24), exif=b"Exif\0\0" + block)
    with pytest.raises(DataError, match=r"a.webp in .* is damaged \(.*\): repair it or remove it"):
        read_folder(tmp_path)


def test_nothing_that_does_not_fit_is_packed(tmp_path):
    with open(tmp_path / "pack", "wb") as stream, pytest.raises(DataError, match="does not fit into a pack"):
        packing.pack(stream, [pixels(3, 16, 16)], (1, 1, 16, 16))


def test_each_file_is_decoded_once_and_again_when_it_changes(tmp_path, monkeypatch):
    folder_of(tmp_path / "a")
    first = read_folder(tmp_path / "a").images
    opened = []
    decode = folders.decode
    monkeypatch.setattr(folders, "decode", lambda *args: opened.append(args[1]) or decode(*args))
    again = read_folder(tmp_path / "a").images
    assert opened == []
    assert isinstance(again, np.memmap)
    assert np.array_equal(first, again)
    new = save(tmp_path / "a" / "1.png", pixels(16, 16, seed=99))
    os.utime(tmp_path / "a" / "1.png", ns=(1, 1))
    assert np.array_equal(read_folder(tmp_path / "a").images[1, 0], new)
    assert len(opened) == 3
    assert len(list((cache_dir() / "folders").glob("*.npy"))) == 1  # the old state is gone


def test_other_files_of_equal_size_and_date_are_read_anew(tmp_path):
    def export(value):
        for i in range(2):
            save(tmp_path / "new.bmp", np.full((16, 16), value + i, np.uint8))
            os.utime(tmp_path / "new.bmp", (0, 0))
            os.replace(tmp_path / "new.bmp", tmp_path / "a" / f"{i}.bmp")

    (tmp_path / "a").mkdir()
    for value in (10, 200):
        export(value)
        assert read_folder(tmp_path / "a").images[:, 0, 0, 0].tolist() == [value, value + 1]
    save(tmp_path / "a" / "0.bmp", np.full((16, 16), 90, np.uint8))  # in place: the same inode
    os.utime(tmp_path / "a" / "0.bmp", (0, 0))
    assert read_folder(tmp_path / "a").images[0, 0, 0, 0] == 90


@pytest.mark.parametrize("content", ["[]", "3", "{}", "[[1, 2]]", "[4, 4, 4]", '[["', "null"])
def test_kept_headers_that_do_not_fit_are_read_again(tmp_path, content):
    arrays = folder_of(tmp_path / "a")
    read_folder(tmp_path / "a")
    (kept,) = (cache_dir() / "folders").glob("*.json")
    kept.write_text(content)
    assert np.array_equal(read_folder(tmp_path / "a").images, np.stack(arrays)[:, None])


@pytest.fixture
def no_waiting():
    def give_up(*_):
        raise AssertionError("A pipe was opened.")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(5)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("no_waiting")
def test_a_pipe_is_never_opened(tmp_path):
    os.mkfifo(tmp_path / "x.npz")
    for path in (tmp_path, tmp_path / "x.npz"):
        with pytest.raises(DataError, match=r"x.npz is neither a folder of images nor an npz file"):
            read_folder(path)


def test_nothing_of_a_restricted_folder_stays_in_the_cache(tmp_path):
    arrays = folder_of(tmp_path / "a")
    read_folder(tmp_path / "a")
    found = read_folder(tmp_path / "a", restricted=True)
    assert found.restricted
    assert np.array_equal(found.images, np.stack(arrays)[:, None])
    assert not list((cache_dir() / "folders").glob("*.npy"))


def write_table(path, rows, header="file,subject"):
    path.write_text("\n".join([header, *(",".join(row) for row in rows)]) + "\n")
    return path


def test_subjects_by_path_by_folder_and_by_name(tmp_path):
    folder_of(tmp_path / "real", 2), folder_of(tmp_path / "holdout", 2), folder_of(tmp_path / "synthetic", 2)
    save(tmp_path / "holdout" / "own.png", pixels(16, 16))
    rows = [(f"{s}/{i}.png", f"p{i}{s[0]}") for s in ("real", "holdout") for i in range(2)] + [("own.png", "p9")]
    sets = [tmp_path / name for name in ("real", "synthetic", "holdout")]
    found = read_sets(*sets, subjects=write_table(tmp_path / "s.csv", rows))
    assert found.real.subjects.tolist() == ["p0r", "p1r"]
    assert found.holdout.subjects.tolist() == ["p0h", "p1h", "p9"]
    assert (found.real.subject_kind, found.synthetic.subject_kind) == ("subject", "image")


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([("0.png", "a")], "names 1 of the 3 images in real: 2 are missing, the first is 1.png"),
        ([(f"{i}.png", "a") for i in range(4)], "1 of its 4 files fit no image; the first is 3.png"),
        ([("0.png", "a"), ("0.png", "b")], "gives 0.png two subjects, a and b"),
        ([("0.png", "")], "leaves the subject empty in 1 rows, the first in row 2"),
    ],
)
def test_a_table_of_subjects_that_does_not_fit_is_refused(tmp_path, rows, sentence):
    folder_of(tmp_path / "real")
    with pytest.raises(DataError, match=sentence):
        read_folder(tmp_path / "real", subjects=write_table(tmp_path / "s.csv", rows))


def test_a_name_that_fits_two_images_is_refused(tmp_path):
    folder_of(tmp_path / "real"), folder_of(tmp_path / "holdout"), folder_of(tmp_path / "synthetic")
    sets = [tmp_path / name for name in ("real", "synthetic", "holdout")]
    with pytest.raises(DataError, match="3 of its 3 files fit several images"):
        read_sets(*sets, subjects=write_table(tmp_path / "s.csv", [(f"{i}.png", "a") for i in range(3)]))
    with pytest.raises(DataError, match="needs the columns 'file' and 'subject'"):
        read_sets(*sets, subjects=write_table(tmp_path / "s.csv", [], header="image,patient"))


def test_unknown_subjects_of_two_sets_never_coincide(tmp_path):
    folder_of(tmp_path / "real"), folder_of(tmp_path / "synthetic"), folder_of(tmp_path / "holdout")
    found = read_sets(tmp_path / "real", tmp_path / "synthetic", tmp_path / "holdout")
    assert not set(found.real.subjects) & set(found.holdout.subjects)


@pytest.mark.parametrize("shape", [(4, 16, 18), (4, 16, 18, 1), (4, 1, 16, 18), (4, 16, 18, 3), (4, 3, 16, 18)])
def test_an_npz_of_any_layout(tmp_path, shape):
    images = pixels(*shape)
    np.savez(tmp_path / "set.npz", images=images, labels=np.array([3, 3, 10, 3]), subjects=np.array([7, 7, 8, 9]))
    found = read_folder(tmp_path / "set.npz")
    moved = images[:, None] if images.ndim == 3 else images if shape[1] < 4 else images.transpose(0, 3, 1, 2)
    assert np.array_equal(found.images, moved)
    assert found.classes == ("3", "10")
    assert found.labels.tolist() == [0, 0, 1, 0]
    assert found.subjects.tolist() == ["7", "7", "8", "9"]
    assert np.array_equal(read_folder(tmp_path).images, moved)  # a folder that holds it alone


@pytest.mark.parametrize(
    ("shape", "last"),
    [
        ((2, 9, 8, 8), False),
        ((2, 64, 16, 16), False),
        ((2, 1, 8, 8), False),
        ((2, 8, 9, 4), True),
        ((2, 9, 9, 3), True),
    ],
)
def test_channels_are_told_by_their_number(tmp_path, shape, last):
    np.savez(tmp_path / "set.npz", images=pixels(*shape))
    assert np.array_equal(
        packing.npz_images(tmp_path / "set.npz", pixels(*shape)),
        pixels(*shape).transpose(0, 3, 1, 2) if last else pixels(*shape),
    )


def test_class_names_of_any_length_are_names(tmp_path):
    np.savez(tmp_path / "set.npz", images=pixels(3, 8, 8), labels=np.array(["9" * 5000, "10", "9"]))
    assert read_folder(tmp_path / "set.npz").classes == ("9", "10", "9" * 5000)


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"images": pixels(2, 1, 28, 1)}, "channels cannot be told"),
        ({"images": pixels(2, 3, 16, 3)}, "channels cannot be told"),
        ({"images": pixels(2, 16, 16, 9)}, "channels cannot be told"),
        ({"images": pixels(2, 8, 8), "labels": np.array([0.5, 1])}, r"but they are float64 \(2,\)"),
        ({"pixels": pixels(2, 8, 8)}, "has no array 'images'"),
        ({"images": np.zeros((2, 8, 8))}, "images must be uint8"),
        ({"images": pixels(2, 9, 9, 9)}, "channels cannot be told"),
        ({"images": pixels(2, 8, 8), "labels": np.arange(3)}, "labels must be 2 integers or strings"),
        ({"images": np.array([{}], dtype=object)}, "pickled"),
    ],
)
def test_an_npz_that_does_not_fit_is_refused(tmp_path, arrays, sentence):
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(DataError, match=sentence):
        read_folder(tmp_path / "set.npz")


def test_an_npz_and_a_folder_agree(tmp_path):
    arrays = folder_of(tmp_path / "real" / "1", shape=(20, 20))
    np.savez(tmp_path / "made.npz", images=pixels(5, 32, 32, 3), labels=np.array([1, 0, 1, 0, 1]))
    found = read_sets(tmp_path / "real", tmp_path / "made.npz", image_size=20)
    assert found.real.images.shape[1:] == found.synthetic.images.shape[1:] == (3, 20, 20)
    assert np.array_equal(found.real.images[:, 0], np.stack(arrays))
    assert found.real.classes == ("0", "1")
    assert found.real.labels.tolist() == [1, 1, 1]


def test_sets_with_other_numbers_of_channels_are_refused(tmp_path):
    folder_of(tmp_path / "real", shape=(32, 32))
    np.savez(tmp_path / "made.npz", images=pixels(5, 9, 32, 32))
    with pytest.raises(DataError, match=r"different numbers of channels \(real 1, synthetic 9\)"):
        read_sets(tmp_path / "real", tmp_path / "made.npz")


@pytest.mark.parametrize("turn", [lambda x: x[..., ::-1], lambda x: x[::-1], lambda x: x.transpose(0, 1, 3, 2)])
def test_views_become_tensors(turn):
    images = pixels(2, 1, 8, 8)
    floats = images.astype(np.float64) / 127.5 - 1
    for view in (turn(images), turn(floats), turn(floats.astype(">f4"))):
        assert np.allclose(as_images(view).numpy(), turn(floats), atol=1e-6)
    assert np.allclose(as_tensor(turn(images)).numpy(), turn(floats), atol=1e-6)


def test_tensors_do_not_share_memory_with_their_images():
    images = np.zeros((1, 1, 8, 8), np.float32)
    as_images(images).add_(1)
    assert not images.any()
