"""The figure of a ladder: curves over mantissa bits and over exponent bits, as one SVG that needs no script and no font."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..ladder import Curve, Rung

WIDTH, HEIGHT = 720, 330
LEFT, TOP, ROOM, PANEL_WIDTH, PANEL_HEIGHT = 62, 72, 84, 270, 190
"""Pixels: the first panel's place, the room between panels, and their size."""
LOWEST_KL = 1e-9
"""Nats: a divergence below it, zero too, is drawn here, at the foot of the axis."""


@dataclass(frozen=True)
class Point:
    """A rung of a curve."""

    x: float
    y: float
    label: str
    """The format and its value, told on hovering and to screen readers."""


@dataclass(frozen=True)
class Line:
    """One curve in one panel."""

    kind: str
    """`mantissa` or `exponent`, which the style knows."""
    points: tuple[Point, ...]

    @property
    def path(self) -> str:
        """Its points as SVG's `points`."""
        return " ".join(f"{p.x:g},{p.y:g}" for p in self.points)


@dataclass(frozen=True)
class Tick:
    """A value on an axis."""

    at: float
    text: str


@dataclass(frozen=True)
class Panel:
    """One measure over bits."""

    title: str
    left: float
    lines: tuple[Line, ...]
    across: tuple[Tick, ...]
    up: tuple[Tick, ...]


def svg(suite: str, curves: Sequence[Curve]) -> str:
    """The figure: mean KL divergence, and divergent prompts, over bits of one field while the other is fixed.

    Args:
        suite: its name.
        curves: of `ladder.curves`; at least one.
    """
    bits = sorted({_varied(curve, rung) for curve in curves for rung in curve.rungs})
    decades = _decades([rung.mean_kl for curve in curves for rung in curve.rungs])
    second = LEFT + PANEL_WIDTH + ROOM
    panels = (
        _panel("mean KL divergence from FP32, nats a token", LEFT, curves, bits, decades, _log(decades), _kl),
        _panel("prompts that leave the golden, %", second, curves, bits, _percents(), _linear(0, 100), _percent),
    )
    environment = Environment(
        loader=PackageLoader("pytest_repro.report", "page"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    page = environment.get_template("ladder.svg")
    return page.render(
        suite=suite, panels=panels, legend=[_legend(c) for c in curves], width=WIDTH, height=HEIGHT, top=TOP,
        bottom=TOP + PANEL_HEIGHT, panel_width=PANEL_WIDTH,
    )  # fmt: skip


def _legend(curve: Curve) -> tuple[str, str]:
    other = "exponent" if curve.varied == "mantissa" else "mantissa"
    return curve.varied, f"over {curve.varied} bits, at {curve.fixed} {other} bits"


def _varied(curve: Curve, rung: Rung) -> int:
    return rung.mantissa if curve.varied == "mantissa" else rung.exponent


def _panel(
    title: str,
    left: float,
    curves: Sequence[Curve],
    bits: Sequence[int],
    up: Sequence[tuple[float, str]],
    height: Callable[[float], float],
    measure: Callable[[Rung], tuple[float, str]],
) -> Panel:
    width = _linear(bits[0], max(bits[-1], bits[0] + 1))

    def across(value: float) -> float:
        return round(left + width(value) * PANEL_WIDTH, 1)

    def over(value: float) -> float:
        return round(TOP + (1 - height(value)) * PANEL_HEIGHT, 1)

    def point(curve: Curve, rung: Rung) -> Point:
        value, text = measure(rung)
        return Point(across(_varied(curve, rung)), over(value), f"{rung.format}: {text}")

    return Panel(
        title=title,
        left=left,
        lines=tuple(Line(c.varied, tuple(point(c, r) for r in c.rungs)) for c in curves),
        across=tuple(Tick(across(b), str(b)) for b in bits),
        up=tuple(Tick(over(value), text) for value, text in up),
    )


def _kl(rung: Rung) -> tuple[float, str]:
    return rung.mean_kl, f"{rung.mean_kl:.2g} nats"


def _percent(rung: Rung) -> tuple[float, str]:
    return rung.div_percent, f"{rung.divergent} of {rung.prompts} prompts"


def _linear(low: float, high: float) -> Callable[[float], float]:
    return lambda value: (value - low) / (high - low)


def _log(decades: Sequence[tuple[float, str]]) -> Callable[[float], float]:
    low, high = math.log10(decades[0][0]), math.log10(decades[-1][0])
    return lambda value: (math.log10(max(value, decades[0][0])) - low) / (high - low)


def _decades(values: Sequence[float]) -> list[tuple[float, str]]:
    """Powers of ten around the values, two at least."""
    logs = [math.log10(max(value, LOWEST_KL)) for value in values]
    low, high = math.floor(min(logs)), math.ceil(max(logs))
    return [(10.0**k, f"1e{k}") for k in range(low, max(high, low + 1) + 1)]


def _percents() -> list[tuple[float, str]]:
    return [(value, str(value)) for value in range(0, 101, 25)]
