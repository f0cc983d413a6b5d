"""What is asked: a suite is a folder with `suite.toml` and a JSON Lines file of prompts.

A suite is data from a pull request: it is validated against `schemas/suite.schema.json`, no path in it may leave its
folder, and nothing in it runs code unless the user opted in (see `accuracy.scorer`).
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from . import schemas
from .errors import ConfigError
from .generation import digest

SUITE_FILE = "suite.toml"
MOVED = ("rounding", "accuracy", "length")
"""Checks of a whole suite that fail because outputs moved, which a new golden may answer."""
SUITE_ITEMS = ("golden", "compute", *MOVED)
"""Names of the checks of a whole suite, which stand beside its prompts as test items: no prompt may be called so."""

Waiver = Literal["explained", "all", "none"]


@dataclass(frozen=True)
class Prompt:
    """One question."""

    id: str
    """Unique within the suite; becomes the test item's name."""
    content: str | list[dict[str, str]]
    """Text, put to the model as one user message if it has a chat template; or chat messages."""
    answer: str | None = None
    """The right answer, if it is to be scored."""


@dataclass(frozen=True)
class Thresholds:
    """When a suite fails (DESIGN section 4). A limit is a count if an int, a share of the suite's prompts if a float."""

    max_divergent: int | float = 0
    """Prompts whose output differs at all: near_tie + drift."""
    max_unexplained: int | float = 0
    """Prompts whose difference rounding cannot explain: drift."""
    accuracy_drop: float = 2.0
    """Points of accuracy that may be lost before the paired test is asked."""
    alpha: float = 0.05
    """Level of the paired accuracy test."""
    length_ratio: tuple[float, float] = (0.9, 1.1)
    """Allowed ratio of the mean output length to the golden's."""
    fp32_waiver: Waiver = "explained"
    """What observed FP32-class compute waives: differences that rounding explains, all output differences, or none."""


@dataclass(frozen=True)
class Overrides:
    """What a test keyword or the command line puts in the suite's place; None leaves it alone."""

    model: str | None = None
    engine: str | None = None
    numerics: tuple[str, ...] | None = None
    batch_size: int | None = None
    max_new_tokens: int | None = None
    thresholds: Mapping[str, Any] = field(default_factory=dict)
    engine_options: Mapping[str, Any] = field(default_factory=dict)

    def under(self, stronger: Overrides) -> Overrides:
        """These overrides, with those of a stronger source on top."""
        chosen = {
            name: getattr(stronger, name) if getattr(stronger, name) is not None else getattr(self, name)
            for name in ("model", "engine", "numerics", "batch_size", "max_new_tokens")
        }
        return Overrides(
            **chosen,
            thresholds={**self.thresholds, **stronger.thresholds},
            engine_options={**self.engine_options, **stronger.engine_options},
        )


_SHARD = re.compile(r"([1-9][0-9]{0,5})/([1-9][0-9]{0,5})")


@dataclass(frozen=True)
class Shard:
    """One of `count` parts of every suite: whole batches, dealt out in turn."""

    index: int
    """1 to count."""
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def spoken(self) -> str:
        """`1 of 4`."""
        return f"{self.index} of {self.count}"

    def batches(self, size: int, batch_size: int) -> list[tuple[int, ...]]:
        """Its batches of a suite of so many prompts: batch k, from 0, is in shard (k mod count) + 1."""
        starts = range((self.index - 1) * batch_size, size, self.count * batch_size)
        return [tuple(range(start, min(start + batch_size, size))) for start in starts]

    def share(self, size: int, batch_size: int) -> int:
        """Number of its prompts in a suite of so many; 0 with fewer batches than shards."""
        starts = range((self.index - 1) * batch_size, size, self.count * batch_size)
        return len(starts) * batch_size - max(0, starts[-1] + batch_size - size) if starts else 0

    def places(self, size: int, batch_size: int) -> list[int]:
        """Places of its prompts in a suite of so many."""
        return [i for batch in self.batches(size, batch_size) for i in batch]


def parse_shard(text: str, where: str = "--repro-shard") -> Shard:
    """`i/n` of `--repro-shard`.

    Raises:
        ConfigError: not of that form, or no shard of n.
    """
    found = _SHARD.fullmatch(text)
    if found is None or int(found[1]) > int(found[2]):
        raise ConfigError(
            f"{text!r} is not i/n with 1 <= i <= n",
            where=where,
            fix="e.g. --repro-shard 1/4, 2/4, 3/4 and 4/4",
        )
    return Shard(int(found[1]), int(found[2]))


@dataclass(frozen=True)
class Suite:
    """Prompts, the model they are put to, how it generates, and when the result fails."""

    name: str
    folder: Path
    """Where the suite lies, and its goldens beside it."""
    model: str
    """A model reference, see `models`."""
    prompts: tuple[Prompt, ...]
    engine: str = "transformers"
    engine_tables: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Engine name -> its options: `[engine.NAME]`, and for the suite's own engine what stands in `[engine]` itself."""
    user_options: Mapping[str, Any] = field(default_factory=dict)
    """Engine options that the user named (command line, test keyword): stronger, and not data of a pull request."""
    scorer: str = "last-number"
    pattern: str = ""
    """Regular expression of the `regex` scorer."""
    max_new_tokens: int = 96
    batch_size: int = 8
    numerics: tuple[str, ...] = ("native",)
    thresholds: Mapping[str, Thresholds] = field(default_factory=lambda: {"": Thresholds()})
    """By compute class; the key "" holds for classes without overrides of their own."""

    @property
    def engine_options(self) -> dict[str, Any]:
        """What the engine is opened with."""
        return {**self.engine_tables.get(self.engine, {}), **self.user_options}

    @property
    def scorer_spelt(self) -> str:
        """The scorer with its pattern."""
        return f"{self.scorer} {self.pattern}".strip()

    def thresholds_for(self, compute_class: str) -> Thresholds:
        """The thresholds of one compute class."""
        return self.thresholds.get(compute_class, self.thresholds[""])

    def batches(self) -> Iterator[tuple[int, ...]]:
        """Places of the prompts of each batch: the file's order, always whole, whatever subset is asked for."""
        for start in range(0, len(self.prompts), self.batch_size):
            yield tuple(range(start, min(start + self.batch_size, len(self.prompts))))

    def batches_of(self, shard: Shard | None) -> list[tuple[int, ...]]:
        """The batches of one shard, the same as in the whole; all of them without one."""
        return list(self.batches()) if shard is None else shard.batches(len(self.prompts), self.batch_size)

    def prompts_of(self, shard: Shard | None) -> tuple[Prompt, ...]:
        """The prompts of one shard, in the file's order; all of them without one."""
        return tuple(self.prompts[i] for batch in self.batches_of(shard) for i in batch)

    def digest_of_prompts(self) -> str:
        """What is asked and what the right answers are: equal for shards of one suite."""
        return digest([[p.id, p.content, p.answer] for p in self.prompts])


def load(path: Path, overrides: Overrides | None = None, defaults: Mapping[str, Any] | None = None) -> Suite:
    """Read a suite from its folder or its `suite.toml`.

    Args:
        path: the folder, or the file in it.
        overrides: test keywords and command line; stronger than the file.
        defaults: the table `[tool.pytest-repro]` of pyproject.toml, of the same shape as suite.toml; weaker than it.

    Raises:
        ConfigError: with file, line and field.
    """
    file = path if path.name == SUITE_FILE else path / SUITE_FILE
    text = _read(file)
    table = _parse(file, text)
    _validate(file, text, merge(defaults or {}, table))
    suite = _build(file, text, merge(defaults or {}, table))
    return apply(suite, overrides or Overrides())


def check_defaults(table: Mapping[str, Any], where: str) -> None:
    """Refuse what `[tool.pytest-repro]` may not hold; unlike a suite it may leave anything out.

    Raises:
        ConfigError: with the key.
    """
    for error in schemas.validator("suite").iter_errors(dict(table)):
        if error.validator != "required":
            name = ".".join(map(str, error.absolute_path))
            raise ConfigError(schemas.describe(error), where=f"{where} {name}".strip())


def table_of(text: str, where: str) -> dict[str, Any] | None:
    """The table `[tool.pytest-repro]` in the text of a pyproject.toml; None without one.

    Raises:
        ConfigError: not TOML, or a key that may not be there.
    """
    try:
        tool = tomllib.loads(text).get("tool", {})
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"not valid TOML: {exc}", where=where) from None
    if not isinstance(tool, dict) or "pytest-repro" not in tool:
        return None
    table = tool["pytest-repro"]
    if not isinstance(table, dict):
        raise ConfigError("not a table", where=f"{where} [tool.pytest-repro]")
    check_defaults(table, f"{where} [tool.pytest-repro]")
    return table


def defaults_around(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The nearest pyproject.toml around a folder that has a table for this package, and it; a file beside it and {}.

    A check, an acceptance and `verify` all ask here, so that none is held to other thresholds than the others.

    Raises:
        ConfigError: it, or a nearer pyproject.toml, cannot be read.
    """
    for above in (folder.resolve(), *folder.resolve().parents):
        file = above / "pyproject.toml"
        table = table_of(_read(file), str(file)) if file.is_file() else None
        if table is not None:
            return file, table
    return folder.resolve() / "pyproject.toml", {}


def thresholds_in(text: str | None, defaults: Mapping[str, Any], where: str) -> dict[str, Thresholds]:
    """The thresholds of a suite.toml's text, over defaults; without a suite.toml, as a test's own golden is, theirs.

    Raises:
        ConfigError: not TOML, or a threshold that there is not.
    """
    try:
        table = tomllib.loads(text) if text is not None else {}
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"not valid TOML: {exc}", where=where) from None
    named = merge(defaults, table).get("thresholds", {})
    if error := schemas.first_error({"thresholds": named}, "suite", "thresholds_by_class"):
        name = ".".join(map(str, error.absolute_path))
        raise ConfigError(schemas.describe(error), where=f"{where}{_line_of(text or '', name.split('.'))} [{name}]")
    return thresholds_by_class(named)


def modes_in(text: str, defaults: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The numerics modes of a suite.toml's text, over defaults.

    Raises:
        ConfigError: not TOML, or no list of modes.
    """
    try:
        table = merge(defaults, tomllib.loads(text))
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"not valid TOML: {exc}", where=where) from None
    run = table.get("run", {})
    named = run.get("numerics", Suite.numerics) if isinstance(run, dict) else None
    if not isinstance(named, list | tuple) or not all(isinstance(mode, str) for mode in named):
        raise ConfigError("not a list of modes", where=f"{where}{_line_of(text, ['run', 'numerics'])} [run.numerics]")
    return tuple(named)


def thresholds_in_force(folder: Path) -> dict[str, Thresholds]:
    """By compute class, as a check of the suite in this folder reads them.

    Raises:
        ConfigError: suite.toml or pyproject.toml cannot be read.
    """
    file = folder / SUITE_FILE
    return thresholds_in(_read(file) if file.exists() else None, defaults_around(folder)[1], str(file))


def merge(weak: Mapping[str, Any], strong: Mapping[str, Any]) -> dict[str, Any]:
    """Two tables of tables; the strong one wins, key by key."""
    out = dict(weak)
    for key, value in strong.items():
        old = out.get(key)
        out[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return out


def apply(suite: Suite, o: Overrides) -> Suite:
    """The suite under overrides.

    Raises:
        ConfigError: a threshold that does not exist, or a value out of its range.
    """
    modes = tuple(dict.fromkeys(o.numerics)) if o.numerics else None  # a mode named twice is checked once
    named = {"model": o.model, "engine": o.engine, "numerics": modes}
    sized = {"batch_size": o.batch_size, "max_new_tokens": o.max_new_tokens}
    for name, value in sized.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, not {value}", where=f"suite {suite.name}")
    changed: dict[str, Any] = {k: v for k, v in {**named, **sized}.items() if v is not None}
    changed["user_options"] = {**suite.user_options, **o.engine_options}
    if o.thresholds:
        changed["thresholds"] = {
            cls: replace(t, **_checked_thresholds(o.thresholds)) for cls, t in suite.thresholds.items()
        }
    return replace(suite, **changed)


def parse_threshold(text: str) -> tuple[str, Any]:
    """`NAME=VALUE` of `--repro-threshold` as TOML would read it: `max_divergent=0.5`, `length_ratio=[0.9, 1.1]`.

    Raises:
        ConfigError: no such threshold, or a value it cannot have.
    """
    name, eq, raw = text.partition("=")
    try:
        value = tomllib.loads(f"x = {raw.strip()}")["x"] if eq else None
    except tomllib.TOMLDecodeError:
        value = raw.strip()
    if value is None:
        raise ConfigError(f"{text!r} is not NAME=VALUE", where="--repro-threshold", fix="e.g. max_divergent=0")
    _checked_thresholds({name.strip(): value}, where="--repro-threshold")
    return name.strip(), value


def parse_engine_option(text: str, where: str = "--repro-engine-option") -> tuple[str, Any]:
    """`NAME=VALUE` of an option as TOML would read it, plain text where it is no TOML: `max_num_seqs=16`.

    Raises:
        ConfigError: not of that form.
    """
    name, eq, raw = text.partition("=")
    if not eq or not name.strip():
        raise ConfigError(f"{text!r} is not NAME=VALUE", where=where, fix="e.g. tensor_parallel_size=2")
    try:
        value = tomllib.loads(f"x = {raw.strip()}")["x"]
    except tomllib.TOMLDecodeError:
        value = raw.strip()
    if not isinstance(value, str | int | float | bool):
        raise ConfigError(f"{text!r}: a string, a number or a boolean", where=where)
    return name.strip(), value


def thresholds(table: Mapping[str, Any], *, where: str, fix: str) -> Thresholds:
    """Thresholds from a table, as they stand in a report.

    Raises:
        ConfigError: no such threshold, or a value it cannot have.
    """
    return Thresholds(**_checked_thresholds(table, where, fix))


def _checked_thresholds(table: Mapping[str, Any], where: str = "thresholds", fix: str = "") -> dict[str, Any]:
    error = schemas.first_error(dict(table), "suite", "thresholds")
    if error is not None:
        name = ".".join(map(str, error.absolute_path))
        raise ConfigError(schemas.describe(error), where=f"{where} {name}".strip(), fix=fix)
    return {k: tuple(v) if k == "length_ratio" else v for k, v in table.items()}


def _read(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except FileNotFoundError:
        raise ConfigError(
            "there is no such file", where=file, fix="name a folder that holds a suite.toml, e.g. golden/my-suite"
        ) from None
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"cannot be read: {exc}", where=file) from None


def _parse(file: Path, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"not valid TOML: {exc}", where=file) from None


def _validate(file: Path, text: str, table: Mapping[str, Any]) -> None:
    shaped = dict(table)
    error = schemas.first_error(shaped, "suite")
    if error is None:
        return
    path = [str(p) for p in error.absolute_path]
    if error.validator == "additionalProperties":
        path.append(sorted(set(error.instance) - set(error.schema["properties"]))[0])
    raise ConfigError(schemas.describe(error), where=f"{file}{_line_of(text, path)} [{'.'.join(path) or 'top level'}]")


def _line_of(text: str, path: Sequence[str]) -> str:
    """`:LINE` of a key in TOML text, or "" if it is not spelt there (it came from pyproject.toml, say)."""
    table, *keys = path or [""]
    inside = not keys
    for number, line in enumerate(text.splitlines(), 1):
        header = re.match(r"\s*\[+\s*([^\]]+?)\s*\]+", line)
        if header:
            inside = header[1] == ".".join(path[:-1])
            if header[1] == ".".join(path):
                return f":{number}"
        elif inside and re.match(rf"\s*[\"']?{re.escape(keys[-1] if keys else table)}[\"']?\s*=", line):
            return f":{number}"
    return ""


def _build(file: Path, text: str, table: Mapping[str, Any]) -> Suite:
    where = f"{file}{_line_of(text, ['suite', 'prompts'])} [suite.prompts]"
    prompts = load_prompts(inside(file.parent, table["suite"]["prompts"], where=where))
    return from_table(table, folder=file.parent, prompts=prompts)


def from_table(table: Mapping[str, Any], *, folder: Path, prompts: tuple[Prompt, ...]) -> Suite:
    """A suite from a validated table of suite.toml's shape and its prompts."""
    head = table["suite"]
    return Suite(
        name=head["name"],
        folder=folder,
        model=head["model"],
        prompts=prompts,
        engine=head.get("engine", "transformers"),
        engine_tables=_engine_tables(head.get("engine", "transformers"), table.get("engine", {})),
        scorer=head.get("scorer", "last-number"),
        pattern=head.get("pattern", ""),
        numerics=tuple(table.get("run", {}).get("numerics", ("native",))),
        thresholds=thresholds_by_class(table.get("thresholds", {})),
        **table.get("generation", {}),
    )


def thresholds_by_class(table: Mapping[str, Any]) -> dict[str, Thresholds]:
    """The table `[thresholds]` as `Suite.thresholds` holds it.

    Raises:
        ConfigError: no such threshold, or a value it cannot have.
    """
    base = {k: v for k, v in table.items() if not isinstance(v, Mapping)}
    per_class = {k: v for k, v in table.items() if isinstance(v, Mapping)}
    return {cls: Thresholds(**_checked_thresholds({**base, **per_class.get(cls, {})})) for cls in ("", *per_class)}


def _engine_tables(own: str, table: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    named = {name: dict(value) for name, value in table.items() if isinstance(value, Mapping)}
    plain = {name: value for name, value in table.items() if not isinstance(value, Mapping)}
    return {**named, own: {**plain, **named.get(own, {})}}


def inside(folder: Path, name: str, *, where: str) -> Path:
    """A path that a suite names, which must lie in the suite's own folder, symbolic links followed.

    Raises:
        ConfigError: it is absolute or leads outside.
    """
    try:
        target = (folder / name).resolve()
    except (OSError, ValueError, RuntimeError) as exc:
        raise ConfigError(f"the path {name!r} cannot be followed: {exc}", where=where) from None
    if Path(name).is_absolute() or not target.is_relative_to(folder.resolve()):
        raise ConfigError(
            f"the path {name!r} leaves the suite's folder", where=where, fix="keep the file in the suite's folder"
        )
    return target


def load_prompts(file: Path) -> tuple[Prompt, ...]:
    """Read prompts, one JSON object a line.

    Raises:
        ConfigError: with the line: not JSON, a missing or unknown field, an id seen before; or no prompt at all.
    """
    seen: dict[str, int] = {}
    prompts = []
    for number, line in enumerate(_read(file).split("\n"), 1):  # not splitlines: U+2028 may stand in a string
        if not line.strip():
            continue
        prompt = parse_prompt(line, where=f"{file}:{number}")
        if prompt.id in seen:
            raise ConfigError(
                f"duplicate id {prompt.id!r}, first used on line {seen[prompt.id]}", where=f"{file}:{number}"
            )
        seen[prompt.id] = number
        prompts.append(prompt)
    if not prompts:
        raise ConfigError(
            "the suite is empty: no prompts", where=file, fix='add a line like {"id": "p01", "prompt": "Hello"}'
        )
    return tuple(prompts)


def parse_prompt(line: str, *, where: str) -> Prompt:
    """One line of a file of prompts.

    Raises:
        ConfigError: not JSON, or a missing or unknown field.
    """
    try:
        data = schemas.parse(line)
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"not valid JSON: {exc}", where=where) from None
    error = schemas.first_error(data, "suite", "prompt")
    if error is not None:
        name = ".".join(map(str, error.absolute_path))
        raise ConfigError(schemas.describe(error), where=f"{where} [{name}]" if name else where)
    if ("prompt" in data) == ("messages" in data):
        raise ConfigError('a prompt needs either "prompt" or "messages"', where=where)
    if data["id"] in SUITE_ITEMS:
        raise ConfigError(f"the id {data['id']!r} is taken by a check of the whole suite", where=f"{where} [id]")
    content = data["prompt"] if "prompt" in data else data["messages"]
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as exc:
        raise ConfigError(f"half of a surrogate pair, which is not text: {exc.reason}", where=where) from None
    return Prompt(id=data["id"], content=content, answer=data.get("answer"))
