"""Saving and resuming. A checkpoint is a folder that appears whole or not at all; `latest` names the newest.

    checkpoints/step_000010/model/               a Hugging Face folder
    checkpoints/step_000010/optimizer.safetensors   first and second moments by parameter, optimizer.json the step count
    checkpoints/step_000010/state.json           step, prompts drawn, random states
    checkpoints/step_000010/generator.json       random state of a device with its own generator
    checkpoints/latest                           "step_000010"
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from rlcore.checkpoint.state import random_states
from rlcore.errors import ConfigError, RunError, Unwritten


def save_checkpoint(run_folder: Path, name: str, state: Mapping[str, Any], write: Callable[[Path], None]) -> Path:
    """Let `write` fill a draft folder, add `state`, then rename it to `checkpoints/<name>` and update `latest`. RunError if it
    cannot be written."""
    folder = run_folder / "checkpoints" / name
    draft = folder.with_name(f".{name}.partial")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        write(draft)
        (draft / "state.json").write_text(json.dumps({"random": random_states(), **state}), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(draft, folder)
        replace_text(folder.parent / "latest", name)
    except (OSError, Unwritten) as error:
        raise RunError(f"{folder} cannot be written: {error}; {_whole(folder.parent)}") from error
    return folder


@contextmanager
def writing() -> Iterator[None]:
    """Convert write errors to Unwritten, which means the same in whatever process it is raised."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise Unwritten(str(error)) from error


def _whole(checkpoints: Path) -> str:
    """How to continue after a checkpoint that was not finished."""
    pointer = checkpoints / "latest"
    if not pointer.exists():
        return "there is none before it; free some room and start again"
    return f"{pointer.read_text(encoding='utf-8').strip()} is whole: free some room, then go on from it with --resume"


def latest_checkpoint(run_folder: Path) -> Path:
    """Newest complete checkpoint; ConfigError if there is none."""
    folder = newest_checkpoint(run_folder)
    if folder is None:
        raise ConfigError(f"--resume: {run_folder} holds no checkpoint; start it without --resume in a new folder")
    return folder


def newest_checkpoint(run_folder: Path) -> Path | None:
    """Newest complete checkpoint; None if there is none yet, ConfigError if `latest` names an incomplete one."""
    pointer = run_folder / "checkpoints" / "latest"
    if not pointer.exists():
        return None
    folder = pointer.parent / pointer.read_text(encoding="utf-8").strip()
    if not (folder / "state.json").exists():
        raise ConfigError(f"--resume: {pointer} names {folder.name}, which is missing or not whole")
    return folder


def read_state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))


def replace_text(path: Path, text: str) -> None:
    """Write a small file atomically."""
    draft = path.with_name(f".{path.name}.partial")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)
