"""What a reviewer needs to know about a pending golden, as plain data: for the terminal and for scripts alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import candidate, fingerprint, probe
from .errors import GoldenError
from .fingerprint import Fingerprint, Value
from .golden import Golden
from .store import Place, a_part
from .text import inert


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
    return {**base, "prompts": len(golden.generation), "changed": changed, "against": old.digest if old else None}


def notes_on(new: Golden, old: Golden | None) -> dict[str, dict[str, Any]]:
    """What changed, by the two goldens themselves.

    The notes in a candidate are outside its digest. They know deficits that the files do not hold, and are believed
    where they agree with the files about what differs and where.
    """
    seen = {note["id"]: note for note in (candidate.with_notes(new, old).candidate or {})["prompts"]}
    for note in (new.candidate or {}).get("prompts", []):
        mine = seen.get(str(note.get("id")), {})
        same = all(mine.get(key) == note.get(key) for key in ("divergence_index", "golden_gap"))
        if mine.get("divergence_index") is not None and same and set(mine) == set(note):
            seen[note["id"]] = note
    return seen


def changes(place: Place) -> dict[str, Any]:
    """One pending golden beside the one it would replace.

    Raises:
        GoldenError: the pending golden cannot be trusted or read.
    """
    if place.shard is not None:
        return {"path": str(place.text), "head": [a_part(place).what], "environment": [], "prompts": []}
    new = place.read()
    try:
        old: Golden | None = place.other.read()
        trouble = ""
    except GoldenError as exc:
        old, trouble = None, exc.what
    notes = notes_on(new, old)
    return {
        "path": str(place.text),
        "head": [*_compared(old, new, trouble), *describe(new)],
        "environment": []
        if old is None
        else [vars(c) for c in fingerprint.diff(old.fingerprint, new.fingerprint) if c.field != "time"],
        "prompts": [_prompt(name, old, new, note) for name, note in notes.items() if note["verdict"] != "identical"],
    }


def _compared(old: Golden | None, new: Golden, trouble: str) -> list[str]:
    if old is None:
        return [f"it replaces nothing: {trouble}"]
    lines = []
    if old.accuracy is not None and new.accuracy is not None:
        lines.append(f"accuracy {old.accuracy:.1f} % -> {new.accuracy:.1f} %")
    for name in ("mean_abs_dlogp", "max_deficit"):
        then, now = getattr(old.noise, name), getattr(new.noise, name)
        if now > 1.5 * then:
            lines.append(
                f"the noise envelope grew: {name} {then:.2g} -> {now:.2g}. A wider envelope explains more: is that meant?"
            )
    if (new.candidate or {}).get("against") != old.digest:
        lines.append("it was recorded against another golden than the one that lies here now")
    return lines


def _prompt(name: str, old: Golden | None, new: Golden, note: dict[str, Any]) -> dict[str, Any]:
    numbers = ""
    if note.get("divergence_index") is not None:
        deficit = "unknown" if note["deficit"] is None else f"{note['deficit']:.3g}"
        gap = "" if note["golden_gap"] is None else f", golden's gap {note['golden_gap']:.3g}"
        numbers = f"  diverges at token {note['divergence_index']}: deficit {deficit}{gap}"
    return {
        **note,
        "line": f"{note['verdict']:<10} {name}{numbers}",
        "golden": _text(old, name),
        "now": _text(new, name),
    }


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
        f"({', '.join(v.name for v in golden.noise.variants) or 'not measured'})",
    ]
    if golden.review:
        r = golden.review
        lines.append(f"accepted  by {r.by}, {r.when}: {r.reason}")
    else:
        lines.append("accepted  by nobody yet")
    return lines


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
