"""Answers of a run that was interrupted, so that the next need not ask for them again.

One file of JSON lines a run, in the user's cache: written answer by answer, removed once every prompt was answered. It is
only read, never believed: a line that does not hold what it must is left out. Goldens are never touched by it.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from ..generation import FINISH_REASONS, Output, Request, Scores, digest
from ..models import cache_folder

OLDEST = 24 * 3600.0
"""Seconds after which nothing of a run is taken over."""
_FLOATS, _TOKENS = ("logprob", "gap", "reference_logprob", "deficit"), ("tokens", "runner_up", "top")


class Journal:
    """The answers of one run, and those that the run before it left."""

    def __init__(self, identity: Any, say: Callable[[str], None] = lambda _: None) -> None:
        """`identity` is everything, besides the request, that decides an answer: JSON, kept only as a digest."""
        self.folder = cache_folder() / "resume"
        self.file = self.folder / f"{digest(identity).removeprefix('sha256:')[:32]}.jsonl"
        self.left: dict[str, Any] = {}
        """Key -> answer, of an earlier run: each is taken over once."""
        self._say, self._own = say, -1
        self._lock = FileLock(f"{self.file}.lock")
        self._open()

    def add(self, key: str, answer: Output | Scores) -> None:
        """One answer, on disk when this returns."""
        self._append({"key": key, "answer": _to_json(answer)})

    def drop(self, keys: Iterable[str]) -> None:
        """These answers turned out not to be trusted."""
        for key in keys:
            self._append({"key": key, "answer": None})

    def forget(self) -> None:
        """Nothing more of the earlier run is taken over, now or later."""
        self.drop(self.left)
        self.left = {}

    def close(self, complete: bool) -> None:
        """Leave the answers behind, unless every prompt was answered."""
        if self._own < 0:
            return
        os.close(self._own)
        with contextlib.suppress(OSError):
            if complete or not self.file.stat().st_size:
                self.file.unlink()
        self._lock.release()
        with contextlib.suppress(OSError):
            Path(self._lock.lock_file).unlink()

    def _open(self) -> None:
        """A run that cannot be written down, or whose twin is still under way, is run all the same."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.folder.chmod(0o700)  # it holds answers
            self._lock.acquire(timeout=0)
            self._remove_old()
            self.left = self._read()
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
            self._own = os.open(self.file, flags, 0o600)
        except Timeout:
            self._say("another run of the same is under way: this one takes nothing over, and cannot be resumed")
        except OSError as exc:
            self._say(f"the run cannot be resumed should it break off: {exc.strerror}")

    def _append(self, line: dict[str, Any]) -> None:
        if self._own < 0:
            return
        try:
            # One write, with a line break before it: what a killed run left half written spoils no more than itself.
            os.write(self._own, b"\n" + json.dumps({"time": time.time(), **line}, allow_nan=False).encode())
            os.fsync(self._own)
        except OSError as exc:  # a full disk, say: what was asked for is an answer, not its copy
            self._say(f"an answer was not written down: {exc.strerror}")

    def _remove_old(self) -> None:
        for file in self.folder.glob("*.jsonl"):
            with contextlib.suppress(OSError):
                if time.time() - file.stat().st_mtime > OLDEST:
                    file.unlink()

    def _read(self) -> dict[str, Any]:
        if not self.file.exists():
            return {}
        found: dict[str, Any] = {}
        for line in self.file.read_bytes().split(b"\n"):
            try:
                row = json.loads(line)
                found[str(row["key"])] = row["answer"] if 0 <= time.time() - row["time"] <= OLDEST else None
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
        return {key: answer for key, answer in found.items() if answer is not None}


def key(kind: str, request: Request, max_new_tokens: int) -> str:
    """Everything of a request that decides its answer."""
    watched = [
        None if column is None else column.tolist() for column in (request.reference, request.reference_runner_up)
    ]
    return digest([kind, request.content, request.tokens.tolist(), max_new_tokens, *watched])


def _to_json(answer: Output | Scores) -> dict[str, Any]:
    return {name: _plain(value) for name, value in vars(answer).items() if name not in ("id", "error")}


def _plain(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    return [None if number != number else number for number in value.tolist()]


def to_output(request: Request, row: Any) -> Output | None:
    """An answer of the journal; None if it is none."""
    found = _checked(row, {"tokens", "text", "finish_reason", "logprob", "gap", "runner_up", "reference_logprob"})
    if found is None or not isinstance(found["text"], str) or found["finish_reason"] not in FINISH_REASONS:
        return None
    columns = [found[name] for name in ("tokens", "logprob", "gap", "runner_up")]
    watched = found["reference_logprob"]
    if any(column is None for column in columns) or (watched is None) != (request.reference is None):
        return None
    lengths = {len(column) for column in (*columns, *(() if watched is None else (watched,)))}
    return Output(id=request.id, **found) if len(lengths) == 1 and 0 not in lengths else None


def to_scores(request: Request, row: Any) -> Scores | None:
    """A replay of the journal; None if it is none."""
    found = _checked(row, {"logprob", "deficit", "top", "gap"})
    if found is None or request.reference is None:
        return None
    whole = all(column is not None and len(column) == len(request.reference) for column in found.values())
    return Scores(id=request.id, **found) if whole else None


def _checked(row: Any, names: set[str]) -> dict[str, Any] | None:
    """The columns as arrays, if they are what they should be."""
    if not isinstance(row, dict) or set(row) != names:
        return None
    try:
        return {name: _array(name, value) if name in (*_FLOATS, *_TOKENS) else value for name, value in row.items()}
    except (ValueError, TypeError, OverflowError):
        return None


def _array(name: str, values: Any) -> Any:
    if values is None:
        return None
    if not isinstance(values, list):
        raise TypeError(name)
    if name in _TOKENS:
        if not all(type(value) is int and -1 <= value < 2**31 for value in values):
            raise ValueError(name)
        return np.asarray(values, np.int32)
    if not all(value is None or type(value) in (int, float) for value in values):
        raise ValueError(name)
    return np.asarray([np.nan if value is None else value for value in values], np.float32)
