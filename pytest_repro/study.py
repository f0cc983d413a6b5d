"""Cells -> tables: the measures of arXiv 2506.09501 for each precision, which setting moves outputs, and advice.

A precision is a value of the axis `numerics`; its configurations are all other axes' values, as in the paper (§3.1).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import grid
from .cells import Cell, of_one_model
from .dispersion import Dispersion, accuracy, dispersion, diverged_by, divergence_indexes, spread_at
from .errors import ConfigError
from .fingerprint import IDENTITY, class_of
from .grid import MACHINE, Setting

LEVEL = 0.95
"""Of the bound on how many prompts may move although none did."""


@dataclass(frozen=True)
class PassAt1:
    """Sampling (§3.1): accuracy over several runs of every prompt."""

    runs: int
    """In each cell."""
    mean: float
    """Pass@1, per cent: mean accuracy over the runs, then over the cells."""
    spread: float | None
    """Standard deviation of the cells' Pass@1 over the cells, points; None for one cell."""
    within: float | None
    """Standard error of one cell's Pass@1 by its own runs, points, mean over the cells; None for one run."""


@dataclass(frozen=True)
class Cost:
    """What cells cost on the machine that ran them."""

    slowest: float
    """Tokens/s: generated tokens over the seconds of decoding."""
    mean: float
    """Geometric mean over the cells."""
    fastest: float
    memory: Mapping[str, int]
    """Kind of memory -> the largest peak of any cell's process, bytes."""


@dataclass(frozen=True)
class Precision:
    """One row of the paper's tables."""

    numerics: str
    asked: int
    """Cells of the grid."""
    done: int
    """Cells that every number of this row stands on."""
    dispersion: Dispersion | None
    """None with fewer than two cells done."""
    cost: Cost | None
    pass_at_1: PassAt1 | None
    diverged_by: tuple[float, ...]
    """Per cent of prompts whose outputs have parted, by position."""
    spread_at: tuple[float | None, ...]
    """Standard deviation of the top-1 probability, by position."""
    accuracies: tuple[tuple[str, float], ...]
    """(cell's setting, accuracy in per cent), of cells that have one."""


@dataclass(frozen=True)
class Effect:
    """What changing one axis alone does: pairs of a precision's cells that differ in nothing else."""

    axis: str
    numerics: str
    """Empty for the axis `numerics` itself."""
    pairs: int
    div_percent: float
    """Per cent of prompts whose outputs differ, mean over the pairs."""
    std_top1_prob: float | None
    """Avg_Std@top1_prob of a pair, mean over the pairs."""


@dataclass(frozen=True)
class Fixed:
    """One precision with one axis held at a value and the others varying, as in the paper's Tables 13 to 16."""

    axis: str
    value: str
    numerics: str
    dispersion: Dispersion


@dataclass(frozen=True)
class Steady:
    """A setting under which nothing moved."""

    setting: Setting
    """What has to be held; everything else of the grid may change."""
    cells: int
    prompts: int
    bound: float
    """Per cent: more prompts than that move with a probability below 1 - `LEVEL`, if they were drawn from all."""
    cost: Cost | None
    """None where nothing was generated."""


@dataclass(frozen=True)
class Study:
    """All tables."""

    suite: str
    model: str
    axes: Mapping[str, tuple[str, ...]]
    machines: tuple[str, ...]
    prompts: int
    max_new_tokens: int
    precisions: tuple[Precision, ...]
    effects: tuple[Effect, ...]
    """What moves most comes first."""
    fixed: tuple[Fixed, ...]
    steady: tuple[Steady, ...]
    """Cheapest first; of the kind that holds as little as possible."""
    advice: tuple[str, ...]
    failed: tuple[tuple[str, str, str], ...]
    """(cell's setting, status, error)."""
    cautions: tuple[str, ...]
    engine: str = ""
    """Engine and torch, with their versions."""
    command: str = ""
    """What the user typed."""
    jobs: int = 1
    """Cells that ran at a time, which makes each slower."""


def study(cells: Sequence[Cell]) -> Study:
    """All tables of one study.

    Args:
        cells: every cell of the grid, failed ones too.

    Raises:
        ConfigError: no cell, or cells of different models or prompts.
    """
    if not cells:
        raise ConfigError("there is no cell", where="study", fix="pytest-repro study SUITE --axis batch_size=1,4")
    done = [cell for cell in cells if cell.status == "done"]
    of_one_model(done, IDENTITY)
    axes = grid.axes_of(cell.setting for cell in cells)
    steady = _steady(cells, axes)
    some = done[0] if done else cells[0]
    return Study(
        suite=str(some.asked.get("suite", "")),
        model=str(some.asked.get("model", "")).partition("#")[0],
        axes=axes,
        machines=tuple(dict.fromkeys(cell.machine for cell in done)),
        prompts=len(some.rows),
        max_new_tokens=int(some.asked.get("max_new_tokens") or 0),
        precisions=tuple(_precision(name, cells) for name in axes["numerics"]),
        effects=_effects(done, axes),
        fixed=_fixed(done, axes),
        steady=steady,
        advice=_advice(steady, cells, axes),
        failed=tuple((grid.spoken(c.setting), c.status, c.error) for c in cells if c.status != "done"),
        cautions=_cautions(done, axes),
        engine=", ".join(dict.fromkeys(_engine(cell) for cell in done)),
        jobs=max(cell.jobs for cell in cells),
    )


def _engine(cell: Cell) -> str:
    facts = cell.environment
    torch = f" on torch {facts['torch']}" if "torch" in facts else ""
    return f"{facts.get('engine')} {facts.get('engine_version', '')}".strip() + torch


def _precision(name: str, cells: Sequence[Cell]) -> Precision:
    mine = [cell for cell in cells if cell.setting["numerics"] == name]
    done = [cell for cell in mine if cell.status == "done"]
    runs = [cell.run for cell in done]
    several = len(done) > 1
    return Precision(
        numerics=name,
        asked=len(mine),
        done=len(done),
        dispersion=dispersion(runs) if several else None,
        cost=_cost(done),
        pass_at_1=_pass_at_1(done),
        diverged_by=tuple(map(float, diverged_by(runs))) if several else (),
        spread_at=tuple(None if np.isnan(x) else float(x) for x in spread_at(runs)) if several else (),
        accuracies=tuple((grid.spoken(c.setting), a) for c in done if (a := accuracy(c.run)) is not None),
    )


def _cost(done: Sequence[Cell]) -> Cost | None:
    rates = [rate for cell in done if (rate := cell.tokens_per_second)]
    if not rates:
        return None
    kinds = dict.fromkeys(kind for cell in done for kind in cell.memory)
    memory = {kind: max(cell.memory.get(kind, 0) for cell in done) for kind in kinds}
    return Cost(min(rates), float(np.exp(np.mean(np.log(rates)))), max(rates), memory)


def _pass_at_1(done: Sequence[Cell]) -> PassAt1 | None:
    """Of cells that sampled, over the prompts that have a right answer."""
    rights = [_rights(cell) for cell in done]
    scored = [r for r in rights if r.size]
    if not scored:
        return None
    by_run = [100 * r.mean(axis=0) for r in scored]
    cells = [float(runs.mean()) for runs in by_run]
    within = [np.std(runs, ddof=1) / np.sqrt(len(runs)) for runs in by_run if len(runs) > 1]
    return PassAt1(
        runs=scored[0].shape[1],
        mean=float(np.mean(cells)),
        spread=float(np.std(cells, ddof=1)) if len(cells) > 1 else None,
        within=float(np.mean(within)) if within else None,
    )


def _rights(cell: Cell) -> NDArray[np.bool_]:
    """Whether each sample is right, shape (prompts with an answer, runs)."""
    rows = [[s.right for s in row.samples] for row in cell.rows if row.right is not None]
    return np.array(rows, dtype=bool)


# --- which setting moves outputs -------------------------------------------------------------------------------------


def _effects(done: Sequence[Cell], axes: Mapping[str, Sequence[str]]) -> tuple[Effect, ...]:
    found = [
        effect
        for axis, values in axes.items()
        if len(values) > 1
        for mode in ([""] if axis == "numerics" else axes["numerics"])
        if (effect := _effect(axis, mode, [c for c in done if mode in ("", c.setting["numerics"])]))
    ]
    return tuple(sorted(found, key=lambda e: (-e.div_percent, -(e.std_top1_prob or 0.0))))


def _effect(axis: str, mode: str, cells: Sequence[Cell]) -> Effect | None:
    """Over all pairs of cells that differ in this axis alone; None without a pair."""
    pairs = [
        dispersion([a.run, b.run])
        for a, b in itertools.combinations(cells, 2)
        if a.setting[axis] != b.setting[axis] and _without(a.setting, axis) == _without(b.setting, axis)
    ]
    if not pairs:
        return None
    spreads = [pair.std_top1_prob for pair in pairs if pair.std_top1_prob is not None]
    return Effect(
        axis=axis,
        numerics=mode,
        pairs=len(pairs),
        div_percent=float(np.mean([pair.div_percent for pair in pairs])),
        std_top1_prob=float(np.mean(spreads)) if spreads else None,
    )


def _without(setting: Setting, axis: str) -> dict[str, str]:
    return {name: value for name, value in setting.items() if name != axis}


def _fixed(done: Sequence[Cell], axes: Mapping[str, Sequence[str]]) -> tuple[Fixed, ...]:
    found = []
    for axis, value in [(axis, v) for axis, some in axes.items() for v in some if axis != "numerics" and len(some) > 1]:
        for mode in axes["numerics"]:
            runs = [c.run for c in done if c.setting[axis] == value and c.setting["numerics"] == mode]
            if len(runs) > 1:
                found.append(Fixed(axis, value, mode, dispersion(runs)))
    return tuple(found)


# --- advice ----------------------------------------------------------------------------------------------------------


def _steady(cells: Sequence[Cell], axes: Mapping[str, Sequence[str]]) -> tuple[Steady, ...]:
    """Settings under which no output moved, whatever else of the grid changed; of those that hold fewest axes.

    A setting counts only if every cell under it is done: a cell that failed may have moved.
    """
    free = [axis for axis, values in axes.items() if axis != "numerics" and len(values) > 1]
    for held in range(len(free)):
        found = [
            steady
            for names in itertools.combinations(free, held)
            for values in itertools.product(*(axes[name] for name in ("numerics", *names)))
            if (steady := _held(dict(zip(("numerics", *names), values, strict=True)), cells))
        ]
        if found:
            return tuple(sorted(found, key=lambda s: -(s.cost.mean if s.cost else 0.0)))
    return ()


def _held(setting: Setting, cells: Sequence[Cell]) -> Steady | None:
    mine = [cell for cell in cells if setting.items() <= cell.setting.items()]
    if len(mine) < 2 or any(cell.status != "done" for cell in mine):
        return None
    if any(index is not None for index in divergence_indexes([cell.run for cell in mine])):
        return None
    prompts = len(mine[0].rows)
    return Steady(setting, len(mine), prompts, 100 * (1 - (1 - LEVEL) ** (1 / prompts)), _cost(mine))


def _advice(steady: Sequence[Steady], cells: Sequence[Cell], axes: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Sentences, each backed by cells."""
    if not any(len(values) > 1 for axis, values in axes.items() if axis != "numerics"):
        return ("No advice: nothing but the numerics mode was varied, so that nothing could have moved.",)
    if not steady:
        moved = [
            m for m in axes["numerics"] if sum(c.status == "done" and c.setting["numerics"] == m for c in cells) > 1
        ]
        if not moved:
            return ("No advice: no mode has two cells that are done.",)
        return (
            "No setting of this grid kept every output the same; the modes can be told apart by how far they moved.",
        )
    best = steady[0]
    varied = [axis for axis, values in axes.items() if axis not in best.setting and len(values) > 1]
    lines = (
        []
        if len(best.setting) == 1
        else ["No mode kept every output the same over the whole grid; with more held, some did."]
    )
    lines += [
        f"{grid.spoken(best.setting)} is the cheapest setting under which nothing moved: {best.prompts} prompts gave the same "
        f"tokens in all {best.cells} cells that vary {', '.join(varied)}. {costs(best.cost)}."
    ]
    lines += [
        f"{grid.spoken(other.setting)} kept every output the same too: {costs(other.cost)}." for other in steady[1:4]
    ]
    lines.append(
        f"{best.prompts} prompts that did not move show, at {100 * LEVEL:.0f} %, that fewer than {best.bound:.1f} % of such prompts "
        f"move in such cells; they show nothing of settings outside of it."
    )
    stayed = {s.setting["numerics"] for s in steady}
    for mode in axes["numerics"]:
        mine = [cell for cell in cells if cell.setting["numerics"] == mode]
        if mode not in stayed and 0 < sum(c.status == "done" for c in mine) < len(mine):
            failed = sum(c.status != "done" for c in mine)
            lines.append(f"{mode} cannot be advised on as a whole: {failed} of its {len(mine)} cells have no answers.")
    return tuple(lines)


def costs(cost: Cost | None) -> str:
    """`37.1 tokens/s on average (15.2 to 84.9), 1.40 GiB resident at most`."""
    if cost is None:
        return "no token was generated"
    memory = [f"{size / 2**30:.2f} GiB {kind} at most" for kind, size in cost.memory.items()]
    return ", ".join([f"{cost.mean:.1f} tokens/s on average ({cost.slowest:.1f} to {cost.fastest:.1f})", *memory])


def _cautions(done: Sequence[Cell], axes: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Numerics fields that differ between cells although no axis varies them."""
    if MACHINE in axes:
        return ()
    varied = {f for axis in axes for f in (grid.AXES[axis].fact, *grid.AXES[axis].moves)}
    if "engine" in axes or "attention" in axes:
        varied |= {name for cell in done for name in cell.environment if name.startswith("engine.")}
        varied |= {"engine_version", "attention"}
    found = []
    for name in dict.fromkeys(name for cell in done for name in cell.environment):
        values = dict.fromkeys(str(cell.environment.get(name)) for cell in done)
        if name not in varied and len(values) > 1 and class_of(name) == "numerics":
            found.append(f"{name} is not the same in all cells, and no axis varies it: {', '.join(values)}")
    return tuple(found)


def merged(folders: Sequence[tuple[str, Sequence[Cell]]]) -> list[Cell]:
    """Cells of several machines as one study, whose axis `machine` says which ran what.

    Args:
        folders: a study's folder, as the user typed it, and its cells.

    Raises:
        ConfigError: they do not ask the same, or do not vary the same axes.
    """
    first_name, first = folders[0]
    labels = _labels(folders)
    found: list[Cell] = []
    for name, some in folders:
        for cell in some:
            if set(cell.setting) != set(first[0].setting):
                raise ConfigError(
                    f"other axes than {first_name}: {', '.join(cell.setting)} and {', '.join(first[0].setting)}",
                    where=name,
                    fix="study the same axes on every machine",
                )
        found += [_on(cell, labels[name]) for cell in some]
    return found


def _on(cell: Cell, machine: str) -> Cell:
    return replace(cell, setting={**cell.setting, MACHINE: machine})


def _labels(folders: Sequence[tuple[str, Sequence[Cell]]]) -> dict[str, str]:
    """Folder -> its machine's name; two machines of one kind are told apart by number."""
    kinds: dict[str, str] = {}
    for name, some in folders:
        done = [cell for cell in some if cell.status == "done"]
        if not done:
            raise ConfigError("no cell of this study is done", where=name, fix="leave it out, or run it again")
        kinds[name] = done[0].machine
    alike: dict[str, list[str]] = {}
    for name, kind in kinds.items():
        alike.setdefault(kind, []).append(name)
    return {
        name: kind if len(alike[kind]) == 1 else f"{kind} #{alike[kind].index(name) + 1}"
        for name, kind in kinds.items()
    }


def table(done: Study) -> tuple[list[str], list[list[str]]]:
    """The paper's measures: head and rows, a row a precision."""
    head = ["numerics", "cells", "Div_Percent", "mean Div_Index", "Std@Acc", "accuracy", "Avg_Std@Output_Length", "Avg_Std@top1_prob"]  # fmt: skip
    sampled = any(p.pass_at_1 for p in done.precisions)
    rows = []
    for precision in done.precisions:
        d = precision.dispersion
        row = [precision.numerics, f"{precision.done} of {precision.asked}"]
        row += measures(d) if d else ["–"] * 6
        if sampled:
            row += _pass_told(precision.pass_at_1)
        rows.append(row)
    return [*head, *(["Pass@1", "std of Pass@1"] if sampled else [])], rows


def measures(d: Dispersion) -> list[str]:
    """Six cells of a table."""
    return [
        f"{d.div_percent:.1f} %",
        "none diverged" if d.mean_div_index is None else f"{d.mean_div_index:.1f}",
        "–" if d.std_acc is None else f"{d.std_acc:.2f} points",
        "–" if d.accuracy is None else f"{d.accuracy:.1f} %",
        f"{d.std_length:.2f} tokens",
        number(d.std_top1_prob),
    ]


def _pass_told(found: PassAt1 | None) -> list[str]:
    if found is None:
        return ["–", "–"]
    return [f"{found.mean:.1f} % of {found.runs}", "–" if found.spread is None else f"{found.spread:.2f} points"]


def number(value: float | None) -> str:
    """A small number for a table: 7.3e-03; – where there is none."""
    if value is None:
        return "–"
    return "0" if value == 0 else f"{value:.1e}"


def as_data(done: Study) -> dict[str, Any]:
    """All tables as JSON, which the report is made from."""
    return {"schema": 1, **asdict(done)}
