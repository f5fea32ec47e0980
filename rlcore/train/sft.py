"""Supervised fine-tuning of the actor on the rows' targets: the warm start of a GRPO run, or `rlcore sft` by itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rlcore.checkpoint.folder import latest_checkpoint, newest_checkpoint, read_state
from rlcore.config.schema import RunConfig
from rlcore.config.sections import SftConfig
from rlcore.data.chat import check_opening
from rlcore.data.prompts import Encoded, PromptSource
from rlcore.device import Backend
from rlcore.errors import ConfigError
from rlcore.model.resolved import ResolvedModel
from rlcore.monitor.clock import Clock
from rlcore.monitor.console import Console
from rlcore.protocols import ModelFamily, Reward
from rlcore.rewards.runner import RewardFunctions
from rlcore.runtime.placement import Placement
from rlcore.runtime.roles import InlineReward
from rlcore.train.evaluate import evaluate, evaluating
from rlcore.train.loop import Loop
from rlcore.train.results import Evaluation
from rlcore.train.session import Session
from rlcore.train.supervised import SupervisedTask
from rlcore.types import Batch, Group, Metrics, Prompt, Row, Sample


def train(
    config: RunConfig, backend: Backend, folder: Path, resume: bool, console: Console, begin: Callable[[], object]
) -> None:
    """`rlcore sft`: run the `sft` section by itself; without training rows, only evaluate. `begin` is called before anything is
    written."""
    if not config.data.train and not config.data.eval:
        raise ConfigError("data: names no rows; set data.train to train, or data.eval to evaluate only")
    config = config if config.data.train else evaluating(config)
    if config.sft is None:
        raise ConfigError("sft: must be set for supervised training (steps or epochs, rows_per_step, optimizer)")
    saved = latest_checkpoint(folder, console.warn) if resume else None
    with Session(config, backend, folder, console) as session:
        if config.data.train:
            session.read(partial(check_target, resolved=session.resolved), conversations=True)
        rewards = RewardFunctions(config.reward) if config.reward else None
        held_out = session.held_out(partial(_check_held_out, rewards=rewards, resolved=session.resolved))
        session.start().load("sft", steps=steps(config.sft, session.source))
        if held_out and rewards:
            session.placement.start_engines()
        session.announce(begin)
        task = imitation(session, session.source, held_out, rewards)
        Loop(task, session, folder, config.evaluation).go(saved)


def warm_up(session: Session, folder: Path) -> None:
    """Run the warm start of a GRPO run in `folder`, resuming from the newest checkpoint there."""
    source = session.source.recoded(session.resolved.family.encode_conversation)
    try:
        Loop(imitation(session, source), session, folder).go(newest_checkpoint(folder))
    finally:
        source.close()


def steps(config: SftConfig, source: PromptSource) -> int:
    """Steps of the whole run: the last one of `epochs` may have fewer rows. 0 without rows."""
    limits = [config.steps if len(source) else 0] if config.steps is not None else []
    if config.epochs is not None:
        limits.append(math.ceil(config.epochs * len(source) / config.rows_per_step))
    return min(limits)


def missing(folder: Path | None, steps: int) -> bool:
    """Whether a warm start of `steps` is requested and unfinished: it runs once per run, then is read from its folder."""
    saved = newest_checkpoint(folder) if folder else None
    return folder is not None and (saved is None or read_state(saved)["step"] < steps)


def result(folder: Path | None) -> Path | None:
    """Model folder of a finished warm start: the run's initial policy and reference."""
    if folder is None:
        return None
    finished = newest_checkpoint(folder)
    assert finished is not None, "`missing` has said so"
    return finished / "model"


def check_target(row: Row, resolved: ResolvedModel) -> None:
    """Raise ConfigError for a row whose target is missing, one that no model would write (`response_length`), or too long for
    one forward pass."""
    family, cap = resolved.family, resolved.config.train.max_tokens_per_microbatch
    if not row.target or not row.target.strip():
        raise ConfigError(
            f"{row.id}: no target to imitate, and no turn of the assistant; name the column (options target or messages of the"
            " data set), or remove the row"
        )
    response_length(row, row.target, "target", family)
    for message in row.rest:
        if message["role"] == "assistant":
            _check_end(row, family.encode_response(message["content"]), "answer", family)
    tokens = family.conversation_length(row)
    if tokens > cap:
        raise ConfigError(
            f"{row.id}: prompt and target need {tokens} tokens, more than train.max_tokens_per_microbatch {cap}; raise that"
            " limit or remove the row"
        )


def _check_held_out(row: Row, rewards: RewardFunctions | None, resolved: ResolvedModel) -> None:
    """Rows need a target for the loss or, where rewards score sampled responses, a reward."""
    if rewards:
        rewards.check(row)
    if row.target or not rewards:
        check_target(row, resolved)


def response_length(row: Row, text: str, what: str, family: ModelFamily) -> int:
    """Count the tokens of a response to imitate; ConfigError if it repeats what the chat template writes before it, or goes on
    after the end of its turn."""
    check_opening(family.opening(row), text, row.id, what)
    token_ids = family.encode_response(text)
    _check_end(row, token_ids, what, family)
    return len(token_ids)


def _check_end(row: Row, token_ids: Sequence[int], what: str, family: ModelFamily) -> None:
    if ends := family.stop_token_ids.intersection(token_ids[:-1]):
        raise ConfigError(
            f"{row.id}: the {what} holds token {min(ends)}, which ends a response, before its end, where it is added; remove it"
            " from the data"
        )


def imitation(
    session: Session, source: PromptSource, held_out: Mapping[str, Encoded[Prompt]] | None = None, rewards: Reward | None = None
) -> SupervisedTask:
    """SFT task: minimize the mean negative log-probability of the assistant's tokens. Evaluates the loss on the held-out rows
    and, with rewards, sampled responses to them."""
    config, placement = session.config.sft, session.placement
    assert config is not None
    rows = math.inf if config.epochs is None else config.epochs * len(source)
    clock = Clock(session.watchdog.heartbeat)

    def batch() -> Batch:
        return imitated(source.draw(int(min(config.rows_per_step, max(rows - source.drawn, 1)))), placement)

    def evaluation() -> Evaluation:
        sets, family = held_out or {}, session.resolved.family
        losses = {
            name: {**loss, "dropped_long": float(prompts.dropped_long)}
            for name, prompts in sets.items() if (loss := target_loss(prompts.rows, placement, family, config))
        }  # fmt: skip
        if rewards is None:
            return Evaluation(losses=losses)
        placement.sync_weights()
        scorer = placement.reward or InlineReward(rewards, clock)
        return Evaluation(evaluate(placement, scorer, sets, session.config), losses)

    return SupervisedTask(
        "sft", steps(config, source), config.log_every, source, batch, ("sft/loss",), session, clock, evaluation
    )


def target_loss(rows: Sequence[Row], placement: Placement, family: ModelFamily, config: SftConfig) -> Metrics:
    """Mean negative log-probability of the held-out targets' tokens, and the number of these and of their rows; empty without
    targets."""
    total, tokens, targets = 0.0, 0, 0
    for start in range(0, len(rows), config.rows_per_step):
        chunk = [row for row in rows[start : start + config.rows_per_step] if row.target]
        if chunk:
            batch = imitated([prompt for row in chunk for prompt in family.encode_conversation(row)], placement)
            total, tokens = total - float(placement.actor.logprobs(batch).double().sum()), tokens + len(batch.loss_mask)
            targets += len(chunk)
    return {"loss": total / tokens, "loss_tokens": float(tokens), "loss_rows": float(targets)} if tokens else {}


def imitated(prompts: Sequence[Prompt], placement: Placement) -> Batch:
    """Whole conversations, each with the tokens to imitate as its only sample."""
    prompts = placement.encoder.embed(prompts) if placement.encoder else prompts
    return Batch.of([Group(prompt, [given(prompt)]) for prompt in prompts])


def given(prompt: Prompt) -> Sample:
    """The tokens of a conversation that are imitated."""
    assert prompt.imitated is not None, "`encode_conversation` names them"
    return _sample(np.array(prompt.token_ids, np.int32)[prompt.imitated], prompt.row.target or "")


def written(text: str, family: ModelFamily) -> Sample:
    """Encode a response from the data as a sample."""
    return _sample(np.array(family.encode_response(text), np.int32), text)


def _sample(token_ids: NDArray[np.int32], text: str) -> Sample:
    """A sample that no engine drew: its log-probabilities are 0."""
    return Sample(token_ids, np.zeros(len(token_ids), np.float32), text, "stop", policy_version=0)
