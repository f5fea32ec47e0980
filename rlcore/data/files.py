"""Read records from data files, each with its location for error messages."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from rlcore.errors import ConfigError, nearest

SUFFIXES = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Record:
    """One unprocessed row of a data file."""

    where: str  # for error messages: `train.jsonl:17` or `train.parquet row 17`, counted from 1
    id: str  # `train:17`
    folder: Path  # the file's folder; image paths are relative to it
    values: Mapping[str, Any]

    def value(self, column: str) -> Any:
        """The column's value; ConfigError that lists the columns when it is missing."""
        if column not in self.values:
            columns = list(self.values)
            hint = nearest(column, columns)
            hint = hint if "did you mean" in hint else ""
            raise ConfigError(f"{self.where}: no column {column!r} among {', '.join(columns) or 'none'}{hint}")
        return self.values[column]

    def text(self, column: str) -> str:
        """A text or number as text; ConfigError when it is missing, blank or neither. Booleans are neither: the data must spell
        them out."""
        value = self.value(column)
        if value is None or value != value or (isinstance(value, str) and not value.strip()):
            raise ConfigError(f"{self.where}: column {column!r} is empty; fill it or remove the row")
        if isinstance(value, str):
            return value
        if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
            raise ConfigError(f"{self.where}: column {column!r} holds a {type(value).__name__}; it must be a text or a number")
        if not isinstance(value, int) and not math.isfinite(value):
            raise ConfigError(f"{self.where}: column {column!r} holds {value}; it must be a text or a finite number")
        return _digits(value)

    def without(self, *columns: str | None) -> dict[str, Any]:
        """The other columns, without bytes: the fields passed to a reward."""
        return {name: value for name, value in self.values.items() if name not in columns and not isinstance(value, bytes)}


def check_text(value: Any, what: str) -> None:
    """ConfigError for a text at any depth that UTF-8 cannot encode: half of a surrogate pair, as from a cut emoji."""
    rest = [value]
    while rest:
        value = rest.pop()
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError as error:
                half = f"\\u{ord(value[error.start]):04x}, half of a surrogate pair, at character {error.start + 1}"
                raise ConfigError(f"{what} holds {half}; write the whole character or remove the row") from None
        elif isinstance(value, Mapping):
            rest += [*value, *value.values()]
        elif isinstance(value, list | tuple):
            rest += value


def tried(path: str | Path) -> str:
    """Hint for the error on a missing path: what a relative path was resolved to."""
    path = Path(path)
    return "" if path.is_absolute() else f"; a relative path starts at the working directory: no {path.absolute()}"


def read_records(path: str | Path | None) -> Iterator[Record]:
    """Read a .jsonl, .json (lines or one list) or .parquet file, or a folder of files of one of these kinds.

    ConfigError for a missing or unreadable file, an unknown suffix, a broken line (with its number), and no rows at all.
    """
    count = 0
    for file in _files(path):
        for record in _READERS[file.suffix](file):
            count += 1
            yield record
    if not count:
        raise ConfigError(f"{path}: holds no rows")


def _files(path: str | Path | None) -> list[Path]:
    if path is None:
        raise ConfigError(f"this data set is read from files; set its path to a {', '.join(SUFFIXES)} file or a folder of them")
    path = Path(path).expanduser()
    if not path.exists():
        raise ConfigError(f"{path}: no such data file or folder{tried(path)}")
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
        kinds = sorted({file.suffix for file in files})
        if len(kinds) != 1:
            found = " and ".join(kinds) or "no data files"
            raise ConfigError(f"{path}: a data folder holds files of one kind of {', '.join(SUFFIXES)}, this has {found}")
    elif path.suffix not in SUFFIXES:
        raise ConfigError(f"{path}: unknown suffix {path.suffix!r}; a data file is {', '.join(SUFFIXES)}")
    return files


def _read_json(file: Path) -> Iterator[Record]:
    try:
        with file.open(encoding="utf-8-sig") as lines:
            if file.suffix == ".json" and lines.read(64).lstrip().startswith("["):
                lines.seek(0)
                yield from _read_list(file, lines.read())
                return
            lines.seek(0)
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    where = f"{file.name}:{number}"
                    yield _record(where, file, number, _parse(line, where))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: cannot be read: {error}; save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from None


def _read_list(file: Path, text: str) -> Iterator[Record]:
    for number, values in enumerate(_parse(text, file.name), start=1):
        yield _record(f"{file.name} row {number}", file, number, values)


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a ValueError too
        raise ConfigError(f"{where}: not valid JSON: {error}; a line holds one object; a .json file may be one list") from None


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError(f"{_twice(name for name, _ in pairs)!r} stands twice in an object")
    return values


def _twice(names: Iterable[str]) -> str:
    """The most frequent name."""
    return Counter(names).most_common(1)[0][0]


def _read_parquet(file: Path) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        table = parquet.ParquetFile(file)
        names = table.schema_arrow.names
        if len(set(names)) < len(names):
            raise ConfigError(f"{file}: two columns are called {_twice(names)!r}; rename one")
        for batch in table.iter_batches(batch_size=256):
            for values in _widened(batch).to_pylist():
                number += 1
                yield _record(f"{file.name} row {number}", file, number, values)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not a readable parquet file: {error}") from None


def _widened(batch: Any) -> Any:
    """Convert single-precision columns to doubles with the same digits: 0.1 stays 0.1, not 0.10000000149011612."""
    import pyarrow

    for index, field in enumerate(batch.schema):
        if field.type in (pyarrow.float16(), pyarrow.float32()):
            column = batch.column(index).cast(pyarrow.float32()).cast(pyarrow.string()).cast(pyarrow.float64())
            batch = batch.set_column(index, field.name, column)
    return batch


def _digits(number: int | float | Decimal) -> str:
    """Format without exponent and trailing zeros: 18.0, which tables make of 18 in a column with gaps, is 18."""
    if isinstance(number, int):
        return str(number)
    whole, _, rest = format(Decimal(str(number or 0)), "f").partition(".")
    return f"{whole}.{rest}".rstrip("0").rstrip(".") if rest else whole


def _record(where: str, file: Path, number: int, values: Any) -> Record:
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: a row is an object with columns, this is a {type(values).__name__}")
    for column, value in values.items():
        check_text(column, f"{where}: the name of a column")
        check_text(value, f"{where}: column {column!r}")
    return Record(where, f"{file.stem}:{number}", file.parent, values)


_READERS = {".jsonl": _read_json, ".json": _read_json, ".parquet": _read_parquet}
