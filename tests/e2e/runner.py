"""A small GitHub runner: the steps of a composite action, in order, out of its own action.yml.

It knows what the action uses of the real one: `${{ }}` in `env`, `with` and `working-directory`, `if`, outputs, a shell, and
that a job fails if a step does while steps with `always()` go on. Steps with `uses` are not run but kept.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.hostile import file_commands

from .project import _NOT_INHERITED

ACTION = Path(__file__).parents[2] / ".github" / "actions" / "repro-check" / "action.yml"


@dataclass
class Job:
    """What a job with this one action left behind."""

    root: Path
    """The runner's own folder."""
    workspace: Path
    event: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    steps: dict[str, dict[str, str]] = field(default_factory=dict)
    """Id -> outputs."""
    used: list[dict[str, Any]] = field(default_factory=list)
    """Steps with `uses` that would have run, their inputs evaluated."""
    log: str = ""
    failed: list[str] = field(default_factory=list)
    """Names of steps that failed."""
    outputs: dict[str, str] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """The summaries of all steps."""
        return "".join(f.read_text("utf-8") for f in sorted(self.root.glob("summary-*")))

    def run(self, **inputs: str) -> Job:
        """Run the action with these inputs (underscores for dashes)."""
        action = yaml.safe_load(ACTION.read_text("utf-8"))
        given = {name.replace("_", "-"): value for name, value in inputs.items()}
        assert given.keys() <= action["inputs"].keys(), "an input that the action does not have"
        self.root.mkdir(parents=True, exist_ok=True)
        (self.root / "event.json").write_text(json.dumps(self.event))
        github = {"token": "t0ken", "repository": "o/r", "event": self.event}
        context: dict[str, Any] = {"github": github, "steps": {}, "inputs": {}}
        for name, spec in action["inputs"].items():
            context["inputs"][name] = given.get(name, _filled(str(spec.get("default", "")), context))
        for number, step in enumerate(action["runs"]["steps"]):
            self._step(number, step, context)
        self.outputs = {name: _filled(spec["value"], context) for name, spec in action["outputs"].items()}
        return self

    def _step(self, number: int, step: dict[str, Any], context: dict[str, Any]) -> None:
        condition = str(step.get("if", "success()"))
        if "always()" not in condition and self.failed:
            return
        if not _value(condition, {**context, "always()": True, "success()": not self.failed}):
            return
        if "uses" in step:
            inputs = {name: _filled(str(value), context) for name, value in step["with"].items()}
            self.used.append({"name": step["name"], "uses": step["uses"], "with": inputs})
            return
        assert step["shell"] == "bash"
        assert "${{" not in step["run"], "what an input says would be part of a script"
        files = {name: self.root / f"{name}-{number}" for name in ("output", "summary", "env", "path", "state")}
        for file in files.values():
            file.touch()
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
            cwd=self.workspace / _filled(step.get("working-directory", "."), context),
            env=self._environment(files) | {n: _filled(str(v), context) for n, v in step.get("env", {}).items()},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, check=False, timeout=500,
        )  # fmt: skip
        self.log += done.stdout.decode("utf-8", "surrogateescape")
        if done.returncode:
            self.failed.append(step["name"])
        for name in ("env", "path", "state"):
            assert files[name].read_text() == "", f"a step wrote to GITHUB_{name.upper()}"
        found = file_commands(files["output"].read_text("utf-8"))
        if "id" in step:
            self.steps[step["id"]] = found
            context["steps"][step["id"]] = {"outputs": found}

    def _environment(self, files: dict[str, Path]) -> dict[str, str]:
        kept = {
            k: v for k, v in os.environ.items() if k not in _NOT_INHERITED and not k.startswith(("GITHUB_", "REPRO_"))
        }
        temporary = self.root / "temp"
        temporary.mkdir(exist_ok=True)
        return {
            **kept, "CI": "true", "GITHUB_ACTIONS": "true", "RUNNER_TEMP": str(temporary), "GITHUB_WORKSPACE": str(self.workspace),
            "GITHUB_ACTION_PATH": str(ACTION.parent), "GITHUB_OUTPUT": str(files["output"]), "GITHUB_ENV": str(files["env"]),
            "GITHUB_PATH": str(files["path"]), "GITHUB_STATE": str(files["state"]), "GITHUB_STEP_SUMMARY": str(files["summary"]),
            "GITHUB_EVENT_PATH": str(self.root / "event.json"), "GITHUB_REPOSITORY": "o/r", "GITHUB_RUN_ID": "7",
            "GITHUB_SERVER_URL": "https://github.com", "GITHUB_API_URL": "http://127.0.0.1:1", "HOME": str(self.root),
            "PYTHONPATH": str(ACTION.parents[3]), "OPENBLAS_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8:surrogateescape",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **self.environment,
        }  # fmt: skip


def _filled(text: str, context: dict[str, Any]) -> str:
    return re.sub(r"\$\{\{(.*?)\}\}", lambda found: _text(_value(found[1], context)), text)


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _value(expression: str, context: dict[str, Any]) -> Any:
    """`always() && inputs.a != '' && steps.b.outputs.c == 'd'`: and, or, comparisons, functions without arguments."""
    for operator in ("||", "&&"):
        parts = _split(expression, operator)
        if len(parts) > 1:
            values = [_value(part, context) for part in parts]
            return any(values) if operator == "||" else all(values)
    for operator in ("!=", "=="):
        parts = _split(expression, operator)
        if len(parts) == 2:
            same = _text(_value(parts[0], context)).lower() == _text(_value(parts[1], context)).lower()
            return same is (operator == "==")
    text = expression.strip()
    if text.startswith("'"):
        return text[1:-1].replace("''", "'")
    if text.endswith("()"):
        return context[text]
    found: Any = context
    for name in text.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found


def _split(expression: str, operator: str) -> list[str]:
    parts, quoted = [""], False
    position = 0
    while position < len(expression):
        if not quoted and expression.startswith(operator, position):
            parts.append("")
            position += len(operator)
            continue
        quoted ^= expression[position] == "'"
        parts[-1] += expression[position]
        position += 1
    return parts
