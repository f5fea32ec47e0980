"""REINFORCE++ (Hu et al., arXiv 2501.03262): no critic; advantages are normalized over the whole batch."""

from __future__ import annotations

import torch
from torch import Tensor

from rlcore.types import Outcome


def advantages(outcome: Outcome) -> Tensor:
    """[N]: the reward less the divergence penalties from this token on, normalized over all valid tokens of the batch."""
    return normalized(outcome.rewards[outcome.sequence] - _from_here_on(outcome), outcome)


def advantages_over_baseline(outcome: Outcome) -> Tensor:
    """[N]: the same of rewards less their group's mean (REINFORCE++-baseline)."""
    rewards = outcome.rewards.clone()
    for members in outcome.compared():
        rewards[members] -= rewards[members].mean()
    return normalized(rewards[outcome.sequence] - _from_here_on(outcome), outcome)


def normalized(values: Tensor, outcome: Outcome) -> Tensor:
    """[N]: mean 0 and standard deviation 1 (ddof 0) over valid tokens, 0 on the others and where all are equal."""
    valid = outcome.valid[outcome.sequence]
    if not valid.any():
        return torch.zeros_like(values)
    chosen = values[valid]
    return ((values - chosen.mean()) / chosen.std(correction=0).clamp(min=1e-8)).where(valid, 0)


def _from_here_on(outcome: Outcome) -> Tensor:
    """[N]: the penalties of each response from a token to its end."""
    sequence = outcome.sequence
    running = outcome.penalties.double().cumsum(0)
    ends = outcome.lengths.cumsum(0)[sequence] - 1
    return (running[ends] - running + outcome.penalties).to(outcome.penalties.dtype)
