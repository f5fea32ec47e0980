"""The command line. Reads the run file and chooses the backend before anything heavy is imported."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from rlcore import config as configuration
from rlcore import registry
from rlcore.config import RunConfig
from rlcore.errors import ConfigError, RlcoreError

if TYPE_CHECKING:
    from rlcore.protocols import Backend

INTERRUPTED = 130
RECORD = "config.yaml"  # a folder that holds one holds a run


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 the user's mistake, 1 the run failed, 130 interrupted."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if wrong := [argument for argument in rest if argument.startswith("-") or "=" not in argument]:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if rest:  # overrides that stand behind an option
        options.overrides += rest
    try:
        options.run(options)
    except RlcoreError as error:
        print(f"rlcore: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print("rlcore: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rlcore", description="Reinforcement learning for language and vision-language models.",
        epilog="Exit status: 0 done, 2 your mistake (settings, data, a missing part), 1 the run failed, 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"rlcore {metadata.version('rlcore')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, module, what in (
        ("grpo", "rlcore.trainer", "train by a policy gradient: the algorithm section (after the warm start, if sft is set)"),
        ("sft", "rlcore.sft", "supervised training alone: the sft section"),
        ("dpo", "rlcore.dpo", "train on pairs of a preferred and a rejected response: the dpo section"),
    ):
        command = _command(commands, name, partial(_train, module), what)
        command.add_argument("--run-dir", type=Path, metavar="DIR", help="default: runs/<run file's name>-<date>-<time>")
        command.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --run-dir")
    _command(commands, "plan", _plan, "what the run will do: prompts, samples, optimizer steps, micro-batches")
    _command(commands, "show", _show, "every setting of the run, as YAML")
    return parser


def _command(commands: argparse._SubParsersAction, name: str, run: object, what: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".")
    command.add_argument("file", metavar="RUN.yaml", help="the run file")
    command.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings that replace the run file's")
    installed = ", ".join(registry.names("backends"))
    command.add_argument("--backend", metavar="NAME", help=f"auto, {installed}; replaces backend.name")
    command.set_defaults(run=run)
    return command


def _load(options: argparse.Namespace) -> RunConfig:
    chosen = [f"backend.name={options.backend}"] if options.backend else []
    config = configuration.load(options.file, [*options.overrides, *chosen])
    _check_installed(config)
    return config


def _check_installed(config: RunConfig) -> None:
    """Every plugin by its name: one that is not there is named with its setting, before anything heavy is imported."""
    wanted = [
        ("backends", "backend.name", config.backend.name),
        ("engines", "rollout.engine", config.rollout.engine),
        ("placements", "placement.kind", config.placement.kind),
        ("adapters", "model.adapter", config.model.adapter),
        ("datasets", "data.train.name", config.data.train.name),
        *([("datasets", "data.eval.name", config.data.eval.name)] if config.data.eval else []),
        *(("rewards", f"reward.{index}.name", reward.name) for index, reward in enumerate(config.reward)),
    ]
    for group, key, name in wanted:
        if name != "auto" and "." not in name:
            registry.check(group, name, key)


def _show(options: argparse.Namespace) -> None:
    print(configuration.dump(_load(options)), end="")


def _plan(options: argparse.Namespace) -> None:
    config = _load(options)
    _backend(config)
    from rlcore import plan
    from rlcore.data import load_rows

    print(plan.describe(config, len(load_rows(config.data.train))))


def _train(module: str, options: argparse.Namespace) -> None:
    config = _load(options)
    backend = _backend(config)
    folder = _run_folder(options)
    train = importlib.import_module(module).train
    from rlcore.console import Console

    _hush()
    console = Console(config.logging.samples_on_console)
    train(config, backend, folder, options.resume, console, partial(_begin, folder, config))
    _closing(folder)


def _backend(config: RunConfig) -> Backend:
    """The chosen backend, with its environment in place: torch reads it when it is imported, which comes later."""
    name = "cpu" if config.backend.name == "auto" else config.backend.name
    kind = registry.load("backends", name)
    backend = kind(configuration.validate(kind.Options, config.backend.options, "backend.options."))
    for variable, value in backend.environment().items():
        os.environ.setdefault(variable, value)
    return backend


def _run_folder(options: argparse.Namespace) -> Path:
    """Where the run's files go; not made yet."""
    stem = Path(options.file).stem
    folder = options.run_dir or Path("runs") / f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    started = (folder / RECORD).exists()
    if options.resume and options.run_dir is None:
        raise ConfigError("--resume: say which run with --run-dir DIR")
    if options.resume and not started:
        raise ConfigError(f"--resume: {folder} holds no run (no {RECORD})")
    if started and not options.resume:
        raise ConfigError(f"--run-dir: {folder} already holds a run; give --resume to go on with it, or another folder")
    return folder


def _begin(folder: Path, config: RunConfig) -> None:
    """Make the run folder and its record, unless the run goes on in one."""
    print(f"run folder: {folder}", flush=True)
    if (folder / RECORD).exists():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "environment.json").write_text(json.dumps(_environment(), indent=1) + "\n", encoding="utf-8")
        (folder / RECORD).write_text(configuration.dump(config), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--run-dir: {folder} cannot be written: {error}; give another folder") from None


def _environment() -> dict[str, object]:
    installed = {package.metadata["Name"]: package.version for package in metadata.distributions()}
    return {
        "python": platform.python_version(), "platform": platform.platform(), "cpus": os.cpu_count(), "command": sys.argv,
        "packages": dict(sorted(installed.items())),
    }


def _hush() -> None:
    """Models load without bars of their own: stderr is for the run's bar and for mistakes."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _closing(folder: Path) -> None:
    latest = folder / "checkpoints" / "latest"
    print(
        f"\nrun folder: {folder}\n"
        f"  metrics.jsonl       every step's numbers\n"
        f"  samples.jsonl       every sample with its score\n"
        f"  tensorboard/        tensorboard --logdir {folder}\n"
        + (f"  checkpoints/        {latest.read_text().strip()}/model loads with from_pretrained" if latest.exists() else "")
    )


if __name__ == "__main__":
    sys.exit(main())
