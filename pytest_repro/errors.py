"""The one tree of errors.

::

    ReproError
    ├── ConfigError          a mistake in what was asked: suite or options       exit 4; `error` once it runs
    │   └── ModelError       the model reference names nothing that can be had                 verdict `error`
    ├── GoldenError          a golden that cannot be trusted or read                           fails the suite
    │   └── GoldenMissing    there is none for this compute class                              verdict `missing`
    └── EngineError          the engine broke: load failure, out of memory, NaN                verdict `error`

Every error says what happened, where, and the command or edit that mends it.
"""

from __future__ import annotations

from pathlib import Path

from .text import inert


class ReproError(Exception):
    """What every error of this package is. `str()` of it is the whole message for a user."""

    def __init__(self, what: str, *, where: str | Path = "", fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        """One sentence: what happened."""
        self.where = str(where)
        """File, line and field, as far as they are known."""
        self.fix = fix
        """The command or the edit that mends it."""

    def __str__(self) -> str:
        # What engines, models and suites said is part of it: untrusted text.
        lines = [inert(f"{self.where}: {self.what}" if self.where else self.what)]
        if self.fix:
            lines.append(inert(f"  mend: {self.fix}"))
        return "\n".join(lines)


class ConfigError(ReproError):
    """A suite, an option or a setting is wrong; the run stops with pytest's usage exit code 4."""


class ModelError(ConfigError):
    """A model reference names nothing that can be had: no such folder, wrong digest, index out of reach."""


class GoldenError(ReproError):
    """A golden cannot be trusted or read: edited by hand, truncated, of a newer schema, parts that disagree."""


class GoldenMissing(GoldenError):
    """There is no golden for this suite and compute class."""


class EngineError(ReproError):
    """The engine could not answer: it is an `error` of the harness, never a drift of the model."""
