"""Numbers of every token, from the logits: while `generate` decodes, and of tokens that are given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor

from ..errors import EngineError
from ..generation import Request, Scores
from .base import Tick

Sum = Callable[[torch.Tensor], torch.Tensor]
"""ln of the sum of e^x along the last dimension, in the mode's compute."""


class Recorder(LogitsProcessor):  # type: ignore[misc]
    """Sees the logits of every step, writes numbers down, and hands the logits on untouched.

    Numbers are of the token that `generate` then chose, whatever it chose it by: it is known at the next step.
    """

    def __init__(self, batch: Sequence[Request], device: torch.device, tick: Tick, logsumexp: Sum) -> None:
        self.rows: dict[str, list[torch.Tensor]] = {"logprob": [], "gap": [], "runner_up": []}
        self.tick = tick
        self.logsumexp = logsumexp
        self.waiting: torch.Tensor | None = None
        """Logits of the last step, whose token is not known yet."""
        self.reference: torch.Tensor | None = None
        if any(r.reference is not None for r in batch):
            longest = max(len(r.reference) for r in batch if r.reference is not None)
            padded = np.full((len(batch), longest), -1, np.int64)
            for row, request in enumerate(batch):
                if request.reference is not None:
                    padded[row, : len(request.reference)] = request.reference
            self.reference = torch.from_numpy(padded).to(device)
            self.rows["reference_logprob"] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """One step: its logits are looked at and handed on."""
        self._settle(input_ids[:, -1])
        self.waiting = scores.to(torch.float32, copy=True)  # who comes after may change what is handed on in place
        self.tick(len(scores))
        return scores

    def _settle(self, chosen: torch.Tensor) -> None:
        """Write down the numbers of the last step, now that its token is known."""
        if self.waiting is None:
            return
        logits, step = self.waiting, len(self.rows["logprob"])
        total = self.logsumexp(logits)
        best = logits.topk(2).indices
        rival = torch.where(best[:, 0] == chosen, best[:, 1], best[:, 0])
        own = logits.gather(1, chosen[:, None])[:, 0]
        self.rows["logprob"].append(own - total)
        self.rows["gap"].append(own - logits.gather(1, rival[:, None])[:, 0])
        self.rows["runner_up"].append(rival)
        if self.reference is not None:
            self.rows["reference_logprob"].append(self._watched(logits, total, step))
        self.waiting = None

    def _watched(self, logits: torch.Tensor, total: torch.Tensor, step: int) -> torch.Tensor:
        assert self.reference is not None
        if step >= self.reference.shape[1]:
            return torch.full_like(total, torch.nan)
        token = self.reference[:, step]
        value = logits.gather(1, token.clamp(min=0)[:, None])[:, 0] - total
        return torch.where(token >= 0, value, torch.nan)

    def columns(self, last: torch.Tensor) -> dict[str, Any]:
        """Each column as an array of shape (batch, steps).

        Args:
            last: the tokens that were chosen last, shape (batch,).
        """
        self._settle(last)
        return {
            name: torch.stack(steps, 1).cpu().numpy().astype(np.int32 if name == "runner_up" else np.float32)
            for name, steps in self.rows.items()
        }


def reference(request: Request) -> Any:
    """The tokens to replay.

    Raises:
        EngineError: there are none.
    """
    if request.reference is None:
        raise EngineError(f"prompt {request.id}: nothing to replay")
    return request.reference


def length(request: Request) -> int:
    """Tokens of the prompt and of what is replayed."""
    return len(request.tokens) + len(reference(request))


def last_logsumexp(logits: torch.Tensor) -> torch.Tensor:
    """As torch computes it."""
    return logits.logsumexp(-1)


def score(request: Request, logits: torch.Tensor, logsumexp: Sum) -> Scores:
    """Numbers of one replayed prompt from its logits, shape (at least T, vocabulary)."""
    tokens = torch.from_numpy(reference(request).astype(np.int64)).to(logits.device)
    logits = logits[: len(tokens)].float()
    own = logits.gather(1, tokens[:, None])[:, 0]
    logprob = (own - logsumexp(logits)).cpu().numpy()
    gap = torch.full_like(own, torch.nan)
    if request.reference_runner_up is not None:
        rival = torch.from_numpy(request.reference_runner_up.astype(np.int64)).to(logits.device)
        gap = torch.where(rival >= 0, own - logits.gather(1, rival.clamp(min=0)[:, None])[:, 0], torch.nan)
    bad = np.flatnonzero(np.isnan(logprob))
    return Scores(
        id=request.id,
        logprob=logprob.astype(np.float32),
        deficit=(logits.max(-1).values - own).cpu().numpy().astype(np.float32),
        top=logits.argmax(-1).cpu().numpy().astype(np.int32),
        gap=gap.cpu().numpy().astype(np.float32),
        error=f"NaN in logits at token {bad[0]}" if len(bad) else "",
    )
