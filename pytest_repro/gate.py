"""The gate: suite -> engine -> generation -> comparison -> verdict.

Knows nothing of pytest or of a terminal: plain values in, a `SuiteResult` out. The two shells (`plugin`, `cli`) print and exit.
"""

from __future__ import annotations

import time
import traceback
from dataclasses import replace
from pathlib import Path

from . import judging, numerics, sketch
from .arbiter import arbitrate
from .asking import Options, Progress, Silent, again, asked, environment, live
from .engines.base import Engine
from .errors import EngineError, GoldenMissing, ReproError
from .evidence import expect_golden, find_golden, gather
from .golden import Golden
from .judging import Gathered
from .recording import record, record_on
from .result import SuiteResult
from .suite import Suite
from .verdict import Verdict


def check(suite: Suite, mode: str, options: Options, show: Progress | None = None) -> SuiteResult:
    """Check a suite in one numerics mode against its golden. Never raises a `ReproError`: what broke is a verdict."""
    started, show = time.monotonic(), show or Silent()
    claimed = numerics.mode(mode).compute_class
    result = judging.blank(suite, mode, claimed, options.selected, options.shown_path, options.shard)
    result = replace(result, settings=_settings(suite, options), again=again(suite, options))
    if not result.shard_size:
        return judging.idle(result)
    try:
        expect_golden(suite, mode, options)
        with live(suite, mode, options, show) as engine:
            result = replace(result, environment=environment(engine, suite), observed=engine.observe().to_json())
            result, golden = judging.on_basis(result, find_golden(suite, mode, result, options))
            result = judging.against(result, golden, suite, options.allow_changed)
            gathered = gather(engine, suite, golden, result, options, show)
            result = judging.judge_all(result, suite, golden, gathered, engine.decode, options.allow_code)
            if options.arbiter == "auto":
                result = _arbitrate(engine, suite, golden, gathered, result, show)
            result = _localise(engine, suite, golden, result, show)
            if options.pending_folder and result.asks_for_a_golden:
                result = _offer_candidate(engine, result, suite, mode, options, show)
    except ReproError as exc:
        result = judging.broken(result, exc)
        if isinstance(exc, GoldenMissing) and options.pending_folder:
            result = _leave_candidate(result, suite, mode, options, show)
    except Exception as exc:  # a bug of this package or of an engine: said as such, judged as an error, never a pass
        place = traceback.extract_tb(exc.__traceback__)[-1]
        what = f"internal error: {type(exc).__name__}: {exc} ({Path(place.filename).name}:{place.lineno})"
        result = judging.broken(result, EngineError(what, fix="please report it, with the output of pytest-repro env"))
    finally:
        show.close()
    return replace(result, seconds=time.monotonic() - started)


def _settings(suite: Suite, options: Options) -> dict[str, str | int | None]:
    return {
        "prompts": suite.digest_of_prompts(),
        "max_new_tokens": suite.max_new_tokens,
        "batch_size": suite.batch_size,
        "engine": suite.engine,
        "scorer": suite.scorer_spelt,
        "method": options.method,
        "arbiter": options.arbiter,
        "allow_changed": ", ".join(sorted(options.allow_changed)),
        "golden": options.golden,
    }


def _arbitrate(
    engine: Engine,
    suite: Suite,
    golden: Golden,
    gathered: Gathered,
    result: SuiteResult,
    show: Progress,
) -> SuiteResult:
    """Drifting prompts of a 16-bit run under FP32-class compute, on the model already loaded."""
    drifting = {p.id for p in result.prompts if p.verdict == Verdict.DRIFT and p.id in gathered.scores}
    observed = (result.observed or {}).get("compute_class")
    if not drifting or observed in ("fp32", "exact", "unknown") or observed != golden.compute_class:
        return result  # two roundings of one kind are compared: what a golden of another class would show is no news
    requests = [r for r in asked(engine, suite, golden, result.shard) if r.id in drifting]
    tick = show.phase("arbiter", sum(len(r.reference) for r in requests if r.reference is not None))
    try:
        scores = engine.replay_fp32(requests, tick)
        found = arbitrate(golden.generation, gathered.scores, {s.id: s for s in scores or ()})
    except Exception as exc:  # it explains verdicts: its own failure must not become one
        return replace(result, notes=(*result.notes, f"arbiter: could not be asked: {exc}"))
    return judging.arbitrated(result, found)


def _localise(engine: Engine, suite: Suite, golden: Golden, result: SuiteResult, show: Progress) -> SuiteResult:
    """Where in the model a difference begins, if the golden kept what its modules put out and the engine can look inside."""
    if golden.sketch is None or not result.fails_for_moving:
        return result
    looked_at = {p.id for p in suite.prompts} & set(golden.sketch.prompts) & set(golden.generation.ids)
    if not looked_at:
        return result
    tick = show.phase("where in the model", 0)
    try:
        now = next(engine.sketches([r for r in asked(engine, suite, golden) if r.id in looked_at], tick), None)
    except Exception as exc:  # it explains a verdict: its own failure must not become one
        return replace(result, notes=(*result.notes, f"where in the model: could not be asked: {exc}"))
    if now is None:
        return result
    # Looked at one prompt at a time, then and now: batches are the one part of numerics that has no say here.
    same = not any(c.cls == "numerics" and c.field != "batch_size" for c in result.environment_diff)
    return replace(result, localisation=vars(sketch.locate(golden.sketch, now, golden.compute_class, same)))


def _leave_candidate(result: SuiteResult, suite: Suite, mode: str, options: Options, show: Progress) -> SuiteResult:
    """A missing golden, and a folder where its candidate may be left."""
    folder = _pending_folder(suite, options)
    try:
        left = record(suite, mode, options, show, folder)
    except ReproError as exc:
        return judging.broken(result, exc)
    return judging.offered(result, str(folder / left.golden), str(options.pending_folder))


def _offer_candidate(
    engine: Engine, result: SuiteResult, suite: Suite, mode: str, options: Options, show: Progress
) -> SuiteResult:
    """A golden that no longer holds, and the candidate that a reviewer may put in its place."""
    folder = _pending_folder(suite, options)
    try:
        left = record_on(engine, suite, mode, options, show, folder)
    except Exception as exc:  # the verdict stands already: what failed after it must not change it
        return replace(result, notes=(*result.notes, f"no candidate could be left: {exc}"))
    return judging.offered(result, str(folder / left.golden), str(options.pending_folder))


def _pending_folder(suite: Suite, options: Options) -> Path:
    """Laid out as the project is, and never outside of what was named."""
    assert options.pending_folder is not None
    below = [part for part in Path(options.shown_path or suite.folder.name).parts if part not in ("..", "/")]
    return options.pending_folder.joinpath(*below)
