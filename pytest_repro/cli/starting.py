"""`pytest-repro init`."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from .. import accuracy, numerics, starter
from ..engines.base import REGISTRY, check_mode, check_options, needs_model
from ..errors import ConfigError
from ..models import well_formed
from ..starter import Recipe
from ..store import atomic_write
from ..suite import SUITE_FILE, defaults_around, load, parse_engine_option
from .shell import AsJson, app, as_data, reported, say

PROMPTS_FILE = "prompts.jsonl"
ALLOW_CODE = "--repro-allow-code"


@app.command()
@reported
def init(
    folder: Annotated[Path, typer.Argument(help="The suite's folder, e.g. golden/my-suite; it must not be a suite yet.")],
    model: Annotated[str, typer.Option("--model", help="A directory, org/name@revision, or pypi:name==version/file.gguf.")],
    prompts: Annotated[Path, typer.Option("--prompts", help="JSON Lines, GSM8K's format, or plain lines.")],
    name: Annotated[str, typer.Option("--name", help="The suite's name; default: the folder's.")] = "",
    modes: Annotated[
        list[str] | None, typer.Option("--numerics", help="native, bf16, fp16, fp32, layercast, exact or a format such as e4m3; repeatable, or with commas.")
    ] = None,
    engine: Annotated[str, typer.Option("--engine", help="transformers, vllm, openai, scripted or module:function.")] = "transformers",
    engine_option: Annotated[
        list[str] | None, typer.Option("--engine-option", metavar="NAME=VALUE", help="E.g. base_url=http://127.0.0.1:8000/v1; repeatable.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 96,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 8,
    scorer: Annotated[str, typer.Option("--scorer", help="exact, regex, last-number, choice or module:function.")] = "",
    pattern: Annotated[str, typer.Option("--pattern", help="The regular expression of --scorer regex.")] = "",
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Take so many prompts, from the start.")] = None,
    workflow: Annotated[Path | None, typer.Option("--workflow", help="Write the GitHub workflow to this file.")] = None,
    action: Annotated[str, typer.Option("--action", help="Where the workflow finds the action.")] = starter.ACTION,
    record: Annotated[bool, typer.Option("--record", help="Record its goldens at once, as pending ones.")] = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Make a first suite from a model and a file of prompts, and say what to do next."""
    read = starter.prompts_from(_text(prompts), where=str(prompts), suffix=prompts.suffix.lower(), limit=limit)
    recipe = Recipe(
        name=name or starter.name_from(folder.resolve().name),
        model=_model(model, folder, engine),
        prompts=read,
        engine=engine,
        numerics=_modes(modes, engine),
        scorer=scorer or starter.scorer_for(read),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        options={"pattern": pattern} if pattern else {},
        engine_options=dict(parse_engine_option(text, "--engine-option") for text in engine_option or ()),
    )
    _check(recipe)
    _check_address(recipe, folder)
    made = _files(recipe, folder)
    ci = starter.workflow(_in_repository(folder), recipe.numerics, action, recipe.engine, allow_code=recipe.names_code)
    if workflow is not None:
        made[_apart(workflow, folder)] = ci
    _write(made)
    steps = _steps(recipe, folder)
    if as_json:
        as_data({"suite": str(folder), "name": recipe.name, "prompts": len(read), "numerics": list(recipe.numerics),
                 "written": [str(file) for file in made], "next": steps, "workflow": ci})  # fmt: skip
    else:
        _tell(recipe, list(made), steps[1:] if record else steps, ci if workflow is None else "", action)
    if record:
        _record(recipe, folder, quiet=as_json)


def _steps(recipe: Recipe, folder: Path) -> list[str]:
    code = f" {ALLOW_CODE}" if recipe.names_code else ""
    commands = (f"pytest{code} --repro-update", "pytest-repro review", f"pytest{code} --repro-check")
    return [f"{command} {quote(str(folder))}" for command in commands]


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except FileNotFoundError:
        raise ConfigError("there is no such file", where=file, fix="--prompts FILE: one prompt a line") from None
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"cannot be read: {exc}", where=file, fix="a text file in UTF-8") from None


def _model(reference: str, folder: Path, engine: str) -> str:
    """The reference as suite.toml spells it: a directory relative to the suite's folder."""
    try:
        reference.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{reference!r} is no text", where="--model") from None
    if not reference.strip():
        raise ConfigError(
            "no model is named", where="--model", fix="a directory, org/name@revision, or pypi:name==version/file"
        )
    if not needs_model(engine):
        return reference
    local = Path(reference).expanduser()
    if local.is_dir():
        return str(local) if local.is_absolute() else Path(os.path.relpath(local, folder)).as_posix()
    if not well_formed(reference):
        raise ConfigError(
            f"{reference!r} is no directory that is here, and no model reference",
            where="--model",
            fix="a directory, org/name@revision, or pypi:name==version/path/in/wheel.gguf",
        )
    return reference


def _modes(named: list[str] | None, engine: str) -> tuple[str, ...]:
    if named is None:
        return ("fp32", "bf16") if needs_model(engine) else ("native",)
    return tuple(dict.fromkeys(mode.strip() for text in named for mode in text.split(",") if mode.strip()))


def _check(recipe: Recipe) -> None:
    """What suite.load does not know: engines, modes and scorers."""
    if recipe.engine not in REGISTRY and ":" not in recipe.engine:
        known = ", ".join([*REGISTRY, "module:function"])
        raise ConfigError(f"unknown engine {recipe.engine!r}; known: {known}", where="--engine")
    if not recipe.numerics:
        raise ConfigError("no numerics mode is named", where="--numerics", fix="--numerics fp32,bf16")
    for mode in recipe.numerics:
        try:
            check_mode(recipe.engine, numerics.mode(mode), "--numerics")
        except ConfigError as exc:
            raise ConfigError(exc.what, where="--numerics") from None
    check_options(recipe.engine, recipe.engine_options, "--engine-option")
    if ":" not in recipe.scorer:
        accuracy.scorer(recipe.scorer, pattern=recipe.options.get("pattern", ""), where="--scorer")


def _check_address(recipe: Recipe, folder: Path) -> None:
    """A suite that asks a server says which, or whoever runs it does: the first recording would be late to hear of it."""
    if recipe.engine != "openai":
        return
    try:
        from ..engines import openai_client
    except ImportError:
        raise ConfigError(
            "the engine openai is not installed", where="--engine", fix="pip install 'pytest-repro[openai]'"
        ) from None
    named = recipe.engine_options.get("base_url")
    table = defaults_around(folder)[1].get("engine", {})
    elsewhere = [at.get("base_url") for at in (table, table.get("openai")) if isinstance(at, dict)]
    if named is not None:
        openai_client.address(str(named), "--engine-option base_url")
    elif not any((*elsewhere, os.environ.get(openai_client.ADDRESS_VARIABLE))):
        raise ConfigError(
            "no server is named",
            where="--engine openai",
            fix=f"--engine-option base_url=http://127.0.0.1:8000/v1, or the variable {openai_client.ADDRESS_VARIABLE}",
        )


def _in_repository(folder: Path) -> str:
    """The suite's folder as a workflow names it: from the root of the repository, or else from the working directory."""
    here = Path.cwd().resolve()
    root = next((above for above in (here, *here.parents) if (above / ".git").exists()), here)
    try:
        return folder.resolve().relative_to(root).as_posix()
    except ValueError:
        raise ConfigError(
            f"the suite's folder lies outside of the project in {root}: its workflow would not find it",
            where=folder,
            fix="run pytest-repro init in the project that the suite belongs to",
        ) from None


def _apart(workflow: Path, folder: Path) -> Path:
    """The workflow's file, which may be none of the suite's, and no folder above it."""
    file, suite = workflow.resolve(), folder.resolve()
    if file.is_relative_to(suite) or suite.is_relative_to(file):
        raise ConfigError(
            "the workflow cannot lie in the suite's folder, or in its place",
            where=f"--workflow {workflow}",
            fix="--workflow .github/workflows/repro.yml",
        )
    return workflow


def _files(recipe: Recipe, folder: Path) -> dict[Path, str]:
    """The suite's files, once they were seen to load."""
    texts = {PROMPTS_FILE: starter.prompt_lines(recipe.prompts), SUITE_FILE: starter.suite_toml(recipe)}
    with tempfile.TemporaryDirectory() as trial:
        for name, text in texts.items():
            (Path(trial) / name).write_bytes(text.encode())
        try:
            loaded = load(Path(trial))
        except ConfigError as exc:
            where = exc.where.replace(trial, str(folder))
            raise ConfigError(exc.what.replace(trial, str(folder)), where=where, fix="--name, --prompts") from None
    assert replace(loaded, folder=folder).prompts == recipe.prompts, "what was written reads back as it was"
    return {folder / name: text for name, text in texts.items()}


def _write(files: dict[Path, str]) -> None:
    for file in files:
        if file.exists() or file.is_symlink():
            raise ConfigError(
                "this is here already, and was not touched", where=file, fix="name another folder or file"
            )
        above = next(parent for parent in file.parents if parent.exists())
        if not above.is_dir():
            raise ConfigError("this is a file, where a folder is needed", where=above, fix="name another folder")
    for file, text in files.items():
        try:
            atomic_write(file, text.encode())
        except OSError as exc:
            raise ConfigError(f"cannot be written: {exc}", where=file) from None


def _tell(recipe: Recipe, made: list[Path], steps: list[str], ci: str, action: str) -> None:
    for file in made:
        say(f"wrote {file}", "green")
    answers = sum(p.answer is not None for p in recipe.prompts)
    say(
        f"      {len(recipe.prompts)} prompts, {answers} with an answer; {', '.join(recipe.numerics)}; scorer {recipe.scorer}"
    )
    if not answers:
        say("      without answers, accuracy is not judged")
    if well_formed(recipe.model) and needs_model(recipe.engine) and not _is_pinned(recipe.model):
        say(
            f"note  {recipe.model} names no revision: another one may answer tomorrow, and its golden be incomparable",
            "yellow",
        )
    for i, step in enumerate(steps):
        say(f"{'next' if i == 0 else '':<5} {step}", "bold")
    if ci:
        say("then commit this as .github/workflows/repro.yml (--workflow FILE writes it):", "bold")
        print(ci)
    if action == starter.ACTION and not Path(action).exists():
        say(
            f"note  {action} is not here: copy it from pytest-repro, or name it with --action OWNER/REPO/PATH@COMMIT",
            "yellow",
        )


def _is_pinned(model: str) -> bool:
    return "@" in model or ":" in model or model.startswith((".", "/"))


def _record(recipe: Recipe, folder: Path, *, quiet: bool) -> None:
    """pytest in a process of its own; with --as-json its output goes to stderr."""
    code = [ALLOW_CODE] if recipe.names_code else []
    command = [sys.executable, "-m", "pytest", *code, "--repro-update", str(folder)]
    sys.stdout.flush()
    done = subprocess.run(command, stdout=sys.stderr if quiet else None, check=False)
    if done.returncode:
        say(f"recording failed: pytest ended with exit code {done.returncode}", "red")
        raise typer.Exit(1)
