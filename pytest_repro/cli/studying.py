"""`pytest-repro study`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from shlex import join
from typing import Annotated, Any

import typer
from rich.live import Live
from rich.table import Table
from rich.text import Text

from .. import campaign, grid
from .. import study as studies
from ..campaign import Moment, Plan
from ..cells import Cell
from ..decoding import Sampling
from ..errors import ConfigError
from ..report import study as report
from ..report.progress import Display
from ..store import typed
from ..study import Study
from ..suite import SUITE_FILE, Overrides, parse_engine_option
from ..text import inert
from .shell import AsJson, app, as_data, console, errors, reported

INTERRUPTED, BAD_CONFIGURATION = 130, 4
MOST_OF_AN_ERROR = 200

Axes = Annotated[
    list[str] | None,
    typer.Option("--axis", metavar="NAME=VALUE,…", help=f"What varies: {', '.join(grid.AXES)}. Repeatable. Without numerics: the suite's modes."),
]  # fmt: skip
Out = Annotated[Path | None, typer.Option("--out", help="The study's folder; what it holds is kept. Without it: SUITE's name and .study, here.")]  # fmt: skip
Jobs = Annotated[int, typer.Option("--jobs", min=1, help="Cells at a time. They slow each other down on one processor; GPUs are dealt out.")]  # fmt: skip
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="Run cells without answers once more.")]
Merge = Annotated[list[Path] | None, typer.Option("--merge", metavar="FOLDER", help="Run nothing: one report of the studies in these folders, a machine each. Repeatable.")]  # fmt: skip
Model = Annotated[str | None, typer.Option("--model", help="Another model in the suite's place, as --repro-model.")]
NewTokens = Annotated[int | None, typer.Option("--max-new-tokens", min=1, help="In the place of the suite's.")]
EngineOption = Annotated[list[str] | None, typer.Option("--engine-option", metavar="NAME=VALUE", help="As --repro-engine-option; repeatable.")]  # fmt: skip
Samples = Annotated[int, typer.Option("--samples", min=0, help="Sampled runs of every prompt in each cell, for Pass@1. transformers only.")]  # fmt: skip
Temperature = Annotated[float, typer.Option("--temperature", min=0.01, max=10, help="Of the sampled runs.")]
TopP = Annotated[float, typer.Option("--top-p", min=0.01, max=1, help="Of the sampled runs.")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**31, help="Of the first sampled run; each has the next one.")]
AllowCode = Annotated[bool, typer.Option("--allow-code", help="Allow a scorer that is code, as --repro-allow-code.")]


def _configured(command: Callable[..., Any]) -> Callable[..., Any]:
    """Bad configuration is pytest's own exit code for it, as everywhere that a suite is run."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except typer.Exit as exc:
            raise typer.Exit(BAD_CONFIGURATION if exc.exit_code == 2 else exc.exit_code) from None

    return run


@app.command()
@_configured
@reported
def study(
    path: Annotated[Path, typer.Argument(help="A suite's folder.")],
    axis: Axes = None,
    out: Out = None,
    jobs: Jobs = 1,
    retry_failed: RetryFailed = False,
    merge: Merge = None,
    model: Model = None,
    max_new_tokens: NewTokens = None,
    engine_option: EngineOption = None,
    samples: Samples = 0,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    seed: Seed = 0,
    allow_code: AllowCode = False,
    as_json: AsJson = False,
) -> None:
    """Run a suite over a grid of settings and tell how far its outputs lie apart, in the terms of arXiv 2506.09501.

    Each cell of the grid is a process of its own, and what was in force in it is observed: a cell whose observation
    contradicts its setting is told, never counted. What is done lies in the study's folder, and the same command goes on
    from there. Tables, figures and raw data are left beside it; advice comes last.

    Exit 0 if there are tables, 1 if no cell has answers, 4 for bad configuration, 130 if it was interrupted.

    Example: pytest-repro study golden/word-problems --axis numerics=bf16,fp32 --axis batch_size=1,8 --axis threads=1,2
    """
    folder = path.parent if path.name == SUITE_FILE else path
    options = dict(parse_engine_option(text, "--engine-option") for text in engine_option or ())
    overrides = Overrides(model=model, max_new_tokens=max_new_tokens, engine_options=options)
    plan = Plan(folder, overrides, grid.parse_axes(axis or ()), Sampling(samples, temperature, top_p, seed), allow_code)
    if merge:
        found, out = _merged(plan, merge, out or Path(f"{folder.resolve().name}.merged.study"))
    else:
        out = out or Path(f"{folder.resolve().name}.study")
        found = _run(plan, out, jobs, retry_failed)
    done = replace(studies.study(found), command=join(["pytest-repro", *sys.argv[1:]]))
    files = report.write(out, done)
    if as_json:
        as_data(studies.as_data(done))
    else:
        _show(done, files)
    raise typer.Exit(0 if any(p.done for p in done.precisions) else 1)


@app.command("study-cell", hidden=True)
@reported
def study_cell(request: Annotated[Path, typer.Argument()]) -> None:
    """One cell of a study, which asks for it."""
    campaign.answer(request, Display("cell", lambda: sys.stderr))


def _run(plan: Plan, out: Path, jobs: int, again: bool) -> list[Cell]:
    """All cells of the grid; those that were there are kept."""
    plan, suite = plan.checked()
    show = Display("study", lambda: sys.stderr)
    show.first = False
    told = _Told(jobs)
    try:
        with told.live:
            return campaign.run(plan, suite, out, jobs, again, show, told)
    except KeyboardInterrupt:
        errors.print(Text(f"interrupted: {told.finished} of {told.total} cells are done and kept in {inert(typed(out))}; the same command goes on from there", style="yellow"))  # fmt: skip
        raise typer.Exit(INTERRUPTED) from None


def _merged(plan: Plan, folders: list[Path], out: Path) -> tuple[list[Cell], Path]:
    """The cells of several folders, of one suite.

    Raises:
        ConfigError: axes are asked for as well, a folder holds no study, or the studies do not ask the same.
    """
    if plan.axes:
        raise ConfigError(
            "--merge runs nothing", where="--axis", fix="study on each machine first, then --merge their folders"
        )
    if len({folder.resolve() for folder in folders}) < len(folders) or len(folders) < 2:
        raise ConfigError("two different folders at least", where="--merge", fix="--merge FOLDER --merge FOLDER")
    found = [(typed(folder), campaign.read(folder)) for folder in folders]
    prompts = plan.suite().digest_of_prompts()
    for name, cells in found:
        if not cells:
            raise ConfigError("no study in this folder", where=name, fix="name a folder of pytest-repro study --out")
        for cell in cells:
            if cell.asked.get("prompts") != prompts:
                raise ConfigError(
                    f"its prompts are not those of {typed(plan.folder)}", where=name, fix="name their own suite"
                )
    campaign.of_one_study([cell for _, cells in found for cell in cells])
    return studies.merged(found), out


class _Told:
    """What is told while a study runs: a line a finished cell, and on a terminal where it stands."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self.finished = self.total = 0
        self.live = Live(console=errors, transient=True, auto_refresh=False)

    def __call__(self, moment: Moment) -> None:
        if moment.cell is None and self.total == 0 and moment.finished:
            _aside(f"{moment.finished} of {moment.total} cells are there already")
        self.finished, self.total = moment.finished, moment.total
        left = "" if moment.seconds_left is None else f", about {_spoken(moment.seconds_left)} left"
        if moment.cell is not None:
            _aside(f"cell {moment.finished} of {moment.total}{left}: {_of(moment.cell)}", _style(moment.cell))
        now = "; ".join(map(grid.spoken, moment.running))
        self.live.update(Text(inert(f"running {now}{left}") if now else "", style="dim"), refresh=True)


def _of(cell: Cell) -> str:
    rate = cell.tokens_per_second
    what = (
        f"{rate:.1f} tokens/s, {cell.wall_seconds:.0f} s" if rate else f"{cell.status}: {cell.error[:MOST_OF_AN_ERROR]}"
    )
    return f"{grid.spoken(cell.setting)}   {what}"


def _style(cell: Cell) -> str:
    return "" if cell.status == "done" else "red"


def _spoken(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _aside(line: str, style: str = "") -> None:
    errors.print(Text(inert(line), style=style))


def _show(done: Study, files: list[Path]) -> None:
    """The tables, what had no answers, the advice, and where the files lie."""
    head, rows = studies.table(done)
    _print((["", *(row[0] for row in rows)], list(zip(head[1:], *(row[1:] for row in rows), strict=True))))
    if done.effects:
        console.print(Text("\nwhich setting moves outputs, by pairs of cells that differ in it alone"))
        _print(report.effects(done))
    for name, status, why in done.failed:
        _line(status, f"{name}: {why[:MOST_OF_AN_ERROR]}", "red")
    for line in done.cautions:
        _line("caution", line, "yellow")
    for i, line in enumerate(done.advice):
        _line("" if i else "advice", line, "" if i else "bold")
    for i, file in enumerate(files):
        _line("" if i else "written", typed(file))


def _print(found: report.Table) -> None:
    head, rows = found
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for name in head:
        drawn.add_column(Text(inert(name)), no_wrap=True)
    for row in rows:
        drawn.add_row(*(Text(inert(cell)) for cell in row))
    console.print(drawn)


def _line(label: str, line: str, style: str = "") -> None:
    console.print(Text(inert(f"{label:<13} {line}"), style=style))
