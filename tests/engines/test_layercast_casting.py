"""`casting` touches a loaded model and torch's switches, and gives everything back, whatever happens on the way."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pytest_repro.errors import EngineError
from pytest_repro.numerics.layercast import casting, product
from pytest_repro.numerics.layercast.weight import Weight, stored

from .families import Snapshot, checkpoint, greedy, ids, layercast, loaded, logits, owned, switches


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint("llama biased", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def wanted(folder: Path) -> torch.Tensor:
    return logits(layercast(folder))


@pytest.fixture
def model(folder: Path) -> Any:
    return loaded(folder)


@contextmanager
def untouched(model: Any) -> Iterator[None]:
    """What happens inside leaves the model and torch as they were."""
    before, at_first = Snapshot(model), logits(model)
    yield
    before.check(model)
    assert torch.equal(logits(model), at_first)


def test_an_exception_inside_restores_everything(model: Any, wanted: torch.Tensor) -> None:
    with untouched(model):
        with pytest.raises(ZeroDivisionError), casting(model):
            assert torch.equal(logits(model), wanted)
            raise ZeroDivisionError
        with casting(model):
            assert torch.equal(logits(model), wanted)


def test_it_nests_and_can_be_entered_again(model: Any, wanted: torch.Tensor) -> None:
    with untouched(model):
        for _ in range(2):
            with casting(model):
                outer = Snapshot(model)
                with casting(model):
                    assert torch.equal(logits(model), wanted)
                outer.check(model)
                assert torch.equal(logits(model), wanted)


def test_it_nests_around_a_model_that_was_loaded_with_layercast(folder: Path, wanted: torch.Tensor) -> None:
    model = layercast(folder)
    with untouched(model), casting(model):
        assert torch.equal(logits(model), wanted)


def test_two_models_at_once_do_not_meet(folder: Path, model: Any, wanted: torch.Tensor) -> None:
    other = loaded(folder)
    with untouched(model), untouched(other), casting(model):
        with casting(other):
            assert torch.equal(logits(other), wanted)
        assert torch.equal(logits(model), wanted)


def test_a_parameter_that_cannot_be_cast_is_named_and_nothing_is_changed(model: Any) -> None:
    layer = model.model.layers[1].mlp.up_proj
    original = layer.weight
    layer.weight = torch.nn.Parameter(torch.ones(original.shape, dtype=torch.int8), requires_grad=False)
    before = Snapshot(model)
    with pytest.raises(EngineError, match=r"model\.layers\.1\.mlp\.up_proj\.weight \(Linear, torch\.int8"):
        casting(model).__enter__()
    before.check(model)
    layer.weight = original
    with untouched(model), casting(model):
        pass


def test_a_matrix_that_never_was_16_bit_is_refused_and_nothing_is_changed(folder: Path) -> None:
    model = loaded(folder, torch.float32)
    with torch.no_grad():
        model.lm_head.weight += 1e-6
    with untouched(model), pytest.raises(EngineError, match=r"lm_head\.weight \(Linear, torch\.float32"):
        casting(model).__enter__()


def test_an_fp32_model_whose_numbers_are_16_bit_numbers_is_taken(folder: Path, wanted: torch.Tensor) -> None:
    model = loaded(folder, torch.float32)
    with untouched(model), casting(model):
        assert stored(model.lm_head.weight).dtype == torch.bfloat16
        assert torch.equal(logits(model), wanted)


def test_a_compiler_that_fails_on_entering_leaves_nothing_behind(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> str:
        raise OSError("disk full")

    monkeypatch.setattr(product, "prepare", broken)
    with untouched(model), pytest.raises(OSError, match="disk full"):
        casting(model).__enter__()


def test_flash_attention_is_refused_with_the_setting_that_mends_it(model: Any) -> None:
    model.config._attn_implementation_internal = "flash_attention_2"
    before = Snapshot(model)
    with pytest.raises(EngineError, match="flash_attention_2") as caught:
        casting(model).__enter__()
    assert "sdpa" in caught.value.fix
    before.check(model)


@pytest.mark.parametrize("legacy", ["highest", "high", "medium"])
def test_switches_that_leave_fp32_are_set_inside_and_given_back(model: Any, legacy: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(legacy)
    try:
        with untouched(model), casting(model):
            assert switches()[:5] == [*["ieee"] * 4, "highest"]
    finally:
        torch.set_float32_matmul_precision(before)


def test_an_outer_autocast_does_not_reach_inside(model: Any, wanted: torch.Tensor) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with untouched(model), casting(model):
            assert torch.equal(logits(model), wanted)
        assert torch.is_autocast_enabled("cpu")


def test_fused_experts_are_computed_one_by_one_inside_and_as_before_after(tmp_path: Path) -> None:
    model = loaded(checkpoint("mixtral", tmp_path))
    assert model.config._experts_implementation == "grouped_mm", "this test wants a setting that is changed"
    with untouched(model), casting(model):
        assert model.config._experts_implementation == "eager"
        assert model.config.dtype == torch.float32


def test_tied_parameters_stay_tied(tmp_path: Path) -> None:
    model = loaded(checkpoint("llama tied", tmp_path))
    with untouched(model), casting(model):
        assert isinstance(model.lm_head.weight, Weight)
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_matrices_are_shared_and_not_copied(model: Any) -> None:
    before = {name: p.data_ptr() for name, p in model.named_parameters() if p.dim() >= 2}
    with casting(model):
        assert {n: stored(p).data_ptr() for n, p in model.named_parameters() if n in before} == before


def test_vectors_and_buffers_are_plain_fp32_inside(model: Any) -> None:
    model.register_buffer("table", torch.ones(2, dtype=torch.bfloat16))
    with untouched(model), casting(model):
        small = [*(p for p in model.parameters() if p.dim() < 2), *model.buffers()]
        assert {(isinstance(t, Weight), t.dtype) for t in small} == {(False, torch.float32)}


def test_a_conv1d_lies_in_memory_as_the_product_wants_it(tmp_path: Path) -> None:
    """It holds (in, out); untransposed, each call would copy it."""
    folder = checkpoint("gpt2", tmp_path)
    model = loaded(folder)
    for holder in (layercast(folder), model):
        with casting(holder):
            assert stored(holder.transformer.h[0].mlp.c_fc.weight).T.is_contiguous()
    assert model.transformer.h[0].mlp.c_fc.weight.is_contiguous()


def test_a_static_cache_holds_fp32_as_well(model: Any, folder: Path) -> None:
    with casting(model):
        assert greedy(model, cache_implementation="static") == greedy(loaded(folder, torch.float32))


def test_a_copy_made_inside_lives_on_outside(model: Any, wanted: torch.Tensor) -> None:
    with untouched(model):
        with casting(model):
            twin = copy.deepcopy(model)
        assert torch.equal(logits(twin), wanted)
        assert twin.lm_head.weight is not model.lm_head.weight


@pytest.mark.parametrize(
    "move",
    [
        pytest.param(lambda model: model.to("cpu"), id="to cpu"),
        pytest.param(lambda model: model.to(torch.float32), id="to float32"),
        pytest.param(lambda model: model.float(), id="float"),
    ],
)
def test_moving_the_model_inside_changes_nothing(
    model: Any, wanted: torch.Tensor, move: Callable[[Any], object]
) -> None:
    with untouched(model), casting(model):
        move(model)
        assert torch.equal(logits(model), wanted)


def test_gradients_being_on_changes_no_bit(model: Any, wanted: torch.Tensor) -> None:
    with torch.enable_grad(), casting(model):
        assert torch.equal(model(ids()).logits, wanted)


def test_saving_inside_never_writes_anything_but_the_checkpoints_numbers(
    model: Any, folder: Path, tmp_path: Path
) -> None:
    for p in model.parameters():  # memory behind each parameter is its own, so that a read too far stays harmless
        p.data = torch.cat([p.data, p.data])[: len(p)]
    with untouched(model), casting(model):
        try:
            model.save_pretrained(tmp_path)
        except Exception as exc:  # refusing is right as well, if the reason is named
            assert "layercast" in str(exc).lower()
    for file in tmp_path.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            assert torch.equal(tensor.float(), load_file(folder / "model.safetensors")[name].float()), name


def test_a_model_without_a_config_can_be_cast() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 5), torch.nn.Linear(5, 3)).bfloat16()
    x = torch.randn(4, 8)
    exact = copy.deepcopy(model).double()(x.double())
    with torch.no_grad(), casting(model):
        torch.testing.assert_close(model(x).double(), exact, rtol=1e-5, atol=1e-6)


class Odd(torch.nn.Module):
    """Uses of a parameter that no list of module classes would foresee."""

    def __init__(self) -> None:
        super().__init__()
        self.cube = torch.nn.Parameter(torch.randn(4, 16, 5))
        self.weight = torch.nn.Parameter(torch.randn(16, 16))
        self.positions = torch.nn.Parameter(torch.randn(7, 16))
        self.rnn = torch.nn.LSTM(16, 16, batch_first=True)
        self.attention = torch.nn.MultiheadAttention(16, 4, batch_first=True)
        self.norm = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(16, 16))
        self.convolution = torch.nn.Conv1d(7, 7, 3, padding=1)
        self.bilinear = torch.nn.Bilinear(16, 16, 16)
        self.register_buffer("table", torch.randn(16, 16))
        self.config = SimpleNamespace()

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [
            torch.einsum("bti,eio->bteo", x, self.cube),
            torch.nn.functional.linear(x.to(self.weight.dtype), self.weight),
            torch.nn.functional.linear(x.type_as(self.weight), self.weight * 0.3),
            x + self.positions,
            torch.cat([self.positions.expand(3, -1, -1), x], 1),
            x @ self.weight.softmax(-1),
            torch.stack([self.weight, self.weight]).sum(0)[:7] * x,
            self.rnn(x)[0],
            self.attention(x, x, x)[0],
            self.norm(x),
            self.convolution(x),
            self.bilinear(x, x),
            torch.nn.functional.linear(x, self.table),
        ]


def test_odd_uses_of_parameters_compute_in_fp32_too() -> None:
    """Within 2^-18 of float64, relative to the largest number: rounding any operand to bf16 would miss it by 2^9."""
    torch.manual_seed(0)
    model = Odd().bfloat16().eval()
    x = torch.randn(3, 7, 16)
    before = owned(model)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        with casting(model):
            answers = model(x)
    assert all(before[name] is tensor for name, tensor in owned(model).items())
    for number, (answer, truth) in enumerate(zip(answers, exact, strict=True)):
        assert answer.dtype == torch.float32, number
        assert float((answer - truth).abs().max() / truth.abs().max()) < 2**-18, number


def test_an_odd_module_inside_a_language_model_computes_in_fp32_too(folder: Path, model: Any) -> None:
    class Adapter(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.to(self.weight.dtype)) + torch.einsum("...i,oi->...o", x, self.extra)

    reference = loaded(folder, torch.float32)
    extra = torch.randn(64, 64).bfloat16()
    for owner in (model, reference):
        layer = owner.model.layers[0].self_attn.o_proj
        layer.__class__ = Adapter
        layer.register_parameter("extra", torch.nn.Parameter(extra.to(layer.weight.dtype)))
    truth = logits(reference)
    with untouched(model), casting(model):
        assert float((logits(model) - truth).abs().max() / truth.abs().max()) < 2**-15
