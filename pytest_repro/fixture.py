"""What the `repro` fixture gives to a test; knows nothing of pytest beyond the two callables it is handed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from .engines.function import from_function
from .errors import ConfigError, ReproError
from .suite import Overrides, Prompt, Suite, Thresholds, apply, defaults_around, from_table, load, merge

_THRESHOLDS = {f.name for f in fields(Thresholds)}
_PLAIN = ("model", "engine", "numerics", "batch_size", "max_new_tokens")


@dataclass(frozen=True, repr=False)
class Run:
    """What a check found; truthy numbers only where everything was judged."""

    results: tuple[Mapping[str, Any], ...]
    """One document a numerics mode, as in the JSON report; a recording's while recording."""

    def __repr__(self) -> str:
        """Short: an assertion that fails prints it."""
        told = (f"{r['path']} [{r['numerics']}] {r.get('verdict', 'recorded')}" for r in self.results)
        return f"Run({', '.join(told)})"

    @property
    def accuracy(self) -> float:
        """Share of the scored prompts that were right, 0 to 1: the lowest of the modes.

        Raises:
            ValueError: it was not judged (prompts that differ were only replayed, or none has an answer).
        """
        found = [r["metrics"]["accuracy_now"] if "metrics" in r else r["accuracy"] for r in self.results]
        if not found or any(value is None for value in found):
            raise ValueError("accuracy was not judged: see the accuracy line of the report")
        return float(min(found)) / 100

    @property
    def passed(self) -> bool:
        """Whether every mode passed."""
        return all(r.get("verdict", "pass") == "pass" for r in self.results)


class Repro:
    """The fixture's value: one test's view of the gate."""

    def __init__(self, state: Any, node: Any, keywords: Mapping[str, Any], fail: Callable[[str], Any]) -> None:
        self._state, self._node, self._keywords, self._fail = state, node, keywords, fail
        self._calls = 0

    def check(self, path: str | Path, **keywords: Any) -> Run:
        """Check (or, under --repro-update, record) a suite; the test fails if the suite does.

        Args:
            path: the suite's folder, relative to pytest's root directory.
            keywords: `model`, `engine` (a name or any callable), `numerics`, `batch_size`, `max_new_tokens`,
                `engine_options` (a mapping) and any threshold: stronger than the marker, the command line and suite.toml.
        """
        return self._told(lambda: self._check(path, keywords))

    def _check(self, path: str | Path, keywords: Mapping[str, Any]) -> Run:
        overrides, opener = self._overrides(keywords)
        folder = self._node.config.rootpath / path
        return self._run(load(folder, overrides, defaults_around(folder)[1]), opener)

    def check_prompt(self, prompt: str | list[dict[str, str]], *, answer: str | None = None, **keywords: Any) -> Run:
        """Check a single prompt; its golden is named after the test and lies under the first of `repro_paths`."""
        return self._told(lambda: self._check_prompt(Prompt("prompt", prompt, answer), keywords))

    def _check_prompt(self, prompt: Prompt, keywords: Mapping[str, Any]) -> Run:
        overrides, opener = self._overrides(keywords)
        self._calls += 1
        node = str(self._node.nodeid)
        # Parameters that differ in punctuation alone must not share a golden.
        name = f"{re.sub(r'[^A-Za-z0-9._-]+', '-', node).strip('-')}-{hashlib.sha256(node.encode()).hexdigest()[:6]}"
        if self._calls > 1:
            name += f"-{self._calls}"
        folder = self._state.paths[0] / "tests" / name
        defaults = defaults_around(folder)[1]
        model = overrides.model or defaults.get("suite", {}).get("model")
        if model is None and opener is None:
            raise ConfigError("no model is named", where=self._node.nodeid, fix='@pytest.mark.repro(model="...")')
        table = merge(defaults, {"suite": {"name": name, "model": model or ""}})
        suite = from_table(table, folder=folder, prompts=(prompt,))
        if model and not overrides.model and (self._node.config.rootpath / model).is_dir():
            suite = replace(suite, model=str(self._node.config.rootpath / model))
        return self._run(apply(suite, overrides), opener)

    def _told(self, check: Callable[[], Run]) -> Run:
        """The test fails with the message of what went wrong, and without a traceback through this package."""
        try:
            run = check()
        except ReproError as exc:
            message = str(exc)
        else:
            if run.passed:
                return run
            message = "\n".join(self._story(result) for result in run.results if result["verdict"] == "fail")
        self._fail(message)
        raise AssertionError(message)

    def _overrides(self, keywords: Mapping[str, Any]) -> tuple[Overrides, Any]:
        """Command line, then marker, then the call's own keywords on top."""
        asked = {**self._keywords, **keywords}
        unknown = sorted(set(asked) - {*_PLAIN, "engine_options"} - _THRESHOLDS)
        if unknown:
            known = ", ".join([*_PLAIN, "engine_options", *sorted(_THRESHOLDS)])
            raise ConfigError(f"unknown keyword {unknown[0]!r}; known: {known}", where=self._node.nodeid)
        opener = None
        if asked.get("model") and (self._node.config.rootpath / asked["model"]).is_dir():
            asked["model"] = str(self._node.config.rootpath / asked["model"])
        if callable(asked.get("engine")):
            opener = from_function(asked.pop("engine"))
        modes = asked.get("numerics")
        plain: dict[str, Any] = {k: asked.get(k) for k in _PLAIN if k != "numerics"}
        mine = Overrides(
            **plain,
            engine_options=asked.get("engine_options", {}),
            numerics=(modes,) if isinstance(modes, str) else tuple(modes) if modes else None,
            thresholds={k: v for k, v in asked.items() if k in _THRESHOLDS},
        )
        return self._state.overrides().under(mine), opener

    def _run(self, suite: Suite, opener: Any) -> Run:
        run = self._state.record if self._state.updating else self._state.check
        again = self._state.again(self._node.nodeid)
        return Run(tuple(run(suite, mode, opener=opener, again=again) for mode in suite.numerics))

    @staticmethod
    def _story(result: Mapping[str, Any]) -> str:
        rules = [*result["failures"], *(c["message"] for c in result["checks"] if c["status"] == "fail")]
        return (
            f"{result['path']} [{result['numerics']}] fails: {'; '.join(rules)}\n(details in the repro section below)"
        )
