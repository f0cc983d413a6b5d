"""The JSON report (`schemas/report.schema.json`): what every other surface, and every other tool, reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import __version__, schemas
from ..errors import ConfigError
from ..fingerprint import Change
from ..result import Check, PromptResult, Recording, SuiteResult, Texts
from ..store import atomic_write
from ..suite import parse_shard, thresholds
from ..verdict import Verdict

SCHEMA = 1
METRICS = (
    "divergent", "unexplained", "div_percent", "mean_div_index", "mean_abs_dlogp", "accuracy_golden", "accuracy_now",
    "accuracy_p_value",
)  # fmt: skip
"""Metrics that are there whatever happened; null where they could not be taken."""

Document = dict[str, Any]
_MADE_BY = "name reports of pytest --repro-check --repro-shard i/n --repro-report-json FILE"


def of_suite(result: SuiteResult) -> Document:
    """One suite in one numerics mode."""
    failures = result.failures
    return {
        "name": result.name,
        "path": result.path,
        "numerics": result.numerics,
        "shard": str(result.shard) if result.shard else None,
        "again": result.again,
        "settings": dict(result.settings),
        "verdict": "pass" if result.passed else "fail",
        "claimed_compute": result.claimed,
        "observed_compute": (result.observed or {}).get("compute_class"),
        "observed": dict(result.observed) if result.observed else None,
        "golden": dict(result.golden) if result.golden else None,
        "size": result.size,
        "shard_size": result.shard_size,
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
        "envelope": dict(result.envelope) if result.envelope else None,
        "distribution": dict(result.distribution) if result.distribution else None,
        "localisation": dict(result.localisation) if result.localisation else None,
        "environment": dict(result.environment),
        "environment_diff": [asdict(change) for change in result.environment_diff],
        "equal_fields": result.equal_fields,
        "calibrated": list(result.calibrated),
        "envelope_diff": None if result.envelope_diff is None else [asdict(change) for change in result.envelope_diff],
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


def of_session(
    suites: Sequence[Mapping[str, Any]], recordings: Sequence[Mapping[str, Any]], other_failures: int = 0
) -> Document:
    """A whole session; `other_failures` counts tests that failed beside the suites' own."""
    first: Mapping[str, Any] = next((s["environment"] for s in (*suites, *recordings) if s["environment"]), {})
    return {
        "schema": SCHEMA,
        "tool": f"pytest-repro {__version__}",
        "verdict": "fail" if any(s["verdict"] == "fail" for s in suites) else "pass",
        "environment": first,
        "suites": list(suites),
        "recordings": list(recordings),
        "other_failures": other_failures,
    }


def read(path: Path) -> list[SuiteResult]:
    """The suites of a report, as results again.

    Raises:
        ConfigError: it is not a report of this schema, holds no check, or says what does not follow from its prompts.
    """
    data = _loaded(path)
    if not data["suites"]:
        raise ConfigError("this report holds no check", where=path, fix=_MADE_BY)
    return [_agreeing(_result(suite, str(path)), suite, str(path)) for suite in data["suites"]]


def other_failures(path: Path) -> int:
    """Tests that failed beside the suites' own.

    Raises:
        ConfigError: it is not a report of this schema.
    """
    return int(_loaded(path)["other_failures"])


def _agreeing(result: SuiteResult, suite: Mapping[str, Any], where: str) -> SuiteResult:
    """The result, if its prompts, checks and thresholds come to the verdict and the counts that the report states."""
    again = of_suite(result)
    for key in ("verdict", "counts", "failures"):
        if again[key] != suite[key]:
            raise ConfigError(
                f"this report does not agree with itself: it says {json.dumps(suite[key])}, its prompts say {json.dumps(again[key])}",
                where=f"{where} [{suite['path']} {suite['numerics']} {key}]",
                fix=_MADE_BY,
            )
    return result


def _loaded(path: Path) -> dict[str, Any]:
    try:
        data = schemas.parse(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise ConfigError("there is no such report", where=path, fix=_MADE_BY) from None
    except (OSError, ValueError, RecursionError) as exc:
        raise ConfigError(f"not a JSON report: {exc}", where=path, fix=_MADE_BY) from None
    version = data.get("schema") if isinstance(data, dict) else None
    if version != SCHEMA:
        raise ConfigError(f"a report of schema {SCHEMA} is needed, and this has {version!r}", where=path, fix=_MADE_BY)
    error = schemas.first_error(data, "report")
    if error is not None:
        name = ".".join(map(str, error.absolute_path))
        raise ConfigError(schemas.describe(error), where=f"{path} [{name}]", fix=_MADE_BY)
    loaded: dict[str, Any] = data
    return loaded


def _result(suite: Mapping[str, Any], where: str) -> SuiteResult:
    return SuiteResult(
        name=suite["name"],
        path=suite["path"],
        numerics=suite["numerics"],
        thresholds=thresholds(suite["thresholds"], where=f"{where} [thresholds]", fix=_MADE_BY),
        size=suite["size"],
        prompts=tuple(_prompt_result(p) for p in suite["prompts"]),
        checks=tuple(Check(**check) for check in suite["checks"]),
        claimed=suite["claimed_compute"],
        shard=parse_shard(suite["shard"], where=f"{where} [shard]") if suite["shard"] else None,
        shard_size=suite["shard_size"],
        again=suite["again"],
        settings=suite["settings"],
        golden=suite["golden"],
        observed=suite["observed"],
        environment=suite["environment"],
        environment_diff=tuple(Change(**change) for change in suite["environment_diff"]),
        equal_fields=suite["equal_fields"],
        calibrated=tuple(suite.get("calibrated", ())),
        envelope_diff=_changes(suite.get("envelope_diff")),
        envelope_deficit=suite["envelope_deficit"],
        envelope=suite["envelope"],
        distribution=suite["distribution"],
        localisation=suite["localisation"],
        metrics=suite["metrics"],
        notes=tuple(suite["notes"]),
        seconds=suite["seconds"],
        next_steps=tuple((step["command"], step["when"]) for step in suite["next_steps"]),
    )


def _changes(found: Sequence[Mapping[str, Any]] | None) -> tuple[Change, ...] | None:
    return None if found is None else tuple(Change(**change) for change in found)


def _prompt_result(prompt: Mapping[str, Any]) -> PromptResult:
    fields = {key: value for key, value in prompt.items() if key != "fails"}
    texts = {key: Texts(**fields[key]) for key in ("golden_text", "now_text") if fields.get(key)}
    return PromptResult(**{**fields, **texts, "verdict": Verdict(fields["verdict"])})


def write(path: Path, document: Document) -> None:
    """Write a report, whole or not at all. Escapes leave model text inert, also where a CI job prints the file."""
    text = json.dumps(document, ensure_ascii=True, allow_nan=False).replace("##[", "#\\u0023[")
    atomic_write(path, text.encode() + b"\n")
