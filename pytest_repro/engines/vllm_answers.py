"""What vLLM answers, as outputs and scores: its log-probabilities are the best few of each position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..generation import Output, Request, Scores


def output(request: Request, answer: Any, tokenizer: Any) -> Output:
    """One answer of a request, with its numbers.

    Args:
        request: what was asked.
        answer: vLLM's `CompletionOutput` with flat log-probabilities.
        tokenizer: decodes its tokens.
    """
    tokens = np.asarray(answer.token_ids, np.int32)
    rows = [_best(answer.logprobs, i) for i in range(len(tokens))]
    chosen = np.array([row.get(int(token), np.nan) for row, token in zip(rows, tokens, strict=True)], np.float64)
    rivals = [_runner_up(row, int(token)) for row, token in zip(rows, tokens, strict=True)]
    bad = np.flatnonzero(np.isnan(chosen))
    return Output(
        id=request.id,
        tokens=tokens,
        text=str(tokenizer.decode(tokens.tolist(), skip_special_tokens=True)),
        finish_reason="stop" if answer.finish_reason == "stop" else "length",
        logprob=chosen.astype(np.float32),
        gap=np.array([c - lp for c, (_, lp) in zip(chosen, rivals, strict=True)], np.float32),
        runner_up=np.array([token for token, _ in rivals], np.int32),
        reference_logprob=_watched(request, rows),
        error=_broken(answer.finish_reason, bad),
    )


def scored(request: Request, flat: Any) -> Scores:
    """Numbers of one replayed prompt from vLLM's prompt log-probabilities."""
    assert request.reference is not None
    tokens, start = request.reference.tolist(), len(request.tokens)
    rivals = request.reference_runner_up.tolist() if request.reference_runner_up is not None else [-1] * len(tokens)
    rows = [_best(flat, start + i) for i in range(len(tokens))]
    own = np.array([row.get(token, np.nan) for row, token in zip(rows, tokens, strict=True)], np.float64)
    top = [_top(row, token) for row, token in zip(rows, tokens, strict=True)]
    rival = np.array([row.get(r, np.nan) for row, r in zip(rows, rivals, strict=True)], np.float64)
    bad = np.flatnonzero(np.isnan(own))
    return Scores(
        id=request.id,
        logprob=own.astype(np.float32),
        deficit=(np.array([lp for _, lp in top]) - own).astype(np.float32),
        top=np.array([token for token, _ in top], np.int32),
        gap=(own - rival).astype(np.float32),
        error=f"NaN in log-probabilities at token {bad[0]}" if len(bad) else "",
    )


def unscored(request: Request, why: str) -> Scores:
    """A prompt that could not be replayed."""
    count = 0 if request.reference is None else len(request.reference)
    unknown = np.full(count, np.nan, np.float32)
    return Scores(request.id, unknown, unknown, np.full(count, -1, np.int32), unknown, error=why)


def _best(flat: Any, position: int) -> dict[int, float]:
    """Token id -> log-probability, of those that vLLM gave for a position."""
    span = slice(flat.start_indices[position], flat.end_indices[position])
    return dict(zip(flat.token_ids[span], flat.logprobs[span], strict=True))


def _runner_up(row: dict[int, float], token: int) -> tuple[int, float]:
    """The best token beside one, and its log-probability; (-1, NaN) if vLLM gave none."""
    others = [(lp, -t) for t, lp in row.items() if t != token]
    if not others:
        return -1, float("nan")
    lp, negative = max(others)
    return -negative, lp


def _watched(request: Request, rows: Sequence[dict[int, float]]) -> Any:
    """The golden's tokens' log-probability at each step; NaN beyond its end, or where it is not among the best."""
    if request.reference is None:
        return None
    tokens = request.reference.tolist()
    found = [row.get(tokens[i], np.nan) if i < len(tokens) else np.nan for i, row in enumerate(rows)]
    return np.array(found, np.float32)


def _top(row: dict[int, float], golden: int) -> tuple[int, float]:
    """The best token and its log-probability; among equals the golden's own, since greedy decoding may take any."""
    return max(row.items(), key=lambda item: (item[1], item[0] == golden))


def _broken(finish_reason: str | None, bad: Any) -> str:
    """Why an answer is none; empty if it is one."""
    if finish_reason not in ("stop", "length"):
        return f"vLLM ended the answer: {finish_reason}"
    return f"NaN in log-probabilities at token {bad[0]}" if len(bad) else ""
