"""`pytest-repro bisect` from outside, on the scripted engine: a conftest makes the answers depend on the environment.

What really moves a model's tokens is tried in test_bisect_model.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pytest_repro.cli import app

from .project import DRIFT, NEAR_TIE, Project, Result

HELD = {"MKL_CBWR": "AVX2"}
"""A variable that a fingerprint shows, and that the scripted engine does not heed by itself."""
CONFTEST = """
import os
import shutil
from pathlib import Path

from pytest_repro import probe

HERE = Path(__file__).parent

def pytest_configure(config):
    one_by_one = config.option.repro_batch_size == 1
    held = "MKL_CBWR" in os.environ
    recording = config.option.repro_update
    {body}
    shutil.copy(HERE / ("moved.jsonl" if moved else "as_recorded.jsonl"), HERE / "golden/demo/script.jsonl")
"""


def sensitive(accepted: Project, rule: str, *, before: str = "") -> Project:
    """The accepted project, with outputs that move where `rule` holds; `before` runs in every pytest process."""
    script = "golden/demo/script.jsonl"
    kept = (accepted.root / script).read_bytes()
    accepted.flip("b", NEAR_TIE)
    accepted.flip("c", DRIFT)
    accepted.write("moved.jsonl", (accepted.root / script).read_bytes())
    accepted.write("as_recorded.jsonl", kept).write(script, kept)
    body = "\n    ".join([*before.splitlines(), f"moved = not recording and ({rule})"])
    return accepted.write("conftest.py", CONFTEST.replace("{body}", body))


def elsewhere(project: Project, rule: str) -> Project:
    """A golden that was recorded on another processor, and outputs that move where `rule` holds."""
    before = 'if recording:\n        probe._cpu_model = lambda: "another processor"'
    return sensitive(project, rule, before=before).update().accept()


def bisect(project: Project, *args: str, **env: str) -> Result:
    done = project.cli("bisect", "golden/demo", *args, **env)
    assert "Traceback" not in done.text, done.text
    return done


def data(done: Result) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(done.out)
    return found


def lines(done: Result, label: str) -> list[str]:
    """What stands under a label."""
    found: list[str] = []
    for line in done.out.splitlines():
        if line.startswith(f"{label:<13} ") or (found and line.startswith(" " * 14)):
            found.append(line[14:])
        elif found:
            break
    return found


@pytest.fixture
def accepted(accepted: Project, tmp_path: Path) -> Project:
    """Recorded without the variables that these tests set."""
    assert not {"MKL_CBWR", "PYTHONHASHSEED"} & set(os.environ)
    return accepted


# --- what is named ----------------------------------------------------------------------------------------------------


def test_a_single_cause_is_named_among_several_differences(accepted: Project) -> None:
    project = sensitive(accepted, "one_by_one")
    done = bisect(project, "--batch-size", "1", **HELD)
    assert done.rc == 0, done.text
    assert lines(done, "environment") == ["batch_size 2 -> 1", "env.MKL_CBWR (not there) -> AVX2"]
    assert lines(done, "trials") == ["3 at most; each loads the model anew"]
    tried = lines(done, "undone")
    assert tried[0].startswith("everything that can be: 2 of 2 outputs are the golden's again, ")
    assert tried[0].endswith(" s; 2 more at most")
    assert tried[1].startswith("batch_size 2 -> 1: 2 of 2 outputs are the golden's again, ")
    assert tried[2].startswith("env.MKL_CBWR (not there) -> AVX2: 0 of 2 outputs are the golden's again, ")
    assert lines(done, "found") == ["batch_size 2 -> 1 did it: undone, 2 of 2 outputs are the golden's again"]
    assert "--repro-batch-size=2" in lines(done, "next")[0]


def test_a_pair_is_named_where_neither_alone_restores(accepted: Project) -> None:
    project = sensitive(accepted, "one_by_one or held")
    done = bisect(project, "--batch-size", "1", "--as-json", **HELD, PYTHONHASHSEED="0")
    assert done.rc == 0, done.text
    found = data(done)
    assert (found["verdict"], found["sets"]) == ("found", [["batch size", "MKL_CBWR"]])
    tried = [trial["undone"] for trial in found["trials"]]
    assert "7 at most, 4 if a single difference did it; each loads the model anew" in done.err
    assert tried[0] == ["batch size", "MKL_CBWR", "PYTHONHASHSEED"]
    assert [len(names) for names in tried[1:]] == [1, 1, 1, 2, 2, 2]
    assert [trial["undone"] for trial in found["trials"] if trial["holds"]] == [tried[0], ["batch size", "MKL_CBWR"]]
    assert all(set(trial["parted"]) == {"b", "c"} == set(found["prompts"]) for trial in found["trials"])
    assert (
        "batch_size 2 -> 1 and env.MKL_CBWR (not there) -> AVX2 did it together: undone, 2 of 2 outputs are the golden's again; "
        "no part of it does"
    ) in done.err


def test_each_of_two_that_is_enough_is_named(accepted: Project) -> None:
    """The outputs move only where both are changed: either of the two undone restores them."""
    project = sensitive(accepted, "one_by_one and held")
    done = bisect(project, "--batch-size", "1", **HELD)
    assert done.rc == 0
    assert lines(done, "found") == ["batch_size 2 -> 1 did it: undone, 2 of 2 outputs are the golden's again"]
    assert lines(done, "or") == [
        "env.MKL_CBWR (not there) -> AVX2 did it: undone, 2 of 2 outputs are the golden's again"
    ]
    first, second = lines(done, "next")
    assert "--repro-batch-size=2" in first and second.startswith("env -u MKL_CBWR pytest --repro-check golden/demo ")


def test_what_is_named_is_what_a_check_confirms(accepted: Project) -> None:
    """The command under `next` passes, and the one that failed is the one to begin with."""
    project = sensitive(accepted, "one_by_one")
    failed = project.check("--repro-batch-size", "1")
    assert failed.rc == 1
    (step,) = [line for line in failed.out.splitlines() if "pytest-repro bisect" in line]
    command = step.split("pytest-repro ")[1].split("   ")[0]
    assert command == "bisect golden/demo --numerics bf16 --batch-size 1"
    done = project.cli(*command.split())
    assert done.rc == 0, done.text
    undone = lines(done, "next")[0].split("   ")[0].split()
    assert undone[0] == "pytest"
    assert project.pytest(*undone[1:]).rc == 0


def test_another_engine(accepted: Project) -> None:
    """A callable of the user's in the place of the engine that recorded."""
    accepted.write("mine.py", "def answer(prompts):\n    return ['something else'] * len(prompts)\n")
    allowed = [word for part in ("model", "tokenizer", "generation") for word in ("--repro-allow-changed", part)]
    done = bisect(accepted, "--engine", "mine:answer", "--as-json", "--", *allowed, PYTHONPATH=str(accepted.root))
    found = data(done)
    assert done.rc == 0 and ["engine"] in found["sets"], done.text


# --- what is not named --------------------------------------------------------------------------------------------------


def test_a_cause_that_cannot_be_undone_is_said_to_be_one(accepted: Project) -> None:
    """Recorded on another processor; the batch size is put back, and the outputs still differ."""
    project = elsewhere(accepted, "True")
    done = bisect(project, "--batch-size", "1")
    assert done.rc == 1
    here = [line for line in lines(done, "environment") if line.endswith("   cannot be undone here")]
    assert len(here) == 1 and here[0].startswith("cpu_model another processor -> ")
    assert lines(done, "not found") == ["the cause is not among what can be undone here: with batch_size 2 -> 1 undone, 0 of 2 outputs are the golden's again"]  # fmt: skip
    assert [line.split()[0] for line in lines(done, "remaining")] == ["cpu_model"]
    assert len(lines(done, "undone")) == 1, "one trial says it"


def test_a_cause_that_no_fingerprint_shows(accepted: Project) -> None:
    project = sensitive(accepted, "True")
    done = bisect(project, "--batch-size", "1")
    assert done.rc == 1
    assert lines(done, "remaining") == ["no numerics field: what did it is not in the environment that is seen"]


def test_outputs_that_move_in_an_equal_environment(accepted: Project) -> None:
    project = sensitive(accepted, "True")
    done = bisect(project, "--as-json")
    assert done.rc == 1
    assert "no numerics field differs from the golden's: the environment that is seen did not do it" in done.err
    assert data(done)["trials"] == []


def test_only_what_cannot_be_undone_differs(accepted: Project) -> None:
    done = bisect(elsewhere(accepted, "True"))
    assert done.rc == 1 and lines(done, "undone") == []
    assert lines(done, "not found") == ["the cause is not among what can be undone here: nothing can be undone"]
    assert [line.split()[0] for line in lines(done, "remaining")] == ["cpu_model"]


def test_nothing_differs(accepted: Project) -> None:
    done = bisect(accepted, "--batch-size", "1", "--as-json")
    assert done.rc == 0
    assert "no output differs from the golden's: there is nothing to bisect" in done.err
    assert data(done)["verdict"] == "identical"


# --- what was observed, not what was asked for ----------------------------------------------------------------------------


def test_a_knob_that_does_not_take_is_not_believed(accepted: Project) -> None:
    """The project itself sets the variable: taken away, it comes back; the trial must not count as one without it."""
    project = sensitive(accepted, "one_by_one", before='if not recording:\n        os.environ["MKL_CBWR"] = "AVX2"')
    done = bisect(project, "--batch-size", "1")
    assert done.rc == 0
    assert lines(done, "undone")[0].startswith("everything that can be: not counted: env.MKL_CBWR (not there) -> AVX2 could not be undone here")  # fmt: skip
    assert lines(done, "found") == ["batch_size 2 -> 1 did it: undone, 2 of 2 outputs are the golden's again"]


def test_a_trial_in_which_something_else_moved_does_not_count(accepted: Project) -> None:
    before = 'if not recording and not one_by_one:\n        probe._cpu_model = lambda: "moved to another machine"'
    project = sensitive(accepted, "one_by_one", before=before)
    done = bisect(project, "--batch-size", "1", "--as-json")
    found = data(done)
    assert done.rc == 1 and found["sets"] == []
    assert [change["field"] for change in found["trials"][0]["strayed"]] == ["cpu_model"]
    assert "not counted: cpu_model" in done.err and "moved as well" in done.err


def test_a_trial_that_breaks_is_no_answer(accepted: Project) -> None:
    before = 'if not recording and not one_by_one:\n        raise RuntimeError("no memory for two")'
    project = sensitive(accepted, "held or one_by_one", before=before)
    done = bisect(project, "--batch-size", "1", **HELD)
    assert done.rc == 1, done.text
    assert "no answer: pytest ended with exit code 3: RuntimeError: no memory for two, " in lines(done, "undone")[0]
    assert lines(done, "not found")[0].endswith(
        "with env.MKL_CBWR (not there) -> AVX2 undone, 0 of 2 outputs are the golden's again"
    )
    assert lines(done, "remaining")[0] == "batch_size 2 -> 1"


# --- beginning from a report ----------------------------------------------------------------------------------------------


def test_a_report_says_which_prompts_to_begin_with(accepted: Project) -> None:
    project = sensitive(accepted, "one_by_one")
    assert project.check("--repro-batch-size", "1", "--repro-report-json", "report.json").rc == 1
    done = bisect(project, "--batch-size", "1", "--report", "report.json")
    assert done.rc == 0, done.text
    assert lines(done, "report")[0].startswith("4 prompts, bf16, against bf16.golden: 2 differ")
    assert lines(done, "check")[0].startswith("2 prompts, bf16, against bf16.golden: 2 differ")
    assert lines(done, "found")[0].startswith("batch_size 2 -> 1 did it")


def test_a_report_of_what_does_not_happen_here(accepted: Project) -> None:
    project = sensitive(accepted, "held")
    assert project.check("--repro-report-json", "report.json", **HELD).rc == 1
    done = bisect(project, "--report", "report.json")
    assert done.rc == 1
    assert lines(done, "not found")[1:] == ["env.MKL_CBWR AVX2 -> (not there)"]


def test_a_report_of_another_check_is_refused(accepted: Project) -> None:
    project = sensitive(accepted, "one_by_one")
    project.check("--repro-batch-size", "1", "--repro-report-json", "report.json")
    for arguments, message in {
        (): "the check in this report was run with batch_size 1, and this is not",
        ("--batch-size", "1", "--numerics", "fp32"): "this report holds no check of golden/demo in fp32",
        (
            "--batch-size",
            "1",
            "--engine",
            "vllm",
        ): "the check in this report was run with engine scripted, and this is not",
    }.items():
        done = bisect(project, *arguments, "--report", "report.json")
        assert done.rc == 2 and message in done.err, done.text
    project.write("golden/demo/prompts.jsonl", '{"id": "a", "prompt": "another question"}\n')
    done = bisect(project, "--batch-size", "1", "--report", "report.json")
    assert done.rc == 2 and "this report holds no check of golden/demo" in done.err


def test_a_report_of_prompts_that_the_suite_lacks(accepted: Project) -> None:
    """None of them is asked for: the whole suite is."""
    project = sensitive(accepted, "one_by_one")
    project.check("--repro-batch-size", "1", "--repro-report-json", "report.json")
    report = project.json()
    for prompt in report["suites"][0]["prompts"]:
        prompt["id"] = f"../{prompt['id']}::--repro-allow-code"
    project.write("report.json", json.dumps(report))
    done = bisect(project, "--batch-size", "1", "--report", "report.json")
    assert done.rc == 0 and lines(done, "check")[0].startswith("4 prompts, "), done.text
    assert lines(done, "prompts")[0].startswith("c, b: ")


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("golden/none",), "there is no such file"),
        (("golden/demo", "--report", "none.json"), "there is no such report"),
        (("golden/demo", "--report", "pyproject.toml"), "not a JSON report"),
        (("golden/demo", "--numerics", "fp64"), "unknown numerics mode 'fp64'"),
        (("golden/demo", "--engine", "abacus"), "unknown engine 'abacus'"),
        (("golden/demo", "--engine-option", "script"), "'script' is not NAME=VALUE"),
        (("golden/demo", "--engine-option", "speed=9"), "unknown key 'speed'"),
        (("golden/demo", "--golden", "../x"), "'../x' is not a golden's name"),
        (("golden/demo", "--golden", "fp32"), "there is no golden"),
        (("golden/demo", "--batch-size", "0"), "--batch-size"),
        (("golden/demo", "--", "--repro-golden=fp32"), "--golden, before the --"),
        (("golden/demo", "--", "--repro-update"), "what bisect itself decides on"),
        (("golden/demo", "--", "--no-such-option"), "unrecognized arguments: --no-such-option"),
        (("golden/demo", "--nonsense"), "No such option"),
    ],
)
def test_a_mistake_is_told_in_words(
    accepted: Project, arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(accepted.root)
    done = CliRunner().invoke(app, ["bisect", *arguments])
    assert done.exit_code == 2 and message in done.output and "Traceback" not in done.output, done.output


def test_several_modes(accepted: Project) -> None:
    """The first that differs is looked into, and the other is named."""
    project = sensitive(accepted, "one_by_one")
    suite = project.folder / "suite.toml"
    suite.write_text(suite.read_text().replace('["bf16"]', '["native", "bf16"]'))
    done = bisect(project, "--batch-size", "1")
    assert done.rc == 0 and "against bf16.golden" in done.out, done.text
    assert lines(done, "note") == ["bf16 differs as well: pytest-repro bisect golden/demo --numerics bf16"]


def test_a_hostile_environment_is_shown_and_does_not_act(accepted: Project) -> None:
    project = sensitive(accepted, "held")
    done = bisect(project, MKL_CBWR="\x1b[31m\n::error::x")
    assert done.rc == 0 and "\x1b" not in done.text and "\n::" not in done.text
    assert "did it: undone" in done.out


def test_pytest_s_own_settings_of_the_project_hold(accepted: Project) -> None:
    """One trial does not choose by what another left in pytest's cache."""
    project = sensitive(accepted, "one_by_one").pyproject(ini='addopts = ["--lf", "-x", "--strict-config"]')
    assert bisect(project, "--batch-size", "1").rc == 0


def test_a_single_trial_that_breaks_leaves_the_differences_listed(accepted: Project) -> None:
    before = 'if not recording and not one_by_one:\n        raise RuntimeError("no memory for two")'
    done = bisect(sensitive(accepted, "True", before=before), "--batch-size", "1")
    assert done.rc == 1 and lines(done, "remaining") == ["batch_size 2 -> 1"]
    assert "with batch_size 2 -> 1 undone, no answer: pytest ended with exit code 3" in lines(done, "not found")[0]


def test_the_checkout_is_left_as_it_was(accepted: Project) -> None:
    project = sensitive(accepted, "one_by_one")
    before = project.golden_files()
    assert bisect(project, "--batch-size", "1").rc == 0
    assert project.golden_files() == before
    assert sorted(p.name for p in project.root.iterdir() if p.name not in ("__pycache__", "conftest.py")) == [
        "as_recorded.jsonl", "golden", "moved.jsonl", "pyproject.toml",
    ]  # fmt: skip


# --- Ctrl-C -----------------------------------------------------------------------------------------------------------


def test_an_interruption_says_what_was_found_so_far(accepted: Project) -> None:
    """The last trial is never answered: by then everything, and the first knob alone, restored."""
    before = 'if one_by_one and not held and not recording:\n        (HERE / "began").touch()\n        import time\n        time.sleep(600)'
    project = sensitive(accepted, "one_by_one", before=before)
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest_repro.cli", "bisect", "golden/demo", "--batch-size", "1"],
        cwd=project.root, env={**os.environ, **HELD}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not (project.root / "began").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130 and "Traceback" not in out + err, out + err
    done = Result(process.returncode, out, err)
    assert lines(done, "interrupted") == ["after 2 trials"]
    assert lines(done, "so far")[0] == "batch_size 2 -> 1: undone, 2 of 2 outputs are the golden's again"
