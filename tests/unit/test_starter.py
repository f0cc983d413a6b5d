from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pytest_repro.errors import ConfigError
from pytest_repro.starter import (
    Recipe,
    name_from,
    prompt_lines,
    prompts_from,
    quoted,
    scorer_for,
    suite_toml,
    workflow,
)
from pytest_repro.suite import Prompt, Suite, load


def read(text: str, suffix: str = ".jsonl", limit: int | None = None) -> tuple[Prompt, ...]:
    return prompts_from(text, where=f"my{suffix}", suffix=suffix, limit=limit)


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


# --- prompts --------------------------------------------------------------------------------------------------------


def test_plain_lines() -> None:
    assert read("Hello\n\n  What is 6 * 7?  \r\nSay \u2028 this\n", ".txt") == (
        Prompt("p01", "Hello"), Prompt("p02", "What is 6 * 7?"), Prompt("p03", "Say \u2028 this"),
    )  # fmt: skip


def test_json_lines_by_name_or_by_look() -> None:
    text = lines(
        {"prompt": "a"}, {"id": "q", "prompt": "b", "answer": 7}, {"prompt": "c", "answer": None, "source": "x"}
    )
    wanted = (Prompt("p01", "a"), Prompt("q", "b", "7"), Prompt("p03", "c"))
    assert read(text) == read(text, ".txt") == read("\ufeff" + text, ".ndjson") == wanted
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert read(lines({"messages": chat, "id": 3})) == (Prompt("3", chat),)


def test_gsm8k() -> None:
    solution = "She sold 48/2 = <<48/2=24>>24 clips.\n#### 1,072"
    assert read(lines({"question": "How many?", "answer": solution})) == (Prompt("p01", "How many?", "1072"),)
    assert read(lines({"question": "Which?", "answer": "B"}))[0].answer == "B"


def test_ids_are_as_wide_as_they_must_be_and_a_limit_is_kept() -> None:
    assert [p.id for p in read("x\n" * 120, ".txt")][::119] == ["p001", "p120"]
    assert [p.id for p in read("x\n" * 120, ".txt", limit=2)] == ["p01", "p02"]
    assert len(read(lines({"prompt": "a"}) + "no JSON", limit=1)) == 1


BAD = {
    "nothing": ("", ".txt", "my.txt", "no prompts are in it"),
    "blank": ("\n \n", ".jsonl", "my.jsonl", "no prompts are in it"),
    "table": ("a,b\n", ".csv", "my.csv", "a table"),
    "parquet": ("PAR1", ".parquet", "my.parquet", "a table"),
    "array": ('[{"prompt": "a"}]', ".json", "my.json:1", "a JSON array"),
    "no-json": ('{"prompt": "a"}\nhello\n', ".jsonl", "my.jsonl:2", "not valid JSON"),
    "a-string": ('{"prompt": "a"}\n"hello"\n', ".jsonl", "my.jsonl:2", "not a JSON object"),
    "no-question": ('{"text": "a"}', ".jsonl", "my.jsonl:1", 'no "prompt", "messages" or "question"'),
    "key-twice": ('{"prompt": "a", "answer": 1, "answer": 2}', ".jsonl", "my.jsonl:1", "the key 'answer' stands twice"),
    "nan": ('{"prompt": "a", "answer": NaN}', ".jsonl", "my.jsonl:1 [answer]", "the answer is nan"),
    "infinite": ('{"prompt": "a", "answer": 1e999}', ".jsonl", "my.jsonl:1 [answer]", "the answer is inf"),
    "two-questions": ('{"prompt": "a", "question": "b"}', ".jsonl", "my.jsonl:1", "both 'prompt' and 'question'"),
    "empty-prompt": ('{"prompt": ""}', ".jsonl", "my.jsonl:1 [prompt]", "is not allowed here"),
    "prompt-a-number": ('{"prompt": 3}', ".jsonl", "my.jsonl:1 [prompt]", "is not allowed here"),
    "no-messages": ('{"messages": []}', ".jsonl", "my.jsonl:1 [messages]", "is not allowed here"),
    "odd-message": ('{"messages": [{"role": "user"}]}', ".jsonl", "my.jsonl:1 [messages.0]", "'content' is a required"),
    "answer-a-list": ('{"prompt": "a", "answer": [1]}', ".jsonl", "my.jsonl:1 [answer]", "neither text nor a number"),
    "answer-a-truth": ('{"prompt": "a", "answer": true}', ".jsonl", "my.jsonl:1 [answer]", "neither text nor a number"),
    "id-twice": ('{"prompt": "a", "id": "x"}\n{"prompt": "b", "id": "x"}', ".jsonl", "my.jsonl:2", "first in my.jsonl:1"),
    "id-a-path": ('{"prompt": "a", "id": "../x"}', ".jsonl", "my.jsonl:1 [id]", "is not allowed here"),
    "id-taken": ('{"prompt": "a", "id": "accuracy"}', ".jsonl", "my.jsonl:1 [id]", "is taken"),
    "half-a-character": ('{"prompt": "\\ud800"}', ".jsonl", "my.jsonl:1", "surrogate"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_of_prompts_is_told_by_its_line(name: str) -> None:
    text, suffix, where, told = BAD[name]
    with pytest.raises(ConfigError) as caught:
        read(text, suffix)
    assert caught.value.where == where and told in caught.value.what


def test_json_too_deep_is_no_crash() -> None:
    with pytest.raises(ConfigError, match="not valid JSON"):
        read('{"prompt": ' + "[" * 100_000)


def test_the_scorer_follows_from_the_answers() -> None:
    assert scorer_for(read(lines({"prompt": "a", "answer": "1,250"}, {"prompt": "b"}))) == "last-number"
    assert scorer_for(read(lines({"prompt": "a", "answer": "42"}, {"prompt": "b", "answer": "blue"}))) == "exact"
    assert scorer_for(read("a\n", ".txt")) == "last-number"


# --- suite.toml -----------------------------------------------------------------------------------------------------

ODD = [
    'quote " and \\ back',
    "tab\tline\nnul\x00del\x7f",
    "bidi \u202e 漢 😀 \U000e0001",
    "'''",
    "${{ secrets.X }}",
    "#",
]


@pytest.mark.parametrize("text", ODD)
def test_any_text_survives_toml_and_cannot_act_in_it(text: str) -> None:
    assert tomllib.loads(f"x = {quoted(text)}") == {"x": text}
    assert quoted(text).isprintable()


def written(folder: Path, recipe: Recipe) -> Suite:
    (folder / "suite.toml").write_text(suite_toml(recipe), "utf-8")
    (folder / "prompts.jsonl").write_text(prompt_lines(recipe.prompts), "utf-8")
    return load(folder)


@pytest.mark.parametrize("model", ["org/name", "org/name@main", "../models/mine", *ODD])
@pytest.mark.parametrize("numerics", [("fp32", "bf16"), ("native",)])
def test_the_suite_that_is_made_is_the_one_that_was_meant(
    tmp_path: Path, model: str, numerics: tuple[str, ...]
) -> None:
    prompts = (Prompt("a", 'Hello \u2028 "x"'), Prompt("b", [{"role": "user", "content": "u"}], "4"))
    recipe = Recipe("my.suite-1", model, prompts, numerics=numerics, scorer="regex", max_new_tokens=7, batch_size=3,
                    options={"pattern": 'a "(\\d+)"'})  # fmt: skip
    found = written(tmp_path, recipe)
    assert (found.name, found.model, found.prompts, found.numerics) == ("my.suite-1", model, prompts, numerics)
    assert (found.scorer, found.pattern, found.max_new_tokens, found.batch_size) == ("regex", 'a "(\\d+)"', 7, 3)
    assert found.thresholds_for("fp32").max_divergent == 0
    assert found.thresholds_for("bf16").max_divergent == (1.0 if "bf16" in numerics else 0)


def test_a_hub_model_without_a_revision_is_pointed_out(tmp_path: Path) -> None:
    recipe = Recipe("s", "org/name", (Prompt("a", "x"),))
    assert "add @revision" in suite_toml(recipe)
    for other in (replace(recipe, model="org/name@abc"), replace(recipe, engine="openai")):
        assert "@revision" not in suite_toml(other)


@pytest.mark.parametrize(
    ("folder", "wanted"), [("my-suite", "my-suite"), ("my suite!", "my-suite"), ("_x_", "x"), ("été", "t")]
)
def test_a_name_from_a_folder(folder: str, wanted: str) -> None:
    assert name_from(folder) == wanted


@pytest.mark.parametrize("folder", ["漢字", "...", ""])
def test_no_name_from_a_folder(folder: str) -> None:
    with pytest.raises(ConfigError, match="no suite's name"):
        name_from(folder)


# --- the workflow ---------------------------------------------------------------------------------------------------


def test_the_workflow_checks_this_suite() -> None:
    text = workflow("golden/my-suite", ("fp32", "bf16"), "./.github/actions/repro-check", "vllm")
    for line in (
        "      - uses: ./.github/actions/repro-check",
        '          golden: "golden/my-suite"',
        '          numerics: "fp32,bf16"',
        '      - run: pytest-repro verify "golden/my-suite"',
        "          fetch-depth: 0 # pytest-repro verify reads the history of the goldens",
        "  group: repro-${{ github.ref }}",
        "          key: models-${{ hashFiles('golden/my-suite/suite.toml') }}",
        '      - run: pip install "pytest-repro[vllm]"',
    ):
        assert line in text.splitlines()


@pytest.mark.parametrize("folder", ["golden/${{ x }}", "a;b", "a\nb", "$(id)", "`id`", 'a"b'])
def test_a_path_that_a_workflow_would_run_is_refused(folder: str) -> None:
    with pytest.raises(ConfigError, match="signs that a workflow gives a meaning to"):
        workflow(folder, ("fp32",), "./x", "openai")


@pytest.mark.parametrize(
    "action",
    ["./.github/actions/repro-check", "$/.github/actions/repro-check", "owner/repo@v1", "o/r/path/to.it@" + "a" * 40, "o/r@releases/v1"],
)  # fmt: skip
def test_an_action_as_github_reads_it(action: str) -> None:
    assert f"      - uses: {action}\n" in workflow("golden", ("fp32",), action, "openai")


@pytest.mark.parametrize(
    "action",
    ["", "check", "owner/repo", "owner@v1", "owner/repo@", "/abs/path", "../x", "./../x", "./", "$", "./a//b", "./x #", "a/b@c d",
     "o/../r@v1", "docker://alpine:3", "golden/${{ x }}", "./${{ x }}", "a;b", "a\nb", "./a\n", "./a: b"],
)  # fmt: skip
def test_what_is_no_action(action: str) -> None:
    with pytest.raises(ConfigError, match="names no action") as told:
        workflow("golden", ("fp32",), action, "openai")
    assert "OWNER/REPO/PATH@COMMIT" in told.value.fix
