"""Is the right module named? Defects of single modules of the real model, against goldens of the shipped suite.

    python benchmarks/localisation.py

The suite is recorded here first. Each defect is then looked for in the golden's own environment, and with other kernels: one
thread and eager attention, and products of another instruction set. Where the goldens that are shipped come from another
processor, each is looked for against those too. `beyond` says whether the defect moves the gaps of the looked-at prompts by more than
a single prompt's rounding, so that a check could fail for it at all. What looking costs is measured beside a replay.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
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
SAME, OTHER, ELSEWHERE = "same environment", "other kernels", "golden from another machine"
KERNELS = {"fp32": CHANGES["AVX2"][1], "bf16": CHANGES["oneDNN without bf16 instructions"][1]}
"""Instruction sets that the recording did not see."""


def record(mode: str, folder: Path) -> None:
    """A golden of this machine."""
    from pytest_repro import asking, recording, store, suite

    recording.record(suite.load(FOLDER), mode, asking.Options(), asking.Silent(), folder)
    store.Place(folder, mode).write(store.Place(folder, mode, store.PENDING).read())


@contextmanager
def opened(mode: str, folder: Path) -> Iterator[tuple[Any, Any, list[Any], list[Any]]]:
    """An engine, a folder's golden, and the requests of all prompts and of those that are looked at."""
    from pytest_repro import asking, store, suite

    asked = suite.load(FOLDER)
    golden = store.Place(folder, mode).read()
    with asking.live(asked, mode, asking.Options(), asking.Silent()) as engine:
        every = asking.asked(engine, asked, golden)
        assert golden.sketch is not None
        yield engine, golden, every, [r for r in every if r.id in golden.sketch.prompts]


def cell(mode: str, where: str, folder: Path) -> list[dict[str, Any]]:
    """Every defect in one environment: the golden's, that with other kernels, or another machine."""
    import torch
    from _defects import SINGLE

    found = []
    with opened(mode, folder) as (engine, golden, _, looked_at):
        if where == OTHER:
            torch.set_num_threads(1)
            engine.model.set_attn_implementation("eager")
        for name, module, defect in [("none", "", None), *((n, m, d) for n, (m, d) in SINGLE.items())]:
            found.append({"defect": name, "module": module, **_one(engine, golden, looked_at, defect, where == SAME)})
            print(f"{mode}, {where}: {name}: {found[-1]['named'] or 'none'}", file=sys.stderr, flush=True)
    return found


def _one(engine: Any, golden: Any, looked_at: list[Any], defect: Any, same: bool) -> dict[str, Any]:
    from contextlib import nullcontext

    from pytest_repro.comparison import compare_replay
    from pytest_repro.noise import bulk_ratio
    from pytest_repro.sketch import locate

    with defect(engine) if defect else nullcontext():
        now = next(engine.sketches(looked_at))
        scores = engine.replay(looked_at)
    seen = locate(golden.sketch, now, golden.compute_class, same)
    rows = [golden.generation.index()[r.id] for r in looked_at]
    ratios = compare_replay(golden.generation, scores).mean_abs_dgap[rows] / golden.noise.gap_level[rows]
    ratio = float(np.median(ratios))
    return {
        "named": seen.module, "distance": seen.distance, "allowed": seen.allowed, "finding": seen.finding,
        "ratio": ratio, "beyond": ratio > bulk_ratio(golden.compute_class),
    }  # fmt: skip


def cost(mode: str, folder: Path) -> dict[str, float]:
    """Medians of a replay of the suite and of one look inside, in turns."""
    replays, looks = [], []
    with opened(mode, folder) as (engine, _, every, looked_at):
        for _ in range(ROUNDS):
            replays.append(_seconds(lambda: engine.replay(every)))
            looks.append(_seconds(lambda: next(engine.sketches(looked_at))))
    replay, look = statistics.median(replays), statistics.median(looks)
    return {"replay_s": replay, "look_s": look, "check_with_over_without": (replay + look) / replay}


def _seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _started(mode: str, what: str, folder: str, **environment: str) -> Any:
    command = [sys.executable, __file__, "--child", mode, what, folder]
    done = subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def from_elsewhere(mode: str) -> bool:
    """Whether the shipped golden was recorded on another processor."""
    from pytest_repro import probe, store

    return bool(store.Place(FOLDER, mode).read().fingerprint["cpu_model"] != probe.machine()["cpu_model"])


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=3, metavar=("MODE", "WHAT", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*args.child)
        return
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for mode in ("fp32", "bf16"):
            print(f"{mode}: recording", file=sys.stderr, flush=True)
            _started(mode, "record", scratch)
            cells = {SAME: _started(mode, SAME, scratch), OTHER: _started(mode, OTHER, scratch, **KERNELS[mode])}
            if from_elsewhere(mode):
                cells[ELSEWHERE] = _started(mode, ELSEWHERE, str(FOLDER))
            figures[mode] = {where: {"summary": summary(rows), "rows": rows} for where, rows in cells.items()}
            figures[mode]["cost"] = _started(mode, "cost", scratch)
    publish("localisation", figures)


def child(mode: str, what: str, folder: str) -> None:
    """What runs in a process of its own."""
    answer: Any = None
    if what == "record":
        record(mode, Path(folder))
    elif what == "cost":
        answer = cost(mode, Path(folder))
    else:
        answer = cell(mode, what, Path(folder))
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
