"""Heartbeat and stacks of a process, and how others on its node read them, whatever state it is in.

The heartbeat is in a shared file; the stacks are dumped on a signal that the interpreter handles below Python (faulthandler).
So both can be read from a process that hangs in a collective, or in code that never releases the GIL.
Both files are unnamed and opened by /proc/PID/fd (Linux): nothing is left behind, however the process ends.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_RECORD = 512  # bytes of a shared heartbeat
_ANSWER = 5.0  # seconds a process has to dump its stacks
_POLL = 0.1


@dataclass(frozen=True)
class Progress:
    """Progress of a process at one moment; times are seconds before it."""

    stage: str  # empty between stages
    began: float  # the stage, or idling
    moved: float
    beats: int

    def __str__(self) -> str:
        return f"in {self.stage} for {self.began:.0f} s" if self.stage else f"idle for {self.began:.0f} s"


@dataclass(frozen=True)
class Condition:
    """Observed state of a process."""

    who: str
    where: str
    progress: Progress | None = None  # None: unknown
    stacks: str = ""  # as faulthandler writes them
    trouble: str = ""  # why something is unknown


@dataclass(frozen=True)
class ProcessHandle:
    """Where to read the heartbeat and the stacks of a process."""

    who: str  # name in messages
    node: str
    pid: int
    heartbeat: int  # file descriptors of that process
    stacks: int

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.node}"


def no_heartbeat() -> None:
    """Do nothing: the beat of code without a heartbeat."""


class Heartbeat:
    """Counts the progress of this process. Any of its threads may beat."""

    def __init__(self, shared: BinaryIO | None = None) -> None:
        """`shared`: an unbuffered file from which other processes read it."""
        self._shared, self._beats = shared, 0
        self._open: list[tuple[str, float]] = []  # stages and when they began
        self.beat()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        entry = (name, time.monotonic())
        self._open.append(entry)
        self.beat()
        try:
            yield
        finally:
            self._open.remove(entry)
            self.beat()

    def beat(self) -> None:
        """Record progress."""
        self._beats, self._moved = self._beats + 1, time.monotonic()
        if self._shared is not None:
            os.pwrite(self._shared.fileno(), json.dumps(self._moments()).ljust(_RECORD).encode(), 0)

    def progress(self) -> Progress:
        return _progress(*self._moments())

    def _moments(self) -> tuple[str, float, float, int]:
        """Stage, its start and the last beat on the clock that a node's processes share, number of beats."""
        stages = list(self._open)
        return ", ".join(name for name, _ in stages)[:200], stages[0][1] if stages else self._moved, self._moved, self._beats


def publish(who: str, node: str) -> tuple[Heartbeat, ProcessHandle]:
    """Create a heartbeat that others can read; from now on the process dumps its stacks at SIGUSR1."""
    heartbeat, stacks = (tempfile.TemporaryFile(buffering=0) for _ in range(2))
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True, chain=False)
    return Heartbeat(heartbeat), ProcessHandle(who, node, os.getpid(), heartbeat.fileno(), stacks.fileno())


def observe(handle: ProcessHandle, with_stacks: bool) -> Condition:
    """Observe a process of this node; `with_stacks` sends it a signal."""
    progress, stacks, trouble = None, "", ""
    try:
        progress = _progress(*json.loads(Path(f"/proc/{handle.pid}/fd/{handle.heartbeat}").read_bytes()))
        if with_stacks and not (stacks := _stacks_of(handle)):
            pid = handle.pid
            trouble = f"shows no stacks for {_ANSWER:.0f} s: its process is {_state(pid)}; py-spy dump --pid {pid}"
    except (FileNotFoundError, ProcessLookupError):
        trouble = "its process is gone"
    except PermissionError as error:
        trouble = f"may not be looked at: {error}"
    return Condition(handle.who, str(handle), progress, stacks, trouble)


def own_stacks() -> str:
    """Stacks of this process, without the calling thread."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        threads = file.read().decode(errors="replace").split("\n\n")
    return "\n\n".join(thread for thread in threads if not thread.startswith("Current thread"))


def _progress(stage: str, began: float, moved: float, beats: int) -> Progress:
    now = time.monotonic()
    return Progress(stage, now - began, now - moved, beats)


def _stacks_of(handle: ProcessHandle) -> str:
    """Request the stacks of a process; empty if it does not answer."""
    with open(f"/proc/{handle.pid}/fd/{handle.stacks}", "rb") as file:
        before = size = file.seek(0, os.SEEK_END)
        os.kill(handle.pid, signal.SIGUSR1)
        limit = time.monotonic() + _ANSWER
        while time.monotonic() < limit:
            time.sleep(_POLL)
            last, size = size, os.fstat(file.fileno()).st_size
            if size == last > before:
                file.seek(before)
                return file.read().decode(errors="replace")
    return ""


def _state(pid: int) -> str:
    """Process state as the kernel reports it: running, sleeping, stopped, ..."""
    found = re.search(r"^State:\s*\S+ \((.+)\)", Path(f"/proc/{pid}/status").read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else "unknown to the kernel"
