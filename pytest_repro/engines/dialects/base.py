"""What a dialect is, and what all of them ask alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ...errors import EngineError
from ...fingerprint import Value
from ...generation import Output, Request, Scores
from ..openai_answers import Data, Row
from ..openai_client import Server, Unanswered

HELLO = "Name the days of the week."
BEST = 20
"""Log-probabilities asked for at each token."""

Content = str | list[dict[str, str]]


class Foreign(EngineError):
    """The server does not speak this dialect; the message says what was missing."""


@dataclass(frozen=True)
class About:
    """What a server says of itself; none of it may change during a run."""

    version: str = ""
    claims: Mapping[str, Value] = field(default_factory=dict)
    """For the fingerprint: claimed, and not observed."""
    private: str = ""
    """Paths and the like, which nobody else needs to know."""


@dataclass(frozen=True)
class Dialect(ABC):
    """One model of one server, and how it is asked."""

    server: Server = field(repr=False)
    model: str
    card: Mapping[str, Any] = field(repr=False)
    """What the server lists of the model."""
    chat: bool
    """Whether it renders chat messages."""
    said: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    """Who answered when it was opened; see `signature`."""

    name: ClassVar[str]
    text_only: ClassVar[bool] = False

    @property
    def server_name(self) -> str:
        """What the server is, for the fingerprint."""
        return self.name

    @property
    def replays(self) -> bool:
        """Whether it scores given tokens."""
        return False

    @property
    def context_length(self) -> int | None:
        """Most tokens that prompt and answer may have together."""
        return None

    @abstractmethod
    def abilities(self) -> dict[str, Any]:
        """What the server was seen to do: answers of another run are taken over only where this is the same."""

    @abstractmethod
    def about(self, attempts: int | None = None) -> About:
        """What it says of itself now.

        Raises:
            Unanswered: it cannot say so now.
        """

    @abstractmethod
    def signature(self, data: Data) -> dict[str, str]:
        """Who answered, as each answer says; it must not change during a run."""

    @abstractmethod
    def tokenize(self, content: Content) -> list[int]:
        """Token ids of a whole prompt, chat template applied.

        Raises:
            Unanswered, Malformed: there are none.
        """

    @abstractmethod
    def detokenize(self, tokens: Sequence[int]) -> str | None:
        """The text of tokens, special ones spelt out; None where the server does not tell."""

    @abstractmethod
    def ask(self, request: Request, max_new_tokens: int) -> Data:
        """The answer to a prompt, decoded greedily."""

    @abstractmethod
    def read(self, request: Request, data: Data, max_new_tokens: int) -> Output:
        """The answer as an output.

        Raises:
            Malformed: it is none.
        """

    def rows(self, data: Data) -> list[Row]:
        """The numbers of an answer, step by step.

        Raises:
            Malformed: there are none.
        """
        return []

    def ask_replay(self, request: Request) -> Data:
        """Prompt and golden, scored."""
        raise EngineError(f"{self.name} cannot replay")

    def read_replay(self, request: Request, data: Data) -> Scores:
        """The answer as scores.

        Raises:
            Malformed: it is none.
        """
        raise EngineError(f"{self.name} cannot replay")


def messages(content: Content) -> list[dict[str, str]]:
    """A prompt as a chat."""
    return [{"role": "user", "content": content}] if isinstance(content, str) else content


def raise_unless_refused(exc: Unanswered) -> None:
    """A server that cannot do a thing refuses it; one that is down, or wants a key, has told nothing of what it can do."""
    if exc.status is None or exc.status in (401, 403, 429) or exc.status >= 500:
        raise exc


def page(server: Server, path: str, attempts: int | None = None) -> dict[str, Any]:
    """What a server shows under a path; {} if it has no such page, or shows it to nobody.

    Raises:
        Unanswered: it cannot say so now.
    """
    try:
        return server.get(path, attempts)
    except Unanswered as exc:
        if exc.status is None or exc.status in (408, 429) or exc.status >= 500:
            raise
        return {}


def text_of_tokens(server: Server, tokens: Sequence[int], field: str, **asked: Any) -> str | None:
    """The text of tokens, by `/detokenize`; None where the server does not tell."""
    try:
        text = server.post("/detokenize", {"tokens": list(tokens), **asked}, attempts=1).get(field)
    except Unanswered:
        return None
    return text if isinstance(text, str) else None
