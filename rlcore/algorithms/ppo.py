"""Proximal Policy Optimization (Schulman et al., arXiv 1707.06347): a critic estimates the value before each token."""

from __future__ import annotations

import torch
from torch import Tensor

from rlcore.algorithms.reinforce_pp import normalized
from rlcore.config.algorithm import AlgorithmConfig
from rlcore.types import AdvantageInputs, TokenLoss, ValueView


def advantages(inputs: AdvantageInputs, config: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    """[N] float64 advantages, normalized over the batch, and returns, by generalized advantage estimation (arXiv 1506.02438).

    A token's reward is minus its KL penalty; the last also gets the response's reward. The value after the last token is 0.
    """
    assert inputs.values is not None
    ends = inputs.lengths.cumsum(0)
    rewards = -inputs.penalties
    rewards = rewards.index_add(0, ends - 1, inputs.rewards)
    width = int(inputs.lengths.max())
    place = torch.arange(len(rewards)) - (ends - inputs.lengths)[inputs.sequence]
    rows = inputs.sequence
    padded_rewards, values = rewards.new_zeros(len(ends), width), rewards.new_zeros(len(ends), width + 1)
    padded_rewards[rows, place], values[rows, place] = rewards, inputs.values
    errors = padded_rewards + config.gae_gamma * values[:, 1:] - values[:, :-1]
    following, estimate = rewards.new_zeros(len(ends)), rewards.new_zeros(len(ends), width)
    for step in reversed(range(width)):
        here = step < inputs.lengths
        following = (errors[:, step] + config.gae_gamma * config.gae_lambda * following).where(here, 0)
        estimate[:, step] = following
    raw = estimate[rows, place]
    return normalized(raw, inputs), raw + inputs.values


def value_loss(tokens: ValueView, clip: float) -> TokenLoss:
    """Half the squared error against the returns; moving further than `clip` from the old value does not lower it."""
    moved = tokens.values - tokens.old_values
    clipped = tokens.old_values + moved.clamp(-clip, clip)
    near = torch.where(moved.abs() > clip, clipped, tokens.values)  # the sum would round where nothing is clipped
    loss, clipped_loss = (tokens.values - tokens.returns).square() / 2, (near - tokens.returns).square() / 2
    worst = torch.maximum(loss, clipped_loss)
    return TokenLoss(worst, {
        "critic/loss": worst, "critic/values": tokens.values, "critic/returns": tokens.returns,
        "critic/clipfrac": (clipped_loss > loss).float(),
    })  # fmt: skip
