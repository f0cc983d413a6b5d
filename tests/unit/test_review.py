"""What a reviewer is shown: judged from the two goldens, whatever the candidate says of itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pytest_repro import golden as wire
from pytest_repro.candidate import with_notes
from pytest_repro.errors import GoldenError
from pytest_repro.golden import Golden
from pytest_repro.noise import Calibration, Envelope
from pytest_repro.review import changes, notes_on
from pytest_repro.store import PENDING, Place
from tests.unit.builders import envelope, f32, generation, golden, output, variant, write_suite

OLD = golden(generation(output("a", [1, 2, 3], gap=[1, 0.5, 1]), output("b", [4, 5])))
NEW = golden(generation(output("a", [1, 9, 3]), output("b", [4, 5])))
"""`a` takes another token; how far behind the golden's was, no file says."""


def noted(**says: Any) -> Golden:
    """NEW, whose notes say something else of `a`."""
    made = with_notes(NEW, OLD)
    assert made.candidate is not None
    first, *others = made.candidate["prompts"]
    return replace(made, candidate={**made.candidate, "prompts": [{**first, **says}, *others]})


def test_what_the_run_watched_is_taken_and_named_as_such() -> None:
    assert notes_on(noted(), OLD)["a"]["deficit"] is None
    seen = notes_on(noted(deficit=0.125), OLD)
    assert (seen["a"]["verdict"], seen["a"]["deficit"], seen["a"]["claimed"]) == ("near_tie", 0.125, True)
    assert (seen["b"]["verdict"], seen["b"]["claimed"]) == ("identical", False)


@pytest.mark.parametrize(
    "says",
    [
        {"verdict": "identical", "reason": ""},
        {"divergence_index": None, "verdict": "identical", "reason": ""},
        {"deficit": 3.5, "verdict": "near_tie", "reason": "rounding explains it"},
        {"golden_gap": 0.0, "mean_abs_dlogp": 0.0, "verdict": "near_tie"},
    ],
)
def test_a_verdict_in_the_notes_is_not_believed(says: dict[str, Any]) -> None:
    """Whoever offers a candidate can write its notes; the two goldens say what differs, and the envelope how far."""
    seen = notes_on(noted(**says), OLD)["a"]
    assert (seen["verdict"], seen["divergence_index"], seen["golden_gap"]) == ("drift", 1, 0.5)
    assert seen["reason"].startswith(("its deficit is unknown", "the deficit 3.5 exceeds"))


def test_a_deficit_that_the_files_hold_needs_no_notes() -> None:
    old = golden(generation(output("a", [1, 9, 3], gap=[1, 0.5, 1], runner_up=[7, 2, 7]), output("b", [4, 5])))
    new = golden(generation(output("a", [1, 2, 3], gap=[1, 2, 1], runner_up=[7, 9, 7]), output("b", [4, 5])))
    made = with_notes(new, old)
    assert made.candidate is not None and made.candidate["prompts"][0]["deficit"] == 2
    lied = {**made.candidate["prompts"][0], "deficit": 0.0, "verdict": "near_tie"}
    told = replace(made, candidate={**made.candidate, "prompts": [lied]})
    assert (notes_on(told, old)["a"]["verdict"], notes_on(told, old)["a"]["deficit"]) == ("drift", 2)


@pytest.mark.parametrize(
    "note",
    [{"deficit": -1.0}, {"deficit": "none"}, {"divergence_index": 1.5}, {"shown": "so"}, {"verdict": None}],
    ids=lambda note: next(iter(note)),
)
def test_notes_have_a_form(note: dict[str, Any]) -> None:
    with pytest.raises(GoldenError, match=next(iter(note))):
        wire.decode(*wire.encode(noted(**note)), "golden/s/bf16.pending.jsonl")


def levels(*of_prompts: float) -> Golden:
    return replace(
        OLD, noise=Envelope("bf16", (variant(max_abs_dlogp=64.0),), f32(of_prompts), f32([0.125] * len(of_prompts)))
    )


@pytest.mark.parametrize(("now", "told"), [((0.5, 2.0), ["level of prompt b"]), ((0.5, 0.7), []), ((0.01, 0.01), [])])
def test_one_prompts_level_that_grew_much_is_named(tmp_path: Path, now: tuple[float, float], told: list[str]) -> None:
    """The largest of all may stay as it was while one prompt's grows."""
    folder = write_suite(tmp_path / "s")
    Place(folder, "bf16").write(levels(0.5, 0.5))
    pending = Place(folder, "bf16", PENDING)
    pending.write(with_notes(levels(*now), levels(0.5, 0.5)))
    found = changes(pending)
    assert [grown["measure"] for grown in found["envelope_grew"]] == told
    assert any("level of prompt b 0.5 -> 2" in line for line in found["head"]) is bool(told)


@pytest.mark.parametrize(
    ("now", "told"),
    [
        ([0.125] * 5, []), ([0.15] * 5, []), ([9.0, 9.0, 0.1, 0.1, 0.1], []),
        ([0.1, 0.1, 0.2, 0.2, 0.2], ["benign change of gaps"]),
        ([0.1, 0.1, 0.1, 0.1, float("nan")], ["benign change of gaps, not known any more:"]),
    ],
    ids=["as it was", "a little more", "two prompts", "the median prompt", "unknown"],
)  # fmt: skip
def test_a_benign_level_of_gaps_that_grew_is_named(tmp_path: Path, now: list[float], told: list[str]) -> None:
    """A whole suite is held against it, by its median prompt."""
    folder = write_suite(tmp_path / "s")
    old = golden(generation(*(output(name, [1, 2]) for name in "abcde")), noise=envelope(5, max_abs_dgap=16.0))
    new = replace(old, noise=replace(old.noise, gap_level=f32(now)))
    Place(folder, "bf16").write(old)
    pending = Place(folder, "bf16", PENDING)
    pending.write(with_notes(new, old))
    found = changes(pending)
    assert [grown["measure"] for grown in found["envelope_grew"]] == told
    assert any("the noise envelope grew: benign change of gaps" in line for line in found["head"]) is bool(told)


# --- calibrations ---------------------------------------------------------------------------------------------------


def machine(name: str, *, levels: float = 0.125, largest: float = 0.25, day: int = 1) -> Calibration:
    known = Envelope("bf16", (variant("replay", max_abs_dgap=largest),), f32([0.5, 0.5]), f32([levels] * 2))
    here = {"engine": "scripted", "engine_version": "1.0", "batch_size": 4}
    return Calibration({**here, "cpu_model": name, "host": name, "time": f"2026-12-0{day}"}, known)


def beside(tmp_path: Path, old: Golden, new: Golden) -> dict[str, Any]:
    folder = write_suite(tmp_path / "s")
    Place(folder, "bf16").write(old)
    pending = Place(folder, "bf16", PENDING)
    pending.write(with_notes(replace(new, review=None), old))
    return changes(pending)


def test_a_calibration_is_shown_beside_the_recording_and_what_it_replaces(tmp_path: Path) -> None:
    old = replace(OLD, calibrations=(machine("x"), machine("y")))
    found = beside(tmp_path, old, replace(OLD, calibrations=(machine("x", levels=0.15, day=2), machine("z"))))
    assert [(c["state"], c["fingerprint"]["host"]) for c in found["calibrations"]] == [
        ("replaced", "x"),
        ("added", "z"),
    ]
    assert found["calibrations"][0]["beside_recording"]["gap_level"]["median"] == pytest.approx(1.2)
    assert [c["field"] for c in found["calibrations"][1]["differs"]] == ["cpu_model"]
    head = "\n".join(found["head"])
    assert "calibration replaced  2026-12-02, host x, x" in head and "gaps 1.2 times the one it replaces: level" in head
    assert found["envelope_grew"] == [] and "dropped" not in head


@pytest.mark.parametrize(
    ("now", "told"),
    [
        (machine("x"), []),
        (machine("x", levels=0.2), ["benign change of gaps"]),
        (machine("x", largest=0.5), ["max_deficit"]),
    ],
    ids=["as the recording", "levels", "the largest"],
)
def test_a_calibration_wider_than_the_recording_is_named(tmp_path: Path, now: Calibration, told: list[str]) -> None:
    found = beside(tmp_path, OLD, replace(OLD, calibrations=(now,)))
    assert [grown["measure"].partition("recording: ")[2] for grown in found["envelope_grew"]] == told
    assert all(grown["measure"].startswith("on x, calibrated 2026-12-01, wider than in the recording") for grown in found["envelope_grew"])  # fmt: skip


def test_one_that_grew_since_it_was_calibrated_is_named_too(tmp_path: Path) -> None:
    old = replace(OLD, calibrations=(machine("x", levels=0.0625),))
    found = beside(tmp_path, old, replace(OLD, calibrations=(machine("x", day=2),)))
    assert [grown["measure"] for grown in found["envelope_grew"]] == [
        "on x, calibrated 2026-12-02, wider than it was calibrated before: benign change of gaps"
    ]


def test_calibrations_of_another_generation_are_dropped_and_named(tmp_path: Path) -> None:
    found = beside(tmp_path, replace(OLD, calibrations=(machine("x"),)), NEW)
    assert [c["state"] for c in found["calibrations"]] == ["dropped"]
    assert any(line.startswith("calibration dropped  2026-12-01, host x") for line in found["head"])
