"""The descent: a suite's golden under one format after another, each rung kept as soon as it is done.

As `gate` it knows nothing of a terminal. Tokens are replayed under every format; what would be chosen otherwise is decoded, if
accuracy is asked for, and only there: where a replay keeps every token, decoding gives the golden's text.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from . import asking, judging, ladder, schemas
from .accuracy import paired_test
from .engines.base import Emulating, Engine
from .errors import ConfigError, EngineError, GoldenMissing
from .generation import Request, digest
from .golden import Golden
from .ladder import Rung
from .numerics.formats import Emulation
from .store import Place, atomic_write, typed
from .suite import Suite
from .verdict import Verdict

FILE = "ladder.jsonl"
SCHEMA = 1


@dataclass(frozen=True)
class Plan:
    """What is walked."""

    rungs: tuple[Emulation, ...]
    """In the order of the descent."""
    decoded: frozenset[str] = frozenset()
    """Names of the modes whose accuracy is asked for."""
    allow_code: bool = False
    """Whether the suite's scorer may be code."""


@dataclass(frozen=True)
class Descent:
    """Rungs done so far, and what they belong to."""

    suite: str
    golden: str
    """Digest of the golden's text part."""
    settings: str
    """Digest of everything else that a rung's numbers depend on."""
    rungs: tuple[Rung, ...] = ()


def descend(
    suite: Suite, plan: Plan, out: Path, show: asking.Progress, done: Callable[[Rung], None] = lambda _: None
) -> list[Rung]:
    """Walk the plan's rungs, those that `out` holds already left out, and leave every one there when it is done.

    Args:
        suite: on an engine that emulates formats, with an fp32 golden.
        plan: what is walked.
        out: the folder for `ladder.jsonl`.
        show: told how far it is.
        done: told of each rung, in order, those of an earlier run too.

    Raises:
        ReproError: no golden, one of another model, rungs of another ladder in `out`, or the engine failed.
    """
    golden = fp32_golden(suite)
    with _held_alone(out):
        return _descended(suite, golden, plan, out, show, done)


def _descended(
    suite: Suite, golden: Golden, plan: Plan, out: Path, show: asking.Progress, done: Callable[[Rung], None]
) -> list[Rung]:
    kept = _kept(out / FILE, suite, golden)
    held = {rung.mode: rung for rung in kept.rungs if rung.accuracy is not None or not _decodes(suite, plan, rung.mode)}
    try:
        if any(emulation.name not in held for emulation in plan.rungs):
            with asking.live(suite, "fp32", asking.Options(allow_code=plan.allow_code), show) as engine:
                requests = _comparable(engine, suite, golden)
                for number, emulation in enumerate(plan.rungs, 1):
                    if emulation.name not in held:
                        label = f"{number} of {len(plan.rungs)}, {emulation.name}"
                        held[emulation.name] = _walked(engine, suite, golden, requests, emulation, plan, label, show)
                        kept = replace(kept, rungs=tuple(held.values()))
                        atomic_write(out / FILE, _encoded(kept))
                        show.close()
                    done(held[emulation.name])
        else:
            for emulation in plan.rungs:
                done(held[emulation.name])
    finally:
        show.close()
    return [held[emulation.name] for emulation in plan.rungs]


@contextmanager
def _held_alone(out: Path) -> Iterator[None]:
    """The folder, made if need be, for one walk at a time: each writes the whole file.

    Raises:
        ConfigError: it cannot be a folder, or another walk is under way.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with FileLock(out / ".lock", timeout=0):
            yield
    except Timeout:
        raise ConfigError(
            "another ladder is being walked there", where=out, fix="wait for it, or another --out"
        ) from None
    except (FileExistsError, NotADirectoryError, PermissionError) as exc:
        raise ConfigError(f"no folder to write to: {exc.strerror}", where=out, fix="another --out") from None


def fp32_golden(suite: Suite) -> Golden:
    """The golden that a ladder starts from.

    Raises:
        GoldenMissing: there is none.
        GoldenError: it cannot be trusted or read.
    """
    place = Place(suite.folder, "fp32")
    if not place.text.exists():
        raise GoldenMissing(
            "a ladder starts from FP32, and there is no fp32 golden",
            where=typed(suite.folder),
            fix=f"pytest --repro-update {typed(suite.folder)} --repro-numerics fp32   # then pytest-repro review",
        )
    return place.read()


def _decodes(suite: Suite, plan: Plan, mode: str) -> bool:
    return mode in plan.decoded and any(p.answer is not None for p in suite.prompts)


def _comparable(engine: Engine, suite: Suite, golden: Golden) -> list[Request]:
    """The suite's prompts with the golden's answers.

    Raises:
        EngineError: the model does not compute in FP32 here, or the engine emulates nothing.
        ConfigError: the golden answers other questions, or another model's.
    """
    if not isinstance(engine, Emulating):
        raise EngineError(f"the engine {engine.name} emulates no floating-point formats", fix="--engine transformers")
    seen = engine.observe()
    if not seen.fp32_class:
        raise EngineError(f"a ladder starts from FP32, but the probe found {seen.compute_class}: {seen.detail}")
    blank = judging.blank(suite, "fp32", "fp32", None, typed(suite.folder))
    blank = replace(blank, environment=asking.environment(engine, suite), observed=seen.to_json())
    result = judging.against(blank, golden, suite, frozenset())
    requests = asking.asked(engine, suite, golden)
    able = {p.id for p in result.prompts if p.verdict == Verdict.IDENTICAL}
    other = judging.unanswerable(engine.context_length, suite, requests, golden, able, frozenset())
    reasons = {p.id: p.reason for p in result.prompts if p.id not in able} | {k: j.reason for k, j in other.items()}
    if reasons:
        name, why = next(iter(reasons.items()))
        raise ConfigError(
            f"{len(reasons)} prompts cannot be compared with the fp32 golden; {name}: {why}",
            where=typed(suite.folder),
            fix=f"pytest --repro-update {typed(suite.folder)} --repro-numerics fp32   # then pytest-repro review",
        )
    return requests


def _walked(
    engine: Engine,
    suite: Suite,
    golden: Golden,
    requests: Sequence[Request],
    emulation: Emulation,
    plan: Plan,
    label: str,
    show: asking.Progress,
) -> Rung:
    """One rung: the format put in force and proven, every golden token replayed, and what diverges decoded if asked."""
    assert isinstance(engine, Emulating)
    started = time.monotonic()
    with engine.in_format(emulation):
        seen = engine.observe()
        if seen.compute_class != emulation.name:
            raise EngineError(
                f"{emulation.name} was asked for, but the probe found {seen.compute_class}: {seen.detail}"
            )
        total = sum(len(r.reference) for r in requests if r.reference is not None)
        found = engine.departures(requests, show.phase(f"{label}: replay", total))
        layout = (emulation.format.exponent, emulation.format.mantissa)
        rung = ladder.rung(emulation.name, layout, emulation.format.known_as, found)
        if _decodes(suite, plan, emulation.name):
            rung = _scored(
                engine, suite, golden, requests, rung, plan, show.phase(f"{label}: decode", _tokens(suite, rung))
            )
    return replace(rung, seconds=round(time.monotonic() - started, 1))


def _tokens(suite: Suite, rung: Rung) -> int:
    return rung.divergent * suite.max_new_tokens


def _scored(
    engine: Engine,
    suite: Suite,
    golden: Golden,
    requests: Sequence[Request],
    rung: Rung,
    plan: Plan,
    tick: Callable[[int], None],
) -> Rung:
    """The rung with its accuracy: divergent prompts decoded anew, the others' texts are the golden's."""
    texts = dict(zip(golden.generation.ids, golden.generation.texts, strict=True))
    asked = [r.id for r in requests]
    then = judging.scores(suite, [texts[name] for name in asked], asked, plan.allow_code)
    parted = [replace(r, reference=None) for r in requests if r.id in rung.indices or r.id in rung.errors]
    for start in range(0, len(parted), suite.batch_size):
        for output in engine.generate(parted[start : start + suite.batch_size], tick):
            texts[output.id] = "" if output.error else output.text
    now = judging.scores(suite, [texts[name] for name in asked], asked, plan.allow_code)
    known = [(bool(a), bool(b)) for a, b in zip(then, now, strict=True) if a is not None and b is not None]
    alpha = suite.thresholds_for("fp32").alpha
    return rung.with_accuracy(paired_test([a for a, _ in known], [b for _, b in known], alpha) if known else None)


def _settings(suite: Suite) -> str:
    """What a rung's numbers depend on besides the golden, which holds the model's identity and the tokens."""
    prompts = suite.digest_of_prompts()
    return digest([SCHEMA, prompts, suite.scorer_spelt, suite.max_new_tokens, suite.batch_size, suite.engine_options])


def _kept(file: Path, suite: Suite, golden: Golden) -> Descent:
    """The descent that a file holds; a new one without it.

    Raises:
        ConfigError: it is another ladder's, or no ladder.
    """
    fresh = Descent(suite.name, golden.digest, _settings(suite))
    if not file.exists():
        return fresh
    head, *lines = _lines(file)
    kept = Descent(head["suite"], head["golden"], head["settings"], tuple(map(Rung.from_json, lines)))
    if replace(kept, rungs=()) != fresh:
        raise ConfigError(
            "it holds another ladder: of another suite, golden, batch size or other options",
            where=file,
            fix="remove it, or another folder for --out",
        )
    return kept


def _lines(file: Path) -> list[dict[str, Any]]:
    """The header and the rungs of a ladder's file, as the schema wants them: it may be data from a pull request."""
    found: list[dict[str, Any]] = []
    for number, line in enumerate(file.read_text("utf-8", errors="replace").splitlines() or [""], 1):
        mend = f"remove line {number} of it, and that rung is walked again" if found else f"rm {typed(file)}"
        try:
            found.append(schemas.parse(line))
        except (ValueError, RecursionError):
            raise ConfigError("not JSON", where=f"{file}:{number}", fix=mend) from None
        if error := schemas.first_error(found[-1], "ladder", "rung" if number > 1 else "header"):
            name = ".".join(map(str, error.absolute_path)) or "the line"
            raise ConfigError(f"{schemas.describe(error)} ({name})", where=f"{file}:{number}", fix=mend)
    return found


def _encoded(descent: Descent) -> bytes:
    head: dict[str, Any] = {
        "schema": SCHEMA, "kind": "ladder", "suite": descent.suite, "golden": descent.golden, "settings": descent.settings,
    }  # fmt: skip
    rows = [head, *(rung.to_json() for rung in descent.rungs)]
    return "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in rows).encode()
