"""Loop of every training command: steps, evaluations, checkpoints, and interrupts at any moment."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from rlcore.checkpoint.folder import read_state
from rlcore.checkpoint.identity import identity
from rlcore.checkpoint.saver import Saver
from rlcore.checkpoint.state import random_states, restore_random_states
from rlcore.config.sections import EvaluationConfig
from rlcore.data.prompts import PromptSource
from rlcore.errors import ConfigError, NonFinite, OutOfMemory, RunError, nearest
from rlcore.monitor.clock import Clock
from rlcore.monitor.console import Console, evaluation_line, evaluation_table, sets_line
from rlcore.monitor.sinks import Sinks
from rlcore.train.records import evaluation_records, failures
from rlcore.train.results import Evaluation
from rlcore.train.session import Session
from rlcore.types import Metrics


class NothingToLearn(RunError):
    """Neither this step nor the next can train. The steps finished before it are saved."""


class Step(Protocol):
    """A finished step, with its metrics, sample records and console output."""

    @property
    def drawn(self) -> int:
        """Prompts drawn in the whole run so far."""
        ...

    def metrics(self) -> Metrics:
        """Line of metrics.jsonl; called after the step's evaluation and checkpoint."""
        ...

    def records(self) -> Iterable[Mapping[str, Any]]:
        """Lines of samples.jsonl."""
        ...

    def line(self, numbers: Metrics) -> str:
        """Line on the console."""
        ...

    def show(self, numbers: Metrics, console: Console) -> None:
        """Print samples and warnings after that line."""
        ...


class Task(Protocol):
    """A training task: its steps, evaluation and state. `Loop` schedules them."""

    @property
    def name(self) -> str: ...

    @property
    def steps(self) -> int: ...

    @property
    def log_every(self) -> int:
        """Steps between console lines."""
        ...

    @property
    def source(self) -> PromptSource: ...

    @property
    def clock(self) -> Clock:
        """Times its stages; checkpoints too."""
        ...

    def start(self) -> None:
        """Called before the first step, to discard what was timed and counted up to then."""
        ...

    def step(self, number: int) -> Step: ...

    def evaluate(self) -> Evaluation: ...

    def state(self) -> dict[str, Any]:
        """State to checkpoint besides step, prompts and random states."""
        ...

    def files(self, done: int, patient: bool) -> Mapping[str, bytes]:
        """Files of tensors to checkpoint after step `done`, by name; with `patient`, wait for what is on its way."""
        ...

    def restore(self, state: Mapping[str, Any], folder: Path) -> None:
        """`state` and files are in the checkpoint `folder`."""
        ...


class Loop:
    """Runs the steps of a task. An interrupt saves the last finished step and exits."""

    def __init__(self, task: Task, session: Session, folder: Path, evaluation: EvaluationConfig | None = None) -> None:
        """`folder`: for metrics, samples and checkpoints."""
        self.task, self.session, self.folder, self.evaluation = task, session, folder, evaluation
        self.actor, self.source, self.console = session.placement.actor, task.source, session.console
        self.saver = Saver(folder, self.actor, session.config.train.keep_last, session.config.train.keep_best)
        self.done = self.saved = 0  # steps
        self.updates = 0  # optimizer steps, after step `done`
        self.drawn = self.source.drawn  # prompts drawn, after step `done`
        self.random: Mapping[str, Any] = {}  # random states, after step `done`
        self.model = identity(session.resolved.folder)  # the initial one, and the reference

    def go(self, saved: Path | None) -> None:
        """Run the steps after the checkpoint `saved`, or all of them."""
        if saved:
            self._restore(saved)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.sinks = Sinks(self.folder, self.session.config.logging.tensorboard, self.done + 1 if self.done else 0)
        try:
            with self.saver:
                self.console.start(self.task.name, self.task.steps, self.done)
                if self.done == 0 and self.evaluation and (self.evaluation.before or not self.task.steps):
                    self._evaluate_before()
                self.task.start()
                self.session.interruption.each(range(self.done + 1, self.task.steps + 1), self._step, self._keep)
        finally:
            self.console.stop()
            self.sinks.close()

    def _step(self, number: int) -> None:
        self.saver.check()
        try:
            self._finish(number, self._trained(number))
        except OutOfMemory as error:
            error.shortage = replace(error.shortage, step=number)
            self._rescue(error.shortage.stage, number)
            raise

    def _finish(self, number: int, step: Step) -> None:
        self.done, self.drawn, self.updates = number, step.drawn, self.actor.steps
        due = self.evaluation is not None and self._due(self.evaluation.every, self.evaluation.at_end)
        evaluation = self.task.evaluate() if due else None
        if self._due(self.session.config.train.save_every, at_end=True):
            files = self.task.files(number, patient=True)
            with self.task.clock.span("save_checkpoint"):
                self._save(files, **self._score(evaluation))
        self.random = random_states()
        numbers, records = step.metrics(), [*step.records()]
        if evaluation:
            numbers, records = numbers | evaluation.metrics(), [*records, *evaluation_records(evaluation)]
        self.sinks.write(number, numbers, records, evaluation.report(number) if evaluation else None)
        self.saver.commit()
        if number % self.task.log_every == 0 or number == self.task.steps:
            self.console.step(step.line(numbers), self.task.log_every)
        step.show(numbers, self.console)
        if evaluation:
            self._show(evaluation)

    def _trained(self, number: int) -> Step:
        try:
            return self.task.step(number)
        except (NothingToLearn, ConfigError):  # no row is left to learn from, or one that was now drawn is broken
            self._keep()
            raise
        except NonFinite as error:
            path = self.folder / f"nonfinite_step_{number:06d}.json"
            path.write_text(json.dumps({"step": number, **error.report}, indent=1) + "\n", encoding="utf-8")
            raise RunError(f"{error}; the run stops before that optimizer step, the numbers are in {path}") from error

    def _evaluate_before(self) -> None:
        began = time.perf_counter()
        evaluation = self.task.evaluate()
        numbers = evaluation.metrics() | {"timing/evaluate": time.perf_counter() - began}
        self.sinks.write(0, numbers, evaluation_records(evaluation), evaluation.report(0))
        self.console.say(evaluation_line(numbers) if self.task.steps else evaluation_table(evaluation.report(0)))
        self._show(evaluation)

    def _show(self, evaluation: Evaluation) -> None:
        """Print the sets' scores, where there are several, and failed rewards."""
        if len(evaluation.sets) > 1 and self.task.steps:
            self.console.say(f"    eval  {sets_line(evaluation.report(self.done)['sets'])}")
        self.console.warn(failures(evaluation.scores, "evaluation: "))

    def _rescue(self, stage: str, number: int) -> None:
        """Save the last finished step after step `number` broke off in `stage`, if a worker can still do so."""
        if not self.session.placement.can_save(stage, self.updates):
            return
        if self.done == number:  # only its evaluation or checkpoint broke off
            self.random = random_states()
        try:
            self._keep()
        except RunError as error:
            self.console.warn(f"step {self.done} could not be saved: {error}")

    def _due(self, every: int, at_end: bool) -> bool:
        return bool(every and self.done % every == 0) or (at_end and self.done == self.task.steps)

    def _keep(self) -> None:
        """Save the last finished step, unless a checkpoint holds it."""
        if self.done > self.saved:
            self._save(self.task.files(self.done, patient=False), random=self.random)
            self.saver.commit()

    def _save(self, files: Mapping[str, bytes], **state: Any) -> None:
        """`state`: besides what every checkpoint has, or in its place."""
        state = {"step": self.done, "drawn": self.drawn, "model": self.model, **self.task.state(), **state}
        self.saver.save(f"step_{self.done:06d}", state, files)
        self.saved = self.done

    def _score(self, evaluation: Evaluation | None) -> dict[str, float]:
        """By which the best checkpoint is told (train.keep_best)."""
        if evaluation is None or (name := self.session.config.train.keep_best) is None:
            return {}
        numbers = evaluation.metrics()
        if name not in numbers:
            raise ConfigError(f"train.keep_best: the evaluation has no metric {name!r}{nearest(name, list(numbers))}")
        return {"best": numbers[name]}

    def _restore(self, saved: Path) -> None:
        state = read_state(saved)
        if state["model"] != self.model:
            raise ConfigError(
                f"--resume: the run started from other weights than those of model.path ({self.session.resolved.folder}), which"
                f" are its reference; give their folder. Recorded {state['model']}, found {self.model}"
            )
        self.actor.load(saved)
        self.done = self.saved = state["step"]
        self.updates = self.actor.steps
        self.source.drawn = self.drawn = state["drawn"]
        self.task.restore(state, saved)
        restore_random_states(state["random"])
