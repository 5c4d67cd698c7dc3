"""The paper's number, ours, and a verdict.

A verdict may never be kinder than the evidence: a number counts as reproduced only if the run provided every
token that its row in book/reported names (the scale, the data, the weights), a claim only if its interval has
one sign.
"""

import html
import json
import math
import re
from pathlib import Path

import pandas as pd

from lookalike import paths
from lookalike.files import ResultsError, read_json
from lookalike.runner import SCALES

KEY = re.compile(r"[a-z0-9_.-]+(/[a-z0-9_.-]+)*")
TOKEN = re.compile(r"full|[a-z_]+:[A-Za-z0-9_.+/-]+")
COLUMNS = ("key", "value", "spread", "tolerance", "where", "what", "needs", "stand_in", "claim")
SCHEMA = 1  # of run.json


# --- what is compared ---------------------------------------------------------------------------------------


def load_reported(chapter: str) -> pd.DataFrame:
    """The paper's numbers and claims: the columns of book/reported/<chapter>.csv.

    value, spread and tolerance are floats (NaN where empty), the others text; value_text is the value as the
    paper prints it. A row that could not be judged later is refused now.
    """
    path = paths.reported_dir() / f"{chapter}.csv"
    if not path.exists():
        raise ResultsError(f"There are no reported numbers for {chapter}: book/reported/{path.name} does not exist.")
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    if tuple(table.columns) != COLUMNS:
        raise ResultsError(f"{path.name} must have the columns {','.join(COLUMNS)}; it has {','.join(table.columns)}.")
    for line, row in enumerate(table.to_dict("records"), start=2):
        complaint = _complaint(row)
        if complaint:
            raise ResultsError(f"{path.name}, line {line} ({row['key']}): {complaint}.")
    repeated = table["key"][table["key"].duplicated()]
    if len(repeated):
        raise ResultsError(f"{path.name} has the key {repeated.iloc[0]} twice.")
    table["value_text"] = table["value"]
    for column in ("value", "spread", "tolerance"):
        table[column] = [float(text or "nan") for text in table[column]]
    return table


def _complaint(row: dict[str, str]) -> str | None:
    """What is wrong with a row of text cells, or None."""
    numbers = {name: _finite(row[name]) for name in ("value", "spread", "tolerance") if row[name]}
    if not KEY.fullmatch(row["key"]):
        return "a key is lower case words with slashes between"
    if not row["where"] or not row["what"]:
        return "where and what must say what the number is"
    if None in numbers.values():
        return "value, spread and tolerance must be finite numbers"
    if min(numbers.get("spread", 0), numbers.get("tolerance", 0)) < 0:
        return "spread and tolerance cannot be negative"
    unknown = [token for token in row["needs"].split() if not TOKEN.fullmatch(token)]
    if unknown:
        return f"{unknown[0]!r} is not a need; write full, data:mnist, weights:inception"
    if row["key"].startswith("claim/") != bool(row["claim"]):
        return "a claim has its sentence in the column claim and a key that begins with claim/"
    if row["claim"]:
        return "a claim has no value, spread, tolerance or stand_in" if numbers or row["stand_in"] else None
    if "value" not in numbers:
        return "a row needs a value or a claim"
    if len(numbers) == 1:
        return "a value needs a spread or a tolerance to be judged by"
    if row["stand_in"] and (row["stand_in"] == row["key"] or not KEY.fullmatch(row["stand_in"])):
        return "stand_in must be another key"
    return None


def _finite(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def load_run(path: Path) -> dict:
    """The record of a run, from run.json or a kept file."""
    run = read_json(path)
    if run.get("schema") != SCHEMA:
        raise ResultsError(f"{path} is not a run record of this version (schema {run.get('schema')}, not {SCHEMA}).")
    return run


def kept_runs(chapter: str) -> dict[str, dict]:
    """The records of the kept runs by scale, the largest scale first."""
    files = {scale: paths.results_dir() / chapter / f"{scale}.json" for scale in reversed(SCALES)}
    return {scale: load_run(path) for scale, path in files.items() if path.exists()}


# --- the verdict --------------------------------------------------------------------------------------------


def verdict(row: dict, run: dict) -> str:
    """What a run's record says about a row of load_reported, with a reason after a colon where one helps.

    Numbers: reproduced, not reproduced, not comparable, not run. Claims: same direction, not reproduced,
    undecided, not run; a claim whose needs are missing keeps its direction and says where it was seen.
    """
    metric = run["metrics"].get(row["key"])
    missing = missing_needs(row["needs"], run)
    if metric is None:
        return "not run" if _stand_in(row, run) is None else f"not comparable: shown is {_last(row['stand_in'])}"
    if row["claim"]:
        return _claim_verdict(metric) + (_at_scale(missing, run) if missing else "")
    if metric["value"] is None:
        return f"not comparable: {metric['note']}"
    if missing:
        return f"not comparable: {'; '.join(_reasons(missing, run))}"
    allowed = max(0.0 if math.isnan(margin) else margin for margin in (row["spread"], row["tolerance"]))
    # the margin is a decimal of the paper's: 0.3 - 0.2 is 0.1 on paper, and a little less or more in binary
    near = abs(metric["value"] - row["value"]) <= allowed + 1e-9 * max(abs(row["value"]), allowed)
    return "reproduced" if near else "not reproduced"


def _claim_verdict(metric: dict) -> str:
    low, high = metric["low"], metric["high"]
    if metric["value"] is None:
        return f"undecided: {metric['note']}"
    if low is None or high is None:
        return "undecided: no interval"
    if low > 0:
        return "same direction"
    if high < 0:
        return "not reproduced"
    return "undecided: the interval spans 0"


def missing_needs(needs: str, run: dict) -> dict[str, str]:
    """The tokens of a row that a run did not provide, each with the reason in words."""
    return {token: _why_missing(token, run) for token in needs.split() if token not in run["tokens"]}


def _why_missing(token: str, run: dict) -> str:
    kind, _, name = token.partition(":")
    if token == "full":
        changed = f" with other {', '.join(run['changed'])}" if run["changed"] else ""
        return f"{run['scale']} scale{changed}"
    if kind == "data":
        return _instead_of([name], run)
    if kind == "weights":
        return f"without the {name} weights"
    return f"{kind} is not {name}"


def _instead_of(names: list[str], run: dict) -> str:
    return f"{_data_names(run) or 'no recorded data'} instead of {' and '.join(names)}"


def _reasons(missing: dict[str, str], run: dict) -> list[str]:
    """The reasons in words; what is said of several data sets is said once."""
    names = [token.partition(":")[2] for token in missing if token.startswith("data:")]
    reasons = [_instead_of(names, run) if t.startswith("data:") else reason for t, reason in missing.items()]
    return list(dict.fromkeys(reasons))


def _at_scale(missing: dict[str, str], run: dict) -> str:
    others = _reasons({token: reason for token, reason in missing.items() if token != "full"}, run)
    return " (at " + "; ".join([missing.get("full", f"{run['scale']} scale"), *others]) + ")"


def _stand_in(row: dict, run: dict) -> dict | None:
    return run["metrics"].get(row["stand_in"]) if row["stand_in"] else None


def _data_names(run: dict, key: str = "") -> str:
    """The data of a run in words; only those that a metric key names, if it names any."""
    names = list(dict.fromkeys(data["name"] for data in run["data"]))
    return " and ".join([name for name in names if name in key.split("/")] or names)


# --- the table ----------------------------------------------------------------------------------------------


def comparison(chapter: str, run: dict | None = None, prefix: str = "") -> pd.DataFrame:
    """One line per reported row whose key begins with `prefix`, in the order of the CSV.

    Text for people: where, what, paper, kept_run, this_page, verdict, kept_verdict. For machines: key,
    paper_value, kept_value, kept_scale, value (NaN where there is none). `verdict` is on `run`, a record as
    in run.json; without one it is on the kept run, of the largest scale that has the number.
    """
    reported = load_reported(chapter)
    kept = {scale: record for scale, record in kept_runs(chapter).items() if not run or record["id"] != run["id"]}
    chosen = reported[reported["key"].str.startswith(prefix)]
    if prefix and not len(chosen):
        raise ResultsError(f"No reported key of {chapter} begins with {prefix!r}; one is {reported['key'].iloc[0]}.")
    lines = [_line(row, run, _best(row, kept)) for row in chosen.to_dict("records")]
    return pd.DataFrame(lines)


def _best(row: dict, kept: dict[str, dict]) -> dict | None:
    return next((run for run in kept.values() if row["key"] in run["metrics"] or _stand_in(row, run)), None)


def _line(row: dict, run: dict | None, kept: dict | None) -> dict:
    kept_verdict = verdict(row, kept) if kept else "not run"
    return {
        "key": row["key"],
        "where": row["where"],
        "what": row["claim"] or row["what"],
        "paper": _claim_name(row["key"]) if row["claim"] else _pm(row["value_text"], row["spread"], row["value_text"]),
        "kept_run": f"{_shown(row, kept)} ({_scale_and_data(row, kept)})" if kept else "",
        "this_page": _shown(row, run) if run else "",
        "verdict": verdict(row, run) if run else kept_verdict,
        "kept_verdict": kept_verdict,
        "paper_value": row["value"],
        "kept_value": _value(row, kept),
        "kept_scale": kept["scale"] if kept else "",
        "value": _value(row, run),
    }


def _claim_name(key: str) -> str:
    """As pages and ledgers call it: claim/c1a_on_mnist is "claim C1a", claim/noise is "claim"."""
    found = re.match(r"claim/c(\d+[a-z]?)(?=_|$)", key)
    return f"claim C{found[1]}" if found else "claim"


def _scale_and_data(row: dict, run: dict) -> str:
    return ", ".join(filter(None, [run["scale"], _data_names(run, row["key"])]))


def _value(row: dict, run: dict | None) -> float:
    metric = run["metrics"].get(row["key"]) if run else None
    return math.nan if metric is None or metric["value"] is None else metric["value"]


def _shown(row: dict, run: dict) -> str:
    """Our number with its interval or spread; a stand-in with its own metric's name."""
    metric, like, name = run["metrics"].get(row["key"]), row["value_text"], ""
    if metric is None:
        metric, like, name = _stand_in(row, run), "", f"{_last(row['stand_in'])} "
    if metric is None:
        return ""
    if metric["value"] is None:
        return f"none: {metric['note']}"
    if metric["low"] is not None:
        text = "{} [{}, {}]".format(*(_digits(metric[name], like) for name in ("value", "low", "high")))
    else:
        text = _pm(_digits(metric["value"], like), metric["spread"], like)
    return name + text + (f", n = {metric['n']}" if metric["n"] else "")


def _pm(value: str, spread: float | None, like: str) -> str:
    return value if spread is None or math.isnan(spread) else f"{value} ± {_digits(spread, like)}"


def _digits(value: float, like: str) -> str:
    """With as many decimals as the paper prints, or three significant digits; no effect is rounded away."""
    decimals = re.fullmatch(r"[+-]?\d+(?:\.(\d*))?", like)
    text = f"{value:.{len(decimals[1] or '')}f}" if decimals else f"{value:.3g}"
    return f"{value:.2g}" if value and not float(text) else text


def _last(key: str) -> str:
    return key.rsplit("/", 1)[-1]


STYLE = """<style>
.lookalike-comparison { font-size: .85em; line-height: 1.4; }
.lookalike-comparison td, .lookalike-comparison th { text-align: left !important; vertical-align: top; }
.lookalike-comparison td, .lookalike-comparison th { padding: .3em .5em; }
.lookalike-comparison td:last-child { min-width: 11em; }
.lookalike-verdict { padding: 0 .4em; border-left: .3em solid; border-radius: .2em; }
.lookalike-good { border-color: rgb(46 160 67); background: rgb(46 160 67 / 15%); }
.lookalike-bad { border-color: rgb(218 54 51); background: rgb(218 54 51 / 15%); }
.lookalike-open { border-color: rgb(187 128 9); background: rgb(187 128 9 / 15%); }
.lookalike-none { border-color: rgb(128 128 128); }
.lookalike-notes { font-size: .85em; line-height: 1.4; }
</style>"""
CLASSES = {"reproduced": "good", "same direction": "good", "not reproduced": "bad", "undecided": "open"}
LONGEST_REASON = 32  # letters that stay in their cell; longer reasons stand once, below the table


class Comparison:
    """A comparison as a page shows it; `table` is the DataFrame underneath."""

    HEADINGS = ("where", "what", "paper", "kept run", "this page", "verdict")

    def __init__(self, table: pd.DataFrame, caption: str):
        self.table, self.caption = table, caption

    def _cells(self) -> pd.DataFrame:
        cells = self.table[["where", "what", "paper", "kept_run", "this_page", "verdict"]]
        return cells.set_axis(self.HEADINGS, axis=1)

    def __repr__(self) -> str:
        verdicts = [" | kept: ".join(_verdicts(row)) for row in self.table.to_dict("records")]
        return f"{self._cells().assign(verdict=verdicts).to_string(index=False)}\n{self.caption}"

    def _repr_html_(self) -> str:
        notes = Notes()
        rows = self.table.to_dict("records")
        verdicts = ["<br>kept: ".join(_badge(*notes.split(text)) for text in _verdicts(row)) for row in rows]
        cells = self._cells().map(html.escape).assign(verdict=verdicts)
        if not self.table["kept_run"].any():
            cells = cells.drop(columns="kept run")
        # the theme gives tables of class dataframe its dark colours
        table = cells.to_html(index=False, escape=False, border=0, classes="lookalike-comparison")
        return f"{STYLE}{table}{notes.html()}<p>{html.escape(self.caption)}</p>"


class Notes:
    """Long reasons of verdicts, each said once under a mark of its own: a, b, ... z, aa."""

    def __init__(self):
        self.marks: dict[str, str] = {}

    def split(self, verdict: str) -> tuple[str, str]:
        """A verdict as its cell shows it, and the marks of the notes that it refers to (or "")."""
        short, where = re.fullmatch(r"(.*?)(?: \((at .*)\))?", verdict, re.DOTALL).groups()
        kind, _, why = short.partition(": ")
        if len(why) > LONGEST_REASON:
            return kind, " ".join(self._mark(reason) for reason in (why, where) if reason)
        return short, self._mark(where) if where else ""

    def _mark(self, reason: str) -> str:
        return self.marks.setdefault(reason, _letters(len(self.marks)))

    def html(self) -> str:
        lines = [f"<sup>{mark}</sup> {html.escape(reason)}" for reason, mark in self.marks.items()]
        return f'<p class="lookalike-notes">{"<br>".join(lines)}</p>' if lines else ""


def _letters(number: int) -> str:
    """0 is a, 25 is z, 26 is aa: as spreadsheets count their columns."""
    rest, last = divmod(number, 26)
    return (_letters(rest - 1) if rest else "") + chr(ord("a") + last)


def _verdicts(row: dict) -> list[str]:
    """The verdict on this page, and the kept run's where it has another one."""
    kept = row["kept_verdict"]
    return [row["verdict"]] if kept in ("not run", row["verdict"]) else [row["verdict"], kept]


def _badge(text: str, marks: str = "") -> str:
    kind = CLASSES.get(re.split(r": | \(", text)[0], "none")
    badge = f'<span class="lookalike-verdict lookalike-{kind}">{html.escape(text)}</span>'
    return badge + (f"&nbsp;<sup>{marks}</sup>" if marks else "")


def compared(chapter: str, run: dict, prefix: str = "") -> Comparison:
    """The table that a page shows of a run's record: compared("pgan", record, "table_s1/") is a part of it."""
    kept = [describe_run(record) for record in kept_runs(chapter).values() if record["id"] != run["id"]]
    caption = f"This page: {describe_run(run)}." + "".join(f" Kept: {line}." for line in kept)
    return Comparison(comparison(chapter, run, prefix), caption)


def describe_run(run: dict) -> str:
    """A run in a line: which one it is, from which code, and what a reader should know before trusting it."""
    origin = run["provenance"]
    commit = f"commit {origin['commit'][:10]}" if origin["commit"] else "code outside git"
    commit += " with changes" if origin["dirty"] else ""
    text = ", ".join(filter(None, [f"{run['run_name']} run {run['id']}", commit, _data_names(run), origin["device"]]))
    if run["changed"]:
        text += f", other than its scale: {json.dumps(run['changed'])}"
    others = [name for name, stage in run["stages"].items() if stage["libraries"] != [origin["library"]]]
    if not others:
        return text
    again = [name for kind in run.get("rechecked", {}).get("kinds", []) if not kind["differ"] for name in kind["again"]]
    text += f", {len(others)} of {len(run['stages'])} stages made by other library code"
    return text + (f" ({len(again)} of them made again: the same)" if again else "")
