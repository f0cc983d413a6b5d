"""What the GitHub runner reads: annotations on a suite's lines, and the outputs of a step. Made from reports alone.

Annotations are commands on standard output, and outputs are a file of `name=value` lines: both are syntax in which untrusted
text must not act, so it is escaped as the runner's own toolkit does, after it was made inert.
"""

from __future__ import annotations

import json
import re
import secrets
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..suite import MOVED, inside
from ..text import inert
from . import markdown, terminal

MOST_ANNOTATIONS = 10
"""GitHub keeps this many errors of one step."""
ONLY_DRIFT = frozenset({"near_tie", "drift"})
"""Verdicts on prompts that are about outputs, and not about a gate that could not do its work."""
Suite = Mapping[str, Any]
Spot = tuple[str, int]
"""(file as the repository has it, line)."""


# --- outputs --------------------------------------------------------------------------------------------------------


def outputs(suites: Sequence[Suite], *, ended: bool, report: str, others: int) -> dict[str, str]:
    """The outputs of a step.

    Args:
        suites: of the reports that could be read.
        ended: whether every check came to its end, so that the reports are the whole answer.
        report: the report's path.
        others: tests that failed beside the suites' own.
    """
    failed = [suite for suite in suites if suite["verdict"] == "fail"]
    return {
        "verdict": ("fail" if failed else "pass") if ended else "error",
        **{verdict: str(n) for verdict, n in markdown.counted(suites).items()},
        "only_drift": str(bool(failed) and ended and not others and all(map(_only_drift, failed))).lower(),
        "failed_suites": json.dumps([inert(f"{suite['path']} [{suite['numerics']}]") for suite in failed]),
        "report_path": inert(report),
    }


def _only_drift(suite: Suite) -> bool:
    """Whether a suite fails by its outputs, accuracy or lengths, and by nothing else."""
    prompts = {p["verdict"] for p in suite["prompts"] if p["fails"]}
    checks = {check["name"] for check in suite["checks"] if check["status"] == "fail"}
    return prompts <= ONLY_DRIFT and checks <= set(MOVED)


def output_lines(values: Mapping[str, str]) -> str:
    """`$GITHUB_OUTPUT` lines. Every value is between delimiters that nobody could have known."""
    text = ""
    for name, value in values.items():
        end = f"end-{secrets.token_hex(16)}"
        text += f"{name}<<{end}\n{value}\n{end}\n"
    return text


def run_address(environment: Mapping[str, str]) -> str:
    """The address of the run that this is, or nothing outside of one."""
    names = ("GITHUB_SERVER_URL", "GITHUB_REPOSITORY", "GITHUB_RUN_ID")
    server, repository, run = (environment.get(name, "") for name in names)
    address = f"{server}/{repository}/actions/runs/{run}"
    shape = r"https?://[\w.-]+(:\d+)?/[\w.-]+/[\w.-]+/actions/runs/\d+"
    return address if re.fullmatch(shape, address, re.ASCII) else ""


# --- annotations ----------------------------------------------------------------------------------------------------


def errors(suites: Sequence[Suite], root: Path, repository: Path) -> list[str]:
    """The worst of every failing suite, as commands of the runner; at most ten.

    Args:
        suites: of one report or of several.
        root: the folder that paths of suites are relative to.
        repository: the checked-out repository, out of which nothing is read.
    """
    failing = [suite for suite in suites if suite["verdict"] == "fail"]
    turns = zip_longest(*(_of_suite(suite, root, repository) for suite in failing))
    found = [one for one in chain.from_iterable(turns) if one]
    if len(found) <= MOST_ANNOTATIONS:
        return found
    more = len(found) - MOST_ANNOTATIONS + 1
    return [*found[: MOST_ANNOTATIONS - 1], _error("pytest-repro", f"and {more} more: the summary has them", None)]


def problem(message: str) -> str:
    """An annotation of no line."""
    return _error("pytest-repro", message, None)


def _of_suite(suite: Suite, root: Path, repository: Path) -> Iterator[str]:
    files = _Files(suite, root, repository)
    name = f"{suite['path']} [{suite['numerics']}]"
    worst = terminal.worst_first(suite)
    if terminal.all_alike(worst):
        yield _error(
            f"{worst[0]['verdict']}: {name}", f"all {len(worst)} prompts: {worst[0]['reason']}", files.suite("")
        )
        worst = []
    for rule in suite["failures"]:
        if named := re.search(r"> (max_[a-z]+) ", rule):
            yield _error(f"fails: {name}", rule, files.suite(named[1]))
    told = {p["reason"] for p in terminal.worst_first(suite)}
    for check in suite["checks"]:
        if check["status"] == "fail" and not any(reason and reason in check["message"] for reason in told):
            key = {
                "accuracy": "accuracy_drop",
                "rounding": "alpha",
                "length": "length_ratio",
                "compute": "fp32_waiver",
            }.get(check["name"], "")
            yield _error(f"{check['name']}: {name}", check["message"], files.suite(key))
    for p in worst:
        if p["fails"]:
            message = "\n".join(text for text, _ in terminal.prompt_lines(p))
            yield _error(f"{p['verdict']} {p['id']}: {name}", message, files.prompt(p["id"]))


def _error(title: str, message: str, spot: Spot | None) -> str:
    place = f"file={_property(spot[0])},line={spot[1]}," if spot else ""
    lines = [inert(line)[: markdown.LONGEST] for line in message.split("\n")[: markdown.MOST_LINES]]
    return f"::error {place}title={_property(title[:200])}::{_data(chr(10).join(lines))}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(inert(text)).replace(":", "%3A").replace(",", "%2C")


class _Files:
    """A suite's own files, if they lie in the repository: where a prompt and a threshold stand in them."""

    def __init__(self, suite: Suite, root: Path, repository: Path) -> None:
        self._classes = (suite["observed_compute"], suite["claimed_compute"], suite["numerics"])
        self._repository = repository.resolve()
        self._folder = self._toml = self._prompts = None
        try:
            folder = inside(
                self._repository, str((root / suite["path"]).resolve().relative_to(self._repository)), where=""
            )
            self._toml = inside(folder, "suite.toml", where="")
            self._text = self._toml.read_text("utf-8") if self._toml.is_file() else ""
            head = tomllib.loads(self._text).get("suite", {})
            self._prompts = inside(folder, str(head.get("prompts", "prompts.jsonl")), where="")
        except (OSError, ValueError, ConfigError, RecursionError, AttributeError):
            self._text = ""  # no such folder, or a name that leads elsewhere: an annotation without a line
        self._ids: dict[str, int] | None = None

    def _named(self, file: Path | None, line: int) -> Spot | None:
        return None if file is None else (file.relative_to(self._repository).as_posix(), line)

    def suite(self, threshold: str) -> Spot | None:
        """The line of suite.toml that sets a threshold; its first line, if none does."""
        if not self._text:
            return None
        table = ""
        found: dict[str, int] = {}
        for number, line in enumerate(self._text.split("\n"), 1):
            if header := re.match(r"\s*\[\s*([^\]]+?)\s*\]", line):
                table = header[1].replace('"', "")
            elif threshold and re.match(rf"\s*{threshold}\s*=", line):
                found.setdefault(table, number)
        wanted = [*(f"thresholds.{name}" for name in self._classes), "thresholds"]
        return self._named(self._toml, next((found[name] for name in wanted if name in found), 1))

    def prompt(self, name: str) -> Spot | None:
        """The line of a prompt."""
        if self._ids is None:
            self._ids = _lines_of_ids(self._prompts)
        return self._named(self._prompts, self._ids[name]) if name in self._ids else self.suite("")


def _lines_of_ids(file: Path | None) -> dict[str, int]:
    found: dict[str, int] = {}
    try:
        lines = file.read_text("utf-8").split("\n") if file and file.is_file() else []
        for number, line in enumerate(lines, 1):
            row = json.loads(line) if line.strip() else None
            if isinstance(row, dict) and isinstance(row.get("id"), str):
                found[row["id"]] = number
    except (OSError, ValueError, RecursionError):
        return found
    return found
