from __future__ import annotations

import json
import stat
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pytest_repro import artifact, store
from pytest_repro.errors import ConfigError, GoldenError
from pytest_repro.generation import digest
from pytest_repro.golden import Golden, encode
from pytest_repro.store import PENDING, Place
from tests.unit.builders import REVIEW, generation, golden, output, write_suite

NAME = "golden/s/bf16.pending.jsonl"
PROMPT = digest("Hello")


def candidate(token: int = 1, **changes: Any) -> Golden:
    asked = replace(generation(output("p01", [token], logprob=[-token / 8])), content_digests=(PROMPT,))
    return replace(golden(asked, review=None, candidate={"against": None, "prompts": []}), **changes)


def files(found: Golden, name: str = NAME) -> dict[str, bytes]:
    text, numbers = encode(found)
    return {name: text, name.removesuffix("jsonl") + "safetensors": numbers}


GOOD = files(candidate())


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "checkout"
    write_suite(root / "golden" / "s")
    monkeypatch.chdir(root)
    return root


def zipped(folder: Path, content: dict[str, bytes]) -> Path:
    path = folder / "artifact.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return path


def unpacked(folder: Path, content: dict[str, bytes]) -> Path:
    for name, data in content.items():
        file = folder / "left" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return folder / "left"


def fetched(path: Path, root: Path, *, force: bool = False) -> list[tuple[str, str]]:
    found = artifact.arrivals(artifact.read(path), root, source=path, force=force)
    return [(str(a.place.text.relative_to(root)), a.state) for a in artifact.put(found)]


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.mark.parametrize("kept", [".jsonl", ".safetensors"])
@pytest.mark.parametrize(
    ("folder", "named"),
    [("golden/s", "golden/s"), ("repro-pending/golden/s", "golden/s"), ("golden/$(touch x)", "golden")],
)
def test_a_candidate_without_its_other_file_says_how_to_come_by_it(
    tmp_path: Path, checkout: Path, folder: str, named: str, kept: str
) -> None:
    name = f"{folder}/bf16.pending.jsonl"
    half = {file: data for file, data in files(candidate(), name).items() if file.endswith(kept)}
    with pytest.raises(GoldenError) as told:
        fetched(unpacked(tmp_path, half), checkout)
    assert told.value.fix == (
        f"gh run download --name repro-pending, and fetch it again; or pytest --repro-update {named}, which records it here"
    )


# --- what is sound --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [zipped, unpacked], ids=["zip", "folder"])
@pytest.mark.parametrize(
    "prefix", ["", "left/", "a/b/", None], ids=["as-laid-out", "with-a-folder-before", "with-two", "flattened"]
)
def test_a_candidate_finds_its_suite(
    checkout: Path, tmp_path: Path, packed: Callable[..., Path], prefix: str | None
) -> None:
    content = {
        f"{prefix}{name}" if prefix is not None else name.rpartition("/")[2]: data for name, data in GOOD.items()
    }
    assert fetched(packed(tmp_path, content), checkout) == [(NAME, "new")]
    found = Place(checkout / "golden" / "s", "bf16", PENDING).read()
    assert found.generation.tokens.tolist() == [1] and found.candidate == {"against": None, "prompts": []}
    assert fetched(packed(tmp_path, content), checkout) == [(NAME, "same")]


def test_what_is_no_candidate_is_ignored_and_named(checkout: Path, tmp_path: Path) -> None:
    inner = zipped(tmp_path, GOOD).read_bytes()
    other = {"report.html": b"<p>", "golden/s/inner.zip": inner, "golden/s/bf16.golden.jsonl": b"{}", "x.pending.txt": b"",
             "golden/s/BF16 x.pending.jsonl": b"{}", "golden/s/suite.toml": b"[suite]"}  # fmt: skip
    before = tree(checkout)
    path = zipped(tmp_path, {**other, **GOOD})
    assert artifact.read(path).ignored == tuple(other)
    assert fetched(path, checkout) == [(NAME, "new")]
    assert {name: data for name, data in tree(checkout).items() if name not in GOOD} == before


def test_another_candidate_is_not_replaced_unless_told_to(checkout: Path, tmp_path: Path) -> None:
    fetched(zipped(tmp_path, GOOD), checkout)
    before = tree(checkout)
    other = zipped(tmp_path, files(candidate(2)))
    with pytest.raises(ConfigError, match="another candidate waits there") as caught:
        fetched(other, checkout)
    assert "--force" in caught.value.fix and tree(checkout) == before
    assert fetched(other, checkout, force=True) == [(NAME, "replaced")]
    assert Place(checkout / "golden" / "s", "bf16", PENDING).read().generation.tokens.tolist() == [2]


def test_a_candidate_for_a_test_of_ones_own(checkout: Path, tmp_path: Path) -> None:
    mine = candidate(suite="test_x-abc123")
    name = "golden/tests/test_x-abc123/bf16.pending.jsonl"
    assert fetched(zipped(tmp_path, files(mine, name)), checkout) == [(name, "new")]


def test_what_was_fetched_can_be_accepted(checkout: Path, tmp_path: Path) -> None:
    fetched(zipped(tmp_path, GOOD), checkout)
    (place,) = store.pending(checkout)
    assert store.accept(place, store.Reviewer("Bo", "seen")).review is not None


# --- what is not ----------------------------------------------------------------------------------------------------

TEXT, NUMBERS = GOOD.values()
UNSAFE = [
    "/etc/bf16.pending.jsonl", "../bf16.pending.jsonl", "golden/../../bf16.pending.jsonl", "golden/s/..", "./bf16.pending.jsonl",
    "C:/bf16.pending.jsonl", "c:bf16.pending.jsonl", "golden\\s\\bf16.pending.jsonl", "..\\bf16.pending.jsonl", "golden//s/x",
    "golden/s/bf16.pending.jsonl:stream", "//server/share/x", "~/../../x",
]  # fmt: skip


@pytest.mark.parametrize("name", UNSAFE)
def test_a_name_that_leads_elsewhere_stops_everything(checkout: Path, tmp_path: Path, name: str) -> None:
    before = tree(tmp_path / "checkout")
    with pytest.raises(ConfigError, match="is no plain path below the folder: nothing was fetched"):
        fetched(zipped(tmp_path, {**GOOD, name: TEXT}), checkout)
    assert tree(tmp_path / "checkout") == before


def linked(folder: Path, kind: int) -> Path:
    path = zipped(folder, GOOD)
    with zipfile.ZipFile(path, "a") as archive:
        entry = zipfile.ZipInfo("golden/s/fp32.pending.jsonl")
        entry.external_attr = (kind | 0o777) << 16
        archive.writestr(entry, "/etc/passwd")
    return path


def twice(folder: Path, second: str) -> Path:
    path = zipped(folder, GOOD)
    with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings(action="ignore"):
        archive.writestr(second, TEXT)
    return path


def damaged(folder: Path, cut: Callable[[bytes], bytes]) -> Path:
    path = zipped(folder, GOOD)
    path.write_bytes(cut(path.read_bytes()))
    return path


def encrypted(data: bytes) -> bytes:
    """The flag of encryption set in every entry, in both of its headers."""
    out = bytearray(data)
    for magic, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = out.find(magic)
        while at >= 0:
            out[at + offset] |= 1
            at = out.find(magic, at + 4)
    return bytes(out)


def edited(old: str, new: str) -> dict[str, bytes]:
    assert old.encode() in TEXT
    return {**GOOD, NAME: TEXT.replace(old.encode(), new.encode())}


def link_in_folder(folder: Path) -> Path:
    left = unpacked(folder, GOOD)
    (left / "golden" / "s" / "fp32.pending.jsonl").symlink_to("/etc/passwd")
    return left


def folder_behind_a_link(folder: Path) -> Path:
    left = unpacked(folder, GOOD)
    (left / "other").symlink_to(folder)
    return left


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "nothing-there": (lambda f: f / "none.zip", "there is no such file or folder"),
    "no-zip": (lambda f: unpacked(f, {"x": b"hello"}) / "x", "neither a folder nor a zip"),
    "empty": (lambda f: zipped(f, {}), "no pending golden is in it"),
    "others-only": (lambda f: zipped(f, {"report.json": b"{}"}), r"no pending golden is in it \(ignored: report.json\)"),
    "symlink": (lambda f: linked(f, stat.S_IFLNK), "is a link or a device"),
    "device": (lambda f: linked(f, stat.S_IFCHR), "is a link or a device"),
    "symlink-in-folder": (link_in_folder, "is a link"),
    "folder-behind-a-link": (folder_behind_a_link, "is a link"),
    "twice": (lambda f: twice(f, NAME), "is there twice"),
    "twice-but-for-case": (lambda f: twice(f, NAME.replace("golden/s", "Golden/S")), "is there twice"),
    "file-and-folder": (lambda f: twice(f, NAME + "/"), "is there twice"),
    "nul": (lambda f: damaged(f, lambda d: d.replace(b"bf16.pending.jsonl", b"bf16.pending.json\x00")), "no plain path"),
    "encrypted": (lambda f: damaged(f, encrypted), "is encrypted"),
    "truncated": (lambda f: damaged(f, lambda d: d[: len(d) // 2]), "neither a folder nor a zip"),
    "flipped": (lambda f: damaged(f, lambda d: d[:60] + bytes(b ^ 255 for b in d[60:90]) + d[90:]), "zip"),
    "no-numbers": (lambda f: zipped(f, {NAME: TEXT}), "the binary part is missing"),
    "no-text": (lambda f: zipped(f, {NAME.replace("jsonl", "safetensors"): NUMBERS}), "no text part beside it"),
    "edited": (lambda f: zipped(f, edited('"tokens": [1]', '"tokens": [7]')), "edited by hand"),
    "newer-schema": (lambda f: zipped(f, edited('"schema": 1', '"schema": 9')), "schema 9"),
    "no-json": (lambda f: zipped(f, {**GOOD, NAME: b"{"}), "not valid JSON"),
    "other-numbers": (
        lambda f: zipped(f, {**GOOD, NAME.replace("jsonl", "safetensors"): list(files(candidate(3)).values())[1]}),
        "not the one this golden was recorded with",
    ),
    "reviewed-already": (lambda f: zipped(f, files(candidate(review=REVIEW))), "carries a review already"),
    "under-another-name": (
        lambda f: zipped(f, files(candidate(), NAME.replace("bf16", "fp32"))), "the file's name says fp32.pending"
    ),
    "no-such-suite": (lambda f: zipped(f, files(candidate(suite="other"))), "no suite of this checkout is called 'other'"),
    "other-prompts": (
        lambda f: zipped(f, files(golden(generation(output("p01", [1])), review=None))), "p01 differ"
    ),
    "fewer-prompts": (
        lambda f: zipped(f, files(golden(generation(output("zz", [1])), review=None))), "zz, p01 differ"
    ),
    "two-for-one-place": (
        lambda f: zipped(f, {**GOOD, **{f"second/{n}": d for n, d in GOOD.items()}}), "two candidates belong to one place"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_nothing_is_written_unless_all_is_sound(checkout: Path, tmp_path: Path, name: str) -> None:
    before = tree(checkout)
    make, told = BAD[name]
    path = make(tmp_path)
    with pytest.raises((ConfigError, GoldenError), match=told) as caught:
        fetched(path, checkout)
    assert tree(checkout) == before
    assert caught.value.where and "git checkout" not in caught.value.fix


def test_one_bad_candidate_keeps_the_good_ones_out(checkout: Path, tmp_path: Path) -> None:
    write_suite(checkout / "golden" / "t", '[suite]\nname = "t"\nmodel = "m"\nprompts = "prompts.jsonl"\n')
    bad = {**files(candidate(suite="t"), NAME.replace("/s/", "/t/"))}
    bad[NAME.replace("/s/", "/t/")] = b"{}"
    before = tree(checkout)
    with pytest.raises(GoldenError, match="not a pytest-repro golden"):
        fetched(zipped(tmp_path, {**GOOD, **bad}), checkout)
    assert tree(checkout) == before


def test_a_bomb_is_read_to_the_bound_and_no_further(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifact, "MOST_BYTES", 1000)
    with pytest.raises(ConfigError, match="is larger than"):
        fetched(zipped(tmp_path, {NAME: b"0" * 100_000}), checkout)
    monkeypatch.setattr(artifact, "MOST_BYTES", 1 << 20)
    monkeypatch.setattr(artifact, "MOST_BYTES_IN_ALL", 1000)
    with pytest.raises(ConfigError, match="or all of it"):
        fetched(zipped(tmp_path, GOOD), checkout)


def test_an_archive_that_lies_about_a_size_is_not_believed(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifact, "MOST_BYTES", 1000)
    path = zipped(tmp_path, {NAME: b"0" * 100_000})
    path.write_bytes(path.read_bytes().replace((100_000).to_bytes(4, "little"), (10).to_bytes(4, "little")))
    with pytest.raises((ConfigError, GoldenError)):
        fetched(path, checkout)


def test_more_files_than_a_run_leaves(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact, "MOST_FILES", 3)
    with pytest.raises(ConfigError, match="4 files, and a run leaves 3 at most"):
        fetched(zipped(tmp_path, {**GOOD, "a": b"", "b": b""}), checkout)


def test_two_suites_of_one_name_are_not_guessed_between(checkout: Path, tmp_path: Path) -> None:
    write_suite(checkout / "golden" / "twin")
    assert fetched(zipped(tmp_path, GOOD), checkout) == [(NAME, "new")], "the path decides"
    flat = zipped(tmp_path, {name.rpartition("/")[2]: data for name, data in GOOD.items()})
    with pytest.raises(ConfigError, match="several suites are called 's': golden/s, golden/twin"):
        fetched(flat, checkout)


def test_a_suite_that_is_a_link_out_of_the_checkout_is_none(checkout: Path, tmp_path: Path) -> None:
    outside = write_suite(tmp_path / "outside", '[suite]\nname = "o"\nmodel = "m"\nprompts = "prompts.jsonl"\n')
    (checkout / "golden" / "o").symlink_to(outside)
    with pytest.raises(ConfigError, match="no suite of this checkout"):
        fetched(zipped(tmp_path, files(candidate(suite="o"), NAME.replace("/s/", "/o/"))), checkout)
    assert sorted(p.name for p in outside.iterdir()) == ["prompts.jsonl", "suite.toml"]


def test_what_is_written_is_escaped_whatever_came(checkout: Path, tmp_path: Path) -> None:
    """The text part of an artifact may hold any characters; a golden holds ASCII."""
    header, *lines = (json.loads(line) for line in TEXT.splitlines())
    header["candidate"] = {"against": None, "prompts": [{"id": "\u202e", "verdict": "new"}]}
    raw = b"\n".join(json.dumps(row, ensure_ascii=False).encode() for row in (header, *lines))
    fetched(zipped(tmp_path, {**GOOD, NAME: raw}), checkout)
    assert (checkout / NAME).read_bytes().isascii()
