"""An event loop in a thread of its own, for requests that go on while the caller does something else."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class EventLoop:
    """Runs until `end`."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="requests", daemon=True)
        self._thread.start()

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for the result; an interrupt of the caller cancels the work."""
        future = self.start(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def end(self, last: Coroutine[Any, Any, object], seconds: float) -> None:
        """Do this last. Waits for it up to so long, unless the loop's own thread calls, as a garbage collector may."""
        done = self.start(self._ended(last))
        if threading.current_thread() is not self._thread:
            with contextlib.suppress(TimeoutError):
                done.result(seconds)

    async def _ended(self, last: Coroutine[Any, Any, object]) -> None:
        try:
            await last
        finally:
            self._loop.call_soon(self._loop.stop)
