"""The checks of a whole suite (golden, compute, accuracy, length), its metrics, and what to do next. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from shlex import join, split

import numpy as np

from . import knobs
from .accuracy import PairedTest, paired_test
from .comparison import finite
from .noise import EXACT
from .result import Check, SuiteResult
from .rounding import RoundingTest, of_precision, rounding_test
from .suite import MOVED
from .verdict import Verdict

IN_A_SHARD = "over the whole suite only: pytest-repro merge --report OUT.json, with the reports of all shards"


def summed_up(result: SuiteResult) -> SuiteResult:
    """The judged prompts with the suite's checks, metrics and next steps added."""
    test = _paired(result)
    moved = _moved(result)
    ratio = _length_ratio(result)
    checks = (
        _golden(result), _compute(result), _rounding(result, moved), _accuracy(result, test), _length(result, ratio)
    )  # fmt: skip
    result = replace(result, checks=checks, metrics=_metrics(result, test, moved, ratio))
    return replace(result, next_steps=_next_steps(result))


def _golden(result: SuiteResult) -> Check:
    assert result.golden is not None
    name, review = result.golden["name"], result.golden["review"]
    if review is None:
        return Check("golden", "fail", f"{name}.golden was never reviewed: pytest-repro review {result.path}")
    barred = [c for c in result.environment_diff if c.cls == "identity"]
    if barred and any(p.verdict == Verdict.INCOMPARABLE for p in result.prompts):
        return Check(
            "golden",
            "fail",
            f"{name}.golden answers another question: {', '.join(c.field for c in barred)} differ",
        )
    return Check("golden", "pass", f"{name}.golden, accepted by {review['by']}")


def _compute(result: SuiteResult) -> Check:
    """What was asked for is what the probe saw; and whether that lets the waiver apply."""
    observed = result.observed or {}
    found, detail = observed.get("compute_class"), observed.get("detail")
    if found == "unknown":
        return Check("compute", "skip", f"{result.numerics} is only claimed: {detail}\n{_waiver(result)}")
    bits = f"{observed.get('product_bits')} product bits, {observed.get('sum_bits')} sum bits ({detail})"
    if result.claimed in (None, found):
        return Check("compute", "pass", f"observed {found}: {bits}\n{_waiver(result)}")
    asked = result.numerics if result.numerics == result.claimed else f"{result.numerics}, which is {result.claimed},"
    return Check("compute", "fail", f"{asked} was asked for, but the probe found {found}: {bits}\n{_waiver(result)}")


def _waiver(result: SuiteResult) -> str:
    """What the waiver did, or would have done: in every report, whatever its setting."""
    policy = f"fp32_waiver = {result.thresholds.fp32_waiver}"
    if (result.observed or {}).get("compute_class") != "fp32":
        return f"{policy} does not apply: FP32-class compute was not observed"
    return f"{policy}: {result.counts.get(Verdict.WAIVED, 0)} waived"


def _moved(result: SuiteResult) -> dict[str, RoundingTest]:
    """Tests of the whole suite by what was replayed and by what was decoded, as far as there is either."""
    assert result.golden is not None
    if result.shard is not None or _of_class(result) == EXACT:
        return {}
    compared = [p for p in result.prompts if p.method]
    changes = {"replayed": [p.mean_abs_dgap for p in compared], "decoded": [p.decoded_dgap for p in compared]}
    if result.settings.get("method") == "decode":
        del changes["replayed"]  # only what looked odd was: that says nothing of the rest
    levels = np.array([p.benign_dgap for p in compared], np.float64)
    compute_class = _of_class(result)
    variants = (result.envelope or {}).get("variants", ())
    found = {
        how: rounding_test(np.array(moved, np.float64), levels, compute_class, result.since_measured, variants)
        for how, moved in changes.items()
    }
    return {how: test for how, test in found.items() if test is not None}


def _rounding(result: SuiteResult, tests: Mapping[str, RoundingTest]) -> Check:
    if not tests:
        why = "the golden, or this engine, knows no gaps between tokens"
        if result.shard is not None:
            why = IN_A_SHARD
        elif _of_class(result) == EXACT:
            why = "exact compute does not round, and every number is compared bit for bit"
        elif not any(p.method for p in result.prompts):
            why = "nothing was compared"
        return Check("rounding", "skip", f"not judged: {why}")
    alpha = result.thresholds.alpha / len(tests)  # Bonferroni: either may fail the suite
    how, test = _clearest(tests)
    seen = f"gaps moved {test.ratio:.3g} times the benign level (median of {test.prompts} prompts, {how})"
    limit = f"{test.above} beyond {test.margin:g}, p = {test.p_value:.2g}"
    limit += "" if test.can_fail(alpha) else "; too few prompts to show more"
    limit += _whose(result, test, alpha)
    if not test.fails(alpha):
        can_tell = test.ratio <= test.margin or test.can_fail(alpha)
        found = "which is rounding" if can_tell else "which so few prompts cannot tell from rounding"
        return Check("rounding", "pass", f"{seen}, {found}: {limit}")
    if (result.observed or {}).get("compute_class") == "fp32" and result.thresholds.fp32_waiver == "all":
        return Check("rounding", "skip", f"waived by fp32_waiver = all: {seen}, {limit}")
    return Check("rounding", "fail", f"{seen}, more than rounding moves them: {limit}")


def _of_class(result: SuiteResult) -> str:
    """The compute class of the golden."""
    assert result.golden is not None
    return str(result.golden["name"]).partition("@")[0]


def _whose(result: SuiteResult, test: RoundingTest, alpha: float) -> str:
    """Where the margin comes from: a line, or nothing where the recording's envelope covers all that differs."""
    if not test.unmeasured:
        return f"\nrounding measured here by calibrate on {', '.join(result.calibrated)}" if result.calibrated else ""
    line = f"\n{test.margin:g} and not {test.usual:g}, since {_few(test.unmeasured)} differ: their rounding was not measured"
    if test.fails(alpha):
        return f"{line}, and calibrate takes no machine that moves so far"
    command = _calibrate(result)
    return f"{line}; to measure it: {command}" if command else line


def _clearest(tests: Mapping[str, RoundingTest]) -> tuple[str, RoundingTest]:
    """The test that says most against rounding; the replay's where they say the same."""
    return min(tests.items(), key=lambda item: (item[1].ratio <= item[1].margin, item[1].p_value))


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _paired(result: SuiteResult) -> PairedTest | None:
    """The paired test, if every prompt with an answer has a score then and now."""
    if result.shard is not None:
        return None
    scored = [(p.score_golden, p.score_now) for p in result.prompts if p.score_golden is not None]
    complete = all(now is not None for _, now in scored) and len(result.prompts) == result.size and result.compared
    if not scored or not complete or any(p.verdict in (Verdict.ERROR, Verdict.MISSING) for p in result.prompts):
        return None
    return paired_test([bool(a) for a, _ in scored], [bool(b) for _, b in scored], result.thresholds.alpha)


def _accuracy(result: SuiteResult, test: PairedTest | None) -> Check:
    if test is None:
        why = "no prompt has an answer to score"
        if result.shard is not None:
            why = IN_A_SHARD
        elif result.counts.get(Verdict.ERROR) or result.counts.get(Verdict.MISSING):
            why = "not every prompt could be answered"
        elif len(result.prompts) < result.size:
            why = "only a part of the suite was selected"
        elif any(p.score_golden is not None and p.score_now is None for p in result.prompts):
            why = "prompts that differ were only replayed, not generated (--repro-method auto or decode generates them)"
        return Check("accuracy", "skip", f"not judged: {why}")
    power = "are too few to show a drop"
    if test.smallest_drop is not None:
        power = f"can show a drop of {test.smallest_drop:.1f} points"
    message = (
        f"{test.golden:.1f} % -> {test.now:.1f} %   {test.lost} lost, {test.gained} gained, p = {test.p_value:.2g}; "
        f"{test.n} prompts {power}"
    )
    failed = test.fails(result.thresholds.accuracy_drop, result.thresholds.alpha)
    return Check("accuracy", "fail" if failed else "pass", message)


def _length(result: SuiteResult, ratio: float | None) -> Check:
    if ratio is None:
        why = IN_A_SHARD if result.shard is not None else "not every prompt was generated"
        return Check("length", "skip", f"not judged: {why}")
    low, high = result.thresholds.length_ratio
    status = "pass" if low <= ratio <= high else "fail"
    return Check("length", status, f"mean output length is {ratio:.3f} of the golden's, allowed {low} to {high}")


def _length_ratio(result: SuiteResult) -> float | None:
    if result.shard is not None or len(result.prompts) != result.size or any(p.method == "" for p in result.prompts):
        return None
    then, now = [p.tokens for p in result.prompts], [p.tokens_now for p in result.prompts]
    if None in now or not sum(n or 0 for n in then):
        return None
    return sum(n or 0 for n in now) / sum(n or 0 for n in then)


def _metrics(
    result: SuiteResult, test: PairedTest | None, moved: Mapping[str, RoundingTest], ratio: float | None
) -> dict[str, float | int | None]:
    """Names as in arXiv 2506.09501 (§3.1, App. E) where it has them."""
    assert result.golden is not None
    counts, golden = result.counts, result.golden
    parted = [p.divergence_index for p in result.prompts if p.divergence_index is not None]
    dlogp = [p.mean_abs_dlogp for p in result.prompts if p.mean_abs_dlogp is not None]
    compared = sum(p.method != "" for p in result.prompts)
    clearest = _clearest(moved)[1] if moved else None
    return {
        "divergent": counts.get(Verdict.NEAR_TIE, 0) + counts.get(Verdict.DRIFT, 0),
        "unexplained": counts.get(Verdict.DRIFT, 0),
        "waived": counts.get(Verdict.WAIVED, 0),
        "div_percent": 100 * len(parted) / compared if compared else None,
        "mean_div_index": float(np.mean(parted)) if parted else None,
        "mean_abs_dlogp": float(np.mean(dlogp)) if dlogp else None,
        "benign_abs_dlogp": golden["mean_abs_dlogp"],
        "rounding_ratio": finite(clearest.ratio) if clearest else None,
        "rounding_p_value": finite(clearest.p_value) if clearest else None,
        "accuracy_golden": test.golden if test else golden["accuracy"],
        "accuracy_now": test.now if test else None,
        "accuracy_p_value": test.p_value if test else None,
        "accuracy_smallest_drop": test.smallest_drop if test else None,
        "length_ratio": ratio,
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
                f"pytest --repro-check {result.again} --repro-numerics fp32",
                "FP32 (or LayerCast) removes what is only rounding",
            )
        )
    if command := _bisect(result):
        steps.append((command, "which difference of the environment did it"))
    if any(c.field == "model.weights" for c in result.environment_diff) and counts.get(Verdict.INCOMPARABLE):
        steps.append(
            (
                f"pytest --repro-check {result.again} --repro-numerics {result.numerics} --repro-allow-changed model",
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
        or any(c.name in MOVED and c.status == "fail" for c in result.checks)
    ):
        record = f"pytest --repro-update {result.again} --repro-numerics {result.numerics}"
        steps.append((record, "if it is meant; then pytest-repro review"))
    return tuple(steps)


def _bisect(result: SuiteResult) -> str:
    """The command that undoes what differs, run as this check was; empty where there is nothing for it to undo."""
    changes = result.environment_diff
    parted = any(p.divergence_index is not None for p in result.prompts)
    if not parted or any(c.cls == "identity" for c in changes) or not knobs.can_be_undone(changes):
        return ""
    return _command("bisect", result, hands_on=True)


def _calibrate(result: SuiteResult) -> str:
    """The command that measures this machine's rounding; empty where it would refuse to."""
    changes = result.environment_diff
    barred = any(c.cls == "identity" for c in changes) or of_precision(changes)
    return "" if barred or result.shard is not None else _command("calibrate", result)


def _command(verb: str, result: SuiteResult, hands_on: bool = False) -> str:
    """A command of this package, run as this check was; empty where it cannot be.

    Args:
        verb: `bisect` or `calibrate`, which have options of the same names.
        result: of the check.
        hands_on: whether the command hands options that are none of its own on to pytest.
    """
    try:
        where, *given = split(result.again) or [result.path]
    except ValueError:  # a report that was tampered with: it names no command
        return ""
    own, others = [], []
    while given:
        word, *given = given
        if word in knobs.OPTIONS and given:
            value, *given = given
            own += [knobs.OPTIONS[word], value]
        else:
            others.append(word)
    of_a_test = "::" in result.again
    if of_a_test or (others and not hands_on):
        return ""
    command = ["pytest-repro", verb, where, "--numerics", result.numerics, *own]
    return join([*command, "--", *others] if others else command)
