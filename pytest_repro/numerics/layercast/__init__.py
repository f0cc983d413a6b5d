"""layercast: weights stored in 16 bits, every computation in FP32 (Yuan et al., arXiv 2506.09501 §4).

`linear` is the product. `LayerCastConfig` loads a model of transformers so; `casting` puts a loaded one into the mode
and back. What is computed where, what is guaranteed and what it costs: docs/numerics.md.

torch is imported when one of them is used, and not before.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .. import Mode
from ..fp32 import ieee

if TYPE_CHECKING:
    from .model import casting
    from .product import linear, prepare
    from .quantizer import LayerCastConfig

__all__ = ["MODE", "LayerCastConfig", "casting", "linear", "prepare"]

MODE = Mode("layercast", dtype="float32", compute_class="fp32", switches=ieee, storage="layercast")

_WHERE = {"linear": "product", "prepare": "product", "casting": "model", "LayerCastConfig": "quantizer"}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
