"""One pytest session: its settings as the gate understands them, and its results, shared among xdist workers.

Knows pytest's config object by its attributes only: the plugin is the one module that imports pytest.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

from filelock import FileLock

from . import accuracy, gate, numerics, probe, recording
from .asking import Options
from .engines.base import check_mode, check_options, check_tables, opener
from .errors import ConfigError, EngineError
from .generation import digest
from .report import document
from .report.progress import Display
from .store import STEM, atomic_write, typed
from .suite import Overrides, Suite, defaults_around, load, parse_engine_option, parse_shard, parse_threshold


class Session:
    """One pytest session's settings and results."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.implicit = False
        """Whether the suites were not named on the command line."""
        self.updating: bool = config.option.repro_update
        self.shard = parse_shard(config.option.repro_shard) if config.option.repro_shard is not None else None
        self.suites: dict[str, dict[str, Any]] = {}
        """What was checked, by all that decides the result."""
        self.recorded: dict[str, str] = {}
        """Goldens that this run recorded, and in which mode."""
        self.recordings: list[dict[str, Any]] = []
        self.other_failures = 0
        """Tests that failed beside the suites' own items."""

    @property
    def paths(self) -> list[Path]:
        """The folders of the ini option `repro_paths`."""
        return [self.config.rootpath / path for path in self.config.getini("repro_paths")]

    def wants(self, path: Path) -> bool:
        """Whether a suite.toml is to be collected: named by a path, or under `repro_paths`."""
        return not self.implicit or any(path.is_relative_to(p) for p in self.paths)

    def shown(self, folder: Path) -> str:
        """A folder as the user would type it."""
        try:
            return folder.resolve().relative_to(self.config.invocation_params.dir.resolve()).as_posix()
        except ValueError:
            return str(folder)

    def allow_code(self) -> bool:
        """Whether suites may name code."""
        return bool(self.config.option.repro_allow_code)

    def trusts_engine(self) -> bool:
        """Naming an engine on the command line is an opt-in, for that engine."""
        return self.allow_code() or bool(self.config.option.repro_engine)

    def overrides(self) -> Overrides:
        """What the command line puts in the suites' place."""
        option = self.config.option
        modes = tuple(m for text in option.repro_numerics or () for m in text.split(","))
        model = option.repro_model
        if model and (self.config.invocation_params.dir / model).is_dir():
            model = str((self.config.invocation_params.dir / model).resolve())
        return Overrides(
            model=model,
            engine=option.repro_engine,
            numerics=modes or None,
            batch_size=option.repro_batch_size,
            thresholds=dict(parse_threshold(text) for text in option.repro_threshold),
            engine_options=dict(parse_engine_option(text) for text in option.repro_engine_option),
        )

    def again(self, target: str) -> str:
        """What pytest is given to run a suite, or a test, as it runs now: with the options that change what is compared."""
        option = self.config.option
        one = {
            "--repro-engine": option.repro_engine,
            "--repro-model": option.repro_model,
            "--repro-batch-size": option.repro_batch_size,
            "--repro-golden": option.repro_golden,
        }
        asked = [f"{name} {quote(str(value))}" for name, value in one.items() if value is not None]
        asked += [f"--repro-engine-option {quote(text)}" for text in option.repro_engine_option]
        return " ".join([quote(target), *asked, *(["--repro-allow-code"] if self.allow_code() else [])])

    def options(self, folder: Path, **more: Any) -> Options:
        """How to check a suite."""
        option = self.config.option
        more = {"again": self.again(self.shown(folder)), **more}
        return Options(
            method=option.repro_method,
            arbiter=option.repro_arbiter,
            allow_changed=frozenset(option.repro_allow_changed),
            allow_code=self.allow_code(),
            trusted_engine=self.trusts_engine(),
            golden=option.repro_golden,
            pending_folder=Path(option.repro_pending_dir) if option.repro_pending_dir else None,
            shown_path=self.shown(folder),
            shard=self.shard,
            **more,
        )

    def check(self, suite: Suite, mode: str, **more: Any) -> dict[str, Any]:
        """Check one suite in one mode, and keep the result; xdist workers share one run of it."""
        options = self.options(suite.folder, **more)
        # A set is spelt in another order by every worker: what goes into the key is sorted.
        sets = [sorted(found) if found is not None else None for found in (options.selected, options.allow_changed)]
        key = digest(repr((suite, mode, replace(options, selected=None, allow_changed=frozenset(), again=""), sets)))
        if more.get("opener"):  # a callable of one test's own: no other worker has it
            found = self._check(suite, mode, more)
        else:
            found = _once_among_workers(self.config, key, lambda: self._check(suite, mode, more))
        self.suites[key] = found
        return found

    def _check(self, suite: Suite, mode: str, more: dict[str, Any]) -> dict[str, Any]:
        return document.of_suite(
            gate.check(suite, mode, self.options(suite.folder, **more), _progress(self.config, suite, mode))
        )

    def _golden_of(self, suite: Suite, mode: str) -> str:
        return f"{suite.folder}::{self.config.option.repro_golden or numerics.mode(mode).compute_class or mode}"

    def recorded_already(self, suite: Suite, mode: str) -> str | None:
        """The other mode whose recording in this run is this mode's golden as well, as fp32's is layercast's."""
        earlier = self.recorded.get(self._golden_of(suite, mode))
        return earlier if earlier != mode and not self.config.option.repro_golden else None

    def record(self, suite: Suite, mode: str, **more: Any) -> dict[str, Any]:
        """Record one suite in one mode, and keep what was recorded."""
        key = self._golden_of(suite, mode)
        if key in self.recorded:
            raise ConfigError(
                "this golden was recorded already in this run: one of the two would be lost",
                where=typed(suite.folder),
                fix="record one of them alone, or give the other settings a suite of their own",
            )
        done = recording.record(suite, mode, self.options(suite.folder, **more), _progress(self.config, suite, mode))
        self.recorded[key] = mode
        self.recordings.append(document.of_recording(done))
        return self.recordings[-1]


def _once_among_workers(config: Any, key: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Under xdist every worker holds some of a suite's items: the first to come runs the suite, the others read it."""
    worker = getattr(config, "workerinput", None)
    if worker is None:
        return run()
    name = hashlib.sha256(f"{worker['testrunuid']}{key}".encode()).hexdigest()[:32]
    file = Path(tempfile.gettempdir()) / f"pytest-repro-{os.getuid() if hasattr(os, 'getuid') else 0}" / name
    file.parent.mkdir(mode=0o700, exist_ok=True)
    with FileLock(f"{file}.lock"):
        if not file.exists():
            atomic_write(file, json.dumps(run()).encode())
        found: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return found


def take_gpu(environment: MutableMapping[str, str]) -> None:
    """Show this xdist worker one GPU, by its number; all of them, where there are fewer than workers.

    xdist numbers a worker that replaces a crashed one beyond the count: it starts over from the first GPU.
    """
    number = int("".join(filter(str.isdigit, environment["PYTEST_XDIST_WORKER"])) or 0)
    workers = int(environment.get("PYTEST_XDIST_WORKER_COUNT", 1))
    gpus = probe.visible_gpus(environment)
    if len(gpus) >= workers:
        environment["CUDA_VISIBLE_DEVICES"] = gpus[number % workers]


def _progress(config: Any, suite: Suite, mode: str) -> Any:
    capture = config.pluginmanager.getplugin("capturemanager")
    quiet = hasattr(config, "workerinput") or config.option.verbose < 0
    return Display(
        f"repro {suite.name} [{mode}]",
        lambda: sys.stderr,
        capture.global_and_fixture_disabled if capture else None,
        quiet,
    )


def validated(path: Path, session: Session) -> Suite:
    """The suite, with everything it names known to exist before anything runs."""
    golden = session.config.option.repro_golden
    if golden and not STEM.fullmatch(golden):
        raise ConfigError(
            f"{golden!r} is not a golden's name", where="--repro-golden", fix="e.g. bf16 or bf16@cuda-sm90"
        )
    suite = load(path, session.overrides(), defaults_around(path)[1])
    option = session.config.option
    with _located("--repro-numerics" if option.repro_numerics else f"{typed(path)} [run.numerics]"):
        for mode in suite.numerics:
            check_mode(suite.engine, numerics.mode(mode), "numerics")
    with _located("--repro-engine" if option.repro_engine else f"{typed(path)} [suite.engine]"), suppress(EngineError):
        opener(suite.engine, allow_code=session.trusts_engine())  # an engine that is not installed: every item says so
    check_options(suite.engine, suite.user_options, "--repro-engine-option")
    check_tables(suite.engine_tables, str(path))
    accuracy.scorer(
        suite.scorer, pattern=suite.pattern, allow_code=session.allow_code(), where=f"{typed(path)} [suite.scorer]"
    )
    return suite


@contextmanager
def _located(where: str) -> Iterator[None]:
    """A mistake in what somebody named, with the place where it was named."""
    try:
        yield
    except ConfigError as exc:
        raise ConfigError(exc.what, where=where, fix=exc.fix) from None
