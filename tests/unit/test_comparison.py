from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from pytest_repro.comparison import Comparison, compare_decode, compare_replay, finite
from pytest_repro.generation import Generation, Scores, subset
from tests.unit.builders import f32, generation, i32, output, scores, unwatched

inf, nan = math.inf, math.nan


@pytest.mark.parametrize(
    ("golden", "now", "index", "token_now"),
    [
        ([1, 2, 3], [1, 2, 3], -1, -1),
        ([1, 2, 3], [9, 2, 3], 0, 9),
        ([1, 2, 3], [1, 9, 3], 1, 9),
        ([1, 2, 3], [1, 2, 9], 2, 9),
        ([1, 2, 3], [9, 9, 9], 0, 9),
        ([1, 2, 3], [1, 9], 1, 9),
        ([1, 2], [1, 9, 3], 1, 9),
        ([1, 2, 3], [1, 2], 2, -1),
        ([1, 2], [1, 2, 3], 2, -1),
        ([1, 2], [], 0, -1),
        ([], [1, 2], 0, -1),
        ([], [], -1, -1),
    ],
    ids=[
        "none", "first", "middle", "last", "everywhere", "before-now-ends", "before-golden-ends", "golden-longer",
        "now-longer", "now-empty", "golden-empty", "both-empty",
    ],
)  # fmt: skip
@pytest.mark.parametrize("place", ["alone", "first", "last"])
def test_decode_finds_the_first_divergence(
    golden: list[int], now: list[int], index: int, token_now: int, place: str
) -> None:
    """Beside other prompts, whose tokens lie before and behind it in the columns, as well as alone."""
    before = [output("x", [5, 6])] if place == "last" else []
    after = [output("y", [7])] if place == "first" else []
    then = generation(*before, output("p", golden), *after)
    found = compare_decode(then, generation(*before, output("p", now), *after))
    i = found.ids.index("p")
    assert found.divergence_index[i] == index and found.token_now[i] == token_now
    assert found.deficit_index[i] == index
    assert [int(found.divergence_index[k]) for k in range(len(found)) if k != i] == [-1] * (len(found) - 1)


def test_decode_of_some_prompts_in_another_order() -> None:
    golden = generation(output("a", [1, 2]), output("b", [3]), output("c", [4, 5, 6]))
    found = compare_decode(golden, generation(output("c", [4, 5, 9]), output("a", [1, 2])))
    assert (
        found.ids == ("c", "a")
        and found.divergence_index.tolist() == [2, -1]
        and found.differs.tolist() == [True, False]
    )


@pytest.mark.parametrize(
    ("now", "deficit"),
    [
        (output("p", [1, 9], logprob=[-0.5, -0.25], watched=[-0.5, -1.0]), 0.75),
        (output("p", [1, 9], logprob=[-0.5, -0.5], watched=[-0.5, -0.5]), 0.0),
        (output("p", [1, 9], logprob=[-0.5, -0.5], watched=[-0.5, -0.25]), 0.25),
        (output("p", [1, 9], runner_up=[99, 2], gap=[1.0, 0.125]), 0.125),
        (output("p", [1, 9], runner_up=[99, 2], gap=[1.0, 0.125], logprob=[0, -0.25], watched=[0, -0.5]), 0.25),
        (output("p", [1, 9], runner_up=[99, 2], gap=[1.0, 0.0]), 0.0),
        (output("p", [1, 9], runner_up=[99, 3], gap=[1.0, 0.125]), inf),
        (output("p", [1, 9], runner_up=[99, 2], gap=[1.0, nan]), inf),
        (output("p", [1, 9], runner_up=[-1, -1]), inf),
        (output("p", [1]), inf),
        (output("p", [1, 2, 3]), inf),
        (output("p", [1, 2]), 0.0),
    ],
    ids=[
        "watched", "watched-tie", "passed-over-by-a-sampler", "runner-up", "watched-before-runner-up", "runner-up-tie",
        "another-runner-up", "gap-unknown", "no-runner-up", "ended-early", "went-on", "same",
    ],
)  # fmt: skip
def test_decode_deficit(now: Any, deficit: float) -> None:
    golden = generation(output("p", [1, 2], gap=[2.0, 0.5]))
    found = compare_decode(golden, generation(now))
    assert found.deficit.tolist() == [deficit]
    if now.reference_logprob is None:
        assert compare_decode(golden, unwatched(now)).deficit.tolist() == [deficit]
    inside = found.token_now[0] >= 0
    assert finite(found.row(0).golden_gap) == (0.5 if inside else None)


@pytest.mark.parametrize(
    ("now", "passed_over", "unmoved"),
    [
        (output("p", [1, 9], gap=[1.0, 0.0], logprob=[-0.5, -0.25], watched=[-0.5, -0.25]), 0.0, False),
        (output("p", [1, 9], gap=[1.0, -0.125], logprob=[-0.5, -0.75], watched=[-0.5, -0.625]), 0.125, False),
        (output("p", [1, 9], gap=[1.0, 0.0], watched=[-0.5, -0.5]), 0.0, True),
        (output("p", [1, 9], gap=[1.0, 0.0], logprob=[-0.75, -0.5], watched=[-0.75, -0.5]), 0.0, False),
        (output("p", [1, 9], gap=[1.0, 0.0], watched=[-0.5, nan]), 0.0, False),
        (output("p", [1, 9], gap=[1.0, 0.25], watched=[-0.5, -0.75]), 0.0, False),
        (output("p", [1, 9], gap=[1.0, nan], logprob=[nan, nan], watched=[nan, nan]), 0.0, False),
        (output("p", [1, 2], gap=[1.0, -0.5], watched=[-0.5, -0.5]), 0.0, False),
        (output("p", [1]), 0.0, False),
    ],
    ids=[
        "greedy", "a-likelier-one-passed-over", "a-tie-broken-otherwise", "a-tie-after-something-moved", "golden-token-unseen",
        "golden-token-moved", "no-numbers", "same-text", "ended-early",
    ],
)  # fmt: skip
def test_a_choice_that_rounding_did_not_make(now: Any, passed_over: float, unmoved: bool) -> None:
    found = compare_decode(generation(output("p", [1, 2], gap=[1.0, 0.0])), generation(now))
    assert (found.passed_over.tolist(), found.unmoved.tolist()) == ([passed_over], [unmoved])
    assert (found.row(0).passed_over, found.row(0).unmoved) == (passed_over, unmoved)


def test_a_runner_up_that_rose_into_a_tie_is_rounding() -> None:
    """Where probabilities are nearly uniform, a logit can move by a 16-bit step and no log-probability with it."""
    recorded = generation(output("p", [1, 2], gap=[1.0, 0.002]))
    found = compare_decode(recorded, generation(output("p", [1, 9], gap=[1.0, 0.0], watched=[-0.5, -0.5])))
    assert found.deficit.tolist() == [0.0] and not found.unmoved.any()


def test_decode_numbers_count_up_to_and_including_the_first_divergence() -> None:
    golden = generation(output("p", [1, 2, 3, 4], logprob=[-0.5, -0.5, -0.5, -0.5]))
    now = output("p", [1, 2, 9, 4], logprob=[-0.25, -0.5, -0.125, -8.0], watched=[-0.25, -0.5, -1.0, -16.0])
    found = compare_decode(golden, generation(now))
    # |Δ| of the golden's tokens: 0.25, 0, 0.5 (watched); what comes later answers another prefix.
    assert found.mean_abs_dlogp.tolist() == [0.25] and found.max_abs_dlogp.tolist() == [0.5]
    assert found.compared.tolist() == [3] and found.max_abs_dgap.tolist() == [0.0]
    blind = compare_decode(golden, unwatched(now))
    assert blind.mean_abs_dlogp.tolist() == [0.125] and blind.max_abs_dlogp.tolist() == [0.25]


def test_decode_without_log_probabilities_knows_no_change() -> None:
    golden = generation(output("p", [1, 2], logprob=[nan, nan]))
    found = compare_decode(golden, generation(output("p", [1, 3], logprob=[nan, nan])))
    assert math.isnan(found.mean_abs_dlogp[0]) and math.isnan(found.max_abs_dlogp[0])
    assert found.deficit.tolist() == [inf]


def test_nothing_to_compare() -> None:
    golden = generation(output("p", [1]))
    assert len(compare_decode(golden, subset(golden, []))) == len(compare_replay(golden, [])) == 0
    empty = generation(output("p", []))
    found = compare_decode(empty, empty)
    assert found.divergence_index.tolist() == [-1] and math.isnan(found.mean_abs_dlogp[0])


def test_replay_sees_every_position() -> None:
    golden = generation(output("a", [1, 2, 3, 4], gap=[1.0, 0.25, 0.5, 1.0]), output("b", [5]), output("c", []))
    found = compare_replay(
        golden,
        [
            scores("a", [1, 8, 9, 4], [0, 0.125, 0.75, 0], [-0.5, -0.75, -1.0, -0.75], [1.0, -0.125, -0.75, 1.0]),
            scores("b", [5]),
            scores("c", []),
        ],
    )
    assert found.divergence_index.tolist() == [1, -1, -1]
    assert found.deficit.tolist() == [0.75, 0.0, 0.0] and found.deficit_index.tolist() == [2, -1, -1]
    assert found.token_now.tolist() == [8, -1, -1] and finite(found.row(0).golden_gap) == 0.25
    assert found.mean_abs_dlogp[:2].tolist() == [0.25, 0.0] and math.isnan(found.mean_abs_dlogp[2])
    assert found.max_abs_dlogp[:2].tolist() == [0.5, 0.0]
    assert found.max_abs_dgap[:2].tolist() == [1.25, 0.0]
    assert found.compared.tolist() == [4, 1, 0]


@pytest.mark.parametrize(
    ("top", "deficit", "index", "worst", "worst_at"),
    [
        ([9, 2, 3], [0.5, 0, 0], 0, 0.5, 0),
        ([1, 2, 9], [0, 0, 0.5], 2, 0.5, 2),
        ([9, 2, 9], [0.5, 0, 0.25], 0, 0.5, 0),
        ([9, 2, 9], [0.5, 0, 0.5], 0, 0.5, 0),
        ([9, 9, 9], [0.25, 0.5, 0.125], 0, 0.5, 1),
        ([1, 9, 3], [0, 0, 0], 1, 0.0, 1),
        ([1, 2, 3], [0, 0, 0], -1, 0.0, -1),
    ],
    ids=["first", "last", "two", "two-alike", "all", "a-tie", "none"],
)
def test_replay_flips(top: list[int], deficit: list[float], index: int, worst: float, worst_at: int) -> None:
    golden = generation(output("x", [7, 7]), output("p", [1, 2, 3]), output("y", [7]))
    found = compare_replay(golden, [scores("x", [7, 7]), scores("p", top, deficit), scores("y", [7])])
    assert found.divergence_index.tolist() == [-1, index, -1]
    assert found.deficit.tolist() == [0.0, worst, 0.0] and found.deficit_index.tolist() == [-1, worst_at, -1]


def test_replay_never_takes_an_unknown_deficit_for_a_known_one() -> None:
    golden = generation(output("a", [1, 2, 3]), output("b", [1, 2]), output("c", [1, 2, 3]))
    rows = [
        scores("a", [1, 9, 3], [0, nan, 0]),
        scores("b", [9, 9], [nan, nan]),
        scores("c", [9, 2, 9], [nan, 0, 0.25]),  # a known deficit beside it does not make the unknown one harmless
    ]
    found = compare_replay(golden, rows)
    assert found.divergence_index.tolist() == [1, 0, 0]
    assert not np.isfinite(found.deficit).any()


# --- the same, one prompt and one token at a time -----------------------------------------------------------------


def naive_decode(golden: Generation, now: Generation) -> dict[str, dict[str, float]]:
    found = {}
    for name in now.ids:
        a, b = golden.span(golden.ids.index(name)), now.span(now.ids.index(name))
        old, new = golden.tokens[a].tolist(), now.tokens[b].tolist()
        watched = [nan] * len(new) if now.reference_logprob is None else now.reference_logprob[b].tolist()
        common = min(len(old), len(new))
        first = next((t for t in range(common) if old[t] != new[t]), -1 if len(old) == len(new) else common)
        moved, deficit, gap, token = [], 0.0, nan, -1
        for t in range(common if first < 0 else min(first + 1, common)):
            then = float(golden.logprob[a][t])
            moved.append(abs((float(now.logprob[b][t]) if old[t] == new[t] else watched[t]) - then))
        if 0 <= first < common:
            gap, token = float(golden.gap[a][first]), new[first]
            deficit = inf
            if not math.isnan(watched[first]):
                deficit = abs(float(now.logprob[b][first]) - watched[first])
            elif int(now.runner_up[b][first]) == old[first]:
                deficit = float(now.gap[b][first])
        elif first >= 0:
            deficit = inf
        known = [m for m in moved if not math.isnan(m)]
        pairs = [
            t
            for t in range(common if first < 0 else min(first, common))
            if golden.runner_up[a][t] == now.runner_up[b][t]
        ]
        dgap = [d for t in pairs if not math.isnan(d := abs(float(now.gap[b][t]) - float(golden.gap[a][t])))]
        found[name] = {
            "divergence_index": first, "deficit": deficit, "golden_gap": gap, "token_now": token,
            "deficit_index": first, "mean_abs_dlogp": sum(known) / len(known) if known else nan,
            "max_abs_dlogp": max(known, default=nan), "max_abs_dgap": max(dgap, default=nan),
            "mean_abs_dgap": sum(dgap) / len(dgap) if dgap else nan,
        }  # fmt: skip
    return found


def naive_replay(golden: Generation, replays: list[Scores]) -> dict[str, dict[str, float]]:
    found = {}
    for s in replays:
        a = golden.span(golden.ids.index(s.id))
        old = golden.tokens[a].tolist()
        flips = [t for t in range(len(old)) if s.top[t] != old[t]]
        worst = max(flips, key=lambda t: (float(s.deficit[t]), -t), default=-1)
        moved = [abs(float(s.logprob[t]) - float(golden.logprob[a][t])) for t in range(len(old))]
        dgap = [abs(float(s.gap[t]) - float(golden.gap[a][t])) for t in range(len(old))]
        found[s.id] = {
            "divergence_index": flips[0] if flips else -1, "deficit_index": worst,
            "deficit": float(s.deficit[worst]) if flips else 0.0, "token_now": int(s.top[flips[0]]) if flips else -1,
            "golden_gap": float(golden.gap[a][flips[0]]) if flips else nan,
            "mean_abs_dlogp": sum(moved) / len(moved) if moved else nan, "max_abs_dlogp": max(moved, default=nan),
            "max_abs_dgap": max(dgap, default=nan), "mean_abs_dgap": sum(dgap) / len(dgap) if dgap else nan,
        }  # fmt: skip
    return found


def agree(found: Comparison, wanted: dict[str, dict[str, float]]) -> None:
    assert found.ids == tuple(wanted)
    for column in next(iter(wanted.values())):
        np.testing.assert_allclose(
            getattr(found, column), [row[column] for row in wanted.values()], rtol=1e-12, atol=1e-15, err_msg=column
        )


def random_generation(rng: np.random.Generator, names: list[str], watched: bool) -> Generation:
    """Ragged answers over three token ids, so that prefixes often agree and runners-up often are the golden's token."""
    rows = []
    for name in names:
        n = int(rng.integers(0, 6))
        hidden = np.where(rng.random(n) < 0.4, nan, -rng.random(n))
        rows.append(
            output(
                name,
                rng.choice(3, n, p=[0.7, 0.2, 0.1]).tolist(),
                logprob=(-rng.random(n)).tolist(),
                gap=rng.random(n).tolist(),
                runner_up=rng.integers(-1, 3, n).tolist(),
                watched=hidden.tolist() if watched else None,
            )
        )
    return generation(*rows) if watched else unwatched(*rows)


@pytest.mark.parametrize("seed", range(40))
def test_decode_agrees_with_a_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    names = [f"p{i}" for i in range(12)]
    golden = random_generation(rng, names, watched=False)
    some = [str(n) for n in rng.permutation(names)[: rng.integers(1, 13)]]
    now = random_generation(rng, some, watched=bool(seed % 2))
    agree(compare_decode(golden, now), naive_decode(golden, now))


@pytest.mark.parametrize("seed", range(40))
def test_replay_agrees_with_a_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    names = [f"p{i}" for i in range(12)]
    golden = random_generation(rng, names, watched=False)
    replays = []
    for name in rng.permutation(names)[: rng.integers(1, 13)]:
        old = golden.tokens[golden.span(golden.ids.index(str(name)))]
        top = np.where(rng.random(len(old)) < 0.3, (old + 1) % 3, old)
        deficit = np.where(top == old, 0.0, rng.integers(0, 3, len(old)) / 4)  # quarters, so that some are alike
        logprob, gap = -rng.random(len(old)), rng.random(len(old))
        replays.append(Scores(str(name), f32(logprob), f32(deficit), i32(top), f32(gap)))
    agree(compare_replay(golden, replays), naive_replay(golden, replays))


def test_a_single_bit_of_a_single_number_is_counted() -> None:
    golden = generation(output("a", [1, 2, 3]), output("b", [4, 5]))
    later = np.nextafter(golden.logprob[1], np.float32(0))
    assert compare_replay(golden, replayed(golden)).moved.tolist() == [0, 0]
    assert compare_decode(golden, golden).moved.tolist() == [0, 0]
    other = generation(output("a", [1, 2, 3]), output("b", [4, 5]))
    other.logprob[1] = later
    assert compare_replay(golden, replayed(other)).moved.tolist() == [1, 0]
    assert compare_decode(golden, other).moved.tolist() == [1, 0]
    gaps = generation(output("a", [1, 2, 3]), output("b", [4, 5]))
    gaps.gap[3] = np.nextafter(gaps.gap[3], np.float32(9))
    assert compare_replay(golden, replayed(gaps)).moved.tolist() == [0, 1]
    assert compare_decode(golden, gaps).moved.tolist() == [0, 1]


def replayed(run: Generation) -> list[Scores]:
    """The replay that gives a generation's own numbers."""
    spans = [run.span(i) for i in range(len(run))]
    return [
        Scores(name, run.logprob[s], np.zeros(s.stop - s.start, np.float32), run.tokens[s], run.gap[s])
        for name, s in zip(run.ids, spans, strict=True)
    ]
