from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pytest_repro import traces
from pytest_repro.generation import Output, Scores
from pytest_repro.report import document
from pytest_repro.result import PromptResult, SuiteResult
from pytest_repro.suite import Prompt
from pytest_repro.verdict import Verdict
from tests.unit.builders import envelope, generation, golden, judged, output, scores, suite_result, unwatched

GOLDEN = golden(generation(*(output(name, [1, 2, 3, 4], gap=[1, 0.5, 1, 1]) for name in "ab")))


def spell(tokens: Sequence[int]) -> str:
    return "".join(f"<{t}>" for t in tokens)


def traced(
    *prompts: PromptResult, replayed: Sequence[Scores] = (), decoded: Sequence[Output] = (), watched: bool = True
) -> SuiteResult:
    now = (generation if watched else unwatched)(*decoded) if decoded else None
    asked = [Prompt(p.id, f"question {p.id}") for p in prompts]
    return traces.traced(suite_result(*prompts), asked, GOLDEN, {s.id: s for s in replayed}, now, spell)


def trace_of(result: SuiteResult, name: str = "a") -> dict[str, Any]:
    found = next(p.trace for p in result.prompts if p.id == name)
    assert found is not None
    return dict(found)


def test_a_replay_is_traced_to_the_end_of_the_text() -> None:
    seen = scores("a", [1, 9, 3, 4], deficit=[0, 0.25, 0, 0], logprob=[-0.5, -0.75, -0.5, -1.0], gap=[1, -0.25, 1, 0.5])
    prompt = judged("a", Verdict.NEAR_TIE, divergence_index=1, deficit=0.25)
    found = trace_of(result := traced(prompt, replayed=[seen]))
    assert found["tokens"] == ["<1>", "<2>", "<3>", "<4>"]
    assert found["runner_up"] == ["<99>"] * 4
    assert found["gap"] == [1, 0.5, 1, 1]
    assert found["gap_now"] == [1, -0.25, 1, 0.5]
    assert found["dlogp"] == [0, -0.25, 0, -0.5]
    assert found["deficit"] == [0, 0.25, 0, 0]
    assert result.prompts[0].prompt == "question a"
    assert (result.prompts[0].golden_full, result.prompts[0].now_full) == ("1 2 3 4", None)


def test_a_decoding_is_traced_up_to_its_first_divergence() -> None:
    now = output("a", [1, 7, 3, 4], watched=[-0.5, -0.75, -9, -9], logprob=[-0.25, -0.5, -0.5, -0.5], gap=[2, 1, 1, 1])
    found = trace_of(result := traced(judged("a", Verdict.DRIFT, divergence_index=1, deficit=None), decoded=[now]))
    assert found["dlogp"] == [0.25, -0.25, None, None]
    assert found["gap_now"] == [2, None, None, None]
    assert found["deficit"] == [0, None, None, None]
    assert result.prompts[0].now_full == "1 7 3 4"


def test_a_shorter_text_is_traced_as_far_as_it_goes() -> None:
    found = trace_of(
        traced(judged("a", Verdict.DRIFT, divergence_index=2), decoded=[output("a", [1, 2])], watched=False)
    )
    assert found["dlogp"] == [0, 0, None, None]


def test_an_identical_prompt_keeps_no_texts() -> None:
    result = traced(judged("a"), replayed=[scores("a", [1, 2, 3, 4])])
    assert trace_of(result)["dlogp"] == [0, 0, 0, 0]
    assert (result.prompts[0].golden_full, result.prompts[0].now_full) == (None, None)


@pytest.mark.parametrize("verdict", [Verdict.ERROR, Verdict.MISSING, Verdict.INCOMPARABLE])
def test_what_was_not_compared_is_not_traced(verdict: Verdict) -> None:
    result = traced(PromptResult("a", verdict, "why"), replayed=[scores("a", [1, 2, 3, 4])])
    assert result.prompts[0].trace is None
    assert result.distribution == {"edges": traces.EDGES.tolist(), "counts": [0] * 40, "zeros": 0}


def test_the_worst_prompts_are_traced_where_there_is_no_room_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "MOST_TOKENS", 5)
    worse = judged("b", Verdict.DRIFT, divergence_index=1, deficit=2.0)
    replays = [scores("a", [1, 2, 3, 4]), scores("b", [1, 9, 3, 4], logprob=[-1.5] * 4)]
    result = traced(judged("a", Verdict.NEAR_TIE, divergence_index=1, deficit=0.25), worse, replayed=replays)
    assert [p.trace is not None for p in result.prompts] == [False, True]
    assert result.distribution is not None
    assert (result.distribution["zeros"], sum(result.distribution["counts"])) == (4, 4)  # counts every compared token


def test_the_distribution_counts_by_size_and_the_ends_take_what_lies_beyond() -> None:
    moved = [-0.5 + 1e-30 - 1e-12, -0.5 - 0.02, -0.5 - 900.0, -0.5]
    seen = replace(scores("a", [1, 2, 3, 4]), logprob=np.asarray(moved))
    found = traced(judged("a"), replayed=[seen]).distribution
    assert found is not None
    edges, counts = np.array(found["edges"]), np.array(found["counts"])
    assert (counts[0], counts[-1], found["zeros"]) == (1, 1, 1)
    inner = int(np.flatnonzero(counts[1:-1])[0]) + 1
    assert edges[inner] <= 0.02 < edges[inner + 1]


def test_the_envelope_is_the_goldens() -> None:
    found = traces.described(replace(GOLDEN, noise=envelope(2)))
    assert found == {
        "mean_abs_dlogp": 0.5, "max_abs_dlogp": 1.0, "max_deficit": 0.25, "bulk_ratio": 2.0, "variants": ["batch 1"],
    }  # fmt: skip


def test_traces_come_back_from_a_report(tmp_path: Any) -> None:
    result = traced(
        judged("a", Verdict.NEAR_TIE, divergence_index=1, deficit=0.25),
        replayed=[scores("a", [1, 9, 3, 4], deficit=[0, 0.25, 0, 0])],
    )
    document.write(tmp_path / "r.json", document.of_session([document.of_suite(result)], []))
    (back,) = document.read(tmp_path / "r.json")
    assert back.prompts == result.prompts
    assert (back.envelope, back.distribution) == (result.envelope, result.distribution)
