"""A ladder on a tiny model: whole, resumed, as the command, and refused where it would compare what cannot be compared."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from typer.testing import CliRunner

from pytest_repro import asking, descent, ladder, recording, store, suite
from pytest_repro.cli import app
from pytest_repro.descent import Plan
from pytest_repro.engines.departures import References
from pytest_repro.engines.transformers import TransformersEngine
from pytest_repro.errors import ConfigError, EngineError, GoldenMissing
from pytest_repro.generation import Request
from pytest_repro.numerics.formats import parse

from .tiny import build

MODES = ("e8m23", "e8m10", "e8m7", "e4m3", "e2m1")
TOML = """
[suite]
name = "tiny"
model = "{model}"
prompts = "prompts.jsonl"
scorer = "exact"
[generation]
max_new_tokens = 12
batch_size = 4
[run]
numerics = ["fp32"]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tiny(model: Path, tmp_path_factory: pytest.TempPathFactory) -> suite.Suite:
    """A suite with a reviewed fp32 golden, whose right answers are the golden's own for all but the last prompt."""
    folder = tmp_path_factory.mktemp("golden") / "tiny"
    folder.mkdir()
    (folder / "suite.toml").write_text(TOML.format(model=model))
    asked = [{"id": f"p{n}", "prompt": f"Count to {n}, then go on"} for n in range(6)]
    write(folder, asked)
    with asking.live(suite.load(folder), "fp32", asking.Options(), asking.Silent()) as engine:
        plain = suite.load(folder)
        for prompt, place in zip(asked, plain.prompts, strict=True):
            tokens = np.asarray(engine.encode(place), np.int32)
            prompt["answer"] = engine.generate([Request(place.id, tokens, place.content)])[0].text.strip()
    asked[-1]["answer"] = "something else"
    write(folder, asked)
    found = suite.load(folder)
    recording.record(found, "fp32", asking.Options())
    store.accept(store.Place(folder, "fp32", store.PENDING), store.Reviewer("Ada", "a test's own"))
    return found


def write(folder: Path, prompts: list[dict[str, str]]) -> None:
    (folder / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))


def plan(*modes: str, decoded: bool = True) -> Plan:
    return Plan(tuple(parse(m) for m in modes), frozenset(modes) if decoded else frozenset())


@pytest.fixture(scope="module")
def walked(tiny: suite.Suite, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[ladder.Rung]]:
    out = tmp_path_factory.mktemp("out")
    return out, descent.descend(tiny, plan(*MODES), out, asking.Silent())


def test_float32_stays_with_the_golden_and_fewer_bits_lead_away(walked: tuple[Path, list[ladder.Rung]]) -> None:
    rungs = walked[1]
    assert [r.mode for r in rungs] == list(MODES)
    first = rungs[0]
    assert (first.divergent, first.mean_abs_dlogp, first.mean_kl, first.flipped) == (0, 0.0, 0.0, 0.0)
    kl = [r.mean_kl for r in rungs]
    assert kl == sorted(kl) and kl[1] > 0 and not any(r.errors for r in rungs)
    assert rungs[-1].divergent == 6 and [r.divergent for r in rungs] == sorted(r.divergent for r in rungs)
    assert ladder.left_at(rungs) == next(r for r in rungs if r.divergent)


def test_accuracy_is_of_what_was_decoded(walked: tuple[Path, list[ladder.Rung]]) -> None:
    first, *_, last = walked[1]
    assert first.accuracy is not None and last.accuracy is not None
    assert first.accuracy["n"] == 6 and first.accuracy["golden"] == first.accuracy["now"] == pytest.approx(500 / 6)
    assert last.accuracy["now"] == 0 and last.accuracy["lost"] == 5, "no prompt of a random model survives four bits"
    assert last.accuracy["p_value"] == pytest.approx(0.5**5)


def test_where_a_prompt_leaves_is_where_decoding_leaves(
    tiny: suite.Suite, walked: tuple[Path, list[ladder.Rung]]
) -> None:
    """Replay's first divergence against texts that were generated: they agree up to it, and part at it."""
    rung = walked[1][3]
    golden = descent.fp32_golden(tiny).generation
    with asking.live(tiny, "e4m3", asking.Options(), asking.Silent()) as engine:
        for name, index in rung.indices.items():
            prompt = next(p for p in tiny.prompts if p.id == name)
            request = Request(name, np.asarray(engine.encode(prompt), np.int32), prompt.content)
            now = engine.generate([request])[0].tokens
            then = golden.tokens[golden.span(golden.index()[name])]
            np.testing.assert_array_equal(now[:index], then[:index])
            assert len(now) <= index or now[index] != then[index]


def test_what_is_done_is_not_done_again(
    tiny: suite.Suite, walked: tuple[Path, list[ladder.Rung]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rungs = walked
    before = (out / descent.FILE).read_bytes()
    monkeypatch.setattr(asking, "live", None)  # opening an engine would fail
    told: list[ladder.Rung] = []
    assert descent.descend(tiny, plan(*MODES), out, asking.Silent(), told.append) == rungs == told
    assert (out / descent.FILE).read_bytes() == before


def test_a_walk_that_stopped_goes_on(tiny: suite.Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def stop(rung: ladder.Rung) -> None:
        seen.append(rung.mode)
        if rung.mode == "e8m7":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        descent.descend(tiny, plan("e8m10", "e8m7", "e2m1", decoded=False), tmp_path, asking.Silent(), stop)
    assert seen == ["e8m10", "e8m7"]
    done: list[str] = []
    original = TransformersEngine.in_format
    monkeypatch.setattr(TransformersEngine, "in_format", lambda self, e: done.append(e.name) or original(self, e))
    found = descent.descend(tiny, plan("e8m10", "e8m7", "e2m1", decoded=False), tmp_path, asking.Silent())
    assert done == ["e2m1"] and [r.mode for r in found] == ["e8m10", "e8m7", "e2m1"]
    assert not any(r.accuracy for r in found)


def test_logits_that_do_not_fit_are_computed_anew_to_the_same_numbers(
    tiny: suite.Suite, walked: tuple[Path, list[ladder.Rung]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pytest_repro.engines.transformers.References", lambda: References(most=0))
    found = descent.descend(tiny, plan("e4m3", "e2m1", decoded=False), tmp_path, asking.Silent())
    for rung, kept in zip(found, (walked[1][3], walked[1][4]), strict=True):
        assert (rung.mean_kl, rung.mean_abs_dlogp, rung.indices) == (kept.mean_kl, kept.mean_abs_dlogp, kept.indices)


def test_two_walks_do_not_share_a_folder(tiny: suite.Suite, tmp_path: Path) -> None:
    with FileLock(tmp_path / ".lock"), pytest.raises(ConfigError, match="another ladder is being walked there"):
        descent.descend(tiny, plan("e4m3"), tmp_path, asking.Silent())


def test_a_place_that_is_no_folder_is_told_before_anything_is_loaded(
    tiny: suite.Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(asking, "live", None)
    with pytest.raises(ConfigError, match="no folder to write to"):
        descent.descend(tiny, plan("e4m3"), tmp_path / "file", asking.Silent())


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(tiny: suite.Suite, tmp_path: Path) -> Iterator[Any]:
    threads = torch.get_num_threads()

    def run(*options: str) -> Any:
        return CliRunner().invoke(app, ["ladder", str(tiny.folder), "--out", str(tmp_path / "out"), *options])

    yield run
    torch.set_num_threads(threads)


def test_the_command_leaves_table_figure_and_rungs(command: Any, tmp_path: Path) -> None:
    found = command("--formats", "e2m1, e4m3", "--at-mantissa", "1")
    assert found.exit_code == 0, found.output
    assert "the model leaves its golden at" in found.output
    assert "δ" in found.output and "R²" in found.output
    table = (tmp_path / "out" / "ladder.md").read_text().splitlines()
    assert table[0].startswith("| format | known as | bits | divergent | first at token |")
    names = [row.split("|")[1].strip() for row in table[2:]]
    assert names == ["e4m7", "e4m5", "e8m1", "e4m3", "e4m2", "e5m1", "e4m1", "e3m1", "e2m1"]
    assert " % | " in next(row for row in table if row.startswith("| e4m3 "))
    assert " % | " not in next(row for row in table if row.startswith("| e4m7 ")), "the curves' rungs are not decoded"
    assert "the golden's accuracy: 83.3 %; over 6 prompts a drop of 83.3 points can be shown" in found.output
    assert (tmp_path / "out" / "ladder.svg").read_text().startswith("<svg ")
    again = command("--formats", "e4m3,e2m1", "--at-mantissa", "1", "--as-json")
    data = json.loads(again.stdout)
    assert [r["mode"] for r in data["rungs"]] == names
    assert data["curves"][0] == {"varied": "mantissa", "fixed": 4, "modes": ["e4m1", "e4m2", "e4m3", "e4m5", "e4m7"]}


def test_targets_and_scale_are_part_of_every_rung(command: Any) -> None:
    options = (
        "--formats",
        "e4m3,e8m7",
        "--no-curves",
        "--no-accuracy",
        "--targets",
        "kv,weights",
        "--scale",
        "block16",
    )
    found = command(*options, "--as-json")
    assert found.exit_code == 0, found.output
    assert [r["mode"] for r in json.loads(found.stdout)["rungs"]] == [
        "e8m7-weights-kv-block16",
        "e4m3-weights-kv-block16",
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--formats", "fp8"), "'fp8' is not the name of a format"),
        (("--formats", "e9m1"), "1 to 8 exponent"),
        (("--formats", ","), "no format is named"),
        (("--targets", "biases"), "'biases' says nothing of a format"),
        (("--scale", "row"), "'row' says nothing of a format"),
        (("--engine-option", "colour=red"), "unknown key 'colour'"),
        (("--engine", "vllm"), "the engine vllm emulates no floating-point formats"),
    ],
)
def test_a_mistake_is_told_before_anything_is_loaded(
    command: Any, options: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "live", None)
    found = command(*options)
    assert found.exit_code == 2 and said in found.output and "Traceback" not in found.output


# --- what cannot be compared ----------------------------------------------------------------------------------------


def test_without_an_fp32_golden_there_is_no_ladder(tiny: suite.Suite, tmp_path: Path) -> None:
    for name in ("suite.toml", "prompts.jsonl"):
        (tmp_path / name).write_bytes((tiny.folder / name).read_bytes())
    with pytest.raises(GoldenMissing, match="there is no fp32 golden") as missing:
        descent.descend(suite.load(tmp_path), plan("e4m3"), tmp_path / "out", asking.Silent())
    assert "--repro-update" in missing.value.fix


def test_another_models_golden_is_refused(tiny: suite.Suite, tmp_path: Path) -> None:
    other = build(tmp_path / "other", seed=7)
    with pytest.raises(ConfigError, match=r"6 prompts cannot be compared .* model\.weights"):
        descent.descend(
            suite.apply(tiny, suite.Overrides(model=str(other))), plan("e4m3"), tmp_path / "out", asking.Silent()
        )


def test_an_engine_that_emulates_nothing_is_refused(tiny: suite.Suite, tmp_path: Path) -> None:
    (tiny.folder / "script.jsonl").write_text('{"id": "p0", "tokens": [1]}\n')
    scripted = suite.apply(tiny, suite.Overrides(engine="scripted", engine_options={"script": "script.jsonl"}))
    with pytest.raises(EngineError, match="the engine scripted emulates no floating-point formats"):
        descent.descend(scripted, plan("e4m3"), tmp_path / "out", asking.Silent())


HEADER = '{"schema": 1, "kind": "ladder", "suite": "tiny", "golden": "x", "settings": "y"}\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "jsonl:1: not JSON"),
        ("not JSON\n", "jsonl:1: not JSON"),
        ('{"suite": "tiny"}\n', "jsonl:1: 'golden' is a required property"),
        (HEADER, "it holds another ladder"),
        (HEADER + '{"mode": ', "jsonl:2: not JSON"),
        (HEADER + '{"mode": "e4m3"}\n', "jsonl:2: 'accuracy' is a required property"),
        (HEADER + '{"known_as": "\\u001b[2J"}\n', "jsonl:2: "),
    ],
)
def test_rungs_of_another_ladder_are_not_mixed_in(tiny: suite.Suite, tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / descent.FILE).write_text(text)
    with pytest.raises(ConfigError, match=said) as refused:
        descent.descend(tiny, plan("e4m3"), tmp_path, asking.Silent())
    assert refused.value.fix and (tmp_path / descent.FILE).read_text() == text
