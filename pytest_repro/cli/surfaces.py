"""`pytest-repro report`: a report of a check, as CI systems and people read it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from ..errors import ConfigError, ReproError
from ..report import document, github, intoto, junit, markdown
from ..store import atomic_write
from ..text import inert
from .shell import app, errors, reported


class Surface(StrEnum):
    """What a report can be made into."""

    GITHUB = "github"
    MARKDOWN = "markdown"
    COMMENT = "comment"
    HTML = "html"
    JUNIT = "junit"
    IN_TOTO = "in-toto"


Suite = Mapping[str, Any]
_ONE = (Surface.HTML, Surface.IN_TOTO)
_MADE_BY = "name a report of pytest --repro-check --repro-report-json FILE"


@app.command()
@reported
def report(
    files: Annotated[list[Path], typer.Argument(help="Reports of pytest --repro-report-json.")],
    to: Annotated[Surface, typer.Option("--to", help="What to make of them.")] = Surface.MARKDOWN,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write to this file, not to the terminal.")] = None,
    key: Annotated[str, typer.Option("--key", help="Tells a comment from others on the same pull request.")] = "check",
    exit_code: Annotated[int | None, typer.Option("--exit-code", help="How pytest ended; github: a report of a run that broke off is no pass.")] = None,
) -> None:  # fmt: skip
    """Make a report into a step summary, annotations and outputs (github), Markdown, a comment, HTML, JUnit or in-toto.

    github appends to the files that GITHUB_STEP_SUMMARY and GITHUB_OUTPUT name, and prints annotations; it exits with 1 if a
    report is not there or cannot be read, and says so in the summary.
    """
    if to is Surface.GITHUB:
        if output is not None:
            raise ConfigError(
                "github writes to the files that GITHUB_STEP_SUMMARY and GITHUB_OUTPUT name",
                where="--output",
                fix="--to markdown --output FILE makes the same summary",
            )
        raise typer.Exit(_github(files, exit_code))
    if to in _ONE and len(files) > 1:
        raise ConfigError(f"{len(files)} reports", where=f"--to {to}", fix="name one report; github, markdown, comment and junit take several")  # fmt: skip
    made = _made(files, to, key)
    if output is None:
        sys.stdout.buffer.write(made)
        return
    if output.is_dir() or output.resolve() in {file.resolve() for file in files}:
        raise ConfigError("this is a folder, or the report itself", where=output, fix="name another file")
    atomic_write(output, made)


def _made(files: Sequence[Path], to: Surface, key: str) -> bytes:
    """What one surface is made into; a comment says of a missing report that it is missing."""
    run = github.run_address(os.environ)
    where = ", ".join(file.name for file in files)
    if to is Surface.COMMENT:
        suites, problems = _read_all(files)
        if problems:
            return markdown.broken_off(problems, key=key, run=run).encode()
        return markdown.comment(suites, key, where=where, run=run).encode()
    suites = [suite for file in files for suite in _suites(file)]
    if to is Surface.JUNIT:
        return junit.document(suites)
    if to is Surface.IN_TOTO:
        return intoto.statement(suites, files[0].name, files[0].read_bytes(), run=run).encode()
    if to is Surface.HTML:
        from ..report import html  # jinja2 with it

        return html.render(document.of_session(suites, [])).encode()
    return markdown.summary(suites, where=where, run=run).encode()


def _suites(file: Path) -> list[Suite]:
    """The suites of a report, judged again by their own numbers: a report says nothing that does not follow from it.

    Raises:
        ConfigError: there is no such report, or it is none.
    """
    try:
        return [document.of_suite(result) for result in document.read(file)]
    except ConfigError as exc:
        raise ConfigError(exc.what, where=exc.where, fix=_MADE_BY) from None


def _read_all(files: Sequence[Path]) -> tuple[list[Suite], list[str]]:
    """What could be read, and what is to be said of the rest."""
    suites: list[Suite] = []
    problems: list[str] = []
    for file in files:
        try:
            suites += _suites(file)
        except ReproError as exc:
            problems.append(f"{exc.where}: {exc.what}")
    return suites, problems


# --- GitHub ---------------------------------------------------------------------------------------------------------


def _github(files: Sequence[Path], exit_code: int | None) -> int:
    """Summary, outputs and annotations of one step; the exit code of this command."""
    suites, problems = _read_all(files)
    failed = any(suite["verdict"] == "fail" for suite in suites)
    if exit_code not in (None, 1 if failed else 0):
        problems.append(f"pytest ended with exit code {exit_code}, which is not what its report says: see its log")
    _write_summary(suites, problems, ", ".join(file.name for file in files))
    others = 0 if problems else sum(map(document.other_failures, files))
    values = github.outputs(suites, ended=not problems, report=str(files[0]), others=others)
    _append("GITHUB_OUTPUT", github.output_lines(values))
    repository = Path(os.environ.get("GITHUB_WORKSPACE") or Path.cwd())
    told = [github.problem(text) for text in problems] + github.errors(suites, Path.cwd(), repository)
    for line in told[: github.MOST_ANNOTATIONS]:
        sys.stdout.buffer.write(line.encode() + b"\n")
    return 1 if problems else 0


def _write_summary(suites: Sequence[Suite], problems: Sequence[str], where: str) -> None:
    run = github.run_address(os.environ)
    told = markdown.broken_off(problems, run=run) + "\n" if problems else ""
    there = os.environ.get("GITHUB_STEP_SUMMARY", "")
    held = Path(there).stat().st_size if there and Path(there).exists() else 0
    room = markdown.SUMMARY_LIMIT - held - len(told.encode())
    found = markdown.summary(suites, limit=room, where=where, run=run) if suites else ""
    _append("GITHUB_STEP_SUMMARY", told + (found if len(found.encode()) <= room else ""))


def _append(variable: str, text: str) -> None:
    """To the file that a variable of the runner names."""
    name = os.environ.get(variable)
    if not name:
        errors.print(Text(inert(f"{variable} is not set: nothing was written for it")))
        return
    with Path(name).open("a", encoding="utf-8", newline="\n") as file:
        file.write(text)
