"""vLLM: replay by `prompt_logprobs` beside decoding, on the shipped suite as a check runs it, in FP32 and in bf16.

    python benchmarks/vllm_replay.py

Medians of three rounds, replay and decoding in turn on one engine. Decoding one by one is timed once, on the first prompts
only, and held against their replay. `prefill alone` puts the same tokens through the model and asks for no number of any: no replay
can take less, so that decoding's time over it is the most that any replay could gain.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from _report import publish

from pytest_repro import models, numerics
from pytest_repro.comparison import compare_decode, compare_replay
from pytest_repro.engines.base import Engine, Spec, opener
from pytest_repro.generation import Generation, Request
from pytest_repro.golden import Golden
from pytest_repro.judging import doubtful
from pytest_repro.store import Place
from pytest_repro.suite import load

SUITE = Path(__file__).parents[1] / "golden" / "word-problems"
ROUNDS = 3
ONE_BY_ONE = 8


def main() -> None:
    suite = load(SUITE)
    files = models.resolve(suite.model, suite.folder, print)
    figures: dict[str, Any] = {"new tokens, at most": suite.max_new_tokens, "prompts": len(suite.prompts)}
    for mode in ("fp32", "bf16"):
        golden = Place(SUITE, mode).read()
        with opener("vllm")(Spec(numerics.mode(mode), suite.max_new_tokens, SUITE, files, say=print)) as engine:
            requests = [Request(p.id, np.asarray(engine.encode(p), np.int32), p.content) for p in suite.prompts]
            figures[mode] = timed(engine, watching(requests, golden), golden, suite.batch_size)
    publish("vllm_replay", figures)


def watching(requests: list[Request], golden: Golden) -> list[Request]:
    """Requests that carry the golden's tokens, as a check sends them."""
    recorded = golden.generation
    spans = [recorded.span(recorded.index()[r.id]) for r in requests]
    return [
        replace(r, reference=recorded.tokens[s], reference_runner_up=recorded.runner_up[s])
        for r, s in zip(requests, spans, strict=True)
    ]


def timed(engine: Engine, requests: list[Request], golden: Golden, batch: int) -> dict[str, Any]:
    few = requests[:ONE_BY_ONE]
    jobs: dict[str, Callable[[], Any]] = {
        "replay": lambda: engine.replay(requests),
        "prefill alone": lambda: prefill(engine, requests),
        f"decode, batch size {batch}": lambda: decode(engine, requests, batch),
        "replay of the first": lambda: engine.replay(few),
        "decode of the first, one by one": lambda: decode(engine, few, 1),
    }
    engine.replay(few)  # whatever is set up on first use
    times: dict[str, list[float]] = {name: [] for name in jobs}
    answers: dict[str, Any] = {}
    for round_ in range(ROUNDS):
        for name, job in jobs.items():
            if round_ and "first" in name:
                continue
            started = time.perf_counter()
            answers[name] = job()
            times[name].append(time.perf_counter() - started)
    whole, least, whole_decoded, part, part_decoded = (statistics.median(found) for found in times.values())
    now = Generation.of(requests, answers[f"decode, batch size {batch}"])
    by_replay = compare_replay(golden.generation, answers["replay"])
    by_decode = compare_decode(golden.generation, now)
    return {
        **{f"{name}, s": [round(t, 1) for t in found] for name, found in times.items()},
        f"decode at batch size {batch} / replay": round(whole_decoded / whole, 1),
        f"decode at batch size {batch} / prefill alone": round(whole_decoded / least, 1),
        "decode one by one / replay": round(part_decoded / part, 1),
        "prompts that replay clears": len(requests) - len(doubtful(by_replay, golden)),
        "prompts that differ, by replay and by decode": [int(by_replay.differs.sum()), int(by_decode.differs.sum())],
        "prompts on which the two disagree": int((by_replay.differs != by_decode.differs).sum()),
    }


def prefill(engine: Any, requests: list[Request]) -> None:
    """Prompts and their goldens through the model, as replay sends them, but for the log-probabilities."""
    engine._run([engine._prompt([*r.tokens.tolist(), *r.reference.tolist()], 1) for r in requests], lambda _: None)  # type: ignore[union-attr]


def decode(engine: Engine, requests: list[Request], batch: int) -> list[Any]:
    return [o for first in range(0, len(requests), batch) for o in engine.generate(requests[first : first + batch])]


if __name__ == "__main__":
    main()
