"""What a check judges from: the golden that fits, and what the engine answers now, compared with it."""

from __future__ import annotations

from collections.abc import Sequence

from . import judging, numerics, store
from .asking import Options, Progress, again, asked, decode
from .comparison import Comparison, compare_decode, compare_replay
from .engines.base import Engine
from .generation import Generation, Request, Scores
from .golden import Golden
from .judging import Gathered
from .result import SuiteResult
from .suite import Suite
from .verdict import Judgement, Verdict


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
    store.find(suite.folder, claimed, "", f"{again(suite, options)} --repro-numerics {mode}")


def find_golden(suite: Suite, mode: str, result: SuiteResult, options: Options) -> Golden:
    """The named golden, or the most specific that fits the class claimed (or else observed) and the device."""
    if options.golden:
        return store.Place(suite.folder, options.golden).read()
    observed = (result.observed or {}).get("compute_class", "unknown")
    wanted = numerics.mode(mode).compute_class or observed
    device = str(result.environment.get("device_class", ""))
    return store.find(suite.folder, str(wanted), device, f"{again(suite, options)} --repro-numerics {mode}").read()


def gather(
    engine: Engine, suite: Suite, golden: Golden, result: SuiteResult, options: Options, show: Progress
) -> Gathered:
    """Run what the method asks for, and compare it with the golden (DESIGN section 5)."""
    requests = asked(engine, suite, golden, options.shard)
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
    outputs = decode(engine, suite, able, batches, "decode", show)
    failed = {o.id: Judgement(Verdict.ERROR, o.error) for o in outputs if o.error}
    wanted = {suite.prompts[i].id for i in places} - set(failed)
    return Generation.of(able, [o for o in outputs if o.id in wanted]), failed
