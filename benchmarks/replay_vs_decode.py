"""How much cheaper is replay than decoding, for the same verdicts? Real model, fp32, the whole of golden/word-problems.

    python benchmarks/replay_vs_decode.py

Replay is run between the decodings and its median taken, since machines drift; loading the model is not counted.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from _report import publish

from pytest_repro import asking, evidence, judging, suite
from pytest_repro.asking import Options, Silent
from pytest_repro.result import SuiteResult

SUITE = Path(__file__).parent.parent / "golden" / "word-problems"


def main() -> None:
    loaded = suite.load(SUITE)
    seconds: dict[str, list[float]] = {"replay": [], "decode, batch size 8": [], "decode, batch size 1": []}
    verdicts: dict[str, list[str]] = {}
    with asking.live(loaded, "fp32", Options(), Silent()) as engine:

        def run(label: str, method: asking.Method, batch_size: int) -> None:
            asked = replace(loaded, batch_size=batch_size)
            options = Options(method=method)
            result = judging.blank(asked, "fp32", None, None, "")
            result = replace(result, environment=asking.environment(engine, asked), observed=engine.observe().to_json())
            golden = evidence.find_golden(asked, "fp32", result, options)
            result = judging.against(result, golden, asked, frozenset())
            started = time.perf_counter()
            gathered = evidence.gather(engine, asked, golden, result, options, Silent())
            seconds[label].append(time.perf_counter() - started)
            judged: SuiteResult = judging.judge_all(result, asked, golden, gathered, engine.decode, False)
            verdicts[label] = [f"{p.id} {p.verdict}" for p in judged.prompts]

        run("replay", "replay", 8)  # warm-up
        seconds["replay"].clear()
        for label, batch_size in (("decode, batch size 8", 8), ("decode, batch size 1", 1)):
            run("replay", "replay", 8)
            run(label, "decode", batch_size)
            run("replay", "replay", 8)
    replay = statistics.median(seconds["replay"])
    figures: dict[str, Any] = {
        "prompts": len(loaded.prompts),
        "seconds": {label: [round(s, 2) for s in runs] for label, runs in seconds.items()},
        "replay median": round(replay, 2),
        "decode at batch size 1 / replay": round(seconds["decode, batch size 1"][0] / replay, 1),
        "decode at batch size 8 / replay": round(seconds["decode, batch size 8"][0] / replay, 1),
        "same verdict on every prompt": len({tuple(v) for v in verdicts.values()}) == 1,
        "verdicts": sorted({v.split()[1] for v in verdicts["replay"]}),
    }
    publish("replay_vs_decode", figures)


if __name__ == "__main__":
    main()
