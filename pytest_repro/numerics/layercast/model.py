"""LayerCast on a whole model: which parameters stay in 16 bits, which become FP32, and which cannot be cast.

Matrices (linear layers, embeddings, lm_head, routers, experts) stay in 16 bits as `Weight`; vectors (norms, biases) and
buffers are a thousandth of a model, and become FP32, which loses nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from ...errors import EngineError
from ..fp32 import ieee
from . import product
from .weight import Weight, parameter, stored

Undo = Callable[..., Any]
"""Called with a function and its arguments that take one change back."""

FLOATS = (torch.float32, *product.SIXTEEN_BIT)


def narrowed(tensor: torch.Tensor, to: torch.dtype | None = None) -> torch.Tensor | None:
    """A matrix in 16 bits: as it is, or an FP32 one whose numbers all are bfloat16 or float16 numbers.

    Args:
        tensor: bfloat16, float16 or float32.
        to: round to this dtype if no 16-bit dtype holds the numbers exactly.

    Returns:
        None if rounding would be needed, and was not asked for or would overflow.
    """
    if tensor.dtype in product.SIXTEEN_BIT:
        return tensor
    for dtype in product.SIXTEEN_BIT:
        short = tensor.to(dtype)
        if torch.equal(short.to(tensor.dtype), tensor):
            return short
    rounded = None if to is None else tensor.to(to)
    # A number beyond float16's range would become infinity.
    return rounded if rounded is not None and bool((rounded.isfinite() | ~tensor.isfinite()).all()) else None


@contextmanager
def casting(model: Any, say: Callable[[str], None] = lambda _: None) -> Iterator[None]:
    """LayerCast for a model that is already loaded, FP32 switches included; leaving restores everything, on error too.

    16-bit matrices are shared, not copied (Conv1D's are, since the product wants them transposed). Nests.

    Raises:
        EngineError: names the modules that cannot be cast.
    """
    with ExitStack() as undo:
        undo.enter_context(ieee())
        cast_all(model, undo.callback)
        _settle(model, undo.callback)
        for device in {p.device for p in model.parameters()}:
            product.prepare(device, say)
        yield


def refusal(names: list[str], why: str) -> EngineError:
    """The error that names what cannot be cast."""
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return EngineError(f"layercast cannot cast {shown}: {why}")


def check_settings(model: Any) -> None:
    """Refuse what would leave FP32 by another door.

    Raises:
        EngineError: with the setting.
    """
    packed = getattr(model, "hf_quantizer", None)
    method = packed.quantization_config.quant_method if packed is not None else "layercast"
    if method != "layercast":
        raise EngineError(f"layercast needs plain 16-bit weights, and this model's are packed by {method}")
    for module in model.modules():
        attention = str(getattr(getattr(module, "config", None), "_attn_implementation", ""))
        if "flash" in attention:
            raise EngineError(
                f"attention {attention!r} computes in 16 bits only, so layercast cannot use it",
                where="[engine.attention]",
                fix='attention = "sdpa" or "eager"',
            )


def cast_all(model: Any, undo: Undo, kept: Callable[[str], bool] = lambda _: False) -> None:
    """Every parameter and buffer in its place's form: matrices as `Weight`, the rest in FP32.

    Args:
        model: any module.
        undo: told how to put each one back.
        kept: of a parameter's name: whether it is held in FP32.

    Raises:
        EngineError: names what cannot be cast.
    """
    check_settings(model)
    wide = {id(tensor) for name, tensor in _named(model) if kept(name)}  # of tied names one is enough
    replaced: dict[int, torch.Tensor] = {}  # tied parameters stay tied
    refused: list[str] = []
    for name, module in model.named_modules():
        for holder in (module._parameters, module._buffers):
            for key, tensor in holder.items():
                if tensor is None or isinstance(tensor, Weight):
                    continue
                if id(tensor) not in replaced:
                    made = _cast(module, tensor, id(tensor) in wide)
                    if made is None:
                        refused.append(f"{name}.{key} ({type(module).__name__}, {tensor.dtype}, {tuple(tensor.shape)})")
                        continue
                    replaced[id(tensor)] = made
                if replaced[id(tensor)] is not tensor:
                    undo(holder.__setitem__, key, tensor)
                    holder[key] = replaced[id(tensor)]
    if refused:
        raise refusal(refused, "its weights are not 16-bit floating-point numbers in this machine's memory")


def _named(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    found: Iterator[tuple[str, torch.Tensor]] = model.named_parameters(remove_duplicate=False)
    return found


def _cast(module: Any, tensor: torch.Tensor, wide: bool) -> torch.Tensor | None:
    """What takes a tensor's place; itself if nothing need be done; None if it cannot be cast.

    Args:
        module: whose it is.
        tensor: a parameter or a buffer.
        wide: whether a matrix is to be held in FP32.
    """
    if not isinstance(tensor, torch.nn.Parameter):
        return tensor.float() if tensor.dtype in product.SIXTEEN_BIT else tensor
    if type(tensor) is not torch.nn.Parameter or tensor.is_meta or tensor.dtype not in FLOATS:
        return None
    if tensor.dim() < 2 or wide:
        return torch.nn.Parameter(tensor.detach().float(), False)
    short = narrowed(tensor.detach())
    if short is not None and type(module).__name__ == "Conv1D" and short.dim() == 2:
        short = short.T.contiguous().T  # it holds (in, out), and the product wants (out, in)
    return None if short is None else parameter(short)


def _settle(model: Any, undo: Undo) -> None:
    """Settings that would work against FP32: the dtype of caches, and experts that multiply in the weights' dtype."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and getattr(config, "dtype", None) in product.SIXTEEN_BIT:
            undo(setattr, config, "dtype", config.dtype)
            config.dtype = torch.float32
    settle_experts(model, undo)


def settle_experts(model: Any, undo: Undo) -> None:
    """Fused experts one by one: grouped products would upcast every expert's weights to serve a few."""
    for module in model.modules():
        config = getattr(module, "config", None)
        current = getattr(config, "_experts_implementation", None)
        if current not in (None, "eager"):
            undo(setattr, config, "_experts_implementation_internal", current)
            config._experts_implementation_internal = "eager"  # type: ignore[union-attr]


def weight_bytes(model: Any) -> int:
    """Bytes of a model's parameters and buffers as they lie in memory; what is tied counts once."""
    tensors = {}
    for tensor in (*model.parameters(), *model.buffers()):
        plain = stored(tensor)
        tensors[plain.untyped_storage().data_ptr()] = plain.untyped_storage().nbytes()
    return sum(tensors.values())
