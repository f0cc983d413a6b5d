"""Mistakes and damage: each is told with file, line or field, in words, and never with a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from .project import Project, Result


def _clean(result: Result) -> Result:
    """No traceback, no listing of this package's source, no crash of pytest's."""
    for sign in ("Traceback", "INTERNALERROR", "pytest_repro/", "Error: ["):
        assert sign not in result.text, result.text
    return result


# --- suites -------------------------------------------------------------------------------------------------------

SUITE = "golden/demo/suite.toml"
PROMPTS = "golden/demo/prompts.jsonl"
GOOD = b'{"id": "a", "prompt": "x"}\n'


def _edited(file: str, old: str, new: str) -> Callable[[Project], object]:
    def edit(project: Project) -> None:
        text = (project.root / file).read_text()
        assert old in text
        project.write(file, text.replace(old, new, 1))

    return edit


def _prompts(second_line: bytes) -> Callable[[Project], object]:
    return lambda project: project.write(PROMPTS, GOOD + second_line + b"\n")


BAD_SUITES: dict[str, tuple[Callable[[Project], object], list[str]]] = {
    "broken-toml": (_edited(SUITE, "[generation]", "[generation"), [SUITE, "not valid TOML", "line 6"]),
    "unknown-key": (
        _edited(SUITE, "batch_size = 2", "batch_sise = 2"),
        [f"{SUITE}:8 [generation.batch_sise]", "unknown key 'batch_sise'; known keys: batch_size, max_new_tokens"],
    ),
    "wrong-type": (
        _edited(SUITE, "batch_size = 2", 'batch_size = "2"'),
        [f"{SUITE}:8 [generation.batch_size]", '"2" is not allowed here'],
    ),
    "missing-name": (_edited(SUITE, 'name = "demo"', ""), [SUITE, "[suite]", "'name' is a required property"]),
    "unknown-threshold": (
        lambda p: p.suite(thresholds={"max_divergnt": 1}),
        [SUITE, "[thresholds.max_divergnt]", "unknown key 'max_divergnt'"],
    ),
    "share-above-one": (
        lambda p: p.suite(thresholds={"fp32": {"max_divergent": 1.5}}),
        [SUITE, "[thresholds.fp32.max_divergent]", "1.5 is not a count"],
    ),
    "unknown-scorer": (lambda p: p.suite(suite={"scorer": "exactly"}), [SUITE, "unknown scorer 'exactly'; known: exact"]),
    "code-scorer": (lambda p: p.suite(suite={"scorer": "os:system"}), [SUITE, "'os:system' is code", "--repro-allow-code"]),
    "code-engine": (
        lambda p: p.suite(suite={"engine": "os:system"}, engine=None),
        ["'os:system' is code", "--repro-allow-code"],
    ),
    "unknown-engine": (
        lambda p: p.suite(suite={"engine": "scriptd"}, engine=None),
        [SUITE, "unknown engine 'scriptd'; known: transformers, vllm, openai, scripted, module:function"],
    ),
    "unknown-engine-table": (
        lambda p: p.suite(engine={"script": "script.jsonl", "vlm": {"max_num_seqs": 1}}),
        [SUITE, "[engine.vlm]", "options for an unknown engine 'vlm'"],
    ),
    "unknown-option-of-another-engine": (
        lambda p: p.suite(engine={"script": "script.jsonl", "vllm": {"max_num_seq": 1}}),
        [SUITE, "[engine.max_num_seq]", "unknown key 'max_num_seq' for the engine vllm"],
    ),
    "unknown-engine-option": (
        lambda p: p.suite(engine={"script": "script.jsonl", "jiter": 1}),
        [SUITE, "[engine.jiter]", "unknown key 'jiter'"],
    ),
    "unknown-numerics": (
        lambda p: p.suite(run={"numerics": ["bf61"]}),
        [SUITE, "unknown numerics mode 'bf61'; known: native, bf16, fp16, fp32"],
    ),
    "prompts-missing": (lambda p: (p.root / PROMPTS).unlink(), [PROMPTS, "there is no such file"]),
    "prompts-outside": (
        lambda p: p.suite(suite={"prompts": "../../secret.jsonl"}),
        [f"{SUITE}:5 [suite.prompts]", "leaves the suite's folder"],
    ),
    "prompts-by-link": (
        lambda p: ((p.root / PROMPTS).unlink(), (p.root / PROMPTS).symlink_to("/etc/hostname")),
        [f"{SUITE}:5 [suite.prompts]", "leaves the suite's folder"],
    ),
    "empty-suite": (lambda p: p.write(PROMPTS, "\n\n"), [PROMPTS, "the suite is empty"]),
    "bad-line": (_prompts(b'{"id": "b", "prompt": "y"'), [f"{PROMPTS}:2", "not valid JSON"]),
    "neither": (_prompts(b'{"id": "b"}'), [f"{PROMPTS}:2", 'either "prompt" or "messages"']),
    "duplicate-id": (_prompts(b'{"id": "a", "prompt": "y"}'), [f"{PROMPTS}:2", "duplicate id 'a', first used on line 1"]),
    "taken-id": (_prompts(b'{"id": "accuracy", "prompt": "y"}'), [f"{PROMPTS}:2 [id]", "'accuracy' is taken"]),
    "id-with-line-break": (_prompts(b'{"id": "b\\n", "prompt": "y"}'), [f"{PROMPTS}:2 [id]"]),
    "lone-surrogate": (_prompts(b'{"id": "b", "prompt": "\\ud800"}'), [f"{PROMPTS}:2"]),
    "suite-not-utf8": (lambda p: p.write(SUITE, b"\xff\xfe[suite]\n"), [SUITE, "cannot be read", "utf-8"]),
    "prompts-not-utf8": (_prompts(b'{"id": "b", "prompt": "\xff"}'), [PROMPTS, "cannot be read", "utf-8"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_SUITES)
def test_a_bad_suite_stops_the_run(project: Project, name: str) -> None:
    spoil, told = BAD_SUITES[name]
    spoil(project.suite())
    result = _clean(project.check())
    assert result.rc == 4, result.text
    for words in told:
        assert words in result.err


def test_a_bad_default_of_pyproject_is_found_there(accepted: Project) -> None:
    accepted.pyproject("[tool.pytest-repro.thresholds]\nmax_divergnt = 1")
    result = _clean(accepted.check())
    assert result.rc == 4
    assert "max_divergnt" in result.err
    assert "pyproject.toml" in result.err, "suite.toml is not where the mistake is"


def test_a_scorer_of_ones_own_runs_where_code_is_allowed(project: Project) -> None:
    project.suite(answers={"a": "yes"}, suite={"scorer": "judge:right"})
    project.write(
        "judge.py", "def right(text, answer):\n    open('ran.txt', 'w').close()\n    return answer == 'yes'\n"
    )
    refused = _clean(project.pytest("--repro-update", "golden"))
    assert refused.rc == 4
    assert not (project.root / "ran.txt").exists()

    project.pyproject("[tool.pytest-repro]\nallow_code = true")
    refused = _clean(project.pytest("--repro-update", "golden"))
    assert refused.rc == 4, "a file of the same pull request is no opt-in"
    assert "allow_code = true" not in refused.text, "what does not help is not to be recommended"

    project.pyproject().update("--repro-allow-code")
    assert (project.root / "ran.txt").exists()
    assert project.header("bf16.pending")["metrics"]["accuracy"] == 100


def test_a_scorer_that_raises_is_named(project: Project) -> None:
    project.suite(answers={"a": "yes"}, suite={"scorer": "judge:right"})
    project.write("judge.py", "def right(text, answer):\n    raise KeyError('no such answer')\n")
    result = _clean(project.pytest("--repro-update", "golden", "--repro-allow-code"))
    assert result.rc == 1
    assert "judge:right" in result.out
    assert "KeyError" in result.out


# --- options ------------------------------------------------------------------------------------------------------

BAD_OPTIONS: dict[str, tuple[list[str], list[str]]] = {
    "nothing-asked": (["--repro-numerics", "fp32"], ["--repro-numerics does nothing by itself", "add --repro-check"]),
    "unknown-threshold": (
        ["--repro-check", "golden", "--repro-threshold", "max_divergnt=1"],
        ["--repro-threshold", "unknown key 'max_divergnt'", "known keys: accuracy_drop"],
    ),
    "threshold-out-of-range": (
        ["--repro-check", "golden", "--repro-threshold", "max_divergent=-1"],
        ["--repro-threshold", "max_divergent", "-1 is not a count"],
    ),
    "unknown-mode": (["--repro-check", "golden", "--repro-numerics", "bf61"], ["unknown numerics mode 'bf61'"]),
    "unknown-word-of-a-format": (
        ["--repro-check", "golden", "--repro-numerics", "e4m3-wieghts"],
        ["--repro-numerics: unknown numerics mode 'e4m3-wieghts': 'wieghts' says nothing of a format", "e4m3[-weights]"],
    ),
    "format-on-an-engine-without": (
        ["--repro-check", "golden", "--repro-numerics", "e4m3", "--repro-engine", "vllm"],
        ["--repro-numerics: the engine vllm emulates no floating-point formats, and e4m3 is one", "transformers"],
    ),
    "no-batch": (["--repro-check", "golden", "--repro-batch-size", "0"], ["batch_size must be at least 1, not 0"]),
    "unknown-engine": (["--repro-check", "golden", "--repro-engine", "scriptd"], ["unknown engine 'scriptd'"]),
    "unknown-engine-option": (
        ["--repro-check", "golden", "--repro-engine-option", "jiter=1"],
        ["--repro-engine-option [engine.jiter]", "unknown key 'jiter'"],
    ),
    "engine-option-without-value": (
        ["--repro-check", "golden", "--repro-engine-option", "jitter"],
        ["--repro-engine-option", "'jitter' is not NAME=VALUE"],
    ),
    "unknown-module": (
        ["--repro-check", "golden", "--repro-engine", "nowhere:answer"],
        ["'nowhere:answer' cannot be imported", "nowhere"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_a_bad_option_stops_the_run(project: Project, name: str) -> None:
    args, told = BAD_OPTIONS[name]
    project.suite(engine=None if "--repro-engine" in args else {"script": "script.jsonl"})
    result = _clean(project.pytest(*args))
    assert result.rc == 4, result.text
    for words in told:
        assert words in result.err


def test_a_golden_that_is_asked_for_by_name_must_be_there(accepted: Project) -> None:
    result = _clean(accepted.check("--repro-golden", "bf16@cuda-sm90"))
    assert result.rc == 1
    assert "bf16@cuda-sm90" in result.out
    assert accepted.check("--repro-golden", "bf16").rc == 0


def test_a_report_that_cannot_be_written_is_told(accepted: Project) -> None:
    result = _clean(accepted.check("--repro-report-json", "golden"))
    assert result.rc != 0
    assert "golden" in result.err


# --- damaged goldens ----------------------------------------------------------------------------------------------


def _header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        file = folder / "bf16.golden.jsonl"
        head, _, body = file.read_text().partition("\n")
        header = json.loads(head)
        change(header)
        file.write_text(f"{json.dumps(header)}\n{body}")

    return damage


def _text(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / "bf16.golden.jsonl").write_bytes(
        change((folder / "bf16.golden.jsonl").read_bytes())
    )


def _replaced(old: str, new: str) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        text = (folder / "bf16.golden.jsonl").read_text()
        assert old in text
        (folder / "bf16.golden.jsonl").write_text(text.replace(old, new, 1))

    return damage


def _numbers(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / "bf16.golden.safetensors").write_bytes(
        change((folder / "bf16.golden.safetensors").read_bytes())
    )


NUMBERS = "bf16.golden.safetensors"
DAMAGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "newer-schema": (_header(lambda h: h.update(schema=99)), ["bf16.golden.jsonl:1 [schema]", "has schema 99", "pip install -U"]),
    "schema-of-text": (_header(lambda h: h.update(schema="1")), ["bf16.golden.jsonl:1 [schema]", "has schema '1'"]),
    "schema-zero": (_header(lambda h: h.update(schema=0)), ["bf16.golden.jsonl"]),
    "schema-true": (_header(lambda h: h.update(schema=True)), ["bf16.golden.jsonl"]),
    "no-digest": (_header(lambda h: h.pop("digest")), ["bf16.golden.jsonl", "edited by hand"]),
    "no-review": (_header(lambda h: h.pop("review")), ["bf16.golden.jsonl", "review"]),
    "review-of-text": (_header(lambda h: h.update(review="me")), ["bf16.golden.jsonl:1 [review]"]),
    "no-seal": (_header(lambda h: h["review"].pop("seal")), ["bf16.golden.jsonl:1 [review]", "seal"]),
    "edited-text": (_replaced('"text": " 21', '"text": " 99'), ["bf16.golden.jsonl", "edited by hand", "git checkout -- "]),
    "edited-noise": (_replaced('"max_deficit": 0.1', '"max_deficit": 9.1'), ["bf16.golden.jsonl", "edited by hand"]),
    "edited-reason": (_replaced("seen and right", "seen and wrong"), ["[review.seal]", "edited by hand"]),
    "edited-reviewer": (_replaced('"by": "', '"by": "not '), ["[review.seal]", "edited by hand"]),
    "text-truncated": (_text(lambda b: b[: len(b) * 2 // 3]), ["bf16.golden.jsonl:"]),
    "text-empty": (_text(lambda b: b""), ["bf16.golden.jsonl", "not a pytest-repro golden"]),
    "text-not-json": (_text(lambda b: b"\xff\xfe" + b), ["bf16.golden.jsonl:1"]),
    "text-merge-conflict": (_text(lambda b: b"<<<<<<< HEAD\n" + b), ["bf16.golden.jsonl:1", "not valid JSON"]),
    "numbers-truncated": (_numbers(lambda b: b[:-8]), [NUMBERS, "truncated", "git checkout -- "]),
    "numbers-empty": (_numbers(lambda b: b""), [NUMBERS, "truncated"]),
    "numbers-lfs-pointer": (_numbers(lambda b: b"version https://git-lfs.github.com/spec/v1\n"), [NUMBERS, "git lfs pull"]),
    "numbers-missing": (lambda f: (f / NUMBERS).unlink(), [NUMBERS, "the binary part is missing"]),
    "numbers-of-another": (lambda f: shutil.copy(f / "fp32.golden.safetensors", f / NUMBERS), [NUMBERS, "not the one"]),
    "wrong-name": (
        lambda f: [
            shutil.copy(f / f"fp32.golden.{part}", f / f"bf16.golden.{part}") for part in ("jsonl", "safetensors")
        ],
        ["bf16.golden.jsonl", "the file's name says bf16, its content fp32"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, dict[str, Any]]:
    """One run over as many suites as there are damages; each has goldens of two classes and checks bf16."""
    project = Project(tmp_path_factory.mktemp("damaged")).suite(run={"numerics": ["bf16", "fp32"]})
    project.update().script(a={"gap": [1.0, 1.0, 1.0, 1.0]}).update("--repro-numerics", "fp32").accept()
    for name, (damage, _) in DAMAGES.items():
        folder = project.root / "damaged" / name
        shutil.copytree(project.folder, folder)
        damage(folder)
    result = project.check("--repro-numerics", "bf16", "--repro-report-json", "report.json", where="damaged")
    return result, {Path(s["path"]).name: s for s in project.json()["suites"]}


def test_damaged_goldens_end_in_failures_not_in_a_crash(damaged: tuple[Result, dict[str, Any]]) -> None:
    result, suites = damaged
    assert result.rc == 1
    assert set(suites) == set(DAMAGES)
    _clean(result)


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_golden_is_told(damaged: tuple[Result, dict[str, Any]], name: str) -> None:
    result, suites = damaged
    suite = suites[name]
    assert suite["verdict"] == "fail"
    assert {p["verdict"] for p in suite["prompts"]} == {"error"}
    (check,) = suite["checks"]
    assert check["name"] == "golden"
    for words in (f"damaged/{name}/", *DAMAGES[name][1]):
        assert words in check["message"]
    first_line = check["message"].splitlines()[0]
    assert first_line in result.out, "what the report says, the terminal says too"


def test_the_review_commands_tell_damage_too(accepted: Project) -> None:
    accepted.update()
    accepted.write("golden/demo/bf16.pending.safetensors", b"x")
    listed = _clean(accepted.cli("pending"))
    assert listed.rc == 1
    assert "cannot be read" in listed.out
    for args in (["diff"], ["accept", "golden", "--all", "--reason", "r"]):
        result = _clean(accepted.cli(*args))
        assert result.rc == 2
        assert "bf16.pending.safetensors" in result.err
    accepted.write("golden/demo/bf16.golden.safetensors", b"x")
    shown = _clean(accepted.cli("show"))
    assert shown.rc == 2
    assert "bf16.golden.safetensors" in shown.err


@pytest.mark.parametrize("command", ["pending", "show", "accept"])
def test_a_folder_that_is_not_there(project: Project, command: str) -> None:
    result = _clean(project.cli(command, "nowhere"))
    assert result.rc == 2
    assert "nowhere" in result.err
    assert "there is no such folder" in result.err


# --- engines ------------------------------------------------------------------------------------------------------


def test_a_prompt_without_an_answer_is_an_error_of_its_own(accepted: Project) -> None:
    accepted.script(b={"error": "NaN in logits at token 3"})
    result = _clean(accepted.check("-v"))
    assert result.rc == 1
    failed = [name.rsplit("::", 1)[1] for name, outcome in result.outcomes().items() if outcome == "FAILED"]
    assert failed == ["b"]
    assert "NaN in logits at token 3" in result.out
    assert "3 identical · 1 error" in result.out

    recorded = _clean(accepted.pytest("--repro-update", "golden"))
    assert recorded.rc == 1
    assert "prompt b has no answer: NaN in logits at token 3" in recorded.out
    assert not (accepted.folder / "bf16.pending.jsonl").exists()


SCRIPTS: dict[str, tuple[bytes, str]] = {
    "not-json": (b"nonsense\n", "script.jsonl:1"),
    "not-utf8": (b'{"id": "a", "tokens": [1], "text": "\xff"}\n', "script.jsonl"),
    "not-numbers": (b'{"id": "a", "tokens": ["x"]}\n', "script.jsonl:1"),
    "too-large": (b'{"id": "a", "tokens": [99999999999]}\n', "script.jsonl:1"),
    "columns-disagree": (b'{"id": "a", "tokens": [1, 2], "logprob": [0.1]}\n', "logprob"),
}


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Name of a bad script -> what recording with it fails with."""
    project = Project(tmp_path_factory.mktemp("scripts"))
    for name, (content, _) in SCRIPTS.items():
        project.suite({"a": [1]}, at=f"golden/{name}").write(f"golden/{name}/script.jsonl", content)
    assert project.pytest("--repro-update", "golden", "--junitxml=junit.xml").rc == 1
    cases = ElementTree.parse(project.root / "junit.xml").iter("testcase")
    return {name: "".join(case.itertext()) for case in cases for name in SCRIPTS if name in case.attrib["classname"]}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_bad_script_is_told(scripts: dict[str, str], name: str) -> None:
    assert SCRIPTS[name][1] in scripts[name]
    assert "pytest_repro/" not in scripts[name], "no listing of this package's source: the mistake is the script's"


def test_a_claim_that_the_probe_contradicts_fails(project: Project) -> None:
    project.suite(run={"numerics": ["fp32"]}).update().accept()
    project.suite(run={"numerics": ["fp32"]}, engine={"script": "script.jsonl", "observed": "tf32"})
    result = _clean(project.check())
    assert result.rc == 1
    assert "fp32 was asked for, but the probe found tf32" in result.out


def test_a_model_that_is_not_there(project: Project) -> None:
    """The one test here that imports torch."""
    project.suite(suite={"engine": "transformers", "model": "./nowhere"}, engine=None)
    result = _clean(project.pytest("--repro-update", "golden"))
    assert result.rc == 1
    assert "there is no model at './nowhere'" in result.out
