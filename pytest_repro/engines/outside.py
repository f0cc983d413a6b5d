"""What log-probabilities tell of the logits behind them: for engines that answer from behind a wall.

Within one step, the difference of two log-probabilities is the difference of two logits. Logits that were rounded to 16
bits lie on a grid, a power of two as coarse as their magnitude has it (bf16 has 8 significant bits: 1/16 for logits
between 8 and 16), and so do their differences, to the rounding of the log-probabilities themselves. FP32 logits do not.
One way only: a grid shows 16-bit logits, and none shows nothing, since a server may compute in 16 bits and round no logit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FINEST = 2.0**-9
"""The finest grid that is looked for: bf16 logits of at least 1/4, fp16 logits of at least 2."""
COARSEST = 2.0**3
DEEPEST = -16.0
"""Log-probabilities below it are left out: float32 is too coarse there."""
ROUNDING = 2.0**-19
"""Twice the most by which float32 moves a difference of two log-probabilities above `DEEPEST`."""
ENOUGH = 6
"""Distinct differences that must lie on the grid. One of a smooth distribution does with a chance of 2 * ROUNDING / FINEST
= 2**-9, six of one step with 2**-54: in a million steps of FP32 logits, fewer than one false alarm in ten billion."""

MANY = 0.25
"""Share of steps that speak against bf16: logits on both sides of zero and near it can make a bf16 step look wider."""


@dataclass(frozen=True)
class Grid:
    """What steps on a 16-bit grid tell."""

    compute_class: str
    """bf16, or fp16 where many steps need more than 8 significant bits; fp16 logits of 64 and more can pass for bf16."""
    step: float
    """The grid of the first such step."""
    found: int
    """Steps on a grid."""
    seen: int
    """Steps that were looked at."""


def grid(rows: Iterable[Sequence[float]]) -> Grid | None:
    """Whether the logits were rounded to 16 bits.

    Args:
        rows: the best log-probabilities of each step, natural logarithms as a server gave them; 7 to 20 of them.

    Returns:
        None if nothing is shown.
    """
    looked = [_on_grid(np.asarray(row, np.float64)) for row in rows]
    found = [row for row in looked if row is not None]
    if not found:
        return None
    wider = sum(_wider_than_bf16(multiples) for _, multiples in found)
    return Grid("fp16" if wider > MANY * len(found) else "bf16", found[0][0], len(found), len(looked))


def _on_grid(row: NDArray[np.float64]) -> tuple[float, NDArray[np.int64]] | None:
    """(the coarsest grid that all of a step's differences lie on, the differences as multiples of it)."""
    kept = row[np.isfinite(row) & (row > DEEPEST)]
    if len(kept) <= ENOUGH:
        return None
    below = kept.max() - kept
    step = COARSEST
    while step >= FINEST:
        multiples = np.rint(below / step)
        if (np.abs(below - multiples * step) <= ROUNDING).all():
            distinct = np.unique(multiples).astype(np.int64)
            return (step, distinct) if len(distinct) > ENOUGH else None
        step /= 2
    return None


def _wider_than_bf16(multiples: NDArray[np.int64]) -> bool:
    """Whether logits on a grid cannot have 8 significant bits, wherever zero lies.

    With 8 bits the odd multiples of the finest grid lie in one binade, less than 128 steps wide; or in two, on both sides
    of zero, and then no logit is nearer to zero than 128 steps. Which of the two parities is the odd one cannot be seen.
    """
    across_zero = len(multiples) > 1 and np.diff(multiples).max() >= 256
    binade = 512 if across_zero else 128
    return all(_spread(multiples[multiples % 2 == parity]) >= binade for parity in (0, 1))


def _spread(values: NDArray[np.int64]) -> int:
    return int(values.max() - values.min()) if len(values) else 0
