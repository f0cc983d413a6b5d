from __future__ import annotations

import hashlib

import numpy as np
import pytest

from pytest_repro.generation import Generation, digest, offsets_of, pack, subset, token_digest
from tests.unit.builders import f32, generation, output, request


def test_digest_of_bytes_and_of_canonical_json() -> None:
    assert digest(b"") == "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert digest({"b": 1, "a": 2}) == digest({"a": 2, "b": 1}) != digest({"a": 1, "b": 2})
    assert digest("é\ud800") == "sha256:" + hashlib.sha256(rb'"\u00e9\ud800"').hexdigest()


def test_token_digest_is_of_little_endian_int32() -> None:
    wanted = "sha256:" + hashlib.sha256(b"\x01\x00\x00\x00\x00\x01\x00\x00").hexdigest()
    assert token_digest([1, 256]) == token_digest(np.array([1, 256], np.int32)) == wanted
    assert token_digest([256, 1]) != wanted


def test_of_packs_in_the_requests_order() -> None:
    packed = Generation.of(
        [request("a"), request("b"), request("c")],
        [output("c", [7]), output("a", [1, 2], logprob=[-0.25, -0.5]), output("b", [], error="NaN in the logits")],
    )
    assert packed.ids == ("a", "b", "c") and len(packed) == 3
    assert packed.offsets.tolist() == [0, 2, 2, 3] and packed.tokens.tolist() == [1, 2, 7]
    assert packed.logprob.tolist() == [-0.25, -0.5, -0.5]
    assert packed.tokens[packed.span(0)].tolist() == [1, 2] and packed.tokens[packed.span(1)].tolist() == []
    assert packed.index() == {"a": 0, "b": 1, "c": 2}
    assert packed.errors == {"b": "NaN in the logits"}
    assert packed.content_digests[0] == digest("question a") and packed.prompt_digests[0] == token_digest([97])


def test_of_leaves_out_requests_without_an_output() -> None:
    packed = Generation.of([request("a"), request("b")], [output("b", [5])])
    assert packed.ids == ("b",) and packed.prompt_digests == (token_digest([98]),)


def test_of_fills_what_was_not_watched_with_nan() -> None:
    watched = generation(output("a", [1, 2], watched=[-1.0, -2.0]), output("b", [3])).reference_logprob
    assert watched is not None
    np.testing.assert_array_equal(watched, f32([-1.0, -2.0, np.nan]))


def test_of_refuses_an_output_that_nobody_asked_for() -> None:
    with pytest.raises(ValueError, match=r"without a request.*'z'"):
        Generation.of([request("a")], [output("a", [1]), output("z", [1])])


@pytest.mark.parametrize(
    "column",
    [{"logprob": [-1.0]}, {"gap": [1.0]}, {"runner_up": [1]}, {"watched": [-1.0]}],
    ids=lambda c: next(iter(c)),
)
def test_of_refuses_a_column_of_another_length(column: dict[str, list[float]]) -> None:
    with pytest.raises(ValueError, match="prompt a"):
        generation(output("a", [1, 2], **column), output("b", [3]))


def test_subset_keeps_the_order_asked_for() -> None:
    whole = generation(output("a", [1, 2]), output("b", []), output("c", [3], watched=[-4.0]))
    some = subset(whole, [2, 1, 0])
    assert some.ids == ("c", "b", "a") and some.texts == ("3", "", "1 2")
    assert some.tokens.tolist() == [3, 1, 2] and some.offsets.tolist() == [0, 1, 1, 3]
    assert some.content_digests == tuple(map(digest, ("question c", "question b", "question a")))
    assert some.reference_logprob is not None and some.reference_logprob[0] == -4.0
    none = subset(whole, [])
    assert len(none) == 0 and none.offsets.tolist() == [0] and none.tokens.dtype == np.int32


def test_offsets_and_pack_work_for_nothing() -> None:
    assert offsets_of([]).tolist() == [0] and offsets_of([2, 0, 3]).tolist() == [0, 2, 2, 5]
    assert pack([], np.float32).dtype == np.float32 and len(pack([], np.int32)) == 0
