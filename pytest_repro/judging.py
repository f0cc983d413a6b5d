"""From what was gathered to judged prompts. Pure: no model, no files.

`verdict.judge` decides on one prompt; this module brings it the evidence and words what was found.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from shlex import quote
from typing import Any

import numpy as np

from . import accuracy, calibration, checks, fingerprint, noise, traces
from .arbiter import Arbitration
from .comparison import Comparison, Row, finite
from .errors import EngineError, GoldenError, GoldenMissing, ReproError
from .fingerprint import IDENTITY
from .generation import Generation, Request, Scores, digest, token_digest
from .golden import Golden
from .result import Check, PromptResult, SuiteResult, Texts
from .suite import SUITE_ITEMS, Shard, Suite
from .verdict import Evidence, Judgement, Verdict, judge

FARTHEST = 1e30
"""Stands for an infinite change, which JSON cannot hold."""
CONTEXT_TOKENS = (12, 8)
"""Tokens shown before and after a divergence."""


@dataclass(frozen=True)
class Gathered:
    """What ran: a replay, a decoding, or both, of the prompts that can be compared."""

    replayed: Comparison | None = None
    decoded: Comparison | None = None
    generation: Generation | None = None
    """What was decoded."""
    unanswered: Mapping[str, Judgement] = field(default_factory=dict)
    """Prompt id -> the verdict on a prompt that has no answer to compare."""
    scores: Mapping[str, Scores] = field(default_factory=dict)
    """Prompt id -> what was replayed."""


def blank(
    suite: Suite,
    mode: str,
    claimed: str | None,
    selected: frozenset[str] | None,
    shown_path: str,
    shard: Shard | None = None,
) -> SuiteResult:
    """A result before anything ran: every selected prompt (of the shard) still `identical`."""
    asked = suite.prompts_of(shard)
    return SuiteResult(
        name=suite.name,
        path=shown_path or str(suite.folder),
        numerics=mode,
        thresholds=suite.thresholds_for(claimed or ""),
        size=len(suite.prompts),
        prompts=tuple(PromptResult(p.id, Verdict.IDENTICAL) for p in asked if selected is None or p.id in selected),
        checks=(),
        claimed=claimed,
        shard=shard,
        shard_size=len(asked),
    )


def idle(result: SuiteResult) -> SuiteResult:
    """The result of a shard that holds no batch: it passes, and every check says why it judged nothing."""
    why = f"not judged: shard {result.shard} holds no batch, since there are fewer batches than shards"
    return replace(result, checks=tuple(Check(name, "skip", why) for name in SUITE_ITEMS))


def broken(result: SuiteResult, exc: ReproError) -> SuiteResult:
    """The suite could not be judged: no golden, one that cannot be trusted, or an engine that failed."""
    verdict = Verdict.MISSING if isinstance(exc, GoldenMissing) else Verdict.ERROR
    name = "golden" if isinstance(exc, GoldenError) else "compute"
    command, _, when = exc.fix.partition("   # ")
    steps = ((command, when),) if exc.fix else ()
    return replace(
        result,
        prompts=tuple(replace(p, verdict=verdict, reason=exc.what) for p in result.prompts),
        checks=(Check(name, "fail", str(exc)),),
        next_steps=steps,
    )


def offered(result: SuiteResult, candidate: str, folder: str) -> SuiteResult:
    """The result with the candidate that was left for a reviewer, which need not be recorded again."""
    fetch = (f"pytest-repro fetch {quote(folder)}", "here, or the artifact of this run; then pytest-repro review")
    others = (step for step in result.next_steps if "--repro-update" not in step[0])
    note = f"a candidate was left at {candidate}"
    return replace(result, notes=(*result.notes, note), next_steps=(*others, fetch))


def against(result: SuiteResult, golden: Golden, suite: Suite, allowed: frozenset[str]) -> SuiteResult:
    """The result with its golden beside it: environments compared, prompts of another question set aside."""
    observed = str((result.observed or {}).get("compute_class", "unknown"))
    changes = fingerprint.diff(
        {**golden.fingerprint, "compute_class": golden.compute_class}, {**result.environment, "compute_class": observed}
    )
    unseen = fingerprint.unobserved(golden.fingerprint, result.environment)
    changes = [c for c in changes if c.field not in unseen]
    barred = [c for c in changes if c.cls == "identity" and IDENTITY[c.field] not in allowed]
    there, asked = golden.generation.index(), {p.id: p for p in suite.prompts}
    prompts = []
    for prompt in result.prompts:
        content = digest(asked[prompt.id].content)
        if prompt.id not in there:
            prompts.append(replace(prompt, verdict=Verdict.MISSING, reason="the golden has no such prompt"))
        elif barred:
            why = f"{', '.join(c.field for c in barred)} differ: the golden answers another question"
            prompts.append(replace(prompt, verdict=Verdict.INCOMPARABLE, reason=why))
        elif content != golden.generation.content_digests[there[prompt.id]]:
            prompts.append(replace(prompt, verdict=Verdict.INCOMPARABLE, reason="the prompt was edited"))
        else:
            prompts.append(prompt)
    notes = _notes(golden, suite, result, [] if barred else changes)
    return replace(
        result,
        prompts=tuple(prompts),
        golden=described(golden),
        thresholds=suite.thresholds_for(result.claimed or observed),
        environment_diff=tuple(changes),
        equal_fields=fingerprint.equal_count(golden.fingerprint, result.environment),
        envelope_deficit=golden.noise.max_deficit,
        notes=notes,
    )


def on_basis(result: SuiteResult, golden: Golden) -> tuple[SuiteResult, Golden]:
    """The golden with the envelope that holds in this environment, and the result that says whose it is."""
    observed = str((result.observed or {}).get("compute_class", "unknown"))
    found = calibration.basis(golden, {**result.environment, "compute_class": observed})
    if found.calibration is None:
        return result, golden
    return replace(result, calibrated=(found.calibration.when,), envelope_diff=found.changes), found.golden


def described(golden: Golden) -> dict[str, Any]:
    """A golden as a result names it."""
    return {
        "name": golden.stem,
        "digest": golden.digest,
        "recorded": golden.fingerprint.get("time"),
        "engine": f"{golden.fingerprint.get('engine')} {golden.fingerprint.get('engine_version') or ''}".strip(),
        "batch_size": golden.batch_size,
        "review": asdict(golden.review) if golden.review else None,
        "accuracy": golden.accuracy,
        "mean_abs_dlogp": golden.noise.mean_abs_dlogp,
    }


def _notes(golden: Golden, suite: Suite, result: SuiteResult, changes: Sequence[fingerprint.Change]) -> tuple[str, ...]:
    notes = []
    unused = sorted(set(golden.generation.ids) - {p.id for p in suite.prompts})
    if unused:
        notes.append(f"unused in the golden: {', '.join(unused)} (no such prompt in the suite any more)")
    if golden.compute_class not in (result.claimed, (result.observed or {}).get("compute_class")):
        notes.append(f"compared with a golden of another compute class, {golden.compute_class}")
    if unseen := fingerprint.unobserved(golden.fingerprint, result.environment):
        notes.append(f"not checked, since the engine cannot see it: {', '.join(unseen)}")
    if not golden.noise.variants:
        notes.append(
            "the golden has no noise envelope (its engine cannot replay): no difference can be explained by rounding"
        )
    allowed = [c.field for c in changes if c.cls == "identity"]
    if allowed:
        notes.append(f"identity differs: {', '.join(allowed)}")
    return tuple(notes)


def unanswerable(
    context_length: int | None,
    suite: Suite,
    requests: Sequence[Request],
    golden: Golden,
    comparable: set[str],
    allowed: frozenset[str],
) -> dict[str, Judgement]:
    """Prompts that must not be run: too long for the model, or other tokens than the golden's."""
    place = golden.generation.index()
    found: dict[str, Judgement] = {}
    for request in requests:
        why = too_long(context_length, suite, request)
        if why:
            found[request.id] = Judgement(Verdict.ERROR, why)
        elif (
            request.id in comparable
            and "tokenizer" not in allowed
            and token_digest(request.tokens) != golden.generation.prompt_digests[place[request.id]]
        ):
            why = (
                "the prompt's tokens are not the golden's, although tokenizer and template are: a template with a date?"
            )
            found[request.id] = Judgement(Verdict.INCOMPARABLE, why)
    return found


def too_long(context_length: int | None, suite: Suite, request: Request) -> str:
    """Why a prompt and its answer do not fit into the model's context; empty if they do."""
    if context_length is None or len(request.tokens) + suite.max_new_tokens <= context_length:
        return ""
    return (
        f"the prompt is too long: {len(request.tokens)} tokens and max_new_tokens = {suite.max_new_tokens} "
        f"exceed the model's context of {context_length}"
    )


def doubtful(replayed: Comparison, golden: Golden) -> set[str]:
    """Prompts that the replay cannot clear: a token would be chosen otherwise, or the text moved as a whole."""
    rows = [golden.generation.index()[name] for name in replayed.ids]
    limit = noise.bulk_ratio(golden.compute_class)
    levels = np.array([golden.noise.level(row) for row in rows])
    outside = replayed.mean_abs_dlogp > limit * levels
    if golden.compute_class == noise.EXACT:
        outside |= replayed.moved > 0
    return {name for name, doubt in zip(replayed.ids, replayed.differs | outside, strict=True) if doubt}


def judge_all(
    result: SuiteResult,
    suite: Suite,
    golden: Golden,
    gathered: Gathered,
    decode: Callable[[Sequence[int]], str],
    allow_code: bool,
) -> SuiteResult:
    """Every prompt's verdict, then the suite's checks and metrics."""
    fp32 = (result.observed or {}).get("compute_class") == "fp32"
    view = _View(suite, golden, gathered, decode, allow_code)
    prompts = tuple(
        p
        if p.verdict != Verdict.IDENTICAL
        else replace(p, **vars(gathered.unanswered[p.id]))
        if p.id in gathered.unanswered
        else view.judged(p, result, fp32)
        for p in result.prompts
    )
    result = replace(result, prompts=prompts)
    result = traces.traced(result, suite.prompts, golden, gathered.scores, gathered.generation, decode)
    return checks.summed_up(result)


def arbitrated(result: SuiteResult, found: Mapping[str, Arbitration]) -> SuiteResult:
    """The result with what the arbiter found beside each drifting prompt. It explains verdicts, and changes none."""
    if not found:
        return result
    prompts = tuple(replace(p, arbiter=asdict(found[p.id])) if p.id in found else p for p in result.prompts)
    counts = Counter(str(a.finding) for a in found.values())
    said = {
        "rounding": "{} as near to the FP32 answer as the golden",
        "candidate": "{} farther from it than the golden (this build's compute)",
        "golden": "{} nearer to it than the golden (the model itself)",
        "undecided": "{} with too few tokens to tell",
    }
    told = ", ".join(said[name].format(counts[name]) for name in said if counts[name])
    note = f"arbiter: {len(found)} drifting prompts replayed under LayerCast: {told}"
    return replace(result, prompts=prompts, notes=(*result.notes, note))


class _View:
    """Golden and gathered evidence, prompt by prompt."""

    def __init__(
        self, suite: Suite, golden: Golden, gathered: Gathered, decode: Callable[[Sequence[int]], str], allow_code: bool
    ) -> None:
        self.golden, self.gathered, self.decode = golden, gathered, decode
        self.place = golden.generation.index()
        self.replayed = {n: i for i, n in enumerate(gathered.replayed.ids)} if gathered.replayed else {}
        self.decoded = {n: i for i, n in enumerate(gathered.decoded.ids)} if gathered.decoded else {}
        now, then = gathered.generation, golden.generation
        self.answered = now.index() if now else {}
        # Both sides by today's scorer and answers: what was stored says how it was scored when it was recorded.
        self.scores_golden = scores(suite, then.texts, then.ids, allow_code)
        self.scores_now = dict(zip(now.ids, scores(suite, now.texts, now.ids, allow_code), strict=True)) if now else {}

    def judged(self, prompt: PromptResult, result: SuiteResult, fp32: bool) -> PromptResult:
        """One prompt with verdict, numbers and texts."""
        seen, shown = self._evidence(prompt.id)
        replayed = _row(self.gathered.replayed, self.replayed.get(prompt.id))
        decoded = _row(self.gathered.decoded, self.decoded.get(prompt.id))
        verdict: Judgement = judge(seen, result.thresholds.fp32_waiver, fp32)
        row = self.place[prompt.id]
        index = int(shown.divergence_index) if shown.divergence_index >= 0 else None
        score = self.scores_golden[row]
        return replace(
            prompt,
            verdict=verdict.verdict,
            reason=verdict.reason,
            method="+".join(
                name for name, rows in (("replay", self.replayed), ("decode", self.decoded)) if prompt.id in rows
            ),
            tokens=self.golden.generation.length(row),
            tokens_now=self._tokens_now(prompt.id, row, index),
            divergence_index=index,
            deficit=finite(seen.deficit) if index is not None else 0.0,
            deficit_index=int(shown.deficit_index) if index is not None else None,
            golden_gap=finite(shown.golden_gap),
            mean_abs_dlogp=finite(seen.mean_abs_dlogp),
            benign_dlogp=finite(seen.level),
            mean_abs_dgap=_change(replayed.mean_abs_dgap) if replayed else None,
            decoded_dgap=_change(decoded.mean_abs_dgap) if decoded else None,
            benign_dgap=finite(float(self.golden.noise.gap_level[row])),
            golden_text=self._golden_text(row, index),
            now_text=self._now_text(prompt.id, row, index, int(shown.token_now)),
            score_golden=score,
            score_now=self.scores_now.get(prompt.id, score if index is None else None),
        )

    def _evidence(self, name: str) -> tuple[Evidence, Row]:
        """What counts, and the row whose divergence is shown: what was decoded if it was, the replay otherwise.

        The output is the decoder's; how far the text as a whole moved, only a replay sees to the end.
        """
        replayed = _row(self.gathered.replayed, self.replayed.get(name))
        decoded = _row(self.gathered.decoded, self.decoded.get(name))
        shown, bulk = decoded or replayed, replayed or decoded
        assert shown is not None and bulk is not None, f"nothing ran for {name}"
        limit, row = self.golden.noise.max_deficit, self.place[name]
        deficit = shown.deficit
        differs = shown.divergence_index >= 0
        if replayed is not None and decoded is not None and replayed.deficit > limit:
            # The decoder may agree by luck, or have parted harmlessly before the place where the model is wrong.
            deficit, differs, shown = max(deficit, replayed.deficit), True, decoded if differs else replayed
        moved = bulk.mean_abs_dlogp
        if decoded is not None and decoded.divergence_index < 0:
            # The whole text was decoded as well: a bug that only decoding has moves these numbers, and not the replay's.
            moved = float(np.fmax(moved, decoded.mean_abs_dlogp))
        evidence = Evidence(
            differs=differs,
            deficit=deficit,
            mean_abs_dlogp=moved,
            envelope_deficit=limit,
            level=self.golden.noise.level(row),
            ratio=noise.bulk_ratio(self.golden.compute_class),
            other_bits=_other_bits(self.golden, replayed, decoded),
            passed_over=shown.passed_over,
            unmoved=shown.unmoved,
        )
        return evidence, shown

    def _golden_text(self, row: int, index: int | None) -> Texts | None:
        if index is None:
            return None
        tokens = self.golden.generation.tokens[self.golden.generation.span(row)]
        return self._around(tokens.tolist(), index)

    def _now_text(self, name: str, row: int, index: int | None, token: int) -> Texts | None:
        if index is None:
            return None
        now = self.gathered.generation
        place = self.answered.get(name)
        if now is not None and place is not None and name in self.decoded:
            tokens = now.tokens[now.span(place)].tolist()
            return self._around(tokens, index)
        golden = self.golden.generation.tokens[self.golden.generation.span(row)].tolist()
        return replace(self._around([*golden[:index], token], index), after=" (replayed, not generated further)")

    def _around(self, tokens: list[int], index: int) -> Texts:
        before, after = CONTEXT_TOKENS
        return Texts(
            self.decode(tokens[max(0, index - before) : index]),
            self.decode(tokens[index : index + 1]) or "(the text ends)",
            self.decode(tokens[index + 1 : index + 1 + after]),
        )

    def _tokens_now(self, name: str, row: int, index: int | None) -> int | None:
        now = self.gathered.generation
        if name in self.decoded and now is not None:
            return now.length(self.answered[name])
        return self.golden.generation.length(row) if index is None else None


def _other_bits(golden: Golden, *rows: Row | None) -> int | None:
    """Tokens whose numbers moved at all, where that is what counts: the most that either way of checking saw."""
    return max(row.moved for row in rows if row is not None) if golden.compute_class == noise.EXACT else None


def _change(value: float) -> float | None:
    """A mean change as reports hold it: infinite where a runner-up was ruled out, None where it is unknown."""
    return None if np.isnan(value) else min(value, FARTHEST)


def _row(comparison: Comparison | None, i: int | None) -> Row | None:
    return None if comparison is None or i is None else comparison.row(i)


def scores(suite: Suite, texts: Sequence[str], ids: Sequence[str], allow_code: bool) -> tuple[bool | None, ...]:
    """Whether each text answers its prompt; None for prompts without an answer."""
    answers = {p.id: p.answer for p in suite.prompts}
    right = accuracy.scorer(suite.scorer, pattern=suite.pattern, allow_code=allow_code, where=str(suite.folder))
    try:
        return tuple(
            None if (answer := answers.get(name)) is None else right(text, answer)
            for name, text in zip(ids, texts, strict=True)
        )
    except Exception as exc:
        if ":" not in suite.scorer:
            raise
        raise EngineError(
            f"the scorer {suite.scorer} raised {type(exc).__name__}: {exc}", where=str(suite.folder)
        ) from exc
