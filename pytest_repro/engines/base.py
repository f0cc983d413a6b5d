"""What an engine is, and the registry of those that come with the package.

Token ids go in and come out; greedy decoding is a mode of its own; the batch is given, never formed by the engine.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ..audit import Pass
from ..errors import ConfigError, EngineError
from ..fingerprint import Fingerprint
from ..generation import Output, Request, Scores
from ..ladder import Departure
from ..models import ModelFiles
from ..numerics import Mode
from ..numerics.formats import Emulation
from ..precision import Observation
from ..sketch import Sketch
from ..suite import Prompt

Tick = Callable[[int], None]
"""Called with the number of tokens that were just done."""


def no_tick(_: int) -> None:
    """For callers without a progress display."""


@dataclass(frozen=True)
class Spec:
    """What an engine is opened with."""

    mode: Mode
    """Numerics; an engine that cannot set them must not claim them (see `Engine.observe`)."""
    max_new_tokens: int
    folder: Path
    """The suite's folder, for engines that read a file of it."""
    model: ModelFiles | None = None
    """Files of the model; None for engines that have none."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The suite's `[engine]` table, and what the user named beyond it."""
    from_user: frozenset[str] = frozenset()
    """Options that the user named; the others are data, perhaps from a pull request."""
    say: Callable[[str], None] = lambda _: None
    """Told, in one line, before something that takes long."""


class Engine(Protocol):
    """A live engine. Every method may raise `EngineError`, which becomes the verdict `error`."""

    name: str
    """As it stands in the fingerprint."""
    context_length: int | None
    """Most tokens that prompt and answer may have together; None if unknown or without bound."""
    text_only: bool
    """True if its tokens are not a model's, and its numbers unknown."""
    replays: bool
    """Whether it can score given tokens; `replay` raises where it cannot, and then there are no benign variants."""

    def facts(self) -> Fingerprint:
        """Fingerprint fields of the live engine: what is in force, not what was asked for."""

    def observe(self) -> Observation:
        """Precision of products and sums as seen in the process that holds the model."""

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a whole prompt, chat template applied."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Token ids as text, special tokens spelt out."""

    def generate(self, batch: Sequence[Request], tick: Tick = no_tick) -> list[Output]:
        """Greedy continuations of exactly this batch, together, in its order."""

    def replay(self, requests: Sequence[Request], tick: Tick = no_tick) -> list[Scores]:
        """Each request's `reference` tokens through one forward pass, in the requests' order; the engine may batch."""

    def replay_fp32(self, requests: Sequence[Request], tick: Tick = no_tick) -> list[Scores] | None:
        """`replay` on the same weights with FP32-class compute, seen by the probe; None if the engine cannot."""

    def benign(self) -> Iterator[tuple[str, Callable[[Sequence[Request], Tick], list[Scores]]]]:
        """Ways to replay that change numerics and nothing else: (name, replay), each restored when it returns."""

    def sketches(self, requests: Sequence[Request], tick: Tick = no_tick) -> Iterator[Sketch]:
        """What the model's modules put out for each request's prompt and reference, at `sketch.positions`.

        First as things are, then once more, then under benign changes; nothing if the engine cannot look inside.
        """


@runtime_checkable
class Emulating(Protocol):
    """An engine that can put a floating-point format in force on the model that it holds, and take it off again."""

    def in_format(self, emulation: Emulation) -> AbstractContextManager[None]:
        """The format in force; `observe`, `generate` and `departures` see the model in it."""

    def departures(self, requests: Sequence[Request], tick: Tick = no_tick) -> list[Departure]:
        """Each request's `reference` tokens in the format that is in force, against the same weights in FP32."""


@runtime_checkable
class Auditing(Protocol):
    """An engine that can look at every operation of a forward pass."""

    def passes(self, request: Request, phase: Callable[[str, int], Tick]) -> list[Pass]:
        """The request's prompt at once, and the token after it; every sum computed again in other orders.

        `phase` is told what begins and how many operations it has, and gives what is told of each.
        """


Opener = Callable[[Spec], AbstractContextManager[Engine]]


@dataclass(frozen=True)
class Entry:
    """One engine of the registry."""

    module: str
    needs_model: bool
    """Whether the suite's model reference is resolved to files for it."""
    extra: str
    """The pip extra that installs what it needs."""
    options: tuple[str, ...]
    """Keys of the suite's `[engine]` table that it understands."""
    emulates: bool = False
    """Whether it can emulate a floating-point format; no other engine is opened with such a mode."""


VLLM_OPTIONS = (
    "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "distributed_executor_backend",
    "max_num_seqs", "max_num_batched_tokens", "max_model_len", "enable_prefix_caching", "enable_chunked_prefill",
    "enforce_eager", "attention_backend", "block_size", "kv_cache_dtype", "kv_cache_memory_bytes",
    "gpu_memory_utilization", "cpu_offload_gb", "disable_custom_all_reduce", "async_scheduling", "quantization",
    "round_weights",
)  # fmt: skip
"""Options of `[engine.vllm]`; all but the last are arguments of `vllm.LLM` under the same name."""

REGISTRY: dict[str, Entry] = {
    "transformers": Entry(
        "transformers",
        needs_model=True,
        extra="transformers",
        options=("device", "attention", "round_weights"),
        emulates=True,
    ),
    "vllm": Entry("vllm", needs_model=True, extra="vllm", options=VLLM_OPTIONS),
    "openai": Entry(
        "openai_http",
        needs_model=False,
        extra="openai",
        options=("base_url", "model", "dialect", "concurrency", "timeout", "retries", "backoff"),
    ),
    "scripted": Entry(
        "scripted", needs_model=False, extra="", options=("script", "fp32", "observed", "jitter"), emulates=True
    ),
}


def needs_model(name: str) -> bool:
    """Whether an engine reads model files."""
    return name in REGISTRY and REGISTRY[name].needs_model


def check_mode(name: str, mode: Mode, where: str) -> None:
    """Refuse a mode to an engine that has no such compute: a format where none is emulated, exact where nothing sums so.

    Raises:
        ConfigError: with the mode.
    """
    if mode.emulation is not None and not (name in REGISTRY and REGISTRY[name].emulates):
        raise ConfigError(
            f"the engine {name} emulates no floating-point formats, and {mode.name} is one",
            where=where,
            fix="the engine transformers (--repro-engine, or --engine of a command)",
        )
    if mode.name == "exact" and not (name in REGISTRY and REGISTRY[name].emulates):
        raise ConfigError(
            f"the engine {name} has no exact compute",
            where=where,
            fix="--repro-engine transformers, or --repro-numerics fp32",
        )


def check_options(name: str, options: Mapping[str, Any], where: str) -> None:
    """Refuse keys of `[engine]` that the engine does not understand.

    Raises:
        ConfigError: with the key.
    """
    known = REGISTRY[name].options if name in REGISTRY else ()
    for key in options:
        if key not in known:
            raise ConfigError(
                f"unknown key {key!r} for the engine {name}; known keys: {', '.join(known) or 'none'}",
                where=f"{where} [engine.{key}]",
            )


def check_tables(tables: Mapping[str, Mapping[str, Any]], where: str) -> None:
    """Refuse a table of an engine that there is not, and options that an engine does not understand.

    Raises:
        ConfigError: with the engine or the key.
    """
    for name, options in tables.items():
        if name not in REGISTRY and ":" not in name:
            raise ConfigError(
                f"options for an unknown engine {name!r}; known: {', '.join(REGISTRY)}",
                where=f"{where} [engine.{name}]",
            )
        check_options(name, options, where)


def opener(name: str, *, allow_code: bool = False) -> Opener:
    """The function that opens an engine, as a context manager that closes it.

    Args:
        name: of the registry, or `module:function`, a callable as in `engines.function`.
        allow_code: whether the user opted in to importing code that a suite names.

    Raises:
        ConfigError: no such engine, or code without the opt-in.
        EngineError: what it needs is not installed.
    """
    if ":" in name:
        from .function import from_name

        return from_name(name, allow_code)
    entry = REGISTRY.get(name)
    if entry is None:
        raise ConfigError(f"unknown engine {name!r}; known: {', '.join(REGISTRY)}, module:function", where="engine")
    try:
        module = importlib.import_module(f".{entry.module}", __package__)
    except ImportError as exc:
        raise EngineError(
            f"the engine {name} cannot be imported: {exc}", fix=f"pip install 'pytest-repro[{entry.extra}]'"
        ) from exc
    found: Opener = module.open_engine
    return found
