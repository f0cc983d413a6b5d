"""transformers: any causal language model that `AutoModelForCausalLM` loads, decoded greedily by its own `generate`.

Decoding: left padding, the batch as given. A logits processor that changes nothing records, at each step, the chosen
token's log-probability, its gap to the runner-up, and the log-probability of the golden's token.

Replay: prompt and golden tokens through one forward pass, right-padded (under a causal mask padding on the right is
never seen), batched by length; logits of prompt positions are not computed.
"""

from __future__ import annotations

import copy
import gc
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessorList,
)

from .. import precision, probe
from ..audit import Pass
from ..errors import ConfigError, EngineError
from ..fingerprint import Fingerprint
from ..generation import Output, Request, Scores, digest
from ..ladder import Departure
from ..numerics import exact, layercast
from ..numerics.formats import Emulation
from ..numerics.formats.model import Emulated
from ..sketch import Sketch, positions
from ..suite import Prompt
from . import operations
from .activations import Activations, sketch_of, watched
from .base import Engine, Spec, Tick, no_tick
from .departures import References, departure
from .scoring import Recorder, Sum, last_logsumexp, length, reference, score
from .tokenizer import encode, eos, load_tokenizer

REPLAY_LOGITS = 64 * 2**20
"""Most logits (positions x vocabulary) of one replay batch: 256 MiB as float32."""
REPLAY_POSITIONS = 2048
"""Most positions of one replay batch."""
SKETCH_PADDING = 37
"""Positions on the right, never seen under a causal mask, that make products take other shapes."""


@contextmanager
def open_engine(spec: Spec) -> Iterator[Engine]:
    """Load the model under the mode's switches; both end with the context.

    Raises:
        EngineError: the model cannot be loaded, or memory does not suffice.
        ConfigError: no such device, or an attention implementation that the model does not have.
    """
    assert spec.model is not None, "the transformers engine needs a model"
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    with spec.mode.switches():
        engine = TransformersEngine(spec)
        try:
            with engine.computing(), engine.emulating():
                yield engine
        finally:
            engine.close()


class TransformersEngine:
    """A loaded model with its tokenizer."""

    name = "transformers"
    text_only = False
    replays = True

    def __init__(self, spec: Spec) -> None:
        assert spec.model is not None
        self.spec = spec
        self.device = _device(spec.options.get("device", "cpu" if self.exact else None))
        path = str(spec.model.path)
        self.product = self._prepare()
        self.emulated: Emulated | None = None
        """The format that is in force."""
        self.references = References()
        with _explained(f"loading {spec.model.reference}", lambda: None):
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
            self.tokenizer = load_tokenizer(path)
            self.model = self._load(path)
        self.context_length: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
        self.eos = eos(self.model.generation_config, self.tokenizer)
        # The model's own generation defaults (sampling, penalties) would be merged in: greedy is a mode of its own.
        self.model.generation_config = GenerationConfig(
            do_sample=False,
            max_new_tokens=spec.max_new_tokens,
            eos_token_id=self.eos,
            pad_token_id=self.tokenizer.pad_token_id
            if self.tokenizer.pad_token_id is not None
            else (self.eos or [0])[0],
        )

    def _load(self, path: str) -> Any:
        attention = self.spec.options.get("attention")
        if attention is not None and not re.fullmatch(r"\w+", str(attention), re.ASCII):
            raise ConfigError(
                f"attention {attention!r} is not the name of an implementation: an address of kernels to fetch would be code",
                where=f"{self.spec.folder} [engine.attention]",
                fix='attention = "sdpa" or "eager"',
            )
        if attention is not None and self.exact:
            raise ConfigError(
                f"exact compute has an attention of its own, and the suite asks for {attention!r}",
                where=f"{self.spec.folder} [engine.attention]",
                fix="leave attention out, or another numerics mode",
            )
        options: dict[str, Any] = {"attn_implementation": attention} if attention else {}
        dtype = getattr(torch, self.spec.mode.dtype) if self.spec.mode.dtype else "auto"
        options |= self._storage()
        try:
            model = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, use_safetensors=True, trust_remote_code=False, **options
            )
        except (ValueError, ImportError) as exc:
            if attention and "attention" in str(exc).lower():
                raise ConfigError(
                    f"attention {attention!r}: {exc}", where=f"{self.spec.folder} [engine.attention]"
                ) from None
            raise
        return model.to(self.device).eval()

    @property
    def exact(self) -> bool:
        """Whether the mode is exact compute."""
        return self.spec.mode.storage == "exact"

    def computing(self) -> AbstractContextManager[None]:
        """What the loaded model computes in, where that is more than switches."""
        if not self.exact:
            return nullcontext()
        return exact.computing(self.model, self.spec.options.get("round_weights"), self.spec.say)

    def _prepare(self) -> str:
        """How LayerCast or exact compute multiplies on this device, compiled now; empty for other modes."""
        if self.exact:
            return exact.prepare(self.spec.say)
        if self.spec.mode.storage != "layercast":
            return ""
        return layercast.prepare(self.device, self.spec.say)

    def _storage(self) -> dict[str, Any]:
        """How weights are to be stored, where the mode's dtype does not say it."""
        round_weights = self.spec.options.get("round_weights")
        if self.spec.mode.storage != "layercast":
            return {}
        return {"quantization_config": layercast.LayerCastConfig(round_weights=round_weights)}

    @contextmanager
    def emulating(self) -> Iterator[None]:
        """The mode's format, if it is one, in force on the loaded model."""
        emulation = self.spec.mode.emulation
        with self.in_format(emulation) if emulation is not None else nullcontext():
            yield

    def close(self) -> None:
        """Let go of the model's memory."""
        self.references = References()
        self.model = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def observe(self) -> precision.Observation:
        """What the model's own arithmetic shows, on its own device."""
        with _explained("probing", self._memory_hint):
            if self.exact:
                return exact.observe(self.model)
            return self.emulated.observe() if self.emulated else precision.observe(self.model)

    def facts(self) -> Fingerprint:
        """What is in force."""
        assert self.spec.model is not None
        config = self.model.config
        with _explained("running one token", self._memory_hint):
            cache = precision.kv_cache_dtype(self.model)
        return {
            **self.spec.model.identity,
            "generation": digest({"greedy": True, "max_new_tokens": self.spec.max_new_tokens, "eos": self.eos}),
            "engine": self.name,
            "engine_version": transformers.__version__,
            "numerics": self.spec.mode.name,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "quantization": str(getattr(getattr(config, "quantization_config", None), "quant_method", None) or "none"),
            "attention": str(config._attn_implementation),
            "kv_cache_dtype": cache,
            "tensor_parallel_size": 1,
            "prefix_caching": False,
            "engine.padding_side": "left",
            **({"engine.product": self.product} if self.product else {}),
            **({"engine.round_weights": rounded} if (rounded := self.spec.options.get("round_weights")) else {}),
            **probe.torch_facts(self.device),
        }

    def encode(self, prompt: Prompt) -> list[int]:
        """Chat template with the generation prompt, where there is one; the plain text otherwise."""
        return encode(self.tokenizer, prompt)

    def decode(self, tokens: Sequence[int]) -> str:
        """Tokens as text, special tokens spelt out."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=False))

    def generate(self, batch: Sequence[Request], tick: Tick = no_tick) -> list[Output]:
        """One call of the model's own `generate` for exactly this batch."""
        self._check_vocabulary(batch)
        width = max(len(r.tokens) for r in batch)
        pad = self.model.generation_config.pad_token_id
        ids = torch.full((len(batch), width), pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(batch):
            ids[row, width - len(request.tokens) :] = torch.from_numpy(request.tokens.astype(np.int64))
            mask[row, width - len(request.tokens) :] = 1
        recorder = Recorder(batch, self.device, tick, self._logsumexp)
        with _explained(f"decoding a batch of {len(batch)}", self._memory_hint), torch.inference_mode():
            sequences = self.model.generate(
                input_ids=ids.to(self.device),
                attention_mask=mask.to(self.device),
                generation_config=self.model.generation_config,
                logits_processor=LogitsProcessorList([recorder]),
            )
            columns = recorder.columns(sequences[:, -1])
        return [
            self._output(request, new, {name: column[row] for name, column in columns.items()})
            for row, (request, new) in enumerate(zip(batch, sequences[:, width:].tolist(), strict=True))
        ]

    @contextmanager
    def sampling(self, temperature: float, top_p: float, seed: int) -> Iterator[None]:
        """`generate` samples within, from the whole vocabulary's nucleus; greedy again afterwards, and torch's state restored."""
        greedy = self.model.generation_config
        drawn = copy.deepcopy(greedy)
        drawn.update(do_sample=True, temperature=temperature, top_p=top_p, top_k=0)
        devices = [self.device] if self.device.type == "cuda" else []
        self.model.generation_config = drawn
        try:
            with torch.random.fork_rng(devices):
                torch.manual_seed(seed)
                yield
        finally:
            self.model.generation_config = greedy

    def _output(self, request: Request, new: list[int], columns: dict[str, Any]) -> Output:
        stop = next((i for i, token in enumerate(new) if token in self.eos), None)
        length = len(new) if stop is None else stop + 1
        row = {name: column[:length] for name, column in columns.items()}
        bad = np.flatnonzero(np.isnan(row["logprob"]) | np.isnan(row["gap"]))
        return Output(
            id=request.id,
            tokens=np.asarray(new[:length], np.int32),
            text=str(self.tokenizer.decode(new[:length], skip_special_tokens=True)),
            finish_reason="length" if stop is None else "stop",
            logprob=row["logprob"],
            gap=row["gap"],
            runner_up=row["runner_up"],
            reference_logprob=row.get("reference_logprob"),
            error=f"NaN in logits at token {bad[0]}" if len(bad) else "",
        )

    def replay(self, requests: Sequence[Request], tick: Tick = no_tick) -> list[Scores]:
        """All requests, batched by length."""
        return self._replay(requests, tick, REPLAY_POSITIONS)

    def replay_fp32(self, requests: Sequence[Request], tick: Tick = no_tick) -> list[Scores] | None:
        """Under LayerCast, on the model as it lies in memory; it is as before when this returns. None of a rounded one."""
        if self.emulated:
            return None
        with (
            _explained("replaying under LayerCast", self._memory_hint),
            layercast.casting(self.model, self.spec.say),
        ):
            seen = precision.observe(self.model)
            if not seen.fp32_class:
                raise EngineError(f"LayerCast is on, but the probe found {seen.compute_class}: {seen.detail}")
            return self.replay(requests, tick)

    def _check_vocabulary(self, requests: Sequence[Request]) -> None:
        """On CUDA an id beyond the vocabulary would be a device-side assertion, which no later call survives."""
        size = self.model.config.get_text_config().vocab_size
        for request in requests:
            ids = [
                a for a in (request.tokens, request.reference, request.reference_runner_up) if a is not None and len(a)
            ]
            if any(int(a.max()) >= size for a in ids):
                raise EngineError(f"prompt {request.id} or its golden has token ids beyond the vocabulary of {size}")

    def _replay(self, requests: Sequence[Request], tick: Tick, positions: int) -> list[Scores]:
        self._check_vocabulary(requests)
        scores: dict[int, Scores] = {}
        for batch in self._by_length(requests, positions):
            with _explained(f"replaying a batch of {len(batch)}", self._memory_hint), torch.inference_mode():
                for place, score in zip(batch, self._forward([requests[i] for i in batch]), strict=True):
                    scores[place] = score
            tick(sum(len(reference(requests[i])) for i in batch))
        return [scores[i] for i in range(len(requests))]

    def _by_length(self, requests: Sequence[Request], positions: int) -> Iterator[list[int]]:
        """Places of requests, longest first, as many together as positions and logits allow; never none."""
        vocabulary = self.model.config.get_text_config().vocab_size
        most = max(1, min(positions, REPLAY_LOGITS // vocabulary))
        batch: list[int] = []
        widest = 0
        for place in sorted(range(len(requests)), key=lambda i: (-length(requests[i]), i)):
            widest = max(widest, length(requests[place]))
            if batch and (len(batch) + 1) * widest > most:
                yield batch
                batch, widest = [], length(requests[place])
            batch.append(place)
        if batch:
            yield batch

    def _forward(self, batch: Sequence[Request]) -> list[Scores]:
        found = zip(batch, self._logits(batch), strict=True)
        return [score(request, logits, self._logsumexp) for request, logits in found]

    def _logits(self, batch: Sequence[Request]) -> list[torch.Tensor]:
        """What one forward pass says of each request's reference tokens, shape (T, vocabulary)."""
        width = max(length(r) for r in batch)
        first = min(len(r.tokens) for r in batch) - 1  # the position that predicts the first answer token
        ids = torch.zeros((len(batch), width), dtype=torch.long)
        for row, request in enumerate(batch):
            whole = np.concatenate([request.tokens, reference(request)]).astype(np.int64)
            ids[row, : len(whole)] = torch.from_numpy(whole)
        kept = torch.arange(first, width - 1, device=self.device)
        keeping = self._keeping(kept)
        logits = self.model(input_ids=ids.to(self.device), use_cache=False, **keeping).logits
        if not keeping:
            logits = logits[:, first : width - 1]
        starts = [len(r.tokens) - 1 - first for r in batch]
        return [
            logits[row, start : start + len(reference(r))]
            for row, (start, r) in enumerate(zip(starts, batch, strict=True))
        ]

    @contextmanager
    def in_format(self, emulation: Emulation) -> Iterator[None]:
        """A format in force on the loaded model, in the place of the mode's own numbers."""
        with _explained(f"rounding to {emulation.name}", self._memory_hint):
            emulated = Emulated(self.model, emulation)
        self.emulated, before = emulated, self.emulated
        try:
            with emulated.in_force():
                yield
        finally:
            self.emulated = before

    def departures(self, requests: Sequence[Request], tick: Tick = no_tick) -> list[Departure]:
        """Each request's reference tokens in the format that is in force, against the same weights in FP32."""
        assert self.emulated is not None, "no format is in force"
        self._check_vocabulary(requests)
        found: dict[int, Departure] = {}
        for places in self._by_length(requests, REPLAY_POSITIONS):
            batch = [requests[i] for i in places]
            with _explained(f"comparing a batch of {len(batch)}", self._memory_hint), torch.inference_mode():
                fp32 = self.references.of(batch, partial(self._logits_in_fp32, batch))
                for place, request, before, now in zip(places, batch, fp32, self._logits(batch), strict=True):
                    found[place] = departure(request, before, now)
            tick(sum(len(reference(r)) for r in batch))
        return [found[i] for i in range(len(requests))]

    def _logits_in_fp32(self, batch: Sequence[Request]) -> list[torch.Tensor]:
        assert self.emulated is not None
        with self.emulated.lifted():
            return self._logits(batch)

    def benign(self) -> Iterator[tuple[str, Callable[[Sequence[Request], Tick], list[Scores]]]]:
        """Prefill instead of decode, then that with another batch size, one thread, another attention kernel."""
        yield "replay", self.replay
        yield "replay, batch size 1", lambda requests, tick: self._replay(requests, tick, 1)
        for name, changed in self._changes():
            yield f"replay, {name}", partial(self._replay_under, changed)

    def _changes(self) -> Iterator[tuple[str, Callable[[], AbstractContextManager[None]]]]:
        """Benign changes of the loaded model."""
        if self.device.type == "cpu" and torch.get_num_threads() > 1:
            yield "1 thread", _single_thread
        if self.model.config._attn_implementation != "eager" and not self.exact:
            yield "eager attention", partial(_eager, self.model)

    def _replay_under(
        self, changed: Callable[[], AbstractContextManager[None]], requests: Sequence[Request], tick: Tick
    ) -> list[Scores]:
        with changed():
            return self.replay(requests, tick)

    def sketches(self, requests: Sequence[Request], tick: Tick = no_tick) -> Iterator[Sketch]:
        """One sequence at a time; benign changes are padding, one thread, another attention kernel."""
        yield self._sketch(requests, tick)
        yield self._sketch(requests, tick)
        yield self._sketch(requests, tick, SKETCH_PADDING)
        for _, changed in self._changes():
            with changed():
                found = self._sketch(requests, tick)
            yield found

    def _sketch(self, requests: Sequence[Request], tick: Tick = no_tick, padding: int = 0) -> Sketch:
        self._check_vocabulary(requests)
        with _explained("looking into the model", self._memory_hint), torch.inference_mode():
            return sketch_of([self._looked_at(request, tick, padding) for request in requests])

    def _looked_at(self, request: Request, tick: Tick, padding: int) -> Activations:
        rows = positions(len(request.tokens), len(reference(request)))
        whole = np.concatenate([request.tokens, reference(request)])[: rows[-1] + 1].astype(np.int64)
        ids = torch.nn.functional.pad(torch.from_numpy(whole), (0, padding))[None].to(self.device)
        with watched(self.model, rows, ids.shape[1]) as found:
            self.model(input_ids=ids, use_cache=False, **self._keeping(torch.tensor(rows, device=self.device)))
        tick(len(whole))
        return found

    def passes(self, request: Request, phase: Callable[[str, int], Tick]) -> list[Pass]:
        """Exact compute is looked at on its way through torch: its C++ nobody sees into."""
        self._check_vocabulary([request])
        ids = torch.from_numpy(request.tokens.astype(np.int64))[None].to(self.device)
        hint = "another prompt, a shorter one (--prompt), or more memory"
        with _explained("looking at every operation", lambda: hint), exact.unfused() if self.exact else nullcontext():
            return operations.passes(self.model, ids, phase)

    def _keeping(self, rows: torch.Tensor) -> dict[str, Any]:
        """The argument that has logits computed at some rows only, where the model has it."""
        has_it = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        return {"logits_to_keep": rows} if has_it else {}

    @property
    def _logsumexp(self) -> Sum:
        return exact.logsumexp if self.exact else last_logsumexp

    def _memory_hint(self) -> str | None:
        return "--repro-batch-size with a smaller number (it is a suspect then), or a device with more memory"


@contextmanager
def _single_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as exc:
        raise ConfigError(f"no such device: {exc}", where="[engine.device]") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise EngineError("the suite asks for cuda, and torch sees no CUDA device here", where="[engine.device]")
    return device


@contextmanager
def _explained(doing: str, hint: Callable[[], str | None]) -> Iterator[None]:
    """Failures of torch and transformers as `EngineError`: the harness broke, the model did not drift."""
    try:
        yield
    except (ConfigError, EngineError):
        raise
    except (torch.OutOfMemoryError, MemoryError) as exc:
        raise EngineError(f"out of memory while {doing}: {exc}", fix=hint() or "a device with more memory") from exc
    except Exception as exc:
        if "can't allocate memory" in str(exc):
            raise EngineError(
                f"out of memory while {doing}: {exc}", fix=hint() or "a machine with more memory"
            ) from exc
        raise EngineError(f"{doing} failed: {type(exc).__name__}: {exc}") from exc
