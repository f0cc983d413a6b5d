"""A run that claims FP32 and does not compute in it fails, whatever its outputs: through the whole gate."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pytest_repro import asking, gate, recording, store, suite
from pytest_repro.engines.base import Engine, Spec, opener
from pytest_repro.result import SuiteResult

from .tiny import build

TOML = """
[suite]
name = "tiny"
model = "{model}"
prompts = "prompts.jsonl"
[generation]
max_new_tokens = 12
batch_size = 2
"""


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> suite.Suite:
    """A suite on the tiny model with a reviewed fp32 golden."""
    folder = tmp_path_factory.mktemp("golden") / "tiny"
    folder.mkdir()
    model = build(tmp_path_factory.mktemp("tiny"))
    (folder / "suite.toml").write_text(TOML.format(model=model))
    (folder / "prompts.jsonl").write_text("".join(f'{{"id": "{n}", "prompt": "Count to {n}"}}\n' for n in "123"))
    loaded = suite.load(folder)
    recording.record(loaded, "fp32", asking.Options())
    store.accept(store.Place(folder, "fp32", store.PENDING), store.Reviewer("Ada", "a test's own"))
    return loaded


def run(checked: suite.Suite, mode: str, tamper: Callable[[Any], Any] | None = None) -> SuiteResult:
    """A check whose model is tampered with once it is loaded; `tamper` may return a context to stay in."""

    @contextmanager
    def tampered(spec: Spec) -> Iterator[Engine]:
        from pytest_repro.models import resolve

        whole = replace(spec, model=resolve(checked.model, checked.folder))
        with opener("transformers")(whole) as engine:
            context = tamper(engine.model) if tamper else None  # type: ignore[attr-defined]
            if context is None:
                yield engine
            else:
                with context:
                    yield engine

    return gate.check(checked, mode, asking.Options(opener=tampered))


def compute(result: SuiteResult) -> tuple[str, str]:
    return next((c.status, c.message) for c in result.checks if c.name == "compute")


@pytest.mark.parametrize("mode", ["fp32", "layercast"])
def test_untouched_it_passes_and_says_what_the_waiver_did(checked: suite.Suite, mode: str) -> None:
    result = run(checked, mode)
    assert result.passed, compute(result)
    assert compute(result)[1].endswith("fp32_waiver = explained: 0 waived")


def rounding(bits: int, layer: str) -> Callable[[Any], None]:
    """A linear layer that rounds its inputs to so many mantissa bits, and answers in float32."""

    class Rounding(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            lost = 23 - bits
            whole = x.contiguous().view(torch.int32)
            short = ((whole + (1 << (lost - 1))) >> lost) << lost
            return F.linear(short.view(torch.float32), self.weight)

    def tamper(model: Any) -> None:
        model.get_submodule(layer).__class__ = Rounding

    return tamper


@pytest.mark.parametrize("mode", ["fp32", "layercast"])
@pytest.mark.parametrize(("bits", "seen"), [(10, "tf32"), (7, "bf16")])
@pytest.mark.parametrize("layer", ["model.layers.1.mlp.down_proj", "lm_head"])
def test_a_layer_that_rounds_its_inputs_fails_the_claim(
    checked: suite.Suite, mode: str, bits: int, seen: str, layer: str
) -> None:
    result = run(checked, mode, rounding(bits, layer))
    status, message = compute(result)
    assert status == "fail" and not result.passed
    assert f"the probe found {seen}" in message
    assert layer in message


@pytest.mark.parametrize("mode", ["fp32", "layercast"])
def test_autocast_fails_the_claim(checked: suite.Suite, mode: str) -> None:
    """Switched on after the mode, as a wrapper around the model might."""
    result = run(checked, mode, lambda _: torch.autocast("cpu", dtype=torch.bfloat16))
    assert compute(result)[0] == "fail" and not result.passed
    assert "the probe found bf16" in compute(result)[1]


def test_attention_in_16_bits_fails_the_claim(checked: suite.Suite) -> None:
    """No linear layer is touched: only the forward pass that is watched can see it."""
    original = F.scaled_dot_product_attention

    @contextmanager
    def narrow_attention() -> Iterator[None]:
        def short(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
            mask = kwargs.pop("attn_mask", None)
            mask = mask.bfloat16() if mask is not None and mask.is_floating_point() else mask
            return original(q.bfloat16(), k.bfloat16(), v.bfloat16(), *args, attn_mask=mask, **kwargs).float()

        F.scaled_dot_product_attention = short
        try:
            yield
        finally:
            F.scaled_dot_product_attention = original

    result = run(checked, "fp32", lambda _: narrow_attention())
    status, message = compute(result)
    assert status == "fail" and not result.passed
    assert "model.layers.0.self_attn: bfloat16 answers in bfloat16" in message


def test_a_norm_that_rounds_fails_the_claim(checked: suite.Suite) -> None:
    """No product is touched at all."""

    def tamper(model: Any) -> None:
        model.model.layers[1].input_layernorm.register_forward_hook(lambda module, inputs, out: out.half().float())

    status, message = compute(run(checked, "fp32", tamper))
    assert status == "fail"
    assert "the probe found fp16" in message and "layers.1" in message


@pytest.mark.skipif(not torch.cuda.is_available(), reason="TF32 is a mode of NVIDIA's tensor cores")
def test_tf32_fails_the_claim(checked: suite.Suite) -> None:
    @contextmanager
    def tf32() -> Iterator[None]:
        matmul: Any = torch.backends.cuda.matmul
        matmul.fp32_precision, before = "tf32", matmul.fp32_precision
        try:
            yield
        finally:
            matmul.fp32_precision = before

    result = run(checked, "fp32", lambda _: tf32())
    assert compute(result)[0] == "fail" and not result.passed


def test_a_switch_is_recorded_and_what_it_does_is_observed() -> None:
    """oneDNN may heed ONEDNN_DEFAULT_FPMATH_MODE or not: the observation is what a product shows, the switch is kept."""
    script = """if True:
        import json, torch
        from pytest_repro import precision, probe
        class One(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.lin = torch.nn.Linear(512, 512, bias=False)
        torch.manual_seed(0)
        one = One()
        with torch.inference_mode():
            x = torch.randn(64, 512)
            exact = x.double() @ one.lin.weight.double().T
            error = ((one.lin(x) - exact).abs().max() / exact.abs().max()).item()
            seen = precision._crafted("lin", one.lin)
        print(json.dumps({"error": error, "seen": seen.compute_class, "facts": probe.machine()}))
    """
    environment = {"ONEDNN_DEFAULT_FPMATH_MODE": "BF16", "PATH": "/usr/bin:/bin", "HOME": str(Path.home())}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["facts"]["env.ONEDNN_DEFAULT_FPMATH_MODE"] == "BF16"
    assert found["seen"] == ("fp32" if found["error"] < 1e-5 else "bf16")
