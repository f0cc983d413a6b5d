"""What the noise envelope and the sketch of the model add to a plain recording.

    python benchmarks/recording.py

The shipped suite is recorded into a scratch folder, and its phases are timed one by one: decoding is what a recording without
an envelope would take.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from _report import publish

from pytest_repro import asking, recording, suite

FOLDER = Path(__file__).parent.parent / "golden" / "word-problems"
ROUNDS = 3


class Stopwatch(asking.Silent):
    """Seconds of every phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._label, self._since = "", 0.0

    def phase(self, label: str, total: int) -> Callable[[int], None]:
        """End the phase before, and start this one."""
        self.close()
        self._label, self._since = label, time.perf_counter()
        return lambda _: None

    def close(self) -> None:
        """End the last phase."""
        if self._label:
            self.seconds[self._label] = time.perf_counter() - self._since
        self._label = ""


def once(mode: str) -> dict[str, float]:
    """Seconds of the phases of one recording."""
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as scratch:
        recording.record(suite.load(FOLDER), mode, asking.Options(), watch, Path(scratch))
    return watch.seconds


def main() -> None:
    modes = ("fp32", "bf16")
    runs: dict[str, list[dict[str, float]]] = {mode: [] for mode in modes}
    for _ in range(ROUNDS):
        for mode in modes:  # in turns: the machine's speed changes with the hour
            runs[mode].append(once(mode))
    figures = {}
    for mode, found in runs.items():
        medians = {name: statistics.median(run[name] for run in found) for name in found[0]}
        ratios = [sum(run.values()) / run["record"] for run in found]
        figures[mode] = {"seconds": medians, "over_plain": statistics.median(ratios), "over_plain_runs": ratios}
    publish("recording", figures)


if __name__ == "__main__":
    main()
