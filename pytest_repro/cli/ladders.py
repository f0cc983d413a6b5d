"""`pytest-repro ladder`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from .. import descent, ladder
from ..descent import Plan
from ..engines.base import check_mode
from ..errors import ConfigError
from ..ladder import Rung
from ..numerics import formats
from ..numerics.formats import Emulation
from ..report import curves as figure
from ..report.progress import Display
from ..store import atomic_write, typed
from ..text import inert
from .shell import AsJson, app, as_data, console, errors, reported, say, suite_at

INTERRUPTED = 130
FIGURE, TABLE = "ladder.svg", "ladder.md"
USUAL = ",".join(ladder.FORMATS)

Formats = Annotated[
    str, typer.Option("--formats", metavar="LIST", help="The rungs, with commas; any e<E>m<M>, walked from wide to narrow.")
]  # fmt: skip
Targets = Annotated[
    str | None,
    typer.Option(
        "--targets", metavar="LIST", help="What is rounded, of weights,activations,kv; all three unless named."
    ),
]
Scale = Annotated[
    str | None,
    typer.Option(
        "--scale",
        help="What shares a scale: tensor, channel, blockN or unscaled. Without it channel; none for 8 exponent bits.",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out", help="Folder for ladder.jsonl, .md and .svg; ladder/SUITE unless named. A walk that stopped goes on."
    ),
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Prompts decoded together, for accuracy.")]
EngineName = Annotated[
    str | None, typer.Option("--engine", help="In the suite's engine's place: one that emulates formats.")
]
EngineOption = Annotated[
    list[str] | None, typer.Option("--engine-option", metavar="NAME=VALUE", help="As --repro-engine-option; repeatable.")
]  # fmt: skip


@app.command(name="ladder")
@reported
def walk(
    path: Annotated[Path, typer.Argument(help="A suite's folder, with an fp32 golden.")],
    formats_: Formats = USUAL,
    targets: Targets = None,
    scale: Scale = None,
    at_exponent: Annotated[int, typer.Option(min=1, max=8, help="Exponent bits of the curve over mantissa bits.")] = 4,
    at_mantissa: Annotated[int, typer.Option(min=1, max=23, help="Mantissa bits of the curve over exponent bits.")] = 3,
    curves: Annotated[
        bool, typer.Option("--curves/--no-curves", help="Walk the curves' rungs too (never decoded).")
    ] = True,
    accuracy: Annotated[
        bool,
        typer.Option("--accuracy/--no-accuracy", help="Decode the prompts that diverge, for accuracy; or replay only."),
    ] = True,
    batch_size: BatchSize = 32,
    out: Out = None,
    engine: EngineName = None,
    engine_option: EngineOption = None,
    allow_code: Annotated[bool, typer.Option("--allow-code", help="Let the suite's scorer be code.")] = False,
    as_json: AsJson = False,
) -> None:
    """Walk floating-point formats from wide to narrow, and say where the model leaves its fp32 golden.

    Every format is emulated on the same weights: the golden's tokens are replayed in it and held against FP32 (divergent
    prompts, mean |Δlogp|, KL divergence); prompts that diverge are decoded for accuracy. Curves over mantissa bits and over
    exponent bits say which of the two matter more here. docs/ladder.md: how to read it.

    Example: pytest-repro ladder golden/word-problems
    """
    suite = suite_at(path, engine_option or (), batch_size=batch_size, engine=engine)
    plan = _plan(formats_, targets, scale, (at_exponent, at_mantissa) if curves else None, accuracy, allow_code)
    check_mode(suite.engine, formats.mode(plan.rungs[0].name), typed(suite.folder))
    place = out or Path("ladder") / suite.name
    show = Display(f"ladder {suite.name}", lambda: sys.stderr)
    show.first = False  # no line of pytest's is open here
    try:
        rungs = descent.descend(suite, plan, place, show, lambda rung: None if as_json else show.say(_line(rung)))
    except KeyboardInterrupt:
        errors.print(
            Text(inert(f"interrupted; what was done lies in {place}, and the same command goes on"), style="yellow")
        )
        raise typer.Exit(INTERRUPTED) from None
    drawn = ladder.curves(rungs, at_exponent, at_mantissa) if curves else []
    atomic_write(place / TABLE, _markdown(rungs).encode())
    if drawn:
        atomic_write(place / FIGURE, figure.svg(suite.name, drawn).encode())
    if as_json:
        as_data(_data(rungs, drawn))
    else:
        _show(rungs, drawn, place)


def _plan(
    named: str, targets: str | None, scale: str | None, curves: tuple[int, int] | None, accuracy: bool, allow_code: bool
) -> Plan:
    """The rungs of the ladder and of the curves, from wide to narrow.

    Raises:
        ConfigError: a format, a target or a scale that there is not.
    """
    chosen = [formats.parse_format(word.strip(), "--formats") for word in named.split(",") if word.strip()]
    if not chosen:
        raise ConfigError("no format is named", where="--formats", fix=f"--formats {USUAL}")
    layouts = [(f.exponent, f.mantissa) for f in chosen]
    spine = {_emulation(layout, targets, scale).name for layout in layouts}
    if curves is not None:
        exponent, mantissa = curves
        layouts += [(exponent, m) for m in ladder.MANTISSAS] + [(e, mantissa) for e in ladder.EXPONENTS]
    rungs = tuple(_emulation(layout, targets, scale) for layout in ladder.descending(layouts))
    return Plan(rungs, frozenset(spine) if accuracy else frozenset(), allow_code)


def _emulation(layout: tuple[int, int], targets: str | None, scale: str | None) -> Emulation:
    words = [word.strip() for word in targets.split(",") if word.strip()] if targets else []
    name = "-".join([f"e{layout[0]}m{layout[1]}", *words, *([scale] if scale else [])])
    return formats.parse(name, "--targets, --scale")


def _cells(rung: Rung) -> list[str]:
    return [
        rung.mode,
        rung.known_as,
        str(rung.bits),
        f"{rung.divergent} of {rung.prompts}",
        "" if rung.mean_index is None else f"{rung.mean_index:.1f}",
        f"{rung.mean_abs_dlogp:.2g}",
        f"{rung.mean_kl:.2g}",
        "" if rung.accuracy is None else f"{rung.accuracy['now']:.1f} %",
        "" if rung.accuracy is None else f"{rung.accuracy['p_value']:.2g}",
    ]


COLUMNS = ("format", "known as", "bits", "divergent", "first at token", "mean |Δlogp|", "mean KL", "accuracy", "p")


def _line(rung: Rung) -> str:
    scored = "" if rung.accuracy is None else f"accuracy {rung.accuracy['now']:.1f} %, "
    moved = f"{rung.divergent} of {rung.prompts} divergent, KL {rung.mean_kl:.2g}"
    return f"{rung.mode}: {moved}, {scored}{rung.seconds:.0f} s"


def _markdown(rungs: Sequence[Rung]) -> str:
    """Of what the schema let through, or this run made: no cell can act."""
    rows = [COLUMNS, tuple("---" for _ in COLUMNS), *(tuple(_cells(r)) for r in rungs)]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in rows)


def _data(rungs: Sequence[Rung], drawn: Sequence[ladder.Curve]) -> dict[str, Any]:
    fit, left = ladder.exponents(rungs), ladder.left_at(rungs)
    return {
        "rungs": [rung.to_json() for rung in rungs],
        "left_at": left.mode if left else None,
        "curves": [{"varied": c.varied, "fixed": c.fixed, "modes": [r.mode for r in c.rungs]} for c in drawn],
        "splits": [[rung.mode for rung in group] for group in ladder.splits(rungs)],
        "exponents": None if fit is None else vars(fit),
    }


def _show(rungs: Sequence[Rung], drawn: Sequence[ladder.Curve], place: Path) -> None:
    table = Table(*COLUMNS, box=None)
    for rung in rungs:
        table.add_row(*map(Text, _cells(rung)))
    console.print(table)
    if scored := [rung.accuracy for rung in rungs if rung.accuracy]:
        golden, smallest = scored[0]["golden"], scored[0]["smallest_drop"]
        can = "no drop could be shown" if smallest is None else f"a drop of {smallest:.1f} points can be shown"
        say(f"the golden's accuracy: {golden:.1f} %; over {scored[0]['n']} prompts {can}")
    left = ladder.left_at(rungs)
    say(
        f"the model leaves its golden at {left.mode}, {left.bits} bits"
        if left
        else "the model leaves its golden nowhere"
    )
    for rung in rungs:
        for name, why in rung.errors.items():
            say(f"{rung.mode}: prompt {name}: {why}", "red")
    for group in ladder.splits(rungs):
        say(f"{group[0].bits} bits: " + ", ".join(f"{r.format} {r.mean_kl:.2g}" for r in group) + " nats of KL")
    if fit := ladder.exponents(rungs):
        say(
            f"KL as c / ((E + 0.5)^δ (M + 0.5)^ν) over {fit.rungs} rungs: δ {fit.delta:.2f}, ν {fit.nu:.2f}, R² {fit.r2:.2f} "
            "(training, arXiv 2501.02423: δ 3.19, ν 2.95)"
        )
    say(f"written: {place / descent.FILE}, {TABLE}{f', {FIGURE}' if drawn else ''}", "dim")
