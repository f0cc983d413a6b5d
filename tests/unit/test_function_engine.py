from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_repro.engines.base import Spec, opener
from pytest_repro.engines.function import FunctionEngine, from_function, from_name
from pytest_repro.errors import ConfigError, EngineError
from pytest_repro.generation import Generation
from pytest_repro.numerics import mode
from pytest_repro.suite import Prompt
from tests.unit.builders import request

SPEC = Spec(mode=mode("native"), max_new_tokens=8, folder=Path("golden/s"))
REQUESTS = [request("a"), request("b")]


def engine(function: Callable[[list[Any]], Any]) -> FunctionEngine:
    return FunctionEngine(function, "mine:f", 8)


def answering(*answers: Any) -> Any:
    return engine(lambda prompts: answers).generate(REQUESTS[: len(answers)])


def echo(prompts: list[Any]) -> list[str]:
    return [f"<{prompt}>" for prompt in prompts]


def test_it_gets_the_batch_as_written_and_its_strings_become_bytes() -> None:
    ticks: list[int] = []
    first, second = engine(echo).generate(REQUESTS, ticks.append)
    assert (first.id, first.text, first.finish_reason) == ("a", "<question a>", "stop")
    assert first.tokens.tolist() == list(b"<question a>") and second.text == "<question b>"
    assert all(math.isnan(x) for x in (*first.logprob, *first.gap)) and set(first.runner_up.tolist()) == {-1}
    assert ticks == [12, 12]


def test_a_mapping_keeps_its_numbers() -> None:
    whole = {"tokens": [300, 7], "text": "hi", "finish_reason": "length", "logprob": [-0.5, -1], "gap": [1, 2], "runner_up": [8, 9]}  # fmt: skip
    (found,) = answering(whole)
    assert (found.tokens.tolist(), found.text, found.finish_reason) == ([300, 7], "hi", "length")
    assert (found.logprob.tolist(), found.gap.tolist(), found.runner_up.tolist()) == ([-0.5, -1.0], [1.0, 2.0], [8, 9])
    (bare,) = answering({"tokens": [72, 105]})
    assert (bare.text, bare.finish_reason) == ("Hi", "stop") and math.isnan(bare.logprob[0])
    (ids,) = answering({"tokens": [300, 7], "finish_reason": "eos"})
    assert (ids.text, ids.finish_reason) == (" 300 7", "stop")


@pytest.mark.parametrize(
    "answers",
    [
        pytest.param((None, "x"), id="none"),
        pytest.param((3, "x"), id="number"),
        pytest.param(({"text": "no tokens"}, "x"), id="no-tokens"),
        pytest.param(({"tokens": ["a"]}, "x"), id="tokens-are-text"),
        pytest.param(({"tokens": [1, 2], "logprob": [-0.5]}, "x"), id="fewer-numbers-than-tokens"),
        pytest.param(("\ud800", "x"), id="lone-surrogate"),
    ],
)
def test_an_answer_of_another_kind_is_an_error_of_the_engine(answers: tuple[Any, ...]) -> None:
    with pytest.raises(EngineError, match="mine:f"):
        Generation.of(REQUESTS, answering(*answers))


def test_an_answer_for_every_prompt_or_an_error() -> None:
    with pytest.raises(EngineError, match="was given 2 prompts and gave 1 answers"):
        engine(lambda prompts: prompts[:1]).generate(REQUESTS)
    with pytest.raises(EngineError, match="mine:f raised ZeroDivisionError") as caught:
        engine(lambda prompts: 1 // 0).generate(REQUESTS)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(EngineError, match="mine:f raised TypeError"):
        engine(lambda prompts: None).generate(REQUESTS)


def test_it_claims_nothing_that_it_cannot_know() -> None:
    mine = engine(echo)
    assert mine.text_only and mine.observe().compute_class == "unknown" and list(mine.benign()) == []
    with pytest.raises(EngineError, match="cannot replay") as caught:
        mine.replay(REQUESTS)
    assert caught.value.fix == "--repro-method decode"


def test_how_much_it_is_asked_for_is_its_identity() -> None:
    facts = engine(echo).facts()
    assert facts["engine"] == "mine:f" and facts == FunctionEngine(echo, "mine:f", 8).facts()
    assert facts["generation"] != FunctionEngine(echo, "mine:f", 9).facts()["generation"]


def test_encode_and_decode() -> None:
    mine = engine(echo)
    assert mine.encode(Prompt("p", "é")) == [0xC3, 0xA9] and mine.decode([0xC3, 0xA9]) == "é"
    assert mine.encode(Prompt("p", [{"role": "user", "content": "x"}])) == list(b'[{"role": "user", "content": "x"}]')
    assert mine.decode([255]) == "\ufffd" and mine.decode([]) == ""


def test_opening_a_callable() -> None:
    with from_function(echo)(SPEC) as mine:
        assert mine.name == f"{__name__}:echo" and mine.facts()["engine"] == mine.name
    with from_function(echo, "known")(SPEC) as mine:
        assert mine.name == "known"


@pytest.mark.parametrize(
    "entry", [from_name, lambda name, allow: opener(name, allow_code=allow)], ids=["name", "opener"]
)
def test_code_that_a_suite_names_needs_the_opt_in(entry: Any) -> None:
    with pytest.raises(ConfigError, match="may not run code by itself") as caught:
        entry(f"{__name__}:echo", False)
    assert "--repro-allow-code" in caught.value.fix
    with entry(f"{__name__}:echo", True)(SPEC) as mine:
        assert mine.generate(REQUESTS[:1])[0].text == "<question a>"


@pytest.mark.parametrize("name", ["no_such_module:f", f"{__name__}:no_such", f"{__name__}:", ":f"])
def test_code_that_cannot_be_imported(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be imported"):
        from_name(name, True)


def test_an_unknown_engine() -> None:
    with pytest.raises(ConfigError, match=r"unknown engine 'vlm'; known: .*module:function"):
        opener("vlm")
