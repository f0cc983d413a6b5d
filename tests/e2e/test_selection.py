"""What runs: by path, keyword, option, configuration and worker."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .project import DRIFT, TOKENS, Project

PLAIN = "def test_plain():\n    pass\n"
LOGGING = """
import json
from pathlib import Path

def answer(prompts):
    with Path(__file__).with_name("batches.txt").open("a") as file:
        file.write(json.dumps(prompts) + "\\n")
    return [f"answer to {p}" for p in prompts]
"""
ITEMS = [
    f"golden/demo/suite.toml::bf16::{name}" for name in ("golden", "compute", *TOKENS, "rounding", "accuracy", "length")
]


def _collected(project: Project, *args: str) -> list[str]:
    result = project.pytest("--repro-check", "--collect-only", "-q", *args)
    assert result.rc == 0, result.text
    return [line for line in result.out.splitlines() if "::" in line]


# --- items --------------------------------------------------------------------------------------------------------


def test_items_are_named_after_suite_mode_and_prompt(accepted: Project) -> None:
    assert _collected(accepted, "golden") == ITEMS
    result = accepted.check("-v", where="golden/demo/suite.toml::bf16::b")
    assert result.rc == 0
    assert result.outcomes() == {"golden/demo/suite.toml::bf16::b": "PASSED"}
    assert "1 of 4 prompts" in result.out


def test_every_mode_is_checked_in_turn(project: Project) -> None:
    project.suite(run={"numerics": ["fp32", "bf16"]}).update().accept()
    assert (project.folder / "fp32.golden.jsonl").exists()
    assert (project.folder / "bf16.golden.jsonl").exists()
    project.flip("a", DRIFT)
    both = project.check("--repro-report-json", "report.json")
    assert both.rc == 1
    assert [(s["numerics"], s["verdict"]) for s in project.json()["suites"]] == [("fp32", "fail"), ("bf16", "fail")]
    one = project.check("--repro-numerics", "bf16", "--repro-report-json", "report.json")
    assert one.rc == 1
    assert [s["numerics"] for s in project.json()["suites"]] == ["bf16"]


def test_one_prompt_runs_with_its_whole_batch(project: Project) -> None:
    names = [f"p{i:02}" for i in range(1, 6)]
    project.suite({name: [1] for name in names}, engine=None).write("engine.py", LOGGING)
    with_engine = ("--repro-engine", "engine:answer")
    project.update(*with_engine).accept()
    log = project.root / "batches.txt"
    log.unlink()

    result = project.check(*with_engine, "-v", "-k", "p04")
    assert result.rc == 0, result.text
    assert result.outcomes() == {"golden/demo/suite.toml::bf16::p04": "PASSED"}
    assert [json.loads(line) for line in log.read_text().splitlines()] == [["question p03", "question p04"]]

    log.unlink()
    assert project.check(*with_engine, "-n", "2").rc == 0
    batches = [json.loads(line) for line in log.read_text().splitlines()]
    assert batches == [["question p01", "question p02"], ["question p03", "question p04"], ["question p05"]], (
        "two workers share one run"
    )


def test_last_failed_and_exit_first(accepted: Project) -> None:
    accepted.flip("b", DRIFT).flip("d", DRIFT)
    first = accepted.pytest("--repro-check", "golden", "-v", "-x", cache=True)
    assert first.rc == 1
    assert [k for k, v in first.outcomes().items() if v == "FAILED"] == ["golden/demo/suite.toml::bf16::b"]
    assert "golden/demo/suite.toml::bf16::c" not in first.outcomes()

    assert accepted.pytest("--repro-check", "golden", cache=True).rc == 1
    again = accepted.pytest("--repro-check", "golden", "-v", "--lf", cache=True)
    assert again.rc == 1
    assert again.outcomes() == {f"golden/demo/suite.toml::bf16::{name}": "FAILED" for name in "bd"}


def test_workers_give_the_same_verdicts_and_one_report(accepted: Project) -> None:
    accepted.flip("b", DRIFT)
    alone = accepted.check("-v", "--repro-report-json", "alone.json", "--junitxml=alone.xml")
    shared = accepted.check("-v", "-n", "2", "--repro-report-json", "shared.json", "--junitxml=shared.xml")
    assert alone.rc == shared.rc == 1
    assert alone.outcomes() == shared.outcomes()
    assert len(alone.outcomes()) == len(ITEMS)

    (one,), (other,) = accepted.json("alone.json")["suites"], accepted.json("shared.json")["suites"]
    for name in ("verdict", "prompts", "checks", "metrics", "failures", "golden", "thresholds"):
        assert one[name] == other[name], name
    assert shared.out.count("FAIL  4 prompts against bf16.golden") == 1

    prompts = accepted.junit("shared.xml")
    assert {k: {**v, "repro.fingerprint": ""} for k, v in prompts.items()} == {
        k: {**v, "repro.fingerprint": ""} for k, v in accepted.junit("alone.xml").items()
    }
    assert {name: prompts[name]["repro.verdict"] for name in TOKENS} == {
        "a": "identical", "b": "drift", "c": "identical", "d": "identical",
    }  # fmt: skip
    assert prompts["b"]["repro.divergence_index"] == "1"
    assert float(prompts["b"]["repro.deficit"]) == pytest.approx(DRIFT, rel=1e-5)
    assert prompts["b"]["repro.golden"] == "bf16"
    assert prompts["b"]["repro.observed_compute"] == "bf16"


def test_the_fingerprint_of_junit_is_the_environments_not_the_moments(accepted: Project) -> None:
    for name in ("one.xml", "two.xml"):
        assert accepted.check(f"--junitxml={name}", "-k", "length").rc == 0
    assert accepted.junit("one.xml") == accepted.junit("two.xml"), "the same machine, seconds later"


# --- which suites -------------------------------------------------------------------------------------------------


def test_without_a_path_suites_run_beside_the_tests(accepted: Project) -> None:
    accepted.write("tests/test_plain.py", PLAIN)
    assert _collected(accepted) == [*ITEMS, "tests/test_plain.py::test_plain"]
    accepted.pyproject(ini='testpaths = ["tests"]')
    assert _collected(accepted) == ["tests/test_plain.py::test_plain", *ITEMS]
    assert _collected(accepted, "--repro-only") == ITEMS
    assert _collected(accepted, "tests") == ["tests/test_plain.py::test_plain"], "a path that is named is all there is"


def test_other_folders_are_named_in_the_configuration(project: Project) -> None:
    project.suite(at="golden/demo").suite(at="quality/chat").pyproject(ini='repro_paths = ["quality"]')
    project.write("tests/test_plain.py", PLAIN)
    chat = [name.replace("golden/demo", "quality/chat") for name in ITEMS]
    assert sorted(_collected(project)) == sorted([*chat, "tests/test_plain.py::test_plain"])
    assert _collected(project, "--repro-only") == chat
    project.pyproject(ini='repro_paths = ["nowhere"]')
    nothing = project.check("--repro-only", where="")
    assert nothing.rc == 4
    assert "repro_paths" in nothing.err


def test_the_paths_hold_from_any_folder_of_the_project(accepted: Project) -> None:
    accepted.write("tests/test_plain.py", PLAIN)
    result = accepted.python(
        "-c",
        "import os, sys, pytest; os.chdir('tests'); sys.exit(pytest.main(sys.argv[1:]))",
        *("-p", "no:cacheprovider", "--repro-check", "--repro-only", "-q"),
    )
    assert result.rc == 0, result.text
    assert "8 passed, 1 skipped" in result.out


def test_a_suite_among_the_tests_is_data_until_it_is_named(project: Project) -> None:
    project.suite(at="golden/demo").suite(at="tests/data/fake").write("tests/test_plain.py", PLAIN)
    assert sorted(_collected(project)) == sorted([*ITEMS, "tests/test_plain.py::test_plain"])
    fake = [name.replace("golden/demo", "tests/data/fake") for name in ITEMS]
    assert _collected(project, "tests/data/fake") == fake
    assert _collected(project, "tests/data/fake/suite.toml") == fake


# --- settings -----------------------------------------------------------------------------------------------------


def test_thresholds_on_the_command_line(accepted: Project) -> None:
    accepted.flip("a", DRIFT)
    allowed = ("--repro-threshold", "max_unexplained=1", "--repro-threshold", "max_divergent=0.25")
    result = accepted.check("-v", *allowed)
    assert result.rc == 0, "a share counts all prompts of the suite"
    assert "3 identical · 1 drift" in result.out
    stricter = accepted.check("--repro-threshold", "max_unexplained=1", "--repro-threshold", "max_divergent=0.2")
    assert stricter.rc == 1
    assert "divergent 1 > max_divergent 0.2" in stricter.out


OWN = """
import pytest

def test_keyword(repro):
    repro.check("golden/demo", max_divergent=4, max_unexplained=4)

@pytest.mark.repro(max_divergent=5, max_unexplained=5)
def test_marker(repro):
    repro.check("golden/demo")

@pytest.mark.repro(max_divergent=0, max_unexplained=0)
def test_keyword_over_marker(repro):
    repro.check("golden/demo", max_divergent=6, max_unexplained=6)
"""


def test_the_next_command_asks_for_what_failed(accepted: Project) -> None:
    """With the options that were given: another batch size or mode would be another question."""
    accepted.flip("a", DRIFT)
    result = accepted.check("--repro-numerics", "bf16", "--repro-batch-size", "1")
    command = "pytest --repro-update golden/demo --repro-batch-size 1 --repro-numerics bf16   # if it is meant"
    assert result.rc == 1 and command in result.out


def test_a_folder_without_suites_is_named(project: Project) -> None:
    result = project.pytest("--repro-check")
    assert result.rc == 5 and "there is no golden (repro_paths) to look in" in result.out


@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["alone", "xdist"])
def test_a_tests_keyword_is_stronger_than_the_command_line(accepted: Project, workers: list[str]) -> None:
    """The suite fails by the command line's threshold; tests that allow more pass beside it."""
    accepted.flip("a", DRIFT).write("test_own.py", OWN)
    options = ("--repro-threshold", "max_divergent=3", "--repro-report-json", "r.json")
    result = accepted.check("test_own.py", "-v", *options, *workers)
    assert result.rc == 1
    failed = [name for name, outcome in result.outcomes().items() if outcome == "FAILED"]
    assert failed == ["golden/demo/suite.toml::bf16::a"]
    assert sorted(s["thresholds"]["max_divergent"] for s in accepted.json("r.json")["suites"]) == [3, 4, 5, 6]


def test_the_command_line_is_stronger_than_the_suite_and_that_than_pyproject(accepted: Project) -> None:
    def used(*args: str) -> object:
        accepted.check("--repro-report-json", "r.json", *args)
        return accepted.json("r.json")["suites"][0]["thresholds"]["max_divergent"]

    suite = accepted.folder / "suite.toml"
    text = suite.read_text()
    assert used() == 0
    accepted.pyproject("[tool.pytest-repro.thresholds]\nmax_divergent = 1")
    assert used() == 1
    suite.write_text(text + "\n[thresholds]\nmax_divergent = 2\n")
    assert used() == 2
    suite.write_text(text + "\n[thresholds]\nmax_divergent = 2\n[thresholds.bf16]\nmax_divergent = 3\n")
    assert used() == 3
    assert used("--repro-threshold", "max_divergent=4") == 4


def test_a_hand_made_difference_of_settings_is_a_suspect(accepted: Project) -> None:
    accepted.flip("a", DRIFT)
    result = accepted.check("--repro-batch-size", "4", "--repro-report-json", "report.json")
    assert result.rc == 1
    assert "batch_size  2 -> 4" in result.out
    (suite,) = accepted.json()["suites"]
    changed = {c["field"]: (c["golden"], c["now"]) for c in suite["environment_diff"] if c["cls"] == "numerics"}
    assert changed == {"batch_size": (2, 4)}


def test_another_generation_config_is_another_question(accepted: Project) -> None:
    suite = accepted.folder / "suite.toml"
    suite.write_text(suite.read_text().replace("max_new_tokens = 8", "max_new_tokens = 9"))
    result = accepted.check()
    assert result.rc == 1
    assert "4 incomparable" in result.out
    allowed = accepted.check("--repro-allow-changed", "generation")
    assert allowed.rc == 0, allowed.text
    assert "identity differs: generation" in allowed.out


def test_the_report_is_written_into_a_new_folder(accepted: Project) -> None:
    assert accepted.check("--repro-report-json", "out/new/report.json").rc == 0
    report = accepted.json("out/new/report.json")
    assert report["verdict"] == "pass"
    assert report["environment"]["engine"] == "scripted"
    assert not Path(str(report["suites"][0]["path"])).is_absolute()


def test_workers_share_one_run_of_a_selection_too(accepted: Project) -> None:
    """The chosen prompts are a set, and every worker spells a set in an order of its own."""
    items = [f"golden/demo/suite.toml::bf16::{name}" for name in ("a", "b", "c")]
    result = accepted.pytest("--repro-check", *items, "-n", "2", "--repro-report-json", "r.json")
    assert result.rc == 0, result.text
    (suite,) = json.loads((accepted.root / "r.json").read_text())["suites"]
    assert [p["id"] for p in suite["prompts"]] == ["a", "b", "c"]


def test_a_check_of_the_whole_suite_alone_runs_the_whole_suite(accepted: Project) -> None:
    for name in ("rounding", "accuracy", "length"):
        result = accepted.check(where=f"golden/demo/suite.toml::bf16::{name}")
        assert result.rc == 0
        assert "4 identical" in result.out, name
