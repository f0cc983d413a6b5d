"""Which of two 16-bit runs lies farther from the FP32 answer."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from pytest_repro import judging
from pytest_repro.arbiter import Arbitration, Finding, arbitrate
from pytest_repro.generation import Scores
from pytest_repro.verdict import Verdict

from .builders import f32, generation, judged, output, scores, suite_result

LENGTH = 64
EXACT = np.linspace(-3.0, -0.1, LENGTH)


def rounded(seed: int, size: float = 0.02) -> Any:
    return EXACT + size * np.random.default_rng(seed).standard_normal(LENGTH)


def found(golden: Any, candidate: Any) -> Arbitration:
    recorded = generation(output("a", range(LENGTH), logprob=golden))
    return arbitrate(recorded, {"a": replayed(candidate)}, {"a": replayed(EXACT)})["a"]


def replayed(logprob: Any) -> Scores:
    return scores("a", range(LENGTH), logprob=list(logprob))


@pytest.mark.parametrize("seed", range(20))
def test_two_roundings_lie_equally_near(seed: int) -> None:
    assert found(rounded(seed), rounded(seed + 1000)).finding is Finding.ROUNDING


def test_a_candidate_that_lies_farther_is_named_with_both_distances() -> None:
    seen = found(rounded(1), rounded(2, size=0.1))
    assert seen.finding is Finding.CANDIDATE
    assert seen.candidate_distance > 3 * seen.golden_distance
    assert seen.p_value < 0.01


def test_a_golden_that_lies_farther_is_named() -> None:
    assert found(rounded(1, size=0.1), rounded(2)).finding is Finding.GOLDEN


def test_one_wild_token_is_not_enough() -> None:
    candidate = rounded(2)
    candidate[7] += 10
    assert found(rounded(1), candidate).finding is Finding.UNDECIDED


def test_a_few_tokens_are_not_enough() -> None:
    recorded = generation(output("a", [1, 2], logprob=[-0.5, -0.5]))
    near, far = scores("a", [1, 2], logprob=[-0.5, -0.5]), scores("a", [1, 2], logprob=[-2.0, -2.0])
    assert arbitrate(recorded, {"a": far}, {"a": near})["a"].finding is Finding.UNDECIDED


def test_numbers_that_are_none_are_left_out() -> None:
    recorded = generation(output("a", [1, 2], logprob=[-0.5, -0.5]))
    masked = scores("a", [1, 2], logprob=[-0.5, -math.inf])
    seen = arbitrate(recorded, {"a": masked}, {"a": scores("a", [1, 2])})["a"]
    assert (seen.candidate_distance, seen.golden_distance) == (0.0, 0.0)
    nothing = scores("a", [1, 2], logprob=[math.nan, -math.inf])
    assert arbitrate(recorded, {"a": nothing}, {"a": scores("a", [1, 2])}) == {}


def test_two_runs_with_the_same_bits_differ_in_nothing() -> None:
    seen = found(rounded(1), rounded(1))
    assert (seen.finding, seen.p_value) == (Finding.ROUNDING, 1.0)


def test_a_prompt_whose_fp32_replay_failed_has_no_finding() -> None:
    recorded = generation(output("a", [1], logprob=[-0.5]))
    broken = Scores("a", f32([]), f32([]), np.zeros(0, np.int32), f32([]), error="out of memory")
    assert arbitrate(recorded, {"a": scores("a", [1])}, {"a": broken}) == {}


def test_findings_stand_beside_verdicts_and_change_none() -> None:
    result = suite_result(judged("a", Verdict.DRIFT), judged("b", Verdict.DRIFT), judged("c"))
    one = Arbitration(Finding.CANDIDATE, 0.02, 0.1, 1e-9)
    other = Arbitration(Finding.ROUNDING, 0.02, 0.02, 0.7)
    after = judging.arbitrated(result, {"a": one, "b": other})
    assert [p.verdict for p in after.prompts] == [p.verdict for p in result.prompts]
    assert [p.arbiter and p.arbiter["finding"] for p in after.prompts] == ["candidate", "rounding", None]
    assert "1 as near to the FP32 answer as the golden, 1 farther from it" in after.notes[-1]
    assert judging.arbitrated(result, {}) is result
