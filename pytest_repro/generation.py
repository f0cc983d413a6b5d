"""What came back from an engine, as columns over a whole suite.

Token ids are the truth; text is for people. Per-token numbers lie end to end in one array a column, with `offsets`
marking where each prompt's tokens start, so that a suite of ten thousand prompts is compared by a few array operations.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]
Numbers = NDArray[np.float32]

FINISH_REASONS = ("stop", "length")
"""`stop`: the model ended the text (an end-of-sequence token, kept in the tokens). `length`: the limit did."""


def digest(data: Any) -> str:
    """sha256 of bytes, or of the canonical JSON of anything else, as `sha256:<hex>`."""
    raw = data if isinstance(data, bytes) else json.dumps(data, sort_keys=True, ensure_ascii=True).encode()
    return "sha256:" + hashlib.sha256(raw).hexdigest()


def token_digest(tokens: Tokens | Sequence[int]) -> str:
    """Identity of a prompt as the model sees it: sha256 of its token ids as little-endian int32."""
    return digest(np.asarray(tokens, dtype="<i4").tobytes())


@dataclass(frozen=True)
class Request:
    """One prompt as an engine gets it."""

    id: str
    """The prompt's id in the suite."""
    tokens: Tokens
    """Token ids of the whole prompt, chat template applied; shape (prompt length,)."""
    content: str | list[dict[str, str]]
    """The prompt as written: text, or chat messages."""
    reference: Tokens | None = None
    """The golden's tokens, if there is one; shape (T,). Needed to replay; optional when decoding."""
    reference_runner_up: Tokens | None = None
    """The golden's recorded runner-up at each of its positions; shape (T,)."""


def _empty() -> Numbers:
    return np.zeros(0, np.float32)


@dataclass(frozen=True)
class Output:
    """One prompt's greedy continuation of T tokens."""

    id: str
    """The prompt's id."""
    tokens: Tokens
    """Chosen token ids, shape (T,); an end-of-sequence token that was chosen is kept as the last one."""
    text: str
    """The tokens as text, without special tokens."""
    finish_reason: str
    """One of `FINISH_REASONS`."""
    logprob: Numbers = field(default_factory=_empty)
    """Log-probability of each chosen token, nats, shape (T,); NaN where the engine cannot tell."""
    gap: Numbers = field(default_factory=_empty)
    """Logit of the chosen token less the runner-up's, nats, shape (T,); never negative under greedy decoding."""
    runner_up: Tokens = field(default_factory=lambda: np.zeros(0, np.int32))
    """The second-best token id, shape (T,); -1 where the engine cannot tell."""
    reference_logprob: Numbers | None = None
    """Log-probability of the golden's token at each step, shape (T,): its deficit, wherever the prefix still agrees."""
    error: str = ""
    """Why there is no answer for this prompt (NaN in logits, a prompt longer than the context); empty if there is one."""


@dataclass(frozen=True)
class Scores:
    """One prompt's golden tokens as the current model sees them: one forward pass over prompt and golden tokens."""

    id: str
    """The prompt's id."""
    logprob: Numbers
    """Log-probability of the golden's token at each position, shape (T,)."""
    deficit: Numbers
    """Largest logit less the golden token's, nats, shape (T,): 0 where the model would still choose it, or ties."""
    top: Tokens
    """The token the model would choose at each position given the golden's own prefix, shape (T,)."""
    gap: Numbers
    """Golden token's logit less that of the runner-up recorded in the golden, shape (T,); negative once they swapped."""
    error: str = ""
    """Why this prompt could not be scored; empty if it was."""


@dataclass(frozen=True)
class Generation:
    """The outputs of P prompts with N tokens in all."""

    ids: tuple[str, ...]
    """Prompt ids, length P."""
    prompt_digests: tuple[str, ...]
    """`token_digest` of each prompt, length P."""
    content_digests: tuple[str, ...]
    """`digest` of each prompt as written, length P."""
    texts: tuple[str, ...]
    """Length P."""
    finish_reasons: tuple[str, ...]
    """Length P."""
    offsets: NDArray[np.int64]
    """Shape (P + 1,): prompt i's tokens lie at offsets[i]:offsets[i + 1]."""
    tokens: Tokens
    """Shape (N,)."""
    logprob: Numbers
    """Shape (N,), nats."""
    gap: Numbers
    """Shape (N,), nats."""
    runner_up: Tokens
    """Shape (N,)."""
    reference_logprob: Numbers | None = None
    """Shape (N,), or None where nothing was watched."""
    errors: Mapping[str, str] = field(default_factory=dict)
    """Prompt id -> why it has no answer."""

    def __len__(self) -> int:
        return len(self.ids)

    def span(self, i: int) -> slice:
        """Where prompt i's tokens lie in the columns."""
        return slice(int(self.offsets[i]), int(self.offsets[i + 1]))

    def length(self, i: int) -> int:
        """Number of prompt i's tokens."""
        return int(self.offsets[i + 1] - self.offsets[i])

    def index(self) -> dict[str, int]:
        """Prompt id -> its place."""
        return {name: i for i, name in enumerate(self.ids)}

    @classmethod
    def of(cls, requests: Sequence[Request], outputs: Iterable[Output]) -> Generation:
        """Pack one output a request, in the requests' order.

        Raises:
            ValueError: an output names no request, or a column's length is not the number of tokens.
        """
        by_id = {out.id: out for out in outputs}
        rows = [by_id[r.id] for r in requests if r.id in by_id]
        kept = [r for r in requests if r.id in by_id]
        if len(rows) != len(by_id):
            raise ValueError(f"outputs without a request: {sorted(set(by_id) - {r.id for r in requests})}")
        for row in rows:
            for name in ("logprob", "gap", "runner_up"):
                if len(getattr(row, name)) != len(row.tokens):
                    raise ValueError(f"prompt {row.id}: {len(row.tokens)} tokens but {len(getattr(row, name))} {name}")
            if row.reference_logprob is not None and len(row.reference_logprob) != len(row.tokens):
                raise ValueError(
                    f"prompt {row.id}: {len(row.tokens)} tokens, {len(row.reference_logprob)} reference_logprob"
                )
        watched = [
            r.reference_logprob if r.reference_logprob is not None else np.full(len(r.tokens), np.nan, np.float32)
            for r in rows
        ]
        return cls(
            ids=tuple(r.id for r in rows),
            prompt_digests=tuple(token_digest(r.tokens) for r in kept),
            content_digests=tuple(digest(r.content) for r in kept),
            texts=tuple(r.text for r in rows),
            finish_reasons=tuple(r.finish_reason for r in rows),
            offsets=offsets_of(len(r.tokens) for r in rows),
            tokens=pack([r.tokens for r in rows], np.int32),
            logprob=pack([r.logprob for r in rows], np.float32),
            gap=pack([r.gap for r in rows], np.float32),
            runner_up=pack([r.runner_up for r in rows], np.int32),
            reference_logprob=pack(watched, np.float32),
            errors={r.id: r.error for r in rows if r.error},
        )


def joined(parts: Sequence[Generation]) -> Generation:
    """Generations laid end to end; what was watched is left out."""
    return Generation(
        ids=tuple(name for g in parts for name in g.ids),
        prompt_digests=tuple(name for g in parts for name in g.prompt_digests),
        content_digests=tuple(name for g in parts for name in g.content_digests),
        texts=tuple(text for g in parts for text in g.texts),
        finish_reasons=tuple(reason for g in parts for reason in g.finish_reasons),
        offsets=offsets_of(g.length(i) for g in parts for i in range(len(g))),
        tokens=pack([g.tokens for g in parts], np.int32),
        logprob=pack([g.logprob for g in parts], np.float32),
        gap=pack([g.gap for g in parts], np.float32),
        runner_up=pack([g.runner_up for g in parts], np.int32),
    )


def subset(g: Generation, rows: Sequence[int]) -> Generation:
    """Some of a generation's prompts, in the order given by their places."""
    flat = np.concatenate([np.zeros(0, np.int64), *(np.arange(g.offsets[i], g.offsets[i + 1]) for i in rows)]).astype(
        np.int64
    )
    lengths = [int(g.offsets[i + 1] - g.offsets[i]) for i in rows]
    return Generation(
        ids=tuple(g.ids[i] for i in rows),
        prompt_digests=tuple(g.prompt_digests[i] for i in rows),
        content_digests=tuple(g.content_digests[i] for i in rows),
        texts=tuple(g.texts[i] for i in rows),
        finish_reasons=tuple(g.finish_reasons[i] for i in rows),
        offsets=offsets_of(lengths),
        tokens=g.tokens[flat],
        logprob=g.logprob[flat],
        gap=g.gap[flat],
        runner_up=g.runner_up[flat],
        reference_logprob=None if g.reference_logprob is None else g.reference_logprob[flat],
    )


def offsets_of(lengths: Iterable[int]) -> NDArray[np.int64]:
    """Lengths of P rows -> where each starts, shape (P + 1,)."""
    return np.concatenate([[0], np.cumsum(np.fromiter(lengths, np.int64))]).astype(np.int64)


def pack(rows: Sequence[NDArray[Any]], dtype: type) -> NDArray[Any]:
    """Lay rows end to end; works for none."""
    packed: NDArray[Any] = np.concatenate([np.zeros(0, dtype), *rows]).astype(dtype, copy=False)
    return packed
