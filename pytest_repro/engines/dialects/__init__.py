"""How servers are spoken to, and which of the ways one understands: found out from what it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ...errors import ConfigError
from ...text import inert
from ..openai_client import Server
from . import llama_cpp, sglang, text, vllm
from .base import Dialect, Foreign

WITH_TOKENS: dict[str, Callable[[Server, str, Mapping[str, Any]], Dialect]] = {
    "vllm": vllm.meet,
    "sglang": sglang.meet,
    "llama.cpp": llama_cpp.meet,
}
NAMES = ("auto", *WITH_TOKENS, "text")
"""What the option `dialect` may be."""


def find(server: Server, model: str, card: Mapping[str, Any], wanted: str, say: Callable[[str], None]) -> Dialect:
    """The dialect with the most numbers that the server answers in.

    Args:
        server: who is asked.
        model: as the server calls it.
        card: what the server lists of the model; it decides only which dialect is tried first.
        wanted: "auto", or the one dialect to be spoken.
        say: told what cannot be checked.

    Raises:
        ConfigError: the server does not speak the dialect that was asked for.
        EngineError: it answers nothing at all.
    """
    if wanted in WITH_TOKENS:
        try:
            return WITH_TOKENS[wanted](server, model, card)
        except Foreign as exc:
            raise ConfigError(
                f"the server does not speak {wanted}'s dialect: {inert(str(exc))}",
                where="[engine.openai] dialect",
                fix="leave it out, and the dialect is found out",
            ) from None
    listed_as = text.LISTED_AS.get(str(card.get("owned_by")), "")
    lacks = ""
    for name in sorted(WITH_TOKENS if wanted == "auto" else (), key=lambda name: name != listed_as):
        try:
            return WITH_TOKENS[name](server, model, card)
        except Foreign as exc:
            lacks = f" ({inert(str(exc))})" if name == listed_as else lacks
    say(f"this server shows no token ids with log-probabilities{lacks}: only texts are compared, no rounding is judged")
    return text.meet(server, model, card)
