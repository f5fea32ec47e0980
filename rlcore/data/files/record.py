"""One unprocessed row of a data file, and what its values may be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from rlcore.errors import ConfigError, nearest


class MissingColumn(ConfigError):
    """A row has no `column`, which may be a dotted one."""

    def __init__(self, message: str, column: str) -> None:
        super().__init__(message)
        self.column = column


@dataclass(frozen=True)
class Record:
    """One row, by column."""

    where: str  # for error messages: `train.jsonl:17` or `train.parquet row 17`, counted from 1
    id: str  # `train:17`
    folder: Path  # the file's folder; image paths are relative to it
    values: Mapping[str, Any]

    def value(self, column: str) -> Any:
        """The column's value; `a.b` is the field b of the column a, where no column has that name. ConfigError that lists the
        columns (or fields) when it is missing."""
        values, name = self.values, column
        while name not in values:
            head, dot, rest = name.partition(".")
            if not dot or not isinstance(values.get(head), Mapping):
                raise MissingColumn(f"{self.where}: {_missing(column, name, values)}", column)
            values, name = values[head], rest
        return values[name]

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


def _missing(column: str, name: str, values: Mapping[str, Any]) -> str:
    """What is there instead of `name`, the part of a dotted `column` that `values` lacks."""
    parent = column.removesuffix(name).rstrip(".")
    hint = nearest(name, list(values))
    hint = hint if "did you mean" in hint else ""
    what = f"no field {name!r} in the column {parent!r}, which has" if parent else f"no column {name!r} among"
    return f"{what} {', '.join(values) or 'none'}{hint}"


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


def _digits(number: int | float | Decimal) -> str:
    """Format without exponent and trailing zeros: 18.0, which tables make of 18 in a column with gaps, is 18."""
    if isinstance(number, int):
        return str(number)
    whole, _, rest = format(Decimal(str(number or 0)), "f").partition(".")
    return f"{whole}.{rest}".rstrip("0").rstrip(".") if rest else whole


def record(where: str, file: Path, number: int, values: Any) -> Record:
    """The record at row or line `number` of a file; ConfigError for values that are no columns, or no text."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: a row is an object with columns, this is a {type(values).__name__}")
    for column, value in values.items():
        check_text(column, f"{where}: the name of a column")
        check_text(value, f"{where}: column {column!r}")
    return Record(where, f"{file.stem}:{number}", file.parent, values)
