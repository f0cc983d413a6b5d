"""Any server that speaks OpenAI's HTTP API, in the dialect in which it shows most (`dialects`).

What a server can do is asked once, when the engine is opened, and evidence counts for more than names: a server that
answers token ids with token ids and log-probabilities is checked by them, one that scores given tokens replays, and of
any other only the text is compared, as `engines.function` does. Prompts are tokenised by the server, so that neither the
model's files nor torch are needed here. A server's numerics are only claimed; what shows from outside is `observe`d.
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
from ..sketch import Sketch
from ..suite import Prompt
from ..text import inert
from . import dialects, journal, openai_client, outside
from .base import Engine, Spec, Tick, no_tick
from .dialects.base import HELLO, About, Dialect
from .journal import Journal
from .openai_answers import Malformed
from .openai_client import Server, Unanswered

MOST_AT_ONCE = 64
"""Requests in flight, unless `concurrency` says otherwise."""
OBSERVED_TOKENS = 24
ALIKE = 0.1
"""Mean nats by which an answer that is asked for again may differ from the one that an interrupted run left."""

Answer = TypeVar("Answer", Output, Scores)


@dataclass(frozen=True)
class Settings:
    """The options of `[engine.openai]`, checked."""

    base_url: Any
    send_key: bool
    model: str | None
    dialect: str
    concurrency: int | None
    timeout: float
    retries: int
    backoff: float


@dataclass(frozen=True)
class Identity:
    """What a server says that it is; it must not change during a run."""

    listed: str
    """What it lists of the model, as JSON."""
    about: About


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
        name, card = _card(server, settings.model)
        dialect = dialects.find(server, name, card, settings.dialect, spec.say)
        if not dialect.replays and not dialect.text_only:
            spec.say("this server cannot score given tokens: prompts are decoded, and none can be replayed")
        identity = Identity(_kept(card), dialect.about())
        question = [str(settings.base_url), name, dialect.name, dialect.abilities(), dict(dialect.said)]
        left = Journal([*question, _plain(identity), str(spec.folder), spec.mode.name], spec.say)
        engine = OpenAIEngine(server, identity, dialect, left, spec, settings)
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
    dialect = options.get("dialect", "auto")
    if dialect not in dialects.NAMES:
        raise ConfigError(f"{dialect!r} is none of {', '.join(dialects.NAMES)}", where=f"{where} dialect")
    # A suite is data from a pull request: a key goes where the user said, or stays on this machine.
    users = "base_url" in spec.from_user or text.rstrip("/") == environment.rstrip("/")
    return Settings(
        base_url=url,
        send_key=users or openai_client.is_loopback(url),
        model=model,
        dialect=dialect,
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


def _card(server: Server, wanted: str | None, attempts: int | None = None) -> tuple[str, dict[str, Any]]:
    """The model's name, and what the server lists of it.

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
    return name, listed.get(name, {})


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


def _kept(card: Mapping[str, Any]) -> str:
    """What must not change of it: `created` is left out, since vLLM and llama.cpp give the time of the question."""
    fields = ("id", "owned_by", "root", "parent", "max_model_len", "meta")
    return json.dumps({field: card.get(field) for field in fields}, sort_keys=True)


def _plain(identity: Identity) -> dict[str, Any]:
    return {"listed": identity.listed, **vars(identity.about)}


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
        self, server: Server, identity: Identity, dialect: Dialect, left: Journal, spec: Spec, settings: Settings
    ) -> None:
        self.server, self.identity, self.dialect = server, identity, dialect
        self.spec, self.settings = spec, settings
        self.text_only, self.replays = dialect.text_only, dialect.replays
        self.context_length = dialect.context_length
        self.failures = 0
        """Answers that are missing so far."""
        self._journal, self._trusts_journal = left, False
        self._encoded: dict[str, list[int]] = {}
        self._texts: dict[tuple[int, ...], str] = {}
        self._observed: Observation | None = None

    def facts(self) -> Fingerprint:
        """What the server says; its weights, its tokenizer and its end-of-sequence ids it shows to nobody."""
        name, about = self.dialect.model, self.identity.about
        if PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute():
            name = PureWindowsPath(name).name  # a path on the server, which is nobody else's business
        asked = digest({"max_new_tokens": self.spec.max_new_tokens})
        return {
            "engine": self.name,
            "engine_version": f"{self.dialect.server_name} {about.version}".strip(),
            "engine.server": self.dialect.server_name,
            "engine.model": inert(name)[:200],
            **{f"engine.{part}": inert(value)[:80] for part, value in self.dialect.said.items() if part != "model"},
            **{f"engine.claimed.{claim}": value for claim, value in about.claims.items()},
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
        prompt = Request("probe", np.asarray(self.encode(Prompt("probe", HELLO)), np.int32), HELLO)
        try:
            rows = self.dialect.rows(self.dialect.ask(prompt, OBSERVED_TOKENS))
            found = outside.grid(list(row.values()) for row in rows)
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
        if isinstance(content, list) and not self.dialect.chat:
            raise EngineError(
                f"prompt {prompt.id} is a chat, and the server renders none: its model has no chat template, or it is too old"
            )
        if self.text_only:
            return list(written.encode())
        if written not in self._encoded:
            try:
                self._encoded[written] = self.dialect.tokenize(content)
            except (Unanswered, Malformed) as exc:
                raise EngineError(f"prompt {prompt.id} was not tokenised: {exc}") from None
        return list(self._encoded[written])

    def decode(self, tokens: Sequence[int]) -> str:
        """The server's own text of the tokens; their ids where it gives none, since it is only shown to people."""
        ids = tuple(int(token) for token in tokens)
        if ids and ids not in self._texts:
            text = self.dialect.detokenize(ids)
            self._texts[ids] = "".join(f" {token}" for token in ids) if text is None else text
        return self._texts.get(ids, "")

    def generate(self, batch: Sequence[Request], tick: Tick = no_tick) -> list[Output]:
        """The whole batch at once; how the server batches it is its own affair."""
        return self._each(self._decoding(), batch, tick, self.settings.concurrency)

    def replay(self, requests: Sequence[Request], tick: Tick = no_tick) -> list[Scores]:
        """Through the log-probabilities of prompt and golden as one prompt."""
        return self._replayed(requests, tick, self.settings.concurrency)

    def _replayed(self, requests: Sequence[Request], tick: Tick, at_once: int | None) -> list[Scores]:
        if not self.replays:
            raise EngineError("this server cannot score given tokens: it cannot replay", fix="--repro-method decode")
        return self._each(self._replaying(f"replay {at_once or ''}"), requests, tick, at_once)

    def replay_fp32(self, requests: Sequence[Request], tick: Tick = no_tick) -> list[Scores] | None:
        """A server has no other numerics."""
        return None

    def sketches(self, requests: Sequence[Request], tick: Tick = no_tick) -> Iterator[Sketch]:
        """A server cannot be looked into."""
        return iter(())

    def benign(self) -> Iterator[tuple[str, Callable[[Sequence[Request], Tick], list[Scores]]]]:
        """Other company in the server's batches, where it can replay at all."""
        if self.replays:
            yield "replay", self.replay
            yield "replay, one at a time", lambda requests, tick: self._replayed(requests, tick, 1)

    # --- asking ------------------------------------------------------------------------------------------------------

    def _decoding(self) -> Work[Output]:
        dialect, limit = self.dialect, self.spec.max_new_tokens

        def failed(request: Request, why: str) -> Output:
            return Output(request.id, np.zeros(0, np.int32), "", "stop", error=why)

        return Work(
            "decode",
            lambda request: dialect.ask(request, limit),
            lambda request, data: dialect.read(request, data, limit),
            failed,
            journal.to_output,
            lambda output: len(output.tokens),
        )

    def _replaying(self, name: str) -> Work[Scores]:
        def failed(request: Request, why: str) -> Scores:
            none = np.zeros(0, np.float32)
            return Scores(request.id, none, none, np.zeros(0, np.int32), none, error=why)

        dialect = self.dialect
        return Work(
            name,
            dialect.ask_replay,
            dialect.read_replay,
            failed,
            journal.to_scores,
            lambda scores: len(scores.logprob),
        )

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
            if (now := self.dialect.signature(data)) != self.dialect.said:
                return work.failed(
                    request, f"the server changed during the run: {_said(self.dialect.said)} became {_said(now)}"
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
            _, card = _card(self.server, self.dialect.model, attempts=1)
            now = Identity(_kept(card), self.dialect.about(attempts=1))
        except ConfigError as exc:
            return f"the server changed during the run: {exc.what}"
        except EngineError:
            return ""
        if now == self.identity:
            return ""
        return f"the server changed during the run: {self._described(self.identity)} became {self._described(now)}"

    def _described(self, identity: Identity) -> str:
        return f"{self.dialect.server_name} {identity.about.version} ({digest(_plain(identity))[7:15]})"

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


def _said(signature: Mapping[str, str]) -> str:
    return inert(" ".join(signature.values()))[:120]


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
