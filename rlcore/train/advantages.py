"""Compute advantages from rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from rlcore.algorithms import dapo
from rlcore.algorithms.advantages import advantages
from rlcore.algorithms.kl import divergence
from rlcore.config.algorithm import AlgorithmConfig
from rlcore.config.schema import RunConfig
from rlcore.types import AdvantageInputs, Batch, Score


def needs_old_logprobs(config: RunConfig) -> bool:
    """Whether old log-probabilities need a forward pass of their own before the update."""
    updates = config.train.minibatches_per_step * config.train.epochs_per_step
    return updates > 1 or (config.algorithm.kl_coef > 0 and config.algorithm.kl_in == "reward")


def advantage_inputs(batch: Batch, scores: Sequence[Sequence[Score]], config: RunConfig) -> AdvantageInputs:
    """Rewards, less the overlong penalty, and per-token KL penalties: the input of advantage estimation."""
    algorithm = config.algorithm
    flat = [score for group in scores for score in group]
    valid = torch.tensor([score.value is not None for score in flat])
    rewards = torch.tensor([0.0 if score.value is None else score.value for score in flat], dtype=torch.float64)
    if algorithm.overlong_penalty:
        rewards += dapo.overlong_penalty(batch.lengths, config.rollout.max_new_tokens, algorithm) * valid
    penalties = torch.zeros(len(batch.loss_mask), dtype=torch.float64)
    if batch.ref_logprobs is not None and algorithm.kl_in == "reward":
        assert batch.old_logprobs is not None
        penalties = batch.kl_coef * divergence(batch.old_logprobs, batch.ref_logprobs, algorithm.kl_estimator).double()
    groups = torch.tensor([number for number, group in enumerate(scores) for _ in group])
    return AdvantageInputs(rewards, valid, groups, batch.lengths, penalties, batch.values)


def with_advantages(batch: Batch, inputs: AdvantageInputs, config: AlgorithmConfig) -> Batch:
    """Add each token's advantage and return; mask out samples whose reward failed and, if mask_truncated, truncated ones."""
    values, returns = advantages(inputs, config)
    counts = inputs.valid
    if config.mask_truncated:
        counts = counts & torch.tensor([sample.finish == "stop" for sample in batch.samples])
    return replace(batch, advantages=values, returns=returns, loss_mask=batch.per_token(counts))
