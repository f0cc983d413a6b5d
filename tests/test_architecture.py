"""The drawn module tree, the direction of imports, and who may import what: held against the files."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pytest_repro"
DRAWING = (ROOT / "docs" / "architecture.md").read_text("utf-8")

LAYERS = [
    {"suite", "generation", "fingerprint", "schemas", "errors", "text"},
    {
        "judging",
        "traces",
        "checks",
        "arbiter",
        "knobs",
        "bisection",
        "merging",
        "candidate",
        "comparison",
        "noise",
        "calibration",
        "rounding",
        "sketch",
        "accuracy",
        "verdict",
        "result",
        "golden",
        "capybara",
        "ladder",
        "audit",
        "provenance",
        "wording",
        "starter",
        "dispersion",
        "grid",
        "cells",
        "study",
    },
    {"store", "artifact", "history", "probe", "precision", "models", "engines", "numerics"},
    {"report"},
    {"gate", "asking", "evidence", "recording", "review", "verification", "trials", "descent", "decoding", "campaign"},
    {"plugin", "cli", "session", "fixture", "testing"},
]
LAYERCAST = {
    f"numerics.layercast.{name}" for name in ("product", "native", "gpu", "weight", "model", "quantizer", "vllm")
}
EXACT = {
    f"numerics.exact.{name}" for name in ("dyadic", "elementary", "operations", "native", "rotary", "model", "proof")
}
FORMATS = {"numerics.formats.quantiser", "numerics.formats.model"}
CLI = {
    "cli.shell",
    "cli.goldens",
    "cli.shards",
    "cli.machine",
    "cli.fetching",
    "cli.verifying",
    "cli.bisecting",
    "cli.calibrating",
    "cli.studying",
    "cli.starting",
    "cli.law",
    "cli.ladders",
    "cli.auditing",
    "cli.surfaces",
}
HEAVY = {
    "pytest": {"plugin", "testing"},
    "torch": {
        "engines.activations",
        "engines.departures",
        "engines.operations",
        "engines.reordering",
        "engines.scoring",
        "engines.transformers",
        "engines.vllm",
        "engines.vllm_worker",
        "numerics.fp32",
        "models",
        "probe",
        "precision",
        "review",
        *LAYERCAST,
        *EXACT,
        *FORMATS,
    },
    "vllm": {"engines.vllm", "numerics.layercast.vllm"},
    "transformers": {
        "engines.transformers",
        "engines.scoring",
        "engines.tokenizer",
        "engines.vllm",
        "models",
        "numerics.layercast.quantizer",
        "numerics.exact.model",
        "numerics.formats.model",
    },
    "triton": {"numerics.layercast.gpu"},
    "huggingface_hub": {"models"},
    "httpx": {"engines.openai_client"},
    "typer": CLI,
    "rich": CLI,
    "jinja2": {"report.html", "report.curves"},
    "markupsafe": {"report.html", "report.study"},
    "git": {"probe", "history"},
    "pynvml": {"probe"},
}
AT_THE_TOP = {
    "torch": {
        "engines.activations",
        "engines.departures",
        "engines.operations",
        "engines.reordering",
        "engines.scoring",
        "engines.transformers",
        "engines.vllm_worker",
        *LAYERCAST,
        *FORMATS,
        *EXACT,
    },
    "vllm": {"numerics.layercast.vllm"},
    "transformers": {
        "engines.transformers",
        "engines.scoring",
        "numerics.layercast.quantizer",
        "numerics.formats.model",
        "numerics.exact.model",
    },
    "pytest": {"plugin", "testing"},
}


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(path.read_text("utf-8"))
    return {name: tree for name, tree in found.items() if name != "__init__"}


MODULES = modules()


def typing_only(tree: ast.Module) -> set[ast.AST]:
    guarded: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            guarded |= set(ast.walk(node))
    return guarded


def imports(name: str) -> list[tuple[str, bool]]:
    """(absolute dotted name, whether it is at the top of the module) of every import, type-only ones aside."""
    tree = MODULES[name]
    top, guarded, found = set(tree.body), typing_only(tree), []
    package = ("pytest_repro." + name).split(".")
    if not (PACKAGE / Path(*name.split(".")) / "__init__.py").exists():
        package = package[:-1]
    for node in ast.walk(tree):
        if node in guarded:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, node in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *(node.module.split(".") if node.module else [])])
            found += [(f"{stem}.{alias.name}" if node.level else stem, node in top) for alias in node.names]
    return found


def layer(name: str) -> int:
    return next(i for i, members in enumerate(LAYERS) if name.split(".")[0] in members)


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name: str) -> None:
    for imported, _ in imports(name):
        if imported.startswith("pytest_repro."):
            below = imported.removeprefix("pytest_repro.")
            if below.split(".")[0] in {m.split(".")[0] for m in MODULES}:
                assert layer(below) <= layer(name), f"{name} imports {below}, which lies above it"


@pytest.mark.parametrize("name", MODULES)
def test_heavy_packages_stay_where_they_belong(name: str) -> None:
    for imported, at_the_top in imports(name):
        package = imported.split(".")[0]
        if package in HEAVY:
            assert name in HEAVY[package], f"{name} imports {package}"
            if at_the_top and package in AT_THE_TOP:
                assert name in AT_THE_TOP[package], f"{name} imports {package} at its top"


def test_the_drawing_is_the_tree() -> None:
    drawn: set[str] = set()
    folders_above: list[str] = []
    block = DRAWING.split("## The modules")[1].split("```")[1]
    for line in block.splitlines()[2:]:
        entry = re.match(r"^( +)([a-z0-9_]+(?:\.py|/))", line)
        assert entry, line
        depth = len(entry[1]) // 2 - 1
        path = "".join(folders_above[:depth]) + entry[2]
        drawn.add(path)
        if path.endswith("/"):
            folders_above[depth:] = [entry[2]]
    files = {p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py") if p.name != "__init__.py"}
    folders = {f"{p.parent.relative_to(PACKAGE).as_posix()}/" for p in PACKAGE.rglob("*/__init__.py")}
    assert drawn == files | folders


def test_every_module_has_its_layer_in_the_document() -> None:
    table = DRAWING.split("## Layers")[1]
    for members in LAYERS:
        assert any(
            all(re.search(rf"\b{m}\b", row) for m in members) for row in table.splitlines() if row.startswith("|")
        )


def test_every_module_says_what_it_is() -> None:
    assert [name for name, tree in MODULES.items() if not ast.get_docstring(tree)] == []
