"""The training commands: the run folder, and the run in it."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from rlcore.atomic import replace_file
from rlcore.cli.run_folder import RECORD, Claim, note
from rlcore.cli.settings import load_settings, prepared_backend
from rlcore.config import loader
from rlcore.config.changes import Changes, changes, refuse
from rlcore.config.schema import RunConfig
from rlcore.errors import ConfigError, WorkerDied
from rlcore.runtime import jemalloc

if TYPE_CHECKING:
    from rlcore.monitor.console import Console

ANYWAY = "anyway"  # to be resumed, whatever has changed
_HOLDS_A_RUN = "--run-dir: {} already holds a run; give --resume to go on with it, or another folder"


def run_training(command: str, options: argparse.Namespace) -> None:
    """`command`: the function that runs it, in a module that is imported once the backend has set the environment."""
    since = time.monotonic()
    config = load_settings(options)
    backend = prepared_backend(config)
    folder = _run_folder(options)
    with Claim(folder) as claim:
        changed: Changes = {}
        if options.resume:
            claim.take()
            changed = changes(loader.load(folder / RECORD), config)
            refuse(changed, anyway=options.resume == ANYWAY)
        module, _, name = command.rpartition(".")
        train = getattr(importlib.import_module(module), name)
        from rlcore.monitor.console import Console

        _hush()
        console = Console(config.logging.samples_on_console)
        if config.placement.offload and "JEMALLOC" not in os.environ and jemalloc.of_malloc() is None:
            remedy = f"{jemalloc.INSTALL}, and preload it (docs/launching.md), or set JEMALLOC=off"
            console.warn(f"placement.offload: malloc is not jemalloc's: {jemalloc.CONSEQUENCE}; {remedy}")

        def run(resume: bool, since: float) -> None:
            begin = partial(_begin, claim, config, changed, since)
            train(config, backend, folder, resume=resume, console=console, begin=begin)

        try:
            _restarting(run, folder, bool(options.resume), config.placement.max_restarts, console, since)
        except Exception as error:
            from rlcore.diagnose import failure

            if (told := failure.told(error, config, backend, folder)) is None:
                raise
            raise told from error
    _closing(folder)


def _restarting(
    run: Callable[[bool, float], None], folder: Path, resume: bool, restarts: int, console: Console, since: float
) -> None:
    """Run; after a worker died, restart from the last checkpoint, at most `restarts` times. `since`: when the start began."""
    for left in range(restarts, -1, -1):
        try:
            return run(resume, since)
        except WorkerDied as error:
            latest = folder / "checkpoints" / "latest"
            if not left or not latest.exists():
                raise
            checkpoint = latest.read_text().strip()
            console.warn(f"{error}; restarting from {checkpoint}, {left - 1} restarts are left")
            note(folder, "a worker died", why=str(error), checkpoint=checkpoint)
            resume, since = True, time.monotonic()


def _run_folder(options: argparse.Namespace) -> Path:
    """Path of the run folder, not created yet."""
    stem = Path(options.file).stem
    folder = options.run_dir or Path("runs") / f"{stem}{options.label}-{time.strftime('%Y%m%d-%H%M%S')}"
    started = (folder / RECORD).exists()
    if options.resume and options.run_dir is None:
        raise ConfigError("--resume: say which run with --run-dir DIR")
    if options.resume and not started:
        raise ConfigError(f"--resume: {folder} holds no run (no {RECORD})")
    if started and not options.resume:
        raise ConfigError(_HOLDS_A_RUN.format(folder))
    return folder


def _begin(claim: Claim, config: RunConfig, changed: Changes, since: float) -> None:
    """Create the run folder and its record; of a run that resumes in one, record what has changed. `since`: when its start
    began."""
    folder, going_on = claim.folder, claim.taken
    claim.take()
    recorded = (folder / RECORD).exists()
    if recorded and not going_on:  # another run began while this one was loading
        raise ConfigError(_HOLDS_A_RUN.format(folder))
    print(f"run folder: {folder}", flush=True)
    try:
        loading = round(time.monotonic() - since, 1)
        note(folder, "resumed" if recorded else "started", command=sys.argv, changed=changed, loading_seconds=loading)
        if not recorded:
            (folder / "environment.json").write_text(json.dumps(_environment(), indent=1) + "\n", encoding="utf-8")
        if changed or not recorded:
            replace_file(folder / RECORD, loader.dump(config))
    except OSError as error:
        raise ConfigError(f"--run-dir: {folder} cannot be written: {error}; give another folder") from None


def _environment() -> dict[str, object]:
    installed = {package.metadata["Name"]: package.version for package in metadata.distributions()}
    return {
        "python": platform.python_version(), "platform": platform.platform(), "cpus": os.cpu_count(), "command": sys.argv,
        "malloc": str(jemalloc.of_malloc() or "not jemalloc"),
        "packages": dict(sorted(installed.items())),
    }


def _hush() -> None:
    """Disable transformers' progress bars: stderr is for the run's bar and for errors."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _closing(folder: Path) -> None:
    latest, evaluated = folder / "checkpoints" / "latest", (folder / "eval.json").exists()
    print(
        f"\nrun folder: {folder}\n"
        f"  metrics.jsonl       every step's numbers\n"
        f"  samples.jsonl       every sample with its score\n"
        + ("  eval.json           the last evaluation by set, source and level\n" if evaluated else "")
        + f"  tensorboard/        tensorboard --logdir {folder}\n"
        + (f"  checkpoints/        {latest.read_text().strip()}/model loads with from_pretrained" if latest.exists() else "")
    )
