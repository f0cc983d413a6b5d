"""A model in a format against itself in FP32: log-probabilities and whole distributions, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from ..generation import Request
from ..ladder import Departure

MOST_KEPT = 2**28
"""FP32 logits that are kept from one format to the next: 1 GiB. Others are computed anew for each."""


class References:
    """FP32 logits of the golden's tokens, kept as far as they fit."""

    def __init__(self, most: int = MOST_KEPT) -> None:
        self.most = most
        self.kept: dict[tuple[bytes, ...], list[torch.Tensor]] = {}

    def of(self, batch: Sequence[Request], compute: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
        """Logits of each request's reference tokens, shape (T, vocabulary)."""
        key = tuple(part.tobytes() for r in batch for part in (r.tokens, _reference(r)))
        found = self.kept.get(key)
        if found is None:
            found = [logits.float().clone() for logits in compute()]
            held = sum(t.numel() for tensors in self.kept.values() for t in tensors)
            if held + sum(t.numel() for t in found) <= self.most:
                self.kept[key] = found
        return found


def departure(request: Request, fp32: torch.Tensor, now: torch.Tensor) -> Departure:
    """One prompt.

    Args:
        request: with the golden's tokens.
        fp32: logits of the same weights in FP32, shape (T, vocabulary).
        now: logits in the format, the same shape.
    """
    tokens = torch.from_numpy(_reference(request).astype(np.int64)).to(now.device)[:, None]
    before, after = fp32.log_softmax(-1), now.float().log_softmax(-1)
    own = after.gather(1, tokens)
    dlogp = (own - before.gather(1, tokens))[:, 0]
    # In float32 a divergence of nothing but rounding may come out below zero, which no divergence is.
    kl = (before.exp() * (before - after)).sum(-1).clamp(min=0)
    deficit = (now.max(-1, keepdim=True).values - now.gather(1, tokens))[:, 0]
    bad = (~now.isfinite().all(-1)).nonzero().flatten().tolist()
    return Departure(
        id=request.id,
        deficit=deficit.cpu().numpy().astype(np.float32),
        dlogp=dlogp.cpu().numpy().astype(np.float32),
        kl=kl.cpu().numpy().astype(np.float32),
        error=f"no finite logits at token {bad[0]}" if bad else "",
    )


def _reference(request: Request) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    assert request.reference is not None, f"prompt {request.id}: nothing to compare"
    return request.reference
