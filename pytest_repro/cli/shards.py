"""`pytest-repro merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from .. import merging, store
from ..errors import ConfigError
from ..report import document, terminal
from ..result import SuiteResult
from .shell import AsJson, app, as_data, console, reported, say


@app.command()
@reported
def merge(
    paths: Annotated[list[Path], typer.Argument(help="Folders of suites; with --report, reports of shards.")],
    report: Annotated[Path | None, typer.Option("--report", help="Merge reports into this file.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Everything, as pytest -v shows it.")] = False,
    as_json: AsJson = False,
) -> None:
    """Put shards together: pending parts of goldens into candidates to review, or (--report) reports of a check.

    A merged report is judged as a whole: accuracy, length, and thresholds over all prompts; exit 1 if it fails.
    """
    if report is None:
        _merge_parts(paths, as_json)
        return
    if report.resolve() in {path.resolve() for path in paths} or report.is_dir():
        raise ConfigError("this is a folder, or one of the reports to merge", where=report, fix="name another file")
    suites = _merged(paths)
    whole = document.of_session(suites, [])
    document.write(report, whole)
    if as_json:
        as_data(whole)
    else:
        _show(suites, report, verbose)
    raise typer.Exit(1 if any(suite["verdict"] == "fail" for suite in suites) else 0)


def _merge_parts(paths: list[Path], as_json: bool) -> None:
    done = [merged for path in paths for merged in store.merge(path)]
    if as_json:
        as_data([{"path": str(place.text), "golden": place.stem, "parts": parts} for place, parts in done])
        return
    for place, parts in done:
        say(f"merged {place.text} from {parts} parts", "green")
        say(f"next  pytest-repro review {place.folder}", "bold")


def _show(suites: list[dict[str, Any]], report: Path, verbose: bool) -> None:
    for suite in sorted(suites, key=lambda s: s["verdict"] == "fail"):
        console.rule(Text(terminal.title(suite)), characters="=")
        for line, style in terminal.lines(suite, verbose=verbose):
            console.print(Text(line, style=style))
    say(f"repro: report written to {report}")


def _merged(reports: list[Path]) -> list[dict[str, Any]]:
    """Every suite and mode of some reports, its shards merged."""
    shards: dict[tuple[str, str], list[tuple[str, SuiteResult]]] = {}
    for path in reports:
        for result in document.read(path):
            shards.setdefault((result.path, result.numerics), []).append((str(path), result))
    return [document.of_suite(merging.result_of(found)) for found in shards.values()]
