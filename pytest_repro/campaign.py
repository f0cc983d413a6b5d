"""A study's grid, a process a cell: what is done lies in a folder and stays, whatever ends the study.

Every cell is a process of its own, since threads, instruction sets and an engine's switches are settled when a process begins.
It writes its file whole or not at all; a process whose study is gone ends itself.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from shlex import quote
from time import monotonic, sleep
from typing import Any

from filelock import FileLock, Timeout

from . import cells, grid, models, numerics, probe
from .asking import Progress
from .cells import Cell
from .decoding import Sampling, asked, decode, suite_of
from .engines.base import check_tables, needs_model
from .errors import ConfigError
from .fingerprint import Value
from .grid import Setting
from .store import atomic_write, typed
from .suite import Overrides, Suite, defaults_around, load

CELLS = "cells"
"""Folder of the raw data, in a study's own."""
MOST_OF_A_LOG = 600
"""Characters of what a process said before it died."""
SECONDS_TO_END = 10


@dataclass(frozen=True)
class Plan:
    """What a study asks: a suite, and what varies."""

    folder: Path
    """The suite's."""
    overrides: Overrides
    axes: Mapping[str, tuple[str, ...]]
    sampling: Sampling = field(default_factory=Sampling)
    allow_code: bool = False

    def suite(self) -> Suite:
        """The suite under the overrides.

        Raises:
            ConfigError: a mistake in the suite or in an option.
        """
        return load(self.folder, self.overrides, defaults_around(self.folder)[1])

    def asked(self, suite: Suite) -> dict[str, Value]:
        """What all cells share."""
        return asked(suite, tuple(self.axes), self.sampling)

    def checked(self) -> tuple[Plan, Suite]:
        """The plan with the suite's own modes where none is asked for, and its suite; every cell can be asked for.

        Raises:
            ConfigError: an engine or a mode that there is not, or an option that an engine does not have.
        """
        suite = self.suite()
        axes = {"numerics": suite.numerics, **self.axes} if "numerics" not in self.axes else self.axes
        plan = replace(self, axes={name: axes[name] for name in grid.AXES if name in axes})
        for mode in plan.axes["numerics"]:
            numerics.mode(mode)
        engines = plan.axes.get("engine", (suite.engine,))
        for engine in engines:
            if engine not in grid.ENGINES:
                raise ConfigError(
                    f"a study sets the environment of the process that holds the model, and the engine {engine} is not run by it",
                    where=typed(self.folder),
                    fix=f"--axis engine={grid.ENGINES[0]}",
                )
        if self.sampling.runs and set(engines) != {"transformers"}:
            raise ConfigError("the engine transformers alone samples", where="--samples", fix="leave --samples out")
        check_tables(suite.engine_tables, typed(self.folder))
        for setting in grid.settings(plan.axes):
            suite_of(suite, setting)
        return plan, suite


@dataclass(frozen=True)
class Moment:
    """Where a study stands: at its beginning, every second, and each time that a cell ends."""

    cell: Cell | None
    """The one that just ended, if one did."""
    finished: int
    """Cells with a file, those of an earlier run included."""
    running: tuple[Setting, ...]
    total: int
    seconds_left: float | None
    """An estimate (`grid.seconds_left`)."""


Tell = Callable[[Moment], None]


@contextmanager
def held(out: Path) -> Iterator[None]:
    """The study's folder, for one study at a time.

    Raises:
        ConfigError: another one runs in it.
    """
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / ".lock", timeout=0):
            yield
    except Timeout:
        raise ConfigError(
            "another study runs in this folder", where=typed(out), fix="wait for it, or --out FOLDER"
        ) from None


def read(out: Path) -> list[Cell]:
    """The cells that a folder holds, in order of their names.

    Raises:
        ConfigError: a file of them is damaged, or its name is not what it holds.
    """
    found = []
    for path in sorted((out / CELLS).glob("*.jsonl")):
        cell = cells.decode(path.read_bytes(), typed(path))
        if path.stem != cell.name:
            raise ConfigError(
                f"the file's name is not its content's, {cell.name}", where=typed(path), fix="name it so again"
            )
        found.append(cell)
    return found


def kept(out: Path, plan: Plan, shared: Mapping[str, Value]) -> list[Cell]:
    """The cells of this plan's grid that are there already.

    Raises:
        ConfigError: the folder holds cells of another study.
    """
    wanted = {grid.name_of(setting) for setting in grid.settings(plan.axes)}
    there = read(out)
    for cell in there:
        if changed := cells.differing(cell.asked, shared):
            raise ConfigError(
                f"this folder holds cells of another study: {'; '.join(changed)}",
                where=typed(out),
                fix="--out FOLDER, another one",
            )
    return [cell for cell in there if cell.name in wanted]


def of_one_study(found: Sequence[Cell]) -> None:
    """Refuse cells that were asked different things. Where a model lies is a machine's own; its digest is not.

    Raises:
        ConfigError: naming what differs.
    """
    for cell in found:
        changed = cells.differing({**found[0].asked, "model": cell.asked.get("model")}, cell.asked)
        if changed:
            raise ConfigError(
                f"cells of different studies: {'; '.join(changed)}",
                where="--merge",
                fix="study the same on every machine",
            )


def run(plan: Plan, suite: Suite, out: Path, jobs: int, again: bool, show: Progress, tell: Tell) -> list[Cell]:
    """Run what is not there yet of a plan's grid, and give all its cells.

    Args:
        plan: as `Plan.checked` gives it.
        suite: its suite.
        out: the study's folder; what it holds of the same study is kept.
        jobs: cells at a time.
        again: whether cells that failed are run once more.
        show: told while the model is fetched.
        tell: told at the beginning, every second, and whenever a cell ends.

    Raises:
        ConfigError: the folder holds another study, another study runs in it, or the model cannot be had.
    """
    shared = plan.asked(suite)
    with held(out):
        done = {c.name: c for c in kept(out, plan, shared) if c.status == "done" or not again}
        waiting: list[Setting] = [s for s in grid.settings(plan.axes) if grid.name_of(s) not in done]
        slots = _slots(plan, jobs, waiting)
        if waiting and any(needs_model(engine) for engine in plan.axes.get("engine", (suite.engine,))):
            models.resolve(suite.model, suite.folder, show.say)  # once, before many processes ask for it
        with tempfile.TemporaryDirectory(prefix="pytest-repro-study-") as folder:
            for cell in _Runner(plan, shared, out, Path(folder), slots, list(done.values()), waiting, tell).cells():
                done[cell.name] = cell
    return [done[grid.name_of(setting)] for setting in grid.settings(plan.axes)]


def _slots(plan: Plan, jobs: int, waiting: Sequence[Setting]) -> list[Mapping[str, str]]:
    """What each of the cells that run at a time has for itself: its share of the GPUs.

    Raises:
        ConfigError: a cell needs more GPUs than its share.
    """
    gpus = probe.visible_gpus(os.environ)
    if jobs == 1 or not gpus:
        return [{} for _ in range(jobs)]
    share = len(gpus) // jobs
    needed = max((int(setting.get("tensor_parallel", 1)) for setting in waiting), default=1)
    if share < needed:
        raise ConfigError(
            f"{jobs} cells at a time with {needed} GPUs each, and {len(gpus)} are visible",
            where="--jobs",
            fix=f"--jobs {max(1, len(gpus) // needed)}",
        )
    return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[i * share : (i + 1) * share])} for i in range(jobs)]


@dataclass
class _Running:
    """A cell's process."""

    setting: Setting
    process: subprocess.Popen[bytes]
    slot: Mapping[str, str]
    started: float
    log: Path


@dataclass
class _Runner:
    """Processes of one study, at most one a slot."""

    plan: Plan
    shared: Mapping[str, Value]
    out: Path
    folder: Path
    """For requests and logs, as long as it runs."""
    slots: list[Mapping[str, str]]
    finished: list[Cell]
    waiting: list[Setting]
    tell: Tell
    running: list[_Running] = field(default_factory=list)
    told: float = 0.0
    """When it was last told how things stand."""

    def __post_init__(self) -> None:
        self.total = len(self.finished) + len(self.waiting)
        self.jobs = len(self.slots)

    def cells(self) -> Iterator[Cell]:
        """Every waiting cell, as it ends. Whatever ends this, no process is left."""
        self._told(None)
        try:
            while self.waiting or self.running:
                while self.waiting and self.slots:
                    self._start(self.waiting.pop(0), self.slots.pop(0))
                if monotonic() - self.told > 1:
                    self._told(None)
                sleep(0.05)
                for one in [r for r in self.running if r.process.poll() is not None]:
                    self.running.remove(one)
                    self.slots.append(one.slot)
                    cell = self._ended(one)
                    self.finished.append(cell)
                    self._told(cell)
                    yield cell
        finally:
            self._end_all()

    def _start(self, setting: Setting, slot: Mapping[str, str]) -> None:
        name = grid.name_of(setting)
        request = self.folder / f"{name}.json"
        request.write_text(json.dumps(_request(self.plan, self.shared, setting, self._path(name), self.jobs)), "utf-8")
        log = self.folder / f"{name}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "pytest_repro.cli", "study-cell", str(request)],
                env={**grid.environment(setting, os.environ), **slot},
                stdin=subprocess.PIPE,  # it is closed when this process is gone, however that came about
                stdout=file,
                stderr=file,
                start_new_session=True,  # Ctrl-C is for this process to hand on
            )
        self.running.append(_Running(setting, process, slot, monotonic(), log))

    def _ended(self, one: _Running) -> Cell:
        """What it left; what it said, if it left nothing."""
        name = grid.name_of(one.setting)
        path = self._path(name)
        assert one.process.stdin is not None
        one.process.stdin.close()
        seconds = monotonic() - one.started
        if one.process.returncode == 0 and path.exists():
            cell = cells.decode(path.read_bytes(), typed(path))
        else:
            cell = Cell(one.setting, self.shared, "failed", _last_words(one), jobs=self.jobs)
        cell = replace(cell, wall_seconds=seconds)
        atomic_write(path, cells.encode(cell))
        return cell

    def _path(self, name: str) -> Path:
        return self.out / CELLS / f"{name}.jsonl"

    def _told(self, cell: Cell | None) -> None:
        self.told = monotonic()
        left = grid.seconds_left(
            [(c.setting, c.wall_seconds) for c in self.finished],
            [(r.setting, monotonic() - r.started) for r in self.running],
            self.waiting,
            self.jobs,
        )
        running = tuple(r.setting for r in self.running)
        self.tell(Moment(cell, len(self.finished), running, self.total, left))

    def _end_all(self) -> None:
        for one in self.running:
            assert one.process.stdin is not None
            one.process.stdin.close()
        for one in self.running:
            with suppress(subprocess.TimeoutExpired):
                one.process.wait(SECONDS_TO_END)
            with suppress(ProcessLookupError):
                os.killpg(one.process.pid, signal.SIGKILL)  # an engine's own processes too
            one.process.wait()


def _last_words(one: _Running) -> str:
    said = one.log.read_text("utf-8", "replace").strip()[-MOST_OF_A_LOG:]
    code = one.process.returncode
    how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return f"its process {how}: {said or 'it said nothing'}"


# --- the other side: one cell's process -----------------------------------------------------------------------------


def _request(plan: Plan, shared: Mapping[str, Value], setting: Setting, path: Path, jobs: int) -> dict[str, Any]:
    return {
        "suite": str(plan.folder),
        "overrides": asdict(plan.overrides),
        "axes": {name: list(values) for name, values in plan.axes.items()},
        "sampling": asdict(plan.sampling),
        "allow_code": plan.allow_code,
        "asked": dict(shared),
        "setting": dict(setting),
        "path": str(path.resolve()),
        "jobs": jobs,
    }


def answer(request: Path, show: Progress) -> None:
    """Run the cell that a study asks for in `request`, and write its file; ends with the study.

    Raises:
        ConfigError: the suite is not what it was when the study began.
    """
    _end_with_the_study()
    told = json.loads(request.read_text("utf-8"))
    overrides = Overrides(**{**told["overrides"], "numerics": None})
    axes = {name: tuple(values) for name, values in told["axes"].items()}
    plan = Plan(Path(told["suite"]), overrides, axes, Sampling(**told["sampling"]), told["allow_code"])
    suite = plan.suite()
    if changed := cells.differing(told["asked"], plan.asked(suite)):
        raise ConfigError(
            f"the suite changed while it was studied: {'; '.join(changed)}",
            where=typed(plan.folder),
            fix=f"pytest-repro study {quote(typed(plan.folder))}, with --out and another folder",
        )
    cell = decode(suite, told["setting"], told["asked"], plan.sampling, show, plan.allow_code)
    atomic_write(Path(told["path"]), cells.encode(replace(cell, jobs=told["jobs"])))


def _end_with_the_study() -> None:
    """End this process once nobody holds the other end of its standard input, whatever it is doing."""

    def wait() -> None:
        while os.read(0, 1):
            pass
        if os.getpgrp() == os.getpid():
            os.killpg(os.getpid(), signal.SIGKILL)  # an engine's own processes too
        os._exit(130)

    threading.Thread(target=wait, daemon=True).start()
