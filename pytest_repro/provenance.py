"""Whether a golden's history holds: every step reviewed, and no threshold loosened without a reason. Pure.

`history` brings the steps, `verification` asks; here is decided what they show.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from shlex import quote

from .errors import GoldenError
from .generation import digest
from .golden import Agreed, Review, Sealed, sealed
from .suite import Thresholds
from .verdict import loosened

REMOVED = "commit that with a line 'Golden-Removed: why'"
"""How a commit says that a golden went on purpose."""
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\n"


@dataclass(frozen=True)
class Finding:
    """One thing that does not hold."""

    kind: str
    """`broken`, `unreviewed`, `uncommitted`, `chain`, `deleted`, `unused`, `nested`, `pending`, `thresholds`."""
    where: str
    what: str
    fix: str


@dataclass(frozen=True)
class Version:
    """The two files of a golden in one commit."""

    text: bytes | None
    numbers: bytes | None


@dataclass(frozen=True)
class Step:
    """A commit that changed a golden."""

    commit: str
    """Abbreviated."""
    path: str
    """Of the text part."""
    before: tuple[Version | None, ...]
    """In each parent; None where it has none."""
    after: Version | None
    """None if the commit deleted it."""
    reason: str = ""
    """Of a deletion: the commit message's trailer `Golden-Removed`."""
    suite: bool = False
    """Whether a suite.toml lies beside it after the commit."""


def of_branch(
    steps: Sequence[Step], base: Mapping[str, Version], head: Mapping[str, Version], name: str, commit: str
) -> Iterator[Finding]:
    """What does not hold between the base of a branch and HEAD: in a step, or where no step leads to what HEAD has.

    Args:
        steps: oldest first.
        base: path -> golden, where the branch left its base.
        head: the same of HEAD.
        name: of the base, as it was named.
        commit: of the base.
    """
    for path in dict.fromkeys([*(step.path for step in steps), *base, *head]):
        then, now = base.get(path), head.get(path)
        reached: set[Version | None] = {then}
        told: list[Finding] = []
        for step in (s for s in steps if s.path == path):
            if step.after in reached:
                told = []  # it puts back what was there before
            elif found := list(_of_step(step, steps)):
                told += found
            elif reached & set(_before(step)):
                reached.add(step.after)
        if not told and now not in reached and not (now is None and _moved_in_a_merge(path, then, steps)):
            told = [_chosen_by_a_merge(path, then, now, name, commit)]
        yield from told


def with_origins(paths: Set[str], steps: Sequence[Step]) -> set[str]:
    """Paths, and those that their goldens moved from; steps are oldest first."""
    found = set(paths)
    for step in reversed(steps):
        if step.path in found and step.after is not None:
            found |= {s.path for s in steps if _is_moved(step, s)}
    return found


def _moved_in_a_merge(path: str, then: Version | None, steps: Sequence[Step]) -> bool:
    """Whether the branch moved a suite, and a merge brought the base's newer golden to where it moved."""
    left = any(step.path == path and step.after is None and not step.suite for step in steps)
    return left and any(step.path != path and step.after == then for step in steps)


def _before(step: Step) -> tuple[Version | None, ...]:
    return step.before or (None,)  # the first commit of a repository has no parent


def _chosen_by_a_merge(path: str, then: Version | None, now: Version | None, name: str, commit: str) -> Finding:
    back = f"git checkout {commit} -- {files_of(path)}" if then else f"git rm -q --cached -- {files_of(path)}"
    if now is None:
        what = f"{name} has this golden, and no commit says why it is gone: a merge dropped it"
        return Finding("deleted", path, what, f"{back}; git commit; if it is meant, git rm it then, and {REMOVED}")
    what = (
        f"{name} has {'another' if then else 'no'} golden here, and a merge chose this one without a review beside it"
    )
    return Finding("chain", path, what, f"{back}; git commit; if this one is meant, then {_anew(path)}")


def _anew(path: str) -> str:
    return f"pytest --repro-update {_folder(path)}, pytest-repro review {_folder(path)}"


def _of_step(step: Step, steps: Sequence[Step]) -> Iterator[Finding]:
    moved = next((s for s in steps if _is_moved(step, s)), None)
    if step.after is not None:
        yield from _of_change(step, moved.before if moved else step.before)
    elif moved is None and not step.reason:
        yield Finding(
            "deleted",
            step.path,
            f"commit {step.commit} deletes this golden",
            f"{_undo(step)}; if it is meant, git rm it then, and {REMOVED}",
        )


def _undo(step: Step) -> str:
    """What puts back the golden that a commit replaced, or nothing where there was none."""
    there = f"checkout {step.commit}^" if any(step.before[:1]) else "rm -q --cached"
    return f"git {there} -- {files_of(step.path)}; git commit"


def _is_moved(step: Step, other: Step) -> bool:
    """Whether a commit moved a golden: one path lost the very bytes that another gained, and its suite went with it."""
    if step.commit != other.commit or (step.after is None) == (other.after is None):
        return False
    gained, lost = (step, other) if step.after is not None else (other, step)
    return gained.after in lost.before and not any(gained.before) and not lost.suite


def _of_change(step: Step, before: tuple[Version | None, ...]) -> Iterator[Finding]:
    assert step.after is not None
    again = f"{_undo(step)}; then record and accept it anew: {_anew(step.path)}"
    try:
        now = verified(step.after, step.path)
    except GoldenError as exc:
        yield Finding("broken", step.path, f"commit {step.commit} leaves it broken: {exc.what}", again)
        return
    if now.review is None:
        what = f"commit {step.commit} changes this golden, and nobody accepted it"
        yield Finding("unreviewed", step.path, what, again)
        return
    allowed = [_previous(now, then, step.path) for then in before or (None,)]
    if now.review.previous not in allowed:
        yield _broken_chain(step, now.review, allowed)


def verified(version: Version, path: str) -> Sealed:
    """Text part held against its digest and seal, and the binary part against the text; git-lfs's pointer will do.

    Raises:
        GoldenError: one of them does not hold.
    """
    if version.text is None:
        raise GoldenError("the text part is missing", where=path)
    found = sealed(version.text, path)
    if version.numbers is None:
        raise GoldenError("the binary part is missing", where=path)
    if _digest_of(version.numbers) != found.numbers:
        raise GoldenError("the binary part is not the one this golden was recorded with", where=path)
    return found


def _digest_of(numbers: bytes) -> str:
    if not numbers.startswith(LFS_POINTER):
        return digest(numbers)
    lines = dict(line.split(" ", 1) for line in numbers.decode("utf-8", "replace").splitlines() if " " in line)
    return lines.get("oid", "")


def _previous(now: Sealed, then: Version | None, path: str) -> str | None:
    """What the review must call the golden that it replaced."""
    if then is None:
        return None
    try:
        old = verified(then, path)
    except GoldenError:
        return None  # accepted over a golden that could not be read, which its review says
    return old.review.previous if old.digest == now.digest and old.review else old.digest


def _broken_chain(step: Step, review: Review, allowed: Sequence[str | None]) -> Finding:
    there = " or ".join(_short(name) for name in allowed)
    stem, pending = _stem(step.path), quote(step.path.removesuffix(".golden.jsonl") + ".pending")
    return Finding(
        "chain",
        step.path,
        f"commit {step.commit}: its review replaced {_short(review.previous)}, and {there} lay there",
        f"look at it beside what it replaces: for e in jsonl safetensors; do mv {stem}.$e {pending}.$e; done; "
        f"{_undo(step)}; pytest-repro review {_folder(step.path)}",
    )


def _short(name: str | None) -> str:
    return "no golden" if name is None else name[:19] + "…"


def _stem(path: str) -> str:
    """As a shell may be given it: a folder's name comes with a pull request."""
    return quote(path.removesuffix(".jsonl"))


def files_of(path: str) -> str:
    """Both parts of a golden as git's own pattern: a shell would expand it by what happens to lie there."""
    return quote(path.removesuffix(".jsonl") + ".*")


def _folder(path: str) -> str:
    return quote(path.rpartition("/")[0] or ".")


def loosened_since(agreed: Agreed | None, base: Thresholds | None, now: Thresholds, prompts: int) -> list[str]:
    """What the thresholds in force let pass that those somebody gave a reason for do not.

    Args:
        agreed: what the golden's review holds.
        base: at the merge base; asked where the review holds none. None: there were none.
        now: in force.
        prompts: how many the golden has.
    """
    then = agreed.to_thresholds() if agreed else base
    return [] if then is None else loosened(then, now, prompts)


def limits(thresholds: Thresholds) -> Mapping[str, object]:
    """Thresholds as a review holds them: as JSON reads them back."""
    return {**vars(thresholds), "length_ratio": list(thresholds.length_ratio)}
