"""Suites in shards: parts of a golden merged into what one piece would have been, and checks judged as a whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .project import DRIFT, NEAR_TIE, Project, Result

NAMES = [f"p{i:02}" for i in range(1, 11)]
TOKENS = {name: [100 * i + k for k in range(3 + i % 3)] for i, name in enumerate(NAMES, 1)}
ANSWERS = {name: str(TOKENS[name][-1]) for name in NAMES}
SHARDS = {"1/3": ["p01", "p02", "p07", "p08"], "2/3": ["p03", "p04", "p09", "p10"], "3/3": ["p05", "p06"]}
PARTS = [f"bf16.{i}of3.pending.jsonl" for i in (1, 2, 3)]


def begun(root: Path) -> Project:
    """Five batches of two; every prompt has numbers of its own, so that means differ in their last bits."""
    project = Project(root).suite(TOKENS, answers=ANSWERS)
    numbers: dict[str, Any] = {
        name: {"logprob": [-0.1 * i - 0.01 * k for k in range(len(TOKENS[name]))]} for i, name in enumerate(NAMES, 1)
    }
    return project.script(**numbers)


@pytest.fixture(scope="session")
def _parts(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = begun(tmp_path_factory.mktemp("parts"))
    for shard in SHARDS:
        project.update("--repro-shard", shard)
    return project


@pytest.fixture(scope="session")
def _whole(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return begun(tmp_path_factory.mktemp("whole")).update()


@pytest.fixture
def parts(_parts: Project, tmp_path: Path) -> Project:
    """Three parts are pending."""
    return _parts.copied_to(tmp_path)


@pytest.fixture
def accepted_whole(_whole: Project, tmp_path: Path) -> Project:
    """The same suite with a golden that was recorded in one piece, and accepted."""
    return _whole.copied_to(tmp_path).accept()


def merged_reports(project: Project, *args: str) -> tuple[list[Result], Result]:
    """Each shard's run, and the merge of their reports."""
    runs = [project.check("--repro-shard", shard, "--repro-report-json", f"{shard[0]}.json", *args) for shard in SHARDS]
    return runs, project.cli("merge", "--report", "all.json", "3.json", "1.json", "2.json")


# --- goldens --------------------------------------------------------------------------------------------------------


def test_parts_merge_into_the_golden_of_one_piece(parts: Project, _whole: Project) -> None:
    assert sorted(p.name for p in parts.folder.glob("*.pending.jsonl")) == PARTS
    lines = [json.loads(line)["id"] for line in (parts.folder / PARTS[1]).read_text().splitlines()[1:]]
    assert lines == SHARDS["2/3"], "batch k is in shard k mod n + 1"

    merged = parts.cli("merge", "golden/demo")
    assert merged.rc == 0, merged.text
    assert "from 3 parts" in merged.out
    assert "pytest-repro review golden/demo" in merged.out
    assert not list(parts.folder.glob("*of3*"))

    assert (parts.folder / "bf16.pending.safetensors").read_bytes() == (
        _whole.folder / "bf16.pending.safetensors"
    ).read_bytes()
    texts = [(p.folder / "bf16.pending.jsonl").read_text().split("\n") for p in (parts, _whole)]
    assert texts[0][1:] == texts[1][1:]
    one, other = (json.loads(text[0]) for text in texts)
    assert len(one["candidate"].pop("parts")) == 3
    for header in (one, other):
        header.pop("digest")
        header["fingerprint"].pop("time")
    assert one == other

    parts.accept()
    assert parts.check().rc == 0


def test_a_part_waits_for_merge_and_nothing_else(parts: Project) -> None:
    before = parts.golden_files()
    listed = parts.cli("pending")
    assert listed.rc == 1
    assert "4 prompts; this is a part, 1 of 3: pytest-repro merge first" in listed.out
    assert "pytest-repro merge golden" in listed.out
    assert [row["part"] for row in json.loads(parts.cli("pending", "--as-json").out)] == list(SHARDS)
    assert "this is a part, 2 of 3: pytest-repro merge first" in parts.cli("diff").out
    for args in (
        ["accept", "golden", "--all", "--reason", "x"],
        ["accept", f"golden/demo/{PARTS[0]}", "--reason", "x"],
        ["review"],
    ):
        refused = parts.cli(*args)
        assert refused.rc == 2
        assert "this is a part, 1 of 3: pytest-repro merge first" in refused.err
    unmerged = parts.check()
    assert unmerged.rc == 1
    assert "pytest-repro merge golden/demo   # parts of a candidate wait" in unmerged.out
    assert parts.golden_files() == before
    assert parts.cli("reject", f"golden/demo/{PARTS[0]}").rc == 0
    assert sorted(p.name for p in parts.folder.glob("*.pending.jsonl")) == PARTS[1:]


def test_an_interrupted_merge_is_mended_by_repeating_it(parts: Project, tmp_path: Path) -> None:
    """Killed after the merged candidate stood, with one part removed."""
    halfway = parts.copied_to(tmp_path / "halfway")
    assert parts.cli("merge", "golden").rc == 0
    for name in ("bf16.pending.jsonl", "bf16.pending.safetensors"):
        halfway.write(f"golden/demo/{name}", (parts.folder / name).read_bytes())
    for file in halfway.folder.glob("bf16.1of3.*"):
        file.unlink()
    again = halfway.cli("merge", "golden")
    assert again.rc == 0, again.text
    assert halfway.golden_files() == parts.golden_files()


def test_a_part_that_is_missing_is_named(parts: Project) -> None:
    for file in parts.folder.glob("bf16.2of3.*"):
        file.unlink()
    before = parts.golden_files()
    refused = parts.cli("merge", "golden/demo")
    assert refused.rc == 2
    assert "parts are missing: 2/3" in refused.err
    assert "--repro-shard 2/3" in refused.err
    assert parts.golden_files() == before


def test_a_part_that_was_edited_is_refused(parts: Project) -> None:
    file = parts.folder / PARTS[2]
    file.write_text(file.read_text().replace('"tokens": [500', '"tokens": [501'))
    before = parts.golden_files()
    refused = parts.cli("merge", "golden/demo")
    assert refused.rc == 2
    assert "edited by hand" in refused.err
    assert parts.golden_files() == before


def test_a_part_under_another_parts_name_is_refused(parts: Project) -> None:
    for part in ("jsonl", "safetensors"):
        (parts.folder / f"bf16.1of3.pending.{part}").replace(parts.folder / f"bf16.2of3.pending.{part}")
    refused = parts.cli("merge", "golden/demo")
    assert refused.rc == 2
    assert "the file's name says bf16, part 2 of 3, its content bf16, part 1 of 3" in refused.err


def test_parts_of_other_settings_are_refused_with_the_field(parts: Project) -> None:
    parts.update("--repro-shard", "1/3", "--repro-batch-size", "3")
    before = parts.golden_files()
    refused = parts.cli("merge", "golden/demo")
    assert refused.rc == 2
    assert "batch_size: 3 in 1/3 and 2 in 2/3, 3/3" in refused.err
    assert parts.golden_files() == before


def test_nothing_to_merge(accepted_whole: Project) -> None:
    refused = accepted_whole.cli("merge", "golden")
    assert refused.rc == 2
    assert "no part of a golden is pending" in refused.err
    assert accepted_whole.cli("merge", "nowhere").rc == 2


# --- checks ---------------------------------------------------------------------------------------------------------


SAMPLED = {"method", "decoded_dgap"}
"""Which prompts are decoded beside the doubted ones is drawn from what a run holds."""


@pytest.mark.parametrize("case", ["same", "moved", "answers", "lengths"])
def test_a_check_in_shards_is_judged_as_in_one_piece(accepted_whole: Project, case: str) -> None:
    project, args = accepted_whole, ["--repro-threshold", "max_divergent=2", "--repro-threshold", "max_unexplained=1"]
    if case == "moved":  # one in each shard: none has more than two, all together have
        project.flip("p01", NEAR_TIE).flip("p03", NEAR_TIE).flip("p06", DRIFT)
    if case == "answers":
        args = ["--repro-threshold", "max_divergent=10", "--repro-method", "decode"]
        for name in NAMES[:6]:
            project.flip(name, NEAR_TIE, at=len(TOKENS[name]) - 1)
    if case == "lengths":
        args = ["--repro-threshold", "max_divergent=10", "--repro-threshold", "max_unexplained=10"]
        for name in NAMES[:4]:
            project.script(**{name: {"tokens": TOKENS[name][:1]}})
    whole = project.check("--repro-report-json", "whole.json", *args)
    assert whole.rc == (0 if case == "same" else 1), whole.text
    runs, merged = merged_reports(project, *args)
    assert merged.rc == whole.rc, merged.text
    assert [run.rc for run in runs] == [0, 0, 0], "no shard alone is beyond a threshold"
    (one,), (other,) = project.json("whole.json")["suites"], project.json("all.json")["suites"]
    for name in ("verdict", "metrics", "failures", "counts", "checks", "size", "golden", "thresholds", "next_steps"):
        assert one[name] == other[name], name
    assert [p["id"] for p in other["prompts"]] == NAMES
    for mine, theirs in zip(one["prompts"], other["prompts"], strict=True):
        assert {k: v for k, v in mine.items() if k not in SAMPLED} == {
            k: v for k, v in theirs.items() if k not in SAMPLED
        }
    head = next(line for line in whole.out.splitlines() if line.startswith(("PASS", "FAIL")))
    assert head.rsplit(",", 1)[0] in merged.out, "the terminal section of a run"


def test_a_shard_has_its_own_prompts_and_says_what_it_leaves(accepted_whole: Project) -> None:
    result = accepted_whole.check("--repro-shard", "3/3", "-v", "-rs", "--repro-report-json", "r.json")
    assert result.rc == 0, result.text
    outcomes = {name.rsplit("::", 1)[1]: outcome for name, outcome in result.outcomes().items()}
    assert outcomes == {
        "golden": "PASSED", "compute": "PASSED", "p05": "PASSED", "p06": "PASSED",
        "rounding": "SKIPPED", "accuracy": "SKIPPED", "length": "SKIPPED",
    }  # fmt: skip
    assert "pytest-repro merge --report" in result.out
    assert "2 of 10 prompts" in result.out
    (suite,) = accepted_whole.json("r.json")["suites"]
    assert suite["shard"] == "3/3"


def test_a_share_is_one_of_the_shards_own_prompts(accepted_whole: Project) -> None:
    """Two of its two prompts: 20 % of the suite, and all of the shard."""
    accepted_whole.flip("p05", NEAR_TIE).flip("p06", NEAR_TIE)
    share = ("--repro-threshold", "max_divergent=0.5")
    assert accepted_whole.check("--repro-shard", "3/3", *share).rc == 1
    _, merged = merged_reports(accepted_whole, *share)
    assert merged.rc == 0, merged.text


def test_more_shards_than_batches(accepted_whole: Project) -> None:
    for i in range(1, 7):
        args = ["--repro-shard", f"{i}/6", "--repro-report-json", f"{i}.json", *(["-n", "2"] if i == 6 else [])]
        result = accepted_whole.check(*args)
        assert result.rc == 0, result.text
    assert "shard 6/6 holds no batch, since there are fewer batches than shards: nothing to do" in result.out
    merged = accepted_whole.cli("merge", "--report", "all.json", *(f"{i}.json" for i in range(1, 7)))
    assert merged.rc == 0, merged.text
    (suite,) = accepted_whole.json("all.json")["suites"]
    assert [p["id"] for p in suite["prompts"]] == NAMES

    before = accepted_whole.golden_files()
    result = accepted_whole.pytest("--repro-update", "golden", "--repro-shard", "6/6", "-rs")
    assert result.rc == 0
    assert "holds no batch" in result.out
    assert accepted_whole.golden_files() == before


def test_reports_that_are_no_shards_of_one_check_are_refused(accepted_whole: Project) -> None:
    project = accepted_whole
    merged_reports(project)
    project.check("--repro-shard", "1/3", "--repro-report-json", "other.json", "--repro-threshold", "max_divergent=5")
    project.check("--repro-shard", "1/3", "--repro-report-json", "few.json", "-k", "p01")
    project.check("--repro-report-json", "whole.json")
    project.write("text.json", "not json").write("list.json", "[1]").write("newer.json", '{"schema": 99}')
    project.write("bytes.json", b"\xff\xfe").write("nan.json", '{"schema": NaN}')
    project.write("deep.json", "[" * 100_000)
    cases = [
        (["1.json", "2.json"], "shards are missing: 3/3"),
        (["1.json", "2.json", "3.json", "1.json"], "shard 1/3 is there twice: in 1.json and in 1.json"),
        (["other.json", "2.json", "3.json"], "thresholds.max_divergent: 5 in 1/3 and 0 in 2/3, 3/3"),
        (["few.json", "2.json", "3.json"], "shard 1/3 judged 1 of its 4 prompts"),
        (["1.json", "2.json", "3.json", "whole.json"], "whole.json holds a check of the whole suite"),
        (["text.json"], "not a JSON report"),
        (["bytes.json"], "not a JSON report"),
        (["deep.json"], "not a JSON report"),
        (["list.json"], "a report of schema 1 is needed"),
        (["newer.json"], "a report of schema 1 is needed, and this has 99"),
        (["nan.json"], "a report of schema 1 is needed"),
        (["nowhere.json"], "there is no such report"),
        (["golden"], "not a JSON report"),
    ]
    for files, told in cases:
        refused = project.cli("merge", "--report", "out.json", *files)
        assert refused.rc == 2, (files, refused.text)
        assert told in refused.err, (files, refused.err)
        assert "mend:" in refused.err
        assert "Traceback" not in refused.text
    assert not (project.root / "out.json").exists()
    assert project.cli("merge", "--report", "1.json", "1.json", "2.json", "3.json").rc == 2


# --- the option -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", ["0/3", "4/3", "a/b", "1/0", "1/3/2", "١/٣"])
def test_what_is_no_shard_is_a_usage_error(project: Project, shard: str) -> None:
    result = project.suite().check(f"--repro-shard={shard}")
    assert result.rc == 4
    assert "is not i/n with 1 <= i <= n" in result.err
    assert "mend: e.g. --repro-shard 1/4" in result.err


def test_a_shard_of_nothing_is_a_usage_error(project: Project) -> None:
    result = project.suite().pytest("--repro-shard", "1/3", "golden")
    assert result.rc == 4
    assert "does nothing by itself" in result.err


def test_tests_that_judge_whole_suites_are_not_sharded(project: Project) -> None:
    project.suite().write("test_own.py", "def test_own(repro):\n    repro.check('golden/demo')\n")
    result = project.pytest("--repro-check", "test_own.py", "--repro-shard", "1/2")
    assert result.rc == 1
    assert "the repro fixture judges whole suites" in result.out


def test_a_check_in_ci_leaves_a_part(project: Project) -> None:
    project.suite()
    for shard in ("1/2", "2/2"):
        assert project.check("--repro-pending-dir", "left", "--repro-shard", shard, CI="true").rc == 1
    assert project.cli("merge", "left").rc == 0
    assert [p.name for p in (project.root / "left/golden/demo").glob("*.jsonl")] == ["bf16.pending.jsonl"]


# --- GPUs -----------------------------------------------------------------------------------------------------------

BOARDS = """
class NVMLError(Exception): ...
NVML_CLOCK_SM = NVML_MEMORY_ERROR_TYPE_UNCORRECTED = NVML_VOLATILE_ECC = 0
def nvmlInit(): ...
def nvmlShutdown(): ...
def nvmlDeviceGetCount(): return 4
def __getattr__(name):
    if name.startswith("nvml"):
        def unsupported(*_): raise NVMLError
        return unsupported
    raise AttributeError(name)
"""
CONFTEST = """
import os, sys
from pathlib import Path
assert "torch" not in sys.modules
worker = os.environ.get("PYTEST_XDIST_WORKER", "controller")
Path(__file__).with_name(f"{worker}.gpu").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
"""


def test_every_worker_has_a_gpu_of_its_own(accepted: Project) -> None:
    """The pynvml of a machine with four boards, two of which are visible; conftest sees what torch would see."""
    accepted.write("pynvml.py", BOARDS).write("conftest.py", CONFTEST)
    result = accepted.check("-n", "2", CUDA_VISIBLE_DEVICES="3,1")
    assert result.rc == 0, result.text
    seen = {file.stem: file.read_text() for file in accepted.root.glob("*.gpu")}
    assert seen == {"controller": "3,1", "gw0": "3", "gw1": "1"}

    refused = accepted.check("-n", "3", CUDA_VISIBLE_DEVICES="3,1")
    assert refused.rc == 4
    assert "-n 3 with 2 visible GPUs: every worker needs one of its own. mend: -n 2 at most" in refused.err

    assert accepted.check("-n", "3", CUDA_VISIBLE_DEVICES="").rc == 0, "without a GPU as ever"
    assert accepted.pytest("golden", "-n", "3", CUDA_VISIBLE_DEVICES="3").rc == 5, "other runs are left alone"
