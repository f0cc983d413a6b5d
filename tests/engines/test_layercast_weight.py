"""A `Weight` behaves like the float32 tensor of the same numbers, in half the memory, and never lets itself be changed."""

from __future__ import annotations

import copy
import io
import operator
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save

from pytest_repro.numerics.layercast.weight import Weight, parameter, stored, wrap

from .families import bits

Op = Callable[[torch.Tensor], Any]
INDICES = torch.tensor([[3, 0], [5, 5]])


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=str)
def short(request: pytest.FixtureRequest) -> torch.Tensor:
    """The 16-bit tensor; memory behind it is its own, so that what reads too far does no harm."""
    return torch.randn(12, 4, generator=torch.Generator().manual_seed(0)).to(request.param)[:6]


@pytest.fixture
def weight(short: torch.Tensor) -> Weight:
    return wrap(short)


@pytest.fixture
def full(short: torch.Tensor) -> torch.Tensor:
    return short.float()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))


def plain(value: Any) -> Any:
    """Comparable: tensors as (class, dtype, shape, numbers), in lists where there are several."""
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), bits(value.float() if value.is_floating_point() else value)
    return value


def test_it_says_float32_and_takes_two_bytes(weight: Weight, short: torch.Tensor) -> None:
    assert weight.dtype == torch.float32
    assert weight.is_floating_point()
    assert weight.element_size() == weight.itemsize == 2
    assert weight.nbytes == short.nbytes
    assert weight.untyped_storage().data_ptr() == short.untyped_storage().data_ptr()
    assert tuple(weight.shape) == (6, 4)
    assert len(weight) == 6
    assert weight.stride() == short.stride()
    assert weight.device == short.device
    assert stored(weight).dtype == short.dtype
    assert type(stored(weight)) is torch.Tensor


VIEWS: list[Any] = [
    pytest.param(lambda w: w.T, id="T"),
    pytest.param(lambda w: w.mT, id="mT"),
    pytest.param(lambda w: w.t(), id="t"),
    pytest.param(lambda w: w.transpose(0, 1), id="transpose"),
    pytest.param(lambda w: torch.transpose(w, 0, 1), id="torch.transpose"),
    pytest.param(lambda w: w.permute(1, 0), id="permute"),
    pytest.param(lambda w: w[2], id="row"),
    pytest.param(lambda w: w[1:5:2], id="rows"),
    pytest.param(lambda w: w[:, 1], id="column"),
    pytest.param(lambda w: w[..., None], id="new axis"),
    pytest.param(lambda w: w.chunk(2), id="chunk"),
    pytest.param(lambda w: torch.chunk(w, 2, dim=-1), id="torch.chunk"),
    pytest.param(lambda w: w.split([1, 5]), id="split"),
    pytest.param(lambda w: torch.split(w, 2), id="torch.split"),
    pytest.param(lambda w: w.unbind(0), id="unbind"),
    pytest.param(lambda w: w.narrow(0, 1, 2), id="narrow"),
    pytest.param(lambda w: w.select(0, 1), id="select"),
    pytest.param(lambda w: w.view(4, 6), id="view"),
    pytest.param(lambda w: w.view(-1), id="flat view"),
    pytest.param(lambda w: w.reshape(3, 8), id="reshape"),
    pytest.param(lambda w: w.unsqueeze(0), id="unsqueeze"),
    pytest.param(lambda w: w.unsqueeze(0).squeeze(0), id="squeeze"),
    pytest.param(lambda w: w.detach(), id="detach"),
    pytest.param(lambda w: w.data, id="data"),
    pytest.param(lambda w: w.contiguous(), id="contiguous"),
    pytest.param(lambda w: w.to("cpu"), id="to device"),
    pytest.param(lambda w: w.cpu(), id="cpu"),
    pytest.param(lambda w: w.H, id="H"),
    pytest.param(lambda w: w.mH, id="mH"),
    pytest.param(lambda w: torch.transpose(input=w, dim0=0, dim1=1), id="transpose by keyword"),
]


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_is_a_weight_that_shares_the_storage(
    weight: Weight, full: torch.Tensor, short: torch.Tensor, view: Op
) -> None:
    found = view(weight)
    for part in found if isinstance(found, (list, tuple)) else [found]:
        assert type(part) is Weight
        assert stored(part).dtype == short.dtype
        assert stored(part).untyped_storage().data_ptr() == short.untyped_storage().data_ptr()
    assert plain(found) == plain(view(full))


@pytest.mark.parametrize("copied", [torch.clone, torch.Tensor.clone, copy.deepcopy, lambda w: w[INDICES]])
def test_a_copy_is_a_weight_with_a_storage_of_its_own(
    weight: Weight, full: torch.Tensor, short: torch.Tensor, copied: Op
) -> None:
    found = copied(weight)
    assert type(found) is Weight
    assert stored(found).dtype == short.dtype
    assert stored(found).untyped_storage().data_ptr() != short.untyped_storage().data_ptr()
    assert plain(found) == plain(copied(full))


EXACT: list[Any] = [
    pytest.param(lambda w: w + 1, id="add"),
    pytest.param(lambda w: 1 - w, id="reversed subtraction"),
    pytest.param(lambda w: w * 1.1, id="multiply"),
    pytest.param(lambda w: 3 / w, id="divide"),
    pytest.param(lambda w: -w, id="negate"),
    pytest.param(lambda w: w**2, id="power"),
    pytest.param(lambda w: w > 0, id="compare"),
    pytest.param(lambda w: torch.ones(6, 4) * w, id="second operand"),
    pytest.param(lambda w: torch.ones(4).type_as(w), id="type_as"),
    pytest.param(lambda w: torch.ones(4, dtype=torch.float64).to(w), id="to the weight's dtype"),
    pytest.param(lambda w: torch.ones(4, dtype=torch.float64).to(w.dtype), id="to weight.dtype"),
    pytest.param(lambda w: w.float(), id="float"),
    pytest.param(lambda w: w.to(torch.float32), id="to float32"),
    pytest.param(lambda w: w.double(), id="double"),
    pytest.param(lambda w: w.to("cpu", torch.float64), id="to device and float64"),
    pytest.param(lambda w: w.type(torch.float64), id="type"),
    pytest.param(lambda w: w.type(), id="name of the type"),
    pytest.param(lambda w: torch.result_type(w, 1), id="result_type"),
    pytest.param(lambda w: w.sum(), id="sum"),
    pytest.param(lambda w: w.norm(dim=1), id="norm"),
    pytest.param(lambda w: w.softmax(-1), id="softmax"),
    pytest.param(lambda w: w.max(0), id="max"),
    pytest.param(lambda w: w.topk(2), id="topk"),
    pytest.param(lambda w: F.gelu(w), id="gelu"),
    pytest.param(lambda w: F.layer_norm(torch.ones(3, 4), (4,), w[0], w[1]), id="layer_norm"),
    pytest.param(lambda w: F.rms_norm(torch.arange(12.0).view(3, 4), (4,), w[0]), id="rms_norm"),
    pytest.param(lambda w: torch.cat([w, w]), id="cat"),
    pytest.param(lambda w: torch.stack((w, w), dim=1), id="stack"),
    pytest.param(lambda w: torch.where(w > 0, w, 0.0), id="where"),
    pytest.param(lambda w: w.expand(2, 6, 4), id="expand"),
    pytest.param(lambda w: w.flatten(), id="flatten"),
    pytest.param(lambda w: w.repeat(1, 2), id="repeat"),
    pytest.param(lambda w: w.index_select(0, INDICES[0]), id="index_select"),
    pytest.param(lambda w: w.tensor_split(2), id="tensor_split"),
    pytest.param(lambda w: list(w), id="iteration"),
    pytest.param(lambda w: torch.zeros_like(w), id="zeros_like"),
    pytest.param(lambda w: w.new_ones(3), id="new_ones"),
    pytest.param(lambda w: w.tolist(), id="tolist"),
    pytest.param(lambda w: w[2, 3].item(), id="item"),
    pytest.param(lambda w: torch.from_numpy(w.numpy().copy()), id="numpy"),
    pytest.param(lambda w: torch.equal(w, w.clone()), id="equal"),
    pytest.param(lambda w: F.embedding(INDICES, w), id="embedding"),
    pytest.param(lambda w: F.embedding(INDICES, w, padding_idx=0), id="padded embedding"),
    pytest.param(lambda w: torch.add(torch.ones(6, 4), w, out=torch.empty(6, 4)), id="out"),
    pytest.param(lambda w: w.view(torch.int32), id="view as int32"),
    pytest.param(lambda w: torch.embedding(w, INDICES), id="torch.embedding"),
    pytest.param(lambda w: torch.ones(6, 4).add_(w), id="add_ to another"),
    pytest.param(lambda w: torch.ones(6, 4).mul_(w), id="mul_ to another"),
    pytest.param(lambda w: torch.empty(6, 4).copy_(w), id="copy_ to another"),
    pytest.param(lambda w: set_item(torch.ones(9, 4), slice(6), w), id="assign to another"),
    pytest.param(lambda w: added(torch.ones(6, 4), w), id="+="),
]


def set_item(target: Any, key: Any, value: Any) -> Any:
    target[key] = value
    return target


def added(target: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    alias = target
    alias += value
    return target


@pytest.mark.parametrize("op", EXACT)
def test_an_operation_gives_exactly_what_the_fp32_tensor_gives(
    weight: Weight, full: torch.Tensor, short: torch.Tensor, op: Op
) -> None:
    before = bits(short)
    assert plain(op(weight)) == plain(op(full))
    assert bits(short) == before


PRODUCTS: list[Any] = [
    pytest.param(lambda w, x: F.linear(x, w), id="linear"),
    pytest.param(lambda w, x: F.linear(x, w, torch.arange(6.0)), id="biased linear"),
    pytest.param(lambda w, x: F.linear(x, w, w.reshape(-1)[:6]), id="linear with a weight for a bias"),
    pytest.param(lambda w, x: F.linear(input=x, weight=w), id="linear by keyword"),
    pytest.param(lambda w, x: F.linear(x[0, 0], w), id="linear of a vector"),
    pytest.param(lambda w, x: F.linear(x[:0], w), id="linear of nothing"),
    pytest.param(lambda w, x: F.linear(x.mT.contiguous().mT, w[1:5]), id="linear of views"),
    pytest.param(lambda w, x: F.linear(x, w[:, ::2].repeat(1, 2)), id="linear of a repetition"),
    pytest.param(lambda w, x: x @ w.T, id="@"),
    pytest.param(lambda w, x: x @ w[:4], id="@ of (in, out)"),
    pytest.param(lambda w, x: w @ x[0].T, id="weight @"),
    pytest.param(lambda w, x: x @ w[0], id="@ vector"),
    pytest.param(lambda w, x: x @ w.view(1, 6, 4).mT, id="batched @"),
    pytest.param(lambda w, x: torch.matmul(x, w.T), id="matmul"),
    pytest.param(lambda w, x: x.matmul(w.T), id="x.matmul"),
    pytest.param(lambda w, x: torch.mm(x[0], w.T), id="mm"),
    pytest.param(lambda w, x: torch.mm(x[0], mat2=w.T), id="mm by keyword"),
    pytest.param(lambda w, x: torch.bmm(x, w.view(2, 3, 4).mT), id="bmm"),
    pytest.param(lambda w, x: torch.addmm(torch.arange(6.0), x[0], w.T), id="addmm"),
    pytest.param(lambda w, x: torch.addmm(torch.ones(3, 6), x[0], w.T, beta=0.5, alpha=2), id="scaled addmm"),
    pytest.param(lambda w, x: torch.arange(6.0).addmm(x[0], w.T), id="x.addmm"),
    pytest.param(lambda w, x: torch.addmv(torch.ones(6), w, x[0, 0]), id="addmv"),
    pytest.param(lambda w, x: torch.einsum("bti,oi->bto", x, w), id="einsum"),
    pytest.param(lambda w, x: torch.einsum("bti,abi->bta", x, w.view(3, 2, 4)), id="einsum of three axes"),
    pytest.param(lambda w, x: torch.tensordot(x, w, ([2], [1])), id="tensordot"),
    pytest.param(lambda w, x: F.conv1d(x.mT, w.view(6, 4, 1)), id="conv1d"),
    pytest.param(lambda w, x: F.conv1d(x.mT, w[:4, None, :3], groups=4, padding=1), id="depthwise conv1d"),
    pytest.param(lambda w, x: F.bilinear(x, x, w[:4].view(1, 4, 4)), id="bilinear"),
    pytest.param(lambda w, x: F.embedding_bag(INDICES, w), id="embedding_bag"),
    pytest.param(lambda w, x: F.scaled_dot_product_attention(x[:, :3], w[None], w[None]), id="attention"),
    pytest.param(lambda w, x: torch.ops.aten.linear(x, w), id="an operator of torch.ops"),
    pytest.param(lambda w, x: torch.matmul(x, other=w.T), id="matmul by keyword"),
    pytest.param(lambda w, x: torch.addmm(torch.ones(1), x[0], w.T), id="addmm of a lone bias"),
]


@pytest.mark.parametrize("op", PRODUCTS)
def test_a_product_is_that_of_fp32_but_for_the_order_of_its_sums(
    weight: Weight, full: torch.Tensor, x: torch.Tensor, op: Callable[..., torch.Tensor]
) -> None:
    """At most six summands: within some 2^-24 of the truth, where 16-bit operands would be off by 2^-9 or 2^-12."""
    found = op(weight, x)
    assert type(found) is torch.Tensor
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, op(full, x), rtol=1e-6, atol=2e-6)


def test_16_bit_rows_are_not_silently_multiplied(weight: Weight, x: torch.Tensor) -> None:
    with pytest.raises(RuntimeError, match="same dtype"):
        F.linear(x.bfloat16(), weight)


def test_the_gradient_of_the_rows_is_that_of_fp32(weight: Weight, full: torch.Tensor, x: torch.Tensor) -> None:
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    F.linear(ours, weight).square().sum().backward()
    F.linear(theirs, full).square().sum().backward()
    assert theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad)


def changing(name: str) -> Op:
    return lambda w: getattr(operator, name)(w, 2)


CHANGES: list[Any] = [
    pytest.param(lambda w: w.add_(1), id="add_"),
    pytest.param(lambda w: w.zero_(), id="zero_"),
    pytest.param(lambda w: w.copy_(torch.ones(6, 4)), id="copy_"),
    pytest.param(lambda w: w.normal_(), id="normal_"),
    pytest.param(lambda w: w.clamp_(-1, 1), id="clamp_"),
    pytest.param(lambda w: w.data.fill_(3), id="data.fill_"),
    pytest.param(lambda w: w.detach().mul_(2), id="detach().mul_"),
    pytest.param(lambda w: w.T.mul_(2), id="T.mul_"),
    pytest.param(lambda w: w[0].zero_(), id="row.zero_"),
    pytest.param(lambda w: w.index_copy_(0, INDICES[0], torch.ones(2, 4)), id="index_copy_"),
    pytest.param(lambda w: set_item(w, 0, 1.0), id="assign to a row"),
    pytest.param(lambda w: set_item(w, w > 0, 1.0), id="assign through a mask"),
    pytest.param(lambda w: torch.relu_(w), id="relu_"),
    pytest.param(lambda w: torch.nn.init.zeros_(w), id="init.zeros_"),
    pytest.param(lambda w: torch.nn.init.xavier_uniform_(w), id="init.xavier_uniform_"),
    pytest.param(lambda w: torch._foreach_mul_([w], 2.0), id="foreach"),
    *(
        pytest.param(changing(name), id=name)
        for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow")
    ),
    pytest.param(lambda w: torch.add(torch.ones(6, 4), 1, out=w), id="out="),
    pytest.param(lambda w: setattr(w, "data", torch.ones(6, 4)), id="data ="),
    pytest.param(lambda w: setattr(w, "requires_grad", True), id="requires_grad ="),
    pytest.param(lambda w: w.requires_grad_(), id="requires_grad_()"),
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_would_change_a_weight_is_refused_and_leaves_its_bits(
    weight: Weight, short: torch.Tensor, change: Op
) -> None:
    before = bits(short)
    with pytest.raises((TypeError, RuntimeError), match="LayerCast weight"), torch.no_grad():
        change(weight)
    assert bits(short) == bits(stored(weight)) == before
    assert stored(weight).dtype == short.dtype
    assert not weight.requires_grad


def test_an_embedding_with_max_norm_leaves_the_stored_bits(weight: Weight, short: torch.Tensor) -> None:
    before, wanted = bits(short), F.embedding(INDICES, short.float(), max_norm=0.5)
    assert torch.equal(F.embedding(INDICES, weight, max_norm=0.5), wanted)
    assert bits(short) == before


def test_asking_for_no_gradient_is_allowed(weight: Weight) -> None:
    assert weight.requires_grad_(False) is weight
    assert not weight.requires_grad


@pytest.mark.parametrize("write", [torch.save, lambda w, file: pickle.dump(w, file)], ids=["torch.save", "pickle"])
def test_it_is_written_as_the_16_bit_tensor(weight: Weight, short: torch.Tensor, write: Callable[..., None]) -> None:
    file = io.BytesIO()
    write(weight, file)
    file.seek(0)
    found = torch.load(file, weights_only=True) if write is torch.save else pickle.load(file)
    assert type(found) is torch.Tensor
    assert found.dtype == short.dtype
    assert bits(found) == bits(short)


def test_its_stored_tensor_goes_through_safetensors_unchanged(weight: Weight, short: torch.Tensor) -> None:
    found = load(save({"w": stored(weight).contiguous()}))["w"]
    assert found.dtype == short.dtype
    assert bits(found) == bits(short)


def test_safetensors_never_reads_beyond_a_weight(weight: Weight, full: torch.Tensor) -> None:
    """It goes by dtype and address: the right numbers or a refusal, and never what lies behind in memory."""
    try:
        found = load(save({"w": weight}))["w"]
    except TypeError as exc:
        assert "LayerCast" in str(exc)
    else:
        assert torch.equal(found.float(), full)


def test_it_prints_its_numbers(weight: Weight, short: torch.Tensor) -> None:
    assert repr(weight) == repr(short)
    assert f"{weight[0, 0]:.2f}" == f"{short[0, 0].item():.2f}"


def test_a_parameter_is_one_for_torch_and_survives_a_deepcopy(short: torch.Tensor, x: torch.Tensor) -> None:
    layer = torch.nn.Linear(4, 6)
    layer.weight = parameter(short)
    assert isinstance(layer.weight, torch.nn.Parameter)
    assert dict(layer.named_parameters())["weight"] is layer.weight
    twin = copy.deepcopy(layer)
    assert isinstance(twin.weight, torch.nn.Parameter)
    assert type(twin.weight) is Weight
    assert stored(twin.weight).data_ptr() != short.data_ptr()
    assert torch.equal(twin(x), layer(x))


def test_a_bias_can_be_replaced_for_one_call(short: torch.Tensor, x: torch.Tensor) -> None:
    layer = torch.nn.Linear(4, 6)
    layer.weight = parameter(short)
    other = torch.arange(6.0)
    found = torch.func.functional_call(layer, {"bias": other}, (x,))
    torch.testing.assert_close(found, F.linear(x, short.float(), other), rtol=1e-6, atol=2e-6)
    assert not torch.equal(found, layer(x))


def test_tensors_without_weights_are_untouched_by_the_rules(x: torch.Tensor) -> None:
    """A Weight among the arguments of a view's index, or of a move's target, does not make the result one."""
    order = wrap(torch.tensor([1.0, 0.0]).bfloat16())
    assert type(x.to(order)) is torch.Tensor
    assert type(x[order > 0]) is torch.Tensor
    assert torch.equal(x[order > 0], x[:1])
