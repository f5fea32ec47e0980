"""JSON files: lines, found by their offsets, or one list."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlcore.data.files.record import Record, record
from rlcore.data.lazy import LazySequence
from rlcore.errors import ConfigError

_BLOCK = 1 << 22  # bytes of a file that are searched for line ends at a time
_MARK = b"\xef\xbb\xbf"  # byte order mark


class JsonLines(LazySequence[Record]):
    """One object per line; blank lines are skipped. Holds the offset of every line, 16 bytes each."""

    def __init__(self, file: Path) -> None:
        self._file = file
        try:
            self._open = file.open("rb")
            self._starts, self._numbers = _lines(self._open.fileno())
        except OSError as error:
            raise ConfigError(f"{file}: cannot be read: {error}") from None

    def __len__(self) -> int:
        return len(self._numbers)

    def at(self, index: int) -> Record:
        number = int(self._numbers[index])
        start, end = int(self._starts[number - 1]), int(self._starts[number])
        where = f"{self._file.name}:{number}"
        line = os.pread(self._open.fileno(), end - start, start)  # not seek: several threads read
        return record(where, self._file, number, parse(decoded(line, self._file), where))


class JsonList(LazySequence[Record]):
    """One list of objects, held in memory."""

    def __init__(self, file: Path) -> None:
        self._file = file
        try:
            self._values = parse(decoded(file.read_bytes(), file), file.name)
        except OSError as error:
            raise ConfigError(f"{file}: cannot be read: {error}") from None

    def __len__(self) -> int:
        return len(self._values)

    def at(self, index: int) -> Record:
        return record(f"{self._file.name} row {index + 1}", self._file, index + 1, self._values[index])


def holds_a_list(file: Path) -> bool:
    """Whether a .json file begins with a list; otherwise it holds lines."""
    try:
        with file.open("rb") as opened:
            return opened.read(64).removeprefix(_MARK).lstrip().startswith(b"[")
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from None


def decoded(data: bytes, file: Path) -> str:
    try:
        return data.removeprefix(_MARK).decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: cannot be read: {error}; save it as UTF-8") from None


def parse(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a ValueError too
        raise ConfigError(f"{where}: not valid JSON: {error}; a line holds one object; a .json file may be one list") from None


def repeated(names: Sequence[str]) -> str | None:
    """The most frequent name, if it occurs twice."""
    name, count = Counter(names).most_common(1)[0] if names else ("", 0)
    return name if count > 1 else None


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError(f"{repeated([name for name, _ in pairs])!r} stands twice in an object")
    return values


def _lines(descriptor: int) -> tuple[np.ndarray, np.ndarray]:
    """Offsets where each line starts, and the end of the last; numbers, from 1, of the lines that are not blank."""
    starts, seen = [np.zeros(1, np.int64)], [np.zeros(1, np.int64)]  # offset, and characters before it that are no blanks
    offset = total = 0
    while block := os.pread(descriptor, _BLOCK, offset):
        data = np.frombuffer(block, np.uint8)
        ends = np.flatnonzero(data == ord("\n"))
        written = np.cumsum(data > ord(" "), dtype=np.int32)
        starts.append(ends + (offset + 1))
        seen.append(written[ends].astype(np.int64) + total)
        offset, total = offset + len(block), total + int(written[-1])
    starts.append(np.full(1, offset))
    seen.append(np.full(1, total))
    return np.concatenate(starts), np.flatnonzero(np.diff(np.concatenate(seen))) + 1
