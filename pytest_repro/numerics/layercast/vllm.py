"""LayerCast as vLLM's users expect a quantisation: `vllm serve MODEL --quantization layercast --dtype float32`.

vLLM finds `register` through its entry point group `vllm.general_plugins`, in every process of its own; nothing of vLLM is
patched. Matrices of linear layers, embeddings and output heads are kept in 16 bits; everything else (norms, rotary
embedding, attention, KV cache, activations) is float32 because the model's dtype is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding

from ...errors import ConfigError, EngineError
from . import product

PASSED_OVER = ("Attention", "MLAAttention", "CrossAttention", "EncoderOnlyAttention")
"""Layers that ask for a method of quantisation, and hold no matrix: with none their cache has the model's own dtype."""


def register() -> None:
    """Entry point of vLLM's plugins: make the method known under the name `layercast`."""
    register_quantization_config("layercast")(VllmLayerCastConfig)


class VllmLayerCastConfig(QuantizationConfig):  # type: ignore[misc]
    """16-bit storage, FP32 compute (arXiv 2506.09501 §4).

    Args:
        round_weights: `bfloat16` or `float16`: round matrices that are not 16-bit numbers. None refuses such a model.

    Raises:
        ConfigError: no such dtype.
    """

    def __init__(self, round_weights: str | None = None) -> None:
        super().__init__()
        if round_weights not in (None, "bfloat16", "float16"):
            raise ConfigError(f"round_weights is bfloat16 or float16, not {round_weights!r}")
        self.round_weights = round_weights

    def get_name(self) -> str:
        """As in `--quantization`."""
        return "layercast"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Everything but the stored matrices is float32: vLLM refuses another `--dtype`."""
        return [torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Triton's own least compute capability."""
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: the method needs no file in the model's folder."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> VllmLayerCastConfig:
        """From a checkpoint's own `quantization_config`."""
        return cls(config.get("round_weights"))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How a layer stores its matrix and multiplies by it.

        Raises:
            EngineError: a layer that multiplies by matrices in kernels of its own, named.
        """
        if isinstance(layer, LinearBase):
            return LayerCastLinearMethod(self.storage())
        if isinstance(layer, VocabParallelEmbedding):
            return LayerCastEmbeddingMethod(self.storage())
        if any(kind.__name__ in PASSED_OVER for kind in type(layer).__mro__):
            return None
        raise EngineError(
            f"layercast cannot keep {prefix} ({type(layer).__name__}) in 16 bits: it multiplies in kernels of its own",
            fix="--repro-numerics fp32",
        )

    def storage(self) -> Storage:
        """In which 16 bits this model is kept."""
        if self.round_weights:
            return Storage(getattr(torch, self.round_weights), rounds=True)
        config = get_current_vllm_config().model_config.hf_text_config
        return Storage(torch.float16 if getattr(config, "dtype", None) == torch.float16 else torch.bfloat16)


class Storage:
    """A 16-bit dtype, and whether numbers that it does not have may be rounded to it."""

    def __init__(self, dtype: torch.dtype, *, rounds: bool = False) -> None:
        self.dtype = dtype
        self.rounds = rounds

    def checked(self, name: str, loader: Callable[..., Any]) -> Callable[..., Any]:
        """A weight loader that refuses what would be rounded in silence."""

        def load(parameter: torch.nn.Parameter, loaded: torch.Tensor, *rest: Any, **named: Any) -> Any:
            if loaded.dtype != self.dtype:
                self.refuse(name, loaded)
            return loader(parameter, loaded, *rest, **named)

        return load

    def refuse(self, name: str, loaded: torch.Tensor) -> None:
        """Raise EngineError if storing these numbers would change them more than was allowed."""
        dtypes = [str(dtype).removeprefix("torch.") for dtype in (loaded.dtype, self.dtype)]
        if not self.rounds and not torch.equal(self.kept(loaded), loaded.float()):
            raise EngineError(
                f"layercast would round {name}: its {dtypes[0]} numbers are not {dtypes[1]} numbers",
                fix='--repro-numerics fp32; or allow it: [engine] round_weights = "bfloat16"',
            )
        if loaded.isfinite().all() and not self.kept(loaded).isfinite().all():
            raise EngineError(f"{name} has numbers beyond {dtypes[1]}'s range", fix='round_weights = "bfloat16"')

    def kept(self, loaded: torch.Tensor) -> torch.Tensor:
        """The numbers as they would be stored."""
        return loaded.to(self.dtype).float()


class SixteenBit:
    """A layer's matrix in 16 bits; its product in FP32."""

    like: Any
    """vLLM's own method for a model without quantisation, whose matrix this one's is like but for the dtype."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """As `like` does, in 16 bits."""
        del params_dtype
        name = getattr(layer, "prefix", type(layer).__name__)
        loader = self.storage.checked(name, extra_weight_attrs.pop("weight_loader"))
        self.like.create_weights(
            self,
            layer,
            input_size_per_partition,
            output_partition_sizes,
            input_size,
            output_size,
            self.storage.dtype,
            weight_loader=loader,
            **extra_weight_attrs,
        )

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """The LayerCast product."""
        return linear(x, layer.weight, bias)


@register_weight_loader_v2_supported_method
class LayerCastLinearMethod(SixteenBit, LinearMethodBase):  # type: ignore[misc]
    """Of a linear layer."""

    like = UnquantizedLinearMethod


class LayerCastEmbeddingMethod(SixteenBit, QuantizeMethodBase):  # type: ignore[misc]
    """Of an embedding, or an output head."""

    like = UnquantizedEmbeddingMethod

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """Share the embedding's matrix; models that leave the embedding out of quantisation have made it in FP32."""
        if embed_tokens.weight.dtype == torch.float32:
            self.create_weights(
                embed_tokens,
                embed_tokens.input_size_per_partition,
                embed_tokens.output_partition_sizes,
                embed_tokens.input_size,
                embed_tokens.output_size,
                torch.float32,
                weight_loader=embed_tokens.weight_loader,
            )
            embed_tokens.quant_method = self
            embed_tokens.use_fused_embedding = False  # its kernel would answer in 16 bits
        layer.weight = embed_tokens.weight
        return layer

    def embedding(self, layer: Any, input_: torch.Tensor) -> torch.Tensor:
        """Rows of the matrix, upcast after they were taken: exact."""
        return F.embedding(input_, layer.weight).float()


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`product.linear`, as one opaque operation where torch.compile traces it."""
    if torch.compiler.is_compiling():
        found: torch.Tensor = _opaque(x, weight, bias)
        return found
    return product.linear(x, weight, bias)


@torch.library.custom_op("pytest_repro::layercast_linear", mutates_args=())
def _opaque(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return product.linear(x, weight, bias)


@_opaque.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))
