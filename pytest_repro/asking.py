"""A suite put to an engine: how, with what model and numerics, which requests, in which batches.

Knows nothing of pytest or of a terminal, and nothing of verdicts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Literal, Protocol

import numpy as np

from . import models, numerics, probe
from .engines.base import Engine, Opener, Spec, check_mode, needs_model, opener
from .fingerprint import Fingerprint
from .generation import Output, Request
from .golden import Golden
from .suite import Prompt, Shard, Suite

Method = Literal["auto", "replay", "decode"]


class Progress(Protocol):
    """Where the gate tells how far it is."""

    def say(self, line: str) -> None:
        """One line, before something that takes long."""

    def phase(self, label: str, total: int) -> Callable[[int], None]:
        """Start a phase of `total` tokens; the result is called with the number just done."""

    def close(self) -> None:
        """End the last phase."""


class Silent:
    """No progress."""

    def say(self, line: str) -> None:
        """Nothing."""

    def phase(self, label: str, total: int) -> Callable[[int], None]:
        """Nothing."""
        return lambda _: None

    def close(self) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Options:
    """How to check: what the command line and a test's keywords decide beyond the suite itself."""

    method: Method = "auto"
    arbiter: Literal["auto", "off"] = "auto"
    """Whether drift in a 16-bit run is held against the FP32 answer of the same weights."""
    allow_changed: frozenset[str] = frozenset()
    """Parts of the identity (model, tokenizer, generation) that may differ."""
    allow_code: bool = False
    trusted_engine: bool = False
    """Whether the engine was named by the user rather than by the suite: then it may be code."""
    golden: str | None = None
    """Name of the golden to use (`bf16`, `bf16@cuda-sm90`) in place of the one that fits."""
    pending_folder: Path | None = None
    """Where a check may leave candidates, for goldens that are missing or no longer hold; None: nowhere."""
    opener: Opener | None = None
    """A test's own engine, in the suite's engine's place."""
    selected: frozenset[str] | None = None
    """Prompt ids that are asked for; None: all. Their batches run whole all the same."""
    shard: Shard | None = None
    """The part of the suite that this process takes; None: all of it."""
    shown_path: str = ""
    """The suite's folder as the user would type it."""
    again: str = ""
    """What pytest was given to run this, but for the mode: the suite or the test, and the options that change what runs."""


def again(suite: Suite, options: Options) -> str:
    """The arguments with which the same would run again, but for the mode, as a shell takes them."""
    return options.again or quote(options.shown_path or str(suite.folder))


@contextmanager
def live(suite: Suite, mode: str, options: Options, show: Progress) -> Iterator[Engine]:
    """The suite's engine, opened: its model found or fetched, loaded in the mode's numerics."""
    if options.opener is None:
        check_mode(suite.engine, numerics.mode(mode), str(suite.folder))
    chosen = options.opener or opener(suite.engine, allow_code=options.allow_code or options.trusted_engine)
    files = None
    if options.opener is None and needs_model(suite.engine):
        files = models.resolve(suite.model, suite.folder, show.say)
    spec = Spec(
        mode=numerics.mode(mode),
        max_new_tokens=suite.max_new_tokens,
        folder=suite.folder,
        model=files,
        options=suite.engine_options,
        from_user=frozenset(suite.user_options),
        say=show.say,
    )
    with chosen(spec) as engine:
        yield engine


def environment(engine: Engine, suite: Suite) -> Fingerprint:
    """Machine, engine and repository as they are now."""
    return {**probe.machine(), **engine.facts(), "batch_size": suite.batch_size, **probe.commit(suite.folder)}


def asked(engine: Engine, suite: Suite, golden: Golden | None = None, shard: Shard | None = None) -> list[Request]:
    """The suite's prompts (of the shard), in the file's order; with a golden, they carry its answers to be scored."""
    requests = [request(engine, prompt) for prompt in suite.prompts_of(shard)]
    return requests if golden is None else _watching(requests, golden)


def request(engine: Engine, prompt: Prompt) -> Request:
    """One prompt as the engine gets it."""
    return Request(prompt.id, np.asarray(engine.encode(prompt), np.int32), prompt.content)


def _watching(requests: Sequence[Request], golden: Golden) -> list[Request]:
    place, g = golden.generation.index(), golden.generation
    return [
        replace(r, reference=g.tokens[g.span(place[r.id])], reference_runner_up=g.runner_up[g.span(place[r.id])])
        if r.id in place
        else r
        for r in requests
    ]


def decode(
    engine: Engine,
    suite: Suite,
    requests: Sequence[Request],
    batches: Sequence[Sequence[int]],
    label: str,
    show: Progress,
) -> list[Output]:
    """Batches of a suite, each whole but for requests that were left out; one that is empty then is not asked."""
    by_id = {r.id: r for r in requests}
    tick = show.phase(label, sum(map(len, batches)) * suite.max_new_tokens)
    outputs: list[Output] = []
    for batch in batches:
        together = [by_id[suite.prompts[i].id] for i in batch if suite.prompts[i].id in by_id]
        outputs += engine.generate(together, tick) if together else []
    return outputs
