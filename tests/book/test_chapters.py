"""What must hold for every chapter of the book, without executing it."""

import ast
import re
import shutil

import nbformat
import pytest
import yaml
from jupytext.cli import jupytext

from lookalike import bookio, compare, pages, paths, runner
from lookalike.bookio import read_myst_markdown_notebook

CHAPTERS = runner.chapter_names()
SCALES = [(chapter, scale) for chapter in CHAPTERS for scale in ("medium", "full")]
KEPT = [(chapter, scale) for chapter in CHAPTERS for scale in compare.kept_runs(chapter)]
PATH = re.compile(r"\.{1,2}/|~|[A-Z]:\\|/(home|root|tmp|mnt|data|work)\b|(book|runs|lib|build)/")


def toc_files(node) -> list[str]:
    """Every page that _toc.yml names."""
    if isinstance(node, list):
        return [file for item in node for file in toc_files(item)]
    if isinstance(node, dict):
        return [node[k] for k in ("file", "root") if k in node] + toc_files(list(node.values()))
    return []


def strings(chapter: str) -> list[str]:
    """Every text constant in a chapter's code."""
    cells = [cell.source for cell in runner.read_chapter(chapter).cells if cell.cell_type == "code"]
    nodes = ast.walk(ast.parse("\n".join(cells)))
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def test_the_book_has_a_chapter():
    assert CHAPTERS


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_chapter_knows_its_own_name(chapter):
    assert runner.read_chapter(chapter).metadata["chapter"] == chapter


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_editing_as_a_notebook_changes_nothing_else(chapter, tmp_path, monkeypatch):
    """Markdown to notebook to Markdown gives the same text; if not: make format."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book").mkdir()
    shutil.copy(paths.project_root() / "jupytext.toml", tmp_path)
    source = runner.chapter_path(chapter).read_text("utf-8")
    shutil.copy(runner.chapter_path(chapter), "book/page.md")
    jupytext(["--quiet", "--to", "ipynb", "--output", "page.ipynb", "book/page.md"])
    jupytext(["--quiet", "--to", "md:myst", "--output", "book/page.md", "page.ipynb"])
    stamp = re.compile(r"^ +jupytext_version: .*\n", re.MULTILINE)
    assert stamp.sub("", (tmp_path / "book/page.md").read_text("utf-8")) == stamp.sub("", source)


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_the_page_and_the_run_read_the_same_code(chapter):
    """The book's reader and jupytext are two parsers; the outputs of one go to the cells of the other."""
    page = read_myst_markdown_notebook(runner.chapter_path(chapter).read_text("utf-8"))
    assert bookio._code(page) == bookio._code(runner.read_chapter(chapter))


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_chapter_stands_in_the_contents_and_in_the_introduction(chapter):
    contents = yaml.safe_load((paths.book_dir() / "_toc.yml").read_text("utf-8"))
    assert f"chapters/{chapter}" in toc_files(contents)
    assert f"{{doc}}`chapters/{chapter}`" in (paths.book_dir() / "intro.md").read_text("utf-8")


def test_every_page_in_the_contents_exists():
    contents = yaml.safe_load((paths.book_dir() / "_toc.yml").read_text("utf-8"))
    missing = [file for file in toc_files(contents) if not (paths.book_dir() / f"{file}.md").is_file()]
    assert not missing


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_the_defaults_are_the_small_run(chapter):
    declared = runner.chapter_parameters(chapter)
    assert declared["run_name"] == ("str", "small")
    runner.check_parameters(chapter, {name: default for name, (_, default) in declared.items()})


@pytest.mark.parametrize(("chapter", "scale"), SCALES)
def test_a_scale_sets_only_what_the_chapter_declares(chapter, scale):
    values = runner.scale_parameters(chapter, scale)
    runner.check_parameters(chapter, values)
    assert values["run_name"] == scale


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_reported_numbers_are_well_formed_and_have_claims(chapter):
    reported = compare.load_reported(chapter)
    assert reported["claim"].any()


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_no_text_in_the_code_is_a_path(chapter):
    assert not [text for text in strings(chapter) if PATH.match(text)]


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_chapter_starts_compares_and_saves_its_run(chapter):
    code = "\n".join(c.source for c in runner.read_chapter(chapter).cells if c.cell_type == "code")
    assert f'run = start_run("{chapter}", globals())' in code
    assert "run.compare(" in code
    assert "run.save()" in code


def test_a_kept_run_has_the_settings_of_its_scale():
    for chapter, scale in KEPT:
        usual = {name: default for name, (_, default) in runner.chapter_parameters(chapter).items()}
        usual |= runner.scale_parameters(chapter, scale)
        kept = compare.kept_runs(chapter)[scale]["parameters"]
        other = {name for name in usual | kept if kept.get(name) != usual.get(name)}
        assert other <= {"seed", "run_name", "workers", "device"}


def test_a_kept_run_ran_the_code_that_its_page_shows():
    """Otherwise it helps nobody any more: run again, or take it out."""
    for chapter, scale in KEPT:
        page = read_myst_markdown_notebook(runner.chapter_path(chapter).read_text("utf-8"))
        kept = nbformat.read(paths.results_dir() / chapter / f"{scale}.ipynb", as_version=4)
        assert bookio._code(kept, defaults=False) == bookio._code(page, defaults=False)


def test_the_readme_shows_what_the_kept_runs_say():
    """If not: make readme."""
    readme = (paths.project_root() / "README.md").read_text("utf-8")
    assert pages.with_results(readme) == readme
