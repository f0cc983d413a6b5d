"""Projects to begin with; what takes several commands to make is made once and copied."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver

from . import browser as browsers
from .project import Project


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """An empty project."""
    return Project(tmp_path)


@pytest.fixture(scope="session")
def _accepted_once(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project(tmp_path_factory.mktemp("accepted")).suite().update().accept()


@pytest.fixture
def accepted(_accepted_once: Project, tmp_path: Path) -> Project:
    """A project whose suite `demo` has an accepted golden."""
    return _accepted_once.copied_to(tmp_path)


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    with browsers.chromium(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


@pytest.fixture
def browser(chromium: webdriver.Chrome, tmp_path: Path) -> browsers.Browser:
    return browsers.Browser(chromium, tmp_path)
