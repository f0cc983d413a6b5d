"""The table of what can be undone, held against the fields, options and variables there are; and what it hands on."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_repro import knobs, probe
from pytest_repro.engines.base import REGISTRY
from pytest_repro.fingerprint import SUSPECTS, Change, class_of
from pytest_repro.knobs import KNOBS, Setting, Undo, can_be_undone, fixed, undoable

THEN: dict[str, Any] = {
    "engine": "transformers", "numerics": "fp32", "compute_class": "fp32", "dtype": "float32", "batch_size": 8,
    "attention": "sdpa", "threads": 4, "cpu_capability": "AVX512", "cpu_model": "x", "cpu_count": 4, "device": "cpu",
    "device_class": "cpu", "torch": "2.13.0", "tensor_parallel_size": 1, "prefix_caching": False,
}  # fmt: skip


def undone(then: dict[str, Any] | None = None, **now: Any) -> dict[str, Setting]:
    """What can be undone where these fields differ, by knob. A field None is not there."""
    here = {k: v for k, v in {**THEN, **(then or {}), **_fields(now)}.items() if v is not None}
    return {undo.name: undo.setting for undo in undoable({**THEN, **(then or {})}, here)}


def _fields(changes: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("env_", "env."): value for name, value in changes.items()}


# --- the table ------------------------------------------------------------------------------------------------------


def test_names_are_told_apart() -> None:
    names = [knob.name for knob in KNOBS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("knob", KNOBS, ids=lambda knob: knob.name)
def test_every_knob_is_of_numerics_fields_and_of_options_that_there_are(knob: knobs.Knob) -> None:
    assert {class_of(name) for name in knob.concerns} == {"numerics"}
    assert sum(map(bool, (knob.option, knob.engine_options, knob.variables))) == 1
    for engine, option in knob.engine_options.items():
        assert option in REGISTRY[engine].options
    assert set(knob.variables) <= set(probe.ENVIRONMENT), "a variable that no fingerprint shows cannot be put back"


def test_every_variable_that_changes_numerics_can_be_put_back() -> None:
    assert {name for knob in KNOBS for name in knob.variables} == set(probe.ENVIRONMENT)


def test_likeliest_culprits_first() -> None:
    ranks = [SUSPECTS.index(knob.fields[0]) for knob in KNOBS if knob.fields[0] in SUSPECTS and knob.name != "numerics"]
    of_torch = ["batch_size", "engine", "attention", "device", "cpu_capability", "threads"]
    assert [SUSPECTS[rank] for rank in ranks if SUSPECTS[rank] in of_torch] == of_torch


# --- how each is put back -------------------------------------------------------------------------------------------


def test_nothing_differs() -> None:
    assert undone() == {}


def test_information_and_identity_are_no_suspects() -> None:
    assert undone(time="later", host="y", **{"model.weights": "other"}) == {}


@pytest.mark.parametrize(
    ("name", "now", "setting"),
    [
        ("batch size", {"batch_size": 1}, Setting({"--repro-batch-size": "8"})),
        ("attention kernel", {"attention": "eager"}, Setting(engine_options={"attention": "sdpa"})),
        ("numerics", {"numerics": "bf16", "compute_class": "bf16"}, Setting({"--repro-numerics": "fp32"})),
        ("numerics", {"numerics": "layercast"}, Setting({"--repro-numerics": "fp32"})),
        ("device", {"device": "H100", "device_class": "cuda-sm90"}, Setting(engine_options={"device": "cpu"})),
        ("MKL_CBWR", {"env_MKL_CBWR": "AVX2"}, Setting(environment={"MKL_CBWR": None})),
    ],
)
def test_a_single_difference(name: str, now: dict[str, Any], setting: Setting) -> None:
    assert undone(**now) == {name: setting}


def test_the_mode_cannot_be_put_back_where_it_is_the_same_and_the_compute_differs() -> None:
    assert undone(compute_class="tf32") == {}
    assert fixed((), THEN, {**THEN, "compute_class": "tf32"}) == (Change("compute_class", "numerics", "fp32", "tf32"),)


def test_what_comes_with_a_mode_is_not_told_as_beyond_reach() -> None:
    now = {**THEN, "numerics": "bf16", "compute_class": "bf16", "dtype": "bfloat16", "torch": "2.12.0"}
    assert [change.field for change in fixed(undoable(THEN, now), THEN, now)] == ["torch"]


# --- threads and instruction set: the environment as it was, or what comes to the same --------------------------------


@pytest.mark.parametrize(
    ("then", "now", "environment"),
    [
        ({}, {"threads": 1, "env_OMP_NUM_THREADS": "1"}, {"OMP_NUM_THREADS": None, "MKL_NUM_THREADS": None}),
        ({"env.OMP_NUM_THREADS": "4"}, {"threads": 1, "env_OMP_NUM_THREADS": None},
         {"OMP_NUM_THREADS": "4", "MKL_NUM_THREADS": None}),
        ({}, {"threads": 2}, {"OMP_NUM_THREADS": "4", "MKL_NUM_THREADS": None}),
        ({}, {"threads": 2, "cpu_count": 2, "env_OMP_NUM_THREADS": "2"}, {"OMP_NUM_THREADS": "4", "MKL_NUM_THREADS": None}),
        ({}, {"env_OMP_NUM_THREADS": "4"}, {"OMP_NUM_THREADS": None, "MKL_NUM_THREADS": None}),
        ({"env.MKL_NUM_THREADS": "4"}, {"threads": 2, "env_MKL_NUM_THREADS": "2"},
         {"OMP_NUM_THREADS": None, "MKL_NUM_THREADS": "4"}),
    ],
    ids=["variable set now", "variable set then", "fewer visible", "a smaller machine", "variable alone", "MKL's own"],
)  # fmt: skip
def test_threads(then: dict[str, Any], now: dict[str, Any], environment: dict[str, str | None]) -> None:
    assert undone(then, **now) == {"threads": Setting(environment=environment)}


@pytest.mark.parametrize(
    ("then", "now", "environment"),
    [
        ({}, {"cpu_capability": "DEFAULT", "env_ATEN_CPU_CAPABILITY": "default"}, (None, None, None)),
        ({}, {"env_ONEDNN_MAX_CPU_ISA": "AVX2"}, (None, None, None)),
        ({"cpu_capability": "AVX2", "env.ATEN_CPU_CAPABILITY": "avx2"}, {"cpu_capability": "AVX512", "env_ATEN_CPU_CAPABILITY": None}, ("avx2", None, None)),
        ({"cpu_capability": "AVX2"}, {"cpu_capability": "AVX512", "cpu_model": "newer"}, ("avx2", "AVX2", "AVX2")),
        ({"cpu_capability": "DEFAULT"}, {"cpu_capability": "AVX2", "cpu_model": "newer"}, ("default", "SSE41", "SSE4_2")),
    ],
    ids=["held down now", "oneDNN alone", "held down then", "an older processor", "a far older one"],
)  # fmt: skip
def test_instruction_set(then: dict[str, Any], now: dict[str, Any], environment: tuple[str | None, ...]) -> None:
    names = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
    assert undone(then, **now) == {"instruction set": Setting(environment=dict(zip(names, environment, strict=True)))}


@pytest.mark.parametrize("value", ["NEON", "SVE256", None, 0, "../../x"])
def test_an_instruction_set_that_is_not_known_here_has_no_knob(value: Any) -> None:
    assert undone({"cpu_capability": value}, cpu_capability="AVX512", cpu_model="other") == {}


@pytest.mark.parametrize("value", [0, -1, 100_000, "4; rm", True + 0.5, None])
def test_a_thread_count_that_is_none_has_no_knob(value: Any) -> None:
    assert undone({"threads": value}, threads=2) == {}


# --- engines --------------------------------------------------------------------------------------------------------

VLLM = {
    **THEN, "engine": "vllm", "attention": "FLASH_ATTN", "engine.max_num_seqs": 16, "engine.enforce_eager": True,
    "engine.block_size": 16, "prefix_caching": False,
}  # fmt: skip


def test_another_engine_is_put_back_with_its_options() -> None:
    (undo,) = undoable(VLLM, THEN)
    assert undo.name == "engine" and undo.told == "engine vllm -> transformers"
    assert undo.setting == Setting(
        {"--repro-engine": "vllm"},
        {"attention_backend": "FLASH_ATTN", "tensor_parallel_size": "1", "enable_prefix_caching": "false",
         "max_num_seqs": "16", "enforce_eager": "true", "block_size": "16"},
    )  # fmt: skip
    (back,) = undoable(THEN, VLLM)
    assert back.setting == Setting({"--repro-engine": "transformers"}, {"attention": "sdpa", "device": "cpu"})
    assert fixed((back,), THEN, VLLM) == ()


def test_vllm_s_options_are_put_back_one_by_one() -> None:
    now = {
        **VLLM,
        "engine.max_num_seqs": 256,
        "engine.enforce_eager": False,
        "prefix_caching": True,
        "attention": "TORCH_SDPA",
    }
    settings = {undo.name: undo.setting.engine_options for undo in undoable(VLLM, now)}
    assert settings == {
        "attention kernel": {"attention_backend": "FLASH_ATTN"}, "prefix caching": {"enable_prefix_caching": "false"},
        "most sequences": {"max_num_seqs": "16"}, "eager execution": {"enforce_eager": "true"},
    }  # fmt: skip


def test_an_option_that_the_engine_does_not_have_is_beyond_reach() -> None:
    """transformers has no tensor parallelism to put back."""
    now = {**THEN, "tensor_parallel_size": 2}
    assert undoable(THEN, now) == () and [c.field for c in fixed((), THEN, now)] == ["tensor_parallel_size"]


def test_an_engine_of_a_test_s_own_has_no_knobs_but_the_common_ones() -> None:
    own = {**THEN, "engine": "mine:answer"}
    assert {undo.name for undo in undoable(own, {**own, "attention": "eager", "batch_size": 1})} == {"batch size"}


# --- a golden is not trusted ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("engine", "os:system"), ("engine", "openai"), ("engine", "vllm; rm -rf ."), ("attention", "someone/kernel"),
        ("attention", "https://example.org/x"), ("attention", "--repro-allow-code"), ("attention", ""),
        ("batch_size", 0), ("batch_size", "8 -p evil"), ("batch_size", -1), ("batch_size", 10**9), ("batch_size", True),
        ("numerics", "fp32 --repro-allow-code"), ("numerics", None), ("device", "cuda:0"), ("device", "meta"),
        ("env.MKL_CBWR", "x\x00y"), ("env.MKL_CBWR", "$(id)"), ("env.OMP_NUM_THREADS", "1\n2"), ("env.MKL_CBWR", "/etc/x"),
        ("env.LD_PRELOAD", "evil.so"), ("env.PYTHONPATH", "evil"), ("engine.script", "other.jsonl"),
    ],
)  # fmt: skip
def test_what_is_not_plain_is_not_handed_on(field: str, value: Any) -> None:
    now = {**THEN, "engine": "transformers", field: "auto" if field != "env.OMP_NUM_THREADS" else "2"}
    then = {**THEN, field: value}
    assert undoable(then, now) == ()


# --- small things -----------------------------------------------------------------------------------------------------


def test_settings_on_top_of_one_another() -> None:
    base = Setting({"--a": "1"}, {"x": "1"}, {"V": "1"})
    top = Setting({"--a": "2", "--b": "3"}, {"y": "2"}, {"V": None})
    assert base.under([top]) == Setting({"--a": "2", "--b": "3"}, {"x": "1", "y": "2"}, {"V": None})
    assert base.under([]) == base


def test_how_a_difference_is_told() -> None:
    (undo,) = undoable(THEN, {**THEN, "numerics": "bf16", "compute_class": "bf16"})
    assert undo.told == "numerics fp32 -> bf16"
    assert (
        Undo(undo.knob, (Change("env.X", "numerics", None, "y" * 99),), Setting()).told
        == f"env.X (not there) -> {'y' * 47}…"
    )


def test_whether_a_knob_is_there() -> None:
    assert can_be_undone([Change("torch", "numerics", 1, 2), Change("threads", "numerics", 1, 2)])
    assert not can_be_undone([Change("torch", "numerics", 1, 2), Change("device_class", "numerics", 1, 2)])
    assert not can_be_undone([Change("batch_size", "information", 1, 2)]) and not can_be_undone([])


def test_exact_compute_s_attention_goes_with_its_mode_alone() -> None:
    """As an option it would be refused: no other mode has it, and exact compute takes no attention option."""
    exact = {"numerics": "exact", "compute_class": "exact", "attention": "exact", "dtype": "bfloat16"}
    assert undone(exact, numerics="fp32", compute_class="fp32", attention="sdpa", dtype="float32") == {
        "numerics": Setting({"--repro-numerics": "exact"})
    }
