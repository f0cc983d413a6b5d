"""Rounding to a floating-point format, in float32: the quantiser of arXiv 2501.02423 §3.1.

    S = FP_max / max|X| over what shares a scale,    Q(X) = round(X · S) / S

`round` is to the nearest number of the format, ties to the even one, subnormals included; what lies beyond FP_max becomes
FP_max, infinities too. NaN stays NaN: a broken model is to be seen. Scales are float32 numbers, as are the results.

Normal numbers are rounded as integers: a float32's bits, read as one, grow with its magnitude, so that rounding them to a
multiple of 2^(23-M) rounds the mantissa, and a carry moves into the exponent as it should. Subnormals of a format lie on
a grid of fixed steps: adding 2^23 steps and taking them away leaves what float32's own addition rounded, to even.
"""

from __future__ import annotations

import torch

from .spec import MOST_EXPONENT, MOST_MANTISSA, Emulation, Format

LARGEST_SCALE = 2.0**126
"""Scales end here: beyond it a product with a small number would still be far inside of every format's range."""


def rounded(x: torch.Tensor, format: Format) -> torch.Tensor:
    """The nearest numbers of a format, ties to even, without a scale.

    Args:
        x: float32, any shape.
        format: to which.
    """
    size = x.abs().clamp_(max=format.largest)
    near = _normals(size, format) if format.mantissa < MOST_MANTISSA else size
    if format.exponent < MOST_EXPONENT:  # 8 bits have float32's own subnormals, which its bits hold like the rest
        steps = 2.0 ** (MOST_MANTISSA + format.lowest - format.mantissa)
        near = torch.where(size < 2.0**format.lowest, (size + steps).sub_(steps), near)
    return torch.where(x.isnan(), x, near.copysign_(x))


def _normals(size: torch.Tensor, format: Format) -> torch.Tensor:
    """Magnitudes rounded to the format's mantissa bits, whatever their exponent."""
    bits = size.view(torch.int32) if size.is_contiguous() else size.contiguous().view(torch.int32)
    lost = MOST_MANTISSA - format.mantissa
    even = bits >> lost
    even &= 1
    even += bits
    even += (1 << (lost - 1)) - 1
    even &= -(1 << lost)
    return even.view(torch.float32)


def quantised(x: torch.Tensor, emulation: Emulation) -> torch.Tensor:
    """Q(X): scaled, rounded, and scaled back.

    Args:
        x: float32; numbers of the last dimension are a channel (a weight's inputs, a token's features, a head's key).
        emulation: the format, and what shares a scale.
    """
    if emulation.format.is_float32:
        return x
    if emulation.scale == "unscaled":
        return rounded(x, emulation.format)
    if not emulation.block:
        scale = scales(x, emulation)
        return rounded(x * scale, emulation.format).div_(scale)
    blocks = _blocks(x, emulation.block)
    scale = scales(blocks, emulation)
    return rounded(blocks * scale, emulation.format).div_(scale).flatten(-2)[..., : x.shape[-1]]


def scales(x: torch.Tensor, emulation: Emulation) -> torch.Tensor:
    """S of each tensor, or of each row of the last dimension; 1 for numbers that are all zero. Broadcasts against `x`."""
    # Tensors divided by tensors: where one side is a mere number, torch multiplies by a reciprocal, which rounds twice.
    most = x.abs().amax(tuple(range(x.dim())) if emulation.scale == "tensor" else -1, keepdim=True)
    found = (torch.full_like(most, emulation.format.largest) / most).clamp(max=LARGEST_SCALE)
    return torch.where(most == 0, torch.ones_like(most), found)


def _blocks(x: torch.Tensor, size: int) -> torch.Tensor:
    """The last dimension cut into blocks, shape (..., blocks, size); zeros fill the last one, and change no maximum."""
    whole = torch.nn.functional.pad(x, (0, -x.shape[-1] % size))
    return whole.reshape(*whole.shape[:-1], -1, size)


def on_grid(x: torch.Tensor, emulation: Emulation) -> bool:
    """Whether numbers are what `quantised` gives: those of the format under a scale that their maximum tells.

    What a scale's own rounding leaves, two units in the last place of float32, is let pass.
    """
    again = quantised(x, emulation)
    return bool(((again - x).abs() <= x.abs() * 2.0**-21).all())
