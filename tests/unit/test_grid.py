"""Axes, cells, and whether a setting took."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_repro import grid
from pytest_repro.errors import ConfigError

SEEN: dict[str, Any] = {
    "numerics": "fp32",
    "batch_size": 4,
    "threads": 2,
    "cpu_capability": "AVX2",
    "tensor_parallel_size": 1,
    "attention": "sdpa",
}


def test_axes_come_in_the_table_s_order_whatever_they_were_named_in() -> None:
    axes = grid.parse_axes(["threads=1,2", "isa=avx2, avx512", "batch_size=16,4,1", "numerics=bf16,fp32"])
    assert list(axes) == ["numerics", "batch_size", "threads", "isa"]
    assert axes["batch_size"] == ("16", "4", "1") and axes["isa"] == ("avx2", "avx512")
    cells = grid.settings(axes)
    assert len(cells) == len({grid.name_of(c) for c in cells}) == 24
    assert grid.name_of(cells[0]) == "numerics=bf16,batch_size=16,threads=1,isa=avx2"
    assert grid.axes_of(cells) == {**axes, "batch_size": ("1", "4", "16")}


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["batch=1,4"], "unknown axis 'batch'; known: numerics, engine, batch_size"),
        (["batch_size"], "is not NAME=VALUE"),
        (["batch_size="], "is not NAME=VALUE"),
        (["batch_size=0"], "'0' is no value of the axis batch_size"),
        (["batch_size=4,,8"], "'' is no value"),
        (["batch_size=-1"], "is no value"),
        (["threads=two"], "give a whole number above 0"),
        (["isa=sse9"], "give one of default, avx2, avx512"),
        (["engine=openai"], "give one of transformers, vllm, scripted"),
        (["engine=os:system"], "is no value"),
        (["attention=../kernel"], "is no value"),
        (["numerics=bf16/../.."], "is no value"),
        (["numerics=-bf16"], "is no value"),
        (["batch_size=4,8,4"], "4 stands twice"),
        (["batch_size=4", "batch_size=8"], "this axis is named twice"),
        (["machine=here"], "unknown axis"),
    ],
)
def test_bad_axes(texts: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        grid.parse_axes(texts)
    assert said in str(refused.value) and str(refused.value).startswith("--axis") and refused.value.fix


def test_the_environment_of_a_cell() -> None:
    around = {"OMP_NUM_THREADS": "8", "MKL_NUM_THREADS": "8", "HOME": "/h"}
    found = grid.environment({"numerics": "fp32", "threads": "2", "isa": "avx2"}, around)
    assert found == {
        "HOME": "/h", "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    }  # fmt: skip
    assert grid.environment({"numerics": "fp32", "batch_size": "4"}, around) == around


def test_engine_options_of_a_cell() -> None:
    asked = {"numerics": "bf16", "attention": "eager", "tensor_parallel": "2"}
    assert grid.engine_options(asked, "vllm") == {"attention_backend": "eager", "tensor_parallel_size": 2}
    assert grid.engine_options({"attention": "eager", "tensor_parallel": "1"}, "transformers") == {"attention": "eager"}
    with pytest.raises(ConfigError, match="the engine transformers has no tensor_parallel"):
        grid.engine_options(asked, "transformers")


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({}, []),
        ({"batch_size": "4", "threads": "2", "isa": "avx2", "attention": "SDPA", "tensor_parallel": "1"}, []),
        ({"threads": "1"}, ["threads 1 was asked for, and 2 was in force"]),
        ({"isa": "avx512"}, ["isa avx512 was asked for, and AVX2 was in force"]),
        ({"isa": "default"}, ["isa default was asked for, and AVX2 was in force"]),
        ({"engine": "vllm"}, ["engine vllm was asked for, and the engine does not show what was in force"]),
    ],
)
def test_what_was_in_force_is_held_against_what_was_asked(setting: dict[str, str], said: list[str]) -> None:
    assert grid.contradictions({"numerics": "fp32", **setting}, SEEN, "fp32", "fp32") == said


def test_a_precision_that_the_probe_does_not_see_contradicts() -> None:
    setting = {"numerics": "fp32"}
    assert grid.contradictions(setting, SEEN, "tf32", "fp32") == ["fp32 was asked for, and the probe found tf32"]
    assert grid.contradictions(setting, SEEN, "unknown", "fp32") == ["fp32 was asked for, and the probe found unknown"]
    assert grid.contradictions(setting, SEEN, "bf16", None) == [], "native claims nothing"


def test_the_time_left_is_that_of_the_cells_most_alike() -> None:
    def cell(mode: str, batch: int) -> dict[str, str]:
        return {"numerics": mode, "batch_size": str(batch)}

    done = [(cell("bf16", 1), 100.0), (cell("bf16", 16), 10.0)]
    assert grid.seconds_left([], [], [cell("fp32", 1)], 1) is None
    assert grid.seconds_left(done, [], [cell("fp32", 1), cell("fp32", 16)], 1) == 110
    assert grid.seconds_left(done, [], [cell("fp32", 4)], 1) == 55, "nothing alike: the mean"
    assert grid.seconds_left(done, [(cell("fp32", 1), 40.0)], [cell("fp32", 16)], 1) == 70
    assert grid.seconds_left(done, [(cell("fp32", 1), 40.0)], [cell("fp32", 16)], 2) == 60, (
        "no less than the longest takes"
    )
    assert grid.seconds_left(done, [(cell("fp32", 1), 400.0)], [], 1) == 0
