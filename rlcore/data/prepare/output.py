"""Files of rows: written as JSON lines or parquet, a group at a time, into a folder that appears whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rlcore.errors import ConfigError, RunError

RECORD = ".rlcore-data"  # what wrote the folder, and the files as it left them
_GROUP_ROWS, _GROUP_BYTES = 1024, 4 * 2**20  # a row group of parquet ends with the first of these
_IMAGE = {"_type": "Image"}  # these have `datasets` decode the column, in its versions 2 to 5
_IMAGES = {"_type": "Sequence", "feature": _IMAGE}
Row = Mapping[str, Any]


def row_file(path: Path, types: Mapping[str, Any]) -> JsonRows | ParquetRows:
    """A new file, by its suffix: .jsonl and .json a line a row, .parquet."""
    return ParquetRows(path, types) if path.suffix == ".parquet" else JsonRows(path)


class JsonRows:
    """One JSON object a line, UTF-8 unescaped; what JSON has no type for (a date) as text. ConfigError for bytes."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, path.open("w", encoding="utf-8")

    def write(self, rows: Sequence[Row]) -> None:
        self._file.writelines(json.dumps(row, ensure_ascii=False, default=self._text) + "\n" for row in rows)

    def _text(self, value: Any) -> str:
        if isinstance(value, bytes):
            raise ConfigError(f"{self._path.name}: a column holds bytes, which JSON cannot; remove it from the input")
        return str(value)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.close()


class ParquetRows:
    """Parquet in row groups of about 4 MB, so that a reader needs no more memory than that."""

    def __init__(self, path: Path, types: Mapping[str, Any]) -> None:
        """`types` are Arrow's, by column; those of other columns are inferred from the first rows written."""
        self._path, self._types = path, types
        self._schema = self._writer = None
        self._tables: list[Any] = []

    def write(self, rows: Sequence[Row]) -> None:
        if not rows:
            return
        self._tables.append(self._table(rows))
        if sum(map(len, self._tables)) >= _GROUP_ROWS or sum(table.nbytes for table in self._tables) >= _GROUP_BYTES:
            self._flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._flush()
        if self._writer is not None:
            self._writer.close()

    def _table(self, rows: Sequence[Row]) -> Any:
        import pyarrow

        try:
            if self._schema is None:
                self._schema = _schema(rows, self._types)
            names = self._schema.names
            if new := [name for row in rows for name in row if name not in names]:
                remedy = "give it to all of them, or to none"
                raise ConfigError(f"{self._path.name}: column {new[0]!r} is in some rows only; {remedy}")
            return pyarrow.Table.from_pylist(list(rows), self._schema)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
            raise ConfigError(f"{self._path.name}: a column changes its type between rows: {error}; use one type") from None

    def _flush(self) -> None:
        import pyarrow
        from pyarrow import parquet

        if not self._tables:
            return
        if self._writer is None:
            self._writer = parquet.ParquetWriter(self._path, self._schema)
        table = pyarrow.concat_tables(self._tables)
        self._writer.write_table(table, row_group_size=len(table))
        self._tables = []


def _schema(rows: Sequence[Row], types: Mapping[str, Any]) -> Any:
    """Arrow schema of the rows' columns; a column without a value so far is text."""
    import pyarrow

    found = pyarrow.Table.from_pylist(list(rows)).schema
    fields = [(name, types.get(name, found.field(name).type)) for name in found.names]
    fields = [(name, pyarrow.string() if pyarrow.types.is_null(kind) else kind) for name, kind in fields]
    features = {name: feature for name, kind in fields if (feature := _image_feature(kind))}
    return pyarrow.schema(fields, {"huggingface": json.dumps({"info": {"features": features}})} if features else None)


def _image_feature(kind: Any) -> dict[str, Any] | None:
    """What `datasets` calls a column of images, or of lists of images."""
    import pyarrow

    if pyarrow.types.is_list(kind):
        return _IMAGES if _image_feature(kind.value_type) == _IMAGE else None
    return _IMAGE if pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else None


class OutputFolder:
    """A folder that holds the files of one call. Writing the same again replaces it; any other content is left alone."""

    def __init__(self, folder: Path, call: Mapping[str, Any]) -> None:
        """`call`: what was asked, JSON-serializable. ConfigError when the folder holds anything else."""
        self.folder, self._call = folder.expanduser().resolve(), dict(call)
        self._check()

    @contextmanager
    def draft(self) -> Iterator[Path]:
        """A folder to fill, which takes this one's place at the end, or vanishes with an error. RunError for a full disk."""
        draft = self.folder.with_name(f".{self.folder.name}.{os.getpid()}.partial")
        try:
            draft.mkdir(parents=True)
            yield draft
            (draft / RECORD).write_text(json.dumps({"call": self._call, "files": _stamps(draft)}) + "\n", encoding="utf-8")
            self._replace(draft)
        except OSError as error:
            remedy = "free some room or give another folder"
            raise RunError(f"--output: {self.folder} cannot be written: {error}; {remedy}") from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def _check(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f"--output: {self.folder} is a file; give a folder")
        names = sorted(path.name for path in self.folder.iterdir()) if self.folder.exists() else []
        if not names:
            return
        remedy = "give another folder, or empty this one"
        try:
            written = json.loads((self.folder / RECORD).read_text(encoding="utf-8"))
            call, files = written["call"], written["files"]
        except (OSError, ValueError, KeyError, TypeError):
            listed = ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
            raise ConfigError(f"--output: {self.folder} holds files of others ({listed}); {remedy}") from None
        if call != self._call:
            made = ", ".join(f"{name} {value}" for name, value in call.items())
            raise ConfigError(f"--output: {self.folder} was written from {made}; {remedy}")
        if (now := _stamps(self.folder)) != files:
            changed = sorted(name for name in {*now, *files} if now.get(name) != files.get(name))
            raise ConfigError(f"--output: {', '.join(changed)} in {self.folder} changed since it was written; {remedy}")

    def _replace(self, draft: Path) -> None:
        """Exchange them by renaming; the old folder stays when that fails."""
        old = draft.with_suffix(".replaced")
        if self.folder.exists():
            os.rename(self.folder, old)
        try:
            os.rename(draft, self.folder)
        except OSError:
            if old.exists():
                os.rename(old, self.folder)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _stamps(folder: Path) -> dict[str, list[int]]:
    """Size and time of change of everything in a folder but the record."""
    entries = ((path.name, path.stat()) for path in sorted(folder.iterdir()) if path.name != RECORD)
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in entries}
