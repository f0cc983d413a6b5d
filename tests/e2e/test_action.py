"""The GitHub action, step by step out of its own action.yml, as a runner would run it; and linters on everything in .github/."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from tests.hostile import TEXTS, commands

from .project import DRIFT, NEAR_TIE, Project
from .runner import ACTION, Job

ROOT = ACTION.parents[3]
VERDICTS = ("identical", "near_tie", "drift", "waived", "missing", "incomparable", "error")
PULL = {"pull_request": {"number": 5, "head": {"repo": {"full_name": "o/r"}}}}
FORK = {"pull_request": {"number": 5, "head": {"repo": {"full_name": "evil/r"}}}}


def job(project: Project, event: dict[str, Any] | None = None, **environment: str) -> Job:
    return Job(project.root.parent / "runner", project.root, event or {}, environment)


def annotations(done: Job) -> list[tuple[str, str, str]]:
    """What the runner would take for commands, outside of what was printed while commands were stopped."""
    shown = re.sub(r"::stop-commands::(\w+)\n.*?\n::\1::\n", "", done.log, flags=re.S)
    assert "::stop-commands::" not in shown
    return list(commands(shown))


def counts(done: Job) -> dict[str, int]:
    return {name: int(done.outputs[name]) for name in VERDICTS if done.outputs[name] not in ("", "0")}


def uploads(done: Job) -> dict[str, set[str]]:
    """Artifact -> the files it would hold."""
    found = {}
    for step in done.used:
        folder = Path(step["with"]["path"])
        found[step["with"]["name"]] = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    return found


# --- the outcomes ---------------------------------------------------------------------------------------------------


def test_a_pass(accepted: Project) -> None:
    done = job(accepted).run()
    assert done.failed == [], done.log
    assert done.outputs["verdict"] == "pass" and counts(done) == {"identical": 4} and done.outputs["exit-code"] == "0"
    assert done.outputs["failed-suites"] == "[]" and done.outputs["pending-path"] == ""
    assert annotations(done) == []
    assert done.summary.startswith("## pytest-repro: PASS\n\n0 of 1 suites fail: 4 identical\n")
    assert "https://github.com/o/r/actions/runs/7" in done.summary
    assert uploads(done) == {"repro-report": {"report.json", "report.html", "junit.xml", "comment.md"}}
    assert Path(done.outputs["html-path"]).read_text().startswith("<!")
    assert json.loads(Path(done.outputs["report-path"]).read_text())["verdict"] == "pass"


def test_drift_fails_says_where_and_keeps_everything(accepted: Project) -> None:
    accepted.flip("b", DRIFT)
    done = job(accepted).run()
    assert done.failed == ["Verdict"], done.log
    assert done.outputs["verdict"] == "fail" and counts(done) == {"identical": 3, "drift": 1}
    assert done.outputs["only-drift"] == "true" and json.loads(done.outputs["failed-suites"]) == ["golden/demo [bf16]"]
    rules, prompt = annotations(done)[:2], annotations(done)[2:]
    toml = (accepted.folder / "suite.toml").read_text().splitlines()
    assert toml[0] == "[suite]"
    assert all("file=golden/demo/suite.toml,line=1," in properties for _, properties, _ in rules)
    assert [p.split(",title=")[0] for _, p, _ in prompt] == ["file=golden/demo/prompts.jsonl,line=2"]
    assert "drift         b  diverges at token 1 of 4: deficit 0.8" in prompt[0][2]
    assert "FAIL" in done.summary.splitlines()[0] and "**drift** `b`" in done.summary
    assert "- golden  …" in done.summary and "+ now     …" in done.summary
    cases = ElementTree.parse(Path(done.outputs["report-path"]).with_name("junit.xml")).iter("testcase")
    assert [c.attrib["name"] for c in cases if c.find("failure") is not None] == ["b"]
    assert (
        Path(done.outputs["comment-path"]).read_text().startswith("<!-- pytest-repro: check -->\n## pytest-repro: FAIL")
    )


def test_thresholds_are_pointed_at(project: Project) -> None:
    project.suite(thresholds={"max_unexplained": 0, "bf16": {"max_divergent": 0}}).update().accept().flip("b", DRIFT)
    done = job(project).run()
    lines = (project.folder / "suite.toml").read_text().splitlines()
    where = {m: re.search(r"line=(\d+)", p)[1] for _, p, m in annotations(done) if "max_" in m and "suite.toml" in p}  # type: ignore[index]
    assert {lines[int(line) - 1].split(" ")[0] for line in where.values()} == {"max_unexplained", "max_divergent"}
    for message, line in where.items():
        assert lines[int(line) - 1].split(" ")[0] in message


@pytest.mark.parametrize("case", ["drift", "near tie"])
def test_drift_alone_may_be_let_through(accepted: Project, case: str) -> None:
    accepted.flip("b", DRIFT if case == "drift" else NEAR_TIE)
    done = job(accepted).run(fail_on_drift="false")
    assert done.failed == [] and done.outputs["verdict"] == "fail"
    assert "FAIL" in done.summary.splitlines()[0]


def test_another_test_that_failed_is_not_let_through_with_the_drift(accepted: Project) -> None:
    accepted.flip("b", DRIFT).write("test_own.py", "def test_own():\n    assert False\n")
    done = job(accepted).run(fail_on_drift="false", arguments="test_own.py")
    assert done.failed == ["Verdict"] and done.outputs["only-drift"] == "false"


def test_what_is_waived_passes_and_is_told(project: Project) -> None:
    project.suite(run={"numerics": ["fp32"]}).update().accept().flip("a", NEAR_TIE)
    done = job(project).run()
    assert done.failed == [], done.log
    assert done.outputs["verdict"] == "pass" and counts(done) == {"identical": 3, "waived": 1}
    assert annotations(done) == [] and "| waived | `a` |" in done.summary


def test_a_missing_golden_fails_and_leaves_a_candidate(project: Project) -> None:
    project.suite()
    done = job(project).run(fail_on_drift="false")
    assert done.failed == ["Verdict"], "drift may be forgiven, a gate without a golden not"
    assert (
        done.outputs["verdict"] == "fail" and counts(done) == {"missing": 4} and done.outputs["only-drift"] == "false"
    )
    assert uploads(done)["repro-pending"] == {
        "golden/demo/bf16.pending.jsonl",
        "golden/demo/bf16.pending.safetensors",
    }
    (found,) = [message for _, _, message in annotations(done) if message.startswith("all 4 prompts")]
    assert "golden" in found
    assert list(project.golden_files()) == ["demo/prompts.jsonl", "demo/script.jsonl", "demo/suite.toml"]


def test_an_engine_that_crashes_is_an_error_of_the_prompts(accepted: Project) -> None:
    for name in accepted.rows:
        accepted.script(**{name: {"error": "CUDA out of memory"}})
    done = job(accepted).run(fail_on_drift="false")
    assert done.failed == ["Verdict"] and counts(done) == {"error": 4} and done.outputs["only-drift"] == "false"
    assert "CUDA out of memory" in done.summary
    assert any("CUDA out of memory" in message for _, _, message in annotations(done))


KILLED = "import os, signal\ndef pytest_runtest_teardown(item):\n    os.kill(os.getpid(), signal.SIGKILL)\n"


def test_a_run_that_was_killed_leaves_an_honest_error(accepted: Project) -> None:
    accepted.write("conftest.py", KILLED)
    done = job(accepted).run(fail_on_drift="false")
    assert done.failed == ["Verdict"], done.log
    assert done.outputs["verdict"] == "error" and done.outputs["exit-code"] == "137" and counts(done) == {}
    assert done.summary.startswith("## pytest-repro: ERROR") and "there is no such report" in done.summary
    assert "137" in done.summary
    assert [name for name, _, _ in annotations(done)] == ["error"] * 2
    assert uploads(done) == {"repro-report": {"comment.md"}}
    assert "ERROR" in Path(done.outputs["comment-path"]).read_text()


def test_a_report_of_a_run_that_broke_off_is_no_pass(accepted: Project) -> None:
    accepted.write(
        "conftest.py",
        "import pytest\n@pytest.hookimpl(trylast=True)\ndef pytest_unconfigure():\n    import os\n    os._exit(3)\n",
    )
    done = job(accepted).run()
    assert done.outputs["verdict"] == "error" and done.outputs["exit-code"] == "3" and done.failed == ["Verdict"]
    assert "exit code 3" in done.summary


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"golden": "nowhere"}, "nowhere"),
        ({"numerics": "fp13"}, "fp13"),
        ({"arguments": "--no-such-option"}, "--no-such-option"),
    ],
)
def test_a_wrong_input_is_an_error_and_not_a_pass(accepted: Project, inputs: dict[str, str], said: str) -> None:
    done = job(accepted).run(**inputs)
    assert done.failed == ["Verdict"] and done.outputs["verdict"] == "error" and done.outputs["exit-code"] == "4"
    assert said in done.log and done.summary.startswith("## pytest-repro: ERROR")


def test_python_that_is_not_there_fails(accepted: Project) -> None:
    done = job(accepted).run(python="no-such-python")
    assert done.failed[0] == "Check" and done.failed[-1] == "Verdict"


# --- inputs ---------------------------------------------------------------------------------------------------------


def test_inputs_reach_pytest_as_they_are(accepted: Project) -> None:
    accepted.suite(at="golden/other").update(where="golden/other").accept(where="golden/other")
    done = job(accepted).run(
        golden="golden/demo\ngolden/other", method="replay", batch_size="1", thresholds="max_divergent=4\nmax_unexplained=4\n",
        arguments="--repro-golden\nbf16\n-k\ndemo or other\n", html="false", artifact="mine", pending_artifact="", numerics="bf16", arbiter="off",
    )  # fmt: skip
    assert done.failed == [], done.log
    suites = json.loads(Path(done.outputs["report-path"]).read_text())["suites"]
    assert [s["path"] for s in suites] == ["golden/demo", "golden/other"]
    assert {s["settings"]["golden"] for s in suites} == {"bf16"}
    assert {s["settings"]["method"] for s in suites} == {"replay"} and {
        s["settings"]["batch_size"] for s in suites
    } == {1}
    assert suites[0]["thresholds"]["max_divergent"] == 4
    assert uploads(done) == {"mine": {"report.json", "junit.xml", "comment.md"}}


def test_a_working_directory_and_its_lines(accepted: Project) -> None:
    accepted.flip("b", DRIFT)
    done = Job(accepted.root.parent / "runner", accepted.root.parent).run(working_directory="project")
    assert any("file=project/golden/demo/prompts.jsonl,line=2" in properties for _, properties, _ in annotations(done))


INJECTED = [
    "$(touch {0})",
    "`touch {0}`",
    "'; touch {0}; '",
    '"; touch {0}; "',
    "${{{{ github.token }}}}",
    "&& touch {0}",
    "| tee {0}",
]


def test_no_input_is_evaluated(accepted: Project, tmp_path: Path) -> None:
    marker = tmp_path / "evil"
    evil = "\n".join(piece.format(marker) for piece in INJECTED)
    names = (
        "golden",
        "model",
        "numerics",
        "engine",
        "arguments",
        "thresholds",
        "comment_key",
        "artifact",
        "engine_options",
        "allow_changed",
    )
    done = job(accepted).run(**dict.fromkeys(names, evil))
    assert done.outputs["verdict"] == "error"
    assert not marker.exists()
    assert "t0ken" not in done.log + done.summary


def test_what_a_check_prints_is_no_command(accepted: Project) -> None:
    said = "\n".join(
        text
        for name, text in TEXTS.items()
        if name in ("set-env", "stop-commands", "resume-commands", "error-command", "add-mask", "bracket-command")
    )
    accepted.write(
        "conftest.py", f"import sys\nsys.__stdout__.write({said!r})\ndef pytest_unconfigure():\n    print({said!r})\n"
    )
    done = job(accepted).run()
    assert "::set-env name=PATH" in done.log
    assert done.failed == [] and annotations(done) == []


def test_a_check_cannot_speak_to_the_runner(accepted: Project) -> None:
    names = ("GITHUB_OUTPUT", "GITHUB_ENV", "GITHUB_PATH", "GITHUB_STEP_SUMMARY", "GITHUB_STATE", "REPRO_TOKEN")
    accepted.write(
        "conftest.py", f"import os\ndef test():\n    pass\nassert not [n for n in {names!r} if n in os.environ]\n"
    )
    assert job(accepted).run().failed == []


# --- the comment ----------------------------------------------------------------------------------------------------


class Api(ThreadingHTTPServer):
    """Comments of one pull request, as GitHub's API has them."""

    def __init__(self) -> None:
        self.comments: list[dict[str, Any]] = []
        self.asked: list[tuple[str, str, str | None]] = []
        self.status = 200
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Api

    def _answer(self) -> None:
        self.server.asked.append((self.command, self.path, self.headers["Authorization"]))
        length = int(self.headers["Content-Length"] or 0)
        data = json.loads(self.rfile.read(length)) if length else {}
        page = re.search(r"[?&]page=(\d+)", self.path)
        answer: Any = {}
        if self.command == "GET" and page:
            answer = self.server.comments[100 * (int(page[1]) - 1) :][:100]
        elif self.command == "POST":
            answer = {"id": 1000 + len(self.server.comments), "user": {"type": "Bot"}, **data}
            self.server.comments.append(answer)
        elif self.command == "PATCH":
            (found,) = [c for c in self.server.comments if c["id"] == int(self.path.rsplit("/", 1)[1])]
            found.update(data)
        body = json.dumps(answer).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PATCH = _answer

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""


@pytest.fixture
def api() -> Iterator[Api]:
    with Api() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_one_comment_is_kept_up_to_date(accepted: Project, api: Api) -> None:
    marker = "<!-- pytest-repro: check -->"
    people = {"id": 1, "user": {"type": "User"}, "body": f"{marker}\nwritten by hand"}
    other = {"id": 2, "user": {"type": "Bot"}, "body": "<!-- pytest-repro: gpu -->\nof another job"}
    api.comments = [people, other, *({"id": 10 + i, "user": {"type": "User"}, "body": "x"} for i in range(150))]
    accepted.flip("b", DRIFT)
    for _ in range(2):
        done = job(accepted, PULL, GITHUB_API_URL=api.address).run(comment="true")
        assert done.failed == ["Verdict"], done.log
    assert api.comments[:2] == [people, other]
    (ours,) = [c for c in api.comments if c["user"]["type"] == "Bot" and c["body"].startswith(marker)]
    assert "pytest-repro: FAIL" in ours["body"]
    accepted.script(b=Project.suite(accepted).rows["b"])
    job(accepted, PULL, GITHUB_API_URL=api.address).run(comment="true")
    assert "pytest-repro: PASS" in ours["body"] and len(api.comments) == 153
    assert [method for method, _, _ in api.asked if method != "GET"] == ["POST", "PATCH", "PATCH"]
    assert {token for _, _, token in api.asked} == {"Bearer t0ken"}


@pytest.mark.parametrize(
    "event", [FORK, {}, {"pull_request": {"number": 5, "head": {"repo": None}}}], ids=["fork", "push", "deleted"]
)
def test_no_comment_from_a_fork_or_outside_a_pull_request(accepted: Project, api: Api, event: dict[str, Any]) -> None:
    done = job(accepted, event, GITHUB_API_URL=api.address).run(comment="true")
    assert done.failed == [] and api.asked == []


def test_no_comment_unless_asked(accepted: Project, api: Api) -> None:
    assert job(accepted, PULL, GITHUB_API_URL=api.address).run().failed == []
    assert api.asked == []


def test_a_comment_that_is_refused_is_a_warning_and_not_the_verdict(accepted: Project, api: Api) -> None:
    api.status = 403
    done = job(accepted, PULL, GITHUB_API_URL=api.address).run(comment="true")
    assert done.failed == [] and done.outputs["verdict"] == "pass"
    (warning,) = annotations(done)
    assert warning[0] == "warning" and "pull-requests: write" in warning[2]


# --- the files ------------------------------------------------------------------------------------------------------


def lint(name: str, *arguments: str, cwd: Path = ROOT) -> None:
    tool = Path(sys.executable).parent / name
    done = subprocess.run([tool, *arguments], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


FILES = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / ".github").rglob("*.yml"))
WORKFLOWS = [name for name in FILES if "/workflows/" in name]


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """docs/ci.md's workflow as a user would commit it, in a repository of its own."""
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "ci.md").read_text("utf-8"), re.S)
    assert block.count("OWNER/pytest-repro/.github/actions/repro-check@COMMIT") == 1
    folder = tmp_path / ".github" / "workflows"
    folder.mkdir(parents=True)
    (tmp_path / ".github" / "actionlint.yaml").write_text("self-hosted-runner:\n  labels: [gpu]\n")
    (folder / "repro.yml").write_text(block.replace("COMMIT", "0" * 40))
    return tmp_path


def test_actionlint_is_clean() -> None:
    lint("actionlint", *WORKFLOWS)


def test_zizmor_is_clean() -> None:
    lint("zizmor", "--offline", "--no-progress", *FILES)


@pytest.mark.parametrize("name", FILES)
def test_the_schemas_are_kept(name: str) -> None:
    kind = "workflows" if name in WORKFLOWS else "actions"
    lint("check-jsonschema", "--builtin-schema", f"vendor.github-{kind}", name)


def test_the_workflow_in_the_docs_is_clean(copied: Path) -> None:
    workflow = ".github/workflows/repro.yml"
    (copied / ".git").mkdir()
    lint("actionlint", "-config-file", ".github/actionlint.yaml", workflow, cwd=copied)
    lint("zizmor", "--offline", "--no-progress", workflow, cwd=copied)
    lint("check-jsonschema", "--builtin-schema", "vendor.github-workflows", workflow, cwd=copied)


@pytest.mark.parametrize("name", FILES)
def test_every_action_is_pinned_by_commit(name: str) -> None:
    for used in re.findall(r"uses: *(\S+)", (ROOT / name).read_text("utf-8")):
        assert used.startswith("$/") or re.search(r"@[0-9a-f]{40}$", used), used


def test_jobs_on_machines_of_ones_own_refuse_forks_and_wait_for_a_person() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/repro.yml").read_text("utf-8"))
    own = {name: spec for name, spec in workflow["jobs"].items() if "self-hosted" in str(spec["runs-on"])}
    assert own.keys() == {"gpu"}
    assert own["gpu"]["environment"] == "gpu" and own["gpu"]["permissions"] == {"contents": "read"}
    assert "github.event.pull_request.head.repo.full_name == github.repository" in own["gpu"]["if"]


# --- the real model -------------------------------------------------------------------------------------------------


@pytest.mark.real_model
def test_the_shipped_suite_in_fp32(tmp_path: Path) -> None:
    done = Job(tmp_path, ROOT, environment={"HOME": str(Path.home())}).run(
        golden="golden/word-problems", numerics="fp32", method="replay"
    )
    assert done.failed == [], done.log
    assert done.outputs["verdict"] == "pass" and sum(counts(done).values()) == 32
    assert counts(done).keys() <= {"identical", "waived"}
    assert "`golden/word-problems [fp32]`" in done.summary and Path(done.outputs["html-path"]).stat().st_size > 10_000
