"""A study's page, figures and tables as text; how they look is tried in a browser."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pytest_repro.report import plots
from pytest_repro.report import study as report
from pytest_repro.study import study
from tests.hostile import TEXTS

from .test_study import GRID, OTHER, SAME, cell, failed

SVG = "{http://www.w3.org/2000/svg}"
MODES = ["bf16", "fp32", "layercast"]


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def places(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path)]


def test_a_divergence_curve_lies_where_its_numbers_are() -> None:
    drawing = plots.divergence({"bf16": [0, 50, 100], "layercast": [0, 0, 0]}, MODES)
    bf16, layercast = drawing.series
    assert places(bf16.path) == [
        (drawing.left, drawing.bottom),
        (262.0, (drawing.top + drawing.bottom) / 2),
        (drawing.right, drawing.top),
    ]
    assert {y for _, y in places(layercast.path)} == {drawing.bottom}
    assert (bf16.index, layercast.index) == (0, 2), "a mode's colour is its own, whoever else is drawn"
    assert [key.label for key in drawing.legend] == ["bf16", "layercast"]
    shown = texts(report.svg(drawing))
    assert {"0", "100", "position in the output, tokens", "diverged, % of prompts", "bf16", "layercast"} <= set(shown)


def test_the_spread_s_axis_is_logarithmic_and_zeros_are_gaps() -> None:
    drawing = plots.spread({"bf16": [1e-2, None, 1e-4, 0.0, 1e-3], "fp32": [0.0, 0.0]}, MODES)
    assert drawing is not None
    bf16, fp32 = drawing.series
    found = places(bf16.path)
    assert [round(y) for _, y in found] == [
        round(drawing.top),
        round(drawing.bottom),
        round((drawing.top + drawing.bottom) / 2),
    ]
    assert bf16.path.count("M") == 3 and fp32.path == ""
    assert [tick.label for tick in drawing.y_ticks] == ["1e-4", "1e-3", "1e-2"]
    assert plots.spread({"fp32": [0.0, None]}, MODES) is None


def test_cells_of_one_accuracy_are_one_dot_that_says_how_many() -> None:
    drawing = plots.accuracies({"bf16": [50.0, 25.0, 50.0], "fp32": []})
    assert drawing is not None
    few, many = drawing.dots
    assert (few.count, many.count) == (1, 2) and few.x < many.x and few.radius < many.radius
    (mean,) = drawing.means
    assert mean.at == pytest.approx((few.x + 2 * many.x) / 3, abs=0.1)
    assert [tick.label for tick in drawing.y_ticks] == ["bf16", "fp32"]
    assert {"×1", "×2", "accuracy, %"} <= set(texts(report.svg(drawing)))
    assert plots.accuracies({"bf16": []}) is None


@pytest.mark.parametrize("values", [[0.0], [100.0], [0.0, 100.0], [33.3, 33.4]])
def test_every_dot_and_its_number_lie_inside(values: list[float]) -> None:
    drawing = plots.accuracies({"layercast": values})
    assert drawing is not None
    assert all(drawing.left <= dot.x and dot.x + dot.radius + 24 <= drawing.width for dot in drawing.dots)
    assert len(drawing.x_ticks) >= 2


@pytest.mark.parametrize("length", [1, 2, 3, 96, 4097])
def test_positions_have_round_ticks_inside(length: int) -> None:
    drawing = plots.divergence({"bf16": [0.0] * length}, MODES)
    assert 1 <= len(drawing.x_ticks) <= 8 and all(drawing.left <= t.at <= drawing.right for t in drawing.x_ticks)


def test_many_modes_have_a_legend_of_several_rows_that_stays_inside() -> None:
    names = [f"e{i}m{i}_long" for i in range(9)]
    drawing = plots.divergence({name: [0.0, 1.0] for name in names}, names)
    assert all(key.x + 44 + 8 * len(key.label) <= drawing.width and key.y < drawing.top for key in drawing.legend)
    assert len({(key.x, key.y) for key in drawing.legend}) == 9


def test_tables_say_what_they_stand_on() -> None:
    found = study([*GRID, failed("bf16", batch_size=16, threads=1)])
    told = report.markdown(found)
    assert "| bf16 | 4 of 5 | 50.0 % | 1.0 |" in told and "| fp32 | 4 of 4 | 0.0 % | none diverged |" in told
    assert "| bf16 · batch_size 16 · threads 1 | failed | pack_vnni2 is only supported |" in told
    page = report.page(found)
    assert "bf16 cannot be advised on as a whole" in page and "pack_vnni2 is only supported" in page


@pytest.mark.parametrize("name", TEXTS)
def test_nothing_that_an_engine_says_acts(name: str) -> None:
    evil = replace(failed("bf16", threads=2), error=TEXTS[name])
    here = {"cpu_model": TEXTS[name]}
    found = study([cell("bf16", SAME, threads=1, facts=here), cell("bf16", OTHER, threads=4, facts=here), evil])
    page, table = report.page(found), report.markdown(found)
    plain = report.page(
        study([cell("bf16", SAME, threads=1), cell("bf16", OTHER, threads=4), failed("bf16", threads=2)])
    )
    assert re.findall(r"<[a-z!/][^\s>]*", page) == re.findall(r"<[a-z!/][^\s>]*", plain), "no element comes of it"
    lines = [line for line in table.split("\n") if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in lines[-3:]}) == 1, "nor a column, nor a row"
    assert all(char == "\n" or char.isprintable() for char in table)


def test_what_is_written_is_whole_and_named(tmp_path: Path) -> None:
    files = report.write(tmp_path, study([*GRID[:4]]))
    assert files[0] == tmp_path / "report.html" and all(path.stat().st_size for path in files)
    assert {path.name for path in files} == {"report.html", "table.md", "study.json", "divergence.svg"}, (
        "equal numbers spread nowhere"
    )
