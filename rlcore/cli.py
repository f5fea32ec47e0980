"""The command line. Reads the run file and chooses the backend before anything heavy is imported."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import time
from bdb import BdbQuit
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlcore import config as configuration
from rlcore import jemalloc, registry
from rlcore.config import RunConfig
from rlcore.conformance import report as conformance
from rlcore.conformance.report import SECTIONS
from rlcore.errors import ConfigError, RlcoreError, WorkerDied
from rlcore.run_folder import RECORD, Claim

if TYPE_CHECKING:
    from rlcore.backend import Backend
    from rlcore.console import Console

INTERRUPTED = 130
LAUNCHER = "ray"
_HOLDS_A_RUN = "--run-dir: {} already holds a run; give --resume to go on with it, or another folder"
ALONE = (
    "placement.kind=local", "placement.devices=1", "placement.pools={}", "placement.max_staleness=0", "placement.options={}",
    "placement.stall_seconds=0", "sharding.replicas=1", "sharding.sequence_parallel=1", "rollout.tensor_parallel=1",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 the user's mistake, 1 the run failed, 130 interrupted."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if wrong := [argument for argument in rest if argument.startswith("-") or "=" not in argument]:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if rest and "overrides" not in options:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # overrides that stand behind an option
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


class _Command(argparse.ArgumentParser):
    """A subcommand. Options that a plugin brings are asked for when the command is called: other commands never load it."""

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
    for name, module, what in (
        ("grpo", "rlcore.trainer", "train by a policy gradient: the algorithm section (after the warm start, if sft is set)"),
        ("sft", "rlcore.sft", "supervised training alone: the sft section"),
        ("dpo", "rlcore.dpo", "train on pairs of a preferred and a rejected response: the dpo section"),
    ):
        command = _command(commands, name, partial(_train, module), what)
        _add_run_folder(command)
        command.add_argument("--debug", action="store_true", help="the same job in this process alone; breakpoint() is pdb")
    launch = _command(commands, "launch", _launch, "train over the devices of several nodes: the same line on each of them")
    _add_run_folder(launch)
    launch.add_argument("--train", choices=("grpo", "sft", "dpo"), default="grpo", help="what the head runs; default: grpo")
    launch.set_defaults(complete=_add_launcher_options)
    _command(commands, "plan", _plan, "what the run will do: prompts, samples, optimizer steps, micro-batches")
    _command(commands, "show", _show, "every setting of the run, as YAML")
    _add_doctor(commands)
    _add_check(commands)
    return parser


def _command(commands: argparse._SubParsersAction, name: str, run: object, what: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".")
    command.add_argument("file", metavar="RUN.yaml", help="the run file")
    command.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings that replace the run file's")
    installed = ", ".join(registry.names("backends"))
    command.add_argument("--backend", metavar="NAME", help=f"auto, {installed}; replaces backend.name")
    command.set_defaults(run=run, debug=False)
    return command


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
    command.set_defaults(run=_doctor)


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
    command.set_defaults(run=_check)


def _add_run_folder(command: argparse.ArgumentParser) -> None:
    command.add_argument("--run-dir", type=Path, metavar="DIR", help="default: runs/<run file's name>-<date>-<time>")
    command.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --run-dir")


def _add_launcher_options(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("nodes", "Each can also be set as an environment variable: --ray-port as RAY_PORT.")
    for name, field in registry.load("launchers", LAUNCHER).Options.model_fields.items():
        flag, about = f"--{name.replace('_', '-')}", {"dest": field.alias, "default": None}
        if field.annotation is bool:
            group.add_argument(flag, action="store_true", help=field.description, **about)
        else:
            default = "" if field.is_required() or field.default is None else f"; default: {field.default}"
            group.add_argument(flag, metavar="X", help=f"{field.description}{default}", **about)


def _load(options: argparse.Namespace) -> RunConfig:
    chosen = [f"backend.name={options.backend}"] if options.backend else []
    config = configuration.load(options.file, [*options.overrides, *chosen, *(ALONE if options.debug else ())])
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


def _doctor(options: argparse.Namespace) -> int:
    from rlcore import doctor

    if options.versions:
        print(doctor.table())
        return 0
    choice = doctor.choose(options.backend)
    if not options.json:
        print(f"backend: {choice.name} ({choice.why})", flush=True)
    findings = []
    for finding in doctor.examine(choice.name):
        findings.append(finding)
        if not options.json:
            print(doctor.line(finding), flush=True)
    print(doctor.as_json(choice, findings) if options.json else doctor.closing(findings))
    return 1 if doctor.failed(findings) else 0


def _check(options: argparse.Namespace) -> int:
    from rlcore import doctor

    name, devices = options.backend, "not looked for: it has no doctor"
    if name == "auto" or name in registry.names("doctors"):
        choice = doctor.choose(name)
        name, devices = choice.name, choice.devices.seen
        print(f"backend: {name} ({choice.why})")
    with as_file(files("rlcore.conformance") / "run.yaml") as file:
        config = configuration.load(file, [f"backend.name={name}", *options.overrides])
    _check_installed(config)
    path = options.report or Path(f"rlcore-check-{name}.md")
    if not path.parent.is_dir():
        raise ConfigError(f"--report: {path.parent} is no folder; give a file in one")
    _prepared(config)
    sections = []
    for section in options.only or SECTIONS:
        print(f"{section}: {SECTIONS[section]}", flush=True)
        for found in conformance.run(section, config):
            if isinstance(found, conformance.Section):
                sections.append(found)
            else:
                print(conformance.line(found), flush=True)
    path.write_text(conformance.markdown(config, devices, sections), encoding="utf-8")
    print(f"{conformance.closing(sections)}; report: {path}")
    return 1 if any(section.failures for section in sections) else 0


def _show(options: argparse.Namespace) -> None:
    print(configuration.dump(_load(options)), end="")


def _plan(options: argparse.Namespace) -> None:
    config = _load(options)
    backend = _prepared(config)
    from rlcore import plan

    print(plan.describe(config, *plan.read(config, backend)))


def _train(module: str, options: argparse.Namespace) -> None:
    config = _load(options)
    backend = _prepared(config)
    folder = _run_folder(options)
    with Claim(folder) as claim:
        if options.resume:
            claim.take()
        train = importlib.import_module(module).train
        from rlcore.console import Console

        _hush()
        console = Console(config.logging.samples_on_console)
        if config.placement.offload and "JEMALLOC" not in os.environ and jemalloc.of_malloc() is None:
            remedy = f"{jemalloc.INSTALL}, and preload it (docs/launching.md), or set JEMALLOC=off"
            console.warn(f"placement.offload: malloc is not jemalloc's: {jemalloc.CONSEQUENCE}; {remedy}")
        run = partial(train, config, backend, folder, console=console, begin=partial(_begin, claim, config))
        _restarting(run, folder, options.resume, config.placement.max_restarts, console)
    _closing(folder)


def _restarting(run: Callable[..., None], folder: Path, resume: bool, restarts: int, console: Console) -> None:
    """The run, and again from its last checkpoint when a worker died, as often as may be."""
    for left in range(restarts, -1, -1):
        try:
            return run(resume=resume)
        except WorkerDied as error:
            latest = folder / "checkpoints" / "latest"
            if not left or not latest.exists():
                raise
            console.warn(f"{error}; restarting from {latest.read_text().strip()}, {left - 1} restarts are left")
            resume = True


def _launch(options: argparse.Namespace) -> int:
    """The exit status of the trainer, a process of its own on one of the nodes. Each of them checks the settings first."""
    kind = registry.load("launchers", LAUNCHER)
    given = {field.alias: getattr(options, field.alias) for field in kind.Options.model_fields.values()}
    launcher = kind({name: value for name, value in given.items() if value is not None}, os.environ)
    options.overrides = [*_placed(options, launcher.devices), *options.overrides]
    config = _load(options)
    wanted = sum(devices for _, devices, _ in config.pools())
    if launcher.devices is not None and wanted > launcher.devices:
        raise ConfigError(f"placement: {wanted} devices, but all nodes have {launcher.devices}; lower it, or add nodes")
    place = [*(["--run-dir", str(options.run_dir)] if options.run_dir else []), *(["--resume"] if options.resume else [])]
    chosen = ["--backend", options.backend] if options.backend else []
    trainer = [sys.executable, "-m", "rlcore.cli", options.train, options.file, *options.overrides, *chosen, *place]
    return launcher.run(trainer, _backend(config))


def _placed(options: argparse.Namespace, devices: int | None) -> list[str]:
    """The run on all devices of the launcher's nodes, unless the run file says on how many."""
    said = configuration.read(options.file, options.overrides).get("placement")
    silent = devices is not None and not (isinstance(said, dict) and said.keys() & {"devices", "pools"})
    return [f"placement.kind={LAUNCHER}", *([f"placement.devices={devices}"] if silent else [])]


def _prepared(config: RunConfig) -> Backend:
    """The chosen backend, with its environment in place: torch reads it when it is imported, which comes later."""
    backend = _backend(config)
    backend.settle(os.environ)
    return backend


def _backend(config: RunConfig) -> Backend:
    """That of the run file; `auto` is the one whose devices are here, and says so."""
    name = config.backend.name
    if name == "auto":
        from rlcore import doctor

        choice = doctor.choose()
        name = choice.name
        print(f"backend: {name} ({choice.why})")
    kind = registry.load("backends", name)
    return kind(configuration.validate(kind.Options, config.backend.options, "backend.options."))


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
        raise ConfigError(_HOLDS_A_RUN.format(folder))
    return folder


def _begin(claim: Claim, config: RunConfig) -> None:
    """Make the run folder and its record, unless the run goes on in one."""
    folder, going_on = claim.folder, claim.taken
    claim.take()
    recorded = (folder / RECORD).exists()
    if recorded and not going_on:  # another run began while this one was loading
        raise ConfigError(_HOLDS_A_RUN.format(folder))
    print(f"run folder: {folder}", flush=True)
    if recorded:
        return
    try:
        (folder / "environment.json").write_text(json.dumps(_environment(), indent=1) + "\n", encoding="utf-8")
        (folder / RECORD).write_text(configuration.dump(config), encoding="utf-8")
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
