"""Files that survive a kill: atomic writes, JSON read with a sentence, locks that end with their process.

A lock is a flock on a small file that is never deleted: it belongs to the process, so a kill always frees it.
"""

import fcntl
import json
import os
import socket
import time
from contextlib import contextmanager
from pathlib import Path

LOCK_WAIT = 20.0  # seconds: long enough for the dying workers of a killed run to let go


class ResultsError(RuntimeError):
    """A run, a result or a file of one that cannot be used; the message says why and what to do."""


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a whole file or none: whoever reads it, even after a kill, sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable; without it a rename may be lost with the power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, document: dict) -> None:
    """A dict as readable JSON, atomically; numpy and torch numbers become plain ones."""
    write_atomically(path, (json.dumps(document, indent=1, default=_plain, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> dict:
    """The JSON object in a file; ResultsError if it is not there, not JSON or not an object."""
    try:
        document = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ResultsError(f"{path} does not exist.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ResultsError(f"{path} is not readable JSON ({error}); delete it and run again.") from None
    if not isinstance(document, dict):
        raise ResultsError(f"{path} holds a {type(document).__name__} where a JSON object belongs.")
    return document


def _plain(value):
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{value!r} of type {type(value).__name__} is not JSON")


_held: dict[Path, object] = {}  # the open lock files of this process, by path


def hold_lock(path: Path, guards: str, wait: float | None = None) -> None:
    """Takes a lock until this process ends, once; `guards` names what it guards to those who wait."""
    if path not in _held:
        _held[path] = _acquire(path, guards, LOCK_WAIT if wait is None else wait)


@contextmanager
def locked(path: Path, guards: str, wait: float | None = None):
    """Holds a lock for a block."""
    handle = _acquire(path, guards, LOCK_WAIT if wait is None else wait)
    try:
        yield
    finally:
        handle.close()


def _acquire(path: Path, guards: str, wait: float):
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = open(path, "a+")  # noqa: SIM115 - stays open as long as the lock is held
    deadline = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                handle.seek(0)
                holder = handle.read().strip() or "unknown"
                handle.close()
                raise ResultsError(
                    f"{guards} is in use by process {holder}: wait for it, stop it, or take another run_name."
                ) from None
            time.sleep(0.1)
    handle.truncate(0)
    handle.write(f"{os.getpid()} on {socket.gethostname()}")
    handle.flush()
    return handle
