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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, EngineError
from ..fingerprint import Fingerprint
from ..generation import Output, Request, Scores, digest
from ..numerics import layercast
from ..precision import Observation
from ..suite import Prompt
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
FEW_CORES = 4
"""CPUs on which the worker gets every core."""
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
            os.environ.update(_environment(spec, log))
            engine = _started(spec, log)
            try:
                yield engine
            finally:
                engine.close()
        finally:
            os.environ.clear()
            os.environ.update(before)


def _environment(spec: Spec, log: Path) -> dict[str, str]:
    """What vLLM's processes must find set, since they read it while they start."""
    config = log.with_suffix(".json")
    config.write_text(json.dumps(_log_to(log)), "utf-8")
    chosen = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CONFIGURE_LOGGING": "1",
        "VLLM_LOGGING_CONFIG_PATH": str(config),
    }
    if spec.options.get("enforce_eager", True):
        chosen["TORCH_COMPILE_DISABLE"] = "1"  # helpers of the sampler are compiled otherwise, for half a minute
    if spec.mode.compute_class == "fp32":
        chosen |= {"VLLM_FLOAT32_MATMUL_PRECISION": "highest", "TRITON_F32_DEFAULT": "ieee"}
    return chosen | _all_of_few_cores(spec.options)


def _all_of_few_cores(options: Mapping[str, Any]) -> dict[str, str]:
    """Every core to the worker, on a CPU with few of them. What the user has set stands.

    vLLM keeps one for its scheduler, which only waits while a batch runs: of two cores that is half the machine.
    """
    set_already = {"VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_NUM_OF_RESERVED_CPU"} & set(os.environ)
    several = any(options.get(f"{kind}_parallel_size", 1) != 1 for kind in ("tensor", "pipeline", "data"))
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if set_already or several or not 1 < len(cores) <= FEW_CORES:
        return {}
    return {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores))}


def _log_to(log: Path) -> dict[str, Any]:
    """A logging configuration: everything into one file, nothing into pytest's output."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"plain": {"format": "%(levelname)s %(message)s"}},
        "handlers": {"file": {"class": "logging.FileHandler", "filename": str(log), "formatter": "plain"}},
        "loggers": {"vllm": {"handlers": ["file"], "level": "INFO", "propagate": False}},
    }


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
        cause, mend = _cause(log)
        raise EngineError(
            f"vLLM {version} could not start: {cause or f'{type(exc).__name__}: {exc}'}",
            where="engine vllm",
            fix=mend or _kept(log),
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


def _kept(log: Path) -> str:
    """Where the log lies now, out of the folder that is about to go; empty if there is none."""
    if not log.exists():
        return ""
    descriptor, name = tempfile.mkstemp(prefix="pytest-repro-vllm-", suffix=".log")
    os.write(descriptor, log.read_bytes())
    os.close(descriptor)
    return f"its log: {name}"


def _cause(log: Path) -> tuple[str, str]:
    """The first exception that a process of vLLM wrote down, since those after it follow from it; and what mends it.

    The second is said where it is an error of this package's own, raised in a worker.
    """
    lines = log.read_text("utf-8", "replace").splitlines() if log.exists() else []
    for place, line in enumerate(lines):
        if found := re.match(r"(?:ERROR )?((?:\w+\.)*\w*(?:Error|Exception): .+)", line):
            after = lines[place + 1] if place + 1 < len(lines) else ""
            mend = after.partition("mend: ")[2] if after.startswith("  mend: ") else ""
            return re.sub(r"^pytest_repro\.errors\.\w+: ", "", found[1]), mend
    return "", ""


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
                raise ConfigError(f"vLLM refuses it: {_of_validation(said)}", where=f"[engine.{given[0]}]") from exc
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
            cause, mend = _cause(self.log)
            raise EngineError(
                f"vLLM, {doing}: {cause or f'{type(exc).__name__}: {_first_line(exc)}'}",
                fix=mend or (_kept(self.log) if cause else ""),
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
        answers = {r.id: self._output(r, answer.outputs[0]) for r, answer in zip(able, done, strict=True)}
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

    def _output(self, request: Request, answer: Any) -> Output:
        tokens = np.asarray(answer.token_ids, np.int32)
        rows = [_best(answer.logprobs, i) for i in range(len(tokens))]
        chosen = np.array([row.get(int(token), np.nan) for row, token in zip(rows, tokens, strict=True)], np.float32)
        rivals = [_runner_up(row, int(token)) for row, token in zip(rows, tokens, strict=True)]
        bad = np.flatnonzero(np.isnan(chosen))
        return Output(
            id=request.id,
            tokens=tokens,
            text=str(self.tokenizer.decode(tokens.tolist(), skip_special_tokens=True)),
            finish_reason="stop" if answer.finish_reason == "stop" else "length",
            logprob=chosen,
            gap=np.array([max(c - lp, 0.0) for c, (_, lp) in zip(chosen, rivals, strict=True)], np.float32),
            runner_up=np.array([token for token, _ in rivals], np.int32),
            reference_logprob=_watched(request, rows),
            error=_broken(answer.finish_reason, bad),
        )

    def replay(self, requests: Sequence[Request], tick: Tick = no_tick) -> list[Scores]:
        """All requests at once: vLLM forms the batches."""
        return self._replay([list(requests)], tick)

    def _replay(self, batches: Sequence[Sequence[Request]], tick: Tick) -> list[Scores]:
        scores = []
        for batch in batches:
            able = [r for r in batch if not self._unscorable(r)]
            with self._explained(f"replaying {len(able)} prompts"):
                done = self._run([self._scored(r) for r in able], _sharing(tick, able))
            found = {r.id: _score(r, answer.prompt_logprobs) for r, answer in zip(able, done, strict=True)}
            scores += [found.get(r.id) or _unscored(r, self._unscorable(r)) for r in batch]
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


def _best(flat: Any, position: int) -> dict[int, float]:
    """Token id -> log-probability, of those that vLLM gave for a position."""
    span = slice(flat.start_indices[position], flat.end_indices[position])
    return dict(zip(flat.token_ids[span], flat.logprobs[span], strict=True))


def _runner_up(row: dict[int, float], token: int) -> tuple[int, float]:
    """The best token beside one, and its log-probability; (-1, NaN) if vLLM gave none."""
    others = [(lp, -t) for t, lp in row.items() if t != token]
    if not others:
        return -1, float("nan")
    lp, negative = max(others)
    return -negative, lp


def _watched(request: Request, rows: Sequence[dict[int, float]]) -> Any:
    """The golden's tokens' log-probability at each step; NaN beyond its end, or where it is not among the best."""
    if request.reference is None:
        return None
    tokens = request.reference.tolist()
    found = [row.get(tokens[i], np.nan) if i < len(tokens) else np.nan for i, row in enumerate(rows)]
    return np.array(found, np.float32)


def _score(request: Request, flat: Any) -> Scores:
    """Numbers of one replayed prompt from vLLM's prompt log-probabilities."""
    assert request.reference is not None
    tokens, start = request.reference.tolist(), len(request.tokens)
    rivals = request.reference_runner_up.tolist() if request.reference_runner_up is not None else [-1] * len(tokens)
    rows = [_best(flat, start + i) for i in range(len(tokens))]
    own = np.array([row.get(token, np.nan) for row, token in zip(rows, tokens, strict=True)], np.float64)
    top = [_top(row, token) for row, token in zip(rows, tokens, strict=True)]
    rival = np.array([row.get(r, np.nan) for row, r in zip(rows, rivals, strict=True)], np.float64)
    bad = np.flatnonzero(np.isnan(own))
    return Scores(
        id=request.id,
        logprob=own.astype(np.float32),
        deficit=(np.array([lp for _, lp in top]) - own).astype(np.float32),
        top=np.array([token for token, _ in top], np.int32),
        gap=(own - rival).astype(np.float32),
        error=f"NaN in log-probabilities at token {bad[0]}" if len(bad) else "",
    )


def _unscored(request: Request, why: str) -> Scores:
    count = 0 if request.reference is None else len(request.reference)
    unknown = np.full(count, np.nan, np.float32)
    return Scores(request.id, unknown, unknown, np.full(count, -1, np.int32), unknown, error=why)


def _broken(finish_reason: str | None, bad: Any) -> str:
    """Why an answer is none; empty if it is one."""
    if finish_reason not in ("stop", "length"):
        return f"vLLM ended the answer: {finish_reason}"
    return f"NaN in log-probabilities at token {bad[0]}" if len(bad) else ""


def _top(row: dict[int, float], golden: int) -> tuple[int, float]:
    """The best token and its log-probability; among equals the golden's own, since greedy decoding may take any."""
    return max(row.items(), key=lambda item: (item[1], item[0] == golden))


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


def _of_validation(said: str) -> str:
    """What pydantic says is wrong, without its count of errors and its link."""
    stripped = (line.partition(" [type=")[0].strip() for line in said.splitlines())
    lines = [line for line in stripped if line and "errors.pydantic.dev" not in line]
    return " ".join(lines[1:] if "validation error" in lines[0] else lines)


def _first_line(exc: BaseException) -> str:
    return next((line for line in str(exc).splitlines() if line.strip()), type(exc).__name__)
