"""Defects that can be put into a loaded transformers model of Llama's kind, each at several strengths, and taken out again.

Each is a context manager over an engine; what it changed is restored on leaving. `REQUESTS` are defects of the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from pytest_repro.generation import Request

Defect = Callable[[Any], AbstractContextManager[None]]
LAYER = 15
"""Of SmolLM2's 30: where single-module defects go."""


@contextmanager
def weights(
    engine: Any, change: Callable[[torch.Tensor, str], torch.Tensor], wanted: Callable[[str], bool]
) -> Iterator[None]:
    """Weights of linear layers changed in place; what lies in memory keeps its dtype."""
    kept: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for name, module in engine.model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head" and wanted(name):
                kept[name] = module.weight.data
                module.weight.data = change(module.weight.data.float(), name).to(module.weight.dtype)
    try:
        yield
    finally:
        for name, data in kept.items():
            engine.model.get_submodule(name).weight.data = data


@contextmanager
def outputs(
    engine: Any, change: Callable[[torch.Tensor, str], torch.Tensor], wanted: Callable[[str], bool]
) -> Iterator[None]:
    """Outputs of modules changed on the way."""

    def hook(name: str, _module: Any, _args: Any, out: Any) -> Any:
        first = out[0] if isinstance(out, tuple) else out
        changed = change(first, name)
        return (changed, *out[1:]) if isinstance(out, tuple) else changed

    handles = [
        module.register_forward_hook(partial(hook, name))
        for name, module in engine.model.named_modules()
        if wanted(name)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def rounded(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Symmetric rounding to so many bits, a scale for each row (the last axis)."""
    top = 2 ** (bits - 1) - 1
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / top
    return (x / scale).round().clamp(-top, top) * scale


def quantised(bits: int) -> Defect:
    return lambda e: weights(e, lambda w, _: rounded(w, bits), lambda _: True)


def kv_quantised(bits: int) -> Defect:
    def change(x: torch.Tensor, _: str) -> torch.Tensor:
        heads = x.unflatten(-1, (-1, 64)).float()
        return rounded(heads, bits).flatten(-2).to(x.dtype)

    return lambda e: outputs(e, change, lambda n: n.endswith(("k_proj", "v_proj")))


def rope(factor: float) -> Defect:
    @contextmanager
    def inside(engine: Any) -> Iterator[None]:
        rotary = engine.model.model.rotary_emb
        kept = rotary.inv_freq
        base = engine.model.config.rope_parameters["rope_theta"]
        exponent = -torch.log(kept.double()) / np.log(base)
        rotary.inv_freq = (1.0 / (base * factor) ** exponent).to(kept.dtype)
        try:
            yield
        finally:
            rotary.inv_freq = kept

    return inside


def norm_epsilon(epsilon: float) -> Defect:
    @contextmanager
    def inside(engine: Any) -> Iterator[None]:
        norms = [m for m in engine.model.modules() if hasattr(m, "variance_epsilon")]
        kept = [m.variance_epsilon for m in norms]
        assert norms
        for norm in norms:
            norm.variance_epsilon = epsilon
        try:
            yield
        finally:
            for norm, before in zip(norms, kept, strict=True):
                norm.variance_epsilon = before

    return inside


def scaled(factor: float, module: str = f"model.layers.{LAYER}.mlp.down_proj") -> Defect:
    return lambda e: outputs(e, lambda x, _: x * factor, lambda n: n == module)


def noisy(strength: float, module: str = f"model.layers.{LAYER}.mlp.down_proj") -> Defect:
    def change(w: torch.Tensor, _: str) -> torch.Tensor:
        noise = torch.randn(w.shape, generator=torch.Generator().manual_seed(0))
        return w + strength * w.std() * noise

    return lambda e: weights(e, change, lambda n: n == module)


def swapped_heads(first: int, second: int) -> Defect:
    def change(w: torch.Tensor, _: str) -> torch.Tensor:
        heads = w.clone().unflatten(1, (-1, 64))
        heads[:, [first, second]] = heads[:, [second, first]]
        return heads.flatten(1)

    return lambda e: weights(e, change, lambda n: n == f"model.layers.{LAYER}.self_attn.o_proj")


def lora(strength: float) -> Defect:
    """A low-rank difference left in the query and value projections, its norm a share of the weight's."""

    def change(w: torch.Tensor, name: str) -> torch.Tensor:
        seed = torch.Generator().manual_seed(len(name) + sum(map(ord, name)))
        delta = torch.randn(w.shape[0], 8, generator=seed) @ torch.randn(8, w.shape[1], generator=seed)
        return w + strength * w.norm() / delta.norm() * delta

    return lambda e: weights(e, change, lambda n: n.endswith(("q_proj", "v_proj")))


def logit_scale(factor: float) -> Defect:
    return lambda e: outputs(e, lambda x, _: x * factor, lambda n: n == "lm_head")


MODEL: dict[str, Defect] = {
    **{f"weights at {b} bits": quantised(b) for b in (10, 8, 6, 5, 4)},
    **{f"KV cache at {b} bits": kv_quantised(b) for b in (8, 6, 4)},
    **{f"RoPE base x {f:g}": rope(f) for f in (0.999, 0.99, 0.97, 0.9, 0.5)},
    **{f"norm epsilon {e:g}": norm_epsilon(e) for e in (9e-6, 5e-6, 1e-6, 1e-4)},
    **{f"one layer x {f:g}": scaled(f) for f in (0.9999, 0.999, 0.99, 0.98, 0.9, 0.5)},
    **{f"one layer + noise {s:g}": noisy(s) for s in (0.001, 0.01, 0.05, 0.2)},
    "two heads swapped": swapped_heads(0, 5),
    **{f"stale LoRA {s:g}": lora(s) for s in (0.001, 0.01, 0.05)},
    **{f"logits x {f:g}": logit_scale(f) for f in (1.0001, 1.001, 1.01, 1.1)},
}  # fmt: skip


# --- defects of decoding ----------------------------------------------------------------------------------------------


@contextmanager
def generation(engine: Any, **settings: Any) -> Iterator[None]:
    """Settings of the model's own `generate`, which nobody asked for."""
    config = engine.model.generation_config
    kept = {name: getattr(config, name) for name in settings}
    for name, value in settings.items():
        setattr(config, name, value)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(config, name, value)


@contextmanager
def padding_seen(engine: Any) -> Iterator[None]:
    """An attention mask off by one under left padding: the last padding token is seen."""
    generate = engine.model.generate

    def off_by_one(**arguments: Any) -> Any:
        mask = arguments["attention_mask"].clone()
        first = mask.argmax(-1)
        rows = first > 0
        mask[rows, first[rows] - 1] = 1
        return generate(**{**arguments, "attention_mask": mask})

    engine.model.generate = off_by_one
    try:
        yield
    finally:
        del engine.model.generate


DECODING: dict[str, Defect] = {
    **{f"repetition penalty {p:g}": partial(generation, repetition_penalty=p) for p in (1.001, 1.01, 1.1)},
    "stops after 64 tokens": partial(generation, max_new_tokens=64),
    "attention mask off by one": padding_seen,
}


# --- defects of the prompt --------------------------------------------------------------------------------------------


def _prefixed(tokens: list[int]) -> Callable[[Request], Request]:
    return lambda r: replace(r, tokens=np.concatenate([np.asarray(tokens, np.int32), r.tokens]))


def _without_first(request: Request) -> Request:
    return replace(request, tokens=request.tokens[1:])


def _without_last(request: Request) -> Request:
    return replace(request, tokens=request.tokens[:-1])


def prompts(engine: Any) -> dict[str, Callable[[Request], Request]]:
    """Name -> what becomes of a request."""
    tokenizer = engine.tokenizer
    begin, end = tokenizer.encode("<|im_start|>")[:1], tokenizer.encode("<|im_end|>")[:1]
    system = tokenizer.encode(
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    )

    def other_system(text: str) -> Callable[[Request], Request]:
        mine = tokenizer.encode(f"<|im_start|>system\n{text}<|im_end|>\n")

        def change(request: Request) -> Request:
            assert request.tokens[: len(system)].tolist() == system
            return replace(request, tokens=np.concatenate([np.asarray(mine, np.int32), request.tokens[len(system) :]]))

        return change

    return {
        "BOS missing": _without_first,
        "BOS doubled": _prefixed(begin),
        "a padding token seen on the left": _prefixed(end),
        "no system prompt": lambda r: replace(r, tokens=r.tokens[len(system) :]),
        "system prompt without its last word": other_system(
            "You are a helpful AI assistant named SmolLM, trained by Hugging"
        ),
        "another system prompt": other_system("You are a helpful assistant."),
        "template without its last newline": _without_last,
    }
