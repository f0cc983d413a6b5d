"""One OpenAI-compatible server: its address, the key that may be sent to it, and asking until there is an answer."""

from __future__ import annotations

import email.utils
import ipaddress
import json
import os
import random
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import httpx

from ..errors import ConfigError, EngineError
from ..text import inert

ADDRESS_VARIABLE, KEY_VARIABLE = "OPENAI_BASE_URL", "OPENAI_API_KEY"
LONGEST_WAIT = 60.0
"""Seconds between two attempts, unless the server asks for more."""
SHOWN_OF_A_BODY = 200
_PASSING = (408, 409, 425, 429)
"""Statuses below 500 that another attempt may mend."""


class Unanswered(EngineError):
    """A request has no answer, for good."""

    def __init__(self, what: str, status: int | None = None) -> None:
        super().__init__(what)
        self.status = status
        """The server's last word; None if it could not be reached."""


def address(text: str, where: str) -> httpx.URL:
    """A base address such as http://127.0.0.1:8000/v1.

    Raises:
        ConfigError: not http or https, or it holds what must not be written down: a user, a password, a query.
    """
    try:
        url = httpx.URL(text.rstrip("/"))
    except (httpx.InvalidURL, ValueError, TypeError):
        raise ConfigError("not an address", where=where, fix="e.g. http://127.0.0.1:8000/v1") from None
    if url.userinfo or url.query or url.fragment or "?" in text or "#" in text:
        raise ConfigError(  # without the address itself: it holds a secret, perhaps
            "an address may hold no user, password, query or fragment",
            where=where,
            fix=f"put the key into the environment variable {KEY_VARIABLE}",
        )
    if url.scheme not in ("http", "https") or not url.host or not 0 < (url.port or 80) < 65536:
        raise ConfigError(f"{text!r} is no http or https address", where=where, fix="e.g. http://127.0.0.1:8000/v1")
    return url


def is_loopback(url: httpx.URL) -> bool:
    """Whether an address never leaves this machine."""
    if url.host == "localhost":
        return True
    try:
        return ipaddress.ip_address(url.host).is_loopback
    except ValueError:
        return False


def key_from_environment() -> str:
    """The API key, "" without one.

    Raises:
        ConfigError: it cannot be put into a header; it is not shown.
    """
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not all("!" <= char <= "~" for char in key):
        raise ConfigError("the API key has characters that no key has", where=KEY_VARIABLE, fix="set it anew")
    return key


class Server:
    """Asks one server, from many threads at once."""

    def __init__(self, base: httpx.URL, key: str, *, timeout: float, retries: int, backoff: float) -> None:
        self.base = base
        self._retries, self._backoff, self._timeout = retries, backoff, timeout
        self._key = key
        self._gone = False
        """Whether the last request that was given up found nobody there: then the next is not put off again."""
        self._stopped = threading.Event()
        self._client = httpx.Client(
            headers={"authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(timeout, connect=min(timeout, 30.0)),
            limits=httpx.Limits(max_connections=None),
            follow_redirects=False,  # a key goes to the address that was named, and nowhere else
            trust_env=not is_loopback(base),  # no proxy stands between this machine and itself
            verify=base.scheme == "https",  # loading certificates that nobody asks for takes a tenth of a second
        )

    def __repr__(self) -> str:
        return f"Server({self.base})"

    def close(self) -> None:
        """Close its connections."""
        self._client.close()

    def stop(self) -> None:
        """Ask nothing twice any more."""
        self._stopped.set()

    def get(self, path: str, attempts: int | None = None) -> dict[str, Any]:
        """GET below the base address; a path with a leading slash is below the server's root."""
        return self._ask("GET", path, None, attempts)

    def post(self, path: str, body: Mapping[str, Any], attempts: int | None = None) -> dict[str, Any]:
        """POST of JSON, as `get`."""
        return self._ask("POST", path, body, attempts)

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None, attempts: int | None) -> dict[str, Any]:
        """The answer, a JSON object.

        Raises:
            Unanswered: refused, or every attempt failed.
        """
        left = 1 if self._gone else attempts or self._retries + 1
        name, tried = f"{method} {path}", 0
        while True:
            tried, left = tried + 1, left - 1
            try:
                response = self._client.request(method, self._url(path), json=body)
            except (httpx.TransportError, httpx.DecodingError) as exc:
                nobody = isinstance(exc, httpx.ConnectError)
                failure = Unanswered(f"{name}: {self._broken(exc)}{_times(tried)}")
                wait = self._pause(tried)
            except Exception as exc:  # whatever else a library finds wrong with what a server sent
                raise Unanswered(f"{name}: {self._quoted(f'{type(exc).__name__}: {exc}')}") from None
            else:
                nobody = self._gone = False
                if response.is_success:
                    return self._parsed(name, response)
                failure = Unanswered(f"{name}: {self._refusal(response)}{_times(tried)}", response.status_code)
                if response.status_code < 500 and response.status_code not in _PASSING:
                    raise failure
                wait = self._asked_to_wait(response, tried)
            if left <= 0:
                self._gone = nobody
                raise failure
            if self._stopped.wait(wait):
                raise failure

    def _url(self, path: str) -> httpx.URL:
        here = self.base.path.rstrip("/")
        return self.base.copy_with(path=here.removesuffix("/v1") + path if path.startswith("/") else f"{here}/{path}")

    def _pause(self, tried: int) -> float:
        """Exponential, with jitter, so that requests that failed together do not come back together."""
        return min(LONGEST_WAIT, float(self._backoff * 2 ** (tried - 1))) * random.uniform(0.5, 1.0)

    def _asked_to_wait(self, response: httpx.Response, tried: int) -> float:
        """What Retry-After says, in seconds or as a date, but no longer than a request may take."""
        asked = response.headers.get("retry-after", "")
        try:
            seconds = float(asked)
        except ValueError:
            try:
                seconds = (email.utils.parsedate_to_datetime(asked) - datetime.now(UTC)).total_seconds()
            except (ValueError, TypeError):
                return self._pause(tried)
        return min(seconds, self._timeout) if seconds >= 0 else self._pause(tried)

    def _broken(self, exc: Exception) -> str:
        if isinstance(exc, httpx.TimeoutException):
            return f"no answer within {self._timeout:g} s"
        if isinstance(exc, httpx.ConnectError):
            return "the server cannot be reached"
        return self._quoted(f"the connection broke: {type(exc).__name__}: {exc}")

    def _refusal(self, response: httpx.Response) -> str:
        if response.is_redirect:
            return (
                f"status {response.status_code}: the server redirects, which is not followed; name the address itself"
            )
        return f"status {response.status_code}: {self._quoted(response.text)}"

    def _parsed(self, name: str, response: httpx.Response) -> dict[str, Any]:
        try:
            data = json.loads(response.content)
        except (ValueError, RecursionError):
            raise Unanswered(f"{name}: not JSON: {self._quoted(response.text)}", response.status_code) from None
        if not isinstance(data, dict):
            raise Unanswered(f"{name}: not a JSON object: {self._quoted(response.text)}", response.status_code)
        return data

    def _quoted(self, text: str) -> str:
        """The beginning of what a server said, made inert, and without the key, should it have said that."""
        return inert((text.replace(self._key, "***") if self._key else text)[:SHOWN_OF_A_BODY])


def _times(tried: int) -> str:
    return f" ({tried} attempts)" if tried > 1 else ""
