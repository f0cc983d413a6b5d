"""Envelopes of other machines: which one judges where, and what is kept of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pytest_repro import asking, calibration, checks, judging, recording
from pytest_repro.calibration import MOST, basis, change_of, facts, moved, spoken, united, with_calibration
from pytest_repro.errors import ConfigError, EngineError, GoldenError
from pytest_repro.fingerprint import Change
from pytest_repro.golden import Golden, signed
from pytest_repro.noise import Calibration, Envelope
from pytest_repro.suite import Shard
from pytest_repro.verdict import Verdict
from tests.unit.builders import (
    IDENTITY,
    envelope,
    f32,
    generation,
    golden,
    judged,
    output,
    suite,
    suite_result,
    variant,
)

HERE = {"engine": "scripted", "engine_version": "1.0", "batch_size": 4}
"""The builders' recording, as far as numerics go."""
TWO = generation(output("a", [1, 2]), output("b", [3, 4]))
RECORDED = signed(golden(TWO))
WHERE = "golden/s/bf16.pending.jsonl"


def on(machine: str, *, day: int = 1, levels: tuple[float, float] = (0.25, 0.25), **more: Any) -> Calibration:
    """A calibration on a processor of this name."""
    fingerprint = {**HERE, "compute_class": "bf16", "cpu_model": machine, "host": machine, "time": f"2026-12-0{day}T10:00", **more}  # fmt: skip
    known = Envelope("bf16", (variant("replay", max_abs_dgap=1.0), variant("1 thread")), f32([0.5, 0.5]), f32(levels))
    return Calibration(fingerprint, known)


def having(*calibrations: Calibration, **changes: Any) -> Golden:
    return signed(replace(RECORDED, calibrations=calibrations, **changes))


def now(**more: Any) -> dict[str, Any]:
    return {**IDENTITY, **HERE, "compute_class": "bf16", "time": "2027-01-01", **more}


# --- which one judges -----------------------------------------------------------------------------------------------


def test_a_calibration_keeps_numerics_and_what_names_the_machine() -> None:
    environment = {**now(cpu_model="x"), "host": "h", "commit": "c", "python": "3.11", "env.MKL_CBWR": "AVX2"}
    kept = facts(environment)
    assert kept["env.MKL_CBWR"] == "AVX2" and kept["compute_class"] == "bf16" and (kept["host"], kept["time"]) == ("h", "2027-01-01")  # fmt: skip
    assert not {"commit", "python", *IDENTITY} & set(kept)


def test_where_the_recording_holds_it_judges_whatever_was_calibrated() -> None:
    found = basis(having(on("x")), now())
    assert found.calibration is None and found.golden.noise is not on("x").envelope
    assert found.golden.noise.max_deficit == RECORDED.noise.max_deficit


def test_another_machine_is_judged_with_its_own_calibration() -> None:
    found = basis(having(on("x"), on("y", levels=(0.75, 0.75))), now(cpu_model="y"))
    assert found.calibration is not None and found.calibration.fingerprint["cpu_model"] == "y"
    assert found.golden.noise.gap_level.tolist() == [0.75, 0.75] and found.changes == ()
    assert found.golden.digest == having(on("x"), on("y", levels=(0.75, 0.75))).digest


@pytest.mark.parametrize(
    "more", [{"cpu_model": "z"}, {"cpu_model": "x", "torch": "3"}, {"cpu_model": "x", "env.MKL_CBWR": "AVX2"}]
)
def test_a_machine_that_nobody_calibrated_has_the_recordings_envelope(more: dict[str, Any]) -> None:
    found = basis(having(on("x")), now(**more))
    assert found.calibration is None
    assert set(more) <= {change.field for change in found.changes}


def test_what_a_calibration_measured_may_differ_and_threads_only_if_it_did() -> None:
    there = on("x", threads=2)
    assert basis(having(there), now(cpu_model="x", threads=8, batch_size=1)).calibration is not None
    single = replace(there, envelope=replace(there.envelope, variants=(variant("replay"),)))
    assert basis(having(single), now(cpu_model="x", threads=8)).calibration is None


def test_of_those_that_hold_the_nearest_judges() -> None:
    near, exact = on("x", threads=2), on("x", threads=8, levels=(0.75, 0.75))
    assert basis(having(near, exact), now(cpu_model="x", threads=8)).calibration.fingerprint["threads"] == 8  # type: ignore[union-attr]
    assert basis(having(near, exact), now(cpu_model="x", threads=4)).calibration.fingerprint["threads"] == 2  # type: ignore[union-attr]


def test_precision_takes_no_room_beside_a_calibration_either() -> None:
    """A KV cache of 8 bits on a calibrated machine is held against that machine's rounding, with the narrow margin."""
    found = basis(having(on("x")), now(cpu_model="x", kv_cache_dtype="fp8"))
    assert found.calibration is not None and [c.field for c in found.changes] == ["kv_cache_dtype"]


def test_a_hostile_fingerprint_covers_nothing_it_does_not_name() -> None:
    odd = Calibration({"engine": "\x1b[31m", "*": "?", "cpu_model": None, "batch_size": True}, on("x").envelope)
    assert basis(having(odd), now(cpu_model="y")).calibration is None


# --- in a check -----------------------------------------------------------------------------------------------------


def check_on(machine: str, factor: float, *calibrations: Calibration) -> Any:
    names = [f"p{i}" for i in range(8)]
    recorded = golden(generation(*(output(name, [1]) for name in names)), noise=envelope(8))
    there = [replace(c, envelope=replace(envelope(8), gap_level=f32([0.25] * 8))) for c in calibrations]
    base = suite_result(
        environment=now(cpu_model=machine), environment_diff=(Change("cpu_model", "numerics", None, machine),),
        again="golden/s --repro-batch-size 4",
    )  # fmt: skip
    result, judging_golden = judging.on_basis(base, replace(recorded, calibrations=tuple(there)))
    rows = [
        judged(name, benign_dgap=float(judging_golden.noise.gap_level[i]), mean_abs_dgap=0.125 * factor)
        for i, name in enumerate(names)
    ]
    variants = {"variants": calibration.variants(judging_golden.noise)}
    return checks.summed_up(replace(result, prompts=tuple(rows), size=8, envelope=variants))


def rounding_of(result: Any) -> tuple[str, list[str]]:
    found = next(c for c in result.checks if c.name == "rounding")
    return found.status, found.message.split("\n")


def test_a_calibrated_machine_has_the_narrow_margin_at_its_own_level() -> None:
    status, said = rounding_of(check_on("x", 2.05, on("x")))
    assert status == "pass" and "gaps moved 1.02 times" in said[0] and "0 beyond 1.1" in said[0]
    assert said[1:] == ["rounding measured here by calibrate on 2026-12-01"]
    failed = check_on("x", 2.6, on("x"))
    status, said = rounding_of(failed)
    assert status == "fail" and "8 beyond 1.1" in said[0] and "calibrate golden" not in str(failed.next_steps)


def test_an_uncalibrated_one_has_the_wide_margin_and_is_told_the_command() -> None:
    status, said = rounding_of(check_on("y", 1.5, on("x")))
    assert status == "pass" and "0 beyond 2" in said[0]
    assert said[1] == (
        "2 and not 1.1, since cpu_model differ: their rounding was not measured; to measure it: "
        "pytest-repro calibrate golden/s --numerics bf16 --batch-size 4"
    )


def test_what_calibrate_would_refuse_is_not_offered() -> None:
    status, said = rounding_of(check_on("y", 2.6))
    assert status == "fail" and said[1].endswith("not measured, and calibrate takes no machine that moves so far")
    calm = check_on("y", 1.5)
    for change in (Change("dtype", "numerics", "bfloat16", "float16"), Change("tokenizer", "identity", "a", "b")):
        barred = checks.summed_up(replace(calm, environment_diff=(*calm.environment_diff, change)))
        assert "calibrate" not in rounding_of(barred)[1][1]
    of_a_test = checks.summed_up(replace(calm, again="tests/test_a.py::test_b"))
    assert "calibrate" not in rounding_of(of_a_test)[1][1]
    other_model = checks.summed_up(replace(calm, again="golden/s --repro-model other"))
    assert "calibrate" not in rounding_of(other_model)[1][1]


def test_the_report_stays_against_the_recording() -> None:
    result = check_on("x", 1.0, on("x"))
    assert [c.field for c in result.environment_diff] == ["cpu_model"] and result.envelope_diff == ()
    assert result.calibrated == ("2026-12-01",)


# --- kept -----------------------------------------------------------------------------------------------------------


def test_a_machine_is_calibrated_once() -> None:
    twice = with_calibration(having(on("x"), on("y")), on("x", day=2), WHERE)
    assert [(c.fingerprint["cpu_model"], c.when) for c in twice.calibrations] == [("x", "2026-12-02"), ("y", "2026-12-01")]  # fmt: skip
    full = having(*(on(f"m{i}") for i in range(MOST)))
    assert len(with_calibration(full, on("m3", day=2), WHERE).calibrations) == MOST
    with pytest.raises(GoldenError, match=f"{MOST + 1} machines would be calibrated"):
        with_calibration(full, on("another"), WHERE)


def test_two_machines_calibrated_from_one_golden_both_stay() -> None:
    standing, candidate = having(on("x")), having(on("y"), review=None)
    both = united(candidate, standing, WHERE)
    assert [c.fingerprint["cpu_model"] for c in both.calibrations] == ["x", "y"]
    assert both.review is None and both.digest == having(on("x"), on("y")).digest != candidate.digest
    assert united(both, both, WHERE).digest == both.digest, "an accept that was interrupted is repeated"


@pytest.mark.parametrize(("first", "second", "stays"), [(1, 2, "2026-12-02"), (2, 1, "2026-12-02")])
def test_of_two_of_one_machine_the_later_stays(first: int, second: int, stays: str) -> None:
    (kept,) = united(having(on("x", day=second)), having(on("x", day=first)), WHERE).calibrations
    assert kept.when == stays


def test_a_new_recording_of_the_same_bits_keeps_them_and_any_other_does_not() -> None:
    standing = having(on("x"))
    again = signed(replace(RECORDED, fingerprint={**RECORDED.fingerprint, "time": "2027"}))
    assert len(united(again, standing, WHERE).calibrations) == 1
    for other in (
        output("b", [3, 4], logprob=[-0.5, -0.50000006]),
        output("b", [3, 5]),
        output("b", [3, 4], gap=[1, 2]),
    ):
        moved_on = signed(golden(generation(output("a", [1, 2]), other)))
        assert united(moved_on, standing, WHERE).calibrations == ()
        assert [state for state, _, _ in change_of(standing, moved_on)] == ["dropped"]


def test_together_they_may_be_too_many() -> None:
    with pytest.raises(GoldenError, match="65 machines") as caught:
        united(having(on("one more")), having(*(on(f"m{i}") for i in range(MOST))), WHERE)
    assert caught.value.where == WHERE


def test_what_becomes_of_calibrations_is_told() -> None:
    before, after = having(on("x"), on("y")), having(on("x"), on("y", day=2), on("z"))
    told = [(state, c.fingerprint["cpu_model"], known and known.when) for state, c, known in change_of(before, after)]
    assert told == [("replaced", "y", "2026-12-01"), ("added", "z", None)]


def test_levels_are_told_as_ratios_over_the_prompts() -> None:
    found = moved(RECORDED.noise, on("x", levels=(0.25, 0.5)).envelope)
    assert found["gap_level"] == {"median": 3.0, "least": 2.0, "most": 4.0}
    assert spoken(found) == (
        "gaps 3 times the recording's level (median of 2 prompts, 2 to 4), |Δlogp| 1 times, largest change of a gap 0.25 -> 1"
    )
    unknown = moved(RECORDED.noise, on("x", levels=(float("nan"), float("nan"))).envelope)
    assert unknown["gap_level"] is None and "not known" in spoken(unknown)


# --- measured -------------------------------------------------------------------------------------------------------


def here(*changes: Change, verdict: Verdict = Verdict.IDENTICAL, **more: Any) -> Any:
    rows = (judged("a", verdict, reason="why"), judged("b"))
    return suite_result(*rows, environment_diff=changes, again="golden/s", **more)


ELSEWHERE = Change("cpu_model", "numerics", "x", "y")


def test_a_machine_beyond_the_recording_can_be_calibrated() -> None:
    calibration.expect_measurable(here(ELSEWHERE), RECORDED)
    calibration.expect_measurable(here(ELSEWHERE, Change("fp32_precision.cuda", "numerics", None, "ieee")), RECORDED)
    calibration.expect_measurable(here(ELSEWHERE, Change("compute_class", "numerics", "bf16", "unknown")), RECORDED)


@pytest.mark.parametrize(
    ("changes", "recorded", "told"),
    [
        ((Change("batch_size", "numerics", 1, 2), ), {"noise": replace(RECORDED.noise, variants=(variant("replay"),))}, "nothing to calibrate"),
        ((), {}, "nothing to calibrate"),
        ((ELSEWHERE, Change("dtype", "numerics", "bfloat16", "float16")), {}, "precision itself differs.*dtype bfloat16 -> float16"),
        ((ELSEWHERE, Change("numerics", "numerics", "fp32", "layercast")), {}, "precision itself differs"),
        ((ELSEWHERE, Change("env.NVIDIA_TF32_OVERRIDE", "numerics", None, "1")), {}, "precision itself differs"),
        ((ELSEWHERE, Change("fp32_precision.cuda", "numerics", "ieee", "tf32")), {}, "precision itself differs"),
        ((ELSEWHERE, Change("compute_class", "numerics", "bf16", "fp32")), {}, "precision itself differs"),
        ((ELSEWHERE, Change("model.weights", "identity", "a", "b")), {}, "another question: model.weights differ"),
        ((ELSEWHERE,), {"generation": generation(output("a", [1]), output("b", [1]), output("c", [1]))}, "another question: c differ"),
        ((ELSEWHERE,), {"review": None}, "never reviewed"),
        ((ELSEWHERE,), {"noise": replace(RECORDED.noise, variants=())}, "no envelope of its own"),
    ],
)  # fmt: skip
def test_what_is_not_calibrated(changes: tuple[Change, ...], recorded: dict[str, Any], told: str) -> None:
    with pytest.raises((ConfigError, GoldenError), match=told) as caught:
        calibration.expect_measurable(here(*changes), replace(RECORDED, **recorded))
    assert caught.value.where == "golden/s" and caught.value.fix


def test_an_edited_prompt_is_not_calibrated() -> None:
    with pytest.raises(ConfigError, match="another question: a differ"):
        calibration.expect_measurable(here(ELSEWHERE, verdict=Verdict.INCOMPARABLE), RECORDED)


def reasons(moved_by: float, prompts: int = 8, **more: Any) -> list[str]:
    rows = [judged(f"p{i}", benign_dgap=0.125, mean_abs_dgap=0.125 * moved_by, **more) for i in range(prompts)]
    variants = {"variants": ("replay",)}
    return list(
        calibration.moves_too_much(
            checks.summed_up(suite_result(*rows, environment_diff=(ELSEWHERE,), envelope=variants)), 2.0
        )
    )


def test_a_machine_that_moves_more_than_the_wide_margin_is_refused() -> None:
    assert reasons(1.9) == []
    assert len(reasons(2.6)) == 1 and "more than rounding moves them" in reasons(2.6)[0]
    assert reasons(1.0, verdict=Verdict.NEAR_TIE) == [], "rounding may move any output"
    (drift,) = reasons(1.0, verdict=Verdict.DRIFT, reason="far off")
    assert drift.startswith("8 of 8 prompts drift: p0: far off; p1: far off; p2: far off; …")


def test_prompts_too_few_for_the_test_refuse_by_what_is_seen() -> None:
    assert reasons(1.9, 3) == [] and len(reasons(2.6, 3)) == 1


def test_a_prompt_without_an_answer_is_an_error_and_no_noise() -> None:
    with pytest.raises(EngineError, match="prompt p0: NaN in logits"):
        reasons(1.0, verdict=Verdict.ERROR, reason="NaN in logits")


def test_a_shard_measures_no_envelope() -> None:
    with pytest.raises(ConfigError, match="a shard cannot measure it"):
        recording.calibrate(suite("a"), "bf16", asking.Options(shard=Shard(1, 2)))
