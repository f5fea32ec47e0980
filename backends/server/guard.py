"""Guard of a server process: `python guard.py PARENT COMMAND...` ends COMMAND and all its children when PARENT is gone.

A server outlives a controller that is killed, and its own children outlive the server. The guard sleeps until either of the two
ends (pidfd) or SIGTERM arrives, and ends the command's whole process group. It imports the standard library only, and exits
with the command's status (128 + signal).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys

GRACE = 5.0  # seconds between SIGTERM and SIGKILL


def main(parent: int, command: list[str]) -> int:
    watched = os.pidfd_open(parent)
    if os.getppid() != parent:
        return 0  # it was gone before it could be watched
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell)
    signal.signal(signal.SIGTERM, lambda *_: None)  # only wakes `select`
    server = subprocess.Popen(command, start_new_session=True)
    select.select([watched, told, os.pidfd_open(server.pid)], [], [])
    _end(server)
    status = server.wait()
    return status if status >= 0 else 128 - status


def _end(server: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the group, then SIGKILL to what is left of it, whether or not the server itself is."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
