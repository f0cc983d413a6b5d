"""What looks on in vLLM's worker processes, where the model lies: an extension of vLLM's own worker class.

vLLM mixes `Observer` into its worker (`worker_extension_cls`); its methods are called by name, in every worker. They
answer in JSON: an answer that vLLM cannot carry from process to process would be waited for without end.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch
from torch.nn.modules import module as hooks

from .. import numerics, precision, probe


class Observer:
    """Methods of vLLM's worker, beside its own."""

    def repro_enter(self, mode: str) -> str:
        """Set a numerics mode's switches for as long as this process lives."""
        self.repro_switches = ExitStack()
        self.repro_switches.enter_context(numerics.mode(mode).switches())
        return json.dumps(mode)

    def repro_facts(self) -> str:
        """The machine as this process sees it, and what vLLM chose for it."""
        worker: Any = self
        layers = worker.vllm_config.compilation_config.static_forward_context.values()
        backends = {layer.attn_backend.get_name() for layer in layers if hasattr(layer, "attn_backend")}
        return json.dumps(
            {
                **probe.torch_facts(torch.device(worker.device)),
                "attention": ", ".join(sorted(backends)) or "none",
                "kv_cache_dtype": _narrowest(worker.model_runner.kv_caches),
            }
        )

    def repro_layers(self) -> str:
        """The worst of the linear layers under crafted operands (one or two of every kind), and one that took none."""
        worker: Any = self
        with torch.inference_mode():
            seen = [_layer(worker, name, layer) for name, layer in _kinds(worker.model_runner.get_model())]
        unseen = [o for o in seen if o.compute_class == "unknown"]
        known = sorted((o for o in seen if o not in unseen), key=lambda o: (o.product_bits, o.sum_bits))
        return json.dumps([asdict(o) for o in (*known[:1], *unseen[:1])])

    def repro_watch(self) -> str:
        """Look at every module's answer from now on."""
        self.repro_watching = _Watch(self)
        return json.dumps(None)

    def repro_watched(self) -> str:
        """What was seen since, and what lies in the cache; looking ends."""
        return json.dumps([asdict(seen) for seen in self.repro_watching.ended()])

    def repro_weight_bytes(self) -> str:
        """Memory of the model's parameters and buffers, each counted once."""
        worker: Any = self
        model = worker.model_runner.get_model()
        held = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
        return json.dumps(sum(held.values()))


def _kinds(model: Any) -> list[tuple[str, Any]]:
    """The first and the last linear layer of each kind (class, method, shape)."""
    first: dict[tuple[Any, ...], tuple[str, Any]] = {}
    last: dict[tuple[Any, ...], tuple[str, Any]] = {}
    for name, layer in model.named_modules():
        method = getattr(layer, "quant_method", None)
        width, count = (getattr(layer, f"{side}_size_per_partition", None) for side in ("input", "output"))
        if method is None or width is None or count is None or _only_looked_up(layer, model):
            continue
        kind = (type(layer), type(method), width, count)
        first.setdefault(kind, (name, layer))
        last[kind] = (name, layer)
    return list({name: (name, layer) for name, layer in (*first.values(), *last.values())}.values())


def _only_looked_up(layer: Any, model: Any) -> bool:
    """An embedding that nothing is multiplied by."""
    return "Embedding" in type(layer).__name__ and getattr(model, "lm_head", None) is not layer


def _layer(worker: Any, name: str, layer: Any) -> precision.Observation:
    def apply(x: Any) -> Any:
        return layer.quant_method.apply(layer, x, None)

    width, count = layer.input_size_per_partition, layer.output_size_per_partition
    try:
        return precision.observe_layer(name, apply, width, count, worker.vllm_config.model_config.dtype, worker.device)
    except Exception as exc:  # a method of quantisation with a calling convention of its own: unseen, and not the end
        return precision.Observation("unknown", 0.0, 0.0, f"{name} ({type(layer).__name__}) took no operands: {exc}")


class _Watch:
    """Hooks on every module, for one prompt of a few tokens."""

    def __init__(self, worker: Any) -> None:
        self.worker = worker
        self.names = {id(module): name for name, module in worker.model_runner.get_model().named_modules()}
        layers = worker.vllm_config.compilation_config.static_forward_context.items()
        self.unseen = {name: type(layer).__name__ for name, layer in layers if hasattr(layer, "impl")}
        self.narrow: list[precision.Observation] = []
        self.attention: list[precision.Observation] = []
        self.handle = hooks.register_module_forward_hook(self.saw)

    def saw(self, module: Any, inputs: Any, out: Any) -> None:
        """One module's answer. Whatever cannot be looked at stays unseen: a hook must not end the forward pass."""
        name = self.names.get(id(module))
        if name is None:
            return
        if (narrow := precision.observe_narrow(name, out)) is not None:
            self.narrow.append(narrow)
        if hasattr(module, "impl"):
            try:
                found = _attention(name, module, inputs, out)
            except Exception:
                return
            if found is not None:
                self.attention.append(found)
                self.unseen.pop(getattr(module, "layer_name", name), None)

    def ended(self) -> list[precision.Observation]:
        """What counts: the first narrow answer, the worst attention, a narrow cache, and attention that was not seen."""
        self.handle.remove()
        found = [*self.narrow[:1], *sorted(self.attention, key=lambda o: o.sum_bits)[:1]]
        cache = _narrowest(self.worker.model_runner.kv_caches)
        bits = float(precision.DTYPE_BITS.get(cache, 0))
        if cache != "none" and bits < 24:
            kind = {"bfloat16": "bf16", "float16": "fp16"}.get(cache, "lower")
            found.append(precision.Observation(kind, bits, bits, f"the KV cache holds {cache}"))
        if self.unseen:
            name, kind = next(iter(self.unseen.items()))
            why = f"{name} ({kind}) was not seen: a compiled model (enforce_eager = true shows it), or a kind that is not known"
            found.append(precision.Observation("unknown", 0.0, 0.0, why))
        return found


def _attention(name: str, module: Any, inputs: Any, out: Any) -> precision.Observation | None:
    """Plain causal attention held against float64; None for position biases, sinks, other widths, or keys from elsewhere."""
    impl, (q, k, v) = module.impl, inputs[:3]
    biased = getattr(impl, "alibi_slopes", None) is not None or getattr(impl, "sinks", None) is not None
    if biased or k is None or v is None or getattr(module, "head_size_v", module.head_size) != module.head_size:
        return None
    q, k, v, answer = (t.reshape(len(inputs[0]), -1, module.head_size) for t in (q, k, v, out))
    cap = float(getattr(impl, "logits_soft_cap", 0) or 0)
    return precision.observe_attention(name, q, k, v, answer, float(impl.scale), cap)


def _narrowest(caches: Any) -> str:
    """The narrowest dtype among caches, `none` without one."""
    tensors = [t for cache in caches for t in (cache if isinstance(cache, (list, tuple)) else (cache,))]
    names = {str(t.dtype).removeprefix("torch.") for t in tensors}
    return min(names, key=lambda name: precision.DTYPE_BITS.get(name, 0), default="none")
