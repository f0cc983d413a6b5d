"""A run over HTTP that was interrupted, and the one that takes its answers over."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pytest_repro.errors import EngineError
from pytest_repro.generation import Output

from .asking import PROMPTS, alone, errors, for_prompt, opened, requests, watching  # noqa: F401
from .fake_server import Fake, State, logprobs, serving


@contextmanager
def on_one_port(*states: State) -> Iterator[list[Any]]:
    """Start servers one after another on the same port: each call of an entry kills the one before."""
    with ExitStack() as stack:
        first = stack.enter_context(Fake(states[0]))

        def restart(state: State, before: Fake) -> Fake:
            before.kill()
            return stack.enter_context(Fake(state, first.port))

        yield [first, restart]


def interrupted(fake: Fake, at: str = "c", **options: Any) -> dict[str, Output]:
    """A run of four prompts, one at a time, whose server dies at one of them."""
    with opened(fake.url, retries=0, concurrency=1, **options) as engine:
        asked = requests(engine)
        fake.state.spoil = for_prompt(at, lambda answer: setattr(fake.state, "dead", True))
        outputs = engine.generate(asked)
        assert set(errors(outputs)) == set("abcd"["abcd".index(at) :])
        return {o.id: o for o in outputs if not o.error}


def journals(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "resume").glob("*"))


def test_an_interrupted_run_is_resumed_and_forgotten_once_it_is_complete(tmp_path: Path) -> None:
    with on_one_port(State()) as (first, restart):
        before = interrupted(first)
        (file,) = journals(tmp_path)
        assert file.stat().st_mode & 0o777 == 0o600
        assert file.parent.stat().st_mode & 0o777 == 0o700

        says: list[str] = []
        again = restart(State(), first)
        with opened(again.url, says=says, retries=0, concurrency=1) as engine:
            asked = requests(engine)
            again.state.seen.clear()
            outputs = engine.generate(asked)
            assert not errors(outputs)
            counted = {name: sum(n for t, n in again.state.asked().items() if PROMPTS[name] in t) for name in PROMPTS}
            assert counted == {"a": 1, "b": 0, "c": 1, "d": 1}, "the first is asked again, as a sample"
            for output in outputs[:2]:
                np.testing.assert_array_equal(output.tokens, before[output.id].tokens)
                np.testing.assert_array_equal(output.logprob, before[output.id].logprob)
            again.state.seen.clear()
            engine.generate(asked)
            assert sum(again.state.asked().values()) == 4, "an answer is taken over once"
        assert any("2 answers of an interrupted run are taken over" in line for line in says)
        assert journals(tmp_path) == []


def test_replays_are_resumed_too(tmp_path: Path) -> None:
    with on_one_port(State()) as (first, restart):
        with opened(first.url, retries=0, concurrency=1) as engine:
            asked = watching(engine)
        with opened(first.url, retries=0, concurrency=1) as engine:
            first.state.spoil = for_prompt("c", lambda answer: setattr(first.state, "dead", True))
            assert set(errors(engine.replay(asked))) == set("cd")
        again, says = restart(State(), first), list[str]()
        with opened(again.url, says=says, retries=0, concurrency=1) as engine:
            assert not errors(engine.replay(asked))
        assert any("replay 1: 2 answers" in line for line in says)


@pytest.mark.parametrize("ending", [KeyboardInterrupt, EngineError("elsewhere")], ids=["killed", "error"])
def test_a_run_that_ended_otherwise_leaves_its_answers(tmp_path: Path, ending: Any) -> None:
    with serving() as fake:
        with pytest.raises((KeyboardInterrupt, EngineError)), opened(fake.url) as engine:
            engine.generate(requests(engine))
            raise ending
        assert len(journals(tmp_path)) == 1
        with opened(fake.url) as engine:
            assert len(engine._journal.left) == 4
    assert journals(tmp_path) == []


def test_a_complete_run_leaves_nothing(tmp_path: Path) -> None:
    with serving() as fake, opened(fake.url) as engine:
        engine.generate(requests(engine))
    assert journals(tmp_path) == []


@pytest.mark.parametrize(
    "other",
    [{"salt": "other weights"}, {"version": "0.33.0"}, {"fingerprint": "vllm-0.32.0-76543210"}, {"max_model_len": 99}],
    ids=str,
)
def test_nothing_is_taken_over_from_another_server(tmp_path: Path, other: dict[str, Any]) -> None:
    """Weights that changed behind one name show in the answer that is asked for again."""
    with on_one_port(State()) as (first, restart):
        interrupted(first)
        again, says = restart(State(**other), first), list[str]()
        with opened(again.url, says=says, retries=0, concurrency=1) as engine:
            outputs = engine.generate(requests(engine))
            assert not errors(outputs)
            truth = logprobs(requests(engine, "b")[0].tokens.tolist(), "fp32", again.state.salt)
            assert outputs[1].tokens[0] == truth.argmax()
    assert not any("are taken over" in line for line in says)


def test_another_limit_or_prompt_is_another_question(tmp_path: Path) -> None:
    with on_one_port(State()) as (first, restart):
        interrupted(first)
        again = restart(State(), first)
        with opened(again.url, tokens=5, retries=0) as engine:
            assert all(len(o.tokens) <= 5 for o in engine.generate(requests(engine)))


CORRUPT = {
    "half": lambda lines: [*lines[:1], lines[1][: len(lines[1]) // 2]],
    "binary": lambda lines: [b"\xff\xfe\x00", *lines],
    "not-objects": lambda lines: [b"[]", b"7", b"null", b"{}", *lines],
    "deep": lambda lines: [b"[" * 100_000, *lines],
}


@pytest.mark.parametrize("name", CORRUPT)
def test_a_corrupt_line_is_ignored(tmp_path: Path, name: str) -> None:
    with on_one_port(State()) as (first, restart):
        interrupted(first)
        (file,) = journals(tmp_path)
        lines = [line for line in file.read_bytes().split(b"\n") if line]
        assert len(lines) == 2
        file.write_bytes(b"\n".join(CORRUPT[name](lines)))
        again = restart(State(), first)
        with opened(again.url, retries=0, concurrency=1) as engine:
            assert not errors(engine.generate(requests(engine)))


@pytest.mark.parametrize(
    "answer",
    [
        None, 7, [], {}, {"tokens": []},
        {"tokens": [1]},
        {"tokens": ["x"] * 3}, {"tokens": [2**40] * 3}, {"tokens": [1, 2]}, {"logprob": ["nan"] * 8},
        {"finish_reason": "because"}, {"text": None}, {"gap": None}, {"reference_logprob": [0.0]}, {"more": 1},
    ],
    ids=str,
)  # fmt: skip
def test_what_the_journal_holds_is_checked_before_it_is_believed(tmp_path: Path, answer: Any) -> None:
    with on_one_port(State()) as (first, restart):
        before = interrupted(first)
        (file,) = journals(tmp_path)
        rows = [json.loads(line) for line in file.read_bytes().split(b"\n") if line]
        for row in rows:
            row["answer"] = row["answer"] | answer if isinstance(answer, dict) and answer else answer
        file.write_text("\n".join(map(json.dumps, rows)))
        again, says = restart(State(), first), list[str]()
        with opened(again.url, says=says, retries=0, concurrency=1) as engine:
            outputs = engine.generate(requests(engine))
            assert not errors(outputs)
            assert outputs[1].tokens.tolist() == before["b"].tokens.tolist()
        assert not any("are taken over" in line for line in says)


def test_a_day_old_journal_is_deleted_unread(tmp_path: Path) -> None:
    with on_one_port(State()) as (first, restart):
        interrupted(first)
        (file,) = journals(tmp_path)
        other = file.with_name("of-another-suite.jsonl")
        other.write_text("{}")
        for old in (file, other):
            os.utime(old, (time.time() - 25 * 3600,) * 2)
        again = restart(State(), first)
        with opened(again.url, retries=0) as engine:
            assert engine._journal.left == {}
            assert not other.exists()


def test_an_answer_that_is_a_day_old_is_left_out(tmp_path: Path) -> None:
    """A journal that is carried on keeps its file young: its lines have times of their own."""
    with on_one_port(State()) as (first, restart):
        interrupted(first)
        (file,) = journals(tmp_path)
        rows = [json.loads(line) for line in file.read_bytes().split(b"\n") if line]
        rows[0]["time"] -= 25 * 3600
        file.write_text("\n".join(map(json.dumps, rows)))
        again = restart(State(), first)
        with opened(again.url, retries=0) as engine:
            assert len(engine._journal.left) == 1


def test_a_run_beside_one_that_is_under_way_takes_nothing_over() -> None:
    says: list[str] = []
    with serving() as fake, opened(fake.url) as one:
        one.generate(requests(one))
        with opened(fake.url, says=says) as other:
            assert other._journal.left == {}
            assert not errors(other.generate(requests(other)))
    assert any("another run of the same is under way" in line for line in says)


def test_a_cache_that_cannot_be_written_is_said_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PYTEST_REPRO_CACHE", str(tmp_path / "file"))
    says: list[str] = []
    with serving() as fake, opened(fake.url, says=says) as engine:
        assert not errors(engine.generate(requests(engine)))
    assert any("cannot be resumed" in line for line in says)


def test_a_server_that_is_down_again_does_not_cost_what_was_left(tmp_path: Path) -> None:
    with on_one_port(State()) as (first, restart):
        interrupted(first)
        second = restart(State(), first)
        with opened(second.url, retries=0, concurrency=1) as engine:
            asked = requests(engine)
            second.state.dead = True
            assert set(errors(engine.generate(asked))) == set("abcd")
        third, says = restart(State(), second), list[str]()
        with opened(third.url, says=says, retries=0, concurrency=1) as engine:
            assert not errors(engine.generate(requests(engine)))
        assert any("2 answers" in line for line in says)
