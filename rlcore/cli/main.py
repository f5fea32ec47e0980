"""The command line. Reads the run file and chooses the backend before anything heavy is imported."""

from __future__ import annotations

import argparse
import os
import sys
from bdb import BdbQuit
from collections.abc import Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from rlcore import registry
from rlcore.cli.convert import DTYPES, run_convert
from rlcore.cli.data import run_data
from rlcore.cli.evaluate import run_evaluation
from rlcore.cli.import_config import run_import_config
from rlcore.cli.inspect import run_plan, run_show
from rlcore.cli.launch import LAUNCHER, TRAINERS, run_launch
from rlcore.cli.machine import run_check, run_doctor
from rlcore.cli.train import ANYWAY, run_training
from rlcore.diagnose.conformance.report import SECTIONS
from rlcore.errors import RlcoreError

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 the user's mistake, 1 the run failed, 130 interrupted."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if "words" in options:  # of another system's command
        options.words, rest = rest, []
    if wrong := [argument for argument in rest if not _is_override(argument)]:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if rest and "overrides" not in options:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # overrides placed after an option
        options.overrides += rest
    try:
        return options.run(options) or 0
    except RlcoreError as error:
        print(f"rlcore: {error}", file=sys.stderr)
        return error.status
    except (KeyboardInterrupt, BdbQuit):
        print("rlcore: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _is_override(argument: str) -> bool:
    """`a.b=value`, or Hydra's `~a.b`."""
    return not argument.startswith("-") and ("=" in argument or argument.startswith("~"))


class _Command(argparse.ArgumentParser):
    """A subcommand. A plugin's options are added when the command is called, so that other commands never load the plugin."""

    def parse_known_args(self, *arguments: Any, **keywords: Any) -> Any:
        if complete := self.get_default("complete"):
            complete(self)
        return super().parse_known_args(*arguments, **keywords)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rlcore", description="Reinforcement learning for language and vision-language models.",
        epilog="Exit status: 0 done, 2 your mistake (settings, data, a missing part), 1 the run failed, 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"rlcore {metadata.version('rlcore')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Command)
    for name, what in (
        ("grpo", "train by a policy gradient: the algorithm section (after a warm start, if sft is set)"),
        ("sft", "supervised training alone: the sft section; without data.train, only the evaluation"),
        ("dpo", "train on pairs of a preferred and a rejected response: the dpo section"),
    ):
        command = _command(commands, name, partial(run_training, f"rlcore.train.{name}.train"), what)
        _add_run_folder(command)
        _add_resume(command)
        _add_debug(command)
    what = "score a model on every set of data.eval, without training: sampled responses, each row once"
    command = _command(commands, "eval", run_evaluation, what)
    command.set_defaults(label="-eval", resume=False)
    _add_run_folder(command, "-eval")
    _add_model(command)
    _add_debug(command)
    launch = _command(commands, "launch", run_launch, "train over the devices of several nodes: the same line on each of them")
    _add_run_folder(launch)
    _add_resume(launch)
    launch.add_argument("--train", choices=TRAINERS, default=TRAINERS[0], help=f"what the head runs; default: {TRAINERS[0]}")
    _add_model(launch, " (with --train eval)")
    launch.set_defaults(complete=_add_launcher_options)
    _command(commands, "plan", run_plan, "what the run will do: prompts, samples, optimizer steps, micro-batches")
    _command(commands, "show", run_show, "every setting of the run, as YAML")
    _add_data(commands)
    _add_import_config(commands)
    _add_convert(commands)
    _add_doctor(commands)
    _add_check(commands)
    return parser


def _command(commands: argparse._SubParsersAction, name: str, run: object, what: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".")
    command.add_argument("file", metavar="RUN.yaml", help="the run file")
    command.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings that replace the run file's")
    installed = ", ".join(registry.names("backends"))
    command.add_argument("--backend", metavar="NAME", help=f"auto, {installed}; replaces backend.name")
    command.set_defaults(run=run, debug=False, label="")
    return command


def _add_data(commands: argparse._SubParsersAction) -> None:
    what = "write a published data set as training files: every split found, each row checked"
    command = commands.add_parser("data", help=what, description=what[0].upper() + what[1:] + ".")
    names, layouts = ", ".join(registry.names("preparations")), ", ".join(registry.names("layouts"))
    command.add_argument("name", metavar="NAME", help=f"the data set: {names}")
    command.add_argument(
        "--input", required=True, metavar="X",
        help="its files as published: a folder, a file, an id on the hub (org/name, at HF_ENDPOINT) or modelscope:org/name",
    )  # fmt: skip
    command.add_argument("--output", required=True, type=Path, metavar="DIR", help="a new folder, or the same call's of before")
    command.add_argument("--layout", default="ours", metavar="LAYOUT", help=f"whose columns: {layouts}; default: ours")
    command.add_argument(
        "--drop", action="append", default=[], metavar="REASON",
        help="leave out rows for this reason, as the command names it, even if they are more than half of a split",
    )  # fmt: skip
    command.set_defaults(run=run_data)


def _add_import_config(commands: argparse._SubParsersAction) -> None:
    what = "turn another framework's run file into one of ours, and say what became of each key"
    command = commands.add_parser("import-config", help=what, description=what[0].upper() + what[1:] + ".")
    command.add_argument("framework", metavar="FRAMEWORK", help=f"whose file it is: {', '.join(registry.names('run_files'))}")
    command.add_argument("file", type=Path, metavar="FILE", help="its YAML file; one that Hydra composes, composed (--cfg job)")
    command.add_argument("overrides", nargs="*", metavar="a.b=value", help="what follows it there; also +a.b=, ++a.b=, ~a.b")
    command.add_argument("--output", type=Path, metavar="RUN.yaml", help="a new file; default: standard output")
    command.add_argument("--rows", type=int, metavar="N", help="training rows, if the file counts passes over them")
    command.add_argument("--skip-unknown", action="store_true", help="leave out keys that are not known of the framework")
    command.set_defaults(run=run_import_config)


def _add_convert(commands: argparse._SubParsersAction) -> None:
    what = "convert a model's weights between formats: every tensor accounted for, written, read back and compared"
    command = commands.add_parser(
        "convert", help=what, description=what[0].upper() + what[1:] + ".",
        epilog="What follows ChatLearn's, RLinf's or MindSpeed-MM's own converter in a command may follow the format here.",
    )  # fmt: skip
    names = ", ".join(registry.names("weight_formats"))
    command.add_argument("formats", nargs="+", metavar="FROM [TO]", help=f"of {names}; TO is huggingface by default")
    command.add_argument("--input", metavar="X", help="the checkpoint: a folder, or a file")
    command.add_argument("--output", metavar="DIR", help="a new folder")
    command.add_argument("--base", metavar="DIR", help="Hugging Face folder of the model that was trained: config, tokenizer")
    command.add_argument("--dtype", choices=DTYPES, help="convert all weights; default: each tensor keeps its own")
    command.add_argument("--shard-size", type=float, default=5.0, metavar="GB", help="largest file; default: 5 (10^9 bytes)")
    command.set_defaults(run=run_convert, words=[])


def _add_doctor(commands: argparse._SubParsersAction) -> None:
    what = "look at this machine: devices, drivers, versions, ports, limits; what is wrong, with its remedy"
    command = commands.add_parser(
        "doctor", help=what, description=what[0].upper() + what[1:] + ".",
        epilog="Exit status: 0 nothing fails, 1 something does, 2 a wrong argument.",
    )  # fmt: skip
    installed = ", ".join(registry.names("doctors"))
    command.add_argument("--backend", metavar="NAME", default="auto", help=f"auto, {installed}; default: auto")
    command.add_argument("--json", action="store_true", help="one object instead of lines")
    command.add_argument("--versions", action="store_true", help="only the versions that belong together, as a Markdown table")
    command.set_defaults(run=run_doctor)


def _add_check(commands: argparse._SubParsersAction) -> None:
    what = "measure what every backend must do on this machine's devices: kernels, numbers, ranks, engine, a run that learns"
    command = commands.add_parser(
        "check", help=what, description=what[0].upper() + what[1:] + ".",
        epilog="Exit status: 0 everything is within its limit, 1 something is not, 2 a wrong argument.",
    )  # fmt: skip
    installed = ", ".join(registry.names("backends"))
    command.add_argument(
        "overrides", nargs="*", metavar="a.b=value", help="settings of the small run: backend.options, rollout.engine, ..."
    )
    command.add_argument("--backend", metavar="NAME", default="auto", help=f"auto, {installed}; default: auto")
    command.add_argument("--only", action="append", choices=SECTIONS, metavar="SECTION", help=f"of {', '.join(SECTIONS)}")
    command.add_argument(
        "--report", type=Path, metavar="FILE", help="what was found, to paste into an issue; default: rlcore-check-<backend>.md"
    )
    command.set_defaults(run=run_check)


def _add_run_folder(command: argparse.ArgumentParser, label: str = "") -> None:
    command.add_argument("--run-dir", type=Path, metavar="DIR", help=f"default: runs/<run file's name>{label}-<date>-<time>")


def _add_resume(command: argparse.ArgumentParser) -> None:
    command.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --run-dir")
    what = "--resume, even if settings have changed that make another run of it"
    command.add_argument("--resume-anyway", action="store_const", dest="resume", const=ANYWAY, help=what)


def _add_debug(command: argparse.ArgumentParser) -> None:
    command.add_argument("--debug", action="store_true", help="the same job in this process alone; breakpoint() is pdb")


def _add_model(command: argparse.ArgumentParser, when: str = "") -> None:
    what = "a model folder, a checkpoint, or a run folder for its latest one"
    command.add_argument("--model", type=Path, metavar="PATH", help=f"{what}{when}; default: the run file's model.path")


def _add_launcher_options(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("nodes", "Each can also be set as an environment variable: --ray-port as RAY_PORT.")
    for name, field in registry.load("launchers", LAUNCHER).Options.model_fields.items():
        flag, about = f"--{name.replace('_', '-')}", {"dest": field.alias, "default": None}
        if field.annotation is bool:
            group.add_argument(flag, action="store_true", help=field.description, **about)
        else:
            default = "" if field.is_required() or field.default is None else f"; default: {field.default}"
            group.add_argument(flag, metavar="X", help=f"{field.description}{default}", **about)
