"""The command line's own mistakes and its JSON, in this process: what a user typed wrong is told in words, exit code 2."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import git
import pytest
from click.testing import Result
from typer.testing import CliRunner

from pytest_repro import suite
from pytest_repro.cli import app

from .project import DRIFT, Project


@pytest.fixture
def run(project: Project, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """`pytest-repro ARGS` in the project's folder."""
    return _runner(project, monkeypatch)


def _runner(project: Project, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.chdir(project.root)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(project.home / "gitconfig"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(project.root.parent))
    for name in ("GITHUB_BASE_REF", "CHANGE_TARGET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pytest_repro.cli.shell.console.soft_wrap", True)
    return lambda *args: CliRunner().invoke(app, args)


def data(result: Result) -> Any:
    assert result.stdout, result.stderr
    return json.loads(result.stdout)


# --- init -----------------------------------------------------------------------------------------------------------

INIT = ("init", "golden/mine", "--model", "org/name@main", "--prompts", "mine.txt")


def test_a_first_suite(project: Project, run: Callable[..., Result]) -> None:
    project.write("mine.txt", "Hello\nWhat is 6 * 7?\n")
    done = run(*INIT, "--max-new-tokens", "32")
    assert done.exit_code == 0, done.output
    made = suite.load(project.root / "golden" / "mine")
    assert (made.name, made.model, made.numerics, made.max_new_tokens) == (
        "mine",
        "org/name@main",
        ("fp32", "bf16"),
        32,
    )
    for line in (
        "wrote golden/mine/suite.toml",
        "next  pytest --repro-update golden/mine",
        "      pytest-repro review golden/mine",
        "      pytest --repro-check golden/mine",
        '          golden: "golden/mine"',
    ):
        assert line in done.stdout
    assert "./.github/actions/repro-check is not here" in done.stdout
    before = project.golden_files()
    again = run(*INIT)
    assert again.exit_code == 2 and "this is here already, and was not touched" in again.stderr
    assert project.golden_files() == before


def test_a_first_suite_as_json_with_its_workflow(project: Project, run: Callable[..., Result]) -> None:
    project.write("mine.txt", "Hello\n").write("models/own/config.json", "{}")
    done = run("init", "golden/mine", "--model", "models/own", "--prompts", "mine.txt", "--workflow",
               ".github/workflows/repro.yml", "--numerics", "fp32,layercast", "--as-json")  # fmt: skip
    found = data(done)
    assert found["written"] == ["golden/mine/prompts.jsonl", "golden/mine/suite.toml", ".github/workflows/repro.yml"]
    assert found["numerics"] == ["fp32", "layercast"]
    assert (project.root / ".github/workflows/repro.yml").read_text() == found["workflow"]
    assert suite.load(project.root / "golden/mine").model == "../../models/own", "relative to the suite, as suites are"


def test_a_suite_that_names_code_is_run_with_leave(project: Project, run: Callable[..., Result]) -> None:
    project.write("mine.txt", "a\n")
    for i, args in enumerate([("--scorer", "scoring:right"), ("--engine", "mine:engine")]):
        made = data(run("init", f"golden/m{i}", *INIT[2:], *args, "--as-json"))
        assert made["next"] == [
            f"pytest --repro-allow-code --repro-update golden/m{i}", f"pytest-repro review golden/m{i}",
            f"pytest --repro-allow-code --repro-check golden/m{i}",
        ]  # fmt: skip
        assert "\n          arguments: --repro-allow-code # " in made["workflow"]
    assert "--repro-allow-code" not in run(*INIT).stdout


def test_a_suite_that_asks_a_server_says_which(
    project: Project, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    project.write("mine.txt", "a\n")
    address = "http://127.0.0.1:8000/v1"
    ask = (*INIT[2:], "--engine", "openai")
    done = run("init", "golden/a", *ask, "--engine-option", f"base_url={address}", "--engine-option", "retries=2")
    assert done.exit_code == 0, done.output
    assert suite.load(project.root / "golden/a").engine_options == {"base_url": address, "retries": 2}
    assert run("init", "golden/b", *ask).exit_code == 2
    monkeypatch.setenv("OPENAI_BASE_URL", address)
    assert run("init", "golden/b", *ask).exit_code == 0
    monkeypatch.delenv("OPENAI_BASE_URL")
    project.pyproject(f'[tool.pytest-repro.engine.openai]\nbase_url = "{address}"\n')
    assert run("init", "golden/c", *ask).exit_code == 0


def test_the_workflow_names_the_suite_from_the_repositorys_root(
    project: Project, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    project.write("golden/mine.txt", "a\n")
    git.Repo.init(project.root)
    monkeypatch.chdir(project.root / "golden")
    made = data(run("init", "mine", *INIT[2:], "--as-json"))
    assert made["next"][0] == "pytest --repro-update mine" and '          golden: "golden/mine"\n' in made["workflow"]


def test_recording_at_once(project: Project) -> None:
    project.suite().write("mine.txt", "a\nb\n")
    rows = "".join(json.dumps({**project.rows[k], "id": f"p0{i}"}) + "\n" for i, k in enumerate("ab", 1))
    project.write("golden/mine/script.jsonl", rows)
    project.pyproject('[tool.pytest-repro.engine.scripted]\nscript = "script.jsonl"\n')
    done = project.cli("init", "golden/mine", "--model", "m", "--prompts", "mine.txt", "--engine", "scripted",
                       "--numerics", "bf16", "--record", "--as-json")  # fmt: skip
    assert done.rc == 0, done.text
    assert json.loads(done.out)["suite"] == "golden/mine" and "recorded  2 prompts" in done.err
    assert (project.root / "golden/mine/bf16.pending.jsonl").exists()


BAD_INIT: dict[str, tuple[dict[str, str], tuple[str, ...], str]] = {
    "no-such-file": ({}, INIT, "there is no such file"),
    "not-utf8": ({"mine.txt": "\udcff"}, INIT, "cannot be read"),
    "empty": ({"mine.txt": "\n"}, INIT, "no prompts are in it"),
    "bad-name": ({"mine.txt": "x"}, (*INIT, "--name", "my suite"), "suite.name"),
    "hostile-name": ({"mine.txt": "x"}, (*INIT, "--name", 'x"\nmodel = "y'), "suite.name"),
    "empty-model": ({"mine.txt": "x"}, ("init", "golden/m", "--model", " ", "--prompts", "mine.txt"), "no model is named"),
    "no-such-model": (
        {"mine.txt": "x"}, ("init", "golden/m", "--model", "nowhere", "--prompts", "mine.txt"), "no model reference"
    ),
    "bad-pypi": (
        {"mine.txt": "x"}, ("init", "golden/m", "--model", "pypi:x/y.gguf", "--prompts", "mine.txt"), "no model reference"
    ),
    "unknown-mode": ({"mine.txt": "x"}, (*INIT, "--numerics", "fp31"), "--numerics: unknown numerics mode 'fp31'"),
    "no-mode": ({"mine.txt": "x"}, (*INIT, "--numerics", ","), "no numerics mode is named"),
    "unknown-engine": ({"mine.txt": "x"}, (*INIT, "--engine", "vlm"), "unknown engine 'vlm'"),
    "unknown-scorer": ({"mine.txt": "x"}, (*INIT, "--scorer", "nearly"), "unknown scorer 'nearly'"),
    "regex-without-one": ({"mine.txt": "x"}, (*INIT, "--scorer", "regex"), "needs a pattern"),
    "bad-regex": ({"mine.txt": "x"}, (*INIT, "--scorer", "regex", "--pattern", "("), "not a regular expression"),
    "file-for-a-folder": ({"mine.txt": "x", "golden": "x"}, INIT, "this is a file, where a folder is needed"),
    "workflow-there": (
        {"mine.txt": "x", "w.yml": "x"}, (*INIT, "--workflow", "w.yml"), "w.yml: this is here already"
    ),
    "hostile-folder": (
        {"mine.txt": "x"}, ("init", "g/${{x}}", "--name", "m", *INIT[2:]), "signs that a workflow gives a meaning to"
    ),
    "hostile-action": ({"mine.txt": "x"}, (*INIT, "--action", "a\nb"), "names no action"),
    "no-server": ({"mine.txt": "x"}, (*INIT, "--engine", "openai"), "--engine-option base_url=http://127.0.0.1:8000/v1"),
    "secret-server": (
        {"mine.txt": "x"}, (*INIT, "--engine", "openai", "--engine-option", "base_url=http://u:p@h/v1"), "may hold no user"
    ),
    "unknown-engine-option": ({"mine.txt": "x"}, (*INIT, "--engine-option", "base_url=x"), "unknown key 'base_url'"),
    "no-engine-option": ({"mine.txt": "x"}, (*INIT, "--engine-option", "x"), "--engine-option: 'x' is not NAME=VALUE"),
    "outside": ({"mine.txt": "x"}, ("init", "../mine", *INIT[2:]), "lies outside of the project"),
    "workflow-for-a-suite": (
        {"mine.txt": "x"}, (*INIT, "--workflow", "golden/../golden/mine/suite.toml"), "cannot lie in the suite's folder"
    ),
    "workflow-in-a-suite": (
        {"mine.txt": "x"}, (*INIT, "--workflow", "golden/mine/w.yml"), "cannot lie in the suite's folder"
    ),
    "workflow-for-a-folder": ({"mine.txt": "x"}, (*INIT, "--workflow", "golden"), "cannot lie in the suite's folder"),
    "key-twice": ({"mine.txt": '{"prompt": "a", "prompt": "b"}'}, INIT, "mine.txt:1: not valid JSON: the key 'prompt' stands twice"),
    "no-number": ({"mine.txt": '{"prompt": "a", "answer": NaN}'}, INIT, "mine.txt:1 [answer]: the answer is nan"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_INIT)
def test_init_writes_nothing_where_something_is_wrong(project: Project, run: Callable[..., Result], name: str) -> None:
    files, args, told = BAD_INIT[name]
    for path, text in files.items():
        project.write(path, text.encode("utf-8", "surrogateescape"))
    before = sorted(project.root.rglob("*"))
    done = run(*args)
    assert done.exit_code == 2, done.output
    assert told in done.stderr and "Traceback" not in done.output
    assert sorted(project.root.rglob("*")) == before


@pytest.mark.parametrize("args", [("--limit", "0"), ("--batch-size", "0"), ("--max-new-tokens", "x")])
def test_numbers_of_init_are_checked(project: Project, run: Callable[..., Result], args: tuple[str, ...]) -> None:
    project.write("mine.txt", "x")
    assert run(*INIT, *args).exit_code == 2
    assert not project.folder.parent.exists()


# --- verify ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def repository(accepted: Project, monkeypatch: pytest.MonkeyPatch) -> tuple[Project, git.Repo, Callable[..., Result]]:
    """A project in git, with its first golden committed on main."""
    runner = _runner(accepted, monkeypatch)
    repo = git.Repo.init(accepted.root, initial_branch="main")
    repo.git.add("-A")
    repo.index.commit("first")
    return accepted, repo, runner


@pytest.mark.parametrize(
    ("base", "told"),
    [("nowhere", "there is no revision 'nowhere'"), ("--output=x", "there is no revision"), ("", "there is no revision ''"),
     ("HEAD~7", "there is no revision 'HEAD~7'")],
    ids=["unknown", "an-option", "empty", "before-the-first"],
)  # fmt: skip
def test_a_base_that_is_none(repository: Any, base: str, told: str) -> None:
    project, _, run = repository
    result = run("verify", "golden", f"--base={base}")
    assert result.exit_code == 2 and told in result.stderr
    assert not (project.root / "x").exists()


def test_what_cannot_be_verified(project: Project, run: Callable[..., Result]) -> None:
    project.suite()
    assert "not in a git repository" in run("verify").stderr
    repo = git.Repo.init(project.root, initial_branch="main")
    assert "nothing was committed here yet" in run("verify").stderr
    repo.git.add("-A")
    repo.index.commit("first")
    nothing = run("verify")
    assert nothing.exit_code == 2 and "there is no golden here" in nothing.stderr
    outside = run("verify", str(project.home))
    assert outside.exit_code == 2 and "git repository" in outside.stderr
    repo.git.checkout("--orphan", "other")
    repo.git.commit("-qm", "unrelated", "--allow-empty")
    assert "no commit in common" in run("verify", "--base", "main").stderr
    repo.git.branch("-D", "main")
    assert "is here to compare with" in run("verify").stderr


def test_what_ci_names_is_the_base(repository: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, run = repository
    monkeypatch.setenv("GITHUB_BASE_REF", "gone")
    result = run("verify")
    assert result.exit_code == 2 and "$GITHUB_BASE_REF: there is no revision 'origin/gone'" in result.stderr
    monkeypatch.setenv("GITHUB_BASE_REF", "main")
    assert data(run("verify", "--as-json"))["base"]["name"] == "main"


def test_a_golden_that_git_ignores_is_not_in_git(repository: Any) -> None:
    project, repo, run = repository
    repo.git.rm("-q", "--cached", "golden/demo/bf16.golden.safetensors")
    project.write(".gitignore", "*.safetensors\n")
    repo.git.add(".gitignore")
    repo.index.commit("ignore")
    found = data(run("verify", "--as-json", "--base", "HEAD"))["findings"]
    assert [(f["kind"], f["where"]) for f in found] == [("uncommitted", "golden/demo/bf16.golden.jsonl")]


def test_a_suite_that_moved_keeps_its_history(repository: Any) -> None:
    project, repo, run = repository
    repo.git.checkout("-qb", "move")
    repo.git.mv("golden/demo", "golden/other")
    repo.index.commit("move")
    assert run("verify", "--base", "main").exit_code == 0
    toml = project.root / "golden/other/suite.toml"
    toml.write_text(toml.read_text() + "[thresholds]\nmax_divergent = 1\n")
    found = data(run("verify", "--base", "main", "--as-json"))["findings"]
    assert [f["kind"] for f in found] == ["thresholds"]


def test_a_golden_that_moved_without_its_suite_is_deleted(repository: Any) -> None:
    project, repo, run = repository
    repo.git.checkout("-qb", "move")
    (project.root / "golden/junk").mkdir()
    for part in ("jsonl", "safetensors"):
        repo.git.mv(f"golden/demo/bf16.golden.{part}", "golden/junk")
    repo.index.commit("move")
    found = data(run("verify", "--base", "main", "--as-json"))["findings"]
    assert [(f["kind"], f["where"]) for f in found] == [("deleted", "golden/demo/bf16.golden.jsonl")]


def test_a_folder_of_a_suite_that_moved_is_verified_alone(repository: Any) -> None:
    _, repo, run = repository
    repo.git.checkout("-qb", "move")
    repo.git.mv("golden/demo", "golden/other")
    repo.index.commit("move")
    for folder, goldens, steps in (("golden/other", 1, 2), ("golden/demo", 0, 1)):
        found = data(run("verify", folder, "--base", "main", "--as-json"))
        assert (found["findings"], found["goldens"], found["steps"]) == ([], goldens, steps)


def test_what_a_merge_dropped_of_the_targets_goldens(repository: Any) -> None:
    project, repo, run = repository
    repo.git.checkout("-qb", "branch")
    repo.git.commit("-qm", "work", "--allow-empty")
    repo.git.checkout("-q", "main")
    project.suite(at="golden/more").update(where="golden/more").accept(where="golden/more")
    project.suite().flip("a", DRIFT).update().accept()
    repo.git.add("-A")
    repo.git.commit("-qm", "a newer golden, and another suite")
    repo.git.checkout("-q", "branch")
    repo.git.merge("-q", "-s", "ours", "main", "-m", "merge")

    def found(*args: str) -> list[tuple[str, str]]:
        told = data(run("verify", *args, "--base", "main", "--as-json"))
        return [(f["kind"], f["where"]) for f in told["findings"]]

    older, gone = ("chain", "golden/demo/bf16.golden.jsonl"), ("deleted", "golden/more/bf16.golden.jsonl")
    assert found() == [older, gone]
    assert found("golden/demo") == [older] and found("golden/more") == [gone]
    repo.git.checkout("main", "--", "golden")
    repo.git.commit("-qm", "put them back")
    assert found() == []
    repo.git.rm("-qr", "golden/more")
    repo.git.commit("-qm", "Retire it\n\nGolden-Removed: nobody asks this")
    assert found() == []


def test_a_golden_that_no_check_reads_any_more(repository: Any) -> None:
    project, repo, run = repository

    def found() -> list[tuple[str, str]]:
        told = data(run("verify", "--base", "main", "--as-json"))
        return [(f["kind"], f["what"]) for f in told["findings"]]

    repo.git.checkout("-qb", "branch")
    for modes in (["bf16", "fp32"], ["fp32"], ["native"]):
        project.suite(run={"numerics": modes})
        assert found() == []
    project.suite(run={"numerics": ["fp16"]})
    assert found() == [("unused", "no mode of its suite reads this golden any more, and one did in main")]
    (project.folder / "suite.toml").unlink()
    assert found() == [("unused", "its suite's suite.toml is gone since main")]
    repo.git.commit("-qam", "less to check")
    repo.git.rm("-q", "golden/demo/bf16.golden.jsonl", "golden/demo/bf16.golden.safetensors")
    repo.git.commit("-qm", "Retire it\n\nGolden-Removed: nobody asks this")
    assert found() == []


def test_a_golden_in_a_repository_of_its_own(repository: Any) -> None:
    project, repo, run = repository
    shutil.copytree(project.folder, project.root / "golden/inner/demo")
    inner = git.Repo.init(project.root / "golden/inner", initial_branch="main")
    (found,) = data(run("verify", "--base", "main", "--as-json"))["findings"]
    assert (found["kind"], found["where"]) == ("nested", "golden/inner/demo/bf16.golden.jsonl")
    assert found["fix"] == "cd golden/inner && pytest-repro verify"
    inner.git.add("-A")
    inner.index.commit("first")
    repo.git.add("golden/inner")
    repo.index.commit("as a submodule")
    assert data(run("verify", "--base", "main", "--as-json"))["findings"] == [found]
    assert run("verify", "golden/inner", "--base", "main").exit_code == 0


def test_thresholds_of_pyproject_count(repository: Any) -> None:
    project, _, run = repository
    project.pyproject("[tool.pytest-repro.thresholds]\nmax_unexplained = 2\n")
    found = data(run("verify", "--as-json"))["findings"]
    assert [f["kind"] for f in found] == ["thresholds"] and "max_unexplained 0 -> 2" in found[0]["what"]


def without_thresholds(project: Project) -> None:
    """The review as one from before thresholds were kept in it."""
    from dataclasses import replace

    from pytest_repro.store import Place

    place = Place(project.folder, "bf16")
    golden = place.read()
    assert golden.review is not None
    place.write(replace(golden, review=replace(golden.review, thresholds=None)))


def test_an_older_review_is_held_against_the_merge_base(repository: Any) -> None:
    project, repo, run = repository
    without_thresholds(project)
    repo.git.commit("-qam", "as it was")
    assert run("verify", "--base", "HEAD").exit_code == 0
    project.suite(thresholds={"fp32_waiver": "all"})
    result = run("verify", "--base", "HEAD")
    assert result.exit_code == 1
    assert (
        "thresholds of bf16 loosened since HEAD, and no reason is recorded: fp32_waiver explained -> all"
        in result.stdout
    )


def test_a_class_that_falls_back_on_this_golden_counts_too(repository: Any) -> None:
    project, repo, run = repository
    project.suite(run={"numerics": ["bf16", "fp32"]})
    repo.git.commit("-qam", "fp32 as well")
    project.suite(run={"numerics": ["bf16", "fp32"]}, thresholds={"fp32": {"max_divergent": 3}})
    (found,) = data(run("verify", "--base", "HEAD", "--as-json"))["findings"]
    assert "thresholds of fp32 loosened" in found["what"] and "--repro-numerics fp32" in found["fix"]


def test_a_deletion_with_a_reason_holds(repository: Any) -> None:
    _, repo, run = repository
    repo.git.rm("-qr", "golden/demo")
    repo.git.commit("-qm", "Retire demo\n\nGolden-Removed: nobody uses it")
    assert run("verify", "--base", "HEAD~1").exit_code == 0
    repo.git.commit("-q", "--amend", "-m", "Retire demo")
    result = run("verify", "--base", "HEAD~1")
    assert result.exit_code == 1 and "golden/demo/bf16.golden.jsonl: commit " in result.stdout


# --- review ---------------------------------------------------------------------------------------------------------


def test_loosened_thresholds_are_shown_before_they_are_accepted(repository: Any) -> None:
    project, _, run = repository
    project.suite(thresholds={"max_divergent": 4}).flip("a", DRIFT).update()
    shown = run("diff")
    assert "THRESHOLDS LOOSENED, and accepting puts them in force: max_divergent 0 -> 4" in shown.stdout
    (change,) = data(run("diff", "--as-json"))
    assert change["thresholds_loosened"] == ["max_divergent 0 -> 4"]
    assert change["counts"] == {"drift": 1, "identical": 3} and change["replaces"] == project.header()["digest"]
    assert change["beyond_thresholds"] == ["unexplained 1 > max_unexplained 0"]
    done = run("accept", "golden", "--all", "--reason", "a is a coin toss")
    assert "THRESHOLDS LOOSENED" in done.stdout and "verdict   1 drift · 3 identical" in done.stdout
    assert done.stdout.index("THRESHOLDS LOOSENED") < done.stdout.index("accepted golden/demo/bf16.golden.jsonl")


def test_a_first_golden_is_read_before_it_is_accepted(project: Project, run: Callable[..., Result]) -> None:
    project.suite(answers={"a": "7"}, texts={"a": "I say 7"}).update()
    shown = run("diff")
    assert "new        a  4 tokens, stop, right" in shown.stdout and "now     I say 7" in shown.stdout
    assert data(run("diff", "--as-json"))[0]["counts"] == {"new": 4}
    file = str(project.folder / "bf16.pending.jsonl")
    assert "I say 7" in run("show", file).stdout and "accepted  by nobody yet" in run("show", file).stdout
    waiting = run("show")
    assert (
        waiting.exit_code == 2
        and "a candidate waits" in waiting.stderr
        and "mend:  pytest-repro diff golden" in waiting.stderr
    )


def test_thresholds_are_shown_where_a_reason_seals_them(repository: Any) -> None:
    project, _, run = repository
    project.suite(thresholds={"max_divergent": 4})
    done = run("accept", "golden", "--thresholds", "--reason", "a coin toss")
    assert done.exit_code == 0 and "bf16.golden.jsonl: max_divergent 0 -> 4" in done.stderr
    assert "no threshold is looser" in run("accept", "golden", "--thresholds", "--reason", "again").stderr


def test_several_pending_goldens_are_named_on_one_line(project: Project, run: Callable[..., Result]) -> None:
    project.suite(run={"numerics": ["bf16", "fp32"]}).update()
    said = run("reject", "golden").stderr
    assert "2 pending: golden/demo/bf16.pending.jsonl, golden/demo/fp32.pending.jsonl" in said.replace("\n", " ")


def test_accuracy_and_envelope_before_and_after(project: Project, run: Callable[..., Result]) -> None:
    rows = {"a": [1], "b": [2], "c": [3]}
    project.suite(rows, answers=dict.fromkeys(rows, "7"), texts=dict.fromkeys(rows, "7")).update().accept()
    project.suite(rows, answers=dict.fromkeys(rows, "7"), texts={"a": "7", "b": "8", "c": "7"},
                  engine={"script": "script.jsonl", "jitter": 0.5}).update()  # fmt: skip
    shown = run("diff")
    assert "accuracy 100.0 % -> 66.7 %   1 lost, 0 gained, p = 0.5" in shown.stdout
    assert "the noise envelope grew: max_deficit 0.1 -> 0.5" in shown.stdout
    (change,) = data(run("diff", "--as-json"))
    assert (change["accuracy"]["lost"], change["accuracy"]["n"]) == (1, 3)
    assert [g["measure"] for g in change["envelope_grew"]] == [
        "mean_abs_dlogp",
        "max_deficit",
        "benign change of gaps",
        "level of prompt c",
    ]


@pytest.mark.parametrize(
    ("answers", "left"),
    [
        (["a", "fine", "r"], ["bf16.golden"]),
        (["s", "what?", "a", "good"], ["bf16.pending", "fp32.golden"]),
        (["A", "one", "two"], ["bf16.golden", "fp32.golden"]),
        (["R"], []),
        (["S"], ["bf16.pending", "fp32.pending"]),
    ],
)
def test_walking_through_at_a_terminal(
    project: Project, monkeypatch: pytest.MonkeyPatch, answers: list[str], left: list[str]
) -> None:
    project.suite(run={"numerics": ["bf16", "fp32"]}).update()
    _runner(project, monkeypatch)
    monkeypatch.setattr("pytest_repro.cli.goldens.sys", SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True)))
    result = CliRunner().invoke(app, ["review"], input="\n".join(answers) + "\n")
    assert result.exit_code == 0, result.output
    assert [file.stem for file in sorted(project.folder.glob("*.*.jsonl"))] == left
    for stem in (stem for stem in left if stem.endswith("golden")):
        assert project.header(stem)["review"]["thresholds"]["limits"]["max_divergent"] == 0


def test_a_file_that_cannot_be_opened_is_bad_input(project: Project, run: Callable[..., Result]) -> None:
    project.suite().update()
    (project.folder / "bf16.pending.safetensors").unlink()
    (project.folder / "bf16.pending.safetensors").mkdir()
    result = run("diff", "golden")
    assert result.exit_code == 2 and "bf16.pending.safetensors: Is a directory" in result.stderr


def test_every_command_speaks_json(accepted: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _runner(accepted, monkeypatch)
    accepted.flip("a", DRIFT).update()
    shutil.copytree(accepted.folder, accepted.root / "left" / "golden" / "demo",
                    ignore=shutil.ignore_patterns("*.golden.*", "suite.toml"))  # fmt: skip
    (golden,) = data(run("show", "--as-json", "--prompt", "b"))
    assert [p["tokens"] for p in golden["prompts"]] == [[21, 22, 23, 24]] and golden["review"]["by"]
    assert data(run("pending", "--as-json"))[0]["changed"] == 1
    (gone,) = data(run("reject", "golden", "--all", "--as-json"))
    assert gone == {"path": "golden/demo/bf16.pending.jsonl", "golden": "bf16"}
    found = data(run("fetch", "left", "--as-json"))
    assert [(f["path"], f["state"]) for f in found["fetched"]] == [("golden/demo/bf16.pending.jsonl", "new")]
    assert "golden/demo/prompts.jsonl" in found["ignored"] and found["next"] == ["pytest-repro review golden/demo"]
    (taken,) = data(run("accept", "golden", "--all", "--reason", "##[error] \u202e", "--as-json"))
    assert taken["review"]["reason"] == "##[error] \u202e"
    raw = run("show", "--as-json").stdout
    assert "##[" not in raw and raw.isascii()
    assert "python" in data(run("env", "--as-json"))


BAD_CALLS = {
    "thresholds-without-a-reason": (("accept", "golden", "--thresholds"), "thresholds need a reason"),
    "thresholds-of-nothing": (("accept", "elsewhere", "--thresholds", "-r", "x"), "there is no golden here"),
    "fetch-nothing": (("fetch", "none.zip"), "there is no such file or folder"),
    "fetch-no-candidates": (("fetch", "golden"), "no pending golden is in it"),
    "show-elsewhere": (("show", "elsewhere"), "there is no such folder"),
    "show-no-prompt": (("show", "golden", "--prompt", "zz", "--as-json"), "no prompt 'zz'"),
    "review-without-a-terminal": (("accept", "golden", "--all"), "nothing is pending here"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_call_that_cannot_be_meant(accepted: Project, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    args, told = BAD_CALLS[name]
    before = accepted.golden_files()
    result = _runner(accepted, monkeypatch)(*args)
    assert result.exit_code == 2 and told in result.stderr, result.output
    assert accepted.golden_files() == before


def test_thresholds_of_an_unreviewed_golden_cannot_be_sealed(
    accepted: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    accepted.update()
    for part in ("jsonl", "safetensors"):
        (accepted.folder / f"bf16.pending.{part}").replace(accepted.folder / f"bf16.golden.{part}")
    result = _runner(accepted, monkeypatch)("accept", "golden", "--thresholds", "--reason", "x")
    assert result.exit_code == 2 and "nobody accepted this golden" in result.stderr


def test_what_an_artifact_is_called_cannot_act(
    accepted: Project, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    left = tmp_path / "left\x1b[31m"
    (left / "golden/demo").mkdir(parents=True)
    (left / "##[error]\x1b]0;x\x07").write_text("x")
    accepted.update()
    for part in ("jsonl", "safetensors"):
        (accepted.folder / f"bf16.pending.{part}").rename(left / "golden/demo" / f"bf16.pending.{part}")
    done = _runner(accepted, monkeypatch)("fetch", str(left))
    assert done.exit_code == 0 and "\x1b" not in done.output and "ignored  #\\x23[error]\\x1b]0;x\\x07" in done.stdout
    failed = _runner(accepted, monkeypatch)("fetch", str(left / "none"))
    assert failed.exit_code == 2 and "\x1b" not in failed.output
