"""Watchdog of a run: after too long without progress, reports which process waits for which and ends the run."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rlcore.errors import RunError
from rlcore.monitor.heartbeat import Condition, Heartbeat, own_stacks

GRACE = 30.0  # seconds a run has to end before it is killed
_FRAME = re.compile(r'^  File "(?P<file>.+)", line (?P<line>\d+) in (?P<function>.+)$', re.MULTILINE)
_COLLECTIVE = re.compile(r"/torch/distributed/(?!elastic/)")
_DEBUGGER = (("/pdb.py", "interaction"), ("/pydevd.py", "_do_wait_suspend"), ("/pydevd.py", "_wait_for_attach"))


class Stalled(BaseException):
    """Raised in the main thread. Not an Exception, so that handlers of reward errors do not swallow it.

    It ends every wait in Python (locks, futures, sleep); a wait in native code may ignore it, and is killed.
    """


class Watchdog:
    """While entered, turns a stall into a RunError in the main thread, and a report in the run folder."""

    def __init__(self, limit: float, folder: Path, grace: float = GRACE) -> None:
        """`limit`: seconds without progress, 0 is never. `folder`: gets the report, if it exists by then. `grace`: seconds the
        run has to end before it is killed."""
        self.limit, self.folder, self.grace = limit, folder, grace
        self.heartbeat = Heartbeat()  # of this process
        self.workers: Callable[[bool], Sequence[Condition]] = lambda with_stacks: ()  # of the other processes
        self._message = ""
        self._over, self._ending = threading.Event(), threading.Lock()

    def __enter__(self) -> Watchdog:
        if self.limit:
            self._before = signal.signal(signal.SIGUSR2, self._interrupt)
            self._arm()
            threading.Thread(target=self._watch, name="watch", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._over.set()
        if self.limit:
            with self._ending:  # a signal in flight still finds its handler
                signal.signal(signal.SIGUSR2, self._before)
            faulthandler.cancel_dump_traceback_later()
        if kind is Stalled:
            raise RunError(self._message) from None

    @property
    def interval(self) -> float:
        """Seconds between checks."""
        return min(30.0, self.limit / 10)

    def conditions(self, with_stacks: bool) -> list[Condition]:
        where = f"pid {os.getpid()} on {socket.gethostname()}"
        mine = Condition("controller", where, self.heartbeat.progress(), own_stacks() if with_stacks else "")
        return [mine, *self.workers(with_stacks)]

    def _watch(self) -> None:
        try:
            self._look_on()
        finally:  # without this thread, nothing restarts the timer
            faulthandler.cancel_dump_traceback_later()

    def _look_on(self) -> None:
        still = Stillness(time.monotonic())
        while not self._over.wait(self.interval):
            self._arm()
            if still.seconds(self.conditions(with_stacks=False), time.monotonic()) < self.limit:
                continue
            report = Report(self.limit, self.conditions(with_stacks=True))
            if not report.held:
                return self._end(report)
            still = Stillness(time.monotonic())  # a debugger holds a process: start over

    def _arm(self) -> None:
        """Restart faulthandler's timer: if this thread stops running too, the interpreter dumps the stacks and exits."""
        faulthandler.dump_traceback_later(self.limit + self.interval + self.grace, exit=True, file=2)

    def _end(self, report: Report) -> None:
        path = self._write(report)
        self._message = f"{report.headline}{f'; every stack: {path}' if path else ''}"
        print(report.table if path else report.full, file=sys.stderr, flush=True)
        with self._ending:
            if self._over.is_set():
                return
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR2)
        if not self._over.wait(self.grace):
            self._kill()

    def _kill(self) -> None:
        print(f"rlcore: {self._message}\nrlcore: killed, as it did not end in {self.grace:g} s", file=sys.stderr, flush=True)
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(RunError.status)

    def _write(self, report: Report) -> Path | None:
        path = self.folder / f"stall-{time.strftime('%Y%m%d-%H%M%S')}.txt"
        with contextlib.suppress(OSError):  # no run folder yet, or no disk space: stderr gets all of it then
            path.write_text(report.full, encoding="utf-8")
            return path
        return None

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if not self._over.is_set():
            raise Stalled


class Stillness:
    """Measures how long no process has made progress."""

    def __init__(self, now: float) -> None:
        self._since, self._beats = now, dict[str, int]()

    def seconds(self, conditions: Iterable[Condition], now: float) -> float:
        """Seconds without progress at `now`. A process without a known heartbeat has made none."""
        beats = {one.who: one.progress.beats for one in conditions if one.progress}
        if any(self._beats.get(who) != count for who, count in beats.items()):
            self._since = now
        self._beats |= beats
        return now - self._since


@dataclass(frozen=True)
class Frame:
    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.function} ({Path(self.file).name}:{self.line})"


class Report:
    """Report of a stall: which process waits for which."""

    def __init__(self, limit: float, conditions: Sequence[Condition]) -> None:
        """`conditions`: the controller's first."""
        self.limit, self.conditions = limit, conditions
        self.controller, *self.workers = conditions

    @property
    def held(self) -> bool:
        """Whether a debugger holds one of the processes."""
        return any(_held(frame) for one in self.conditions for thread in _threads(one.stacks) for frame in thread)

    @property
    def headline(self) -> str:
        return f"nothing has moved for {self.limit:g} s (placement.stall_seconds); {self.waits}"

    @property
    def waits(self) -> str:
        """One sentence. An idle worker has answered its call; one in a collective waits for those outside it."""
        missing = [one for one in self.workers if one.trouble or one.progress is None or one.progress.stage]
        together = [one for one in missing if _collective(one)]
        absent = [one for one in self.workers if one not in together]
        if not missing:
            return f"the controller is {_doing(self.controller)}"
        if not together:
            return f"the controller waits for {_told(missing)}"
        waiting = f"{', '.join(one.who for one in together)} wait{'s' if len(together) == 1 else ''} in a collective"
        return f"{waiting} for {_told(absent)}" if absent else f"{waiting}, and no worker is outside"

    @property
    def table(self) -> str:
        return "\n".join(f"  {one.who}, {one.where}: {_doing(one)}" for one in self.conditions)

    @property
    def full(self) -> str:
        """Headline, table and every stack, most recent call first."""
        stacks = [f"== {one.who}, {one.where}\n{one.stacks}" for one in self.conditions if one.stacks]
        return "\n".join([f"{self.headline}\n", self.table, "", *stacks])


def _told(conditions: Sequence[Condition]) -> str:
    """Names of the processes; of a single one, also its activity."""
    return ", ".join(f"{one.who} ({_doing(one)})" if len(conditions) == 1 else one.who for one in conditions)


def _doing(one: Condition) -> str:
    """Describe a process: its stage, for how long, and where in the code."""
    if one.progress is None:
        return one.trouble
    threads = _threads(one.stacks)
    at = f", at {_own(threads[-1])}" if threads and threads[-1] else ""  # the main thread comes last
    return f"{one.progress}{', in a collective' if _collective(one) else ''}{at}{f'; {one.trouble}' if one.trouble else ''}"


def _threads(stacks: str) -> list[list[Frame]]:
    """Frames of each thread, innermost first."""
    return [
        [Frame(found["file"], int(found["line"]), found["function"]) for found in _FRAME.finditer(section)]
        for section in stacks.split("\n\n")
    ]


def _collective(one: Condition) -> bool:
    """Whether the innermost frame of a thread, apart from torch internals, is in torch.distributed."""
    innermost = [next((frame for frame in thread if not _of_torch(frame)), None) for thread in _threads(one.stacks)]
    return any(frame is not None and _COLLECTIVE.search(frame.file) for frame in innermost)


def _of_torch(frame: Frame) -> bool:
    return "/torch/" in frame.file and not _COLLECTIVE.search(frame.file)


def _own(thread: Sequence[Frame]) -> Frame:
    """The innermost frame outside installed packages and the standard library, or the innermost."""
    return next((frame for frame in thread if "-packages/" not in frame.file and "/lib/python" not in frame.file), thread[0])


def _held(frame: Frame) -> bool:
    return any(frame.file.endswith(file) and frame.function == function for file, function in _DEBUGGER)
