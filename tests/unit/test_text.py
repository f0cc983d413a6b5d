from __future__ import annotations

import sys
import unicodedata

import numpy as np
import pytest

from pytest_repro.text import inert


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("3 dollars. é 漢 😀 ∆", "3 dollars. é 漢 😀 ∆"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("\x9b2J", r"\x9b2J"),
        ("\x07\x08\t", r"\x07\x08\x09"),
        ("a\nb", "a⏎b"),
        ("a\r\nb", "a⏎b"),
        ("a\rb", r"a\x0db"),
        ("##[error]boom", r"#\x23[error]boom"),
        ("###[error]", r"##\x23[error]"),
        ("\u202etxt.exe", r"\u202etxt.exe"),
        ("\u2066\u200b\ufeff", r"\u2066\u200b\ufeff"),
        ("\u2028\u2029\x85", r"\u2028\u2029\x85"),
        ("\ud800", r"\ud800"),
        ("\U000e0001", r"\U000e0001"),
        ("a\ufe0f\u3164\U000e0100", r"a\ufe0f\u3164\U000e0100"),
        ("\u0378\ue000", r"\u0378\ue000"),
        ("::error::x", r":\x3aerror::x"),
        (" \u00a0 ::set-env name=A::x", " \u00a0 " + r":\x3aset-env name=A::x"),
        ("a ::error::x", "a ::error::x"),
        ("", ""),
    ],
    ids=[
        "plain", "escape", "c1-csi", "controls", "newline", "crlf", "cr", "github-command", "more-hashes", "bidi",
        "invisible", "line-separators", "lone-surrogate", "tag", "letters-and-marks-unseen", "unassigned-private", "command",
        "command-after-blanks", "colons-within", "empty",
    ],
)  # fmt: skip
def test_inert(text: str, shown: str) -> None:
    assert inert(text) == shown


def test_a_limit_keeps_the_end() -> None:
    assert inert("abcdef", 3) == "def"
    assert inert("abc", 3) == "abc"
    assert inert("x##[error]", 9) == r"#\x23[error]"


def test_whatever_a_model_writes_comes_out_as_one_printable_line() -> None:
    rng = np.random.default_rng(7)
    for _ in range(200):
        text = "".join(map(chr, rng.integers(0, rng.choice([128, 0x3000, sys.maxunicode + 1]), 30)))
        shown = inert(text + "##[")
        assert len(shown.splitlines()) == 1 and "##[" not in shown
        assert {unicodedata.category(c) for c in shown}.isdisjoint({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
