"""A golden's life: missing, recorded, pending, reviewed, checked, moved, recorded anew, edited by hand."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from .project import DRIFT, NEAR_TIE, REVIEWER, Project

# --- the first golden ---------------------------------------------------------------------------------------------


def test_a_missing_golden_fails_and_a_check_writes_nothing(project: Project) -> None:
    before = project.suite().golden_files()
    result = project.check()
    assert result.rc == 1
    assert "there is no golden for bf16" in result.out
    assert "4 missing" in result.out
    assert "pytest --repro-update golden/demo" in result.out
    assert project.golden_files() == before

    result = project.check("--repro-pending-dir", "left")
    assert result.rc == 1, "a candidate that was left is not a golden"
    assert "left/golden/demo/bf16.pending.jsonl" in result.out
    assert project.golden_files() == before
    assert {p.name for p in (project.root / "left/golden/demo").iterdir()} == {
        "bf16.pending.jsonl",
        "bf16.pending.safetensors",
    }


def test_a_golden_stands_only_after_it_was_accepted_with_a_reason(project: Project) -> None:
    project.suite().update()
    recorded = project.golden_files()
    assert {"demo/bf16.pending.jsonl", "demo/bf16.pending.safetensors"} < set(recorded)
    assert not any(".golden." in name for name in recorded)

    unaccepted = project.check()
    assert unaccepted.rc == 1
    assert "pytest-repro review golden/demo   # a candidate waits" in unaccepted.out

    listed = project.cli("pending")
    assert listed.rc == 1
    assert "golden/demo/bf16.pending.jsonl" in listed.out
    assert "4 prompts, new" in listed.out

    for args, complaint in (
        (["--all"], "needs a reason"),
        (["--reason", "fine"], "accept --all"),
    ):
        refused = project.cli("accept", "golden", *args)
        assert refused.rc == 2, args
        assert complaint in refused.err
        assert project.golden_files() == recorded

    project.accept("first of its kind")
    assert {"demo/bf16.golden.jsonl", "demo/bf16.golden.safetensors"} < set(project.golden_files())
    assert not any(".pending." in name for name in project.golden_files())
    review = project.header()["review"]
    assert review["reason"] == "first of its kind"
    assert review["previous"] is None

    done = project.cli("pending")
    assert done.rc == 0
    assert "nothing is pending" in done.out
    accepted = project.golden_files()
    passed = project.check()
    assert passed.rc == 0
    assert "PASS  4 prompts against bf16.golden" in passed.out
    assert project.golden_files() == accepted


def test_one_pending_file_can_be_accepted_by_its_name(project: Project) -> None:
    project.suite(run={"numerics": ["bf16", "fp32"]}).update()
    result = project.cli("accept", "golden/demo/fp32.pending.jsonl", "--reason", "only this")
    assert result.rc == 0
    assert sorted(p.name for p in project.folder.glob("*.jsonl")) == [
        "bf16.pending.jsonl",
        "fp32.golden.jsonl",
        "prompts.jsonl",
        "script.jsonl",
    ]


# --- a changed model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gap", "verdict"), [(NEAR_TIE, "near_tie"), (DRIFT, "drift")], ids=["near-tie", "drift"])
def test_a_changed_output_fails_and_is_not_rewritten(accepted: Project, gap: float, verdict: str) -> None:
    before = accepted.flip("b", gap).golden_files()
    result = accepted.check("--repro-report-json", "report.json")
    assert result.rc == 1
    assert f"3 identical · 1 {verdict}" in result.out
    assert "b  diverges at token 1 of 4" in result.out
    assert "pytest --repro-update golden/demo" in result.out
    assert accepted.golden_files() == before

    (suite,) = accepted.json()["suites"]
    found = {p["id"]: (p["verdict"], p["divergence_index"]) for p in suite["prompts"]}
    assert found == {"a": ("identical", None), "b": (verdict, 1), "c": ("identical", None), "d": ("identical", None)}
    (prompt,) = (p for p in suite["prompts"] if p["id"] == "b")
    assert prompt["deficit"] == pytest.approx(gap, rel=1e-5)
    assert prompt["golden_gap"] == pytest.approx(2.0)


def test_a_text_that_ends_early_is_drift(accepted: Project) -> None:
    accepted.script(c={"tokens": [31, 32]})
    result = accepted.check()
    assert result.rc == 1
    assert "1 drift" in result.out
    assert "c  diverges at token 2 of 4" in result.out
    assert "(the text ends)" in result.out


@pytest.mark.parametrize("method", ["replay", "decode"])
def test_each_method_sees_a_drift_by_itself(accepted: Project, method: str) -> None:
    result = accepted.flip("a", DRIFT).check("--repro-method", method, "--repro-report-json", "report.json")
    assert result.rc == 1
    (suite,) = accepted.json()["suites"]
    assert [p["verdict"] for p in suite["prompts"]] == ["drift", "identical", "identical", "identical"]
    assert {p["method"] for p in suite["prompts"] if p["id"] != "a"} == {method}


def _left(project: Project) -> list[str]:
    return sorted(str(p.relative_to(project.root / "left")) for p in (project.root / "left").rglob("*") if p.is_file())


@pytest.mark.parametrize("gap", [NEAR_TIE, DRIFT], ids=["near-tie", "drift"])
def test_a_failed_check_leaves_a_candidate_where_it_is_told_to(accepted: Project, gap: float) -> None:
    before = accepted.flip("b", gap).golden_files()
    result = accepted.check("--repro-pending-dir", "left", CI="true")
    assert result.rc == 1
    assert "a candidate was left at left/golden/demo/bf16.pending.jsonl" in result.out
    assert "pytest-repro fetch left   # " in result.out and "--repro-update" not in result.out
    assert _left(accepted) == ["golden/demo/bf16.pending.jsonl", "golden/demo/bf16.pending.safetensors"]
    assert accepted.golden_files() == before
    header = json.loads((accepted.root / "left/golden/demo/bf16.pending.jsonl").read_text().splitlines()[0])
    assert header["candidate"]["against"] == accepted.header()["digest"]
    assert [p["verdict"] != "identical" for p in header["candidate"]["prompts"]] == [False, True, False, False]


def test_lost_accuracy_leaves_a_candidate(project: Project) -> None:
    rows = {f"q{i}": [i, i + 1] for i in range(8)}
    loose = {"max_divergent": 8, "max_unexplained": 8}
    right = dict.fromkeys(rows, "7")
    project.suite(rows, answers=right, texts=right, thresholds=loose).update().accept()
    for name in rows:
        project.flip(name, DRIFT).script(**{name: {"text": "8"}})
    result = project.check("--repro-pending-dir", "left")
    assert result.rc == 1
    assert "accuracy      FAIL 100.0 % -> 0.0 %" in result.out
    assert len(_left(project)) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p,
        lambda p: p.flip("b", NEAR_TIE).suite(thresholds={"max_divergent": 4}).flip("b", NEAR_TIE),
        lambda p: p.flip("b", DRIFT).script(c={"error": "out of memory"}),
    ],
    ids=["pass", "allowed", "error"],
)
def test_what_passes_or_broke_leaves_no_candidate(accepted: Project, change: Callable[[Project], Project]) -> None:
    change(accepted).check("--repro-pending-dir", "left")
    assert _left(accepted) == []


def test_recording_anew_names_what_it_replaces(accepted: Project) -> None:
    first = accepted.header()["digest"]
    accepted.flip("a", DRIFT).update()
    assert accepted.check().rc == 1, "a candidate does not count before it is accepted"

    listed = json.loads(accepted.cli("pending", "--as-json").out)
    assert [(p["golden"], p["prompts"], p["changed"], p["against"]) for p in listed] == [("bf16", 4, 1, first)]
    shown = accepted.cli("diff")
    assert shown.rc == 1
    assert "drift      a  diverges at token 1: deficit 0.8" in shown.out
    assert "11 77 13 14" in shown.out
    (change,) = json.loads(accepted.cli("diff", "--as-json").out)
    assert [(p["id"], p["verdict"]) for p in change["prompts"]] == [("a", "drift")]

    accepted.accept("the new model is better")
    review = accepted.header()["review"]
    assert review["previous"] == first != accepted.header()["digest"]
    assert review["reason"] == "the new model is better"
    assert accepted.check().rc == 0
    told = accepted.cli("show")
    assert told.rc == 0
    assert f"{review['by']}, {review['when']}: the new model is better" in told.out


def test_a_rejected_candidate_is_gone_and_the_golden_stays(accepted: Project) -> None:
    before = {k: v for k, v in accepted.golden_files().items() if ".golden." in k}
    accepted.flip("a", DRIFT).update()
    assert accepted.cli("reject", "golden", "--all").rc == 0
    after = accepted.golden_files()
    assert {k: v for k, v in after.items() if ".golden." in k} == before
    assert not any(".pending." in name for name in after)
    assert accepted.cli("diff").rc == 0
    nothing = accepted.cli("accept", "golden", "--all", "--reason", "again")
    assert nothing.rc == 2
    assert "nothing is pending here" in nothing.err


def test_removed_and_added_prompts_are_told(accepted: Project) -> None:
    old = accepted.golden_files()
    accepted.suite({"a": [11, 12, 13, 14], "e": [51, 52]})
    result = accepted.check()
    assert result.rc == 1
    assert "the golden has no such prompt" in result.out
    assert "unused in the golden: b, c, d" in result.out
    accepted.update()
    (change,) = json.loads(accepted.cli("diff", "--as-json").out)
    assert {p["id"]: p["verdict"] for p in change["prompts"]} == {
        "e": "new", "b": "removed", "c": "removed", "d": "removed",
    }  # fmt: skip
    assert accepted.golden_files()["demo/bf16.golden.jsonl"] == old["demo/bf16.golden.jsonl"]


def test_an_edited_prompt_is_another_question_not_drift(accepted: Project) -> None:
    prompts = (accepted.folder / "prompts.jsonl").read_text()
    accepted.write("golden/demo/prompts.jsonl", prompts.replace("question b", "another question"))
    result = accepted.check()
    assert result.rc == 1
    assert "1 incomparable" in result.out
    assert "the prompt was edited" in result.out
    assert "drift" not in result.out


# --- who reviews --------------------------------------------------------------------------------------------------


def test_the_reviewer_is_who_git_says(project: Project) -> None:
    project.suite().update().accept()
    assert project.header()["review"]["by"] == REVIEWER


def test_the_reviewer_of_a_repository_is_its_own(project: Project) -> None:
    for args in (["init", "-q"], ["config", "user.name", "Own"], ["config", "user.email", "own@example.org"]):
        subprocess.run(["git", *args], cwd=project.root, check=True)
    project.suite().update().accept()
    assert project.header()["review"]["by"] == "Own <own@example.org>"


# --- commands for reading -----------------------------------------------------------------------------------------


def test_goldens_and_environment_can_be_read(accepted: Project) -> None:
    shown = accepted.cli("show", "golden/demo", "--prompt", "b")
    assert shown.rc == 0
    assert "21 22 23 24" in shown.out
    assert "31 32 33 34" not in shown.out
    missing = accepted.cli("show", "golden/demo", "--prompt", "zz")
    assert missing.rc == 2
    assert "no prompt 'zz'" in missing.err

    facts = accepted.cli("env", "--as-json")
    assert facts.rc == 0
    assert {"python", "cpu_model", "time"} < set(json.loads(facts.out))
    assert json.loads(accepted.cli("diff", "--as-json").out) == []


# --- where recording is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "env", "told"),
    [
        ([], {"CI": "true"}, "CI is set"),
        ([], {"GITHUB_ACTIONS": "true"}, "GITHUB_ACTIONS is set"),
        (["-n", "2"], {}, "under xdist"),
        (["--repro-check"], {}, "choose one"),
    ],
    ids=["ci", "github", "xdist", "with-check"],
)
def test_recording_is_refused(project: Project, args: list[str], env: dict[str, str], told: str) -> None:
    before = project.suite().golden_files()
    result = project.pytest("--repro-update", "golden", *args, **env)
    assert result.rc == 4
    assert told in result.err
    assert project.golden_files() == before


@pytest.mark.parametrize("value", ["0", "false"])
def test_ci_that_says_no_does_not_refuse(project: Project, value: str) -> None:
    result = project.suite().pytest("--repro-update", "golden", CI=value)
    assert result.rc == 0
    assert (project.folder / "bf16.pending.jsonl").exists()


def test_a_check_may_run_in_ci(accepted: Project) -> None:
    assert accepted.check(CI="true").rc == 0


# --- goldens that cannot be trusted -------------------------------------------------------------------------------


def test_a_golden_that_nobody_accepted_fails(project: Project) -> None:
    project.suite().update()
    for part in ("jsonl", "safetensors"):
        (project.folder / f"bf16.pending.{part}").rename(project.folder / f"bf16.golden.{part}")
    result = project.check()
    assert result.rc == 1
    assert "never reviewed" in result.out
    assert "4 identical" in result.out

    result = project.pytest("--repro-check", "golden/demo/suite.toml::bf16::a")
    assert result.rc == 1, "choosing one prompt does not make an unreviewed golden pass"
    assert "never reviewed" in result.out


def test_an_edit_by_hand_fails_and_is_called_one(accepted: Project) -> None:
    file = accepted.folder / "bf16.golden.jsonl"
    text = file.read_text()
    assert '"tokens": [21, 22' in text
    file.write_text(text.replace('"tokens": [21, 22', '"tokens": [21, 77'))
    edited = accepted.golden_files()
    result = accepted.check()
    assert result.rc == 1
    assert "golden/demo/bf16.golden.jsonl: this golden was edited by hand" in result.out
    assert "git checkout -- golden/demo/bf16.golden.jsonl   # or " in result.out
    assert "replay" not in result.text, "nothing was loaded for a golden that cannot be used"
    assert "pytest --repro-update golden/demo" in result.out
    assert accepted.golden_files() == edited


def test_a_broken_golden_of_another_device_stops_nothing(accepted: Project) -> None:
    """It is not the one that is used: FP32 falls back on the 16-bit golden that fits here."""
    accepted.write("golden/demo/fp32@cuda-sm90.golden.jsonl", "broken")
    result = accepted.check("--repro-numerics", "fp32")
    assert result.rc == 0 and "against bf16.golden" in result.out


def test_a_review_of_another_golden_is_not_this_ones(accepted: Project, tmp_path: Path) -> None:
    other = accepted.copied_to(tmp_path / "other")
    other.flip("a", DRIFT).update()
    header, _, body = (other.folder / "bf16.pending.jsonl").read_text().partition("\n")
    forged = {**json.loads(header), "review": accepted.header()["review"]}
    forged.pop("candidate")
    other.write("golden/demo/bf16.golden.jsonl", f"{json.dumps(forged)}\n{body}")
    (other.folder / "bf16.pending.safetensors").replace(other.folder / "bf16.golden.safetensors")
    result = other.check()
    assert result.rc == 1
    assert "copied from another golden" in result.out


def test_a_golden_is_recorded_only_as_what_was_observed(project: Project) -> None:
    """A name is no way to pass one compute class off as another; a device class may be added to the right one."""
    project.suite()
    result = project.pytest("--repro-update", "golden", "--repro-golden", "fp32")
    assert result.rc == 1
    assert "fp32 was asked for, but the probe found bf16" in result.text
    assert project.golden_files() == {k: v for k, v in project.golden_files().items() if "pending" not in k}
    result = project.pytest("--repro-update", "golden", "--repro-golden", "bf16@cuda-sm90")
    assert result.rc == 0, result.text
    assert "bf16@cuda-sm90.pending.jsonl" in result.out


def test_two_recordings_of_one_golden_in_one_run_are_refused(project: Project) -> None:
    project.suite().write(
        "test_twice.py",
        "def test_short(repro):\n    repro.check('golden/demo', max_new_tokens=2)\n\n"
        "def test_long(repro):\n    repro.check('golden/demo', max_new_tokens=4)\n",
    )
    result = project.pytest("--repro-update", "test_twice.py")
    assert result.rc == 1
    assert "1 failed, 1 passed" in result.out
    assert "recorded already in this run" in result.out


def test_a_long_run_says_how_far_it_is_past_the_capture(project: Project) -> None:
    """A line a phase in a log; the running bar needs a terminal."""
    result = project.suite().pytest("--repro-update", "golden")
    assert result.rc == 0
    assert "repro demo [bf16]: record: 16 tokens" in result.err
    assert "repro demo [bf16]: noise: scripted jitter: 16 tokens" in result.err


def test_modes_that_share_a_golden_record_it_once(project: Project) -> None:
    """fp32 and layercast are one compute class: the second recording would replace the first."""
    project.suite(run={"numerics": ["fp32", "layercast"]})
    result = project.pytest("--repro-update", "golden", "-v", "-rs")
    assert result.rc == 0, result.text
    assert "fp32 has just recorded the golden that layercast is checked against as well" in result.out
    assert project.header("fp32.pending")["numerics"] == "fp32"
    project.accept()
    assert project.check("-v").rc == 0
