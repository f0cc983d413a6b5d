"""A drift names the module where it begins: a build that computes one of them otherwise, and weights that were changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.engines.tiny import build

from .project import Project

BROKEN_BUILD = """
from transformers.models.llama import modeling_llama

_init = modeling_llama.LlamaDecoderLayer.__init__

def init(self, config, layer_idx):
    _init(self, config, layer_idx)
    if layer_idx == 1:
        {defect}

modeling_llama.LlamaDecoderLayer.__init__ = init
"""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Goldens in bf16 and fp32 of a tiny model, accepted."""
    root = tmp_path_factory.mktemp("localisation")
    names = [f"p{i}" for i in range(12)]
    build(root / "project" / "model")
    made = Project(root).suite(
        {name: [1] for name in names},
        suite={"model": "../../model", "engine": "transformers"},
        generation={"max_new_tokens": 24, "batch_size": 4}, run={"numerics": ["bf16", "fp32"]}, engine=None,
    )  # fmt: skip
    rows = [{"id": name, "prompt": "Hello there" + " and so on" * i} for i, name in enumerate(names)]
    made.write("golden/demo/prompts.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    made.update("-q")
    return made.accept()


@pytest.fixture
def project(recorded: Project, tmp_path: Path) -> Project:
    return recorded.copied_to(tmp_path / "copy")


def checked(project: Project, numerics: str, *args: str, **env: str) -> tuple[dict[str, Any], str]:
    done = project.check("--repro-numerics", numerics, "--repro-report-json", "report.json", *args, **env)
    (suite,) = project.json()["suites"]
    return suite, done.text


@pytest.mark.parametrize("numerics", ["bf16", "fp32"])
@pytest.mark.parametrize(
    ("defect", "module"),
    [
        ("self.mlp.down_proj.register_forward_hook(lambda m, a, out: out * 1.5)", "model.layers.1.mlp.down_proj"),
        ("self.self_attn.scaling *= 0.5", "model.layers.1.self_attn"),
        ("self.input_layernorm.variance_epsilon = 100.0", "model.layers.1.input_layernorm"),
    ],
)
def test_a_build_that_computes_one_module_otherwise_is_told_which(
    project: Project, numerics: str, defect: str, module: str
) -> None:
    project.write("conftest.py", BROKEN_BUILD.format(defect=defect))
    suite, text = checked(project, numerics)
    assert suite["verdict"] == "fail"
    assert suite["localisation"]["module"] == module
    assert f"\nwhere         {module}: " in text


def test_with_other_kernels_as_well_it_is_still_told(project: Project) -> None:
    hook = "self.mlp.up_proj.register_forward_hook(lambda m, a, out: out * 1.5)"
    project.write("conftest.py", BROKEN_BUILD.format(defect=hook))
    suite, _ = checked(project, "fp32", "--repro-engine-option", "attention=eager", OMP_NUM_THREADS="1")
    assert {"attention"} <= {c["field"] for c in suite["environment_diff"]}
    assert suite["localisation"]["module"] == "model.layers.1.mlp.up_proj"


def test_changed_weights_that_are_meant_are_told_apart_by_module(project: Project) -> None:
    path = project.root / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.self_attn.v_proj.weight"] *= -1
    save_file(tensors, path, metadata={"format": "pt"})
    suite, text = checked(project, "bf16", "--repro-allow-changed", "model")
    assert suite["verdict"] == "fail", text
    assert suite["localisation"]["module"] == "model.layers.0.self_attn.v_proj"


def test_what_differs_after_the_model_names_no_module(project: Project) -> None:
    project.write(
        "conftest.py",
        "from transformers import GenerationConfig\n"
        "_init = GenerationConfig.__init__\n"
        "def init(self, **options):\n"
        "    _init(self, **{**options, 'repetition_penalty': 1.5})\n"
        "GenerationConfig.__init__ = init\n",
    )
    suite, text = checked(project, "bf16", "--repro-method", "decode")
    assert suite["counts"].get("drift")
    assert suite["localisation"]["module"] == "" and "after the model" in suite["localisation"]["finding"]
    assert "not localised: every module put out the very bits of the recording" in " ".join(text.split())


def test_what_holds_is_not_asked(project: Project) -> None:
    suite, text = checked(project, "bf16")
    assert suite["verdict"] == "pass" and suite["localisation"] is None and "where in the model" not in text
