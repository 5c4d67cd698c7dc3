"""Stages of a resumed run that older code made: a sample of each kind is made again, and must come out the same.

A run that takes an hour is resumed after the library has changed, and its finished stages stay as they are. Whether the
change touched them is not read off a diff but tried: stages are seeded, so equal code gives equal bits on one machine.
`keep` takes such a run only after this.
"""

import functools
import importlib
import tempfile
from pathlib import Path

import numpy as np

from lookalike import paths
from lookalike.compare import load_run
from lookalike.files import ResultsError, read_json, write_json
from lookalike.provenance import library_digest
from lookalike.stages import Stage, execute_all


def recheck(chapter: str, run_name: str = "medium", sample: int = 3, workers: int = 2) -> list[dict]:
    """Makes `sample` stages of every kind that other code made again; one row per kind, also stored in run.json.

    A kind is a function and the code that ran it; its stages are taken evenly from their names in order. A row says
    "function", "libraries", "stages" (how many there are), "again" (names) and "differ" (those with another result or
    other arrays). What a stage read is read again from the run; features that are cached there are not extracted anew.
    """
    folder = paths.runs_dir() / chapter / run_name
    if not (folder / "run.json").is_file():
        raise ResultsError(f"There is no run {chapter}/{run_name} to recheck; make it with: lookalike run {chapter}.")
    if sample < 1:
        raise ResultsError(f"sample must be at least 1 stage of each kind, not {sample}.")
    run, rows = load_run(folder / "run.json"), []
    for (function, libraries), names in kinds(run, folder).items():
        chosen = [names[i] for i in np.unique(np.linspace(0, len(names) - 1, sample).round().astype(int))]
        differ = _differing(folder, chosen, run["seed"], workers)
        rows.append(
            {
                "function": function,
                "libraries": list(libraries),
                "stages": len(names),
                "again": chosen,
                "differ": differ,
            }
        )
    write_json(folder / "run.json", run | {"rechecked": {"library": library_digest(), "kinds": rows}})
    return rows


def kinds(run: dict, folder: Path) -> dict[tuple, list[str]]:
    """Names of the run's stages that other code than the run's own made, by function and that code."""
    found = {}
    for name in sorted(run["stages"]):
        libraries = tuple(run["stages"][name]["libraries"])
        if libraries != (run["provenance"]["library"],):
            call = read_json(folder / "stages" / name / "stage.json")
            found.setdefault((f"{call['module']}.{call['function']}", libraries), []).append(name)
    return found


def unchecked(run: dict) -> int:
    """How many stages other code made of whose kind nothing was made again with the same outcome."""
    other = [s["libraries"] for s in run["stages"].values() if s["libraries"] != [run["provenance"]["library"]]]
    same = [kind for kind in run.get("rechecked", {}).get("kinds", []) if kind["again"] and not kind["differ"]]
    return len(other) - sum(kind["stages"] for kind in same)


def _differing(folder, names, seed, workers):
    """Those of the named stages that come out otherwise when made again."""
    again, differ = {}, []
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        stages = [_stage(Path(scratch), folder, name, seed) for name in names]
        execute_all(stages, workers, lambda stage, outcome: again.update({stage.name: outcome["result"]}))
        for stage in stages:
            before = folder / "stages" / stage.name
            same = again[stage.name] == read_json(before / "result.json")["result"]
            if not (same and all(_equal(path, stage.folder / path.name) for path in before.glob("*.safetensors"))):
                differ.append(stage.name)
    return differ


def _stage(scratch, folder, name, seed):
    call = read_json(folder / "stages" / name / "stage.json")
    module = importlib.import_module(call["module"])
    function = functools.reduce(getattr, call["function"].split("."), module)
    return Stage(scratch, name, function, call["settings"], seed)


def _equal(before: Path, after: Path) -> bool:
    return after.is_file() and before.read_bytes() == after.read_bytes()
