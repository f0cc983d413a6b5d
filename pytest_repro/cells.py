"""One cell of a study: what was asked, what was in force, what came back; its wire format.

A file of JSON Lines, `schemas/cell.schema.json`: a header, then one line a prompt. It is the study's raw data. What was asked
stands in the header, so that cells of other suites, models or settings are never taken for one study.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from . import schemas
from .dispersion import Answer
from .errors import ConfigError
from .fingerprint import Fingerprint, Value
from .generation import Numbers, Tokens
from .grid import Setting, name_of

SCHEMA = 1
Status = Literal["done", "failed", "contradicted"]
"""`failed`: it broke. `contradicted`: another setting than the one asked for was in force. Neither has answers."""


@dataclass(frozen=True)
class Sample:
    """One sampled output of one prompt."""

    tokens: Tokens
    """Shape (T,)."""
    right: bool | None


@dataclass(frozen=True)
class Row:
    """One prompt's greedy output under the cell's setting, of T tokens, and what was sampled beside it."""

    id: str
    prompt: str
    """`token_digest` of the prompt as the model saw it."""
    tokens: Tokens
    """Shape (T,)."""
    logprob: Numbers
    """Log-probability of each chosen token, nats, shape (T,); NaN where the engine cannot tell."""
    text: str
    finish_reason: str
    right: bool | None
    """None for a prompt without an answer."""
    samples: tuple[Sample, ...] = ()

    @property
    def answer(self) -> Answer:
        """As `dispersion` takes it."""
        return Answer(self.tokens, np.exp(self.logprob.astype(np.float64)), self.right)


@dataclass(frozen=True)
class Cell:
    """One cell of the grid, run once."""

    setting: Setting
    asked: Mapping[str, Value]
    """What all cells of a study share: prompts, tokens, scorer, sampling."""
    status: Status
    error: str = ""
    """Why there are no answers, in the engine's own words; or what contradicts the setting."""
    rows: tuple[Row, ...] = ()
    """In the suite's order."""
    environment: Fingerprint = field(default_factory=dict)
    """Of the process that ran it, as its probe saw it."""
    observed: Mapping[str, Any] | None = None
    """`precision.Observation` of that process."""
    seconds: float = 0.0
    """Of greedy decoding, prompts included, loading not."""
    wall_seconds: float = 0.0
    """Of the whole process."""
    memory: Mapping[str, int] = field(default_factory=dict)
    """Kind of memory -> its peak, bytes (`probe.peak_memory`)."""
    jobs: int = 1
    """Cells that might run beside it, which slows it down."""

    @property
    def name(self) -> str:
        """Its file's name, without the ending."""
        return name_of(self.setting)

    @property
    def tokens_per_second(self) -> float | None:
        """Generated tokens over `seconds`; None if there are none."""
        return sum(len(row.tokens) for row in self.rows) / self.seconds if self.rows and self.seconds > 0 else None

    @property
    def run(self) -> list[Answer]:
        """As `dispersion` takes it."""
        return [row.answer for row in self.rows]

    @property
    def machine(self) -> str:
        """What it ran on: the accelerator, or the processor."""
        device = str(self.environment.get("device", "cpu"))
        return str(self.environment.get("cpu_model", "unknown")) if device == "cpu" else device


def encode(cell: Cell) -> bytes:
    """The file."""
    header = {
        "schema": SCHEMA, "setting": dict(cell.setting), "asked": dict(cell.asked), "status": cell.status, "error": cell.error,
        "prompts": len(cell.rows), "seconds": round(cell.seconds, 6), "wall_seconds": round(cell.wall_seconds, 3), "jobs": cell.jobs,
        "memory": dict(cell.memory), "observed": cell.observed, "environment": dict(cell.environment),
    }  # fmt: skip
    lines = [header, *map(_line, cell.rows)]
    return "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode("ascii")


def _line(row: Row) -> dict[str, Any]:
    line = {
        "id": row.id,
        "prompt": row.prompt,
        "tokens": row.tokens.tolist(),
        "logprob": [float(str(x)) if np.isfinite(x) else None for x in row.logprob],
        "text": row.text,
        "finish_reason": row.finish_reason,
        "right": row.right,
    }
    samples = [{"tokens": s.tokens.tolist(), "right": s.right} for s in row.samples]
    return {**line, "samples": samples} if samples else line


def decode(data: bytes, where: str) -> Cell:
    """A file's cell.

    Raises:
        ConfigError: it is damaged or of another version, with its line and field.
    """
    mend = f"rm {where}, and the study decodes this cell again"
    try:
        lines = [schemas.parse(line) for line in data.decode("utf-8").splitlines()]
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"not JSON Lines: {exc}", where=where, fix=mend) from None
    for number, line in enumerate(lines, 1):
        if error := schemas.first_error(line, "cell", "prompt" if number > 1 else "header"):
            field_name = ".".join(map(str, error.absolute_path))
            raise ConfigError(
                f"{schemas.describe(error)} ({field_name or 'the line'})", where=f"{where}:{number}", fix=mend
            )
    if not lines or len(lines) - 1 != lines[0]["prompts"]:
        raise ConfigError("lines are missing", where=where, fix=mend)
    head, *rows = lines
    if head["status"] == "done" and not rows:
        raise ConfigError("a cell that is done has prompts", where=where, fix=mend)
    if len({len(row.get("samples", ())) for row in rows}) > 1:
        raise ConfigError("prompts were sampled unequally often", where=where, fix=mend)
    for number, row in enumerate(rows, 2):
        if len(row["tokens"]) != len(row["logprob"]):
            raise ConfigError("tokens and logprob differ in length", where=f"{where}:{number}", fix=mend)
    return Cell(
        setting=head["setting"],
        asked=head["asked"],
        status=head["status"],
        error=head["error"],
        rows=tuple(map(_row, rows)),
        environment=head["environment"],
        observed=head["observed"],
        seconds=head["seconds"],
        wall_seconds=head["wall_seconds"],
        memory=head["memory"],
        jobs=head["jobs"],
    )


def _row(line: Mapping[str, Any]) -> Row:
    return Row(
        id=line["id"],
        prompt=line["prompt"],
        tokens=np.asarray(line["tokens"], np.int32),
        logprob=np.asarray([np.nan if x is None else x for x in line["logprob"]], np.float32),
        text=line["text"],
        finish_reason=line["finish_reason"],
        right=line["right"],
        samples=tuple(Sample(np.asarray(s["tokens"], np.int32), s["right"]) for s in line.get("samples", ())),
    )


def differing(then: Mapping[str, Value], now: Mapping[str, Value]) -> list[str]:
    """What two cells were asked otherwise: `max_new_tokens 96 -> 48`, one each."""
    return [f"{k} {_short(then.get(k))} -> {_short(now.get(k))}" for k in {**then, **now} if then.get(k) != now.get(k)]


def _short(value: Value) -> str:
    text = "(not there)" if value is None else str(value)
    return text if len(text) <= 24 else text[:23] + "…"


def of_one_model(cells: Sequence[Cell], fields: Iterable[str]) -> None:
    """Refuse cells whose models or prompts differ.

    Args:
        cells: those with answers.
        fields: identity fields of the fingerprint.

    Raises:
        ConfigError: naming the first two cells that differ, and in what.
    """
    for cell in cells[1:]:
        first = cells[0]
        changed = [name for name in fields if first.environment.get(name) != cell.environment.get(name)]
        if [(r.id, r.prompt) for r in first.rows] != [(r.id, r.prompt) for r in cell.rows]:
            changed.append("prompts")
        if changed:
            raise ConfigError(
                f"{first.name} and {cell.name} are cells of different questions: {', '.join(changed)} differ",
                where="cells",
                fix="give each model and suite a folder of its own: --out FOLDER",
            )
