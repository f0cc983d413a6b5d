"""The `repro` fixture and marker in a user's own tests."""

from __future__ import annotations

import shlex
from xml.etree import ElementTree

import pytest

from .project import DRIFT, Project

ANSWERS = {"a": "5", "b": "6", "c": "7", "d": "8"}
TEXTS = {"a": "so 5", "b": "so 6", "c": "so 7", "d": "so 99"}
CHECK = """
def test_words(repro):
    run = repro.check("golden/demo")
    print("accuracy", run.accuracy, "passed", run.passed)
    assert run.accuracy >= 0.75
"""
ENGINE = """
def shout(prompts):
    return [p.upper() + {suffix!r} for p in prompts]
"""
GREETING = """
import pytest
from engine import shout

@pytest.mark.repro(engine=shout, max_new_tokens=64)
def test_greeting(repro):
    repro.check_prompt("hello", answer="HELLO")
    repro.check_prompt([{"role": "user", "content": "bye"}], engine=lambda prompts: ["BYE" for _ in prompts])
"""


def test_without_an_option_the_test_is_skipped(project: Project) -> None:
    result = project.suite().write("test_own.py", CHECK).pytest("-rs")
    assert result.rc == 0
    assert "1 skipped" in result.out
    assert "run with --repro-check" in result.out


def test_a_suite_checked_from_a_test(project: Project) -> None:
    project.suite(answers=ANSWERS, texts=TEXTS).write("test_own.py", CHECK)
    recorded = project.pytest("--repro-update", "test_own.py", "-s")
    assert recorded.rc == 0, recorded.text
    assert "accuracy 0.75 passed True" in recorded.out
    project.accept()

    passed = project.check("-s", where="test_own.py")
    assert passed.rc == 0, passed.text
    assert "accuracy 0.75 passed True" in passed.out

    worse = project.flip("a", DRIFT).script(a={"text": "so 1"}).check("-vs", where="test_own.py")
    assert worse.rc == 1
    assert "golden/demo [bf16] fails: unexplained 1 > max_unexplained 0; divergent 1 > max_divergent 0" in worse.out
    assert "a  diverges at token 1 of 4" in worse.out
    assert "75.0 % -> 50.0 %" in worse.out
    assert "def test_words" not in worse.out, "the report says it all: no listing of the test's source"

    allowed = CHECK.replace('"golden/demo"', '"golden/demo", max_divergent=4, max_unexplained=1.0')
    lower = project.write("test_own.py", allowed).check("-s", where="test_own.py")
    assert lower.rc == 1
    assert "accuracy 0.5 passed True" in lower.out, "the suite may pass where the test's own assertion does not"


def test_accuracy_that_was_not_judged_is_not_a_number(accepted: Project) -> None:
    result = accepted.write("test_own.py", CHECK).check(where="test_own.py")
    assert result.rc == 1
    assert "accuracy was not judged" in result.out


def test_prompts_of_a_test_have_goldens_named_after_it(project: Project) -> None:
    project.write("engine.py", ENGINE.format(suffix="")).write("test_own.py", GREETING)
    project.update(where="test_own.py")
    folders = sorted(p.name for p in (project.root / "golden/tests").iterdir())
    assert len(folders) == 2
    assert all("test_own" in name and "test_greeting" in name for name in folders)
    project.accept()
    before = project.golden_files()
    passed = project.check(where="test_own.py")
    assert passed.rc == 0, passed.text

    project.write("engine.py", ENGINE.format(suffix="!"))
    changed = project.check(where="test_own.py")
    assert changed.rc == 1
    assert "HELLO" in changed.out
    assert "prompt  diverges at token 5 of 5" in changed.out
    assert project.golden_files() == before


def test_any_callable_is_an_engine_for_a_suite(project: Project) -> None:
    test = """
    class Engine:
        calls = 0
        def __call__(self, prompts):
            Engine.calls += 1
            return [{"tokens": [len(p)], "text": p, "logprob": [-0.5], "gap": [1.0]} for p in prompts]

    def test_own_engine(repro):
        assert repro.check("golden/demo", engine=Engine(), batch_size=3).passed
        assert Engine.calls == 2
    """
    lines = (line.removeprefix("    ") for line in test.splitlines())
    project.suite().write("test_own.py", "\n".join(lines)).update(where="test_own.py").accept()
    result = project.check(where="test_own.py")
    assert result.rc == 0, result.text


BAD_CALLABLES = {
    "too_few": ("lambda prompts: ['one']", "was given 2 prompts and gave 1 answers"),
    "not_text": ("lambda prompts: [1 for _ in prompts]", "answered int: a string, or a mapping with tokens"),
    "raises": ("lambda prompts: 1 / 0", "raised ZeroDivisionError: division by zero"),
    "nothing": ("lambda prompts: None", "NoneType"),
    "not_numbers": ("lambda prompts: [{'tokens': ['x']} for _ in prompts]", "does not fit"),
    "columns_disagree": ("lambda prompts: [{'tokens': [1, 2], 'logprob': [0.5]} for _ in prompts]", "logprob"),
}


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Test -> what pytest tells of its failure."""
    project = Project(tmp_path_factory.mktemp("callables")).suite()
    for name, (engine, _) in BAD_CALLABLES.items():
        test = f"def test_{name}(repro):\n    repro.check('golden/demo', engine={engine})\n"
        project.write(f"test_{name}.py", test)
    assert project.pytest("--repro-update", ".", "--junitxml=junit.xml", "--ignore=golden").rc == 1
    cases = ElementTree.parse(project.root / "junit.xml").iter("testcase")
    return {case.attrib["name"]: "".join(case.itertext()) for case in cases}


@pytest.mark.parametrize("name", BAD_CALLABLES)
def test_a_callable_that_answers_badly_is_named(failures: dict[str, str], name: str) -> None:
    told = failures[f"test_{name}"]
    assert BAD_CALLABLES[name][1] in told
    assert f"test_{name}:" in told, "the engine's name"
    assert "The above exception" not in told, "one message, not the chain that led to it"
    assert "pytest_repro/" not in told, "no listing of this package's source: the mistake is the engine's"


MISTAKES = {
    "unknown-keyword": ("repro.check('golden/demo', max_divergnt=1)", "unknown keyword 'max_divergnt'"),
    "no-such-suite": ("repro.check('golden/nowhere')", "golden/nowhere/suite.toml: there is no such file"),
    "bad-threshold": ("repro.check('golden/demo', alpha=7)", "alpha"),
    "bad-mode": ("repro.check('golden/demo', numerics='bf61')", "unknown numerics mode 'bf61'"),
    "bad-engine": ("repro.check('golden/demo', engine='scriptd')", "unknown engine 'scriptd'"),
    "bad-batch": ("repro.check('golden/demo', batch_size=0)", "batch_size must be at least 1"),
    "no-model": ("repro.check_prompt('hello')", "no model is named"),
}


def test_mistakes_of_a_test_are_told_without_this_packages_source(accepted: Project) -> None:
    for name, (call, _) in MISTAKES.items():
        accepted.write(f"test_{name.replace('-', '_')}.py", f"def test_own(repro):\n    {call}\n")
    result = accepted.check("--tb=long", where=".")
    assert result.rc == 1
    for name, (_, told) in MISTAKES.items():
        assert told in result.out, name
    assert "pytest_repro/" not in result.out
    assert "Traceback" not in result.text


def test_what_mends_a_missing_golden_names_the_test(project: Project) -> None:
    """A test's own golden has no suite.toml that pytest could be given."""
    project.write("engine.py", ENGINE.format(suffix=""))
    body = "from engine import shout\n\ndef test_one(repro):\n    repro.check_prompt('hello', engine=shout)\n"
    missing = project.write("test_one.py", body).pytest("--repro-check", "test_one.py")
    assert missing.rc == 1
    command = next(line for line in missing.out.splitlines() if line.startswith("next")).split(maxsplit=1)[1]
    assert command.startswith("pytest --repro-update test_one.py::test_one ")
    assert project.pytest(*shlex.split(command, comments=True)[1:]).rc == 0
    assert project.accept().pytest("--repro-check", "test_one.py").rc == 0


def test_a_run_is_short_where_an_assertion_prints_it(accepted: Project) -> None:
    body = "def test_own(repro):\n    assert repro.check('golden/demo') == 1\n"
    result = accepted.write("test_own.py", body).check(where="test_own.py")
    assert "Run(golden/demo [bf16] pass)" in result.out


def test_an_unknown_keyword_of_the_marker_is_named(accepted: Project) -> None:
    test = "import pytest\n@pytest.mark.repro(modle='x')\ndef test_own(repro):\n    repro.check('golden/demo')\n"
    result = accepted.write("test_own.py", test).check(where="test_own.py")
    assert result.rc == 1
    assert "unknown keyword 'modle'; known: model, " in result.out


def test_a_single_prompt_heeds_the_defaults_of_pyproject(project: Project) -> None:
    """Thresholds and generation settings under [tool.pytest-repro] hold for `check_prompt` too."""
    defaults = "[tool.pytest-repro.thresholds]\nmax_divergent = 1\nmax_unexplained = 1\nlength_ratio = [0.5, 2.0]\n"
    project.pyproject(defaults).write("engine.py", ENGINE.format(suffix=""))
    body = "from engine import shout\n\ndef test_one(repro):\n    repro.check_prompt('hello', engine=shout)\n"
    assert project.write("test_one.py", body).pytest("--repro-update", "test_one.py").rc == 0
    project.accept()
    project.write("engine.py", ENGINE.format(suffix="!"))
    passed = project.pytest("--repro-check", "test_one.py")
    assert passed.rc == 0, passed.text
    project.pyproject("")
    assert project.pytest("--repro-check", "test_one.py").rc == 1
