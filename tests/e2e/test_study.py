"""`pytest-repro study` from outside, on the scripted engine, whose answers no setting moves: what is run, kept and told.

What really moves a model's outputs is tried in test_study_model.py.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.hostile import TEXTS

from .browser import SIGHTS, Browser
from .project import _NOT_INHERITED, Project, Result
from .test_hostile_goldens import inert

GRID = ("--axis", "numerics=bf16,fp32", "--axis", "batch_size=1,2")
ANSWERS = {"a": "1", "b": "2", "c": "3", "d": "4"}
RIGHT = {"a": "it is 1", "b": "it is 2", "c": "no", "d": "no"}


@pytest.fixture
def project(project: Project) -> Project:
    """Four prompts, of which two are answered right."""
    return project.suite(answers=ANSWERS, texts=RIGHT)


@pytest.fixture(scope="module")
def _studied_once(tmp_path_factory: pytest.TempPathFactory) -> Project:
    made = Project(tmp_path_factory.mktemp("study")).suite(answers=ANSWERS, texts=RIGHT)
    done = study(made, *GRID, "--jobs", "2")
    assert done.rc == 0, done.text
    return made


@pytest.fixture
def studied(_studied_once: Project, tmp_path: Path) -> Project:
    """A project with a finished study of four cells."""
    return _studied_once.copied_to(tmp_path)


def study(project: Project, *args: str, **env: str) -> Result:
    done = project.cli("study", "golden/demo", *args, **env)
    assert "Traceback" not in done.text, done.text
    return done


def cells(project: Project, out: str = "demo.study") -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in sorted((project.root / out / "cells").glob("*.jsonl"))}


def tables(project: Project, out: str = "demo.study") -> dict[str, Any]:
    """What a study found, without what it cost."""
    found = project.json(f"{out}/study.json")
    for precision in found["precisions"]:
        precision.pop("cost")
    for told in ("advice", "steady", "jobs", "command"):
        found.pop(told)
    return found


def begun(project: Project, *args: str) -> subprocess.Popen[bytes]:
    """A study that runs on."""
    kept = {k: v for k, v in os.environ.items() if k not in _NOT_INHERITED}
    return subprocess.Popen(
        [sys.executable, "-m", "pytest_repro.cli", "study", "golden/demo", *args], cwd=project.root, env={**kept, "COLUMNS": "200"},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def until(there: Callable[[], bool], seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def workers(project: Project) -> list[int]:
    """Processes of cells of this project."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (
                b"study-cell" in (folder / "cmdline").read_bytes()
                and (folder / "cwd").resolve() == project.root.resolve()
            ):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def test_a_whole_grid(studied: Project) -> None:
    assert list(cells(studied)) == [
        "numerics=bf16,batch_size=1", "numerics=bf16,batch_size=2", "numerics=fp32,batch_size=1", "numerics=fp32,batch_size=2",
    ]  # fmt: skip
    found = studied.json("demo.study/study.json")
    assert [(p["numerics"], p["done"], p["asked"]) for p in found["precisions"]] == [("bf16", 2, 2), ("fp32", 2, 2)]
    assert all(p["dispersion"]["diverging"] == 0 and p["dispersion"]["accuracy"] == 50 for p in found["precisions"])
    assert found["jobs"] == 2 and found["advice"][0].count("is the cheapest setting under which nothing moved") == 1
    head = json.loads(cells(studied)["numerics=fp32,batch_size=2"].splitlines()[0])
    assert head["status"] == "done" and head["environment"]["batch_size"] == 2 and head["memory"]["resident"] > 2**20
    table = (studied.root / "demo.study/table.md").read_text("utf-8")
    assert "| bf16 | 2 of 2 | 0.0 % | none diverged | 0.00 points | 50.0 % | 0.00 tokens |" in table
    names = {p.name for p in (studied.root / "demo.study/figures").iterdir()}
    assert names == {"divergence.svg", "accuracy.svg", "spread.svg"} or names == {"divergence.svg", "accuracy.svg"}


def test_what_is_done_is_not_done_again_and_more_values_are_added(studied: Project) -> None:
    before = cells(studied)
    again = study(studied, *GRID)
    assert again.rc == 0 and "4 of 4 cells are there already" in again.err and cells(studied) == before
    more = study(studied, "--axis", "numerics=bf16,fp32", "--axis", "batch_size=1,2,4")
    assert more.rc == 0, more.text
    assert "4 of 6 cells are there already" in more.err and "cell 6 of 6" in more.err
    assert {name: data for name, data in cells(studied).items() if name in before} == before


def test_killed_half_way_it_goes_on_and_gives_the_same_table(project: Project, _studied_once: Project) -> None:
    process = begun(project, *GRID)
    until(lambda: len(cells(project)) >= 1)
    process.kill()
    process.communicate()
    until(lambda: not workers(project), 30)
    half = cells(project)
    assert 1 <= len(half) < 4, "killed half way"
    done = study(project, *GRID)
    assert done.rc == 0 and f"{len(half)} of 4 cells are there already" in done.err
    assert {name: data for name, data in cells(project).items() if name in half} == half
    assert tables(project) == tables(_studied_once)


def test_ctrl_c_keeps_what_is_done_and_leaves_no_process(project: Project) -> None:
    process = begun(project, *GRID)
    until(lambda: len(cells(project)) >= 1 and bool(workers(project)))
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 130, said
    assert (
        "cells are done and kept in demo.study; the same command goes on from there" in said and "Traceback" not in said
    )
    assert not workers(project) and 1 <= len(cells(project)) < 4
    assert not (project.root / "demo.study/report.html").exists(), "half a grid has no tables"


def test_a_process_that_is_killed_is_a_failed_cell(project: Project) -> None:
    process = begun(project, "--axis", "numerics=bf16")
    until(lambda: bool(workers(project)))
    for pid in workers(project):
        os.kill(pid, signal.SIGKILL)
    said = process.communicate(timeout=100)[0].decode()
    assert process.returncode == 1 and "its process was ended by signal 9" in said, said


def test_a_second_study_in_the_same_folder_is_refused(project: Project) -> None:
    process = begun(project, *GRID)
    try:
        until(lambda: bool(workers(project)))
        second = study(project, *GRID)
        assert second.rc == 4 and "another study runs in this folder" in second.err and "mend:" in second.err
    finally:
        process.kill()
        process.communicate()
        until(lambda: not workers(project), 30)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--axis", "batch=1"), "--axis: unknown axis 'batch'; known: numerics, engine, batch_size"),
        (("--axis", "batch_size=1,x"), "'x' is no value of the axis batch_size"),
        (("--axis", "numerics=bf17"), "unknown numerics mode 'bf17'; known: "),
        (("--axis", "engine=openai"), "'openai' is no value of the axis engine"),
        (("--axis", "attention=eager"), "the engine scripted has no attention"),
        (("--axis", "tensor_parallel=2"), "the engine scripted has no tensor_parallel"),
        (("--samples", "4"), "the engine transformers alone samples"),
        (("--engine-option", "nonsense"), "'nonsense' is not NAME=VALUE"),
        (("--engine-option", "gpu=1"), "unknown key 'gpu' for the engine scripted"),
        (("--merge", "a", "--axis", "batch_size=1"), "--merge runs nothing"),
        (("--merge", "a"), "two different folders at least"),
        (("--merge", "a", "--merge", "b"), "a: no study in this folder"),
    ],
)
def test_bad_configuration(project: Project, args: tuple[str, ...], said: str) -> None:
    done = study(project, *args)
    assert done.rc == 4 and said in done.err, done.text
    assert not (project.root / "demo.study").exists()


def test_a_folder_of_another_study_is_refused(studied: Project) -> None:
    before = cells(studied)
    done = study(studied, *GRID, "--max-new-tokens", "3")
    assert done.rc == 4 and "this folder holds cells of another study: max_new_tokens 8 -> 3" in done.err
    studied.write("golden/demo/prompts.jsonl", '{"id": "a", "prompt": "another question"}\n')
    other = study(studied, *GRID)
    assert other.rc == 4 and "cells of another study: prompts sha256:" in other.err and cells(studied) == before


def test_a_damaged_cell_is_named_and_decoded_again_once_it_is_removed(studied: Project) -> None:
    path = studied.root / "demo.study/cells/numerics=fp32,batch_size=1.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    done = study(studied, *GRID)
    assert done.rc == 4 and f"rm demo.study/cells/{path.name}" in done.err
    path.write_bytes(whole.replace(b'"batch_size": "1"', b'"batch_size": "2"'))
    assert "the file's name is not its content's" in study(studied, *GRID).err
    path.unlink()
    assert study(studied, *GRID).rc == 0 and path.exists()


def test_a_cell_whose_observation_contradicts_its_setting_is_told_and_not_counted(project: Project) -> None:
    project.suite(answers=ANSWERS, texts=RIGHT, engine={"script": "script.jsonl", "observed": "bf16"})
    done = study(project, *GRID)
    assert done.rc == 0, done.text
    assert "contradicted" in done.out and "fp32 was asked for, and the probe found bf16" in done.out
    found = project.json("demo.study/study.json")
    bf16, fp32 = found["precisions"]
    assert (bf16["done"], fp32["done"], fp32["dispersion"], fp32["cost"]) == (2, 0, None, None)
    assert [status for _, status, _ in found["failed"]] == ["contradicted"] * 2
    assert all(len(data.splitlines()) == 1 for name, data in cells(project).items() if "fp32" in name), (
        "nothing was decoded"
    )


def test_threads_that_the_engine_does_not_show_are_not_believed(project: Project) -> None:
    done = study(project, "--axis", "threads=1,2")
    assert done.rc == 1 and "threads 1 was asked for, and the engine does not show what was in force" in done.out
    assert "No advice" in done.out


def test_cells_that_failed_stay_failed_until_they_are_asked_for_again(project: Project) -> None:
    project.script(b={"error": "NaN in logits at token 3"})
    done = study(project, *GRID)
    assert done.rc == 1 and "prompt b has no answer: NaN in logits at token 3" in done.out
    project.script(b={"error": ""})
    assert study(project, *GRID).rc == 1
    again = study(project, *GRID, "--retry-failed")
    assert again.rc == 0 and again.err.count("tokens/s") == 4, again.text


def test_studies_of_two_machines_are_merged(studied: Project) -> None:
    shutil.copytree(studied.root / "demo.study", studied.root / "there")
    for path in (studied.root / "there/cells").glob("*.jsonl"):
        head, *rows = path.read_text().splitlines(keepends=True)
        told = json.loads(head)
        told["environment"] |= {"device": "NVIDIA L40S"}
        first, *others = map(json.loads, rows)
        first["tokens"][-1] = 99
        path.write_text("".join(json.dumps(line) + "\n" for line in (told, first, *others)))
    done = study(studied, "--merge", "demo.study", "--merge", "there", "--out", "both")
    assert done.rc == 0, done.text
    found = studied.json("both/study.json")
    assert len(found["axes"]["machine"]) == 2 and found["precisions"][0]["done"] == 4
    assert found["effects"][0]["axis"] == "machine" and found["effects"][0]["div_percent"] == 25
    assert found["precisions"][0]["dispersion"]["mean_div_index"] == 3

    studied.write("golden/demo/prompts.jsonl", '{"id": "a", "prompt": "another question"}\n')
    other = study(studied, "--merge", "demo.study", "--merge", "there")
    assert other.rc == 4 and "its prompts are not those of golden/demo" in other.err


def test_what_an_engine_says_is_inert(project: Project) -> None:
    project.script(
        a={"error": "".join(TEXTS[name] for name in ("set-env", "colour", "right-to-left", "script", "nul"))}
    )
    done = study(project, "--axis", "numerics=bf16")
    assert done.rc == 1 and "prompt a has no answer" in done.out
    inert(done)


@pytest.mark.parametrize(("width", "scheme"), SIGHTS)
def test_the_page_is_quiet_and_accessible(studied: Project, browser: Browser, width: int, scheme: str) -> None:
    browser.open_file(studied.root / "demo.study/report.html", width=width, scheme=scheme)
    browser.open_all()
    browser.quiet()
    browser.accessible()
    assert browser.js("return document.documentElement.scrollWidth") <= width
    labels = {element.text for element in browser.all(".study-plot text")}
    assert {"position in the output, tokens", "diverged, % of prompts", "accuracy, %", "bf16", "fp32"} <= labels
    for element in browser.all(".study-plot text"):
        assert float(browser.js("return arguments[0].getBoundingClientRect().height", element)) >= 9, "legible"
