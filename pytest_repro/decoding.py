"""One cell of a study, decoded in this process: whole suite, greedy, and sampled where that was asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from time import monotonic, perf_counter
from typing import Any

import numpy as np

from . import grid, judging, numerics, probe
from .asking import Options, Progress, environment, live
from .cells import Cell, Row, Sample
from .engines.base import Engine, check_options
from .errors import EngineError, ReproError
from .fingerprint import Value
from .generation import Output, Request, digest, token_digest
from .grid import Setting
from .suite import Overrides, Suite, apply


@dataclass(frozen=True)
class Sampling:
    """Sampled runs beside the greedy one, for Pass@1."""

    runs: int = 0
    """0: none."""
    temperature: float = 0.7
    top_p: float = 0.95
    seed: int = 0
    """Of the first run; each run has the next one."""


def asked(suite: Suite, axes: Sequence[str], sampling: Sampling) -> dict[str, Value]:
    """What all cells of a study share, beyond the model, which is known by its digest once it is loaded."""
    shared: dict[str, Value] = {
        "suite": suite.name,
        "prompts": suite.digest_of_prompts(),
        "max_new_tokens": suite.max_new_tokens,
        "scorer": suite.scorer_spelt,
        "model": suite.model,
        "engine": suite.engine,
        "batch_size": suite.batch_size,
        "engine_options": digest(
            [{name: dict(table) for name, table in suite.engine_tables.items()}, dict(suite.user_options)]
        ),
        "samples": sampling.runs,
    }
    if sampling.runs:
        shared |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed}
    return {name: value for name, value in shared.items() if name not in axes}


def suite_of(suite: Suite, setting: Setting) -> Suite:
    """The suite as a cell runs it.

    Raises:
        ConfigError: the engine cannot be set so.
    """
    engine = setting.get("engine", suite.engine)
    overrides = Overrides(
        engine=engine,
        numerics=(setting["numerics"],),
        batch_size=int(setting["batch_size"]) if "batch_size" in setting else None,
        engine_options=grid.engine_options(setting, engine),
    )
    found = apply(suite, overrides)
    check_options(engine, found.user_options, "--engine-option")
    return found


def decode(
    suite: Suite,
    setting: Setting,
    asked: Mapping[str, Value],
    sampling: Sampling,
    show: Progress,
    allow_code: bool = False,
) -> Cell:
    """Run one cell here. Never raises a `ReproError`: what broke is the cell's error."""
    started = monotonic()
    cell = Cell(setting, asked, "failed")
    try:
        cell = _decoded(suite_of(suite, setting), cell, sampling, show, allow_code)
    except ReproError as exc:
        cell = replace(cell, error=f"{exc.what} ({exc.where})" if exc.where else exc.what)
    finally:
        show.close()
    return replace(cell, memory=probe.peak_memory(), wall_seconds=monotonic() - started)


def _decoded(suite: Suite, cell: Cell, sampling: Sampling, show: Progress, allow_code: bool) -> Cell:
    mode = cell.setting["numerics"]
    with live(suite, mode, Options(allow_code=allow_code), show) as engine:
        seen = engine.observe()
        cell = replace(cell, environment=environment(engine, suite), observed=seen.to_json())
        wrong = grid.contradictions(
            cell.setting, cell.environment, seen.compute_class, numerics.mode(mode).compute_class
        )
        if wrong:  # what it would decode is another cell's
            return replace(cell, status="contradicted", error="; ".join(wrong))
        requests = [Request(p.id, np.asarray(engine.encode(p), np.int32), p.content) for p in suite.prompts]
        for request in requests:
            if why := judging.too_long(engine.context_length, suite, request):
                raise EngineError(f"prompt {request.id}: {why}")
        outputs, seconds = _greedy(engine, suite, requests, show)
        sampled = [_sampled(engine, suite, requests, sampling, run, show) for run in range(sampling.runs)]
    rights = judging.scores(suite, [o.text for o in outputs], [o.id for o in outputs], allow_code)
    samples = [_judged(suite, run, allow_code) for run in sampled]
    rows = tuple(
        Row(
            output.id, token_digest(request.tokens), output.tokens, output.logprob, output.text, output.finish_reason, right,
            tuple(run[place] for run in samples),
        )
        for place, (request, output, right) in enumerate(zip(requests, outputs, rights, strict=True))
    )  # fmt: skip
    return replace(cell, status="done", rows=rows, seconds=seconds)


def _greedy(engine: Engine, suite: Suite, requests: Sequence[Request], show: Progress) -> tuple[list[Output], float]:
    """Every prompt's output, in the suite's order, and how long it took."""
    tick = show.phase("decode", len(requests) * suite.max_new_tokens)
    started = perf_counter()
    outputs = [out for batch in suite.batches() for out in engine.generate([requests[i] for i in batch], tick)]
    seconds = perf_counter() - started
    return _answered(outputs), seconds


def _sampled(
    engine: Engine, suite: Suite, requests: Sequence[Request], sampling: Sampling, run: int, show: Progress
) -> list[Output]:
    """One sampled run over all prompts."""
    draws: Callable[..., Any] | None = getattr(engine, "sampling", None)
    if draws is None:
        raise EngineError(
            f"the engine {engine.name} is run greedily only", fix="--samples with the engine transformers"
        )
    tick = show.phase(f"sample {run + 1} of {sampling.runs}", len(requests) * suite.max_new_tokens)
    with draws(sampling.temperature, sampling.top_p, sampling.seed + run):
        outputs = [out for batch in suite.batches() for out in engine.generate([requests[i] for i in batch], tick)]
    return _answered(outputs)


def _answered(outputs: list[Output]) -> list[Output]:
    """The same outputs.

    Raises:
        EngineError: a prompt has none.
    """
    for output in outputs:
        if output.error:
            raise EngineError(f"prompt {output.id} has no answer: {output.error}")
    return outputs


def _judged(suite: Suite, run: Sequence[Output], allow_code: bool) -> list[Sample]:
    rights = judging.scores(suite, [o.text for o in run], [o.id for o in run], allow_code)
    return [Sample(output.tokens, right) for output, right in zip(run, rights, strict=True)]
