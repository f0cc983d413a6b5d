from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pytest_repro import checks, merging
from pytest_repro import noise as noise_module
from pytest_repro.errors import ConfigError, GoldenError
from pytest_repro.fingerprint import Change
from pytest_repro.generation import Generation, digest, subset
from pytest_repro.golden import Golden, Part, decode, encode
from pytest_repro.noise import envelope
from pytest_repro.result import Check, SuiteResult
from pytest_repro.suite import Shard, Thresholds
from pytest_repro.verdict import Verdict
from tests.unit.builders import BF16, IDENTITY, SETTINGS, generation, golden, judged, output, scores, suite_result

NAMES = "abcdefg"
ALL = generation(
    *(output(name, list(range(i + 1)), logprob=[-0.1 * (i + 1)] * (i + 1)) for i, name in enumerate(NAMES))
)
JITTER = {"batch 1": 0.01, "threads 1": 0.03}


def recorded(g: Generation, **changes: Any) -> Golden:
    """Seven prompts in batches of two, with an envelope measured prompt by prompt."""

    def row(i: int, by: float) -> Any:
        n = g.length(i)
        return scores(g.ids[i], g.tokens[g.span(i)].tolist(), logprob=(g.logprob[g.span(i)] + by * n).tolist())

    replays = {name: [row(i, by) for i in range(len(g))] for name, by in JITTER.items()}
    marks = tuple(name in "aceg" for name in g.ids)
    base = golden(g, scores=marks, noise=envelope("bf16", g, replays), batch_size=2, review=None, digest="")
    return replace(base, **changes)


def part(index: int, count: int = 3, **changes: Any) -> Golden:
    """Through the wire, as `merge` reads it."""
    rows = Shard(index, count).places(len(NAMES), 2)
    own = recorded(subset(ALL, rows), part=Part(index, count, len(NAMES), digest("prompts"), "exact"))
    text, numbers = encode(replace(own, **changes))
    return decode(text, numbers, "golden/s/bf16.pending.jsonl")


def refused(*parts: Golden) -> str:
    with pytest.raises(GoldenError) as told:
        merging.golden_of(parts, where="golden/s")
    assert told.value.fix
    return told.value.what


# --- parts of a golden ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_parts_in_any_order_are_the_golden_of_one_piece(count: int) -> None:
    parts = [part(i, count) for i in range(count, 0, -1)]
    assert encode(merging.golden_of(parts, where="")) == encode(recorded(ALL))


def test_empty_shards_have_no_part() -> None:
    assert encode(merging.golden_of([part(i, 6) for i in (1, 2, 3, 4)], where="")) == encode(recorded(ALL))


def test_an_engine_without_an_envelope() -> None:
    parts = [part(i, noise=envelope("bf16", subset(ALL, Shard(i, 3).places(7, 2)), {})) for i in (1, 2, 3)]
    assert encode(merging.golden_of(parts, where="")) == encode(recorded(ALL, noise=envelope("bf16", ALL, {})))


def test_information_is_joined_and_the_latest_time_counts() -> None:
    facts = recorded(ALL).fingerprint
    own: list[dict[str, Any]] = [
        {"time": "2026-11-22", "host": "x", "cpu_count": 8},
        {"time": "2026-11-24", "host": "y", "cpu_count": 8, "libc": "glibc 2.36"},
        {"time": "2026-11-23", "host": "x", "cpu_count": 8},
    ]
    parts = [part(i, fingerprint={**facts, **more}) for i, more in enumerate(own, 1)]
    found = merging.golden_of(parts, where="").fingerprint
    assert found == {**facts, "time": "2026-11-24", "host": "x, y", "cpu_count": 8, "libc": "glibc 2.36"}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model": "other"}, "model: 'm' in 1/3, 3/3 and 'other' in 2/3"),
        ({"suite": "other"}, "suite: "),
        ({"numerics": "bf16"}, "mode: "),
        ({"compute_class": "fp16"}, "compute_class: 'bf16' in 1/3, 3/3 and 'fp16' in 2/3"),
        ({"device_class": "cuda-sm90"}, "compute_class: 'bf16' in 1/3, 3/3 and 'bf16@cuda-sm90' in 2/3"),
        ({"max_new_tokens": 9}, "generation.max_new_tokens: 8 in 1/3, 3/3 and 9 in 2/3"),
        ({"batch_size": 3}, "generation.batch_size: 2 in 1/3, 3/3 and 3 in 2/3"),
        ({"part": Part(2, 3, 8, digest("prompts"), "exact")}, "size: 7 in 1/3, 3/3 and 8 in 2/3"),
        ({"part": Part(2, 3, 7, digest("others"), "exact")}, "prompts: "),
        ({"part": Part(2, 3, 7, digest("prompts"), "choice")}, "scorer: 'exact' in 1/3, 3/3 and 'choice' in 2/3"),
        ({"part": Part(2, 4, 7, digest("prompts"), "exact")}, "the number of shards: "),
        ({"fingerprint": {**recorded(ALL).fingerprint, "model.weights": "sha256:v"}}, "model.weights: "),
        ({"fingerprint": {**recorded(ALL).fingerprint, "driver": "580"}}, "driver: None in 1/3, 3/3 and '580' in 2/3"),
        ({"fingerprint": {**recorded(ALL).fingerprint, "env.NCCL_ALGO": "Tree"}}, "env.NCCL_ALGO: "),
        ({"noise": envelope("bf16", subset(ALL, [2, 3]), {})}, "noise.variants: 'batch 1, threads 1' in 1/3, 3/3"),
    ],
)
def test_parts_of_another_recording_are_refused_with_the_field(changes: dict[str, Any], told: str) -> None:
    assert f"the shards differ in {told}" in refused(part(1), part(2, **changes), part(3))


def test_every_part_must_be_there_once() -> None:
    assert refused(part(3)) == "parts are missing: 1/3, 2/3"
    assert refused(part(1), part(2), part(2), part(3)) == "a part is there twice"
    assert refused(part(1, 2), *(part(i) for i in (2, 3))).startswith("the shards differ in the number of shards")


def test_a_part_with_other_prompts_than_its_own_is_refused() -> None:
    short = subset(ALL, [2])
    own = replace(recorded(short), part=Part(2, 3, 7, digest("prompts"), "exact"))
    assert refused(part(1), own, part(3)) == "part 2 of 3 holds 1 prompts where 2 belong to it"
    doubled = replace(recorded(subset(ALL, [0, 3])), part=Part(2, 3, 7, digest("prompts"), "exact"))
    assert refused(part(1), doubled, part(3)) == "prompt a is in two parts"
    beyond = replace(recorded(short), part=Part(5, 3, 7, digest("prompts"), "exact"))
    assert refused(part(1), part(2), part(3), beyond) == "part 5 of 3 holds 1 prompts where 0 belong to it"


# --- results of a check ---------------------------------------------------------------------------------------------

ROWS = [
    judged(name, tokens=10, tokens_now=10, score_golden=True, score_now=True, mean_abs_dgap=0.25, benign_dgap=0.25)
    for name in NAMES
]


def shard(index: int, count: int = 3, rows: Any = ROWS, **changes: Any) -> tuple[str, SuiteResult]:
    own = [rows[i] for i in Shard(index, count).places(len(rows), 2)]
    result = suite_result(*own, size=len(rows), shard=Shard(index, count), shard_size=len(own), **changes)
    return f"{index}.json", checks.summed_up(result) if result.golden else result


def message(*shards: tuple[str, SuiteResult]) -> str:
    with pytest.raises(ConfigError) as told:
        merging.result_of(shards)
    assert told.value.fix and told.value.where == "golden/s [bf16]"
    return told.value.what


def test_shards_in_any_order_are_the_check_of_one_piece() -> None:
    whole = checks.summed_up(suite_result(*ROWS))
    found = merging.result_of([shard(i) for i in (2, 3, 1)])
    assert found.notes == ("merged from 3 shards",) and found.shard is None
    assert replace(found, notes=()) == whole
    assert [(c.name, c.status) for c in found.checks] == [
        ("golden", "pass"), ("compute", "pass"), ("rounding", "pass"), ("accuracy", "pass"), ("length", "pass"),
    ]  # fmt: skip


def test_whether_all_moved_is_asked_of_the_whole_and_of_no_shard() -> None:
    rows = [replace(row, mean_abs_dgap=0.5) for row in ROWS]
    shards = [shard(i, rows=rows) for i in (1, 2, 3)]
    assert all(r.passed and "rounding" not in {c.name for c in r.checks if c.status != "skip"} for _, r in shards)
    found = merging.result_of(shards)
    assert not found.passed and [c.name for c in found.checks if c.status == "fail"] == ["rounding"]
    assert found.metrics["rounding_ratio"] == pytest.approx(2.0) and found.metrics["rounding_p_value"] == 2**-7


def test_accuracy_and_length_are_judged_over_all_prompts_and_in_no_shard() -> None:
    lost = [replace(row, score_now=False, tokens_now=5) if row.id in "abcef" else row for row in ROWS]
    shards = [shard(i, rows=lost) for i in (1, 2, 3)]
    for _, result in shards:
        assert result.passed
        assert [c.status for c in result.checks if c.name in ("accuracy", "length")] == ["skip", "skip"]
        assert all("pytest-repro merge --report" in c.message for c in result.checks if c.status == "skip")
    found = merging.result_of(shards)
    assert [c.name for c in found.checks if c.status == "fail"] == ["accuracy", "length"]
    assert found.metrics["accuracy_p_value"] == 1 / 32


@pytest.mark.parametrize(
    ("limit", "shards_pass", "whole_passes"), [(1, True, False), (2, True, False), (3, True, True)]
)
def test_a_count_is_judged_over_the_whole(limit: int, shards_pass: bool, whole_passes: bool) -> None:
    moved = [replace(row, verdict=Verdict.NEAR_TIE) if row.id in "ace" else row for row in ROWS]
    shards = [shard(i, rows=moved, thresholds=Thresholds(max_divergent=limit)) for i in (1, 2, 3)]
    assert all(result.passed for _, result in shards) is shards_pass
    assert merging.result_of(shards).passed is whole_passes


@pytest.mark.parametrize("moved", ["a", "ab", "abc", "ace", "abcd", "g", "abgh", "abcdefg"])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_a_suite_that_fails_by_a_share_has_a_shard_that_fails(moved: str, share: float) -> None:
    rows = [replace(row, verdict=Verdict.NEAR_TIE) if row.id in moved else row for row in ROWS]
    shards = [shard(i, rows=rows, thresholds=Thresholds(max_divergent=share)) for i in (1, 2, 3)]
    if not merging.result_of(shards).passed:
        assert not all(result.passed for _, result in shards)


def test_a_shard_that_broke_fails_the_whole_and_is_named() -> None:
    rows = [replace(row, verdict=Verdict.ERROR, reason="out of memory", method="") for row in ROWS]
    broke = shard(
        2, rows=rows, golden=None, observed=None, environment={}, checks=(Check("compute", "fail", "no memory"),)
    )
    found = merging.result_of([shard(1), broke, shard(3)])
    assert not found.passed and found.counts[Verdict.ERROR] == 2
    assert next(c.message for c in found.checks if c.name == "compute") == "shard 2/3: no memory"
    assert next(c.message for c in found.checks if c.name == "accuracy").endswith("not every prompt could be answered")


def test_shards_that_all_broke_alike_say_it_once() -> None:
    none = (Check("golden", "fail", "there is no golden"),)
    rows = [replace(row, verdict=Verdict.MISSING, method="") for row in ROWS]
    found = merging.result_of([shard(i, rows=rows, golden=None, checks=none) for i in (1, 2, 3)])
    assert found.checks == none and not found.passed and found.metrics == {}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"golden": {**(suite_result().golden or {}), "digest": "sha256:other"}}, "golden: "),
        ({"golden": {**(suite_result().golden or {}), "review": None}}, "review: "),
        ({"observed": {**BF16, "compute_class": "fp32"}}, "observed compute: 'bf16' in 1/3, 3/3 and 'fp32' in 2/3"),
        ({"thresholds": Thresholds(alpha=0.1)}, "thresholds.alpha: 0.05 in 1/3, 3/3 and 0.1 in 2/3"),
        ({"settings": {**SETTINGS, "method": "replay"}}, "method: 'auto' in 1/3, 3/3 and 'replay' in 2/3"),
        ({"settings": {**SETTINGS, "prompts": "sha256:q"}}, "prompts: "),
        ({"settings": {**SETTINGS, "allow_changed": "model"}}, "allow_changed: "),
        ({"claimed": "bf16"}, "claimed_compute: "),
        ({"name": "t"}, "name: 's' in 1/3, 3/3 and 't' in 2/3"),
        ({"environment": {**IDENTITY, "model.weights": "sha256:v"}}, "model.weights: "),
    ],
)
def test_shards_of_another_check_are_refused_with_the_field(changes: dict[str, Any], told: str) -> None:
    assert message(shard(1), shard(2, **changes), shard(3)).startswith(f"the shards differ in {told}")


def test_every_shard_must_be_there_once_and_whole() -> None:
    assert message(shard(3)) == "shards are missing: 1/3, 2/3"
    assert message(*(shard(i) for i in (1, 2, 2, 3))) == "shard 2/3 is there twice: in 2.json and in 2.json"
    assert message(shard(1), shard(2, 4)) == "shards of different splits: of 3 and of 4"
    whole = ("whole.json", suite_result(*ROWS))
    assert message(shard(1), whole) == "whole.json holds a check of the whole suite, no shard"
    name, few = shard(1)
    assert (
        message((name, replace(few, prompts=few.prompts[:1])), shard(2), shard(3))
        == "shard 1/3 judged 1 of its 3 prompts"
    )
    name, doubled = shard(3)
    doubled = replace(doubled, prompts=(ROWS[0], ROWS[5]))
    assert message(shard(1), shard(2), (name, doubled)) == "prompt a is in two shards"


def test_an_empty_shard_has_no_golden_and_no_say() -> None:
    idle = shard(5, 5, golden=None, observed=None, environment={}, thresholds=Thresholds(max_divergent=9))
    found = merging.result_of([*(shard(i, 5) for i in (1, 2, 3, 4)), idle])
    assert found.passed and found.thresholds == Thresholds() and len(found.prompts) == 7


def test_notes_name_who_says_them_and_what_the_machines_differ_in() -> None:
    here, there = {**IDENTITY, "driver": "580"}, {**IDENTITY, "driver": "570"}
    shards = [
        shard(1, environment=here, notes=("all", "one")), shard(2, environment=there, notes=("all",)),
        shard(3, environment=here, notes=("all",)),
    ]  # fmt: skip
    _, said, one, differs = merging.result_of(shards).notes
    assert (said, one) == ("all", "shard 1/3: one")
    assert differs.startswith("the shards differ in driver: '580' in 1/3, 3/3 and '570' in 2/3")


def test_places_need_no_golden_order() -> None:
    assert np.array_equal(np.concatenate([Shard(i, 2).places(5, 2) for i in (1, 2)]), [0, 1, 4, 2, 3])


def test_shards_on_machines_of_their_own_are_asked_by_what_none_of_them_measured() -> None:
    """Each shard has its own machine's levels; the wide margin holds where one of the machines was not calibrated."""
    rows = [replace(row, mean_abs_dgap=row.benign_dgap * 1.5) for row in ROWS if row.benign_dgap is not None]
    other, threads = Change("cpu_model", "numerics", "x", "y"), Change("threads", "numerics", 1, 2)
    there = {"rows": rows, "environment_diff": (other,), "envelope": {"variants": ("replay, 1 thread",)}}
    measured = {**there, "calibrated": ("2026-12-01",), "envelope_diff": (threads,)}
    all_measured = merging.result_of([shard(i, **measured) for i in (1, 2, 3)])
    assert all_measured.envelope_diff == (threads,) and all_measured.calibrated == ("2026-12-01",)
    assert not all_measured.passed and "7 beyond 1.1" in all_measured.checks[2].message
    some = merging.result_of(
        [
            shard(1, **measured),
            shard(2, **there),
            shard(
                3,
                **measured,
            ),
        ]
    )
    assert some.envelope_diff == (threads, other) and some.passed and "0 beyond 2" in some.checks[2].message
    none = merging.result_of([shard(i, **there) for i in (1, 2, 3)])
    assert none.envelope_diff is None and none.calibrated == ()


def test_a_merged_golden_is_calibrated_anew() -> None:
    levels = noise_module.Envelope("bf16", recorded(ALL).noise.variants, *(np.zeros(3, np.float32),) * 2)
    odd = replace(part(1), calibrations=(noise_module.Calibration({"host": "x"}, levels),))
    assert merging.golden_of([odd, part(2), part(3)], where="").calibrations == ()
