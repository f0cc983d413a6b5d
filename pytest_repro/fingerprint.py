"""The environment as data: flat fields, each of a class that decides what a difference means.

* identity: another question was asked; a difference is `incomparable`, never drift.
* numerics: the same question, computed otherwise; a difference is a suspect.
* information: shown, never judged.

Fields that this table does not know (an engine may add its own) are numerics if they start with `env.` or `engine.`,
information otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

FieldClass = Literal["identity", "numerics", "information"]
Value = str | int | float | bool | None
Fingerprint = Mapping[str, Value]

IDENTITY: dict[str, str] = {
    "model.weights": "model",
    "model.config": "model",
    "tokenizer": "tokenizer",
    "chat_template": "tokenizer",
    "generation": "generation",
}
"""Identity field -> the part of the identity that `--repro-allow-changed` names."""

SUSPECTS: tuple[str, ...] = (
    # What moves outputs most comes first: it is the order in which the report names suspects.
    "compute_class", "numerics", "dtype", "quantization", "batch_size", "engine", "attention", "device", "device_class",
    "tensor_parallel_size", "kv_cache_dtype", "prefix_caching", "fp32_precision.cuda", "fp32_precision.cudnn",
    "fp32_precision.mkldnn", "reduced_precision.bf16", "reduced_precision.fp16", "autocast", "deterministic_algorithms",
    "cudnn.deterministic", "cudnn.benchmark", "preferred_blas", "sdp.flash", "sdp.mem_efficient", "sdp.math", "sdp.cudnn",
    "driver", "cuda", "cublas", "cudnn", "nccl", "triton", "torch", "engine_version", "gpu.sm_count", "gpu.mig",
    "cpu_capability", "cpu_model", "threads", "interop_threads", "blas", "mkldnn",
)  # fmt: skip
"""Numerics fields, likeliest culprit first."""


UNOBSERVED = "unobserved"
"""Value of an identity field that an engine cannot see, a server's weights say: neither equal nor different."""


@dataclass(frozen=True)
class Change:
    """One field that differs."""

    field: str
    cls: FieldClass
    golden: Value
    """None where the golden's environment did not have the field."""
    now: Value


def unobserved(golden: Fingerprint, now: Fingerprint) -> list[str]:
    """Identity fields that one of the two sides could not see."""
    return [name for name in IDENTITY if UNOBSERVED in (golden.get(name), now.get(name))]


def class_of(name: str) -> FieldClass:
    """The class of a field."""
    if name in IDENTITY:
        return "identity"
    if name in SUSPECTS or name.startswith(("env.", "engine.")):
        return "numerics"
    return "information"


def diff(golden: Fingerprint, now: Fingerprint) -> list[Change]:
    """Fields that differ: identity first, then numerics with the likeliest suspect first, then information."""
    classes = ("identity", "numerics", "information")
    rank = {name: i for i, name in enumerate((*IDENTITY, *SUSPECTS))}
    changed = [
        Change(name, class_of(name), golden.get(name), now.get(name))
        for name in {**golden, **now}
        if golden.get(name) != now.get(name)
    ]
    return sorted(changed, key=lambda c: (classes.index(c.cls), rank.get(c.field, len(rank)), c.field))


def equal_count(golden: Fingerprint, now: Fingerprint) -> int:
    """How many judged fields (identity and numerics) are the same in both."""
    return sum(1 for name in golden if class_of(name) != "information" and name in now and golden[name] == now[name])
