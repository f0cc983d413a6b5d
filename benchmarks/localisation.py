"""Is the right module named? Defects of single modules of the real model, against the shipped goldens.

    python benchmarks/localisation.py

Each defect is looked for in the golden's own environment, and with other kernels: one thread and eager attention, and
products of another instruction set. `beyond` says whether the defect moves the gaps of the looked-at prompts by more than
a single prompt's rounding, so that a check could fail for it at all. What looking costs is measured beside a replay.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from _report import publish
from benign import CHANGES

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "golden" / "word-problems"
ROUNDS = 3
OTHER = {"fp32": CHANGES["AVX2"][1], "bf16": CHANGES["oneDNN without bf16 instructions"][1]}
"""Instruction sets that the recording did not see."""


@contextmanager
def opened(mode: str) -> Iterator[tuple[Any, Any, list[Any], list[Any]]]:
    """An engine, its golden, and the requests of all prompts and of those that are looked at."""
    from pytest_repro import gate, store, suite

    asked = suite.load(FOLDER)
    golden = store.Place(FOLDER, mode).read()
    with gate.live(asked, mode, gate.Options(), gate.Silent()) as engine:
        every = gate.asked_again(engine, asked, golden)
        assert golden.sketch is not None
        yield engine, golden, every, [r for r in every if r.id in golden.sketch.prompts]


def cell(mode: str, other_kernels: bool) -> list[dict[str, Any]]:
    """Every defect in one environment."""
    import torch
    from _defects import SINGLE

    found = []
    with opened(mode) as (engine, golden, _, looked_at):
        if other_kernels:
            torch.set_num_threads(1)
            engine.model.set_attn_implementation("eager")
        for name, module, defect in [("none", "", None), *((n, m, d) for n, (m, d) in SINGLE.items())]:
            found.append({"defect": name, "module": module, **_one(engine, golden, looked_at, defect, other_kernels)})
            print(
                f"{mode} {'other kernels' if other_kernels else 'same'}: {name}: {found[-1]['named'] or 'none'}",
                file=sys.stderr,
            )
    return found


def _one(engine: Any, golden: Any, looked_at: list[Any], defect: Any, other_kernels: bool) -> dict[str, Any]:
    from contextlib import nullcontext

    from pytest_repro.comparison import compare_replay
    from pytest_repro.noise import bulk_ratio
    from pytest_repro.sketch import locate

    with defect(engine) if defect else nullcontext():
        now = next(engine.sketches(looked_at))
        scores = engine.replay(looked_at)
    seen = locate(golden.sketch, now, golden.compute_class, not other_kernels)
    rows = [golden.generation.index()[r.id] for r in looked_at]
    ratios = compare_replay(golden.generation, scores).mean_abs_dgap[rows] / golden.noise.gap_level[rows]
    ratio = float(np.median(ratios))
    return {
        "named": seen.module, "distance": seen.distance, "allowed": seen.allowed, "finding": seen.finding,
        "ratio": ratio, "beyond": ratio > bulk_ratio(golden.compute_class),
    }  # fmt: skip


def cost(mode: str) -> dict[str, float]:
    """Medians of a replay of the suite and of one look inside, in turns."""
    replays, looks = [], []
    with opened(mode) as (engine, _, every, looked_at):
        for _ in range(ROUNDS):
            replays.append(_seconds(lambda: engine.replay(every)))
            looks.append(_seconds(lambda: next(engine.sketches(looked_at))))
    replay, look = statistics.median(replays), statistics.median(looks)
    return {"replay_s": replay, "look_s": look, "check_with_over_without": (replay + look) / replay}


def _seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _child(*args: str, **environment: str) -> Any:
    command = [sys.executable, __file__, *args]
    done = subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How many were named, over all and over those that a check could fail for."""
    defects = [r for r in rows if r["module"]]
    seen = [r for r in defects if r["beyond"]]
    return {
        "defects": len(defects),
        "right": sum(r["named"] == r["module"] for r in defects),
        "wrong": [(r["defect"], r["named"]) for r in defects if r["named"] not in ("", r["module"])],
        "not_localised": [r["defect"] for r in defects if not r["named"]],
        "beyond": len(seen),
        "right_of_beyond": sum(r["named"] == r["module"] for r in seen),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cell", nargs=2, metavar=("MODE", "WHERE"), help="internal: one environment")
    parser.add_argument("--cost", metavar="MODE", help="internal: what looking costs")
    args = parser.parse_args()
    if args.cell:
        print(json.dumps(cell(args.cell[0], args.cell[1] == "other")))
    elif args.cost:
        print(json.dumps(cost(args.cost)))
    else:
        figures: dict[str, Any] = {}
        for mode in ("fp32", "bf16"):
            cells = {
                "same environment": _child("--cell", mode, "same"),
                "other kernels": _child("--cell", mode, "other", **OTHER[mode]),
            }
            figures[mode] = {where: {"summary": summary(rows), "rows": rows} for where, rows in cells.items()}
            figures[mode]["cost"] = _child("--cost", mode)
        publish("localisation", figures)


if __name__ == "__main__":
    main()
