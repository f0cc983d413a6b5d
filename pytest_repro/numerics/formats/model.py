"""A whole loaded model in a format, and back: what is rounded where, and the proof that it is.

Rounded are the weights of linear layers, once; their inputs, as they come; and keys and values, as they go into the cache.
As in arXiv 2501.02423 §3.1 embeddings, norms, products inside attention and the classifier are not; everything is computed
in FP32.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from transformers import DynamicCache

from ... import precision
from ...errors import EngineError
from ...precision import Observation
from ..fp32 import ieee
from .quantiser import on_grid, quantised
from .spec import Emulation


class Emulated:
    """A float32 model and what its numbers become in a format; `in_force` puts those in the place of its own.

    Raises:
        EngineError: the model holds matrices that are multiplied outside of linear layers, other than float32 numbers, or has
            no KV cache to round.
    """

    def __init__(self, model: Any, emulation: Emulation) -> None:
        self.model = model
        self.emulation = emulation
        self.layers = linear_layers(model)
        self.paused = False
        """Whether numbers pass unrounded for a moment: the probe looks at the arithmetic beneath."""
        if emulation.rounds("weights") or emulation.rounds("activations"):
            _check_matrices(model, self.layers)
        if emulation.rounds("kv") and "past_key_values" not in inspect.signature(model.forward).parameters:
            raise EngineError(f"{type(model).__name__} has no KV cache to round", fix="leave kv out of the mode's name")
        self.weights = self._rounded_weights() if emulation.rounds("weights") else {}
        """Name of a layer -> its weight, rounded."""
        self.own: dict[str, Any] = {}
        """Name of a layer -> the weight that stood there before the format was in force."""

    def _rounded_weights(self) -> dict[str, torch.nn.Parameter]:
        with torch.no_grad():
            return {
                name: torch.nn.Parameter(_by_output(layer, quantised(weight_of(layer), self.emulation)), False)
                for name, layer in self.layers.items()
            }

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """The format, FP32 switches included; leaving restores what was found, on error too. Nests."""
        with ExitStack() as undo:
            undo.enter_context(ieee())
            undo.callback(setattr, self, "own", self.own)
            self.own = {name: self.layers[name]._parameters["weight"] for name in self.weights}
            for name, weight in self.weights.items():
                held = self.layers[name]._parameters
                undo.callback(held.__setitem__, "weight", held["weight"])
                held["weight"] = weight
            if self.emulation.rounds("activations"):
                for layer in self.layers.values():
                    undo.callback(layer.register_forward_pre_hook(self._input, with_kwargs=True).remove)
            if self.emulation.rounds("kv"):
                undo.callback(self.model.register_forward_pre_hook(self._cached, with_kwargs=True).remove)
            yield

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """The model's own numbers for a moment, while the format is in force: FP32 on the same path."""
        with ExitStack() as undo:
            undo.callback(setattr, self, "paused", self.paused)
            self.paused = True
            for name, weight in self.own.items():
                held = self.layers[name]._parameters
                undo.callback(held.__setitem__, "weight", held["weight"])
                held["weight"] = weight
            yield

    def _round(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.paused else quantised(x, self.emulation)

    def _input(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A linear layer's input, rounded."""
        if args:
            return (self._round(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "input": self._round(kwargs["input"])}

    def _cached(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The model's cache, made to round what goes into it; a pass without one gets one, since attention is to see the same."""
        cache = kwargs.get("past_key_values")
        if cache is None:
            cache = DynamicCache(config=self.model.config)
            kwargs = {**kwargs, "past_key_values": cache, "use_cache": True}
        if self not in (rounders := cache.__dict__.setdefault("_repro_rounders", [])):
            rounders.append(self)
            update = cache.update

            def rounding(keys: torch.Tensor, values: torch.Tensor, *rest: Any, **more: Any) -> Any:
                return update(self._round(keys), self._round(values), *rest, **more)

            cache.update = rounding
        return args, kwargs

    def observe(self) -> Observation:
        """The mode as it is seen while in force: FP32 arithmetic beneath, and every number that is to be rounded on the grid.

        Its class is the emulation's name; `lower`, which nothing claims, where something is not as it should be.
        """
        self.paused = True
        try:
            beneath = precision.observe(self.model)
        finally:
            self.paused = False
        if not beneath.fp32_class:
            return beneath
        astray = self._off_grid()
        bits = float(self.emulation.format.mantissa + 1)
        if astray:
            return Observation("lower", bits, beneath.sum_bits, f"{astray} is not on the grid of {self.emulation.name}")
        what = " and ".join(self.emulation.targets)
        detail = f"{what} of {len(self.layers)} linear layers on the grid; {beneath.detail}"
        return replace(beneath, compute_class=self.emulation.name, product_bits=bits, detail=detail)

    def _off_grid(self) -> str:
        """The first thing that is not on the grid and should be, in a pass of a few tokens; empty if there is none."""
        found: list[str] = []

        def look(name: str, x: torch.Tensor) -> None:
            if not on_grid(x, self.emulation):
                found.append(name)

        with ExitStack() as undo, torch.inference_mode():
            if self.emulation.rounds("weights"):
                for name, layer in self.layers.items():
                    look(f"the weight of {name}", weight_of(layer))
            if self.emulation.rounds("activations"):
                for name, layer in self.layers.items():
                    undo.callback(layer.register_forward_hook(_told(f"the input of {name}", look)).remove)
            out = precision.a_few_tokens(self.model)
            if self.emulation.rounds("kv"):
                held = list(precision.cached(out))
                for layer, what, x in held:
                    look(f"the cache's {what} of layer {layer}", x)
                if not held:
                    found.append("the KV cache, which the model left empty,")
        return next(iter(found), "")


def _told(name: str, look: Any) -> Any:
    def hook(_: Any, args: tuple[Any, ...], out: torch.Tensor) -> None:
        if args:
            look(name, args[0])

    return hook


@contextmanager
def emulating(model: Any, emulation: Emulation) -> Iterator[Emulated]:
    """A loaded float32 model in a format; leaving restores it, on error too.

    Raises:
        EngineError: it cannot be put into the mode.
    """
    emulated = Emulated(model, emulation)
    with emulated.in_force():
        yield emulated


def linear_layers(model: Any) -> dict[str, Any]:
    """Name -> linear layer of a model, the classifier (lm_head) left out."""
    classifier = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {
        name: module
        for name, module in model.named_modules()
        if module is not classifier and (isinstance(module, torch.nn.Linear) or _is_conv1d(module))
    }


def _is_conv1d(module: Any) -> bool:
    """GPT-2's linear layer of transformers, whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def weight_of(layer: Any) -> torch.Tensor:
    """A linear layer's weight, shape (out, in)."""
    weight: torch.Tensor = layer.weight.detach()
    return weight.T if _is_conv1d(layer) else weight


def _by_output(layer: Any, weight: torch.Tensor) -> torch.Tensor:
    """Inverse of `weight_of`, contiguous as a layer's own weight is."""
    return (weight.T if _is_conv1d(layer) else weight).contiguous()


def _check_matrices(model: Any, layers: dict[str, Any]) -> None:
    """Refuse what would be left unrounded in silence.

    Raises:
        EngineError: names it.
    """
    packed = [name for name, layer in layers.items() if layer.weight.dtype != torch.float32]
    if packed:
        raise _refusal(packed, "its weights are not float32 numbers in memory")
    classifier = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    known = {id(m) for m in (*layers.values(), classifier)}
    strange = [
        f"{name}.{key}".lstrip(".")
        for name, module in model.named_modules()
        if id(module) not in known and not isinstance(module, torch.nn.Embedding)
        for key, tensor in module.named_parameters(recurse=False)
        if tensor.dim() > 1
    ]
    if strange:
        raise _refusal(strange, "it is no linear layer's, and would take part unrounded")


def _refusal(names: list[str], why: str) -> EngineError:
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return EngineError(
        f"a format cannot be emulated for {shown}: {why}", fix="a model whose products are linear layers"
    )
