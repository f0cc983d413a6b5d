"""The real model and the shipped goldens, which transformers recorded, on vLLM: offline, and through its server."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_repro import models, suite
from tests.e2e.test_real_model import FEW, SUITE, Run
from tests.engines.serving import served

pytestmark = pytest.mark.real_model

CHECK = ("--repro-check", "golden/word-problems", "--repro-only", *FEW)


@pytest.fixture(scope="module")
def model() -> models.ModelFiles:
    return models.resolve(suite.load(SUITE).model, SUITE)


def test_layercast_in_vllm_passes_against_the_fp32_golden(model: models.ModelFiles, tmp_path: Path) -> None:
    run = Run(tmp_path, *CHECK, "--repro-engine", "vllm", "--repro-numerics", "layercast")
    assert run.rc == 0, run.output
    assert run.verdicts <= {"identical", "waived"}
    assert run.suite["observed_compute"] == "fp32"
    assert "engine" in run.suspects


def test_bf16_in_vllm_flips_near_ties_and_nothing_else(model: models.ModelFiles, tmp_path: Path) -> None:
    run = Run(tmp_path, *CHECK, "--repro-engine", "vllm", "--repro-numerics", "bf16", "--repro-method", "replay")
    assert run.rc == 0, run.output
    assert run.verdicts == {"identical", "near_tie"}
    assert run.suite["observed_compute"] == "bf16"
    assert "engine" in run.suspects


def test_a_server_in_fp32_passes_and_its_numerics_stay_a_claim(model: models.ModelFiles, tmp_path: Path) -> None:
    with served(model.path, tmp_path, "--dtype", "float32") as url:
        run = Run(
            tmp_path, *CHECK, "--repro-engine", "openai", "--repro-engine-option", f"base_url={url}",
            "--repro-numerics", "fp32",
        )  # fmt: skip
    assert run.rc == 0, run.output
    assert run.verdicts == {"identical"}
    assert run.suite["observed_compute"] == "unknown"
    assert "engine" in run.suspects
    assert any("not checked, since the engine cannot see it: model.weights" in note for note in run.suite["notes"])
