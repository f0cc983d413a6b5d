"""Dyadic rationals and elementary functions, held against Python's own integers, fractions and decimals."""

from __future__ import annotations

import decimal
import math
from collections.abc import Callable
from fractions import Fraction
from itertools import chain

import pytest
import torch

from pytest_repro.numerics.exact import elementary, operations, rotary
from pytest_repro.numerics.exact.dyadic import Dyadic, bits_of_sum, exponent, power, round_to
from pytest_repro.numerics.exact.proof import same_bits

TINY, HUGE = 2.0**-149, float(torch.finfo(torch.float32).max)


def numbers(seed: int, *shape: int, spread: int = 40) -> torch.Tensor:
    """Magnitudes over many powers of two, both signs, zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator) * 2.0 ** torch.randint(-spread, spread, shape, generator=generator)
    return x * (torch.rand(*shape, generator=generator) > 0.1)


def nearest(x: float, grid: int) -> Fraction:
    """The multiple of 2^grid next to x, ties to even."""
    step = Fraction(2) ** grid
    return round(Fraction(x) / step) * step


ROWS = {
    "spread": numbers(0, 3, 17),
    "zeros": torch.zeros(2, 5),
    "subnormal": torch.tensor([[TINY, -3 * TINY, 0.0], [2.0**-126, TINY, -TINY]]),
    "huge": torch.tensor([[HUGE, -HUGE, 1.0], [HUGE, TINY, -0.0]]),
    "just below a power": torch.tensor([[1 - 2.0**-24, 2.0**-30, -(1 - 2.0**-24)]]),
    "one": torch.tensor([[-7.25]]),
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("bits", [8, 21, 24, 26])
def test_a_row_is_rounded_once_to_the_grid_of_its_largest(rows: torch.Tensor, bits: int) -> None:
    made = Dyadic.of(rows, bits)
    for row, values, numerators, grid in zip(rows, made.values, made.numerators, made.grid, strict=True):
        g = int(grid)
        assert [Fraction(v) for v in values.tolist()] == [nearest(x, g) for x in row.tolist()]
        assert all(n == int(n) and abs(n) <= 2**bits for n in numerators.tolist())
        if largest := row.abs().max().item():
            assert 2.0 ** (g + bits - 1) <= largest < 2.0 ** (g + bits)  # it has all the bits: no step is wasted


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_has_no_numerator_is_refused(bad: float) -> None:
    with pytest.raises(FloatingPointError, match="no numerator"):
        Dyadic.of(torch.tensor([[1.0, bad]]), 24)
    with pytest.raises(FloatingPointError):
        operations.linear(torch.tensor([[1.0, bad]]), torch.ones(1, 2, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("one", "other"), [("spread", "spread"), ("huge", "huge"), ("subnormal", "huge"), ("zeros", "zeros")]
)
def test_products_and_dot_products_are_those_of_fractions(one: str, other: str) -> None:
    a, b = Dyadic.of(ROWS[one], 24), Dyadic.of(ROWS[other], 24)
    rows, columns = ([[Fraction(v) for v in row] for row in d.values.tolist()] for d in (a, b))
    wanted = [[sum(x * y for x, y in zip(row, column, strict=True)) for column in columns] for row in rows]
    found = a.dot(b)
    assert [[Fraction(v) for v in row] for row in found.values.tolist()] == wanted
    assert found.bits == 48 + (len(rows[0]) - 1).bit_length()
    square = (a * a).values.tolist()
    assert [[Fraction(v) for v in row] for row in square] == [[x * x for x in row] for row in rows]


def test_sums_are_those_of_integers_in_every_order() -> None:
    made = Dyadic.of(numbers(1, 4, 4096, spread=10), 24)
    squares = made * made
    wanted = [sum(int(n) for n in row) for row in squares.numerators.tolist()]
    assert squares.sum().numerators[:, 0].tolist() == wanted
    order = torch.randperm(4096, generator=torch.Generator().manual_seed(2))
    shuffled = Dyadic(squares.values[:, order], squares.grid, squares.bits)
    assert torch.equal(shuffled.sum().numerators, squares.sum().numerators)
    assert [Fraction(v) for v in squares.sum().rounded()[:, 0].tolist()] == [
        Fraction(float(n)) * Fraction(2) ** int(g) for n, g in zip(wanted, squares.grid, strict=True)
    ]


def test_what_might_overflow_is_refused_before_it_is_computed() -> None:
    zeros = Dyadic.of(torch.zeros(1, 65), 26)  # the data would fit: the declared bits do not
    with pytest.raises(OverflowError, match="53"):
        zeros.dot(Dyadic.of(torch.zeros(1, 65), 21))
    with pytest.raises(OverflowError, match="53"):
        zeros * Dyadic.of(torch.zeros(1, 65), 28)
    with pytest.raises(OverflowError, match="62"):
        Dyadic(torch.zeros(1, 2**15), torch.zeros(1, 1, dtype=torch.int64), 48).sum()
    assert bits_of_sum(47, 64) == 53
    assert bits_of_sum(5, 0) == bits_of_sum(5, 1) == 5


def test_the_fullest_dot_product_still_is_exact() -> None:
    """Every numerator as large as it can be: 2^26 * 2^21 * 64 = 2^53."""
    none = torch.zeros(1, 1, dtype=torch.int64)
    x = Dyadic(torch.full((1, 64), 2.0**26, dtype=torch.float64), none, 26)
    w = Dyadic(torch.full((1, 64), 2.0**21, dtype=torch.float64), none, 21)
    assert x.dot(w).values.item() == 2.0**53
    most = torch.full((1, 64), 2.0**26 - 1, dtype=torch.float64)
    assert int(Dyadic(most, none, 26).dot(w).values.item()) == 64 * (2**26 - 1) * 2**21


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_lowest_terms_are_the_same_numbers(rows: torch.Tensor) -> None:
    made = Dyadic.of(rows, 24)
    small = made.reduced()
    for values, whole, grid in zip(made.values.tolist(), small.values.tolist(), small.grid.tolist(), strict=True):
        assert [Fraction(v) for v in values] == [n * Fraction(2) ** grid[0] for n in whole]
        assert any(n % 2 for n in whole) or not any(whole)


def test_the_one_division_is_correctly_rounded() -> None:
    made = Dyadic.of(numbers(3, 2, 9, spread=5), 24)
    for value, quotient in zip(
        made.values.flatten().tolist(), made.over(torch.tensor(3.0)).flatten().tolist(), strict=True
    ):
        assert quotient == float(Fraction(value) / 3)


def test_powers_and_exponents_are_read_from_bits() -> None:
    exponents = torch.arange(-1022, 1024)
    assert power(exponents).tolist() == [math.ldexp(1.0, e) for e in exponents.tolist()]
    assert exponent(torch.tensor([[0.0, -6.0, 3.0]], dtype=torch.float64)).item() == 2
    assert round_to(torch.tensor([2.5, 3.5, -2.5], dtype=torch.float64), torch.tensor(0)).tolist() == [2.0, 4.0, -2.0]


def in_digits(function: Callable[[decimal.Decimal], decimal.Decimal], x: float) -> float:
    with decimal.localcontext(prec=60):
        return float(function(decimal.Decimal(x)))


def test_exp_and_log_are_those_of_sixty_digits_but_for_a_few_units() -> None:
    x = torch.cat([torch.linspace(-690, 690, 2001), torch.linspace(-2, 2, 501)]).double()
    for value, found in zip(x.tolist(), elementary.exp(x).tolist(), strict=True):
        assert found == pytest.approx(in_digits(decimal.Decimal.exp, value), rel=2**-50)
    x = elementary.exp(x)
    for value, found in zip(x.tolist(), elementary.log(x).tolist(), strict=True):
        assert found == pytest.approx(in_digits(decimal.Decimal.ln, value), rel=2**-50, abs=2**-52)
    assert elementary.exp(torch.zeros(1, dtype=torch.float64)).item() == 1.0
    assert elementary.log(torch.ones(1, dtype=torch.float64)).item() == 0.0


def test_cosine_and_sine_are_the_library_s_but_for_a_few_units() -> None:
    """The library's are within one unit in float64's last place, and far angles are reduced exactly there."""
    x = torch.cat([torch.linspace(-10, 10, 1001), torch.arange(0, 2**20, 997)]).double()
    cosine, sine = elementary.cos_and_sin(x)
    for value, c, s in zip(x.tolist(), cosine.tolist(), sine.tolist(), strict=True):
        assert c == pytest.approx(math.cos(value), rel=0, abs=2**-50)
        assert s == pytest.approx(math.sin(value), rel=0, abs=2**-50)
    with pytest.raises(OverflowError, match="1048576"):
        elementary.cos_and_sin(torch.tensor([2.0**20], dtype=torch.float64))


def test_rotary_frequencies_are_those_of_sixty_digits() -> None:
    for base, width in [(10000.0, 64), (500000.0, 128)]:
        found = rotary.frequencies(base, width).tolist()
        for i, value in enumerate(found):
            wanted = in_digits(lambda b, i=i, width=width: b ** (decimal.Decimal(-2 * i) / width), base)  # type: ignore[misc]
            assert value == pytest.approx(wanted, rel=2e-6)  # the exponent was rounded to float32 before


def exact_linear(x: torch.Tensor, w: torch.Tensor) -> list[list[Fraction]]:
    return [
        [
            sum((Fraction(a) * Fraction(b) for a, b in zip(row, column, strict=True)), Fraction(0))
            for column in w.double().tolist()
        ]
        for row in x.double().tolist()
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 64), (3, 5, 200), (5, 2, 65)])
def test_a_product_is_that_of_fractions_but_for_its_roundings(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, columns, width = shape
    x = numbers(4, rows, width, spread=3)
    weight = operations.on_grid(numbers(5, columns, width, spread=3).to(dtype))
    wanted, scale = exact_linear(x, weight), exact_linear(x.abs(), weight.abs())
    found = operations.linear(x, weight).tolist()
    for got, exact, size in zip(chain(*found), chain(*wanted), chain(*scale), strict=True):
        assert abs(Fraction(got) - exact) <= size * Fraction(2) ** -20


def test_a_weight_on_its_grid_is_left_alone_and_another_is_rounded_once() -> None:
    plain = torch.randn(8, 200, generator=torch.Generator().manual_seed(6)).bfloat16()
    plain = torch.where(plain.abs() < 2.0**-6, 0.5, plain)
    assert operations.on_grid(plain) is plain
    far = plain.clone()
    far[0, 0] = 2.0**-40
    rounded = operations.on_grid(far)
    assert rounded[0, 0] == 0
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded.flatten()[1:], far.flatten()[1:])
    assert operations.on_grid(rounded) is rounded


def test_a_product_has_the_same_bits_whatever_the_order_of_its_sums() -> None:
    x, weight = numbers(7, 6, 192, spread=8), operations.on_grid(numbers(8, 10, 192, spread=8).bfloat16())
    bias = torch.randn(10, generator=torch.Generator().manual_seed(9))
    plain = operations.linear(x, weight, bias)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        order = torch.cat([first + torch.randperm(64, generator=generator) for first in (0, 64, 128)])
        assert same_bits(operations.linear(x[:, order], weight[:, order].contiguous(), bias), plain)
    for row in range(6):
        assert same_bits(operations.linear(x[row : row + 1], weight, bias), plain[row : row + 1])


def test_norms_and_activations_are_those_of_float64() -> None:
    x = numbers(10, 7, 300, spread=4)
    weight, bias = numbers(11, 300, spread=2), numbers(12, 300, spread=2)
    norm = torch.nn.functional.rms_norm(x.double(), (300,), weight.double(), 1e-6)
    torch.testing.assert_close(operations.rms_norm(x, weight, 1e-6).double(), norm, rtol=2e-7, atol=0)
    layer = torch.nn.functional.layer_norm(x.double(), (300,), weight.double(), bias.double(), 1e-5)
    torch.testing.assert_close(operations.layer_norm(x, weight, bias, 1e-5).double(), layer, rtol=3e-7, atol=1e-6)
    torch.testing.assert_close(operations.silu(x).double(), torch.nn.functional.silu(x.double()), rtol=1e-7, atol=1e-30)
    gelu = torch.nn.functional.gelu(x.double(), approximate="tanh")
    torch.testing.assert_close(operations.gelu_tanh(x).double(), gelu, rtol=1e-7, atol=1e-9)
    some = numbers(13, 5, 1000, spread=4)
    torch.testing.assert_close(operations.logsumexp(some).double(), some.double().logsumexp(-1), rtol=1e-7, atol=1e-7)


def test_norms_and_the_sum_of_shares_do_not_know_an_order() -> None:
    x = numbers(14, 5, 500, spread=6)
    order = torch.randperm(500, generator=torch.Generator().manual_seed(15))
    ones = torch.ones(500)
    assert same_bits(operations.rms_norm(x, ones, 1e-6)[:, order], operations.rms_norm(x[:, order], ones, 1e-6))
    assert same_bits(
        operations.layer_norm(x, None, None, 1e-6)[:, order], operations.layer_norm(x[:, order], None, None, 1e-6)
    )
    assert same_bits(operations.logsumexp(x), operations.logsumexp(x[:, order]))


def heads(seed: int, tokens: int, spread: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query = numbers(seed, 1, 4, tokens, 48, spread=1)
    return query, numbers(seed + 1, 1, 2, tokens, 48, spread=1), numbers(seed + 2, 1, 2, tokens, 48, spread=spread)


def causal(asked: int, tokens: int) -> torch.Tensor:
    return torch.ones(asked, tokens, dtype=torch.bool).tril(tokens - asked)[None, None]


def test_attention_is_that_of_float64() -> None:
    query, key, value = heads(20, 70)
    found = operations.attention(query, key, value, causal(70, 70), 0.2)
    wide = [t.double() for t in (query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1))]
    wanted = torch.nn.functional.scaled_dot_product_attention(*wide, is_causal=True, scale=0.2)
    assert (found.double() - wanted).abs().max() < 1e-6 * value.abs().max()


def test_a_later_token_and_padding_change_no_bit_of_an_earlier_one() -> None:
    query, key, value = heads(30, 70, spread=12)  # values of very different scales
    whole = operations.attention(query, key, value, causal(70, 70), 0.2)
    for first in (1, 31, 32, 33, 69):
        alone = operations.attention(
            query[:, :, :first], key[:, :, :first], value[:, :, :first], causal(first, first), 0.2
        )
        assert same_bits(alone, whole[:, :, :first])
    last = operations.attention(query[:, :, -1:], key, value, causal(1, 70), 0.2)
    assert same_bits(last, whole[:, :, -1:])
    for padding in (1, 5, 32, 40):
        q, k, v = (torch.cat([torch.full((*t.shape[:2], padding, 48), 3e20), t], 2) for t in (query, key, value))
        seen = causal(70 + padding, 70 + padding).clone()
        seen[..., :padding] = False
        padded = operations.attention(q, k, v, seen, 0.2)
        assert same_bits(padded[:, :, padding:], whole)
        assert not padded[:, :, :padding].any()  # what sees nothing is nothing


def test_attention_has_the_same_bits_whatever_the_order_of_the_tokens() -> None:
    query, key, value = heads(40, 50)
    seen = torch.ones(1, 1, 1, 50, dtype=torch.bool)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(41))
    one = operations.attention(query[:, :, :1], key, value, seen, 0.2)
    assert same_bits(one, operations.attention(query[:, :, :1], key[:, :, order], value[:, :, order], seen, 0.2))
