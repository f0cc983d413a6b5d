"""Goldens and what waits to become one: `pending`, `diff`, `show`, `accept`, `reject`, `review`."""

from __future__ import annotations

import sys
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from .. import probe, review, store, verification
from ..errors import ConfigError
from ..golden import Golden
from ..store import Place, Reviewer
from ..text import inert
from ..wording import Piece, marked
from .shell import AsJson, Where, app, as_data, console, errors, reported, say

Reason = Annotated[str, typer.Option("--reason", "-r", help="Why the new golden is right; kept in it.")]
All = Annotated[bool, typer.Option("--all", help="Every pending golden below PATH.")]


LOUD = ("THRESHOLDS", "the noise envelope grew", "calibration dropped")
"""How lines begin that a reviewer must not miss."""


@app.command()
@reported
def pending(path: Where = Path("golden"), as_json: AsJson = False) -> None:
    """List goldens that wait for review; exit 1 if there are any."""
    found = store.pending(path)
    if as_json:
        as_data([review.summary(place) for place in found])
    elif not found:
        say(f"nothing is pending under {path}")
    else:
        for place in found:
            say(f"{place.text}  {_line(review.summary(place))}")
        command = "merge" if any(place.shard for place in found) else "review"
        say(f"next  pytest-repro {command} {path}", "bold")
    raise typer.Exit(1 if found else 0)


def _line(summary: dict[str, Any]) -> str:
    if summary["error"]:
        return f"cannot be read: {summary['error']}"
    if summary["part"]:
        part = summary["part"].replace("/", " of ")
        return f"{summary['prompts']} prompts; this is a part, {part}: pytest-repro merge first"
    changed = "new" if summary["against"] is None else f"{summary['changed']} of {summary['prompts']} prompts changed"
    machines = ", ".join(f"{n} calibration{'s'[: n > 1]} {state}" for state, n in summary["calibrations"].items())
    return ", ".join(filter(None, [f"{summary['prompts']} prompts", changed, machines]))


@app.command()
@reported
def diff(path: Where = Path("golden"), as_json: AsJson = False) -> None:
    """Show what every pending golden would change; exit 1 if there is any."""
    found = store.pending(path)
    if as_json:
        as_data([review.changes(place) for place in found])
    for place in [] if as_json else found:
        _show_change(place)
    if not found and not as_json:
        say(f"nothing is pending under {path}")
    raise typer.Exit(1 if found else 0)


def _show_change(place: Place) -> None:
    change = review.changes(place)
    console.rule(Text(inert(str(place.text))), align="left")
    for line in change["head"]:
        say(line, "red" if line.startswith(LOUD) else "")
    if change["environment"]:
        table = Table(
            "field", "golden", "candidate", title="environment, suspects first", title_justify="left", box=None
        )
        for row in change["environment"]:
            table.add_row(*(Text(inert(str(row[k]), 60)) for k in ("field", "golden", "now")))
        console.print(table)
    for prompt in change["prompts"]:
        style = "red" if prompt["verdict"] in ("drift", "removed") else "yellow"
        say(prompt["line"], style)
        if prompt["words"]:
            console.print(_words(prompt["words"]))
        for name in ("golden", "now"):
            if prompt[name] is not None:
                console.print(Text(f"    {name:<7} {inert(prompt[name])}"))


def _words(pieces: list[Piece]) -> Text:
    """Around the first difference; marked as well as coloured, for a log has no colours."""
    line = Text("    change  ")
    for piece in pieces:
        line.append(inert(marked([piece])), style={"golden": "red", "now": "green"}.get(piece[0], ""))
    return line


@app.command()
@reported
def show(
    path: Where = Path("golden"),
    prompt: Annotated[str, typer.Option("--prompt", help="Only this prompt.")] = "",
    as_json: AsJson = False,
) -> None:
    """Show goldens, or the pending one that PATH names: where they come from, who accepted them, and their texts."""
    if not path.exists():
        raise ConfigError("there is no such folder", where=path, fix="name a suite's folder, e.g. golden/my-suite")
    places = store.below(path)
    if path.is_file() and not places:
        places = store.below(path, store.PENDING)
    if not places:
        raise _none_here(path)
    goldens = [(place, place.read()) for place in places]
    for place, golden in goldens:
        if prompt and prompt not in golden.generation.ids:
            raise ConfigError(f"no prompt {prompt!r} in this golden", where=place.text)
    if as_json:
        as_data([review.whole(golden, place.text, prompt) for place, golden in goldens])
        return
    for place, golden in goldens:
        _show_golden(place, golden, prompt)


def _show_golden(place: Place, golden: Golden, only: str) -> None:
    console.rule(Text(inert(str(place.text))), align="left")
    for line in review.describe(golden):
        console.print(Text(inert(line)))
    rows = [i for i, name in enumerate(golden.generation.ids) if only in ("", name)]
    for i in rows:
        name = golden.generation.ids[i]
        console.print(Text(inert(f"· {name}  {review.ending(golden, name)}"), style="bold"))
        console.print(Text(f"    │ {inert(golden.generation.texts[i])}"))


@app.command()
@reported
def accept(
    path: Where = Path("golden"),
    reason: Reason = "",
    every: All = False,
    thresholds: Annotated[
        bool, typer.Option("--thresholds", help="Accept the present thresholds of goldens that stand already.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Accept pending goldens without a terminal: --all and a reason. Or, with --thresholds, what loosened since."""
    done = _agreed(path, reason) if thresholds else _accepted(path, reason, every, as_json)
    if as_json:
        as_data([_told(place, golden) for place, golden in done])
        return
    for place, golden in done:
        say(f"accepted {place.text}  ({golden.review.by if golden.review else ''})", "green")


def _accepted(path: Path, reason: str, every: bool, quiet: bool) -> list[tuple[Place, Golden]]:
    found = _chosen(path, every, "accept")
    _refuse_parts(found)
    return [(place.other, _accept(place, reason, quiet)) for place in found]


def _accept(place: Place, reason: str, quiet: bool = False) -> Golden:
    """Accepted, once it was said what it changes: loosened thresholds and a wider envelope above all."""
    if not quiet and reason.strip():
        for line in [str(place.text), *review.changes(place)["head"]]:
            say(line)
    return store.accept(place, _reviewer(place, reason), verification.head_of(place))


def _agreed(path: Path, reason: str) -> list[tuple[Place, Golden]]:
    found = store.below(path)
    if not found:
        raise _none_here(path)
    for place in found:
        _say_loosened(place)
    return [(place, store.agree(place, _reviewer(place, reason))) for place in found]


def _say_loosened(place: Place) -> None:
    golden = place.read()
    changed = verification.loosened(place, golden, golden)
    errors.print(Text(inert(f"{place.text}: {', '.join(changed) or 'no threshold is looser than in its review'}")))


def _none_here(path: Path) -> ConfigError:
    folder = path.parent if path.suffix else path
    waiting = path.is_dir() and store.pending(path)
    fix = f"pytest-repro diff {quote(str(path))}" if waiting else f"pytest --repro-update {quote(str(folder))}"
    what = "there is no golden here, but a candidate waits" if waiting else "there is no golden here"
    return ConfigError(what, where=path, fix=fix)


def _reviewer(place: Place, reason: str) -> Reviewer:
    return verification.reviewer(place, probe.author(place.folder), reason, review.commit_of(place.folder))


def _told(place: Place, golden: Golden) -> dict[str, Any]:
    return {
        "path": str(place.text),
        "golden": golden.stem,
        "digest": golden.digest,
        "review": golden.review.to_json() if golden.review else None,
    }


@app.command()
@reported
def reject(path: Where = Path("golden"), every: All = False, as_json: AsJson = False) -> None:
    """Remove pending goldens; the accepted ones stay as they are."""
    found = _chosen(path, every, "reject")
    for place in found:
        place.remove()
    if as_json:
        as_data([{"path": str(place.text), "golden": place.stem} for place in found])
        return
    for place in found:
        say(f"rejected {place.text}")


def _chosen(path: Path, every: bool, verb: str) -> list[Place]:
    """Pending goldens to act on: all below a folder with --all, or the one that PATH names."""
    if path.is_file() and path.name.endswith(f"{store.PENDING}.jsonl"):
        return [Place.named(path, store.PENDING)]
    found = store.pending(path)
    if not found:
        raise ConfigError("nothing is pending here", where=path, fix=f"pytest --repro-update {path}")
    if not every:
        names = ", ".join(str(p.text) for p in found)
        raise ConfigError(f"{len(found)} pending: {names}", where=path, fix=f"name one of these files, or {verb} --all")
    return found


def _refuse_parts(found: list[Place]) -> None:
    for place in found:
        if place.shard is not None:
            raise store.a_part(place)


@app.command(name="review")
@reported
def review_command(path: Where = Path("golden")) -> None:
    """Walk through pending goldens: a accept, r reject, s skip, A/R/S the same for all that are left."""
    found = store.pending(path)
    if not found:
        say(f"nothing is pending under {path}")
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
            _accept(place, typer.prompt("reason"), quiet=True)  # it was shown above
        elif answer.lower() == "r":
            place.remove()
        console.print({"a": "accepted", "r": "rejected", "s": "skipped"}[answer.lower()])


def _ask() -> str:
    while True:
        answer = str(typer.prompt("a accept, r reject, s skip, A/R/S all that are left")).strip()
        if answer in ("a", "r", "s", "A", "R", "S"):
            return answer
