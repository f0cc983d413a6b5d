"""Markdown made from reports: the step summary of a CI job, and the body of a comment that replaces itself.

Whatever a model, a golden, a suite or a report says stands in code spans and fenced blocks, which no text can leave: it is on
one line, and the fence is longer than any run of backticks in it. All else is this module's own words, and numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..suite import MOVED
from ..text import inert
from . import terminal

SUMMARY_LIMIT = 1024 * 1024
"""Bytes of one step's summary; GitHub shows nothing of a larger one."""
COMMENT_LIMIT = 65_536
"""Characters of a comment; counted in bytes here, which are never fewer."""
MOST_ROWS, MOST_SUSPECTS, MOST_LINES, LONGEST = 100, 12, 12, 400
Suite = Mapping[str, Any]


def summary(suites: Sequence[Suite], *, limit: int = SUMMARY_LIMIT, where: str = "", run: str = "") -> str:
    """The step summary of some suites, worst first, within `limit` bytes.

    Args:
        suites: of one report or of several.
        limit: bytes that may be filled.
        where: the file that has the whole.
        run: the address of the CI run that keeps it.
    """
    return _within(limit, "", suites, (100, 30, 10, 3, 1, 0), _whole(where, run))


def comment(suites: Sequence[Suite], key: str, *, where: str = "", run: str = "") -> str:
    """The body of a comment on a pull request; `key` tells it from other comments of this kind."""
    return _within(COMMENT_LIMIT, marker(key), suites, (5, 2, 1, 0), _whole(where, run))


def marker(key: str) -> str:
    """The hidden first line by which a later run finds the comment it replaces."""
    return f"<!-- pytest-repro: {re.sub('[^A-Za-z0-9._]+', '-', key).strip('-')[:100] or 'check'} -->\n"


def broken_off(problems: Sequence[str], *, key: str | None = None, run: str = "") -> str:
    """What there is to say where a check broke off, or left no report."""
    first = marker(key) if key is not None else ""
    told = fenced(problems)
    return (
        f"{first}## pytest-repro: ERROR\n\nThe check did not come to its end, so this is not a verdict on the outputs. "
        f"Its log says more{f' ([this run]({run}))' if run else ''}.\n\n{told}\n"
    )


def _whole(where: str, run: str) -> str:
    kept = f"Everything that was seen: {code(where)}" if where else ""
    place = f"[this run]({run})" if run else ""
    return ", of ".join(part for part in (kept, place) if part)


def _within(limit: int, first: str, suites: Sequence[Suite], steps: Sequence[int], whole: str) -> str:
    """The most that fits: first fewer prompts are told in full, then fewer suites."""
    ordered = sorted(suites, key=lambda s: s["verdict"] != "fail")
    for texts in steps:
        found = _document(first, ordered, len(ordered), texts, whole)
        if len(found.encode()) <= limit:
            return found
    low, high = 0, len(ordered)  # no prompt's text fits any more: the most suites that do
    while low < high:
        middle = (low + high + 1) // 2
        fits = len(_document(first, ordered, middle, 0, whole).encode()) <= limit
        low, high = (middle, high) if fits else (low, middle - 1)
    return _document(first, ordered, low, 0, whole)


def _document(first: str, suites: Sequence[Suite], kept: int, texts: int, whole: str) -> str:
    blocks = [f"{first}## pytest-repro: {_title(suites)}", _overview(suites[:kept])]
    blocks += [block for suite in suites[:kept] if _speaks(suite) for block in _suite(suite, texts)]
    if left := len(suites) - kept:
        blocks.append(f"… and {left} more suites, which did not fit here.")
    return "\n\n".join([*blocks, *([whole] if whole else [])]) + "\n"


def _title(suites: Sequence[Suite]) -> str:
    failed = sum(suite["verdict"] == "fail" for suite in suites)
    counts = " · ".join(f"{n} {verdict}" for verdict, n in counted(suites).items() if n)
    return f"{'FAIL' if failed else 'PASS'}\n\n{failed} of {len(suites)} suites fail: {counts}"


def counted(suites: Sequence[Suite]) -> dict[str, int]:
    """Every verdict, best first, with the number of its prompts in all suites."""
    return {verdict: sum(s["counts"].get(verdict, 0) for s in suites) for verdict in reversed(terminal.ORDER)}


def _speaks(suite: Suite) -> bool:
    return bool(suite["verdict"] == "fail" or suite["counts"].keys() != {"identical"})


# --- a suite --------------------------------------------------------------------------------------------------------


def _overview(suites: Sequence[Suite]) -> str:
    rows = [
        (
            suite["verdict"].upper(), _name(suite), ", ".join(f"{n} {v}" for v, n in counted([suite]).items() if n) or "nothing",
            f"{number(suite['metrics'].get('accuracy_golden'))} → {number(suite['metrics'].get('accuracy_now'))}",
            f"{number(suite['metrics'].get('mean_abs_dlogp'))} ({number(suite['metrics'].get('benign_abs_dlogp'))})",
        )
        for suite in suites
    ]  # fmt: skip
    return _table(("", "suite", "prompts", "accuracy, %", "mean Δlogp (benign)"), rows)


def _name(suite: Suite) -> str:
    shard = f" shard {suite['shard']}" if suite["shard"] else ""
    return code(f"{suite['path']} [{suite['numerics']}]{shard}")


def _suite(suite: Suite, texts: int) -> Iterator[str]:
    yield f"### {suite['verdict'].upper()} {_name(suite)}"
    yield _against(suite)
    if suite["failures"]:
        yield "Fails because of " + _listed([code(rule) for rule in suite["failures"]])
    if failing := [c for c in suite["checks"] if c["status"] == "fail"]:
        yield fenced(line for check in failing for line in _check(check))
    yield from _prompts(terminal.worst_first(suite), texts)
    if suite["environment_diff"]:
        yield _environment(suite)
    if suite["localisation"]:
        yield fenced([f"where  {terminal.location_line(suite['localisation'])}"])
    if calm := [c for c in suite["checks"] if c["status"] == "pass" and c["name"] in ("compute", *MOVED)]:
        yield fenced(line for check in calm for line in _check(check))
    if suite["next_steps"]:
        yield "Next:\n\n" + fenced(map(_step, suite["next_steps"]))
    if suite["notes"]:
        yield fenced(f"note  {note}" for note in suite["notes"])


def _step(step: Mapping[str, str]) -> str:
    return f"{step['command']}   # {step['when']}" if step["when"] else step["command"]


def _against(suite: Suite) -> str:
    golden, asked = suite["golden"], len(suite["prompts"])
    count = f"{asked} prompts" if asked == suite["size"] else f"{asked} of {suite['size']} prompts"
    if not golden:
        return f"{count}, against no golden."
    recorded = f"{golden['name']}.golden ({str(golden.get('recorded'))[:10]}, {golden.get('engine')}, batch {golden.get('batch_size')})"
    return f"{count} against {code(recorded)}. Deficits up to {number(suite['envelope_deficit'])} nats are rounding."


def _check(check: Mapping[str, Any]) -> Iterator[str]:
    head, *rest = check["message"].split("\n")
    yield f"{check['name']:<10} {head}"
    yield from (f"{'':<10} {line}" for line in rest)


def _environment(suite: Suite) -> str:
    judged = [c for c in suite["environment_diff"] if c["cls"] != "information"]
    rows = [(code(c["field"]), code(_value(c["golden"])), code(_value(c["now"])), c["cls"]) for c in judged]
    equal = f"{suite['equal_fields']} other fields are equal."
    if not rows:
        return f"Environment: {equal}"
    return f"Environment, suspects first; {equal}\n\n" + _table(
        ("field", "golden", "now", ""), rows[:MOST_SUSPECTS], len(rows)
    )


def _value(value: Any) -> str:
    return "(not there)" if value is None else str(value)


# --- its prompts ----------------------------------------------------------------------------------------------------


def _prompts(prompts: list[Mapping[str, Any]], texts: int) -> Iterator[str]:
    if not prompts:
        return
    if terminal.all_alike(prompts):
        yield f"**{prompts[0]['verdict']}** of all {len(prompts)} prompts:\n\n" + fenced([prompts[0]["reason"]])
        return
    rows = [
        (
            p["verdict"], code(p["id"]), _position(p), number(p["deficit"]), number(p["golden_gap"]),
            f"{number(p['mean_abs_dlogp'])} ({number(p['benign_dlogp'])})", _score(p),
        )
        for p in prompts[:MOST_ROWS]
    ]  # fmt: skip
    header = ("", "prompt", "parts at token", "deficit", "golden's gap", "mean Δlogp (benign)", "answer")
    yield _table(header, rows, len(prompts))
    told = [block for p in prompts[:texts] for block in _texts(p)]
    yield from told
    if told and len(prompts) > texts:
        yield f"The texts of {len(prompts) - texts} more prompts are left out here."


def _position(p: Mapping[str, Any]) -> str:
    return "" if p["divergence_index"] is None else f"{digits(p['divergence_index'])} of {digits(p['tokens'])}"


def _score(p: Mapping[str, Any]) -> str:
    words = {True: "right", False: "wrong", None: "?"}
    then, now = p["score_golden"], p["score_now"]
    return "" if then is None else words[then] if now in (then, None) else f"{words[then]} → {words[now]}"


def _texts(p: Mapping[str, Any]) -> Iterator[str]:
    """Why, and both continuations as the lines of a diff."""
    lines = [f"# {p['reason']}"] if p["reason"] and p["verdict"] not in ("near_tie", "waived") else []
    if p["arbiter"]:
        lines.append(f"# {terminal.arbiter_line(p['arbiter'])}")
    for sign, name, texts in (("-", "golden", p["golden_text"]), ("+", "now   ", p["now_text"])):
        if texts:
            lines.append(f"{sign} {name}  … {texts['before'][-60:]}|{texts['token']}|{texts['after']}")
    if lines:
        yield f"**{p['verdict']}** {code(p['id'])}\n\n" + fenced(lines, "diff")


# --- Markdown -------------------------------------------------------------------------------------------------------


def code(text: str) -> str:
    """A code span that holds any text, in a table's cell as well."""
    # A bar ends a cell even in a code span, and the dialects disagree on how to escape it after a backslash.
    shown = inert(_cut(text, 120)).replace("|", "\\x7c")
    ticks = "`" * (_longest_run(shown) + 1)
    edge = " " if shown.startswith(("`", " ")) or shown.endswith(("`", " ")) else ""
    return f"{ticks}{edge}{shown}{edge}{ticks}" if shown.strip() else "`(blank)`"


def fenced(lines: Any, language: str = "text") -> str:
    """A fenced block that holds any lines; what is too much of them is cut."""
    shown = [inert(_cut(line, LONGEST)) for line in lines]
    if len(shown) > MOST_LINES:
        shown = [*shown[:MOST_LINES], f"… and {len(shown) - MOST_LINES} more lines"]
    ticks = "`" * max(3, _longest_run("\n".join(shown)) + 1)
    return "\n".join([f"{ticks}{language}", *shown, ticks])


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], of: int = 0) -> str:
    lines = [header, ["---"] * len(header), *rows]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return table if of <= len(rows) else f"{table}\n\n… and {of - len(rows)} more."


def _listed(items: list[str]) -> str:
    return "; ".join(items[:MOST_LINES]) + (f"; and {len(items) - MOST_LINES} more" if len(items) > MOST_LINES else "")


def number(value: float | None) -> str:
    """A number as a person reads it; a dash where there is none."""
    return "–" if value is None else f"{value:.3g}"


def digits(value: int | None) -> str:
    """A count, of a report that may hold any integer."""
    return "?" if value is None else str(value)[:12]
