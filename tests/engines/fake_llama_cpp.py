"""The own pages of llama.cpp's server, as it was seen to answer them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from .fake_server import END, SPECIAL, Refusal, State, greedy, text_of, tokens_of

CHAT = "<|chat|>"
"""Stands for a rendered chat, which this tokenizer could not read back."""


def answer(state: State, path: str, body: dict[str, Any]) -> Any:
    """The answer; None where a page is not llama.cpp's own."""
    if path == "/props":
        return {
            "default_generation_settings": {"n_ctx": state.max_model_len, "params": {}},
            "total_slots": 4,
            "model_path": "/home/somebody/tiny.gguf",
            "model_ftype": "Q4_1\x1b[31m",
            "chat_template": "{{ messages }}",
            "build_info": state.version,
        }
    if path == "/v1/models":
        meta = {"n_vocab": 300, "size": 96 + len(state.salt), "n_params": 134}
        names = [state.model] if state.models is None else state.models
        return {"data": [{"id": name, "owned_by": state.owned_by, "created": 7, "meta": meta} for name in names]}
    if path == "/apply-template" and state.chat and not state.older:
        return {"prompt": CHAT + json.dumps(body["messages"])}
    if path == "/tokenize" and state.tokenizer:
        content = body.get("content", "")
        chat = content.startswith(CHAT)
        return {"tokens": tokens_of(json.loads(content.removeprefix(CHAT))) if chat else list(content.encode())}
    if path == "/detokenize" and state.tokenizer:
        return {"content": text_of(body["tokens"])}
    if path == "/completion" and state.token_ids:
        return _completion(state, body)
    return None


def _completion(state: State, body: dict[str, Any]) -> Any:
    ids = body["prompt"]
    if len(ids) >= (state.max_model_len or 4096):
        return Refusal(400, json.dumps({"error": {"type": "exceed_context_size_error"}}))
    tokens, rows = greedy(state, ids, body["n_predict"])
    entries, pending = [], b""
    for row, token in zip(rows, tokens, strict=True):
        pending += bytes([token]) if token < 256 else b""
        if not _whole(pending):
            continue
        best = [_entry(int(t), float(row[t])) for t in np.argsort(-row, kind="stable")[: body["n_probs"]]]
        entries.append({**_entry(token, float(row[token])), "bytes": [*pending], "top_logprobs": best})
        pending = b""
    stopped = tokens[-1] == END
    return {
        "index": 0,
        "content": text_of(tokens[:-1] if stopped else tokens, special=False),
        "tokens": tokens if body["return_tokens"] else [],
        "model": state.model,
        "tokens_predicted": len(tokens),
        "tokens_evaluated": len(ids),
        "truncated": False,
        "stop": True,
        "stop_type": "eos" if stopped else "limit",
        "completion_probabilities": entries,
    }


def _entry(token: int, logprob: float) -> dict[str, Any]:
    return {"id": token, "token": SPECIAL.get(token, text_of([token])), "logprob": logprob}


def _whole(text: bytes) -> bool:
    """Whether no character is cut off at the end."""
    try:
        text.decode()
    except UnicodeDecodeError as exc:
        return exc.reason != "unexpected end of data"
    return True
