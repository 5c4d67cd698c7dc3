import json
import subprocess
import sys

import pytest
from PIL import Image

from lookalike import cli, paths, runner
from lookalike.data import manifest, phantoms
from lookalike.data.plants import plant

VERBS = ["list", "run", "compare", "keep", "audit", "evaluate", "card", "calibrate", "doctor"]
VERBS += ["data list", "data fetch", "data verify"]

CHAPTER = """\
---
chapter: tiny
jupytext:
  text_representation:
    extension: .md
    format_name: myst
kernelspec:
  display_name: Python 3
  name: python3
---

# A tiny chapter

```{code-cell} ipython3
:tags: [parameters]

seed: int = 0
lr: float = 0.1
run_name: str = "small"
```

```{code-cell} ipython3
print(1 / lr)
```
"""


@pytest.fixture
def lookalike(tmp_path, monkeypatch, capsys):
    """lookalike("verb", ...) -> (exit code, stdout, stderr), in a project with one tiny chapter."""
    manifest = paths.project_root() / "data_manifest.yaml"
    for name in ("chapters", "params", "reported"):
        (tmp_path / "book" / name).mkdir(parents=True)
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "data_manifest.yaml").write_text(manifest.read_text("utf-8"))
    (tmp_path / "book/chapters/tiny.md").write_text(CHAPTER)
    (tmp_path / "book/reported/tiny.csv").write_text(
        "key,value,spread,tolerance,where,what,needs,stand_in,claim\n"
        "table1/digits/vae/fid,12.5,0.5,,Table 1,FID,full data:mnist,,\n"
    )
    monkeypatch.setenv("LOOKALIKE_ROOT", str(tmp_path))
    monkeypatch.setenv("LOOKALIKE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LOOKALIKE_MIRROR", raising=False)
    monkeypatch.delenv("LOOKALIKE_RUNS", raising=False)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["lookalike", *arguments])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_help_imports_nothing_heavy():
    code = "import sys; sys.argv = ['lookalike', '--help']\nfrom lookalike import cli\n"
    code += "try: cli.main()\nexcept SystemExit: pass\n"
    code += "print({'torch', 'numpy', 'pandas', 'jupytext', 'papermill'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(lookalike, verb):
    code, out, _ = lookalike(*verb.split(), "--help")
    assert code == 0
    assert f"Example: lookalike {verb}" in out
    assert "--json" in out


def test_list_shows_what_there_is(lookalike):
    code, out, _ = lookalike("list", "--json")
    assert code == 0
    assert json.loads(out) == [{"chapter": "tiny", "title": "A tiny chapter", "scales": ["small"], "kept": []}]
    assert "A tiny chapter" in lookalike("list")[1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "tyni"], "There is no chapter tyni; the book has: tiny."),
        (["run", "tiny", "--set", "epochs=3"], "tiny has no parameter epochs; it has: seed, lr, run_name."),
        (["run", "tiny", "--set", "lr=low"], "lr must be of type float (like 0.1), not 'low' of type str."),
        (["run", "tiny", "--set", "lr"], "A setting looks like epochs=3, not 'lr'."),
        (["run", "tiny", "--scale", "huge"], "There is no scale huge; take one of small, medium, full."),
        (
            ["run", "tiny", "--scale", "full"],
            "tiny has no full scale yet: book/params/tiny.full.yaml does not exist.",
        ),
        (["compare", "tyni"], "There is no chapter tyni; the book has: tiny."),
        (["keep", "tiny"], "There is no run tiny/medium to keep"),
        (["data", "fetch", "mnits"], "The data manifest has no entry 'mnits'"),
        (["data", "verify", "mnits"], "The data manifest has no entry 'mnits'"),
        (["evaluate", "--real", "no", "--synthetic", "such"], "There is no folder no with real images."),
        (
            ["evaluate", "--real", "a", "--synthetic", "b", "--threshold", "auc=1"],
            "There is no threshold auc; there are copies, copies_share",
        ),
        (["card", "--real", "a", "--synthetic", "b", "--draw", "--restricted"], "One of the sets is restricted"),
        (["audit", "tiny"], "There is no run tiny/small; make it with: lookalike run tiny."),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(lookalike, arguments, sentence):
    code, out, err = lookalike(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith(sentence)
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["run"],
        ["data", "fetch"],
        ["data", "fetch", "mnist", "--all"],
        ["rum"],
        ["audit"],
        ["audit", "tiny", "--self-test"],
        ["evaluate", "--real", "real"],
        ["evaluate", "--real", "a", "--synthetic", "b", "--threshold", "copies"],
    ],
)
def test_a_command_line_that_makes_no_sense_is_refused(lookalike, arguments):
    code, out, err = lookalike(*arguments)
    assert code == 2
    assert out == ""
    assert "Traceback" not in err


def test_run_prints_json_to_stdout_and_progress_to_stderr(lookalike):
    code, out, err = lookalike("run", "tiny", "--set", "run_name=small-a", "--json")
    assert code == 0
    outcome = json.loads(out)
    assert outcome["run_name"] == "small-a"
    assert (paths.runs_dir() / "tiny/small-a/notebook.ipynb").samefile(outcome["notebook"])
    assert "10.0" in err


def test_run_fails_when_a_cell_fails(lookalike):
    code, out, err = lookalike("run", "tiny", "--set", "lr=0")
    assert code == 2
    assert out == ""
    assert "begins `print(1 / lr)` with ZeroDivisionError" in err.splitlines()[-1]


def test_a_stopped_run_says_how_to_go_on(lookalike, monkeypatch):
    def stopped(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run_chapter", stopped)
    code, out, err = lookalike("run", "tiny")
    assert (code, out) == (130, "")
    assert "the same command with --resume goes on" in err


def test_compare_says_not_run_before_any_run(lookalike):
    code, out, _ = lookalike("compare", "tiny", "--json")
    assert code == 0
    assert [row["verdict"] for row in json.loads(out)] == ["not run"]


def test_the_audits_self_test_prints_both_engines(lookalike):
    code, out, _ = lookalike("audit", "--self-test", "--json")
    found = json.loads(out)
    assert code == 0  # it is the library's own engine that decides
    assert found.keys() == {"stock", "ours"}
    assert all(values.keys() == {"accounted", "lower"} for values in found.values())
    assert found["stock"]["lower"] > found["stock"]["accounted"]
    assert found["ours"]["lower"] <= found["ours"]["accounted"]


def test_data_list_shows_every_entry_with_its_place(lookalike):
    code, out, _ = lookalike("data", "list", "--json")
    places = {row["name"]: row["status"] for row in json.loads(out)}
    assert code == 0
    assert places["digits"] == "cached"
    assert places["mnist"] == "to download"


def test_data_fetch_gives_verified_places(lookalike):
    code, out, _ = lookalike("data", "fetch", "digits", "--json")
    assert code == 0
    assert all(path.endswith("mnist_5k.csv.gz") for path in json.loads(out)["digits"].values())


def test_data_fetch_tries_every_named_set_and_reports_all_failures(lookalike):
    code, out, err = lookalike("data", "fetch", "mnits", "digits", "bcdr", "--json")
    assert code == 2
    assert list(json.loads(out)) == ["digits"]
    first, second = err.splitlines()
    assert first.startswith("The data manifest has no entry 'mnits'")
    assert second.startswith("bcdr cannot be fetched automatically")


def test_data_fetch_all_leaves_out_what_no_program_can_fetch(lookalike, monkeypatch):
    places = {"bcdr": "by hand", "digits": "cached"}
    monkeypatch.setattr(manifest, "status", lambda name: places.get(name, "to install"))
    code, out, err = lookalike("data", "fetch", "--all", "--json")
    assert code == 0
    assert list(json.loads(out)) == ["digits"]
    by_hand, to_install = err.splitlines()
    assert by_hand == "Only by hand (lookalike data fetch NAME says how): bcdr"
    assert to_install.startswith("In a package that is not installed (lookalike data fetch NAME says how): ")


def test_data_verify_fails_when_a_file_is_missing(lookalike):
    assert lookalike("data", "verify", "digits")[0] == 0
    code, out, _ = lookalike("data", "verify", "digits", "mnist", "--json")
    assert code == 1
    assert {check["name"]: check["ok"] for check in json.loads(out)} == {"digits": True, "mnist": False}


def test_doctor_finds_this_python_and_what_a_chapter_misses(lookalike):
    code, out, _ = lookalike("doctor", "--json")
    findings = {row["what"]: row for row in json.loads(out)}
    assert code == 0
    assert sys.executable in findings["python"]["found"]
    assert findings["torch"]["ok"]
    assert findings["tiny: data and weights not here"]["found"] == "nothing"


# --- anyone's folders ---------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    """Folders with one sub-folder per class: 60 training, 60 held-out and 70 released images, 20 of them copies."""
    made = phantoms.mammography(190, 0, image_size=24).image_set
    parts = {"real": made.images[:60], "holdout": made.images[60:120], "synthetic": made.images[120:].copy()}
    parts["synthetic"][:20] = plant(made.images[:20], "shift")
    for name, images in parts.items():
        for i, image in enumerate(images):
            path = tmp_path / name / f"class{i // 2 % 2}" / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0]).save(path)
    rows = [f"{name}/class{i // 2 % 2}/{i:03}.png,{name}{i // 2}" for name in ("real", "holdout") for i in range(60)]
    (tmp_path / "subjects.csv").write_text("file,subject\n" + "\n".join(rows) + "\n")
    sets = {name: str(tmp_path / name) for name in parts}
    return [word for name, path in sets.items() for word in (f"--{name}", path)], tmp_path


def test_evaluate_finds_copies_in_folders_and_prints_json(lookalike, folders):
    arguments, root = folders
    code, out, err = lookalike("evaluate", *arguments, "--subjects", str(root / "subjects.csv"), "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["verdict"] == "fail"
    assert found["sets"]["real"]["subjects"] == 30
    assert found["copies"]["flagged"] >= 18
    assert found["criteria"]["copies"]["verdict"] == "fail"
    assert found["copies"]["worst"][0]["real"].startswith("class")


def test_card_writes_three_files(lookalike, folders):
    arguments, root = folders
    code, out, _ = lookalike("card", *arguments, "--out", str(root / "card"), "--threshold", "copies=1000", "--json")
    assert code == 0
    outcome = json.loads(out)
    assert [(root / "card" / f"card.{ending}").is_file() for ending in ("json", "md", "html")] == [True] * 3
    assert outcome["verdict"] == json.loads((root / "card/card.json").read_text())["verdict"]
    assert json.loads((root / "card/card.json").read_text())["thresholds"]["copies"] == 1000


def test_a_known_set_stands_beside_a_folder(lookalike, folders):
    arguments, _ = folders
    code, out, _ = lookalike("evaluate", "--real", "phantom_grey28:val", *arguments[4:])
    assert code == 0
    assert "phantom_grey28" not in out  # the terminal shows the tables
    assert "Evidence, not legal advice." in out
    assert "membership" not in out
