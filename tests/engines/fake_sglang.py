"""SGLang's own pages, as version 0.5.23 answers them, or an older one."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from .fake_server import END, VOCABULARY, Refusal, State, greedy, logprobs, text_of, tokens_of

SAMPLING = {
    "max_new_tokens", "stop", "stop_token_ids", "stop_regex", "temperature", "top_p", "top_k", "min_p",
    "frequency_penalty", "presence_penalty", "repetition_penalty", "min_new_tokens", "n", "json_schema", "regex", "ebnf",
    "structural_tag", "ignore_eos", "skip_special_tokens", "spaces_between_special_tokens", "no_stop_trim",
    "stream_interval", "logit_bias", "sampling_seed", "custom_params", "beam_width", "watermark", "choice",
}  # fmt: skip
"""Any other key is refused."""


def answer(state: State, path: str, body: dict[str, Any]) -> Any:
    """The answer; None where a page is not SGLang's own."""
    name = path.removeprefix("/get_") if path.startswith("/get_") else "" if state.older else path.removeprefix("/")
    if name == "model_info":
        paths = {"model_path": "/home/somebody/tiny", "tokenizer_path": "/home/somebody/tiny"}
        return {**paths, "is_generation": True, "weight_version": state.weight_version}
    if name == "server_info":
        return {
            "version": state.version,
            "dtype": "auto",
            "attention_backend": "flashinfer\x1b[31m",
            "tp_size": 2,
            "quantization": None,
            "launch_command": "sglang --api-key sk-its-own",
        }
    if path == "/tokenize" and state.tokenizer:
        if "messages" in body and (state.older or not state.chat):
            return Refusal(400, '{"error": {"message": "Exactly one of prompt or messages must be provided."}}')
        tokens = tokens_of(body["messages"]) if "messages" in body else list(body["prompt"].encode())
        return {"tokens": tokens, "count": len(tokens), "max_model_len": state.max_model_len}
    if path == "/detokenize" and state.tokenizer:
        return {"text": text_of(body["tokens"], special=not body["skip_special_tokens"])}
    if path == "/generate" and state.token_ids:
        return _generate(state, body)
    return None


def _generate(state: State, body: dict[str, Any]) -> Any:
    sampling, ids, best = body["sampling_params"], body["input_ids"], body["top_logprobs_num"]
    if unknown := set(sampling) - SAMPLING:
        return Refusal(400, json.dumps({"error": f"unknown field {unknown}"}))
    if len(ids) >= (state.max_model_len or 4096) - 6:
        return Refusal(400, json.dumps({"error": {"message": "longer than the context length"}}))
    tokens, rows = greedy(state, ids, sampling["max_new_tokens"])
    start = len(ids) if body["logprob_start_len"] == -1 else body["logprob_start_len"]
    own = [logprobs(ids[:i], state.dtype, state.salt) for i in range(start + 1, len(ids))]
    shown = [token if token < VOCABULARY - 1 else 0 for token in ids[start:]]
    stopped = tokens[-1] == END
    return {
        "text": text_of(tokens[:-1] if stopped else tokens, special=False),
        "output_ids": tokens,
        "meta_info": {
            "id": "0123",
            "finish_reason": {"type": "stop", "matched": END} if stopped else {"type": "length", "length": len(tokens)},
            "prompt_tokens": len(ids),
            "completion_tokens": len(tokens),
            "cached_tokens": 0,
            "weight_version": state.weight_version,
            "input_token_logprobs": [
                [value, token, None]
                for value, token in zip(
                    [None, *(float(row[t]) for row, t in zip(own, ids[start + 1 :], strict=True))][: len(shown)],
                    shown,
                    strict=True,
                )
            ],
            "input_top_logprobs": [None, *(_best(row, best) for row in own)][: len(shown)],
            "output_token_logprobs": [[float(row[t]), t, None] for row, t in zip(rows, tokens, strict=True)],
            "output_top_logprobs": [_best(row, best) for row in rows],
        },
    }


def _best(row: Any, count: int) -> list[list[Any]]:
    return [[float(row[token]), int(token), None] for token in np.argsort(-row, kind="stable")[:count]]
