"""For people who write an engine: the contract that every engine passes, as a class of tests to inherit.

::

    class TestMyEngine(EngineContract):
        @pytest.fixture
        def engine(self):
            with open_engine(spec) as engine:
                yield engine
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from .comparison import compare_decode, compare_replay
from .engines.base import Engine
from .errors import EngineError
from .generation import FINISH_REASONS, Generation, Output, Request
from .noise import envelope
from .numerics import formats
from .precision import Observation
from .suite import Prompt

PROMPTS = (
    Prompt("short", "Hello"),
    Prompt("long", "Count the apples in three baskets of seven, then say how many there are. " * 3),
    Prompt("chat", [{"role": "user", "content": "Name a colour."}]),
)


class EngineContract:
    """Inherit, and give the fixture `engine`; the engine must answer `PROMPTS`."""

    tolerance = 1e-4
    """How far replay may be from decode, nats of |Δlogp|: the engine's own prefill against its own decoding."""

    @pytest.fixture
    def engine(self) -> Engine:
        """The engine under test."""
        raise NotImplementedError

    def requests(self, engine: Engine) -> list[Request]:
        """The prompts as the engine encodes them."""
        return [Request(p.id, np.asarray(engine.encode(p), np.int32), p.content) for p in PROMPTS]

    def recorded(self, engine: Engine) -> tuple[list[Request], list[Output]]:
        """Requests that watch what the engine itself answered, and those answers."""
        requests = self.requests(engine)
        outputs = engine.generate(requests)
        watching = [
            Request(r.id, r.tokens, r.content, o.tokens, o.runner_up) for r, o in zip(requests, outputs, strict=True)
        ]
        return watching, outputs

    def test_prompts_become_token_ids_and_back(self, engine: Engine) -> None:
        """Encoding gives ids, decoding gives text."""
        for request in self.requests(engine):
            assert len(request.tokens) > 0
            assert request.tokens.min() >= 0
            assert isinstance(engine.decode(request.tokens.tolist()), str)

    def test_a_batch_is_answered_in_its_order(self, engine: Engine) -> None:
        """One output a request, under its id, with columns as long as its tokens."""
        requests = self.requests(engine)
        outputs = engine.generate(requests)
        assert [o.id for o in outputs] == [r.id for r in requests]
        assert len(Generation.of(requests, outputs)) == len(requests)
        assert all(o.finish_reason in FINISH_REASONS for o in outputs)
        assert all(len(o.tokens) > 0 for o in outputs)

    def test_the_same_batch_gives_the_same_bits(self, engine: Engine) -> None:
        """Greedy decoding of one batch in one process is a function."""
        requests = self.requests(engine)
        _same_bits(engine.generate(requests), engine.generate(requests))

    def test_numbers_are_those_of_a_greedy_choice(self, engine: Engine) -> None:
        """Log-probabilities are not positive, gaps not negative, and the runner-up is another token."""
        if engine.text_only:
            return
        for output in engine.generate(self.requests(engine)):
            assert (output.logprob <= 1e-6).all()
            assert (output.gap >= 0).all()
            assert (output.runner_up != output.tokens).all()

    def test_a_watched_token_that_is_chosen_has_the_chosen_logprob(self, engine: Engine) -> None:
        """Decoding with its own answer as the golden observes a deficit of zero everywhere."""
        watching, outputs = self.recorded(engine)
        again = Generation.of(watching, engine.generate(watching))
        seen = compare_decode(Generation.of(watching, outputs), again)
        assert not seen.differs.any()
        if again.reference_logprob is not None and not np.isnan(again.reference_logprob).all():
            np.testing.assert_array_equal(again.reference_logprob, again.logprob)

    def test_replay_agrees_with_decoding(self, engine: Engine) -> None:
        """Scores of the engine's own answer: its own numbers, to the tolerance, in the order of the requests."""
        watching, outputs = self.recorded(engine)
        if not engine.replays:
            with pytest.raises(EngineError):
                engine.replay(watching)
            return
        scores = engine.replay(watching)
        assert [s.id for s in scores] == [r.id for r in watching]
        assert all((s.deficit >= 0).all() for s in scores)
        seen = compare_replay(Generation.of(watching, outputs), scores)
        assert (seen.max_abs_dlogp <= self.tolerance).all()
        assert (seen.deficit <= self.tolerance).all()

    def test_benign_variants_leave_no_trace(self, engine: Engine) -> None:
        """Every variant measures noise, and afterwards the engine is what it was."""
        watching, outputs = self.recorded(engine)
        replays = {name: run(watching, lambda _: None) for name, run in engine.benign()}
        assert bool(replays) is engine.replays
        measured = envelope("test", Generation.of(watching, outputs), replays)
        assert np.isfinite(measured.max_deficit)
        _same_bits(outputs, engine.generate(watching))

    def test_fp32_replay_is_another_view_of_the_same_answer(self, engine: Engine) -> None:
        """Where the engine can, it scores the same tokens in FP32, and is afterwards what it was."""
        watching, outputs = self.recorded(engine)
        scores = engine.replay_fp32(watching)
        if scores is None:
            return
        assert [s.id for s in scores] == [r.id for r in watching]
        assert all(len(s.logprob) == len(o.tokens) for s, o in zip(scores, outputs, strict=True))
        _same_bits(outputs, engine.generate(watching))

    def test_looking_inside_shows_the_same_places_each_time(self, engine: Engine) -> None:
        """Every sketch holds a few finite rows of the same places, and afterwards the engine is what it was."""
        watching, outputs = self.recorded(engine)
        found = list(engine.sketches(watching))
        if not found:
            return
        assert len(found) >= 3, "as things are, once more, and at least one benign change"
        assert len({(s.points, s.values.shape) for s in found}) == 1
        assert len(set(found[0].points)) == len(found[0].points) == len(found[0].values)
        np.testing.assert_array_equal(found[0].values, found[1].values)
        _same_bits(outputs, engine.generate(watching))

    def test_facts_are_flat_and_name_the_engine(self, engine: Engine) -> None:
        """Scalars only, with the identity that goldens are held against."""
        facts = engine.facts()
        assert {"engine", "generation", "tokenizer"} <= set(facts)
        assert all(isinstance(v, str | int | float | bool | None) for v in facts.values())
        assert not any(str(v).startswith(("/home/", "/root/", "/Users/")) for v in facts.values())

    def test_the_observation_is_one(self, engine: Engine) -> None:
        """What the probe saw has a class that policies know."""
        seen = engine.observe()
        assert isinstance(seen, Observation)
        known = ("fp32", "tf32", "fp16", "bf16", "lower", "exact", "unknown")
        assert seen.compute_class in known or formats.looks_like_one(seen.compute_class)


def _same_bits(first: Sequence[Output], second: Sequence[Output]) -> None:
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.logprob, b.logprob)
        np.testing.assert_array_equal(a.gap, b.gap)
