"""What inference needs, in dyadic rationals: products, norms, attention, activations.

Everything goes in and comes out as float32. Inside, operands are rounded once to the grid of their row, every sum is a
sum of integers, and what is left is one division and one rounding at the end. Sums over fixed blocks are added in
float64 in the blocks' order, which is part of the definition; sums over tokens, whose number and place a batch may
change, are integers throughout.

Bits are chosen so that every operand keeps float32's own significand near the largest of its block:

    linear      x 26 + weight 21 + blocks of 64:  26 + 21 + 6 = 53
    scores      q 24 + k 24      + blocks of 32:  24 + 24 + 5 = 53
    weighted v  p 24 + v 24      + blocks of 32:  24 + 24 + 5 = 53, then integers
    norms       x 24, squared 48, summed in int64: up to 2^14 numbers, as of weighted v up to 2^14 tokens
    softmax     40 bits below one, summed in int64: up to 2^22 tokens
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from . import elementary, native
from .dyadic import WIDE, Dyadic, bits_of_sum, power, round_to

X_BITS, WEIGHT_BITS, BLOCK = 26, 21, 64
HEAD_BITS, HEAD_BLOCK = 24, 32
NORM_BITS, SHARE_BITS = 24, 40


def on_grid(weight: torch.Tensor) -> torch.Tensor:
    """A 16-bit weight as `linear` takes it: rounded once to the grids of its blocks, and still of 16 bits.

    A number within 2^-13 (bfloat16; float16: 2^-10) of the largest of its 64 stays as it is.

    Args:
        weight: bfloat16 or float16, shape (N, K).

    Returns:
        The tensor itself if nothing had to be rounded.
    """
    rounded = torch.cat([_gridded(rows, WEIGHT_BITS).to(weight.dtype) for rows in weight.split(1024)])
    return weight if torch.equal(rounded, weight) else rounded


def _gridded(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Rounded to the grids of blocks of BLOCK along the last dimension; float64, same shape."""
    width = x.shape[-1]
    return Dyadic.of(_blocks(x, BLOCK), bits).values.flatten(-2)[..., :width]


def _blocks(x: torch.Tensor, size: int) -> torch.Tensor:
    """Shape (..., K) -> (..., blocks, size), zeros at the end."""
    blocks: torch.Tensor = F.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))
    return blocks


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """y = x W^T + b, exact within blocks of 64 inputs; blocks are added in float64 in their order, the bias last.

    Args:
        x: float32, shape (..., K).
        weight: 16 bits, from `on_grid`, shape (N, K).
        bias: shape (N,), or None.

    Returns:
        float32, shape (..., N).

    Raises:
        FloatingPointError: x holds an infinity or a NaN.
    """
    if native.serves(x):
        return native.linear(x, weight, bias)
    return linear_in_torch(x, weight, bias)


def linear_in_torch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`linear` by whatever float64 product torch has."""
    bits_of_sum(X_BITS + WEIGHT_BITS, BLOCK)
    rows = _gridded(x.reshape(-1, x.shape[-1]), X_BITS)
    total = torch.zeros(len(rows), len(weight), dtype=torch.float64, device=x.device)
    for some, part in zip(rows.split(BLOCK, -1), weight.split(BLOCK, -1), strict=True):
        total = total + some @ part.double().mT  # no order of these products and sums can change a bit
    if bias is not None:
        total = total + bias.double()
    return total.float().reshape(*x.shape[:-1], len(weight))


def embedding(ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Rows of a 16-bit table, widened to float32, which is exact."""
    return F.embedding(ids, weight).float()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """x w / sqrt(mean(x^2) + epsilon) (Zhang and Sennrich, arXiv 1910.07467), rounded to float32 once at the end.

    Args:
        x: float32, shape (..., K).
        weight: shape (K,).
        epsilon: added to the mean square.
    """
    if native.serves(x):
        return native.rms_norm(x, weight, epsilon)
    return (x.double() * weight.double() / torch.sqrt(_mean_square(x.double()) + epsilon)).float()


def layer_norm(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, epsilon: float) -> torch.Tensor:
    """(x - mean) w / sqrt(variance + epsilon) + b (Ba et al., arXiv 1607.06450), rounded to float32 once at the end."""
    middle = Dyadic.of(x, NORM_BITS).sum().over(_count(x))
    apart = x.double() - middle
    out = apart if weight is None else apart * weight.double()
    out = out / torch.sqrt(_mean_square(apart) + epsilon)
    return (out if bias is None else out + bias.double()).float()


def _mean_square(x: torch.Tensor) -> torch.Tensor:
    rows = Dyadic.of(x, NORM_BITS)
    return (rows * rows).sum().over(_count(x))


def _count(x: torch.Tensor) -> torch.Tensor:
    return torch.tensor(float(x.shape[-1]), dtype=torch.float64, device=x.device)


def silu(x: torch.Tensor) -> torch.Tensor:
    """x / (1 + e^-x), float32."""
    if native.serves(x):
        return native.silu(x)
    wide = x.double()
    return (wide / (elementary.exp(-wide) + 1.0)).float()


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """x / (1 + e^-2u) with u = sqrt(2/pi) (x + 0.044715 x^3): 0.5 x (1 + tanh u) (Hendrycks, arXiv 1606.08415 §2)."""
    wide = x.double()
    inner = (wide * wide * wide * 0.044715 + wide) * math.sqrt(2 / math.pi)
    return (wide / (elementary.exp(inner * -2.0) + 1.0)).float()


def logsumexp(x: torch.Tensor) -> torch.Tensor:
    """ln of the sum of e^x along the last dimension, float32; in float64 until then, summed as integers."""
    wide = x.double()
    largest = wide.amax(-1, keepdim=True)
    total = native.shares(x) if native.serves(x) else _total(elementary.exp(wide - largest))
    return (largest + elementary.log(total))[..., 0].float()


def _total(shares: torch.Tensor) -> torch.Tensor:
    """Sum of numbers in [0, 1] along the last dimension, as integers over 2^40; float64, shape (..., 1)."""
    grid = torch.full((*shares.shape[:-1], 1), -SHARE_BITS, dtype=torch.int64, device=shares.device)
    return Dyadic(round_to(shares, grid), grid, SHARE_BITS).sum().rounded()


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor, scaling: float
) -> torch.Tensor:
    """softmax(q k^T scaling) v over the tokens that each query sees; what it does not see has no part in any bit.

    Every number of a query's row depends on that query and the tokens it sees: the largest score, the sum of shares, and
    the grid of the weighted values, in which each token's own scale is a factor of its share. A token more, on the left
    as padding or on the right as a later one, adds an integer zero.

    Args:
        query: float32, shape (B, H, Q, D).
        key, value: float32, shape (B, G, S, D) with H a multiple of G.
        seen: bool, shape (B or 1, 1 or H, Q, S).
        scaling: of the scores.

    Returns:
        float32, shape (B, H, Q, D); zeros for a query that sees nothing.
    """
    bits_of_sum(2 * HEAD_BITS, key.shape[-2], WIDE)
    if native.serves(query):
        return native.attention(query, key, value, seen, scaling)
    batch, heads, asked, _ = query.shape
    groups, tokens = key.shape[1:3]
    grouped = query.reshape(batch, groups, heads // groups * asked, -1)
    scores = (_scores(grouped, key) * scaling).reshape(batch, heads, asked, tokens)
    scores = scores.masked_fill(~seen, -torch.inf)
    largest = scores.amax(-1, keepdim=True)
    largest = torch.where(largest == -torch.inf, 0.0, largest)
    shares = torch.where(seen, elementary.exp(scores - largest), 0.0)
    total = _total(shares)
    out = _weighted(shares.reshape(batch, groups, -1, tokens), value).reshape(batch, heads, asked, -1)
    return torch.where(total == 0, 0.0, out / torch.where(total == 0, 1.0, total)).float()


def _scores(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """q k^T, float64: exact within blocks of the head, added in their order."""
    asked, known = (Dyadic.of(_blocks(x, HEAD_BLOCK), HEAD_BITS) for x in (query, key))
    total = torch.zeros((), dtype=torch.float64, device=query.device)
    for block in range(asked.values.shape[-2]):
        one, other = (Dyadic(d.values[..., block, :], d.grid[..., block, :], d.bits) for d in (asked, known))
        total = total + one.dot(other).values
    return total


def _weighted(shares: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of share times value, float64.

    Args:
        shares: float64, shape (B, G, Q, S); zero where a token is not seen.
        value: float32, shape (B, G, S, D).
    """
    values = Dyadic.of(value, HEAD_BITS)
    scaled = Dyadic.of(shares * power(values.grid).mT, HEAD_BITS)  # of each token, its value's scale in its share
    one = _blocks(scaled.values * power(-scaled.grid), HEAD_BLOCK).transpose(-2, -3)  # (B, G, S/32, Q, 32)
    other = _blocks(values.numerators.mT, HEAD_BLOCK).transpose(-2, -3)  # (B, G, S/32, D, 32)
    none = torch.zeros((), dtype=torch.int64, device=value.device).reshape(1, 1)
    parts = Dyadic(one, none, HEAD_BITS).dot(Dyadic(other, none, HEAD_BITS))
    whole = parts.values.to(torch.int64).sum(-3)
    return whole.double() * power(scaled.grid)


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """`attention` as transformers' attention interface calls it.

    Raises:
        NotImplementedError: the model asks for something beside softmax(q k^T) v.
    """
    for name in ("softcap", "s_aux", "position_bias"):
        if others.get(name) is not None:
            raise NotImplementedError(f"exact attention has no {name}, which {type(module).__name__} asks for")
    if attention_mask is None or attention_mask.dtype != torch.bool:
        raise NotImplementedError(f"{type(module).__name__} gives attention no mask of yes and no")
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    seen = attention_mask[..., : key.shape[-2]]
    return attention(query, key, value, seen, scaling).transpose(1, 2).contiguous(), None


def prepare(say: Callable[[str], None]) -> str:
    """Compile what is fused, now rather than at first use.

    Returns:
        How the operations are computed here, for the fingerprint: `c++ AVX512`, `torch (no C++ compiler)`. Every way gives
        the same bits.
    """
    built = native.library(say)
    return f"torch ({built.about})" if built.handle is None else f"c++ {built.about}"
