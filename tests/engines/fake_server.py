"""A real HTTP server on loopback that speaks a dialect over a tiny deterministic model, and fails when told to.

vLLM's is spoken here, SGLang's and llama.cpp's in `fake_sglang` and `fake_llama_cpp`.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from numpy.typing import NDArray

USER, ASSISTANT, END = 256, 257, 258
SPECIAL = {USER: "<|user|>", ASSISTANT: "<|assistant|>", END: "<|end|>"}
VOCABULARY = 300


def rounded(values: NDArray[np.float32], dtype: str) -> NDArray[np.float32]:
    """Logits as a model of this dtype gives them, in float32."""
    if dtype == "fp16":
        return values.astype(np.float16).astype(np.float32)
    if dtype == "bf16":
        bits = values.astype(np.float32).view(np.uint32)
        half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        return ((bits + half) & np.uint32(0xFFFF0000)).view(np.float32)
    return values.astype(np.float32)


def logprobs(prefix: list[int], dtype: str, salt: str = "") -> NDArray[np.float32]:
    """The model: log-probabilities of the next token, mostly letters, sooner or later the end."""
    seed = hashlib.sha256(salt.encode() + np.asarray(prefix, "<i4").tobytes()).digest()
    logits = np.random.default_rng(int.from_bytes(seed[:8])).normal(12.0, 2.0, VOCABULARY)
    logits[ord("a") : ord("z") + 1] += 6.0
    logits[END] += 5.0
    exact = rounded(logits.astype(np.float32), dtype)
    shifted = exact - exact.max()
    return (shifted - np.log(np.exp(shifted).sum())).astype(np.float32)


def text_of(tokens: list[int], special: bool = True) -> str:
    parts = [bytes([t]) if t < 256 else (SPECIAL.get(t, f"<{t}>").encode() if special else b"") for t in tokens]
    return b"".join(parts).decode("utf-8", "replace")


@dataclass
class State:
    """What the server is and does; tests change it while it runs."""

    model: str = "tiny"
    models: list[str] | None = None
    owned_by: str = "vllm"
    version: str = "0.32.0"
    fingerprint: str | None = "vllm-0.32.0-01234567"
    max_model_len: int | None = 4096
    speaks: str = "vllm"
    dtype: str = "fp32"
    salt: str = ""
    """Another one is another model."""
    token_ids: bool = True
    tokenizer: bool = True
    chat: bool = True
    prompt_logprobs: bool = True
    most_logprobs: int = 20
    spoil: Callable[[str, str, dict[str, Any]], Any] = lambda path, text, answer: answer
    """(path, prompt as text, answer) -> another answer; or bytes, a `Refusal`, None for a broken connection."""
    after: Callable[[str, str], None] = lambda path, text: None
    seen: list[tuple[str, str]] = field(default_factory=list)
    """(path, prompt as text) of every request that was answered or refused."""
    bodies: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Path -> what was asked there last."""
    weight_version: str = "default"
    older: bool = False
    """An older version of the server."""
    keys: set[str | None] = field(default_factory=set)
    """Authorization headers that came."""
    dead: bool = False

    def asked(self, path: str = "/v1/completions") -> Counter[str]:
        return Counter(text for where, text in self.seen if where == path)


@dataclass
class Refusal:
    """An answer that is none."""

    status: int
    body: str = '{"error": {"message": "no"}}'
    headers: dict[str, str] = field(default_factory=dict)


class Fake:
    """The server; `with Fake() as fake: fake.url`."""

    def __init__(self, state: State | None = None, port: int = 0) -> None:
        self.state = state or State()
        handler = type("Bound", (_Handler,), {"state": self.state, "fake": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self.http.daemon_threads = True
        self.port = int(self.http.server_address[1])
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self._thread = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self) -> Fake:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """Nobody listens any more, and open connections break."""
        self.state.dead = True
        self.http.shutdown()
        self.http.server_close()


@contextmanager
def serving(**state: Any) -> Iterator[Fake]:
    with Fake(State(**state)) as fake:
        yield fake


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: State
    fake: Fake

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._respond({})

    def do_POST(self) -> None:
        self._respond(json.loads(self.rfile.read(int(self.headers["content-length"]))))

    def _respond(self, body: dict[str, Any]) -> None:
        state, text = self.state, _prompt_text(body)
        state.keys.add(self.headers.get("authorization"))
        if not state.dead:
            answer = state.spoil(self.path, text, _answer(state, self.path, body))
        if state.dead or answer is None:
            self.close_connection = True
            return
        state.seen.append((self.path, text))
        state.bodies[self.path] = body
        refusal = answer if isinstance(answer, Refusal) else None
        raw = answer if isinstance(answer, bytes) else (refusal.body if refusal else json.dumps(answer)).encode()
        self.send_response(refusal.status if refusal else 200)
        for name, value in (refusal.headers if refusal else {}).items():
            self.send_header(name, value)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)
        state.after(self.path, text)


def _prompt_text(body: dict[str, Any]) -> str:
    if "messages" in body:
        return "".join(m["content"] for m in body["messages"])
    prompt = next((body[name] for name in ("prompt", "input_ids", "content", "text") if name in body), "")
    return prompt if isinstance(prompt, str) else text_of(prompt)


def _answer(state: State, path: str, body: dict[str, Any]) -> Any:
    from . import fake_llama_cpp, fake_sglang  # they import this module

    other = {"sglang": fake_sglang.answer, "llama.cpp": fake_llama_cpp.answer}.get(state.speaks)
    if other is not None and (found := other(state, path, body)) is not None:
        return found
    if path == "/v1/models":
        names = [state.model] if state.models is None else state.models
        card = {"object": "model", "created": time.time_ns(), "owned_by": state.owned_by, "root": "/home/somebody/tiny"}
        return {"data": [{"id": name, **card, "max_model_len": state.max_model_len} for name in names]}
    if path == "/version" and state.speaks == "vllm" and state.owned_by == "vllm":
        return {"version": state.version}
    if path == "/tokenize" and state.tokenizer and state.speaks == "vllm":
        if "messages" in body and not state.chat:
            return Refusal(400, '{"error": {"message": "default chat template is no longer allowed"}}')
        tokens = tokens_of(body["messages"]) if "messages" in body else list(body["prompt"].encode())
        return {"tokens": tokens, "count": len(tokens), "max_model_len": state.max_model_len}
    if path == "/detokenize" and state.tokenizer and state.speaks == "vllm":
        return {"prompt": text_of(body["tokens"])}
    if path == "/v1/completions" and (state.token_ids or isinstance(body.get("prompt"), str)):
        return _completion(state, body, body["prompt"])
    if path == "/v1/chat/completions" and state.chat:
        found = _completion(state, body, tokens_of(body["messages"]))
        choice = found["choices"][0]
        return found | {"choices": [{"finish_reason": choice["finish_reason"], "message": {"content": choice["text"]}}]}
    return Refusal(404, '{"detail": "Not Found"}')


def tokens_of(messages: list[dict[str, str]]) -> list[int]:
    turns = [[USER if m["role"] == "user" else 259, *m["content"].encode(), END] for m in messages]
    return [*(t for turn in turns for t in turn), ASSISTANT]


def greedy(state: State, prompt: list[int], most: int) -> tuple[list[int], list[NDArray[np.float32]]]:
    """The model's answer, and the log-probabilities of each of its tokens."""
    tokens: list[int] = []
    rows: list[NDArray[np.float32]] = []
    while len(tokens) < most and END not in tokens:
        rows.append(logprobs([*prompt, *tokens], state.dtype, state.salt))
        tokens.append(int(rows[-1].argmax()))
    return tokens, rows


def _completion(state: State, body: dict[str, Any], prompt: str | list[int]) -> Any:
    ids = list(prompt.encode()) if isinstance(prompt, str) else prompt
    many = max(body.get("logprobs") or 0, body.get("prompt_logprobs") or 0)
    if many > state.most_logprobs:
        return Refusal(400, json.dumps({"error": {"message": f"at most {state.most_logprobs} logprobs"}}))
    if body.get("model") != state.model:
        return Refusal(404, json.dumps({"error": {"message": f"The model {body.get('model')!r} does not exist."}}))
    tokens, rows = greedy(state, ids, body["max_tokens"])
    choice: dict[str, Any] = {
        "index": 0,
        "text": text_of(tokens, special=False),
        "finish_reason": "stop" if tokens[-1] == END else "length",
        "logprobs": None,
        "token_ids": None,
        "prompt_token_ids": None,
        "prompt_logprobs": None,
    }
    if state.token_ids and body.get("logprobs") and state.speaks == "vllm":
        tops = [_best(row, token, body["logprobs"]) for row, token in zip(rows, tokens, strict=True)]
        choice["logprobs"] = {
            "tokens": [f"token_id:{t}" for t in tokens],
            "token_logprobs": [top[t] for top, t in zip(tops, tokens, strict=True)],
            "top_logprobs": [{f"token_id:{t}": value for t, value in top.items()} for top in tops],
        }
        choice |= {"token_ids": tokens, "prompt_token_ids": ids}
    if state.prompt_logprobs and body.get("prompt_logprobs"):
        best = [
            _best(logprobs(ids[:i], state.dtype, state.salt), ids[i], body["prompt_logprobs"])
            for i in range(1, len(ids))
        ]
        cells = [
            {str(t): {"logprob": v, "rank": 1, "decoded_token": text_of([t])} for t, v in row.items()} for row in best
        ]
        choice["prompt_logprobs"] = [None, *cells]
    return {
        "object": "text_completion",
        "model": state.model,
        "system_fingerprint": state.fingerprint,
        "choices": [choice],
        "usage": {"prompt_tokens": len(ids), "completion_tokens": len(tokens)},
    }


def _best(row: NDArray[np.float32], own: int, count: int) -> dict[int, float]:
    """As vLLM orders them: the token itself, then the best."""
    order = np.argsort(-row, kind="stable")[:count]
    return {int(t): float(row[t]) for t in (own, *order)}
