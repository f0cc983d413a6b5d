"""From what was gathered to a judged suite: every prompt's verdict, the checks of the whole suite, its metrics.

Pure: no model, no files. `verdict.judge` decides on one prompt; this module brings it the evidence and sums up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from . import accuracy, fingerprint, noise
from .comparison import Comparison, compare_decode
from .errors import GoldenError, GoldenMissing, ReproError
from .fingerprint import IDENTITY
from .generation import Generation, Request, digest, token_digest
from .golden import Golden
from .result import Check, PromptResult, SuiteResult, Texts
from .suite import Suite
from .verdict import Evidence, Judgement, Verdict, judge

CONTEXT_TOKENS = (12, 8)
"""Tokens shown before and after a divergence."""


@dataclass(frozen=True)
class Gathered:
    """What ran: a replay, a decoding, or both, of the prompts that can be compared."""

    replayed: Comparison | None = None
    decoded: Comparison | None = None
    generation: Generation | None = None
    """What was decoded."""
    errors: Mapping[str, str] = field(default_factory=dict)
    """Prompt id -> why it has no answer."""


def blank(suite: Suite, mode: str, selected: frozenset[str] | None, shown_path: str) -> SuiteResult:
    """A result before anything ran: every selected prompt still `identical`."""
    return SuiteResult(
        name=suite.name,
        path=shown_path or str(suite.folder),
        numerics=mode,
        thresholds=suite.thresholds_for(mode),
        size=len(suite.prompts),
        prompts=tuple(
            PromptResult(p.id, Verdict.IDENTICAL) for p in suite.prompts if selected is None or p.id in selected
        ),
        checks=(),
    )


def broken(result: SuiteResult, exc: ReproError) -> SuiteResult:
    """The suite could not be judged: no golden, one that cannot be trusted, or an engine that failed."""
    verdict = Verdict.MISSING if isinstance(exc, GoldenMissing) else Verdict.ERROR
    name = "golden" if isinstance(exc, GoldenError) else "compute"
    steps = ((exc.fix, ""),) if exc.fix else ()
    return replace(
        result,
        prompts=tuple(replace(p, verdict=verdict, reason=exc.what) for p in result.prompts),
        checks=(Check(name, "fail", str(exc)),),
        next_steps=steps,
    )


def against(result: SuiteResult, golden: Golden, suite: Suite, allowed: frozenset[str]) -> SuiteResult:
    """The result with its golden beside it: environments compared, prompts of another question set aside."""
    changes = fingerprint.diff(golden.fingerprint, result.environment)
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
    compute_class = str((result.observed or {}).get("compute_class", ""))
    notes = _notes(golden, suite, result, changes)
    return replace(
        result,
        prompts=tuple(prompts),
        golden={
            "name": golden.stem,
            "digest": golden.digest,
            "recorded": golden.fingerprint.get("time"),
            "engine": f"{golden.fingerprint.get('engine')} {golden.fingerprint.get('engine_version') or ''}".strip(),
            "batch_size": golden.batch_size,
            "review": asdict(golden.review) if golden.review else None,
        },
        thresholds=suite.thresholds_for(compute_class if result.numerics == "native" else result.numerics),
        environment_diff=tuple(changes),
        equal_fields=fingerprint.equal_count(golden.fingerprint, result.environment),
        envelope_deficit=golden.noise.max_deficit,
        notes=notes,
    )


def _notes(golden: Golden, suite: Suite, result: SuiteResult, changes: Sequence[fingerprint.Change]) -> tuple[str, ...]:
    notes = []
    unused = sorted(set(golden.generation.ids) - {p.id for p in suite.prompts})
    if unused:
        notes.append(f"unused in the golden: {', '.join(unused)} (no such prompt in the suite any more)")
    if golden.compute_class not in (result.numerics, (result.observed or {}).get("compute_class")):
        notes.append(f"compared with a golden of another compute class, {golden.compute_class}")
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
) -> dict[str, str]:
    """Prompts that must not be run: too long for the model, or other tokens than the golden's."""
    place, found = golden.generation.index(), {}
    for request in requests:
        total = len(request.tokens) + suite.max_new_tokens
        if context_length is not None and total > context_length:
            found[request.id] = (
                f"the prompt is too long: {len(request.tokens)} tokens and max_new_tokens = {suite.max_new_tokens} "
                f"exceed the model's context of {context_length}"
            )
        elif request.id in comparable and "tokenizer" not in allowed:
            if token_digest(request.tokens) != golden.generation.prompt_digests[place[request.id]]:
                found[request.id] = "the prompt's tokens are not the golden's, although tokenizer and template are"
    return found


def doubtful(replayed: Comparison, golden: Golden) -> set[str]:
    """Prompts that the replay cannot clear: a token would be chosen otherwise, or the text moved as a whole."""
    rows = [golden.generation.index()[name] for name in replayed.ids]
    limit = noise.bulk_ratio(golden.compute_class)
    levels = np.array([golden.noise.level(row) for row in rows])
    outside = replayed.mean_abs_dlogp > limit * levels
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
        replace(p, verdict=Verdict.ERROR, reason=gathered.errors[p.id])
        if p.id in gathered.errors and p.verdict == Verdict.IDENTICAL
        else view.judged(p, result, fp32)
        if p.verdict == Verdict.IDENTICAL
        else p
        for p in result.prompts
    )
    result = replace(result, prompts=prompts)
    test = _paired(result)
    checks = (
        _golden_check(result, golden),
        _compute_check(result),
        _accuracy_check(result, test),
        _length_check(result, view),
    )
    result = replace(result, checks=checks, metrics=_metrics(result, test, view))
    return replace(result, next_steps=_next_steps(result))


class _View:
    """Golden and gathered evidence, prompt by prompt."""

    def __init__(
        self, suite: Suite, golden: Golden, gathered: Gathered, decode: Callable[[Sequence[int]], str], allow_code: bool
    ) -> None:
        self.golden, self.gathered, self.decode = golden, gathered, decode
        self.place = golden.generation.index()
        self.replayed = {n: i for i, n in enumerate(gathered.replayed.ids)} if gathered.replayed else {}
        self.decoded = {n: i for i, n in enumerate(gathered.decoded.ids)} if gathered.decoded else {}
        now = gathered.generation
        self.scores_now = dict(zip(now.ids, scores(suite, now.texts, now.ids, allow_code), strict=True)) if now else {}

    def judged(self, prompt: PromptResult, result: SuiteResult, fp32: bool) -> PromptResult:
        """One prompt with verdict, numbers and texts."""
        seen, shown = self._evidence(prompt.id)
        verdict: Judgement = judge(seen, result.thresholds.fp32_waiver, fp32)
        row = self.place[prompt.id]
        index = int(shown.divergence_index) if shown.divergence_index >= 0 else None
        score = self.golden.scores[row]
        return replace(
            prompt,
            verdict=verdict.verdict,
            reason=verdict.reason,
            method="+".join(
                name for name, rows in (("replay", self.replayed), ("decode", self.decoded)) if prompt.id in rows
            ),
            tokens=len(self.golden.generation.tokens[self.golden.generation.span(row)]),
            divergence_index=index,
            deficit=_finite(seen.deficit) if index is not None else 0.0,
            deficit_index=int(shown.deficit_index) if index is not None else None,
            golden_gap=_finite(shown.golden_gap),
            mean_abs_dlogp=_finite(seen.mean_abs_dlogp),
            benign_dlogp=seen.level,
            golden_text=self._golden_text(row, index),
            now_text=self._now_text(prompt.id, row, index, int(shown.token_now)),
            score_golden=score,
            score_now=self.scores_now.get(prompt.id, score if index is None else None),
        )

    def _evidence(self, name: str) -> tuple[Evidence, _Row]:
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
        evidence = Evidence(
            differs=differs,
            deficit=deficit,
            mean_abs_dlogp=bulk.mean_abs_dlogp,
            envelope_deficit=limit,
            level=self.golden.noise.level(row),
            ratio=noise.bulk_ratio(self.golden.compute_class),
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
        place = now.index().get(name) if now else None
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

    def lengths(self, name: str, identical: bool) -> tuple[int, int] | None:
        """(tokens then, tokens now); None where it was not decoded and would differ."""
        span = self.golden.generation.span(self.place[name])
        then = span.stop - span.start
        if name in self.decoded and self.gathered.generation is not None:
            now = self.gathered.generation
            here = now.span(now.index()[name])
            return then, here.stop - here.start
        return (then, then) if identical else None


@dataclass(frozen=True)
class _Row:
    divergence_index: float
    deficit: float
    deficit_index: float
    golden_gap: float
    token_now: float
    mean_abs_dlogp: float


def _row(comparison: Comparison | None, i: int | None) -> _Row | None:
    if comparison is None or i is None:
        return None
    return _Row(**{name: float(getattr(comparison, name)[i]) for name in _Row.__dataclass_fields__})


def scores(suite: Suite, texts: Sequence[str], ids: Sequence[str], allow_code: bool) -> tuple[bool | None, ...]:
    """Whether each text answers its prompt; None for prompts without an answer."""
    answers = {p.id: p.answer for p in suite.prompts}
    right = accuracy.scorer(suite.scorer, pattern=suite.pattern, allow_code=allow_code, where=str(suite.folder))
    return tuple(
        None if (answer := answers.get(name)) is None else right(text, answer)
        for name, text in zip(ids, texts, strict=True)
    )


def with_candidate_notes(golden: Golden, previous: Golden | None) -> Golden:
    """A candidate with what a reviewer must know: how each prompt compares with the golden it would replace."""
    if previous is None:
        return replace(golden, candidate={"against": None, "prompts": []})
    there = set(previous.generation.ids)
    both = [i for i, name in enumerate(golden.generation.ids) if name in there]
    seen = compare_decode(previous.generation, _subset(golden.generation, both))
    old = previous.generation.index()
    rows: list[dict[str, Any]] = []
    for i, name in enumerate(seen.ids):
        row = _row(seen, i)
        assert row is not None
        evidence = Evidence(
            differs=row.divergence_index >= 0,
            deficit=row.deficit,
            mean_abs_dlogp=row.mean_abs_dlogp,
            envelope_deficit=previous.noise.max_deficit,
            level=previous.noise.level(old[name]),
            ratio=noise.bulk_ratio(previous.compute_class),
        )
        found = judge(evidence, "none", False)
        rows.append(
            {
                "id": name,
                "verdict": str(found.verdict),
                "reason": found.reason,
                "divergence_index": int(row.divergence_index) if evidence.differs else None,
                "deficit": _finite(row.deficit) if evidence.differs else 0.0,
                "golden_gap": _finite(row.golden_gap),
                "mean_abs_dlogp": _finite(row.mean_abs_dlogp),
            }
        )
    rows += [{"id": name, "verdict": "new"} for name in golden.generation.ids if name not in there]
    gone = [
        {"id": name, "verdict": "removed"} for name in previous.generation.ids if name not in golden.generation.index()
    ]
    return replace(golden, candidate={"against": previous.digest, "prompts": [*rows, *gone]})


def _subset(g: Generation, rows: Sequence[int]) -> Generation:
    flat = np.concatenate([np.zeros(0, np.int64), *(np.arange(g.offsets[i], g.offsets[i + 1]) for i in rows)]).astype(
        np.int64
    )
    lengths = [int(g.offsets[i + 1] - g.offsets[i]) for i in rows]
    return Generation(
        ids=tuple(g.ids[i] for i in rows),
        prompt_digests=tuple(g.prompt_digests[i] for i in rows),
        content_digests=tuple(g.content_digests[i] for i in rows),
        texts=tuple(g.texts[i] for i in rows),
        finish_reasons=tuple(g.finish_reasons[i] for i in rows),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        tokens=g.tokens[flat],
        logprob=g.logprob[flat],
        gap=g.gap[flat],
        runner_up=g.runner_up[flat],
        reference_logprob=None if g.reference_logprob is None else g.reference_logprob[flat],
    )


def _golden_check(result: SuiteResult, golden: Golden) -> Check:
    if golden.review is None:
        return Check("golden", "fail", f"{golden.stem}.golden was never reviewed: pytest-repro review {result.path}")
    barred = [c for c in result.environment_diff if c.cls == "identity"]
    if barred and any(p.verdict == Verdict.INCOMPARABLE for p in result.prompts):
        return Check(
            "golden",
            "fail",
            f"{golden.stem}.golden answers another question: {', '.join(c.field for c in barred)} differ",
        )
    return Check("golden", "pass", f"{golden.stem}.golden, accepted by {golden.review.by}")


def _compute_check(result: SuiteResult) -> Check:
    observed = result.observed or {}
    found, detail = observed.get("compute_class"), observed.get("detail")
    if found == "unknown":
        status = "fail" if result.numerics == "fp32" else "skip"
        return Check("compute", status, f"{result.numerics} is only claimed: {detail}")
    if result.numerics in ("native", found):
        return Check("compute", "pass", f"observed {found} ({observed.get('product_bits')} product bits; {detail})")
    return Check(
        "compute",
        "fail",
        f"{result.numerics} was asked for, but the probe found {found}: {observed.get('product_bits')} product bits, "
        f"{observed.get('sum_bits')} sum bits ({detail})",
    )


def _paired(result: SuiteResult) -> accuracy.PairedTest | None:
    """The paired test, if every prompt with an answer has a score then and now."""
    scored = [(p.score_golden, p.score_now) for p in result.prompts if p.score_golden is not None]
    complete = all(now is not None for _, now in scored) and len(result.prompts) == result.size and result.compared
    if not scored or not complete or any(p.verdict in (Verdict.ERROR, Verdict.MISSING) for p in result.prompts):
        return None
    return accuracy.paired_test([bool(a) for a, _ in scored], [bool(b) for _, b in scored], result.thresholds.alpha)


def _accuracy_check(result: SuiteResult, test: accuracy.PairedTest | None) -> Check:
    if test is None:
        why = "no prompt has an answer to score"
        if len(result.prompts) < result.size:
            why = "only a part of the suite was selected"
        elif any(p.score_golden is not None and p.score_now is None for p in result.prompts):
            why = "prompts that differ were only replayed, not generated (--repro-method auto or decode generates them)"
        return Check("accuracy", "skip", f"accuracy not judged: {why}")
    power = "no drop" if test.smallest_drop is None else f"a drop of {test.smallest_drop:.1f} points"
    message = (
        f"{test.golden:.1f} % -> {test.now:.1f} %   {test.lost} lost, {test.gained} gained, p = {test.p_value:.2g}; "
        f"{test.n} prompts can show {power}"
    )
    failed = test.fails(result.thresholds.accuracy_drop, result.thresholds.alpha)
    return Check("accuracy", "fail" if failed else "pass", message)


def _length_check(result: SuiteResult, view: _View) -> Check:
    ratio = _length_ratio(result, view)
    if ratio is None:
        return Check("length", "skip", "length not judged: not every prompt was generated")
    low, high = result.thresholds.length_ratio
    status = "pass" if low <= ratio <= high else "fail"
    return Check("length", status, f"mean output length is {ratio:.3f} of the golden's, allowed {low} to {high}")


def _length_ratio(result: SuiteResult, view: _View) -> float | None:
    if len(result.prompts) != result.size or any(p.method == "" for p in result.prompts):
        return None
    pairs = [view.lengths(p.id, p.divergence_index is None) for p in result.prompts]
    if any(pair is None for pair in pairs) or not pairs:
        return None
    then, now = (sum(pair[k] for pair in pairs if pair) for k in (0, 1))
    return now / then if then else None


def _metrics(result: SuiteResult, test: accuracy.PairedTest | None, view: _View) -> dict[str, float | int | None]:
    """Names as in arXiv 2506.09501 (§3.1, App. E) where it has them."""
    counts = result.counts
    parted = [p.divergence_index for p in result.prompts if p.divergence_index is not None]
    moved = [p.mean_abs_dlogp for p in result.prompts if p.mean_abs_dlogp is not None]
    compared = sum(p.method != "" for p in result.prompts)
    return {
        "divergent": counts.get(Verdict.NEAR_TIE, 0) + counts.get(Verdict.DRIFT, 0),
        "unexplained": counts.get(Verdict.DRIFT, 0),
        "waived": counts.get(Verdict.WAIVED, 0),
        "div_percent": 100 * len(parted) / compared if compared else None,
        "mean_div_index": float(np.mean(parted)) if parted else None,
        "mean_abs_dlogp": float(np.mean(moved)) if moved else None,
        "benign_abs_dlogp": view.golden.noise.mean_abs_dlogp,
        "accuracy_golden": test.golden if test else view.golden.accuracy,
        "accuracy_now": test.now if test else None,
        "accuracy_p_value": test.p_value if test else None,
        "accuracy_smallest_drop": test.smallest_drop if test else None,
        "length_ratio": _length_ratio(result, view),
    }


def _next_steps(result: SuiteResult) -> tuple[tuple[str, str], ...]:
    if result.passed:
        return ()
    steps = []
    counts = result.counts
    fp32 = (result.observed or {}).get("compute_class") == "fp32"
    if counts.get(Verdict.NEAR_TIE) and not fp32:
        steps.append(
            (
                f"pytest --repro-check {result.path} --repro-numerics fp32",
                "FP32 (or LayerCast) removes what is only rounding",
            )
        )
    if any(c.field == "model.weights" for c in result.environment_diff) and counts.get(Verdict.INCOMPARABLE):
        steps.append(
            (
                f"pytest --repro-check {result.path} --repro-allow-changed model",
                "if another model is meant to be compared",
            )
        )
    if (
        any(c.name == "golden" and c.status == "fail" for c in result.checks)
        and (result.golden or {}).get("review") is None
    ):
        steps.append((f"pytest-repro review {result.path}", "if its golden was accepted by nobody"))
    if (
        counts.get(Verdict.DRIFT)
        or counts.get(Verdict.NEAR_TIE)
        or counts.get(Verdict.MISSING)
        or counts.get(Verdict.INCOMPARABLE)
    ):
        steps.append((f"pytest --repro-update {result.path}", "if it is meant; then pytest-repro review"))
    return tuple(steps)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
