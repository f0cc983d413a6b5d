"""The HTTP engine opened on a fake server, and its four prompts: for the tests of both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pytest_repro.engines import openai_client
from pytest_repro.engines.base import Spec, opener
from pytest_repro.engines.openai_http import OpenAIEngine
from pytest_repro.generation import Request
from pytest_repro.numerics import mode
from pytest_repro.suite import Prompt

SECRET = "sk-never-to-be-seen-0123456789"
PROMPTS = {"a": "apples", "b": "bananas", "c": "cherries", "d": "dates"}
QUICK = {"backoff": 0.001, "timeout": 5.0}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nobody's key, nobody's server, nobody's cache."""
    for name in (openai_client.ADDRESS_VARIABLE, openai_client.KEY_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTEST_REPRO_CACHE", str(tmp_path / "cache"))


@contextmanager
def opened(
    url: str | None, *, says: list[str] | None = None, tokens: int = 8, by_user: bool = False, **options: Any
) -> Iterator[OpenAIEngine]:
    named = {**({"base_url": url} if url else {}), **QUICK, **options}
    spec = Spec(
        mode("fp32"),
        tokens,
        Path("/nowhere"),
        options=named,
        from_user=frozenset(named) if by_user else frozenset(),
        say=(says if says is not None else []).append,
    )
    with opener("openai")(spec) as engine:
        assert isinstance(engine, OpenAIEngine)
        yield engine


def requests(engine: OpenAIEngine, names: str = "abcd") -> list[Request]:
    return [Request(n, np.asarray(engine.encode(Prompt(n, PROMPTS[n])), np.int32), PROMPTS[n]) for n in names]


def watching(engine: OpenAIEngine, names: str = "abcd") -> list[Request]:
    asked = requests(engine, names)
    return [
        replace(r, reference=o.tokens, reference_runner_up=o.runner_up)
        for r, o in zip(asked, engine.generate(asked), strict=True)
    ]


def errors(answers: Any) -> dict[str, str]:
    return {a.id: a.error for a in answers if a.error}


def for_prompt(name: str, what: Any, path: str = "/v1/completions") -> Any:
    """A `spoil` that touches one prompt's answers only; `what` is put in their place, or called with them."""

    def spoil(where: str, text: str, answer: Any) -> Any:
        hit = where == path and PROMPTS[name] in text and isinstance(answer, dict)
        return (what(answer) if callable(what) else what) if hit else answer

    return spoil


def edited(**fields: Any) -> Any:
    """Another first choice."""
    return lambda answer: answer | {"choices": [answer["choices"][0] | fields]}
