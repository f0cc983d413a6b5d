from __future__ import annotations

import pytest

from pytest_repro.wording import AFTER, BEFORE, marked, word_diff


@pytest.mark.parametrize(
    ("golden", "now", "wanted"),
    [
        ("same", "same", ""),
        ("costs 3 dollars", "costs 4 dollars", "costs [-3-]{+4+} dollars"),
        ("a b", "a", "a[- b-]"),
        ("a", "a b", "a{+ b+}"),
        ("", "x", "{+x+}"),
        ("one\ntwo", "one\n\ntwo", "one[-\n-]{+\n\n+}two"),
        ("12 eggs. Then", "12 eggs, Then", "12 eggs[-.-]{+,+} Then"),
    ],
)
def test_what_changed_is_marked(golden: str, now: str, wanted: str) -> None:
    assert marked(word_diff(golden, now)) == wanted


def test_the_pieces_make_up_both_texts() -> None:
    golden, now = "She has 3 apples and 2 pears.", "She had 3 pears and no apples."
    pieces = word_diff(golden, now)
    assert "".join(text for side, text in pieces if side != "now") == golden
    assert "".join(text for side, text in pieces if side != "golden") == now


def test_a_long_text_is_cut_on_both_sides() -> None:
    head, tail = " ".join(f"h{i}" for i in range(100)), " ".join(f"t{i}" for i in range(100))
    pieces = word_diff(f"{head} 3 {tail}", f"{head} 4 {tail}")
    assert pieces[0][1].startswith("…") and pieces[-1] == ("same", "…")
    assert "h99" in pieces[0][1] and "h1 " not in marked(pieces) and "t99" not in marked(pieces)
    assert len(marked(pieces).split()) < BEFORE + 2 * AFTER
