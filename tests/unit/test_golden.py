from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from pytest_repro import golden as wire
from pytest_repro.errors import GoldenError
from pytest_repro.generation import digest
from pytest_repro.golden import Agreed, Golden, Review, decode, encode
from pytest_repro.noise import Calibration, Envelope
from pytest_repro.sketch import Recorded, Sketch
from tests.unit.builders import REVIEW, f32, generation, golden, output, variant

WHERE = "golden/s/bf16.golden.jsonl"
BINARY = "golden/s/bf16.golden.safetensors"
ODD = "\x1b[31m\r\n\t\x00 é 漢 😀 \u202e\u2028\x85 \ud800 ##[error] \\u0041 \"'"

SKETCH = Recorded(
    ("a", "b"),
    Sketch(("model.embed", "model.layers.0:input"), np.arange(24, dtype=np.float32).reshape(2, 3, 4)),
    f32([0.0, 0.5]),
    True,
)
RECORDED = generation(output("a", [1, 2], text="hello"), output("b", [3]), output("c", []))
GOLDEN = golden(RECORDED, scores=(True, False, None), sketch=SKETCH)
TEXT, NUMBERS = encode(GOLDEN)

Edit = Callable[[dict[str, Any], list[dict[str, Any]]], None]


def read(text: bytes = TEXT, numbers: bytes | None = NUMBERS) -> Golden:
    return decode(text, numbers, WHERE, regenerate="pytest --repro-update golden/s")


def edited(edit: Edit, *, signed: bool, text: bytes = TEXT) -> bytes:
    """The text part after an edit by hand; if signed, by someone who knows how digest and seal are made."""
    header, *lines = (json.loads(line) for line in text.splitlines())
    edit(header, lines)
    body = [json.dumps(line).encode() for line in lines]
    if signed:
        header["digest"] = wire.content_digest(header, body)
        if isinstance(header.get("review"), dict):
            review = {k: v for k, v in header["review"].items() if k != "seal"}
            header["review"]["seal"] = digest({"accepted": header["digest"], **review})
    return b"\n".join([json.dumps(header).encode(), *body])


def with_numbers(change: Callable[[dict[str, Any]], None]) -> tuple[bytes, bytes]:
    tensors = load(NUMBERS)
    change(tensors)
    numbers = save(tensors)
    return edited(lambda h, _: h.update(numbers=digest(numbers)), signed=True), numbers


# --- round trip -----------------------------------------------------------------------------------------------------


def test_a_round_trip_keeps_everything() -> None:
    candidate = {"against": None, "prompts": [{"id": "a", "verdict": "new"}]}
    first = replace(GOLDEN, device_class="cuda-sm90", candidate=candidate, review=replace(REVIEW, commit="abc"))
    back = read(*encode(first))
    plain = {"generation", "noise", "sketch", "digest"}
    for name in set(Golden.__dataclass_fields__) - plain:
        assert getattr(back, name) == getattr(first, name), name
    assert back.noise.variants == first.noise.variants
    assert back.sketch is not None and back.sketch.to_json() == SKETCH.to_json()
    for name, kept in SKETCH.tensors().items():
        np.testing.assert_array_equal(back.sketch.tensors()[name], kept)
    for name in ("ids", "prompt_digests", "content_digests", "texts", "finish_reasons"):
        assert getattr(back.generation, name) == getattr(RECORDED, name), name
    for name in ("offsets", "tokens", "logprob", "gap", "runner_up"):
        column = getattr(back.generation, name)
        np.testing.assert_array_equal(column, getattr(RECORDED, name))
        assert column.dtype == getattr(RECORDED, name).dtype, name
    assert back.stem == "bf16@cuda-sm90" and back.accuracy == 50.0


def test_numbers_come_back_bit_for_bit() -> None:
    rng = np.random.default_rng(3)
    bits = rng.integers(0, 2**32, 400, dtype=np.uint64).astype(np.uint32)  # subnormals, infinities and NaNs among them
    bits[:6] = [0x00000001, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F7FFFFF]
    values = bits.view(np.float32)
    n = len(values) // 2
    # Straight into the arrays: a conversion on the way would quieten signalling NaNs before the golden sees them.
    recorded = replace(
        generation(output("a", [7] * n)),
        logprob=values[:n],
        gap=values[n:],
        runner_up=rng.integers(-1, 2**31 - 1, n).astype(np.int32),
    )
    noise = replace(GOLDEN.noise, prompt_level=f32([1e-30]), gap_level=f32([math.nan]))
    back = read(*encode(golden(recorded, noise=noise)))
    for name in ("logprob", "gap", "runner_up"):
        assert getattr(back.generation, name).tobytes() == getattr(recorded, name).tobytes(), name
    assert back.noise.prompt_level.tobytes() == f32([1e-30]).tobytes()


def test_odd_texts_come_back_and_are_inert_on_disk() -> None:
    text, numbers = encode(golden(generation(output("a", [1], text=ODD), output("b", [2], text=""))))
    assert read(text, numbers).generation.texts == (ODD, "")
    assert text.isascii() and all(byte >= 32 or byte == 10 for byte in text) and len(text.splitlines()) == 3


def test_encoding_is_a_function_of_the_content() -> None:
    assert encode(GOLDEN) == (TEXT, NUMBERS)
    back = read()
    assert encode(back) == (TEXT, NUMBERS)
    shuffled = replace(GOLDEN, fingerprint=dict(reversed(GOLDEN.fingerprint.items())))
    assert encode(shuffled) == (TEXT, NUMBERS)


def test_the_digest_covers_the_content_and_not_the_review() -> None:
    plain = read().digest
    assert read(*encode(replace(GOLDEN, review=None, candidate={"against": None, "prompts": []}))).digest == plain
    assert read(*encode(replace(GOLDEN, scores=(True, True, None)))).digest != plain
    assert read(*encode(replace(GOLDEN, noise=replace(GOLDEN.noise, prompt_level=f32([1, 1, 1]))))).digest != plain


def test_windows_line_ends_do_no_harm() -> None:
    assert read(TEXT.replace(b"\n", b"\r\n")).digest == read().digest


def test_accepting_drops_the_candidate_notes() -> None:
    taken = wire.accepted(replace(GOLDEN, review=None, candidate={"against": None, "prompts": []}), REVIEW)
    assert taken.review == REVIEW and taken.candidate is None


@pytest.mark.parametrize(
    ("scores", "accuracy"), [((None,) * 3, None), ((True, None, None), 100.0), ((True, False, False), 100 / 3)]
)
def test_accuracy_is_of_the_scored_prompts(scores: tuple[bool | None, ...], accuracy: float | None) -> None:
    assert replace(GOLDEN, scores=scores).accuracy == accuracy


# --- damage ---------------------------------------------------------------------------------------------------------

BY_HAND: dict[str, Edit] = {
    "text": lambda h, lines: lines[0].update(text="goodbye"),
    "token": lambda h, lines: lines[0].update(tokens=[1, 9]),
    "score": lambda h, lines: lines[1].update(score=True),
    "id": lambda h, lines: lines[0].update(id="z"),
    "line-removed": lambda h, lines: lines.pop(),
    "line-added": lambda h, lines: lines.append({**lines[0], "id": "z"}),
    "lines-swapped": lambda h, lines: lines.reverse(),
    "key-added": lambda h, lines: lines[0].update(extra=1),
    "compute-class": lambda h, lines: h.update(compute_class="fp32"),
    "fingerprint": lambda h, lines: h["fingerprint"].update(batch_size=1),
    "noise": lambda h, lines: h["noise"]["variants"][0].update(max_abs_dgap=100.0),
    "numbers": lambda h, lines: h.update(numbers=digest(b"")),
    "digest": lambda h, lines: h.update(digest=digest(b"")),
    "digest-removed": lambda h, lines: h.pop("digest"),
}


@pytest.mark.parametrize("edit", BY_HAND.values(), ids=BY_HAND)
def test_an_edit_by_hand_is_seen(edit: Edit) -> None:
    with pytest.raises(GoldenError, match="edited by hand: its content does not match its digest") as caught:
        read(edited(edit, signed=False))
    assert caught.value.where == WHERE and "pytest --repro-update golden/s" in caught.value.fix


@pytest.mark.parametrize("name", ["by", "when", "reason", "previous", "commit", "seal"])
def test_an_edit_of_the_review_is_seen(name: str) -> None:
    with pytest.raises(GoldenError, match="its review does not match its content"):
        read(edited(lambda h, _: h["review"].update({name: digest(b"x")}), signed=False))


def test_a_review_copied_from_another_golden_is_seen() -> None:
    other, _ = encode(replace(GOLDEN, scores=(True, True, True)))
    review = json.loads(other.splitlines()[0])["review"]
    with pytest.raises(GoldenError, match="copied from another golden"):
        read(edited(lambda h, _: h.update(review=review), signed=False))


def test_a_review_removed_leaves_an_unreviewed_golden() -> None:
    assert read(edited(lambda h, _: h.update(review=None), signed=False)).review is None


INVALID: dict[str, tuple[Edit, str, str]] = {
    "schema-newer": (lambda h, _: h.update(schema=2), ":1 [schema]", "has schema 2, and this pytest-repro reads up to 1"),
    "schema-text": (lambda h, _: h.update(schema="1"), ":1 [schema]", "has schema '1'"),
    "schema-none": (lambda h, _: h.pop("schema"), ":1 [schema]", "has schema None"),
    "schema-older": (lambda h, _: h.update(schema=0), "", "no migration from schema 0"),
    "kind": (lambda h, _: h.update(kind="snapshot"), ":1", "not a pytest-repro golden"),
    "header-key": (lambda h, _: h.update(extra=1), ":1 []", "unknown key 'extra'"),
    "header-lacks": (lambda h, _: h.pop("noise"), ":1 []", "'noise' is a required property"),
    "class-is-a-path": (lambda h, _: h.update(compute_class="../x"), ":1 [compute_class]", "not allowed here"),
    "noise-negative": (
        lambda h, _: h["noise"].update(max_deficit=-1), ":1 [noise.max_deficit]", "-1 is not allowed here"),
    "noise-nan": (
        lambda h, _: h["noise"]["variants"][0].update(max_abs_dgap=float("nan")), "*", "(?i)nan|infinit|finite|JSON"),
    "noise-infinite": (
        lambda h, _: h["noise"]["variants"][0].update(max_abs_dgap=float("inf")), "*", "(?i)nan|infinit|finite|JSON"),
    "fingerprint-nan": (lambda h, _: h["fingerprint"].update(threads=float("nan")), "*", "(?i)nan|finite|JSON"),
    "fingerprint-list": (lambda h, _: h["fingerprint"].update(threads=[2]), ":1 [fingerprint.threads]", "not allowed"),
    "review-lacks": (lambda h, _: h["review"].pop("by"), ":1 [review]", "is not a review, or null"),
    "prompt-count": (lambda h, _: h.update(prompts=2), ":1 [prompts]", "2 prompts announced, 3 lines found"),
    "line-missing": (lambda h, lines: lines.pop(), ":1 [prompts]", "3 prompts announced, 2 lines found"),
    "duplicate": (lambda h, lines: lines[1].update(id="a"), ":3 [id]", "duplicate id 'a'"),
    "line-key": (lambda h, lines: lines[2].update(extra=1), ":4 []", "unknown key 'extra'"),
    "line-lacks": (lambda h, lines: lines[0].pop("score"), ":2 []", "'score' is a required property"),
    "finish": (lambda h, lines: lines[0].update(finish_reason="eos"), ":2 [finish_reason]", "not one of: stop, length"),
    "text-number": (lambda h, lines: lines[0].update(text=3), ":2 [text]", "3 is not allowed here"),
    "tokens-null": (lambda h, lines: lines[0].update(tokens=None), ":2 [tokens]", "not allowed here"),
    "tokens-negative": (lambda h, lines: lines[0].update(tokens=[1, -2]), ":2 [tokens]", "non-negative|type integer"),
    "tokens-float": (lambda h, lines: lines[0].update(tokens=[1, 2.5]), ":2 [tokens]", "non-negative|type integer"),
    "tokens-nan": (lambda h, lines: lines[0].update(tokens=[1, float("nan")]), "*", "NaN|non-negative|type integer"),
    "tokens-text": (lambda h, lines: lines[0].update(tokens=[1, "2"]), ":2 [tokens]", "non-negative|type integer"),
    "tokens-large": (lambda h, lines: lines[0].update(tokens=[1, 2**31]), ":2 [tokens]", "non-negative|type integer"),
    "tokens-huge": (lambda h, lines: lines[0].update(tokens=[1, 10**30]), ":2 [tokens]", "non-negative|type integer"),
    "tokens-nested": (lambda h, lines: lines[0].update(tokens=[[1, 2]]), ":2 [tokens]", "non-negative|type integer"),
    "tokens-ragged": (lambda h, lines: lines[0].update(tokens=[[1], [2, 3]]), ":2 [tokens]", "non-negative|type integer"),
}  # fmt: skip


@pytest.mark.parametrize(("edit", "place", "message"), INVALID.values(), ids=INVALID)
def test_what_the_schema_forbids_is_refused_even_if_signed(edit: Edit, place: str, message: str) -> None:
    with pytest.raises(GoldenError, match=message) as caught:
        read(edited(edit, signed=True))
    if place != "*":  # NaN is no JSON: where it is refused is open
        assert caught.value.where.replace("[tokens.0]", "[tokens]").replace("[tokens.1]", "[tokens]") == WHERE + place


def test_a_newer_schema_names_the_command() -> None:
    with pytest.raises(GoldenError) as caught:
        read(edited(lambda h, _: h.update(schema=99), signed=False))
    assert caught.value.fix == "pip install -U pytest-repro"


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        (b"", ":1", "not a pytest-repro golden"),
        (b"\n\n", ":1", "not a pytest-repro golden"),
        (b"hello", ":1", "not valid JSON"),
        (b"\xff\xfe\x00\x01", ":1", "not valid JSON"),
        (b"[" * 100_000, ":1", "not valid JSON"),
        (b"9" * 10_000, ":1", "not valid JSON"),
        (b"[1, 2]", ":1", "not a JSON object"),
        (b"{}", ":1", "not a pytest-repro golden"),
        (b"version https://git-lfs.github.com/spec/v1\n", ":1", "not valid JSON"),
        (b"<<<<<<< HEAD\n" + TEXT, ":1", "not valid JSON"),
        (TEXT + b"=======\n", ":5", "not valid JSON"),
        (TEXT[:-20], ":4", "not valid JSON"),
        (TEXT.replace(b'{"', b'{"suite": "another", "', 1), ":1", "stands twice"),
        (TEXT + b"3\n", ":5", "not a JSON object"),
    ],
    ids=[
        "empty", "blank", "words", "binary", "nested", "digits", "list", "object", "lfs-pointer", "conflict-above",
        "conflict-below", "truncated", "key-twice", "number",
    ],
)  # fmt: skip
def test_what_is_no_golden_at_all(text: bytes, place: str, message: str) -> None:
    with pytest.raises(GoldenError, match=message) as caught:
        read(text)
    assert caught.value.where == WHERE + place


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (None, "the binary part is missing"),
        (b"", "truncated, edited, or of another version"),
        (NUMBERS[:-4], "truncated, edited, or of another version"),
        (NUMBERS + b"\x00", "truncated, edited, or of another version"),
        (NUMBERS[:-1] + bytes([NUMBERS[-1] ^ 1]), "truncated, edited, or of another version"),
        (encode(golden(generation(output("a", [1]))))[1], "truncated, edited, or of another version"),
    ],
    ids=["missing", "empty", "truncated", "longer", "one-bit", "another-golden's"],
)
def test_a_damaged_binary_part(numbers: bytes | None, message: str) -> None:
    with pytest.raises(GoldenError, match=message) as caught:
        read(TEXT, numbers)
    assert caught.value.where == BINARY and f"git checkout -- {BINARY}" in caught.value.fix


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda t: t.update(logprob=t["logprob"][:-1].copy()), "logprob"),
        (lambda t: t.update(gap=np.zeros((3, 1), np.float32)), "gap"),
        (lambda t: t.pop("runner_up"), "runner_up"),
        (lambda t: t.update({"noise.prompt_level": f32([0.5])}), "noise.prompt_level"),
        (lambda t: t.update(offsets=np.array([0, 1, 3, 3])), "offsets"),
        (lambda t: t.update(offsets=np.array([0, 3])), "offsets"),
    ],
    ids=["shorter", "another-shape", "absent", "levels", "offsets", "fewer-offsets"],
)
def test_parts_that_disagree(change: Callable[[dict[str, Any]], None], name: str) -> None:
    with pytest.raises(GoldenError, match=f"disagree about {name}") as caught:
        read(*with_numbers(change))
    assert caught.value.where == BINARY


def test_a_level_that_nothing_measured_explains_is_refused() -> None:
    """A prompt's noise level is a mean over tokens, so the largest difference of any token bounds it."""
    with pytest.raises(GoldenError, match="exceeds 1, the largest difference") as caught:
        read(*with_numbers(lambda t: t.update({"noise.prompt_level": f32([0.5, 7.0, 0.5])})))
    assert caught.value.where == f"{BINARY} [noise.prompt_level]"


@pytest.mark.parametrize("name", ["noise.prompt_level", "noise.gap_level"])
def test_a_level_below_zero_is_refused(name: str) -> None:
    with pytest.raises(GoldenError, match="a prompt's noise level is negative") as caught:
        read(*with_numbers(lambda t: t.update({name: f32([0.125, -1e-9, 0.125])})))
    assert caught.value.where == f"{BINARY} [{name}]"


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("points", None, "sketch.points is missing"),
        ("points", np.frombuffer(b"one", np.uint8), "the shape [2, 3, 4]"),
        ("points", np.frombuffer(b"one\none", np.uint8), "are not names"),
        ("points", np.frombuffer(b"one\n", np.uint8), "are not names"),
        ("points", np.frombuffer(b"\xff\none", np.uint8), "can't decode"),
        ("points", f32([1.0, 2.0]), "are not names"),
        ("values", np.zeros((2, 5, 4), np.float32), "the shape [2, 5, 4]"),
        ("values", np.zeros((2, 0, 4), np.float32), "the shape [2, 0, 4]"),
        ("values", np.zeros((2, 3), np.float32), "the shape [2, 3]"),
        ("values", np.full((2, 3, 4), math.nan, np.float32), "negative or none"),
        ("level", f32([0.0]), "the shape [1]"),
        ("level", f32([0.0, -1.0]), "negative or none"),
        ("level", f32([0.0, math.inf]), "negative or none"),
    ],
)
def test_a_sketch_that_nobody_can_have_recorded_is_refused(part: str, value: Any, message: str) -> None:
    def change(tensors: dict[str, Any]) -> None:
        tensors[f"sketch.{part}"] = value
        if value is None:
            del tensors[f"sketch.{part}"]

    with pytest.raises(GoldenError) as raised:
        read(*with_numbers(change))
    assert message in raised.value.what and raised.value.where == BINARY and raised.value.fix


def test_a_golden_without_a_sketch_has_none() -> None:
    assert read(*encode(replace(GOLDEN, sketch=None))).sketch is None


@pytest.mark.parametrize("numbers", [b"", b"not safetensors", b"\xff" * 64], ids=["empty", "words", "huge-header"])
def test_a_foreign_binary_part_that_is_signed_for(numbers: bytes) -> None:
    with pytest.raises(GoldenError, match="the binary part cannot be read"):
        read(edited(lambda h, _: h.update(numbers=digest(numbers)), signed=True), numbers)


# --- migrations -----------------------------------------------------------------------------------------------------


def older(header: dict[str, Any], lines: list[dict[str, Any]]) -> None:
    """As two imagined schemas before the first: -1 spelt `model` as `checkpoint` and had texts as lists of words."""
    header["schema"] = -1
    header["checkpoint"] = header.pop("model")
    for line in lines:
        line["text"] = line["text"].split()


def lift_checkpoint(header: dict[str, Any], lines: list[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    kept = {k: v for k, v in header.items() if k != "checkpoint"}
    return {**kept, "schema": 0, "model": header["checkpoint"]}, lines


def lift_text(header: dict[str, Any], lines: list[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    return {**header, "schema": 1}, [{**line, "text": " ".join(line["text"])} for line in lines]


def test_an_older_golden_is_lifted_step_by_step_and_keeps_its_review(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MIGRATIONS", {-1: lift_checkpoint, 0: lift_text})
    back = read(edited(older, signed=True))
    assert (back.model, back.generation.texts, back.review) == ("m", ("hello", "3", ""), REVIEW)


@pytest.mark.parametrize(
    ("migrations", "message"),
    [
        ({}, "no migration from schema -1"),
        ({-1: lift_checkpoint}, "no migration from schema 0"),
        ({-1: lambda h, lines: ({**h, "schema": 1}, lines)}, "required property|unknown key 'checkpoint'"),
    ],
    ids=["none", "a-gap", "what-it-makes-is-checked"],
)
def test_migrations_that_do_not_do(monkeypatch: pytest.MonkeyPatch, migrations: dict, message: str) -> None:
    monkeypatch.setattr(wire, "MIGRATIONS", migrations)
    with pytest.raises(GoldenError, match=message):
        read(edited(older, signed=True))


def test_an_older_golden_edited_by_hand_is_seen_before_it_is_lifted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MIGRATIONS", {-1: lift_checkpoint, 0: lift_text})
    signed = edited(older, signed=True)
    with pytest.raises(GoldenError, match="edited by hand"):
        read(edited(lambda h, lines: lines[0].update(text=["goodbye"]), signed=False, text=signed))


def test_this_version_writes_the_newest_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    assert json.loads(TEXT.splitlines()[0])["schema"] == wire.SCHEMA == 1
    monkeypatch.setattr(wire, "SCHEMA", 0)
    with pytest.raises(GoldenError, match="has schema 1, and this pytest-repro reads up to 0"):
        read()


LIMITS = {"max_divergent": 0, "max_unexplained": 0, "accuracy_drop": 2.0, "alpha": 0.05, "length_ratio": [0.9, 1.1],
          "fp32_waiver": "explained"}  # fmt: skip
AGREED = Agreed(LIMITS, "Bo", "2026-11-22", "why")


def test_a_seal_binds_every_field_of_the_review() -> None:
    fields = {"by": "x", "when": "x", "reason": "x", "previous": "x", "commit": "x", "thresholds": AGREED}
    seals = {REVIEW.seal("d"), REVIEW.seal("e"), *(replace(REVIEW, **{k: v}).seal("d") for k, v in fields.items())}
    assert len(seals) == 8 and set(fields) == set(Review.__dataclass_fields__)


def test_a_seal_binds_every_field_of_the_thresholds() -> None:
    fields = {"by": "x", "when": "x", "reason": "x", "limits": {**LIMITS, "max_divergent": 0.0}}
    changed = [replace(REVIEW, thresholds=replace(AGREED, **{k: v})) for k, v in fields.items()]
    assert len({review.seal("d") for review in changed}) == 4 and set(fields) == set(Agreed.__dataclass_fields__)


def test_the_seal_of_a_review_without_thresholds_is_what_it_was() -> None:
    fields = {name: value for name, value in vars(REVIEW).items() if name != "thresholds"}
    assert REVIEW.seal("d") == digest({"accepted": "d", **fields})
    assert "thresholds" not in json.loads(TEXT.splitlines()[0])["review"]


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda t: t.pop("reason"), "'reason' is a required property"),
        (lambda t: t.update(more=1), "unknown key 'more'"),
        (lambda t: t["limits"].pop("alpha"), "'alpha' is a required property"),
        (lambda t: t["limits"].update(max_divergent=2.0), "2.0"),
        (lambda t: t["limits"].update(fp32_waiver="some"), '"some" is not one of'),
        (lambda t: t["limits"].update(length_ratio=[1]), "minItems"),
        (lambda t: t["limits"].update(max_divergnt=1), "unknown key 'max_divergnt'"),
        (lambda t: t["limits"].update(alpha=2), "2 is not allowed"),
    ],
)
def test_thresholds_of_a_review_are_held_against_the_schema(edit: Callable[[Any], None], told: str) -> None:
    text, _ = encode(replace(GOLDEN, review=replace(REVIEW, thresholds=AGREED)))
    assert read(text).review == replace(REVIEW, thresholds=AGREED)
    with pytest.raises(GoldenError) as caught:
        read(edited(lambda h, _: edit(h["review"]["thresholds"]), signed=True, text=text))
    assert told in caught.value.what or caught.value.what.endswith("is not a review, or null")


# --- calibrations ---------------------------------------------------------------------------------------------------

MACHINE = {"cpu_model": "another", "time": "2026-12-01T10:00:00+00:00", "threads": 2, "autocast": False, "env.X": None}


def calibrated(fingerprint: dict[str, Any] | None = None) -> Golden:
    each = Calibration(fingerprint or MACHINE, envelope(3, gap_levels=[0.125, math.nan, 0.25]))
    recorded = replace(GOLDEN, noise=envelope(3, gap_levels=[0.125, math.nan, 0.25]))
    return replace(recorded, calibrations=(each,))


def envelope(prompts: int, gap_levels: list[float]) -> Envelope:
    return Envelope("bf16", (variant(),), f32([0.5] * prompts), f32(gap_levels))


CALIBRATED = encode(calibrated())


def recalibrated(change: Callable[[dict[str, Any]], None]) -> tuple[bytes, bytes]:
    tensors = load(CALIBRATED[1])
    change(tensors)
    numbers = save(tensors)
    return edited(lambda h, _: h.update(numbers=digest(numbers)), signed=True, text=CALIBRATED[0]), numbers


def test_calibrations_come_back_and_are_part_of_the_digest() -> None:
    back = read(*CALIBRATED)
    (found,) = back.calibrations
    assert found.fingerprint == MACHINE and found.when == "2026-12-01"
    assert found.envelope.variants == (variant(),) and found.envelope.max_deficit == 0.25
    for name in ("prompt_level", "gap_level"):
        np.testing.assert_array_equal(getattr(found.envelope, name), getattr(calibrated().noise, name))
    assert encode(back) == CALIBRATED
    assert wire.signed(calibrated()).digest == back.digest != wire.signed(replace(back, calibrations=())).digest


def test_a_golden_without_calibrations_is_what_it_was() -> None:
    assert b"calibration" not in TEXT and b"calibration" not in NUMBERS
    assert encode(replace(calibrated(), calibrations=())) == encode(replace(GOLDEN, noise=calibrated().noise))


@pytest.mark.parametrize("name", ["prompt_level", "gap_level"])
@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([0.125, math.nan, -1e-9], "negative"), ([0.125, math.nan, 7.0], "exceeds"), ([0.125, math.nan, math.inf], "exceeds"),
        ([math.nan, math.nan, math.nan], "not known here"), ([0.125, 0.125], "disagree about calibration.0"),
    ],
    ids=["negative", "beyond what was measured", "infinite", "unknown", "too short"],
)  # fmt: skip
def test_levels_of_a_calibration_have_bounds(name: str, values: list[float], told: str) -> None:
    with pytest.raises(GoldenError, match=told) as caught:
        read(*recalibrated(lambda t: t.update({f"calibration.0.{name}": f32(values)})))
    assert caught.value.where.startswith(BINARY)
    assert f"calibration.0.{name}" in caught.value.where + caught.value.what


def test_a_calibration_whose_levels_are_gone_or_of_another_kind() -> None:
    with pytest.raises(GoldenError, match=r"disagree about calibration\.0\.gap_level"):
        read(*recalibrated(lambda t: t.pop("calibration.0.gap_level")))
    with pytest.raises(GoldenError, match=r"disagree about calibration\.0\.gap_level"):
        read(*recalibrated(lambda t: t.update({"calibration.0.gap_level": np.zeros(3, np.int64)})))


@pytest.mark.parametrize(
    ("edit", "where"),
    [
        (lambda h: h["calibrations"].clear(), "calibrations"),
        (lambda h: h.update(calibrations={}), "calibrations"),
        (lambda h: h.update(calibrations=h["calibrations"] * 65), "calibrations"),
        (lambda h: h["calibrations"][0].update(by="me"), "calibrations.0"),
        (lambda h: h["calibrations"][0].pop("fingerprint"), "calibrations.0"),
        (lambda h: h["calibrations"][0]["fingerprint"].update(x=[1]), "calibrations.0.fingerprint.x"),
        (lambda h: h["calibrations"][0]["noise"]["variants"].clear(), "calibrations.0.noise.variants"),
        (lambda h: h["calibrations"][0]["noise"]["variants"][0].update(max_deficit=-1), "calibrations.0.noise.variants.0.max_deficit"),
        (lambda h: h["calibrations"][0]["noise"]["variants"][0].update(max_abs_dgap=math.inf), "calibrations.0.noise.variants.0.max_abs_dgap"),
    ],
)  # fmt: skip
def test_calibrations_are_held_against_the_schema(edit: Callable[[Any], None], where: str) -> None:
    with pytest.raises(GoldenError) as caught:
        read(edited(lambda h, _: edit(h), signed=True, text=CALIBRATED[0]), CALIBRATED[1])
    assert caught.value.where == f"{WHERE}:1 [{where}]"


def test_a_calibration_edited_by_hand_is_seen() -> None:
    with pytest.raises(GoldenError, match="edited by hand"):
        read(edited(lambda h, _: h["calibrations"][0]["fingerprint"].update(cpu_model="mine"), signed=False, text=CALIBRATED[0]), CALIBRATED[1])  # fmt: skip


def test_a_machine_that_calls_itself_oddly_stays_text() -> None:
    text, numbers = encode(calibrated(fingerprint={"cpu_model": ODD, ODD: ODD, "time": ODD}))
    assert text.isascii() and all(byte >= 32 or byte == 10 for byte in text) and len(text.splitlines()) == 4
    assert read(text, numbers).calibrations[0].fingerprint == {"cpu_model": ODD, ODD: ODD, "time": ODD}
