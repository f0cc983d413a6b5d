"""Rotary position embeddings whose tables no maths library had a part in.

transformers computes the frequencies with torch's pow and the tables with its cosine and sine, which may differ in the
last bit between instruction sets. Here a frequency comes from `decimal`, which rounds powers correctly at any precision,
and the tables from `elementary`.
"""

from __future__ import annotations

import decimal
import math
from typing import Any

import torch

from ...errors import EngineError
from . import elementary

DIGITS = 50


def frequencies(base: float, width: int) -> torch.Tensor:
    """1 / base^(2i / width), each step rounded correctly to float32 as transformers writes it; shape (width / 2,).

    Args:
        base: theta (Su et al., arXiv 2104.09864 §3.2.2).
        width: numbers that are rotated, twice as many as frequencies.
    """
    share = torch.arange(0, width, 2, dtype=torch.float32) / width
    with decimal.localcontext(prec=DIGITS):
        powers = [float(decimal.Decimal(base) ** decimal.Decimal(e)) for e in share.tolist()]
    return 1.0 / torch.tensor(powers, dtype=torch.float64).float()


def of(module: Any, name: str) -> torch.Tensor:
    """The frequencies of a rotary module of transformers.

    Args:
        module: with `config.rope_parameters` and `inv_freq`.
        name: for the error.

    Raises:
        EngineError: its kind of scaling is not known here.
    """
    parameters = dict(getattr(module.config, "rope_parameters", None) or {})
    kind, base = parameters.get("rope_type", "default"), parameters.get("rope_theta")
    if kind not in _SCALED or base is None:
        raise EngineError(
            f"exact compute does not know {name} ({type(module).__name__}): its rope_type is {kind!r}; "
            f"known: {', '.join(_SCALED)}"
        )
    return _SCALED[kind](frequencies(float(base), 2 * len(module.inv_freq)), parameters)


def tables(frequency: torch.Tensor, positions: torch.Tensor, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of position times frequency, float32.

    Args:
        frequency: float32, shape (D / 2,).
        positions: integers, shape (..., S).
        scaling: both are multiplied by it.

    Returns:
        Two of shape (..., S, D): the frequencies twice, as transformers lays them out.
    """
    angles = positions[..., None].float() * frequency.to(positions.device)
    cosine, sine = elementary.cos_and_sin(torch.cat((angles, angles), -1).double())
    return cosine.float() * scaling, sine.float() * scaling


def _plain(found: torch.Tensor, parameters: dict[str, Any]) -> torch.Tensor:
    return found


def _linear(found: torch.Tensor, parameters: dict[str, Any]) -> torch.Tensor:
    return found / float(parameters["factor"])


def _llama3(found: torch.Tensor, parameters: dict[str, Any]) -> torch.Tensor:
    """Long wavelengths are stretched, short ones kept, those between blended (Llama 3's, in transformers' order)."""
    factor, low, high = (parameters[key] for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original = parameters["original_max_position_embeddings"]
    wavelength = 2 * math.pi / found
    stretched = torch.where(wavelength > original / low, found / factor, found)
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * stretched / factor + smooth * stretched
    between = ~(wavelength < original / high) & ~(wavelength > original / low)
    return torch.where(between, blended, stretched)


_SCALED = {"default": _plain, "linear": _linear, "llama3": _llama3}
