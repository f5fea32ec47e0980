"""Data files as sequences of records, each read when it is accessed: opening a file of a million rows takes seconds."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path

from rlcore.data.files.lines import JsonLines, JsonList, holds_a_list
from rlcore.data.files.record import Record
from rlcore.data.files.splits import SUFFIXES, data_files
from rlcore.data.files.tables import ArrowFile, ParquetFile
from rlcore.data.lazy import LazySequence
from rlcore.errors import ConfigError


class Records(LazySequence[Record]):
    """The rows of several files, one after the other."""

    def __init__(self, files: Sequence[Sequence[Record]]) -> None:
        self._files = files
        self._ends = list(accumulate(map(len, files)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def at(self, index: int) -> Record:
        file = bisect_right(self._ends, index)
        return self._files[file][index - (self._ends[file - 1] if file else 0)]


def open_records(path: str | Path | None) -> Records:
    """Open a .jsonl, .json (lines or one list), .parquet or .arrow file, or a folder of files of one of these kinds (also one
    of `datasets.save_to_disk`).

    ConfigError for a missing or unreadable file, an unknown suffix, and no rows at all; accessing a record raises it for a
    broken one, with its place.
    """
    return opened(_files(path))


def opened(files: Sequence[Path]) -> Records:
    """Records of the files, one after the other. Files without rows may be among them."""
    records = Records([_OPENERS[file.suffix](file) for file in files])
    if not len(records):
        raise ConfigError(f"{files[0]}: holds no rows" if len(files) == 1 else f"{files[0].parent}: its files hold no rows")
    return records


def read_records(path: str | Path | None) -> Iterator[Record]:
    """Yield every record of `open_records`, in order."""
    return iter(open_records(path))


def tried(path: str | Path) -> str:
    """Hint for the error on a missing path: what a relative path was resolved to."""
    path = Path(path)
    return "" if path.is_absolute() else f"; a relative path starts at the working directory: no {path.absolute()}"


def _files(path: str | Path | None) -> list[Path]:
    if path is None:
        raise ConfigError(f"this data set is read from files; set its path to a {', '.join(SUFFIXES)} file or a folder of them")
    path = Path(path).expanduser()
    if not path.exists():
        raise ConfigError(f"{path}: no such data file or folder{tried(path)}")
    files = [path]
    if path.is_dir():
        files = sorted(data_files(path))
        kinds = sorted({file.suffix for file in files})
        if len(kinds) != 1:
            found = " and ".join(kinds) or "no data files"
            raise ConfigError(f"{path}: a data folder holds files of one kind of {', '.join(SUFFIXES)}, this has {found}")
    elif path.suffix not in SUFFIXES:
        raise ConfigError(f"{path}: unknown suffix {path.suffix!r}; a data file is {', '.join(SUFFIXES)}")
    return files


def _open_json(file: Path) -> Sequence[Record]:
    return JsonList(file) if holds_a_list(file) else JsonLines(file)


_OPENERS: dict[str, Callable[[Path], Sequence[Record]]] = {
    ".jsonl": JsonLines, ".json": _open_json, ".parquet": ParquetFile, ".arrow": ArrowFile,
}  # fmt: skip
