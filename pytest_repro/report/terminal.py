"""The terminal section of a suite: everything an engineer needs at night, worst first, and the command to run next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..text import inert

Line = tuple[str, str]
"""(text, style): style is "", "red", "yellow", "green" or "bold"."""

ORDER = ("error", "incomparable", "missing", "drift", "near_tie", "waived", "identical")
"""Verdicts, worst first."""
_STYLE = {
    "error": "red",
    "incomparable": "red",
    "missing": "red",
    "drift": "red",
    "near_tie": "yellow",
    "waived": "yellow",
}
_WITHOUT_TEXT = ("error", "incomparable", "missing")
MOST_PROMPTS = 10
MOST_SUSPECTS = 6


def title(suite: Mapping[str, Any]) -> str:
    """Heading of a suite's section."""
    shard = f" shard {suite['shard']}" if suite["shard"] else ""
    return inert(f"repro: {suite['path']} [{suite['numerics']}]{shard}")


def lines(suite: Mapping[str, Any], *, verbose: bool = False) -> Iterator[Line]:
    """The section of one suite. A suite that passed without a difference takes two lines."""
    # Names, paths, texts and messages come from goldens, suites and models: none of it may act.
    yield from ((inert(text), style) for text, style in _section(suite, verbose))


def _section(suite: Mapping[str, Any], verbose: bool) -> Iterator[Line]:
    yield from _head(suite)
    shown = worst_first(suite)
    yield from _same_reason(shown) if all_alike(shown) else _prompts(shown, verbose)
    differs = bool(shown) or suite["verdict"] == "fail"
    if differs:
        yield from _environment(suite, verbose)
    if suite["localisation"]:
        yield f"{'where':<13} {location_line(suite['localisation'])}", ""
    told = {p["reason"] for p in shown}
    for check in suite["checks"]:
        if any(reason and reason in check["message"] for reason in told):
            continue  # the cause that struck every prompt was told already
        loud = check["status"] == "fail" or (
            differs and check["status"] == "pass" and check["name"] in ("accuracy", "compute", "rounding")
        )
        if loud or verbose:
            mark = {"fail": "FAIL ", "skip": "", "pass": ""}[check["status"]]
            first, *rest = check["message"].split("\n")
            yield f"{check['name']:<13} {mark}{first}", "red" if mark else ""
            yield from ((f"{'':<13} {line}", "") for line in rest)
    for note in suite["notes"]:
        yield f"{'note':<13} {note}", ""
    for i, step in enumerate(suite["next_steps"]):
        when = f"   # {step['when']}" if step["when"] else ""
        yield f"{'next' if i == 0 else '':<13} {step['command']}{when}", "bold"


def worst_first(suite: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The prompts that are not identical, in the order in which a person should look at them."""
    return sorted(
        (p for p in suite["prompts"] if p["verdict"] != "identical"),
        key=lambda p: (ORDER.index(p["verdict"]), -(p["deficit"] if p["deficit"] is not None else float("inf"))),
    )


def _head(suite: Mapping[str, Any]) -> Iterator[Line]:
    golden, failed = suite["golden"], suite["verdict"] == "fail"
    against = ""
    if golden:
        against = f" against {golden['name']}.golden ({str(golden['recorded'])[:10]}, {golden['engine']}, batch {golden['batch_size']})"
    asked = len(suite["prompts"])
    count = f"{asked} prompts" if asked == suite["size"] else f"{asked} of {suite['size']} prompts"
    yield f"{'FAIL' if failed else 'PASS'}  {count}{against}, {suite['seconds']:.0f} s", "red" if failed else "green"
    if suite["shard"] and not asked:
        yield (
            f"      shard {suite['shard']} holds no batch, since there are fewer batches than shards: nothing to do",
            "",
        )
        return
    counts = " · ".join(f"{suite['counts'][v]} {v}" for v in reversed(ORDER) if suite["counts"].get(v))
    rules = "; ".join(rule for rule in suite["failures"] if rule not in counts.split(" · "))
    yield f"      {counts}" + (f"            {rules}" if rules else ""), ""
    if suite["shard"]:
        yield (
            f"      shard {suite['shard']}: rounding, accuracy, length and thresholds of the whole: pytest-repro merge --report",
            "",
        )
    moved = suite["metrics"].get("mean_abs_dlogp")
    if moved is not None and (failed or suite["counts"].keys() != {"identical"}):
        benign = suite["metrics"]["benign_abs_dlogp"]
        yield (
            f"      mean |Δlogp| {_number(moved)}, benign {_number(benign)}; deficits up to {_number(suite['envelope_deficit'])} "
            "are rounding",
            "",
        )


def all_alike(shown: list[Mapping[str, Any]]) -> bool:
    """Whether one cause struck every one of these prompts, so that it is told once."""
    return (
        len(shown) > 1 and all(p["verdict"] in _WITHOUT_TEXT for p in shown) and len({p["reason"] for p in shown}) == 1
    )


def _same_reason(shown: list[Mapping[str, Any]]) -> Iterator[Line]:
    """One cause that struck every prompt is told once."""
    first = shown[0]
    yield f"{first['verdict']:<13} all {len(shown)}: {first['reason']}", "red"


def _prompts(shown: list[Mapping[str, Any]], verbose: bool) -> Iterator[Line]:
    kept = shown if verbose else shown[:MOST_PROMPTS]
    for prompt in kept:
        yield from _prompt(prompt)
    if len(shown) > len(kept):
        yield f"{'':<13} … and {len(shown) - len(kept)} more: -v shows all, --repro-report-json FILE keeps all", ""


def prompt_lines(p: Mapping[str, Any]) -> Iterator[Line]:
    """One prompt: where it parts, by how much, and both continuations."""
    yield from ((inert(text), style) for text, style in _prompt(p))


def _prompt(p: Mapping[str, Any]) -> Iterator[Line]:
    style = _STYLE.get(p["verdict"], "")
    if p["divergence_index"] is None:
        yield f"{p['verdict']:<13} {p['id']}  {p['reason']}", style
        if p["arbiter"]:
            yield f"{'':<13} {arbiter_line(p['arbiter'])}", ""
        return
    gap = "" if p["golden_gap"] is None else f", golden's gap {_number(p['golden_gap'])}"
    deficit = "unknown" if p["deficit"] is None else _number(p["deficit"])
    later = "" if p["deficit_index"] in (None, p["divergence_index"]) else f" (largest, at token {p['deficit_index']})"
    yield (
        f"{p['verdict']:<13} {p['id']}  diverges at token {p['divergence_index']} of {p['tokens']}: deficit {deficit}{later}{gap}",
        style,
    )
    if p["verdict"] == "drift":
        yield f"{'':<13} {p['reason']}", ""
        if p["arbiter"]:
            yield f"{'':<13} {arbiter_line(p['arbiter'])}", ""
    for name, texts in (("golden", p["golden_text"]), ("now", p["now_text"])):
        if texts:
            yield (
                f"{'':<13} {name:<7} … {inert(texts['before'], 48)}|{texts['token']}|{texts['after']}",
                "",
            )


def arbiter_line(found: Mapping[str, Any]) -> str:
    """What the FP32 answer says of a drift."""
    golden, now = found["golden_distance"], found["candidate_distance"]
    sizes = f"golden {_number(golden)}, now {_number(now)} nats from the FP32 answer (LayerCast, same weights)"
    if found["finding"] == "rounding":
        return f"arbiter: {sizes}: equally near, as rounding leaves them"
    if found["finding"] == "candidate":
        return f"arbiter: {sizes}: now lies farther, so this build's compute changed"
    if found["finding"] == "undecided":
        return f"arbiter: {sizes}: too few tokens to tell"
    return f"arbiter: {sizes}: the golden lies farther, so the model itself changed"


def location_line(found: Mapping[str, Any]) -> str:
    """Where in the model a drift begins, or why that cannot be said."""
    sizes = ""
    if found["distance"] is not None and found["allowed"]:
        sizes = f": moved {_number(found['distance'])}, rounding explains {_number(found['allowed'])}"
    of = f" ({found['compared']} places compared)"
    return f"{found['module'] or 'not localised'}: {found['finding']}{sizes}{of}"


def _environment(suite: Mapping[str, Any], verbose: bool) -> Iterator[Line]:
    changes = [c for c in suite["environment_diff"] if verbose or c["cls"] != "information"]
    if not changes:
        if suite["golden"]:
            yield f"{'environment':<13} {suite['equal_fields']} fields are equal: no suspect there", ""
        return
    kept = changes if verbose else changes[:MOST_SUSPECTS]
    width = max(len(c["field"]) for c in kept)
    for i, change in enumerate(kept):
        values = f"{_short(change['golden'])} -> {_short(change['now'])}"
        tail = f"        suspects first; {suite['equal_fields']} other fields are equal" if i == 0 else ""
        identity = "   (identity)" if change["cls"] == "identity" else ""
        yield f"{'environment' if i == 0 else '':<13} {change['field']:<{width}}  {values}{identity}{tail}", ""
    if len(changes) > len(kept):
        yield f"{'':<13} … and {len(changes) - len(kept)} more", ""


def _short(value: Any) -> str:
    text = "(not there)" if value is None else inert(str(value))
    for prefix in ("gguf-sha256:", "sha256:"):
        if text.startswith(prefix):
            return text[: len(prefix) + 8] + "…"
    return text if len(text) <= 48 else text[:47] + "…"


def _number(value: float) -> str:
    return f"{value:.3g}"


def recording(r: Mapping[str, Any]) -> Iterator[Line]:
    """A candidate that was recorded."""
    yield from ((inert(text), style) for text, style in _recording(r))


def _recording(r: Mapping[str, Any]) -> Iterator[Line]:
    changed = "nothing to compare with" if r["changed"] is None else f"{r['changed']} prompts changed"
    accuracy = "" if r["accuracy"] is None else f", accuracy {r['accuracy']:.1f} %"
    yield f"recorded  {r['prompts']} prompts as {r['golden']}: {changed}{accuracy}, {r['seconds']:.0f} s", "yellow"
    if r["cut"]:
        yield f"          {r['cut']} of {r['prompts']} answers were cut at max_new_tokens = {r['max_new_tokens']}", ""
    noise = r["noise"]
    yield (
        f"          benign noise: mean |Δlogp| {noise['mean_abs_dlogp']:.2g}, largest change of a gap {noise['max_deficit']:.2g}",
        "",
    )
    if r["shard"]:
        yield f"next      pytest-repro merge {r['path']}   # once the other shards are recorded", "bold"
        return
    yield f"next      pytest-repro review {r['path']}", "bold"
