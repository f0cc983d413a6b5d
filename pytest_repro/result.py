"""What a check found, as values: the report is made from them, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .fingerprint import Change, Fingerprint
from .suite import MOVED, Shard, Thresholds
from .verdict import ALWAYS_FAIL, Failure, Verdict, failures


@dataclass(frozen=True)
class Texts:
    """A continuation around the first divergence, three pieces of untrusted model text."""

    before: str
    token: str
    after: str


@dataclass(frozen=True)
class PromptResult:
    """One prompt, judged. Numbers are None where they are unknown or do not apply."""

    id: str
    verdict: Verdict
    reason: str = ""
    method: str = ""
    """`replay`, `decode`, `replay+decode`; empty if nothing ran."""
    tokens: int | None = None
    """Length of the golden's answer."""
    tokens_now: int | None = None
    """Length of the answer now; None where it was not generated and would differ."""
    divergence_index: int | None = None
    deficit: float | None = None
    deficit_index: int | None = None
    golden_gap: float | None = None
    mean_abs_dlogp: float | None = None
    benign_dlogp: float | None = None
    """The prompt's benign mean |Δlogp|."""
    mean_abs_dgap: float | None = None
    """Mean |change of the gap to the recorded runner-up|; None where it was not replayed."""
    decoded_dgap: float | None = None
    """The same of what was decoded, up to where the texts part."""
    benign_dgap: float | None = None
    """The prompt's benign mean |change of that gap|."""
    golden_text: Texts | None = None
    now_text: Texts | None = None
    arbiter: Mapping[str, Any] | None = None
    """What the FP32 answer says of a drift: an `arbiter.Arbitration` as a mapping; None where it was not asked."""
    score_golden: bool | None = None
    score_now: bool | None = None
    prompt: str = ""
    """What was asked; empty where there is no trace."""
    golden_full: str | None = None
    """The whole golden text, where it differs and was traced."""
    now_full: str | None = None
    """The whole text now, where it differs, was decoded and traced."""
    trace: Mapping[str, Any] | None = None
    """A `traces.Trace` as a mapping."""


@dataclass(frozen=True)
class Check:
    """One check of the whole suite."""

    name: str
    """One of `suite.SUITE_ITEMS`."""
    status: str
    """`pass`, `fail`, `skip` (not judged)."""
    message: str


@dataclass(frozen=True)
class SuiteResult:
    """One suite in one numerics mode."""

    name: str
    path: str
    """The suite's folder as the user named it."""
    numerics: str
    thresholds: Thresholds
    size: int
    """Prompts in the suite, selected or not."""
    prompts: tuple[PromptResult, ...]
    checks: tuple[Check, ...]
    claimed: str | None = None
    """The compute class that the mode claims; None if it claims nothing."""
    shard: Shard | None = None
    """The part of the suite that was checked; None: all of it."""
    shard_size: int = 0
    """Prompts in that part, selected or not."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """How it was asked to be checked, as far as shards of one check must agree in it."""
    again: str = ""
    """What pytest is given to run it again, but for the mode."""
    golden: Mapping[str, Any] | None = None
    """Name, digest, review, settings and metrics of the golden used; None without one."""
    observed: Mapping[str, Any] | None = None
    """The probe's observation; None if the model was never loaded."""
    environment: Fingerprint = field(default_factory=dict)
    environment_diff: tuple[Change, ...] = ()
    equal_fields: int = 0
    calibrated: tuple[str, ...] = ()
    """Days on which `pytest-repro calibrate` measured the envelope that was judged with; empty: the recording did."""
    envelope_diff: tuple[Change, ...] | None = None
    """How the environment differs from the calibration's; None where the recording's envelope was judged with."""
    envelope_deficit: float | None = None
    envelope: Mapping[str, Any] | None = None
    """The golden's envelope (`traces.described`); None where nothing was compared."""
    distribution: Mapping[str, Any] | None = None
    """A `traces.Distribution` as a mapping; None where nothing was compared."""
    localisation: Mapping[str, Any] | None = None
    """Where in the model the difference begins: a `sketch.Location` as a mapping; None where it was not asked."""
    metrics: Mapping[str, float | int | None] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    """Things to know that fail nothing: a fallback golden, unused prompts, waivers."""
    seconds: float = 0.0
    next_steps: tuple[tuple[str, str], ...] = ()
    """(command, when to run it)."""

    @property
    def counts(self) -> dict[Verdict, int]:
        """Verdict -> number of prompts."""
        found: dict[Verdict, int] = {}
        for prompt in self.prompts:
            found[prompt.verdict] = found.get(prompt.verdict, 0) + 1
        return found

    @property
    def since_measured(self) -> tuple[Change, ...]:
        """How the environment differs from the one that its envelope was measured in."""
        return self.environment_diff if self.envelope_diff is None else self.envelope_diff

    @property
    def failures(self) -> list[Failure]:
        """Rules on prompts that fail. In a shard, a share is one of the shard's own prompts."""
        return failures(self.counts, self.thresholds, self.shard_size if self.shard else self.size)

    @property
    def passed(self) -> bool:
        """No rule and no check fails."""
        return not self.failures and all(check.status != "fail" for check in self.checks)

    @property
    def fails_for_moving(self) -> bool:
        """Whether it fails, and outputs moved."""
        beyond_rounding = any(c.name == "rounding" and c.status == "fail" for c in self.checks)
        parted = self.counts.get(Verdict.DRIFT) or self.counts.get(Verdict.NEAR_TIE)
        return not self.passed and bool(beyond_rounding or parted)

    @property
    def asks_for_a_golden(self) -> bool:
        """Whether a new golden could be the answer to this failure: outputs or accuracy moved, and nothing broke."""
        if self.counts.get(Verdict.ERROR) or any(c.name == "compute" and c.status == "fail" for c in self.checks):
            return False
        return bool(self.failures) or any(c.status == "fail" for c in self.checks if c.name in MOVED)

    def failing_rule(self, prompt: PromptResult) -> Failure | None:
        """The rule that makes this prompt's test item fail."""
        return next((f for f in self.failures if prompt.verdict in f.verdicts), None)

    @property
    def compared(self) -> bool:
        """Whether any prompt could be compared at all."""
        return any(p.verdict not in ALWAYS_FAIL for p in self.prompts)


@dataclass(frozen=True)
class Recording:
    """A candidate that was recorded."""

    name: str
    path: str
    numerics: str
    golden: str
    """File name of the pending golden."""
    prompts: int
    changed: int | None
    """Prompts whose tokens differ from the golden it would replace; None if there is none to compare with."""
    cut: int
    """Answers that the limit ended, and not the model."""
    max_new_tokens: int
    accuracy: float | None
    noise: Mapping[str, float]
    seconds: float
    environment: Fingerprint = field(default_factory=dict)
    shard: str | None = None
    """`1/4` of a part; None of a whole candidate."""


@dataclass(frozen=True)
class Calibrated:
    """A machine that was calibrated for a golden, or refused."""

    name: str
    path: str
    numerics: str
    golden: str
    """The golden's name."""
    prompts: int
    machine: str
    """Day and machine, in a few words."""
    differs: tuple[Change, ...]
    """What of this machine the recording's envelope does not cover."""
    checked: tuple[str, ...]
    """What the plain check came to, in lines; without what refused the machine."""
    refused: tuple[str, ...] = ()
    """Why this machine moves more than rounding; nothing was written then."""
    candidate: str = ""
    """File of the candidate that was left."""
    replaces: bool = False
    """Whether it takes the place of an earlier calibration of this machine."""
    moved: Mapping[str, Any] | None = None
    """Its levels beside the recording's (`calibration.moved`)."""
    seconds: float = 0.0
    next_steps: tuple[tuple[str, str], ...] = ()
    """(command, what it is for)."""
