"""A check of a suite in a process of its own, as a user would start it, and what its report says.

Every trial loads the model anew: threads, instruction sets and an engine's switches are settled when a process begins.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from shlex import join, quote
from time import monotonic

from .bisection import Names, Trial, judged
from .engines.base import REGISTRY
from .errors import ConfigError
from .fingerprint import Fingerprint
from .knobs import Setting, Undo
from .report import document
from .result import SuiteResult
from .suite import SUITE_FILE

METHOD = ("--repro-method", "decode", "--repro-arbiter", "off")
SECONDS_TO_END = 10
"""For an interrupted check to let go of its model, before it is killed."""


@dataclass(frozen=True)
class Check:
    """How pytest is to check a suite."""

    folder: str
    """As the user typed it."""
    setting: Setting = field(default_factory=Setting)
    more: Names = ()
    """Arguments for pytest, handed on as they are."""
    prompts: Names = ()
    """Prompts to decode, in the mode that the setting names; none: all of the suite."""

    def undone(self, undos: Iterable[Undo]) -> Check:
        """The same check with some differences put back."""
        undos = tuple(undos)
        setting = self.setting.under(undo.setting for undo in undos)
        engine = next((u.setting.options["--repro-engine"] for u in undos if "--repro-engine" in u.setting.options), "")
        if engine:
            kept = {k: v for k, v in setting.engine_options.items() if k in REGISTRY[engine].options}
            setting = replace(setting, engine_options=kept)  # the other engine's options are none of this one's
        return replace(self, setting=setting)

    @property
    def arguments(self) -> list[str]:
        """What pytest is given."""
        mode = self.setting.options.get("--repro-numerics", "")
        where = [f"{self.folder}/{SUITE_FILE}::{mode}::{name}" for name in self.prompts] or [self.folder]
        options = [f"{name}={value}" for name, value in self.setting.options.items()]
        engine = [f"--repro-engine-option={name}={value}" for name, value in self.setting.engine_options.items()]
        return ["--repro-check", *where, *options, *engine, *self.more]

    @property
    def typed(self) -> str:
        """The command for the whole suite, environment and all, as a user would type it."""
        variables = self.setting.environment
        absent = [f"-u {name}" for name, value in variables.items() if value is None and name in os.environ]
        given = [f"{name}={quote(value)}" for name, value in variables.items() if value is not None]
        before = [*(["env", *absent] if absent else []), *given]
        return " ".join([*before, "pytest", join(replace(self, prompts=()).arguments)])

    def environment(self, around: Mapping[str, str]) -> dict[str, str]:
        """The environment of the process."""
        changed = self.setting.environment
        return {**{k: v for k, v in around.items() if k not in changed}, **{k: v for k, v in changed.items() if v is not None}}  # fmt: skip


def results(check: Check, report: Path) -> list[SuiteResult]:
    """Run a check, and read its report.

    Raises:
        ConfigError: pytest refused it, or ended without a report; in its own words.
    """
    command = [
        sys.executable, "-m", "pytest", "--repro-only", *METHOD, *check.arguments, f"--repro-report-json={report}", "-q",
        "--color=no", "-o", f"cache_dir={report.with_suffix('.cache')}",
    ]  # fmt: skip
    with report.with_suffix(".log").open("w+b") as log:
        with _running(command, check.environment(os.environ), log.fileno()) as process:
            code = process.wait()
        if code in (0, 1) and report.exists():
            return document.read(report)
        log.seek(0)
        told = log.read().decode("utf-8", "replace")
    raise ConfigError(f"pytest ended with exit code {code}: {_cause(told)}", where=check.folder, fix=check.typed)


@contextmanager
def _running(command: list[str], environment: Mapping[str, str], log: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process that does not outlive this one, whatever ends it."""
    process = subprocess.Popen(command, env=dict(environment), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(SECONDS_TO_END)
            process.kill()
            process.wait()


def _cause(told: str) -> str:
    """Of what pytest printed, the error; else how it ended."""
    lines = [line.strip().removeprefix("INTERNALERROR> ") for line in told.splitlines() if line.strip()]
    first = next((i for i, line in enumerate(lines) if line.startswith("ERROR: ")), -1)
    return " ".join(line.removeprefix("ERROR: ") for line in lines[first:]) or "it said nothing"


def trial(check: Check, undone: tuple[Undo, ...], then: Fingerprint, before: Fingerprint, report: Path) -> Trial:
    """Some differences undone, and the check's prompts decoded again.

    Args:
        check: with nothing undone, and its prompts named.
        undone: what to put back.
        then: the golden's environment.
        before: the environment with nothing undone.
        report: where the trial's report is to lie.
    """
    started = monotonic()
    try:
        found = results(check.undone(undone), report)
    except ConfigError as exc:
        return Trial(undone, check.prompts, error=exc.what, seconds=monotonic() - started)
    done = judged(undone, check.prompts, then, before, found[0])
    return replace(done, seconds=monotonic() - started)
