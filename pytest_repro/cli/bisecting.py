"""`pytest-repro bisect`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import monotonic
from typing import Annotated, Any, TypeVar

import typer
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from .. import bisection, knobs, trials
from ..bisection import Found, Names, Outcome, Trial
from ..errors import ConfigError, EngineError
from ..fingerprint import Change, Fingerprint
from ..knobs import Setting, Undo, spelt
from ..report import document
from ..result import SuiteResult
from ..store import STEM, Place
from ..suite import SUITE_FILE, Suite, defaults_around, load, parse_engine_option
from ..text import inert
from ..trials import Check
from .shell import AsJson, app, as_data, console, errors, reported

T = TypeVar("T")
INTERRUPTED = 130
MOST_FIELDS = 6
"""Fields that are told of one trial."""
_NOT_TAKEN = ("--repro-check", "--repro-update", "--repro-method", "--repro-arbiter", "--repro-shard", "--repro-report-json",
              "--repro-report-html", "--repro-pending-dir")  # fmt: skip

Numerics = Annotated[str | None, typer.Option("--numerics", help="As --repro-numerics of the check that differs.")]
EngineName = Annotated[str | None, typer.Option("--engine", help="As --repro-engine of that check.")]
BatchSize = Annotated[int | None, typer.Option("--batch-size", min=1, help="As --repro-batch-size of that check.")]
EngineOption = Annotated[
    list[str] | None, typer.Option("--engine-option", metavar="NAME=VALUE", help="As --repro-engine-option; repeatable.")
]  # fmt: skip
GoldenName = Annotated[str | None, typer.Option("--golden", help="As --repro-golden of that check.")]
Report = Annotated[
    Path | None, typer.Option("--report", help="Begin from a check's --repro-report-json, not from a whole check.")
]


@app.command(context_settings={"allow_extra_args": True})
@reported
def bisect(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(help="A suite's folder. What follows -- is given to every pytest run as it is.")],
    mode: Numerics = None,
    engine: EngineName = None,
    batch_size: BatchSize = None,
    engine_option: EngineOption = None,
    golden: GoldenName = None,
    report: Report = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Name the smallest set of environment differences whose undoing restores the golden's outputs.

    Run it with the options and in the environment of the check whose outputs differ. What can be put back here (batch size,
    threads, instruction set, attention kernel, numerics, engine) is put back: all of it, then one by one, then in pairs, and
    so on. Exit 0 if a set was named or nothing differs, 1 if none was, 130 if it was interrupted.
    """
    folder = path.parent if path.name == SUITE_FILE else path
    suite = load(folder, defaults=defaults_around(folder)[1])
    given = {
        "--repro-numerics": mode,
        "--repro-engine": engine,
        "--repro-batch-size": batch_size,
        "--repro-golden": golden,
    }
    named = dict(_engine_option(text) for text in engine_option or ())
    setting = Setting({name: str(value) for name, value in given.items() if value is not None}, named)
    check = Check(str(folder), setting, _handed_on(context.args))
    with tempfile.TemporaryDirectory(prefix="pytest-repro-bisect-") as reports:
        work = Bisection(check, suite, Path(reports), as_json)
        try:
            verdict = work.run(report)
        except KeyboardInterrupt:
            verdict = work.interrupted()
        if as_json:
            as_data(work.data(verdict))
    raise typer.Exit({"found": 0, "identical": 0, "interrupted": INTERRUPTED}.get(verdict, 1))


def _engine_option(text: str) -> tuple[str, str]:
    name, _ = parse_engine_option(text)
    return name, text.partition("=")[2]


def _handed_on(arguments: Sequence[str]) -> Names:
    """What follows `--`, without what bisect itself says to pytest."""
    for argument in arguments:
        name = argument.partition("=")[0]
        if name in knobs.OPTIONS:
            raise ConfigError(
                f"{name} has an option of its own", where="--", fix=f"{knobs.OPTIONS[name]}, before the --"
            )
        if name in _NOT_TAKEN:
            raise ConfigError(f"{name} is what bisect itself decides on", where="--", fix="leave it out")
    return tuple(arguments)


@dataclass
class Bisection:
    """One run of the command: what was asked, and what is known so far."""

    check: Check
    """As the user has it; later with its mode and golden pinned, and its prompts chosen."""
    suite: Suite
    reports: Path
    """Folder of the reports of all trials, for as long as it runs."""
    as_json: bool
    result: SuiteResult | None = None
    """The check with nothing undone."""
    then: Fingerprint = field(default_factory=dict)
    before: Fingerprint = field(default_factory=dict)
    undos: tuple[Undo, ...] = ()
    trials: list[Trial] = field(default_factory=list)
    sets: tuple[Names, ...] = ()

    # --- what is done -------------------------------------------------------------------------------------------------

    def run(self, report: Path | None) -> str:
        """The verdict: `identical`, `found`, `not_found`."""
        seen = _in_report(report, self.suite, self.check) if report else None
        if seen is not None and not self._pin(seen, "report"):
            return "identical"
        self.result = self._first()
        if not self._pin(self.result):
            return self._gone(seen) if seen is not None else "identical"
        self.before = bisection.facts(self.result)
        self.undos = knobs.undoable(self.then, self.before)
        self._tell_differences()
        if not self.undos:
            return self._nothing(Found((), ()))
        found = bisection.search([undo.name for undo in self.undos], self._trial)
        self.sets = found.sets
        return self._named() if found.sets else self._nothing(found)

    def _first(self) -> SuiteResult:
        """The check with nothing undone: it shows what differs here, under this command's options."""
        started = monotonic()
        found = self._watched(
            "the check with nothing undone", lambda: trials.results(self.check, self.reports / "0.json")
        )
        parted = [result for result in found if bisection.parted(result)]
        for other in parted[1:]:
            self._tell("note", f"{other.numerics} differs as well: pytest-repro bisect {self.check.folder} --numerics {other.numerics}")  # fmt: skip
        return replace((parted or found)[0], seconds=monotonic() - started)

    def _pin(self, result: SuiteResult, label: str = "check") -> bool:
        """Hold the check to this result's mode and golden, and to the worst of its prompts; False if none differs."""
        if not result.compared or result.golden is None:
            failed = next((check.message for check in result.checks if check.status == "fail"), "nothing was compared")
            why = next((f"{p.verdict}: {p.reason}" for p in result.prompts if p.reason), failed)
            raise EngineError(f"no prompt could be compared: {why}", where=self.check.folder, fix=self.check.typed)
        parted = bisection.parted(result)
        name = str(result.golden["name"])
        self._tell(label, f"{len(result.prompts)} prompts, {result.numerics}, against {name}.golden: {len(parted)} differ, {result.seconds:.0f} s")  # fmt: skip
        if not parted:
            moved = sum(p.verdict != "identical" for p in result.prompts)
            note = f"; {moved} moved without another token, which bisect does not look at" if moved else ""
            self._tell("", f"no output differs from the golden's: there is nothing to bisect{note}", "green")
            return False
        if not STEM.fullmatch(name):
            raise ConfigError(f"{name!r} is not a golden's name", where="[golden.name]", fix="name another report")
        pinned = Setting({"--repro-numerics": result.numerics, "--repro-golden": name})
        golden = Place(self.suite.folder, name).read()
        self.then = bisection.golden_facts(golden)
        chosen = bisection.chosen(result, [prompt.id for prompt in self.suite.prompts], golden.batch_size)
        self.check = replace(self.check, setting=self.check.setting.under([pinned]), prompts=chosen)
        return True

    def _trial(self, names: Names) -> Outcome:
        undone = tuple(undo for undo in self.undos if undo.name in names)
        told = "everything that can be" if len(undone) == len(self.undos) > 1 else _and(undo.told for undo in undone)
        report = self.reports / f"{len(self.trials) + 1}.json"
        done = self._watched(f"undone: {told}", lambda: trials.trial(self.check, undone, self.then, self.before, report))  # fmt: skip
        self.trials.append(done)
        style = "green" if done.holds else "" if done.outcome.sound else "yellow"
        more = bisection.most_trials(len(self.undos)) - 1
        left = f"; {more} more at most" if more and len(self.trials) == 1 else ""
        self._tell("" if self.trials[1:] else "undone", f"{told}: {_outcome(done)}, {done.seconds:.0f} s{left}", style)
        return done.outcome

    # --- what is said -------------------------------------------------------------------------------------------------

    def _tell(self, label: str, line: str, style: str = "") -> None:
        """A line as it comes; beside the JSON, where that is asked for."""
        (errors if self.as_json else console).print(Text(inert(f"{label:<13} {line}"), style=style))

    def _watched(self, what: str, run: Callable[[], T]) -> T:
        """Run it, with a clock on a terminal."""
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as progress:
            progress.add_task(inert(what))
            return run()

    def _tell_differences(self) -> None:
        self._tell("prompts", f"{', '.join(self.check.prompts)}: decoded again in every trial, with their batches")
        can = [(undo.told, "") for undo in self.undos]
        cannot = knobs.fixed(self.undos, self.then, self.before)
        for i, (line, style) in enumerate(
            [*can, *((f"{_change(c)}   cannot be undone here", "yellow") for c in cannot)]
        ):
            self._tell("" if i else "environment", line, style)
        if can:
            single = f", {len(can) + 1} if a single difference did it" if len(can) > 2 else ""
            self._tell("trials", f"{bisection.most_trials(len(can))} at most{single}; each loads the model anew")

    def _named(self) -> str:
        for i, names in enumerate(self.sets):
            done = next(trial for trial in self.trials if trial.names == names)
            together = " together" if len(names) > 1 else ""
            smaller = "; no part of it does" if len(names) > 1 else ""
            line = f"{_and(undo.told for undo in done.undone)} did it{together}: undone, {_counted(done)}{smaller}"
            self._tell("or" if i else "found", line, "green")
            if along := list(bisection.along(done, self.then, self.before)):
                self._tell("", f"with it went {_few(along)}")
        for i, command in enumerate(self._next()):
            self._tell("" if i else "next", f"{command}   the whole suite, so undone", "bold")
        return "found"

    def _next(self) -> list[str]:
        undone = [[undo for undo in self.undos if undo.name in names] for names in self.sets]
        return [self.check.undone(undos).typed for undos in undone]

    def _nothing(self, found: Found) -> str:
        """Why no set can be named, and what remains."""
        whole = next((trial for trial in self.trials if trial.names == found.left), None)
        remaining = whole.remaining if whole and not whole.error else knobs.suspects(self.then, self.before)
        if not self.undos and not remaining:
            self._tell("not found", "no numerics field differs from the golden's: the environment that is seen did not do it", "red")  # fmt: skip
            return "not_found"
        tried = "nothing can be undone"
        if whole:
            tried = f"with {_and(undo.told for undo in whole.undone)} undone, {_outcome(whole)}"
        self._tell("not found", f"the cause is not among what can be undone here: {tried}", "red")
        for i, change in enumerate(remaining):
            self._tell("" if i else "remaining", _change(change))
        if not remaining:
            self._tell("remaining", "no numerics field: what did it is not in the environment that is seen")
        return "not_found"

    def _gone(self, seen: SuiteResult) -> str:
        """The report's outputs differ, and here they do not."""
        assert self.result is not None
        self._tell("not found", "what the report shows does not happen here; between its environment and this one differ", "red")  # fmt: skip
        for change in knobs.suspects(bisection.facts(seen), bisection.facts(self.result)):
            self._tell("", _change(change))
        return "not_found"

    def interrupted(self) -> str:
        """What was found before Ctrl-C."""
        held = [trial for trial in self.trials if trial.holds]
        self._tell("interrupted", f"after {len(self.trials)} trials", "yellow")
        for trial in sorted(held, key=lambda trial: len(trial.undone)):
            self._tell("so far", f"{_and(undo.told for undo in trial.undone)}: undone, {_counted(trial)}")
        return "interrupted"

    def data(self, verdict: str) -> dict[str, Any]:
        """All of it, for scripts."""
        stay = knobs.fixed(self.undos, self.then, self.before)
        return {
            "suite": self.check.folder,
            "verdict": verdict,
            "numerics": self.check.setting.options.get("--repro-numerics"),
            "golden": self.check.setting.options.get("--repro-golden"),
            "differ": len(bisection.parted(self.result)) if self.result else None,
            "prompts": list(self.check.prompts),
            "undoable": [{"knob": undo.name, "changes": [asdict(c) for c in undo.changes]} for undo in self.undos],
            "fixed": [asdict(change) for change in stay],
            "trials": [_trial_data(trial) for trial in self.trials],
            "sets": [list(names) for names in self.sets],
            "next": self._next(),
        }


def _trial_data(trial: Trial) -> dict[str, Any]:
    return {
        "undone": list(trial.names),
        "holds": trial.holds,
        "parted": dict(trial.parted),
        "refused": [undo.name for undo in trial.refused],
        "strayed": [asdict(change) for change in trial.strayed],
        "remaining": [asdict(change) for change in trial.remaining],
        "error": trial.error,
        "seconds": round(trial.seconds, 1),
    }


def _in_report(report: Path, suite: Suite, check: Check) -> SuiteResult:
    """The check of this suite in a report; run as this command is.

    Raises:
        ConfigError: there is none, or it was run with settings that this command was not given.
    """
    options = check.setting.options
    mode = options.get("--repro-numerics")
    of_suite = [r for r in document.read(report) if r.settings["prompts"] == suite.digest_of_prompts()]
    found = [r for r in of_suite if mode in (None, r.numerics)]
    if not found:
        raise ConfigError(
            f"this report holds no check of {check.folder}" + (f" in {mode}" if mode else ""),
            where=report,
            fix="name a report of pytest --repro-check of this suite, as it is now",
        )
    result = next((r for r in found if bisection.parted(r)), found[0])
    asked = {"engine": ("--repro-engine", suite.engine), "batch_size": ("--repro-batch-size", str(suite.batch_size))}
    for name, (option, default) in asked.items():
        if str(result.settings[name]) != options.get(option, default):
            raise ConfigError(
                f"the check in this report was run with {name} {result.settings[name]}, and this is not",
                where=report,
                fix=f"{knobs.OPTIONS[option]} {result.settings[name]}",
            )
    return result


def _outcome(trial: Trial) -> str:
    """What a trial came to, one clause."""
    if trial.error:
        return f"no answer: {trial.error}"
    if trial.refused:
        own = [c for c in trial.remaining for undo in trial.refused if c.field in undo.knob.fields]
        return f"not counted: {_few(own)} could not be undone here"
    if trial.strayed:
        return f"not counted: {_few(trial.strayed)} moved as well"
    return _counted(trial)


def _counted(trial: Trial) -> str:
    return f"{len(trial.restored)} of {len(trial.asked)} outputs are the golden's again"


def _change(change: Change) -> str:
    return f"{change.field} {spelt(change.golden)} -> {spelt(change.now)}"


def _few(changes: Sequence[Change]) -> str:
    more = f" and {len(changes) - MOST_FIELDS} more" if len(changes) > MOST_FIELDS else ""
    return ", ".join(map(_change, changes[:MOST_FIELDS])) + more


def _and(parts: Iterable[str]) -> str:
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last
