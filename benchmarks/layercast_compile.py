"""What the LayerCast product costs to compile, beside a file that only includes torch's headers.

    python benchmarks/layercast_compile.py

Medians of interleaved runs. docs/decisions/0005-layercast.md rests on them.
"""

from __future__ import annotations

import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from _report import publish
from torch.utils.cpp_extension import include_paths

from pytest_repro.numerics.layercast import native


def seconds(source: Path, *flags: str) -> float:
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        command = ["g++", *flags, str(source), "-o", f"{folder}/out.so"]
        subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    capability = torch.backends.cpu.get_cpu_capability()
    ours = native._flags(capability)
    assert ours is not None, f"nothing is compiled for {capability}"
    with tempfile.TemporaryDirectory() as folder:
        empty = Path(folder) / "empty.cpp"
        empty.write_text("#include <torch/library.h>\n#include <ATen/ATen.h>\n")
        theirs = ["-O3", "-std=c++20", "-shared", "-fPIC", *(f"-I{path}" for path in include_paths())]
        rounds = [(seconds(native.SOURCE, *ours), seconds(empty, *theirs)) for _ in range(3)]
    product, headers = (statistics.median(column) for column in zip(*rounds, strict=True))
    figures = {
        "instruction set": capability,
        "product.cpp, s": round(product, 1),
        "torch's headers alone, s": round(headers, 1),
    }
    publish("layercast_compile", {**figures, "headers / product": round(headers / product, 1)})


if __name__ == "__main__":
    main()
