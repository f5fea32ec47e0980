"""`rlcore plan` and `rlcore show`."""

from __future__ import annotations

import argparse

from rlcore.cli.settings import load_settings, prepared_backend
from rlcore.config import loader


def run_show(options: argparse.Namespace) -> None:
    print(loader.dump(load_settings(options)), end="")


def run_plan(options: argparse.Namespace) -> None:
    config = load_settings(options)
    backend = prepared_backend(config)
    from rlcore.train import plan

    print(plan.describe(config, *plan.read(config, backend)))
