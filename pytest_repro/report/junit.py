"""JUnit: properties of a test item (`user_properties`, which xdist carries to the controller), and a whole document.

The document is made from reports, for a job that checks without keeping pytest's own `--junitxml`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from ..fingerprint import class_of
from ..generation import digest
from ..text import inert
from . import terminal


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


def document(suites: Sequence[Mapping[str, Any]]) -> bytes:
    """A JUnit document of some suites: a test case a prompt, and one a check of the whole suite."""
    root = Element("testsuites", name="pytest-repro")
    for suite in suites:
        root.append(_suite(suite))
    for name in ("tests", "failures", "errors", "skipped"):
        root.set(name, str(sum(int(child.attrib[name]) for child in root)))
    data: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return data


def _suite(suite: Mapping[str, Any]) -> Element:
    name = f"{suite['path']}/suite.toml::{suite['numerics']}"
    found = Element("testsuite", name=inert(name), time=f"{suite['seconds']:.3f}")
    _add_properties(found, properties(suite, None))
    for prompt in suite["prompts"]:
        case = SubElement(found, "testcase", classname=inert(name), name=inert(prompt["id"]))
        _add_properties(case, properties(suite, prompt))
        if prompt["fails"]:
            told = "\n".join(text for text, _ in terminal.prompt_lines(prompt))
            kind = "error" if prompt["verdict"] == "error" else "failure"
            SubElement(case, kind, type=prompt["verdict"], message=inert(prompt["fails"])).text = told
    for check in suite["checks"]:
        case = SubElement(found, "testcase", classname=inert(name), name=check["name"])
        if check["status"] != "pass":
            kind = "skipped" if check["status"] == "skip" else "failure"
            SubElement(case, kind, type=check["name"], message=inert(check["message"]))
    for count, tag in (("tests", "testcase"), ("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        found.set(count, str(sum(1 for _ in found.iter(tag))))
    return found


def _add_properties(element: Element, pairs: Sequence[tuple[str, str]]) -> None:
    held = SubElement(element, "properties")
    for name, value in pairs:
        SubElement(held, "property", name=name, value=inert(value))
