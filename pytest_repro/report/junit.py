"""JUnit properties of a test item: `user_properties`, which xdist carries to the controller."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..fingerprint import class_of
from ..generation import digest


def properties(suite: Mapping[str, Any], prompt: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Name and value pairs of one item; strings, since that is what JUnit XML holds."""
    judged = {k: v for k, v in suite["environment"].items() if class_of(k) != "information"}
    found = {
        "repro.golden": (suite["golden"] or {}).get("name"),
        "repro.fingerprint": digest(judged) if judged else None,
        "repro.observed_compute": suite["observed_compute"],
    }
    if prompt is not None:
        names = ("verdict", "method", "divergence_index", "deficit", "golden_gap", "mean_abs_dlogp")
        found |= {f"repro.{name}": prompt[name] for name in names}
    return [(name, str(value)) for name, value in found.items() if value is not None]
