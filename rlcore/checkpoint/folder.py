"""The checkpoints of a run. Each is a folder that appears whole or not at all; `latest` names the newest.

    checkpoints/step_000010/model/                  a Hugging Face folder
    checkpoints/step_000010/optimizer*.safetensors  first and second moments; optimizer.json the step count
    checkpoints/step_000010/lora.safetensors, critic/
    checkpoints/step_000010/sampled.safetensors     samples that the next step trains, if they are drawn ahead
    checkpoints/step_000010/generator.json          random state of a device with its own generator
    checkpoints/step_000010/state.json              step, prompts drawn, random states
    checkpoints/step_000010/checksums.json          of the files of tensors
    checkpoints/latest                              "step_000010"
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rlcore.distributed.snapshot import fault_of
from rlcore.errors import ConfigError

STATE, SUMS, LATEST = "state.json", "checksums.json", "latest"


def latest_checkpoint(run_folder: Path, warn: Callable[[str], None]) -> Path:
    """The newest checkpoint whose files are as they were written; `warn` is told what is wrong with newer ones.

    ConfigError if there is none.
    """
    if (named := _named(run_folder)) is None:
        raise ConfigError(f"--resume: {run_folder} holds no checkpoint; start it without --resume in a new folder")
    older = [one for one in checkpoints(run_folder) if one.name < named.name]
    faults = list[str]()
    for folder in (named, *reversed(older)):
        if (fault := damage(folder)) is None:
            warn(f"{'; '.join(faults)}; going on from {folder.name}" if faults else "")
            return folder
        faults.append(fault)
    raise ConfigError(f"--resume: {'; '.join(faults)}; no checkpoint is whole, start again in a new folder")


def newest_checkpoint(run_folder: Path) -> Path | None:
    """The newest checkpoint that is not missing files, by a look at its state alone; None if there is none."""
    if (named := _named(run_folder)) is None:
        return None
    whole = [one for one in checkpoints(run_folder) if one.name <= named.name and (one / STATE).exists()]
    return whole[-1] if whole else None


def _named(run_folder: Path) -> Path | None:
    """The checkpoint that `latest` names."""
    pointer = run_folder / "checkpoints" / LATEST
    return pointer.parent / pointer.read_text(encoding="utf-8").strip() if pointer.exists() else None


def checkpoints(run_folder: Path) -> list[Path]:
    """Every checkpoint, oldest first."""
    return sorted((run_folder / "checkpoints").glob("step_[0-9]*"))


def damage(folder: Path) -> str | None:
    """The first file that is not as it was written, and how it differs; reads all of them."""
    try:
        read_state(folder)
        files = _read(folder / SUMS)
    except (OSError, ValueError) as error:
        return f"{folder} is not whole: {error}"

    def look(name: str) -> str | None:
        path = folder / name
        try:
            fault = fault_of(path, files[name])
        except OSError as error:
            return f"{path} cannot be read: {error.strerror}"
        return f"{path} {fault}" if fault else None

    with ThreadPoolExecutor() as pool:
        return next(filter(None, pool.map(look, files)), None)


def read_state(folder: Path) -> dict[str, Any]:
    return _read(folder / STATE)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def drafts(run_folder: Path) -> Iterator[Path]:
    """Folders of checkpoints that were never finished."""
    return (run_folder / "checkpoints").glob(".step_*.partial")
