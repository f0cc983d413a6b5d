"""Comparing 10,000 recorded generations of 512 tokens with 10,000 new ones: time and peak memory.

    python benchmarks/compare_10k.py

Counted: reading and verifying the golden from its two files, the comparison, and every prompt's verdict.
"""

from __future__ import annotations

import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from _report import publish

from pytest_repro import noise
from pytest_repro.comparison import compare_decode
from pytest_repro.generation import Generation, digest
from pytest_repro.golden import Golden
from pytest_repro.noise import Envelope, Variant
from pytest_repro.store import Place
from pytest_repro.verdict import Evidence, judge

PROMPTS, TOKENS, VOCABULARY = 10_000, 512, 49_152


def generation(seed: int, moved: int = 0) -> Generation:
    """Synthetic outputs; `moved` of them part from seed 0's at a random place."""
    rng = np.random.default_rng(0)
    size = PROMPTS * TOKENS
    tokens = rng.integers(0, VOCABULARY, size, dtype=np.int32)
    logprob = -rng.exponential(0.3, size).astype(np.float32)
    gap = rng.exponential(3.0, size).astype(np.float32)
    runner_up = rng.integers(0, VOCABULARY, size, dtype=np.int32)
    changed = np.random.default_rng(seed + 1)
    for row in changed.choice(PROMPTS, moved, replace=False):
        tokens[row * TOKENS + changed.integers(TOKENS) : (row + 1) * TOKENS] += 1
    if moved:
        logprob = logprob + changed.normal(0, 0.02, size).astype(np.float32)
    names = tuple(f"p{i:05d}" for i in range(PROMPTS))
    same = tuple(digest(name) for name in names)
    return Generation(
        ids=names, prompt_digests=same, content_digests=same, texts=("some text of an answer",) * PROMPTS,
        finish_reasons=("length",) * PROMPTS, offsets=np.arange(PROMPTS + 1, dtype=np.int64) * TOKENS,
        tokens=tokens, logprob=logprob, gap=gap, runner_up=runner_up,
        reference_logprob=logprob - gap if moved else None,
    )  # fmt: skip


def main() -> None:
    variant = Variant("synthetic", 0.02, 0.2, 0.5, 0.25, 10)
    level = np.full(PROMPTS, 0.02, np.float32)
    golden = Golden(
        suite="synthetic", model="none", compute_class="bf16", device_class="", numerics="bf16", max_new_tokens=TOKENS,
        batch_size=8, fingerprint={"engine": "none"}, generation=generation(0), scores=(None,) * PROMPTS,
        noise=Envelope("bf16", (variant,), level, level),
    )  # fmt: skip
    now = generation(1, moved=3000)
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder), "bf16")
        place.write(golden)
        del golden
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started = time.perf_counter()
        read = place.read()
        loaded = time.perf_counter()
        seen = compare_decode(read.generation, now)
        compared = time.perf_counter()
        counts: dict[str, int] = {}
        ratio = noise.bulk_ratio("bf16")
        for i in range(len(seen)):
            row = seen.row(i)
            evidence = Evidence(
                row.divergence_index >= 0,
                row.deficit,
                row.mean_abs_dlogp,
                read.noise.max_deficit,
                read.noise.level(i),
                ratio,
            )
            verdict = str(judge(evidence, "explained", False).verdict)
            counts[verdict] = counts.get(verdict, 0) + 1
        judged = time.perf_counter()
    publish(
        "compare_10k",
        {
            "prompts": PROMPTS,
            "tokens each": TOKENS,
            "seconds": round(judged - started, 2),
            "of which reading and verifying": round(loaded - started, 2),
            "of which comparing": round(compared - loaded, 2),
            "of which judging": round(judged - compared, 2),
            "peak memory of the whole process, MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            "of which before reading, MiB": before // 1024,
            "verdicts": counts,
        },
    )


if __name__ == "__main__":
    main()
