"""The output folder of a conversion: it appears whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlcore.errors import ConfigError

RECORD = "rlcore-convert.json"  # what the folder was made from, and SHA-256 of its files
_SPARE = 16 * 2**20  # bytes for tokenizers, indexes and headers
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Draft:
    """A folder that is being written."""

    folder: Path
    shard_bytes: int

    def require(self, nbytes: int) -> None:
        """ConfigError when the disk has less room than that."""
        free = shutil.disk_usage(self.folder).free
        if free < nbytes + _SPARE:
            there, taken = f"{free / 2**30:.2f} GiB free", f"{(nbytes + _SPARE) / 2**30:.2f} GiB"
            remedy = "free some room or give another folder"
            raise ConfigError(f"--output: {self.folder.parent} has {there}, this takes {taken}; {remedy}")


@contextmanager
def drafted(output: Path, shard_bytes: int, call: Mapping[str, Any]) -> Iterator[Draft]:
    """A draft that takes the place of `output` at the end, with a record of `call` and of checksums, or vanishes with an error.
    ConfigError when the folder is in use, not writable, or the disk is full."""
    output = output.expanduser().absolute()
    _check_free(output)
    draft = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        draft.mkdir(parents=True)
        yield Draft(draft, shard_bytes)
        record = {**call, "sha256": {name: _digest(draft / name) for name in _files(draft)}}
        (draft / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        _check_free(output)
        os.replace(draft, output)
    except OSError as error:
        reason = "the disk is full" if error.errno in _FULL else str(error)
        raise ConfigError(f"--output: {output} cannot be written: {reason}; free some room or give another folder") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _check_free(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output: {output} is in use; give a new folder")


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
