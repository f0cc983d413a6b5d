"""A candidate for a golden beside the golden it would replace: the notes that a reviewer is shown. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from . import noise
from .comparison import compare_decode, finite
from .generation import subset
from .golden import Golden
from .verdict import Evidence, judge


def with_notes(golden: Golden, previous: Golden | None, said: Mapping[str, float] | None = None) -> Golden:
    """A candidate with what a reviewer must know: how each prompt compares with the golden it would replace.

    Args:
        golden: the candidate.
        previous: the golden that it would replace.
        said: prompt id -> a deficit that somebody claims; it counts where the two files do not hold it.
    """
    if previous is None:
        return replace(golden, candidate={"against": None, "prompts": []})
    there = set(previous.generation.ids)
    both = [i for i, name in enumerate(golden.generation.ids) if name in there]
    seen = compare_decode(previous.generation, subset(golden.generation, both))
    old = previous.generation.index()
    rows: list[dict[str, Any]] = []
    for i, name in enumerate(seen.ids):
        row = seen.row(i)
        if row.divergence_index >= 0 and not np.isfinite(row.deficit) and said and name in said:
            row = replace(row, deficit=said[name])
        evidence = Evidence(
            differs=row.divergence_index >= 0,
            deficit=row.deficit,
            # Up to a divergence there may be a token or two: too few to say how far the text moved.
            mean_abs_dlogp=row.mean_abs_dlogp if row.divergence_index < 0 else np.nan,
            envelope_deficit=previous.noise.max_deficit,
            level=previous.noise.level(old[name]),
            ratio=noise.bulk_ratio(previous.compute_class),
            passed_over=row.passed_over,
            unmoved=row.unmoved,
            other_bits=row.moved if previous.compute_class == noise.EXACT else None,
        )
        found = judge(evidence, "none", False)
        rows.append(
            {
                "id": name,
                "verdict": str(found.verdict),
                "reason": found.reason,
                "divergence_index": int(row.divergence_index) if evidence.differs else None,
                "deficit": finite(row.deficit) if evidence.differs else 0.0,
                "golden_gap": finite(row.golden_gap),
                "mean_abs_dlogp": finite(row.mean_abs_dlogp),
            }
        )
    rows += [{"id": name, "verdict": "new"} for name in golden.generation.ids if name not in there]
    here = golden.generation.index()
    gone = [{"id": name, "verdict": "removed"} for name in previous.generation.ids if name not in here]
    # What a part lacks, another part has.
    return replace(golden, candidate={"against": previous.digest, "prompts": rows if golden.part else [*rows, *gone]})


def of_parts(golden: Golden, parts: Sequence[Golden], previous: Golden | None) -> Golden:
    """A candidate that was merged, with the notes of its parts where they were made against the same golden.

    Notes made while recording know deficits that the files do not hold.
    """
    fresh: Mapping[str, Any] = with_notes(golden, previous).candidate or {}
    notes = [part.candidate for part in parts if part.candidate and part.candidate["against"] == fresh["against"]]
    told = {note.get("id"): note for each in notes for note in each["prompts"]}
    prompts = [told.get(note["id"], note) for note in fresh["prompts"]]
    return replace(golden, candidate={**fresh, "prompts": prompts, "parts": [part.digest for part in parts]})
