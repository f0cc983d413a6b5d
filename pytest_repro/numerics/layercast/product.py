"""The LayerCast product: FP32 rows times 16-bit weights, every operation in FP32.

Three ways, chosen by the device: C++ on a CPU (`native`), Triton on an NVIDIA GPU (`gpu`), and everywhere else tiles of
the weight, upcast one after the other into a small buffer that is used again. None writes the upcast matrix to memory.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ..fp32 import ieee
from . import native

SIXTEEN_BIT = (torch.bfloat16, torch.float16)
Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]

TILE = 2**18
"""Weights upcast at a time on the slow way: 1 MiB as float32, which stays in a second-level cache."""


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """y = x W^T + b with W stored in 16 bits and every product and sum in FP32 (arXiv 2506.09501 §4, LayerCast).

    Inference only: where a gradient of `x` is asked for, the weight is upcast as a whole.

    Args:
        x: FP32, shape (..., in_features).
        weight: bfloat16 or float16, shape (out_features, in_features).
        bias: shape (out_features,), any floating dtype; or None.

    Returns:
        FP32, shape (..., out_features). On a CPU with fused multiply-adds the bits of a row depend on that row and the
        weight alone: not on the number of rows, threads, or the instruction set.

    Raises:
        TypeError: `x` is not FP32, or the weight is not of 16 bits.
        ValueError: shapes or devices do not fit.
    """
    _check(x, weight, bias)
    if bias is not None and bias.dtype != torch.float32:
        bias = bias.float()
    if torch.is_grad_enabled() and x.requires_grad:
        with ieee():
            return F.linear(x, weight.float(), bias)
    return _product(x.device.type)(x.contiguous(), weight, bias)


def prepare(device: torch.device, say: Callable[[str], None]) -> str:
    """Compile what `linear` needs on a device, now rather than at first use.

    Returns:
        How it computes there, for the fingerprint: e.g. `c++ AVX512`, `triton`, `tiles (no C++ compiler)`.
    """
    if device.type == "cpu":
        built = native.library(say)
        return f"c++ {built.about}" if built.function else f"tiles ({built.about})"
    if device.type == "cuda" and _gpu() is None:
        say(
            f"layercast: triton is missing or cannot compile here: {native.SLOWER}; pip install triton, and a C compiler"
        )
        return "tiles (no triton)"
    return "triton" if device.type == "cuda" else "tiles"


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    if x.dtype != torch.float32 or weight.dtype not in SIXTEEN_BIT:
        raise TypeError(f"layercast multiplies float32 rows by 16-bit weights, not {x.dtype} by {weight.dtype}")
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"layercast: shapes {tuple(x.shape)} and {tuple(weight.shape)} do not fit")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"layercast: bias {tuple(bias.shape)} does not fit the weight {tuple(weight.shape)}")
    if x.device != weight.device or (bias is not None and bias.device != x.device):
        places = f"rows on {x.device}, weight on {weight.device}, bias on {bias.device if bias is not None else 'none'}"
        raise ValueError(f"layercast: {places}")


def _product(device: str) -> Product:
    if device == "cpu" and native.library().function is not None:
        return compiled
    if device == "cuda" and (gpu := _gpu()) is not None:
        found: Product = gpu.linear
        return found
    return tiled


@functools.cache
def _gpu() -> Any | None:
    """The Triton product, if triton is there and a first product succeeds: it needs a C compiler of its own."""
    try:
        from . import gpu

        one = torch.ones((1, 1), device="cuda")
        gpu.linear(one, one.bfloat16(), None)
    except Exception:  # whatever a compiler or a driver throws
        return None
    return gpu


def compiled(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The C++ product; x contiguous.

    Raises:
        MemoryError: no room for the rows.
    """
    weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    n, k = weight.shape
    y = x.new_empty((*x.shape[:-1], n))
    m = math.prod(x.shape[:-1])
    failed = native.library().function(  # type: ignore[misc]  # there is one, or `_product` had chosen otherwise
        x.data_ptr(),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        m,
        n,
        k,
        SIXTEEN_BIT.index(weight.dtype),
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"layercast: no memory to pack {m} rows of {k}")
    return y


def tiled(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The product on any device: some rows of the weight at a time; x contiguous."""
    n, k = weight.shape
    y = x.new_empty((*x.shape[:-1], n))
    height = max(1, TILE // max(1, k))
    buffer = x.new_empty((min(height, n), k))
    with ieee():
        for first in range(0, n, height):
            part = weight[first : first + height]
            upcast = buffer[: len(part)].copy_(part)
            y[..., first : first + height] = x @ upcast.T
    return y if bias is None else y.add_(bias)
