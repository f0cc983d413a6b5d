"""exact: every sum is a sum of integers over a power of two, so no order of summation can change a bit.

`computing` puts a loaded model of transformers into the mode and back; `operations` are the products, norms, attention
and activations it then computes with. The argument, and what it rests on: docs/exact.md.

torch is imported when one of them is used, and not before.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .. import Mode
from ..fp32 import ieee

if TYPE_CHECKING:
    from .model import computing
    from .native import unfused
    from .operations import logsumexp, prepare
    from .proof import observe

__all__ = ["MODE", "computing", "logsumexp", "observe", "prepare", "unfused"]

MODE = Mode("exact", dtype=None, compute_class="exact", switches=ieee, storage="exact")

_WHERE = {
    "computing": "model",
    "logsumexp": "operations",
    "observe": "proof",
    "prepare": "operations",
    "unfused": "native",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
