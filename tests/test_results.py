"""Numbers are written down once, judged without kindness, and kept only when they can be trusted."""

import json
import math
import random
import re
import subprocess
from dataclasses import dataclass, replace

import nbformat
import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import toy_stages
from lookalike import paths, provenance, results, runner
from lookalike.compare import Comparison, Notes, _claim_name, describe_run, missing_needs
from lookalike.files import read_json, write_json
from lookalike.keep import strip
from lookalike.recheck import recheck
from lookalike.results import (
    ResultsError,
    comparison,
    keep,
    kept_runs,
    load_reported,
    load_run,
    start_run,
    verdict,
)
from toy_stages import CHAPTER as TOY

CHAPTER = TOY.replace(
    "seed: int = 0\n",
    "seed: int = 0\nepochs: int = 2                # paper: 500\nnoises: list = [0.0, 1.0]\nworkers: int = 1\n",
)
REPORTED = """key,value,spread,tolerance,where,what,needs,stand_in,claim
table1/mnist/vae/fid,27.97,,2,"Table 1, a",FID,full data:mnist weights:inception,table1/mnist/vae/fd_lite0,
table1/mnist/gan/psnr,9.79,0.10,,Table 1,PSNR of the GAN,full data:mnist,,
table1/mnist/gan/ssim,0.40,,0.01,Table 1,SSIM <b> of the GAN,data:mnist,,
claim/c1,,,,Sec. 4.2,GAN degrades slower,full data:mnist,,GAN degrades slower than VAE
"""
VALUES = {"seed": 3, "epochs": 2, "noises": [0.0, 1.0], "workers": 1, "run_name": "small"}
FULL = VALUES | {"epochs": 500, "run_name": "full"}


@dataclass(frozen=True)
class Images:
    """What a run reads of an ImageSet."""

    name: str = "mnist"
    split: str = "train"
    content_hash: str = "ab12"
    origin: str = "real"
    licence: str = "CC BY 4.0"
    restricted: bool = False
    stand_in_for: str = ""

    def __len__(self):
        return 100


@pytest.fixture
def book(tmp_path, monkeypatch):
    """A project under git with one chapter, its full scale and its reported numbers."""
    for folder in ("chapters", "params", "reported"):
        (tmp_path / "book" / folder).mkdir(parents=True)
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "book/chapters/toy.md").write_text(CHAPTER)
    (tmp_path / "book/params/toy.full.yaml").write_text("epochs: 500\n")
    (tmp_path / "book/params/toy.medium.yaml").write_text("epochs: 20\n")
    (tmp_path / "book/reported/toy.csv").write_text(REPORTED)
    monkeypatch.setenv("LOOKALIKE_ROOT", str(tmp_path))
    monkeypatch.delenv("LOOKALIKE_RUNS", raising=False)
    monkeypatch.delenv("LOOKALIKE_RESUME", raising=False)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=Test", "-c", "user.email=test@example.org"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "--quiet", "--message", "toy"], check=True)
    return tmp_path


# --- starting -----------------------------------------------------------------------------------------------


def test_run_knows_its_parameters_and_where_it_comes_from(book, capsys):
    run = start_run("toy", {"unrelated": 1, **VALUES})
    assert (run.folder, run.scale, run.parameters) == (book / "runs/toy/small", "small", VALUES)
    record = load_run(run.folder / "run.json")
    assert record["finished"] is False
    assert record["changed"] == {}
    assert len(record["provenance"]["commit"]) == 40
    assert record["provenance"]["dirty"] is False  # the run's own folder does not count
    assert record["provenance"]["versions"]["torch"] == torch.__version__.split("+")[0]
    assert record["provenance"].keys() >= {"library", "libraries", "device", "cpus", "threads", "python"}
    assert record.keys() >= {"started", "seconds", "peak_memory_mib", "parameters", "seed", "schema"}
    assert record["peak_memory_mib"]["process"] > 10
    assert f"small run {record['id']}" in capsys.readouterr().out
    assert str(book) not in json.dumps(record)


def test_changed_code_and_no_git_are_told_apart(book, tmp_path_factory, monkeypatch):
    (book / "book/results").mkdir()
    (book / "book/results/kept.json").touch()
    assert start_run("toy", VALUES).record()["provenance"]["dirty"] is False
    (book / "new.py").touch()
    assert start_run("toy", VALUES).record()["provenance"]["dirty"] is True
    subprocess.run(["rm", "-r", str(book / ".git")], check=True)
    origin = start_run("toy", VALUES).record()["provenance"]
    assert (origin["commit"], origin["dirty"]) == (None, None)


def test_new_files_count_whatever_git_is_set_to(book):
    subprocess.run(["git", "-C", str(book), "config", "status.showUntrackedFiles", "no"], check=True)
    assert provenance.git_state(book)[1] is False
    (book / "new.py").touch()
    assert provenance.git_state(book)[1] is True


def test_trouble_with_git_is_not_taken_for_a_clean_state(book, monkeypatch):
    (book / ".git/index").write_bytes(b"damaged")
    commit, dirty = provenance.git_state(book)
    assert len(commit) == 40
    assert dirty is None

    def too_slow(*arguments, **keys):
        raise subprocess.TimeoutExpired("git", 60)

    monkeypatch.setattr(subprocess, "run", too_slow)
    assert provenance.git_state(book) == (None, None)


def test_runs_in_the_root_do_not_hide_everything(book, monkeypatch):
    monkeypatch.setenv("LOOKALIKE_RUNS", str(book))
    (book / "new.py").touch()
    assert provenance.git_state(book)[1] is True
    monkeypatch.setenv("LOOKALIKE_RUNS", str(book / "elsewhere"))
    (book / "new.py").unlink()
    (book / "elsewhere").mkdir()
    (book / "elsewhere/run.json").touch()
    assert provenance.git_state(book)[1] is False


def test_everything_is_seeded(book):
    def draws(seed):
        start_run("toy", VALUES | {"seed": seed})
        return random.random(), np.random.random(), torch.rand(()).item()  # noqa: NPY002 - the global state

    assert draws(1) == draws(1)
    assert not set(draws(1)) & set(draws(2))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"epochs": "2"}, "epochs must be of type int"),
        ({"run_name": "huge"}, "must be small, medium or full"),
        ({"run_name": "small/../x"}, "must be small, medium or full"),
        ({"In": ["", "# Parameters\nepoch = 3\n"], "epoch": 3}, "toy has no parameter epoch"),
        ({"In": ["", "# Parameters\nepochs = 0.5\n"], "epochs": 0.5}, "epochs must be of type int"),
    ],
)
def test_bad_parameters_stop_a_run(book, change, sentence):
    with pytest.raises((ResultsError, runner.ParameterError), match=sentence):
        start_run("toy", VALUES | change)
    assert not (book / "runs").exists()


def test_injected_parameters_that_fit_pass(book):
    injected = {"In": ["x = 1", "# Parameters\nepochs = 7\nnoises = [1.0]\n"], "epochs": 7, "noises": [1.0]}
    assert start_run("toy", VALUES | injected).parameters["epochs"] == 7


def test_missing_value_is_a_sentence(book):
    with pytest.raises(ResultsError, match="epochs has no value yet: run the parameters cell"):
        start_run("toy", {"seed": 0})


def test_resume_is_asked_for_by_the_environment(book, monkeypatch):
    kept = book / "runs/toy/small/stages/a/stage.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("{}")
    monkeypatch.setenv("LOOKALIKE_RESUME", "1")
    assert start_run("toy", VALUES).record()["resumed"] is True
    assert kept.exists()
    monkeypatch.setenv("LOOKALIKE_RESUME", "0")
    assert start_run("toy", VALUES).record()["resumed"] is False
    assert not kept.exists()


# --- writing down -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"key": "Table1/fid"}, "is not a key"),
        ({"key": "table1//fid"}, "is not a key"),
        ({"key": "table1/fid/"}, "is not a key"),
        ({"value": math.nan}, "say why in `note`"),
        ({"value": math.inf}, "only finite numbers"),
        ({"value": -math.inf, "note": "diverged"}, "only finite numbers"),
        ({"value": "0.5"}, "must be a number"),
        ({"value": True}, "must be a number"),
        ({"low": 0.0}, "needs both ends"),
        ({"low": 1.0, "high": 0.0}, "the lower one first"),
        ({"low": math.nan, "high": 1.0}, "only finite numbers"),
        ({"spread": -1.0}, "neither is negative"),
        ({"n": 0}, "n counts from 1"),
    ],
)
def test_log_refuses_what_cannot_be_compared(book, values, sentence):
    run = start_run("toy", VALUES)
    with pytest.raises(ResultsError, match=sentence):
        run.log(**{"key": "table1/fid", "value": 1.0} | values)
    assert run.record()["metrics"] == {}


def test_one_key_one_number(book):
    run = start_run("toy", VALUES)
    run.log("a/b", torch.tensor(0.5), n=np.int64(3))
    run.log("a/b", 0.5, n=3)
    run.log("a/nan", math.nan, note="no neighbours")
    run.log("a/nan", math.nan, note="no neighbours")
    with pytest.raises(ResultsError, match="one key, one number"):
        run.log("a/b", 0.6, n=3)
    run.save()
    record = load_run(run.folder / "run.json")
    assert record["finished"] is True
    assert record["metrics"]["a/b"] == {
        "value": 0.5, "low": None, "high": None, "spread": None, "n": 3, "note": "",
    }  # fmt: skip
    assert record["metrics"]["a/nan"]["value"] is None


def test_data_gives_its_own_token_and_full_only_the_papers_settings(book):
    run = start_run("toy", VALUES)
    run.uses(Images("mednist28", stand_in_for="organamnist", origin="real"))
    run.uses(Images("mednist28", stand_in_for="organamnist", origin="real"))
    run.provides("weights:inception", "epochs:10000")
    record = run.record()
    assert record["tokens"] == ["data:mednist28", "epochs:10000", "weights:inception"]
    assert [data["stand_in_for"] for data in record["data"]] == ["organamnist"]
    for token in ("full", "data:mnist", "inception", "weights:a b"):
        with pytest.raises(ResultsError, match="cannot be provided by hand"):
            run.provides(token)

    assert start_run("toy", FULL | {"workers": 8, "seed": 9}).record()["tokens"] == ["full"]
    changed = start_run("toy", FULL | {"epochs": 3, "run_name": "full-quick"}).record()
    assert changed["scale"] == "full"
    assert changed["changed"] == {"epochs": 3}
    assert changed["tokens"] == []


def test_foreign_record_is_a_sentence(tmp_path):
    for content, sentence in [
        ("[]", "list where a JSON object"),
        ("{", "not readable JSON"),
        ("{}", "schema None"),
    ]:
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(ResultsError, match=sentence):
            load_run(tmp_path / "run.json")
    with pytest.raises(ResultsError, match="does not exist"):
        load_run(tmp_path / "absent.json")


# --- the paper's numbers ------------------------------------------------------------------------------------


def test_reported_numbers_are_read(book):
    table = load_reported("toy")
    assert table["value"].tolist()[:3] == [27.97, 9.79, 0.40]
    assert table["value_text"][2] == "0.40"
    assert math.isnan(table["spread"][0])
    with pytest.raises(ResultsError, match="no reported numbers for other"):
        load_reported("other")


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("A/b,1,,1,Table 1,FID,,,", "a key is lower case words"),
        ("a/b,1,,1,,FID,,,", "where and what"),
        ("a/b,one,,1,Table 1,FID,,,", "must be finite numbers"),
        ("a/b,inf,,1,Table 1,FID,,,", "must be finite numbers"),
        ("a/b,1,-1,,Table 1,FID,,,", "cannot be negative"),
        ("a/b,1,,,Table 1,FID,,,", "needs a spread or a tolerance"),
        ("a/b,,,,Table 1,FID,,,", "needs a value or a claim"),
        ("a/b,1,,1,Table 1,FID,mnist,,", "'mnist' is not a need"),
        ("a/b,1,,1,Table 1,FID,,a/b,", "another key"),
        ("a/b,,,,Table 1,FID,,,A claim", "begins with claim/"),
        ("claim/a,1,,1,Table 1,FID,,,", "begins with claim/"),
        ("claim/a,1,,1,Table 1,FID,,,A claim", "a claim has no value"),
        ("claim/c1,,,,Table 1,FID,,,A claim", "claim/c1 twice"),
    ],
)
def test_rows_that_cannot_be_judged_are_refused(book, line, sentence):
    (book / "book/reported/toy.csv").write_text(REPORTED + line + "\n")
    with pytest.raises(ResultsError, match=sentence):
        load_reported("toy")


def test_columns_are_fixed(book):
    (book / "book/reported/toy.csv").write_text("key,value\na/b,1\n")
    with pytest.raises(ResultsError, match="must have the columns key,value,spread"):
        load_reported("toy")


# --- verdicts -----------------------------------------------------------------------------------------------


def number_row(value=10.0, spread=math.nan, tolerance=0.5, needs="full data:mnist", stand_in=""):
    fields = {"spread": spread, "tolerance": tolerance, "needs": needs, "stand_in": stand_in}
    return {"key": "k", "value": value, "value_text": str(value), "claim": "", **fields}


def claim_row(needs="full data:mnist"):
    return number_row(math.nan, tolerance=math.nan, needs=needs) | {"claim": "GAN wins", "value_text": ""}


def metric(value=10.0, low=None, high=None, note=""):
    return {"value": value, "low": low, "high": high, "n": None, "spread": None, "note": note}


def record(tokens="full data:mnist", scale="full", changed=None, data=("mnist",), **metrics):
    data = [{"name": name} for name in data]
    fields = {"tokens": tokens.split(), "scale": scale, "changed": changed or {}, "data": data}
    return {"metrics": metrics, **fields}


small = {"tokens": "data:digits", "scale": "small", "data": ("digits",)}

VERDICTS = [
    (number_row(), record(), "not run"),
    (number_row(), record(k=metric(10.5)), "reproduced"),
    (number_row(), record(k=metric(9.4)), "not reproduced"),
    (number_row(spread=2.0), record(k=metric(11.9)), "reproduced"),
    (number_row(spread=0.1), record(k=metric(10.4)), "reproduced"),
    (number_row(0.3, tolerance=0.1), record(k=metric(0.2)), "reproduced"),  # 0.09999999999999998 apart
    (number_row(0.3, tolerance=0.1), record(k=metric(0.19999)), "not reproduced"),
    (number_row(0.0, tolerance=0.0), record(k=metric(0.0)), "reproduced"),
    (number_row(0.0, tolerance=0.0), record(k=metric(1e-12)), "not reproduced"),
    (number_row(needs=""), record(k=metric(10.0), **small), "reproduced"),
    (number_row(), record(k=metric(10.0), **small), "not comparable: small scale; digits instead of mnist"),
    (
        number_row(),
        record("data:mnist", changed={"epochs": 3}, k=metric(10.0)),
        "not comparable: full scale with other epochs",
    ),
    (
        number_row(needs="full weights:inception"),
        record(k=metric(10.0)),
        "not comparable: without the inception weights",
    ),
    (number_row(needs="epochs:9"), record(k=metric(10.0)), "not comparable: epochs is not 9"),
    (
        number_row(needs="data:mnist"),
        record("", data=(), k=metric()),
        "not comparable: no recorded data instead of mnist",
    ),
    (number_row(), record(k=metric(None, note="no neighbours")), "not comparable: no neighbours"),
    (number_row(stand_in="s/fd"), record(**{"s/fd": metric(10.0)}), "not comparable: shown is fd"),
    (number_row(stand_in="s/fd"), record(k=metric(10.0), **{"s/fd": metric(99.0)}), "reproduced"),
    (number_row(stand_in="s/fd"), record(), "not run"),
    (claim_row(), record(), "not run"),
    (claim_row(), record(k=metric(1.0)), "undecided: no interval"),
    (claim_row(), record(k=metric(1.0, 0.1, 2.0)), "same direction"),
    (claim_row(), record(k=metric(1.0, 0.0, 2.0)), "undecided: the interval spans 0"),
    (claim_row(), record(k=metric(1.0, -0.1, 2.0)), "undecided: the interval spans 0"),
    (claim_row(), record(k=metric(-1.0, -2.0, 0.0)), "undecided: the interval spans 0"),
    (claim_row(), record(k=metric(-1.0, -2.0, -0.1)), "not reproduced"),
    (claim_row(), record(k=metric(None, note="one class only")), "undecided: one class only"),
    (claim_row("full"), record(k=metric(1.0, 0.1, 2.0), **small), "same direction (at small scale)"),
    (
        claim_row(),
        record(k=metric(-1.0, -2.0, -0.1), **small),
        "not reproduced (at small scale; digits instead of mnist)",
    ),
    (
        claim_row(),
        record("full data:digits", data=("digits",), k=metric(1.0, 0.1, 2.0)),
        "same direction (at full scale; digits instead of mnist)",
    ),
    (
        claim_row("full"),
        record("", changed={"epochs": 3}, k=metric(1.0, 0.1, 2.0)),
        "same direction (at full scale with other epochs)",
    ),
    (
        claim_row("full data:mnist"),
        record("", changed={"data": "digits", "lr": 1.0}, data=("digits",), k=metric(-1.0, -2.0, -0.1)),
        "not reproduced (at full scale with other data, lr; digits instead of mnist)",
    ),
    (claim_row("full"), record("", "medium", k=metric(1.0, 0.1, 2.0)), "same direction (at medium scale)"),
    (
        claim_row("data:mnist"),
        record("data:digits", "medium", data=("digits",), k=metric(1.0, 0.1, 2.0)),
        "same direction (at medium scale; digits instead of mnist)",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("row", "run", "expected"), VERDICTS)
def test_verdict(row, run, expected):
    assert verdict(row, run) == expected


finite = st.floats(-1e6, 1e6)
margins = st.one_of(st.just(math.nan), st.floats(0, 1e6))
tokens = st.lists(st.sampled_from(["full", "data:mnist", "weights:inception", "epochs:10"]), unique=True)


@given(finite, finite, margins, margins, tokens, tokens)
def test_never_reproduced_with_a_need_missing(paper, ours, spread, tolerance, needs, provided):
    row = number_row(paper, spread, tolerance, " ".join(needs))
    found = verdict(row, record(" ".join(provided), k=metric(ours)))
    assert found.startswith("not comparable: ") == bool(set(needs) - set(provided))


@given(finite, finite, margins, st.floats(0, 1e6), st.floats(0, 1e6))
def test_a_wider_tolerance_never_takes_reproduced_away(paper, ours, spread, tolerance, more):
    assume(verdict(number_row(paper, spread, tolerance), record(k=metric(ours))) == "reproduced")
    assert verdict(number_row(paper, spread, tolerance + more), record(k=metric(ours))) == "reproduced"


@given(finite, finite, margins, margins)
def test_reproduced_means_within_the_margin(paper, ours, spread, tolerance):
    margin = max([0.0, *(m for m in (spread, tolerance) if not math.isnan(m))])
    found = verdict(number_row(paper, spread, tolerance), record(k=metric(ours)))
    if abs(ours - paper) > margin + 1e-8 * max(margin, abs(paper)):
        assert found == "not reproduced"
    if abs(ours - paper) <= margin:
        assert found == "reproduced"


@given(finite, finite, finite, st.floats(1e-3, 1e3), tokens)
def test_a_claim_depends_on_the_signs_of_its_interval_alone(value, end, other, factor, provided):
    low, high = sorted((end, other))
    assume(all(end == 0 or abs(end) > 1e-300 for end in (low, high)))
    run = " ".join(provided)
    found = verdict(claim_row(), record(run, k=metric(value, low, high)))
    assert found == verdict(claim_row(), record(run, k=metric(-value, factor * low, factor * high)))
    assert found.startswith("same direction") == (low > 0)
    assert found.startswith("not reproduced") == (high < 0)
    assert ("(at full scale" in found) == ("full" not in provided or "data:mnist" not in provided)


@given(tokens, tokens)
def test_missing_needs_are_all_named(needs, provided):
    assert missing_needs(" ".join(needs), record(" ".join(provided))).keys() == set(needs) - set(provided)


# --- the table ----------------------------------------------------------------------------------------------


def finished_run(book, values=FULL, images=None, **metrics):
    run = start_run("toy", values)
    run.uses(images or Images())
    for key, value in metrics.items():
        run.log(key.replace("__", "/"), **(value if isinstance(value, dict) else {"value": value}))
    run.save()
    return run


def write_notebook(run, *outputs, metadata=None):
    """An executed notebook beside the run, as papermill leaves it, that shows the run's id."""
    stream = nbformat.v4.new_output("stream", text=f"toy: run {run.record()['id']}\n")
    cell = nbformat.v4.new_code_cell("run = start_run()", outputs=[stream, *outputs])
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata=metadata or {})
    nbformat.write(notebook, run.folder / "notebook.ipynb")


def test_comparison_joins_paper_kept_run_and_this_page(book):
    claim = {"value": 0.3, "low": 0.1, "high": 0.5, "n": 3}
    kept = finished_run(book, table1__mnist__gan__psnr={"value": 9.70, "spread": 0.2, "n": 3}, claim__c1=claim)
    write_notebook(kept)
    keep("toy", "full")
    run = finished_run(
        book, VALUES, Images("digits"), table1__mnist__vae__fd_lite0=12.3456, table1__mnist__gan__psnr=8.0
    )

    table = comparison("toy", run.record()).set_index("key")
    fid, psnr = table.loc["table1/mnist/vae/fid"], table.loc["table1/mnist/gan/psnr"]
    assert (fid["paper"], fid["this_page"], fid["kept_run"]) == ("27.97", "fd_lite0 12.3", "")
    assert fid["verdict"] == "not comparable: shown is fd_lite0"
    assert (psnr["paper"], psnr["this_page"]) == ("9.79 ± 0.10", "8.00")
    assert psnr["kept_run"] == "9.70 ± 0.20, n = 3 (full, mnist)"
    assert psnr["verdict"] == "not comparable: small scale; digits instead of mnist"
    assert psnr["kept_verdict"] == "reproduced"
    assert (psnr["paper_value"], psnr["kept_value"], psnr["value"]) == (9.79, 9.7, 8.0)
    assert table.loc["claim/c1", "what"] == "GAN degrades slower than VAE"
    assert table.loc["claim/c1", "kept_run"] == "0.3 [0.1, 0.5], n = 3 (full, mnist)"
    assert table.loc["table1/mnist/gan/ssim", "verdict"] == "not run"

    alone = comparison("toy").set_index("key")["verdict"]
    assert alone["table1/mnist/gan/psnr"] == "reproduced"
    assert alone["claim/c1"] == "same direction"
    assert alone["table1/mnist/vae/fid"] == "not run"


def test_prefix_shows_a_part(book):
    run = finished_run(book, VALUES)
    assert run.compare("claim/").table["key"].tolist() == ["claim/c1"]
    assert len(run.compare().table) == 4
    with pytest.raises(ResultsError, match="No reported key of toy begins with 'table9'"):
        run.compare("table9")


def test_the_largest_kept_run_that_has_the_number_is_shown(book):
    for values, metrics in (
        (VALUES | {"run_name": "medium", "epochs": 20}, {"table1__mnist__gan__psnr": 9.0, "claim__c1": 1.0}),
        (FULL, {"claim__c1": 2.0}),
    ):
        run = finished_run(book, values, **metrics)
        write_notebook(run)
        keep("toy", values["run_name"])
    assert list(kept_runs("toy")) == ["full", "medium"]
    table = comparison("toy").set_index("key")
    assert table.loc["table1/mnist/gan/psnr", "kept_scale"] == "medium"
    assert table.loc["claim/c1", "kept_value"] == 2.0


def test_page_shows_a_table_for_light_and_dark(book):
    run = finished_run(book, VALUES, table1__mnist__gan__ssim=0.0004)
    shown = run.compare()
    page = shown._repr_html_()
    assert 'class="dataframe lookalike-comparison"' in page
    assert '<span class="lookalike-verdict lookalike-bad">not reproduced</span>' in page
    assert "SSIM &lt;b&gt; of the GAN" in page
    assert "0.0004" in page  # two decimals would say 0.00
    assert not re.search('style="[^"]*(color|background)', page)
    assert run.record()["id"] in page
    assert "SSIM <b> of the GAN" in repr(shown)
    assert "not reproduced" in repr(shown)


def test_other_verdict_of_the_kept_run_stands_below(book):
    row = {"where": "T", "what": "w", "paper": "1", "kept_run": "1 (full)", "this_page": "2"}
    table = comparison_frame(row | {"verdict": "not comparable: small scale", "kept_verdict": "reproduced"})
    page = Comparison(table, "")._repr_html_()
    assert '<br>kept: <span class="lookalike-verdict lookalike-good">reproduced</span>' in page
    assert "not comparable: small scale | kept: reproduced" in repr(Comparison(table, ""))


def test_a_long_reason_is_said_once_below_the_table():
    row = {"where": "T", "what": "w", "paper": "1", "kept_run": "", "this_page": "2", "kept_verdict": "not run"}
    scale = "medium scale; vertebra_units instead of pgan_f2305"
    verdicts = [
        f"not comparable: {scale}",
        "not comparable: shown is fid_lite0",
        f"undecided: the interval spans 0 (at {scale})",
        f"same direction (at {scale})",
        f"not comparable: {scale}",
    ]
    page = Comparison(comparison_frame(*(row | {"verdict": verdict} for verdict in verdicts)), "")._repr_html_()
    cells = re.findall(r'<span class="lookalike-verdict[^>]*>([^<]*)</span>(?:&nbsp;<sup>([^<]*)</sup>)?', page)
    assert cells == [
        ("not comparable", "a"),
        ("not comparable: shown is fid_lite0", ""),
        ("undecided: the interval spans 0", "b"),
        ("same direction", "b"),
        ("not comparable", "a"),
    ]
    assert page.count(f"<sup>a</sup> {scale}<") == page.count(f"<sup>b</sup> at {scale}<") == 1
    assert "kept run" not in page  # a column without a word in it


def test_marks_of_notes_go_on_after_z():
    notes = Notes()
    marks = [notes.split(f"not comparable: a reason of more than thirty-two letters, {i}")[1] for i in range(28)]
    assert marks[:2] + marks[25:] == ["a", "b", "z", "aa", "ab"]


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("claim/c1a", "claim C1a"),
        ("claim/c12_classes", "claim C12"),
        ("claim/colour", "claim"),
        ("claim/noise_use", "claim"),
    ],
)
def test_a_claim_has_the_name_that_ledgers_use(key, name):
    assert _claim_name(key) == name


def test_several_data_sets_are_missed_in_one_breath():
    text = verdict(number_row(needs="full data:organs data:octmnist"), record("", k=metric(10.0), scale="small"))
    assert text == "not comparable: small scale; mnist instead of organs and octmnist"


def comparison_frame(*rows):
    import pandas as pd

    return pd.DataFrame(list(rows))


# --- keeping ------------------------------------------------------------------------------------------------


def test_kept_run_is_the_runs_record_and_a_clean_notebook(book):
    run = finished_run(book, claim__c1=1.0)
    progress = nbformat.v4.new_output("stream", name="stderr", text="10%\r 50%\r100%\n")
    mixed = nbformat.v4.new_output("stream", text=f"10%\r100%\nsaved {book}/runs/toy\n")
    shown = nbformat.v4.new_output("display_data", data={"text/plain": f"'{book}/book'", "image/png": f"{book}/"})
    write_notebook(
        run, progress, mixed, shown, metadata={"papermill": {"input_path": "/x", "output_path": "/y", "duration": 3}}
    )
    files = keep("toy", "full")
    assert [path.relative_to(book).as_posix() for path in files] == [
        "book/results/toy/full.json",
        "book/results/toy/full.ipynb",
    ]
    assert kept_runs("toy") == {"full": load_run(run.folder / "run.json")}
    notebook = nbformat.read(files[1], as_version=4)
    assert notebook.metadata["papermill"] == {"duration": 3}
    _, saved, shown = notebook.cells[0].outputs
    assert saved.text == "saved runs/toy\n"
    assert shown.data == {"text/plain": "'book'", "image/png": f"{book}/"}
    assert (run.folder / "notebook.ipynb").exists()


def test_no_place_of_this_machine_is_left(book, tmp_path_factory, monkeypatch):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.setenv("LOOKALIKE_RUNS", str(elsewhere))
    monkeypatch.setenv("HOME", "/home/ada")
    text = f"{elsewhere}/toy/full {paths.project_root()}/lib /home/ada/.cache '/home/ada' /home/adam A/home/ada"
    result = nbformat.v4.new_output("execute_result", data={"text/html": text})
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(outputs=[result])])
    strip(notebook)
    assert result.data["text/html"] == "runs/toy/full lib ~/.cache '~' /home/adam A/home/ada"
    monkeypatch.setenv("HOME", "/")
    result.data["text/html"] = "a/b / c"
    strip(notebook)
    assert result.data["text/html"] == "a/b / c"


def test_a_kill_while_keeping_leaves_no_pair_of_two_runs(book, monkeypatch):
    write_notebook(finished_run(book))
    keep("toy", "full")
    write_notebook(finished_run(book))

    def killed(path, document):
        raise KeyboardInterrupt

    monkeypatch.setattr("lookalike.keep.write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        keep("toy", "full")
    assert [path.name for path in (book / "book/results/toy").iterdir()] == ["full.ipynb"]


def test_run_with_stages_of_other_code_is_kept_only_if_allowed(book):
    run = start_run("toy", FULL)
    run._stages["a"] = {"fingerprint": "0", "seconds": 1.0, "libraries": ["0" * 12]}
    run.save()
    write_notebook(run)
    with pytest.raises(ResultsError, match="1 of its stages were made by other library code"):
        keep("toy", "full")
    keep("toy", "full", allow_dirty=True)


def resumed_run(calls):
    """A finished run whose stages `calls` (name -> function) were made by older code than the run's own."""
    run = start_run("toy", FULL)
    for name, function in calls.items():
        run.stage(name, function)
        result = read_json(run.stage_folder(name) / "result.json")
        write_json(run.stage_folder(name) / "result.json", result | {"libraries": ["0" * 12]})
        run._stages[name]["libraries"] = ["0" * 12]
    run.save()
    write_notebook(run)
    return run


def test_a_run_of_older_stages_is_kept_once_a_sample_of_them_came_out_the_same(book):
    run = resumed_run({f"draw{i}": toy_stages.draw for i in range(4)})
    (row,) = recheck("toy", "full", sample=2, workers=1)
    assert (row["stages"], row["again"], row["differ"]) == (4, ["draw0", "draw3"], [])
    keep("toy", "full")
    assert "4 of 4 stages made by other library code (2 of them made again: the same)" in describe_run(
        load_run(run.folder / "run.json")
    )


def test_a_stage_that_comes_out_otherwise_keeps_its_run_out(book):
    """Planted: an older code that would have drawn other numbers, and one that would have saved other weights."""
    run = resumed_run({"draw": toy_stages.draw, "weights": toy_stages.save_net})
    result = read_json(run.stage_folder("draw") / "result.json")
    write_json(run.stage_folder("draw") / "result.json", result | {"result": result["result"] | {"values": [0.0]}})
    weights = run.stage_folder("weights") / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    differ = {row["function"]: row["differ"] for row in recheck("toy", "full", workers=1)}
    assert differ == {"toy_stages.draw": ["draw"], "toy_stages.save_net": ["weights"]}
    with pytest.raises(ResultsError, match="2 of its stages were made by other library code"):
        keep("toy", "full")


def test_a_recheck_needs_a_run_and_a_sample(book):
    with pytest.raises(ResultsError, match="There is no run toy/medium to recheck"):
        recheck("toy")
    resumed_run({"draw": toy_stages.draw})
    with pytest.raises(ResultsError, match="at least 1 stage"):
        recheck("toy", "full", sample=0)


def test_no_run_no_notebook_not_finished(book):
    with pytest.raises(ResultsError, match="There is no run toy/medium to keep"):
        keep("toy")
    run = start_run("toy", FULL)
    with pytest.raises(ResultsError, match="has no executed notebook"):
        keep("toy", "full")
    write_notebook(run)
    with pytest.raises(ResultsError, match="is not finished"):
        keep("toy", "full")


def test_run_of_changed_code_is_kept_only_if_allowed(book):
    (book / "new.py").touch()
    run = finished_run(book)
    write_notebook(run)
    with pytest.raises(ResultsError, match=r"its code is not a commit; commit and run again\.$"):
        keep("toy", "full")
    assert not kept_runs("toy")
    keep("toy", "full", allow_dirty=True)
    assert list(kept_runs("toy")) == ["full"]


def test_run_with_other_settings_is_not_kept_as_its_scale(book):
    run = finished_run(book, FULL | {"epochs": 1, "run_name": "full-quick"})
    write_notebook(run)
    with pytest.raises(ResultsError, match="its epochs is not the full scale's"):
        keep("toy", "full-quick", allow_dirty=True)


def test_notebook_of_another_run_or_with_an_error_is_not_kept(book):
    write_notebook(finished_run(book))
    run = finished_run(book)
    with pytest.raises(ResultsError, match="its notebook is of another run"):
        keep("toy", "full")
    write_notebook(run, nbformat.v4.new_output("error", ename="ValueError", evalue="x", traceback=[]))
    with pytest.raises(ResultsError, match="stopped with an error"):
        keep("toy", "full")


@pytest.mark.parametrize("data", [{"image/png": "iVBORw0="}, {"text/html": "<div><img src='data:'></div>"}])
def test_images_of_restricted_data_stay_here(book, data):
    picture = nbformat.v4.new_output("display_data", data=data)
    run = finished_run(book, images=replace(Images("bcdr"), restricted=True))
    write_notebook(run, picture)
    with pytest.raises(ResultsError, match="shows images, and bcdr must not be passed on"):
        keep("toy", "full", allow_dirty=True)
    write_notebook(run)
    keep("toy", "full")
    run = finished_run(book)
    write_notebook(run, picture)
    keep("toy", "full")


def test_a_picture_beside_restricted_data_needs_the_word_of_its_author(book):
    picture = nbformat.v4.new_output("display_data", data={"image/png": "iVBORw0="})
    run = finished_run(book, images=replace(Images("bcdr"), restricted=True))
    write_notebook(run, picture)
    path = run.folder / "notebook.ipynb"
    notebook = nbformat.read(path, as_version=4)
    drawing = next(cell for cell in notebook.cells if picture in cell.get("outputs", []))
    drawing.metadata["tags"] = ["hide-input", "draws-no-restricted-image"]
    nbformat.write(notebook, path)
    keep("toy", "full")
    drawing.metadata["tags"] = ["hide-input"]
    nbformat.write(notebook, path)
    with pytest.raises(ResultsError, match=r"says so by the tag draws-no-restricted-image"):
        keep("toy", "full")


def test_all_names_of_the_library_are_there():
    assert all(hasattr(results, name) for name in results.__all__)
