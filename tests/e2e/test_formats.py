"""A format as a numerics mode, from recording to a failing check: names, files, thresholds, and a waiver that never holds."""

from __future__ import annotations

from pathlib import Path

from .project import DRIFT, Project


def test_a_format_has_a_golden_of_its_own_and_is_never_waived(tmp_path: Path) -> None:
    project = Project(tmp_path).suite(
        run={"numerics": ["e4m3-kv-weights"]},
        thresholds={"fp32_waiver": "all", "e4m3-weights-kv": {"max_divergent": 1}},
    )
    project.update().accept()
    assert sorted(p.name for p in project.folder.glob("*.golden.*")) == [
        "e4m3-weights-kv.golden.jsonl", "e4m3-weights-kv.golden.safetensors",
    ]  # fmt: skip
    passing = project.check()
    assert passing.rc == 0, passing.text
    project.flip("a", DRIFT)
    failing = project.check("--repro-report-json", "report.json")
    assert failing.rc == 1, failing.text
    assert "1 drift" in failing.text and "unexplained 1 > max_unexplained 0" in failing.text
    assert "max_divergent 0" not in failing.text, "the class's own threshold holds"
    (suite,) = project.json()["suites"]
    assert (suite["observed_compute"], suite["golden"]["name"]) == ("e4m3-weights-kv", "e4m3-weights-kv")
    assert suite["metrics"]["waived"] == 0
    (told,) = [c["message"] for c in suite["checks"] if c["name"] == "compute"]
    assert "fp32_waiver = all does not apply" in told
