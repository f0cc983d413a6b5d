"""Where in a model a difference begins: what its modules put out, when the golden was recorded and now. Pure.

Under the golden's own tokens every module of an unchanged model puts out what it did, up to rounding; a changed one, and
whatever comes after it, does not. Kept of each output is a projection of a few rows onto a few random signs, which
preserves distances up to a factor near one (Johnson and Lindenstrauss 1984; Achlioptas 2003 for signs).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .comparison import finite
from .noise import EXACT, bulk_ratio, kind

PROJECTIONS = 4
"""Numbers that are kept of a row, however wide."""
MOST_PROMPTS = 4
"""Prompts that are looked at; of a small suite an eighth."""
ANSWER = 32
"""Tokens of an answer that are run through the model, at most."""

ROUNDING_UNIT = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}
"""Largest relative error of rounding once, by compute class."""
UNITS = {"fp32": 4.0}
"""Rounding units that any output may be off by, even where the recording saw it exact: other kernels sum in another
order, which shows in 32 bits and is lost in 16. docs/decisions/0009-localisation.md."""
JUMP = 2.5
"""Times farther out than the places before it that a module must be, each in units of what rounding explains there."""
LOOKED_BACK = 32
"""Places before it that are asked."""
_INPUT = ":input"


def given(module: str) -> str:
    """Name of what a module is given, where no module put it out."""
    return module + _INPUT


def signs(size: int, count: int) -> NDArray[np.float64]:
    """Random signs, shape (size, count): the same on every machine, and for every Python and numpy."""
    bits = Random(size).getrandbits(size * count).to_bytes(-(-size * count // 8), "little")
    ones = np.unpackbits(np.frombuffer(bits, np.uint8), count=size * count)
    return np.where(ones.reshape(size, count) == 1, -1.0, 1.0)


def positions(prompt: int, answer: int) -> list[int]:
    """Rows that are looked at: where the first token of the answer is chosen, and the last one that is run.

    Args:
        prompt: tokens of the prompt.
        answer: tokens of the golden's answer.
    """
    return sorted({prompt - 1, prompt - 1 + min(answer, ANSWER)})


def chosen(prompts: Sequence[str]) -> tuple[str, ...]:
    """Prompts that are looked at: the first of the suite, which stay the same when others are added."""
    return tuple(prompts[: min(MOST_PROMPTS, -(-len(prompts) // 8))])


@dataclass(frozen=True)
class Sketch:
    """Outputs of M places in a model at R rows, in the order in which they came into being."""

    points: tuple[str, ...]
    """A module's name, or `given` of it; length M."""
    values: NDArray[np.float32]
    """Shape (M, R, PROJECTIONS)."""


@dataclass(frozen=True)
class Recorded:
    """What a golden keeps."""

    prompts: tuple[str, ...]
    """Ids of the prompts that were looked at."""
    sketch: Sketch
    level: NDArray[np.float32]
    """Largest relative distance that a benign change made at each place, shape (M,)."""
    repeatable: bool
    """Whether a second run gave the same bits."""

    def to_json(self) -> dict[str, Any]:
        """The part that stands in a golden's header."""
        return {"prompts": list(self.prompts), "repeatable": self.repeatable}

    def tensors(self) -> dict[str, NDArray[Any]]:
        """The binary part. Names are in it as well: hundreds of them would bury the header."""
        names = np.frombuffer("\n".join(self.sketch.points).encode(), np.uint8)
        return {"sketch.points": names, "sketch.values": self.sketch.values, "sketch.level": self.level}

    @classmethod
    def of(cls, header: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> Recorded:
        """Inverse of `to_json` and `tensors`, of a header that satisfies the schema.

        Raises:
            ValueError: nobody can have recorded these.
        """
        try:
            names, values, level = (tensors[f"sketch.{part}"] for part in ("points", "values", "level"))
        except KeyError as exc:
            raise ValueError(f"{exc.args[0]} is missing") from None
        points = tuple(names.tobytes().decode().split("\n")) if names.dtype == np.uint8 else ()
        if not points or not all(points) or len(set(points)) < len(points):
            raise ValueError("sketch.points are not names")
        rows = values.shape[1] if values.ndim == 3 else 0
        if not 0 < rows <= 2 * len(header["prompts"]) or values.shape != (len(points), rows, PROJECTIONS):
            raise ValueError(f"sketch.values has the shape {list(values.shape)}")
        if level.shape != (len(points),):
            raise ValueError(f"sketch.level has the shape {list(level.shape)}")
        values, level = values.astype(np.float32), level.astype(np.float32)
        if not (np.isfinite(values).all() and np.isfinite(level).all() and (level >= 0).all()):
            raise ValueError("a number is negative or none")
        return cls(tuple(header["prompts"]), Sketch(points, values), level, header["repeatable"])


@dataclass(frozen=True)
class Location:
    """Where the difference begins, or why that cannot be said."""

    module: str
    """The module; empty where no single one can be named."""
    finding: str
    """In one sentence."""
    distance: float | None = None
    """Relative distance of its output from the golden's."""
    allowed: float | None = None
    """What rounding explains there."""
    compared: int = 0
    """Places that were compared."""


def recorded(prompts: Sequence[str], plain: Sketch, again: Sketch, benign: Sequence[Sketch]) -> Recorded:
    """What to keep of a recording: the sketch itself, and how far benign changes moved it."""
    moved = [distances(plain, other) for other in (again, *benign)]
    level = np.max(moved, axis=0).astype(np.float32)
    told = np.flatnonzero(np.isfinite(level) & np.isfinite(plain.values).all(axis=(1, 2)))  # a mask is infinite
    repeatable = bool(np.array_equal(plain.values[told], again.values[told]))
    return Recorded(tuple(prompts), _picked(plain, told.tolist()), level[told], repeatable)


def distances(then: Sketch, now: Sketch) -> NDArray[np.float64]:
    """Relative distance at each place of two sketches of the same places, shape (M,): the median over the rows.

    NaN where one holds a NaN: a median would otherwise pass over it.
    """
    a, b = then.values.astype(np.float64), now.values.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        apart = np.linalg.norm(b - a, axis=-1)
        relative = np.where(apart == 0, 0.0, apart / np.linalg.norm(a, axis=-1))
    middle: NDArray[np.float64] = np.median(relative, axis=-1)
    return middle


def locate(then: Recorded, now: Sketch, compute_class: str, same_environment: bool) -> Location:
    """The first place whose output lies farther from the golden's than rounding puts it.

    Args:
        then: of the golden.
        now: of the model that is loaded, at the same prompts.
        compute_class: of the golden.
        same_environment: whether nothing differs that chooses kernels: then any difference counts, as no rounding differs.
    """
    common = _common(then.sketch, now)
    if 2 * len(common) < max(len(then.sketch.points), len(now.points)):
        return Location("", "the model's modules are not the golden's", compared=len(common))
    if now.values.shape[1:] != then.sketch.values.shape[1:]:
        return Location("", "the golden's sketch was taken at other prompts", compared=0)
    at = {name: i for i, name in enumerate(then.sketch.points)}
    old, new = [at[now.points[i]] for i in common], list(common)
    names = [now.points[i] for i in common]
    moved = distances(_picked(then.sketch, old), _picked(now, new))
    exact = (same_environment and then.repeatable) or compute_class == EXACT
    allowed = np.zeros(len(names)) if exact else _allowed(then.level[old], compute_class)
    beyond = ~(moved <= allowed)
    if not beyond.any():
        return Location("", _nowhere(exact, moved), compared=len(names))
    named = beyond if exact else beyond & _stands_out(moved, allowed)
    first = int(np.argmax(named if named.any() else beyond))
    seen = (finite(float(moved[first])), float(allowed[first]), len(names))
    if not named.any():
        what = f"{spoken(names[first])} is the first to leave its envelope, and those before it had nearly left theirs"
        return Location("", what, *seen)
    return Location(module_of(names[first]), _finding(names[first], first, exact), *seen)


def _common(then: Sketch, now: Sketch) -> list[int]:
    """Places in `now` of what both have."""
    there = set(then.points)
    return [i for i, name in enumerate(now.points) if name in there]


def _picked(sketch: Sketch, rows: Sequence[int]) -> Sketch:
    return Sketch(tuple(sketch.points[i] for i in rows), sketch.values[list(rows)])


def _allowed(level: NDArray[np.float32], compute_class: str) -> NDArray[np.float64]:
    unit = ROUNDING_UNIT.get(kind(compute_class), 0.0) * UNITS.get(kind(compute_class), 1.0)
    return bulk_ratio(compute_class) * np.maximum(level.astype(np.float64), unit)


def _stands_out(moved: NDArray[np.float64], allowed: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which places are much farther out than those before them: a defect jumps, and noise that adds up creeps."""
    with np.errstate(divide="ignore", invalid="ignore"):
        excess = np.where(moved == 0, 0.0, moved / allowed)
    before = [excess[max(0, i - LOOKED_BACK) : i].max(initial=0.0) for i in range(len(excess))]
    return ~(excess < JUMP * np.array(before))


def _nowhere(exact: bool, moved: NDArray[np.float64]) -> str:
    if exact or not moved.any():
        return "every module put out the very bits of the recording: what differs lies after the model (sampling, stop rules) or in how prompts are batched and cached"
    return "no module's output left its envelope under the golden's own tokens"


def module_of(point: str) -> str:
    """The module that computed what is seen at a place: of what a module is given, the one around it."""
    return point.removesuffix(_INPUT).rpartition(".")[0] if point.endswith(_INPUT) else point


def spoken(point: str) -> str:
    """A place, for people."""
    if not point.endswith(_INPUT):
        return point
    parent, _, name = point.removesuffix(_INPUT).rpartition(".")
    return f"{parent}, before its {name},"


def _finding(point: str, before: int, exact: bool) -> str:
    how = "differs from the recording's" if exact else "jumped out of its envelope"
    what = (
        f"what it computes before its {point.removesuffix(_INPUT).rpartition('.')[2]}"
        if point.endswith(_INPUT)
        else "its output"
    )
    return f"{what} is the first that {how}; {before} before it did not"
