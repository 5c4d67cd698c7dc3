"""Runs one chapter with one set of parameters, from its text to an executed notebook.

The defaults in the chapter's parameters cell are the small run; book/params/<chapter>.<scale>.yaml holds what
differs at medium and full scale. papermill only warns about a parameter that it does not know, so names and
types are checked here, before a kernel starts.
"""

import ast
import hashlib
import json
import os
import re
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import yaml

from lookalike import paths
from lookalike.files import locked

SCALES = ("small", "medium", "full")


class ParameterError(ValueError):
    """A parameter that the chapter does not have, or a value of the wrong type; the message names it."""


class ChapterError(RuntimeError):
    """A chapter that is not there, cannot be read, is already running or stopped in a cell."""


# --- what a chapter declares -------------------------------------------------------------------------------


def chapter_names() -> list[str]:
    """Every chapter of the book that can be run, by its file's name."""
    return sorted(path.stem for path in paths.chapters_dir().glob("*.md") if is_notebook(path.read_text("utf-8")))


def is_notebook(text: str) -> bool:
    """True for MyST text with a kernel in its front matter."""
    front = re.match(r"---\n(.*?\n)---\n", text, re.DOTALL)
    return bool(front and re.search(r"^kernelspec:", front[1], re.MULTILINE))


def chapter_path(chapter: str | Path) -> Path:
    """The Markdown file of a chapter, given by name or already as a path."""
    path = Path(chapter) if str(chapter).endswith(".md") else paths.chapters_dir() / f"{chapter}.md"
    if not path.is_file():
        raise ChapterError(f"There is no chapter {chapter}; the book has: {', '.join(chapter_names()) or 'none yet'}.")
    return path


def read_chapter(chapter: str | Path):
    """The chapter as a notebook without outputs."""
    import jupytext

    return jupytext.read(chapter_path(chapter))


def chapter_parameters(chapter: str | Path) -> dict[str, tuple[str, object]]:
    """What the cell tagged `parameters` declares: name -> (annotation, default), in the order of the cell.

    >>> chapter_parameters("no_free_lunch")["seed"]   # doctest: +SKIP
    ('int', 0)
    """
    cells = [c for c in read_chapter(chapter).cells if "parameters" in c.metadata.get("tags", [])]
    if len(cells) != 1:
        raise ChapterError(f"{chapter_path(chapter).name} needs one cell tagged `parameters`; it has {len(cells)}.")
    declared = {}
    for node in ast.parse(cells[0].source).body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name) or node.value is None:
            line = ast.unparse(node)
            raise ChapterError(f"The parameters cell may only hold lines like `epochs: int = 2`; it has `{line}`.")
        declared[node.target.id] = (ast.unparse(node.annotation), ast.literal_eval(node.value))
    return declared


def check_parameters(chapter: str | Path, values: dict) -> None:
    """Raises ParameterError if a name is unknown to the chapter or a value does not fit its annotation."""
    declared = chapter_parameters(chapter)
    for name, value in values.items():
        if name not in declared:
            known = ", ".join(declared)
            raise ParameterError(f"{chapter_path(chapter).stem} has no parameter {name}; it has: {known}.")
        annotation, default = declared[name]
        if not _fits(value, annotation, default):
            raise ParameterError(_misfit(name, value, annotation, default))


def _fits(value, annotation: str, default) -> bool:
    """Whether a value may replace a default: int passes for float, bool for no number, lists by element."""
    if annotation.startswith("list"):
        kinds = re.findall(r"list\[(\w+)\]", annotation) or sorted({type(item).__name__ for item in default or []})
        return isinstance(value, list) and (
            not kinds or all(any(_fits(item, kind, None) for kind in kinds) for item in value)
        )
    if annotation == "float":
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value).__name__ == annotation


def _misfit(name: str, value, annotation: str, default) -> str:
    kind = type(value).__name__
    sentence = f"{name} must be of type {annotation} (like {default!r}), not {value!r} of type {kind}."
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+e[+-]?\d+", value, re.IGNORECASE):
        sentence += " YAML reads 1e-4 as text: write 1.0e-4."
    return sentence


def parse_setting(chapter: str | Path, setting: str) -> tuple[str, object]:
    """`name=value` from a command line to (name, value), read by the type that the chapter declares.

    >>> parse_setting("no_free_lunch", "noise_multipliers=[0.5, 1]")   # doctest: +SKIP
    ('noise_multipliers', [0.5, 1])
    """
    name, equals, text = setting.partition("=")
    if not equals or not name.isidentifier():
        raise ParameterError(f"A setting looks like epochs=3, not {setting!r}.")
    if chapter_parameters(chapter).get(name, ("", None))[0] == "str":
        return name, text
    try:
        return name, json.loads(text)  # unlike YAML it takes 1e-4 for a number
    except json.JSONDecodeError:
        return name, yaml.safe_load(text)


def scale_file(chapter: str, scale: str) -> Path:
    """The file that holds what a scale changes."""
    return paths.params_dir() / f"{chapter}.{scale}.yaml"


def scale_parameters(chapter: str, scale: str) -> dict:
    """What book/params/<chapter>.<scale>.yaml sets; nothing for small: those are the chapter's defaults."""
    if scale not in SCALES:
        raise ParameterError(f"There is no scale {scale}; take one of {', '.join(SCALES)}.")
    if scale == "small":
        return {}
    path = scale_file(chapter, scale)
    if not path.is_file():
        raise ParameterError(f"{chapter} has no {scale} scale yet: book/params/{path.name} does not exist.")
    return yaml.safe_load(path.read_text("utf-8")) or {}


def run_parameters(chapter: str, scale: str, overrides: dict) -> dict:
    """All values that a run injects, checked, with its run_name.

    A run that leaves its scale's settings gets a name of its own (`medium-` and six characters that depend on
    what was changed), so that it does not take the medium run's place; the same changes find the same folder.
    """
    settings = scale_parameters(chapter, scale)
    check_parameters(chapter, settings | overrides)
    usual = {name: default for name, (_, default) in chapter_parameters(chapter).items()} | settings
    changed = {k: v for k, v in overrides.items() if k not in _SHARE_OF_WORK and v != usual[k]}
    suffix = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:6]
    return settings | {"run_name": f"{scale}-{suffix}" if changed else scale} | overrides


_SHARE_OF_WORK = {"run_name", "workers", "device"}  # settings that leave the numbers alone


# --- running it ---------------------------------------------------------------------------------------------


def run_chapter(
    chapter: str,
    scale: str = "small",
    overrides: dict | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Path:
    """Executes a chapter and returns runs/<chapter>/<run_name>/notebook.ipynb, saved after every cell.

    `resume` keeps the stages that an interrupted run of that name has finished. A failing cell raises
    ChapterError, and the notebook holds the cells up to it. `progress` prints a line per cell and
    what the chapter prints, to stderr.
    """
    parameters = run_parameters(chapter, scale, overrides or {})
    folder = paths.runs_dir() / chapter / parameters["run_name"]
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / "notebook.ipynb"
    # two papermills would write one notebook by turns
    lock = locked(folder / "runner.lock", f"Run {chapter}/{folder.name}", wait=0)
    with lock, _environment(LOOKALIKE_RESUME="1" if resume else "0"), _Progress(progress) as shown:
        _execute(chapter, output, parameters, shown)
    return output


def _execute(chapter: str, output: Path, parameters: dict, shown: "_Progress") -> None:
    import nbformat
    import papermill

    notebook = read_chapter(chapter)
    shown.start(chapter, parameters["run_name"], sum(cell.cell_type == "code" for cell in notebook.cells) + 1)
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / f"{chapter}.ipynb"
        nbformat.write(notebook, source)
        try:
            papermill.execute_notebook(
                source,
                output,
                parameters,
                progress_bar=False,
                cwd=output.parent,
                language="python",
                kernel_name="python3",
                kernel_manager_class=_same_python(),
                start_timeout=300,  # importing on a busy machine or a network disk
                iopub_timeout=120,
                stdout_file=shown,
                stderr_file=shown,
                on_cell_executed=shown.cell_done,
            )
        except papermill.PapermillExecutionError as error:
            raise ChapterError(_stopped(chapter, error, output)) from None


def _stopped(chapter: str, error, output: Path) -> str:
    lines = [line for line in error.source.splitlines() if line.strip()]
    first = next((line for line in lines if not line.lstrip().startswith("#")), "")
    return (
        f"{chapter} stopped in the cell that begins `{first.strip()}` with {error.ename}: {error.evalue} "
        f"(all outputs so far: {output})"
    )


def _same_python():
    """A kernel manager that starts the interpreter running now, whatever kernels the machine has."""
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    class SamePython(AsyncKernelManager):
        @property
        def kernel_spec(self):
            # ERROR: a kernel that talks to its own machine need not warn that it does so in plain text
            argv = [
                sys.executable,
                "-m",
                "ipykernel_launcher",
                "-f",
                "{connection_file}",
                "--log-level=ERROR",
            ]
            return KernelSpec(argv=argv, display_name="Python 3", language="python")

    return SamePython


@contextmanager
def _environment(**values: str):
    """Sets environment variables for the kernel and puts the old ones back."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


class _Progress:
    """One line per finished cell and the chapter's own prints on stderr; a bar below them on a terminal."""

    def __init__(self, wanted: bool):
        from rich.console import Console
        from rich.progress import Progress

        self.console = Console(stderr=True, quiet=not wanted, highlight=False, soft_wrap=True)
        self.bar = Progress(console=self.console, transient=True, disable=not self.console.is_terminal)
        self.unfinished_line = ""

    def __enter__(self):
        self.bar.start()
        return self

    def __exit__(self, *exception):
        self.flush_line()
        self.bar.stop()

    def start(self, chapter: str, run_name: str, cells: int) -> None:
        self.cells, self.done, self.started = cells, 0, time.monotonic()
        self.task = self.bar.add_task(f"{chapter} {run_name}", total=cells)
        self._print(f"{chapter}: {cells} cells, run {run_name}")

    def cell_done(self, cell, cell_index, execute_reply) -> None:
        self.flush_line()
        self.done += 1
        self.bar.advance(self.task)
        first = next((line for line in cell.source.splitlines() if line.strip()), "")
        seconds = time.monotonic() - self.started
        self._print(f"[{self.done}/{self.cells}] {seconds:6.0f} s  {first[:70]}")

    def write(self, text: str) -> None:
        """What the chapter prints, passed on line by line."""
        *lines, self.unfinished_line = (self.unfinished_line + text).split("\n")
        for line in lines:
            self._print("    " + line)

    def flush(self) -> None:
        """papermill flushes after every message; whole lines are already out."""

    def flush_line(self) -> None:
        if self.unfinished_line:
            self.write("\n")

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False)
