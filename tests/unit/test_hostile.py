"""Hostile texts, pushed through every surface that is made from a report: each must leave the surface's structure alone.

The measure is the same report with a harmless word in every place: what differs may only be what stands in code spans,
fenced blocks, quoted strings and text nodes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from markdown_it import MarkdownIt

from pytest_repro.fingerprint import Change
from pytest_repro.generation import digest
from pytest_repro.golden import Review
from pytest_repro.report import document, github, html, intoto, junit, markdown, terminal
from pytest_repro.result import Check, PromptResult, SuiteResult, Texts
from pytest_repro.verdict import Verdict
from tests.hostile import ACTIVE, TEXTS, commands, file_commands
from tests.unit.builders import IDENTITY, SETTINGS, judged, suite_result

NAMES = tuple(TEXTS)
HARMLESS = "word"


@cache
def hostile(text: str) -> list[dict[str, Any]]:
    """Two failing suites that say `text` wherever a report can say anything."""
    texts = Texts(text, text, text)
    parted = {"divergence_index": 1, "deficit": 0.5, "golden_text": texts, "now_text": texts, "golden_full": text,
              "now_full": text, "prompt": text, "reason": f"{text} why", "arbiter": {"finding": "golden", "golden_distance": 0.5, "candidate_distance": 0.25, "p_value": 0.1}}  # fmt: skip
    golden = {"name": text, "digest": digest("g"), "recorded": text, "engine": text, "batch_size": text,
              "review": vars(Review(text, text, text, None)), "accuracy": None, "mean_abs_dlogp": 0.5}  # fmt: skip
    shared = {
        "name": text, "path": text, "numerics": text, "claimed": text, "golden": golden,
        "observed": {"compute_class": text, "detail": text}, "notes": (text, text), "next_steps": ((text, text),),
        "environment": {**IDENTITY, "model.weights": digest("w"), text or "x": text, "engine": text},
        "environment_diff": (Change(text, "numerics", text, text), Change(text, "identity", None, text)),
        "settings": {**SETTINGS, "engine": text, "scorer": text},
    }  # fmt: skip
    checks = tuple(Check(name, "fail", text) for name in ("golden", "compute", "accuracy"))
    calm = (Check("length", "pass", f"a\n{text}"), Check("accuracy", "skip", text))
    results: list[SuiteResult] = [
        suite_result(
            judged(text, Verdict.DRIFT, **parted),
            judged(text + "2", Verdict.NEAR_TIE, **parted),
            judged("c"),
            **shared,
            checks=(*checks, *calm),
        ),
        suite_result(
            *(PromptResult(f"{text}{i}", Verdict.ERROR, f"{text} ") for i in range(2)), **shared, checks=checks[:1]
        ),
    ]
    found: list[dict[str, Any]] = json.loads(json.dumps([document.of_suite(result) for result in results]))
    return found


@pytest.fixture(params=NAMES)
def text(request: pytest.FixtureRequest) -> str:
    """A hostile text."""
    return TEXTS[request.param]


def plain(shown: str, *, lines: bool = True) -> str:
    """Nothing in it steers a terminal, hides or reorders; no command of a runner, unless it is our own."""
    assert not ACTIVE.search(shown), ascii(ACTIVE.findall(shown))
    assert lines or "\n" not in shown
    return shown


def skeleton(text: str) -> list[tuple[Any, ...]]:
    """A Markdown document without what stands in its code: every block, link, image, tag and word that is left."""
    parser = MarkdownIt("gfm-like")
    found: list[tuple[Any, ...]] = []
    for token in parser.parse(text):
        inner = [(t.type, t.tag, t.attrs, "" if t.type == "code_inline" else t.content) for t in token.children or []]
        content = "" if token.type in ("fence", "inline") else token.content
        found.append((token.type, token.tag, token.info, token.attrs, content, inner))
    return found


MARKDOWN: dict[str, Callable[[list[dict[str, Any]]], str]] = {
    "summary": lambda suites: markdown.summary(
        suites, where="report.json", run="https://github.com/o/r/actions/runs/1"
    ),
    "comment": lambda suites: markdown.comment(suites, "check"),
}


@pytest.mark.parametrize("surface", MARKDOWN)
def test_markdown_keeps_its_structure(text: str, surface: str) -> None:
    made = MARKDOWN[surface](hostile(text))
    expected = MARKDOWN[surface](hostile(HARMLESS))
    assert skeleton(made) == skeleton(expected)
    plain(made)
    assert list(commands(made)) == []
    assert len(made.encode()) < markdown.COMMENT_LIMIT


def test_the_skeleton_sees_what_gets_out() -> None:
    """The measure itself: pasted between words, most of these do act."""
    base = skeleton("a word b\n")
    acts = {name for name, piece in TEXTS.items() if len(piece) < 5000 and skeleton(f"a {piece} b\n") != base}
    assert {"link", "image", "autolink", "heading", "table", "script", "fence-3", "mention", "references"} <= acts
    assert len(acts) > 60


def test_a_comment_has_one_marker_and_it_is_the_first_line(text: str) -> None:
    first, rest = markdown.comment(hostile(text), "check").split("\n", 1)
    assert first == "<!-- pytest-repro: check -->"
    assert not [t for t in skeleton(rest) if t[0].startswith("html") or any(i[0] == "html_inline" for i in t[5])]


def test_a_key_cannot_leave_the_marker(text: str) -> None:
    marker = markdown.marker(text)
    assert marker.count("\n") == 1 and len(marker) < 150 and marker.isascii()
    assert marker.startswith("<!-- pytest-repro: ") and marker.endswith(" -->\n") and "--" not in marker[4:-5]


def test_a_check_that_broke_off_is_told_without_effect(text: str) -> None:
    made = plain(markdown.broken_off([text, f"x.json: {text}"], run="https://github.com/o/r/actions/runs/1"))
    assert skeleton(made) == skeleton(markdown.broken_off([HARMLESS] * 2, run="https://github.com/o/r/actions/runs/1"))
    assert list(commands(made)) == []


def test_annotations_are_ours_alone(text: str, tmp_path: Path) -> None:
    def told(piece: str) -> list[str]:
        return github.errors(hostile(piece), tmp_path, tmp_path)

    lines = told(text)
    assert [plain(line, lines=False) for line in lines] == lines
    assert len(lines) == len(told(HARMLESS)) <= github.MOST_ANNOTATIONS
    found = list(commands("\n".join(lines)))
    assert [name for name, _, _ in found] == ["error"] * len(lines)
    for _, properties, _ in found:
        pairs = [pair.partition("=")[0] for pair in properties.split(",")]
        assert pairs == ["title"], "no line of a file outside the repository"
    assert all(len(line) < 10_000 for line in lines)


def test_outputs_are_ours_alone(text: str) -> None:
    suites = hostile(text)
    values = github.outputs(suites, ended=True, report=text, others=0)
    lines = plain(github.output_lines(values))
    found = file_commands(lines)
    assert (
        found == values and found.keys() == github.outputs(hostile(HARMLESS), ended=True, report="x", others=0).keys()
    )
    assert found["verdict"] == "fail" and found["drift"] == "1" and found["error"] == "2"
    assert len(json.loads(found["failed_suites"])) == 2 and "\n" not in found["failed_suites"]


def test_junit_is_well_formed_and_has_the_same_cases(text: str) -> None:
    def shape(root: ElementTree.Element) -> list[tuple[str, list[str]]]:
        return [(e.tag, sorted(e.attrib)) for e in root.iter() if e.tag != "property"]

    made = junit.document(hostile(text))
    root = ElementTree.fromstring(made)
    assert shape(root) == shape(ElementTree.fromstring(junit.document(hostile(HARMLESS))))
    assert root.attrib["tests"] == "11" and root.attrib["errors"] == "2" and root.attrib["failures"] == "6"
    plain(made.decode())
    for element in root.iter():
        for value in (*element.attrib.values(), element.text or ""):
            plain(value)


def test_an_in_toto_statement_says_what_it_should(text: str) -> None:
    made = intoto.statement(hostile(text), text, b"{}", run="")
    assert made.isascii()
    statement = json.loads(made)
    predicate = statement["predicate"]
    assert predicate["result"] == "FAILED" and predicate.keys() == {
        "result",
        "configuration",
        "passedTests",
        "warnedTests",
        "failedTests",
    }
    assert [len(predicate[name]) for name in ("passedTests", "warnedTests", "failedTests")] == [2, 0, 8]
    for name in (
        *predicate["failedTests"],
        *(s["name"] for s in statement["subject"]),
        *(c["name"] for c in predicate["configuration"]),
    ):
        plain(name, lines=False)


class Elements(HTMLParser):
    """The elements of a page, with the names of their attributes, and what of those a browser would act on."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: set[tuple[str, tuple[str, ...]]] = set()
        self.acting: set[tuple[str, str | None]] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.add((tag, tuple(sorted(name for name, _ in attrs))))
        self.acting |= {
            (n, v) for n, v in attrs if n in ("href", "src", "srcset", "action", "style") or n.startswith("on")
        }


def test_the_page_has_no_element_of_its_making(text: str) -> None:
    made, wanted = (Elements(html.render(document.of_session(hostile(piece), []))) for piece in (text, HARMLESS))
    tags = {tag for tag, _ in wanted.found}
    assert {tag for tag, _ in made.found} <= tags
    assert {names for _, names in made.found} <= {names for _, names in wanted.found}
    assert {name for name, _ in made.acting} <= {name for name, _ in wanted.acting}
    plain(html.render(document.of_session(hostile(text), [])))


def test_the_terminal_shows_it_inert(text: str) -> None:
    for suite in hostile(text):
        for verbose in (False, True):
            lines = [line for line, _ in terminal.lines(suite, verbose=verbose)] + [terminal.title(suite)]
            for line in lines:
                plain(line, lines=False)
            assert list(commands("\n".join(lines))) == []
            assert len(lines) < 100 or "\n" in text


def test_the_json_report_carries_it_as_data(text: str, tmp_path: Path) -> None:
    report = document.of_session(hostile(text), [])
    document.write(tmp_path / "report.json", report)
    raw = (tmp_path / "report.json").read_bytes()
    assert raw.isascii() and not ACTIVE.search(raw.decode()) and list(commands(raw.decode())) == []
    (first, _) = document.read(tmp_path / "report.json")
    assert first.prompts[0].id == json.loads(json.dumps(text))
    assert first.name == text
