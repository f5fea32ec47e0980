"""Write a published data set as training files of a layout."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rlcore import registry
from rlcore.data.files.hub import local
from rlcore.data.files.published import files_by_split
from rlcore.data.files.record import Record
from rlcore.data.files.records import opened
from rlcore.data.files.splits import missing_shards
from rlcore.data.prepare.output import OutputFolder, row_file
from rlcore.data.prepare.preparation import Layout, Origin, Preparation, UnusableRow
from rlcore.errors import ConfigError

_AT_ONCE = 32  # records in memory


@dataclass
class Dropped:
    """Rows left out for one reason."""

    first: str  # where the first stands, and what is wrong with it
    count: int = 0


@dataclass
class SplitCount:
    """What became of one split."""

    split: str
    file: str  # "" where no row was left to write
    kept: int = 0
    dropped: dict[str, Dropped] = field(default_factory=dict)  # by reason
    missing: str = ""  # which of the published files are not there

    @property
    def lost(self) -> int:
        return sum(one.count for one in self.dropped.values())


def prepare(name: str, source: str, output: Path, layout: str = "ours", drop: Collection[str] = ()) -> list[SplitCount]:
    """Write every split of the data set `source` (a file, a folder, an id on a hub) into the folder `output`.

    Rows that are unusable are left out and counted. ConfigError, and nothing is written, when they are more than half of a
    split, reasons in `drop` not counted, or when no row at all is left.
    """
    preparation: Preparation = registry.load("preparations", name)
    form: Layout = registry.load("layouts", layout)
    place = local(source)
    found = files_by_split(place)
    folder = OutputFolder(output, {"name": name, "input": str(place.resolve()), "layout": layout, "drop": sorted(drop)})
    with folder.draft() as draft:
        counts = [_write_split(draft, preparation, form, layout, split, files, drop) for split, files in found.items()]
        if not any(count.kept for count in counts):
            raise ConfigError(f"{source}: no row is usable: {'; '.join(map(_said, counts))}")
    return counts


def _write_split(
    draft: Path, preparation: Preparation, form: Layout, layout: str, split: str, files: list[Path], drop: Collection[str]
) -> SplitCount:
    count = SplitCount(split, form.file(split, preparation.images), missing=missing_shards(files))
    records, convert = opened(files), partial(_row, preparation, form, layout, split)
    with ThreadPoolExecutor() as threads, row_file(draft / count.file, form.types()) as written:
        with tqdm(enumerate(records), split, len(records), unit="row", leave=False, disable=not sys.stderr.isatty()) as bar:
            for group in _groups(bar, _AT_ONCE):
                rows = list(threads.map(convert, group))
                written.write(good := [row for row in rows if not isinstance(row, UnusableRow)])
                count.kept += len(good)
                for bad in (row for row in rows if isinstance(row, UnusableRow)):
                    count.dropped.setdefault(bad.reason, Dropped(str(bad))).count += 1
    unasked = sum(one.count for reason, one in count.dropped.items() if reason not in drop)
    if 2 * unasked > count.kept + count.lost:
        raise ConfigError(
            f"{_said(count)}; check that {files[0].parent} holds the data set of that name, or leave such rows out with"
            f" {' '.join(f'--drop {reason}' for reason in count.dropped)}"
        )
    if not count.kept:
        (draft / count.file).unlink(missing_ok=True)
        count.file = ""
    return count


def _row(preparation: Preparation, form: Layout, layout: str, split: str, numbered: tuple[int, Record]) -> Any:
    """A record's columns, or the UnusableRow that it is."""
    index, record = numbered
    instruction = preparation.instructions.get(layout, "")
    try:
        example = preparation.read(record)
    except UnusableRow as error:
        return error
    return form(example, Origin(preparation.source, preparation.ability, split, index, instruction))


def _said(count: SplitCount) -> str:
    reasons = ", ".join(f"{reason} {one.count} (first: {one.first})" for reason, one in count.dropped.items())
    return f"{count.split}: {count.lost} of {count.kept + count.lost} rows are left out: {reasons}"


def _groups(values: Iterable[Any], size: int) -> Iterator[list[Any]]:
    source = iter(values)
    while group := list(islice(source, size)):
        yield group
