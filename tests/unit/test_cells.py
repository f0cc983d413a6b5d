"""The wire format of a study's raw data."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from pytest_repro import cells
from pytest_repro.cells import Cell, Row, Sample
from pytest_repro.errors import ConfigError

ROW = Row(
    "p1", "sha256:00", np.array([5, 6, 0], np.int32), np.array([-0.1, np.nan, -1e-7], np.float32), "two \u202e words", "stop", True,
    (Sample(np.array([7], np.int32), False), Sample(np.array([], np.int32), True)),
)  # fmt: skip
CELL = Cell(
    {"numerics": "bf16", "batch_size": "4"}, {"prompts": "sha256:11", "max_new_tokens": 8}, "done", rows=(ROW,),
    environment={"threads": 2, "torch": "2.13.0", "device": "cpu", "cpu_model": "Some CPU"}, observed={"compute_class": "bf16"},
    seconds=1.5, wall_seconds=4.25, memory={"resident": 2**30}, jobs=2,
)  # fmt: skip


def test_what_is_written_is_read_bit_for_bit() -> None:
    again = cells.decode(cells.encode(CELL), "x.jsonl")
    (row,) = again.rows
    assert row.logprob.tobytes() == ROW.logprob.tobytes() and row.tokens.tolist() == [5, 6, 0]
    assert (row.text, row.right, row.finish_reason) == (ROW.text, True, "stop")
    assert [(s.tokens.tolist(), s.right) for s in row.samples] == [([7], False), ([], True)]
    assert cells.encode(again) == cells.encode(CELL)
    assert again.name == "numerics=bf16,batch_size=4" and again.machine == "Some CPU"
    assert again.tokens_per_second == 2.0


def test_the_file_is_ascii_json_lines() -> None:
    lines = cells.encode(CELL).decode("ascii").splitlines()
    assert len(lines) == 2 and json.loads(lines[1])["logprob"][1] is None


def damaged(change: Any) -> bytes:
    lines = [json.loads(line) for line in cells.encode(CELL).splitlines()]
    change(lines)
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "lines are missing"),
        (cells.encode(CELL).splitlines(keepends=True)[0], "lines are missing"),
        (cells.encode(CELL)[:-40], "not JSON Lines"),
        (b"\xff\xfe", "not JSON Lines"),
        (damaged(lambda lines: lines[0].update(schema=2)), "x.jsonl:1: 2 is not allowed here: const 1 (schema)"),
        (damaged(lambda lines: lines[0]["setting"].update(evil="1")), "x.jsonl:1: unknown key 'evil'"),
        (damaged(lambda lines: lines[0]["setting"].update(numerics="../x")), "(setting.numerics)"),
        (damaged(lambda lines: lines[0]["setting"].pop("numerics")), "'numerics' is a required property"),
        (
            damaged(lambda lines: lines[1].update(tokens=[1.5])),
            "x.jsonl:2: 1.5 is not allowed here: type integer (tokens.0)",
        ),
        (damaged(lambda lines: lines[1].update(tokens=[2**40])), "x.jsonl:2"),
        (damaged(lambda lines: lines[1]["tokens"].pop()), "tokens and logprob differ in length"),
        (damaged(lambda lines: lines[0]["asked"].update(max_new_tokens="many")), "(asked.max_new_tokens)"),
        (damaged(lambda lines: (lines[0].update(prompts=0), lines.__delitem__(slice(1, None)))), "has prompts"),
        (
            damaged(lambda x: (x[0].update(prompts=2), x.append({k: v for k, v in x[1].items() if k != "samples"}))),
            "unequally often",
        ),
        (damaged(lambda lines: lines[1].update(logprob=[float("nan")] * 3)), "x.jsonl:2"),
    ],
)
def test_a_damaged_file_is_told_with_its_place_and_what_mends_it(data: bytes, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        cells.decode(data, "x.jsonl")
    assert said in str(refused.value) and "rm x.jsonl" in refused.value.fix


def test_what_was_asked_otherwise_is_named() -> None:
    assert cells.differing(CELL.asked, {"prompts": "sha256:11", "max_new_tokens": 9, "samples": 4}) == [
        "max_new_tokens 8 -> 9", "samples (not there) -> 4",
    ]  # fmt: skip
