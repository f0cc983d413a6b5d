"""vLLM, offline: token ids in and out, greedy, in processes of its own.

vLLM replaces functions of torch in the process that holds the model, so that must not be this one: the engine runs in
vLLM's worker processes, where `vllm_worker.Observer` looks on. A batch is put into a paused scheduler and then let go,
so that which sequences share a step depends on the batch and on the scheduling limits, and not on when they arrived.

Replay is `prompt_logprobs` on prompt and golden tokens: one prefill.
"""

from __future__ import annotations

import gc
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, EngineError
from ..fingerprint import Fingerprint
from ..generation import Output, Request, Scores, digest
from ..numerics import layercast
from ..precision import Observation
from ..sketch import Sketch
from ..suite import Prompt
from . import vllm_answers, vllm_process
from .base import VLLM_OPTIONS, Engine, Spec, Tick, no_tick
from .tokenizer import encode, eos, load_tokenizer

TESTED = "0.32"
"""The minor version that the tests run."""

PASSED_THROUGH = tuple(name for name in VLLM_OPTIONS if name != "round_weights")
"""Arguments of `vllm.LLM` under the same name."""

EXECUTORS = ("mp", "ray", "uni")
"""Values of `distributed_executor_backend`. vLLM would import any other, and a suite is data from a pull request."""

TOP = 20
"""Log-probabilities asked for at each position, vLLM's own most: a golden's token beyond them has an unknown deficit."""
CPU_KV_CACHE = 2**30
"""Bytes of KV cache on a CPU, where vLLM would take nearly all memory."""


@contextmanager
def open_engine(spec: Spec) -> Iterator[Engine]:
    """Start vLLM with the model; its processes end with the context, and this process's environment is as before.

    Raises:
        EngineError: vLLM is too old, or could not start; with the cause, and where its log lies.
        ConfigError: an option that vLLM does not take.
    """
    assert spec.model is not None, "the vllm engine needs a model"
    if spec.mode.storage == "exact":
        fix = 'engine = "transformers", or the numerics mode layercast'
        raise ConfigError("vLLM has no exact compute", where="numerics", fix=fix)
    executor = spec.options.get("distributed_executor_backend", EXECUTORS[0])
    if executor not in EXECUTORS:
        raise ConfigError(
            f"distributed_executor_backend is one of {', '.join(EXECUTORS)}, not {executor!r}",
            where=f"{spec.folder} [engine.distributed_executor_backend]",
        )
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="pytest-repro-vllm-") as folder:
        log = Path(folder) / "vllm.log"
        try:
            os.environ.update(vllm_process.environment(spec, log))
            engine = _started(spec, log)
            try:
                yield engine
            finally:
                engine.close()
        finally:
            os.environ.clear()
            os.environ.update(before)


def _started(spec: Spec, log: Path) -> VllmEngine:
    try:
        import vllm
    except ImportError as exc:
        raise EngineError(
            f"vLLM cannot be imported: {exc}",
            where="engine vllm",
            fix="pip install 'pytest-repro[vllm]'; without a GPU see docs/engines.md",
        ) from exc
    version = str(vllm.__version__)
    _check_version(version, spec.say)
    try:
        return VllmEngine(spec, vllm, version, log)
    except (ConfigError, EngineError):
        raise
    except Exception as exc:
        cause, mend = vllm_process.cause(log)
        raise EngineError(
            f"vLLM {version} could not start: {cause or f'{type(exc).__name__}: {exc}'}",
            where="engine vllm",
            fix=mend or vllm_process.kept_log(log),
        ) from exc


def _check_version(version: str, say: Callable[[str], None]) -> None:
    """Refuse what lacks the interface, and say what was not tested."""
    found = re.match(r"(\d+)\.(\d+)", version)
    numbers = (int(found[1]), int(found[2])) if found else (0, 0)
    tested = tuple(int(part) for part in TESTED.split("."))
    if numbers < tested:
        raise EngineError(
            f"vLLM {version} is not supported: {TESTED} is the least",
            where="engine vllm",
            fix=f"pip install 'vllm>={TESTED},<0.{tested[1] + 1}'",
        )
    if numbers > tested:
        say(f"vLLM {version} is newer than {TESTED}, the version that was tested: pip install 'vllm=={TESTED}.*'")


class VllmEngine:
    """A running vLLM."""

    name = "vllm"
    text_only = False
    replays = True

    def __init__(self, spec: Spec, vllm: Any, version: str, log: Path) -> None:
        assert spec.model is not None
        self.log = log
        self.spec = spec
        self.vllm = vllm
        self.version = version
        path = str(spec.model.path)
        self.tokenizer = load_tokenizer(path)
        self.eos = eos(_generation_config(path), self.tokenizer)
        self.cpu = bool(_platform().is_cpu())
        if spec.mode.storage == "layercast":
            self._prepare()
        spec.say(f"vLLM {version} starts, in processes of its own")
        self.llm = self._open(path)
        self.config = self.llm.llm_engine.vllm_config
        # One less than vLLM's: after whatever is scored, one token is always generated.
        self.context_length: int | None = int(self.config.model_config.max_model_len) - 1
        self._recommend()
        try:
            self._call("repro_enter", spec.mode.name)
        except BaseException:
            self.close()
            raise

    def _recommend(self) -> None:
        """Name vLLM's own remedy where the hardware has it: compute capability 8.0 and later, as vLLM documents."""
        if self.spec.mode.compute_class == "fp32" or os.environ.get("VLLM_BATCH_INVARIANT", "0") == "1":
            return
        if _platform().is_cuda() and _platform().has_device_capability(80):
            self.spec.say("VLLM_BATCH_INVARIANT=1 would make these outputs independent of the batch (beta in vLLM)")

    def _prepare(self) -> None:
        """Compile LayerCast's product once, in sight, rather than in every worker."""
        if self.cpu:
            import torch

            layercast.prepare(torch.device("cpu"), self.spec.say)

    def _open(self, path: str) -> Any:
        try:
            return self.vllm.LLM(model=path, **self._arguments())
        except (TypeError, ValueError) as exc:
            said = str(exc)
            given = [
                name
                for name, value in self.spec.options.items()
                if name in PASSED_THROUGH
                and (name in said.replace(" ", "_") or (isinstance(value, str) and repr(value) in said))
            ]
            if given:
                raise ConfigError(
                    f"vLLM refuses it: {vllm_process.of_validation(said)}", where=f"[engine.{given[0]}]"
                ) from exc
            raise

    def _arguments(self) -> dict[str, Any]:
        """Arguments of `vllm.LLM`: what keeps a run repeatable and safe, then the suite's own options."""
        options = {name: value for name, value in self.spec.options.items() if name in PASSED_THROUGH}
        mode = self.spec.mode
        assert self.spec.model is not None
        arguments = {
            "dtype": mode.dtype or _dtype_of(str(self.spec.model.path)),
            "enforce_eager": True,
            "enable_prefix_caching": False,  # or what was asked before would decide what is computed
            "seed": 0,
            "generation_config": "vllm",  # not the model's own sampling defaults
            "load_format": "safetensors",  # never a pickle
            "trust_remote_code": False,
            "skip_tokenizer_init": True,
            "use_tqdm_on_load": False,
            "max_logprobs": TOP,
            "logprobs_mode": "raw_logprobs",
            "worker_extension_cls": "pytest_repro.engines.vllm_worker.Observer",
            **({"kv_cache_memory_bytes": CPU_KV_CACHE} if self.cpu else {}),
            **options,
        }
        if mode.storage == "layercast":
            arguments["quantization"] = "layercast"
            if rounded := self.spec.options.get("round_weights"):
                arguments["hf_overrides"] = {
                    "quantization_config": {"quant_method": "layercast", "round_weights": rounded}
                }
        return arguments

    def close(self) -> None:
        """End vLLM's processes."""
        client = self.llm.llm_engine.engine_core
        with suppress(Exception):  # whatever is wrong with them, they are to end
            client.shutdown()
        with suppress(Exception):
            client.ctx.destroy(linger=0)  # vLLM leaves its sockets' context to the garbage collector, which complains
        del self.llm
        gc.collect()

    def _call(self, method: str, *arguments: Any) -> list[Any]:
        """A method of `Observer` in every worker."""
        with self._explained(method):
            return [json.loads(answer) for answer in self.llm.collective_rpc(method, args=arguments)]

    @contextmanager
    def _explained(self, doing: str) -> Iterator[None]:
        try:
            yield
        except (ConfigError, EngineError):
            raise
        except Exception as exc:
            cause, mend = vllm_process.cause(self.log)
            raise EngineError(
                f"vLLM, {doing}: {cause or f'{type(exc).__name__}: {vllm_process.first_line(exc)}'}",
                fix=mend or (vllm_process.kept_log(self.log) if cause else ""),
            ) from exc

    def observe(self) -> Observation:
        """The worst that any worker shows: of its layers under crafted operands, and while one prompt is run."""
        seen = self._call("repro_layers")
        self._call("repro_watch")
        try:
            with self._explained("watching a prompt"):
                self._run([self._prompt(list(range(8)), 1)], no_tick)
        except EngineError:
            with suppress(EngineError):  # of a vLLM that is gone, what ended it is what counts
                self._call("repro_watched")
            raise
        watched = self._call("repro_watched")
        found = [Observation(**row) for rank in (*seen, *watched) for row in rank]
        if not found:
            return Observation("unknown", 0.0, 0.0, "vLLM showed no layer that can be probed")
        return worst(found)

    def facts(self) -> Fingerprint:
        """What is in force, as vLLM resolved it, and as the process of the first rank sees its machine."""
        assert self.spec.model is not None
        config = self.config
        (first, *_) = self._call("repro_facts")
        scheduler, parallel, cache = config.scheduler_config, config.parallel_config, config.cache_config
        return {
            **self.spec.model.identity,
            "generation": digest({"greedy": True, "max_new_tokens": self.spec.max_new_tokens, "eos": self.eos}),
            "engine": self.name,
            "engine_version": self.version,
            "numerics": self.spec.mode.name,
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "quantization": str(config.model_config.quantization or "none"),
            "tensor_parallel_size": parallel.tensor_parallel_size,
            "prefix_caching": bool(cache.enable_prefix_caching),
            "engine.pipeline_parallel_size": parallel.pipeline_parallel_size,
            "engine.data_parallel_size": parallel.data_parallel_size,
            "engine.executor": str(parallel.distributed_executor_backend),
            "engine.max_num_seqs": scheduler.max_num_seqs,
            "engine.max_num_batched_tokens": scheduler.max_num_batched_tokens,
            "engine.chunked_prefill": bool(scheduler.enable_chunked_prefill),
            "engine.async_scheduling": bool(scheduler.async_scheduling),
            "engine.block_size": cache.block_size,
            "engine.enforce_eager": bool(config.model_config.enforce_eager),
            "engine.compilation": str(config.compilation_config.mode),
            "engine.batch_invariant": os.environ.get("VLLM_BATCH_INVARIANT", "0") == "1",
            **({"engine.round_weights": rounded} if (rounded := self.spec.options.get("round_weights")) else {}),
            **first,
        }

    def encode(self, prompt: Prompt) -> list[int]:
        """Chat template with the generation prompt, where there is one; the plain text otherwise."""
        return encode(self.tokenizer, prompt)

    def decode(self, tokens: Sequence[int]) -> str:
        """Tokens as text, special tokens spelt out."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=False))

    def generate(self, batch: Sequence[Request], tick: Tick = no_tick) -> list[Output]:
        """The batch enters the scheduler as a whole."""
        able = [r for r in batch if not self._refusal(r)]
        watched = any(r.reference is not None for r in able)
        with self._explained(f"decoding a batch of {len(able)}"):
            asked = [
                self._prompt(r.tokens.tolist(), self.spec.max_new_tokens, logprobs=TOP if watched else 2) for r in able
            ]
            done = self._run(asked, lambda n: tick(n * self.spec.max_new_tokens))
        answers = {
            r.id: vllm_answers.output(r, answer.outputs[0], self.tokenizer)
            for r, answer in zip(able, done, strict=True)
        }
        nothing = np.zeros(0, np.int32)
        return [answers.get(r.id) or Output(r.id, nothing, "", "stop", error=self._refusal(r)) for r in batch]

    def _refusal(self, request: Request) -> str:
        """Why vLLM would refuse a prompt, and all that were asked with it; empty if it would not."""
        size = self.config.model_config.get_vocab_size()
        ids = [a for a in (request.tokens, request.reference) if a is not None and len(a)]
        if any(int(a.max()) >= size for a in ids):
            return f"the prompt or its golden has token ids beyond the vocabulary of {size}"
        return ""

    def _prompt(self, tokens: list[int], max_tokens: int, **more: Any) -> tuple[dict[str, Any], Any]:
        parameters = self.vllm.SamplingParams(
            temperature=0.0,
            max_tokens=max_tokens,
            stop_token_ids=self.eos,
            ignore_eos=True,  # the ids above are all that ends a text
            detokenize=False,
            flat_logprobs=True,
            **more,
        )
        return {"prompt_token_ids": tokens}, parameters

    def _run(self, asked: Sequence[tuple[dict[str, Any], Any]], done: Callable[[int], None]) -> list[Any]:
        """Answers in the order of what was asked."""
        if not asked:
            return []
        self.llm.sleep(level=0, mode="keep")
        names = self.llm.enqueue([p for p, _ in asked], [s for _, s in asked], use_tqdm=False)
        self.llm.wake_up(tags=["scheduling"])
        found = self.llm.wait_for_completion(use_tqdm=lambda **_: _Bar(done))
        by_name = {answer.request_id: answer for answer in found}
        return [by_name[name.partition("-")[0]] for name in names]  # vLLM appends a suffix of its own

    def replay(self, requests: Sequence[Request], tick: Tick = no_tick) -> list[Scores]:
        """All requests at once: vLLM forms the batches."""
        return self._replay([list(requests)], tick)

    def _replay(self, batches: Sequence[Sequence[Request]], tick: Tick) -> list[Scores]:
        scores = []
        for batch in batches:
            able = [r for r in batch if not self._unscorable(r)]
            with self._explained(f"replaying {len(able)} prompts"):
                done = self._run([self._scored(r) for r in able], _sharing(tick, able))
            found = {r.id: vllm_answers.scored(r, answer.prompt_logprobs) for r, answer in zip(able, done, strict=True)}
            scores += [found.get(r.id) or vllm_answers.unscored(r, self._unscorable(r)) for r in batch]
        return scores

    def _unscorable(self, request: Request) -> str:
        """Why a prompt cannot be replayed; empty if it can."""
        if request.reference is None:
            raise EngineError(f"prompt {request.id}: nothing to replay")
        length = len(request.tokens) + len(request.reference)
        if self.context_length is not None and length > self.context_length:
            return f"prompt and golden have {length} tokens, vLLM can score {self.context_length}: see max_model_len"
        return self._refusal(request)

    def _scored(self, request: Request) -> tuple[dict[str, Any], Any]:
        assert request.reference is not None
        return self._prompt([*request.tokens.tolist(), *request.reference.tolist()], 1, prompt_logprobs=TOP)

    def replay_fp32(self, requests: Sequence[Request], tick: Tick = no_tick) -> list[Scores] | None:
        """vLLM cannot recast a model that it has loaded."""
        return None

    def sketches(self, requests: Sequence[Request], tick: Tick = no_tick) -> Iterator[Sketch]:
        """vLLM joins modules that the model has apart; nothing looks into them yet."""
        return iter(())

    def benign(self) -> Iterator[tuple[str, Callable[[Sequence[Request], Tick], list[Scores]]]]:
        """Prefill instead of decode, then that one prompt after the other."""
        yield "replay", self.replay
        yield "replay, batch size 1", lambda requests, tick: self._replay([[r] for r in requests], tick)


def _platform() -> Any:
    from vllm.platforms import current_platform

    return current_platform


def _sharing(tick: Tick, batch: Sequence[Request]) -> Callable[[int], None]:
    """Ticks for prompts that are done, each with its share of the batch's golden tokens."""
    share = sum(len(r.reference) for r in batch if r.reference is not None) / max(len(batch), 1)
    return lambda prompts: tick(round(prompts * share))


def worst(found: Sequence[Observation]) -> Observation:
    """What counts of several observations: precision that was seen to be lost, then what was not seen, then FP32."""
    return min(found, key=lambda o: (o.fp32_class, o.compute_class == "unknown", o.product_bits, o.sum_bits))


class _Bar:
    """What vLLM takes for a progress bar."""

    n = 0
    postfix = ""
    format_dict: dict[str, Any] = {"elapsed": 1.0}  # noqa: RUF012

    def __init__(self, done: Callable[[int], None]) -> None:
        self.done = done

    def update(self, n: int = 1) -> None:
        """So many prompts more are answered."""
        self.done(n)

    def close(self) -> None:
        """Nothing."""

    def refresh(self) -> None:
        """Nothing."""


def _generation_config(path: str) -> Any:
    """The model's generation settings, of which only what ends a text is used."""
    from transformers import AutoConfig, GenerationConfig

    try:
        return GenerationConfig.from_pretrained(path)
    except OSError:
        return GenerationConfig.from_model_config(AutoConfig.from_pretrained(path, trust_remote_code=False))


def _dtype_of(path: str) -> str:
    """The checkpoint's own dtype: vLLM's `auto` would compute a float32 checkpoint in 16 bits."""
    from transformers import AutoConfig

    found = getattr(AutoConfig.from_pretrained(path, trust_remote_code=False).get_text_config(), "dtype", None)
    return "auto" if found is None else str(found).removeprefix("torch.")
