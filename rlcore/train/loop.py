"""Training that samples nothing: steps, numbers and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlcore.checkpoint.folder import read_state, save_checkpoint
from rlcore.checkpoint.state import random_states, restore_random_states
from rlcore.config.schema import RunConfig
from rlcore.data.prompts import PromptSource
from rlcore.monitor import metrics
from rlcore.monitor.console import Console
from rlcore.monitor.sinks import Sinks
from rlcore.protocols import Actor
from rlcore.runtime.signals import Interruption
from rlcore.types import Batch


@dataclass(frozen=True)
class Task:
    """Training that samples nothing."""

    name: str
    steps: int
    log_every: int
    batch: Callable[[], Batch]  # the next
    shown: tuple[str, ...]  # metrics on the console


class Loop:
    """The steps of a task, its numbers and its checkpoints. An interrupt saves the last finished step and leaves."""

    def __init__(
        self, task: Task, actor: Actor, source: PromptSource, config: RunConfig, folder: Path, console: Console,
        interruption: Interruption,
    ) -> None:
        self.task, self.actor, self.source, self.config, self.folder = task, actor, source, config, folder
        self.console, self.interruption = console, interruption
        self.done = self.saved = 0  # steps
        self.drawn = source.drawn  # prompts, after step `done`
        self.random: Mapping[str, Any] = {}  # states, after step `done`

    def go(self, saved: Path | None) -> None:
        """Every step that is not done in the checkpoint `saved`."""
        if saved:
            self._restore(saved)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.sinks = Sinks(self.folder, self.config.logging.tensorboard, self.done + 1 if self.done else 0)
        try:
            self.console.start(self.task.name, self.task.steps, self.done)
            self.interruption.each(range(self.done + 1, self.task.steps + 1), self._step, self._keep)
        finally:
            self.console.stop()
            self.sinks.close()

    def _step(self, number: int) -> None:
        task, config, began = self.task, self.config, time.perf_counter()
        batch = task.batch()
        self.interruption.hold()
        row = self.actor.update(batch) | (metrics.images(batch.groups) if config.model.images_are_read_once else {})
        row["timing/all"] = time.perf_counter() - began
        self.done, self.drawn = number, self.source.drawn
        every = config.train.save_every
        if number == task.steps or (every and number % every == 0):
            self._save()
        self.random = random_states()
        self.sinks.write(number, row)
        if number % task.log_every == 0 or number == task.steps:
            shown = "  ".join(f"{name.rpartition('/')[2]} {row[name]:.4f}" for name in task.shown)
            self.console.step(f"{task.name} {number}/{task.steps}  {shown}  grad {row['grad_norm']:.3g}", task.log_every)

    def _keep(self) -> None:
        """The last finished step, unless a checkpoint has it."""
        if self.done > self.saved:
            self._save(random=self.random)

    def _save(self, **random: Any) -> None:
        """`random`: the random states, where those of now are already the next step's."""
        state = {"step": self.done, "drawn": self.drawn, **random}
        save_checkpoint(self.folder, f"step_{self.done:06d}", state, self.actor.save)
        self.saved = self.done

    def _restore(self, saved: Path) -> None:
        self.actor.load(saved)
        state = read_state(saved)
        self.done = self.saved = state["step"]
        self.source.drawn = self.drawn = state["drawn"]
        restore_random_states(state["random"])
