"""Candidates for goldens: a suite recorded with its noise envelope, or a golden with the envelope of this machine beside its own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from shlex import quote

import numpy as np

from . import calibration, candidate, judging, noise, numerics, sketch, store
from .asking import Options, Progress, Silent, again, asked, decode, environment, live
from .engines.base import Engine, needs_model
from .errors import ConfigError, EngineError
from .evidence import expect_golden, find_golden, gather
from .generation import Generation, Request
from .golden import Golden, Part
from .noise import Calibration, bulk_ratio
from .result import Calibrated, Recording, SuiteResult
from .suite import Shard, Suite


def record(
    suite: Suite, mode: str, options: Options, show: Progress | None = None, folder: Path | None = None
) -> Recording:
    """Record a candidate for a golden (or a shard's part of one), with its noise envelope, and leave it pending.

    Raises:
        ReproError: a prompt without an answer, or the engine failed; nothing is left behind then.
    """
    started, show = time.monotonic(), show or Silent()
    try:
        with live(suite, mode, options, show) as engine:
            done = record_on(engine, suite, mode, options, show, folder)
    finally:
        show.close()
    return replace(done, seconds=time.monotonic() - started)


def record_on(
    engine: Engine, suite: Suite, mode: str, options: Options, show: Progress, folder: Path | None
) -> Recording:
    """As `record`, on an engine that is open."""
    started = time.monotonic()
    stem = _recorded_as(engine, mode, options.golden)
    previous = store.Place(suite.folder, stem).trusted()
    golden = candidate.with_notes(_recorded(engine, suite, mode, stem, previous, options, show), previous)
    place = store.Place(folder or suite.folder, stem, store.PENDING, options.shard)
    place.write(golden)
    notes = (golden.candidate or {})["prompts"]
    return Recording(
        name=suite.name,
        path=options.shown_path or str(suite.folder),
        numerics=mode,
        golden=place.text.name,
        prompts=len(golden.generation),
        changed=None if previous is None else sum(p["verdict"] != "identical" for p in notes),
        cut=golden.generation.finish_reasons.count("length"),
        max_new_tokens=suite.max_new_tokens,
        accuracy=golden.accuracy,
        noise={"mean_abs_dlogp": golden.noise.mean_abs_dlogp, "max_deficit": golden.noise.max_deficit},
        seconds=time.monotonic() - started,
        environment=golden.fingerprint,
        shard=str(options.shard) if options.shard else None,
    )


def _recorded_as(engine: Engine, mode: str, name: str | None) -> str:
    """The golden's name: the compute class that was observed, unless one for a device class was named.

    Raises:
        EngineError: the probe contradicts the mode, or the name that was given.
    """
    observed, claimed = engine.observe(), numerics.mode(mode).compute_class
    found = observed.compute_class
    if found == "unknown":  # a black box: its golden is named after the claim, and every check says that it is one
        found = claimed or "unknown"
    for wanted in (claimed, name.partition("@")[0] if name else None):
        if wanted and wanted != found:
            raise EngineError(
                f"{wanted} was asked for, but the probe found {found}: {observed.detail}",
                fix="a golden is recorded only as what was observed",
            )
    return name or found


def _recorded(
    engine: Engine, suite: Suite, mode: str, stem: str, previous: Golden | None, options: Options, show: Progress
) -> Golden:
    """Every prompt (of the shard) decoded and scored, and the noise around it measured."""
    shard = options.shard
    requests = asked(engine, suite, previous, shard)
    for request in requests:
        if why := judging.too_long(engine.context_length, suite, request):
            raise ConfigError(why, where=f"{suite.folder} prompt {request.id}", fix="nothing was recorded")
    generation = Generation.of(requests, decode(engine, suite, requests, suite.batches_of(shard), "record", show))
    if generation.errors:
        name, why = next(iter(generation.errors.items()))
        raise EngineError(f"prompt {name} has no answer: {why}", fix="nothing was recorded")
    compute_class, _, device_class = stem.partition("@")
    return Golden(
        suite=suite.name,
        model=suite.model.partition("#")[0] if needs_model(suite.engine) else suite.engine,
        compute_class=compute_class,
        device_class=device_class,
        numerics=mode,
        max_new_tokens=suite.max_new_tokens,
        batch_size=suite.batch_size,
        fingerprint=environment(engine, suite),
        generation=generation,
        scores=judging.scores(suite, generation.texts, generation.ids, options.allow_code),
        noise=_envelope(engine, compute_class, requests, generation, show),
        part=None if shard is None else _part(suite, shard),
        sketch=_sketch(engine, requests, generation, show),
    )


def _sketch(
    engine: Engine, requests: Sequence[Request], generation: Generation, show: Progress
) -> sketch.Recorded | None:
    """What the model's modules put out at a few rows, and how far benign changes move that."""
    looked_at = sketch.chosen(generation.ids)
    own = [r for r in _with_own_answers(requests, generation) if r.id in looked_at]
    tick = show.phase("noise: inside the model", 0)
    plain, again, *benign = [*engine.sketches(own, tick)] or (None, None)
    return None if plain is None or again is None else sketch.recorded(looked_at, plain, again, benign)


def _part(suite: Suite, shard: Shard) -> Part:
    return Part(shard.index, shard.count, len(suite.prompts), suite.digest_of_prompts(), suite.scorer_spelt)


def _envelope(
    engine: Engine, compute_class: str, requests: Sequence[Request], generation: Generation, show: Progress
) -> noise.Envelope:
    """Replay what was just recorded under every benign change that the engine knows."""
    own = _with_own_answers(requests, generation)
    replays = {}
    for name, run in engine.benign():
        replays[name] = run(own, show.phase(f"noise: {name}", len(generation.tokens)))
        for score in replays[name]:
            if score.error:
                raise EngineError(f"prompt {score.id} under {name}: {score.error}", fix="nothing was recorded")
    found = noise.envelope(compute_class, generation, replays)
    for variant in found.variants if compute_class == noise.EXACT else ():
        if variant.max_abs_dlogp or variant.max_abs_dgap or variant.flipped_prompts:
            raise EngineError(
                f"exact compute does not hold here: under {variant.name} the numbers have other bits",
                fix="nothing was recorded; --repro-numerics fp32 bears differences of rounding",
            )
    return found


def _with_own_answers(requests: Sequence[Request], generation: Generation) -> list[Request]:
    """Requests that carry what was just generated."""
    return [
        replace(
            r,
            reference=generation.tokens[generation.span(i)],
            reference_runner_up=generation.runner_up[generation.span(i)],
        )
        for i, r in enumerate(requests)
    ]


def calibrate(suite: Suite, mode: str, options: Options, show: Progress | None = None) -> Calibrated:
    """Measure the envelope of a golden on this machine, and leave the golden with it as a candidate.

    The plain check comes first, with the recording's envelope and the wide margin: a machine that moves more is refused.

    Raises:
        ReproError: no golden, one that cannot be calibrated here, another candidate that waits, or the engine failed;
            nothing is left behind then.
    """
    if options.shard is not None:
        why = "an envelope is one of the whole suite, whose prompts are judged together: a shard cannot measure it"
        raise ConfigError(why, where=str(suite.folder), fix="calibrate without a shard")
    started, show = time.monotonic(), show or Silent()
    # Accuracy is not asked, and a scorer may be code.
    suite = replace(suite, scorer="exact", prompts=tuple(replace(p, answer=None) for p in suite.prompts))
    try:
        expect_golden(suite, mode, options)
        with live(suite, mode, options, show) as engine:
            done = _calibrate_on(engine, suite, mode, options, show)
    finally:
        show.close()
    return replace(done, seconds=time.monotonic() - started)


def _calibrate_on(engine: Engine, suite: Suite, mode: str, options: Options, show: Progress) -> Calibrated:
    if not engine.replays:
        raise EngineError(f"the engine {engine.name} cannot score given tokens, which is how rounding is measured")
    _recorded_as(engine, mode, None)
    claimed = numerics.mode(mode).compute_class
    result = judging.blank(suite, mode, claimed, None, options.shown_path)
    result = replace(result, environment=environment(engine, suite), observed=engine.observe().to_json())
    result = replace(result, again=again(suite, options))
    standing = find_golden(suite, mode, result, options)
    place = store.Place(suite.folder, standing.stem, store.PENDING)
    waiting = _calibrated_already(place, standing)
    recorded = replace(standing, calibrations=())
    result = judging.against(result, recorded, suite, frozenset())
    calibration.expect_measurable(result, recorded)
    result, refused = _plain_check(engine, suite, recorded, result, options, show)
    facts = calibration.facts({**result.environment, "compute_class": (result.observed or {}).get("compute_class")})
    done = calibration.outcome(result, recorded, facts, refused)
    if refused:
        return done
    found = Calibration(facts, _envelope_here(engine, suite, recorded, show))
    made = calibration.with_calibration(waiting, found, store.typed(place.text))
    place.write(candidate.with_notes(replace(made, review=None), standing))
    return replace(
        done,
        candidate=store.typed(place.text),
        replaces=any(calibration.same_machine(found, c) for c in waiting.calibrations),
        moved=calibration.moved(recorded.noise, found.envelope),
    )


def _calibrated_already(place: store.Place, standing: Golden) -> Golden:
    """What a calibration is added to: the golden that stands, or one of it that waits with other calibrations.

    Raises:
        ConfigError: another candidate waits, or parts of one.
    """
    where = store.typed(place.folder)
    waits = [p for p in store.places(place.folder, store.PENDING) if p.stem == place.stem]
    if not waits:
        return standing
    there = place.trusted() if waits == [place] else None
    if there is None or not calibration.same_recording(there, standing):
        raise ConfigError(
            "another candidate waits in the place of this golden, and would be lost",
            where=store.typed(waits[0].text),
            fix=f"pytest-repro {'merge' if waits[0].shard else 'review'} {quote(where)}, then calibrate again",
        )
    return calibration.united(there, standing, where)


def _plain_check(
    engine: Engine, suite: Suite, golden: Golden, result: SuiteResult, options: Options, show: Progress
) -> tuple[SuiteResult, tuple[str, ...]]:
    """The check as it would be here without any calibration, and why it allows none."""
    result = replace(result, thresholds=replace(result.thresholds, fp32_waiver="none"))
    gathered = gather(engine, suite, golden, result, replace(options, method="auto"), show)
    result = judging.judge_all(result, suite, golden, gathered, engine.decode, False)
    return result, tuple(calibration.moves_too_much(result, bulk_ratio(golden.compute_class)))


def _envelope_here(engine: Engine, suite: Suite, golden: Golden, show: Progress) -> noise.Envelope:
    """The golden's own tokens under every benign change that the engine knows here."""
    by_id = {r.id: r for r in asked(engine, suite)}
    requests = [by_id[name] for name in golden.generation.ids]
    found = _envelope(engine, golden.compute_class, requests, golden.generation, show)
    unknown = np.isfinite(golden.noise.gap_level) & ~np.isfinite(found.gap_level)
    if unknown.any():
        raise EngineError(
            f"the gaps of {unknown.sum()} prompts cannot be seen here, and the recording knows them",
            fix="nothing was written; calibrate with the engine that checks, in its own process",
        )
    return found
