"""What a server's JSON says, as outputs and scores: everything is looked at before it is believed. Pure.

Token ids come as vLLM gives them with `return_token_ids` and `return_tokens_as_token_ids`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..generation import FINISH_REASONS, Output, Request, Scores

Data = Mapping[str, Any]
_ID = "token_id:"


class Malformed(ValueError):
    """An answer that does not hold what it must; the message says what is wrong with it."""


def output(request: Request, data: Data, max_new_tokens: int) -> Output:
    """A completion with token ids and the best log-probabilities of each step.

    Raises:
        Malformed: something is missing, too short, or no number.
    """
    choice = _choice(data)
    if (echoed := choice.get("prompt_token_ids")) is not None and echoed != request.tokens.tolist():
        raise Malformed("the server answered another prompt: it added tokens, or took some away")
    tokens, rows = _steps(choice)
    reason = _finish_reason(choice)
    _check_whole(len(tokens), reason, data.get("usage"), max_new_tokens)
    chosen = [row[token] for token, row in zip(tokens, rows, strict=True)]
    second = [_runner_up(token, row) for token, row in zip(tokens, rows, strict=True)]
    return Output(
        id=request.id,
        tokens=np.asarray(tokens, np.int32),
        text=_text(choice),
        finish_reason=reason,
        logprob=np.asarray(chosen, np.float32),
        gap=np.asarray([max(0.0, own - best) for own, (_, best) in zip(chosen, second, strict=True)], np.float32),
        runner_up=np.asarray([token for token, _ in second], np.int32),
        reference_logprob=_watched(request, rows),
    )


def text_output(request: Request, data: Data) -> Output:
    """An answer of which only the text is known: its UTF-8 bytes as tokens, and no numbers.

    Raises:
        Malformed: there is no text, or it did not end.
    """
    choice = _choice(data)
    reason = _finish_reason(choice)
    message = choice.get("message")
    text = _text({"text": message.get("content")} if isinstance(message, dict) else choice)
    if not text and reason != "stop":
        raise Malformed("the server answered with an empty text, and did not end it")
    tokens = np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.int32)
    unknown = np.full(len(tokens), np.nan, np.float32)
    return Output(
        request.id, tokens, text, reason, logprob=unknown, gap=unknown, runner_up=np.full(len(tokens), -1, np.int32)
    )


def scores(request: Request, data: Data) -> Scores:
    """The golden's tokens in the `prompt_logprobs` of prompt and golden.

    Raises:
        Malformed: as `output`.
    """
    assert request.reference is not None, "replay needs the golden's tokens"
    rows = prompt_rows(data, len(request.tokens) + len(request.reference))[len(request.tokens) :]
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


def prompt_rows(data: Data, length: int) -> list[dict[int, float]]:
    """Each prompt token's best log-probabilities, its own among them; the first has none.

    Raises:
        Malformed: none, or not of this length.
    """
    listed = _choice(data).get("prompt_logprobs")
    if not isinstance(listed, list) or len(listed) != length:
        found = len(listed) if isinstance(listed, list) else "no"
        raise Malformed(f"the server gave {found} prompt_logprobs for {length} tokens")
    tables = [_dict(row) for row in listed[1:]]
    return [{}, *(_row({token: _dict(cell).get("logprob") for token, cell in table.items()}) for table in tables)]


def decoded(data: Data) -> dict[int, str]:
    """Token id -> text, as far as `prompt_logprobs` tells."""
    rows = [row for row in _choice(data).get("prompt_logprobs") or [] if isinstance(row, dict)]
    pairs = [(key, cell.get("decoded_token")) for row in rows for key, cell in row.items() if isinstance(cell, dict)]
    return {_token(key): text for key, text in pairs if isinstance(text, str)}


def step_rows(data: Data) -> list[list[float]]:
    """Each step's best log-probabilities, in no order; for `outside.grid`.

    Raises:
        Malformed: as `output`.
    """
    return [list(row.values()) for row in _steps(_choice(data))[1]]


def _choice(data: Data) -> dict[str, Any]:
    choices = data.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise Malformed("the server's answer has no choice, or several")
    return choices[0]


def _steps(choice: dict[str, Any]) -> tuple[list[int], list[dict[int, float]]]:
    """(chosen tokens, each step's log-probabilities by token, the chosen one's among them)."""
    logprobs = choice.get("logprobs")
    if not isinstance(logprobs, dict):
        raise Malformed("the server gave no log-probabilities")
    named = logprobs.get("tokens")
    given = named if choice.get("token_ids") is None else choice["token_ids"]
    tops, own = logprobs.get("top_logprobs"), logprobs.get("token_logprobs")
    if not isinstance(given, list) or not isinstance(tops, list) or not isinstance(own, list):
        raise Malformed("the server's log-probabilities lack tokens, token_logprobs or top_logprobs")
    if not len(given) == len(tops) == len(own):
        raise Malformed(f"{len(given)} tokens, but log-probabilities of {len(own)} and the best of {len(tops)}")
    tokens = [_token(value) for value in given]
    rows = [_row(_dict(top)) for top in tops]
    for place, (token, row, value) in enumerate(zip(tokens, rows, own, strict=True)):
        row[token] = _number(value, f"the log-probability of token {place}")
    return tokens, rows


def _check_whole(count: int, reason: str, usage: Any, max_new_tokens: int) -> None:
    counted = usage.get("completion_tokens") if isinstance(usage, dict) else None
    if isinstance(counted, int) and counted != count:
        raise Malformed(f"the text was cut short: {count} tokens of the {counted} that the server counted")
    if not count or count > max_new_tokens or (reason == "length" and count < max_new_tokens):
        raise Malformed(f"{count} tokens where {max_new_tokens} were asked for, and finish_reason is {reason!r}")


def _runner_up(token: int, row: dict[int, float]) -> tuple[int, float]:
    """(best token beside the chosen one, its log-probability); the lowest id of equals."""
    others = [(-value, other) for other, value in row.items() if other != token]
    if not others:
        raise Malformed("the server gave the chosen token's log-probability alone, without a runner-up")
    value, other = min(others)
    return other, -value


def _watched(request: Request, rows: list[dict[int, float]]) -> Any:
    """Log-probability of the golden's token at each step, NaN where it is not among the best."""
    if request.reference is None:
        return None
    found = np.full(len(rows), np.nan, np.float32)
    for place, (token, row) in enumerate(zip(request.reference.tolist(), rows, strict=False)):
        found[place] = row.get(token, math.nan)
    return found


def _row(cells: dict[str, Any]) -> dict[int, float]:
    if not cells:
        raise Malformed("the server gave a step without log-probabilities")
    return {_token(key): _number(value, "a log-probability") for key, value in cells.items()}


def _dict(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Malformed("the server's log-probabilities of a step are no table")
    return value


def _token(value: Any) -> int:
    """7, "7" or "token_id:7"."""
    text = value.removeprefix(_ID) if isinstance(value, str) else value
    if isinstance(text, str) and text.isascii() and text.isdigit() and len(text) < 11:
        text = int(text)
    if not isinstance(text, int) or isinstance(text, bool) or not 0 <= text < 2**31:
        raise Malformed("the server names tokens by their text, not by their ids")
    return text


def _number(value: Any, what: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise Malformed(f"{what} is no number: NaN in logits?")
    if value > 1e-4:
        raise Malformed(f"{what} is {value:g}: a log-probability is never positive")
    return min(0.0, float(value))


def _finish_reason(choice: dict[str, Any]) -> str:
    reason = choice.get("finish_reason")
    if reason not in FINISH_REASONS:
        raise Malformed(f"the text was cut short: finish_reason is {str(reason)[:40]!r}")
    return str(reason)


def _text(choice: Mapping[str, Any]) -> str:
    text = choice.get("text")
    if not isinstance(text, str):
        raise Malformed("the server's answer has no text")
    return text
