"""Ctrl-C and SIGTERM: exit at once where nothing is lost, otherwise as soon as the current step is finished."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterable
from types import FrameType


class Interruption:
    """While entered, both signals raise KeyboardInterrupt, except between `hold` and `release`: there the first one waits
    for `release`, and a second one abandons the step. One that is raised where nothing can catch it (in a destructor or a
    callback, Python prints it and goes on) is raised again by `release`."""

    def __init__(self) -> None:
        self.abandoned = False
        self._held = self._pending = False

    def __enter__(self) -> Interruption:
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def hold(self) -> None:
        """Defer interrupts: from here on a half-done step would be lost."""
        self._held = True

    def release(self) -> None:
        self._held = False
        if self._pending:
            raise KeyboardInterrupt

    def each(self, steps: Iterable[int], step: Callable[[int], object], keep: Callable[[], object]) -> None:
        """Run the steps in order. An interrupt between two steps, or deferred to the end of one, calls `keep` before it
        propagates."""
        try:
            for number in steps:
                self.release()
                step(number)
            self.release()
        except KeyboardInterrupt:
            if not self.abandoned:
                keep()
            raise

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first, self._pending = not self._pending, True
        if self._held and first:
            print("\nstopping after this step is saved; once more to stop at once", file=sys.stderr)
            return
        self.abandoned = self._held
        raise KeyboardInterrupt
