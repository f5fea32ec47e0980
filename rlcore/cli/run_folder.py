"""The folder of a run, written by one process at a time. Imports nothing heavy."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import IO

from rlcore.errors import ConfigError

RECORD = "config.yaml"  # marks a folder as a run's
LOCK = "run.lock"
HISTORY = "history.jsonl"  # starts, resumptions with what they changed, restarts


def note(folder: Path, event: str, **what: object) -> None:
    """Add a line to the run's history."""
    line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, **what}
    with (folder / HISTORY).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


class Claim:
    """Exclusive claim on a run folder, made by `take`; released on exit, or however the process dies.

    The lock belongs to the process (POSIX): forked children neither hold nor keep it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: IO[str] | None = None

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    @property
    def taken(self) -> bool:
        return self._file is not None

    def take(self) -> None:
        """Lock the folder; ConfigError names the process that holds it, or why it cannot be locked."""
        if self.taken:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = (self.folder / LOCK).open("a+", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--run-dir: {self.folder} cannot be written: {error}; give another folder") from None
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            with file:
                raise ConfigError(self._refusal(file, error)) from None
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()}")
        file.flush()
        self._file = file

    def _refusal(self, file: IO[str], error: OSError) -> str:
        if not isinstance(error, BlockingIOError | PermissionError):  # the errors POSIX allows for a held lock
            return f"--run-dir: {self.folder / LOCK} cannot be locked: {error}; give a folder on a file system with locks"
        file.seek(0)
        holder = file.read() or "another process"
        return f"--run-dir: {self.folder} is being written by {holder}; wait for it or end it, or give another folder"
