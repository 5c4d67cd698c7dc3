"""Audits of a chapter's checkpoints, and the page that sets accounted and audited epsilon side by side.

A stage whose function is `train_x` is audited by `audit_x` of the same module, with the settings that the stage was
called with. Results lie beside the run, runs/<chapter>/<run>/audit/, and, once kept, in book/results/audits.json.
"""

import importlib
from datetime import UTC, datetime

from lookalike import paths
from lookalike.compare import load_run
from lookalike.files import ResultsError, read_json, write_json
from lookalike.provenance import provenance

SHORT = (
    "what",
    "audit",
    "unit",
    "mode",
    "steps",
    "delta",
    "accounted",
    "accountant",
    "lower",
    "if_gaussian",
    "contradiction",
)


def self_test(seed=0, keep=False):
    """{"stock": {"accounted", "lower"}, "ours": ...} of `audit.self_test`."""
    from lookalike.privacy import audit

    document = _begun(keep) | {"seed": seed, "records": audit.RECORDS, "delta": audit.DELTA}
    found = audit.self_test(seed=seed)
    if keep:
        _keep("self-test", document | {"engines": found})
    return found


def audit_stages(chapter, run_name, stages, steps, canaries, seed=0, keep=False):
    """One row or more per stage, as `Bracket.row` gives them; written beside the run as JSON."""
    folder = paths.runs_dir() / chapter / run_name
    if not (folder / "run.json").is_file():
        raise ResultsError(f"There is no run {chapter}/{run_name}; make it with: lookalike run {chapter}.")
    private = _private_stages(folder)
    if not stages or not set(stages) <= private.keys():
        raise ResultsError(
            f"Name private trainings of {chapter}/{run_name} with --stage: {', '.join(private) or 'none'}."
        )
    run, rows = load_run(folder / "run.json"), []
    for name in stages:
        document = _begun(keep) | {"chapter": chapter, "run": run["id"], "stage": name, "canaries": canaries}
        document |= {"scale": run["scale"], "changed": run["changed"], "seed": seed}
        document["rows"] = _audit(folder / "stages" / name, private[name], steps, canaries, seed)
        write_json(folder / "audit" / f"{name.replace('/', '~')}.json", document)
        if keep:
            _keep(f"{chapter}/{run_name}/{name}", document)
        rows += document["rows"]
    return rows


def short(rows):
    """The columns that a terminal shows, numbers rounded as far as they mean something."""
    return [{key: _rounded(row[key]) for key in SHORT} for row in rows]


def kept():
    """The kept audits by name; empty if there are none."""
    path = _path()
    return read_json(path) if path.is_file() else {}


def _audit(stage, call, steps, canaries, seed):
    return _counterpart(call)(stage, steps=steps, canaries=canaries, audit_seed=seed, **call["settings"])


def _counterpart(call):
    """The audit of a training function, None if there is none."""
    if not call.get("function", "").startswith("train_"):
        return None
    return getattr(importlib.import_module(call["module"]), call["function"].replace("train_", "audit_"), None)


def _private_stages(folder):
    """Calls by stage name, of the finished stages with noise that have an audit."""
    found = {}
    for path in sorted((folder / "stages").rglob("stage.json")):
        call, result = read_json(path), path.parent / "result.json"
        trains = result.is_file() and _counterpart(call)
        if trains and read_json(result)["result"].get("privacy"):  # `PrivateTraining.report`; None without privacy
            found[path.parent.relative_to(folder / "stages").as_posix()] = call
    return found


def _begun(keep):
    """When and by what code an audit is made; refused before any work if it could not be kept."""
    state = provenance()
    if keep and state["dirty"] is not False:
        raise ResultsError("An audit is kept only of committed code: commit and audit again.")
    return {"made": datetime.now(UTC).isoformat(timespec="seconds"), "provenance": state}


def _keep(name, document):
    write_json(_path(), dict(sorted((kept() | {name: document}).items())))


def _path():
    return paths.results_dir() / "audits.json"


def _rounded(value):
    return float(f"{value:.3g}") if isinstance(value, float) else value
