"""Training on responses given in the data, shared by sft and dpo."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from rlcore.checkpoint.folder import latest_checkpoint
from rlcore.config.schema import RunConfig
from rlcore.data.prompts import PromptSource
from rlcore.device import Backend
from rlcore.model.resolved import ResolvedModel
from rlcore.monitor import metrics
from rlcore.monitor.console import Console
from rlcore.train.loop import Loop
from rlcore.train.session import Session
from rlcore.types import Batch, Metrics, Row


@dataclass(frozen=True)
class SupervisedStep:
    """A finished step: its metrics and its console line."""

    drawn: int
    numbers: Metrics
    text: str

    def metrics(self) -> Metrics:
        return self.numbers

    def records(self) -> Iterable[Mapping[str, Any]]:
        return ()

    def line(self, numbers: Metrics) -> str:
        return self.text

    def show(self, numbers: Metrics, console: Console) -> None:
        """Print nothing more."""


@dataclass(frozen=True)
class SupervisedTask:
    """Draws a batch and updates the actor with it. Has no state to checkpoint."""

    name: str
    steps: int
    log_every: int
    source: PromptSource
    batch: Callable[[], Batch]  # draws the next one
    shown: tuple[str, ...]  # metrics on the console
    session: Session

    def start(self) -> None:
        """No timings to discard."""

    def step(self, number: int) -> SupervisedStep:
        began = time.perf_counter()
        batch = self.batch()
        self.session.interruption.hold()
        numbers = self.session.placement.actor.update(batch)
        if self.session.config.model.images_are_read_once:
            numbers |= metrics.images(batch.groups)
        numbers["timing/all"] = time.perf_counter() - began
        shown = "  ".join(f"{name.rpartition('/')[2]} {numbers[name]:.4f}" for name in self.shown)
        text = f"{self.name} {number}/{self.steps}  {shown}  grad {numbers['grad_norm']:.3g}"
        return SupervisedStep(self.source.drawn, numbers, text)

    def evaluate(self) -> NoReturn:
        raise NotImplementedError(f"{self.name} samples nothing")

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """No state besides what every checkpoint holds."""


def run(
    command: str, check: Callable[[Sequence[Row], ResolvedModel], None], task: Callable[[Session], SupervisedTask],
    config: RunConfig, backend: Backend, folder: Path, resume: bool, console: Console, begin: Callable[[], object],
) -> None:  # fmt: skip
    """A whole run of such a task. `check` refuses rows before the run folder exists, which `begin` makes."""
    saved = latest_checkpoint(folder) if resume else None
    with Session(config, backend, folder, console) as session:
        check(session.source.rows, session.resolved)
        session.start().load(command)
        session.announce(begin)
        Loop(task(session), session, folder).go(saved)
