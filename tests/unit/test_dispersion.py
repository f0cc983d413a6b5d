"""The paper's measures on outputs small enough to work out by hand."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest

from pytest_repro.dispersion import Answer, accuracy, dispersion, diverged_by, divergence_index, spread_at, top1_spread


def answer(tokens: list[int], probs: list[float] | None = None, right: bool | None = None) -> Answer:
    return Answer(np.array(tokens, np.int32), np.array(probs or [0.5] * len(tokens)), right)


@pytest.mark.parametrize(
    ("outputs", "index"),
    [
        ([[1, 2, 3], [1, 2, 3]], None),
        ([[1, 2, 3], [1, 9, 3]], 1),
        ([[1, 2, 3], [9, 2, 3]], 0),
        ([[1, 2, 3], [1, 2]], 2),
        ([[1, 2], [1, 2, 3], [1, 2]], 2),
        ([[1, 2, 3], [1, 2, 3], [1, 2, 9]], 2),
        ([[], []], None),
        ([[], [1]], 0),
    ],
)
def test_divergence_index(outputs: list[list[int]], index: int | None) -> None:
    assert divergence_index(outputs) == index


RUNS = [
    [answer([1, 2, 3, 4], [0.9, 0.8, 0.7, 0.6], True), answer([5, 6], [0.5, 0.5], False)],
    [answer([1, 2, 9], [0.8, 0.6, 0.7], False), answer([5, 6], [0.5, 0.5], False)],
    [answer([1, 2, 3, 4], [0.7, 0.7, 0.1, 0.1], True), answer([5, 6], [0.5, 0.2], False)],
]


def test_the_measures_by_hand() -> None:
    found = dispersion(RUNS)
    assert (found.configurations, found.prompts, found.diverging) == (3, 2, 1)
    assert found.div_percent == 50 and found.mean_div_index == 2
    assert found.accuracy == pytest.approx(100 / 3) and found.std_acc == pytest.approx(statistics.stdev([50, 0, 50]))
    assert found.std_length == pytest.approx((statistics.stdev([4, 3, 4]) + 0) / 2)
    positions = [[0.9, 0.8, 0.7], [0.8, 0.6, 0.7], [0.5] * 3, [0.5, 0.5, 0.2]]
    assert found.std_top1_prob == pytest.approx(np.mean([statistics.stdev(p) for p in positions])), (
        "up to Div_Index alone"
    )


def test_the_curves_by_hand() -> None:
    assert diverged_by(RUNS).tolist() == [0, 0, 50, 50]
    first, second = statistics.stdev([0.9, 0.8, 0.7]), statistics.stdev([0.8, 0.6, 0.7])
    assert spread_at(RUNS) == pytest.approx([(first + 0) / 2, (second + statistics.stdev([0.5, 0.5, 0.2])) / 2])
    assert [len(row) for row in top1_spread(RUNS)] == [2, 2]


def test_outputs_that_part_at_once_have_no_spread() -> None:
    found = dispersion([[answer([1])], [answer([2])]])
    assert (
        found.std_top1_prob is None
        and found.mean_div_index == 0
        and spread_at([[answer([1])], [answer([2])]]).size == 0
    )


def test_what_cannot_be_known_is_none() -> None:
    found = dispersion([[answer([1], [math.nan])], [answer([1], [0.5])]])
    assert found.std_top1_prob is None and found.std_acc is None and found.accuracy is None
    assert found.mean_div_index is None, "nothing diverged"


def test_prompts_without_an_answer_are_not_scored() -> None:
    assert accuracy([answer([1], right=True), answer([1]), answer([1], right=False)]) == 50
    assert accuracy([answer([1])]) is None


@pytest.mark.parametrize("runs", [[], [[answer([1])]], [[], []]])
def test_one_configuration_has_no_dispersion(runs: list[list[Answer]]) -> None:
    with pytest.raises(ValueError, match="standard deviation"):
        dispersion(runs)


def test_configurations_of_other_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        dispersion([[answer([1]), answer([1])], [answer([1])]])
