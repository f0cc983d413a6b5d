"""Formats from wide to narrow, and where on the way a model leaves its golden. Pure.

A rung is a format. It is held against the golden (which token would be chosen now) and against the same weights in FP32 (how
far every log-probability moved, and the Kullback-Leibler divergence of what is said of the next token).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .accuracy import PairedTest

FORMATS = ("e8m23", "e8m10", "e8m7", "e5m10", "e4m3", "e5m2", "e3m2", "e2m3", "e2m1")
"""The ladder that is walked unless told otherwise: float32, TF32, bfloat16, float16, and the formats of OCP's FP8, FP6 and FP4."""
MANTISSAS = (1, 2, 3, 5, 7)
"""Mantissa bits of the curve at fixed exponent bits."""
EXPONENTS = (2, 3, 4, 5, 8)
"""Exponent bits of the curve at fixed mantissa bits."""
VISIBLE_KL = 1e-6
"""Nats: below it a mean divergence of float32 logits is their own rounding as much as the format's."""


@dataclass(frozen=True)
class Departure:
    """One prompt's golden tokens in a format, against the golden and against FP32; every array has shape (T,)."""

    id: str
    deficit: NDArray[np.float32]
    """Largest logit less that of the golden's token, nats: 0 where the format would still choose it."""
    dlogp: NDArray[np.float32]
    """Log-probability of the golden's token less that in FP32, nats."""
    kl: NDArray[np.float32]
    """KL(FP32 ‖ format) over the whole vocabulary, nats."""
    error: str = ""
    """Why its numbers mean nothing; empty if they do."""

    @property
    def index(self) -> int | None:
        """The first token that the format would choose otherwise; None if there is none. Exact: its prefix is the golden's."""
        found = np.flatnonzero(self.deficit > 0)
        return int(found[0]) if len(found) else None


@dataclass(frozen=True)
class Rung:
    """A row of the table."""

    mode: str
    """Name of the numerics mode."""
    format: str
    exponent: int
    mantissa: int
    bits: int
    """With the sign."""
    known_as: str
    """What others call the layout; empty if nobody does."""
    prompts: int
    divergent: int
    """Prompts with a token that the format would choose otherwise."""
    mean_index: float | None
    """Mean place of the first such token; None without one."""
    flipped: float
    """Share of all tokens that the format would choose otherwise, given the golden's own prefix."""
    mean_abs_dlogp: float
    """Nats a token."""
    mean_kl: float
    """Nats a token."""
    indices: Mapping[str, int]
    """Prompt -> its first token that would be chosen otherwise."""
    accuracy: Mapping[str, Any] | None = None
    """The paired test's numbers; None where nothing was decoded."""
    errors: Mapping[str, str] = field(default_factory=dict)
    """Prompts whose numbers mean nothing, and why: they count as divergent, and in no mean."""
    seconds: float = 0.0

    @property
    def div_percent(self) -> float:
        """Divergent prompts, per cent."""
        return 100 * self.divergent / self.prompts

    def with_accuracy(self, test: PairedTest | None) -> Rung:
        """The row with what decoding showed."""
        return self if test is None else replace(self, accuracy=asdict(test) | {"drop": test.drop})

    def to_json(self) -> dict[str, Any]:
        """One line of the ladder's file."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Rung:
        """Inverse of `to_json`.

        Raises:
            TypeError: other fields than a row's.
        """
        return cls(**data)


def rung(mode: str, layout: tuple[int, int], known_as: str, departures: Sequence[Departure]) -> Rung:
    """What one format did.

    Args:
        mode: name of the numerics mode.
        layout: exponent and mantissa bits.
        known_as: what others call the layout.
        departures: of every prompt, at least one.
    """
    exponent, mantissa = layout
    good = [d for d in departures if not d.error]
    errors = {d.id: d.error for d in departures if d.error}
    indices = {d.id: d.index for d in good if d.index is not None}
    return Rung(
        mode=mode,
        format=f"e{exponent}m{mantissa}",
        exponent=exponent,
        mantissa=mantissa,
        bits=1 + exponent + mantissa,
        known_as=known_as,
        prompts=len(departures),
        divergent=len(indices) + len(errors),
        mean_index=float(np.mean(list(indices.values()))) if indices else None,
        flipped=_mean(d.deficit > 0 for d in good),
        mean_abs_dlogp=_mean(np.abs(d.dlogp) for d in good),
        mean_kl=_mean(d.kl for d in good),
        indices=indices,
        errors=errors,
    )


def _mean(columns: Iterable[NDArray[Any]]) -> float:
    """Over all tokens of all prompts; 0 without any."""
    flat = np.concatenate([np.zeros(0), *columns]).astype(np.float64)
    return float(flat.mean()) if len(flat) else 0.0


def descending(layouts: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """(exponent, mantissa) bits from wide to narrow, each once; of equal widths the longer mantissa first."""
    return sorted(set(layouts), key=lambda found: (-sum(found), -found[1]))


def left_at(rungs: Sequence[Rung]) -> Rung | None:
    """The widest format in which a prompt leaves the golden; None if none does in any."""
    return next((r for r in sorted(rungs, key=lambda r: (-r.bits, -r.mantissa)) if r.divergent), None)


@dataclass(frozen=True)
class Curve:
    """Rungs that differ in one field of bits alone."""

    varied: str
    """`mantissa` or `exponent`."""
    fixed: int
    """Bits of the other."""
    rungs: tuple[Rung, ...]
    """By bits of the varied field."""


def curves(rungs: Sequence[Rung], exponent: int, mantissa: int) -> list[Curve]:
    """The curve over mantissa bits at so many exponent bits, and the other way round; those that have two rungs or more."""
    over_mantissa = sorted((r for r in rungs if r.exponent == exponent), key=lambda r: r.mantissa)
    over_exponent = sorted((r for r in rungs if r.mantissa == mantissa), key=lambda r: r.exponent)
    found = [
        Curve("mantissa", exponent, tuple(over_mantissa)),
        Curve("exponent", mantissa, tuple(over_exponent)),
    ]
    return [curve for curve in found if len(curve.rungs) > 1]


def splits(rungs: Sequence[Rung]) -> list[list[Rung]]:
    """Rungs of equal width, the nearest to FP32 first: how so many bits are best split. Widest first."""
    widths = sorted({r.bits for r in rungs}, reverse=True)
    groups = [sorted((r for r in rungs if r.bits == bits), key=lambda r: r.mean_kl) for bits in widths]
    return [group for group in groups if len(group) > 1]


@dataclass(frozen=True)
class Exponents:
    """The law's penalty, fitted to mean divergences: KL = c / ((E + ½)^δ (M + ½)^ν)."""

    delta: float
    """δ: how much exponent bits matter."""
    nu: float
    """ν: how much mantissa bits matter."""
    r2: float
    """Share of the variance of log KL that the form explains."""
    rungs: int


def exponents(rungs: Sequence[Rung]) -> Exponents | None:
    """Least squares of log KL on log(E + ½) and log(M + ½), the form of arXiv 2501.02423 Eq. 1.

    The law is about training with quantised weights; that a finished model follows its form is not given: see `r2`.

    Returns:
        None unless there are four rungs whose divergence can be seen, with several exponents and several mantissas.
    """
    seen = [r for r in rungs if r.mean_kl > VISIBLE_KL]
    if len(seen) < 4 or min(len({r.exponent for r in seen}), len({r.mantissa for r in seen})) < 2:
        return None
    terms = np.array([[1.0, -np.log(r.exponent + 0.5), -np.log(r.mantissa + 0.5)] for r in seen])
    if np.linalg.matrix_rank(terms) < 3:
        return None
    wanted = np.log([r.mean_kl for r in seen])
    found = np.linalg.lstsq(terms, wanted, rcond=None)[0]
    spread = float(((wanted - wanted.mean()) ** 2).sum())
    left = float(((wanted - terms @ found) ** 2).sum())
    return Exponents(float(found[1]), float(found[2]), 1 - left / spread if spread else 1.0, len(seen))
