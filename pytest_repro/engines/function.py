"""Any Python callable as an engine of one's own.

It takes the batch's prompts (text or chat messages) and returns an answer for each: a string, or a mapping with `tokens`
and, as far as they are known, `text`, `finish_reason`, `logprob`, `gap`, `runner_up` (see `generation.Output`). For a
plain string the tokens are its UTF-8 bytes, which tell that and where texts part, but nothing of rounding: without
numbers no difference can be shown to be a near tie, and the verdict on it is `drift`.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np

from ..errors import ConfigError, EngineError
from ..fingerprint import Fingerprint
from ..generation import FINISH_REASONS, Generation, Output, Request, Scores, digest
from ..precision import Observation
from ..sketch import Sketch
from ..suite import Prompt
from .base import Engine, Opener, Spec, Tick, no_tick

Function = Callable[[list[Any]], Sequence[Any]]
"""[prompt, ...] -> [answer, ...], as many."""


def from_name(name: str, allow_code: bool) -> Opener:
    """The opener of `module:function`.

    Raises:
        ConfigError: not importable, or not opted in.
    """
    if not allow_code:
        raise ConfigError(
            f"the engine {name!r} is code, and a suite may not run code by itself",
            where="engine",
            fix="if you trust it, add --repro-allow-code, or name it on the command line with --repro-engine",
        )
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError, TypeError) as exc:
        raise ConfigError(f"the engine {name!r} cannot be imported: {exc}", where="engine") from None
    return from_function(found, name)


def from_function(function: Function, name: str = "") -> Opener:
    """The opener of a callable."""

    @contextmanager
    def open_engine(spec: Spec) -> Iterator[Engine]:
        shown = name or f"{function.__module__}:{getattr(function, '__qualname__', type(function).__name__)}"
        yield FunctionEngine(function, shown, spec.max_new_tokens)

    opened: Callable[[Spec], AbstractContextManager[Engine]] = open_engine
    return opened


class FunctionEngine:
    """A callable, called once a batch."""

    context_length: int | None = None
    text_only = True
    replays = False

    def __init__(self, function: Function, name: str, max_new_tokens: int) -> None:
        self.function = function
        self.name = name
        self.max_new_tokens = max_new_tokens

    def facts(self) -> Fingerprint:
        """What is known of a black box: its name, and how much it was asked for."""
        return {
            "engine": self.name,
            "generation": digest({"max_new_tokens": self.max_new_tokens}),
            "tokenizer": "utf-8 or its own",
        }

    def observe(self) -> Observation:
        """Nothing can be observed of it."""
        return Observation("unknown", 0.0, 0.0, "a Python callable: its arithmetic cannot be observed")

    def encode(self, prompt: Prompt) -> list[int]:
        """UTF-8 bytes of the prompt as written."""
        return list((prompt.content if isinstance(prompt.content, str) else json.dumps(prompt.content)).encode())

    def decode(self, tokens: Sequence[int]) -> str:
        """Bytes as text; ids beyond a byte as themselves."""
        if all(t < 256 for t in tokens):
            return bytes(tokens).decode("utf-8", "replace")
        return "".join(f" {t}" for t in tokens)

    def generate(self, batch: Sequence[Request], tick: Tick = no_tick) -> list[Output]:
        """One call of the function for the batch."""
        try:
            answers = list(self.function([request.content for request in batch]))
        except Exception as exc:
            raise EngineError(f"the engine {self.name} raised {type(exc).__name__}: {exc}") from exc
        if len(answers) != len(batch):
            raise EngineError(f"the engine {self.name} was given {len(batch)} prompts and gave {len(answers)} answers")
        try:
            outputs = [self._output(request, answer) for request, answer in zip(batch, answers, strict=True)]
            Generation.of(batch, outputs)  # columns as long as the tokens
        except (ValueError, TypeError, OverflowError) as exc:
            raise EngineError(f"the engine {self.name} gave an answer that does not fit: {exc}") from exc
        for output in outputs:
            tick(len(output.tokens))
        return outputs

    def _output(self, request: Request, answer: Any) -> Output:
        row: Mapping[str, Any] = (
            {"text": answer, "tokens": list(answer.encode())} if isinstance(answer, str) else answer
        )
        if not isinstance(row, Mapping) or "tokens" not in row:
            raise EngineError(
                f"the engine {self.name} answered {type(answer).__name__}: a string, or a mapping with tokens"
            )
        tokens = np.asarray(row["tokens"], np.int32)
        unknown = np.full(len(tokens), np.nan, np.float32)
        reason = row.get("finish_reason", "stop")
        return Output(
            id=request.id,
            tokens=tokens,
            text=str(row.get("text", self.decode(tokens.tolist()))),
            finish_reason=reason if reason in FINISH_REASONS else "stop",
            logprob=np.asarray(row.get("logprob", unknown), np.float32),
            gap=np.asarray(row.get("gap", unknown), np.float32),
            runner_up=np.asarray(row.get("runner_up", np.full(len(tokens), -1)), np.int32),
        )

    def replay(self, requests: Sequence[Request], tick: Tick = no_tick) -> list[Scores]:
        """A callable cannot score given tokens."""
        raise EngineError(f"the engine {self.name} cannot replay", fix="--repro-method decode")

    def replay_fp32(self, requests: Sequence[Request], tick: Tick = no_tick) -> list[Scores] | None:
        """A black box has no other numerics."""
        return None

    def sketches(self, requests: Sequence[Request], tick: Tick = no_tick) -> Iterator[Sketch]:
        """A black box cannot be looked into."""
        return iter(())

    def benign(self) -> Iterator[tuple[str, Callable[[Sequence[Request], Tick], list[Scores]]]]:
        """None: it has no numerics to vary."""
        return iter(())
