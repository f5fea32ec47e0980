"""`rlcore eval`: the weights it evaluates, and the settings it changes for them. Imports nothing heavy."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rlcore.cli.run_folder import RECORD
from rlcore.cli.train import run_training
from rlcore.errors import ConfigError


def run_evaluation(options: argparse.Namespace) -> None:
    options.overrides = [*options.overrides, *served(options.model)]
    run_training("rlcore.train.evaluate.run", options)


def served(model: Path | None) -> list[str]:
    """Overrides by which the engines serve the weights that `--model` names. LoRA starts as no change, and a checkpoint has it
    merged, and its own vision tower."""
    chosen = [f"model.path={json.dumps(str(model_folder(model)))}", "model.options={}", "vision.path=null"] if model else []
    return ["model.lora=null", *chosen]


def model_folder(path: Path) -> Path:
    """The Hugging Face folder at `path`, in a checkpoint, or in the latest checkpoint of a run folder; ConfigError where there
    is none, or one of its files cannot be read."""
    path = path.expanduser().absolute()
    try:
        folder = _model_in(path)
        for file in sorted(folder.iterdir()):
            if file.is_file():
                file.open("rb").close()
    except FileNotFoundError:
        raise ConfigError(f"--model: {path}: no such folder") from None
    except OSError as error:
        reason = f"{error.filename} cannot be read ({error.strerror})"
        raise ConfigError(f"--model: {reason}; allow this user to read it, or give another folder") from None
    return folder


def _model_in(path: Path) -> Path:
    latest = path / "checkpoints" / "latest"
    if not path.is_dir():
        path.stat()  # OSError where nothing is there, or a folder above it cannot be entered
        raise ConfigError(f"--model: {path} is a file; give the folder of a model, a checkpoint or a run")
    if (path / "config.json").is_file():
        return path
    if (path / "model").is_dir():
        return path / "model"
    if latest.is_file():
        folder = latest.parent / latest.read_text(encoding="utf-8").strip() / "model"
        if not folder.is_dir():
            raise ConfigError(f"--model: {latest} names {folder.parent.name}, which is missing or has no model")
        return folder
    if (path / RECORD).is_file():
        raise ConfigError(f"--model: the run in {path} has not saved a checkpoint yet")
    raise ConfigError(
        f"--model: {path} is neither a model folder (config.json), nor a checkpoint (model/), nor the folder of a run"
        " (checkpoints/latest)"
    )
