"""Settings of vLLM as axes: what moves when max_num_seqs or the tensor parallel size changes, in every compute class.

    python benchmarks/vllm_axes.py

Each cell is an engine of its own. Tensor parallel size 3, since the shipped model has nine heads; its ranks share cores,
which is slow and changes no number.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from _report import publish

from pytest_repro import models, numerics
from pytest_repro.comparison import compare_decode
from pytest_repro.engines.base import Spec, opener
from pytest_repro.generation import Generation, Request
from pytest_repro.suite import load

SUITE = Path(__file__).parents[1] / "golden" / "word-problems"
PROMPTS, NEW_TOKENS = 16, 64
CELLS: dict[str, dict[str, Any]] = {
    "max_num_seqs 16": {"max_num_seqs": 16},
    "max_num_seqs 1": {"max_num_seqs": 1},
    "tensor_parallel_size 3": {"max_num_seqs": 16, "tensor_parallel_size": 3},
}


def main() -> None:
    cores = os.sched_getaffinity(0)
    bound = "|".join(str(sorted(cores)[rank % len(cores)]) for rank in range(3))
    figures: dict[str, Any] = {"prompts": PROMPTS, "new tokens": NEW_TOKENS}
    for mode in ("fp32", "layercast", "bf16"):
        first, *others = CELLS
        reference = generated(mode, CELLS[first])
        for cell in others:
            if "parallel" in cell:
                os.environ["VLLM_CPU_OMP_THREADS_BIND"] = bound
            seen = compare_decode(reference, generated(mode, CELLS[cell], reference))
            os.environ.pop("VLLM_CPU_OMP_THREADS_BIND", None)
            deficits = seen.deficit[seen.differs]
            figures[f"{mode}: {first} -> {cell}"] = {
                "prompts that differ": int(seen.differs.sum()),
                "mean divergence index": round(float(seen.divergence_index[seen.differs].mean()), 1)
                if len(deficits)
                else None,
                "largest deficit": round(float(deficits.max()), 3) if len(deficits) else 0.0,
                "largest |dlogp| up to there": f"{np.nanmax(seen.max_abs_dlogp):.2e}",
            }
    publish("vllm_axes", figures)


def generated(mode: str, options: dict[str, Any], reference: Generation | None = None) -> Generation:
    """The first prompts' answers, all in one batch; a reference's tokens are watched."""
    suite = load(SUITE)
    files = models.resolve(suite.model, suite.folder)
    with opener("vllm")(Spec(numerics.mode(mode), NEW_TOKENS, SUITE, files, options, say=print)) as engine:
        requests = [Request(p.id, np.asarray(engine.encode(p), np.int32), p.content) for p in suite.prompts[:PROMPTS]]
        if reference is not None:
            requests = [replace(r, reference=reference.tokens[reference.span(i)]) for i, r in enumerate(requests)]
        return Generation.of(requests, engine.generate(requests))


if __name__ == "__main__":
    main()
