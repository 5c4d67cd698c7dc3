"""What a run of a chapter writes down, and how it gets onto a page.

    run = start_run("no_free_lunch", globals())        after the parameters cell
    run.uses(images)                                   the data behind the numbers
    run.stages(train, {"vae/seed0": {...}}, workers=2) long steps, finished once each
    run.log("table2/octmnist/vae/fid", fid)            next to where it is computed
    run.save()
    run.compare()                                      the paper's number, ours, the verdict

Everything stands in runs/<chapter>/<run_name>/; `keep` copies what belongs in the book.
"""

import ast
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from lookalike import paths, runner
from lookalike.compare import (
    KEY,
    SCHEMA,
    TOKEN,
    Comparison,
    compared,
    comparison,
    describe_run,
    kept_runs,
    load_reported,
    load_run,
    verdict,
)
from lookalike.files import ResultsError, hold_lock, locked, read_json, write_json
from lookalike.keep import keep
from lookalike.provenance import library_digest, peak_memory, provenance
from lookalike.stages import Stage, StageError, check_name, close_workers, execute_all, execute_one, seed_everything

__all__ = [
    "Comparison",
    "ResultsError",
    "Run",
    "StageError",
    "comparison",
    "keep",
    "kept_runs",
    "load_reported",
    "load_run",
    "start_run",
    "verdict",
]

# Parameters that name a run or share out its work, and leave what it measures alone.
WEIGHTS = ("inception_weights", "alexnet_weights", "lpips_weights", "extractor_weights")  # places of files
NEUTRAL = {"run_name", "seed", "workers", "device", *WEIGHTS}


def start_run(chapter: str, namespace: dict) -> "Run":
    """Begins a run of a chapter with the values that its parameters have in `namespace`, the globals().

    Checks them, locks runs/<chapter>/<run_name>, seeds python, numpy and torch, and writes down where the
    numbers will come from. Stages of an earlier run of that name go, unless LOOKALIKE_RESUME is 1.
    """
    injected = _injected_names(namespace)
    runner.check_parameters(chapter, {name: namespace[name] for name in injected})
    declared = runner.chapter_parameters(chapter)
    unset = [name for name in declared if name not in namespace]
    if unset:
        raise ResultsError(f"{unset[0]} has no value yet: run the parameters cell before start_run.")
    parameters = {name: namespace[name] for name in declared}
    runner.check_parameters(chapter, parameters)
    for name in ("seed", "run_name"):
        if name not in parameters:
            raise ResultsError(f"The parameters cell of {chapter} must set {name}.")
    return Run(chapter, parameters, resume=os.environ.get("LOOKALIKE_RESUME") == "1")


def _injected_names(namespace: dict) -> list[str]:
    """What papermill's injected cell assigned; papermill itself lets a misspelt name pass."""
    names = []
    for source in namespace.get("In", []):  # IPython's history
        if source.startswith("# Parameters"):
            assigned = [node for node in ast.parse(source).body if isinstance(node, ast.Assign)]
            names += [target.id for node in assigned for target in node.targets]
    return names


class Run:
    """One execution of a chapter: `folder`, `scale`, `parameters`, and what writes down its results."""

    def __init__(self, chapter: str, parameters: dict, resume: bool = False):
        self.chapter, self.parameters = chapter, parameters
        self.run_name = parameters["run_name"]
        self.scale = self.run_name.partition("-")[0]
        if not re.fullmatch(r"(small|medium|full)(-[A-Za-z0-9_.+=-]+)?", self.run_name):
            raise ResultsError(
                f"run_name {self.run_name!r} must be small, medium or full, or have a suffix: small-test."
            )
        self.folder = paths.runs_dir() / chapter / self.run_name
        self._changed = _changed_settings(chapter, self.scale, parameters)
        hold_lock(self.folder / "run.lock", f"The run {chapter}/{self.run_name}")
        self._id = secrets.token_hex(4)
        self._data, self._metrics, self._stages = {}, {}, {}
        self._tokens = {"full"} if self.scale == "full" and not self._changed else set()
        self._provenance = provenance()
        self._started = datetime.now(UTC)
        self._clock = time.monotonic()
        self._resumed = resume
        if not resume:
            self._empty_stages()
        seed_everything(parameters["seed"])
        write_json(self.folder / "run.json", self.record())
        print(f"{chapter}: {describe_run(self.record())}")
        self._warn_of_other_code()

    def _empty_stages(self) -> None:
        for lock in sorted((self.folder / "locks").glob("*.lock")):
            with locked(lock, f"A stage of {self.chapter}/{self.run_name}"):
                pass  # nobody writes there any more: the run's lock keeps newcomers out
        for name in ("stages", "logs"):
            if (self.folder / name).exists():
                shutil.rmtree(self.folder / name)

    def _warn_of_other_code(self) -> None:
        results = [read_json(path) for path in (self.folder / "stages").rglob("result.json")]
        other = [result for result in results if result.get("libraries") != [library_digest()]]
        if other:
            print(f"Note: {len(other)} of {len(results)} finished stages were made by other library code.")

    # --- data and numbers ---

    def uses(self, image_set) -> None:
        """Records data behind the run's numbers; rows of the paper that need data:<name> then have it."""
        entry = {
            "name": image_set.name,
            "split": image_set.split,
            "images": len(image_set),
            "content_hash": image_set.content_hash,
            "origin": image_set.origin,
            "licence": image_set.licence,
            "restricted": image_set.restricted,
            "stand_in_for": image_set.stand_in_for,
        }
        self._data[entry["name"], entry["split"], entry["content_hash"]] = entry
        self._tokens.add(f"data:{entry['name']}")

    def provides(self, *tokens: str) -> None:
        """Says that this run has what rows of the paper need, like weights:inception or epochs:10000."""
        for token in tokens:
            if not TOKEN.fullmatch(token) or token == "full" or token.startswith("data:"):
                raise ResultsError(
                    f"{token!r} cannot be provided by hand: tokens look like weights:inception; `full` comes "
                    "from the run's parameters and data:<name> from run.uses."
                )
        self._tokens.update(tokens)

    def log(
        self,
        key: str,
        value: float,
        low: float | None = None,
        high: float | None = None,
        n: int | None = None,
        spread: float | None = None,
        note: str = "",
    ) -> None:
        """Writes down a number as table/data/model/metric, with its interval or spread and its count.

        A claim of the paper (claim/...) is an effect that is positive where the claim holds. A value that
        could not be computed is NaN, and `note` says why.
        """
        if not KEY.fullmatch(key):
            raise ResultsError(f"{key!r} is not a key: use lower case words like table2/octmnist/vae/fid.")
        numbers = {"value": value, "low": low, "high": high, "spread": spread}
        entry = {name: None if number is None else _number(key, name, number) for name, number in numbers.items()}
        if math.isnan(entry["value"]):
            if not note:
                raise ResultsError(f"{key} is not a number; say why in `note`, or do not log it.")
            entry["value"] = None
        if (low is None) != (high is None) or (low is not None and entry["low"] > entry["high"]):
            raise ResultsError(f"{key}: an interval needs both ends, the lower one first, not {low} to {high}.")
        if (spread is not None and entry["spread"] < 0) or (n is not None and n < 1):
            raise ResultsError(f"{key}: spread {spread} or n {n} cannot be: neither is negative, n counts from 1.")
        entry |= {"n": None if n is None else int(n), "note": note}
        if self._metrics.setdefault(key, entry) != entry:
            raise ResultsError(f"{key} was logged as {self._metrics[key]} and now comes {entry}: one key, one number.")

    # --- stages ---

    def stage_folder(self, name: str) -> Path:
        """Where the stage of that name keeps its files."""
        check_name(name)
        return self.folder / "stages" / name

    def stage(self, name: str, function: Callable[..., dict], **kwargs) -> dict:
        """function(folder, **kwargs) -> dict, run once: the second time its result comes from disk.

        The function is the library's, the result JSON, the settings JSON or paths. Its random state depends
        on the run's seed and the stage's name alone; the chapter's own is the same after it, run or not.
        """
        stage = self._stage(name, function, kwargs)
        return self._note(stage, stage.finished() or execute_one(stage))

    def stages(self, function: Callable[..., dict], jobs: dict[str, dict], workers: int = 1) -> dict[str, dict]:
        """The same for many, name -> kwargs to name -> result, on `workers` processes of one thread each.

        One line per finished stage; what the functions print goes to logs/ in the run's folder. The first
        failure stops the rest; what was finished stays finished.
        """
        return self.side_by_side({name: (function, kwargs) for name, kwargs in jobs.items()}, workers)

    def side_by_side(self, jobs: dict[str, tuple[Callable[..., dict], dict]], workers: int = 1) -> dict[str, dict]:
        """`stages` of several functions, name -> (function, kwargs), none of which reads another's folder."""
        stages = [self._stage(name, function, kwargs) for name, (function, kwargs) in jobs.items()]
        results = {}

        def finished(stage: Stage, outcome: dict, how: str = "") -> None:
            results[stage.name] = self._note(stage, outcome)
            print(f"[{len(results)}/{len(stages)}] {stage.name} {outcome['seconds']:.1f} s{how}", flush=True)

        for stage in stages:
            if outcome := stage.finished():
                finished(stage, outcome, ", kept")
        execute_all([stage for stage in stages if stage.name not in results], workers, finished)
        return {name: results[name] for name in jobs}

    def _stage(self, name: str, function: Callable[..., dict], kwargs: dict) -> Stage:
        stage = Stage(self.folder, name, function, kwargs, self.parameters["seed"])
        names = self._stages.keys()
        nested = [n for n in names if n.startswith(f"{name}/") or name.startswith(f"{n}/")]
        if nested:
            raise StageError(f"Stage {name} and stage {nested[0]} cannot have one folder inside the other's.")
        self._stages.setdefault(name, None)
        return stage

    def _note(self, stage: Stage, outcome: dict) -> dict:
        self._stages[stage.name] = {key: outcome[key] for key in ("fingerprint", "seconds", "libraries")}
        return outcome["result"]

    # --- what comes out ---

    def record(self, finished: bool = False) -> dict:
        """Everything known about the run by now, as it stands in run.json."""
        stages = {name: stage for name, stage in self._stages.items() if stage}
        libraries = {library for stage in stages.values() for library in stage["libraries"]}
        return {
            "schema": SCHEMA,
            "id": self._id,
            "chapter": self.chapter,
            "run_name": self.run_name,
            "scale": self.scale,
            "finished": finished,
            "started": self._started.isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - self._clock, 1),
            "peak_memory_mib": peak_memory(),
            "resumed": self._resumed,
            "parameters": self.parameters,
            "changed": self._changed,
            "seed": self.parameters["seed"],
            "data": list(self._data.values()),
            "tokens": sorted(self._tokens),
            "metrics": self._metrics,
            "stages": stages,
            "provenance": self._provenance | {"libraries": sorted({self._provenance["library"], *libraries})},
        }

    def save(self) -> None:
        """Writes run.json as finished; the run's last word."""
        close_workers()
        record = self.record(finished=True)
        write_json(self.folder / "run.json", record)
        count, seconds = len(self._metrics), record["seconds"]
        print(f"{self.chapter}: {count} numbers of run {self._id} saved after {seconds:.0f} s")

    def compare(self, prefix: str = "") -> Comparison:
        """The table of a page: where in the paper, its number, the kept run's, this page's, the verdict.

        `prefix` shows a part of it: compare("table1/").
        """
        return compared(self.chapter, self.record(), prefix)


def _changed_settings(chapter: str, scale: str, parameters: dict) -> dict:
    """The parameters in which a run leaves its scale, with their values."""
    defaults = {name: default for name, (_, default) in runner.chapter_parameters(chapter).items()}
    scaled = defaults | runner.scale_parameters(chapter, scale)
    return {name: value for name, value in parameters.items() if name not in NEUTRAL and value != scaled[name]}


def _number(key: str, name: str, number) -> float:
    number = number.item() if hasattr(number, "item") else number
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise ResultsError(f"{key}: {name} must be a number, not {number!r}.")
    if math.isinf(number) or (math.isnan(number) and name != "value"):
        raise ResultsError(f"{key}: {name} is {number}; only finite numbers can be compared.")
    return float(number)
