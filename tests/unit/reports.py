"""JSON reports made by hand, of any size: what the HTML report is rendered from."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from pytest_repro.fingerprint import Change
from pytest_repro.report import document
from pytest_repro.result import Check, PromptResult, SuiteResult, Texts
from pytest_repro.traces import EDGES
from pytest_repro.verdict import Verdict

from .builders import judged, suite_result

ENVELOPE = {"mean_abs_dlogp": 0.0156, "max_abs_dlogp": 0.5, "max_deficit": 0.25, "bulk_ratio": 2.0, "variants": ["batch size 1"]}  # fmt: skip
WORDS = (" the", " eggs", " cost", " 12", ".", "\n", " dollars", " She", " then", " buys")


def trace(tokens: int, *, seed: int = 0, flip_at: int | None = None, words: tuple[str, ...] = WORDS) -> dict[str, Any]:
    """A course of so many tokens; at `flip_at` the runner-up has overtaken by 0.125 nats."""
    rng = np.random.default_rng(seed)
    gap = rng.gamma(1.0, 3.0, tokens)
    now = gap + rng.normal(0, 0.05, tokens)
    now = np.where(now < 0, gap, now)
    if flip_at is not None:
        gap[flip_at], now[flip_at] = 0.0625, -0.125
    short = [[float(f"{v:.4g}") for v in column] for column in (-np.exp(-gap), gap, rng.normal(0, 0.02, tokens), now)]
    return {
        "tokens": [words[i % len(words)] for i in range(tokens)],
        "runner_up": [words[(i + 3) % len(words)] for i in range(tokens)],
        **dict(zip(("logprob", "gap", "dlogp", "gap_now"), short, strict=True)),
        "deficit": [max(0.0, -v) for v in short[3]],
    }


def parted(
    name: str, verdict: Verdict = Verdict.NEAR_TIE, *, tokens: int = 12, at: int = 5, **more: Any
) -> PromptResult:
    """A prompt that parts from its golden, traced."""
    course = trace(tokens, seed=sum(map(ord, name)), flip_at=at)
    words = course["tokens"]
    golden, now = "".join(words), "".join(words[:at]) + " 17 or so" + "".join(words[at:])
    usual = {
        "reason": "rounding explains it", "method": "replay+decode", "tokens": tokens, "tokens_now": tokens + 3,
        "divergence_index": at, "deficit": 0.125, "deficit_index": at, "golden_gap": 0.0625, "mean_abs_dlogp": 0.0175,
        "benign_dlogp": 0.0156, "golden_text": Texts("".join(words[:at]), words[at], "".join(words[at + 1 : at + 9])),
        "now_text": Texts("".join(words[:at]), " 17", " or so"), "score_golden": True, "score_now": True,
        "prompt": f"How much do the eggs of {name} cost?", "golden_full": golden, "now_full": now, "trace": course,
    }  # fmt: skip
    return judged(name, verdict, **{**usual, **more})


def same(name: str, *, tokens: int = 12, **more: Any) -> PromptResult:
    """A prompt that does not differ."""
    usual = {"deficit": 0.0, "golden_gap": None, "mean_abs_dlogp": 0.0156, "benign_dlogp": 0.0156, "tokens_now": tokens}
    return judged(name, tokens=tokens, **{**usual, **more})


def suite_of(*prompts: PromptResult, **changes: Any) -> SuiteResult:
    """A failing suite with everything that a report may hold."""
    moved = np.abs(np.random.default_rng(1).normal(0, 0.02, 500))
    usual: dict[str, Any] = {
        "envelope": ENVELOPE,
        "envelope_deficit": ENVELOPE["max_deficit"],
        "distribution": {"edges": EDGES.tolist(), "counts": np.histogram(moved, EDGES)[0].tolist(), "zeros": 7},
        "environment_diff": (
            Change("batch_size", "numerics", 8, 1),
            Change("torch", "numerics", "2.13.0", "2.14.0"),
            Change("commit", "information", "sha256:" + "a" * 64, "sha256:" + "b" * 64),
        ),
        "checks": (
            Check("golden", "pass", "bf16.golden, accepted by Ada"),
            Check("compute", "pass", "observed bf16: 7.2 product bits\nfp32_waiver = explained does not apply"),
            Check("accuracy", "pass", "40.6 % -> 37.5 %   1 lost, 0 gained, p = 0.5; 32 prompts can show a drop of 9.4 points"),
            Check("length", "skip", "not judged: not every prompt was generated"),
        ),
        "metrics": {"mean_abs_dlogp": 0.0171, "benign_abs_dlogp": 0.0156},
        "notes": ("unused in the golden: p99",),
        "next_steps": (("pytest --repro-check golden/s --repro-numerics fp32", "FP32 removes what is only rounding"),),
    }  # fmt: skip
    return suite_result(*prompts, **{**usual, **changes})


def report(*suites: SuiteResult) -> dict[str, Any]:
    """A session's report, as it is read from its file."""
    made: dict[str, Any] = json.loads(json.dumps(document.of_session([document.of_suite(s) for s in suites], [])))
    return made


def large(prompts: int, tokens: int) -> dict[str, Any]:
    """One suite of so many prompts: every other one differs, and the worst are traced, as a check would trace them."""
    traced = min(prompts, 50_000 // tokens)
    found = []
    for i in range(prompts):
        name, differs = f"p{i:04}", i % 2 == 0
        prompt = (
            parted(name, tokens=tokens, at=tokens // 3)
            if differs
            else same(name, tokens=tokens, trace=trace(tokens, seed=i))
        )
        bare = {"trace": None, "prompt": "", "golden_full": None, "now_full": None}
        found.append(prompt if i // 2 < traced // 2 else type(prompt)(**{**vars(prompt), **bare}))
    return report(suite_of(*found))


# --- what a model may say -------------------------------------------------------------------------------------------

_RUN = "window.owned=1"
HOSTILE = {
    "script": f"<script>{_RUN}</script>",
    "script-end": f"</script><script>{_RUN}</script>",
    "script-end-spaced": f"</script ><script>{_RUN}</script >",
    "script-upper": f"</SCRIPT><SCRIPT>{_RUN}</SCRIPT>",
    "comment-script": "<!--<script>",
    "comment-end": "--><script>window.owned=1</script>",
    "style-end": "</style><style>*{display:none}</style>",
    "title-end": "</title><h1>PASS</h1>",
    "noscript": "</noscript><img src=x onerror=window.owned=1>",
    "image": f"<img src=x onerror={_RUN}>",
    "image-remote": '<img src="https://example.org/pixel.png">',
    "svg": f"<svg onload={_RUN}>",
    "svg-script": f"</svg><svg><script>{_RUN}</script></svg>",
    "desc-end": f"</desc></svg><img src=x onerror={_RUN}>",
    "iframe": f'<iframe srcdoc="<script>parent.{_RUN}</script>"></iframe>',
    "details": f"<details open ontoggle={_RUN}>x",
    "base": '<base href="https://example.org/">',
    "refresh": '<meta http-equiv="refresh" content="0;url=https://example.org/">',
    "form": '<form action="https://example.org/"><button>Accept</button></form>',
    "link": f'<a href="javascript:{_RUN}">see</a>',
    "stylesheet": '<link rel="stylesheet" href="https://example.org/x.css">',
    "template": "{{ 7 * 7 }}{% include '/etc/passwd' %}{# x #}",
    "attribute": f'" onmouseover="{_RUN}" autofocus onfocus="{_RUN}" x="',
    "attribute-single": f"' onmouseover='{_RUN}' x='",
    "attribute-backtick": f"` onmouseover={_RUN} `",
    "entity": "&lt;script&gt;window.owned=1&lt;/script&gt;&#60;b&#62;",
    "json-escape": "\\u003cscript\\u003e \\\" \\\\",
    "json-end": '"}]}</script>',
    "javascript": f"javascript:{_RUN}",
    "dialog": "<script>alert(1)</script><body onload=alert(1)>",
    "prototype": "__proto__",
    "markdown-link": f"[click](javascript:{_RUN}) ![x](https://example.org/x.png)",
    "markdown-table": "| a | b |\n|---|---|\n| `c` | **d** |\n# heading",
    "command": "::set-output name=verdict::pass",
    "stop-commands": "::stop-commands::x\n::error file=a::b",
    "hash-command": "##[error]boom",
    "ansi": "\x1b[2J\x1b[31mred\x1b[0m",
    "title-escape": "\x1b]0;owned\x07",
    "link-escape": "\x1b]8;;https://example.org\x07see\x1b]8;;\x07",
    "c1": "\x9b2J\x85",
    "nul": "a\x00b\ufffe",
    "carriage": "FAIL\rPASS",
    "backspace": "bad\x08\x08\x08good",
    "bidi": "\u202egnp.exe\u202c \u2066x\u2069",
    "invisible": "a\u200bb\u200d\ufeffc\u2060",
    "smuggled": "x\ufe0f\U000e0101\U000e0041\u3164",
    "separators": "one\u2028two\u2029three",
    "surrogate": "\ud800 \udfff",
    "stacked": "Z" + "\u0300" * 300,
    "long-line": "x" * 1_000_000,
    "long-lines": "y\n" * 300_000,
    "long-controls": "\x00" * 100_000,
}  # fmt: skip
"""Name -> text of a model, a suite or a golden that must not act, and must be legible."""

_FIXED = {"verdict", "status", "cls", "method", "finding", "schema", "counts", "size"}


def poisoned(value: Any, text: str) -> Any:
    """A report in which every string that anybody but this package writes is that text."""
    if isinstance(value, dict):
        names = {"golden", "compute", "accuracy", "length"}
        return {
            key: item if key in _FIXED or (key == "name" and item in names) else poisoned(item, text)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [poisoned(item, text) for item in value]
    return text if isinstance(value, str) else value
