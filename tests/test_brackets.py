"""Audits on the command line, beside their run and on the book's page."""

import json

import pytest

from lookalike import brackets, pages, paths
from lookalike.files import ResultsError, read_json
from lookalike.results import Run
from lookalike.training import cells
from toy_stages import CHAPTER

SETTINGS = {
    "data": "digits", "family": "vae", "sigma": 0.5, "seed": 0, "role": "ablated", "width": 8, "epochs": 1,
    "images_per_class": 2, "query_class": 3, "samples_per_class": 2, "batch_size": 10,
}  # fmt: skip


@pytest.fixture
def book(tmp_path, monkeypatch):
    """A project in which one run of the chapter `toy` has a private and a plain training."""
    manifest = paths.project_root() / "data_manifest.yaml"
    for name in ("chapters", "params", "reported", "results"):
        (tmp_path / "book" / name).mkdir(parents=True)
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "data_manifest.yaml").write_text(manifest.read_text("utf-8"))
    (tmp_path / "book/chapters/toy.md").write_text(CHAPTER)
    monkeypatch.setenv("LOOKALIKE_ROOT", str(tmp_path))
    monkeypatch.delenv("LOOKALIKE_RUNS", raising=False)
    run = Run("toy", {"seed": 0, "run_name": "small"}, False)
    run.stages(cells.train_cell, {"train/private": SETTINGS, "train/plain": SETTINGS | {"sigma": 0.0}})
    run.save()
    return tmp_path


CLEAN = {"commit": "0123456789abcdef", "dirty": False, "library": "abc"}


def test_a_checkpoint_is_audited_by_the_name_of_its_stage(book):
    [row] = brackets.audit_stages("toy", "small", ["train/private"], steps=3, canaries=40)
    assert row["what"] == "vae, sigma 0.5, ablated, digits"
    assert row["lower"] < row["accounted"]
    stored = read_json(book / "runs/toy/small/audit/train~private.json")
    assert stored["rows"] == [row]
    assert (stored["canaries"], stored["seed"], stored["scale"]) == (40, 0, "small")
    assert not brackets.kept()


def test_only_private_trainings_can_be_named(book):
    for wrong in ([], ["train/plain"], ["train/none"]):
        with pytest.raises(ResultsError, match="with --stage: train/private"):
            brackets.audit_stages("toy", "small", wrong, steps=1, canaries=20)
    with pytest.raises(ResultsError, match="There is no run toy/medium"):
        brackets.audit_stages("toy", "medium", ["train/private"], steps=1, canaries=20)


def test_what_is_kept_stands_on_the_page_and_a_contradiction_is_marked(book, monkeypatch):
    monkeypatch.setattr(brackets, "provenance", lambda: CLEAN)
    brackets.audit_stages("toy", "small", ["train/private"], steps=3, canaries=40, keep=True)
    document = brackets.kept()["toy/small/train/private"]
    text = pages.brackets()
    assert "small run, **white box, 40 canaries in one run**: records are images, study mode, delta 1e-05" in text
    assert "| vae, sigma 0.5, ablated, digits | 3 |" in text
    assert "no contradiction" in text
    assert 'class="contradiction"' not in text
    document["rows"][0] |= {"lower": 1e9, "contradiction": True}
    monkeypatch.setattr(brackets, "kept", lambda: {"toy/small/train/private": document})
    assert '<span class="contradiction">contradiction</span>' in pages.brackets()


def test_the_self_test_stands_on_the_page_with_stock_opacus_in_red(book, monkeypatch):
    monkeypatch.setattr(brackets, "provenance", lambda: CLEAN)
    found = brackets.self_test(keep=True)
    assert found["stock"]["lower"] > found["stock"]["accounted"]
    stock, ours = pages.brackets().splitlines()[-2:]
    assert stock.startswith("| Opacus 1.6 as it comes")
    assert "contradiction</span>" in stock
    assert ours.endswith("| no contradiction |")


def test_audits_of_changed_code_are_not_kept(book, monkeypatch):
    monkeypatch.setattr(brackets, "provenance", lambda: CLEAN | {"dirty": True})
    with pytest.raises(ResultsError, match="commit and audit again"):
        brackets.self_test(keep=True)
    assert pages.brackets() == "No audit is kept yet."


def test_the_kept_file_is_json_that_diffs_well(book, monkeypatch):
    monkeypatch.setattr(brackets, "provenance", lambda: CLEAN)
    brackets.self_test(keep=True)
    text = (book / "book/results/audits.json").read_text()
    assert json.loads(text)["self-test"]["engines"]
    assert text.count("\n") > 5
