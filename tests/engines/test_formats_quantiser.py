"""The quantiser: equal to casts that others wrote, and to an oracle in exact fractions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from math import copysign

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_repro.errors import ConfigError
from pytest_repro.numerics.formats import Format, parse
from pytest_repro.numerics.formats.quantiser import on_grid, quantised, rounded, scales

MANY = 10_000_000


@dataclass(frozen=True)
class Cast:
    """To a format of somebody else's, and back."""

    there_and_back: Callable[[torch.Tensor], torch.Tensor]
    largest: float
    """Its largest number: a format with infinities or NaN has fewer numbers than one without."""


def by_torch(dtype: torch.dtype) -> Cast:
    return Cast(lambda x: x.to(dtype).float(), torch.finfo(dtype).max)


def by_ml_dtypes(name: str) -> Cast:
    kind = getattr(ml_dtypes, name)

    def cast(x: torch.Tensor) -> torch.Tensor:
        with np.errstate(all="ignore"):
            return torch.from_numpy(x.numpy().astype(kind).astype(np.float32))

    return Cast(cast, float(ml_dtypes.finfo(kind).max))


CASTS = {
    "torch-bfloat16": (Format(8, 7), by_torch(torch.bfloat16)),
    "torch-float16": (Format(5, 10), by_torch(torch.float16)),
    "torch-float8_e4m3fn": (Format(4, 3), by_torch(torch.float8_e4m3fn)),
    "torch-float8_e5m2": (Format(5, 2), by_torch(torch.float8_e5m2)),
    "ml_dtypes-bfloat16": (Format(8, 7), by_ml_dtypes("bfloat16")),
    "ml_dtypes-float8_e4m3fn": (Format(4, 3), by_ml_dtypes("float8_e4m3fn")),
    "ml_dtypes-float8_e4m3": (Format(4, 3), by_ml_dtypes("float8_e4m3")),
    "ml_dtypes-float8_e5m2": (Format(5, 2), by_ml_dtypes("float8_e5m2")),
    "ml_dtypes-float8_e3m4": (Format(3, 4), by_ml_dtypes("float8_e3m4")),
    "ml_dtypes-float6_e3m2fn": (Format(3, 2), by_ml_dtypes("float6_e3m2fn")),
    "ml_dtypes-float6_e2m3fn": (Format(2, 3), by_ml_dtypes("float6_e2m3fn")),
    "ml_dtypes-float4_e2m1fn": (Format(2, 1), by_ml_dtypes("float4_e2m1fn")),
}


def random_patterns(count: int, seed: int) -> torch.Tensor:
    """Float32 numbers of random bits: every exponent, subnormals, infinities and NaN among them."""
    bits = np.random.default_rng(seed).integers(0, 2**32, count, dtype=np.uint32)
    return torch.from_numpy(bits.view(np.float32))


def every_pattern() -> torch.Tensor:
    """What all 16-bit patterns stand for, as bfloat16 and as float16, and all 8-bit ones, as E4M3 and as E5M2."""
    short = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    byte = torch.arange(2**8, dtype=torch.int32).to(torch.uint8)
    eight = (torch.float8_e4m3fn, torch.float8_e5m2)
    sixteen = [short.view(d).float() for d in (torch.bfloat16, torch.float16)]
    return torch.cat([*sixteen, *(byte.view(d).float() for d in eight)])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.view(torch.int32) == b.view(torch.int32)


@pytest.mark.parametrize("name", CASTS)
@pytest.mark.parametrize("what", ["patterns", "random", "normal"])
def test_it_is_the_cast_up_to_the_casts_own_largest_number(name: str, what: str) -> None:
    """Bit for bit, signs of zero included. Beyond: the documented difference.

    Where the cast answers infinity, NaN or (saturating) its largest number, the format has numbers of its own, up to FP_max.
    """
    format, cast = CASTS[name]
    x = {
        "patterns": every_pattern,
        "random": lambda: random_patterns(MANY, 1),
        "normal": lambda: torch.randn(MANY // 10, generator=torch.Generator().manual_seed(2)) * format.largest / 4,
    }[what]()
    x = x[~x.isnan()]
    wanted, found = cast.there_and_back(x), rounded(x, format)
    inside = wanted.isfinite() & (found.abs() <= cast.largest)
    assert inside.sum() > len(x) / 1000
    assert int((~same_bits(wanted, found))[inside].sum()) == 0
    beyond = wanted[~inside].abs()
    assert (beyond.isnan() | beyond.isinf() | (beyond == cast.largest)).all()
    assert (x[~inside].abs() > cast.largest).all() and (found[~inside].abs() >= cast.largest).all()
    assert found.isfinite().all() and (found[x.abs() > format.largest].abs() == format.largest).all()
    assert torch.equal(found.signbit(), x.signbit())


def test_nan_stays_nan_and_infinity_becomes_the_largest() -> None:
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    patterns = torch.tensor([0x7F800001, 0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    for format in (Format(4, 3), Format(8, 7), Format(1, 1), Format(8, 23)):
        found = rounded(x, format)
        assert found[0].isnan() and found[1:3].tolist() == [format.largest, -format.largest]
        assert copysign(1, found[3].item()) == -1
        assert rounded(patterns, format).isnan().all()


# --- an oracle in exact fractions -----------------------------------------------------------------------------------


def oracle(value: float, format: Format) -> float:
    """The nearest number of the format, found without floating point."""
    exact, size = Fraction(value), abs(Fraction(value))
    exponent = format.lowest
    while size >= Fraction(2) ** (exponent + 1):
        exponent += 1
    step = Fraction(2) ** (exponent - format.mantissa)
    largest = Fraction(2) ** format.highest * (2 - Fraction(1, 2**format.mantissa))
    nearest = min(round(size / step) * step, largest)  # Python rounds fractions half to even
    return copysign(float(nearest), -1 if exact < 0 or copysign(1, value) < 0 else 1)


FORMATS = [Format(e, m) for e, m in product(range(2, 9), range(1, 11))]
floats32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(deadline=None, max_examples=1000)
@given(format=st.sampled_from(FORMATS), values=st.lists(floats32, min_size=1, max_size=20))
def test_any_float32_becomes_its_nearest_number(format: Format, values: list[float]) -> None:
    found = rounded(torch.tensor(values), format)
    assert same_bits(found, torch.tensor([oracle(v, format) for v in values])).all()


def numbers(format: Format) -> np.ndarray:
    """Every number of a format from zero up, by its code."""
    codes = np.arange(2 ** (format.exponent + format.mantissa))
    exponent, mantissa = codes >> format.mantissa, codes & (2**format.mantissa - 1)
    whole = np.where(exponent > 0, 2**format.mantissa + mantissa, mantissa).astype(np.float64)
    found = np.ldexp(whole, np.maximum(exponent, 1) - format.bias - format.mantissa)
    return found[found <= format.largest]


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_every_number_stays_and_every_tie_goes_to_the_even_one(format: Format) -> None:
    all_of_them = numbers(format)
    assert len(all_of_them) == 2 ** (format.exponent + format.mantissa) - (
        2**format.mantissa if format.exponent == 8 else 0
    )
    assert all_of_them[-1] == format.largest
    own = torch.from_numpy(all_of_them.astype(np.float32))
    assert same_bits(rounded(own, format), own).all() and same_bits(rounded(-own, format), -own).all()
    ties = ((all_of_them[1:] + all_of_them[:-1]) / 2).astype(np.float32)
    even = np.where(np.arange(len(ties)) % 2 == 0, all_of_them[:-1], all_of_them[1:]).astype(np.float32)
    for value, wanted in (
        (ties, even),
        (np.nextafter(ties, np.float32(0)), all_of_them[:-1].astype(np.float32)),
        (np.nextafter(ties, np.float32(np.inf)), all_of_them[1:].astype(np.float32)),
    ):
        assert same_bits(rounded(torch.from_numpy(value), format), torch.from_numpy(wanted)).all()


def test_float32_itself_is_left_alone() -> None:
    x = random_patterns(100_000, 4)
    assert quantised(x, parse("e8m23")) is x
    kept = x.isfinite()
    assert same_bits(rounded(x, Format(8, 23)), x)[kept].all()


# --- scales ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["tensor", "channel", "block8", "block5"])
def test_what_shares_a_scale_has_its_largest_number_at_the_formats_largest(scale: str) -> None:
    x = torch.randn(3, 4, 24, generator=torch.Generator().manual_seed(5)) * torch.logspace(-3, 3, 4)[:, None]
    emulation = parse(f"e4m3-{scale}")
    found = quantised(x, emulation)
    groups = {
        "tensor": lambda t: [t],
        "channel": lambda t: list(t.reshape(-1, 24)),
        "block8": lambda t: [b for row in t.reshape(-1, 24) for b in row.split(8)],
        "block5": lambda t: [b for row in t.reshape(-1, 24) for b in row.split(5)],
    }[scale]
    assert found.shape == x.shape
    for before, after in zip(groups(x), groups(found), strict=True):
        most = before.abs().max().reshape(1)  # torch divides by a tensor without dimensions as by a reciprocal
        factor = torch.tensor(emulation.format.largest) / most
        wanted = [oracle(v, emulation.format) for v in (before * factor).flatten().tolist()]
        assert same_bits(after.flatten(), torch.tensor(wanted) / factor).all()
        torch.testing.assert_close(after.abs().max().reshape(1), most, rtol=2e-7, atol=0)


def test_nothing_but_zeros_and_tiny_numbers_have_a_scale() -> None:
    x = torch.zeros(3, 4)
    x[1], x[2] = 1e-40, 1e38
    for name in ("e4m3", "e7m2", "e4m3-tensor"):
        found = quantised(x, parse(name))
        assert found.isfinite().all() and (found[0] == 0).all()
        torch.testing.assert_close(found[2], x[2], rtol=2e-7, atol=0)
    assert (scales(x, parse("e4m3"))[0] == 1).all()


def test_nan_is_not_hidden_by_a_scale() -> None:
    x = torch.ones(2, 4)
    x[0, 1] = float("nan")
    found = quantised(x, parse("e4m3"))
    assert found[0].isnan().any() and torch.equal(found[1], x[1])


@pytest.mark.parametrize("name", ["e4m3", "e5m2-tensor", "e2m1-block16", "e8m7", "e5m10", "e3m2-unscaled"])
def test_what_was_rounded_is_seen_to_be_on_the_grid_and_nothing_else_is(name: str) -> None:
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(6))
    found = quantised(x, parse(name))
    assert on_grid(found, parse(name)) and not on_grid(x, parse(name))
    one_off = found.clone()
    row, column = divmod(int(found.abs().flatten().argsort()[400]), 64)
    one_off[row, column] *= 1.01
    assert not on_grid(one_off, parse(name))


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "canonical", "targets", "scale"),
    [
        ("e4m3", "e4m3", ("weights", "activations", "kv"), "channel"),
        ("e8m7", "e8m7", ("weights", "activations", "kv"), "unscaled"),
        ("e4m3-channel", "e4m3", ("weights", "activations", "kv"), "channel"),
        ("e4m3-kv-weights", "e4m3-weights-kv", ("weights", "kv"), "channel"),
        ("e2m1-block32-activations", "e2m1-activations-block32", ("activations",), "block32"),
        ("e8m3-tensor-weights", "e8m3-weights-tensor", ("weights",), "tensor"),
    ],
)
def test_a_name_says_what_is_rounded_and_over_what(
    name: str, canonical: str, targets: tuple[str, ...], scale: str
) -> None:
    found = parse(name)
    assert (found.name, found.targets, found.scale) == (canonical, targets, scale)
    assert parse(found.name) == found


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("e4m3-weight", "'weight' says nothing of a format"),
        ("e4m3-weights-weights", "it says one thing twice"),
        ("e4m3-tensor-channel", "it says one thing twice"),
        ("e4m3-", "'' says nothing of a format"),
        ("e4m3-block0", "'block0' says nothing of a format"),
        ("e9m2", "1 to 8 exponent and 1 to 23 mantissa bits"),
        ("e4m0", "1 to 8 exponent and 1 to 23 mantissa bits"),
        ("e4m24", "1 to 8 exponent and 1 to 23 mantissa bits"),
    ],
)
def test_a_name_that_says_nothing_is_refused_with_the_reason(name: str, why: str) -> None:
    with pytest.raises(ConfigError, match=r"mode|format") as refused:
        parse(name)
    assert why in refused.value.what and refused.value.fix
