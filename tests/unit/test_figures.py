from __future__ import annotations

import json

import pytest

from pytest_repro.report import figures
from pytest_repro.traces import EDGES

LINES = {"mean now": 0.02, "benign mean": 0.01, "benign max": 1.0}


def distribution(**counts: int) -> dict[str, object]:
    """Counts by the power of ten that their bin begins at, e.g. `e_2` for 0.01."""
    column = [0] * 40
    for name, count in counts.items():
        column[4 * (9 - int(name.removeprefix("e_")))] = count
    return {"edges": EDGES.tolist(), "counts": column, "zeros": 3}


def test_the_axis_holds_every_token_and_every_line_and_no_more() -> None:
    figure = figures.token_moves(distribution(e_4=2, e_2=8), LINES)
    assert figure is not None
    assert [(bar.count, bar.height) for bar in figure.bars] == [(2, 25.0), (8, 100.0)]
    assert figure.bars[0].x == 0.0 and 0 < figure.bars[1].x < 100
    assert figure.bars[0].low == pytest.approx(1e-4) and figure.bars[0].high == pytest.approx(10**-3.75)
    assert {line.label: line.value for line in figure.lines} == LINES
    assert figure.lines[1].x == figure.bars[1].x, "0.01 stands where the bin that begins at 0.01 does"
    assert 0 < figure.lines[0].x < figure.lines[2].x < 100
    assert (figure.total, figure.zeros, figure.beyond) == (13, 3, 0)


def test_tokens_beyond_the_largest_benign_move_are_counted() -> None:
    figure = figures.token_moves(distribution(e_2=8, e_0=5), {**LINES, "benign max": 0.5})
    assert figure is not None and figure.beyond == 5
    assert [bar.beyond for bar in figure.bars] == [False, True]


@pytest.mark.parametrize(
    "broken",
    [
        {"edges": [1.0, 2.0], "counts": [1, 2], "zeros": 0},
        {"edges": [0.0, 2.0], "counts": [1], "zeros": 0},
        {"edges": [float("nan"), 2.0], "counts": [1], "zeros": 0},
        {"edges": [1.0, 2.0], "counts": [0], "zeros": 9},
    ],
    ids=["lengths", "zero", "nan", "empty"],
)
def test_what_cannot_be_drawn_is_left_out(broken: dict[str, object]) -> None:
    assert figures.token_moves(broken, LINES) is None


def test_no_bar_straddles_the_limit() -> None:
    figure = figures.prompt_moves([0.5, 0.9, 1.1, 1.999, 2.0, 2.001, 3.0, 0.0], 2.0)
    assert figure is not None
    assert figure.beyond == 2 and sum(bar.count for bar in figure.bars if not bar.beyond) == 5
    assert all(bar.high <= 2.0 * 1.000001 or bar.low >= 2.0 * 0.999999 for bar in figure.bars)
    assert (figure.total, figure.zeros) == (8, 1)


@pytest.mark.parametrize("spread", [1.0, 1.001, 10.0, 1e4, 1e12, 1e200])
def test_any_spread_has_bins_enough_and_not_too_many(spread: float) -> None:
    ratios = [1.0, spread, 1 / spread]
    figure = figures.prompt_moves(ratios, 10.0)
    assert figure is not None
    assert sum(bar.count for bar in figure.bars) == 3
    assert all(0 <= bar.x <= 100 and bar.x + bar.width <= 100.01 for bar in figure.bars)
    assert 1 <= len(figure.ticks) <= 12
    assert figure.beyond == (spread > 10)


def test_numbers_that_are_none() -> None:
    assert [figures.number(v) for v in (None, "x", float("nan"), float("inf"), 10**400, json.loads("1E400"))] == [
        None
    ] * 6
    assert figures.number(3) == 3.0
    assert figures.prompt_moves([], 2.0) is None and figures.prompt_moves([0.0], 2.0) is None
