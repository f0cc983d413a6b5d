"""A project of a user's, in a folder of its own: suites for the `scripted` engine, and pytest run on them from outside.

Project(tmp_path).suite().update().accept().check()
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

TOKENS = {"a": [11, 12, 13, 14], "b": [21, 22, 23, 24], "c": [31, 32, 33, 34], "d": [41, 42, 43, 44]}
JITTER = 0.1
"""The benign noise of the scripted engine: a flip by less is a near tie, a flip by more is drift."""
NEAR_TIE, DRIFT = 0.05, 0.8
REVIEWER = "Rea Viewer <rea@example.org>"

_NOT_INHERITED = (
    "CI", "GITHUB_ACTIONS", "TF_BUILD", "JENKINS_URL", "TEAMCITY_VERSION", "BUILDKITE", "FORCE_COLOR", "PY_COLORS",
    "PYTEST_ADDOPTS", "PYTEST_PLUGINS", "PYTEST_CURRENT_TEST", "PYTEST_XDIST_WORKER", "PYTHONWARNINGS", "PYTHONPATH",
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    rc: int
    out: str
    err: str

    @property
    def text(self) -> str:
        """All that a user sees."""
        return self.out + self.err

    def outcomes(self) -> dict[str, str]:
        """Item -> outcome, of a run with `-v`; an item is named by what follows the last two colons."""
        found = {}
        for line in self.out.splitlines():
            words = [w for w in line.split() if w]
            outcome = next((w for w in words if w in ("PASSED", "FAILED", "SKIPPED", "ERROR")), None)
            name = next((w for w in words if "::" in w), None)
            if outcome and name and line.startswith((name, "[gw")):
                found[name] = outcome
        return found


class Project:
    """A folder with a pyproject.toml, and what was written into it."""

    def __init__(self, root: Path) -> None:
        self.root = root / "project"
        self.home = root / "home"
        self.name = "demo"
        self.rows: dict[str, dict[str, Any]] = {}
        self.root.mkdir(parents=True, exist_ok=True)
        self.home.mkdir(exist_ok=True)
        name, mail = REVIEWER.rstrip(">").split(" <")
        (self.home / "gitconfig").write_text(f"[user]\n\tname = {name}\n\temail = {mail}\n")
        if not (self.root / "pyproject.toml").exists():
            self.pyproject()

    def copied_to(self, root: Path) -> Project:
        """The same project in another folder."""
        shutil.copytree(self.root, root / "project")
        copy = Project(root)
        copy.name, copy.rows = self.name, {name: dict(row) for name, row in self.rows.items()}
        return copy

    # --- what is written ------------------------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        """The suite's folder."""
        return self.root / "golden" / self.name

    def write(self, path: str, text: str | bytes) -> Project:
        """Any file of the project."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return self

    def pyproject(self, text: str = "", ini: str = "") -> Project:
        """`pyproject.toml`, with lines for pytest's own table."""
        return self.write("pyproject.toml", f"[tool.pytest.ini_options]\n{ini}\n{text}")

    def suite(
        self,
        tokens: Mapping[str, list[int]] = TOKENS,
        *,
        at: str = "golden/demo",
        answers: Mapping[str, str] | None = None,
        texts: Mapping[str, str] | None = None,
        **tables: Mapping[str, Any],
    ) -> Project:
        """A suite for the scripted engine; `tables` are put into suite.toml over the defaults, None leaves one out."""
        self.name = Path(at).name
        head = {"name": self.name, "model": "scripted", "engine": "scripted", "prompts": "prompts.jsonl"}
        content: dict[str, Any] = {
            "suite": {**head, **tables.pop("suite", {})},
            "generation": {"max_new_tokens": 8, "batch_size": 2},
            "run": {"numerics": ["bf16"]},
            "engine": {"script": "script.jsonl", "jitter": JITTER},
            **tables,
        }
        self.write(f"{at}/suite.toml", "\n".join(_toml({k: v for k, v in content.items() if v is not None})) + "\n")
        prompts = [{"id": name, "prompt": f"question {name}"} for name in tokens]
        for prompt in prompts:
            if answers and prompt["id"] in answers:
                prompt["answer"] = answers[prompt["id"]]
        self.write(f"{at}/prompts.jsonl", _jsonl(prompts))
        self.rows = {name: _row(name, ids) for name, ids in tokens.items()}
        for name, text in (texts or {}).items():
            self.rows[name]["text"] = text
        return self.write(f"{at}/script.jsonl", _jsonl(self.rows.values()))

    def script(self, **changes: Mapping[str, Any]) -> Project:
        """Other fields for some prompts' lines of the script."""
        for name, fields in changes.items():
            self.rows[name] = {**self.rows[name], **fields}
        return self.write(f"golden/{self.name}/script.jsonl", _jsonl(self.rows.values()))

    def flip(self, name: str, gap: float, *, at: int = 1, token: int = 77) -> Project:
        """The model now prefers another token at one place, by so many nats."""
        row = {k: list(v) if isinstance(v, list) else v for k, v in self.rows[name].items()}
        row["runner_up"][at], row["tokens"][at], row["gap"][at] = row["tokens"][at], token, gap
        return self.script(**{name: row})

    # --- what is run ----------------------------------------------------------------------------------------------

    def python(self, *args: str, **env: str) -> Result:
        """`python ARGS` in the project, in an environment without CI and without the user's settings."""
        kept = {k: v for k, v in os.environ.items() if k not in _NOT_INHERITED}
        kept |= {
            "HOME": str(self.home),
            "GIT_CONFIG_GLOBAL": str(self.home / "gitconfig"),
            "GIT_CONFIG_NOSYSTEM": "1",
            "COLUMNS": "200",
            "OPENBLAS_NUM_THREADS": "1",
            "PYTHONIOENCODING": "utf-8:surrogateescape",
        }
        done = subprocess.run(
            [sys.executable, *args],
            cwd=self.root,
            env=kept | env,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            check=False,
            timeout=300,
        )
        return Result(done.returncode, *(s.decode("utf-8", "surrogateescape") for s in (done.stdout, done.stderr)))

    def pytest(self, *args: str, cache: bool = False, **env: str) -> Result:
        """`python -m pytest ARGS`; what is not needed of other plugins is left out, since it doubles a run's time."""
        off = {"anyio", "platformdirs", "xdist", "cacheprovider"}
        off -= ({"xdist"} if "-n" in args else set()) | ({"cacheprovider"} if cache else set())
        return self.python("-m", "pytest", *(f"-pno:{name}" for name in sorted(off)), *args, **env)

    def cli(self, *args: str, **env: str) -> Result:
        """`pytest-repro ARGS`."""
        return self.python("-m", "pytest_repro.cli", *args, **env)

    def check(self, *args: str, where: str = "golden", **env: str) -> Result:
        """`pytest --repro-check golden ARGS`."""
        return self.pytest("--repro-check", *([where] if where else []), *args, **env)

    def update(self, *args: str, where: str = "golden") -> Project:
        """Record candidates; they must be recorded."""
        return self._succeed(self.pytest("--repro-update", where, *args))

    def accept(self, reason: str = "seen and right", where: str = "golden") -> Project:
        """Accept all that is pending; it must work."""
        return self._succeed(self.cli("accept", where, "--all", "--reason", reason))

    def _succeed(self, result: Result) -> Project:
        assert result.rc == 0, result.text
        return self

    # --- what is there afterwards ---------------------------------------------------------------------------------

    def golden_files(self) -> dict[str, bytes]:
        """Every file below golden/, byte for byte."""
        root = self.root / "golden"
        return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}

    def header(self, stem: str = "bf16.golden") -> dict[str, Any]:
        """First line of a golden."""
        header: dict[str, Any] = json.loads((self.folder / f"{stem}.jsonl").read_text().splitlines()[0])
        return header

    def json(self, path: str = "report.json") -> dict[str, Any]:
        """A JSON file of the project."""
        document: dict[str, Any] = json.loads((self.root / path).read_text("utf-8"))
        return document

    def junit(self, path: str = "junit.xml") -> dict[str, dict[str, str]]:
        """Test case -> its properties, of a JUnit report."""
        cases = ElementTree.parse(self.root / path).iter("testcase")
        return {
            case.attrib["name"]: {p.attrib["name"]: p.attrib["value"] for p in case.iter("property")} for case in cases
        }


def _row(name: str, tokens: list[int]) -> dict[str, Any]:
    n = len(tokens)
    return {"id": name, "tokens": tokens, "logprob": [-0.1] * n, "gap": [2.0] * n, "runner_up": [99] * n}


def _jsonl(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _toml(table: Mapping[str, Any], prefix: str = "") -> list[str]:
    lines = [f"{key} = {json.dumps(value)}" for key, value in table.items() if not isinstance(value, Mapping)]
    for key, value in table.items():
        if isinstance(value, Mapping):
            lines += [f"[{prefix}{key}]", *_toml(value, f"{prefix}{key}.")]
    return lines
