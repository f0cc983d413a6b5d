"""How well statistics of a replay tell defects from benign changes: AUC over single prompts and over suites of 32.

Negatives are benign changes that the envelope was not measured from. Ours and the baselines see the same replays:

* `text`: whether any token would be chosen otherwise;
* `top5`: whether the golden's token is missing among the five best where the texts first part, as vLLM's tests compare;
* `margin`: mean deficit, clipped at its 99.9 % quantile over the envelope (Token-DiFR, arXiv 2511.20621), or not at all where
  that is 0, as in fp32, where no benign change flips a token;
* `gap`: mean change of the gap to the recorded runner-up, in units of the prompt's own benign level (pytest-repro's).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from pytest_repro.rounding import rounding_test

SUITE = 32
SUITES = 100
ALPHA = 0.05
OWN = ("replay", "replay, batch size 1", "replay, 1 thread", "replay, eager attention")
"""Changes that the engine's envelope is measured from."""
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Replay:
    """One replay of the first P prompts against the golden, as statistics of shape (P,)."""

    text: Floats
    top5: Floats
    margin: Floats
    gap: Floats
    dgap: Floats
    """Mean |Δgap|, nats."""
    dlogp: Floats
    """Mean |Δlogp|, nats."""


class Golden:
    """The recorded tokens of one compute class, and what the envelope says of them."""

    def __init__(self, work: Path, mode: str) -> None:
        kept = np.load(work / f"{mode} golden.npz")
        self.tokens, self.logprob, self.gap = kept["tokens"], kept["logprob"], kept["gap"]
        self.at = np.concatenate([[0], np.cumsum(kept["lengths"])])
        own = [np.load(work / f"{mode} here benign {name}.npz") for name in OWN]
        self.level = np.mean([self.mean(np.abs(d["gap"] - self.gap)) for d in own], axis=0)
        self.tail = max(float(np.nanmax(np.abs(d["gap"] - self.gap))) for d in own)
        self.dlogp = float(np.mean([np.abs(d["logprob"] - self.logprob).mean() for d in own]))
        self.clip = float(np.quantile(np.concatenate([d["deficit"] for d in own]), 0.999)) or np.inf

    def mean(self, values: NDArray[Any]) -> Floats:
        """Mean over each prompt's tokens, those without a number left out."""
        prompts = int(np.searchsorted(self.at, len(values)))
        assert self.at[prompts] == len(values)
        owner = np.repeat(np.arange(prompts), np.diff(self.at)[:prompts])
        seen = ~np.isnan(values)
        return np.bincount(owner[seen], values[seen].astype(np.float64), prompts) / np.bincount(
            owner[seen], minlength=prompts
        )

    def replay(self, path: Path) -> Replay:
        """What a file of a replay shows."""
        d = np.load(path)
        n = len(d["logprob"])
        flipped = d["top"] != self.tokens[:n]
        dgap = self.mean(np.abs(d["gap"] - self.gap[:n]))
        return Replay(
            text=(self.mean(flipped.astype(float)) > 0).astype(float),
            top5=self._first(flipped, d["rank"] >= 5),
            margin=self.mean(np.minimum(d["deficit"], self.clip)),
            gap=dgap / self.level[: len(dgap)],
            dgap=dgap,
            dlogp=self.mean(np.abs(d["logprob"] - self.logprob[:n])),
        )

    def _first(self, flipped: NDArray[np.bool_], value: NDArray[np.bool_]) -> Floats:
        """The value where each prompt first parts; 0 where it does not."""
        prompts = int(np.searchsorted(self.at, len(flipped)))
        out = np.zeros(prompts)
        for i in range(prompts):
            hits = np.flatnonzero(flipped[self.at[i] : self.at[i + 1]])
            out[i] = float(value[self.at[i] + hits[0]]) if len(hits) else 0.0
        return out


STATISTICS = ("text", "top5", "margin", "gap")


def auc(positive: Floats, negative: Floats) -> float:
    """Chance that a defect ranks above a benign change; ties count half."""
    ranks = stats.rankdata(np.concatenate([positive, negative]))
    n = len(positive)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * len(negative)))


def separation(work: Path, mode: str) -> dict[str, Any]:
    """Figures of one compute class."""
    golden = Golden(work, mode)
    cells = {
        p.stem.removeprefix(f"{mode} "): golden.replay(p)
        for p in sorted(work.glob(f"{mode} *benign*.npz"))
        if " decoding " not in p.stem
    }
    defects = {p.stem.split(" defect ")[1]: golden.replay(p) for p in sorted(work.glob(f"{mode} * defect *.npz"))}
    unseen = {name: r for name, r in cells.items() if name.removeprefix("here benign ") not in OWN}
    random = np.random.default_rng(0)
    negatives = {s: np.concatenate([getattr(r, s) for r in unseen.values()]) for s in STATISTICS}
    picks = [
        (random.choice(list(unseen)), random.choice(len(golden.level), SUITE, replace=False)) for _ in range(SUITES)
    ]
    calm = [tested(golden, unseen[name], mode, rows) for name, rows in picks]
    return {
        "prompts, benign": len(golden.level),
        "mean |dlogp|, envelope": float(f"{golden.dlogp:.3g}"),
        "benign changes that the envelope did not see": len(unseen),
        "benign, ratio": {name: spread(r.gap) for name, r in cells.items()},
        f"false alarms in {SUITES} suites of {SUITE}": sum(t.fails(ALPHA) for t in calm),
        "largest ratio of a benign suite": round(max(t.ratio for t in calm), 3),
        "largest ratio of a benign prompt": round(float(negatives["gap"].max()), 3),
        "defects": {name: row(golden, r, negatives, calm, mode) for name, r in defects.items()},
        "decoding": {
            p.stem.split(" decoding ")[1]: decoded(golden, p, mode) for p in sorted(work.glob(f"{mode} * decoding *"))
        },
    }


def decoded(golden: Golden, path: Path, mode: str) -> dict[str, Any]:
    """Prompts that part when they are decoded, those that are drift by deficit or by choice, the test, and what fails by either."""
    d = np.load(path)
    found = rounding_test(d["dgap"], golden.level[: len(d["dgap"])], mode, (), OWN)
    assert found is not None
    drift = int(((d["deficit"] > golden.tail) | d["otherwise"]).sum())
    return {
        "part": int(d["differs"].sum()),
        "not chosen greedily": int(d["otherwise"].sum()),
        "drift": drift,
        "of": len(d["differs"]),
        "ratio": float(f"{found.ratio:.4g}"),
        "p": float(f"{found.p_value:.2g}"),
        "suite": "fails" if drift or found.fails(ALPHA) else "passes",
    }


def tested(golden: Golden, replay: Replay, mode: str, rows: Any) -> Any:
    """The check of one suite, as pytest-repro makes it."""
    found = rounding_test(replay.dgap[rows], golden.level[rows], mode, (), OWN)
    assert found is not None
    return found


def row(golden: Golden, replay: Replay, negatives: Mapping[str, Floats], calm: list[Any], mode: str) -> dict[str, Any]:
    """One defect: AUC over single prompts, and what becomes of a suite."""
    prompts = slice(0, len(replay.gap))
    suite = tested(golden, replay, mode, prompts)
    return {
        **{s: round(auc(getattr(replay, s), negatives[s]), 4) for s in STATISTICS},
        "mean |dlogp|": float(f"{replay.dlogp.mean():.3g}"),
        "ratio": float(f"{suite.ratio:.4g}"),
        "p": float(f"{suite.p_value:.2g}"),
        "suite": "fails" if suite.fails(ALPHA) else "passes",
    }


def spread(ratios: Floats) -> list[float]:
    """Median and largest."""
    return [round(float(np.median(ratios)), 3), round(float(ratios.max()), 3)]
