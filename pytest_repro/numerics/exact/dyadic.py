"""Dyadic rationals: rows of integer numerators over one power of two, whose products and sums are exact.

A float64 holds every integer up to 2^53, and a power of two only shifts its exponent. So the numerators need no place of
their own: a float64 that is a multiple of its row's grid 2^g, and at most 2^(g + bits) in magnitude, is that numerator.
Multiplying two such numbers multiplies the numerators, adding them adds the numerators, and neither rounds while the
result has at most 53 bits. That is decided here from the declared bits and the number of terms, before anything is
computed, and never from the data: it holds for every input.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

WIDTH = 53
"""Bits of the largest integer up to which float64 holds all (IEEE 754 binary64)."""
WIDE = 62
"""Bits of the largest integer that is summed in int64: |n| <= 2^62."""
SMALLEST = -300
"""Least exponent of a row: below it lies no float32, and none of the numbers that are made of them here."""


@dataclass(frozen=True)
class Dyadic:
    """Rows of numbers n * 2^g with integers |n| <= 2^bits. The last dimension is a row's."""

    values: torch.Tensor
    """The numbers themselves, float64 or, after `sum`, int64 numerators; shape (..., K)."""
    grid: torch.Tensor
    """g of each row, int64, shape (..., 1)."""
    bits: int

    @classmethod
    def of(cls, x: torch.Tensor, bits: int) -> Dyadic:
        """Numbers rounded once, to nearest even, to the grid of their row: the largest gets `bits` bits.

        Args:
            x: float32, bfloat16, float16 or float64; shape (..., K). Of float64, magnitudes below 2^1000.
            bits: of the numerators, at most 50.

        Raises:
            FloatingPointError: an infinity or a NaN has no numerator.
        """
        values = x.double()
        grid = exponent(values) + 1 - bits
        return cls(round_to(values, grid), grid, bits)

    @property
    def numerators(self) -> torch.Tensor:
        """The integers, as float64, or int64 after `sum`."""
        return self.values if self.values.dtype == torch.int64 else self.values * power(-self.grid)

    def __mul__(self, other: Dyadic) -> Dyadic:
        """Products, number by number.

        Raises:
            OverflowError: they might need more than 53 bits.
        """
        bits = _within(self.bits + other.bits, WIDTH, "a product")
        return Dyadic(self.values * other.values, self.grid + other.grid, bits)

    def dot(self, other: Dyadic) -> Dyadic:
        """Products of every row of one with every row of the other, summed: in any order, since no sum rounds.

        Args:
            other: rows of the same length, shape (..., N, K).

        Returns:
            Shape (..., M, N). Each entry has its own grid, the sum of its two rows'.

        Raises:
            OverflowError: the sums might need more than 53 bits.
        """
        bits = bits_of_sum(self.bits + other.bits, self.values.shape[-1])
        return Dyadic(self.values @ other.values.mT, self.grid + other.grid.mT, bits)

    def sum(self) -> Dyadic:
        """Sum of every row, in int64: shape (..., 1).

        Raises:
            OverflowError: it might need more than 62 bits.
        """
        bits = bits_of_sum(self.bits, self.values.shape[-1], WIDE)
        return Dyadic(self.numerators.to(torch.int64).sum(-1, keepdim=True), self.grid, bits)

    def reduced(self) -> Dyadic:
        """The same numbers in lowest terms: the largest power of two that divides a whole row goes into its grid.

        Returns:
            int64 numerators.
        """
        whole = self.numerators.to(torch.int64)
        some = whole[..., :1].clone()
        for column in range(1, whole.shape[-1]):
            some |= whole[..., column : column + 1]
        lowest = some & -some  # of numbers or-ed together, the lowest bit that any of them has
        shift = torch.where(some == 0, 0, exponent(lowest.double()))
        return Dyadic(whole >> shift, self.grid + shift, self.bits)

    def rounded(self) -> torch.Tensor:
        """The numbers as float64, rounded at most once."""
        return self.values.double() * power(self.grid) if self.values.dtype == torch.int64 else self.values

    def over(self, divisor: torch.Tensor) -> torch.Tensor:
        """The one division: a correctly rounded quotient (IEEE 754 §5.4.1), in float64."""
        return self.rounded() / divisor


def exponent(x: torch.Tensor) -> torch.Tensor:
    """e of each row with largest magnitude in [2^e, 2^(e+1)), read from its bits; int64, shape (..., 1).

    A row of zeros has the least one.

    Args:
        x: float64, shape (..., K).

    Raises:
        FloatingPointError: an infinity or a NaN has no numerator.
    """
    if x.shape[-1] == 0:
        return torch.full((*x.shape[:-1], 1), SMALLEST, dtype=torch.int64, device=x.device)
    found = (x.abs().amax(-1, keepdim=True).view(torch.int64) >> 52) - 1023
    if bool((found == 1024).any()):
        raise FloatingPointError("exact compute met an infinity or a NaN, which has no numerator")
    return found.clamp(min=SMALLEST)


def power(exponents: torch.Tensor) -> torch.Tensor:
    """2^e as float64, put together from its bits: no library's pow is asked.

    Args:
        exponents: int64, between -1022 and 1023.
    """
    return ((exponents + 1023) << 52).view(torch.float64)


def round_to(x: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Multiples of 2^g, to nearest even: adding 1.5 * 2^(52+g) leaves float64 no finer step than 2^g.

    Args:
        x: float64, |x| < 2^(51+g).
        grid: g, int64.
    """
    big = power(grid + 52) * 1.5
    return (x + big) - big


def bits_of_sum(bits: int, terms: int, most: int = WIDTH) -> int:
    """Bits of a sum of so many numbers of so many bits each.

    Raises:
        OverflowError: they might be more than `most`.
    """
    return _within(bits + (terms - 1).bit_length() if terms else bits, most, f"a sum of {terms} numbers")


def _within(bits: int, most: int, what: str) -> int:
    if bits > most:
        raise OverflowError(f"{what} of up to {bits} bits does not fit into {most}: take fewer bits, or shorter blocks")
    return bits
