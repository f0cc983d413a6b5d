"""Where a forward pass divides, takes roots and sums, and by how much its sums move when their order changes. Pure.

Rounding noise between machines, batch sizes and kernels is the order of sums: each addition rounds. An operation that is
computed number by number gives the same bits whatever else is computed beside it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from typing import Any

_NUMBERED = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class Operation:
    """One kind of operation in one module, or in the modules that only a layer's number tells apart."""

    module: str
    """As `named_modules` has it, layers' numbers as `*`."""
    name: str
    """torch's name of the operation: `linear`, `mean`, `rsqrt`."""
    calls: int = 1
    seconds: float = 0.0
    divisions: int = 0
    """Numbers that came out of a division."""
    roots: int = 0
    """Numbers that came out of a square root."""
    sums: int = 0
    """Numbers that are a sum of several."""
    length: int = 0
    """How many numbers each of those sums has; 0 without any. 2 where nobody knows."""
    compared: int = 0
    """Sums that were computed again in another order, once for each order; 0 if they could not be."""
    moved: int = 0
    """Those whose bits were others."""
    distances: tuple[int, ...] = ()
    """How many lie how far apart, in ulps of the result's own dtype (steps from one of its numbers to the next): 0, 1, 2, up
    to 4, up to 8 and so on."""
    largest: float = 0.0
    """The largest distance, ulps. Of a sum that almost cancels it is large, whatever the method."""
    shift: float = 0.0
    """Squares of the differences, added up."""
    scale: float = 0.0
    """Squares of the sums, added up."""

    @property
    def moved_percent(self) -> float | None:
        """Sums that moved, per cent; None if none was computed again."""
        return 100 * self.moved / self.compared if self.compared else None

    def ulps(self, share: float) -> int | None:
        """The distance that such a share of the sums does not exceed, rounded up to a power of two or the largest; None without any."""
        reached = 0
        for bin_, count in enumerate(self.distances):
            reached += count
            if reached >= share * self.compared:
                return bin_ and int(min(1 << (bin_ - 1), self.largest))
        return None

    @property
    def relative(self) -> float | None:
        """Root mean square of the differences over that of the sums: comparable between dtypes. None without any."""
        if not self.compared:
            return None
        return math.sqrt(self.shift / self.scale) if self.scale else 0.0

    def plus(self, other: Operation) -> Operation:
        """Both together, under this one's names."""
        return replace(
            self,
            calls=self.calls + other.calls,
            seconds=self.seconds + other.seconds,
            divisions=self.divisions + other.divisions,
            roots=self.roots + other.roots,
            sums=self.sums + other.sums,
            compared=self.compared + other.compared,
            moved=self.moved + other.moved,
            distances=tuple(a + b for a, b in zip_longest(self.distances, other.distances, fillvalue=0)),
            largest=max(self.largest, other.largest),
            shift=self.shift + other.shift,
            scale=self.scale + other.scale,
        )

    @property
    def rounds(self) -> bool:
        """Whether it divides, takes roots or sums: everything else is one IEEE operation a number, or moves numbers."""
        return bool(self.divisions or self.roots or self.sums)

    def to_json(self) -> dict[str, Any]:
        """For scripts."""
        return asdict(self) | {
            "moved_percent": self.moved_percent, "median_ulps": self.ulps(0.5), "p99_ulps": self.ulps(0.99),
            "relative": self.relative,
        }  # fmt: skip


@dataclass(frozen=True)
class Pass:
    """One forward pass."""

    what: str
    """`prefill` or `decode`."""
    tokens: int
    """That went in."""
    seconds: float
    """Of the pass without anybody looking on."""
    operations: tuple[Operation, ...]
    """Rolled up, in the order in which they first ran."""

    @property
    def source(self) -> Operation | None:
        """The operation whose sums move most, relative to their size; None if none moves."""
        moving = [op for op in self.operations if op.relative]
        return max(moving, key=lambda op: op.relative or 0.0, default=None)

    @property
    def quiet(self) -> bool:
        """Whether no sum moved, and every kind that sums was looked at."""
        return all(not op.moved and (op.compared or op.length < 2) for op in self.operations)

    def to_json(self) -> dict[str, Any]:
        """For scripts."""
        return {
            "pass": self.what,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "operations": [op.to_json() for op in self.operations],
        }


def unnumbered(module: str) -> str:
    """A module's name with every layer's number as `*`."""
    return _NUMBERED.sub("*", module)


def rolled_up(operations: Iterable[Operation]) -> tuple[Operation, ...]:
    """Operations of modules that only a layer's number tells apart, as one if their sums are as long; in the order in which they first ran."""
    found: dict[tuple[str, str, int], Operation] = {}
    for operation in operations:
        key = (unnumbered(operation.module), operation.name, operation.length)
        found[key] = found[key].plus(operation) if key in found else replace(operation, module=key[0])
    return tuple(found.values())


def unlooked(passes: Sequence[Pass]) -> list[str]:
    """Operations that sum, and whose order this package does not know how to change."""
    found = {op.name for one in passes for op in one.operations if op.length > 1 and not op.compared}
    return sorted(found)
