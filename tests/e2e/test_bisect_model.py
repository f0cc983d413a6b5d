"""`pytest-repro bisect` where batch size, threads, instruction set, attention kernel and numerics really move tokens.

The model has two of every token, which rounding alone chooses between, so that float32's own last bits decide.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.engines.tiny import near_ties

from .project import Project

RECORDED = {"OMP_NUM_THREADS": "1"}
"""The environment of the golden; batches of 4, torch's own attention, float32."""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A golden of real tokens, accepted."""
    root = tmp_path_factory.mktemp("bisect")
    names = [f"p{i}" for i in range(8)]
    made = Project(root).suite(
        {name: [1] for name in names},
        suite={"model": str(near_ties(root / "model")), "engine": "transformers"},
        generation={"max_new_tokens": 32, "batch_size": 4}, run={"numerics": ["fp32"]}, engine=None,
    )  # fmt: skip
    asked = {name: "Hello there, how are you today?" + " and so on" * i for i, name in enumerate(names)}
    made.write(
        "golden/demo/prompts.jsonl", "".join(json.dumps({"id": k, "prompt": v}) + "\n" for k, v in asked.items())
    )
    recorded = made.pytest("--repro-update", "golden", **RECORDED)
    assert recorded.rc == 0, recorded.text
    return made.accept()


def bisected(project: Project, *args: str, **env: str) -> dict[str, Any]:
    done = project.cli("bisect", "golden/demo", "--as-json", *args, **{**RECORDED, **env})
    assert done.rc == 0, done.text
    found: dict[str, Any] = json.loads(done.out)
    assert found["verdict"] == "found" and found["fixed"] == []
    return found


@pytest.mark.parametrize(
    ("knob", "arguments", "environment"),
    [
        ("batch size", ("--batch-size", "1"), {}),
        ("threads", (), {"OMP_NUM_THREADS": "2"}),
        ("instruction set", (), {"ATEN_CPU_CAPABILITY": "default"}),
        ("attention kernel", ("--engine-option", "attention=eager"), {}),
        ("numerics", ("--numerics", "bf16", "--golden", "fp32"), {}),
    ],
)
def test_what_alone_was_changed_is_named(
    project: Project, knob: str, arguments: tuple[str, ...], environment: dict[str, str]
) -> None:
    found = bisected(project, *arguments, **environment)
    assert found["sets"] == [[knob]]
    assert [row["knob"] for row in found["undoable"]] == [knob]
    (trial,) = found["trials"]
    assert trial["holds"] and trial["remaining"] == [] and set(trial["parted"].values()) == {None}


def test_a_pair_is_named_where_neither_alone_restores(project: Project) -> None:
    found = bisected(project, "--batch-size", "1", "--engine-option", "attention=eager")
    assert found["sets"] == [["batch size", "attention kernel"]]
    together, *alone = found["trials"]
    assert together["undone"] == ["batch size", "attention kernel"] and together["holds"]
    assert [trial["undone"] for trial in alone] == [["batch size"], ["attention kernel"]]
    for trial in alone:
        assert not trial["holds"] and trial["error"] == "" and trial["refused"] == [] and trial["strayed"] == []
        assert any(at is not None for at in trial["parted"].values())
