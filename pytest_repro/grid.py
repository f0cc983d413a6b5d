"""What a study varies: axes, the cells of their grid, what each setting asks of a process, and whether it took.

`AXES` is the table; one more thing to vary is one more row of it. Pure: `campaign` starts the processes, and what a cell's
own fingerprint says decides whether its settings were in force.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from . import knobs
from .errors import ConfigError
from .fingerprint import Fingerprint, Value

Setting = Mapping[str, str]
"""Axis -> value: one cell of a grid."""

ENGINES = ("transformers", "vllm", "scripted")
"""Engines that run the model in a process of the study's own: a server's environment is not the study's to set."""
_COUNT = re.compile(r"[1-9][0-9]{0,6}")
_WORD = re.compile(r"[A-Za-z0-9_]{1,64}")
_MODE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")
_ISA = {"default": "DEFAULT", "avx2": "AVX2", "avx512": "AVX512"}


@dataclass(frozen=True)
class Axis:
    """One thing that a study can vary."""

    name: str
    values: re.Pattern[str]
    """What a value must look like."""
    wanted: str
    """The values, for a person."""
    fact: str
    """The fingerprint's field that must show the value."""
    shown: Callable[[str], Value] = str
    """A value as the fingerprint spells it."""
    variables: Callable[[str], Mapping[str, str]] = lambda _: {}
    """Environment variables that bring it about."""
    engine_options: Mapping[str, str] = field(default_factory=dict)
    """Engine -> its option that takes the value; empty if no option does."""
    moves: tuple[str, ...] = ()
    """Other fields of the fingerprint that move with it."""


def _threads(value: str) -> Mapping[str, str]:
    return {"OMP_NUM_THREADS": value, "MKL_NUM_THREADS": value}


def _instructions(value: str) -> Mapping[str, str]:
    return knobs.instructions(_ISA[value])


AXES: dict[str, Axis] = {
    axis.name: axis
    for axis in (
        Axis("numerics", _MODE, "a numerics mode: bf16, fp32, layercast …", "numerics",
             moves=("compute_class", "dtype", "quantization", "kv_cache_dtype", "engine.product", "engine.round_weights",
                    "fp32_precision.cuda", "fp32_precision.cudnn", "fp32_precision.mkldnn", "autocast",
                    "reduced_precision.bf16", "reduced_precision.fp16")),
        Axis("engine", re.compile("|".join(ENGINES)), f"one of {', '.join(ENGINES)}", "engine"),
        Axis("batch_size", _COUNT, "a whole number above 0", "batch_size", shown=int),
        Axis("threads", _COUNT, "a whole number above 0", "threads", shown=int, variables=_threads,
             moves=("env.OMP_NUM_THREADS", "env.MKL_NUM_THREADS", "interop_threads")),
        Axis("isa", re.compile("|".join(_ISA)), f"one of {', '.join(_ISA)}", "cpu_capability", shown=_ISA.__getitem__,
             variables=_instructions, moves=tuple(f"env.{name}" for name in knobs.INSTRUCTIONS)),
        Axis("attention", _WORD, "an attention implementation: sdpa, eager …", "attention",
             engine_options={"transformers": "attention", "vllm": "attention_backend"}),
        Axis("tensor_parallel", _COUNT, "a whole number above 0", "tensor_parallel_size", shown=int,
             engine_options={"vllm": "tensor_parallel_size"}, moves=("engine.executor",)),
    )
}  # fmt: skip
"""In the order in which a cell names its values."""

MACHINE = "machine"
"""The axis of merged studies: which machine a cell ran on. No option sets it."""
ORDER = (*AXES, MACHINE)


def parse_axis(text: str) -> tuple[str, tuple[str, ...]]:
    """`NAME=VALUE,VALUE,…` of `--axis`.

    Raises:
        ConfigError: not of that form, no such axis, a value that it cannot have, or one twice.
    """
    name, equals, listed = text.partition("=")
    if not equals or not listed:
        raise ConfigError(f"{text!r} is not NAME=VALUE,VALUE", where="--axis", fix="e.g. --axis batch_size=1,4,16")
    if name not in AXES:
        raise ConfigError(
            f"unknown axis {name!r}; known: {', '.join(AXES)}", where="--axis", fix="pytest-repro study --help"
        )
    values = tuple(value.strip() for value in listed.split(","))
    for value in values:
        if not AXES[name].values.fullmatch(value):
            raise ConfigError(
                f"{value!r} is no value of the axis {name}", where=f"--axis {name}", fix=f"give {AXES[name].wanted}"
            )
    if twice := sorted({value for value in values if values.count(value) > 1}):
        raise ConfigError(f"{', '.join(twice)} stands twice", where=f"--axis {name}", fix="name each value once")
    return name, values


def parse_axes(texts: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """All `--axis` options together, in the table's order.

    Raises:
        ConfigError: as `parse_axis`, or an axis named twice.
    """
    found: dict[str, tuple[str, ...]] = {}
    for text in texts:
        name, values = parse_axis(text)
        if name in found:
            raise ConfigError("this axis is named twice", where=f"--axis {name}", fix=f"--axis {name}=VALUE,VALUE")
        found[name] = values
    return {name: found[name] for name in AXES if name in found}


def settings(axes: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    """Every cell of the grid, the last axis varying fastest."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def axes_of(found: Iterable[Setting]) -> dict[str, tuple[str, ...]]:
    """The axes that these cells span, counts in rising order, other values as they come."""
    values: dict[str, list[str]] = {name: [] for name in ORDER}
    for setting in found:
        for name, value in setting.items():
            if value not in values[name]:
                values[name].append(value)
    return {
        name: tuple(sorted(some, key=int) if all(map(str.isdecimal, some)) else some)
        for name, some in values.items()
        if some
    }


def name_of(setting: Setting) -> str:
    """`numerics=bf16,batch_size=4,threads=1`: a file's name, since no value holds anything but letters, digits, `_` and `-`."""
    return ",".join(f"{name}={setting[name]}" for name in ORDER if name in setting)


def spoken(setting: Setting) -> str:
    """`bf16 · batch_size 4 · threads 1`."""
    return " · ".join(v if k in ("numerics", "engine", "isa", MACHINE) else f"{k} {v}" for k, v in setting.items())


def environment(setting: Setting, around: Mapping[str, str]) -> dict[str, str]:
    """Environment of the process that runs a cell."""
    asked = {k: v for name, value in setting.items() for k, v in AXES[name].variables(value).items()}
    return {**around, **asked}


def engine_options(setting: Setting, engine: str) -> dict[str, str | int]:
    """Options of the engine that bring a cell's setting about.

    Raises:
        ConfigError: the engine has no such option.
    """
    found: dict[str, str | int] = {}
    for name, value in setting.items():
        options = AXES[name].engine_options
        if engine in options:
            found[options[engine]] = int(value) if AXES[name].values is _COUNT else value
        elif options and not (name == "tensor_parallel" and value == "1"):
            raise ConfigError(
                f"the engine {engine} has no {name}", where=f"--axis {name}", fix=f"--axis engine={','.join(options)}"
            )
    return found


def contradictions(setting: Setting, observed: Fingerprint, compute_class: str, claimed: str | None) -> list[str]:
    """What of a cell's setting was not in force in the process that ran it, one clause each.

    Args:
        setting: what was asked.
        observed: that process's fingerprint.
        compute_class: precision that the probe saw there; `unknown` where it could not look.
        claimed: precision that the numerics mode stands for; None where that depends on the model.
    """
    found = []
    for name, value in setting.items():
        axis = AXES[name]
        seen, wanted = observed.get(axis.fact), axis.shown(value)
        if seen is None and name == "numerics":
            continue  # it is the probe that says
        if seen is None:
            found.append(f"{name} {value} was asked for, and the engine does not show what was in force")
        elif str(seen).lower() != str(wanted).lower():
            found.append(f"{name} {value} was asked for, and {seen} was in force")
    if claimed and compute_class != claimed:
        found.append(f"{claimed} was asked for, and the probe found {compute_class}")
    return found


def seconds_left(
    done: Sequence[tuple[Setting, float]],
    running: Sequence[tuple[Setting, float]],
    waiting: Sequence[Setting],
    jobs: int,
) -> float | None:
    """An estimate: a cell takes as long as the finished cells that share most of its setting did, on average.

    Args:
        done: finished cells and how long each took, seconds.
        running: cells that run, and for how long they have.
        waiting: cells that wait.
        jobs: cells that run at a time.

    Returns:
        Seconds; None while no cell has finished.
    """
    if not done:
        return None

    def expected(setting: Setting) -> float:
        alike = [sum(other.get(k) == v for k, v in setting.items()) for other, _ in done]
        nearest = [seconds for (_, seconds), n in zip(done, alike, strict=True) if n == max(alike)]
        return sum(nearest) / len(nearest)

    left = [max(expected(setting) - so_far, 0.0) for setting, so_far in running]
    return max(sum(left + [expected(setting) for setting in waiting]) / jobs, *left, 0.0)
