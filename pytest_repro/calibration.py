"""The envelopes of other machines beside a golden's own: which one a check is judged with, and how they are kept. Pure.

A golden knows how far rounding moves it where it was recorded. Where other kernels run, that was not measured, and a check
takes the wide margin; unless `pytest-repro calibrate` measured it there, which is a `Calibration` of the same golden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from shlex import quote
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import fingerprint
from .errors import ConfigError, EngineError, GoldenError
from .fingerprint import Change, Fingerprint, class_of
from .generation import Generation
from .golden import Golden, signed
from .noise import EXACT, Calibration, Envelope
from .result import Calibrated, SuiteResult
from .rounding import of_precision, unmeasured
from .verdict import ALWAYS_FAIL, Verdict

MOST = 64
"""Calibrations that a golden may hold; golden.schema.json says the same."""
MACHINE = ("time", "host")
"""What is kept beside the fields of numerics: it names the machine, and says when."""


@dataclass(frozen=True)
class Basis:
    """What a check is judged with."""

    golden: Golden
    """With the envelope that holds here as its `noise`."""
    calibration: Calibration | None
    """Where that envelope is from; None: the recording."""
    changes: tuple[Change, ...]
    """How the environment differs from the one that the envelope was measured in: fields of numerics."""


def facts(environment: Fingerprint) -> Fingerprint:
    """Of an environment, what a calibration keeps."""
    return {name: value for name, value in environment.items() if class_of(name) == "numerics" or name in MACHINE}


def recorded_in(golden: Golden) -> Fingerprint:
    """The environment of the recording, compute class and all."""
    return {**golden.fingerprint, "compute_class": golden.compute_class}


def basis(golden: Golden, now: Fingerprint) -> Basis:
    """The recording's envelope where it covers this environment, or else the nearest calibration that does.

    Where none does, the recording's: what differs from it is then unmeasured.
    """
    own = _changes(recorded_in(golden), now)
    if not unmeasured(own, variants(golden.noise)):
        return Basis(golden, None, own)
    measured = [(c, _changes(c.fingerprint, now)) for c in golden.calibrations]
    near = [(c, changes) for c, changes in measured if not unmeasured(changes, variants(c.envelope))]
    if not near:
        return Basis(golden, None, own)
    nearest, changes = min(near, key=lambda pair: len(pair[1]))
    return Basis(replace(golden, noise=nearest.envelope), nearest, changes)


def differs(golden: Golden, calibration: Calibration) -> list[Change]:
    """What of the calibration's machine the recording's envelope does not cover: why it is there."""
    changes = _changes(recorded_in(golden), calibration.fingerprint)
    beyond = unmeasured(changes, variants(golden.noise))
    return [change for change in changes if change.field in beyond]


def variants(envelope: Envelope) -> list[str]:
    """Names of the benign changes that an envelope was measured from."""
    return [variant.name for variant in envelope.variants]


def _changes(then: Fingerprint, now: Fingerprint) -> tuple[Change, ...]:
    return tuple(change for change in fingerprint.diff(then, now) if change.cls == "numerics")


# --- measured --------------------------------------------------------------------------------------------------------


def expect_measurable(result: SuiteResult, golden: Golden) -> None:
    """Fail before anything runs where a machine cannot be calibrated for a golden.

    Raises:
        GoldenError: nobody accepted it, or it has no envelope to hold the machine against.
        ConfigError: it answers other prompts or another model, precision itself differs, or its own envelope holds here.
    """
    where, again = result.path, f"pytest --repro-update {result.again} --repro-numerics {result.numerics}"
    if golden.review is None:
        raise GoldenError("this golden was never reviewed", where=where, fix=f"pytest-repro review {quote(where)}")
    if golden.compute_class == EXACT:
        what = "an exact golden has no rounding to measure: every machine gives its bits, or drifts"
        raise ConfigError(
            what, where=where, fix=f"pytest --repro-check {result.again} --repro-numerics {result.numerics}"
        )
    if not golden.noise.variants:
        what = (
            "this golden has no envelope of its own, which a machine could be held against: its engine could not replay"
        )
        raise GoldenError(what, where=where, fix=again)
    asked = {p.id for p in result.prompts}
    others = [p.id for p in result.prompts if p.verdict != Verdict.IDENTICAL]
    others += [name for name in golden.generation.ids if name not in asked]
    identity = [c.field for c in result.environment_diff if c.cls == "identity"]
    if identity or others:
        differ = ", ".join((identity or others)[:5])
        what = f"the golden answers another question: {differ} differ"
        raise ConfigError(what, where=where, fix=f"{again}, and review it; then calibrate")
    if precision := of_precision(result.environment_diff):
        what = f"precision itself differs, which is no rounding of a machine: {told(precision)}"
        raise ConfigError(what, where=where, fix=f"calibrate as it was recorded: --numerics {quote(golden.numerics)}")
    if not unmeasured(result.environment_diff, variants(golden.noise)):
        what = "there is nothing to calibrate: the recording's own envelope covers this environment"
        raise ConfigError(
            what, where=where, fix=f"pytest --repro-check {result.again}   # takes the narrow margin here"
        )


def moves_too_much(result: SuiteResult, margin: float) -> Iterator[str]:
    """Why a machine is not calibrated, after the plain check on it: each reason in a line.

    Raises:
        EngineError: a prompt was not answered, or not the same one.
    """
    for prompt in result.prompts:
        if prompt.verdict in ALWAYS_FAIL:
            raise EngineError(f"prompt {prompt.id}: {prompt.reason}", where=result.path, fix="nothing was written")
    drifting = [p for p in result.prompts if p.verdict == Verdict.DRIFT]
    if drifting:
        few = "; ".join(f"{p.id}: {p.reason}" for p in drifting[:3])
        yield f"{len(drifting)} of {len(result.prompts)} prompts drift: {few}" + ("; …" if drifting[3:] else "")
    check = next(c for c in result.checks if c.name == "rounding")
    ratio = result.metrics.get("rounding_ratio")
    if check.status == "fail" or (ratio or 0.0) > margin:  # so few prompts may be that the test cannot fail
        yield check.message.partition("\n")[0]


def outcome(result: SuiteResult, golden: Golden, facts: Fingerprint, refused: Sequence[str]) -> Calibrated:
    """What is told of a calibration, as far as the plain check goes."""
    here = Calibration(facts, golden.noise)
    counts = " · ".join(f"{n} {verdict}" for verdict, n in result.counts.items())
    check = next(c for c in result.checks if c.name == "rounding")
    steps: tuple[tuple[str, str], ...] = (
        (f"pytest-repro review {quote(result.path)}", "it holds once it is accepted"),
    )
    if refused:
        again = f"pytest --repro-check {result.again} --repro-numerics {result.numerics}"
        bisect = [step for step in result.next_steps if step[0].startswith("pytest-repro bisect")]
        steps = ((again, "the whole report of what moved"), *bisect)
    return Calibrated(
        name=result.name,
        path=result.path,
        numerics=result.numerics,
        golden=golden.stem,
        prompts=len(golden.generation),
        machine=named(here),
        differs=tuple(differs(golden, here)),
        checked=tuple(line for line in (counts, check.message.partition("\n")[0]) if line not in refused),
        refused=tuple(refused),
        next_steps=steps,
    )


# --- kept -----------------------------------------------------------------------------------------------------------


def same_machine(one: Calibration, other: Calibration) -> bool:
    """Whether two were measured where every field of numerics is the same."""
    return not _changes(one.fingerprint, other.fingerprint)


def with_calibration(golden: Golden, found: Calibration, where: str) -> Golden:
    """The golden with a calibration, which takes the place of one of the same machine.

    Raises:
        GoldenError: it holds as many as it may.
    """
    return _holding(golden, _put(golden.calibrations, found), where)


def united(candidate: Golden, standing: Golden | None, where: str) -> Golden:
    """A candidate with the calibrations of the golden that stands, as long as the generation is the same bit for bit.

    Two machines may have been calibrated from one golden: what was accepted of the one must not go with the other. Of two of
    one machine the later stands. What another generation was calibrated with says nothing of this one.

    Raises:
        GoldenError: together they are more than a golden may hold.
    """
    if standing is None or not standing.calibrations or not _same(candidate.generation, standing.generation):
        return candidate
    kept = standing.calibrations
    for found in candidate.calibrations:
        known = next((c for c in kept if same_machine(c, found)), None)
        if known is None or _time(found) > _time(known):
            kept = _put(kept, found)
    return signed(_holding(candidate, kept, where))


def _put(calibrations: tuple[Calibration, ...], found: Calibration) -> tuple[Calibration, ...]:
    if not any(same_machine(c, found) for c in calibrations):
        return (*calibrations, found)
    return tuple(found if same_machine(c, found) else c for c in calibrations)


def _holding(golden: Golden, calibrations: tuple[Calibration, ...], where: str) -> Golden:
    if len(calibrations) > MOST:
        raise GoldenError(
            f"{len(calibrations)} machines would be calibrated, and a golden holds {MOST}",
            where=where,
            fix="record it anew, and calibrate the machines that are still there",
        )
    return replace(golden, calibrations=calibrations)


def same_recording(one: Golden, other: Golden) -> bool:
    """Whether two goldens differ in their calibrations alone."""
    bare = [signed(replace(golden, calibrations=())).digest for golden in (one, other)]
    return bare[0] == bare[1]


def _time(calibration: Calibration) -> str:
    return str(calibration.fingerprint.get("time") or "")


def _same(one: Generation, other: Generation) -> bool:
    """Whether two generations are the same, every number bit for bit."""
    named = ("ids", "prompt_digests", "content_digests", "texts", "finish_reasons")
    columns = ("offsets", "tokens", "logprob", "gap", "runner_up")
    return all(getattr(one, name) == getattr(other, name) for name in named) and all(
        getattr(one, name).tobytes() == getattr(other, name).tobytes() for name in columns
    )


# --- compared -------------------------------------------------------------------------------------------------------


def change_of(before: Golden, after: Golden) -> Iterator[tuple[str, Calibration, Calibration | None]]:
    """What becomes of calibrations: (`added`, `replaced` or `dropped`, which, what it replaces)."""
    for found in after.calibrations:
        known = next((c for c in before.calibrations if same_machine(c, found)), None)
        if known is None or known.fingerprint != found.fingerprint:
            yield ("replaced" if known else "added"), found, known
    for gone in before.calibrations:
        if not any(same_machine(gone, c) for c in after.calibrations):
            yield "dropped", gone, None


def moved(then: Envelope, now: Envelope) -> dict[str, Any]:
    """Two envelopes of one golden: the largest deficits, and prompts' levels now in units of then."""
    return {
        "prompts": len(then.prompt_level),
        "max_deficit": [then.max_deficit, now.max_deficit],
        "gap_level": _spread(then.gap_level, now.gap_level),
        "prompt_level": _spread(then.prompt_level, now.prompt_level),
    }


def _spread(then: NDArray[np.float32], now: NDArray[np.float32]) -> dict[str, float] | None:
    """Median, least and most of the prompts' ratios; None where none is known."""
    known = np.isfinite(then) & np.isfinite(now) & (then > 0)
    if not known.any():
        return None
    ratios = now[known].astype(np.float64) / then[known]
    return {"median": float(np.median(ratios)), "least": float(ratios.min()), "most": float(ratios.max())}


def spoken(moved: Mapping[str, Any], of: str = "the recording's") -> str:
    """What `moved` found, in a line."""
    gaps, own = moved["gap_level"], moved["prompt_level"]
    then, now = moved["max_deficit"]
    said = [
        f"gaps {gaps['median']:.3g} times {of} level (median of {moved['prompts']} prompts, {gaps['least']:.2g} to {gaps['most']:.2g})"
        if gaps
        else f"gaps beside {of}: not known",
        f"|Δlogp| {own['median']:.3g} times" if own else "",
        f"largest change of a gap {then:.2g} -> {now:.2g}",
    ]
    return ", ".join(filter(None, said))


def named(calibration: Calibration) -> str:
    """When and on which machine, in a few words."""
    of = calibration.fingerprint
    machine = [
        of.get("device"),
        of.get("cpu_model"),
        of.get("cpu_capability"),
        of.get("torch") and f"torch {of['torch']}",
    ]
    return ", ".join([calibration.when, f"host {of.get('host') or '?'}", *(str(part)[:60] for part in machine if part)])


def told(changes: Sequence[Change], most: int = 4) -> str:
    """Differing fields with their values, the likeliest suspects first."""
    shown = [f"{c.field} {_value(c.golden)} -> {_value(c.now)}" for c in changes[:most]]
    return ", ".join(shown) + (f" and {len(changes) - most} more" if len(changes) > most else "")


def _value(value: fingerprint.Value) -> str:
    return "(not there)" if value is None else str(value)[:48]
