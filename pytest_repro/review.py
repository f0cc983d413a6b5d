"""What a reviewer needs to know about a pending golden, as plain data: for the terminal and for scripts alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from . import calibration, candidate, fingerprint, probe, verification
from .accuracy import paired_test
from .errors import ConfigError, GoldenError
from .fingerprint import Fingerprint, Value
from .golden import Golden
from .noise import Calibration
from .store import Place, a_part
from .text import inert
from .verdict import Verdict, failures
from .wording import word_diff

GREW = {"mean_abs_dlogp": 1.5, "max_deficit": 1.5}
"""Measures of an envelope, and the times that they may grow unremarked."""
GAPS_GREW = 1.25
"""The same for the median prompt's change of its gaps, which a whole suite is held against."""
LEVEL_GREW = 3.0
"""Times that one prompt's noise level may grow unremarked: another text has another level."""


def commit_of(folder: Path) -> str | None:
    """The commit that is checked out around a folder."""
    found = probe.commit(folder).get("commit")
    return str(found) if found else None


def summary(place: Place) -> dict[str, Any]:
    """One pending golden in a line."""
    base: dict[str, Any] = {
        "path": str(place.text),
        "golden": place.stem,
        "error": "",
        "prompts": 0,
        "changed": 0,
        "against": None,
        "part": str(place.shard) if place.shard else None,
        "calibrations": {},
    }
    try:
        golden = place.read()
    except GoldenError as exc:
        return {**base, "error": str(exc)}
    try:
        old: Golden | None = place.other.read()
    except GoldenError:
        old = None
    changed = sum(note["verdict"] != "identical" for note in notes_on(golden, old).values())
    found = {"prompts": len(golden.generation), "changed": changed, "against": old.digest if old else None}
    machines = Counter(state for state, _, _ in calibration.change_of(old, golden)) if old else {}
    return {**base, **found, "calibrations": dict(machines)}


def notes_on(new: Golden, old: Golden | None) -> dict[str, dict[str, Any]]:
    """What changed, by the two goldens themselves.

    The notes in a candidate are outside its digest, and may come from anybody. Of them only a deficit is taken, where the
    files do not hold it, and it is shown as what the run says; what differs and the verdict are judged here.
    """
    if old is None:
        return {name: {"id": name, "verdict": "new", "claimed": False} for name in new.generation.ids}
    notes = (new.candidate or {}).get("prompts", [])
    said = {note["id"]: float(note["deficit"]) for note in notes if note.get("deficit") is not None}
    by_files = {note["id"]: note for note in (candidate.with_notes(new, old).candidate or {})["prompts"]}
    seen = {note["id"]: note for note in (candidate.with_notes(new, old, said).candidate or {})["prompts"]}
    return {
        name: {**note, "claimed": note.get("deficit") != by_files[name].get("deficit")} for name, note in seen.items()
    }


def changes(place: Place) -> dict[str, Any]:
    """One pending golden beside the one it would replace.

    Raises:
        GoldenError: the pending golden cannot be trusted or read.
    """
    if place.shard is not None:
        return {**_NOTHING, "path": str(place.text), "golden": place.stem, "head": [a_part(place).what]}
    new = place.read()
    try:
        old: Golden | None = place.other.read()
        trouble = ""
    except GoldenError as exc:
        old, trouble = None, exc.what
    new = calibration.united(new, old, str(place.text))  # as it will be accepted
    notes = notes_on(new, old)
    found: dict[str, Any] = {
        "path": str(place.text),
        "golden": place.stem,
        "replaces": old.digest if old else None,
        "counts": dict(Counter(note["verdict"] for note in notes.values())),
        **_thresholds(place, old, new, notes),
        "accuracy": _accuracy(old, new),
        "envelope_grew": [*_envelope(old, new), *_calibrated_wider(old, new)],
        "calibrations": [_machine(*change, new) for change in calibration.change_of(old or _uncalibrated(new), new)],
    }
    environment = fingerprint.diff(old.fingerprint, new.fingerprint) if old else []
    return {
        **found,
        "head": [*_compared(old, new, trouble, found), *describe(_uncalibrated(new))],
        "environment": [vars(c) for c in environment if c.field != "time"],
        "prompts": [_prompt(name, old, new, note) for name, note in notes.items() if note["verdict"] != "identical"],
    }


_NOTHING: dict[str, Any] = {
    "replaces": None, "counts": {}, "beyond_thresholds": [], "thresholds_loosened": [], "accuracy": None,
    "envelope_grew": [], "calibrations": [], "environment": [], "prompts": [],
}  # fmt: skip


def _thresholds(place: Place, old: Golden | None, new: Golden, notes: Mapping[str, Any]) -> dict[str, list[str]]:
    """Which thresholds the change goes beyond, and which were loosened: accepting puts them in force."""
    try:
        in_force = verification.in_force(place)
        loosened = verification.loosened(place, new, old)
    except ConfigError as exc:
        return {"beyond_thresholds": [f"the thresholds cannot be read: {exc.what}"], "thresholds_loosened": []}
    known = {str(verdict): verdict for verdict in Verdict}
    counts = Counter(known[note["verdict"]] for note in notes.values() if note["verdict"] in known)
    beyond = [failure.rule for failure in failures(counts, in_force, len(new.generation))]
    return {"beyond_thresholds": beyond, "thresholds_loosened": loosened}


def _accuracy(old: Golden | None, new: Golden) -> dict[str, Any] | None:
    """Accuracy before and after on the prompts that both answer, with the paired test."""
    if old is None:
        return None
    then = old.generation.index()
    pairs = [
        (old.scores[then[name]], score)
        for name, score in zip(new.generation.ids, new.scores, strict=True)
        if name in then
    ]
    scored = [(bool(a), bool(b)) for a, b in pairs if a is not None and b is not None]
    if not scored:
        return None
    test = paired_test([a for a, _ in scored], [b for _, b in scored], alpha=0.05)
    return {
        "golden": test.golden, "now": test.now, "lost": test.lost, "gained": test.gained, "p_value": test.p_value, "n": test.n,
    }  # fmt: skip


def _envelope(old: Golden | None, new: Golden) -> list[dict[str, Any]]:
    """Measures of noise that are larger than they were, by more than they vary."""
    if old is None:
        return []
    measures = [(name, getattr(old.noise, name), getattr(new.noise, name)) for name in GREW]
    grown = [{"measure": name, "golden": then, "now": now} for name, then, now in measures if now > GREW[name] * then]
    return [*grown, *_grown_gaps(old, new), *_grown_levels(old, new)]


def _grown_gaps(old: Golden, new: Golden) -> list[dict[str, Any]]:
    """The benign change of gaps, if the median prompt's grew, or if it was known and is known no more."""
    then, now = old.generation.index(), new.generation.index()
    common = [name for name in now if name in then]
    before = old.noise.gap_level[[then[name] for name in common]].astype(np.float64)
    after = new.noise.gap_level[[now[name] for name in common]].astype(np.float64)
    known = np.isfinite(before) & (before > 0)
    if not known.any():
        return []
    then_level = float(np.median(before[known]))
    if np.isnan(after[known]).any():
        return [{"measure": "benign change of gaps, not known any more:", "golden": then_level, "now": 0.0}]
    ratio = float(np.median(after[known] / before[known]))
    grown = {"measure": "benign change of gaps", "golden": then_level, "now": then_level * ratio}
    return [grown] if ratio > GAPS_GREW else []


def _grown_levels(old: Golden, new: Golden) -> list[dict[str, Any]]:
    """The prompt whose own noise level grew most, if by much: the level is what its text as a whole is held against."""
    then, now = old.generation.index(), new.generation.index()
    levels = [(name, old.noise.level(then[name]), new.noise.level(now[name])) for name in now if name in then]
    known = [(after / before, name, before, after) for name, before, after in levels if before > 0 and after > 0]
    most = max(known, default=(0.0, "", 0.0, 0.0))
    if most[0] <= LEVEL_GREW:
        return []
    return [{"measure": f"level of prompt {most[1]}", "golden": most[2], "now": most[3]}]


def _uncalibrated(golden: Golden) -> Golden:
    return replace(golden, calibrations=())


def _calibrated_wider(old: Golden | None, new: Golden) -> list[dict[str, Any]]:
    """Measures of a calibration's envelope that are larger than the recording's, or than those of the one it replaces."""
    found = []
    for state, machine, known in calibration.change_of(old or _uncalibrated(new), new):
        if state == "dropped":
            continue
        here = replace(new, noise=machine.envelope)
        found += [(grown, machine, "than in the recording") for grown in _envelope(new, here)]
        if known is not None:
            then = replace(new, noise=known.envelope)
            found += [(grown, machine, "than it was calibrated before") for grown in _envelope(then, here)]
    return [
        {
            **grown,
            "measure": f"on {m.fingerprint.get('host') or '?'}, calibrated {m.when}, wider {than}: {grown['measure']}",
        }
        for grown, m, than in found
    ]


def _machine(state: str, found: Calibration, known: Calibration | None, new: Golden) -> dict[str, Any]:
    """A calibration that comes or goes, beside the recording and the one it replaces."""
    line = f"calibration {state}  {calibration.named(found)}"
    if state == "dropped":
        return {"state": state, "line": f"{line}: what it was measured against changed; calibrate again there"}
    beside = calibration.moved(new.noise, found.envelope)
    before = calibration.moved(known.envelope, found.envelope) if known else None
    differs = calibration.differs(new, found)
    lines = [line, f"  {calibration.spoken(beside)}", f"  where {calibration.told(differs)}" if differs else ""]
    lines += [f"  {calibration.spoken(before, 'the one it replaces:')}"] if before else []
    return {
        "state": state,
        "line": "\n".join(filter(None, lines)),
        "fingerprint": dict(found.fingerprint),
        "differs": [vars(change) for change in differs],
        "beside_recording": beside,
        "beside_replaced": before,
    }


def _compared(old: Golden | None, new: Golden, trouble: str, found: Mapping[str, Any]) -> list[str]:
    lines = [f"THRESHOLDS LOOSENED, and accepting puts them in force: {', '.join(found['thresholds_loosened'])}"]
    lines = lines if found["thresholds_loosened"] else []
    if old is None:
        return [f"it replaces nothing: {trouble}", *lines]
    counts = " · ".join(f"{n} {verdict}" for verdict, n in found["counts"].items())
    beyond = f"   beyond the thresholds: {'; '.join(found['beyond_thresholds'])}" if found["beyond_thresholds"] else ""
    lines.append(f"verdict   {counts}{beyond}")
    if a := found["accuracy"]:
        lines.append(
            f"accuracy {a['golden']:.1f} % -> {a['now']:.1f} %   {a['lost']} lost, {a['gained']} gained, p = {a['p_value']:.2g}"
        )
    for grown in found["envelope_grew"]:
        lines.append(
            f"the noise envelope grew: {grown['measure']} {grown['golden']:.2g} -> {grown['now']:.2g}. "
            "A wider envelope explains more: is that meant?"
        )
    for change in found["calibrations"]:
        lines += change["line"].split("\n")
    if (new.candidate or {}).get("against") != old.digest:
        lines.append("it was recorded against another golden than the one that lies here now")
    return lines


def _prompt(name: str, old: Golden | None, new: Golden, note: dict[str, Any]) -> dict[str, Any]:
    numbers = ""
    if note.get("divergence_index") is not None:
        deficit = "unknown" if note["deficit"] is None else f"{note['deficit']:.3g}"
        deficit += " (as its run says)" if note["claimed"] else ""
        gap = "" if note["golden_gap"] is None else f", golden's gap {note['golden_gap']:.3g}"
        numbers = f"  diverges at token {note['divergence_index']}: deficit {deficit}{gap}"
    then, now = _text(old, name), _text(new, name)
    if old is None:
        numbers = f"  {ending(new, name)}"
    return {
        **note,
        "line": f"{note['verdict']:<10} {name}{numbers}",
        "golden": then,
        "now": now,
        "words": word_diff(then, now) if then is not None and now is not None else [],
    }


def ending(golden: Golden, name: str) -> str:
    """How long an answer is, how it ends, and whether it is right."""
    i = golden.generation.index()[name]
    span = golden.generation.span(i)
    score = {True: ", right", False: ", wrong", None: ""}[golden.scores[i]]
    return f"{span.stop - span.start} tokens, {golden.generation.finish_reasons[i]}{score}"


def _text(golden: Golden | None, name: str) -> str | None:
    place = golden.generation.index().get(name) if golden else None
    return None if golden is None or place is None else golden.generation.texts[place]


def describe(golden: Golden) -> list[str]:
    """Where a golden comes from, and who accepted it."""

    def known(name: str) -> str:
        return inert(str(golden.fingerprint.get(name) or "?"))

    accuracy = "" if golden.accuracy is None else f", accuracy {golden.accuracy:.1f} %"
    lines = [
        f"{golden.suite} [{golden.stem}]  {len(golden.generation)} prompts, {len(golden.generation.tokens)} tokens{accuracy}",
        f"recorded  {known('time')} on {known('device')} ({known('cpu_model')}), {known('engine')} {known('engine_version')}, "
        f"torch {known('torch')}, batch size {golden.batch_size}",
        f"noise     mean |Δlogp| {golden.noise.mean_abs_dlogp:.2g}, largest change of a gap {golden.noise.max_deficit:.2g} "
        f"({'; '.join(v.name for v in golden.noise.variants) or 'not measured'})",
    ]
    for machine in golden.calibrations:
        lines.append(f"calibrated {inert(calibration.named(machine))}")
        lines.append(f"          {calibration.spoken(calibration.moved(golden.noise, machine.envelope))}")
    if golden.review:
        r = golden.review
        lines.append(f"accepted  by {r.by}, {r.when}: {r.reason}")
        if r.thresholds and r.thresholds.when != r.when:
            t = r.thresholds
            lines.append(f"thresholds by {t.by}, {t.when}: {t.reason}")
    else:
        lines.append("accepted  by nobody yet")
    return lines


def whole(golden: Golden, path: Path, only: str = "") -> dict[str, Any]:
    """A golden as data for scripts; `only` names one prompt."""
    g = golden.generation
    rows = [i for i, name in enumerate(g.ids) if only in ("", name)]
    return {
        "path": str(path),
        "golden": golden.stem,
        **{name: getattr(golden, name) for name in ("suite", "model", "numerics", "digest", "accuracy")},
        "generation": {"max_new_tokens": golden.max_new_tokens, "batch_size": golden.batch_size},
        "fingerprint": dict(golden.fingerprint),
        "noise": golden.noise.to_json(),
        "calibrations": [
            {"fingerprint": dict(c.fingerprint), "noise": c.envelope.to_json()} for c in golden.calibrations
        ],
        "review": golden.review.to_json() if golden.review else None,
        "prompts": [
            {
                "id": g.ids[i],
                "text": g.texts[i],
                "tokens": g.tokens[g.span(i)].tolist(),
                "finish_reason": g.finish_reasons[i],
                "score": golden.scores[i],
            }
            for i in rows
        ],
    }


def environment() -> Fingerprint:
    """This machine, with torch's side of it if torch is installed."""
    facts: dict[str, Value] = dict(probe.machine())
    try:
        import torch
    except ImportError:
        return facts
    return {**facts, **probe.torch_facts(torch.device("cuda" if torch.cuda.is_available() else "cpu"))}


def classified(facts: Fingerprint) -> list[tuple[str, str, Value]]:
    """Fields with their class, judged ones first."""
    order = ("identity", "numerics", "information")
    rows = [(name, str(fingerprint.class_of(name)), value) for name, value in facts.items()]
    return sorted(rows, key=lambda row: (order.index(row[1]), row[0]))
