"""A study's processes: what each gets, and what is believed of what they leave. Whole studies run in tests/e2e."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from pytest_repro import campaign, cells, probe
from pytest_repro.campaign import Plan
from pytest_repro.decoding import Sampling, asked
from pytest_repro.errors import ConfigError
from pytest_repro.suite import Overrides, Prompt, Suite

from .test_study import SAME, cell

SUITE = Suite("demo", Path("golden/demo"), "m", (Prompt("p0", "a"), Prompt("p1", "b")))


def plan(**axes: tuple[str, ...]) -> Plan:
    return Plan(Path("golden/demo"), Overrides(), {"numerics": ("bf16",), **axes})


def test_cells_that_run_together_share_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "visible_gpus", lambda _: ("0", "1", "2", "3"))
    small, large = [{"numerics": "bf16"}], [{"numerics": "bf16", "tensor_parallel": "2"}]
    assert campaign._slots(plan(), 1, large) == [{}], "alone, a cell sees all of them"
    assert campaign._slots(plan(), 2, large) == [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in campaign._slots(plan(), 4, small)] == ["0", "1", "2", "3"]
    with pytest.raises(ConfigError, match="3 cells at a time with 2 GPUs each, and 4 are visible") as refused:
        campaign._slots(plan(), 3, large)
    assert refused.value.fix == "--jobs 2"
    monkeypatch.setattr(probe, "visible_gpus", lambda _: ())
    assert campaign._slots(plan(), 3, small) == [{}, {}, {}]


def test_what_a_study_asks_leaves_out_what_its_axes_vary() -> None:
    shared = asked(SUITE, ("numerics", "batch_size"), Sampling())
    assert "batch_size" not in shared and shared["max_new_tokens"] == SUITE.max_new_tokens and "seed" not in shared
    assert asked(SUITE, (), Sampling())["batch_size"] == SUITE.batch_size
    for other in (replace(SUITE, max_new_tokens=5), replace(SUITE, prompts=SUITE.prompts[:1]), replace(SUITE, scorer="exact"),
                  replace(SUITE, engine_tables={"transformers": {"attention": "eager"}}), replace(SUITE, model="other")):  # fmt: skip
        assert asked(other, ("batch_size",), Sampling()) != asked(SUITE, ("batch_size",), Sampling())
    assert asked(SUITE, (), Sampling(2, seed=1)) != asked(SUITE, (), Sampling(2, seed=2))


def test_only_cells_of_the_grid_are_kept_and_only_of_this_study(tmp_path: Path) -> None:
    shared = asked(SUITE, ("numerics", "batch_size"), Sampling())
    (tmp_path / "cells").mkdir()
    for batch in (1, 4):
        made = replace(cell("bf16", SAME, batch_size=batch), asked=shared)
        (tmp_path / "cells" / f"{made.name}.jsonl").write_bytes(cells.encode(made))
    assert [c.name for c in campaign.kept(tmp_path, plan(batch_size=("4", "8")), shared)] == [
        "numerics=bf16,batch_size=4"
    ]
    with pytest.raises(ConfigError, match=r"cells of another study: max_new_tokens 96 -> 5") as refused:
        campaign.kept(tmp_path, plan(batch_size=("4",)), {**shared, "max_new_tokens": 5})
    assert "--out" in refused.value.fix


def test_merged_cells_may_name_their_model_s_place_otherwise_and_nothing_else() -> None:
    here, there = (replace(cell("bf16", SAME), asked={"model": m, "samples": 0}) for m in ("/a/m", "/b/m"))
    campaign.of_one_study([here, there])
    with pytest.raises(ConfigError, match="cells of different studies: samples 0 -> 4"):
        campaign.of_one_study([here, replace(there, asked={"model": "/b/m", "samples": 4})])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells a process's peak")
def test_the_peak_is_this_process_s_own() -> None:
    before = probe.peak_memory()["resident"]
    block = bytearray(os.urandom(1)) * (before + 2**26)
    assert probe.peak_memory()["resident"] > before + 2**25
    del block
    assert probe.peak_memory()["resident"] > before + 2**25, "a peak stays"
