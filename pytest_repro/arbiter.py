"""The arbiter: a 16-bit golden and a 16-bit candidate, both beside the FP32 answer of the model that is loaded now.

Rounding scatters around the FP32 answer. Golden and candidate were each rounded once, so both lie about equally far from
it where only rounding parts them. Where one of the two lies farther, something else did: the candidate's kernels if it is
the candidate, the weights or what leads up to them if it is the golden. Distances are |log-probability of the golden's
token, less the FP32 one|, token by token, and the two are compared as pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from .generation import Generation, Scores

Floats = NDArray[np.float64]

FARTHER = 1.5
"""One distance is farther when it is, on average, this many times the other..."""
ALPHA = 0.01
"""...and Wilcoxon's signed-rank test over the tokens finds the same at this level. docs/decisions/0006-arbiter.md."""


class Finding(StrEnum):
    """What the FP32 answer says of one drifting prompt."""

    ROUNDING = "rounding"
    """Golden and candidate lie equally near."""
    CANDIDATE = "candidate"
    """The candidate lies farther: its 16-bit compute does more than round."""
    GOLDEN = "golden"
    """The golden lies farther: it was recorded from other weights, or another model around them."""
    UNDECIDED = "undecided"
    """One lies farther on average, but over too few tokens, or too unevenly, to tell."""


@dataclass(frozen=True)
class Arbitration:
    """One prompt beside the FP32 answer; distances in nats."""

    finding: Finding
    golden_distance: float
    """Mean |Δlogp| of the golden's tokens between the recording and the FP32 answer."""
    candidate_distance: float
    """The same for the candidate."""
    p_value: float
    """Of Wilcoxon's signed-rank test, two-sided."""


def arbitrate(
    golden: Generation, candidate: Mapping[str, Scores], fp32: Mapping[str, Scores]
) -> dict[str, Arbitration]:
    """Every prompt that was replayed both in 16 bits and in FP32.

    Args:
        golden: what was recorded.
        candidate: replays in the numerics that were checked, by prompt id.
        fp32: replays of the same tokens with the same weights under FP32-class compute.
    """
    place = golden.index()
    found = {}
    for name, reference in fp32.items():
        if reference.error or name not in candidate or candidate[name].error:
            continue
        columns = np.stack([golden.logprob[golden.span(place[name])], candidate[name].logprob, reference.logprob])
        finite = columns[:, np.isfinite(columns).all(axis=0)].astype(np.float64)
        if finite.shape[1]:
            found[name] = _one(*finite)
    return found


def _one(golden: Floats, candidate: Floats, fp32: Floats) -> Arbitration:
    from scipy.stats import wilcoxon  # a second to import: only where there is drift

    theirs, ours = np.abs(golden - fp32), np.abs(candidate - fp32)
    mean_golden, mean_candidate = float(theirs.mean()), float(ours.mean())
    differ = theirs != ours
    p_value = float(wilcoxon(ours[differ], theirs[differ]).pvalue) if differ.any() else 1.0
    near, far = sorted((mean_golden, mean_candidate))
    if far <= FARTHER * near:
        finding = Finding.ROUNDING
    elif p_value > ALPHA:
        finding = Finding.UNDECIDED
    else:
        finding = Finding.CANDIDATE if far == mean_candidate else Finding.GOLDEN
    return Arbitration(finding, mean_golden, mean_candidate, p_value)
