"""The HTML report: one file that opens offline, made from the JSON report alone.

Text of models, goldens and suites is untrusted, and so is a report that was read from a file. Each of three walls would
do: every expression of the template is made inert and escaped, whether its author thought of it or not; the script makes
elements from text only; and the page's own policy allows its one script and style, and no connection.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..store import atomic_write
from ..text import inert
from ..verdict import WORST_FIRST
from . import figures
from .figures import number
from .terminal import arbiter_line, location_line

SIGNS = {
    "error": "✖",
    "incomparable": "≠",
    "missing": "?",
    "drift": "▲",
    "near_tie": "≈",
    "waived": "◇",
    "identical": "=",
}
"""A sign a verdict, beside its colour and its name."""
MOST_OF_ANYTHING = 2_000
"""Characters of one piece of text; a whole answer may have more."""
MOST_OF_A_TEXT = 8_000
"""Characters of a whole answer before its first divergence, and from there on."""
MOST_LINES = 20
MOST_AROUND = 160
MOST_OF_A_TOKEN = 40
MOST_SUSPECTS = 6

View = dict[str, Any]


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Write the report's page, whole or not at all."""
    atomic_write(path, render(document).encode("utf-8"))


def render(document: Mapping[str, Any]) -> str:
    """A report as one HTML page.

    Args:
        document: as `--repro-report-json` writes it (`schemas/report.schema.json`).
    """
    style, script = (asset(name) for name in ("report.css", "report.js"))
    failing_first = sorted(document["suites"], key=lambda suite: suite["verdict"] != "fail")
    return (
        environment()
        .get_template("report.html")
        .render(
            report=document,
            suites=[_suite(suite, f"s{i}") for i, suite in enumerate(failing_first)],
            failed=sum(suite["verdict"] == "fail" for suite in failing_first),
            style=Markup(style),
            script=Markup(script),
            policy=policy(style, script),
            signs=SIGNS,
        )
    )


@functools.cache
def environment() -> Environment:
    """Of the templates in page/: all that they print is made inert and escaped."""
    environment = Environment(
        loader=PackageLoader("pytest_repro.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_harmless,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "n": _number,
        "short": _short,
        "before": _before,
        "mark": _mark,
        "after": _after,
        "lines": _of_message,
        "arbiter": arbiter_line,
        "location": location_line,
    }
    return environment


def asset(name: str) -> str:
    """A file of page/."""
    return (Path(__file__).parent / "page" / name).read_text("utf-8")


def policy(style: str, script: str) -> str:
    """The page runs its own script and wears its own style, known by their digests, and may do nothing else."""
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    return (
        f"default-src 'none'; style-src 'sha256-{digests[0]}'; script-src 'sha256-{digests[1]}'; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )


# --- untrusted text -------------------------------------------------------------------------------------------------


def _harmless(value: Any) -> Any:
    """What the template prints of any expression. Jinja2 escapes it after that."""
    if isinstance(value, Markup):
        return value
    return "" if value is None else _shown(str(value), MOST_OF_ANYTHING)


def _shown(text: str, most: int, *, end: bool = False) -> str:
    """Inert text, no longer than a page can bear, which says what it lacks."""
    return _noted(inert(text[-most:] if end else text[:most]), len(text) - most, end)


def _noted(kept: str, missing: int, end: bool = False) -> str:
    if missing <= 0:
        return kept
    note = f"[{missing:,} characters left out]"
    return f"{note} {kept}" if end else f"{kept} {note}"


def _before(text: str) -> str:
    return _shown(text, MOST_AROUND, end=True)


def _after(text: str) -> str:
    return _shown(text, MOST_AROUND)


def _token(text: str) -> str:
    """A token in a table, with its blanks to be seen."""
    return _noted(inert(text[:MOST_OF_A_TOKEN]).replace(" ", "␣"), len(text) - MOST_OF_A_TOKEN)


def _mark(text: str) -> str:
    """A token in its text, where its frame shows its blanks."""
    return _token(text) if text.isspace() else _shown(text, MOST_OF_A_TOKEN)


def _of_message(text: str) -> list[str]:
    """The lines of a check's message."""
    return text[:MOST_OF_ANYTHING].split("\n")[:MOST_LINES]


def _lines(text: str, most: int, *, end: bool = False) -> str:
    """A whole text with its line breaks kept, and shown."""
    lines = (text[-most:] if end else text[:most]).replace("\r\n", "\n").split("\n")
    return _noted("⏎\n".join(map(inert, lines)), len(text) - most, end)


def _embedded(data: Any) -> Markup:
    """Data for the script, in which nothing can end the element that it lies in."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _number(value: Any) -> str:
    known = number(value)
    return "unknown" if known is None else f"{known:.3g}"


def _short(value: Any) -> str:
    """A value of the environment, on a line; digests by their first characters."""
    text = "(not there)" if value is None else inert(str(value)[:500])
    for prefix in ("gguf-sha256:", "sha256:"):
        if text.startswith(prefix):
            return text[: len(prefix) + 8] + "…"
    return text if len(text) <= 48 else text[:47] + "…"


# --- a suite --------------------------------------------------------------------------------------------------------


def _suite(suite: Mapping[str, Any], key: str) -> View:
    """What the template says of one suite: the report's own fields, and what follows from them."""
    envelope = suite["envelope"] or {}
    ordered = sorted(suite["prompts"], key=_severity)
    prompts = [_prompt(p, f"{key}-p{i}", envelope) for i, p in enumerate(ordered)]
    changes = suite["environment_diff"]
    return {
        **suite,
        "key": key,
        "failed": suite["verdict"] == "fail",
        "prompts": prompts,
        "counted": [(str(v), n) for v in WORST_FIRST if (n := suite["counts"].get(v))],
        "worst": prompts[0] if prompts and prompts[0]["verdict"] != "identical" else None,
        "explained": _explained(suite),
        "broken_checks": [c for c in suite["checks"] if c["status"] == "fail"],
        "suspects": [c for c in changes if c["cls"] != "information"],
        "information": [c for c in changes if c["cls"] == "information"],
        "most_suspects": MOST_SUSPECTS,
        "benign_dlogp": suite["metrics"].get("benign_abs_dlogp"),
        "token_moves": _token_moves(suite),
        "prompt_moves": figures.prompt_moves(
            [r for p in prompts if (r := p["ratio"]) is not None], number(envelope.get("bulk_ratio"))
        ),
        "farthest": sorted((p for p in prompts if p["beyond"]), key=lambda p: -p["ratio"]),
        "lost": [p["id"] for p in prompts if p.get("score_golden") is True and p.get("score_now") is False],
        "gained": [p["id"] for p in prompts if p.get("score_golden") is False and p.get("score_now") is True],
    }


def _severity(prompt: Mapping[str, Any]) -> tuple[int, float, float]:
    """Sorts the worst prompt first: by verdict, by deficit, by how far it moved."""
    deficit = number(prompt["deficit"])
    unknown = float("-inf")
    return (
        WORST_FIRST.index(prompt["verdict"]),
        unknown if deficit is None else -deficit,
        -(number(prompt["mean_abs_dlogp"]) or 0),
    )


def _token_moves(suite: Mapping[str, Any]) -> figures.Histogram | None:
    if not suite["distribution"]:
        return None
    envelope = suite["envelope"] or {}
    lines = {
        "mean now": suite["metrics"].get("mean_abs_dlogp"),
        "benign mean": envelope.get("mean_abs_dlogp"),
        "benign max": envelope.get("max_abs_dlogp"),
    }
    return figures.token_moves(suite["distribution"], lines)


def _explained(suite: Mapping[str, Any]) -> list[str]:
    """Whether rounding explains what moved, in sentences."""
    counts, envelope = suite["counts"], suite["envelope"]
    drift, near, waived = (counts.get(name, 0) for name in ("drift", "near_tie", "waived"))
    said = []
    if unjudged := sum(counts.get(name, 0) for name in ("error", "incomparable", "missing")):
        said.append(f"{_prompts(unjudged)} could not be compared.")
    if drift:
        said.append(f"Rounding cannot explain {_prompts(drift)}.")
    if near:
        which = "the other " if drift else "all " if near > 1 else "the "
        said.append(f"Rounding explains {which}{_prompts(near)} that differ{'s' if near == 1 else ''}.")
    if waived:
        said.append(f"{_prompts(waived)} waived: FP32-class compute was observed.")
    if envelope and (drift or near):
        said.append(
            f"It explains a deficit of up to {_number(envelope['max_deficit'])} nats, and a text that moved by up to "
            f"{_number(envelope['bulk_ratio'])} times its benign level."
        )
    if not said:
        said.append("Every output is the golden's.")
    return said


def _prompts(count: int) -> str:
    return f"{count} prompt{'' if count == 1 else 's'}"


# --- a prompt -------------------------------------------------------------------------------------------------------


def _prompt(prompt: Mapping[str, Any], key: str, envelope: Mapping[str, Any]) -> View:
    moved, benign = number(prompt["mean_abs_dlogp"]), number(prompt.get("benign_dlogp"))
    ratio = moved / benign if moved is not None and benign else None
    limit = number(envelope.get("bulk_ratio"))
    return {
        "tokens": None,
        "golden_text": None,
        "now_text": None,
        "fails": None,
        **{name: value for name, value in prompt.items() if name not in ("trace", "golden_full", "now_full", "prompt")},
        "key": key,
        "ratio": ratio,
        "beyond": ratio is not None and limit is not None and ratio > limit,
        "sentence": _sentence(prompt),
        "facts": _facts(prompt, ratio),
        "data": _embedded(_data(prompt, envelope)) if prompt.get("trace") else None,
    }


def _sentence(prompt: Mapping[str, Any]) -> str:
    if prompt["divergence_index"] is None:
        return str(prompt["reason"]) or "the same output"
    return f"diverges at token {prompt['divergence_index']} of {prompt.get('tokens')}"


def _facts(prompt: Mapping[str, Any], ratio: float | None) -> list[str]:
    """Numbers of a prompt, each a phrase."""
    facts = []
    if prompt["divergence_index"] is not None:
        at = prompt.get("deficit_index")
        later = "" if at in (None, prompt["divergence_index"]) else f" (largest, at token {at})"
        facts.append(f"deficit {_number(prompt['deficit'])}{later}")
        if prompt["golden_gap"] is not None:
            facts.append(f"golden's gap {_number(prompt['golden_gap'])}")
    if ratio is not None:
        facts.append(f"moved {_number(ratio)} × benign")
    then, now = prompt.get("score_golden"), prompt.get("score_now")
    if then is not None and now is not None and then != now:
        facts.append("answer right -> wrong" if then else "answer wrong -> right")
    return facts


def _data(prompt: Mapping[str, Any], envelope: Mapping[str, Any]) -> View:
    """What the script draws of a prompt once it is opened."""
    trace = prompt["trace"]
    length = min(map(len, trace.values()))
    pieces = _marked(prompt)
    return {
        "asked": _lines(prompt["prompt"], MOST_OF_A_TEXT),
        "golden": pieces[0],
        "now": pieces[1],
        "at": prompt["divergence_index"],
        "envelope": number(envelope.get("max_deficit")),
        **{name: [_token(text) for text in trace[name][:length]] for name in ("tokens", "runner_up")},
        **{
            name: [number(value) for value in trace[name][:length]]
            for name in ("logprob", "gap", "dlogp", "gap_now", "deficit")
        },
    }


def _marked(prompt: Mapping[str, Any]) -> tuple[list[str] | None, list[str] | None]:
    """Both whole texts, each parted before and after its first divergence."""
    golden, now = prompt.get("golden_full"), prompt.get("now_full")
    if golden is None or now is None:
        return (None if golden is None else [_lines(golden, 2 * MOST_OF_A_TEXT), "", ""]), None
    same = _common(golden, now)
    # The token that parts them began where they part, or a little before: tokens may begin alike.
    starts = [
        _start(text, around, same) for text, around in ((golden, prompt["golden_text"]), (now, prompt["now_text"]))
    ]
    start = min(starts)
    return _parted(golden, prompt["golden_text"], start), _parted(now, prompt["now_text"], start)


def _common(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _start(text: str, around: Mapping[str, str] | None, same: int) -> int:
    """Where the token that parts two texts begins: no later than they do, and at most a token's length before."""
    if not around or not around["token"]:
        return same
    follows = (around["token"] + around["after"][:20])[:MOST_OF_A_TOKEN]
    first = max(0, same - min(len(around["token"]), MOST_OF_A_TOKEN))
    return next((i for i in range(first, same + 1) if text.startswith(follows, i)), same)


def _parted(text: str, around: Mapping[str, str] | None, start: int) -> list[str]:
    token = around["token"] if around else ""
    end = start + len(token) if text.startswith(token, start) else min(start + 1, len(text))
    return [
        _lines(text[:start], MOST_OF_A_TEXT, end=True),
        _mark(text[start:end]) or "(the text ends)",
        _lines(text[end:], MOST_OF_A_TEXT),
    ]
