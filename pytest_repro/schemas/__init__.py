"""The JSON Schemas of suite, golden and report, and the one way to check data against them."""

from __future__ import annotations

import json
import math
from functools import cache
from importlib import resources
from typing import Any

from jsonschema import Draft202012Validator, validators
from jsonschema.exceptions import ValidationError


def parse(text: str | bytes) -> Any:
    """JSON as it reads: a key that stands twice is an error, since of two values a reader would see the other one.

    Raises:
        ValueError: not JSON, or a key twice in one object.
        RecursionError: nested too deep.
    """
    return json.loads(text, object_pairs_hook=_each_once)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise ValueError(f"the key {twice[:40]!r} stands twice in one object")
    return found


def _finite(_: Any, value: Any) -> bool:
    """A NaN threshold would never be exceeded, an infinite envelope would explain anything."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(_: Any, value: Any) -> bool:
    """A count is an int: JSON Schema would take 2.0 for one, which here is a share."""
    return isinstance(value, int) and not isinstance(value, bool)


_Strict: Any = validators.extend(
    Draft202012Validator,
    type_checker=Draft202012Validator.TYPE_CHECKER.redefine("number", _finite).redefine("integer", _whole),
)


@cache
def validator(name: str, definition: str = "") -> Draft202012Validator:
    """The validator of `<name>.schema.json`, or of one of its `$defs`."""
    schema = json.loads(resources.files(__package__).joinpath(f"{name}.schema.json").read_text("utf-8"))
    if definition:
        schema = {"$ref": f"#/$defs/{definition}", "$defs": schema["$defs"]}
    checked: Draft202012Validator = _Strict(schema)
    return checked


def first_error(data: Any, name: str, definition: str = "") -> ValidationError | None:
    """The deepest, most telling violation, or None: (path in `.absolute_path`, text in `.message`)."""
    errors = sorted(
        validator(name, definition).iter_errors(data), key=lambda e: (-len(e.absolute_path), str(e.message))
    )
    return errors[0] if errors else None


def describe(error: ValidationError) -> str:
    """A violation as one short sentence: the whole offending value is never printed."""
    if error.validator == "additionalProperties":
        known = error.schema.get("properties", {})
        unknown = sorted(set(error.instance) - set(known))
        return f"unknown key {unknown[0]!r}; known keys: {', '.join(sorted(known))}"
    if error.validator == "required":
        return str(error.message)
    value = json.dumps(error.instance, default=str)
    shown = value if len(value) <= 60 else value[:57] + "..."
    if error.validator == "enum":
        return f"{shown} is not one of: {', '.join(map(str, error.validator_value))}"
    if error.validator in ("anyOf", "oneOf"):
        wanted = error.schema.get("description", "of the expected kind")
        return f"{shown} is not {wanted}"
    return f"{shown} is not allowed here: {error.validator} {error.validator_value}"
