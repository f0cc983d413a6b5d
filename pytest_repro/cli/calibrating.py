"""`pytest-repro calibrate`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from shlex import join
from typing import Annotated

import typer
from rich.text import Text

from .. import calibration, numerics, recording
from ..asking import Options
from ..engines.base import check_options, check_tables
from ..errors import ConfigError
from ..report.progress import Display
from ..result import Calibrated
from ..store import STEM, typed
from ..suite import SUITE_FILE, Overrides, Suite, defaults_around, load, parse_engine_option
from ..text import inert
from .shell import AsJson, app, as_data, console, errors, reported

INTERRUPTED = 130
MOST_FIELDS = 6
"""Fields that are told of what differs."""

Numerics = Annotated[str | None, typer.Option("--numerics", help="As --repro-numerics of the checks on this machine.")]
EngineName = Annotated[str | None, typer.Option("--engine", help="As --repro-engine of those checks.")]
EngineOption = Annotated[
    list[str] | None, typer.Option("--engine-option", metavar="NAME=VALUE", help="As --repro-engine-option; repeatable.")
]  # fmt: skip
GoldenName = Annotated[str | None, typer.Option("--golden", help="As --repro-golden of those checks.")]
BatchSize = Annotated[int | None, typer.Option("--batch-size", min=1, help="As --repro-batch-size of those checks.")]


@app.command()
@reported
def calibrate(
    path: Annotated[Path, typer.Argument(help="A suite's folder.")],
    mode: Numerics = None,
    engine: EngineName = None,
    engine_option: EngineOption = None,
    golden: GoldenName = None,
    batch_size: BatchSize = None,
    as_json: AsJson = False,
) -> None:
    """Measure this machine's rounding for a golden that was recorded on another one, so that checks here take the narrow margin.

    The plain check comes first: where an output drifts, or the suite moves more than the wide margin, this machine is refused
    (exit 1). Otherwise the golden's own tokens are replayed under every benign change, and the golden is left with this
    machine's envelope beside its own, for review (exit 0). Its tokens and its recording stay as they are.

    Example: pytest-repro calibrate golden/word-problems --numerics fp32, then pytest-repro review golden/word-problems
    """
    folder = path.parent if path.name == SUITE_FILE else path
    suite = _suite(folder, mode, engine, engine_option or (), golden, batch_size)
    again = _typed(folder, engine, engine_option or (), golden, batch_size)
    options = Options(golden=golden, trusted_engine=engine is not None, shown_path=typed(folder), again=again)
    chosen = suite.numerics[0]
    show = Display(f"calibrate {suite.name} [{chosen}]", lambda: sys.stderr)
    show.first = False  # no line of pytest's is open here
    try:
        done = recording.calibrate(suite, chosen, options, show)
    except KeyboardInterrupt:
        _tell("interrupted", "nothing was written", "yellow", as_json)
        raise typer.Exit(INTERRUPTED) from None
    if as_json:
        as_data({**asdict(done), "verdict": "refused" if done.refused else "calibrated"})
    else:
        _show(done)
    raise typer.Exit(1 if done.refused else 0)


def _suite(
    folder: Path, mode: str | None, engine: str | None, named: Sequence[str], golden: str | None, batch_size: int | None
) -> Suite:
    """The suite under the options, in the one mode that is asked for.

    Raises:
        ConfigError: a mistake in the suite or in an option, or several modes to choose from.
    """
    if golden and not STEM.fullmatch(golden):
        raise ConfigError(f"{golden!r} is not a golden's name", where="--golden", fix="e.g. bf16 or bf16@cuda-sm90")
    overrides = Overrides(
        engine=engine,
        numerics=(mode,) if mode is not None else None,
        batch_size=batch_size,
        engine_options=dict(parse_engine_option(text) for text in named),
    )
    suite = load(folder, overrides, defaults_around(folder)[1])
    for each in suite.numerics:
        numerics.mode(each)
    if len(suite.numerics) > 1:
        modes = ", ".join(suite.numerics)
        what = f"this suite has several modes, and one golden is calibrated at a time: {modes}"
        raise ConfigError(what, where=typed(folder), fix=f"--numerics {suite.numerics[0]}")
    check_options(suite.engine, suite.user_options, "--engine-option")
    check_tables(suite.engine_tables, typed(folder))
    return suite


def _typed(folder: Path, engine: str | None, named: Sequence[str], golden: str | None, batch_size: int | None) -> str:
    """What pytest is given to check the suite as it is calibrated here."""
    given = {"--repro-engine": engine, "--repro-batch-size": batch_size, "--repro-golden": golden}
    one = [word for name, value in given.items() if value is not None for word in (name, str(value))]
    return join([typed(folder), *one, *(word for text in named for word in ("--repro-engine-option", text))])


def _show(done: Calibrated) -> None:
    _tell("golden", f"{done.golden}.golden, {done.prompts} prompts; this machine: {done.machine}")
    _tell("differs", f"{calibration.told(done.differs, MOST_FIELDS)}: their rounding was not measured")
    for i, line in enumerate(done.checked):
        _tell("" if i else "check", line)
    for i, why in enumerate(("this machine moves more than rounding, and nothing was written", *done.refused)):
        if done.refused:
            _tell("" if i else "refused", why, "red")
    if done.moved:
        _tell("measured", calibration.spoken(done.moved))
        instead = ", in the place of this machine's earlier calibration" if done.replaces else ""
        _tell("candidate", f"{done.candidate}{instead}, {done.seconds:.0f} s", "green")
    for i, (command, when) in enumerate(done.next_steps):
        _tell("" if i else "next", f"{command}   # {when}", "bold")


def _tell(label: str, line: str, style: str = "", aside: bool = False) -> None:
    (errors if aside else console).print(Text(inert(f"{label:<13} {line}"), style=style))
