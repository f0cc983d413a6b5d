"""A golden: a recorded generation, the fingerprint it came from, its noise envelope and its review. The wire format.

The text part is JSON Lines for reviewers: a header, then one line a prompt. The binary part is safetensors with the
per-token numbers in float32, since rounding what is stored would set the floor of what can be seen. The header holds
the digest of the binary part and of all its own content, so that a golden edited by hand is known for one; the review
holds a seal over what was accepted, by whom and why.

Nothing here executes what it reads: JSON and safetensors only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from shlex import quote
from typing import Any

import numpy as np
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from . import schemas
from .errors import GoldenError
from .fingerprint import Fingerprint
from .generation import FINISH_REASONS, Generation, Tokens, digest, offsets_of, pack
from .noise import Calibration, Envelope
from .sketch import Recorded
from .suite import Shard, Thresholds

SCHEMA = 1
KIND = "pytest-repro golden"

Migration = Callable[[dict[str, Any], list[dict[str, Any]]], tuple[dict[str, Any], list[dict[str, Any]]]]
MIGRATIONS: dict[int, Migration] = {}
"""Schema version -> the function that lifts (header, lines) to the next version. None was needed yet."""

_COLUMNS = {"logprob": np.float32, "gap": np.float32, "runner_up": np.int32}
_UNSIGNED = ("digest", "review", "candidate")
_BOUNDS = {"prompt_level": "max_abs_dlogp", "gap_level": "max_abs_dgap"}
"""A prompt's level in an envelope -> the measure of the variants that bounds it."""


@dataclass(frozen=True)
class Agreed:
    """Thresholds that somebody put in force for a golden, and why."""

    limits: Mapping[str, Any]
    """Every threshold of the golden's compute class, as in suite.toml."""
    by: str
    when: str
    reason: str

    def to_thresholds(self) -> Thresholds:
        """The limits as a check reads them."""
        return Thresholds(**{**self.limits, "length_ratio": tuple(self.limits["length_ratio"])})


@dataclass(frozen=True)
class Review:
    """Who accepted a golden, when, and why."""

    by: str
    """Name and address from the git configuration."""
    when: str
    """ISO 8601, UTC."""
    reason: str
    """In the reviewer's words."""
    previous: str | None
    """Digest of the golden it replaced; None for the first."""
    commit: str | None = None
    """Commit that was checked out when it was accepted."""
    thresholds: Agreed | None = None
    """The thresholds in force for its class; None in reviews from before they were kept."""

    def to_json(self) -> dict[str, Any]:
        """As it stands in the header, without its seal. What a review lacks is left out, so that older seals hold."""
        return {**vars(self), "thresholds": vars(self.thresholds)} if self.thresholds else _older(vars(self))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Review:
        """Inverse of `to_json`, of a review that satisfies the schema."""
        return cls(**{**data, "thresholds": Agreed(**data["thresholds"]) if "thresholds" in data else None})

    def seal(self, accepted: str) -> str:
        """Digest over this review and the content it accepted."""
        return digest({"accepted": accepted, **self.to_json()})


def _older(review: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in review.items() if name != "thresholds"}


@dataclass(frozen=True)
class Part:
    """Which part of a suite a candidate holds, and of what: enough to merge it with the others."""

    index: int
    count: int
    size: int
    """Prompts of the whole suite."""
    prompts: str
    """`Suite.digest_of_prompts`."""
    scorer: str

    @property
    def shard(self) -> Shard:
        """Its number."""
        return Shard(self.index, self.count)


@dataclass(frozen=True)
class Golden:
    """A golden, or a candidate for one (`review` is None)."""

    suite: str
    model: str
    """The model reference as the suite spells it."""
    compute_class: str
    """As observed: bf16, fp16, fp32, ..."""
    device_class: str
    """`cpu`, `cuda-sm90`, ...: empty if the golden holds for every device."""
    numerics: str
    """The mode it was recorded in."""
    max_new_tokens: int
    batch_size: int
    fingerprint: Fingerprint
    generation: Generation
    scores: tuple[bool | None, ...]
    """Whether each prompt's answer was right; None if it is not scored."""
    noise: Envelope
    review: Review | None = None
    candidate: Mapping[str, Any] | None = None
    """Of a pending golden: how it compares with the one it would replace."""
    digest: str = ""
    """Digest of the content; set by `encode` and `decode`."""
    part: Part | None = None
    """Of a candidate recorded under --repro-shard; None for a whole one."""
    sketch: Recorded | None = None
    """What the model's modules put out at a few rows; None if the engine cannot look inside."""
    calibrations: tuple[Calibration, ...] = ()
    """The envelope on other machines, measured there by `pytest-repro calibrate`."""

    @property
    def stem(self) -> str:
        """File name without endings: `bf16`, or `bf16@cuda-sm90`."""
        return self.compute_class + (f"@{self.device_class}" if self.device_class else "")

    @property
    def accuracy(self) -> float | None:
        """Percent of the scored prompts that were right."""
        scored = [s for s in self.scores if s is not None]
        return 100 * sum(scored) / len(scored) if scored else None


def encode(golden: Golden) -> tuple[bytes, bytes]:
    """A golden as (text part, binary part), its digests and seal computed."""
    g = golden.generation
    columns: dict[str, Any] = {name: np.asarray(getattr(g, name), dtype) for name, dtype in _COLUMNS.items()}
    columns |= {"offsets": g.offsets, **_levels(golden.noise)}
    if golden.part is not None:
        assert golden.noise.prompt_means is not None, "a part is merged from the means of every variant"
        columns["noise.prompt_means"] = golden.noise.prompt_means
    if golden.sketch is not None:
        columns |= golden.sketch.tensors()
    columns |= _calibrated_levels(golden.calibrations)
    numbers = save_tensors(columns)
    lines = [
        {
            "id": g.ids[i],
            "content_digest": g.content_digests[i],
            "prompt_digest": g.prompt_digests[i],
            "tokens": g.tokens[g.span(i)].tolist(),
            "text": g.texts[i],
            "finish_reason": g.finish_reasons[i],
            "score": golden.scores[i],
        }
        for i in range(len(g))
    ]
    header: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": KIND,
        "suite": golden.suite,
        "model": golden.model,
        "compute_class": golden.compute_class,
        "device_class": golden.device_class,
        "numerics": golden.numerics,
        "generation": {"max_new_tokens": golden.max_new_tokens, "batch_size": golden.batch_size},
        "fingerprint": dict(sorted(golden.fingerprint.items())),
        "noise": golden.noise.to_json(),
        "metrics": {"accuracy": golden.accuracy, "mean_tokens": float(np.diff(g.offsets).mean())},
        "prompts": len(g),
        "numbers": digest(numbers),
    }
    if golden.part is not None:
        header["part"] = vars(golden.part)
    if golden.sketch is not None:
        header["sketch"] = golden.sketch.to_json()
    if golden.calibrations:
        header["calibrations"] = [_calibration(c) for c in golden.calibrations]
    body = [_line(line) for line in lines]
    header["digest"] = content_digest(header, body)
    header["review"] = None
    if golden.review is not None:
        header["review"] = {**golden.review.to_json(), "seal": golden.review.seal(header["digest"])}
    if golden.candidate is not None:
        header["candidate"] = dict(golden.candidate)
    return b"".join([_line(header), *body]), numbers


def _levels(envelope: Envelope) -> dict[str, Any]:
    return {"noise.prompt_level": envelope.prompt_level, "noise.gap_level": envelope.gap_level}


def _calibration(calibration: Calibration) -> dict[str, Any]:
    return {
        "fingerprint": dict(sorted(calibration.fingerprint.items())),
        "noise": calibration.envelope.to_json(),
    }


def _calibrated_levels(calibrations: Sequence[Calibration]) -> dict[str, Any]:
    return {
        f"calibration.{i}.{name}": np.asarray(getattr(calibration.envelope, name), np.float32)
        for i, calibration in enumerate(calibrations)
        for name in _BOUNDS
    }


def signed(golden: Golden) -> Golden:
    """The golden with the digest of its content as it is now."""
    header, _, _ = encode(golden)[0].partition(b"\n")
    return replace(golden, digest=json.loads(header)["digest"])


def content_digest(header: Mapping[str, Any], body: Sequence[bytes]) -> str:
    """Digest of what a review accepts: the header without digest, review and candidate, and every line's bytes."""
    signed = {k: v for k, v in header.items() if k not in _UNSIGNED}
    return digest(b"\n".join([digest(signed).encode(), *(line.rstrip(b"\r\n") for line in body)]))


def _line(data: Mapping[str, Any]) -> bytes:
    # Control characters and non-ASCII text are escaped: model text stays inert in a terminal or a diff.
    return json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(", ", ": ")).encode() + b"\n"


def decode(text: bytes, numbers: bytes | None, where: str, *, regenerate: str = "") -> Golden:
    """Read a golden and hold it against its digests, its seal and its schema.

    Args:
        text: the text part.
        numbers: the binary part; None if the file is not there.
        where: the text part's path, for messages.
        regenerate: the command that records it anew, for messages.

    Raises:
        GoldenError: not a golden, of a newer schema, edited by hand, truncated, or parts that disagree.
    """
    header, lines, tokens, review = _trusted(text, where, regenerate)
    tensors = _numbers(header, lines, numbers, where, regenerate)
    sketch = _sketch(header, tensors, _binary(where), regenerate)
    return _build(header, lines, tokens, tensors, review, sketch)


@dataclass(frozen=True)
class Sealed:
    """What a golden's text part says of itself, held against its digest, its seal and its schema."""

    digest: str
    numbers: str
    """Digest that its binary part must have."""
    review: Review | None


def sealed(text: bytes, where: str) -> Sealed:
    """Read the text part alone: of a golden in a commit, say, whose binary part git-lfs keeps elsewhere.

    Raises:
        GoldenError: as `decode`.
    """
    header, _, _, review = _trusted(text, where, "")
    return Sealed(header["digest"], header["numbers"], review)


def _trusted(
    text: bytes, where: str, regenerate: str
) -> tuple[dict[str, Any], list[dict[str, Any]], list[Tokens], Review | None]:
    raw = [line for line in text.split(b"\n") if line.strip()]
    header, lines = _parse(raw, where, regenerate)
    if content_digest(header, raw[1:]) != header.get("digest"):
        raise GoldenError(
            "this golden was edited by hand: its content does not match its digest",
            where=where,
            fix=f"git checkout -- {quote(where)}   # or record it anew: {regenerate}",
        )
    header, lines = _migrate(header, lines, where)
    tokens = _validate(header, lines, where)
    return header, lines, tokens, _review(header, where)


def _parse(raw: Sequence[bytes], where: str, regenerate: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    rows = []
    for number, line in enumerate(raw, 1):
        try:
            row = schemas.parse(line)
        except (ValueError, RecursionError) as exc:
            raise GoldenError(f"not valid JSON: {exc}", where=f"{where}:{number}", fix=regenerate) from None
        if not isinstance(row, dict):
            raise GoldenError("not a JSON object", where=f"{where}:{number}", fix=regenerate)
        rows.append(row)
    if not rows or rows[0].get("kind") != KIND:
        raise GoldenError("this is not a pytest-repro golden", where=f"{where}:1", fix=regenerate)
    version = rows[0].get("schema")
    if not isinstance(version, int) or version > SCHEMA:
        raise GoldenError(
            f"this golden has schema {version!r}, and this pytest-repro reads up to {SCHEMA}",
            where=f"{where}:1 [schema]",
            fix="pip install -U pytest-repro",
        )
    return rows[0], rows[1:]


def _migrate(
    header: dict[str, Any], lines: list[dict[str, Any]], where: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    while header["schema"] < SCHEMA:
        step = MIGRATIONS.get(header["schema"])
        if step is None:
            raise GoldenError(f"no migration from schema {header['schema']}", where=where, fix="record it anew")
        header, lines = step(header, lines)
    return header, lines


def _validate(header: dict[str, Any], lines: list[dict[str, Any]], where: str) -> list[Tokens]:
    """Header and lines against the schema; every line's tokens as an array."""
    error = schemas.first_error(header, "golden", "header")
    if error is not None:
        name = ".".join(map(str, error.absolute_path))
        raise GoldenError(schemas.describe(error), where=f"{where}:1 [{name}]")
    validate_line = schemas.validator("golden", "line").iter_errors
    seen: set[str] = set()
    tokens: list[Tokens] = []
    for number, line in enumerate(lines, 2):
        # The schema has the last word, and words the message; what is plainly in order need not wait for it.
        error = None if _in_order(line) else next(validate_line(line), None)
        if error is not None:
            name = ".".join(map(str, error.absolute_path))
            raise GoldenError(schemas.describe(error), where=f"{where}:{number} [{name}]")
        if line["id"] in seen:
            raise GoldenError(f"duplicate id {line['id']!r}", where=f"{where}:{number} [id]")
        seen.add(line["id"])
        tokens.append(_tokens(line, f"{where}:{number} [tokens]"))
    if len(lines) != header["prompts"]:
        raise GoldenError(
            f"{header['prompts']} prompts announced, {len(lines)} lines found", where=f"{where}:1 [prompts]"
        )
    return tokens


def _tokens(line: Mapping[str, Any], where: str) -> Tokens:
    values = np.asarray(line["tokens"], dtype=object if not line["tokens"] else None)
    if len(values) and not (values.dtype.kind == "i" and 0 <= values.min() <= values.max() < 2**31):
        raise GoldenError("tokens must be non-negative 32-bit integers", where=where)
    return values.astype(np.int32)


_FIELDS = {"id", "content_digest", "prompt_digest", "tokens", "text", "finish_reason", "score"}
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def _in_order(line: Mapping[str, Any]) -> bool:
    """Whether a line satisfies the schema, told quickly: ten thousand lines take jsonschema many seconds."""
    return (
        line.keys() == _FIELDS
        and isinstance(line["tokens"], list)
        and set(map(type, line["tokens"])) <= {int}
        and all(isinstance(line[name], str) for name in ("id", "text"))
        and all(
            isinstance(line[name], str) and _DIGEST.fullmatch(line[name])
            for name in ("content_digest", "prompt_digest")
        )
        and line["finish_reason"] in FINISH_REASONS
        and (line["score"] is None or isinstance(line["score"], bool))
    )


def _review(header: Mapping[str, Any], where: str) -> Review | None:
    if header["review"] is None:
        return None
    data = dict(header["review"])
    seal = data.pop("seal")
    review = Review.from_json(data)
    if review.seal(header["digest"]) != seal:
        raise GoldenError(
            "its review does not match its content: it was edited by hand, or copied from another golden",
            where=f"{where}:1 [review.seal]",
            fix=f"git checkout -- {quote(where)}",
        )
    return review


def _binary(where: str) -> str:
    return where.removesuffix(".jsonl") + ".safetensors"


def _numbers(
    header: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], numbers: bytes | None, where: str, regenerate: str
) -> dict[str, Any]:
    binary = _binary(where)
    if numbers is None:
        raise GoldenError(
            "the binary part is missing", where=binary, fix=f"git checkout -- {quote(binary)}   # or {regenerate}"
        )
    if digest(numbers) != header["numbers"]:
        raise GoldenError(
            "the binary part is not the one this golden was recorded with: truncated, edited, or of another version",
            where=binary,
            fix=f"git checkout -- {quote(binary)}   # with git-lfs: git lfs pull; or {regenerate}",
        )
    try:
        tensors: dict[str, Any] = load_tensors(numbers)
    except Exception as exc:  # safetensors raises its own SafetensorError and several built-in ones
        raise GoldenError(f"the binary part cannot be read: {exc}", where=binary, fix=regenerate) from None
    expected = offsets_of(len(line["tokens"]) for line in lines)
    shapes = {"offsets": expected.shape, "noise.prompt_level": (len(lines),), "noise.gap_level": (len(lines),)}
    shapes |= {name: (int(expected[-1]),) for name in _COLUMNS}
    if "part" in header:
        shapes["noise.prompt_means"] = (len(header["noise"]["variants"]), len(lines))
    for name, shape in shapes.items():
        found = tensors.get(name)
        if found is None or found.shape != shape or (name == "offsets" and not np.array_equal(found, expected)):
            raise GoldenError(f"text and binary parts disagree about {name}", where=binary, fix=regenerate)
    for level, of in _BOUNDS.items():
        _check_level(tensors, f"noise.{level}", _largest(header["noise"], of), binary, regenerate)
    _check_calibrations(header, tensors, binary, regenerate)
    return tensors


def _sketch(header: Mapping[str, Any], tensors: Mapping[str, Any], where: str, regenerate: str) -> Recorded | None:
    if "sketch" not in header:
        return None
    try:
        return Recorded.of(header["sketch"], tensors)
    except ValueError as exc:
        what = f"text and binary parts disagree about the sketch of the model: {exc}"
        raise GoldenError(what, where=where, fix=regenerate) from None


def _largest(envelope: Mapping[str, Any], measure: str) -> float:
    return max((variant[measure] for variant in envelope["variants"]), default=np.inf)


def _check_level(tensors: Mapping[str, Any], name: str, largest: float, binary: str, regenerate: str) -> None:
    if np.any(tensors[name] < 0):
        raise GoldenError("a prompt's noise level is negative", where=f"{binary} [{name}]", fix=regenerate)
    if np.any(tensors[name] > 1.001 * largest):  # float32 holds the one, JSON the other
        what = f"a prompt's noise level exceeds {largest:g}, the largest difference that was measured"
        raise GoldenError(what, where=f"{binary} [{name}]", fix=regenerate)


def _check_calibrations(header: Mapping[str, Any], tensors: Mapping[str, Any], binary: str, regenerate: str) -> None:
    """Every calibration's levels: bounded like the recording's, and known wherever the recording's are."""
    for i, calibration in enumerate(header.get("calibrations", ())):
        for level, of in _BOUNDS.items():
            name, recorded = f"calibration.{i}.{level}", tensors[f"noise.{level}"]
            found = tensors.get(name)
            if found is None or found.shape != recorded.shape or found.dtype != np.float32:
                raise GoldenError(f"text and binary parts disagree about {name}", where=binary, fix=regenerate)
            _check_level(tensors, name, _largest(calibration["noise"], of), binary, regenerate)
            if np.any(~np.isfinite(found) & np.isfinite(recorded)):  # a check there would judge nothing
                what = "a prompt's noise level is not known here, and in the recording it is"
                raise GoldenError(what, where=f"{binary} [{name}]", fix=regenerate)


def _build(
    header: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    tokens: Sequence[Tokens],
    tensors: Mapping[str, Any],
    review: Review | None,
    sketch: Recorded | None,
) -> Golden:
    generation = Generation(
        ids=tuple(line["id"] for line in lines),
        prompt_digests=tuple(line["prompt_digest"] for line in lines),
        content_digests=tuple(line["content_digest"] for line in lines),
        texts=tuple(line["text"] for line in lines),
        finish_reasons=tuple(line["finish_reason"] for line in lines),
        offsets=np.asarray(tensors["offsets"], np.int64),
        tokens=pack(tokens, np.int32),
        logprob=np.asarray(tensors["logprob"], np.float32),
        gap=np.asarray(tensors["gap"], np.float32),
        runner_up=np.asarray(tensors["runner_up"], np.int32),
    )
    return Golden(
        suite=header["suite"],
        model=header["model"],
        compute_class=header["compute_class"],
        device_class=header["device_class"],
        numerics=header["numerics"],
        max_new_tokens=header["generation"]["max_new_tokens"],
        batch_size=header["generation"]["batch_size"],
        fingerprint=header["fingerprint"],
        generation=generation,
        scores=tuple(line["score"] for line in lines),
        noise=Envelope.from_json(
            header["noise"],
            np.asarray(tensors["noise.prompt_level"], np.float32),
            np.asarray(tensors["noise.gap_level"], np.float32),
            np.asarray(tensors["noise.prompt_means"], np.float64) if "part" in header else None,
        ),
        review=review,
        candidate=header.get("candidate"),
        digest=header["digest"],
        part=Part(**header["part"]) if "part" in header else None,
        sketch=sketch,
        calibrations=tuple(_read_calibration(c, i, tensors) for i, c in enumerate(header.get("calibrations", ()))),
    )


def _read_calibration(data: Mapping[str, Any], index: int, tensors: Mapping[str, Any]) -> Calibration:
    own, gaps = (np.asarray(tensors[f"calibration.{index}.{name}"], np.float32) for name in _BOUNDS)
    return Calibration(data["fingerprint"], Envelope.from_json(data["noise"], own, gaps))


def accepted(golden: Golden, review: Review) -> Golden:
    """The golden with a review and without its candidate notes."""
    return replace(golden, review=review, candidate=None)
