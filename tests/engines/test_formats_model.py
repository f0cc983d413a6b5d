"""A model in an emulated format: what is rounded, what is not, how it is proven, and that nothing of it stays."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pytest_repro import asking, gate, numerics, recording, store, suite
from pytest_repro.engines.base import Engine, Spec, opener
from pytest_repro.errors import ConfigError, EngineError
from pytest_repro.generation import Request
from pytest_repro.numerics.formats import parse
from pytest_repro.numerics.formats.model import Emulated, emulating, linear_layers
from pytest_repro.numerics.formats.quantiser import on_grid, quantised
from pytest_repro.result import SuiteResult
from pytest_repro.testing import EngineContract
from pytest_repro.verdict import Verdict

from .families import FAMILIES, create
from .test_contract import loaded as engine_in
from .tiny import build

IDS = torch.arange(3, 23)[None]
NAMES = ["e4m3", "e4m3-weights", "e5m2-activations-block16", "e8m7-kv", "e3m2-weights-kv-tensor", "e5m10-unscaled"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("tiny"), bias=True)


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: Any, **options: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=IDS, **options).logits
    return found


def state(model: Any) -> dict[str, Any]:
    """Everything that a mode could leave behind."""
    return {
        "weights": {name: (id(p), p._version, p.detach().clone()) for name, p in model.named_parameters()},
        "hooks": [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()],
        "precision": torch.get_float32_matmul_precision(),
    }


def assert_as_before(model: Any, before: dict[str, Any]) -> None:
    now = state(model)
    assert (now["hooks"], now["precision"]) == (before["hooks"], before["precision"])
    for name, (identity, version, values) in before["weights"].items():
        assert now["weights"][name][:2] == (identity, version)
        assert torch.equal(now["weights"][name][2], values)


# --- what is rounded ------------------------------------------------------------------------------------------------


def by_hand(model: Any, name: str, skip: frozenset[str] = frozenset()) -> torch.Tensor:
    """The mode written down once more, by other means: layers wrapped in place of hooks, a cache class of its own."""
    from transformers import DynamicCache

    emulation = parse(name)

    class Wrapped(torch.nn.Module):
        def __init__(self, layer: torch.nn.Linear) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weight = self.layer.weight
            weight = quantised(weight, emulation) if emulation.rounds("weights") else weight
            x = quantised(x, emulation) if emulation.rounds("activations") else x
            return torch.nn.functional.linear(x, weight, self.layer.bias)

    class Rounding(DynamicCache):
        def update(self, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
            if emulation.rounds("kv"):
                k, v = quantised(k, emulation), quantised(v, emulation)
            return super().update(k, v, *args, **kwargs)

    for layer in model.model.layers:
        for block, names in ((layer.self_attn, "qkvo"), (layer.mlp, ("gate", "up", "down"))):
            for n in names:
                setattr(block, f"{n}_proj", Wrapped(getattr(block, f"{n}_proj")))
    return logits(model, past_key_values=Rounding(config=model.config), use_cache=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_mode_is_what_it_says_written_down_by_hand(folder: Path, name: str) -> None:
    model = loaded(folder)
    with emulating(model, parse(name)):
        found, without_cache = logits(model, use_cache=True), logits(model, use_cache=False)
    wanted = by_hand(loaded(folder), name)
    assert torch.equal(found, wanted)
    assert torch.equal(without_cache, wanted), "attention sees the same whether or not somebody asked for a cache"


@pytest.mark.parametrize("name", NAMES)
def test_every_target_by_itself_changes_the_answer(folder: Path, name: str) -> None:
    model = loaded(folder)
    plain = logits(model)
    for target in parse(name).targets:
        with emulating(model, replace(parse(name), targets=(target,))):
            assert not torch.equal(logits(model), plain), target


def test_embeddings_norms_and_classifier_are_left_alone(folder: Path) -> None:
    model = loaded(folder)
    layers = linear_layers(model)
    assert len(layers) == 14 and "lm_head" not in layers
    with emulating(model, parse("e2m1")):
        matrices = [(name, p) for name, p in model.named_parameters() if p.dim() > 1]
        for name, p in matrices:
            rounded = name.endswith("_proj.weight")
            assert on_grid(p.detach(), parse("e2m1")) == rounded, name


def test_float32_as_a_format_is_float32(folder: Path) -> None:
    model = loaded(folder)
    plain = logits(model, use_cache=True)
    with emulating(model, parse("e8m23")):
        assert torch.equal(logits(model), plain)


def test_fewer_bits_lead_farther_away(folder: Path) -> None:
    model = loaded(folder)
    plain = logits(model)
    moved = []
    for name in ("e8m23", "e8m16", "e8m10", "e8m7", "e4m3", "e2m1"):
        with emulating(model, parse(name)):
            moved.append(float((logits(model) - plain).abs().mean()))
    assert moved[0] == 0 and moved == sorted(moved) and moved[1] > 0


# --- and back -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_leaving_restores_everything(folder: Path, name: str) -> None:
    model = loaded(folder)
    before, plain = state(model), logits(model)
    with emulating(model, parse(name)):
        logits(model)
    assert_as_before(model, before)
    assert torch.equal(logits(model), plain)


def test_leaving_by_an_error_restores_everything(folder: Path) -> None:
    model = loaded(folder)
    before = state(model)
    with pytest.raises(RuntimeError, match="on the way"), emulating(model, parse("e4m3")):
        raise RuntimeError("on the way")
    assert_as_before(model, before)


def test_modes_nest(folder: Path) -> None:
    model = loaded(folder)
    before = state(model)
    with emulating(model, parse("e5m2-weights")):
        outer = logits(model)
        with emulating(model, parse("e3m2-kv")):
            assert not torch.equal(logits(model), outer)
        assert torch.equal(logits(model), outer)
    assert_as_before(model, before)


def test_one_preparation_can_be_put_in_force_again_and_again(folder: Path) -> None:
    model = loaded(folder)
    plain = logits(model)
    prepared = Emulated(model, parse("e4m3"))
    seen = []
    for _ in range(2):
        assert torch.equal(logits(model), plain)
        with prepared.in_force():
            seen.append(logits(model))
    assert torch.equal(*seen) and not torch.equal(seen[0], plain)


# --- the proof ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_mode_is_seen_as_itself(folder: Path, name: str) -> None:
    with emulating(loaded(folder), parse(name)) as emulated:
        seen = emulated.observe()
    assert seen.compute_class == name and not seen.fp32_class, seen
    assert seen.product_bits == parse(name).format.mantissa + 1


def lose_a_weight(model: Any) -> None:
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach() * (1 + 1e-3 * torch.rand_like(layer.weight)), False)


def lose_an_input(model: Any) -> None:
    layer = model.model.layers[1].mlp.up_proj
    layer._forward_pre_hooks.clear()


def lose_the_cache(model: Any) -> None:
    model._forward_pre_hooks.clear()
    model._forward_pre_hooks_with_kwargs.clear()


def add_a_rounding(model: Any) -> None:
    model.model.norm.register_forward_hook(lambda module, inputs, out: out.bfloat16().float())


@pytest.mark.parametrize(
    ("tamper", "said", "found"),
    [
        (lose_a_weight, "the weight of model.layers.1.mlp.up_proj is not on the grid of e4m3", "lower"),
        (lose_an_input, "the input of model.layers.1.mlp.up_proj is not on the grid of e4m3", "lower"),
        (lose_the_cache, "the cache's keys of layer 0 is not on the grid of e4m3", "lower"),
        (add_a_rounding, "bfloat16 answers in bfloat16", "bf16"),
    ],
)
def test_a_mode_that_is_not_wholly_in_force_is_found_out(folder: Path, tamper: Any, said: str, found: str) -> None:
    model = loaded(folder)
    with emulating(model, parse("e4m3")) as emulated:
        tamper(model)
        seen = emulated.observe()
    assert seen.compute_class == found and said in seen.detail, seen


EXPERTS = {"deepseek_v3", "gpt_oss", "llama4_text", "mixtral", "phimoe", "qwen2_moe", "qwen3_moe", "qwen3_next"}
"""Families whose experts or routers are no linear layers."""


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_rounded_or_refused_with_names(family: str) -> None:
    model = create(family)
    if family in EXPERTS or family == "mamba":
        with pytest.raises(EngineError, match=r"conv1d\.weight" if family == "mamba" else r"experts|gate|router"):
            Emulated(model, parse("e4m3"))
        return
    with emulating(model, parse("e4m3")) as emulated:
        assert emulated.observe().compute_class == "e4m3", emulated.observe()


# --- through the engine and the gate --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rounded_engine(folder: Path) -> Iterator[Engine]:
    yield from engine_in(folder, "e4m3")


class TestTransformersEmulated(EngineContract):
    """The contract of every engine, in a format; replay and decode part by what a rounding boundary between them makes."""

    tolerance = 0.5

    @pytest.fixture
    def engine(self, rounded_engine: Engine) -> Engine:
        return rounded_engine


def test_a_tokens_scale_is_its_own_whatever_stands_beside_it(rounded_engine: Engine) -> None:
    """By channel, the usual scale, neither a later token nor another prompt of the batch has a say; by tensor they have."""
    tokens = np.arange(3, 40, dtype=np.int32)
    one = Request("one", tokens[:20], "", reference=tokens[20:30])
    other = Request("other", tokens[:9], "", reference=tokens[9:30])
    alone, beside = rounded_engine.replay([one])[0], rounded_engine.replay([other, one])[1]
    np.testing.assert_allclose(alone.logprob, beside.logprob, atol=0.05)
    model = rounded_engine.model  # type: ignore[attr-defined]
    x = torch.stack([torch.randn(64), 100 * torch.randn(64)])
    assert model is not None
    assert torch.equal(quantised(x, parse("e4m3"))[0], quantised(x[:1], parse("e4m3"))[0])
    assert not torch.equal(quantised(x, parse("e4m3-tensor"))[0], quantised(x[:1], parse("e4m3-tensor"))[0])


TOML = """
[suite]
name = "tiny"
model = "{model}"
prompts = "prompts.jsonl"
[generation]
max_new_tokens = 12
batch_size = 2
[run]
numerics = ["e4m3-weights"]
[thresholds.e4m3-weights]
max_divergent = 1
"""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> suite.Suite:
    """A suite on the tiny model with reviewed goldens: in a format, and in fp32."""
    folder = tmp_path_factory.mktemp("golden") / "tiny"
    folder.mkdir()
    model = build(tmp_path_factory.mktemp("tiny"))
    (folder / "suite.toml").write_text(TOML.format(model=model))
    (folder / "prompts.jsonl").write_text("".join(f'{{"id": "{n}", "prompt": "Count to {n}"}}\n' for n in "123"))
    found = suite.load(folder)
    for mode in ("e4m3-weights", "fp32"):
        recording.record(found, mode, asking.Options())
        store.accept(store.Place(folder, mode, store.PENDING), store.Reviewer("Ada", "a test's own"))
    return found


def compute(result: SuiteResult) -> tuple[str, str]:
    return next((c.status, c.message) for c in result.checks if c.name == "compute")


def test_a_golden_in_a_format_is_checked_by_its_own_class_alone(recorded: suite.Suite) -> None:
    result = gate.check(recorded, "e4m3-weights", asking.Options())
    assert result.passed, compute(result)
    assert (result.golden or {})["name"] == "e4m3-weights"
    assert "does not apply: FP32-class compute was not observed" in compute(result)[1]
    assert result.thresholds.max_divergent == 1
    other = gate.check(recorded, "e4m3", asking.Options())
    assert {p.verdict for p in other.prompts} == {Verdict.MISSING}


def test_what_differs_in_a_format_is_never_waived(recorded: suite.Suite) -> None:
    """Against the fp32 golden, named on purpose, with the widest waiver: nothing is taken for FP32's rounding."""
    wide = suite.apply(recorded, suite.Overrides(thresholds={"fp32_waiver": "all"}))
    for mode in ("e2m1", "e2m1-weights"):
        result = gate.check(wide, mode, asking.Options(golden="fp32"))
        assert result.counts.get(Verdict.DRIFT, 0) > 0 and not result.counts.get(Verdict.WAIVED, 0), result.counts
        assert not result.passed


def test_a_claim_that_the_probe_contradicts_fails(recorded: suite.Suite) -> None:
    @contextmanager
    def tampered(spec: Spec) -> Iterator[Engine]:
        from pytest_repro.models import resolve

        with opener("transformers")(replace(spec, model=resolve(recorded.model, recorded.folder))) as engine:
            lose_a_weight(engine.model)  # type: ignore[attr-defined]
            yield engine

    result = gate.check(recorded, "e4m3-weights", asking.Options(opener=tampered))
    status, message = compute(result)
    assert status == "fail" and not result.passed
    assert "the probe found lower" in message and "model.layers.1.mlp.up_proj" in message


@pytest.mark.parametrize("name", ["vllm", "openai", "somebody:engine"])
def test_an_engine_that_emulates_nothing_is_refused(recorded: suite.Suite, name: str) -> None:
    """It would compute in FP32, and a server could not even be looked at."""
    result = gate.check(replace(recorded, engine=name), "e4m3-weights", asking.Options(trusted_engine=True))
    assert not result.passed
    assert f"the engine {name} emulates no floating-point formats" in compute(result)[1]


def test_a_mode_is_found_by_its_name_and_a_mistake_in_it_is_told() -> None:
    assert numerics.mode("e4m3-kv-weights").compute_class == "e4m3-weights-kv"
    with pytest.raises(ConfigError, match="'wieghts' says nothing of a format"):
        numerics.mode("e4m3-wieghts")
    with pytest.raises(ConfigError, match=r"unknown numerics mode 'fp64'; known: native, .* and formats such as e4m3"):
        numerics.mode("fp64")
