"""Where goldens lie: beside their suite, as `<class>.golden.jsonl` and `<class>.golden.safetensors`.

A candidate lies beside them as `<class>.pending.*`. Every file appears whole or not at all (written aside, flushed,
renamed). The binary part is put in place before the text part, and a pending golden is removed only after the accepted
one stands, so that an interrupted `accept` is mended by repeating it.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from . import golden as wire
from .errors import ConfigError, GoldenError, GoldenMissing
from .golden import Golden, Review

GOLDEN, PENDING = ".golden", ".pending"
STEM = re.compile(r"[a-z0-9_]+(@[a-z0-9_-]+)?")
"""A golden's name: a compute class, and a device class if it is for one only."""


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

    @property
    def text(self) -> Path:
        """The JSON Lines file."""
        return self.folder / f"{self.stem}{self.kind}.jsonl"

    @property
    def numbers(self) -> Path:
        """The safetensors file."""
        return self.folder / f"{self.stem}{self.kind}.safetensors"

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
        if golden.stem != self.stem:
            raise GoldenError(
                f"the file's name says {self.stem}, its content {golden.stem}",
                where=self.text,
                fix=f"git mv it back, or {again}",
            )
        return golden

    def write(self, golden: Golden) -> None:
        """Write both parts, the text last: it names the other's digest."""
        text, numbers = wire.encode(golden)
        atomic_write(self.numbers, numbers)
        atomic_write(self.text, text)

    def remove(self) -> None:
        """Remove both parts, the text first."""
        self.text.unlink(missing_ok=True)
        self.numbers.unlink(missing_ok=True)


def places(folder: Path, kind: str = GOLDEN) -> list[Place]:
    """Every golden (or pending one) that lies in one folder, by name."""
    suffix = f"{kind}.jsonl"
    return [Place(folder, p.name.removesuffix(suffix), kind) for p in sorted(folder.glob(f"*{suffix}"))]


def candidates_for(compute_class: str, device_class: str) -> list[str]:
    """Names of the goldens that fit a run, the most specific first.

    A run of FP32-class compute falls back on a 16-bit golden: the golden's own rounding then explains differences, and
    the waiver of FP32 applies. Nothing else falls back.
    """
    classes = [compute_class, *(("bf16", "fp16") if compute_class == "fp32" else ())]
    return [name for c in classes for name in (f"{c}@{device_class}", c)]


def find(folder: Path, compute_class: str, device_class: str) -> Place:
    """The most specific golden that fits.

    Raises:
        GoldenMissing: none fits; the message names those that are there.
    """
    for name in candidates_for(compute_class, device_class):
        if Place(folder, name).text.exists():
            return Place(folder, name)
    there = ", ".join(p.stem for p in places(folder)) or "none"
    record = f"pytest --repro-update {typed(folder)} --repro-numerics {compute_class}   then: pytest-repro review"
    waiting = [p for p in places(folder, PENDING) if p.stem in candidates_for(compute_class, device_class)]
    raise GoldenMissing(
        f"there is no golden for {compute_class} on {device_class or 'any device'} (goldens here: {there})",
        where=typed(folder),
        fix=f"a candidate waits: pytest-repro review {typed(folder)}" if waiting else record,
    )


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


def accept(place: Place, *, by: str, reason: str, commit: str | None) -> Golden:
    """Make a pending golden the golden, under a review.

    Args:
        place: of the pending golden.
        by: who accepts it.
        reason: why, in words; must not be empty.
        commit: the commit that is checked out.

    Raises:
        ConfigError: no reason.
        GoldenError: the pending golden cannot be trusted or read.
    """
    if not reason.strip():
        raise ConfigError("accepting a golden needs a reason", fix='pytest-repro accept --all --reason "..."')
    candidate = place.read()
    try:
        standing = place.other.read()
        previous: str | None = standing.digest
        if standing.digest == candidate.digest and standing.review:
            previous = standing.review.previous  # an accept that was interrupted is being repeated
    except GoldenMissing:
        previous = None
    except GoldenError as exc:
        previous = None
        reason = f"{reason} (it replaces a golden that could not be read: {exc.what})"
    review = Review(
        by=by, when=datetime.now(UTC).isoformat(timespec="seconds"), reason=reason, previous=previous, commit=commit
    )
    result = wire.accepted(candidate, review)
    place.other.write(result)
    place.remove()
    return result
