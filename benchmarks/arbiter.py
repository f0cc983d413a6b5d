"""How far golden and candidate lie from the FP32 answer, under benign changes and under real ones.

    python benchmarks/arbiter.py

Every case replays golden/word-problems' bf16 golden in bf16 with something changed, then under LayerCast on the same
weights. Figures are the candidate's distance over the golden's, prompt by prompt. `docs/decisions/0006-arbiter.md` rests
on them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _report import publish

from pytest_repro import asking, models, numerics, store, suite
from pytest_repro.arbiter import ALPHA, arbitrate
from pytest_repro.engines.base import Spec, opener

SUITE = Path(__file__).parent.parent / "golden" / "word-problems"


def linears(model: Any) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not model.lm_head]


@contextmanager
def eager(model: Any) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    yield
    model.set_attn_implementation(before)


def scaled(factor: float) -> Callable[[Any], Any]:
    """A kernel whose output is off: the weights are as they were."""

    @contextmanager
    def change(model: Any) -> Iterator[None]:
        layer = model.model.layers[15].mlp.down_proj
        hook = layer.register_forward_hook(lambda module, inputs, output: output * factor)
        yield
        hook.remove()

    return change


@contextmanager
def int8_weights(model: Any) -> Iterator[None]:
    """Weights quantised on the fly by the candidate's kernels; the checkpoint is the same."""
    before = [(layer, layer.weight.data) for layer in linears(model)]
    for layer, weight in before:
        scale = weight.float().abs().amax(1, keepdim=True) / 127
        layer.weight.data = ((weight.float() / scale).round() * scale).to(weight.dtype)
    yield
    for layer, weight in before:
        layer.weight.data = weight


@contextmanager
def fp8_activations(model: Any) -> Iterator[None]:
    def narrow(module: Any, inputs: Any) -> Any:
        return (inputs[0].to(torch.float8_e4m3fn).to(inputs[0].dtype),)

    hooks = [layer.register_forward_pre_hook(narrow) for layer in linears(model)]
    yield
    for hook in hooks:
        hook.remove()


@contextmanager
def other_weights(model: Any) -> Iterator[None]:
    """The model itself is another one: the FP32 answer moves with the candidate. Never undone: the last case."""
    layer = model.model.layers[15].mlp.down_proj
    layer.weight.data = (layer.weight.data.float() * 0.5).to(layer.weight.dtype)
    yield


CASES: dict[str, Callable[[Any], Any]] = {
    "benign: replay": lambda model: nullcontext(),
    "benign: eager attention": eager,
    "one layer's output x 0.98": scaled(0.98),
    "one layer's output x 0.9": scaled(0.9),
    "8-bit weights in the kernels": int8_weights,
    "8-bit activations (e4m3)": fp8_activations,
    "other weights (one layer halved)": other_weights,
}


def main() -> None:
    asked, golden = suite.load(SUITE), store.Place(SUITE, "bf16").read()
    files = models.resolve(asked.model, SUITE, print)
    spec = Spec(numerics.mode("bf16"), asked.max_new_tokens, SUITE, files)
    figures: dict[str, Any] = {}
    with opener("transformers")(spec) as engine:
        requests = asking.asked(engine, asked, golden)
        for name, change in CASES.items():
            with change(engine.model):  # type: ignore[attr-defined]
                candidate = {s.id: s for s in engine.replay(requests)}
            fp32 = {s.id: s for s in engine.replay_fp32(requests) or ()}
            found = arbitrate(golden.generation, candidate, fp32).values()
            ratios = [a.candidate_distance / a.golden_distance for a in found]
            figures[name] = {
                "ratio, least": round(min(ratios), 2),
                "median": round(float(np.median(ratios)), 2),
                "largest": round(max(ratios), 2),
                "p <= alpha": sum(a.p_value <= ALPHA for a in found),
                "findings": dict(Counter(str(a.finding) for a in found)),
            }
    publish("arbiter", figures)


if __name__ == "__main__":
    main()
