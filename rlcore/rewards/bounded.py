"""Calls with a time limit, from any thread: they run in a process that is killed when one takes longer.

The process starts with the first call and serves all later ones. It never outlives this one: an atexit handler ends it, and
where none runs (SIGTERM, SIGKILL) the kernel does, by the signal that closing a pipe sends, whatever it is computing.
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
from typing import IO, Any

_START_SECONDS = 120  # for imports, on a busy machine
_MEMORY = 4 * 2**30  # bytes of address space
_PROGRAM = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from rlcore.rewards.bounded import serve
serve(*sys.argv[2:])
"""


class Bounded:
    """Functions of a module, called in a process; arguments and results are JSON. Threads take turns; forks start their own."""

    def __init__(self, module: str) -> None:
        self.module = module
        self._forget()
        atexit.register(self.close)
        os.register_at_fork(after_in_child=self._forked)

    def call(self, function: str, *arguments: Any, seconds: float) -> Any:
        """The function's result. TimeoutError after `seconds` (0 is no limit); RuntimeError with what it raised."""
        with self._lock:
            process = self._running()
            try:
                _send(process, json.dumps([function, *arguments]).encode() + b"\n")
                raised, value = self._read(process, seconds or None)
            except BaseException as error:  # interrupts too: the next call must not read this one's result
                self.close()
                if isinstance(error, TimeoutError):
                    self._start()  # imports while the caller goes on
                raise
        if raised:
            raise RuntimeError(f"{function}: {raised}")
        return value

    def close(self) -> None:
        """Kill the process, from any thread; a later call starts another."""
        if process := self._process:
            process.kill()
            process.wait()

    def _running(self) -> subprocess.Popen[bytes]:
        process = self._process
        if process is None or process.poll() is not None:
            process = self._start()
        if self._starting:
            self._read(process, _START_SECONDS)
            self._starting = False
        return process

    def _start(self) -> subprocess.Popen[bytes]:
        self._release()
        watched, self._lifeline = os.pipe()
        command = [sys.executable, "-c", _PROGRAM, json.dumps(sys.path), self.module, str(watched)]
        self._process = process = subprocess.Popen(
            command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[watched],
            process_group=0,  # Ctrl-C is for this process only
        )  # fmt: skip
        os.close(watched)
        self._starting = True
        return process

    def _read(self, process: subprocess.Popen[bytes], seconds: float | None) -> Any:
        _, answers = _pipes(process)
        if not select.select([answers], [], [], seconds)[0]:
            raise TimeoutError(f"{self.module} did not answer within {seconds} s")
        if not (line := answers.readline()):
            raise RuntimeError(f"the process that runs {self.module} ended with status {process.wait()}; its error is above")
        return json.loads(line)

    def _release(self) -> None:
        """Close this side's ends of the pipes."""
        if self._process is not None:
            for pipe in _pipes(self._process):
                pipe.close()
            os.close(self._lifeline)

    def _forked(self) -> None:
        """After a fork, in the child: drop the parent's process, which must end with the parent only."""
        self._release()
        if self._process is not None:
            self._process.returncode = 0  # not to be waited for here
        self._forget()

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._lifeline = -1
        self._starting = False


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    """Its stdin and its stdout."""
    assert process.stdin is not None and process.stdout is not None, "it was started with pipes"
    return process.stdin, process.stdout


def _send(process: subprocess.Popen[bytes], request: bytes) -> None:
    left, (requests, _) = memoryview(request), _pipes(process)
    try:
        while left:
            left = left[os.write(requests.fileno(), left) :]
    except BrokenPipeError:  # the process has ended: reading reports how
        pass


def serve(module: str, watched: str) -> None:
    """Main loop of the process: requests from stdin, one per line, results to the original stdout."""
    fcntl.fcntl(int(watched), fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(int(watched), fcntl.F_SETFL, os.O_ASYNC)  # SIGIO, fatal by default, when the other side closes
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    logging.disable()
    functions = importlib.import_module(module)
    functions.prepare()
    with os.fdopen(os.dup(1), "w") as results:
        os.dup2(2, 1)  # keeps library output out of the results
        print("[]", file=results, flush=True)
        for line in sys.stdin.buffer:
            print(_result(functions, *json.loads(line)), file=results, flush=True)


def _result(functions: Any, name: str, *arguments: Any) -> str:
    try:
        return json.dumps([None, getattr(functions, name)(*arguments)])
    except Exception as error:
        return json.dumps([f"{type(error).__name__}: {error}"[:1000], None])
