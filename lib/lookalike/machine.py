"""What `lookalike doctor` finds out about the machine it runs on."""

import importlib.util
import os
import platform
import shutil
import sys
from pathlib import Path

from lookalike import paths, runner


def examine() -> list[dict]:
    """One row per finding: what, found, and ok (False only where even the small runs would fail)."""
    rows = [_python(), *_torch(), _kernel(), *_room(), *_data_folders(), *_weights(), *_full_scale()]
    return [{"what": what, "found": found, "ok": ok} for what, found, ok in rows]


def _python():
    return "python", f"{platform.python_version()} at {sys.executable}", sys.version_info >= (3, 11)


def _torch():
    if importlib.util.find_spec("torch") is None:
        return [("torch", "not installed: make setup", False)]
    import torch

    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        device = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, {memory:.0f} GiB"
    else:
        device = "CPU only; full runs want a GPU"
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} (OMP_NUM_THREADS sets it)"
    return [("torch", torch.__version__, True), ("device", device, True), ("threads", threads, True)]


def _kernel():
    there = importlib.util.find_spec("ipykernel") is not None
    return "kernel", "ipykernel of this Python" if there else "ipykernel is not installed: make setup", there


def _room():
    """Free space where runs and the cache are written; the folder itself may not exist yet."""
    from lookalike.data import manifest

    for what, folder in (("runs", paths.runs_dir()), ("cache", manifest.cache_dir())):
        there = next(place for place in (folder, *Path(folder).parents) if place.exists())
        free = shutil.disk_usage(there).free / 2**30
        writable = os.access(there, os.W_OK)
        yield what, f"{folder}, {free:.0f} GiB free" + ("" if writable else ", not writable"), writable


def _data_folders():
    from lookalike.data import manifest

    mirror = manifest.mirror_dir()
    yield "mirror", str(mirror) if mirror else "none (LOOKALIKE_MIRROR names one)", True


def _weights():
    """Where each set of weights is; chapters say which they can do without."""
    from lookalike.data import manifest

    for entry in manifest.load_manifest().entries.values():
        if entry.kind == "weights":
            yield f"weights {entry.name}", manifest.status(entry.name), True


def _full_scale():
    """What each chapter uses beyond stand-ins and would still have to fetch."""
    from lookalike.data import manifest

    for chapter in runner.chapter_names():
        wanted = [
            e.name for e in manifest.load_manifest().entries.values() if chapter in e.chapters and not e.stand_in_for
        ]
        missing = [name for name in wanted if manifest.status(name) in ("to download", "to install", "by hand")]
        found = ", ".join(f"{name} ({manifest.status(name)})" for name in missing) or "nothing"
        yield f"{chapter}: data and weights not here", found, True
