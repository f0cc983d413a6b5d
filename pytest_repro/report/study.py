"""A study's report: tables as Markdown and JSON, figures as SVG, all of it as one HTML page that opens offline.

What engines said and what files of other machines hold is untrusted text, as in `html`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from .. import __version__
from ..store import atomic_write
from ..study import Cost, Precision, Study, as_data, measures, number, table
from ..text import inert
from . import plots
from .html import asset, environment, policy
from .plots import Drawing

MOST_ROWS = 12
"""Positions that the table of a figure shows."""

Table = tuple[Sequence[str], Sequence[Sequence[str]]]


def write(folder: Path, done: Study) -> list[Path]:
    """Write everything, each file whole or not at all; the paths, the page first."""
    drawings = [drawing for drawing, *_ in _figures(done)]
    files = {
        "report.html": page(done),
        "table.md": markdown(done),
        "study.json": json.dumps(as_data(done), indent=1) + "\n",
        **{f"figures/{drawing.name}.svg": svg(drawing) for drawing in drawings},
    }
    for name, text in files.items():
        atomic_write(folder / name, text.encode("utf-8"))
    return [folder / name for name in files]


def page(done: Study) -> str:
    """The HTML page."""
    style = asset("report.css") + asset("plots.css")
    return (
        environment()
        .get_template("study.html")
        .render(
            study=done,
            table=table(done),
            cost=_cost(done),
            effects=effects(done),
            fixed=_fixed(done),
            figures=_figures(done),
            style=Markup(style),
            policy=policy(style, ""),
            tool=f"pytest-repro {__version__}",
        )
    )


def svg(drawing: Drawing) -> str:
    """A figure as a file that stands alone, light or dark as its reader is."""
    macro: Any = environment().get_template("plots.svg").module
    return str(macro.draw(drawing, Markup(asset("plots.css")))).strip() + "\n"


def markdown(done: Study) -> str:
    """The tables for a README or a pull request."""
    axes = " × ".join(f"{name} {{{', '.join(values)}}}" for name, values in done.axes.items())
    parts = [
        f"{_cell(done.suite)}: {done.prompts} prompts, up to {done.max_new_tokens} new tokens, {_cell(axes)}; "
        f"{_cell(', '.join(done.machines))}, {_cell(done.engine)}.",
        _table(table(done)),
        _table(_cost(done)),
        _table(effects(done)),
        "\n".join(f"* {_cell(line)}" for line in done.advice),
    ]
    if done.command:
        parts.insert(0, f"`{_cell(done.command).replace('`', '')}`")
    if done.failed:
        parts.append(_table((("cell without answers", "status", "in its own words"), done.failed)))
    return "\n\n".join(parts) + "\n"


def _table(found: Table) -> str:
    head, rows = found
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    return inert(text).replace("|", "\\|").replace("<", "&lt;")


def _cost(done: Study) -> Table:
    rows = []
    for precision in done.precisions:
        cost = precision.cost
        rows.append([precision.numerics, *(_cost_row(cost) if cost else ["–"] * 4)])
    return ["numerics", "tokens/s, mean", "slowest", "fastest", "peak memory"], rows


def _cost_row(cost: Cost) -> list[str]:
    memory = ", ".join(f"{size / 2**30:.2f} GiB {kind}" for kind, size in cost.memory.items())
    return [f"{cost.mean:.1f}", f"{cost.slowest:.1f}", f"{cost.fastest:.1f}", memory or "–"]


def effects(done: Study) -> Table:
    """What changing one axis alone does, what moves most first."""
    rows = [
        [e.axis, e.numerics or "all", str(e.pairs), f"{e.div_percent:.1f} %", number(e.std_top1_prob)]
        for e in done.effects
    ]
    return ["axis", "numerics", "pairs of cells", "Div_Percent", "Avg_Std@top1_prob"], rows


def _fixed(done: Study) -> Table:
    rows = [
        [f"{f.axis} {f.value}", f.numerics, str(f.dispersion.configurations), *measures(f.dispersion)]
        for f in done.fixed
    ]
    head = ["held", "numerics", "cells", "Div_Percent", "mean Div_Index", "Std@Acc", "accuracy", "Avg_Std@Output_Length", "Avg_Std@top1_prob"]  # fmt: skip
    return head, rows


def _figures(done: Study) -> list[tuple[Drawing, str, Sequence[str], Sequence[Sequence[str]]]]:
    """Drawing, caption, and the same as a table."""
    several = [p for p in done.precisions if p.dispersion]
    modes = [p.numerics for p in done.precisions]
    diverged = plots.divergence({p.numerics: p.diverged_by for p in several}, modes) if several else None
    spread = plots.spread({p.numerics: p.spread_at for p in several}, modes)
    accuracy = plots.accuracies({p.numerics: [a for _, a in p.accuracies] for p in done.precisions})
    found: list[tuple[Drawing, str, Sequence[str], Sequence[Sequence[str]]]] = []
    if diverged:
        caption = "A prompt counts from the first position at which not all cells of a precision have the same token."
        rows = _at_positions(several, "diverged_by", lambda v: f"{v:.1f} %")
        found.append((diverged, caption, ["position", *(p.numerics for p in several)], rows))
    if spread:
        caption = (
            "Standard deviation over the cells, mean over the prompts whose outputs still agree there; logarithmic. "
            "A position where nothing spread has no place on the axis."
        )
        found.append(
            (spread, caption, ["position", *(p.numerics for p in several)], _at_positions(several, "spread_at", number))
        )
    if accuracy:
        caption = "×n: n cells of that accuracy. The upright line is the mean."
        rows = [[cell, f"{value:.2f} %"] for p in done.precisions for cell, value in p.accuracies]
        found.append((accuracy, caption, ["cell", "accuracy"], rows))
    return found


def _at_positions(several: Sequence[Precision], name: str, told: Any) -> list[list[str]]:
    longest = max(len(getattr(p, name)) for p in several)
    places = sorted({round(k * (longest - 1) / (MOST_ROWS - 1)) for k in range(MOST_ROWS)}) if longest else []
    curves = [getattr(p, name) for p in several]
    return [[str(at), *(told(c[at]) if at < len(c) and c[at] is not None else "–" for c in curves)] for at in places]
