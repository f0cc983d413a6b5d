"""SGLang's server: its native `/generate`, which takes and gives token ids, and scores a prompt's own tokens.

Log-probabilities come as [number, token id, text or null]. They are asked for from the prompt's first token on, always:
SGLang then computes the whole prompt anew, where it would else take from its prefix cache what others left there, and the
prompt's ids come back to be looked at.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...generation import Output, Request, Scores
from ...text import inert
from .. import openai_answers
from ..openai_answers import Data, Malformed, Row, Steps
from ..openai_client import Server, Unanswered
from .base import BEST, HELLO, About, Content, Dialect, Foreign, messages, page, raise_unless_refused, text_of_tokens

GREEDY = {
    "temperature": 0.0,
    "top_k": 1,
    "top_p": 1.0,
    "min_p": 0.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_new_tokens": 0,
    "ignore_eos": False,
    "stop": None,
    "stop_token_ids": None,
    "n": 1,
}
"""SGLang takes what is not said from its option `--preferred-sampling-params`."""
RESERVED = 7
"""Tokens of its context that SGLang gives to nobody: it takes no prompt that leaves fewer."""
CLAIMS = (
    "dtype",
    "quantization",
    "kv_cache_dtype",
    "attention_backend",
    "tp_size",
    "enable_deterministic_inference",
    "speculative_algorithm",
)
"""What `/server_info` says of how it computes."""


def meet(server: Server, model: str, card: Mapping[str, Any]) -> SGLang:
    """Ask for a token and for the prompt's own numbers, and look at what came.

    Raises:
        Foreign: it has no `/generate` of this kind, or tokenises nothing.
        Unanswered: it cannot say so now.
    """
    if "model_path" not in _page(server, "model_info"):
        raise Foreign("it shows no /model_info")
    why = ""
    for chat in (True, False):
        found = SGLang(server, model, card, chat)
        try:
            probe = Request("probe", np.asarray(found.tokenize(HELLO), np.int32), HELLO)
            data = found.ask(probe, 1)
            found.read(probe, data, 1)
        except Unanswered as exc:
            raise_unless_refused(exc)  # refused: a model without a chat template, or a server without /tokenize
            why = why or exc.what
        except Malformed as exc:
            raise Foreign(str(exc)) from None
        else:
            return replace(found, said=found.signature(data))
    raise Foreign(why)


def _page(server: Server, name: str, attempts: int | None = None) -> dict[str, Any]:
    """Under its name, or that of older versions."""
    return page(server, f"/{name}", attempts) or page(server, f"/get_{name}", attempts)


@dataclass(frozen=True)
class SGLang(Dialect):
    """A server that speaks as SGLang does."""

    name = "sglang"

    @property
    def replays(self) -> bool:
        """It scores a prompt's tokens whenever it gives log-probabilities at all."""
        return True

    @property
    def context_length(self) -> int | None:
        """What it lists, less what it keeps for itself."""
        length = self.card.get("max_model_len")
        return length - RESERVED if isinstance(length, int) else None

    def abilities(self) -> dict[str, Any]:
        """What it was seen to do."""
        return {"chat": self.chat}

    def about(self, attempts: int | None = None) -> About:
        """Its version and settings; its model's paths and the version of its weights are held against a change only."""
        info, model = _page(self.server, "server_info", attempts), _page(self.server, "model_info", attempts)
        claims = {name: info.get(name) for name in CLAIMS if isinstance(info.get(name), str | int | float | bool)}
        private = {name: model.get(name) for name in ("model_path", "tokenizer_path", "weight_version")}
        return About(
            version=inert(str(info.get("version", "")))[:80],
            claims={name: inert(value)[:80] if isinstance(value, str) else value for name, value in claims.items()},
            private=json.dumps(private, sort_keys=True, default=str),
        )

    def signature(self, data: Data) -> dict[str, str]:
        """The version of the weights, which can be exchanged while it runs."""
        meta = data.get("meta_info")
        return {"weight_version": str(meta.get("weight_version")) if isinstance(meta, dict) else ""}

    def tokenize(self, content: Content) -> list[int]:
        """As its own chat would have it, or the plain text."""
        asked = {"messages": messages(content)} if self.chat else {"prompt": content}
        return openai_answers.token_ids(self.server.post("/tokenize", {"model": self.model, **asked}).get("tokens"))

    def detokenize(self, tokens: Sequence[int]) -> str | None:
        """Special tokens spelt out."""
        return text_of_tokens(self.server, tokens, "text", model=self.model, skip_special_tokens=False)

    def ask(self, request: Request, max_new_tokens: int) -> Data:
        """A continuation of token ids."""
        return self._generate(request.tokens.tolist(), max_new_tokens)

    def read(self, request: Request, data: Data, max_new_tokens: int) -> Output:
        """`output_ids`, and the numbers in `meta_info`."""
        meta = openai_answers.table(data.get("meta_info"), "meta_info")
        _check_prompt(meta, request.tokens.tolist())
        tokens, rows = _steps(data)
        text, reason = openai_answers.text(data.get("text")), _finish_reason(meta)
        return openai_answers.output(
            request, Steps(tokens, rows, text, reason, meta.get("completion_tokens")), max_new_tokens
        )

    def rows(self, data: Data) -> list[Row]:
        """The best log-probabilities of each step."""
        return _steps(data)[1]

    def ask_replay(self, request: Request) -> Data:
        """Prompt and golden as one prompt."""
        return self._generate(_whole(request), 1)

    def read_replay(self, request: Request, data: Data) -> Scores:
        """The golden's part of the prompt's numbers."""
        meta, prompt = openai_answers.table(data.get("meta_info"), "meta_info"), _whole(request)
        own = _check_prompt(meta, prompt)
        tops = openai_answers.array(meta.get("input_top_logprobs"), "input_top_logprobs", len(prompt))
        start = len(request.tokens)
        rows = [
            _row(top, token, number)
            for token, (number, _), top in zip(prompt[start:], own[start:], tops[start:], strict=True)
        ]
        return openai_answers.scores(request, rows)

    def _generate(self, prompt: list[int], max_new_tokens: int) -> Data:
        asked = {
            "input_ids": prompt,
            "sampling_params": {**GREEDY, "max_new_tokens": max_new_tokens},
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": BEST,
            "return_text_in_logprobs": False,
            "stream": False,
        }
        adapter = {"lora_path": self.model} if self.card.get("parent") else {}
        return self.server.post("/generate", {**asked, **adapter})


def _whole(request: Request) -> list[int]:
    assert request.reference is not None, "replay needs the golden's tokens"
    return [*request.tokens.tolist(), *request.reference.tolist()]


def _steps(data: Data) -> tuple[list[int], list[Row]]:
    """(chosen tokens, each step's log-probabilities by token, the chosen one's among them)."""
    meta = openai_answers.table(data.get("meta_info"), "meta_info")
    tokens = [openai_answers.token(value) for value in openai_answers.array(data.get("output_ids"), "output_ids")]
    own = _pairs(openai_answers.array(meta.get("output_token_logprobs"), "output_token_logprobs", len(tokens)))
    tops = openai_answers.array(meta.get("output_top_logprobs"), "output_top_logprobs", len(tokens))
    if [token for _, token in own] != tokens:
        raise Malformed("output_token_logprobs are of other tokens than output_ids")
    return tokens, [_row(top, token, number) for top, (number, token) in zip(tops, own, strict=True)]


def _row(top: Any, token: int, number: Any) -> Row:
    return openai_answers.row([*((other, value) for value, other in _pairs(top)), (token, number)])


def _check_prompt(meta: dict[str, Any], prompt: list[int]) -> list[tuple[Any, Any]]:
    """The prompt's own log-probabilities, once they are seen to be of this prompt.

    SGLang shows the last id of the vocabulary, and what lies beyond it, as 0.
    """
    own = _pairs(openai_answers.array(meta.get("input_token_logprobs"), "input_token_logprobs", len(prompt)))
    if any(shown not in (token, 0) for (_, shown), token in zip(own, prompt, strict=True)):
        raise Malformed("the server answered another prompt: it added tokens, or took some away")
    return own


def _finish_reason(meta: dict[str, Any]) -> str:
    """`stop` for an end-of-sequence token only: a stop string, or "NaN happened", cuts a text short."""
    reason = openai_answers.table(meta.get("finish_reason"), "finish_reason")
    if reason.get("type") == "stop" and isinstance(reason.get("matched"), str):
        raise Malformed(f"the text was cut short at {reason['matched'][:40]!r}")
    return openai_answers.finish_reason(reason.get("type"))


def _pairs(entries: Any) -> list[tuple[Any, Any]]:
    """(number, token id) of each entry."""
    found = openai_answers.array(entries, "a step's log-probabilities")
    if not all(isinstance(entry, list) and len(entry) >= 2 for entry in found):
        raise Malformed("the server's log-probabilities are not [number, token id, text]")
    return [(entry[0], entry[1]) for entry in found]
