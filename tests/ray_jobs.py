"""Programs that start their own Ray in a separate process; their output, and whether they leave processes behind."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time

import psutil

PATIENCE = 45  # seconds; limit of every wait


class Job:
    """A Python program and all its descendants, identified by a token in their environment."""

    def __init__(self, *program, **variables):
        self.token = secrets.token_hex(16)
        self.process = subprocess.Popen(
            [sys.executable, *map(str, program)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | {"RAY_AUTH_TOKEN": self.token} | variables,
        )  # fmt: skip
        self.said = []
        self.limit = threading.Timer(2 * PATIENCE, self.kill)  # killing a hanging job ends its output
        self.limit.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.limit.cancel()
        self.kill()

    def line(self, pattern):
        """The match in the next line that matches."""
        for line in self.process.stdout:
            self.said.append(line)
            if match := re.search(pattern, line):
                return match
        raise AssertionError(f"the job ended without {pattern!r}:\n{''.join(self.said)}")

    def end(self):
        """Its exit status, once every process it started is gone."""
        self.said += self.process.stdout
        status = self.process.wait(PATIENCE)
        limit = time.monotonic() + PATIENCE
        while left := self.processes():
            assert time.monotonic() < limit, left
            time.sleep(0.1)
        return status

    def processes(self, name=""):
        """Running processes of this name."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("RAY_AUTH_TOKEN") == self.token and name in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def kill(self):
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
