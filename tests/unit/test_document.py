from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pytest_repro import judging, merging, schemas
from pytest_repro.comparison import compare_decode
from pytest_repro.errors import ConfigError, EngineError, GoldenMissing
from pytest_repro.fingerprint import Change
from pytest_repro.judging import Gathered
from pytest_repro.report import document
from pytest_repro.result import Recording, SuiteResult, Texts
from pytest_repro.suite import Shard
from pytest_repro.verdict import Verdict
from tests.unit.builders import BF16, IDENTITY, SETTINGS, generation, golden, judged, output, suite, suite_result


def checked(watched: list[float] | None) -> SuiteResult:
    """A whole way through judging: one prompt that parts, one that does not, one that is new."""
    of = suite("a", "b", "c", answers={"a": "2", "b": "4"})
    then = golden(generation(output("a", [1, 2]), output("b", [4])), scores=(True, True))
    now = generation(output("a", [1, 9], watched=watched), output("b", [4]))
    start = judging.blank(of, "bf16", "bf16", None, "golden/s")
    start = judging.replace(start, environment=IDENTITY, observed=BF16, settings=SETTINGS)
    start = judging.against(start, then, of, frozenset())
    evidence = Gathered(None, compare_decode(then.generation, now), now)
    return judging.judge_all(start, of, then, evidence, lambda tokens: "\ud800\x1b", False)


BLANK = judging.replace(judging.blank(suite("a"), "fp32", "fp32", None, ""), settings=SETTINGS)
RESULTS = {
    "passed": suite_result(judged("a"), judged("b", score_golden=True, score_now=False)),
    "judged": checked([-0.5, -0.75]),
    "judged-unknown": checked(None),
    "missing": judging.broken(BLANK, GoldenMissing("none", fix="record it")),
    "error": judging.broken(BLANK, EngineError("out of memory")),
    "odd": suite_result(
        judged("a", Verdict.DRIFT, divergence_index=0, golden_text=Texts("\x1b", "\ud800", "é"), deficit=0.5),
        environment_diff=(Change("torch", "numerics", None, "2.14"), Change("gpu.mig", "numerics", True, 1.5)),
        notes=("x",),
        next_steps=(("cmd", ""),),
    ),
    "calibrated": suite_result(
        judged("a"), calibrated=("2026-12-01",), envelope_diff=(Change("threads", "numerics", 1, 2),)
    ),
    "calibrated just here": suite_result(judged("a"), calibrated=("\x1b[31m",), envelope_diff=()),
}


@pytest.mark.parametrize("result", RESULTS.values(), ids=RESULTS)
def test_a_report_validates_against_its_schema(tmp_path: Path, result: SuiteResult) -> None:
    document.write(tmp_path / "report.json", document.of_session([document.of_suite(result)], []))
    raw = (tmp_path / "report.json").read_bytes()
    assert raw.isascii() and b"\x1b" not in raw
    report = json.loads(raw, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert schemas.first_error(report, "report") is None
    found = report["suites"][0]
    assert found["verdict"] == report["verdict"] == ("pass" if result.passed else "fail")
    assert found["counts"] == {str(v): n for v, n in result.counts.items()}
    assert [p["id"] for p in found["prompts"]] == [p.id for p in result.prompts]


def test_the_schema_refuses_what_is_not_a_report() -> None:
    report = document.of_session([document.of_suite(RESULTS["passed"])], [])
    report["suites"][0]["prompts"][0]["verdict"] = "fine"
    error = schemas.first_error(json.loads(json.dumps(report)), "report")
    assert error is not None and list(error.absolute_path) == ["suites", 0, "prompts", 0, "verdict"]


def test_what_a_judged_suite_says() -> None:
    known, unknown = (document.of_suite(RESULTS[name]) for name in ("judged", "judged-unknown"))
    assert [p["verdict"] for p in known["prompts"]] == ["near_tie", "identical", "missing"]
    assert [p["deficit"] for p in known["prompts"]] == [0.25, 0.0, None]
    assert [p["deficit"] for p in unknown["prompts"]] == [None, 0.0, None]
    assert [p["fails"] for p in known["prompts"]] == ["divergent 1 > max_divergent 0", None, "1 missing"]
    assert known["failures"] == ["1 missing", "divergent 1 > max_divergent 0"] and known["observed_compute"] == "bf16"


def test_a_session_fails_if_one_suite_does() -> None:
    passed, failed = (document.of_suite(RESULTS[name]) for name in ("passed", "missing"))
    assert document.of_session([passed, failed], [])["verdict"] == "fail"
    assert document.of_session([passed], [])["verdict"] == document.of_session([], [])["verdict"] == "pass"
    assert document.of_session([failed, passed], [])["environment"] == passed["environment"] != {}
    recording = Recording(
        "s", "golden/s", "bf16", "bf16.pending.jsonl", 3, None, 1, 8, None, {"max_deficit": 0.25}, 1.0
    )
    report = document.of_session([], [document.of_recording(recording)])
    assert schemas.first_error(report, "report") is None and report["recordings"][0]["changed"] is None


# --- read again -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("result", [r for name, r in RESULTS.items() if name != "odd"])
def test_a_report_that_is_read_says_what_was_written(tmp_path: Path, result: SuiteResult) -> None:
    shard = judging.replace(result, shard=Shard(1, 1), shard_size=len(result.prompts))
    file = tmp_path / "report.json"
    document.write(file, document.of_session([document.of_suite(shard)], []))
    (again,) = document.read(file)
    assert document.of_suite(again) == document.of_suite(shard)
    assert again.prompts == shard.prompts and again.thresholds == shard.thresholds


HOSTILE: dict[str, tuple[tuple[str | int, ...], Any, str]] = {
    "verdict": (("suites", 0, "prompts", 0, "verdict"), "fine", "prompts.0.verdict"),
    "shard": (("suites", 0, "shard"), "0/3", "shard"),
    "beyond": (("suites", 0, "shard"), "4/3", "shard"),
    "shard-type": (("suites", 0, "shard"), 3, "shard"),
    "batch-size": (("suites", 0, "settings", "batch_size"), 0, "batch_size"),
    "settings": (("suites", 0, "settings"), {}, "settings"),
    "threshold": (("suites", 0, "thresholds", "max_divergent"), -1, "max_divergent"),
    "threshold-nan": (("suites", 0, "thresholds", "max_divergent"), float("nan"), "max_divergent"),
    "threshold-name": (("suites", 0, "thresholds", "x"), 1, "thresholds"),
    "golden": (("suites", 0, "golden", "review"), {"by": 3}, "review.by"),
    "prompt-key": (("suites", 0, "prompts", 0, "x"), 1, "prompts.0"),
    "size": (("suites", 0, "size"), 2.5, "size"),
    "seconds-huge": (("suites", 0, "seconds"), 10**400, "seconds"),
    "empty": (("suites",), [], "holds no check"),
    "schema": (("schema",), 2, "schema 1 is needed"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_report_that_is_none_is_refused(tmp_path: Path, case: str) -> None:
    path, value, told = HOSTILE[case]
    report = json.loads(json.dumps(document.of_session([document.of_suite(RESULTS["passed"])], [])))
    inner = report
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    file = tmp_path / "report.json"
    file.write_text(json.dumps(report))
    with pytest.raises(ConfigError) as refused:
        document.read(file)
    assert told in str(refused.value) and str(file) in refused.value.where and refused.value.fix


def test_a_suite_of_absurd_size_is_refused_at_once(tmp_path: Path) -> None:
    huge = judging.replace(RESULTS["passed"], size=10**15, shard=Shard(1, 1))
    with pytest.raises(ConfigError, match="judged 2 of its 1000000000000000 prompts"):
        merging.result_of([("x.json", huge)])
