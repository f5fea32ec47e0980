"""`rlcore plan` and `rlcore show`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from rlcore.cli.settings import load_settings, prepared_backend
from rlcore.config import loader
from rlcore.errors import ConfigError

if TYPE_CHECKING:
    from rlcore.device import Backend


def run_show(options: argparse.Namespace) -> None:
    print(loader.dump(load_settings(options)), end="")


def run_plan(options: argparse.Namespace) -> int:
    """Exit status: 1 if the run does not fit the device."""
    config = load_settings(options)
    backend = prepared_backend(config)
    absent = _prepare(backend)
    from rlcore.plan import batches, fit
    from rlcore.plan.planner import MemoryPlanner
    from rlcore.plan.tables import tables

    training, held_out = batches.read(config, backend)
    print(batches.describe(config, training, held_out))
    size = batches.device_bytes(backend, options.device_gib, absent)
    planner = MemoryPlanner(backend, batches.some(training), size)
    start = fit.planned(planner, config, backend, both=True)
    print(tables(start.pools, config, start.facts))
    if absent:
        print(f"\nno such device is here, which a plan does without: {absent}")
    if size is None:
        return 0
    text, fits = fit.report(planner, start, size)
    print(f"\n{text}")
    return 0 if fits else 1


def _prepare(backend: Backend) -> str | None:
    """Prepare the device, or what a plan needs where there is none: then, why there is none."""
    try:
        backend.prepare()
    except ConfigError as error:
        backend.prepare_host()
        return str(error)
    return None
