"""`pytest-repro calibrate` where another instruction set really moves a model's numbers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.engines.tiny import build

from .project import Project

RECORDED = {"OMP_NUM_THREADS": "1"}
OTHER = {**RECORDED, "ATEN_CPU_CAPABILITY": "default"}
"""The same processor as if it had no vector instructions: other kernels of torch's."""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A golden of real tokens in float32, accepted."""
    root = tmp_path_factory.mktemp("calibrate")
    names = [f"p{i}" for i in range(8)]
    made = Project(root).suite(
        {name: [1] for name in names}, suite={"model": str(build(root / "model")), "engine": "transformers"},
        generation={"max_new_tokens": 24, "batch_size": 4}, run={"numerics": ["fp32"]}, engine=None,
    )  # fmt: skip
    asked = {name: "Hello there, how are you today?" + " and so on" * i for i, name in enumerate(names)}
    made.write("golden/demo/prompts.jsonl", "".join(json.dumps({"id": k, "prompt": v}) + "\n" for k, v in asked.items()))  # fmt: skip
    recorded = made.pytest("--repro-update", "golden", **RECORDED)
    assert recorded.rc == 0, recorded.text
    return made.accept()


def checked(project: Project, *args: str, **env: str) -> tuple[dict[str, Any], list[str]]:
    (project.root / "report.json").unlink(missing_ok=True)
    project.check("--repro-report-json", "report.json", *args, **env)
    (suite,) = project.json()["suites"]
    return suite, next(c["message"].split("\n") for c in suite["checks"] if c["name"] == "rounding")


def test_another_instruction_set_is_measured_and_judged_by_its_own_rounding(project: Project) -> None:
    before, said = checked(project, **OTHER)
    assert (
        "10 and not 4, since cpu_capability, env.ATEN_CPU_CAPABILITY differ" in said[1] and before["calibrated"] == []
    )

    done = project.cli("calibrate", "golden/demo", "--as-json", **OTHER)
    assert done.rc == 0, done.text
    found = json.loads(done.out)
    assert {change["field"] for change in found["differs"]} == {"cpu_capability", "env.ATEN_CPU_CAPABILITY"}
    assert found["moved"]["gap_level"]["median"] < 4
    project.accept("runners without vector instructions")

    after, said = checked(project, **OTHER)
    assert (
        after["verdict"] == "pass"
        and "beyond 4" in said[0]
        and said[1].startswith("rounding measured here by calibrate on")
    )
    (day,) = after["calibrated"]
    assert said[1].endswith(day) and after["envelope_diff"] == []
    assert {c["field"] for c in after["environment_diff"] if c["cls"] == "numerics"} == {"cpu_capability", "env.ATEN_CPU_CAPABILITY"}  # fmt: skip
    assert [p["benign_dgap"] for p in after["prompts"]] != [p["benign_dgap"] for p in before["prompts"]]

    layercast, said = checked(project, "--repro-numerics", "layercast", **OTHER)
    assert layercast["calibrated"] == [] and "10 and not 4, since " in said[1], "its product is another kernel yet"
    assert "pytest-repro calibrate" not in said[1], "which refuses it: the mode is precision"
    refused = project.cli("calibrate", "golden/demo", "--numerics", "layercast", **OTHER)
    assert refused.rc == 2 and "precision itself differs" in refused.err and "--numerics fp32" in refused.err

    at_home, said = checked(project, **RECORDED)
    assert at_home["verdict"] == "pass" and at_home["calibrated"] == [] and len(said) == 1


def test_what_the_recording_measured_is_not_calibrated(project: Project) -> None:
    done = project.cli("calibrate", "golden/demo", "--engine-option", "attention=eager", **RECORDED)
    assert done.rc == 2 and "there is nothing to calibrate" in done.err


def test_other_weights_are_no_machine(project: Project) -> None:
    done = project.cli("calibrate", "golden/demo", "--engine-option", "round_weights=8", **OTHER)
    assert (
        done.rc == 2 and "precision itself differs, which is no rounding of a machine: engine.round_weights" in done.err
    )
