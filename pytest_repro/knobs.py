"""What can be undone of an environment: the numerics fields that a check can be run with at the golden's values, and how.

`KNOBS` is the table; what else can be undone is one more row of it. Pure: it says what to set, `trials` sets it, and the
trial's own report says whether it took.

A golden's values come with a pull request. One that is not plain is not handed on: as an engine's name it could be code, as
an attention kernel's an address to fetch one from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from .fingerprint import Change, Fingerprint, Value, diff

OPTIONS = {
    "--repro-numerics": "--numerics",
    "--repro-engine": "--engine",
    "--repro-engine-option": "--engine-option",
    "--repro-batch-size": "--batch-size",
    "--repro-golden": "--golden",
}
"""Options of a check -> those of `pytest-repro bisect` that stand for them."""

_WORD = re.compile(r"[A-Za-z0-9_]{1,64}")
_MODE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")
_COUNT = re.compile(r"[1-9][0-9]{0,6}")
_SWITCH = re.compile(r"true|false")
_LOCAL_ENGINE = re.compile(r"transformers|vllm|scripted")
"""A server is not one: its address would be the suite's, and what it runs nobody's here."""
_VARIABLE = re.compile(r"[A-Za-z0-9_.,:=+-]{1,64}")


@dataclass(frozen=True)
class Setting:
    """What a check is run with."""

    options: Mapping[str, str] = field(default_factory=dict)
    """Option of pytest -> its value."""
    engine_options: Mapping[str, str] = field(default_factory=dict)
    """As in `--repro-engine-option NAME=VALUE`."""
    environment: Mapping[str, str | None] = field(default_factory=dict)
    """Variable -> its value; None: it is not set."""

    def under(self, others: Iterable[Setting]) -> Setting:
        """This setting with others on top."""
        found = self
        for other in others:
            found = Setting(
                {**found.options, **other.options},
                {**found.engine_options, **other.engine_options},
                {**found.environment, **other.environment},
            )
        return found


@dataclass(frozen=True)
class Knob:
    """One thing that can be put back. Exactly one of `option`, `engine_options` and `variables` says how."""

    name: str
    fields: tuple[str, ...]
    """What must have the golden's value once it is undone; the first one's value is what is set."""
    brings: tuple[str, ...] = ()
    """What may move with it besides, as patterns."""
    option: str = ""
    """The option of pytest that takes the value."""
    engine_options: Mapping[str, str] = field(default_factory=dict)
    """Engine -> its option that takes the value."""
    values: re.Pattern[str] = _WORD
    """What the value must look like."""
    variables: tuple[str, ...] = ()
    """Environment variables, set as they were when the golden was recorded."""
    imitated: Callable[[Value], Mapping[str, str]] | None = None
    """Variables that bring the value about where the golden's machine had it without them."""

    def covers(self, name: str) -> bool:
        """Whether a field is this knob's own, or may move with it."""
        return name in (*self.fields, *self._shown_variables) or any(fnmatchcase(name, p) for p in self.brings)

    @property
    def concerns(self) -> tuple[str, ...]:
        """Fields whose difference it undoes."""
        return (*self.fields, *self._shown_variables)

    @property
    def _shown_variables(self) -> tuple[str, ...]:
        return tuple(f"env.{name}" for name in self.variables)


def _variable(name: str, *brings: str) -> Knob:
    return Knob(name, (f"env.{name}",), brings, variables=(name,))


def _vllm(name: str, shown: str, option: str, values: re.Pattern[str]) -> Knob:
    return Knob(name, (shown,), engine_options={"vllm": option}, values=values)


def _thread_count(value: Value) -> Mapping[str, str]:
    return {"OMP_NUM_THREADS": str(value)} if isinstance(value, int) and 1 <= value <= 1024 else {}


def instructions(value: Value) -> Mapping[str, str]:
    """Variables that hold a process to an instruction set, by torch's name for it; none for a name that is not known.

    oneDNN and MKL choose for themselves, and are held to the same.
    """
    named = {
        "DEFAULT": ("default", "SSE41", "SSE4_2"),
        "AVX2": ("avx2", "AVX2", "AVX2"),
        "AVX512": ("avx512", "AVX512_CORE", "AVX512"),
    }
    return dict(zip(INSTRUCTIONS, named.get(str(value), ()), strict=False))


_PRECISION = ("compute_class", "fp32_precision.*")
INSTRUCTIONS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")

KNOBS: tuple[Knob, ...] = (
    # Likeliest culprit first, as in `fingerprint.SUSPECTS`: it is the order of the trials.
    Knob("numerics", ("numerics", "compute_class"), option="--repro-numerics", values=_MODE,
         brings=("dtype", "quantization", "kv_cache_dtype", "autocast", "fp32_precision.*", "reduced_precision.*",
                 "engine.product", "engine.round_weights", "attention")),
    Knob("batch size", ("batch_size",), option="--repro-batch-size", values=_COUNT),
    Knob("engine", ("engine",), option="--repro-engine", values=_LOCAL_ENGINE, brings=("*",)),
    Knob("attention kernel", ("attention",), engine_options={"transformers": "attention", "vllm": "attention_backend"},
         values=re.compile(r"(?!exact$)[A-Za-z0-9_]{1,64}")),  # exact compute's own goes with its mode
    Knob("device", ("device", "device_class"), engine_options={"transformers": "device"}, values=re.compile("cpu")),
    _vllm("tensor parallelism", "tensor_parallel_size", "tensor_parallel_size", _COUNT),
    _vllm("pipeline parallelism", "engine.pipeline_parallel_size", "pipeline_parallel_size", _COUNT),
    _vllm("data parallelism", "engine.data_parallel_size", "data_parallel_size", _COUNT),
    _vllm("prefix caching", "prefix_caching", "enable_prefix_caching", _SWITCH),
    _vllm("most sequences", "engine.max_num_seqs", "max_num_seqs", _COUNT),
    _vllm("most batched tokens", "engine.max_num_batched_tokens", "max_num_batched_tokens", _COUNT),
    _vllm("chunked prefill", "engine.chunked_prefill", "enable_chunked_prefill", _SWITCH),
    _vllm("eager execution", "engine.enforce_eager", "enforce_eager", _SWITCH),
    _vllm("block size", "engine.block_size", "block_size", _COUNT),
    _vllm("asynchronous scheduling", "engine.async_scheduling", "async_scheduling", _SWITCH),
    Knob("instruction set", ("cpu_capability",), variables=INSTRUCTIONS, imitated=instructions),
    Knob("threads", ("threads",), variables=("OMP_NUM_THREADS", "MKL_NUM_THREADS"), imitated=_thread_count),
    _variable("NVIDIA_TF32_OVERRIDE", *_PRECISION),
    _variable("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", *_PRECISION),
    _variable("ONEDNN_DEFAULT_FPMATH_MODE", *_PRECISION),
    _variable("VLLM_BATCH_INVARIANT", "engine.batch_invariant", "attention"),
    _variable("VLLM_ATTENTION_BACKEND", "attention"),
    *map(_variable, (
        "MKL_CBWR", "CUBLAS_WORKSPACE_CONFIG", "CUBLASLT_WORKSPACE_SIZE", "TORCHINDUCTOR_FREEZING", "NCCL_ALGO", "NCCL_PROTO",
        "NCCL_MIN_NCHANNELS", "NCCL_MAX_NCHANNELS", "NCCL_NVLS_ENABLE", "NCCL_COLLNET_ENABLE", "NCCL_P2P_NET_DISABLE",
        "NCCL_LAUNCH_MODE", "CUDA_LAUNCH_BLOCKING", "PYTHONHASHSEED",
    )),
)  # fmt: skip


@dataclass(frozen=True)
class Undo:
    """A knob that differs, and what puts it back."""

    knob: Knob
    changes: tuple[Change, ...]
    """What it undoes."""
    setting: Setting

    @property
    def name(self) -> str:
        """The knob's."""
        return self.knob.name

    @property
    def told(self) -> str:
        """`batch_size 8 -> 1`, golden's value first."""
        first = self.changes[0]
        return f"{first.field} {spelt(first.golden)} -> {spelt(first.now)}"


def spelt(value: Value) -> str:
    """A value of a fingerprint for a person, at most 48 characters."""
    text = "(not there)" if value is None else str(value)
    return text if len(text) <= 48 else text[:47] + "…"


def suspects(golden: Fingerprint, now: Fingerprint) -> tuple[Change, ...]:
    """Numerics fields that differ, likeliest culprit first."""
    return tuple(change for change in diff(golden, now) if change.cls == "numerics")


def undoable(golden: Fingerprint, now: Fingerprint) -> tuple[Undo, ...]:
    """What of the differences can be put back to the golden's value, in the table's order."""
    differing = suspects(golden, now)
    found = []
    for knob in KNOBS:
        changes = tuple(change for name in knob.concerns for change in differing if change.field == name)
        if not changes or (knob.engine_options and golden.get("engine") != now.get("engine")):
            continue  # an option of one engine is none of another's: it goes with the engine
        if setting := _setting(knob, changes, golden, now):
            found.append(Undo(knob, changes, setting))
    return tuple(found)


def fixed(undos: Sequence[Undo], golden: Fingerprint, now: Fingerprint) -> tuple[Change, ...]:
    """What differs and cannot be put back here."""
    return tuple(c for c in suspects(golden, now) if not any(undo.knob.covers(c.field) for undo in undos))


def can_be_undone(changes: Iterable[Change]) -> bool:
    """Whether a knob is there for any of these differences."""
    known = {name for knob in KNOBS for name in (knob.fields[0], *knob.concerns[len(knob.fields) :])}
    return any(change.cls == "numerics" and change.field in known for change in changes)


def _setting(knob: Knob, changes: Sequence[Change], golden: Fingerprint, now: Fingerprint) -> Setting | None:
    """None where the golden's value is not there, or nothing that may be handed on."""
    if knob.variables:
        return _environment(knob, changes, golden, now)
    engine = str(golden.get("engine"))
    value = _given(knob, golden)
    if value is None or changes[0].field != knob.fields[0]:
        return None  # the first field is what is set: where it is equal already, setting it again puts nothing back
    if knob.engine_options:
        return Setting(engine_options={knob.engine_options[engine]: value}) if engine in knob.engine_options else None
    with_it = _options_of(engine, golden) if knob.name == "engine" else {}
    return Setting({knob.option: value}, with_it)


def _options_of(engine: str, golden: Fingerprint) -> dict[str, str]:
    """The options that the golden's engine had, as far as its fingerprint shows them."""
    rows = [knob for knob in KNOBS if engine in knob.engine_options]
    return {k.engine_options[engine]: value for k in rows if (value := _given(k, golden)) is not None}


def _given(knob: Knob, facts: Fingerprint) -> str | None:
    """A fingerprint's value as an option takes it; None if it must not be handed on."""
    value = facts.get(knob.fields[0])
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if value is not None and knob.values.fullmatch(text) else None


def _environment(knob: Knob, changes: Sequence[Change], golden: Fingerprint, now: Fingerprint) -> Setting | None:
    """The variables as the golden had them; where they are not what differs, others that come to the same."""
    then = {name: golden.get(f"env.{name}") for name in knob.variables}
    if any(value is not None and not _VARIABLE.fullmatch(str(value)) for value in then.values()):
        return None
    wanted = {name: None if value is None else str(value) for name, value in then.items()}
    another_machine = any(golden.get(name) != now.get(name) for name in ("cpu_model", "cpu_count"))
    if knob.imitated and (another_machine or not any(c.field.startswith("env.") for c in changes)):
        imitated = knob.imitated(golden.get(knob.fields[0]))
        wanted |= {name: value for name, value in imitated.items() if wanted[name] is None}
    same = all(wanted[name] == now.get(f"env.{name}") for name in wanted)
    return None if same else Setting(environment=wanted)
