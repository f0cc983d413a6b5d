"""An in-toto statement of a check's outcome, for whoever signs what was tested before it is released.

Statement v1 with the predicate `test-result` v0.1. The subjects are the weights that ran and the goldens they were held
against; the configuration is the goldens and the report, by their digests. Unsigned: signing is for the tools that hold keys.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from ..errors import ConfigError
from ..text import inert

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://in-toto.io/attestation/test-result/v0.1"
_WARNED = ("near_tie", "waived", "drift")
"""Verdicts that a suite may tolerate, and that are not the same as before."""


def statement(suites: Sequence[Mapping[str, Any]], name: str, report: bytes, *, run: str = "") -> str:
    """The statement, as JSON.

    Args:
        suites: of one report.
        name: the report's file name.
        report: its bytes.
        run: the address of the CI run, if there is one.

    Raises:
        ConfigError: nothing in the report has a digest, so that there is nothing to state anything about.
    """
    goldens = [found for suite in suites for found in _golden(suite)]
    subject = _unique([*(found for suite in suites for found in _weights(suite)), *goldens])
    if not subject:
        raise ConfigError(
            "neither weights nor goldens of this report are known by a digest: nothing was checked",
            where=name,
            fix="mend what the report says first: pytest-repro report FILE --to markdown",
        )
    tests = {kind: sorted(names) for kind, names in _tests(suites).items()}
    failed = any(suite["verdict"] == "fail" for suite in suites)
    predicate = {
        "result": "FAILED" if failed else "WARNED" if tests["warnedTests"] else "PASSED",
        "configuration": [
            *_unique(goldens),
            {"name": inert(PurePath(name).name), "digest": {"sha256": hashlib.sha256(report).hexdigest()}},
        ],
        **({"url": run} if run else {}),
        **tests,
    }
    document = {"_type": STATEMENT, "subject": subject, "predicateType": PREDICATE, "predicate": predicate}
    return json.dumps(document, indent=1, ensure_ascii=True) + "\n"


def _weights(suite: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    yield from _descriptor("model.weights", suite["environment"].get("model.weights"))


def _golden(suite: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    if suite["golden"]:
        yield from _descriptor(f"{suite['path']}/{suite['golden']['name']}.golden", suite["golden"]["digest"])


def _descriptor(name: str, digest: Any) -> Iterator[dict[str, Any]]:
    """A resource, if its digest is one. `gguf-sha256:` is of the file that the weights were read from."""
    if found := re.fullmatch(r"(?:[a-z0-9]+-)?sha256:([0-9a-f]{64})", str(digest)):
        yield {"name": inert(name), "digest": {"sha256": found[1]}}


def _unique(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each digest once, under one name: a name is not given twice."""
    kept: dict[str, dict[str, Any]] = {}
    for one in found:
        kept.setdefault(one["digest"]["sha256"], one)
    names = [one["name"] for one in kept.values()]
    return [
        {**one, "name": f"{one['name']}@{digest[:12]}"} if names.count(one["name"]) > 1 else one
        for digest, one in kept.items()
    ]


def _tests(suites: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Items of pytest by how they ended. A prompt that differs within the thresholds passed with a warning."""
    found: dict[str, list[str]] = {"passedTests": [], "warnedTests": [], "failedTests": []}
    for suite in suites:
        prefix = f"{suite['path']}/suite.toml::{suite['numerics']}"
        for prompt in suite["prompts"]:
            kind = "failed" if prompt["fails"] else "warned" if prompt["verdict"] in _WARNED else "passed"
            found[f"{kind}Tests"].append(inert(f"{prefix}::{prompt['id']}"))
        for check in suite["checks"]:
            if check["status"] != "skip":
                found[f"{check['status']}edTests"].append(inert(f"{prefix}::{check['name']}"))
    return found
