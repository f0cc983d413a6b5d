"""SHA-256 of all logits of a suite's first prompts, in exact compute and in FP32: how many different ones there are.

    python benchmarks/exact_hashes.py [--prompts 16] [--tokens 8] [--isa default,avx2,avx512]

Each mode runs with every instruction set that this CPU has and with one and two threads, each in a process of its own;
each process asks at batch sizes 1, 4 and 16, left-padded, in the file's order and turned round, and once token by token; in
exact compute once more by torch alone, without its C++.
What is hashed are the logits of every position of the prompt and of the golden's first tokens, float32, prompt by prompt
in the file's order.

Then the error of the logits: both modes against a float64 run with the same rotary frequencies.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from _report import publish

FOLDER = Path(__file__).parent.parent / "golden" / "word-problems"
ISA = {
    "default": ("default", "SSE41", "SSE4_2"),
    "avx2": ("avx2", "AVX2", "AVX2"),
    "avx512": ("avx512", "AVX512_CORE", "AVX512"),
}
VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")


def sequences(engine: Any, prompts: int, tokens: int) -> list[list[int]]:
    """Prompts with the first tokens of their goldens."""
    from pytest_repro import store, suite

    golden = store.Place(FOLDER, "fp32").read().generation
    asked = suite.load(FOLDER).prompts[:prompts]
    place = golden.index()
    return [engine.encode(p) + golden.tokens[golden.span(place[p.id])][:tokens].tolist() for p in asked]


def padded(engine: Any, rows: list[list[int]]) -> list[np.ndarray[Any, Any]]:
    """Logits of each row of one left-padded batch."""
    import torch

    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.inference_mode():
        logits = engine.model(input_ids=ids, attention_mask=mask, position_ids=positions).logits.float()
    return [logits[i, width - len(r) :].numpy() for i, r in enumerate(rows)]


def stepwise(engine: Any, row: list[int]) -> np.ndarray[Any, Any]:
    """Logits of a row that is decoded token by token."""
    import torch

    cache, found = None, []
    with torch.inference_mode():
        for token in row:
            out = engine.model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits[0, -1].float().numpy())
    return np.stack(found)


def ways(engine: Any, rows: list[list[int]]) -> Iterator[tuple[str, str]]:
    """(how the prompts were asked, SHA-256 of all their logits)."""
    for batch, turned in itertools.product((1, 4, 16), (False, True)):
        order = list(range(len(rows)))[:: -1 if turned else 1]
        found: dict[int, np.ndarray[Any, Any]] = {}
        for start in range(0, len(order), batch):
            some = order[start : start + batch]
            found |= dict(zip(some, padded(engine, [rows[i] for i in some]), strict=True))
        yield f"batch {batch}{', turned round' if turned else ''}", hashed([found[i] for i in range(len(rows))])
    yield "token by token", hashed([stepwise(engine, row) for row in rows])


def hashed(logits: list[np.ndarray[Any, Any]]) -> str:
    whole = hashlib.sha256()
    for one in logits:
        whole.update(np.ascontiguousarray(one, np.float32).tobytes())
    return whole.hexdigest()


def opened(mode: str) -> Any:
    from pytest_repro import models, numerics, suite
    from pytest_repro.engines.base import Spec, opener

    files = models.resolve(suite.load(FOLDER).model, FOLDER, print)
    return opener("transformers")(Spec(numerics.mode(mode), 8, FOLDER, files))


def run_cell(mode: str, args: argparse.Namespace) -> None:
    from pytest_repro.numerics import exact

    with opened(mode) as engine:
        rows = sequences(engine, args.prompts, args.tokens)
        for way, digest in ways(engine, rows):
            print(json.dumps([way, digest]), flush=True)
        if mode == "exact":
            with exact.unfused():
                found = [logits for i in range(0, len(rows), 4) for logits in padded(engine, rows[i : i + 4])]
            print(json.dumps(["torch alone, batch 4", hashed(found)]))


def errors(args: argparse.Namespace) -> dict[str, Any]:
    """Largest and mean |error| of the logits against float64."""
    import copy

    import torch

    from pytest_repro.numerics.exact import rotary

    with opened("exact") as engine:
        rows = sequences(engine, args.prompts, args.tokens)
        exact = [padded(engine, [row])[0] for row in rows]
    with opened("fp32") as engine:
        for name, module in engine.model.named_modules():
            if hasattr(module, "inv_freq"):
                module.inv_freq = frequency = rotary.of(module, name)
        fp32 = [padded(engine, [row])[0] for row in rows]
        wide = copy.deepcopy(engine.model).double()
        for module in wide.modules():
            if hasattr(module, "inv_freq"):
                module.inv_freq = frequency
        with torch.inference_mode():
            reference = [wide(input_ids=torch.tensor([row])).logits[0].numpy() for row in rows]
    found = {}
    for name, logits in (("exact", exact), ("fp32", fp32)):
        apart = np.concatenate([np.abs(a - b).ravel() for a, b in zip(logits, reference, strict=True)])
        found[name] = {"largest": float(apart.max()), "mean": float(apart.mean())}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=8, help="of the golden's answer behind each prompt")
    parser.add_argument("--isa", default=",".join(ISA), help="instruction sets, with commas")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        run_cell(args.cell, args)
        return
    seen: dict[str, dict[str, list[str]]] = {}
    for mode, isa, threads in itertools.product(("exact", "fp32"), args.isa.split(","), (1, 2)):
        print("running", mode, isa, threads, flush=True)
        env = {**os.environ, **dict(zip(VARIABLES, ISA[isa], strict=True)), "OMP_NUM_THREADS": str(threads)}
        command = [
            sys.executable,
            __file__,
            "--cell",
            mode,
            "--prompts",
            str(args.prompts),
            "--tokens",
            str(args.tokens),
        ]
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
        for line in done.stdout.splitlines():
            if line.startswith("["):
                way, digest = json.loads(line)
                seen.setdefault(mode, {}).setdefault(digest, []).append(f"{isa}, threads {threads}, {way}")
    figures = {
        mode: {"runs": sum(map(len, found.values())), "distinct": len(found), "hashes": found}
        for mode, found in seen.items()
    }
    publish("exact_hashes", {"prompts": args.prompts, **figures, "error_against_float64": errors(args)})


if __name__ == "__main__":
    main()
