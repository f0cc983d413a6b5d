"""`pytest-repro calibrate` from outside, on the scripted engine: a variable of the environment stands for another machine.

What really moves a model's numbers is tried in test_calibrate_model.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.hostile import TEXTS

from .project import _NOT_INHERITED, DRIFT, JITTER, NEAR_TIE, Project, Result
from .test_hostile_goldens import inert

THERE = {"MKL_CBWR": "AVX2"}
"""A variable that a fingerprint shows, and that the scripted engine does not heed by itself: another machine."""
ELSEWHERE = {"MKL_CBWR": "SSE4_2"}
NAMES = "abcdefgh"
TOKENS = {name: [10 * i + k for k in range(4)] for i, name in enumerate(NAMES, 1)}


@pytest.fixture(scope="module")
def _recorded(tmp_path_factory: pytest.TempPathFactory) -> Project:
    assert "MKL_CBWR" not in os.environ
    return Project(tmp_path_factory.mktemp("calibrate")).suite(TOKENS).update().accept()


@pytest.fixture
def project(_recorded: Project, tmp_path: Path) -> Project:
    """An accepted golden of eight prompts, recorded without the variable."""
    return _recorded.copied_to(tmp_path)


def moved(project: Project, times: float) -> Project:
    """The gaps of all prompts now move by so many times the recording's benign level.

    Pairs of tokens move alike: the scripted jitter, which alternates, leaves their mean as it is.
    """
    gaps = [2.0 + times * JITTER * sign for sign in (1, 1, -1, -1)]
    return project.script(**{name: {"gap": gaps} for name in NAMES})


def calibrate(project: Project, *args: str, **env: str) -> Result:
    done = project.cli("calibrate", "golden/demo", *args, **env)
    assert "Traceback" not in done.text, done.text
    return done


def rounding(project: Project, *args: str, **env: str) -> tuple[str, list[str]]:
    """Whether the check `rounding` passes, and what it says."""
    project.check("--repro-report-json", "report.json", "--repro-method", "replay", *args, **env)
    (suite,) = project.json()["suites"]
    (found,) = (check for check in suite["checks"] if check["name"] == "rounding")
    return found["status"], found["message"].split("\n")


def levels(project: Project) -> list[dict[str, Any]]:
    (shown,) = json.loads(project.cli("show", "--as-json").out)
    found: list[dict[str, Any]] = shown["calibrations"]
    return found


# --- from a wide margin to a narrow one ---------------------------------------------------------------------------


def test_a_machine_is_calibrated_reviewed_and_judged_narrowly(project: Project) -> None:
    recording = project.golden_files()
    wide, said = rounding(moved(project, 1.5), **THERE)
    command = "pytest-repro calibrate golden/demo --numerics bf16"
    assert wide == "pass" and "0 beyond 2" in said[0] and said[1].endswith(f"to measure it: {command}")

    done = project.cli(*command.split()[1:], **THERE)
    assert done.rc == 0, done.text
    assert "differs       env.MKL_CBWR (not there) -> AVX2: their rounding was not measured" in done.out
    assert "gaps 1.5 times the recording's level (median of 8 prompts, 1.5 to 1.5)" in done.out
    assert "next          pytest-repro review golden/demo" in done.out
    assert "calibrate demo [bf16]: noise: scripted jitter" in done.err
    after = project.golden_files()
    assert {name for name in after if ".golden." in name and after[name] != recording[name]} == set()

    assert rounding(project, **THERE)[1][0].count("beyond 2"), "what waits holds nowhere"
    waiting = project.cli("pending")
    assert waiting.rc == 1 and "8 prompts, 0 of 8 prompts changed, 1 calibration added" in waiting.out
    told = project.cli("diff")
    assert told.rc == 1 and "calibration added" in told.out and "where env.MKL_CBWR (not there) -> AVX2" in told.out
    assert "the noise envelope grew: on " in told.out and "benign change of gaps 0.1 -> 0.15" in told.out

    before = project.header()
    project.accept("our new runners")
    header = project.header()
    assert header["review"]["previous"] == before["digest"] and len(header["calibrations"]) == 1
    kept = ("fingerprint", "noise", "metrics", "generation", "numerics")
    assert {name: header[name] for name in kept} == {name: before[name] for name in kept}
    lines = (project.folder / "bf16.golden.jsonl").read_bytes().split(b"\n")[1:]
    assert lines == recording["demo/bf16.golden.jsonl"].split(b"\n")[1:], "the texts are untouched"

    status, said = rounding(project, **THERE)
    assert status == "pass" and said[0].startswith("gaps moved 1 times") and "0 beyond 1.1" in said[0]
    assert said[1:] == [
        f"rounding measured here by calibrate on {header['calibrations'][0]['fingerprint']['time'][:10]}"
    ]
    assert "calibrated " in project.cli("show").out

    status, said = rounding(moved(project, 1.8), **THERE)
    assert status == "fail" and "8 beyond 1.1" in said[0], "1.8 times the recording's is 1.2 times this machine's"
    assert rounding(project, **ELSEWHERE)[0] == "pass", "a third machine has the wide margin still"


def test_a_prompt_is_held_against_the_machines_own_level(project: Project) -> None:
    """A deficit beyond the recording's envelope and within this machine's is a near tie there, and nowhere else."""
    moved(project, 1.5)
    assert calibrate(project, **THERE).rc == 0
    project.accept().flip("b", 0.2)
    there, here = project.check(**THERE), project.check()
    assert "1 near_tie" in there.out and "deficits up to 0.25 are rounding" in there.out
    assert "1 drift" in here.out and "deficits up to 0.1 are rounding" in here.out


def test_the_command_answers_for_scripts(project: Project) -> None:
    done = calibrate(moved(project, 1.5), "--as-json", **THERE)
    found = json.loads(done.out)
    assert done.rc == 0 and (found["verdict"], found["golden"], found["prompts"]) == ("calibrated", "bf16", 8)
    assert [change["field"] for change in found["differs"]] == ["env.MKL_CBWR"]
    assert found["moved"]["gap_level"]["median"] == pytest.approx(1.5, rel=1e-5)
    assert found["candidate"] == "golden/demo/bf16.pending.jsonl"
    (change,) = json.loads(project.cli("diff", "--as-json").out)
    (machine,) = change["calibrations"]
    assert machine["state"] == "added" and machine["beside_recording"]["gap_level"]["median"] == pytest.approx(1.5, rel=1e-5)  # fmt: skip


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["gaps", "drift"])
def test_a_machine_that_moves_more_than_rounding_is_refused(project: Project, how: str) -> None:
    if how == "gaps":
        moved(project, 2.5)
    else:
        project.flip("b", DRIFT)
    before = project.golden_files()
    done = calibrate(project, **THERE)
    assert done.rc == 1 and project.golden_files() == before
    assert "this machine moves more than rounding, and nothing was written" in done.out
    assert ("8 beyond 2" if how == "gaps" else "1 of 8 prompts drift: b: the deficit 0.8 exceeds") in done.out
    assert "pytest --repro-check golden/demo --repro-numerics bf16" in done.out
    assert ("pytest-repro bisect golden/demo --numerics bf16" in done.out) == (how == "drift")
    assert json.loads(calibrate(project, "--as-json", **THERE).out)["verdict"] == "refused"


def test_rounding_may_move_outputs(project: Project) -> None:
    done = calibrate(project.flip("b", NEAR_TIE), **THERE)
    assert done.rc == 0 and "7 identical · 1 near_tie" in done.out


def test_a_calibration_does_not_widen_the_next(project: Project) -> None:
    """It is the recording that a machine is held against, however often it is calibrated."""
    assert calibrate(moved(project, 1.9), **THERE).rc == 0
    project.accept()
    assert calibrate(moved(project, 2.6), **THERE).rc == 1
    again = calibrate(moved(project, 1.2), **THERE)
    assert again.rc == 0 and "in the place of this machine's earlier calibration" in again.out
    told = project.cli("diff").out
    assert "calibration replaced" in told and "gaps 0.632 times the one it replaces: level" in told
    project.accept()
    assert len(levels(project)) == 1


@pytest.mark.parametrize(
    ("args", "env", "told"),
    [
        ((), {}, "there is nothing to calibrate: the recording's own envelope covers this environment"),
        (("--numerics", "bf16"), {"PYTHONHASHSEED": "0"}, "the recording's own envelope covers this environment"),
        (("--numerics", "fp32", "--golden", "bf16"), THERE, "precision itself differs, which is no rounding of a machine: compute_class bf16 -> fp32"),
        (("--numerics", "fp32", "--engine-option", "observed=bf16"), THERE, "fp32 was asked for, but the probe found bf16"),
        (("--numerics", "nonsense"), THERE, "nonsense"),
        (("--golden", "../x"), THERE, "--golden: '../x' is not a golden's name"),
        (("--engine-option", "nonsense=1"), THERE, "--engine-option [engine.nonsense]: unknown key 'nonsense'"),
        (("--engine", "nonsense"), THERE, "unknown engine 'nonsense'"),
        (("--golden", "fp16"), THERE, "there is no golden"),
    ],
)  # fmt: skip
def test_bad_input_is_told(project: Project, args: tuple[str, ...], env: dict[str, str], told: str) -> None:
    before = project.golden_files()
    done = calibrate(project, *args, **env)
    assert done.rc == 2 and told in done.err, done.text
    assert project.golden_files() == before


def test_an_edited_prompt_and_another_model_are_another_question(project: Project) -> None:
    asked = (project.root / "golden/demo/prompts.jsonl").read_text()
    project.write("golden/demo/prompts.jsonl", asked.replace("question c", "query c"))
    done = calibrate(project, **THERE)
    assert done.rc == 2 and "the golden answers another question: c differ" in done.err
    project.write("golden/demo/prompts.jsonl", asked)
    text = (project.folder / "suite.toml").read_text()
    project.write("golden/demo/suite.toml", text.replace("max_new_tokens = 8", "max_new_tokens = 9"))
    done = calibrate(project, **THERE)
    assert done.rc == 2 and "the golden answers another question: generation differ" in done.err


def test_an_engine_that_cannot_replay_is_told(project: Project) -> None:
    project.write("mine.py", "def answer(prompts):\n    return ['x' for _ in prompts]\n")
    done = calibrate(project, "--engine", "mine:answer", PYTHONPATH=str(project.root), **THERE)
    assert done.rc == 2 and "cannot score given tokens, which is how rounding is measured" in done.err


def test_several_modes_are_calibrated_one_by_one(project: Project) -> None:
    text = (project.folder / "suite.toml").read_text()
    project.write("golden/demo/suite.toml", text.replace('numerics = ["bf16"]', 'numerics = ["fp32", "bf16"]'))
    done = calibrate(project, **THERE)
    assert done.rc == 2 and "one golden is calibrated at a time: fp32, bf16" in done.err
    assert calibrate(project, "--numerics", "bf16", **THERE).rc == 0


def test_a_golden_that_nobody_accepted_is_told(project: Project) -> None:
    project.suite(TOKENS, at="golden/new").update()
    for part in ("jsonl", "safetensors"):
        (project.folder / f"bf16.pending.{part}").rename(project.folder / f"bf16.golden.{part}")
    done = project.cli("calibrate", "golden/new", **THERE)
    assert done.rc == 2 and "this golden was never reviewed" in done.err


def test_the_help_has_an_example(project: Project) -> None:
    done = calibrate(project, "--help")
    assert done.rc == 0 and "Example: pytest-repro calibrate golden/word-problems --numerics fp32" in done.out


# --- other candidates, other machines -----------------------------------------------------------------------------


def test_another_candidate_that_waits_is_not_lost(project: Project) -> None:
    project.flip("b", DRIFT).update()
    before = project.golden_files()
    project.script(b={"tokens": TOKENS["b"], "gap": [2.0] * 4})
    done = calibrate(project, **THERE)
    assert done.rc == 2 and "another candidate waits in the place of this golden, and would be lost" in done.err
    assert "bf16.pending.jsonl" in done.err and "pytest-repro review golden/demo" in done.err
    assert project.cli("reject", "--all").rc == 0
    project.update("--repro-shard", "1/2")
    done = calibrate(project, **THERE)
    assert done.rc == 2 and "bf16.1of2.pending.jsonl" in done.err and "pytest-repro merge golden/demo" in done.err
    assert set(before) > {"demo/bf16.golden.jsonl"}


def test_one_checkout_may_calibrate_several_times_before_a_review(project: Project) -> None:
    assert calibrate(moved(project, 1.5), **THERE).rc == 0
    assert calibrate(moved(project, 1.2), **ELSEWHERE).rc == 0
    assert "2 calibrations added" in project.cli("pending").out
    project.accept()
    assert [c["fingerprint"]["env.MKL_CBWR"] for c in levels(project)] == ["AVX2", "SSE4_2"]
    assert rounding(project, **THERE)[1][0].startswith("gaps moved 0.8 times")
    assert rounding(project, **ELSEWHERE)[1][0].startswith("gaps moved 1 times")


def test_two_runners_that_started_from_one_golden_are_both_kept(project: Project, tmp_path: Path) -> None:
    """Each runner's folder is an artifact; the second to be accepted does not drop the first."""
    for name, env, times in (("one", THERE, 1.5), ("two", ELSEWHERE, 1.2)):
        runner = project.copied_to(tmp_path / name)
        assert calibrate(moved(runner, times), **env).rc == 0
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as packed:
            for file in sorted((runner.root / "golden").rglob("*")):
                packed.write(file, file.relative_to(runner.root))
    fetched = project.cli("fetch", str(tmp_path / "one.zip"))
    assert fetched.rc == 0 and "pytest-repro review golden/demo" in fetched.out, fetched.text
    refused = project.cli("fetch", str(tmp_path / "two.zip"))
    assert refused.rc == 2 and "another candidate waits there" in refused.err
    first = project.accept("the first").header()["digest"]
    assert project.cli("fetch", str(tmp_path / "two.zip")).rc == 0
    told = project.cli("diff").out
    assert "calibration added" in told and "SSE4_2" in told and "dropped" not in told and "AVX2" not in told
    review = project.accept("the second").header()["review"]
    assert review["previous"] == first
    assert [c["fingerprint"]["env.MKL_CBWR"] for c in levels(project)] == ["AVX2", "SSE4_2"]
    assert project.check().rc == 0


def test_a_new_recording_drops_them_and_says_so_and_the_same_bits_keep_them(project: Project) -> None:
    assert calibrate(project, **THERE).rc == 0
    project.accept().update()
    assert "dropped" not in project.cli("diff").out
    assert len(levels(project.accept("the same again"))) == 1
    project.script(c={"logprob": [-0.1, -0.1, -0.1, -0.2]}).update()
    told = project.cli("diff")
    assert "calibration dropped" in told.out and "calibrate again there" in told.out
    assert "1 calibration dropped" in project.cli("pending").out
    assert levels(project.accept("a new engine")) == []


def test_ctrl_c_leaves_nothing(project: Project) -> None:
    slow = "import time\n\ndef pause(engine):\n    time.sleep(60)\n"
    project.write("sitecustomize.py", slow + "from pytest_repro import recording\nrecording._plain_check = lambda *_: (print('begun', flush=True), pause(None))\n")  # fmt: skip
    kept = {k: v for k, v in os.environ.items() if k not in _NOT_INHERITED}
    before = {name: data for name, data in project.golden_files().items() if "script" not in name}
    with subprocess.Popen(
        [sys.executable, "-m", "pytest_repro.cli", "calibrate", "golden/demo"],
        cwd=project.root, env={**kept, **THERE, "PYTHONPATH": str(project.root)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=300)
    assert process.returncode == 130 and "nothing was written" in out and "Traceback" not in err, out + err
    assert {name: data for name, data in project.golden_files().items() if "script" not in name} == before


def test_a_machine_of_an_odd_name_does_nothing_in_a_terminal(project: Project) -> None:
    """Whoever sends a candidate chooses what its machine is called."""
    from pytest_repro.golden import signed
    from pytest_repro.noise import Calibration
    from pytest_repro.store import PENDING, Place

    golden = Place(project.folder, "bf16").read()
    odd = [
        Calibration({"engine": text, "host": text, "cpu_model": text, "time": text, text[:500]: text}, golden.noise)
        for text in (t[:2000].encode("utf-8", "replace").decode() for t in TEXTS.values())
    ][:64]
    made = signed(type(golden)(**{**vars(golden), "calibrations": tuple(odd), "review": None}))
    Place(project.folder, "bf16", PENDING).write(made)
    for command in (("pending",), ("diff",), ("show", "golden/demo/bf16.pending.jsonl")):
        shown = inert(project.cli(*command))
        assert shown.rc in (0, 1) and "calibrat" in shown.out
    inert(project.accept().cli("show"))
    inert(project.check("-vv"))
