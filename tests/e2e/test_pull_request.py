"""A pull request: drift found in CI, its candidate fetched, reviewed, accepted, committed; and what verify catches."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from .project import DRIFT, REVIEWER, Project, Result

GOLDEN = "golden/demo/bf16.golden.jsonl"


class Clone(Project):
    """A clone of the project's repository, with git at hand."""

    def git(self, *args: str) -> str:
        identity = ["-c", "user.name=Dev", "-c", "user.email=dev@example.org", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", *identity, *args], cwd=self.root, capture_output=True, text=True, check=True)
        return done.stdout

    def commit(self, message: str) -> Clone:
        self.git("add", "-A")
        self.git("commit", "-qm", message)
        return self

    def verify(self, *args: str, **env: str) -> Result:
        result = self.cli("verify", *args, **env)
        assert "Traceback" not in result.text, result.text
        return result


def clone(remote: Path, root: Path, branch: str = "main") -> Clone:
    root.mkdir(parents=True)
    subprocess.run(["git", "clone", "-q", "--branch", branch, str(remote), str(root / "project")], check=True)
    copy = Clone(root)
    copy.name = "demo"
    script = (copy.folder / "script.jsonl").read_text().splitlines()
    copy.rows = {row["id"]: row for row in map(json.loads, script)}
    return copy


@pytest.fixture(scope="session")
def _remote(_accepted_once: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bare repository with an accepted golden on main, and a branch on which the model changed."""
    root = tmp_path_factory.mktemp("git")
    subprocess.run(["git", "init", "-q", "--bare", "-b", "main", "remote.git"], cwd=root, check=True)
    shutil.copytree(_accepted_once.root, root / "seed" / "project")
    seed = Clone(root / "seed")
    seed.name, seed.rows = "demo", dict(_accepted_once.rows)
    seed.git("init", "-q", "-b", "main")
    seed.write(".gitignore", "__pycache__/\nleft/\n").commit("The first golden")
    seed.git("push", "-q", str(root / "remote.git"), "main")
    seed.git("checkout", "-qb", "change")
    seed.flip("b", DRIFT)
    seed.commit("Another model")
    seed.git("push", "-q", str(root / "remote.git"), "change")
    return root / "remote.git"


@pytest.fixture
def change(_remote: Path, tmp_path: Path) -> Clone:
    """A fresh clone of the branch with the change."""
    return clone(_remote, tmp_path / "dev", "change")


def test_from_a_red_build_to_an_accepted_golden(_remote: Path, change: Clone, tmp_path: Path) -> None:
    ci = clone(_remote, tmp_path / "ci", "change")
    red = ci.check("--repro-pending-dir", "left", CI="true", GITHUB_ACTIONS="true")
    assert red.rc == 1
    artifact = tmp_path / "repro-pending.zip"
    with zipfile.ZipFile(artifact, "w") as packed:
        for file in sorted((ci.root / "left").rglob("*")):
            packed.write(file, file.relative_to(ci.root / "left"))

    fetched = change.cli("fetch", str(artifact))
    assert fetched.rc == 0, fetched.text
    assert "fetched  golden/demo/bf16.pending.jsonl  4 prompts" in fetched.out
    assert "next     pytest-repro review golden/demo" in fetched.out

    seen = change.cli("diff")
    assert seen.rc == 1
    for told in (
        "verdict   3 identical · 1 drift   beyond the thresholds: unexplained 1 > max_unexplained 0",
        "drift      b  diverges at token 1: deficit 0.8, golden's gap 2",
        "change   21 [-22-]{+77+} 23 24",
    ):
        assert told in seen.out

    change.accept("the new model answers b better")
    review = change.header()["review"]
    assert review["by"] == REVIEWER and review["thresholds"]["limits"]["max_divergent"] == 0
    uncommitted = change.verify()
    assert uncommitted.rc == 1
    assert f"{GOLDEN}: git does not have it as it lies here" in uncommitted.out

    verified = change.commit("Accept the new golden").verify()
    assert verified.rc == 0, verified.text
    assert "PASS  1 goldens, 1 changes since origin/HEAD" in verified.out
    assert change.check().rc == 0


def _by_hand(change: Clone) -> None:
    text = (change.root / GOLDEN).read_text()
    change.write(GOLDEN, text.replace('"tokens": [21, 22', '"tokens": [21, 77')).commit("Quick fix")


def _accepted_by_nobody(change: Clone) -> None:
    change.update()
    for part in ("jsonl", "safetensors"):
        (change.folder / f"bf16.pending.{part}").replace(change.folder / f"bf16.golden.{part}")
    change.commit("New golden")


def _broken_chain(change: Clone) -> None:
    change.update().accept("one").commit("One")
    change.flip("c", DRIFT).update().accept("two").commit("Two")
    change.git("reset", "-q", "--soft", "HEAD~2")
    change.commit("Both at once")


def _loosened(change: Clone) -> None:
    change.suite(thresholds={"max_unexplained": 1, "max_divergent": 1}).flip("b", DRIFT).commit("Green again")


BAD: dict[str, tuple[Callable[[Clone], None], list[str]]] = {
    "edited-by-hand": (
        _by_hand,
        ["leaves it broken: this golden was edited by hand", "then record and accept it anew: pytest --repro-update golden/demo"],
    ),
    "accepted-by-nobody": (_accepted_by_nobody, ["changes this golden, and nobody accepted it"]),
    "broken-chain": (_broken_chain, ["its review replaced sha256:", "lay there", "pytest-repro review golden/demo"]),
    "loosened-in-silence": (
        _loosened,
        [
            "thresholds of bf16 loosened since they were accepted, and no reason is recorded: max_divergent 0 -> 1, max_unexplained 0 -> 1",
            f'pytest-repro accept {GOLDEN} --thresholds --reason "..."',
        ],
    ),
}  # fmt: skip


def test_the_commands_that_show_a_squashed_golden_beside_what_it_replaces_mend_it(change: Clone) -> None:
    _broken_chain(change)
    (found,) = json.loads(change.verify("--as-json").out)["findings"]
    script, review = found["fix"].partition(": ")[2].rsplit("; ", 1)
    identity = {f"GIT_{who}_{what}": "x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    subprocess.run(["bash", "-c", f"{script} -qm back"], cwd=change.root, check=True, env=os.environ | identity)
    assert review == "pytest-repro review golden/demo"
    change.accept("both of them, beside the first")
    assert change.commit("Reviewed").verify().rc == 0


@pytest.mark.parametrize("name", BAD)
def test_what_nobody_reviewed_fails_and_is_named(change: Clone, name: str) -> None:
    spoil, told = BAD[name]
    spoil(change)
    result = change.verify(GITHUB_BASE_REF="main")
    assert result.rc == 1, result.text
    (line,) = [line for line in result.out.splitlines() if line.startswith(f"FAIL  {GOLDEN}: ")]
    for words in told:
        assert words in line
    assert "changes since main (" in result.out


def test_a_reason_for_looser_thresholds_is_recorded(change: Clone) -> None:
    _loosened(change)
    digest = change.header()["digest"]
    sealed = change.cli("accept", "golden", "--thresholds", "--reason", "b is a coin toss", "--as-json")
    assert sealed.rc == 0, sealed.text
    (told,) = json.loads(sealed.out)
    assert told["review"]["thresholds"]["limits"]["max_divergent"] == 1
    assert told["review"]["thresholds"]["reason"] == "b is a coin toss" != told["review"]["reason"]
    assert told["digest"] == digest, "what was accepted stays as it was"
    assert change.commit("Say why").verify().rc == 0
    assert change.check().rc == 0


def test_a_broken_golden_that_was_committed_is_brought_back_whole(change: Clone) -> None:
    """By the very command that is printed; HEAD has the damage, and a shell would expand a pattern by what lies there."""
    _by_hand(change)
    (change.folder / "bf16.golden.safetensors").unlink()
    change.commit("Green again")
    result = change.verify("--base", "HEAD")
    assert result.rc == 1 and result.out.count("FAIL  golden/demo/bf16.golden.jsonl") == 1
    mend = next(line for line in result.out.splitlines() if "mend: " in line).split("mend: ")[1]
    typed = mend.replace("git commit", "git -c user.name=Dev -c user.email=dev@example.org commit -qm back")
    subprocess.run(["bash", "-ec", typed], cwd=change.root, check=True)
    assert change.verify("--base", "HEAD").rc == 0


LOOSE = "[tool.pytest-repro.thresholds]\nmax_divergent = 1.0\nmax_unexplained = 1.0\n"


def test_the_thresholds_that_a_check_reads_are_those_that_verify_holds(change: Clone) -> None:
    change.pyproject(LOOSE).write("golden/pyproject.toml", "[tool.other]\n").commit("Green again")
    assert change.check().rc == 0, "drift passes"
    result = change.verify()
    assert result.rc == 1 and "max_divergent 0 -> 1.0, max_unexplained 0 -> 1.0" in result.out
    assert change.cli("accept", "golden", "--thresholds", "--reason", "b is a coin toss").rc == 0
    assert change.header()["review"]["thresholds"]["limits"]["max_divergent"] == 1.0


def test_what_was_accepted_twice_before_a_commit_is_one_step(change: Clone) -> None:
    first = change.header()["digest"]
    change.update().accept("one").flip("c", DRIFT).update().accept("two, since one was wrong")
    assert change.header()["review"]["previous"] == first
    assert change.commit("Two").verify().rc == 0


def test_a_deleted_golden_and_a_committed_candidate_are_named(change: Clone) -> None:
    change.update().commit("Oops")
    change.git("rm", "-q", "golden/demo/bf16.golden.jsonl", "golden/demo/bf16.golden.safetensors")
    result = change.commit("Less to check").verify("--as-json", "--base", "origin/main")
    found = json.loads(result.out)
    assert result.rc == 1 and found["verdict"] == "fail"
    assert [(f["kind"], f["where"]) for f in found["findings"]] == [
        ("deleted", GOLDEN),
        ("pending", "golden/demo/bf16.pending.jsonl"),
        ("pending", "golden/demo/bf16.pending.safetensors"),
    ]


def test_a_shallow_clone_says_how_to_deepen_it(_remote: Path, tmp_path: Path) -> None:
    (tmp_path / "ci").mkdir()
    url = _remote.as_uri()
    subprocess.run(
        ["git", "clone", "-q", "--depth", "1", "--branch", "change", url, "ci/project"], cwd=tmp_path, check=True
    )
    result = Clone(tmp_path / "ci").verify(GITHUB_BASE_REF="main")
    assert result.rc == 2
    assert "git fetch --unshallow" in result.err
