"""Shows each chapter with the outputs of the best recorded run of its code; the build executes nothing.

Sphinx asks `read` for every Markdown page (nb_custom_formats in book/_config.yml). A recorded run is an
executed notebook with its record, a JSON file of the same name, beside it: book/results/<chapter>/full, then
medium, then this build's small run. The first whose code equals the page's lends its outputs, so the text may
change freely while the outputs stay. Tables of run.compare, {scorecard}, {run-status}, {data-sets}, {brackets} and
{calibrations} are made anew.
"""

import ast
import copy
import json
import re
from dataclasses import dataclass
from pathlib import Path

import nbformat
from docutils import nodes
from docutils.statemachine import StringList
from myst_nb.core.read import is_myst_markdown_notebook, read_myst_markdown_notebook
from myst_parser.config.main import MdParserConfig
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

from lookalike import pages, paths
from lookalike.compare import compared

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RecordedRun:
    """An executed notebook and what its run wrote down."""

    scale: str
    notebook: nbformat.NotebookNode
    record: dict


def read(text: str) -> nbformat.NotebookNode:
    """A page's text to the notebook that Sphinx renders; pages without code stay one Markdown cell."""
    if not is_myst_markdown_notebook(text):
        return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)])
    extensions = {"colon_fence", "dollarmath", "linkify", "substitution", "tasklist"}  # Jupyter Book's own
    page = read_myst_markdown_notebook(text, MdParserConfig(enable_extensions=extensions), add_source_map=True)
    chapter = page.metadata.get("chapter")
    if chapter is None:
        return page
    run = best_run(chapter, page)
    if run is None:
        logger.warning("No recorded run has the code of chapter %s: make book runs it once, small", chapter)
        return page
    _copy_outputs(run.notebook, page)
    _compare_anew(chapter, run.record, page)
    _insert_before_parameters(page, pages.run_box(chapter, run.scale, run.record))
    return page


def best_run(chapter: str, page: nbformat.NotebookNode) -> RecordedRun | None:
    """The largest recorded run whose code does what the page's code does; comments may differ.

    The defaults are the small run's settings; those of a kept run stand in its record, so it may have had others.
    """
    for scale, path in recorded_notebooks(chapter).items():
        if path.is_file() and path.with_suffix(".json").is_file():
            notebook = nbformat.read(path, as_version=4)
            defaults = scale == "small"
            if _code(notebook, defaults) == _code(page, defaults):
                return RecordedRun(scale, notebook, json.loads(path.with_suffix(".json").read_text("utf-8")))
    return None


def recorded_notebooks(chapter: str) -> dict[str, Path]:
    """Where a chapter's recorded runs would lie, best first."""
    kept = {scale: paths.results_dir() / chapter / f"{scale}.ipynb" for scale in ("full", "medium")}
    return kept | {"small": paths.small_notebook(chapter)}


def _code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """The code cells of the chapter itself, without what papermill adds."""
    added = {"injected-parameters", "papermill-error-cell-tag"}
    return [c for c in notebook.cells if c.cell_type == "code" and not added & set(c.metadata.get("tags", []))]


def _code(notebook: nbformat.NotebookNode, defaults: bool = True) -> list[str]:
    """What the cells do; without `defaults` the parameters cell does not count."""
    cells = [c for c in _code_cells(notebook) if defaults or "parameters" not in c.metadata.get("tags", [])]
    return [_meaning(cell.source) for cell in cells]


def _meaning(source: str) -> str:
    """Python code without its comments and layout; anything else as it stands."""
    try:
        return ast.dump(ast.parse(source))
    except SyntaxError:
        return source.strip()


def _copy_outputs(source: nbformat.NotebookNode, page: nbformat.NotebookNode) -> None:
    for executed, shown in zip(_code_cells(source), _code_cells(page), strict=True):
        shown.outputs = copy.deepcopy(executed.outputs)
        shown.execution_count = executed.execution_count
        for data in (output.data for output in shown.outputs if "data" in output):
            if "text/html" in data:  # a spread breaks from its number, if it must, but not from its sign
                data["text/html"] = data["text/html"].replace(" ± ", " ±&nbsp;")


def _compare_anew(chapter: str, record: dict, page: nbformat.NotebookNode) -> None:
    """The tables of run.compare, drawn at this build from the record and the reported numbers, as the scorecard is."""
    for cell in _code_cells(page):
        prefix = _compared_prefix(cell.source)
        if prefix is not None:
            shown = compared(chapter, record, prefix)
            data = {"text/html": shown._repr_html_(), "text/plain": repr(shown)}
            cell.outputs[-1:] = [nbformat.v4.new_output("display_data", data)]


def _compared_prefix(source: str) -> str | None:
    """The prefix of a cell whose last line is run.compare("prefix"), "" of run.compare(), None of any other cell."""
    found = re.fullmatch(r"run\.compare\((?:\"([^\"]*)\")?\)", source.strip().rpartition("\n")[2])
    return (found[1] or "") if found else None


def _insert_before_parameters(page: nbformat.NotebookNode, text: str) -> None:
    at = next(i for i, cell in enumerate(page.cells) if "parameters" in cell.metadata.get("tags", []))
    page.cells.insert(at, nbformat.v4.new_markdown_cell(text))
    page.metadata["source_map"].insert(at, page.metadata["source_map"][at])


# --- Sphinx -------------------------------------------------------------------------------------------------


class _Generated(SphinxDirective):
    """A directive whose Markdown is written anew at every build."""

    text = staticmethod(lambda: "")

    def run(self):
        self.env.metadata[self.env.docname]["lookalike_generated"] = True
        try:
            lines = type(self).text().splitlines()
        except RuntimeError as error:  # the library's sentence becomes a warning with the page's name
            raise self.error(str(error)) from None
        node = nodes.Element()
        self.state.nested_parse(StringList(lines, "generated"), self.content_offset, node)
        return node.children


class Scorecard(_Generated):
    text = staticmethod(pages.scorecard)


class RunStatus(_Generated):
    text = staticmethod(pages.run_status)


class DataSets(_Generated):
    text = staticmethod(pages.data_sets)


class Brackets(_Generated):
    text = staticmethod(pages.brackets)


class Calibrations(_Generated):
    text = staticmethod(pages.calibrations)


DIRECTIVES = {
    "scorecard": Scorecard,
    "run-status": RunStatus,
    "data-sets": DataSets,
    "brackets": Brackets,
    "calibrations": Calibrations,
}


def _outdated(app, env, added, changed, removed) -> list[str]:
    """Pages to read again although their text is the same: generated ones, and those whose runs changed."""
    before = getattr(env, "lookalike_runs", {})
    now = {name: _fingerprint(name.rpartition("/")[2]) for name in env.all_docs if name.startswith("chapters/")}
    env.lookalike_runs = now
    generated = [name for name in env.all_docs if env.metadata[name].get("lookalike_generated")]
    return generated + [name for name, found in now.items() if before.get(name) != found]


def _fingerprint(chapter: str) -> list[tuple[str, int]]:
    """Which recorded runs there are and when each was written."""
    return [(scale, p.stat().st_mtime_ns) for scale, p in recorded_notebooks(chapter).items() if p.is_file()]


def setup(app) -> dict:
    """Called by Sphinx."""
    for name, directive in DIRECTIVES.items():
        app.add_directive(name, directive)
    app.connect("env-get-outdated", _outdated)
    return {"parallel_read_safe": True, "env_version": 1}
