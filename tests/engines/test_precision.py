"""The probe believes what it sees: every way of losing FP32 that this machine can show is caught."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pytest_repro import precision
from pytest_repro.numerics import mode
from pytest_repro.numerics.fp32 import ieee

from .families import FAMILIES, create, onednn
from .tiny import build


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("tiny"), bias=True)


def loaded(folder: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def bits(layer: torch.nn.Linear) -> float:
    found = precision._precision(layer)
    assert found is not None
    return found[0]


@pytest.mark.parametrize(
    ("dtype", "wanted"), [(torch.float32, "fp32"), (torch.bfloat16, "bf16"), (torch.float16, "fp16")], ids=str
)
def test_the_class_is_that_of_the_arithmetic(folder: Path, dtype: torch.dtype, wanted: str) -> None:
    assert precision.observe(loaded(folder, dtype)).compute_class == wanted


def test_autocast_is_caught(folder: Path) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert precision.observe(loaded(folder, torch.float32)).compute_class == "bf16"


def test_one_downcast_layer_is_caught(folder: Path) -> None:
    """A module that rounds its input to bf16 and answers in float32, as an `implicit bf16` kernel does."""

    class Implicit(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.bfloat16().float())

    model = loaded(folder, torch.float32)
    layer = model.model.layers[1].mlp.down_proj
    sneaky = Implicit(layer.in_features, layer.out_features, bias=False)
    sneaky.weight = layer.weight
    model.model.layers[1].mlp.down_proj = sneaky
    seen = precision.observe(model)
    assert seen.compute_class == "bf16"
    assert "down_proj" in seen.detail


def test_operands_rounded_to_tf32_are_caught(folder: Path) -> None:
    """TF32 needs a GPU; its rounding of operands to 11 significant bits does not."""

    class TF32(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            bits = x.contiguous().view(torch.int32)
            return super().forward(((bits + 0x1000) & ~0x1FFF).view(torch.float32))

    model = loaded(folder, torch.float32)
    layer = model.lm_head
    sneaky = TF32(layer.in_features, layer.out_features, bias=False)
    sneaky.weight = layer.weight
    model.lm_head = sneaky
    assert precision.observe(model).compute_class == "tf32"


def test_short_sums_are_caught(folder: Path) -> None:
    """Exact products, but every partial sum of 8 rounded to bf16."""

    class ShortSums(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            parts = [xs @ ws.T for xs, ws in zip(x.split(8, -1), self.weight.split(8, -1), strict=True)]
            total = parts[0]
            for part in parts[1:]:
                both = (total != 0) & (part != 0)
                total = torch.where(both, (total + part).bfloat16().float(), total + part)
            return total

    model = loaded(folder, torch.float32)
    layer = model.lm_head
    sneaky = ShortSums(layer.in_features, layer.out_features, bias=False)
    sneaky.weight = layer.weight
    model.lm_head = sneaky
    seen = precision.observe(model)
    assert seen.product_bits >= precision.FP32_PRODUCT_BITS
    assert not seen.fp32_class


def test_bf16_products_of_onednn_are_caught_where_this_cpu_makes_them_and_fp32_mode_undoes_them() -> None:
    """oneDNN has them on CPUs with matrix tiles (AMX); on others the same switch changes nothing, and nothing is to be seen."""
    wide, x = torch.nn.Linear(512, 512, bias=False), torch.randn(64, 512)
    with torch.inference_mode(), onednn("bf16"):
        error = (wide(x) - x.double() @ wide.weight.double().T).abs().max()
        rounds = bool(error > 1e-4)
        assert (bits(wide) < precision.FP32_PRODUCT_BITS) is rounds
        with mode("fp32").switches():
            assert bits(wide) >= precision.FP32_PRODUCT_BITS
        assert (bits(wide) < precision.FP32_PRODUCT_BITS) is rounds


def switches() -> list[str]:
    b: Any = torch.backends
    return [
        b.cuda.matmul.fp32_precision,
        b.mkldnn.matmul.fp32_precision,
        b.cudnn.conv.fp32_precision,
        b.cudnn.rnn.fp32_precision,
    ]


@pytest.mark.parametrize("legacy", ["highest", "high", "medium"])
def test_fp32_mode_restores_what_it_found_also_on_error_and_nested(legacy: str) -> None:
    before_all = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(legacy)
    try:
        found = switches()
        with ieee():
            assert switches() == ["ieee"] * 4
            with ieee():
                pass
            assert switches() == ["ieee"] * 4
            assert torch.get_float32_matmul_precision() == "highest"
        assert switches() == found
        with pytest.raises(ZeroDivisionError), ieee():
            raise ZeroDivisionError
        assert switches() == found
        assert torch.get_float32_matmul_precision() == legacy
    finally:
        torch.set_float32_matmul_precision(before_all)


def test_fp32_mode_switches_autocast_off(folder: Path) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), ieee():
        assert precision.observe(loaded(folder, torch.float32)).compute_class == "fp32"


@pytest.mark.parametrize("name", FAMILIES)
def test_an_honest_fp32_model_of_any_family_is_seen_as_one_and_its_bf16_twin_is_not(name: str) -> None:
    """Routers that are nn.Linear by class, fused experts, linear attention, Conv1D: no false alarm, no false trust."""
    model = create(name).eval()
    seen = precision.observe(model)
    assert seen.compute_class == "fp32", seen
    watched, _ = precision._watched(model)
    assert watched is not None and watched.sum_bits > 20
    assert precision.observe(model.bfloat16()).compute_class == "bf16"


@pytest.mark.parametrize("operation", ["einsum", "addmm", "baddbmm", "grouped_mm"])
def test_products_outside_of_linear_layers_are_held_against_float64(operation: str) -> None:
    """Operands that lost bits on the way in cannot be told; an answer that did can."""
    torch.manual_seed(0)
    a, b = torch.randn(4, 32), torch.randn(32, 8)
    calls: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
        "einsum": (torch.einsum, ("ij,jk->ik", a, b), {}),
        "addmm": (torch.addmm, (torch.randn(8), a, b), {}),
        "baddbmm": (torch.baddbmm, (torch.zeros(1, 4, 8), a[None], b[None]), {"beta": 0.0, "alpha": 0.5}),
        "grouped_mm": (
            torch.nn.functional.grouped_mm,
            (a, torch.stack([b, -b])),
            {"offs": torch.tensor([1, 4], dtype=torch.int32)},
        ),
    }
    func, args, kwargs = calls[operation]
    out = func(*args, **kwargs)
    right = precision._product(func, args, kwargs, out)
    short = ((out.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    wrong = precision._product(func, args, kwargs, short)
    assert right is not None and right.compute_class == "fp32"
    assert wrong is not None and wrong.compute_class == "tf32"


def test_large_attention_logits_are_no_false_alarm() -> None:
    """Rounding of softmax grows with the logits: what it is held against grows as well."""
    torch.manual_seed(0)
    attention = torch.nn.functional.scaled_dot_product_attention
    for size in (1.0, 4.0, 60.0):
        q, k, v = (torch.randn(1, 4, 8, 128) * s for s in (size, size, 1.0))
        seen = precision._product(attention, (q, k, v), {}, attention(q, k, v))
        assert seen is not None and seen.compute_class == "fp32", (size, seen)
        if size == 60.0:
            continue  # the softmax chooses one token, in any precision
        short = attention(q.bfloat16(), k.bfloat16(), v.bfloat16()).float()
        seen = precision._product(attention, (q, k, v), {}, short)
        assert seen is not None and seen.compute_class != "fp32", (size, seen)
        cut = [((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) for t in (q, k, v)]
        seen = precision._product(attention, (q, k, v), {}, attention(*cut))
        assert seen is not None and seen.compute_class != "fp32", (size, seen)


def test_nothing_is_made_of_answers_that_cannot_be_compared() -> None:
    tiny = torch.full((2, 2), 1e-25)
    assert precision._product(torch.mm, (tiny, tiny), {}, tiny @ tiny).compute_class == "fp32"  # type: ignore[union-attr]
    whole = torch.ones(2, 2, dtype=torch.long)
    assert precision._product(torch.mm, (whole, whole), {}, whole @ whole) is None
    endless = torch.full((2, 2), torch.inf)
    assert precision._product(torch.mm, (endless, endless), {}, endless @ endless) is None
    broken = torch.eye(2)
    broken[0, 0] = torch.nan
    assert precision._product(torch.mm, (torch.eye(2), torch.eye(2)), {}, broken).compute_class == "lower"  # type: ignore[union-attr]


def test_the_narrowest_part_of_the_cache_counts(folder: Path) -> None:
    class Layer:
        def __init__(self, keys: torch.dtype, values: torch.dtype) -> None:
            self.keys, self.values = torch.ones(1, dtype=keys), torch.ones(1, dtype=values)

    class Out:
        class past_key_values:
            layers = (Layer(torch.float32, torch.float32), Layer(torch.float32, torch.float8_e4m3fn))

    assert precision._cache_dtype(Out) == "float8_e4m3fn"
    assert precision._cache_dtype(object()) == "none"


# --- layers and attention of which only the answers are seen ---------------------------------------------------------


def rounded(x: torch.Tensor, bits: int) -> torch.Tensor:
    """x with so many bits of significand kept, as TF32 (10) or bf16 (7) units keep them."""
    low = 23 - bits
    return (((x.contiguous().view(torch.int32) + (1 << (low - 1))) >> low) << low).view(torch.float32)


@pytest.mark.parametrize(("bits", "found"), [(23, "fp32"), (10, "tf32"), (7, "bf16")])
def test_a_layer_that_only_answers(bits: int, found: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(300, 500).bfloat16().float()

    def apply(x: torch.Tensor) -> torch.Tensor:
        return (rounded(x, bits) if bits < 23 else x) @ weight.T

    seen = precision.observe_layer("layer", apply, 500, 300, torch.float32, "cpu")
    assert seen.compute_class == found
    assert seen.detail == "layer answers in float32"


@pytest.mark.parametrize("cap", [0.0, 5.0])
@pytest.mark.parametrize(("bits", "fp32"), [(23, True), (10, False), (7, False)])
def test_attention_that_only_answers(bits: int, fp32: bool, cap: float) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(8, 4, 32), torch.randn(8, 2, 32), torch.randn(8, 2, 32)
    a, b, c = (rounded(t, bits).transpose(0, 1) if bits < 23 else t.transpose(0, 1) for t in (q, k, v))
    b, c = b.repeat_interleave(2, 0), c.repeat_interleave(2, 0)
    logits = a @ b.transpose(1, 2) * 0.2
    logits = cap * torch.tanh(logits / cap) if cap else logits
    hidden = torch.ones(8, 8, dtype=torch.bool).triu(1)
    out = (logits.masked_fill(hidden, -torch.inf).softmax(-1) @ c).transpose(0, 1)
    seen = precision.observe_attention("attention", q, k, v, out, 0.2, cap)
    assert seen is not None and seen.fp32_class is fp32


def test_an_answer_narrower_than_fp32_is_named() -> None:
    assert precision.observe_narrow("norm", torch.ones(2)) is None
    assert precision.observe_narrow("norm", torch.ones(2, dtype=torch.long)) is None
    seen = precision.observe_narrow("norm", (torch.ones(2), torch.ones(2, dtype=torch.float16)))
    assert seen is not None and seen.compute_class == "fp16" and seen.detail == "norm answers in float16"
