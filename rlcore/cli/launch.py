"""`rlcore launch`: the same command on every node."""

from __future__ import annotations

import argparse
import os
import sys

from rlcore import registry
from rlcore.cli.settings import chosen_backend, load_settings
from rlcore.config import loader
from rlcore.errors import ConfigError

LAUNCHER = "ray"


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
    place = [*(["--run-dir", str(options.run_dir)] if options.run_dir else []), *(["--resume"] if options.resume else [])]
    chosen = ["--backend", options.backend] if options.backend else []
    trainer = [sys.executable, "-m", "rlcore", options.train, options.file, *options.overrides, *chosen, *place]
    return launcher.run(trainer, chosen_backend(config))


def _placed(options: argparse.Namespace, devices: int | None) -> list[str]:
    """Overrides that place the run on all devices of the launcher's nodes, unless the run file says on how many."""
    said = loader.read(options.file, options.overrides).get("placement")
    silent = devices is not None and not (isinstance(said, dict) and said.keys() & {"devices", "pools"})
    return [f"placement.kind={LAUNCHER}", *([f"placement.devices={devices}"] if silent else [])]
