from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pytest_repro.fingerprint import Change
from pytest_repro.report import document, terminal
from pytest_repro.result import Check, PromptResult, SuiteResult, Texts
from pytest_repro.verdict import Verdict
from tests.unit.builders import ESCAPE, judged, suite_result

HOSTILE = "\x1b]0;owned\x07\x1b[2J\n##[error]bad\r\u202egpj.exe\u2028::error::x"


def parted(name: str, verdict: Verdict, deficit: float | None, index: int = 3, **more: Any) -> PromptResult:
    usual = {
        "golden_text": Texts(" = ", "3", " dollars"), "now_text": Texts(" = ", "4", " dollars"), "golden_gap": 0.5,
        "deficit_index": index,
    }  # fmt: skip
    return judged(name, verdict, divergence_index=index, deficit=deficit, **{**usual, **more})


def shown(result: SuiteResult, **how: bool) -> list[str]:
    return [text for text, _ in terminal.lines(document.of_suite(result), **how)]


def told(result: SuiteResult, **how: bool) -> list[str]:
    """`verdict id` of each prompt's line, in order."""
    known = {str(v) for v in Verdict}
    return [
        " ".join(line.split()[:2]) for line in shown(result, **how) if line.split()[:1] and line.split()[0] in known
    ]


def test_a_suite_that_passed_takes_two_lines() -> None:
    head, counts = shown(suite_result(judged("a"), judged("b")))
    assert head == "PASS  2 prompts against bf16.golden (2026-11-21, scripted 1.0, batch 4), 0 s"
    assert counts.strip() == "2 identical"


def test_the_worst_comes_first() -> None:
    result = suite_result(
        judged("same"),
        parted("near-small", Verdict.NEAR_TIE, 0.125),
        PromptResult("broken", Verdict.ERROR, "NaN"),
        parted("drift-small", Verdict.DRIFT, 0.5),
        parted("waived", Verdict.WAIVED, 0.25),
        parted("drift-unknown", Verdict.DRIFT, None),
        PromptResult("other", Verdict.INCOMPARABLE, "the prompt was edited"),
        parted("near-large", Verdict.NEAR_TIE, 0.25),
        parted("drift-large", Verdict.DRIFT, 2.0),
        PromptResult("new", Verdict.MISSING, "the golden has no such prompt"),
    )
    assert told(result) == [
        "error broken", "incomparable other", "missing new", "drift drift-unknown", "drift drift-large",
        "drift drift-small", "near_tie near-large", "near_tie near-small", "waived waived",
    ]  # fmt: skip
    assert shown(result)[0].startswith("FAIL  10 prompts")


def test_a_prompt_shows_where_and_by_how_much_and_both_texts() -> None:
    lines = shown(suite_result(parted("p17", Verdict.DRIFT, 0.84, reason="the deficit 0.84 exceeds the envelope 0.25")))
    first = next(i for i, line in enumerate(lines) if line.startswith("drift"))
    assert lines[first].split(maxsplit=2) == [
        "drift", "p17", "diverges at token 3 of 8: deficit 0.84, golden's gap 0.5"
    ]  # fmt: skip
    assert lines[first + 1].strip() == "the deficit 0.84 exceeds the envelope 0.25"
    assert lines[first + 2].split(maxsplit=1) == ["golden", "…  = |3| dollars"]
    assert lines[first + 3].split(maxsplit=1) == ["now", "…  = |4| dollars"]


def test_a_larger_deficit_further_on_is_named() -> None:
    prompt = replace(parted("p", Verdict.DRIFT, 0.84), deficit_index=7)
    assert any("deficit 0.84 (largest, at token 7)" in line for line in shown(suite_result(prompt)))
    unknown = suite_result(parted("p", Verdict.DRIFT, None, golden_gap=None))
    assert any(line.endswith("token 3 of 8: deficit unknown") for line in shown(unknown))


def test_ten_prompts_are_shown_and_the_rest_counted() -> None:
    result = suite_result(*(parted(f"p{i:02}", Verdict.DRIFT, i / 4) for i in range(13)))
    assert told(result) == [f"drift p{i:02}" for i in range(12, 2, -1)]
    assert any("and 3 more" in line for line in shown(result))
    assert len(told(result, verbose=True)) == 13 and not any("more" in line for line in shown(result, verbose=True))


def test_one_cause_that_struck_every_prompt_is_told_once() -> None:
    prompts = [PromptResult(f"p{i}", Verdict.ERROR, "out of memory") for i in range(20)]
    result = suite_result(*prompts, checks=(Check("compute", "fail", "out of memory\n  mend: a smaller batch"),))
    lines = shown(result)
    assert [line for line in lines if "out of memory" in line] == [f"{'error':<13} all 20: out of memory"]


def test_suspects_in_their_order_six_at_most() -> None:
    fields = ["batch_size", "attention", "driver", "torch", "cpu_model", "threads", "blas", "mkldnn"]
    changes = tuple(Change(name, "numerics", 1, 2) for name in fields)
    information = Change("time", "information", "a", "b")
    result = suite_result(parted("p", Verdict.DRIFT, 1.0), environment_diff=(*changes, information))
    lines = shown(result)
    first = next(i for i, line in enumerate(lines) if line.startswith("environment"))
    assert lines[first].split()[:5] == ["environment", "batch_size", "1", "->", "2"]
    assert "3 other fields are equal" in lines[first]
    assert [line.split()[0] for line in lines[first + 1 : first + 6]] == fields[1:6]
    assert lines[first + 6].strip() == "… and 2 more"
    everything = [line.split()[0] for line in shown(result, verbose=True) if "->" in line]
    assert everything == ["environment", *fields[1:], "time"]


def test_a_failing_check_is_loud_and_a_passing_one_silent() -> None:
    checks = (Check("golden", "pass", "fine"), Check("length", "fail", "mean output length is 0.5"))
    lines = shown(suite_result(judged("a"), checks=checks))
    assert any(line.split()[:2] == ["length", "FAIL"] for line in lines) and not any("fine" in line for line in lines)


def test_the_command_to_run_next_stands_last() -> None:
    result = suite_result(parted("p", Verdict.DRIFT, 1.0), next_steps=(("cmd one", "if a"), ("cmd two", "")))
    assert [line.split(maxsplit=1) for line in shown(result)[-2:]] == [["next", "cmd one   # if a"], ["cmd", "two"]]


# --- untrusted text -------------------------------------------------------------------------------------------------


def harmless(lines: list[str]) -> bool:
    return all(
        line.isprintable() and "##[" not in line and not line.lstrip().startswith("::") and len(line.splitlines()) == 1
        for line in lines
    )


@pytest.mark.parametrize(
    "hostile",
    [
        {"golden_text": Texts(HOSTILE, HOSTILE, HOSTILE)},
        {"now_text": Texts(HOSTILE, HOSTILE, HOSTILE)},
        {"now_text": Texts("##", "[error]", "x")},
        {"now_text": Texts("x", "##", "[error]")},
        {"reason": HOSTILE},
        {"divergence_index": None, "reason": HOSTILE},
    ],
    ids=["golden", "now", "command-over-the-bar", "command-over-the-second-bar", "reason", "reason-alone"],
)
def test_model_text_is_inert(hostile: dict[str, Any]) -> None:
    lines = shown(suite_result(replace(parted("p", Verdict.DRIFT, 1.0), **hostile)))
    assert harmless(lines) and len(lines) >= 4


@pytest.mark.parametrize(
    "changes",
    [
        {"environment_diff": (Change("torch", "numerics", HOSTILE, HOSTILE),)},
        {"environment_diff": (Change(f"env.{HOSTILE}", "numerics", 1, 2),)},
        {"golden": {**(suite_result(judged("p")).golden or {}), "engine": f"{ESCAPE}1.0"}},
        {"golden": {**(suite_result(judged("p")).golden or {}), "recorded": ESCAPE}},
        {"checks": (Check("golden", "fail", f"accepted by {HOSTILE}"),)},
        {"notes": (f"unused in the golden: {HOSTILE}",)},
        {"path": f"golden/{ESCAPE}", "next_steps": ((f"pytest --repro-update golden/{ESCAPE}", ESCAPE),)},
    ],
    ids=["field-value", "field-name", "golden-engine", "golden-time", "check", "note", "path"],
)
def test_what_a_golden_or_a_folder_says_is_inert_too(changes: dict[str, Any]) -> None:
    """A golden and a folder's name come with a pull request."""
    result = suite_result(parted("p", Verdict.DRIFT, 1.0), **changes)
    assert harmless([*shown(result), terminal.title(document.of_suite(result))])


def test_a_long_value_is_cut() -> None:
    change = Change("cpu_model", "numerics", "sha256:" + "a" * 64, "x" * 100)
    line = next(
        line for line in shown(suite_result(judged("a", Verdict.DRIFT), environment_diff=(change,))) if "->" in line
    )
    assert "sha256:aaaaaaaa… -> " in line and "x" * 47 + "…" in line and "x" * 48 not in line


def test_a_recording() -> None:
    noise = {"mean_abs_dlogp": 0.5, "max_deficit": 0.25}
    record = {"prompts": 3, "golden": "bf16.pending.jsonl", "changed": None, "accuracy": None, "seconds": 2.0,
              "noise": noise, "path": "golden/s", "shard": None, "cut": 0, "max_new_tokens": 8}  # fmt: skip
    lines = [text for text, _ in terminal.recording(record)]
    assert "3 prompts as bf16.pending.jsonl: nothing to compare with, 2 s" in lines[0]
    assert "mean |Δlogp| 0.5" in lines[1] and lines[-1].endswith("pytest-repro review golden/s")
    changed = [text for text, _ in terminal.recording({**record, "changed": 2, "accuracy": 40.0})]
    assert "2 prompts changed, accuracy 40.0 %" in changed[0]


def test_a_part_that_was_recorded_waits_for_the_others() -> None:
    record = {"prompts": 3, "golden": "bf16.1of4.pending.jsonl", "changed": None, "accuracy": None, "seconds": 2.0,
              "noise": {"mean_abs_dlogp": 0.5, "max_deficit": 0.25}, "path": "golden/s", "shard": "1/4",
              "cut": 2, "max_new_tokens": 8}  # fmt: skip
    lines = [text for text, _ in terminal.recording(record)]
    last = lines[-1]
    assert "2 of 3 answers were cut at max_new_tokens = 8" in lines[1]
    assert "pytest-repro merge golden/s" in last and "review" not in last


def test_a_shard_says_which_it_is_and_what_it_leaves() -> None:
    whole = document.of_suite(suite_result(judged("a"), size=4))
    shard = {**whole, "shard": "2/3"}
    assert terminal.title(shard).endswith("[bf16] shard 2/3") and "shard" not in terminal.title(whole)
    assert any("pytest-repro merge --report" in text for text, _ in terminal.lines(shard))
    assert not any("merge" in text for text, _ in terminal.lines(whole))
    empty = {**shard, "prompts": [], "counts": {}, "golden": None}
    assert any("shard 2/3 holds no batch" in text for text, _ in terminal.lines(empty))
