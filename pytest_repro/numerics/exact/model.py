"""Exact compute for a whole loaded model of transformers, and back.

Leaves that compute (linear layers, embeddings, norms, activations, rotary tables) are given another forward pass;
attention goes through transformers' own interface. What lies between is left as it is: transposes, residual additions,
gates and rotations act number by number, and IEEE 754 fixes their bits. `proof` watches that nothing else computes.

A leaf is known by what it is made of and by what it computes: norms, activations and rotary tables are held against
their own forward pass before they are replaced, so that a class of the same name with another formula is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from ...errors import EngineError
from ..fp32 import ieee
from ..layercast.model import Undo, narrowed
from . import operations, proof, rotary

Forward = Callable[..., Any]
ROUND = 'round_weights = "bfloat16" under [engine], or the numerics mode fp32'
NEARLY = 1e-5
"""Relative difference from a module's own forward pass that FP32's rounding makes, and another formula exceeds."""


@contextmanager
def computing(
    model: Any, round_weights: str | None = None, say: Callable[[str], None] = lambda _: None
) -> Iterator[None]:
    """Exact compute while the context holds; leaving restores everything, on error too. Nests.

    Weights stay in 16 bits and are shared, not copied, unless one lies outside the grid of its block
    (`operations.on_grid`). A forward pass of a few tokens is watched before the context is entered.

    Args:
        model: of transformers, loaded on a CPU.
        round_weights: "bfloat16" or "float16": round weights that were never 16-bit numbers.
        say: told before something that takes long.

    Raises:
        EngineError: names the modules that exact compute does not know, and what computes besides.
    """
    with ExitStack() as undo:
        undo.enter_context(ieee())
        operations.prepare(say)
        _replace_leaves(model, round_weights, undo.callback)
        _take_attention(model, undo.callback)
        proof.nothing_else_computes(model)
        yield


def _replace_leaves(model: Any, round_weights: str | None, undo: Undo) -> None:
    made: dict[int, torch.Tensor] = {}  # tied weights stay tied
    unknown = []
    for name, module in model.named_modules():
        if type(module) in (torch.nn.Linear, torch.nn.Embedding):
            weight = module.weight
            if id(weight) not in made:
                made[id(weight)] = _sixteen_bits(weight.detach(), round_weights, name)
            forward: Forward | None = _of_weight(module, made[id(weight)])
        else:
            forward = _known(name, module)
        if forward is not None:
            _give(module, forward, undo)
        elif _holds_tensors(module):
            unknown.append(f"{name} ({type(module).__name__})")
    if unknown:
        raise EngineError(
            f"exact compute does not know {', '.join(unknown[:8])}" + (" and more" if len(unknown) > 8 else ""),
            fix="--repro-numerics fp32 or layercast, which serve any module",
        )


def _sixteen_bits(weight: torch.Tensor, round_weights: str | None, name: str) -> torch.Tensor:
    if weight.device.type != "cpu":
        raise EngineError(
            f"exact compute runs on a CPU, and {name} lies on {weight.device}", fix='[engine] device = "cpu"'
        )
    to = getattr(torch, round_weights) if round_weights else None
    short = narrowed(weight, to) if weight.dtype.is_floating_point else None
    if short is None:
        what = "its weights are not 16-bit floating-point numbers"
        raise EngineError(f"exact compute cannot take {name}: {what}", fix=ROUND)
    if not bool(short.isfinite().all()):
        raise EngineError(f"exact compute cannot take {name}: a weight is infinite or no number")
    return short


def _of_weight(module: Any, weight: torch.Tensor) -> Forward | None:
    if isinstance(module, torch.nn.Embedding):
        plain = module.max_norm is None and not module.sparse
        return (lambda ids: operations.embedding(ids, weight)) if plain else None
    gridded = operations.on_grid(weight)
    return lambda x: operations.linear(x, gridded, module.bias)


def _known(name: str, module: Any) -> Forward | None:
    """The exact forward pass of a norm, an activation or a rotary module; None for what is none, or computes otherwise."""
    kind = type(module).__name__
    if kind.endswith("RMSNorm") and getattr(module, "weight", None) is not None:
        epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if epsilon is None:
            return None
        return _if_the_same(module, lambda x: operations.rms_norm(x, module.weight, epsilon), len(module.weight))
    if type(module) is torch.nn.LayerNorm and len(module.normalized_shape) == 1:
        return lambda x: operations.layer_norm(x, module.weight, module.bias, module.eps)
    if kind.endswith("RotaryEmbedding") and hasattr(module, "inv_freq"):
        return _rotary(name, module)
    if kind in ACTIVATIONS:
        return _if_the_same(module, ACTIVATIONS[kind], 256)
    return None


ACTIVATIONS: dict[str, Forward] = {
    "SiLU": operations.silu,
    "SiLUActivation": operations.silu,
    "GELUTanh": operations.gelu_tanh,
    "NewGELUActivation": operations.gelu_tanh,
}


def _if_the_same(module: Any, forward: Forward, width: int) -> Forward | None:
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(1910))
    with torch.inference_mode():
        return forward if torch.allclose(forward(x), module(x).float(), rtol=NEARLY, atol=NEARLY) else None


def _rotary(name: str, module: Any) -> Forward | None:
    found = rotary.of(module, name)
    step = max(NEARLY, torch.finfo(module.inv_freq.dtype).eps)  # a model that was cast as a whole had them rounded
    if not torch.allclose(found, module.inv_freq.float().cpu(), rtol=step, atol=0.0):
        return None
    scaling = float(module.attention_scaling)
    return lambda x, position_ids: rotary.tables(found, position_ids, scaling)


def _holds_tensors(module: Any) -> bool:
    return any(t is not None for held in (module._parameters, module._buffers) for t in held.values())


def _give(module: Any, forward: Forward, undo: Undo) -> None:
    """A forward pass of its own for one module."""
    before = module.__dict__.get("forward")
    undo(setattr, module, "forward", before) if before is not None else undo(delattr, module, "forward")
    module.forward = proof.exactly(forward)


def _mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """transformers' mask of yes and no, always whole: leaving it out would leave the choice of tokens to a kernel."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})  # type: ignore[no-any-return]


def _take_attention(model: Any, undo: Undo) -> None:
    AttentionInterface.register("exact", proof.exactly(operations.attend))
    AttentionMaskInterface.register("exact", _mask)
    before = model.config._attn_implementation
    undo(model.set_attn_implementation, before)
    try:
        model.set_attn_implementation("exact")
    except ValueError as exc:
        raise EngineError(f"exact compute cannot take {type(model).__name__}'s attention: {exc}") from None
