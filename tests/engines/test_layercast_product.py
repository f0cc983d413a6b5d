"""The LayerCast product: right to a few roundings on every way, exact where FP32 is, and the same bits everywhere in C++.

`way` runs a test through all three ways on a CPU: the C++ of this machine's instruction set, the same C++ without any
(its `#else` branch), and tiles.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from pytest_repro.numerics import layercast
from pytest_repro.numerics.layercast import linear, native, product
from pytest_repro.numerics.layercast.product import SIXTEEN_BIT

from .families import onednn

U = 2.0**-24
BOUND = 8 * U
"""Of |y - exact|, relative to sum|x||w| + |b|.

The C++ rounds a term at most 64 times in its chain, 4 times in the tree, once a block and with the bias: some 70 U is
certain. With random signs the partial sums are far below sum|x||w| and roundings cancel, so that 5 U is the most seen
over a dozen seeds, in tiles; 3 U in C++. Operands in TF32 would cost about 2^13 U / sqrt(K), a term left out 2^24 U / K.
"""
CAPABILITY = torch.backends.cpu.get_cpu_capability()
X86 = platform.machine() in ("x86_64", "AMD64")
NO_GCC = shutil.which("g++") is None and sys.platform != "linux"  # on Linux a missing g++ is a failure, not a skip
needs_gcc = pytest.mark.skipif(NO_GCC, reason="no g++ here")
needs_native = pytest.mark.skipif(
    NO_GCC or native._flags(CAPABILITY) is None,
    reason="no g++ here, or no fused multiply-add on this CPU",
)
each_dtype = pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)


@pytest.fixture(autouse=True)
def _any_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(native, "_known", None)


def compiled(to: Path, *flags: str) -> native.Library:
    """product.cpp, compiled with these flags and no others."""
    command = ["g++", "-std=c++17", "-shared", "-fPIC", *flags, str(native.SOURCE), "-o", str(to)]
    subprocess.run(command, check=True, timeout=120)
    function = ctypes.CDLL(str(to)).layercast_linear
    function.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_long] * 3 + [ctypes.c_int] * 2
    return native.Library(function, " ".join(flags))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> native.Library:
    return compiled(tmp_path_factory.mktemp("plain") / "product.so", "-O2")


def use(monkeypatch: pytest.MonkeyPatch, library: native.Library) -> None:
    monkeypatch.setattr(native, "library", lambda *_: library)


@pytest.fixture(params=[pytest.param("native", marks=needs_native), pytest.param("plain", marks=needs_gcc), "tiles"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "native":
        assert native.library().function, native.library().about
    if request.param == "plain":
        use(monkeypatch, request.getfixturevalue("plain"))
    if request.param == "tiles":
        use(monkeypatch, native.Library(None, "tiles"))
    return str(request.param)


def problem(m: int, n: int, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, a weight and a bias, of random signs."""
    generator = torch.Generator().manual_seed(m * 1_000_000 + n * 1000 + k)
    x, w, b = (torch.randn(shape, generator=generator) for shape in ((m, k), (n, k), (n,)))
    return x, w.to(dtype), b


def error(y: torch.Tensor, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None) -> float:
    """The largest |y - exact| / (sum|x||w| + |b|)."""
    assert y.dtype == torch.float32
    x64, w64, b64 = x.double(), w.double(), torch.zeros(1).double() if b is None else b.double()
    exact, scale = x64 @ w64.T + b64, x64.abs() @ w64.abs().T + b64.abs()
    assert y.shape == exact.shape
    return float(((y.double() - exact).abs() / scale).max())


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    ran = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


SHAPES = [
    *((m, 37, 77) for m in range(1, 21)),  # every mixture of strips of rows
    (1, 1, 1),
    (3, 1, 1),
    (4, 3, 2),
    (2, 5, 31),
    (2, 6, 32),
    (4, 7, 33),
    (1, 8, 1024),
    (5, 9, 1025),
    (2, 3, 2500),
    (7, 130, 1100),
    (1, 300, 64),
    (193, 5, 40),
    (400, 66, 70),
]


@each_dtype
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_the_product_is_right_to_a_few_roundings(way: str, dtype: torch.dtype, m: int, n: int, k: int) -> None:
    x, w, b = problem(m, n, k, dtype)
    assert error(linear(x, w), x, w) < BOUND
    assert error(linear(x, w, b), x, w, b) < BOUND
    assert error(linear(x, w, b.bfloat16()), x, w, b.bfloat16()) < BOUND


@each_dtype
def test_every_weight_there_is_multiplies_exactly(way: str, dtype: torch.dtype) -> None:
    """All 65536 of them, subnormals, infinities and NaN too, by an odd significand of 24 bits, at every lane."""
    weights = torch.arange(2**16).to(torch.uint16).view(dtype)
    value = (2**24 - 3) * 2.0**-23
    exact = (weights.double() * value).float()  # 24 bits by 11 fit in float64: rounded once
    alone = linear(torch.full((1, 1), value), weights[:, None])
    torch.testing.assert_close(alone[0], exact, rtol=0, atol=0, equal_nan=True)
    w = weights.view(-1, 64)
    finite = w.isfinite().all(1)
    amid_zeros = linear(torch.eye(64) * value, w[finite])
    torch.testing.assert_close(amid_zeros, exact.view(-1, 64)[finite].T, rtol=0, atol=0)


@each_dtype
def test_infinities_and_nan_reach_their_outputs_and_no_other(way: str, dtype: torch.dtype) -> None:
    inf, nan = torch.inf, torch.nan
    x, w, _ = problem(7, 9, 1061, dtype)
    x[1, 1060], x[3, 0], x[5, 1030] = inf, nan, -inf
    w[0, 5], w[2, 1059], w[4, 1060], w[6, 1031] = inf, nan, 0, -inf
    y, exact = linear(x, w), (x.double() @ w.double().T).float()
    assert torch.equal(y.isnan(), exact.isnan())
    assert torch.equal(y[y.isinf()], exact[exact.isinf()])
    assert y[1, 4].isnan(), "inf * 0"
    assert y.isfinite().sum() == 4 * 6


def test_a_zero_of_either_sign_is_nothing(way: str) -> None:
    w = torch.tensor([[-0.0, 0.0, 3.0]]).bfloat16()
    assert linear(torch.tensor([[5.0, -5.0, -0.0]]), w).item() == 0
    assert linear(torch.tensor([[5.0, -5.0, 2.0]]), w).item() == 6


@each_dtype
def test_x_has_any_number_of_dimensions(way: str, dtype: torch.dtype) -> None:
    x, w, b = problem(12, 5, 70, dtype)
    whole = linear(x, w, b)
    assert linear(x.view(3, 4, 70), w, b).shape == (3, 4, 5)
    assert torch.equal(linear(x.view(3, 4, 70), w, b).view(12, 5), whole)
    assert error(linear(x[2], w, b)[None], x[2:3], w, b) < BOUND


def test_nothing_in_is_nothing_out(way: str) -> None:
    w, b = torch.ones(3, 5).bfloat16(), torch.tensor([1.0, 2.0, 3.0])
    assert linear(torch.ones(0, 5), w, b).shape == (0, 3)
    assert linear(torch.ones(2, 0, 5), w, b).shape == (2, 0, 3)
    assert linear(torch.ones(2, 5), w[:0], b[:0]).shape == (2, 0)


def test_a_sum_of_no_terms_is_the_bias(way: str) -> None:
    b = torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(linear(torch.ones(2, 0), torch.ones(3, 0).bfloat16(), b), b.expand(2, 3))
    assert torch.equal(linear(torch.ones(2, 0), torch.ones(3, 0).bfloat16()), torch.zeros(2, 3))


@each_dtype
def test_operands_may_lie_in_memory_as_they_like(way: str, dtype: torch.dtype) -> None:
    x, w, b = problem(6, 11, 70, dtype)
    expected = linear(x, w, b)
    bias = torch.stack([b, -b], 1)[:, 0]
    assert torch.equal(linear(x.T.contiguous().T, w, b), expected)
    assert torch.equal(linear(x, w.T.contiguous().T, b), expected)
    assert torch.equal(linear(torch.stack([x, -x], 2)[..., 0], torch.stack([w, -w], 1)[:, 0], bias), expected)


# The guarantees of product.cpp.


@needs_native
@each_dtype
def test_the_bits_of_a_row_do_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    x, w, b = problem(230, 37, 1100, dtype)
    whole = linear(x, w, b)
    for m in range(1, 21):
        for first in (0, 7 * m, 230 - m):
            assert same_bits(linear(x[first : first + m], w, b), whole[first : first + m]), (first, m)
    assert same_bits(linear(x[30:], w, b), whole[30:])


@needs_native
@each_dtype
def test_the_bits_of_an_output_do_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    x, w, b = problem(7, 300, 1100, dtype)
    whole = linear(x, w, b)
    for first, n in ((0, 1), (3, 1), (5, 7), (64, 65), (1, 299)):
        part = slice(first, first + n)
        assert same_bits(linear(x, w[part], b[part]), whole[:, part].contiguous()), (first, n)


@needs_native
@each_dtype
def test_the_bits_do_not_depend_on_the_threads(dtype: torch.dtype) -> None:
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append([linear(*problem(m, n, 1100, dtype)) for m, n in ((1, 300), (7, 37), (230, 3))])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(same_bits, results[0], other))


@needs_native
@pytest.mark.skipif(CAPABILITY != "AVX512", reason=f"this CPU has {CAPABILITY}: no second instruction set to compare")
def test_the_bits_do_not_depend_on_the_instruction_set(tmp_path: Path) -> None:
    problems = [problem(m, n, k, t) for t in SIXTEEN_BIT for m, n, k in [*SHAPES, (9, 40, 3000)]]
    torch.save(problems, tmp_path / "problems")
    used = python(
        "import torch; from pytest_repro.numerics.layercast import linear, native\n"
        f"torch.save([linear(*p) for p in torch.load({str(tmp_path / 'problems')!r})], {str(tmp_path / 'answers')!r})\n"
        "print(native.library().about, native.library().function is not None)",
        ATEN_CPU_CAPABILITY="avx2",
    )
    assert used == "AVX2 True"
    for given, answer in zip(problems, torch.load(tmp_path / "answers"), strict=True):
        assert same_bits(linear(*given), answer), [tuple(t.shape) for t in given]


@needs_native
@pytest.mark.skipif(not X86, reason="-mfma is a flag of x86")
def test_the_bits_are_the_same_without_intrinsics_if_there_is_a_fused_multiply_add(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problems = [problem(m, n, k, t) for t in SIXTEEN_BIT for m, n, k in [(1, 9, 77), (7, 6, 1100), (3, 5, 3000)]]
    answers = [linear(*p) for p in problems]
    use(monkeypatch, compiled(tmp_path / "product.so", "-O2", "-mfma", "-ffp-contract=off"))
    assert all(same_bits(linear(*p), answer) for p, answer in zip(problems, answers, strict=True))


# Switches of torch that undo FP32.


@pytest.mark.parametrize("gradient", [False, True], ids=["inference", "gradient"])
@pytest.mark.skipif(
    not torch.cpu._is_amx_tile_supported(), reason="oneDNN rounds FP32's products to bf16 only on CPUs with AMX"
)
def test_bf16_products_of_onednn_do_not_reach_it(way: str, gradient: bool) -> None:
    x, w, b = problem(64, 256, 512, torch.float16)
    with onednn("bf16"):
        assert error(x @ w.float().T, x, w) > 2**8 * U, "the switch does nothing, so this test shows nothing"
        y = linear(x.clone().requires_grad_(gradient), w, b)
    assert error(y.detach(), x, w, b) < BOUND


@pytest.mark.parametrize("gradient", [False, True], ids=["inference", "gradient"])
def test_autocast_does_not_reach_it(way: str, gradient: bool) -> None:
    x, w, b = problem(6, 11, 70, torch.float16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear(x.clone().requires_grad_(gradient), w, b)
    assert error(y.detach(), x, w, b) < BOUND


@each_dtype
@pytest.mark.parametrize(("n", "k"), [(300, 2000), (3, product.TILE + 5)], ids=["tiles of rows", "tiles of one row"])
def test_tiles_cover_a_weight_that_is_larger_than_one(dtype: torch.dtype, n: int, k: int) -> None:
    x, w, b = problem(3, n, k, dtype)
    assert error(product.tiled(x, w, b), x, w, b) < BOUND


# Gradients and errors.


@each_dtype
def test_a_gradient_that_is_asked_for_is_right(way: str, dtype: torch.dtype) -> None:
    x, w, b = problem(6, 11, 70, dtype)
    x.requires_grad_()
    y = linear(x.view(2, 3, 70), w, b).view(6, 11)
    assert error(y.detach(), x.detach(), w, b) < BOUND
    upstream = problem(6, 11, 11, dtype)[0]
    y.backward(upstream)
    assert x.grad is not None
    assert error(x.grad, upstream, w.T) < BOUND
    with torch.no_grad():
        assert torch.equal(linear(x, w, b), linear(x.detach(), w, b)), "computed otherwise for nothing"


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.bfloat16),
        (torch.float32, torch.float32),
        (torch.float32, torch.int16),
        (torch.float32, torch.float8_e4m3fn),
    ],
    ids=str,
)
def test_other_dtypes_are_refused(x: torch.dtype, weight: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"not {x} by {weight}"):
        linear(torch.ones(2, 3).to(x), torch.ones(4, 3).to(weight))


@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [((2, 3), (4, 5), None), ((), (4, 1), None), ((2, 3), (3,), None), ((2, 3), (1, 4, 3), None)]
    + [((2, 3), (4, 3), shape) for shape in ((3,), (1,), (1, 4), ())],
    ids=str,
)
def test_shapes_that_do_not_fit_are_refused(x: tuple[int], weight: tuple[int], bias: tuple[int] | None) -> None:
    with pytest.raises(ValueError, match="fit"):
        linear(torch.ones(x), torch.ones(weight).bfloat16(), None if bias is None else torch.ones(bias))


@pytest.mark.parametrize("stray", [0, 1, 2], ids=["x", "weight", "bias"])
def test_operands_on_two_devices_are_refused(stray: int) -> None:
    operands = list(problem(2, 3, 4, torch.bfloat16))
    operands[stray] = operands[stray].to("meta")
    with pytest.raises(ValueError, match="meta"):
        linear(*operands)


def test_a_default_device_elsewhere_does_not_move_the_answer(way: str) -> None:
    operands = problem(2, 3, 4, torch.bfloat16)
    with torch.device("meta"):
        assert linear(*operands).device.type == "cpu"


# How it is compiled, and what happens where it is not.


def script(path: Path, *lines: str) -> None:
    path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    path.chmod(0o755)


IS_ASKED_ITS_VERSION = '[ "$1" = --version ] && '
WRITE = 'for last; do :; done; echo no library > "$last"; '


@needs_native
def test_prepare_names_the_instruction_set() -> None:
    assert product.prepare(torch.device("cpu"), print) == f"c++ {CAPABILITY}"


@pytest.mark.skipif(native._flags(CAPABILITY) is None, reason="nothing is compiled for this CPU")
@pytest.mark.parametrize(
    ("compiler", "told"),
    [
        ([], "no C++ compiler"),
        (["echo error: boom >&2", "exit 1"], "failed: error: boom"),
        ([IS_ASKED_ITS_VERSION + "exit 0", "echo error: boom >&2", "exit 1"], "failed: error: boom"),
        ([IS_ASKED_ITS_VERSION + "exit 0", WRITE + "echo error: boom >&2", "exit 1"], "failed: error: boom"),
        ([IS_ASKED_ITS_VERSION + "exit 0", "exit 0"], "No such file"),
        ([IS_ASKED_ITS_VERSION + "exit 0", WRITE], "failed: "),
    ],
    ids=["missing", "fails", "fails at the source", "fails half way", "makes nothing", "makes no library"],
)
def test_without_a_compiler_that_works_it_says_so_and_computes_in_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: list[str], told: str
) -> None:
    cxx = tmp_path / "c++"
    if compiler:
        script(cxx, *compiler)
    monkeypatch.setenv("CXX", str(cxx))
    monkeypatch.setenv("PYTEST_REPRO_CACHE", str(tmp_path / "cache"))
    said: list[str] = []
    way = product.prepare(torch.device("cpu"), said.append)
    assert way == ("tiles (not compiled)" if compiler else "tiles (no C++ compiler)"), (
        "and no path: it is a fingerprint"
    )
    assert str(cxx) in said[-1] and told in said[-1] and native.SLOWER in said[-1]
    assert list(tmp_path.glob("cache/native/*")) == []
    x, w, b = problem(6, 11, 70, torch.bfloat16)
    assert torch.equal(linear(x, w, b), product.tiled(x, w, b))


PREPARE = """
import torch
from pytest_repro.numerics.layercast import linear, prepare
print(prepare(torch.device("cpu"), print), linear(torch.ones(1, 40), torch.ones(1, 40).half()).item())
"""


@pytest.mark.skipif(not X86, reason="a CPU that is not x86 is compiled for whatever torch's kernels use")
def test_without_a_fused_multiply_add_it_computes_in_tiles() -> None:
    assert python(PREPARE, ATEN_CPU_CAPABILITY="default") == "tiles (no fused multiply-add at DEFAULT) 40.0"


@needs_native
def test_it_is_compiled_once_and_two_processes_may_do_so_at_the_same_time(tmp_path: Path) -> None:
    """The compiler waits until both have called it."""
    script(
        tmp_path / "c++",
        IS_ASKED_ITS_VERSION + "exec g++ --version",
        f"touch {tmp_path}/caller.$$",
        f'for i in $(seq 600); do [ -e "$(ls {tmp_path}/caller.* | sed -n 2p)" ] && exec g++ "$@" -O0; sleep 0.1; done',
        "exit 1",
    )
    here = {"CXX": str(tmp_path / "c++"), "PYTEST_REPRO_CACHE": str(tmp_path / "cache")}
    with ThreadPoolExecutor() as pool:
        first, second = pool.map(lambda _: python(PREPARE, **here), range(2))
    for said in (first, second):
        assert re.fullmatch(rf"layercast: compiling .*\nc\+\+ {CAPABILITY} 40.0", said)
    assert [path.suffix for path in (tmp_path / "cache" / "native").iterdir()] == [".so"]
    assert python(PREPARE, **here) == f"c++ {CAPABILITY} 40.0"


def test_on_a_gpu_without_triton_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, f"{layercast.__name__}.gpu", raising=False)
    monkeypatch.delattr(layercast, "gpu", raising=False)
    said: list[str] = []
    assert product.prepare(torch.device("cuda"), said.append) == "tiles (no triton)"
    assert "pip install triton" in said[0]


def test_the_package_has_the_public_names_and_imports_torch_only_for_them() -> None:
    assert layercast.linear is product.linear
    assert layercast.prepare is product.prepare
    with pytest.raises(AttributeError, match="liner"):
        _ = layercast.liner
    name = layercast.__name__
    assert python(f"import sys, {name} as it; print('torch' in sys.modules, it.MODE.name)") == "False layercast"
    assert python(f"import sys; from {name} import linear; print('torch' in sys.modules)") == "True"
