"""Where goldens lie: beside their suite, as `<class>.golden.jsonl` and `<class>.golden.safetensors`.

A candidate lies beside them as `<class>.pending.*`, a part of one as `<class>.1of4.pending.*` until `pytest-repro merge`
has merged the parts. Every file appears whole or not at all (written aside, flushed,
renamed). The binary part is put in place before the text part, and a pending golden is removed only after the accepted
one stands, so that an interrupted `accept` is mended by repeating it.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from shlex import quote
from typing import Any

from . import calibration, candidate, merging
from . import golden as wire
from .errors import ConfigError, GoldenError, GoldenMissing
from .golden import Agreed, Golden, Review
from .suite import Shard

GOLDEN, PENDING = ".golden", ".pending"
STEM = re.compile(r"[a-z0-9_][a-z0-9_-]*(@[a-z0-9_-]+)?")
"""A golden's name: a compute class, and a device class if it is for one only."""
_PART = re.compile(r"(.+)\.([1-9][0-9]*)of([1-9][0-9]*)")


def typed(path: Path) -> str:
    """A path as the user would type it: relative, if it lies below the working directory."""
    try:
        return path.resolve().relative_to(Path.cwd()).as_posix()
    except ValueError:
        return str(path)


def atomic_write(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@dataclass(frozen=True)
class Place:
    """The two files of one golden or pending golden."""

    folder: Path
    stem: str
    """`bf16`, or `bf16@cuda-sm90`."""
    kind: str = GOLDEN
    """`GOLDEN` or `PENDING`."""
    shard: Shard | None = None
    """Of a part of a pending golden."""

    @classmethod
    def named(cls, text: Path, kind: str) -> Place:
        """The place whose text part is this file."""
        stem = text.name.removesuffix(f"{kind}.jsonl")
        part = _PART.fullmatch(stem) if kind == PENDING else None
        if part is None:
            return cls(text.parent, stem, kind)
        return cls(text.parent, part[1], kind, Shard(int(part[2]), int(part[3])))

    @property
    def name(self) -> str:
        """File name without its ending."""
        part = f".{self.shard.index}of{self.shard.count}" if self.shard else ""
        return f"{self.stem}{part}{self.kind}"

    @property
    def text(self) -> Path:
        """The JSON Lines file."""
        return self.folder / f"{self.name}.jsonl"

    @property
    def numbers(self) -> Path:
        """The safetensors file."""
        return self.folder / f"{self.name}.safetensors"

    @property
    def other(self) -> Place:
        """The pending place of a golden, the golden's place of a pending one."""
        return Place(self.folder, self.stem, PENDING if self.kind == GOLDEN else GOLDEN)

    def read(self) -> Golden:
        """Read and verify.

        Raises:
            GoldenMissing: no such golden.
            GoldenError: it cannot be trusted or read.
        """
        again = f"pytest --repro-update {typed(self.folder)}"
        try:
            text = self.text.read_bytes()
        except FileNotFoundError:
            raise GoldenMissing("there is no golden", where=typed(self.text), fix=again) from None
        numbers = self.numbers.read_bytes() if self.numbers.exists() else None
        golden = wire.decode(text, numbers, typed(self.text), regenerate=again)
        named, held = _spoken(self.stem, self.shard), _spoken(golden.stem, golden.part.shard if golden.part else None)
        if named != held:
            raise GoldenError(
                f"the file's name says {named}, its content {held}",
                where=self.text,
                fix=f"git mv it back, or {again}",
            )
        return golden

    def trusted(self) -> Golden | None:
        """What lies here, if it can be read and trusted."""
        try:
            return self.read()
        except GoldenError:
            return None

    def write(self, golden: Golden) -> None:
        """Write both parts, the text last: it names the other's digest."""
        text, numbers = wire.encode(golden)
        atomic_write(self.numbers, numbers)
        atomic_write(self.text, text)

    def remove(self) -> None:
        """Remove both parts, the text first."""
        self.text.unlink(missing_ok=True)
        self.numbers.unlink(missing_ok=True)


def below(root: Path, kind: str = GOLDEN) -> list[Place]:
    """Every golden (or pending one) under a folder, or the one whose text part it names."""
    if root.is_file() and root.name.endswith(f"{kind}.jsonl"):
        return [Place.named(root, kind)]
    return [
        place for folder in sorted({p.parent for p in root.rglob(f"*{kind}.jsonl")}) for place in places(folder, kind)
    ]


def places(folder: Path, kind: str = GOLDEN) -> list[Place]:
    """Every golden (or pending one) that lies in one folder, by name."""
    return [Place.named(file, kind) for file in sorted(folder.glob(f"*{kind}.jsonl"))]


def _spoken(stem: str, shard: Shard | None) -> str:
    return stem if shard is None else f"{stem}, part {shard.spoken}"


def candidates_for(compute_class: str, device_class: str) -> list[str]:
    """Names of the goldens that fit a run, the most specific first.

    A run of FP32-class compute falls back on a 16-bit golden: the golden's own rounding then explains differences, and
    the waiver of FP32 applies. Nothing else falls back.
    """
    classes = [compute_class, *(("bf16", "fp16") if compute_class == "fp32" else ())]
    return [name for c in classes for name in (f"{c}@{device_class}", c)]


def find(folder: Path, compute_class: str, device_class: str, again: str = "") -> Place:
    """The most specific golden that fits.

    Args:
        folder: the suite's.
        compute_class: of the run.
        device_class: of the run; "" for any.
        again: what pytest is given to record it; the folder unless told otherwise.

    Raises:
        GoldenMissing: none fits; the message names those that are there.
    """
    for name in candidates_for(compute_class, device_class):
        if Place(folder, name).text.exists():
            return Place(folder, name)
    there = ", ".join(p.stem for p in places(folder)) or "none"
    asked = again or f"{quote(typed(folder))} --repro-numerics {compute_class}"
    record = f"pytest --repro-update {asked}   # then pytest-repro review"
    waiting = [p for p in places(folder, PENDING) if p.stem in candidates_for(compute_class, device_class)]
    raise GoldenMissing(
        f"there is no golden for {compute_class} on {device_class or 'any device'} (goldens here: {there})",
        where=typed(folder),
        fix=_what_waits(waiting, folder) if waiting else record,
    )


def _what_waits(waiting: Sequence[Place], folder: Path) -> str:
    if any(place.shard is None for place in waiting):
        return f"pytest-repro review {quote(typed(folder))}   # a candidate waits"
    return f"pytest-repro merge {quote(typed(folder))}   # parts of a candidate wait"


def pending(root: Path) -> list[Place]:
    """Every pending golden under a folder.

    Raises:
        ConfigError: no such folder.
    """
    if not root.exists():
        raise ConfigError("there is no such folder", where=root, fix="name a suite's folder, e.g. golden/my-suite")
    return [place for folder in sorted(_folders(root)) for place in places(folder, PENDING)]


def _folders(root: Path) -> Iterator[Path]:
    yield from {p.parent for p in root.rglob(f"*{PENDING}.jsonl")}


def merge(root: Path) -> list[tuple[Place, int]]:
    """Merge the parts of every pending golden under a folder; each merged candidate with the number of its parts.

    Nothing is written before all of them are known to fit. Parts are removed after the merged candidate lies complete
    on disk, so that an interrupted merge is mended by repeating it.

    Raises:
        ConfigError: no part is pending here.
        GoldenError: a part cannot be trusted or read, is missing, or does not fit the others.
    """
    sets: dict[Place, list[Place]] = {}
    for place in pending(root):
        if place.shard is not None:
            sets.setdefault(Place(place.folder, place.stem, PENDING), []).append(place)
    if not sets:
        raise ConfigError(
            "no part of a golden is pending here", where=root, fix=f"pytest --repro-update {root} --repro-shard 1/2"
        )
    ready = [(target, places, _merged(target, places)) for target, places in sets.items()]
    for target, places, golden in ready:
        if golden is not None:
            target.write(golden)
        for place in places:
            place.remove()
    return [(target, len(places)) for target, places, _ in ready]


def _merged(target: Place, places: Sequence[Place]) -> Golden | None:
    """The parts as one candidate; None if it lies there already, from a merge that was interrupted."""
    parts = [place.read() for place in places]
    done = target.trusted()
    if done is not None and {part.digest for part in parts} <= set((done.candidate or {}).get("parts", [])):
        return None
    whole = merging.golden_of(parts, where=typed(target.folder))
    return candidate.of_parts(whole, parts, target.other.trusted())


def a_part(place: Place) -> ConfigError:
    """What is said of a part where a whole candidate is needed."""
    assert place.shard is not None
    return ConfigError(
        f"this is a part, {place.shard.spoken}: pytest-repro merge first",
        where=typed(place.text),
        fix=f"pytest-repro merge {typed(place.folder)}",
    )


@dataclass(frozen=True)
class Reviewer:
    """Who accepts, why, and with what in view."""

    by: str
    reason: str
    """In words; must not be empty."""
    commit: str | None = None
    """The commit that is checked out."""
    limits: Mapping[str, Any] | None = None
    """The thresholds in force for the golden's class; None where they are not known."""

    def agreed(self, when: str) -> Agreed | None:
        """The thresholds under this reviewer's name."""
        return None if self.limits is None else Agreed(self.limits, self.by, when, self.reason)


@dataclass(frozen=True)
class Committed:
    """The golden that git has at HEAD in a place, if any: what a review's `previous` must name."""

    digest: str | None
    """None where HEAD has none, or none that can be read."""
    previous: str | None = None
    """What its own review replaced."""


def accept(place: Place, who: Reviewer, head: Committed | None = None) -> Golden:
    """Make a pending golden the golden, under a review.

    Args:
        place: of the pending golden.
        who: accepts it.
        head: what git has in its place, since a golden that was accepted and never committed is no part of history;
            None outside of git.

    Raises:
        ConfigError: no reason, or only a part.
        GoldenError: the pending golden cannot be trusted or read.
    """
    if not who.reason.strip():
        raise ConfigError("accepting a golden needs a reason", fix='pytest-repro accept --all --reason "..."')
    if place.shard is not None:
        raise a_part(place)
    pending_golden = calibration.united(place.read(), place.other.trusted(), typed(place.text))
    previous, remark = _replaced(place, pending_golden.digest)
    if head is not None:
        previous = head.previous if head.digest == pending_golden.digest else head.digest
    when = datetime.now(UTC).isoformat(timespec="seconds")
    reason = f"{who.reason}{remark}"
    review = Review(
        by=who.by, when=when, reason=reason, previous=previous, commit=who.commit, thresholds=who.agreed(when)
    )
    result = wire.accepted(pending_golden, review)
    place.other.write(result)
    place.remove()
    return result


def _replaced(place: Place, accepted: str) -> tuple[str | None, str]:
    """Digest of the golden that stands where a pending one goes, and what a review must say of it."""
    try:
        standing = place.other.read()
    except GoldenMissing:
        return None, ""
    except GoldenError as exc:
        return None, f" (it replaces a golden that could not be read: {exc.what})"
    if standing.digest == accepted and standing.review:  # an accept that was interrupted is being repeated
        return standing.review.previous, ""
    return standing.digest, ""


def agree(place: Place, who: Reviewer) -> Golden:
    """Put the present thresholds under the review of an accepted golden; what it accepted stays as it was.

    Raises:
        ConfigError: no reason, or no thresholds are known.
        GoldenError: the golden cannot be trusted or read, or nobody accepted it.
    """
    if not who.reason.strip():
        raise ConfigError("thresholds need a reason", fix='pytest-repro accept PATH --thresholds --reason "..."')
    standing = place.read()
    if standing.review is None:
        raise GoldenError(
            "nobody accepted this golden: its thresholds cannot be sealed",
            where=typed(place.text),
            fix=f"pytest --repro-update {quote(typed(place.folder))} && pytest-repro review {quote(typed(place.folder))}",
        )
    agreed = who.agreed(datetime.now(UTC).isoformat(timespec="seconds"))
    if agreed is None:
        raise ConfigError("no thresholds are known for this golden", where=typed(place.folder))
    result = wire.accepted(standing, replace(standing.review, thresholds=agreed))
    place.write(result)
    return result
