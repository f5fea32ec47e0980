"""The output folder of a conversion: it appears whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
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
            raise ConfigError(f"--output: {self.folder.parents[1]} has {there}, this takes {taken}; {remedy}")


@contextmanager
def drafted(output: Path, shard_bytes: int, call: Mapping[str, Any]) -> Iterator[Draft]:
    """A draft that takes the place of `output` at the end, with a record of `call` and of checksums, or vanishes with an error.
    ConfigError when the folder is in use, not writable, being written by another process, or the disk is full."""
    output = output.expanduser().absolute()
    _check_free(output)
    workshop = output.with_name(f".{output.name}.partial")
    above = [folder for folder in workshop.parents if not folder.exists()]
    try:
        with _claimed(workshop, output) as draft:
            yield Draft(draft, shard_bytes)
            record = {**call, "sha256": {name: _digest(draft / name) for name in _files(draft)}}
            (draft / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            _check_free(output)
            os.replace(draft, output)
    except OSError as error:
        reason = "the disk is full" if error.errno in _FULL else str(error)
        raise ConfigError(f"--output: {output} cannot be written: {reason}; free some room or give another folder") from error
    finally:
        with suppress(OSError):  # one that is not empty: the output is in it
            for folder in above:
                folder.rmdir()


@contextmanager
def _claimed(workshop: Path, output: Path) -> Iterator[Path]:
    """An empty folder in `workshop`, which is locked and removed at the end. What a process that was killed left there is
    removed first."""
    workshop.mkdir(parents=True, exist_ok=True)
    with (workshop / "lock").open("w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # the errors POSIX allows for a held lock
            raise ConfigError(f"--output: {output} is being written by another process; wait for it or end it") from None
        try:
            shutil.rmtree(workshop / "draft", ignore_errors=True)
            (workshop / "draft").mkdir()
            yield workshop / "draft"
        finally:
            shutil.rmtree(workshop, ignore_errors=True)


def _check_free(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output: {output} is in use; give a new folder")


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
