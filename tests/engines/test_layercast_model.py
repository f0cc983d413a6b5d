"""Whole models under LayerCast, held against the same checkpoint in FP32: every family, loaded so or put into the mode.

The bound: FP32 rounds each number by at most 2^-24 of its size, and through two layers the two ways of adding up come to
differ by 2^-17 of the largest logit, over all families here; four times that is allowed. bf16 rounds by 2^-9 and misses
the bound by a factor of hundreds, fp16 by tens: that they do is asserted too.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pytest_repro.errors import ConfigError, EngineError
from pytest_repro.numerics.layercast import LayerCastConfig, casting
from pytest_repro.numerics.layercast.model import weight_bytes
from pytest_repro.numerics.layercast.weight import Weight, stored

from . import families
from .families import FAMILIES, Snapshot, checkpoint, greedy, layercast, loaded, logits

ROUNDING = 2.0**-15
TOUCHES = [
    pytest.param(lambda model: model.to("cpu"), id="to cpu"),
    pytest.param(lambda model: model.to(torch.float32), id="to float32"),
    pytest.param(lambda model: model.eval(), id="eval"),
    pytest.param(lambda model: model.requires_grad_(False), id="requires no gradient"),
    pytest.param(lambda model: model.tie_weights(), id="tie weights"),
    pytest.param(lambda model: model.zero_grad(), id="zero gradients"),
    pytest.param(copy.deepcopy, id="deepcopy"),
    pytest.param(copy.copy, id="copy"),
    pytest.param(lambda model: repr(model) and None, id="repr"),
    pytest.param(lambda model: model.state_dict() and None, id="state_dict"),
    pytest.param(lambda model: model.share_memory(), id="share memory"),
    pytest.param(lambda model: pickle.loads(pickle.dumps(model)), id="pickle"),
]


@dataclass(frozen=True)
class Family:
    """A checkpoint, and what FP32 makes of it."""

    folder: Path
    dtype: torch.dtype
    model: Any
    logits: torch.Tensor
    tokens: list[list[int]]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


def cached(model: Any) -> set[torch.dtype]:
    """Dtypes of the numbers that one forward pass leaves in the cache, recurrent states included."""
    with torch.no_grad():
        out = model(families.ids(), use_cache=True)
    cache = out.get("past_key_values", out.get("cache_params"))
    tensors: list[torch.Tensor] = []
    for layer in cache.layers:
        for value in vars(layer).values():
            tensors += value.values() if isinstance(value, dict) else [value]
    return {t.dtype for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point()}


@pytest.fixture(scope="module", params=[*FAMILIES, "llama in float16"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    name, _, dtype = request.param.partition(" in ")
    folder = checkpoint(name, tmp_path_factory.mktemp("model"), getattr(torch, dtype or "bfloat16"))
    model = loaded(folder, torch.float32)
    return Family(folder, getattr(torch, dtype or "bfloat16"), model, logits(model), greedy(model))


def test_a_model_loaded_with_layercast_answers_as_in_fp32_from_half_the_memory(family: Family) -> None:
    model = layercast(family.folder)
    answer = logits(model)
    assert answer.dtype == torch.float32
    assert distance(answer, family.logits) < ROUNDING
    assert greedy(model) == family.tokens
    assert cached(model) == {torch.float32}
    saved = 0
    matrices: set[int] = set()  # what is tied counts once
    for name, tensor in model.named_parameters():
        assert tensor.dtype == torch.float32, name
        assert isinstance(tensor, Weight) == (tensor.dim() >= 2), name
        assert torch.equal(tensor, family.model.get_parameter(name)), name
        if tensor.dim() >= 2:
            assert stored(tensor).dtype == family.dtype, name
            assert id(tensor) not in matrices
            matrices.add(id(tensor))
            saved += 2 * tensor.numel()
    assert weight_bytes(family.model) - weight_bytes(model) == saved
    assert saved > 0.4 * weight_bytes(family.model)


def test_casting_a_16_bit_model_gives_the_bits_of_loading_it_so_and_restores_it(family: Family) -> None:
    model = loaded(family.folder, family.dtype)
    answered: list[torch.dtype] = []
    model.get_output_embeddings().register_forward_hook(lambda _, __, out: answered.append(out.dtype))
    before = Snapshot(model)
    at_first = logits(model)
    assert distance(at_first, family.logits) > 10 * ROUNDING
    with casting(model):
        inside = logits(model)
        assert greedy(model) == family.tokens
        assert cached(model) == {torch.float32}
    before.check(model)
    assert torch.equal(inside, logits(layercast(family.folder)))
    assert torch.equal(logits(model), at_first)
    assert [answered[0], answered[1], answered[-1]] == [family.dtype, torch.float32, family.dtype]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint("llama biased", tmp_path_factory.mktemp("llama"))


def changed(folder: Path, target: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
    """The checkpoint in `target` with other tensors, as they are written; returns them."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    tensors = {name: change(name, t).contiguous() for name, t in load_file(folder / "model.safetensors").items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return tensors


def disturbed(_: str, tensor: torch.Tensor) -> torch.Tensor:
    """Numbers that no 16-bit dtype holds."""
    return tensor.float() + 1e-5 * torch.rand(tensor.shape, generator=torch.Generator().manual_seed(2))


def test_an_fp32_checkpoint_that_never_was_16_bit_is_refused_by_name(llama: Path, tmp_path: Path) -> None:
    changed(llama, tmp_path, lambda name, t: disturbed(name, t) if "mlp.up_proj" in name else t.float())
    with pytest.raises(EngineError) as caught:
        layercast(tmp_path)
    assert type(caught.value) is EngineError
    assert "model.layers.0.mlp.up_proj.weight, model.layers.1.mlp.up_proj.weight" in str(caught.value)
    assert "down_proj" not in str(caught.value)
    assert "round_weights" in caught.value.fix
    assert "modules_to_not_convert" in caught.value.fix


def kept(model: Any) -> set[str]:
    """Matrices that are held in FP32."""
    return {name for name, p in model.named_parameters() if p.dim() == 2 and stored(p).dtype == torch.float32}


def test_a_module_is_kept_in_fp32_by_the_end_of_its_name_as_in_other_configs(llama: Path) -> None:
    model = layercast(llama, modules_to_not_convert=["down_proj"])
    assert kept(model) == {f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)}
    assert torch.equal(
        logits(model),
        logits(layercast(llama, modules_to_not_convert=["layers.0.mlp.down_proj", "layers.1.mlp.down_proj"])),
    )


def test_what_is_tied_is_kept_together(tmp_path: Path) -> None:
    model = layercast(checkpoint("llama tied", tmp_path), modules_to_not_convert=["lm_head"])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert kept(model) == {"model.embed_tokens.weight"}
    assert logits(model).dtype == torch.float32


def test_a_name_that_keeps_nothing_is_a_mistake(llama: Path) -> None:
    with pytest.raises(ConfigError, match="no module 'lm_haed'"):
        layercast(llama, modules_to_not_convert=["lm_haed"])


def test_a_number_beyond_float16_is_not_rounded_to_infinity(llama: Path, tmp_path: Path) -> None:
    changed(llama, tmp_path, lambda name, t: disturbed(name, t) + (7e4 if "up_proj" in name else 0.0))
    with pytest.raises(EngineError, match="up_proj"):
        layercast(tmp_path, round_weights="float16")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_round_weights_rounds_the_matrices_and_leaves_the_vectors(llama: Path, tmp_path: Path, dtype: str) -> None:
    tensors = changed(llama, tmp_path, disturbed)
    model = layercast(tmp_path, round_weights=dtype)
    for name, tensor in model.named_parameters():
        given = tensors[name]
        assert torch.equal(stored(tensor), given.to(getattr(torch, dtype)) if given.dim() == 2 else given), name
    assert logits(model).dtype == torch.float32


def test_an_fp32_checkpoint_whose_numbers_are_all_16_bit_numbers_is_stored_in_16_bits(
    llama: Path, tmp_path: Path
) -> None:
    changed(llama, tmp_path, lambda _, t: t.float())
    model = layercast(tmp_path)
    assert {stored(p).dtype for p in model.parameters() if p.dim() == 2} == {torch.bfloat16}
    assert torch.equal(logits(model), logits(layercast(llama)))


def test_a_mixed_checkpoint_keeps_the_exact_fp32_values_of_its_vectors(llama: Path, tmp_path: Path) -> None:
    tensors = changed(llama, tmp_path, lambda name, t: disturbed(name, t) if t.dim() == 1 else t)
    model = layercast(tmp_path)
    for name, tensor in model.named_parameters():
        assert torch.equal(stored(tensor), tensors[name]), name
        assert stored(tensor).dtype == tensors[name].dtype, name
    assert distance(logits(model), logits(loaded(tmp_path, torch.float32))) < ROUNDING


def test_matrices_of_different_16_bit_dtypes_each_keep_their_own(llama: Path, tmp_path: Path) -> None:
    def halved(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return disturbed(name, tensor).half() if "mlp" in name else tensor

    tensors = changed(llama, tmp_path, halved)
    model = layercast(tmp_path)
    assert {n: stored(p).dtype for n, p in model.named_parameters() if p.dim() == 2} == {
        n: t.dtype for n, t in tensors.items() if t.dim() == 2
    }
    assert distance(logits(model), logits(loaded(tmp_path, torch.float32))) < ROUNDING


def test_a_module_that_is_not_to_be_converted_stays_fp32_and_may_hold_any_number(llama: Path, tmp_path: Path) -> None:
    tensors = changed(llama, tmp_path, lambda name, t: disturbed(name, t) if name == "lm_head.weight" else t)
    model = layercast(tmp_path, modules_to_not_convert=["lm_head"])
    assert type(model.lm_head.weight) is torch.nn.Parameter
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])
    assert isinstance(model.model.embed_tokens.weight, Weight)
    assert distance(logits(model), logits(loaded(tmp_path, torch.float32))) < ROUNDING


def test_weights_that_the_checkpoint_lacks_are_refused_rather_than_made_up(llama: Path, tmp_path: Path) -> None:
    changed(llama, tmp_path, lambda _, t: t)
    tensors = load_file(llama / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EngineError, match=r"cannot cast lm_head\.weight"):
        layercast(tmp_path)


def test_another_storage_format_is_not_layercasts_to_load(llama: Path, tmp_path: Path) -> None:
    changed(llama, tmp_path, lambda _, t: t)
    config = json.loads((llama / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="LayerCastConfig"):
        layercast(tmp_path)


@pytest.mark.parametrize("dtype", ["int8", "float32", "bf16", ""])
def test_rounding_to_anything_else_is_a_mistake_in_the_config(dtype: str) -> None:
    with pytest.raises(ConfigError, match="bfloat16 or float16"):
        LayerCastConfig(round_weights=dtype)


def test_the_config_survives_its_own_dictionary() -> None:
    config = LayerCastConfig(modules_to_not_convert=["lm_head"], round_weights="float16")
    assert LayerCastConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert config.to_dict()["quant_method"] == "layercast"
    assert "layercast" in repr(config)


@pytest.mark.parametrize(
    "options",
    [{"dtype": torch.bfloat16}, {"dtype": "auto"}, {"device_map": "cpu"}, {"attn_implementation": "eager"}],
    ids=str,
)
def test_options_of_loading_change_nothing_beyond_rounding(llama: Path, options: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, quantization_config=LayerCastConfig(), **options).eval()
    assert model.dtype == model.config.dtype == torch.float32
    assert logits(model).dtype == torch.float32
    assert distance(logits(model), logits(loaded(llama, torch.float32))) < ROUNDING


def test_a_checkpoint_in_many_files_is_the_same_model(llama: Path, tmp_path: Path) -> None:
    loaded(llama).save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(logits(layercast(tmp_path)), logits(layercast(llama)))


def test_saving_is_refused_by_name_and_writes_nothing(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="layercast"):
        layercast(llama).save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("touch", TOUCHES)
def test_what_one_does_to_a_model_changes_no_bit_of_its_answer(llama: Path, touch: Callable[[Any], Any]) -> None:
    model = layercast(llama)
    wanted = logits(model)
    assert torch.equal(logits(touch(model) or model), wanted)
    assert {stored(p).dtype for p in model.parameters() if p.dim() == 2} == {torch.bfloat16}


def test_gradients_being_on_changes_no_bit_and_nothing_asks_for_any(llama: Path) -> None:
    model = layercast(llama)
    wanted = logits(model)
    with torch.enable_grad():
        answer = model(families.ids()).logits
    assert torch.equal(answer, wanted)
    assert not answer.requires_grad


def test_training_is_refused(llama: Path) -> None:
    with pytest.raises(TypeError, match="cannot be trained"):
        layercast(llama).requires_grad_(True)


def test_the_state_of_a_model_is_saved_in_the_checkpoints_own_bits(llama: Path) -> None:
    file = io.BytesIO()
    torch.save(layercast(llama).state_dict(), file)
    file.seek(0)
    kept = torch.load(file, weights_only=True)
    for name, tensor in load_file(llama / "model.safetensors").items():
        assert type(kept[name]) is torch.Tensor
        assert kept[name].dtype == (torch.bfloat16 if tensor.dim() == 2 else torch.float32), name
        assert torch.equal(kept[name].to(tensor.dtype), tensor), name


def test_the_16_bit_tensors_go_through_safetensors_unchanged(llama: Path, tmp_path: Path) -> None:
    save_file({n: stored(t) for n, t in layercast(llama).state_dict().items()}, tmp_path / "kept.safetensors")
    kept = load_file(tmp_path / "kept.safetensors")
    for name, tensor in load_file(llama / "model.safetensors").items():
        assert torch.equal(kept[name].to(tensor.dtype), tensor), name


def test_a_plain_model_takes_the_state_of_a_layercast_one(llama: Path) -> None:
    plain = loaded(llama, torch.float32)
    wanted = logits(plain)
    for p in plain.parameters():
        p.data.zero_()
    plain.load_state_dict(layercast(llama).state_dict())
    assert torch.equal(logits(plain), wanted)


def test_a_state_cannot_be_loaded_over_the_weights(llama: Path) -> None:
    model = layercast(llama)
    wanted = logits(model)
    zeros = {name: torch.zeros(t.shape) for name, t in model.state_dict().items() if t.dim() == 2}
    with pytest.raises(RuntimeError, match="read-only"):
        model.load_state_dict(zeros, strict=False)
    assert torch.equal(logits(model), wanted)


def test_the_model_is_printed_and_its_footprint_counts_16_bits(llama: Path) -> None:
    model = layercast(llama)
    assert "lm_head" in repr(model)
    assert "layercast" in str(model.config)
    assert model.get_memory_footprint() < 0.56 * loaded(llama, torch.float32).get_memory_footprint()
