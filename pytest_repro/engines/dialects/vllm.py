"""vLLM's server: token ids and log-probabilities in OpenAI's completions, replay through `prompt_logprobs`."""

from __future__ import annotations

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

MOST_LOGPROBS = (BEST, 5)
"""Tried in turn: vLLM's own limit, or OpenAI's."""
GREEDY = {"temperature": 0, "seed": 0, "n": 1, "stream": False}
NEUTRAL = {
    "top_p": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "add_special_tokens": False,
    "return_token_ids": True,
    "return_tokens_as_token_ids": True,
}
"""vLLM takes what is not said from the model's generation_config.json, penalties too, which greedy decoding has none of."""
_ID = "token_id:"


def meet(server: Server, model: str, card: Mapping[str, Any]) -> VLLM:
    """Ask for everything that is wanted, and look at what came.

    Raises:
        Foreign: it does not answer token ids with token ids and log-probabilities.
        Unanswered: it cannot say so now.
    """
    chat, tokens = _tokenised(server, model)
    probe = Request("probe", np.asarray(tokens, np.int32), HELLO)
    why = ""
    for logprobs in MOST_LOGPROBS:
        found = VLLM(server, model, card, chat, logprobs, False)
        try:
            data = found.ask(probe, 1)
            found.read(probe, data, 1)
        except Unanswered as exc:
            raise_unless_refused(exc)
            why = why or exc.what
        except Malformed as exc:
            raise Foreign(str(exc)) from None
        else:
            return replace(found, prompt_logprobs=_replays(found, probe), said=found.signature(data))
    raise Foreign(why)


def _tokenised(server: Server, model: str) -> tuple[bool, list[int]]:
    """(whether chat messages are rendered, token ids of a prompt)."""
    why = ""
    for chat in (True, False):
        try:
            return chat, VLLM(server, model, {}, chat, BEST, False).tokenize(HELLO)
        except Unanswered as exc:
            raise_unless_refused(exc)  # refused: a model without a chat template, or a server without a tokenizer
            why = exc.what
        except Malformed as exc:
            raise Foreign(str(exc)) from None
    raise Foreign(why)


def _replays(found: VLLM, probe: Request) -> bool:
    try:
        return len(found.prompt_rows(found.scored(probe, probe.tokens.tolist()), len(probe.tokens))) > 1
    except Unanswered as exc:
        raise_unless_refused(exc)
    except Malformed:
        pass
    return False


@dataclass(frozen=True)
class VLLM(Dialect):
    """A server that speaks as vLLM does."""

    logprobs: int
    """Log-probabilities that it gives at each token."""
    prompt_logprobs: bool
    """Whether it gives those of a prompt."""

    name = "vllm"

    @property
    def replays(self) -> bool:
        """Whether it gives the log-probabilities of a prompt."""
        return self.prompt_logprobs

    @property
    def context_length(self) -> int | None:
        """One token less than the server's: it insists on generating one after a replay."""
        length = self.card.get("max_model_len")
        return length - self.replays if isinstance(length, int) else None

    def abilities(self) -> dict[str, Any]:
        """What it was seen to do."""
        return {"chat": self.chat, "logprobs": self.logprobs, "prompt_logprobs": self.prompt_logprobs}

    def about(self, attempts: int | None = None) -> About:
        """Its version."""
        version = page(self.server, "/version", attempts).get("version")
        return About(inert(str(version))[:80] if version else "")

    def signature(self, data: Data) -> dict[str, str]:
        """The model, and the system's fingerprint."""
        return {name: str(data.get(name)) for name in ("model", "system_fingerprint")}

    def tokenize(self, content: Content) -> list[int]:
        """As its own chat would have it, or the plain text."""
        asked = {"messages": messages(content), "add_generation_prompt": True} if self.chat else {"prompt": content}
        return openai_answers.token_ids(self.server.post("/tokenize", {"model": self.model, **asked}).get("tokens"))

    def detokenize(self, tokens: Sequence[int]) -> str | None:
        """Special tokens spelt out, as is vLLM's default."""
        return text_of_tokens(self.server, tokens, "prompt", model=self.model)

    def ask(self, request: Request, max_new_tokens: int) -> Data:
        """A completion of token ids."""
        return self.server.post("completions", self._body(request.tokens.tolist(), max_new_tokens, self.logprobs))

    def read(self, request: Request, data: Data, max_new_tokens: int) -> Output:
        """Token ids as `return_token_ids` and `return_tokens_as_token_ids` have them."""
        choice = openai_answers.choice(data)
        if (echoed := choice.get("prompt_token_ids")) is not None and echoed != request.tokens.tolist():
            raise Malformed("the server answered another prompt: it added tokens, or took some away")
        tokens, rows = _steps(choice)
        usage = data.get("usage")
        counted = usage.get("completion_tokens") if isinstance(usage, dict) else None
        reason, text = (
            openai_answers.finish_reason(choice.get("finish_reason")),
            openai_answers.text(choice.get("text")),
        )
        return openai_answers.output(request, Steps(tokens, rows, text, reason, counted), max_new_tokens)

    def rows(self, data: Data) -> list[Row]:
        """The best log-probabilities of each step."""
        return _steps(openai_answers.choice(data))[1]

    def ask_replay(self, request: Request) -> Data:
        """`prompt_logprobs` of prompt and golden."""
        assert request.reference is not None, "replay needs the golden's tokens"
        return self.scored(request, [*request.tokens.tolist(), *request.reference.tolist()])

    def read_replay(self, request: Request, data: Data) -> Scores:
        """The golden's part of them."""
        assert request.reference is not None, "replay needs the golden's tokens"
        rows = self.prompt_rows(data, len(request.tokens) + len(request.reference))
        return openai_answers.scores(request, rows[len(request.tokens) :])

    def scored(self, request: Request, prompt: list[int]) -> Data:
        """A prompt with its own log-probabilities."""
        return self.server.post("completions", {**self._body(prompt, 1, 1), "prompt_logprobs": self.logprobs})

    def prompt_rows(self, data: Data, length: int) -> list[Row]:
        """Each prompt token's best log-probabilities, its own among them; the first has none."""
        listed = openai_answers.array(openai_answers.choice(data).get("prompt_logprobs"), "prompt_logprobs", length)
        tables = [openai_answers.table(row, "prompt_logprobs of a token") for row in listed[1:]]
        cells = [[(key, _table(cell).get("logprob")) for key, cell in table.items()] for table in tables]
        return [{}, *map(openai_answers.row, cells)]

    def _body(self, prompt: list[int], max_new_tokens: int, logprobs: int) -> dict[str, Any]:
        asked = {"model": self.model, "prompt": prompt, "max_tokens": max_new_tokens, "logprobs": logprobs}
        return {**asked, **GREEDY, **NEUTRAL}


def _steps(choice: dict[str, Any]) -> tuple[list[int], list[Row]]:
    """(chosen tokens, each step's log-probabilities by token, the chosen one's among them)."""
    logprobs = openai_answers.table(choice.get("logprobs"), "logprobs")
    named = logprobs.get("tokens")
    given = openai_answers.array(named if choice.get("token_ids") is None else choice["token_ids"], "tokens")
    tops = openai_answers.array(logprobs.get("top_logprobs"), "top_logprobs", len(given))
    own = openai_answers.array(logprobs.get("token_logprobs"), "token_logprobs", len(given))
    tokens = [openai_answers.token(_bare(value)) for value in given]
    return tokens, [
        openai_answers.row([*((_bare(key), cell) for key, cell in _table(top).items()), (token, value)])
        for token, top, value in zip(tokens, tops, own, strict=True)
    ]


def _bare(value: Any) -> Any:
    """7 or "7" of "token_id:7"."""
    return value.removeprefix(_ID) if isinstance(value, str) else value


def _table(value: Any) -> dict[str, Any]:
    return openai_answers.table(value, "a step's table of log-probabilities")
