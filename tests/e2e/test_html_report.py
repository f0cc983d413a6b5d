"""The HTML report in a real browser: what is seen first, what is drawn, what it may not do, and who can use it."""

from __future__ import annotations

from typing import Any

import pytest
from selenium import webdriver
from selenium.common.exceptions import JavascriptException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from pytest_repro.report import html
from pytest_repro.text import inert
from pytest_repro.verdict import Verdict
from tests.unit.builders import suite_result
from tests.unit.reports import HOSTILE, large, parted, poisoned, report, same, suite_of, trace

from .browser import HEIGHT, SIGHTS, Browser
from .project import DRIFT, Project

ARBITER = {"finding": "golden", "golden_distance": 2.0, "candidate_distance": 0.5, "p_value": 0.01}
DRIFTING = suite_of(
    parted(
        "p17", Verdict.DRIFT, tokens=96, at=41, reason="the deficit 0.84 exceeds the envelope 0.25", arbiter=ARBITER
    ),
    parted("p20"),
    parted("p21"),
    same("p40", trace=trace(12)),
    same("p41"),
)
WHOLE = report(DRIFTING, suite_result(same("a", trace=trace(8)), path="golden/good"))


# --- what is seen ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "scheme"), SIGHTS)
def test_the_first_divergence_is_on_the_first_screen(browser: Browser, width: int, scheme: str) -> None:
    browser.open(WHOLE, width=width, scheme=scheme)
    browser.first_divergence_is_seen(width)
    rules = browser.one(".rules")
    assert (
        rules.is_displayed()
        and rules.rect["y"] < browser.one(".moved mark").rect["y"]
        and "max_unexplained 0" in rules.text
    )
    ground = browser.js("return getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    browser.quiet()


@pytest.mark.parametrize(("width", "scheme"), SIGHTS)
def test_everybody_can_use_it(browser: Browser, width: int, scheme: str) -> None:
    """axe-core finds nothing, and nothing is wider than the page, with all that can be opened open."""
    browser.open(WHOLE, width=width, scheme=scheme)
    for _ in range(2):
        assert browser.js("return document.documentElement.scrollWidth") <= width
        browser.js("document.querySelectorAll('.filter [type=checkbox]:not(:checked)').forEach(c => c.click())")
        browser.open_all()
    assert len(browser.all(".course > .plotted svg")) == 5
    browser.quiet()
    browser.accessible()


def test_a_margin_plot_shows_the_envelope_and_the_divergence(browser: Browser) -> None:
    browser.open(WHOLE)
    plot = browser.one(".course .plotted svg")
    band, parting, flip = (plot.find_element(By.CSS_SELECTOR, s) for s in (".band", ".parting", ".flip"))
    x = parting.rect["x"]
    assert plot.rect["x"] + 0.40 * plot.rect["width"] < x < plot.rect["x"] + 0.50 * plot.rect["width"], "token 41 of 96"
    assert abs(flip.rect["x"] + flip.rect["width"] / 2 - x) < 2
    assert band.rect["y"] < flip.rect["y"] < band.rect["y"] + band.rect["height"], "0.125 lies within 0.25"
    described = browser.js("return arguments[0].querySelector('desc').textContent", plot)
    assert (
        "96 tokens" in described
        and "The first divergence is at token 41" in described
        and "best now at 1, by 0.125" in described
    )
    assert plot.find_elements(By.CSS_SELECTOR, ".now-line, .then-line") != []
    row = browser.one(".tokens tr.here")
    course = trace(96, seed=sum(map(ord, "p17")), flip_at=41)
    p = 100 * 2.718281828459045 ** course["logprob"][41]
    told = " ".join(row.text.split())
    assert told.startswith(f"41 ␣eggs ◀ first divergence ▼ another is best, by 0.125 {p:.3g} % → ")
    assert "0.0625 → −0.125" in told


@pytest.mark.parametrize(
    ("gap", "said"), [(0.125, "a near tie, which the two round differently"), (3.0, "suspect what only decoding has")]
)
def test_decoding_that_parts_where_the_replay_does_not_is_told(browser: Browser, gap: float, said: str) -> None:
    course = trace(12, flip_at=5)
    course["gap"][5], course["gap_now"][5], course["deficit"][5] = gap, gap, 0.0
    browser.open(report(suite_of(parted("p", trace=course))))
    text = browser.one(".course").text
    assert "Decoding parted at token 5" in text and said in text


def test_the_plot_is_drawn_anew_for_another_width(browser: Browser) -> None:
    browser.open(WHOLE)
    wide = browser.one(".plotted svg").rect["width"]
    size = {"width": 400, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    WebDriverWait(browser.driver, 60).until(lambda _: browser.one(".plotted svg").rect["width"] < 400 < wide)
    last = browser.js(
        "return Math.max(...[...document.querySelectorAll('.plotted svg *')].map(e => e.getBoundingClientRect().right))"
    )
    assert last <= 400


def test_whole_texts_have_their_divergence_marked(browser: Browser) -> None:
    browser.open(WHOLE)
    browser.open_all()
    golden, now = browser.all(".prompt:first-child .both .whole")
    assert [e.find_element(By.CSS_SELECTOR, "mark").text.split(":")[-1].strip() for e in (golden, now)] == [
        "eggs",
        "17",
    ]
    same_part = [e.find_element(By.CSS_SELECTOR, ".same").text for e in (golden, now)]
    assert same_part[0] == same_part[1] and same_part[0].startswith(" the eggs cost 12.⏎\n dollars")


# --- what can be done -----------------------------------------------------------------------------------------------


def shown(browser: Browser) -> list[str]:
    return [p.get_attribute("data-id") for p in browser.all(".prompt") if p.is_displayed()]


def test_it_is_used_by_keyboard(browser: Browser) -> None:
    browser.open(WHOLE)
    seen: list[str] = []
    for _ in range(60):
        browser.press(Keys.TAB)
        active = browser.driver.switch_to.active_element
        if active.tag_name == "body":
            break
        outline = browser.js("return getComputedStyle(arguments[0]).outlineStyle", active)
        assert outline not in ("none", ""), f"the focus is seen on {active.tag_name} {active.text}"
        seen.append(f"{active.tag_name} {active.get_attribute('value') or ' '.join(active.text.split())}")
        if active.get_attribute("value") == "identical":
            before = shown(browser)
            browser.press(Keys.SPACE)
            assert len(shown(browser)) == len(before) + 2 and "5 of 5 shown" in browser.one(".filter output").text
            browser.press(Keys.SPACE)
            assert shown(browser) == before
        if active.get_attribute("type") == "range":
            browser.press(Keys.ARROW_RIGHT)
            assert browser.one(".readout").text.startswith("42: golden")
            browser.press(Keys.HOME)
            assert browser.one(".readout").text.startswith("0: golden")
        if active.tag_name == "summary" and "p20" in active.text:
            browser.press(Keys.ENTER)
            browser.drawn(f"#{active.find_element(By.XPATH, '..').get_attribute('id')} .plotted svg")
            browser.press(Keys.ENTER)
    order = [
        "a p17, token by token", "summary The same as a table", "input drift", "input near_tie", "input identical",
        "summary ▲ drift p17 diverges at token 41 of 96", "summary What was asked", "summary Whole texts",
        "summary ≈ near_tie p20 diverges at token 5 of 12", "summary ✔ PASS golden/good [bf16]",
    ]  # fmt: skip
    places = [seen.index(name) for name in order]
    assert places == sorted(places)
    browser.quiet()


def test_the_list_is_filtered_by_verdict_and_by_name(browser: Browser) -> None:
    browser.open(WHOLE)
    assert shown(browser) == ["p17", "p20", "p21"], "what is identical is hidden at first"
    browser.one(".filter input[value=near_tie]").click()
    assert shown(browser) == ["p17"] and browser.one(".filter output").text == "1 of 5 shown"
    browser.one(".filter input[value=identical]").click()
    browser.one(".filter input[type=search]").send_keys("P4")
    assert shown(browser) == ["p40", "p41"]


def test_a_link_opens_the_prompt_that_it_names(browser: Browser) -> None:
    browser.open(WHOLE)
    browser.one(".filter input[value=drift]").click()
    prompt = browser.one(".prompt")
    assert not prompt.is_displayed()
    browser.one(".moved a").click()
    WebDriverWait(browser.driver, 60).until(lambda _: prompt.is_displayed())
    assert "p17" in browser.driver.switch_to.active_element.text
    assert -1 < browser.js("return arguments[0].getBoundingClientRect().top", prompt) < HEIGHT


def test_the_essentials_need_no_script(browser: Browser) -> None:
    browser.open(WHOLE, scripts=False)
    assert "Without JavaScript" in browser.one("noscript").text
    assert len(shown(browser)) == 5 and not browser.one(".filter").is_displayed()
    assert [m.text.split(":")[-1].strip() for m in browser.all(".moved mark")] == ["eggs", "17"]
    assert browser.all(".pair .plot .bar") != [] and browser.one(".checks").is_displayed()
    browser.all(".prompt > summary")[1].click()
    assert browser.all(".prompt .texts mark")[2].is_displayed()


# --- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prompts", "tokens", "most"), [(64, 96, 2_000_000), (1319, 512, 10_000_000)])
def test_large_reports(browser: Browser, prompts: int, tokens: int, most: int) -> None:
    browser.open(large(prompts, tokens))
    assert (browser.folder / "report.html").stat().st_size < most
    assert len(browser.all(".prompt")) == prompts
    differs = -(-prompts // 2)
    assert browser.one(".filter output").text == f"{differs} of {prompts} shown"
    browser.one(".filter input[value=identical]").click()
    assert browser.one(".filter output").text == f"{prompts} of {prompts} shown"
    browser.all(".prompt > summary")[1].click()
    browser.drawn(".prompt:nth-child(2) .plotted svg")
    assert len(browser.all(".plotted svg")) == 2, "only what is open is drawn"
    browser.one(".prompt:nth-child(2) .course > details:last-child summary").click()
    browser.drawn(f".prompt:nth-child(2) .course > details:last-child tbody tr:nth-child({tokens})")
    assert browser.js("return document.documentElement.scrollWidth") <= 1280
    browser.quiet()


# --- what it may not do ---------------------------------------------------------------------------------------------


def elements(browser: Browser) -> dict[str, int]:
    """Kinds of element in the page, and how many."""
    counted: dict[str, int] = browser.js(
        "const n = {}; for (const e of document.querySelectorAll('*')) n[e.localName] = (n[e.localName] || 0) + 1; delete n.br; return n"
    )
    return counted


def unbroken(text: str) -> str:
    """Text without the signs of its blanks and breaks: whole texts show them otherwise than tokens, and break lines first."""
    return text.replace("⏎", "").replace("\n", "").replace("␣", " ").replace(":\\x3a", "::")


def alone() -> dict[str, Any]:
    return report(suite_of(parted("p", Verdict.DRIFT, arbiter=ARBITER), same("q", trace=trace(12))))


@pytest.fixture(scope="module")
def harmless(chromium: webdriver.Chrome, tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    browser = Browser(chromium, tmp_path_factory.mktemp("harmless")).open(poisoned(alone(), "harmless words"))
    browser.open_all()
    return elements(browser)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_does_nothing(browser: Browser, harmless: dict[str, int], name: str) -> None:
    text = HOSTILE[name]
    browser.open(poisoned(alone(), text))
    browser.open_all()  # an open dialog would raise here
    assert browser.js("return window.owned") is None
    assert browser.driver.title == "FAIL · pytest-repro report" and browser.driver.current_url == browser.url
    assert elements(browser) == harmless
    for place in (".moved .t", "section > ul li", ".tokens td .t", ".whole"):
        assert unbroken(inert(text[:30])) in unbroken(browser.one(place).get_attribute("textContent")), place
    assert browser.js("return document.documentElement.scrollWidth") <= 1280
    browser.quiet()


def test_the_policy_is_enforced(browser: Browser) -> None:
    """What would run if something were injected all the same."""
    browser.open(WHOLE)
    with pytest.raises(JavascriptException, match="TrustedHTML"):
        browser.js("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=window.owned=1>')")
    browser.js(
        "const b = document.createElement('button'); b.id = 'b'; b.setAttribute('formaction', 'https://example.org'); document.body.append(b)"
    )
    refused = browser.js("return fetch('https://example.org').then(() => 'sent', () => 'refused')")
    assert refused == "refused"
    assert any("Content Security Policy" in entry["message"] for entry in browser.driver.get_log("browser"))
    assert browser.js("return window.owned") is None


# --- as pytest writes it --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["alone", "two workers"])
def test_pytest_writes_it(browser: Browser, accepted: Project, workers: tuple[str, ...]) -> None:
    result = accepted.flip("a", DRIFT).check(
        "--repro-report-html", "out/r.html", "--repro-report-json", "r.json", *workers
    )
    assert result.rc == 1 and "repro: report written to out/r.html" in result.out
    assert (accepted.root / "out" / "r.html").read_text("utf-8") == html.render(accepted.json("r.json"))
    browser.open_file(accepted.root / "out" / "r.html")
    assert "golden/demo" in browser.one("h2").text and browser.one(".moved .badge").text == "▲ drift"
    assert browser.one(".prompt").get_attribute("data-id") == "a"
    browser.quiet()


def test_a_folder_in_the_report_s_place_is_told(accepted: Project) -> None:
    result = accepted.check("--repro-report-html", "golden")
    assert result.rc == 4 and "--repro-report-html golden: that is a folder; name a file in it" in result.err
