"""How far the outputs of one model lie apart over configurations: the measures of Yuan et al., arXiv 2506.09501, §3.1 and App. E.

A configuration (the paper: GPU type, GPU count, batch size) answers every prompt once, greedily. All standard deviations are
sample standard deviations over the configurations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .generation import Tokens

Reals = NDArray[np.float64]


@dataclass(frozen=True)
class Answer:
    """One prompt's greedy output of T tokens under one configuration."""

    tokens: Tokens
    """Shape (T,)."""
    top1_prob: Reals
    """Probability of each chosen token, which greedy decoding chose as the likeliest; shape (T,), NaN where unknown."""
    right: bool | None = None
    """Whether it is the right answer; None for a prompt that has none."""


Run = Sequence[Answer]
"""The answers of one configuration to all prompts, in the same order as every other configuration's."""


@dataclass(frozen=True)
class Dispersion:
    """The paper's measures over C configurations and P prompts."""

    configurations: int
    prompts: int
    diverging: int
    """Prompts whose outputs are not all the same."""
    mean_div_index: float | None
    """Div_Index, mean over the prompts that diverge; None if none does (the paper writes -1)."""
    std_acc: float | None
    """Std@Acc, in points of accuracy; None without right answers."""
    accuracy: float | None
    """Per cent, mean over the configurations."""
    std_length: float
    """Avg_Std@Output_Length, tokens."""
    std_top1_prob: float | None
    """Avg_Std@top1_prob; None where the engine does not tell probabilities, or the outputs share no position."""

    @property
    def div_percent(self) -> float:
        """Div_Percent: prompts that diverge, per cent."""
        return 100 * self.diverging / self.prompts


def divergence_index(outputs: Sequence[Tokens | Sequence[int]]) -> int | None:
    """Div_Index (§3.1): the first position at which not all outputs have the same token; None if they are all the same.

    An output that ends where another one goes on diverges at its end.
    """
    shortest = min(map(len, outputs))
    common = np.stack([np.asarray(o)[:shortest] for o in outputs])
    parted = np.flatnonzero((common != common[0]).any(axis=0))
    if len(parted):
        return int(parted[0])
    return shortest if any(len(o) != shortest for o in outputs) else None


def divergence_indexes(runs: Sequence[Run]) -> list[int | None]:
    """`divergence_index` of every prompt."""
    return [divergence_index([answer.tokens for answer in answers]) for answers in zip(*runs, strict=True)]


def accuracy(run: Run) -> float | None:
    """Per cent of the prompts with a right answer that one configuration got right; None if there are none."""
    scored = [answer.right for answer in run if answer.right is not None]
    return 100 * sum(scored) / len(scored) if scored else None


def dispersion(runs: Sequence[Run]) -> Dispersion:
    """The measures over the configurations of one precision.

    Args:
        runs: C >= 2 configurations, each with the answers to the same P >= 1 prompts.

    Raises:
        ValueError: fewer than two configurations, no prompt, or configurations of other prompts.
    """
    if len(runs) < 2 or not runs[0]:
        raise ValueError(
            f"a standard deviation over {len(runs)} configurations of {len(runs[0]) if runs else 0} prompts"
        )
    indexes = divergence_indexes(runs)
    parted = [index for index in indexes if index is not None]
    accuracies = [a for run in runs if (a := accuracy(run)) is not None]
    lengths = [np.std([len(a.tokens) for a in answers], ddof=1) for answers in zip(*runs, strict=True)]
    spread = np.concatenate([np.zeros(0), *top1_spread(runs)])
    return Dispersion(
        configurations=len(runs),
        prompts=len(indexes),
        diverging=len(parted),
        mean_div_index=float(np.mean(parted)) if parted else None,
        std_acc=float(np.std(accuracies, ddof=1)) if accuracies else None,
        accuracy=float(np.mean(accuracies)) if accuracies else None,
        std_length=float(np.mean(lengths)),
        std_top1_prob=float(np.mean(spread)) if len(spread) and not np.isnan(spread).any() else None,
    )


def top1_spread(runs: Sequence[Run]) -> list[Reals]:
    """Per prompt, the standard deviation of the top-1 token's probability at each position before Div_Index, shape (Div_Index,).

    Up to there all configurations have the same prefix, so that one token's probability is compared.
    """
    found = []
    for answers, index in zip(zip(*runs, strict=True), divergence_indexes(runs), strict=True):
        shared = len(answers[0].tokens) if index is None else index
        found.append(np.std(np.stack([a.top1_prob[:shared] for a in answers]), axis=0, ddof=1))
    return found


def diverged_by(runs: Sequence[Run]) -> Reals:
    """Per cent of prompts whose outputs have parted at or before each position, shape (longest output,)."""
    longest = max(len(answer.tokens) for run in runs for answer in run)
    indexes = np.array([longest if i is None else i for i in divergence_indexes(runs)])
    shares: Reals = 100 * (indexes[:, None] <= np.arange(longest)).mean(axis=0)
    return shares


def spread_at(runs: Sequence[Run]) -> Reals:
    """`top1_spread` at each position, mean over the prompts whose outputs still agree there, shape (longest shared prefix,)."""
    rows = top1_spread(runs)
    longest = max(map(len, rows), default=0)
    padded = np.full((len(rows), longest), np.nan)
    for place, row in zip(padded, rows, strict=True):
        place[: len(row)] = row
    there = ~np.isnan(padded)
    means: Reals = np.where(there, padded, 0).sum(axis=0) / np.maximum(there.sum(axis=0), 1)
    return np.where(there.any(axis=0), means, np.nan)
