import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import papermill
import pytest

from lookalike import paths, runner
from lookalike.files import ResultsError, locked
from lookalike.runner import ChapterError, ParameterError

RUN_TINY = "from lookalike.runner import run_chapter; run_chapter('tiny')"


def stream_text(notebook_path):
    """Everything that the cells of a notebook printed."""
    cells = nbformat.read(notebook_path, as_version=4).cells
    return "".join(out.text for cell in cells for out in cell.get("outputs", []) if out.output_type == "stream")


# --- parameters ---


def test_parameters_come_with_annotation_and_default(write_chapter):
    write_chapter()
    declared = runner.chapter_parameters("tiny")
    assert list(declared) == ["seed", "epochs", "lr", "sigmas", "names", "private", "run_name"]
    assert declared["lr"] == ("float", 0.1)
    assert declared["sigmas"] == ("list", [1.0])


def test_parameters_cell_may_hold_nothing_but_annotated_values(write_chapter):
    path = write_chapter()
    path.write_text(path.read_text().replace("seed: int = 0", "seed = 0"))
    with pytest.raises(ChapterError, match="seed = 0"):
        runner.chapter_parameters("tiny")


def test_a_chapter_that_is_not_there_lists_those_that_are(write_chapter):
    write_chapter()
    with pytest.raises(ChapterError, match="no chapter tyni; the book has: tiny"):
        runner.chapter_parameters("tyni")


@pytest.mark.parametrize(
    "values",
    [
        {"epochs": 3, "lr": 0.5, "private": True, "run_name": "medium"},
        {"lr": 1},
        {"sigmas": [0.5, 1]},
        {"sigmas": []},
        {"names": ["vae", "gan"]},
    ],
)
def test_fitting_values_pass(write_chapter, values):
    runner.check_parameters(write_chapter(), values)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"epoch": 3}, "has no parameter epoch; it has: seed, epochs"),
        ({"epochs": 3.0}, "epochs must be of type int"),
        ({"epochs": True}, "epochs must be of type int"),
        ({"lr": True}, "lr must be of type float"),
        ({"lr": "1e-4"}, "write 1.0e-4"),
        ({"private": 1}, "private must be of type bool"),
        ({"run_name": 3}, "run_name must be of type str"),
        ({"sigmas": 0.5}, "sigmas must be of type list"),
        ({"sigmas": ["a"]}, "sigmas must be of type list"),
        ({"names": [1]}, r"names must be of type list\[str\]"),
        ({"seed": None}, "seed must be of type int"),
    ],
)
def test_other_values_are_refused_by_name(write_chapter, values, sentence):
    with pytest.raises(ParameterError, match=sentence):
        runner.check_parameters(write_chapter(), values)


@pytest.mark.parametrize(
    ("setting", "parsed"),
    [
        ("lr=1e-4", ("lr", 1e-4)),
        ("epochs=3", ("epochs", 3)),
        ("sigmas=[0.5, 1]", ("sigmas", [0.5, 1])),
        ("names=[vae, gan]", ("names", ["vae", "gan"])),
        ("private=true", ("private", True)),
        ("run_name=2024", ("run_name", "2024")),
        ("run_name=a=b", ("run_name", "a=b")),
    ],
)
def test_a_setting_is_read_by_the_declared_type(write_chapter, setting, parsed):
    assert runner.parse_setting(write_chapter(), setting) == parsed


@pytest.mark.parametrize("setting", ["epochs", "=3", "my epochs=3"])
def test_what_is_no_setting_is_refused(write_chapter, setting):
    with pytest.raises(ParameterError, match="looks like epochs=3"):
        runner.parse_setting(write_chapter(), setting)


def test_a_scale_brings_its_file_and_its_name(write_chapter):
    write_chapter()
    assert runner.run_parameters("tiny", "small", {}) == {"run_name": "small"}
    medium = {"epochs": 30, "sigmas": [0.5, 1], "run_name": "medium"}
    assert runner.run_parameters("tiny", "medium", {}) == medium


def test_a_run_with_other_settings_does_not_take_the_scales_place(write_chapter):
    write_chapter()
    names = [
        runner.run_parameters("tiny", "medium", overrides)["run_name"]
        for overrides in (
            {"epochs": 3},
            {"epochs": 3},
            {"epochs": 4},
            {"epochs": 30},
            {"run_name": "medium-b"},
        )
    ]
    assert names[0] == names[1] != names[2]
    assert names[0].startswith("medium-")
    assert names[3:] == ["medium", "medium-b"]


def test_a_scale_that_is_not_written_says_which_file_is_missing(write_chapter):
    write_chapter()
    with pytest.raises(ParameterError, match=r"book/params/tiny\.full\.yaml does not exist"):
        runner.run_parameters("tiny", "full", {})
    with pytest.raises(ParameterError, match="no scale large"):
        runner.run_parameters("tiny", "large", {})


# --- runs ---


def test_a_run_leaves_its_notebook_and_shows_what_the_chapter_prints(write_chapter, capfd):
    write_chapter("print('lr is', lr)", "import os\nprint(os.environ['LOOKALIKE_RESUME'], end='')")
    notebook = runner.run_chapter("tiny", overrides={"lr": 0.5, "run_name": "small-b"}, resume=True)
    assert notebook == paths.runs_dir() / "tiny" / "small-b" / "notebook.ipynb"
    assert stream_text(notebook) == "lr is 0.5\n1"
    out, err = capfd.readouterr()
    assert out == ""
    lines = [line.strip() for line in err.splitlines()]
    assert lines[0] == "tiny: 4 cells, run small-b"
    assert "lr is 0.5" in lines
    # a kernel that is shut down may add words of its own to stderr, in brackets too: the last line that is ours
    assert [line for line in lines if re.match(r"\[\d+/\d+\]", line)][-1].startswith("[4/4]")


def test_the_chapter_runs_on_this_interpreter(write_chapter):
    write_chapter("import sys\nprint(sys.executable)")
    assert stream_text(runner.run_chapter("tiny", progress=False)).strip() == sys.executable


def test_a_failing_cell_is_named_and_what_came_before_is_kept(write_chapter):
    write_chapter("print('before')", "# divide\nshare = 1 / 0")
    with pytest.raises(ChapterError, match=r"begins `share = 1 / 0` with ZeroDivisionError.*notebook\.ipynb"):
        runner.run_chapter("tiny", progress=False)
    assert stream_text(paths.runs_dir() / "tiny/small/notebook.ipynb").startswith("before")


def test_nothing_runs_when_a_parameter_is_wrong(write_chapter):
    write_chapter()
    with pytest.raises(ParameterError):
        runner.run_chapter("tiny", overrides={"epochz": 3})
    assert not paths.runs_dir().exists()


def test_one_run_has_one_runner(write_chapter):
    write_chapter()
    with (
        locked(paths.runs_dir() / "tiny/small/runner.lock", "test"),
        pytest.raises(ResultsError, match="tiny/small is in use"),
    ):
        runner.run_chapter("tiny", progress=False)


def test_the_kernel_dies_with_a_killed_runner(write_chapter, tmp_path):
    write_chapter(f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)")
    killed = subprocess.Popen([sys.executable, "-c", RUN_TINY], stderr=subprocess.DEVNULL)
    try:
        kernel = int(wait_for(lambda: (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text()))
    finally:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    wait_for(lambda: not alive(kernel))


def wait_for(condition, seconds=180):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return value


def alive(pid):
    """Whether a process still works; one that only waits to be collected does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] != "Z"


def papermill_without_us(folder, parameters):
    """What `papermill in.ipynb out.ipynb -f parameters.yaml` does."""
    nbformat.write(runner.read_chapter("tiny"), folder / "in.ipynb")
    papermill.execute_notebook(folder / "in.ipynb", folder / "out.ipynb", parameters, progress_bar=False)


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [({"epochz": 3}, "no parameter epochz"), ({"epochs": 1.5}, "epochs must be of type int")],
)
def test_plain_papermill_stops_at_a_wrong_parameter_too(write_chapter, tmp_path, parameters, sentence):
    write_chapter("from lookalike.results import start_run\nrun = start_run('tiny', globals())")
    with pytest.raises(papermill.PapermillExecutionError, match=sentence):
        papermill_without_us(tmp_path, parameters)


def test_plain_papermill_takes_the_scales_file(write_chapter, tmp_path):
    write_chapter("from lookalike.results import start_run\nrun = start_run('tiny', globals())\nrun.save()")
    papermill_without_us(tmp_path, runner.scale_parameters("tiny", "medium"))
    record = json.loads((paths.runs_dir() / "tiny/medium/run.json").read_text())
    assert record["finished"]
    assert record["changed"] == {}
    assert record["parameters"]["epochs"] == 30


def test_the_small_run_for_the_pages_is_whole_and_shows_no_place(write_chapter, tmp_path):
    """What make book does with each chapter: conftest.py hands it to nbmake."""
    chapter = write_chapter(
        "from lookalike.results import start_run\nrun = start_run('tiny', globals())",
        "import os\nprint(os.environ['LOOKALIKE_RESUME'], run.folder)",
        "run.folder",
        "run.save()",
    )
    command = [sys.executable, "-m", "pytest", "--nbmake", "-q", "-p", "conftest", "-c", "pyproject.toml", chapter]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=os.environ | {"LOOKALIKE_RESUME": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    notebook = paths.small_notebook("tiny")
    assert "0 runs/tiny/small\n" in stream_text(notebook)
    assert str(tmp_path) not in notebook.read_text()
    record = json.loads(notebook.with_suffix(".json").read_text())
    assert record["finished"]
    assert record["resumed"] is False
