"""Every engine passes the same contract."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pytest_repro.engines.base import Engine, Spec, opener
from pytest_repro.engines.function import FunctionEngine, from_function
from pytest_repro.engines.scripted import ScriptedEngine
from pytest_repro.generation import Request
from pytest_repro.models import resolve
from pytest_repro.numerics import mode
from pytest_repro.testing import PROMPTS, EngineContract

from .tiny import build


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def fp32_engine(tiny_model: Path) -> Iterator[Engine]:
    yield from loaded(tiny_model, "fp32")


@pytest.fixture(scope="module")
def layercast_engine(tiny_model: Path) -> Iterator[Engine]:
    yield from loaded(tiny_model, "layercast")


@pytest.fixture(scope="module")
def bf16_engine(tiny_model: Path) -> Iterator[Engine]:
    yield from loaded(tiny_model, "bf16")


def loaded(folder: Path, numerics: str) -> Iterator[Engine]:
    with opener("transformers")(Spec(mode(numerics), 24, folder, resolve(str(folder), folder))) as engine:
        yield engine


class TestTransformersFP32(EngineContract):
    tolerance = 1e-4

    @pytest.fixture
    def engine(self, fp32_engine: Engine) -> Engine:
        return fp32_engine


class TestTransformersLayerCast(EngineContract):
    tolerance = 1e-4

    @pytest.fixture
    def engine(self, layercast_engine: Engine) -> Engine:
        return layercast_engine


class TestTransformersBF16(EngineContract):
    tolerance = 1.0  # a random model in 16 bits: the contract here is shape and restoration, not closeness

    @pytest.fixture
    def engine(self, bf16_engine: Engine) -> Engine:
        return bf16_engine


class TestScripted(EngineContract):
    tolerance = 0.0

    @pytest.fixture
    def engine(self) -> Engine:
        row = {"tokens": [3, 1, 2], "logprob": [-0.5, -0.25, -1.0], "gap": [1.0, 0.5, 2.0], "runner_up": [9, 9, 9]}
        rows = {p.id: {"id": p.id, **row} for p in PROMPTS}
        return ScriptedEngine(rows, fp32=rows, jitter=0.125)


class TestFunction(EngineContract):
    @pytest.fixture
    def engine(self, tmp_path: Path) -> Iterator[Engine]:
        def shout(prompts: list[Any]) -> list[str]:
            return [(p if isinstance(p, str) else p[-1]["content"]).upper() for p in prompts]

        with from_function(shout)(Spec(mode("native"), 24, tmp_path)) as engine:
            yield engine


def test_a_function_may_give_tokens_and_numbers() -> None:
    def answer(prompts: list[Any]) -> list[dict[str, Any]]:
        return [{"tokens": [1, 2], "logprob": [-0.1, -0.2], "gap": [0.5, 0.25], "runner_up": [3, 4]} for _ in prompts]

    (output,) = FunctionEngine(answer, "f", 8).generate([Request("a", np.zeros(1, np.int32), "x")])
    assert output.tokens.tolist() == [1, 2]
    assert output.gap.tolist() == [0.5, 0.25]
    assert output.runner_up.tolist() == [3, 4]
