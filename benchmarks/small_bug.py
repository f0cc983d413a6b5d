"""What does a small real bug look like against an fp32 and against a bf16 golden? One layer's output scaled by 0.98.

    python benchmarks/small_bug.py

Replay of every prompt of golden/word-problems with a copy of the model whose model.layers.15.mlp.down_proj is scaled.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from _report import publish
from safetensors.torch import load_file, save_file

from pytest_repro import asking, gate, models, suite

SUITE = Path(__file__).parent.parent / "golden" / "word-problems"
WEIGHT = "model.layers.15.mlp.down_proj.weight"


def main() -> None:
    loaded = suite.load(SUITE)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(models.resolve(loaded.model, SUITE).path, Path(folder) / "scaled"))
        tensors = load_file(copy / "model.safetensors")
        tensors[WEIGHT] = (tensors[WEIGHT].float() * 0.98).to(tensors[WEIGHT].dtype)
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        options = asking.Options(method="replay", allow_changed=frozenset({"model"}))
        for numerics in ("fp32", "bf16"):
            result = gate.check(replace(loaded, model=str(copy)), numerics, options)
            ratios = [p.mean_abs_dlogp / p.benign_dlogp for p in result.prompts if p.mean_abs_dlogp and p.benign_dlogp]
            figures[f"against the {numerics} golden"] = {
                "mean |Δlogp|": f"{result.metrics['mean_abs_dlogp']:.3g}",
                "over the benign level, smallest": round(min(ratios), 2),
                "over the benign level, median": round(statistics.median(ratios), 2),
                "over the benign level, largest": round(max(ratios), 2),
                "prompts with a flipped token": sum(p.divergence_index is not None for p in result.prompts),
                "verdicts": {str(verdict): n for verdict, n in result.counts.items()},
            }
    publish("small_bug", figures)


if __name__ == "__main__":
    main()
