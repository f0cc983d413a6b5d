"""The ladder's logic and its figure, on made numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest

from pytest_repro import ladder
from pytest_repro.accuracy import paired_test
from pytest_repro.ladder import Departure, Rung
from pytest_repro.report import curves as figure


def departure(name: str, deficit: list[float], error: str = "") -> Departure:
    size = np.asarray(deficit, np.float32)
    return Departure(name, size, -2 * size, size / 10, error)


def made(layout: tuple[int, int], kl: float, divergent: int = 0, prompts: int = 8) -> Rung:
    exponent, mantissa = layout
    indices = {f"p{i}": i for i in range(divergent)}
    return Rung(
        f"e{exponent}m{mantissa}", f"e{exponent}m{mantissa}", exponent, mantissa, 1 + sum(layout), "", prompts, divergent,
        None, 0.0, kl, kl, indices,
    )  # fmt: skip


def test_a_rung_sums_up_its_prompts() -> None:
    found = ladder.rung(
        "e4m3",
        (4, 3),
        "FP8 E4M3",
        [departure("a", [0, 0, 0]), departure("b", [0, 0.5, 0.1]), departure("c", [1, 0, 0, 0])],
    )
    assert (found.format, found.bits, found.known_as, found.prompts) == ("e4m3", 8, "FP8 E4M3", 3)
    assert (found.divergent, dict(found.indices), found.mean_index) == (2, {"b": 1, "c": 0}, 0.5)
    assert found.flipped == pytest.approx(3 / 10)
    assert found.mean_abs_dlogp == pytest.approx(2 * 1.6 / 10) and found.mean_kl == pytest.approx(0.16 / 10)
    assert found.div_percent == pytest.approx(200 / 3)


def test_a_prompt_without_numbers_is_divergent_and_in_no_mean() -> None:
    found = ladder.rung(
        "e2m1", (2, 1), "", [departure("a", [0.5]), departure("b", [np.nan], "no finite logits at token 0")]
    )
    assert (found.divergent, found.mean_index, dict(found.errors)) == (2, 0.0, {"b": "no finite logits at token 0"})
    assert found.mean_abs_dlogp == pytest.approx(1.0) and found.flipped == 1.0


def test_nothing_moves_and_nothing_diverges() -> None:
    found = ladder.rung("e8m23", (8, 23), "float32", [departure("a", [0, 0])])
    assert (found.divergent, found.mean_index, found.mean_kl, found.flipped) == (0, None, 0.0, 0.0)


def test_a_rung_comes_back_from_its_line() -> None:
    rung = ladder.rung("e4m3", (4, 3), "", [departure("a", [0.1])]).with_accuracy(
        paired_test([True, True], [True, False], 0.05)
    )
    assert rung.accuracy is not None and rung.accuracy["drop"] == 50 and rung.accuracy["lost"] == 1
    assert Rung.from_json(json.loads(json.dumps(rung.to_json()))) == rung
    with pytest.raises(TypeError):
        Rung.from_json({**rung.to_json(), "colour": "red"})
    assert rung.with_accuracy(None) is rung


def test_the_descent_is_from_wide_to_narrow_and_each_once() -> None:
    named = [(2, 1), (4, 3), (8, 23), (5, 2), (4, 3), (8, 7), (5, 10)]
    assert ladder.descending(named) == [(8, 23), (5, 10), (8, 7), (4, 3), (5, 2), (2, 1)]


def test_the_widest_format_that_diverges_is_where_the_model_leaves() -> None:
    rungs = [made((2, 1), 1, 8), made((8, 7), 1e-3, 1), made((8, 10), 1e-5), made((4, 3), 1e-2, 4)]
    assert ladder.left_at(rungs) == rungs[1]
    assert ladder.left_at([rungs[2]]) is None


def test_curves_hold_one_field_fixed() -> None:
    rungs = [made(layout, 1.0) for layout in ((4, 7), (4, 1), (4, 3), (2, 3), (8, 3), (5, 2))]
    over_mantissa, over_exponent = ladder.curves(rungs, 4, 3)
    assert (over_mantissa.varied, [r.format for r in over_mantissa.rungs]) == ("mantissa", ["e4m1", "e4m3", "e4m7"])
    assert (over_exponent.varied, [r.format for r in over_exponent.rungs]) == ("exponent", ["e2m3", "e4m3", "e8m3"])
    assert ladder.curves(rungs, 5, 7) == [], "one rung is no curve"


def test_equal_widths_are_set_side_by_side_the_nearest_first() -> None:
    rungs = [made((5, 2), 0.2), made((4, 3), 0.1), made((3, 2), 0.4), made((2, 3), 0.3), made((2, 1), 2)]
    assert [[r.format for r in group] for group in ladder.splits(rungs)] == [["e4m3", "e5m2"], ["e2m3", "e3m2"]]


def test_exponents_of_the_law_come_back_from_rungs_that_follow_it() -> None:
    layouts = [(e, m) for e in (2, 3, 4, 5) for m in (1, 2, 3)]
    rungs = [made((e, m), 7.0 / ((e + 0.5) ** 3.19 * (m + 0.5) ** 2.95)) for e, m in layouts]
    found = ladder.exponents([*rungs, made((8, 23), 0.0)])
    assert found is not None and found.rungs == 12, "a rung that does not depart says nothing"
    assert (found.delta, found.nu, found.r2) == (pytest.approx(3.19), pytest.approx(2.95), pytest.approx(1))
    mantissa_alone = ladder.exponents([made((e, m), 4.0**-m) for e, m in layouts])
    assert mantissa_alone is not None and abs(mantissa_alone.delta) < 1e-9 < mantissa_alone.nu and mantissa_alone.r2 < 1


@pytest.mark.parametrize(
    "layouts",
    [[(4, 3)] * 3, [(4, m) for m in (1, 2, 3, 4)], [(e, e) for e in (2, 2, 3, 3)]],
    ids=["few", "one E", "aligned"],
)
def test_exponents_are_not_guessed(layouts: list[tuple[int, int]]) -> None:
    assert ladder.exponents([made(layout, 0.1) for layout in layouts]) is None


# --- the figure -----------------------------------------------------------------------------------------------------

SVG = "{http://www.w3.org/2000/svg}"


def drawn(rungs: list[Rung], name: str = "demo") -> ElementTree.Element:
    return ElementTree.fromstring(figure.svg(name, ladder.curves(rungs, 4, 3)))


RUNGS = [
    made((4, 1), 0.5, 8), made((4, 3), 0.05, 4), made((4, 7), 0.0, 0), made((2, 3), 0.1, 6), made((8, 3), 0.04, 2),
]  # fmt: skip


def test_the_figure_has_every_rung_in_both_panels_and_says_what_it_shows() -> None:
    root = drawn(RUNGS)
    titles = [t.text for t in root.iter(f"{SVG}title")]
    for rung in RUNGS:
        times = 2 if rung.format == "e4m3" else 1  # it lies on both curves
        assert titles.count(f"{rung.format}: {rung.mean_kl:.2g} nats") == times
        assert titles.count(f"{rung.format}: {rung.divergent} of 8 prompts") == times
    texts = [t.text for t in root.iter(f"{SVG}text")]
    assert {"mean KL divergence from FP32, nats a token", "prompts that leave the golden, %"} <= set(texts)
    assert {"over mantissa bits, at 4 exponent bits", "over exponent bits, at 3 mantissa bits"} <= set(texts)
    assert texts.count("bits of the varied field") == 2
    assert root.get("role") == "img" and len(list(root.iter(f"{SVG}polyline"))) == 4


def test_points_lie_inside_of_their_panel_and_higher_is_more() -> None:
    root = drawn(RUNGS)
    width, height = (float(root.get(side, "0")) for side in ("width", "height"))
    at = {}
    for circle in root.iter(f"{SVG}circle"):
        if (title := circle.find(f"{SVG}title")) is not None:
            x, y = float(circle.get("cx", "")), float(circle.get("cy", ""))
            assert 0 < x < width and figure.TOP <= y <= figure.TOP + figure.PANEL_HEIGHT < height
            at[title.text] = (x, y)
    assert at["e4m1: 0.5 nats"][1] < at["e4m3: 0.05 nats"][1] < at["e4m7: 0 nats"][1]
    assert at["e4m1: 0.5 nats"][0] < at["e4m3: 0.05 nats"][0] < at["e4m7: 0 nats"][0]
    assert (
        at["e4m1: 8 of 8 prompts"][1] == figure.TOP
        and at["e4m7: 0 of 8 prompts"][1] == figure.TOP + figure.PANEL_HEIGHT
    )


def test_a_suites_name_is_text_in_the_figure() -> None:
    root = drawn([replace(r, mode=r.mode) for r in RUNGS], "<script>alert(1)</script> & co")
    assert not list(root.iter(f"{SVG}script")) and not list(root.iter("script"))
    assert any("<script>" in (t.text or "") for t in root.iter(f"{SVG}text"))


def test_the_figure_knows_light_and_dark() -> None:
    text = figure.svg("demo", ladder.curves(RUNGS, 4, 3))
    assert "prefers-color-scheme: dark" in text
    light, dark = text.split("@media")
    for name in ("--ground", "--ink", "--mantissa", "--exponent"):
        assert f"{name}: #" in light and f"{name}: #" in dark
