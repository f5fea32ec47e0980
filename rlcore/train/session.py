"""Setup and teardown shared by the training commands."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from rlcore.checkpoint.state import seed_random_states
from rlcore.config.schema import RunConfig
from rlcore.data.prompts import Encoded, PromptSource, left_out, no_check
from rlcore.data.sources import held_out_prompts, training_prompts
from rlcore.device import Backend
from rlcore.model.resolved import ResolvedModel
from rlcore.monitor.console import Console
from rlcore.runtime.placement import Placement, start
from rlcore.runtime.signals import Interruption
from rlcore.runtime.watchdog import Watchdog
from rlcore.train.results import Columns
from rlcore.types import Prompt, Row


class Session:
    """Signal handling, watchdog, model, rows, and the workers once started."""

    def __init__(self, config: RunConfig, backend: Backend, folder: Path, console: Console) -> None:
        self.config, self.backend, self.folder, self.console = config, backend, folder, console
        self._held_out: dict[str, Encoded[Prompt]] = {}

    def __enter__(self) -> Session:
        with ExitStack() as stack:
            self.interruption = stack.enter_context(Interruption())
            self.watchdog = stack.enter_context(Watchdog(self.config.placement.stall_seconds, self.folder))
            seed_random_states(self.config.seed)
            self.resolved = ResolvedModel(self.config, self.backend)
            self.source = PromptSource([], self.resolved.family.encode_conversation)  # no training rows until `read`
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def read(self, check: Callable[[Row], None] = no_check, conversations: bool = False) -> None:
        """Open the training rows, each of which must pass `check`; see `training_prompts`."""
        self.source = training_prompts(self.config.data, self.resolved.family, self.config.seed, check, conversations)
        self._stack.callback(self.source.close)

    def held_out(self, check: Callable[[Row], None]) -> dict[str, Encoded[Prompt]]:
        """Open the held-out rows, each of which must pass `check`, if the run evaluates."""
        if self.config.evaluation is not None:
            columns = Columns(self.config.evaluation.by)

            def checked(row: Row) -> None:
                check(row)
                columns.see(row)

            self._held_out = held_out_prompts(self.config.data, self.resolved.family, checked)
            columns.refuse_missing()
        return self._held_out

    def start(self) -> Placement:
        """Start the workers, after every check that can do without them."""
        self.placement = self._stack.enter_context(start(self.resolved, self.watchdog))
        return self.placement

    def announce(self, begin: Callable[[], object]) -> None:
        """Create the run folder (`begin`), now that everything has loaded, and print the model's notice and the warnings."""
        begin()
        self.console.say(self.resolved.notice)
        self.console.warn(self.resolved.caution)
        self.console.warn(left_out("data.train", self.source.dropped_long, len(self.source), self.config.data))
        for key, prompts in zip(self.config.data.held_out_sets, self._held_out.values(), strict=False):  # all of them, or none
            self.console.warn(left_out(key, prompts.dropped_long, len(prompts), self.config.data))
        if self.config.data.eval and not self._held_out:
            reason = "evaluation is not set; add it (evaluation: {}) or remove data.eval"
            reason = reason if self.config.evaluation is None else "this command evaluates nothing; see rlcore eval"
            self.console.warn(f"data.eval: no row of it is evaluated, because {reason}")
        if self.source.unread:
            self.console.say(f"data.train: {len(self.source):,} rows, each checked when it is drawn (data.check)")
