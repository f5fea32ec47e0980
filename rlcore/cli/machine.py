"""`rlcore doctor` and `rlcore check`."""

from __future__ import annotations

import argparse
from importlib.resources import as_file, files
from pathlib import Path

from rlcore import registry
from rlcore.cli.settings import check_installed, prepared_backend
from rlcore.config import loader
from rlcore.diagnose.conformance import report as conformance
from rlcore.diagnose.conformance.report import SECTIONS
from rlcore.errors import ConfigError


def run_doctor(options: argparse.Namespace) -> int:
    from rlcore.diagnose import doctor

    if options.versions:
        print(doctor.table())
        return 0
    choice = doctor.choose(options.backend)
    if not options.json:
        print(f"backend: {choice.name} ({choice.why})", flush=True)
    results = []
    for result in doctor.examine(choice.name):
        results.append(result)
        if not options.json:
            print(doctor.line(result), flush=True)
    print(doctor.as_json(choice, results) if options.json else doctor.closing(results))
    return 1 if doctor.failed(results) else 0


def run_check(options: argparse.Namespace) -> int:
    from rlcore.diagnose import doctor

    name, devices = options.backend, "not looked for: it has no doctor"
    if name == "auto" or name in registry.names("doctors"):
        choice = doctor.choose(name)
        name, devices = choice.name, choice.devices.seen
        print(f"backend: {name} ({choice.why})")
    with as_file(files("rlcore.diagnose.conformance") / "run.yaml") as file:
        config = loader.load(file, [f"backend.name={name}", *options.overrides])
    check_installed(config)
    path = options.report or Path(f"rlcore-check-{name}.md")
    if not path.parent.is_dir():
        raise ConfigError(f"--report: {path.parent} is no folder; give a file in one")
    prepared_backend(config)
    return 0 if conformance.check(config, devices, options.only or tuple(SECTIONS), path) else 1
