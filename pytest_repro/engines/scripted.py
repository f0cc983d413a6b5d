"""An engine that answers from a script: for tests of suites and of this package, without a model.

The script is a JSON Lines file in the suite's folder, `[engine] script = "script.jsonl"`, one line a prompt::

    {"id": "p01", "tokens": [5, 6, 7], "logprob": [-0.1, -0.2, -0.1], "gap": [2.0, 0.1, 3.0], "runner_up": [8, 9, 8]}

Optional: `text` (default: the token ids), `finish_reason` (default `stop`), `error` (the prompt fails with it).
`[engine] fp32` names another script of the same form: the answers of the same weights under FP32, for the arbiter.
`[engine] jitter` is the benign noise it shows when a golden is recorded, `observed` the compute class it observes.
Nothing of the script is executed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..fingerprint import Fingerprint
from ..generation import Generation, Output, Request, Scores, digest
from ..precision import Observation
from ..sketch import Sketch
from ..suite import Prompt, inside
from .base import Engine, Spec, Tick, no_tick


@contextmanager
def open_engine(spec: Spec) -> Iterator[Engine]:
    """Open the script that `[engine] script` names."""
    name = spec.options.get("script")
    if not isinstance(name, str):
        raise ConfigError(
            "the scripted engine needs a script", where=spec.folder, fix='[engine]\nscript = "script.jsonl"'
        )
    rows = _read(inside(spec.folder, name, where=f"{spec.folder} [engine.script]"))
    fp32 = spec.options.get("fp32")
    if fp32 is not None and not isinstance(fp32, str):
        raise ConfigError(f"{fp32!r} is not a file's name", where=f"{spec.folder} [engine.fp32]")
    claimed = spec.mode.compute_class or "bf16"
    jitter = spec.options.get("jitter", 0.0)
    if not isinstance(jitter, int | float):
        raise ConfigError(f"{jitter!r} is not a number", where=f"{spec.folder} [engine.jitter]")
    yield ScriptedEngine(
        rows,
        fp32=_read(inside(spec.folder, fp32, where=f"{spec.folder} [engine.fp32]")) if fp32 else None,
        max_new_tokens=spec.max_new_tokens,
        observed=str(spec.options.get("observed", claimed)),
        jitter=float(jitter),
    )


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        lines = path.read_text("utf-8").rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"the script cannot be read: {exc}", where=path) from None
    rows: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows[row["id"]] = row
            request = Request(row["id"], np.zeros(0, np.int32), "")
            Generation.of([request], ScriptedEngine(rows).generate([request]))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as exc:
            raise ConfigError(f"not a line of a script: {exc!r}", where=f"{path}:{number}") from None
    return rows


class ScriptedEngine:
    """Answers from `rows`: prompt id -> a line of the script."""

    name = "scripted"
    context_length: int | None = None
    text_only = False
    replays = True

    def __init__(
        self,
        rows: dict[str, dict[str, Any]],
        *,
        fp32: dict[str, dict[str, Any]] | None = None,
        max_new_tokens: int = 96,
        observed: str = "bf16",
        jitter: float = 0.0,
    ) -> None:
        self.rows = rows
        self.fp32 = fp32
        self.max_new_tokens = max_new_tokens
        self.observed = observed
        self.jitter = jitter

    def facts(self) -> Fingerprint:
        """A fixed identity: scripts change between runs so that tests can show a difference."""
        return {
            "engine": self.name,
            "model.weights": digest("scripted"),
            "tokenizer": digest("scripted"),
            "generation": digest({"max_new_tokens": self.max_new_tokens}),
            "dtype": "scripted",
        }

    def observe(self) -> Observation:
        """What the script says is observed."""
        return Observation(self.observed, 24.0 if self.observed == "fp32" else 8.0, 24.0, "scripted")

    def encode(self, prompt: Prompt) -> list[int]:
        """The UTF-8 bytes of the prompt."""
        text = prompt.content if isinstance(prompt.content, str) else json.dumps(prompt.content)
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        """The ids themselves."""
        return "".join(f" {t}" for t in tokens)

    def generate(self, batch: Sequence[Request], tick: Tick = no_tick) -> list[Output]:
        """The script's lines of this batch."""
        return [self._output(request, tick) for request in batch]

    def _output(self, request: Request, tick: Tick) -> Output:
        row = self.rows.get(request.id, {"error": f"the script has no line for {request.id}"})
        tokens = np.asarray(row.get("tokens", []), np.int32)[: self.max_new_tokens]
        tick(len(tokens))
        return Output(
            id=request.id,
            tokens=tokens,
            text=row.get("text", self.decode(tokens.tolist())),
            finish_reason=row.get("finish_reason", "stop"),
            logprob=self._column(row, "logprob", len(tokens)),
            gap=self._column(row, "gap", len(tokens)),
            runner_up=np.asarray(row.get("runner_up", [-1] * len(tokens)), np.int32)[: len(tokens)],
            error=row.get("error", ""),
        )

    @staticmethod
    def _column(row: dict[str, Any], name: str, length: int) -> Any:
        return np.asarray(row.get(name, [0.0] * length), np.float32)[:length]

    def replay(self, requests: Sequence[Request], tick: Tick = no_tick) -> list[Scores]:
        """As if the scripted logits were the model's: a token of the script that is not the golden's wins by its gap."""
        return [self._scores(request, tick, 0.0) for request in requests]

    def replay_fp32(self, requests: Sequence[Request], tick: Tick = no_tick) -> list[Scores] | None:
        """From the script of `[engine] fp32`; None without one."""
        return None if self.fp32 is None else ScriptedEngine(self.fp32).replay(requests, tick)

    def _scores(self, request: Request, tick: Tick, jitter: float) -> Scores:
        assert request.reference is not None, "replay needs the golden's tokens"
        length = len(request.reference)
        tick(length)
        out = self._output(request, no_tick)
        sign = np.where(np.arange(length) % 2, -jitter, jitter).astype(np.float32)

        def stretched(column: Any, fill: float) -> Any:
            return np.concatenate([column, np.full(max(0, length - len(column)), fill, column.dtype)])[:length]

        top, gap = stretched(out.tokens, -1), stretched(out.gap, 0.0)
        same = top == request.reference
        return Scores(
            id=request.id,
            logprob=stretched(out.logprob, 0.0) + sign,
            deficit=np.where(same, 0.0, gap).astype(np.float32),
            top=top.astype(np.int32),
            gap=np.where(same, gap, -gap).astype(np.float32) + sign,
            error=out.error,
        )

    def sketches(self, requests: Sequence[Request], tick: Tick = no_tick) -> Iterator[Sketch]:
        """A script has no modules."""
        return iter(())

    def benign(self) -> Iterator[tuple[str, Callable[[Sequence[Request], Tick], list[Scores]]]]:
        """One variant, off by `jitter`."""
        yield "scripted jitter", lambda requests, tick: [self._scores(r, tick, self.jitter) for r in requests]
