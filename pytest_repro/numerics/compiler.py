"""C++ sources of this package, compiled once for each instruction set and kept in the cache.

A source includes no header of torch, so it compiles in seconds, and one library serves every version of torch. It is
compiled beside its place and moved there when it is whole: two processes may do so at once, and one that was killed
leaves no lock behind (docs/decisions/0005-layercast.md).
"""

from __future__ import annotations

import ctypes
import hashlib
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from ..models import cache_folder


def found(cxx: str) -> list[str] | None:
    """$CXX, which may hold options, or the first compiler that is installed; None without one."""
    for candidate in [cxx] if cxx else ["g++", "c++", "clang++"]:
        program, *options = shlex.split(candidate) or [""]
        if path := shutil.which(program):
            return [path, *options]
    return None


def compiled(
    source: Path, name: str, symbol: str, compiler: list[str], flags: tuple[str, ...], say: Callable[[str], None]
) -> Path:
    """The library's file: of this source, these flags, this compiler and this kind of processor.

    Args:
        source: a C++ file without includes of its own.
        name: of the mode, for the file's name and for people.
        symbol: a function that the library must have.
        compiler: command and its own options.
        flags: added to them.
        say: told before a compilation.

    Raises:
        OSError, AttributeError, subprocess.SubprocessError: it could not be compiled or kept.
    """
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    parts = [source.read_text("utf-8"), *compiler[1:], *flags, version, platform.machine()]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
    folder = cache_folder() / "native"
    path = folder / f"{name}-{key}.so"
    if path.exists():
        return path
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    say(f"{name}: compiling its product once with {shlex.join(compiler)} (a few seconds)")
    with tempfile.TemporaryDirectory(dir=folder) as beside:
        made = Path(beside) / "product.so"
        command = [*compiler, *flags, str(source), "-o", str(made)]
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
        getattr(ctypes.CDLL(str(made)), symbol)  # what does not load is not kept
        made.replace(path)
    return path


def last_line(exc: Exception) -> str:
    """What a compiler, or the system, said last, at most 200 characters."""
    said = str(getattr(exc, "stderr", "") or exc).strip().splitlines()
    return next((line for line in said if "error" in line), said[-1] if said else type(exc).__name__)[:200]
