"""`rlcore data`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from rlcore import registry

if TYPE_CHECKING:
    from rlcore.data.prepare.prepare import SplitCount


def run_data(options: argparse.Namespace) -> None:
    registry.check("preparations", options.name, "NAME")
    registry.check("layouts", options.layout, "--layout")
    from rlcore.data.prepare.prepare import prepare

    for count in prepare(options.name, options.input, options.output, options.layout, options.drop):
        print(_lines(count, options))


def _lines(count: SplitCount, options: argparse.Namespace) -> str:
    where = f"-> {options.output / count.file}" if count.file else "are left, so no file is written"
    rows = "1 row" if count.kept == 1 else f"{count.kept} rows"
    missing = f" (warning: {count.missing})" if count.missing else ""
    dropped = [
        f"    {one.count} {'row is' if one.count == 1 else 'rows are'} left out: {reason}; the first is {one.first}"
        for reason, one in count.dropped.items()
    ]
    return "\n".join([f"{count.split}: {rows} {where}{missing}", *dropped])
