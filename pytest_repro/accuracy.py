"""Is the answer right, and did answers get worse: scorers, and the paired exact test."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .errors import ConfigError

Scorer = Callable[[str, str], bool]
"""(generated text, right answer) -> whether it is right."""

_NUMBER = re.compile(r"(?:(?<![\w)])[-+])?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)")
"""A sign counts only where no operand stands before it: the last number of `5-10` is 10."""
_CHOICE = re.compile(r"(?<![A-Za-z])\(?([A-Z])\)?(?![A-Za-z])")


def exact(text: str, answer: str) -> bool:
    """The whole text is the answer, white space at both ends aside."""
    return text.strip() == answer.strip()


def last_number(text: str, answer: str) -> bool:
    """The last number in the text equals the answer as a number; `1,250` and `1250.0` are the same."""
    found = _NUMBER.findall(text.replace("\u2212", "-"))
    return bool(found) and _number(found[-1]) == _number(answer)


def choice(text: str, answer: str) -> bool:
    """The last capital letter that stands alone, as `B` or `(B)`, is the answer."""
    found = _CHOICE.findall(text)
    return bool(found) and found[-1] == answer.strip().strip("()").upper()


def _number(text: str) -> float:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return float("nan")


SCORERS: dict[str, Scorer] = {"exact": exact, "last-number": last_number, "choice": choice}


def scorer(name: str, *, pattern: str = "", allow_code: bool = False, where: str = "") -> Scorer:
    """The scorer of a name: `exact`, `last-number`, `choice`, `regex`, or `module:function`.

    Args:
        name: as in suite.toml.
        pattern: the regular expression of `regex`; its first group (or all of it) is compared with the answer.
        allow_code: whether the user opted in to importing `module:function`.
        where: what to name in an error.

    Raises:
        ConfigError: unknown scorer, a bad pattern, or code without the opt-in.
    """
    if name in SCORERS:
        return SCORERS[name]
    if name == "regex":
        return _regex(pattern, where)
    if ":" in name:
        return _from_code(name, allow_code, where)
    known = ", ".join([*SCORERS, "regex", "module:function"])
    raise ConfigError(f"unknown scorer {name!r}; known: {known}", where=where)


def _regex(pattern: str, where: str) -> Scorer:
    try:
        compiled = re.compile(pattern)
    except re.error as exc:
        raise ConfigError(f"the scorer's pattern is not a regular expression: {exc}", where=where) from None
    if not pattern:
        fix = "--pattern '...'" if where.startswith("--") else "add pattern = '...' under [suite]"
        raise ConfigError('scorer = "regex" needs a pattern', where=where, fix=fix)

    def matches(text: str, answer: str) -> bool:
        found = compiled.findall(text)
        last = found[-1] if found else None
        return last is not None and (last[0] if isinstance(last, tuple) else last).strip() == answer.strip()

    return matches


def _from_code(name: str, allow_code: bool, where: str) -> Scorer:
    if not allow_code:
        raise ConfigError(
            f"the scorer {name!r} is code, and a suite may not run code by itself",
            where=where,
            fix="if you trust it, add --repro-allow-code",
        )
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError, TypeError) as exc:
        raise ConfigError(f"the scorer {name!r} cannot be imported: {exc}", where=where) from None
    return lambda text, answer: bool(found(text, answer))


@dataclass(frozen=True)
class PairedTest:
    """Golden and current answers to the same n prompts (McNemar's exact test: only discordant pairs carry evidence)."""

    n: int
    """Prompts scored in both."""
    golden: float
    """Accuracy then, percent."""
    now: float
    """Accuracy now, percent."""
    lost: int
    """Right then, wrong now."""
    gained: int
    """Wrong then, right now."""
    p_value: float
    """One-sided: probability of at least so many losses among the discordant, if either were as likely."""
    smallest_drop: float | None
    """Points: the smallest drop that these prompts could have shown at alpha; None if no drop could have."""

    @property
    def drop(self) -> float:
        """Points lost; negative if accuracy rose."""
        return self.golden - self.now

    def fails(self, accuracy_drop: float, alpha: float) -> bool:
        """Lost more than `accuracy_drop` points, and more than chance at level `alpha`."""
        return self.drop > accuracy_drop and self.p_value <= alpha


def paired_test(golden: Sequence[bool], now: Sequence[bool], alpha: float) -> PairedTest:
    """McNemar's exact test, one-sided, by `scipy.stats.binomtest`.

    Args:
        golden: whether each prompt was right then, length n > 0.
        now: the same now.
        alpha: the level for `smallest_drop`.

    Raises:
        ValueError: nothing to compare, or different lengths.
    """
    from scipy.stats import binomtest

    if not golden or len(golden) != len(now):
        raise ValueError(f"paired test of {len(golden)} and {len(now)} scores")
    n, right = len(golden), sum(golden)
    lost = sum(a and not b for a, b in zip(golden, now, strict=True))
    gained = sum(b and not a for a, b in zip(golden, now, strict=True))
    p_value = float(binomtest(lost, lost + gained, 0.5, alternative="greater").pvalue) if lost + gained else 1.0
    needed = next((k for k in range(1, right + 1) if 0.5**k <= alpha), None)
    return PairedTest(
        n=n,
        golden=100 * right / n,
        now=100 * sum(now) / n,
        lost=lost,
        gained=gained,
        p_value=p_value,
        smallest_drop=None if needed is None else 100 * needed / n,
    )
