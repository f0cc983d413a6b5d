"""Any server that speaks OpenAI's HTTP API and shows no token ids: its texts, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...errors import EngineError
from ...generation import Output, Request
from ...text import inert
from .. import openai_answers
from ..openai_answers import Data, Malformed
from ..openai_client import Server, Unanswered
from .base import HELLO, About, Content, Dialect, messages, page, raise_unless_refused

LISTED_AS = {"vllm": "vllm", "sglang": "sglang", "llamacpp": "llama.cpp"}
"""`owned_by` of a listed model -> what its server is called."""
GREEDY = {"temperature": 0, "seed": 0, "n": 1, "stream": False}
_VERSIONS = {
    "sglang": ("/get_server_info", "version"),
    "llamacpp": ("/props", "build_info"),
}
"""`owned_by` -> where its version stands, if not under `/version`."""


def meet(server: Server, model: str, card: Mapping[str, Any]) -> Text:
    """Ask for a text in every way that there is.

    Raises:
        EngineError: none is answered.
    """
    probe, refused = Request("probe", np.zeros(0, np.int32), HELLO), ""
    for chat in (True, False):
        for limit in ("max_tokens", "max_completion_tokens"):
            found = Text(server, model, card, chat, limit)
            try:
                data = found.ask(probe, 1)
            except Unanswered as exc:
                raise_unless_refused(exc)
                refused = refused or exc.what
            else:
                return replace(found, said=found.signature(data))
    raise EngineError(f"the server answers neither chats nor completions: {refused}")


@dataclass(frozen=True)
class Text(Dialect):
    """A server of which only texts are known."""

    limit_name: str
    """How it wants the number of tokens to be called."""

    name = "text"
    text_only = True

    @property
    def server_name(self) -> str:
        """What its list says."""
        return LISTED_AS.get(str(self.card.get("owned_by")), "unknown")

    def abilities(self) -> dict[str, Any]:
        """What it was seen to do."""
        return {"chat": self.chat, "limit_name": self.limit_name}

    def about(self, attempts: int | None = None) -> About:
        """Its version, if it shows one."""
        path, field = _VERSIONS.get(str(self.card.get("owned_by")), ("/version", "version"))
        version = page(self.server, path, attempts).get(field)
        return About(inert(str(version))[:80] if isinstance(version, str | int | float) else "")

    def signature(self, data: Data) -> dict[str, str]:
        """The model, and the system's fingerprint."""
        return {name: str(data.get(name)) for name in ("model", "system_fingerprint")}

    def tokenize(self, content: Content) -> list[int]:
        """Never called: the engine has the text's bytes in place of tokens."""
        raise Malformed("the server shows no token ids")

    def detokenize(self, tokens: Sequence[int]) -> str | None:
        """Bytes as text."""
        return bytes(t for t in tokens if t < 256).decode("utf-8", "replace")

    def ask(self, request: Request, max_new_tokens: int) -> Data:
        """A chat, or a completion where there are no chats."""
        asked = {"model": self.model, self.limit_name: max_new_tokens, **GREEDY}
        if self.chat:
            return self.server.post("chat/completions", {**asked, "messages": messages(request.content)})
        return self.server.post("completions", {**asked, "prompt": request.content})

    def read(self, request: Request, data: Data, max_new_tokens: int) -> Output:
        """Its UTF-8 bytes as tokens, and no numbers."""
        choice = openai_answers.choice(data)
        reason = openai_answers.finish_reason(choice.get("finish_reason"))
        message = choice.get("message")
        text = openai_answers.text(
            (message if isinstance(message, dict) else {"content": choice.get("text")}).get("content")
        )
        if not text and reason != "stop":
            raise Malformed("the server answered with an empty text, and did not end it")
        tokens = np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.int32)
        unknown = np.full(len(tokens), np.nan, np.float32)
        runner_up = np.full(len(tokens), -1, np.int32)
        return Output(request.id, tokens, text, reason, logprob=unknown, gap=unknown, runner_up=runner_up)
