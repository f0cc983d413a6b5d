"""Which of the undone differences restores the golden: the smallest sets, from trials. Pure: a trial is a function.

A trial counts by what its own report shows. Where a field did not take the golden's value, or one moved that nobody undid,
its answer is an answer to another question.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from .fingerprint import Change, Fingerprint
from .golden import Golden
from .knobs import Undo, suspects
from .result import PromptResult, SuiteResult
from .verdict import ALWAYS_FAIL, WORST_FIRST

MOST_PROMPTS = 5
"""Prompts that are decoded in every trial."""

Names = tuple[str, ...]


# --- the search -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What a trial says."""

    restored: bool = False
    """The golden's own tokens came back."""
    sound: bool = True
    """Every knob took, and nothing else moved."""
    refused: frozenset[str] = frozenset()
    """Knobs that did not take; empty of a trial that failed for a reason that names none."""


@dataclass(frozen=True)
class Found:
    """The result of a search."""

    sets: tuple[Names, ...]
    """The smallest sets whose undoing restores the golden, all of one size; empty: there is none."""
    left: Names
    """What could be undone."""


def search(names: Sequence[str], trial: Callable[[Names], Outcome]) -> Found:
    """The smallest sets of knobs that restore.

    Everything at once comes first: if that does not restore, the cause is not among them. Then one by one, then pairs, and so
    on, all of a size before it stops. No set is tried twice.

    Args:
        names: the knobs, likeliest culprit first.
        trial: undoes these, in the order of `names`.
    """
    seen: dict[Names, Outcome] = {}

    def tried(chosen: Names) -> Outcome:
        if chosen not in seen:
            seen[chosen] = trial(chosen)
        return seen[chosen]

    left = _taking(tuple(names), tried)
    if not left or (tried(left).sound and not tried(left).restored):
        return Found((), left)
    for size in range(1, len(left) + 1):
        found = tuple(chosen for chosen in combinations(left, size) if _restores(tried(chosen)))
        if found:
            return Found(found, left)
    return Found((), left)


def _taking(names: Names, tried: Callable[[Names], Outcome]) -> Names:
    """The knobs that can be undone here: all of them at once, less those that did not take."""
    left = names
    while left and not tried(left).sound:
        refused = tried(left).refused or {n for n in left if len(left) > 1 and not tried((n,)).sound}
        if not refused:
            break  # each takes alone, and not all together: smaller sets may still tell
        left = tuple(n for n in left if n not in refused)
    return left


def _restores(outcome: Outcome) -> bool:
    return outcome.restored and outcome.sound


def most_trials(knobs: int) -> int:
    """How many sets there are to try at most."""
    return (1 << knobs) - 1


# --- one trial ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """What was seen when some differences were undone."""

    undone: tuple[Undo, ...]
    asked: Names
    """Prompts that were decoded."""
    parted: Mapping[str, int | None] = field(default_factory=dict)
    """Prompt -> where it diverges from the golden; None: nowhere."""
    refused: tuple[Undo, ...] = ()
    """Undone, and the field was not seen at the golden's value."""
    strayed: tuple[Change, ...] = ()
    """Fields that moved to neither side's value although nobody undid them."""
    remaining: tuple[Change, ...] = ()
    """Numerics fields that still differ from the golden's."""
    error: str = ""
    """Why there is no answer; empty if there is one."""
    seconds: float = 0.0

    @property
    def names(self) -> Names:
        """Of the knobs that were undone."""
        return tuple(undo.name for undo in self.undone)

    @property
    def restored(self) -> Names:
        """Prompts whose output is the golden's own."""
        return tuple(name for name in self.asked if self.parted.get(name, 0) is None)

    @property
    def outcome(self) -> Outcome:
        """For the search."""
        return Outcome(
            restored=self.restored == self.asked,
            sound=not (self.error or self.refused or self.strayed),
            refused=frozenset(undo.name for undo in self.refused),
        )

    @property
    def holds(self) -> bool:
        """It restored, and counts."""
        return _restores(self.outcome)


def golden_facts(golden: Golden) -> Fingerprint:
    """The environment that a golden was recorded in."""
    return {**golden.fingerprint, "compute_class": golden.compute_class, "numerics": golden.numerics}


def facts(result: SuiteResult) -> Fingerprint:
    """The environment that a check ran in, as observed."""
    observed = (result.observed or {}).get("compute_class", "unknown")
    return {**result.environment, "compute_class": observed, "numerics": result.numerics}


def judged(undone: Sequence[Undo], asked: Names, then: Fingerprint, before: Fingerprint, result: SuiteResult) -> Trial:
    """A trial, by its report.

    Args:
        undone: what it was to put back.
        asked: the prompts it was to decode.
        then: the golden's environment.
        before: the environment with nothing undone.
        result: what the check found.
    """
    if error := _broken(result, asked):
        return Trial(tuple(undone), asked, error=error, seconds=result.seconds)
    now = facts(result)
    remaining = suspects(then, now)
    missed = {change.field for change in remaining}
    return Trial(
        undone=tuple(undone),
        asked=asked,
        parted={p.id: p.divergence_index for p in result.prompts},
        refused=tuple(u for u in undone if missed.intersection(u.knob.fields)),
        strayed=tuple(c for c in remaining if c.now != before.get(c.field) and not any(u.knob.covers(c.field) for u in undone)),
        remaining=remaining,
        seconds=result.seconds,
    )  # fmt: skip


def _broken(result: SuiteResult, asked: Names) -> str:
    """Why a check has no answer to some prompt; empty if it has all."""
    there = {p.id: p for p in result.prompts}
    for name in asked:
        if name not in there:
            return f"prompt {name} was not checked"
        if there[name].verdict in ALWAYS_FAIL:
            return f"{there[name].verdict}: {there[name].reason}"
    return ""


# --- which prompts --------------------------------------------------------------------------------------------------


def parted(result: SuiteResult) -> list[PromptResult]:
    """Prompts whose output is not the golden's."""
    return [p for p in result.prompts if p.divergence_index is not None and p.verdict not in ALWAYS_FAIL]


def chosen(result: SuiteResult, ids: Sequence[str], batch_size: int) -> Names:
    """The worst few that parted, in as few of the golden's batches as may be: a batch always runs whole.

    Args:
        result: the check with nothing undone, or a report of it: what it says of prompts that the suite lacks is left out.
        ids: all prompts of the suite, in its order.
        batch_size: the golden's.
    """
    place = {name: i // batch_size for i, name in enumerate(ids)}
    worst = sorted((p for p in parted(result) if p.id in place), key=_badness)
    batches = list(dict.fromkeys(place[p.id] for p in worst))
    return tuple(p.id for batch in batches for p in worst if place[p.id] == batch)[:MOST_PROMPTS]


def _badness(prompt: PromptResult) -> tuple[int, float]:
    return WORST_FIRST.index(prompt.verdict), -(prompt.deficit if prompt.deficit is not None else float("inf"))


def along(trial: Trial, then: Fingerprint, before: Fingerprint) -> Iterator[Change]:
    """Fields that took the golden's value with what was undone, without being asked to."""
    left = {change.field for change in trial.remaining}
    own = {name for undo in trial.undone for name in undo.knob.concerns}
    yield from (c for c in suspects(then, before) if c.field not in left and c.field not in own)
