"""Emulated floating-point formats: which precision a model can bear (arXiv 2501.02423).

A mode of this family computes in FP32, as the mode fp32 does, and rounds numbers to a format of few bits on their way:
weights once, inputs of linear layers and what goes into the KV cache as they come. What is rounded, and what is not:
docs/ladder.md. `spec` reads a mode's name and imports no torch; `quantiser` rounds; `model` puts a loaded model into the mode
and back.
"""

from __future__ import annotations

from .. import Mode
from ..fp32 import ieee
from .spec import Emulation, Format, looks_like_one, parse, parse_format

__all__ = ["Emulation", "Format", "looks_like_one", "mode", "parse", "parse_format"]


def mode(name: str) -> Mode:
    """The mode of a name like `e4m3` or `e4m3-weights-block32`, which is a compute class of its own.

    Raises:
        ConfigError: the name says something that a format does not have.
    """
    emulation = parse(name)
    return Mode(emulation.name, dtype="float32", compute_class=emulation.name, switches=ieee, emulation=emulation)
