"""Tiny random checkpoints of many architectures, and what a model looks like before something touches it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pytest_repro.numerics.layercast import LayerCastConfig

VOCABULARY = 96
_ENDLESS: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None}
_BASE: dict[str, Any] = _ENDLESS | {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
_GROUPED = _BASE | {"num_key_value_heads": 2, "head_dim": 16}
_WINDOW = {"sliding_window": 4}
_GPT = _ENDLESS | {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 2,
    "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
_LINEAR_ATTENTION = {
    "shared_expert_intermediate_size": 32, "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _GROUPED | {"tie_word_embeddings": False},
    "llama tied": _GROUPED | {"tie_word_embeddings": True},
    "llama biased": _GROUPED | {"attention_bias": True, "mlp_bias": True},
    "qwen2": _BASE | {"num_key_value_heads": 2},
    "qwen3": _GROUPED,
    "gemma": _GROUPED,
    "gemma2": _GROUPED | _WINDOW,
    "gemma3_text": _GROUPED | _WINDOW,
    "mistral": _GROUPED | _WINDOW,
    "phi": _BASE,
    "phi3": _BASE | {"num_key_value_heads": 2},
    "gpt2": _GPT,
    "gpt2 untied": _GPT | {"tie_word_embeddings": False},
    "gpt_neox": _BASE,
    "opt": {k: v for k, v in _BASE.items() if k != "intermediate_size"} | {"ffn_dim": 96, "word_embed_proj_dim": 48},
    "bloom": _ENDLESS | {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "falcon": _ENDLESS | {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "bias": True},
    "gptj": _GPT | {"rotary_dim": 8},
    "gpt_bigcode": _GPT,
    "mpt": {"vocab_size": VOCABULARY, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "olmo2": _GROUPED,
    "cohere2": _GROUPED | _WINDOW,
    "stablelm": _BASE | {"num_key_value_heads": 2, "qk_layernorm": True, "use_qkv_bias": True},
    "starcoder2": _GROUPED,
    "granite": _GROUPED,
    "glm4": _GROUPED,
    "mamba": _ENDLESS | {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 4, "pad_token_id": 0},
    "mixtral": _GROUPED | {"num_local_experts": 4},
    "phimoe": _GROUPED | {"num_local_experts": 4},
    "qwen2_moe": _GROUPED | _EXPERTS | {"shared_expert_intermediate_size": 32},
    "qwen3_moe": _GROUPED | _EXPERTS,
    "qwen3_next": _GROUPED | _EXPERTS | _LINEAR_ATTENTION,
    "gpt_oss": _GROUPED | _WINDOW | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": _BASE | _LATENT,
    "llama4_text": _GROUPED | {"num_local_experts": 4, "intermediate_size_mlp": 96, "moe_layers": [1]},
}
"""Model type, with a remark after a space -> settings of its configuration."""


def create(name: str, **settings: Any) -> Any:
    """A model of that family in float32; every parameter is random: fresh norms and biases would hide what they do."""
    torch.manual_seed(0)
    kind = name.partition(" ")[0]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **FAMILIES[name] | settings), dtype="float32")
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.dim() < 2:
                tensor += 0.2 * torch.randn_like(tensor)
            else:
                tensor.copy_(1.5 * tensor.shape[-1] ** -0.5 * torch.randn_like(tensor))
    return model.eval()


def checkpoint(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16, **settings: Any) -> Path:
    """The same as a folder that `from_pretrained` reads."""
    create(name, **settings).to(dtype).save_pretrained(folder)
    return folder


def loaded(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def layercast(folder: Path, **options: Any) -> Any:
    """The folder's model, its matrices stored in 16 bits; options are those of `LayerCastConfig`."""
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=LayerCastConfig(**options)).eval()


def ids() -> torch.Tensor:
    """A batch of random tokens, longer than the sliding windows; none is a pad token."""
    return torch.randint(1, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(1))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids()).logits
    return found


def greedy(model: Any, **options: Any) -> list[list[int]]:
    """Eight tokens of each row, decoded with a cache."""
    found = model.generate(
        ids(), attention_mask=torch.ones_like(ids()), max_new_tokens=8, do_sample=False, pad_token_id=0, **options
    )
    tokens: list[list[int]] = found[:, ids().shape[1] :].tolist()
    return tokens


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def switches() -> list[Any]:
    """torch's global settings that decide how float32 is computed."""
    b: Any = torch.backends
    owners = [b.cuda.matmul, b.mkldnn.matmul, b.cudnn.conv, b.cudnn.rnn]
    return [
        *(owner.fp32_precision for owner in owners),
        torch.get_float32_matmul_precision(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
    ]


def owned(model: Any) -> dict[str, torch.Tensor]:
    """Parameters and buffers, tied ones under each of their names."""
    both = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    return dict(itertools.chain(*both))


class Snapshot:
    """A model as it is now: the very tensors that it holds, their bits, its modules with their hooks, all settings."""

    def __init__(self, model: Any) -> None:
        self.tensors = owned(model)
        self.bits = {name: bits(tensor) for name, tensor in self.tensors.items()}
        self.settings = self._settings(model)

    def check(self, model: Any) -> None:
        """Fail where the model is not as it was."""
        now = owned(model)
        assert list(now) == list(self.tensors)
        assert [name for name in now if now[name] is not self.tensors[name]] == []
        assert [name for name in now if bits(now[name]) != self.bits[name]] == []
        assert self._settings(model) == self.settings

    @staticmethod
    def _settings(model: Any) -> list[Any]:
        config = model.config
        modules = [
            (name, type(m), m.training, list(m._forward_hooks.items()), list(m._parameters), list(m._buffers))
            for name, m in model.named_modules()
        ]
        grads = [(p.requires_grad, p.grad) for p in model.parameters()]
        kinds = [config.dtype, config._experts_implementation, config._attn_implementation, model.dtype]
        return [modules, grads, kinds, switches()]


@contextmanager
def onednn(precision: str) -> Iterator[None]:
    backends: Any = torch.backends
    before = backends.mkldnn.matmul.fp32_precision
    backends.mkldnn.matmul.fp32_precision = precision
    try:
        yield
    finally:
        backends.mkldnn.matmul.fp32_precision = before
