"""Stages survive kills, refuse strangers and give the same numbers however they are run."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from jupyter_client.manager import start_new_kernel
from nbclient import NotebookClient

from lookalike import files, results, stages
from lookalike.training.checkpoint import load_weights
from toy_stages import CHAPTER, count_calls, draw, fail, net, read_other, return_nothing, sleep, start, train, vanish


@pytest.fixture
def book(tmp_path, monkeypatch):
    """A project with one chapter, and the way for other processes to find it and this file."""
    (tmp_path / "book/chapters").mkdir(parents=True)
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "book/chapters/toy.md").write_text(CHAPTER)
    monkeypatch.setenv("LOOKALIKE_ROOT", str(tmp_path))
    monkeypatch.setenv("LOOKALIKE_RESUME", "0")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.delenv("LOOKALIKE_RUNS", raising=False)
    return tmp_path


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


# --- one stage ----------------------------------------------------------------------------------------------


def test_finished_stage_is_not_run_again_when_resuming(book):
    assert start().stage("a", count_calls) == {"calls": 1, "step": 1}
    assert start(resume=True).stage("a", count_calls) == {"calls": 1, "step": 1}
    assert len((book / "runs/toy/small/stages/a/calls").read_text()) == 1


def test_without_resume_everything_runs_again(book):
    start().stage("a", count_calls)
    (book / "runs/toy/small/notebook.ipynb").touch()
    run = start()
    assert not (run.folder / "stages").exists()
    assert (run.folder / "notebook.ipynb").exists()


@pytest.mark.parametrize("change", ["step", "seed", "function"])
def test_changed_stage_is_emptied_and_run_again(book, change):
    start().stage("a", count_calls)
    run = start(resume=True, seed=1 if change == "seed" else 0)
    if change == "function":
        assert "values" in run.stage("a", draw)
        assert not (run.stage_folder("a") / "calls").exists()
    else:
        assert run.stage("a", count_calls, step=2 if change == "step" else 1)["calls"] == 1


def test_unfinished_stage_goes_on_in_its_folder(book):
    run = start()
    run.stage("a", count_calls)
    (run.stage_folder("a") / "result.json").unlink()
    assert start(resume=True).stage("a", count_calls)["calls"] == 2


def test_stage_that_reads_a_changed_stage_runs_again(book):
    run = start()
    run.stage("a", count_calls)
    assert run.stage("b", read_other, other=run.stage_folder("a")) == {"step": 1}
    run = start(resume=True)
    run.stage("a", count_calls, step=2)
    assert run.stage("b", read_other, other=str(run.stage_folder("a"))) == {"step": 2}


def test_a_moved_run_is_the_same_run(book, monkeypatch):
    def stages_of(run):
        run.stage("a", count_calls)
        places = {"other": str(run.stage_folder("a")), "cache": str(run.folder / "features"), "run": run.folder}
        run.stage("b", read_other, **places)
        return {name: stage["fingerprint"] for name, stage in run.record()["stages"].items()}

    before = stages_of(start())
    assert stages_of(start("small-again")) == before
    monkeypatch.setenv("LOOKALIKE_RUNS", str(book / 'a "new" place'))
    assert stages_of(start()) == before
    (start(resume=True).stage_folder("b") / "step").touch()
    run = start(resume=True)
    assert stages_of(run) == before
    assert (run.stage_folder("b") / "step").exists()


def test_a_place_beside_the_runs_folder_counts_as_it_stands(book):
    def fingerprint(other):
        run = start()
        return stages.Stage(run.folder, "b", read_other, {"other": other(run.folder)}, 0).fingerprint

    assert fingerprint(lambda folder: f"{folder}-2/x") != fingerprint(lambda folder: f"{folder}-3/x")
    assert fingerprint(lambda folder: folder / "x") != fingerprint(lambda folder: folder / "y")


def test_random_state_depends_on_seed_and_name_alone(book):
    values = start().stage("a", draw)["values"]
    random.random()
    torch.rand(3)
    assert start("small-again").stage("a", draw)["values"] == values
    assert start("small-again").stage("b", draw)["values"] != values
    assert start("small-again", seed=1).stage("a", draw)["values"] != values


def test_chapter_draws_the_same_after_a_stage_that_ran_and_one_that_did_not(book):
    def draws(run):
        run.stage("a", draw)
        return random.random(), np.random.random(), torch.rand(()).item()  # noqa: NPY002

    assert draws(start()) == draws(start(resume=True))


@pytest.mark.parametrize("name", ["", "/a", "../a", "a/../../b", "a//b", "a/", "a b", ".a", "a/.b", "a\n"])
def test_names_that_leave_the_folder_are_refused(book, name):
    run = start()
    with pytest.raises(results.StageError, match="cannot name a stage"):
        run.stage(name, draw)
    with pytest.raises(results.StageError, match="cannot name a stage"):
        run.stage_folder(name)


def test_a_stage_within_a_stage_is_refused(book):
    run = start()
    run.stage("mnist/vae/sigma0.1", draw)
    with pytest.raises(results.StageError, match="inside the other"):
        run.stage("mnist/vae", draw)
    with pytest.raises(results.StageError, match="inside the other"):
        run.stage("mnist/vae/sigma0.1/full", draw)


def test_functions_that_a_worker_cannot_find_are_refused(book):
    def local(folder):
        return {}

    main = type(draw)(draw.__code__, {}, "draw")
    main.__module__ = "__main__"
    impostor = type(draw)(draw.__code__, {}, "draw")
    impostor.__module__ = draw.__module__
    for function in (local, lambda folder: {}, main, impostor):
        with pytest.raises(results.StageError, match="must be a function of the library"):
            start().stage("a", function)


def test_settings_and_results_must_be_json(book):
    with pytest.raises(results.StageError, match="must be JSON values or paths"):
        start().stage("a", draw, scale=torch.ones(1))
    with pytest.raises(results.StageError, match="Stage a stopped: TypeError: it must return a dict"):
        start().stage("a", return_nothing)


def test_failing_stage_is_named_and_leaves_no_result(book):
    run = start()
    with pytest.raises(results.StageError, match="Stage x/y stopped: ValueError: no images"):
        run.stage("x/y", fail)
    assert not (run.stage_folder("x/y") / "result.json").exists()
    assert run.record()["stages"] == {}


def test_damaged_result_says_so_in_a_sentence(book):
    run = start()
    run.stage("a", draw)
    (run.stage_folder("a") / "result.json").write_text('{"fingerprint": ')
    with pytest.raises(results.ResultsError, match=r"not readable JSON .* delete it and run again"):
        run.stage("a", draw)


def test_stages_of_other_code_are_noticed(book, monkeypatch, capsys):
    start().stage("a", draw)
    monkeypatch.setattr(results, "library_digest", lambda: "0" * 12)
    run = start(resume=True)
    assert "1 of 1 finished stages were made by other library code" in capsys.readouterr().out
    run._provenance["library"] = "0" * 12
    run.stage("a", draw)
    record = run.record()
    assert len(record["provenance"]["libraries"]) == 2
    assert "1 of 1 stages made by other library code" in results.describe_run(record)


# --- many stages --------------------------------------------------------------------------------------------


def test_stages_report_progress_and_log_what_they_print(book, capsys):
    run = start()
    found = run.stages(draw, {"a": {"scale": 0.0}, "b/c": {}})
    assert list(found) == ["a", "b/c"]
    assert found["a"]["values"] == [0, 0, 0]
    out = capsys.readouterr().out
    assert "[1/2] a " in out
    assert "[2/2] b/c " in out
    assert "drawing" not in out
    assert (run.folder / "logs/b/c.txt").read_text() == "drawing\n"
    start(resume=True).stages(draw, {"b/c": {}})
    assert ", kept" in capsys.readouterr().out


def test_first_failure_stops_the_other_workers(book):
    run = start()
    before = time.monotonic()
    jobs = {"slow": sleep, "bad": fail}
    todo = [stages.Stage(run.folder, name, function, {}, 0) for name, function in jobs.items()]
    with pytest.raises(results.StageError, match="Stage bad stopped: ValueError: no images"):
        stages.execute_all(todo, 2, lambda stage, outcome: None)
    assert time.monotonic() - before < 300  # it would sleep for 600
    pid = run.stage_folder("slow") / "pid"
    assert not pid.exists() or wait_until(lambda: not alive(pid.read_text()), 30)


def test_worker_that_dies_is_a_sentence(book):
    with pytest.raises(results.StageError, match="A worker died without a word"):
        start().stages(vanish, {"a": {}, "b": {}}, workers=2)


def worker_pids(run, names="ab", **kwargs):
    run.stages(draw, {name: kwargs for name in names}, workers=2)
    return {(run.stage_folder(name) / "pid").read_text() for name in names}


def test_workers_stay_for_the_next_call_and_end_with_the_run(book):
    run = start()
    first, second = worker_pids(run), worker_pids(run, "cdefgh", scale=2.0)
    assert first & second
    assert len(first | second) <= 2
    assert any(alive(pid) for pid in first)
    run.save()
    assert not any(alive(pid) for pid in first | second)


@pytest.mark.parametrize("change", ["environment", "folder"])
def test_workers_of_another_environment_are_not_used_again(book, monkeypatch, tmp_path, change):
    run = start()
    first = worker_pids(run)
    monkeypatch.setenv("LOOKALIKE_TEST", "1") if change == "environment" else monkeypatch.chdir(tmp_path)
    assert not first & worker_pids(run, "cd")
    run.save()


def test_after_a_failure_the_next_call_has_new_workers(book):
    run = start()
    first = worker_pids(run)
    with pytest.raises(results.StageError, match="no images"):
        run.stages(fail, {"bad": {}, "worse": {}}, workers=2)
    assert wait_until(lambda: not any(alive(pid) for pid in first), 30)
    assert worker_pids(run, "cd")
    run.save()


def test_workers_do_not_see_main(monkeypatch):
    main = sys.modules["__main__"]
    monkeypatch.setattr(main, "__file__", "chapter.py", raising=False)
    threads = os.environ.get("OMP_NUM_THREADS")
    with stages._spawn_settings():
        assert main.__file__ is None
        assert os.environ["OMP_NUM_THREADS"] == "1"
    assert main.__file__ == "chapter.py"
    assert os.environ.get("OMP_NUM_THREADS") == threads


def test_workers_in_a_notebook_find_what_one_process_finds(book):
    cells = [
        'seed, run_name = 0, "small"',
        "from toy_stages import draw\nfrom lookalike.results import start_run",
        'run = start_run("toy", globals())\nfound = run.stages(draw, {"a": {}, "b": {}, "c": {}}, workers=2)',
        "run.save()",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=300, startup_timeout=180, kernel_name="python3").execute()
    assert "[3/3]" in notebook.cells[2].outputs[-1].text
    in_workers = files.read_json(book / "runs/toy/small/stages/a/result.json")["result"]
    assert in_workers["threads"] == 1
    assert in_workers["values"] == start("small-here").stage("a", draw)["values"]
    assert files.read_json(book / "runs/toy/small/run.json")["peak_memory_mib"]["largest_worker"] > 50


# --- kills --------------------------------------------------------------------------------------------------


def test_workers_die_with_a_killed_kernel_and_the_next_run_gets_the_lock(book):
    manager, client = start_new_kernel(startup_timeout=180, kernel_name="python3", env=dict(os.environ))
    try:
        client.execute(
            "import os; from toy_stages import sleep, start; run = start();"
            "(run.folder / 'pid').write_text(str(os.getpid()));"
            "run.stages(sleep, {'a': {}, 'b': {}}, workers=2)"
        )
        folder = book / "runs/toy/small"
        pids = [folder / "stages/a/pid", folder / "stages/b/pid"]
        assert wait_until(lambda: all(pid.exists() and pid.read_text() for pid in pids), 180)
        os.kill(int((folder / "pid").read_text()), signal.SIGKILL)
        assert wait_until(lambda: not any(alive(pid.read_text()) for pid in pids), 30)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert start(resume=True).stage("a", draw)


@pytest.mark.parametrize("moment", ["2.1", "2.save"])
def test_killed_training_resumes_to_the_same_bits(book, moment):
    code = "from toy_stages import start, train; start().stage('net', train, epochs=4)"
    killed = subprocess.run([sys.executable, "-c", code], env=os.environ | {"KILL_AT": moment}, timeout=300)
    assert killed.returncode == -signal.SIGKILL
    resumed, whole = start(resume=True), start("small-whole")
    assert resumed.stage("net", train, epochs=4)["first"] == 2
    assert whole.stage("net", train, epochs=4)["first"] == 0
    weights = [(run.stage_folder("net") / "net.safetensors").read_bytes() for run in (resumed, whole)]
    assert weights[0] == weights[1]
    load_weights(resumed.stage_folder("net") / "net.safetensors", net())


def test_second_process_waits_for_the_lock_and_then_names_the_holder(book, monkeypatch):
    code = "import sys, time; from toy_stages import start; start(); print('held', flush=True); time.sleep(600)"
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        while "held" not in holder.stdout.readline():
            assert holder.poll() is None
        monkeypatch.setattr(files, "LOCK_WAIT", 0.3)
        with pytest.raises(results.ResultsError, match=f"toy/small is in use by process {holder.pid} .* run_name"):
            start()
        start("small-other")
        monkeypatch.setattr(files, "LOCK_WAIT", 20)
    finally:
        holder.kill()
    start()  # a lock ends with its process, however that ended


def test_stage_that_an_orphan_still_writes_is_not_emptied(book, monkeypatch):
    run = start()
    run.stage("a", count_calls)
    monkeypatch.setattr(files, "LOCK_WAIT", 0.2)
    with files.locked(run.folder / "locks/a.lock", "a"):
        with pytest.raises(results.ResultsError, match="in use"):
            start()
        with pytest.raises(results.ResultsError, match="in use"):
            start(resume=True).stage("a", count_calls, step=2)
    assert (run.stage_folder("a") / "calls").read_text() == "x"
    start()
    assert not run.stage_folder("a").exists()
