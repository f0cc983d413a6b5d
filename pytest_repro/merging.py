"""Shards put together again: parts of a golden into one candidate, results of shards into one result. Pure.

A shard holds whole batches, so each part has the very numbers that a run in one piece would have given it; what is said
of the whole suite (envelope, metrics, accuracy, length, thresholds) is taken from all prompts again.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from . import checks, noise
from .errors import ConfigError, GoldenError
from .fingerprint import Change, Fingerprint, Value, class_of
from .generation import joined, subset
from .golden import Golden, Part
from .result import Check, PromptResult, SuiteResult
from .sketch import Recorded
from .suite import Shard

# --- parts of a golden ----------------------------------------------------------------------------------------------


def golden_of(parts: Sequence[Golden], *, where: str) -> Golden:
    """One candidate from the parts of a golden.

    Args:
        parts: each with its `part`; verified when they were read.
        where: the suite's folder, for messages.

    Raises:
        GoldenError: a part is missing or there twice, or they are not parts of one recording.
    """
    numbered = {str(_part(g).shard): g for g in parts}
    again = f"pytest --repro-update {where} --repro-shard "
    if len(numbered) < len(parts):
        raise GoldenError("a part is there twice", where=where, fix=f"pytest-repro reject FILE, or {again}i/n")
    if split := _disagreements(numbered, lambda g: {"the number of shards": _part(g).count}):
        raise GoldenError(split, where=where, fix="remove the parts of the older split: pytest-repro reject FILE")
    if differs := _disagreements(numbered, _must_agree):
        raise GoldenError(
            differs, where=where, fix=f"record the odd ones anew, all on one build and one kind of machine: {again}i/n"
        )
    places = _places_of_parts(parts, where, again)
    order = np.argsort(np.concatenate(places))
    whole = subset(joined([g.generation for g in parts]), order.tolist())
    if len(set(whole.ids)) < len(whole):
        twice = next(name for name in whole.ids if whole.ids.count(name) > 1)
        raise GoldenError(f"prompt {twice} is in two parts", where=where, fix=f"record them anew: {again}i/n")
    scores = [score for g in parts for score in g.scores]
    return replace(
        parts[0],
        generation=whole,
        scores=tuple(scores[i] for i in order),
        noise=noise.merged([g.noise for g in parts], order),
        fingerprint=_joined([g.fingerprint for g in parts]),
        sketch=_first_sketch(parts),
        candidate=None,
        digest="",
        part=None,
        calibrations=(),
    )


def _first_sketch(parts: Sequence[Golden]) -> Recorded | None:
    """One part's sketch says where a difference begins as well as that of all prompts."""
    return min(parts, key=lambda golden: _part(golden).index).sketch


def _part(golden: Golden) -> Part:
    assert golden.part is not None, "only parts are merged"
    return golden.part


def _must_agree(golden: Golden) -> dict[str, Hashable]:
    """Everything that decides what was asked and how it was computed."""
    part = _part(golden)
    return {
        **{name: value for name, value in golden.fingerprint.items() if class_of(name) != "information"},
        "suite": golden.suite,
        "model": golden.model,
        "compute_class": golden.stem,
        "mode": golden.numerics,
        "generation.max_new_tokens": golden.max_new_tokens,
        "generation.batch_size": golden.batch_size,
        "size": part.size,
        "prompts": part.prompts,
        "scorer": part.scorer,
        "noise.compute_class": golden.noise.compute_class,
        "noise.variants": ", ".join(v.name for v in golden.noise.variants),
    }


def _places_of_parts(parts: Sequence[Golden], where: str, again: str) -> list[list[int]]:
    """Places in the suite of each part's prompts."""
    first, batch_size = _part(parts[0]), parts[0].batch_size
    batches = -(-first.size // batch_size)
    there = {_part(golden).index for golden in parts}
    due = range(1, min(first.count, batches) + 1)  # with fewer batches than shards, the last shards are empty
    if missing := [f"{i}/{first.count}" for i in due if i not in there]:
        raise GoldenError(
            f"parts are missing: {_some(missing)}", where=where, fix=f"{again}{missing[0]}, and so on for each"
        )
    for golden in parts:
        shard, found = _part(golden).shard, len(golden.generation)
        if found != (share := shard.share(first.size, batch_size)):
            raise GoldenError(
                f"part {shard.spoken} holds {found} prompts where {share} belong to it",
                where=where,
                fix=f"record it anew: {again}{shard}",
            )
    return [_part(golden).shard.places(first.size, batch_size) for golden in parts]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def _joined(fingerprints: Sequence[Fingerprint]) -> Fingerprint:
    """Judged fields are equal. Of the others equal values stay, different ones are listed, and the latest time counts."""
    out: dict[str, Value] = {}
    for name in {key: None for f in fingerprints for key in f}:
        values = list(dict.fromkeys(f[name] for f in fingerprints if name in f))
        out[name] = values[0] if len(values) == 1 else ", ".join(map(str, values))
    times = [str(f["time"]) for f in fingerprints if f.get("time")]
    return {**out, "time": max(times)} if times else out


# --- results of a check ---------------------------------------------------------------------------------------------


def result_of(shards: Sequence[tuple[str, SuiteResult]]) -> SuiteResult:
    """One result from those of all shards of a suite in one numerics mode, judged as a whole.

    Args:
        shards: (where it was read from, result), in any order.

    Raises:
        ConfigError: a shard is missing or there twice, or they are not shards of one check.
    """
    where = f"{shards[0][1].path} [{shards[0][1].numerics}]"
    found = _numbered(shards, where)
    results = list(found.values())
    came_to_compare = {name: r for name, r in found.items() if r.golden is not None}
    ran = {name: r for name, r in found.items() if r.environment}
    for table, facts in ((found, _asked), (came_to_compare, _compared), (ran, _identity)):
        if differs := _disagreements(table, facts):
            raise ConfigError(differs, where=where, fix="check all shards alike, against one golden, and merge again")
    first = next(iter(came_to_compare.values()), results[0])
    whole = replace(
        first,
        shard=None,
        shard_size=0,
        prompts=_prompts(found, where),
        checks=(),
        environment=next((r.environment for r in ran.values()), {}),
        environment_diff=tuple({repr(c): c for r in results for c in r.environment_diff}.values()),
        calibrated=tuple(dict.fromkeys(day for r in results for day in r.calibrated)),
        envelope_diff=_since_measured(results),
        equal_fields=min((r.equal_fields for r in came_to_compare.values()), default=0),
        distribution=_distribution(results),
        localisation=next((r.localisation for r in results if r.localisation), None),
        metrics={},
        notes=(f"merged from {len(results)} shards", *_notes({n: r for n, r in found.items() if r.prompts}, ran)),
        seconds=sum(r.seconds for r in results),
        next_steps=(),
    )
    whole = checks.summed_up(whole) if came_to_compare else whole
    whole = replace(whole, checks=_with_failed(whole.checks, found))
    steps = dict.fromkeys(step for r in (whole, *results) for step in r.next_steps)
    return replace(whole, next_steps=() if whole.passed else tuple(steps))


def _since_measured(results: Sequence[SuiteResult]) -> tuple[Change, ...] | None:
    """All that differs from where each shard's envelope was measured; None if the recording's served them all."""
    if all(r.envelope_diff is None for r in results):
        return None
    return tuple({repr(c): c for r in results for c in r.since_measured}.values())


def _distribution(results: Sequence[SuiteResult]) -> dict[str, Any] | None:
    """Counts added up; the edges are the same in every report of this schema."""
    found = [r.distribution for r in results if r.distribution]
    if not found:
        return None
    counts = [sum(column) for column in zip(*(d["counts"] for d in found), strict=True)]
    return {"edges": found[0]["edges"], "counts": counts, "zeros": sum(d["zeros"] for d in found)}


def _numbered(shards: Sequence[tuple[str, SuiteResult]], where: str) -> dict[str, SuiteResult]:
    """Shard -> result, in order; all of them are there, and each once."""
    found: dict[Shard, tuple[str, SuiteResult]] = {}
    for source, result in shards:
        if result.shard is None:
            raise ConfigError(f"{source} holds a check of the whole suite, no shard", where=where, fix="leave it out")
        if result.shard in found:
            raise ConfigError(
                f"shard {result.shard} is there twice: in {found[result.shard][0]} and in {source}",
                where=where,
                fix="leave one of them out",
            )
        found[result.shard] = source, result
    counts = sorted({shard.count for shard in found})
    if len(counts) > 1:
        raise ConfigError(
            f"shards of different splits: of {' and of '.join(map(str, counts))}", where=where, fix="merge one split"
        )
    missing = [f"{i}/{counts[0]}" for i in range(1, counts[0] + 1) if Shard(i, counts[0]) not in found]
    if missing:
        raise ConfigError(
            f"shards are missing: {_some(missing)}",
            where=where,
            fix="name the reports of all shards; an empty one writes a report as well",
        )
    return {str(shard): found[shard][1] for shard in sorted(found, key=lambda s: s.index)}


def _asked(result: SuiteResult) -> dict[str, Hashable]:
    return {"name": result.name, "size": result.size, "claimed_compute": result.claimed, **result.settings}


def _compared(result: SuiteResult) -> dict[str, Hashable]:
    golden, thresholds = result.golden or {}, {f"thresholds.{k}": v for k, v in vars(result.thresholds).items()}
    observed = (result.observed or {}).get("compute_class")
    return {"golden": golden["digest"], "review": repr(golden["review"]), "observed compute": observed, **thresholds}


def _identity(result: SuiteResult) -> dict[str, Hashable]:
    """Identity fields: with --repro-allow-changed they may differ from the golden's, but not from shard to shard."""
    return {name: value for name, value in result.environment.items() if class_of(name) == "identity"}


def _prompts(found: Mapping[str, SuiteResult], where: str) -> tuple[PromptResult, ...]:
    """All prompts in the suite's order."""
    placed: dict[int, PromptResult] = {}
    for name, result in found.items():
        assert result.shard is not None
        batch_size = int(result.settings["batch_size"])
        if len(result.prompts) != (share := result.shard.share(result.size, batch_size)):
            raise ConfigError(
                f"shard {name} judged {len(result.prompts)} of its {share} prompts",
                where=where,
                fix="check the shard without -k and without naming single prompts",
            )
        placed |= zip(result.shard.places(result.size, batch_size), result.prompts, strict=True)
    prompts = tuple(placed[i] for i in sorted(placed))
    ids = [p.id for p in prompts]
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise ConfigError(f"prompt {twice} is in two shards", where=where, fix="check the shards anew")
    return prompts


def _with_failed(judged: Sequence[Check], found: Mapping[str, SuiteResult]) -> tuple[Check, ...]:
    """Checks of the whole, and in their place those that failed in a shard that could not be judged."""
    out = {check.name: check for check in judged}
    failed = [(name, c) for name, r in found.items() for c in r.checks if c.status == "fail"]
    everywhere = {c for _, c in failed if all(c in r.checks for r in found.values() if r.prompts)}
    for name, check in failed:
        if check.name not in out or out[check.name].status != "fail":
            said = check.message if check in everywhere else f"shard {name}: {check.message}"
            out[check.name] = replace(check, message=said)
    return tuple(out.values())


def _notes(busy: Mapping[str, SuiteResult], ran: Mapping[str, SuiteResult]) -> Iterable[str]:
    """What all shards say is said once, what one says with its number; and in what their machines differ."""
    said: dict[str, list[str]] = {}
    for name, result in busy.items():
        for note in result.notes:
            said.setdefault(note, []).append(name)
    yield from (note if len(who) == len(busy) else f"shard {', '.join(who)}: {note}" for note, who in said.items())
    if differs := _disagreements(ran, _numerics):
        yield f"{differs} (each shard is compared with the golden as it is; what differs there is a suspect)"


def _numerics(result: SuiteResult) -> dict[str, Hashable]:
    return {name: value for name, value in result.environment.items() if class_of(name) == "numerics"}


# --- both -----------------------------------------------------------------------------------------------------------


def _disagreements(found: Mapping[str, Any], facts: Any) -> str:
    """Fields in which shards differ, with the values and whose they are; empty if there is none."""
    tables = {name: facts(each) for name, each in found.items()}
    told = []
    for field in {key: None for table in tables.values() for key in table}:
        whose: dict[Any, list[str]] = {}
        for name, table in tables.items():
            whose.setdefault(table.get(field), []).append(name)
        if len(whose) > 1:
            values = " and ".join(f"{value!r} in {', '.join(names)}" for value, names in whose.items())
            told.append(f"{field}: {values}")
    return f"the shards differ in {'; '.join(told)}" if told else ""
