"""Histograms on a logarithmic axis, as places in per cent: the HTML report draws them without a script, at any width."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

MOST_BINS = 40


@dataclass(frozen=True)
class Bar:
    """One bin. Places and sizes are per cent of the axis and of the highest bar."""

    x: float
    width: float
    height: float
    count: int
    low: float
    high: float
    beyond: bool
    """Whether it lies beyond what rounding explains."""


@dataclass(frozen=True)
class Mark:
    """A value on the axis: a tick, or a line that a reader compares the bars with."""

    x: float
    value: float
    label: str = ""


@dataclass(frozen=True)
class Histogram:
    """Bars, ticks and lines."""

    bars: tuple[Bar, ...]
    ticks: tuple[Mark, ...]
    lines: tuple[Mark, ...]
    total: int
    """Values counted, those without a place on the axis left out."""
    beyond: int
    """How many of them lie beyond what rounding explains."""
    zeros: int = 0
    """Values of zero, which a logarithmic axis has no place for."""


def number(value: Any) -> float | None:
    """A number of the report as a finite float; None if it is none. A report that was read may hold anything."""
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def token_moves(distribution: Mapping[str, Any], lines: Mapping[str, float | None]) -> Histogram | None:
    """How far the tokens moved, cut to the bins that hold some and to the lines.

    Args:
        distribution: `suites[].distribution`.
        lines: label -> where the line stands, nats; the last one is the largest benign move.
    """
    edges, counts = list(distribution["edges"]), list(distribution["counts"])
    full = [i for i, n in enumerate(counts) if n]
    known = {label: value for label, v in lines.items() if (value := number(v)) is not None and value > 0}
    if not full or len(edges) != len(counts) + 1 or any(not (number(e) or 0) > 0 for e in edges):
        return None
    inside = [_bin(edges, value) for value in known.values()]
    first, last = min([*full, *inside]), max([*full, *inside])
    limit = list(known.values())[-1] if known else math.inf
    return _histogram(edges[first : last + 2], counts[first : last + 1], known, limit, int(distribution["zeros"]))


def prompt_moves(ratios: Sequence[float], limit: float | None) -> Histogram | None:
    """How many times its benign level each prompt moved.

    Args:
        ratios: mean |Δlogp| now over the benign one.
        limit: the ratio that rounding still explains; None if it is unknown.
    """
    some = [r for r in ratios if r > 0]
    if not some:
        return None
    anchor = limit if limit and limit > 0 else 1.0
    low, high = min([*some, 1.0, anchor]), max([*some, 1.0, anchor])
    a_decade = next((n for n in (32, 16, 8, 4, 2) if math.log10(high / low) * n < MOST_BINS - 4), 1)
    # An edge lies on the limit: no bar straddles it.
    first, last = (math.floor(math.log10(v / anchor) * a_decade) for v in (low, high))
    edges = [anchor * 10 ** (k / a_decade) for k in range(first - 1, last + 3)]
    counts = [0] * (len(edges) - 1)
    for ratio in some:
        # A prompt that lies exactly on the limit is still explained.
        counts[min(_bin(edges, ratio) - (ratio == anchor), len(counts) - 1)] += 1
    lines = {"benign": 1.0} | ({"limit": limit} if limit else {})
    return _histogram(edges, counts, lines, limit or math.inf, len(ratios) - len(some))


def _bin(edges: Sequence[float], value: float) -> int:
    return min(max(bisect_right(edges, value) - 1, 0), len(edges) - 2)


def _histogram(
    edges: Sequence[float], counts: Sequence[int], lines: Mapping[str, float], limit: float, zeros: int
) -> Histogram:
    low, high, most = math.log10(edges[0]), math.log10(edges[-1]), max(counts)

    def place(value: float) -> float:
        return round(100 * min(max((math.log10(value) - low) / (high - low), 0), 1), 2)

    bars = tuple(
        Bar(place(a), round(place(b) - place(a), 2), round(100 * n / most, 2), n, a, b, a >= limit * (1 - 1e-9))
        for (a, b), n in zip(pairwise(edges), counts, strict=True)
        if n
    )
    return Histogram(
        bars=bars,
        ticks=tuple(Mark(place(v), v) for v in _ticks(edges[0], edges[-1])),
        lines=tuple(Mark(place(v), v, label) for label, v in lines.items()),
        total=sum(counts) + zeros,
        beyond=sum(bar.count for bar in bars if bar.beyond),
        zeros=zeros,
    )


def _ticks(low: float, high: float) -> list[float]:
    """Powers of ten, at most seven; with 2 and 5 between them where the axis is short."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1, 2, 5) if last - first <= 3 else (1,)
    stride = max(1, math.ceil((last - first) / 7))
    found = [m * 10.0**k for k in range(first, last + 1, stride) for m in steps]
    return [v for v in found if low * 0.999 <= v <= high * 1.001]
