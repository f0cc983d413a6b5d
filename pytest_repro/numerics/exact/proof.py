"""Whether exact compute holds in the process that has the model: what runs is watched, and bits are compared.

`nothing_else_computes` runs a few tokens and sees every operation that torch computes for them. Outside the exact
operations only such are let through whose bits IEEE 754 fixes, number by number. `observe` then compares bits: sums in
other orders, a row alone and among others, a prompt at once and token by token, padded and not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ...errors import EngineError
from ...precision import Observation, a_few_tokens, inside, observe_layer
from . import operations

_depth = 0

BY_NUMBER = frozenset({"add", "sub", "mul", "neg", "div", "abs", "where", "masked_fill", "maximum", "minimum", "rsub"})
"""Operations that give each number by one IEEE 754 operation on its own operands, or choose one of them."""
MOVING = frozenset({
    "view", "_unsafe_view", "reshape", "transpose", "permute", "expand", "clone", "slice", "select", "unsqueeze", "squeeze",
    "cat", "stack", "split", "split_with_sizes", "unbind", "index", "index_select", "copy", "_to_copy", "t", "alias",
    "detach", "contiguous", "empty", "empty_like", "zeros", "ones", "full", "full_like", "zeros_like", "ones_like",
    "new_zeros", "new_empty", "arange", "scalar_tensor", "lift_fresh", "unfold", "as_strided", "index_put", "dropout",
    "max", "amax", "argmax", "_reshape_alias", "fill", "narrow", "empty_strided", "repeat", "topk", "gather", "scatter",
})  # fmt: skip
"""Operations that move numbers, choose among them, or write constants."""


def exactly(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a function as one of the exact operations: what it asks of torch is its own affair."""

    @functools.wraps(forward)
    def marked(*args: Any, **kwargs: Any) -> Any:
        global _depth
        _depth += 1
        try:
            return forward(*args, **kwargs)
        finally:
            _depth -= 1

    return marked


class _Watch(TorchDispatchMode):
    """Collects what is computed outside the exact operations, and not number by number."""

    def __init__(self, modules: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.modules = modules
        self.found: dict[str, None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not _depth and not _fixed(func, out):
            self.found.setdefault(f"{self.modules[-1]} ({func.overloadpacket.__name__})")
        return out


def _fixed(func: Any, out: Any) -> bool:
    """Whether IEEE 754 fixes every bit of what came out."""
    floats = [
        t
        for t in (out if isinstance(out, (tuple, list)) else (out,))
        if isinstance(t, torch.Tensor) and t.is_floating_point()
    ]
    if not floats:
        return True
    name = func.overloadpacket.__name__.rstrip("_")
    return (name in BY_NUMBER or name in MOVING) and all(t.dtype.itemsize >= 4 or name in MOVING for t in floats)


def nothing_else_computes(model: Any) -> None:
    """Run a few tokens, watched.

    Raises:
        EngineError: names the modules that compute outside the exact operations, and with what.
    """
    with inside(model) as modules, _Watch(modules) as watch:
        a_few_tokens(model)
    if watch.found:
        raise EngineError(
            f"exact compute does not know what runs in {', '.join(list(watch.found)[:8])}",
            fix="--repro-numerics fp32 or layercast, which serve any module",
        )


def observe(model: Any) -> Observation:
    """`exact` if every comparison below agreed on every bit, `fp32` if one did not; with the precision of one product.

    Args:
        model: inside `model.computing`.
    """
    with torch.inference_mode():
        weight = _a_weight(model)
        seen = observe_layer(
            "linear", lambda x: operations.linear(x, weight), weight.shape[1], len(weight), torch.float32, weight.device
        )
        wrong = [what for what, check in _checks(model, weight) if not check()]
    detail = f"{', '.join(wrong)}: not the same bits" if wrong else "the same bits in every order"
    kind = "exact" if not wrong and seen.fp32_class else seen.compute_class
    return Observation(kind, seen.product_bits, seen.sum_bits, detail)


def _checks(model: Any, weight: torch.Tensor) -> Iterator[tuple[str, Callable[[], bool]]]:
    yield "subnormal numbers", _subnormals_live
    yield "sums in another order", lambda: _orders_agree(weight)
    yield "fused products and torch's", lambda: _kernels_agree(weight)
    yield "a row alone and among others", lambda: _rows_agree(weight)
    yield "a prompt at once and token by token", lambda: _decoding_agrees(model)
    yield "a prompt with padding on its left", lambda: _padding_agrees(model)
    yield "one thread and several", lambda: _threads_agree(model)


def _a_weight(model: Any) -> torch.Tensor:
    """Some rows of the last linear layer's weight, on its grid."""
    layers = [m for m in model.modules() if type(m) is torch.nn.Linear]
    return operations.on_grid(layers[-1].weight.detach()[:256].bfloat16())


def _subnormals_live() -> bool:
    """Whether no thread flushes them to zero: they are the one case where hardware departs from IEEE 754 at will."""
    small = torch.full((2**20,), 2.0**-126)
    return bool((small * 0.5 == 2.0**-127).all())


def _orders_agree(weight: torch.Tensor) -> bool:
    """Turned round and shuffled within their blocks, the products of a row are summed in other orders."""
    width, generator = weight.shape[1], torch.Generator().manual_seed(53)
    x = torch.randn(4, width, generator=generator)
    blocks = torch.arange(width).split(operations.BLOCK)
    turned = torch.cat([block.flip(0) for block in blocks])
    shuffled = torch.cat([block[torch.randperm(len(block), generator=generator)] for block in blocks])
    plain = operations.linear(x, weight)
    others = (operations.linear(x[:, o], weight[:, o].contiguous()) for o in (turned, shuffled))
    return all(same_bits(plain, other) for other in others)


def _kernels_agree(weight: torch.Tensor) -> bool:
    x = torch.randn(9, weight.shape[1], generator=torch.Generator().manual_seed(21))
    return same_bits(operations.linear(x, weight), operations.linear_in_torch(x, weight))


def _rows_agree(weight: torch.Tensor) -> bool:
    x = torch.randn(33, weight.shape[1], generator=torch.Generator().manual_seed(26))
    return same_bits(operations.linear(x, weight)[5:6], operations.linear(x[5:6], weight))


def _decoding_agrees(model: Any) -> bool:
    ids = _ids(model)
    whole = model(input_ids=ids, use_cache=True).logits
    cache, steps = None, []
    for token in ids.split(1, dim=1):
        out = model(input_ids=token, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    return same_bits(whole, torch.cat(steps, 1))


def _padding_agrees(model: Any) -> bool:
    ids, padding = _ids(model), 3
    padded = torch.cat((ids[:, :padding], ids), 1)
    mask = torch.ones_like(padded)
    mask[:, :padding] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    out = model(input_ids=padded, attention_mask=mask, position_ids=positions, use_cache=True).logits
    return same_bits(model(input_ids=ids, use_cache=True).logits, out[:, padding:])


def _threads_agree(model: Any) -> bool:
    ids, threads = _ids(model), torch.get_num_threads()
    many = model(input_ids=ids, use_cache=True).logits
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        return same_bits(many, model(input_ids=ids, use_cache=True).logits)
    finally:
        torch.set_num_threads(threads)


def _ids(model: Any) -> torch.Tensor:
    vocabulary = int(model.config.get_text_config().vocab_size)
    return (torch.arange(8, device=model.device)[None] * 7 + 1) % vocabulary


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two float32 tensors are the same bit for bit; a zero and a negative zero are not."""
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))
