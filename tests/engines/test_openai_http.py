"""The HTTP engine against a real server on loopback: what it can do, what it refuses, and what breaks on the way."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pytest_repro.engines import openai_client
from pytest_repro.engines.base import REGISTRY, check_options
from pytest_repro.engines.openai_http import OpenAIEngine
from pytest_repro.errors import ConfigError, EngineError
from pytest_repro.fingerprint import UNOBSERVED
from pytest_repro.suite import Prompt
from pytest_repro.testing import EngineContract

from .asking import PROMPTS, SECRET, alone, edited, errors, for_prompt, opened, requests, watching  # noqa: F401
from .fake_server import END, Refusal, logprobs, serving, text_of

# --- the contract, in every dialect -----------------------------------------------------------------------------------


class TestOpenAI(EngineContract):
    tolerance = 0.0

    @pytest.fixture
    def engine(self) -> Iterator[OpenAIEngine]:
        with serving() as fake, opened(fake.url, tokens=24) as engine:
            yield engine


class TestOpenAIInBF16(EngineContract):
    tolerance = 0.0

    @pytest.fixture
    def engine(self) -> Iterator[OpenAIEngine]:
        with serving(dtype="bf16") as fake, opened(fake.url, tokens=24) as engine:
            yield engine


class TestOpenAIWithoutPromptLogprobs(EngineContract):
    @pytest.fixture
    def engine(self) -> Iterator[OpenAIEngine]:
        with serving(prompt_logprobs=False, most_logprobs=5) as fake, opened(fake.url, tokens=24) as engine:
            yield engine


class TestOpenAITextOnly(EngineContract):
    @pytest.fixture
    def engine(self) -> Iterator[OpenAIEngine]:
        with serving(tokenizer=False, token_ids=False, owned_by="acme") as fake, opened(fake.url) as engine:
            assert engine.text_only
            yield engine


# --- what a server can do is found out --------------------------------------------------------------------------------


def test_token_ids_numbers_and_text_are_the_models() -> None:
    with serving() as fake, opened(fake.url, tokens=64) as engine:
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
        assert engine.context_length == 4095, "a replay needs room for one token more"


def test_a_golden_of_another_model_is_scored_where_its_tokens_are_seen() -> None:
    with serving() as fake, opened(fake.url) as engine:
        watched = watching(engine, "a")
        reference = watched[0].reference
        assert reference is not None
    with serving(salt="other weights") as fake, opened(fake.url) as engine:
        (scores,) = engine.replay(watched)
        (output,) = engine.generate(watched)
        prefix = watched[0].tokens.tolist()
        for place, token in enumerate(reference.tolist()):
            row = logprobs(prefix, "fp32", "other weights")
            assert scores.logprob[place] == row[token]
            assert scores.top[place] == row.argmax()
            assert scores.deficit[place] == np.float32(float(row.max()) - float(row[token]))
            prefix.append(token)
        first = logprobs(watched[0].tokens.tolist(), "fp32", "other weights")
        best = np.argsort(-first)[:20]
        assert output.reference_logprob is not None
        seen = float(output.reference_logprob[0])
        assert (seen == first[reference[0]]) if reference[0] in best else np.isnan(seen)
        assert np.isnan(scores.gap).any() or np.isfinite(scores.gap).all()


def test_a_server_without_prompt_logprobs_says_so_and_does_not_replay() -> None:
    says: list[str] = []
    with serving(prompt_logprobs=False) as fake, opened(fake.url, says=says) as engine:
        assert not engine.replays
        assert list(engine.benign()) == []
        assert engine.context_length == 4096
        with pytest.raises(EngineError, match="cannot replay"):
            engine.replay(requests(engine))
    assert any("none can be replayed" in line for line in says)


def test_fewer_logprobs_are_asked_for_where_twenty_are_too_many() -> None:
    with serving(most_logprobs=5) as fake, opened(fake.url) as engine:
        assert engine.dialect.logprobs == 5
        assert engine.replays
        assert not errors(engine.replay(watching(engine)))


@pytest.mark.parametrize(
    "state",
    [{"tokenizer": False}, {"token_ids": False}, {"owned_by": "acme", "tokenizer": False, "token_ids": False}],
    ids=["no-tokenizer", "no-ids", "neither"],
)
def test_a_server_that_shows_no_ids_is_compared_by_its_text(state: dict[str, Any]) -> None:
    says: list[str] = []
    with serving(**state) as fake, opened(fake.url, says=says) as engine:
        assert engine.text_only
        (output,) = engine.generate(requests(engine, "a"))
        assert bytes(output.tokens.tolist()).decode() == output.text
        assert np.isnan(output.logprob).all()
        assert engine.facts()["tokenizer"] == "utf-8"
        assert engine.observe().compute_class == "unknown"
    assert any("only texts are compared" in line for line in says)


def test_an_empty_text_is_an_answer_if_the_model_ended_it() -> None:
    with serving(token_ids=False) as fake, opened(fake.url) as engine:
        asked, choice = requests(engine), {"message": {"content": ""}, "finish_reason": "stop"}
        fake.state.spoil = for_prompt(
            "a",
            {"model": "tiny", "system_fingerprint": fake.state.fingerprint, "choices": [choice]},
            "/v1/chat/completions",
        )
        (output, *_) = engine.generate(asked)
        assert (output.error, output.text, len(output.tokens)) == ("", "", 0)
        choice["finish_reason"] = "length"
        assert set(errors(engine.generate(asked))) == {"a"}
        choice |= {"finish_reason": "stop", "message": {"content": None}}
        assert set(errors(engine.generate(asked))) == {"a"}


def test_a_model_without_a_chat_template_gets_the_plain_text() -> None:
    with serving(chat=False) as fake, opened(fake.url) as engine:
        assert engine.encode(Prompt("p", "Hello")) == list(b"Hello")
        with pytest.raises(EngineError, match="no chat template, or it is too old"):
            engine.encode(Prompt("p", [{"role": "user", "content": "Hello"}]))
    with serving(chat=False, tokenizer=False) as fake, opened(fake.url) as engine:
        assert engine.text_only
        assert not errors(engine.generate(requests(engine)))


def test_facts_hold_nothing_of_the_host_and_no_claim_beyond_what_is_seen() -> None:
    with serving(model="/home/somebody/models/tiny") as fake, opened(fake.url) as engine:
        facts = engine.facts()
    assert facts["engine_version"] == "vllm 0.32.0"
    assert facts["engine.server"] == "vllm"
    assert facts["engine.model"] == "tiny"
    for name in ("model.weights", "model.config", "tokenizer", "chat_template", "generation"):
        assert facts[name] == UNOBSERVED
    assert not any(bad in str(facts) for bad in ("127.0.0.1", str(fake.port), "somebody", "http"))


def test_observed_16_bit_logits_contradict_a_claim_and_fp32_is_never_believed() -> None:
    for dtype, found in (("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "unknown")):
        with serving(dtype=dtype) as fake, opened(fake.url) as engine:
            seen = engine.observe()
            assert seen.compute_class == found
            assert ("16-bit grid" in seen.detail) is (found != "unknown")


# --- options ----------------------------------------------------------------------------------------------------------


def test_the_options_are_registered() -> None:
    check_options("openai", dict.fromkeys(REGISTRY["openai"].options, 1), "suite.toml")
    with pytest.raises(ConfigError, match="api_key"):
        check_options("openai", {"api_key": SECRET}, "suite.toml")


def test_no_address_is_an_error_with_its_mending() -> None:
    with pytest.raises(ConfigError, match="OPENAI_BASE_URL"), opened(None):
        pass


def test_the_address_comes_from_the_environment_unless_the_suite_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as fake:
        monkeypatch.setenv("OPENAI_BASE_URL", fake.url + "/")
        with opened(None) as engine:
            assert len(engine.generate(requests(engine))) == 4
        monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
        with opened(fake.url) as engine:
            assert len(engine.generate(requests(engine))) == 4


@pytest.mark.parametrize(
    "url",
    [
        "ftp://127.0.0.1/v1",
        "file:///etc/passwd",
        "127.0.0.1:8000/v1",
        "http://",
        f"http://user:{SECRET}@127.0.0.1/v1",
        f"http://{SECRET}@127.0.0.1/v1",
        f"http://127.0.0.1/v1?api_key={SECRET}",
        f"http://127.0.0.1/v1#{SECRET}",
        "http://127.0.0.1:99999/v1",
        "http://[::1/v1",
    ],
)
def test_addresses_that_are_none_or_hold_a_secret_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError) as caught, opened(url):
        pass
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"concurrency": -1}, {"concurrency": True}, {"concurrency": 1.5}, {"timeout": 0}, {"timeout": "long"},
        {"retries": -1}, {"retries": 101}, {"backoff": -0.1}, {"model": 7}, {"base_url": 7}, {"timeout": float("nan")},
    ],
    ids=str,
)  # fmt: skip
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError), opened("http://127.0.0.1:9/v1", **options):
        pass


def test_the_model_is_the_only_one_or_named() -> None:
    with serving(model="two", models=["one", "two"]) as fake:
        with pytest.raises(ConfigError, match="one, two"), opened(fake.url):
            pass
        with pytest.raises(ConfigError, match="does not serve 'three'"), opened(fake.url, model="three"):
            pass
        with opened(fake.url, model="two") as engine:
            assert engine.facts()["engine.model"] == "two"
    with serving(models=[]) as fake, pytest.raises(ConfigError, match="none"), opened(fake.url):
        pass


def test_nobody_there_is_an_error_of_the_harness() -> None:
    with serving() as fake:
        url = fake.url
    with pytest.raises(EngineError, match="cannot be reached"), opened(url, retries=1):
        pass


# --- the key ----------------------------------------------------------------------------------------------------------


def test_the_key_goes_to_loopback_and_where_the_user_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with serving() as fake:
        with opened(fake.url):
            pass
        assert fake.state.keys == {f"Bearer {SECRET}"}
        fake.state.keys.clear()
        elsewhere = _not_loopback(monkeypatch)
        with opened(fake.url, by_user=True):
            pass
        assert fake.state.keys == {f"Bearer {SECRET}"}
        fake.state.keys.clear()
        monkeypatch.setenv("OPENAI_BASE_URL", fake.url)
        with opened(None):
            pass
        with opened(fake.url):  # the suite names what the user's environment names
            pass
        assert fake.state.keys == {f"Bearer {SECRET}"}
        assert elsewhere


def test_the_key_is_not_sent_where_only_a_suite_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setenv("OPENAI_BASE_URL", "https://users.example/v1")
    _not_loopback(monkeypatch)
    says: list[str] = []
    with serving() as fake, opened(fake.url, says=says) as engine:
        engine.generate(requests(engine))
        assert fake.state.keys == {None}
    assert any("the API key is not sent" in line for line in says)
    assert SECRET not in "".join(says)


def _not_loopback(monkeypatch: pytest.MonkeyPatch) -> bool:
    """The test's own server counts as one elsewhere."""
    monkeypatch.setattr(openai_client, "is_loopback", lambda url: False)
    monkeypatch.setenv("NO_PROXY", "*")
    return True


@pytest.mark.parametrize(
    ("url", "local"),
    [
        ("http://127.0.0.1:8000/v1", True),
        ("http://localhost/v1", True),
        ("http://[::1]:8000/v1", True),
        ("http://127.0.0.1.example.org/v1", False),
        ("http://localhost.example.org/v1", False),
        ("http://10.0.0.1/v1", False),
        ("http://0.0.0.0/v1", False),
        ("http://169.254.169.254/v1", False),
        ("https://api.openai.com/v1", False),
    ],
)
def test_loopback_is_this_machine_and_nothing_that_looks_like_it(url: str, local: bool) -> None:
    assert openai_client.is_loopback(openai_client.address(url, "here")) is local


def test_the_key_is_nowhere_to_be_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A server that echoes it, in every way that ends in a message; facts, repr and the journal."""
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    echoes = {
        "a": Refusal(400, f"bad key {SECRET} in header"),
        "b": Refusal(500, SECRET * 20),
        "c": f"not json {SECRET}".encode(),
        "d": Refusal(302, "", {"location": f"http://127.0.0.1:9/?key={SECRET}"}),
    }

    def spoil(path: str, text: str, answer: Any) -> Any:
        hit = next((echo for name, echo in echoes.items() if PROMPTS[name] in text), None)
        return hit if hit and path == "/v1/completions" else answer

    with serving() as fake, pytest.raises(KeyboardInterrupt), opened(fake.url, retries=1) as engine:
        asked = requests(engine)
        fake.state.spoil = spoil
        found = errors(engine.generate(asked))
        assert set(found) == set("abcd")
        assert "***" in found["a"]
        assert "redirects" in found["d"]
        told = json.dumps(
            [found, dict(engine.facts()), repr(engine.server), repr(engine.settings), repr(engine.dialect)]
        )
        assert SECRET not in told
        raise KeyboardInterrupt
    assert not any(SECRET in p.read_text() for p in (tmp_path / "cache").rglob("*") if p.is_file())


@pytest.mark.parametrize("key", ["sk\nx-evil: 1", "sk-é", "s k"])
def test_a_key_that_is_no_header_is_refused_unseen(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with serving() as fake, pytest.raises(ConfigError) as caught, opened(fake.url):
        pass
    assert key not in str(caught.value)


def test_a_redirect_is_not_followed_with_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with serving() as thief, serving() as fake:
        fake.state.spoil = lambda path, text, answer: Refusal(307, "", {"location": thief.url + "/models"})
        with pytest.raises(EngineError, match="redirects"), opened(fake.url):
            pass
        assert thief.state.keys == set()


# --- what breaks ------------------------------------------------------------------------------------------------------


def test_every_second_request_fails_and_every_prompt_is_answered() -> None:
    count = iter(range(10**6))
    lock = threading.Lock()

    def spoil(path: str, text: str, answer: Any) -> Any:
        with lock:
            return Refusal(500 + next(count) % 4) if next(count) % 4 == 1 else answer

    with serving() as fake, opened(fake.url, retries=20) as engine:
        calm = engine.generate(requests(engine))
        fake.state.spoil = spoil
        shaken = engine.generate(requests(engine))
        assert not errors(shaken)
        assert [o.tokens.tolist() for o in shaken] == [o.tokens.tolist() for o in calm]


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_what_passes_is_asked_again_and_what_does_not_is_given_up(status: int) -> None:
    with serving() as fake, opened(fake.url, retries=2) as engine:
        asked = requests(engine)
        fake.state.seen.clear()
        fake.state.spoil = for_prompt("b", Refusal(status))
        found = errors(engine.generate(asked))
        assert set(found) == {"b"}
        assert f"status {status}" in found["b"]
        assert "3 attempts" in found["b"]
        counted = {name: sum(n for t, n in fake.state.asked().items() if PROMPTS[name] in t) for name in PROMPTS}
        assert counted == {"a": 1, "b": 3, "c": 1, "d": 1}


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
def test_a_refusal_is_not_asked_again(status: int) -> None:
    with serving() as fake, opened(fake.url) as engine:
        asked = requests(engine)
        fake.state.spoil = for_prompt("b", Refusal(status, "why\x1b[31m not\n##[error]" + "x" * 999))
        found = errors(engine.generate(asked))
        assert set(found) == {"b"}
        assert f"status {status}: why\\x1b[31m not⏎" in found["b"]
        assert "\x1b" not in found["b"]
        assert "##[" not in found["b"]
        assert len(found["b"]) < 400
        assert sum(n for t, n in fake.state.asked().items() if PROMPTS["b"] in t) == 1


@pytest.mark.parametrize("after", ["0", "0.01", "Wed, 21 Oct 2015 07:28:00 GMT", "soon", "-5", "nan"])
def test_retry_after_is_honoured_or_ignored_but_never_breaks(after: str) -> None:
    left = iter([Refusal(429, headers={"retry-after": after})] * 2)
    with serving() as fake, opened(fake.url) as engine:
        asked = requests(engine)
        fake.state.spoil = for_prompt("b", lambda answer: next(left, answer))
        assert not errors(engine.generate(asked))


def test_retry_after_is_what_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    with serving() as fake, opened(fake.url, timeout=30.0) as engine:
        asked = requests(engine, "b")
        left = iter([Refusal(429, headers={"retry-after": "7"}), Refusal(429, headers={"retry-after": "999"})])
        fake.state.spoil = for_prompt("b", lambda answer: next(left, answer))
        monkeypatch.setattr(engine.server._stopped, "wait", lambda seconds: waits.append(seconds))
        assert not errors(engine.generate(asked))
    assert waits == [7.0, 30.0], "in full, but no longer than a request may take"


BROKEN_ANSWERS = {
    "garbage": b"<html>Bad gateway</html>",
    "half-json": b'{"choices": [{"text": "abc',
    "deep-json": b"[" * 100_000,
    "array": b"[1, 2]",
    "empty-body": b"",
    "connection": None,
    "no-choices": {"choices": []},
    "choices-are-text": {"choices": ["x"]},
    "no-logprobs": edited(logprobs=None),
    "empty-logprobs": edited(logprobs={}),
    "short-logprobs": lambda a: edited(
        logprobs=a["choices"][0]["logprobs"] | {"token_logprobs": a["choices"][0]["logprobs"]["token_logprobs"][:-1]}
    )(a),
    "no-best": lambda a: edited(
        logprobs=a["choices"][0]["logprobs"] | {"top_logprobs": [None] * len(a["choices"][0]["token_ids"])}
    )(a),
    "chosen-alone": lambda a: edited(
        logprobs=a["choices"][0]["logprobs"] | {"top_logprobs": [{}] * len(a["choices"][0]["token_ids"])}
    )(a),
    "null-logprob": lambda a: edited(
        logprobs=a["choices"][0]["logprobs"] | {"token_logprobs": [None] * len(a["choices"][0]["token_ids"])}
    )(a),
    "positive-logprob": lambda a: edited(
        logprobs=a["choices"][0]["logprobs"] | {"token_logprobs": [3.5] * len(a["choices"][0]["token_ids"])}
    )(a),
    "text-tokens": edited(token_ids=["a", "b"]),
    "negative-ids": edited(token_ids=[-1] * 8),
    "huge-ids": edited(token_ids=[2**40] * 8),
    "true-ids": edited(token_ids=[True] * 8),
    "cut-ids": lambda a: edited(token_ids=a["choices"][0]["token_ids"][:3])(a),
    "no-finish": edited(finish_reason=None),
    "aborted": edited(finish_reason="abort"),
    "no-text": edited(text=None),
    "other-prompt": edited(prompt_token_ids=[1, 2, 3]),
    "miscounted": lambda a: a | {"usage": {"completion_tokens": 99}},
    "other-model": lambda a: a | {"model": "another"},
    "other-fingerprint": lambda a: a | {"system_fingerprint": "vllm-0.33.0-deadbeef"},
}


@pytest.mark.parametrize("name", BROKEN_ANSWERS)
def test_a_broken_answer_is_that_prompts_error_and_the_others_go_on(name: str) -> None:
    with serving() as fake, opened(fake.url, retries=1) as engine:
        asked = requests(engine)
        calm = engine.generate(asked)
        fake.state.spoil = for_prompt("c", BROKEN_ANSWERS[name])
        shaken = engine.generate(asked)
        assert set(errors(shaken)) == {"c"}
        assert [o.id for o in shaken] == list("abcd")
        for then, now in zip(calm, shaken, strict=True):
            assert now.id == "c" or now.tokens.tolist() == then.tokens.tolist()


def _shortened(answer: dict[str, Any]) -> dict[str, Any]:
    """A text that ends early, consistently: nothing but the limit gives it away."""
    choice = answer["choices"][0]
    kept = {name: column[:3] for name, column in choice["logprobs"].items()}
    cut: dict[str, Any] = edited(token_ids=choice["token_ids"][:3], logprobs=kept, finish_reason="length")(answer)
    return cut | {"usage": None}


def test_a_text_that_the_server_cut_short_is_an_error() -> None:
    with serving() as fake, opened(fake.url) as engine:
        asked = requests(engine)
        fake.state.spoil = for_prompt("d", _shortened)
        assert "3 tokens where 8 were asked for" in errors(engine.generate(asked))["d"]


BROKEN_REPLAYS = {
    "none": edited(prompt_logprobs=None),
    "short": lambda a: edited(prompt_logprobs=a["choices"][0]["prompt_logprobs"][:-1])(a),
    "null-row": lambda a: edited(prompt_logprobs=[None] * len(a["choices"][0]["prompt_logprobs"]))(a),
    "text-rows": lambda a: edited(prompt_logprobs=[None, *({"the": {"logprob": -1}} for _ in a["choices"][0]["prompt_logprobs"][1:])])(a),
    "without-own": lambda a: edited(prompt_logprobs=[None, *({"299": {"logprob": -1}} for _ in a["choices"][0]["prompt_logprobs"][1:])])(a),
    "garbage": b"{",
    "refused": Refusal(400),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN_REPLAYS)
def test_a_broken_replay_is_that_prompts_error(name: str) -> None:
    with serving() as fake, opened(fake.url, retries=1) as engine:
        asked = watching(engine)
        fake.state.spoil = for_prompt("c", BROKEN_REPLAYS[name])
        assert set(errors(engine.replay(asked))) == {"c"}


def test_anything_at_all_in_the_json_is_an_error_and_never_an_exception() -> None:
    """Every part of a good answer put out of shape, one at a time."""
    with serving() as fake, opened(fake.url, retries=0, tokens=3) as engine:
        asked = watching(engine, "a")
        good: list[dict[str, Any]] = []
        fake.state.spoil = for_prompt("a", lambda answer: good.append(answer) or answer)
        engine.generate(asked)
        engine.replay(asked)
        work = (engine._decoding(), engine._replaying("replay"))
        for answer, one in zip(good, work, strict=True):
            for path in _paths(answer):
                for other in (None, 7, "x", [], {}, -1.5, True, float("nan"), 10**30):
                    spoilt = json.loads(json.dumps(answer))
                    _set(spoilt, path, other)
                    wrong = replace(one, ask=lambda _, data=spoilt: data)
                    found = engine._one(wrong, asked[0])
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


def test_a_slow_answer_is_a_timeout() -> None:
    with serving() as fake, opened(fake.url, timeout=0.2, retries=1) as engine:
        asked = requests(engine)
        fake.state.spoil = for_prompt("c", lambda answer: time.sleep(0.6) or answer)
        found = errors(engine.generate(asked))
        assert set(found) == {"c"}
        assert "no answer within 0.2 s (2 attempts)" in found["c"]


def test_a_server_that_dies_leaves_what_it_answered() -> None:
    with serving() as fake, opened(fake.url, retries=1, concurrency=1) as engine:
        asked = requests(engine)
        fake.state.spoil = for_prompt("c", lambda answer: setattr(fake.state, "dead", True))
        found = errors(engine.generate(asked))
        assert set(found) == {"c", "d"}
        fake.kill()
        assert set(errors(engine.generate(asked))) == set("abcd")
        assert engine.decode([104, 105]) == " 104 105", "what is only shown is no reason to fail"


@pytest.mark.parametrize(
    "change",
    [{"model": "other"}, {"version": "0.33.0"}, {"max_model_len": 17}, {"owned_by": "acme"}, {"models": []}],
    ids=str,
)
def test_a_server_that_changed_answers_nothing(change: dict[str, Any]) -> None:
    with serving() as fake, opened(fake.url) as engine:
        asked = watching(engine)
        for name, value in change.items():
            setattr(fake.state, name, value)
        fake.state.seen.clear()
        for answers in (engine.generate(asked), engine.replay(asked)):
            assert set(errors(answers)) == set("abcd")
            assert all("the server changed during the run" in why for why in errors(answers).values())
        assert not fake.state.asked(), "it is not even asked"


def test_a_server_that_changes_while_a_batch_runs_spoils_the_batch(tmp_path: Path) -> None:
    with serving() as fake, opened(fake.url, concurrency=1) as engine:
        asked = requests(engine)

        def after(path: str, text: str) -> None:
            if path == "/v1/completions":
                fake.state.version = "0.33.0"

        fake.state.after = after
        assert set(errors(engine.generate(asked))) == set("abcd")
    with serving() as fake, opened(fake.url) as engine:
        assert not engine._journal.left, "none of it is taken over later"


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("page", ["/version", "/v1/models"])
def test_a_page_that_cannot_be_had_just_now_is_no_change(page: str, status: int) -> None:
    with serving() as fake, opened(fake.url) as engine:
        asked = requests(engine)
        fake.state.spoil = lambda path, text, answer: Refusal(status) if path == page else answer
        assert not errors(engine.generate(asked))


@pytest.mark.parametrize("path", ["/tokenize", "/v1/completions"])
@pytest.mark.parametrize("answer", [Refusal(500), Refusal(401), Refusal(429), None], ids=["500", "401", "429", "dead"])
def test_an_outage_while_it_is_opened_is_not_taken_for_a_server_that_can_do_less(path: str, answer: Any) -> None:
    with serving() as fake:
        fake.state.spoil = lambda where, text, good: answer if where == path else good
        with pytest.raises(EngineError), opened(fake.url, retries=1):
            pass
