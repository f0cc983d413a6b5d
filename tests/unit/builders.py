"""Hand-made values for the unit tests: small, exact in binary, and legible in an assertion."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pytest_repro.generation import Generation, Output, Request, Scores, digest
from pytest_repro.golden import Golden, Review
from pytest_repro.noise import Envelope, Variant
from pytest_repro.result import Check, PromptResult, SuiteResult
from pytest_repro.suite import Prompt, Suite, Thresholds
from pytest_repro.verdict import Verdict

ESCAPE = "\x1b[31m"
REVIEW = Review(by="Ada <ada@example.org>", when="2026-11-21T10:00:00+00:00", reason="first", previous=None)
IDENTITY = {"model.weights": "sha256:w", "tokenizer": "sha256:t"}
BF16 = {"compute_class": "bf16", "product_bits": 8.0, "sum_bits": 8.0, "detail": "lm_head"}
FP32 = {"compute_class": "fp32", "product_bits": 24.0, "sum_bits": 23.0, "detail": "lm_head"}
SETTINGS = {
    "prompts": "sha256:p", "max_new_tokens": 8, "batch_size": 2, "engine": "scripted", "scorer": "exact", "method": "auto",
    "arbiter": "auto", "allow_changed": "", "golden": None,
}  # fmt: skip
SUITE_TOML = '[suite]\nname = "s"\nmodel = "m"\nprompts = "prompts.jsonl"\n'
"""Four lines: what a test appends starts on line 5."""


def f32(values: Sequence[float]) -> Any:
    return np.asarray(values, np.float32)


def i32(values: Sequence[int]) -> Any:
    return np.asarray(values, np.int32)


def request(name: str, **more: Any) -> Request:
    return Request(name, i32(list(name.encode())), f"question {name}", **more)


def output(name: str, tokens: Sequence[int], *, watched: Sequence[float] | None = None, **more: Any) -> Output:
    """An answer: log-probability -0.5 and gap 1.0 at every token, runner-up 99, unless told otherwise."""
    n = len(tokens)
    return Output(
        id=name,
        tokens=i32(tokens),
        text=more.get("text", " ".join(map(str, tokens))),
        finish_reason=more.get("finish_reason", "stop"),
        logprob=f32(more.get("logprob", [-0.5] * n)),
        gap=f32(more.get("gap", [1.0] * n)),
        runner_up=i32(more.get("runner_up", [99] * n)),
        reference_logprob=None if watched is None else f32(watched),
        error=more.get("error", ""),
    )


def generation(*outputs: Output) -> Generation:
    return Generation.of([request(out.id) for out in outputs], outputs)


def unwatched(*outputs: Output) -> Generation:
    return replace(generation(*outputs), reference_logprob=None)


def scores(
    name: str,
    top: Sequence[int],
    deficit: Sequence[float] | None = None,
    logprob: Sequence[float] | None = None,
    gap: Sequence[float] | None = None,
) -> Scores:
    n = len(top)
    return Scores(
        name, f32(logprob or [-0.5] * n), f32(deficit or [0.0] * n), i32(top), f32([1.0] * n if gap is None else gap)
    )


def variant(name: str = "batch 1", **more: Any) -> Variant:
    numbers = {"mean_abs_dlogp": 0.5, "max_abs_dlogp": 1.0, "max_abs_dgap": 0.25, "max_deficit": 0.125}
    return Variant(name=name, **{**numbers, "flipped_prompts": 0, **more})


def envelope(prompts: int, compute_class: str = "bf16", **more: Any) -> Envelope:
    """Explains a deficit of 0.25 and knows a benign |Δlogp| of 0.5: in bf16, up to 1.0 is benign, in fp32 up to 5.0.

    Gaps move by 0.125.
    """
    return Envelope(compute_class, (variant(**more),), f32([0.5] * prompts), f32([0.125] * prompts))


def golden(recorded: Generation, **changes: Any) -> Golden:
    compute_class = changes.get("compute_class", "bf16")
    base = Golden(
        suite="s",
        model="m",
        compute_class=compute_class,
        device_class="",
        numerics="native",
        max_new_tokens=8,
        batch_size=4,
        fingerprint={**IDENTITY, "engine": "scripted", "engine_version": "1.0", "batch_size": 4, "time": "2026-11-21"},
        generation=recorded,
        scores=(None,) * len(recorded),
        noise=envelope(len(recorded), compute_class),
        review=REVIEW,
        digest=digest("content"),
    )
    return replace(base, **changes)


def suite(*names: str, answers: dict[str, str] | None = None, **changes: Any) -> Suite:
    prompts = tuple(Prompt(name, f"question {name}", (answers or {}).get(name)) for name in names)
    return replace(Suite("s", Path("golden/s"), "m", prompts, max_new_tokens=8, batch_size=4), **changes)


def suite_result(*prompts: PromptResult, **changes: Any) -> SuiteResult:
    base = SuiteResult(
        name="s",
        path="golden/s",
        numerics="bf16",
        thresholds=Thresholds(),
        size=len(prompts),
        prompts=prompts,
        checks=(Check("golden", "pass", "bf16.golden, accepted by Ada"),),
        golden={"name": "bf16", "digest": digest("content"), "recorded": "2026-11-21T10:00:00+00:00",
                "engine": "scripted 1.0", "batch_size": 4, "review": vars(REVIEW), "accuracy": None, "mean_abs_dlogp": 0.5},
        observed=BF16,
        environment={**IDENTITY, "engine": "scripted", "batch_size": 4},
        equal_fields=3,
        settings=SETTINGS,
    )  # fmt: skip
    return replace(base, **changes)


def judged(name: str, verdict: Verdict = Verdict.IDENTICAL, **more: Any) -> PromptResult:
    return PromptResult(name, verdict, method=more.pop("method", "replay"), tokens=more.pop("tokens", 8), **more)


def write_suite(folder: Path, toml: str = SUITE_TOML, prompts: str | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "suite.toml").write_text(toml, "utf-8")
    lines = json.dumps({"id": "p01", "prompt": "Hello", "answer": "5"}) + "\n" if prompts is None else prompts
    (folder / "prompts.jsonl").write_text(lines, "utf-8")
    return folder
