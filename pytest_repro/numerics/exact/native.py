"""The fused operations of `kernels.cpp`: compiled once for each instruction set (`numerics.compiler`), through ctypes.

They give the bits of `operations`, which computes with torch alone where there is no compiler.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shlex
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import compiler

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-ffp-contract=off")
INSTRUCTIONS: dict[str, tuple[str, ...]] = {
    "AVX512": ("-mavx512f", "-mavx2", "-mfma", "-mf16c"),
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
}
"""torch's name of what its own CPU kernels use (`ATEN_CPU_CAPABILITY` lowers it) -> compiler flags; without one, none."""
SLOWER = "exact compute runs many times slower, with the same bits"
NO_NUMBER = 2

log = logging.getLogger("pytest_repro.exact")


@dataclass(frozen=True)
class Library:
    """The compiled operations, or the reason why there are none."""

    handle: Any | None
    """Of ctypes."""
    about: str
    """For the fingerprint and for people: the instruction set, or what is missing."""


_known: Library | None = None


def library(say: Callable[[str], None] = log.warning) -> Library:
    """The operations for the instruction set that torch's own kernels use now; compiled at first use.

    Args:
        say: told before a compilation, and when there can be none.
    """
    global _known
    if _known is None:  # asked at every operation: the environment is read once
        _known = _library(torch.backends.cpu.get_cpu_capability(), os.environ.get("CXX", ""), say)
    return _known


@contextmanager
def unfused() -> Iterator[None]:
    """Torch alone while the context holds: the same bits, slower, and seen by whoever looks at torch's operations."""
    global _known
    before, _known = library(), Library(None, "torch alone")
    try:
        yield
    finally:
        _known = before


def _library(capability: str, cxx: str, say: Callable[[str], None]) -> Library:
    command = compiler.found(cxx)
    if command is None:
        say(f"exact: no C++ compiler ({cxx or 'g++, c++, clang++'}): {SLOWER}; install g++, or set CXX")
        return Library(None, "no C++ compiler")
    flags = (*FLAGS, *INSTRUCTIONS.get(capability, ()))
    try:
        path = compiler.compiled(SOURCE, "exact", "exact_linear", command, flags, say)
        return Library(declared(ctypes.CDLL(str(path))), capability)
    except (OSError, AttributeError, subprocess.SubprocessError) as exc:
        say(f"exact: {shlex.join(command)} failed: {compiler.last_line(exc)}: {SLOWER}")
        return Library(None, "not compiled")  # what failed may hold paths: it is said, and not put into fingerprints


def declared(handle: Any) -> Any:
    """The library with its functions' arguments declared."""
    pointer, size, small, real = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_double
    handle.exact_linear.argtypes = [pointer] * 4 + [size] * 3 + [small] * 2
    handle.exact_attention.argtypes = [pointer] * 5 + [size] * 9 + [real, small]
    handle.exact_rms_norm.argtypes = [pointer] * 3 + [size] * 2 + [real, small]
    handle.exact_silu.argtypes = [pointer] * 2 + [size, small]
    handle.exact_shares.argtypes = [pointer] * 2 + [size] * 2 + [small]
    return handle


def serves(x: torch.Tensor) -> bool:
    """Whether the compiled operations take this tensor."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() > 0 and library().handle is not None


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`operations.linear`."""
    x, weight = x.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    n, k = weight.shape
    y = x.new_empty((*x.shape[:-1], n))
    kind = (torch.bfloat16, torch.float16).index(weight.dtype)
    address = None if bias is None else bias.data_ptr()
    _call("linear", x.data_ptr(), weight.data_ptr(), address, y.data_ptr(), x.numel() // k, n, k, kind)
    return y


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor, scaling: float
) -> torch.Tensor:
    """`operations.attention`."""
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    batch, heads, asked, width = query.shape
    groups, tokens = key.shape[1:3]
    seen = seen.expand(batch, heads, asked, tokens)
    if seen.stride(-1) != 1 and tokens > 1:
        seen = seen.contiguous()
    out = torch.empty_like(query)
    places = [t.data_ptr() for t in (query, key, value, seen, out)]
    _call("attention", *places, batch, heads, groups, asked, tokens, width, *seen.stride()[:3], scaling)
    return out


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """`operations.rms_norm`."""
    x, weight = x.contiguous(), weight.float().contiguous()
    y = torch.empty_like(x)
    width = x.shape[-1]
    _call("rms_norm", x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel() // width, width, epsilon)
    return y


def silu(x: torch.Tensor) -> torch.Tensor:
    """`operations.silu`."""
    x = x.contiguous()
    y = torch.empty_like(x)
    _call("silu", x.data_ptr(), y.data_ptr(), x.numel())
    return y


def shares(x: torch.Tensor) -> torch.Tensor:
    """Sum of e^(x - largest) along the last dimension, as integers over 2^40: float64, shape (..., 1)."""
    x = x.contiguous()
    total = torch.empty((*x.shape[:-1], 1), dtype=torch.float64)
    _call("shares", x.data_ptr(), total.data_ptr(), total.numel(), x.shape[-1])
    return total


def _call(name: str, *arguments: Any) -> None:
    """Run one of the library's functions on torch's number of threads.

    Raises:
        FloatingPointError: it met an infinity or a NaN.
    """
    if getattr(library().handle, f"exact_{name}")(*arguments, torch.get_num_threads()) == NO_NUMBER:
        raise FloatingPointError("exact compute met an infinity or a NaN, which has no numerator")
