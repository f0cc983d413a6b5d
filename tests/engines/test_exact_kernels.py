"""The fused operations, compiled for every instruction set that this machine has: the bits of those in torch alone."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from pytest_repro.numerics.exact import native, operations
from pytest_repro.numerics.exact.proof import same_bits

from .test_exact_arithmetic import causal, heads, numbers

HERE = torch.backends.cpu.get_cpu_capability()
FLAGS: dict[str, tuple[str, ...]] = {"plain": ()}
if HERE in native.INSTRUCTIONS:  # AVX-512 machines have AVX2 as well
    FLAGS |= {name: flags for name, flags in native.INSTRUCTIONS.items() if name in ("AVX2", HERE)}

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="no g++")


@pytest.fixture(scope="module", params=FLAGS)
def fused(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> native.Library:
    to = tmp_path_factory.mktemp("kernels") / "exact.so"
    subprocess.run(["g++", *native.FLAGS, *FLAGS[request.param], str(native.SOURCE), "-o", str(to)], check=True)
    return native.Library(native.declared(ctypes.CDLL(str(to))), request.param)


@pytest.fixture
def both(
    fused: native.Library, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[Callable[[], torch.Tensor]], list[torch.Tensor]]]:
    """Runs a computation fused, and in torch."""

    def run(compute: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
        found = []
        for library in (fused, native.Library(None, "torch")):
            monkeypatch.setattr(native, "_known", library)
            found.append(compute())
        return found

    yield run


Both = Callable[[Callable[[], torch.Tensor]], list[torch.Tensor]]
SHAPES = [(1, 1), (7, 65), (16, 64), (33, 200), (40, 576)]


@pytest.mark.parametrize("rows", [1, 2, 3, 6, 7, 13, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products(both: Both, rows: int, dtype: torch.dtype) -> None:
    for columns, width in SHAPES:
        x = numbers(rows, rows, width, spread=8)
        weight, bias = operations.on_grid(numbers(columns, columns, width, spread=3).to(dtype)), torch.ones(columns)
        assert same_bits(*both(lambda x=x, w=weight: operations.linear(x, w)))  # type: ignore[misc]
        assert same_bits(*both(lambda x=x, w=weight, b=bias: operations.linear(x, w, b)))  # type: ignore[misc]


def test_products_of_the_largest_and_the_smallest(both: Both) -> None:
    weight = torch.tensor([[2.0**-126, -(2.0**-133), 0.0], [1.0, -1.0, 0.5]], dtype=torch.bfloat16)
    x = torch.tensor([[2.0**-149, -3 * 2.0**-149, 2.0**-126], [0.0, -0.0, 0.0], [3e38, -3e38, 1.0]])
    for row in (x, x[:1], x[1:2], x[2:]):
        assert same_bits(*both(lambda row=row: operations.linear(row, operations.on_grid(weight))))  # type: ignore[misc]


def test_norms_activations_and_sums_of_shares(both: Both) -> None:
    x, weight = numbers(3, 50, 300, spread=10), numbers(4, 300, spread=2)
    assert same_bits(*both(lambda: operations.rms_norm(x, weight, 1e-5)))
    assert same_bits(*both(lambda: operations.rms_norm(torch.zeros(3, 300), weight, 1e-5)))
    assert same_bits(*both(lambda: operations.silu(x)))
    assert same_bits(*both(lambda: operations.silu(torch.linspace(-800, 800, 4001))))
    assert same_bits(*both(lambda: operations.logsumexp(x)))


@pytest.mark.parametrize("tokens", [1, 7, 8, 77])
def test_attention(both: Both, tokens: int) -> None:
    query, key, value = heads(9, tokens, spread=12)
    assert same_bits(*both(lambda: operations.attention(query, key, value, causal(tokens, tokens), 0.2)))
    some = torch.rand(1, 4, tokens, tokens, generator=torch.Generator().manual_seed(1)) > 0.7
    assert same_bits(*both(lambda: operations.attention(query, key, value, some, 0.2)))
    none = torch.zeros(1, 1, tokens, tokens, dtype=torch.bool)
    assert not any(t.any() for t in both(lambda: operations.attention(query, key, value, none, 0.2)))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_without_a_trace(fused: native.Library, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    monkeypatch.setattr(native, "_known", fused)
    x, weight = numbers(1, 40, 576, spread=4), operations.on_grid(numbers(2, 100, 576, spread=2).bfloat16())
    query, key, value = heads(5, 90)
    before = torch.get_num_threads()
    wanted = operations.linear(x, weight), operations.attention(query, key, value, causal(90, 90), 0.2)
    torch.set_num_threads(threads)
    try:
        found = operations.linear(x, weight), operations.attention(query, key, value, causal(90, 90), 0.2)
    finally:
        torch.set_num_threads(before)
    assert all(same_bits(a, b) for a, b in zip(wanted, found, strict=True))


def test_what_has_no_numerator_is_refused(both: Both) -> None:
    bad = torch.tensor([[1.0, torch.inf]])
    weight = torch.ones(3, 2, dtype=torch.bfloat16)
    query, key, value = heads(9, 4)
    for compute in (
        lambda: operations.linear(bad, weight),
        lambda: operations.rms_norm(bad, weight[0], 1e-5),
        lambda: operations.attention(query, key * torch.nan, value, causal(4, 4), 0.2),
        lambda: operations.attention(query * torch.inf, key, value, causal(4, 4), 0.2),
    ):
        with pytest.raises(FloatingPointError, match="no numerator"):
            both(compute)


def run(code: str, cache: Path, **variables: str) -> str:
    """Python in a process of its own, with a cache of its own."""
    env = {**os.environ, "PYTEST_REPRO_CACHE": str(cache), **variables}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True, timeout=600
    )
    return done.stdout.strip()


PREPARE = "from pytest_repro.numerics.exact import prepare; print(prepare(print))"


def test_it_is_compiled_once_and_says_so(tmp_path: Path) -> None:
    first = run(PREPARE, tmp_path)
    assert first.splitlines()[0].startswith("exact: compiling")
    assert first.endswith(f"c++ {HERE}")
    assert run(PREPARE, tmp_path) == f"c++ {HERE}"


def test_without_a_compiler_torch_alone_computes_and_says_so(tmp_path: Path) -> None:
    found = run(PREPARE, tmp_path, CXX="no-such-compiler")
    assert "no C++ compiler" in found
    assert "the same bits" in found
    assert found.endswith("torch (no C++ compiler)")


def test_a_compiler_that_fails_is_told(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\ncase $1 in --version) echo 1;; *) echo 'error: no luck' >&2; exit 1;; esac\n")
    broken.chmod(0o755)
    found = run(PREPARE, tmp_path / "cache", CXX=str(broken))
    assert "no luck" in found
    assert found.endswith("torch (not compiled)")
