"""`pytest-repro audit`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from .. import asking, audit
from ..audit import Operation, Pass
from ..engines.base import Auditing, Engine
from ..errors import ConfigError, EngineError
from ..generation import Request
from ..report.progress import Display
from ..store import typed
from ..suite import Prompt, Suite
from ..text import inert
from .shell import AsJson, app, as_data, console, reported, say, suite_at

Numerics = Annotated[
    str | None, typer.Option("--numerics", metavar="MODE", help="The suite's first mode unless named.")
]
Named = Annotated[str | None, typer.Option("--prompt", metavar="ID", help="The suite's first unless named.")]
EngineName = Annotated[
    str | None, typer.Option("--engine", help="In the suite's engine's place: one that can be looked into.")
]
EngineOption = Annotated[
    list[str] | None, typer.Option("--engine-option", metavar="NAME=VALUE", help="As --repro-engine-option; repeatable.")
]  # fmt: skip


@app.command(name="audit")
@reported
def look(
    path: Annotated[Path, typer.Argument(help="A suite's folder.")],
    numerics: Numerics = None,
    prompt: Named = None,
    engine: EngineName = None,
    engine_option: EngineOption = None,
    as_json: AsJson = False,
) -> None:
    """Say where a forward pass divides, takes roots and sums, by module, and by how many ulps its sums move with their order.

    One prompt goes through the model at once, then the token after it. Every sum is computed again with its terms turned
    round, and in two random orders, by the same kernel: what moves then is rounding, and where noise is born. Layers are
    rolled up. docs/audit.md: how to read it.

    Example: pytest-repro audit golden/word-problems --numerics fp32
    """
    suite = suite_at(path, engine_option or (), engine=engine)
    chosen = _chosen(suite, prompt)
    mode = numerics or suite.numerics[0]
    show = Display(f"audit {suite.name}", lambda: sys.stderr, unit="operations")
    show.first = False  # no line of pytest's is open here
    with asking.live(suite, mode, asking.Options(), show) as live:
        if not isinstance(live, Auditing):
            raise EngineError(f"nobody looks into the engine {suite.engine}", fix="--engine transformers")
        seen = live.observe()
        show.say(f"{mode}: {seen.compute_class} observed")
        passes = live.passes(_within(live, asking.request(live, chosen), typed(suite.folder)), show.phase)
        show.close()
    if as_json:
        as_data(_data(suite, mode, seen.compute_class, passes))
        return
    for one in passes:
        _show(one, mode)
    if names := audit.unlooked(passes):
        say(f"summed by {', '.join(names)}, whose order cannot be changed from here: not compared", "yellow")


def _chosen(suite: Suite, name: str | None) -> Prompt:
    found = [prompt for prompt in suite.prompts if name in (None, prompt.id)]
    if not found:
        some = ", ".join(prompt.id for prompt in suite.prompts[:8]) + (", …" if len(suite.prompts) > 8 else "")
        raise ConfigError(f"no prompt {name!r} in {suite.name}", where="--prompt", fix=f"one of {some}")
    return found[0]


def _within(engine: Engine, request: Request, where: str) -> Request:
    """The request, if it and one token more fit the model.

    Raises:
        ConfigError: they do not.
    """
    if engine.context_length is not None and len(request.tokens) >= engine.context_length:
        raise ConfigError(
            f"prompt {request.id} has {len(request.tokens)} tokens, and prompt and one token more must fit the model's "
            f"{engine.context_length}",
            where=where,
            fix="--prompt with another of the suite",
        )
    return request


def _data(suite: Suite, mode: str, observed: str, passes: Sequence[Pass]) -> dict[str, Any]:
    return {
        "suite": suite.name,
        "numerics": mode,
        "observed": observed,
        "passes": [one.to_json() for one in passes],
        "not_compared": audit.unlooked(passes),
    }


COLUMNS = (
    "module",
    "operation",
    "ms",
    "divides",
    "roots",
    "sums",
    "of",
    "moved",
    "ulps 50 %",
    "99 %",
    "max",
    "relative",
)
LEFT = 2
"""Columns of words; the others are numbers."""


def _show(one: Pass, mode: str) -> None:
    say(f"{one.what} of {one.tokens} token{'s' * (one.tokens != 1)}, {mode}: {one.seconds * 1e3:.0f} ms", "bold")
    table = _table(one)
    Console(highlight=False, width=_needed(table)).print(table)
    looked = sum(op.seconds for op in one.operations)
    say(f"operations took {looked * 1e3:.0f} ms, timed one by one", "dim")
    if source := one.source:
        say(
            f"noise is born most in {source.module}, {_short(source.name)} of {source.length}: {_percent(source)} of "
            f"its sums move, the noise is {source.relative:.1e} of their size (root mean square)"
        )
    elif one.quiet:
        say("no sum moved: in every order the same bits", "green")
    console.print()


def _table(one: Pass) -> Table:
    table = Table(box=None)
    for number, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if number < LEFT else "right", no_wrap=True)
    for operation in (op for op in one.operations if op.rounds):
        table.add_row(*(Text(inert(cell)) for cell in _cells(operation)))
    rest = [op for op in one.operations if not op.rounds]
    seconds = sum(op.seconds for op in rest)
    table.add_row(f"{len(rest)} others, number by number", "", f"{1e3 * seconds:.1f}", style="dim")
    return table


def _needed(table: Table) -> int:
    """Columns that it takes: a log has room for all of it, and a figure cut off is none."""
    return max(console.width, Measurement.get(console, console.options.update(width=1000), table).maximum)


def _cells(operation: Operation) -> list[str]:
    looked_at = operation.compared > 0
    return [
        operation.module,
        _short(operation.name),
        f"{operation.seconds * 1e3:.1f}",
        *(_count(n) for n in (operation.divisions, operation.roots, operation.sums)),
        str(operation.length or ""),
        _percent(operation) if looked_at else "",
        *(_count(operation.ulps(share) or 0, "0") if looked_at else "" for share in (0.5, 0.99)),
        _count(int(operation.largest), "0") if looked_at else "",
        f"{operation.relative:.1e}" if operation.relative else "0" if looked_at else "",
    ]


def _percent(operation: Operation) -> str:
    return f"{operation.moved_percent:.2g} %"


def _short(name: str) -> str:
    return "attention" if "scaled_dot_product" in name else name.strip("_")


def _count(number: int, none: str = "") -> str:
    for unit, name in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= 10 * unit:
            return f"{number / unit:.0f}{name}"
        if number >= unit:
            return f"{number / unit:.1f}{name}"
    return str(number) if number else none
