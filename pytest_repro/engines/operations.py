"""What torch runs in a forward pass, by module, timed; and every sum of it once more in other orders.

Seen are torch's own operations, and LayerCast's product. Exact compute is looked at on its way through torch, which gives
the bits of its C++ (`numerics.exact.proof` compares them), not its time.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..audit import Operation, Pass, rolled_up
from ..numerics.layercast import product
from ..precision import inside
from .base import Tick, no_tick
from .reordering import A_ROW, BY_NUMBER, DIVIDING, ROOTS, SUMMING, Arguments, Sums, as_they_are, orders

TIMES = 3
"""How often a pass is timed; the median counts."""
AT_ONCE = 2**22
"""Numbers compared at a time."""
ELSEWHERE = 2.0**63
"""Distance between a number and an infinity or NaN, ulps."""


def passes(model: Any, ids: torch.Tensor, phase: Callable[[str, int], Tick]) -> list[Pass]:
    """A prompt at once, and the token after it: each pass timed, then looked at.

    Args:
        model: of transformers, in its numerics mode.
        ids: shape (1, T), on the model's device.
        phase: told what begins, and how many operations it has.
    """
    with torch.no_grad():
        first = model(input_ids=ids, use_cache=True)
        after, kept = first.logits[:, -1:].argmax(-1), copy.deepcopy(first.past_key_values)
        del first  # of a long prompt, logits are most of what there is
        return [
            _pass("prefill", model, ids, lambda: None, phase),
            _pass("decode", model, after, lambda: copy.deepcopy(kept), phase),
        ]


def _pass(
    what: str, model: Any, ids: torch.Tensor, cache: Callable[[], Any], phase: Callable[[str, int], Tick]
) -> Pass:
    """Each time with a cache of its own, since a pass adds to it. Operations are timed where none is computed again."""

    def run() -> float:
        kept = cache()
        return _timed(lambda: model(input_ids=ids, past_key_values=kept, use_cache=True))[1]

    run()
    seconds = statistics.median(run() for _ in range(TIMES))
    with audited(model, None) as timed:
        run()
    with audited(model, phase(f"{what}: every sum in other orders", len(timed))) as found:
        run()
    operations = (replace(op, seconds=plain.seconds) for op, plain in zip(found, timed, strict=True))
    return Pass(what, ids.shape[-1], seconds, rolled_up(operations))


@contextmanager
def audited(model: Any, tick: Tick | None = no_tick) -> Iterator[list[Operation]]:
    """Look on while the model computes; what it computes is unchanged.

    Args:
        model: any torch module.
        tick: told of each operation; None times operations and computes no sum again.

    Yields:
        Every operation, in its order.
    """
    found: list[Operation] = []
    with torch.no_grad(), inside(model) as modules, _Watch(modules, found, tick) as watch, _own_product(watch):
        yield found


class _Watch(TorchDispatchMode):
    """Every operation that reaches torch's kernels."""

    def __init__(self, modules: list[str], found: list[Operation], tick: Tick | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.modules, self.found, self.tick = modules, found, tick
        self.away = False
        """Whether what runs now is counted elsewhere."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.away:
            return func(*args, **kwargs)
        schema = func._schema.arguments
        given = {a.name: a.default_value for a in schema if a.has_default_value()}
        given |= dict(zip((a.name for a in schema), args, strict=False)) | kwargs
        name = func.overloadpacket.__name__.rstrip("_")
        return self.seen(
            name, lambda: func(*args, **kwargs), given, lambda **others: _first(_called(func, {**given, **others})),
            changed=func._schema.is_mutable,
        )  # fmt: skip

    def seen(
        self,
        name: str,
        run: Callable[[], Any],
        given: Arguments,
        call: Callable[..., torch.Tensor],
        changed: bool = False,
    ) -> Any:
        """Run one operation and note what it did.

        Args:
            name: torch's.
            run: the operation.
            given: its arguments by name.
            call: the operation with some of them replaced.
            changed: whether it writes to its arguments, which cannot be asked for again then.
        """
        out, seconds = _timed(run)
        seen = _counted(Operation(self.modules[-1], name, seconds=seconds), _first(out), given)
        if seen.length and not changed and self.tick is not None and name in SUMMING:
            seen = _compared(seen, SUMMING[name](given, call))
        self.found.append(seen)
        if self.tick is not None:
            self.tick(1)
        return out


@contextmanager
def _own_product(watch: _Watch) -> Iterator[None]:
    """LayerCast's product, of which torch's kernels see nothing, is seen as `linear` while the context holds."""
    plain = product.linear

    def seen(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        given = {"input": x, "weight": weight, "bias": bias}
        watch.away = True
        try:
            found: torch.Tensor = watch.seen(
                "linear", lambda: plain(x, weight, bias), given,
                lambda **o: plain(o.get("input", x), o.get("weight", weight), bias),
            )  # fmt: skip
            return found
        finally:
            watch.away = False

    product.linear = seen
    try:
        yield
    finally:
        product.linear = plain


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    _wait()
    started = time.perf_counter()
    out = call()
    _wait()
    return out, time.perf_counter() - started


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _first(out: Any) -> Any:
    return out[0] if isinstance(out, (tuple, list)) and out else out


def _called(func: Any, given: Arguments) -> Any:
    """An operation of torch's with its arguments by name; those that are positional only, by place."""
    schema = func._schema.arguments
    places = [given[a.name] for a in schema if not a.kwarg_only]
    return func(*places, **{a.name: given[a.name] for a in schema if a.kwarg_only and a.name in given})


def _counted(seen: Operation, result: Any, given: Arguments) -> Operation:
    """The operation with its divisions, roots and sums."""
    name = seen.name
    if not isinstance(result, torch.Tensor) or not (result.is_floating_point() or _of_integers(name, given)):
        return seen
    count = result.numel()
    rows = count // result.shape[-1] if name in A_ROW and result.dim() and result.shape[-1] else count
    seen = replace(seen, divisions=rows if name in DIVIDING else 0, roots=rows if name in ROOTS else 0)
    if name in BY_NUMBER or not count:
        return seen
    length = SUMMING[name](given, _nothing).length if name in SUMMING else 2
    return replace(seen, sums=count, length=length) if length > 1 else seen


def _nothing(**_: Any) -> torch.Tensor:
    raise NotImplementedError


def _of_integers(name: str, given: Arguments) -> bool:
    """A sum of exact compute's numerators, which are int64 and more than a mask's or a position's."""
    x = given.get("self")
    return name == "sum" and isinstance(x, torch.Tensor) and x.dtype == torch.int64


def _compared(seen: Operation, sums: Sums) -> Operation:
    """The operation with what its sums did in other orders; as it is where the kernel does not take them."""
    if sums.again is None:
        return seen
    try:
        plain = sums.again(as_they_are).flatten()
        for order in orders():
            other = sums.again(order).flatten()
            for a, b in zip(plain.split(AT_ONCE), other.split(AT_ONCE), strict=True):
                seen = seen.plus(_between(seen, a, b))
    except (RuntimeError, NotImplementedError) as exc:
        if isinstance(exc, torch.OutOfMemoryError):
            raise
        return replace(seen, compared=0, moved=0, distances=(), largest=0.0, shift=0.0, scale=0.0)
    return seen


def _between(seen: Operation, a: torch.Tensor, b: torch.Tensor) -> Operation:
    """Some results of two orders, beside each other."""
    finite = a.isfinite() & b.isfinite()
    same = (a == b) | (a.isnan() & b.isnan())
    apart = torch.where(finite, distance(a, b), torch.where(same, 0.0, ELSEWHERE))
    zero = torch.zeros((), dtype=torch.float64, device=a.device)
    one, other = (torch.where(finite, x.double(), zero) for x in (a, b))
    return Operation(
        seen.module,
        seen.name,
        calls=0,
        length=seen.length,
        compared=len(a),
        moved=int((apart > 0).sum()),
        distances=_binned(apart),
        largest=float(apart.max()) if len(a) else 0.0,
        shift=float((one - other).square().sum()),
        scale=float(one.square().sum()),
    )


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
    """A number's place among the numbers of its dtype; zero's is 0."""
    bits = x.contiguous().view(INTEGERS[x.dtype.itemsize]).to(torch.int64)
    magnitude = bits & ((1 << (8 * x.dtype.itemsize - 1)) - 1)
    return torch.where(bits < 0, -magnitude, magnitude)
