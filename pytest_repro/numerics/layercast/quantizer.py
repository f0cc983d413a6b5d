"""LayerCast as transformers' users expect a storage format: `from_pretrained(..., quantization_config=LayerCastConfig())`.

Importing this module registers both classes with transformers under the name `layercast`.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from ...errors import ConfigError
from . import product
from .model import cast_all, narrowed, refusal, settle_experts

log = logging.getLogger("pytest_repro.layercast")


@register_quantization_config("layercast")
class LayerCastConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """16-bit storage, FP32 compute (arXiv 2506.09501 §4).

    Args:
        modules_to_not_convert: names of modules (as in other configs of transformers) whose matrices stay in FP32.
        round_weights: `bfloat16` or `float16`: round matrices that are not 16-bit numbers. None refuses such a model.

    Raises:
        ConfigError: no such dtype.
    """

    def __init__(
        self,
        modules_to_not_convert: list[str] | None = None,
        round_weights: str | None = None,
        quant_method: str = "layercast",
    ) -> None:
        if round_weights not in (None, "bfloat16", "float16"):
            raise ConfigError(f"round_weights is bfloat16 or float16, not {round_weights!r}")
        self.quant_method = quant_method
        self.modules_to_not_convert = modules_to_not_convert
        self.round_weights = round_weights


@register_quantizer("layercast")
class LayerCastQuantizer(HfQuantizer):  # type: ignore[misc]
    """Loads every tensor in FP32, one at a time, and keeps the matrices whose numbers are 16-bit numbers in 16 bits."""

    requires_calibration = False
    quantization_config: LayerCastConfig

    def __init__(self, quantization_config: LayerCastConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.pre_quantized = False
        self.refused: list[str] = []

    @property
    def rounding(self) -> torch.dtype | None:
        """The dtype that weights may be rounded to."""
        name = self.quantization_config.round_weights
        return None if name is None else getattr(torch, name)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Everything that is not a matrix is FP32, whatever was asked for."""
        return torch.float32

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        """Every matrix, unless its module is kept."""
        module, name = get_module_from_name(model, param_name)
        matrix = name in module._parameters and module._parameters[name].dim() >= 2
        return matrix and not self.kept(param_name)

    def kept(self, param_name: str) -> bool:
        """Whether a parameter belongs to a module that is to stay in FP32."""
        names = self.quantization_config.modules_to_not_convert
        return names is not None and not should_convert_module(param_name.rpartition(".")[0], names)

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
        """Bytes an element, for transformers' memory planning."""
        return 2 if self.param_needs_quantization(model, param_name) else 4

    def get_quantize_ops(self) -> ConversionOps:
        """What transformers calls with each matrix as it is read."""
        return _Narrow(self)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        """Everything is loaded: refuse what could not be cast, and set what FP32 compute needs.

        Raises:
            EngineError: with the names.
        """
        self._check_names(model)
        if self.refused:
            why = f"beyond the range of {self.rounding}" if self.rounding else "and would be rounded"
            error = refusal(sorted(self.refused), f"these weights were never 16-bit numbers, {why}")
            error.fix = 'round_weights="bfloat16" rounds them, modules_to_not_convert=[...] keeps them in FP32'
            raise error
        cast_all(model, _for_good, self.kept)
        settle_experts(model, _for_good)
        model.requires_grad_(False)
        for device in {p.device for p in model.parameters()}:
            product.prepare(device, log.warning)
        return model

    def _check_names(self, model: Any) -> None:
        names = self.quantization_config.modules_to_not_convert or []
        modules = [name for name, module in model.named_modules() if module._parameters]
        for name in names:
            if all(should_convert_module(module, [name]) for module in modules):
                raise ConfigError(f"modules_to_not_convert: the model has no module {name!r} with parameters")

    def is_serializable(self) -> bool:
        """The checkpoint it came from is what to keep: saving would write the same numbers again."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Inference only."""
        return False


def _for_good(*_: Any) -> None:
    """Nothing that a load does to a model is taken back."""


class _Narrow(ConversionOps):  # type: ignore[misc]
    def __init__(self, quantizer: LayerCastQuantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], full_layer_name: str = "", model: Any = None, **_: Any) -> Any:
        out = {}
        for name, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            short = narrowed(tensor, self.quantizer.rounding)
            if short is None:
                self.quantizer.refused.append(full_layer_name or name)
            out[name] = tensor if short is None else short
        return out
