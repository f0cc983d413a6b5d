"""Numerics modes: the dtype a model is loaded in, and the global switches that hold while it computes.

A mode is a context manager: it restores what it found, on error too, and nests. What it asks for is not what is
recorded: the probe observes the result in the process that holds the model.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import ConfigError

if TYPE_CHECKING:
    from .formats import Emulation

_MODES = ("native", "bf16", "fp16", "fp32", "layercast", "exact")


@dataclass(frozen=True)
class Mode:
    """One numerics mode."""

    name: str
    dtype: str | None
    """What weights and activations are cast to at loading, as torch spells it; None keeps the checkpoint's own."""
    compute_class: str | None
    """The compute class that it claims; None if that depends on the model."""
    switches: Callable[[], AbstractContextManager[None]]
    """Entering sets torch's global switches, leaving restores them."""
    storage: str | None = None
    """How weights are stored where that is not `dtype`: the name of a quantisation method that engines register."""
    emulation: Emulation | None = None
    """The floating-point format that an engine emulates, which must be one that can (`engines.base.Entry.emulates`)."""


def mode(name: str) -> Mode:
    """The mode of a name.

    Raises:
        ConfigError: there is no such mode.
    """
    if name not in _MODES:
        from . import formats

        if formats.looks_like_one(name):
            return formats.mode(name)
        known = f"{', '.join(_MODES)}, and formats such as e4m3"
        raise ConfigError(f"unknown numerics mode {name!r}; known: {known}", where="numerics")
    found: Mode = importlib.import_module(f"{__name__}.{name}").MODE
    return found
