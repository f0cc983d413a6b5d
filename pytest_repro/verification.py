"""`pytest-repro verify`: whether the goldens of a checkout can be relied on, from the files, from git, from thresholds."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path, PurePosixPath
from shlex import quote

from . import numerics, store
from .errors import ConfigError, GoldenError
from .golden import Golden
from .history import Base, History
from .provenance import (
    REMOVED,
    Finding,
    Step,
    Version,
    files_of,
    limits,
    loosened_since,
    of_branch,
    verified,
    with_origins,
)
from .store import PENDING, Committed, Place, Reviewer, typed
from .suite import (
    SUITE_FILE,
    Thresholds,
    defaults_around,
    modes_in,
    table_of,
    thresholds_in,
    thresholds_in_force,
)


@dataclass(frozen=True)
class Verification:
    """What was looked at, and what does not hold."""

    base: Base
    goldens: int
    steps: int
    findings: tuple[Finding, ...]


def verify(path: Path, base: str | None, environment: Mapping[str, str]) -> Verification:
    """Hold every golden below a path against its digest, its review, git, and the thresholds that were accepted.

    Args:
        path: a suite's folder, or a folder of suites.
        base: revision that the branch left; None: as CI or the default branch says.
        environment: where CI names the branch that a pull request goes to.

    Raises:
        ConfigError: no git repository, no such revision, a clone too shallow, or no golden there at all.
    """
    folder = path.parent if path.is_file() else path
    history = History.around(folder)
    under, since = history.within(folder), history.base(base, environment)
    places = store.below(folder)
    steps, told = _of_history(history, since, under)
    if not places and not steps and not told:
        raise ConfigError(
            "there is no golden here, and none was deleted", where=path, fix=f"pytest --repro-update {path}"
        )
    known = {(finding.kind, finding.where) for finding in told}  # with the commit that did it
    findings = [
        *(finding for finding in _of_files(places, history, under) if (finding.kind, finding.where) not in known),
        *told,
        *_of_pending(history, under),
        *(
            finding
            for place in places
            for finding in (
                *_of_nested(place, history),
                *_of_use(place, history, since),
                *_of_thresholds(place, history, since),
            )
        ),
    ]
    return Verification(since, len(places), len(steps), tuple(dict.fromkeys(findings)))


def _of_history(history: History, base: Base, under: str) -> tuple[list[Step], list[Finding]]:
    """The steps below a folder, or where its goldens moved from, and what does not hold in them."""

    def shown(versions: Mapping[str, Version]) -> dict[str, Version]:
        return {typed(history.root / path): version for path, version in versions.items()}

    found = list(history.steps(base.commit))
    paths = {step.path for step in found} | history.differing(base.commit)
    then, now = shown(history.versions(base.commit, paths)), shown(history.versions("HEAD", paths))
    steps = [replace(step, path=typed(history.root / step.path)) for step in found]
    told = of_branch(steps, then, now, base.name, base.commit[:12])
    below = {typed(history.root / path) for path in paths if under == "." or path.startswith(f"{under}/")}
    mine = with_origins(below, steps)
    return [step for step in steps if step.path in mine], [finding for finding in told if finding.where in mine]


def _of_files(places: list[Place], history: History, under: str) -> Iterator[Finding]:
    """What lies here: readable, reviewed, and as HEAD has it."""
    loose = history.uncommitted(under)
    for place in places:
        shown = typed(place.text)
        try:
            golden = place.read()
        except GoldenError as exc:
            yield Finding("broken", shown, exc.what, _restore(place, history, loose, exc.fix))
            continue  # to commit it as it lies here is not what mends it
        else:
            if golden.review is None:
                yield Finding("unreviewed", shown, "nobody accepted this golden", _anew(place))
        if {history.within(file) for file in (place.text, place.numbers)} & loose:
            yield Finding(
                "uncommitted",
                shown,
                "git does not have it as it lies here",
                f"git add {files_of(shown)} && git commit",
            )


def _restore(place: Place, history: History, loose: Set[str], fix: str) -> str:
    """What puts a broken golden right: HEAD's own where it was broken here, or else the last commit's that was sound."""
    if {history.within(file) for file in (place.text, place.numbers)} & loose:
        return fix
    sound = history.last(history.within(place.text), lambda version: _is_sound(version, typed(place.text)))
    return f"git checkout {sound} -- {files_of(typed(place.text))} && git commit" if sound else _anew(place)


def _is_sound(version: Version, path: str) -> bool:
    try:
        return verified(version, path).review is not None
    except GoldenError:
        return False


def _anew(place: Place) -> str:
    folder = quote(typed(place.folder))
    return f"pytest --repro-update {folder} && pytest-repro review {folder}"


def _of_pending(history: History, under: str) -> Iterator[Finding]:
    for path in history.files("HEAD", under):
        if path.endswith((f"{PENDING}.jsonl", f"{PENDING}.safetensors")):
            shown = typed(history.root / path)
            yield Finding(
                "pending",
                shown,
                "a pending golden was committed",
                f"git rm --cached {quote(shown)} && git commit   # then review it",
            )


def _of_nested(place: Place, history: History) -> Iterator[Finding]:
    folder = place.folder.resolve()
    above = takewhile(lambda f: f != history.root, (folder, *folder.parents))
    if inner := next((f for f in above if (f / ".git").exists()), None):
        shown = typed(inner)
        yield Finding(
            "nested",
            typed(place.text),
            f"this lies in a git repository of its own, {shown}, whose history was not looked at",
            f"cd {quote(shown)} && pytest-repro verify",
        )


def _of_use(place: Place, history: History, base: Base) -> Iterator[Finding]:
    """Whether a check still reads a golden that it read at the merge base."""
    there = _path_at(base, place, history)
    suite = str(PurePosixPath(there).parent / SUITE_FILE)
    text = history.text(base.commit, suite) if there else None
    if text is None or not _served_then(place, text, _defaults_at(history, base, there), suite):
        return
    shown, here = typed(place.text), place.folder / SUITE_FILE
    retired = f"or git rm {files_of(shown)}, and {REMOVED}"
    if not here.is_file() and there == history.within(place.text):
        back = f"git checkout {base.commit[:12]} -- {quote(typed(here))}; git commit"
        yield Finding("unused", shown, f"its suite's {SUITE_FILE} is gone since {base.name}", f"{back}; {retired}")
    elif here.is_file() and not _serves(place, _modes(place)):
        back = f"name its mode in [run] numerics of {typed(here)} again"
        what = f"no mode of its suite reads this golden any more, and one did in {base.name}"
        yield Finding("unused", shown, what, f"{back}; {retired}")


def _modes(place: Place) -> tuple[str, ...]:
    """The modes of a golden's suite; none where a test has asked for it."""
    file = place.folder / SUITE_FILE
    return modes_in(file.read_text("utf-8"), defaults_around(place.folder)[1], str(file)) if file.is_file() else ()


def _served_then(place: Place, text: str, defaults: Mapping[str, object], where: str) -> bool:
    try:
        return _serves(place, modes_in(text, defaults, where))
    except ConfigError:
        return False  # no check passed with it


def _serves(place: Place, modes: tuple[str, ...]) -> bool:
    """Whether a suite of these modes is checked against this golden."""
    claimed = [numerics.mode(mode).compute_class for mode in modes]
    return None in claimed or place.stem.partition("@")[0] in claimed or bool(_falls_back(place, modes))


def _of_thresholds(place: Place, history: History, base: Base) -> Iterator[Finding]:
    golden = place.trusted()
    if golden is None or golden.review is None:
        return
    shown, prompts = typed(place.text), len(golden.generation)
    now, before = thresholds_in_force(place.folder), _at_base(place, history, base)
    then = {
        cls: _of_class(before, cls) if before else None
        for cls in (golden.compute_class, *_falls_back(place, _modes(place)))
    }
    for cls, base_of_class in then.items():
        agreed = golden.review.thresholds if cls == golden.compute_class else None
        if looser := loosened_since(agreed, base_of_class, _of_class(now, cls), prompts):
            seal = f'pytest-repro accept {quote(shown)} --thresholds --reason "..."'
            record = f"pytest --repro-update {quote(typed(place.folder))} --repro-numerics {cls}: a golden of its own holds them"
            yield Finding(
                "thresholds",
                shown,
                f"thresholds of {cls} loosened since {'they were accepted' if agreed else base.name}, and no reason is "
                f"recorded: {', '.join(looser)}",
                f"tighten them again, or {seal if cls == golden.compute_class else record}",
            )


def _falls_back(place: Place, modes: tuple[str, ...]) -> list[str]:
    """Classes of these modes that are checked against this golden for want of their own."""
    mine = place.stem.partition("@")[0]
    claimed = {c for c in (numerics.mode(mode).compute_class for mode in modes) if c}
    own = {other.stem.partition("@")[0] for other in store.places(place.folder)}
    return sorted(c for c in claimed - own if mine != c and mine in store.candidates_for(c, ""))


def _at_base(place: Place, history: History, base: Base) -> Mapping[str, Thresholds] | None:
    """The thresholds of this golden's suite at the merge base, wherever its folder lay then; None if it was not there."""
    here = _path_at(base, place, history)
    if not here:
        return None
    suite = str(PurePosixPath(here).with_name(SUITE_FILE))
    try:
        return thresholds_in(history.text(base.commit, suite), _defaults_at(history, base, here), suite)
    except ConfigError:
        return None  # no check passed with it


def _path_at(base: Base, place: Place, history: History) -> str:
    """Where a golden lay at the merge base; "" if it was not there."""
    here, there = history.within(place.text), history.files(base.commit, ".")
    if here in there:
        return here
    mine = history.files("HEAD", here).get(here)
    return next((path for path, blob in there.items() if blob == mine), "")


def _defaults_at(history: History, base: Base, path: str) -> Mapping[str, object]:
    for folder in PurePosixPath(path).parents:
        text = history.text(base.commit, str(folder / "pyproject.toml"))
        table = table_of(text, "pyproject.toml") if text is not None else None
        if table is not None:
            return table
    return {}


def _of_class(thresholds: Mapping[str, Thresholds], cls: str) -> Thresholds:
    return thresholds.get(cls, thresholds[""])


# --- what a review needs of all this --------------------------------------------------------------------------------


def in_force(place: Place) -> Thresholds:
    """The thresholds of a golden's class.

    Raises:
        ConfigError: suite.toml or pyproject.toml cannot be read.
    """
    return _of_class(thresholds_in_force(place.folder), place.stem.partition("@")[0])


def reviewer(place: Place, by: str, reason: str, commit: str | None) -> Reviewer:
    """Who accepts a golden, with the thresholds in force for its class.

    Raises:
        ConfigError: suite.toml or pyproject.toml cannot be read.
    """
    return Reviewer(by, reason, commit, limits(in_force(place)))


def loosened(place: Place, golden: Golden, standing: Golden | None) -> list[str]:
    """What the thresholds in force let pass that those of the standing golden, or of the merge base, do not."""
    agreed = standing.review.thresholds if standing and standing.review else None
    before = None
    if agreed is None:
        with suppress(ConfigError):  # no git here, or nothing to compare with
            history = History.around(place.folder)
            before = _at_base(place.other, history, history.base(None, os.environ))
    base = _of_class(before, golden.compute_class) if before else None
    return loosened_since(agreed, base, in_force(place), len(golden.generation))


def head_of(place: Place) -> Committed | None:
    """What git has where a pending golden goes; None outside of git."""
    try:
        return History.around(place.folder).committed(place)
    except ConfigError:
        return None
