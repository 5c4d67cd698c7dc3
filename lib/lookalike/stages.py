"""Stages: the long steps of a run, each finished once, whatever is killed in between.

A stage is a library function with a folder of its own and plain settings. It starts from a random state that
only the run's seed and its name decide, so neither a skipped neighbour nor the number of workers changes what
it draws. A stage that reads another's folder counts as changed when that one does.
"""

import contextlib
import ctypes
import functools
import gc
import hashlib
import importlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lookalike.files import ResultsError, locked, read_json, write_json
from lookalike.provenance import library_digest


class StageError(ResultsError):
    """A stage that cannot start or that stopped; the message names it."""


@dataclass(frozen=True)
class Stage:
    """One function call of a run: its name, its settings, and the folder <run>/stages/<name> of its own."""

    run_folder: Path
    name: str
    function: Callable
    kwargs: dict
    seed: int

    def __post_init__(self):
        check_name(self.name)
        _check_function(self.name, self.function)
        try:
            json.dumps(self.kwargs, default=os.fspath)
        except (TypeError, ValueError) as error:
            raise StageError(f"Stage {self.name}: its settings must be JSON values or paths ({error}).") from None

    @property
    def folder(self) -> Path:
        return self.run_folder / "stages" / self.name

    @property
    def lock(self) -> Path:
        # beside the stages, not in them: a lock file that is deleted while held guards nothing
        return self.run_folder / "locks" / (self.name.replace("/", "~") + ".lock")

    @functools.cached_property
    def fingerprint(self) -> str:
        """Sixteen hex digits over function, settings, seed, and the fingerprints of the stages it reads.

        Paths below the run's folder count from there: a run that was moved is the same run.
        """
        call = [self.function.__module__, self.function.__qualname__, self.kwargs, self.seed]
        text = json.dumps(call, sort_keys=True, default=os.fspath, ensure_ascii=False)
        here = re.escape(json.dumps(str(self.run_folder), ensure_ascii=False)[:-1])  # as it stands in the text
        text = re.sub(here + '(?=[/"])', '"<run>', text)
        root = self.run_folder / "stages"
        used = [Path(root, found, "stage.json") for found in re.findall('"<run>/stages/([^"]+)"', text)]
        markers = [folder / "stage.json" for path in used for folder in path.parents if folder > root]
        before = [read_json(marker)["fingerprint"] for marker in markers if marker.exists()]
        return hashlib.sha256(json.dumps([text, before]).encode()).hexdigest()[:16]

    @property
    def call(self) -> dict:
        """What is called, as JSON: an audit of the stage calls its counterpart with the same settings."""
        settings = json.loads(json.dumps(self.kwargs, default=os.fspath))
        return {"module": self.function.__module__, "function": self.function.__qualname__, "settings": settings}

    def finished(self) -> dict | None:
        """The stored {fingerprint, result, seconds, libraries} if these settings have been run, else None."""
        path = self.folder / "result.json"
        outcome = read_json(path) if path.exists() else None
        return outcome if outcome and outcome.get("fingerprint") == self.fingerprint else None

    def execute(self) -> dict:
        """Runs the function on what an earlier attempt with these settings left; gives what is stored."""
        with locked(self.lock, f"Stage {self.name} of {self.run_folder.name}"):
            libraries = sorted({*self._prepare(), library_digest()})
            write_json(
                self.folder / "stage.json", {"fingerprint": self.fingerprint, "libraries": libraries} | self.call
            )
            started = time.monotonic()
            with seeded(f"{self.seed}/{self.name}"):
                result = self.function(self.folder, **self.kwargs)
            if not isinstance(result, dict):
                raise TypeError(f"it must return a dict, not {type(result).__name__}")
            seconds = round(time.monotonic() - started, 3)
            outcome = {
                "fingerprint": self.fingerprint,
                "result": result,
                "seconds": seconds,
                "libraries": libraries,
            }
            write_json(self.folder / "result.json", outcome)
            return read_json(self.folder / "result.json")  # what a resumed run would get, to the last type

    def _prepare(self) -> list[str]:
        """Empties the folder if other settings made it; gives the digests of the code that wrote there."""
        marker = self.folder / "stage.json"
        begun = read_json(marker) if marker.exists() else {}
        if begun.get("fingerprint") == self.fingerprint:
            return begun["libraries"]
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        return []


def check_name(name: str) -> None:
    """Raises StageError unless the name is a relative path of plain words, like mnist/vae/sigma0.1."""
    if not all(re.fullmatch(r"[A-Za-z0-9_+=-][A-Za-z0-9_.+=-]*", part) for part in name.split("/")):
        raise StageError(
            f"{name!r} cannot name a stage: use words of letters, digits and _ . + = - with single slashes "
            "between, none beginning with a dot."
        )


def _check_function(name: str, function: Callable) -> None:
    module, qualname = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    if module not in (None, "__main__") and "<" not in qualname:
        found = functools.reduce(lambda part, step: getattr(part, step, None), qualname.split("."), _module(module))
        if found is function:
            return
    raise StageError(
        f"Stage {name}: {qualname or function!r} must be a function of the library: a worker process cannot "
        "find a lambda or a function that is written in the notebook."
    )


def _module(name: str):
    return sys.modules.get(name) or importlib.import_module(name)


@contextlib.contextmanager
def seeded(text: str):
    """Seeds python, numpy and torch from a text for a block; afterwards they go on as if nothing happened."""
    before = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global state is what is guarded
    devices = range(torch.cuda.device_count())  # none without a GPU
    with torch.random.fork_rng(devices=devices):
        seed_everything(int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big"))
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])  # noqa: NPY002


def seed_everything(seed: int) -> None:
    """Seeds the global generators of python, numpy and torch, GPUs included."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - libraries that draw from the global state
    torch.manual_seed(seed)


# --- many stages --------------------------------------------------------------------------------------------


def execute_all(stages: list[Stage], workers: int, finished: Callable[[Stage, dict], None]) -> None:
    """Executes stages, in this process or in `workers` others, and reports each outcome as it comes.

    The first stage that fails stops the others and raises StageError. What the functions print goes to
    `<run>/logs/<name>.txt`: side by side on a page it would be unreadable.
    """
    if workers <= 1 or not stages:
        for stage in stages:
            finished(stage, _named(stage, lambda stage=stage: _execute_logged(stage)))
        return
    with _borrowed_pool(workers) as pool:
        with _spawn_settings():
            pending = {pool.submit(_execute_logged, stage): stage for stage in stages}
        while pending:
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                stage = pending.pop(future)
                finished(stage, _named(stage, future.result))


_kept: dict[tuple, ProcessPoolExecutor] = {}  # at most one, under what its workers were started with
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_kept.clear)  # the parent's workers


@contextlib.contextmanager
def _borrowed_pool(workers: int):
    """A pool whose workers stay for the next call: starting one costs as long as many a stage (import of torch).

    They stay only for a call that would start the same: as many workers, the same environment and folder. A call
    that fails or is interrupted kills them. Outside the main thread nothing is kept (`_start_worker` says why).
    """
    main = threading.current_thread() is threading.main_thread()
    key = (workers, os.getcwd(), tuple(sys.path), tuple(sorted(os.environ.items())))
    if not main or key not in _kept:
        close_workers()
    pool = _kept.pop(key, None) or ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start_worker, (os.getpid(),)
    )
    try:
        yield pool
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.kill()  # shutting the pool down would wait for hours of work that nobody reads
        pool.shutdown(cancel_futures=True)
        raise
    if main:
        _kept[key] = pool
    else:
        pool.shutdown()


def close_workers() -> None:
    """Ends the workers that wait for more stages; their peak memory counts from here on."""
    while _kept:
        _kept.popitem()[1].shutdown()


def execute_one(stage: Stage) -> dict:
    """Executes a stage in this process; what it prints is shown."""
    return _named(stage, stage.execute)


def _named(stage: Stage, outcome: Callable[[], dict]) -> dict:
    try:
        return outcome()
    except StageError:
        raise
    except BrokenProcessPool:
        raise StageError(
            f"A worker died without a word while {stage.name} was running or waiting; often the memory was "
            "full: resume the run with fewer workers."
        ) from None
    except Exception as error:
        raise StageError(f"Stage {stage.name} stopped: {type(error).__name__}: {error}") from error


def _execute_logged(stage: Stage) -> dict:
    log = stage.run_folder / "logs" / f"{stage.name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        open(log, "a", buffering=1) as handle,
        contextlib.redirect_stdout(handle),
        contextlib.redirect_stderr(handle),
    ):
        try:
            return stage.execute()
        finally:
            _release_memory()


def _release_memory() -> None:
    """Gives back what a finished stage held on a GPU, where the other worker's next stage may need it."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _start_worker(parent: int) -> None:
    """Ties a worker's life to its parent's, even if that is killed, and gives it one thread."""
    if sys.platform == "linux":  # strictly to the thread that starts it: why only the main thread keeps a pool
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupted notebook stops its workers itself
    torch.set_num_threads(1)


@contextlib.contextmanager
def _spawn_settings():
    """While workers start: one thread for every numerical library, and no second run of the caller's script.

    spawn imports the parent's __main__ anew, which a notebook does not have and an unguarded script would not
    survive; stage functions come from the library, so nothing in __main__ is needed.
    """
    main, hidden = sys.modules["__main__"], {}
    for name in ("__spec__", "__file__"):
        if hasattr(main, name):
            hidden[name] = getattr(main, name)
            setattr(main, name, None)
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
    before = {name: os.environ.get(name) for name in threads}
    os.environ.update(dict.fromkeys(threads, "1"))
    try:
        yield
    finally:
        for name, value in hidden.items():
            setattr(main, name, value)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
