"""Deferred division, in three ways, on SmolLM2-135M: what popular articles claim of it, held against this machine.

    python benchmarks/deferred_division.py [--rounds 3] [--prompts 16]

standard   softmax, then the weighted values: FP32, as transformers' eager attention has it
sdpa       the same in torch's fused kernel, which is what FP32 runs by default
once       numerators and denominators of each head kept apart in attention, one division at its end
never      no division in attention or the residual stream: heads are brought to a common denominator, residual sums are
           multiplied through, layer after layer, until a norm, which is blind to a factor, divides
exact      integers over powers of two (docs/exact.md)

Each way: seconds of a prefill of 512 tokens (the ways take turns; medians), memory that it needs beyond the loaded model (a process
of its own), largest and mean difference of the logits from a float64 run, and the number of different SHA-256 of all
logits over batch sizes 1, 4, 16 and 1 and 2 threads. For `never`: how large its denominators become.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from _report import publish
from exact_hashes import hashed, opened, padded, sequences

WAYS = ("standard", "sdpa", "once", "never", "exact")
BATCHES, THREADS = (1, 4, 16), (1, 2)
PREFILL, MEMORY_BATCH = 512, 4
CLAIMED = {"speed": 2.12, "memory_saved": 0.26}
"""The proposal's: 2.12 times faster, 26 % less memory, bit-for-bit reproducible, more accurate."""


@contextmanager
def way(model: Any, name: str, growth: dict[int, float] | None = None) -> Iterator[None]:
    """One way of computing, in force on an FP32 model."""
    with ExitStack() as undo:
        if name == "exact":
            from pytest_repro.numerics import exact

            undo.enter_context(exact.computing(model))
        else:
            before = model.config._attn_implementation
            register()
            model.set_attn_implementation({"standard": "eager"}.get(name, name))
            undo.callback(model.set_attn_implementation, before)
            if name == "never":
                undo.enter_context(pairs(model, {} if growth is None else growth))
        yield


def register() -> None:
    """`once` and `never` as transformers' attention interface takes them, with the masks of its eager attention."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    for name, attention in (("once", once), ("never", never)):
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, eager_mask)


def apart(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float) -> tuple[Any, Any]:
    """Numerators, shape (B, H, T, D), and denominators, (B, H, T, 1), of softmax(q k^T) v; the row's largest taken off first."""
    from transformers.models.llama.modeling_llama import repeat_kv

    key, value = (repeat_kv(x, module.num_key_value_groups) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if mask is not None:
        scores = scores + mask
    shares = (scores - scores.amax(-1, keepdim=True)).exp()
    return shares @ value, shares.sum(-1, keepdim=True)


def once(
    module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, dropout: float = 0.0, **_: Any
) -> Any:
    numerator, denominator = apart(module, query, key, value, mask, scaling)
    return (numerator / denominator).transpose(1, 2).contiguous(), None


def never(
    module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, dropout: float = 0.0, **_: Any
) -> Any:
    """Numerators over the product of all heads' denominators, which is left on the module."""
    import torch

    numerator, denominator = apart(module, query, key, value, mask, scaling)
    left = torch.cat([torch.ones_like(denominator[:, :1]), denominator.cumprod(1)[:, :-1]], 1)
    right = torch.cat([denominator.flip(1).cumprod(1).flip(1)[:, 1:], torch.ones_like(denominator[:, :1])], 1)
    module.denominators = denominator
    return (numerator * left * right).transpose(1, 2).contiguous(), None


@contextmanager
def pairs(model: Any, growth: dict[int, float]) -> Iterator[None]:
    """A residual stream of numerators over one denominator a row.

    Args:
        model: of the Llama family.
        growth: layer -> log2 of the largest denominator that left it, as it would be without overflow.
    """
    state: dict[str, Any] = {}
    with ExitStack() as undo:
        for number, layer in enumerate(model.model.layers):
            layer.forward = partial(_layer, layer, number, state, growth)
            undo.callback(delattr, layer, "forward")
        norm = model.model.norm
        norm.forward = lambda hidden: _norm(norm, hidden, state["denominator"])
        undo.callback(delattr, norm, "forward")
        yield


def _layer(
    layer: Any, number: int, state: dict[str, Any], growth: dict[int, float], hidden_states: Any, **given: Any
) -> Any:
    import torch

    if number == 0:
        state["denominator"] = torch.ones_like(hidden_states[..., :1])
        state["log2"] = torch.zeros_like(hidden_states[..., :1], dtype=torch.float64)
    numerator, denominator = hidden_states, state["denominator"]
    attended, _ = layer.self_attn(
        hidden_states=_norm(layer.input_layernorm, numerator, denominator), **{**given, "use_cache": False}
    )
    of_heads = layer.self_attn.denominators
    product = of_heads.prod(1)
    numerator, denominator = numerator * product + attended * denominator, denominator * product
    added = layer.mlp(_norm(layer.post_attention_layernorm, numerator, denominator))
    state["denominator"] = denominator
    state["log2"] = state["log2"] + of_heads.double().log2().sum(1)
    growth[number] = max(growth.get(number, 0.0), float(state["log2"].nan_to_num().max()))  # NaN once it overflowed
    return numerator + added * denominator


def _norm(module: Any, numerator: Any, denominator: Any) -> Any:
    """RMSNorm of numerator / denominator, which divides by the numerators' own root mean square instead."""
    square = numerator.pow(2).mean(-1, keepdim=True)
    return module.weight * (numerator / (square + module.variance_epsilon * denominator.pow(2)).sqrt())


def timed(model: Any, rounds: int) -> dict[str, float]:
    """Median seconds of a prefill, the ways taking turns."""
    import torch

    ids = torch.arange(PREFILL)[None] + 100
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for number in range(rounds + 1):
        for name, found in seconds.items():
            with way(model, name), torch.inference_mode():
                model(input_ids=ids[:, :32], logits_to_keep=1)
                since = time.perf_counter()
                model(input_ids=ids, use_cache=False, logits_to_keep=1)
                if number:  # the first round warms up
                    found.append(time.perf_counter() - since)
    return {name: statistics.median(found) for name, found in seconds.items()}


def memory_of(name: str) -> None:
    """Print the bytes that a prefill needs beyond what the process held before it (Linux)."""
    import torch

    with opened("fp32") as engine, way(engine.model, name), torch.inference_mode():
        ids = torch.arange(PREFILL)[None].repeat(MEMORY_BATCH, 1) + 100
        engine.model(input_ids=ids[:1, :32], use_cache=False, logits_to_keep=1)
        held = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        engine.model(input_ids=ids, use_cache=False, logits_to_keep=1)
        print(json.dumps(_status("VmHWM") - held))


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def memory() -> dict[str, int]:
    def one(name: str) -> int:
        done = subprocess.run(
            [sys.executable, __file__, "--memory-of", name], stdout=subprocess.PIPE, text=True, check=True
        )
        return int(done.stdout.splitlines()[-1])

    return {name: one(name) for name in WAYS}


def reference(model: Any, rows: list[list[int]]) -> list[np.ndarray[Any, Any]]:
    """Logits in float64, rotary tables from the same frequencies."""
    import copy

    import torch

    wide = copy.deepcopy(model).double()
    wide.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq
    with torch.inference_mode():
        return [wide(input_ids=torch.tensor([row])).logits[0].numpy() for row in rows]


def distances(logits: list[Any], wide: list[Any]) -> dict[str, Any]:
    """From float64; None where logits are no numbers."""
    flat = np.concatenate([np.abs(a - b).ravel() for a, b in zip(logits, wide, strict=True)])
    bad = int((~np.isfinite(flat)).sum())
    numbers = {"largest": None, "mean": None} if bad else {"largest": float(flat.max()), "mean": float(flat.mean())}
    return {**numbers, "not_a_number_percent": 100 * bad / len(flat)}


def hashes(engine: Any, rows: list[list[int]]) -> int:
    """Different SHA-256 of all logits, over batch sizes and threads."""
    import torch

    found, threads = set(), torch.get_num_threads()
    try:
        for number in THREADS:
            torch.set_num_threads(number)
            for batch in BATCHES:
                parts = [padded(engine, rows[i : i + batch]) for i in range(0, len(rows), batch)]
                found.add(hashed([logits for part in parts for logits in part]))
    finally:
        torch.set_num_threads(threads)
    return len(found)


def claims(figures: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What holds, of each way of deferring, against `standard`, which is what the proposal compares itself with."""
    plain = figures["standard"]

    def of(name: str) -> dict[str, Any]:
        here = figures[name]
        speed = plain["seconds"] / here["seconds"]
        saved = 1 - here["memory_bytes"] / plain["memory_bytes"]
        error, other = here["error_against_float64"]["mean"], plain["error_against_float64"]["mean"]
        return {
            f"{CLAIMED['speed']} times faster": {"here": speed, "holds": speed >= CLAIMED["speed"]},
            f"{CLAIMED['memory_saved']:.0%} less memory": {"here": saved, "holds": saved >= CLAIMED["memory_saved"]},
            "bit for bit": {
                "here": f"{here['hashes']} different of {here['runs']}", "holds": here["hashes"] == 1 and error is not None,
            },
            "more accurate": {
                "here": None if error is None else error / other, "holds": error is not None and error < other,
            },
        }  # fmt: skip

    return {name: of(name) for name in ("once", "never", "exact")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=8, help="of the golden's answer behind each prompt")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        memory_of(args.memory_of)
        return
    figures: dict[str, dict[str, Any]] = {name: {} for name in WAYS}
    growth: dict[int, float] = {}
    with opened("fp32") as engine:
        say("timing")
        for name, seconds in timed(engine.model, args.rounds).items():
            figures[name]["seconds"] = seconds
        rows = sequences(engine, args.prompts, args.tokens)
        say("float64")
        wide = reference(engine.model, rows)
        for name in WAYS:
            say(name)
            with way(engine.model, name, growth):
                figures[name]["error_against_float64"] = distances([padded(engine, [row])[0] for row in rows], wide)
            with way(engine.model, name):  # padding sees nothing, and the size of its denominators means nothing
                figures[name] |= {"hashes": hashes(engine, rows), "runs": len(BATCHES) * len(THREADS)}
    say("memory")
    for name, held in memory().items():
        figures[name]["memory_bytes"] = held
    overflows = next((layer for layer, size in sorted(growth.items()) if size >= np.finfo(np.float32).maxexp), None)
    publish(
        "deferred_division",
        {
            "ways": figures,
            "claims": claims(figures),
            # Beyond float32 there is nothing left to measure.
            "log2_of_largest_denominator_by_layer": [round(growth[layer], 1) for layer in sorted(growth)][
                : overflows + 1 if overflows is not None else None
            ],
            "first_layer_beyond_float32": overflows,
        },
    )


def say(what: str) -> None:
    print("measuring:", what, flush=True)


if __name__ == "__main__":
    main()
