"""The command line: every verb a few lines over the library.

Torch and the notebook tools are imported inside the verbs, so that `lookalike --help` is quick. A sentence
that the library raises is printed as it is, without a traceback, and the exit code is 2.
"""

import json
import sys
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
data_app = typer.Typer(no_args_is_help=True, help="The data sets and weights of data_manifest.yaml.")
app.add_typer(data_app, name="data")

ChapterName = Annotated[str, typer.Argument(metavar="CHAPTER", help="A name from `lookalike list`.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


@app.callback()
def lookalike():
    """Five papers on synthetic medical images and privacy, run again number by number."""


@app.command("list")
def list_chapters(as_json: AsJson = False):
    """The chapters, the scales they have settings for, and the runs that are kept.

    Example: lookalike list
    """
    from lookalike import pages

    rows = pages.chapter_rows()
    _show(rows, as_json) if rows or as_json else print("The book has no chapter yet.")


@app.command()
def run(
    chapter: ChapterName,
    scale: Annotated[str, typer.Option(help="small, medium or full (the paper's settings).")] = "small",
    settings: Annotated[list[str], typer.Option("--set", metavar="NAME=VALUE", help="Change one setting.")] = [],  # noqa: B006
    resume: Annotated[bool, typer.Option("--resume", help="Keep what an interrupted run has finished.")] = False,
    as_json: AsJson = False,
):
    """Execute a chapter; the notebook and every number go to runs/CHAPTER/.

    Example: lookalike run no_free_lunch --scale medium --set seed=1 --resume
    """
    from lookalike import runner

    overrides = dict(runner.parse_setting(chapter, setting) for setting in settings)
    try:
        notebook = runner.run_chapter(chapter, scale, overrides, resume)
    except KeyboardInterrupt:
        print("Stopped; the same command with --resume goes on from what was finished.", file=sys.stderr)
        raise typer.Exit(130) from None
    outcome = {"chapter": chapter, "run_name": notebook.parent.name, "notebook": str(notebook)}
    print(json.dumps(outcome) if as_json else f"{chapter} {notebook.parent.name} is done: {notebook}")


@app.command()
def compare(
    chapter: ChapterName,
    run_name: Annotated[str, typer.Option("--run", help="A run under runs/CHAPTER/ to set beside the kept one.")] = "",
    as_json: AsJson = False,
):
    """The paper's numbers, the kept run's, one more run's if named, and the verdicts.

    Example: lookalike compare no_free_lunch --run small
    """
    from lookalike import pages

    _show(pages.comparison_rows(chapter, run_name), as_json)


@app.command()
def keep(
    chapter: ChapterName,
    run_name: Annotated[str, typer.Option("--run", help="The run under runs/CHAPTER/ to keep.")] = "medium",
    as_json: AsJson = False,
):
    """Copy a finished run to book/results/, where the pages and the README take their numbers from.

    Example: lookalike keep no_free_lunch --run medium
    """
    from lookalike.keep import keep as keep_run

    files = [str(path) for path in keep_run(chapter, run_name)]
    print(json.dumps(files) if as_json else "Kept, to be committed (then: make readme):\n" + "\n".join(files))


@app.command()
def recheck(
    chapter: ChapterName,
    run_name: Annotated[str, typer.Option("--run", help="The run under runs/CHAPTER/.")] = "medium",
    sample: Annotated[int, typer.Option(help="Stages to make again of every function and code.")] = 3,
    workers: Annotated[int, typer.Option(help="Processes of one thread each.")] = 2,
    as_json: AsJson = False,
):
    """Make some stages of a resumed run again that other library code made; exit code 1 if one differs.

    Example: lookalike recheck no_free_lunch --run medium --sample 3
    """
    from lookalike.recheck import recheck as recheck_run

    rows = recheck_run(chapter, run_name, sample, workers)
    _show(rows, as_json)
    if any(row["differ"] for row in rows):
        print("A stage came out otherwise: run it anew without --resume.", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def audit(
    chapter: Annotated[str, typer.Argument(metavar="[CHAPTER]", help="A name from `lookalike list`.")] = "",
    run_name: Annotated[str, typer.Option("--run", help="The run under runs/CHAPTER/ with the checkpoint.")] = "small",
    stages: Annotated[list[str], typer.Option("--stage", help="A private training of that run; may be repeated.")] = [],  # noqa: B006
    steps: Annotated[int, typer.Option(help="Private steps to watch, from the checkpoint on.")] = 20,
    canaries: Annotated[int, typer.Option(help="More canaries see more, and cost more.")] = 500,
    seed: Annotated[int, typer.Option(help="Of canaries, batches and noise.")] = 0,
    self_test: Annotated[
        bool, typer.Option("--self-test", help="Audit stock Opacus and our engine, a step each.")
    ] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Put the result on the book's page of brackets.")] = False,
    as_json: AsJson = False,
):
    """Accounted epsilon and the audit's lower bound in one row; exit code 1 if ours is contradicted.

    Example: lookalike audit no_free_lunch --run small --stage train/vae/sigma0.4/seed0/full
    """
    from lookalike import brackets

    if self_test == bool(chapter):
        raise typer.BadParameter("Name a chapter, or give --self-test.")
    if self_test:
        found = brackets.self_test(seed, keep)
        rows = [{"engine": engine} | values for engine, values in found.items()]
        print(json.dumps(found)) if as_json else _show(rows, as_json)
        contradicted = found["ours"]["lower"] > found["ours"]["accounted"]
    else:
        rows = brackets.audit_stages(chapter, run_name, stages, steps, canaries, seed, keep)
        _show(rows if as_json else brackets.short(rows), as_json)
        contradicted = any(row["contradiction"] for row in rows)
    if contradicted:
        print("Contradiction: the audit's lower bound passes the accounted epsilon.", file=sys.stderr)
        raise typer.Exit(1)


# --- folders of anyone's --------------------------------------------------------------------------------------

Real = Annotated[str, typer.Option(metavar="DIR", help="The images the generator was trained on; or NAME:SPLIT.")]
Synthetic = Annotated[str, typer.Option(metavar="DIR", help="The images to be released.")]
Holdout = Annotated[str, typer.Option(metavar="DIR", help="Real images of the same source that it never saw.")]
Subjects = Annotated[str, typer.Option(metavar="CSV", help="Columns file, subject: whose each real image is.")]
ImageSize = Annotated[int, typer.Option(help="Side to resize to; 0: as they are.")]
Restricted = Annotated[bool, typer.Option("--restricted", help="Never draw, and keep no copy in the cache.")]
Threshold = Annotated[list[str], typer.Option("--threshold", metavar="NAME=VALUE", help="Change one limit.")]


@app.command()
def evaluate(
    real: Real,
    synthetic: Synthetic,
    holdout: Holdout = "",
    subjects: Subjects = "",
    image_size: ImageSize = 0,
    restricted: Restricted = False,
    threshold: Threshold = [],  # noqa: B006
    seed: int = 0,
    as_json: AsJson = False,
):
    """Fidelity, use, copies and attacks for folders of images, each with its control; a verdict against limits.

    Example: lookalike evaluate --real real --synthetic synthetic --holdout holdout --subjects subjects.csv
    """
    document = _evidence(real, synthetic, holdout, subjects, image_size, restricted, threshold, seed).document
    if as_json:
        print(json.dumps(document, indent=1, allow_nan=False))
        return
    from lookalike import card

    for title, rows in card.tables(document).items():
        print(f"\n{title}")
        _show(rows, False)
    answers = f"(privacy: {document['privacy']}, use: {document['use']})"
    print(f"\n{document['verdict'].capitalize()} {answers}. Evidence, not legal advice.")


@app.command("card")
def make_card(
    real: Real,
    synthetic: Synthetic,
    holdout: Holdout = "",
    subjects: Subjects = "",
    out: Annotated[str, typer.Option(metavar="DIR", help="Where card.html, card.md and card.json go.")] = "card",
    image_size: ImageSize = 0,
    restricted: Restricted = False,
    draw: Annotated[bool, typer.Option("--draw", help="Put the most alike pairs of images on the page.")] = False,
    threshold: Threshold = [],  # noqa: B006
    seed: int = 0,
    as_json: AsJson = False,
):
    """The same as one self-contained page, as Markdown and as JSON: may this set be shared?

    Example: lookalike card --real real --synthetic synthetic --holdout holdout --out card
    """
    from lookalike import card

    card.check_drawing(draw, restricted)
    evidence = _evidence(real, synthetic, holdout, subjects, image_size, restricted, threshold, seed)
    written = [str(path) for path in card.write(evidence, out, draw)]
    verdict = evidence.document["verdict"]
    print(json.dumps({"verdict": verdict, "files": written}) if as_json else f"{verdict}: " + ", ".join(written))


def _evidence(real, synthetic, holdout, subjects, image_size, restricted, threshold, seed):
    from lookalike import evaluate as library
    from lookalike import verdict
    from lookalike.data.manifest import cache_dir

    limits = dict(_limit(each) for each in threshold)
    verdict.limits(limits)  # before the work, not after
    *sets, files, notes = library.read(
        real, synthetic, holdout or None, subjects or None, image_size or None, restricted
    )
    cache = None if restricted else cache_dir() / "features"
    return library.evaluate(*sets, files=files, notes=notes, thresholds=limits, cache=cache, seed=seed)


def _limit(text):
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise typer.BadParameter(f"--threshold takes NAME=VALUE with a number, not {text!r}.") from None


@app.command()
def calibrate(
    data: Annotated[str, typer.Option(help="Known set whose images play real and made ones.")] = "phantom_mammography",
    repeats: Annotated[int, typer.Option(help="Trials per leak with planted copies; 0: none.")] = 40,
    models: Annotated[int, typer.Option(help="Small GANs to overfit, and twice as many VAEs; 0: none.")] = 10,
    seed: int = 0,
    keep: Annotated[bool, typer.Option("--keep", help="Put the table on the book's page of evidence.")] = False,
    as_json: AsJson = False,
):
    """What every attack and measure can see: power against planted leaks at 5 % false alarms.

    Example: lookalike calibrate --data phantom_mammography --repeats 5 --models 0
    """
    from lookalike import calibration

    found = calibration.run(data, repeats, models, seed, keep)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    for document in found.values():
        for worlds in (document[part] for part in ("worlds", "gans", "vaes") if part in document):
            _show(calibration.rows(worlds), False)


# --- data ---------------------------------------------------------------------------------------------------


@data_app.command("list")
def data_list(as_json: AsJson = False):
    """Every set and weight: where it is now, its licence, what it stands in for.

    Example: lookalike data list
    """
    from lookalike.data import manifest

    entries = manifest.load_manifest().entries.values()
    keys = ("name", "kind", "licence", "restricted", "stand_in_for")
    _show(
        [{"status": manifest.status(e.name)} | {key: getattr(e, key) for key in keys} for e in entries],
        as_json,
    )


@data_app.command("fetch")
def data_fetch(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME...", help="Names from `lookalike data list`.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All that can be had without a login.")] = False,
    as_json: AsJson = False,
):
    """Put sets into the cache, verified: from the mirror if it has them, else from their URL.

    Example: lookalike data fetch mnist pneumoniamnist
    """
    from lookalike.data import manifest

    entries = manifest.load_manifest().entries
    if bool(names) == everything:
        raise typer.BadParameter("Name the sets to fetch, or give --all.")
    found, failures = {}, []
    if everything:
        places = {name: manifest.status(name) for name in entries}
        names = [name for name in entries if places[name] not in ("by hand", "to install")]
        for place, heading in (("by hand", "Only by hand"), ("to install", "In a package that is not installed")):
            left = [name for name in entries if places[name] == place]
            if left:
                print(f"{heading} (lookalike data fetch NAME says how): {', '.join(left)}", file=sys.stderr)
    for name in names:
        try:
            found[name] = {path: str(local) for path, local in manifest.fetch(name).items()}
        except manifest.DataError as error:
            failures.append(str(error))
    if as_json:
        print(json.dumps(found))
    for name, files in {} if as_json else found.items():
        print(f"{name}: {', '.join(files.values())}")
    if failures:
        print("\n".join(failures), file=sys.stderr)
        raise typer.Exit(2)


@data_app.command("verify")
def data_verify(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME...]", help="All that are here, if none is named.")
    ] = None,
    as_json: AsJson = False,
):
    """Read every local file of the sets and compare it with its checksum; exit code 1 if one differs.

    Example: lookalike data verify mnist
    """
    from lookalike.data import manifest

    here = [name for name in manifest.load_manifest().entries if manifest.status(name) in ("cached", "in mirror")]
    checks = [{"name": name} | vars(check) for name in names or here for check in manifest.verify(name)]
    _show(checks, as_json)
    if not all(check["ok"] for check in checks):
        raise typer.Exit(1)


# --- this machine -------------------------------------------------------------------------------------------


@app.command()
def doctor(as_json: AsJson = False):
    """What this machine has, and which data each chapter would miss; exit code 1 if small runs would fail.

    Example: lookalike doctor
    """
    from lookalike import machine

    findings = machine.examine()
    _show(findings, as_json)
    if not all(finding["ok"] for finding in findings):
        raise typer.Exit(1)


# --- printing -----------------------------------------------------------------------------------------------


def _show(rows: list[dict], as_json: bool) -> None:
    """Rows with equal keys as JSON or as a table that is as wide as it needs when it goes into a file."""
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(rows[0] if rows else ()):
        table.add_column(column.replace("_", " "), no_wrap=number == 0)
    for row in rows:
        table.add_row(*(Text(_plain(value)) for value in row.values()))
    console = Console()
    Console(width=None if console.is_terminal else 250).print(table)


def _plain(value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def main() -> None:
    """The entry point: a sentence of the library's own becomes one line on stderr."""
    try:
        app()
    except Exception as error:
        if not type(error).__module__.startswith("lookalike"):
            raise
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
