import copy
import io
import json
import logging
from pathlib import Path

import nbformat
import pytest
from sphinx.application import Sphinx
from sphinx.util.docutils import docutils_namespace

from lookalike import bookio, pages, runner
from lookalike.data.image_set import ORIGINS

RECORD = {
    "schema": 1,
    "id": "0a0a0a0a",
    "run_name": "small",
    "scale": "small",
    "finished": True,
    "started": "2026-03-04T05:06:07+00:00",
    "seconds": 240.0,
    "resumed": False,
    "parameters": {"seed": 0, "epochs": 2, "lr": 0.1, "sigmas": [1.0], "names": [], "private": False},
    "changed": {},
    "data": [
        {
            "name": "digits",
            "split": "train",
            "images": 4000,
            "origin": "embedded",
            "licence": "CC BY-SA 3.0",
            "restricted": False,
            "stand_in_for": "mnist",
        }
    ],
    "tokens": ["data:digits"],
    "metrics": {},
    "stages": {},
    "provenance": {
        "commit": "c0ffee" * 6,
        "dirty": False,
        "device": "Abacus 9",
        "library": "1",
        "libraries": ["1"],
    },
}


def record_run(scale, **changes):
    """Writes an executed notebook of the chapter whose last cell shows which scale it is, and its record."""
    notebook = runner.read_chapter("tiny")
    for number, cell in enumerate(c for c in notebook.cells if c.cell_type == "code"):
        cell.outputs = [nbformat.v4.new_output("stream", text=f"cell {number} of {scale}\n")]
        cell.execution_count = number + 1
    injected = nbformat.v4.new_code_cell("# Parameters\nepochs = 30\n", metadata={"tags": ["injected-parameters"]})
    notebook.cells.insert(2, injected)
    path = bookio.recorded_notebooks("tiny")[scale]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)
    path.with_suffix(".json").write_text(json.dumps(RECORD | {"scale": scale, "run_name": scale} | changes))
    return path


def shown(chapter: Path) -> str:
    """All that a reader finds on the page: texts and outputs."""
    cells = bookio.read(chapter.read_text()).cells
    return "\n".join(c.source + "".join(o.text for o in c.get("outputs", [])) for c in cells)


def test_a_page_without_code_stays_text():
    page = bookio.read("# Title\n\nText.")
    assert [c.cell_type for c in page.cells] == ["markdown"]


def test_the_largest_run_is_shown(write_chapter):
    chapter = write_chapter("work()")
    for scale in ("small", "medium", "full"):
        record_run(scale)
        assert f"cell 1 of {scale}" in shown(chapter)
        assert f"Every output on this page is from the {scale} run of 4 March 2026" in shown(chapter)


def test_every_cell_gets_its_own_output_and_the_injected_cell_is_gone(write_chapter):
    chapter = write_chapter("one()", "two()")
    record_run("medium")
    page = bookio.read(chapter.read_text())
    code = [c for c in page.cells if c.cell_type == "code"]
    assert [c.outputs[0].text for c in code] == [f"cell {n} of medium\n" for n in range(3)]
    assert "# Parameters" not in [c.source for c in code]
    assert len(page.metadata["source_map"]) == len(page.cells)


def test_text_and_comments_may_change_under_the_outputs(write_chapter):
    chapter = write_chapter("work()")
    record_run("medium")
    text = chapter.read_text().replace("Some text.", "Other text.").replace("# paper: 500", "# the paper: 500")
    chapter.write_text(text)
    assert "cell 1 of medium" in shown(chapter)
    assert "Other text." in shown(chapter)


def test_a_new_default_is_the_small_runs_and_leaves_a_kept_run_shown(write_chapter):
    chapter = write_chapter("work()")
    record_run("small")
    changed = chapter.read_text().replace("lr: float = 0.1", "lr: float = 0.2")
    chapter.write_text(changed)
    assert "of small" not in shown(chapter)
    record_run("medium")
    chapter.write_text(changed.replace("lr: float = 0.2", "lr: float = 0.3"))
    assert "cell 1 of medium" in shown(chapter)


def test_a_spread_keeps_its_sign_on_its_line(write_chapter):
    chapter = write_chapter("work()")
    path = record_run("medium")
    notebook = nbformat.read(path, as_version=4)
    frame = nbformat.v4.new_output("execute_result", {"text/html": "<td>0.78 ± 0.04</td>", "text/plain": "0.78 ± 0.04"})
    notebook.cells[-1].outputs = [frame]
    nbformat.write(notebook, path)
    data = bookio.read(chapter.read_text()).cells[-1].outputs[0].data
    assert data["text/html"] == "<td>0.78 ±&nbsp;0.04</td>"
    assert data["text/plain"] == "0.78 ± 0.04"


def test_tables_of_verdicts_follow_the_reported_numbers(write_chapter):
    chapter = write_chapter("work()", 'x = 1\nrun.compare("t1/")', "run.compare()")
    reported = chapter.parents[1] / "reported/tiny.csv"
    header = "key,value,spread,tolerance,where,what,needs,stand_in,claim\n"
    metrics = {"t1/auc": {"value": 0.71, "low": None, "high": None, "spread": None, "n": None, "note": ""}}
    reported.write_text(header + "t1/auc,0.70,,0.005,Table 1,an area,,,\nt2/auc,0.90,,0.005,Table 2,another,,,\n")
    record_run("medium", metrics=metrics)

    def tables():
        cells = [c for c in bookio.read(chapter.read_text()).cells if c.cell_type == "code"]
        assert cells[1].outputs[-1].text == "cell 1 of medium\n"
        return [c.outputs[-1].data["text/html"] for c in cells[2:]]

    part, whole = tables()
    assert "not reproduced" in part
    assert "Table 2" not in part
    assert "Table 2" in whole
    reported.write_text(header + "t1/auc,0.70,,0.02,Table 1,an area,,,\nt2/auc,0.90,,0.005,Table 2,another,,,\n")
    assert ">reproduced<" in tables()[0]


def test_changed_code_falls_back_to_the_run_that_has_it(write_chapter, caplog):
    chapter = write_chapter("work()")
    record_run("medium")
    chapter.write_text(chapter.read_text().replace("work()", "work(1)"))
    assert "of medium" not in shown(chapter)
    assert "No recorded run has the code of chapter tiny" in caplog.text
    caplog.clear()
    record_run("small")
    assert "cell 1 of small" in shown(chapter)
    assert not caplog.records


def test_a_notebook_without_its_record_is_no_recorded_run(write_chapter):
    chapter = write_chapter("work()")
    record_run("medium").with_suffix(".json").unlink()
    assert "of medium" not in shown(chapter)


def test_the_box_names_what_a_reader_must_know(write_chapter):
    write_chapter()
    box = pages.run_box("tiny", "medium", RECORD | {"parameters": RECORD["parameters"] | {"epochs": 30}})
    assert "the medium run of 4 March 2026" in box
    assert "4 min on Abacus 9 with the code of commit `c0ffeec0ff`." in box
    assert "digits, train" in box
    assert "**in place of mnist**" in box
    assert "| `epochs` | `2` | `30` |" in box
    assert "`lr`" not in box


def test_the_box_says_when_code_was_not_committed_or_the_run_was_resumed(write_chapter):
    write_chapter()
    record = copy.deepcopy(RECORD) | {
        "resumed": True,
        "stages": {"a": {"seconds": 7200}, "b": {"seconds": 3600}},
    }
    record["provenance"]["dirty"] = True
    box = pages.run_box("tiny", "small", record)
    assert "changes that were not committed" in box
    assert "all its stages together 3.0 h" in box
    assert "the numbers say nothing about the paper" in box


def test_the_box_says_when_stages_are_of_other_code(write_chapter):
    write_chapter()
    origin = RECORD["provenance"] | {"libraries": ["0", "1"]}
    assert "`c0ffeec0ff` and stages made by other library code." in pages.run_box(
        "tiny", "small", RECORD | {"provenance": origin}
    )


@pytest.mark.parametrize("origin", ORIGINS)
def test_the_box_has_words_for_every_origin(write_chapter, origin):
    write_chapter()
    data = [RECORD["data"][0] | {"origin": origin}]
    assert "digits, train (" in pages.run_box("tiny", "small", RECORD | {"data": data})


# --- through Sphinx ---


@pytest.fixture
def build(write_chapter, tmp_path):
    """build() -> the HTML of chapters/tiny, from a book of the chapter and the three generated tables."""
    chapter = write_chapter("work()")
    book = tmp_path / "book"
    header = "key,value,spread,tolerance,where,what,needs,stand_in,claim\n"
    number = "table1/digits/vae/fid,12.5,0.5,,Table 1,FID,full data:mnist,,\n"
    claim = "claim/c1,,,,Sec. 4,order,full,,A beats B\n"
    (book / "reported/tiny.csv").write_text(header + number + claim)
    tables = "\n".join(f"```{{{name}}}\n```\n" for name in ("scorecard", "run-status", "data-sets"))
    (book / "index.md").write_text(f"# Index\n\n```{{toctree}}\nchapters/tiny\n```\n\n{tables}")
    (book / "conf.py").write_text(
        "extensions = ['myst_nb', 'lookalike.bookio', 'sphinx_design']\nnb_execution_mode = 'off'\n"
        "nb_custom_formats = {'.md': 'lookalike.bookio.read'}\nmyst_enable_extensions = ['colon_fence']\n"
        "html_theme = 'basic'\nexclude_patterns = ['results']\n"
    )

    def run():
        warnings = io.StringIO()
        out = tmp_path / "out"
        with docutils_namespace():
            app = Sphinx(
                book,
                book,
                out / "html",
                out / "doctrees",
                "html",
                None,
                None,
                warnings,
                warningiserror=True,
                keep_going=True,
            )
            app.build()
        logging.getLogger("sphinx").propagate = True  # Sphinx takes its log from pytest
        assert app.statuscode == 0, warnings.getvalue()
        return (out / "html/chapters/tiny.html").read_text()

    run.chapter = chapter
    run.index = tmp_path / "out/html/index.html"
    return run


def test_edited_text_and_newer_runs_reach_the_next_build(build):
    record_run("small")
    assert "cell 1 of small" in build()
    build.chapter.write_text(build.chapter.read_text().replace("Some text.", "Edited text."))
    edited = build()
    assert "Edited text." in edited
    assert "cell 1 of small" in edited
    metric = {"value": 0.3, "low": 0.1, "high": 0.5, "spread": None, "n": 3, "note": ""}
    kept = record_run("medium", metrics={"claim/c1": metric})
    assert "cell 1 of medium" in build()
    scorecard = build.index.read_text()
    assert "same direction (at medium scale)" in scorecard
    assert "0.3 [0.1, 0.5]" in scorecard
    kept.unlink()
    assert "cell 1 of small" in build()


def test_a_build_without_any_run_of_the_code_is_red(build):
    with pytest.raises(AssertionError, match="No recorded run has the code of chapter tiny"):
        build()
