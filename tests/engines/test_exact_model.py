"""Whole models in exact compute: the same bits however they are asked, and errors no larger than FP32's."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from pytest_repro.errors import EngineError
from pytest_repro.numerics.exact import computing, observe, operations, proof, rotary
from pytest_repro.numerics.exact.proof import same_bits

from .families import switches

FAMILIES = ("Llama", "Qwen2", "Qwen3", "Mistral")


def tiny(family: str, **options: Any) -> Any:
    """A seeded model in bfloat16 whose frequencies are exact compute's: a reference must ask the same question."""
    torch.manual_seed(0)
    sliding = {"sliding_window": 11} if family == "Mistral" else {}
    shape = {
        "vocab_size": 257, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "eos_token_id": 0, "pad_token_id": 0, "bos_token_id": None,
        "tie_word_embeddings": False, "initializer_range": 0.2,
    }  # fmt: skip
    config = getattr(transformers, f"{family}Config")(**shape, **sliding, **options)
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(torch.bfloat16).eval()
    for name, module in model.named_modules():
        if hasattr(module, "inv_freq"):
            module.inv_freq = rotary.of(module, name)
            module.original_inv_freq = module.inv_freq
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny(request.param)


def ids(rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(1, 257, (rows, tokens), generator=torch.Generator().manual_seed(7))


def logits(model: Any, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    with torch.inference_mode():
        out: torch.Tensor = model(input_ids=tokens, **options).logits
    return out


def padded(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    mask = torch.stack([torch.cat([torch.zeros(width - len(r)), torch.ones(len(r))]) for r in rows]).long()
    tokens = torch.stack([torch.nn.functional.pad(r, (width - len(r), 0)) for r in rows])
    return {"tokens": tokens, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def test_the_same_bits_alone_and_in_a_padded_batch_of_any_order(model: Any) -> None:
    rows = [row[:length] for row, length in zip(ids(5, 40), (40, 3, 17, 33, 1), strict=True)]
    with computing(model):
        alone = [logits(model, row[None])[0] for row in rows]
        for order in ((0, 1, 2, 3, 4), (4, 2, 0, 3, 1), (1, 4)):
            together = logits(model, **padded([rows[i] for i in order]))
            for place, i in enumerate(order):
                assert same_bits(together[place, -len(rows[i]) :], alone[i])


def test_the_same_bits_at_once_and_token_by_token(model: Any) -> None:
    tokens = ids(2, 37)
    with computing(model):
        whole, cache, steps = logits(model, tokens), None, []
        for part in tokens.split([20, *[1] * 17], dim=1):
            with torch.inference_mode():
                out = model(input_ids=part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    assert same_bits(whole, torch.cat(steps, 1))
    assert {layer.keys.dtype for layer in cache.layers} == {torch.float32}


def test_the_same_bits_on_one_thread_and_on_two(model: Any) -> None:
    before, seen = torch.get_num_threads(), []
    with computing(model):
        for threads in (1, 2):
            torch.set_num_threads(threads)
            try:
                seen.append(logits(model, ids(3, 40)))
            finally:
                torch.set_num_threads(before)
    assert same_bits(*seen)


def test_errors_against_float64_are_no_larger_than_fp32_s(model: Any) -> None:
    tokens = ids(4, 48)
    with computing(model):
        exact = logits(model, tokens).double()
    frequency = next(m for m in model.modules() if hasattr(m, "inv_freq")).inv_freq.clone()
    runs = []
    for dtype in (torch.float32, torch.float64):
        other = copy.deepcopy(model).to(dtype)
        for module in other.modules():
            if hasattr(module, "inv_freq"):
                module.inv_freq = frequency
        runs.append(logits(other, tokens).double())
    fp32, reference = runs
    ours, theirs = (exact - reference).abs(), (fp32 - reference).abs()
    assert ours.mean() <= theirs.mean()
    assert ours.max() <= theirs.max()


def test_weights_stay_in_sixteen_bits_and_everything_is_given_back(model: Any) -> None:
    before, settings = logits(model, ids(1, 9)), switches()
    forwards = {name for name, module in model.named_modules() if "forward" in module.__dict__}
    attention = model.config._attn_implementation
    with pytest.raises(ZeroDivisionError), computing(model), computing(model):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert logits(model, ids(1, 9)).dtype == torch.float32
        raise ZeroDivisionError
    assert switches() == settings
    assert model.config._attn_implementation == attention
    assert {name for name, module in model.named_modules() if "forward" in module.__dict__} == forwards
    assert torch.equal(logits(model, ids(1, 9)), before)


def test_the_probe_sees_it(model: Any) -> None:
    with computing(model):
        assert observe(model).compute_class == "exact"


def test_one_flipped_bit_of_one_weight_changes_bits() -> None:
    model = tiny("Llama")
    changed = copy.deepcopy(model)
    bits = changed.model.layers[1].mlp.up_proj.weight.data.view(torch.int16)
    bits[5, 9] ^= 1
    with computing(model), computing(changed):
        assert not same_bits(logits(model, ids(1, 20)), logits(changed, ids(1, 20)))


def test_the_probe_notices_a_product_that_rounds_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("Llama")

    def plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return torch.nn.functional.linear(x, weight.float(), bias)

    monkeypatch.setattr(operations, "linear", plain)
    with computing(model):
        seen = observe(model)
    assert seen.compute_class == "fp32"
    assert "order" in seen.detail


def test_the_probe_notices_subnormals_that_are_flushed() -> None:
    model = tiny("Llama")
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        with computing(model):
            seen = observe(model)
    finally:
        torch.set_flush_denormal(False)
    assert seen.compute_class != "exact"
    assert "subnormal" in seen.detail


def test_what_computes_besides_is_named() -> None:
    model = tiny("Llama")
    gate = model.model.layers[1].mlp.act_fn = torch.nn.Softplus()
    with pytest.raises(EngineError, match=r"model\.layers\.1\.mlp\.act_fn \(softplus\)"), computing(model):
        pass
    assert "forward" not in gate.__dict__
    assert proof._depth == 0


def test_an_unknown_module_is_named() -> None:
    model = tiny("Llama")
    model.model.layers[0].self_attn.q_proj = torch.nn.Bilinear(2, 2, 2)
    with pytest.raises(EngineError, match=r"model\.layers\.0\.self_attn\.q_proj \(Bilinear\)"), computing(model):
        pass


def test_a_norm_of_another_formula_is_refused() -> None:
    model = tiny("Llama")

    class OddRMSNorm(type(model.model.norm)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 1.001

    model.model.norm.__class__ = OddRMSNorm
    with pytest.raises(EngineError, match=r"model\.norm \(OddRMSNorm\)"), computing(model):
        pass


def test_a_model_with_other_attention_is_refused() -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50, n_positions=64)
    with pytest.raises(EngineError, match="Conv1D"), computing(transformers.GPT2LMHeadModel(config).bfloat16().eval()):
        pass


def test_weights_that_never_were_sixteen_bit_are_refused_unless_rounded() -> None:
    model = tiny("Llama").float()
    with torch.no_grad():
        model.lm_head.weight += 1e-6
    with pytest.raises(EngineError, match="lm_head") as caught, computing(model):
        pass
    assert "round_weights" in caught.value.fix
    with computing(model, "bfloat16"):
        assert observe(model).compute_class == "exact"


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 64},
    ],
    ids=["linear", "llama3"],
)  # fmt: skip
def test_scaled_frequencies_are_the_model_s_own(scaling: dict[str, Any]) -> None:
    config = transformers.LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        rope_parameters={"rope_theta": 10000.0, **scaling},
        max_position_embeddings=512,
    )
    module = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    torch.testing.assert_close(rotary.of(module, "rotary"), module.inv_freq, rtol=1e-6, atol=0)


def test_an_unknown_scaling_is_named() -> None:
    model = tiny("Llama")
    model.model.rotary_emb.config.rope_parameters = {"rope_theta": 1e4, "rope_type": "yarn"}
    with pytest.raises(EngineError, match="rope_type is 'yarn'"), computing(model):
        pass


def test_a_model_that_lies_elsewhere_is_refused() -> None:
    with pytest.raises(EngineError, match="runs on a CPU") as caught, computing(tiny("Llama").to("meta")):
        pass
    assert "device" in caught.value.fix


HASH = """
import hashlib, sys, torch, transformers
from pytest_repro.numerics.exact import computing, prepare
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").eval()
ids = torch.arange(120).reshape(3, 40) + 5
with torch.inference_mode(), computing(model):
    logits = model(input_ids=ids).logits
print(torch.backends.cpu.get_cpu_capability(), prepare(lambda _: None), hashlib.sha256(logits.numpy().tobytes()).hexdigest())
"""
PLACES = {
    "SSE": {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "as it is, one thread": {"OMP_NUM_THREADS": "1"},
    "torch alone": {"CXX": "no-such-compiler"},
}


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
def test_the_same_bits_with_every_instruction_set_and_in_torch_alone(tmp_path: Path) -> None:
    tiny("Qwen3").save_pretrained(tmp_path)
    told = {}
    for name, variables in PLACES.items():
        command = [sys.executable, "-c", HASH, str(tmp_path)]
        env = {**os.environ, "PYTEST_REPRO_CACHE": str(tmp_path / "cache"), **variables}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=900)
        told[name] = done.stdout.strip()
    hashes = {name: line.rpartition(" ")[2] for name, line in told.items()}
    assert len(set(hashes.values())) == 1, told
    assert told["SSE"].startswith("DEFAULT c++ DEFAULT")
    assert "torch (no C++ compiler)" in told["torch alone"]
