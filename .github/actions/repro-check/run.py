"""The steps of the action `repro-check`. Standard library only: it runs before anything else is known to work.

What an input says comes through the environment and goes on as arguments of a process; no shell reads it.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_LISTS = {
    "REPRO_THRESHOLDS": "--repro-threshold",
    "REPRO_ENGINE_OPTIONS": "--repro-engine-option",
    "REPRO_ALLOW_CHANGED": "--repro-allow-changed",
}
_SINGLE = {
    "REPRO_NUMERICS": "--repro-numerics", "REPRO_ENGINE": "--repro-engine", "REPRO_MODEL": "--repro-model",
    "REPRO_METHOD": "--repro-method", "REPRO_ARBITER": "--repro-arbiter", "REPRO_BATCH_SIZE": "--repro-batch-size",
}  # fmt: skip
_NOT_FOR_THE_CHECK = ("GITHUB_OUTPUT", "GITHUB_ENV", "GITHUB_PATH", "GITHUB_STATE", "GITHUB_STEP_SUMMARY")
"""Files by which a step talks to the runner: a check that loads models has no business there."""
_MOST_PAGES = 30


def main() -> int:
    """Run the step that the first argument names; the exit code of the step."""
    steps: dict[str, Callable[[Mapping[str, str]], int]] = {
        "check": check, "report": report, "comment": comment, "verdict": verdict
    }  # fmt: skip
    return steps[sys.argv[1]](os.environ)


# --- check ----------------------------------------------------------------------------------------------------------


def check(environment: Mapping[str, str]) -> int:
    """Run pytest, and leave its exit code and files to the next steps. Fails only if pytest cannot be started."""
    folder = Path(tempfile.mkdtemp(prefix="repro-check-", dir=environment.get("RUNNER_TEMP") or None))
    reports, pending = folder / "reports", folder / "pending"
    reports.mkdir()
    output("folder", str(folder))
    output("report-path", str(reports / "report.json"))
    command = [
        sys.executable, "-m", "pytest", "--repro-check", *asked_for(environment),
        f"--repro-report-json={reports / 'report.json'}", f"--repro-pending-dir={pending}",
    ]  # fmt: skip
    child = {name: value for name, value in environment.items() if name not in _NOT_FOR_THE_CHECK}
    with commands_stopped():
        done = subprocess.run(command, env=child, check=False)
    # As a shell has it: 137 says out of memory to whoever knows, -9 does not.
    output("exit-code", str(done.returncode if done.returncode >= 0 else 128 - done.returncode))
    return 0


def asked_for(environment: Mapping[str, str]) -> list[str]:
    """The arguments of pytest that the action's inputs ask for. A value goes with its option, so that it is never one."""
    found = [f"{option}={value}" for name, option in _SINGLE.items() if (value := environment.get(name, "").strip())]
    found += [f"{option}={value}" for name, option in _LISTS.items() for value in listed(environment.get(name, ""))]
    found += listed(environment.get("REPRO_ARGUMENTS", ""))
    return found + [
        f"./{path}" if path.startswith("-") else path for path in listed(environment.get("REPRO_GOLDEN", ""))
    ]


def listed(text: str) -> list[str]:
    """One item a line, blank lines left out."""
    return [line.strip() for line in text.splitlines() if line.strip()]


@contextmanager
def commands_stopped() -> Iterator[None]:
    """While it lasts, the runner takes nothing in the log for a command: what a model says must not be one."""
    token = secrets.token_hex(16)
    print(f"::stop-commands::{token}", flush=True)
    try:
        yield
    finally:
        print(f"\n::{token}::", flush=True)


# --- report ---------------------------------------------------------------------------------------------------------


def report(environment: Mapping[str, str]) -> int:
    """Summary, annotations, outputs and files, of whatever the check left behind."""
    held = environment.get("REPRO_FOLDER", "")
    folder = (
        Path(held)
        if held
        else Path(tempfile.mkdtemp(prefix="repro-check-", dir=environment.get("RUNNER_TEMP") or None))
    )
    reports = folder / "reports"
    reports.mkdir(exist_ok=True)
    file, page, body = reports / "report.json", reports / "report.html", reports / "comment.md"
    ended = environment.get("REPRO_EXIT_CODE", "")
    surface(file, "github", *(["--exit-code", ended] if ended else []))
    surface(file, "comment", "--key", environment.get("REPRO_KEY") or "check", "--output", str(body))
    if file.exists():
        surface(file, "junit", "--output", str(reports / "junit.xml"))
        if environment.get("REPRO_HTML") == "true":
            surface(file, "html", "--output", str(page))
    output("html-path", str(page) if page.exists() else "")
    output("comment-path", str(body) if body.exists() else "")
    candidates = list((folder / "pending").rglob("*.jsonl"))
    output("pending-path", str(folder / "pending") if candidates else "")
    return 0


def surface(file: Path, name: str, *more: str) -> None:
    """One surface of the report. That one cannot be made keeps none of the others from being made."""
    subprocess.run([sys.executable, "-m", "pytest_repro.cli", "report", str(file), "--to", name, *more], check=False)


# --- comment --------------------------------------------------------------------------------------------------------


def comment(environment: Mapping[str, str]) -> int:
    """Write the comment on the pull request, in the place of the one that this action left there before."""
    event = json.loads(Path(environment["GITHUB_EVENT_PATH"]).read_text("utf-8"))
    pull = event.get("pull_request") or {}
    head = ((pull.get("head") or {}).get("repo") or {}).get("full_name")
    body = environment.get("REPRO_COMMENT", "")
    if not body or head != environment["GITHUB_REPOSITORY"]:
        print("no comment: it is written on pull requests from the repository itself only")
        return 0
    text = Path(body).read_text("utf-8")
    base = f"{environment['GITHUB_API_URL']}/repos/{environment['GITHUB_REPOSITORY']}/issues"
    token, thread = environment["REPRO_TOKEN"], f"{base}/{int(pull['number'])}/comments"
    try:
        earlier = ours(thread, token, text.splitlines()[0])
        if earlier is None:
            ask("POST", thread, token, {"body": text})
        else:
            ask("PATCH", f"{base}/comments/{earlier}", token, {"body": text})
    except OSError as exc:  # HTTP errors among them; the check itself is not at fault
        shown = str(exc).encode("ascii", "replace").decode().replace("%", "%25").replace("\r", " ").replace("\n", " ")
        print(
            f"::warning title=pytest-repro::the comment could not be written: {shown}. The job needs pull-requests: write"
        )
    return 0


def ours(thread: str, token: str, marker: str) -> int | None:
    """The comment of ours with this marker. One that a person wrote is not ours, whatever it begins with."""
    for page in range(1, _MOST_PAGES + 1):
        found = ask("GET", f"{thread}?per_page=100&page={page}", token)
        for one in found:
            if str(one.get("body", "")).startswith(marker) and (one.get("user") or {}).get("type") == "Bot":
                return int(one["id"])
        if len(found) < 100:
            return None
    return None


def ask(method: str, address: str, token: str, data: Mapping[str, Any] | None = None) -> Any:
    """One request to GitHub's API; its answer."""
    request = urllib.request.Request(
        address,
        method=method,
        data=None if data is None else json.dumps(data).encode(),
        headers={
            "Accept": "application/vnd.github+json",
            "X-GitHub-Api-Version": "2022-11-28",
            "Content-Type": "application/json",
        },
    )
    request.add_unredirected_header("Authorization", f"Bearer {token}")  # it goes to this host and no other
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.loads(answer.read())


# --- verdict --------------------------------------------------------------------------------------------------------


def verdict(environment: Mapping[str, str]) -> int:
    """The exit code of the whole action."""
    ended, found = environment.get("REPRO_EXIT_CODE", ""), environment.get("REPRO_VERDICT", "")
    code = int(ended) if ended.isdigit() else 1
    if code == 0 and found == "pass":
        return 0
    forgiven = environment.get("REPRO_FAIL_ON_DRIFT") == "false"
    if code == 1 and found == "fail" and forgiven and environment.get("REPRO_ONLY_DRIFT") == "true":
        print("only outputs, accuracy or lengths moved, and fail-on-drift is false")
        return 0
    print(f"pytest-repro: {found or 'no verdict'}, pytest ended with exit code {ended or 'unknown'}")
    return code or 1


# --- the runner -----------------------------------------------------------------------------------------------------


def output(name: str, value: str) -> None:
    """An output of this step."""
    end = f"end-{secrets.token_hex(16)}"
    with Path(os.environ["GITHUB_OUTPUT"]).open("a", encoding="utf-8") as file:
        file.write(f"{name}<<{end}\n{value}\n{end}\n")


if __name__ == "__main__":
    sys.exit(main())
