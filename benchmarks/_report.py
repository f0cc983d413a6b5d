"""What every benchmark prints with its figures: hardware, versions, commit."""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from pytest_repro import probe

RESULTS = Path(__file__).parent / "results"


def publish(name: str, figures: dict[str, Any]) -> None:
    """Print the figures and keep them in benchmarks/results/<name>.json."""
    machine = probe.machine()
    here = {key: machine.get(key) for key in ("cpu_model", "cpu_count", "os", "python", "driver", "gpu.name")}
    versions = {}
    for package in ("pytest-repro", "torch", "transformers", "numpy", "pytest"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    document = {
        "benchmark": name,
        "command": "python " + " ".join([f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "figures": figures,
        "machine": {k: v for k, v in here.items() if v is not None},
        "versions": versions,
        "commit": probe.commit(Path(__file__).parent).get("commit"),
        "date": str(machine["time"])[:10],
    }
    text = json.dumps(document, indent=1)
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(text + "\n")
