"""`rlcore import-config`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from rlcore import registry
from rlcore.atomic import replace_file
from rlcore.config.foreign.conversion import convert
from rlcore.config.foreign.document import read_document
from rlcore.config.foreign.report import report, run_file
from rlcore.config.foreign.table import Table
from rlcore.errors import ConfigError, RunError


def run_import_config(options: argparse.Namespace) -> None:
    registry.check("run_files", options.framework, "FRAMEWORK")
    if options.output is not None and options.output.exists():
        raise ConfigError(f"--output: {options.output} is there already; give another name, or remove it")
    table: Table = registry.load("run_files", options.framework)
    document = read_document(options.file, options.overrides, table, table.defaults, os.environ)
    conversion = convert(table, document, options.rows, options.skip_unknown)
    written = run_file(conversion)
    print(report(conversion), file=sys.stderr)
    if options.output is None:
        print(written, end="")
    else:
        _write(options.output, written)


def _write(path: Path, text: str) -> None:
    try:
        replace_file(path, text)
    except OSError as error:
        raise RunError(f"--output: {path} cannot be written: {error}") from error
