"""From runs/ into the book: a finished run becomes the one that the pages show.

The copy is what everyone sees, so nothing goes in that is unfinished, made by code that is not committed, or
shows images of data that must not be passed on.
"""

import re
from pathlib import Path

from lookalike import paths
from lookalike.compare import load_run
from lookalike.files import ResultsError, write_atomically, write_json
from lookalike.recheck import unchecked

NO_RESTRICTED = "draws-no-restricted-image"  # tag of a cell, beside restricted data; whoever sets it has looked


def keep(chapter: str, run_name: str = "medium", allow_dirty: bool = False) -> list[Path]:
    """Copies a run's record and executed notebook to book/results/<chapter>/<scale>.json and .ipynb."""
    import nbformat  # a second or two, and a run starts without it

    folder = paths.runs_dir() / chapter / run_name
    if not (folder / "run.json").exists():
        raise ResultsError(f"There is no run {chapter}/{run_name} to keep; make it with: lookalike run {chapter}.")
    run = load_run(folder / "run.json")
    if not (folder / "notebook.ipynb").exists():
        raise ResultsError(f"{chapter}/{run_name} has no executed notebook; run it with: lookalike run {chapter}.")
    notebook = nbformat.read(folder / "notebook.ipynb", as_version=4)
    complaint = _why_not(run, notebook, allow_dirty)
    if complaint:
        raise ResultsError(f"{chapter}/{run_name} cannot be kept: {complaint}.")
    strip(notebook)
    target = paths.results_dir() / chapter / run["scale"]
    files = [target.with_suffix(".json"), target.with_suffix(".ipynb")]
    for old in files:  # a kill between the two writes leaves one file, never a pair of two runs
        old.unlink(missing_ok=True)
    write_atomically(files[1], (nbformat.writes(notebook) + "\n").encode())
    write_json(files[0], run)
    return files


def _why_not(run: dict, notebook, allow_dirty: bool) -> str | None:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    unspoken = [
        output for cell in notebook.cells if NO_RESTRICTED not in _tags(cell) for output in cell.get("outputs", [])
    ]
    if not run["finished"]:
        return "it is not finished; resume it"
    if run["changed"]:
        names = ", ".join(run["changed"])
        return f"its {names} is not the {run['scale']} scale's; put the value into book/params and run again"
    if run["provenance"]["dirty"] is not False and not allow_dirty:
        return "its code is not a commit; commit and run again"
    if unchecked(run) and not allow_dirty:
        return (
            f"{unchecked(run)} of its stages were made by other library code; "
            "make some of each kind again with: lookalike recheck, or run it anew without --resume"
        )
    if any(output.output_type == "error" for output in outputs):
        return "a cell of its notebook stopped with an error"
    if not any(run["id"] in output.get("text", "") for output in outputs):
        return f"its notebook is of another run than {run['id']}, which its numbers are from"
    restricted = [data["name"] for data in run["data"] if data["restricted"]]
    if restricted and any(map(_shows_image, unspoken)):
        return (
            f"its notebook shows images, and {restricted[0]} must not be passed on; a cell that draws none of its "
            f"images, but curves or other sets, says so by the tag {NO_RESTRICTED}"
        )
    return None


def _tags(cell):
    return cell.get("metadata", {}).get("tags", [])


def _shows_image(output) -> bool:
    data = output.get("data", {})
    return any(kind.startswith("image/") for kind in data) or bool(
        re.search(r"<(img|svg|image)\b", str(data.get("text/html", "")))
    )


def strip(notebook) -> None:
    """Takes out progress bars, and the places where things lay on this machine."""
    for name in ("input_path", "output_path"):
        notebook.metadata.get("papermill", {}).pop(name, None)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                lasting = re.sub(r"[^\n]*\r(?!\n)[^\n]*\n?", "", output.text)
                output.text = _without_places(lasting)
            for kind, value in output.get("data", {}).items():
                if kind.startswith("text/"):
                    output.data[kind] = _without_places(value)
        if "outputs" in cell:
            cell.outputs = [o for o in cell.outputs if o.output_type != "stream" or o.text]


def _without_places(text: str) -> str:
    text = text.replace(f"{paths.runs_dir()}/", "runs/").replace(f"{paths.project_root()}/", "")
    home = Path.home()
    # a whole path only: /root is not to be found in /roots, nor inside an encoded picture
    return re.sub(rf"(?<![\w.]){re.escape(str(home))}(?![\w.-])", "~", text) if home.name else text
