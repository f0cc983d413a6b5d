"""How a trial is run: what pytest is given, what the process finds in its environment, and what a user would type."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_repro.errors import ConfigError
from pytest_repro.knobs import Setting, undoable
from pytest_repro.trials import Check, results, trial

FACTS = {
    "engine": "vllm",
    "batch_size": 8,
    "threads": 2,
    "attention": "FLASH_ATTN",
    "engine.max_num_seqs": 4,
    "cpu_model": "x",
}
NOW = {"engine": "transformers", "batch_size": 1, "threads": 1, "env.OMP_NUM_THREADS": "1", "attention": "eager", "cpu_model": "x"}  # fmt: skip
UNDOS = {undo.name: undo for undo in undoable(FACTS, NOW)}
CHECK = Check(
    "golden/s",
    Setting({"--repro-numerics": "bf16", "--repro-batch-size": "1"}, {"attention": "eager", "device": "cpu"}),
    ("-p", "mine"),
    ("a", "b"),
)


def test_what_pytest_is_given() -> None:
    assert CHECK.arguments == [
        "--repro-check", "golden/s/suite.toml::bf16::a", "golden/s/suite.toml::bf16::b", "--repro-numerics=bf16",
        "--repro-batch-size=1", "--repro-engine-option=attention=eager", "--repro-engine-option=device=cpu", "-p", "mine",
    ]  # fmt: skip
    assert Check("golden/s").arguments == ["--repro-check", "golden/s"]


def test_an_undone_mode_is_the_one_whose_items_run() -> None:
    then = {**NOW, "numerics": "fp32"}
    undone = CHECK.undone(undoable(then, {**NOW, "numerics": "bf16"}))
    assert "golden/s/suite.toml::fp32::a" in undone.arguments and "--repro-numerics=fp32" in undone.arguments


def test_the_environment_of_a_trial() -> None:
    around = {"PATH": "/bin", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    assert CHECK.environment(around) == around
    assert CHECK.undone([UNDOS["threads"]]).environment(around) == {"PATH": "/bin"}
    two = CHECK.undone(undoable({**NOW, "threads": 2, "env.OMP_NUM_THREADS": "2"}, NOW))
    assert two.environment(around) == {"PATH": "/bin", "OMP_NUM_THREADS": "2"}


def test_another_engine_does_not_get_this_one_s_options() -> None:
    options = CHECK.undone([UNDOS["engine"]]).setting.engine_options
    assert options == {"attention_backend": "FLASH_ATTN", "max_num_seqs": "4"}
    assert CHECK.undone([UNDOS["batch size"]]).setting.engine_options == CHECK.setting.engine_options


def test_undoing_changes_what_it_names_and_nothing_else() -> None:
    undone = CHECK.undone([UNDOS["batch size"]])
    assert undone.setting == Setting(
        {"--repro-numerics": "bf16", "--repro-batch-size": "8"}, CHECK.setting.engine_options
    )
    assert (undone.folder, undone.more, undone.prompts) == (CHECK.folder, CHECK.more, CHECK.prompts)


def test_what_a_user_would_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    assert CHECK.undone([UNDOS["threads"]]).typed.startswith("env -u OMP_NUM_THREADS pytest --repro-check golden/s ")
    held = Check("golden/two words", Setting(environment={"MKL_CBWR": "AVX2", "MKL_NUM_THREADS": None}))
    assert held.typed == "MKL_CBWR=AVX2 pytest --repro-check 'golden/two words'"


def test_what_pytest_refuses_is_told_in_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="exit code 4: file or directory not found: golden/none") as raised:
        results(Check("golden/none"), tmp_path / "report.json")
    assert raised.value.fix == "pytest --repro-check golden/none"


def test_a_trial_that_pytest_refuses_has_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = trial(CHECK, (UNDOS["batch size"],), FACTS, NOW, tmp_path / "report.json")
    assert done.error.startswith("pytest ended with exit code 4") and not done.holds and done.asked == ("a", "b")
