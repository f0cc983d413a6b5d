from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pytest_repro import golden as wire
from pytest_repro.generation import digest
from pytest_repro.golden import Agreed, Golden, Review, encode
from pytest_repro.provenance import Finding, Step, Version, limits, loosened_since, of_branch, with_origins
from pytest_repro.suite import Thresholds
from tests.unit.builders import REVIEW, generation, golden, output

PATH = "golden/s/bf16.golden.jsonl"


def version(token: int, previous: Version | None = None, **changes: Any) -> Version:
    """A golden whose one answer is this token, accepted in the place of another version."""
    base = golden(generation(output("a", [token], logprob=[-token / 8])), **changes)
    review = None if changes.get("review", REVIEW) is None else replace(REVIEW, previous=digest_of(previous))
    return Version(*encode(replace(base, review=review)))


def digest_of(found: Version | None) -> str | None:
    return None if found is None or found.text is None else wire.sealed(found.text, PATH).digest


FIRST = version(1)
SECOND = version(2, FIRST)
THIRD = version(3, SECOND)


def step(before: Version | None, after: Version | None, *more: Version | None, **changes: Any) -> Step:
    return replace(Step("abc", PATH, (before, *more), after), **changes)


def findings(*steps: Step) -> list[Finding]:
    """Of a branch whose base has what the first step of each path changes, and HEAD what the last one leaves."""
    base = {s.path: s.before[0] for s in reversed(steps) if s.before}
    head = {s.path: s.after for s in steps}
    there = ({path: v for path, v in of.items() if v is not None} for of in (base, head))
    return list(of_branch(steps, *there, name="main", commit="abc"))


def kinds(*steps: Step) -> list[str]:
    return [finding.kind for finding in findings(*steps)]


def test_a_history_that_holds() -> None:
    assert kinds(step(None, FIRST), step(FIRST, SECOND), step(SECOND, THIRD)) == []


def test_the_first_commit_of_a_repository_has_no_parent() -> None:
    assert kinds(Step("abc", PATH, (), FIRST)) == []


@pytest.mark.parametrize(
    ("steps", "wanted"),
    [
        ([step(FIRST, THIRD)], ["chain"]),
        ([step(None, SECOND)], ["chain"]),
        ([step(FIRST, version(2))], ["chain"]),
        ([step(FIRST, version(2, FIRST, review=None))], ["unreviewed"]),
        ([step(FIRST, Version(SECOND.text, FIRST.numbers)), step(FIRST, SECOND)], ["broken"]),
        ([step(FIRST, Version(SECOND.text, None))], ["broken"]),
        ([step(FIRST, Version(None, SECOND.numbers))], ["broken"]),
        ([step(FIRST, Version(b"nonsense", SECOND.numbers))], ["broken"]),
        ([step(FIRST, Version((SECOND.text or b"").replace(b'"tokens": [2]', b'"tokens": [7]'), SECOND.numbers))], ["broken"]),
        ([step(FIRST, None)], ["deleted"]),
        ([step(FIRST, None, reason="the suite is gone")], []),
    ],
    ids=["skipped", "replaced-nothing", "replaces-something", "unreviewed", "other-numbers", "no-numbers", "no-text",
         "nonsense", "edited", "deleted", "deleted-with-reason"],
)  # fmt: skip
def test_a_history_that_does_not(steps: list[Step], wanted: list[str]) -> None:
    assert kinds(*steps) == wanted


def test_a_finding_names_file_commit_and_what_mends_it() -> None:
    (found,) = findings(step(FIRST, THIRD))
    assert found.where == PATH and "commit abc" in found.what
    assert str(digest_of(SECOND))[:19] in found.what and str(digest_of(FIRST))[:19] in found.what
    assert "git checkout abc^ -- 'golden/s/bf16.golden.*'" in found.fix and "pytest-repro review golden/s" in found.fix


def test_a_command_that_mends_holds_no_command_of_a_folders_name() -> None:
    hostile = "golden/$(touch x); y/bf16.golden.jsonl"
    for bad in (
        step(FIRST, THIRD, path=hostile),
        step(FIRST, None, path=hostile),
        step(FIRST, Version(b"", None), path=hostile),
    ):
        (found,) = findings(bad)
        stem = hostile.removesuffix(".jsonl")
        parts = [stem, f"{stem}.*", hostile.replace("golden.jsonl", "pending"), "golden/$(touch x); y"]
        rest = found.fix
        for part in parts:
            rest = rest.replace(shlex.quote(part), "")
        assert "touch" in found.fix and "touch" not in rest


def test_a_merge_may_follow_any_parent() -> None:
    assert kinds(step(FIRST, THIRD, SECOND)) == []
    assert kinds(step(FIRST, THIRD, FIRST)) == ["chain"]


def test_a_golden_that_moved_is_neither_deleted_nor_new() -> None:
    away = step(SECOND, None, path="golden/old/bf16.golden.jsonl")
    here = step(None, SECOND, path="golden/new/bf16.golden.jsonl")
    assert kinds(away, here) == [] and kinds(here, away) == []
    assert kinds(away, replace(here, commit="later")) == ["deleted", "chain"]
    assert kinds(away, replace(here, before=(FIRST,))) == ["deleted"], "it moved over another one"
    assert kinds(replace(away, suite=True), here) == ["deleted", "chain"], "its suite stayed"


def test_a_merge_that_brings_a_newer_golden_to_where_its_suite_moved() -> None:
    old, new = PATH, "golden/new/bf16.golden.jsonl"
    move = [step(FIRST, None), step(None, FIRST, path=new)]
    merge = step(FIRST, SECOND, None, path=new, commit="merge")

    def told(*steps: Step) -> list[tuple[str, str]]:
        head = {s.path: s.after for s in steps if s.after}
        return [(f.kind, f.where) for f in of_branch(steps, {old: SECOND}, head, "main", "abc")]

    assert told(*move, merge) == [] and told(*move, merge, step(SECOND, THIRD, path=new)) == []
    assert told(*move) == [("deleted", old)], "the merge kept the older one"
    assert told(replace(move[0], suite=True, reason="x"), move[1], merge) == [("deleted", old)], "its suite stayed"


def test_to_put_back_what_lay_there_is_no_change() -> None:
    gone, back = step(SECOND, None), step(None, SECOND, commit="other")
    assert kinds(gone, back) == [] and kinds(gone, back, step(SECOND, THIRD)) == []
    assert kinds(back, gone) == [], "nothing was there before, and nothing is there now"
    assert kinds(gone, step(None, THIRD, commit="other")) == ["deleted", "chain"]
    undone = step(SECOND, FIRST)
    assert kinds(undone) == ["chain"] and list(of_branch([undone], {PATH: FIRST}, {PATH: FIRST}, "main", "abc")) == []


@pytest.mark.parametrize("bad", [THIRD, None, Version(b"nonsense", None), version(2, FIRST, review=None)])
def test_what_was_put_right_by_a_later_commit_holds(bad: Version | None) -> None:
    wrong, right = step(FIRST, bad), step(bad, FIRST, commit="other")
    assert kinds(wrong) != [] and kinds(wrong, right) == [] and kinds(wrong, right, step(FIRST, SECOND)) == []
    assert kinds(wrong, right, wrong) == kinds(wrong)


LED = {
    "same": (SECOND, SECOND, [], []),
    "older": (SECOND, FIRST, [], ["chain"]),
    "gone": (SECOND, None, [], ["deleted"]),
    "from-nowhere": (None, FIRST, [], ["chain"]),
    "accepted": (SECOND, THIRD, [step(SECOND, THIRD)], []),
    "accepted-beside-another": (FIRST, THIRD, [step(SECOND, THIRD)], ["chain"]),
    "merged": (SECOND, THIRD, [step(FIRST, THIRD, SECOND)], []),
    "deleted": (SECOND, None, [step(SECOND, None, reason="old")], []),
    "deleted-in-silence": (SECOND, None, [step(SECOND, None)], ["deleted"]),
    "anew": (SECOND, FIRST, [step(SECOND, None, reason="old"), step(None, FIRST)], []),
    "elsewhere": (SECOND, THIRD, [step(SECOND, THIRD, path="elsewhere")], ["chain"]),
    "back-to-an-older-one": (SECOND, FIRST, [step(FIRST, version(7, FIRST)), step(SECOND, FIRST)], ["chain"]),
    "back-to-none": (SECOND, None, [step(None, FIRST), step(SECOND, None)], ["deleted"]),
    "undone-on-another-side": (FIRST, THIRD, [step(FIRST, THIRD), step(SECOND, FIRST)], ["chain"]),
}


@pytest.mark.parametrize("name", LED)
def test_sound_steps_lead_from_what_the_base_has_to_what_head_has(name: str) -> None:
    then, now, steps, wanted = LED[name]
    found = list(of_branch(steps, {PATH: then} if then else {}, {PATH: now} if now else {}, "main", "abc"))
    assert [f.kind for f in found] == wanted
    assert all("-- 'golden/s/bf16.golden.*'; git commit" in f.fix for f in found)


def test_a_golden_is_followed_to_where_it_moved_from() -> None:
    a, b, c = ("golden/a/x.golden.jsonl", "golden/b/x.golden.jsonl", "golden/c/x.golden.jsonl")
    steps = [
        step(FIRST, SECOND, path=a, commit="1"),
        step(SECOND, None, path=a, commit="2"),
        step(None, SECOND, path=b, commit="2"),
        step(None, SECOND, path=c, commit="3"),
        step(SECOND, None, path=b, commit="3"),
        step(SECOND, THIRD, path=c, commit="4"),
    ]
    assert with_origins({c}, steps) == {a, b, c} and with_origins({b}, steps) == {a, b}
    assert with_origins({a}, steps) == {a} and with_origins(set(), steps) == set()


def test_what_replaces_a_broken_golden_replaces_nothing() -> None:
    broken = Version(b"nonsense", None)
    assert kinds(step(broken, FIRST)) == []
    assert kinds(step(broken, SECOND)) == ["chain"]


def test_a_pointer_of_git_lfs_stands_for_the_binary_part() -> None:
    oid = digest(SECOND.numbers or b"")
    pointer = f"version https://git-lfs.github.com/spec/v1\noid {oid}\nsize 9\n".encode()
    assert kinds(step(FIRST, replace(SECOND, numbers=pointer))) == []
    assert kinds(step(FIRST, replace(SECOND, numbers=pointer.replace(oid.encode(), digest(b"x").encode())))) == [
        "broken"
    ]


def sealed_again(found: Version, thresholds: Agreed) -> Version:
    held: Golden = wire.decode(found.text or b"", found.numbers, PATH)
    review: Review = replace(held.review or REVIEW, thresholds=thresholds)
    return Version(*encode(replace(held, review=review)))


def test_thresholds_that_were_sealed_anew_leave_the_chain_alone() -> None:
    again = sealed_again(SECOND, Agreed(limits(Thresholds(max_divergent=3)), "Bo", "2026-11-22", "meant"))
    assert digest_of(again) == digest_of(SECOND)
    assert kinds(step(SECOND, again)) == [] and kinds(step(again, THIRD)) == []


# --- thresholds -----------------------------------------------------------------------------------------------------

STRICT = Thresholds()


@pytest.mark.parametrize(
    ("change", "prompts", "wanted"),
    [
        ({"max_divergent": 1}, 10, ["max_divergent 0 -> 1"]),
        ({"max_divergent": 0.5}, 10, ["max_divergent 0 -> 0.5"]),
        ({"max_divergent": 0.05}, 10, ["max_divergent 0 -> 0.05"]),
        ({"max_unexplained": 2}, 10, ["max_unexplained 0 -> 2"]),
        ({"accuracy_drop": 2.5}, 10, ["accuracy_drop 2.0 -> 2.5"]),
        ({"accuracy_drop": 1.0}, 10, []),
        ({"alpha": 0.01}, 10, ["alpha 0.05 -> 0.01"]),
        ({"alpha": 0.1}, 10, []),
        ({"length_ratio": (0.8, 1.1)}, 10, ["length_ratio [0.9, 1.1] -> [0.8, 1.1]"]),
        ({"length_ratio": (0.9, 1.2)}, 10, ["length_ratio [0.9, 1.1] -> [0.9, 1.2]"]),
        ({"length_ratio": (0.95, 1.05)}, 10, []),
        ({"fp32_waiver": "all"}, 10, ["fp32_waiver explained -> all"]),
        ({"fp32_waiver": "none"}, 10, []),
        ({"max_divergent": 1, "alpha": 0.01}, 10, ["max_divergent 0 -> 1", "alpha 0.05 -> 0.01"]),
    ],
)
def test_looser_is_what_lets_more_pass(change: dict[str, Any], prompts: int, wanted: list[str]) -> None:
    now = replace(STRICT, **change)
    assert loosened_since(None, STRICT, now, prompts) == wanted
    assert loosened_since(Agreed(limits(STRICT), "Bo", "2026", "why"), now, now, prompts) == wanted, "the review counts"


def test_a_count_and_a_share_are_compared_by_what_they_allow() -> None:
    count, share = replace(STRICT, max_divergent=5), replace(STRICT, max_divergent=0.5)
    assert loosened_since(None, count, share, 10) == [] and loosened_since(None, share, count, 10) == []
    assert loosened_since(None, count, share, 12) == ["max_divergent 5 -> 0.5"]
    assert loosened_since(None, share, count, 8) == ["max_divergent 0.5 -> 5"]
    assert loosened_since(None, replace(STRICT, max_divergent=1), replace(STRICT, max_divergent=1.0), 4) != []


def test_without_anything_to_compare_with_nothing_is_looser() -> None:
    assert loosened_since(None, None, replace(STRICT, max_divergent=9), 10) == []


def test_limits_survive_the_file(tmp_path: Path) -> None:
    mine = replace(STRICT, max_divergent=1.0, length_ratio=(0.5, 2.0))
    held = golden(
        generation(output("a", [1])), review=replace(REVIEW, thresholds=Agreed(limits(mine), "Bo", "2026", "why"))
    )
    back = wire.decode(*encode(held), PATH)
    assert back.review == held.review and back.review is not None and back.review.thresholds is not None
    found = back.review.thresholds.to_thresholds()
    assert found == mine and isinstance(found.max_divergent, float)
