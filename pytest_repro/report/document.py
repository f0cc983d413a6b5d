"""The JSON report (`schemas/report.schema.json`): what every other surface, and every other tool, reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import __version__
from ..result import PromptResult, Recording, SuiteResult
from ..store import atomic_write
from ..verdict import Verdict

SCHEMA = 1
METRICS = (
    "divergent", "unexplained", "div_percent", "mean_div_index", "mean_abs_dlogp", "accuracy_golden", "accuracy_now",
    "accuracy_p_value",
)  # fmt: skip
"""Metrics that are there whatever happened; null where they could not be taken."""

Document = dict[str, Any]


def of_suite(result: SuiteResult) -> Document:
    """One suite in one numerics mode."""
    failures = result.failures
    return {
        "name": result.name,
        "path": result.path,
        "numerics": result.numerics,
        "verdict": "pass" if result.passed else "fail",
        "observed_compute": (result.observed or {}).get("compute_class"),
        "observed": dict(result.observed) if result.observed else None,
        "golden": dict(result.golden) if result.golden else None,
        "size": result.size,
        "counts": {str(verdict): n for verdict, n in result.counts.items()},
        "failures": [failure.rule for failure in failures],
        "thresholds": asdict(result.thresholds),
        "metrics": {
            **dict.fromkeys(METRICS),
            "divergent": result.counts.get(Verdict.NEAR_TIE, 0) + result.counts.get(Verdict.DRIFT, 0),
            "unexplained": result.counts.get(Verdict.DRIFT, 0),
            **result.metrics,
        },
        "envelope_deficit": result.envelope_deficit,
        "environment": dict(result.environment),
        "environment_diff": [asdict(change) for change in result.environment_diff],
        "equal_fields": result.equal_fields,
        "checks": [asdict(check) for check in result.checks],
        "prompts": [_prompt(p, result) for p in result.prompts],
        "notes": list(result.notes),
        "next_steps": [{"command": command, "when": when} for command, when in result.next_steps],
        "seconds": round(result.seconds, 3),
    }


def _prompt(prompt: PromptResult, result: SuiteResult) -> Document:
    rule = result.failing_rule(prompt)
    return {**asdict(prompt), "verdict": str(prompt.verdict), "fails": rule.rule if rule else None}


def of_recording(recording: Recording) -> Document:
    """One candidate that was recorded."""
    return asdict(recording)


def of_session(suites: Sequence[Mapping[str, Any]], recordings: Sequence[Mapping[str, Any]]) -> Document:
    """A whole session."""
    first: Mapping[str, Any] = next((s["environment"] for s in (*suites, *recordings) if s["environment"]), {})
    return {
        "schema": SCHEMA,
        "tool": f"pytest-repro {__version__}",
        "verdict": "fail" if any(s["verdict"] == "fail" for s in suites) else "pass",
        "environment": first,
        "suites": list(suites),
        "recordings": list(recordings),
    }


def write(path: Path, document: Document) -> None:
    """Write a report, whole or not at all. Non-ASCII text is escaped, so that model text stays inert."""
    atomic_write(path, json.dumps(document, indent=1, ensure_ascii=True, allow_nan=False).encode() + b"\n")
