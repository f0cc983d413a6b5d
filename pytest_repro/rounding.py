"""Whether a whole suite moved more than rounding moves it: a paired test over its prompts. Pure.

What is compared is how far the gap between the golden's token and its recorded runner-up moved, since whatever shifts
both tokens alike cancels in it; and each prompt with its own benign level, since prompts differ in how hard rounding
shakes them. A defect too small for any prompt of its own moves all of them a little, and always upwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
from numpy.typing import NDArray

from .fingerprint import Change
from .noise import bulk_ratio, kind

MARGIN = {"fp32": 4.0, "exact": 1.0}
"""Times the benign level that benign changes may reach as a whole, by compute class: docs/decisions/0008-rounding.md."""
MARGIN_16_BIT = 1.1

PRECISION = (
    "compute_class", "numerics", "dtype", "quantization", "kv_cache_dtype", "autocast", "fp32_precision.*", "reduced_precision.*",
    "env.NVIDIA_TF32_OVERRIDE", "env.TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "env.ONEDNN_DEFAULT_FPMATH_MODE", "engine.round_weights",
    "engine.claimed.dtype", "engine.claimed.*quant*", "engine.claimed.kv_cache*",
)  # fmt: skip
"""Fields that get no room when they differ: precision itself is what the test is to see."""
SWITCHES = ("fp32_precision.*", "reduced_precision.*")
"""Those of them that not every device has: where one side lacks one, the observed compute class says what it came to."""
NO_KERNELS = ("env.PYTHONHASHSEED", "env.CUDA_LAUNCH_BLOCKING")
"""Numerics fields that choose no kernel."""
MEASURED = {
    "batch_size": "replay",
    "attention": "attention",
    "threads": "thread",
    "interop_threads": "thread",
    "env.OMP_NUM_THREADS": "thread",
    "env.MKL_NUM_THREADS": "thread",
}
"""Field -> the word in a variant's name that tells that the envelope measured it."""

_FARTHEST = 50.0
"""Largest |log ratio| that is ranked: a benign level of zero makes it infinite."""


@dataclass(frozen=True)
class RoundingTest:
    """The suite's change of the gaps against rounding's."""

    prompts: int
    ratio: float
    """Median over the prompts of mean |Δgap| now, in units of the prompt's benign level."""
    above: int
    """Prompts beyond `margin`."""
    margin: float
    usual: float
    """The margin of an environment that the envelope covers."""
    unmeasured: tuple[str, ...]
    """Fields that differ and that the golden's envelope does not cover: `margin` is the wide one for them."""
    p_value: float
    """Of a median ratio this large or larger if the true one is `margin`; one-sided."""
    ranked: int
    """Prompts not exactly at the margin, which Wilcoxon's test ranks."""

    def fails(self, alpha: float) -> bool:
        """More than rounding: beyond the margin, and not by the luck of the prompts."""
        return self.ratio > self.margin and self.can_fail(alpha) and self.p_value <= alpha

    def can_fail(self, alpha: float) -> bool:
        """Whether so few prompts could fail at all."""
        return 0.5**self.ranked <= alpha


def rounding_test(
    moved: NDArray[np.float64],
    levels: NDArray[np.float64],
    compute_class: str,
    changes: Sequence[Change],
    variants: Sequence[str],
) -> RoundingTest | None:
    """Wilcoxon's signed-rank test of log(moved / level) against log(margin), one-sided (Wilcoxon 1945).

    Args:
        moved: each prompt's mean |Δgap|, nats, shape (P,); NaN where it was not seen.
        levels: each prompt's benign mean |Δgap|, nats, shape (P,); NaN where it is not known.
        compute_class: of the golden.
        changes: how the environments differ.
        variants: names of the benign changes that the golden's envelope was measured from.

    Returns:
        None without a prompt of which both are known.
    """
    seen = ~np.isnan(moved) & np.isfinite(levels)
    if not seen.any():
        return None
    ratios = _ratios(moved[seen], levels[seen])
    beyond = unmeasured(changes, variants)
    usual = MARGIN.get(kind(compute_class), MARGIN_16_BIT)
    margin = bulk_ratio(compute_class) if beyond else usual
    excess = ratios - np.log(margin)
    return RoundingTest(
        prompts=len(ratios),
        ratio=float(np.median(np.where(ratios > -_FARTHEST, np.exp(ratios), 0.0))),
        above=int((excess > 0).sum()),
        margin=margin,
        usual=usual,
        unmeasured=beyond,
        p_value=_p_value(excess[excess != 0]),
        ranked=int((excess != 0).sum()),
    )


def unmeasured(changes: Sequence[Change], variants: Sequence[str]) -> tuple[str, ...]:
    """Numerics fields that differ, and that an envelope measured from these variants does not cover."""
    numerics = dict.fromkeys(c.field for c in changes if c.cls == "numerics")
    return tuple(field for field in numerics if not _needs_no_room(field, variants))


def of_precision(changes: Sequence[Change]) -> list[Change]:
    """Differences of precision itself; a class that cannot be seen, a server's, is what it is claimed to be."""
    named = [c for c in changes if c.cls == "numerics" and _is_one_of(c.field, PRECISION)]
    seen = [c for c in named if (c.field, c.now) != ("compute_class", "unknown")]
    return [c for c in seen if not (_is_one_of(c.field, SWITCHES) and None in (c.golden, c.now))]


def _ratios(now: NDArray[np.float64], level: NDArray[np.float64]) -> NDArray[np.float64]:
    """log(now / level): 0 where both are 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(now == level, 0.0, np.log(now) - np.log(level))
    return np.clip(ratios, -_FARTHEST, _FARTHEST)


def _p_value(excess: NDArray[np.float64]) -> float:
    if not len(excess):
        return 1.0
    from scipy.stats import wilcoxon  # takes a second to import

    return float(wilcoxon(excess, alternative="greater").pvalue)


def _needs_no_room(field: str, variants: Sequence[str]) -> bool:
    if field in MEASURED:
        return any(MEASURED[field] in name for name in variants)
    return _is_one_of(field, (*PRECISION, *NO_KERNELS))


def _is_one_of(field: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(field, pattern) for pattern in patterns)
