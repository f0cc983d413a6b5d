"""A golden beside what came now: where outputs first part, by how much, and how far every token moved.

Two kinds of evidence, the same columns:

* decode: the model generated again. Numbers compare while the prefix agrees, up to and including the first divergence.
* replay: the model scored the golden's own tokens (teacher forcing). Numbers compare at every position.

Everything is array arithmetic over the whole suite at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .generation import Generation, Scores, offsets_of, pack

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Row:
    """One prompt of a `Comparison`; the fields are described there."""

    divergence_index: float
    deficit: float
    deficit_index: float
    golden_gap: float
    token_now: float
    mean_abs_dlogp: float
    mean_abs_dgap: float
    moved: int
    passed_over: float
    unmoved: bool


def finite(value: float) -> float | None:
    """The number, or None for NaN and infinity: what reports and goldens hold."""
    return value if np.isfinite(value) else None


@dataclass(frozen=True)
class Comparison:
    """P prompts compared; every column has shape (P,)."""

    ids: tuple[str, ...]
    divergence_index: Ints
    """First position whose token differs (arXiv 2506.09501 §3.1: tokens before it are the same); -1 if none does."""
    deficit: Floats
    """Largest deficit max(l) - l[golden token] given the golden's own prefix, nats; 0 without divergence, inf unknown."""
    deficit_index: Ints
    """Where that largest deficit is; -1 without divergence."""
    golden_gap: Floats
    """The golden's recorded gap to its runner-up at the divergence, nats; NaN without divergence."""
    token_now: Ints
    """Token chosen now at the divergence; -1 without divergence or where the text ended there."""
    mean_abs_dlogp: Floats
    """Mean |log-probability of the golden's token, now less then| over the compared positions, nats; NaN if unknown."""
    max_abs_dlogp: Floats
    """The largest of them."""
    max_abs_dgap: Floats
    """Largest change of the gap to the recorded runner-up, nats; decoding sees it where that is the runner-up now."""
    mean_abs_dgap: Floats
    """Its mean |change|."""
    compared: Ints
    """Positions whose log-probabilities were compared."""
    moved: Ints
    """Positions at which the log-probability or the gap has other bits, as far as both are known."""
    passed_over: Floats
    """How much likelier than the token chosen at the divergence another one was, nats; 0 where the choice was greedy."""
    unmoved: NDArray[np.bool_]
    """Another token was chosen where two were tied in the recording and are now, and nothing moved up to there: to the bit."""

    def __len__(self) -> int:
        return len(self.ids)

    def row(self, i: int) -> Row:
        """One prompt's numbers."""
        return Row(**{name: getattr(self, name)[i].item() for name in Row.__dataclass_fields__})

    @property
    def differs(self) -> NDArray[np.bool_]:
        """Prompts with a divergence."""
        return self.divergence_index >= 0


def compare_replay(golden: Generation, scores: Sequence[Scores]) -> Comparison:
    """The golden's tokens under the current model, at every position.

    Args:
        golden: the recorded generation.
        scores: replays of some of its prompts, each of the golden's length.
    """
    place = golden.index()
    rows = np.array([place[s.id] for s in scores], dtype=np.int64)
    at, owner, starts = _flatten(golden.offsets[rows], np.diff(golden.offsets)[rows])
    logprob, deficit = pack([s.logprob for s in scores], np.float64), pack([s.deficit for s in scores], np.float64)
    top, gap = pack([s.top for s in scores], np.int64), pack([s.gap for s in scores], np.float64)
    flipped = top != golden.tokens[at]
    first = _first(flipped, owner, starts, len(rows))
    # An unknown deficit is the worst there is: it must not hide behind a known one.
    deficit = np.where(flipped & np.isnan(deficit), np.inf, deficit)
    worst = _argmax(np.where(flipped, deficit, -1.0), owner, starts, len(rows))
    dlogp = np.abs(logprob - golden.logprob[at])
    dgap = np.abs(gap - golden.gap[at])
    hit, flat = first >= 0, starts[:-1] + np.maximum(first, 0)
    return Comparison(
        ids=tuple(s.id for s in scores),
        divergence_index=first,
        deficit=np.where(hit, _take(deficit, starts[:-1] + np.maximum(worst, 0), 0.0), 0.0),
        deficit_index=np.where(hit, worst, -1),
        golden_gap=np.where(hit, _take(golden.gap[at], flat, np.nan), np.nan),
        token_now=np.where(hit, _take(top, flat, -1), -1),
        mean_abs_dlogp=_mean(dlogp, owner, len(rows)),
        max_abs_dlogp=_max(dlogp, starts),
        max_abs_dgap=_max(dgap, starts),
        mean_abs_dgap=_mean(dgap, owner, len(rows)),
        compared=np.diff(starts),
        moved=_moved(dlogp, dgap, owner, len(rows)),
        passed_over=np.zeros(len(rows)),
        unmoved=np.zeros(len(rows), dtype=bool),
    )


def compare_decode(golden: Generation, now: Generation) -> Comparison:
    """A golden beside a new generation of some of its prompts.

    A text that ends where the golden goes on, or the other way round, differs at that position.
    """
    place = golden.index()
    rows = np.array([place[name] for name in now.ids], dtype=np.int64)
    lengths, now_lengths = np.diff(golden.offsets)[rows], np.diff(now.offsets)
    common = np.minimum(lengths, now_lengths)
    at, owner, starts = _flatten(golden.offsets[rows], common)
    at_now, _, _ = _flatten(now.offsets[:-1], common)
    first = _first(golden.tokens[at] != now.tokens[at_now], owner, starts, len(rows))
    ended_early = (first < 0) & (lengths != now_lengths)
    first = np.where(ended_early, common, first)
    hit = first >= 0

    seen = np.arange(len(at)) - starts[owner] <= np.where(hit, first, common)[owner]
    dlogp = np.abs(logprob_of_golden_token(golden, now, at, at_now) - golden.logprob[at].astype(np.float64))
    dlogp = np.where(seen, dlogp, np.nan)
    dgap = np.where(seen, _gaps_moved(golden, now, at, at_now), np.nan)

    inside = hit & ~ended_early
    then = golden.offsets[:-1][rows] + np.where(inside, first, 0)
    here = now.offsets[:-1] + np.where(inside, first, 0)
    deficit = _deficit_at(golden, now, then, here)
    gap = _take(now.gap, here, np.nan).astype(np.float64)
    tied = (gap == 0) & (_take(golden.gap, then, np.nan) == 0)
    changed = np.bincount(owner[seen & ((dlogp != 0) | (dgap > 0))], minlength=len(rows)) > 0
    return Comparison(
        ids=now.ids,
        divergence_index=first,
        deficit=np.where(inside, deficit, np.where(hit, np.inf, 0.0)),
        deficit_index=first,
        golden_gap=np.where(inside, _take(golden.gap, then, np.nan), np.nan),
        token_now=np.where(inside, _take(now.tokens, here, -1), -1),
        mean_abs_dlogp=_mean(dlogp, owner, len(rows)),
        max_abs_dlogp=_max(dlogp, starts),
        max_abs_dgap=_max(dgap, starts),
        mean_abs_dgap=_mean(dgap, owner, len(rows)),
        compared=np.bincount(owner[seen], minlength=len(rows)).astype(np.int64),
        moved=_moved(dlogp, dgap, owner, len(rows)),
        passed_over=np.where(inside, np.fmax(0.0, -gap), 0.0),
        unmoved=inside & tied & ~changed,
    )


def _gaps_moved(golden: Generation, now: Generation, at: Ints, at_now: Ints) -> Floats:
    """|Change of the gap| at flat positions, where the same two tokens are the best; NaN elsewhere."""
    same = (golden.tokens[at] == now.tokens[at_now]) & (golden.runner_up[at] == now.runner_up[at_now])
    out: Floats = np.where(same, np.abs(now.gap[at_now].astype(np.float64) - golden.gap[at]), np.nan)
    return out


def _deficit_at(golden: Generation, now: Generation, then: Ints, here: Ints) -> Floats:
    """max(l) - l[golden token] where the texts part: watched, or the gap if the golden's token is the runner-up now.

    Greedy decoding chooses the largest logit, so the deficit is the chosen token's log-probability less the golden's.
    """
    chosen = _take(now.logprob, here, np.nan).astype(np.float64)
    runner_up = np.where(
        _take(now.runner_up, here, -1) == _take(golden.tokens, then, -2), _take(now.gap, here, np.nan), np.inf
    )
    if now.reference_logprob is None:
        return np.where(np.isnan(runner_up), np.inf, runner_up)
    watched = chosen - _take(now.reference_logprob, here, np.nan)
    # What was watched is exact. Below zero, the golden's token is the likelier one and was passed over: a sampler that is
    # not greedy, by so much.
    known = np.where(np.isnan(watched), runner_up, np.abs(watched))
    out: Floats = np.where(np.isnan(known), np.inf, known)
    return out


def logprob_of_golden_token(golden: Generation, now: Generation, at: Ints, at_now: Ints) -> Floats:
    """Log-probability now of the golden's token at flat positions `at`, decoded at `at_now`; NaN where it was not seen."""
    same = golden.tokens[at] == now.tokens[at_now]
    own = np.where(same, now.logprob[at_now], np.nan).astype(np.float64)
    if now.reference_logprob is None:
        return own
    out: Floats = np.where(same, own, now.reference_logprob[at_now])
    return out


def _flatten(starts: Ints, lengths: Ints) -> tuple[Ints, Ints, Ints]:
    """Rows given by start and length -> (flat source index, owner row, offsets of the flattened rows)."""
    offsets = offsets_of(lengths)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    return np.arange(offsets[-1]) - offsets[owner] + np.asarray(starts)[owner], owner, offsets


def _first(mask: NDArray[np.bool_], owner: Ints, starts: Ints, rows: int) -> Ints:
    """Position within its row of each row's first True; -1 if there is none."""
    out = np.full(rows, -1, dtype=np.int64)
    where = np.flatnonzero(mask)[::-1]
    out[owner[where]] = where - starts[owner[where]]  # the earliest is written last
    return out


def _argmax(values: Floats, owner: Ints, starts: Ints, rows: int) -> Ints:
    """Position within its row of each row's largest value; the earliest of equals; -1 for an empty row."""
    return _first(values == _max(values, starts)[owner], owner, starts, rows)


def _mean(values: Floats, owner: Ints, rows: int) -> Floats:
    """Mean of each row's numbers, NaN entries left out; NaN for a row without any."""
    good = ~np.isnan(values)
    total = np.bincount(owner[good], weights=values[good], minlength=rows)
    count = np.bincount(owner[good], minlength=rows)
    out: Floats = np.divide(total, count, out=np.full(rows, np.nan), where=count > 0)
    return out


def _moved(dlogp: Floats, dgap: Floats, owner: Ints, rows: int) -> Ints:
    """How many of each row's positions have a difference that is not zero; NaN entries are none."""
    return np.bincount(owner[(dlogp > 0) | (dgap > 0)], minlength=rows).astype(np.int64)


def _max(values: Floats, starts: Ints) -> Floats:
    """Each row's largest number, NaN entries left out; NaN for a row without any."""
    out = np.full(len(starts) - 1, np.nan)
    filled = np.diff(starts) > 0  # empty rows take no place, so the filled ones lie end to end
    if filled.any():
        out[filled] = np.fmax.reduceat(values, starts[:-1][filled])
    return out


def _take(column: NDArray[Any], index: Ints, otherwise: float) -> NDArray[Any]:
    """column[index], or `otherwise` where the index is past the end (an empty row's place)."""
    if len(column) == 0:
        return np.full(len(index), otherwise)
    return np.where(index < len(column), column[np.minimum(index, len(column) - 1)], otherwise)
