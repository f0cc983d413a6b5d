from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize, minimize_scalar
from typer.testing import CliRunner

from pytest_repro import capybara
from pytest_repro.capybara import PUBLISHED, Constants
from pytest_repro.cli import app
from pytest_repro.errors import ConfigError

B = 128
SHELL = CliRunner()


# --- the published values (arXiv 2501.02423v3) ----------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "trillions"), [((8, 7), "1730"), ((4, 3), "27"), ((2, 1), "0.4")])
def test_critical_data_of_a_1b_model(layout: tuple[int, int], trillions: str) -> None:
    found = capybara.critical_tokens(1e9, *layout, B) / 1e12
    digits = len(trillions.replace(".", "").lstrip("0"))
    assert float(f"{found:.{3 if trillions == '1730' else digits}g}") == float(trillions)


@pytest.mark.parametrize(
    ("bits", "name"),
    [(3, "E1M1"), (4, "E2M1"), (5, "E2M2"), (6, "E3M2"), (7, "E3M3"), (8, "E4M3"), (9, "E4M4"), (10, "E5M4"), (12, "E6M5"),
     (14, "E7M6"), (16, "E8M7")],
)  # fmt: skip
def test_layouts(bits: int, name: str) -> None:
    assert capybara.best_layout(bits).name == name


@pytest.mark.parametrize(("compute", "bits"), [(1e21, 4.19), (1e31, 7.58)])
def test_best_precision_for_a_budget(compute: float, bits: float) -> None:
    assert round(capybara.best_for_compute(compute, B).bits, 2) == bits


# --- the formulas against brute force -------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", [1e21, 1e26, 1e31])
def test_the_best_of_a_budget_by_brute_force(compute: float) -> None:
    def spent(x: Any) -> float:
        p, tokens = math.exp(x[0]), math.exp(x[1])
        return capybara.loss_at_best_layout(compute / (capybara.COST * p * tokens), tokens, p, B)

    done = minimize(spent, [math.log(6.0), math.log(compute) / 2.2], method="Nelder-Mead",
                    options={"xatol": 1e-9, "fatol": 1e-15, "maxiter": 20_000, "maxfev": 20_000})  # fmt: skip
    found = capybara.best_for_compute(compute, B)
    assert math.exp(done.x[0]) == pytest.approx(found.bits, rel=1e-3)
    assert found.loss == pytest.approx(done.fun, rel=1e-9)
    assert capybara.COST * found.bits * found.params * found.tokens == pytest.approx(compute)


@pytest.mark.parametrize("tokens", [1e11, 1e12, 1e13, 1e14])
def test_the_best_for_a_data_size_by_brute_force(tokens: float) -> None:
    budget = 1e24  # which one does not matter
    done = minimize_scalar(
        lambda p: capybara.loss_at_best_layout(budget / (p * tokens), tokens, p, B), bounds=(1, 30), method="bounded",
        options={"xatol": 1e-9},
    )  # fmt: skip
    assert capybara.best_bits_for_tokens(tokens, B) == pytest.approx(done.x, rel=1e-4)


@pytest.mark.parametrize(("params", "compute"), [(1e9, 1e21), (7e9, 1e23)])
def test_the_best_for_a_model_size_by_brute_force(params: float, compute: float) -> None:
    done = minimize_scalar(
        lambda p: capybara.loss_at_best_layout(params, compute / (capybara.COST * p * params), p, B),
        bounds=(1, 30), method="bounded", options={"xatol": 1e-9},
    )  # fmt: skip
    assert capybara.best_bits_for_params(params, compute, B) == pytest.approx(done.x, rel=1e-4)


def test_more_data_helps_up_to_the_critical_size_and_hurts_beyond() -> None:
    critical = capybara.critical_tokens(1e9, 2, 1, B)
    at, less, more = (float(capybara.loss(1e9, critical * f, 2, 1, B)) for f in (1, 0.9, 1.1))
    assert at < less and at < more


def test_high_precision_costs_nothing_and_has_no_critical_size() -> None:
    assert float(capybara.penalty(1e9, 1e11, 4, 3, 1)) == 0
    assert capybara.critical_tokens(1e9, 4, 3, 1) == math.inf


def test_one_exponent_bit_is_worth_more_than_one_mantissa_bit() -> None:
    assert capybara.penalty(1e9, 1e11, 4, 3, B) < capybara.penalty(1e9, 1e11, 3, 4, B)


def test_what_lies_outside_is_named() -> None:
    assert capybara.outside(params=1e9, tokens=5e10, block=128, bits=8) == []
    assert capybara.outside(tokens=1e13) == ["tokens 1e+13 is outside 1e+10 to 1e+11"]


# --- fitting --------------------------------------------------------------------------------------------------------


def measured(seed: int, truth: Constants = PUBLISHED, noise: float = 0.01) -> Any:
    formats = [(1, 1), (2, 1), (1, 2), (3, 1), (1, 3), (2, 2), (3, 2), (2, 3), (4, 3)]
    grid = np.array(
        [(n, d, e, m, b) for n in (41e6, 85e6, 154e6, 679e6) for d in (1e10, 2e10, 5e10, 1e11) for e, m in formats
         for b in (32, 128, 512)]
    )  # fmt: skip
    noisy = capybara.loss(*grid.T, truth) * np.exp(noise * np.random.default_rng(seed).standard_normal(len(grid)))
    return np.column_stack([grid, noisy])


@pytest.mark.parametrize(
    "truth", [PUBLISHED, Constants(100.0, 0.28, 40000.0, 0.5, 1.7, 8000.0, 2.8, 3.3)], ids=["published", "others"]
)
def test_a_fit_recovers_each_constant_within_its_interval(truth: Constants) -> None:
    found = capybara.fit(measured(7, truth))
    for name, (value, low, high) in capybara.described([truth, found.low, found.high]):
        assert low <= value <= high, name
    assert found.residual == pytest.approx(0.01, rel=0.15)
    assert found.held_out_error < 0.012 and found.held_out_r2 > 0.95


def test_the_intervals_are_neither_too_narrow_nor_boundless() -> None:
    inside, widths = [], []
    for seed in range(12):
        x, spread = capybara._fitted(measured(seed))
        off = np.abs(x - capybara._fitted_form(PUBLISHED)) / spread.deviations
        inside.append(off <= 2)
        widths.append(spread.deviations)
    assert np.mean(inside) > 0.88  # 95 % is meant; 96 draws
    delta, nu = 6, 7
    assert np.median(widths, axis=0)[[delta, nu]].max() < 0.3


def test_without_noise_the_constants_come_back() -> None:
    found = capybara.fit(measured(0, noise=0.0))
    for name, (value, back) in capybara.described([PUBLISHED, found.constants]):
        assert back == pytest.approx(value, rel=1e-3), name


def test_losses_that_follow_another_law_are_not_predicted() -> None:
    rows = measured(0)
    rows[:, 5] = np.random.default_rng(0).uniform(2, 4, len(rows))
    assert capybara.fit(rows).held_out_r2 < 0.2


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda rows: rows[:10], "10 rows cannot fix eight constants"),
        (lambda rows: rows[rows[:, 0] == 41e6], "N takes fewer than three values"),
        (lambda rows: rows[rows[:, 2] == 1], "E takes fewer than three values"),
        (lambda rows: np.where(np.arange(6) == 4, 1.0, rows), "every row is high precision"),
        (lambda rows: np.where(np.arange(6) == 4, 0.5, rows), "B is below 1"),
        (lambda rows: np.where(np.arange(6) == 5, 0.0, rows), "loss is not above 0"),
    ],
)
def test_rows_that_cannot_be_fitted(spoil: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        capybara.fit(spoil(measured(0)))


def csv_of(rows: Any, header: str = "N,D,E,M,B,loss") -> str:
    return "\n".join([header, *(",".join(f"{v:.10g}" for v in row) for row in rows)]) + "\n"


def test_a_file_is_read_whatever_its_columns_order_and_suffixes(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("loss, d,B,N,E,M,note\n2.97,100B,128,85M,4,3,first\n", "utf-8")
    assert capybara.read_losses(tmp_path / "l.csv").tolist() == [[85e6, 100e9, 4, 3, 128, 2.97]]


@pytest.mark.parametrize(
    ("text", "where", "message"),
    [
        ("N,D,E,M,B\n1,2,3,4,5\n", ":1", "no column loss"),
        ("N,D,E,M,B,loss\n1,2,3,4,5,x\n", r":2 \[loss\]", "'x' is not a number"),
        ("N,D,E,M,B,loss\n1,2,3,4,5,6\n1,2,3\n", r":3 \[M\]", "'' is not a number"),
        ("N,D,E,M,B,loss\n1,2,-3,4,5,6\n", r":2 \[E\]", "cannot be"),
        ("N,D,E,M,B,loss\n1,2,3,4,5,nan\n", r":2 \[loss\]", "cannot be"),
        ("", ":1", "no column N"),
    ],
)
def test_a_bad_file_is_named_with_line_and_column(tmp_path: Path, text: str, where: str, message: str) -> None:
    (tmp_path / "l.csv").write_text(text, "utf-8")
    with pytest.raises(ConfigError, match=message) as caught:
        capybara.read_losses(tmp_path / "l.csv")
    assert str(caught.value.where).endswith(where.replace("\\", ""))


# --- the command ----------------------------------------------------------------------------------------------------


def ask(*words: str) -> tuple[int, str]:
    done = SHELL.invoke(app, ["capybara", *words], env={"COLUMNS": "200"})
    return done.exit_code, done.output


def test_every_answer_says_what_it_rests_on() -> None:
    for words in (
        ("loss", "--params", "679M", "--tokens", "100B", "-E", "4", "-M", "3"),
        ("layout", "--bits", "8"),
        ("critical", "--params", "1B", "-E", "4", "-M", "3"),
        ("precision", "--tokens", "50B"),
        ("precision", "--compute", "1e21"),
        ("precision", "--params", "7B", "--compute", "1e21"),
    ):
        code, said = ask(*words)
        assert code == 0 and "fitted on 41M to 679M parameters" in said, words
        code, said = ask(*words, "--as-json")
        assert code == 0 and "validity" in json.loads(said), words


def test_an_answer_of_the_command() -> None:
    assert "27.33T tokens" in ask("critical", "--params", "1B", "-E", "4", "-M", "3")[1]
    assert json.loads(ask("layout", "-P", "8", "--as-json")[1])["name"] == "E4M3"


@pytest.mark.parametrize(
    "words",
    [
        ("loss", "--params", "1M", "--tokens", "50B", "-E", "4", "-M", "3"),
        ("precision", "--tokens", "100T"),
        ("precision", "--compute", "1e31"),
        ("precision", "--params", "1B", "--compute", "1e30"),
        ("layout", "--bits", "32"),
    ],
)
def test_what_lies_outside_is_refused_unless_asked_for(words: tuple[str, ...]) -> None:
    code, said = ask(*words)
    assert code == 2 and "the law was not fitted there" in said
    code, said = ask(*words, "--extrapolate")
    assert code == 0 and "extrapolated:" in said


@pytest.mark.parametrize(
    "words",
    [
        ("precision",),
        ("precision", "--tokens", "1B", "--params", "1B"),
        ("loss", "--params", "many", "--tokens", "50B", "-E", "4", "-M", "3"),
        ("loss", "--params", "-1", "--tokens", "50B", "-E", "4", "-M", "3"),
        ("layout", "--bits", "2"),
        ("fit", "nowhere.csv"),
    ],
)
def test_a_question_that_is_none(words: tuple[str, ...]) -> None:
    code, said = ask(*words)
    assert code == 2 and "Traceback" not in said


def test_fit_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text(csv_of(measured(1)), "utf-8")
    code, said = ask("fit", str(tmp_path / "l.csv"))
    assert code == 0 and "432 rows" in said and "rows held out" in said
    found = json.loads(ask("fit", str(tmp_path / "l.csv"), "--as-json")[1])
    assert found["low"]["delta"] <= PUBLISHED.delta <= found["high"]["delta"]
