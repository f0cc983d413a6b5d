"""Two texts side by side, word by word, around the place where they first part. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Literal

Side = Literal["same", "golden", "now"]
Piece = tuple[Side, str]

_WORD = re.compile(r"\s+|\w+|[^\w\s]")
BEFORE, AFTER = 24, 60
"""Words, spaces and signs shown before and after the first difference."""


def word_diff(golden: str, now: str) -> list[Piece]:
    """What both say, what only the golden says, what only the new text says, in reading order; empty if they are equal."""
    if golden == now:
        return []
    old, new = _WORD.findall(golden), _WORD.findall(now)
    first = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    start = max(0, first - BEFORE)
    pieces: list[Piece] = [("same", ("…" if start else "") + "".join(old[start:first]))]
    for side, text in _changed(old[first : first + AFTER], new[first : first + AFTER]):
        pieces.append((side, text))
    if max(len(old), len(new)) > first + AFTER:
        pieces.append(("same", "…"))
    return [piece for piece in pieces if piece[1]]


def _changed(old: Sequence[str], new: Sequence[str]) -> list[Piece]:
    pieces: list[Piece] = []
    for kind, a, b, c, d in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        same = kind == "equal"
        pieces += [("same", "".join(old[a:b]))] if same else [("golden", "".join(old[a:b])), ("now", "".join(new[c:d]))]
    return pieces


def marked(pieces: Sequence[Piece]) -> str:
    """On one line, as `git diff --word-diff` marks it: `= [-3-]{+4+} dollars`."""
    marks = {"same": "{}", "golden": "[-{}-]", "now": "{{+{}+}}"}
    return "".join(marks[side].format(text) for side, text in pieces)
