"""vLLM on a CPU: LayerCast beside FP32 (speed, weight memory, outputs).

    python benchmarks/on_vllm.py

Both engines run at once and are asked in turn; medians. Weight memory is what the worker process holds beyond one of the
same kind whose model has next to no weights (a tiny one of the tests), by memory of its own
(USS), before anything was asked of it.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from _report import publish

from pytest_repro import models, numerics
from pytest_repro.comparison import compare_decode
from pytest_repro.engines.base import Engine, Spec, opener
from pytest_repro.generation import Generation, Request
from pytest_repro.suite import load

SUITE = Path(__file__).parents[1] / "golden" / "word-problems"
NEW_TOKENS = 64
ROUNDS = 3


def main() -> None:
    suite = load(SUITE)
    files = models.resolve(suite.model, suite.folder, print)
    with ExitStack() as stack:
        engines: dict[str, Engine] = {}
        workers: dict[str, psutil.Process] = {}
        for mode in ("fp32", "layercast"):
            spec = Spec(numerics.mode(mode), NEW_TOKENS, SUITE, files, say=print)
            engines[mode], workers[mode] = started(stack, spec)
        requests = [Request(p.id, np.asarray(engines["fp32"].encode(p), np.int32), p.content) for p in suite.prompts]
        figures: dict[str, Any] = {"new tokens": NEW_TOKENS, "weights": memory(workers)}
        for batch in (1, 8):
            figures[f"batch size {batch}"] = speed(engines, requests[: 4 if batch == 1 else 8], batch)
        figures |= agreement(engines, requests)
    publish("on_vllm", figures)


def speed(engines: dict[str, Engine], requests: list[Request], batch: int) -> dict[str, Any]:
    rates: dict[str, list[float]] = {mode: [] for mode in engines}
    for _ in range(ROUNDS):
        for mode, engine in engines.items():
            started, tokens = time.perf_counter(), 0
            for first in range(0, len(requests), batch):
                tokens += sum(len(o.tokens) for o in engine.generate(requests[first : first + batch]))
            rates[mode].append(tokens / (time.perf_counter() - started))
    medians = {mode: statistics.median(rate) for mode, rate in rates.items()}
    return {
        **{f"{mode}, tokens/s": round(rate, 1) for mode, rate in medians.items()},
        "layercast / fp32": round(medians["layercast"] / medians["fp32"], 2),
    }


def agreement(engines: dict[str, Engine], requests: list[Request]) -> dict[str, Any]:
    outputs = {mode: decode(engine, requests) for mode, engine in engines.items()}
    golden = Generation.of(requests, outputs["fp32"])
    now = Generation.of(requests, outputs["layercast"])
    seen = compare_decode(golden, now)
    return {
        "prompts": len(requests),
        "prompts on which layercast and fp32 differ": int(seen.differs.sum()),
        "largest |dlogp| between them": f"{np.nanmax(seen.max_abs_dlogp):.2e}",
    }


def decode(engine: Engine, requests: list[Request]) -> list[Any]:
    return [o for first in range(0, len(requests), 8) for o in engine.generate(requests[first : first + 8])]


def started(stack: ExitStack, spec: Spec) -> tuple[Engine, psutil.Process]:
    """An engine, and the process that holds its model."""
    before = worker_processes()
    engine = stack.enter_context(opener("vllm")(spec))
    (new,) = worker_processes() - before
    return engine, new


def worker_processes() -> set[psutil.Process]:
    found = set()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # an ended one that nobody has waited for yet
            found |= {process} if "VLLM::Worker" in " ".join(process.cmdline()) else set()
    return found


def memory(workers: dict[str, psutil.Process]) -> dict[str, Any]:
    held: dict[str, float] = {}
    for mode, worker in workers.items():
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            small = models.resolve(str(nearly_nothing(Path(folder))), Path(folder))
            _, empty = started(stack, Spec(numerics.mode(mode), 8, Path(folder), small))
            held[mode] = (worker.memory_full_info().uss - empty.memory_full_info().uss) / 2**20
    return {
        **{f"{mode}, MiB": round(value, 1) for mode, value in held.items()},
        "layercast / fp32": round(held["layercast"] / held["fp32"], 3),
    }


def nearly_nothing(folder: Path) -> Path:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.engines.tiny import build

    return build(folder, heads=2)


if __name__ == "__main__":
    main()
