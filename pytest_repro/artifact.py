"""What a run in CI left: pending goldens in a folder or a zip, read as data that somebody else wrote.

Nothing is extracted. Names are judged before anything is read, sizes while it is read, and only then is a candidate put
beside the suite that it belongs to; files that are no pending golden are left alone, and named.
"""

from __future__ import annotations

import re
import stat
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from shlex import quote
from typing import IO, Any

from . import golden as wire
from .errors import ConfigError, GoldenError
from .generation import digest
from .golden import Golden
from .store import PENDING, STEM, Place, typed
from .suite import SUITE_FILE, Suite, defaults_around, load

MOST_FILES = 10_000
MOST_BYTES = 512 << 20
"""Of one file, decompressed; a golden of 1,319 prompts of 512 tokens has 8 MB."""
MOST_BYTES_IN_ALL = 2 << 30
_NAME = re.compile(rf"{STEM.pattern}(\.[1-9][0-9]{{0,5}}of[1-9][0-9]{{0,5}})?{re.escape(PENDING)}\.(jsonl|safetensors)")
_DRIVE = re.compile(r"[A-Za-z]:")
_MADE_BY = "name the folder that pytest --repro-check --repro-pending-dir made, or the zip of its artifact"


@dataclass(frozen=True)
class Contents:
    """An artifact, read."""

    files: Mapping[PurePosixPath, bytes]
    """The files of pending goldens."""
    ignored: tuple[str, ...]
    """Names of everything else."""


@dataclass(frozen=True)
class Arrival:
    """A candidate of an artifact, and the place in this checkout that it belongs to."""

    source: PurePosixPath
    place: Place
    golden: Golden
    state: str
    """`new`, `same` (it lies there already), `replaced` (another one lies there)."""


def read(path: Path) -> Contents:
    """The pending goldens of a folder or a zip, as bytes.

    Raises:
        ConfigError: neither of the two, a name that leads elsewhere, a link, a name twice, or more than a run leaves.
    """
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise ConfigError("there is no such file or folder", where=path, fix=_MADE_BY)
    try:
        with zipfile.ZipFile(path) as archive:
            return _read_zip(path, archive)
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError, RuntimeError, ValueError) as exc:
        # zipfile raises any of them for a damaged, encrypted or foreign archive
        raise ConfigError(f"neither a folder nor a zip that can be read: {exc}", where=path, fix=_MADE_BY) from None
    except Exception as exc:  # the decompressors' own errors have no common ancestor
        raise ConfigError(f"the zip is damaged: {exc}", where=path, fix="download it again") from None


def _read_zip(path: Path, archive: zipfile.ZipFile) -> Contents:
    entries = [entry for entry in archive.infolist() if not entry.is_dir()]
    names = _checked([entry.orig_filename for entry in archive.infolist()], path)
    for entry in entries:
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if kind not in (0, stat.S_IFREG):
            raise _refused(path, entry.orig_filename, "is a link or a device")
        if entry.flag_bits & 0x1:
            raise _refused(path, entry.orig_filename, "is encrypted")
    wanted = {names[e.orig_filename]: e for e in entries if _NAME.fullmatch(names[e.orig_filename].name)}
    files = _bounded(path, ((name, archive.open(entry)) for name, entry in wanted.items()))
    return Contents(files, tuple(e.orig_filename for e in entries if names[e.orig_filename] not in wanted))


def _read_folder(path: Path) -> Contents:
    found: dict[str, Path] = {}
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if file.is_symlink():
            raise _refused(path, name, "is a link")
        if file.is_file():
            found[name] = file
    names = _checked(list(found), path)
    wanted = {names[name]: file for name, file in found.items() if _NAME.fullmatch(names[name].name)}
    files = _bounded(path, ((name, file.open("rb")) for name, file in wanted.items()))
    return Contents(files, tuple(name for name in found if names[name] not in wanted))


def _checked(names: list[str], where: Path) -> dict[str, PurePosixPath]:
    """Names as paths, none of which leads out of a folder or is there twice on any file system."""
    if len(names) > MOST_FILES:
        raise ConfigError(f"{len(names)} files, and a run leaves {MOST_FILES} at most", where=where, fix=_MADE_BY)
    out: dict[str, PurePosixPath] = {}
    seen: set[str] = set()
    for name in names:
        parts = name.rstrip("/").split("/")
        if name.startswith("/") or _DRIVE.match(name) or {"", ".", ".."} & set(parts) or re.search(r"[\\\0:]", name):
            raise _refused(where, name, "is no plain path below the folder")
        if (folded := name.rstrip("/").casefold()) in seen:
            raise _refused(where, name, "is there twice")
        seen.add(folded)
        out[name] = PurePosixPath(*parts)
    return out


def _bounded(where: Path, opened: Iterable[tuple[PurePosixPath, IO[bytes]]]) -> dict[PurePosixPath, bytes]:
    """Every file read, as far as a bound and no further: what an archive says of its sizes is not believed."""
    files: dict[PurePosixPath, bytes] = {}
    left = MOST_BYTES_IN_ALL
    for name, stream in opened:
        with stream:
            data = stream.read(min(MOST_BYTES, left) + 1)
        if len(data) > min(MOST_BYTES, left):
            raise _refused(
                where,
                str(name),
                f"is larger than {MOST_BYTES >> 20} MB, or all of it than {MOST_BYTES_IN_ALL >> 20} MB",
            )
        left -= len(data)
        files[name] = data
    return files


def _refused(where: Path, name: str, why: str) -> ConfigError:
    return ConfigError(f"{name!r} {why}: nothing was fetched", where=where, fix=_MADE_BY)


# --- where a candidate belongs --------------------------------------------------------------------------------------


def arrivals(contents: Contents, root: Path, *, source: Path, force: bool) -> list[Arrival]:
    """Every candidate, verified and matched to a suite of a checkout; nothing is written.

    Args:
        contents: of the artifact.
        root: the checkout's folder.
        source: the artifact, for messages.
        force: whether another pending golden may be replaced.

    Raises:
        ConfigError: no candidate, no suite that one belongs to, or another one waits there.
        GoldenError: a candidate cannot be trusted or read.
    """
    texts = [name for name in contents.files if name.suffix == ".jsonl"]
    lone = [name for name in contents.files if name.with_suffix(".jsonl") not in texts]
    if lone:
        raise GoldenError(f"{lone[0]} has no text part beside it", where=source, fix=_again(lone[0], root))
    if not texts:
        ignored = f" (ignored: {', '.join(contents.ignored[:5])})" if contents.ignored else ""
        raise ConfigError(f"no pending golden is in it{ignored}", where=source, fix=_MADE_BY)
    found = [_arrival(name, contents, root, source) for name in texts]
    for arrival in found:
        if arrival.state == "replaced" and not force:
            raise ConfigError(
                f"another candidate waits there, and {arrival.source} would replace it",
                where=typed(arrival.place.text),
                fix=f"pytest-repro review {typed(arrival.place.folder)}, or fetch with --force",
            )
    if len({arrival.place for arrival in found}) < len(found):
        raise ConfigError("two candidates belong to one place", where=source, fix="fetch the artifact of one run")
    return found


def _arrival(name: PurePosixPath, contents: Contents, root: Path, source: Path) -> Arrival:
    where = f"{source}: {name}"
    numbers = contents.files.get(name.with_suffix(".safetensors"))
    again = _again(name, root)
    try:
        golden = wire.decode(contents.files[name], numbers, where, regenerate=again)
    except GoldenError as exc:  # git has no file of an artifact
        fix = again if exc.fix.startswith("git checkout") else exc.fix
        raise GoldenError(exc.what, where=exc.where, fix=fix) from None
    if golden.review is not None:
        raise GoldenError("a candidate that carries a review already", where=where, fix="review it here")
    place = Place.named(_folder(name, golden, root, where) / name.name, PENDING)
    part = golden.part.shard if golden.part else None
    if (place.stem, place.shard) != (golden.stem, part):
        raise GoldenError(f"the file's name says {place.name}, its content {golden.stem}", where=where)
    canonical = digest(b"".join(wire.encode(golden)))
    there = place.trusted() if place.text.exists() else None
    if not place.text.exists():
        state = "new"
    else:
        state = "same" if there and digest(b"".join(wire.encode(there))) == canonical else "replaced"
    return Arrival(name, place, golden, state)


def _again(name: PurePosixPath, root: Path) -> str:
    """How to come by a candidate that arrived damaged."""
    folders = (root.joinpath(*name.parent.parts[i:]) for i in range(len(name.parent.parts)))
    suite = next((folder for folder in folders if (folder / SUITE_FILE).is_file()), _golden_folder(root))
    return (
        f"gh run download --name repro-pending, and fetch it again; or pytest --repro-update {quote(typed(suite))}, "
        "which records it here"
    )


def _folder(name: PurePosixPath, golden: Golden, root: Path, where: str) -> Path:
    """The suite's folder: the path that the run had, with or without what an upload put before it; or else by name."""
    parts = name.parent.parts
    folders = [root.joinpath(*parts[i:]) for i in range(len(parts))]
    suites = [folder for folder in folders if _is_of(folder, golden, root)]
    if not suites:
        suites = [
            file.parent for file in sorted(_golden_folder(root).rglob(SUITE_FILE)) if _is_of(file.parent, golden, root)
        ]
        if len(suites) > 1:
            raise ConfigError(
                f"several suites are called {golden.suite!r}: {', '.join(typed(folder) for folder in suites)}",
                where=where,
                fix="name the checkout's folder with --into, and keep the artifact's folders",
            )
    if not suites:
        raise ConfigError(
            f"no suite of this checkout is called {golden.suite!r}",
            where=where,
            fix="check out the commit of the run, or name the checkout with --into",
        )
    if (suites[0] / SUITE_FILE).is_file():
        _same_question(golden, load(suites[0], defaults=defaults_around(suites[0])[1]), where)
    return suites[0]


def _golden_folder(root: Path) -> Path:
    return root / "golden" if (root / "golden").is_dir() else root


def _is_of(folder: Path, golden: Golden, root: Path) -> bool:
    """Whether a folder holds the golden's suite; a test's own golden has no suite.toml, and is named after its folder."""
    if not folder.resolve().is_relative_to(root.resolve()) or (folder / SUITE_FILE).is_symlink():
        return False
    if not (folder / SUITE_FILE).is_file():
        return folder.name == golden.suite and folder.parent.name == "tests" and folder.parent.parent.is_dir()
    return load(folder, defaults=defaults_around(folder)[1]).name == golden.suite


def _same_question(golden: Golden, suite: Suite, where: str) -> None:
    """The candidate answers this checkout's prompts: others would be incomparable as soon as they were accepted."""
    asked = {prompt.id: digest(prompt.content) for prompt in suite.prompts}
    answered = dict(zip(golden.generation.ids, golden.generation.content_digests, strict=True))
    other = [name for name, content in answered.items() if asked.get(name) != content]
    missing = [] if golden.part else [name for name in asked if name not in answered]
    if other or missing:
        commit = str(golden.fingerprint.get("commit") or "")[:12]
        raise ConfigError(
            f"its prompts are not those of {typed(suite.folder)}: {', '.join((other + missing)[:5])} differ",
            where=where,
            fix=f"check out the commit of the run{f' ({commit})' if commit else ''}, or record it anew",
        )


def put(found: Iterable[Arrival]) -> Iterator[Arrival]:
    """Put candidates in place, each whole or not at all; what lies there already is left alone."""
    for arrival in found:
        if arrival.state != "same":
            arrival.place.write(arrival.golden)
        yield arrival


def told(arrival: Arrival) -> dict[str, Any]:
    """An arrival as data for scripts."""
    return {
        "from": str(arrival.source),
        "path": str(arrival.place.text),
        "golden": arrival.golden.stem,
        "suite": arrival.golden.suite,
        "prompts": len(arrival.golden.generation),
        "state": arrival.state,
    }
