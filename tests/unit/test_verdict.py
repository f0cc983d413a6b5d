from __future__ import annotations

import math
from typing import Any

import pytest

from pytest_repro.suite import Thresholds
from pytest_repro.verdict import Evidence, Failure, Verdict, allowed, failures, judge

S, N, D, W = Verdict.IDENTICAL, Verdict.NEAR_TIE, Verdict.DRIFT, Verdict.WAIVED

# Columns: without FP32 observed under waivers explained, all, none; then with FP32 observed under the same three.
POLICIES = [(fp32, waiver) for fp32 in (False, True) for waiver in ("explained", "all", "none")]
TABLE = {
    #                                   not observed | observed
    ("same", "tail-in", "bulk-in"): (S, S, S, S, S, S),
    ("same", "tail-out", "bulk-in"): (S, S, S, S, S, S),  # no token flipped: no deficit to judge
    ("same", "tail-in", "bulk-out"): (D, D, D, D, W, D),  # every token moved, although none flipped
    ("same", "tail-out", "bulk-out"): (D, D, D, D, W, D),
    ("differs", "tail-in", "bulk-in"): (N, N, N, W, W, N),
    ("differs", "tail-out", "bulk-in"): (D, D, D, D, W, D),
    ("differs", "tail-in", "bulk-out"): (D, D, D, D, W, D),
    ("differs", "tail-out", "bulk-out"): (D, D, D, D, W, D),
}
CASES = [
    pytest.param(*case, waiver, fp32, wanted, id="-".join([*case, waiver, "fp32" if fp32 else "16bit"]))
    for case, row in TABLE.items()
    for (fp32, waiver), wanted in zip(POLICIES, row, strict=True)
]


def evidence(differs: bool = True, deficit: float = 0.125, moved: float = 0.5, **more: Any) -> Evidence:
    """Envelope 0.25 nats, benign level 0.5, twice of which is still benign."""
    return Evidence(differs, deficit, moved, **{"envelope_deficit": 0.25, "level": 0.5, "ratio": 2.0, **more})


@pytest.mark.parametrize(("differs", "tail", "bulk", "waiver", "fp32", "wanted"), CASES)
def test_judge(differs: str, tail: str, bulk: str, waiver: str, fp32: bool, wanted: Verdict) -> None:
    seen = evidence(
        differs == "differs", deficit=0.5 if tail == "tail-out" else 0.125, moved=1.5 if bulk == "bulk-out" else 0.5
    )
    assert judge(seen, waiver, fp32).verdict == wanted


@pytest.mark.parametrize(
    ("seen", "wanted"),
    [
        pytest.param(evidence(deficit=0.25), N, id="deficit-on-the-envelope"),
        pytest.param(evidence(deficit=math.nextafter(0.25, 1)), D, id="deficit-a-hair-outside"),
        pytest.param(evidence(deficit=0.0), N, id="a-tie"),
        pytest.param(evidence(deficit=math.inf), D, id="deficit-unknown"),
        pytest.param(evidence(deficit=math.nan), D, id="deficit-nan"),
        pytest.param(evidence(deficit=0.0, envelope_deficit=0.0), N, id="a-tie-without-envelope"),
        pytest.param(evidence(deficit=0.125, envelope_deficit=0.0), D, id="without-envelope"),
        pytest.param(evidence(moved=1.0), N, id="bulk-at-its-ratio"),
        pytest.param(evidence(moved=math.nextafter(1.0, 2)), D, id="bulk-a-hair-outside"),
        pytest.param(evidence(moved=math.nan), N, id="bulk-unknown"),
        pytest.param(evidence(False, moved=math.nan), S, id="same-and-bulk-unknown"),
        pytest.param(evidence(False, moved=0.0, level=0.0), S, id="no-noise-and-none-seen"),
        pytest.param(evidence(False, moved=1e-9, level=0.0), D, id="no-noise-yet-it-moved"),
    ],
)
def test_judge_at_the_borders(seen: Evidence, wanted: Verdict) -> None:
    assert judge(seen, "explained", False).verdict == wanted


def test_the_reason_names_what_is_outside_and_by_how_much() -> None:
    both = judge(evidence(deficit=0.5, moved=1.5), "explained", False).reason
    assert "deficit 0.5 exceeds the envelope 0.25" in both and "3 times the benign level 0.5" in both
    assert "unknown" in judge(evidence(deficit=math.inf), "explained", False).reason
    tail_only = judge(evidence(deficit=0.5), "explained", False).reason
    assert "deficit" in tail_only and "every token moved" not in tail_only
    assert "fp32_waiver = all" in judge(evidence(deficit=0.5), "all", True).reason
    assert judge(evidence(False), "explained", False).reason == ""


@pytest.mark.parametrize(
    ("limit", "prompts", "wanted"),
    [(0, 32, 0), (1, 32, 1), (1.0, 32, 32), (0.5, 32, 16), (0.0, 32, 0), (3, 2, 3)],
    ids=["count-0", "count-1", "all", "half", "none", "more-than-there-are"],
)
def test_an_int_is_a_count_and_a_float_a_share(limit: float, prompts: int, wanted: float) -> None:
    assert allowed(limit, prompts) == wanted


# Rules that fail, worst first, by name: E error, C incomparable, M missing, u unexplained, d divergent.
FAILURES = [
    ({S: 10}, 0, 0, ""),
    ({}, 0, 0, ""),
    ({N: 1}, 0, 0, "d"),
    ({N: 1}, 1, 0, ""),
    ({N: 2}, 1, 0, "d"),
    ({D: 1}, 0, 0, "ud"),
    ({D: 1}, 1, 0, "u"),
    ({D: 1}, 0, 1, "d"),
    ({D: 1}, 1, 1, ""),
    ({N: 1, D: 1}, 1, 1, "d"),
    ({N: 9, D: 1}, 1.0, 0, "u"),
    ({N: 10}, 1.0, 0, ""),
    ({N: 5}, 0.5, 0, ""),
    ({N: 6}, 0.5, 0, "d"),
    ({N: 1}, 0.0, 0.0, "d"),
    ({W: 10}, 0, 0, ""),
    ({Verdict.MISSING: 1}, 1.0, 1.0, "M"),
    ({Verdict.INCOMPARABLE: 1}, 1.0, 1.0, "C"),
    ({Verdict.ERROR: 1}, 1.0, 1.0, "E"),
    ({Verdict.MISSING: 1, Verdict.INCOMPARABLE: 1, Verdict.ERROR: 1, D: 1, N: 1}, 0, 0, "ECMud"),
]
LETTERS = {
    "E": {Verdict.ERROR},
    "C": {Verdict.INCOMPARABLE},
    "M": {Verdict.MISSING},
    "u": {D},
    "d": {D, N},
}


@pytest.mark.parametrize(
    ("counts", "max_divergent", "max_unexplained", "wanted"),
    FAILURES,
    ids=["+".join(f"{n}{v}" for v, n in c.items()) + f"-limits-{d}-{u}" for c, d, u, _ in FAILURES],
)
def test_failures(counts: dict[Verdict, int], max_divergent: float, max_unexplained: float, wanted: str) -> None:
    found = failures(counts, Thresholds(max_divergent, max_unexplained), 10)
    assert [set(f.verdicts) for f in found] == [LETTERS[letter] for letter in wanted]


def test_a_failure_quotes_count_and_limit() -> None:
    found = failures({N: 2, D: 1}, Thresholds(max_divergent=2, max_unexplained=0), 10)
    assert found == [
        Failure("unexplained 1 > max_unexplained 0", frozenset({D})),
        Failure("divergent 3 > max_divergent 2", frozenset({D, N})),
    ]


def test_a_share_allows_exactly_that_share() -> None:
    """0.29 of 100 prompts are 29 prompts, whatever 0.29 * 100 is in floating point."""
    limits = {percent: Thresholds(max_divergent=percent / 100) for percent in range(1, 100)}
    assert [p for p, limit in limits.items() if failures({N: p}, limit, 100)] == []
    assert [p for p, limit in limits.items() if not failures({N: p + 1}, limit, 100)] == []


@pytest.mark.parametrize("waiver", ["none", "explained", "all"])
@pytest.mark.parametrize("fp32", [False, True])
@pytest.mark.parametrize(
    ("differs", "other_bits", "wanted"),
    [(False, 0, S), (False, 1, D), (True, 0, D), (True, 7, D)],
    ids=["the-same-bits", "one-token's-bits", "a-flip-at-a-tie", "both"],
)
def test_an_exact_golden_knows_identical_and_drift_alone(
    waiver: str, fp32: bool, differs: bool, other_bits: int, wanted: Verdict
) -> None:
    """Whatever would explain it of another golden: a deficit inside the envelope, a bulk inside its ratio, a waiver."""
    assert judge(evidence(differs, other_bits=other_bits), waiver, fp32).verdict == wanted


def test_the_reason_of_an_exact_drift_counts_the_tokens() -> None:
    assert "the numbers of 1 token have other bits" in judge(evidence(False, other_bits=1), "all", True).reason
    both = judge(evidence(other_bits=3), "all", True).reason
    assert "another token is chosen and the numbers of 3 tokens have other bits" in both
