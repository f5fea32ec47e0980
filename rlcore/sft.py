"""Supervised training of the same actor on the rows' targets: the warm start of a GRPO run, or `rlcore sft` by itself."""

from __future__ import annotations

import time
from pathlib import Path

from rlcore import checkpoint, metrics
from rlcore.config import RunConfig, SftConfig
from rlcore.console import Console
from rlcore.data import PromptSource
from rlcore.errors import ConfigError
from rlcore.interruption import Interruption
from rlcore.policy import TorchActor
from rlcore.protocols import Adapter, Backend
from rlcore.types import Batch, Group, Prompt, Sample, TokenLoss, TokenView
from rlcore.worker import Policy


def train(config: RunConfig, backend: Backend, folder: Path, resume: bool, console: Console) -> None:
    """`rlcore sft`: the `sft` section as a run of its own."""
    if config.sft is None:
        raise ConfigError("sft: must be set for supervised training (steps, rows_per_step, optimizer)")
    with Interruption():
        saved = checkpoint.latest(folder) if resume else None
        fit(Policy(config, backend), config.sft, folder, saved, console)


def warm_start(policy: Policy, folder: Path, console: Console) -> Path:
    """The Hugging Face folder of the warmed-up model: the run's initial policy and its reference. Made once a run."""
    assert policy.config.sft is not None
    if not (folder / "checkpoints" / "latest").exists():
        fit(policy, policy.config.sft, folder, None, console)
    return checkpoint.latest(folder) / "model"


def fit(policy: Policy, config: SftConfig, folder: Path, saved: Path | None, console: Console) -> None:
    """Minimizes the mean negative log-probability of the target tokens."""
    source = policy.prompts(policy.config.seed)
    actor = TorchActor(policy.load(), policy.adapter, policy.settings, negative_log_likelihood, config.optimizer)
    done = 0
    if saved:
        state = checkpoint.read_state(saved)
        actor.load(saved)
        done, source.drawn = state["step"], state["drawn"]
    folder.mkdir(parents=True, exist_ok=True)
    sinks = metrics.Sinks(folder, policy.config.logging.tensorboard, done + 1 if done else 0)
    console.start("sft", config.steps, done)
    try:
        for number in range(done + 1, config.steps + 1):
            start = time.perf_counter()
            row = actor.update(Batch.of(targets(source, config.rows_per_step, policy.adapter)))
            row["timing/all"] = time.perf_counter() - start
            sinks.write(number, row)
            if number % config.log_every == 0 or number == config.steps:
                console.step(f"sft {number}/{config.steps}  loss {row['sft/loss']:.4f}  grad {row['grad_norm']:.3g}", config.log_every)
        state = {"step": config.steps, "drawn": source.drawn}
        checkpoint.save(folder, f"step_{config.steps:06d}", state, actor.save)
    finally:
        console.stop()
        sinks.close()


def targets(source: PromptSource, count: int, adapter: Adapter) -> list[Group]:
    """The next rows, each with its target as the only sample."""
    return [Group(prompt, [_target(prompt, adapter)]) for prompt in source.draw(count)]


def negative_log_likelihood(tokens: TokenView) -> TokenLoss:
    loss = -tokens.logprobs
    return TokenLoss(loss, {"sft/loss": loss, "sft/entropy": tokens.entropy})


def _target(prompt: Prompt, adapter: Adapter) -> Sample:
    text = prompt.row.target
    if not text:
        raise ConfigError(f"{prompt.row.id}: has no target to imitate; name the target column in data.train.options or remove sft")
    token_ids = adapter.encode_response(text)
    return Sample(token_ids, [0.0] * len(token_ids), text, "stop", policy_version=0)
