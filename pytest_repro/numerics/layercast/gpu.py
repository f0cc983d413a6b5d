"""The LayerCast product on an NVIDIA GPU, in Triton: 16-bit weights read, IEEE FP32 products and sums, never TF32.

Two kernels. `_few` (decode): a program takes one row and a strip of outputs; a row's sums are the same program whatever
the other rows are, so up to `FEW` rows the batch size does not change a row's bits. `_many` (larger batches, prefill):
tiles of `tl.dot` in IEEE precision; the order of its sums is another one.

Triton's interpreter (TRITON_INTERPRET=1, set before the import) runs both on a CPU, which is how they are tested where
there is no GPU.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

FEW = 4
"""Most rows of the decode kernel."""


@triton.jit(do_not_specialize=["m"])  # type: ignore[untyped-decorator]  # one program for every batch size
def _few(
    x_ptr: Any,
    w_ptr: Any,
    b_ptr: Any,
    y_ptr: Any,
    m: Any,
    n: Any,
    k: Any,
    BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> Any:
    # One axis, since CUDA's others end at 65,535. Rows go fastest: the programs of one strip of weights run together.
    row = (tl.program_id(0) % m).to(tl.int64)
    columns = (tl.program_id(0) // m * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    lanes = tl.arange(0, BLOCK_K)
    sums = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        ks = start + lanes
        x = tl.load(x_ptr + row * k + ks, mask=ks < k, other=0.0)
        inside = (columns < n)[:, None] & (ks < k)[None, :]
        w = tl.load(w_ptr + columns[:, None] * k + ks[None, :], mask=inside, other=0.0)
        sums += x[None, :] * w.to(tl.float32)
    y = tl.sum(sums, axis=1)
    if BIAS:
        y += tl.load(b_ptr + columns, mask=columns < n, other=0.0)
    tl.store(y_ptr + row * n + columns, y, mask=columns < n)


@triton.jit  # type: ignore[untyped-decorator]
def _many(
    x_ptr: Any,
    w_ptr: Any,
    b_ptr: Any,
    y_ptr: Any,
    m: Any,
    n: Any,
    k: Any,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> Any:
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    columns = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    lanes = tl.arange(0, BLOCK_K)
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        ks = start + lanes
        x = tl.load(x_ptr + rows[:, None] * k + ks[None, :], mask=(rows < m)[:, None] & (ks < k)[None, :], other=0.0)
        # The weight's tile comes transposed, (BLOCK_K, BLOCK_N), as tl.dot wants it.
        w = tl.load(
            w_ptr + columns[None, :] * k + ks[:, None], mask=(columns < n)[None, :] & (ks < k)[:, None], other=0.0
        )
        sums = tl.dot(x, w.to(tl.float32), sums, input_precision="ieee")
    if BIAS:
        sums += tl.load(b_ptr + columns, mask=columns < n, other=0.0)[None, :]
    tl.store(y_ptr + rows[:, None] * n + columns[None, :], sums, mask=(rows < m)[:, None] & (columns < n)[None, :])


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The product of FP32 rows (..., K), contiguous, and a 16-bit weight (N, K) on the same GPU."""
    weight = weight.contiguous()
    m, (n, k) = math.prod(x.shape[:-1]), weight.shape
    y = x.new_empty((*x.shape[:-1], n))
    if y.numel() == 0:
        return y
    b = y if bias is None else bias.contiguous()  # a pointer that is never read without BIAS
    with torch.cuda.device_of(x):  # Triton launches on the current device
        if m <= FEW:
            _few[(m * triton.cdiv(n, 4),)](x, weight, b, y, m, n, k, BIAS=bias is not None, BLOCK_N=4, BLOCK_K=512)
        else:
            height = 16 if m <= 16 else 64
            grid = (triton.cdiv(m, height), triton.cdiv(n, 64))
            _many[grid](x, weight, b, y, m, n, k, BIAS=bias is not None, BLOCK_M=height, BLOCK_N=64, BLOCK_K=32)
    return y
