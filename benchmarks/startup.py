"""What the installed plugin costs a project that does not use it: pytest --collect-only with and without it.

    python benchmarks/startup.py

Pairs are interleaved; the figure is the median of the pairs' ratios, as wall time and as CPU time of the child.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _report import publish

PAIRS = 25


def cost(folder: str, *extra: str) -> tuple[float, float]:
    """(wall, CPU) seconds of one pytest --collect-only."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *extra]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "test_plain.py").write_text("def test_plain():\n    assert True\n")
        cost(folder)
        pairs = []
        for i in range(PAIRS):
            order = [(), ("-p", "no:repro")] if i % 2 else [("-p", "no:repro"), ()]
            found = {extra: cost(folder, *extra) for extra in order}
            pairs.append((found[()], found[("-p", "no:repro")]))
    publish(
        "startup",
        {
            "pairs": PAIRS,
            "wall, with / without the plugin, median of ratios": round(
                statistics.median(a[0] / b[0] for a, b in pairs), 3
            ),
            "CPU, with / without the plugin, median of ratios": round(
                statistics.median(a[1] / b[1] for a, b in pairs), 3
            ),
            "wall seconds with, median": round(statistics.median(a[0] for a, _ in pairs), 4),
            "wall seconds without, median": round(statistics.median(b[0] for _, b in pairs), 4),
        },
    )


if __name__ == "__main__":
    main()
