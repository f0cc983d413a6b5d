from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pytest_repro import judging
from pytest_repro.errors import EngineError
from pytest_repro.fingerprint import Change
from pytest_repro.report import document, html
from pytest_repro.result import Check, PromptResult, Recording, Texts
from pytest_repro.text import inert
from pytest_repro.verdict import Verdict
from tests.unit.builders import SETTINGS, suite, suite_result
from tests.unit.reports import HOSTILE, parted, poisoned, report, same, suite_of, trace

ACTIVE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufe00-\ufeff\ud800-\udfff\U000e0000-\U000e0fff]"
)


class Page(HTMLParser):
    """A page as its elements: (name, attributes) in order, the text of each kind of element, and all of its text."""

    VOID = frozenset({"meta", "br", "input"})

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(source)
        self.close()
        assert self.inside == [], "every element is ended"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.texts.setdefault(tag, []).append("")
        if tag not in self.VOID:
            self.inside.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.inside.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self.inside):
            self.texts[tag][-1] += data

    @property
    def body(self) -> str:
        """What is read, each run of blanks as one."""
        return " ".join("".join(self.texts["body"]).split())

    @property
    def structure(self) -> list[tuple[str, tuple[str, ...]]]:
        """Elements with the names of their attributes; line breaks of messages aside."""
        return [(tag, tuple(attributes)) for tag, attributes in self.elements if tag != "br"]

    def with_class(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for _, attributes in self.elements if name in (attributes.get("class") or "").split()]

    def data(self) -> list[dict[str, Any]]:
        """What the script reads."""
        return [json.loads(text) for (_, a), text in zip(
            [e for e in self.elements if e[0] == "script"], self.texts["script"], strict=True) if a.get("type")]  # fmt: skip


def page(found: Mapping[str, Any]) -> Page:
    return Page(html.render(found))


ARBITER = {"finding": "candidate", "golden_distance": 0.5, "candidate_distance": 2.0, "p_value": 0.01}
WHOLE = suite_of(
    parted("p17", Verdict.DRIFT, deficit=0.84, deficit_index=9, reason="the deficit 0.84 exceeds the envelope 0.25", arbiter=ARBITER),
    parted("p03", score_now=False),
    same("p01", trace=trace(12)),
)  # fmt: skip


def test_what_is_first_is_what_is_read_first() -> None:
    text = page(report(WHOLE)).body
    order = [
        "FAIL golden/s [bf16]", "3 prompts against bf16.golden (2026-11-21, scripted 1.0, batch 4)", "observed: bf16",
        "drift 1", "near_tie 1", "identical 1", "unexplained 1 > max_unexplained 0", "divergent 2 > max_divergent 0",
        "What moved", "p17 (the worst) diverges at token 5 of 12", "deficit 0.84 (largest, at token 9)", "golden's gap 0.0625",
        "moved 1.12 × benign", "the deficit 0.84 exceeds the envelope 0.25", "now lies farther, so this build's compute changed",
        "golden … the eggs cost 12.", "first divergence: ⏎ dollars", "now", "first divergence: 17 or so",
        "Why", "Rounding cannot explain 1 prompt.", "Rounding explains the other 1 prompt that differs.",
        "batch_size 8 1", "torch 2.13.0 2.14.0", "What to do", "pytest --repro-check golden/s --repro-numerics fp32",
        "How far it moved", "0 of 507 beyond", "Accuracy, length", "40.6 % -> 37.5 %", "lost: p03", "not judged",
        "Notes", "unused in the golden: p99", "Prompts, the worst first", "p17", "Fails because unexplained 1", "p03", "p01",
        "Environment", "a" * 64,
    ]  # fmt: skip
    place = 0
    for words in order:
        assert words in text[place:], words
        place = text.index(words, place)


def test_a_script_gets_the_course_of_a_prompt() -> None:
    first, second, third = page(report(WHOLE)).data()
    course = trace(12, seed=sum(map(ord, "p17")), flip_at=5)
    assert first["at"] == 5 and first["envelope"] == 0.25
    assert first["tokens"][:6] == ["␣the", "␣eggs", "␣cost", "␣12", ".", "⏎"]
    for name in ("logprob", "gap", "dlogp", "gap_now", "deficit"):
        assert first[name] == course[name]
    assert first["golden"] == [" the eggs cost 12.", "⏎", " dollars She then buys the eggs"]
    assert first["now"][0] == first["golden"][0] and first["now"][1] == " 17"
    assert first["asked"] == "How much do the eggs of p17 cost?"
    assert (second["at"], third["at"], third["golden"], third["now"]) == (5, None, None, None)


@pytest.mark.parametrize(
    ("golden", "now", "around", "marked"),
    [
        ("cost 10 now", "cost 12 now", (" 10", " 12"), ("cost", " 10", " 12")),
        ("cost 10", "cost 10 more", ("(the text ends)", " more"), ("cost 10", "(the text ends)", " more")),
        ("alike", "alike", ("x", "y"), ("alike", "(the text ends)", "(the text ends)")),
        ("abc", "abd", ("?", "?"), ("ab", "c", "d")),
    ],
    ids=["tokens that begin alike", "one ends", "no difference", "tokens that are not in the text"],
)
def test_where_whole_texts_part(golden: str, now: str, around: tuple[str, str], marked: tuple[str, str, str]) -> None:
    prompt = parted(
        "p", golden_full=golden, now_full=now, golden_text=Texts("", around[0], ""), now_text=Texts("", around[1], "")
    )
    (data,) = page(report(suite_of(prompt))).data()
    assert (data["golden"][0], data["golden"][1], data["now"][1]) == marked
    assert data["now"][0] == data["golden"][0]


def test_a_text_that_was_not_generated_is_not_made_up() -> None:
    (data,) = page(report(suite_of(parted("p", now_full=None)))).data()
    assert data["now"] is None and data["golden"][0].startswith(" the eggs") and data["golden"][1:] == ["", ""]


def test_the_worst_prompt_is_open_and_first_and_the_others_follow() -> None:
    found = page(
        report(suite_of(same("a"), parted("near"), parted("worse", deficit=0.2), parted("drift", Verdict.DRIFT)))
    )
    prompts = found.with_class("prompt")
    assert [p["data-id"] for p in prompts] == ["drift", "worse", "near", "a"]
    assert [p["data-verdict"] for p in prompts] == ["drift", "near_tie", "near_tie", "identical"]
    assert ["open" in p for p in prompts] == [True, False, False, False]


def test_suites_that_pass_are_folded_and_last() -> None:
    good = suite_result(same("a"), path="golden/good")
    found = page(report(good, WHOLE))
    names = [tag for tag, attributes in found.elements if "suite" in (attributes.get("class") or "").split()]
    assert names == ["section", "details"]
    assert all("open" not in a for tag, a in found.elements if tag == "details" and a.get("class") == "suite")
    assert "1 of 2 suites fails" in found.body
    assert found.body.index("golden/s") < found.body.index("PASS golden/good")


def test_headings_are_in_order() -> None:
    for made in (report(WHOLE, suite_result(same("a"))), report(), report(suite_result(same("a")))):
        levels = [int(tag[1]) for tag, _ in page(made).elements if re.fullmatch("h[1-6]", tag)]
        assert levels[0] == 1 and levels.count(1) == 1
        assert all(after <= before + 1 for before, after in pairwise(levels))


def test_every_state_of_a_suite_has_a_page() -> None:
    blank = judging.replace(judging.blank(suite("a", "b"), "fp32", "fp32", None, ""), settings=SETTINGS)
    broken = page(report(judging.broken(blank, EngineError("out of memory", fix="a smaller batch"))))
    assert "error 2" in broken.body and "compute: " in broken.body and "a smaller batch" in broken.body
    assert "2 prompts could not be compared." in broken.body and "How far it moved" not in broken.body
    shard = page({**report(WHOLE), "suites": [{**report(WHOLE)["suites"][0], "shard": "2/3", "size": 9}]})
    assert "3 of 9 prompts" in shard.body and "shard 2/3" in shard.body and "merge --report" in shard.body
    recording = Recording("s", "golden/s", "bf16", "bf16.pending.jsonl", 3, 2, 1, 8, None, {"max_deficit": 0.25}, 1.0)
    recorded = page(document.of_session([], [document.of_recording(recording)]))
    assert (
        "candidates recorded" in recorded.body
        and "2 prompts changed; next: pytest-repro review golden/s" in recorded.body
    )
    assert "nothing was checked" in page(report()).body
    moved = suite_of(
        PromptResult("p", Verdict.DRIFT, "every token moved", "replay", 12, mean_abs_dlogp=0.5, benign_dlogp=0.01)
    )
    assert "p (the worst)" not in page(report(moved)).body and "p every token moved" in page(report(moved)).body
    unchecked = suite_of(same("a"), checks=(Check("golden", "fail", "was never reviewed\n  mend: review it"),))
    text = page(report(unchecked)).body
    assert "golden: was never reviewed" in text and "Every output is the golden's." in text


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        (
            [parted("a"), parted("b")],
            "Rounding explains all 2 prompts that differ. It explains a deficit of up to 0.25 nats",
        ),
        ([parted("a")], "Rounding explains the 1 prompt that differs."),
        (
            [parted("a", Verdict.DRIFT), parted("b"), parted("c")],
            "cannot explain 1 prompt. Rounding explains the other 2 prompts",
        ),
        ([parted("a", Verdict.WAIVED)], "1 prompt waived: FP32-class compute was observed."),
    ],
    ids=["near ties", "one", "drift", "waived"],
)
def test_why_it_differs_is_said_in_words(prompts: list[PromptResult], said: str) -> None:
    assert said in page(report(suite_of(*prompts))).body


def test_a_prompt_without_a_trace_says_so() -> None:
    bare = {"trace": None, "prompt": "", "golden_full": None, "now_full": None}
    found = page(report(suite_of(parted("p", **bare))))
    assert found.data() == [] and "No token-by-token trace was kept" in found.body
    assert "first divergence: 17 or so" in found.body


def test_long_values_are_short_at_first_and_whole_below() -> None:
    change = Change("model.weights", "identity", "gguf-sha256:" + "c" * 64, "x" * 100)
    text = page(report(suite_of(parted("p"), environment_diff=(change,)))).body
    assert "model.weights identity gguf-sha256:cccccccc… " + "x" * 47 + "…" in text
    assert "c" * 64 in text and "x" * 100 in text


# --- closed to the outside ------------------------------------------------------------------------------------------


def test_the_policy_allows_the_page_s_own_script_and_style_and_nothing_else() -> None:
    found = page(report(WHOLE))
    (policy,) = [a["content"] for _, a in found.elements if a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().partition(" ")[::2] for rule in str(policy).split(";"))
    (style,), script = found.texts["style"], found.texts["script"][-1]

    def digest(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    assert rules == {
        "default-src": "'none'", "style-src": digest(style), "script-src": digest(script), "base-uri": "'none'",
        "form-action": "'none'", "require-trusted-types-for": "'script'", "trusted-types": "'none'",
    }  # fmt: skip


def test_nothing_comes_from_elsewhere_and_nothing_runs_from_an_attribute() -> None:
    source = html.render(report(WHOLE))
    for tag, attributes in Page(source).elements:
        assert tag not in {"link", "img", "iframe", "object", "embed", "base", "form", "video", "audio"}
        for name, value in attributes.items():
            assert not name.startswith("on") and name not in {"src", "style", "srcset", "action"}, (tag, name)
            assert name != "href" or str(value).startswith("#")
    assert "@import" not in source and "innerHTML" not in source
    assert set(re.findall(r"url\(([^)]*)\)", source)) <= {"#s0-tokens-h", "#s0-prompts-h"}
    assert set(re.findall(r"https?://[^\"'\s<]*", source)) == {"http://www.w3.org/2000/svg"}


BENIGN = page(report(WHOLE)).structure


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_adds_no_element_and_stays_legible(name: str) -> None:
    text = HOSTILE[name]
    source = html.render(poisoned(report(WHOLE), text))
    assert not ACTIVE.search(source)
    assert len(source) < 2_000_000
    found = Page(source)
    assert found.structure == BENIGN, "the same elements and attributes as with harmless text"
    plain = inert(text[:60])
    assert sum(plain in "".join(cell.split("⏎")) or plain in cell for cell in found.texts["td"]) >= 3
    for data in found.data():
        assert not any(ACTIVE.search(piece) for piece in data["tokens"] + data["runner_up"] + [data["asked"]])
    if len(text) > 100_000:
        assert "characters left out]" in found.body


def test_a_report_with_absurd_numbers_still_has_a_page() -> None:
    made = report(WHOLE)
    made["suites"][0]["seconds"] = 1e300
    made["suites"][0]["prompts"][0].update(deficit=10**400, mean_abs_dlogp=float("nan"), benign_dlogp=float("inf"))
    made["suites"][0]["prompts"][0]["trace"].update(gap=[float("nan")] * 9, dlogp=[None] * 12)
    (first, *_) = [d for d in page(made).data() if d["gap"][0] is None]
    assert len(first["gap"]) == len(first["tokens"]) == 9
    assert "deficit unknown" in page(made).body


def test_it_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "new" / "report.html"
    html.write(file, report(WHOLE))
    assert file.read_text("utf-8") == html.render(report(WHOLE))
    assert [p.name for p in file.parent.iterdir()] == ["report.html"]


@pytest.mark.parametrize("most", [html._before, html._after, html._token, html._mark], ids=lambda f: f.__name__)
def test_what_is_cut_says_how_much(most: Callable[[str], str]) -> None:
    assert "[999," in most("x" * 1_000_000) and most("short") == "short"
