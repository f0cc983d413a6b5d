"""The envelope of benign differences: what the same model does to its own golden when nothing but numerics changes.

It is measured when a golden is recorded: the golden's tokens are replayed under other batch sizes, thread counts and
attention kernels, and as prefill instead of decode. What those replays moved is what rounding can move.

It knows a largest change of the gap (the tail), and of each prompt a typical |Δlogp| (the bulk) and a typical change of
the gaps, which `rounding` compares over the whole suite.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .comparison import compare_replay
from .fingerprint import Fingerprint
from .generation import Generation, Scores

EXACT = "exact"
"""The compute class without rounding to explain anything: any bit that differs is drift."""
BULK_RATIO = {"fp32": 10.0, EXACT: 1.0}
"""How many times a prompt's own benign mean |Δlogp| still counts as benign, by compute class; see `bulk_ratio`."""
BULK_RATIO_16_BIT = 2.0


def bulk_ratio(compute_class: str) -> float:
    """How many times its benign level a prompt's mean |Δlogp| may be before rounding no longer explains it.

    FP32 noise is the order of summation, which kernels not yet seen may choose otherwise; 16-bit noise is the rounding of
    stored results, which every kernel does alike. Measured: docs/decisions/0003-envelope.md.
    """
    return BULK_RATIO.get(kind(compute_class), BULK_RATIO_16_BIT)


_AS_FP32 = re.compile(r"e\d+m\d+-weights(-(tensor|channel|unscaled|block\d+))?|e8m23(-.*)?")


def kind(compute_class: str) -> str:
    """The class whose noise a class has: with only its weights rounded, or all of it to float32, a model computes as in FP32."""
    return "fp32" if _AS_FP32.fullmatch(compute_class) else compute_class


@dataclass(frozen=True)
class Variant:
    """One benign change, and what it moved over the whole suite."""

    name: str
    """What was changed, e.g. `replay, batch size 1`."""
    mean_abs_dlogp: float
    max_abs_dlogp: float
    max_abs_dgap: float
    max_deficit: float
    flipped_prompts: int
    """Prompts with at least one token that would be chosen otherwise."""


@dataclass(frozen=True)
class Envelope:
    """What rounding was seen to do to one golden."""

    compute_class: str
    variants: tuple[Variant, ...]
    prompt_level: NDArray[np.float32]
    """Each prompt's own benign mean |Δlogp|, nats: the mean over the variants; shape (P,)."""
    gap_level: NDArray[np.float32]
    """Each prompt's own benign mean change of the gap to the recorded runner-up, nats; NaN where no gap was seen; shape (P,)."""
    prompt_means: NDArray[np.float64] | None = None
    """`prompt_level` of every variant, shape (V, P): what envelopes of parts are merged from. A golden does not keep it."""

    @property
    def max_deficit(self) -> float:
        """The largest deficit that rounding explains, nats: no gap was seen to change by more.

        A token flips when its gap changes by more than the gap was wide, and its deficit is what is left over: hence a
        deficit is bounded by the change of a gap.
        """
        return max((max(v.max_abs_dgap, v.max_deficit) for v in self.variants), default=0.0)

    @property
    def mean_abs_dlogp(self) -> float:
        """Typical benign |Δlogp| of the suite, nats."""
        return float(np.mean([v.mean_abs_dlogp for v in self.variants])) if self.variants else 0.0

    def level(self, row: int) -> float:
        """The benign level a prompt is held against, nats.

        Its own, but never below the suite's: a short answer may have been measured as calm by luck.
        """
        if not self.variants:
            return np.nan  # nothing was measured: nothing can be said
        own = float(self.prompt_level[row]) if row < len(self.prompt_level) else np.nan
        return max(own, self.mean_abs_dlogp) if np.isfinite(own) else self.mean_abs_dlogp

    def to_json(self) -> dict[str, Any]:
        """The part that stands in a golden's header; `prompt_level` and `gap_level` go to the binary part."""
        return {
            "compute_class": self.compute_class,
            "max_deficit": self.max_deficit,
            "mean_abs_dlogp": self.mean_abs_dlogp,
            "variants": [vars(v) for v in self.variants],
        }

    @classmethod
    def from_json(
        cls,
        data: Mapping[str, Any],
        prompt_level: NDArray[np.float32],
        gap_level: NDArray[np.float32],
        prompt_means: NDArray[np.float64] | None = None,
    ) -> Envelope:
        """Inverse of `to_json`."""
        variants = tuple(Variant(**v) for v in data["variants"])
        return cls(data["compute_class"], variants, prompt_level, gap_level, prompt_means)


@dataclass(frozen=True)
class Calibration:
    """The envelope of one golden on another machine than the one it was recorded on."""

    fingerprint: Fingerprint
    """Of that machine: the fields of numerics, and what names it (`calibration.facts`)."""
    envelope: Envelope

    @property
    def when(self) -> str:
        """The day on which it was measured, as it says itself."""
        return str(self.fingerprint.get("time") or "an unknown day")[:10]


def envelope(compute_class: str, golden: Generation, replays: Mapping[str, Sequence[Scores]]) -> Envelope:
    """Sum up the replays of a golden under benign changes.

    Args:
        compute_class: of the golden.
        golden: what was recorded; the replays are compared with it.
        replays: name of the change -> scores of every prompt, in the golden's order.
    """
    variants, levels, gaps = [], [], []
    for name, scores in replays.items():
        seen = compare_replay(golden, scores)
        levels.append(seen.mean_abs_dlogp)
        gaps.append(seen.mean_abs_dgap)
        variants.append(
            Variant(
                name=name,
                mean_abs_dlogp=_safe(np.nanmean, seen.mean_abs_dlogp),
                max_abs_dlogp=_safe(np.nanmax, seen.max_abs_dlogp),
                max_abs_dgap=_safe(np.nanmax, seen.max_abs_dgap),
                max_deficit=_safe(np.nanmax, seen.deficit),
                flipped_prompts=int(seen.differs.sum()),
            )
        )
    shape = (len(variants), len(golden))
    means = np.asarray(levels, np.float64).reshape(shape)
    gap_level = _levels(np.reshape(gaps, shape)) if variants else np.full(len(golden), np.nan, np.float32)
    return Envelope(compute_class, tuple(variants), _levels(means), gap_level, means)


def merged(parts: Sequence[Envelope], order: NDArray[np.int64]) -> Envelope:
    """The envelope of the whole suite from those of its parts: maxima of maxima, and means over all prompts again.

    Args:
        parts: of the same compute class and variants, each with its `prompt_means`.
        order: places, in the parts laid end to end, of the whole suite's prompts.
    """
    means = np.concatenate([part.prompt_means for part in parts if part.prompt_means is not None], axis=1)[:, order]
    variants = tuple(
        Variant(
            name=same[0].name,
            mean_abs_dlogp=_safe(np.nanmean, row),
            max_abs_dlogp=max(v.max_abs_dlogp for v in same),
            max_abs_dgap=max(v.max_abs_dgap for v in same),
            max_deficit=max(v.max_deficit for v in same),
            flipped_prompts=sum(v.flipped_prompts for v in same),
        )
        for row, same in zip(means, zip(*(part.variants for part in parts), strict=True), strict=True)
    )
    gap_level = np.concatenate([part.gap_level for part in parts])[order]
    return Envelope(parts[0].compute_class, variants, _levels(means), gap_level)


def _levels(means: NDArray[np.float64]) -> NDArray[np.float32]:
    """Each prompt's mean over the variants, shape (P,)."""
    return (means.mean(axis=0) if len(means) else np.zeros(means.shape[1])).astype(np.float32)


def _safe(reduce: Any, values: NDArray[np.float64]) -> float:
    finite = values[np.isfinite(values)]
    return float(reduce(finite)) if len(finite) else 0.0
