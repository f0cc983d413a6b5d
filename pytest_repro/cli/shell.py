"""What the commands share: the app, its consoles, how an error is told, arguments that several take."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from .. import __version__
from ..engines.base import check_options, check_tables
from ..errors import ReproError
from ..store import typed
from ..suite import SUITE_FILE, Overrides, Suite, defaults_around, load, parse_engine_option
from ..text import inert

app = typer.Typer(
    help="Review golden generations recorded by pytest --repro-update.", no_args_is_help=True, add_completion=False,
    pretty_exceptions_enable=False,
)  # fmt: skip
console = Console(highlight=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, soft_wrap=True)

Where = Annotated[Path, typer.Argument(help="A suite's folder, or a folder of suites.", show_default=True)]
AsJson = Annotated[bool, typer.Option("--as-json", help="Print JSON for scripts.")]


def as_data(data: Any) -> None:
    """Print JSON for scripts; what a CI runner reads anywhere in a line is spelt out in it."""
    print(json.dumps(data, indent=1).replace("##[", "#\\u0023["))


def say(line: str, style: str = "") -> None:
    """A line for a person; nothing of it acts."""
    console.print(Text(inert(line), style=style))


def suite_at(path: Path, named: Sequence[str], **others: Any) -> Suite:
    """The suite of a command's argument: its folder or its suite.toml, with what the user named.

    Args:
        path: as it was typed.
        named: `--engine-option`, as they were typed.
        others: fields of `Overrides`.

    Raises:
        ConfigError: with file, line and field.
    """
    folder = path.parent if path.name == SUITE_FILE else path
    options = dict(parse_engine_option(text, "--engine-option") for text in named)
    suite = load(folder, Overrides(engine_options=options, **others), defaults_around(folder)[1])
    check_options(suite.engine, suite.user_options, "--engine-option")
    check_tables(suite.engine_tables, typed(folder))
    return suite


def reported(command: Callable[..., Any]) -> Callable[..., Any]:
    """Errors of this package as a message and exit code 2, never a traceback."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except ReproError as exc:
            # A file's name or a report's key is untrusted as well: all of it is spelt out.
            errors.print(Text(inert(f"error: {f'{exc.where}: ' if exc.where else ''}{exc.what}"), style="red"))
            if exc.fix:
                errors.print(Text(inert(f"mend:  {exc.fix}")))
            raise typer.Exit(2) from None
        except OSError as exc:
            where = f"{exc.filename}: " if exc.filename else ""
            errors.print(Text(inert(f"error: {where}{exc.strerror or exc}"), style="red"))
            raise typer.Exit(2) from None

    return run


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        console.print(f"pytest-repro {__version__}")
        raise typer.Exit
