"""Where things stand: the project's root and the folders below it.

Chapters work from any folder because nobody but this file turns a name into a place. Every function
asks the environment anew, so a test can point the project at a folder of its own with LOOKALIKE_ROOT.
"""

import os
from pathlib import Path


class ProjectNotFound(RuntimeError):
    """No folder with the book could be found; the message says how to name one."""


def project_root() -> Path:
    """The folder with pyproject.toml and book/: LOOKALIKE_ROOT, else above this file, else above the cwd."""
    named = os.environ.get("LOOKALIKE_ROOT")
    if named:
        root = Path(named).resolve()
        if not _is_root(root):
            raise ProjectNotFound(f"LOOKALIKE_ROOT is {named}, but that folder does not hold pyproject.toml and book/.")
        return root
    for start in (Path(__file__).resolve(), Path.cwd() / "here"):
        for folder in start.parents:
            if _is_root(folder):
                return folder
    raise ProjectNotFound(
        "Lookalike's book is not near here: run from inside a clone, or set LOOKALIKE_ROOT to the folder "
        "that holds pyproject.toml and book/."
    )


def _is_root(folder: Path) -> bool:
    return (folder / "pyproject.toml").is_file() and (folder / "book").is_dir()


def book_dir() -> Path:
    return project_root() / "book"


def chapters_dir() -> Path:
    return book_dir() / "chapters"


def params_dir() -> Path:
    return book_dir() / "params"


def reported_dir() -> Path:
    return book_dir() / "reported"


def results_dir() -> Path:
    """The kept runs: book/results/<chapter>/<scale>.json and .ipynb."""
    return book_dir() / "results"


def runs_dir() -> Path:
    """Every run of this machine: LOOKALIKE_RUNS, else runs/ in the root."""
    return Path(os.environ.get("LOOKALIKE_RUNS") or project_root() / "runs").resolve()


def build_dir() -> Path:
    return project_root() / "build"


def small_notebook(chapter: str) -> Path:
    """The chapter as this build executed it with its small defaults; the run's record lies beside it."""
    return build_dir() / "nb" / "book" / "chapters" / f"{chapter}.ipynb"
