"""Reading files that somebody else made: archives, arrays and images, each within stated limits.

Every reader here assumes the worst of its input: a checksum says that a file is the one we meant, not that
its maker meant well. What is refused raises DataError with one sentence.
"""

import bz2
import contextlib
import gzip
import hashlib
import io
import lzma
import math
import os
import shutil
import stat
import tarfile
import tempfile
import unicodedata
import zipfile
import zlib
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, UnidentifiedImageError

MAX_MEMBERS = 200_000
MAX_UNPACKED_BYTES = 64 * 2**30  # the largest set here, ISIC 2020, unpacks to about 23 GB
MAX_RATIO = 200  # images and text pack up to about 20 to 1
SMALL = 2**20  # a member below 1 MiB may pack as well as it likes
MAX_IDX_BYTES = 2**30
MAX_ARRAY_BYTES = 16 * 2**30
MAX_PIXELS = 64 * 10**6
_CHUNK = 2**20


class DataError(RuntimeError):
    """A file cannot be had or must not be read; the message is one sentence for the user."""


def unpack(archive: Path | str, into: Path | str, max_members=MAX_MEMBERS, max_bytes=MAX_UNPACKED_BYTES) -> Path:
    """Unpacks a zip or tar into the new folder `into` and returns that; if refused, nothing is left."""
    archive, into = Path(archive), Path(into)
    if into.exists():
        raise DataError(f"{into} already exists: remove it, or unpack {archive.name} somewhere else.")
    into.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{into.name}.", dir=into.parent))
    try:
        if zipfile.is_zipfile(archive):
            _unpack_zip(archive, staging, max_members, max_bytes)
        else:
            _unpack_tar(archive, staging, max_members, max_bytes)
        staging.chmod(0o755)
        os.rename(staging, into)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return into


def open_zip(path: Path | str, max_members=MAX_MEMBERS, max_bytes=MAX_UNPACKED_BYTES) -> zipfile.ZipFile:
    """The zip at `path`, once every member's name, kind and size has been found acceptable."""
    path = Path(path)
    try:
        opened = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"{path.name} is not a readable zip file: {error}.") from None
    try:
        names = _Names(path.name, max_members, max_bytes)
        for member in opened.infolist():
            names.add(member.filename, member.file_size, _zip_kind(member), member.is_dir())
            _refuse_ratio(path.name, member.filename, member.file_size, member.compress_size)
    except DataError:
        opened.close()
        raise
    return opened


def read_member(opened: zipfile.ZipFile, name: str) -> bytes:
    """One member's bytes, its checksum verified."""
    try:
        return opened.read(name)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DataError(f"{_base(opened)} is damaged at {name!r}: {error}.") from None


def read_npz(path: Path | str, keys=None) -> dict[str, np.ndarray]:
    """The named arrays of an npz (all by default); pickled objects and headers that lie are refused."""
    path = Path(path)
    with open_zip(path, max_bytes=MAX_ARRAY_BYTES) as opened:
        for member in opened.infolist():
            _check_npy_header(path.name, opened, member)
    with np.load(path, allow_pickle=False) as arrays:
        missing = sorted(set(keys or ()) - set(arrays.files))
        if missing:
            raise DataError(f"{path.name} has no array {missing[0]!r}; it holds {', '.join(arrays.files)}.")
        return {key: arrays[key] for key in (keys or arrays.files)}


def read_idx(path: Path | str, max_bytes=MAX_IDX_BYTES) -> np.ndarray:
    """The uint8 array in a gzipped idx file (MNIST's format); unpacks no more than its header promises."""
    path = Path(path)
    try:
        with gzip.open(path) as stream:
            magic = stream.read(4)
            if len(magic) != 4 or magic[:3] != b"\0\0\x08" or not 1 <= magic[3] <= 4:
                raise DataError(f"{path.name} is not an idx file of bytes: it starts with {magic!r}.")
            header = stream.read(4 * magic[3])
            shape = tuple(int.from_bytes(header[i : i + 4], "big") for i in range(0, len(header), 4))
            promised = math.prod(shape)
            if promised > max_bytes:
                raise DataError(
                    f"{path.name} claims {promised:,} bytes of data (shape {shape}), over the limit of {max_bytes:,}."
                )
            content = stream.read(promised)
            if len(content) < promised:
                raise DataError(
                    f"{path.name} promises {promised:,} bytes in its header (shape {shape}) "
                    f"but holds only {len(content):,}."
                )
            if stream.read(1):
                raise DataError(
                    f"{path.name} unpacks to more than the {promised:,} bytes that its header promises: "
                    "the rest was not read."
                )
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path.name} is not a readable gzip file: {error}.") from None
    return np.frombuffer(content, np.uint8).reshape(shape)


def read_image(content: bytes, name: str, mode: str) -> np.ndarray:
    """A PNG or JPEG as uint8, (H, W) for mode "L", (H, W, 3) for "RGB"; size is checked before decoding."""
    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise DataError(
                    f"{name} claims {width:,} x {height:,} pixels, "
                    f"over the limit of {MAX_PIXELS:,}: it was not decoded."
                )
            return np.asarray(image.convert(mode))
    except Image.DecompressionBombError:
        raise DataError(f"{name} claims more pixels than the limit of {MAX_PIXELS:,}: it was not decoded.") from None
    except UnidentifiedImageError:
        raise DataError(f"{name} is not a PNG or JPEG image.") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{name} is not a readable PNG or JPEG image: {error}.") from None


def content_digest(path: Path | str, max_bytes: int) -> str:
    """sha256 of what is inside a .gz or .zip, which stays the same however the file was packed.

    For a zip: over its files in sorted order, each as name, NUL, decimal size, NUL, bytes.
    """
    path, digest = Path(path), hashlib.sha256()
    if zipfile.is_zipfile(path):
        with open_zip(path, max_bytes=max_bytes) as opened:
            for member in sorted((m for m in opened.infolist() if not m.is_dir()), key=lambda m: m.filename):
                content = read_member(opened, member.filename)
                digest.update(f"{member.filename}\0{len(content)}\0".encode())
                digest.update(content)
        return digest.hexdigest()
    try:
        with gzip.open(path) as stream:
            for chunk in _within(stream, max_bytes, path.name):
                digest.update(chunk)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path.name} is not a readable gzip file: {error}.") from None
    return digest.hexdigest()


class _Names:
    """The members seen so far, and the reasons to refuse the next one."""

    def __init__(self, archive, max_members, max_bytes):
        self.archive, self.max_members, self.max_bytes = archive, max_members, max_bytes
        self.seen, self.folders, self.total = {}, {}, 0

    def add(self, name, size, kind, is_folder):
        if kind not in ("file", "folder"):
            raise DataError(f"{self.archive} holds {kind} named {name!r}: only plain files are unpacked.")
        parts = self._safe_parts(name, is_folder)
        if len(self.seen) + len(self.folders) >= self.max_members:
            raise DataError(f"{self.archive} holds more than {self.max_members:,} members.")
        for depth in range(1, len(parts) + (1 if is_folder else 0)):
            self._claim(self.folders, parts[:depth], name, other=self.seen)
        if not is_folder:
            if _folded(parts) in self.seen:
                raise DataError(
                    f"{self.archive} holds {name!r} and {self.seen[_folded(parts)]!r}, "
                    "which are one file where upper and lower case are the same."
                )
            self._claim(self.seen, parts, name, other=self.folders)
        self.total += size
        if self.total > self.max_bytes:
            raise DataError(f"{self.archive} unpacks to more than {self.max_bytes:,} bytes.")

    def _claim(self, mine, parts, name, other):
        spelled, key = "/".join(parts), _folded(parts)
        if key in other or mine.setdefault(key, spelled) != spelled:
            clash = other.get(key) or mine[key]
            raise DataError(f"{self.archive} holds {name!r}, which clashes with {clash!r}.")

    def _safe_parts(self, name, is_folder):
        path = PurePosixPath(name)
        odd = "\\" in name or "\0" in name or name[1:2] == ":" or not (path.parts or is_folder)
        if path.is_absolute() or ".." in path.parts or odd:
            raise DataError(f"{self.archive} holds a member named {name!r}, which would land outside its folder.")
        return path.parts


def _folded(parts):
    return unicodedata.normalize("NFC", "/".join(parts)).casefold()


def _zip_kind(member):
    mode = member.external_attr >> 16
    if member.flag_bits & 0x1:
        return "an encrypted member"
    if stat.S_ISLNK(mode):
        return "a link"
    if mode and stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "a device or pipe"
    return "folder" if member.is_dir() else "file"


def _tar_kind(member):
    if member.issym() or member.islnk():
        return "a link"
    if member.isfile() or member.isdir():
        return "folder" if member.isdir() else "file"
    return "a device or pipe"


def _refuse_ratio(archive, name, size, packed):
    if size > SMALL and size > MAX_RATIO * max(packed, 1):
        raise DataError(
            f"{archive} holds {name!r}, which unpacks {size // max(packed, 1):,} to 1 "
            f"(the limit is {MAX_RATIO}): this looks like a zip bomb."
        )


def _unpack_zip(archive, into, max_members, max_bytes):
    with open_zip(archive, max_members, max_bytes) as opened:
        for member in opened.infolist():
            target = into / member.filename
            if member.is_dir():
                target.mkdir(parents=True, exist_ok=True)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with opened.open(member) as source, open(target, "xb") as out:
                    shutil.copyfileobj(source, out, _CHUNK)
            except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                raise DataError(f"{archive.name} is damaged at {member.filename!r}: {error}.") from None


def _unpack_tar(archive, into, max_members, max_bytes):
    names = _Names(archive.name, max_members, max_bytes)
    limit = max(MAX_RATIO * archive.stat().st_size, SMALL)
    try:
        with (
            contextlib.closing(_Bounded(_decompressed(archive), limit, archive.name)) as stream,
            tarfile.open(fileobj=stream, mode="r|") as opened,
        ):
            for member in opened:
                names.add(member.name, member.size, _tar_kind(member), member.isdir())
                target = into / member.name
                if member.isdir():
                    target.mkdir(parents=True, exist_ok=True)
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                with open(target, "xb") as out:
                    shutil.copyfileobj(opened.extractfile(member), out, _CHUNK)
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{archive.name} is not a readable zip or tar archive: {error}.") from None


def _decompressed(archive):
    with open(archive, "rb") as file:
        start = file.read(6)
    for magic, opener in ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ\0", lzma.open)):
        if start.startswith(magic):
            return opener(archive)
    return open(archive, "rb")


class _Bounded:
    """A stream that refuses to give more than `limit` bytes."""

    def __init__(self, stream, limit, name):
        self.stream, self.left, self.limit, self.name = stream, limit, limit, name

    def read(self, size):
        content = self.stream.read(min(size, self.left + 1))
        self.left -= len(content)
        if self.left < 0:
            raise DataError(
                f"{self.name} unpacks to more than {self.limit:,} bytes ({MAX_RATIO} to 1): this looks like a bomb."
            )
        return content

    def close(self):
        self.stream.close()


def _within(stream, max_bytes, name):
    total = 0
    while chunk := stream.read(_CHUNK):
        total += len(chunk)
        if total > max_bytes:
            raise DataError(f"{name} unpacks to more than {max_bytes:,} bytes, which the manifest gives as its size.")
        yield chunk


def _check_npy_header(archive, opened, member):
    """The array's header must promise exactly the bytes that follow it, and no Python objects."""
    try:
        with opened.open(member) as stream:
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(stream)
            begins = stream.tell()
    except (ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{archive} holds {member.filename!r}, which is not a numpy array: {error}.") from None
    if dtype.hasobject:
        raise DataError(
            f"{archive} holds pickled Python objects in {member.filename!r}, which could run code when read: refused."
        )
    promised = math.prod(shape) * dtype.itemsize
    if begins + promised != member.file_size:
        raise DataError(
            f"{archive} promises {promised:,} bytes in the header of {member.filename!r} (shape {shape}) "
            f"but holds {member.file_size - begins:,}."
        )


def _base(opened):
    return Path(opened.filename).name
