"""Calls with a time limit that holds in every thread: they run in a process that is killed when one takes longer.

The process starts with the first call and serves all that follow. It never outlives this one: an atexit handler ends it, and
where none runs (SIGTERM, SIGKILL) the kernel does, by the signal that a pipe's closing sends, whatever it is computing then.
"""

from __future__ import annotations

import atexit
import fcntl
import importlib
import json
import logging
import os
import resource
import select
import subprocess
import sys
import threading
from typing import Any

_START_SECONDS = 120  # for imports, on a machine that is busy with other things
_MEMORY = 4 * 2**30  # bytes of address space
_PROGRAM = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from rlcore.rewards.bounded import serve
serve(*sys.argv[2:])
"""


class Bounded:
    """The functions of a module; arguments and results are JSON. Threads take turns; what is forked starts its own process."""

    def __init__(self, module: str) -> None:
        self.module = module
        self._forget()
        atexit.register(self.close)
        os.register_at_fork(after_in_child=self._forked)

    def call(self, function: str, *arguments: Any, seconds: float) -> Any:
        """What the function returned. TimeoutError after `seconds` (0 is no limit); RuntimeError with what it raised."""
        with self._lock:
            process = self._running()
            try:
                _send(process, json.dumps([function, *arguments]).encode() + b"\n")
                raised, value = self._read(process, seconds or None)
            except BaseException as error:  # an interrupt too: the next call must not read this one's result
                self.close()
                if isinstance(error, TimeoutError):
                    self._start()  # it imports while the caller goes on
                raise
        if raised:
            raise RuntimeError(f"{function}: {raised}")
        return value

    def close(self) -> None:
        """End the process, from any thread; a later call starts another."""
        if process := self._process:
            process.kill()
            process.wait()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._start()
        if self._starting:
            self._read(self._process, _START_SECONDS)
            self._starting = False
        return self._process

    def _start(self) -> None:
        self._release()
        watched, self._lifeline = os.pipe()
        command = [sys.executable, "-c", _PROGRAM, json.dumps(sys.path), self.module, str(watched)]
        self._process = subprocess.Popen(
            command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[watched],
            process_group=0,  # Ctrl-C is for this process only
        )  # fmt: skip
        os.close(watched)
        self._starting = True

    def _read(self, process: subprocess.Popen[bytes], seconds: float | None) -> Any:
        if not select.select([process.stdout], [], [], seconds)[0]:
            raise TimeoutError(f"{self.module} did not answer within {seconds} s")
        if not (line := process.stdout.readline()):
            raise RuntimeError(f"the process that runs {self.module} ended with status {process.wait()}; its error is above")
        return json.loads(line)

    def _release(self) -> None:
        """Close this side of the pipes."""
        if self._process is not None:
            self._process.stdin.close()
            self._process.stdout.close()
            os.close(self._lifeline)

    def _forked(self) -> None:
        """In the copy: the process belongs to the original, and must end with that one alone."""
        self._release()
        if self._process is not None:
            self._process.returncode = 0  # not to be waited for here
        self._forget()

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._lifeline = -1
        self._starting = False


def _send(process: subprocess.Popen[bytes], request: bytes) -> None:
    left = memoryview(request)
    try:
        while left:
            left = left[os.write(process.stdin.fileno(), left) :]
    except BrokenPipeError:  # it has ended: reading says how
        pass


def serve(module: str, watched: str) -> None:
    """The process: requests from stdin, a line each, results to what was stdout."""
    fcntl.fcntl(int(watched), fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(int(watched), fcntl.F_SETFL, os.O_ASYNC)  # SIGIO, which ends a process, when the other side closes
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    logging.disable()
    functions = importlib.import_module(module)
    functions.prepare()
    with os.fdopen(os.dup(1), "w") as results:
        os.dup2(2, 1)  # what libraries print is no result
        print("[]", file=results, flush=True)
        for line in sys.stdin.buffer:
            print(_result(functions, *json.loads(line)), file=results, flush=True)


def _result(functions: Any, name: str, *arguments: Any) -> str:
    try:
        return json.dumps([None, getattr(functions, name)(*arguments)])
    except Exception as error:
        return json.dumps([f"{type(error).__name__}: {error}"[:1000], None])
