"""Setup and teardown shared by the training commands."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from rlcore.checkpoint.state import seed_random_states
from rlcore.config.schema import RunConfig
from rlcore.data.prompts import left_out
from rlcore.device import Backend
from rlcore.model.resolved import ResolvedModel
from rlcore.monitor.console import Console
from rlcore.runtime.placement import Placement, start
from rlcore.runtime.signals import Interruption
from rlcore.runtime.watchdog import Watchdog


class Session:
    """Signal handling, watchdog, model, rows, and the workers once started."""

    def __init__(self, config: RunConfig, backend: Backend, folder: Path, console: Console) -> None:
        self.config, self.backend, self.folder, self.console = config, backend, folder, console

    def __enter__(self) -> Session:
        with ExitStack() as stack:
            self.interruption = stack.enter_context(Interruption())
            self.watchdog = stack.enter_context(Watchdog(self.config.placement.stall_seconds, self.folder))
            seed_random_states(self.config.seed)
            self.resolved = ResolvedModel(self.config, self.backend)
            self.source = self.resolved.prompts(self.config.seed)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def start(self) -> Placement:
        """Start the workers, after every check that can do without them."""
        self.placement = self._stack.enter_context(start(self.resolved, self.watchdog))
        return self.placement

    def announce(self, begin: Callable[[], object]) -> None:
        """Create the run folder (`begin`), now that everything has loaded, and print the model's notice and the warnings."""
        begin()
        self.console.say(self.resolved.notice)
        self.console.warn(self.resolved.caution)
        self.console.warn(left_out("data.train", self.source, self.config.data))
