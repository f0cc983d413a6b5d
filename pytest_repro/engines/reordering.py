"""Which of torch's operations add numbers up, and how the same kernel is asked again with their terms in another order."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..numerics.exact import proof

ORDERS = 3
"""Other orders in which a sum is computed: turned round, and two at random."""

Order = Callable[[int], torch.Tensor]
"""A permutation of so many terms, the same each time it is asked for."""
Arguments = Mapping[str, Any]
Call = Callable[..., torch.Tensor]
"""The operation, with some of its arguments in the place of those it was called with."""


@dataclass(frozen=True)
class Sums:
    """What an operation adds up."""

    length: int
    """Numbers of each sum."""
    again: Callable[[Order], torch.Tensor] | None
    """The result, by the same kernel, its terms in an order; None if nobody knows how."""


def as_they_are(terms: int) -> torch.Tensor:
    """The order that changes nothing: what every other is held against, made in the same way."""
    return torch.arange(terms)


def orders() -> Iterator[Order]:
    """Other orders, made on the CPU: the same on every device."""
    yield lambda terms: torch.arange(terms).flip(0)
    for seed in range(ORDERS - 1):
        yield partial(_shuffled, seed)


def _shuffled(seed: int, terms: int) -> torch.Tensor:
    return torch.randperm(terms, generator=torch.Generator().manual_seed(seed))


def permuted(tensor: torch.Tensor, dim: int, order: Order) -> torch.Tensor:
    """Permuted along a dimension, lying in memory as before: kernels are chosen by strides."""
    if tensor.stride(dim) == 0:
        return tensor  # one number, many times
    whole = [slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride()]
    own = tensor[tuple(whole)]
    turned = torch.empty_strided(own.shape, own.stride(), dtype=own.dtype, device=own.device)
    turned.copy_(own.index_select(dim, order(tensor.shape[dim]).to(tensor.device)))
    return turned.expand(tensor.shape)


def _product(one: str, other: str) -> Callable[[Arguments, Call], Sums]:
    """A matrix product: rows of `one` and columns of `other`."""

    def sums(given: Arguments, call: Call) -> Sums:
        left, right = given[one], given[other]
        dim = -2 if right.dim() > 1 else -1
        return Sums(
            left.shape[-1],
            lambda order: call(**{one: permuted(left, -1, order), other: permuted(right, dim, order)}),
        )

    return sums


def _linear(given: Arguments, call: Call) -> Sums:
    x, weight = given["input"], given["weight"]
    return Sums(x.shape[-1], lambda order: call(input=permuted(x, -1, order), weight=permuted(weight, -1, order)))


def _along(given: Arguments, call: Call) -> Sums:
    """A sum or a mean along some dimensions, or all; a norm."""
    x = given["self"]
    dims = given.get("dim")
    dims = range(x.dim()) if dims is None or dims == [] else dims if isinstance(dims, (list, tuple)) else [dims]

    def again(order: Order) -> torch.Tensor:
        turned = x
        for dim in dims:
            turned = permuted(turned, dim, order)
        return call(self=turned)

    return Sums(math.prod(x.shape[dim] for dim in dims), again)


def _shares(given: Arguments, call: Call) -> Sums:
    """A softmax: permuted, and put back."""
    x, dim = given["self"], given["dim"]

    def again(order: Order) -> torch.Tensor:
        back = torch.argsort(order(x.shape[dim])).to(x.device)
        return call(self=permuted(x, dim, order)).index_select(dim, back)

    return Sums(x.shape[dim], again)


def _norm(given: Arguments, call: Call) -> Sums:
    """A norm along the last dimension, with its weights."""
    x, names = given["input"], [n for n in ("weight", "bias") if given.get(n) is not None]
    if len(given["normalized_shape"]) != 1:
        return Sums(math.prod(given["normalized_shape"]), None)

    def again(order: Order) -> torch.Tensor:
        turned = {name: permuted(given[name], 0, order) for name in names}
        found = call(input=permuted(x, -1, order), **turned)
        return found.index_select(-1, torch.argsort(order(x.shape[-1])).to(x.device))

    return Sums(x.shape[-1], again)


def _attention(given: Arguments, call: Call) -> Sums:
    """softmax(q k^T) v in one kernel: the tokens permuted, and the numbers of a head in q and k.

    A causal mask is spelt out, since permuted tokens need one.
    """
    query, key, value = given["query"], given["key"], given["value"]
    name = "attn_bias" if "attn_bias" in given else "attn_mask"
    mask = given.get(name)
    causal = bool(given.get("is_causal"))
    asked, tokens = query.shape[-2], key.shape[-2]
    if causal and name not in given:  # a kernel that takes no mask: only the numbers of a head can be permuted
        return Sums(query.shape[-1], lambda order: call(query=permuted(query, -1, order), key=permuted(key, -1, order)))
    if causal:
        unseen = torch.ones(asked, tokens, dtype=torch.bool, device=query.device).tril().logical_not()
        mask = torch.zeros(asked, tokens, dtype=query.dtype, device=query.device).masked_fill(unseen, -torch.inf)
        mask = mask.expand(*query.shape[:-2], asked, tokens)
    spelt = {"is_causal": False} if causal else {}

    def again(order: Order) -> torch.Tensor:
        turned = {} if mask is None else {name: permuted(mask, -1, order) if mask.shape[-1] > 1 else mask}
        return call(**{
            **spelt,
            **turned,
            "query": permuted(query, -1, order),
            "key": permuted(permuted(key, -1, order), -2, order),
            "value": permuted(value, -2, order),
        })  # fmt: skip

    return Sums(tokens, again)


SUMMING: dict[str, Callable[[Arguments, Call], Sums]] = {
    "linear": _linear,
    "mm": _product("self", "mat2"),
    "bmm": _product("self", "mat2"),
    "matmul": _product("self", "other"),
    "addmm": _product("mat1", "mat2"),
    "baddbmm": _product("batch1", "batch2"),
    "sum": _along,
    "mean": _along,
    "logsumexp": _along,
    "linalg_vector_norm": _along,
    "_softmax": _shares,
    "softmax": _shares,
    "_log_softmax": _shares,
    "log_softmax": _shares,
    "native_layer_norm": _norm,
    "layer_norm": _norm,
    "rms_norm": _norm,
    "_fused_rms_norm": _norm,
    "scaled_dot_product_attention": _attention,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention": _attention,
    "_scaled_dot_product_efficient_attention": _attention,
    "_scaled_dot_product_cudnn_attention": _attention,
    "_scaled_dot_product_attention_math": _attention,
}
"""Operations that add numbers up, and how their terms are permuted."""
BY_NUMBER = (
    proof.BY_NUMBER
    | proof.MOVING
    | frozenset({
        "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sin", "cos", "tan", "tanh", "atan", "erf", "sigmoid", "silu",
        "gelu", "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "mish", "softplus", "hardtanh", "hardswish", "hardsigmoid",
        "threshold", "glu", "pow", "sqrt", "rsqrt", "reciprocal", "square", "clamp", "clamp_min", "clamp_max", "sign", "floor",
        "ceil", "round", "trunc", "true_divide", "floor_divide", "remainder", "fmod", "addcmul", "addcdiv", "lerp", "nan_to_num",
        "embedding", "flip", "roll", "triu", "tril", "sort", "constant_pad_nd", "repeat_interleave", "zero", "new_full",
        "new_ones", "new_empty_strided", "masked_scatter", "diagonal", "movedim", "unsafe_split", "rand", "randn", "uniform",
        "normal", "kthvalue", "min", "amin", "cummax", "set", "resize",
    })
)  # fmt: skip
"""Operations that give each number on its own, or move numbers. What is in neither table may sum, and is said to."""
DIVIDING = frozenset({
    "div", "true_divide", "reciprocal", "rsqrt", "sigmoid", "silu", "softmax", "_softmax", "mean", "native_layer_norm",
    "layer_norm", "rms_norm", "_fused_rms_norm", "scaled_dot_product_attention", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_attention_math", "floor_divide", "addcdiv",
})  # fmt: skip
"""Operations that divide, once for each number that comes out."""
ROOTS = frozenset(
    {"sqrt", "rsqrt", "linalg_vector_norm", "native_layer_norm", "layer_norm", "rms_norm", "_fused_rms_norm"}
)
"""Operations that take a square root; a norm takes one a row."""
A_ROW = frozenset({"native_layer_norm", "layer_norm", "rms_norm", "_fused_rms_norm"})
