"""A server that this process starts: its log, its exit status, and its end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import guard

_LINES = 30  # of the log, in an error
_TAIL = 16 * 1024  # bytes of the log to look for them


class ServerProcess:
    """A command under a guard (guard.py), which ends it with this process. Collecting the object ends it too."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path | None = None) -> None:
        """`environment`: of the server, whole. `log`: file for its output; None keeps it out of sight, for errors only."""
        self._log = open(log, "a+b") if log else tempfile.TemporaryFile("a+b")  # appending: the server shares the offset
        guarded = [sys.executable, guard.__file__, str(os.getpid()), *command]
        self._guard = subprocess.Popen(
            guarded, env=dict(environment), stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for this process, which then ends the server
        )  # fmt: skip
        self.stop = weakref.finalize(self, _stop, self._guard)

    @property
    def pid(self) -> int:
        """Of the guard."""
        return self._guard.pid

    def terminate(self) -> None:
        """Tell it to end; `stop` also waits for that."""
        if self._guard.poll() is None:
            self._guard.terminate()

    def ended(self, seconds: float = 0.0) -> str:
        """How it ended, waiting up to so long for that; empty while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = self._guard.wait(seconds)
            return f"exit status {status}" + (f" ({signal.Signals(status - 128).name})" if status > 128 else "")
        return ""

    def last_lines(self) -> str:
        """The end of its log, indented."""
        self._log.flush()
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - _TAIL))
        lines = self._log.read().decode(errors="replace").splitlines()
        self._log.seek(0, os.SEEK_END)
        return "\n".join(f"    {line}" for line in lines[-_LINES:])


def _stop(guarding: subprocess.Popen[bytes]) -> None:
    if guarding.poll() is None:
        guarding.terminate()
    try:
        guarding.wait(2 * guard.GRACE)
    except subprocess.TimeoutExpired:
        guarding.kill()
