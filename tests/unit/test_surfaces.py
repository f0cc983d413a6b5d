"""The surfaces of a report: what they say, within which limits, and what `pytest-repro report` makes of bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from pytest_repro.cli import app
from pytest_repro.fingerprint import Change
from pytest_repro.generation import digest
from pytest_repro.report import document, github, intoto, junit, markdown
from pytest_repro.result import Check, PromptResult, SuiteResult
from pytest_repro.verdict import Verdict
from tests.hostile import file_commands
from tests.unit.builders import IDENTITY, judged, suite_result
from tests.unit.test_terminal import parted

WEIGHTS = "gguf-sha256:" + "a" * 64


def drifted(prompts: int = 3, **more: Any) -> SuiteResult:
    many = [parted(f"p{i:04}", Verdict.DRIFT, 0.5 + i, reason="it moved") for i in range(prompts)]
    return suite_result(
        *many, judged("same"), **{"path": "golden/s", "environment": {**IDENTITY, "model.weights": WEIGHTS}, **more}
    )


def suites(*results: SuiteResult) -> list[dict[str, Any]]:
    return [document.of_suite(result) for result in results]


CALM = suite_result(judged("a"), path="golden/calm")


# --- Markdown -------------------------------------------------------------------------------------------------------


def test_the_worst_suite_and_prompt_come_first() -> None:
    text = markdown.summary(suites(CALM, drifted()))
    assert text.startswith("## pytest-repro: FAIL\n\n1 of 2 suites fail: 2 identical · 3 drift\n")
    assert text.index("golden/s") < text.index("golden/calm")
    assert text.index("`p0002`") < text.index("`p0001`") < text.index("`p0000`")
    assert text.count("### ") == 1, "a suite that passed without a difference takes a row"


def test_a_cut_says_what_was_left_out() -> None:
    found = suites(drifted(1000, environment_diff=(Change("batch_size", "numerics", 8, 1),)))
    full = markdown.summary(found, where="report.json")
    assert "… and 900 more." in full and "The texts of 900 more prompts are left out here." in full
    small = markdown.summary(found, limit=20_000, where="report.json")
    assert len(small.encode()) <= 20_000 and "The texts of 9" in small and "`report.json`" in small
    assert "`batch_size`" in small


@pytest.mark.parametrize("count", [1, 20, 300])
def test_limits_hold_for_any_number_of_suites(count: int) -> None:
    found = suites(*(drifted(12, path=f"golden/{'x' * 100}{i}") for i in range(count)))
    assert len(markdown.summary(found).encode()) <= markdown.SUMMARY_LIMIT
    comment = markdown.comment(found, "check", where="report.json")
    assert len(comment.encode()) <= markdown.COMMENT_LIMIT
    assert ("more suites, which did not fit here" in comment) is (count > 40)
    assert comment.splitlines()[:2] == ["<!-- pytest-repro: check -->", "## pytest-repro: FAIL"]


def test_one_cause_is_told_once() -> None:
    broken = suite_result(*(PromptResult(f"p{i}", Verdict.ERROR, "out of memory") for i in range(20)))
    assert markdown.summary(suites(broken)).count("out of memory") == 1
    assert len([e for e in github.errors(suites(broken), Path(), Path()) if "out of memory" in e]) == 1


# --- GitHub ---------------------------------------------------------------------------------------------------------


def test_ten_annotations_shared_among_suites() -> None:
    found = github.errors(suites(drifted(30), drifted(30, path="golden/t")), Path(), Path())
    assert len(found) == 10
    assert sum("golden/t" in line for line in found) >= 4
    assert found[-1].endswith("::and 55 more: the summary has them")


def test_an_annotation_points_at_no_file_outside_of_the_repository(tmp_path: Path) -> None:
    inner, outer = tmp_path / "repository", tmp_path / "outer"
    for folder in (inner, outer):
        (folder / "golden").mkdir(parents=True)
    (outer / "golden" / "suite.toml").write_text("[suite]\n[thresholds]\nmax_unexplained = 0\n")
    (inner / "golden" / "suite.toml").symlink_to(outer / "golden" / "suite.toml")
    for path in ("golden", "../outer/golden", str(outer / "golden"), "\0", "x" * 5000):
        assert not [line for line in github.errors(suites(drifted(path=path)), inner, inner) if "file=" in line], path


def test_outputs_say_what_only_drifted() -> None:
    def only_drift(*results: SuiteResult, ended: bool = True, others: int = 0) -> str:
        return github.outputs(suites(*results), ended=ended, report="r", others=others)["only_drift"]

    unreviewed = suite_result(judged("a"), checks=(Check("golden", "fail", "never reviewed"),))
    worse = suite_result(judged("a"), checks=(Check("accuracy", "fail", "lost"),))
    missing = suite_result(PromptResult("a", Verdict.MISSING))
    assert only_drift(drifted()) == only_drift(worse) == only_drift(worse, CALM) == "true"
    assert only_drift(drifted(), unreviewed) == only_drift(missing) == only_drift(CALM) == "false"
    assert only_drift(drifted(), others=1) == "false", "another test of the same run failed too"
    assert only_drift(drifted(), ended=False) == "false"


@pytest.mark.parametrize("name", ["GITHUB_SERVER_URL", "GITHUB_REPOSITORY", "GITHUB_RUN_ID"])
def test_an_address_that_is_none_is_no_link(name: str) -> None:
    run = {"GITHUB_SERVER_URL": "https://github.com", "GITHUB_REPOSITORY": "o/r", "GITHUB_RUN_ID": "7"}
    assert github.run_address(run) == "https://github.com/o/r/actions/runs/7"
    for value in ("", "javascript:alert(1)", "x) [y](z", "7\n"):
        assert github.run_address({**run, name: value}) == ""


# --- JUnit and in-toto ----------------------------------------------------------------------------------------------


def test_junit_counts_what_it_holds() -> None:
    root = ElementTree.fromstring(junit.document(suites(drifted(), CALM)))
    assert {k: root.attrib[k] for k in ("tests", "failures", "errors", "skipped")} == {
        "tests": "7", "failures": "3", "errors": "0", "skipped": "0"
    }  # fmt: skip
    failed = [case for case in root.iter("testcase") if case.find("failure") is not None]
    assert [case.attrib["name"] for case in failed] == ["p0000", "p0001", "p0002"]
    assert failed[0].attrib["classname"] == "golden/s/suite.toml::bf16"


def statement(*results: SuiteResult) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(intoto.statement(suites(*results), "a/report.json", b"{}", run=""))
    return found


def test_a_statement_names_weights_goldens_and_the_report() -> None:
    found = statement(drifted(), CALM)
    assert found["_type"] == "https://in-toto.io/Statement/v1"
    assert found["predicateType"] == "https://in-toto.io/attestation/test-result/v0.1"
    assert found["subject"][0] == {"name": "model.weights", "digest": {"sha256": "a" * 64}}
    assert found["subject"][1]["digest"]["sha256"] == digest("content").removeprefix("sha256:")
    report = found["predicate"]["configuration"][-1]
    assert report["name"] == "report.json"
    assert report["digest"]["sha256"] == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    assert found["predicate"]["failedTests"] == [f"golden/s/suite.toml::bf16::p000{i}" for i in range(3)]


def test_a_statement_has_three_results() -> None:
    tolerated = suite_result(parted("a", Verdict.WAIVED, 0.25))
    assert [statement(case)["predicate"]["result"] for case in (CALM, tolerated, drifted())] == [
        "PASSED",
        "WARNED",
        "FAILED",
    ]
    assert statement(tolerated)["predicate"]["warnedTests"] == ["golden/s/suite.toml::bf16::a"]


def test_two_weights_have_two_names() -> None:
    other = drifted(path="golden/t", environment={"model.weights": "sha256:" + "b" * 64})
    names = [s["name"] for s in statement(drifted(), other)["subject"]]
    assert len(set(names)) == len(names) == 3


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("GITHUB_STEP_SUMMARY", "GITHUB_OUTPUT", "GITHUB_WORKSPACE", "GITHUB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    document.write(tmp_path / "report.json", document.of_session(suites(drifted()), []))
    return tmp_path / "report.json"


def ask(*arguments: str, **environment: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["report", *arguments], env=environment)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


SURFACES = {
    "markdown": "## pytest-repro: FAIL",
    "comment": "<!-- pytest-repro: gpu -->",
    "html": "<!doctype html>",
    "junit": "<?xml",
    "in-toto": "{",
}


@pytest.mark.parametrize("surface", SURFACES)
def test_every_surface_on_the_terminal_and_in_a_file(report: Path, surface: str) -> None:
    code, shown = ask("report.json", "--to", surface, "--key", "gpu")
    assert code == 0 and shown.lower().startswith(SURFACES[surface].lower())
    code, _ = ask("report.json", "--to", surface, "--key", "gpu", "--output", "made/file")
    assert code == 0 and Path("made/file").read_bytes().decode() == shown


def test_several_reports_are_one_summary(report: Path) -> None:
    document.write(Path("calm.json"), document.of_session(suites(CALM), []))
    _, shown = ask("calm.json", "report.json")
    assert "1 of 2 suites fail" in shown
    code, said = ask("calm.json", "report.json", "--to", "html")
    assert code == 2 and "2 reports" in said


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (
            {"verdict": "pass"},
            'verdict]: this report does not agree with itself: it says "pass", its prompts say "fail"',
        ),
        ({"failures": []}, "failures]"),
        ({"counts": {"identical": 4}}, "counts]"),
        ({"thresholds": {"max_divergent": 3, "max_unexplained": 3}}, "verdict]"),
    ],
)
def test_a_report_that_does_not_agree_with_itself_is_no_report(report: Path, edit: dict[str, Any], told: str) -> None:
    data = json.loads(report.read_text())
    before = data["suites"][0]
    edit = {**edit, "thresholds": {**before["thresholds"], **edit.get("thresholds", {})}}
    data["suites"][0] = {**before, **edit}
    report.write_text(json.dumps(data))
    code, said = ask("report.json")
    assert code == 2 and f"report.json [golden/s bf16 {told}" in said.replace("\n", "")


def test_tests_that_failed_beside_the_suites_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    document.write(file, document.of_session(suites(drifted()), [], 2))
    assert document.other_failures(file) == 2 and [s.path for s in document.read(file)] == ["golden/s"]


BAD = {
    "no report": None,
    "not JSON": "{",
    "another schema": '{"schema": 9}',
    "nothing checked": json.dumps(document.of_session([], [])),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("surface", ["markdown", "html", "junit", "in-toto"])
def test_what_is_no_report_is_bad_input(report: Path, case: str, surface: str) -> None:
    report.unlink()
    if BAD[case] is not None:
        report.write_text(str(BAD[case]))
    code, said = ask("report.json", "--to", surface)
    assert code == 2 and "report.json" in said and "--repro-report-json" in said


@pytest.mark.parametrize("case", BAD)
def test_github_says_of_no_report_that_there_is_none(report: Path, case: str) -> None:
    report.unlink()
    if BAD[case] is not None:
        report.write_text(str(BAD[case]))
    code, said = ask("report.json", "--to", "github", GITHUB_STEP_SUMMARY="summary", GITHUB_OUTPUT="output")
    assert code == 1 and said.count("::error ") == 1
    assert file_commands(Path("output").read_text())["verdict"] == "error"
    assert Path("summary").read_text().startswith("## pytest-repro: ERROR")
    code, said = ask("report.json", "--to", "comment")
    assert code == 0 and "pytest-repro: ERROR" in said


def test_a_summary_is_appended_and_keeps_within_what_is_left(report: Path) -> None:
    Path("summary").write_text("x" * (markdown.SUMMARY_LIMIT - 3_000))
    code, _ = ask("report.json", "--to", "github", GITHUB_STEP_SUMMARY="summary", GITHUB_OUTPUT="output")
    text = Path("summary").read_text()
    assert code == 0 and text.startswith("xxx") and "## pytest-repro: FAIL" in text
    assert len(text.encode()) <= markdown.SUMMARY_LIMIT


@pytest.mark.parametrize(("exit_code", "verdict"), [("0", "error"), ("1", "fail"), ("2", "error"), ("137", "error")])
def test_how_pytest_ended_is_held_against_the_report(report: Path, exit_code: str, verdict: str) -> None:
    ask(
        "report.json", "--to", "github", "--exit-code", exit_code, GITHUB_STEP_SUMMARY="summary", GITHUB_OUTPUT="output"
    )
    assert file_commands(Path("output").read_text())["verdict"] == verdict


def test_a_report_is_not_overwritten_by_what_is_made_of_it(report: Path) -> None:
    before = report.read_bytes()
    assert ask("report.json", "--output", "report.json")[0] == ask("report.json", "--output", ".")[0] == 2
    assert ask("report.json", "--to", "github", "--output", "x")[0] == 2
    assert report.read_bytes() == before
