"""The `pytest-repro` shell: review, accept, reject, merge, pending, diff, show, env. Needs neither torch nor an engine.

Exit codes: 0 done; 1 something is pending (`pending`), differs (`diff`) or fails (`merge --report`); 2 bad usage or input.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import __version__, merging, probe, review, store
from .errors import ConfigError, ReproError
from .golden import Golden
from .report import document, terminal
from .result import SuiteResult
from .store import Place
from .text import inert

app = typer.Typer(
    help="Review golden generations recorded by pytest --repro-update.", no_args_is_help=True, add_completion=False,
    pretty_exceptions_enable=False,
)  # fmt: skip
console = Console(highlight=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, soft_wrap=True)

Where = Annotated[Path, typer.Argument(help="A suite's folder, or a folder of suites.", show_default=True)]
AsJson = Annotated[bool, typer.Option("--as-json", help="Print JSON for scripts.")]
Reason = Annotated[str, typer.Option("--reason", "-r", help="Why the new golden is right; kept in it.")]
All = Annotated[bool, typer.Option("--all", help="Every pending golden below PATH.")]


def _reported(command: Callable[..., Any]) -> Callable[..., Any]:
    """Errors of this package as a message and exit code 2, never a traceback."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except ReproError as exc:
            errors.print(
                Text(f"error: {inert(exc.what) if not exc.where else f'{exc.where}: {inert(exc.what)}'}", style="red")
            )
            if exc.fix:
                errors.print(Text(f"mend:  {exc.fix}"))
            raise typer.Exit(2) from None

    return run


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        console.print(f"pytest-repro {__version__}")
        raise typer.Exit


@app.command()
@_reported
def pending(path: Where = Path("golden"), as_json: AsJson = False) -> None:
    """List goldens that wait for review; exit 1 if there are any."""
    found = store.pending(path)
    if as_json:
        print(json.dumps([review.summary(place) for place in found], indent=1))
    elif not found:
        console.print(f"nothing is pending under {path}")
    else:
        for place in found:
            console.print(Text(f"{place.text}  {_line(review.summary(place))}"))
        command = "merge" if any(place.shard for place in found) else "review"
        console.print(Text(f"next  pytest-repro {command} {path}", style="bold"))
    raise typer.Exit(1 if found else 0)


def _line(summary: dict[str, Any]) -> str:
    if summary["error"]:
        return f"cannot be read: {summary['error']}"
    if summary["part"]:
        part = summary["part"].replace("/", " of ")
        return f"{summary['prompts']} prompts; this is a part, {part}: pytest-repro merge first"
    changed = "new" if summary["against"] is None else f"{summary['changed']} of {summary['prompts']} prompts changed"
    return f"{summary['prompts']} prompts, {changed}"


@app.command()
@_reported
def diff(path: Where = Path("golden"), as_json: AsJson = False) -> None:
    """Show what every pending golden would change; exit 1 if there is any."""
    found = store.pending(path)
    if as_json:
        print(json.dumps([review.changes(place) for place in found], indent=1))
    for place in [] if as_json else found:
        _show_change(place)
    if not found and not as_json:
        console.print(f"nothing is pending under {path}")
    raise typer.Exit(1 if found else 0)


def _show_change(place: Place) -> None:
    change = review.changes(place)
    console.rule(Text(str(place.text)), align="left")
    for line in change["head"]:
        console.print(Text(inert(line)))
    if change["environment"]:
        table = Table(
            "field", "golden", "candidate", title="environment, suspects first", title_justify="left", box=None
        )
        for row in change["environment"]:
            table.add_row(*(Text(inert(str(row[k]), 60)) for k in ("field", "golden", "now")))
        console.print(table)
    for prompt in change["prompts"]:
        style = "red" if prompt["verdict"] in ("drift", "removed") else "yellow"
        console.print(Text(inert(prompt["line"]), style=style))
        for name in ("golden", "now"):
            if prompt[name] is not None:
                console.print(Text(f"    {name:<7} {inert(prompt[name])}"))


@app.command()
@_reported
def show(
    path: Where = Path("golden"), prompt: Annotated[str, typer.Option("--prompt", help="Only this prompt.")] = ""
) -> None:
    """Show goldens: where they come from, who accepted them, and their texts."""
    if not path.exists():
        raise ConfigError("there is no such folder", where=path, fix="name a suite's folder, e.g. golden/my-suite")
    folders = sorted({p.parent for p in path.rglob(f"*{store.GOLDEN}.jsonl")} | {path})
    places = [place for folder in folders for place in store.places(folder)]
    if not places:
        raise ConfigError("there is no golden here", where=path, fix=f"pytest --repro-update {path}")
    for place in places:
        _show_golden(place, place.read(), prompt)


def _show_golden(place: Place, golden: Golden, only: str) -> None:
    console.rule(Text(str(place.text)), align="left")
    for line in review.describe(golden):
        console.print(Text(inert(line)))
    rows = [i for i, name in enumerate(golden.generation.ids) if only in ("", name)]
    if not rows:
        raise ConfigError(f"no prompt {only!r} in this golden", where=place.text)
    for i in rows:
        score = {True: "right", False: "wrong", None: ""}[golden.scores[i]]
        span = golden.generation.span(i)
        head = f"{golden.generation.ids[i]}  {span.stop - span.start} tokens, {golden.generation.finish_reasons[i]}  {score}"
        console.print(Text(inert(f"· {head}"), style="bold"))
        console.print(Text(f"    │ {inert(golden.generation.texts[i])}"))


@app.command()
@_reported
def accept(
    path: Where = Path("golden"),
    reason: Reason = "",
    every: All = False,
) -> None:
    """Accept pending goldens without a terminal: --all and a reason."""
    found = _chosen(path, every, "accept")
    _refuse_parts(found)
    for place in found:
        golden = store.accept(
            place, by=probe.author(place.folder), reason=reason, commit=review.commit_of(place.folder)
        )
        console.print(
            Text(f"accepted {place.other.text}  ({golden.review.by if golden.review else ''})", style="green")
        )


@app.command()
@_reported
def reject(path: Where = Path("golden"), every: All = False) -> None:
    """Remove pending goldens; the accepted ones stay as they are."""
    for place in _chosen(path, every, "reject"):
        place.remove()
        console.print(Text(f"rejected {place.text}"))


def _chosen(path: Path, every: bool, verb: str) -> list[Place]:
    """Pending goldens to act on: all below a folder with --all, or the one that PATH names."""
    if path.is_file() and path.name.endswith(f"{store.PENDING}.jsonl"):
        return [Place.named(path, store.PENDING)]
    found = store.pending(path)
    if not found:
        raise ConfigError("nothing is pending here", where=path, fix=f"pytest --repro-update {path}")
    if not every:
        names = "\n       ".join(str(p.text) for p in found)
        raise ConfigError(
            f"{len(found)} pending:\n       {names}", where=path, fix=f"name one of these files, or {verb} --all"
        )
    return found


def _refuse_parts(found: list[Place]) -> None:
    for place in found:
        if place.shard is not None:
            raise store.a_part(place)


@app.command()
@_reported
def merge(
    paths: Annotated[list[Path], typer.Argument(help="Folders of suites; with --report, reports of shards.")],
    report: Annotated[Path | None, typer.Option("--report", help="Merge reports into this file.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Everything, as pytest -v shows it.")] = False,
) -> None:
    """Put shards together: pending parts of goldens into candidates to review, or (--report) reports of a check.

    A merged report is judged as a whole: accuracy, length, and thresholds over all prompts; exit 1 if it fails.
    """
    if report is None:
        for place, parts in [merged for path in paths for merged in store.merge(path)]:
            console.print(Text(f"merged {place.text} from {parts} parts", style="green"))
            console.print(Text(f"next  pytest-repro review {place.folder}", style="bold"))
        return
    if report.resolve() in {path.resolve() for path in paths} or report.is_dir():
        raise ConfigError("this is a folder, or one of the reports to merge", where=report, fix="name another file")
    suites = _merged(paths)
    document.write(report, document.of_session(suites, []))
    for suite in sorted(suites, key=lambda s: s["verdict"] == "fail"):
        console.rule(Text(terminal.title(suite)), characters="=")
        for line, style in terminal.lines(suite, verbose=verbose):
            console.print(Text(line, style=style))
    console.print(Text(f"repro: report written to {report}"))
    raise typer.Exit(1 if any(suite["verdict"] == "fail" for suite in suites) else 0)


def _merged(reports: list[Path]) -> list[dict[str, Any]]:
    """Every suite and mode of some reports, its shards merged."""
    shards: dict[tuple[str, str], list[tuple[str, SuiteResult]]] = {}
    for path in reports:
        for result in document.read(path):
            shards.setdefault((result.path, result.numerics), []).append((str(path), result))
    return [document.of_suite(merging.result_of(found)) for found in shards.values()]


@app.command(name="review")
@_reported
def review_command(path: Where = Path("golden")) -> None:
    """Walk through pending goldens: a accept, r reject, s skip, A/R/S the same for all that are left."""
    found = store.pending(path)
    if not found:
        console.print(f"nothing is pending under {path}")
        return
    _refuse_parts(found)
    if not sys.stdin.isatty():
        raise ConfigError(
            f"{len(found)} pending, and there is no terminal to ask on",
            where=path,
            fix=f'pytest-repro diff {path}; then pytest-repro accept {path} --all --reason "..." or pytest-repro reject {path} --all',
        )
    answer = ""
    for place in found:
        _show_change(place)
        answer = answer if answer in ("A", "R", "S") else _ask()
        if answer.lower() == "a":
            reason = typer.prompt("reason")
            store.accept(place, by=probe.author(place.folder), reason=reason, commit=review.commit_of(place.folder))
        elif answer.lower() == "r":
            place.remove()
        console.print({"a": "accepted", "r": "rejected", "s": "skipped"}[answer.lower()])


def _ask() -> str:
    while True:
        answer = str(typer.prompt("a accept, r reject, s skip, A/R/S all that are left")).strip()
        if answer in ("a", "r", "s", "A", "R", "S"):
            return answer


@app.command()
@_reported
def env(as_json: AsJson = False) -> None:
    """This machine's fingerprint, as far as it is known without a model."""
    facts = review.environment()
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    table = Table("field", "class", "value", box=None)
    for name, cls, value in review.classified(facts):
        table.add_row(Text(name), cls, Text(inert(str(value))))
    console.print(table)


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
