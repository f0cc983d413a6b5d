"""The LayerCast product in Triton: through its interpreter on any machine, and on a CUDA device where there is one."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pytest_repro.numerics.layercast import linear, prepare
from pytest_repro.numerics.layercast.product import SIXTEEN_BIT

# The test extra brings triton wherever there is one: there a missing install is a failure, not a skip.
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="no triton for this platform"
)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: only the interpreter is tested")

U = 2.0**-24
BOUND = 8 * U
"""Of |y - exact|, relative to sum|x||w| + |b|; 4 U is the most seen in the interpreter.

Operands in TF32 would cost about 2^13 U / sqrt(K), a term left out 2^24 U / K.
"""
ROWS = (1, 2, 4, 5, 16, 17, 70)
COLUMNS_AND_DEPTHS = ((7, 33), (37, 75), (3, 601), (1, 1), (64, 96))
INFINITE = (0x7F80, 0xFF80, 0x7C00, 0xFC00)


def problem(m: int, n: int, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(m * 1_000_000 + n * 1000 + k)
    x, w, b = (torch.randn(shape, generator=generator) for shape in ((m, k), (n, k), (n,)))
    return x, w.to(dtype), b


def error(y: torch.Tensor, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None) -> float:
    """The largest |y - exact| / (sum|x||w| + |b|)."""
    x64, w64, b64 = x.double(), w.double(), torch.zeros(1).double() if b is None else b.double()
    exact, scale = x64 @ w64.T + b64, x64.abs() @ w64.abs().T + b64.abs()
    assert y.shape == exact.shape
    return float(((y.cpu().double() - exact).abs() / scale).max())


def wrong_products(multiply: Callable[..., torch.Tensor], m: int, dtype: torch.dtype, *, tiny: bool) -> int:
    """Of one weight in 61, NaN among them, and infinities: how many are not exact times an odd significand of 24 bits."""
    weights = torch.tensor([*range(0, 2**16, 61), *INFINITE]).to(torch.uint16).view(dtype)
    if not tiny:
        size = weights.float().abs()
        weights = weights[~((size > 0) & (size < torch.finfo(dtype).tiny))]
    value = (2**24 - 3) * 2.0**-23
    y, exact = multiply(torch.full((m, 1), value), weights[:, None]), (weights.double() * value).float()
    return int((~((y == exact) | (y.isnan() & exact.isnan()))).sum())


def measure(device: str) -> dict[str, Any]:
    """What the kernels do on a device; the tests below judge it."""
    from pytest_repro.numerics.layercast import gpu

    def multiply(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
        return gpu.linear(x.to(device), w.to(device), None if b is None else b.to(device)).cpu()

    errors, bits, wrong, transposed = {}, {}, {}, {}
    for dtype in SIXTEEN_BIT:
        for m in ROWS:
            for n, k in COLUMNS_AND_DEPTHS:
                x, w, b = problem(m, n, k, dtype)
                errors[f"{dtype} {m}x{n}x{k}"] = error(multiply(x, w), x, w)
                errors[f"{dtype} {m}x{n}x{k} + b"] = error(multiply(x, w, b), x, w, b)
        x, w, b = problem(gpu.FEW, 37, 601, dtype)
        whole = multiply(x, w, b).view(torch.int32)
        for first, m in ((0, 1), (1, 1), (3, 1), (0, 2), (2, 2), (1, 3)):
            part = multiply(x[first : first + m], w, b).view(torch.int32)
            bits[f"{dtype} {first}:{first + m}"] = torch.equal(part, whole[first : first + m])
        for m in (1, gpu.FEW + 1):
            # Triton 3.9's interpreter misreads the subnormals of bfloat16; those of float16 it reads.
            tiny = device != "cpu" or dtype != torch.bfloat16
            wrong[f"{dtype} {m}"] = wrong_products(multiply, m, dtype, tiny=tiny)
        transposed[str(dtype)] = torch.equal(multiply(x, w.T.contiguous().T, b).view(torch.int32), whole)
    empty = [list(multiply(torch.ones(m, 5), torch.ones(n, 5).half()).shape) for m, n in ((0, 3), (3, 0))]
    return {"errors": errors, "bits": bits, "wrong": wrong, "transposed": transposed, "empty": empty}


@pytest.fixture(scope="module", params=["interpreter", pytest.param("cuda", marks=needs_cuda)])
def seen(request: pytest.FixtureRequest) -> dict[str, Any]:
    if request.param == "cuda":
        return measure("cuda")
    code = f"import json; from {__name__} import measure; print(json.dumps(measure('cpu')))"
    root, environment = Path(__file__).parents[2], {**os.environ, "TRITON_INTERPRET": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)  # type: ignore[no-any-return]


def test_the_product_is_right_to_a_few_roundings(seen: dict[str, Any]) -> None:
    assert len(seen["errors"]) == 2 * 2 * len(ROWS) * len(COLUMNS_AND_DEPTHS)
    assert {case: error for case, error in seen["errors"].items() if not error < BOUND} == {}


def test_up_to_four_rows_the_bits_of_a_row_do_not_depend_on_the_batch(seen: dict[str, Any]) -> None:
    assert seen["bits"]
    assert [case for case, same in seen["bits"].items() if not same] == []


def test_single_products_are_exact_also_of_subnormals_infinities_and_nan(seen: dict[str, Any]) -> None:
    assert len(seen["wrong"]) == 4
    assert {case: count for case, count in seen["wrong"].items() if count} == {}


def test_a_weight_that_lies_transposed_is_the_same_weight(seen: dict[str, Any]) -> None:
    assert list(seen["transposed"].values()) == [True, True]


def test_nothing_in_is_nothing_out(seen: dict[str, Any]) -> None:
    assert seen["empty"] == [[0, 3], [3, 0]]


@pytest.fixture
def grids(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The grids that are launched, on nothing."""
    from pytest_repro.numerics.layercast import gpu

    launched: list[tuple[int, ...]] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            launched.append(grid)
            return lambda *_, **__: None

    monkeypatch.setattr(gpu, "_few", Kernel())
    monkeypatch.setattr(gpu, "_many", Kernel())
    return launched


@pytest.mark.parametrize("m", [1, 4, 5, 17])
def test_a_vocabulary_of_a_million_fits_the_grids_of_cuda(grids: list[tuple[int, ...]], m: int) -> None:
    """CUDA takes 2^31 - 1 programs along the first axis, 65535 along the others."""
    from pytest_repro.numerics.layercast import gpu

    gpu.linear(torch.ones(m, 1), torch.ones(2**20, 1).bfloat16(), None)
    ((first, *others),) = grids
    assert first < 2**31
    assert max(others, default=1) < 2**16


def test_an_empty_grid_which_cuda_refuses_is_not_launched(grids: list[tuple[int, ...]]) -> None:
    from pytest_repro.numerics.layercast import gpu

    for m, n in ((0, 3), (3, 0)):
        assert gpu.linear(torch.ones(m, 5), torch.ones(n, 5).half(), None).shape == (m, n)
    assert grids == []


@needs_cuda
@pytest.mark.parametrize("m", [1, 4, 5])
def test_the_public_name_uses_the_kernels_on_cuda_also_for_a_large_vocabulary(m: int) -> None:
    assert prepare(torch.device("cuda"), print) == "triton"
    x, w, b = problem(m, 270_000, 16, torch.bfloat16)
    assert error(linear(x.cuda(), w.cuda(), b.cuda()), x, w, b) < BOUND


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_the_kernels_run_on_the_device_of_their_operands() -> None:
    for m in (1, 5):
        x, w, b = problem(m, 37, 75, torch.bfloat16)
        assert error(linear(x.to("cuda:1"), w.to("cuda:1"), b.to("cuda:1")), x, w, b) < BOUND
