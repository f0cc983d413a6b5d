"""Any server that speaks OpenAI's HTTP API: vLLM with token ids and log-probabilities, others by their text.

What a server can do is asked once, when the engine is opened, and evidence counts for more than names: a server that
answers token ids with token ids and log-probabilities is checked by them, one that gives `prompt_logprobs` replays, and
of any other only the text is compared, as `engines.function` does. Prompts are tokenised by the server, so that neither
the model's files nor torch are needed here. A server's numerics are only claimed; what shows from outside is `observe`d.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, Generic, TypeVar

import numpy as np

from ..errors import ConfigError, EngineError
from ..fingerprint import UNOBSERVED, Fingerprint
from ..generation import Output, Request, Scores, digest
from ..precision import Observation
from ..suite import Prompt
from ..text import inert
from . import journal, openai_answers, openai_client, outside
from .base import Engine, Spec, Tick, no_tick
from .journal import Journal
from .openai_answers import Malformed
from .openai_client import Server, Unanswered

MOST_AT_ONCE = 64
"""Requests in flight, unless `concurrency` says otherwise."""
MOST_LOGPROBS = (20, 5)
"""Log-probabilities asked for at each token: vLLM's own limit, or OpenAI's."""
GREEDY = {"temperature": 0, "seed": 0, "n": 1, "stream": False}
NEUTRAL = {
    "top_p": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "add_special_tokens": False,
    "return_token_ids": True,
    "return_tokens_as_token_ids": True,
}
"""vLLM takes what is not said from the model's generation_config.json, penalties too, which greedy decoding has none of."""
OBSERVED_TOKENS = 24
ALIKE = 0.1
"""Mean nats by which an answer that is asked for again may differ from the one that an interrupted run left."""

_HELLO = "Name the days of the week."
_KINDS = {
    "vllm": ("vllm", "/version", "version"),
    "sglang": ("sglang", "/get_server_info", "version"),
    "llamacpp": ("llama.cpp", "/props", "build_info"),
}
"""`owned_by` of a listed model -> (server, where its version stands)."""

Answer = TypeVar("Answer", Output, Scores)


@dataclass(frozen=True)
class Settings:
    """The options of `[engine.openai]`, checked."""

    base_url: Any
    send_key: bool
    model: str | None
    concurrency: int | None
    timeout: float
    retries: int
    backoff: float


@dataclass(frozen=True)
class Identity:
    """What a server says that it is; it must not change during a run."""

    model: str
    listed: str
    """What it lists of the model, as JSON."""
    kind: str
    version: str


@dataclass(frozen=True)
class Abilities:
    """What a server was seen to do."""

    chat: bool
    """Whether it renders chat messages."""
    tokens: bool
    """Whether it takes and gives token ids, with log-probabilities."""
    logprobs: int
    """Log-probabilities that it gives at each token."""
    replays: bool
    limit_name: str
    """How it wants the number of tokens to be called, where only text is known."""
    answers_as: tuple[str, str]
    """`model` and `system_fingerprint` of its answers."""


@contextmanager
def open_engine(spec: Spec) -> Iterator[Engine]:
    """Find out what the server can do."""
    settings = _settings(spec)
    key = openai_client.key_from_environment()
    if key and not settings.send_key:
        spec.say("the API key is not sent: the suite named the address; name it with --repro-engine-option base_url=…")
    server = Server(
        settings.base_url,
        key if settings.send_key else "",
        timeout=settings.timeout,
        retries=settings.retries,
        backoff=settings.backoff,
    )
    try:
        identity = _identity(server, settings.model)
        can = _abilities(server, identity.model)
        _tell(spec, can)
        question = [str(settings.base_url), vars(identity), vars(can), str(spec.folder), spec.mode.name]
        left = Journal(question, spec.say)
        engine = OpenAIEngine(server, identity, can, left, spec, settings)
        complete = False
        try:
            yield engine
            complete = not engine.failures
        finally:
            left.close(complete)
    finally:
        server.close()


def _settings(spec: Spec) -> Settings:
    options, where = spec.options, f"{spec.folder} [engine.openai]"
    environment = os.environ.get(openai_client.ADDRESS_VARIABLE, "")
    text = options.get("base_url") or environment
    if not isinstance(text, str) or not text:
        raise ConfigError(
            "no server was named",
            where=where,
            fix=f"--repro-engine-option base_url=http://127.0.0.1:8000/v1, or {openai_client.ADDRESS_VARIABLE}",
        )
    url = openai_client.address(text, f"{where} base_url")
    model = options.get("model")
    if model is not None and not isinstance(model, str):
        raise ConfigError(f"{model!r} is not a model's name", where=f"{where} model")
    # A suite is data from a pull request: a key goes where the user said, or stays on this machine.
    users = "base_url" in spec.from_user or text.rstrip("/") == environment.rstrip("/")
    return Settings(
        base_url=url,
        send_key=users or openai_client.is_loopback(url),
        model=model,
        concurrency=int(_number(options, "concurrency", 0, whole=True, least=1)) or None,
        timeout=_number(options, "timeout", 600.0, least=0.01),
        retries=int(_number(options, "retries", 5, whole=True, most=100)),
        backoff=_number(options, "backoff", 1.0),
    )


def _number(
    options: Mapping[str, Any], name: str, default: float, *, whole: bool = False, least: float = 0, most: float = 1e5
) -> float:
    value = options.get(name)
    if value is None:
        return default
    kind = int if whole else (int, float)
    if not isinstance(value, kind) or isinstance(value, bool) or not least <= value <= most:
        wanted = "a whole number" if whole else "a number"
        raise ConfigError(f"{value!r} is not {wanted} from {least:g} to {most:g}", where=f"[engine.openai] {name}")
    return float(value)


def _tell(spec: Spec, can: Abilities) -> None:
    if not can.tokens:
        spec.say(
            "this server shows no token ids with log-probabilities: only texts are compared, no rounding is judged"
        )
    elif not can.replays:
        spec.say("this server gives no prompt_logprobs: prompts are decoded, and none can be replayed")


# --- what the server is ----------------------------------------------------------------------------------------------


def _identity(server: Server, wanted: str | None, attempts: int | None = None) -> Identity:
    """Which model it serves, and what it says of itself.

    Raises:
        ConfigError: the model is not served, or several are and none was named.
        EngineError: the server cannot be reached.
    """
    listed = _listed(server, attempts)
    if wanted is None and len(listed) != 1:
        raise ConfigError(
            f"the server lists {len(listed)} models: {_names(listed)}", where="[engine.openai] model", fix="name one"
        )
    name = wanted or next(iter(listed))
    if listed and name not in listed:
        raise ConfigError(
            f"the server does not serve {name!r}; it lists {_names(listed)}", where="[engine.openai] model"
        )
    card = listed.get(name, {})
    kind, path, field = _KINDS.get(str(card.get("owned_by")), ("unknown", "/version", "version"))
    # `created` is left out: vLLM gives the time of the question.
    kept = {field: card.get(field) for field in ("id", "owned_by", "root", "max_model_len")}
    return Identity(name, json.dumps(kept, sort_keys=True), kind, _version(server, path, field, attempts))


def _listed(server: Server, attempts: int | None) -> dict[str, dict[str, Any]]:
    try:
        rows = server.get("models", attempts).get("data")
    except Unanswered as exc:
        if exc.status in (404, 405, 501):
            return {}
        raise EngineError(exc.what, fix="is the server up, and is base_url the one that ends in /v1?") from None
    found = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return {row["id"]: row for row in found if isinstance(row.get("id"), str)}


def _names(listed: Mapping[str, Any]) -> str:
    return ", ".join(sorted(listed)[:20]) or "none"


def _version(server: Server, path: str, field: str, attempts: int | None) -> str:
    try:
        found = server.get(path, attempts).get(field)
    except Unanswered as exc:
        if exc.status is None or exc.status in (408, 429) or exc.status >= 500:
            raise
        return ""  # a server that has no such page, or shows it to nobody
    return inert(str(found))[:80] if isinstance(found, str | int | float) else ""


def _abilities(server: Server, model: str) -> Abilities:
    """Ask for everything that is wanted, and look at what came."""
    tokenised = _tokenised(server, model)
    if tokenised is not None:
        chat, tokens = tokenised
        probe = Request("probe", np.asarray(tokens, np.int32), _HELLO)
        for logprobs in MOST_LOGPROBS:
            try:
                data = server.post("completions", _completion(model, probe, 1, logprobs))
                openai_answers.output(probe, data, 1)
            except Unanswered as exc:
                _raise_unless_refused(exc)
            except Malformed:
                break
            else:
                replays = _replays(server, model, probe, logprobs)
                return Abilities(chat, True, logprobs, replays, "max_tokens", _answers_as(data))
    return _text_abilities(server, model)


def _raise_unless_refused(exc: Unanswered) -> None:
    """A server that cannot do a thing refuses it; one that is down, or wants a key, has told nothing of what it can do."""
    if exc.status is None or exc.status in (401, 403, 429) or exc.status >= 500:
        raise exc


def _tokenised(server: Server, model: str) -> tuple[bool, list[int]] | None:
    """(whether chat messages are rendered, token ids of a prompt); None if the server tokenises nothing."""
    for chat in (True, False):
        try:
            return chat, _token_ids(server.post("/tokenize", _tokenize(model, _HELLO, chat)))
        except Unanswered as exc:
            _raise_unless_refused(exc)  # refused: a model without a chat template, or a server without a tokenizer
        except Malformed:
            return None
    return None


def _replays(server: Server, model: str, probe: Request, logprobs: int) -> bool:
    try:
        data = server.post("completions", _replay(model, probe, probe.tokens.tolist(), logprobs))
        return len(openai_answers.prompt_rows(data, len(probe.tokens))) > 1
    except Unanswered as exc:
        _raise_unless_refused(exc)
    except Malformed:
        pass
    return False


def _text_abilities(server: Server, model: str) -> Abilities:
    refused: Unanswered | None = None
    for chat in (True, False):
        for limit in ("max_tokens", "max_completion_tokens"):
            try:
                data = server.post(*_text_request(model, _HELLO, chat, limit, 1))
                return Abilities(chat, False, 0, False, limit, _answers_as(data))
            except Unanswered as exc:
                _raise_unless_refused(exc)
                refused = refused or exc
    raise EngineError(f"the server answers neither chats nor completions: {refused.what if refused else ''}")


def _answers_as(data: Mapping[str, Any]) -> tuple[str, str]:
    return str(data.get("model")), str(data.get("system_fingerprint"))


# --- what it is asked ------------------------------------------------------------------------------------------------


def _messages(content: str | list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}] if isinstance(content, str) else content


def _tokenize(model: str, content: str | list[dict[str, str]], chat: bool) -> dict[str, Any]:
    asked = {"messages": _messages(content), "add_generation_prompt": True} if chat else {"prompt": content}
    return {"model": model, **asked}


def _token_ids(data: Mapping[str, Any]) -> list[int]:
    tokens = data.get("tokens")
    if not isinstance(tokens, list) or not tokens or not all(type(t) is int and 0 <= t < 2**31 for t in tokens):
        raise Malformed("the server's tokenizer gave no token ids")
    return tokens


def _completion(model: str, request: Request, max_new_tokens: int, logprobs: int) -> dict[str, Any]:
    asked = {"model": model, "prompt": request.tokens.tolist(), "max_tokens": max_new_tokens, "logprobs": logprobs}
    return {**asked, **GREEDY, **NEUTRAL}


def _replay(model: str, request: Request, prompt: list[int], logprobs: int) -> dict[str, Any]:
    return {**_completion(model, request, 1, 1), "prompt": prompt, "prompt_logprobs": logprobs}


def _text_request(
    model: str, content: str | list[dict[str, str]], chat: bool, limit: str, max_new_tokens: int
) -> tuple[str, dict[str, Any]]:
    if chat:
        return "chat/completions", {"model": model, "messages": _messages(content), limit: max_new_tokens, **GREEDY}
    return "completions", {"model": model, "prompt": content, limit: max_new_tokens, **GREEDY}


@dataclass(frozen=True)
class Work(Generic[Answer]):
    """One way to ask about a request."""

    name: str
    ask: Callable[[Request], Mapping[str, Any]]
    read: Callable[[Request, Mapping[str, Any]], Answer]
    failed: Callable[[Request, str], Answer]
    left: Callable[[Request, Any], Answer | None]
    """Reads what an interrupted run left."""
    length: Callable[[Answer], int]


class OpenAIEngine:
    """One model of one server."""

    name = "openai"

    def __init__(
        self, server: Server, identity: Identity, can: Abilities, left: Journal, spec: Spec, settings: Settings
    ) -> None:
        self.server, self.identity, self.can, self.spec, self.settings = server, identity, can, spec, settings
        self.text_only, self.replays = not can.tokens, can.replays
        self.failures = 0
        """Answers that are missing so far."""
        # One token less than the server's: it insists on generating one after a replay.
        length = json.loads(identity.listed).get("max_model_len")
        self.context_length = length - can.replays if isinstance(length, int) and can.tokens else None
        self._journal, self._trusts_journal = left, False
        self._encoded: dict[str, list[int]] = {}
        self._texts: dict[tuple[int, ...], str] = {}
        self._pieces: dict[int, str] = {}
        self._observed: Observation | None = None

    def facts(self) -> Fingerprint:
        """What the server says; its weights, its tokenizer and its end-of-sequence ids it shows to nobody."""
        name = self.identity.model
        if PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute():
            name = PureWindowsPath(name).name  # a path on the server, which is nobody else's business
        asked = digest({"max_new_tokens": self.spec.max_new_tokens})
        return {
            "engine": self.name,
            "engine_version": f"{self.identity.kind} {self.identity.version}".strip(),
            "engine.server": self.identity.kind,
            "engine.model": inert(name)[:200],
            "engine.system_fingerprint": inert(self.can.answers_as[1])[:80],
            "model.weights": UNOBSERVED,
            "model.config": UNOBSERVED,
            "tokenizer": "utf-8" if self.text_only else UNOBSERVED,
            "chat_template": UNOBSERVED,
            "generation": asked if self.text_only else UNOBSERVED,
            "numerics": self.spec.mode.name,
        }

    def observe(self) -> Observation:
        """16-bit logits, if they show from outside; nothing else can be seen, FP32 least of all."""
        if self._observed is None:
            self._observed = self._look()
        return self._observed

    def _look(self) -> Observation:
        unknown = Observation("unknown", 0.0, 0.0, "a server's arithmetic is only claimed: nothing of it can be probed")
        if self.text_only:
            return unknown
        prompt = Request("probe", np.asarray(self.encode(Prompt("probe", _HELLO)), np.int32), _HELLO)
        try:
            asked = _completion(self.identity.model, prompt, OBSERVED_TOKENS, self.can.logprobs)
            found = outside.grid(openai_answers.step_rows(self.server.post("completions", asked)))
        except (Unanswered, Malformed) as exc:
            return replace(unknown, detail=f"the server could not be looked at: {exc}")
        if found is None:
            return unknown
        bits = 8.0 if found.compute_class == "bf16" else 11.0
        detail = (
            f"logits lie on a 16-bit grid of {found.step:g} in {found.found} of {found.seen} steps, seen from outside"
        )
        return Observation(found.compute_class, bits, bits, detail)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids as the server makes them, or the text's bytes where it does not."""
        content = prompt.content
        written = content if isinstance(content, str) else json.dumps(content)
        if isinstance(content, list) and not self.can.chat:
            raise EngineError(f"prompt {prompt.id} is a chat, and the server's model has no chat template")
        if self.text_only:
            return list(written.encode())
        if written not in self._encoded:
            try:
                data = self.server.post("/tokenize", _tokenize(self.identity.model, content, self.can.chat))
                self._encoded[written] = _token_ids(data)
            except (Unanswered, Malformed) as exc:
                raise EngineError(f"prompt {prompt.id} was not tokenised: {exc}") from None
        return list(self._encoded[written])

    def decode(self, tokens: Sequence[int]) -> str:
        """The server's own text of the tokens; where it gives none, what was seen of each, or its id."""
        if self.text_only:
            return bytes(t for t in tokens if t < 256).decode("utf-8", "replace")
        ids = tuple(int(token) for token in tokens)
        if ids and ids not in self._texts:
            try:
                asked = {"model": self.identity.model, "tokens": ids}
                text = self.server.post("/detokenize", asked, attempts=1).get("prompt")
            except Unanswered:
                text = None  # it is shown to people only: what has an answer is judged without it
            self._texts[ids] = text if isinstance(text, str) else "".join(self._pieces.get(t, f" {t}") for t in ids)
        return self._texts.get(ids, "")

    def generate(self, batch: Sequence[Request], tick: Tick = no_tick) -> list[Output]:
        """The whole batch at once; how the server batches it is its own affair."""
        return self._each(self._decoding(), batch, tick, self.settings.concurrency)

    def replay(self, requests: Sequence[Request], tick: Tick = no_tick) -> list[Scores]:
        """Through `prompt_logprobs` of prompt and golden."""
        return self._replayed(requests, tick, self.settings.concurrency)

    def _replayed(self, requests: Sequence[Request], tick: Tick, at_once: int | None) -> list[Scores]:
        if not self.replays:
            raise EngineError("this server gives no prompt_logprobs: it cannot replay", fix="--repro-method decode")
        return self._each(self._replaying(f"replay {at_once or ''}"), requests, tick, at_once)

    def replay_fp32(self, requests: Sequence[Request], tick: Tick = no_tick) -> list[Scores] | None:
        """A server has no other numerics."""
        return None

    def benign(self) -> Iterator[tuple[str, Callable[[Sequence[Request], Tick], list[Scores]]]]:
        """Other company in the server's batches, where it can replay at all."""
        if self.replays:
            yield "replay", self.replay
            yield "replay, one at a time", lambda requests, tick: self._replayed(requests, tick, 1)

    # --- asking ------------------------------------------------------------------------------------------------------

    def _decoding(self) -> Work[Output]:
        model, limit, can = self.identity.model, self.spec.max_new_tokens, self.can

        def ask(request: Request) -> Mapping[str, Any]:
            if self.text_only:
                return self.server.post(*_text_request(model, request.content, can.chat, can.limit_name, limit))
            return self.server.post("completions", _completion(model, request, limit, can.logprobs))

        def read(request: Request, data: Mapping[str, Any]) -> Output:
            if self.text_only:
                return openai_answers.text_output(request, data)
            return openai_answers.output(request, data, limit)

        def failed(request: Request, why: str) -> Output:
            return Output(request.id, np.zeros(0, np.int32), "", "stop", error=why)

        return Work("decode", ask, read, failed, journal.to_output, lambda output: len(output.tokens))

    def _replaying(self, name: str) -> Work[Scores]:
        def ask(request: Request) -> Mapping[str, Any]:
            assert request.reference is not None, "replay needs the golden's tokens"
            tokens = [*request.tokens.tolist(), *request.reference.tolist()]
            return self.server.post("completions", _replay(self.identity.model, request, tokens, self.can.logprobs))

        def read(request: Request, data: Mapping[str, Any]) -> Scores:
            found = openai_answers.scores(request, data)
            self._pieces |= openai_answers.decoded(data)
            return found

        def failed(request: Request, why: str) -> Scores:
            none = np.zeros(0, np.float32)
            return Scores(request.id, none, none, np.zeros(0, np.int32), none, error=why)

        return Work(name, ask, read, failed, journal.to_scores, lambda scores: len(scores.logprob))

    def _each(self, work: Work[Answer], requests: Sequence[Request], tick: Tick, at_once: int | None) -> list[Answer]:
        """Every request's answer, or why it has none; the answers that came stay on disk until all have come."""
        if why := self._changed():
            return self._all_failed(work, requests, why)
        keys = [journal.key(work.name, request, self.spec.max_new_tokens) for request in requests]
        answers = self._taken_over(work, requests, keys)
        for answer in answers.values():
            tick(work.length(answer))
        missing = [place for place in range(len(requests)) if place not in answers]
        pool = ThreadPoolExecutor(max(1, min(at_once or MOST_AT_ONCE, len(missing))))
        try:
            asked = {pool.submit(self._one, work, requests[place]): place for place in missing}
            for done in as_completed(asked):
                answer, place = done.result(), asked[done]
                answers[place] = answer
                if not answer.error:
                    self._journal.add(keys[place], answer)
                tick(work.length(answer))
        except BaseException:  # Ctrl-C, say: nobody waits for the others
            self.server.stop()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        if why := self._changed():
            self._journal.drop(keys)
            return self._all_failed(work, requests, why)
        self.failures += sum(bool(answer.error) for answer in answers.values())
        return [answers[place] for place in range(len(requests))]

    def _one(self, work: Work[Answer], request: Request) -> Answer:
        try:
            data = work.ask(request)
            if (now := _answers_as(data)) != self.can.answers_as:
                return work.failed(
                    request, f"the server changed during the run: {_said(self.can.answers_as)} became {_said(now)}"
                )
            return work.read(request, data)
        except Unanswered as exc:
            return work.failed(request, exc.what)
        except Malformed as exc:
            return work.failed(request, inert(str(exc)))

    def _all_failed(self, work: Work[Answer], requests: Sequence[Request], why: str) -> list[Answer]:
        self.failures += len(requests)
        return [work.failed(request, why) for request in requests]

    def _changed(self) -> str:
        """Why nothing more can be compared; "" also where nobody answers, since each request will say that itself."""
        try:
            now = _identity(self.server, self.identity.model, attempts=1)
        except ConfigError as exc:
            return f"the server changed during the run: {exc.what}"
        except EngineError:
            return ""
        if now == self.identity:
            return ""
        return f"the server changed during the run: {self._described(self.identity)} became {self._described(now)}"

    @staticmethod
    def _described(identity: Identity) -> str:
        return f"{identity.model} on {identity.kind} {identity.version} ({digest(identity.listed)[7:15]})"

    def _taken_over(self, work: Work[Answer], requests: Sequence[Request], keys: list[str]) -> dict[int, Answer]:
        """Answers of the run that was interrupted, once one of them was asked for again and came out alike."""
        found = {}
        for place, (request, key) in enumerate(zip(requests, keys, strict=True)):
            if (answer := work.left(request, self._journal.left.pop(key, None))) is not None:
                found[place] = answer
        if not found:
            return {}
        if not self._trusts_journal:
            first = next(iter(found))
            again = self._one(work, requests[first])
            if again.error:
                return {}  # it says nothing of the others, and they stay for another run
            if not _alike(found[first], again):
                self.spec.say(
                    "answers of an interrupted run are not taken over: asked again, the first came out otherwise"
                )
                self._journal.drop(keys)
                self._journal.forget()
                return {}
            self._trusts_journal = True
        self.spec.say(f"{work.name.strip()}: {len(found)} answers of an interrupted run are taken over")
        return found


def _said(answers_as: tuple[str, str]) -> str:
    return inert(" ".join(answers_as))[:120]


def _alike(then: Output | Scores, now: Output | Scores) -> bool:
    """Whether two answers may come from one build: the same words, or numbers as near as rounding brings them."""
    if isinstance(then, Output) and isinstance(now, Output):
        both = min(len(then.tokens), len(now.tokens))
        parted = np.flatnonzero(then.tokens[:both] != now.tokens[:both])
        both = int(parted[0]) if len(parted) else both
        if np.isnan(then.logprob[:both]).any():
            return then.text == now.text
    else:
        both = len(then.logprob)
    return both > 0 and float(np.abs(then.logprob[:both] - now.logprob[:both]).mean()) <= ALIKE
