"""What exact compute costs beside FP32, on SmolLM2-135M: prefill of 512 tokens, and decoding at batch 1.

    python benchmarks/exact_speed.py [--rounds 5]

Both modes take turns, each model loaded anew, since a machine's speed changes with the hour; the fastest of each counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _report import publish

FOLDER = Path(__file__).parent.parent / "golden" / "word-problems"
PREFILL, DECODED = 512, 32


def once(mode: str) -> dict[str, float]:
    """Seconds of one prefill, and of one decoded token behind 64."""
    import torch

    from pytest_repro import models, numerics, suite
    from pytest_repro.engines.base import Spec, opener

    files = models.resolve(suite.load(FOLDER).model, FOLDER, print)
    with opener("transformers")(Spec(numerics.mode(mode), 8, FOLDER, files)) as engine, torch.inference_mode():
        model: Any = engine.model  # type: ignore[attr-defined]
        ids = torch.arange(PREFILL)[None] + 100

        def decode() -> None:
            cache = model(input_ids=ids[:, :64], use_cache=True).past_key_values
            for token in range(DECODED):
                model(input_ids=ids[:, token : token + 1], past_key_values=cache, use_cache=True)

        def prefill_of_64() -> None:
            model(input_ids=ids[:, :64], use_cache=True)

        before = best(prefill_of_64)
        return {
            "prefill_512": best(lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1)),
            "decode_token": (best(decode) - before) / DECODED,
        }


def best(run: Callable[[], Any], times: int = 3) -> float:
    """Seconds of the fastest run."""
    seconds = []
    for _ in range(times):
        since = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - since)
    return min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    runs: dict[str, list[dict[str, float]]] = {"exact": [], "fp32": [], "layercast": []}
    for _ in range(args.rounds):
        for mode, found in runs.items():
            found.append(once(mode))
    fastest = {mode: {name: min(run[name] for run in found) for name in found[0]} for mode, found in runs.items()}
    ratios = {name: fastest["exact"][name] / fastest["fp32"][name] for name in fastest["fp32"]}
    publish("exact_speed", {"seconds": fastest, "exact_over_fp32": ratios, "rounds": args.rounds})


if __name__ == "__main__":
    main()
