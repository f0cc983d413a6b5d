"""Chromium, as the tests of the HTML report drive it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait
from selenium_axe_python import Axe

from pytest_repro.report import html

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
HEIGHT = 800
SIGHTS = [(width, scheme) for width in (1280, 400) for scheme in ("light", "dark")]


class Browser:
    """Chromium with one page, and what it logged since the page was opened."""

    def __init__(self, driver: webdriver.Chrome, folder: Path) -> None:
        self.driver, self.folder = driver, folder
        self.url = ""

    def open(self, found: dict[str, Any], *, width: int = 1280, scheme: str = "light", scripts: bool = True) -> Browser:
        """Render a report and open it."""
        file = self.folder / "report.html"
        file.write_text(html.render(found), "utf-8")
        return self.open_file(file, width=width, scheme=scheme, scripts=scripts)

    def open_file(self, file: Path, *, width: int = 1280, scheme: str = "light", scripts: bool = True) -> Browser:
        """Open a page of that width, in light or dark."""
        metrics = {"width": width, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        self.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not scripts})
        self.driver.get("about:blank")
        for log in ("browser", "performance"):
            self.driver.get_log(log)
        self.url = file.as_uri()
        self.driver.get(self.url)
        return self

    def js(self, script: str, *arguments: Any) -> Any:
        """The value of a script that runs in the page."""
        return self.driver.execute_script(script, *arguments)

    def all(self, selector: str) -> list[Any]:
        """Elements."""
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> Any:
        """The first element."""
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def press(self, *keys: str) -> None:
        """Keys, to what has the focus."""
        self.driver.switch_to.active_element.send_keys(*keys)

    def drawn(self, selector: str) -> None:
        """Wait until so much is there."""
        WebDriverWait(self.driver, 60).until(lambda _: self.all(selector))

    def open_all(self) -> None:
        """Open every <details>, also those that appear on opening."""
        while self.js(
            "const shut = [...document.querySelectorAll('details:not([open])')]; shut.forEach(d => d.open = true); return shut.length"
        ):
            self.js("return new Promise(done => setTimeout(done, 50))")

    def quiet(self) -> None:
        """Nothing on the console, and no request but the page's own."""
        assert self.driver.get_log("browser") == []
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        assert asked == [self.url]

    def first_divergence_is_seen(self, width: int) -> None:
        """The first divergence is marked in both texts, without scrolling."""
        golden, now = self.all(".moved mark")[:2]
        for mark in (golden, now):
            box = mark.rect
            assert mark.is_displayed() and box["x"] > 0 and box["x"] + box["width"] <= width
            assert box["y"] > 0 and box["y"] + box["height"] <= HEIGHT, "without scrolling"
        assert golden.rect["y"] < now.rect["y"]

    def accessible(self) -> None:
        """axe-core finds nothing in the page as it is shown."""
        axe = Axe(self.driver)
        axe.inject()
        assert self.js("return axe.version").startswith("4.")
        found = axe.run()
        assert len(found["passes"]) > 20
        assert [(v["impact"], v["id"], v["nodes"][0]["html"]) for v in found["violations"]] == []


@contextmanager
def chromium(folder: Path) -> Iterator[webdriver.Chrome]:
    """A running Chromium with a profile of its own."""
    absent = [str(path) for path in (CHROMIUM, DRIVER) if not path.exists()]
    if absent:
        pytest.fail(f"{' and '.join(absent)} not there. mend: .ci/install_browser", pytrace=False)
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={folder}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    driver.set_script_timeout(300)  # axe looks at every element's colours
    try:
        yield driver
    finally:
        driver.quit()
