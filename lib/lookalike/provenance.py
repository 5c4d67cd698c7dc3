"""Where a number comes from: code, versions, machine, memory."""

import functools
import hashlib
import os
import platform
import resource
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from lookalike import paths

PACKAGES = ("lookalike", "torch", "torchvision", "opacus", "diffusers", "numpy", "scikit-learn")


@functools.cache  # the code that this process has loaded, not what an editor makes of it meanwhile
def library_digest() -> str:
    """Twelve hex digits over the library's source: equal digests, equal code."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def provenance() -> dict:
    """What was there at the start of a run, as JSON."""
    commit, dirty = git_state(paths.project_root())
    return {
        "commit": commit,
        "dirty": dirty,
        "library": library_digest(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "device": device_name(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def git_state(root: Path) -> tuple[str | None, bool | None]:
    """The commit, and whether anything but runs and kept results differs from it; None for what git cannot say."""
    commit = _git(root, "rev-parse", "--verify", "HEAD")
    if commit is None:
        return None, None
    written = [":(exclude)book/results", ":(exclude)runs"]
    runs = paths.runs_dir()
    if runs.is_relative_to(root) and runs != root:
        written.append(f":(exclude){runs.relative_to(root)}")
    found = _git(root, "status", "--porcelain", "--untracked-files=all", "--", ".", *written)
    return commit, None if found is None else bool(found)


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=60)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def device_name() -> str:
    """The GPU's name, or the processor's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"CPU, {models[0] if models else platform.machine()}"


def peak_memory() -> dict[str, int]:
    """The peak so far in MiB: of this process, of its largest finished worker, of the GPU if it was used."""
    unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss counts bytes on macOS, KiB on Linux
    peak = {
        "process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit,
        "largest_worker": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // unit,
    }
    if torch.cuda.is_initialized():
        peak["gpu"] = torch.cuda.max_memory_allocated() // 2**20
    return peak
