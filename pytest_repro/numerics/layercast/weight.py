"""A 16-bit weight that takes part in FP32 arithmetic, whatever module it belongs to.

`Weight` is a tensor subclass. To the model it looks like a float32 parameter; its storage stays bfloat16 or float16. What
a module does with it decides what happens: a product with it becomes the LayerCast product, a look-up becomes rows in
FP32, a view of it stays a `Weight`, and any other operation sees it upcast for that one operation. So nothing depends on
the class of the module: linear layers, GPT-2's Conv1D, routers and fused experts are all served, and none can be missed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from . import product

Rule = Callable[..., Any]


class Weight(torch.Tensor):
    """16-bit storage, FP32 arithmetic. Made by `wrap`; for inference only."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Give every function its rule; without one, the weight is upcast for it."""
        rule = RULES.get(func)
        if rule is not None:
            return rule(func, *args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__"):
            return _as_stored(func, *args, **(kwargs or {}))
        kwargs = dict(kwargs or {})
        target = kwargs.get("out")
        if _IN_PLACE.fullmatch(name):
            target = args[0] if args else next(iter(kwargs.values()))
        if _holds(target):
            # Not a TypeError: torch's operators take that for `not implemented`, and `w += 1` would compute `w + 1`.
            raise RuntimeError(f"a LayerCast weight is read-only: {name} would change it")
        return func(*map(_upcast, args), **{key: _upcast(value) for key, value in kwargs.items()})


def wrap(stored: torch.Tensor) -> Weight:
    """A 16-bit tensor as a weight that shares its storage."""
    with torch._C.DisableTorchFunctionSubclass():
        return stored.detach().as_subclass(Weight)


def parameter(stored: torch.Tensor) -> torch.nn.Parameter:
    """The same, as a module's parameter."""
    made: Any = wrap(stored)
    made._is_param = True  # torch's own mark of a parameter that is a tensor subclass
    return made  # type: ignore[no-any-return]


def stored(weight: torch.Tensor) -> torch.Tensor:
    """The 16-bit tensor behind a weight, sharing its storage; any other tensor as it is."""
    if not isinstance(weight, Weight):
        return weight
    with torch._C.DisableTorchFunctionSubclass():
        return weight.as_subclass(torch.Tensor)


_IN_PLACE = re.compile(r".*[^_]_|__setitem__|__i(add|sub|mul|truediv|div|floordiv|mod|pow|and|or|xor|lshift|rshift)__")
"""Names of functions that change their first argument."""


def _holds(value: Any) -> bool:
    return isinstance(value, Weight) or (isinstance(value, (list, tuple)) and any(map(_holds, value)))


def _upcast(value: Any) -> Any:
    if isinstance(value, Weight):
        return stored(value).float()
    if isinstance(value, (list, tuple)) and any(isinstance(v, Weight) for v in value):
        return type(value)(map(_upcast, value))
    return value


def _as_stored(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Metadata and settings: of the tensor as it lies in memory."""
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _view(func: Any, *args: Any, **kwargs: Any) -> Any:
    weight, *args = args if args else (kwargs.pop("input"),)  # type: ignore[assignment]
    if not isinstance(weight, Weight):
        return func(weight, *map(_upcast, args), **kwargs)
    if any(isinstance(a, torch.dtype) for a in (*args, *kwargs.values())):
        return func(_upcast(weight), *args, **kwargs)
    found = func(stored(weight), *args, **kwargs)
    return type(found)(map(wrap, found)) if isinstance(found, (list, tuple)) else wrap(found)


def _linear(func: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    bias = _upcast(bias)
    if isinstance(weight, Weight) and not isinstance(input, Weight) and input.dtype == torch.float32:
        # Called for every layer of every token: within this the weight is the 16-bit tensor that lies in memory.
        with torch._C.DisableTorchFunctionSubclass():
            if weight.dim() == 2:
                return product.linear(input, weight, bias)
    return F.linear(_upcast(input), _upcast(weight), bias)


def _matmul(func: Any, *args: Any, **kwargs: Any) -> Any:
    """x W: a product if W lies transposed, as (out, in), in memory."""
    match args:
        case [x, Weight() as weight] if not kwargs and not isinstance(x, Weight) and weight.dim() == 2:
            return _linear(F.linear, x, weight.T)
    return func(*map(_upcast, args), **{key: _upcast(value) for key, value in kwargs.items()})


def _addmm(func: Any, *args: Any, **kwargs: Any) -> Any:
    """b + x W, as GPT-2's Conv1D has it."""
    match args:
        case [bias, x, Weight() as weight] if (
            not kwargs and not isinstance(x, Weight) and bias.shape == weight.shape[1:]
        ):
            return _linear(F.linear, x, weight.T, bias)
    return func(*map(_upcast, args), **{key: _upcast(value) for key, value in kwargs.items()})


def _embedding(
    func: Any, input: torch.Tensor, weight: torch.Tensor, padding_idx: Any = None, max_norm: Any = None, *args: Any,
    **kwargs: Any,
) -> torch.Tensor:  # fmt: skip
    if max_norm is not None:  # it would renormalise the stored rows
        return F.embedding(input, _upcast(weight), padding_idx, max_norm, *args, **kwargs)
    return F.embedding(input, stored(weight), padding_idx, None, *args, **kwargs).float()


def _rows(func: Any, weight: torch.Tensor, indices: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    rows: torch.Tensor = func(stored(weight), indices, *args, **kwargs)
    return rows.float()


def _to(func: Any, weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """To another device, or to the float32 that it is, it stays a weight; to another dtype it becomes a plain tensor."""
    kwargs = {key: _upcast(value) for key, value in kwargs.items()}
    args = tuple(map(_upcast, args))
    if not isinstance(weight, Weight):
        return func(weight, *args, **kwargs)
    dtypes = [getattr(a, "dtype", a) for a in (*args, *kwargs.values())]
    if any(isinstance(d, torch.dtype) and d != torch.float32 for d in dtypes):
        return func(stored(weight), *args, **kwargs)
    short = stored(weight).dtype

    def as_stored(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return torch.empty(0, dtype=short, device=value.device)
        return short if value is torch.float32 else value

    return wrap(func(stored(weight), *map(as_stored, args), **{key: as_stored(value) for key, value in kwargs.items()}))


def _set_data(func: Any, weight: torch.Tensor, value: torch.Tensor) -> None:
    """What `Module.to` does with the tensor that it moved."""
    if isinstance(weight, Weight) and not isinstance(value, Weight):
        raise TypeError("a LayerCast weight stays in 16 bits: load the model in another dtype instead")
    _as_stored(func, weight, stored(value))


def _set_requires_grad(func: Any, weight: torch.Tensor, value: bool) -> None:
    _requires_grad_(func, weight, value)


def _data_ptr(func: Any, weight: torch.Tensor) -> int:
    """Who goes by dtype and address, as safetensors and Triton do, would read 4 bytes of each 2-byte number."""
    raise TypeError("a LayerCast weight says float32 and is stored in 16 bits: take the address of stored(weight)")


def _deepcopy(func: Any, weight: torch.Tensor, memo: dict[int, Any]) -> Any:
    if id(weight) not in memo:
        copy = wrap(stored(weight).clone())
        if getattr(weight, "_is_param", False):
            copy._is_param = True
        memo[id(weight)] = copy
    return memo[id(weight)]


def _requires_grad_(func: Any, weight: torch.Tensor, requires_grad: bool = True) -> torch.Tensor:
    if requires_grad:
        raise TypeError("a LayerCast weight cannot be trained: load the model in FP32 or BF16 for that")
    return weight


def _reduce(func: Any, weight: torch.Tensor, protocol: Any) -> Any:
    """A parameter comes back as one; what a state dictionary holds, as the 16-bit tensor of the checkpoint."""
    if getattr(weight, "_is_param", False):
        return parameter, (stored(weight),)
    return func(stored(weight), protocol)


def _stored_only(func: Any, weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Printing: of the 16-bit tensor."""
    return func(stored(weight), *args, **kwargs)


_tensor: Any = torch.Tensor
_RULED: list[tuple[Rule, list[Any]]] = [
    (lambda func, weight: torch.float32, [_tensor.dtype.__get__]),
    (_linear, [F.linear]),
    (_matmul, [torch.matmul, torch.mm, _tensor.matmul, _tensor.mm, _tensor.__matmul__]),
    (_addmm, [torch.addmm, _tensor.addmm]),
    (_embedding, [F.embedding]),
    (_rows, [torch.embedding]),
    (lambda func, weight, *_, **__: weight, [_tensor.float]),
    (_set_data, [_tensor.data.__set__]),
    (_set_requires_grad, [_tensor.requires_grad.__set__]),
    (_data_ptr, [_tensor.data_ptr]),
    (_to, [_tensor.to, _tensor.cuda, _tensor.cpu]),
    (_deepcopy, [_tensor.__deepcopy__]),
    (_requires_grad_, [_tensor.requires_grad_]),
    (_reduce, [_tensor.__reduce_ex__]),
    (_stored_only, [_tensor.__repr__, _tensor.__format__]),
    (
        _view,
        [
            _tensor.T.__get__, _tensor.mT.__get__, _tensor.H.__get__, _tensor.mH.__get__,
            torch.permute, torch.reshape, _tensor.data.__get__, _tensor.__getitem__, _tensor.detach, _tensor.t,
            _tensor.transpose, _tensor.permute, _tensor.view, _tensor.reshape, _tensor.contiguous, _tensor.clone,
            _tensor.chunk, _tensor.split, _tensor.unbind, _tensor.narrow, _tensor.select, _tensor.squeeze,
            _tensor.unsqueeze, _tensor.pin_memory, torch.transpose, torch.t, torch.chunk, torch.split, torch.unbind,
            torch.narrow, torch.clone, torch.detach,
        ],
    ),
    (
        _as_stored,
        [
            _tensor.size, _tensor.dim, _tensor.numel, _tensor.nelement, _tensor.element_size, _tensor.stride,
            _tensor.storage_offset, _tensor.untyped_storage, _tensor.share_memory_, _tensor.is_shared,
            _tensor.is_pinned, _tensor.detach_, _tensor.is_contiguous, _tensor.__len__,
            _tensor.__hash__, _tensor.is_floating_point, _tensor.is_complex, _tensor.get_device, torch.numel,
            torch.is_floating_point, torch.is_complex,
        ],
    ),
]  # fmt: skip
RULES: dict[Any, Rule] = {func: rule for rule, functions in _RULED for func in functions}
"""What a function does when a weight is among its arguments."""
