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
    grid: torch.Tensor = (x / scale).round().clamp(-top, top) * scale
    return grid


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
        swapped: torch.Tensor = heads.flatten(1)
        return swapped

    return lambda e: weights(e, change, lambda n: n == f"model.layers.{LAYER}.self_attn.o_proj")


def lora(strength: float) -> Defect:
    """A low-rank difference left in the query and value projections, its norm a share of the weight's."""

    def change(w: torch.Tensor, name: str) -> torch.Tensor:
        seed = torch.Generator().manual_seed(len(name) + sum(map(ord, name)))
        delta = torch.randn(w.shape[0], 8, generator=seed) @ torch.randn(8, w.shape[1], generator=seed)
        changed: torch.Tensor = w + strength * w.norm() / delta.norm() * delta
        return changed

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


# --- defects of a single module -----------------------------------------------------------------------------------


@contextmanager
def _attribute(engine: Any, name: str, field: str, factor: float) -> Iterator[None]:
    module = engine.model.get_submodule(name)
    kept = getattr(module, field)
    setattr(module, field, kept * factor)
    try:
        yield
    finally:
        setattr(module, field, kept)


@contextmanager
def _weight(engine: Any, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    module = engine.model.get_submodule(name)
    kept = module.weight.data
    module.weight.data = change(kept.float()).to(kept.dtype)
    try:
        yield
    finally:
        module.weight.data = kept


def _noise(share: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda w: w + share * w.std() * torch.randn(w.shape, generator=torch.Generator().manual_seed(0))


def _low_rank(share: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(w: torch.Tensor) -> torch.Tensor:
        seed = torch.Generator().manual_seed(1)
        delta = torch.randn(w.shape[0], 8, generator=seed) @ torch.randn(8, w.shape[1], generator=seed)
        changed: torch.Tensor = w + share * w.norm() / delta.norm() * delta
        return changed

    return change


def _one_head_dead(w: torch.Tensor) -> torch.Tensor:
    w = w.clone()
    w[64:128] = 0
    return w


def single(engine_module: str, kind: str, strength: Any) -> Defect:
    """A defect of one module: of its `weight`, of its `output`, or of one of its attributes."""
    if kind == "weight":
        return lambda e: _weight(e, engine_module, strength)
    if kind == "output":
        return lambda e: outputs(e, lambda x, _: strength(x), lambda n: n == engine_module)
    return lambda e: _attribute(e, engine_module, kind, strength)


def _layer(number: int, name: str) -> str:
    return f"model.layers.{number}.{name}"


def _rounded_to(bits: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: rounded(x.float(), bits).to(x.dtype)


def _kv_rounded(x: torch.Tensor) -> torch.Tensor:
    return rounded(x.unflatten(-1, (-1, 64)).float(), 5).flatten(-2).to(x.dtype)


SINGLE: dict[str, tuple[str, Defect]] = {
    name: (module, single(module, kind, strength))
    for name, module, kind, strength in (
        *((f"output x {f:g}", _layer(15, "mlp.down_proj"), "output", lambda x, f=f: x * f) for f in (0.98, 0.9, 0.5)),
        ("attention output x 0.9", _layer(3, "self_attn.o_proj"), "output", lambda x: x * 0.9),
        *((f"gate weights + noise {s:g}", _layer(7, "mlp.gate_proj"), "weight", _noise(s)) for s in (0.05, 0.2)),
        *((f"key weights + noise {s:g}", _layer(20, "self_attn.k_proj"), "weight", _noise(s)) for s in (0.05, 0.2)),
        *((f"LoRA {s:g} left in values", _layer(10, "self_attn.v_proj"), "weight", _low_rank(s)) for s in (0.05, 0.2)),
        *((f"norm weight x {f:g}", _layer(25, "input_layernorm"), "weight", lambda w, f=f: w * f) for f in (1.02, 1.1)),
        ("norm epsilon x 1000", _layer(1, "post_attention_layernorm"), "variance_epsilon", 1000.0),
        *((f"embeddings at {b} bits", "model.embed_tokens", "output", _rounded_to(b)) for b in (8, 5)),
        *((f"logits x {f:g}", "lm_head", "output", lambda x, f=f: x * f) for f in (1.01, 1.1)),
        *((f"up weights at {b} bits", _layer(12, "mlp.up_proj"), "weight", _rounded_to(b)) for b in (8, 5)),
        ("keys at 5 bits", _layer(5, "self_attn.k_proj"), "output", _kv_rounded),
        *((f"attention scale x {f:g}", _layer(18, "self_attn"), "scaling", f) for f in (1.05, 1.3)),
        ("activation x 1.1", _layer(22, "mlp.act_fn"), "output", lambda x: x * 1.1),
        ("one query head dead", _layer(28, "self_attn.q_proj"), "weight", _one_head_dead),
        ("final norm x 1.05", "model.norm", "weight", lambda w: w * 1.05),
    )
} | {
    "two heads swapped": (_layer(LAYER, "self_attn.o_proj"), swapped_heads(0, 5)),
    **{f"RoPE base x {f:g}": ("model.rotary_emb", rope(f)) for f in (0.97, 0.9)},
}  # fmt: skip
"""Name -> the module that is to be named, and its defect."""


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
def sampled(temperature: float, engine: Any) -> Iterator[None]:
    """A sampler in the place of greedy decoding."""
    torch.manual_seed(0)
    with generation(engine, do_sample=True, temperature=temperature, top_k=0):
        yield


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
    **{f"sampler at temperature {t:g}": partial(sampled, t) for t in (0.01, 0.1, 0.3)},
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
