"""Goldens of class `exact` on the transformers engine: recorded, checked bit for bit, and what one flipped bit does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pytest_repro import asking, evidence, gate, recording, store, suite
from pytest_repro.engines.base import Spec, opener
from pytest_repro.errors import ConfigError, EngineError, GoldenMissing
from pytest_repro.generation import Request
from pytest_repro.models import resolve
from pytest_repro.numerics import mode
from pytest_repro.numerics.exact import operations
from pytest_repro.result import SuiteResult
from pytest_repro.suite import Prompt
from pytest_repro.verdict import Verdict

from .families import switches
from .tiny import build

NAMES = [f"p{i}" for i in range(9)]
TOML = """
[suite]
name = "demo"
model = "./model"
engine = "transformers"
prompts = "prompts.jsonl"
[generation]
max_new_tokens = 12
batch_size = 4
[run]
numerics = ["exact"]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A suite with an accepted golden."""
    made = tmp_path_factory.mktemp("exact") / "demo"
    build(made / "model")
    (made / "suite.toml").write_text(TOML)
    rows = [{"id": name, "prompt": "Hello there" + " and so on" * i} for i, name in enumerate(NAMES)]
    (made / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recording.record(suite.load(made), "exact", asking.Options())
    store.accept(store.Place(made, "exact", store.PENDING), store.Reviewer("Ada", "a test's own"))
    return made


def checked(folder: Path, **options: Any) -> SuiteResult:
    return gate.check(suite.load(folder), "exact", asking.Options(**options))


def copied(folder: Path, to: Path) -> Path:
    for file in folder.rglob("*"):
        if file.is_file():
            (to / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (to / file.relative_to(folder)).write_bytes(file.read_bytes())
    return to


def test_a_golden_of_class_exact_has_no_noise(folder: Path) -> None:
    recorded = store.Place(folder, "exact").read()
    assert recorded.compute_class == "exact"
    assert recorded.fingerprint["attention"] == "exact"
    assert recorded.fingerprint["dtype"] == "bfloat16"
    assert recorded.fingerprint["kv_cache_dtype"] == "float32"
    assert {v.name for v in recorded.noise.variants} >= {"replay", "replay, batch size 1"}
    assert all(v.max_abs_dlogp == v.max_abs_dgap == v.max_deficit == 0 for v in recorded.noise.variants)
    assert recorded.sketch is not None
    assert recorded.sketch.repeatable
    assert not recorded.sketch.level.any()


@pytest.mark.parametrize("method", ["auto", "replay", "decode"])
def test_the_same_model_is_identical_however_it_is_checked(folder: Path, method: Any) -> None:
    result = checked(folder, method=method)
    assert result.passed, result.checks
    assert result.observed is not None
    assert result.observed["compute_class"] == "exact"
    assert {p.verdict for p in result.prompts} == {Verdict.IDENTICAL}
    assert {p.mean_abs_dlogp for p in result.prompts} == {0.0}
    assert next(c for c in result.checks if c.name == "rounding").status == "skip"


def test_another_batch_size_and_thread_count_are_identical(folder: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        one = replace(suite.load(folder), batch_size=1)
        result = gate.check(one, "exact", asking.Options(method="decode"))
    finally:
        torch.set_num_threads(threads)
    assert result.passed, result.checks
    assert {"batch_size", "threads"} <= {c.field for c in result.environment_diff}
    assert {p.verdict for p in result.prompts} == {Verdict.IDENTICAL}


def flipped(folder: Path, name: str, row: int, column: int) -> None:
    """The lowest bit of one weight's significand turned over."""
    file = folder / "model" / "model.safetensors"
    weights = load_file(file)
    weights[name].view(torch.int16)[row, column] ^= 1
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize("method", ["auto", "replay", "decode"])
def test_one_flipped_bit_of_one_weight_is_drift_and_is_located(folder: Path, tmp_path: Path, method: Any) -> None:
    copy = copied(folder, tmp_path)
    flipped(copy, "model.layers.1.mlp.down_proj.weight", 3, 5)
    result = checked(copy, method=method, allow_changed=frozenset({"model"}))
    assert not result.passed
    drifting = [p for p in result.prompts if p.verdict == Verdict.DRIFT]
    assert len(drifting) > len(NAMES) / 2
    assert {p.verdict for p in result.prompts} <= {Verdict.DRIFT, Verdict.IDENTICAL}
    assert all("have other bits, and exact compute does not round" in p.reason for p in drifting)
    assert result.localisation is not None
    assert result.localisation["module"] == "model.layers.1.mlp.down_proj"


def test_no_waiver_waives_a_bit(folder: Path, tmp_path: Path) -> None:
    copy = copied(folder, tmp_path)
    flipped(copy, "model.layers.0.self_attn.v_proj.weight", 1, 1)
    toml = TOML + '[thresholds]\nfp32_waiver = "all"\n'
    (copy / "suite.toml").write_text(toml)
    result = checked(copy, allow_changed=frozenset({"model"}))
    assert not result.passed
    assert Verdict.WAIVED not in {p.verdict for p in result.prompts}


def test_a_mode_that_rounds_has_no_exact_golden(folder: Path) -> None:
    result = gate.check(suite.load(folder), "fp32", asking.Options())
    assert {p.verdict for p in result.prompts} == {Verdict.MISSING}
    with pytest.raises(GoldenMissing):
        evidence.expect_golden(suite.load(folder), "fp32", asking.Options())


def test_products_that_round_are_not_recorded_as_exact(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = copied(folder, tmp_path)

    def plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return torch.nn.functional.linear(x, weight.float(), bias)

    monkeypatch.setattr(operations, "linear", plain)
    with pytest.raises(EngineError, match="exact"):
        recording.record(suite.load(copy), "exact", asking.Options())
    assert not store.Place(copy, "exact", store.PENDING).text.exists()
    result = checked(copy)
    assert next(c for c in result.checks if c.name == "compute").status == "fail"


def test_an_exact_golden_is_not_calibrated(folder: Path) -> None:
    with pytest.raises(ConfigError, match="no rounding to measure"):
        recording.calibrate(suite.load(folder), "exact", asking.Options())


@contextmanager
def opened(folder: Path, **options: Any) -> Iterator[Any]:
    files = resolve(str(folder / "model"), folder / "model")
    with opener("transformers")(Spec(mode("exact"), 12, folder, files, options)) as engine:
        yield engine


def test_replay_and_decode_agree_on_every_bit(folder: Path) -> None:
    with opened(folder) as engine:
        asked = [
            Request(n, np.asarray(engine.encode(Prompt(n, "One " * (i + 1))), np.int32), n)
            for i, n in enumerate("abcd")
        ]
        outputs = engine.generate(asked)
        watching = [
            replace(r, reference=o.tokens, reference_runner_up=o.runner_up) for r, o in zip(asked, outputs, strict=True)
        ]
        for output, score in zip(outputs, engine.replay(watching), strict=True):
            assert output.logprob.tobytes() == score.logprob.tobytes()
            assert output.gap.tobytes() == score.gap.tobytes()
            assert score.top.tolist() == output.tokens.tolist()


def test_an_attention_of_the_suite_s_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="attention of its own"), opened(folder, attention="eager"):
        pass


def test_it_runs_on_the_cpu_also_where_there_is_a_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with opened(folder) as engine:
        assert engine.device.type == "cpu"


def test_the_engine_gives_torch_and_the_model_back(folder: Path) -> None:
    before = switches()
    with pytest.raises(ZeroDivisionError), opened(folder):
        raise ZeroDivisionError
    assert switches() == before


def test_the_file_of_a_golden_says_so(folder: Path) -> None:
    header = json.loads((folder / "exact.golden.jsonl").read_text().splitlines()[0])
    assert header["compute_class"] == header["noise"]["compute_class"] == "exact"
    assert header["noise"]["max_deficit"] == 0
