"""The verdict: a pure function of evidence, envelope and policy (DESIGN section 4).

Rounding explains a difference when all hold:

* the tail: the golden token's largest deficit lies within the largest change of a gap that benign changes made;
* the bulk: the prompt's mean |Δlogp| is not several times its benign level, so that the whole text is as near to the
  golden as rounding leaves it. A text whose every token moved tenfold is drift, even if no token flipped;
* the choice: the token that was chosen instead is the likeliest now, and something had moved when it was chosen.

Of an exact golden rounding explains nothing: a prompt whose every number has the golden's bits is identical, any other drifts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from .suite import Thresholds, Waiver


class Verdict(StrEnum):
    """What became of one prompt."""

    IDENTICAL = "identical"
    NEAR_TIE = "near_tie"
    """Differs; rounding explains it."""
    DRIFT = "drift"
    """Differs; rounding cannot explain it."""
    WAIVED = "waived"
    """Would count, but FP32-class compute was observed, and the waiver covers it."""
    MISSING = "missing"
    """The golden has no such prompt, or there is no golden."""
    INCOMPARABLE = "incomparable"
    """The golden answers another question: an identity field differs."""
    ERROR = "error"
    """The harness failed, not the model's output."""


WORST_FIRST = (
    Verdict.ERROR, Verdict.INCOMPARABLE, Verdict.MISSING, Verdict.DRIFT, Verdict.NEAR_TIE, Verdict.WAIVED, Verdict.IDENTICAL,
)  # fmt: skip
ALWAYS_FAIL = frozenset({Verdict.ERROR, Verdict.INCOMPARABLE, Verdict.MISSING})


@dataclass(frozen=True)
class Evidence:
    """What was seen of one prompt."""

    differs: bool
    """Its output differs, or would (replay)."""
    deficit: float
    """Largest deficit, nats; inf if it cannot be known."""
    mean_abs_dlogp: float
    """Nats; NaN if the engine gives no log-probabilities."""
    envelope_deficit: float
    """Largest deficit that rounding explains, nats."""
    level: float
    """The prompt's benign mean |Δlogp|, nats."""
    ratio: float
    """How many times `level` is still benign."""
    other_bits: int | None = None
    """Tokens whose numbers have other bits than an exact golden's; None for any other golden."""
    passed_over: float = 0.0
    """How much likelier another token was than the one that was decoded at the divergence, nats."""
    unmoved: bool = False
    """Another token was decoded from the recording's own numbers, bit for bit."""

    @property
    def moved(self) -> float:
        """Mean |Δlogp| in units of the benign level; NaN if unknown, inf if the benign level is zero and it moved."""
        if math.isnan(self.mean_abs_dlogp) or math.isnan(self.level):
            return math.nan
        if self.level > 0:
            return self.mean_abs_dlogp / self.level
        return math.inf if self.mean_abs_dlogp > 0 else 0.0

    @property
    def bulk_outside(self) -> bool:
        """The whole text moved more than rounding moves it."""
        return self.moved > self.ratio

    @property
    def tail_outside(self) -> bool:
        """A token flipped by more than rounding changes a gap."""
        return self.differs and not self.deficit <= self.envelope_deficit


@dataclass(frozen=True)
class Judgement:
    """A verdict with its reason, one clause for a person."""

    verdict: Verdict
    reason: str = ""


def judge(seen: Evidence, waiver: Waiver, fp32_observed: bool) -> Judgement:
    """The verdict on one compared prompt.

    Args:
        seen: the evidence.
        waiver: the policy, `Thresholds.fp32_waiver`.
        fp32_observed: whether the probe found FP32-class products and sums in the process that holds the model.
    """
    if seen.other_bits is not None:
        return _judge_bits(seen, seen.other_bits)
    if not seen.differs and not seen.bulk_outside:
        return Judgement(Verdict.IDENTICAL)
    reasons = _why_not_rounding(seen)
    if not reasons:
        if fp32_observed and waiver != "none":
            return Judgement(Verdict.WAIVED, "rounding explains it, and FP32-class compute was observed")
        return Judgement(Verdict.NEAR_TIE, "rounding explains it")
    if fp32_observed and waiver == "all":
        return Judgement(Verdict.WAIVED, f"waived by fp32_waiver = all, although {' and '.join(reasons)}")
    return Judgement(Verdict.DRIFT, " and ".join(reasons))


def _judge_bits(seen: Evidence, other: int) -> Judgement:
    """Identical or drift: no policy waives what no rounding can have done."""
    if not seen.differs and not other:
        return Judgement(Verdict.IDENTICAL)
    reasons = ["another token is chosen"] if seen.differs else []
    if other:
        reasons.append(f"the numbers of {other} token{'s' if other > 1 else ''} have other bits")
    reasons += _why_not_greedy(seen)
    return Judgement(Verdict.DRIFT, f"{' and '.join(reasons)}, and exact compute does not round")


def _why_not_rounding(seen: Evidence) -> list[str]:
    reasons = []
    if seen.tail_outside:
        known = math.isfinite(seen.deficit)
        size = f"the deficit {seen.deficit:.2g} exceeds the envelope {seen.envelope_deficit:.2g}"
        reasons.append(size if known else "its deficit is unknown, so rounding cannot be shown")
    if seen.bulk_outside:
        reasons.append(f"every token moved: mean |Δlogp| is {seen.moved:.3g} times the benign level {seen.level:.2g}")
    return reasons + _why_not_greedy(seen)


def _why_not_greedy(seen: Evidence) -> list[str]:
    reasons = []
    if seen.passed_over > 0:
        reasons.append(
            f"a token likelier by {seen.passed_over:.2g} was passed over: the choice is not greedy (a sampler, a penalty)"
        )
    if seen.unmoved:
        reasons.append(
            "every number is the recording's, bit for bit: what differs is how a token is chosen (a sampler, how ties are broken)"
        )
    return reasons


def allowed(limit: int | float, prompts: int) -> float:
    """A limit as a number of prompts: an int is a count, a float a share of all the suite's prompts."""
    return limit if isinstance(limit, int) else round(limit * prompts, 9)  # 0.29 of 100 is 29, not 28.999...


_WAIVERS: tuple[Waiver, ...] = ("none", "explained", "all")


def loosened(then: Thresholds, now: Thresholds, prompts: int) -> list[str]:
    """What lets more pass now than then: `max_divergent 0 -> 2`, one a threshold.

    Args:
        then: what was in force.
        now: what is.
        prompts: how many the suite has: a count and a share are compared by what they allow.
    """
    low, high = (now.length_ratio[0] < then.length_ratio[0], now.length_ratio[1] > then.length_ratio[1])
    looser = {
        "max_divergent": allowed(now.max_divergent, prompts) > allowed(then.max_divergent, prompts),
        "max_unexplained": allowed(now.max_unexplained, prompts) > allowed(then.max_unexplained, prompts),
        "accuracy_drop": now.accuracy_drop > then.accuracy_drop,
        "alpha": now.alpha < then.alpha,  # a drop fails where its p-value is no larger than alpha
        "length_ratio": low or high,
        "fp32_waiver": _WAIVERS.index(now.fp32_waiver) > _WAIVERS.index(then.fp32_waiver),
    }
    return [
        f"{name} {_toml(getattr(then, name))} -> {_toml(getattr(now, name))}" for name, is_so in looser.items() if is_so
    ]


def _toml(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)


@dataclass(frozen=True)
class Failure:
    """One reason why a suite fails, and the verdicts that carry it."""

    rule: str
    """E.g. `divergent 3 > max_divergent 0`."""
    verdicts: frozenset[Verdict]


def failures(counts: Mapping[Verdict, int], thresholds: Thresholds, prompts: int) -> list[Failure]:
    """Which rules on prompts fail: verdicts that always do, `max_divergent`, `max_unexplained`.

    Args:
        counts: verdict -> prompts.
        thresholds: of this compute class.
        prompts: how many the suite has, whatever subset was selected.
    """
    found = [
        Failure(f"{counts[verdict]} {verdict}", frozenset({verdict}))
        for verdict in WORST_FIRST
        if verdict in ALWAYS_FAIL and counts.get(verdict)
    ]
    drift = counts.get(Verdict.DRIFT, 0)
    divergent = drift + counts.get(Verdict.NEAR_TIE, 0)
    if drift > allowed(thresholds.max_unexplained, prompts):
        rule = f"unexplained {drift} > max_unexplained {thresholds.max_unexplained}"
        found.append(Failure(rule, frozenset({Verdict.DRIFT})))
    if divergent > allowed(thresholds.max_divergent, prompts):
        rule = f"divergent {divergent} > max_divergent {thresholds.max_divergent}"
        found.append(Failure(rule, frozenset({Verdict.DRIFT, Verdict.NEAR_TIE})))
    return found
