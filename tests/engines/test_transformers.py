"""The transformers engine, held against plain transformers on a tiny seeded model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pytest_repro.comparison import compare_decode
from pytest_repro.engines.base import Spec, opener
from pytest_repro.errors import ConfigError, EngineError
from pytest_repro.generation import Generation, Request
from pytest_repro.models import ModelFiles, resolve
from pytest_repro.numerics import mode
from pytest_repro.suite import Prompt

from .tiny import build


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    folder = build(tmp_path_factory.mktemp("tiny"), bias=True)
    return resolve(str(folder), folder)


@pytest.fixture(scope="module")
def engine(files: ModelFiles) -> Iterator[Any]:
    with opener("transformers")(Spec(mode("fp32"), 12, files.path, files)) as engine:
        yield engine


def requests(engine: Any, *texts: str) -> list[Request]:
    return [Request(t, np.asarray(engine.encode(Prompt("p", t)), np.int32), t) for t in texts]


def test_numbers_are_those_of_a_plain_forward_pass(engine: Any, files: ModelFiles) -> None:
    """One prompt, step by step through the bare model in float64: tokens, log-probability, gap, runner-up."""
    (request,) = requests(engine, "Hello")
    (output,) = engine.generate([request])
    model = AutoModelForCausalLM.from_pretrained(files.path, dtype=torch.float64).eval()
    ids = request.tokens.tolist()
    for step, token in enumerate(output.tokens.tolist()):
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0, -1]
        best = logits.topk(2)
        assert token == int(best.indices[0])
        assert int(output.runner_up[step]) == int(best.indices[1])
        assert output.logprob[step] == pytest.approx(float(logits.log_softmax(-1)[token]), abs=1e-4)
        assert output.gap[step] == pytest.approx(float(best.values[0] - best.values[1]), abs=1e-4)
        ids.append(token)


def test_left_padding_does_not_change_an_answer_in_fp32(engine: Any) -> None:
    alone = [engine.generate([r])[0] for r in requests(engine, "Hi", "A much longer prompt than the other one")]
    together = engine.generate(requests(engine, "Hi", "A much longer prompt than the other one"))
    for a, b in zip(alone, together, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        np.testing.assert_allclose(a.logprob, b.logprob, atol=1e-4)


def test_an_end_of_sequence_token_ends_the_text_and_is_kept(engine: Any) -> None:
    (request,) = requests(engine, "Hello")
    (free,) = engine.generate([request])
    before, engine.eos = engine.eos, [int(free.tokens[3])]
    engine.model.generation_config.eos_token_id = engine.eos
    try:
        (stopped, other) = engine.generate([request, *requests(engine, "Another prompt")])
    finally:
        engine.eos = before
        engine.model.generation_config.eos_token_id = before
    assert stopped.tokens.tolist() == free.tokens[:4].tolist()
    assert stopped.finish_reason == "stop"
    assert free.finish_reason == "length"
    assert len(stopped.logprob) == 4
    assert len(other.tokens) >= 1


def test_replay_batches_of_unequal_lengths_give_what_single_replays_give(engine: Any) -> None:
    asked = requests(engine, "a", "bb bb bb", "ccc " * 20, "d")
    outputs = engine.generate(asked)
    watching = [
        replace(r, reference=o.tokens, reference_runner_up=o.runner_up) for r, o in zip(asked, outputs, strict=True)
    ]
    ragged = [
        replace(r, reference=r.reference[:n], reference_runner_up=r.reference_runner_up[:n])
        for r, n in zip(watching, (1, 12, 5, 7), strict=True)
    ]
    together = engine.replay(ragged)
    for request, score in zip(ragged, together, strict=True):
        (single,) = engine._replay([request], lambda _: None, 1)
        assert score.id == request.id
        assert score.top.tolist() == single.top.tolist()
        np.testing.assert_allclose(score.logprob, single.logprob, atol=1e-4)
        np.testing.assert_allclose(score.gap, single.gap, atol=1e-4)


def test_replay_sees_a_deficit_where_the_golden_chose_otherwise(engine: Any) -> None:
    (request,) = requests(engine, "Hello")
    (output,) = engine.generate([request])
    forced = output.tokens.copy()
    forced[2] = output.runner_up[2]
    (score,) = engine.replay([replace(request, reference=forced, reference_runner_up=output.tokens)])
    assert score.top[2] == output.tokens[2]
    assert score.deficit[2] == pytest.approx(float(output.gap[2]), abs=1e-4)
    assert score.gap[2] == pytest.approx(-float(output.gap[2]), abs=1e-4)
    assert score.deficit[:2].tolist() == [0.0, 0.0]


def test_decoding_watches_the_golden_token(engine: Any) -> None:
    (request,) = requests(engine, "Hello")
    (output,) = engine.generate([request])
    golden = output.tokens.copy()
    golden[5] = output.runner_up[5]
    (again,) = engine.generate([replace(request, reference=golden, reference_runner_up=golden)])
    deficit = again.logprob[5] - again.reference_logprob[5]
    assert deficit == pytest.approx(float(output.gap[5]), abs=1e-4)


@pytest.mark.parametrize("settings", [{"do_sample": True, "temperature": 3.0}, {"repetition_penalty": 3.0}])
def test_numbers_are_of_the_token_that_was_chosen_however_it_was(engine: Any, settings: dict[str, Any]) -> None:
    """A sampler that nobody asked for passes over likelier tokens, and must not look as if it had chosen them."""
    asked = requests(engine, "Hello", "Another prompt")
    greedy = engine.generate(asked)
    config, kept = engine.model.generation_config, {}
    for name, value in settings.items():
        kept[name] = getattr(config, name)
        setattr(config, name, value)
    try:
        torch.manual_seed(0)
        outputs = engine.generate(asked)
    finally:
        for name, value in kept.items():
            setattr(config, name, value)
    scores = engine.replay(
        [replace(r, reference=o.tokens, reference_runner_up=o.runner_up) for r, o in zip(asked, outputs, strict=True)]
    )
    assert any((s.top != o.tokens).any() for s, o in zip(scores, outputs, strict=True)), "the settings chose otherwise"
    if "do_sample" in settings:  # a penalty changes the very logits that the numbers are of
        for score, output in zip(scores, outputs, strict=True):
            np.testing.assert_allclose(output.logprob, score.logprob, atol=1e-4)
            np.testing.assert_allclose(output.gap, score.gap, atol=1e-4)
            assert (output.gap < 0).any()
        found = compare_decode(Generation.of(asked, greedy), Generation.of(asked, outputs))
        assert found.differs.all() and (found.passed_over > 0).all()


def test_nan_in_logits_is_an_error_of_the_prompt(files: ModelFiles) -> None:
    with opener("transformers")(Spec(mode("fp32"), 4, files.path, files)) as engine:
        (request,) = requests(engine, "Hello")
        (good,) = engine.generate([request])
        engine.model.lm_head.weight.data[7] = torch.nan  # type: ignore[attr-defined]
        (decoded,) = engine.generate([request])
        (replayed,) = engine.replay([replace(request, reference=good.tokens, reference_runner_up=good.runner_up)])
    assert decoded.error == "NaN in logits at token 0"
    assert replayed.error == "NaN in logits at token 0"


def test_out_of_memory_is_an_engine_error(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine.model, "generate", full)
    with pytest.raises(EngineError, match="out of memory while decoding a batch of 1"):
        engine.generate(requests(engine, "Hello"))


def test_a_broken_checkpoint_is_an_engine_error(files: ModelFiles, tmp_path: Path) -> None:
    for file in files.path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    broken = resolve(str(tmp_path), tmp_path)
    with pytest.raises(EngineError, match="loading"), opener("transformers")(Spec(mode("fp32"), 4, tmp_path, broken)):
        pass


def test_an_unknown_device_or_attention_is_a_mistake_in_the_suite(files: ModelFiles) -> None:
    for options in ({"device": "abacus"}, {"attention": "telepathy"}):
        with pytest.raises(ConfigError), opener("transformers")(Spec(mode("fp32"), 4, files.path, files, options)):
            pass


@pytest.mark.parametrize("address", ["kernels-community/flash-attn", "org/kernel@main", "paged|org/kernel:fn", ""])
def test_a_suite_fetches_no_attention_kernel(files: ModelFiles, address: str) -> None:
    """transformers would load code from the hub for an address; a suite is data from a pull request."""
    spec = Spec(mode("fp32"), 4, files.path, files, {"attention": address})
    with pytest.raises(ConfigError, match="would be code"), opener("transformers")(spec):
        pass


def test_generation_defaults_of_the_model_do_not_leak_in(files: ModelFiles, tmp_path: Path) -> None:
    """A checkpoint that asks for sampling with a penalty is decoded greedily all the same."""
    for file in files.path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text(
        '{"do_sample": true, "temperature": 9.0, "repetition_penalty": 5.0, "eos_token_id": 0, "pad_token_id": 0}'
    )
    wild = resolve(str(tmp_path), tmp_path)
    with opener("transformers")(Spec(mode("fp32"), 12, files.path, files)) as tame:
        wanted = tame.generate(requests(tame, "Hello"))[0].tokens.tolist()
    with opener("transformers")(Spec(mode("fp32"), 12, tmp_path, wild)) as engine:
        assert engine.generate(requests(engine, "Hello"))[0].tokens.tolist() == wanted


def test_a_prompt_longer_than_the_context_is_not_recorded(tmp_path: Path) -> None:
    from pytest_repro import asking, gate, recording, store, suite

    build(tmp_path / "model", context=64)
    folder = tmp_path / "s"
    folder.mkdir()
    (folder / "suite.toml").write_text(
        '[suite]\nname = "s"\nmodel = "../model"\nprompts = "p.jsonl"\n'
        '[generation]\nmax_new_tokens = 8\n[run]\nnumerics = ["bf16"]\n'
    )
    (folder / "p.jsonl").write_text('{"id": "a", "prompt": "short"}\n')
    recording.record(suite.load(folder), "bf16", asking.Options())
    store.accept(store.Place(folder, "bf16", store.PENDING), store.Reviewer("a test", "a test"))
    golden = store.Place(folder, "bf16").text.read_text()
    (folder / "p.jsonl").write_text('{"id": "a", "prompt": "short"}\n{"id": "b", "prompt": "' + "long " * 20 + '"}\n')
    with pytest.raises(ConfigError, match="exceed the model's context of 64"):
        recording.record(suite.load(folder), "bf16", asking.Options())
    assert store.pending(folder) == []
    result = gate.check(suite.load(folder), "bf16", asking.Options())
    assert [str(p.verdict) for p in result.prompts] == ["identical", "missing"]
    assert store.Place(folder, "bf16").text.read_text() == golden
