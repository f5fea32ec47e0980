"""The run file of a command, checked against what is installed, and its backend."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from rlcore import registry
from rlcore.config import loader
from rlcore.config.schema import RunConfig

if TYPE_CHECKING:
    from rlcore.device import Backend

ALONE = (
    "placement.kind=local", "placement.devices=1", "placement.pools={}", "placement.max_staleness=0", "placement.options={}",
    "placement.stall_seconds=0", "sharding.replicas=1", "sharding.sequence_parallel=1", "rollout.tensor_parallel=1",
)  # fmt: skip


def load_settings(options: argparse.Namespace) -> RunConfig:
    chosen = [f"backend.name={options.backend}"] if options.backend else []
    config = loader.load(options.file, [*options.overrides, *chosen, *(ALONE if options.debug else ())])
    check_installed(config)
    return config


def check_installed(config: RunConfig) -> None:
    """Check every plugin name; PluginError names an unknown one with its setting, before anything heavy is imported."""
    wanted = [
        ("backends", "backend.name", config.backend.name),
        ("rollout_engines", "rollout.engine", config.rollout.engine),
        ("placements", "placement.kind", config.placement.kind),
        ("families", "model.family", config.model.family),
        *(("datasets", f"{key}.name", one.name) for key, one in config.data.training_sets.items()),
        *(("datasets", f"{key}.name", one.name) for key, one in config.data.held_out_sets.items()),
        *(("rewards", f"reward.{key}.name", reward.name) for key, reward in config.rewards.items()),
    ]
    for group, key, name in wanted:
        if name != "auto" and "." not in name:
            registry.check(group, name, key)


def prepared_backend(config: RunConfig) -> Backend:
    """The chosen backend, with its environment variables set: torch reads them at import, which comes later."""
    backend = chosen_backend(config)
    backend.apply_environment(os.environ)
    return backend


def chosen_backend(config: RunConfig) -> Backend:
    """Load the run file's backend; `auto` picks the one whose devices are present and prints it."""
    name = config.backend.name
    if name == "auto":
        from rlcore.diagnose import doctor

        choice = doctor.choose()
        name = choice.name
        print(f"backend: {name} ({choice.why})")
    kind = registry.load("backends", name)
    return kind(loader.validate(kind.Options, config.backend.options, "backend.options."))
