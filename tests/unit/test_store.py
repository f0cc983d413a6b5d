from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pytest_repro.errors import ConfigError, GoldenError, GoldenMissing
from pytest_repro.generation import digest
from pytest_repro.golden import Golden, Part
from pytest_repro.noise import Envelope
from pytest_repro.store import (
    GOLDEN,
    PENDING,
    Committed,
    Place,
    Reviewer,
    accept,
    agree,
    atomic_write,
    candidates_for,
    find,
    merge,
    pending,
    places,
    typed,
)
from pytest_repro.suite import Shard
from tests.unit.builders import REVIEW, f32, generation, golden, output, variant

NEW = replace(
    golden(generation(output("a", [1, 2], gap=[0.5, 0.25]))), review=None, candidate={"against": None, "prompts": []}
)
LIMITS = {"max_divergent": 1, "max_unexplained": 0, "accuracy_drop": 2.0, "alpha": 0.05, "length_ratio": [0.9, 1.1],
          "fp32_waiver": "explained"}  # fmt: skip
OLD = golden(generation(output("a", [1, 9])))


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def put(folder: Path, stem: str, kind: str = GOLDEN, content: Golden = OLD) -> Place:
    compute_class, _, device_class = stem.partition("@")
    place = Place(folder, stem, kind)
    place.write(replace(content, compute_class=compute_class, device_class=device_class))
    return place


def taken(place: Place, reason: str = "meant") -> Golden:
    return accept(place, Reviewer("Bo <bo@example.org>", reason, "abc"))


# --- atomic_write ---------------------------------------------------------------------------------------------------


def test_atomic_write_leaves_the_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "sub" / "file"
    atomic_write(file, b"one")
    atomic_write(file, b"two")
    assert file.read_bytes() == b"two" and names(file.parent) == ["file"] and file.stat().st_mode & 0o777 == 0o644


def test_atomic_write_keeps_the_old_file_if_writing_fails(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"old")
    with pytest.raises(TypeError):
        atomic_write(file, "not bytes")  # type: ignore[arg-type]
    assert file.read_bytes() == b"old" and names(tmp_path) == ["file"]


def test_atomic_write_cleans_up_if_renaming_fails(tmp_path: Path) -> None:
    (tmp_path / "file" / "child").mkdir(parents=True)
    with pytest.raises(OSError):
        atomic_write(tmp_path / "file", b"new")
    assert names(tmp_path) == ["file"]


# --- places ---------------------------------------------------------------------------------------------------------


def test_write_read_remove(tmp_path: Path) -> None:
    place = put(tmp_path, "bf16@cuda-sm90")
    assert names(tmp_path) == ["bf16@cuda-sm90.golden.jsonl", "bf16@cuda-sm90.golden.safetensors"]
    assert place.read().generation.tokens.tolist() == [1, 9] and place.read().review == REVIEW
    place.remove()
    place.remove()
    assert names(tmp_path) == []


def test_other_is_the_same_golden_in_the_other_state(tmp_path: Path) -> None:
    place = Place(tmp_path, "bf16")
    assert place.other == Place(tmp_path, "bf16", PENDING) and place.other.other == place


def test_a_missing_golden_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GoldenMissing) as caught:
        Place(tmp_path / "golden" / "s", "bf16").read()
    assert caught.value.where == "golden/s/bf16.golden.jsonl" and caught.value.fix == "pytest --repro-update golden/s"


def test_a_golden_without_its_binary_part(tmp_path: Path) -> None:
    place = put(tmp_path, "bf16")
    place.numbers.unlink()
    with pytest.raises(GoldenError, match="the binary part is missing"):
        place.read()


def test_a_golden_under_another_name(tmp_path: Path) -> None:
    place = put(tmp_path, "bf16")
    for file in (place.text, place.numbers):
        file.rename(tmp_path / file.name.replace("bf16", "fp32"))
    with pytest.raises(GoldenError, match="the file's name says fp32, its content bf16"):
        Place(tmp_path, "fp32").read()


def test_places_tells_goldens_from_pending_ones(tmp_path: Path) -> None:
    for stem in ("fp32", "bf16@cpu", "bf16"):
        put(tmp_path, stem)
    put(tmp_path, "fp16", PENDING)
    assert [p.stem for p in places(tmp_path)] == ["bf16", "bf16@cpu", "fp32"]
    assert places(tmp_path, PENDING) == [Place(tmp_path, "fp16", PENDING)]


def test_typed_is_relative_below_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert typed(tmp_path / "a" / "b") == "a/b" and typed(tmp_path.parent) == str(tmp_path.parent)


# --- find -----------------------------------------------------------------------------------------------------------

FP32_ORDER = ["fp32@cpu", "fp32", "bf16@cpu", "bf16", "fp16@cpu", "fp16"]


def test_the_order_in_which_goldens_fit() -> None:
    assert candidates_for("bf16", "cuda-sm90") == ["bf16@cuda-sm90", "bf16"]
    assert candidates_for("fp16", "cpu") == ["fp16@cpu", "fp16"]
    assert candidates_for("exact", "cpu") == ["exact@cpu", "exact"]
    assert candidates_for("fp32", "cpu") == FP32_ORDER


@pytest.mark.parametrize("first", range(6), ids=FP32_ORDER)
def test_find_takes_the_first_that_is_there(tmp_path: Path, first: int) -> None:
    for stem in (*FP32_ORDER[first:], "fp32@cuda-sm90", "exact"):
        put(tmp_path, stem)
    assert find(tmp_path, "fp32", "cpu") == Place(tmp_path, FP32_ORDER[first])


@pytest.mark.parametrize("wanted", ["bf16", "fp16", "exact", "e4m3", "e4m3-weights"])
def test_nothing_but_fp32_falls_back(tmp_path: Path, wanted: str) -> None:
    for stem in {"fp32", "fp16", "bf16", "exact", "e4m3", "e4m3-weights", "e8m7"} - {wanted}:
        put(tmp_path, stem)
    put(tmp_path, f"{wanted}@cuda-sm90")
    with pytest.raises(GoldenMissing, match=f"no golden for {wanted} on cpu .goldens here: .*{wanted}@cuda-sm90"):
        find(tmp_path, wanted, "cpu")


def test_find_tells_whether_a_candidate_waits(tmp_path: Path) -> None:
    with pytest.raises(GoldenMissing, match="goldens here: none") as caught:
        find(tmp_path, "fp32", "")
    assert "--repro-update" in caught.value.fix and "--repro-numerics fp32" in caught.value.fix
    put(tmp_path, "fp32", PENDING)
    with pytest.raises(GoldenMissing) as caught:
        find(tmp_path, "fp32", "")
    assert caught.value.fix.startswith("pytest-repro review ")
    assert caught.value.fix.endswith("   # a candidate waits")


# --- pending, accept, reject ----------------------------------------------------------------------------------------


def test_pending_looks_into_every_folder(tmp_path: Path) -> None:
    first, second = put(tmp_path / "a", "bf16", PENDING), put(tmp_path / "b" / "c", "fp32", PENDING)
    put(tmp_path / "a", "fp32")
    assert pending(tmp_path) == [first, second] and pending(tmp_path / "b") == [second]
    first.remove()
    assert pending(tmp_path / "a") == []
    with pytest.raises(ConfigError, match="no such folder"):
        pending(tmp_path / "nowhere")


def test_accept_makes_the_first_golden(tmp_path: Path) -> None:
    accepted = taken(put(tmp_path, "bf16", PENDING, NEW))
    assert names(tmp_path) == ["bf16.golden.jsonl", "bf16.golden.safetensors"]
    found = Place(tmp_path, "bf16").read()
    assert found.review == accepted.review is not None and found.candidate is None
    assert (found.review.by, found.review.reason, found.review.commit) == ("Bo <bo@example.org>", "meant", "abc")
    assert found.review.previous is None and found.review.when.endswith("+00:00")


def test_accept_replaces_and_remembers_the_previous_golden(tmp_path: Path) -> None:
    before = put(tmp_path, "bf16").read().digest
    taken(put(tmp_path, "bf16", PENDING, NEW))
    found = Place(tmp_path, "bf16").read()
    assert found.generation.tokens.tolist() == [1, 2] and found.review is not None and found.review.previous == before


@pytest.mark.parametrize(
    ("head", "previous"),
    [
        (Committed(None), None),
        (Committed("sha256:committed"), "sha256:committed"),
        (Committed("sha256:committed", "sha256:before"), "sha256:committed"),
        (Committed(Golden.digest, "sha256:before"), "sha256:before"),
    ],
    ids=["nothing", "another", "one-with-a-history", "the-very-same"],
)
def test_accept_follows_what_git_has(tmp_path: Path, head: Committed, previous: str | None) -> None:
    """What was accepted and never committed is no part of history."""
    put(tmp_path, "bf16")
    place = put(tmp_path, "bf16", PENDING, NEW)
    if head.digest == Golden.digest:
        head = replace(head, digest=place.read().digest)
    review = accept(place, Reviewer("Bo", "meant"), head).review
    assert review is not None and review.previous == previous


def test_accept_over_a_damaged_copy_of_what_git_has(tmp_path: Path) -> None:
    put(tmp_path, "bf16").text.write_text("nonsense")
    review = accept(put(tmp_path, "bf16", PENDING, NEW), Reviewer("Bo", "meant"), Committed("sha256:c")).review
    assert review is not None and review.previous == "sha256:c" and "could not be read" in review.reason


def test_thresholds_are_put_under_a_review_and_nothing_else_changes(tmp_path: Path) -> None:
    place = put(tmp_path, "bf16")
    before = place.read()
    agree(place, Reviewer("Cy", "coin tosses", limits=LIMITS))
    after = place.read()
    assert after.review is not None and after.review.thresholds is not None
    assert (after.review.thresholds.limits, after.review.thresholds.by) == (LIMITS, "Cy")
    assert replace(after.review, thresholds=None) == before.review and after.digest == before.digest
    assert taken(put(tmp_path, "bf16", PENDING, NEW)).review.previous == before.digest  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("who", "content", "told"),
    [
        (Reviewer("Cy", " ", limits=LIMITS), OLD, "thresholds need a reason"),
        (Reviewer("Cy", "why"), OLD, "no thresholds are known"),
        (Reviewer("Cy", "why", limits=LIMITS), replace(OLD, review=None), "nobody accepted this golden"),
    ],
    ids=["no-reason", "no-thresholds", "unreviewed"],
)
def test_thresholds_that_cannot_be_sealed(tmp_path: Path, who: Reviewer, content: Golden, told: str) -> None:
    place = put(tmp_path, "bf16", GOLDEN, content)
    before = place.text.read_bytes()
    with pytest.raises((ConfigError, GoldenError), match=told):
        agree(place, who)
    assert place.text.read_bytes() == before


@pytest.mark.parametrize("reason", ["", " \n"], ids=["empty", "blank"])
def test_accept_needs_a_reason(tmp_path: Path, reason: str) -> None:
    place = put(tmp_path, "bf16", PENDING, NEW)
    with pytest.raises(ConfigError, match="needs a reason"):
        taken(place, reason)
    assert place.text.exists() and not place.other.text.exists()


def test_accept_refuses_a_candidate_that_was_edited(tmp_path: Path) -> None:
    old = put(tmp_path, "bf16")
    place = put(tmp_path, "bf16", PENDING, NEW)
    place.text.write_bytes(place.text.read_bytes().replace(b'"1 2"', b'"1 3"'))
    with pytest.raises(GoldenError, match="edited by hand"):
        taken(place)
    assert old.read().generation.tokens.tolist() == [1, 9] and place.text.exists()


def test_accept_over_a_broken_golden_says_so(tmp_path: Path) -> None:
    put(tmp_path, "bf16").numbers.write_bytes(b"")
    taken(put(tmp_path, "bf16", PENDING, NEW))
    review = Place(tmp_path, "bf16").read().review
    assert review is not None and review.previous is None
    assert review.reason.startswith("meant (it replaces a golden that could not be read")


@pytest.mark.parametrize("stage", ["binary-placed", "both-placed", "text-removed"])
def test_an_interrupted_accept_is_mended_by_repeating_it(tmp_path: Path, stage: str) -> None:
    old = put(tmp_path, "bf16")
    before = old.read().digest
    place = put(tmp_path, "bf16", PENDING, NEW)
    waiting = {file: file.read_bytes() for file in (place.text, place.numbers)}
    kept = old.text.read_bytes()
    taken(place)
    # The folder as it lies after a crash: what was still to be done is undone.
    if stage == "text-removed":
        place.numbers.write_bytes(waiting[place.numbers])
        assert pending(tmp_path) == []
    else:
        for file, data in waiting.items():
            file.write_bytes(data)
        if stage == "binary-placed":
            old.text.write_bytes(kept)
        assert pending(tmp_path) == [place]
        taken(place)
        assert names(tmp_path) == ["bf16.golden.jsonl", "bf16.golden.safetensors"]
    found = old.read()
    assert found.generation.tokens.tolist() == [1, 2] and found.review is not None
    # With the new binary part beside the old text, the old golden can no longer be read: the reason says so instead.
    assert found.review.previous == (None if stage == "binary-placed" else before)


def test_rejecting_leaves_the_golden(tmp_path: Path) -> None:
    put(tmp_path, "bf16")
    put(tmp_path, "bf16", PENDING, NEW).remove()
    assert pending(tmp_path) == [] and Place(tmp_path, "bf16").read().generation.tokens.tolist() == [1, 9]


# --- parts ----------------------------------------------------------------------------------------------------------


def part(folder: Path, index: int, time: str = "2026-11-22") -> Place:
    """Part `index` of 2 of a suite of two prompts, one a batch."""
    g = generation(output("ab"[index - 1], [index]))
    noise = Envelope("bf16", (variant(),), f32([0.5]), f32([0.125]), np.full((1, 1), 0.5))
    numbered = Part(index, 2, 2, digest("prompts"), "exact")
    place = Place(folder, "bf16", PENDING, Shard(index, 2))
    facts = {**NEW.fingerprint, "time": time}
    place.write(replace(NEW, generation=g, noise=noise, batch_size=1, part=numbered, fingerprint=facts))
    return place


def test_a_part_is_known_by_its_name_and_not_accepted(tmp_path: Path) -> None:
    place = part(tmp_path, 1)
    assert names(tmp_path) == ["bf16.1of2.pending.jsonl", "bf16.1of2.pending.safetensors"]
    assert places(tmp_path, PENDING) == [place] and place.read().part is not None
    assert place.other == Place(tmp_path, "bf16")
    with pytest.raises(ConfigError, match=r"this is a part, 1 of 2: pytest-repro merge first"):
        taken(place)
    for kind in (PENDING, GOLDEN):  # renamed, it is still a part
        for suffix in ("jsonl", "safetensors"):
            (tmp_path / f"bf16{kind}.{suffix}").write_bytes((tmp_path / f"bf16.1of2.pending.{suffix}").read_bytes())
        with pytest.raises(GoldenError, match=r"the file's name says bf16, its content bf16, part 1 of 2"):
            Place(tmp_path, "bf16", kind).read()


def test_nothing_is_merged_before_everything_fits(tmp_path: Path) -> None:
    for folder, indexes in (("one", (1, 2)), ("two", (2,))):
        for index in indexes:
            part(tmp_path / folder, index)
    before = {folder: names(tmp_path / folder) for folder in ("one", "two")}
    with pytest.raises(GoldenError, match="parts are missing: 1/2"):
        merge(tmp_path)
    assert before == {folder: names(tmp_path / folder) for folder in ("one", "two")}
    part(tmp_path / "two", 1)
    assert [(target.folder.name, n) for target, n in merge(tmp_path)] == [("one", 2), ("two", 2)]
    assert names(tmp_path / "one") == ["bf16.pending.jsonl", "bf16.pending.safetensors"]


@pytest.mark.parametrize("done", [0, 1, 2, 3])
def test_a_merge_that_was_killed_is_mended_by_repeating_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: int
) -> None:
    """Killed at the n-th file that would be removed: all parts lie there until the merged candidate does."""
    for index in (1, 2):
        part(tmp_path, index)
    left, unlink = [done], Path.unlink

    def killed(path: Path, missing_ok: bool = False) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        unlink(path, missing_ok=missing_ok)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", killed)
        merge(tmp_path)
    whole = Place(tmp_path, "bf16", PENDING).read()
    assert whole.generation.ids == ("a", "b")
    if places(tmp_path, PENDING) != [Place(tmp_path, "bf16", PENDING)]:
        merge(tmp_path)
    assert Place(tmp_path, "bf16", PENDING).read().digest == whole.digest
    assert [p.shard for p in places(tmp_path, PENDING)] == [None]


def test_a_part_that_was_recorded_anew_is_not_taken_for_one_that_was_merged(tmp_path: Path) -> None:
    for index in (1, 2):
        part(tmp_path, index)
    merge(tmp_path)
    part(tmp_path, 1, time="2026-11-23")
    with pytest.raises(GoldenError, match="parts are missing: 2/2"):
        merge(tmp_path)
    assert len(places(tmp_path, PENDING)) == 2
