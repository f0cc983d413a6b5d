"""Shared by all tests: nothing of the user's environment may decide a verdict."""

from __future__ import annotations

import pytest

pytest_plugins = ["pytester"]


@pytest.fixture(autouse=True)
def _not_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that want CI set it themselves; these tests run in CI too."""
    for name in ("CI", "GITHUB_ACTIONS", "TF_BUILD", "JENKINS_URL", "TEAMCITY_VERSION", "BUILDKITE"):
        monkeypatch.delenv(name, raising=False)
