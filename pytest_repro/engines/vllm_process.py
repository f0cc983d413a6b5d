"""Around vLLM's processes: what they must find set when they start, and what they leave in their log."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .base import Spec

FEW_CORES = 4
"""CPUs on which the worker gets every core."""


def environment(spec: Spec, log: Path) -> dict[str, str]:
    """What vLLM's processes must find set, since they read it while they start."""
    config = log.with_suffix(".json")
    config.write_text(json.dumps(_log_to(log)), "utf-8")
    chosen = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CONFIGURE_LOGGING": "1",
        "VLLM_LOGGING_CONFIG_PATH": str(config),
    }
    if spec.options.get("enforce_eager", True):
        chosen["TORCH_COMPILE_DISABLE"] = "1"  # helpers of the sampler are compiled otherwise, for half a minute
    if spec.mode.compute_class == "fp32":
        chosen |= {"VLLM_FLOAT32_MATMUL_PRECISION": "highest", "TRITON_F32_DEFAULT": "ieee"}
    return chosen | all_of_few_cores(spec.options)


def all_of_few_cores(options: Mapping[str, Any]) -> dict[str, str]:
    """Every core to the worker, on a CPU with few of them. What the user has set stands.

    vLLM keeps one for its scheduler, which only waits while a batch runs: of two cores that is half the machine.
    """
    set_already = {"VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_NUM_OF_RESERVED_CPU"} & set(os.environ)
    several = any(options.get(f"{kind}_parallel_size", 1) != 1 for kind in ("tensor", "pipeline", "data"))
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if set_already or several or not 1 < len(cores) <= FEW_CORES:
        return {}
    return {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores))}


def _log_to(log: Path) -> dict[str, Any]:
    """A logging configuration: everything into one file, nothing into pytest's output."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"plain": {"format": "%(levelname)s %(message)s"}},
        "handlers": {"file": {"class": "logging.FileHandler", "filename": str(log), "formatter": "plain"}},
        "loggers": {"vllm": {"handlers": ["file"], "level": "INFO", "propagate": False}},
    }


def kept_log(log: Path) -> str:
    """Where the log lies now, out of the folder that is about to go; empty if there is none."""
    if not log.exists():
        return ""
    descriptor, name = tempfile.mkstemp(prefix="pytest-repro-vllm-", suffix=".log")
    os.write(descriptor, log.read_bytes())
    os.close(descriptor)
    return f"its log: {name}"


def cause(log: Path) -> tuple[str, str]:
    """The first exception that a process of vLLM wrote down, since those after it follow from it; and what mends it.

    The second is said where it is an error of this package's own, raised in a worker.
    """
    lines = log.read_text("utf-8", "replace").splitlines() if log.exists() else []
    for place, line in enumerate(lines):
        if found := re.match(r"(?:ERROR )?((?:\w+\.)*\w*(?:Error|Exception): .+)", line):
            after = lines[place + 1] if place + 1 < len(lines) else ""
            mend = after.partition("mend: ")[2] if after.startswith("  mend: ") else ""
            return re.sub(r"^pytest_repro\.errors\.\w+: ", "", found[1]), mend
    return "", ""


def of_validation(said: str) -> str:
    """What pydantic says is wrong, without its count of errors and its link."""
    stripped = (line.partition(" [type=")[0].strip() for line in said.splitlines())
    lines = [line for line in stripped if line and "errors.pydantic.dev" not in line]
    return " ".join(lines[1:] if "validation error" in lines[0] else lines)


def first_line(exc: BaseException) -> str:
    """What an exception says, without what follows."""
    return next((line for line in str(exc).splitlines() if line.strip()), type(exc).__name__)
