"""The promise, on the real SmolLM2-135M-Instruct and the shipped goldens: a few prompts of each, as users would run them.

The whole suite passes in README's first command, which CI runs word for word.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from safetensors.torch import load_file, save_file
from torch import Tensor, int16

from pytest_repro import models, suite

from .browser import SIGHTS, Browser

ROOT = Path(__file__).parents[2]
SUITE = ROOT / "golden" / "word-problems"
SCHEMA = json.loads((ROOT / "pytest_repro" / "schemas" / "report.schema.json").read_text())
FEW = ("-k", "p01 or p02 or p03 or p04 or p05 or p06 or p07 or p08")
REPLAYED = ("--repro-check", "golden/word-problems", "--repro-numerics", "bf16", "--repro-method", "replay", *FEW)

pytestmark = pytest.mark.real_model


@pytest.fixture(scope="module")
def model() -> models.ModelFiles:
    """Fetched and converted by whoever comes first."""
    return models.resolve(suite.load(SUITE).model, SUITE)


class Run:
    """One pytest process on the shipped suite, with its report."""

    def __init__(self, folder: Path, *arguments: str, root: Path = ROOT, **environment: str) -> None:
        self.folder = folder
        report = folder / "report.json"
        report.unlink(missing_ok=True)
        clean = {k: v for k, v in os.environ.items() if k != "CI"}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments, f"--repro-report-json={report}"],
            cwd=root, env={**clean, **environment}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        self.rc, self.output = done.returncode, done.stdout + done.stderr
        self.report: dict[str, Any] = json.loads(report.read_text())
        Draft202012Validator(SCHEMA).validate(self.report)
        self.suite: dict[str, Any] = self.report["suites"][0] if self.report["suites"] else {}

    @property
    def verdicts(self) -> set[str]:
        return {p["verdict"] for p in self.suite["prompts"]}

    @property
    def suspects(self) -> list[str]:
        return [c["field"] for c in self.suite["environment_diff"] if c["cls"] == "numerics"]


@pytest.fixture(scope="module")
def scaled(model: models.ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the model with one layer's output off by two per cent: a small real bug."""
    return times(0.98, model, tmp_path_factory.mktemp("scaled") / "model")


@pytest.fixture(scope="module")
def halved(model: models.ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy whose bug is large enough to be seen in 16 bits."""
    return times(0.5, model, tmp_path_factory.mktemp("halved") / "model")


@pytest.fixture(scope="module")
def quantised(model: models.ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy whose layers' weights were rounded to 9 bits, a scale for each row, and are stored as before."""

    def rounded(name: str, weight: Tensor) -> Tensor:
        if "layers" not in name or weight.ndim != 2:
            return weight
        scale = weight.float().abs().amax(-1, keepdim=True) / 255
        return (weight.float() / scale).round() * scale

    return changed(rounded, model, tmp_path_factory.mktemp("quantised") / "model")


def times(factor: float, model: models.ModelFiles, folder: Path) -> Path:
    scaled = "model.layers.15.mlp.down_proj.weight"
    return changed(lambda name, weight: weight.float() * factor if name == scaled else weight, model, folder)


def changed(change: Callable[[str, Tensor], Tensor], model: models.ModelFiles, folder: Path) -> Path:
    shutil.copytree(model.path, folder)
    tensors = {
        name: change(name, tensor).to(tensor.dtype).contiguous()
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def moved(model: models.ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """bf16 at batch size 1 against the golden recorded at batch size 8, reported as HTML too."""
    folder = tmp_path_factory.mktemp("moved")
    return Run(
        folder, "--repro-check", "golden/word-problems", "--repro-numerics", "bf16", "--repro-batch-size", "1",
        "--repro-method", "decode", "--repro-threshold", "max_divergent=0",
        f"--repro-report-html={folder / 'report.html'}", *FEW,
    )  # fmt: skip


def test_bf16_at_another_batch_size_flips_near_ties_and_nothing_else(moved: Run) -> None:
    run = moved
    near = [p for p in run.suite["prompts"] if p["verdict"] == "near_tie"]
    assert run.rc == 1
    assert len(near) >= 2
    assert "drift" not in run.verdicts
    assert run.suspects[0] == "batch_size"
    assert all(p["deficit"] is not None and p["golden_gap"] is not None and p["divergence_index"] >= 0 for p in near)
    assert "--repro-batch-size 1 --repro-numerics fp32   # FP32 (or LayerCast) removes" in run.output


@pytest.mark.parametrize(("width", "scheme"), SIGHTS)
def test_its_report_reads_well(moved: Run, browser: Browser, width: int, scheme: str) -> None:
    file = moved.folder / "report.html"
    assert file.stat().st_size < 2_000_000
    browser.open_file(file, width=width, scheme=scheme)
    browser.first_divergence_is_seen(width)
    browser.open_all()
    browser.quiet()
    browser.accessible()


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        (("--repro-batch-size", "4", "--repro-method", "decode"), {}),
        (("--repro-method", "replay"), {"ATEN_CPU_CAPABILITY": "avx2"}),
        (("--repro-method", "replay"), {"OMP_NUM_THREADS": "1"}),
    ],
    ids=["batch size 4", "AVX2", "one thread"],
)
def test_fp32_holds_where_numerics_change(
    model: models.ModelFiles, tmp_path: Path, arguments: tuple[str, ...], environment: dict[str, str]
) -> None:
    run = Run(
        tmp_path, "--repro-check", "golden/word-problems", "--repro-numerics", "fp32", *arguments, *FEW, **environment
    )
    assert run.rc == 0, run.output
    assert run.verdicts <= {"identical", "waived"}
    assert run.suite["observed_compute"] == "fp32"
    assert run.suspects != []


def test_layercast_passes_against_the_fp32_golden(model: models.ModelFiles, tmp_path: Path) -> None:
    run = Run(tmp_path, "--repro-check", "golden/word-problems", "--repro-numerics", "layercast", *FEW)
    assert run.rc == 0, run.output
    assert run.verdicts <= {"identical", "waived"}
    assert run.suite["observed_compute"] == "fp32"
    assert run.suite["golden"]["name"] == "fp32"
    assert run.suspects[:2] == ["numerics", "quantization"]
    assert run.suite["metrics"]["mean_abs_dlogp"] < 10 * run.suite["metrics"]["benign_abs_dlogp"]


def test_the_arbiter_tells_other_weights_from_rounding(model: models.ModelFiles, halved: Path, tmp_path: Path) -> None:
    run = Run(
        tmp_path, "--repro-check", "golden/word-problems", "--repro-numerics", "bf16", "--repro-model", str(halved),
        "--repro-allow-changed", "model", "--repro-method", "replay", *FEW,
    )  # fmt: skip
    assert run.rc == 1
    drifting = [p for p in run.suite["prompts"] if p["verdict"] == "drift"]
    assert drifting
    assert {p["arbiter"]["finding"] for p in drifting} == {"golden"}
    assert "the golden lies farther, so the model itself changed" in run.output


def test_a_small_real_bug_is_another_model_and_if_allowed_drift(scaled: Path, tmp_path: Path) -> None:
    check = ("--repro-check", "golden/word-problems", "--repro-numerics", "fp32", "--repro-model", str(scaled))
    run = Run(tmp_path, *check, *FEW)
    assert run.rc == 1
    assert run.verdicts == {"incomparable"}
    assert "model.weights differ" in run.output
    run = Run(tmp_path, *check, "--repro-allow-changed", "model", "--repro-method", "replay", *FEW)
    assert run.rc == 1
    assert run.verdicts == {"drift"}
    flipped = [p for p in run.suite["prompts"] if p["divergence_index"] is not None]
    assert len(flipped) < len(run.suite["prompts"])
    assert run.suite["metrics"]["mean_abs_dlogp"] > 100 * run.suite["metrics"]["benign_abs_dlogp"]
    assert run.suite["localisation"]["module"] == "model.layers.15.mlp.down_proj"


@pytest.fixture(scope="module")
def calibrated(model: models.ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the shipped suite, which knows this machine's rounding in bf16: calibrated here, where it did not."""
    root = tmp_path_factory.mktemp("calibrated")
    shutil.copytree(SUITE, root / "golden" / "word-problems")
    if "pytest-repro calibrate" in Run(root, *REPLAYED, root=root).output:
        for command in (("calibrate", "golden/word-problems", "--numerics", "bf16"), ("accept", "--all", "-r", "here")):
            subprocess.run([sys.executable, "-m", "pytest_repro.cli", *command], cwd=root, check=True)
    return root


def test_weights_of_9_bits_show_in_the_suite_where_no_prompt_shows_them(
    quantised: Path, calibrated: Path, tmp_path: Path
) -> None:
    other = ("--repro-model", str(quantised), "--repro-allow-changed", "model")
    run = Run(tmp_path, *REPLAYED, *other, root=calibrated)
    assert run.rc == 1
    assert run.verdicts <= {"identical", "near_tie"}, "to each prompt alone it looks like rounding"
    assert [c["name"] for c in run.suite["checks"] if c["status"] == "fail"] == ["rounding"]
    assert run.suite["metrics"]["rounding_ratio"] > 1.2
    assert "more than rounding moves them" in run.output
    run = Run(tmp_path, *REPLAYED, root=calibrated, OMP_NUM_THREADS="1")
    assert run.rc == 0, run.output
    assert 0.8 < run.suite["metrics"]["rounding_ratio"] < 1.1


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        (("--repro-batch-size", "16", "--repro-method", "decode"), {"OMP_NUM_THREADS": "1"}),
        (("--repro-batch-size", "1", "--repro-method", "replay"), {"ATEN_CPU_CAPABILITY": "avx2"}),
    ],
    ids=["batch size 16 decoded on one thread", "batch size 1 replayed with AVX2"],
)
def test_an_exact_golden_holds_bit_for_bit_where_numerics_change(
    model: models.ModelFiles, tmp_path: Path, arguments: tuple[str, ...], environment: dict[str, str]
) -> None:
    run = Run(
        tmp_path, "--repro-check", "golden/word-problems", "--repro-numerics", "exact", *arguments, *FEW, **environment
    )
    assert run.rc == 0, run.output
    assert run.verdicts == {"identical"}
    assert run.suite["observed_compute"] == "exact"
    assert run.suite["metrics"]["mean_abs_dlogp"] == 0
    assert run.suspects != []


def test_the_lowest_bit_of_one_weight_shows_in_exact(model: models.ModelFiles, tmp_path: Path) -> None:
    other = changed(one_bit, model, tmp_path / "model")
    run = Run(
        tmp_path, "--repro-check", "golden/word-problems", "--repro-numerics", "exact", "--repro-model", str(other),
        "--repro-allow-changed", "model", "--repro-method", "replay", *FEW,
    )  # fmt: skip
    assert run.rc == 1
    assert run.verdicts == {"drift"}
    assert run.suite["localisation"]["module"] == "model.layers.15.mlp.down_proj"


def one_bit(name: str, weight: Tensor) -> Tensor:
    """The lowest bit of the mantissa of one weight, the largest of its row, turned over."""
    if name != "model.layers.15.mlp.down_proj.weight":
        return weight
    bits = weight.clone()
    place = int(weight[0].abs().argmax())
    bits[0, place : place + 1].view(int16).bitwise_xor_(1)
    return bits


def test_bf16_compute_is_never_taken_for_an_fp32_golden(model: models.ModelFiles, tmp_path: Path) -> None:
    run = Run(
        tmp_path, "--repro-check", "golden/word-problems", "--repro-numerics", "bf16", "--repro-golden", "fp32",
        "--repro-method", "replay", *FEW,
    )  # fmt: skip
    assert run.rc == 1
    assert run.verdicts <= {"near_tie", "drift"}
    assert run.suspects[0] == "compute_class"


def test_record_accept_check_edit(model: models.ModelFiles, tmp_path: Path) -> None:
    """The life of a golden of one's own, on a folder of one's own."""
    folder = tmp_path / "golden" / "mine"
    folder.mkdir(parents=True)
    (folder / "prompts.jsonl").write_text(
        '{"id": "a", "prompt": "What is 2 + 3?", "answer": "5"}\n{"id": "b", "prompt": "Say hello."}\n'
    )
    (folder / "suite.toml").write_text(
        f'[suite]\nname = "mine"\nmodel = "{model.path}"\nprompts = "prompts.jsonl"\n'
        '[generation]\nmax_new_tokens = 12\nbatch_size = 2\n[run]\nnumerics = ["bf16"]\n'
    )
    recorded = Run(tmp_path, "--repro-update", "golden", root=tmp_path)
    assert recorded.rc == 0, recorded.output
    assert recorded.report["recordings"][0]["golden"] == "bf16.pending.jsonl"
    assert Run(tmp_path, "--repro-check", "golden", root=tmp_path).rc == 1
    accepted = subprocess.run(
        [sys.executable, "-m", "pytest_repro.cli", "accept", "--all", "--reason", "read"], cwd=tmp_path, check=False
    )
    assert accepted.returncode == 0
    checked = Run(tmp_path, "--repro-check", "golden", root=tmp_path)
    assert checked.rc == 0, checked.output
    assert checked.verdicts == {"identical"}
    text = folder / "bf16.golden.jsonl"
    text.write_text(text.read_text().replace('"score": null', '"score": true'))
    edited = Run(tmp_path, "--repro-check", "golden", root=tmp_path)
    assert edited.rc == 1
    assert "was edited by hand" in edited.output


def test_from_nothing_to_a_checked_golden(model: models.ModelFiles, tmp_path: Path) -> None:
    """What a newcomer does: a file of questions, one command that records, and a check."""
    questions = [json.loads(line) for line in (SUITE / "prompts.jsonl").read_text("utf-8").splitlines()[:3]]
    rows = [{"question": q["prompt"], "answer": f"Worked out.\n#### {q['answer']}"} for q in questions]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        clean = {k: v for k, v in os.environ.items() if k != "CI"}
        return subprocess.run(
            [sys.executable, "-m", *arguments], cwd=tmp_path, env=clean, capture_output=True, text=True, check=False
        )

    made = command(
        "pytest_repro.cli", "init", "golden/mine", "--model", suite.load(SUITE).model, "--prompts", "mine.jsonl",
        "--numerics", "fp32", "--max-new-tokens", "8", "--limit", "2", "--record",
    )  # fmt: skip
    assert made.returncode == 0, made.stdout + made.stderr
    assert "recorded  2 prompts as fp32.pending.jsonl" in made.stdout
    assert 'golden: "golden/mine"' in made.stdout
    accepted = command("pytest_repro.cli", "accept", "golden/mine", "--all", "--reason", "read")
    assert accepted.returncode == 0, accepted.stderr
    checked = Run(tmp_path, "--repro-check", "golden/mine", root=tmp_path)
    assert checked.rc == 0, checked.output
    assert checked.verdicts == {"identical"}
