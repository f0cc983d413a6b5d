"""`pytest-repro verify`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from .. import verification
from ..verification import Verification
from .shell import AsJson, Where, app, as_data, reported, say

BaseRevision = Annotated[
    str | None,
    typer.Option("--base", help="What the branch goes to; default: as CI says (GITHUB_BASE_REF, …), or origin/HEAD, origin/main, main."),
]  # fmt: skip


@app.command()
@reported
def verify(path: Where = Path("golden"), base: BaseRevision = None, as_json: AsJson = False) -> None:
    """Check in CI that goldens can be relied on; exit 1 if one cannot.

    Every golden matches its digest, was accepted under a valid seal, and is in git; no commit since the merge base holds an
    unreviewed or broken step; nothing pending is committed; no threshold was loosened without a reason.
    """
    found = verification.verify(path, base, os.environ)
    if as_json:
        as_data(_data(found))
    else:
        _tell(found)
    raise typer.Exit(1 if found.findings else 0)


def _data(found: Verification) -> dict[str, object]:
    return {
        "verdict": "fail" if found.findings else "pass",
        "base": vars(found.base),
        "goldens": found.goldens,
        "steps": found.steps,
        "findings": [vars(finding) for finding in found.findings],
    }


def _tell(found: Verification) -> None:
    for finding in found.findings:
        say(f"FAIL  {finding.where}: {finding.what}   mend: {finding.fix}", "red")
    looked_at = f"{found.goldens} goldens, {found.steps} changes since {found.base.name} ({found.base.commit[:12]})"
    say(f"{'FAIL' if found.findings else 'PASS'}  {looked_at}", "red" if found.findings else "green")
