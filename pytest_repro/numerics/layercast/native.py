"""The C++ product of `product.cpp`: compiled once for each instruction set (`numerics.compiler`), loaded through ctypes."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import platform
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import compiler

SOURCE = Path(__file__).with_name("product.cpp")
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-ffp-contract=off")
INSTRUCTIONS: dict[str, tuple[str, ...]] = {
    "AVX512": ("-mavx512f", "-mavx2", "-mfma", "-mf16c"),
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
}
"""torch's name of what its own CPU kernels use (`ATEN_CPU_CAPABILITY` lowers it) -> compiler flags."""

log = logging.getLogger("pytest_repro.layercast")


@dataclass(frozen=True)
class Library:
    """The compiled product, or the reason why there is none."""

    function: Any | None
    """`layercast_linear` of product.cpp."""
    about: str
    """For the fingerprint and for people: the instruction set, or what is missing."""


def library(say: Callable[[str], None] = log.warning) -> Library:
    """The product for the instruction set that torch's own kernels use now; compiled at first use.

    Args:
        say: told before a compilation, and when there can be none.
    """
    global _known
    if _known is None:  # asked at every product: the environment is read once
        _known = _library(torch.backends.cpu.get_cpu_capability(), os.environ.get("CXX", ""), say)
    return _known


_known: Library | None = None


def _once(make: Callable[[str, str, Callable[[str], None]], Library]) -> Callable[..., Library]:
    """Remember the answer, whoever was told about it."""
    known: dict[tuple[str, str], Library] = {}

    @functools.wraps(make)
    def remembered(capability: str, cxx: str, say: Callable[[str], None]) -> Library:
        if (capability, cxx) not in known:
            known[capability, cxx] = make(capability, cxx, say)
        return known[capability, cxx]

    return remembered


@_once
def _library(capability: str, cxx: str, say: Callable[[str], None]) -> Library:
    flags = _flags(capability)
    if flags is None:
        return Library(None, f"no fused multiply-add at {capability}")
    command = compiler.found(cxx)
    if command is None:
        say(f"layercast: no C++ compiler ({cxx or 'g++, c++, clang++'}): {SLOWER}; install g++, or set CXX")
        return Library(None, "no C++ compiler")
    try:
        path = compiler.compiled(SOURCE, "layercast", "layercast_linear", command, flags, say)
        function = ctypes.CDLL(str(path)).layercast_linear
    except (OSError, AttributeError, subprocess.SubprocessError) as exc:
        say(f"layercast: {shlex.join(command)} failed: {compiler.last_line(exc)}: {SLOWER}")
        return Library(None, "not compiled")  # what failed may hold paths: it is said, and not put into fingerprints
    pointer, size, small = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
    function.argtypes = [pointer] * 4 + [size] * 3 + [small] * 2
    return Library(function, capability)


def _flags(capability: str) -> tuple[str, ...] | None:
    """None where the plain loops would lose to tiles; 64-bit ARM has vectors and fused multiply-adds without a flag."""
    if capability in INSTRUCTIONS:
        return (*FLAGS, *INSTRUCTIONS[capability])
    return None if platform.machine() in ("x86_64", "AMD64") else FLAGS


SLOWER = "its products run several times slower"
