"""What torch runs in a forward pass, by module, timed; and every sum of it once more in other orders.

A sum's terms are permuted in all its operands alike, and the same kernel is called again: what differs then is the order
alone. Seen are torch's own operations, and LayerCast's product. Exact compute is looked at on its way through torch, which
gives the bits of its C++ (`numerics.exact.proof` compares them), not its time.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..audit import Operation, Pass, rolled_up
from ..numerics.layercast.weight import Weight, stored, wrap
from ..precision import inside

ORDERS = 3
"""Other orders in which a sum is computed: turned round, and two at random."""
TIMES = 3
"""How often a pass is timed; the median counts."""

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
    """The result, summed in another order; None if nobody knows how."""
    first: Callable[[], torch.Tensor] | None = None
    """What that is to be held against, where it is not the result as it was: the same kernel, asked in the same way."""


def orders() -> Iterator[Order]:
    """Permutations, made on the CPU: the same on every device."""
    yield lambda terms: torch.arange(terms).flip(0)
    for seed in range(ORDERS - 1):
        yield partial(_shuffled, seed)


def _shuffled(seed: int, terms: int) -> torch.Tensor:
    return torch.randperm(terms, generator=torch.Generator().manual_seed(seed))


def _permuted(tensor: torch.Tensor, dim: int, order: Order) -> torch.Tensor:
    return tensor.index_select(dim, order(tensor.shape[dim]).to(tensor.device))


def _product(one: str, other: str) -> Callable[[Arguments, Call], Sums]:
    """A matrix product: rows of `one` and columns of `other`."""

    def sums(given: Arguments, call: Call) -> Sums:
        left, right = given[one], given[other]
        dim = -2 if right.dim() > 1 else -1
        return Sums(
            left.shape[-1],
            lambda order: call(**{one: _permuted(left, -1, order), other: _permuted(right, dim, order)}),
        )

    return sums


def _linear(given: Arguments, call: Call) -> Sums:
    x, weight = given["input"], given["weight"]

    def again(order: Order) -> torch.Tensor:
        turned = _permuted(stored(weight), -1, order)
        return call(input=_permuted(x, -1, order), weight=wrap(turned) if isinstance(weight, Weight) else turned)

    return Sums(x.shape[-1], again)


def _along(given: Arguments, call: Call) -> Sums:
    """A sum or a mean along some dimensions, or all; a norm."""
    x = given["self"]
    dims = given.get("dim")
    dims = range(x.dim()) if dims is None or dims == [] else dims if isinstance(dims, (list, tuple)) else [dims]

    def again(order: Order) -> torch.Tensor:
        turned = x
        for dim in dims:
            turned = _permuted(turned, dim, order)
        return call(self=turned)

    return Sums(math.prod(x.shape[dim] for dim in dims), again)


def _shares(given: Arguments, call: Call) -> Sums:
    """A softmax: permuted, and put back."""
    x, dim = given["self"], given["dim"]

    def again(order: Order) -> torch.Tensor:
        back = torch.argsort(order(x.shape[dim])).to(x.device)
        return call(self=_permuted(x, dim, order)).index_select(dim, back)

    return Sums(x.shape[dim], again)


def _norm(given: Arguments, call: Call) -> Sums:
    """A norm along the last dimension, with its weights."""
    x, names = given["input"], [n for n in ("weight", "bias") if given.get(n) is not None]
    if len(given["normalized_shape"]) != 1:
        return Sums(math.prod(given["normalized_shape"]), None)

    def again(order: Order) -> torch.Tensor:
        turned = {name: _permuted(given[name], 0, order) for name in names}
        found = call(input=_permuted(x, -1, order), **turned)
        return found.index_select(-1, torch.argsort(order(x.shape[-1])).to(x.device))

    return Sums(x.shape[-1], again)


def _attention(given: Arguments, call: Call) -> Sums:
    """softmax(q k^T) v in one kernel: the tokens permuted, and the numbers of a head in q and k.

    A causal mask is spelt out first, since permuted tokens need one: the same kernel with that mask is what is compared.
    """
    query, key, value = given["query"], given["key"], given["value"]
    name = "attn_bias" if "attn_bias" in given else "attn_mask"
    mask = given.get(name)
    causal = bool(given.get("is_causal"))
    asked, tokens = query.shape[-2], key.shape[-2]
    if causal and name not in given:  # a kernel that takes no mask: only the numbers of a head can be permuted
        heads = lambda order: call(query=_permuted(query, -1, order), key=_permuted(key, -1, order))  # noqa: E731
        return Sums(tokens, heads)
    if causal:
        seen = torch.ones(asked, tokens, dtype=torch.bool, device=query.device).tril()
        mask = torch.zeros_like(seen, dtype=query.dtype).masked_fill(~seen, -torch.inf)[None, None]
    spelt: dict[str, Any] = {"is_causal": False, name: mask} if causal else {}

    def again(order: Order) -> torch.Tensor:
        turned = {} if mask is None else {name: _permuted(mask, -1, order) if mask.shape[-1] > 1 else mask}
        return call(**{
            **spelt,
            **turned,
            "query": _permuted(query, -1, order),
            "key": _permuted(_permuted(key, -1, order), -2, order),
            "value": _permuted(value, -2, order),
        })  # fmt: skip

    return Sums(tokens, again, (lambda: call(**spelt)) if causal else None)


def _unknown(given: Arguments, call: Call) -> Sums:
    """Something that sums, and that is not known well enough to be turned round."""
    return Sums(2, None)


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
    "_scaled_dot_product_attention_math": _attention,
    "cumsum": _unknown,
    "var": _unknown,
    "std": _unknown,
    "convolution": _unknown,
    "einsum": _unknown,
    "grouped_mm": _unknown,
    "_grouped_mm": _unknown,
    "_int_mm": _unknown,
    "_scaled_mm": _unknown,
}
"""Operations that add numbers up."""
DIVIDING = frozenset({
    "div", "true_divide", "reciprocal", "rsqrt", "sigmoid", "silu", "softmax", "_softmax", "mean", "native_layer_norm",
    "layer_norm", "rms_norm", "_fused_rms_norm", "scaled_dot_product_attention", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_attention_math",
})  # fmt: skip
"""Operations that divide, once for each number that comes out."""
ROOTS = frozenset(
    {"sqrt", "rsqrt", "linalg_vector_norm", "native_layer_norm", "layer_norm", "rms_norm", "_fused_rms_norm"}
)
"""Operations that take a square root; a norm takes one a row."""
A_ROW = frozenset({"native_layer_norm", "layer_norm", "rms_norm", "_fused_rms_norm"})


def passes(model: Any, ids: torch.Tensor) -> list[Pass]:
    """A prompt at once, and the token after it: each pass timed, then looked at.

    Args:
        model: of transformers, in its numerics mode.
        ids: shape (1, T), on the model's device.
    """
    with torch.no_grad():
        first = model(input_ids=ids, use_cache=True)
        after = first.logits[:, -1:].argmax(-1)
        kept = copy.deepcopy(first.past_key_values)
        return [
            _pass("prefill", model, ids, lambda: None),
            _pass("decode", model, after, lambda: copy.deepcopy(kept)),
        ]


def _pass(what: str, model: Any, ids: torch.Tensor, cache: Callable[[], Any]) -> Pass:
    """Each time with a cache of its own, since a pass adds to it."""

    def run() -> float:
        kept = cache()
        return _timed(lambda: model(input_ids=ids, past_key_values=kept, use_cache=True))[1]

    run()
    seconds = statistics.median(run() for _ in range(TIMES))
    kept = cache()
    with audited(model) as found:
        model(input_ids=ids, past_key_values=kept, use_cache=True)
    return Pass(what, ids.shape[-1], seconds, rolled_up(found))


@contextmanager
def audited(model: Any) -> Iterator[list[Operation]]:
    """Look on while the model computes; what it computes is unchanged.

    Yields:
        Every operation, in its order.
    """
    found: list[Operation] = []
    with torch.no_grad(), inside(model) as modules, _Torch(modules, found) as kernels, _Own(kernels):
        yield found


class _Torch(TorchDispatchMode):
    """Every operation that reaches torch's kernels."""

    def __init__(self, modules: list[str], found: list[Operation]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.modules, self.found = modules, found
        self.away = False
        """Whether what runs now is counted elsewhere."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.away:
            return func(*args, **kwargs)
        out, seconds = _timed(lambda: func(*args, **kwargs))
        name = func.overloadpacket.__name__.rstrip("_")
        given = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
        given |= dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        in_place = func._schema.is_mutable
        self.found.append(_seen(self.modules[-1], name, seconds, out, {} if in_place else given, func))
        return out


class _Own(TorchFunctionMode):
    """LayerCast's product, of which torch's kernels see nothing."""

    def __init__(self, kernels: _Torch) -> None:
        super().__init__()
        self.kernels = kernels

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
        if func is not torch.nn.functional.linear or not isinstance(given["weight"], Weight):
            return func(*args, **kwargs)
        self.kernels.away = True
        try:
            out, seconds = _timed(lambda: func(**given))
            self.kernels.found.append(_seen(self.kernels.modules[-1], "linear", seconds, out, given, func))
            return out
        finally:
            self.kernels.away = False


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    _wait()
    started = time.perf_counter()
    out = call()
    _wait()
    return out, time.perf_counter() - started


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _seen(module: str, name: str, seconds: float, out: Any, given: Arguments, func: Any) -> Operation:
    """What one call did; its sums computed again if `given` has its arguments."""
    result = out[0] if isinstance(out, (tuple, list)) and out else out
    seen = Operation(module, name, seconds=seconds)
    if not isinstance(result, torch.Tensor) or not (result.is_floating_point() or _of_integers(name, given)):
        return seen
    count = result.numel()
    rows = count // result.shape[-1] if name in A_ROW and result.dim() and result.shape[-1] else count
    seen = replace(seen, divisions=rows if name in DIVIDING else 0, roots=rows if name in ROOTS else 0)
    if name not in SUMMING or not given:
        return seen

    def call(**others: Any) -> torch.Tensor:
        again = func(**{**given, **others}) if not hasattr(func, "_schema") else _called(func, {**given, **others})
        first: torch.Tensor = again[0] if isinstance(again, (tuple, list)) else again
        return first

    sums = SUMMING[name](given, call)
    if sums.length < 2:
        return seen
    seen = replace(seen, sums=count, length=sums.length)
    return _compared(seen, sums, result) if sums.again is not None else seen


def _of_integers(name: str, given: Arguments) -> bool:
    """A sum of exact compute's numerators, which are int64 and more than a mask's or a position's."""
    x = given.get("self")
    return name == "sum" and isinstance(x, torch.Tensor) and x.dtype == torch.int64


def _called(func: Any, given: Arguments) -> Any:
    """An operation of torch's with its arguments by name; those that are positional only, by place."""
    schema = func._schema.arguments
    places = [given[a.name] for a in schema if not a.kwarg_only]
    return func(*places, **{a.name: given[a.name] for a in schema if a.kwarg_only and a.name in given})


def _compared(seen: Operation, sums: Sums, result: torch.Tensor) -> Operation:
    """The operation with what its sums did in other orders."""
    assert sums.again is not None
    plain = (result if sums.first is None else sums.first()).flatten()
    for order in orders():
        other = sums.again(order).flatten()
        both = (plain.isfinite() & other.isfinite()).nonzero().flatten()
        a, b = plain[both], other[both]
        apart = distance(a, b)
        seen = seen.plus(
            Operation(
                seen.module,
                seen.name,
                calls=0,
                compared=len(both),
                moved=int((apart > 0).sum()),
                distances=_binned(apart),
                largest=float(apart.max()) if len(both) else 0.0,
                shift=float((a.double() - b.double()).abs().sum()),
                scale=float(a.double().abs().sum()),
            )
        )
    return seen


def _binned(apart: torch.Tensor) -> tuple[int, ...]:
    """As `Operation.distances` counts them."""
    bins = torch.where(apart > 0, apart.clamp(min=1).log2().ceil() + 1, 0).long()
    return tuple(bins.bincount().tolist())


INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """How far two tensors of one dtype lie apart, number by number, in ulps: steps from one to the next number of the dtype.

    Returns:
        float64, the same shape. Both zeros are one number. Of integers, their difference.
    """
    if not a.is_floating_point():
        return (a - b).abs().double()
    return (_place(a) - _place(b)).abs().double()


def _place(x: torch.Tensor) -> torch.Tensor:
    """A number's place among the numbers of its dtype, zero's is 0."""
    bits = x.contiguous().view(INTEGERS[x.dtype.itemsize]).to(torch.int64)
    magnitude = bits & ((1 << (8 * x.dtype.itemsize - 1)) - 1)
    return torch.where(bits < 0, -magnitude, magnitude)
