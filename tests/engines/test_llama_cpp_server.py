"""llama.cpp's real server and a real model: the contract of every engine, and characters of several tokens."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

import httpx
import numpy as np
import pytest

from pytest_repro import models, suite
from pytest_repro.engines.base import Engine, Spec, opener
from pytest_repro.generation import Request, token_digest
from pytest_repro.numerics import mode
from pytest_repro.suite import Prompt
from pytest_repro.testing import EngineContract

pytestmark = pytest.mark.real_model
SUITE = Path(__file__).parents[2] / "golden" / "word-problems"
SERVE = """
import sys, threading
import xllamacpp

wanted = xllamacpp.CommonParams()
wanted.model.path, wanted.port = sys.argv[1], int(sys.argv[2])
wanted.n_ctx, wanted.n_parallel = 512, 1
wanted.cpuparams.n_threads = wanted.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(wanted)
threading.Event().wait()
"""
"""One slot: what shares a batch then never changes."""
START_UP = 60
"""Seconds that the server may take to start."""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The suite's GGUF file behind the server, as the package xllamacpp brings it along."""
    reference = suite.load(SUITE).model
    models.resolve(reference, SUITE)
    (file,) = (models.cache_folder() / "pypi").rglob(PurePosixPath(reference.partition("#")[0]).name)
    log = tmp_path_factory.mktemp("llama") / "server.log"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with log.open("wb") as out:
        command = [sys.executable, "-c", SERVE, str(file), str(port)]
        server = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(f"{url}/health", server, log)
        yield f"{url}/v1"
    finally:
        server.kill()
        server.wait(10)


def _wait(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(START_UP * 5):
        if server.poll() is not None:
            break
        with suppress(httpx.TransportError):
            if httpx.get(url, trust_env=False).status_code == 200:
                return
        time.sleep(0.2)
    pytest.fail(f"llama.cpp's server did not start:\n{log.read_text('utf-8', 'replace')[-4000:]}")


@pytest.fixture(scope="module")
def server(address: str) -> Iterator[Engine]:
    with opener("openai")(Spec(mode("native"), 8, SUITE, options={"base_url": address})) as engine:
        yield engine


class TestServed(EngineContract):
    @pytest.fixture
    def engine(self, server: Engine) -> Engine:
        return server


def test_it_is_known_by_its_answers(server: Engine) -> None:
    facts = server.facts()
    assert not server.text_only and not server.replays
    assert facts["engine.server"] == "llama.cpp"
    assert facts["engine.claimed.quantization"] == "Q4_1"


def test_prompts_have_the_tokens_that_the_goldens_have(server: Engine) -> None:
    """The tokenizer and the template of a GGUF file, as llama.cpp reads them and as transformers does."""
    shipped = suite.load(SUITE)
    rows = [json.loads(line) for line in (SUITE / "fp32.golden.jsonl").read_text("utf-8").splitlines()[1:]]
    made = [token_digest(np.asarray(server.encode(prompt), np.int32)) for prompt in shipped.prompts]
    assert made == [row["prompt_digest"] for row in rows]


def test_a_token_that_ends_inside_a_character_has_no_numbers(server: Engine) -> None:
    prompt = Prompt("emoji", "Repeat this line twenty times: 😀🎉 😀🎉 😀🎉 日本語 日本語")
    (output,) = server.generate([Request("emoji", np.asarray(server.encode(prompt), np.int32), prompt.content)])
    assert not output.error
    known = ~np.isnan(output.logprob)
    assert (known == (output.runner_up >= 0)).all()
    assert known.all() == output.text.isascii()
