"""A first suite, from a model reference and a file of prompts: the texts of its files. Pure.

Prompts come as JSON Lines (`prompt` or `messages`, and an `answer`; or `question`, as GSM8K has it, whose answers end in
`#### 42`) or as plain lines.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .accuracy import last_number
from .errors import ConfigError
from .schemas import parse
from .suite import Prompt, parse_prompt

ACTION = "./.github/actions/repro-check"
_JSON_LINES = (".jsonl", ".ndjson", ".json")
_TABLES = (".csv", ".tsv", ".parquet", ".arrow", ".xlsx")
_PLAIN_PATH = re.compile(r"[A-Za-z0-9._/ @+-]+")
_SEGMENT = r"(?!\.{1,2}(?:[/@]|$))[A-Za-z0-9._-]+"
_ACTION = re.compile(rf"[.$](?:/{_SEGMENT})+|{_SEGMENT}(?:/{_SEGMENT})+@[A-Za-z0-9._/-]+")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Recipe:
    """What a first suite is made of."""

    name: str
    model: str
    prompts: tuple[Prompt, ...]
    engine: str = "transformers"
    numerics: tuple[str, ...] = ("fp32", "bf16")
    scorer: str = "last-number"
    max_new_tokens: int = 96
    batch_size: int = 8
    options: dict[str, str] = field(default_factory=dict)
    """More keys of `[suite]`: `pattern`."""
    engine_options: dict[str, Any] = field(default_factory=dict)
    """Keys of `[engine]`."""

    @property
    def names_code(self) -> bool:
        """Whether pytest imports what the suite names, which it does on request only."""
        return ":" in self.engine or ":" in self.scorer


# --- prompts --------------------------------------------------------------------------------------------------------


def prompts_from(text: str, *, where: str, suffix: str, limit: int | None = None) -> tuple[Prompt, ...]:
    """The prompts of a file.

    Args:
        text: its content.
        where: its name, for messages.
        suffix: the ending of its name, which may tell what it holds.
        limit: most prompts to take, from the start; None takes all.

    Raises:
        ConfigError: with the line: not JSON, no prompt, an id seen before; or none at all.
    """
    if suffix in _TABLES:
        raise ConfigError(f"a table ({suffix}) is no file of prompts", where=where, fix="write one JSON object a line")
    rows = [(n, line.strip()) for n, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1) if line.strip()]
    if not rows:
        raise ConfigError("no prompts are in it", where=where, fix="one prompt a line, or one JSON object a line")
    rows = rows[:limit]
    if suffix in _JSON_LINES and rows[0][1].startswith("["):
        raise ConfigError(
            "a JSON array, where one JSON object a line is needed",
            where=f"{where}:{rows[0][0]}",
            fix="jq -c '.[]' FILE",
        )
    as_json = suffix in _JSON_LINES or rows[0][1].startswith("{")
    make: Callable[[str, str], dict[str, Any]] = _from_json if as_json else (lambda line, _: {"prompt": line})
    made = [(f"{where}:{n}", make(line, f"{where}:{n}")) for n, line in rows]
    return _named(made)


def _named(rows: Sequence[tuple[str, dict[str, Any]]]) -> tuple[Prompt, ...]:
    width = max(2, len(str(len(rows))))
    seen: dict[str, str] = {}
    prompts = []
    for i, (where, row) in enumerate(rows, 1):
        prompt = parse_prompt(json.dumps({"id": f"p{i:0{width}}", **row}), where=where)
        if prompt.id in seen:
            raise ConfigError(f"the id {prompt.id!r} is there twice, first in {seen[prompt.id]}", where=where)
        seen[prompt.id] = where
        prompts.append(prompt)
    return tuple(prompts)


def _from_json(line: str, where: str) -> dict[str, Any]:
    try:
        row = parse(line)
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"not valid JSON: {exc}", where=where, fix="one JSON object a line") from None
    if not isinstance(row, dict):
        raise ConfigError("not a JSON object", where=where, fix='e.g. {"prompt": "What is 6 * 7?", "answer": "42"}')
    asked = [name for name in ("prompt", "messages", "question") if name in row]
    if len(asked) != 1:
        what = f"both {asked[0]!r} and {asked[1]!r}" if asked else 'no "prompt", "messages" or "question"'
        raise ConfigError(what, where=where, fix='e.g. {"prompt": "What is 6 * 7?", "answer": "42"}')
    out: dict[str, Any] = {"messages" if asked[0] == "messages" else "prompt": row[asked[0]]}
    if isinstance(row.get("id"), str | int) and not isinstance(row.get("id"), bool):
        out["id"] = str(row["id"])
    if row.get("answer") is not None:
        out["answer"] = _answer(row["answer"], where)
    return out


def _answer(answer: Any, where: str) -> str:
    """The right answer: a number as text; of a worked solution as GSM8K has it, what follows the last `####`."""
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise ConfigError("the answer is neither text nor a number", where=f"{where} [answer]")
    if isinstance(answer, float) and not math.isfinite(answer):
        raise ConfigError(f"the answer is {answer}, which no answer equals", where=f"{where} [answer]")
    _, marked, final = str(answer).rpartition("####")
    return final.strip().replace(",", "") if marked else str(answer).strip()


def scorer_for(prompts: Sequence[Prompt]) -> str:
    """`last-number` if every answer is a number (or there is none), `exact` otherwise."""
    answers = [p.answer for p in prompts if p.answer is not None]
    return "last-number" if all(last_number(answer, answer) for answer in answers) else "exact"


def prompt_lines(prompts: Sequence[Prompt]) -> str:
    """prompts.jsonl."""
    return "".join(
        json.dumps(
            {
                "id": p.id,
                "prompt" if isinstance(p.content, str) else "messages": p.content,
                **({} if p.answer is None else {"answer": p.answer}),
            }
        )
        + "\n"
        for p in prompts
    )


# --- suite.toml -----------------------------------------------------------------------------------------------------


def name_from(folder: str) -> str:
    """A suite's name from its folder's."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", folder).strip("-._")
    if not _NAME.fullmatch(name):
        raise ConfigError("no suite's name can be made of the folder's", where=folder, fix="--name NAME")
    return name


def suite_toml(recipe: Recipe) -> str:
    """suite.toml, with comments for whoever reads it first."""
    answers = sum(p.answer is not None for p in recipe.prompts)
    more = "".join(f"{key} = {quoted(value)}\n" for key, value in recipe.options.items())
    relaxed = "".join(
        f"\n[thresholds.{cls}]\nmax_divergent = 1.0      # rounding may move any output on another machine; nothing else may\n"
        for cls in ("bf16", "fp16")
        if cls in recipe.numerics
    )
    return f"""\
# {len(recipe.prompts)} prompts, {answers} of them with an answer. Made by pytest-repro init.
[suite]
name    = {quoted(recipe.name)}
model   = {quoted(recipe.model)}{_model_comment(recipe)}
engine  = {quoted(recipe.engine)}
prompts = "prompts.jsonl"      # one JSON object a line: id, prompt (or messages), answer
scorer  = {quoted(recipe.scorer)}
{more}{_engine_table(recipe)}
[generation]
max_new_tokens = {recipe.max_new_tokens}
batch_size     = {recipe.batch_size}             # part of the numerics: other sizes flip near-tied tokens in 16 bits

[run]
numerics = {json.dumps(list(recipe.numerics))}      # each is checked in turn against a golden of its own class

[thresholds]
max_divergent   = 0      # prompts whose output differs at all: a count, or a share with a dot (0.5)
max_unexplained = 0      # of these, those that rounding cannot explain
accuracy_drop   = 2.0    # points that may be lost before the paired test is asked
{relaxed}"""


def _engine_table(recipe: Recipe) -> str:
    rows = (
        f"{name} = {quoted(value) if isinstance(value, str) else json.dumps(value)}\n"
        for name, value in recipe.engine_options.items()
    )
    return f"\n[engine]\n{''.join(rows)}" if recipe.engine_options else ""


def _model_comment(recipe: Recipe) -> str:
    hub = re.fullmatch(r"[A-Za-z0-9._-]+/[A-Za-z0-9._-]+", recipe.model)
    return "      # add @revision: a branch moves" if hub and recipe.engine in ("transformers", "vllm") else ""


def quoted(text: str) -> str:
    """A TOML string. JSON's escapes are TOML's, but for characters beyond 16 bits; what cannot be seen is escaped."""
    shown = json.dumps(text, ensure_ascii=False)
    return "".join(
        c if c.isprintable() else f"\\u{ord(c):04x}" if ord(c) < 65536 else f"\\U{ord(c):08x}" for c in shown
    )


# --- the workflow ---------------------------------------------------------------------------------------------------

_ALLOWED = """\
          arguments: --repro-allow-code # the suite names code, which is imported on request only
"""


def workflow(golden: str, numerics: Sequence[str], action: str, engine: str, *, allow_code: bool = False) -> str:
    """A GitHub workflow that checks the suite on every pull request, and its goldens' history.

    Args:
        golden: the suite's folder.
        numerics: modes to check.
        action: where the workflow finds `repro-check`.
        engine: of the suite; says what is to be installed.
        allow_code: whether the suite names code, which pytest imports on request only.

    Raises:
        ConfigError: a path that GitHub would read as more than a path, or no action.
    """
    if not _PLAIN_PATH.fullmatch(golden):
        raise ConfigError(
            "the suite's folder has signs that a workflow gives a meaning to",
            where=golden,
            fix="letters, digits, . _ - /",
        )
    if not _ACTION.fullmatch(action):
        raise ConfigError(
            f"{action!r} names no action",
            where="--action",
            fix="OWNER/REPO/PATH@COMMIT, or a path of this repository: ./PATH, $/PATH",
        )
    installed = "pytest-repro" + (f"[{engine}]" if engine in ("transformers", "vllm", "openai") else "")
    return f"""\
name: repro
on:
  push:
    branches: [main]
  pull_request:

permissions:
  contents: read

concurrency:
  group: repro-${{{{ github.ref }}}}
  cancel-in-progress: true

jobs:
  repro:
    runs-on: ubuntu-24.04
    timeout-minutes: 60
    steps:
      - uses: actions/checkout@11bd71901bbe5b1630ceea73d27597364c9af683 # v4.2.2
        with:
          fetch-depth: 0 # pytest-repro verify reads the history of the goldens
          persist-credentials: false
      - uses: actions/setup-python@a26af69be951a213d495a4c3e4e4022e16d87065 # v5.6.0
        with:
          python-version: "3.12"
      - uses: actions/cache@5a3ec84eff668545956fd18022155c47e93e2684 # v4.2.3
        with:
          path: |
            ~/.cache/pytest-repro
            ~/.cache/huggingface
          key: models-${{{{ hashFiles('{golden}/suite.toml') }}}}
      - run: pip install {json.dumps(installed)}
      - run: pytest-repro verify {json.dumps(golden)}
      - uses: {action}
        with:
          golden: {json.dumps(golden)}
          numerics: {json.dumps(",".join(numerics))}
{_ALLOWED if allow_code else ""}"""
