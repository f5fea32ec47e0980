"""Training task of each command: its objective, minibatch schedule and optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from rlcore.algorithms import aggregation, dpo
from rlcore.algorithms.loss import objective
from rlcore.algorithms.objective import Objective, tokens
from rlcore.algorithms.schedule import MinibatchSchedule
from rlcore.algorithms.sft import negative_log_likelihood
from rlcore.config.schema import RunConfig
from rlcore.config.sections import OptimizerConfig
from rlcore.types import Batch


@dataclass(frozen=True)
class TrainingTask:
    """A command's training settings; identical on the controller, which splits batches, and on the workers, which step."""

    objective: Objective
    schedule: MinibatchSchedule
    optimizer: OptimizerConfig
    temperature: float  # of the log-probabilities
    with_reference: bool  # needs log-probabilities of the initial model
    routing_replay: bool = False  # responses were sampled, and go to the experts of the rollout


def training_task(command: str, config: RunConfig, steps: int | None = None) -> TrainingTask:
    """`command`: grpo, sft or dpo. `steps`: of the whole run; None is the run file's."""
    if command == "sft":
        return _sft(config, steps)
    return {"grpo": _grpo, "dpo": _dpo}[command](config)


def _grpo(config: RunConfig) -> TrainingTask:
    train, algorithm = config.train, config.algorithm
    each = train.minibatches_per_step * train.epochs_per_step
    schedule = MinibatchSchedule(train.steps * each, train.minibatches_per_step, train.epochs_per_step, config.seed)
    goal = objective(algorithm, config.rollout.max_new_tokens)
    return TrainingTask(
        goal, schedule, config.optimizer, config.rollout.temperature, algorithm.kl_coef > 0, config.model.routing_replay
    )


def _sft(config: RunConfig, steps: int | None) -> TrainingTask:
    """SFT: responses were not sampled, so log-probabilities are at temperature 1."""
    assert config.sft is not None
    steps = config.sft.steps if steps is None else steps
    assert steps is not None, "under sft.epochs the rows say how many"
    goal = Objective(negative_log_likelihood, aggregation.token_mean, tokens)
    return TrainingTask(goal, MinibatchSchedule(steps), config.sft.optimizer, 1.0, with_reference=False)


def _dpo(config: RunConfig) -> TrainingTask:
    assert config.dpo is not None
    goal = Objective(partial(dpo.loss, config=config.dpo), aggregation.pair_mean, _pairs, whole_groups=True)
    return TrainingTask(goal, MinibatchSchedule(config.dpo.steps), config.dpo.optimizer, 1.0, with_reference=True)


def _pairs(batch: Batch) -> float:
    return float(len(batch.groups))
