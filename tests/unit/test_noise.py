from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from pytest_repro.generation import Scores, subset
from pytest_repro.noise import Envelope, bulk_ratio, envelope, merged
from tests.unit.builders import f32, generation, output, scores, variant

GOLDEN = generation(output("a", [1, 2]), output("b", [3]))


def test_envelope_sums_up_every_replay() -> None:
    found = envelope(
        "bf16",
        GOLDEN,
        {
            "batch 1": [
                scores("a", [1, 2], logprob=[-0.75, -0.5], gap=[1.0, 1.25]),  # |Δlogp| 0.25, 0; |Δgap| 0, 0.25
                scores("b", [3], logprob=[-0.625], gap=[0.5]),  # 0.125; 0.5
            ],
            "threads 1": [
                scores("a", [1, 9], [0, 0.75], logprob=[-0.5, -1.0], gap=[1.0, 0.25]),  # 0, 0.5; 0, 0.75
                scores("b", [3], logprob=[-0.5], gap=[1.0]),
            ],
        },
    )
    one, two = found.variants
    assert vars(one) == {
        "name": "batch 1", "mean_abs_dlogp": 0.125, "max_abs_dlogp": 0.25, "max_abs_dgap": 0.5, "max_deficit": 0.0,
        "flipped_prompts": 0,
    }  # fmt: skip
    assert vars(two) == {
        "name": "threads 1", "mean_abs_dlogp": 0.125, "max_abs_dlogp": 0.5, "max_abs_dgap": 0.75, "max_deficit": 0.75,
        "flipped_prompts": 1,
    }  # fmt: skip
    assert found.prompt_level.tolist() == [0.1875, 0.0625] and found.prompt_level.dtype == np.float32
    assert found.gap_level.tolist() == [0.25, 0.25] and found.gap_level.dtype == np.float32
    assert found.max_deficit == 0.75 and found.mean_abs_dlogp == 0.125 and found.compute_class == "bf16"


@pytest.mark.parametrize(
    ("variants", "wanted"),
    [
        ((), 0.0),
        ((variant(max_abs_dgap=0.25, max_deficit=0.125),), 0.25),
        ((variant(max_abs_dgap=0.125, max_deficit=0.5),), 0.5),
        ((variant(max_abs_dgap=0.25), variant(max_abs_dgap=1.0), variant(max_abs_dgap=0.5)), 1.0),
    ],
    ids=["none", "gap", "deficit", "largest-of-all"],
)
def test_max_deficit(variants: tuple, wanted: float) -> None:
    assert Envelope("bf16", variants, f32([]), f32([])).max_deficit == wanted


def test_a_prompt_is_never_held_against_less_than_the_suite() -> None:
    levels = f32([0.125, 2.0, math.nan])
    noise = Envelope("bf16", (variant(mean_abs_dlogp=0.25), variant(mean_abs_dlogp=0.75)), levels, levels)
    assert noise.mean_abs_dlogp == 0.5
    assert [noise.level(i) for i in range(4)] == [0.5, 2.0, 0.5, 0.5]


def test_an_engine_that_cannot_replay_has_an_empty_envelope() -> None:
    found = envelope("bf16", GOLDEN, {})
    assert found.variants == () and found.prompt_level.tolist() == [0.0, 0.0]
    assert found.max_deficit == found.mean_abs_dlogp == 0.0 and np.isnan(found.gap_level).all()
    assert np.isnan(found.level(0)), "nothing was measured, so nothing is known to be calm"


def test_unknown_numbers_are_left_out() -> None:
    row = scores("b", [3], logprob=[math.nan], gap=[math.nan])
    found = envelope("bf16", GOLDEN, {"x": [scores("a", [1, 2], logprob=[-0.75, -0.75], gap=[1.5, 1.0]), row]})
    assert found.variants[0].mean_abs_dlogp == 0.25 and found.max_deficit == 0.5
    assert found.level(1) == 0.25 and found.gap_level.tolist() == [0.25, pytest.approx(math.nan, nan_ok=True)]


def test_json_round_trip() -> None:
    noise = Envelope("bf16", (variant("a"), variant("b", flipped_prompts=3)), f32([0.5]), f32([0.25]))
    again = Envelope.from_json(noise.to_json(), noise.prompt_level, noise.gap_level)
    assert again.variants == noise.variants and again.compute_class == "bf16"
    assert noise.to_json()["max_deficit"] == 0.25 and noise.to_json()["mean_abs_dlogp"] == 0.5


def test_fp32_noise_may_grow_more_than_16_bit_noise_and_exact_noise_not_at_all() -> None:
    assert bulk_ratio("bf16") == bulk_ratio("fp16") == 2.0
    assert bulk_ratio("fp32") == 10.0 and bulk_ratio("exact") == 1.0


def test_with_its_weights_alone_rounded_a_model_has_fp32s_noise() -> None:
    assert {bulk_ratio(f"e4m3-weights{scale}") for scale in ("", "-tensor", "-block32", "-unscaled")} == {10.0}
    assert bulk_ratio("e8m23") == bulk_ratio("e8m23-kv-channel") == 10.0, "rounding to float32 changes nothing"
    assert {bulk_ratio(name) for name in ("e4m3", "e4m3-activations", "e4m3-weights-kv", "e4m3-kv-tensor")} == {2.0}


def test_envelopes_of_parts_are_the_envelope_of_the_whole() -> None:
    """To the last bit: means are taken over all prompts again, whatever order the parts come in."""
    random = np.random.default_rng(0)
    whole = generation(*(output(f"p{i}", [i] * (1 + i % 4)) for i in range(23)))

    def replayed(name: str, i: int) -> Scores:
        n, rows = whole.length(i), replays.setdefault((name, i), random.normal(size=(3, 8)))
        unknown = [math.nan] * n if i == 5 else (rows[1][:n] - 0.5).tolist()
        return scores(f"p{i}", [i] * n, np.abs(rows[0][:n]).tolist(), unknown, rows[2][:n].tolist())

    replays: dict[tuple[str, int], Any] = {}

    def measured(rows: list[int]) -> Envelope:
        return envelope("bf16", subset(whole, rows), {v: [replayed(v, i) for i in rows] for v in ("x", "y", "z")})

    one, places = measured(list(range(23))), [list(range(k, 23, 3)) for k in (2, 0, 1)]
    found = merged([measured(rows) for rows in places], np.argsort(np.concatenate(places)))
    assert found.variants == one.variants and found.to_json() == one.to_json()
    np.testing.assert_array_equal(found.prompt_level, one.prompt_level)
    np.testing.assert_array_equal(found.gap_level, one.gap_level)
