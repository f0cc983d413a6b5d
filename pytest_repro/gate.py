"""The gate: suite -> engine -> generation -> comparison -> verdict, and the same way round to record a golden.

Knows nothing of pytest or of a terminal: plain values in, a `SuiteResult` or a `Recording` out. The two shells
(`plugin`, `cli`) print and exit.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Literal, Protocol

import numpy as np

from . import calibration, candidate, judging, models, noise, numerics, probe, sketch, store
from .arbiter import arbitrate
from .comparison import Comparison, compare_decode, compare_replay
from .engines.base import Engine, Opener, Spec, check_mode, needs_model, opener
from .errors import ConfigError, EngineError, GoldenMissing, ReproError
from .fingerprint import Fingerprint
from .generation import Generation, Output, Request, Scores
from .golden import Golden, Part
from .judging import Gathered
from .noise import Calibration, bulk_ratio
from .result import Calibrated, Recording, SuiteResult
from .suite import Prompt, Shard, Suite
from .verdict import Judgement, Verdict

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


def check(suite: Suite, mode: str, options: Options, show: Progress | None = None) -> SuiteResult:
    """Check a suite in one numerics mode against its golden. Never raises a `ReproError`: what broke is a verdict."""
    started, show = time.monotonic(), show or Silent()
    claimed = numerics.mode(mode).compute_class
    result = judging.blank(suite, mode, claimed, options.selected, options.shown_path, options.shard)
    result = replace(result, settings=_settings(suite, options), again=_again(suite, options))
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


def _again(suite: Suite, options: Options) -> str:
    return options.again or quote(options.shown_path or str(suite.folder))


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
            done = _record_on(engine, suite, mode, options, show, folder)
    finally:
        show.close()
    return replace(done, seconds=time.monotonic() - started)


def _record_on(
    engine: Engine, suite: Suite, mode: str, options: Options, show: Progress, folder: Path | None
) -> Recording:
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
    requests = _watching(_requests(engine, suite, shard), previous)
    for request in requests:
        if why := judging.too_long(engine.context_length, suite, request):
            raise ConfigError(why, where=f"{suite.folder} prompt {request.id}", fix="nothing was recorded")
    generation = Generation.of(requests, _decode(engine, suite, requests, suite.batches_of(shard), "record", show))
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
    result = replace(result, again=_again(suite, options))
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
    asked = {request.id: request for request in _requests(engine, suite, None)}
    requests = [asked[name] for name in golden.generation.ids]
    found = _envelope(engine, golden.compute_class, requests, golden.generation, show)
    unknown = np.isfinite(golden.noise.gap_level) & ~np.isfinite(found.gap_level)
    if unknown.any():
        raise EngineError(
            f"the gaps of {unknown.sum()} prompts cannot be seen here, and the recording knows them",
            fix="nothing was written; calibrate with the engine that checks, in its own process",
        )
    return found


def expect_golden(suite: Suite, mode: str, options: Options) -> None:
    """Fail before a model is loaded for nothing: a golden of the class that the mode claims must lie there, and be sound.

    Raises:
        GoldenMissing: none does.
        GoldenError: it cannot be trusted or read.
    """
    claimed = options.golden or numerics.mode(mode).compute_class
    if claimed is None:
        return
    for name in (claimed,) if options.golden else store.candidates_for(claimed, ""):
        fitting = [place for place in store.places(suite.folder) if name in (place.stem, place.stem.partition("@")[0])]
        if [place.stem for place in fitting] == [name]:  # one for a device may not be the one that fits here
            fitting[0].read()
        if fitting:
            return
    store.find(suite.folder, claimed, "", f"{_again(suite, options)} --repro-numerics {mode}")


def find_golden(suite: Suite, mode: str, result: SuiteResult, options: Options) -> Golden:
    """The named golden, or the most specific that fits the class claimed (or else observed) and the device."""
    if options.golden:
        return store.Place(suite.folder, options.golden).read()
    observed = (result.observed or {}).get("compute_class", "unknown")
    wanted = numerics.mode(mode).compute_class or observed
    device = str(result.environment.get("device_class", ""))
    return store.find(suite.folder, str(wanted), device, f"{_again(suite, options)} --repro-numerics {mode}").read()


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


def gather(
    engine: Engine, suite: Suite, golden: Golden, result: SuiteResult, options: Options, show: Progress
) -> Gathered:
    """Run what the method asks for, and compare it with the golden (DESIGN section 5)."""
    requests = _watching(_requests(engine, suite, options.shard), golden)
    comparable = {p.id for p in result.prompts if p.verdict == Verdict.IDENTICAL}
    found = judging.unanswerable(engine.context_length, suite, requests, golden, comparable, options.allow_changed)
    wanted = {r.id for r in requests if r.id in comparable and r.id not in found}
    method = options.method if engine.replays or options.method != "auto" else "decode"
    replayed: Comparison | None = None
    scores: dict[str, Scores] = {}
    if method != "decode" and wanted:
        replayed, failed, scores = _replay(engine, golden, [r for r in requests if r.id in wanted], show)
        found |= failed
    if method == "replay" or not wanted:
        return Gathered(replayed, None, None, found, scores)

    places = {i for i, p in enumerate(suite.prompts) if p.id in wanted}
    if replayed is not None:
        doubted = judging.doubtful(replayed, golden)
        sample = suite.batches_of(options.shard)[0]  # fixed: the first batch (of the shard), as far as it is asked for
        batches = [b for b in suite.batches() if b == sample or any(suite.prompts[i].id in doubted for i in b)]
        places = {i for b in batches for i in b} & places
        if not places:
            return Gathered(replayed, None, None, found, scores)
    now, failed = _decode_and_pack(engine, suite, requests, places, found, show)
    found |= failed
    decoded = compare_decode(golden.generation, now)
    parted = judging.doubtful(decoded, golden) if replayed is None and engine.replays else set()
    if parted:  # is scored as well: only a replay sees the text beyond the first divergence
        replayed, failed, scores = _replay(engine, golden, [r for r in requests if r.id in parted], show)
        found |= failed
    return Gathered(replayed, decoded, now, found, scores)


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
    requests = [r for r in _watching(_requests(engine, suite, result.shard), golden) if r.id in drifting]
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
    wanted = [p for p in suite.prompts if p.id in golden.sketch.prompts and p.id in golden.generation.ids]
    if not wanted:
        return result
    tick = show.phase("where in the model", 0)
    try:
        now = next(engine.sketches(_watching([request(engine, p) for p in wanted], golden), tick), None)
    except Exception as exc:  # it explains a verdict: its own failure must not become one
        return replace(result, notes=(*result.notes, f"where in the model: could not be asked: {exc}"))
    if now is None:
        return result
    # Looked at one prompt at a time, then and now: batches are the one part of numerics that has no say here.
    same = not any(c.cls == "numerics" and c.field != "batch_size" for c in result.environment_diff)
    return replace(result, localisation=vars(sketch.locate(golden.sketch, now, golden.compute_class, same)))


def _replay(
    engine: Engine, golden: Golden, requests: Sequence[Request], show: Progress
) -> tuple[Comparison, dict[str, Judgement], dict[str, Scores]]:
    tick = show.phase("replay", sum(len(r.reference) for r in requests if r.reference is not None))
    scores: list[Scores] = engine.replay(requests, tick)
    failed = {s.id: Judgement(Verdict.ERROR, s.error) for s in scores if s.error}
    good = {s.id: s for s in scores if not s.error}
    return compare_replay(golden.generation, list(good.values())), failed, good


def _decode_and_pack(
    engine: Engine,
    suite: Suite,
    requests: Sequence[Request],
    places: set[int],
    found: dict[str, Judgement],
    show: Progress,
) -> tuple[Generation, dict[str, Judgement]]:
    """Decode every batch that holds one of the places, whole; keep what was asked for and has an answer."""
    able = [r for r in requests if r.id not in found]
    batches = [batch for batch in suite.batches() if any(i in places for i in batch)]
    outputs = _decode(engine, suite, able, batches, "decode", show)
    failed = {o.id: Judgement(Verdict.ERROR, o.error) for o in outputs if o.error}
    asked = {suite.prompts[i].id for i in places} - set(failed)
    return Generation.of(able, [o for o in outputs if o.id in asked]), failed


def _decode(
    engine: Engine,
    suite: Suite,
    requests: Sequence[Request],
    batches: Sequence[Sequence[int]],
    label: str,
    show: Progress,
) -> list[Output]:
    by_id = {r.id: r for r in requests}
    tick = show.phase(label, sum(map(len, batches)) * suite.max_new_tokens)
    outputs: list[Output] = []
    for batch in batches:
        together = [by_id[suite.prompts[i].id] for i in batch if suite.prompts[i].id in by_id]
        outputs += engine.generate(together, tick) if together else []
    return outputs


def _requests(engine: Engine, suite: Suite, shard: Shard | None) -> list[Request]:
    return [request(engine, prompt) for prompt in suite.prompts_of(shard)]


def request(engine: Engine, prompt: Prompt) -> Request:
    """One prompt as the engine gets it."""
    return Request(prompt.id, np.asarray(engine.encode(prompt), np.int32), prompt.content)


def asked_again(engine: Engine, suite: Suite, golden: Golden) -> list[Request]:
    """The suite's prompts with the golden's own answers to them."""
    return _watching(_requests(engine, suite, None), golden)


def _watching(requests: Sequence[Request], golden: Golden | None) -> list[Request]:
    """Requests that carry the golden's tokens, so that their log-probabilities are seen."""
    if golden is None:
        return list(requests)
    place, g = golden.generation.index(), golden.generation
    return [
        replace(r, reference=g.tokens[g.span(place[r.id])], reference_runner_up=g.runner_up[g.span(place[r.id])])
        if r.id in place
        else r
        for r in requests
    ]


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
        left = _record_on(engine, suite, mode, options, show, folder)
    except Exception as exc:  # the verdict stands already: what failed after it must not change it
        return replace(result, notes=(*result.notes, f"no candidate could be left: {exc}"))
    return judging.offered(result, str(folder / left.golden), str(options.pending_folder))


def _pending_folder(suite: Suite, options: Options) -> Path:
    """Laid out as the project is, and never outside of what was named."""
    assert options.pending_folder is not None
    below = [part for part in Path(options.shown_path or suite.folder.name).parts if part not in ("..", "/")]
    return options.pending_folder.joinpath(*below)
