"""Supervised training of the same actor on the rows' targets: the warm start of a GRPO run, or `rlcore sft` by itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlcore import checkpoint, metrics
from rlcore.backend import Backend
from rlcore.chat import check_opening
from rlcore.config import RunConfig
from rlcore.console import Console
from rlcore.data import PromptSource, left_out
from rlcore.errors import ConfigError
from rlcore.interruption import Interruption
from rlcore.placement import Placement, start
from rlcore.protocols import Actor, Adapter
from rlcore.types import Batch, Group, Prompt, Row, Sample
from rlcore.watch import Watch
from rlcore.worker import Policy


def train(
    config: RunConfig, backend: Backend, folder: Path, resume: bool, console: Console, begin: Callable[[], object]
) -> None:
    """`rlcore sft`: the `sft` section as a run of its own. `begin` is called before anything is written."""
    if config.sft is None:
        raise ConfigError("sft: must be set for supervised training (steps, rows_per_step, optimizer)")
    with Interruption() as interruption, Watch(config.placement.stall_seconds, folder) as watch:
        saved = checkpoint.latest(folder) if resume else None
        policy, source = checked(config, backend, check_targets)
        with start(policy, watch) as placement:
            placement.load("sft")
            begin()
            console.say(policy.notice)
            console.warn(policy.caution)
            console.warn(left_out("data.train", source, config.data))
            task = imitation(placement, policy, source)
            Loop(task, placement.actor, source, config, folder, console, interruption).go(saved)


def checked(
    config: RunConfig, backend: Backend, check: Callable[[Sequence[Row], Policy], None]
) -> tuple[Policy, PromptSource]:
    """The policy and its rows after `check`: whatever can be refused is refused before a run folder exists."""
    checkpoint.seed_random_states(config.seed)
    policy = Policy(config, backend)
    source = policy.prompts(config.seed)
    check(source.rows, policy)
    return policy, source


def missing(folder: Path | None, steps: int) -> bool:
    """Whether a warm start of so many steps is asked for and not done: it is made once a run, then read from its folder."""
    saved = checkpoint.newest(folder) if folder else None
    return folder is not None and (saved is None or checkpoint.read_state(saved)["step"] < steps)


def result(folder: Path | None) -> Path | None:
    """The model of a warm start that is done: the run's initial policy and its reference."""
    return None if folder is None else checkpoint.latest(folder) / "model"


def check_targets(rows: Sequence[Row], policy: Policy) -> None:
    """ConfigError names the first row without a target, with one that no model would write, or too long for one pass."""
    adapter, cap = policy.adapter, policy.config.train.max_tokens_per_microbatch
    for row in rows:
        if not row.target or not row.target.strip():
            raise ConfigError(f"{row.id}: no target to imitate; name the target column in data.train.options or remove sft")
        tokens = adapter.prompt_length(row) + response_length(row, row.target, "target", adapter) - 1
        if tokens > cap:
            raise ConfigError(
                f"{row.id}: prompt and target need {tokens} tokens, more than train.max_tokens_per_microbatch {cap};"
                " raise that limit or remove the row"
            )


def response_length(row: Row, text: str, what: str, adapter: Adapter) -> int:
    """The tokens of a response to imitate; ConfigError when it repeats what the chat template writes before it, or goes on
    after the end of its turn."""
    check_opening(adapter.opening(row), text, row.id, what)
    token_ids = adapter.encode_response(text)
    if ends := adapter.stop_token_ids.intersection(token_ids[:-1]):
        raise ConfigError(
            f"{row.id}: the {what} holds token {min(ends)}, which ends a response, before its end, where it is added; remove it"
            " from the data"
        )
    return len(token_ids)


def imitation(placement: Placement, policy: Policy, source: PromptSource) -> Task:
    """Minimizes the mean negative log-probability of the target tokens."""
    config, encoder = policy.config.sft, placement.encoder
    assert config is not None

    def batch() -> Batch:
        prompts = source.draw(config.rows_per_step)
        return Batch.of(targets(encoder.embed(prompts) if encoder else prompts, policy.adapter))

    return Task("sft", config.steps, config.log_every, batch, ("sft/loss",))


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
        self.sinks = metrics.Sinks(self.folder, self.config.logging.tensorboard, self.done + 1 if self.done else 0)
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
        self.random = checkpoint.random_states()
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
        checkpoint.save(self.folder, f"step_{self.done:06d}", state, self.actor.save)
        self.saved = self.done

    def _restore(self, saved: Path) -> None:
        self.actor.load(saved)
        state = checkpoint.read_state(saved)
        self.done = self.saved = state["step"]
        self.source.drawn = self.drawn = state["drawn"]
        checkpoint.restore_random_states(state["random"])


def targets(prompts: Sequence[Prompt], adapter: Adapter) -> list[Group]:
    """Each prompt with its row's target as the only sample."""
    return [Group(prompt, [_target(prompt, adapter)]) for prompt in prompts]


def _target(prompt: Prompt, adapter: Adapter) -> Sample:
    assert prompt.row.target, "check_targets comes first"
    return written(prompt.row.target, adapter)


def written(text: str, adapter: Adapter) -> Sample:
    """A response that no engine drew."""
    token_ids = np.array(adapter.encode_response(text), np.int32)
    return Sample(token_ids, np.zeros(len(token_ids), np.float32), text, "stop", policy_version=0)
