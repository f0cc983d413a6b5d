"""A project whose model is behind a server, from outside: recorded, checked, broken off in mid-run and resumed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ..engines.fake_server import Fake, Refusal, State
from .project import Project, Result

CHECKOUT = str(Path(__file__).parents[2])
SECRET = "sk-never-to-be-seen-0123456789"
NAMES = ("a", "b", "c", "d")


class Served:
    """A project, and the server that answers it, which can be started anew on its port."""

    def __init__(self, root: Path) -> None:
        self.project = Project(root)
        self.fake = Fake(State())
        self.fake.__enter__()

    def suite(self, **engine: Any) -> Served:
        options = {"base_url": self.fake.url, "concurrency": 1, "retries": 1, "backoff": 0.001, **engine}
        self.project.suite(
            {name: [1] for name in NAMES}, suite={"engine": "openai"}, engine=options, run={"numerics": ["fp32"]}
        )
        return self

    def run(self, *args: str, **env: str) -> Result:
        return self.project.pytest(*args, **self.environment, **env)

    def check(self, *args: str, **env: str) -> Result:
        return self.run("--repro-check", "golden", "-v", "--repro-report-json", "report.json", *args, **env)

    @property
    def environment(self) -> dict[str, str]:
        """The tests' own checkout, a cache of its own, and nobody's server or key."""
        cache = str(self.project.home / "cache")
        return {"PYTHONPATH": CHECKOUT, "PYTEST_REPRO_CACHE": cache, "OPENAI_BASE_URL": "", "NO_PROXY": "*"}

    def recorded(self, *args: str) -> Served:
        result = self.run("--repro-update", "golden", *args)
        assert result.rc == 0, result.text
        accepted = self.project.cli("accept", "golden", "--all", "--reason", "seen", PYTHONPATH=CHECKOUT)
        assert accepted.rc == 0, accepted.text
        return self

    def restart(self, **state: Any) -> State:
        self.fake.kill()
        self.fake = Fake(State(**state), self.fake.port)
        self.fake.__enter__()
        return self.fake.state

    def verdicts(self) -> dict[str, str]:
        (suite,) = self.project.json()["suites"]
        return {p["id"]: p["verdict"] for p in suite["prompts"]}

    def notes(self) -> str:
        (suite,) = self.project.json()["suites"]
        return "\n".join(suite["notes"])

    def left(self) -> list[Path]:
        return list((self.project.home / "cache").rglob("*.jsonl"))

    def dies_at(self, name: str) -> None:
        state = self.fake.state

        def spoil(path: str, text: str, answer: Any) -> Any:
            if path == "/v1/completions" and f"question {name}" in text:
                state.dead = True
            return answer

        state.spoil = spoil


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    one = Served(tmp_path)
    yield one
    one.fake.kill()


def test_a_golden_is_recorded_through_a_server_and_checked(served: Served) -> None:
    served.suite().recorded()
    assert served.project.header("fp32.golden")["noise"]["max_deficit"] == 0.0
    result = served.check()
    assert result.rc == 0, result.text
    assert served.verdicts() == dict.fromkeys(NAMES, "identical")
    assert "not checked, since the engine cannot see it: model.weights" in served.notes()
    assert served.left() == []


@pytest.mark.parametrize(
    ("state", "method"),
    [
        ({"speaks": "sglang", "owned_by": "sglang", "version": "0.5.23"}, "replay"),
        ({"speaks": "llama.cpp", "owned_by": "llamacpp", "version": "b9999-0123abcd"}, "decode"),
    ],
    ids=["sglang", "llama.cpp"],
)
def test_a_golden_of_one_server_checks_another_one(served: Served, state: dict[str, Any], method: str) -> None:
    served.suite().recorded()
    served.restart(**state)
    result = served.check()
    assert result.rc == 0, result.text
    (suite,) = served.project.json()["suites"]
    assert {(p["verdict"], p["method"]) for p in suite["prompts"]} >= {("identical", method)}
    assert served.verdicts() == dict.fromkeys(NAMES, "identical")
    (change,) = (c for c in suite["environment_diff"] if c["field"] == "engine_version")
    assert change["now"] == f"{state['speaks']} {state['version']}", "the server is a suspect"
    served.restart(**state, salt="other weights")
    assert served.check().rc == 1
    assert set(served.verdicts().values()) == {"drift"}


def test_a_dialect_that_is_none_is_a_mistake_in_the_suite(served: Served) -> None:
    served.suite().recorded()
    served.fake.state.seen.clear()
    result = served.suite(dialect="ollama").check()
    assert result.rc != 0
    assert "'ollama' is none of auto, vllm, sglang, llama.cpp, text" in result.text
    assert served.fake.state.seen == []


def test_another_model_behind_the_server_is_drift(served: Served) -> None:
    served.suite().recorded()
    served.restart(salt="other weights")
    assert served.check().rc == 1
    assert served.verdicts() == dict.fromkeys(NAMES, "drift")


@pytest.mark.parametrize("method", ["replay", "decode"])
def test_a_server_that_dies_in_mid_run_is_an_error_of_the_prompts_concerned_and_the_run_resumes(
    served: Served, method: str
) -> None:
    served.suite().recorded()
    before = served.project.golden_files()
    served.dies_at("c")
    result = served.check("--repro-method", method)
    assert result.rc == 1, result.text
    assert served.verdicts() == {"a": "identical", "b": "identical", "c": "error", "d": "error"}
    assert "the connection broke" in result.text or "cannot be reached" in result.text
    assert served.project.golden_files() == before
    assert len(served.left()) == 1

    state = served.restart()
    result = served.check("--repro-method", method)
    assert result.rc == 0, result.text
    assert "2 answers of an interrupted run are taken over" in result.text
    assert served.verdicts() == dict.fromkeys(NAMES, "identical")
    asked = {name: sum(n for t, n in state.asked().items() if f"question {name}" in t) for name in NAMES}
    assert asked == {"a": 1, "b": 0, "c": 1, "d": 1}, "the first of what was left is asked again, as a sample"
    assert served.left() == []
    assert served.project.golden_files() == before


def test_a_recording_that_breaks_off_leaves_no_candidate(served: Served) -> None:
    served.suite()
    before = served.project.golden_files()
    served.dies_at("c")
    result = served.run("--repro-update", "golden")
    assert result.rc != 0
    assert "nothing was recorded" in result.text
    assert served.project.golden_files() == before


def test_a_server_in_bf16_is_no_fp32_whatever_is_claimed(served: Served) -> None:
    served.suite().recorded()
    served.restart(dtype="bf16")
    result = served.check()
    assert result.rc == 1
    assert "logits lie on a 16-bit grid" in result.text
    refused = served.run("--repro-update", "golden")
    assert refused.rc != 0
    assert "fp32 was asked for, but the probe found bf16" in refused.text


def test_texts_are_compared_where_there_is_nothing_else(served: Served) -> None:
    served.restart(tokenizer=False, token_ids=False)
    served.suite().recorded()
    result = served.check()
    assert result.rc == 0, result.text
    assert "only texts are compared" in result.text
    assert "no difference can be explained by rounding" in served.notes()
    served.restart(tokenizer=False, token_ids=False, salt="other weights")
    assert served.check().rc == 1
    assert set(served.verdicts().values()) == {"drift"}


def test_a_golden_of_tokens_is_not_compared_with_texts(served: Served) -> None:
    served.suite().recorded()
    served.restart(tokenizer=False, token_ids=False)
    assert served.check().rc == 1
    assert not {"identical", "near_tie"} & set(served.verdicts().values())


def test_the_key_is_nowhere_in_what_a_run_leaves(served: Served) -> None:
    """A server that says it back in its error."""
    served.suite().recorded()
    served.fake.state.spoil = lambda path, text, answer: (
        Refusal(401, f"wrong key {SECRET}") if path == "/v1/completions" and "question b" in text else answer
    )
    result = served.check("--junitxml", "junit.xml", "--repro-method", "decode", "-l", OPENAI_API_KEY=SECRET)
    assert result.rc == 1
    assert served.verdicts() == {"a": "identical", "b": "error", "c": "identical", "d": "identical"}
    assert "wrong key ***" in result.text
    assert SECRET not in result.text
    assert served.fake.state.keys >= {f"Bearer {SECRET}"}
    for file in (*served.project.root.rglob("*"), *served.project.home.rglob("*")):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes(), file


def test_a_suite_cannot_send_the_key_to_a_server_of_its_own(served: Served) -> None:
    """0.0.0.0 leads to this machine, and is not loopback: it stands for any address that only a suite names."""
    served.suite(base_url=f"http://0.0.0.0:{served.fake.port}/v1")
    result = served.run("--repro-update", "golden", OPENAI_API_KEY=SECRET)
    assert result.rc == 0, result.text
    assert "the API key is not sent" in result.text
    assert served.fake.state.keys == {None}
    option = f"base_url=http://0.0.0.0:{served.fake.port}/v1"
    served.run("--repro-update", "golden", "--repro-engine-option", option, OPENAI_API_KEY=SECRET)
    assert served.fake.state.keys == {None, f"Bearer {SECRET}"}, "named by the user, it is"


def test_an_unknown_option_is_refused_before_anything_is_asked(served: Served) -> None:
    served.suite(api_key=SECRET)
    result = served.check()
    assert result.rc == 4
    assert "unknown key 'api_key'" in result.text
    assert served.fake.state.seen == []
