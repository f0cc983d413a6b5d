from __future__ import annotations

import pytest

from pytest_repro.accuracy import paired_test, scorer
from pytest_repro.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("She pays 18", "18", True),
        ("She pays $18.", "18", True),
        ("12 + 6 = 18 dollars", "18", True),
        ("18 eggs, then 17", "18", False),
        ("It is 1,250 in all", "1250", True),
        ("It is 1250.0", "1,250", True),
        ("It is 1,234,567.5.", "1234567.5", True),
        ("It is -3", "-3", True),
        ("It is -3", "3", False),
        ("It is +3", "3", True),
        ("It is 0.25", "0.25", True),
        ("It is 0.25", "25", False),
        ("It is .5", "0.5", True),
        ("#### 72", "72", True),
        ("1, 2, 3", "3", True),
        ("No idea.", "18", False),
        ("", "18", False),
        ("18", "", False),
        ("18", "eighteen", False),
    ],
)
def test_last_number(text: str, answer: str, right: bool) -> None:
    assert scorer("last-number")(text, answer) is right


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("B", "B", True),
        ("The answer is (B).", "B", True),
        ("The answer is (B).", "(b)", True),
        ("A or B? It is C", "C", True),
        ("A or B? It is C", "B", False),
        ("Because BAD", "B", False),
        ("", "A", False),
    ],
)
def test_choice(text: str, answer: str, right: bool) -> None:
    assert scorer("choice")(text, answer) is right


@pytest.mark.parametrize(
    ("pattern", "text", "answer", "right"),
    [
        (r"answer: (\w+)", "answer: yes", "yes", True),
        (r"answer: (\w+)", "answer: no, answer: yes", "yes", True),
        (r"answer: (\w+)", "answer: no, answer: yes", "no", False),
        (r"\d+", "7 then 8", "8", True),
        (r"(\d+) (\w+)", "3 eggs", "3", True),
        (r"(\d+) (\w+)", "3 eggs", "eggs", False),
        (r"\d+", "none", "8", False),
    ],
    ids=["group", "last-match", "not-the-first-match", "whole", "first-group", "not-the-second-group", "no-match"],
)
def test_regex(pattern: str, text: str, answer: str, right: bool) -> None:
    assert scorer("regex", pattern=pattern)(text, answer) is right


def test_exact_ignores_outer_white_space_only() -> None:
    assert scorer("exact")(" Hello\n", "Hello")
    assert not scorer("exact")("hello", "Hello")
    assert not scorer("exact")("Hello  you", "Hello you")


def test_code_needs_the_opt_in() -> None:
    with pytest.raises(ConfigError, match="may not run code by itself") as caught:
        scorer("operator:eq", where="suite.toml")
    assert "--repro-allow-code" in caught.value.fix and caught.value.where == "suite.toml"
    assert scorer("operator:eq", allow_code=True)("a", "a") is True


@pytest.mark.parametrize(
    ("name", "pattern", "message"),
    [
        ("last-nummer", "", "unknown scorer 'last-nummer'; known: exact, last-number, choice, regex"),
        ("regex", "", "needs a pattern"),
        ("regex", "(", "not a regular expression"),
        ("no_such_module:f", "", "cannot be imported"),
        ("operator:no_such", "", "cannot be imported"),
        (":f", "", "cannot be imported"),
        (".relative:f", "", "cannot be imported"),
    ],
)
def test_bad_scorers(name: str, pattern: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        scorer(name, pattern=pattern, allow_code=True, where="suite.toml")
    assert caught.value.where == "suite.toml"


@pytest.mark.parametrize(
    ("both", "lost", "gained", "neither", "p_value"),
    [
        (10, 0, 0, 10, 1.0),
        (10, 1, 0, 9, 1 / 2),
        (10, 4, 0, 6, 1 / 16),
        (10, 5, 0, 5, 1 / 32),
        (10, 6, 1, 3, (7 + 1) / 128),
        (10, 7, 1, 2, (8 + 1) / 256),
        (10, 3, 3, 4, (20 + 15 + 6 + 1) / 64),
        (10, 0, 4, 6, 1.0),
    ],
    ids=["none", "one", "four", "five", "six-one", "seven-one", "three-three", "gained-only"],
)
def test_only_discordant_pairs_carry_evidence(both: int, lost: int, gained: int, neither: int, p_value: float) -> None:
    golden = [True] * both + [True] * lost + [False] * gained + [False] * neither
    now = [True] * both + [False] * lost + [True] * gained + [False] * neither
    test = paired_test(golden, now, 0.05)
    assert test.p_value == pytest.approx(p_value, rel=1e-12)
    assert (test.n, test.lost, test.gained) == (20, lost, gained)
    assert test.golden == 5.0 * (both + lost) and test.now == 5.0 * (both + gained)
    assert test.drop == 5.0 * (lost - gained)


@pytest.mark.parametrize(
    ("right", "n", "alpha", "wanted"),
    [
        (10, 20, 0.05, 25.0),  # five losses: 1/32 is the first below 5 %
        (5, 20, 0.05, 25.0),
        (4, 20, 0.05, None),  # four losses are 1/16: no drop can show
        (0, 20, 0.05, None),
        (10, 20, 0.5, 5.0),
        (10, 20, 0.01, 35.0),  # 1/128
    ],
)
def test_smallest_drop(right: int, n: int, alpha: float, wanted: float | None) -> None:
    golden = [True] * right + [False] * (n - right)
    assert paired_test(golden, golden, alpha).smallest_drop == wanted


@pytest.mark.parametrize(
    ("lost", "accuracy_drop", "alpha", "fails"),
    [
        (5, 2.0, 0.05, True),
        (5, 25.0, 0.05, False),
        (4, 2.0, 0.05, False),
        (5, 2.0, 1 / 32, True),
        (0, 0.0, 0.05, False),
    ],
    ids=["both", "drop-is-allowed", "may-be-chance", "on-alpha", "nothing"],
)
def test_fails_needs_a_large_drop_and_a_small_p(lost: int, accuracy_drop: float, alpha: float, fails: bool) -> None:
    test = paired_test([True] * 20, [False] * lost + [True] * (20 - lost), alpha)
    assert test.fails(accuracy_drop, alpha) is fails


@pytest.mark.parametrize(("golden", "now"), [([], []), ([True], [True, False])], ids=["empty", "lengths"])
def test_paired_test_refuses_what_is_not_paired(golden: list[bool], now: list[bool]) -> None:
    with pytest.raises(ValueError, match="paired test"):
        paired_test(golden, now, 0.05)
