"""Every operation of a forward pass seen, and its sums in other orders: on plain torch, and on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from pytest_repro import numerics
from pytest_repro.audit import Operation, Pass
from pytest_repro.cli import app
from pytest_repro.engines import operations
from pytest_repro.engines.base import Spec, opener
from pytest_repro.engines.operations import audited, distance
from pytest_repro.engines.reordering import as_they_are, permuted
from pytest_repro.generation import Request
from pytest_repro.models import resolve
from pytest_repro.numerics.layercast.weight import wrap

from .tiny import build


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("tiny"))


def integers(*shape: int) -> torch.Tensor:
    """Whole numbers, whose products and sums are exact in float32: no order moves them, and a wrong permutation does."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(len(shape))).float()


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


LAYOUTS: dict[str, Callable[[torch.dtype], Any]] = {
    "a weight as it lies": lambda d: noise(64, 300).to(d) @ noise(200, 300).to(d).t(),
    "one row": lambda d: F.linear(noise(1, 300).to(d), noise(200, 300).to(d)),
    "transposed keys": lambda d: noise(1, 3, 1, 64).to(d) @ noise(1, 40, 3, 64).to(d).transpose(1, 2).transpose(-1, -2),
    "a part of a cache": lambda d: noise(3, 5, 64).to(d) @ noise(3, 90, 64).to(d)[:, :40].mT,
    "keys of a group": lambda d: noise(4, 5, 64).to(d) @ noise(1, 40, 64).to(d).expand(4, 40, 64).mT,
    "a transposed sum": lambda d: noise(30, 64).to(d).t().sum(-1),
    "attention": lambda d: F.scaled_dot_product_attention(
        *(noise(1, 40, 2, 64).to(d).transpose(1, 2) for _ in range(3)), is_causal=True
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_order_that_changes_nothing_moves_nothing(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: what is compared is order alone, and by the kernel that the model had run."""
    results: list[torch.Tensor] = []
    plain = operations._compared

    def kept(seen: Operation, sums: Any) -> Operation:
        results.append(sums.again(as_they_are))
        return plain(seen, sums)

    monkeypatch.setattr(operations, "_compared", kept)
    monkeypatch.setattr(operations, "orders", lambda: iter([as_they_are]))
    with audited(torch.nn.Identity()) as found:
        out = LAYOUTS[name](dtype)
    assert [op.moved for op in found if op.compared] == [0] and len(results) == 1
    assert torch.equal(results[0].reshape(out.shape), out)


def ran(call: Callable[[], Any]) -> list[Operation]:
    with audited(torch.nn.Identity()) as found:
        call()
    return [op for op in found if op.length]


EXACTLY: dict[str, Callable[[Callable[..., torch.Tensor]], Any]] = {
    "linear": lambda t: F.linear(t(5, 70), t(9, 70), t(9)),
    "linear of a batch": lambda t: F.linear(t(2, 5, 70), t(9, 70)),
    "matmul": lambda t: t(3, 5, 70) @ t(3, 70, 4),
    "a row and a column": lambda t: t(70) @ t(70, 4),
    "addmm": lambda t: torch.addmm(t(5, 4), t(5, 70), t(70, 4), beta=2),
    "baddbmm": lambda t: torch.baddbmm(t(3, 5, 4), t(3, 5, 70), t(3, 70, 4)),
    "sum": lambda t: t(5, 70).sum(),
    "sum of rows": lambda t: t(5, 70).sum(-1, keepdim=True),
    "sum of two dimensions": lambda t: t(3, 5, 70).sum((0, 2)),
    "mean of 64": lambda t: t(5, 64).mean(-1),
}


@pytest.mark.parametrize("name", EXACTLY)
def test_a_sum_that_is_exact_is_the_same_in_every_order(name: str) -> None:
    found = ran(lambda: EXACTLY[name](integers))
    assert found and all(op.compared and not op.moved and not op.shift for op in found)


@pytest.mark.parametrize("name", EXACTLY)
def test_a_sum_that_rounds_moves(name: str) -> None:
    found = ran(lambda: EXACTLY[name](noise))
    assert any(op.moved for op in found) and all((op.relative or 0) < 1e-5 for op in found)


ROUNDING: dict[str, Callable[[], Any]] = {
    "softmax": lambda: noise(5, 300).softmax(-1),
    "softmax along the first dimension": lambda: noise(300, 5).softmax(0),
    "log_softmax": lambda: noise(5, 300).log_softmax(-1),
    "logsumexp": lambda: noise(5, 300).logsumexp(-1),
    "layer norm": lambda: F.layer_norm(noise(5, 300), [300], noise(300), noise(300)),
    "RMS norm": lambda: F.rms_norm(noise(5, 300), [300], noise(300)),
    "norm": lambda: torch.linalg.vector_norm(noise(5, 300), dim=-1),
    "causal attention": lambda: F.scaled_dot_product_attention(noise(1, 2, 40, 64), noise(1, 2, 40, 64), noise(1, 2, 40, 64), is_causal=True),
    "attention with a mask": lambda: F.scaled_dot_product_attention(
        noise(1, 2, 40, 64), noise(1, 2, 40, 64), noise(1, 2, 40, 64), attn_mask=torch.ones(40, 40, dtype=torch.bool).tril()
    ),
    "attention of one": lambda: F.scaled_dot_product_attention(noise(1, 2, 1, 64), noise(1, 2, 40, 64), noise(1, 2, 40, 64)),
}  # fmt: skip


@pytest.mark.parametrize("name", ROUNDING)
def test_what_is_put_back_in_order_moves_by_rounding_alone(name: str) -> None:
    """A permutation that is not undone would move them by as much as they are."""
    found = ran(ROUNDING[name])
    assert any(op.moved for op in found)
    assert all(op.compared and (op.relative or 0) < 1e-6 for op in found)


def test_divisions_and_roots_are_counted() -> None:
    def run() -> None:
        noise(5, 7).abs().sqrt()
        torch.rsqrt(noise(5, 7).abs())
        F.silu(noise(3, 7))
        noise(5, 7) / 3
        F.layer_norm(noise(5, 7), [7])

    with audited(torch.nn.Identity()) as found:
        run()
    counted = {op.name: (op.divisions, op.roots) for op in found if op.divisions or op.roots}
    assert counted.pop("native_layer_norm", None) or counted.pop("layer_norm")
    assert counted == {"sqrt": (0, 35), "rsqrt": (35, 35), "silu": (21, 0), "div": (35, 0)}


def test_what_cannot_be_turned_round_is_named_not_passed_over() -> None:
    found = ran(lambda: torch.conv1d(noise(1, 3, 20), noise(2, 3, 5)))
    assert [(op.name, op.compared, op.sums > 0) for op in found] == [("convolution", 0, True)]


@pytest.mark.parametrize(
    "call",
    [
        lambda: torch.mv(noise(4, 30), noise(30)),
        lambda: noise(3, 4).index_add_(0, torch.tensor([0, 0]), noise(2, 4)),
        lambda: torch.var_mean(noise(3, 40), dim=-1),
        lambda: noise(3, 4).addmm_(noise(3, 30), noise(30, 4)),
        lambda: F.avg_pool2d(noise(1, 1, 8, 8), 4),
    ],
    ids=["mv", "index_add_", "var_mean", "addmm_", "avg_pool2d"],
)
def test_what_is_in_no_table_may_sum_and_is_never_quiet(call: Callable[[], Any]) -> None:
    found = ran(call)
    assert found and not Pass("prefill", 1, 0.1, tuple(found)).quiet


def test_a_sum_that_overflows_in_one_order_alone_has_moved() -> None:
    terms = torch.tensor([[6e4] * 8 + [-6e4] * 8], dtype=torch.float16)
    (found,) = ran(lambda: terms @ torch.ones(16, 1, dtype=torch.float16))
    assert found.compared == 3, "an infinity is a result, and compared as one"
    over = operations._between(
        found, torch.tensor([1.0, torch.inf, torch.nan]), torch.tensor([torch.inf] * 2 + [torch.nan])
    )
    assert (over.compared, over.moved, over.largest) == (3, 1, operations.ELSEWHERE)


@pytest.mark.parametrize("way", ["addmm", "matmul", "linear"])
def test_layercast_s_product_is_seen_however_it_is_asked_for(way: str) -> None:
    weight = wrap(noise(50, 70).bfloat16())
    ways: dict[str, Callable[[], Any]] = {
        "addmm": lambda: torch.addmm(noise(50), noise(5, 70), weight.t()),
        "matmul": lambda: noise(5, 70) @ weight.t(),
        "linear": lambda: F.linear(noise(5, 70), weight),
    }
    (found,) = ran(ways[way])
    assert (found.name, found.length, found.sums, found.compared) == ("linear", 70, 250, 750) and found.moved


def test_a_permutation_lies_in_memory_as_before() -> None:
    wide = noise(6, 40, 64).transpose(0, 1)
    for x in (wide, wide[:, :, 3:50], noise(1, 40, 64).expand(5, 40, 64), noise(40, 64).t()):
        turned = permuted(x, -1, lambda terms: torch.arange(terms).flip(0))
        assert turned.stride() == x.stride() and torch.equal(turned, x.flip(-1))


def test_sums_of_a_mask_and_of_positions_are_none_of_floating_point() -> None:
    assert not ran(lambda: torch.ones(3, 4, dtype=torch.bool).cumsum(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_distance_is_in_steps_of_the_dtype(dtype: torch.dtype) -> None:
    one = torch.ones(1, dtype=dtype)
    above = one + torch.finfo(dtype).eps
    below = one - torch.finfo(dtype).eps / 2
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps * one
    assert distance(one, above).item() == 1 and distance(below, above).item() == 2
    assert distance(-0.0 * one, 0.0 * one).item() == 0 and distance(-least, least).item() == 2


def passes(model: Path, mode: str) -> list[Pass]:
    request = Request("a", np.arange(1, 40, dtype=np.int32), "")
    files = resolve(str(model), model, lambda _: None)
    with opener("transformers")(Spec(numerics.mode(mode), 4, model, files)) as engine:
        return engine.passes(request, lambda label, total: lambda _: None)  # type: ignore[attr-defined,no-any-return]


@pytest.mark.parametrize("mode", ["fp32", "bf16", "layercast"])
def test_a_model_in_floating_point_moves_and_every_product_is_seen(model: Path, mode: str) -> None:
    prefill, decode = passes(model, mode)
    assert (prefill.what, prefill.tokens, decode.what, decode.tokens) == ("prefill", 39, "decode", 1)
    for one in (prefill, decode):
        looked = [op for op in one.operations if op.length and op.module.endswith(("_proj", "lm_head"))]
        products = {op.module: op.length for op in looked}
        layer = "model.layers.*."
        assert products == {
            **{f"{layer}self_attn.{name}_proj": 64 for name in "qkvo"},
            **{f"{layer}mlp.{name}_proj": 64 for name in ("gate", "up")},
            f"{layer}mlp.down_proj": 96,
            "lm_head": 64,
        }
        assert one.source is not None and not one.quiet
        assert all(op.calls == 2 for op in looked if op.module != "lm_head")


def test_exact_compute_does_not_move(model: Path) -> None:
    for one in passes(model, "exact"):
        assert one.quiet and one.source is None
        assert {op.name for op in one.operations if op.length} >= {"mm", "bmm", "sum"}


def test_the_model_computes_as_before(model: Path) -> None:
    files = resolve(str(model), model, lambda _: None)
    with opener("transformers")(Spec(numerics.mode("fp32"), 4, model, files)) as engine:
        ids = torch.arange(1, 40)[None]
        with torch.no_grad():
            plain = engine.model(input_ids=ids).logits  # type: ignore[attr-defined]
            with audited(engine.model):  # type: ignore[attr-defined]
                looked = engine.model(input_ids=ids).logits  # type: ignore[attr-defined]
    assert torch.equal(plain, looked)


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    (tmp_path / "suite.toml").write_text(
        f'[suite]\nname = "tiny"\nmodel = "{model}"\nprompts = "p.jsonl"\n[run]\nnumerics = ["bf16"]\n'
    )
    (tmp_path / "p.jsonl").write_text('{"id": "a", "prompt": "one"}\n{"id": "b", "prompt": "two and three"}\n')
    return tmp_path


def test_the_command_prints_a_table_of_each_pass(folder: Path) -> None:
    done = CliRunner().invoke(app, ["audit", str(folder), "--numerics", "fp32"])
    assert done.exit_code == 0, done.output
    assert "bf16" not in done.output and "fp32 observed" in done.output
    lines = done.stdout.splitlines()
    assert (
        sum("model.layers.*.mlp.down_proj" in line and line.rstrip().endswith(tuple("0123456789")) for line in lines)
        == 2
    )
    assert sum("noise is born most in" in line for line in lines) == 2


def test_the_command_says_that_nothing_moved(folder: Path) -> None:
    done = CliRunner().invoke(app, ["audit", str(folder), "--numerics", "exact"])
    assert done.exit_code == 0, done.output
    assert done.stdout.count("no sum moved: in every order the same bits") == 2


def test_the_suites_mode_and_a_named_prompt(folder: Path) -> None:
    done = CliRunner().invoke(app, ["audit", str(folder), "--prompt", "b", "--as-json"])
    data = json.loads(done.stdout)
    assert (data["numerics"], data["observed"]) == ("bf16", "bf16")
    assert [one["tokens"] for one in data["passes"]] == [len("<|user|>two and three>"), 1]


@pytest.mark.parametrize(
    ("named", "told"),
    [
        (["--prompt", "c"], "no prompt 'c' in tiny"),
        (["--numerics", "fp33"], "unknown numerics mode 'fp33'"),
        (["--engine-option", "devise=cpu"], "unknown key 'devise'"),
    ],
)
def test_a_wrong_option_is_told(folder: Path, named: list[str], told: str) -> None:
    done = CliRunner().invoke(app, ["audit", str(folder), *named])
    assert done.exit_code == 2 and told in done.output and "Traceback" not in done.output


def test_a_prompt_that_the_model_cannot_take_is_told(folder: Path) -> None:
    (folder / "p.jsonl").write_text(json.dumps({"id": "a", "prompt": "x" * 600}) + "\n")
    done = CliRunner().invoke(app, ["audit", str(folder)])
    assert done.exit_code == 2 and "prompt a has 609 tokens" in done.output and "512" in done.output


def test_an_engine_that_nobody_looks_into_is_told(folder: Path) -> None:
    (folder / "answers.jsonl").write_text('{"id": "a", "text": "x"}\n')
    done = CliRunner().invoke(
        app, ["audit", str(folder), "--engine", "scripted", "--engine-option", "script=answers.jsonl"]
    )
    assert done.exit_code == 2 and "nobody looks into the engine scripted" in done.output
