"""The search over every way in which knobs can act on one another, and what a trial's report says of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import combinations

import pytest

from pytest_repro import bisection
from pytest_repro.bisection import Names, Outcome, Trial, search
from pytest_repro.fingerprint import Change, Fingerprint
from pytest_repro.knobs import undoable
from pytest_repro.result import PromptResult, SuiteResult
from pytest_repro.verdict import Verdict
from tests.unit.builders import BF16, IDENTITY, generation, golden, judged, output, suite_result

# --- the search -----------------------------------------------------------------------------------------------------

ALL = ("a", "b", "c", "d")


class Trials:
    """Trials that restore where `rule` says so; it keeps what was tried."""

    def __init__(
        self, rule: Callable[[set[str]], bool], unsound: Callable[[set[str]], Outcome | None] = lambda _: None
    ):
        self.rule, self.unsound, self.tried = rule, unsound, list[Names]()

    def __call__(self, names: Names) -> Outcome:
        assert names not in self.tried, "no set is tried twice"
        assert list(names) == [n for n in ALL if n in names], "in the table's order"
        self.tried.append(names)
        return self.unsound(set(names)) or Outcome(self.rule(set(names)))


def subsets(names: Names) -> list[Names]:
    return [chosen for size in range(1, len(names) + 1) for chosen in combinations(names, size)]


@pytest.mark.parametrize("cause", subsets(ALL), ids="+".join)
def test_the_smallest_set_is_named_whatever_it_is(cause: Names) -> None:
    """Every single, pair, triple and all of four: undoing all of the cause restores, with or without the others."""
    trials = Trials(lambda undone: set(cause) <= undone)
    assert search(ALL, trials).sets == (cause,)
    assert trials.tried[0] == ALL
    assert {len(tried) for tried in trials.tried[1:]} <= set(range(1, len(cause) + 1)), "no larger set was needed"


@pytest.mark.parametrize("first", subsets(ALL), ids="+".join)
def test_every_set_of_the_smallest_size_is_named(first: Names) -> None:
    """Two causes of one size, either of which is enough."""
    for second in subsets(ALL):
        if len(second) == len(first):
            found = search(ALL, Trials(lambda undone, b=second: set(first) <= undone or set(b) <= undone))  # type: ignore[misc]
            assert set(found.sets) == {first, second}
        elif len(second) > len(first):
            found = search(ALL, Trials(lambda undone, b=second: set(first) <= undone or set(b) <= undone))  # type: ignore[misc]
            assert found.sets == (first,)


def test_nothing_restores_and_one_trial_says_so() -> None:
    trials = Trials(lambda undone: False)
    found = search(ALL, trials)
    assert found.sets == () and found.left == ALL and trials.tried == [ALL]


def test_everything_restores() -> None:
    trials = Trials(lambda undone: True)
    assert search(ALL, trials).sets == (("a",), ("b",), ("c",), ("d",)) and len(trials.tried) == 5


def test_what_restores_alone_and_not_with_another_is_named_all_the_same() -> None:
    """Not monotone: b restores, a and b together do not, and all do."""
    assert search(ALL, Trials(lambda undone: undone == {"b"} or len(undone) == 4)).sets == (("b",),)
    pairs = search(ALL, Trials(lambda undone: undone in ({"a", "c"}, {"b", "d"}) or len(undone) == 4))
    assert pairs.sets == (("a", "c"), ("b", "d"))
    assert search(ALL, Trials(lambda undone: len(undone) == 4)).sets == (ALL,)


def test_a_single_knob_takes_one_trial() -> None:
    trials = Trials(lambda undone: True)
    assert search(("a",), trials).sets == (("a",),) and trials.tried == [("a",)]
    assert search((), trials).sets == ()


def test_a_knob_that_does_not_take_is_left_out() -> None:
    def unsound(undone: set[str]) -> Outcome | None:
        return Outcome(True, sound=False, refused=frozenset("b")) if "b" in undone else None

    trials = Trials(lambda undone: {"a", "c"} <= undone, unsound)
    found = search(ALL, trials)
    assert found.sets == (("a", "c"),) and found.left == ("a", "c", "d")
    assert not any("b" in tried for tried in trials.tried[1:])
    found = search(ALL, Trials(lambda undone: "b" in undone, unsound))
    assert found.sets == () and found.left == ("a", "c", "d"), "a trial that does not count restores nothing"


def test_a_trial_that_fails_without_naming_a_knob_is_taken_apart() -> None:
    broken = Outcome(sound=False)
    trials = Trials(lambda undone: "d" in undone, lambda undone: broken if "a" in undone else None)
    found = search(ALL, trials)
    assert found.sets == (("d",),) and found.left == ("b", "c", "d")
    assert trials.tried[:5] == [ALL, ("a",), ("b",), ("c",), ("d",)] and trials.tried[5:] == [("b", "c", "d")]


def test_knobs_that_take_alone_and_not_together_still_tell() -> None:
    trials = Trials(lambda undone: undone == {"c"}, lambda undone: Outcome(sound=False) if len(undone) == 4 else None)
    assert search(ALL, trials).sets == (("c",),)
    together = Trials(
        lambda undone: {"a", "b"} <= undone, lambda undone: Outcome(sound=False) if len(undone) > 2 else None
    )
    assert search(ALL, together).sets == (("a", "b"),)


def test_none_takes() -> None:
    found = search(ALL, Trials(lambda undone: True, lambda undone: Outcome(True, sound=False)))
    assert found.sets == () and found.left == ()


def test_an_interruption_passes_through() -> None:
    def interrupted(_: Names) -> Outcome:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(ALL, interrupted)


@pytest.mark.parametrize("knobs", [1, 2, 3, 4])
def test_the_most_trials_are_as_many_as_there_are_sets(knobs: int) -> None:
    names = ALL[:knobs]
    trials = Trials(lambda undone: len(undone) == knobs)
    search(names, trials)
    assert len(trials.tried) == bisection.most_trials(knobs) == len(subsets(names))


# --- one trial ------------------------------------------------------------------------------------------------------

THEN: Fingerprint = {**IDENTITY, "engine": "transformers", "numerics": "bf16", "compute_class": "bf16", "batch_size": 8,
                     "threads": 1, "cpu_model": "x", "env.OMP_NUM_THREADS": "1"}  # fmt: skip
BEFORE = {**THEN, "batch_size": 1, "threads": 2, "env.OMP_NUM_THREADS": "2", "torch": "2"}
UNDOS = {undo.name: undo for undo in undoable(THEN, BEFORE)}


def trial(undone: Iterable[str], environment: Fingerprint, *prompts: PromptResult, asked: Names = ("p", "q")) -> Trial:
    there = prompts or (judged("p", method="decode"), judged("q", method="decode"))
    return bisection.judged([UNDOS[n] for n in undone], asked, THEN, BEFORE, check(environment, *there))


def check(environment: Fingerprint, *prompts: PromptResult) -> SuiteResult:
    facts = {k: v for k, v in environment.items() if k != "compute_class"}
    return suite_result(*prompts, environment=facts, observed={**BF16, "compute_class": environment["compute_class"]})


def differing(name: str, verdict: Verdict = Verdict.NEAR_TIE, at: int = 3, deficit: float | None = 0.1) -> PromptResult:
    return judged(name, verdict, method="decode", divergence_index=at, deficit=deficit)


def test_the_two_knobs_of_this_environment() -> None:
    assert list(UNDOS) == ["batch size", "threads"]


def test_a_trial_that_restores() -> None:
    done = trial(["batch size"], {**BEFORE, "batch_size": 8})
    assert done.holds and done.restored == ("p", "q") and [c.field for c in done.remaining] == ["torch", "threads", "env.OMP_NUM_THREADS"]  # fmt: skip
    assert list(bisection.along(done, THEN, BEFORE)) == []


def test_one_prompt_that_still_differs_is_not_restored() -> None:
    done = trial(["batch size"], {**BEFORE, "batch_size": 8}, judged("p"), differing("q"))
    assert not done.holds and done.outcome == Outcome(False) and done.restored == ("p",)


def test_a_field_that_was_not_seen_at_the_golden_s_value_was_not_undone() -> None:
    done = trial(["batch size", "threads"], {**BEFORE, "batch_size": 8})
    assert [undo.name for undo in done.refused] == ["threads"] and not done.holds
    assert done.outcome == Outcome(True, sound=False, refused=frozenset({"threads"}))


def test_a_field_that_moved_by_itself_makes_a_trial_void() -> None:
    done = trial(["batch size"], {**BEFORE, "batch_size": 8, "cpu_model": "another"})
    assert [c.field for c in done.strayed] == ["cpu_model"] and not done.holds and done.outcome.refused == frozenset()
    assert trial(["threads"], {**BEFORE, "threads": 1, "env.OMP_NUM_THREADS": None}).strayed == (), (
        "the knob's own means"
    )


def test_a_field_that_went_along_to_the_golden_s_value_is_told() -> None:
    done = trial(["batch size"], {**BEFORE, "batch_size": 8, "torch": None})
    assert done.holds and list(bisection.along(done, THEN, BEFORE)) == [Change("torch", "numerics", None, "2")]


@pytest.mark.parametrize(
    ("prompts", "why"),
    [
        ((judged("p"),), "prompt q was not checked"),
        ((judged("p"), judged("q", Verdict.ERROR, reason="out of memory")), "error: out of memory"),
        ((judged("p"), judged("q", Verdict.INCOMPARABLE, reason="tokenizer differ")), "incomparable: tokenizer differ"),
    ],
)
def test_a_trial_without_an_answer_says_why(prompts: tuple[PromptResult, ...], why: str) -> None:
    done = trial(["batch size"], {**BEFORE, "batch_size": 8}, *prompts)
    assert done.error == why and not done.holds and not done.outcome.sound and done.restored == ()


def test_facts_of_a_golden_and_of_a_check_are_of_one_kind() -> None:
    """An engine need not name the mode, nor what was observed, among its own facts."""
    then = bisection.golden_facts(golden(generation(output("a", [1])), numerics="fp32"))
    now = bisection.facts(suite_result(judged("a"), numerics="bf16"))
    assert (then["numerics"], then["compute_class"]) == ("fp32", "bf16")
    assert (now["numerics"], now["compute_class"]) == ("bf16", "bf16")
    assert bisection.facts(suite_result(judged("a"), observed=None))["compute_class"] == "unknown"


# --- which prompts --------------------------------------------------------------------------------------------------

IDS = [f"p{i}" for i in range(12)]


def test_the_worst_few_by_the_golden_s_batches() -> None:
    near = [differing(f"p{i}", deficit=i / 100) for i in (0, 1, 5, 9, 10)]
    result = suite_result(*near, differing("p6", Verdict.DRIFT, deficit=0.5), judged("p7"), judged("p2", Verdict.DRIFT))
    assert bisection.chosen(result, IDS, 4) == ("p6", "p5", "p10", "p9", "p1")
    assert bisection.chosen(result, IDS, 12) == ("p6", "p10", "p9", "p5", "p1")
    assert bisection.chosen(result, IDS, 1) == ("p6", "p10", "p9", "p5", "p1")


def test_an_unknown_deficit_is_the_worst_and_what_could_not_be_compared_is_left_out() -> None:
    broken = replace(differing("p1"), verdict=Verdict.ERROR)
    result = suite_result(differing("p0", Verdict.WAIVED), differing("p3", deficit=None), differing("p2"), broken)
    assert bisection.chosen(result, IDS, 12) == ("p3", "p2", "p0")


def test_a_prompt_that_the_suite_lacks_is_not_run() -> None:
    """A report is somebody else's: what it calls a prompt becomes an argument of pytest."""
    result = suite_result(differing("--repro-allow-code", deficit=None), differing("p4"))
    assert bisection.chosen(result, IDS, 4) == ("p4",)
