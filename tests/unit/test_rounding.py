"""The paired test of a whole suite: what it sees, what it lets pass, and when it takes the wide margin."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pytest_repro import checks
from pytest_repro.fingerprint import SUSPECTS, Change, class_of
from pytest_repro.rounding import MEASURED, NO_KERNELS, PRECISION, rounding_test
from pytest_repro.suite import Thresholds
from pytest_repro.verdict import Verdict
from tests.unit.builders import SETTINGS, judged, suite_result

VARIANTS = ("replay", "replay, batch size 1", "replay, 1 thread", "replay, eager attention")
LEVELS = np.geomspace(1e-3, 1e-1, 32)
"""Prompts whose benign levels differ a hundredfold."""


def spread(factor: float, seed: int = 0) -> np.ndarray:
    """Every prompt at so many times its level, give or take a tenth."""
    return factor * LEVELS * np.exp(np.random.default_rng(seed).normal(0, 0.1, len(LEVELS)))


def suite_at(factor: float, compute_class: str = "bf16", *changes: Change, seed: int = 0) -> Any:
    found = rounding_test(spread(factor, seed), LEVELS, compute_class, changes, VARIANTS)
    assert found is not None
    return found


def test_a_shift_that_no_prompt_shows_alone_fails_the_suite() -> None:
    found = suite_at(1.3)
    assert found.ratio == pytest.approx(1.3, rel=0.1) and found.above > 28 and found.prompts == 32
    assert found.p_value < 1e-6 and found.fails(0.05) and found.margin == 1.1


def test_what_benign_changes_do_passes() -> None:
    assert not any(suite_at(1.04, seed=seed).fails(0.05) for seed in range(100))
    assert not any(suite_at(0.8, seed=seed).fails(0.05) for seed in range(100))


def test_one_wild_prompt_is_its_own_business() -> None:
    moved = spread(1.0)
    moved[3] *= 1e6
    found = rounding_test(moved, LEVELS, "bf16", (), VARIANTS)
    assert found is not None and not found.fails(0.05)


def test_at_the_margin_itself_the_false_alarm_rate_is_alpha() -> None:
    """p-values of suites that lie at the margin are uniform: the test is what it says."""
    alarms = sum(suite_at(1.1, seed=seed).p_value <= 0.05 for seed in range(1000))
    assert 25 <= alarms <= 75


@pytest.mark.parametrize(
    ("field", "margin"),
    [
        ("batch_size", 1.1), ("threads", 1.1), ("attention", 1.1), ("quantization", 1.1), ("fp32_precision.cuda", 1.1),
        ("torch", 2.0), ("engine", 2.0), ("env.NVIDIA_TF32_OVERRIDE", 1.1), ("engine.claimed.quantization", 1.1),
        ("engine.round_weights", 1.1), ("env.PYTHONHASHSEED", 1.1), ("device_class", 2.0), ("cpu_capability", 2.0), ("env.MKL_CBWR", 2.0),
        ("engine.block_size", 2.0), ("driver", 2.0),
    ],
)  # fmt: skip
def test_kernels_that_nobody_measured_are_given_more_room(field: str, margin: float) -> None:
    found = suite_at(1.3, "bf16", Change(field, "numerics", 1, 2))
    assert found.margin == margin and found.usual == 1.1
    assert found.unmeasured == ((field,) if margin == 2.0 else ())
    assert found.fails(0.05) == (margin == 1.1)


def test_other_classes_of_fields_take_no_room() -> None:
    assert (
        suite_at(1.3, "bf16", Change("host", "information", 1, 2), Change("chat_template", "identity", 1, 2)).margin
        == 1.1
    )


def test_what_needs_no_room_is_a_numerics_field() -> None:
    assert {class_of(name) for name in (*MEASURED, *NO_KERNELS)} == {"numerics"}
    known = {name for name in PRECISION if "*" not in name}
    assert {class_of(name) for name in known} == {"numerics"}
    assert {name for name in known if not name.startswith(("env.", "engine."))} <= set(SUSPECTS)


@pytest.mark.parametrize(
    ("field", "variants"),
    [("threads", ("replay", "replay, batch size 1")), ("attention", ("replay, 1 thread",)), ("batch_size", ())],
)
def test_an_envelope_covers_only_what_it_was_measured_from(field: str, variants: tuple[str, ...]) -> None:
    """vLLM's knows no other attention kernel, and a golden of one thread no other number of them."""
    change = (Change(field, "numerics", 1, 2),)
    found = [rounding_test(spread(1.3), LEVELS, "bf16", change, given) for given in (variants, VARIANTS)]
    assert [test.margin for test in found if test] == [2.0, 1.1]


def test_a_field_that_differs_twice_is_named_once() -> None:
    changes = (Change("torch", "numerics", 1, 2), Change("torch", "numerics", 1, 3))
    assert suite_at(1.0, "bf16", *changes).unmeasured == ("torch",)


@pytest.mark.parametrize(
    ("compute_class", "usual", "wide"),
    [("fp32", 4.0, 10.0), ("fp16", 1.1, 2.0), ("exact", 1.0, 1.0), ("e4m3", 1.1, 2.0), ("e4m3-weights", 4.0, 10.0)],
)
def test_margins_by_class(compute_class: str, usual: float, wide: float) -> None:
    assert suite_at(1.0, compute_class).margin == usual
    assert suite_at(1.0, compute_class, Change("torch", "numerics", 1, 2)).margin == wide


@pytest.mark.parametrize(("moved", "ratio", "fails"), [(0.0, 1.0, False), (1e-9, math.exp(50), True)])
def test_a_level_of_zero(moved: float, ratio: float, fails: bool) -> None:
    """Exact numerics: nothing moves, or something is wrong."""
    found = rounding_test(np.full(8, moved), np.zeros(8), "exact", (), VARIANTS)
    assert found is not None and found.ratio == pytest.approx(ratio) and found.fails(0.05) == fails


def test_unknown_gaps_are_left_out() -> None:
    moved, levels = np.array([0.1, np.nan, 0.1, 0.1]), np.array([0.1, 0.1, np.nan, 0.1])
    found = rounding_test(moved, levels, "bf16", (), VARIANTS)
    assert found is not None and found.prompts == 2
    assert rounding_test(np.array([np.nan]), np.array([0.1]), "bf16", (), VARIANTS) is None
    assert rounding_test(np.zeros(0), np.zeros(0), "bf16", (), VARIANTS) is None


def test_a_runner_up_that_was_ruled_out_moved_infinitely_far() -> None:
    moved = LEVELS.copy()
    moved[:27] = np.inf
    found = rounding_test(moved, LEVELS, "bf16", (), VARIANTS)
    assert found is not None and found.prompts == 32 and found.fails(0.05)


def test_prompts_at_the_margin_itself_are_not_ranked() -> None:
    moved = np.array([0.1, 1.0, 1.0, 1.0, 1.0])
    found = rounding_test(moved, np.full(5, 0.1), "exact", (), VARIANTS)
    assert found is not None and found.ranked == 4 and not found.can_fail(0.05) and not found.fails(0.05)


def test_four_prompts_are_too_few_for_five_per_cent() -> None:
    found = rounding_test(np.full(4, 1.0), np.full(4, 0.1), "bf16", (), VARIANTS)
    assert found is not None and not found.can_fail(0.05) and not found.fails(0.05)
    found = rounding_test(np.full(5, 1.0), np.full(5, 0.1), "bf16", (), VARIANTS)
    assert found is not None and found.can_fail(0.05) and found.fails(0.05)


# --- as a check of a suite ------------------------------------------------------------------------------------------


def check(factor: float, count: int = 32, of: str = "mean_abs_dgap", **more: Any) -> tuple[str, str]:
    rows = [
        judged(f"p{i}", benign_dgap=float(level), method=more.get("method", "replay"), **{of: float(m)})
        for i, (m, level) in enumerate(zip(spread(factor)[:count], LEVELS, strict=False))
    ]
    more = {"envelope": {"variants": VARIANTS}, **{name: value for name, value in more.items() if name != "method"}}
    result = checks.summed_up(suite_result(*rows, **more))
    assert ("pytest --repro-update" in str(result.next_steps)) == (not result.passed)
    found = next(c for c in result.checks if c.name == "rounding")
    assert result.passed == (found.status != "fail")
    assert all(p.verdict == Verdict.IDENTICAL for p in result.prompts)
    return found.status, found.message


def test_the_check_says_how_far_how_many_and_how_sure() -> None:
    status, said = check(1.3)
    assert status == "fail"
    assert (
        said.startswith("gaps moved 1.28 times the benign level")
        and "(median of 32 prompts, replayed), more than rounding moves them" in said
    )
    assert "beyond 1.1, p = " in said
    status, said = check(1.0)
    assert status == "pass" and "which is rounding" in said


def test_the_check_names_what_was_not_measured() -> None:
    changes = tuple(Change(name, "numerics", 1, 2) for name in ("torch", "driver", "cuda", "cudnn"))
    status, said = check(1.3, environment_diff=changes)
    assert status == "pass"
    assert "2 and not 1.1, since torch, driver, cuda and 1 more differ: their rounding was not measured" in said


def test_too_few_prompts_are_told() -> None:
    status, said = check(3.0, 4)
    assert status == "pass" and said.endswith("too few prompts to show more")


def test_what_only_decoding_has_is_seen_in_what_was_decoded() -> None:
    """An attention mask under left padding, a repetition penalty: the replay knows nothing of them."""
    status, said = check(1.3, of="decoded_dgap", method="replay+decode")
    assert status == "fail" and "(median of 32 prompts, decoded), more than rounding" in said


def test_either_may_fail_the_suite_so_each_has_half_of_alpha() -> None:
    """Five prompts can show 0.03: enough for one test at 5 %, and not for one of two."""
    rows = [judged(f"p{i}", mean_abs_dgap=1.0, decoded_dgap=0.1, benign_dgap=0.1) for i in range(5)]
    both = checks.summed_up(suite_result(*rows))
    alone = checks.summed_up(suite_result(*(replace(row, decoded_dgap=None) for row in rows)))
    assert both.passed and not alone.passed


def test_what_was_replayed_because_it_looked_odd_is_not_judged() -> None:
    asked = {"settings": {**SETTINGS, "method": "decode"}}
    assert check(3.0, method="replay+decode", **asked)[0] == "skip"
    assert check(3.0, of="decoded_dgap", method="decode", **asked)[0] == "fail"


def test_without_gaps_nothing_is_judged() -> None:
    status, said = check(math.nan)
    assert status == "skip" and "knows no gaps" in said


def test_bits_that_are_the_golden_s_own_moved_by_nothing() -> None:
    status, said = check(0.0, of="decoded_dgap", method="decode")
    assert status == "pass" and said.startswith("gaps moved 0 times")


def test_a_waiver_of_everything_waives_it_where_fp32_was_observed() -> None:
    fp32 = {"compute_class": "fp32", "product_bits": 24.0, "sum_bits": 24.0, "detail": ""}
    assert check(3.0, thresholds=Thresholds(fp32_waiver="all"), observed=fp32)[0] == "skip"
    assert check(3.0, thresholds=Thresholds(fp32_waiver="explained"), observed=fp32)[0] == "fail"
    assert check(3.0, thresholds=Thresholds(fp32_waiver="all"))[0] == "fail"
