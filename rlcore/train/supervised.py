"""Training on responses given in the data, shared by sft and dpo."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlcore.data.prompts import PromptSource
from rlcore.monitor import metrics
from rlcore.monitor.clock import Clock, timings
from rlcore.monitor.console import Console
from rlcore.train.results import Evaluation
from rlcore.train.session import Session
from rlcore.types import Batch, Metrics


@dataclass(frozen=True)
class SupervisedStep:
    """A finished step: its metrics and its console line."""

    task: SupervisedTask
    number: int
    drawn: int
    began: float
    numbers: Metrics

    def metrics(self) -> Metrics:
        spans = [*self.task.clock.take(), *self.task.session.placement.spans()]
        return self.numbers | timings(spans, self.began, time.perf_counter())

    def records(self) -> Iterable[Mapping[str, Any]]:
        return ()

    def line(self, numbers: Metrics) -> str:
        task, named = self.task, {name.rpartition("/")[2]: name for name in self.task.shown}
        held_out = {f"eval {name}": f"eval/{name}" for name in ("loss", "score") if f"eval/{name}" in numbers}
        shown = "  ".join(f"{label} {numbers[name]:.4f}" for label, name in (named | held_out).items())
        return f"{task.name} {self.number}/{task.steps}  {shown}  grad {numbers['grad_norm']:.3g}"

    def show(self, numbers: Metrics, console: Console) -> None:
        """Print nothing more."""


def _no_evaluation() -> Evaluation:
    return Evaluation()


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
    clock: Clock
    evaluation: Callable[[], Evaluation] = _no_evaluation

    def start(self) -> None:
        self.clock.take()
        self.session.placement.spans()

    def step(self, number: int) -> SupervisedStep:
        began = time.perf_counter()
        with self.clock.span("data"):
            batch = self.batch()
        self.session.interruption.hold()
        numbers = self.session.placement.update(batch)
        if self.session.config.model.images_are_read_once:
            numbers |= metrics.images(batch.groups)
        return SupervisedStep(self, number, self.source.drawn, began, numbers)

    def evaluate(self) -> Evaluation:
        with self.clock.span("evaluate"):
            return self.evaluation()

    def state(self) -> dict[str, Any]:
        return {}

    def files(self, done: int, patient: bool) -> Mapping[str, bytes]:
        return {}

    def restore(self, state: Mapping[str, Any], folder: Path) -> None:
        self.session.placement.version = state["step"]
