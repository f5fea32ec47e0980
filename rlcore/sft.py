"""Supervised training of the same actor on the rows' targets: the warm start of a GRPO run, or `rlcore sft` by itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlcore import checkpoint, metrics
from rlcore.backend import Backend
from rlcore.config import RunConfig
from rlcore.console import Console
from rlcore.data import PromptSource
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
    with Interruption(), Watch(config.placement.stall_seconds, folder) as watch:
        saved = checkpoint.latest(folder) if resume else None
        policy, source = checked(config, backend, check_targets)
        with start(policy, watch) as placement:
            placement.load("sft")
            begin()
            console.warn(policy.caution)
            fit(placement, policy, source, folder, saved, console)


def checked(
    config: RunConfig, backend: Backend, check: Callable[[Sequence[Row], Policy], None]
) -> tuple[Policy, PromptSource]:
    """The policy and its rows after `check`: whatever can be refused is refused before a run folder exists."""
    checkpoint.seed_random_states(config.seed)
    policy = Policy(config, backend)
    source = policy.prompts(config.seed)
    check(source.rows, policy)
    return policy, source


def missing(folder: Path | None) -> bool:
    """Whether a warm start is asked for and not done: it is made once a run, then read from its folder."""
    return folder is not None and not (folder / "checkpoints" / "latest").exists()


def result(folder: Path | None) -> Path | None:
    """The model of a warm start that is done: the run's initial policy and its reference."""
    return None if folder is None else checkpoint.latest(folder) / "model"


def check_targets(rows: Sequence[Row], policy: Policy) -> None:
    """ConfigError names the first row that has no target, or one that no forward pass can hold."""
    adapter, cap = policy.adapter, policy.config.train.max_tokens_per_microbatch
    for row in rows:
        if not row.target:
            raise ConfigError(f"{row.id}: no target to imitate; name the target column in data.train.options or remove sft")
        tokens = adapter.prompt_length(row) + len(adapter.encode_response(row.target)) - 1
        if tokens > cap:
            raise ConfigError(
                f"{row.id}: prompt and target need {tokens} tokens, more than train.max_tokens_per_microbatch {cap};"
                " raise that limit or remove the row"
            )


def fit(
    placement: Placement, policy: Policy, source: PromptSource, folder: Path, saved: Path | None, console: Console
) -> None:
    """Minimizes the mean negative log-probability of the target tokens."""
    config = policy.config.sft
    assert config is not None

    encoder = placement.encoder

    def batch() -> Batch:
        prompts = source.draw(config.rows_per_step)
        return Batch.of(targets(encoder.embed(prompts) if encoder else prompts, policy.adapter))

    task = Task("sft", config.steps, config.log_every, batch, ("sft/loss",))
    loop(task, placement.actor, source, policy.config, folder, saved, console)


@dataclass(frozen=True)
class Task:
    """Training that samples nothing."""

    name: str
    steps: int
    log_every: int
    batch: Callable[[], Batch]  # the next
    shown: tuple[str, ...]  # metrics on the console


def loop(
    task: Task, actor: Actor, source: PromptSource, config: RunConfig, folder: Path, saved: Path | None,
    console: Console,
) -> None:
    """The steps that are not done yet, and a checkpoint at the end; what an interrupt stops keeps its metrics."""
    done = 0
    if saved:
        state = checkpoint.read_state(saved)
        actor.load(saved)
        done, source.drawn = state["step"], state["drawn"]
    folder.mkdir(parents=True, exist_ok=True)
    sinks = metrics.Sinks(folder, config.logging.tensorboard, done + 1 if done else 0)
    console.start(task.name, task.steps, done)
    try:
        for number in range(done + 1, task.steps + 1):
            began = time.perf_counter()
            batch = task.batch()
            row = actor.update(batch) | (metrics.images(batch.groups) if config.model.images_are_read_once else {})
            row["timing/all"] = time.perf_counter() - began
            sinks.write(number, row)
            if number % task.log_every == 0 or number == task.steps:
                shown = "  ".join(f"{name.rpartition('/')[2]} {row[name]:.4f}" for name in task.shown)
                console.step(f"{task.name} {number}/{task.steps}  {shown}  grad {row['grad_norm']:.3g}", task.log_every)
        state = {"step": task.steps, "drawn": source.drawn}
        checkpoint.save(folder, f"step_{task.steps:06d}", state, actor.save)
    finally:
        console.stop()
        sinks.close()


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
