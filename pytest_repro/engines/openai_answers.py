"""What servers say of a text, as outputs and scores: everything is looked at before it is believed. Pure.

The dialects find the parts in their servers' JSON; what a part may be, and how parts fit together, is decided here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..generation import FINISH_REASONS, Output, Request, Scores

Data = Mapping[str, Any]
Row = dict[int, float]
"""The best log-probabilities of one step, by token; empty where the server says nothing of it."""


class Malformed(ValueError):
    """An answer that does not hold what it must; the message says what is wrong with it."""


@dataclass(frozen=True)
class Steps:
    """A text that a server generated, token by token."""

    tokens: list[int]
    rows: list[Row]
    """Each step's best log-probabilities, the chosen token's among them."""
    text: str
    reason: str
    counted: Any = None
    """How many tokens the server says it generated; None if it does not."""


def output(request: Request, steps: Steps, max_new_tokens: int) -> Output:
    """A generated text with its numbers, NaN at steps that the server says nothing of.

    Raises:
        Malformed: something is missing, or too short.
    """
    _check_whole(len(steps.tokens), steps.reason, steps.counted, max_new_tokens)
    own = [row.get(token, math.nan) for token, row in zip(steps.tokens, steps.rows, strict=True)]
    second = [_runner_up(token, row) for token, row in zip(steps.tokens, steps.rows, strict=True)]
    gaps = [chosen - best for chosen, (_, best) in zip(own, second, strict=True)]
    return Output(
        id=request.id,
        tokens=np.asarray(steps.tokens, np.int32),
        text=steps.text,
        finish_reason=steps.reason,
        logprob=np.asarray(own, np.float32),
        gap=np.asarray(gaps, np.float32),
        runner_up=np.asarray([token for token, _ in second], np.int32),
        reference_logprob=_watched(request, steps.rows),
    )


def scores(request: Request, rows: Sequence[Row]) -> Scores:
    """The golden's tokens in the log-probabilities of prompt and golden.

    Args:
        request: with the golden's tokens.
        rows: one for each of the golden's tokens, the token's own among them.

    Raises:
        Malformed: a token's own log-probability is missing.
    """
    assert request.reference is not None, "replay needs the golden's tokens"
    wanted = request.reference.tolist()
    for place, (token, row) in enumerate(zip(wanted, rows, strict=True)):
        if token not in row:
            raise Malformed(f"the server's log-probabilities at token {place} leave out the token itself")
    own = np.array([row[token] for token, row in zip(wanted, rows, strict=True)], np.float64)
    best = np.array([max(row.values()) for row in rows], np.float64)
    # Among equals the lowest id: what an argmax over the vocabulary chooses.
    top = [min(token for token, value in row.items() if value == high) for row, high in zip(rows, best, strict=True)]
    second = request.reference_runner_up if request.reference_runner_up is not None else np.full(len(wanted), -1)
    other = np.array([row.get(token, math.nan) for token, row in zip(second.tolist(), rows, strict=True)], np.float64)
    return Scores(
        id=request.id,
        logprob=own.astype(np.float32),
        deficit=(best - own).astype(np.float32),
        top=np.asarray(top, np.int32),
        gap=(own - other).astype(np.float32),
    )


def token_ids(value: Any) -> list[int]:
    """What a server's tokenizer made of a prompt.

    Raises:
        Malformed: no ids.
    """
    if not isinstance(value, list) or not value or not all(type(t) is int and 0 <= t < 2**31 for t in value):
        raise Malformed("the server's tokenizer gave no token ids")
    return value


def row(cells: Iterable[tuple[Any, Any]]) -> Row:
    """One step's log-probabilities, from pairs of token id and number.

    Raises:
        Malformed: none, or what is no id or no number.
    """
    found = {token(key): number(value, "a log-probability") for key, value in cells}
    if not found:
        raise Malformed("the server gave a step without log-probabilities")
    return found


def token(value: Any) -> int:
    """An id, as a number or in digits.

    Raises:
        Malformed: it is none.
    """
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 11:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
        raise Malformed("the server names tokens by their text, not by their ids")
    return value


def number(value: Any, what: str) -> float:
    """A log-probability.

    Raises:
        Malformed: it is none; a hair above zero is rounding, and zero.
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise Malformed(f"{what} is no number: NaN in logits?")
    if value > 1e-4:
        raise Malformed(f"{what} is {value:g}: a log-probability is never positive")
    return min(0.0, float(value))


def table(value: Any, what: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        Malformed: something else.
    """
    if not isinstance(value, dict):
        raise Malformed(f"{what} is missing, or no table")
    return value


def array(value: Any, what: str, length: int | None = None) -> list[Any]:
    """A JSON array, of a length where one is given.

    Raises:
        Malformed: something else.
    """
    if not isinstance(value, list):
        raise Malformed(f"{what} is missing, or no list")
    if length is not None and len(value) != length:
        raise Malformed(f"{what} holds {len(value)} entries, and {length} are needed")
    return value


def finish_reason(value: Any) -> str:
    """Why the text ended.

    Raises:
        Malformed: for a reason that leaves it incomplete, or for none.
    """
    if value not in FINISH_REASONS:
        raise Malformed(f"the text was cut short: finish_reason is {str(value)[:40]!r}")
    return str(value)


def text(value: Any) -> str:
    """A text.

    Raises:
        Malformed: there is none.
    """
    if not isinstance(value, str):
        raise Malformed("the server's answer has no text")
    return value


def choice(data: Data) -> dict[str, Any]:
    """The one choice of an answer in OpenAI's form.

    Raises:
        Malformed: none, or several.
    """
    choices = data.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise Malformed("the server's answer has no choice, or several")
    return choices[0]


def _check_whole(count: int, reason: str, counted: Any, max_new_tokens: int) -> None:
    if isinstance(counted, int) and counted != count:
        raise Malformed(f"the text was cut short: {count} tokens of the {counted} that the server counted")
    if not count or count > max_new_tokens or (reason == "length" and count < max_new_tokens):
        raise Malformed(f"{count} tokens where {max_new_tokens} were asked for, and finish_reason is {reason!r}")


def _runner_up(chosen: int, row: Row) -> tuple[int, float]:
    """(best token beside the chosen one, its log-probability); the lowest id of equals."""
    if not row:
        return -1, math.nan
    others = [(-value, other) for other, value in row.items() if other != chosen]
    if not others:
        raise Malformed("the server gave the chosen token's log-probability alone, without a runner-up")
    value, other = min(others)
    return other, -value


def _watched(request: Request, rows: list[Row]) -> Any:
    """Log-probability of the golden's token at each step, NaN where it is not among the best."""
    if request.reference is None:
        return None
    found = np.full(len(rows), np.nan, np.float32)
    for place, (wanted, row) in enumerate(zip(request.reference.tolist(), rows, strict=False)):
        found[place] = row.get(wanted, math.nan)
    return found
