"""Operations rolled up, on made numbers."""

from __future__ import annotations

import pytest

from pytest_repro.audit import Operation, Pass, rolled_up, unlooked, unnumbered


def test_layers_are_one() -> None:
    assert unnumbered("model.layers.13.mlp.experts.2") == "model.layers.*.mlp.experts.*"
    assert unnumbered("lm_head") == "lm_head" and unnumbered("h.0") == "h.*" and unnumbered("a.b2.c") == "a.b2.c"


def test_what_two_layers_did_is_added_up() -> None:
    one = Operation(
        "l.0.q", "mm", seconds=1.0, sums=10, length=4, compared=30, moved=3, distances=(27, 3), largest=1, shift=0.5, scale=4
    )  # fmt: skip
    other = Operation(
        "l.1.q", "mm", seconds=2.0, sums=5, length=4, compared=15, moved=15, distances=(0, 5, 0, 10), largest=4, shift=1.5, scale=1
    )  # fmt: skip
    (found,) = rolled_up([one, other])
    assert (found.module, found.calls, found.seconds, found.sums, found.length) == ("l.*.q", 2, 3.0, 15, 4)
    assert (found.compared, found.moved, found.distances, found.largest) == (45, 18, (27, 8, 0, 10), 4)
    assert found.moved_percent == pytest.approx(40.0) and found.relative == pytest.approx(0.4**0.5)


def test_sums_of_another_length_stand_alone() -> None:
    """Scores of so many numbers of a head, and values of so many tokens, are both products of one module."""
    found = rolled_up(Operation(f"l.{layer}.a", "bmm", length=length) for layer in (0, 1) for length in (64, 39))
    assert [(op.length, op.calls) for op in found] == [(64, 2), (39, 2)]


def test_operations_stay_in_their_order() -> None:
    names = [("l.0.norm", "mean"), ("l.0.q", "mm"), ("l.1.norm", "mean"), ("l.1.q", "mm"), ("head", "mm")]
    assert [op.module for op in rolled_up(Operation(m, n) for m, n in names)] == ["l.*.norm", "l.*.q", "head"]


@pytest.mark.parametrize(("share", "ulps"), [(0.5, 0), (0.6, 1), (0.8, 2), (0.95, 4), (0.99, 7), (1.0, 7)])
def test_a_share_of_the_distances(share: float, ulps: int) -> None:
    assert Operation("m", "mm", compared=100, distances=(50, 20, 15, 12, 3), largest=7).ulps(share) == ulps


def test_without_a_comparison_there_is_no_figure() -> None:
    silent = Operation("m", "conv", sums=3, length=2)
    assert silent.moved_percent is None and silent.relative is None and silent.ulps(0.5) is None


def test_the_source_is_what_moves_most_for_its_size() -> None:
    small = Operation("a", "mm", compared=9, moved=9, shift=1e-3, scale=1e6, length=9)
    large = Operation("b", "mean", compared=9, moved=1, shift=1e-6, scale=1.0, length=9)
    assert Pass("prefill", 3, 0.1, (small, large)).source is large
    assert not Pass("prefill", 3, 0.1, (small, large)).quiet


def test_a_pass_is_quiet_only_if_every_sum_was_looked_at() -> None:
    still = Operation("a", "mm", compared=9, distances=(9,), length=9, sums=3)
    unknown = Operation("b", "convolution", length=2, sums=3)
    assert Pass("decode", 1, 0.1, (still,)).quiet and Pass("decode", 1, 0.1, (still,)).source is None
    assert not Pass("decode", 1, 0.1, (still, unknown)).quiet
    assert unlooked([Pass("decode", 1, 0.1, (still, unknown))]) == ["convolution"]
