"""How far do benign changes move the shipped goldens? Other instruction sets, one thread; replay of every prompt.

    python benchmarks/benign.py

Each change is a fresh pytest process with its environment; figures are each prompt's mean |Δlogp| over its own recorded
benign level, and what the verdicts were. `docs/decisions/0003-*.md` rests on them. On another CPU than the one that recorded
the goldens every change is one of machine as well: the figures are published as `benign_elsewhere`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _report import publish

ROOT = Path(__file__).parent.parent
BOTH = ("fp32", "bf16")
CHANGES: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "none": (BOTH, {}),
    "one thread": (BOTH, {"OMP_NUM_THREADS": "1"}),
    # torch's own bf16 attention cannot be forced down on a CPU with bf16 instructions: oneDNN's products alone can.
    "oneDNN without bf16 instructions": (("bf16",), {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}),
    "AVX2": (
        ("fp32",),
        {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    ),
    "SSE4": (
        ("fp32",),
        {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    ),
}


def check(numerics: tuple[str, ...], environment: dict[str, str], report: Path) -> list[dict[str, Any]]:
    """One pytest run; the suites of its report."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--repro-check",
        "golden/word-problems",
        "--repro-method",
        "replay",
        "-q",
    ]
    subprocess.run(
        [*command, f"--repro-report-json={report}", f"--repro-numerics={','.join(numerics)}"],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        check=False,
    )
    suites: list[dict[str, Any]] = json.loads(report.read_text())["suites"]
    return suites


def main() -> None:
    figures: dict[str, Any] = {}
    elsewhere = False
    with tempfile.TemporaryDirectory() as folder:
        for name, (numerics, environment) in CHANGES.items():
            for suite in check(numerics, environment, Path(folder) / "report.json"):
                elsewhere |= any(change["field"] == "cpu_model" for change in suite["environment_diff"])
                ratios = [p["mean_abs_dlogp"] / p["benign_dlogp"] for p in suite["prompts"]]
                figures[f"{suite['numerics']}, {name}"] = {
                    "mean |Δlogp|": f"{suite['metrics']['mean_abs_dlogp']:.3g}",
                    "over the benign level, median": round(statistics.median(ratios), 2),
                    "over the benign level, largest": round(max(ratios), 2),
                    "largest deficit": f"{max(p['deficit'] for p in suite['prompts']):.3g}",
                    "envelope": f"{suite['envelope_deficit']:.3g}",
                    "verdicts": suite["counts"],
                    "suite": suite["verdict"],
                }
    publish("benign_elsewhere" if elsewhere else "benign", figures)


if __name__ == "__main__":
    main()
