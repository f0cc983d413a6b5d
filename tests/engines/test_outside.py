"""16-bit logits, seen in log-probabilities alone: found where they are, never where they are not."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pytest_repro.engines.outside import DEEPEST, ENOUGH, grid

from .fake_server import rounded

RANGES = [(12.0, 4.0), (5.0, 3.0), (20.0, 2.0), (-40.0, 4.0), (0.0, 3.0), (0.0, 1.0)]
"""Mean and spread of logits, of which the best 20 of 2000 are shown."""


def rows(dtype: str, seed: int, mean: float, spread: float, count: int = 12) -> list[list[float]]:
    logits = np.random.default_rng(seed).normal(mean, spread, (count, 2000)).astype(np.float32)
    exact = rounded(logits, dtype)
    shifted = exact - exact.max(-1, keepdims=True)
    logprob = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True, dtype=np.float32))
    best: list[list[float]] = np.sort(logprob, -1)[:, -20:].astype(np.float64).tolist()
    return best


@pytest.mark.parametrize(("mean", "spread"), RANGES)
def test_fp32_logits_are_never_taken_for_16_bits(mean: float, spread: float) -> None:
    assert [grid(rows("fp32", seed, mean, spread)) for seed in range(100)] == [None] * 100


@pytest.mark.parametrize(("mean", "spread"), RANGES)
def test_bf16_logits_are_seen_and_never_taken_for_fp16(mean: float, spread: float) -> None:
    found = [grid(rows("bf16", seed, mean, spread)) for seed in range(50)]
    assert {None if one is None else one.compute_class for one in found} == {"bf16"}


@pytest.mark.parametrize(("mean", "spread"), [(12.0, 4.0), (5.0, 3.0), (0.0, 1.0), (0.0, 3.0)])
def test_fp16_logits_are_told_from_bf16(mean: float, spread: float) -> None:
    found = [grid(rows("fp16", seed, mean, spread)) for seed in range(50)]
    assert None not in found, "that they are 16 bits is always seen"
    told = [one.compute_class for one in found if one is not None]
    assert told.count("fp16") >= 40, told  # the others spread too little to tell


def test_fp16_logits_of_64_and_more_pass_for_bf16() -> None:
    """The limit that the documentation names: they lie on the grid that bf16 has between 8 and 16."""
    found = grid(rows("fp16", 0, 100.0, 8.0))
    assert found is not None
    assert found.compute_class == "bf16"


def test_the_grid_that_is_seen_is_that_of_the_magnitude() -> None:
    found = grid([[x - 3.0 for x in (15.0, 14.9375, 14.0625, 13.5, 12.0, 11.4375, 10.9375, 9.0625)]])
    assert found is not None
    assert (found.step, found.found, found.seen) == (1 / 16, 1, 1)


@pytest.mark.parametrize(
    "row",
    [
        [],
        [-0.5],
        [-1.0] * 20,
        [-1.0, -1.5] * 10,
        [-1.0 - i / 16 for i in range(ENOUGH)],
        [math.nan] * 20,
        [-math.inf] * 20,
        [DEEPEST - i / 16 for i in range(20)],
        [-9999.0] * 19 + [0.0],
    ],
    ids=["empty", "one", "equal", "two-values", "too-few", "nan", "inf", "too-deep", "floor"],
)
def test_too_little_shows_nothing(row: list[float]) -> None:
    assert grid([row]) is None
    assert grid([row, *rows("fp32", 1, 12.0, 4.0)]) is None


def test_one_value_off_the_grid_clears_its_step() -> None:
    on = [-1.0 - i / 16 for i in range(20)]
    assert grid([on]) is not None
    assert grid([[*on[:-1], on[-1] + 1e-4]]) is None


def test_rounding_of_the_log_probabilities_hides_nothing() -> None:
    generator = np.random.default_rng(3)
    on = np.array([-1.0 - i / 16 for i in range(20)])
    assert grid([(on + generator.uniform(-4e-7, 4e-7, 20)).tolist()]) is not None
