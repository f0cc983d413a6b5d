"""Model output is untrusted text: nothing of it may act in a terminal or a CI log."""

from __future__ import annotations

import unicodedata

_ACTIVE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Unicode categories that steer a terminal, reorder text or break a line."""
_UNSEEN = frozenset(map(chr, (0x34F, 0x115F, 0x1160, 0x17B4, 0x17B5, *range(0x180B, 0x1810), 0x3164, *range(0xFE00, 0xFE10), 0xFFA0,
                              *range(0xE0100, 0xE01F0))))  # fmt: skip
"""Letters and marks that show nothing: a text can be smuggled in them, and two texts that differ in them look alike."""


def inert(text: str, limit: int = 0) -> str:
    """The text on one line, with everything that could act spelt out.

    Line breaks become `⏎`; other control, format (bidirectional overrides, zero-width), invisible and unassigned characters
    become escapes; `##[`, which the GitHub runner reads anywhere in a line, is broken up, and so is `::` where the line begins
    with it: the runner trims a line before it looks for a command.

    Args:
        text: anything.
        limit: most characters to keep, from the end; 0 keeps all.
    """
    kept = text[-limit:] if limit and len(text) > limit else text
    shown = kept if kept.isascii() and kept.isprintable() else "".join(map(_shown, kept.replace("\r\n", "\n")))
    shown = shown.replace("##[", "#\\x23[")
    return shown.replace("::", ":\\x3a", 1) if shown.lstrip().startswith("::") else shown


def _shown(char: str) -> str:
    if char == "\n":
        return "⏎"
    if unicodedata.category(char) not in _ACTIVE and char not in _UNSEEN:
        return char
    code = ord(char)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"
