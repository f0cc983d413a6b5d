"""SGLang's and llama.cpp's servers: found out, asked in token ids, looked at, and what breaks on the way."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pytest_repro.engines.dialects import NAMES, llama_cpp
from pytest_repro.engines.openai_answers import Malformed, Steps, output
from pytest_repro.engines.openai_http import OpenAIEngine
from pytest_repro.errors import ConfigError, EngineError
from pytest_repro.generation import Request
from pytest_repro.suite import Prompt
from pytest_repro.testing import EngineContract

from .asking import alone, errors, for_prompt, opened, requests, watching  # noqa: F401
from .fake_server import END, Refusal, logprobs, serving, text_of

SGLANG = {"speaks": "sglang", "owned_by": "sglang", "version": "0.5.23", "fingerprint": None}
LLAMA_CPP = {"speaks": "llama.cpp", "owned_by": "llamacpp", "version": "b9999-0123abcd"}
BOTH = pytest.mark.parametrize(
    ("state", "path"), [(SGLANG, "/generate"), (LLAMA_CPP, "/completion")], ids=["sglang", "llama.cpp"]
)


class TestSGLang(EngineContract):
    tolerance = 0.0

    @pytest.fixture
    def engine(self) -> Iterator[OpenAIEngine]:
        with serving(**SGLANG) as fake, opened(fake.url, tokens=24) as engine:
            assert engine.replays and not engine.text_only
            yield engine


class TestLlamaCpp(EngineContract):
    @pytest.fixture
    def engine(self) -> Iterator[OpenAIEngine]:
        with serving(**LLAMA_CPP) as fake, opened(fake.url, tokens=24) as engine:
            assert not engine.replays and not engine.text_only
            yield engine


# --- what is asked, and what is made of the answer --------------------------------------------------------------------


@BOTH
def test_token_ids_numbers_and_text_are_the_models(state: dict[str, Any], path: str) -> None:
    with serving(**state) as fake, opened(fake.url, tokens=64) as engine:
        (request,) = requests(engine, "a")
        (output,) = engine.generate([request])
        prefix = request.tokens.tolist()
        for place, token in enumerate(output.tokens.tolist()):
            row = logprobs(prefix, "fp32")
            order = np.argsort(-row)
            assert (token, output.runner_up[place]) == tuple(order[:2])
            assert output.logprob[place] == row[token]
            assert output.gap[place] == row[order[0]] - row[order[1]]
            prefix.append(token)
        assert output.finish_reason == "stop"
        assert output.tokens[-1] == END, "the end-of-sequence token is kept"
        assert output.text == text_of(output.tokens.tolist()[:-1])
        assert engine.decode(output.tokens.tolist()).endswith("<|end|>")
        assert not fake.state.asked("/v1/completions"), "asked in its own way only"


def test_sglang_decodes_greedily_and_takes_nothing_from_its_cache() -> None:
    with serving(**SGLANG) as fake, opened(fake.url) as engine:
        engine.generate(requests(engine, "a"))
        body = fake.state.bodies["/generate"]
        assert body["logprob_start_len"] == 0
        assert (body["return_logprob"], body["top_logprobs_num"], body["stream"]) == (True, 20, False)
        greedy = {"temperature": 0.0, "top_k": 1, "repetition_penalty": 1.0, "min_p": 0.0, "stop": None}
        assert greedy.items() <= body["sampling_params"].items()
        assert "lora_path" not in body


def test_llama_cpp_decodes_greedily_and_takes_nothing_from_its_cache() -> None:
    with serving(**LLAMA_CPP) as fake, opened(fake.url) as engine:
        engine.generate(requests(engine, "a"))
        body = fake.state.bodies["/completion"]
        greedy = {"temperature": 0, "samplers": ["temperature"], "cache_prompt": False, "post_sampling_probs": False}
        assert greedy.items() <= body.items()
        assert (body["n_probs"], body["return_tokens"], body["repeat_penalty"]) == (20, True, 1.0)


def test_an_adapter_of_sglang_is_asked_for_by_its_name() -> None:
    def spoil(path: str, text: str, answer: Any) -> Any:
        if path == "/v1/models":
            base, adapter = ({**answer["data"][0], "id": name} for name in ("tiny", "tuned"))
            return {"data": [base, {**adapter, "parent": "tiny"}]}
        return answer

    with serving(**SGLANG, spoil=spoil) as fake, opened(fake.url, model="tuned") as engine:
        assert not errors(engine.generate(requests(engine, "a")))
        assert fake.state.bodies["/generate"]["lora_path"] == "tuned"


def test_sglang_scores_the_tokens_of_another_models_golden() -> None:
    with serving(**SGLANG) as fake, opened(fake.url) as engine:
        watched = watching(engine, "a")
    with serving(**SGLANG, salt="other weights") as fake, opened(fake.url) as engine:
        (scores,) = engine.replay(watched)
        prefix = watched[0].tokens.tolist()
        assert watched[0].reference is not None
        for place, token in enumerate(watched[0].reference.tolist()):
            row = logprobs(prefix, "fp32", "other weights")
            assert scores.logprob[place] == row[token]
            assert scores.top[place] == row.argmax()
            assert scores.deficit[place] == np.float32(float(row.max()) - float(row[token]))
            prefix.append(token)


def test_the_last_id_of_the_vocabulary_which_sglang_shows_as_0_is_no_other_prompt() -> None:
    with serving(**SGLANG) as fake, opened(fake.url) as engine:
        tokens = np.asarray([104, 299, 105], np.int32)
        asked = Request("a", tokens, "", np.asarray([299, 104], np.int32), np.asarray([1, 2], np.int32))
        (scores,) = engine.replay([asked])
        assert not scores.error
        assert scores.logprob[0] == logprobs([104, 299, 105], "fp32")[299]


def test_llama_cpp_cannot_replay_and_says_so() -> None:
    says: list[str] = []
    with serving(**LLAMA_CPP) as fake, opened(fake.url, says=says) as engine:
        assert list(engine.benign()) == []
        with pytest.raises(EngineError, match="cannot replay"):
            engine.replay(watching(engine))
    assert any("none can be replayed" in line for line in says)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@BOTH
def test_observed_16_bit_logits_contradict_a_claim(state: dict[str, Any], path: str, dtype: str) -> None:
    with serving(**state, dtype=dtype) as fake, opened(fake.url) as engine:
        assert engine.observe().compute_class == ("unknown" if dtype == "fp32" else dtype)


@BOTH
def test_facts_are_inert_claims_and_hold_nothing_of_the_host(state: dict[str, Any], path: str) -> None:
    with serving(**state) as fake, opened(fake.url) as engine:
        facts = engine.facts()
    assert facts["engine_version"] == f"{state['speaks']} {state['version']}"
    if state is SGLANG:
        assert facts["engine.claimed.attention_backend"] == "flashinfer\\x1b[31m"
        assert (facts["engine.claimed.tp_size"], facts["engine.weight_version"]) == (2, "default")
    else:
        assert facts["engine.claimed.quantization"] == "Q4_1\\x1b[31m"
    assert not any(bad in str(facts) for bad in ("127.0.0.1", "somebody", "http", "sk-its-own"))


@BOTH
def test_what_its_context_holds_is_no_more_than_it_takes(state: dict[str, Any], path: str) -> None:
    with serving(**state, max_model_len=64) as fake, opened(fake.url, tokens=4) as engine:
        assert engine.context_length is not None
        full = Request("full", np.full(engine.context_length - 4, 97, np.int32), "")
        assert not errors(engine.generate([full]))
        if engine.replays:
            golden = replace(full, reference=np.full(4, 97, np.int32), reference_runner_up=np.full(4, 98, np.int32))
            assert not errors(engine.replay([golden]))


# --- which dialect a server speaks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("owner", ["vllm", "sglang", "llamacpp", "acme"])
@BOTH
def test_what_it_answers_counts_for_more_than_what_it_is_called(state: dict[str, Any], path: str, owner: str) -> None:
    with serving(**{**state, "owned_by": owner}) as fake, opened(fake.url) as engine:
        assert engine.dialect.name == state["speaks"]


def test_an_older_sglang_is_known_by_its_older_pages() -> None:
    with serving(**{**SGLANG, "version": "0.4.9"}, older=True) as fake, opened(fake.url) as engine:
        assert engine.facts()["engine_version"] == "sglang 0.4.9"
        assert engine.encode(Prompt("p", "Hello")) == list(b"Hello"), "it renders no chats"
        with pytest.raises(EngineError, match="renders none"):
            engine.encode(Prompt("p", [{"role": "user", "content": "Hello"}]))


@pytest.mark.parametrize("lacking", [{"tokenizer": False}, {"token_ids": False}], ids=["no-tokenizer", "no-ids"])
@BOTH
def test_a_server_that_shows_too_little_is_compared_by_its_text(
    state: dict[str, Any], path: str, lacking: dict[str, Any]
) -> None:
    says: list[str] = []
    with serving(**state, **lacking) as fake, opened(fake.url, says=says) as engine:
        assert engine.text_only
        assert not errors(engine.generate(requests(engine)))
        assert engine.facts()["engine_version"].startswith(state["speaks"])  # type: ignore[union-attr]
    assert any("status 404" in line and "only texts are compared" in line for line in says), "and why"


@BOTH
def test_a_dialect_can_be_forced(state: dict[str, Any], path: str) -> None:
    with serving(**state) as fake:
        with opened(fake.url, dialect=state["speaks"]) as engine:
            assert engine.dialect.name == state["speaks"]
        with opened(fake.url, dialect="text") as engine:
            assert engine.text_only
        with pytest.raises(ConfigError, match=r"does not speak vllm's dialect"), opened(fake.url, dialect="vllm"):
            pass


@pytest.mark.parametrize("name", ["sglang", "llama.cpp"])
def test_a_dialect_that_the_server_does_not_speak_is_refused(name: str) -> None:
    with serving() as fake, pytest.raises(ConfigError, match=f"does not speak {name}"), opened(fake.url, dialect=name):
        pass


def test_what_a_server_says_in_place_of_its_dialect_is_inert() -> None:
    bad = meta(finish_reason={"type": "stop", "matched": "\x1b[31m\n::error::gone"})
    with serving(**SGLANG) as fake:
        fake.state.spoil = lambda path, text, answer: bad(answer) if path == "/generate" else answer
        says: list[str] = []
        with opened(fake.url, says=says) as engine:
            assert engine.text_only
        with pytest.raises(ConfigError) as caught, opened(fake.url, dialect="sglang"):
            pass
    for told in ("".join(says), str(caught.value)):
        assert "cut short" in told
        assert "\x1b" not in told
        assert "\n::error" not in told


@pytest.mark.parametrize("wrong", ["ollama", "", 7, ["vllm"], None], ids=str)
def test_a_dialect_that_there_is_not_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=", ".join(NAMES)), opened("http://127.0.0.1:9/v1", dialect=wrong):
        pass


@pytest.mark.parametrize("answer", [Refusal(500), Refusal(429), None], ids=["500", "429", "dead"])
@BOTH
def test_an_outage_while_it_is_opened_is_not_taken_for_a_server_that_can_do_less(
    state: dict[str, Any], path: str, answer: Any
) -> None:
    pages = (path, "/tokenize", "/model_info" if state is SGLANG else "/props")
    for page in pages:
        with serving(**state) as fake:
            fake.state.spoil = lambda where, text, good, page=page: answer if where == page else good
            with pytest.raises(EngineError), opened(fake.url, retries=0):
                pass


# --- what breaks ------------------------------------------------------------------------------------------------------


def meta(**fields: Any) -> Callable[[Any], Any]:
    """Another `meta_info`."""
    return lambda answer: answer | {"meta_info": answer["meta_info"] | fields}


def cut(name: str) -> Callable[[Any], Any]:
    """One entry less in a column of `meta_info`."""
    return lambda answer: meta(**{name: answer["meta_info"][name][:-1]})(answer)


BROKEN_EVERYWHERE: dict[str, Any] = {
    "garbage": b"<html>Bad gateway</html>",
    "half-json": b'{"output_ids": [1, 2',
    "array": b"[1]",
    "500": Refusal(500),
    "connection": None,
    "empty": {},
}
BROKEN_SGLANG: dict[str, Any] = {
    "no-logprobs": meta(output_token_logprobs=None),
    "no-best": meta(output_top_logprobs=[None] * 8),
    "short-logprobs": cut("output_token_logprobs"),
    "short-best": cut("output_top_logprobs"),
    "short-prompt": cut("input_token_logprobs"),
    "chosen-alone": meta(output_top_logprobs=[[]] * 8),
    "nan": lambda a: meta(output_token_logprobs=[[None, t, None] for t in a["output_ids"]])(a),
    "texts-for-ids": lambda a: meta(output_token_logprobs=[[-1.0, "the", None] for _ in a["output_ids"]])(a),
    "other-tokens": meta(output_token_logprobs=[[-1.0, 5, None]] * 8),
    "flat": meta(output_token_logprobs=[-1.0] * 8),
    "other-prompt": meta(input_token_logprobs=[[None, 7, None]]),
    "cut": lambda a: a | {"output_ids": a["output_ids"][:3]},
    "cut-consistently": lambda a: (
        a
        | {"output_ids": a["output_ids"][:3]}
        | meta(
            completion_tokens=3,
            output_token_logprobs=a["meta_info"]["output_token_logprobs"][:3],
            output_top_logprobs=a["meta_info"]["output_top_logprobs"][:3],
        )(a)
        | {"output_ids": a["output_ids"][:3]}
    ),
    "miscounted": meta(completion_tokens=99),
    "aborted": meta(finish_reason={"type": "abort", "message": "x"}),
    "no-reason": meta(finish_reason=None),
    "stop-string": meta(finish_reason={"type": "stop", "matched": "NaN happened"}),
    "no-text": lambda a: a | {"text": None},
    "other-weights": meta(weight_version="v2"),
}
BROKEN_LLAMA_CPP: dict[str, Any] = {
    "no-logprobs": lambda a: a | {"completion_probabilities": None},
    "dropped-one": lambda a: a | {"completion_probabilities": a["completion_probabilities"][1:]},
    "dropped-last": lambda a: a | {"completion_probabilities": a["completion_probabilities"][:-1]},
    "dropped-all": lambda a: a | {"completion_probabilities": []},
    "of-others": lambda a: a | {"completion_probabilities": [e | {"id": 5} for e in a["completion_probabilities"]]},
    "no-best": lambda a: (
        a | {"completion_probabilities": [e | {"top_logprobs": None} for e in a["completion_probabilities"]]}
    ),
    "chosen-alone": lambda a: (
        a | {"completion_probabilities": [e | {"top_logprobs": []} for e in a["completion_probabilities"]]}
    ),
    "post-sampling": lambda a: (
        a | {"completion_probabilities": [{"id": e["id"], "prob": 1.0} for e in a["completion_probabilities"]]}
    ),
    "nan": lambda a: a | {"completion_probabilities": [e | {"logprob": None} for e in a["completion_probabilities"]]},
    "no-ids": lambda a: a | {"tokens": []},
    "too-many": lambda a: a | {"tokens": a["tokens"] * 99},
    "cut": lambda a: a | {"tokens": a["tokens"][:3]},
    "cut-consistently": lambda a: (
        a
        | {
            "tokens": a["tokens"][:3],
            "completion_probabilities": a["completion_probabilities"][:3],
            "tokens_predicted": 3,
        }
    ),
    "miscounted": lambda a: a | {"tokens_predicted": 99},
    "truncated": lambda a: a | {"truncated": True},
    "other-prompt": lambda a: a | {"tokens_evaluated": 3},
    "stop-word": lambda a: a | {"stop_type": "word"},
    "no-reason": lambda a: a | {"stop_type": "none"},
    "no-text": lambda a: a | {"content": None},
    "other-model": lambda a: a | {"model": "another"},
}
BROKEN = [
    *((SGLANG, "/generate", name, what) for name, what in {**BROKEN_EVERYWHERE, **BROKEN_SGLANG}.items()),
    *((LLAMA_CPP, "/completion", name, what) for name, what in {**BROKEN_EVERYWHERE, **BROKEN_LLAMA_CPP}.items()),
]


@pytest.mark.parametrize(
    ("state", "path", "name", "what"), BROKEN, ids=[f"{state['speaks']}-{name}" for state, _, name, _ in BROKEN]
)
def test_a_broken_answer_is_that_prompts_error_and_the_others_go_on(
    state: dict[str, Any], path: str, name: str, what: Any
) -> None:
    with serving(**state) as fake, opened(fake.url, retries=0) as engine:
        asked = requests(engine)
        calm = engine.generate(asked)
        assert not errors(calm)
        fake.state.spoil = for_prompt("c", what, path)
        shaken = engine.generate(asked)
        assert set(errors(shaken)) == {"c"}
        for then, now in zip(calm, shaken, strict=True):
            assert now.id == "c" or now.tokens.tolist() == then.tokens.tolist()


BROKEN_REPLAYS: dict[str, Any] = {
    "garbage": b"{",
    "refused": Refusal(400),
    "none": meta(input_token_logprobs=None),
    "no-best": meta(input_top_logprobs=None),
    "short": cut("input_token_logprobs"),
    "short-best": cut("input_top_logprobs"),
    "null-rows": lambda a: meta(input_top_logprobs=[None] * len(a["meta_info"]["input_top_logprobs"]))(a),
    "nan": lambda a: meta(input_token_logprobs=[[None, t, x] for _, t, x in a["meta_info"]["input_token_logprobs"]])(a),
    "other-prompt": lambda a: meta(
        input_token_logprobs=[[v, t + 1, x] for v, t, x in a["meta_info"]["input_token_logprobs"]]
    )(a),
}


@pytest.mark.parametrize("name", BROKEN_REPLAYS)
def test_a_broken_replay_is_that_prompts_error(name: str) -> None:
    with serving(**SGLANG) as fake, opened(fake.url, retries=0) as engine:
        asked = watching(engine)
        assert not errors(engine.replay(asked))
        fake.state.spoil = for_prompt("c", BROKEN_REPLAYS[name], "/generate")
        assert set(errors(engine.replay(asked))) == {"c"}


def test_a_likelier_token_that_a_server_passed_over_shows_in_the_gap() -> None:
    sampled = Steps([5, 6], [{5: -0.25, 7: -1.5}, {6: -1.0, 7: -0.5}], "ab", "length")
    found = output(Request("p", np.array([1], np.int32), "p"), sampled, 2)
    assert found.gap.tolist() == [1.25, -0.5] and found.runner_up.tolist() == [7, 7]


@BOTH
def test_anything_at_all_in_the_json_is_an_error_and_never_an_exception(state: dict[str, Any], path: str) -> None:
    """Every part of a good answer put out of shape, one at a time."""
    with serving(**state) as fake, opened(fake.url, retries=0, tokens=2) as engine:
        asked = watching(engine, "a")
        work: list[Any] = [engine._decoding(), *([engine._replaying("replay")] if engine.replays else [])]
        for one in work:
            good = one.ask(asked[0])
            for place in _paths(good):
                for other in (None, 7, "x", [], {}, -1.5, True, float("nan"), 10**30):
                    spoilt = json.loads(json.dumps(good))
                    _set(spoilt, place, other)
                    found = engine._one(replace(one, ask=lambda _, data=spoilt: data), asked[0])
                    assert isinstance(found.error, str)


def _paths(data: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    parts = data.items() if isinstance(data, dict) else enumerate(data[:2]) if isinstance(data, list) else ()
    for name, part in list(parts)[:12]:
        yield (*at, name)
        yield from _paths(part, (*at, name))


def _set(data: Any, path: tuple[Any, ...], value: Any) -> None:
    for name in path[:-1]:
        data = data[name]
    data[path[-1]] = value


@pytest.mark.parametrize(
    "change", [{"model": "other"}, {"version": "new"}, {"max_model_len": 17}, {"owned_by": "acme"}], ids=str
)
@BOTH
def test_a_server_that_changed_answers_nothing(state: dict[str, Any], path: str, change: dict[str, Any]) -> None:
    with serving(**state) as fake, opened(fake.url) as engine:
        asked = requests(engine)
        for name, value in change.items():
            setattr(fake.state, name, value)
        found = errors(engine.generate(asked))
        assert set(found) == set("abcd")
        assert all("the server changed during the run" in why for why in found.values())


def test_weights_that_are_exchanged_while_it_runs_are_noticed() -> None:
    with serving(**SGLANG) as fake, opened(fake.url) as engine:
        asked = requests(engine)
        fake.state.weight_version = "step-2"
        assert set(errors(engine.generate(asked))) == set("abcd")
    with serving(**LLAMA_CPP) as fake, opened(fake.url) as engine:
        asked = requests(engine)
        fake.state.salt = "a file of another size"
        assert set(errors(engine.generate(asked))) == set("abcd")


@BOTH
def test_an_interrupted_run_is_resumed(tmp_path: Path, state: dict[str, Any], path: str) -> None:
    with serving(**state) as fake:
        with opened(fake.url, retries=0, concurrency=1) as engine:
            fake.state.spoil = for_prompt("c", Refusal(500), path)
            assert set(errors(engine.generate(requests(engine)))) == {"c"}
        fake.state.spoil = lambda where, text, answer: answer
        says: list[str] = []
        with opened(fake.url, says=says) as engine:
            assert not errors(engine.generate(requests(engine)))
        assert any("3 answers of an interrupted run are taken over" in line for line in says)


# --- tokens that llama.cpp says nothing of ----------------------------------------------------------------------------


def entry(token: int, *text: int) -> dict[str, Any]:
    best = [{"id": token, "logprob": -0.5}, {"id": 99, "logprob": -1.5}]
    return {"id": token, "bytes": list(text), "logprob": -0.5, "top_logprobs": best}


SUN = (0xE6, 0x97, 0xA5)


@pytest.mark.parametrize(
    ("tokens", "entries", "content", "known"),
    [
        ([1, 2], [entry(1, 65), entry(2, 66)], "AB", [0, 1]),
        ([7, 8, 9, 1], [entry(9, *SUN), entry(1, 65)], "日A", [2, 3]),
        ([1, 7, 8, 9], [entry(1, 65), entry(9, *SUN)], "A日", [0, 3]),
        ([9, 9, 1], [entry(9, *SUN), entry(1, 65)], "日A", [1, 2]),
        ([1, 7], [entry(1, 65)], "A\ufffd", [0]),
        ([9, 9, 9, 1], [entry(9, *SUN), entry(9, *SUN), entry(1, 65)], "日日A", [2, 3]),
        ([9, 9], [entry(9, *SUN)], "日\ufffd", []),
        ([7], [], "\ufffd", []),
    ],
    ids=["ascii", "first", "last", "twice", "cut-off", "uncertain", "uncertain-end", "nothing"],
)
def test_numbers_are_of_the_token_that_ends_a_character(
    tokens: list[int], entries: list[dict[str, Any]], content: str, known: list[int]
) -> None:
    with serving(**LLAMA_CPP) as fake, opened(fake.url, tokens=len(tokens)) as engine:
        answer = {
            "content": content,
            "tokens": tokens,
            "tokens_predicted": len(tokens),
            "tokens_evaluated": 1,
            "truncated": False,
            "stop_type": "limit",
            "completion_probabilities": entries,
        }
        asked = Request("p", np.asarray([5], np.int32), "", np.asarray(tokens, np.int32), np.full(len(tokens), -1))
        output = engine.dialect.read(asked, answer, len(tokens))
        assert np.flatnonzero(~np.isnan(output.logprob)).tolist() == known
        assert np.flatnonzero(~np.isnan(output.gap)).tolist() == known
        assert np.flatnonzero(output.runner_up >= 0).tolist() == known
        assert output.reference_logprob is not None
        assert np.flatnonzero(~np.isnan(output.reference_logprob)).tolist() == known


@pytest.mark.parametrize(
    ("tokens", "entries", "content"),
    [
        ([1, 2], [entry(2, 66)], "AB"),
        ([1, 2], [entry(1, 65)], "AB"),
        ([7, 9, 1], [entry(9, *SUN)], "日A"),
        ([1, 2], [entry(2, 66), entry(1, 65)], "AB"),
        ([9], [entry(9, *SUN), entry(9, *SUN)], "日\ufffd"),
    ],
    ids=["first", "last", "after", "order", "too-many"],
)
def test_whole_characters_without_numbers_are_an_error(
    tokens: list[int], entries: list[dict[str, Any]], content: str
) -> None:
    with pytest.raises(Malformed):
        llama_cpp._places(tokens, entries, content)


def test_a_probability_that_llama_cpp_could_not_represent_is_just_very_small() -> None:
    cells = [{"id": 2, "logprob": -3.4028234663852886e38}]
    assert llama_cpp._row({"id": 1, "logprob": 0.0, "top_logprobs": cells}) == {1: 0.0, 2: llama_cpp.LEAST}
