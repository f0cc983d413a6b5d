"""exp, log, sine and cosine in float64, of IEEE 754 additions, multiplications and divisions alone.

Every step is an operation that IEEE 754 rounds correctly, in an order that is written down here: whatever computes them
number by number gives the same bits. No maths library is asked, since none promises the last bit. The errors are a few
units in float64's last place, half a billion times finer than the float32 that results are rounded to.

Coefficients are quotients of integers or split constants (Cody and Waite 1980; the splits are those of fdlibm, Sun
Microsystems 1993). Polynomials are Taylor's, long enough for float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .dyadic import power

LN2_HIGH, LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
"""ln 2 in two parts; the first has 32 bits, so that its multiples up to 2^21 are exact."""
LOG2_E = 1.44269504088896338700e00
TWO_OVER_PI = 6.36619772367581382433e-01
HALF_PI = (1.57079632673412561417e00, 6.07710050630396597660e-11, 2.02226624879595063154e-21)
"""pi/2 in three parts, the first two of 33 bits."""
SQRT_2 = 1.41421356237309514547e00
FARTHEST = 2.0**20
"""Angles up to this are reduced exactly enough, radians."""
LIMIT = 700.0
"""exp is taken of arguments up to this magnitude: float64 holds the results, and float32 holds neither."""

_EXP = [1 / math.factorial(n) for n in range(14)]
_SIN = [(-1) ** n / math.factorial(2 * n + 1) for n in range(9)]
_COS = [(-1) ** n / math.factorial(2 * n) for n in range(10)]
_ATANH = [1 / (2 * n + 1) for n in range(11)]


def exp(x: torch.Tensor) -> torch.Tensor:
    """e^x; x is brought into [-LIMIT, LIMIT] first.

    Args:
        x: float64.
    """
    x = x.clamp(-LIMIT, LIMIT)
    whole = torch.round(x * LOG2_E)
    rest = (x - whole * LN2_HIGH) - whole * LN2_LOW
    return _horner(_EXP, rest) * power(whole.to(torch.int64))


def log(x: torch.Tensor) -> torch.Tensor:
    """ln x, as k ln 2 + 2 atanh((f - 1) / (f + 1)) with x = 2^k f.

    Args:
        x: float64, normal and positive.
    """
    bits = x.view(torch.int64)
    fraction = ((bits & 0x000FFFFFFFFFFFFF) | 0x3FF0000000000000).view(torch.float64)
    above = fraction > SQRT_2
    fraction = torch.where(above, fraction * 0.5, fraction)
    whole = ((bits >> 52) - 1023 + above.to(torch.int64)).double()
    small = (fraction - 1.0) / (fraction + 1.0)
    return whole * LN2_HIGH + (whole * LN2_LOW + (small * 2.0) * _horner(_ATANH, small * small))


def cos_and_sin(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of angles in radians.

    Args:
        x: float64, below 2^20 in magnitude.

    Raises:
        OverflowError: an angle is larger.
    """
    if bool((x.abs() >= FARTHEST).any()):
        raise OverflowError(f"exact compute reduces angles up to {FARTHEST:.0f} radians")
    whole = torch.round(x * TWO_OVER_PI)
    rest = ((x - whole * HALF_PI[0]) - whole * HALF_PI[1]) - whole * HALF_PI[2]
    square = rest * rest
    sine, cosine = rest * _horner(_SIN, square), _horner(_COS, square)
    quarter = whole.to(torch.int64) & 3
    odd = (quarter & 1) == 1
    across, up = torch.where(odd, sine, cosine), torch.where(odd, cosine, sine)
    return torch.where((quarter == 1) | (quarter == 2), -across, across), torch.where(quarter >= 2, -up, up)


def _horner(coefficients: Sequence[float], x: torch.Tensor) -> torch.Tensor:
    """c0 + x (c1 + x (c2 + ...)), a multiplication and an addition a step."""
    total = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = total * x + coefficient
    return total
