"""`pytest-repro fetch`."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from .. import artifact
from .shell import AsJson, app, as_data, reported, say

MOST_IGNORED = 10


@app.command()
@reported
def fetch(
    path: Annotated[Path, typer.Argument(help="The folder that --repro-pending-dir made, or the zip of its artifact.")],
    into: Annotated[Path, typer.Option("--into", help="The checkout that the suites lie in.")] = Path(),
    force: Annotated[bool, typer.Option("--force", help="Replace candidates that wait there already.")] = False,
    as_json: AsJson = False,
) -> None:
    """Take the pending goldens of a failed run in CI, and put them beside their suites for review.

    Each is verified and matched to a suite of this checkout; nothing is written unless all are sound.
    """
    contents = artifact.read(path)
    done = list(artifact.put(artifact.arrivals(contents, into, source=path, force=force)))
    command = "merge" if any(arrival.place.shard for arrival in done) else "review"
    folders = sorted({str(arrival.place.folder) for arrival in done})
    steps = [f"pytest-repro {command} {quote(folder)}" for folder in folders]
    if as_json:
        as_data({"fetched": [artifact.told(a) for a in done], "ignored": list(contents.ignored), "next": steps})
        return
    for arrival in done:
        already = {"same": "  (lies there already)", "replaced": "  (replaces the one that waited)"}.get(
            arrival.state, ""
        )
        say(f"fetched  {arrival.place.text}  {len(arrival.golden.generation)} prompts{already}", "green")
    for name in contents.ignored[:MOST_IGNORED]:
        say(f"ignored  {name}: not a pending golden", "yellow")
    if len(contents.ignored) > MOST_IGNORED:
        say(f"ignored  {len(contents.ignored) - MOST_IGNORED} more")
    for step in steps:
        say(f"next     {step}", "bold")
