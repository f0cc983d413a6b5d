"""A floating-point format and what is rounded to it, as a mode's name spells them. Imports no torch.

`e4m3` is a format of 4 exponent and 3 mantissa bits. What follows it, in any order and with hyphens between:

* what is rounded: `weights`, `activations`, `kv`; all three if none is named;
* over what a scale is shared: `tensor`, `channel`, `block32` and other sizes, `unscaled`. Without it, `channel`, and
  `unscaled` for 8 exponent bits, which have float32's own range.

`e4m3-weights-block32` is a name; so is `e8m7`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ...errors import ConfigError

MOST_EXPONENT, MOST_MANTISSA = 8, 23
"""Those of float32, which carries the numbers of every format."""
TARGETS = ("weights", "activations", "kv")
"""What can be rounded: W and X of a linear layer's forward product (P2 and P1 of arXiv 2501.02423 §3), and the KV cache."""

_FORMAT = re.compile(r"e(\d{1,2})m(\d{1,2})")
_SCALE = re.compile(r"tensor|channel|unscaled|block[1-9]\d{0,5}")
_KNOWN = {
    (8, 23): "float32",
    (8, 10): "TF32",
    (8, 7): "bfloat16",
    (5, 10): "float16",
    (4, 3): "FP8 E4M3",
    (5, 2): "FP8 E5M2",
    (3, 2): "FP6 E3M2",
    (2, 3): "FP6 E2M3",
    (2, 1): "FP4 E2M1",
}


@dataclass(frozen=True, order=True)
class Format:
    """Sign, `exponent` and `mantissa` bits, as IEEE 754 lays them out, subnormals included, but without infinities and NaN.

    The codes that IEEE 754 keeps for those are numbers here (arXiv 2501.02423 §3.1). The paper states no exponent bias; it
    is IEEE 754's, 2^(E-1) - 1. With 8 exponent bits the top binade would be float32's infinities, and is left out.
    """

    exponent: int
    mantissa: int

    @property
    def name(self) -> str:
        """`e4m3`."""
        return f"e{self.exponent}m{self.mantissa}"

    @property
    def known_as(self) -> str:
        """What the layout is called elsewhere; empty for one without a name."""
        return _KNOWN.get((self.exponent, self.mantissa), "")

    @property
    def bits(self) -> int:
        """Bits of a number, the sign included."""
        return 1 + self.exponent + self.mantissa

    @property
    def bias(self) -> int:
        """2^(E-1) - 1."""
        return (1 << (self.exponent - 1)) - 1

    @property
    def lowest(self) -> int:
        """Exponent of the smallest normal number, and of every subnormal."""
        return 1 - self.bias

    @property
    def highest(self) -> int:
        """Exponent of the largest number."""
        return min((1 << self.exponent) - 1 - self.bias, 127)

    @property
    def largest(self) -> float:
        """FP_max, the largest number; exact."""
        return 2.0**self.highest * (2.0 - 2.0**-self.mantissa)

    @property
    def is_float32(self) -> bool:
        """Whether rounding to it changes nothing."""
        return (self.exponent, self.mantissa) == (MOST_EXPONENT, MOST_MANTISSA)


@dataclass(frozen=True)
class Emulation:
    """A format, what is rounded to it, and what shares a scale."""

    format: Format
    targets: tuple[str, ...] = TARGETS
    """Some of `TARGETS`, in its order."""
    scale: str = "channel"
    """`tensor`, `channel`, `unscaled` or `blockN`."""

    @property
    def name(self) -> str:
        """The mode's name, each thing said once and in one order; also its compute class."""
        targets = () if self.targets == TARGETS else self.targets
        scale = () if self.scale == usual_scale(self.format) else (self.scale,)
        return "-".join([self.format.name, *targets, *scale])

    @property
    def block(self) -> int:
        """Numbers of a block; 0 where no blocks are formed."""
        return int(self.scale.removeprefix("block")) if self.scale.startswith("block") else 0

    def rounds(self, target: str) -> bool:
        """Whether one of `TARGETS` is rounded."""
        return target in self.targets


def usual_scale(format: Format) -> str:
    """The scale of a name that says none."""
    return "unscaled" if format.exponent == MOST_EXPONENT else "channel"


def looks_like_one(name: str) -> bool:
    """Whether a mode's name begins with a format."""
    return _FORMAT.fullmatch(name.partition("-")[0]) is not None


def parse_format(text: str, where: str = "numerics") -> Format:
    """`e4m3`.

    Raises:
        ConfigError: not of that form, or bits that float32 cannot carry.
    """
    found = _FORMAT.fullmatch(text)
    if found is None:
        raise ConfigError(f"{text!r} is not the name of a format", where=where, fix="e.g. e4m3, e5m10, e8m7")
    exponent, mantissa = int(found[1]), int(found[2])
    if not (1 <= exponent <= MOST_EXPONENT and 1 <= mantissa <= MOST_MANTISSA):
        what = (
            f"{text}: float32 carries formats of 1 to {MOST_EXPONENT} exponent and 1 to {MOST_MANTISSA} mantissa bits"
        )
        raise ConfigError(what, where=where, fix="e.g. e4m3, e5m10, e8m7")
    return Format(exponent, mantissa)


def parse(name: str, where: str = "numerics") -> Emulation:
    """`e4m3`, `e4m3-weights`, `e2m1-activations-kv-block32`.

    Raises:
        ConfigError: a word that says nothing here, one said twice, or two scales.
    """
    first, *words = name.split("-")
    format = parse_format(first, where)
    targets = tuple(t for t in TARGETS if t in words)
    scales = [w for w in words if _SCALE.fullmatch(w)]
    strange = [w for w in words if w not in targets and w not in scales]
    if strange or len(words) != len(set(words)) or len(scales) > 1:
        why = f"{strange[0]!r} says nothing of a format" if strange else "it says one thing twice"
        raise ConfigError(
            f"unknown numerics mode {name!r}: {why}",
            where=where,
            fix=f"{first}[-weights][-activations][-kv][-tensor|-channel|-blockN|-unscaled]",
        )
    return Emulation(format, targets or TARGETS, scales[0] if scales else usual_scale(format))
