"""A server in LayerCast: the same contract as every engine, over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pytest_repro.engines.base import Engine, Spec, opener
from pytest_repro.models import resolve
from pytest_repro.numerics import mode
from pytest_repro.testing import EngineContract

from .serving import served
from .tiny import build


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("tiny"), heads=2)


@pytest.fixture(scope="module")
def address(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(
        tiny_model, tmp_path_factory.mktemp("server"), "--quantization", "layercast", "--dtype", "float32"
    ) as url:
        yield url


@pytest.fixture(scope="module")
def server(address: str, tiny_model: Path) -> Iterator[Engine]:
    with opener("openai")(Spec(mode("layercast"), 24, tiny_model, options={"base_url": address})) as engine:
        yield engine


class TestServed(EngineContract):
    @pytest.fixture
    def engine(self, server: Engine) -> Engine:
        return server


def test_it_answers_as_transformers_does(server: Engine, tiny_model: Path) -> None:
    with opener("transformers")(Spec(mode("fp32"), 24, tiny_model, resolve(str(tiny_model), tiny_model))) as reference:
        asked = EngineContract().requests(reference)
        for mine, theirs in zip(
            server.generate(EngineContract().requests(server)), reference.generate(asked), strict=True
        ):
            np.testing.assert_array_equal(mine.tokens, theirs.tokens)
            np.testing.assert_allclose(mine.logprob, theirs.logprob, atol=1e-4)
            assert mine.finish_reason == theirs.finish_reason and mine.text == theirs.text


def test_fp32_is_not_believed_on_a_claim(server: Engine) -> None:
    assert server.replays and not server.text_only
    assert server.observe().compute_class == "unknown"
