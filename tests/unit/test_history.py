from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import git
import pytest

from pytest_repro.errors import ConfigError
from pytest_repro.history import DEFAULT_BASES, TARGET_VARIABLES, History
from pytest_repro.provenance import of_branch
from pytest_repro.store import PENDING, Committed, Place
from tests.unit.builders import REVIEW, generation, golden, output

PATH = "golden/s/bf16.golden.jsonl"


class Repository:
    """A repository of a test's own, with no settings but its own."""

    def __init__(self, root: Path) -> None:
        self.git = git.Repo.init(root, initial_branch="main").git
        self.root = root
        self.git.update_environment(
            GIT_AUTHOR_NAME="Dev", GIT_AUTHOR_EMAIL="d@example.org", GIT_COMMITTER_NAME="Dev",
            GIT_COMMITTER_EMAIL="d@example.org", GIT_CONFIG_GLOBAL="/dev/null", GIT_CONFIG_NOSYSTEM="1",
        )  # fmt: skip
        self.commit("nothing")

    @property
    def place(self) -> Place:
        return Place(self.root / "golden" / "s", "bf16")

    def accept(self, token: int, *, commit: bool = True) -> str:
        """A golden whose one answer is this token, accepted in the place of the one that is there."""
        standing = self.place.trusted()
        review = replace(REVIEW, previous=standing.digest if standing else None)
        self.place.write(golden(generation(output("a", [token], logprob=[-token / 8])), review=review))
        if commit:
            self.commit(f"golden {token}")
        return self.place.read().digest

    def commit(self, message: str) -> None:
        self.git.add("-A")
        self.git.commit("--allow-empty", "-qm", message)

    def steps(self, base: str) -> list[tuple[str, int]]:
        """(kind of change, parents) of every step, which must hold."""
        history = History.around(self.root)
        commit = history.base(base, {}).commit
        found = list(history.steps(commit))
        then, now = (
            history.versions(rev, {s.path for s in found} | history.differing(commit)) for rev in (commit, "HEAD")
        )
        assert list(of_branch(found, then, now, base, commit)) == []
        return [
            ("deleted" if s.after is None else "new" if not any(s.before) else "changed", len(s.before)) for s in found
        ]


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "project")


def test_every_change_since_the_base_is_a_step(repository: Repository) -> None:
    repository.git.checkout("-qb", "branch")
    assert repository.steps("main") == []
    repository.accept(1)
    repository.commit("nothing")
    repository.accept(2)
    repository.git.checkout("-q", "main")
    repository.commit("elsewhere")
    repository.git.checkout("-q", "branch")
    assert repository.steps("main") == [("new", 1), ("changed", 1)]


def test_what_a_merge_takes_from_a_parent_is_no_step(repository: Repository) -> None:
    repository.accept(1)
    repository.git.checkout("-qb", "branch")
    repository.commit("work")
    repository.git.checkout("-q", "main")
    repository.accept(2)
    repository.git.checkout("-q", "branch")
    repository.git.merge("-q", "--no-ff", "main", "-m", "merge")
    assert repository.steps("main") == []
    assert repository.steps("main~1") == [("changed", 1)], "main's own step"


def test_the_merge_commit_that_ci_checks_out(repository: Repository) -> None:
    repository.accept(1)
    repository.git.checkout("-qb", "branch")
    repository.accept(2)
    repository.git.checkout("-q", "main")
    repository.commit("elsewhere")
    repository.git.checkout("-q", "--detach", "main")
    repository.git.merge("-q", "--no-ff", "branch", "-m", "merge for CI")
    assert repository.steps("main") == [("changed", 1)]


def test_a_merge_that_writes_a_golden_of_its_own_is_a_step(repository: Repository) -> None:
    repository.accept(1)
    repository.git.checkout("-qb", "branch")
    repository.accept(2)
    repository.git.checkout("-q", "main")
    repository.git.merge("-q", "--no-ff", "--no-commit", "branch")
    repository.accept(3)
    assert repository.steps("HEAD~1") == [("changed", 1), ("changed", 2)]


def test_a_deletion_and_its_reason(repository: Repository) -> None:
    repository.accept(1)
    repository.git.rm("-qr", "golden")
    repository.git.commit("-qm", "Retire\n\nIt was old.\n\nGolden-Removed: nobody asks this any more")
    assert repository.steps("HEAD~1") == [("deleted", 1)]
    (step,) = History.around(repository.root).steps("HEAD~1")
    assert step.reason == "nobody asks this any more" and step.path == PATH


def test_a_merge_that_drops_a_golden_may_say_why(repository: Repository) -> None:
    repository.git.checkout("-qb", "branch")
    repository.commit("work")
    repository.git.checkout("-q", "main")
    repository.accept(1)
    repository.git.checkout("-q", "branch")
    repository.git.merge("-q", "-s", "ours", "main", "-m", "merge")
    assert list(History.around(repository.root).steps("main")) == []
    repository.git.commit("--amend", "-qm", "merge\n\nGolden-Removed: nobody asks this")
    assert repository.steps("main") == [("deleted", 2)]


def test_a_suite_that_moved_while_its_golden_changed(repository: Repository) -> None:
    (repository.root / "golden" / "s").mkdir(parents=True)
    (repository.root / "golden" / "s" / "suite.toml").write_text("x\n" * 50)
    repository.accept(1)
    repository.git.checkout("-qb", "branch")
    repository.git.mv("golden/s", "golden/t")
    repository.commit("move")
    repository.git.checkout("-q", "main")
    repository.accept(2)
    newer = {part: (repository.root / f"golden/s/bf16.golden.{part}").read_bytes() for part in ("jsonl", "safetensors")}
    repository.git.checkout("-q", "branch")
    repository.git.merge("-q", "--no-commit", "-s", "ours", "main")
    for part, data in newer.items():
        (repository.root / f"golden/t/bf16.golden.{part}").write_bytes(data)
    repository.commit("merge")
    assert repository.steps("main") == [("deleted", 1), ("new", 1), ("changed", 2)]


def test_what_head_has_and_the_base_had(repository: Repository) -> None:
    repository.accept(1)
    repository.git.checkout("-qb", "branch")
    history = History.around(repository.root)
    assert history.differing("main") == set()
    repository.accept(2)
    assert history.differing("main") == {PATH}
    assert history.versions("main", [PATH, "other"]) != history.versions("HEAD", [PATH])
    assert list(history.versions("main", [PATH, "other"])) == [PATH]
    assert list(history.files("HEAD", ".")) == [PATH, PATH.replace("jsonl", "safetensors")]


def test_what_head_has_is_what_a_review_replaces(repository: Repository) -> None:
    pending = Place(repository.place.folder, "bf16", PENDING)
    committed = History.around(repository.root).committed
    assert committed(pending) == Committed(None)
    first = repository.accept(1)
    repository.accept(2, commit=False)
    assert committed(pending) == Committed(first)
    repository.place.text.write_text("nonsense")
    repository.commit("broken")
    assert committed(pending) == Committed(None)


def test_what_is_not_committed(repository: Repository) -> None:
    repository.accept(1)
    history = History.around(repository.root)
    assert history.uncommitted("golden") == set()
    repository.accept(2, commit=False)
    assert history.uncommitted("golden") == {PATH, PATH.replace("jsonl", "safetensors")}
    repository.git.add("-A")
    assert PATH in history.uncommitted("golden"), "staged is not committed"
    repository.git.reset("-q", "--hard")
    odd = repository.place.folder / "été \u202e.golden.jsonl"
    odd.write_text("x")
    assert history.uncommitted("golden") == {f"golden/s/{odd.name}"}


# --- the base -------------------------------------------------------------------------------------------------------


def test_the_default_branch_is_found(repository: Repository) -> None:
    repository.git.checkout("-qb", "branch")
    assert History.around(repository.root).base(None, {}).name == "main"
    repository.git.branch("-m", "main", "trunk")
    with pytest.raises(ConfigError, match=r"none of origin/HEAD, .*main, master is here") as caught:
        History.around(repository.root).base(None, {})
    assert "--base REV" in caught.value.fix
    assert set(DEFAULT_BASES) >= {"origin/HEAD", "origin/main", "main"}


@pytest.mark.parametrize("variable", TARGET_VARIABLES)
def test_ci_names_the_target(repository: Repository, variable: str) -> None:
    repository.git.branch("release")
    repository.commit("more")
    history = History.around(repository.root)
    wanted = repository.git.rev_parse("release")
    for spelling in ("release", "refs/heads/release"):
        assert history.base(None, {variable: spelling}).commit == wanted
    assert history.base("HEAD", {variable: "release"}).commit == repository.git.rev_parse("HEAD"), "--base is stronger"
    assert history.base(None, {variable: ""}).name == "main"


@pytest.mark.parametrize("revision", ["nowhere", "-h", "--all", "", "main~99", "main:golden", "a b", "main..HEAD"])
def test_no_revision(repository: Repository, revision: str) -> None:
    with pytest.raises(ConfigError, match="there is no revision"):
        History.around(repository.root).base(revision, {})


def test_no_commit_in_common(repository: Repository) -> None:
    repository.git.checkout("-q", "--orphan", "other")
    repository.commit("unrelated")
    with pytest.raises(ConfigError, match="no commit in common"):
        History.around(repository.root).base("main", {})


def shallow(repository: Repository, depth: int) -> History:
    copy = repository.root.parent / f"shallow{depth}"
    url = repository.root.as_uri()
    subprocess.run(["git", "clone", "-q", f"--depth={depth}", "--no-single-branch", url, str(copy)], check=True)
    return History.around(copy)


def test_a_clone_too_shallow_says_how_to_deepen_it(repository: Repository) -> None:
    repository.git.checkout("-qb", "branch")
    for token in (1, 2, 3):
        repository.accept(token)
    for depth in (1, 2, 3):
        with pytest.raises(ConfigError, match="shallow") as caught:
            shallow(repository, depth).base("origin/main", {})
        assert "git fetch --unshallow" in caught.value.fix
    assert shallow(repository, 4).base("origin/main", {}).commit == repository.git.rev_parse("main")


def test_a_side_branch_cut_off_is_too_shallow(repository: Repository) -> None:
    """The merge base is there, and yet not every commit since: one of them would look like a first commit."""
    repository.git.checkout("-qb", "side")
    for token in (1, 2, 3):
        repository.accept(token)
    repository.git.checkout("-qb", "branch", "main")
    repository.git.merge("-q", "--no-ff", "side", "-m", "merge")
    with pytest.raises(ConfigError, match="does not hold every commit since") as caught:
        shallow(repository, 2).base("origin/main", {})
    assert "--unshallow" in caught.value.fix


# --- where there is no history --------------------------------------------------------------------------------------


def test_no_repository_and_an_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(ConfigError, match="not in a git repository"):
        History.around(tmp_path)
    git.Repo.init(tmp_path)
    with pytest.raises(ConfigError, match="nothing was committed here yet"):
        History.around(tmp_path)


def test_a_checkout_that_somebody_else_owns(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # git's own switch, since no test may change owners
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    settings = repository.root.parent / "gitconfig"
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(settings))
    (repository.root / "golden").mkdir()
    with pytest.raises(ConfigError, match="somebody else owns") as caught:
        History.around(repository.root / "golden")
    assert caught.value.fix == f"git config --global --add safe.directory {repository.root}"
    subprocess.run(caught.value.fix.split(), check=True)
    assert History.around(repository.root / "golden").within(repository.root) == "."


def test_a_path_outside(repository: Repository, tmp_path: Path) -> None:
    history = History.around(repository.root / "not" / "there" / "yet")
    with pytest.raises(ConfigError, match="outside of the repository"):
        history.within(tmp_path)
    assert history.within(repository.root) == "." and history.within(repository.place.text) == PATH
