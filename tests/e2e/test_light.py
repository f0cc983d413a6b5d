"""A project that does not use the plugin pays nothing for having it installed."""

from __future__ import annotations

from .project import Project

HEAVY = {
    "torch",
    "transformers",
    "numpy",
    "scipy",
    "jsonschema",
    "git",
    "safetensors",
    "rich",
    "typer",
    "filelock",
    "jinja2",
}
TELL = """
import atexit, pathlib, sys

atexit.register(lambda: pathlib.Path("modules.txt").write_text("\\n".join(sorted(sys.modules))))
"""
"""A conftest.py. `-X importtime` does not see what is imported by `importlib.import_module`, as plugins are."""


def _imported(project: Project) -> set[str]:
    return set((project.root / "modules.txt").read_text().split())


def _packages(modules: set[str]) -> set[str]:
    return {name.split(".")[0] for name in modules}


def test_without_an_option_nothing_heavy_is_imported(project: Project) -> None:
    project.suite().write("conftest.py", TELL).write("test_plain.py", "def test_plain():\n    pass\n")
    result = project.python("-X", "importtime", "-m", "pytest", "-p", "no:cacheprovider", "--collect-only")
    assert result.rc == 0, result.text
    assert "1 test collected" in result.out
    assert "repro:" not in result.out, "the header is for active sessions"
    modules = _imported(project)
    assert {m for m in modules if m.startswith("pytest_repro")} == {"pytest_repro", "pytest_repro.plugin"}
    assert _packages(modules) & HEAVY == set()
    seen_by_importtime = {line.split("|")[-1].strip() for line in result.err.splitlines()}
    assert "_pytest.config" in seen_by_importtime, "importtime must have told something"
    assert _packages(seen_by_importtime) & HEAVY == set(), "imported, and removed again"


def test_without_an_option_suites_are_not_tests(project: Project) -> None:
    project.suite().write("test_plain.py", "def test_plain():\n    pass\n")
    result = project.pytest("-v")
    assert result.rc == 0
    assert result.outcomes() == {"test_plain.py::test_plain": "PASSED"}


def test_a_check_with_the_scripted_engine_loads_no_torch(accepted: Project) -> None:
    result = accepted.write("conftest.py", TELL).check()
    assert result.rc == 0, result.text
    modules = _imported(accepted)
    assert "pytest_repro.gate" in modules
    assert _packages(modules) & {"torch", "transformers"} == set()
