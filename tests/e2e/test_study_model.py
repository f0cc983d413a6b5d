"""`pytest-repro study` where settings really move a model's outputs, and where they cannot."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engines.tiny import build, near_ties

from .project import Project

ROOT = Path(__file__).parents[2]
PROMPTS = {f"p{i}": "Hello there, how are you today?" + " and so on" * i for i in range(6)}


def asked(root: Path, model: Path, *, tokens: int = 24) -> Project:
    """A suite of six prompts of different lengths for a model on disk."""
    made = Project(root).suite(
        {name: [1] for name in PROMPTS}, suite={"model": str(model), "engine": "transformers"},
        generation={"max_new_tokens": tokens, "batch_size": 3}, run={"numerics": ["fp32"]}, engine=None,
    )  # fmt: skip
    lines = [json.dumps({"id": k, "prompt": v, "answer": "7"}) + "\n" for k, v in PROMPTS.items()]
    return made.write("golden/demo/prompts.jsonl", "".join(lines))


def heads(project: Project) -> dict[str, dict[str, Any]]:
    """Cell -> its header."""
    folder = project.root / "demo.study" / "cells"
    return {path.stem: json.loads(path.read_text().splitlines()[0]) for path in sorted(folder.glob("*.jsonl"))}


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A model whose tokens come in pairs that the last bit of a sum chooses between, over two batch sizes and instruction sets."""
    root = tmp_path_factory.mktemp("study")
    project = asked(root, near_ties(root / "model"))
    done = project.cli("study", "golden/demo", "--axis", "batch_size=1,3", "--axis", "isa=default,avx2", "--jobs", "2")
    assert done.rc == 0, done.text
    return project


def test_settings_were_in_force_in_the_process_that_decoded(tied: Project) -> None:
    found = heads(tied)
    assert len(found) == 4
    for head in found.values():
        facts = head["environment"]
        assert facts["cpu_capability"].lower() == head["setting"]["isa"]
        assert str(facts["batch_size"]) == head["setting"]["batch_size"]
        assert head["observed"]["compute_class"] == "fp32" and head["memory"]["resident"] > 2**26


def test_rounding_chose_between_ties_and_the_tables_say_so(tied: Project) -> None:
    found = tied.json("demo.study/study.json")
    (fp32,) = found["precisions"]
    measured = fp32["dispersion"]
    assert measured["diverging"] > 0 and 0 <= measured["mean_div_index"] < 24
    assert 0 < measured["std_top1_prob"] < 1e-5, "up to the first tie the numbers differ by rounding alone"
    assert fp32["diverged_by"][-1] == 100 * measured["diverging"] / 6
    assert {e["axis"] for e in found["effects"]} == {"batch_size", "isa"}
    assert found["cautions"] == [], "what an axis sets is no surprise"


def test_sampling_is_seeded_and_leaves_the_greedy_run_alone(tmp_path: Path) -> None:
    project = asked(tmp_path, build(tmp_path / "model"), tokens=8)
    arguments = (
        "study",
        "golden/demo",
        "--axis",
        "numerics=fp32",
        "--samples",
        "2",
        "--temperature",
        "1",
        "--seed",
        "5",
    )
    rows: list[list[dict[str, Any]]] = []
    for out in ("one", "two"):
        done = project.cli(*arguments, "--out", out)
        assert done.rc == 0, done.text
        lines = (project.root / out / "cells" / "numerics=fp32.jsonl").read_text().splitlines()[1:]
        rows.append([json.loads(line) for line in lines])
    assert rows[0] == rows[1], "the same seed draws the same"
    drawn = [[sample["tokens"] for sample in row["samples"]] for row in rows[0]]
    assert all(first != second for first, second in drawn), "every run draws anew"
    assert all(row["tokens"] not in samples for row, samples in zip(rows[0], drawn, strict=True)), (
        "and not the likeliest"
    )
    assert project.json("one/study.json")["precisions"][0]["pass_at_1"]["runs"] == 2
    other = project.cli(*arguments[:-1], "6", "--out", "one")
    assert other.rc == 4 and "seed 5 -> 6" in other.err


@pytest.mark.real_model
def test_the_real_model_in_bf16_is_moved_by_its_batch(tmp_path: Path) -> None:
    """Two cells of four of the shipped prompts."""
    suite = tmp_path / "few"
    suite.mkdir()
    shipped = ROOT / "golden" / "word-problems"
    (suite / "suite.toml").write_text((shipped / "suite.toml").read_text())
    (suite / "prompts.jsonl").write_text("".join((shipped / "prompts.jsonl").read_text().splitlines(keepends=True)[:4]))
    done = subprocess.run(
        [sys.executable, "-m", "pytest_repro.cli", "study", str(suite), "--axis", "numerics=bf16", "--axis", "batch_size=1,4",
         "--max-new-tokens", "48", "--out", str(tmp_path / "out"), "--as-json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (bf16,) = json.loads(done.stdout)["precisions"]
    assert bf16["done"] == 2 and bf16["cost"]["slowest"] > 0
    assert 1e-4 < bf16["dispersion"]["std_top1_prob"] < 1e-1, "bf16's own rounding"
