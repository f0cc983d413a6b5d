"""One linear layer, 4096 x 4096: the LayerCast product against FP32's, and against upcasting the whole matrix.

    python benchmarks/layercast_product.py [--device cuda]

Medians of interleaved runs: every round times each way once. `naive` is F.linear(x, w.float()).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from _report import publish

from pytest_repro.numerics.fp32 import ieee
from pytest_repro.numerics.layercast import linear, prepare
from pytest_repro.numerics.layercast.product import tiled

SIZE = 4096


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started)


def measure(ways: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, float]:
    """Median of each way's time, milliseconds; the first three rounds warm up."""
    seen: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 3):
        for name, run in ways.items():
            seen[name].append(milliseconds(run, device))
    return {name: statistics.median(times[3:]) for name, times in seen.items()}


def naive(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.linear(x, weight.float())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--rounds", default=25, type=int)
    args = parser.parse_args()
    torch.manual_seed(0)
    figures: dict[str, object] = {"product": prepare(args.device, print), "threads": torch.get_num_threads()}
    weight = torch.randn(SIZE, SIZE, device=args.device).bfloat16()
    wide = weight.float()
    with torch.inference_mode(), ieee():
        for rows in (1, 2, 4, 8, 16, 32, 128, 512):
            x = torch.randn(rows, SIZE, device=args.device)
            ways: dict[str, Callable[[], object]] = {
                "fp32": partial(F.linear, x, wide),
                "layercast": partial(linear, x, weight),
                "tiles": partial(tiled, x, weight, None),
                "naive": partial(naive, x, weight),
            }
            if args.device.type == "cuda":
                ways["bf16"] = partial(F.linear, x.bfloat16(), weight)
            took = measure(ways, args.device, args.rounds)
            figures[f"{rows} rows"] = {
                **{f"{name}, ms": round(ms, 3) for name, ms in took.items()},
                "layercast / fp32": round(took["layercast"] / took["fp32"], 3),
                "tiles / fp32 (no compiler)": round(took["tiles"] / took["fp32"], 3),
                "naive / layercast": round(took["naive"] / took["layercast"], 1),
            }
    publish("layercast_product" + ("" if args.device.type == "cpu" else "_cuda"), figures)


if __name__ == "__main__":
    main()
