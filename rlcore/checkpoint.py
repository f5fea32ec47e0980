"""Saving and resuming. A checkpoint is a folder that appears whole or not at all; `latest` names the newest.

    checkpoints/step_000010/model/               a Hugging Face folder
    checkpoints/step_000010/optimizer.safetensors   first and second moments by parameter, optimizer.json the step count
    checkpoints/step_000010/state.json           step, prompts drawn, random states
    checkpoints/step_000010/generator.json       the random state of a device that draws by itself
    checkpoints/latest                           "step_000010"
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rlcore import distributed
from rlcore.errors import ConfigError, RunError, Unwritten
from rlcore.sharding import as_dealt, collected


def save(run_folder: Path, name: str, state: Mapping[str, Any], write: Callable[[Path], None]) -> Path:
    """`write` fills a folder, `state` goes beside it, and only then does it become `checkpoints/<name>` and `latest`. RunError
    when there is no room for it."""
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
    """Says that a file could not be written as an Unwritten, which means the same in whatever process it happens."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise Unwritten(str(error)) from error


def _whole(checkpoints: Path) -> str:
    """What there is to go on from when a checkpoint was not finished."""
    pointer = checkpoints / "latest"
    if not pointer.exists():
        return "there is none before it; free some room and start again"
    return f"{pointer.read_text(encoding='utf-8').strip()} is whole: free some room, then go on from it with --resume"


def latest(run_folder: Path) -> Path:
    """The newest whole checkpoint; ConfigError when there is none."""
    folder = newest(run_folder)
    if folder is None:
        raise ConfigError(f"--resume: {run_folder} holds no checkpoint; start it without --resume in a new folder")
    return folder


def newest(run_folder: Path) -> Path | None:
    """The same; None when there is none yet."""
    pointer = run_folder / "checkpoints" / "latest"
    if not pointer.exists():
        return None
    folder = pointer.parent / pointer.read_text(encoding="utf-8").strip()
    if not (folder / "state.json").exists():
        raise ConfigError(f"--resume: {pointer} names {folder.name}, which is missing or not whole")
    return folder


def read_state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))


def save_optimizer(optimizer: torch.optim.Optimizer, steps: int, folder: Path) -> None:
    """Written by the first rank."""
    tensors = collected(
        (f"{name}.{moment}", value)
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
        for moment, value in optimizer.state.get(parameter, {}).items()
    )
    if distributed.first():
        save_file(tensors, folder / "optimizer.safetensors")
        (folder / "optimizer.json").write_text(json.dumps({"steps": steps}), encoding="utf-8")


def load_optimizer(optimizer: torch.optim.Optimizer, folder: Path) -> int:
    """Fills the moments; returns the number of optimizer steps taken."""
    tensors = load_file(folder / "optimizer.safetensors")
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            moments = {moment: tensors.get(f"{name}.{moment}") for moment in ("step", "exp_avg", "exp_avg_sq")}
            if all(value is not None for value in moments.values()):
                optimizer.state[parameter] = {
                    moment: value.to(parameter.device) if moment == "step" else as_dealt(value, parameter)
                    for moment, value in moments.items()
                }
    return json.loads((folder / "optimizer.json").read_text(encoding="utf-8"))["steps"]


def random_states() -> dict[str, Any]:
    """Python's, NumPy's and torch's generators, as JSON."""
    kind, keys, *rest = numpy.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), *rest],
        "torch": _hex(torch.get_rng_state()),
    }


def seed_random_states(seed: int) -> None:
    """The same three generators, for whatever draws from them without a seed of its own: a user's reward, dropout."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def restore_random_states(states: Mapping[str, Any]) -> None:
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(_bytes(states["torch"]))


def _hex(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def save_generator(device: torch.device, folder: Path) -> None:
    """The device's random state, where it has one. Written by the first rank: all ranks start from one seed and draw alike."""
    states = torch.get_device_module(device)
    if distributed.first() and hasattr(states, "get_rng_state"):
        state = {"device": device.type, "state": _hex(states.get_rng_state(device))}
        (folder / "generator.json").write_text(json.dumps(state), encoding="utf-8")


def load_generator(device: torch.device, folder: Path) -> None:
    """What `save_generator` wrote on a device of this kind; the state of another kind means nothing here."""
    path = folder / "generator.json"
    if path.exists() and (saved := json.loads(path.read_text(encoding="utf-8")))["device"] == device.type:
        torch.get_device_module(device).set_rng_state(_bytes(saved["state"]), device)


def replace_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    draft = path.with_name(f".{path.name}.partial")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)
