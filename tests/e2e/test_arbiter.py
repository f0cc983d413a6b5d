"""Drift of a 16-bit run beside the FP32 answer of the same weights, as a user sees it."""

from __future__ import annotations

import json

import pytest

from .project import Project

LENGTH = 32
TOKENS = {name: list(range(LENGTH)) for name in ("near", "farther", "nearer", "still")}
FP32 = {"near": -0.3, "farther": -0.12, "nearer": -0.48, "still": -0.1}
"""The golden's log-probabilities are -0.1 and the candidate's -0.5: what lies between decides."""


@pytest.fixture
def drifting(project: Project) -> Project:
    engine = {"script": "script.jsonl", "fp32": "fp32.jsonl", "jitter": 0.1}
    project.suite(TOKENS, generation={"max_new_tokens": LENGTH, "batch_size": 2}, engine=engine)
    rows = [{**project.rows[name], "logprob": [level] * LENGTH} for name, level in FP32.items()]
    project.write("golden/demo/fp32.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    project.update().accept()
    return project.script(**{name: {"logprob": [-0.5] * LENGTH} for name in TOKENS if name != "still"})


def test_each_drift_is_explained_and_none_is_excused(drifting: Project) -> None:
    result = drifting.check("--repro-report-json=report.json")
    (suite,) = drifting.json()["suites"]
    assert result.rc == 1
    assert {p["id"]: p["verdict"] for p in suite["prompts"]} == {**dict.fromkeys(TOKENS, "drift"), "still": "identical"}
    findings = {p["id"]: p["arbiter"] and p["arbiter"]["finding"] for p in suite["prompts"]}
    assert findings == {"near": "rounding", "farther": "candidate", "nearer": "golden", "still": None}
    assert "equally near, as rounding leaves them" in result.out
    assert "now lies farther, so this build's compute changed" in result.out
    assert "the golden lies farther, so the model itself changed" in result.out
    assert "arbiter: 3 drifting prompts replayed under LayerCast" in result.out


def test_it_can_be_left_out(drifting: Project) -> None:
    result = drifting.check("--repro-arbiter", "off", "--repro-report-json=report.json")
    assert result.rc == 1
    assert all(p["arbiter"] is None for p in drifting.json()["suites"][0]["prompts"])
    assert "arbiter" not in result.out


def test_an_fp32_run_has_no_arbiter(drifting: Project) -> None:
    result = drifting.check("--repro-numerics", "fp32", "--repro-golden", "bf16")
    assert result.rc == 1
    assert "arbiter" not in result.out


def test_decoding_alone_is_arbitrated_as_well(drifting: Project) -> None:
    """No token flips here: every token moved, which decoding sees too."""
    drifting.check("--repro-method", "decode", "--repro-report-json=report.json")
    prompts = drifting.json()["suites"][0]["prompts"]
    findings = {p["id"]: p["arbiter"] and p["arbiter"]["finding"] for p in prompts}
    assert findings == {"near": "rounding", "farther": "candidate", "nearer": "golden", "still": None}


def test_a_golden_of_another_class_is_not_arbitrated(drifting: Project) -> None:
    result = drifting.check("--repro-numerics", "fp16", "--repro-golden", "bf16")
    assert result.rc == 1
    assert "arbiter" not in result.out


def test_a_script_for_the_arbiter_stays_inside_the_suite(drifting: Project) -> None:
    toml = (drifting.folder / "suite.toml").read_text().replace('fp32 = "fp32.jsonl"', 'fp32 = "../../elsewhere.jsonl"')
    drifting.write("golden/demo/suite.toml", toml)
    result = drifting.check()
    assert result.rc == 1
    assert "[engine.fp32]" in result.text and "Traceback" not in result.text
