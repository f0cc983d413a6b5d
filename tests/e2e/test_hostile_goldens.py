"""Hostile texts in goldens, names of folders and reviewers, as the command line shows them."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys

from tests.hostile import ACTIVE, TEXTS, commands

from .project import _NOT_INHERITED, Project, Result

FOLDER = "golden/\x1b[31mevil\u202e"
REVIEWER = "Eve \x1b[2J\u202e::error::x ##[error]y"
CHANGED = " and now"


def inert(result: Result) -> Result:
    assert not ACTIVE.search(result.text), ascii(ACTIVE.findall(result.text))
    assert list(commands(result.text)) == []
    return result


def said() -> dict[str, str]:
    return {name: text[:3000] for name, text in TEXTS.items()}


def evil(project: Project) -> Project:
    """A suite in an oddly named folder, whose golden says every hostile text, accepted by somebody of an odd name."""
    texts = said()
    project.suite({name: [1, 2] for name in texts}, at="golden/evil", texts=texts)
    config = project.home / "gitconfig"
    config.write_text(f'[user]\n\tname = "{REVIEWER}"\n\temail = e@example.org\n')
    return project.update().accept()


def test_the_command_line_shows_goldens_inert(project: Project) -> None:
    evil(project)
    shown = inert(project.cli("show", "golden"))
    assert shown.rc == 0 and "\\x1b[31mred\\x1b[0m" in shown.out and "Eve \\x1b[2J" in shown.out

    for name, text in said().items():
        project.script(**{name: {"text": text + CHANGED, "tokens": [1, 3]}})
    checked = inert(project.check("-vv"))
    assert checked.rc == 1
    project.update()
    (project.root / "golden" / "evil").rename(project.root / FOLDER)  # pytest itself shows names of files as they are
    for command in (("diff", FOLDER), ("pending", "golden"), ("review", FOLDER), ("show", f"{FOLDER}/no\x1b[1m")):
        result = inert(project.cli(*command))
        assert result.rc in (1, 2), command
        assert "evil" in result.text
    for command in ("diff", "pending"):
        found = project.cli(command, FOLDER, "--as-json")
        assert found.rc == 1 and found.out.isascii() and json.loads(found.out)


def test_a_review_at_a_terminal_is_inert(project: Project) -> None:
    evil(project)
    project.script(colour={"tokens": [1, 3]}, title={"tokens": [1, 3]}).update()
    (project.root / "golden" / "evil").rename(project.root / FOLDER)
    ours, theirs = pty.openpty()
    kept = {k: v for k, v in os.environ.items() if k not in _NOT_INHERITED}
    with subprocess.Popen(
        [sys.executable, "-m", "pytest_repro.cli", "review", FOLDER],
        cwd=project.root, env={**kept, "NO_COLOR": "1", "TERM": "dumb"}, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        os.write(ours, b"s\n")
        shown, _ = process.communicate(timeout=120)
    os.close(ours)
    os.close(theirs)
    result = inert(Result(process.returncode, shown.decode("utf-8"), ""))
    assert "\\x1b[31mred" in result.out and "skipped" in result.out
