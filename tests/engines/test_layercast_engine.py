"""The transformers engine in mode layercast, held against the same engine in mode fp32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pytest_repro.engines.base import Spec, opener
from pytest_repro.errors import EngineError
from pytest_repro.generation import Request
from pytest_repro.models import ModelFiles, resolve
from pytest_repro.numerics import mode
from pytest_repro.numerics.layercast import product
from pytest_repro.numerics.layercast.weight import Weight, stored
from pytest_repro.suite import Prompt

from .families import switches
from .tiny import build

TEXTS = ("Hello", "A much longer prompt than the other one", "x")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    folder = build(tmp_path_factory.mktemp("tiny"), bias=True)
    return resolve(str(folder), folder)


def spec(files: ModelFiles, numerics: str = "layercast", **options: Any) -> Spec:
    return Spec(mode(numerics), 12, files.path, files, options)


@pytest.fixture(scope="module")
def engine(files: ModelFiles) -> Iterator[Any]:
    with opener("transformers")(spec(files)) as engine:
        yield engine


@pytest.fixture(scope="module")
def fp32(files: ModelFiles) -> Iterator[Any]:
    with opener("transformers")(spec(files, "fp32")) as engine:
        yield engine


def requests(engine: Any) -> list[Request]:
    return [Request(t, np.asarray(engine.encode(Prompt("p", t)), np.int32), t) for t in TEXTS]


def test_the_fingerprint_says_what_is_in_force(engine: Any) -> None:
    facts = engine.facts()
    assert facts["numerics"] == facts["quantization"] == "layercast"
    assert facts["dtype"] == facts["kv_cache_dtype"] == "float32"
    assert facts["engine.product"] == product.prepare(torch.device("cpu"), lambda _: None)


def test_fp32_names_no_product_and_no_storage(fp32: Any) -> None:
    facts = fp32.facts()
    assert facts["quantization"] == "none"
    assert "engine.product" not in facts


def test_the_probe_sees_fp32_through_16_bit_weights(engine: Any) -> None:
    assert isinstance(engine.model.lm_head.weight, Weight)
    assert engine.observe().compute_class == "fp32"


def test_the_probe_sees_a_product_that_is_not_fp32(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        product, "compiled", lambda x, w, b: torch.nn.functional.linear(x.bfloat16(), w.bfloat16()).float()
    )
    monkeypatch.setattr(product, "tiled", product.compiled)
    assert engine.observe().compute_class == "bf16"


def test_decoding_gives_the_tokens_of_fp32_and_its_numbers_but_for_rounding(engine: Any, fp32: Any) -> None:
    for ours, theirs in zip(engine.generate(requests(engine)), fp32.generate(requests(fp32)), strict=True):
        assert ours.tokens.tolist() == theirs.tokens.tolist()
        np.testing.assert_allclose(ours.logprob, theirs.logprob, atol=1e-4)
        np.testing.assert_allclose(ours.gap, theirs.gap, atol=1e-4)


def test_replay_gives_the_tokens_of_fp32_and_its_numbers_but_for_rounding(engine: Any, fp32: Any) -> None:
    asked = requests(fp32)
    watching = [
        replace(r, reference=o.tokens, reference_runner_up=o.runner_up)
        for r, o in zip(asked, fp32.generate(asked), strict=True)
    ]
    for ours, theirs in zip(engine.replay(watching), fp32.replay(watching), strict=True):
        assert ours.top.tolist() == theirs.top.tolist()
        assert ours.error == ""
        np.testing.assert_allclose(ours.logprob, theirs.logprob, atol=1e-4)
        np.testing.assert_allclose(ours.deficit, theirs.deficit, atol=1e-4)
        np.testing.assert_allclose(ours.gap, theirs.gap, atol=1e-4)


def test_every_benign_replay_works(engine: Any) -> None:
    """One thread and eager attention among them."""
    asked = requests(engine)
    watching = [
        replace(r, reference=o.tokens, reference_runner_up=o.runner_up)
        for r, o in zip(asked, engine.generate(asked), strict=True)
    ]
    names = []
    for name, replay in engine.benign():
        names.append(name)
        for request, score in zip(watching, replay(watching, lambda _: None), strict=True):
            assert score.top.tolist() == request.reference.tolist(), name
    assert "replay, eager attention" in names


def test_the_engine_gives_torch_back_as_it_was(files: ModelFiles) -> None:
    before = switches()
    with pytest.raises(ZeroDivisionError), opener("transformers")(spec(files)):
        raise ZeroDivisionError
    assert switches() == before


def test_a_model_that_never_was_16_bit_is_refused_unless_the_suite_rounds_it(files: ModelFiles, tmp_path: Path) -> None:
    for file in files.path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    model = AutoModelForCausalLM.from_pretrained(files.path, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight += 1e-6
    model.save_pretrained(tmp_path)
    fine = resolve(str(tmp_path), tmp_path)
    with pytest.raises(EngineError, match=r"lm_head\.weight") as caught, opener("transformers")(spec(fine)):
        pass
    assert "round_weights" in caught.value.fix
    with opener("transformers")(spec(fine, round_weights="bfloat16")) as engine:
        assert torch.equal(stored(engine.model.lm_head.weight), model.lm_head.weight.bfloat16())
        assert engine.observe().compute_class == "fp32"
