"""Decoding SmolLM2-135M under FP32, LayerCast and bf16: tokens/s, weight memory, and how far LayerCast lies from FP32.

    python benchmarks/layercast_decode.py [--device cuda] [--model DIR]

Medians of interleaved runs of the model's own `generate`, 64 new tokens after the shipped suite's prompts. The last part
scores every prompt of golden/word-problems, with its golden's tokens, under FP32 and LayerCast.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _report import publish
from transformers import AutoModelForCausalLM, AutoTokenizer

from pytest_repro import models, store, suite
from pytest_repro.numerics.fp32 import ieee
from pytest_repro.numerics.layercast import LayerCastConfig, prepare
from pytest_repro.numerics.layercast.model import weight_bytes

SUITE = Path(__file__).parent.parent / "golden" / "word-problems"
NEW_TOKENS = 64


def load(path: Path, mode: str, device: torch.device) -> Any:
    options: dict[str, dict[str, Any]] = {
        "fp32": {"dtype": torch.float32},
        "bf16": {"dtype": torch.bfloat16},
        "layercast": {"quantization_config": LayerCastConfig()},
    }
    return AutoModelForCausalLM.from_pretrained(path, use_safetensors=True, **options[mode]).to(device).eval()


def tokens_per_second(model: Any, inputs: Any) -> float:
    started = time.perf_counter()
    out = model.generate(
        **inputs, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
    )
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return float(out.shape[0]) * NEW_TOKENS / (time.perf_counter() - started)


def speed(loaded: dict[str, Any], tokenizer: Any, rounds: int) -> dict[str, Any]:
    prompts = [str(p.content) for p in suite.load(SUITE).prompts]
    figures: dict[str, Any] = {}
    for batch in (1, 8):
        seen: dict[str, list[float]] = {mode: [] for mode in loaded}
        for turn in range(rounds + 1):
            inputs = tokenizer(prompts[turn : turn + batch], return_tensors="pt", padding=True)
            for mode, model in loaded.items():
                seen[mode].append(tokens_per_second(model, inputs.to(model.device)))
        median = {mode: statistics.median(rates[1:]) for mode, rates in seen.items()}
        figures[f"batch {batch}"] = {
            **{f"{mode}, tokens/s": round(rate, 1) for mode, rate in median.items()},
            "layercast / fp32": round(median["layercast"] / median["fp32"], 2),
            "layercast / bf16": round(median["layercast"] / median["bf16"], 2),
        }
    return figures


def distance(loaded: dict[str, Any]) -> dict[str, Any]:
    """|Δlogp| of the golden's tokens between FP32 and LayerCast, each text whole."""
    golden = store.Place(SUITE, "fp32").read().generation
    tokenizer_ids = golden_prompts(loaded["fp32"])
    differences = []
    for i, prompt in enumerate(tokenizer_ids):
        answer = torch.from_numpy(golden.tokens[golden.span(i)].astype(np.int64))
        ids = torch.cat([torch.tensor(prompt), answer])[None].to(loaded["fp32"].device)
        found = {}
        for mode in ("fp32", "layercast"):
            logits = loaded[mode](input_ids=ids).logits[0, len(prompt) - 1 : -1]
            found[mode] = logits.double().log_softmax(-1).gather(1, answer[:, None].to(logits.device))[:, 0]
        differences.append((found["fp32"] - found["layercast"]).abs().cpu())
    every = torch.cat(differences)
    return {
        "tokens": len(every),
        "max |Δlogp|": f"{every.max().item():.3g}",
        "mean |Δlogp|": f"{every.mean().item():.3g}",
    }


def golden_prompts(model: Any) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(model.config.name_or_path)
    return [
        list(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": p.content}] if isinstance(p.content, str) else p.content,
                add_generation_prompt=True,
                return_dict=True,
            )["input_ids"]
        )
        for p in suite.load(SUITE).prompts
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--model", type=Path, help="a directory; default: the shipped suite's model")
    parser.add_argument("--rounds", default=5, type=int)
    args = parser.parse_args()
    path = args.model or models.resolve(suite.load(SUITE).model, SUITE, print).path
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    with torch.inference_mode(), ieee():
        figures: dict[str, Any] = {
            "product": prepare(args.device, print),
            "threads": torch.get_num_threads(),
        }
        loaded = {mode: load(path, mode, args.device) for mode in ("fp32", "layercast", "bf16")}
        sizes = {mode: weight_bytes(model) for mode, model in loaded.items()}
        figures["weight memory, MiB"] = {mode: round(size / 2**20, 1) for mode, size in sizes.items()}
        figures["weight memory, layercast / fp32"] = round(sizes["layercast"] / sizes["fp32"], 3)
        figures |= speed(loaded, tokenizer, args.rounds)
        figures["layercast against fp32, golden/word-problems"] = distance(loaded)
    publish("layercast_decode" + ("" if args.device.type == "cpu" else "_cuda"), figures)


if __name__ == "__main__":
    main()
