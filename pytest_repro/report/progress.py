"""How far a run is: a bar on a terminal, a line a phase in a log."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TextIO


class Display:
    """A `asking.Progress` that writes to a stream, past pytest's capturing.

    The stream is asked for anew each time, while nothing is captured: a stream kept from before would be the captured one.
    """

    def __init__(
        self,
        label: str,
        stream: Callable[[], TextIO],
        uncaptured: Callable[[], AbstractContextManager[Any]] | None = None,
        quiet: bool = False,
        unit: str = "tokens",
    ) -> None:
        self.label, self.stream, self.quiet, self.unit = label, stream, quiet, unit
        self.uncaptured = uncaptured or nullcontext
        self.bar: Any = None
        self.started = 0.0
        self.shown = 0.0
        self.done = 0
        self.phase_name = ""
        self.first = True

    def say(self, line: str) -> None:
        """One line of its own."""
        if not self.quiet:
            self._write(f"{self.label}: {line}\n")

    def phase(self, label: str, total: int) -> Callable[[int], None]:
        """Start a phase, ending the one before."""
        self.close()
        self.phase_name, self.started, self.done = label, time.monotonic(), 0

        def tick(done: int) -> None:
            self.done += done
            self._show(total)

        return tick

    def close(self) -> None:
        """End the last phase with a line that says how long it took."""
        if self.phase_name and self.done and not self.quiet:
            seconds = time.monotonic() - self.started
            rate = self.done / seconds if seconds > 0 else 0.0
            self._write(
                f"{self.label}: {self.phase_name}: {self.done} {self.unit}, {seconds:.1f} s, {rate:.0f} {self.unit}/s\n"
            )
        self.phase_name = ""

    def _show(self, total: int) -> None:
        """On a terminal, the running line; it is rewritten ten times a second at most."""
        if self.quiet or not total or time.monotonic() - self.shown < 0.1:
            return
        self.shown = time.monotonic()
        with self.uncaptured():
            stream = self.stream()
            if not stream.isatty():
                return
            share = min(1.0, self.done / total)
            left = (self.shown - self.started) * (1 - share) / share if share else 0.0
            bar = "█" * round(20 * share) + "░" * (20 - round(20 * share))
            stream.write(f"{self._start(stream)}{self.label}: {self.phase_name} {bar} {share:4.0%}  {left:.0f} s left")
            stream.flush()

    @staticmethod
    def _start(stream: TextIO) -> str:
        return "\r\033[K" if stream.isatty() else ""

    def _write(self, text: str) -> None:
        with self.uncaptured():
            stream = self.stream()
            if self.first:
                text, self.first = f"\n{text}", False  # pytest's own line of dots is not finished yet
            stream.write(self._start(stream) + text)
            stream.flush()
