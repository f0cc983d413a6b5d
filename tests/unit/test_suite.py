from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pytest_repro.errors import ConfigError
from pytest_repro.suite import (
    Overrides,
    Prompt,
    Shard,
    Suite,
    Thresholds,
    apply,
    defaults_around,
    from_table,
    load,
    load_prompts,
    merge,
    parse_engine_option,
    parse_shard,
    parse_threshold,
)
from tests.unit.builders import SUITE_TOML, suite, write_suite

FULL = """
[suite]
name    = "word-problems"
model   = "pypi:x==1/y.gguf"
engine  = "scripted"
prompts = "prompts.jsonl"
scorer  = "regex"
pattern = '(\\d+)'

[engine]
script = "script.jsonl"

[generation]
max_new_tokens = 64
batch_size     = 2

[run]
numerics = ["fp32", "bf16"]

[thresholds]
max_divergent   = 3
accuracy_drop   = 1.5
length_ratio    = [0.5, 2.0]
fp32_waiver     = "none"
[thresholds.bf16]
max_divergent   = 1.0
"""


def test_engine_tables_belong_to_engines() -> None:
    table = {"suite": {"name": "s", "model": "m", "engine": "vllm"},
             "engine": {"enforce_eager": True, "vllm": {"max_num_seqs": 4}, "openai": {"base_url": "http://x"}}}  # fmt: skip
    suite = from_table(table, folder=Path(), prompts=(Prompt("a", "A"),))
    assert suite.engine_options == {"enforce_eager": True, "max_num_seqs": 4}
    assert apply(suite, Overrides(engine="openai")).engine_options == {"base_url": "http://x"}
    assert apply(suite, Overrides(engine="transformers")).engine_options == {}
    named = apply(suite, Overrides(engine_options={"max_num_seqs": 8}))
    assert named.engine_options == {"enforce_eager": True, "max_num_seqs": 8}
    assert named.user_options == {"max_num_seqs": 8}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a=2", 2),
        ("a=true", True),
        ("a=0.5", 0.5),
        ("a=ray", "ray"),
        ("a=http://h:1/v1", "http://h:1/v1"),
        ("a='x y'", "x y"),
    ],
)
def test_engine_options_are_read_as_toml_or_text(text: str, value: object) -> None:
    assert parse_engine_option(text) == ("a", value)


@pytest.mark.parametrize("text", ["a", "=1", "a=[1]", "a={b=1}", "a=2020-01-01"])
def test_an_engine_option_that_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--repro-engine-option"):
        parse_engine_option(text)


def test_everything_in_the_file_is_read(tmp_path: Path) -> None:
    folder = write_suite(
        tmp_path / "wp",
        FULL,
        '{"id": "p01", "prompt": "Hello", "answer": "5"}\n\n'
        '{"id": "p02", "messages": [{"role": "user", "content": "Hi"}]}\n',
    )
    assert load(folder) == Suite(
        name="word-problems",
        folder=folder,
        model="pypi:x==1/y.gguf",
        prompts=(Prompt("p01", "Hello", "5"), Prompt("p02", [{"role": "user", "content": "Hi"}])),
        engine="scripted",
        engine_tables={"scripted": {"script": "script.jsonl"}},
        scorer="regex",
        pattern=r"(\d+)",
        max_new_tokens=64,
        batch_size=2,
        numerics=("fp32", "bf16"),
        thresholds={
            "": Thresholds(3, 0, 1.5, 0.05, (0.5, 2.0), "none"),
            "bf16": Thresholds(1.0, 0, 1.5, 0.05, (0.5, 2.0), "none"),
        },
    )


def test_defaults_of_a_bare_suite(tmp_path: Path) -> None:
    found = load(write_suite(tmp_path) / "suite.toml")
    assert (found.engine, found.scorer, found.numerics) == ("transformers", "last-number", ("native",))
    assert (found.max_new_tokens, found.batch_size) == (96, 8)
    assert found.thresholds_for("bf16") == Thresholds(0, 0, 2.0, 0.05, (0.9, 1.1), "explained")


def test_thresholds_of_a_class_override_field_by_field(tmp_path: Path) -> None:
    found = load(write_suite(tmp_path, FULL, '{"id": "p", "prompt": "x"}'))
    assert found.thresholds_for("bf16").max_divergent == 1.0 and isinstance(
        found.thresholds_for("bf16").max_divergent, float
    )
    assert found.thresholds_for("fp32").max_divergent == 3 and isinstance(found.thresholds_for("").max_divergent, int)


# --- precedence: test keyword > command line > suite.toml > pyproject ----------------------------------------------

DEFAULTS = {
    "generation": {"batch_size": 1, "max_new_tokens": 7},
    "run": {"numerics": ["fp16"]},
    "thresholds": {"alpha": 0.25, "max_divergent": 5, "accuracy_drop": 9.0, "fp32": {"max_divergent": 6}},
}


def test_the_file_beats_the_defaults_key_by_key(tmp_path: Path) -> None:
    toml = SUITE_TOML + "[generation]\nbatch_size = 2\n[thresholds]\nmax_divergent = 4\n"
    found = load(write_suite(tmp_path, toml), defaults=DEFAULTS)
    assert (found.batch_size, found.max_new_tokens, found.numerics) == (2, 7, ("fp16",))
    assert found.thresholds_for("bf16") == Thresholds(max_divergent=4, alpha=0.25, accuracy_drop=9.0)
    assert found.thresholds_for("fp32").max_divergent == 6


def test_overrides_beat_the_file_for_every_class(tmp_path: Path) -> None:
    line = Overrides(
        model="other",
        engine="scripted",
        numerics=("fp32",),
        batch_size=3,
        thresholds={"max_divergent": 0, "alpha": 0.5},
    )
    found = load(write_suite(tmp_path, FULL), line, DEFAULTS)
    assert (found.model, found.engine, found.numerics) == ("other", "scripted", ("fp32",))
    assert (found.batch_size, found.max_new_tokens) == (3, 64)
    assert [found.thresholds_for(c).max_divergent for c in ("", "bf16", "fp32")] == [0, 0, 0]
    assert [found.thresholds_for(c).alpha for c in ("", "bf16", "fp32")] == [0.5, 0.5, 0.5]
    assert found.thresholds_for("bf16").accuracy_drop == 1.5


def test_a_keyword_goes_over_the_command_line() -> None:
    line = Overrides(model="a", batch_size=2, thresholds={"alpha": 0.5, "max_divergent": 1})
    keyword = Overrides(batch_size=4, max_new_tokens=5, thresholds={"max_divergent": 0.5})
    assert line.under(keyword) == Overrides(
        model="a", batch_size=4, max_new_tokens=5, thresholds={"alpha": 0.5, "max_divergent": 0.5}
    )


@pytest.mark.parametrize("field", ["batch_size", "max_new_tokens"])
def test_overrides_are_checked(tmp_path: Path, field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field} must be at least 1, not 0"):
        load(write_suite(tmp_path), Overrides(**{field: 0}))
    with pytest.raises(ConfigError, match="unknown key 'max_drift'"):
        load(write_suite(tmp_path), Overrides(thresholds={"max_drift": 1}))


def test_merge_leaves_its_arguments_alone() -> None:
    weak, strong = {"a": {"x": 1, "y": 1}, "b": 1}, {"a": {"y": 2}, "c": 3}
    assert merge(weak, strong) == {"a": {"x": 1, "y": 2}, "b": 1, "c": 3}
    assert weak == {"a": {"x": 1, "y": 1}, "b": 1} and strong == {"a": {"y": 2}, "c": 3}


def test_overrides_of_a_length_ratio_come_out_as_a_pair(tmp_path: Path) -> None:
    found = load(write_suite(tmp_path), Overrides(thresholds=dict([parse_threshold("length_ratio=[0.5, 2]")])))
    assert found.thresholds_for("").length_ratio == (0.5, 2)


# --- mistakes -------------------------------------------------------------------------------------------------------

BAD_TOML = {
    # text appended to the four lines of SUITE_TOML -> (line and field, words of the message)
    "not-toml": ("[generation\n", "", "not valid TOML: .*line 5"),
    "twice": ("[run]\n[run]\n", "", "not valid TOML"),
    "unknown-table": ("[thresholdz]\n", ":5 [thresholdz]", "unknown key 'thresholdz'; known keys: .*thresholds"),
    "unknown-key": ('scorrer = "exact"\n', ":5 [suite.scorrer]", "unknown key 'scorrer'; known keys: .*scorer"),
    "unknown-threshold": ("[thresholds]\nalpha = 0.1\nmax = 1\n", ":7 [thresholds.max]", "unknown key 'max'"),
    "unknown-class-threshold": ("[thresholds.bf16]\nmax = 1\n", ":6 [thresholds.bf16.max]", "unknown key 'max'"),
    "unknown-class": ("[thresholds.int8]\n", ":5 [thresholds.int8]", "unknown key 'int8'"),
    "format-spelt-otherwise": ("[thresholds.e4m3-channel]\n", ":5 [thresholds.e4m3-channel]", "unknown key 'e4m3-channel'"),
    "format-of-all-three": (
        "[thresholds.e8m7-weights-activations-kv]\n", ":5 [thresholds.e8m7-weights-activations-kv]", "unknown key"
    ),
    "zero-tokens": ("[generation]\nmax_new_tokens = 0\n", ":6 [generation.max_new_tokens]", "0 is not allowed here"),
    "zero-batch": ("[generation]\nbatch_size = 0\n", ":6 [generation.batch_size]", "0 is not allowed here"),
    "float-batch": ("[generation]\nbatch_size = 8.0\n", ":6 [generation.batch_size]", "8.0 is not"),
    "text-batch": ('[generation]\nbatch_size = "8"\n', ":6 [generation.batch_size]", '"8" is not'),
    "no-mode": ("[run]\nnumerics = []\n", ":6 [run.numerics]", "not allowed here"),
    "mode-twice": ('[run]\nnumerics = ["bf16", "bf16"]\n', ":6 [run.numerics]", "not allowed here"),
    "limit-above-one": ("[thresholds]\nmax_divergent = 1.5\n", ":6 [thresholds.max_divergent]", "1.5 is not a count"),
    "limit-two-dot": ("[thresholds]\nmax_divergent = 2.0\n", ":6 [thresholds.max_divergent]", "2.0 is not a count"),
    "limit-negative": ("[thresholds]\nmax_divergent = -1\n", ":6 [thresholds.max_divergent]", "-1 is not a count"),
    "limit-nan": ("[thresholds]\nmax_unexplained = nan\n", ":6 [thresholds.max_unexplained]", "(?i)nan is not"),
    "drop-nan": ("[thresholds]\naccuracy_drop = nan\n", ":6 [thresholds.accuracy_drop]", "(?i)nan is not"),
    "alpha": ("[thresholds.bf16]\nalpha = 1.0\n", ":6 [thresholds.bf16.alpha]", "1.0 is not allowed here"),
    "ratio": ("[thresholds]\nlength_ratio = [1.0]\n", ":6 [thresholds.length_ratio]", "not allowed here"),
    "waiver": ('[thresholds]\nfp32_waiver = "some"\n', ":6 [thresholds.fp32_waiver]", "not one of: explained, all, none"),
    "engine-list": ("[engine]\nscript = []\n", ":6 [engine.script]", "not allowed here"),
}  # fmt: skip


@pytest.mark.parametrize(("extra", "place", "message"), BAD_TOML.values(), ids=BAD_TOML)
def test_a_bad_suite_is_told_with_file_line_and_field(tmp_path: Path, extra: str, place: str, message: str) -> None:
    folder = write_suite(tmp_path, SUITE_TOML + extra)
    with pytest.raises(ConfigError, match=message) as caught:
        load(folder)
    assert caught.value.where == f"{folder / 'suite.toml'}{place}"


@pytest.mark.parametrize(
    ("toml", "place", "message"),
    [
        ("", " [top level]", "'suite' is a required property"),
        ("suite = 3", ":1 [suite]", "3 is not allowed here"),
        ('[suite]\nname = "s"\nprompts = "p"', ":1 [suite]", "'model' is a required property"),
        (SUITE_TOML.replace('"s"', '"a/b"'), ":2 [suite.name]", '"a/b" is not allowed here'),
        (SUITE_TOML.replace('"s"', "3"), ":2 [suite.name]", "3 is not allowed here"),
        (SUITE_TOML.replace('"m"', '""'), ":3 [suite.model]", '"" is not allowed here'),
    ],
    ids=["empty", "no-table", "no-model", "slash-in-name", "number-as-name", "empty-model"],
)
def test_a_bad_head(tmp_path: Path, toml: str, place: str, message: str) -> None:
    folder = write_suite(tmp_path, toml)
    with pytest.raises(ConfigError, match=message) as caught:
        load(folder)
    assert caught.value.where == f"{folder / 'suite.toml'}{place}"


def test_a_bad_default_is_told_as_well(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="0 is not allowed here") as caught:
        load(write_suite(tmp_path), defaults={"generation": {"batch_size": 0}})
    assert "[generation.batch_size]" in caught.value.where


def test_no_such_suite(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file") as caught:
        load(tmp_path / "nowhere")
    assert caught.value.where == str(tmp_path / "nowhere" / "suite.toml") and "suite.toml" in caught.value.fix


@pytest.mark.parametrize("name", ["suite.toml", "prompts.jsonl"])
def test_files_that_are_not_text(tmp_path: Path, name: str) -> None:
    folder = write_suite(tmp_path)
    (folder / name).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        load(folder)
    assert caught.value.where == str(folder / name)


GOOD = '{"id": "p01", "prompt": "Hello"}'
BAD_PROMPTS = {
    "empty-file": ("", "", "the suite is empty"),
    "blank-lines": ("\n  \n", "", "the suite is empty"),
    "not-json": (f"{GOOD}\n{{id: 1}}", ":2", "not valid JSON"),
    "key-twice": (f'{GOOD}\n{{"id": "p02", "prompt": "One", "prompt": "Two"}}', ":2", "'prompt' stands twice"),
    "cut-off": (f'{GOOD}\n\n{{"id": "p02", "prompt": "He', ":3", "not valid JSON"),
    "nested-too-deep": ("[" * 100_000, ":1", "not valid JSON"),
    "not-an-object": ("[1]", ":1", "not allowed here: type object"),
    "no-id": ('{"prompt": "x"}', ":1", "'id' is a required property"),
    "id-is-a-number": ('{"id": 1, "prompt": "x"}', ":1 [id]", "1 is not allowed here"),
    "id-with-a-colon": ('{"id": "a::b", "prompt": "x"}', ":1 [id]", '"a::b" is not allowed here'),
    "unknown-key": ('{"id": "p", "promt": "x"}', ":1", "unknown key 'promt'; known keys: .*prompt"),
    "duplicate": (f"{GOOD}\n\n{GOOD}", ":3", "duplicate id 'p01', first used on line 1"),
    "both": ('{"id": "p", "prompt": "x", "messages": [{"role": "user", "content": "x"}]}', ":1", 'either "prompt" or'),
    "neither": ('{"id": "p"}', ":1", 'either "prompt" or "messages"'),
    "empty-prompt": ('{"id": "p", "prompt": ""}', ":1 [prompt]", '"" is not allowed here'),
    "no-messages": ('{"id": "p", "messages": []}', ":1 [messages]", "not allowed here"),
    "no-content": ('{"id": "p", "messages": [{"role": "user"}]}', ":1 [messages.0]", "'content' is a required"),
    "number-as-answer": ('{"id": "p", "prompt": "x", "answer": 5}', ":1 [answer]", "5 is not allowed here"),
    **{
        f"reserved-{name}": (json.dumps({"id": name, "prompt": "x"}), ":1 [id]", "taken by a check of the whole suite")
        for name in ("golden", "compute", "accuracy", "length")
    },
}


@pytest.mark.parametrize(("text", "place", "message"), BAD_PROMPTS.values(), ids=BAD_PROMPTS)
def test_bad_prompts_are_told_with_their_line(tmp_path: Path, text: str, place: str, message: str) -> None:
    folder = write_suite(tmp_path, prompts=text)
    with pytest.raises(ConfigError, match=message) as caught:
        load(folder)
    assert caught.value.where == f"{folder / 'prompts.jsonl'}{place}"


@pytest.mark.parametrize("char", ["\u2028", "\u2029", "\x85"], ids=["u2028", "u2029", "u0085"])
def test_only_a_newline_ends_a_line_of_prompts(tmp_path: Path, char: str) -> None:
    """These stand unescaped in JSON strings, and end a line for `str.splitlines`."""
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"id": "p", "prompt": f"a{char}b"}, ensure_ascii=False) + "\n", "utf-8")
    assert load_prompts(file) == (Prompt("p", f"a{char}b"),)


def test_a_long_bad_value_is_not_printed_whole(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(write_suite(tmp_path, prompts=json.dumps({"id": "p", "prompt": "x", "answer": ["secret"] * 500})))
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


@pytest.mark.parametrize(
    "name", ["../outside.jsonl", "sub/../../outside.jsonl", "{absolute}", "link.jsonl", "linked/o.jsonl"]
)
def test_no_path_leaves_the_folder(tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside.jsonl"
    outside.write_text(GOOD)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "o.jsonl").write_text(GOOD)
    spelt = name.format(absolute=outside)
    folder = write_suite(tmp_path / "s", SUITE_TOML.replace("prompts.jsonl", spelt))
    (folder / "link.jsonl").symlink_to(outside)
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="leaves the suite's folder") as caught:
        load(folder)
    assert caught.value.where == f"{folder / 'suite.toml'}:4 [suite.prompts]" and repr(spelt) in str(caught.value)


def test_an_absolute_path_is_refused_even_into_the_folder(tmp_path: Path) -> None:
    folder = write_suite(tmp_path, SUITE_TOML.replace("prompts.jsonl", str(tmp_path / "prompts.jsonl")))
    with pytest.raises(ConfigError, match="leaves the suite's folder"):
        load(folder)


def test_a_path_within_the_folder_may_be_a_link(tmp_path: Path) -> None:
    folder = write_suite(tmp_path, SUITE_TOML.replace("prompts.jsonl", "sub/link.jsonl"))
    (folder / "sub").mkdir()
    (folder / "sub" / "link.jsonl").symlink_to(folder / "prompts.jsonl")
    assert [p.id for p in load(folder).prompts] == ["p01"]


@pytest.mark.parametrize(
    "name", [".", "nowhere.jsonl", "\\u0000", "loop.jsonl"], ids=["folder", "absent", "nul", "loop"]
)
def test_prompts_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    folder = write_suite(tmp_path, SUITE_TOML.replace("prompts.jsonl", name))
    (folder / "loop.jsonl").symlink_to(folder / "loop.jsonl")
    with pytest.raises(ConfigError):
        load(folder)


# --- small parts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("max_divergent=1", ("max_divergent", 1)),
        ("max_divergent=1.0", ("max_divergent", 1.0)),
        (" max_divergent = 0.5 ", ("max_divergent", 0.5)),
        ("alpha=0.01", ("alpha", 0.01)),
        ("length_ratio=[0.5, 2.0]", ("length_ratio", [0.5, 2.0])),
        ("fp32_waiver=all", ("fp32_waiver", "all")),
        ('fp32_waiver="none"', ("fp32_waiver", "none")),
    ],
)
def test_parse_threshold(text: str, wanted: tuple[str, Any]) -> None:
    found = parse_threshold(text)
    assert found == wanted and type(found[1]) is type(wanted[1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_divergent", "is not NAME=VALUE"),
        ("max_divergent=", "is not a count"),
        ("max_divergent=many", "is not a count"),
        ("max_divergent=-1", "is not a count"),
        ("max_divergent=2.0", "is not a count"),
        ("max_unexplained=nan", "(?i)nan is not"),
        ("max_divergent=true", "is not a count"),
        ("alpha=2", "2 is not allowed here"),
        ("fp32_waiver=some", "not one of"),
        ("no_such=1", "unknown key 'no_such'"),
        ("", "is not NAME=VALUE"),
    ],
)
def test_bad_thresholds(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_threshold(text)
    assert caught.value.where.startswith("--repro-threshold")


@pytest.mark.parametrize(
    ("prompts", "size", "wanted"),
    [(5, 2, [(0, 1), (2, 3), (4,)]), (4, 2, [(0, 1), (2, 3)]), (2, 8, [(0, 1)]), (2, 1, [(0,), (1,)])],
    ids=["a-rest", "even", "one", "single"],
)
def test_batches(prompts: int, size: int, wanted: list[tuple[int, ...]]) -> None:
    assert list(suite(*map(str, range(prompts)), batch_size=size).batches()) == wanted


def test_the_nearest_pyproject_with_a_table_counts(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[tool.pytest-repro.thresholds]\nalpha = 0.5\n")
    inner = tmp_path / "golden"
    inner.mkdir()
    for none in ("", "tool = 3", "[tool.other]"):
        (inner / "pyproject.toml").write_text(none)
        assert defaults_around(inner) == (tmp_path / "pyproject.toml", {"thresholds": {"alpha": 0.5}})
    for bad in ("[tool.pytest-repro.thresholds]\nalpha = 2", "[tool]\npytest-repro = 3", "["):
        (inner / "pyproject.toml").write_text(bad)
        with pytest.raises(ConfigError) as caught:
            defaults_around(inner)
        assert caught.value.where.startswith(str(inner / "pyproject.toml"))


# --- shards ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "batch_size", "count"), [(7, 2, 3), (8, 2, 3), (1, 8, 4), (10, 1, 10), (5, 5, 1)])
def test_shards_deal_out_whole_batches_in_turn(size: int, batch_size: int, count: int) -> None:
    of = suite(*(f"p{i}" for i in range(size)), batch_size=batch_size)
    whole, shards = list(of.batches()), [Shard(i + 1, count) for i in range(count)]
    for shard in shards:
        mine = of.batches_of(shard)
        assert mine == [batch for k, batch in enumerate(whole) if k % count + 1 == shard.index]
        assert shard.share(size, batch_size) == len(of.prompts_of(shard)) == sum(map(len, mine))
        assert [of.prompts[i] for i in shard.places(size, batch_size)] == list(of.prompts_of(shard))
    assert sorted(batch for shard in shards for batch in of.batches_of(shard)) == whole
    assert of.batches_of(None) == whole and of.prompts_of(None) == of.prompts


def test_the_digest_of_prompts_knows_questions_and_answers() -> None:
    assert suite("a", "b").digest_of_prompts() == suite("a", "b", batch_size=1).digest_of_prompts()
    others = [suite("a"), suite("b", "a"), suite("a", "b", answers={"a": "1"})]
    assert len({of.digest_of_prompts() for of in [suite("a", "b"), *others]}) == 4


@pytest.mark.parametrize("text", ["1/1", "1/3", "3/3", "999999/999999"])
def test_a_shard_as_it_is_typed(text: str) -> None:
    assert str(parse_shard(text)) == text


@pytest.mark.parametrize(
    "text",
    ["", "1", "/", "0/3", "4/3", "a/b", "1/0", "1/3/2", "-1/3", "+1/3", "01/3", " 1/3", "1/3\n", "1 / 3", "1.0/3", "١/٣",
     "¹/³", "1/" + "9" * 5000],
)  # fmt: skip
def test_what_is_no_shard(text: str) -> None:
    with pytest.raises(ConfigError) as told:
        parse_shard(text)
    assert "1 <= i <= n" in told.value.what and told.value.fix
