"""What a model, a suite or an engine says must not act: in a terminal, in a CI log, in a report."""

from __future__ import annotations

import re

import pytest

from .project import Project, Result

PIECES = {
    "escape": ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
    "title": ("\x1b]0;t\x07\r\x00", "\\x1b]0;t\\x07\\x0d\\x00"),
    "c1": ("\x9b2J", "\\x9b2J"),
    "command": ("\n::error::x", "⏎::error::x"),
    "bracket": ("##[error]y", "#\\x23[error]y"),
    "bidi": ("\u202eab\u2066", "\\u202eab\\u2066"),
    "invisible": ("a\u200bb\u2028", "a\\u200bb\\u2028"),
    "html": ("<script>1", "<script>1"),
}
"""Prompt -> (what the model says, as it may be shown); no longer than what is shown before a divergence."""
EVIL = "".join(piece for piece, _ in PIECES.values()) + " end"
ENGINE = """
PIECES = {pieces!r}

def answer(prompts):
    return [PIECES[p.removeprefix("question ")] + {suffix!r} + PIECES[p.removeprefix("question ")] for p in prompts]

def fail(prompts):
    raise RuntimeError({evil!r})
"""


def _engine(suffix: str) -> str:
    return ENGINE.format(pieces={name: piece for name, (piece, _) in PIECES.items()}, suffix=suffix, evil=EVIL)


ACTIVE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f]")


def _inert(result: Result) -> Result:
    """Nothing steers a terminal, and no line is a command to a CI runner, which trims a line before it looks."""
    assert not ACTIVE.search(result.text), ascii(result.text)
    commands = [line for line in result.text.splitlines() if line.lstrip().startswith("::") or "##[" in line]
    assert commands == []
    return result


def _inert_file(data: bytes) -> None:
    text = data.decode("utf-8")
    assert not ACTIVE.search(text), ascii(text)


@pytest.fixture
def evil(project: Project) -> Project:
    """A suite whose engine says such things."""
    project.suite({name: [1] for name in PIECES}, engine=None, suite={"engine": "engine:answer"})
    return project.write("engine.py", _engine("one"))


def test_model_text_is_inert_everywhere(evil: Project) -> None:
    code = "--repro-allow-code"
    evil.update(code).accept()
    golden = (evil.folder / "bf16.golden.jsonl").read_bytes()
    assert golden.isascii()
    _inert_file(golden)

    evil.write("engine.py", _engine("two"))
    result = _inert(evil.check(code, "-vv", "--repro-report-json", "report.json", "--junitxml=junit.xml"))
    assert result.rc == 1
    assert f"{len(PIECES)} drift" in result.out
    report, junit = ((evil.root / name).read_bytes() for name in ("report.json", "junit.xml"))
    assert report.isascii()
    for document in (report, junit):
        _inert_file(document)
    assert b"<script>" not in junit

    evil.update(code)
    changed = _inert(evil.cli("diff"))
    assert changed.rc == 1
    for name, (piece, shown) in PIECES.items():
        assert f"{shown}|o|" in result.out, name
        assert f"{shown}one{shown}" in changed.out, name
        texts = {p["id"]: p["golden_text"] for p in evil.json()["suites"][0]["prompts"]}
        assert texts[name]["before"] == piece.encode()[-12:].decode(), "the report keeps what was said"


def test_goldens_are_shown_inert(evil: Project) -> None:
    shown = evil.update("--repro-allow-code").accept().cli("show")
    assert shown.rc == 0
    _inert(shown)


def test_a_text_that_begins_as_a_command_is_shown_inert(project: Project) -> None:
    shown = project.suite(texts={"a": "::error::x"}).update().accept().cli("show")
    assert "error" in shown.out
    _inert(shown)


def test_errors_of_an_engine_are_inert(evil: Project) -> None:
    evil.update("--repro-allow-code").accept()
    engine = ("--repro-engine", "engine:fail")
    for result in (
        evil.check(*engine, "--junitxml=junit.xml", "--repro-report-json", "report.json"),
        evil.pytest("--repro-update", "golden", *engine),
    ):
        assert result.rc == 1
        assert "RuntimeError" in result.out
        _inert(result)
    for name in ("junit.xml", "report.json"):
        _inert_file((evil.root / name).read_bytes())


@pytest.mark.parametrize("option", ["--repro-check", "--repro-update"])
def test_an_error_of_one_prompt_is_inert(accepted: Project, option: str) -> None:
    result = accepted.script(b={"error": EVIL}).pytest(option, "golden")
    assert result.rc == 1
    assert "\\u202eab" in result.out
    _inert(result)


def test_a_failure_in_a_test_of_ones_own_is_inert(evil: Project) -> None:
    test = "from engine import fail\ndef test_own(repro):\n    repro.check('golden/demo', engine=fail)\n"
    evil.update("--repro-allow-code").accept()
    for option in ("--repro-check", "--repro-update"):
        result = evil.write("test_own.py", test).pytest(option, "test_own.py")
        assert result.rc == 1
        _inert(result)


def test_lone_surrogates_do_not_break_anything(accepted: Project) -> None:
    accepted.script(a={"text": "broken \ud800 text"}).update().accept()
    result = accepted.check("-v", "--repro-report-json", "report.json", "--junitxml=junit.xml")
    assert result.rc == 0
    shown = _inert(accepted.cli("show"))
    assert shown.rc == 0
    assert "broken \\ud800 text" in shown.out


BAD_SUITES = {
    "key": 'EVIL = 1\n[suite]\nname = "demo"\n',
    "engine": '[suite]\nname = "demo"\nmodel = "m"\nengine = EVIL\nprompts = "prompts.jsonl"\n',
    "option": '[suite]\nname = "demo"\nmodel = "m"\nengine = "scripted"\nprompts = "prompts.jsonl"\n[engine]\nEVIL = 1\n',
}
TOML_EVIL = r'"\u001b[31m\n::error::x\n##[error]y\u202e"'


@pytest.mark.parametrize("name", BAD_SUITES)
def test_what_a_bad_suite_says_is_inert(project: Project, name: str) -> None:
    project.suite().write("golden/demo/suite.toml", BAD_SUITES[name].replace("EVIL", TOML_EVIL))
    result = project.check()
    assert result.rc == 4
    _inert(result)
