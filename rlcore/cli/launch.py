"""`rlcore launch`: the same command on every node."""

from __future__ import annotations

import argparse
import os
import sys

from rlcore import registry
from rlcore.cli.settings import chosen_backend, load_settings
from rlcore.cli.train import ANYWAY
from rlcore.config import loader
from rlcore.errors import ConfigError

LAUNCHER = "ray"
TRAINERS = ("grpo", "sft", "dpo", "eval")


def run_launch(options: argparse.Namespace) -> int:
    """Run the trainer as a process on one of the nodes; returns its exit status. Every node checks the settings first."""
    kind = registry.load("launchers", LAUNCHER)
    given = {field.alias: getattr(options, field.alias) for field in kind.Options.model_fields.values()}
    launcher = kind({name: value for name, value in given.items() if value is not None}, os.environ)
    options.overrides = [*_placed(options, launcher.devices), *options.overrides]
    config = load_settings(options)
    wanted = config.topology.devices
    if launcher.devices is not None and wanted > launcher.devices:
        raise ConfigError(f"placement: {wanted} devices, but all nodes have {launcher.devices}; lower it, or add nodes")
    trainer = [sys.executable, "-m", "rlcore", options.train, options.file, *options.overrides, *_passed_on(options)]
    return launcher.run(trainer, chosen_backend(config))


def _passed_on(options: argparse.Namespace) -> list[str]:
    """Options of the trainer's command; ConfigError for one that it does not have."""
    evaluates = options.train == "eval"
    if options.model and not evaluates:
        raise ConfigError(f"--model: is what rlcore eval scores; {options.train} reads model.path")
    if options.resume and evaluates:
        raise ConfigError("--resume: an evaluation is not resumed; start it again")
    named = {"--backend": options.backend, "--run-dir": options.run_dir, "--model": options.model}
    given = [part for name, value in named.items() if value for part in (name, str(value))]
    return [*given, *({ANYWAY: ["--resume-anyway"], True: ["--resume"]}.get(options.resume, []))]


def _placed(options: argparse.Namespace, devices: int | None) -> list[str]:
    """Overrides that place the run on all devices of the launcher's nodes, unless the run file says on how many."""
    said = loader.read(options.file, options.overrides).get("placement")
    silent = devices is not None and not (isinstance(said, dict) and said.keys() & {"devices", "pools"})
    return [f"placement.kind={LAUNCHER}", *([f"placement.devices={devices}"] if silent else [])]
