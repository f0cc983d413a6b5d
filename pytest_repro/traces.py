"""Token by token: what a report needs to draw a prompt's course, and how far all tokens of a suite moved.

Follows on the verdicts, and changes none. The worst prompts are traced first; a large suite's calm ones are left out, so
that a report stays a size that a browser opens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .comparison import logprob_of_golden_token
from .generation import Generation, Scores
from .golden import Golden
from .noise import bulk_ratio
from .result import PromptResult, SuiteResult
from .suite import Prompt
from .verdict import ALWAYS_FAIL, WORST_FIRST

MOST_TOKENS = 50_000
"""Golden tokens traced in one suite and mode."""
EDGES = np.logspace(-9, 1, 41)
"""Bins of |Δlogp|, nats, four a decade: from far below FP32's rounding to a token that became impossible."""
Floats = NDArray[np.float64]
Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Trace:
    """The golden's K tokens, and what became of each under the golden's own prefix. None: not observed."""

    tokens: list[str]
    runner_up: list[str]
    """The golden's second choice at each position."""
    logprob: list[float | None]
    """The golden's log-probability of its token."""
    gap: list[float | None]
    """The golden's gap to that second choice, nats."""
    dlogp: list[float | None]
    """Log-probability of the golden's token, now less then, nats."""
    gap_now: list[float | None]
    """The gap of the same two tokens now, nats; negative once the second choice has overtaken."""
    deficit: list[float | None]
    """How far the golden's token lies below the best one now, nats."""


@dataclass(frozen=True)
class Distribution:
    """How far the compared tokens of a suite moved: counts of |Δlogp|."""

    edges: list[float]
    """E + 1 edges, nats; the outermost bins hold what lies beyond them as well."""
    counts: list[int]
    zeros: int
    """Tokens that did not move by a bit."""


def described(golden: Golden) -> dict[str, Any]:
    """The golden's envelope, as a result names it."""
    noise = golden.noise
    return {
        "mean_abs_dlogp": noise.mean_abs_dlogp,
        "max_abs_dlogp": max((v.max_abs_dlogp for v in noise.variants), default=0.0),
        "max_deficit": noise.max_deficit,
        "bulk_ratio": bulk_ratio(golden.compute_class),
        "variants": [v.name for v in noise.variants],
    }


def traced(
    result: SuiteResult,
    prompts: Sequence[Prompt],
    golden: Golden,
    scores: Mapping[str, Scores],
    now: Generation | None,
    decode: Decode,
) -> SuiteResult:
    """The result with its distribution, its worst prompts' traces, and whole texts of what differs.

    Args:
        result: judged.
        prompts: of the suite.
        golden: what it was judged against.
        scores: prompt id -> its replay, of those that were replayed.
        now: what was decoded, if anything was.
        decode: token ids as text.
    """
    there = golden.generation.index()
    decoded = now.index() if now is not None else {}
    asked = {p.id: p.content for p in prompts}
    moved: list[Floats] = []
    room, found = MOST_TOKENS, {}
    for prompt in sorted(result.prompts, key=_severity):
        if prompt.verdict in ALWAYS_FAIL:
            continue
        row = there[prompt.id]
        if prompt.id in scores:  # sees the whole text
            columns = _replayed(golden.generation, row, scores[prompt.id])
        elif now is not None and prompt.id in decoded:
            columns = _decoded(golden.generation, row, now, decoded[prompt.id])
        else:
            continue
        moved.append(columns[0])
        if golden.generation.length(row) <= room:
            room -= golden.generation.length(row)
            text = None if now is None or prompt.id not in decoded else now.texts[decoded[prompt.id]]
            found[prompt.id] = _with_trace(prompt, asked[prompt.id], golden.generation, row, columns, text, decode)
    return replace(
        result,
        prompts=tuple(found.get(p.id, p) for p in result.prompts),
        envelope=described(golden),
        distribution=asdict(_distribution(moved)),
    )


def _severity(prompt: PromptResult) -> tuple[int, float, float]:
    """Sorts the worst prompt first: by verdict, by deficit, by how far it moved."""
    deficit = np.inf if prompt.deficit is None else prompt.deficit
    return WORST_FIRST.index(prompt.verdict), -deficit, -(prompt.mean_abs_dlogp or 0.0)


def _with_trace(
    prompt: PromptResult,
    content: str | list[dict[str, str]],
    golden: Generation,
    row: int,
    columns: tuple[Floats, Floats, Floats],
    text: str | None,
    decode: Decode,
) -> PromptResult:
    span = golden.span(row)
    dlogp, gap_now, deficit = columns
    trace = Trace(
        tokens=[decode([t]) for t in golden.tokens[span].tolist()],
        runner_up=[decode([t]) if t >= 0 else "" for t in golden.runner_up[span].tolist()],
        logprob=_short(golden.logprob[span]),
        gap=_short(golden.gap[span]),
        dlogp=_short(dlogp),
        gap_now=_short(gap_now),
        deficit=_short(deficit),
    )
    differs = prompt.divergence_index is not None
    return replace(
        prompt,
        prompt=content if isinstance(content, str) else json.dumps(content, ensure_ascii=False),
        golden_full=golden.texts[row] if differs else None,
        now_full=text if differs else None,
        trace=asdict(trace),
    )


def _replayed(golden: Generation, row: int, scores: Scores) -> tuple[Floats, Floats, Floats]:
    span = golden.span(row)
    return (
        scores.logprob.astype(np.float64) - golden.logprob[span],
        scores.gap.astype(np.float64),
        scores.deficit.astype(np.float64),
    )


def _decoded(golden: Generation, row: int, now: Generation, place: int) -> tuple[Floats, Floats, Floats]:
    """What decoding saw of the golden's tokens: everything before the first divergence, and that place."""
    then, here = golden.span(row), now.span(place)
    common = min(then.stop - then.start, here.stop - here.start)
    at, at_now = np.arange(then.start, then.start + common), np.arange(here.start, here.start + common)
    same = golden.tokens[at] == now.tokens[at_now]
    alike = np.logical_and.accumulate(same)
    seen = np.concatenate([[True], alike[:-1]])[:common]
    dlogp = logprob_of_golden_token(golden, now, at, at_now) - golden.logprob[at]
    pair = alike & (golden.runner_up[at] == now.runner_up[at_now])
    out = np.full((3, then.stop - then.start), np.nan)
    out[0, :common] = np.where(seen, dlogp, np.nan)
    out[1, :common] = np.where(pair, now.gap[at_now], np.nan)
    out[2, :common] = np.where(alike, 0.0, np.nan)
    return out[0], out[1], out[2]


def _distribution(moved: Sequence[Floats]) -> Distribution:
    every = np.abs(np.concatenate(moved)) if moved else np.zeros(0)
    every = every[np.isfinite(every)]
    some = np.clip(every[every > 0], EDGES[0], EDGES[-1])
    return Distribution(EDGES.tolist(), np.histogram(some, EDGES)[0].tolist(), int((every == 0).sum()))


def _short(values: NDArray[Any]) -> list[float | None]:
    """Four significant digits: a plot needs no more, and a report of ten thousand tokens stays small."""
    return [float(f"{v:.4g}") if np.isfinite(v) else None for v in values.tolist()]
