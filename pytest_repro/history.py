"""Goldens in git: what HEAD has, where a branch left its base, and which commits changed a golden since.

Needs a git program, as GitPython does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from shlex import quote
from typing import Any

from .errors import ConfigError, GoldenError
from .golden import sealed
from .provenance import Step, Version
from .store import GOLDEN, PENDING, Committed, Place
from .suite import SUITE_FILE

TARGET_VARIABLES = (
    "GITHUB_BASE_REF", "CI_MERGE_REQUEST_TARGET_BRANCH_NAME", "SYSTEM_PULLREQUEST_TARGETBRANCH", "CHANGE_TARGET",
    "BITBUCKET_PR_DESTINATION_BRANCH", "BUILDKITE_PULL_REQUEST_BASE_BRANCH",
)  # fmt: skip
"""Where CI systems say which branch a pull request goes to."""
DEFAULT_BASES = ("origin/HEAD", "origin/main", "origin/master", "main", "master")
_PATHSPECS = tuple(f"*{GOLDEN}.{part}" for part in ("jsonl", "safetensors"))
_NOTHING = (None, None)
_UNSHALLOW = "git fetch --unshallow   (actions/checkout: fetch-depth: 0)"


@dataclass(frozen=True)
class Base:
    """Where a branch left another one."""

    name: str
    """As it was named."""
    commit: str


class History:
    """The repository around a folder."""

    def __init__(self, repository: Any) -> None:
        self._repository = repository
        self.root = Path(repository.working_tree_dir).resolve()

    @classmethod
    def around(cls, folder: Path) -> History:
        """The repository that a folder lies in.

        Raises:
            ConfigError: it lies in none, there is no git program, or nothing was committed yet.
        """
        try:
            import git
        except ImportError:  # GitPython refuses to load without a git program
            raise ConfigError("there is no git program", fix="install git, which GitPython uses") from None
        start = next((f for f in (folder.resolve(), *folder.resolve().parents) if f.is_dir()), folder)
        try:
            repository = git.Repo(start, search_parent_directories=True)
            repository.head.commit.hexsha  # noqa: B018  (raises where there is no commit)
        except (git.InvalidGitRepositoryError, git.NoSuchPathError):
            raise ConfigError(
                "this is not in a git repository", where=folder, fix="git init && git add -A && git commit"
            ) from None
        except (ValueError, BrokenPipeError):  # a git that refuses may be gone before it was asked
            raise _no_commit(repository, folder) from None
        if repository.bare or repository.working_tree_dir is None:
            raise ConfigError("a bare repository has no files to look at", where=folder, fix="clone it")
        return cls(repository)

    def within(self, path: Path) -> str:
        """A path as git calls it.

        Raises:
            ConfigError: it lies outside of the repository.
        """
        try:
            return path.resolve().relative_to(self.root).as_posix()
        except ValueError:
            raise ConfigError("this lies outside of the repository", where=path, fix=f"a path in {self.root}") from None

    # --- where a branch left its base -------------------------------------------------------------------------------

    def base(self, named: str | None, environment: Mapping[str, str]) -> Base:
        """The merge base of HEAD and the branch that it goes to.

        Args:
            named: a revision; None: the pull request's target that CI names, or the default branch.
            environment: where CI says it.

        Raises:
            ConfigError: no such revision, or the history that is here does not reach back to it.
        """
        revision, commit = self._revision(named, environment)
        try:
            found = self._git.merge_base("HEAD", commit).splitlines()
        except self._error:
            found = []
        if not found:
            why = "this clone is shallow" if self._shallow else "they have no commit in common"
            fix = _UNSHALLOW if self._shallow else "--base REV"
            raise ConfigError(f"no merge base of HEAD and {revision}: {why}", where="--base", fix=fix)
        base = Base(revision, found[0])
        if self._shallow & {found[0], *self._git.rev_list(f"{found[0]}..HEAD").split()} - {found[0]}:
            raise ConfigError(
                f"this clone is shallow: it does not hold every commit since {revision}", where="--base", fix=_UNSHALLOW
            )
        return base

    def _revision(self, named: str | None, environment: Mapping[str, str]) -> tuple[str, str]:
        if named is not None:
            return named, self._resolved([named], "--base")
        variable = next((name for name in TARGET_VARIABLES if environment.get(name)), None)
        if variable is None:
            found = next((rev for rev in DEFAULT_BASES if self._commit(rev)), None)
            if found is None:
                raise ConfigError(
                    f"none of {', '.join(DEFAULT_BASES)} is here to compare with",
                    where="--base",
                    fix=_UNSHALLOW if self._shallow else "--base REV",
                )
            return found, self._resolved([found], "--base")
        branch = environment[variable].removeprefix("refs/heads/")
        return branch, self._resolved([f"origin/{branch}", branch], f"${variable}")

    def _resolved(self, spellings: Iterable[str], where: str) -> str:
        named = list(spellings)
        for revision in named:
            if commit := self._commit(revision):
                return commit
        fix = _UNSHALLOW if self._shallow else "git fetch origin, or --base with a branch, tag or commit that is here"
        raise ConfigError(f"there is no revision {named[0]!r}", where=where, fix=fix)

    def _commit(self, revision: str) -> str | None:
        if not revision or revision.startswith("-"):  # no revision, and never an option of git's
            return None
        try:
            return str(self._git.rev_parse("--verify", "--quiet", f"{revision}^{{commit}}"))
        except self._error:
            return None

    @cached_property
    def _shallow(self) -> frozenset[str]:
        """Commits whose parents are not here."""
        file = Path(self._repository.common_dir) / "shallow"
        return frozenset(file.read_text().split()) if file.is_file() else frozenset()

    # --- what lies where --------------------------------------------------------------------------------------------

    def files(self, commit: str, under: str) -> dict[str, str]:
        """Path -> blob of every golden's and pending golden's file below a folder."""
        listed = self._git.ls_tree("-r", "-z", "--full-tree", commit, "--", *([under] if under != "." else []))
        rows = (row.partition("\t") for row in str(listed).split("\0") if row)
        return {
            path: meta.split()[2] for meta, _, path in rows if _is_golden(path, GOLDEN) or _is_golden(path, PENDING)
        }

    def text(self, commit: str, path: str) -> str | None:
        """A text file of a commit; None where it has none."""
        listed = str(self._git.ls_tree("-z", "--full-tree", commit, "--", path)).rstrip("\0")
        return self._blob(listed.split()[2]).decode("utf-8", "replace") if listed else None

    def uncommitted(self, under: str) -> set[str]:
        """Paths below a folder that HEAD does not have as they are; what git ignores is among them."""
        listed = str(
            self._git.status("--porcelain", "-z", "--ignored", "--untracked-files=all", "--no-renames", "--", under)
        )
        return {row[3:] for row in listed.split("\0") if len(row) > 3}

    def committed(self, place: Place) -> Committed:
        """The golden that HEAD has where this one lies or would lie."""
        path = self.within(place.folder / f"{place.stem}{GOLDEN}.jsonl")
        blob = self.files("HEAD", path).get(path)
        try:
            found = sealed(self._blob(blob), path) if blob else None
        except GoldenError:
            found = None
        if found is None:
            return Committed(None)
        return Committed(found.digest, found.review.previous if found.review else None)

    # --- what happened ----------------------------------------------------------------------------------------------

    def steps(self, base: str) -> Iterator[Step]:
        """Every change of a golden since the base, oldest first.

        What a merge took from one of its parents is no change, but for what it deleted with a reason.
        """
        since = f"{base}..HEAD"
        touched = set(str(self._git.rev_list("--full-history", since, "--", *_PATHSPECS)).split())
        for row in str(self._git.rev_list("--topo-order", "--reverse", "--parents", since)).splitlines():
            commit, *parents = row.split()
            if commit in touched or len(parents) > 1:
                yield from self._steps_of(commit, parents)

    def _steps_of(self, commit: str, parents: Sequence[str]) -> Iterator[Step]:
        after, before = self.files(commit, "."), [self.files(parent, ".") for parent in parents]
        removed = self._trailer(commit)
        for path in sorted({path for tree in (after, *before) for path in goldens(tree)}):
            now, then = _pair(after, path), [_pair(tree, path) for tree in before]
            reason = removed if now == _NOTHING else ""
            if any(now != pair for pair in then or [_NOTHING]) if reason else now not in (then or [_NOTHING]):
                earlier = tuple(self._version(pair) for pair in then)
                asked = self.text(commit, str(PurePosixPath(path).with_name(SUITE_FILE))) is not None
                yield Step(commit[:12], path, earlier, self._version(now), reason, asked)

    def versions(self, commit: str, paths: Iterable[str]) -> dict[str, Version]:
        """Path -> golden of a commit; paths where it has none are left out."""
        tree = self.files(commit, ".")
        found = {path: self._version(_pair(tree, path)) for path in sorted(paths)}
        return {path: version for path, version in found.items() if version is not None}

    def last(self, path: str, sound: Callable[[Version], bool]) -> str:
        """The newest commit, abbreviated, in which a golden is sound; "" where none of the last fifty that changed it is."""
        both = (path, str(PurePosixPath(path).with_suffix(".safetensors")))
        for commit in str(self._git.rev_list("-n", "50", "HEAD", "--", *both)).split():
            version = self.versions(commit, [path]).get(path)
            if version is not None and sound(version):
                return commit[:12]
        return ""

    def differing(self, base: str) -> set[str]:
        """Paths of the base's goldens that HEAD does not have as they were."""
        then, now = self.files(base, "."), self.files("HEAD", ".")
        return {path for path in goldens(then) if _pair(then, path) != _pair(now, path)}

    def _version(self, blobs: tuple[str | None, str | None]) -> Version | None:
        if blobs == _NOTHING:
            return None
        text, numbers = (self._blob(blob) if blob else None for blob in blobs)
        return Version(text, numbers)

    def _trailer(self, commit: str) -> str:
        return str(self._git.show("-s", "--format=%(trailers:key=Golden-Removed,valueonly)", commit)).strip()

    def _blob(self, sha: str) -> bytes:
        data: bytes = self._repository.odb.stream(bytes.fromhex(sha)).read()
        return data

    @property
    def _git(self) -> Any:
        return self._repository.git

    @property
    def _error(self) -> type[Exception]:
        import git

        return git.GitCommandError


def _is_golden(path: str, kind: str) -> bool:
    return path.endswith((f"{kind}.jsonl", f"{kind}.safetensors"))


def _no_commit(repository: Any, folder: Path) -> ConfigError:
    """GitPython says the same of a repository without a commit and of one that git refuses to read."""
    _, _, told = repository.git.rev_parse("HEAD", with_extended_output=True, with_exceptions=False)
    if "dubious ownership" not in str(told):
        return ConfigError("nothing was committed here yet", where=folder, fix="git add -A && git commit")
    trusted = quote(str(Path(repository.working_tree_dir or folder).resolve()))
    return ConfigError(
        "git reads no repository that somebody else owns",
        where=folder,
        fix=f"git config --global --add safe.directory {trusted}",
    )


def goldens(files: Iterable[str]) -> set[str]:
    """Paths of the text parts of those files that belong to a golden, and not to a pending one."""
    return {_text_of(path) for path in files if _is_golden(path, GOLDEN)}


def _text_of(path: str) -> str:
    return str(PurePosixPath(path).with_suffix(".jsonl"))


def _pair(tree: Mapping[str, str], text: str) -> tuple[str | None, str | None]:
    return tree.get(text), tree.get(text.removesuffix(".jsonl") + ".safetensors")
