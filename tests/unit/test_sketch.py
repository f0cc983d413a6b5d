"""Where in a model a difference begins, from sketches made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pytest_repro import sketch
from pytest_repro.sketch import PROJECTIONS, Recorded, Sketch, locate

POINTS = (
    "model.embed_tokens", "model.layers.0.norm", "model.layers.0.attn.q_proj", "model.layers.0.attn.o_proj:input",
    "model.layers.0.attn.o_proj", "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj", "model.layers.0",
    "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj", "model.layers.1", "model.norm", "lm_head",
)  # fmt: skip
ROWS = 8
LEVEL = 0.01
"""What benign changes moved every output by; in bf16 twice that is rounding."""


def outputs(seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal((len(POINTS), ROWS, PROJECTIONS)).astype(np.float32)


def golden(repeatable: bool = True, level: float = LEVEL, values: Any = None) -> Recorded:
    kept = Sketch(POINTS, outputs() if values is None else values)
    return Recorded(("a", "b", "c", "d"), kept, np.full(len(POINTS), level, np.float32), repeatable)


def moved(shares: dict[str, float] | float, points: Sequence[str] = POINTS) -> Sketch:
    """Outputs that moved by a share of their size: everywhere, or at the places named."""
    by = np.array([shares if isinstance(shares, float) else shares.get(name, 0.0) for name in POINTS])
    values = (outputs() * (1 + by[:, None, None])).astype(np.float32)
    return Sketch(tuple(points), values[[POINTS.index(name) for name in points]])


def from_on(point: str, share: float, before: float = 0.0) -> Sketch:
    """A defect: everything from a place on moved by a share, and by less before it."""
    at = POINTS.index(point)
    return moved({name: share if i >= at else before for i, name in enumerate(POINTS)})


@pytest.mark.parametrize("point", [p for p in POINTS if ":" not in p])
@pytest.mark.parametrize("same", [True, False])
def test_the_first_output_that_leaves_its_envelope_is_named(point: str, same: bool) -> None:
    found = locate(golden(), from_on(point, 0.1, before=0.0 if same else 0.005), "bf16", same)
    assert found.module == point
    assert found.distance == pytest.approx(0.1, rel=1e-3)
    assert found.compared == len(POINTS)


def test_what_a_module_is_given_blames_the_one_around_it() -> None:
    found = locate(golden(), from_on("model.layers.0.attn.o_proj:input", 0.1), "bf16", False)
    assert found.module == "model.layers.0.attn"
    assert "what it computes before its o_proj is the first" in found.finding


def test_in_the_same_environment_the_last_bit_counts() -> None:
    now = from_on("model.layers.1.mlp.up_proj", 1e-5)
    assert locate(golden(), now, "bf16", True).module == "model.layers.1.mlp.up_proj"
    assert locate(golden(), now, "bf16", False).module == ""


def test_where_a_second_run_gave_other_bits_the_last_bit_says_nothing() -> None:
    assert locate(golden(repeatable=False), from_on("model.norm", 1e-5), "bf16", True).module == ""


def test_rounding_is_not_localised() -> None:
    found = locate(golden(), moved(1.5 * LEVEL), "bf16", False)
    assert found.module == "" and "no module's output left its envelope" in found.finding


def test_the_same_bits_point_beyond_the_model() -> None:
    found = locate(golden(), moved(0.0), "bf16", True)
    assert found.module == "" and "lies after the model" in found.finding


def test_noise_that_creeps_over_the_edge_names_nobody() -> None:
    creeping = moved({name: 0.011 + 0.001 * i for i, name in enumerate(POINTS)})
    found = locate(golden(), creeping, "bf16", False)
    assert found.module == "" and "had nearly left theirs" in found.finding
    assert found.distance is not None and found.allowed is not None and found.distance > found.allowed


def test_a_place_that_noise_put_over_the_edge_does_not_hide_a_defect() -> None:
    """Kernels that the recording did not see may be a little noisier somewhere before it."""
    now = moved({name: 0.1 if i >= 8 else 0.022 if i == 2 else 0.015 for i, name in enumerate(POINTS)})
    assert locate(golden(), now, "bf16", False).module == POINTS[8]


def test_a_jump_is_measured_against_what_rounding_explains_at_each_place() -> None:
    """Where the recording itself was noisy, a large move is no news."""
    kept = golden()
    kept.level[:8] = 0.1
    now = moved(0.05)
    assert locate(kept, now, "bf16", False).module == POINTS[8]


def test_a_class_of_few_bits_has_room_for_one_rounding_where_the_recording_was_exact() -> None:
    assert locate(golden(level=0.0), moved(2.0**-8), "bf16", False).module == ""
    assert locate(golden(level=0.0), moved(2.0**-8), "fp32", False).module == POINTS[0]


def test_nan_is_a_difference() -> None:
    now = moved(0.0)
    now.values[5, 3] = np.nan
    found = locate(golden(), now, "bf16", True)
    assert found.module == POINTS[5] and found.distance is None


@pytest.mark.parametrize("rows", [0, ROWS - 1])
def test_sketches_of_other_rows_are_not_compared(rows: int) -> None:
    now = replace(moved(0.0), values=outputs()[:, :rows])
    assert "other prompts" in locate(golden(), now, "bf16", True).finding


def test_another_architecture_is_said() -> None:
    now = Sketch(tuple(f"transformer.{name}" for name in POINTS), outputs(1))
    assert "not the golden's" in locate(golden(), now, "bf16", True).finding


def test_places_that_only_one_of_them_has_are_passed_over() -> None:
    now = from_on("model.layers.1", 0.1)
    kept = [i for i, name in enumerate(POINTS) if name != "model.layers.0.norm"]
    found = locate(golden(), Sketch(tuple(POINTS[i] for i in kept), now.values[kept]), "bf16", True)
    assert found.module == "model.layers.1" and found.compared == len(POINTS) - 1


def test_a_recording_keeps_the_largest_benign_move_and_no_place_that_is_not_finite() -> None:
    plain, masked = Sketch(POINTS, outputs()), moved(0.02)
    plain.values[0, 0, 0] = masked.values[0, 0, 0] = -np.inf
    kept = sketch.recorded(["a"], plain, plain, [moved(0.01), masked, moved(0.015)])
    assert kept.sketch.points == POINTS[1:] and kept.repeatable
    np.testing.assert_allclose(kept.level, 0.02, rtol=1e-3)
    assert not sketch.recorded(["a"], plain, masked, []).repeatable


def test_signs_are_the_same_everywhere() -> None:
    """Known values: a golden's sketch is worth nothing once these change."""
    drawn = sketch.signs(576, 4)
    assert drawn.shape == (576, 4) and set(np.unique(drawn)) == {-1.0, 1.0}
    assert drawn[:3].tolist() == KNOWN
    assert abs(drawn.mean()) < 0.05


KNOWN = [[-1.0, 1.0, -1.0, -1.0], [1.0, 1.0, 1.0, 1.0], [-1.0, 1.0, -1.0, 1.0]]


def test_distances_are_preserved_by_a_few_projections() -> None:
    """A relative change of 3 % stays one, to within the luck of four directions and eight rows."""
    rng = np.random.default_rng(1)
    a = rng.standard_normal((ROWS, 576))
    b = a + 0.03 * rng.standard_normal((ROWS, 576))
    project = sketch.signs(576, PROJECTIONS)
    then, now = (Sketch(("x",), (m @ project)[None].astype(np.float32)) for m in (a, b))
    assert 0.015 < sketch.distances(then, now)[0] < 0.06


@pytest.mark.parametrize(("prompt", "answer", "rows"), [(10, 100, [9, 41]), (10, 5, [9, 14]), (3, 0, [2])])
def test_rows_lie_within_prompt_and_answer(prompt: int, answer: int, rows: list[int]) -> None:
    assert sketch.positions(prompt, answer) == rows


@pytest.mark.parametrize(("prompts", "count"), [(1, 1), (8, 1), (9, 2), (32, 4), (1319, 4)])
def test_a_small_suite_is_looked_at_less(prompts: int, count: int) -> None:
    names = [f"p{i}" for i in range(prompts)]
    assert sketch.chosen(names) == tuple(names[:count])
