"""Cells -> tables, effects and advice."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pytest_repro import study as studies
from pytest_repro.cells import Cell, Row, Sample
from pytest_repro.errors import ConfigError
from pytest_repro.study import study


def cell(
    mode: str, outputs: Sequence[Sequence[int]], *, rights: Sequence[bool] = (), seconds: float = 1.0, facts: Mapping[str, Any] | None = None, **setting: Any
) -> Cell:  # fmt: skip
    rows = tuple(
        Row(f"p{i}", f"d{i}", np.array(tokens, np.int32), np.full(len(tokens), -0.1, np.float32), "", "stop", rights[i] if rights else None)
        for i, tokens in enumerate(outputs)
    )  # fmt: skip
    return Cell(
        {"numerics": mode, **{k: str(v) for k, v in setting.items()}}, {"suite": "demo", "model": "m", "max_new_tokens": 8}, "done",
        rows=rows, environment={"model.weights": "w", "device": "cpu", "cpu_model": "CPU", "numerics": mode, **(facts or {})},
        seconds=seconds, memory={"resident": 2**30},
    )  # fmt: skip


def failed(mode: str, **setting: Any) -> Cell:
    return Cell(
        {"numerics": mode, **{k: str(v) for k, v in setting.items()}}, {}, "failed", "pack_vnni2 is only supported"
    )


SAME, OTHER = [[1, 2], [3, 4]], [[1, 2], [3, 9]]
GRID = [
    cell("bf16", SAME, batch_size=1, threads=1, seconds=0.1),
    cell("bf16", SAME, batch_size=1, threads=2, seconds=0.1),
    cell("bf16", OTHER, batch_size=4, threads=1, seconds=0.1),
    cell("bf16", OTHER, batch_size=4, threads=2, seconds=0.1),
    *[cell("fp32", SAME, batch_size=b, threads=t, seconds=1.0) for b in (1, 4) for t in (1, 2)],
    *[cell("layercast", SAME, batch_size=b, threads=t, seconds=0.5) for b in (1, 4) for t in (1, 2)],
]


def test_a_row_a_precision_and_the_axis_that_moves_comes_first() -> None:
    found = study(GRID)
    assert found.axes == {"numerics": ("bf16", "fp32", "layercast"), "batch_size": ("1", "4"), "threads": ("1", "2")}
    bf16, fp32, _ = found.precisions
    assert bf16.dispersion is not None and fp32.dispersion is not None
    assert (bf16.done, bf16.asked, bf16.dispersion.div_percent, fp32.dispersion.div_percent) == (4, 4, 50, 0)
    effects = {(e.axis, e.numerics): (e.pairs, e.div_percent) for e in found.effects}
    assert effects["batch_size", "bf16"] == (2, 50) and effects["threads", "bf16"] == (2, 0)
    assert effects["batch_size", "fp32"] == (2, 0) and effects["numerics", ""] == (12, pytest.approx(100 / 6))
    assert (found.effects[0].axis, found.effects[0].numerics) == ("batch_size", "bf16")
    held = {(f.axis, f.value, f.numerics): f.dispersion.diverging for f in found.fixed}
    assert held["batch_size", "4", "bf16"] == 0 and held["threads", "1", "bf16"] == 1
    assert found.cautions == () and found.failed == ()


def test_the_cheapest_mode_that_kept_everything_is_advised_and_what_it_rests_on_is_told() -> None:
    found = study(GRID)
    assert [s.setting for s in found.steady] == [{"numerics": "layercast"}, {"numerics": "fp32"}], (
        "bf16 is faster, and moved"
    )
    first, second, bound = found.advice
    assert first.startswith("layercast is the cheapest setting under which nothing moved: 2 prompts gave the same tokens in all 4 cells that vary batch_size, threads. 8.0 tokens/s")  # fmt: skip
    assert "1.00 GiB resident" in first and second.startswith("fp32 kept every output the same too: 4.0 tokens/s")
    assert "fewer than 77.6 % of such prompts" in bound, "two prompts prove little: 1 - 0.05 ** (1 / 2)"


def test_where_no_mode_holds_one_axis_more_is_held() -> None:
    found = study(GRID[:4])
    assert {tuple(s.setting.items()) for s in found.steady} == {
        (("numerics", "bf16"), ("batch_size", "1")), (("numerics", "bf16"), ("batch_size", "4")),
    }  # fmt: skip
    assert (
        found.advice[0].startswith("No mode kept every output the same over the whole grid")
        and "that vary threads" in found.advice[1]
    )


def test_where_nothing_holds_nothing_is_advised() -> None:
    found = study([cell("bf16", SAME, batch_size=1), cell("bf16", OTHER, batch_size=4)])
    assert found.steady == () and found.advice[0].startswith("No setting of this grid kept every output")
    alone = study([cell("bf16", SAME), cell("fp32", SAME)])
    assert alone.advice == ("No advice: nothing but the numerics mode was varied, so that nothing could have moved.",)
    assert alone.precisions[0].dispersion is None, "one cell has no standard deviation"


def test_a_mode_with_a_cell_that_failed_is_never_advised() -> None:
    found = study([cell("bf16", SAME, threads=1, seconds=0.01), cell("bf16", SAME, threads=2), failed("bf16", threads=4),
                   *[cell("fp32", SAME, threads=t) for t in (1, 2, 4)]])  # fmt: skip
    assert [s.setting for s in found.steady] == [{"numerics": "fp32"}]
    assert "bf16 cannot be advised on as a whole: 1 of its 3 cells have no answers." in found.advice
    assert (found.precisions[0].done, found.precisions[0].asked) == (2, 3)
    assert found.failed == (("bf16 · threads 4", "failed", "pack_vnni2 is only supported"),)
    assert studies.table(found)[1][0][1] == "2 of 3"


def test_nothing_done_is_told() -> None:
    found = study([failed("bf16", threads=1), failed("bf16", threads=2)])
    assert found.advice == ("No advice: no mode has two cells that are done.",) and found.precisions[0].cost is None
    assert json.loads(json.dumps(studies.as_data(found)))["failed"]
    with pytest.raises(ConfigError, match="there is no cell"):
        study([])


def test_cells_of_other_weights_or_prompts_are_no_study() -> None:
    here = cell("bf16", SAME, threads=1)
    with pytest.raises(ConfigError, match=r"different questions: model\.weights differ"):
        study([here, cell("bf16", SAME, threads=2, facts={"model.weights": "others"})])
    with pytest.raises(ConfigError, match="prompts differ"):
        study([here, cell("bf16", SAME[:1], threads=2)])


def test_what_differs_besides_is_told() -> None:
    found = study([cell("bf16", SAME, threads=1, facts={"torch": "2.12", "threads": 1}), cell("bf16", SAME, threads=2, facts={"torch": "2.13", "threads": 2})])  # fmt: skip
    assert found.cautions == ("torch is not the same in all cells, and no axis varies it: 2.12, 2.13",)


def test_pass_at_1_and_its_spread() -> None:
    def sampled(threads: int, *rights: Sequence[bool]) -> Cell:
        plain = cell("bf16", SAME, rights=[True, True], threads=threads)
        drawn = [tuple(Sample(np.array([1], np.int32), right) for right in some) for some in rights]
        return replace(plain, rows=tuple(replace(row, samples=s) for row, s in zip(plain.rows, drawn, strict=True)))

    found = study([sampled(1, [True, True], [True, False]), sampled(2, [False, False], [True, False])])
    told = found.precisions[0].pass_at_1
    assert told is not None and (told.runs, told.mean) == (2, 50)
    assert told.spread == pytest.approx(np.std([75, 25], ddof=1))
    # By run: 100 and 50; 50 and 0. Each has the standard error 25.
    assert told.within == pytest.approx(25)
    assert (
        studies.table(found)[0][-2:] == ["Pass@1", "std of Pass@1"] and studies.table(found)[1][0][-2] == "50.0 % of 2"
    )


def test_studies_of_two_machines_are_one_with_the_machine_as_an_axis() -> None:
    def on(device: str, outputs: Sequence[Sequence[int]]) -> list[Cell]:
        return [cell("bf16", outputs, batch_size=b, facts={"device": device}) for b in (1, 4)]

    merged = study(studies.merged([("a", on("NVIDIA A100", SAME)), ("b", on("NVIDIA L40S", OTHER))]))
    assert merged.axes["machine"] == ("NVIDIA A100", "NVIDIA L40S")
    assert (merged.effects[0].axis, merged.effects[0].div_percent) == ("machine", 50)
    assert merged.precisions[0].done == 4
    alike = studies.merged([("a", on("cpu", SAME)), ("b", on("cpu", SAME))])
    assert {c.setting["machine"] for c in alike} == {"CPU #1", "CPU #2"}
    with pytest.raises(ConfigError, match="other axes than a"):
        studies.merged([("a", on("cpu", SAME)), ("b", [cell("bf16", SAME, threads=1)])])
    with pytest.raises(ConfigError, match="no cell of this study is done"):
        studies.merged([("a", on("cpu", SAME)), ("b", [failed("bf16", batch_size=1)])])
