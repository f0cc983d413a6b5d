"""Shared by all tests: nothing of the user's environment may decide a verdict."""

from __future__ import annotations

import os
import signal

import pytest

# Before torch is loaded: threads that wait must not spin, since the workers of `-n 2` share the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# A pytest that a test starts is no worker of this one.
for _name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_XDIST_TESTRUNUID"):
    os.environ.pop(_name, None)

# A job in the background ignores Ctrl-C, and so would every process that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ["pytester"]


@pytest.fixture(autouse=True)
def _not_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that want CI set it themselves; these tests run in CI too."""
    for name in ("CI", "GITHUB_ACTIONS", "TF_BUILD", "JENKINS_URL", "TEAMCITY_VERSION", "BUILDKITE"):
        monkeypatch.delenv(name, raising=False)
