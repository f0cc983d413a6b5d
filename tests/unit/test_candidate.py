from __future__ import annotations

from dataclasses import replace

import pytest

from pytest_repro.candidate import of_parts, with_notes
from pytest_repro.generation import Output
from pytest_repro.golden import Part
from tests.unit.builders import generation, golden, output

BEFORE = golden(generation(output("a", [1, 2, 3], gap=[1, 0.5, 1]), output("b", [4])), digest="sha256:before")
AFTER = golden(generation(output("a", [1, 9]), output("c", [5])), digest="sha256:after")


def test_the_first_candidate_replaces_nothing() -> None:
    noted = with_notes(BEFORE, None)
    assert noted.candidate == {"against": None, "prompts": []}


@pytest.mark.parametrize(
    ("now", "wanted"),
    [
        (output("a", [1, 2, 3], logprob=[-0.5, -0.5, -1.25]), ("identical", None, 0.0, None, 0.25)),
        (output("a", [1, 9], watched=[-0.5, -0.75]), ("near_tie", 1, 0.25, 0.5, 0.125)),
        (output("a", [1, 9], watched=[-0.5, -1.0]), ("drift", 1, 0.5, 0.5, 0.25)),
        (output("a", [1, 9]), ("drift", 1, None, 0.5, 0.0)),
        (output("a", [1, 2, 3], logprob=[-2.0] * 3), ("drift", None, 0.0, None, 1.5)),
        (output("a", [1, 2]), ("drift", 2, None, None, 0.0)),
    ],
    ids=["identical", "near-tie", "drift", "unknown-deficit", "moved-as-a-whole", "shorter"],
)
def test_each_prompt_is_judged_against_the_golden_it_would_replace(now: Output, wanted: tuple) -> None:
    noted = with_notes(golden(generation(now, output("b", [4]))), BEFORE).candidate
    assert noted is not None and noted["against"] == "sha256:before"
    row, other = noted["prompts"]
    names = ("verdict", "divergence_index", "deficit", "golden_gap", "mean_abs_dlogp")
    assert row["id"] == "a" and tuple(row[name] for name in names) == wanted
    assert (other["id"], other["verdict"]) == ("b", "identical")
    assert bool(row["reason"]) is (wanted[0] != "identical")


def test_prompts_that_come_and_go() -> None:
    noted = with_notes(golden(generation(output("new", [1]), output("b", [4]))), BEFORE).candidate
    assert noted is not None
    assert [(p["id"], p["verdict"]) for p in noted["prompts"]] == [("b", "identical"), ("new", "new"), ("a", "removed")]
    none_alike = with_notes(golden(generation(output("z", [1]))), BEFORE).candidate
    assert none_alike is not None and [p["verdict"] for p in none_alike["prompts"]] == ["new", "removed", "removed"]


def test_fp32_waives_nothing_in_a_review() -> None:
    now = golden(generation(output("a", [1, 9], watched=[-0.5, -0.75])), compute_class="fp32")
    noted = with_notes(now, BEFORE).candidate
    assert noted is not None and noted["prompts"][0]["verdict"] == "near_tie"


def test_parts_bring_what_they_saw_while_recording() -> None:
    """A deficit that was watched stands in no file; a note against another golden is not believed."""
    names = [note["id"] for note in (with_notes(AFTER, BEFORE).candidate or {})["prompts"]]
    first = AFTER.generation.ids[0]
    told = {"id": first, "verdict": "drift", "deficit": 3.5}
    notes = {"against": BEFORE.digest, "prompts": [told]}
    here, elsewhere = replace(AFTER, candidate=notes), replace(AFTER, candidate={**notes, "against": "sha256:x"})
    found = (of_parts(AFTER, [here], BEFORE).candidate or {})["prompts"]
    assert [note["id"] for note in found] == names and told in found
    assert of_parts(AFTER, [elsewhere], BEFORE).candidate == {
        **(with_notes(AFTER, BEFORE).candidate or {}), "parts": [AFTER.digest],
    }  # fmt: skip


def test_a_part_removes_nothing() -> None:
    part = Part(1, 2, 9, "sha256:p", "exact")
    notes = (with_notes(replace(AFTER, part=part), BEFORE).candidate or {})["prompts"]
    assert "removed" not in {note["verdict"] for note in notes}
