"""Tables of pages and README that nobody types: from kept runs, the papers' numbers and the data manifest.

Each function gives Markdown. `python -m lookalike.pages` (make readme) writes the README's table anew.
"""

import json
import re
from datetime import datetime

from lookalike import paths, runner
from lookalike.metrics.intervals import clopper_pearson

VERDICTS = ("reproduced", "same direction", "not reproduced", "undecided", "not comparable", "not run")
README_MARKS = ("<!-- results:start -->", "<!-- results:end -->")


def table(header: list[str], rows: list[list]) -> str:
    """A Markdown table; empty cells stay empty, a bar inside a cell stays a bar."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def title(chapter: str) -> str:
    """The first heading of a chapter."""
    text = runner.chapter_path(chapter).read_text("utf-8")
    return re.search(r"^# (.+)$", text, re.MULTILINE)[1]


def duration(seconds: float) -> str:
    """Seconds as a person says them: 41 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def day(time: str) -> str:
    """An ISO time as 3 March 2026."""
    moment = datetime.fromisoformat(time)
    return f"{moment.day} {moment:%B %Y}"


# --- the box above a chapter's settings ---------------------------------------------------------------------


def run_box(chapter: str, scale: str, record: dict) -> str:
    """Which run made a page's outputs: scale, date, seconds, device, commit, data, settings that differ."""
    defaults = {name: default for name, (_, default) in runner.chapter_parameters(chapter).items()}
    changed = {k: v for k, v in record["parameters"].items() if k != "run_name" and v != defaults[k]}
    lines = [
        f"::::{{admonition}} Every output on this page is from the {scale} run of {day(record['started'])}",
        ":class: note",
        "",
        f"It took {_took(record)} on {record['provenance']['device']} with {_commit(record)}.",
        *([_SMALL_WARNING] if scale == "small" else []),
        "",
        *_data_lines(record),
        *(_settings(scale, changed, defaults) if changed else []),
        "::::",
    ]
    return "\n".join(lines)


_SMALL_WARNING = "It shows that everything runs; at this scale the numbers say nothing about the paper."


def _took(record: dict) -> str:
    """Seconds of the run; a resumed one took longer than its last part."""
    text = duration(record["seconds"])
    if record["resumed"]:
        stages = sum(stage["seconds"] for stage in record["stages"].values())
        text += f" after a resume (all its stages together {duration(stages)})"
    return text


def _commit(record: dict) -> str:
    commit, dirty = record["provenance"]["commit"], record["provenance"]["dirty"]
    if commit is None:
        text = "code outside version control"
    else:
        text = f"the code of commit `{commit[:10]}`" + (" and changes that were not committed" if dirty else "")
    mixed = len(record["provenance"]["libraries"]) > 1
    return text + (" and stages made by other library code" if mixed else "")


def _data_lines(record: dict) -> list[str]:
    """One list item per data set, with its splits; a stand-in is named where it stands."""
    splits = {}
    for data in record["data"]:
        splits.setdefault(data["name"], {})[data["split"]] = data
    return [_data_line(name, parts) for name, parts in splits.items()]


def _data_line(name: str, parts: dict[str, dict]) -> str:
    data = next(iter(parts.values()))
    text = f"- data: {name}, {' and '.join(parts)} ({_ORIGINS[data['origin']]}; {data['licence']})"
    return text + (f", **in place of {data['stand_in_for']}**" if data["stand_in_for"] else "")


_ORIGINS = {
    "real": "real images",
    "embedded": "real images from an installed package",
    "phantom": "images made by a program",
    "synthetic": "images made by somebody's generator",
}


def _settings(scale: str, changed: dict, defaults: dict) -> list[str]:
    rows = [[f"`{k}`", f"`{json.dumps(defaults[k])}`", f"`{json.dumps(v)}`"] for k, v in changed.items()]
    lines = table(["setting", "the cell below (small)", f"this page ({scale} run)"], rows).splitlines()
    return [
        "",
        f":::{{dropdown}} Settings of the {scale} run that differ from the cell below",
        ":open:",
        "",
        *lines,
        ":::",
    ]


# --- tables over all chapters -------------------------------------------------------------------------------


def chapter_rows() -> list[dict]:
    """For `lookalike list`: one row per chapter."""
    from lookalike import compare

    return [
        {
            "chapter": chapter,
            "title": title(chapter),
            "scales": ["small", *(s for s in runner.SCALES[1:] if runner.scale_file(chapter, s).is_file())],
            "kept": list(compare.kept_runs(chapter)),
        }
        for chapter in runner.chapter_names()
    ]


def comparison_rows(chapter: str, run_name: str = "") -> list[dict]:
    """For `lookalike compare`: the paper's numbers, the kept run's, the named run's, and the verdict."""
    from lookalike import compare

    runner.chapter_path(chapter)
    run = compare.load_run(paths.runs_dir() / chapter / run_name / "run.json") if run_name else None
    columns = ["where", "what", "paper", "kept_run", "verdict"]
    if run:
        columns.insert(4, "this_page")
    rows = compare.comparison(chapter, run)[columns]
    return rows.rename(columns={"this_page": run_name}).to_dict("records")


def scorecard() -> str:
    """Counts per verdict for every chapter, then what a kept run has of it: the claims, and the numbers folded away."""
    tables = {chapter: _comparison(chapter) for chapter in runner.chapter_names()}
    counts = zip(VERDICTS, *(_counts(rows["verdict"]) for rows in tables.values()))
    links = [f"{{doc}}`{chapter} </chapters/{chapter}>`" for chapter in tables]
    parts = [table(["verdict", *links], list(counts))]
    for chapter, rows in tables.items():
        parts += [f"## {title(chapter)}", *_scored(rows[rows["kept_run"] != ""])]
    return "\n\n".join(parts)


def _scored(rows) -> list[str]:
    """A chapter's part of the scorecard, from its rows that have a value."""
    if not len(rows):
        return ["No run of this chapter is kept yet, so there is no value to show."]
    is_claim = rows["key"].str.startswith("claim/")
    claims, numbers = rows[is_claim], rows[~is_claim]
    parts = []
    if len(claims):
        shown = claims[["where", "paper", "what", "kept_run", "verdict"]]
        parts.append(table(["where", "", "the paper says", "kept run", "verdict"], shown.values.tolist()))
    if len(numbers):
        shown = numbers[["where", "what", "paper", "kept_run", "verdict"]]
        lines = table(["where", "what", "paper", "kept run", "verdict"], shown.values.tolist())
        parts.append(f":::{{dropdown}} {len(numbers)} numbers of the paper beside ours\n\n{lines}\n:::")
    return parts


def _comparison(chapter: str):
    from lookalike import compare

    return compare.comparison(chapter)


def _counts(verdicts) -> list[int]:
    words = [re.split(r": | \(", verdict)[0] for verdict in verdicts]
    return [words.count(word) for word in VERDICTS]


def run_status() -> str:
    """Every kept run and this build's small run: when, how long, where, on which code and data."""
    from lookalike import compare

    rows = []
    for chapter in runner.chapter_names():
        runs = compare.kept_runs(chapter)
        small = paths.small_notebook(chapter).with_suffix(".json")
        if small.is_file():
            runs["small, this build"] = compare.load_run(small)
        rows += [[f"{{doc}}`/chapters/{chapter}`", *_run_cells(name, run)] for name, run in runs.items()]
    return table(["chapter", "run", "date", "took", "on", "commit", "data"], rows)


def _run_cells(name: str, run: dict) -> list[str]:
    data = ", ".join(dict.fromkeys(data["name"] for data in run["data"]))
    commit = (run["provenance"]["commit"] or "none")[:10] + (" with changes" if run["provenance"]["dirty"] else "")
    return [
        name,
        day(run["started"]),
        duration(run["seconds"]),
        run["provenance"]["device"],
        commit,
        data,
    ]


def data_sets() -> str:
    """The data manifest as two tables: data and weights."""
    from lookalike.data import manifest

    entries = manifest.load_manifest().entries.values()
    header = ["set", "licence", "how to get it", "for the chapters"]
    parts = []
    for kind, heading in (("data", "Data sets"), ("weights", "Weights")):
        rows = [_entry_cells(entry) for entry in entries if entry.kind == kind]
        parts.append(f"**{heading}**\n\n{table(header, rows)}")
    return "\n\n".join(parts)


def _entry_cells(entry) -> list[str]:
    hows = {"url": "download", "pypi": "in a package", "by hand": "by hand"}
    how = ", ".join(dict.fromkeys(hows[file.how] for file in entry.files))
    licence = entry.licence + (" (restricted)" if entry.restricted else "")
    what = f"`{entry.name}`: {entry.title}"
    if entry.stand_in_for:
        what += f"; here in place of {entry.stand_in_for}"
    return [what, licence, how, ", ".join(entry.chapters)]


def brackets() -> str:
    """Accounted and audited epsilon of every kept audit; a contradiction is marked for the style sheet's red."""
    from lookalike import brackets as audits

    kept, parts = audits.kept(), []
    if test := kept.pop("self-test", None):
        sizes = f"{test['records']} images or on {test['records'] - 1}"
        title = f"**One step on {sizes}**: records are images, delta {test['delta']:g}, {_audited(test)}"
        parts += [title, table(_BRACKET, [_engine_cells(name, test["engines"][name]) for name in ("stock", "ours")])]
    for chapter in runner.chapter_names():
        groups = {}
        for name, document in kept.items():
            for row in document["rows"] if name.startswith(f"{chapter}/") else []:
                groups.setdefault(_group(row, document), []).append(_bracket_cells(row))
        for title, rows in groups.items():
            parts += [f"**{{doc}}`/chapters/{chapter}`**, {title}", table(_BRACKET, rows)]
    return "\n\n".join(parts) or "No audit is kept yet."


_BRACKET = ["training", "steps", "accounted (upper)", "audited (lower)", "if Gaussian", "verdict"]


def _audited(document: dict) -> str:
    return f"audited on {day(document['made'])}, code of commit `{document['provenance']['commit'][:10]}`"


def _group(row: dict, document: dict) -> str:
    """What the rows of one table have in common."""
    changed = ", ".join(f"`{name}={value}`" for name, value in document["changed"].items())
    run = f"{document['scale']} run" + (f" (changed: {changed})" if changed else "")
    rest = f"records are {row['unit']}, {row['mode']} mode, delta {row['delta']:g}, {_audited(document)}"
    return f"{run}, **{row['audit']}**: {rest}"


def _engine_cells(name: str, found: dict) -> list:
    title = {"stock": "Opacus 1.6 as it comes", "ours": "this library"}[name]
    bad = found["lower"] > found["accounted"]
    return [title, 1, _number(found["accounted"]), _number(found["lower"]), "", _verdict(bad)]


def _bracket_cells(row: dict) -> list:
    numbers = [_number(row[key]) for key in ("accounted", "lower", "if_gaussian")]
    return [row["what"], row["steps"], *numbers, _verdict(row["contradiction"])]


def _number(value: float | None) -> str:
    return "" if value is None else f"{float(f'{value:.3g}'):,g}"


def _verdict(contradiction: bool | None) -> str:
    if contradiction is None:
        return "none: no coins"
    return '<span class="contradiction">contradiction</span>' if contradiction else "no contradiction"


# --- the calibration ----------------------------------------------------------------------------------------


def calibrations() -> str:
    """Power of every attack and measure against planted leaks, one group of tables per kept calibration."""
    from lookalike import calibration

    kept = calibration.kept()
    trained = _trained(kept.pop(calibration.TRAINED, None))
    parts = [part for document in kept.values() for part in _calibration(document)] + trained
    return "\n\n".join(parts) or "No calibration is kept yet."


def _calibration(document: dict) -> list[str]:
    worlds, sizes = document["worlds"], f"{document['members']} training images, {document['synthetic']} released ones"
    intro = (
        f"**`{document['data']}`** at {document['side']} px: {sizes}, {document['repeats']} trials per leak, features: "
        f"{document['features']}; {_made(document)}. 95 % intervals: 0.00 reaches up to "
        f"{clopper_pearson(0, document['repeats'])[1]:.2f}, 0.50 about {_half(document['repeats']):.2f} to either side."
    )
    parts, free = [intro], [world for world in worlds if "," not in world]
    for share in dict.fromkeys(world.partition(", ")[2] for world in worlds if "," in world):
        leaks = [world for world in worlds if world.endswith(f", {share}")]
        head = ["", *free, *(leak.partition(",")[0] for leak in leaks)]
        cells = [[_detector(name), *(_power(worlds[w][name]) for w in (*free, *leaks))] for name in worlds[free[0]]]
        parts += [
            f"**{share.replace('%', ' %')} of the released images are copies**",
            f":::{{div}} narrow\n{table(head, cells)}\n:::",
        ]
    return parts


def _trained(document: dict | None) -> list[str]:
    if document is None:
        return []
    parts = [f"**Trained models** on `{document['data']}` at {document['side']} px; {_made(document)}"]
    for kind in ("gans", "vaes"):
        worlds = document[kind]
        names = next(iter(worlds.values()))
        cells = [[_detector(name), *(_power(worlds[world][name]) for world in worlds)] for name in names]
        parts += [document["what"][kind], table(["", *worlds], cells)]
    return parts


def _made(document: dict) -> str:
    return f"made on {day(document['made'])}, code of commit `{document['provenance']['commit'][:10]}`"


def _detector(name: str) -> str:
    from lookalike.card import NAMES

    return NAMES.get(name, name.replace("_", " "))


def _power(found: dict) -> str:
    return f"{found['power']:.2f}"


def _half(repeats: int) -> float:
    low, high = clopper_pearson(repeats // 2, repeats)
    return (high - low) / 2


# --- the README ---------------------------------------------------------------------------------------------


def readme_results() -> str:
    """The README's table: per chapter the verdicts counted, then each claim, with the command behind it."""
    from lookalike import compare

    rows = []
    for chapter in runner.chapter_names():
        kept = compare.kept_runs(chapter)
        lines = compare.comparison(chapter)
        counts = zip(VERDICTS, _counts(lines["verdict"]))
        total = ", ".join(f"{count} {word}" for word, count in counts if count)
        rows.append([title(chapter), f"all {len(lines)} numbers and claims", "", total, _commands(chapter, kept)])
        claims = lines[lines["key"].str.startswith("claim/")]
        rows += [
            [
                "",
                f"{line['what']} ({line['where']})",
                line["kept_run"],
                line["verdict"],
                _command(chapter, line["kept_scale"]),
            ]
            for line in claims.to_dict("records")
        ]
    return table(["chapter", "the paper says", "ours", "verdict", "command"], rows)


def _commands(chapter: str, kept: dict) -> str:
    return "<br>".join(_command(chapter, scale) for scale in kept)


def _command(chapter: str, scale: str) -> str:
    return f"`lookalike run {chapter} --scale {scale}`" if scale else ""


def with_results(readme: str) -> str:
    """The README's text with its table written anew between the two marks."""
    start, end = README_MARKS
    before, rest = readme.split(start)
    return f"{before}{start}\n{readme_results()}\n{end}{rest.split(end)[1]}"


def main() -> None:
    """Rewrites README.md in place."""
    path = paths.project_root() / "README.md"
    path.write_text(with_results(path.read_text("utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
