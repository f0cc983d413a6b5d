"""llama.cpp's server: its native `/completion`, which takes and gives token ids; it cannot score a prompt's tokens.

It says nothing of a token that ends inside a character (of an emoji, say): the character's last token brings the bytes of
all of them, and only its own number. The others' numbers are unknown.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...generation import Output, Request
from ...text import inert
from .. import openai_answers
from ..openai_answers import Data, Malformed, Row, Steps
from ..openai_client import Server, Unanswered
from .base import BEST, HELLO, About, Content, Dialect, Foreign, messages, page, raise_unless_refused, text_of_tokens

GREEDY = {
    "temperature": 0,
    "samplers": ["temperature"],
    "seed": 0,
    "repeat_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "dry_multiplier": 0.0,
    "mirostat": 0,
    "logit_bias": [],
    "grammar": "",
    "stop": [],
    "ignore_eos": False,
    "cache_prompt": False,
    "post_sampling_probs": False,
    "stream": False,
}
"""llama.cpp takes what is not said from its command line. Its samplers are those that are listed, so that no penalty is
one; the prompt's cache is off, or how much of a prompt is computed together would depend on what was asked before."""
LEAST = -104.0
"""Below every logarithm of a positive float32. The server computes log(p) in float32, and where p came out as zero it says
the lowest number that there is."""
_ENDS = {"eos": "stop", "limit": "length"}


def meet(server: Server, model: str, card: Mapping[str, Any]) -> LlamaCpp:
    """Ask for a token with its numbers, and look at what came.

    Raises:
        Foreign: it shows no `/props`, or no ids.
        Unanswered: it cannot say so now.
    """
    if "build_info" not in page(server, "/props"):
        raise Foreign("it shows no build_info in /props")
    why = ""
    for chat in (True, False):
        found = LlamaCpp(server, model, card, chat, _context(page(server, "/props")))
        try:
            probe = Request("probe", np.asarray(found.tokenize(HELLO), np.int32), HELLO)
            data = found.ask(probe, 1)
            found.read(probe, data, 1)
        except Unanswered as exc:
            raise_unless_refused(exc)  # refused: an older server without /apply-template
            why = why or exc.what
        except Malformed as exc:
            raise Foreign(str(exc)) from None
        else:
            return replace(found, said=found.signature(data))
    raise Foreign(why)


def _context(props: Mapping[str, Any]) -> int | None:
    settings = props.get("default_generation_settings")
    length = settings.get("n_ctx") if isinstance(settings, dict) else None
    return length if isinstance(length, int) else None


@dataclass(frozen=True)
class LlamaCpp(Dialect):
    """A server that speaks as llama.cpp's does."""

    slot: int | None
    """Tokens that one request has room for."""

    name = "llama.cpp"

    @property
    def context_length(self) -> int | None:
        """One less than a slot holds: it stops before the last is filled."""
        return None if self.slot is None else self.slot - 1

    def abilities(self) -> dict[str, Any]:
        """What it was seen to do."""
        return {"chat": self.chat, "slot": self.slot}

    def about(self, attempts: int | None = None) -> About:
        """Its build and the file's type; the file's path and its template are held against a change only."""
        props = page(self.server, "/props", attempts)
        claims = {"quantization": props.get("model_ftype"), "slots": props.get("total_slots")}
        private = [props.get("model_path"), props.get("chat_template"), _context(props)]
        return About(
            version=inert(str(props.get("build_info", "")))[:80],
            claims={name: inert(str(value))[:80] for name, value in claims.items() if value is not None},
            private=json.dumps(private, sort_keys=True, default=str),
        )

    def signature(self, data: Data) -> dict[str, str]:
        """The model."""
        return {"model": str(data.get("model"))}

    def tokenize(self, content: Content) -> list[int]:
        """As its own chat would have it, or the plain text."""
        written: Any = content
        if self.chat:
            chat = {"model": self.model, "messages": messages(content)}
            written = openai_answers.text(self.server.post("/apply-template", chat).get("prompt"))
        asked = {"model": self.model, "content": written, "add_special": True, "parse_special": True}
        return openai_answers.token_ids(self.server.post("/tokenize", asked).get("tokens"))

    def detokenize(self, tokens: Sequence[int]) -> str | None:
        """Special tokens spelt out, as is its way."""
        return text_of_tokens(self.server, tokens, "content", model=self.model)

    def ask(self, request: Request, max_new_tokens: int) -> Data:
        """A continuation of token ids."""
        asked = {
            "model": self.model,
            "prompt": request.tokens.tolist(),
            "n_predict": max_new_tokens,
            "n_probs": BEST,
            "return_tokens": True,
        }
        return self.server.post("/completion", {**asked, **GREEDY})

    def read(self, request: Request, data: Data, max_new_tokens: int) -> Output:
        """`tokens`, and the numbers in `completion_probabilities`."""
        if data.get("tokens_evaluated") != len(request.tokens) or data.get("truncated") is not False:
            raise Malformed("the server answered another prompt: it added tokens, or took some away")
        if len(openai_answers.array(data.get("tokens"), "tokens")) > max_new_tokens:
            raise Malformed(f"more tokens than the {max_new_tokens} that were asked for")
        tokens, rows = _steps(data)
        ended = data.get("stop_type")
        reason = openai_answers.finish_reason(_ENDS.get(ended, ended) if isinstance(ended, str) else ended)
        text = openai_answers.text(data.get("content"))
        return openai_answers.output(
            request, Steps(tokens, rows, text, reason, data.get("tokens_predicted")), max_new_tokens
        )

    def rows(self, data: Data) -> list[Row]:
        """The best log-probabilities of each step; empty where it says nothing."""
        return _steps(data)[1]


def _steps(data: Data) -> tuple[list[int], list[Row]]:
    """(chosen tokens, each step's log-probabilities by token, the chosen one's among them)."""
    tokens = [openai_answers.token(value) for value in openai_answers.array(data.get("tokens"), "tokens")]
    listed = openai_answers.array(data.get("completion_probabilities"), "completion_probabilities")
    entries = [openai_answers.table(entry, "an entry of completion_probabilities") for entry in listed]
    rows: list[Row] = [{} for _ in tokens]
    for entry, place in zip(entries, _places(tokens, entries, data.get("content")), strict=True):
        if place is not None:
            rows[place] = _row(entry)
    return tokens, rows


def _places(tokens: list[int], entries: list[dict[str, Any]], content: Any) -> list[int | None]:
    """Which token each entry is of; None where tokens that were left out make that uncertain.

    Raises:
        Malformed: entries of other tokens, or some are left out without the reason that there is.
    """
    names = [openai_answers.token(entry.get("id")) for entry in entries]
    if names == tokens:
        return list(range(len(tokens)))
    places = defaultdict[int, list[int]](list)
    for place, token in enumerate(tokens):
        places[token].append(place)
    # Whether tokens before it may have been left out: before each entry, and before the end.
    loose = [*map(_completes_a_character, entries), isinstance(content, str) and content.endswith("\ufffd")]
    possible: list[set[int]] = [{-1}]
    for name, free in zip([*names, None], loose, strict=True):
        before = possible[-1]
        fit = [len(tokens)] if name is None else places[name]
        possible.append({place for place in fit if place - 1 in before or (free and place > min(before))})
        if not possible[-1]:
            raise Malformed(f"{len(tokens)} tokens, but log-probabilities of {len(entries)}, or of others")
    for i in range(len(names), 0, -1):
        after, free = possible[i + 1], loose[i]
        possible[i] = {place for place in possible[i] if place + 1 in after or (free and place < max(after))}
    return [next(iter(found)) if len(found) == 1 else None for found in possible[1:-1]]


def _completes_a_character(entry: dict[str, Any]) -> bool:
    """Whether an entry's text holds more than ASCII: only then may tokens before it be left out."""
    return any(isinstance(byte, int) and byte > 127 for byte in openai_answers.array(entry.get("bytes"), "bytes"))


def _row(entry: dict[str, Any]) -> Row:
    tops = openai_answers.array(entry.get("top_logprobs"), "top_logprobs")
    cells = [*(openai_answers.table(top, "an entry of top_logprobs") for top in tops), entry]
    found = openai_answers.row((cell.get("id"), cell.get("logprob")) for cell in cells)
    return {token: max(value, LEAST) for token, value in found.items()}
