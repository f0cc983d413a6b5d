"""Figures of a study as places in a drawing: curves over positions, and dots on rows. `page/plots.svg` draws them.

A drawing is 480 units wide, so that its text stays legible where a column is 360 pixels.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 480, 300
LEFT, RIGHT, BOTTOM = 58, 14, 48
LEGEND_ROW = 20
LEGEND_COLUMN = 128
ROW = 46
"""Height of a row of dots."""


@dataclass(frozen=True)
class Tick:
    """A value on an axis."""

    at: float
    label: str


@dataclass(frozen=True)
class Key:
    """An entry of the legend; series are told apart by colour and by dashes."""

    label: str
    index: int
    x: float
    y: float


@dataclass(frozen=True)
class Series:
    """One curve."""

    index: int
    path: str
    """As an SVG path has it."""


@dataclass(frozen=True)
class Dot:
    """Cells that share a value."""

    x: float
    y: float
    radius: float
    count: int
    index: int
    label: str


@dataclass(frozen=True)
class Drawing:
    """One figure."""

    name: str
    title: str
    about: str
    """What it shows, for who cannot see it."""
    x_label: str
    y_label: str
    height: float
    top: float
    bottom: float
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    legend: tuple[Key, ...] = ()
    series: tuple[Series, ...] = ()
    dots: tuple[Dot, ...] = ()
    means: tuple[Tick, ...] = ()
    """Mean of each row of dots: its place, and `x y` of nothing else; the label is the value."""
    width: float = WIDTH
    left: float = LEFT
    right: float = WIDTH - RIGHT


Curve = Sequence[float | None]


def divergence(curves: Mapping[str, Curve], modes: Sequence[str]) -> Drawing:
    """Divergence curves: per cent of prompts whose outputs have parted, by position.

    Args:
        curves: numerics mode -> its per cent at each position from 0.
        modes: all modes of the study: each has its own colour in every figure.
    """
    return _curves(
        "divergence",
        "Prompts whose outputs have diverged",
        curves,
        modes,
        "position in the output, tokens",
        "diverged, % of prompts",
        [Tick(value, f"{value}") for value in (0, 25, 50, 75, 100)],
        logarithmic=False,
    )


def spread(curves: Mapping[str, Curve], modes: Sequence[str]) -> Drawing | None:
    """Standard deviation of the top-1 token's probability, by position, on a logarithmic axis; None if nothing spread."""
    positive = [value for curve in curves.values() for value in curve if value]
    if not positive:
        return None
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    high = max(high, low + 1)
    stride = max(1, math.ceil((high - low) / 6))
    return _curves(
        "spread",
        "Spread of the top-1 probability",
        curves,
        modes,
        "position in the output, tokens",
        "std of probability",
        [Tick(float(power), f"1e{power}") for power in range(low, high + 1, stride)],
        logarithmic=True,
        ends=(low, high),
    )


def _curves(
    name: str,
    title: str,
    curves: Mapping[str, Curve],
    modes: Sequence[str],
    x_label: str,
    y_label: str,
    y_ticks: Sequence[Tick],
    *,
    logarithmic: bool,
    ends: tuple[float, float] = (0, 100),
) -> Drawing:
    legend, top = _legend(list(curves), modes)
    bottom = HEIGHT - BOTTOM
    longest = max((len(curve) for curve in curves.values()), default=1)
    last = max(longest - 1, 1)

    def across(position: float) -> float:
        return round(LEFT + (WIDTH - RIGHT - LEFT) * position / last, 1)

    def up(value: float) -> float:
        return round(bottom - (bottom - top) * (value - ends[0]) / (ends[1] - ends[0]), 1)

    def drawn(value: float | None) -> float | None:
        if value is None or (logarithmic and value <= 0):
            return None
        return up(math.log10(value) if logarithmic else value)

    return Drawing(
        name=name,
        title=title,
        about=f"{title}, by {x_label}: {', '.join(curves)}.",
        x_label=x_label,
        y_label=y_label,
        height=HEIGHT,
        top=top,
        bottom=bottom,
        x_ticks=tuple(Tick(across(p), f"{p}") for p in _round_steps(0, last)),
        y_ticks=tuple(Tick(up(tick.at), tick.label) for tick in y_ticks),
        legend=legend,
        series=tuple(
            Series(modes.index(mode), _path([(across(p), drawn(value)) for p, value in enumerate(curve)]))
            for mode, curve in curves.items()
        ),
    )


def accuracies(rows: Mapping[str, Sequence[float]]) -> Drawing | None:
    """Accuracy of every cell, a row a numerics mode; cells of one accuracy are one dot. None without any.

    Args:
        rows: numerics mode -> per cent of each cell.
    """
    found = [value for values in rows.values() for value in values]
    if not found:
        return None
    low, high = _around(min(found), max(found))
    top = 12
    bottom = top + ROW * len(rows)

    def across(value: float) -> float:
        return round(left + (WIDTH - RIGHT - 24 - left) * (value - low) / (high - low), 1)

    left = 30 + 7.5 * max(map(len, rows))
    dots, ticks, means = [], [], []
    for index, (name, values) in enumerate(rows.items()):
        middle = top + ROW * (index + 0.5)
        ticks.append(Tick(middle, name))
        for value, count in sorted(Counter(round(v, 6) for v in values).items()):
            label = f"{name}: {count} {'cell' if count == 1 else 'cells'} at {value:.2f} %"
            dots.append(Dot(across(value), middle, round(3.5 + 1.6 * math.sqrt(count), 1), count, index, label))
        if values:
            means.append(Tick(across(sum(values) / len(values)), f"{middle}"))
    return Drawing(
        name="accuracy",
        title="Accuracy of every cell",
        about="Accuracy in per cent, a row a numerics mode; a dot's number says how many cells have that accuracy.",
        x_label="accuracy, %",
        y_label="",
        height=bottom + BOTTOM,
        top=top,
        bottom=bottom,
        x_ticks=tuple(Tick(across(v), f"{v:g}") for v in _round_steps(low, high)),
        y_ticks=tuple(ticks),
        dots=tuple(dots),
        means=tuple(means),
        left=left,
        right=WIDTH - RIGHT,
    )


def _legend(labels: Sequence[str], modes: Sequence[str]) -> tuple[tuple[Key, ...], float]:
    """Entries, and where what is below them begins."""
    widest = max((44 + 8 * len(label) for label in labels), default=LEGEND_COLUMN)
    a_row = max(1, int((WIDTH - LEFT - RIGHT) // max(widest, 80)))
    keys = tuple(
        Key(label, modes.index(label), LEFT + max(widest, 80) * (i % a_row), 14 + LEGEND_ROW * (i // a_row))
        for i, label in enumerate(labels)
    )
    return keys, 14 + LEGEND_ROW * math.ceil(len(labels) / a_row)


def _path(points: Sequence[tuple[float, float | None]]) -> str:
    """Lines through the points that there are; a point alone is a dash of its own."""
    words, drawing = [], False
    for x, y in points:
        if y is None:
            drawing = False
            continue
        words.append(f"{'L' if drawing else 'M'}{x:g} {y:g}" if drawing else f"M{x:g} {y:g}h0.1")
        drawing = True
    return "".join(words)


def _around(low: float, high: float) -> tuple[float, float]:
    """A range of accuracies with some air, at least four points wide."""
    air = max((high - low) * 0.15, 2.0)
    return max(0.0, math.floor(low - air)), min(100.0, math.ceil(high + air))


def _round_steps(low: float, high: float) -> list[float]:
    """At most seven round values."""
    size = (high - low) / 6
    power = 10 ** math.floor(math.log10(size))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= size)
    step = max(step, 1)
    first = math.ceil(low / step)
    return [round(k * step, 6) for k in range(first, math.floor(high / step) + 1)]
