"""Parquet and Arrow files, one row group or record batch at a time. Images stay as they are stored."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from rlcore.data.files.lines import repeated
from rlcore.data.files.record import Record, record
from rlcore.data.lazy import LazySequence
from rlcore.errors import ConfigError

_HELD_BYTES = 64 * 2**20  # row groups that a file keeps, beside the last one read
_LARGEST_GROUP = 2**30


class ParquetFile(LazySequence[Record]):
    """Rows of a parquet file. Accessing one reads its row group, of which the last few stay in memory.

    ConfigError for a row group of more than a GiB, which every access would read whole.
    """

    def __init__(self, file: Path) -> None:
        import pyarrow
        from pyarrow import parquet

        self._file, self._lock = file, threading.Lock()
        self._groups: OrderedDict[int, Any] = OrderedDict()
        try:
            self._table = parquet.ParquetFile(file)
            metadata = self._table.metadata
            groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
            _check_columns(self._table.schema_arrow.names, file)
        except (pyarrow.ArrowException, OSError) as error:
            raise _unreadable(file, error) from None
        largest = max((group.total_byte_size for group in groups), default=0)
        if largest > _LARGEST_GROUP:
            raise ConfigError(
                f"{file}: a row group has {largest / 2**30:.1f} GiB, and reading a row reads its whole group; write the file"
                " again in smaller groups: pyarrow.parquet.write_table(table, path, row_group_size=100)"
            )
        self._ends = list(accumulate(group.num_rows for group in groups))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def at(self, index: int) -> Record:
        number = bisect_right(self._ends, index)
        group = self._group(number)
        row = index - (self._ends[number - 1] if number else 0)
        return record(f"{self._file.name} row {index + 1}", self._file, index + 1, _values(group, row, self._file))

    def _group(self, number: int) -> Any:
        import pyarrow

        with self._lock:
            group = self._groups.pop(number, None)
            if group is None:
                try:
                    group = _widened(self._table.read_row_group(number))
                except (pyarrow.ArrowException, OSError) as error:
                    raise _unreadable(self._file, error) from None
            self._groups[number] = group
            while len(self._groups) > 1 and sum(table.nbytes for table in self._groups.values()) > _HELD_BYTES:
                self._groups.popitem(last=False)
            return group


class ArrowFile(LazySequence[Record]):
    """Rows of an Arrow file (stream or file format), as `datasets` saves them. The file is mapped: what is used is read."""

    def __init__(self, file: Path) -> None:
        import pyarrow

        self._file = file
        try:
            self._table = _arrow_table(file)
        except (pyarrow.ArrowException, OSError) as error:
            raise _unreadable(file, error) from None
        _check_columns(self._table.schema.names, file)

    def __len__(self) -> int:
        return self._table.num_rows

    def at(self, index: int) -> Record:
        values = _values(_widened(self._table.slice(index, 1)), 0, self._file)
        return record(f"{self._file.name} row {index + 1}", self._file, index + 1, values)


def _arrow_table(file: Path) -> Any:
    import pyarrow

    source = pyarrow.memory_map(str(file))
    try:
        return pyarrow.ipc.open_stream(source).read_all()
    except pyarrow.ArrowInvalid:
        return pyarrow.ipc.open_file(source).read_all()


def _values(table: Any, row: int, file: Path) -> dict[str, Any]:
    import pyarrow

    try:
        return table.slice(row, 1).to_pylist()[0]
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise _unreadable(file, error) from None


def _widened(table: Any) -> Any:
    """Convert single-precision columns to doubles with the same digits: 0.1 stays 0.1, not 0.10000000149011612."""
    import pyarrow

    for index, field in enumerate(table.schema):
        if field.type in (pyarrow.float16(), pyarrow.float32()):
            column = table.column(index).cast(pyarrow.float32()).cast(pyarrow.string()).cast(pyarrow.float64())
            table = table.set_column(index, field.name, column)
    return table


def _check_columns(names: Sequence[str], file: Path) -> None:
    if twice := repeated(names):
        raise ConfigError(f"{file}: two columns are called {twice!r}; rename one")


def _unreadable(file: Path, error: Exception) -> ConfigError:
    return ConfigError(f"{file}: not a readable {file.suffix[1:]} file: {error}")
