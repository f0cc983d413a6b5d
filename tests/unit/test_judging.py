from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from pytest_repro import checks, judging
from pytest_repro.accuracy import paired_test
from pytest_repro.comparison import compare_decode, compare_replay
from pytest_repro.errors import EngineError, GoldenError, GoldenMissing, ReproError
from pytest_repro.fingerprint import Change
from pytest_repro.generation import Output, Scores
from pytest_repro.golden import Golden
from pytest_repro.judging import Gathered
from pytest_repro.result import PromptResult, SuiteResult, Texts
from pytest_repro.suite import Prompt, Suite, Thresholds
from pytest_repro.verdict import Judgement, Verdict
from tests.unit.builders import (
    BF16,
    FP32,
    IDENTITY,
    envelope,
    generation,
    golden,
    judged,
    output,
    request,
    scores,
    suite,
    suite_result,
)  # fmt: skip

NOW = {**IDENTITY, "engine": "scripted", "engine_version": "1.0", "batch_size": 4, "time": "2026-11-22"}
ABC = suite("a", "b", "c")
GOLDEN = golden(generation(*(output(name, [1, 2, 3, 4], gap=[1, 0.5, 1, 1]) for name in "abc")))


def blank(of: Suite = ABC, mode: str = "bf16", selected: set[str] | None = None, **changes: Any) -> SuiteResult:
    result = judging.blank(
        of, mode, None if mode == "native" else mode, None if selected is None else frozenset(selected), "golden/s"
    )
    return replace(result, **{"environment": NOW, "observed": BF16, "golden": judging.described(GOLDEN), **changes})


def verdicts(result: SuiteResult) -> list[str]:
    return [str(p.verdict) for p in result.prompts]


def spell(tokens: Sequence[int]) -> str:
    return "".join(f" {t}" for t in tokens)


def gathered(
    replayed: list[Scores] | None = None, decoded: list[Output] | None = None, against: Golden = GOLDEN
) -> Gathered:
    now = generation(*decoded) if decoded is not None else None
    return Gathered(
        compare_replay(against.generation, replayed) if replayed is not None else None,
        compare_decode(against.generation, now) if now is not None else None,
        now,
    )


def judge_one(
    replayed: Scores | None = None, decoded: Output | None = None, of: Suite | None = None, **changes: Any
) -> PromptResult:
    """The verdict on prompt `a` alone. Its golden's envelope: deficit 0.25, benign |Δlogp| 0.5, up to 1.0 in bf16."""
    evidence = gathered(None if replayed is None else [replayed], None if decoded is None else [decoded])
    start = blank(of or ABC, selected={"a"}, **changes)
    return judging.judge_all(start, of or ABC, GOLDEN, evidence, spell, False).prompts[0]


# --- before anything ran --------------------------------------------------------------------------------------------


def test_blank_holds_what_was_selected_and_the_size_of_the_whole() -> None:
    of = replace(ABC, thresholds={"": Thresholds(), "bf16": Thresholds(max_divergent=1.0)})
    result = blank(of, selected={"a", "c"})
    assert [p.id for p in result.prompts] == ["a", "c"] and result.size == 3
    assert result.path == "golden/s" and result.thresholds.max_divergent == 1.0
    assert verdicts(blank()) == ["identical"] * 3


@pytest.mark.parametrize(
    ("error", "verdict", "check"),
    [
        (GoldenMissing("there is no golden", fix="pytest --repro-update golden/s"), "missing", "golden"),
        (GoldenError("edited by hand", where="x.jsonl", fix="git checkout -- x.jsonl"), "error", "golden"),
        (EngineError("out of memory"), "error", "compute"),
    ],
)
def test_what_broke_is_the_verdict_on_every_prompt(error: ReproError, verdict: str, check: str) -> None:
    result = judging.broken(blank(selected={"a", "b"}), error)
    assert verdicts(result) == [verdict] * 2 and {p.reason for p in result.prompts} == {error.what}
    assert [(c.name, c.status, c.message) for c in result.checks] == [(check, "fail", str(error))]
    assert result.next_steps == (((error.fix, ""),) if error.fix else ()) and not result.passed


# --- against a golden -----------------------------------------------------------------------------------------------


def test_against_the_same_environment_everything_may_be_compared() -> None:
    result = judging.against(blank(), GOLDEN, ABC, frozenset())
    assert verdicts(result) == ["identical"] * 3 and result.notes == ()
    assert [c.field for c in result.environment_diff] == ["time"] and result.equal_fields == 5
    assert result.golden is not None and result.envelope_deficit == 0.25
    assert (result.golden["name"], result.golden["engine"]) == ("bf16", "scripted 1.0")


@pytest.mark.parametrize(
    ("allowed", "wanted"),
    [
        ((), "incomparable"),
        (("model",), "incomparable"),
        (("tokenizer",), "incomparable"),
        (("model", "tokenizer"), "identical"),
    ],
)
def test_another_identity_is_another_question_unless_allowed(allowed: tuple[str, ...], wanted: str) -> None:
    now = {**NOW, "model.weights": "sha256:other", "tokenizer": "sha256:other"}
    result = judging.against(blank(environment=now), GOLDEN, ABC, frozenset(allowed))
    assert verdicts(result) == [wanted] * 3
    assert result.notes == (("identity differs: model.weights, tokenizer",) if wanted == "identical" else ())
    barred = {"model": "tokenizer", "tokenizer": "model.weights"}.get("".join(allowed), "model.weights, tokenizer")
    reason = f"{barred} differ: the golden answers another question" if wanted == "incomparable" else ""
    assert result.prompts[0].reason == reason


def test_prompts_new_edited_and_gone() -> None:
    of = replace(suite("a", "b", "d"), prompts=(*suite("a").prompts, Prompt("b", "edited"), *suite("d").prompts))
    result = judging.against(blank(of), GOLDEN, of, frozenset())
    assert verdicts(result) == ["identical", "incomparable", "missing"]
    assert result.prompts[1].reason == "the prompt was edited"
    assert len(result.notes) == 1 and result.notes[0].startswith("unused in the golden: c ")


def test_a_golden_of_another_class_or_without_an_envelope_is_noted() -> None:
    blind = replace(GOLDEN, noise=replace(GOLDEN.noise, variants=()))
    result = judging.against(blank(mode="fp32", observed=FP32), blind, ABC, frozenset())
    assert "another compute class, bf16" in result.notes[0] and "no noise envelope" in result.notes[1]
    assert result.envelope_deficit == 0.0


@pytest.mark.parametrize(("mode", "wanted"), [("native", 1), ("bf16", 1), ("fp32", 2)])
def test_thresholds_are_those_of_the_mode_or_else_of_what_was_observed(mode: str, wanted: int) -> None:
    of = replace(ABC, thresholds={"": Thresholds(), "bf16": Thresholds(1), "fp32": Thresholds(2)})
    assert judging.against(blank(of, mode), GOLDEN, of, frozenset()).thresholds.max_divergent == wanted


# --- what must not run, and what must be decoded --------------------------------------------------------------------


def test_a_prompt_too_long_is_an_error_and_other_tokens_are_incomparable() -> None:
    requests = [request("a"), replace(request("b"), tokens=request("long prompt").tokens), request("z")]
    found = judging.unanswerable(None, ABC, requests, GOLDEN, {"a", "b"}, frozenset())
    assert {k: v.verdict for k, v in found.items()} == {"b": Verdict.INCOMPARABLE}
    assert judging.unanswerable(None, ABC, requests, GOLDEN, {"a", "b"}, frozenset({"tokenizer"})) == {}
    assert judging.unanswerable(None, ABC, requests, GOLDEN, {"a"}, frozenset()) == {}
    found = judging.unanswerable(9, ABC, requests, GOLDEN, {"a", "b"}, frozenset())  # one token and eight new ones fit
    assert {k: v.verdict for k, v in found.items()} == {"b": Verdict.ERROR}
    assert "11 tokens and max_new_tokens = 8 exceed the model's context of 9" in found["b"].reason


def test_doubtful_is_what_flipped_or_moved_as_a_whole() -> None:
    rows = [
        scores("a", [1, 2, 3, 4], logprob=[-1.5] * 4),  # |Δ| 1.0: twice its level, as far as rounding goes
        scores("b", [1, 9, 3, 4], [0, 0, 0, 0]),
        scores("c", [1, 2, 3, 4], logprob=[-1.5, -1.5, -1.5, -1.75]),
    ]
    assert judging.doubtful(compare_replay(GOLDEN.generation, rows), GOLDEN) == {"b", "c"}


# --- verdicts -------------------------------------------------------------------------------------------------------

SAME = [1, 2, 3, 4]
FLIPPED = [1, 9, 3, 4]


@pytest.mark.parametrize(
    ("replayed", "wanted"),
    [
        (scores("a", SAME), "identical"),
        (scores("a", SAME, logprob=[-1.5] * 4), "identical"),
        (scores("a", FLIPPED, [0, 0.25, 0, 0]), "near_tie"),
        (scores("a", FLIPPED, [0, 0.5, 0, 0]), "drift"),
        (scores("a", [9, 2, 9, 4], [0.125, 0, 0.5, 0]), "drift"),
        (scores("a", SAME, logprob=[-2.0] * 4), "drift"),
        (scores("a", FLIPPED, [0, 0.125, 0, 0], logprob=[-2.0] * 4), "drift"),
    ],
    ids=["same", "as-far-as-rounding", "near-tie", "drift", "later-drift", "moved-as-a-whole", "near-tie-but-moved"],
)
def test_replay_alone(replayed: Scores, wanted: str) -> None:
    found = judge_one(replayed)
    assert (str(found.verdict), found.method) == (wanted, "replay")


def test_fp32_waives_what_rounding_explains_and_nothing_else() -> None:
    near, far = scores("a", FLIPPED, [0, 0.25, 0, 0]), scores("a", FLIPPED, [0, 0.5, 0, 0])
    assert judge_one(near, observed=FP32).verdict == Verdict.WAIVED
    assert judge_one(far, observed=FP32).verdict == Verdict.DRIFT
    assert judge_one(far, observed=FP32, thresholds=Thresholds(fp32_waiver="all")).verdict == Verdict.WAIVED
    assert judge_one(near, observed={**FP32, "compute_class": "tf32"}).verdict == Verdict.NEAR_TIE


@pytest.mark.parametrize(
    ("replayed", "decoded", "wanted", "index"),
    [
        (scores("a", SAME), output("a", SAME), "identical", None),
        (scores("a", FLIPPED, [0, 0.125, 0, 0]), output("a", SAME), "identical", None),
        (scores("a", FLIPPED, [0, 0.5, 0, 0]), output("a", SAME), "drift", 1),
        (scores("a", SAME), output("a", [1, 2, 9], watched=[-0.5, -0.5, -0.75]), "near_tie", 2),
        (scores("a", SAME), output("a", [1, 2, 9], watched=[-0.5, -0.5, -1.0]), "drift", 2),
        (scores("a", SAME), output("a", [1, 2, 9], watched=[-0.5, -0.5, -0.375], gap=[1, 1, -0.125]), "drift", 2),
        (scores("a", SAME), output("a", [1, 2, 9]), "drift", 2),
        (scores("a", [1, 2, 3, 9], [0, 0, 0, 0.5]), output("a", [9], watched=[-0.625]), "drift", 0),
        (scores("a", SAME, logprob=[-2.0] * 4), output("a", SAME), "drift", None),
        (scores("a", SAME), output("a", [1, 2]), "drift", 2),
    ],
    ids=[
        "same", "decoder-settles-a-tie", "decoder-agrees-by-luck", "decoder-near-tie", "decoder-drift", "passed-over",
        "unknown-deficit",
        "harmless-then-wrong", "moved-as-a-whole", "ended-early",
    ],
)  # fmt: skip
def test_replay_and_decode(replayed: Scores, decoded: Output, wanted: str, index: int | None) -> None:
    found = judge_one(replayed, decoded)
    assert (str(found.verdict), found.method, found.divergence_index) == (wanted, "replay+decode", index)


def test_a_choice_that_is_not_greedy_is_said() -> None:
    tie = golden(generation(output("a", [1, 2, 3, 4], gap=[1, 0, 1, 1])))
    other = gathered(None, [output("a", [1, 9], watched=[-0.5, -0.5], gap=[1, 0])], tie)
    (tied,) = judging.judge_all(blank(suite("a")), suite("a"), tie, other, spell, False).prompts
    assert tied.verdict == Verdict.DRIFT and tied.deficit == 0.0
    assert tied.reason.startswith("every number is the recording's, bit for bit")
    sampled = judge_one(decoded=output("a", [1, 9], watched=[-0.5, -0.375], gap=[1, -0.125]))
    assert sampled.reason.startswith("a token likelier by 0.12 was passed over") and sampled.deficit == 0.125


def test_decode_alone() -> None:
    found = judge_one(decoded=output("a", [1, 9], watched=[-0.5, -0.75]))
    assert (found.verdict, found.method, found.divergence_index) == (Verdict.NEAR_TIE, "decode", 1)
    assert (found.deficit, found.golden_gap, found.tokens, found.benign_dlogp) == (0.25, 0.5, 4, 0.5)
    assert found.mean_abs_dlogp == 0.125  # 0 at the first token, 0.25 at the second


def test_unknown_numbers_become_none() -> None:
    found = judge_one(decoded=output("a", [1, 9], logprob=[math.nan] * 2, runner_up=[-1, -1]))
    assert found.verdict == Verdict.DRIFT and found.deficit is None and found.mean_abs_dlogp is None


def test_both_texts_are_cut_around_the_divergence() -> None:
    long = list(range(100, 140))
    then = golden(generation(output("a", long)))
    now = output("a", [*long[:20], 7, *long[21:24]])
    result = judging.judge_all(
        blank(suite("a")), suite("a"), then, gathered(decoded=[now], against=then), spell, False
    ).prompts[0]
    before = spell(range(108, 120))
    assert result.golden_text == Texts(before, " 120", spell(range(121, 129)))
    assert result.now_text == Texts(before, " 7", " 121 122 123")
    replayed = judge_one(scores("a", FLIPPED, [0, 0.5, 0, 0]))
    assert replayed.golden_text == Texts(" 1", " 2", " 3 4")
    assert replayed.now_text is not None and (replayed.now_text.before, replayed.now_text.token) == (" 1", " 9")
    assert "not generated further" in replayed.now_text.after
    ended = judge_one(decoded=output("a", [1, 2])).now_text
    assert ended == Texts(" 1 2", "(the text ends)", "")


def test_prompts_that_were_set_aside_keep_their_verdict() -> None:
    start = judging.against(blank(environment={**NOW, "tokenizer": "x"}), GOLDEN, ABC, frozenset())
    assert verdicts(judging.judge_all(start, ABC, GOLDEN, Gathered(), spell, False)) == ["incomparable"] * 3
    found = Gathered(
        compare_replay(GOLDEN.generation, [scores("b", SAME)]), None, None, {"a": Judgement(Verdict.ERROR, "NaN")}
    )
    result = judging.judge_all(blank(selected={"a", "b"}), ABC, GOLDEN, found, spell, False)
    assert verdicts(result) == ["error", "identical"] and result.prompts[0].reason == "NaN"


# --- the suite as a whole -------------------------------------------------------------------------------------------


def test_metrics_by_hand() -> None:
    rows = [scores("a", FLIPPED, [0, 0.125, 0, 0]), scores("b", [1, 2, 3, 9], [0, 0, 0, 0.5]),
            scores("c", SAME, logprob=[-0.5, -0.5, -0.5, -1.25])]  # fmt: skip
    result = judging.judge_all(
        replace(blank(), again="golden/s --repro-batch-size 2"), ABC, GOLDEN, gathered(rows), spell, False
    )
    assert verdicts(result) == ["near_tie", "drift", "identical"]
    assert dict(result.metrics) == {
        "divergent": 2, "unexplained": 1, "waived": 0, "div_percent": pytest.approx(200 / 3), "mean_div_index": 2.0,
        "mean_abs_dlogp": 0.0625, "benign_abs_dlogp": 0.5, "rounding_ratio": 1.0, "rounding_p_value": 1.0, "accuracy_golden": None, "accuracy_now": None,
        "accuracy_p_value": None, "accuracy_smallest_drop": None, "length_ratio": None,
    }  # fmt: skip
    assert [f.rule for f in result.failures] == ["unexplained 1 > max_unexplained 0", "divergent 2 > max_divergent 0"]
    commands = [command for command, _ in result.next_steps]
    assert commands == [
        "pytest --repro-check golden/s --repro-batch-size 2 --repro-numerics fp32",
        "pytest --repro-update golden/s --repro-batch-size 2 --repro-numerics bf16",
    ]


def test_outputs_that_part_where_the_environment_can_be_put_back_name_bisect() -> None:
    parted = judged("a", Verdict.DRIFT, divergence_index=1, deficit=1.0)
    batch = Change("batch_size", "numerics", 8, 1)

    def command(*options: str) -> str:
        result = suite_result(parted, environment_diff=(batch,), again=" ".join(["golden/s", *options]))
        return next((command for command, _ in checks.summed_up(result).next_steps if "bisect" in command), "")

    bisect = "pytest-repro bisect golden/s --numerics bf16"
    assert command() == bisect
    assert command("--repro-batch-size 1") == f"{bisect} --batch-size 1"
    assert command("--repro-engine vllm", "--repro-golden fp32") == f"{bisect} --engine vllm --golden fp32"
    assert command("--repro-engine-option 'attention=a b'") == f"{bisect} --engine-option 'attention=a b'"
    assert (
        command("--repro-model m", "--repro-batch-size 1", "--repro-allow-code")
        == f"{bisect} --batch-size 1 -- --repro-model m --repro-allow-code"
    )


@pytest.mark.parametrize("again", ["golden/s 'x", "golden/s --repro-batch-size"])
def test_a_command_that_was_tampered_with_breaks_nothing(again: str) -> None:
    parted = judged("a", Verdict.DRIFT, divergence_index=1, deficit=1.0)
    result = suite_result(parted, environment_diff=(Change("batch_size", "numerics", 8, 1),), again=again)
    assert checks.summed_up(result).next_steps


@pytest.mark.parametrize(
    ("changes", "more"),
    [
        ((), {}),
        ((Change("torch", "numerics", "2.12", "2.13"), Change("time", "information", 1, 2)), {}),
        ((Change("batch_size", "numerics", 8, 1), Change("model.weights", "identity", "a", "b")), {}),
        ((Change("batch_size", "numerics", 8, 1),), {"again": "tests/test_it.py::test_it"}),
    ],
    ids=["nothing differs", "no knob", "another model", "a test's own"],
)
def test_bisect_is_not_named_where_it_could_undo_nothing(changes: tuple[Change, ...], more: dict[str, Any]) -> None:
    parted = judged("a", Verdict.DRIFT, divergence_index=1, deficit=1.0)
    found = checks.summed_up(suite_result(parted, environment_diff=changes, **more))
    assert found.next_steps and not any("bisect" in command for command, _ in found.next_steps)


def test_bisect_is_not_named_where_no_token_differs() -> None:
    moved = judged("a", Verdict.DRIFT)
    found = checks.summed_up(suite_result(moved, environment_diff=(Change("batch_size", "numerics", 8, 1),)))
    assert found.next_steps and not any("bisect" in command for command, _ in found.next_steps)


def test_a_suite_that_passes_has_no_next_step() -> None:
    result = judging.judge_all(blank(), ABC, GOLDEN, gathered([scores(n, SAME) for n in "abc"]), spell, False)
    assert result.passed and result.next_steps == () and result.metrics["div_percent"] == 0.0
    assert [(c.name, c.status) for c in result.checks] == [
        ("golden", "pass"), ("compute", "pass"), ("rounding", "pass"), ("accuracy", "skip"), ("length", "pass"),
    ]  # fmt: skip


def test_an_unreviewed_golden_fails_even_if_nothing_differs() -> None:
    rows = gathered([scores(n, SAME) for n in "abc"])
    unreviewed = replace(GOLDEN, review=None)
    start = blank(golden=judging.described(unreviewed))
    result = judging.judge_all(start, ABC, unreviewed, rows, spell, False)
    assert verdicts(result) == ["identical"] * 3 and not result.passed
    assert "never reviewed" in result.checks[0].message
    assert result.next_steps[0][0] == "pytest-repro review golden/s"


@pytest.mark.parametrize(
    ("asked", "observed", "status"),
    [
        ("bf16", "bf16", "pass"), ("fp32", "fp32", "pass"), ("native", "bf16", "pass"), ("native", "tf32", "pass"),
        ("fp32", "bf16", "fail"), ("fp32", "tf32", "fail"), ("bf16", "fp32", "fail"), ("fp16", "bf16", "fail"),
        ("fp32", "unknown", "skip"), ("bf16", "unknown", "skip"), ("native", "unknown", "skip"),
    ],
)  # fmt: skip
def test_a_claim_is_held_against_what_was_observed(asked: str, observed: str, status: str) -> None:
    result = suite_result(
        judged("a"),
        numerics=asked,
        claimed=None if asked == "native" else asked,
        observed={**BF16, "compute_class": observed},
    )
    found = checks.summed_up(result)
    assert [c.status for c in found.checks if c.name == "compute"] == [status]
    assert found.passed is (status != "fail")


@pytest.mark.parametrize("policy", ["explained", "all", "none"])
def test_every_report_says_what_the_waiver_was_and_did(policy: Any) -> None:
    waived = [judged("a", Verdict.WAIVED)] if policy != "none" else [judged("a", Verdict.NEAR_TIE)]
    for observed, said in ((FP32, f"fp32_waiver = {policy}: {int(policy != 'none')} waived"),
                           (BF16, f"fp32_waiver = {policy} does not apply: FP32-class compute was not observed")):  # fmt: skip
        result = suite_result(*waived, observed=observed, thresholds=Thresholds(fp32_waiver=policy))
        (check,) = (c for c in checks.summed_up(result).checks if c.name == "compute")
        assert check.message.endswith(said)


def scored(golden_right: int, lost: int, gained: int, n: int = 20) -> SuiteResult:
    rows = [(i < golden_right, lost <= i < golden_right + gained) for i in range(n)]
    return suite_result(*(judged(f"p{i:02}", score_golden=then, score_now=now) for i, (then, now) in enumerate(rows)))


def accuracy_of(result: SuiteResult) -> tuple[str, str]:
    check = next(c for c in checks.summed_up(result).checks if c.name == "accuracy")
    return check.status, check.message


@pytest.mark.parametrize(
    ("lost", "gained", "status"), [(0, 0, "pass"), (4, 0, "pass"), (5, 0, "fail"), (6, 1, "pass"), (7, 1, "fail")]
)
def test_accuracy_fails_on_a_drop_beyond_chance(lost: int, gained: int, status: str) -> None:
    assert accuracy_of(scored(10, lost, gained))[0] == status


def test_accuracy_tells_what_was_lost_and_what_could_be_seen() -> None:
    _, message = accuracy_of(scored(10, 5, 0))
    assert "50.0 % -> 25.0 %" in message and "5 lost, 0 gained, p = 0.031" in message
    assert "20 prompts can show a drop of 25.0 points" in message
    assert "are too few to show a drop" in accuracy_of(scored(4, 0, 0))[1]
    metrics = checks.summed_up(scored(10, 5, 0)).metrics
    assert (metrics["accuracy_golden"], metrics["accuracy_now"], metrics["accuracy_p_value"]) == (50.0, 25.0, 1 / 32)


@pytest.mark.parametrize(
    ("result", "why"),
    [
        (suite_result(judged("a")), "no prompt has an answer"),
        (replace(scored(10, 5, 0), size=21), "only a part of the suite"),
        (suite_result(judged("a", Verdict.DRIFT, score_golden=True)), "only replayed"),
    ],
    ids=["no-answers", "selected", "replayed"],
)
def test_accuracy_is_not_judged_on_a_part(result: SuiteResult, why: str) -> None:
    status, message = accuracy_of(result)
    assert status == "skip" and why in message


def test_accuracy_that_is_not_judged_for_an_error_does_not_blame_the_answers() -> None:
    right = judged("a", score_golden=True, score_now=True)
    status, message = accuracy_of(suite_result(right, PromptResult("b", Verdict.ERROR, "NaN in the logits")))
    assert status == "skip" and "no prompt has an answer" not in message


@pytest.mark.parametrize(
    ("now", "status"),
    [(10, "pass"), (8, "pass"), (12, "pass"), (7, "fail"), (13, "fail"), (None, "skip")],
)
def test_length_is_judged_over_all_prompts_together(now: int | None, status: str) -> None:
    """Two prompts of 10 tokens each; the first is unchanged, so 18 to 22 tokens are within 0.9 to 1.1."""
    unchanged, other = judged("a", tokens=10, tokens_now=10), judged("b", tokens=10, tokens_now=now)
    found = checks.summed_up(suite_result(unchanged, other))
    assert [c.status for c in found.checks if c.name == "length"] == [status]
    assert found.metrics["length_ratio"] == (None if now is None else (10 + now) / 20)


def test_scores_of_a_suite() -> None:
    of = suite("a", "b", "c", answers={"a": "5", "b": "6"})
    assert judging.scores(of, ["is 6", "is 5", "x"], ["b", "a", "c"], False) == (True, True, None)
    texts = replace(GOLDEN.generation, texts=("is 5", "is 6", "x"))
    then = replace(GOLDEN, generation=texts, scores=(False, False, None))  # as scored by another scorer, long ago
    rows = gathered([scores(n, SAME) for n in "abc"], [output("a", FLIPPED, text="is 7"), output("b", SAME, text="6")])
    result = judging.judge_all(blank(of), of, then, rows, spell, False)
    assert [(p.score_golden, p.score_now) for p in result.prompts] == [(True, False), (True, True), (None, None)]
    assert paired_test([True, True], [False, True], 0.05).p_value == result.metrics["accuracy_p_value"] == 0.5


def test_a_changed_model_names_the_way_to_compare_it_all_the_same() -> None:
    changed = (Change("model.weights", "identity", "a", "b"),)
    result = suite_result(PromptResult("a", Verdict.INCOMPARABLE, "x"), environment_diff=changed, again="golden/s")
    found = checks.summed_up(result)
    assert found.checks[0].status == "fail" and "answers another question: model.weights" in found.checks[0].message
    assert found.next_steps[0][0] == "pytest --repro-check golden/s --repro-numerics bf16 --repro-allow-changed model"


def test_level_and_ratio_are_those_of_the_golden() -> None:
    """FP32 goldens bear ten times their noise, 16-bit ones twice."""
    rows = [scores("a", SAME, logprob=[-2.5] * 4)]  # moved by four times its level
    then = replace(GOLDEN, compute_class="fp32", noise=envelope(3, "fp32"))
    start = blank(selected={"a"})
    assert verdicts(judging.judge_all(start, ABC, then, gathered(rows, against=then), spell, False)) == ["identical"]
    assert verdicts(judging.judge_all(start, ABC, GOLDEN, gathered(rows), spell, False)) == ["drift"]


def test_a_bug_that_only_decoding_has_is_seen_although_no_token_flips() -> None:
    """The replay is clean, and every decoded token moved by three times the benign level: a broken cache, say."""
    moved = [gathered([scores("a", SAME)], [output("a", SAME, logprob=[-0.5 - x] * 4)]) for x in (0.0, 1.5)]
    asked = blank(selected={"a"})
    found = [judging.judge_all(asked, ABC, GOLDEN, rows, spell, False).prompts[0] for rows in moved]
    assert [str(p.verdict) for p in found] == ["identical", "drift"]
